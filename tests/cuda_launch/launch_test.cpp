// The CUDA backend's host code on a device made of host memory (fake_device.h): whatever is put
// off, fused, rounded for the next linear or replayed as a graph, what lies in memory afterwards
// means what the ops mean, no kernel writes over its own input, and a layer has as many kernels as
// docs/cuda-backend.md says.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <ostream>
#include <random>
#include <set>
#include <utility>

#include "backends/cuda/cuda_backend.h"
#include "backends/cuda/variant.h"
#include "base/error.h"
#include "cuda_launch/fake_device.h"
#include "model/decoder.h"

namespace nibble {
namespace {

using test::Contents;
using test::fake_device;
using test::Meaning;
using test::meaning;

size_t bf16_bytes(int rows, int columns) {
  return static_cast<size_t>(rows) * static_cast<size_t>(columns) * 2;
}
std::string with(const char* op, const void* operand) { return fmt::format("{} {}", op, operand); }

/// Hands every op to the CUDA backend, and by itself does what it means, at once.
class Meant final : public Backend {
 public:
  explicit Meant(ActivationPrecision precision) : cuda_(cuda::make_cuda_backend(precision)) {}

  std::string name() const override { return cuda_->name(); }
  size_t act_bytes() const override { return cuda_->act_bytes(); }
  void reserve(const ModelSpec& spec, const EngineLimits& limits, int max_logit_rows) override {
    cuda_->reserve(spec, limits, max_logit_rows);
  }
  void use_tactics(std::span<const LinearTactic> tactics) override { cuda_->use_tactics(tactics); }
  Buffer alloc(size_t bytes) override { return cuda_->alloc(bytes); }
  void free(void* data, size_t bytes) noexcept override { cuda_->free(data, bytes); }
  void upload(void* device, const void* host, size_t bytes) override {
    cuda_->upload(device, host, bytes);
  }
  void download(void* host, const void* device, size_t bytes) override {
    cuda_->download(host, device, bytes);
  }
  void sync() override { cuda_->sync(); }
  void copy(void* to, const void* from, size_t bytes) override {
    cuda_->copy(to, from, bytes);
    memory.copy(to, from, bytes);
  }
  const void* import_weights(const std::byte* host, size_t bytes) override {
    return cuda_->import_weights(host, bytes);
  }
  size_t kv_block_bytes(KvFormat format, int tokens, int heads, int dim) const override {
    return cuda_->kv_block_bytes(format, tokens, heads, dim);
  }
  void run(uint64_t key, const std::function<void()>& step) override {
    launches_ = false;
    step();
    launches_ = true, means_ = false;
    cuda_->run(key, step);
    means_ = true;
  }

  void begin_step(const StepBatch& batch) override {
    if (launches_) cuda_->begin_step(batch);
  }
  void embed(const StepBatch& batch, const LinearOperand& table, void* x) override {
    if (launches_) cuda_->embed(batch, table, x);
    if (!means_) return;
    std::string op = with("embed", table.weight);
    for (int i = 0; i < batch.num_tokens; ++i) op += fmt::format(" {}", batch.token_ids[i]);
    memory.write(x, bf16_bytes(batch.num_tokens, table.in_features), meaning(op));
  }
  void rms_norm(const void* x, const float* weight, float eps, int rows, int hidden,
                void* y) override {
    if (launches_) cuda_->rms_norm(x, weight, eps, rows, hidden, y);
    if (!means_) return;
    const size_t bytes = bf16_bytes(rows, hidden);
    memory.write(y, bytes, meaning(with("norm", weight), {memory.read(x, bytes)}));
  }
  void linear(const void* x, const LinearOperand& w, int rows, bool add, void* y) override {
    if (launches_) cuda_->linear(x, w, rows, add, y);
    if (!means_) return;
    const size_t bytes = bf16_bytes(rows, w.out_features);
    Meaning m = meaning(with("linear", w.weight), {input(x, w, rows)});
    if (add) m = meaning("add", {memory.read(y, bytes), m});
    memory.write(y, bytes, m);
  }
  void gate_up(const void* x, const LinearOperand& gate, const LinearOperand& up, int rows,
               const float* out_scale, void* y) override {
    if (launches_) cuda_->gate_up(x, gate, up, rows, out_scale, y);
    if (!means_) return;
    const Meaning in = input(x, gate, rows);
    const Meaning m =
        gate.weight == up.weight
            ? meaning(
                  fmt::format("gate_up {} {}", gate.weight, static_cast<const void*>(out_scale)),
                  {in})
            : meaning(with("silu", out_scale), {meaning(with("linear", gate.weight), {in}),
                                                meaning(with("linear", up.weight), {in})});
    memory.write(y, bf16_bytes(rows, gate.out_features), m);
  }
  void rope_store_kv(const StepBatch& batch, void* qkv, int heads, const RopeTable& rope,
                     const KvLayer& kv) override {
    if (launches_) cuda_->rope_store_kv(batch, qkv, heads, rope, kv);
    if (!means_) return;
    const size_t bytes = bf16_bytes(batch.num_tokens, (heads + 2 * kv.num_kv_heads) * kv.head_dim);
    const Meaning m = memory.read(qkv, bytes);
    memory.write(qkv, bytes, meaning("rope", {m}));
    memory.write(kv.data, 1, meaning("append", {memory.read(kv.data, 1), m}));
  }
  void attention(const StepBatch& batch, const void* qkv, int heads, const KvLayer& kv,
                 const float* out_scale, void* y) override {
    if (launches_) cuda_->attention(batch, qkv, heads, kv, out_scale, y);
    if (!means_) return;
    const int columns = (heads + 2 * kv.num_kv_heads) * kv.head_dim;
    memory.write(y, bf16_bytes(batch.num_tokens, heads * kv.head_dim),
                 meaning(with("attention", out_scale),
                         {memory.read(qkv, bf16_bytes(batch.num_tokens, columns)),
                          memory.read(kv.data, 1)}));
  }
  void lm_head(const StepBatch& batch, const void* x, const float* norm, float eps,
               const LinearOperand& head, float* logits) override {
    if (launches_) cuda_->lm_head(batch, x, norm, eps, head, logits);
    if (!means_) return;
    const Meaning in = meaning(with("norm", norm),
                               {memory.read(x, bf16_bytes(batch.num_tokens, head.in_features))});
    memory.write(logits, 2 * bf16_bytes(batch.num_logit_rows, head.out_features),
                 meaning(with("linear", head.weight), {in}));
  }
  void sample(const SampleBatch& batch, float* logits, const SampleResult& result) override {
    cuda_->sample(batch, logits, result);
  }

  Contents memory;

 private:
  Meaning input(const void* x, const LinearOperand& w, int rows) const {
    const Meaning m = memory.read(x, bf16_bytes(rows, w.in_features));
    return w.pre_scale ? meaning(with("prescaled", w.pre_scale), {m}) : m;
  }

  std::unique_ptr<Backend> cuda_;
  bool launches_ = true, means_ = true;
};

struct Case {
  const char* name;
  ActivationPrecision precision = ActivationPrecision::kBf16;
  bool residual_rounds = true, silu_rounds = true, attention_rounds = true;
  bool pre_scales = false;  // qkv's and gate's not folded into norms
  WeightLayout layout = WeightLayout::kCudaInt4;
  KvFormat kv = KvFormat::kInt8Dynamic;
  int heads = 8, kv_heads = 2;
  WeightLayout lm_head = WeightLayout::kBf16Rows;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

/// Sequences' new tokens of a step; the first `drawn` bring one that was drawn.
struct Step {
  std::vector<int> counts;
  int drawn = 0;
};
Step decode(int sequences) {
  return {std::vector<int>(static_cast<size_t>(sequences), 1), sequences};
}

/// A model of `layers` layers whose weights are nothing but addresses.
class Model {
 public:
  static constexpr int kMaxTokens = 256, kHeadDim = 128;

  explicit Model(const Case& c, int layers = 3) : backend_(c.precision) {
    fake_device().residual_rounds = c.residual_rounds;
    fake_device().silu_rounds = c.silu_rounds;
    fake_device().attention_rounds = c.attention_rounds;
    ModelSpec& spec = plan_.spec;
    spec.num_layers = layers;
    spec.hidden_size = 512;
    spec.num_heads = c.heads;
    spec.num_kv_heads = c.kv_heads;
    spec.head_dim = kHeadDim;
    spec.ffn_size = 768;
    spec.vocab_size = 96;
    plan_.limits.max_input_len = 200;
    plan_.limits.max_output_len = 100;
    plan_.limits.max_batch_size = kMaxTokens;
    const auto operand = [&](WeightLayout layout, int out, int in) {
      LinearOperand w;
      w.layout = layout;
      w.out_features = out;
      w.in_features = in;
      w.group_size = 128;
      w.weight = address();
      return w;
    };
    weights_.embedding = operand(WeightLayout::kBf16Rows, spec.vocab_size, spec.hidden_size);
    weights_.lm_head = operand(c.lm_head, spec.vocab_size, spec.hidden_size);
    weights_.final_norm = vector();
    for (int i = 0; i < layers; ++i) {
      LayerWeights l;
      l.attn_norm = vector();
      l.mlp_norm = vector();
      l.qkv = operand(c.layout, spec.qkv_size(), spec.hidden_size);
      l.o = operand(c.layout, spec.hidden_size, spec.q_size());
      l.gate = operand(c.layout, spec.ffn_size, spec.hidden_size);
      l.up = l.gate;
      if (c.layout != WeightLayout::kCudaInt4) l.up.weight = address();
      l.down = operand(c.layout, spec.hidden_size, spec.ffn_size);
      l.o.pre_scale = vector();
      l.down.pre_scale = vector();
      if (c.pre_scales) {
        l.qkv.pre_scale = vector();
        l.gate.pre_scale = l.up.pre_scale = vector();
      }
      weights_.layers.push_back(l);
      pages_.push_back(std::make_unique<std::byte[]>(64));
      KvLayer kv;
      kv.format = c.kv;
      kv.block_tokens = 64;
      kv.num_kv_heads = c.kv_heads;
      kv.head_dim = kHeadDim;
      kv.data = pages_.back().get();
      kv_.push_back(kv);
    }
    decoder_ = std::make_unique<Decoder>(backend_, plan_, weights_, kMaxTokens, kMaxTokens);
    fake_device().launches.clear();
  }

  /// Runs a step; the tokens are new ones each time. `key` as Backend::run() takes it.
  void forward(const Step& step, uint64_t key = 0) {
    StepBatch batch;
    batch.num_seqs = static_cast<int>(step.counts.size());
    batch.num_tokens = std::accumulate(step.counts.begin(), step.counts.end(), 0);
    batch.num_decode_seqs = step.drawn;
    batch.num_logit_rows = batch.num_seqs;
    batch.max_blocks_per_seq = 1;
    ASSERT_LE(batch.num_tokens, kMaxTokens);
    starts_[0] = 0;
    for (int s = 0; s < batch.num_seqs; ++s) {
      starts_[s + 1] = starts_[s] + step.counts[s];
      logit_rows_[s] = starts_[s + 1] - 1;
      lengths_[s] = 100;
    }
    for (int i = 0; i < batch.num_tokens; ++i) ids_[i] = next_token_++;
    batch.token_ids = ids_.data();
    batch.positions = positions_.data();
    batch.seq_starts = batch.host_seq_starts = starts_.data();
    batch.kv_lens = batch.host_kv_lens = lengths_.data();
    batch.block_tables = tables_.data();
    batch.logit_rows = logit_rows_.data();
    first_launch_ = fake_device().launches.size();
    backend_.run(key, [&] { decoder_->forward(batch, kv_); });
    backend_.sync();
    tokens_ = batch.num_tokens;
    logits_ = batch.num_logit_rows;
  }

  /// As an engine brings them: of qkv's matrices, `kernel` for up to `max_rows` rows.
  void use_kernels(const std::vector<std::pair<int, std::string>>& kernels) {
    std::vector<LinearTactic> tactics;
    for (const auto& [max_rows, kernel] : kernels) {
      LinearTactic t;
      t.out_features = plan_.spec.qkv_size();
      t.in_features = plan_.spec.hidden_size;
      t.max_rows = max_rows;
      t.best.kernel = kernel;
      tactics.push_back(t);
    }
    backend_.use_tactics(tactics);
  }
  /// The launch that had the first layer's qkv.
  test::Launch qkv_launch() const {
    for (const test::Launch& launch : launches()) {
      if (launch.weights == weights_.layers[0].qkv.weight) return launch;
    }
    return {"none"};
  }

  /// That logits and residual stream are what the ops mean.
  void expect_meant() const {
    const auto same = [&](const char* what, const void* at, size_t bytes) {
      const Meaning want = backend_.memory.read(at, bytes);
      const Meaning got = fake_device().memory.read(at, bytes);
      ASSERT_NE(want, test::kNothing) << what;
      EXPECT_EQ(got, want) << what << " is\n  " << test::text_of(got) << "\nwanted\n  "
                           << test::text_of(want);
    };
    same("the residual stream", decoder_->x(), bf16_bytes(tokens_, plan_.spec.hidden_size));
    same("logits", decoder_->logits(), 2 * bf16_bytes(logits_, plan_.spec.vocab_size));
    EXPECT_THAT(fake_device().faults, testing::IsEmpty());
    EXPECT_EQ(fake_device().memory.num_forbidden_uses(), 0)
        << "memory was used that had been freed";
  }

  /// Of the last step.
  std::vector<test::Launch> launches() const {
    return {fake_device().launches.begin() + static_cast<long>(first_launch_),
            fake_device().launches.end()};
  }

 private:
  const void* address() { return weight_bytes_.data() + next_address_++; }
  const float* vector() { return vector_floats_.data() + next_address_++; }

  std::array<std::byte, 256> weight_bytes_;
  std::array<float, 256> vector_floats_;
  size_t next_address_ = 0;
  EnginePlan plan_;
  ModelWeights weights_;
  std::vector<std::unique_ptr<std::byte[]>> pages_;
  std::vector<KvLayer> kv_;
  Meant backend_;
  std::unique_ptr<Decoder> decoder_;
  std::array<int32_t, kMaxTokens> ids_{}, positions_{}, lengths_{}, tables_{}, logit_rows_{};
  std::array<int32_t, kMaxTokens + 1> starts_{};
  int32_t next_token_ = 0;
  size_t first_launch_ = 0;
  int tokens_ = 0, logits_ = 0;
};

class CudaLaunch : public testing::TestWithParam<Case> {
 protected:
  void SetUp() override { test::reset_fake_device(); }
};

constexpr auto kE4m3 = ActivationPrecision::kE4m3;
// cuda:portable rounds nothing.
std::vector<Case> cases() {
  std::vector<Case> all = {

      Case{"bf16"},
      Case{"fp8", kE4m3},
      Case{.name = "bf16_residual_not_rounded", .residual_rounds = false},
      Case{.name = "bf16_silu_not_rounded", .silu_rounds = false},
      Case{.name = "bf16_attention_not_rounded", .attention_rounds = false},
      Case{.name = "bf16_only_attention_rounded", .residual_rounds = false, .silu_rounds = false},
      Case{"fp8_residual_not_rounded", kE4m3, false},
      Case{"fp8_silu_not_rounded", kE4m3, true, false},
      Case{"fp8_attention_not_rounded", kE4m3, true, true, false},
      Case{"fp8_only_silu_rounded", kE4m3, false, true, false},
      Case{"fp8_only_residual_rounded", kE4m3, true, false, false},
      Case{"fp8_nothing_rounded", kE4m3, false, false, false},
      Case{.name = "bf16_pre_scales", .pre_scales = true},
      Case{.name = "fp8_pre_scales", .precision = kE4m3, .pre_scales = true},
      Case{.name = "dense_weights", .layout = WeightLayout::kBf16Rows},
      Case{.name = "two_heads_a_kv_head", .heads = 4},
      Case{.name = "f16_cache", .kv = KvFormat::kF16},
      Case{.name = "int4_head", .lm_head = WeightLayout::kCudaInt4},
      Case{.name = "int8_head", .lm_head = WeightLayout::kCudaInt8}};
  if (cuda::kPortable) std::erase_if(all, [](const Case& c) { return c.precision == kE4m3; });
  return all;
}
INSTANTIATE_TEST_SUITE_P(Cases, CudaLaunch, testing::ValuesIn(cases()),
                         [](const auto& info) { return std::string(info.param.name); });

// Sizes around each of which other kernels serve; prompts, alone and beside drawn tokens.
const std::vector<Step> kSteps = {
    {{40}},        decode(1),       {{1}},           decode(8),   decode(9),  decode(16),
    decode(17),    {{1, 1, 5}, 2},  decode(32),      decode(33),  decode(48), {{1, 1, 1, 37}, 3},
    decode(64),    decode(65),      {{30, 1, 0, 9}}, decode(100), {{200}},    decode(64),
    decode(16),    {{1, 1, 62}, 1}, {{8}},           decode(12),  {{64}},     decode(4),
    {{1, 199}, 1}, decode(256),     decode(2),
};

TEST_P(CudaLaunch, MemoryMeansWhatTheOpsMean) {
  Model model(GetParam());
  for (const Step& step : kSteps) {
    model.forward(step);
    model.expect_meant();
    if (HasFailure()) FAIL() << "step of " << step.counts.size() << " sequences";
  }
}

// The second time a key comes its kernels are recorded, from then on they are replayed: with new
// tokens in the same places.
TEST_P(CudaLaunch, GraphsMeanTheSame) {
  Model model(GetParam());
  for (int round = 0; round < 4; ++round) {
    for (size_t i = 0; i < kSteps.size(); ++i) {
      model.forward(kSteps[i], i + 1);
      model.expect_meant();
      if (HasFailure()) FAIL() << "round " << round << ", step " << i;
    }
  }
  // Fewer than three rounds of them where scratch grew and graphs were made anew.
  EXPECT_GT(fake_device().graph_launches, static_cast<int>(kSteps.size()));
}

TEST_P(CudaLaunch, RandomStepsMeanWhatTheOpsMean) {
  std::mt19937 random(7);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  std::vector<Step> steps(60);
  for (Step& step : steps) {
    step.drawn = below(3) == 0 ? 0 : below(below(2) == 0 ? 20 : 90);
    step.counts.assign(static_cast<size_t>(step.drawn), 1);
    int left = Model::kMaxTokens - step.drawn;
    for (int prompts = below(2) == 0 ? 0 : below(4); prompts > 0; --prompts) {
      step.counts.push_back(below(std::min(left, below(2) == 0 ? 8 : 120) + 1));
      left -= step.counts.back();
    }
    if (left == Model::kMaxTokens) step.counts.push_back(1 + below(40));  // never nothing at all
  }
  Model model(GetParam());
  for (int i = 0; i < 600; ++i) {
    const int which = below(60);
    model.forward(steps[static_cast<size_t>(which)],
                  below(3) == 0 ? 0 : static_cast<uint64_t>(which + 1));
    model.expect_meant();
    if (HasFailure()) FAIL() << "at the " << i << "th, step " << which;
  }
}

// A larger step may move scratch memory that graphs of smaller ones have in them.
TEST_P(CudaLaunch, GraphsOutliveGrowth) {
  Model model(GetParam());
  for (const int key : {1, 1, 1, 2, 1, 1}) {
    model.forward(key == 1 ? decode(4) : Step{{200}}, static_cast<uint64_t>(key));
    model.expect_meant();
  }
}

TEST_P(CudaLaunch, StepsAllocateNothing) {
  Model model(GetParam());
  for (const Step& step : kSteps) model.forward(step);
  const int before = fake_device().allocations;
  for (const Step& step : kSteps) model.forward(step);
  EXPECT_EQ(fake_device().allocations, before);
}

TEST_P(CudaLaunch, SteadyStepsWaitForNothing) {
  Model model(GetParam());
  int before = 0, steps = 0;
  for (int round = 0; round < 4; ++round) {  // run, recorded, replayed, replayed
    before = fake_device().waits, steps = 0;
    for (const Step& step : kSteps) {
      ++steps;
      model.forward(step, step.drawn > 0 ? static_cast<uint64_t>(steps) : 0);
    }
  }
  EXPECT_EQ(fake_device().waits - before, steps) << "one a step is forward()'s own";
}

TEST_P(CudaLaunch, PromptsAreInOrderAndUnfused) {
  Model model(GetParam());
  for (const Step& step : kSteps) {
    model.forward(step);
    const bool prompts = !cuda::kPortable && step.drawn < static_cast<int>(step.counts.size());
    for (const test::Launch& launch : model.launches()) {
      if (!launch.kernel.starts_with("linear")) continue;
      EXPECT_EQ(launch.in_order, prompts) << launch.kernel << " of " << launch.tokens << " rows";
      EXPECT_FALSE(prompts && launch.fuses) << launch.kernel;
    }
  }
}

// The seam's ops in any order, as no decoder has them: what was put off for the op that usually
// follows must be done when another comes. What such an op has taken over is spent, and nobody
// reads it again: a norm that a linear has read, q, k and v that attention has.
TEST_P(CudaLaunch, AnyOpMayFollowAnyOther) {
  const Case& c = GetParam();
  std::mt19937 random(11);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  constexpr int kRows = 100, kHidden = 512, kFfn = 768, kHeadDim = 128;
  const int q = c.heads * kHeadDim, qkv = q + 2 * c.kv_heads * kHeadDim;
  fake_device().residual_rounds = c.residual_rounds;
  fake_device().silu_rounds = c.silu_rounds;
  fake_device().attention_rounds = c.attention_rounds;
  Meant backend(c.precision);
  ModelSpec spec;
  spec.hidden_size = kHidden, spec.ffn_size = kFfn, spec.head_dim = kHeadDim;
  spec.num_heads = c.heads, spec.num_kv_heads = c.kv_heads;
  EngineLimits limits;
  limits.max_batch_size = limits.max_num_tokens = kRows;
  backend.reserve(spec, limits, 1);

  struct Rows {  // of activations
    Buffer memory;
    int columns;
    void* data() const { return memory.data(); }
  };
  std::vector<Rows> x, ffn, mixed, heads;
  for (int i = 0; i < 3; ++i) x.push_back({backend.alloc(bf16_bytes(kRows, kHidden)), kHidden});
  for (int i = 0; i < 2; ++i) {
    ffn.push_back({backend.alloc(bf16_bytes(kRows, kFfn)), kFfn});
    mixed.push_back({backend.alloc(bf16_bytes(kRows, qkv)), qkv});
    heads.push_back({backend.alloc(bf16_bytes(kRows, q)), q});
  }
  std::array<std::byte, 64> weights, pages;
  std::array<float, 64> vectors;
  const auto operand = [&](int which, int out, int in) {
    LinearOperand w;
    w.layout = c.layout;
    w.out_features = out, w.in_features = in, w.group_size = 128;
    w.weight = &weights[static_cast<size_t>(which)];
    if (c.pre_scales && below(2) == 0) w.pre_scale = &vectors[static_cast<size_t>(32 + which)];
    return w;
  };
  KvLayer kv;
  kv.format = c.kv, kv.block_tokens = 64, kv.num_kv_heads = c.kv_heads, kv.head_dim = kHeadDim;
  kv.data = pages.data();
  std::array<int32_t, kRows + 1> starts{}, lengths{}, zeros{};
  lengths.fill(100);
  StepBatch batch;
  batch.max_blocks_per_seq = 1;
  batch.token_ids = batch.positions = batch.block_tables = batch.logit_rows = zeros.data();
  batch.seq_starts = batch.host_seq_starts = starts.data();
  batch.kv_lens = batch.host_kv_lens = lengths.data();

  // Something lies in all of them.
  const Meaning first = meaning("first");
  for (std::vector<Rows>* kind : {&x, &ffn, &mixed, &heads}) {
    for (const Rows& rows : *kind) {
      for (Contents* contents : {&backend.memory, &fake_device().memory}) {
        contents->write(rows.data(), bf16_bytes(kRows, rows.columns), first);
      }
    }
  }
  std::set<const Rows*> norms, spent;
  const auto read = [&](const Rows& r) {
    if (norms.erase(&r) > 0) spent.insert(&r);
    return r.data();
  };
  const auto written = [&](const Rows& r) {
    norms.erase(&r);
    return r.data();
  };
  size_t last = 0;  // of x, written
  int rows = 1;
  for (int i = 0; i < 40000; ++i) {
    const size_t from = static_cast<size_t>(below(2)), to = static_cast<size_t>(below(2));
    const size_t a = below(2) == 0 ? last : static_cast<size_t>(below(3));
    const size_t b = (a + 1 + static_cast<size_t>(below(2))) % 3;
    const float* vector = &vectors[static_cast<size_t>(below(4))];
    const bool add = below(2) == 0;
    // Norms and what reads and feeds them most of all.
    constexpr int kOps[] = {0, 1, 1, 1, 1, 2, 2, 2, 3, 4, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9};
    const int op = kOps[below(std::size(kOps))];
    const bool reads_x = op == 1 || op == 2 || op == 3 || op == 6 || op == 9;
    if (reads_x && spent.contains(&x[a])) continue;
    if ((op == 7 || op == 8) && spent.contains(&mixed[from])) continue;
    switch (op) {
      case 0: {
        constexpr int kSizes[] = {1, 7, 12, 16, 24, 40, 64, 65, 100};
        rows = kSizes[below(9)];
        const bool prompt = below(3) == 0;
        batch.num_tokens = rows;
        batch.num_seqs = prompt ? 1 : rows;
        batch.num_decode_seqs = prompt ? 0 : rows;
        for (int s = 0; s <= batch.num_seqs; ++s) {
          starts[static_cast<size_t>(s)] = prompt ? s * rows : s;
        }
        backend.begin_step(batch);
        break;
      }
      case 1:
        backend.rms_norm(x[a].data(), vector, 1e-5f, rows, kHidden, written(x[b]));
        norms.insert(&x[b]);
        break;
      case 2:
        backend.linear(read(x[a]), operand(0, kHidden, kHidden), rows, add, written(x[b]));
        break;
      case 3:
        backend.linear(read(x[a]), operand(1, qkv, kHidden), rows, false, written(mixed[to]));
        break;
      case 4:
        backend.linear(heads[from].data(), operand(2, kHidden, q), rows, add, written(x[b]));
        break;
      case 5:
        backend.linear(ffn[from].data(), operand(3, kHidden, kFfn), rows, add, written(x[b]));
        break;
      case 6: {
        const LinearOperand gate = operand(4, kFfn, kHidden);
        LinearOperand up = gate;
        if (c.layout != WeightLayout::kCudaInt4) up.weight = &weights[5];
        backend.gate_up(read(x[a]), gate, up, rows, vector, ffn[to].data());
        break;
      }
      case 7:
        if (batch.num_seqs > 0) backend.rope_store_kv(batch, mixed[from].data(), c.heads, {}, kv);
        break;
      case 8:
        if (batch.num_seqs > 0) {
          backend.attention(batch, mixed[from].data(), c.heads, kv, vector, heads[to].data());
          spent.insert(&mixed[from]);
        }
        break;
      case 9: backend.copy(written(x[b]), x[a].data(), bf16_bytes(rows, kHidden)); break;
    }
    if (op == 1 || op == 2 || op == 4 || op == 5 || op == 9) last = b;
    if (below(12) > 0) continue;
    backend.sync();
    for (const Rows* r : std::exchange(spent, {})) {
      for (Contents* contents : {&backend.memory, &fake_device().memory}) {
        contents->write(r->data(), bf16_bytes(kRows, r->columns), first);
      }
    }
    for (const std::vector<Rows>* kind : {&x, &ffn, &mixed, &heads}) {
      for (const Rows& r : *kind) {
        for (int row = 0; row < kRows; ++row) {
          const void* at = static_cast<const std::byte*>(r.data()) + bf16_bytes(row, r.columns);
          const size_t bytes = bf16_bytes(1, r.columns);
          const Meaning want = backend.memory.read(at, bytes);
          const Meaning got = fake_device().memory.read(at, bytes);
          ASSERT_EQ(got, want) << "after " << i << " ops row " << row << " of " << r.columns
                               << " columns is\n  " << test::text_of(got) << "\nwanted\n  "
                               << test::text_of(want);
        }
      }
    }
    ASSERT_EQ(fake_device().memory.read(kv.data, 1), backend.memory.read(kv.data, 1)) << i;
    ASSERT_THAT(fake_device().faults, testing::IsEmpty()) << "after " << i << " ops";
  }
}

/// Kernels that one layer more adds to a step of drawn tokens.
std::vector<std::string> kernels_of_a_layer(const Case& c, int sequences) {
  std::vector<std::string> of[2];
  for (const int more : {0, 1}) {
    test::reset_fake_device();
    Model model(c, 2 + more);
    model.forward(decode(sequences));
    for (const test::Launch& launch : model.launches()) of[more].push_back(launch.kernel);
  }
  std::vector<std::string> added = of[1];
  for (const std::string& kernel : of[0]) {
    const auto at = std::find(added.begin(), added.end(), kernel);
    if (at == added.end()) return {"no layer is like another"};
    added.erase(at);
  }
  return added;
}

// docs/cuda-backend.md, which kernel runs: five a layer up to 64 sequences, then seven, with e4m3
// nine; eight on cuda:portable.
TEST(CudaLaunchCount, KernelsOfALayer) {
  const auto expect = [](const Case& c, std::vector<int> sequences, const char* linear,
                         std::vector<std::string> others) {
    others.insert(others.end(), 4, linear);
    for (const int count : sequences) {
      EXPECT_THAT(kernels_of_a_layer(c, count), testing::UnorderedElementsAreArray(others))
          << c.name << ", " << count << " sequences";
    }
  };
  const Case bf16{"bf16"}, fp8{"fp8", kE4m3};
  if (cuda::kPortable) {
    expect(bf16, {1, 16, 65}, "portable_linear",
           {"portable_attention", "rms_norm", "rms_norm", "rope_store"});
    return;
  }
  for (const Case& c : {bf16, fp8}) {
    expect(c, {1, 8, 17, 32}, "linear", {"step_attention"});
    expect(c, {9, 16}, "linear_digits", {"step_attention"});
  }
  expect(bf16, {33, 64}, "linear", {"step_attention"});
  expect(fp8, {33, 64}, "linear_fp8", {"step_attention"});
  expect(bf16, {65}, "linear", {"step_attention", "rms_norm", "rms_norm"});
  expect(fp8, {65}, "linear_fp8",
         {"step_attention", "quantize_x", "quantize_x", "quantize_x", "quantize_x"});
}

#ifndef NIBBLE_CUDA_PORTABLE  // which measures nothing
// Measured kernels take the rows they were measured for; rows of prompts only if they add in order.
TEST(CudaLaunchTactics, MeasuredKernelsServe) {
  test::reset_fake_device();
  Model model(Case{"bf16"});
  model.use_kernels({{8, "small 64 rows shared early 2"},
                     {64, "wgmma 128 rows cluster 1 split 2"},
                     {256, "wgmma 64 rows cluster 2 split 1 warpgroups 1"}});
  const auto expect = [&](const Step& step, const char* kernel, int tactic) {
    model.forward(step);
    model.expect_meant();
    EXPECT_EQ(model.qkv_launch().kernel, kernel) << step.counts.size() << " sequences";
    EXPECT_EQ(model.qkv_launch().tactic, tactic) << step.counts.size() << " sequences";
  };
  using cuda::WgmmaTactic;
  const int in_order = WgmmaTactic{1, 2, 1, 1}.encode();
  expect(decode(4), "linear_small", static_cast<int>(cuda::SmallTactic::kStream64));
  expect(decode(20), "linear_wgmma", WgmmaTactic{2, 1, 2, 4}.encode());
  expect(decode(100), "linear_wgmma", in_order);
  expect({{4}}, "linear", -1);
  expect({{20}}, "linear", -1);
  expect({{100}}, "linear_wgmma", in_order);
  expect({{1, 99}, 1}, "linear_wgmma", in_order);
}

TEST(CudaLaunchTactics, UnknownKernelsAreRefused) {
  test::reset_fake_device();
  Model model(Case{"bf16"});
  for (const char* kernel :
       {"wgmma 512 rows cluster 1 split 1", "small 64 rows whole early 9", ""}) {
    EXPECT_THROW(model.use_kernels({{16, kernel}}), Error) << kernel;
  }
  EXPECT_THROW(model.use_kernels({{16, "small 64 rows whole early 1"}}), Error) << "for 16 rows";
}
#endif

}  // namespace
}  // namespace nibble
