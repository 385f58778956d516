// SPDX-License-Identifier: Apache-2.0
#include "text/jinja_eval.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "text/jinja_filters.h"
#include "text/jinja_unicode.h"

namespace nibble::jinja {

const Value* Frame::find(std::string_view name) const {
  for (const auto& [key, value] : variables) {
    if (key == name) return &value;
  }
  return nullptr;
}

void Frame::set(std::string_view name, Value value) {
  for (auto& [key, old] : variables) {
    if (key == name) {
      old = std::move(value);
      return;
    }
  }
  variables.emplace_back(name, std::move(value));
}

struct Evaluator::Depth {
  explicit Depth(Evaluator& e) : eval(e) {
    if (++eval.depth_ > eval.options_.limits.max_depth) {
      --eval.depth_;
      raise_limit(fmt::format("evaluation is nested more than {} levels deep (endless recursion?)",
                              eval.options_.limits.max_depth));
    }
    eval.step();
  }
  ~Depth() { --eval.depth_; }
  Depth(const Depth&) = delete;
  Evaluator& eval;
};

Evaluator::~Evaluator() {
  for (const auto& dict : namespaces_) {
    const auto entries = std::exchange(dict->entries, {});
  }
  for (const auto& frame : captured_frames_) {
    const auto variables = std::exchange(frame->variables, {});
  }
}

Text Evaluator::run(const Body& body) {
  Text out;
  exec(body, std::make_shared<Frame>(nullptr), out);
  return out;
}

// ---- paying

void Evaluator::step(uint64_t count) {
  steps_ += count;
  if (steps_ > options_.limits.max_steps) {
    raise_limit(fmt::format("the template ran for more than {} steps", options_.limits.max_steps));
  }
}

void Evaluator::charge(size_t bytes) {
  memory_bytes_ += bytes;
  if (memory_bytes_ > options_.limits.max_memory_bytes) {
    raise_limit(fmt::format("the template used more than {} bytes of memory",
                            options_.limits.max_memory_bytes));
  }
}

Value Evaluator::make_string(Text text) {
  if (text.size() > options_.limits.max_string_bytes) {
    raise_limit(fmt::format("a string of {} bytes is longer than the {} allowed", text.size(),
                            options_.limits.max_string_bytes));
  }
  charge(text.size() + 96);
  return Value::string(std::move(text));
}

Value Evaluator::make_list(std::vector<Value> items, Kind kind) {
  charge(items.size() * sizeof(Value) + 96);
  return Value::list(std::move(items), kind);
}

Value Evaluator::make_dict(std::shared_ptr<DictObject> dict) {
  charge(dict->entries.size() * 128 + 128);
  return Value::dict(std::move(dict));
}

Value Evaluator::make_namespace(std::shared_ptr<DictObject> dict) {
  Value as_dict = make_dict(std::move(dict));
  auto object = std::static_pointer_cast<DictObject>(as_dict.object());
  namespaces_.push_back(object);
  return Value::object(Kind::kNamespace, std::move(object));
}

Text Evaluator::text_of(const Value& value) {
  if (value.is_string()) {
    charge(value.str().size());
    return value.text();
  }
  Text text = to_text(value);
  charge(text.size());
  return text;
}

void Evaluator::emit(Text& out, const Text& text) {
  if (out.size() + text.size() > options_.limits.max_output_bytes) {
    raise_limit(
        fmt::format("the output is longer than {} bytes", options_.limits.max_output_bytes));
  }
  charge(text.size());
  out.append(text);
}

std::tm Evaluator::now() const {
  if (options_.now) return *options_.now;
  const std::time_t seconds = std::time(nullptr);
  std::tm local{};
  localtime_r(&seconds, &local);
  return local;
}

// ---- statements

Evaluator::Flow Evaluator::exec(const Body& body, const FramePtr& frame, Text& out) {
  for (const auto& stmt : body) {
    const Flow flow = exec(*stmt, frame, out);
    if (flow != Flow::kNormal) return flow;
  }
  return Flow::kNormal;
}

Evaluator::Flow Evaluator::exec(const Stmt& stmt, const FramePtr& frame, Text& out) {
  const Depth depth(*this);
  line_ = stmt.line;
  switch (stmt.kind) {
    case StmtKind::kOutput:
      for (const auto& expr : stmt.expressions) {
        if (expr->kind == ExprKind::kConstant && expr->constant.is_string()) {
          step();
          emit(out, expr->constant.text());
        } else {
          const Value value = eval(*expr, frame);
          if (value.is_string()) {
            emit(out, value.text());
          } else {
            emit(out, to_text(value));
          }
        }
      }
      return Flow::kNormal;
    case StmtKind::kIf: {
      for (size_t i = 0; i < stmt.expressions.size(); ++i) {
        if (truthy(eval(*stmt.expressions[i], frame))) return exec(stmt.bodies[i], frame, out);
      }
      if (stmt.bodies.size() > stmt.expressions.size()) return exec(stmt.bodies.back(), frame, out);
      return Flow::kNormal;
    }
    case StmtKind::kFor: return exec_for(stmt, frame, eval(*stmt.expressions[0], frame), 0, out);
    case StmtKind::kSet:
      assign(stmt.targets[0], eval(*stmt.expressions[0], frame), frame);
      return Flow::kNormal;
    case StmtKind::kSetBlock: {
      Text text;
      const Flow flow = exec(stmt.bodies[0], std::make_shared<Frame>(frame), text);
      Value value = captured(std::move(text));
      if (stmt.expressions[0]) value = apply_filter_chain(*stmt.expressions[0], frame, value);
      assign(stmt.targets[0], value, frame);
      return flow;
    }
    case StmtKind::kMacro:
      frame->set(stmt.name, make_macro(stmt, frame, stmt.name));
      return Flow::kNormal;
    case StmtKind::kCallBlock: exec_call_block(stmt, frame, out); return Flow::kNormal;
    case StmtKind::kFilterBlock: {
      Text text;
      const Flow flow = exec(stmt.bodies[0], std::make_shared<Frame>(frame), text);
      emit(out,
           text_of(apply_filter_chain(*stmt.expressions[0], frame, captured(std::move(text)))));
      return flow;
    }
    case StmtKind::kWith: {
      auto inner = std::make_shared<Frame>(frame);
      for (size_t i = 0; i < stmt.targets.size(); ++i) {
        assign(stmt.targets[i], eval(*stmt.expressions[i], frame), inner);
      }
      return exec(stmt.bodies[0], inner, out);
    }
    case StmtKind::kScope:
      // Hugging Face renders the block's body as a caller, so what is set inside stays inside.
      return exec(stmt.bodies[0], std::make_shared<Frame>(frame), out);
    case StmtKind::kBreak: return Flow::kBreak;
    case StmtKind::kContinue: return Flow::kContinue;
  }
  return Flow::kNormal;
}

Evaluator::Flow Evaluator::exec_for(const Stmt& stmt, const FramePtr& frame, const Value& iterable,
                                    int nesting, Text& out) {
  std::vector<Value> items = iterate(iterable);
  if (stmt.expressions[1]) {
    std::vector<Value> kept;
    for (Value& item : items) {
      auto inner = std::make_shared<Frame>(frame);
      assign(stmt.targets[0], item, inner);
      if (truthy(eval(*stmt.expressions[1], inner))) kept.push_back(std::move(item));
    }
    items = std::move(kept);
  }
  if (items.empty()) {
    if (stmt.bodies.size() > 1) return exec(stmt.bodies[1], std::make_shared<Frame>(frame), out);
    return Flow::kNormal;
  }
  charge(items.size() * sizeof(Value));
  auto loop = std::make_shared<LoopObject>();
  const Value list = Value::list(std::move(items));
  loop->items = std::static_pointer_cast<ListObject>(list.object());
  loop->depth = list.depth() + 1;
  if (loop->depth > kMaxValueDepth) raise_limit("values are nested too deeply");
  loop->nesting = nesting;
  if (stmt.recursive) {
    loop->recurse = [&stmt, frame, nesting](Evaluator& eval, const Value& inner) {
      Text text;
      eval.exec_for(stmt, frame, inner, nesting + 1, text);
      return eval.captured(std::move(text));
    };
    captured_frames_.push_back(frame);
  }
  const Value loop_value = Value::object(Kind::kLoop, loop);
  for (size_t i = 0; i < loop->items->items.size(); ++i) {
    step();
    charge(sizeof(Frame) + 64);
    loop->index = i;
    auto inner = std::make_shared<Frame>(frame);
    inner->set("loop", loop_value);
    assign(stmt.targets[0], loop->items->items[i], inner);
    if (exec(stmt.bodies[0], inner, out) == Flow::kBreak) break;
  }
  loop->recurse = nullptr;
  return Flow::kNormal;
}

Value Evaluator::make_macro(const Stmt& stmt, const FramePtr& frame, std::string name) {
  charge(256);
  captured_frames_.push_back(frame);
  auto macro = std::make_shared<Callable>();
  macro->name = name;
  macro->type_name = "Macro";
  macro->call = [&stmt, frame, name = std::move(name)](Evaluator& eval, Arguments& args) {
    return eval.call_macro(stmt, name, frame, args);
  };
  return Value::object(Kind::kCallable, std::move(macro));
}

Value Evaluator::call_macro(const Stmt& stmt, const std::string& name, const FramePtr& frame,
                            Arguments& args) {
  const Depth depth(*this);
  auto inner = std::make_shared<Frame>(frame);
  const size_t num_parameters = stmt.parameters.size();
  if (args.positional.size() > num_parameters && !stmt.uses_varargs) {
    raise("TypeError", fmt::format("macro {} takes not more than {} argument(s)", repr_string(name),
                                   num_parameters));
  }
  for (size_t i = 0; i < num_parameters; ++i) {
    const std::string& parameter = stmt.parameters[i];
    if (i < args.positional.size()) {
      inner->set(parameter, args.positional[i]);
      continue;
    }
    const auto given = std::find_if(args.keyword.begin(), args.keyword.end(),
                                    [&](const auto& pair) { return pair.first == parameter; });
    if (given != args.keyword.end()) {
      inner->set(parameter, given->second);
      args.keyword.erase(given);
      continue;
    }
    const size_t first_default = num_parameters - stmt.defaults.size();
    inner->set(parameter, i >= first_default
                              ? eval(*stmt.defaults[i - first_default], inner)
                              : Value::undefined_because(
                                    "UndefinedError", fmt::format("parameter {} was not provided",
                                                                  repr_string(parameter))));
  }
  if (stmt.uses_caller) {
    const auto given = std::find_if(args.keyword.begin(), args.keyword.end(),
                                    [](const auto& pair) { return pair.first == "caller"; });
    if (given != args.keyword.end()) {
      inner->set("caller", given->second);
      args.keyword.erase(given);
    } else {
      inner->set("caller", Value::undefined_because("UndefinedError", "No caller defined"));
    }
  }
  if (stmt.uses_kwargs) {
    auto dict = std::make_shared<DictObject>();
    for (auto& [key, value] : args.keyword) dict->set(key, value);
    inner->set("kwargs", make_dict(std::move(dict)));
  } else if (!args.keyword.empty()) {
    raise("TypeError", fmt::format("macro {} takes no keyword argument {}", repr_string(name),
                                   repr_string(args.keyword[0].first)));
  }
  if (stmt.uses_varargs) {
    std::vector<Value> rest;
    for (size_t i = num_parameters; i < args.positional.size(); ++i)
      rest.push_back(args.positional[i]);
    inner->set("varargs", make_list(std::move(rest), Kind::kTuple));
  }
  Text text;
  exec(stmt.bodies[0], inner, text);
  return captured(std::move(text));
}

void Evaluator::exec_call_block(const Stmt& stmt, const FramePtr& frame, Text& out) {
  const Expr& call_expr = *stmt.expressions[0];
  const Value callee = eval(*call_expr.children[0], frame);
  Arguments args;
  eval_arguments(call_expr, frame, args);
  args.keyword.emplace_back("caller", make_macro(stmt, frame, "caller"));
  emit(out, text_of(call(callee, args)));
}

void Evaluator::assign(const Target& target, const Value& value, const FramePtr& frame) {
  if (target.is_tuple) {
    if (!value.is_list_like() && !value.is_string() && !value.is_dict() && !value.is_undefined()) {
      raise("TypeError", fmt::format("cannot unpack non-iterable {} object", type_name(value)));
    }
    const std::vector<Value> items = iterate(value);
    if (items.size() < target.parts.size()) {
      raise("ValueError", fmt::format("not enough values to unpack (expected {}, got {})",
                                      target.parts.size(), items.size()));
    }
    if (items.size() > target.parts.size()) {
      raise("ValueError",
            fmt::format("too many values to unpack (expected {})", target.parts.size()));
    }
    for (size_t i = 0; i < items.size(); ++i) assign(target.parts[i], items[i], frame);
    return;
  }
  if (target.attribute.empty()) {
    frame->set(target.name, value);
    return;
  }
  const Value owner = eval_name(target.name, frame);
  if (owner.kind() != Kind::kNamespace) {
    raise("TemplateRuntimeError", "cannot assign attribute on non-namespace object");
  }
  DictObject& dict = owner.namespace_dict();
  charge(128);
  if (value.depth() + 1 > kMaxValueDepth) raise_limit("values are nested too deeply");
  if (value.object() != owner.object()) dict.depth = std::max(dict.depth, value.depth() + 1);
  dict.set(target.attribute, value);
}

// ---- expressions

Value Evaluator::eval_name(const std::string& name, const FramePtr& frame) {
  for (const Frame* f = frame.get(); f != nullptr; f = f->parent.get()) {
    if (const Value* value = f->find(name)) return *value;
  }
  if (const Value* value = variables_.find(std::string_view(name))) return *value;
  bool found = false;
  Value global = find_global(*this, name, found);
  return found ? global : Value::undefined(name);
}

Value Evaluator::eval(const Expr& expr, const FramePtr& frame) {
  const Depth depth(*this);
  line_ = expr.line;
  switch (expr.kind) {
    case ExprKind::kConstant: return expr.constant;
    case ExprKind::kName: return eval_name(expr.name, frame);
    case ExprKind::kList:
    case ExprKind::kTuple: {
      std::vector<Value> items;
      items.reserve(expr.children.size());
      for (const auto& child : expr.children) items.push_back(eval(*child, frame));
      return make_list(std::move(items), expr.kind == ExprKind::kList ? Kind::kList : Kind::kTuple);
    }
    case ExprKind::kDict: {
      auto dict = std::make_shared<DictObject>();
      for (size_t i = 0; i + 1 < expr.children.size(); i += 2) {
        const Value key = eval(*expr.children[i], frame);
        dict->set(key, eval(*expr.children[i + 1], frame));
      }
      return make_dict(std::move(dict));
    }
    case ExprKind::kAttribute: return get_attribute(eval(*expr.children[0], frame), expr.name);
    case ExprKind::kSubscript: {
      const Value owner = eval(*expr.children[0], frame);
      return get_item(owner, eval(*expr.children[1], frame));
    }
    case ExprKind::kSlice: {
      const Value owner = eval(*expr.children[0], frame);
      const auto bound = [&](size_t i) {
        return expr.children[i] ? eval(*expr.children[i], frame) : Value::none();
      };
      const Value start = bound(1), stop = bound(2), step_value = bound(3);
      // Jinja folds constants through its own, lenient look-up; everything else is Python's
      // owner[a:b].
      if (expr.children[0]->kind == ExprKind::kConstant && !owner.is_string()) {
        return Value::undefined_because(
            "UndefinedError", fmt::format("{} has no element slice({}, {}, {})", type_name(owner),
                                          repr(start), repr(stop), repr(step_value)));
      }
      return slice(owner, start, stop, step_value);
    }
    case ExprKind::kCall: {
      const Value callee = eval(*expr.children[0], frame);
      Arguments args;
      eval_arguments(expr, frame, args);
      line_ = expr.line;
      return call(callee, args);
    }
    case ExprKind::kFilter: return eval_filter(expr, frame, nullptr);
    case ExprKind::kTest: {
      const Value input = eval(*expr.children[0], frame);
      Arguments args;
      eval_arguments(expr, frame, args);
      if (expr.test == nullptr) {
        raise("TemplateRuntimeError",
              fmt::format("No test named {} found.", repr_string(expr.name)));
      }
      return Value::boolean(expr.test->apply(*this, input, args));
    }
    case ExprKind::kNegate:
    case ExprKind::kPositive: {
      const Value value = eval(*expr.children[0], frame);
      const bool negate = expr.kind == ExprKind::kNegate;
      if (value.kind() == Kind::kFloat)
        return Value::number(negate ? -value.as_float() : value.as_float());
      if (value.is_int_like()) {
        if (negate && value.as_int() == INT64_MIN) {
          raise_limit("integers beyond 64 bits are not supported");
        }
        return Value::integer(negate ? -value.as_int() : value.as_int());
      }
      if (value.is_undefined()) raise(value.undefined_info().type, value.undefined_info().message);
      if (value.kind() == Kind::kBigInt) {
        if (!negate) return value;
        return Value::big_integer(value.str()[0] == '-' ? value.str().substr(1)
                                                        : "-" + value.str());
      }
      raise("TypeError", fmt::format("bad operand type for unary {}: '{}'", negate ? "-" : "+",
                                     type_name(value)));
    }
    case ExprKind::kNot: return Value::boolean(!truthy(eval(*expr.children[0], frame)));
    case ExprKind::kAnd: {
      const Value left = eval(*expr.children[0], frame);
      return truthy(left) ? eval(*expr.children[1], frame) : left;
    }
    case ExprKind::kOr: {
      const Value left = eval(*expr.children[0], frame);
      return truthy(left) ? left : eval(*expr.children[1], frame);
    }
    case ExprKind::kBinary: {
      const Value left = eval(*expr.children[0], frame);
      const Value right = eval(*expr.children[1], frame);
      line_ = expr.line;
      return binary(expr.name, left, right);
    }
    case ExprKind::kConcat: {
      Text text;
      for (const auto& child : expr.children) {
        const Value value = eval(*child, frame);
        if (value.is_string()) {
          text.append(value.text());
        } else {
          text.append(to_text(value));
        }
        if (text.size() > options_.limits.max_string_bytes) break;  // make_string reports it
      }
      return make_string(std::move(text));
    }
    case ExprKind::kCompare: return eval_compare(expr, frame);
    case ExprKind::kConditional:
      if (truthy(eval(*expr.children[1], frame))) return eval(*expr.children[0], frame);
      if (expr.children[2]) return eval(*expr.children[2], frame);
      return Value::undefined_because(
          "UndefinedError",
          fmt::format(
              "the inline if-expression on line {} evaluated to false and no else section was "
              "defined.",
              expr.line));
  }
  return {};
}

Value Evaluator::eval_compare(const Expr& expr, const FramePtr& frame) {
  Value left = eval(*expr.children[0], frame);
  for (size_t i = 0; i < expr.operators.size(); ++i) {
    Value right = eval(*expr.children[i + 1], frame);
    line_ = expr.line;
    if (!compare(expr.operators[i], left, right)) return Value::boolean(false);
    left = std::move(right);
  }
  return Value::boolean(true);
}

void Evaluator::eval_arguments(const Expr& expr, const FramePtr& frame, Arguments& args) {
  args.positional.reserve(expr.positional.size());
  for (const auto& child : expr.positional) args.positional.push_back(eval(*child, frame));
  for (const auto& [name, child] : expr.keyword)
    args.keyword.emplace_back(name, eval(*child, frame));
  if (expr.star_positional) {
    for (Value& item : iterate(eval(*expr.star_positional, frame))) {
      args.positional.push_back(std::move(item));
    }
  }
  if (expr.star_keyword) {
    const Value extra = eval(*expr.star_keyword, frame);
    if (!extra.is_dict()) {
      raise("TypeError",
            fmt::format("argument after ** must be a mapping, not {}", type_name(extra)));
    }
    for (const auto& [key, value] : extra.dict().entries) {
      if (!key.is_string()) raise("TypeError", "keywords must be strings");
      for (const auto& [name, other] : args.keyword) {
        if (name == key.str()) {
          raise("TypeError",
                fmt::format("jinja2.sandbox.SandboxedEnvironment.call() got multiple values for "
                            "keyword argument {}",
                            repr_string(name)));
        }
      }
      args.keyword.emplace_back(key.str(), value);
    }
  }
}

Value Evaluator::eval_filter(const Expr& expr, const FramePtr& frame, const Value* block_input) {
  Value input;
  if (expr.children[0]) {
    const Expr& inner = *expr.children[0];
    input = block_input != nullptr && inner.kind == ExprKind::kFilter
                ? eval_filter(inner, frame, block_input)
                : eval(inner, frame);
  } else if (block_input != nullptr) {
    input = *block_input;
  }
  Arguments args;
  eval_arguments(expr, frame, args);
  line_ = expr.line;
  if (expr.filter == nullptr) {
    raise("TemplateRuntimeError", fmt::format("No filter named {} found.", repr_string(expr.name)));
  }
  return expr.filter->apply(*this, input, args);
}

Value Evaluator::apply_filter_chain(const Expr& expr, const FramePtr& frame, const Value& input) {
  return eval_filter(expr, frame, &input);
}

Value Evaluator::call(const Value& callee, Arguments& args) {
  const Depth depth(*this);
  switch (callee.kind()) {
    case Kind::kCallable: {
      // NOLINTNEXTLINE(performance-unnecessary-copy-initialization): a share is the point
      const auto keep = callee.object();  // the callee may be reassigned while it runs
      return static_cast<Callable&>(*keep).call(*this, args);
    }
    case Kind::kLoop: {
      auto loop = std::static_pointer_cast<LoopObject>(callee.object());
      if (!loop->recurse) {
        raise("TypeError", "The loop must have the 'recursive' marker to be called recursively.");
      }
      if (args.positional.size() != 1) raise("TypeError", "loop() takes one iterable");
      const auto recurse = loop->recurse;
      return recurse(*this, args.positional[0]);
    }
    case Kind::kJoiner: {
      auto& joiner = static_cast<JoinerObject&>(*callee.object());
      if (std::exchange(joiner.used, true)) return joiner.separator;
      return Value::data("");
    }
    case Kind::kUndefined: raise(callee.undefined_info().type, callee.undefined_info().message);
    default: raise("TypeError", fmt::format("'{}' object is not callable", type_name(callee)));
  }
}

}  // namespace nibble::jinja
