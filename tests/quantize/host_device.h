// A "device" made of the reference backend: its calibration ops are the host's own functions on
// copies, which makes them the specification of every other backend's.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "backends/reference/reference_backend.h"
#include "base/half.h"
#include "base/thread_pool.h"
#include "ops/backend.h"
#include "quantize/awq.h"
#include "quantize/rounding.h"

namespace nibble::testing_ {

class HostCalibrationOps final : public CalibrationOps {
 public:
  void clear(void* data, uint64_t bytes) override { std::memset(data, 0, bytes); }
  void add_product(const void* a, int64_t lda, const void* b, int64_t ldb, int64_t rows, int64_t m,
                   int64_t n, float* c, int64_t ldc) override {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += at(a, r * lda + i) * at(b, r * ldb + j);
      }
    }
  }
  void add_abs(const void* x, int64_t rows, int64_t features, double* sums,
               float* maximum) override {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < features; ++c) {
        const float value = std::fabs(at(x, r * features + c));
        sums[c] += double{value};
        *maximum = std::max(*maximum, value);
      }
    }
  }
  void add_range(const void* x, int64_t rows, int64_t stride, int64_t first, int64_t count,
                 float* maximum) override {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = first; c < first + count; ++c)
        *maximum = std::max(*maximum, std::fabs(at(x, r * stride + c)));
    }
  }
  void subtract(const void* a, const void* b, int64_t count, void* out) override {
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[i] = at(a, i) - at(b, i);
  }
  void combine(float alpha, float* y, float beta, const float* x, int64_t count) override {
    for (int64_t i = 0; i < count; ++i) y[i] = alpha * y[i] + (x != nullptr ? beta * x[i] : 0.0f);
  }
  double trace(const BlockMatrix& m) override {
    double sum = 0;
    for (int64_t j = 0; j < m.features; ++j) sum += double{m.values[j * m.block + j % m.block]};
    return sum;
  }
  void widen(const LinearOperand& w, float* out) override {
    const int64_t count = int64_t{w.out_features} * w.in_features;
    for (int64_t i = 0; i < count; ++i) {
      if (w.layout == WeightLayout::kF32Rows) {
        out[i] = static_cast<const float*>(w.weight)[i];
      } else {
        const uint16_t bits = static_cast<const uint16_t*>(w.weight)[i];
        out[i] = w.layout == WeightLayout::kBf16Rows ? bf16_to_float(bits) : f16_to_float(bits);
      }
    }
  }
  void add_weight_abs(const float* w, int64_t rows, int64_t features, double* sums) override {
    for (int64_t i = 0; i < rows * features; ++i) sums[i % features] += double{std::fabs(w[i])};
  }
  bool factor(const BlockMatrix& gram, float damping, float, float* factor,
              float* diagonal) override {
    std::vector<float> r, d;
    const float used = awq::factor_gram(pool_, copy(gram), damping, r, &d);
    std::copy(r.begin(), r.end(), factor);
    std::copy(d.begin(), d.end(), diagonal);
    return used == damping;
  }
  void multiply(const float* w, const BlockMatrix& m, int64_t rows, float* out) override {
    std::vector<double> sums(static_cast<size_t>(m.block));
    for (int64_t at = 0; at < rows * m.features; at += m.block) {
      const int64_t first = at % m.features;  // row of the block matrix
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t i = 0; i < m.block; ++i) {
        const float* row = m.values + (first + i) * m.block;
        for (int64_t j = 0; j < m.block; ++j)
          sums[static_cast<size_t>(j)] += double{w[at + i]} * double{row[j]};
      }
      std::transform(sums.begin(), sums.end(), out + at,
                     [](double sum) { return static_cast<float>(sum); });
    }
  }
  void solve(const BlockMatrix& f, const float* diagonal, int64_t rows, float* b) override {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t first = 0; first < f.features; first += f.block) {
        const float* m = f.values + first * f.block;
        float* x = b + r * f.features + first;
        for (int64_t j = 0; j < f.block; ++j) {
          for (int64_t i = 0; i < j; ++i) x[j] -= x[i] * m[i * f.block + j];
        }
        for (int64_t j = 0; j < f.block; ++j) x[j] /= diagonal[first + j];
        for (int64_t i = f.block - 1; i >= 0; --i) {
          for (int64_t j = i + 1; j < f.block; ++j) x[i] -= m[i * f.block + j] * x[j];
        }
      }
    }
  }
  void choose_scales(const DevicePanel& panel, const BlockMatrix& gram,
                     std::span<const float> ratios, DType dtype,
                     std::span<uint64_t> counts) override {
    // The host adds the chosen ratios up; one at a time it says which they were.
    for (int64_t r = 0; r < panel.rows; ++r) {
      for (int64_t g = 0; g < panel.features / panel.group; ++g) {
        awq::Panel one{.rows = 1,
                       .features = panel.group,
                       .group = panel.group,
                       .weight = panel.weight + r * panel.features + g * panel.group,
                       .pre = panel.pre + g * panel.group};
        const double ratio = awq::choose_scales(one, group_of(gram, g, panel.group), ratios, dtype);
        panel.scales[r * (panel.features / panel.group) + g] = one.scales[0];
        ++counts[static_cast<size_t>(
            std::find(ratios.begin(), ratios.end(), static_cast<float>(ratio)) - ratios.begin())];
      }
    }
  }
  void round_nearest(const DevicePanel& panel) override {
    awq::Panel p = open(panel);
    awq::round_nearest(p);
    close(p, panel);
  }
  void round_compensated(const DevicePanel& panel, const BlockMatrix& factor) override {
    awq::Panel p = open(panel);
    const awq::Gram shape = copy(factor);
    awq::round_compensated(p, shape, shape.values);
    close(p, panel);
  }
  void descend(const DevicePanel& panel, const BlockMatrix& gram, int sweeps,
               DType dtype) override {
    awq::Panel p = open(panel);
    awq::descend(p, copy(gram), sweeps, dtype);
    close(p, panel);
  }
  double loss(const DevicePanel& panel, const BlockMatrix& gram) override {
    awq::Panel p = open(panel);
    const double loss = awq::panel_loss(p, copy(gram));
    std::copy(p.product.begin(), p.product.end(), panel.product);
    return loss;
  }
  void results(const DevicePanel& panel, int8_t* ints, void* dense) override {
    for (int64_t i = 0; i < panel.rows * panel.features; ++i) {
      ints[i] = static_cast<int8_t>(panel.q[i]);
      const float step = panel.scales[i / panel.group] * panel.pre[i % panel.features];
      static_cast<float*>(dense)[i] = panel.q[i] * step;
    }
  }
  WeightLayout dense_layout() const override { return WeightLayout::kF32Rows; }

 private:
  static float at(const void* act, int64_t index) { return static_cast<const float*>(act)[index]; }
  static awq::Gram copy(const BlockMatrix& m) {
    return {m.features, m.block, {m.values, m.values + m.features * m.block}};
  }
  static awq::Gram group_of(const BlockMatrix& m, int64_t g, int64_t group) {
    awq::Gram gram{group, group, {}};
    const int64_t first = g * group, offset = first % m.block;
    for (int64_t i = 0; i < group; ++i) {
      const float* row = m.values + (first + i) * m.block + offset;
      gram.values.insert(gram.values.end(), row, row + group);
    }
    return gram;
  }
  static awq::Panel open(const DevicePanel& panel) {
    const int64_t size = panel.rows * panel.features;
    return {.rows = panel.rows,
            .features = panel.features,
            .group = panel.group,
            .weight = panel.weight,
            .pre = panel.pre,
            .scales = {panel.scales, panel.scales + size / panel.group},
            .q = {panel.q, panel.q + size},
            .error = {panel.error, panel.error + size},
            .product = {panel.product, panel.product + size}};
  }
  static void close(const awq::Panel& from, const DevicePanel& to) {
    std::copy(from.scales.begin(), from.scales.end(), to.scales);
    std::copy(from.q.begin(), from.q.end(), to.q);
    std::copy(from.error.begin(), from.error.end(), to.error);
    std::copy(from.product.begin(), from.product.end(), to.product);
  }
  ThreadPool pool_{1};
};

class HostDevice final : public Backend {
 public:
  std::string name() const override { return "host device"; }
  size_t act_bytes() const override { return sizeof(float); }
  void reserve(const ModelSpec& spec, const EngineLimits& limits, int rows) override {
    host_->reserve(spec, limits, rows);
  }
  Buffer alloc(size_t bytes) override {
    Buffer buffer = host_->alloc(bytes);
    std::memset(buffer.data(), 0xff, bytes);  // NaN: nothing may rest on what was there
    return buffer;
  }
  void free(void* data, size_t bytes) noexcept override { host_->free(data, bytes); }
  void upload(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void download(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void sync() override {}
  const void* import_weights(const std::byte* host, size_t) override { return host; }
  CalibrationOps* calibration_ops() override { return &ops_; }
  size_t kv_block_bytes(KvFormat format, int tokens, int heads, int head_dim) const override {
    return host_->kv_block_bytes(format, tokens, heads, head_dim);
  }
  void embed(const StepBatch& b, const LinearOperand& t, void* x) override {
    host_->embed(b, t, x);
  }
  void rms_norm(const void* x, const float* w, float eps, int rows, int hidden, void* y) override {
    host_->rms_norm(x, w, eps, rows, hidden, y);
  }
  void linear(const void* x, const LinearOperand& w, int rows, bool add, void* y) override {
    host_->linear(x, w, rows, add, y);
  }
  void gate_up(const void* x, const LinearOperand& g, const LinearOperand& u, int rows,
               const float* scale, void* y) override {
    host_->gate_up(x, g, u, rows, scale, y);
  }
  void rope_store_kv(const StepBatch& b, void* qkv, int heads, const RopeTable& rope,
                     const KvLayer& kv) override {
    host_->rope_store_kv(b, qkv, heads, rope, kv);
  }
  void attention(const StepBatch& b, const void* qkv, int heads, const KvLayer& kv,
                 const float* scale, void* y) override {
    host_->attention(b, qkv, heads, kv, scale, y);
  }
  void lm_head(const StepBatch& b, const void* x, const float* w, float eps,
               const LinearOperand& head, float* logits) override {
    host_->lm_head(b, x, w, eps, head, logits);
  }
  void sample(const SampleBatch& b, float* logits, const SampleResult& result) override {
    host_->sample(b, logits, result);
  }

 private:
  std::unique_ptr<Backend> host_ = make_reference_backend();
  HostCalibrationOps ops_;
};

}  // namespace nibble::testing_
