// Launchers of what quantizing on the device does between its matrix products: statistics of
// activations, and the rounding of rows (quantize/rounding.h is the specification). Free of CUDA
// types; every launcher returns 0 or a cudaError_t value. All pointers are the device's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nibble::cuda {

// calibration_statistics.cu
// ------------------------------------------------------------------------------------------------

/// sums[c] += sum over rows of |x[r, c]|, *maximum = max of it and all |x|. x: bf16 or f32 [rows,
/// columns], columns a multiple of 2; maximum may be null.
int add_column_abs(const void* x, bool is_bf16, int64_t rows, int64_t columns, double* sums,
                   float* maximum, void* stream);
/// *maximum = max of it and |x[r, 0 .. count)|; x: bf16 [rows, stride].
int add_range(const void* x, int64_t rows, int64_t stride, int64_t count, float* maximum,
              void* stream);
int subtract_bf16(const void* a, const void* b, int64_t count, void* out, void* stream);
/// y = alpha y + beta x; x may be null.
int combine(float alpha, float* y, float beta, const float* x, int64_t count, void* stream);
int widen_bf16(const void* from, float* to, int64_t count, void* stream);
/// b[r, c] /= divisor[c].
int divide_columns(float* b, const float* divisor, int64_t rows, int64_t columns, void* stream);

/// Sums of parts, for the host to add up: partial[i], i < kDotParts.
inline constexpr int kDotParts = 1024;
/// The sum of a[i] b[i].
int dot(const float* a, const float* b, int64_t count, double* partial, void* stream);
/// The sum over the diagonals of [features / block, block, block].
int diagonal_sum(const float* values, int64_t features, int64_t block, double* partial,
                 void* stream);

// Cholesky, one block row of kFactorPanel at a time (calibration_ops.cpp has the loop)
inline constexpr int kFactorPanel = 128;
/// h[j, j] = h[j, j] (1 + damping) + floor in each [block, block] of h.
int damp_diagonal(float* h, int64_t features, int64_t block, float damping, float floor,
                  void* stream);
/// The diagonal square at `first`, at most kFactorPanel wide, of each block becomes upper
/// triangular R with R^T R what was there; *failed is set where that does not exist.
int factor_diagonal(float* h, int64_t num_blocks, int64_t block, int64_t first, int64_t size,
                    int* failed, void* stream);
/// Row j of each R is divided by its diagonal element, whose square goes to diagonal[j].
int unit_diagonal(float* r, int64_t features, int64_t block, float* diagonal, void* stream);

// calibration_rounding.cu
// ------------------------------------------------------------------------------------------------

/// ops/calibration_ops.h's DevicePanel, and the blocks that the Gram matrix is cut to.
struct RoundingArgs {
  int64_t rows, features, block;
  int group;            // 64 or 128
  const float* weight;  // [rows, features]
  const float* pre;     // [features]
  float* scales;        // [rows, features / group]
  float* q;             // [rows, features]
  float* error;         // [rows, features]
  bool bf16_scales;     // scales are exact in bf16
};

inline constexpr int kMaxRatios = 32;
/// Scales of ratio * amax / 7, of each row and group the ratio that loses least on the group's own
/// block of gram [features / block, block, block]. One ratio: no search. counts[i] += how often
/// ratio i was chosen.
int choose_scales(const RoundingArgs& args, const float* gram, const float* ratios /*host*/,
                  int num_ratios, unsigned long long* counts, void* stream);
/// q and error to the nearest step.
int round_nearest(const RoundingArgs& args, void* stream);
/// error = weight - q * scale * pre.
int restate_error(const RoundingArgs& args, void* stream);
/// Group `group_idx` of every block: each weight rounded after the errors of those already rounded
/// were added, last column first. factor [features / block, block, block], R with a unit diagonal;
/// feedback [features / block, rows, group]: what the groups behind say, null: there are none.
int compensate_group(const RoundingArgs& args, const float* factor, const float* feedback,
                     int64_t group_idx, void* stream);
/// Group `group_idx` of every block: its scale refitted, then each integer moved to its best value
/// given all others. `product` [rows, features] is error times gram and stays what it was;
/// change [features / block, rows, group] is what the error has changed by.
int descend_group(const RoundingArgs& args, const float* gram, const float* product, float* change,
                  int64_t group_idx, void* stream);
/// ints [rows, features] = q, dense bf16 [rows, features] = q * scale * pre.
int write_results(const RoundingArgs& args, int8_t* ints, void* dense, void* stream);

}  // namespace nibble::cuda
