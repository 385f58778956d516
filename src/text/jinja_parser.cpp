// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_parser.h"

#include <algorithm>
#include <charconv>
#include <initializer_list>

#include "text/jinja_filters.h"
#include "text/jinja_lexer.h"

namespace nibble::jinja {
namespace {

constexpr int kMaxNesting = 100;    // brackets, statements inside each other: parser recursion
constexpr int kMaxTreeDepth = 400;  // any expression: evaluator recursion

using Names = std::initializer_list<std::string_view>;

class Parser {
 public:
  Parser(std::string_view source, const CompileOptions& options)
      : options_(options), tokens_(tokenize(source)) {}

  Body parse() {
    check_current();
    Body body = parse_body({});
    return body;
  }

 private:
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
    explicit Nesting(Parser& p) : parser(p) {
      if (++parser.nesting_ > kMaxNesting) {
        throw TemplateError(ErrorKind::kLimit, "LimitError",
                            fmt::format("nested more than {} levels deep", kMaxNesting),
                            parser.current().line);
      }
    }
    ~Nesting() { --parser.nesting_; }
    Parser& parser;
  };

  // ---- statements

  /// Statements up to one of `ends` (left as the current token) or the end of the template.
  Body parse_body(Names ends) {
    const Nesting nesting(*this);
    Body body;
    const auto output = [&](ExprPtr expr) {
      if (body.empty() || body.back()->kind != StmtKind::kOutput) {
        body.push_back(make_stmt(StmtKind::kOutput));
      }
      body.back()->expressions.push_back(std::move(expr));
    };
    if (ends.size() > 0) end_stack_.emplace_back(ends);
    while (!is(TokenKind::kEnd)) {
      if (is(TokenKind::kData)) {
        const Token token = next();
        output(constant(Value::literal(token.text), token.line));
      } else if (is(TokenKind::kVariableBegin)) {
        next();
        ExprPtr expr = parse_tuple({});
        expect(TokenKind::kVariableEnd, "end of print statement");
        output(std::move(expr));
      } else {
        expect(TokenKind::kBlockBegin, "begin of statement block");
        if (ends.size() > 0 && is_any_name(ends)) {
          end_stack_.pop_back();
          return body;
        }
        if (auto stmt = parse_statement()) body.push_back(std::move(stmt));
        expect_block_end();
      }
    }
    if (ends.size() > 0) fail_unknown_tag("");
    return body;
  }

  /// `: %} body {% end`, leaving the end's name current.
  Body parse_statements(Names ends) {
    skip_op(":");
    expect_block_end();
    return parse_body(ends);
  }
  Body parse_statements_to(std::string_view end) {
    Body body = parse_statements({end});
    next();
    return body;
  }

  [[noreturn]] void fail_unknown_tag(const std::string& tag) const {
    std::string message = tag.empty() ? "Unexpected end of template."
                                      : fmt::format("Encountered unknown tag '{}'.", tag);
    if (!end_stack_.empty()) {
      std::string wanted;
      for (const std::string_view end : end_stack_.back()) {
        wanted += fmt::format("{}'{}'", wanted.empty() ? "" : " or ", end);
      }
      const bool is_expected_elsewhere = std::any_of(
          end_stack_.begin(), end_stack_.end(),
          [&](const auto& ends) { return std::find(ends.begin(), ends.end(), tag) != ends.end(); });
      if (!tag.empty() && is_expected_elsewhere) {
        message += fmt::format(
            " You probably made a nesting mistake. Jinja is expecting this tag, but currently "
            "looking "
            "for {}.",
            wanted);
      } else {
        message += fmt::format(" Jinja was looking for the following tags: {}.", wanted);
      }
      if (!tag_stack_.empty()) {
        message +=
            fmt::format(" The innermost block that needs to be closed is '{}'.", tag_stack_.back());
      }
    }
    fail(message);
  }

  std::unique_ptr<Stmt> make_stmt(StmtKind kind) const {
    auto stmt = std::make_unique<Stmt>();
    stmt->kind = kind;
    stmt->line = current().line;
    return stmt;
  }

  std::unique_ptr<Stmt> parse_statement() {
    if (!is(TokenKind::kName)) fail("tag name expected");
    const std::string tag = current().text;
    tag_stack_.push_back(tag);
    std::unique_ptr<Stmt> stmt;
    if (tag == "set") {
      stmt = parse_set();
    } else if (tag == "if") {
      stmt = parse_if();
    } else if (tag == "for") {
      stmt = parse_for();
    } else if (tag == "macro") {
      stmt = parse_macro();
    } else if (tag == "call") {
      stmt = parse_call_block();
    } else if (tag == "filter") {
      stmt = parse_filter_block();
    } else if (tag == "with") {
      stmt = parse_with();
    } else if (tag == "break" || tag == "continue") {
      if (loop_depth_ == 0) fail(fmt::format("'{}' outside loop", tag));
      stmt = make_stmt(tag == "break" ? StmtKind::kBreak : StmtKind::kContinue);
      next();
    } else if (tag == "generation" && options_.generation_tag) {
      stmt = make_stmt(StmtKind::kScope);
      next();
      stmt->bodies.push_back(parse_statements_to("endgeneration"));
    } else if (tag == "block" || tag == "extends" || tag == "include" || tag == "import" ||
               tag == "from" || tag == "print" || tag == "autoescape") {
      throw TemplateError(ErrorKind::kUnsupported, "TemplateSyntaxError",
                          fmt::format("tag '{}' is not supported in chat templates", tag),
                          current().line);
    } else {
      tag_stack_.pop_back();
      fail_unknown_tag(tag);
    }
    tag_stack_.pop_back();
    return stmt;
  }

  Target parse_simple_target() {
    const Nesting nesting(*this);
    if (is_op("(") || is_op("[")) {
      const std::string_view close = current().text == "(" ? ")" : "]";
      next();
      Target target = parse_target({});
      expect_op(close);
      return target;
    }
    if (!is(TokenKind::kName)) {
      if (is(TokenKind::kString) || is(TokenKind::kInteger) || is(TokenKind::kFloat)) {
        fail("can't assign to 'const'");
      }
      fail(fmt::format("Expected an expression, got '{}'", describe_token(current())));
    }
    if (is_any_name({"true", "false", "True", "False", "none", "None"})) {
      fail("can't assign to 'const'");
    }
    Target target;
    target.name = next().text;
    if (skip_op(".")) target.attribute = expect_name().text;
    return target;
  }

  /// One target, or several with commas; ends before `end_name` too.
  Target parse_target(std::string_view end_name) {
    Target first = parse_simple_target();
    if (!is_op(",")) return first;
    Target tuple;
    tuple.is_tuple = true;
    tuple.parts.push_back(std::move(first));
    while (skip_op(",")) {
      if (is(TokenKind::kBlockEnd) || is_op(")") || is_op("]") || is_op("=") ||
          (!end_name.empty() && is_name(end_name))) {
        break;
      }
      tuple.parts.push_back(parse_simple_target());
    }
    return tuple;
  }

  std::unique_ptr<Stmt> parse_set() {
    auto stmt = make_stmt(StmtKind::kSet);
    next();
    stmt->targets.push_back(parse_target({}));
    if (skip_op("=")) {
      stmt->expressions.push_back(parse_tuple({}));
      return stmt;
    }
    stmt->kind = StmtKind::kSetBlock;
    stmt->expressions.push_back(is_op("|") ? parse_filters(nullptr, false) : nullptr);
    stmt->bodies.push_back(parse_statements_to("endset"));
    return stmt;
  }

  std::unique_ptr<Stmt> parse_if() {
    auto stmt = make_stmt(StmtKind::kIf);
    next();
    ++conditional_depth_;
    for (;;) {
      stmt->expressions.push_back(parse_tuple({}, false));
      stmt->bodies.push_back(parse_statements({"elif", "else", "endif"}));
      const Token end = next();
      if (end.text == "elif") continue;
      if (end.text == "else") {
        stmt->bodies.push_back(parse_statements_to("endif"));
      }
      break;
    }
    --conditional_depth_;
    return stmt;
  }

  std::unique_ptr<Stmt> parse_for() {
    auto stmt = make_stmt(StmtKind::kFor);
    next();
    stmt->targets.push_back(parse_target("in"));
    if (!skip_name("in")) fail_expected("in");
    stmt->expressions.push_back(parse_tuple({"recursive"}, false));
    stmt->expressions.push_back(skip_name("if") ? parse_expression() : nullptr);
    stmt->recursive = skip_name("recursive");
    ++loop_depth_;
    stmt->bodies.push_back(parse_statements({"endfor", "else"}));
    --loop_depth_;
    if (next().text == "else") stmt->bodies.push_back(parse_statements_to("endfor"));
    return stmt;
  }

  void parse_signature(Stmt& stmt) {
    expect_op("(");
    while (!is_op(")")) {
      if (!stmt.parameters.empty()) expect_op(",");
      stmt.parameters.push_back(expect_name().text);
      if (skip_op("=")) {
        stmt.defaults.push_back(parse_expression());
      } else if (!stmt.defaults.empty()) {
        fail("non-default argument follows default argument");
      }
    }
    expect_op(")");
  }

  void parse_macro_body(Stmt& stmt, std::string_view end) {
    const int loop_depth = std::exchange(loop_depth_, 0);
    macros_.push_back(&stmt);
    stmt.bodies.push_back(parse_statements_to(end));
    macros_.pop_back();
    loop_depth_ = loop_depth;
  }

  std::unique_ptr<Stmt> parse_macro() {
    auto stmt = make_stmt(StmtKind::kMacro);
    next();
    stmt->name = expect_name().text;
    parse_signature(*stmt);
    parse_macro_body(*stmt, "endmacro");
    return stmt;
  }

  std::unique_ptr<Stmt> parse_call_block() {
    auto stmt = make_stmt(StmtKind::kCallBlock);
    next();
    if (is_op("(")) parse_signature(*stmt);
    ExprPtr call = parse_expression();
    if (call->kind != ExprKind::kCall) fail("expected call");
    stmt->expressions.push_back(std::move(call));
    parse_macro_body(*stmt, "endcall");
    return stmt;
  }

  std::unique_ptr<Stmt> parse_filter_block() {
    auto stmt = make_stmt(StmtKind::kFilterBlock);
    next();
    stmt->expressions.push_back(parse_filters(nullptr, true));
    stmt->bodies.push_back(parse_statements_to("endfilter"));
    return stmt;
  }

  std::unique_ptr<Stmt> parse_with() {
    auto stmt = make_stmt(StmtKind::kWith);
    next();
    while (!is(TokenKind::kBlockEnd)) {
      if (!stmt->targets.empty()) expect_op(",");
      stmt->targets.push_back(parse_simple_target());
      expect_op("=");
      stmt->expressions.push_back(parse_expression());
    }
    stmt->bodies.push_back(parse_statements_to("endwith"));
    return stmt;
  }

  // ---- expressions

  ExprPtr make(ExprKind kind, int line) const {
    auto expr = std::make_unique<Expr>();
    expr->kind = kind;
    expr->line = line;
    return expr;
  }

  ExprPtr constant(Value value, int line) const {
    ExprPtr expr = make(ExprKind::kConstant, line);
    expr->constant = std::move(value);
    return expr;
  }

  ExprPtr finish(ExprPtr expr) const {
    int depth = 0;
    const auto look_at = [&](const ExprPtr& child) {
      if (child) depth = std::max(depth, child->depth);
    };
    for (const auto& child : expr->children) look_at(child);
    for (const auto& child : expr->positional) look_at(child);
    for (const auto& [name, child] : expr->keyword) look_at(child);
    look_at(expr->star_positional);
    look_at(expr->star_keyword);
    expr->depth = depth + 1;
    if (expr->depth > kMaxTreeDepth) {
      throw TemplateError(
          ErrorKind::kLimit, "LimitError",
          fmt::format("an expression is nested more than {} levels deep", kMaxTreeDepth),
          expr->line);
    }
    return expr;
  }

  ExprPtr unary(ExprKind kind, int line, ExprPtr operand) const {
    ExprPtr expr = make(kind, line);
    expr->children.push_back(std::move(operand));
    return finish(std::move(expr));
  }

  ExprPtr binary(ExprKind kind, int line, ExprPtr left, ExprPtr right,
                 std::string name = {}) const {
    ExprPtr expr = make(kind, line);
    expr->name = std::move(name);
    expr->children.push_back(std::move(left));
    expr->children.push_back(std::move(right));
    return finish(std::move(expr));
  }

  bool is_tuple_end(Names extra_ends) const {
    return is(TokenKind::kVariableEnd) || is(TokenKind::kBlockEnd) || is_op(")") ||
           is_any_name(extra_ends);
  }

  ExprPtr parse_tuple(Names extra_ends, bool with_condition = true, bool in_parentheses = false) {
    const int line = current().line;
    std::vector<ExprPtr> items;
    bool is_tuple = false;
    for (;;) {
      if (!items.empty()) expect_op(",");
      if (is_tuple_end(extra_ends)) break;
      items.push_back(with_condition ? parse_expression() : parse_or());
      if (!is_op(",")) break;
      is_tuple = true;
    }
    if (!is_tuple) {
      if (!items.empty()) return std::move(items[0]);
      if (!in_parentheses) {
        fail(fmt::format("Expected an expression, got '{}'", describe_token(current())));
      }
    }
    ExprPtr expr = make(ExprKind::kTuple, line);
    expr->children = std::move(items);
    return finish(std::move(expr));
  }

  ExprPtr parse_expression() {
    const Nesting nesting(*this);
    const int line = current().line;
    ExprPtr value = parse_or();
    while (skip_name("if")) {
      ++conditional_depth_;
      ExprPtr condition = parse_or();
      ExprPtr otherwise = skip_name("else") ? parse_expression() : nullptr;
      --conditional_depth_;
      ExprPtr expr = make(ExprKind::kConditional, line);
      expr->children.push_back(std::move(value));
      expr->children.push_back(std::move(condition));
      expr->children.push_back(std::move(otherwise));
      value = finish(std::move(expr));
    }
    return value;
  }

  ExprPtr parse_or() {
    ExprPtr left = parse_and();
    while (is_name("or")) {
      const int line = next().line;
      left = binary(ExprKind::kOr, line, std::move(left), parse_and());
    }
    return left;
  }

  ExprPtr parse_and() {
    ExprPtr left = parse_not();
    while (is_name("and")) {
      const int line = next().line;
      left = binary(ExprKind::kAnd, line, std::move(left), parse_not());
    }
    return left;
  }

  ExprPtr parse_not() {
    if (!is_name("not")) return parse_compare();
    const Nesting nesting(*this);
    const int line = next().line;
    return unary(ExprKind::kNot, line, parse_not());
  }

  ExprPtr parse_compare() {
    const int line = current().line;
    ExprPtr first = parse_sum();
    ExprPtr expr;
    const auto add = [&](std::string op) {
      if (!expr) {
        expr = make(ExprKind::kCompare, line);
        expr->children.push_back(std::move(first));
      }
      expr->operators.push_back(std::move(op));
      expr->children.push_back(parse_sum());
    };
    for (;;) {
      if (is_op("==") || is_op("!=") || is_op("<") || is_op("<=") || is_op(">") || is_op(">=")) {
        add(next().text);
      } else if (skip_name("in")) {
        add("in");
      } else if (is_name("not") && look().kind == TokenKind::kName && look().text == "in") {
        next();
        next();
        add("not in");
      } else {
        break;
      }
    }
    return expr ? finish(std::move(expr)) : std::move(first);
  }

  ExprPtr parse_sum() {
    ExprPtr left = parse_concat();
    while (is_op("+") || is_op("-")) {
      const Token op = next();
      left = binary(ExprKind::kBinary, op.line, std::move(left), parse_concat(), op.text);
    }
    return left;
  }

  ExprPtr parse_concat() {
    const int line = current().line;
    ExprPtr first = parse_product();
    if (!is_op("~")) return first;
    ExprPtr expr = make(ExprKind::kConcat, line);
    expr->children.push_back(std::move(first));
    while (skip_op("~")) expr->children.push_back(parse_product());
    return finish(std::move(expr));
  }

  ExprPtr parse_product() {
    ExprPtr left = parse_power();
    while (is_op("*") || is_op("/") || is_op("//") || is_op("%")) {
      const Token op = next();
      left = binary(ExprKind::kBinary, op.line, std::move(left), parse_power(), op.text);
    }
    return left;
  }

  ExprPtr parse_power() {
    ExprPtr left = parse_unary(true);
    while (is_op("**")) {
      const Token op = next();
      left = binary(ExprKind::kBinary, op.line, std::move(left), parse_unary(true), op.text);
    }
    return left;
  }

  ExprPtr parse_unary(bool with_filter) {
    const int line = current().line;
    ExprPtr expr;
    if (is_op("-") || is_op("+")) {
      const Nesting nesting(*this);
      const bool negate = next().text == "-";
      expr = unary(negate ? ExprKind::kNegate : ExprKind::kPositive, line, parse_unary(false));
    } else {
      expr = parse_primary();
    }
    expr = parse_postfix(std::move(expr));
    return with_filter ? parse_filter_expr(std::move(expr)) : std::move(expr);
  }

  ExprPtr parse_primary() {
    const int line = current().line;
    switch (current().kind) {
      case TokenKind::kName: {
        const std::string name = next().text;
        if (name == "true" || name == "True") return constant(Value::boolean(true), line);
        if (name == "false" || name == "False") return constant(Value::boolean(false), line);
        if (name == "none" || name == "None") return constant(Value::none(), line);
        for (Stmt* macro : macros_) {
          if (name == "caller") macro->uses_caller = true;
          if (name == "varargs") macro->uses_varargs = true;
          if (name == "kwargs") macro->uses_kwargs = true;
        }
        ExprPtr expr = make(ExprKind::kName, line);
        expr->name = name;
        return expr;
      }
      case TokenKind::kString: {
        std::string text;
        while (is(TokenKind::kString)) text += next().text;
        return constant(Value::literal(text), line);
      }
      case TokenKind::kInteger: {
        const std::string digits = next().text;
        int64_t value = 0;
        const auto [end, ec] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
        if (ec != std::errc()) return constant(Value::big_integer(digits), line);
        return constant(Value::integer(value), line);
      }
      case TokenKind::kFloat: {
        const std::string digits = next().text;
        double value = 0;
        const auto [end, ec] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
        if (ec == std::errc::result_out_of_range) value = strtod(digits.c_str(), nullptr);
        return constant(Value::number(value), line);
      }
      default: break;
    }
    if (skip_op("(")) {
      ExprPtr expr = parse_tuple({}, true, true);
      expect_op(")");
      return expr;
    }
    if (skip_op("[")) {
      ExprPtr expr = make(ExprKind::kList, line);
      while (!is_op("]")) {
        if (!expr->children.empty()) expect_op(",");
        if (is_op("]")) break;
        expr->children.push_back(parse_expression());
      }
      expect_op("]");
      return finish(std::move(expr));
    }
    if (skip_op("{")) {
      ExprPtr expr = make(ExprKind::kDict, line);
      while (!is_op("}")) {
        if (!expr->children.empty()) expect_op(",");
        if (is_op("}")) break;
        expr->children.push_back(parse_expression());
        expect_op(":");
        expr->children.push_back(parse_expression());
      }
      expect_op("}");
      return finish(std::move(expr));
    }
    fail(fmt::format("unexpected '{}'", describe_token(current())));
  }

  ExprPtr parse_postfix(ExprPtr expr) {
    for (;;) {
      if (is_op(".") || is_op("[")) {
        expr = parse_subscript(std::move(expr));
      } else if (is_op("(")) {
        expr = parse_call(std::move(expr));
      } else {
        return expr;
      }
    }
  }

  ExprPtr parse_filter_expr(ExprPtr expr) {
    for (;;) {
      if (is_op("|")) {
        expr = parse_filters(std::move(expr), false);
      } else if (is_name("is")) {
        expr = parse_test(std::move(expr));
      } else if (is_op("(")) {
        expr = parse_call(std::move(expr));
      } else {
        return expr;
      }
    }
  }

  ExprPtr parse_subscript(ExprPtr owner) {
    const int line = current().line;
    if (skip_op(".")) {
      if (is(TokenKind::kName)) {
        ExprPtr expr = unary(ExprKind::kAttribute, line, std::move(owner));
        expr->name = next().text;
        return expr;
      }
      if (!is(TokenKind::kInteger)) fail("expected name or number");
      return binary(ExprKind::kSubscript, line, std::move(owner), parse_primary());
    }
    expect_op("[");
    std::vector<ExprPtr> keys;
    bool is_slice = false;
    while (!is_op("]")) {
      if (!keys.empty()) expect_op(",");
      keys.push_back(parse_subscribed(is_slice));
    }
    expect_op("]");
    if (keys.empty()) fail("expected subscript expression");
    if (is_slice && keys.size() > 1) fail("a slice cannot be one of several subscripts");
    if (is_slice) {
      keys[0]->children[0] = std::move(owner);
      return finish(std::move(keys[0]));
    }
    if (keys.size() == 1) {
      return binary(ExprKind::kSubscript, line, std::move(owner), std::move(keys[0]));
    }
    ExprPtr tuple = make(ExprKind::kTuple, line);
    tuple->children = std::move(keys);
    return binary(ExprKind::kSubscript, line, std::move(owner), finish(std::move(tuple)));
  }

  ExprPtr parse_subscribed(bool& is_slice) {
    const int line = current().line;
    ExprPtr start;
    if (!is_op(":")) {
      start = parse_expression();
      if (!is_op(":")) return start;
    }
    next();
    is_slice = true;
    const auto bound = [&]() -> ExprPtr {
      if (is_op(":") || is_op("]") || is_op(",")) return nullptr;
      return parse_expression();
    };
    ExprPtr stop = bound();
    ExprPtr step = skip_op(":") ? bound() : nullptr;
    ExprPtr expr = make(ExprKind::kSlice, line);
    expr->children.push_back(nullptr);
    expr->children.push_back(std::move(start));
    expr->children.push_back(std::move(stop));
    expr->children.push_back(std::move(step));
    return expr;
  }

  void parse_call_args(Expr& call) {
    expect_op("(");
    bool first = true;
    const auto ensure = [&](bool ok) {
      if (!ok) fail("invalid syntax for function call expression");
    };
    while (!is_op(")")) {
      if (!first) {
        expect_op(",");
        if (is_op(")")) break;
      }
      first = false;
      if (skip_op("*")) {
        ensure(!call.star_positional && !call.star_keyword);
        call.star_positional = parse_expression();
      } else if (skip_op("**")) {
        ensure(!call.star_keyword);
        call.star_keyword = parse_expression();
      } else if (is(TokenKind::kName) && look().kind == TokenKind::kOperator &&
                 look().text == "=") {
        ensure(!call.star_keyword);
        const std::string name = next().text;
        next();
        for (const auto& [other, value] : call.keyword) {
          if (other == name) fail(fmt::format("keyword argument repeated: {}", name));
        }
        call.keyword.emplace_back(name, parse_expression());
      } else {
        ensure(call.keyword.empty() && !call.star_positional && !call.star_keyword);
        call.positional.push_back(parse_expression());
      }
    }
    expect_op(")");
  }

  ExprPtr parse_call(ExprPtr callee) {
    ExprPtr expr = make(ExprKind::kCall, current().line);
    expr->children.push_back(std::move(callee));
    parse_call_args(*expr);
    return finish(std::move(expr));
  }

  std::string parse_dotted_name() {
    std::string name = expect_name().text;
    while (skip_op(".")) name += "." + expect_name().text;
    return name;
  }

  /// `node | f | g(...)`; with `inline_start` the first name comes without a bar.
  ExprPtr parse_filters(ExprPtr node, bool inline_start) {
    while (is_op("|") || inline_start) {
      if (!inline_start) next();
      inline_start = false;
      const int line = current().line;
      ExprPtr expr = make(ExprKind::kFilter, line);
      expr->children.push_back(std::move(node));
      expr->name = parse_dotted_name();
      expr->filter = find_filter(expr->name);
      if (expr->filter == nullptr) {
        if (is_unsupported_filter(expr->name)) {
          throw TemplateError(ErrorKind::kUnsupported, "TemplateAssertionError",
                              fmt::format("filter '{}' is not supported", expr->name), line);
        }
        if (conditional_depth_ == 0) {
          throw TemplateError(ErrorKind::kInput, "TemplateAssertionError",
                              fmt::format("No filter named '{}'.", expr->name), line);
        }
      }
      if (is_op("(")) parse_call_args(*expr);
      node = finish(std::move(expr));
    }
    return node;
  }

  ExprPtr parse_test(ExprPtr node) {
    const int line = next().line;
    const bool negated = skip_name("not");
    ExprPtr expr = make(ExprKind::kTest, line);
    expr->children.push_back(std::move(node));
    expr->name = parse_dotted_name();
    if (is_op("(")) {
      parse_call_args(*expr);
    } else if ((is(TokenKind::kName) && !is_any_name({"else", "or", "and"})) ||
               is(TokenKind::kString) || is(TokenKind::kInteger) || is(TokenKind::kFloat) ||
               is_op("(") || is_op("[") || is_op("{")) {
      if (is_name("is")) fail("You cannot chain multiple tests with is");
      // `x is defined if ...` and `x is divisibleby 3`: only what can start an operand is one.
      expr->positional.push_back(parse_postfix(parse_primary()));
    }
    expr->test = find_test(expr->name);
    if (expr->test == nullptr && conditional_depth_ == 0) {
      throw TemplateError(ErrorKind::kInput, "TemplateAssertionError",
                          fmt::format("No test named '{}'.", expr->name), line);
    }
    expr = finish(std::move(expr));
    return negated ? unary(ExprKind::kNot, line, std::move(expr)) : std::move(expr);
  }

  const CompileOptions& options_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  int nesting_ = 0;
  int loop_depth_ = 0;
  int conditional_depth_ = 0;
  std::vector<std::vector<std::string_view>> end_stack_;
  std::vector<std::string> tag_stack_;
  std::vector<Stmt*> macros_;
};

}  // namespace

Body parse_template(std::string_view source, const CompileOptions& options) {
  if (source.size() > options.max_source_bytes) {
    throw TemplateError(ErrorKind::kLimit, "LimitError",
                        fmt::format("template has {} bytes, at most {} are read", source.size(),
                                    options.max_source_bytes),
                        0);
  }
  return Parser(source, options).parse();
}

}  // namespace nibble::jinja
