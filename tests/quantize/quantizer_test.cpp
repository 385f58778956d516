// The whole way from a dense model to a checkpoint and back, on small random models and the
// reference backend. SPDX-License-Identifier: Apache-2.0
#include "quantize/quantizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <cmath>
#include <random>

#include "backends/reference/reference_backend.h"
#include "base/error.h"
#include "formats/synthetic.h"
#include "quantize/layer_stream.h"
#include "quantize/quantize_testing.h"

namespace nibble {
namespace {

using testing::HasSubstr;

ModelSpec tiny_spec() {
  ModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 128;
  spec.num_heads = 4;
  spec.num_kv_heads = 2;
  spec.head_dim = 32;
  spec.ffn_size = 256;
  spec.vocab_size = 320;
  spec.max_position = 256;
  return spec;
}

using testing_::random_calibration;

class Quantize : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = fs::temp_directory_path() / fmt::format("nibble_quantize_{}", ::getpid());
    fs::remove_all(directory_);
    fs::create_directories(directory_);
  }
  void TearDown() override { fs::remove_all(directory_); }

  fs::path fresh() {
    const fs::path path = directory_ / std::to_string(count_++);
    fs::create_directories(path);
    return path;
  }
  QuantizeReport run(const fs::path& out, const QuantizeOptions& options,
                     const CalibrationData& data = random_calibration({40, 40, 25})) {
    SilentProgress progress;
    return quantize(out, *source_, backend_.get(), &data, options, progress);
  }

  std::unique_ptr<WeightSource> source_ = open_synthetic(tiny_spec(), 11, /*int4=*/false);
  std::unique_ptr<Backend> backend_ = make_reference_backend();
  fs::path directory_;
  int count_ = 0;
};

TEST_F(Quantize, WritesACheckpointWhoseWeightsAreCloseToTheModels) {
  const fs::path out = fresh();
  // Nearest: compensation trades closeness of the weights for closeness of the outputs, and 105
  // tokens leave most directions of the input free.
  const QuantizeReport report =
      run(out, {.rounding = awq::Rounding::kNearest, .sequential = false});
  const auto checkpoint = open_checkpoint(out);
  EXPECT_EQ(checkpoint->spec().hidden_size, 128);
  size_t rows = 0;
  for (const WeightRow& row : weight_table(source_->spec())) {
    ASSERT_EQ(checkpoint->bits(row), quantized_bits(row)) << row.name;
    if (quantized_bits(row) == 0) continue;
    ASSERT_EQ(report.linears.at(rows++).name, row.name);
    const std::vector<float> dense = source_->load_dense(row);
    const Int4Weight weight = checkpoint->load_int4(row);
    double error = 0, energy = 0;
    for (int64_t n = 0; n < row.shape[0]; ++n) {
      for (int64_t j = 0; j < row.shape[1]; ++j) {
        const int byte = static_cast<int>(weight.nibbles[n / 2 * row.shape[1] + j]);
        const int nibble = n % 2 == 0 ? byte & 15 : byte >> 4;
        const double q = nibble >= 8 ? nibble - 16 : nibble;
        const double value =
            q * double{weight.scales[static_cast<size_t>(n * (row.shape[1] / 128) + j / 128)]} *
            double{weight.pre_scale[static_cast<size_t>(j)]};
        const double w = double{dense[static_cast<size_t>(n * row.shape[1] + j)]};
        error += (value - w) * (value - w);
        energy += w * w;
      }
    }
    EXPECT_LT(error / energy, 0.03) << row.name;
    EXPECT_GT(error, 0) << row.name;
  }
  EXPECT_EQ(rows, 10u);
  const json::object config = parse_json(read_file(out / "config.json"), "config.json").as_object();
  EXPECT_EQ(config.at("nibble").at("method"), "awq");
  EXPECT_EQ(config.at("nibble").at("calibration").at("tokens"), 105);
}

TEST_F(Quantize, GateAndUpShareTheirPreScaleAndQkvHasOne) {
  const fs::path out = fresh();
  run(out, {});
  const auto checkpoint = open_checkpoint(out);
  const std::vector<WeightRow> table = weight_table(source_->spec());
  for (size_t i = 0; i + 1 < table.size(); ++i) {
    if (table[i].role != WeightRole::kGate) continue;
    EXPECT_EQ(checkpoint->load_int4(table[i]).pre_scale,
              checkpoint->load_int4(table[i + 1]).pre_scale);
  }
}

TEST_F(Quantize, TheResultDependsOnNeitherThreadsNorSteps) {
  // Step boundaries change how tokens reach the Gram sums, so only same steps are compared bitwise.
  const fs::path a = fresh(), b = fresh(), c = fresh();
  run(a, {.num_threads = 1});
  run(b, {.num_threads = 3});
  EXPECT_EQ(read_file(a / "rank0.safetensors"), read_file(b / "rank0.safetensors"));
  run(c, {.rounding = awq::Rounding::kNearest, .num_threads = 3});
  EXPECT_NE(read_file(a / "rank0.safetensors"), read_file(c / "rank0.safetensors"));
}

TEST_F(Quantize, StepsOfAnySizeCarryTheSameStates) {
  const CalibrationData data = random_calibration({50, 7, 33, 64});
  std::vector<std::vector<float>> taps;  // of the last layer's down input, by step setting
  for (const auto& [batch, tokens] : {std::pair{1, 8192}, {4, 8192}, {2, 40}, {3, 13}}) {
    LayerStream stream(*backend_, *source_, data.sequences, batch, tokens);
    EXPECT_EQ(stream.num_tokens(), 154);
    auto& tap = taps.emplace_back();
    for (int layer = 0; layer < 2; ++layer) {
      const StreamedLayer weights(*backend_, *source_, layer);
      const auto keep_last = [&](Tap what, const void* act, int rows, int cols) {
        const auto* x = static_cast<const float*>(act);
        if (layer == 1 && what == Tap::kDownInput)
          tap.insert(tap.end(), x, x + int64_t{rows} * cols);
      };
      stream.run(layer, weights.weights(), keep_last, true, [](int64_t) {});
    }
    ASSERT_EQ(tap.size(), 154u * 256);
    EXPECT_EQ(tap, taps[0]) << batch << " sequences, " << tokens << " tokens a step";
  }
}

TEST_F(Quantize, KvScalesAreTheRangesOfRotatedKAndOfV) {
  const CalibrationData data = random_calibration({30, 20});
  const fs::path out = fresh();
  const QuantizeReport report = run(out, {.method = QuantizeMethod::kRtn}, data);
  const std::optional<KvScales> scales = open_checkpoint(out)->kv_scales();
  ASSERT_TRUE(scales.has_value());
  EXPECT_EQ(scales->k, report.kv_scales.k);

  LayerStream stream(*backend_, *source_, data.sequences, 16, 8192);
  for (int layer = 0; layer < 2; ++layer) {
    const StreamedLayer weights(*backend_, *source_, layer);
    float k = 0, v = 0;
    const auto listen = [&](Tap what, const void* act, int rows, int cols) {
      const auto* x = static_cast<const float*>(act);
      if (what != Tap::kRotatedQkv) return;
      ASSERT_EQ(cols, (4 + 2 + 2) * 32);
      for (int r = 0; r < rows; ++r) {
        for (int c = 128; c < 192; ++c) k = std::max(k, std::fabs(x[r * cols + c]));
        for (int c = 192; c < 256; ++c) v = std::max(v, std::fabs(x[r * cols + c]));
      }
    };
    stream.run(layer, weights.weights(), listen, true, [](int64_t) {});
    EXPECT_FLOAT_EQ(scales->k[static_cast<size_t>(layer)], k / 127);
    EXPECT_FLOAT_EQ(scales->v[static_cast<size_t>(layer)], v / 127);
  }
}

TEST_F(Quantize, RtnWithoutKvScalesNeedsNoCalibration) {
  const QuantizeOptions options = {
      .method = QuantizeMethod::kRtn, .dtype = DType::kF16, .int8_kv = false};
  ASSERT_FALSE(needs_calibration(options));
  const fs::path out = fresh();
  SilentProgress progress;
  quantize(out, *source_, nullptr, nullptr, options, progress);
  const auto checkpoint = open_checkpoint(out);
  EXPECT_FALSE(checkpoint->kv_scales().has_value());
  const WeightRow row = weight_table(source_->spec())[2];
  ASSERT_EQ(row.name, "layers.0.qkv");
  const std::vector<float> dense = source_->load_dense(row);
  float widest = 0;
  for (int64_t j = 0; j < 128; ++j)
    widest = std::max(widest, std::fabs(dense[static_cast<size_t>(j)]));
  EXPECT_EQ(checkpoint->load_int4(row).scales[0], widest / 7.0f);
}

TEST_F(Quantize, SequentialCalibrationSeesTheQuantizedLayersBefore) {
  const QuantizeReport apart = run(fresh(), {.sequential = false}),
                       after = run(fresh(), {.sequential = true});
  for (size_t i = 0; i < apart.linears.size(); ++i) {
    const bool first_layer = apart.linears[i].name.starts_with("layers.0.");
    EXPECT_EQ(apart.linears[i].input.max_abs == after.linears[i].input.max_abs, first_layer)
        << apart.linears[i].name;
  }
}

TEST_F(Quantize, ReportsTheSearch) {
  const QuantizeReport report = run(fresh(), {});
  for (const LinearReport& linear : report.linears) {
    EXPECT_GT(linear.search.error, 0) << linear.name;
    EXPECT_LT(linear.search.error, linear.search.error_rtn) << linear.name;
    EXPECT_GT(linear.input.max_abs, 0) << linear.name;
    EXPECT_GE(linear.input.loudest_channel_mean, linear.input.median_channel);
    EXPECT_GT(linear.pre_scale_min, 0);
  }
  const json::object object = report.to_json();
  EXPECT_EQ(object.at("linears").as_array().size(), 10u);
  EXPECT_EQ(object.at("kv_scales").at("k").as_array().size(), 2u);
}

// The layers' files as a run that was killed after the first layer leaves them.
TEST_F(Quantize, GoesOnAfterAKillWithTheSameBytes) {
  for (const QuantizeMethod method :
       {QuantizeMethod::kAwq, QuantizeMethod::kAwqLite, QuantizeMethod::kRtn}) {
    const fs::path whole = fresh(), kept = fresh(), again = fresh();
    QuantizeOptions options = {.method = method, .sequential = method == QuantizeMethod::kAwq};
    options.lm_head = LmHeadFormat::kInt4;
    const QuantizeReport first = run(whole, options);
    options.resume_directory = kept;
    run(fresh(), options);
    ASSERT_TRUE(fs::exists(kept / "layer-1.safetensors"));
    EXPECT_FALSE(fs::exists(kept / "states-0.safetensors")) << "only the last states are kept";

    // Killed after layer 0: its states are there again and the second layer is not.
    fs::remove_all(kept);
    options.resume_directory = kept;
    struct Killed {};
    class KillAfter : public Progress {
     public:
      explicit KillAfter(fs::path layer) : layer_(std::move(layer)) {}
      void begin(std::string_view, int64_t, std::string_view) override {}
      void advance(int64_t) override {
        if (fs::exists(layer_)) throw Killed();
      }
      void end() override {}
      void note(std::string_view) override {}

     private:
      fs::path layer_;
    } kill(kept / "layer-0.safetensors");
    const CalibrationData data = random_calibration({40, 40, 25});
    EXPECT_THROW(quantize(fresh(), *source_, backend_.get(), &data, options, kill), Killed);
    ASSERT_FALSE(fs::exists(kept / "layer-1.safetensors"));
    const QuantizeReport resumed = run(again, options);
    EXPECT_EQ(resumed.layers_continued, 1);
    EXPECT_EQ(read_file(whole / "rank0.safetensors"), read_file(again / "rank0.safetensors"));
    EXPECT_EQ(read_file(whole / "config.json"), read_file(again / "config.json"));
    ASSERT_EQ(resumed.linears.size(), first.linears.size());
    for (size_t i = 0; i < first.linears.size(); ++i) {
      EXPECT_EQ(resumed.linears[i].name, first.linears[i].name);
      EXPECT_NEAR(resumed.linears[i].search.error, first.linears[i].search.error, 1e-12);
      EXPECT_EQ(resumed.linears[i].input.max_abs, first.linears[i].input.max_abs);
    }

    // All layers done, and killed while lm_head was on its way.
    const fs::path end = fresh();
    const QuantizeReport only_head = run(end, options);
    EXPECT_EQ(only_head.layers_continued, 2);
    EXPECT_EQ(read_file(whole / "rank0.safetensors"), read_file(end / "rank0.safetensors"));

    // Other arguments must not go on with it, and damaged states are found.
    options.group_size = 64;
    try {
      run(fresh(), options);
      ADD_FAILURE() << "continued with another group size";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kUsage);
      EXPECT_THAT(error.what(), HasSubstr("begun with group_size 128, now it is 64"));
    }
  }
}

// Mean squared error of lm_head in the checkpoint over its energy; the pre-scale counts.
double head_error(const WeightSource& checkpoint, const WeightSource& dense) {
  const WeightRow row = weight_table(checkpoint.spec()).back();
  const std::vector<float> want = dense.load_dense(row);
  double error = 0, energy = 0;
  const int64_t in = row.shape[1];
  const auto add = [&](int64_t i, double value) {
    const double w = double{want[static_cast<size_t>(i)]};
    error += (value - w) * (value - w);
    energy += w * w;
  };
  if (checkpoint.bits(row) == 8) {
    const Int8Weight head = checkpoint.load_int8(row);
    for (int64_t i = 0; i < row.shape[0] * in; ++i) {
      add(i, static_cast<int8_t>(head.values[i]) *
                 double{head.scales[static_cast<size_t>(i / in * (in / head.group_size) +
                                                        i % in / head.group_size)]});
    }
    return error / energy;
  }
  const Int4Weight head = checkpoint.load_int4(row);
  for (int64_t i = 0; i < row.shape[0] * in; ++i) {
    const int64_t n = i / in, j = i % in;
    const int byte = static_cast<int>(head.nibbles[n / 2 * in + j]);
    const int nibble = n % 2 == 0 ? byte & 15 : byte >> 4;
    add(i, (nibble >= 8 ? nibble - 16 : nibble) *
               double{head.scales[static_cast<size_t>(n * (in / head.group_size) +
                                                      j / head.group_size)]} *
               double{head.pre_scale[static_cast<size_t>(j)]});
  }
  return error / energy;
}

TEST_F(Quantize, LmHeadTooOnRequest) {
  ModelSpec odd = tiny_spec();
  odd.vocab_size = 321;  // no pair for the last row
  source_ = open_synthetic(odd, 11, false);
  for (const QuantizeMethod method :
       {QuantizeMethod::kAwq, QuantizeMethod::kAwqLite, QuantizeMethod::kRtn}) {
    QuantizeOptions options = {.method = method, .rounding = awq::Rounding::kNearest};
    options.correct_drift = false;
    const fs::path plain = fresh(), four = fresh(), eight = fresh();
    const size_t num_linears = run(plain, options).linears.size();
    options.lm_head = LmHeadFormat::kInt4;
    const QuantizeReport report = run(four, options);
    options.lm_head = LmHeadFormat::kInt8;
    EXPECT_EQ(run(eight, options).linears.size(), num_linears) << "8 bits are not searched";
    if (method != QuantizeMethod::kRtn) {
      ASSERT_EQ(report.linears.size(), num_linears + 1);
      EXPECT_EQ(report.linears.back().name, "lm_head");
      EXPECT_GT(report.linears.back().search.error, 0);
      EXPECT_GT(report.linears.back().input.max_abs, 0);
    }
    EXPECT_LT(head_error(*open_checkpoint(four), *source_), 0.03) << method_name(method);
    EXPECT_LT(head_error(*open_checkpoint(eight), *source_), 1e-4) << method_name(method);
    // Nothing before lm_head knows of it.
    const auto before = open_checkpoint(plain), after = open_checkpoint(four);
    for (const WeightRow& row : weight_table(odd)) {
      if (quantized_bits(row) == 0) continue;
      EXPECT_EQ(before->load_int4(row).scales, after->load_int4(row).scales) << row.name;
    }
  }
}

TEST_F(Quantize, ATiedLmHeadBecomesATensorOfItsOwn) {
  ModelSpec tied = tiny_spec();
  tied.tied_embeddings = true;
  source_ = open_synthetic(tied, 11, false);
  for (const LmHeadFormat format : {LmHeadFormat::kInt4, LmHeadFormat::kInt8}) {
    const fs::path out = fresh();
    run(out, {.method = QuantizeMethod::kRtn, .lm_head = format});
    const auto checkpoint = open_checkpoint(out);
    EXPECT_FALSE(checkpoint->spec().tied_embeddings);
    const std::vector<WeightRow> table = weight_table(checkpoint->spec());
    EXPECT_EQ(checkpoint->load_dense(table.front()), source_->load_dense(table.front()));
    EXPECT_EQ(checkpoint->bits(table.back()), format == LmHeadFormat::kInt8 ? 8 : 4);
    // Row 5 begins with what the embedding's row 5 holds.
    const std::vector<float> embedding = source_->load_dense(table.front());
    const float scale = format == LmHeadFormat::kInt8
                            ? checkpoint->load_int8(table.back()).scales[5]
                            : checkpoint->load_int4(table.back()).scales[5];
    float widest = 0;
    for (size_t j = 5 * 128; j < 6 * 128; ++j) widest = std::max(widest, std::fabs(embedding[j]));
    EXPECT_EQ(scale, widest / (format == LmHeadFormat::kInt8 ? 119.0f : 7.0f));
  }
}

TEST_F(Quantize, LiteSearchesGateAndUpApartAndStillWritesACheckpoint) {
  const fs::path out = fresh();
  const QuantizeReport report = run(out, {.method = QuantizeMethod::kAwqLite, .sequential = false});
  ASSERT_EQ(report.linears.size(), 10u);
  for (const LinearReport& linear : report.linears) {
    EXPECT_LE(linear.search.error_scaled, linear.search.error_rtn * 1.05) << linear.name;
    EXPECT_NEAR(linear.search.alpha + linear.search.beta, 1, 1e-9);
    EXPECT_EQ(linear.search.mean_clip, 1);
  }
  EXPECT_FALSE(open_checkpoint(out)->kv_scales()->k.empty());
  const json::object config = parse_json(read_file(out / "config.json"), "config.json").as_object();
  EXPECT_EQ(config.at("nibble").at("method"), "awq-lite");
}

TEST_F(Quantize, RefusesWhatItCannotDo) {
  const auto expect_error = [&](const QuantizeOptions& options, const CalibrationData& data,
                                const char* part) {
    try {
      run(fresh(), options, data);
      ADD_FAILURE() << "no error, wanted " << part;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr(part));
      EXPECT_NE(error.kind(), ErrorKind::kInternal) << error.what();
    }
  };
  const CalibrationData data = random_calibration({10});
  expect_error({.group_size = 32}, data, "wanted 64 or 128");
  expect_error({.dtype = DType::kF32}, data, "wanted bfloat16 or float16");
  expect_error({}, random_calibration({10}, 100000), "outside the model's vocabulary of 320");
  expect_error({}, random_calibration({300}), "has 256 positions; lower --calib-seq-len");

  ModelSpec odd = tiny_spec();
  odd.ffn_size = 192;
  source_ = open_synthetic(odd, 1, false);
  expect_error({}, data,
               "192 in-features, not a multiple of the group size 128; use --group-size 64");
  run(fresh(), {.group_size = 64}, data);
}

}  // namespace
}  // namespace nibble
