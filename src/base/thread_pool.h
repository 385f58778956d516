// A persistent pool for data-parallel loops: the caller's thread works too, workers spin briefly
// and then sleep. One pool per backend or job; parallel_for may not be nested on the same pool.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace nibble {

/// Cores this process may really use: affinity mask and cgroup CPU quota, at least 1.
int usable_cpu_count();

class ThreadPool {
 public:
  /// `num_threads` includes the calling thread; 0 takes usable_cpu_count().
  explicit ThreadPool(int num_threads = 0);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  /// Runs body(chunk, thread) for chunk in [0, num_chunks), handed out in order to whichever thread
  /// is free; returns when all are done. thread in [0, num_threads()). The first exception is
  /// rethrown.
  void parallel_for(int64_t num_chunks, const std::function<void(int64_t chunk, int thread)>& body);

 private:
  void worker(int thread);
  void work(int thread);

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_chunk_{0};
  std::atomic<int> running_{0};
  int64_t num_chunks_ = 0;
  const std::function<void(int64_t, int)>* body_ = nullptr;
  std::exception_ptr error_;
  std::atomic<bool> stop_{false};
};

}  // namespace nibble
