// From a dense model to a portable 4-bit checkpoint: layer by layer, one layer's weights and the
// calibration set's hidden states in memory (docs/quantization.md). Deterministic: the same model,
// calibration data and options give the same bytes on the same kind of machine, whatever the number
// of threads. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "base/progress.h"
#include "formats/weight_source.h"
#include "ops/backend.h"
#include "quantize/awq.h"
#include "quantize/calibration.h"
#include "quantize/report.h"

namespace nibble {

enum class QuantizeMethod : uint8_t {
  kAwq,      // this project's search (awq.cpp)
  kAwqLite,  // ModelOpt's (awq_lite.cpp), to compare with
  kRtn       // round to nearest, no pre-scales
};

struct QuantizeOptions {
  QuantizeMethod method = QuantizeMethod::kAwq;
  // The next three are kAwq's; kAwqLite and kRtn round to nearest and do not clip.
  awq::Rounding rounding = awq::Rounding::kCompensated;
  bool clip = true;
  int sweeps = awq::RoundingOptions().sweeps;  // of coordinate descent, with kCompensated
  int group_size = 128;                        // 64 or 128
  int tp_size = 1;
  DType dtype = DType::kBF16;                   // of the checkpoint: kBF16 or kF16
  LmHeadFormat lm_head = LmHeadFormat::kDense;  // tied embeddings: it becomes a tensor of its own
  bool int8_kv = true;         // calibrate static scales for K after RoPE and for V
  int calib_batch = 16;        // sequences a step
  int max_step_tokens = 8192;  // tokens a step; a longer sequence is run in parts
  bool sequential = true;      // a layer's inputs come from the quantized layers before it
  bool correct_drift = true;   // kAwq with sequential: make up for those layers' errors (drift.h)
  int num_threads = 0;         // of the search; 0: usable_cpu_count()
  uint64_t max_gram_bytes = uint64_t{1}
                            << 30;  // per linear input; beyond it the Gram matrix is cut to blocks
  /// Finished layers are kept here, and a call with the same model, data and options goes on after
  /// them and writes the same bytes. Empty, and on a device: nothing is kept.
  fs::path resume_directory;
};

/// True when quantize() needs a backend and calibration data: always, except for RTN without KV
/// scales.
bool needs_calibration(const QuantizeOptions& options);

/// Writes config.json and rank*.safetensors into `directory` (which exists; usually inside an
/// AtomicDirectory). `backend` runs the dense model and `calibration` holds its texts; both may be
/// null where needs_calibration() says no. Throws Error naming the weight, value and wanted value
/// for models or options that cannot be quantized.
QuantizeReport quantize(const fs::path& directory, const WeightSource& source, Backend* backend,
                        const CalibrationData* calibration, const QuantizeOptions& options,
                        Progress& progress);

const char* method_name(QuantizeMethod method);     // "awq", "awq-lite", "rtn"
const char* rounding_name(awq::Rounding rounding);  // "nearest", "compensated"

}  // namespace nibble
