// Which kernel serves an int4 matrix best on this device, by measurement; and the table of what was
// found. cuda:sm_90 only: the portable kernel's sums may not depend on the number of rows.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <vector>

#include "backends/cuda/kernels.h"
#include "backends/cuda/tactic.h"
#include "ops/backend.h"

namespace nibble::cuda {

/// Times every variant of both kernels for the model's four int4 matrices, on random weights that
/// take turns (more than L2 holds), as graphs of dependent launches. `workspace`:
/// linear_workspace_bytes(). Takes about half a gigabyte of device memory, freed at the end.
std::vector<LinearTactic> tune_linears(Backend& backend, const ModelSpec& spec, int max_rows,
                                       int num_sms, void* workspace, void* stream);

/// The tactics of an engine, checked.
class TacticTable {
 public:
  /// Throws Error{kInput} naming an entry that no tune_linears() makes.
  void set(std::span<const LinearTactic> tactics);
  /// By the table where it has the shape, else by linear()'s rules.
  int linear(const LinearArgs& args, void* stream) const;

 private:
  struct Entry {
    int64_t rows, k;
    int max_tokens;
    LinearKernel kernel;
  };
  std::vector<Entry> entries_;
};

}  // namespace nibble::cuda
