// Device memory as the backend uses it: scratch that grows, and what a failed call says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "backends/cuda/runtime.h"
#include "base/error.h"

namespace nibble::cuda {

inline void check(int status, const char* what) {
  if (status == 0) return;
  fail(status == kErrorMemory ? ErrorKind::kMemory : ErrorKind::kDevice,
       "cuda: {} failed: {} (error {})", what, error_text(status), status);
}

/// Device memory that grows when an op asks for more; reserve() makes it large enough for a
/// steady state without growth. Counts its moves: a recorded graph holds the old address.
class Scratch {
 public:
  explicit Scratch(uint64_t* moves) : moves_(moves) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { memory_free(data_); }
  void* get(size_t bytes, void* stream) {
    if (bytes > bytes_) {
      ++*moves_;
      check(stream_sync(stream), "waiting for the stream");
      memory_free(data_);
      data_ = nullptr;
      bytes_ = 0;
      const int status = memory_alloc(&data_, bytes);
      if (status != 0) {
        fail(ErrorKind::kMemory, "cuda: cannot allocate {} bytes of scratch: {}", bytes,
             error_text(status));
      }
      bytes_ = bytes;
    }
    return data_;
  }

 private:
  uint64_t* moves_;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace nibble::cuda
