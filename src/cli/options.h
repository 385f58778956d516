// What each command was asked to do, as plain values. parse.cpp fills them, one command_*.cpp acts
// on each. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "build/engine_builder.h"

namespace nibble::cli {

struct CommonOptions {
  bool json = false;
  int threads = 0;  // 0: what affinity and cgroup allow
};

struct QuantizeFlags : CommonOptions {
  std::string model, out;
  std::vector<std::string> calib;  // FILE or FILE:WEIGHT; empty: the built-in texts
  int calib_size = 64, calib_seq_len = 5675, calib_batch = 16;
  int group_size = 128;
  std::string kv_cache = "int8";                          // int8 | none
  std::string method = "awq";                             // awq | awq-lite | rtn
  std::string rounding, sequential, clip, correct_drift;  // empty: the method's own
  int sweeps = -1;                                        // -1: the method's own
  int tp = 1;
  std::string dtype;           // bfloat16 | float16; empty: the model's own
  std::string device = "cpu";  // cpu | cuda | ref
  uint64_t seed = 1234;
  std::string tokenizer_regex = "shipped";
  std::string quantize_lm_head;   // int8 | int4; empty: stays in 16 bits
  std::string base_model;         // "org/name", for the card
  std::vector<std::string> eval;  // texts or ids to measure the result on, against the model
  int eval_windows = 16;
  bool report_json = false;
};

struct BuildFlags {
  std::string checkpoint, synthetic, out;
  std::string target = "cpu:native";
  int max_batch_size = 64, max_input_len = 5525, max_output_len = 150;
  int max_num_tokens = 0;         // 0: by target
  std::string kv_cache = "int8";  // int8 | int8-static | f16
  std::string activations;        // f32 | int8 | fp8; empty: by target
  std::string tokenizer;          // directory
  std::string quantize_lm_head;   // with synthetic: int8 | int4
  bool no_tune = false;
};

struct SamplingFlags {
  double temperature = 0.8, top_p = 0.95, min_p = 0.0, repetition_penalty = 1.0,
         presence_penalty = 0.0, frequency_penalty = 0.0;
  int top_k = 0;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  int max_tokens = 0;  // 0: what the engine allows
};

struct RunFlags : CommonOptions {
  std::string model, prompt, system;
  bool raw = false;  // complete the prompt as text, without the chat template
  bool no_stats = false;
  std::string target = "cpu:native";
  std::string kv_cache = "int8";
  std::string roles = "tolerant";
  std::string tokenizer_regex = "shipped";
  double kv_memory_gib = 0;     // 0: by the next
  uint64_t kv_cache_bytes = 0;  // the same in bytes; 0: enough for one long chat
  SamplingFlags sampling;
};

struct TokenizeFlags {
  std::string model;
  bool bos = false, parse_special = false, decode = false;
  std::string tokenizer_regex = "shipped";
};

struct RenderFlags {
  std::string source;
};

struct EvalFlags : CommonOptions {
  std::string model, text, ids, against;
  int context = 1024, max_windows = 0;
  std::string target = "cpu:native";
  std::string kv_cache;  // empty: f32 for Hugging Face directories, int8 for checkpoints; engines
                         // have their own
  std::string activations;
  std::string tokenizer_regex = "shipped";
};

struct InspectFlags {
  std::string model, tensor;
  bool verify = false, json = false;
};

struct BenchFlags : CommonOptions {
  std::string what;  // latency | throughput | ops
  std::string model, synthetic;
  std::string target = "cpu:native";
  std::string kv_cache = "int8";
  std::string activations;
  std::vector<int> batches = {1};  // more than one: latency only
  int batch = 1;                   // the largest of them
  int prompt_tokens = 512, output_tokens = 64, requests = 0;
  bool write_card = false;  // latency of an engine: into its model card
};

struct SynthesizeFlags : CommonOptions {
  std::string shape, out, tokenizer;
  int layers = 0, shards = 0;  // 0: the shape's own
  uint64_t seed = 1;
};

struct BenchServeFlags : CommonOptions {
  std::string url, model, api_key_file, text, extra_body;
  std::string prompts = "text";  // text | random-ids
  int vocab_size = 32000, sessions = 100, turns = 1, shared_prefix = 0, prefixes = 1;
  bool warm = false;
  int input_len = 128, input_len_max = 0, output_len = 64, output_len_max = 0;  // max 0: fixed
  int concurrency = 0;
  double rate = 0, think_s = 0, timeout_s = 600;
  double slo_ttft_ms = 0, slo_tpot_ms = 0, slo_e2e_ms = 0;
  uint64_t seed = 1;
};

struct ServeFlags : CommonOptions {
  std::string model;
  std::vector<std::string> served_model_names;  // empty: the directory's name
  std::string chat_template, roles = "tolerant", tokenizer_regex = "shipped";
  std::string sampling_defaults = "model";  // model | neutral
  // Network.
  std::string host = "127.0.0.1", tls_cert, tls_key, api_key_file;
  int port = 8000;
  std::vector<std::string> cors_origins;
  int max_connections = 4096;
  uint64_t max_body_bytes = 4 << 20, max_pending_body_bytes = 256 << 20,
           max_header_bytes = 32 << 10;
  double header_timeout_s = 10, body_timeout_s = 60, idle_timeout_s = 75, write_timeout_s = 10,
         ping_s = 15;
  // Work.
  int max_queue = 256, max_choices = 128, workers = 2;
  uint64_t kv_cache_bytes = 0;
  double kv_cache_free_fraction = 0;
  // Operation.
  double drain_s = 30;
  std::string access_log = "-";  // -: standard error; off; a file
  bool web_page = true;
  // What DIR becomes when it is not an engine.
  std::string work_dir;          // empty: beside DIR
  std::string quantize = "awq";  // awq | rtn | none
  std::string target = "cpu:native", kv_cache = "int8";
  std::string activations;  // f32 | int8 | fp8; empty: by target
  int max_batch_size = 64, max_input_len = 0, max_output_len = 0;  // 0: by the model
  int max_num_tokens = 0;                                          // 0: by target
};

int run_quantize(const QuantizeFlags& flags);
BuildOptions build_options(const BuildFlags& flags);
int run_build(const BuildFlags& flags);
int run_chat(const RunFlags& flags);
int run_run(const RunFlags& flags);
int run_tokenize(const TokenizeFlags& flags);
int run_render(const RenderFlags& flags);
int run_eval(const EvalFlags& flags);
int run_inspect(const InspectFlags& flags);
int run_bench(const BenchFlags& flags);
int run_synthesize(const SynthesizeFlags& flags);
int run_bench_serve(const BenchServeFlags& flags);
int run_serve(const ServeFlags& flags);

/// Parses argv and runs the command. Returns the exit status: 0 done, 1 failed, 2 misused, 130
/// interrupted.
int main(int argc, char** argv);

}  // namespace nibble::cli
