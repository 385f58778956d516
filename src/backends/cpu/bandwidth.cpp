// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#include "backends/cpu/cpu_backend.h"
#include "backends/cpu/isa.h"
#include "base/error.h"
#include "base/thread_pool.h"

namespace nibble {

double measure_read_bandwidth(int num_threads, size_t bytes, int passes) {
  constexpr size_t kPiece = size_t{1} << 20;
  const auto pieces = static_cast<int64_t>(std::max<size_t>(bytes / kPiece, 1));
  const cpu::Kernels& kernels = cpu::kernels_for("native");
  const std::unique_ptr<void, decltype(&std::free)> memory(
      std::aligned_alloc(4096, static_cast<size_t>(pieces) * kPiece), &std::free);
  if (!memory) fail(ErrorKind::kMemory, "cannot allocate {} bytes for the bandwidth test", bytes);
  auto* data = static_cast<std::byte*>(memory.get());
  ThreadPool pool(num_threads);
  auto touch = [&](int64_t piece, int) {
    std::memset(data + static_cast<size_t>(piece) * kPiece, 1, kPiece);
  };
  pool.parallel_for(pieces, std::ref(touch));
  std::atomic<uint64_t> sum{0};  // used, so that the reads cannot be optimised away
  auto read = [&](int64_t piece, int) {
    sum.fetch_add(kernels.read(data + static_cast<size_t>(piece) * kPiece, kPiece),
                  std::memory_order_relaxed);
  };
  double best = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.parallel_for(pieces, std::ref(read));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(pieces) * kPiece / seconds.count() / 1e9);
  }
  NIBBLE_CHECK(sum.load() != 0);
  return best;
}

}  // namespace nibble
