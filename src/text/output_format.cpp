// SPDX-License-Identifier: Apache-2.0
#include "text/output_format.h"

#include "base/error.h"
#include "text/json_schema_grammar.h"

namespace nibble {

std::string OutputFormat::key() const {
  switch (kind) {
    case Kind::kText: return "text";
    case Kind::kJsonObject: return "object";
    case Kind::kJsonSchema: return "schema " + dump_json(schema);
    case Kind::kRegex: return "regex " + regex;
    case Kind::kChoice: {
      std::string key = "choice";
      for (const std::string& choice : choices) {
        key += fmt::format(" {} ", choice.size());
        key += choice;
      }
      return key;
    }
  }
  return {};
}

Grammar OutputFormat::grammar() const {
  switch (kind) {
    case Kind::kJsonSchema: return json_schema_grammar(schema, field);
    case Kind::kChoice: return choice_grammar(choices, field);
    case Kind::kRegex: return regex_grammar(regex, field);
    case Kind::kJsonObject:
    case Kind::kText: break;
  }
  NIBBLE_CHECK(kind == Kind::kJsonObject, "plain text has no grammar");
  return json_object_grammar();
}

}  // namespace nibble
