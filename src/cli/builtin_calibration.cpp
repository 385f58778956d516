// SPDX-License-Identifier: Apache-2.0
#include "cli/builtin_calibration.h"

// The assembler copies the file into read-only data; CMake passes its path and makes this file
// depend on it.
asm(R"(
  .section .rodata
  .global nibble_builtin_calibration_begin
  .global nibble_builtin_calibration_end
nibble_builtin_calibration_begin:
  .incbin ")" NIBBLE_CALIBRATION_FILE R"("
nibble_builtin_calibration_end:
  .byte 0
  .previous
)");

extern "C" {
extern const char nibble_builtin_calibration_begin[];
extern const char nibble_builtin_calibration_end[];
}

namespace nibble::cli {

std::string_view builtin_calibration() {
  return {nibble_builtin_calibration_begin,
          static_cast<size_t>(nibble_builtin_calibration_end - nibble_builtin_calibration_begin)};
}

}  // namespace nibble::cli
