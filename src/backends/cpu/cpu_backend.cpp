// Splits every op over threads and calls the kernel table. Nothing here does arithmetic on
// activations. Work items are handed out dynamically; an output element is always computed whole by
// one item (attention merges its spans in order), so the thread count cannot change bits.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "backends/cpu/isa.h"
#include "backends/cpu/kernels.h"
#include "backends/cpu/sampler.h"
#include "base/error.h"
#include "base/thread_pool.h"

namespace nibble {
namespace {

using namespace cpu;

constexpr int kActGroup = 64;     // channels that share an int8 activation scale
constexpr int kTilesPerItem = 4;  // int4: 64 out features; a kernel's widest tile block
constexpr int kStreamTiles = 16;  // few rows: longer items, so that prefetch crosses fewer seams
constexpr int kDenseFewPerItem = 32;  // dense, bandwidth-bound: out features
constexpr int kDenseManyPerItem = 2 * kDenseNBlock;
constexpr int kRowsPerItem = 192;  // rows of an item; a multiple of every kernel's row block
constexpr int kGateUpRows = 96;  // rows whose gate and up outputs wait in scratch for the epilogue
constexpr size_t kGateUpScratch = size_t{2} * kGateUpRows * kStreamTiles * kCpuTileRows;
constexpr int kQueryRows = 64;  // (query, head) rows of one attention item
constexpr int64_t kInlineWork =
    16384;  // elements of row-wise work that are not worth waking threads for

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Dense dense_type(WeightLayout layout) {
  switch (layout) {
    case WeightLayout::kF32Rows: return Dense::kF32;
    case WeightLayout::kBf16Rows: return Dense::kBf16;
    case WeightLayout::kF16Rows: return Dense::kF16;
    default: break;
  }
  fail(ErrorKind::kUnsupported,
       "the cpu backend cannot read weights in layout {}; rebuild with --target cpu:native",
       weight_layout_name(layout));
}

Kv kv_type(KvFormat format) {
  switch (format) {
    case KvFormat::kInt8Dynamic: return Kv::kInt8Dynamic;
    case KvFormat::kInt8Static: return Kv::kInt8Static;
    case KvFormat::kF16: return Kv::kF16;
    case KvFormat::kF32: return Kv::kF32;
  }
  return Kv::kF32;
}

KvLayout kv_layout(KvFormat format, int block_tokens, int num_kv_heads, int head_dim) {
  const auto align = [](size_t n) { return (n + 63) / 64 * 64; };
  const size_t element = format == KvFormat::kF32 ? 4 : format == KvFormat::kF16 ? 2 : 1;
  const auto tokens = static_cast<size_t>(block_tokens), dim = static_cast<size_t>(head_dim);
  const size_t scales = format == KvFormat::kInt8Dynamic ? align(tokens * sizeof(float)) : 0;
  KvLayout l{.type = kv_type(format),
             .block_tokens = block_tokens,
             .num_kv_heads = num_kv_heads,
             .head_dim = head_dim};
  l.k_scale = align((dim + 3) / 4 * 4 * tokens * element);
  l.v = l.k_scale + scales;
  l.v_scale = l.v + align(tokens * dim * element);
  l.head_bytes = l.v_scale + scales;
  l.block_bytes = l.head_bytes * static_cast<size_t>(num_kv_heads);
  return l;
}

struct AttendItem {
  int seq, kv_head, query_begin, num_queries, span_begin, span_end;
  int64_t partial;  // row in the split buffers, -1: writes y itself
};

/// What a linear's kernel reads: the rows as they are, pre-scaled, or rounded to int8.
struct LinearInput {
  const float* x = nullptr;
  bool int8 = false;
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(const Kernels& kernels, std::string isa, ActivationPrecision precision,
             int num_threads)
      : kernels_(kernels), isa_(std::move(isa)), precision_(precision), pool_(num_threads) {
    threads_.resize(static_cast<size_t>(pool_.num_threads()));
  }

  std::string name() const override { return "cpu:" + isa_; }
  size_t act_bytes() const override { return sizeof(float); }

  void reserve(const ModelSpec& spec, const EngineLimits& limits, int max_logit_rows) override {
    const int rows = std::max(limits.max_num_tokens, max_logit_rows);
    const int widest = std::max({spec.hidden_size, spec.q_size(), spec.ffn_size});
    size_rows(rows, widest);
    normed_.resize(static_cast<size_t>(max_logit_rows) * static_cast<size_t>(spec.hidden_size));
    const int spans = static_cast<int>(ceil_div(limits.max_seq_len(), kKvSpan));
    const int split_seqs = std::min<int>(
        limits.max_batch_size, static_cast<int>(ceil_div(split_below(), spec.num_kv_heads)));
    size_partials(int64_t{split_seqs} * spec.num_heads * spans, spec.head_dim);
    items_.reserve(static_cast<size_t>(spec.num_kv_heads) *
                   static_cast<size_t>(limits.max_num_tokens + limits.max_batch_size * 2 +
                                       split_seqs * spans));
    for (Thread& t : threads_) {
      t.sample.reserve(spec.vocab_size);
      size_attend(t, spec.head_dim, std::max(kQueryRows, spec.num_heads / spec.num_kv_heads));
      t.gemm.resize(kDenseScratch);
      t.gate_up.resize(kGateUpScratch);
    }
  }

  // Memory
  // ---------------------------------------------------------------------------------------------------------

  Buffer alloc(size_t bytes) override {
    void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
    if (data == nullptr) fail(ErrorKind::kMemory, "cannot allocate {} bytes", bytes);
    return Buffer(this, data, bytes);
  }
  void free(void* data, size_t) noexcept override { std::free(data); }
  void upload(void* device, const void* host, size_t bytes) override {
    std::memcpy(device, host, bytes);
  }
  void download(void* host, const void* device, size_t bytes) override {
    std::memcpy(host, device, bytes);
  }
  void sync() override {}
  const void* import_weights(const std::byte* host, size_t) override { return host; }
  size_t kv_block_bytes(KvFormat format, int block_tokens, int num_kv_heads,
                        int head_dim) const override {
    return kv_layout(format, block_tokens, num_kv_heads, head_dim).block_bytes;
  }

  // Rows
  // -----------------------------------------------------------------------------------------------------------

  void embed(const StepBatch& batch, const LinearOperand& table, void* x) override {
    const Dense type = dense_type(table.layout);
    const int64_t hidden = table.in_features, element = type == Dense::kF32 ? 4 : 2;
    for_rows(batch.num_tokens, hidden, [&](int64_t t, int) {
      kernels_.widen(
          type, static_cast<const uint8_t*>(table.weight) + batch.token_ids[t] * hidden * element,
          static_cast<int>(hidden), static_cast<float*>(x) + t * hidden);
    });
  }

  void rms_norm(const void* x, const float* weight, float eps, int rows, int hidden,
                void* y) override {
    for_rows(rows, hidden, [&](int64_t r, int) {
      kernels_.rms_norm(static_cast<const float*>(x) + r * hidden, weight, eps, hidden,
                        static_cast<float*>(y) + r * hidden);
    });
  }

  // Linears
  // --------------------------------------------------------------------------------------------------------

  void linear(const void* x, const LinearOperand& w, int rows, bool add, void* y) override {
    if (rows <= 0) return;
    const LinearInput input = prepare(static_cast<const float*>(x), w, rows);
    const int per_item = outputs_per_item(w, rows);
    const int64_t columns = ceil_div(w.out_features, per_item),
                  row_chunks = ceil_div(rows, kRowsPerItem);
    auto body = [&](int64_t item, int thread) {
      const int row = static_cast<int>(item % row_chunks) * kRowsPerItem;
      const int n = static_cast<int>(item / row_chunks) * per_item;
      gemm(w, input, row, std::min(kRowsPerItem, rows - row), n,
           std::min(n + per_item, w.out_features), add,
           static_cast<float*>(y) + int64_t{row} * w.out_features + n, w.out_features, thread);
    };
    pool_.parallel_for(columns * row_chunks, std::ref(body));
  }

  void gate_up(const void* x, const LinearOperand& gate, const LinearOperand& up, int rows,
               const float* out_scale, void* y) override {
    if (rows <= 0) return;
    NIBBLE_CHECK(gate.out_features == up.out_features && gate.in_features == up.in_features &&
                 gate.layout == up.layout);
    if (gate.pre_scale != up.pre_scale) {
      gate_up_apart(x, gate, up, rows, out_scale, static_cast<float*>(y));
      return;
    }
    const LinearInput input = prepare(static_cast<const float*>(x), gate, rows);
    const int per_item = outputs_per_item(gate, rows);
    const int64_t ffn = gate.out_features, columns = ceil_div(ffn, per_item),
                  row_chunks = ceil_div(rows, kRowsPerItem);
    auto body = [&](int64_t item, int thread) {
      const int row_begin = static_cast<int>(item % row_chunks) * kRowsPerItem;
      const int row_end = std::min(row_begin + kRowsPerItem, rows);
      const int n = static_cast<int>(item / row_chunks) * per_item;
      const int n_end = std::min(n + per_item, gate.out_features), count = n_end - n;
      std::vector<float>& scratch = threads_[static_cast<size_t>(thread)].gate_up;
      if (scratch.empty()) scratch.resize(kGateUpScratch);
      float* gate_out = scratch.data();
      float* up_out = gate_out + int64_t{kGateUpRows} * per_item;
      for (int row = row_begin; row < row_end; row += kGateUpRows) {
        const int block = std::min(kGateUpRows, row_end - row);
        gemm(gate, input, row, block, n, n_end, false, gate_out, per_item, thread);
        gemm(up, input, row, block, n, n_end, false, up_out, per_item, thread);
        for (int r = 0; r < block; ++r) {
          kernels_.silu_multiply(gate_out + r * per_item, up_out + r * per_item,
                                 out_scale == nullptr ? nullptr : out_scale + n, count,
                                 static_cast<float*>(y) + (row + r) * ffn + n);
        }
      }
    };
    pool_.parallel_for(columns * row_chunks, std::ref(body));
  }

  void lm_head(const StepBatch& batch, const void* x, const float* norm_weight, float eps,
               const LinearOperand& head, float* logits) override {
    const int hidden = head.in_features, rows = batch.num_logit_rows;
    if (normed_.size() < static_cast<size_t>(rows) * static_cast<size_t>(hidden)) {
      normed_.resize(static_cast<size_t>(rows) * static_cast<size_t>(hidden));
    }
    for_rows(rows, hidden, [&](int64_t r, int) {
      kernels_.rms_norm(static_cast<const float*>(x) + int64_t{batch.logit_rows[r]} * hidden,
                        norm_weight, eps, hidden, normed_.data() + r * hidden);
    });
    linear(normed_.data(), head, rows, false, logits);
  }

  // Attention
  // ------------------------------------------------------------------------------------------------------

  void rope_store_kv(const StepBatch& batch, void* qkv, int num_heads, const RopeTable& rope,
                     const KvLayer& kv) override {
    const KvLayout layout = kv_layout(kv.format, kv.block_tokens, kv.num_kv_heads, kv.head_dim);
    const int dim = kv.head_dim, kv_heads = kv.num_kv_heads;
    const int64_t row_size = int64_t{num_heads + 2 * kv_heads} * dim;
    for_rows(batch.num_tokens, row_size, [&](int64_t t, int) {
      const int32_t* ends = batch.seq_starts + 1;
      const int64_t seq = std::upper_bound(ends, ends + batch.num_seqs, t) - ends;
      const int position = batch.positions[t];
      float* row = static_cast<float*>(qkv) + t * row_size;
      const float* cos = rope.cos + int64_t{position} * (dim / 2);
      const float* sin = rope.sin + int64_t{position} * (dim / 2);
      for (int head = 0; head < num_heads + kv_heads; ++head)
        kernels_.rope(row + head * dim, cos, sin, dim / 2);
      const int64_t block =
          batch.block_tables[seq * batch.max_blocks_per_seq + position / kv.block_tokens];
      uint8_t* data =
          static_cast<uint8_t*>(kv.data) + block * static_cast<int64_t>(layout.block_bytes);
      for (int g = 0; g < kv_heads; ++g) {
        const float* k = row + int64_t{num_heads + g} * dim;
        kernels_.kv_store({.layout = &layout,
                           .head = data + static_cast<size_t>(g) * layout.head_bytes,
                           .row = position % kv.block_tokens,
                           .k = k,
                           .v = k + int64_t{kv_heads} * dim,
                           .k_scale = kv.k_scale,
                           .v_scale = kv.v_scale});
      }
    });
  }

  void attention(const StepBatch& batch, const void* qkv, int num_heads, const KvLayer& kv,
                 const float* out_scale, void* y) override {
    const KvLayout layout = kv_layout(kv.format, kv.block_tokens, kv.num_kv_heads, kv.head_dim);
    const int dim = kv.head_dim, heads = num_heads / kv.num_kv_heads, dp = padded(dim);
    const int queries_per_item = std::max(1, kQueryRows / heads);
    const int64_t num_partials = plan_attention(batch, kv.num_kv_heads, heads, queries_per_item);
    size_partials(num_partials, dim);

    auto body = [&](int64_t i, int thread) {
      const AttendItem& item = items_[static_cast<size_t>(i)];
      Thread& scratch = threads_[static_cast<size_t>(thread)];
      const int rows = item.num_queries * heads;
      size_attend(scratch, dim, rows);
      const bool split = item.partial >= 0;
      float* max = split ? partial_max_.data() + item.partial : scratch.max.data();
      float* sum = split ? partial_sum_.data() + item.partial : scratch.sum.data();
      float* acc = split ? partial_acc_.data() + item.partial * dp : scratch.acc.data();
      const int64_t row_size = int64_t{num_heads + 2 * kv.num_kv_heads} * dim;
      kernels_.attend(
          {.layout = &layout,
           .kv = static_cast<const uint8_t*>(kv.data),
           .block_table = batch.block_tables + int64_t{item.seq} * batch.max_blocks_per_seq,
           .kv_head = item.kv_head,
           .k_scale = kv.k_scale,
           .v_scale = kv.v_scale,
           .kv_len = batch.kv_lens[item.seq],
           .span_begin = item.span_begin,
           .span_end = item.span_end,
           .q = static_cast<const float*>(qkv) + item.query_begin * row_size +
                int64_t{item.kv_head} * heads * dim,
           .q_stride = row_size,
           .positions = batch.positions + item.query_begin,
           .num_queries = item.num_queries,
           .heads = heads,
           .softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim)),
           .max = max,
           .sum = sum,
           .acc = acc,
           .scratch = scratch.attend.data()});
      if (split) return;
      for (int r = 0; r < rows; ++r) {
        finish(item.query_begin + r / heads, item.kv_head * heads + r % heads, num_heads, dim,
               sum[r], acc + int64_t{r} * dp, out_scale, static_cast<float*>(y));
      }
    };
    pool_.parallel_for(static_cast<int64_t>(items_.size()), std::ref(body));
    if (num_partials == 0) return;

    // Spans of a split row lie one after the other; the first of them opens the merge.
    for (const AttendItem& item : items_) {
      if (item.partial < 0 || item.span_begin != 0) continue;
      const int spans = num_spans(batch.kv_lens[item.seq]);
      for (int r = 0; r < heads; ++r) {
        const int64_t first = item.partial + r;
        for (int span = 1; span < spans; ++span) {
          const int64_t next = first + int64_t{span} * heads;
          kernels_.attend_merge(
              &partial_max_[static_cast<size_t>(first)], &partial_sum_[static_cast<size_t>(first)],
              partial_acc_.data() + first * dp, partial_max_[static_cast<size_t>(next)],
              partial_sum_[static_cast<size_t>(next)], partial_acc_.data() + next * dp, dp);
        }
        finish(item.query_begin, item.kv_head * heads + r, num_heads, dim,
               partial_sum_[static_cast<size_t>(first)], partial_acc_.data() + first * dp,
               out_scale, static_cast<float*>(y));
      }
    }
  }

  void sample(const SampleBatch& batch, float* logits, const SampleResult& result) override {
    for_rows(batch.num_rows, kInlineWork, [&](int64_t r, int thread) {
      sample_row(kernels_, batch, static_cast<int>(r), logits + r * batch.vocab_size, result,
                 threads_[static_cast<size_t>(thread)].sample);
    });
  }

 private:
  struct Thread {
    std::vector<float> gemm, gate_up, attend, max, sum, acc;
    SampleScratch sample;
  };

  static int num_spans(int kv_len) { return static_cast<int>(ceil_div(kv_len, kKvSpan)); }
  int split_below() const { return 4 * pool_.num_threads(); }  // (sequence, kv head) pairs

  /// body(row, thread) for every row; in the calling thread when there is little to do.
  template <typename Body>
  void for_rows(int64_t rows, int64_t row_size, Body&& body) {
    const int64_t per_chunk =
        std::max<int64_t>(1, kInlineWork / 4 / std::max<int64_t>(row_size, 1));
    if (rows * row_size <= kInlineWork) {
      for (int64_t r = 0; r < rows; ++r) body(r, 0);
      return;
    }
    auto chunk_body = [&](int64_t chunk, int thread) {
      for (int64_t r = chunk * per_chunk; r < std::min(rows, (chunk + 1) * per_chunk); ++r)
        body(r, thread);
    };
    pool_.parallel_for(ceil_div(rows, per_chunk), std::ref(chunk_body));
  }

  void size_rows(int rows, int k) {
    const size_t elements = static_cast<size_t>(rows) * static_cast<size_t>(k);
    if (xq_.size() >= elements) return;
    xq_.resize(elements);
    scaled_.resize(elements);
    xscale_.resize(elements / 32 + 1);
    xoffset_.resize(elements / 32 + 1);
  }
  void size_partials(int64_t rows, int dim) {
    const auto n = static_cast<size_t>(rows);
    if (partial_max_.size() < n) {
      partial_max_.resize(n);
      partial_sum_.resize(n);
    }
    const size_t acc = n * static_cast<size_t>(padded(dim));
    if (partial_acc_.size() < acc) partial_acc_.resize(acc);
  }
  static void size_attend(Thread& t, int dim, int rows) {
    const size_t scratch = attend_scratch(dim, rows),
                 acc = static_cast<size_t>(rows) * static_cast<size_t>(padded(dim));
    if (t.attend.size() < scratch) t.attend.resize(scratch);
    if (t.acc.size() < acc) t.acc.resize(acc);
    if (t.max.size() < static_cast<size_t>(rows)) {
      t.max.resize(static_cast<size_t>(rows));
      t.sum.resize(static_cast<size_t>(rows));
    }
  }

  static bool lies_in_tiles(const LinearOperand& w) {
    return w.layout == WeightLayout::kCpuInt4 || w.layout == WeightLayout::kCpuInt8;
  }
  static int act_group(const LinearOperand& w) {
    return w.group_size % kActGroup == 0 ? kActGroup : 32;
  }
  int outputs_per_item(const LinearOperand& w, int rows) const {
    if (lies_in_tiles(w)) {
      int tiles = kTilesPerItem;
      while (rows <= 16 && tiles < kStreamTiles &&
             cpu_int4_num_tiles(w.out_features) >= 16 * tiles * pool_.num_threads()) {
        tiles *= 2;
      }
      return tiles * kCpuTileRows;
    }
    return rows < kDenseNBlock ? kDenseFewPerItem : kDenseManyPerItem;
  }

  // Checkpoints by ModelOpt: its search gives gate and up a pre-scale each, so they read two
  // inputs.
  void gate_up_apart(const void* x, const LinearOperand& gate, const LinearOperand& up, int rows,
                     const float* out_scale, float* y) {
    const int64_t ffn = gate.out_features;
    if (up_out_.size() < static_cast<size_t>(rows * ffn))
      up_out_.resize(static_cast<size_t>(rows * ffn));
    linear(x, gate, rows, false, y);
    linear(x, up, rows, false, up_out_.data());
    for_rows(rows, ffn, [&](int64_t r, int) {
      kernels_.silu_multiply(y + r * ffn, up_out_.data() + r * ffn, out_scale,
                             static_cast<int>(ffn), y + r * ffn);
    });
  }

  /// Pre-scales or rounds the rows, once per op.
  LinearInput prepare(const float* x, const LinearOperand& w, int rows) {
    const int k = w.in_features;
    const bool tiles = lies_in_tiles(w);
    if (tiles) {
      NIBBLE_CHECK(w.group_size > 0 && w.group_size % 32 == 0 && w.group_size <= 256 &&
                       k % w.group_size == 0,
                   "group {} in {}", w.group_size, k);
    }
    if (tiles && precision_ == ActivationPrecision::kInt8Group) {
      size_rows(rows, k);
      const int group = act_group(w);
      for_rows(rows, k, [&](int64_t r, int) {
        kernels_.quantize_row(x + r * k, w.pre_scale, k, group, xq_.data() + r * k,
                              xscale_.data() + r * (k / group), xoffset_.data() + r * (k / group));
      });
      return {.int8 = true};
    }
    if (w.pre_scale == nullptr) return {.x = x};
    size_rows(rows, k);
    for_rows(rows, k, [&](int64_t r, int) {
      kernels_.multiply(x + r * k, w.pre_scale, k, scaled_.data() + r * k);
    });
    return {.x = scaled_.data()};
  }

  /// Rows [row, row + rows) x outputs [n_begin, n_end) into y (row stride ldy, first column
  /// n_begin).
  void gemm(const LinearOperand& w, const LinearInput& input, int row, int rows, int n_begin,
            int n_end, bool add, float* y, int64_t ldy, int thread) {
    const int64_t k = w.in_features;
    if (lies_in_tiles(w)) {
      Int4Gemm g{.weight = static_cast<const uint8_t*>(w.weight),
                 .n = w.out_features,
                 .k = w.in_features,
                 .group = w.group_size,
                 .tile_begin = n_begin / kCpuTileRows,
                 .tile_end = cpu_int4_num_tiles(n_end),
                 .rows = rows,
                 .act_group = act_group(w),
                 .y = y,
                 .ldy = ldy,
                 .add = add};
      if (input.int8) {
        g.xq = xq_.data() + row * k;
        g.xscale = xscale_.data() + row * (k / g.act_group);
        g.xoffset = xoffset_.data() + row * (k / g.act_group);
      } else {
        g.x = input.x + row * k;
      }
      const auto kernel = input.int8 ? kernels_.int4_int8 : kernels_.int4_f32;
      kernel(g);
      if (w.layout == WeightLayout::kCpuInt8) {  // the low nibbles behind the high ones
        g.weight += static_cast<size_t>(cpu_int4_num_tiles(w.out_features)) *
                    cpu_int4_tile_bytes(w.in_features, w.group_size);
        g.add = true;
        kernel(g);
      }
      return;
    }
    std::vector<float>& scratch = threads_[static_cast<size_t>(thread)].gemm;
    if (scratch.empty()) scratch.resize(kDenseScratch);
    kernels_.dense({.type = dense_type(w.layout),
                    .weight = w.weight,
                    .k = w.in_features,
                    .n_begin = n_begin,
                    .n_end = n_end,
                    .rows = rows,
                    .x = input.x + row * k,
                    .y = y,
                    .ldy = ldy,
                    .add = add,
                    .scratch = scratch.data()});
  }

  /// Fills items_; returns the rows of split buffers they need. Long caches of single-query
  /// sequences are split by spans when there are too few (sequence, kv head) pairs to keep the
  /// threads busy.
  int64_t plan_attention(const StepBatch& batch, int kv_heads, int heads, int queries_per_item) {
    items_.clear();
    int64_t partials = 0;
    const bool split = int64_t{batch.num_seqs} * kv_heads < split_below();
    for (int s = 0; s < batch.num_seqs; ++s) {
      const int begin = batch.seq_starts[s], end = batch.seq_starts[s + 1];
      const int spans = num_spans(batch.kv_lens[s]);
      for (int g = 0; g < kv_heads; ++g) {
        if (split && end - begin == 1 && spans > 1) {
          for (int span = 0; span < spans; ++span) {
            items_.push_back({s, g, begin, 1, span, span + 1, partials});
            partials += heads;
          }
          continue;
        }
        for (int q = begin; q < end; q += queries_per_item) {
          const int count = std::min(queries_per_item, end - q);
          items_.push_back({s, g, q, count, 0, num_spans(batch.positions[q + count - 1] + 1), -1});
        }
      }
    }
    return partials;
  }

  void finish(int token, int head, int num_heads, int dim, float sum, const float* acc,
              const float* out_scale, float* y) const {
    kernels_.attend_finish(sum, acc,
                           out_scale == nullptr ? nullptr : out_scale + int64_t{head} * dim, dim,
                           y + (int64_t{token} * num_heads + head) * dim);
  }

  const Kernels& kernels_;
  const std::string isa_;
  const ActivationPrecision precision_;
  ThreadPool pool_;
  std::vector<Thread> threads_;
  std::vector<int8_t> xq_;        // [rows, K]
  std::vector<float> xscale_;     // [rows, K / act_group]
  std::vector<int32_t> xoffset_;  // [rows, K / act_group]
  std::vector<float> scaled_;     // [rows, K]
  std::vector<float> up_out_;     // [rows, N], where gate and up read different inputs
  std::vector<float> normed_;     // [R, hidden]
  std::vector<AttendItem> items_;
  std::vector<float> partial_max_, partial_sum_, partial_acc_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(std::string_view isa, ActivationPrecision precision,
                                          int num_threads) {
  const std::string resolved = resolve_cpu_isa(isa);
  return std::make_unique<CpuBackend>(kernels_for(resolved), resolved, precision, num_threads);
}

}  // namespace nibble
