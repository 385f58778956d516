// SPDX-License-Identifier: Apache-2.0
#include "text/tokenizer_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string_view>

#include "base/error.h"
#include "base/json.h"
#include "text/pretokenizer.h"
#include "text/utf8.h"

namespace nibble {
namespace {

constexpr int64_t kMaxId =
    BytePairEncoder::kMaxIds - 1;  // largest vocabularies in use: about 262,144

// GPT-2's byte alphabet: byte <-> code point. Points reach 0x143.
struct ByteAlphabet {
  std::array<int16_t, 0x144> byte_of;
  constexpr ByteAlphabet() : byte_of{} {
    for (auto& b : byte_of) b = -1;
    int extra = 0;
    for (int b = 0; b < 256; ++b) {
      const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      byte_of[static_cast<size_t>(itself ? b : 256 + extra++)] = static_cast<int16_t>(b);
    }
  }
};
constexpr ByteAlphabet kAlphabet;

// Bytes a token string stands for. A string with a character outside the alphabet stands for
// itself, as in HF's ByteLevel decoder; such a token never comes out of BPE. Returns false for
// those.
bool decode_token_string(std::string_view text, std::string& out) {
  out.clear();
  const auto* p = reinterpret_cast<const unsigned char*>(text.data());
  const auto* const end = p + text.size();
  while (p < end) {
    const auto c = utf8::decode_valid(p);
    const int byte = c.value < kAlphabet.byte_of.size() ? kAlphabet.byte_of[c.value] : -1;
    if (byte < 0) {
      out.assign(text);
      return false;
    }
    out += static_cast<char>(byte);
    p += c.length_bytes;
  }
  return true;
}

// A value with its path, so that every message can name file and field.
class Field {
 public:
  Field(const json::value* value, std::string_view what, std::string path)
      : value_(value), what_(what), path_(std::move(path)) {}

  const json::value* operator->() const { return value_; }
  const json::value& operator*() const { return *value_; }
  const std::string& path() const { return path_; }
  bool absent() const { return !value_ || value_->is_null(); }

  Field at(std::string_view key) const {
    const json::object& members = object();
    const auto it = members.find(key);
    return {it == members.end() ? nullptr : &it->value(), what_,
            path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key)};
  }
  Field at(size_t index) const {
    return {&value_->get_array()[index], what_, fmt::format("{}[{}]", path_, index)};
  }

  const json::object& object() const {
    if (!value_ || !value_->is_object()) refuse("an object");
    return value_->get_object();
  }
  const json::array& array() const {
    if (!value_ || !value_->is_array()) refuse("an array");
    return value_->get_array();
  }
  std::string_view string() const {
    if (!value_ || !value_->is_string()) refuse("a string");
    return value_->get_string();
  }
  bool boolean(bool if_absent) const {
    if (absent()) return if_absent;
    if (!value_->is_bool()) refuse("true or false");
    return value_->get_bool();
  }
  int32_t id() const {
    if (!value_ || !value_->is_int64() || value_->get_int64() < 0 || value_->get_int64() > kMaxId) {
      refuse(fmt::format("a token id from 0 to {}", kMaxId));
    }
    return static_cast<int32_t>(value_->get_int64());
  }
  std::string_view type() const { return at("type").string(); }

  [[noreturn]] void refuse(std::string_view wanted, ErrorKind kind = ErrorKind::kInput) const {
    fail(kind, "{}: {} is {}; nibble wants {}", what_, path_.empty() ? "the document" : path_,
         seen(), wanted);
  }
  [[noreturn]] void unsupported(std::string_view wanted) const {
    refuse(wanted, ErrorKind::kUnsupported);
  }

 private:
  std::string seen() const {
    if (!value_) return "missing";
    if (value_->is_object()) {
      const auto type = value_->get_object().find("type");
      if (type != value_->get_object().end() && type->value().is_string()) {
        return fmt::format("a {}", clip(type->value().get_string()));
      }
      return "an object";
    }
    if (value_->is_array()) return fmt::format("an array of {}", value_->get_array().size());
    std::string text = dump_json(*value_);
    return clip(text);
  }
  static std::string clip(std::string_view text) {
    constexpr size_t kMax = 120;
    if (text.size() <= kMax) return std::string(text);
    std::string out;
    utf8::append_lossy(out, text.substr(0, kMax));
    return out + "...";
  }
  const json::value* value_;
  std::string_view what_;
  std::string path_;
};

class Reader {
 public:
  Reader(std::string_view text, std::string_view what)
      : what_(what), document_(parse_json(text, what)) {}

  TokenizerFile read() {
    const Field root(&document_, what_, "");
    root.object();
    read_ignored(root);
    read_added_tokens(root.at("added_tokens"));
    read_model(root.at("model"));
    place_added_tokens(root.at("added_tokens"));
    read_normalizer(root.at("normalizer"));
    read_pre_tokenizer(root.at("pre_tokenizer"));
    read_decoder(root.at("decoder"));
    read_post_processor(root.at("post_processor"));
    return std::move(out_);
  }

 private:
  void read_ignored(const Field& root) {
    for (const char* name : {"truncation", "padding"}) {
      if (root.at(name).absent()) continue;
      out_.notices.push_back(fmt::format(
          "{}: {} is set and has no effect: nibble neither cuts nor pads a text", what_, name));
    }
  }

  void read_added_tokens(const Field& list) {
    if (list.absent()) return;
    for (size_t i = 0; i < list.array().size(); ++i) {
      const Field item = list.at(i);
      AddedToken token{
          .id = item.at("id").id(),
          .content = std::string(item.at("content").string()),
          .special = item.at("special").boolean(false),
          .normalized = item.at("normalized").boolean(!item.at("special").boolean(false)),
          .lstrip = item.at("lstrip").boolean(false),
          .rstrip = item.at("rstrip").boolean(false),
          .single_word = item.at("single_word").boolean(false)};
      if (token.content.empty()) item.at("content").refuse("a string that is not empty");
      out_.added_tokens.push_back(std::move(token));
    }
    std::vector<const AddedToken*> by_content;
    for (const AddedToken& token : out_.added_tokens) by_content.push_back(&token);
    std::sort(by_content.begin(), by_content.end(),
              [](const auto* a, const auto* b) { return a->content < b->content; });
    for (size_t i = 1; i < by_content.size(); ++i) {
      if (by_content[i - 1]->content != by_content[i]->content) continue;
      fail(ErrorKind::kInput, "{}: added_tokens lists \"{}\" twice; nibble wants each token once",
           what_, by_content[i]->content);
    }
  }

  // Special tokens are found on raw text, never by BPE, whether or not model.vocab lists them: that
  // is what keeps typed text from becoming a control token. (Not so a special token that is one
  // byte, like
  // "!" as padding: BPE needs every byte.)
  void read_model(const Field& model) {
    model.object();
    if (const Field type = model.at("type"); !type.absent() && type.string() != "BPE") {
      type.unsupported("\"BPE\" (byte-level)");
    }
    if (const Field f = model.at("dropout"); !f.absent() && !is_zero(*f)) f.unsupported("null");
    for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      if (const Field f = model.at(name); !f.absent() && !f.string().empty()) f.unsupported("null");
    }
    if (const Field f = model.at("byte_fallback"); f.boolean(false)) {
      f.unsupported("false (byte fallback belongs to SentencePiece tokenizers)");
    }
    out_.ignore_merges = model.at("ignore_merges").boolean(false);

    std::vector<std::string_view> special;
    for (const AddedToken& token : out_.added_tokens) {
      if (token.special) special.push_back(token.content);
    }
    std::sort(special.begin(), special.end());

    const Field vocab = model.at("vocab");
    const json::object& entries = vocab.object();
    std::array<bool, 256> byte_seen{};
    std::string bytes;
    for (const auto& entry : entries) {
      if (!entry.value().is_int64() || entry.value().get_int64() < 0 ||
          entry.value().get_int64() > kMaxId) {
        Field(&entry.value(), what_,
              fmt::format("model.vocab[\"{}\"]", std::string_view(entry.key())))
            .id();
      }
      const auto id = static_cast<int32_t>(entry.value().get_int64());
      const bool in_alphabet = decode_token_string(entry.key(), bytes);
      if (!place(id, bytes)) {
        fail(ErrorKind::kInput, "{}: model.vocab gives id {} to two tokens, one of them \"{}\"",
             what_, id, std::string_view(entry.key()));
      }
      if (!in_alphabet) continue;
      if (bytes.size() > 1 && std::binary_search(special.begin(), special.end(), entry.key()))
        continue;
      out_.vocab_ids.push_back(id);
      if (bytes.size() == 1) byte_seen[static_cast<uint8_t>(bytes[0])] = true;
    }
    for (size_t b = 0; b < 256; ++b) {
      if (byte_seen[b]) continue;
      fail(ErrorKind::kUnsupported,
           "{}: model.vocab has no token for the byte 0x{:02x}; nibble wants a byte-level "
           "vocabulary, "
           "which holds all 256 (SentencePiece vocabularies do not)",
           what_, b);
    }
    std::sort(out_.vocab_ids.begin(), out_.vocab_ids.end());
    read_merges(model.at("merges"), entries);
  }

  void read_merges(const Field& merges, const json::object& vocab) {
    const json::array& list = merges.array();
    if (list.size() > BytePairEncoder::kMaxMerges) {
      merges.unsupported(fmt::format("at most {} merges", BytePairEncoder::kMaxMerges));
    }
    out_.merges.reserve(list.size());
    std::string joined;
    for (size_t i = 0; i < list.size(); ++i) {
      std::string_view left, right;
      if (list[i].is_string()) {
        const std::string_view line = list[i].get_string();
        if (line.starts_with("#version")) continue;
        const size_t space = line.find(' ');
        if (space == line.npos || line.find(' ', space + 1) != line.npos) {
          merges.at(i).refuse("two tokens with one space between them");
        }
        left = line.substr(0, space);
        right = line.substr(space + 1);
      } else if (list[i].is_array() && list[i].get_array().size() == 2 &&
                 list[i].get_array()[0].is_string() && list[i].get_array()[1].is_string()) {
        left = list[i].get_array()[0].get_string();
        right = list[i].get_array()[1].get_string();
      } else {
        merges.at(i).refuse("\"a b\" or [\"a\", \"b\"]");
      }
      joined.assign(left).append(right);
      const BytePairEncoder::Merge merge{vocab_id(vocab, left, i), vocab_id(vocab, right, i),
                                         vocab_id(vocab, joined, i)};
      // A merge that would build a special token out of ordinary text is left out.
      if (std::binary_search(out_.vocab_ids.begin(), out_.vocab_ids.end(), merge.result)) {
        out_.merges.push_back(merge);
      }
    }
  }

  int32_t vocab_id(const json::object& vocab, std::string_view token, size_t merge_idx) const {
    const auto it = vocab.find(token);
    if (it == vocab.end()) {
      fail(ErrorKind::kInput,
           "{}: model.merges[{}] needs the token \"{}\", which model.vocab does not have", what_,
           merge_idx, token);
    }
    return static_cast<int32_t>(it->value().get_int64());
  }

  void place_added_tokens(const Field& list) {
    std::string bytes;
    const json::object& vocab = Field(&document_, what_, "").at("model").at("vocab").object();
    for (size_t i = 0; i < out_.added_tokens.size(); ++i) {
      const AddedToken& token = out_.added_tokens[i];
      const auto it = vocab.find(token.content);
      if (it != vocab.end()) {
        if (it->value().get_int64() == token.id) continue;
        list.at(i).at("id").refuse(fmt::format("{}, the id model.vocab gives to \"{}\"",
                                               it->value().get_int64(), token.content));
      }
      decode_token_string(token.content, bytes);
      if (!place(token.id, bytes)) {
        list.at(i).at("id").refuse(fmt::format("an id of its own for \"{}\"", token.content));
      }
    }
  }

  void read_normalizer(const Field& normalizer) {
    if (normalizer.absent()) return;
    if (normalizer.type() == "Sequence" && normalizer.at("normalizers").array().empty()) return;
    normalizer.unsupported("null: nibble encodes text as it is");
  }

  void read_pre_tokenizer(const Field& field) {
    if (field.absent()) field.unsupported("a ByteLevel step, usually after a Split");
    std::vector<Field> steps;
    if (field.type() == "Sequence") {
      const Field list = field.at("pretokenizers");
      for (size_t i = 0; i < list.array().size(); ++i) steps.push_back(list.at(i));
    } else {
      steps.push_back(field);
    }
    bool byte_level = false;
    for (const Field& step : steps) {
      const std::string_view type = step.type();
      if (byte_level) step.unsupported("nothing after the ByteLevel step");
      if (type == "Split") {
        const Field regex = step.at("pattern").at("Regex");
        if (regex.absent()) step.at("pattern").unsupported("{\"Regex\": ...}");
        if (const Field f = step.at("behavior"); f.string() != "Isolated")
          f.unsupported("\"Isolated\"");
        if (const Field f = step.at("invert"); f.boolean(false)) f.unsupported("false");
        add_pattern(regex.string(), regex.path());
      } else if (type == "ByteLevel") {
        if (const Field f = step.at("add_prefix_space"); f.boolean(true)) {
          f.absent() ? f.unsupported("false (absent means true)") : f.unsupported("false");
        }
        if (step.at("use_regex").boolean(true))
          add_pattern(kGpt2Pattern, step.path() + ".use_regex");
        byte_level = true;
      } else {
        step.unsupported("a Split or ByteLevel step");
      }
    }
    if (!byte_level) field.unsupported("a sequence that ends in a ByteLevel step");
  }

  void add_pattern(std::string_view pattern, const std::string& path) {
    if (out_.split_patterns.size() == 8) {
      fail(ErrorKind::kUnsupported, "{}: {} is the ninth split pattern; nibble runs up to 8", what_,
           path);
    }
    out_.split_patterns.emplace_back(pattern);
    out_.split_pattern_fields.push_back(path);
  }

  void read_decoder(const Field& decoder) {
    if (decoder.absent()) decoder.unsupported("a ByteLevel decoder");
    if (decoder.type() == "Sequence") {
      const Field list = decoder.at("decoders");
      for (size_t i = 0; i < list.array().size(); ++i) {
        if (list.at(i).type() != "ByteLevel" && list.at(i).type() != "Fuse") {
          list.at(i).unsupported("a ByteLevel decoder");
        }
      }
      if (list.array().empty() || list.at(0).type() != "ByteLevel") {
        decoder.unsupported("a ByteLevel decoder first");
      }
    } else if (decoder.type() != "ByteLevel") {
      decoder.unsupported("a ByteLevel decoder");
    }
  }

  void read_post_processor(const Field& field) {
    if (field.absent()) return;
    if (field.type() == "Sequence") {
      const Field list = field.at("processors");
      for (size_t i = 0; i < list.array().size(); ++i) read_one_post_processor(list.at(i));
    } else {
      read_one_post_processor(field);
    }
  }

  void read_one_post_processor(const Field& field) {
    if (field.type() == "ByteLevel") return;  // only trims offsets, which nibble has none of
    if (field.type() != "TemplateProcessing") {
      field.unsupported("ByteLevel or TemplateProcessing");
    }
    std::vector<int32_t> before, after;
    bool seen_text = false;
    const Field single = field.at("single");
    for (size_t i = 0; i < single.array().size(); ++i) {
      const Field piece = single.at(i);
      if (!piece.at("Sequence").absent()) {
        if (seen_text || piece.at("Sequence").at("id").string() != "A") {
          piece.unsupported("one Sequence A per template");
        }
        seen_text = true;
        continue;
      }
      const std::string_view name = piece.at("SpecialToken").at("id").string();
      const Field special = field.at("special_tokens").at(name);
      const Field ids = special.at("ids");
      for (size_t k = 0; k < ids.array().size(); ++k) {
        const int32_t id = ids.at(k).id();
        if (static_cast<size_t>(id) >= out_.has_token.size() ||
            !out_.has_token[static_cast<size_t>(id)]) {
          ids.at(k).refuse("the id of a token");
        }
        (seen_text ? after : before).push_back(id);
      }
    }
    if (!seen_text) single.refuse("a template with the Sequence A in it");
    // Processors run in order, so a later one wraps what an earlier one made.
    out_.template_prefix.insert(out_.template_prefix.begin(), before.begin(), before.end());
    out_.template_suffix.insert(out_.template_suffix.end(), after.begin(), after.end());
  }

  static bool is_zero(const json::value& value) {
    return (value.is_double() && value.get_double() == 0) ||
           (value.is_int64() && value.get_int64() == 0);
  }

  bool place(int32_t id, const std::string& bytes) {
    const auto i = static_cast<size_t>(id);
    if (i >= out_.token_bytes.size()) {
      // Grow in steps: ids come in any order.
      out_.token_bytes.resize(i + 1);
      out_.has_token.resize(i + 1);
    }
    if (out_.has_token[i]) return false;
    out_.has_token[i] = 1;
    out_.token_bytes[i] = bytes;
    return true;
  }

  std::string_view what_;
  json::value document_;
  TokenizerFile out_;
};

}  // namespace

TokenizerFile parse_tokenizer_file(std::string_view text, std::string_view what) {
  return Reader(text, what).read();
}

}  // namespace nibble
