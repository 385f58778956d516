// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_expression_parser.h"

#include <charconv>
#include <utility>

#include "text/jinja_filters.h"

namespace nibble::jinja {

ExprPtr ExpressionParser::make(ExprKind kind, int line) const {
  auto expr = std::make_unique<Expr>();
  expr->kind = kind;
  expr->line = line;
  return expr;
}

ExprPtr ExpressionParser::constant(Value value, int line) const {
  ExprPtr expr = make(ExprKind::kConstant, line);
  expr->constant = std::move(value);
  return expr;
}

ExprPtr ExpressionParser::finish(ExprPtr expr) const {
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
        fmt::format("an expression is nested more than {} levels deep", kMaxTreeDepth), expr->line);
  }
  return expr;
}

ExprPtr ExpressionParser::unary(ExprKind kind, int line, ExprPtr operand) const {
  ExprPtr expr = make(kind, line);
  expr->children.push_back(std::move(operand));
  return finish(std::move(expr));
}

ExprPtr ExpressionParser::binary(ExprKind kind, int line, ExprPtr left, ExprPtr right,
                                 std::string name) const {
  ExprPtr expr = make(kind, line);
  expr->name = std::move(name);
  expr->children.push_back(std::move(left));
  expr->children.push_back(std::move(right));
  return finish(std::move(expr));
}

bool ExpressionParser::is_tuple_end(Names extra_ends) const {
  return is(TokenKind::kVariableEnd) || is(TokenKind::kBlockEnd) || is_op(")") ||
         is_any_name(extra_ends);
}

ExprPtr ExpressionParser::parse_tuple(Names extra_ends, bool with_condition, bool in_parentheses) {
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

ExprPtr ExpressionParser::parse_expression() {
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

ExprPtr ExpressionParser::parse_or() {
  ExprPtr left = parse_and();
  while (is_name("or")) {
    const int line = next().line;
    left = binary(ExprKind::kOr, line, std::move(left), parse_and());
  }
  return left;
}

ExprPtr ExpressionParser::parse_and() {
  ExprPtr left = parse_not();
  while (is_name("and")) {
    const int line = next().line;
    left = binary(ExprKind::kAnd, line, std::move(left), parse_not());
  }
  return left;
}

ExprPtr ExpressionParser::parse_not() {
  if (!is_name("not")) return parse_compare();
  const Nesting nesting(*this);
  const int line = next().line;
  return unary(ExprKind::kNot, line, parse_not());
}

ExprPtr ExpressionParser::parse_compare() {
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

ExprPtr ExpressionParser::parse_sum() {
  ExprPtr left = parse_concat();
  while (is_op("+") || is_op("-")) {
    const Token op = next();
    left = binary(ExprKind::kBinary, op.line, std::move(left), parse_concat(), op.text);
  }
  return left;
}

ExprPtr ExpressionParser::parse_concat() {
  const int line = current().line;
  ExprPtr first = parse_product();
  if (!is_op("~")) return first;
  ExprPtr expr = make(ExprKind::kConcat, line);
  expr->children.push_back(std::move(first));
  while (skip_op("~")) expr->children.push_back(parse_product());
  return finish(std::move(expr));
}

ExprPtr ExpressionParser::parse_product() {
  ExprPtr left = parse_power();
  while (is_op("*") || is_op("/") || is_op("//") || is_op("%")) {
    const Token op = next();
    left = binary(ExprKind::kBinary, op.line, std::move(left), parse_power(), op.text);
  }
  return left;
}

ExprPtr ExpressionParser::parse_power() {
  ExprPtr left = parse_unary(true);
  while (is_op("**")) {
    const Token op = next();
    left = binary(ExprKind::kBinary, op.line, std::move(left), parse_unary(true), op.text);
  }
  return left;
}

ExprPtr ExpressionParser::parse_unary(bool with_filter) {
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

ExprPtr ExpressionParser::parse_primary() {
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

ExprPtr ExpressionParser::parse_postfix(ExprPtr expr) {
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

ExprPtr ExpressionParser::parse_filter_expr(ExprPtr expr) {
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

ExprPtr ExpressionParser::parse_subscript(ExprPtr owner) {
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

ExprPtr ExpressionParser::parse_subscribed(bool& is_slice) {
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

void ExpressionParser::parse_call_args(Expr& call) {
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
    } else if (is(TokenKind::kName) && look().kind == TokenKind::kOperator && look().text == "=") {
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

ExprPtr ExpressionParser::parse_call(ExprPtr callee) {
  ExprPtr expr = make(ExprKind::kCall, current().line);
  expr->children.push_back(std::move(callee));
  parse_call_args(*expr);
  return finish(std::move(expr));
}

std::string ExpressionParser::parse_dotted_name() {
  std::string name = expect_name().text;
  while (skip_op(".")) name += "." + expect_name().text;
  return name;
}

ExprPtr ExpressionParser::parse_filters(ExprPtr node, bool inline_start) {
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

ExprPtr ExpressionParser::parse_test(ExprPtr node) {
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

}  // namespace nibble::jinja
