// Walks the syntax tree of one rendering. One Evaluator per rendering; not thread-safe. Filters,
// tests and methods get it as their way back: iterating, attribute look-up, calling, and paying for
// work. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja.h"
#include "text/jinja_ast.h"

namespace nibble::jinja {

struct Frame {
  explicit Frame(std::shared_ptr<Frame> parent_frame) : parent(std::move(parent_frame)) {}
  const Value* find(std::string_view name) const;
  void set(std::string_view name, Value value);

  std::shared_ptr<Frame> parent;
  std::vector<std::pair<std::string, Value>> variables;
};
using FramePtr = std::shared_ptr<Frame>;

class Evaluator {
 public:
  Evaluator(const DictObject& variables, const RenderOptions& options)
      : variables_(variables), options_(options) {}
  ~Evaluator();
  Evaluator(const Evaluator&) = delete;
  Evaluator& operator=(const Evaluator&) = delete;

  Text run(const Body& body);
  int line() const { return line_; }

  // For filters, tests, methods:
  void step(uint64_t count = 1);
  /// Pays for a new value of so many bytes, or for reading that much.
  void charge(size_t bytes);
  Value make_string(Text text);
  Value make_list(std::vector<Value> items, Kind kind = Kind::kList);
  Value make_dict(std::shared_ptr<DictObject> dict);
  Value get_attribute(const Value& owner, std::string_view name);
  Value get_item(const Value& owner, const Value& key);
  /// Elements as `for` sees them. Uses up a generator.
  std::vector<Value> iterate(const Value& value);
  Value call(const Value& callee, Arguments& args);
  Text text_of(const Value& value);  // str(value), paid for
  Value slice(const Value& owner, const Value& start, const Value& stop, const Value& step);
  Value add(const Value& left, const Value& right);
  Value binary(std::string_view op, const Value& left, const Value& right);
  bool contains(const Value& container, const Value& item);
  bool compare(std::string_view op, const Value& left, const Value& right);
  Value make_namespace(std::shared_ptr<DictObject> dict);
  std::tm now() const;
  uint64_t random() { return random_(); }
  const Limits& limits() const { return options_.limits; }

 private:
  enum class Flow { kNormal, kBreak, kContinue };
  struct Depth;

  Flow exec(const Body& body, const FramePtr& frame, Text& out);
  Flow exec(const Stmt& stmt, const FramePtr& frame, Text& out);
  Flow exec_for(const Stmt& stmt, const FramePtr& frame, const Value& iterable, int nesting,
                Text& out);
  void exec_call_block(const Stmt& stmt, const FramePtr& frame, Text& out);
  Value make_macro(const Stmt& stmt, const FramePtr& frame, std::string name);
  Value call_macro(const Stmt& stmt, const std::string& name, const FramePtr& frame,
                   Arguments& args);
  void emit(Text& out, const Text& text);
  Value captured(Text text) { return make_string(std::move(text)); }

  Value eval(const Expr& expr, const FramePtr& frame);
  Value eval_name(const std::string& name, const FramePtr& frame);
  Value eval_compare(const Expr& expr, const FramePtr& frame);
  Value eval_filter(const Expr& expr, const FramePtr& frame, const Value* block_input);
  void eval_arguments(const Expr& expr, const FramePtr& frame, Arguments& args);
  Value apply_filter_chain(const Expr& expr, const FramePtr& frame, const Value& input);
  void assign(const Target& target, const Value& value, const FramePtr& frame);
  Value loop_attribute(const Value& loop, std::string_view name);
  Value multiply(const Value& left, const Value& right);
  Value arithmetic(std::string_view op, const Value& left, const Value& right);

  const DictObject& variables_;
  const RenderOptions& options_;
  uint64_t steps_ = 0;
  uint64_t memory_bytes_ = 0;
  int depth_ = 0;
  int line_ = 0;
  std::mt19937_64 random_{0x6e6962626c65};
  // Namespaces and frames that macros captured can form cycles; they are emptied at the end.
  std::vector<std::shared_ptr<DictObject>> namespaces_;
  std::vector<FramePtr> captured_frames_;
};

}  // namespace nibble::jinja
