// SPDX-License-Identifier: Apache-2.0
#include "text/json_schema_grammar.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "base/error.h"
#include "text/json_grammar.h"
#include "text/json_schema.h"
#include "text/regex_grammar.h"
#include "text/utf8.h"

namespace nibble {
namespace {

using StateId = GrammarBuilder::StateId;
using RuleId = GrammarBuilder::RuleId;
constexpr StateId kReturn = GrammarBuilder::kReturn;
constexpr StateId kNone = GrammarBuilder::kNone;

constexpr int kMaxCompiled = 50'000;  // schemas, those that are compiled twice counted twice
constexpr int kMaxNesting = 160;      // of schemas that are not references
constexpr int kMaxCount = 100'000;    // of a length
constexpr size_t kMaxName = 512;      // bytes of a property's name
constexpr size_t kMaxChoice = 1024;   // bytes
constexpr size_t kMaxChoices = 10'000;
constexpr size_t kMaxOneOf = 200;
constexpr size_t kMaxSchemaBytes = 256 << 10;

struct Format {
  std::string_view name, regex;
};
// Never more than the format allows; of some, less (no 29 February, no quoted local parts, ...).
#define NIBBLE_DATE                                                                        \
  "[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|" \
  "02-(0[1-9]|1[0-9]|2[0-8]))"
#define NIBBLE_TIME \
  "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
#define NIBBLE_LABEL "[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
constexpr Format kFormats[] = {
    {"date", "^" NIBBLE_DATE "$"},
    {"time", "^" NIBBLE_TIME "$"},
    {"date-time", "^" NIBBLE_DATE "T" NIBBLE_TIME "$"},
    {"uuid", "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"},
    {"email", "^[A-Za-z0-9_+-]{1,30}(\\.[A-Za-z0-9_+-]{1,15}){0,2}@" NIBBLE_LABEL
              "(\\." NIBBLE_LABEL "){1,3}$"},
    {"hostname", "^" NIBBLE_LABEL "(\\." NIBBLE_LABEL "){0,5}$"},
    {"ipv4",
     "^(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])(\\.(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
     "){3}$"}};
#undef NIBBLE_DATE
#undef NIBBLE_TIME
#undef NIBBLE_LABEL

class Compiler {
 public:
  Compiler(const json::value& document, std::string_view what)
      : schemas_(document, what), what_(what), json_(builder_), document_(document) {}

  Grammar run() {
    const StateId start = compile(document_, "", kReturn);
    while (!pending_.empty()) {
      const Pending next = std::move(pending_.front());
      pending_.pop_front();
      builder_.define(next.rule, compile(*next.schema, next.path, kReturn));
    }
    Grammar grammar = builder_.finish(start);
    if (grammar.matches_nothing()) {
      fail(ErrorKind::kInput, "{} allows no value, or only endless ones", what_);
    }
    return grammar;
  }

 private:
  struct Pending {
    RuleId rule;
    const json::value* schema;
    std::string path;
  };

  static std::string join(std::string_view path, std::string_view step) {
    std::string out = fmt::format("{}/", path);
    for (const char c : step.substr(0, 60)) {
      out += c == '~' ? "~0" : c == '/' ? "~1" : std::string(1, c);
    }
    return out;
  }

  StateId compile(const json::value& schema, const std::string& path, StateId next) {
    if (++nesting_ > kMaxNesting) {
      fail(ErrorKind::kLimit, "{} nests deeper than {} schemas; use $ref", what_, kMaxNesting);
    }
    const StateId state = compile_nested(schema, path, next);
    --nesting_;
    return state;
  }

  StateId compile_nested(const json::value& schema, const std::string& path, StateId next) {
    if (++num_compiled_ > kMaxCompiled) {
      fail(ErrorKind::kLimit, "{} spells out more than {} schemas; use $ref and fewer anyOf", what_,
           kMaxCompiled);
    }
    if (schema == json::value(true)) return json_.value(next);
    if (schema == json::value(false)) return kNone;
    if (!schema.is_object()) schemas_.wrong(path, "", schema, "a schema: an object, true or false");
    const json::object& object = schema.get_object();
    schemas_.check_keywords(object, path);
    if (const auto* ref = object.if_contains("$ref")) {
      return rest(object, {"$ref"}).empty() ? reference(*ref, path, next)
                                            : compile(written_out(schema, path), path, next);
    }
    if (object.contains("allOf")) {
      return compile(written_out(schema, path), path, next);
    }
    if (const auto* any = object.if_contains("anyOf")) {
      return alternatives("anyOf", *any, rest(object, {"anyOf"}), path, next);
    }
    if (const auto* one = object.if_contains("oneOf")) {
      check_one_of(*one, path);
      return alternatives("oneOf", *one, rest(object, {"oneOf"}), path, next);
    }
    if (object.contains("enum") || object.contains("const")) return listed(object, path, next);
    return typed(object, path, next);
  }

  /// What constrains beside these keywords.
  static json::object rest(const json::object& schema,
                           std::initializer_list<std::string_view> without) {
    json::object out;
    for (const auto& member : schema) {
      const std::string_view keyword = member.key();
      if (JsonSchema::is_constraint(keyword) &&
          std::find(without.begin(), without.end(), keyword) == without.end()) {
        out[keyword] = member.value();
      }
    }
    return out;
  }

  /// The same without $ref and allOf on top.
  const json::value& written_out(const json::value& schema, const std::string& path) {
    return kept(schemas_.merge(json::object(), schema, path));
  }

  /// Schemas that the document does not hold live here.
  const json::value& kept(json::value schema) { return kept_.emplace_back(std::move(schema)); }

  StateId reference(const json::value& ref, const std::string& path, StateId next) {
    const json::value& schema = schemas_.resolve(ref, path);
    const auto [found, is_new] = rules_.try_emplace(&schema, 0);
    if (is_new) {
      found->second = builder_.new_rule();
      pending_.push_back({found->second, &schema, std::string(ref.get_string())});
    }
    return builder_.call(found->second, next);
  }

  StateId alternatives(std::string_view keyword, const json::value& list, json::object beside,
                       const std::string& path, StateId next) {
    if (!list.is_array() || list.get_array().empty()) {
      schemas_.wrong(path, keyword, list, "a non-empty array of schemas");
    }
    const json::value others = std::move(beside);
    std::vector<StateId> states;
    size_t i = 0;
    for (const auto& part : list.get_array()) {
      const std::string where = fmt::format("{}/{}/{}", path, keyword, i++);
      if (others.get_object().empty()) {
        states.push_back(compile(part, where, next));
      } else {
        if (part.is_object()) schemas_.check_keywords(part.get_object(), where);
        states.push_back(compile(kept(schemas_.merge(others, part, where)), where, next));
      }
    }
    return builder_.any_of(states);
  }

  void check_one_of(const json::value& list, const std::string& path) {
    if (!list.is_array()) return;  // said elsewhere
    const json::array& parts = list.get_array();
    if (parts.size() > kMaxOneOf) {
      fail(ErrorKind::kLimit, "{} at {}: \"oneOf\" has {} schemas, but at most {} are supported",
           what_, path, parts.size(), kMaxOneOf);
    }
    for (size_t i = 0; i < parts.size(); ++i) {
      for (size_t k = i + 1; k < parts.size(); ++k) {
        if (schemas_.disjoint(parts[i], parts[k], path)) continue;
        schemas_.unsupported(
            path,
            fmt::format("\"oneOf\": one value may fit both schema {} and schema {}; use anyOf, "
                        "or tell them apart by type, const or a required property",
                        i, k));
      }
    }
  }

  StateId listed(const json::object& schema, const std::string& path, StateId next) {
    for (const auto& member : rest(schema, {"enum", "const", "type"})) {
      schemas_.unsupported(
          path, fmt::format("\"{}\" beside enum or const is not supported; list only what fits it",
                            std::string_view(member.key())));
    }
    const uint8_t types =
        schema.contains("type") ? schemas_.types(schema, path) : uint8_t{JsonTypes::kAll};
    const auto* constant = schema.if_contains("const");
    json::array values;
    if (const auto* options = schema.if_contains("enum")) {
      if (!options->is_array() || options->get_array().empty()) {
        schemas_.wrong(path, "enum", *options, "a non-empty array of values");
      }
      values = options->get_array();
    } else {
      values = {*constant};
    }
    std::vector<StateId> states;
    for (const auto& value : values) {
      if ((JsonTypes::of_value(value) & types) == 0) continue;
      if (constant != nullptr && value != *constant) continue;
      states.push_back(json_.constant(value, next));
    }
    return builder_.any_of(states);
  }

  StateId typed(const json::object& schema, const std::string& path, StateId next) {
    if (!JsonSchema::has_constraints(schema)) return json_.value(next);
    const uint8_t types = schemas_.types(schema, path);
    std::vector<StateId> states;
    if ((types & JsonTypes::kNull) != 0) states.push_back(builder_.literal("null", next));
    if ((types & JsonTypes::kBoolean) != 0) {
      states.push_back(builder_.literal("true", next));
      states.push_back(builder_.literal("false", next));
    }
    if ((types & JsonTypes::kNumber) != 0) {
      states.push_back(json_.number(range(schema, false, path), next));
    } else if ((types & JsonTypes::kInteger) != 0) {
      states.push_back(json_.integer(range(schema, true, path), next));
    }
    if ((types & JsonTypes::kString) != 0) states.push_back(string(schema, path, next));
    if ((types & JsonTypes::kArray) != 0) states.push_back(array(schema, path, next));
    if ((types & JsonTypes::kObject) != 0) states.push_back(object(schema, path, next));
    return builder_.any_of(states);
  }

  // Numbers
  // -------------------------------------------------------------------------------------------

  NumberRange range(const json::object& schema, bool whole, const std::string& path) {
    NumberRange range;
    const auto read = [&](std::string_view keyword, bool is_min, bool is_open) {
      const auto* value = schema.if_contains(keyword);
      if (value == nullptr) return;
      if (!value->is_number()) schemas_.wrong(path, keyword, *value, "a number");
      double bound = value->to_number<double>();
      if (bound != std::floor(bound)) {
        if (!whole) {
          schemas_.unsupported(path, fmt::format("\"{}\" is {}, but for a \"number\" only whole "
                                                 "bounds are supported",
                                                 keyword, dump_json(*value)));
        }
        bound = is_min ? std::ceil(bound) : std::floor(bound);
        is_open = false;
      }
      constexpr auto kMost = static_cast<double>(NumberRange::kMaxBound);
      if (is_min ? bound > kMost : bound < -kMost) {
        schemas_.unsupported(
            path, fmt::format("\"{}\" is {}, but numbers have at most {} digits", keyword,
                              dump_json(*value), JsonGrammar::kMaxDigits));
      }
      int64_t exact = 0;
      if (value->is_int64()) {
        exact = std::clamp(value->get_int64(), -NumberRange::kMaxBound, NumberRange::kMaxBound);
        is_open = is_open && exact == value->get_int64();
      } else if (std::abs(bound) >= kMost) {
        exact = bound < 0 ? -NumberRange::kMaxBound : NumberRange::kMaxBound;
        is_open = false;
      } else {
        exact = static_cast<int64_t>(bound);
      }
      auto& side = is_min ? range.min : range.max;
      bool& side_is_open = is_min ? range.min_is_open : range.max_is_open;
      const bool tighter = !side || (is_min ? exact > *side : exact < *side);
      if (tighter || (exact == *side && is_open)) {
        side = exact;
        side_is_open = is_open;
      }
    };
    read("minimum", true, false);
    read("exclusiveMinimum", true, true);
    read("maximum", false, false);
    read("exclusiveMaximum", false, true);
    return range;
  }

  int count(const json::object& schema, std::string_view keyword, int absent,
            const std::string& path) {
    const auto* value = schema.if_contains(keyword);
    if (value == nullptr) return absent;
    const double number = value->is_number() ? value->to_number<double>() : -1;
    if (!(number >= 0) || number != std::floor(number)) {
      schemas_.wrong(path, keyword, *value, "a whole number, 0 or more");
    }
    if (number > kMaxCount) {
      if (keyword.starts_with("max")) return -1;  // no answer gets that long
      fail(ErrorKind::kLimit, "{} at {}: \"{}\" is {}, but at most {} is supported", what_, path,
           keyword, dump_json(*value), kMaxCount);
    }
    return static_cast<int>(number);
  }

  // Strings
  // -------------------------------------------------------------------------------------------

  StateId string(const json::object& schema, const std::string& path, StateId next) {
    const auto* pattern = schema.if_contains("pattern");
    const auto* format = schema.if_contains("format");
    const bool has_length = schema.contains("minLength") || schema.contains("maxLength");
    if ((pattern != nullptr) + (format != nullptr) + has_length > 1) {
      schemas_.unsupported(path,
                           "only one of pattern, format and minLength/maxLength is supported "
                           "at a time; put lengths into the pattern, as in ^[a-z]{1,9}$");
    }
    if (pattern != nullptr) {
      if (!pattern->is_string()) schemas_.wrong(path, "pattern", *pattern, "a string");
      return json_.string_matching(pattern->get_string(),
                                   fmt::format("{} at {}: pattern", what_, path), next);
    }
    if (format != nullptr) {
      if (!format->is_string()) schemas_.wrong(path, "format", *format, "a string");
      for (const Format& known : kFormats) {
        if (known.name == std::string_view(format->get_string())) {
          return json_.string_matching(known.regex, "format", next);
        }
      }
      schemas_.unsupported(path,
                           fmt::format("the format {} is not supported (date, time, date-time, "
                                       "uuid, email, hostname, ipv4 are)",
                                       dump_json(*format)));
    }
    if (!has_length) return json_.string(next);
    const int min = count(schema, "minLength", 0, path), max = count(schema, "maxLength", -1, path);
    if (max >= 0 && max < min) return kNone;
    return json_.string_of_length(min, max, next);
  }

  // Arrays
  // -------------------------------------------------------------------------------------------

  StateId array(const json::object& schema, const std::string& path, StateId next) {
    json::array first;
    if (const auto* prefix = schema.if_contains("prefixItems")) {
      if (!prefix->is_array()) schemas_.wrong(path, "prefixItems", *prefix, "an array of schemas");
      first = prefix->get_array();
    }
    const auto* items = schema.if_contains("items");
    if (items != nullptr && items->is_array()) {
      schemas_.unsupported(path, "\"items\" is an array; use prefixItems");
    }
    const int num_first = static_cast<int>(first.size());
    const int min = count(schema, "minItems", 0, path);
    int max = count(schema, "maxItems", -1, path);
    if (items != nullptr && *items == json::value(false)) {
      max = max < 0 ? num_first : std::min(max, num_first);
    }
    if (max >= 0 && max < min) return kNone;

    const StateId close = builder_.literal("]", next);
    if (max == 0) return builder_.literal("[", json_.gap(close));
    // The rest of the items share one rule.
    RuleId rule = 0;
    if (max < 0 || max > num_first) {
      rule = builder_.new_rule();
      builder_.define(rule, items == nullptr ? json_.value(kReturn)
                                             : compile(*items, join(path, "items"), kReturn));
    }
    const auto item = [&](int idx, StateId after) {
      return idx < num_first ? compile(first[static_cast<size_t>(idx)],
                                       fmt::format("{}/prefixItems/{}", path, idx), after)
                             : builder_.call(rule, after);
    };
    const StateId end = json_.gap(close);
    int at = max;  // items before `state`
    StateId state = end;
    if (max < 0) {
      at = std::max({num_first, min, 1});
      state = builder_.repeat(
          [&](StateId loop) { return builder_.literal(",", json_.gap(builder_.call(rule, loop))); },
          0, -1, end);
    }
    for (; at > 1; --at) {
      state = builder_.literal(",", json_.gap(item(at - 1, state)));
      if (at - 1 >= min) state = builder_.any_of({end, state});
    }
    StateId begin = item(0, state);
    if (min == 0) begin = builder_.any_of({close, begin});
    return builder_.literal("[", json_.gap(begin));
  }

  // Objects
  // -------------------------------------------------------------------------------------------

  StateId object(const json::object& schema, const std::string& path, StateId next) {
    struct Property {
      std::string name;
      const json::value* schema;
      bool is_required = false;
    };
    std::vector<Property> properties;
    const auto* listed = schema.if_contains("properties");
    if (listed != nullptr) {
      if (!listed->is_object()) schemas_.wrong(path, "properties", *listed, "an object of schemas");
      for (const auto& member : listed->get_object()) {
        properties.push_back({std::string(member.key()), &member.value()});
      }
    }
    const auto* given = schema.if_contains("additionalProperties");
    const json::value& more = given != nullptr                           ? *given
                              : listed != nullptr && !properties.empty() ? false_
                                                                         : true_;
    if (const auto* required = schema.if_contains("required")) {
      const auto malformed = [&] {
        schemas_.wrong(path, "required", *required, "an array of property names");
      };
      if (!required->is_array()) malformed();
      std::map<std::string_view, size_t> index;
      for (size_t i = 0; i < properties.size(); ++i) index.emplace(properties[i].name, i);
      std::set<std::string> unlisted;
      for (const auto& name : required->get_array()) {
        if (!name.is_string()) malformed();
        const std::string_view text = name.get_string();
        if (const auto found = index.find(text); found != index.end()) {
          properties[found->second].is_required = true;
        } else {
          unlisted.emplace(text);
        }
      }
      // A required name that is not listed falls under additionalProperties.
      const json::value& schema_of_more = given != nullptr ? *given : true_;
      for (const std::string& name : unlisted) properties.push_back({name, &schema_of_more, true});
    }
    for (const Property& property : properties) {
      if (property.name.size() > kMaxName) {
        fail(ErrorKind::kLimit,
             "{} at {} has a property name of {} bytes, but at most {} are supported", what_, path,
             property.name.size(), kMaxName);
      }
    }

    const StateId close = builder_.literal("}", next);
    StateId after = json_.gap(close);  // once there is a property
    StateId before = close;            // while there is none
    if (more != false_) {
      const RuleId rule = builder_.new_rule();
      builder_.define(rule, compile(more, join(path, "additionalProperties"), kReturn));
      std::vector<std::string> names;
      for (const Property& property : properties) names.push_back(property.name);
      const auto member = [&](StateId then) {
        const StateId value = json_.colon(builder_.call(rule, then));
        return names.empty() ? json_.string(value) : json_.string_except(names, value);
      };
      after = builder_.repeat(
          [&](StateId loop) { return builder_.literal(",", json_.gap(member(loop))); }, 0, -1,
          after);
      before = builder_.any_of({close, member(after)});
    }
    for (size_t i = properties.size(); i-- > 0;) {
      const Property& property = properties[i];
      const StateId value =
          compile(*property.schema, join(join(path, "properties"), property.name), after);
      const StateId member =
          value == kNone ? kNone : json_.string_constant(property.name, json_.colon(value));
      const StateId next_one = member == kNone ? kNone : builder_.literal(",", json_.gap(member));
      after = property.is_required ? next_one : builder_.any_of({next_one, after});
      before = property.is_required ? member : builder_.any_of({member, before});
    }
    return builder_.literal("{", json_.gap(before));
  }

  GrammarBuilder builder_;
  JsonSchema schemas_;
  const std::string what_;
  JsonGrammar json_;
  const json::value& document_;
  const json::value true_ = true, false_ = false;
  std::deque<json::value> kept_;
  std::map<const json::value*, RuleId> rules_;  // of what $refs point to
  std::deque<Pending> pending_;
  int num_compiled_ = 0, nesting_ = 0;
};

/// A constraint nothing can satisfy would leave the sampler nothing to draw.
Grammar finish(GrammarBuilder& builder, StateId start, std::string_view what) {
  Grammar grammar = builder.finish(start);
  if (grammar.matches_nothing()) fail(ErrorKind::kInput, "{} matches no text", what);
  return grammar;
}

}  // namespace

Grammar json_schema_grammar(const json::value& schema, std::string_view what) {
  const size_t num_bytes = dump_json(schema).size();
  if (num_bytes > kMaxSchemaBytes) {
    fail(ErrorKind::kLimit, "{} has {} bytes, but at most {} are supported", what, num_bytes,
         kMaxSchemaBytes);
  }
  return Compiler(schema, what).run();
}

Grammar json_object_grammar() {
  GrammarBuilder builder;
  return finish(builder, JsonGrammar(builder).object(kReturn), "a JSON object");
}

Grammar choice_grammar(std::span<const std::string> choices, std::string_view what) {
  // A tree by byte: choices that begin alike share their beginning.
  GrammarBuilder builder;
  const auto node = [&](auto& self, const std::vector<std::string_view>& tails) -> StateId {
    std::map<unsigned char, std::vector<std::string_view>> children;
    std::vector<StateId> states;
    for (const std::string_view tail : tails) {
      if (tail.empty()) {
        states.push_back(kReturn);
      } else {
        children[static_cast<unsigned char>(tail[0])].push_back(tail.substr(1));
      }
    }
    for (const auto& [byte, rests] : children) {
      states.push_back(
          rests.size() == 1
              ? builder.bytes(byte_range(byte, byte), builder.literal(rests[0], kReturn))
              : builder.bytes(byte_range(byte, byte), self(self, rests)));
    }
    return builder.any_of(states);
  };
  if (choices.size() > kMaxChoices) {
    fail(ErrorKind::kLimit, "{} has {} choices, but at most {} are supported", what, choices.size(),
         kMaxChoices);
  }
  for (const std::string& choice : choices) {
    if (choice.size() > kMaxChoice) {
      fail(ErrorKind::kLimit, "{} has a choice of {} bytes, but at most {} are supported", what,
           choice.size(), kMaxChoice);
    }
    if (!utf8::is_valid(choice)) fail(ErrorKind::kInput, "{} has a choice that is not UTF-8", what);
  }
  const std::vector<std::string_view> tails(choices.begin(), choices.end());
  return finish(builder, node(node, tails), what);
}

Grammar regex_grammar(std::string_view regex, std::string_view what) {
  GrammarBuilder builder;
  return finish(builder, add_regex(builder, regex, what, {}, kReturn), what);
}

}  // namespace nibble
