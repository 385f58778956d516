// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_parser.h"

#include <algorithm>
#include <utility>

#include "text/jinja_expression_parser.h"
#include "text/jinja_filters.h"

namespace nibble::jinja {
namespace {

class Parser : ExpressionParser {
 public:
  Parser(std::string_view source, const CompileOptions& options)
      : ExpressionParser(source), options_(options) {}

  Body parse() {
    check_current();
    Body body = parse_body({});
    return body;
  }

 private:
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

  const CompileOptions& options_;
  std::vector<std::vector<std::string_view>> end_stack_;
  std::vector<std::string> tag_stack_;
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
