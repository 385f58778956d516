// Asynchronous copies global -> shared that complete on an mbarrier.
// NOTE: a cache policy is safe on bulk copies; on cp.async (LDGSTS) ptxas 13.0 can drop it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include <cstdint>

namespace nibble::ptx {

// Bytes read once (weights): leave L2 first.
__device__ __forceinline__ uint64_t policy_evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Bytes read again soon.
__device__ __forceinline__ uint64_t policy_evict_normal() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 1-D bulk copy; addresses and bytes are multiples of 16.
__device__ __forceinline__ void bulk_load(uint32_t smem, const void* global, uint32_t bytes,
                                          uint32_t bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(smem),
      "l"(global), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

// The same bytes into this place of every CTA in `ctas`, completing on each one's own barrier.
__device__ __forceinline__ void bulk_load_multicast(uint32_t smem, const void* global,
                                                    uint32_t bytes, uint32_t bar, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(smem),
      "l"(global), "r"(bytes), "r"(bar), "h"(ctas)
      : "memory");
}

// One box of a 2-D tensor map; x is the innermost coordinate, in elements.
__device__ __forceinline__ void tensor_load_2d(uint32_t smem, const CUtensorMap* map, int x, int y,
                                               uint32_t bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(bar)
      : "memory");
}

// The same box into this place of every CTA in `ctas`, completing on each one's own barrier.
__device__ __forceinline__ void tensor_load_2d_multicast(uint32_t smem, const CUtensorMap* map,
                                                         int x, int y, uint32_t bar,
                                                         uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
      "l"(map), "r"(x), "r"(y), "r"(bar), "h"(ctas)
      : "memory");
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// 16 bytes by cp.async; `bytes` 0 writes zeros and reads nothing.
__device__ __forceinline__ void copy_16(uint32_t smem, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void store_zero_16(uint32_t smem) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(smem), "r"(0) : "memory");
}

}  // namespace nibble::ptx
