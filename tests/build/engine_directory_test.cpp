// Engine directories: written, verified, loaded and equal to the checkpoint they came from; and
// every way in which one can be damaged or foreign, refused by name with the command that rebuilds
// it. SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "base/hash.h"
#include "build/engine_check.h"
#include "build/kernel_table.h"
#include "build/model_loader.h"
#include "formats/synthetic.h"
#include "formats/testing.h"
#include "model/single_sequence.h"
#include "quantize/quantizer.h"

namespace nibble {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;
using testing_::catch_error;
using testing_::Caught;
using testing_::TemporaryDirectory;

const fs::path kNano = fs::path(NIBBLE_SOURCE_DIR) / "models" / "nano";
constexpr int kMaxInput = 200, kMaxOutput = 50;

BuildOptions small_options(const std::string& target = "cpu:native") {
  BuildOptions options;
  options.target = target;
  options.limits.max_batch_size = 4;
  options.limits.max_input_len = kMaxInput;
  options.limits.max_output_len = kMaxOutput;
  return options;
}

class EngineDirectory : public testing::Test {
 protected:
  // nano, rounded to nearest: no calibration, a second of work.
  void SetUp() override {
    checkpoint_ = scratch_ / "checkpoint";
    fs::create_directories(checkpoint_);
    SilentProgress progress;
    QuantizeOptions options;
    options.method = QuantizeMethod::kRtn;
    options.int8_kv = false;
    quantize(checkpoint_, *open_hf(kNano), nullptr, nullptr, options, progress);
    copy_files();
    engine_ = build("engine", small_options());
  }

  void copy_files() const {
    for (const char* name : {"tokenizer.json", "chat_template.jinja", "generation_config.json"}) {
      fs::copy_file(kNano / name, checkpoint_ / name);
    }
  }

  fs::path build(const std::string& name, const BuildOptions& options) const {
    SilentProgress progress;
    build_engine(checkpoint_, *open_checkpoint(checkpoint_), options, scratch_ / name, progress);
    return scratch_ / name;
  }

  static LoadedModel load(const fs::path& directory, const BuildOptions& options = small_options(),
                          bool verify = true) {
    return load_model(directory, {.build = options, .num_threads = 1, .verify = verify});
  }

  std::string refusal(const fs::path& directory, bool verify = true) const {
    return catch_error([&] { load(directory, small_options(), verify); }).message;
  }

  /// The engine again with another plan, checksums right: what a different nibble would have
  /// written.
  fs::path with_plan(const std::string& name,
                     const std::function<void(json::object&)>& edit) const {
    const fs::path copy = scratch_ / name;
    fs::copy(engine_, copy);
    const SafetensorsFile file = SafetensorsFile::open(engine_ / "rank0.engine");
    std::vector<std::pair<std::string, std::string>> metadata = file.metadata();
    for (auto& [key, value] : metadata) {
      if (key != "plan") continue;
      json::value plan = parse_json(value, "plan");
      edit(plan.as_object());
      value = dump_json(plan);
    }
    std::vector<SafetensorsWriter::Declaration> tensors;
    for (const auto& entry : file.entries()) {
      if (!entry.name.starts_with("pad."))
        tensors.push_back({entry.name, entry.dtype, entry.shape});
    }
    SafetensorsWriter writer =
        SafetensorsWriter::create(copy / "rank0.engine", tensors, metadata, 64);
    for (const auto& tensor : tensors) {
      const std::span<const std::byte> bytes = file.tensor(tensor.name).bytes;
      if (tensor.name != kEngineChecksums) {
        writer.write(bytes);
        continue;
      }
      writer.write(bytes.first(bytes.size() - sizeof(uint64_t)));
      const uint64_t header = writer.header_checksum();
      writer.write(std::as_bytes(std::span(&header, 1)));
    }
    writer.commit();
    return copy;
  }

  TemporaryDirectory scratch_;
  fs::path checkpoint_, engine_;
};

std::vector<int32_t> prompt_ids() { return {1, 3, 812, 400, 977, 1200, 4, 2000, 55, 3000}; }

struct Greedy {
  std::vector<int32_t> tokens;
  std::vector<std::vector<float>> logits;
};

Greedy generate(const LoadedModel& model, int count, std::span<const int32_t> forced = {}) {
  SingleSequence sequence(*model.backend, model.plan, model.weights, kMaxInput + kMaxOutput, 64);
  Greedy answer;
  std::vector<int32_t> next = prompt_ids();
  for (int i = 0; i < count; ++i) {
    const std::span<const float> logits = sequence.extend(next, SingleSequence::Logits::kLast);
    answer.logits.emplace_back(logits.begin(), logits.end());
    answer.tokens.push_back(
        static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    next = {forced.empty() ? answer.tokens.back() : forced[static_cast<size_t>(i)]};
  }
  return answer;
}

void flip_byte(const fs::path& path, size_t at) {
  std::FILE* file = std::fopen(path.c_str(), "r+b");
  ASSERT_NE(file, nullptr) << path;
  std::fseek(file, static_cast<long>(at), SEEK_SET);
  const int byte = std::fgetc(file);
  std::fseek(file, static_cast<long>(at), SEEK_SET);
  std::fputc(byte ^ 0x04, file);
  std::fclose(file);
}

TEST_F(EngineDirectory, GivesTheCheckpointsTokens) {
  const Greedy from_checkpoint = generate(load(checkpoint_), 20);
  const LoadedModel engine = load(engine_);
  EXPECT_EQ(engine.kind, ModelKind::kEngine);
  const Greedy from_engine = generate(engine, 20);
  EXPECT_EQ(from_engine.tokens, from_checkpoint.tokens);
  EXPECT_EQ(from_engine.logits, from_checkpoint.logits);  // bit for bit
}

TEST_F(EngineDirectory, HoldsThePlanAndTheTokenizer) {
  const LoadedModel model = load(engine_);
  EXPECT_EQ(model.plan.nibble_version, NIBBLE_VERSION);
  EXPECT_EQ(model.plan.target, resolve_target("cpu:native"));
  EXPECT_EQ(model.plan.linear_layout, WeightLayout::kCpuInt4);
  EXPECT_EQ(model.plan.limits.max_input_len, kMaxInput);
  EXPECT_EQ(model.plan.limits.max_num_tokens, 512) << "the documented default on a CPU";
  EXPECT_EQ(EnginePlan::from_json(
                parse_json(read_file(engine_ / "config.json"), "config.json").as_object(), "c"),
            model.plan);
  for (const char* name : {"tokenizer.json", "chat_template.jinja", "generation_config.json"}) {
    EXPECT_EQ(read_file(engine_ / name), read_file(kNano / name)) << name;
  }
  BuildOptions wide = small_options();
  wide.limits.max_batch_size = 600;
  EXPECT_EQ(plan_engine(*open_checkpoint(checkpoint_), wide).limits.max_num_tokens, 600);
  wide.limits.max_num_tokens = 599;
  EXPECT_THAT(catch_error([&] { plan_engine(*open_checkpoint(checkpoint_), wide); }).message,
              AllOf(HasSubstr("--max-num-tokens is 599"), HasSubstr("between 600")));
}

TEST_F(EngineDirectory, Fp8ActivationsAreForTargetsThatHaveThem) {
  BuildOptions options;
  options.limits.max_input_len = options.limits.max_output_len = 8;
  options.activation_precision = ActivationPrecision::kE4m3;
  for (const char* target : {"cpu:generic", "cuda:portable"}) {
    options.target = target;
    EXPECT_THAT(catch_error([&] { plan_engine(*open_checkpoint(checkpoint_), options); }).message,
                AllOf(HasSubstr("--activations fp8"), HasSubstr(target), HasSubstr("cuda:sm_90")));
  }
  options.target = "ref";
  const EnginePlan plan = plan_engine(*open_checkpoint(checkpoint_), options);
  EXPECT_EQ(EnginePlan::from_json(plan.to_json(), "plan").activation_precision,
            ActivationPrecision::kE4m3);
}

TEST_F(EngineDirectory, EveryCpuTargetAgreesWithTheReference) {
  const Greedy expected = generate(load(build("ref", small_options("ref"))), 24);
  int num_targets = 0;
  for (const std::string target : {"cpu:avx512", "cpu:avx2", "cpu:generic"}) {
    try {
      if (resolve_target(target) != target) continue;
    } catch (const Error&) {
      continue;  // not on this machine
    }
    ++num_targets;
    BuildOptions options = small_options(target);
    options.activation_precision = ActivationPrecision::kF32;  // int8 is another function
    const LoadedModel model = load(build("engine-" + target.substr(4), options));
    EXPECT_EQ(model.plan.target, target);
    const Greedy actual = generate(model, 24, expected.tokens);
    for (size_t i = 0; i < expected.tokens.size(); ++i) {
      std::vector<float> sorted = expected.logits[i];
      std::nth_element(sorted.begin(), sorted.begin() + 1, sorted.end(), std::greater<>());
      const float best = expected.logits[i][static_cast<size_t>(expected.tokens[i])];
      if (best - sorted[1] < 2e-3f) continue;  // a tie may go either way
      EXPECT_EQ(actual.tokens[i], expected.tokens[i]) << target << " step " << i;
    }
  }
  EXPECT_GE(num_targets, 1);
}

TEST_F(EngineDirectory, KvCacheFormats) {
  BuildOptions options = small_options();
  options.kv_format = KvFormat::kF16;
  const LoadedModel f16 = load(build("f16", options));
  EXPECT_EQ(f16.plan.kv_format, KvFormat::kF16);
  const LoadedModel int8 = load(engine_);
  EXPECT_EQ(int8.plan.kv_format, KvFormat::kInt8Dynamic);
  const Greedy a = generate(f16, 3), b = generate(int8, 3);
  double difference = 0;
  for (size_t v = 0; v < a.logits[1].size(); ++v) {
    difference = std::max(difference, std::fabs(double{a.logits[1][v]} - b.logits[1][v]));
  }
  EXPECT_GT(difference, 0) << "the two formats round differently";
  EXPECT_LT(difference, 0.5);

  options.kv_format = KvFormat::kInt8Static;
  const Caught caught = catch_error([&] { build("static", options); });
  EXPECT_EQ(caught.kind, ErrorKind::kInput);
  EXPECT_THAT(caught.message, AllOf(HasSubstr("int8-static needs"), HasSubstr("--kv-cache int8")));
  EXPECT_FALSE(fs::exists(scratch_ / "static"));
  EXPECT_FALSE(fs::exists(scratch_ / "static.tmp"));

  // A model whose scales are there.
  ModelSpec spec = synthetic_shape("nano-like").spec;
  const auto source = open_synthetic(spec, 3);
  SilentProgress progress;
  build_engine(scratch_ / "nowhere", *source, options, scratch_ / "static", progress);
  const LoadedModel with_scales = load(scratch_ / "static");
  EXPECT_EQ(with_scales.plan.kv_format, KvFormat::kInt8Static);
  EXPECT_FLOAT_EQ(with_scales.weights.layers[1].v_scale, source->kv_scales()->v[1]);
  // 24 bytes of scales: padding follows, and nothing may hide in it.
  const fs::path path = scratch_ / "static" / "rank0.engine";
  const SafetensorsFile file = SafetensorsFile::open(path);
  for (const auto& entry : file.entries()) {
    if (!entry.name.starts_with("pad.")) continue;
    ASSERT_NO_FATAL_FAILURE(flip_byte(path, file.data_start() + entry.end - 1));
    EXPECT_THAT(refusal(scratch_ / "static"), AllOf(HasSubstr(entry.name), HasSubstr("damaged")));
    ASSERT_NO_FATAL_FAILURE(flip_byte(path, file.data_start() + entry.end - 1));
  }
  EXPECT_TRUE(file.contains("pad.0"));
}

TEST_F(EngineDirectory, OneFlippedByteInTheEngineFileIsRefused) {
  const fs::path path = engine_ / "rank0.engine";
  const SafetensorsFile file = SafetensorsFile::open(path);
  const size_t header = file.data_start(), size = file.file().bytes().size();
  std::vector<size_t> positions = {0, 9, header - 1, header, size - 1, size - 9};
  for (size_t at = 1; at < 40; ++at) positions.push_back(at * header / 40);
  for (size_t at = 1; at < 60; ++at) positions.push_back(header + at * (size - header) / 60);
  for (const auto& entry : file.entries()) {
    if (entry.name == "pad.0" || entry.name == "final_norm.weight") {
      positions.push_back(header + entry.begin);
    }
  }
  for (const size_t at : positions) {
    SCOPED_TRACE(at);
    ASSERT_NO_FATAL_FAILURE(flip_byte(path, at));
    const Caught caught = catch_error([&] {
      const SafetensorsFile damaged = SafetensorsFile::open(path);
      read_engine_plan(damaged, engine_);  // the header is always checked
      ASSERT_GE(at, header) << "a damaged header passed";
      verify_engine(damaged, engine_);
    });
    EXPECT_THAT(caught.message, HasSubstr("rank0.engine"));
    EXPECT_NE(caught.kind, ErrorKind::kInternal) << caught.message;
    ASSERT_NO_FATAL_FAILURE(flip_byte(path, at));
  }
  load(engine_);
}

TEST_F(EngineDirectory, OneFlippedByteInAnyOtherFileIsRefused) {
  std::vector<fs::path> paths;
  for (const auto& entry : fs::directory_iterator(engine_)) {
    if (entry.path().filename() != "rank0.engine") paths.push_back(entry.path());
  }
  EXPECT_GE(paths.size(), 4u);  // config, tokenizer, template, generation config
  for (const fs::path& path : paths) {
    for (const size_t at : {size_t{0}, static_cast<size_t>(fs::file_size(path)) / 2}) {
      ASSERT_NO_FATAL_FAILURE(flip_byte(path, at));
      EXPECT_THAT(refusal(engine_), AllOf(HasSubstr(path.string()), HasSubstr("is damaged")));
      load(engine_, small_options(), /*verify=*/false);  // a template may be edited on purpose
      ASSERT_NO_FATAL_FAILURE(flip_byte(path, at));
    }
  }
  load(engine_);
}

TEST_F(EngineDirectory, TruncatedAndMissingFilesAreRefused) {
  const fs::path path = engine_ / "rank0.engine";
  const std::string whole = read_file(path);
  for (const size_t size : {size_t{0}, size_t{7}, size_t{500}, whole.size() - 1}) {
    fs::resize_file(path, size);
    EXPECT_THAT(refusal(engine_, false),
                AllOf(HasSubstr("rank0.engine"),
                      HasSubstr("nibble build " + checkpoint_.string() + " --out ")))
        << size;
    testing_::write_text(path, whole);
  }
  fs::rename(engine_ / "tokenizer.json", engine_ / "kept");
  EXPECT_THAT(refusal(engine_), HasSubstr("tokenizer.json"));
  fs::rename(engine_ / "kept", engine_ / "tokenizer.json");
  load(engine_);
  fs::remove(path);
  EXPECT_THAT(refusal(engine_),
              AllOf(HasSubstr("without its rank0.engine"),
                    HasSubstr(fmt::format("nibble build {} --out {} --max-batch-size 4 ",
                                          checkpoint_.string(), engine_.string()))));
  EXPECT_THAT(refusal(scratch_ / "nothing"), HasSubstr("is not a directory"));
}

TEST_F(EngineDirectory, ForeignPlansAreRefusedWithTheCommandThatRebuilds) {
  const auto command = [&](const std::string& name, const std::string& flags) {
    return AllOf(HasSubstr((scratch_ / name / "rank0.engine").string()),
                 HasSubstr(fmt::format("nibble build {} --out {}{}", checkpoint_.string(),
                                       (scratch_ / name).string(), flags)));
  };
  const std::string limits = " --max-batch-size 4 --max-input-len 200 --max-output-len 50";
  EXPECT_THAT(refusal(with_plan("version",
                                [](json::object& plan) {
                                  plan["nibble_version"] = "9.9.9";
                                  plan["of_the_future"] = true;
                                })),
              AllOf(HasSubstr("was built by nibble 9.9.9, this is nibble " NIBBLE_VERSION),
                    command("version", limits)));
  const json::object no_cuda = {{"major", 0}, {"gpu", ""}};
  EXPECT_THAT(refusal(with_plan("cuda",
                                [&](json::object& plan) {
                                  plan["target"] = "cuda:sm_80";
                                  plan["cuda"] = no_cuda;
                                })),
              AllOf(HasSubstr("was built for cuda:sm_80"), command("cuda", limits)));
  // Known, but not here; where it is here, these are not the weights of such an engine.
  EXPECT_THAT(refusal(with_plan("gpu",
                                [&](json::object& plan) {
                                  plan["target"] = "cuda:sm_90";
                                  plan["cuda"] = no_cuda;
                                  plan["linear_layout"] = "cuda-int4";
                                  plan["kv_block_tokens"] = 64;
                                })),
              AnyOf(AllOf(HasSubstr("was built for cuda:sm_90"), command("gpu", limits)),
                    AllOf(HasSubstr("layers.0.qkv.weight"),
                          command("gpu", " --target cuda:sm_90" + limits))));
  EXPECT_THAT(refusal(with_plan("mips", [](json::object& plan) { plan["target"] = "mips"; })),
              AllOf(HasSubstr("was built for mips"), command("mips", limits)));
  EXPECT_THAT(
      refusal(with_plan("layout", [](json::object& plan) { plan["linear_layout"] = "cuda-int4"; })),
      AllOf(HasSubstr("weights lie as cuda-int4"), HasSubstr("reads cpu-int4"),
            command("layout", limits)));
  EXPECT_THAT(refusal(with_plan("no-layout",
                                [](json::object& plan) { plan["linear_layout"] = "cpu-int5"; })),
              AllOf(HasSubstr("\"cpu-int5\""), command("no-layout", limits)));
  EXPECT_THAT(refusal(with_plan("tp", [](json::object& plan) { plan["tp_size"] = 2; })),
              AllOf(HasSubstr("tensor-parallel size 2"), command("tp", limits)));
  EXPECT_THAT(refusal(with_plan("format", [](json::object& plan) { plan["format_version"] = 1; })),
              AllOf(HasSubstr("format_version is 1"), command("format", limits)));
  EXPECT_THAT(refusal(with_plan("kv",
                                [](json::object& plan) {
                                  plan["nibble_version"] = "0.0.1";
                                  plan["kv_format"] = "f16";
                                  plan["activation_precision"] = "f32";
                                  plan["limits"].as_object()["max_num_tokens"] = 100;
                                })),
              command("kv", limits + " --max-num-tokens 100 --kv-cache f16 --activations f32"));
  // Weights of other sizes than the plan says are found before a kernel reads them.
  EXPECT_THAT(refusal(with_plan("group", [](json::object& plan) { plan["group_size"] = 64; })),
              AllOf(HasSubstr("layers.0.qkv.weight"), command("group", limits)));
  EXPECT_THAT(refusal(with_plan("dense", [](json::object& p) { p["dense_layout"] = "f32-rows"; })),
              HasSubstr("embedding.weight"));
  EXPECT_THAT(
      refusal(with_plan("head", [](json::object& p) { p["lm_head_layout"] = "int8-portable"; })),
      AllOf(HasSubstr("lm_head lies as int8-portable"), HasSubstr("reads cpu-int4 or cpu-int8"),
            command("head", limits)));
  EXPECT_THAT(
      refusal(with_plan("eight", [](json::object& p) { p["lm_head_layout"] = "cpu-int8"; })),
      HasSubstr("lm_head.weight"));
  load(with_plan("same", [](json::object&) {}));  // and the helper itself makes good engines
}

TEST_F(EngineDirectory, TheRebuildCommandNamesWhatTheEngineWasBuiltFrom) {
  const LoadedModel model = load(engine_);
  EXPECT_EQ(model.plan.source.checkpoint, checkpoint_.string());
  const std::string limits = " --max-batch-size 4 --max-input-len 200 --max-output-len 50";
  EXPECT_EQ(rebuild_command(model.plan, engine_),
            fmt::format("remove it and build it again: nibble build {} --out {}{}",
                        checkpoint_.string(), engine_.string(), limits));
  // Gone: a placeholder, and what stood there.
  fs::rename(checkpoint_, scratch_ / "moved");
  EXPECT_EQ(rebuild_command(model.plan, engine_),
            fmt::format("remove it and build it again: nibble build CHECKPOINT --out {}{} "
                        "(CHECKPOINT: it was built from {}, which is not there any more)",
                        engine_.string(), limits, checkpoint_.string()));
  EnginePlan unknown = model.plan;
  unknown.source = {};
  EXPECT_THAT(rebuild_command(unknown, engine_),
              AllOf(HasSubstr("nibble build CHECKPOINT --out"), HasSubstr("does not say")));

  SilentProgress progress;
  BuildOptions options = small_options("cuda:sm_90");
  options.synthetic = "nano-like";
  options.synthetic_lm_head = "int8";
  options.kv_format = KvFormat::kF16;
  options.activation_precision = ActivationPrecision::kE4m3;
  options.limits.max_num_tokens = 100;
  options.tokenizer_dir = kNano;
  options.tune = false;
  const fs::path out = scratch_ / "random ones";
  build_engine("", *open_synthetic(synthetic_shape("nano-like").spec, 1, true, LmHeadFormat::kInt8),
               options, out, progress);
  const EnginePlan plan = read_engine_plan(open_engine(out), out);
  const std::string both = limits + " --max-num-tokens 100 --kv-cache f16";
  EXPECT_EQ(rebuild_command(plan, out),
            fmt::format("remove it and build it again: nibble build --synthetic nano-like "
                        "--quantize-lm-head int8 --out '{}' --target cuda:sm_90{} --activations "
                        "fp8 --tokenizer {} --no-tune",
                        out.string(), both, kNano.string()));
  // For other targets: without what only cuda:sm_90 knows.
  for (const auto& [target, flag] :
       {std::pair{"cuda:portable", " --target cuda:portable"}, {"cpu:native", ""}}) {
    EXPECT_EQ(rebuild_command(plan, out, target),
              fmt::format("remove it and build it again: nibble build --synthetic nano-like "
                          "--quantize-lm-head int8 --out '{}'{}{} --tokenizer {}",
                          out.string(), flag, both, kNano.string()));
  }
}

TEST_F(EngineDirectory, WhereItsGpuIsMissingTheOtherTargetsCommandsAreNamed) {
  const fs::path hopper = build("hopper", small_options("cuda:sm_90")),
                 portable = build("portable", small_options("cuda:portable"));
  const auto refused = [&](const fs::path& engine) {
    try {
      load(engine);
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kDevice) << error.what();
      return std::string(error.what());
    }
    return std::string();
  };
  const std::string message = refused(hopper), other = refused(portable);
  if (message.empty() || other.empty()) GTEST_SKIP() << "the plugin and its GPU are here";
  const auto command = [&](const fs::path& engine, const std::string& flags) {
    return HasSubstr(fmt::format("nibble build {} --out {}{} --max-batch-size 4",
                                 checkpoint_.string(), engine.string(), flags));
  };
  EXPECT_THAT(message, AllOf(HasSubstr("was built for cuda:sm_90, which cannot run here"),
                             command(hopper, " --target cuda:portable"), command(hopper, "")));
  EXPECT_THAT(other, AllOf(HasSubstr("was built for cuda:portable, which cannot run here"),
                           command(portable, ""), Not(HasSubstr("--target"))));
}

TEST_F(EngineDirectory, AnotherCudaOrGpuIsRefusedOrSaid) {
  EnginePlan plan = load(engine_).plan;
  const CudaPlatform h200{.major = 13, .gpu = "NVIDIA H200"},
      h100{.major = 13, .gpu = "NVIDIA H100 80GB HBM3"};
  plan.cuda = h100;
  EXPECT_EQ(check_cuda(plan, {}, engine_), "") << "of no matter to a CPU";
  plan.target = "cuda:sm_90";
  const std::string command = fmt::format("nibble build {} --out {} --target cuda:sm_90",
                                          checkpoint_.string(), engine_.string());
  const auto refused = [&](const CudaPlatform& here) {
    const Caught caught = catch_error([&] { check_cuda(plan, here, engine_); });
    EXPECT_EQ(caught.kind, ErrorKind::kUnsupported);
    EXPECT_THAT(caught.message, AllOf(HasSubstr("rank0.engine"), HasSubstr(command)));
    return caught.message;
  };
  EXPECT_EQ(check_cuda(plan, h100, engine_), "");
  EXPECT_THAT(check_cuda(plan, h200, engine_),
              AllOf(HasSubstr("measured on NVIDIA H100 80GB HBM3, this is NVIDIA H200"),
                    HasSubstr("stays in use"), HasSubstr(command)));
  CudaPlatform here = h100;
  here.major = 12;
  EXPECT_THAT(refused(here), AllOf(HasSubstr("CUDA 13"), HasSubstr("is of CUDA 12")));
  here = {.major = 13, .gpu = "NVIDIA B200"};
  // Built where there was no GPU, or no plugin either: nothing in it comes from one.
  plan.cuda = {.major = 13, .gpu = ""};
  EXPECT_EQ(check_cuda(plan, here, engine_), "");
  plan.cuda = {};
  EXPECT_EQ(check_cuda(plan, here, engine_), "");
}

TEST(KernelTable, NamesTheChosenAndKeepsEveryTime) {
  const std::vector<LinearTactic> tactics = {
      {.out_features = 6144, .in_features = 5120, .max_rows = 1, .best = {"a", 7}, .slower = {}},
      {.out_features = 6144,
       .in_features = 5120,
       .max_rows = 8,
       .best = {"a", 7.5},
       .slower = {{"b", 8}, {"c", 9.125}}},
      {.out_features = 6144, .in_features = 5120, .max_rows = 64, .best = {"c", 9}, .slower = {}},
      {.out_features = 5120, .in_features = 4096, .max_rows = 1, .best = {"c", 3}, .slower = {}}};
  EXPECT_EQ(chosen_kernels(tactics),
            "  6144 x 5120         1 ... 8 rows  a\n"
            "                     9 ... 64 rows  c\n"
            "  5120 x 4096         1 ... 1 rows  c");
  EXPECT_THAT(kernel_times(tactics),
              AllOf(HasSubstr("  6144 x 5120 with 8 rows: a 7.50 us; slower: b 8.00, c 9.12\n"),
                    HasSubstr("  5120 x 4096 with 1 rows: c 3.00 us")));
  EXPECT_EQ(chosen_kernels({}), "");
}

TEST_F(EngineDirectory, RefEnginesRebuildForRef) {
  const fs::path ref = build("ref engine", small_options("ref"));
  flip_byte(ref / "rank0.engine", fs::file_size(ref / "rank0.engine") / 2);
  EXPECT_THAT(refusal(ref), HasSubstr(fmt::format("--out '{}' --target ref", ref.string())));
}

TEST_F(EngineDirectory, ImpossibleOptionsAreNamed) {
  const auto source = open_checkpoint(checkpoint_);
  const auto message = [&](const std::function<void(BuildOptions&)>& change) {
    BuildOptions options = small_options();
    change(options);
    return catch_error([&] { plan_engine(*source, options); }).message;
  };
  EXPECT_THAT(message([](BuildOptions& o) { o.limits.max_input_len = 8150; }),
              AllOf(HasSubstr("8200"), HasSubstr("8192")));
  EXPECT_THAT(message([](BuildOptions& o) { o.limits.max_batch_size = 0; }),
              HasSubstr("--max-batch-size is 0"));
  EXPECT_THAT(message([](BuildOptions& o) { o.target = "cpu:avx511"; }), HasSubstr("avx512"));
  EXPECT_THAT(message([](BuildOptions& o) { o.target = "rref"; }), HasSubstr("ref"));
  EXPECT_THAT(catch_error([&] { build("engine", small_options()); }).message,
              HasSubstr("exists already"));
}

TEST_F(EngineDirectory, StopIdsOfACheckpointComeFromItsOwnKeyAndGenerationConfigWins) {
  // Hugging Face's generation_config.json gives the stop ids; the bare checkpoint directory of a
  // published layout has only config.json, whose "nibble" key must bring them along.
  const fs::path hf = scratch_ / "hf";
  fs::copy(kNano, hf);
  testing_::write_text(hf / "generation_config.json",
                       R"({"bos_token_id": 1, "eos_token_id": [2, 7, 9]})");
  const fs::path out = scratch_ / "model", bare = out / "trt-llm" / "checkpoints";
  fs::create_directories(bare);
  SilentProgress progress;
  QuantizeOptions options;
  options.method = QuantizeMethod::kRtn;
  options.int8_kv = false;
  quantize(bare, *open_hf(hf), nullptr, nullptr, options, progress);
  const std::vector<int> wanted = {2, 7, 9};
  EXPECT_EQ(open_checkpoint(bare)->spec().eos_token_ids, wanted);
  EXPECT_EQ(open_checkpoint(out)->spec().eos_token_ids, wanted);
  build_engine(bare, *open_checkpoint(bare), small_options(), scratch_ / "e1", progress);
  EXPECT_EQ(load(scratch_ / "e1").plan.spec.eos_token_ids, wanted);
  testing_::write_text(out / "generation_config.json", R"({"eos_token_id": 5})");
  EXPECT_EQ(open_checkpoint(out)->spec().eos_token_ids, std::vector<int>{5});
}

TEST_F(EngineDirectory, AQuantizedLmHeadShrinksTheEngine) {
  uint64_t dense_bytes = fs::file_size(engine_ / "rank0.engine");
  for (const LmHeadFormat head : {LmHeadFormat::kInt8, LmHeadFormat::kInt4}) {
    const fs::path checkpoint = scratch_ / lm_head_format_name(head);
    fs::create_directories(checkpoint);
    SilentProgress progress;
    quantize(checkpoint, *open_hf(kNano), nullptr, nullptr,
             {.method = QuantizeMethod::kRtn, .lm_head = head, .int8_kv = false}, progress);
    const auto source = open_checkpoint(checkpoint);
    std::vector<Greedy> answers;
    for (const char* target : {"ref", "cpu:native"}) {
      BuildOptions options = small_options(target);
      options.activation_precision = ActivationPrecision::kF32;
      const fs::path engine =
          scratch_ / fmt::format("engine-{}-{}", lm_head_format_name(head), target);
      build_engine(checkpoint, *source, options, engine, progress);
      const LoadedModel model = load(engine);
      answers.push_back(generate(model, 8));
      if (model.plan.target == "ref") continue;
      EXPECT_EQ(model.plan.lm_head_layout,
                head == LmHeadFormat::kInt8 ? WeightLayout::kCpuInt8 : WeightLayout::kCpuInt4);
      const uint64_t bytes = fs::file_size(engine / "rank0.engine");
      // nano's lm_head: 4096 x 256 bf16, groups of 128 with an F32 scale (8 bits: two).
      const uint64_t saved = head == LmHeadFormat::kInt8 ? 4096 * 256 - 4096 * 2 * 8
                                                         : 4096 * 256 * 3 / 2 - 4096 * 2 * 4;
      EXPECT_NEAR(static_cast<double>(dense_bytes - bytes), static_cast<double>(saved), 1024);
    }
    EXPECT_EQ(answers[0].tokens, answers[1].tokens);
  }
}

// Without a GPU: what build writes for one is what the loader wants to the byte.
TEST_F(EngineDirectory, ACudaEngineHoldsTheBytesItsLoaderWants) {
  for (const auto& [target, head] : {std::pair{"cuda:sm_90", LmHeadFormat::kDense},
                                     {"cuda:sm_90", LmHeadFormat::kInt8},
                                     {"cuda:portable", LmHeadFormat::kDense},
                                     {"cuda:portable", LmHeadFormat::kInt4}}) {
    BuildOptions options = small_options(target);
    const auto source =
        open_synthetic(synthetic_shape("nano-like").spec, /*seed=*/1, /*int4=*/true, head);
    const EnginePlan plan = plan_engine(*source, options);
    EXPECT_EQ(plan.target, target);
    const EngineTensors tensors = pack_in_memory(*source, plan);
    EXPECT_EQ(engine_bytes(*source, plan), tensors.total_bytes());
    const auto backend = make_backend("ref", ActivationPrecision::kF32, 1);
    const ModelWeights weights = ModelWeights::load(*backend, plan, tensors);
    EXPECT_EQ(weights.layers[0].qkv.layout, WeightLayout::kCudaInt4);
    EXPECT_EQ(weights.layers[0].up.weight, weights.layers[0].gate.weight);
    EXPECT_EQ(weights.lm_head.layout, head == LmHeadFormat::kInt8   ? WeightLayout::kCudaInt8
                                      : head == LmHeadFormat::kInt4 ? WeightLayout::kCudaInt4
                                                                    : WeightLayout::kBf16Rows);
  }
  ModelSpec odd = synthetic_shape("nano-like").spec;
  odd.vocab_size += 1;
  const auto source = open_synthetic(odd, 1, true, LmHeadFormat::kInt4);
  EXPECT_THAT(catch_error([&] { plan_engine(*source, small_options("cuda:sm_90")); }).message,
              AllOf(HasSubstr(std::to_string(odd.vocab_size)), HasSubstr("--target cpu:native")));
}

TEST_F(EngineDirectory, WhoPlansMemoryIsToldTheBytesOfTheWeights) {
  for (const fs::path& directory : {engine_, checkpoint_}) {
    uint64_t bytes = 0;
    LoadOptions options{.build = small_options(), .num_threads = 1};
    options.before_load = [&](const EnginePlan& plan, uint64_t weight_bytes, Backend&) {
      EXPECT_EQ(plan.limits.max_batch_size, 4);
      bytes = weight_bytes;
    };
    const LoadedModel model = load_model(directory, options);
    EXPECT_EQ(bytes, model.tensors->total_bytes()) << directory;
    options.before_load = [](const EnginePlan&, uint64_t, Backend&) {
      fail(ErrorKind::kMemory, "no room");
    };
    EXPECT_EQ(catch_error([&] { load_model(directory, options); }).message, "no room");
  }
}

TEST_F(EngineDirectory, OtherCudaTargetsAreRefusedNamingBoth) {
  try {
    resolve_target("cuda:sm_80");
    FAIL() << "cuda:sm_80 is no target";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("--target cuda:sm_90"),
                                    HasSubstr("--target cuda:portable"), HasSubstr("8.0")));
  }
}

}  // namespace
}  // namespace nibble
