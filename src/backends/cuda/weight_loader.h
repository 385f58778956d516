// Weights on their way to the device. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "backends/cuda/device_memory.h"
#include "base/thread_pool.h"

namespace nibble::cuda {

/// Pinned host memory in huge pages where the system gives them: cudaHostAlloc takes 0.4 ms a MiB,
/// because it pins small ones.
class PinnedBuffer {
 public:
  static constexpr size_t kHugePage = size_t{2} << 20;

  explicit PinnedBuffer(size_t bytes) : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
    map_ = ::mmap(nullptr, bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                  -1, 0);
    if (map_ == MAP_FAILED) fail(ErrorKind::kMemory, "cuda: cannot map {} bytes", bytes_);
    const auto at = reinterpret_cast<uintptr_t>(map_);
    data_ = static_cast<std::byte*>(map_) + (kHugePage - at % kHugePage) % kHugePage;
    ::madvise(data_, bytes_, MADV_HUGEPAGE);  // without it: the same, slower
    std::memset(data_, 0, bytes_);
    const int status = pin(data_, bytes_);
    if (status != 0) {
      ::munmap(map_, bytes_ + kHugePage);
      fail(ErrorKind::kMemory, "cuda: cannot pin {} bytes of host memory: {}", bytes_,
           error_text(status));
    }
  }
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer() {
    unpin(data_);
    ::munmap(map_, bytes_ + kHugePage);
  }
  std::byte* data() const { return data_; }

 private:
  size_t bytes_;
  void* map_ = nullptr;
  std::byte* data_ = nullptr;
};

/// Host memory to the device at the speed of the link. Threads take pieces of what was asked for
/// from a queue, across tensors: each copies a piece of a mapped file into a pinned buffer of its
/// own and has the device read it while it fills its other one. Must be gone before its stream.
class WeightLoader {
 public:
  explicit WeightLoader(void* stream) : stream_(stream) {
    for (int i = 0; i < std::min(usable_cpu_count(), kMaxThreads); ++i) {
      threads_.emplace_back([this] { work(); });
    }
  }
  WeightLoader(const WeightLoader&) = delete;
  WeightLoader& operator=(const WeightLoader&) = delete;
  ~WeightLoader() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  /// Returns at once; `from` must stay until finish().
  void add(void* to, const std::byte* from, size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (size_t begin = 0; begin < bytes; begin += kPieceBytes) {
        queue_.push_back({static_cast<std::byte*>(to) + begin, from + begin,
                          std::min(kPieceBytes, bytes - begin)});
      }
    }
    changed_.notify_all();
  }

  /// Waits until `from` of everything added has been read and the copies are in the stream's order.
  void finish() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return busy_ == 0 && (queue_.empty() || error_); });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr size_t kPieceBytes = size_t{2} << 20, kBuffers = 2;
  static constexpr int kMaxThreads = 16;
  struct Piece {
    std::byte* to;
    const std::byte* from;
    size_t bytes;
  };

  void work() {
    std::optional<PinnedBuffer> pinned;
    void* copied[kBuffers] = {};  // events: the device has read the buffer
    Piece piece{};
    bool has_piece = false;
    try {
      for (void*& event : copied) check(event_create(&event), "making an event");
      pinned.emplace(kBuffers * kPieceBytes);
      for (size_t next = 0; (has_piece = take(&piece)); next = (next + 1) % kBuffers) {
        std::byte* buffer = pinned->data() + next * kPieceBytes;
        check(event_sync(copied[next]), "copying weights to the device");
        std::memcpy(buffer, piece.from, piece.bytes);
        check(copy_to_device(piece.to, buffer, piece.bytes, stream_),
              "copying weights to the device");
        check(event_record(copied[next], stream_), "recording an event");
        done();
      }
    } catch (...) {
      {
        const std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      if (has_piece) done();
      changed_.notify_all();
    }
    for (void* event : copied) {
      if (event == nullptr) continue;
      event_sync(event);
      event_destroy(event);
    }
  }
  // The next piece, or false at the end.
  bool take(Piece* piece) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !queue_.empty() || stop_ || error_; });
    if (queue_.empty() || error_) return false;
    *piece = queue_.front();
    queue_.pop_front();
    ++busy_;
    return true;
  }
  void done() {
    const std::lock_guard lock(mutex_);
    if (--busy_ == 0 && (queue_.empty() || error_)) changed_.notify_all();
  }

  void* stream_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Piece> queue_;
  int busy_ = 0;  // pieces between take() and done()
  bool stop_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

}  // namespace nibble::cuda
