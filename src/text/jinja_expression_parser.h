// The lower half of the template parser: the token stream and expressions. Statements stand on it
// (jinja_parser.cpp). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja_ast.h"
#include "text/jinja_lexer.h"

namespace nibble::jinja {

class ExpressionParser {
 protected:
  static constexpr int kMaxNesting = 100;  // brackets, statements in one another: parser recursion
  static constexpr int kMaxTreeDepth = 400;  // any expression: evaluator recursion
  using Names = std::initializer_list<std::string_view>;

  explicit ExpressionParser(std::string_view source) : tokens_(tokenize(source)) {}

  // ---- token stream

  const Token& current() const { return tokens_[at_]; }
  const Token& look() const { return tokens_[std::min(at_ + 1, tokens_.size() - 1)]; }

  void check_current() {
    if (current().kind == TokenKind::kError) fail(current().text, current().line);
  }

  Token next() {
    Token token = current();
    if (at_ + 1 < tokens_.size()) {
      ++at_;
      check_current();
    }
    return token;
  }

  [[noreturn]] void fail(const std::string& message, int line = 0) const {
    throw TemplateError(ErrorKind::kInput, "TemplateSyntaxError", message,
                        line > 0 ? line : current().line);
  }

  bool is(TokenKind kind) const { return current().kind == kind; }
  bool is_op(std::string_view op) const { return is(TokenKind::kOperator) && current().text == op; }
  bool is_name(std::string_view name) const {
    return is(TokenKind::kName) && current().text == name;
  }
  bool is_any_name(Names names) const {
    return is(TokenKind::kName) &&
           std::find(names.begin(), names.end(), current().text) != names.end();
  }
  bool skip_op(std::string_view op) {
    if (!is_op(op)) return false;
    next();
    return true;
  }
  bool skip_name(std::string_view name) {
    if (!is_name(name)) return false;
    next();
    return true;
  }

  [[noreturn]] void fail_expected(std::string_view wanted) const {
    if (is(TokenKind::kEnd))
      fail(fmt::format("unexpected end of template, expected '{}'.", wanted));
    fail(fmt::format("expected token '{}', got '{}'", wanted, describe_token(current())));
  }
  void expect_op(std::string_view op) {
    if (!skip_op(op)) fail_expected(op);
  }
  Token expect(TokenKind kind, std::string_view what) {
    if (!is(kind)) fail_expected(what);
    return next();
  }
  Token expect_name() { return expect(TokenKind::kName, "name"); }
  void expect_block_end() { expect(TokenKind::kBlockEnd, "end of statement block"); }

  struct Nesting {
    explicit Nesting(ExpressionParser& p) : parser(p) {
      if (++parser.nesting_ > kMaxNesting) {
        throw TemplateError(ErrorKind::kLimit, "LimitError",
                            fmt::format("nested more than {} levels deep", kMaxNesting),
                            parser.current().line);
      }
    }
    ~Nesting() { --parser.nesting_; }
    ExpressionParser& parser;
  };

  // ---- expressions

  ExprPtr make(ExprKind kind, int line) const;
  ExprPtr constant(Value value, int line) const;
  ExprPtr finish(ExprPtr expr) const;
  ExprPtr unary(ExprKind kind, int line, ExprPtr operand) const;
  ExprPtr binary(ExprKind kind, int line, ExprPtr left, ExprPtr right, std::string name = {}) const;
  bool is_tuple_end(Names extra_ends) const;
  ExprPtr parse_tuple(Names extra_ends, bool with_condition = true, bool in_parentheses = false);
  ExprPtr parse_expression();
  ExprPtr parse_or();
  ExprPtr parse_and();
  ExprPtr parse_not();
  ExprPtr parse_compare();
  ExprPtr parse_sum();
  ExprPtr parse_concat();
  ExprPtr parse_product();
  ExprPtr parse_power();
  ExprPtr parse_unary(bool with_filter);
  ExprPtr parse_primary();
  ExprPtr parse_postfix(ExprPtr expr);
  ExprPtr parse_filter_expr(ExprPtr expr);
  ExprPtr parse_subscript(ExprPtr owner);
  ExprPtr parse_subscribed(bool& is_slice);
  void parse_call_args(Expr& call);
  ExprPtr parse_call(ExprPtr callee);
  std::string parse_dotted_name();
  /// `node | f | g(...)`; with `inline_start` the first name comes without a bar.
  ExprPtr parse_filters(ExprPtr node, bool inline_start);
  ExprPtr parse_test(ExprPtr node);

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0;
  int loop_depth_ = 0;         // of statements; a macro's body starts at 0
  int conditional_depth_ = 0;  // unknown filters and tests are errors only where they must run
  std::vector<Stmt*> macros_;  // open ones, outermost first
};

}  // namespace nibble::jinja
