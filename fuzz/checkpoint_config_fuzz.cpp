// Any bytes as a config.json, in both dialects, and as an engine plan: a value or an Error, never a
// crash; a spec that is accepted survives its own JSON. SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "base/error.h"
#include "formats/checkpoint_config.h"
#include "spec/engine_plan.h"

namespace {

void check_spec(const nibble::ModelSpec& spec) {
  if (!(nibble::ModelSpec::from_json(spec.to_json()) == spec)) std::abort();
  if (spec.num_layers <= 64 && spec.num_parameters() <= 0) std::abort();
}

template <typename Body>
void expect_error_or_value(const Body& body) {
  try {
    body();
  } catch (const nibble::Error& error) {
    if (error.kind() == nibble::ErrorKind::kInternal) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  nibble::json::value value;
  try {
    value = nibble::parse_json({reinterpret_cast<const char*>(data), size}, "input");
  } catch (const nibble::Error&) {
    return 0;
  }
  if (!value.is_object()) return 0;
  const nibble::json::object& object = value.get_object();
  expect_error_or_value([&] { check_spec(nibble::parse_checkpoint_config(object, "input").spec); });
  expect_error_or_value([&] { check_spec(nibble::ModelSpec::from_hf(object, "input")); });
  expect_error_or_value([&] {
    const nibble::EnginePlan plan = nibble::EnginePlan::from_json(object, "input");
    if (!(nibble::EnginePlan::from_json(plan.to_json(), "again") == plan)) std::abort();
  });
  return 0;
}
