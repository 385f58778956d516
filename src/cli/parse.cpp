// The one file that knows CLI11.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <system_error>

#include "base/error.h"
#include "base/nearest.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "formats/synthetic.h"
#include "quantize/awq.h"

namespace nibble::cli {
namespace {

constexpr const char* kActivations =
    "feed int4 linears with exact activations or int8 per group (cpu targets), or with e4m3 in "
    "steps with rows of prompts or 33 rows and more (fp8: cuda:sm_90; ref: all); default by target";
constexpr const char* kMaxNumTokens =
    "tokens in one step: longer prompts are computed in chunks of this, between the steps of other "
    "answers; default 512, 2048 for cuda targets (never less than --max-batch-size)";
constexpr const char* kTargets =
    "cpu:native, cpu:avx512, cpu:avx2, cpu:generic, cuda:sm_90, cuda:portable or ref";

/// One short word for what a flag takes: N, the choices, or TEXT; CLI11's own has the C++ type and
/// every range in it.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_opts(const CLI::Option* option) const override {
    if (option->get_items_expected_max() == 0) return {};  // a plain flag
    const std::string type = option->get_type_name();
    std::string text = " TEXT";
    if (const size_t open = type.find('{'); open != type.npos) {
      text = " " + type.substr(open + 1, type.find('}') - open - 1);
      std::replace(text.begin(), text.end(), ',', '|');
    } else if (!type.starts_with("TEXT")) {
      text = " N";
    }
    const bool is_positional = option->get_positional() && option->get_lnames().empty();
    if (is_positional && text == " TEXT") text.clear();
    if (!option->get_default_str().empty()) text += " (" + option->get_default_str() + ")";
    if (option->get_required() && !is_positional) text += " (required)";
    return text;
  }
};

class Parser {
 public:
  Parser()
      : app_(
            "nibble: quantize a chat model to 4 bits, build an engine for this machine, chat with "
            "it.",
            "nibble") {
    app_.set_version_flag("--version", "nibble " NIBBLE_VERSION);
    app_.require_subcommand(1);
    app_.formatter(std::make_shared<HelpFormatter>());
    app_.get_formatter()->column_width(34);
    add_quantize();
    add_build();
    add_chat_and_run();
    add_serve();
    add_text();
    add_eval();
    add_inspect();
    add_bench();
    add_synthesize();
    // Last: a command made after it would inherit it.
    app_.footer(
        "A first run:\n"
        "  nibble quantize HF_DIR --out model          4-bit checkpoint, calibrated\n"
        "  nibble build model --out engine             engine for this machine\n"
        "  nibble chat engine                          talk to it\n"
        "  nibble serve engine                         OpenAI-compatible server\n"
        "`nibble COMMAND --help` shows a command's flags.");
  }

  int run(int argc, char** argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::Success& success) {
      return app_.exit(success);
    } catch (const CLI::ParseError& error) {
      // A mistyped flag is the likely reason why a required one is missing: it is named first.
      refuse_unknown_flags();
      const std::vector<CLI::App*> commands = app_.get_subcommands();
      if (commands.empty()) refuse_unknown_command();
      const std::string name = commands.front()->get_name();
      fail(ErrorKind::kUsage, "{}: {}; see nibble {} --help", name, error.what(), name);
    }
    refuse_unknown_flags();
    for (const auto& [name, command] : chosen_commands()) {
      const std::vector<std::string> extras = command->remaining();
      if (extras.empty()) continue;
      fail(ErrorKind::kUsage, "{}: unexpected argument {}; see nibble {} --help", name,
           extras.front(), name);
    }
    return action_();
  }

 private:
  /// CLI11 reports a mistyped command as a missing one.
  [[noreturn]] void refuse_unknown_command() {
    const std::vector<std::string> extras = app_.remaining();
    std::vector<std::string> names;
    for (const CLI::App* command : app_.get_subcommands({})) names.push_back(command->get_name());
    if (extras.empty()) {
      fail(ErrorKind::kUsage, "a command is needed: {}; see nibble --help", fmt::join(names, ", "));
    }
    fail(ErrorKind::kUsage, "unknown command {}; did you mean {}? See nibble --help",
         extras.front(), nearest_name(extras.front(), names));
  }

  /// The command and, for "bench serve", the command in it; with their full names.
  std::vector<std::pair<std::string, const CLI::App*>> chosen_commands() {
    std::vector<std::pair<std::string, const CLI::App*>> chosen;
    for (const CLI::App* command : app_.get_subcommands()) {
      chosen.emplace_back(command->get_name(), command);
      for (const CLI::App* nested : command->get_subcommands()) {
        chosen.emplace_back(command->get_name() + " " + nested->get_name(), nested);
      }
    }
    return chosen;
  }

  void refuse_unknown_flags() {
    std::vector<std::pair<std::string, const CLI::App*>> apps = chosen_commands();
    apps.emplace(apps.begin(), "", &app_);
    for (const auto& [full_name, app] : apps) {
      const std::string name = full_name.empty() ? "" : full_name + " ";
      const std::string prefix = full_name.empty() ? "" : full_name + ": ";
      for (const std::string& extra : app->remaining()) {
        if (!extra.starts_with("-") || extra == "-" || extra == "--") continue;
        const std::string flag = extra.substr(0, extra.find('='));
        std::vector<std::string> known;
        for (const CLI::Option* option : app->get_options()) {
          for (const std::string& long_name : option->get_lnames())
            known.push_back("--" + long_name);
        }
        fail(ErrorKind::kUsage, "{}unknown flag {}; did you mean {}? See nibble {}--help", prefix,
             flag, nearest_name(flag, known), name);
      }
    }
  }

  CLI::App* command(const char* name, const char* description, std::function<int()> action) {
    CLI::App* command = app_.add_subcommand(name, description);
    command->allow_extras();
    command->get_formatter()->column_width(38);
    command->callback([this, action = std::move(action)] { action_ = action; });
    return command;
  }

  static void add_json(CLI::App* command, bool& json) {
    command->add_flag("--json", json, "print one JSON object instead of text");
  }

  static void add_common(CLI::App* command, CommonOptions& flags, bool json = true) {
    if (json) add_json(command, flags.json);
    command
        ->add_option("--threads", flags.threads, "threads; 0 takes what affinity and cgroup allow")
        ->check(CLI::Range(0, 1024));
  }

  static CLI::Option* add_choice(CLI::App* command, const char* name, std::string& value,
                                 const std::vector<std::string>& choices,
                                 const std::string& description) {
    return command->add_option(name, value, description)->check(CLI::IsMember(choices));
  }

  static void add_regex(CLI::App* command, std::string& value) {
    add_choice(command, "--tokenizer-regex", value, {"shipped", "tekken"},
               "split pattern: the one in tokenizer.json, or Mistral's own");
  }

  void add_quantize() {
    auto& f = quantize_;
    CLI::App* c = command(
        "quantize", "Hugging Face checkpoint -> portable INT4 checkpoint (TensorRT-LLM layout)",
        [this] { return run_quantize(quantize_); });
    c->add_option("HF_DIR", f.model, "directory with config.json and *.safetensors")->required();
    c->add_option("--out", f.out, "directory to create")->required();
    c->add_option(
        "--calib", f.calib,
        "calibration texts: .jsonl with \"messages\" or \"text\", or .txt; several make a "
        "mixture, FILE:WEIGHT sets a file's share; default: texts shipped with nibble");
    c->add_option("--calib-size", f.calib_size, "calibration sequences")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    c->add_option("--calib-seq-len", f.calib_seq_len, "tokens of a sequence")
        ->check(CLI::Range(8, 1 << 20))
        ->capture_default_str();
    c->add_option("--calib-batch", f.calib_batch, "sequences in memory at once")
        ->check(CLI::Range(1, 4096))
        ->capture_default_str();
    c->add_option("--group-size", f.group_size, "input channels that share a scale")
        ->check(CLI::IsMember({64, 128}))
        ->capture_default_str();
    add_choice(c, "--kv-cache", f.kv_cache, {"int8", "none"},
               "calibrate int8 KV scales, or leave them out")
        ->capture_default_str();
    add_choice(c, "--method", f.method, {"awq", "awq-lite", "rtn"},
               "activation-aware; as ModelOpt's awq_lite does it, to compare; or round to nearest")
        ->capture_default_str();
    add_choice(c, "--rounding", f.rounding, {"nearest", "compensated"},
               "each weight by itself, or errors pushed into the weights not yet rounded (awq: "
               "compensated)");
    c->add_option("--sweeps", f.sweeps,
                  fmt::format("of coordinate descent after compensated rounding, with refitted "
                              "scales; 0: none (awq: {})",
                              awq::RoundingOptions().sweeps))
        ->check(CLI::Range(0, 100));
    add_choice(c, "--clip", f.clip, {"on", "off"}, "search each group's largest weight (awq: on)");
    add_choice(c, "--sequential", f.sequential, {"on", "off"},
               "calibrate a layer on what the quantized layers before it make (awq: on, awq-lite: "
               "off)");
    c->add_option("--tp", f.tp, "write this many rank files")
        ->check(CLI::Range(1, 64))
        ->capture_default_str();
    add_choice(c, "--dtype", f.dtype, {"bfloat16", "float16"},
               "of what stays unquantized; default: the model's");
    add_choice(c, "--device", f.device, {"cpu", "cuda", "ref"},
               "where calibration and rounding run; cuda needs a GPU and cuBLAS")
        ->capture_default_str();
    add_choice(c, "--correct-drift", f.correct_drift, {"on", "off"},
               "move the weights, before they are rounded, to make up for errors of the layers "
               "before (awq with --sequential on: on)");
    c->add_option("--seed", f.seed, "order of the calibration samples")->capture_default_str();
    c->add_option(
        "--eval", f.eval,
        "measure perplexity, KL divergence and top-1 agreement with the unquantized model "
        "on a text or .u16 ids (may be repeated); goes into report.html and README.md");
    c->add_option("--eval-windows", f.eval_windows, "windows of 1024 tokens of each; 0: all")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    add_choice(c, "--quantize-lm-head", f.quantize_lm_head, {"int8", "int4"},
               "store lm_head in 8 or 4 bits too; it stays in 16 by default");
    c->add_option("--base-model", f.base_model,
                  "the original's name on Hugging Face, for README.md: org/name");
    c->add_flag("--report-json", f.report_json, "write report.json beside report.html");
    add_regex(c, f.tokenizer_regex);
    add_common(c, f, false);
  }

  void add_build() {
    auto& f = build_;
    CLI::App* c =
        command("build", "checkpoint (or Hugging Face directory) -> engine for one kind of machine",
                [this] { return run_build(build_); });
    c->add_option("CHECKPOINT", f.checkpoint,
                  "what quantize wrote, or any TensorRT-LLM checkpoint");
    c->add_option("--synthetic", f.synthetic,
                  "instead of CHECKPOINT: random int4 weights of a shape, for measuring (see "
                  "synthesize --shape); --tokenizer makes it servable");
    add_choice(c, "--quantize-lm-head", f.quantize_lm_head, {"int8", "int4"},
               "with --synthetic: lm_head in 8 or 4 bits too");
    c->add_option("--out", f.out, "engine directory to create")->required();
    c->add_option("--target", f.target, kTargets)->capture_default_str();
    c->add_option("--max-batch-size", f.max_batch_size, "sequences in one step")
        ->capture_default_str();
    c->add_option("--max-input-len", f.max_input_len, "tokens of a prompt")->capture_default_str();
    c->add_option("--max-output-len", f.max_output_len, "tokens of an answer")
        ->capture_default_str();
    c->add_option("--max-num-tokens", f.max_num_tokens, kMaxNumTokens)->check(CLI::PositiveNumber);
    add_choice(c, "--kv-cache", f.kv_cache, {"int8", "int8-static", "f16"},
               "int8 with scales per token and head, int8 with the checkpoint's scales, or f16")
        ->capture_default_str();
    add_choice(c, "--activations,--activation-precision", f.activations, {"f32", "int8", "fp8"},
               kActivations);
    c->add_option("--tokenizer", f.tokenizer,
                  "directory with tokenizer.json when the checkpoint has none");
    c->add_flag("--no-tune", f.no_tune,
                "choose kernels by built-in rules instead of measuring them (cuda:sm_90): two "
                "builds then give the same bits");
  }

  void add_run_flags(CLI::App* c, RunFlags& f) {
    c->add_option("--system", f.system, "system prompt");
    c->add_option("--max-tokens", f.sampling.max_tokens,
                  "longest answer; default: what the engine allows")
        ->check(CLI::PositiveNumber);
    c->add_option("--temperature", f.sampling.temperature, "0 is greedy")
        ->check(CLI::Range(0.0, 100.0))
        ->capture_default_str();
    c->add_option("--top-p", f.sampling.top_p, "nucleus")
        ->check(CLI::Range(0.0, 1.0))
        ->capture_default_str();
    c->add_option("--top-k", f.sampling.top_k, "0: off")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    c->add_option("--min-p", f.sampling.min_p, "0: off")
        ->check(CLI::Range(0.0, 1.0))
        ->capture_default_str();
    c->add_option("--repetition-penalty", f.sampling.repetition_penalty, "1: off")
        ->check(CLI::Range(0.01, 10.0))
        ->capture_default_str();
    c->add_option("--presence-penalty", f.sampling.presence_penalty, "0: off")
        ->check(CLI::Range(-2.0, 2.0))
        ->capture_default_str();
    c->add_option("--frequency-penalty", f.sampling.frequency_penalty, "0: off")
        ->check(CLI::Range(-2.0, 2.0))
        ->capture_default_str();
    c->add_option("--seed", f.sampling.seed, "same seed, same answer");
    c->add_option("--stop", f.sampling.stop, "text that ends the answer (may be repeated)");
    c->add_option("--target", f.target, "for directories that are not engines")
        ->capture_default_str();
    add_choice(c, "--kv-cache", f.kv_cache, {"int8", "int8-static", "f16"},
               "for directories that are not engines")
        ->capture_default_str();
    add_choice(c, "--roles", f.roles, {"strict", "tolerant"},
               "what to do with unusual message orders")
        ->capture_default_str();
    CLI::Option* gib = c->add_option("--kv-memory-gib", f.kv_memory_gib,
                                     "memory for the KV cache; default: enough for one long chat");
    c->add_option("--kv-cache-bytes", f.kv_cache_bytes, "the same in bytes (2GiB, 500MB, ...)")
        ->transform(CLI::AsSizeValue(false))
        ->excludes(gib);
    add_regex(c, f.tokenizer_regex);
    add_common(c, f, false);
  }

  void add_chat_and_run() {
    CLI::App* chat =
        command("chat", "talk to a model in the terminal", [this] { return run_chat(chat_); });
    chat->add_option("DIR", chat_.model, "engine, checkpoint or Hugging Face directory")
        ->required();
    add_run_flags(chat, chat_);
    chat->footer("In the chat: /regenerate /continue /system TEXT /save FILE /reset /help /quit");
    CLI::App* run = command("run", "answer one prompt and exit", [this] { return run_run(run_); });
    run->add_option("DIR", run_.model, "engine, checkpoint or Hugging Face directory")->required();
    run->add_option("PROMPT", run_.prompt, "what the user says; - reads standard input")
        ->required();
    run->add_flag("--raw", run_.raw,
                  "complete the prompt as plain text, without the chat template");
    run->add_flag("--no-stats", run_.no_stats, "leave out the line with speeds");
    add_run_flags(run, run_);
  }

  void add_serve() {
    auto& f = serve_;
    CLI::App* c =
        command("serve", "OpenAI-compatible HTTP server", [this] { return run_serve(serve_); });
    c->add_option("DIR", f.model,
                  "engine; a checkpoint or Hugging Face directory is made into one first")
        ->required();
    const std::string model = "Model";
    c->add_option("--served-model-name", f.served_model_names,
                  "name clients call the model by (may be repeated); default: DIR's name")
        ->group(model);
    c->add_option("--chat-template", f.chat_template, "template file instead of the model's own")
        ->group(model);
    add_choice(c, "--roles", f.roles, {"strict", "tolerant"},
               "what to do with unusual message orders")
        ->capture_default_str()
        ->group(model);
    add_choice(c, "--sampling-defaults", f.sampling_defaults, {"model", "neutral"},
               "for what a request leaves out: generation_config.json's, or plain temperature 1")
        ->capture_default_str()
        ->group(model);
    add_choice(c, "--tokenizer-regex", f.tokenizer_regex, {"shipped", "tekken"},
               "split pattern: the one in tokenizer.json, or Mistral's own")
        ->group(model);
    c->add_option("--threads", f.threads,
                  "threads of the engine; 0 takes what affinity and cgroup allow")
        ->check(CLI::Range(0, 1024))
        ->group(model);

    const std::string memory = "Memory and load";
    CLI::Option* bytes = c->add_option("--kv-cache-bytes", f.kv_cache_bytes,
                                       "memory of the KV cache (2GiB, 500MB, ...)")
                             ->transform(CLI::AsSizeValue(false))
                             ->group(memory);
    c->add_option(
         "--kv-cache-free-mem-fraction,--kv-cache-free-gpu-memory-fraction",
         f.kv_cache_free_fraction,
         "of the memory free after loading; default: 0.9 on a GPU, elsewhere enough for a full "
         "batch, at most half")
        ->check(CLI::Range(0.01, 0.95))
        ->excludes(bytes)
        ->group(memory);
    c->add_option("--max-queue", f.max_queue, "requests that may wait; more are answered 429")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str()
        ->group(memory);
    c->add_option("--max-choices", f.max_choices, "prompts x n of one request")
        ->check(CLI::Range(1, 1 << 16))
        ->capture_default_str()
        ->group(memory);
    c->add_option("--workers", f.workers, "threads that parse, template and tokenize")
        ->check(CLI::Range(1, 64))
        ->capture_default_str()
        ->group(memory);

    add_serve_network(c, f);

    const std::string operation = "Operation";
    c->add_option("--drain-seconds", f.drain_s, "how long running answers may take after SIGTERM")
        ->check(CLI::Range(0.0, 86400.0))
        ->capture_default_str()
        ->group(operation);
    c->add_option("--access-log", f.access_log, "file, - for standard error, or off")
        ->capture_default_str()
        ->group(operation);
    c->add_flag("!--no-web-page", f.web_page, "do not serve the chat page at /")->group(operation);

    const std::string make = "When DIR is not an engine";
    c->add_option("--work-dir", f.work_dir,
                  "where the checkpoint and engine go; default: beside DIR")
        ->group(make);
    add_choice(c, "--quantize", f.quantize, {"awq", "rtn", "none"},
               "how a Hugging Face model becomes 4-bit")
        ->capture_default_str()
        ->group(make);
    c->add_option("--target", f.target, kTargets)->capture_default_str()->group(make);
    add_choice(c, "--kv-cache", f.kv_cache, {"int8", "int8-static", "f16"},
               "format of the KV cache")
        ->capture_default_str()
        ->group(make);
    add_choice(c, "--activations,--activation-precision", f.activations, {"f32", "int8", "fp8"},
               kActivations)
        ->group(make);
    c->add_option("--max-batch-size", f.max_batch_size, "sequences in one step")
        ->capture_default_str()
        ->group(make);
    c->add_option("--max-input-len", f.max_input_len,
                  "tokens of a prompt; default: 8192, or three quarters of the model's context")
        ->group(make);
    c->add_option("--max-output-len", f.max_output_len,
                  "tokens of an answer; default: 2048, or a quarter of the model's context")
        ->group(make);
    c->add_option("--max-num-tokens", f.max_num_tokens, kMaxNumTokens)
        ->check(CLI::PositiveNumber)
        ->group(make);
  }

  void add_serve_network(CLI::App* c, ServeFlags& f) {
    const std::string network = "Network";
    const auto seconds = [&](const char* name, double& value, const char* description) {
      c->add_option(name, value, description)
          ->check(CLI::Range(0.1, 86400.0))
          ->capture_default_str()
          ->group(network);
    };
    const auto size = [&](const char* name, uint64_t& value, const char* description) {
      c->add_option(name, value, description)
          ->transform(CLI::AsSizeValue(false) & CLI::Range(uint64_t{1024}, uint64_t{1} << 40))
          ->capture_default_str()
          ->group(network);
    };
    c->add_option("--host", f.host, "address to listen on; 0.0.0.0 or :: for all")
        ->capture_default_str()
        ->group(network);
    c->add_option("--port", f.port, "0: any free one")
        ->check(CLI::Range(0, 65535))
        ->capture_default_str()
        ->group(network);
    c->add_option("--api-key-file", f.api_key_file,
                  "file with one key a line; default: no key needed")
        ->group(network);
    c->add_option("--cors-origin", f.cors_origins,
                  "origin whose pages may call (may be repeated), or *; default: none")
        ->group(network);
    CLI::Option* cert =
        c->add_option("--tls-cert", f.tls_cert, "PEM certificate chain: serve HTTPS")
            ->group(network);
    c->add_option("--tls-key", f.tls_key, "its PEM private key")->needs(cert)->group(network);
    c->add_option("--max-connections", f.max_connections, "more are answered 503")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str()
        ->group(network);
    size("--max-body-bytes", f.max_body_bytes, "of a request; larger ones are answered 413");
    size("--max-pending-body-bytes", f.max_pending_body_bytes,
         "of all request bodies being read; beyond it 503");
    size("--max-header-bytes", f.max_header_bytes, "of a request's head; larger ones get 431");
    seconds("--header-timeout", f.header_timeout_s, "seconds for a request's head to arrive");
    seconds("--body-timeout", f.body_timeout_s, "seconds for its body");
    seconds("--idle-timeout", f.idle_timeout_s, "seconds a connection may sit between requests");
    seconds("--write-timeout", f.write_timeout_s,
            "seconds a reader may take none of 64 KiB before it is cut");
    c->add_option("--ping-seconds", f.ping_s,
                  "comment lines into streams silent this long; 0: none")
        ->check(CLI::Range(0.0, 86400.0))
        ->capture_default_str()
        ->group(network);
  }

  void add_text() {
    CLI::App* t = command("tokenize", "JSON lines of strings -> JSON lines of token ids, or back",
                          [this] { return run_tokenize(tokenize_); });
    t->add_option("DIR", tokenize_.model, "directory with tokenizer.json")->required();
    t->add_flag("--bos", tokenize_.bos, "put the beginning-of-sequence token first");
    t->add_flag("--parse-special", tokenize_.parse_special,
                "read control strings such as [INST] as control tokens");
    t->add_flag("--decode", tokenize_.decode, "arrays of ids in, strings out");
    add_regex(t, tokenize_.tokenizer_regex);
    CLI::App* r = command(
        "render", "JSON lines of {\"messages\": ...} -> the text a chat template makes of them",
        [this] { return run_render(render_); });
    r->add_option("SOURCE", render_.source, "model directory or a .jinja file")->required();
  }

  void add_eval() {
    auto& f = eval_;
    CLI::App* c = command("eval", "perplexity, and closeness to another model",
                          [this] { return run_eval(eval_); });
    c->add_option("MODEL", f.model, "Hugging Face directory, checkpoint or engine")->required();
    CLI::Option* text = c->add_option("--text", f.text,
                                      "text file (.jsonl with \"messages\" or \"text\", or .txt)");
    c->add_option("--ids", f.ids, "token ids, little-endian uint16 (.u16) or uint32 (.u32)")
        ->excludes(text);
    c->add_option("--context", f.context, "tokens of a window")
        ->check(CLI::Range(2, 1 << 20))
        ->capture_default_str();
    c->add_option("--max-windows", f.max_windows, "stop after this many windows; 0: all")
        ->check(CLI::NonNegativeNumber);
    c->add_option("--against", f.against,
                  "parent model with the same tokenizer: adds KL divergence and top-1 agreement");
    c->add_option("--target", f.target, std::string(kTargets) + "; an engine has its own")
        ->capture_default_str();
    add_choice(
        c, "--kv-cache", f.kv_cache, {"int8", "int8-static", "f16", "f32"},
        "default: f32 for Hugging Face directories, int8 for checkpoints; an engine has its own");
    add_choice(c, "--activations,--activation-precision", f.activations, {"f32", "int8", "fp8"},
               "how int4 linears are fed; default by target; an engine has its own");
    add_regex(c, f.tokenizer_regex);
    add_common(c, f);
  }

  void add_inspect() {
    CLI::App* c =
        command("inspect",
                "what a model, checkpoint, engine or single tensor holds, and the memory it needs",
                [this] { return run_inspect(inspect_); });
    c->add_option("MODEL", inspect_.model, "Hugging Face directory, checkpoint or engine")
        ->required();
    c->add_option("--tensor", inspect_.tensor, "statistics of one tensor by name");
    c->add_flag("--verify", inspect_.verify,
                "read a whole engine and compare it with its checksums");
    add_json(c, inspect_.json);
  }

  CLI::App* add_bench_serve(CLI::App* bench) {
    auto& f = bench_serve_;
    CLI::App* c = bench->add_subcommand("serve", "load an OpenAI-compatible server and measure it");
    c->allow_extras();
    c->get_formatter()->column_width(38);
    c->add_option("URL", f.url, "base URL with its version, http://127.0.0.1:8000/v1")->required();
    c->add_option("--model", f.model, "default: the first the server lists");
    c->add_option("--api-key-file", f.api_key_file, "file whose first line is the key");
    c->add_option("--sessions", f.sessions, "conversations in all")
        ->check(CLI::Range(1, 10'000'000))
        ->capture_default_str();
    c->add_option("--turns", f.turns, "requests of a session, each with those before in it")
        ->check(CLI::Range(1, 10'000))
        ->capture_default_str();
    c->add_option("--think-seconds", f.think_s, "pause between an answer and the next turn")
        ->check(CLI::NonNegativeNumber);
    c->add_option("--concurrency", f.concurrency, "sessions at a time; 0: no bound")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    c->add_option("--rate", f.rate, "sessions begun a second, Poisson; 0: as soon as possible")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    add_choice(c, "--prompts", f.prompts, {"text", "random-ids"},
               "chats made of words, or text completions of random token ids")
        ->capture_default_str();
    c->add_option("--text", f.text, "file the words come from; default: texts shipped with nibble");
    c->add_option("--vocab-size", f.vocab_size, "random ids are drawn from 100 up to this")
        ->capture_default_str();
    c->add_option("--shared-prefix", f.shared_prefix, "words (ids) that every session begins with")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    c->add_option("--prefixes", f.prefixes,
                  "so many different ones, taken in turn: clients' own conversations")
        ->check(CLI::Range(1, 1'000'000))
        ->capture_default_str();
    c->add_flag("--warm", f.warm, "send every prefix once before what is measured");
    c->add_option("--input-len", f.input_len, "words (ids) of a turn")->capture_default_str();
    c->add_option("--input-len-max", f.input_len_max, "draw the length from input-len up to this");
    c->add_option("--output-len", f.output_len, "tokens of an answer")->capture_default_str();
    c->add_option("--output-len-max", f.output_len_max, "draw it from output-len up to this");
    c->add_option("--timeout-seconds", f.timeout_s, "of a request")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    c->add_option("--seed", f.seed, "of arrivals, lengths and ids")->capture_default_str();
    c->add_option("--extra-body", f.extra_body,
                  "JSON object that goes into every request: '{\"repetition_penalty\": 1.1}'");
    c->add_option("--slo-ttft-ms", f.slo_ttft_ms, "a good request's first token comes within this");
    c->add_option("--slo-tpot-ms", f.slo_tpot_ms, "its mean time per token is at most this");
    c->add_option("--slo-e2e-ms", f.slo_e2e_ms, "it is complete within this");
    c->add_flag("--json", f.json, "print one JSON object instead of text");
    return c;
  }

  void add_bench() {
    auto& f = bench_;
    CLI::App* c = command("bench", "measure: latency, throughput, single ops or a server",
                          [this] { return run_bench(bench_); });
    CLI::App* serve = add_bench_serve(c);
    c->callback([this, serve] {
      if (serve->parsed()) {
        action_ = [this] { return run_bench_serve(bench_serve_); };
      } else {
        action_ = [this] { return run_bench(bench_); };
      }
    });
    add_choice(c, "WHAT", f.what, {"latency", "throughput", "ops"},
               "latency: prefill and decode of one batch; throughput: many requests through the "
               "engine; ops: kernels (or the command serve, below)");
    CLI::Option* model =
        c->add_option("MODEL", f.model, "engine, checkpoint or Hugging Face directory");
    std::vector<std::string> shapes;
    for (const SyntheticShape& shape : synthetic_shapes())
      shapes.push_back(fmt::format("{} ({})", shape.name, shape.about));
    c->add_option("--synthetic", f.synthetic,
                  fmt::format("random int4 weights of a named shape instead of a model: {}",
                              fmt::join(shapes, ", ")))
        ->excludes(model);
    c->add_option("--target", f.target, std::string(kTargets) + "; an engine has its own")
        ->capture_default_str();
    add_choice(c, "--kv-cache", f.kv_cache, {"int8", "int8-static", "f16"}, "an engine has its own")
        ->capture_default_str();
    add_choice(c, "--activations,--activation-precision", f.activations, {"f32", "int8", "fp8"},
               "how int4 linears are fed; default by target; an engine has its own");
    c->add_option("--batch", f.batches,
                  "sequences decoded together; latency takes a list such as 1,8,64")
        ->delimiter(',')
        ->check(CLI::Range(1, 4096))
        ->capture_default_str();
    c->add_option("--prompt-tokens", f.prompt_tokens, "prompt length")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    c->add_option("--output-tokens", f.output_tokens, "tokens generated")
        ->check(CLI::Range(1, 1 << 20))
        ->capture_default_str();
    c->add_option("--requests", f.requests, "throughput: requests in all; default 4 x batch");
    c->add_flag("--write-card", f.write_card, "latency of an engine: add the figures to README.md");
    add_common(c, f);
  }

  void add_synthesize() {
    auto& f = synthesize_;
    CLI::App* c = command("synthesize", "write a Hugging Face checkpoint of random weights",
                          [this] { return run_synthesize(synthesize_); });
    c->add_option("SHAPE", f.shape, "nano-like, bench-1.1b, mistral-7b or mistral-24b")->required();
    c->add_option("--out", f.out, "directory to create")->required();
    c->add_option("--layers", f.layers, "this many layers instead of the shape's")
        ->check(CLI::Range(1, 1000));
    c->add_option("--shards", f.shards, "this many files instead of the shape's")
        ->check(CLI::Range(1, 1000));
    c->add_option("--seed", f.seed, "same shape and seed, same weights")->capture_default_str();
    c->add_option("--tokenizer", f.tokenizer,
                  "directory whose tokenizer, chat template and generation config are copied");
    add_common(c, f);
  }

  CLI::App app_;
  std::function<int()> action_;
  QuantizeFlags quantize_;
  BuildFlags build_;
  RunFlags chat_, run_;
  ServeFlags serve_;
  TokenizeFlags tokenize_;
  RenderFlags render_;
  EvalFlags eval_;
  InspectFlags inspect_;
  BenchFlags bench_;
  SynthesizeFlags synthesize_;
  BenchServeFlags bench_serve_;
};

}  // namespace

int main(int argc, char** argv) {
  install_interrupt_handler();
  try {
    const int status = Parser().run(argc, argv);
    if (std::fflush(stdout) != 0 || !std::cout.flush()) {
      fail(ErrorKind::kIo, "cannot write to standard output: {}", std::strerror(errno));
    }
    return status;
  } catch (const Error& error) {
    print_stderr("nibble: {}\n", error.what());
    switch (error.kind()) {
      case ErrorKind::kUsage: return 2;
      case ErrorKind::kInterrupted: return 130;
      default: return 1;
    }
  } catch (const std::bad_alloc&) {
    print_stderr("nibble: out of memory\n");
  } catch (const std::system_error& error) {
    print_stderr("nibble: {}\n", error.what());
  } catch (const std::exception& error) {
    print_stderr("nibble: a bug in nibble: {}\n", error.what());
  }
  return 1;
}

}  // namespace nibble::cli
