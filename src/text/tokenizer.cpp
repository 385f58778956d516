// SPDX-License-Identifier: Apache-2.0
#include "text/tokenizer.h"

#include <algorithm>
#include <unordered_map>

#include "base/error.h"
#include "base/json.h"
#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/pretokenizer.h"
#include "text/tokenizer_file.h"
#include "text/utf8.h"

namespace nibble {

struct Tokenizer::State {
  explicit State(TokenizerFile&& file, std::string_view what, const TokenizerOptions& options);

  void encode_plain(std::string_view text, std::vector<int32_t>& out,
                    BytePairEncoder::Scratch& scratch) const;
  std::vector<int32_t> encode(std::string_view text, std::span<const TextRegion> regions) const;

  std::vector<std::string> token_bytes;  // by id
  std::vector<uint8_t> has_token, special;
  std::unordered_map<std::string, int32_t> added_ids;
  AddedTokenMatcher matcher;
  std::vector<SplitPattern> patterns;
  BytePairEncoder bpe;
  std::vector<int32_t> prefix, suffix;
  std::string bos, eos;
  std::optional<int32_t> bos_id, eos_id;
  std::vector<std::string> notices;
};

namespace {

BytePairEncoder make_bpe(const TokenizerFile& file) {
  std::vector<BytePairEncoder::Token> tokens;
  tokens.reserve(file.vocab_ids.size());
  for (const int32_t id : file.vocab_ids)
    tokens.push_back({id, file.token_bytes[static_cast<size_t>(id)]});
  return BytePairEncoder(tokens, file.merges, file.token_bytes.size(), file.ignore_merges);
}

std::vector<SplitPattern> make_patterns(TokenizerFile& file, std::string_view what,
                                        const TokenizerOptions& options) {
  const auto has = [&](std::string_view content) {
    return std::any_of(file.added_tokens.begin(), file.added_tokens.end(),
                       [&](const AddedToken& t) { return t.content == content; });
  };
  auto& patterns = file.split_patterns;
  const bool is_llama3 = patterns.size() == 1 && patterns[0] == kLlama3Pattern;
  const bool is_tekken = patterns.size() == 1 && patterns[0] == kTekkenPattern;
  if (options.regex == TokenizerOptions::Regex::kTekken && !is_tekken) {
    if (!is_llama3) {
      fail(ErrorKind::kUsage,
           "{}: --tokenizer-regex tekken replaces Llama-3's split regex, and this file ships "
           "neither that "
           "nor Tekken's; use --tokenizer-regex shipped",
           what);
    }
    patterns[0] = kTekkenPattern;
    file.notices.push_back(fmt::format(
        "{}: Llama-3's split regex is replaced by Tekken's (--tokenizer-regex tekken)", what));
  } else if (is_llama3 && has("[INST]") && has("[/INST]")) {
    file.notices.push_back(
        fmt::format("{}: ships Llama-3's split regex by mistake and it is what runs, as in Hugging "
                    "Face; Mistral's own "
                    "is Tekken's (--tokenizer-regex tekken). English is hardly affected, Indic, "
                    "Thai and Arabic text is",
                    what));
  }
  std::vector<SplitPattern> out;
  for (size_t i = 0; i < patterns.size(); ++i) {
    out.push_back(SplitPattern::compile(patterns[i],
                                        fmt::format("{}: {}", what, file.split_pattern_fields[i])));
    if (out.back().kind() == SplitKind::kPcre2) {
      file.notices.push_back(
          fmt::format("{}: {} is neither Tekken's nor Llama-3's; PCRE2 runs it, on Unicode 14 "
                      "where Hugging Face has 16",
                      what, file.split_pattern_fields[i]));
    }
  }
  return out;
}

}  // namespace

Tokenizer::State::State(TokenizerFile&& file, std::string_view what,
                        const TokenizerOptions& options)
    : matcher(file.added_tokens),
      patterns(make_patterns(file, what, options)),
      bpe(make_bpe(file)) {
  token_bytes = std::move(file.token_bytes);
  has_token = std::move(file.has_token);
  special.resize(has_token.size());
  for (const AddedToken& token : file.added_tokens) {
    special[static_cast<size_t>(token.id)] = token.special;
    added_ids.emplace(token.content, token.id);
  }
  prefix = std::move(file.template_prefix);
  suffix = std::move(file.template_suffix);
  notices = std::move(file.notices);
}

void Tokenizer::State::encode_plain(std::string_view text, std::vector<int32_t>& out,
                                    BytePairEncoder::Scratch& scratch) const {
  const char* const end = text.data() + text.size();
  if (patterns.size() == 1 && patterns[0].kind() != SplitKind::kPcre2) {
    const auto run = [&](auto next_piece) {
      for (const char* p = text.data(); p < end;) {
        const char* const e = next_piece(p, end);
        bpe.encode({p, static_cast<size_t>(e - p)}, out, scratch);
        p = e;
      }
    };
    patterns[0].kind() == SplitKind::kTekken ? run(next_tekken_piece) : run(next_llama3_piece);
    return;
  }
  // Each pattern cuts the pieces of the one before.
  std::vector<size_t> ends{text.size()}, finer, local;
  if (text.empty()) ends.clear();
  for (const SplitPattern& pattern : patterns) {
    finer.clear();
    size_t begin = 0;
    for (const size_t piece_end : ends) {
      local.clear();
      pattern.split(text.substr(begin, piece_end - begin), local);
      for (const size_t e : local) finer.push_back(begin + e);
      begin = piece_end;
    }
    ends.swap(finer);
  }
  size_t begin = 0;
  for (const size_t piece_end : ends) {
    bpe.encode(text.substr(begin, piece_end - begin), out, scratch);
    begin = piece_end;
  }
}

std::vector<int32_t> Tokenizer::State::encode(std::string_view text,
                                              std::span<const TextRegion> regions) const {
  if (const size_t good = utf8::valid_prefix(text); good != text.size()) {
    fail(ErrorKind::kInput, "the text is not UTF-8: byte {} is 0x{:02x}; nibble wants UTF-8", good,
         static_cast<unsigned char>(text[good]));
  }
  std::vector<int32_t> out;
  out.reserve(text.size() / 4 + 8);
  BytePairEncoder::Scratch scratch;
  for (const TextSpan& span : matcher.split(text, regions)) {
    if (span.id >= 0) {
      out.push_back(span.id);
    } else {
      encode_plain(text.substr(span.begin, span.end - span.begin), out, scratch);
    }
  }
  return out;
}

TokenizerOptions::Regex parse_tokenizer_regex(std::string_view name) {
  if (name == "shipped") return TokenizerOptions::Regex::kShipped;
  if (name == "tekken") return TokenizerOptions::Regex::kTekken;
  fail(ErrorKind::kUsage, "--tokenizer-regex is \"{}\"; nibble wants shipped or tekken", name);
}

Tokenizer Tokenizer::load(const fs::path& model_dir, const TokenizerOptions& options) {
  const auto read_optional = [&](const char* name) {
    return fs::exists(model_dir / name) ? read_file(model_dir / name) : std::string();
  };
  const fs::path path = model_dir / "tokenizer.json";
  return from_json(read_file(path), options, read_optional("tokenizer_config.json"),
                   read_optional("special_tokens_map.json"), path.string());
}

namespace {

// "bos_token": "<s>" or {"content": "<s>", ...} or null.
std::string named_token(const json::value& document, std::string_view what,
                        std::string_view field) {
  if (!document.is_object()) fail(ErrorKind::kInput, "{}: the document is not an object", what);
  const auto it = document.get_object().find(field);
  if (it == document.get_object().end() || it->value().is_null()) return {};
  const json::value* value = &it->value();
  if (value->is_object()) {
    const auto content = value->get_object().find("content");
    if (content != value->get_object().end()) value = &content->value();
  }
  if (!value->is_string()) {
    fail(ErrorKind::kInput,
         "{}: {} is {}; nibble wants a string, or an object with a string \"content\"", what, field,
         dump_json(it->value()));
  }
  return std::string(value->get_string());
}

}  // namespace

Tokenizer Tokenizer::from_json(std::string_view tokenizer_json, const TokenizerOptions& options,
                               std::string_view tokenizer_config_json,
                               std::string_view special_tokens_map_json, std::string_view what) {
  auto state = std::make_shared<State>(parse_tokenizer_file(tokenizer_json, what), what, options);
  const std::string folder(what.substr(0, what.rfind('/') == what.npos ? 0 : what.rfind('/') + 1));
  const auto read_names = [&](std::string_view text, const std::string& name) {
    if (text.empty()) return;
    const json::value document = parse_json(text, name);
    const auto take = [&](const char* field, std::string& token, std::optional<int32_t>& id) {
      if (id) return;
      token = named_token(document, name, field);
      if (token.empty()) return;
      const auto it = state->added_ids.find(token);
      if (it == state->added_ids.end()) {
        fail(ErrorKind::kInput, "{}: {} is \"{}\", which {} does not list in added_tokens", name,
             field, token, what);
      }
      id = it->second;
    };
    take("bos_token", state->bos, state->bos_id);
    take("eos_token", state->eos, state->eos_id);
  };
  read_names(tokenizer_config_json, folder + "tokenizer_config.json");
  read_names(special_tokens_map_json, folder + "special_tokens_map.json");
  return Tokenizer(std::move(state));
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool parse_special,
                                       bool add_bos) const {
  const TextRegion region{text.size(), parse_special};
  std::vector<int32_t> ids = state_->encode(text, {&region, 1});
  if (!add_bos) return ids;
  const auto& prefix = state_->prefix;
  if (ids.size() < prefix.size() || !std::equal(prefix.begin(), prefix.end(), ids.begin())) {
    ids.insert(ids.begin(), prefix.begin(), prefix.end());
  }
  ids.insert(ids.end(), state_->suffix.begin(), state_->suffix.end());
  return ids;
}

std::vector<int32_t> Tokenizer::encode_segments(std::span<const Segment> segments) const {
  std::string text;
  std::vector<TextRegion> regions;
  for (const Segment& segment : segments) {
    if (segment.text.empty()) continue;
    // Each segment must be UTF-8 by itself: halves of a character do not join across a border.
    if (const size_t good = utf8::valid_prefix(segment.text); good != segment.text.size()) {
      fail(ErrorKind::kInput, "the text is not UTF-8: byte {} is 0x{:02x}; nibble wants UTF-8",
           good, static_cast<unsigned char>(segment.text[good]));
    }
    text += segment.text;
    if (!regions.empty() && regions.back().parse_special == segment.parse_special) {
      regions.back().end = text.size();
    } else {
      regions.push_back({text.size(), segment.parse_special});
    }
  }
  return state_->encode(text, regions);
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!skip_special || !is_special(id)) bytes += token_bytes(id);
  }
  std::string out;
  out.reserve(bytes.size());
  utf8::append_lossy(out, bytes);
  return out;
}

bool Tokenizer::has_token(int32_t id) const {
  return id >= 0 && static_cast<size_t>(id) < state_->has_token.size() &&
         state_->has_token[static_cast<size_t>(id)];
}
std::string_view Tokenizer::token_bytes(int32_t id) const {
  return has_token(id) ? std::string_view(state_->token_bytes[static_cast<size_t>(id)])
                       : std::string_view();
}
bool Tokenizer::is_special(int32_t id) const {
  return has_token(id) && state_->special[static_cast<size_t>(id)];
}
std::optional<int32_t> Tokenizer::token_id(std::string_view added_token) const {
  const auto it = state_->added_ids.find(std::string(added_token));
  return it == state_->added_ids.end() ? std::nullopt : std::optional(it->second);
}
int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(state_->has_token.size()); }
std::optional<int32_t> Tokenizer::bos_id() const { return state_->bos_id; }
std::optional<int32_t> Tokenizer::eos_id() const { return state_->eos_id; }
std::string_view Tokenizer::bos_token() const { return state_->bos; }
std::string_view Tokenizer::eos_token() const { return state_->eos; }
std::span<const int32_t> Tokenizer::template_prefix() const { return state_->prefix; }
const std::vector<std::string>& Tokenizer::notices() const { return state_->notices; }

std::string tokenize_json_line(const Tokenizer& tokenizer, std::string_view line,
                               const TokenizeOptions& options) {
  const json::value value = parse_json(line, "the input line");
  std::string out;
  if (!options.decode) {
    if (!value.is_string()) {
      fail(ErrorKind::kInput, "the input line is {}; nibble tokenize wants a JSON string",
           dump_json(value, {.ensure_ascii = true}).substr(0, 80));
    }
    json::array ids;
    for (const int32_t id :
         tokenizer.encode(value.get_string(), options.parse_special, options.bos)) {
      ids.emplace_back(id);
    }
    append_json(out, ids);
    return out;
  }
  if (!value.is_array()) {
    fail(ErrorKind::kInput,
         "the input line is {}; nibble tokenize --decode wants a JSON array of token ids",
         dump_json(value, {.ensure_ascii = true}).substr(0, 80));
  }
  std::vector<int32_t> ids;
  for (const json::value& item : value.get_array()) {
    if (!item.is_int64() || item.get_int64() < 0 || item.get_int64() >= tokenizer.vocab_size() ||
        !tokenizer.has_token(static_cast<int32_t>(item.get_int64()))) {
      fail(ErrorKind::kInput,
           "the input line holds {}; nibble wants the id of a token, from 0 to {}",
           dump_json(item, {.ensure_ascii = true}).substr(0, 80), tokenizer.vocab_size() - 1);
    }
    ids.push_back(static_cast<int32_t>(item.get_int64()));
  }
  append_json_string(out, tokenizer.decode(ids, !options.parse_special));
  return out;
}

}  // namespace nibble
