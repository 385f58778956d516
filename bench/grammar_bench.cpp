// What structured output costs on one core, in CPU time: compiling a schema, and the masks of
// allowed tokens while random answers are drawn from them. A mask is made once for each state of
// the grammar and found again from then on; both are printed. Usage: grammar_bench
// MODEL_DIR_OR_TOKENIZER_JSON [SCHEMA.json...] SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <ctime>
#include <functional>
#include <random>

#include "base/error.h"
#include "base/json.h"
#include "text/grammar_constraint.h"
#include "text/json_schema_grammar.h"

namespace {

using namespace nibble;

constexpr const char* kOrder = R"({"type": "object", "properties": {
  "order_id": {"type": "string", "format": "uuid"},
  "created": {"type": "string", "format": "date-time"},
  "customer": {"$ref": "#/$defs/customer"},
  "items": {"type": "array", "minItems": 1, "items": {"type": "object", "properties": {
    "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4,6}$"},
    "description": {"type": "string"},
    "quantity": {"type": "integer", "minimum": 1, "maximum": 999},
    "price": {"type": "number", "minimum": 0}},
    "required": ["sku", "description", "quantity", "price"], "additionalProperties": false}},
  "status": {"enum": ["new", "paid", "shipped", "returned"]},
  "notes": {"anyOf": [{"type": "string", "maxLength": 200}, {"type": "null"}]}},
  "required": ["order_id", "created", "customer", "items", "status", "notes"],
  "additionalProperties": false,
  "$defs": {"customer": {"type": "object", "properties": {
    "name": {"type": "string", "minLength": 1, "maxLength": 80},
    "email": {"type": "string", "format": "email"},
    "address": {"type": "object", "properties": {"street": {"type": "string"},
      "city": {"type": "string"}, "country": {"type": "string", "pattern": "^[A-Z]{2}$"}},
      "required": ["street", "city", "country"]},
    "referred_by": {"anyOf": [{"$ref": "#/$defs/customer"}, {"type": "null"}]}},
    "required": ["name", "email", "address", "referred_by"]}}})";

double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

std::string summary(std::vector<double> seconds) {
  if (seconds.empty()) return "none";
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double share) {
    return seconds[static_cast<size_t>(share * static_cast<double>(seconds.size() - 1))] * 1e3;
  };
  return fmt::format("{:6} x  median {:8.4f}  90% {:8.4f}  99% {:8.4f}  max {:8.4f} ms",
                     seconds.size(), at(0.5), at(0.9), at(0.99), at(1));
}

void measure(const std::shared_ptr<const TokenTrie>& vocabulary, const Tokenizer& tokenizer,
             const std::string& name, const std::function<Grammar()>& compile) {
  double begin = now();
  const GrammarConstraint constraint(compile(), vocabulary);
  fmt::print("{}: compiled in {:.2f} ms\n", name, (now() - begin) * 1e3);

  std::vector<uint64_t> mask(static_cast<size_t>(tokenizer.vocab_size() + 63) / 64);
  std::vector<double> made, found, accepted;
  std::mt19937 random(1);
  std::vector<int32_t> ids, closers;
  size_t num_tokens = 0, num_answers = 0;
  while (num_answers < 200) {
    const auto matcher = constraint.start();
    ++num_answers;
    for (int step = 0; step < 500; ++step, ++num_tokens) {
      const uint64_t before = constraint.stats().num_masks_made;
      begin = now();
      const auto ending = matcher->fill_mask(mask);
      const double seconds = now() - begin;
      (constraint.stats().num_masks_made > before ? made : found).push_back(seconds);
      if (ending.must_end || (ending.can_end && random() % 2 == 0)) break;
      ids.clear();
      closers.clear();
      for (size_t word = 0; word < mask.size(); ++word) {
        for (uint64_t bits = mask[word]; bits != 0; bits &= bits - 1) {
          const auto id = static_cast<int32_t>(word * 64) + std::countr_zero(bits);
          ids.push_back(id);
          const char last = tokenizer.token_bytes(id).back();
          if (last == '"' || last == ']' || last == '}') closers.push_back(id);
        }
      }
      if (ids.empty()) break;
      const auto& from = !closers.empty() && random() % 6 == 0 ? closers : ids;
      begin = now();
      if (!matcher->accept(from[random() % from.size()])) fmt::print("a mask was wrong\n");
      accepted.push_back(now() - begin);
    }
  }
  const GrammarConstraintStats stats = constraint.stats();
  fmt::print("  {} answers of {} tokens, {} states\n", num_answers, num_tokens, stats.num_states);
  fmt::print("  masks made   {}\n  masks found  {}\n  accept       {}\n", summary(made),
             summary(found), summary(accepted));
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    fmt::print("usage: grammar_bench MODEL_DIR_OR_TOKENIZER_JSON [SCHEMA.json...]\n");
    return 2;
  }
  const fs::path model = argv[1];
  const Tokenizer tokenizer =
      fs::is_directory(model) ? Tokenizer::load(model) : Tokenizer::from_json(read_file(model));
  const double begin = now();
  const auto vocabulary = std::make_shared<TokenTrie>(tokenizer);
  fmt::print("{} ids, a tree of {} nodes made in {:.0f} ms\n", tokenizer.vocab_size(),
             vocabulary->nodes().size(), (now() - begin) * 1e3);
  const auto schema = [](const std::string& text, const std::string& name) {
    return [text, name] { return json_schema_grammar(parse_json(text, name), name); };
  };
  measure(vocabulary, tokenizer, "any JSON object", [] { return json_object_grammar(); });
  measure(vocabulary, tokenizer, "an order", schema(kOrder, "an order"));
  for (int i = 2; i < argc; ++i) {
    measure(vocabulary, tokenizer, argv[i], schema(read_file(argv[i]), argv[i]));
  }
  return 0;
} catch (const nibble::Error& error) {
  fmt::print("{}\n", error.what());
  return 1;
}
