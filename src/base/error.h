// Errors of the whole library, in three tiers (docs/architecture.md, "Errors").
//   1. Somebody else's fault (file, flag, request, device, memory): throw nibble::Error. The
//   message
//      names the thing, the value seen, the value wanted and what to do.
//   2. Ours: NIBBLE_CHECK, always on, throws ErrorKind::kInternal.
//   3. Expected outcomes (no free block, queue full): std::optional or an enum, [[nodiscard]].
// The library never aborts, exits or prints.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace nibble {

enum class ErrorKind {
  kUsage,        // a flag or an argument: exit status 2
  kInput,        // a file's or a request's content
  kIo,           // open, read, write, rename, disk full
  kLimit,        // longer or larger than the engine was built for
  kUnsupported,  // understood, but not something nibble does
  kDevice,       // GPU, driver, instruction set
  kMemory,       // would not fit
  kInterrupted,  // Ctrl-C or a cancelled job
  kInternal,     // our bug
};

/// Name used in messages and JSON ("input", "limit", ...).
const char* error_kind_name(ErrorKind kind);

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

template <typename... Args>
[[noreturn]] void fail(ErrorKind kind, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(kind, fmt::format(format, std::forward<Args>(args)...));
}

[[noreturn]] void check_failed(const char* condition, const char* file, int line,
                               const std::string& detail);

/// An invariant of ours. NIBBLE_CHECK(n > 0) or NIBBLE_CHECK(n > 0, "n is {}", n).
#define NIBBLE_CHECK(condition, ...)                                         \
  do {                                                                       \
    if (!(condition)) [[unlikely]]                                           \
      ::nibble::check_failed(#condition, __FILE__, __LINE__,                 \
                             ::nibble::internal::check_detail(__VA_ARGS__)); \
  } while (false)

namespace internal {
inline std::string check_detail() { return {}; }
template <typename... Args>
std::string check_detail(fmt::format_string<Args...> format, Args&&... args) {
  return fmt::format(format, std::forward<Args>(args)...);
}
}  // namespace internal

}  // namespace nibble
