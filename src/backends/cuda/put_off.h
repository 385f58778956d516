// Ops that the backend has been asked for and has not done yet, because the one after may do them
// on the way (docs/cuda-backend.md, which kernel runs). SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ops/operands.h"

namespace nibble::cuda {

/// What a linear does of the ops around it.
struct Fused {
  void* next = nullptr;  // its result times next_weight, for the norm after it
  const float* next_weight = nullptr;
  bool scales = false;            // 1/rms of the norm before it
  const float* weight = nullptr;  // that norm whole, where its x is rounded to e4m3
  float eps = 0;
  const void* x = nullptr;  // what it reads, rounded already
};

/// Activations that were rounded to e4m3 by the kernel that made them.
struct Rounded {
  const void* source;  // the same in bf16
  int rows;
  int64_t features;
  const void* data;
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
  Fused before;
};
/// An RMSNorm that is left to the linear that reads it: the multiplication by 1/rms, or all of it.
struct PutOffNorm {
  const void* x;
  const float* weight;
  float eps;
  int rows, hidden;
  void* y;
  bool whole;
  const void* rounded;  // x times weight in e4m3, or null
};

}  // namespace nibble::cuda
