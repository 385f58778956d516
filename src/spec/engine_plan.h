// Every decision about how an engine runs, as data: written by build, stored in the engine, printed
// by inspect. What the runtime allocates is in it. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include "base/json.h"
#include "spec/model_spec.h"

namespace nibble {

enum class KvFormat : uint8_t {
  kInt8Dynamic,  // int8, one float scale per token and kv head (the default)
  kInt8Static,   // int8, one calibrated scale per layer for K and one for V
  kF16,
  kF32,  // reference and evaluation only
};
const char* kv_format_name(KvFormat format);          // "int8", "int8-static", "f16", "f32"
KvFormat kv_format_from_name(std::string_view name);  // throws Error{kInput}

/// Bit layout of one linear's weights in the engine. Each is described where it is packed (pack/).
enum class WeightLayout : uint8_t {
  kF32Rows,       // float [out, in]
  kBf16Rows,      // bf16 [out, in]
  kF16Rows,       // f16 [out, in]
  kInt4Portable,  // as the checkpoint: u8 [out/2, in]; scales float [out, in/group] beside it
  kCpuInt4,       // pack/cpu_int4.h
  kCudaInt4,      // pack/cuda_int4.h
  kInt8Portable,  // as the checkpoint: i8 [out, in]; scales float [out, in/group] beside it
  kCpuInt8,       // pack/int8.h: two planes of kCpuInt4
  kCudaInt8,      // pack/int8.h: kCudaInt4 with twice the inputs
};
const char* weight_layout_name(WeightLayout layout);
WeightLayout weight_layout_from_name(std::string_view name);  // throws Error{kInput}
bool is_int4(WeightLayout layout);
bool is_int8(WeightLayout layout);

/// How a backend feeds its linears.
enum class ActivationPrecision : uint8_t {
  kF32,        // exact path: fp32 activations, fp32 accumulation
  kInt8Group,  // int8 per group of at most 128 channels, exact integer dot products per group
  kBf16,       // cuda: all activations are bf16, sums f32
  // What int4 linears read is rounded to e4m3, with a scale per token and kE4m3Group channels in
  // steps of up to kE4m3GroupedRows rows and one per token in larger ones. cuda:sm_90: steps of
  // enough tokens only (docs/cuda-backend.md), the rest as kBf16. ref: every step, the rest as
  // kF32.
  kE4m3,
};
inline constexpr int kE4m3Group = 128, kE4m3GroupedRows = 64;
const char* activation_precision_name(ActivationPrecision precision);       // f32, int8, bf16, fp8
ActivationPrecision activation_precision_from_name(std::string_view name);  // throws Error{kInput}

struct EngineLimits {
  int max_batch_size = 64;   // sequences per step
  int max_input_len = 5525;  // prompt tokens
  int max_output_len = 150;  // generated tokens; max_seq_len = input + output
  int max_num_tokens = 0;    // tokens per step (the chunked-prefill budget); 0: build chooses

  int max_seq_len() const { return max_input_len + max_output_len; }
  bool operator==(const EngineLimits&) const = default;
};

/// What a kernel took, by its name (backends/cuda/tactic.h): "wgmma 256 rows cluster 2 split 1".
struct KernelTime {
  std::string kernel;
  double microseconds = 0;
  bool operator==(const KernelTime&) const = default;
};

/// The kernel that was measured fastest for an int4 matrix. Of entries with one shape, the first
/// whose max_rows suffices counts.
struct LinearTactic {
  int out_features = 0, in_features = 0;  // as packed: gate and up are one matrix
  int max_rows = 0;                       // of activations; what was measured
  KernelTime best;
  std::vector<KernelTime> slower;  // the others that were measured, fastest first
  bool operator==(const LinearTactic&) const = default;
};

/// The CUDA of a plugin and its GPU; of a plan, those that were there when it was built.
struct CudaPlatform {
  int major = 0;    // version the plugin was built with; 0: there was no plugin
  std::string gpu;  // "NVIDIA H200"; of a plan: where its kernels were measured, empty: nowhere
  bool operator==(const CudaPlatform&) const = default;
};

/// What `build` was given, for the command that builds the engine again.
struct BuildSource {
  std::string checkpoint;        // absolute path; empty: synthetic
  std::string synthetic;         // the shape; both empty: made in memory
  std::string quantize_lm_head;  // of a synthetic one
  std::string tokenizer;         // absolute path; empty: the checkpoint's own
  bool no_tune = false;
  bool operator==(const BuildSource&) const = default;
};

struct EnginePlan {
  static constexpr int kFormatVersion = 5;
  std::string nibble_version;
  std::string target =
      "ref";  // "ref", "cpu:avx512", "cpu:avx2", "cpu:generic", "cuda:sm_90", "cuda:portable"
  ModelSpec spec;
  int tp_rank = 0, tp_size = 1;
  EngineLimits limits;
  WeightLayout linear_layout = WeightLayout::kInt4Portable;  // of the layers' linears
  WeightLayout dense_layout = WeightLayout::kBf16Rows;       // embedding
  WeightLayout lm_head_layout = WeightLayout::kBf16Rows;     // tied to the embedding: its layout
  ActivationPrecision activation_precision = ActivationPrecision::kF32;
  int group_size = 128;
  KvFormat kv_format = KvFormat::kInt8Dynamic;
  int kv_block_tokens = 32;
  std::vector<LinearTactic> tactics;  // empty: not measured, the backend has rules of its own
  CudaPlatform cuda;                  // of cuda targets
  BuildSource source;

  json::object to_json() const;
  static EnginePlan from_json(const json::object& object,
                              std::string_view what);  // unknown keys refused
  bool operator==(const EnginePlan&) const = default;
};

}  // namespace nibble
