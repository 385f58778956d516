// bf16, f16 and e4m3 as storage types: exact widening, round-to-nearest-even narrowing.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstdint>

namespace nibble {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t float_to_bf16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}

float f16_to_float(uint16_t bits);
uint16_t float_to_f16(float value);

/// e4m3: 4 bits of exponent, 3 of mantissa, no infinities; 0x7f and 0xff are NaN. Narrowing
/// saturates at +-448, as the GPU's conversion does.
float e4m3_to_float(uint8_t bits);
uint8_t float_to_e4m3(float value);

}  // namespace nibble
