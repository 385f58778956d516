// Decode attention: correctness against float64 over ragged lengths, then time.
//   attention [--tactic N] [--no-check] [--sequences 64 [--tokens 5600] [--shortest 500]]
// Pages lie in random order; unused token slots of a last page hold NaN scales. Time: graph of 8
// dependent calls over two layers' pages, median of 21. Bytes counted: 260 per token and KV head.
// SPDX-License-Identifier: Apache-2.0
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <random>
#include <string>

#include "backends/cuda/attention_split.h"
#include "backends/cuda/generic.h"
#include "backends/cuda/kernels.h"
#include "backends/cuda/kv_layout.h"
#include "common.cuh"
#include "ops/operands.h"

namespace nibble::bench {
namespace {

using namespace kv_layout;
constexpr int kKvHeads = 8, kHeads = 32;

// One warp per (page, head, token, K|V): quantizes random normals into the page.
__global__ void fill_pages(uint8_t* pages, int64_t num_pages, uint64_t seed) {
  const int64_t total = num_pages * kKvHeads * kPageTokens * 2;
  const int lane = threadIdx.x % 32;
  for (int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32; i < total;
       i += int64_t{gridDim.x} * blockDim.x / 32) {
    const int is_v = static_cast<int>(i & 1), token = static_cast<int>(i / 2 % kPageTokens);
    const int64_t pair = i / 2 / kPageTokens;
    float v[4], peak = 0;
    for (int j = 0; j < 4; ++j) {
      v[j] = normal(seed * 0x1000000007ull + static_cast<uint64_t>(i) * 128 + lane * 4 + j);
      if (!is_v && lane == 3) v[j] *= 6;  // outlier channels of K
      peak = fmaxf(peak, fabsf(v[j]));
    }
    for (int offset = 16; offset; offset /= 2) {
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, offset));
    }
    const __half scale = __float2half(peak / 127.0f);
    uint8_t* to = pages + pair * kPairBytes;
    for (int j = 0; j < 4; ++j) {
      const float q = fminf(fmaxf(rintf(v[j] / __half2float(scale)), -127.0f), 127.0f);
      to[is_v ? v_byte(token, lane * 4 + j) : k_byte(token, lane * 4 + j)] =
          static_cast<uint8_t>(static_cast<int>(q) + 128);
    }
    if (lane == 0) {
      *reinterpret_cast<__half*>(to + (is_v ? v_scale_byte(token) : k_scale_byte(token))) = scale;
    }
  }
}

__global__ void poison_tails(uint8_t* pages, const int* table, int stride, const int* lengths) {
  const int s = blockIdx.x, head = blockIdx.y, length = lengths[s];
  if (length % kPageTokens == 0) return;
  uint8_t* pair = pages + pair_offset(table[s * stride + length / kPageTokens], kKvHeads, head);
  for (int token = length % kPageTokens + static_cast<int>(threadIdx.x); token < kPageTokens;
       token += static_cast<int>(blockDim.x)) {
    *reinterpret_cast<uint16_t*>(pair + k_scale_byte(token)) = 0xffff;
    *reinterpret_cast<uint16_t*>(pair + v_scale_byte(token)) = 0xffff;
  }
}

// One block per (sequence, head); float64; acc as in linear.cu.
__global__ void reference(const __nv_bfloat16* q, int64_t q_stride, const uint8_t* pages,
                          const int* table, int stride, const int* lengths, double scale,
                          const __nv_bfloat16* out, double* scores, int max_length, double* acc) {
  const int s = blockIdx.x, h = blockIdx.y, length = lengths[s];
  double* score = scores + (static_cast<int64_t>(s) * kHeads + h) * max_length;
  __shared__ double shared[256];
  double peak = -1e300;
  for (int i = threadIdx.x; i < length; i += blockDim.x) {
    const uint8_t* pair = pages + pair_offset(table[s * stride + i / kPageTokens], kKvHeads, h / 4);
    double dot = 0;
    for (int d = 0; d < kHeadDim; ++d) {
      dot += static_cast<double>(__bfloat162float(q[s * q_stride + h * kHeadDim + d])) *
             (pair[k_byte(i % kPageTokens, d)] - 128);
    }
    score[i] = dot * scale *
               static_cast<double>(__half2float(
                   *reinterpret_cast<const __half*>(pair + k_scale_byte(i % kPageTokens))));
    peak = fmax(peak, score[i]);
  }
  shared[threadIdx.x] = peak;
  __syncthreads();
  for (int i = 0; i < static_cast<int>(blockDim.x); ++i) peak = fmax(peak, shared[i]);
  if (threadIdx.x < kHeadDim) {
    const int d = threadIdx.x;
    double sum = 0, o = 0;
    for (int i = 0; i < length; ++i) {
      const uint8_t* pair =
          pages + pair_offset(table[s * stride + i / kPageTokens], kKvHeads, h / 4);
      const double p = exp(score[i] - peak);
      sum += p;
      o += p * (pair[v_byte(i % kPageTokens, d)] - 128) *
           static_cast<double>(__half2float(
               *reinterpret_cast<const __half*>(pair + v_scale_byte(i % kPageTokens))));
    }
    const double want = o / sum;
    const double got = static_cast<double>(
        __bfloat162float(out[(static_cast<int64_t>(s) * kHeads + h) * kHeadDim + d]));
    atomicAdd(&acc[0], (got - want) * (got - want));
    atomicAdd(&acc[1], want * want);
    if (!(fabs(got - want) <= 0.02 * fabs(want) + 0.01)) atomicAdd(&acc[2], 1.0);
  }
}

struct Case {
  std::vector<int> lengths;
  int max_pages = 0, total_pages = 0;
  bool uneven;
  int *device_lengths, *starts, *table;
  __nv_bfloat16 *q, *out;
  size_t out_count;
};

Case make_case(const std::vector<int>& lengths, uint64_t seed, cudaStream_t stream) {
  Case c;
  c.lengths = lengths;
  std::vector<int> starts{0};
  for (int length : lengths) {
    const int pages = (length + kPageTokens - 1) / kPageTokens;
    starts.push_back(starts.back() + pages);
    c.max_pages = std::max(c.max_pages, pages);
  }
  c.total_pages = starts.back();
  c.uneven = is_uneven(c.total_pages, static_cast<int>(lengths.size()), c.max_pages);
  std::vector<int> order(static_cast<size_t>(c.total_pages));
  for (int i = 0; i < c.total_pages; ++i) order[static_cast<size_t>(i)] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(seed)));
  std::vector<int> table(lengths.size() * static_cast<size_t>(c.max_pages), 0);
  for (size_t s = 0; s < lengths.size(); ++s) {
    for (int i = starts[s]; i < starts[s + 1]; ++i) {
      table[s * static_cast<size_t>(c.max_pages) + static_cast<size_t>(i - starts[s])] =
          order[static_cast<size_t>(i)];
    }
  }
  c.device_lengths = device_alloc<int>(lengths.size());
  c.starts = device_alloc<int>(starts.size());
  c.table = device_alloc<int>(table.size());
  BENCH_CHECK(
      cudaMemcpy(c.device_lengths, lengths.data(), lengths.size() * 4, cudaMemcpyHostToDevice));
  BENCH_CHECK(cudaMemcpy(c.starts, starts.data(), starts.size() * 4, cudaMemcpyHostToDevice));
  BENCH_CHECK(cudaMemcpy(c.table, table.data(), table.size() * 4, cudaMemcpyHostToDevice));
  c.out_count = lengths.size() * kHeads * kHeadDim;
  c.q = device_alloc<__nv_bfloat16>(c.out_count);
  c.out = device_alloc<__nv_bfloat16>(c.out_count + 512);
  fill_normal<<<256, 256, 0, stream>>>(c.q, c.out_count, kHeadDim, 1.0f, seed);
  return c;
}
void free_case(Case& c) {
  for (void* p :
       {static_cast<void*>(c.device_lengths), static_cast<void*>(c.starts),
        static_cast<void*>(c.table), static_cast<void*>(c.q), static_cast<void*>(c.out)}) {
    BENCH_CHECK(cudaFree(p));
  }
}

cuda::DecodeAttentionArgs arguments(const Case& c, const uint8_t* pages, void* workspace, int sms,
                                    int tactic) {
  return {.q = c.q,
          .q_stride = kHeads * kHeadDim,
          .pages = pages,
          .page_table = c.table,
          .page_table_stride = c.max_pages,
          .lengths = c.device_lengths,
          .page_starts = c.starts,
          .out = c.out,
          .out_stride = kHeads * kHeadDim,
          .sequences = static_cast<int>(c.lengths.size()),
          .kv_heads = kKvHeads,
          .softmax_scale = 1.0f / std::sqrt(128.0f),
          .workspace = workspace,
          .num_sms = sms,
          .dependent = false,
          .tactic = tactic};
}

int check(const char* name, const std::vector<int>& lengths, void* workspace, int sms, int tactic,
          cudaStream_t stream) {
  Case c = make_case(lengths, 11 + lengths.size(), stream);
  auto* pages = device_alloc<uint8_t>(pair_offset(c.total_pages, kKvHeads, 0));
  fill_pages<<<1056, 256, 0, stream>>>(pages, c.total_pages, 5);
  poison_tails<<<dim3(static_cast<unsigned>(lengths.size()), kKvHeads), 64, 0, stream>>>(
      pages, c.table, c.max_pages, c.device_lengths);
  auto args = arguments(c, pages, workspace, sms, tactic);
  std::vector<uint16_t> first(c.out_count + 512), again(first.size());
  bool same = true;
  for (int repeat = 0; repeat < 3; ++repeat) {
    BENCH_CHECK(cudaMemsetAsync(c.out, 0xff, first.size() * 2, stream));
    BENCH_CHECK(cuda::decode_attention(args, stream));
    BENCH_CHECK(cudaStreamSynchronize(stream));
    BENCH_CHECK(cudaMemcpy((repeat ? again : first).data(), c.out, first.size() * 2,
                           cudaMemcpyDeviceToHost));
    same = same && (repeat == 0 || again == first);
  }
  bool canaries = true;
  for (size_t i = c.out_count; i < first.size(); ++i) canaries = canaries && first[i] == 0xffff;
  const int max_length = *std::max_element(lengths.begin(), lengths.end());
  auto* scores = device_alloc<double>(lengths.size() * kHeads * static_cast<size_t>(max_length));
  auto* acc = device_alloc<double>(3);
  BENCH_CHECK(cudaMemsetAsync(acc, 0, 24, stream));
  reference<<<dim3(static_cast<unsigned>(lengths.size()), kHeads), 256, 0, stream>>>(
      c.q, kHeads * kHeadDim, pages, c.table, c.max_pages, c.device_lengths,
      static_cast<double>(args.softmax_scale), c.out, scores, max_length, acc);
  double host[3];
  BENCH_CHECK(cudaMemcpyAsync(host, acc, 24, cudaMemcpyDeviceToHost, stream));
  BENCH_CHECK(cudaStreamSynchronize(stream));
  const double relative = std::sqrt(host[0] / host[1]);
  const bool ok = relative < 4e-3 && host[2] == 0 && same && canaries;
  std::printf(
      "check attention %-22s tactic %d: error %.2e, wild %.0f, repeatable %s, canaries %s  %s\n",
      name, tactic, relative, host[2], same ? "yes" : "NO", canaries ? "yes" : "NO",
      ok ? "ok" : "FAILED");
  BENCH_CHECK(cudaFree(scores));
  BENCH_CHECK(cudaFree(acc));
  BENCH_CHECK(cudaFree(pages));
  free_case(c);
  return !ok;
}

// A chunk of `count` tokens at the end of `length`: the reference sees one sequence per token.
int check_prefill(int count, int length, bool scaled, cudaStream_t stream) {
  Case c = make_case({length}, static_cast<uint64_t>(count + 7 * length), stream);
  auto* pages = device_alloc<uint8_t>(pair_offset(c.total_pages, kKvHeads, 0));
  fill_pages<<<1056, 256, 0, stream>>>(pages, c.total_pages, 5);
  poison_tails<<<dim3(1, kKvHeads), 64, 0, stream>>>(pages, c.table, c.max_pages, c.device_lengths);
  const size_t out_count = static_cast<size_t>(count) * kHeads * kHeadDim;
  auto* q = device_alloc<__nv_bfloat16>(out_count);
  auto* out = device_alloc<__nv_bfloat16>(out_count + 512);
  auto* workspace =
      device_alloc<uint8_t>(cuda::prefill_attention_workspace_bytes(length, kKvHeads));
  BENCH_CHECK(cudaMemsetAsync(workspace, 0xff,
                              cuda::prefill_attention_workspace_bytes(length, kKvHeads), stream));
  auto* ones = device_alloc<float>(kHeads * kHeadDim);
  fill_uniform<<<16, 256, 0, stream>>>(ones, kHeads * kHeadDim, 1.0f, 1.0f, 1);
  fill_normal<<<256, 256, 0, stream>>>(q, out_count, kHeadDim, 1.0f, 9);
  const cuda::PrefillAttentionArgs args{.q = q,
                                        .q_stride = kHeads * kHeadDim,
                                        .pages = pages,
                                        .page_table = c.table,
                                        .count = count,
                                        .length = length,
                                        .out = out,
                                        .out_stride = kHeads * kHeadDim,
                                        .out_scale = scaled ? ones : nullptr,
                                        .kv_heads = kKvHeads,
                                        .softmax_scale = 1.0f / std::sqrt(128.0f),
                                        .workspace = workspace,
                                        .dependent = false};
  std::vector<uint16_t> first(out_count + 512), again(first.size());
  bool same = true, canaries = true;
  for (int repeat = 0; repeat < 3; ++repeat) {
    BENCH_CHECK(cudaMemsetAsync(out, 0xff, first.size() * 2, stream));
    BENCH_CHECK(cuda::prefill_attention(args, stream));
    BENCH_CHECK(cudaStreamSynchronize(stream));
    BENCH_CHECK(
        cudaMemcpy((repeat ? again : first).data(), out, first.size() * 2, cudaMemcpyDeviceToHost));
    same = same && (repeat == 0 || again == first);
  }
  for (size_t i = out_count; i < first.size(); ++i) canaries = canaries && first[i] == 0xffff;
  std::vector<int> lengths;
  for (int i = 0; i < count; ++i) lengths.push_back(length - count + i + 1);
  auto* device_lengths = device_alloc<int>(lengths.size());
  BENCH_CHECK(
      cudaMemcpy(device_lengths, lengths.data(), lengths.size() * 4, cudaMemcpyHostToDevice));
  auto* scores =
      device_alloc<double>(static_cast<size_t>(count) * kHeads * static_cast<size_t>(length));
  auto* acc = device_alloc<double>(3);
  BENCH_CHECK(cudaMemsetAsync(acc, 0, 24, stream));
  reference<<<dim3(static_cast<unsigned>(count), kHeads), 256, 0, stream>>>(
      q, kHeads * kHeadDim, pages, c.table, 0, device_lengths,
      static_cast<double>(args.softmax_scale), out, scores, length, acc);
  double host[3];
  BENCH_CHECK(cudaMemcpyAsync(host, acc, 24, cudaMemcpyDeviceToHost, stream));
  BENCH_CHECK(cudaStreamSynchronize(stream));
  const double relative = std::sqrt(host[0] / host[1]);
  const bool ok = relative < 4e-3 && host[2] == 0 && same && canaries;
  std::printf("check prefill %4d of %4d: error %.2e, wild %.0f, repeatable %s, canaries %s  %s\n",
              count, length, relative, host[2], same ? "yes" : "NO", canaries ? "yes" : "NO",
              ok ? "ok" : "FAILED");
  for (void* pointer :
       {static_cast<void*>(pages), static_cast<void*>(q), static_cast<void*>(out),
        static_cast<void*>(workspace), static_cast<void*>(ones), static_cast<void*>(device_lengths),
        static_cast<void*>(scores), static_cast<void*>(acc)}) {
    BENCH_CHECK(cudaFree(pointer));
  }
  free_case(c);
  return !ok;
}

}  // namespace

// The same sizes through attention_step.cu, RoPE and append included.
void bench_step(const Case& c, int batch, int length, const std::string& what,
                const std::vector<uint8_t*>& pages, int sms, int split, cudaStream_t stream,
                const Limits& limits) {
  const int64_t stride = int64_t{6} * kKvHeads * kHeadDim;
  auto* qkv = device_alloc<__nv_bfloat16>(static_cast<size_t>(batch * stride));
  fill_normal<<<256, 256, 0, stream>>>(qkv, static_cast<size_t>(batch * stride), kHeadDim, 1.0f, 9);
  auto* angles = device_alloc<float>(static_cast<size_t>(length) * 128);
  BENCH_CHECK(cudaMemset(angles, 0, static_cast<size_t>(length) * 128 * sizeof(float)));
  const Timing t = time_graph(stream, 8, [&] {
    for (int i = 0; i < 8; ++i) {
      BENCH_CHECK(cuda::step_attention({.qkv = qkv,
                                        .qkv_stride = stride,
                                        .cos = angles,
                                        .sin = angles + int64_t{length} * 64,
                                        .pages = pages[static_cast<size_t>(i) % pages.size()],
                                        .page_table = c.table,
                                        .page_table_stride = c.max_pages,
                                        .lengths = c.device_lengths,
                                        .out = c.out,
                                        .out_stride = int64_t{kHeads} * kHeadDim,
                                        .sequences = batch,
                                        .kv_heads = kKvHeads,
                                        .k_scale = 0,
                                        .v_scale = 0,
                                        .softmax_scale = 1.0f / std::sqrt(128.0f),
                                        .out_scale = nullptr,
                                        .rounded = nullptr,
                                        .uneven = c.uneven,
                                        .split = split,
                                        .num_sms = sms,
                                        .dependent = i > 0},
                                       stream));
    }
  });
  const double bytes = 260.0 * kKvHeads * std::accumulate(c.lengths.begin(), c.lengths.end(), 0.0);
  std::printf(
      "decode step      %2d x %s tokens, split %d:  %8.2f us  %6.0f GB/s (%4.1f %% of read)\n",
      batch, what.c_str(),
      split ? split : cuda::step_attention_split(batch, kKvHeads, c.max_pages, c.uneven, sms),
      t.median_us, bytes / t.median_us * 1e-3, bytes / t.median_us * 0.1 / limits.read_gbps);
  BENCH_CHECK(cudaFree(qkv));
  BENCH_CHECK(cudaFree(angles));
}

// The same sizes through portable/attention.cu: the last `count` tokens of every sequence, q and
// out [sequences * count, heads, 128]. What cuda_op_tests checks.
Timing time_portable(const Case& c, int count, const void* q, void* out,
                     const std::vector<uint8_t*>& pages, int sms, cudaStream_t stream) {
  const int sequences = static_cast<int>(c.lengths.size());
  std::vector<int> positions, starts{0};
  for (const int length : c.lengths) {
    for (int i = length - count; i < length; ++i) positions.push_back(i);
    starts.push_back(static_cast<int>(positions.size()));
  }
  auto* device_positions = device_alloc<int>(positions.size());
  auto* device_starts = device_alloc<int>(starts.size());
  BENCH_CHECK(
      cudaMemcpy(device_positions, positions.data(), positions.size() * 4, cudaMemcpyHostToDevice));
  BENCH_CHECK(cudaMemcpy(device_starts, starts.data(), starts.size() * 4, cudaMemcpyHostToDevice));
  const size_t workspace_bytes = cuda::portable_attention_workspace_bytes(sms);
  auto* workspace = device_alloc<uint8_t>(workspace_bytes);
  BENCH_CHECK(cudaMemset(workspace, 0xff, workspace_bytes));
  const bool split =
      count == 1 && cuda::portable_attention_splits(kHeads, kKvHeads, sequences, c.max_pages, sms);
  const int queries = cuda::portable_attention_queries(kHeads, kKvHeads);
  const Timing t = time_graph(stream, 8, [&] {
    for (int i = 0; i < 8; ++i) {
      BENCH_CHECK(cuda::portable_attention({.q = q,
                                            .q_stride = kHeads * kHeadDim,
                                            .pages = pages[static_cast<size_t>(i) % pages.size()],
                                            .positions = device_positions,
                                            .seq_starts = device_starts,
                                            .kv_lens = c.device_lengths,
                                            .page_table = c.table,
                                            .out_scale = nullptr,
                                            .out = out,
                                            .format = cuda::PageFormat::kInt8,
                                            .tokens = static_cast<int>(positions.size()),
                                            .sequences = sequences,
                                            .page_table_stride = c.max_pages,
                                            .heads = kHeads,
                                            .kv_heads = kKvHeads,
                                            .tiles = sequences * ((count + queries - 1) / queries)},
                                           split ? workspace : nullptr, sms, stream));
    }
  });
  BENCH_CHECK(cudaFree(device_positions));
  BENCH_CHECK(cudaFree(device_starts));
  BENCH_CHECK(cudaFree(workspace));
  return t;
}

int bench_attention(cudaStream_t stream, const Limits& limits, int argc, char** argv) {
  int tactic = 0, sequences = 0, tokens = 0, shortest = 0, split = 0;
  bool checks = true, small_only = false;
  for (int i = 0; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--tactic" && i + 1 < argc) {
      tactic = std::atoi(argv[++i]);
    } else if (flag == "--sequences" && i + 1 < argc) {
      sequences = std::atoi(argv[++i]);
    } else if (flag == "--tokens" && i + 1 < argc) {
      tokens = std::atoi(argv[++i]);
    } else if (flag == "--shortest" && i + 1 < argc) {
      shortest = std::atoi(argv[++i]);  // lengths from there to --tokens, evenly
    } else if (flag == "--split" && i + 1 < argc) {
      split = std::atoi(argv[++i]);  // only attention_step.cu, so
    } else if (flag == "--no-check") {
      checks = false;
    } else if (flag == "--odd-only") {
      small_only = true;
    } else {
      std::fprintf(stderr, "attention: unknown flag \"%s\"\n", argv[i]);
      return 1;
    }
  }
  if ((tokens || shortest) && !sequences) {
    std::fprintf(stderr,
                 "attention: --tokens and --shortest say how long --sequences N are; add it\n");
    return 1;
  }
  if (!tokens) tokens = 5600;
  if (shortest > tokens) {
    std::fprintf(stderr, "attention: --shortest %d must be at most --tokens %d\n", shortest,
                 tokens);
    return 1;
  }
  int sms;
  BENCH_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  const size_t workspace_bytes = cuda::decode_attention_workspace_bytes(sms);
  auto* workspace = device_alloc<uint8_t>(workspace_bytes);
  BENCH_CHECK(cudaMemset(workspace, 0xff, workspace_bytes));
  int failures = 0;
  if (checks) {
    failures += check("1 x 1", {1}, workspace, sms, tactic, stream);
    failures += check("1 x 65", {65}, workspace, sms, tactic, stream);
    failures += check("ragged 1..1000", {1, 63, 64, 65, 5, 130, 1000, 7, 128, 333}, workspace, sms,
                      tactic, stream);
    if (!small_only) {
      failures += check("1 x 5600", {5600}, workspace, sms, tactic, stream);
      std::vector<int> mixed;
      std::mt19937 rng(3);
      for (int i = 0; i < 64; ++i) mixed.push_back(1 + static_cast<int>(rng() % 6000));
      failures += check("64 x 1..6000", mixed, workspace, sms, tactic, stream);
    }
  }
  if (small_only) return failures;
  struct Size {
    int batch, shortest, longest;
  };
  std::vector<Size> sizes;
  for (const auto& [batch, length] : std::initializer_list<std::pair<int, int>>{{64, 5600},
                                                                                {57, 5600},
                                                                                {40, 5600},
                                                                                {32, 5600},
                                                                                {20, 5600},
                                                                                {16, 5600},
                                                                                {64, 1024},
                                                                                {8, 2048},
                                                                                {1, 5600},
                                                                                {1, 512}}) {
    sizes.push_back({batch, length, length});
  }
  sizes.push_back({64, 500, 5600});
  sizes.push_back({40, 500, 5600});
  if (sequences) sizes = {{sequences, shortest ? shortest : tokens, tokens}};
  for (const auto& [batch, first, length] : sizes) {
    std::vector<int> lengths;
    for (int i = 0; i < batch; ++i) {
      lengths.push_back(first +
                        static_cast<int>(int64_t{length - first} * i / std::max(batch - 1, 1)));
    }
    std::shuffle(lengths.begin(), lengths.end(), std::mt19937(2));
    const std::string what = first == length
                                 ? std::to_string(length)
                                 : std::to_string(first) + ".." + std::to_string(length);
    Case c = make_case(lengths, 7, stream);
    const size_t layer_bytes = pair_offset(c.total_pages, kKvHeads, 0);
    const int layers = layer_bytes > (size_t{256} << 20) ? 2 : 8;
    std::vector<uint8_t*> pages;
    for (int i = 0; i < layers; ++i) {
      pages.push_back(device_alloc<uint8_t>(layer_bytes));
      fill_pages<<<1056, 256, 0, stream>>>(pages.back(), c.total_pages, static_cast<uint64_t>(i));
    }
    const double bytes = 260.0 * kKvHeads * std::accumulate(lengths.begin(), lengths.end(), 0.0);
    if (!split) {
      const Timing t = time_graph(stream, 8, [&] {
        for (int i = 0; i < 8; ++i) {
          auto args = arguments(c, pages[static_cast<size_t>(i % layers)], workspace, sms, tactic);
          args.dependent = i > 0;
          BENCH_CHECK(cuda::decode_attention(args, stream));
        }
      });
      std::printf(
          "decode attention %2d x %s tokens, tactic %d: %8.2f us  %6.0f GB/s (%4.1f %% of read)\n",
          batch, what.c_str(), tactic, t.median_us, bytes / t.median_us * 1e-3,
          bytes / t.median_us * 0.1 / limits.read_gbps);
    }
    bench_step(c, batch, length, what, pages, sms, split, stream, limits);
    if (!split) {
      const Timing portable = time_portable(c, 1, c.q, c.out, pages, sms, stream);
      std::printf(
          "decode portable  %2d x %s tokens:           %8.2f us  %6.0f GB/s (%4.1f %% of read)\n",
          batch, what.c_str(), portable.median_us, bytes / portable.median_us * 1e-3,
          bytes / portable.median_us * 0.1 / limits.read_gbps);
    }
    for (auto* p : pages) BENCH_CHECK(cudaFree(p));
    free_case(c);
  }
  BENCH_CHECK(cudaFree(workspace));
  return failures;
}

// prefill [--odd-only]: checks, then whole prompts and a chunk behind a cached prefix.
int bench_prefill(cudaStream_t stream, int argc, char** argv) {
  int failures = 0, sms;
  BENCH_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  for (const auto& [count, length] : std::vector<std::pair<int, int>>{
           {1, 1}, {5, 5}, {64, 64}, {128, 128}, {200, 200}, {100, 333}, {130, 700}, {257, 1000}}) {
    failures += check_prefill(count, length, count % 2 == 0, stream);
  }
  if (argc > 0 && std::string(argv[0]) == "--odd-only") return failures;
  wgmma_tflops(WgmmaKind::kF16, stream);
  for (const auto& [count, length] :
       std::vector<std::pair<int, int>>{{5525, 5525}, {2048, 5525}, {500, 5500}, {1024, 1024}}) {
    Case c = make_case({length}, 7, stream);
    const size_t out_count = static_cast<size_t>(count) * kHeads * kHeadDim;
    auto* q = device_alloc<__nv_bfloat16>(out_count);
    auto* out = device_alloc<__nv_bfloat16>(out_count);
    fill_normal<<<256, 256, 0, stream>>>(q, out_count, kHeadDim, 1.0f, 9);
    auto* workspace =
        device_alloc<uint8_t>(cuda::prefill_attention_workspace_bytes(length, kKvHeads));
    constexpr int kLayers = 4;
    uint8_t* pages[kLayers];
    for (int i = 0; i < kLayers; ++i) {
      pages[i] = device_alloc<uint8_t>(pair_offset(c.total_pages, kKvHeads, 0));
      fill_pages<<<1056, 256, 0, stream>>>(pages[i], c.total_pages, static_cast<uint64_t>(i));
    }
    const Timing t = time_graph(stream, kLayers, [&] {
      for (int i = 0; i < kLayers; ++i) {
        BENCH_CHECK(cuda::prefill_attention({.q = q,
                                             .q_stride = kHeads * kHeadDim,
                                             .pages = pages[i],
                                             .page_table = c.table,
                                             .count = count,
                                             .length = length,
                                             .out = out,
                                             .out_stride = kHeads * kHeadDim,
                                             .out_scale = nullptr,
                                             .kv_heads = kKvHeads,
                                             .softmax_scale = 1.0f / std::sqrt(128.0f),
                                             .workspace = workspace,
                                             .dependent = false},
                                            stream));
      }
    });
    double pairs = 0;
    for (int i = 0; i < count; ++i) pairs += length - count + i + 1;
    const double flops = 4.0 * kHeadDim * kHeads * pairs;
    std::printf("prefill attention %4d of %4d tokens (pages expanded too): %8.2f us", count, length,
                t.median_us);
    print_tflops(flops, t.median_us, WgmmaKind::kF16, stream);
    std::printf("\n");
    const Timing portable = time_portable(c, count, q, out, {pages, pages + kLayers}, sms, stream);
    std::printf("prefill portable  %4d of %4d tokens:                      %8.2f us", count, length,
                portable.median_us);
    print_tflops(flops, portable.median_us, WgmmaKind::kF16, stream);
    std::printf("\n");
    for (auto* p : pages) BENCH_CHECK(cudaFree(p));
    BENCH_CHECK(cudaFree(q));
    BENCH_CHECK(cudaFree(out));
    BENCH_CHECK(cudaFree(workspace));
    free_case(c);
  }
  return failures;
}

}  // namespace nibble::bench
