// SPDX-License-Identifier: Apache-2.0
#include "pack/pack.h"

#include <cstring>

#include "base/error.h"

namespace nibble {
std::vector<int8_t> unpack_nibbles(const std::byte* nibbles, int64_t out_features,
                                   int64_t in_features) {
  std::vector<int8_t> q(static_cast<size_t>((out_features + 1) / 2 * 2 * in_features));
  for (int64_t pair = 0; pair < (out_features + 1) / 2; ++pair) {
    for (int64_t k = 0; k < in_features; ++k) {
      const auto byte = static_cast<uint8_t>(nibbles[pair * in_features + k]);
      // Shift the nibble to the top, then back with its sign.
      q[static_cast<size_t>(2 * pair * in_features + k)] =
          static_cast<int8_t>(static_cast<int8_t>(byte << 4) >> 4);
      q[static_cast<size_t>((2 * pair + 1) * in_features + k)] =
          static_cast<int8_t>(static_cast<int8_t>(byte) >> 4);
    }
  }
  q.resize(static_cast<size_t>(out_features * in_features));
  return q;
}

std::vector<std::byte> pack_nibbles(std::span<const int8_t> q, int64_t out_features,
                                    int64_t in_features) {
  NIBBLE_CHECK(static_cast<int64_t>(q.size()) == out_features * in_features);
  std::vector<std::byte> nibbles(static_cast<size_t>((out_features + 1) / 2 * in_features));
  for (int64_t row = 0; row < out_features; ++row) {
    const int8_t* from = q.data() + row * in_features;
    std::byte* to = nibbles.data() + row / 2 * in_features;
    for (int64_t k = 0; k < in_features; ++k) {
      to[k] |= static_cast<std::byte>(row % 2 == 0 ? from[k] & 15 : (from[k] & 15) << 4);
    }
  }
  return nibbles;
}

}  // namespace nibble
