// The main job and every command around it over the binary, on the model that ships with nibble.
// SPDX-License-Identifier: Apache-2.0
#include <signal.h>

#include <boost/json/value_to.hpp>
#include <cmath>
#include <iterator>
#include <sstream>

#include "base/json.h"
#include "cli/process.h"
#include "formats/testing.h"

namespace nibble::cli_test {
namespace {

using testing::AllOf;
using testing::AnyOf;
using testing::HasSubstr;
using testing::Not;
using testing_::TemporaryDirectory;

const std::string kNano = NIBBLE_SOURCE_DIR "/models/nano";
const std::string kWiki = NIBBLE_SOURCE_DIR "/tests/data/nano/eval_wiki.u16";

std::string must(std::vector<std::string> arguments, const std::string& input = {}) {
  const std::string command = arguments[0];
  const Result result = nibble(std::move(arguments), input);
  EXPECT_EQ(result.status, 0) << command << ": " << result.err;
  // Not a terminal: plain lines, no redrawing.
  EXPECT_THAT(result.err, AllOf(Not(HasSubstr("\r")), Not(HasSubstr("\033")))) << command;
  EXPECT_TRUE(result.err.empty() || result.err.ends_with('\n')) << command << ": " << result.err;
  EXPECT_TRUE(result.out.empty() || result.out.ends_with('\n')) << command << ": " << result.out;
  return result.out;
}

json::object must_json(std::vector<std::string> arguments, const std::string& input = {}) {
  const std::string out = must(std::move(arguments), input);
  EXPECT_EQ(std::count(out.begin(), out.end(), '\n'), 1) << out;
  return parse_json(out, "standard output").as_object();
}

class EndToEnd : public testing::Test {
 protected:
  std::string path(const std::string& name) const { return (scratch_.path() / name).string(); }

  std::string rtn() const {
    must({"quantize", kNano, "--out", path("rtn"), "--method", "rtn", "--kv-cache", "none"});
    return path("rtn");
  }
  std::string build(const std::string& checkpoint, const std::string& name,
                    std::vector<std::string> more = {}) const {
    std::vector<std::string> arguments = {"build",    checkpoint,         "--out",
                                          path(name), "--max-batch-size", "4"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    must(arguments);
    return path(name);
  }
  static std::string answer(const std::string& model) {
    return must({"run", model, "What is a volcano?", "--temperature", "0", "--max-tokens", "24"});
  }

  TemporaryDirectory scratch_;
};

TEST_F(EndToEnd, QuantizeTellsWhatItDidInReportAndCard) {
  const std::string texts = path("own.jsonl"), more = path("more.txt");
  testing_::write_text(texts,
                       "{\"messages\": [{\"role\": \"user\", \"content\": \"Where is the "
                       "station?\"}, {\"role\": \"assistant\", \"content\": \"Here.\"}]}\n");
  testing_::write_text(more, std::string(2000, 'a') + " and a few words more.");
  const Result done =
      nibble({"quantize", kNano, "--out", path("awq"), "--calib", texts + ":3", "--calib", more,
              "--calib-size", "4", "--calib-seq-len", "64", "--eval", kWiki, "--eval-windows", "1",
              "--report-json", "--base-model", "somebody/nano"});
  EXPECT_EQ(done.status, 0) << done.err;
  EXPECT_THAT(done.out, HasSubstr("eval_wiki.u16: perplexity"));
  // Said, and said once.
  const size_t holds = done.err.find("own.jsonl holds ");
  ASSERT_NE(holds, done.err.npos) << done.err;
  EXPECT_EQ(done.err.find("own.jsonl holds ", holds + 1), done.err.npos) << done.err;
  const fs::path awq = path("awq");
  const json::object config =
      parse_json(read_file(awq / "trt-llm/checkpoints/config.json"), "config").as_object();
  const json::object& sources = config.at("nibble").at("calibration").as_object();
  EXPECT_EQ(sources.at("sources").at(0).at("file"), "own.jsonl");
  EXPECT_EQ(sources.at("sources").at(0).at("weight"), 3.0);
  EXPECT_EQ(sources.at("sources").at(1).at("tokens"), 64);

  const json::object report = parse_json(read_file(awq / "report.json"), "report.json").as_object();
  EXPECT_EQ(report.at("linears").as_array().size(), 30u);
  EXPECT_EQ(report.at("quality").at(0).at("windows"), 1);
  EXPECT_GT(report.at("quality").at(0).at("kl_divergence").to_number<double>(), 0);
  const std::string html = read_file(awq / "report.html");
  EXPECT_THAT(html,
              AllOf(HasSubstr("<svg"), HasSubstr("eval_wiki.u16"), HasSubstr("more.txt"),
                    Not(HasSubstr("src=")), Not(HasSubstr("<script")), Not(HasSubstr("http"))));
  EXPECT_TRUE(html.ends_with("</html>\n"));

  const std::string card = read_file(awq / "README.md");
  EXPECT_THAT(card, AllOf(HasSubstr("pipeline_tag: text-generation"),
                          HasSubstr("base_model:\n- somebody/nano"), HasSubstr("`own.jsonl`"),
                          HasSubstr("| `eval_wiki.u16` | 1 |"), HasSubstr("None was built yet")));
  // A build inside the published layout completes the card there, and gives the engine a copy.
  const std::string engine = path("awq") + "/trt-llm/engines/here";
  build(path("awq"), "awq/trt-llm/engines/here");
  EXPECT_THAT(read_file(awq / "README.md"),
              AllOf(HasSubstr("| `here` | cpu:"), Not(HasSubstr("None was built yet"))));
  EXPECT_EQ(read_file(fs::path(engine) / "README.md"), read_file(awq / "README.md"));
  must({"inspect", engine, "--verify"});
  // bench latency puts its figures there too, on demand; a second run replaces its row.
  EXPECT_THAT(read_file(awq / "README.md"), HasSubstr("Not measured. `nibble bench latency"));
  for (int i = 0; i < 2; ++i) {
    must({"bench", "latency", engine, "--prompt-tokens", "16", "--output-tokens", "8",
          "--write-card"});
  }
  const std::string measured = read_file(awq / "README.md");
  const size_t row = measured.find("x (16 + 8) |");
  ASSERT_NE(row, measured.npos) << measured;
  EXPECT_EQ(measured.find("x (16 + 8) |", row + 1), measured.npos);
  EXPECT_THAT(measured, Not(HasSubstr("Not measured. `nibble bench latency")));
  EXPECT_EQ(read_file(fs::path(engine) / "README.md"), measured);
  must({"inspect", engine, "--verify"});
  const Result no_card = nibble({"bench", "latency", path("awq"), "--write-card"});
  EXPECT_EQ(no_card.status, 2);
  EXPECT_THAT(no_card.err, HasSubstr("wanted `bench latency` of an engine"));
}

TEST_F(EndToEnd, QuantizeRefusesFlagsItsMethodHasNoUseFor) {
  for (const auto& [flags, part] :
       {std::pair{std::vector<std::string>{"--method", "rtn", "--sweeps", "2"},
                  "rounds to nearest"},
        {{"--method", "awq-lite", "--rounding", "compensated"}, "rounds to nearest"},
        {{"--method", "awq-lite", "--clip", "on"}, "does not clip"},
        {{"--rounding", "nearest", "--sweeps", "2"}, "leave one of the two flags out"},
        {{"--sequential", "off", "--correct-drift", "on"}, "knows no layers before"}}) {
    std::vector<std::string> arguments = {"quantize", kNano, "--out", path("never")};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    const Result result = nibble(arguments);
    EXPECT_EQ(result.status, 2) << part;
    EXPECT_THAT(result.err, HasSubstr(part));
    EXPECT_FALSE(fs::exists(path("never") + ".tmp"));
  }
}

TEST_F(EndToEnd, QuantizeWarnsWhereTheBuiltInTextsDoNotMatchTheModel) {
  const auto said = [&](const std::string& model, std::vector<std::string> more = {}) {
    static int count = 0;
    std::vector<std::string> arguments = {
        "quantize",     model, "--out",           path("out" + std::to_string(count++)),
        "--method",     "rtn",  // with KV scales, which need the texts
        "--calib-size", "1",   "--calib-seq-len", "32"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Result result = nibble(arguments);
    EXPECT_EQ(result.status, 0) << result.err;
    return result.err;
  };
  EXPECT_THAT(said(kNano), Not(HasSubstr("may not suit")));
  const fs::path other = path("other");
  fs::copy(kNano, other);
  testing_::write_text(other / "README.md", "---\nlanguage:\n- fr\n- de\n---\n# Autre\n");
  EXPECT_THAT(said(other.string()),
              AllOf(HasSubstr("warning: the built-in calibration texts may not suit this model"),
                    HasSubstr("its card names fr, de"), HasSubstr("--calib")));
  testing_::write_text(path("own.txt"), "Bonjour tout le monde.");
  EXPECT_THAT(said(other.string(), {"--calib", path("own.txt")}), Not(HasSubstr("may not suit")));
  fs::remove(other / "README.md");
  fs::remove(other / "chat_template.jinja");
  EXPECT_THAT(said(other.string()),
              HasSubstr("it has no chat template, so their chats are written"));
}

TEST_F(EndToEnd, QuantizeBuildRunWithAQuantizedLmHead) {
  for (const std::string head : {"int4", "int8"}) {
    must({"quantize", kNano, "--out", path(head), "--calib-size", "2", "--calib-seq-len", "64",
          "--quantize-lm-head", head});
    EXPECT_THAT(must({"inspect", path(head)}), testing::ContainsRegex("lm_head +1 .*" + head));
    EXPECT_EQ(must_json({"inspect", path(head), "--tensor", "lm_head", "--json"}).at("dtype"),
              json::value(head));
    EXPECT_THAT(read_file(fs::path(path(head)) / "README.md"), HasSubstr("| lm_head | " + head));
    EXPECT_THAT(read_file(fs::path(path(head)) / "report.html"),
                HasSubstr("<td>lm_head</td><td>" + head + "</td>"));
    const std::string engine = build(path(head), head + "-engine");
    EXPECT_THAT(must({"inspect", engine}), HasSubstr("\"lm_head_layout\": \"cpu-" + head));
    EXPECT_THAT(answer(engine), HasSubstr("volcano"));
    EXPECT_EQ(answer(engine), answer(path(head)));
    must({"build", path(head), "--out", path(head + "-cuda"), "--target", "cuda:sm_90", "--no-tune",
          "--max-input-len", "100"});
    EXPECT_THAT(must({"inspect", path(head + "-cuda")}),
                HasSubstr("\"lm_head_layout\": \"cuda-" + head));
  }
}

TEST_F(EndToEnd, QuantizeBuildRunWithAwq) {
  const std::string out = must({"quantize", kNano, "--out", path("awq"), "--calib-size", "2",
                                "--calib-seq-len", "64", "--calib-batch", "2"});
  EXPECT_THAT(out, AllOf(HasSubstr("awq, group 128, int8 KV scales, tp 1"),
                         HasSubstr("next: nibble build " + path("awq"))));
  const fs::path checkpoint = fs::path(path("awq")) / "trt-llm" / "checkpoints";
  const json::object config =
      parse_json(read_file(checkpoint / "config.json"), "config.json").as_object();
  EXPECT_EQ("nibble " + std::string(config.at("producer").at("version").as_string()) + "\n",
            nibble({"--version"}).out);
  EXPECT_EQ(config.at("quantization").at("kv_cache_quant_algo").as_string(), "INT8");
  EXPECT_EQ(config.at("nibble").at("eos_token_ids").as_array(), (json::array{2}));
  EXPECT_TRUE(fs::exists(fs::path(path("awq")) / "tokenizer.json"));

  const std::string engine = build(path("awq"), "engine");
  const std::string text = answer(engine);
  EXPECT_THAT(text, HasSubstr("volcano"));
  EXPECT_EQ(answer(engine), text);
  EXPECT_EQ(answer(path("awq")), text) << "a checkpoint packed in memory answers as its engine";
  const std::string fixed = build(path("awq"), "static", {"--kv-cache", "int8-static"});
  const json::object plan = must_json({"inspect", fixed, "--json"}).at("plan").as_object();
  EXPECT_EQ(plan.at("kv_format").as_string(), "int8-static");
  EXPECT_EQ(plan.at("limits").at("max_num_tokens").as_int64(), 512);
  answer(fixed);
}

TEST_F(EndToEnd, RunTakesItsFlags) {
  const std::string engine = build(rtn(), "engine");
  const auto run = [&](std::vector<std::string> more) {
    std::vector<std::string> arguments = {"run", engine, "Tell me about rivers.", "--no-stats"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return nibble(arguments);
  };
  const Result greedy = run({"--temperature", "0", "--max-tokens", "30"});
  EXPECT_EQ(greedy.status, 0);
  EXPECT_EQ(greedy.err, "");
  EXPECT_EQ(run({"--top-k", "1", "--max-tokens", "30", "--seed", "5"}).out, greedy.out);
  const Result a = run({"--seed", "1", "--max-tokens", "30"});
  EXPECT_EQ(run({"--seed", "1", "--max-tokens", "30"}).out, a.out);
  EXPECT_NE(run({"--seed", "2", "--max-tokens", "30"}).out, a.out);
  EXPECT_NE(run({"--temperature", "0", "--max-tokens", "30", "--system", "Speak of the sea."}).out,
            greedy.out);
  const std::string stop = greedy.out.substr(greedy.out.find(' ') + 1, 4);
  const Result stopped = run({"--temperature", "0", "--max-tokens", "30", "--stop", stop});
  EXPECT_EQ(stopped.out, greedy.out.substr(0, greedy.out.find(stop)) + "\n");
  EXPECT_NE(run({"--temperature", "0", "--max-tokens", "30", "--raw"}).out, greedy.out);
  const Result piped =
      nibble({"run", engine, "-", "--no-stats", "--temperature", "0", "--max-tokens", "30"},
             "Tell me about rivers.");
  EXPECT_EQ(piped.out, greedy.out);
  const Result tight = run({"--kv-memory-gib", "0.000001"});
  EXPECT_EQ(tight.status, 1);
  EXPECT_THAT(tight.err, HasSubstr("KV cache"));
}

TEST_F(EndToEnd, BuildTakesItsLimits) {
  const std::string engine = build(rtn(), "engine",
                                   {"--target", "ref", "--max-input-len", "40", "--max-output-len",
                                    "9", "--max-num-tokens", "16", "--kv-cache", "f16"});
  const json::object report = must_json({"inspect", engine, "--json", "--verify"});
  const json::object& plan = report.at("plan").as_object();
  EXPECT_EQ(plan.at("target").as_string(), "ref");
  EXPECT_EQ(plan.at("kv_format").as_string(), "f16");
  EXPECT_EQ(plan.at("limits"), (json::value{{"max_batch_size", 4},
                                            {"max_input_len", 40},
                                            {"max_output_len", 9},
                                            {"max_num_tokens", 16}}));
  EXPECT_EQ(report.at("checksums").as_string(), "ok");
  EXPECT_GT(report.at("memory").at("weights_bytes").as_int64(), 1000000);
  const Result over = nibble({"run", engine, std::string(400, 'x')});
  EXPECT_EQ(over.status, 1);
  EXPECT_THAT(over.err, AllOf(HasSubstr("max_input_len"), HasSubstr("--max-input-len")));
  const Result again = nibble({"build", engine, "--out", path("again")});
  EXPECT_EQ(again.status, 2);
  EXPECT_THAT(again.err, HasSubstr("is an engine already"));
}

TEST_F(EndToEnd, QuantizeTakesItsFlags) {
  must({"quantize", kNano, "--out", path("q"), "--method", "rtn", "--kv-cache", "none",
        "--group-size", "64", "--dtype", "float16"});
  const fs::path checkpoint = fs::path(path("q")) / "trt-llm" / "checkpoints";
  const json::object config =
      parse_json(read_file(checkpoint / "config.json"), "config.json").as_object();
  EXPECT_EQ(config.at("quantization").at("group_size").as_int64(), 64);
  EXPECT_TRUE(config.at("quantization").at("kv_cache_quant_algo").is_null());
  EXPECT_EQ(config.at("dtype").as_string(), "float16");
  must({"quantize", kNano, "--out", path("two"), "--method", "rtn", "--kv-cache", "none", "--tp",
        "2", "--group-size", "64"});
  EXPECT_TRUE(fs::exists(fs::path(path("two")) / "trt-llm/checkpoints/rank1.safetensors"));
  const std::string texts = path("texts.jsonl");
  testing_::write_text(texts,
                       "{\"text\": \"A river carries water to the sea.\"}\n"
                       "{\"messages\": [{\"role\": \"user\", \"content\": \"Hello there\"}, "
                       "{\"role\": \"assistant\", \"content\": \"Good morning to you.\"}]}\n");
  const Result own =
      nibble({"quantize", kNano, "--out", path("own"), "--calib", texts, "--calib-size", "2",
              "--calib-seq-len", "16", "--method", "rtn", "--device", "ref"});
  EXPECT_EQ(own.status, 0) << own.err;
  EXPECT_THAT(own.err, HasSubstr("from " + texts));
}

TEST_F(EndToEnd, EvalPerplexityAndDivergence) {
  const std::vector<std::string> how = {"--ids",         kWiki, "--context", "256",
                                        "--max-windows", "2",   "--json"};
  const auto eval = [&](std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), "eval");
    arguments.insert(arguments.end(), how.begin(), how.end());
    return must_json(arguments);
  };
  const double dense = eval({kNano}).at("perplexity").as_double();
  const std::string checkpoint = rtn();
  const json::object rounded = eval({checkpoint, "--against", kNano});
  EXPECT_EQ(rounded.at("windows").as_int64(), 2);
  EXPECT_EQ(rounded.at("scored_tokens").as_int64(), 2 * 255);
  EXPECT_NEAR(rounded.at("against").at("perplexity").as_double(), dense, 1e-3 * dense);
  EXPECT_GT(rounded.at("kl_divergence").as_double(), 1e-4);
  EXPECT_LT(rounded.at("top1_agreement").as_double(), 1.0);
  EXPECT_GT(rounded.at("top1_agreement").as_double(), 0.5);
  const json::object self = eval({kNano, "--against", kNano});
  EXPECT_EQ(self.at("kl_divergence").as_double(), 0);
  EXPECT_EQ(self.at("top1_agreement").to_number<double>(), 1);
  EXPECT_EQ(self.at("perplexity_rise_percent").as_double(), 0);
  const std::string engine = build(checkpoint, "engine");
  EXPECT_EQ(eval({engine}).at("perplexity").as_double(),
            eval({checkpoint}).at("perplexity").as_double());
  EXPECT_EQ(eval({checkpoint, "--kv-cache", "f16"}).at("kv_cache").as_string(), "f16");
  const std::string text = path("text.txt");
  testing_::write_text(text, "The capital of France is a city on a river. It is old and large.");
  EXPECT_GT(must_json({"eval", kNano, "--text", text, "--context", "8", "--json"})
                .at("perplexity")
                .as_double(),
            1);
}

TEST_F(EndToEnd, EvalAgainstAnotherTokenizerIsRefused) {
  fs::copy(kNano, path("other"));
  const fs::path tokenizer = fs::path(path("other")) / "tokenizer.json";
  json::value file = parse_json(read_file(tokenizer), "tokenizer.json");
  json::object& vocab = file.at("model").at("vocab").as_object();
  std::swap(vocab.at("ing"), vocab.at("er"));  // as many pieces, two of them under other ids
  testing_::write_text(tokenizer, dump_json(file));
  const Result result = nibble({"eval", kNano, "--against", path("other"), "--ids", kWiki,
                                "--context", "64", "--max-windows", "1"});
  EXPECT_EQ(result.status, 1);
  EXPECT_THAT(result.err, AllOf(HasSubstr(path("other")), HasSubstr("tokenizer differs"),
                                HasSubstr("\"ing\"")));
}

TEST_F(EndToEnd, Inspect) {
  const json::object dense = must_json({"inspect", kNano, "--json"});
  EXPECT_EQ(dense.at("kind").as_string(), "hugging-face");
  const std::string checkpoint = rtn();
  EXPECT_EQ(must_json({"inspect", checkpoint, "--json"}).at("kind").as_string(), "checkpoint");
  EXPECT_THAT(must({"inspect", checkpoint}), AllOf(HasSubstr("int4"), HasSubstr("lm_head")));
  const json::object tensor =
      must_json({"inspect", checkpoint, "--tensor", "layers.3.qkv", "--json"});
  EXPECT_TRUE(tensor.contains("shape"));
  EXPECT_THAT(must({"inspect", checkpoint, "--tensor", "layers.3.qkv"}), HasSubstr("512"));
  const Result nearest = nibble({"inspect", checkpoint, "--tensor", "layers.3.qvk"});
  EXPECT_EQ(nearest.status, 1);
  EXPECT_THAT(nearest.err, HasSubstr("layers.3.qkv"));
  const std::string engine = build(checkpoint, "engine");
  EXPECT_THAT(
      must({"inspect", engine, "--verify"}),
      AllOf(HasSubstr("cpu-int4"), HasSubstr("kv_bytes_per_token"), HasSubstr("checksums ok")));
}

TEST_F(EndToEnd, TokenizeAndRender) {
  const std::string ids = must({"tokenize", kNano}, "\"The capital of France is\"\n\"[INST]\"\n");
  EXPECT_EQ(ids.substr(0, ids.find('\n')), "[453, 3207, 299, 2807, 331]");
  EXPECT_EQ(must({"tokenize", kNano, "--decode"}, ids),
            "\"The capital of France is\"\n\"[INST]\"\n");
  EXPECT_EQ(must({"tokenize", kNano, "--bos"}, "\"The\"\n"), "[1, 453]\n");
  const std::string special = must({"tokenize", kNano, "--parse-special"}, "\"[INST]\"\n");
  EXPECT_EQ(std::count(special.begin(), special.end(), ','), 0) << special;
  const std::string chat =
      R"({"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": true})";
  const std::string rendered = must({"render", kNano}, chat + "\n");
  EXPECT_THAT(rendered, AllOf(HasSubstr("[INST]"), HasSubstr("Hello")));
  const std::string own = path("own.jinja");
  testing_::write_text(own, "{{ messages[0].content }}!");
  EXPECT_EQ(must({"render", own}, chat + "\n"), "\"Hello!\"\n");
  testing_::write_text(own, "{{ raise_exception('no') }}");
  EXPECT_THAT(must({"render", own}, chat + "\n"), HasSubstr("\"error\""));
}

TEST_F(EndToEnd, Bench) {
  const json::object latency =
      must_json({"bench", "latency", "--synthetic", "nano-like", "--prompt-tokens", "32",
                 "--output-tokens", "100", "--batch", "2", "--json"});
  EXPECT_EQ(latency.at("batch").as_int64(), 2);
  for (const char* key : {"decode_tokens_per_s", "prefill_tokens_per_s", "weight_gb_per_s",
                          "read_bandwidth_gb_per_s"}) {
    EXPECT_GT(latency.at(key).as_double(), 0) << key;
  }
  EXPECT_FALSE(
      latency.contains("host_us_per_step"));  // this target computes on the engine's thread
  const json::object throughput =
      must_json({"bench", "throughput", "--synthetic", "nano-like", "--prompt-tokens", "16",
                 "--output-tokens", "4", "--batch", "2", "--requests", "5", "--json"});
  EXPECT_EQ(throughput.at("requests").as_int64(), 5);
  EXPECT_GT(throughput.at("ttft_p95_s").as_double(), 0);
  EXPECT_THAT(must({"bench", "ops", "--synthetic", "nano-like", "--prompt-tokens", "16"}),
              HasSubstr("attention"));
  EXPECT_THAT(must({"bench", "latency", kNano, "--prompt-tokens", "8", "--output-tokens", "2"}),
              HasSubstr("tokens/s"));
}

// What a refusal prints is what to type, and it gives the same engine.
TEST_F(EndToEnd, TheRebuildCommandOfARefusalWorks) {
  const std::string engine = build(
      rtn(), "engine", {"--kv-cache", "f16", "--activations", "f32", "--max-num-tokens", "64"});
  const std::string plan = read_file(engine + "/config.json"), before = answer(engine);
  fs::resize_file(engine + "/rank0.engine", 1000);
  const Result refused = nibble({"run", engine, "Hello"});
  EXPECT_EQ(refused.status, 1);
  const size_t at = refused.err.find("nibble build ");
  ASSERT_NE(at, std::string::npos) << refused.err;
  std::istringstream words(refused.err.substr(at, refused.err.find('\n', at) - at));
  std::vector<std::string> arguments{std::istream_iterator<std::string>(words), {}};
  arguments.erase(arguments.begin());
  fs::remove_all(engine);
  must(arguments);
  EXPECT_EQ(read_file(engine + "/config.json"), plan);
  EXPECT_EQ(answer(engine), before);
}

TEST_F(EndToEnd, ASyntheticCudaEngineIsBuiltWithoutAGpuAndSaysHowItsKernelsAreChosen) {
  const std::string engine = path("engine");
  const Result result = nibble({"build", "--synthetic", "nano-like", "--target", "cuda:sm_90",
                                "--max-input-len", "500", "--no-tune", "--out", engine});
  ASSERT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("kernels are chosen by built-in rules, not measured"));
  const json::object report = must_json({"inspect", engine, "--json"});
  const json::object& plan = report.at("plan").as_object();
  EXPECT_EQ(plan.at("source").at("synthetic"), "nano-like");
  EXPECT_EQ(plan.at("cuda").at("gpu"), "") << "nothing was measured";
  fs::resize_file(engine + "/rank0.engine", 1000);
  EXPECT_THAT(nibble({"inspect", engine}).err,
              HasSubstr("nibble build --synthetic nano-like --out " + engine +
                        " --target cuda:sm_90 --max-input-len 500 --no-tune\n"));
}

// Whether the device is there, and has the room, is asked before an engine is built for it.
TEST_F(EndToEnd, ServeAsksForTheDeviceBeforeItBuilds) {
  fs::create_directory(path("made"));
  for (const std::string& model : {rtn(), kNano}) {
    const Result result =
        run_nibble({.arguments = {"serve", model, "--port", "0", "--work-dir", path("made"),
                                  "--target", "cuda:sm_90", "--quantize", "rtn", "--kv-cache-bytes",
                                  "900GiB", "--access-log", "off"}});
    EXPECT_EQ(result.status, 1) << result.err;
    EXPECT_THAT(result.err, AnyOf(HasSubstr("cuda:sm_90"), HasSubstr("--kv-cache-bytes")));
    for (const auto& entry : fs::directory_iterator(path("made"))) {  // with a GPU: a checkpoint
      EXPECT_FALSE(fs::exists(entry.path() / "rank0.engine")) << entry.path();
    }
  }
}

// The engine that serve made for itself is made again when it cannot be served; a user's own is
// left alone.
TEST_F(EndToEnd, ServeBuildsARefusedEngineAgain) {
  const std::string checkpoint = rtn();
  const auto serve = [&](const std::string& model, const std::function<bool()>& until) {
    return run_nibble(
        {.arguments = {"serve", model, "--port", "0", "--work-dir", path("made"), "--activations",
                       "f32", "--max-batch-size", "2", "--access-log", "off"},
         .signal_when = until,
         .signal = SIGTERM});
  };
  fs::create_directory(path("made"));
  fs::path engine;
  const auto there = [&] {
    for (const auto& entry : fs::directory_iterator(path("made"))) {
      if (entry.path().extension() != ".tmp") engine = entry.path();
    }
    return !engine.empty();
  };
  Result result = serve(checkpoint, there);
  ASSERT_TRUE(there()) << result.err;
  // Stopped while it served or just before.
  EXPECT_THAT(result.status, AnyOf(0, 130)) << result.err;
  EXPECT_THAT(engine.filename().string(), AllOf(HasSubstr("-kv-int8"), HasSubstr("-act-f32")));
  const std::string whole = read_file(engine / "rank0.engine");

  fs::resize_file(engine / "rank0.engine", 1000);
  const auto whole_again = [&] {
    std::error_code gone;  // between two moments, while the engine is replaced
    return fs::file_size(engine / "rank0.engine", gone) == whole.size() && !gone;
  };
  result = serve(checkpoint, whole_again);
  EXPECT_THAT(result.status, AnyOf(0, 130)) << result.err;
  EXPECT_THAT(result.err, AllOf(HasSubstr("cannot be served"), HasSubstr("built again"),
                                HasSubstr("building " + engine.string())));
  EXPECT_EQ(read_file(engine / "rank0.engine"), whole);

  // Another model of the same name, in the same --work-dir, has an engine of its own.
  fs::create_directory(path("other"));
  const std::string other = path("other/" + fs::path(checkpoint).filename().string());
  fs::copy(checkpoint, other, fs::copy_options::recursive);
  size_t num_engines = 0;
  result = serve(other, [&] {
    num_engines = 0;
    for (const auto& entry : fs::directory_iterator(path("made")))
      num_engines += entry.path().extension() != ".tmp";
    return num_engines == 2;
  });
  EXPECT_EQ(num_engines, 2u) << result.err;
  EXPECT_EQ(read_file(engine / "rank0.engine"), whole);

  fs::resize_file(engine / "rank0.engine", 1000);
  result = serve(engine.string(), whole_again);
  EXPECT_EQ(result.status, 1) << result.err;
  EXPECT_THAT(result.err, HasSubstr("nibble build " + checkpoint));
  EXPECT_FALSE(whole_again());
}

}  // namespace
}  // namespace nibble::cli_test
