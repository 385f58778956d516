// The int4 linears: correctness against a float64 reference, then time per shape and per layer.
//   linear [--m 1,8,16] [--kernel auto|small|wgmma|portable|fp8|digits] [--tactic N,N] [--early N]
//          [--no-check] [--no-shapes] [--no-layer] [--odd-only] [--trace] [--cached] [--in-order]
//          [--matrix qkv|o|gate_up|down] [--replays N] [--plain-scales]
// --in-order: wgmma and fp8 as for steps with rows of prompts; and the last two tokens' bits are
// compared with those of a call of these two.
// --cached: weights that repeat every 16 MB and so come out of L2 (not checked): how fast the
// kernels are where memory is not what binds, as on a device with faster memory.
// --plain-scales: all scales 2^-9, so that bf16 weights have three bits of mantissa and tensor
// cores switch less: what that leaves of the power limit.
//
// fp8: x is quantized by quantize_x, which has rows of its own; the reference quantizes by itself,
// in plain loops. In the layer it comes before every linear, up to 64 tokens before o only, where a
// step's attention does it: gate_up, o and down round for the next, norms included. digits: the
// same by split_digits, up to 16 tokens; the reference multiplies by x itself.
//
// Time: CUDA graph of calls that walk through separate copies of the weights (more than L2 holds),
// each call depending on the one before (programmatic dependent launch, as in a real step), median
// of 21 replays, of layers 41, or of --replays: with hundreds the card is as hot as in steady use.
// Rates count packed weight bytes (0.515625 per weight) and 2*M*N*K flops.
//
// SPDX-License-Identifier: Apache-2.0
#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>

#include "backends/cuda/kernels.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/wgmma_tactic.h"
#include "common.cuh"
#include "repeated_memory.cuh"

namespace nibble::bench {
namespace {

using cuda::Epilogue;
using cuda_layout::Shape;

// Same bytes as cuda_layout::pack, one thread per word (checked against it below).
__global__ void pack_kernel(Shape shape, bool interleave, const uint8_t* nibbles,
                            const float* scales, uint8_t* out) {
  constexpr int kWords = cuda_layout::kBlockBytes / 4;
  const int64_t total = shape.num_tiles() * shape.num_groups() * 2 * kWords;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int word = static_cast<int>(i % kWords);
    const int64_t block = i / kWords, half = block % 2, group = block / 2 % shape.num_groups();
    const int64_t row0 = block / 2 / shape.num_groups() * 128 + half * 64;
    uint32_t value = 0;
    if (word < cuda_layout::kBlockNibbleBytes / 4) {
      const int k16 = word % 4, lane = word / 4 % 32, k64 = word / 128 % 2, m16 = word / 256;
      for (int j = 0; j < 8; ++j) {
        const int64_t row = row0 + m16 * 16 + lane / 4 + 8 * (j & 1);
        const int64_t k =
            group * 128 + k64 * 64 + k16 * 16 + lane % 4 * 2 + 8 * (j >> 1 & 1) + (j >> 2);
        uint32_t u = 8;
        if (row < shape.rows && k < shape.k) {
          const int64_t source = cuda_layout::source_row(shape, interleave, row);
          u = ((nibbles[source * (shape.k / 2) + k / 2] >> (k % 2 * 4)) & 15) ^ 8;
        }
        value |= u << (16 * (j >> 2) + 8 * (j >> 1 & 1) + 4 * (j & 1));
      }
    } else {
      const int place = (word - cuda_layout::kBlockNibbleBytes / 4) * 2;
      for (int hi = 0; hi < 2; ++hi) {
        const int64_t row = row0 + place / 2 % 4 * 16 + place / 8 + 8 * hi;
        if (row < shape.rows) {
          const int64_t source = cuda_layout::source_row(shape, interleave, row);
          const float scale = scales[source * shape.num_groups() + group];
          value |= uint32_t{__bfloat16_as_ushort(__float2bfloat16(scale))} << (16 * hi);
        }
      }
    }
    reinterpret_cast<uint32_t*>(out)[i] = value;
  }
}

// What the linear multiplies by: x, or x rounded to e4m3 with a scale per token or, `grouped`, per
// token and group. One thread a (token, group).
__global__ void expand_kernel(const __nv_bfloat16* x, int64_t k, int64_t groups, int64_t pairs,
                              bool fp8, bool grouped, float* out) {
  const int64_t pair = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (pair >= pairs) return;
  const int64_t row = pair / groups * k, first = pair % groups * 128, end = min(first + 128, k);
  float most = 0;
  for (int64_t i = grouped ? first : 0; fp8 && i < (grouped ? end : k); ++i) {
    most = fmaxf(most, fabsf(__bfloat162float(x[row + i])));
  }
  for (int64_t i = first; i < end; ++i) {
    float v = __bfloat162float(x[row + i]);
    if (fp8) {
      const auto byte = __nv_cvt_float_to_fp8(v * (448.0f / most), __NV_SATFINITE, __NV_E4M3);
      v = __half2float(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)) * (most / 448.0f);
    }
    out[row + i] = v;
  }
}

// y[token][row] = sum_k x q bf16(s), float64; one warp per row.
__global__ void reference_kernel(Shape shape, const uint8_t* nibbles, const float* scales,
                                 const float* x, int tokens, double* y) {
  const int64_t row = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= shape.rows) return;
  for (int token0 = 0; token0 < tokens; token0 += 8) {
    double sum[8] = {};
    for (int64_t k = lane; k < shape.k; k += 32) {
      int q = (nibbles[row * (shape.k / 2) + k / 2] >> (k % 2 * 4)) & 15;
      q = q >= 8 ? q - 16 : q;
      const double w = static_cast<double>(q) *
                       static_cast<double>(__bfloat162float(
                           __float2bfloat16(scales[row * shape.num_groups() + k / 128])));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (token0 + j < tokens) {
          sum[j] += w * static_cast<double>(x[(token0 + j) * shape.k + k]);
        }
      }
    }
    for (int j = 0; j < 8; ++j) {
      for (int offset = 16; offset; offset /= 2) {
        sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
      }
      if (lane == 0 && token0 + j < tokens) y[(token0 + j) * shape.rows + row] = sum[j];
    }
  }
}

// acc[0] += |out - ref|^2, acc[1] += |ref|^2, acc[2] += number of values that are NaN or off by
// more than 5 % and `slack`.
__global__ void compare_kernel(Epilogue epilogue, const double* y, const __nv_bfloat16* residual,
                               const float* out_scale, const __nv_bfloat16* out, int tokens,
                               int64_t rows, double slack, double* acc) {
  const int64_t columns = epilogue == Epilogue::kSiluMul ? rows / 2 : rows;
  double error = 0, norm = 0, wild = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < tokens * columns;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t token = i / columns, column = i % columns;
    double want = y[token * rows + column];
    if (epilogue == Epilogue::kSiluMul) {
      want = want / (1 + exp(-want)) * y[token * rows + column + columns] *
             static_cast<double>(out_scale[column]);
    } else if (epilogue == Epilogue::kResidual) {
      want += static_cast<double>(__bfloat162float(residual[i]));
    }
    const double got = static_cast<double>(__bfloat162float(out[i]));
    error += (got - want) * (got - want);
    norm += want * want;
    if (!(fabs(got - want) <= 0.05 * fabs(want) + slack)) wild += 1;
  }
  atomicAdd(&acc[0], error);
  atomicAdd(&acc[1], norm);
  atomicAdd(&acc[2], wild);
}

struct Matrix {
  const char* name;
  Shape shape;
  Epilogue epilogue;
};

struct Weights {  // device copies of one matrix
  uint8_t* nibbles = nullptr;
  float* scales = nullptr;
  std::vector<uint8_t*> packed;
  float largest_scale = 0;                   // of all of packed
  std::unique_ptr<RepeatedMemory> repeated;  // where all of packed are
};

struct Options {
  std::vector<int> tokens{1, 8, 16};
  std::string kernel = "auto", matrix;  // matrix: the only one
  bool check = true, layer = true, shapes = true;
  std::vector<int> tactics{-1};
  bool trace = false, odd_only = false, cached = false, in_order = false;
  int early = 0, replays = 0;  // 0: 21, of layers 41
  bool plain_scales = false;
};

int run(const Options& o, const cuda::LinearArgs& args, cudaStream_t stream) {
  return o.kernel == "small"      ? cuda::linear_small(args, stream)
         : o.kernel == "wgmma"    ? cuda::linear_wgmma(args, stream)
         : o.kernel == "portable" ? cuda::portable_linear(args, stream)
         : o.kernel == "fp8"      ? cuda::linear_fp8(args, stream)
         : o.kernel == "digits"   ? cuda::linear_digits(args, stream)
                                  : cuda::linear(args, stream);
}

// The number to print: what the kernel chose, where it can say so.
int tactic_of(const Options& o, const cuda::LinearArgs& args) {
  if (args.tactic >= 0) return args.tactic;
  return o.kernel == "wgmma"      ? cuda::wgmma_tactic(args).encode()
         : o.kernel == "portable" ? cuda::portable_tactic(args).encode()
         : o.kernel == "fp8"      ? cuda::fp8_tactic(args).encode()
         : o.kernel == "digits"   ? cuda::digits_tactic(args)
                                  : args.tactic;
}

std::vector<int> parse_list(char* text) {
  std::vector<int> list;
  for (char* p = text; *p;) {
    list.push_back(static_cast<int>(std::strtol(p, &p, 10)));
    if (*p == ',') ++p;
  }
  return list;
}

// The linear reads copy `copy`.
void read_weights(cuda::LinearArgs& args, const Weights& w, int copy) {
  args.weights = w.packed[static_cast<size_t>(copy) % w.packed.size()];
  args.largest_scale = w.largest_scale;
}

void find_largest_scale(const Matrix& matrix, Weights& w, cudaStream_t stream) {
  auto* scratch = device_alloc<float>(1);
  for (const uint8_t* packed : w.packed) {
    float largest;
    BENCH_CHECK(
        cuda::largest_scale(packed, matrix.shape.rows, matrix.shape.k, scratch, &largest, stream));
    w.largest_scale = std::max(w.largest_scale, largest);
  }
  BENCH_CHECK(cudaFree(scratch));
}

Weights make_weights(const Matrix& matrix, int copies, bool keep_source, uint64_t seed,
                     cudaStream_t stream, bool plain_scales = false) {
  const Shape& s = matrix.shape;
  Weights w;
  const size_t nibble_bytes = static_cast<size_t>(s.rows * (s.k / 2));
  const size_t num_scales = static_cast<size_t>(s.rows * s.num_groups());
  w.nibbles = device_alloc<uint8_t>(nibble_bytes + 4);
  w.scales = device_alloc<float>(num_scales);
  for (int copy = copies - 1; copy >= 0; --copy) {  // the source kept is that of copy 0
    fill_words<<<1056, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(w.nibbles),
                                         (nibble_bytes + 3) / 4, seed + copy);
    const float mean = 1.0f / (4.6f * std::sqrt(static_cast<float>(s.k)));
    const float least = plain_scales ? 0x1p-9f : 0.5f * mean;
    fill_uniform<<<1056, 256, 0, stream>>>(w.scales, num_scales, least,
                                           plain_scales ? least : 3.0f * least, seed + 77 + copy);
    w.packed.push_back(device_alloc<uint8_t>(static_cast<size_t>(s.packed_bytes())));
    pack_kernel<<<2112, 256, 0, stream>>>(s, matrix.epilogue == Epilogue::kSiluMul, w.nibbles,
                                          w.scales, w.packed.back());
    BENCH_CHECK(cudaGetLastError());
  }
  std::reverse(w.packed.begin(), w.packed.end());
  find_largest_scale(matrix, w, stream);
  if (!keep_source) {
    BENCH_CHECK(cudaFree(w.nibbles));
    BENCH_CHECK(cudaFree(w.scales));
    w.nibbles = nullptr;
  }
  return w;
}

// Words that are two bf16 of about 1/64: blocks do not begin alike in every repetition, so that any
// word may be read as scales.
__global__ void fill_scales(uint32_t* out, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    out[i] = (mix(i) & 0x007f007fu) | 0x3c803c80u;
  }
}

Weights make_cached_weights(const Matrix& matrix, int copies, cudaStream_t stream) {
  Weights w;
  w.repeated = std::make_unique<RepeatedMemory>(static_cast<size_t>(matrix.shape.packed_bytes()));
  w.packed.assign(static_cast<size_t>(copies), w.repeated->data());
  fill_scales<<<1056, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(w.packed[0]),
                                        RepeatedMemory::kBytes / 4);
  BENCH_CHECK(cudaGetLastError());
  find_largest_scale(matrix, w, stream);
  return w;
}

void free_weights(Weights& w) {
  if (w.nibbles) {
    BENCH_CHECK(cudaFree(w.nibbles));
    BENCH_CHECK(cudaFree(w.scales));
  }
  if (w.repeated) return;
  for (auto* p : w.packed) BENCH_CHECK(cudaFree(p));
}

// Kernels whose x another kernel prepares.
bool prepares(const Options& o) { return o.kernel == "fp8" || o.kernel == "digits"; }
size_t prepared_bytes(const Options& o, int tokens, int64_t k) {
  return o.kernel == "digits" ? cuda::digits_bytes(tokens, k) : cuda::quantized_x_bytes(tokens, k);
}
int prepare(const Options& o, const void* x, int64_t x_stride, int tokens, int64_t k, void* out,
            bool dependent, cudaStream_t stream) {
  const cuda::QuantizeArgs args{.x = x,
                                .x_stride = x_stride,
                                .norm_weight = nullptr,
                                .eps = 0,
                                .pre_scale = nullptr,
                                .out = out,
                                .squares = nullptr,
                                .tokens = tokens,
                                .k = static_cast<int>(k),
                                .one_scale = o.in_order,
                                .dependent = dependent};
  return o.kernel == "digits" ? cuda::split_digits(args, stream) : cuda::quantize_x(args, stream);
}

int check_pack(cudaStream_t stream) {
  int failures = 0;
  for (bool interleave : {false, true}) {
    const Matrix m{"pack", {272, 320}, interleave ? Epilogue::kSiluMul : Epilogue::kPlain};
    Weights w = make_weights(m, 1, true, 5, stream);
    std::vector<uint8_t> nibbles(static_cast<size_t>(m.shape.rows * m.shape.k / 2));
    std::vector<float> scales(static_cast<size_t>(m.shape.rows * m.shape.num_groups()));
    std::vector<uint8_t> host(static_cast<size_t>(m.shape.packed_bytes())), device(host.size());
    BENCH_CHECK(cudaMemcpy(nibbles.data(), w.nibbles, nibbles.size(), cudaMemcpyDeviceToHost));
    BENCH_CHECK(cudaMemcpy(scales.data(), w.scales, scales.size() * 4, cudaMemcpyDeviceToHost));
    BENCH_CHECK(cudaMemcpy(device.data(), w.packed[0], device.size(), cudaMemcpyDeviceToHost));
    cuda_layout::pack(m.shape, interleave, nibbles.data(), scales.data(), host.data());
    failures += host != device;
    free_weights(w);
  }
  std::printf("device pack equals host pack: %s\n", failures ? "NO" : "yes");
  return failures;
}

struct Sizes {
  int sms;
  void* workspace;
};

int check(const Options& o, const Matrix& m, const Weights& w, int tokens, const Sizes& sizes,
          int tactic, cudaStream_t stream) {
  const Shape& s = m.shape;
  const int64_t columns = m.epilogue == Epilogue::kSiluMul ? s.rows / 2 : s.rows;
  auto* x = device_alloc<__nv_bfloat16>(static_cast<size_t>(tokens * s.k));
  auto* residual = device_alloc<__nv_bfloat16>(static_cast<size_t>(tokens * columns));
  auto* out_scale = device_alloc<float>(static_cast<size_t>(columns));
  const size_t canary = 1024;
  const size_t out_count = static_cast<size_t>(tokens * columns);
  auto* out = device_alloc<__nv_bfloat16>(out_count + canary);
  auto* y = device_alloc<double>(static_cast<size_t>(tokens * s.rows));
  auto* acc = device_alloc<double>(3);
  fill_normal<<<256, 256, 0, stream>>>(x, static_cast<size_t>(tokens * s.k), static_cast<int>(s.k),
                                       1.0f, 1000 + tokens);
  fill_normal<<<256, 256, 0, stream>>>(residual, out_count, static_cast<int>(columns), 1.0f, 17);
  fill_uniform<<<256, 256, 0, stream>>>(out_scale, static_cast<size_t>(columns), 0.5f, 2.0f, 18);
  BENCH_CHECK(cudaMemsetAsync(out, 0xff, (out_count + canary) * 2, stream));  // NaN
  cuda::TensorMap map;
  cuda::LinearArgs args{.weights = w.packed[0],
                        .rows = s.rows,
                        .k = s.k,
                        .tokens = tokens,
                        .x = x,
                        .x_stride = s.k,
                        .x_map = &map,
                        .out = out,
                        .residual = residual,
                        .out_scale = out_scale,
                        .epilogue = m.epilogue,
                        .largest_scale = w.largest_scale,
                        .workspace = sizes.workspace,
                        .num_sms = sizes.sms,
                        .dependent = false,
                        .in_order = o.in_order,
                        .tactic = tactic,
                        .early = o.early};
  BENCH_CHECK(
      cuda::make_tensor_map(&map, x, tokens, s.k, s.k * 2, cuda::linear_wgmma_box_rows(args)));
  uint8_t* quantized = nullptr;
  if (prepares(o)) {
    quantized = device_alloc<uint8_t>(prepared_bytes(o, tokens, s.k));
    args.x = quantized;
    BENCH_CHECK(prepare(o, x, s.k, tokens, s.k, quantized, false, stream));
  }
  BENCH_CHECK(run(o, args, stream));
  BENCH_CHECK(cudaStreamSynchronize(stream));
  std::vector<uint16_t> first(out_count + canary), again(out_count + canary);
  BENCH_CHECK(cudaMemcpy(first.data(), out, first.size() * 2, cudaMemcpyDeviceToHost));
  bool same = true;
  for (int repeat = 0; repeat < 3; ++repeat) {
    BENCH_CHECK(cudaMemsetAsync(out, 0xff, out_count * 2, stream));
    BENCH_CHECK(run(o, args, stream));
    BENCH_CHECK(cudaStreamSynchronize(stream));
    BENCH_CHECK(cudaMemcpy(again.data(), out, again.size() * 2, cudaMemcpyDeviceToHost));
    same = same && again == first;
  }
  bool alone = true;
  if (o.in_order && tokens > 2) {  // the last two by themselves, with the rule's kernel
    const int64_t skipped = tokens - 2;
    cuda::LinearArgs two = args;
    two.tokens = 2;
    two.tactic = -1;
    two.x = x + skipped * s.k;
    two.out = out + skipped * columns;
    two.residual = residual + skipped * columns;
    cuda::TensorMap two_map;
    BENCH_CHECK(
        cuda::make_tensor_map(&two_map, two.x, 2, s.k, s.k * 2, cuda::linear_wgmma_box_rows(two)));
    two.x_map = &two_map;
    if (quantized) {
      BENCH_CHECK(prepare(o, two.x, s.k, 2, s.k, quantized, false, stream));
      two.x = quantized;
    }
    BENCH_CHECK(cudaMemsetAsync(two.out, 0xff, static_cast<size_t>(2 * columns) * 2, stream));
    BENCH_CHECK(run(o, two, stream));
    BENCH_CHECK(cudaStreamSynchronize(stream));
    BENCH_CHECK(cudaMemcpy(again.data(), out, again.size() * 2, cudaMemcpyDeviceToHost));
    alone = again == first;
  }
  bool canaries = true;
  for (size_t i = out_count; i < first.size(); ++i) canaries = canaries && again[i] == 0xffff;
  auto* expanded = device_alloc<float>(static_cast<size_t>(tokens * s.k));
  const int64_t pairs = tokens * s.num_groups();
  expand_kernel<<<static_cast<unsigned>((pairs + 255) / 256), 256, 0, stream>>>(
      x, s.k, s.num_groups(), pairs, o.kernel == "fp8",
      tokens <= cuda::kFp8GroupedTokens && !o.in_order, expanded);
  reference_kernel<<<static_cast<unsigned>((s.rows * 32 + 255) / 256), 256, 0, stream>>>(
      s, w.nibbles, w.scales, expanded, tokens, y);
  double host[3] = {}, slack = 1e300;
  for (int pass = 0; pass < 2; ++pass) {  // the first finds the root mean square
    BENCH_CHECK(cudaMemsetAsync(acc, 0, 24, stream));
    compare_kernel<<<256, 256, 0, stream>>>(m.epilogue, y, residual, out_scale, out, tokens, s.rows,
                                            slack, acc);
    BENCH_CHECK(cudaMemcpyAsync(host, acc, 24, cudaMemcpyDeviceToHost, stream));
    BENCH_CHECK(cudaStreamSynchronize(stream));
    slack = 0.05 * std::sqrt(host[1] / static_cast<double>(out_count));
  }
  const double relative = std::sqrt(host[0] / host[1]);
  const bool ok = relative < 4e-3 && host[2] == 0 && same && canaries && alone;
  std::printf(
      "check %-8s %6lld x %5lld M=%-4d tactic %2d: error %.2e, wild %.0f, repeatable %s, "
      "canaries %s%s  %s\n",
      m.name, static_cast<long long>(s.rows), static_cast<long long>(s.k), tokens,
      tactic_of(o, args), relative, host[2], same ? "yes" : "NO", canaries ? "yes" : "NO",
      !o.in_order ? ""
      : alone     ? ", as two alone yes"
                  : ", as two alone NO",
      ok ? "ok" : "FAILED");
  for (void* p :
       {static_cast<void*>(x), static_cast<void*>(residual), static_cast<void*>(out_scale),
        static_cast<void*>(out), static_cast<void*>(y), static_cast<void*>(acc),
        static_cast<void*>(expanded), static_cast<void*>(quantized)}) {
    BENCH_CHECK(cudaFree(p));
  }
  return !ok;
}

// Where one call's time goes, from the clock stamps of a -DNIBBLE_TRACE build: six dependent calls
// are launched, the fourth and fifth are read. SM clocks, means over the CTAs (and the extremes).
void trace(const Options& o, cuda::LinearArgs args, const Weights& w, const Sizes& sizes,
           cudaStream_t stream) {
  constexpr int kCalls = 6;
  const size_t per_call = static_cast<size_t>(sizes.sms) * 8;
  auto* stamps = device_alloc<long long>(per_call * kCalls);
  BENCH_CHECK(cudaMemsetAsync(stamps, 0, per_call * kCalls * 8, stream));
  time_graph(
      stream, kCalls,
      [&] {
        for (int c = 0; c < kCalls; ++c) {
          args.trace = stamps + per_call * c;
          read_weights(args, w, c);
          BENCH_CHECK(run(o, args, stream));
        }
      },
      3);
  std::vector<long long> host(per_call * kCalls);
  BENCH_CHECK(cudaMemcpy(host.data(), stamps, host.size() * 8, cudaMemcpyDeviceToHost));
  BENCH_CHECK(cudaFree(stamps));
  const char* names[7] = {"start",
                          "ring requested",
                          "dependency met",
                          "first x there",
                          "last main loop done",
                          "added in CTA",
                          "end"};
  const long long* now = &host[per_call * 4];
  const long long* before = &host[per_call * 3];
  for (int i = 1; i < 7; ++i) {
    double sum = 0, low = 1e18, high = 0;
    int n = 0;
    for (int cta = 0; cta < sizes.sms; ++cta) {
      if (!now[cta * 8 + 6]) continue;
      const double d = static_cast<double>(now[cta * 8 + i] - now[cta * 8 + (i < 3 ? 0 : 2)]);
      sum += d, ++n, low = std::min(low, d), high = std::max(high, d);
    }
    std::printf("    %-20s after %-14s mean %7.0f  min %7.0f  max %7.0f clocks\n", names[i],
                i < 3 ? "start" : "dependency met", sum / n, low, high);
  }
  double gap = 0, period = 0, hidden = 0;
  int n = 0;
  for (int a = 0; a < sizes.sms; ++a) {
    for (int b = 0; b < sizes.sms; ++b) {
      if (now[a * 8 + 6] && before[b * 8 + 6] && now[a * 8 + 7] == before[b * 8 + 7]) {
        gap += static_cast<double>(now[a * 8] - before[b * 8 + 6]);
        period += static_cast<double>(now[a * 8 + 2] - before[b * 8 + 2]);
        hidden += static_cast<double>(now[a * 8 + 2] - before[b * 8 + 6]);
        ++n;
      }
    }
  }
  if (n) {
    std::printf(
        "    same SM (%d): predecessor's end to start %.0f, to dependency met %.0f; period "
        "%.0f clocks\n",
        n, gap / n, hidden / n, period / n);
  }
}

}  // namespace

int bench_linear(cudaStream_t stream, const Limits& limits, int argc, char** argv) {
  Options o;
  for (int i = 0; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--m" && i + 1 < argc) {
      o.tokens = parse_list(argv[++i]);
    } else if (flag == "--kernel" && i + 1 < argc) {
      o.kernel = argv[++i];
    } else if (flag == "--tactic" && i + 1 < argc) {
      o.tactics = parse_list(argv[++i]);
    } else if (flag == "--no-check") {
      o.check = false;
    } else if (flag == "--no-shapes") {
      o.shapes = false;
    } else if (flag == "--early" && i + 1 < argc) {
      o.early = std::atoi(argv[++i]);
    } else if (flag == "--odd-only") {
      o.odd_only = true;
    } else if (flag == "--trace") {
      o.trace = true;
    } else if (flag == "--cached") {
      o.cached = true;
      o.check = false;
    } else if (flag == "--matrix" && i + 1 < argc) {
      o.matrix = argv[++i];
      o.layer = false;
    } else if (flag == "--replays" && i + 1 < argc) {
      o.replays = std::max(1, std::atoi(argv[++i]));
    } else if (flag == "--plain-scales") {
      o.plain_scales = true;
    } else if (flag == "--in-order") {
      o.in_order = true;
    } else if (flag == "--no-layer") {
      o.layer = false;
    } else {
      std::fprintf(stderr, "linear: unknown flag \"%s\"\n", argv[i]);
      return 1;
    }
  }
  Sizes sizes{};
  BENCH_CHECK(cudaDeviceGetAttribute(&sizes.sms, cudaDevAttrMultiProcessorCount, 0));
  const size_t workspace_bytes = o.kernel == "portable"
                                     ? cuda::portable_linear_workspace_bytes(sizes.sms)
                                     : cuda::linear_workspace_bytes(sizes.sms);
  sizes.workspace = device_alloc<uint8_t>(workspace_bytes);
  BENCH_CHECK(cudaMemset(sizes.workspace, 0xff, workspace_bytes));
  int failures = 0;
  const Matrix matrices[4] = {{"qkv", {6144, 5120}, Epilogue::kPlain},
                              {"o", {5120, 4096}, Epilogue::kResidual},
                              {"gate_up", {65536, 5120}, Epilogue::kSiluMul},
                              {"down", {5120, 32768}, Epilogue::kResidual}};
  if (!o.matrix.empty() &&
      std::ranges::none_of(matrices, [&](const Matrix& m) { return o.matrix == m.name; })) {
    std::fprintf(stderr, "linear: --matrix \"%s\", wanted qkv, o, gate_up or down\n",
                 o.matrix.c_str());
    return 1;
  }
  if (o.check) {
    failures += check_pack(stream);
    const Matrix odd[] = {
        {"odd", {272, 320}, Epilogue::kPlain},      {"odd", {1040, 1152}, Epilogue::kResidual},
        {"odd", {2080, 192}, Epilogue::kSiluMul},   {"odd", {128, 128}, Epilogue::kPlain},
        {"odd", {1000, 1152}, Epilogue::kResidual}, {"odd", {2032, 960}, Epilogue::kSiluMul}};
    for (const Matrix& m : odd) {
      Weights w = make_weights(m, 1, true, 3, stream);
      for (int tokens : o.tokens)
        for (int tactic : o.tactics) failures += check(o, m, w, tokens, sizes, tactic, stream);
      free_weights(w);
    }
  }
  if (o.odd_only) return failures;
  constexpr int kLayers = 6;
  Weights weights[4];
  const auto left_out = [&](int i) { return !o.matrix.empty() && o.matrix != matrices[i].name; };
  for (int i = 0; i < 4; ++i) {
    if (left_out(i)) continue;
    weights[i] = o.cached
                     ? make_cached_weights(matrices[i], kLayers, stream)
                     : make_weights(matrices[i], kLayers, true, 100 * i, stream, o.plain_scales);
    if (o.check) {
      for (int tokens : o.tokens) {
        if (tokens > 512 && i >= 2) continue;  // the float64 reference would take minutes
        for (int tactic : o.tactics) {
          failures += check(o, matrices[i], weights[i], tokens, sizes, tactic, stream);
        }
      }
    }
  }
  const int max_tokens = *std::max_element(o.tokens.begin(), o.tokens.end());
  auto* x = device_alloc<__nv_bfloat16>(static_cast<size_t>(max_tokens) * 32768);
  auto* h = device_alloc<__nv_bfloat16>(static_cast<size_t>(max_tokens) * 5120);
  auto* qkv = device_alloc<__nv_bfloat16>(static_cast<size_t>(max_tokens) * 6144);
  auto* act = device_alloc<__nv_bfloat16>(static_cast<size_t>(max_tokens) * 32768);
  auto* out = device_alloc<__nv_bfloat16>(static_cast<size_t>(max_tokens) * 32768);
  fill_normal<<<1056, 256, 0, stream>>>(x, static_cast<size_t>(max_tokens) * 32768, 5120, 1.0f, 1);
  const bool rounds = prepares(o);
  const WgmmaKind kind = o.kernel == "fp8" ? WgmmaKind::kE4m3 : WgmmaKind::kBf16;
  wgmma_tflops(kind, stream);
  auto* quantized = device_alloc<uint8_t>(rounds ? prepared_bytes(o, max_tokens, 32768) : 1);
  // What a linear rounds for the next, and what goes with a norm.
  auto* rounded =
      device_alloc<uint8_t>(rounds ? prepared_bytes(o, std::min(max_tokens, 64), 32768) : 1);
  auto* norm_weight = device_alloc<float>(5120);
  auto* squares = device_alloc<float>(size_t{64} * 5120 / cuda::kNormTileRows);
  fill_uniform<<<16, 256, 0, stream>>>(norm_weight, 5120, 0.5f, 2.0f, 19);
  auto quantize = [&](const void* from, int64_t stride, int tokens, int64_t k, bool dependent) {
    BENCH_CHECK(prepare(o, from, stride, tokens, k, quantized, dependent, stream));
  };
  auto rates = [&](double bytes, double flops, double us) {
    print_gbps(bytes, us, limits);
    print_tflops(flops, us, kind, stream);
  };
  for (int tokens : o.tokens)
    for (int tactic : o.tactics) {
      cuda::LinearArgs args{.tokens = tokens,
                            .workspace = sizes.workspace,
                            .num_sms = sizes.sms,
                            .dependent = true,
                            .in_order = o.in_order,
                            .tactic = tactic,
                            .early = o.early};
      double sum_us = 0, bytes = 0, flops = 0;
      if (o.shapes)
        for (int i = 0; i < 4; ++i) {
          if (left_out(i)) continue;
          const Shape& s = matrices[i].shape;
          cuda::TensorMap map;
          args.rows = s.rows, args.k = s.k, args.x = x, args.x_stride = s.k, args.x_map = &map;
          BENCH_CHECK(cuda::make_tensor_map(&map, x, tokens, s.k, s.k * 2,
                                            cuda::linear_wgmma_box_rows(args)));
          args.out = out;
          args.residual = h, args.epilogue = matrices[i].epilogue;
          if (rounds) {
            const Timing q = time_graph(stream, 8, [&] {
              for (int c = 0; c < 8; ++c) quantize(x, s.k, tokens, s.k, c > 0);
            });
            std::printf("M=%-4d %s %-8s %8.2f us", tokens,
                        o.kernel == "digits" ? "split_digits" : "quantize_x", matrices[i].name,
                        q.median_us);
            print_gbps(2.0 * tokens * static_cast<double>(s.k) +
                           static_cast<double>(prepared_bytes(o, tokens, s.k)),
                       q.median_us, limits);
            std::printf("\n");
            args.x = quantized;
          }
          const int calls = (tokens > 512 ? 1 : 4) * kLayers;
          const auto all = [&] {
            for (int c = 0; c < calls; ++c) {
              read_weights(args, weights[i], c);
              BENCH_CHECK(run(o, args, stream));
            }
          };
          const Timing t = time_graph(stream, calls, all, o.replays > 0 ? o.replays : 21);
          const double b = static_cast<double>(s.packed_bytes());
          const double f = 2.0 * tokens * static_cast<double>(s.rows) * static_cast<double>(s.k);
          std::printf("M=%-4d tactic %3d %-8s %8.2f us", tokens, tactic_of(o, args),
                      matrices[i].name, t.median_us);
          rates(b, f, t.median_us);
          std::printf("\n");
          sum_us += t.median_us, bytes += b, flops += f;
          if (o.trace) trace(o, args, weights[i], sizes, stream);
        }
      if (o.shapes) {
        std::printf("M=%-4d tactic %3d sum      %8.2f us", tokens, tactic, sum_us);
        rates(bytes, flops, sum_us);
        std::printf("\n");
      }
      if (!o.layer) continue;
      // The chain of a layer: h -> qkv -> (its q columns as o's input) -> +h -> gate_up -> down +
      // h.
      bytes = flops = 0;
      for (const Matrix& m : matrices) {
        bytes += static_cast<double>(m.shape.packed_bytes());
        flops += 2.0 * tokens * static_cast<double>(m.shape.rows) * static_cast<double>(m.shape.k);
      }
      const void* inputs[4] = {h, qkv, h, act};
      const int64_t strides[4] = {5120, 6144, 5120, 32768};
      cuda::TensorMap maps[4];
      for (int i = 0; i < 4; ++i) {
        args.rows = matrices[i].shape.rows, args.k = matrices[i].shape.k;
        BENCH_CHECK(cuda::make_tensor_map(&maps[i], inputs[i], tokens, args.k, strides[i] * 2,
                                          cuda::linear_wgmma_box_rows(args)));
      }
      void* outputs[4] = {qkv, h, act, h};
      const Timing t = time_graph(
          stream, kLayers,
          [&] {
            fill_normal<<<256, 256, 0, stream>>>(h, static_cast<size_t>(tokens) * 5120, 5120, 1.0f,
                                                 7);
            for (int layer = 0; layer < kLayers; ++layer) {
              for (int i = 0; i < 4; ++i) {
                args.rows = matrices[i].shape.rows, args.k = matrices[i].shape.k;
                args.x = inputs[i], args.x_stride = strides[i], args.x_map = &maps[i],
                args.out = outputs[i], args.residual = h;
                args.epilogue = matrices[i].epilogue;
                read_weights(args, weights[i], layer);
                args.dependent = layer + i > 0;
                const bool fused =
                    rounds && !o.in_order && tactic < 0 && tokens <= cuda::kFp8GroupedTokens;
                if (rounds && (!fused || i == 1 || layer + i == 0)) {
                  quantize(args.x, args.x_stride, tokens, args.k, args.dependent);
                  args.x = quantized, args.dependent = true;
                }
                if (fused) {  // qkv and gate_up read what down and o left in `rounded`
                  const bool reads = (i == 0 && layer > 0) || i == 2;
                  if (reads) args.x = rounded;
                  if (i == 3) args.x = quantized;
                  args.squares = reads ? squares : nullptr, args.eps = 1e-5f;
                  args.next = i % 2 ? rounded : nullptr, args.next_weight = norm_weight;
                  args.next_squares = squares;
                  args.rounded = i == 2 ? quantized : nullptr;
                }
                BENCH_CHECK(run(o, args, stream));
              }
            }
          },
          o.replays > 0 ? o.replays : 41);
      std::printf("M=%-4d tactic %3d layer    %8.2f us", tokens, tactic, t.median_us);
      rates(bytes, flops, t.median_us);
      std::printf("  [best %.2f, worst %.2f]\n", t.best_us, t.worst_us);
    }
  for (auto& w : weights) free_weights(w);
  for (auto* p : {x, h, qkv, act, out}) BENCH_CHECK(cudaFree(p));
  for (auto* p : {quantized, rounded}) BENCH_CHECK(cudaFree(p));
  for (auto* p : {norm_weight, squares}) BENCH_CHECK(cudaFree(p));
  BENCH_CHECK(cudaFree(sizes.workspace));
  return failures;
}

}  // namespace nibble::bench
