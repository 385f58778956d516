// Device memory as the backend uses it: scratch that grows, weights on their way in, and what a
// failed call says. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "backends/cuda/runtime.h"
#include "base/error.h"
#include "base/thread_pool.h"

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

/// Host memory to the device at the speed of the link: threads copy pieces of a mapped file into
/// one pinned buffer while the device reads the other.
class WeightLoader {
 public:
  static constexpr size_t kMinBytes = size_t{4} << 20;

  explicit WeightLoader(void* stream) : stream_(stream), pool_(std::min(usable_cpu_count(), 16)) {
    for (Stage& stage : stages_) {
      stage.pinned = static_cast<std::byte*>(pinned_alloc(kStageBytes));
      if (stage.pinned == nullptr) {
        fail(ErrorKind::kMemory, "cuda: cannot pin {} bytes of host memory", kStageBytes);
      }
      check(event_create(&stage.copied), "making an event");
    }
  }
  WeightLoader(const WeightLoader&) = delete;
  WeightLoader& operator=(const WeightLoader&) = delete;
  ~WeightLoader() {
    stream_sync(stream_);
    for (const Stage& stage : stages_) {
      pinned_free(stage.pinned);
      event_destroy(stage.copied);
    }
  }

  void copy(void* to, const std::byte* from, size_t bytes) {
    for (size_t done = 0; done < bytes; done += kStageBytes) {
      const size_t count = std::min(kStageBytes, bytes - done);
      Stage& stage = stages_[next_];
      next_ = (next_ + 1) % kNumStages;
      check(event_sync(stage.copied), "copying weights to the device");
      const std::byte* source = from + done;
      const auto pieces = static_cast<int64_t>((count + kPieceBytes - 1) / kPieceBytes);
      pool_.parallel_for(pieces, [&](int64_t piece, int) {
        const size_t begin = static_cast<size_t>(piece) * kPieceBytes;
        std::memcpy(stage.pinned + begin, source + begin, std::min(kPieceBytes, count - begin));
      });
      check(copy_to_device(static_cast<std::byte*>(to) + done, stage.pinned, count, stream_),
            "copying weights to the device");
      check(event_record(stage.copied, stream_), "recording an event");
    }
  }

 private:
  static constexpr size_t kStageBytes = size_t{32} << 20, kPieceBytes = size_t{1} << 20;
  static constexpr int kNumStages = 2;
  struct Stage {
    std::byte* pinned = nullptr;
    void* copied = nullptr;  // event: the device has read it
  };
  void* stream_;
  ThreadPool pool_;
  Stage stages_[kNumStages];
  int next_ = 0;
};

}  // namespace nibble::cuda
