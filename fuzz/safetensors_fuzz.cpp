// Any bytes as a safetensors file: parsed or refused with an Error, and what was accepted is
// consistent. SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstdlib>
#include <span>

#include "base/error.h"
#include "formats/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto bytes = std::as_bytes(std::span(data, size));
  try {
    const nibble::SafetensorsHeader header = nibble::parse_safetensors_header(bytes, "input");
    uint64_t position = 0;
    for (const auto& entry : header.entries) {
      if (entry.begin != position || entry.end < entry.begin) std::abort();
      position = entry.end;
    }
    if (header.data_start + position != size) std::abort();
  } catch (const nibble::Error& error) {
    if (error.kind() != nibble::ErrorKind::kInput) std::abort();
  }
  return 0;
}
