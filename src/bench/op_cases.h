// One case table per op: shapes, seed, flops and bytes. tests/ops runs the small ones on every
// backend against the reference; `nibble bench ops` times the model-sized ones. Data are generated
// from the seed, row by row and sequence by sequence, so that the same row in another batch has the
// same content. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/backend.h"
#include "pack/pack.h"
#include "spec/model_spec.h"

namespace nibble::ops {

/// Deterministic values: standard normal from a hash of (seed, index).
float normal_value(uint64_t seed, uint64_t index);
void fill_normal(std::vector<float>& out, uint64_t seed, float scale = 1.0f);

/// A weight of random values in one layout, owning its host memory, imported into a backend.
class TestWeight {
 public:
  /// Int4: q uniform in [-8, 7], int8: in [-119, 119]; scales positive.
  TestWeight(Backend& backend, WeightLayout layout, int out_features, int in_features,
             int group_size, uint64_t seed, bool pre_scale);
  const LinearOperand& operand() const { return operand_; }

 private:
  LinearOperand operand_;
  Buffer pre_scale_, scales_;
  std::vector<uint16_t> half_;
  std::vector<float> floats_;
  std::unique_ptr<std::byte, void (*)(void*)> packed_memory_;
};

struct LinearCase {
  WeightLayout layout = WeightLayout::kCpuInt4;  // kCpuInt4, kCpuInt8: the backend's int4, int8
  int out_features = 0, in_features = 0, group_size = 0;
  int rows = 1;
  bool add = false, pre_scale = false;
  bool gate_up = false;  // out_features is ffn; two weights
  uint64_t seed = 1;

  std::string name() const;
  double flops() const;
  double bytes() const;  // weight bytes once, activations in and out
};
/// Small, ragged and odd: correctness.
std::vector<LinearCase> linear_cases();
/// A model's linears at `rows` rows: speed.
std::vector<LinearCase> model_linear_cases(const ModelSpec& spec, WeightLayout int4_layout,
                                           int group_size, int rows);

struct AttentionShape {
  int num_heads = 0, num_kv_heads = 0, head_dim = 0, block_tokens = 32;
  KvFormat format = KvFormat::kInt8Dynamic;
  std::string name() const;
};
std::vector<AttentionShape> attention_shapes();

/// Runs rope_store_kv and attention over sequences whose q, k and v depend on (seed, sequence id,
/// position) only.
class AttentionRun {
 public:
  struct Chunk {
    int sequence, count;     // next `count` tokens of `sequence`
    bool is_prompt = false;  // else one token at the front is taken for a drawn one
  };
  /// `shuffle` permutes block ids; out_scale adds o's pre-scale.
  AttentionRun(Backend& backend, const AttentionShape& shape, int num_sequences, int max_tokens,
               uint64_t shuffle, bool out_scale = false);
  /// One ragged step. Returns y [sum of counts, H D]; throws when the op wrote outside y or left y
  /// unwritten.
  std::vector<float> step(const std::vector<Chunk>& chunks);
  /// The same step's ops, timed by the caller: prepare() sets the batch up, attend() may be
  /// repeated.
  void prepare(const std::vector<Chunk>& chunks);
  void store();
  void attend();
  const void* result() const { return y_.data(); }  // of attend()
  double attend_flops() const;
  double attend_bytes() const;

 private:
  static constexpr int kMaxPosition = 8192;
  Backend& backend_;
  const AttentionShape shape_;
  const int blocks_per_seq_;
  std::vector<int> lengths_;
  std::vector<int32_t> tables_;  // [sequences, blocks]
  std::vector<int32_t> positions_, seq_starts_, kv_lens_, step_tables_;
  Buffer cos_, sin_, kv_, qkv_, y_, out_scale_, positions_dev_, seq_starts_dev_, kv_lens_dev_,
      tables_dev_;
  StepBatch batch_;
  KvLayer layer_;
};

/// Output memory of an op: NaN inside, canaries around. Elements are floats, or bf16 where
/// element_bytes is 2; read() and fill() speak floats either way.
class GuardedOutput {
 public:
  GuardedOutput(Backend& backend, size_t size, size_t element_bytes = sizeof(float));
  float* data() const { return buffer_.as<float>() + kGuard; }  // device pointer
  /// Downloads; throws Error{kInternal} when a canary changed or a value is NaN.
  std::vector<float> read() const;
  void fill(const std::vector<float>& values);  // old content, for add

 private:
  static constexpr size_t kGuard = 64;  // words before and after
  size_t words() const { return (size_ * element_bytes_ + 3) / 4; }
  Backend& backend_;
  size_t size_, element_bytes_;
  Buffer buffer_;
};

/// As the backend's activations: floats, or rounded to bf16 where act_bytes() is 2.
Buffer acts_to_device(Backend& backend, const std::vector<float>& values);
/// Every value on the bf16 grid, so that backends of both kinds get the same numbers.
void round_to_bf16(std::vector<float>& values);

Buffer to_device(Backend& backend, const void* host, size_t bytes);
template <typename T>
Buffer to_device(Backend& backend, const std::vector<T>& host) {
  return to_device(backend, host.data(), host.size() * sizeof(T));
}

}  // namespace nibble::ops
