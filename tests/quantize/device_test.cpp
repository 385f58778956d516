// The device's path through the quantizer gives what the host's gives.
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>

#include "backends/reference/reference_backend.h"
#include "base/error.h"
#include "formats/synthetic.h"
#include "quantize/host_device.h"
#include "quantize/quantize_testing.h"
#include "quantize/quantizer.h"

namespace nibble {
namespace {

ModelSpec spec_of_two_layers() {
  ModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 256;
  spec.num_heads = 4;
  spec.num_kv_heads = 2;
  spec.head_dim = 64;
  spec.ffn_size = 512;
  spec.vocab_size = 320;
  spec.max_position = 256;
  return spec;
}

struct Quantized {
  QuantizeReport report;
  std::unique_ptr<WeightSource> checkpoint;
};

class Device : public testing::TestWithParam<int> {
 protected:
  Quantized run(Backend& backend, const QuantizeOptions& options) {
    const fs::path out = directory_.path() / std::to_string(count_++);
    fs::create_directories(out);
    SilentProgress progress;
    const CalibrationData data = testing_::random_calibration({90, 70, 96});
    Quantized result;
    result.report = quantize(out, *source_, &backend, &data, options, progress);
    result.checkpoint = open_checkpoint(out);
    return result;
  }
  std::unique_ptr<WeightSource> source_ = open_synthetic(spec_of_two_layers(), 5, /*int4=*/false);
  testing_::ScratchDirectory directory_;
  int count_ = 0;
};

TEST_P(Device, QuantizesAsTheHostDoes) {
  QuantizeOptions options;
  switch (GetParam()) {
    case 0: break;
    case 1: options.correct_drift = false; break;
    case 2: options.sequential = false, options.rounding = awq::Rounding::kNearest; break;
    case 4: options.lm_head = LmHeadFormat::kInt4; break;
    case 3: options.group_size = 64, options.max_gram_bytes = 256 * 64 * 4; break;
    default: options.method = QuantizeMethod::kRtn;
  }
  options.max_step_tokens = 100;
  const auto host_backend = make_reference_backend();
  testing_::HostDevice device_backend;
  const Quantized host = run(*host_backend, options), device = run(device_backend, options);
  ASSERT_EQ(host.report.linears.size(), device.report.linears.size());
  // Both see the same states in layer 0, where nothing differs but the order of sums. After it two
  // candidates for the scales may be as close as that, and whichever wins moves what follows.
  for (size_t i = 0; i < host.report.linears.size(); ++i) {
    const LinearReport &a = host.report.linears[i], &b = device.report.linears[i];
    EXPECT_EQ(a.name, b.name);
    const double close = a.name.starts_with("layers.0.") ? 0.002 : 0.05;
    EXPECT_NEAR(a.search.error, b.search.error, close * a.search.error) << a.name;
    EXPECT_NEAR(a.search.error_rtn, b.search.error_rtn, close * a.search.error_rtn) << a.name;
    EXPECT_NEAR(a.search.mean_clip, b.search.mean_clip, close) << a.name;
    EXPECT_NEAR(a.input.max_abs, b.input.max_abs, close * a.input.max_abs) << a.name;
  }
  for (size_t layer = 0; layer < 2; ++layer) {
    EXPECT_NEAR(host.report.kv_scales.k[layer], device.report.kv_scales.k[layer],
                0.01 * host.report.kv_scales.k[layer]);
    EXPECT_NEAR(host.report.kv_scales.v[layer], device.report.kv_scales.v[layer],
                0.01 * host.report.kv_scales.v[layer]);
  }
  for (const WeightRow& row : weight_table(source_->spec())) {
    if (quantized_bits(row, options.lm_head) == 0 || row.layer != 0) continue;
    const Int4Weight a = host.checkpoint->load_int4(row), b = device.checkpoint->load_int4(row);
    const int64_t bytes = row.shape[0] * row.shape[1] / 2;
    int64_t same = 0;
    for (int64_t i = 0; i < bytes; ++i) same += a.nibbles[i] == b.nibbles[i];
    EXPECT_GE(static_cast<double>(same), 0.98 * static_cast<double>(bytes)) << row.name;
  }
}
INSTANTIATE_TEST_SUITE_P(Options, Device, testing::Range(0, 6));

TEST_F(Device, RefusesWhatItCannotDo) {
  testing_::HostDevice device;
  EXPECT_THROW(run(device, {.method = QuantizeMethod::kAwqLite}), Error);
}

}  // namespace
}  // namespace nibble
