// The steps of quantize_group on one panel of rows, one thread each. Internal to quantize/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "quantize/awq.h"

namespace nibble::awq {

/// Rows of a weight with their grid, integers and error. Reused from panel to panel by one thread.
struct Panel {
  int64_t rows = 0, features = 0, group = 0;
  const float* weight = nullptr;  // [rows, features]
  const float* pre = nullptr;     // [features], exact in the checkpoint's type
  std::vector<float> scales;      // [rows, features / group]
  std::vector<float> q;           // [rows, features] integers -8..7
  std::vector<float> error;       // [rows, features] weight - q * scale * pre
  std::vector<float> product;     // [rows, features] scratch: error times Gram
  std::vector<float> scratch;

  int64_t groups() const { return features / group; }
};

/// G + damping * diag(G) = R^T R; each row of R divided by its diagonal element, stored like the
/// Gram matrix. Damping grows until the factor exists; the one used is returned. `diagonal` gets
/// the squares of R's diagonal elements, [features].
float factor_gram(ThreadPool& pool, const Gram& gram, float damping, std::vector<float>& factor,
                  std::vector<float>* diagonal = nullptr);

/// The grid of each row and group: scale = ratio * amax / 7 (rounded to `dtype`), the ratio that
/// loses least on the group's own block of G. Returns the sum of the ratios chosen. One ratio: no
/// search.
double choose_scales(Panel& panel, const Gram& gram, std::span<const float> ratios, DType dtype);

void round_nearest(Panel& panel);

/// Last column first: each weight is rounded after the errors of those already rounded have been
/// added to it in the proportion that the Hessian says (Babai's nearest plane, the same rule as
/// GPTQ's).
void round_compensated(Panel& panel, const Gram& gram, const std::vector<float>& factor);

/// Sweeps over the columns that never raise error G error^T: refit each group's scale to its
/// integers, then move each integer to its best value given all others. Stops early when nothing
/// changes.
void descend(Panel& panel, const Gram& gram, int sweeps, DType dtype);

/// Sum over rows of error G error^T; leaves the product in panel.product.
double panel_loss(Panel& panel, const Gram& gram);

}  // namespace nibble::awq
