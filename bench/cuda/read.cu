// How fast a chain of kernels reads as many bytes as gate_up's weights of the 24B, 173 MB each, and
// nothing else: by bulk copies, weights rotated out of L2, programmatic dependent launch, as the
// linears do it. What a linear takes beyond that is its own (docs/kernels.md, What binds).
//   read: the order in which a CTA reads (its own share from end to end; two row tiles side by side
//         as linear_digits.cu does; all CTAs through memory together; its own share from another
//         place on), how much is in flight, the L2 policy, and a pace
// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <vector>

#include "backends/cuda/layout.h"
#include "backends/cuda/ptx/barrier.cuh"
#include "backends/cuda/ptx/copy.cuh"
#include "common.cuh"

namespace nibble::bench {
namespace {

constexpr int kBlockBytes = static_cast<int>(cuda_layout::kBlockBytes);
constexpr int kGroups = 40, kTiles = 512, kBlocks = 2 * kTiles * kGroups;  // 65536 rows x 5120
constexpr int kSmem = 227 * 1024, kBarOffset = kSmem - 1024;

enum class Order : int { kShare, kTilePairs, kTogether, kShareFromElsewhere };
struct Reading {
  const char* what;
  Order order;
  int rings, in_flight, blocks;  // rings of a CTA, copies in flight of a ring, blocks of a copy
  int pace = 0;                  // clocks a copy at least
  bool evict_first = true;
};

__global__ void __launch_bounds__(512, 1) read_kernel(Reading r, const uint8_t* from) {
  extern __shared__ __align__(128) uint8_t smem[];
  const int ring = static_cast<int>(threadIdx.x) / 32, cta = static_cast<int>(blockIdx.x);
  const int ctas = static_cast<int>(gridDim.x);
  ptx::grid_launch_dependents();
  if (threadIdx.x % 32 != 0 || ring >= r.rings) {
    ptx::grid_dependency_wait();
    return;
  }
  const int bytes = r.blocks * kBlockBytes;
  const uint32_t to = ptx::smem_address(smem) + ring * r.in_flight * bytes;
  const uint32_t bars = ptx::smem_address(smem) + kBarOffset + ring * r.in_flight * 8;
  for (int i = 0; i < r.in_flight; ++i) ptx::mbarrier_init(bars + i * 8, 1);
  ptx::mbarrier_init_fence();
  const int all = kBlocks / r.blocks, each = all / ctas, more = all % ctas;
  const int mine = each + (cta < more), first = cta * each + min(cta, more);
  const uint64_t policy = r.evict_first ? ptx::policy_evict_first() : ptx::policy_evict_normal();
  auto request = [&](int i, int slot) {
    const int n = i * r.rings + ring;
    const uint32_t at = to + slot * bytes, bar = bars + slot * 8;
    ptx::mbarrier_expect(bar, bytes);
    if (r.order == Order::kTilePairs) {  // 128 CTAs, two tiles of 256 rows each
      const int tile = cta * 4 + n / kGroups * 2, group = n % kGroups;
      for (int half = 0; half < 2; ++half) {
        ptx::bulk_load(at + half * bytes / 2,
                       from + ((tile + half) * kGroups + group) * int64_t{2 * kBlockBytes},
                       bytes / 2, bar, policy);
      }
      return;
    }
    const int copy = r.order == Order::kTogether             ? n * ctas + cta
                     : r.order == Order::kShareFromElsewhere ? first + (n + cta * 37) % mine
                                                             : first + n;
    ptx::bulk_load(at, from + int64_t{copy} * bytes, bytes, bar, policy);
  };
  const int count = (mine - ring + r.rings - 1) / r.rings;
  int requested = 0;
  for (; requested < min(r.in_flight, count); ++requested) request(requested, requested);
  ptx::grid_dependency_wait();
  long long last = clock64();
  for (int i = 0, slot = 0, parity = 0; i < count; ++i) {
    ptx::mbarrier_wait(bars + slot * 8, parity);
    if (r.pace > 0) {
      while (clock64() - last < r.pace) {
      }
      last = clock64();
    }
    if (requested < count) request(requested++, slot);
    if (++slot == r.in_flight) slot = 0, parity ^= 1;
  }
}

}  // namespace

void bench_read(cudaStream_t stream, const Limits& limits) {
  int sms;
  BENCH_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  constexpr int kCopies = 6, kCalls = 4 * kCopies;
  const size_t bytes = size_t{kBlocks} * kBlockBytes;
  std::vector<uint8_t*> copies;
  for (int i = 0; i < kCopies; ++i) {
    copies.push_back(device_alloc<uint8_t>(bytes));
    fill_words<<<1056, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(copies.back()), bytes / 4,
                                         static_cast<uint64_t>(i));
  }
  BENCH_CHECK(
      cudaFuncSetAttribute(read_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmem));
  for (const Reading& r : {
           Reading{"its share", Order::kShare, 1, 12, 4},
           Reading{"its share", Order::kShare, 1, 8, 4},
           Reading{"its share", Order::kShare, 1, 4, 4},
           Reading{"its share", Order::kShare, 1, 3, 4},
           Reading{"its share", Order::kShare, 1, 2, 4},
           Reading{"its share, 16 warps (K1)", Order::kShare, 16, 2, 1},
           Reading{"tile pairs (K7)", Order::kTilePairs, 1, 8, 4},
           Reading{"tile pairs (K7)", Order::kTilePairs, 1, 6, 4},
           Reading{"all together", Order::kTogether, 1, 8, 4},
           Reading{"its share from elsewhere", Order::kShareFromElsewhere, 1, 8, 4},
           Reading{"its share, evict_normal", Order::kShare, 1, 8, 4, 0, false},
           Reading{"its share, paced", Order::kShare, 1, 8, 4, 750},
           Reading{"its share, paced", Order::kShare, 1, 8, 4, 850},
           Reading{"tile pairs, paced", Order::kTilePairs, 1, 8, 4, 750},
           Reading{"tile pairs, paced", Order::kTilePairs, 1, 8, 4, 850},
       }) {
    if (r.order == Order::kTilePairs && sms < kTiles / 4) continue;
    const Timing t = time_graph(stream, kCalls, [&] {
      for (int call = 0; call < kCalls; ++call) {
        cudaLaunchConfig_t config{};
        config.gridDim =
            dim3(static_cast<unsigned>(r.order == Order::kTilePairs ? kTiles / 4 : sms));
        config.blockDim = dim3(512);
        config.dynamicSmemBytes = kSmem;
        config.stream = stream;
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &attribute;
        config.numAttrs = call > 0 ? 1 : 0;
        BENCH_CHECK(cudaLaunchKernelEx(&config, read_kernel, r,
                                       static_cast<const uint8_t*>(copies[call % kCopies])));
      }
    });
    std::printf("read %-26s %2d x %2d x %5d bytes in flight, pace %3d: %7.2f us", r.what, r.rings,
                r.in_flight, r.blocks * kBlockBytes, r.pace, t.median_us);
    print_gbps(static_cast<double>(bytes), t.median_us, limits);
    std::printf("\n");
  }
  for (uint8_t* copy : copies) BENCH_CHECK(cudaFree(copy));
}

}  // namespace nibble::bench
