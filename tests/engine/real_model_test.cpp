// The whole engine over a small random model on real backends, against one sequence at a time
// through the decoder (engine/sharing.h): equal bit for bit whatever shares the steps, the cache
// and the blocks. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <ostream>

#include "base/error.h"
#include "build/model_loader.h"
#include "engine/sharing.h"

namespace nibble {
namespace {

struct Target {
  const char* name;
  const char* target;
  ActivationPrecision precision;
  KvFormat kv_format;
  int num_rounds;
};

void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

class RealModel : public ::testing::TestWithParam<Target> {};

TEST_P(RealModel, SharingChangesNoBit) {
  const Target& target = GetParam();
  try {
    make_backend(target.target, target.precision, 1);
  } catch (const Error& error) {
    GTEST_SKIP() << error.what();
  }
  ModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 128;
  spec.num_heads = 4;
  spec.num_kv_heads = 2;
  spec.head_dim = 32;
  spec.ffn_size = 256;
  spec.vocab_size = 256;
  spec.max_position = 4096;
  expect_as_alone({.target = target.target,
                   .precision = target.precision,
                   .kv_format = target.kv_format,
                   .spec = spec,
                   .block_tokens = 16,
                   .num_rounds = target.num_rounds});
}

INSTANTIATE_TEST_SUITE_P(
    Backends, RealModel,
    ::testing::Values(
        Target{"reference", "ref", ActivationPrecision::kF32, KvFormat::kInt8Dynamic, 3},
        Target{"reference_static_kv", "ref", ActivationPrecision::kF32, KvFormat::kInt8Static, 2},
        Target{"cpu_f32", "cpu:native", ActivationPrecision::kF32, KvFormat::kInt8Dynamic, 8},
        Target{"cpu_int8", "cpu:native", ActivationPrecision::kInt8Group, KvFormat::kInt8Dynamic,
               8},
        Target{"cpu_avx2", "cpu:avx2", ActivationPrecision::kInt8Group, KvFormat::kInt8Dynamic, 8},
        Target{"cpu_generic", "cpu:generic", ActivationPrecision::kF32, KvFormat::kInt8Static, 3}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nibble
