// A tiny model with known weights, written as a checkpoint and compared with what is read back.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/file.h"
#include "formats/checkpoint_writer.h"
#include "formats/model_directory.h"
#include "formats/synthetic.h"

namespace nibble {

// 4 heads and 2 kv heads of 16, groups of 32 so that tp 4 divides everything; an odd vocabulary.
inline ModelSpec tiny_spec() {
  ModelSpec spec = synthetic_shape("nano-like").spec;
  spec.num_layers = 4;
  spec.hidden_size = 64;
  spec.num_heads = 8;
  spec.num_kv_heads = 2;
  spec.head_dim = 16;
  spec.ffn_size = 256;
  spec.vocab_size = 203;
  spec.rope_theta = 1e9;
  spec.bos_token_id = 3;
  spec.eos_token_ids = {7, 9};
  return spec;
}

inline constexpr int kGroup = 32;

// Deterministic content that covers every nibble value.
inline CheckpointLinear linear_of(const WeightRow& row) {
  const size_t out = static_cast<size_t>(row.shape[0]), in = static_cast<size_t>(row.shape[1]);
  CheckpointLinear linear;
  uint32_t state = 1;
  for (const char c : row.name) state = state * 31 + static_cast<unsigned char>(c);
  const auto next = [&] { return state = state * 1664525u + 1013904223u; };
  linear.q.resize(out * in);
  for (int8_t& q : linear.q) q = static_cast<int8_t>(static_cast<int>(next() >> 28) - 8);
  linear.scales.resize(out * in / kGroup);
  for (float& scale : linear.scales) scale = 0.001f + static_cast<float>(next() >> 16) * 1e-6f;
  linear.pre_scale.resize(in);
  for (float& scale : linear.pre_scale)
    scale = 0.5f + static_cast<float>(next() >> 25) / 128.0f;  // exact in bf16
  return linear;
}

inline KvScales scales_of(const ModelSpec& spec) {
  KvScales scales;
  for (int i = 0; i < spec.num_layers; ++i) {
    scales.k.push_back(0.01f * static_cast<float>(i + 1));
    scales.v.push_back(0.02f * static_cast<float>(5 - i));
  }
  return scales;
}

inline void write(const fs::path& directory, const ModelSpec& spec, int tp, bool int8_kv = true) {
  const auto source = open_synthetic(spec, 11, false);
  fs::create_directories(directory);
  write_checkpoint(directory, *source, {.tp_size = tp, .group_size = kGroup, .int8_kv = int8_kv},
                   {.linear = linear_of, .kv_scales = [&] { return scales_of(spec); }});
}

inline std::vector<int8_t> unpack(const Int4Weight& weight) {
  std::vector<int8_t> q(static_cast<size_t>(weight.out_features * weight.in_features));
  for (int64_t r = 0; r < weight.out_features; ++r) {
    for (int64_t c = 0; c < weight.in_features; ++c) {
      const auto byte = static_cast<uint8_t>(weight.nibbles[r / 2 * weight.in_features + c]);
      const int nibble = r % 2 == 0 ? byte & 15 : byte >> 4;
      q[static_cast<size_t>(r * weight.in_features + c)] =
          static_cast<int8_t>(nibble >= 8 ? nibble - 16 : nibble);
    }
  }
  return q;
}

inline void expect_equals_source(const WeightSource& read, const ModelSpec& spec,
                                 bool int8_kv = true) {
  EXPECT_EQ(read.spec().to_json(), spec.to_json());
  const auto dense = open_synthetic(spec, 11, false);
  for (const WeightRow& row : weight_table(spec)) {
    ASSERT_EQ(read.bits(row), quantized_bits(row)) << row.name;
    if (quantized_bits(row) == 0) {
      EXPECT_EQ(read.load_dense(row), dense->load_dense(row)) << row.name;
      std::vector<std::byte> storage;
      const TensorView view = read.view_dense(row, storage);
      EXPECT_EQ(view.shape, row.shape) << row.name;
      EXPECT_EQ(static_cast<size_t>(view.num_elements()) * 2, view.bytes.size()) << row.name;
      continue;
    }
    const CheckpointLinear wanted = linear_of(row);
    const Int4Weight weight = read.load_int4(row);
    EXPECT_EQ(weight.group_size, kGroup);
    EXPECT_TRUE(unpack(weight) == wanted.q) << row.name;
    EXPECT_EQ(weight.scales, wanted.scales) << row.name;
    EXPECT_EQ(weight.pre_scale, wanted.pre_scale) << row.name;
    read.release(row);
    EXPECT_TRUE(unpack(weight) == wanted.q) << row.name << " after release";
  }
  ASSERT_EQ(read.kv_scales().has_value(), int8_kv);
  if (int8_kv) {
    EXPECT_EQ(read.kv_scales()->k, scales_of(spec).k);
    EXPECT_EQ(read.kv_scales()->v, scales_of(spec).v);
  }
}

// lm_head by its format; the vocabulary of 203 is odd and padded to 256.
inline CheckpointLinear with_head(const WeightRow& row, LmHeadFormat format) {
  CheckpointLinear linear = linear_of(row);
  if (row.role == WeightRole::kLmHead && format == LmHeadFormat::kInt8) {
    for (size_t i = 0; i < linear.q.size(); ++i)
      linear.q[i] = static_cast<int8_t>(static_cast<int>(i * 37 % (2 * kMaxInt8 + 1)) - kMaxInt8);
    linear.pre_scale.clear();
  }
  return linear;
}

inline void write_head(const fs::path& directory, int tp, LmHeadFormat format) {
  const auto source = open_synthetic(tiny_spec(), 11, false);
  fs::create_directories(directory);
  write_checkpoint(
      directory, *source,
      {.tp_size = tp, .group_size = kGroup, .int8_kv = false, .lm_head = format},
      {.linear = [&](const WeightRow& row) { return with_head(row, format); }, .kv_scales = {}});
}

}  // namespace nibble
