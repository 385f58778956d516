// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"

namespace nibble {

const char* error_kind_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kUsage: return "usage";
    case ErrorKind::kInput: return "input";
    case ErrorKind::kIo: return "io";
    case ErrorKind::kLimit: return "limit";
    case ErrorKind::kUnsupported: return "unsupported";
    case ErrorKind::kDevice: return "device";
    case ErrorKind::kMemory: return "memory";
    case ErrorKind::kInterrupted: return "interrupted";
    case ErrorKind::kInternal: return "internal";
  }
  return "internal";
}

void check_failed(const char* condition, const char* file, int line, const std::string& detail) {
  fail(ErrorKind::kInternal, "a bug in nibble: {} is false at {}:{}{}{}", condition, file, line,
       detail.empty() ? "" : ": ", detail);
}

}  // namespace nibble
