// Shared by the Hopper bench programs: checks, random data made on the device, graph timing.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#define BENCH_CHECK(call)                                                \
  do {                                                                   \
    const auto status_ = static_cast<cudaError_t>(call);                 \
    if (status_ != cudaSuccess) {                                        \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                   cudaGetErrorString(status_));                         \
      std::exit(1);                                                      \
    }                                                                    \
  } while (0)

namespace nibble::bench {

template <typename T>
T* device_alloc(size_t count) {
  void* pointer = nullptr;
  BENCH_CHECK(cudaMalloc(&pointer, std::max<size_t>(count * sizeof(T), 16)));
  return static_cast<T*>(pointer);
}

__host__ __device__ inline uint32_t mix(uint64_t x) {  // splitmix64, upper half
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>((x ^ (x >> 31)) >> 32);
}
__device__ inline float uniform(uint64_t seed) { return (mix(seed) >> 8) * 0x1p-24f; }
__device__ inline float normal(uint64_t seed) {
  const float u = fmaxf(uniform(2 * seed), 1e-7f), v = uniform(2 * seed + 1);
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

static __global__ void fill_words(uint32_t* out, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    out[i] = mix(seed * 0x1000000007ull + i);
  }
}
// Normal, with a few outlier columns (every 997th is 8x).
static __global__ void fill_normal(__nv_bfloat16* out, size_t count, int columns, float scale,
                                   uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float outlier = (i % columns) % 997 == 5 ? 8.0f : 1.0f;
    out[i] = __float2bfloat16(normal(seed * 0x1000000007ull + i) * scale * outlier);
  }
}
static __global__ void fill_uniform(float* out, size_t count, float low, float high,
                                    uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    out[i] = low + (high - low) * uniform(seed * 0x1000000007ull + i);
  }
}

struct Timing {
  float median_us, best_us, worst_us;
};

// Captures body (which launches `calls` kernels on the stream) into a graph; microseconds per call.
inline Timing time_graph(cudaStream_t stream, int calls, const std::function<void()>& body,
                         int replays = 21) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  BENCH_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  body();
  BENCH_CHECK(cudaStreamEndCapture(stream, &graph));
  BENCH_CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t start, stop;
  BENCH_CHECK(cudaEventCreate(&start));
  BENCH_CHECK(cudaEventCreate(&stop));
  for (int i = 0; i < 5; ++i) BENCH_CHECK(cudaGraphLaunch(exec, stream));
  BENCH_CHECK(cudaStreamSynchronize(stream));
  std::vector<float> times;
  for (int i = 0; i < replays; ++i) {
    BENCH_CHECK(cudaEventRecord(start, stream));
    BENCH_CHECK(cudaGraphLaunch(exec, stream));
    BENCH_CHECK(cudaEventRecord(stop, stream));
    BENCH_CHECK(cudaEventSynchronize(stop));
    float ms;
    BENCH_CHECK(cudaEventElapsedTime(&ms, start, stop));
    times.push_back(ms * 1000.0f / static_cast<float>(calls));
  }
  BENCH_CHECK(cudaGraphExecDestroy(exec));
  BENCH_CHECK(cudaGraphDestroy(graph));
  BENCH_CHECK(cudaEventDestroy(start));
  BENCH_CHECK(cudaEventDestroy(stop));
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times.front(), times.back()};
}

// call(i) is the i-th launch of a graph and returns its status; microseconds a call, the median.
template <typename Call>
double time_calls(cudaStream_t stream, int calls, Call call) {
  return time_graph(stream, calls,
                    [&] {
                      for (int i = 0; i < calls; ++i) BENCH_CHECK(call(i));
                    })
      .median_us;
}

// What percentages refer to, measured once per process: reading here, wgmma_tflops() when first
// asked for.
struct Limits {
  double read_gbps = 0;
};
Limits measure_limits(cudaStream_t stream, bool print);

enum class WgmmaKind : int { kBf16, kF16, kE4m3 };
inline const char* wgmma_name(WgmmaKind kind) {
  return kind == WgmmaKind::kBf16 ? "bf16" : kind == WgmmaKind::kF16 ? "f16" : "e4m3";
}
double wgmma_tflops(WgmmaKind kind, cudaStream_t stream);

// The end of a row: "  1234 GB/s (56.7 % of read)".
inline void print_gbps(double bytes, double us, const Limits& limits) {
  std::printf("  %6.0f GB/s (%4.1f %% of read)", bytes / us * 1e-3,
              bytes / us * 0.1 / limits.read_gbps);
}
inline void print_tflops(double flops, double us, WgmmaKind kind, cudaStream_t stream) {
  std::printf("  %6.1f TFLOPS (%4.1f %% of %s)", flops / us * 1e-6,
              flops / us * 1e-4 / wgmma_tflops(kind, stream), wgmma_name(kind));
}

void bench_launch(cudaStream_t stream);
int bench_linear(cudaStream_t stream, const Limits& limits, int argc, char** argv);
int bench_attention(cudaStream_t stream, const Limits& limits, int argc, char** argv);
int bench_prefill(cudaStream_t stream, int argc, char** argv);
int bench_ops(cudaStream_t stream, const Limits& limits, int argc, char** argv);
void bench_calibration(cudaStream_t stream, const Limits& limits);
void bench_unpack(cudaStream_t stream);
void bench_power(cudaStream_t stream);
void bench_sms(cudaStream_t stream);
void bench_read(cudaStream_t stream, const Limits& limits);

}  // namespace nibble::bench
