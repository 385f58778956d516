// nibble_cuda_bench: the Hopper kernels against references and against this card's own limits.
//   nibble_cuda_bench limits | unpack | launch | power | sms | read | linear [options] |
//                     attention [options] | prefill | ops | calibration ...
// Several commands may follow one another, separated by "--". Every run measures the read limit
// first and what wgmma gives where a row needs it (`limits`: all of them, at once), so each
// percentage belongs to the card that gave the time. SPDX-License-Identifier: Apache-2.0
#include <cstring>
#include <string>

#include "common.cuh"

namespace nibble::bench {
namespace {

template <int kUnroll>
__global__ void __launch_bounds__(512)
    read_kernel(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t sum = 0;
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  for (; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
    uint4 v[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (sum == 0x12345678u) *sink = sum;
}

__global__ void empty_kernel(int* out) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (out && threadIdx.x == 1025) *out = 1;
}

}  // namespace

Limits measure_limits(cudaStream_t stream, bool print) {
  const size_t bytes = size_t{4} << 30;
  auto* data = device_alloc<uint32_t>(bytes / 4);
  auto* sink = device_alloc<uint32_t>(4);
  fill_words<<<132 * 8, 512, 0, stream>>>(data, bytes / 4, 99);
  BENCH_CHECK(cudaGetLastError());
  Limits limits;
  int sms;
  BENCH_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  for (int blocks : {1, 2, 4}) {
    const auto t = time_graph(
        stream, 2,
        [&] {
          for (int i = 0; i < 2; ++i) {
            read_kernel<8><<<sms * blocks, 512, 0, stream>>>(reinterpret_cast<const uint4*>(data),
                                                             bytes / 16, sink);
          }
        },
        9);
    const double gbps = static_cast<double>(bytes) / t.median_us * 1e-3;
    if (print) std::printf("read 4 GiB, %d x 512 threads per SM: %.0f GB/s\n", blocks, gbps);
    limits.read_gbps = std::max(limits.read_gbps, gbps);
  }
  auto* copy = device_alloc<uint32_t>(bytes / 8);
  const auto t = time_graph(
      stream, 2,
      [&] {
        for (int i = 0; i < 2; ++i) {
          BENCH_CHECK(cudaMemcpyAsync(copy, data + (i ? bytes / 8 : 0), bytes / 2,
                                      cudaMemcpyDeviceToDevice, stream));
        }
      },
      9);
  if (print) {
    std::printf("copy 2 GiB (read + write bytes): %.0f GB/s\n",
                static_cast<double>(bytes) / t.median_us * 1e-3);
  }
  BENCH_CHECK(cudaFree(copy));
  BENCH_CHECK(cudaFree(data));
  BENCH_CHECK(cudaFree(sink));
  std::printf("read limit of this run: %.0f GB/s\n", limits.read_gbps);
  return limits;
}

void bench_launch(cudaStream_t stream) {
  for (int dependent : {0, 1}) {
    const auto t = time_graph(stream, 200, [&] {
      for (int i = 0; i < 200; ++i) {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(132);
        config.blockDim = dim3(256);
        config.stream = stream;
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &attribute;
        config.numAttrs = dependent;
        BENCH_CHECK(cudaLaunchKernelEx(&config, empty_kernel, static_cast<int*>(nullptr)));
      }
    });
    std::printf("graph, empty kernels of 132 CTAs, dependent launch %s: %.2f us per kernel\n",
                dependent ? "on" : "off", t.median_us);
  }
}

}  // namespace nibble::bench

int main(int argc, char** argv) {
  using namespace nibble::bench;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  cudaDeviceProp properties;
  BENCH_CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, %d SMs, %zu MiB\n", properties.name, properties.multiProcessorCount,
              properties.totalGlobalMem >> 20);
  cudaStream_t stream;
  BENCH_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  bool verbose = false;
  for (int i = 1; i < argc; ++i) verbose |= std::string(argv[i]) == "limits";
  const Limits limits = measure_limits(stream, verbose);
  int failures = 0;
  for (int i = 1; i < argc; ++i) {
    int end = i;
    while (end < argc && std::strcmp(argv[end], "--") != 0) ++end;
    const std::string command = argv[i];
    if (command == "limits") {
      for (const WgmmaKind kind : {WgmmaKind::kBf16, WgmmaKind::kF16, WgmmaKind::kE4m3}) {
        wgmma_tflops(kind, stream);
      }
    } else if (command == "unpack") {
      bench_unpack(stream);
    } else if (command == "power") {
      bench_power(stream);
    } else if (command == "sms") {
      bench_sms(stream);
    } else if (command == "read") {
      bench_read(stream, limits);
    } else if (command == "launch") {
      bench_launch(stream);
    } else if (command == "linear") {
      failures += bench_linear(stream, limits, end - i - 1, argv + i + 1);
    } else if (command == "attention") {
      failures += bench_attention(stream, limits, end - i - 1, argv + i + 1);
    } else if (command == "prefill") {
      failures += bench_prefill(stream, end - i - 1, argv + i + 1);
    } else if (command == "ops") {
      failures += bench_ops(stream, limits, end - i - 1, argv + i + 1);
    } else if (command == "calibration") {
      bench_calibration(stream, limits);
    } else {
      std::fprintf(stderr,
                   "unknown command \"%s\": limits, unpack, launch, power, sms, read, linear, "
                   "attention, prefill, ops or calibration\n",
                   command.c_str());
      return 2;
    }
    i = end;
  }
  BENCH_CHECK(cudaDeviceSynchronize());
  std::printf("%d failed checks\n", failures);
  return failures != 0;
}
