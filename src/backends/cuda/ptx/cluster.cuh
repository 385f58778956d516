// Thread block clusters: barrier and stores to another CTA's shared memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nibble::ptx {

// All threads of all CTAs; every arrive is followed by one wait.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Stores values at the same shared address in CTA `rank` of the cluster.
template <int kCount>
__device__ __forceinline__ void store_cluster(uint32_t address, int rank,
                                              const float (&value)[kCount]) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote + 4 * i), "f"(value[i]) : "memory");
  }
}

}  // namespace nibble::ptx
