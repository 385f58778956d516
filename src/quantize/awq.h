// Four-bit rounding of linears that share one input, as pure functions of host memory
// (docs/quantization.md has the formulas). Knows nothing of models, files or backends.
//
// y = (x * pre) Q^T with Q[n, j] = q[n, j] * scale[n, j / group], so weight w[n, j] is represented
// by q times the step scale * pre[j]. All searches minimise the calibration error of the outputs,
// sum over rows of e G e^T with e = w - q * step and G = X^T X / tokens: a candidate costs no pass
// over tokens.
//
// Every result depends on the inputs and options alone, never on the number of threads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "formats/checkpoint_writer.h"
#include "spec/dtype.h"

namespace nibble::awq {

/// G = X^T X / tokens, cut to blocks on the diagonal when the whole would be too large (block <
/// features).
struct Gram {
  int64_t features = 0;
  int64_t block = 0;          // divides features
  std::vector<float> values;  // [features / block, block, block]

  const float* at(int64_t index) const { return values.data() + index * block * block; }
  int64_t num_blocks() const { return features / block; }
};

/// The largest multiple of `granularity` that divides `features` and whose Gram blocks take at most
/// `max_bytes`.
int64_t gram_block(int64_t features, int64_t granularity, uint64_t max_bytes);

/// What calibration remembers of a linear's input. Tokens are added in steps; finish() divides.
class InputStatistics {
 public:
  /// The Gram matrix takes at most `max_gram_bytes`; `granularity` (the group size) divides its
  /// blocks.
  InputStatistics(int64_t features, int64_t granularity, uint64_t max_gram_bytes);
  /// x: host [rows, features].
  void add(ThreadPool& pool, const float* x, int64_t rows);
  /// How the same rows would be in the unquantized model: `dense` host [rows, features], and for
  /// linears that add to the residual stream what that lacks, `residual` host [rows, out_features]
  /// (may be null). Beside add(), for correct_drift().
  void add_drift(ThreadPool& pool, const float* x, const float* dense, const float* residual,
                 int64_t out_features, int64_t rows);
  void finish(ThreadPool& pool);  // once, after the last add()

  int64_t tokens() const { return tokens_; }
  const Gram& gram() const { return gram_; }
  const std::vector<float>& mean_abs() const { return mean_abs_; }  // [features]
  float max_abs() const { return max_abs_; }
  /// X^T (X_dense - X) / tokens, cut to the Gram matrix's blocks; empty without add_drift().
  const std::vector<float>& drift() const { return drift_; }
  /// X^T residual / tokens [features, out_features]; empty without residuals.
  const std::vector<float>& residual() const { return residual_; }

 private:
  Gram gram_;
  std::vector<float> mean_abs_;
  std::vector<double> sum_abs_;
  std::vector<float> drift_, residual_;
  float max_abs_ = 0;
  int64_t tokens_ = 0;
};

enum class Rounding : uint8_t {
  kNearest,      // each weight to the nearest step
  kCompensated,  // errors pushed into weights not yet rounded, then coordinate descent and refitted
                 // scales
};

struct RoundingOptions {
  int group_size = 128;
  DType dtype = DType::kBF16;  // pre_scale is exact in this type: kBF16, kF16 or kF32
  Rounding rounding = Rounding::kCompensated;
  int alpha_steps = 10;  // candidates s = mean|x|^(i/steps) / mean|w|^(k/beta_steps)
  int beta_steps = 4;
  bool clip = true;       // search a clip ratio for every row and group
  float damping = 0.01f;  // of the compensation's Hessian, relative to its diagonal
  int sweeps = 3;         // of coordinate descent with refitted scales
};

/// A dense linear: host [out_features, in_features], row-major.
struct DenseLinear {
  const float* weight = nullptr;
  int64_t out_features = 0;
};

struct GroupReport {
  double alpha = 0, beta = 0;
  // Output energy of the error on the calibration set over that of the weights: sum e G e^T / sum w
  // G w^T.
  double error_rtn = 0, error_scaled = 0, error = 0;
  double mean_clip = 1;  // scale over amax / 7, before refitting
};

struct QuantizedGroup {
  std::vector<CheckpointLinear> linears;  // as many as were given; all have the same pre_scale
  GroupReport report;
};

/// amax / 7 of each group, half to even, pre_scale all ones: what `--method rtn` writes.
CheckpointLinear round_to_nearest(ThreadPool& pool, const DenseLinear& linear, int64_t in_features,
                                  int group_size);

/// Eight bits: amax / kMaxInt8 of each group, half to even, no pre_scale. The step is a 17th of
/// four bits' (measured: +0.006 % perplexity on nano), so nothing is searched.
CheckpointLinear round_to_int8(ThreadPool& pool, const DenseLinear& linear, int64_t in_features,
                               int group_size);

/// One search for all `linears` that read the same input.
QuantizedGroup quantize_group(ThreadPool& pool, std::span<const DenseLinear> linears,
                              int64_t in_features, const InputStatistics& input,
                              const RoundingOptions& options);

struct LiteResult {
  CheckpointLinear linear;     // the parts' rows one after another
  GroupReport report;          // alpha: mean over the parts
  std::vector<double> alphas;  // one a part
};

/// ModelOpt's awq_lite of one checkpoint linear: q, k and v as three `parts`, any other linear as
/// one. Of the options only group_size and dtype count.
LiteResult quantize_lite(ThreadPool& pool, std::span<const DenseLinear> parts, int64_t in_features,
                         const InputStatistics& input, const RoundingOptions& options);

/// q * scale * pre: the weight a checkpoint linear stands for, [out, in].
std::vector<float> dequantize(ThreadPool& pool, const CheckpointLinear& linear,
                              int64_t in_features);

/// The value as the type stores it.
float round_to(DType dtype, float value);

}  // namespace nibble::awq
