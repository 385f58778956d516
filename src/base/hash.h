// XXH3 (library xxHash): checksums of engine tensors, prefix-index keys.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace nibble {

uint64_t xxh3_64(std::span<const std::byte> bytes, uint64_t seed = 0);
std::string hex64(uint64_t value);  // 16 lower-case hex digits

}  // namespace nibble
