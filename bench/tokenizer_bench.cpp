// Tokenizer speed on one core, in CPU time. Usage: tokenizer_bench MODEL_DIR_OR_TOKENIZER_JSON
// TEXT.jsonl... Texts are the "text" or message "content" strings of JSON lines, each encoded by
// itself, as requests are. Nothing is cached between texts; the first pass over the file is printed
// apart, caches cold. SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <ctime>
#include <random>

#include "base/error.h"
#include "base/json.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace {

using namespace nibble;

// CPU seconds of this thread: the machines this runs on are shared, and wall time measures the
// others.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

void collect(const json::value& value, std::vector<std::string>& out) {
  if (value.is_object()) {
    for (const auto& member : value.get_object()) {
      if ((member.key() == "text" || member.key() == "content") && member.value().is_string()) {
        out.emplace_back(member.value().get_string());
      } else {
        collect(member.value(), out);
      }
    }
  } else if (value.is_array()) {
    for (const auto& item : value.get_array()) collect(item, out);
  }
}

void measure(const Tokenizer& tokenizer, const std::string& name,
             const std::vector<std::string>& texts) {
  size_t num_bytes = 0, num_tokens = 0;
  for (const std::string& text : texts) num_bytes += text.size();
  std::vector<double> seconds;
  std::vector<std::vector<int32_t>> ids;
  for (int pass = 0; pass < 11; ++pass) {
    ids.clear();
    num_tokens = 0;
    const double begin = now();
    for (const std::string& text : texts) {
      ids.push_back(tokenizer.encode(text));
      num_tokens += ids.back().size();
    }
    seconds.push_back(now() - begin);
  }
  const double first = seconds[0], mb = static_cast<double>(num_bytes) / 1e6;
  std::sort(seconds.begin(), seconds.end());
  const double begin = now();
  size_t decoded = 0;
  std::string out;
  for (const auto& text_ids : ids) {
    Detokenizer detokenizer(tokenizer, {.stop = {"</s>", "\n\nUser:"}});
    out.clear();
    for (const int32_t id : text_ids) detokenizer.push(id, out);
    detokenizer.flush(out);
    decoded += out.size();
  }
  const double detokenize = now() - begin;
  fmt::print(
      "{:28} {:6.2f} MB {:5.2f} bytes/token  encode MB/s: first {:6.1f}  median {:6.1f}  best "
      "{:6.1f}   "
      "detokenize: {:4.0f} ns/token\n",
      name, mb, static_cast<double>(num_bytes) / static_cast<double>(num_tokens), mb / first,
      mb / seconds[5], mb / seconds[0], detokenize / static_cast<double>(num_tokens) * 1e9);
  if (decoded > num_bytes) fmt::print("decoded more than was encoded?\n");
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    fmt::print("usage: tokenizer_bench MODEL_DIR_OR_TOKENIZER_JSON TEXT.jsonl...\n");
    return 2;
  }
  const fs::path model = argv[1];
  double begin = now();
  const Tokenizer tokenizer =
      fs::is_directory(model) ? Tokenizer::load(model) : Tokenizer::from_json(read_file(model));
  fmt::print("load {}: {:.0f} ms, {} ids\n", model.string(), (now() - begin) * 1e3,
             tokenizer.vocab_size());
  for (int i = 2; i < argc; ++i) {
    const std::string file = read_file(argv[i]);
    std::vector<std::string> texts;
    for (size_t at = 0; at < file.size();) {
      const size_t end = std::min(file.find('\n', at), file.size());
      if (end > at) collect(parse_json(file.substr(at, end - at), argv[i]), texts);
      at = end + 1;
    }
    measure(tokenizer, fs::path(argv[i]).filename().string(), texts);
  }
  std::mt19937 random(1);
  std::string letters(1'000'000, 'a');
  for (char& c : letters) c = static_cast<char>('a' + random() % 26);
  measure(tokenizer, "10^6 random letters", {letters});
  measure(tokenizer, "10^6 x 'a'", {std::string(1'000'000, 'a')});
  measure(tokenizer, "10^6 spaces", {std::string(1'000'000, ' ')});
  return 0;
} catch (const nibble::Error& error) {
  fmt::print("{}\n", error.what());
  return 1;
}
