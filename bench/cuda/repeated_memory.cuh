// A range of addresses behind which the same few megabytes of device memory lie again and again:
// what is read there comes out of L2. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace nibble::bench {

class RepeatedMemory {
 public:
  static constexpr size_t kBytes = size_t{16} << 20;  // that repeat; L2 holds 50 MB and more

  explicit RepeatedMemory(size_t bytes) : size_((bytes + kBytes - 1) / kBytes * kBytes) {
    const CUmemAllocationProp memory{
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0},
    };
    const CUmemAccessDesc access{.location = memory.location,
                                 .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    check(driver<decltype(&cuMemCreate)>("cuMemCreate")(&memory_, kBytes, &memory, 0));
    check(driver<decltype(&cuMemAddressReserve)>("cuMemAddressReserve")(&begin_, size_, 0, 0, 0));
    for (size_t at = 0; at < size_; at += kBytes) {
      check(driver<decltype(&cuMemMap)>("cuMemMap")(begin_ + at, kBytes, 0, memory_, 0));
    }
    check(driver<decltype(&cuMemSetAccess)>("cuMemSetAccess")(begin_, size_, &access, 1));
  }
  RepeatedMemory(const RepeatedMemory&) = delete;
  RepeatedMemory& operator=(const RepeatedMemory&) = delete;
  ~RepeatedMemory() {
    check(driver<decltype(&cuMemUnmap)>("cuMemUnmap")(begin_, size_));
    check(driver<decltype(&cuMemAddressFree)>("cuMemAddressFree")(begin_, size_));
    check(driver<decltype(&cuMemRelease)>("cuMemRelease")(memory_));
  }
  uint8_t* data() const { return reinterpret_cast<uint8_t*>(begin_); }

 private:
  // The bench does not link libcuda.
  template <typename Function>
  static Function driver(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    BENCH_CHECK(cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found));
    if (!entry) {
      std::fprintf(stderr, "the driver has no %s\n", name);
      std::exit(1);
    }
    return reinterpret_cast<Function>(entry);
  }
  static void check(CUresult result) {
    if (result == CUDA_SUCCESS) return;
    std::fprintf(stderr, "mapping memory repeatedly: driver error %d\n", static_cast<int>(result));
    std::exit(1);
  }

  size_t size_;
  CUdeviceptr begin_ = 0;
  CUmemGenericAllocationHandle memory_ = 0;
};

}  // namespace nibble::bench
