// Writes down every kernel and copy of any CUDA program, with times: a library that the driver
// loads into it. Needs CUPTI (the wheel nvidia-cuda-cupti, or the toolkit's extras), so the build
// leaves it out:
//
//   g++ -O2 -shared -fPIC -o kernel_trace.so -I CUPTI/include -I CUDA/include
//       bench/cuda/kernel_trace.cpp CUPTI/lib/libcupti.so.13             (one line)
//   CUDA_INJECTION64_PATH=$PWD/kernel_trace.so KERNEL_TRACE=trace.tsv nibble bench latency ENGINE
//   python3 bench/kernel_timeline.py trace.tsv
//
// A line a kernel: start and end in ns, name, grid (x, y, z). Copies are "memcpy" with their bytes.
// SPDX-License-Identifier: Apache-2.0
#include <cupti.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <vector>

namespace {

constexpr size_t kBufferBytes = size_t{8} << 20;

struct Record {
  uint64_t start, end;
  std::string name;
  int64_t x, y, z;
};
std::vector<Record> records;
std::mutex mutex;

void CUPTIAPI give_buffer(uint8_t** buffer, size_t* bytes, size_t* most_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *bytes = kBufferBytes;
  *most_records = 0;
}

void CUPTIAPI take_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t used) {
  const std::lock_guard lock(mutex);
  CUpti_Activity* activity = nullptr;
  while (cuptiActivityGetNextRecord(buffer, used, &activity) == CUPTI_SUCCESS) {
    if (activity->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto& k = *reinterpret_cast<const CUpti_ActivityKernel9*>(activity);
      records.push_back({k.start, k.end, k.name ? k.name : "?", k.gridX, k.gridY, k.gridZ});
    } else if (activity->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto& copy = *reinterpret_cast<const CUpti_ActivityMemcpy5*>(activity);
      records.push_back({copy.start, copy.end, "memcpy", static_cast<int64_t>(copy.bytes), 0, 0});
    }
  }
  std::free(buffer);
}

void write_records() {
  cuptiActivityFlushAll(1);
  const char* path = std::getenv("KERNEL_TRACE");
  std::FILE* file = std::fopen(path ? path : "trace.tsv", "w");
  if (file == nullptr) {
    std::perror("kernel_trace: cannot write KERNEL_TRACE");
    return;
  }
  for (const Record& r : records) {
    std::fprintf(file, "%llu\t%llu\t%s\t%lld\t%lld\t%lld\n",
                 static_cast<unsigned long long>(r.start), static_cast<unsigned long long>(r.end),
                 r.name.c_str(), static_cast<long long>(r.x), static_cast<long long>(r.y),
                 static_cast<long long>(r.z));
  }
  std::fclose(file);
}

}  // namespace

extern "C" int InitializeInjection() {
  if (cuptiActivityRegisterCallbacks(give_buffer, take_buffer) != CUPTI_SUCCESS ||
      cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS ||
      cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY) != CUPTI_SUCCESS) {
    std::fprintf(stderr, "kernel_trace: CUPTI refuses\n");
    return 0;
  }
  std::atexit(write_records);
  return 1;
}
