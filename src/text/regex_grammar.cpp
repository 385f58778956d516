// SPDX-License-Identifier: Apache-2.0
#include "text/regex_grammar.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "text/utf8.h"

namespace nibble {
namespace {

using StateId = GrammarBuilder::StateId;

constexpr int kMaxNesting = 100;
constexpr int kMaxRepeat = 10'000;
constexpr int kMaxWork = 1'000'000;  // nodes visited; repeats of empty groups make no states

const CodePoints kDigits = {{'0', '9'}};
const CodePoints kWord = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
const CodePoints kSpace = {{'\t', '\r'},     {' ', ' '},       {0xa0, 0xa0},     {0x1680, 0x1680},
                           {0x2000, 0x200a}, {0x2028, 0x2029}, {0x202f, 0x202f}, {0x205f, 0x205f},
                           {0x3000, 0x3000}, {0xfeff, 0xfeff}};
const CodePoints kLineEnds = {{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}};

struct Node {
  enum class Kind : uint8_t { kSet, kSequence, kAlternatives, kRepeat } kind = Kind::kSequence;
  CodePoints set;
  std::vector<std::unique_ptr<Node>> parts;  // kSequence: in order; kRepeat: one
  int min = 0, max = 0;                      // kRepeat; -1: without end
  bool at_begin = false, at_end = false;     // kSequence: anchored
};

class Parser {
 public:
  Parser(std::string_view text, std::string_view what) : text_(text), what_(what) {}

  std::unique_ptr<Node> parse() {
    if (!utf8::is_valid(text_)) wrong("is not UTF-8");
    auto node = alternatives(true);
    if (at_ < text_.size()) wrong("has a ')' that closes nothing");
    return node;
  }

 private:
  [[noreturn]] void wrong(std::string_view problem) const {
    fail(ErrorKind::kInput, "{} {} at byte {}: {}", what_, problem, at_, text_.substr(0, 200));
  }
  [[noreturn]] void unsupported(std::string_view thing) const {
    fail(ErrorKind::kUnsupported, "{} has {} at byte {}, which nibble does not support: {}", what_,
         thing, at_, text_.substr(0, 200));
  }

  bool done() const { return at_ >= text_.size(); }
  char peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }
  bool take(std::string_view token) {
    if (!text_.substr(at_).starts_with(token)) return false;
    at_ += token.size();
    return true;
  }
  uint32_t take_code_point() {
    const auto point =
        utf8::decode_valid(reinterpret_cast<const unsigned char*>(text_.data()) + at_);
    at_ += point.length_bytes;
    return point.value;
  }

  std::unique_ptr<Node> alternatives(bool outermost) {
    if (++depth_ > kMaxNesting) wrong(fmt::format("nests deeper than {} groups", kMaxNesting));
    auto node = std::make_unique<Node>();
    node->kind = Node::Kind::kAlternatives;
    do {
      node->parts.push_back(sequence(outermost));
    } while (take("|"));
    --depth_;
    return node;
  }

  std::unique_ptr<Node> sequence(bool outermost) {
    auto node = std::make_unique<Node>();
    if (outermost && take("^")) node->at_begin = true;
    while (!done() && peek() != '|' && peek() != ')') {
      if (peek() == '^') unsupported("^ inside of an expression");
      if (peek() == '$') {
        const char after = peek(1);
        if (!outermost || (at_ + 1 < text_.size() && after != '|')) {
          unsupported("$ inside of an expression");
        }
        ++at_;
        node->at_end = true;
        break;
      }
      node->parts.push_back(quantified(atom()));
    }
    return node;
  }

  std::unique_ptr<Node> atom() {
    if (take("(")) {
      if (take("?")) {
        if (take("<")) {
          if (peek() == '=' || peek() == '!') unsupported("a look-behind");
          skip_name();
        } else if (take("P<")) {
          skip_name();
        } else if (!take(":")) {
          if (peek() == '=' || peek() == '!') unsupported("a look-ahead");
          unsupported("a group that begins with (?");
        }
      }
      auto node = alternatives(false);
      if (!take(")")) wrong("has a '(' that is not closed");
      return node;
    }
    if (take("[")) return set_node(char_class());
    if (take(".")) return set_node(complement(kLineEnds));
    if (peek() == '\\') return set_node(escape(false));
    if (peek() == '*' || peek() == '+' || peek() == '?') wrong("repeats nothing");
    const uint32_t point = take_code_point();
    return set_node({{point, point}});
  }

  void skip_name() {
    while (!done() && peek() != '>') ++at_;
    if (!take(">")) wrong("has a group name that is not closed");
  }

  static std::unique_ptr<Node> set_node(CodePoints set) {
    auto node = std::make_unique<Node>();
    node->kind = Node::Kind::kSet;
    node->set = normalize(std::move(set));
    return node;
  }

  std::optional<int> number() {
    if (peek() < '0' || peek() > '9') return std::nullopt;
    int value = 0;
    while (peek() >= '0' && peek() <= '9') {
      value = value * 10 + (text_[at_++] - '0');
      if (value > kMaxRepeat) wrong(fmt::format("repeats more than {} times", kMaxRepeat));
    }
    return value;
  }

  std::unique_ptr<Node> quantified(std::unique_ptr<Node> body) {
    int min = 0, max = -1;
    const size_t begin = at_;
    if (take("*")) {
    } else if (take("+")) {
      min = 1;
    } else if (take("?")) {
      max = 1;
    } else if (take("{")) {
      const auto low = number();
      std::optional<int> high = low;
      if (take(",")) high = peek() == '}' ? std::optional(-1) : number();
      if (!low || !high || !take("}")) {  // a brace that is one
        at_ = begin;
        return body;
      }
      min = *low;
      max = *high;
      if (max >= 0 && max < min) wrong("has a {m,n} with n below m");
    } else {
      return body;
    }
    if (!take("?") && peek() == '+') unsupported("a possessive quantifier");
    if (peek() == '*' || peek() == '+' || peek() == '?') wrong("repeats a repeat");
    auto node = std::make_unique<Node>();
    node->kind = Node::Kind::kRepeat;
    node->min = min;
    node->max = max;
    node->parts.push_back(std::move(body));
    return node;
  }

  uint32_t hex(int num_digits) {
    uint32_t value = 0;
    for (int i = 0; i < num_digits; ++i, ++at_) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) wrong("has an escape with too few hexadecimal digits");
      value = value * 16 + static_cast<uint32_t>(digit);
    }
    return value;
  }

  uint32_t unicode_escape() {  // after \u
    if (take("{")) {
      uint32_t value = 0;
      do {
        value = value * 16 + hex(1);
        if (value > 0x10ffff) wrong("has an escape beyond U+10FFFF");
      } while (peek() != '}' && !done());
      if (!take("}")) wrong("has an escape that is not closed");
      return value;
    }
    const uint32_t unit = hex(4);
    if (unit < 0xd800 || unit > 0xdbff || !take("\\u")) return unit;
    const uint32_t low = hex(4);
    if (low < 0xdc00 || low > 0xdfff) wrong("has half a surrogate pair");
    return 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
  }

  CodePoints escape(bool in_class) {
    ++at_;  // the backslash
    if (done()) wrong("ends in a backslash");
    const uint32_t c = take_code_point();
    const auto one = [](uint32_t point) { return CodePoints{{point, point}}; };
    switch (c) {
      case 'd': return kDigits;
      case 'D': return complement(kDigits);
      case 'w': return kWord;
      case 'W': return complement(kWord);
      case 's': return kSpace;
      case 'S': return complement(kSpace);
      case 't': return one('\t');
      case 'n': return one('\n');
      case 'v': return one('\v');
      case 'f': return one('\f');
      case 'r': return one('\r');
      case 'x': return one(hex(2));
      case 'u': {
        const uint32_t point = unicode_escape();
        if (point >= 0xd800 && point <= 0xdfff) wrong("has half a surrogate pair");
        return one(point);
      }
      case '0':
        if (peek() < '0' || peek() > '9') return one(0);
        break;
      case 'b':
        if (in_class) return one('\b');
        unsupported("\\b");
      default: break;
    }
    if (c >= '0' && c <= '9') unsupported("a back-reference");
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) {
      unsupported(fmt::format("\\{}", static_cast<char>(c)));
    }
    return one(c);
  }

  CodePoints char_class() {
    const bool negated = take("^");
    CodePoints set;
    while (peek() != ']' || done()) {
      if (done()) wrong("has a '[' that is not closed");
      if (peek() == '[' && peek(1) == ':') unsupported("a [:class:]");
      const CodePoints first = class_atom();
      if (peek() == '-' && peek(1) != ']' && at_ + 1 < text_.size()) {
        ++at_;
        const CodePoints last = class_atom();
        if (first.size() != 1 || last.size() != 1 || first[0].first != first[0].last ||
            last[0].first != last[0].last || first[0].first > last[0].first) {
          wrong("has a range that does not go from a character to a later one");
        }
        set.push_back({first[0].first, last[0].first});
      } else {
        set.insert(set.end(), first.begin(), first.end());
      }
    }
    ++at_;
    return negated ? complement(set) : normalize(set);
  }

  CodePoints class_atom() {
    if (peek() == '\\') return escape(true);
    const uint32_t point = take_code_point();
    return {{point, point}};
  }

  const std::string_view text_, what_;
  size_t at_ = 0;
  int depth_ = 0;
};

class Compiler {
 public:
  Compiler(GrammarBuilder& builder, std::string_view what, const RegexOptions& options)
      : builder_(builder), what_(what), options_(options) {}

  StateId root(const Node& node, StateId next) {
    std::vector<StateId> states;
    StateId open_end = GrammarBuilder::kNone;  // anything, then `next`; made once
    for (const auto& part : node.parts) {
      StateId state = next;
      if (options_.search && !part->at_end) {
        if (open_end == GrammarBuilder::kNone) open_end = anything(next);
        state = open_end;
      }
      state = compile(*part, state);
      if (options_.search && !part->at_begin) state = anything(state);
      states.push_back(state);
    }
    return builder_.any_of(states);
  }

 private:
  StateId emit(const CodePoints& set, StateId next) {
    return options_.emit ? options_.emit(set, next) : builder_.code_point(set, next);
  }
  StateId anything(StateId next) {
    return builder_.repeat([&](StateId loop) { return emit(complement({}), loop); }, 0, -1, next);
  }

  StateId compile(const Node& node, StateId next) {
    if (++work_ > kMaxWork) {
      fail(ErrorKind::kLimit, "{} repeats too much; use smaller counts", what_);
    }
    switch (node.kind) {
      case Node::Kind::kSet: return emit(node.set, next);
      case Node::Kind::kSequence:
        for (size_t i = node.parts.size(); i-- > 0;) next = compile(*node.parts[i], next);
        return next;
      case Node::Kind::kAlternatives: {
        std::vector<StateId> states;
        for (const auto& part : node.parts) states.push_back(compile(*part, next));
        return builder_.any_of(states);
      }
      case Node::Kind::kRepeat:
        return builder_.repeat([&](StateId after) { return compile(*node.parts[0], after); },
                               node.min, node.max, next);
    }
    return GrammarBuilder::kNone;
  }

  GrammarBuilder& builder_;
  const std::string_view what_;
  const RegexOptions& options_;
  int work_ = 0;
};

}  // namespace

StateId add_regex(GrammarBuilder& builder, std::string_view regex, std::string_view what,
                  const RegexOptions& options, StateId next) {
  const auto root = Parser(regex, what).parse();
  return Compiler(builder, what, options).root(*root, next);
}

}  // namespace nibble
