// Quantizing on the device against the host's own functions (quantize/host_device.h): each op of
// CalibrationOps, and a whole small model. Skipped where the plugin finds no GPU or no cuBLAS.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <map>

#include "backends/reference/reference_backend.h"
#include "base/error.h"
#include "base/half.h"
#include "bench/op_cases.h"
#include "build/cuda_plugin.h"
#include "formats/synthetic.h"
#include "ops/cpu_test_util.h"
#include "quantize/host_device.h"
#include "quantize/quantize_testing.h"
#include "quantize/quantizer.h"

namespace nibble::ops {
namespace {

using Floats = std::vector<float>;

Floats bf16_normal(size_t n, uint64_t seed) {
  Floats x(n);
  fill_normal(x, seed);
  round_to_bf16(x);
  return x;
}

class CudaCalibration : public testing::TestWithParam<const char*> {
 protected:
  struct Opened {
    std::unique_ptr<Backend> backend;
    std::string why_not;
  };
  static void TearDownTestSuite() { opened_.clear(); }
  void SetUp() override {
    const auto [it, is_new] = opened_.try_emplace(GetParam());
    if (is_new) {
      try {
        it->second.backend = open_cuda_backend(GetParam(), ActivationPrecision::kBf16);
        it->second.backend->calibration_ops();
      } catch (const Error& error) {
        it->second.backend.reset();
        it->second.why_not = error.what();
      }
    }
    cuda_ = it->second.backend.get();
    if (cuda_ == nullptr) GTEST_SKIP() << it->second.why_not;
    ops_ = cuda_->calibration_ops();
  }
  template <typename T>
  std::vector<T> download(const void* from, size_t count) {
    std::vector<T> out(count);
    cuda_->download(out.data(), from, count * sizeof(T));
    cuda_->sync();
    return out;
  }
  Backend* cuda_ = nullptr;
  CalibrationOps* ops_ = nullptr;
  testing_::HostCalibrationOps host_;

 private:
  static std::map<std::string, Opened> opened_;
};
std::map<std::string, CudaCalibration::Opened> CudaCalibration::opened_;
INSTANTIATE_TEST_SUITE_P(Targets, CudaCalibration, testing::Values("cuda:sm_90", "cuda:portable"),
                         [](const auto& info) {
                           return std::string(info.param).substr(std::string("cuda:").size());
                         });

struct Shape {
  int64_t rows, features, block, group;
};
// Odd numbers of rows, several blocks, both group sizes.
constexpr Shape kShapes[] = {{37, 256, 256, 128}, {70, 512, 256, 128}, {19, 384, 192, 64}};

/// X^T X / tokens of correlated channels of different loudness, cut to blocks.
Floats make_gram(const Shape& s, uint64_t seed) {
  const int64_t tokens = 2 * s.block;
  Floats x(static_cast<size_t>(tokens * s.features));
  fill_normal(x, seed);
  Floats gram(static_cast<size_t>(s.features * s.block), 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    float* row = x.data() + t * s.features;
    for (int64_t j = 1; j < s.features; ++j) row[j] = 0.8f * row[j] + 0.4f * row[j - 1];
    for (int64_t j = 0; j < s.features; ++j) row[j] *= 0.3f + static_cast<float>(j * 37 % 11) / 5;
    for (int64_t i = 0; i < s.features; ++i) {
      const int64_t first = i / s.block * s.block;
      for (int64_t j = 0; j < s.block; ++j)
        gram[static_cast<size_t>(i * s.block + j)] +=
            row[i] * row[first + j] / static_cast<float>(tokens);
    }
  }
  return gram;
}

/// The same panel and Gram matrix on the device and on the host.
class Panels {
 public:
  Panels(Backend& cuda, const Shape& s, uint64_t seed)
      : cuda_(cuda),
        shape_(s),
        size_(static_cast<size_t>(s.rows * s.features)),
        gram_(make_gram(s, seed)) {
    weight_.resize(size_);
    fill_normal(weight_, seed + 1);
    pre_ = bf16_normal(static_cast<size_t>(s.features), seed + 2);
    for (float& p : pre_) p = bf16_to_float(float_to_bf16(std::exp(0.3f * p)));
    scales_.resize(size_ / static_cast<size_t>(s.group));
    q_.resize(size_), error_.resize(size_), product_.resize(size_);
    for (Floats* values : {&gram_, &weight_, &pre_, &scales_, &q_, &error_, &product_})
      device_.push_back(to_device(cuda, *values));
  }
  DevicePanel host() {
    return panel(weight_.data(), pre_.data(), scales_.data(), q_.data(), error_.data(),
                 product_.data());
  }
  DevicePanel device() {
    return panel(device_[1].as<float>(), device_[2].as<float>(), device_[3].as<float>(),
                 device_[4].as<float>(), device_[5].as<float>(), device_[6].as<float>());
  }
  BlockMatrix host_gram() const { return {gram_.data(), shape_.features, shape_.block}; }
  BlockMatrix device_gram() const {
    return {device_[0].as<float>(), shape_.features, shape_.block};
  }
  /// Scales, integers and error of the host's panel to the device.
  void copy_rounding() {
    int i = 3;
    for (const Floats* values : {&scales_, &q_, &error_})
      cuda_.upload(device_[static_cast<size_t>(i++)].data(), values->data(),
                   values->size() * sizeof(float));
    cuda_.sync();
  }
  const Floats& scales() const { return scales_; }
  const Floats& q() const { return q_; }
  const Floats& error() const { return error_; }
  const Floats& weight() const { return weight_; }
  const Floats& pre() const { return pre_; }

 private:
  DevicePanel panel(const float* weight, const float* pre, float* scales, float* q, float* error,
                    float* product) const {
    return {.rows = shape_.rows,
            .features = shape_.features,
            .group = shape_.group,
            .weight = weight,
            .pre = pre,
            .scales = scales,
            .q = q,
            .error = error,
            .product = product};
  }
  Backend& cuda_;
  Shape shape_;
  size_t size_;
  Floats gram_, weight_, pre_, scales_, q_, error_, product_;
  std::vector<Buffer> device_;
};

double share_equal(const Floats& a, const Floats& b) {
  size_t same = 0;
  for (size_t i = 0; i < a.size(); ++i) same += a[i] == b[i];
  return static_cast<double>(same) / static_cast<double>(a.size());
}

/// error = weight - q scale pre.
void expect_error_fits(const Panels& p, const Shape& s, const Floats& scales, const Floats& q,
                       const Floats& error) {
  for (size_t i = 0; i < q.size(); ++i) {
    const float step =
        scales[i / static_cast<size_t>(s.group)] * p.pre()[i % static_cast<size_t>(s.features)];
    ASSERT_NEAR(error[i], p.weight()[i] - q[i] * step, 1e-5f) << i;
    ASSERT_TRUE(q[i] >= -8 && q[i] <= 7 && q[i] == std::nearbyint(q[i])) << i;
  }
}

TEST_P(CudaCalibration, Statistics) {
  constexpr int64_t kRows = 75, kFeatures = 200;
  constexpr size_t kSize = kRows * kFeatures;
  const Floats x = bf16_normal(kSize, 1), y = bf16_normal(kSize, 2);
  const Buffer dx = acts_to_device(*cuda_, x), dy = acts_to_device(*cuda_, y);

  // A rectangle out of wider rows, added to what is there.
  constexpr int64_t kM = 64, kN = 56;
  Floats c(kM * kFeatures, 0.5f);
  const Buffer dc = to_device(*cuda_, c);
  ops_->add_product(dx.as<uint16_t>() + 8, kFeatures, dy.as<uint16_t>() + 16, kFeatures, kRows, kM,
                    kN, dc.as<float>() + 4, kFeatures);
  host_.add_product(x.data() + 8, kFeatures, y.data() + 16, kFeatures, kRows, kM, kN, c.data() + 4,
                    kFeatures);
  EXPECT_LT(relative_error(download<float>(dc.data(), c.size()), c), 1e-5);

  std::vector<double> sums(kFeatures, 0.25);
  float maxima[2] = {0.5f, 0.5f};
  const Buffer dsums = to_device(*cuda_, sums), dmaxima = to_device(*cuda_, maxima, sizeof maxima);
  ops_->add_abs(dx.data(), kRows, kFeatures, dsums.as<double>(), dmaxima.as<float>());
  ops_->add_range(dx.data(), kRows, kFeatures, 30, 41, dmaxima.as<float>() + 1);
  host_.add_abs(x.data(), kRows, kFeatures, sums.data(), maxima);
  host_.add_range(x.data(), kRows, kFeatures, 30, 41, maxima + 1);
  const auto got = download<double>(dsums.data(), sums.size());
  for (size_t i = 0; i < sums.size(); ++i) EXPECT_NEAR(got[i], sums[i], 1e-9) << i;
  EXPECT_EQ(download<float>(dmaxima.data(), 2), (Floats{maxima[0], maxima[1]}));

  Floats difference(kSize);
  host_.subtract(x.data(), y.data(), kSize, difference.data());
  round_to_bf16(difference);
  const Buffer dd = cuda_->alloc(2 * kSize);
  ops_->subtract(dx.data(), dy.data(), kSize, dd.data());
  const auto bits = download<uint16_t>(dd.data(), kSize);
  for (size_t i = 0; i < kSize; ++i) EXPECT_EQ(bf16_to_float(bits[i]), difference[i]) << i;

  Floats widened(kSize);
  const Buffer dw = cuda_->alloc(4 * kSize);
  ops_->widen({.layout = WeightLayout::kBf16Rows,
               .out_features = kRows,
               .in_features = kFeatures,
               .weight = dx.data()},
              dw.as<float>());
  EXPECT_EQ(download<float>(dw.data(), kSize), x);
  ops_->add_weight_abs(dw.as<float>(), kRows, kFeatures, dsums.as<double>());
  host_.add_weight_abs(x.data(), kRows, kFeatures, sums.data());
  const auto more = download<double>(dsums.data(), sums.size());
  for (size_t i = 0; i < sums.size(); ++i) EXPECT_NEAR(more[i], sums[i], 1e-9) << i;

  Floats combined = x;
  host_.combine(0.25f, combined.data(), -2, y.data(), kSize);
  const Buffer dyf = to_device(*cuda_, y);
  ops_->combine(0.25f, dw.as<float>(), -2, dyf.as<float>(), kSize);
  EXPECT_LT(relative_error(download<float>(dw.data(), kSize), combined), 1e-6);
  ops_->combine(3, dw.as<float>(), 0, nullptr, kSize);
  host_.combine(3, combined.data(), 0, nullptr, kSize);
  EXPECT_LT(relative_error(download<float>(dw.data(), kSize), combined), 1e-6);
  ops_->clear(dw.data(), 4 * kSize);
  EXPECT_EQ(download<float>(dw.data(), kSize), Floats(kSize, 0.0f));
}

TEST_P(CudaCalibration, FactorSolveAndMultiply) {
  for (const Shape& s : kShapes) {
    Panels p(*cuda_, s, 11);
    EXPECT_NEAR(ops_->trace(p.device_gram()), host_.trace(p.host_gram()),
                1e-6 * host_.trace(p.host_gram()));
    const auto size = static_cast<size_t>(s.features * s.block);
    Floats factor(size), diagonal(static_cast<size_t>(s.features));
    const Buffer df = cuda_->alloc(size * 4), dd = cuda_->alloc(diagonal.size() * 4);
    ASSERT_TRUE(host_.factor(p.host_gram(), 0.01f, 1e-6f, factor.data(), diagonal.data()));
    ASSERT_TRUE(ops_->factor(p.device_gram(), 0.01f, 1e-6f, df.as<float>(), dd.as<float>()));
    EXPECT_LT(relative_error(download<float>(dd.data(), diagonal.size()), diagonal), 1e-3);
    const Floats got = download<float>(df.data(), size);
    for (int64_t i = 0; i < s.features; ++i) {
      for (int64_t j = i % s.block; j < s.block; ++j) {
        const auto at = static_cast<size_t>(i * s.block + j);
        ASSERT_NEAR(got[at], factor[at], 1e-3) << i << ", " << j;
      }
    }
    Floats product(p.weight().size());
    const Buffer dp = cuda_->alloc(product.size() * 4);
    host_.multiply(p.weight().data(), p.host_gram(), s.rows, product.data());
    ops_->multiply(p.device().weight, p.device_gram(), s.rows, dp.as<float>());
    EXPECT_LT(relative_error(download<float>(dp.data(), product.size()), product), 1e-4);
    cuda_->upload(dp.data(), product.data(), product.size() * 4);
    host_.solve({factor.data(), s.features, s.block}, diagonal.data(), s.rows, product.data());
    ops_->solve({df.as<float>(), s.features, s.block}, dd.as<float>(), s.rows, dp.as<float>());
    EXPECT_LT(rms_error(download<float>(dp.data(), product.size()), product), 1e-3);

    // Two equal channels without damping: no factor.
    Floats singular(size, 1.0f);
    const Buffer ds = to_device(*cuda_, singular);
    EXPECT_FALSE(
        ops_->factor({ds.as<float>(), s.features, s.block}, 0, 0, df.as<float>(), dd.as<float>()));
  }
}

TEST_P(CudaCalibration, Rounding) {
  const std::vector<float> one = {1.0f}, several = {1.05f, 1.0f, 0.9f, 0.8f, 0.7f};
  for (const Shape& s : kShapes) {
    Panels p(*cuda_, s, 21);
    const size_t scales = p.scales().size(), size = p.q().size();
    for (const auto& ratios : {one, several}) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) {
        std::vector<uint64_t> counts(ratios.size(), 1), host_counts(ratios.size(), 1);
        host_.choose_scales(p.host(), p.host_gram(), ratios, dtype, host_counts);
        ops_->choose_scales(p.device(), p.device_gram(), ratios, dtype, counts);
        EXPECT_GE(share_equal(download<float>(p.device().scales, scales), p.scales()), 0.97);
        uint64_t sum = 0;
        for (size_t i = 0; i < counts.size(); ++i) {
          sum += counts[i] - 1;
          EXPECT_NEAR(static_cast<double>(counts[i]), static_cast<double>(host_counts[i]),
                      0.03 * static_cast<double>(scales) + 1);
        }
        EXPECT_EQ(sum, scales);
      }
    }
    host_.round_nearest(p.host());
    p.copy_rounding();
    ops_->round_nearest(p.device());
    Floats q = download<float>(p.device().q, size);
    EXPECT_GE(share_equal(q, p.q()), 0.999);
    expect_error_fits(p, s, p.scales(), q, download<float>(p.device().error, size));
    // tf32 rounds both operands to 10 bits.
    const double nearest = host_.loss(p.host(), p.host_gram());
    EXPECT_NEAR(ops_->loss(p.device(), p.device_gram()), nearest, 2e-3 * nearest);

    Floats factor(static_cast<size_t>(s.features * s.block)),
        diagonal(static_cast<size_t>(s.features));
    ASSERT_TRUE(host_.factor(p.host_gram(), 0.01f, 1e-6f, factor.data(), diagonal.data()));
    const Buffer df = to_device(*cuda_, factor);
    host_.round_compensated(p.host(), {factor.data(), s.features, s.block});
    ops_->round_compensated(p.device(), {df.as<float>(), s.features, s.block});
    q = download<float>(p.device().q, size);
    EXPECT_GE(share_equal(q, p.q()), 0.95);
    expect_error_fits(p, s, p.scales(), q, download<float>(p.device().error, size));
    const double compensated = host_.loss(p.host(), p.host_gram());
    EXPECT_LT(compensated, nearest);
    EXPECT_NEAR(ops_->loss(p.device(), p.device_gram()), compensated, 0.02 * compensated);

    p.copy_rounding();
    host_.descend(p.host(), p.host_gram(), 3, DType::kBF16);
    ops_->descend(p.device(), p.device_gram(), 3, DType::kBF16);
    q = download<float>(p.device().q, size);
    EXPECT_GE(share_equal(q, p.q()), 0.97);
    const Floats moved = download<float>(p.device().scales, scales);
    expect_error_fits(p, s, moved, q, download<float>(p.device().error, size));
    const double descended = host_.loss(p.host(), p.host_gram());
    EXPECT_LT(descended, compensated);
    EXPECT_NEAR(ops_->loss(p.device(), p.device_gram()), descended, 0.01 * descended);

    const Buffer ints = cuda_->alloc(size), dense = cuda_->alloc(2 * size);
    ops_->results(p.device(), ints.as<int8_t>(), dense.data());
    const auto values = download<int8_t>(ints.data(), size);
    const auto rows = download<uint16_t>(dense.data(), size);
    for (size_t i = 0; i < size; ++i) {
      ASSERT_EQ(static_cast<float>(values[i]), q[i]);
      const float step =
          moved[i / static_cast<size_t>(s.group)] * p.pre()[i % static_cast<size_t>(s.features)];
      ASSERT_EQ(bf16_to_float(rows[i]), bf16_to_float(float_to_bf16(q[i] * step)));
    }
  }
}

TEST_P(CudaCalibration, DenseLinear) {
  const auto reference = make_reference_backend();
  constexpr int kRows = 45, kK = 136, kN = 72;
  const Floats x = bf16_normal(kRows * kK, 3), w = bf16_normal(kN * kK, 4),
               y = bf16_normal(kRows * kN, 5);
  const Buffer dw = acts_to_device(*cuda_, w), dx = acts_to_device(*cuda_, x);
  LinearOperand host{.out_features = kN, .in_features = kK, .weight = w.data()};
  LinearOperand device = host;
  device.layout = WeightLayout::kBf16Rows;
  device.weight = dw.data();
  for (const bool add : {false, true}) {
    Floats wanted = y;
    reference->linear(x.data(), host, kRows, add, wanted.data());
    GuardedOutput out(*cuda_, wanted.size(), cuda_->act_bytes());
    if (add) out.fill(y);
    cuda_->linear(dx.data(), device, kRows, add, out.data());
    EXPECT_LT(rms_error(out.read(), wanted), 0.01);
  }
}

TEST_P(CudaCalibration, QuantizesAsTheHostDoes) {
  ModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 256;
  spec.num_heads = 2;
  spec.num_kv_heads = 1;
  spec.head_dim = 128;
  spec.ffn_size = 512;
  spec.vocab_size = 320;
  spec.max_position = 256;
  const auto source = open_synthetic(spec, 5, /*int4=*/false);
  const CalibrationData data = testing_::random_calibration({130, 70, 200});
  const testing_::ScratchDirectory directory;
  SilentProgress progress;
  QuantizeOptions options;
  options.lm_head = LmHeadFormat::kInt4;
  options.max_step_tokens = 180;  // a sequence in parts too
  const auto host = make_reference_backend();
  fs::create_directories(directory.path() / "host");
  fs::create_directories(directory.path() / "device");
  const QuantizeReport wanted =
      quantize(directory.path() / "host", *source, host.get(), &data, options, progress);
  const QuantizeReport got =
      quantize(directory.path() / "device", *source, cuda_, &data, options, progress);
  ASSERT_EQ(wanted.linears.size(), got.linears.size());
  // bf16 activations and an int8 cache beside f32; the tiny model is no more than noise to round.
  for (size_t i = 0; i < wanted.linears.size(); ++i) {
    const LinearReport &a = wanted.linears[i], &b = got.linears[i];
    EXPECT_EQ(a.name, b.name);
    EXPECT_NEAR(b.search.error, a.search.error, 0.1 * a.search.error) << a.name;
    EXPECT_NEAR(b.search.error_rtn, a.search.error_rtn, 0.1 * a.search.error_rtn) << a.name;
    EXPECT_NEAR(b.search.mean_clip, a.search.mean_clip, 0.03) << a.name;
    EXPECT_NEAR(b.input.max_abs, a.input.max_abs, 0.1 * a.input.max_abs) << a.name;
  }
  for (size_t layer = 0; layer < 2; ++layer) {
    EXPECT_NEAR(got.kv_scales.k[layer], wanted.kv_scales.k[layer],
                0.05 * wanted.kv_scales.k[layer]);
    EXPECT_NEAR(got.kv_scales.v[layer], wanted.kv_scales.v[layer],
                0.05 * wanted.kv_scales.v[layer]);
  }
}

}  // namespace
}  // namespace nibble::ops
