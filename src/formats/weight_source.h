// Where weights come from, seen through the weight table: a Hugging Face directory (dense) or a
// TensorRT-LLM checkpoint (int4 linears). build/, quantize/ and eval read models only through this.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "spec/dtype.h"
#include "spec/model_spec.h"
#include "spec/weight_table.h"

namespace nibble {

/// One int4 linear as the portable checkpoint stores it, whole (tp 1). Views into the source's map
/// or into `owned` storage.
struct Int4Weight {
  int64_t out_features = 0, in_features = 0;
  int group_size = 128;
  const std::byte* nibbles =
      nullptr;                   // [out/2, in]: low nibble = even out row, two's complement -8..7
  std::vector<float> scales;     // [out, in/group]
  std::vector<float> pre_scale;  // [in]; the activation is multiplied by it. Empty: all ones
  std::vector<std::byte> owned;  // backs `nibbles` when shards had to be joined
};

/// lm_head in 8 bits, whole; the same words.
struct Int8Weight {
  int64_t out_features = 0, in_features = 0;
  int group_size = 128;
  const std::byte* values = nullptr;  // int8 [out, in], -kMaxInt8..kMaxInt8
  std::vector<float> scales;          // [out, in/group]
  std::vector<float> pre_scale;       // [in]; empty: all ones
  std::vector<std::byte> owned;
};

struct KvScales {           // static int8: stored = round(x / scale)
  std::vector<float> k, v;  // [layers]
};

class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual const ModelSpec& spec() const = 0;
  virtual bool is_quantized(const WeightRow& row) const = 0;
  /// Bits of a quantized row's integers: 4, or 8 for an lm_head. 0: dense.
  virtual int bits(const WeightRow& row) const { return is_quantized(row) ? 4 : 0; }
  /// Dense weight as floats, exactly widened: [shape] row-major. Quantized rows are an internal
  /// error.
  virtual std::vector<float> load_dense(const WeightRow& row) const = 0;
  /// Dense weight in its stored dtype (rows of several HF tensors joined): `storage` backs the view
  /// when a copy was needed.
  virtual TensorView view_dense(const WeightRow& row, std::vector<std::byte>& storage) const = 0;
  virtual Int4Weight load_int4(const WeightRow& row) const = 0;
  virtual Int8Weight load_int8(const WeightRow& row) const {  // of rows with bits() 8
    NIBBLE_CHECK(false, "{} has no 8-bit form", row.name);
  }
  /// The pre_scale of load_int4(row) or load_int8(row), for sources that can do without the rest.
  virtual std::vector<float> load_pre_scale(const WeightRow& row) const {
    return bits(row) == 8 ? load_int8(row).pre_scale : load_int4(row).pre_scale;
  }
  /// Calibrated KV scales, or nullopt when the model carries none (always for HF directories).
  virtual std::optional<KvScales> kv_scales() const = 0;
  /// The page cache may drop this row's bytes (streaming quantizer).
  virtual void release(const WeightRow& row) const = 0;
  /// Facts a person should know: "vision tower skipped (218 tensors)", ...
  virtual std::vector<std::string> notices() const = 0;
};

enum class ModelKind { kHuggingFace, kCheckpoint, kEngine };
/// What `directory` holds, or an Error naming what was looked for and what is there. A published
/// layout (OUT/trt-llm/checkpoints) is resolved to its inner directory by
/// resolve_model_directory().
ModelKind model_kind(const fs::path& directory);
/// OUT -> OUT/trt-llm/checkpoints when OUT is a published layout; otherwise the path itself.
fs::path checkpoint_directory(const fs::path& directory);

std::unique_ptr<WeightSource> open_hf(const fs::path& directory);
std::unique_ptr<WeightSource> open_checkpoint(const fs::path& directory);
/// Of the two the one that `directory` is.
std::unique_ptr<WeightSource> open_source(const fs::path& directory);

}  // namespace nibble
