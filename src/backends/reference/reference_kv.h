// The reference backend's KV block: K then V, each [G kv heads, block_tokens, D] elements, then
// (int8 dynamic only) the scales of K and of V, each float [G, block_tokens]. Quantization, which
// every backend follows:
//   dynamic: scale = amax/127 over the D channels of one token and head, 1 when amax is 0;
//            stored = round_half_even(x / scale), read back as stored * scale.
//   static:  the layer's calibrated scale; stored saturates at +-127.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstring>

#include "base/half.h"
#include "ops/operands.h"

namespace nibble::reference {

inline size_t kv_element_bytes(KvFormat format) {
  switch (format) {
    case KvFormat::kInt8Dynamic:
    case KvFormat::kInt8Static: return 1;
    case KvFormat::kF16: return 2;
    case KvFormat::kF32: return 4;
  }
  return 4;
}

inline size_t kv_block_bytes(KvFormat format, int block_tokens, int num_kv_heads, int head_dim) {
  const size_t rows = static_cast<size_t>(block_tokens) * static_cast<size_t>(num_kv_heads);
  const size_t scales = format == KvFormat::kInt8Dynamic ? 2 * rows * sizeof(float) : 0;
  return 2 * rows * static_cast<size_t>(head_dim) * kv_element_bytes(format) + scales;
}

/// One token's K or V vector of one head inside the cache.
class KvVector {
 public:
  KvVector(const KvLayer& kv, int block, int row, int head, bool is_v) : kv_(kv) {
    const size_t rows = static_cast<size_t>(kv.block_tokens) * static_cast<size_t>(kv.num_kv_heads);
    const size_t row_idx = static_cast<size_t>(head) * static_cast<size_t>(kv.block_tokens) +
                           static_cast<size_t>(row) + (is_v ? rows : 0);
    std::byte* base = static_cast<std::byte*>(kv.data) +
                      static_cast<size_t>(block) *
                          kv_block_bytes(kv.format, kv.block_tokens, kv.num_kv_heads, kv.head_dim);
    const size_t element = kv_element_bytes(kv.format);
    data_ = base + row_idx * static_cast<size_t>(kv.head_dim) * element;
    scale_ =
        reinterpret_cast<float*>(base + 2 * rows * static_cast<size_t>(kv.head_dim) * element) +
        row_idx;
    static_scale_ = is_v ? kv.v_scale : kv.k_scale;
  }

  void store(const float* x /*[D]*/) {
    switch (kv_.format) {
      case KvFormat::kInt8Dynamic: {
        float amax = 0;
        for (int d = 0; d < kv_.head_dim; ++d) amax = std::fmax(amax, std::fabs(x[d]));
        const float scale = amax > 0 ? amax / 127.0f : 1.0f;
        *scale_ = scale;
        quantize(x, scale);
        break;
      }
      case KvFormat::kInt8Static: quantize(x, static_scale_); break;
      case KvFormat::kF16:
        for (int d = 0; d < kv_.head_dim; ++d) {
          reinterpret_cast<uint16_t*>(data_)[d] = float_to_f16(x[d]);
        }
        break;
      case KvFormat::kF32:
        std::memcpy(data_, x, static_cast<size_t>(kv_.head_dim) * sizeof(float));
        break;
    }
  }

  void load(float* x /*[D]*/) const {
    switch (kv_.format) {
      case KvFormat::kInt8Dynamic: dequantize(x, *scale_); break;
      case KvFormat::kInt8Static: dequantize(x, static_scale_); break;
      case KvFormat::kF16:
        for (int d = 0; d < kv_.head_dim; ++d)
          x[d] = f16_to_float(reinterpret_cast<uint16_t*>(data_)[d]);
        break;
      case KvFormat::kF32:
        std::memcpy(x, data_, static_cast<size_t>(kv_.head_dim) * sizeof(float));
        break;
    }
  }

 private:
  void quantize(const float* x, float scale) {
    for (int d = 0; d < kv_.head_dim; ++d) {
      const float q = std::nearbyintf(x[d] / scale);  // half to even
      reinterpret_cast<int8_t*>(data_)[d] =
          static_cast<int8_t>(std::fmin(std::fmax(q, -127.0f), 127.0f));
    }
  }
  void dequantize(float* x, float scale) const {
    for (int d = 0; d < kv_.head_dim; ++d) {
      x[d] = static_cast<float>(reinterpret_cast<const int8_t*>(data_)[d]) * scale;
    }
  }

  const KvLayer& kv_;
  std::byte* data_;
  float* scale_;
  float static_scale_;
};

}  // namespace nibble::reference
