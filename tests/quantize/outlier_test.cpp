// The outliers of a large model put into nano without changing what it computes: awq must lose
// about as much as on nano itself, where rounding to nearest loses far more. Few windows here;
// bench/quality has the full figures. SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "eval/evaluate.h"
#include "quantize/outlier_model.h"
#include "quantize/quantize_testing.h"
#include "quantize/quantizer.h"

namespace nibble {
namespace {

const fs::path kSource = NIBBLE_SOURCE_DIR;

std::vector<int32_t> ids_of(const char* name, size_t first, size_t count) {
  const std::string bytes = read_file(kSource / "tests" / "data" / "nano" / name);
  std::vector<int32_t> ids;
  for (size_t i = first; i < first + count; ++i) {
    ids.push_back(static_cast<uint8_t>(bytes[2 * i]) | static_cast<uint8_t>(bytes[2 * i + 1]) << 8);
  }
  return ids;
}

double perplexity(const fs::path& model) {
  LoadOptions options;
  options.build.kv_format = KvFormat::kF32;
  options.build.activation_precision = ActivationPrecision::kF32;
  SilentProgress silent;
  const LoadedModel loaded = load_model(model, options);
  return evaluate(loaded, ids_of("eval_dialog.u16", 0, 6 * 1024), {.context = 1024}, silent)
      .perplexity;
}

TEST(Outliers, AwqLosesNoMoreThanOnThePlainModel) {
  const testing_::TemporaryDirectory scratch;
  testing_::write_outlier_model(kSource / "models" / "nano", scratch / "outliers", 1);
  const double base = perplexity(kSource / "models" / "nano");
  EXPECT_NEAR(perplexity(scratch / "outliers") / base, 1, 1e-4) << "the tool changed the model";

  // Windows that are not evaluated.
  CalibrationData data;
  const std::vector<int32_t> ids = ids_of("eval_dialog.u16", 100 * 1024, 16 * 512);
  for (size_t i = 0; i < ids.size(); i += 512)
    data.sequences.emplace_back(ids.begin() + static_cast<long>(i),
                                ids.begin() + static_cast<long>(i + 512));
  data.tokens = static_cast<int64_t>(ids.size());
  const auto backend = make_backend("cpu:native", ActivationPrecision::kF32, 0);
  SilentProgress silent;
  // Rise of perplexity in points of a per cent.
  const auto rise = [&](const fs::path& model, QuantizeMethod method) {
    const auto source = open_hf(model);
    const fs::path out = scratch / (model.filename().string() + method_name(method));
    fs::create_directories(out);
    quantize(out, *source, backend.get(), &data, {.method = method}, silent);
    return 100 * (perplexity(out) / base - 1);
  };
  const fs::path plain = kSource / "models" / "nano", loud = scratch / "outliers";
  const double rtn_plain = rise(plain, QuantizeMethod::kRtn),
               rtn_loud = rise(loud, QuantizeMethod::kRtn),
               awq_plain = rise(plain, QuantizeMethod::kAwq),
               awq_loud = rise(loud, QuantizeMethod::kAwq);
  RecordProperty("rises", fmt::format("rtn {:.3f} {:.3f} awq {:.3f} {:.3f}", rtn_plain, rtn_loud,
                                      awq_plain, awq_loud));
  EXPECT_GT(rtn_loud, rtn_plain + 2) << "the outliers are too mild to test anything";
  EXPECT_LT(awq_loud, awq_plain + 0.4) << awq_plain;
  EXPECT_LT(awq_loud, rtn_loud / 2);
}

}  // namespace
}  // namespace nibble
