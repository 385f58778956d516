// The ops between the linears, the logits and sampling: each against a double reference on the
// host, into poisoned outputs with canaries, then timed at the 24B shape: us, the bytes an op must
// move and, of linears, flops, against the limits of this run. (What is timed and not checked here,
// cuda_op_tests checks.)
//   ops [--odd-only]
// SPDX-License-Identifier: Apache-2.0
#include <cuda_fp16.h>

#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "backends/cuda/generic.h"
#include "backends/cuda/kernels.h"
#include "backends/cuda/kv_layout.h"
#include "backends/cuda/layout.h"
#include "backends/cuda/wgmma_tactic.h"
#include "common.cuh"
#include "ops/sample_rng.h"

namespace nibble::bench {
namespace {

template <typename T>
T* upload(const std::vector<T>& host) {
  T* device = device_alloc<T>(host.size());
  BENCH_CHECK(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  BENCH_CHECK(cudaDeviceSynchronize());  // the kernels' stream does not wait for this one
  return device;
}
template <typename T>
std::vector<T> fetch(const T* device, size_t count) {
  std::vector<T> host(count);
  BENCH_CHECK(cudaDeviceSynchronize());
  BENCH_CHECK(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}
float value(__nv_bfloat16 x) { return __bfloat162float(x); }
std::vector<__nv_bfloat16> random_bf16(size_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<__nv_bfloat16> v(count);
  for (auto& x : v) x = __float2bfloat16(normal(rng) * scale);
  return v;
}
std::vector<float> random_floats(size_t count, unsigned seed, float mean, float deviation) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> v(count);
  for (auto& x : v) x = normal(rng);
  return v;
}
int report(const char* what, const std::string& shape, bool ok) {
  std::printf("check %-10s %-40s %s\n", what, shape.c_str(), ok ? "ok" : "FAILED");
  return !ok;
}

int check_norm(int rows, int hidden, bool scaled, bool gathered, cudaStream_t stream) {
  const auto n = static_cast<size_t>(rows * hidden);
  const auto x = random_bf16(n, 1);
  const auto weight = random_floats(static_cast<size_t>(hidden), 2, 1.0f, 0.2f);
  const auto pre = random_floats(static_cast<size_t>(hidden), 3, 1.0f, 0.2f);
  std::vector<int> index(static_cast<size_t>(rows));
  for (int r = 0; r < rows; ++r) index[static_cast<size_t>(r)] = gathered ? rows - 1 - r : r;
  auto* y = device_alloc<__nv_bfloat16>(n + 64);
  BENCH_CHECK(cudaMemset(y, 0xff, (n + 64) * 2));
  BENCH_CHECK(cuda::rms_norm({.x = upload(x),
                              .weight = upload(weight),
                              .pre_scale = scaled ? upload(pre) : nullptr,
                              .row_index = gathered ? upload(index) : nullptr,
                              .y = y,
                              .eps = 1e-5f,
                              .rows = rows,
                              .hidden = hidden,
                              .copies = 1,
                              .dependent = false},
                             stream));
  const auto out = fetch(y, n + 64);
  bool ok = true;
  for (int r = 0; r < rows; ++r) {
    const auto* in = &x[static_cast<size_t>(index[static_cast<size_t>(r)] * hidden)];
    double sum = 0;
    for (int h = 0; h < hidden; ++h) sum += std::pow(static_cast<double>(value(in[h])), 2);
    const double inverse = 1 / std::sqrt(sum / hidden + 1e-5);
    for (int h = 0; h < hidden; ++h) {
      const auto i = static_cast<size_t>(h);
      const double want = value(in[h]) * inverse * weight[i] * (scaled ? pre[i] : 1.0f);
      const double got = value(out[static_cast<size_t>(r * hidden + h)]);
      ok = ok && std::fabs(got - want) <= 0.005 * std::fabs(want) + 1e-30;
    }
  }
  for (size_t i = n; i < n + 64; ++i) {
    uint16_t bits;
    std::memcpy(&bits, &out[i], 2);
    ok = ok && bits == 0xffff;
  }
  return report("rms_norm", std::to_string(rows) + " x " + std::to_string(hidden), ok);
}

int check_rope(const std::vector<std::pair<int, int>>& sequences, int kv_heads,
               cudaStream_t stream) {  // (new tokens, length with them)
  using namespace kv_layout;
  std::vector<int> positions, starts{0}, table;
  int max_pages = 0, pages = 0;
  for (const auto& [count, length] : sequences) {
    for (int i = length - count; i < length; ++i) positions.push_back(i);
    starts.push_back(static_cast<int>(positions.size()));
    max_pages = std::max(max_pages, (length + kPageTokens - 1) / kPageTokens);
  }
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int i = 0; i < max_pages; ++i) table.push_back(pages++);
  }
  std::mt19937 rng(4);
  std::shuffle(table.begin(), table.end(), rng);
  const int tokens = static_cast<int>(positions.size()), heads = 6 * kv_heads;
  const size_t n = static_cast<size_t>(tokens * heads * kHeadDim);
  auto qkv = random_bf16(n, 5);
  for (int d = 0; d < kHeadDim; ++d) qkv[static_cast<size_t>(5 * kv_heads * kHeadDim + d)] = 0.0f;
  std::vector<float> cos, sin;
  for (int p = 0; p < max_pages * kPageTokens; ++p) {
    for (int d = 0; d < 64; ++d) {
      const double angle = p * std::pow(1e6, -2.0 * d / kHeadDim);
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  const size_t cache_bytes = pair_offset(pages, kv_heads, 0);
  auto* cache = device_alloc<uint8_t>(cache_bytes);
  BENCH_CHECK(cudaMemset(cache, 0xa5, cache_bytes));
  auto* device_qkv = upload(qkv);
  std::vector<int> lengths;
  for (const auto& [count, length] : sequences) lengths.push_back(length);
  BENCH_CHECK(cuda::generic_rope_store({.qkv = device_qkv,
                                        .positions = upload(positions),
                                        .seq_starts = upload(starts),
                                        .kv_lens = upload(lengths),
                                        .page_table = upload(table),
                                        .cos = upload(cos),
                                        .sin = upload(sin),
                                        .pages = cache,
                                        .page_starts = device_alloc<int>(sequences.size() + 1),
                                        .format = cuda::PageFormat::kInt8,
                                        .k_scale = 0,
                                        .v_scale = 0,
                                        .tokens = tokens,
                                        .sequences = static_cast<int>(sequences.size()),
                                        .page_table_stride = max_pages,
                                        .heads = 4 * kv_heads,
                                        .kv_heads = kv_heads,
                                        .dependent = false},
                                       stream));
  const auto out = fetch(device_qkv, n);
  auto page_bytes = fetch(cache, cache_bytes);
  bool ok = true;
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int t = starts[s]; t < starts[s + 1]; ++t) {
      const int position = positions[static_cast<size_t>(t)];
      for (int head = 0; head < heads; ++head) {
        const size_t at = static_cast<size_t>((t * heads + head) * kHeadDim);
        double x[kHeadDim], peak = 0;
        for (int d = 0; d < kHeadDim; ++d) {
          x[d] = value(qkv[at + static_cast<size_t>(d)]);
          if (head < 5 * kv_heads) {
            const double partner = value(qkv[at + static_cast<size_t>(d ^ 64)]);
            const auto angle = static_cast<size_t>(position * 64 + d % 64);
            x[d] = x[d] * cos[angle] + (d < 64 ? -partner : partner) * sin[angle];
          }
          peak = std::max(peak, std::fabs(x[d]));
          const double got = value(out[at + static_cast<size_t>(d)]);
          ok = ok && std::fabs(got - x[d]) <= 0.004 * std::fabs(x[d]) + 1e-5;
        }
        if (head < 4 * kv_heads) continue;
        const bool is_v = head >= 5 * kv_heads;
        const int row = position % kPageTokens;
        uint8_t* pair = &page_bytes[pair_offset(
            table[s * static_cast<size_t>(max_pages) + static_cast<size_t>(position / kPageTokens)],
            kv_heads, head % kv_heads)];
        __half scale;
        std::memcpy(&scale, pair + (is_v ? v_scale_byte(row) : k_scale_byte(row)), 2);
        const double step = static_cast<double>(__half2float(scale));
        ok = ok && (peak == 0 ? step == 1 : std::fabs(step - peak / 127) <= 0.001 * step);
        for (int d = 0; d < kHeadDim; ++d) {
          uint8_t& byte = pair[is_v ? v_byte(row, d) : k_byte(row, d)];
          ok = ok && std::fabs((byte - 128) * step - x[d]) <= 0.51 * step;
          byte = 0xa5;  // what remains must be untouched
        }
        std::memset(pair + (is_v ? v_scale_byte(row) : k_scale_byte(row)), 0xa5, 2);
      }
    }
  }
  for (const uint8_t byte : page_bytes) ok = ok && byte == 0xa5;
  return report("rope_store",
                std::to_string(tokens) + " tokens, " + std::to_string(kv_heads) + " kv heads", ok);
}

int check_dense(int rows, int n, int k, cudaStream_t stream) {
  const auto x = random_bf16(static_cast<size_t>(rows * k), 6);
  const auto w = random_bf16(static_cast<size_t>(n * k), 7, 0.05f);
  const auto count = static_cast<size_t>(rows * n);
  auto* out = device_alloc<float>(count + 64);
  BENCH_CHECK(cudaMemset(out, 0xff, (count + 64) * 4));
  BENCH_CHECK(cuda::dense_linear({.x = upload(x),
                                  .weight = upload(w),
                                  .out = out,
                                  .rows = rows,
                                  .n = n,
                                  .k = k,
                                  .num_sms = 132,
                                  .dependent = false},
                                 stream));
  const auto got = fetch(out, count + 64);
  bool ok = true;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < n; ++c) {
      double want = 0, size = 0;
      for (int i = 0; i < k; ++i) {
        const double term = static_cast<double>(value(x[static_cast<size_t>(r * k + i)])) *
                            static_cast<double>(value(w[static_cast<size_t>(c * k + i)]));
        want += term;
        size += std::fabs(term);
      }
      ok = ok && std::fabs(got[static_cast<size_t>(r * n + c)] - want) <= 1e-5 * size + 1e-9;
    }
  }
  for (size_t i = count; i < count + 64; ++i) ok = ok && std::isnan(got[i]);
  return report("dense",
                std::to_string(rows) + " x " + std::to_string(n) + " x " + std::to_string(k), ok);
}

// The reference backend's sampling, restated: sort, filters in double, draw by id.
int sample_reference(const SampleRow& row, std::vector<float> x,
                     const std::vector<TokenCount>& history, const std::vector<TokenBias>& bias,
                     const std::vector<uint64_t>& allowed) {
  for (int i = row.history_begin; i < row.history_end; ++i) {
    const TokenCount& seen = history[static_cast<size_t>(i)];
    float& logit = x[static_cast<size_t>(seen.token)];
    logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    if (seen.output_count > 0) {
      logit -= row.presence_penalty + row.frequency_penalty * static_cast<float>(seen.output_count);
    }
  }
  for (int i = row.bias_begin; i < row.bias_end; ++i) {
    x[static_cast<size_t>(bias[static_cast<size_t>(i)].token)] += bias[static_cast<size_t>(i)].bias;
  }
  for (size_t i = 0; i < x.size(); ++i) {
    if (!allowed.empty() && (allowed[i / 64] >> (i % 64) & 1) == 0) x[i] = -INFINITY;
  }
  std::vector<int> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
  });
  const float best = x[static_cast<size_t>(order[0])];
  if (row.temperature <= 0 || best == -INFINITY) return order[0];
  if (row.top_k > 0 && row.top_k < static_cast<int>(x.size())) {
    order.resize(static_cast<size_t>(row.top_k));
  }
  std::vector<double> weight;
  for (const int id : order) {
    weight.push_back(
        std::exp((static_cast<double>(x[static_cast<size_t>(id)]) - static_cast<double>(best)) /
                 static_cast<double>(row.temperature)));
  }
  double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  size_t kept = order.size();
  if (row.top_p < 1) {
    double sum = 0;
    for (kept = 0;
         kept < order.size() && (kept == 0 || sum < static_cast<double>(row.top_p) * total);) {
      sum += weight[kept++];
    }
  }
  while (row.min_p > 0 && kept > 1 && weight[kept - 1] < static_cast<double>(row.min_p)) --kept;
  std::vector<std::pair<int, double>> candidates;
  for (size_t i = 0; i < kept; ++i) candidates.emplace_back(order[i], weight[i]);
  std::sort(candidates.begin(), candidates.end());
  total = 0;
  for (const auto& c : candidates) total += c.second;
  const double target = static_cast<double>(sample_uniform(row.seed, row.position)) * total;
  double sum = 0;
  for (const auto& [id, w] : candidates) {
    sum += w;
    if (target < sum) return id;
  }
  return candidates.back().first;
}

int check_sample(int rows, int vocab, bool masked, unsigned seed, cudaStream_t stream) {
  std::mt19937 rng(seed);
  auto logits = random_floats(static_cast<size_t>(rows * vocab), seed, 0.0f, 3.0f);
  for (size_t i = 0; i < logits.size(); i += 3) logits[i] = std::round(logits[i] * 4) / 4;  // ties
  std::vector<SampleRow> list;
  std::vector<TokenCount> history;
  std::vector<TokenBias> bias;
  std::vector<uint64_t> allowed;
  if (masked) {
    for (int i = 0; i < (vocab + 63) / 64; ++i) allowed.push_back(rng() | uint64_t{rng()} << 32);
  }
  const float top_p[] = {1.0f, 0.9f, 0.3f, 0.0f, 0.999f}, min_p[] = {0.0f, 0.05f, 0.0f};
  const int top_k[] = {0, 1, 7, 50, 0, 3};
  for (int r = 0; r < rows; ++r) {
    SampleRow row;
    row.temperature = r % 7 == 0 ? 0.0f : 0.3f + 0.2f * static_cast<float>(r % 5);
    row.top_p = top_p[r % 5];
    row.min_p = min_p[r % 3];
    row.top_k = top_k[r % 6];
    row.seed = rng();
    row.position = rng() % 1000;
    row.num_logprobs = r % 4 == 0 ? r % 6 : -1;
    row.history_begin = static_cast<int>(history.size());
    if (r % 2) {
      row.repetition_penalty = 1.3f;
      row.presence_penalty = 0.5f;
      row.frequency_penalty = 0.2f;
      for (int i = 0; i < std::min(vocab, 40); ++i) {
        history.push_back({(i * 37 + r) % vocab, i % 3});
        if ((i + 1) * 37 >= vocab) break;
      }
    }
    row.history_end = static_cast<int>(history.size());
    row.bias_begin = static_cast<int>(bias.size());
    if (r % 3 == 0) {
      bias.push_back({r % vocab, 4.0f});
      if (vocab > 100) bias.push_back({(r + 50) % vocab, -INFINITY});
    }
    row.bias_end = static_cast<int>(bias.size());
    if (r % 11 == 10) row.forced_token = vocab / 2;
    list.push_back(row);
  }
  constexpr int kTop = 5;
  auto* tokens = device_alloc<int32_t>(static_cast<size_t>(rows));
  auto* logprobs = device_alloc<float>(static_cast<size_t>(rows));
  auto* top_tokens = device_alloc<int32_t>(static_cast<size_t>(rows * kTop));
  auto* top_logprobs = device_alloc<float>(static_cast<size_t>(rows * kTop));
  const SampleBatch batch{.num_rows = rows,
                          .vocab_size = vocab,
                          .rows = upload(list),
                          .history = upload(history),
                          .bias = upload(bias),
                          .allowed = masked ? upload(allowed) : nullptr,
                          .max_logprobs = kTop};
  BENCH_CHECK(cuda::sample(batch, upload(logits),
                           {.tokens = tokens,
                            .logprobs = logprobs,
                            .top_tokens = top_tokens,
                            .top_logprobs = top_logprobs},
                           device_alloc<uint8_t>(cuda::sample_workspace_bytes(rows, vocab) + 1),
                           false, stream));
  const auto got = fetch(tokens, static_cast<size_t>(rows));
  const auto got_logprobs = fetch(logprobs, static_cast<size_t>(rows));
  const auto got_top = fetch(top_tokens, static_cast<size_t>(rows * kTop));
  const auto got_top_logprobs = fetch(top_logprobs, static_cast<size_t>(rows * kTop));
  int wrong = 0;
  for (int r = 0; r < rows; ++r) {
    const SampleRow& row = list[static_cast<size_t>(r)];
    const std::vector<float> x(logits.begin() + static_cast<int64_t>(r) * vocab,
                               logits.begin() + static_cast<int64_t>(r + 1) * vocab);
    const int want =
        row.forced_token >= 0 ? row.forced_token : sample_reference(row, x, history, bias, allowed);
    wrong += got[static_cast<size_t>(r)] != want;
    if (row.num_logprobs < 0) continue;
    double sum = 0;
    for (const float v : x) sum += std::exp(static_cast<double>(v));
    std::vector<int> order(x.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
    });
    wrong += !(std::fabs(got_logprobs[static_cast<size_t>(r)] -
                         (x[static_cast<size_t>(want)] - std::log(sum))) < 1e-4);
    for (int j = 0; j < kTop; ++j) {
      const auto at = static_cast<size_t>(r * kTop + j);
      const int id = j < std::min(row.num_logprobs, vocab) ? order[static_cast<size_t>(j)] : -1;
      wrong += got_top[at] != id;
      wrong += id < 0 ? got_top_logprobs[at] != -INFINITY
                      : !(std::fabs(got_top_logprobs[at] -
                                    (x[static_cast<size_t>(id)] - std::log(sum))) < 1e-4);
    }
  }
  return report("sample",
                std::to_string(rows) + " x " + std::to_string(vocab) + (masked ? " masked" : "") +
                    ", wrong " + std::to_string(wrong),
                wrong == 0);
}

// The 24B shape. Every call of a graph takes the next of several inputs, or one that is larger than
// L2; what is small (few rows, logits of one step) comes out of L2, as it does in a step.
class OpTimer {
 public:
  OpTimer(cudaStream_t stream, const Limits& limits) : stream_(stream), limits_(limits) {
    BENCH_CHECK(cudaDeviceGetAttribute(&sms_, cudaDevAttrMultiProcessorCount, 0));
    fill_normal<<<1056, 256, 0, stream>>>(x_, size_t{kMaxRows} * kHidden, kHidden, 1.0f, 1);
    fill_normal<<<1056, 256, 0, stream>>>(table_, kTableSize, kHidden, 0.02f, 3);
    fill_uniform<<<64, 256, 0, stream>>>(scale_, kFfn, 0.5f, 1.5f, 2);
    BENCH_CHECK(cudaGetLastError());
  }
  OpTimer(const OpTimer&) = delete;
  OpTimer& operator=(const OpTimer&) = delete;
  ~OpTimer() {
    for (void* p : {static_cast<void*>(x_), static_cast<void*>(y_), static_cast<void*>(table_),
                    static_cast<void*>(scale_), static_cast<void*>(logits_)}) {
      BENCH_CHECK(cudaFree(p));
    }
  }

  void run() {
    wgmma_tflops(WgmmaKind::kBf16, stream_);  // not in the middle of a row
    for (const int rows : {1, 64, 5525}) norm(rows);
    for (const int tokens : {1, 64, 2048}) embedding(tokens);
    rope(1, 1, 5525);
    rope(64, 1, 5525);
    rope(1, 2048, 2048);
    for (const int rows : {1, 64, 2048}) linear(rows);
    for (const int rows : {1, 64, 5525}) columns(rows);
    for (const int rows : {1, 64, 2048}) silu(rows);
    for (const int rows : {1, 8, 16, 32, 64}) head(rows);
    for (const int bits : {4, 8}) quantized_head(bits);
    scale_search();
    for (const int rows : {1, 64}) sampling(rows);
  }

 private:
  static constexpr int kHidden = 5120, kVocab = 131072, kFfn = 32768, kMaxRows = 5525;
  static constexpr int kHeads = 32, kKvHeads = 8, kHeadDim = kv_layout::kHeadDim;
  static constexpr int kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
  static constexpr size_t kTableSize = size_t{kVocab} * kHidden;

  // The first of them depends on nothing.
  template <typename Call>
  double time(int calls, Call call) {
    return time_calls(stream_, calls, call);
  }
  void row(double us, double bytes, double flops = 0) {
    std::printf("%.2f us", us);
    print_gbps(bytes, us, limits_);
    if (flops > 0) print_tflops(flops, us, WgmmaKind::kBf16, stream_);
    std::printf("\n");
  }

  void norm(int rows) {
    const double us = time(20, [&](int i) {
      return cuda::rms_norm({.x = x_,
                             .weight = scale_,
                             .pre_scale = nullptr,
                             .row_index = nullptr,
                             .y = y_,
                             .eps = 1e-5f,
                             .rows = rows,
                             .hidden = kHidden,
                             .copies = 1,
                             .dependent = i > 0},
                            stream_);
    });
    std::printf("rms_norm %4d x %d: ", rows, kHidden);
    row(us, 4.0 * rows * kHidden + 4.0 * kHidden);
  }

  // Every call looks up other rows.
  void embedding(int tokens) {
    constexpr int kCalls = 20;
    std::mt19937 rng(8);
    std::vector<int> ids(static_cast<size_t>(tokens) * kCalls);
    for (int& id : ids) id = static_cast<int>(rng() % kVocab);
    int* device_ids = upload(ids);
    const double us = time(kCalls, [&](int i) {
      return cuda::embed(device_ids + static_cast<ptrdiff_t>(i) * tokens, nullptr, table_, y_,
                         tokens, kHidden, i > 0, stream_);
    });
    std::printf("embed %4d tokens: ", tokens);
    row(us, 4.0 * tokens * kHidden + 4.0 * tokens);
    BENCH_CHECK(cudaFree(device_ids));
  }

  // The last `count` tokens of every sequence, int8 pages with dynamic scales; four layers' qkv and
  // pages in turn. Bytes: qkv in, q and k out, K and V with their scales, and each token's angles.
  void rope(int sequences, int count, int length) {
    using namespace kv_layout;
    constexpr int kLayers = 4;
    const int tokens = sequences * count, stride = (length + kPageTokens - 1) / kPageTokens;
    std::vector<int> positions, starts{0}, lengths, pages;
    for (int s = 0; s < sequences; ++s) {
      for (int i = length - count; i < length; ++i) positions.push_back(i);
      starts.push_back(static_cast<int>(positions.size()));
      lengths.push_back(length);
      for (int i = 0; i < stride; ++i) pages.push_back(s * stride + i);
    }
    std::shuffle(pages.begin(), pages.end(), std::mt19937(6));
    std::vector<float> cos, sin;
    for (int i = 0; i < length * 64; ++i) {
      const double angle = i / 64 * std::pow(1e6, -2.0 * (i % 64) / kHeadDim);
      cos.push_back(static_cast<float>(std::cos(angle)));
      sin.push_back(static_cast<float>(std::sin(angle)));
    }
    const size_t layer_values = static_cast<size_t>(tokens) * kQkv;
    const size_t layer_bytes = pair_offset(int64_t{sequences} * stride, kKvHeads, 0);
    auto* qkv = device_alloc<__nv_bfloat16>(layer_values * kLayers);
    auto* cache = device_alloc<uint8_t>(layer_bytes * kLayers);
    BENCH_CHECK(cudaMemset(cache, 0, layer_bytes * kLayers));
    fill_normal<<<1056, 256, 0, stream_>>>(qkv, layer_values * kLayers, kHeadDim, 1.0f, 5);
    BENCH_CHECK(cudaGetLastError());
    int *device_positions = upload(positions), *device_starts = upload(starts);
    int *device_lengths = upload(lengths), *device_pages = upload(pages);
    auto* page_starts = device_alloc<int>(static_cast<size_t>(sequences) + 1);
    float *device_cos = upload(cos), *device_sin = upload(sin);
    const double us = time(20, [&](int i) {
      const auto layer = static_cast<size_t>(i % kLayers);
      return cuda::generic_rope_store({.qkv = qkv + layer * layer_values,
                                       .positions = device_positions,
                                       .seq_starts = device_starts,
                                       .kv_lens = device_lengths,
                                       .page_table = device_pages,
                                       .cos = device_cos,
                                       .sin = device_sin,
                                       .pages = cache + layer * layer_bytes,
                                       .page_starts = page_starts,
                                       .format = cuda::PageFormat::kInt8,
                                       .k_scale = 0,
                                       .v_scale = 0,
                                       .tokens = tokens,
                                       .sequences = sequences,
                                       .page_table_stride = stride,
                                       .heads = kHeads,
                                       .kv_heads = kKvHeads,
                                       .dependent = i > 0},
                                      stream_);
    });
    std::printf("rope_store %4d tokens, %2d sequences: ", tokens, sequences);
    const double bytes_per_token =
        2.0 * kQkv + 2.0 * (kHeads + kKvHeads) * kHeadDim + 2.0 * kKvHeads * (kHeadDim + 2) + 512;
    row(us, tokens * bytes_per_token);
    for (void* p :
         {static_cast<void*>(qkv), static_cast<void*>(cache), static_cast<void*>(device_positions),
          static_cast<void*>(device_starts), static_cast<void*>(device_lengths),
          static_cast<void*>(device_pages), static_cast<void*>(page_starts),
          static_cast<void*>(device_cos), static_cast<void*>(device_sin)}) {
      BENCH_CHECK(cudaFree(p));
    }
  }

  // qkv of a model in 16 bits: slices of the table are the weights, so that each call has its own.
  void linear(int rows) {
    constexpr size_t kWeights = size_t{kQkv} * kHidden;
    constexpr int kCopies = static_cast<int>(kTableSize / kWeights);
    const double us = time(kCopies, [&](int i) {
      return cuda::generic_linear({.x = x_,
                                   .w = table_ + static_cast<size_t>(i) * kWeights,
                                   .out = y_,
                                   .residual = nullptr,
                                   .m = rows,
                                   .n = kQkv,
                                   .k = kHidden,
                                   .f32_out = false},
                                  stream_);
    });
    std::printf("generic_linear %4d x %d x %d: ", rows, kQkv, kHidden);
    row(us, 2.0 * static_cast<double>(kWeights) + 2.0 * rows * (kHidden + kQkv),
        2.0 * rows * static_cast<double>(kWeights));
  }

  void columns(int rows) {
    const double us =
        time(20, [&](int) { return cuda::scale_columns(x_, scale_, y_, rows, kHidden, stream_); });
    std::printf("scale_columns %4d x %d: ", rows, kHidden);
    row(us, 4.0 * rows * kHidden + 4.0 * kHidden);
  }

  // Gate and up are slices of the table.
  void silu(int rows) {
    const double us = time(20, [&](int) {
      return cuda::silu_multiply(table_, table_ + static_cast<size_t>(rows) * kFfn, scale_, y_,
                                 rows, kFfn, stream_);
    });
    std::printf("silu_multiply %4d x %d: ", rows, kFfn);
    row(us, 6.0 * rows * kFfn + 4.0 * kFfn);
  }

  void head(int rows) {
    const double us = time(4, [&](int i) {
      return cuda::dense_linear({.x = x_,
                                 .weight = table_,
                                 .out = logits_,
                                 .rows = rows,
                                 .n = kVocab,
                                 .k = kHidden,
                                 .num_sms = sms_,
                                 .dependent = i > 0},
                                stream_);
    });
    std::printf("lm_head %2d rows: ", rows);
    row(us, 2.0 * static_cast<double>(kTableSize), 2.0 * rows * static_cast<double>(kTableSize));
  }

  // int8 is an int4 matrix of twice the inputs (pack/int8.h).
  void quantized_head(int bits) {
    const int64_t k = int64_t{bits / 4} * kHidden;
    const int64_t bytes = cuda_layout::Shape{kVocab, k}.packed_bytes();
    auto* weights = device_alloc<uint8_t>(static_cast<size_t>(bytes));
    BENCH_CHECK(cuda::fill_random_int4(weights, bytes / cuda_layout::kBlockBytes, 5, stream_));
    const size_t workspace_bytes = cuda::linear_workspace_bytes(sms_);
    auto* workspace = device_alloc<uint8_t>(workspace_bytes);
    BENCH_CHECK(cudaMemsetAsync(workspace, 0xff, workspace_bytes, stream_));
    for (const int rows : {1, 8, 16, 32, 64}) {
      cuda::LinearArgs args{.weights = weights, .rows = kVocab, .k = k, .tokens = rows, .x = x_};
      cuda::TensorMap map;
      args.x_stride = k, args.x_map = &map, args.out = logits_;
      args.epilogue = cuda::Epilogue::kFloat;
      args.workspace = workspace, args.num_sms = sms_, args.tactic = -1;
      BENCH_CHECK(
          cuda::make_tensor_map(&map, x_, rows, k, k * 2, cuda::linear_wgmma_box_rows(args)));
      const double us = time(4, [&](int i) {
        args.dependent = i > 0;
        return cuda::linear(args, stream_);
      });
      std::printf("lm_head in %d bits %2d rows: ", bits, rows);
      row(us, static_cast<double>(bytes), 2.0 * rows * static_cast<double>(kVocab * k));
    }
    BENCH_CHECK(cudaFree(workspace));
    BENCH_CHECK(cudaFree(weights));
  }

  // Of gate_up, the host's wait for the result included.
  void scale_search() {
    constexpr int64_t kRows = 2 * kFfn;
    const int64_t bytes = cuda_layout::Shape{kRows, kHidden}.packed_bytes();
    auto* weights = device_alloc<uint8_t>(static_cast<size_t>(bytes));
    auto* scratch = device_alloc<float>(1);
    BENCH_CHECK(cuda::fill_random_int4(weights, bytes / cuda_layout::kBlockBytes, 6, stream_));
    std::vector<double> times;
    for (int i = 0; i < 21; ++i) {
      BENCH_CHECK(cudaStreamSynchronize(stream_));
      const auto start = std::chrono::steady_clock::now();
      float largest;
      BENCH_CHECK(cuda::largest_scale(weights, kRows, kHidden, scratch, &largest, stream_));
      times.push_back(
          std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
              .count());
    }
    std::sort(times.begin(), times.end());
    std::printf("largest_scale %lld x %d: ", static_cast<long long>(kRows), kHidden);
    row(times[times.size() / 2], static_cast<double>(bytes) / 33);  // a scale in 33 words
    BENCH_CHECK(cudaFree(weights));
    BENCH_CHECK(cudaFree(scratch));
  }

  // Bytes: the logits once, which is the least.
  void sampling(int rows) {
    constexpr int kSeen = 500, kBiased = 20, kTop = 20;  // ids of a row; log-probs
    std::vector<TokenCount> history;
    std::vector<TokenBias> bias;
    for (int i = 0; i < kSeen; ++i) history.push_back({.token = 260 * i, .output_count = i % 3});
    for (int i = 0; i < kBiased; ++i) bias.push_back({.token = 6000 * i + 1, .bias = 1.0f});
    SampleRow greedy, drawn;
    greedy.temperature = 0;
    drawn.temperature = 0.7f, drawn.seed = 7;
    SampleRow filtered = drawn, min_p = drawn;
    filtered.top_p = 0.9f, filtered.top_k = 50;
    min_p.min_p = 0.05f;
    SampleRow penalized = filtered, told = filtered;
    penalized.repetition_penalty = 1.1f, penalized.presence_penalty = 0.1f;
    penalized.frequency_penalty = 0.1f;
    penalized.history_end = kSeen, penalized.bias_end = kBiased;
    told.num_logprobs = kTop;
    auto* workspace = device_alloc<uint8_t>(cuda::sample_workspace_bytes(rows, kVocab) + 1);
    auto* tokens = device_alloc<int32_t>(static_cast<size_t>(rows));
    auto* logprobs = device_alloc<float>(static_cast<size_t>(rows));
    auto* top_tokens = device_alloc<int32_t>(static_cast<size_t>(rows * kTop));
    auto* top_logprobs = device_alloc<float>(static_cast<size_t>(rows * kTop));
    TokenCount* device_history = upload(history);
    TokenBias* device_bias = upload(bias);
    for (const auto& [what, one] : {std::pair{"greedy", greedy},
                                    {"temperature", drawn},
                                    {"min_p", min_p},
                                    {"top_k, top_p", filtered},
                                    {"top_k, top_p, penalties, bias", penalized},
                                    {"top_k, top_p, 20 log-probs", told}}) {
      SampleRow* device_rows = upload(std::vector<SampleRow>(static_cast<size_t>(rows), one));
      const SampleBatch batch{.num_rows = rows,
                              .vocab_size = kVocab,
                              .rows = device_rows,
                              .history = device_history,
                              .bias = device_bias,
                              .max_logprobs = one.num_logprobs >= 0 ? kTop : 0};
      SampleResult result{.tokens = tokens};
      if (one.num_logprobs >= 0) {
        result.logprobs = logprobs;
        result.top_tokens = top_tokens, result.top_logprobs = top_logprobs;
      }
      const double us = time(4, [&](int i) {
        return cuda::sample(batch, logits_, result, workspace, i > 0, stream_);
      });
      std::printf("sample %2d rows, %s: ", rows, what);
      row(us, 4.0 * rows * kVocab);
      BENCH_CHECK(cudaFree(device_rows));
    }
    for (void* p :
         {static_cast<void*>(workspace), static_cast<void*>(tokens), static_cast<void*>(logprobs),
          static_cast<void*>(top_tokens), static_cast<void*>(top_logprobs),
          static_cast<void*>(device_history), static_cast<void*>(device_bias)}) {
      BENCH_CHECK(cudaFree(p));
    }
  }

  cudaStream_t stream_;
  const Limits& limits_;
  int sms_ = 0;
  // y_: rows of any width here.
  __nv_bfloat16* x_ = device_alloc<__nv_bfloat16>(size_t{kMaxRows} * kHidden);
  __nv_bfloat16* y_ = device_alloc<__nv_bfloat16>(size_t{2048} * kFfn);
  __nv_bfloat16* table_ = device_alloc<__nv_bfloat16>(kTableSize);  // and lm_head
  float* scale_ = device_alloc<float>(kFfn);
  float* logits_ = device_alloc<float>(size_t{64} * kVocab);
};

}  // namespace

int bench_ops(cudaStream_t stream, const Limits& limits, int argc, char** argv) {
  int failures = 0;
  failures += check_norm(1, 64, false, false, stream);
  failures += check_norm(5, 5120, true, false, stream);
  failures += check_norm(3, 1024, false, true, stream);
  failures += check_norm(2, 9000, true, true, stream);
  failures += check_rope({{1, 1}}, 1, stream);
  failures += check_rope({{1, 65}, {3, 3}, {70, 200}, {1, 128}}, 2, stream);
  failures += check_rope({{130, 130}, {1, 700}}, 8, stream);
  // Prompts that begin and end inside of eights, more heads than meet at once.
  failures += check_rope({{13, 21}, {100, 100}, {77, 300}, {1, 5}, {8, 72}, {64, 127}}, 9, stream);
  failures += check_rope({{200, 1000}, {3, 3}}, 1, stream);
  failures += check_dense(1, 5, 8, stream);
  failures += check_dense(3, 130, 264, stream);
  failures += check_dense(13, 257, 1032, stream);
  failures += check_dense(29, 128, 512, stream);
  failures += check_dense(70, 300, 776, stream);
  for (const unsigned seed : {1u, 2u, 3u}) {
    failures += check_sample(33, 1000, seed == 2, seed, stream);
    failures += check_sample(40, 32768, seed == 3, seed + 10, stream);
    failures += check_sample(12, 37, false, seed + 20, stream);
  }
  if (argc > 0 && std::string(argv[0]) == "--odd-only") return failures;
  failures += check_sample(24, 131072, false, 99, stream);
  OpTimer(stream, limits).run();
  return failures;
}

}  // namespace nibble::bench
