// Ops that the backend has been asked for and has not done yet, because the one after may do them
// on the way (docs/cuda-backend.md, which kernel runs). SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/operands.h"

namespace nibble::cuda {

/// The parts of a norm that a linear does: for the norm after it, and for the one before it.
struct NormParts {
  void* next = nullptr;
  const float* next_weight = nullptr;
  bool scales = false;
  const float* weight = nullptr;  // the whole norm before it, where its x is rounded to e4m3
  float eps = 0;
};

/// A rope_store_kv() that has not been done yet.
struct RopeStore {
  StepBatch batch;
  void* qkv;
  int num_heads;
  RopeTable rope;
  KvLayer kv;
};

/// A linear that adds to the residual stream and has not been done yet: should an RMSNorm follow,
/// one kernel does both.
struct ResidualLinear {
  const void* x;
  LinearOperand w;
  int rows;
  void* y;
};
/// An RMSNorm that is left to the linear that reads it: the multiplication by 1/rms, or all of it.
struct PutOffNorm {
  const void* x;
  const float* weight;
  float eps;
  int rows, hidden;
  void* y;
  bool whole;
};

}  // namespace nibble::cuda
