// Hugging Face directories: prefix styles, vision parts, indices, and what must be refused.
// SPDX-License-Identifier: Apache-2.0
#include "base/half.h"
#include "base/thread_pool.h"
#include "formats/model_directory.h"
#include "formats/safetensors.h"
#include "formats/synthetic.h"
#include "formats/widen.h"
#include "testing.h"

namespace nibble {
namespace {

using ::testing::HasSubstr;
using testing_::catch_error;
using testing_::TemporaryDirectory;

ModelSpec tiny_spec() {
  ModelSpec spec = synthetic_shape("nano-like").spec;
  spec.num_layers = 2;
  spec.hidden_size = 64;
  spec.num_heads = 4;
  spec.num_kv_heads = 2;
  spec.head_dim = 32;
  spec.ffn_size = 96;
  spec.vocab_size = 50;
  return spec;
}

struct Stored {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};
using Edit = std::function<bool(Stored&)>;

void rewrite(const fs::path& path, const Edit& edit, std::vector<Stored> extra = {}) {
  std::vector<Stored> all;
  {
    const SafetensorsFile file = SafetensorsFile::open(path);
    for (const auto& entry : file.entries()) {
      const auto bytes = file.tensor(entry.name).bytes;
      Stored stored{entry.name, entry.dtype, entry.shape, {bytes.begin(), bytes.end()}};
      if (edit(stored)) all.push_back(std::move(stored));
    }
  }
  for (Stored& stored : extra) all.push_back(std::move(stored));
  std::vector<SafetensorsWriter::Declaration> declared;
  for (const Stored& stored : all) declared.push_back({stored.name, stored.dtype, stored.shape});
  SafetensorsWriter writer = SafetensorsWriter::create(path, declared, {});
  for (const Stored& stored : all) writer.write(stored.bytes);
  writer.commit();
}

Stored tensor(const std::string& name, int64_t n = 4) {
  return {name, DType::kBF16, {n}, std::vector<std::byte>(static_cast<size_t>(2 * n))};
}

class HfDirectory : public ::testing::Test {
 protected:
  void SetUp() override { make(1); }
  void make(int shards) {
    fs::remove_all(path());
    ThreadPool pool(2);
    write_synthetic_hf(path(), spec_, 5, shards, pool);
  }
  fs::path path() const { return directory_ / "m"; }
  fs::path weights() const { return path() / "model.safetensors"; }
  void edit_config(const std::function<void(json::object&)>& edit) {
    json::object config = read_json_object(path() / "config.json");
    edit(config);
    write_file_atomically(path() / "config.json", dump_json(config));
  }
  void wrap() {
    edit_config([](json::object& config) {
      json::object inner = std::move(config);
      inner.erase("architectures");
      config = {{"architectures", json::array{"Mistral3ForConditionalGeneration"}},
                {"model_type", "mistral3"},
                {"text_config", inner},
                {"vision_config", {{"hidden_size", 8}}}};
    });
  }
  void expect_whole(const WeightSource& read) {
    const auto wanted = open_synthetic(spec_, 5, false);
    EXPECT_EQ(read.spec().to_json(), spec_.to_json());
    for (const WeightRow& row : weight_table(spec_)) {
      EXPECT_FALSE(read.is_quantized(row));
      EXPECT_EQ(read.load_dense(row), wanted->load_dense(row)) << row.name;
      std::vector<std::byte> a, b;
      const TensorView x = read.view_dense(row, a), y = wanted->view_dense(row, b);
      EXPECT_EQ(x.shape, row.shape);
      EXPECT_TRUE(std::equal(x.bytes.begin(), x.bytes.end(), y.bytes.begin(), y.bytes.end()))
          << row.name;
    }
  }
  Edit rename(const std::function<std::string(const std::string&)>& to) const {
    return [=](Stored& stored) {
      stored.name = to(stored.name);
      return true;
    };
  }

  TemporaryDirectory directory_;
  ModelSpec spec_ = tiny_spec();
};

TEST_F(HfDirectory, OneFileAndShards) {
  expect_whole(*open_hf(path()));
  for (const int shards : {2, 5}) {
    make(shards);
    EXPECT_TRUE(fs::exists(path() / fmt::format("model-00001-of-{:05}.safetensors", shards)));
    const auto read = open_hf(path());
    EXPECT_THAT(read->notices(), ::testing::IsEmpty());
    expect_whole(*read);
  }
}

TEST_F(HfDirectory, Mistral3BeforeAndAfterTransformers452) {
  rewrite(
      weights(), rename([](const std::string& name) { return "language_model." + name; }),
      {tensor("vision_tower.patch_conv.weight"), tensor("multi_modal_projector.linear_1.weight")});
  wrap();
  {
    const auto read = open_hf(path());
    EXPECT_THAT(read->notices(), ::testing::ElementsAre(HasSubstr("(2 tensors)")));
    expect_whole(*read);
  }
  make(1);
  rewrite(weights(), rename([](const std::string& name) {
            return name.starts_with("model.") ? "model.language_model." + name.substr(6) : name;
          }),
          {tensor("model.vision_tower.ln_pre.weight"),
           tensor("model.multi_modal_projector.norm.weight"),
           tensor("model.language_model.layers.0.self_attn.rotary_emb.inv_freq")});
  wrap();
  const auto read = open_hf(path());
  EXPECT_THAT(read->notices(),
              ::testing::ElementsAre(HasSubstr("(2 tensors)"), HasSubstr("inv_freq")));
  expect_whole(*read);
}

TEST_F(HfDirectory, MixedDtypesWiden) {
  rewrite(weights(), [](Stored& stored) {
    const bool k = stored.name == "model.layers.0.self_attn.k_proj.weight";
    if (k || stored.name == "model.norm.weight") {
      stored.bytes =
          narrow(widen(TensorView{stored.dtype, stored.shape, stored.bytes}), DType::kF32);
      stored.dtype = DType::kF32;
    }
    return true;
  });
  const auto read = open_hf(path());
  const auto wanted = open_synthetic(spec_, 5, false);
  for (const WeightRow& row : weight_table(spec_))
    EXPECT_EQ(read->load_dense(row), wanted->load_dense(row)) << row.name;
  std::vector<std::byte> storage;
  EXPECT_EQ(read->view_dense(weight_table(spec_)[2], storage).dtype, DType::kF32);
}

TEST_F(HfDirectory, TheHeadTensorDecidesTying) {
  edit_config([](json::object& config) { config["tie_word_embeddings"] = true; });
  {
    const auto read = open_hf(path());
    EXPECT_FALSE(read->spec().tied_embeddings);
    EXPECT_THAT(read->notices(), ::testing::ElementsAre(HasSubstr("lm_head")));
  }
  rewrite(weights(), [](Stored& stored) { return stored.name != "lm_head.weight"; });
  EXPECT_TRUE(open_hf(path())->spec().tied_embeddings);
  edit_config([](json::object& config) { config["tie_word_embeddings"] = false; });
  EXPECT_THAT(catch_error([&] { open_hf(path()); }).message,
              HasSubstr("\"lm_head.weight\" is missing"));
}

TEST_F(HfDirectory, GenerationConfigOverridesStops) {
  write_file_atomically(path() / "generation_config.json",
                        R"({"bos_token_id": 9, "eos_token_id": [4, 6], "pad_token_id": 1})");
  const auto read = open_hf(path());
  EXPECT_EQ(read->spec().eos_token_ids, (std::vector<int>{4, 6}));
  EXPECT_EQ(read->spec().bos_token_id, 9);
}

struct BadTensors {
  const char* title;
  Edit edit;
  std::vector<Stored> extra;
  ErrorKind kind;
  std::vector<std::string> named;
};

TEST_F(HfDirectory, BadTensorsAreNamed) {
  const Edit keep = [](Stored&) { return true; };
  const std::string q = "model.layers.1.self_attn.q_proj.weight";
  const std::vector<BadTensors> table = {
      {"missing", [&](Stored& s) { return s.name != q; }, {}, ErrorKind::kInput, {q, "missing"}},
      {"no embedding",
       [&](Stored& s) { return s.name != "model.embed_tokens.weight"; },
       {},
       ErrorKind::kInput,
       {"no embedding", "language_model.model."}},
      {"leftover",
       keep,
       {tensor("model.layers.2.mlp.gate_proj.weight")},
       ErrorKind::kInput,
       {"1 tensor ", "model.layers.2.mlp.gate_proj.weight"}},
      {"bias",
       keep,
       {tensor("model.layers.0.self_attn.q_proj.bias")},
       ErrorKind::kInput,
       {"q_proj.bias"}},
      {"qk norm",
       keep,
       {tensor("model.layers.0.self_attn.q_norm.weight")},
       ErrorKind::kInput,
       {"q_norm"}},
      {"gptq",
       keep,
       {tensor("model.layers.0.self_attn.q_proj.qweight")},
       ErrorKind::kUnsupported,
       {"qweight", "GPTQ"}},
      {"compressed-tensors",
       keep,
       {tensor("model.layers.0.mlp.up_proj.weight_packed")},
       ErrorKind::kUnsupported,
       {"compressed-tensors"}},
      {"exl3",
       keep,
       {tensor("model.layers.0.mlp.up_proj.trellis")},
       ErrorKind::kUnsupported,
       {"EXL3"}},
      {"bitsandbytes",
       keep,
       {tensor("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4")},
       ErrorKind::kUnsupported,
       {"bitsandbytes"}},
      {"two prefixes",
       keep,
       {tensor("language_model.model.embed_tokens.weight")},
       ErrorKind::kInput,
       {"twice"}},
      {"transposed",
       [&](Stored& s) {
         if (s.name == q) s.shape = {64, 128};
         return true;
       },
       {},
       ErrorKind::kInput,
       {q, "[64, 128]", "[128, 64]", "head_dim is 32"}},
      {"int8",
       [&](Stored& s) {
         if (s.name == "model.norm.weight") s.dtype = DType::kI16;
         return true;
       },
       {},
       ErrorKind::kUnsupported,
       {"model.norm.weight", "I16"}},
  };
  for (const BadTensors& bad : table) {
    SCOPED_TRACE(bad.title);
    make(1);
    rewrite(weights(), bad.edit, bad.extra);
    const auto caught = catch_error([&] { open_hf(path()); });
    EXPECT_EQ(caught.kind, bad.kind) << caught.message;
    EXPECT_THAT(caught.message, HasSubstr("model.safetensors"));
    for (const std::string& part : bad.named) EXPECT_THAT(caught.message, HasSubstr(part));
  }
}

TEST_F(HfDirectory, HeadDimDefaultIsCheckedAgainstTheWeights) {
  edit_config([](json::object& config) {
    config.erase("head_dim");
  });  // 64 / 4 = 16, wrong like the 24B's 160
  EXPECT_THAT(
      catch_error([&] { open_hf(path()); }).message,
      ::testing::AllOf(HasSubstr("q_proj"), HasSubstr("head_dim is 16"), HasSubstr("[128, 64]")));
}

TEST_F(HfDirectory, IndexNamesMustBePlainAndTrue) {
  make(2);
  const fs::path index = path() / "model.safetensors.index.json";
  const std::string good = read_file(index);
  const auto with = [&](json::value file) {
    json::object object = parse_json(good, "index").as_object();
    object["weight_map"].as_object()["lm_head.weight"] = file;
    write_file_atomically(index, dump_json(object));
    return catch_error([&] { open_hf(path()); });
  };
  fs::copy_file(path() / "model-00002-of-00002.safetensors", directory_ / "outside.safetensors");
  for (const char* file : {"../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".",
                           "", "..\\outside.safetensors"}) {
    const auto caught = with(file);
    EXPECT_EQ(caught.kind, ErrorKind::kInput);
    EXPECT_THAT(caught.message,
                ::testing::AllOf(HasSubstr("lm_head.weight"), HasSubstr("plain name")))
        << file;
  }
  EXPECT_THAT(with(3).message, HasSubstr("plain name"));
  EXPECT_THAT(with("model-00003-of-00003.safetensors").message,
              HasSubstr("model-00003-of-00003.safetensors"));
  EXPECT_THAT(with("model-00001-of-00002.safetensors").message, HasSubstr("does not hold it"));
  write_file_atomically(index, good);
  fs::remove(path() / "model-00002-of-00002.safetensors");
  EXPECT_THAT(
      catch_error([&] { open_hf(path()); }).message,
      ::testing::AllOf(HasSubstr("model-00002-of-00002.safetensors"), HasSubstr("download")));
  write_file_atomically(index, R"({"metadata": {}})");
  EXPECT_THAT(catch_error([&] { open_hf(path()); }).message, HasSubstr("weight_map"));
}

TEST_F(HfDirectory, WrongTotalSizeOnlyWarns) {
  make(2);
  const fs::path index = path() / "model.safetensors.index.json";
  json::object object = read_json_object(index);
  object["metadata"].as_object()["total_size"] = 5;
  write_file_atomically(index, dump_json(object));
  const auto read = open_hf(path());
  EXPECT_THAT(read->notices(), ::testing::ElementsAre(HasSubstr("total_size 5")));
  expect_whole(*read);
}

TEST_F(HfDirectory, OtherKindsAreRefusedByName) {
  fs::remove(weights());
  const auto with = [&](const char* name) {
    write_file_atomically(path() / name, "x");
    const auto caught = catch_error([&] { open_hf(path()); });
    fs::remove(path() / name);
    return caught.message;
  };
  EXPECT_THAT(with("model-Q4_K_M.gguf"), HasSubstr("GGUF"));
  EXPECT_THAT(with("consolidated.safetensors"), HasSubstr("Mistral's own layout"));
  EXPECT_THAT(with("pytorch_model.bin"), HasSubstr("pickled"));
  EXPECT_THAT(with("hf_quant_config.json"), HasSubstr("ModelOpt"));
  EXPECT_THAT(with("x.txt"), HasSubstr("neither model.safetensors nor"));
}

TEST(ModelKindOf, TellsApartAndSaysWhatIsThere) {
  TemporaryDirectory directory;
  EXPECT_EQ(catch_error([&] { model_kind(directory / "no"); }).kind, ErrorKind::kIo);
  EXPECT_THAT(catch_error([&] { model_kind(directory.path()); }).message, HasSubstr("nothing"));
  testing_::write_text(directory / "model.gguf", "x");
  EXPECT_THAT(catch_error([&] { model_kind(directory.path()); }).message, HasSubstr("GGUF"));
  testing_::write_text(directory / "config.json", R"({"architectures": ["MistralForCausalLM"]})");
  EXPECT_EQ(model_kind(directory.path()), ModelKind::kHuggingFace);
  testing_::write_text(directory / "rank0.engine", "x");
  EXPECT_EQ(model_kind(directory.path()), ModelKind::kEngine);
}

TEST(Synthetic, DoesNotDependOnThreadsOrShardsAndIsScaled) {
  const ModelSpec spec = synthetic_shape("nano-like").spec;
  const auto dense = open_synthetic(spec, 7, false), other = open_synthetic(spec, 8, false);
  const auto rms = [](const std::vector<float>& values) {
    double sum = 0;
    for (const float v : values) sum += static_cast<double>(v) * v;
    return std::sqrt(sum / static_cast<double>(values.size()));
  };
  const auto int4 = open_synthetic(spec, 7);
  for (const WeightRow& row : weight_table(spec)) {
    const std::vector<float> values = dense->load_dense(row);
    EXPECT_NE(values, other->load_dense(row)) << row.name;
    if (row.shape.size() == 1) continue;
    double wanted =
        row.role == WeightRole::kEmbedding ? 1.0 : 1 / std::sqrt(static_cast<double>(row.shape[1]));
    if (row.role == WeightRole::kO || row.role == WeightRole::kDown)
      wanted /= std::sqrt(2.0 * spec.num_layers);
    EXPECT_NEAR(rms(values) / wanted, 1, 0.03) << row.name;
    if (quantized_bits(row) == 0) continue;
    const Int4Weight weight = int4->load_int4(row);
    std::vector<float> dequantized;
    for (int64_t r = 0; r < weight.out_features; ++r) {
      for (int64_t c = 0; c < weight.in_features; ++c) {
        const auto byte = static_cast<uint8_t>(weight.nibbles[r / 2 * weight.in_features + c]);
        const int nibble = r % 2 == 0 ? byte & 15 : byte >> 4;
        dequantized.push_back(
            static_cast<float>(nibble >= 8 ? nibble - 16 : nibble) *
            weight.scales[static_cast<size_t>(r * (weight.in_features / weight.group_size) +
                                              c / weight.group_size)] *
            weight.pre_scale[static_cast<size_t>(c)]);
      }
    }
    EXPECT_NEAR(rms(dequantized) / wanted, 1, 0.06) << row.name;
  }
  EXPECT_EQ(catch_error([] { synthetic_shape("mistral-24"); }).kind, ErrorKind::kUsage);
  EXPECT_EQ(synthetic_shape("mistral-24b").spec.num_parameters(), 23'572'403'200);
}

}  // namespace
}  // namespace nibble
