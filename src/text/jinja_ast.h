// The syntax tree of one template. Nodes are plain data; the parser bounds their depth, so walking
// and destroying them recursively is safe. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "text/jinja_value.h"

namespace nibble::jinja {

struct Filter;  // jinja_filters.h
struct Test;

enum class ExprKind : uint8_t {
  kConstant,
  kName,
  kList,
  kTuple,
  kDict,       // children: key, value, key, value, ...
  kAttribute,  // children[0].name
  kSubscript,  // children[0][children[1]]
  kSlice,      // children[0][a:b:c]; absent bounds are null
  kCall,       // children[0](arguments)
  kFilter,     // children[0] | name(arguments); children[0] is null inside `filter` blocks
  kTest,       // children[0] is name(arguments)
  kNegate,
  kPositive,
  kNot,
  kAnd,
  kOr,
  kBinary,       // name: + - * / // % **
  kConcat,       // children joined by ~
  kCompare,      // children[0] op children[1] op ...; operators in `operators`
  kConditional,  // children: value, condition, otherwise (may be null)
};

struct Expr;
using ExprPtr = std::unique_ptr<Expr>;

struct Expr {
  ExprKind kind;
  int line = 0;
  int depth = 1;
  std::string name;
  Value constant;
  std::vector<ExprPtr> children;
  // Calls, filters, tests:
  std::vector<ExprPtr> positional;
  std::vector<std::pair<std::string, ExprPtr>> keyword;
  ExprPtr star_positional, star_keyword;
  std::vector<std::string> operators;
  const Filter* filter = nullptr;
  const Test* test = nullptr;
};

enum class StmtKind : uint8_t {
  kOutput,     // expressions; literals are constants
  kIf,         // expressions: conditions; bodies: one per condition, plus else
  kFor,        // target, expressions: {iterable, condition or null}; bodies: {body, else}
  kSet,        // target = expressions[0]
  kSetBlock,   // target, expressions: {filter chain or null}; bodies: {body}
  kMacro,      // name, parameters, bodies: {body}
  kCallBlock,  // expressions: {call}; parameters of the caller; bodies: {body}
  kFilterBlock,
  kWith,   // targets and expressions pairwise; bodies: {body}
  kScope,  // bodies: {body}: {% generation %}
  kBreak,
  kContinue,
};

/// name, ns.name, or a tuple of targets.
struct Target {
  std::string name;
  std::string attribute;  // ns.attribute when not empty
  std::vector<Target> parts;
  bool is_tuple = false;
};

struct Stmt;
using Body = std::vector<std::unique_ptr<Stmt>>;

struct Stmt {
  StmtKind kind;
  int line = 0;
  std::string name;
  std::vector<Target> targets;
  std::vector<ExprPtr> expressions;
  std::vector<Body> bodies;
  std::vector<std::string> parameters;
  std::vector<ExprPtr> defaults;  // of the last parameters
  bool recursive = false;
  bool uses_caller = false, uses_varargs = false, uses_kwargs = false;
};

}  // namespace nibble::jinja
