// What others can do with a checkpoint: a reader in Python and numpy, written from docs/formats.md
// alone (interchange.py), finds the rank files of tp 2 and 4 to be slices of tp 1, and computes the
// same logits from the weights. Skipped where python3 has no numpy (scripts/setup installs it).
// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>

#include "build/model_loader.h"
#include "formats/synthetic.h"
#include "model/single_sequence.h"
#include "quantize/quantize_testing.h"
#include "quantize/quantizer.h"

namespace nibble {
namespace {

const fs::path kSource = NIBBLE_SOURCE_DIR;

class Interchange : public testing::Test {
 protected:
  void SetUp() override {
    if (std::system("python3 -c 'import numpy' 2>/dev/null") != 0)
      GTEST_SKIP() << "python3 with numpy is not here; scripts/setup installs it";
  }
  static int python(const std::string& arguments) {
    return std::system(
        fmt::format("python3 {}/tests/quantize/interchange.py {}", NIBBLE_SOURCE_DIR, arguments)
            .c_str());
  }
  testing_::ScratchDirectory scratch_;
};

TEST_F(Interchange, RankFilesAreSlicesOfTheWhole) {
  ModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 256;
  spec.num_heads = 4;
  spec.num_kv_heads = 2;  // tp 4 duplicates them
  spec.head_dim = 128;
  spec.ffn_size = 512;
  spec.vocab_size = 320;
  spec.max_position = 128;
  const auto source = open_synthetic(spec, 7, /*int4=*/false);
  const auto backend = make_backend("ref", ActivationPrecision::kF32, 2);
  const CalibrationData data = testing_::random_calibration({40, 30});
  SilentProgress silent;
  for (const LmHeadFormat head : {LmHeadFormat::kDense, LmHeadFormat::kInt8, LmHeadFormat::kInt4}) {
    const fs::path root = scratch_ / lm_head_format_name(head);
    for (const int tp : {1, 2, 4}) {
      fs::create_directories(root / std::to_string(tp));
      quantize(root / std::to_string(tp), *source, backend.get(), &data,
               {.tp_size = tp, .lm_head = head}, silent);
    }
    EXPECT_EQ(python(fmt::format("slices {0}/1 {0}/2 {0}/4", root.string())), 0)
        << lm_head_format_name(head);
  }
}

TEST_F(Interchange, PythonGivesHuggingFacesLogits) {
  EXPECT_EQ(python(fmt::format("dense {0}/models/nano {0}/tests/data/nano", NIBBLE_SOURCE_DIR)), 0);
}

TEST_F(Interchange, PythonGivesTheCheckpointsLogits) {
  const auto source = open_hf(kSource / "models" / "nano");
  const auto backend = make_backend("cpu:native", ActivationPrecision::kF32, 0);
  const CalibrationData data = testing_::random_calibration({256, 256}, 4000);
  SilentProgress silent;
  struct Made {
    QuantizeMethod method;
    LmHeadFormat head;
  };
  for (const auto& [method, head] : {Made{QuantizeMethod::kAwq, LmHeadFormat::kDense},
                                     {QuantizeMethod::kAwqLite, LmHeadFormat::kDense},
                                     {QuantizeMethod::kAwq, LmHeadFormat::kInt4},
                                     {QuantizeMethod::kRtn, LmHeadFormat::kInt8}}) {
    const fs::path directory =
        scratch_ / fmt::format("{}-{}", method_name(method), lm_head_format_name(head));
    SCOPED_TRACE(directory.filename().string());
    fs::create_directories(directory);
    quantize(directory, *source, backend.get(), &data,
             {.method = method, .lm_head = head, .sequential = method == QuantizeMethod::kAwq},
             silent);
    LoadOptions options;
    options.build.target = "ref";
    options.build.kv_format = KvFormat::kF32;
    const LoadedModel model = load_model(directory, options);
    SingleSequence sequence(*model.backend, model.plan, model.weights, 64, 64);
    const std::vector<int32_t> ids = {1, 453, 3207, 299, 2807, 331, 17, 900, 2044, 5};
    const std::span<const float> logits = sequence.extend(ids, SingleSequence::Logits::kLast);
    const auto write = [&](const char* name, std::span<const std::byte> bytes) {
      AtomicFile file = AtomicFile::create(directory / name);
      file.write(bytes);
      file.commit();
    };
    write("ids", std::as_bytes(std::span(ids)));
    write("logits", std::as_bytes(logits));
    EXPECT_EQ(python(fmt::format("logits {0} {0}/ids {0}/logits", directory.string())), 0)
        << method_name(method);

    // The cpu target too: awq-lite's gate and up read two differently scaled inputs there.
    for (const auto& [precision, tolerance] :
         {std::pair{ActivationPrecision::kF32, 1e-4}, {ActivationPrecision::kInt8Group, 0.03}}) {
      options.build.target = "cpu:native";
      options.build.activation_precision = precision;
      const LoadedModel fast = load_model(directory, options);
      SingleSequence again(*fast.backend, fast.plan, fast.weights, 64, 64);
      const std::span<const float> have = again.extend(ids, SingleSequence::Logits::kLast);
      double error = 0, norm = 0;
      for (size_t i = 0; i < have.size(); ++i) {
        error += std::pow(double{have[i]} - double{logits[i]}, 2);
        norm += std::pow(double{logits[i]}, 2);
      }
      EXPECT_LT(std::sqrt(error / norm), tolerance) << method_name(method);
    }
  }
}

}  // namespace
}  // namespace nibble
