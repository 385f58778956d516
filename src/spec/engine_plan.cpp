// SPDX-License-Identifier: Apache-2.0
#include "spec/engine_plan.h"

#include <array>
#include <utility>

#include "base/error.h"
#include "base/nearest.h"
#include "spec/object_reader.h"

namespace nibble {
namespace {

template <typename Enum, size_t N>
using Names = std::array<std::pair<Enum, const char*>, N>;

constexpr Names<KvFormat, 4> kKvFormats = {{{KvFormat::kInt8Dynamic, "int8"},
                                            {KvFormat::kInt8Static, "int8-static"},
                                            {KvFormat::kF16, "f16"},
                                            {KvFormat::kF32, "f32"}}};
constexpr Names<WeightLayout, 9> kLayouts = {{{WeightLayout::kF32Rows, "f32-rows"},
                                              {WeightLayout::kBf16Rows, "bf16-rows"},
                                              {WeightLayout::kF16Rows, "f16-rows"},
                                              {WeightLayout::kInt4Portable, "int4-portable"},
                                              {WeightLayout::kCpuInt4, "cpu-int4"},
                                              {WeightLayout::kCudaInt4, "cuda-int4"},
                                              {WeightLayout::kInt8Portable, "int8-portable"},
                                              {WeightLayout::kCpuInt8, "cpu-int8"},
                                              {WeightLayout::kCudaInt8, "cuda-int8"}}};
constexpr Names<ActivationPrecision, 4> kActivations = {{{ActivationPrecision::kF32, "f32"},
                                                         {ActivationPrecision::kInt8Group, "int8"},
                                                         {ActivationPrecision::kBf16, "bf16"},
                                                         {ActivationPrecision::kE4m3, "fp8"}}};

template <typename Enum, size_t N>
const char* name_of(const Names<Enum, N>& names, Enum value) {
  for (const auto& [candidate, name] : names) {
    if (candidate == value) return name;
  }
  NIBBLE_CHECK(false, "enum value {} has no name", static_cast<int>(value));
}

template <typename Enum, size_t N>
Enum value_of(const Names<Enum, N>& names, std::string_view name, std::string_view what) {
  std::vector<std::string_view> known;
  for (const auto& [value, candidate] : names) {
    if (name == candidate) return value;
    known.push_back(candidate);
  }
  std::string list;
  for (const std::string_view candidate : known) {
    if (!list.empty()) list += ", ";
    list += candidate;
  }
  fail(ErrorKind::kInput, "\"{}\" is not a {}; the nearest is \"{}\" (known: {})", name, what,
       nearest_name(name, known), list);
}

}  // namespace

const char* kv_format_name(KvFormat format) { return name_of(kKvFormats, format); }
KvFormat kv_format_from_name(std::string_view name) {
  return value_of(kKvFormats, name, "KV cache format");
}
const char* weight_layout_name(WeightLayout layout) { return name_of(kLayouts, layout); }
WeightLayout weight_layout_from_name(std::string_view name) {
  return value_of(kLayouts, name, "weight layout");
}
bool is_int4(WeightLayout layout) {
  return layout == WeightLayout::kInt4Portable || layout == WeightLayout::kCpuInt4 ||
         layout == WeightLayout::kCudaInt4;
}
bool is_int8(WeightLayout layout) {
  return layout == WeightLayout::kInt8Portable || layout == WeightLayout::kCpuInt8 ||
         layout == WeightLayout::kCudaInt8;
}
const char* activation_precision_name(ActivationPrecision precision) {
  return name_of(kActivations, precision);
}
ActivationPrecision activation_precision_from_name(std::string_view name) {
  return value_of(kActivations, name, "activation precision");
}

json::object EnginePlan::to_json() const {
  json::array measured;
  for (const LinearTactic& t : tactics) {
    json::array slower;
    for (const KernelTime& other : t.slower) {
      slower.push_back({{"kernel", other.kernel}, {"microseconds", other.microseconds}});
    }
    measured.push_back({{"out_features", t.out_features},
                        {"in_features", t.in_features},
                        {"max_rows", t.max_rows},
                        {"kernel", t.best.kernel},
                        {"microseconds", t.best.microseconds},
                        {"slower", std::move(slower)}});
  }
  json::object from;
  const auto keep = [&](const char* key, const std::string& value) {
    if (!value.empty()) from[key] = value;
  };
  keep("checkpoint", source.checkpoint);
  keep("synthetic", source.synthetic);
  keep("quantize_lm_head", source.quantize_lm_head);
  keep("tokenizer", source.tokenizer);
  if (source.no_tune) from["no_tune"] = true;
  json::object plan = {
      {"format_version", kFormatVersion},
      {"nibble_version", nibble_version},
      {"target", target},
      {"spec", spec.to_json()},
      {"tp_rank", tp_rank},
      {"tp_size", tp_size},
      {"limits",
       {{"max_batch_size", limits.max_batch_size},
        {"max_input_len", limits.max_input_len},
        {"max_output_len", limits.max_output_len},
        {"max_num_tokens", limits.max_num_tokens}}},
      {"linear_layout", weight_layout_name(linear_layout)},
      {"dense_layout", weight_layout_name(dense_layout)},
      {"lm_head_layout", weight_layout_name(lm_head_layout)},
      {"activation_precision", activation_precision_name(activation_precision)},
      {"group_size", group_size},
      {"kv_format", kv_format_name(kv_format)},
      {"kv_block_tokens", kv_block_tokens},
      {"tactics", std::move(measured)},
      {"source", std::move(from)},
  };
  if (target.starts_with("cuda:")) {
    plan["cuda"] = {{"major", cuda.major}, {"gpu", cuda.gpu}};
  }
  return plan;
}

namespace {
/// Calls `read` with each object of the array at `key`.
template <typename Read>
void for_each_object(ObjectReader& in, const char* key, const Read& read) {
  const json::value* value = in.find(key);
  if (value == nullptr || !value->is_array()) {
    fail(ErrorKind::kInput, "{}: {} is {}; wanted an array", in.where(), key,
         value == nullptr ? "missing" : show_json(*value));
  }
  size_t index = 0;
  for (const json::value& entry : value->get_array()) {
    const std::string where = fmt::format("{}, {}[{}]", in.where(), key, index++);
    if (!entry.is_object()) {
      fail(ErrorKind::kInput, "{} is {}; wanted an object", where, show_json(entry));
    }
    ObjectReader reader(entry.get_object(), where);
    read(reader);
    reader.refuse_unknown_keys();
  }
}

KernelTime kernel_time_from_json(ObjectReader& in) {
  return {.kernel = in.string("kernel"), .microseconds = in.number("microseconds")};
}

std::vector<LinearTactic> tactics_from_json(ObjectReader& plan) {
  constexpr int kMax = 1 << 30;
  std::vector<LinearTactic> tactics;
  for_each_object(plan, "tactics", [&](ObjectReader& in) {
    tactics.push_back({.out_features = in.integer("out_features", 1, kMax),
                       .in_features = in.integer("in_features", 1, kMax),
                       .max_rows = in.integer("max_rows", 1, kMax),
                       .best = kernel_time_from_json(in),
                       .slower = {}});
    for_each_object(in, "slower", [&](ObjectReader& other) {
      tactics.back().slower.push_back(kernel_time_from_json(other));
    });
  });
  return tactics;
}

/// The object at `key`, which must be there.
ObjectReader required_object(ObjectReader& in, const char* key) {
  const json::object* object = in.object(key);
  if (object == nullptr) {
    fail(ErrorKind::kInput, "{}: {} is missing; wanted an object", in.where(), key);
  }
  return ObjectReader(*object, in.where() + ", " + key);
}

CudaPlatform cuda_from_json(ObjectReader& plan) {
  ObjectReader in = required_object(plan, "cuda");
  CudaPlatform cuda{.major = in.integer("major", 0, 1000), .gpu = in.string("gpu")};
  in.refuse_unknown_keys();
  return cuda;
}

BuildSource source_from_json(ObjectReader& plan) {
  ObjectReader in = required_object(plan, "source");
  BuildSource source{.checkpoint = in.string_or("checkpoint", ""),
                     .synthetic = in.string_or("synthetic", ""),
                     .quantize_lm_head = in.string_or("quantize_lm_head", ""),
                     .tokenizer = in.string_or("tokenizer", ""),
                     .no_tune = in.boolean_or("no_tune", false)};
  in.refuse_unknown_keys();
  return source;
}
}  // namespace

EnginePlan EnginePlan::from_json(const json::object& object, std::string_view what) {
  constexpr int kMax = 1 << 30;
  ObjectReader in(object, std::string(what));
  const int version = in.integer("format_version", 0, kMax);
  if (version != kFormatVersion) {
    fail(ErrorKind::kUnsupported, "{}: format_version is {}; this nibble reads {}", what, version,
         kFormatVersion);
  }
  EnginePlan plan;
  plan.nibble_version = in.string("nibble_version");
  plan.target = in.string("target");
  const json::object* spec = in.object("spec");
  if (spec == nullptr) fail(ErrorKind::kInput, "{}: spec is missing; wanted an object", what);
  plan.spec = ModelSpec::from_json(*spec);
  plan.tp_size = in.integer("tp_size", 1, 1024);
  plan.tp_rank = in.integer("tp_rank", 0, plan.tp_size - 1);
  ObjectReader limit = required_object(in, "limits");
  plan.limits.max_batch_size = limit.integer("max_batch_size", 1, kMax);
  plan.limits.max_input_len = limit.integer("max_input_len", 1, kMax / 2);
  plan.limits.max_output_len = limit.integer("max_output_len", 1, kMax / 2);
  plan.limits.max_num_tokens = limit.integer("max_num_tokens", 1, kMax);
  limit.refuse_unknown_keys();
  plan.linear_layout = weight_layout_from_name(in.string("linear_layout"));
  plan.dense_layout = weight_layout_from_name(in.string("dense_layout"));
  plan.lm_head_layout = weight_layout_from_name(in.string("lm_head_layout"));
  plan.activation_precision = activation_precision_from_name(in.string("activation_precision"));
  plan.group_size = in.integer("group_size", 1, 1 << 20);
  plan.kv_format = kv_format_from_name(in.string("kv_format"));
  plan.kv_block_tokens = in.integer("kv_block_tokens", 1, 1 << 20);
  plan.tactics = tactics_from_json(in);
  plan.source = source_from_json(in);
  if (plan.target.starts_with("cuda:")) plan.cuda = cuda_from_json(in);
  in.refuse_unknown_keys();
  return plan;
}

}  // namespace nibble
