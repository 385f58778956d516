// SPDX-License-Identifier: Apache-2.0
#include "backends/reference/reference_backend.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "backends/reference/reference_kv.h"
#include "backends/reference/reference_sample.h"
#include "base/error.h"
#include "base/half.h"
#include "base/thread_pool.h"

namespace nibble {
namespace {

// Row `n` of a weight as fp32 [K].
void load_weight_row(const LinearOperand& w, int64_t n, float* row) {
  const int64_t k_count = w.in_features;
  switch (w.layout) {
    case WeightLayout::kF32Rows:
      std::memcpy(row, static_cast<const float*>(w.weight) + n * k_count,
                  static_cast<size_t>(k_count) * sizeof(float));
      return;
    case WeightLayout::kBf16Rows:
      for (int64_t k = 0; k < k_count; ++k) {
        row[k] = bf16_to_float(static_cast<const uint16_t*>(w.weight)[n * k_count + k]);
      }
      return;
    case WeightLayout::kF16Rows:
      for (int64_t k = 0; k < k_count; ++k) {
        row[k] = f16_to_float(static_cast<const uint16_t*>(w.weight)[n * k_count + k]);
      }
      return;
    case WeightLayout::kInt4Portable: {
      const auto* bytes = static_cast<const uint8_t*>(w.weight) + n / 2 * k_count;
      const float* scales = w.scales + n * (k_count / w.group_size);
      for (int64_t k = 0; k < k_count; ++k) {
        const int nibble = n % 2 == 0 ? bytes[k] & 15 : bytes[k] >> 4;
        row[k] = static_cast<float>(nibble >= 8 ? nibble - 16 : nibble) * scales[k / w.group_size];
      }
      return;
    }
    case WeightLayout::kInt8Portable: {
      const auto* q = static_cast<const int8_t*>(w.weight) + n * k_count;
      const float* scales = w.scales + n * (k_count / w.group_size);
      for (int64_t k = 0; k < k_count; ++k)
        row[k] = static_cast<float>(q[k]) * scales[k / w.group_size];
      return;
    }
    case WeightLayout::kCpuInt4:
    case WeightLayout::kCpuInt8:
    case WeightLayout::kCudaInt4:
    case WeightLayout::kCudaInt8: break;
  }
  fail(ErrorKind::kUnsupported,
       "the reference backend cannot read weights in layout {}; rebuild with --target ref",
       weight_layout_name(w.layout));
}

// x [rows, k] as an e4m3 linear reads it: a row, or kE4m3Group values of it, have the scale
// absmax / 448, and a value is e4m3(x * (448 / absmax)) times that. Below 2^-100 all are 0; an
// infinity or NaN makes all NaN.
void round_to_e4m3(std::vector<float>& x, int64_t k, bool grouped) {
  const int64_t group = grouped ? kE4m3Group : k;
  constexpr float kMax = 448.0f, kLeast = 0x1p-100f;
  for (auto row = x.begin(); row < x.end(); row += k) {
    for (int64_t begin = 0; begin < k; begin += group) {
      const auto first = row + begin, last = row + std::min(k, begin + group);
      float absmax = 0;
      bool finite = true;
      for (auto v = first; v < last; ++v) {
        finite = finite && std::isfinite(*v);
        absmax = std::max(absmax, std::fabs(*v));
      }
      const float inverse = kMax / absmax, scale = absmax / kMax;
      for (auto v = first; v < last; ++v) {
        *v = !finite           ? std::numeric_limits<float>::quiet_NaN()
             : absmax < kLeast ? 0.0f
                               : e4m3_to_float(float_to_e4m3(*v * inverse)) * scale;
      }
    }
  }
}

class ReferenceBackend final : public Backend {
 public:
  explicit ReferenceBackend(ActivationPrecision precision)
      : e4m3_(precision == ActivationPrecision::kE4m3) {}
  std::string name() const override { return "reference"; }
  size_t act_bytes() const override { return sizeof(float); }
  void reserve(const ModelSpec&, const EngineLimits&, int) override {}

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
    return reference::kv_block_bytes(format, block_tokens, num_kv_heads, head_dim);
  }

  void embed(const StepBatch& batch, const LinearOperand& table, void* x) override {
    for (int t = 0; t < batch.num_tokens; ++t) {
      load_weight_row(table, batch.token_ids[t],
                      static_cast<float*>(x) + int64_t{t} * table.in_features);
    }
  }

  void rms_norm(const void* x, const float* weight, float eps, int rows, int hidden,
                void* y) override {
    for (int r = 0; r < rows; ++r) {
      const float* in = static_cast<const float*>(x) + int64_t{r} * hidden;
      float* out = static_cast<float*>(y) + int64_t{r} * hidden;
      double sum = 0;
      for (int h = 0; h < hidden; ++h) sum += double{in[h]} * in[h];
      const float inverse = 1.0f / std::sqrt(static_cast<float>(sum / hidden) + eps);
      for (int h = 0; h < hidden; ++h) out[h] = in[h] * inverse * weight[h];
    }
  }

  void linear(const void* x, const LinearOperand& w, int rows, bool add, void* y) override {
    const float* in = static_cast<const float*>(x);
    const bool round = e4m3_ && is_int4(w.layout);
    std::vector<float> changed;
    if (w.pre_scale != nullptr || round) {
      changed.assign(in, in + int64_t{rows} * w.in_features);
      in = changed.data();
    }
    if (w.pre_scale != nullptr) {
      for (size_t i = 0; i < changed.size(); ++i)
        changed[i] *= w.pre_scale[i % static_cast<size_t>(w.in_features)];
    }
    if (round) round_to_e4m3(changed, w.in_features, rows <= kE4m3GroupedRows);
    // A weight row is expanded once and used for every activation row; a thread owns whole output
    // columns, so the sums do not depend on the thread count.
    constexpr int64_t kRowsPerChunk = 16;
    const int64_t n_count = w.out_features;
    pool_.parallel_for((n_count + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk, int) {
      std::vector<float> weight_row(static_cast<size_t>(w.in_features));
      for (int64_t n = chunk * kRowsPerChunk; n < std::min(n_count, (chunk + 1) * kRowsPerChunk);
           ++n) {
        load_weight_row(w, n, weight_row.data());
        for (int r = 0; r < rows; ++r) {
          float* out = static_cast<float*>(y) + r * n_count + n;
          *out = dot(in + int64_t{r} * w.in_features, weight_row.data(), w.in_features) +
                 (add ? *out : 0.0f);
        }
      }
    });
  }

  void gate_up(const void* x, const LinearOperand& gate, const LinearOperand& up, int rows,
               const float* out_scale, void* y) override {
    const size_t size = static_cast<size_t>(rows) * static_cast<size_t>(up.out_features);
    std::vector<float> up_out(size);
    linear(x, gate, rows, false, y);
    linear(x, up, rows, false, up_out.data());
    float* out = static_cast<float*>(y);
    for (size_t i = 0; i < size; ++i) {
      const float silu = out[i] / (1.0f + std::exp(-out[i]));
      out[i] = silu * up_out[i] *
               (out_scale ? out_scale[i % static_cast<size_t>(up.out_features)] : 1.0f);
    }
  }

  void rope_store_kv(const StepBatch& batch, void* qkv, int num_heads, const RopeTable& rope,
                     const KvLayer& kv) override {
    const int d_count = kv.head_dim, half = d_count / 2;
    const int64_t row_size = int64_t{num_heads + 2 * kv.num_kv_heads} * d_count;
    for (int s = 0; s < batch.num_seqs; ++s) {
      for (int t = batch.seq_starts[s]; t < batch.seq_starts[s + 1]; ++t) {
        const int position = batch.positions[t];
        float* row = static_cast<float*>(qkv) + t * row_size;
        for (int head = 0; head < num_heads + kv.num_kv_heads; ++head) {
          float* x = row + int64_t{head} * d_count;
          for (int d = 0; d < half; ++d) {
            const float c = rope.cos[int64_t{position} * half + d],
                        sn = rope.sin[int64_t{position} * half + d];
            const float a = x[d], b = x[d + half];
            x[d] = a * c - b * sn;
            x[d + half] = b * c + a * sn;
          }
        }
        const int block =
            batch.block_tables[int64_t{s} * batch.max_blocks_per_seq + position / kv.block_tokens];
        for (int g = 0; g < kv.num_kv_heads; ++g) {
          const float* k = row + int64_t{num_heads + g} * d_count;
          const float* v = k + int64_t{kv.num_kv_heads} * d_count;
          reference::KvVector(kv, block, position % kv.block_tokens, g, false).store(k);
          reference::KvVector(kv, block, position % kv.block_tokens, g, true).store(v);
        }
      }
    }
  }

  void attention(const StepBatch& batch, const void* qkv, int num_heads, const KvLayer& kv,
                 const float* out_scale, void* y) override {
    for (int s = 0; s < batch.num_seqs; ++s) {
      const int begin = batch.seq_starts[s], count = batch.seq_starts[s + 1] - begin;
      const int32_t* table = batch.block_tables + int64_t{s} * batch.max_blocks_per_seq;
      pool_.parallel_for(kv.num_kv_heads, [&](int64_t g, int) {
        attend_kv_head(batch, begin, count, batch.kv_lens[s], table, static_cast<int>(g), qkv,
                       num_heads, kv, out_scale, static_cast<float*>(y));
      });
    }
  }

  void lm_head(const StepBatch& batch, const void* x, const float* norm_weight, float eps,
               const LinearOperand& head, float* logits) override {
    const int hidden = head.in_features;
    std::vector<float> normed(static_cast<size_t>(batch.num_logit_rows) *
                              static_cast<size_t>(hidden));
    for (int r = 0; r < batch.num_logit_rows; ++r) {
      rms_norm(static_cast<const float*>(x) + int64_t{batch.logit_rows[r]} * hidden, norm_weight,
               eps, 1, hidden, normed.data() + int64_t{r} * hidden);
    }
    linear(normed.data(), head, batch.num_logit_rows, false, logits);
  }

  void sample(const SampleBatch& batch, float* logits, const SampleResult& result) override {
    for (int r = 0; r < batch.num_rows; ++r) {
      reference::sample_row(batch, r, logits + int64_t{r} * batch.vocab_size, result);
    }
  }

 private:
  // Eight partial sums: near fp64 quality for the lengths here and fast enough to run the
  // evaluation texts.
  static float dot(const float* a, const float* b, int64_t count) {
    float partial[8] = {};
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
      for (int64_t j = 0; j < 8; ++j) partial[j] += a[k + j] * b[k + j];
    }
    double sum = 0;
    for (const float p : partial) sum += p;
    for (; k < count; ++k) sum += double{a[k]} * b[k];
    return static_cast<float>(sum);
  }

  static void attend_kv_head(const StepBatch& batch, int begin, int count, int kv_len,
                             const int32_t* table, int g, const void* qkv, int num_heads,
                             const KvLayer& kv, const float* out_scale, float* y) {
    const int d_count = kv.head_dim, group = num_heads / kv.num_kv_heads;
    const int64_t row_size = int64_t{num_heads + 2 * kv.num_kv_heads} * d_count;
    std::vector<float> k(static_cast<size_t>(kv_len) * static_cast<size_t>(d_count)), v(k.size());
    for (int p = 0; p < kv_len; ++p) {
      const int block = table[p / kv.block_tokens], row = p % kv.block_tokens;
      reference::KvVector(kv, block, row, g, false).load(k.data() + int64_t{p} * d_count);
      reference::KvVector(kv, block, row, g, true).load(v.data() + int64_t{p} * d_count);
    }
    std::vector<float> scores(static_cast<size_t>(kv_len));
    std::vector<double> sum(static_cast<size_t>(d_count));
    const float softmax_scale = 1.0f / std::sqrt(static_cast<float>(d_count));
    for (int t = begin; t < begin + count; ++t) {
      const int visible = batch.positions[t] + 1;
      for (int head = g * group; head < (g + 1) * group; ++head) {
        const float* q = static_cast<const float*>(qkv) + t * row_size + int64_t{head} * d_count;
        float maximum = -INFINITY;
        for (int p = 0; p < visible; ++p) {
          scores[static_cast<size_t>(p)] =
              dot(q, k.data() + int64_t{p} * d_count, d_count) * softmax_scale;
          maximum = std::max(maximum, scores[static_cast<size_t>(p)]);
        }
        double total = 0;
        std::fill(sum.begin(), sum.end(), 0.0);
        for (int p = 0; p < visible; ++p) {
          const float weight = std::exp(scores[static_cast<size_t>(p)] - maximum);
          total += weight;
          const float* value = v.data() + int64_t{p} * d_count;
          for (int d = 0; d < d_count; ++d)
            sum[static_cast<size_t>(d)] += double{weight} * value[d];
        }
        float* out = y + (int64_t{t} * num_heads + head) * d_count;
        const float* scale = out_scale ? out_scale + int64_t{head} * d_count : nullptr;
        for (int d = 0; d < d_count; ++d) {
          out[d] =
              static_cast<float>(sum[static_cast<size_t>(d)] / total) * (scale ? scale[d] : 1.0f);
        }
      }
    }
  }

  const bool e4m3_;  // rounds what int4 linears read
  ThreadPool pool_;
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend(ActivationPrecision precision) {
  return std::make_unique<ReferenceBackend>(precision);
}

}  // namespace nibble
