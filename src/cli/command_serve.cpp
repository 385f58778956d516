// serve: an engine (made first when DIR is something else) behind the HTTP API, until a signal.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <optional>
#include <thread>

#include "base/error.h"
#include "base/hash.h"
#include "base/interrupt.h"
#include "build/cuda_plugin.h"
#include "build/engine_check.h"
#include "build/model_loader.h"
#include "build/tokenizer_files.h"
#include "cli/names.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "formats/inspect.h"
#include "formats/model_directory.h"
#include "serve/access_log.h"
#include "serve/api_server.h"

namespace nibble::cli {
namespace {

std::chrono::milliseconds to_ms(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1e3));
}

fs::path without_trailing_slash(const fs::path& path) {
  return path.has_filename() ? path : path.parent_path();
}

/// Where quantize and build put what they make of DIR.
/// Beside `dir`, or in --work-dir. There models of one name may meet, so the name says, as a hash,
/// where `dir` lies, unless that is --work-dir itself.
fs::path product_path(const ServeFlags& flags, const fs::path& dir, std::string_view suffix) {
  const fs::path from = dir.parent_path();
  const fs::path to = flags.work_dir.empty()
                          ? from
                          : without_trailing_slash(fs::absolute(flags.work_dir).lexically_normal());
  std::string name = dir.filename().string();
  if (to != from) {
    const std::string where = from.string();
    name += "-" + hex64(xxh3_64(std::as_bytes(std::span(where)))).substr(0, 8);
  }
  return to / (name + std::string(suffix));
}

BuildFlags build_flags(const ServeFlags& flags, const fs::path& checkpoint) {
  const int context = open_source(checkpoint)->spec().max_position;
  BuildFlags build;
  build.checkpoint = checkpoint.string();
  build.target = flags.target;
  build.kv_cache = flags.kv_cache;
  build.activations = flags.activations;
  build.max_batch_size = flags.max_batch_size;
  build.max_num_tokens = flags.max_num_tokens;
  build.max_input_len =
      flags.max_input_len > 0 ? flags.max_input_len : std::min(8192, context - context / 4);
  build.max_output_len =
      flags.max_output_len > 0 ? flags.max_output_len : std::min(2048, context / 4);
  return build;
}

struct Prepared {
  fs::path engine;
  /// Where the engine was there already: what makes it again.
  std::optional<BuildFlags> again;
};

void build_for(const fs::path& dir, const BuildFlags& build, ChatModelOptions options) {
  options.load.build = build_options(build);
  ChatModel::check_device(dir, options);  // in a second, where building may take a minute
  fmt::print(stderr, "building {} from {}\n", build.out, dir.string());
  run_build(build);
}

/// The engine to serve, making what is missing. Every product keeps its name, so that the next
/// start finds it.
Prepared prepare_engine(const ServeFlags& flags, const ChatModelOptions& options) {
  fs::path dir = without_trailing_slash(fs::absolute(flags.model).lexically_normal());
  ModelKind kind = model_kind(dir);
  if (kind == ModelKind::kEngine) return {dir, std::nullopt};
  if (kind == ModelKind::kHuggingFace && flags.quantize != "none") {
    const fs::path checkpoint = product_path(flags, dir, "-int4-" + flags.quantize);
    if (fs::exists(checkpoint)) {
      fmt::print(stderr, "{} is a Hugging Face model; its 4-bit checkpoint {} is there already\n",
                 dir.string(), checkpoint.string());
    } else {
      fmt::print(stderr,
                 "{} is a Hugging Face model: quantizing it to 4 bits ({}) into {}, then building "
                 "an engine for {} beside it\n",
                 dir.string(), flags.quantize, checkpoint.string(), resolve_target(flags.target));
      const std::string device = resolve_target(flags.target);
      if (device.starts_with("cuda:")) {  // a device that is not there should not show afterwards
        make_backend(device, default_activation_precision(device), flags.threads);
      }
      QuantizeFlags quantize;
      quantize.threads = flags.threads;
      quantize.model = dir.string();
      quantize.out = checkpoint.string();
      quantize.method = flags.quantize;
      quantize.tokenizer_regex = flags.tokenizer_regex;
      // Only the static format uses calibrated scales; round-to-nearest then needs no texts at all.
      quantize.kv_cache =
          flags.quantize == "rtn" && flags.kv_cache != "int8-static" ? "none" : "int8";
      run_quantize(quantize);
    }
    dir = checkpoint;
  }
  BuildFlags build = build_flags(flags, dir);
  std::string target = resolve_target(flags.target);
  const ActivationPrecision activations = activation_precision_from_flag(flags.activations)
                                              .value_or(default_activation_precision(target));
  check_activation_precision(target, activations);
  const int cuda = target.starts_with("cuda:") ? cuda_plugin_major(target) : 0;
  std::replace(target.begin(), target.end(), ':', '-');
  if (cuda > 0) target += fmt::format("-cuda{}", cuda);
  // The name says all that tells engines of one checkpoint apart.
  const fs::path engine = product_path(
      flags, dir,
      fmt::format("-{}-nibble-{}-b{}-in{}-out{}{}-kv-{}-act-{}", target, NIBBLE_VERSION,
                  build.max_batch_size, build.max_input_len, build.max_output_len,
                  build.max_num_tokens > 0 ? fmt::format("-step{}", build.max_num_tokens) : "",
                  build.kv_cache, activation_precision_name(activations)));
  build.out = engine.string();
  if (fs::exists(engine)) {
    fmt::print(stderr, "serving {}, the engine that was built from {}\n", engine.string(),
               dir.string());
    return {engine, build};
  }
  build_for(dir, build, options);
  return {engine, std::nullopt};
}

/// Opens the engine. One that was found where serve puts its own, but is refused (damaged, of
/// another plan format), is built again.
std::unique_ptr<ChatModel> open_model(const Prepared& prepared, const ChatModelOptions& options) {
  if (prepared.again) {
    try {
      return ChatModel::open(prepared.engine, options);
    } catch (const EngineRefused& error) {
      fmt::print(stderr, "the engine that is there cannot be served: {}\nso it is built again\n",
                 error.what());
    }
    // Beside it: what fails leaves the old one where it is.
    const fs::path refused = prepared.engine.string() + ".refused";
    BuildFlags beside = *prepared.again;
    beside.out = prepared.engine.string() + ".again";
    fs::remove_all(beside.out);
    build_for(beside.checkpoint, beside, options);
    fs::remove_all(refused);
    fs::rename(prepared.engine, refused);
    fs::rename(beside.out, prepared.engine);
    fs::remove_all(refused);
  }
  return ChatModel::open(prepared.engine, options);
}

SamplingParams read_sampling_defaults(const ServeFlags& flags, const fs::path& engine) {
  const fs::path file = engine / "generation_config.json";
  if (flags.sampling_defaults == "neutral" || !fs::exists(file)) return {};
  return sampling_defaults(read_json_object(file));
}

ApiOptions api_options(const ServeFlags& flags, AccessLog* log) {
  ApiOptions options;
  HttpOptions& http = options.http;
  http.host = flags.host;
  http.port = flags.port;
  http.tls_cert = flags.tls_cert;
  http.tls_key = flags.tls_key;
  http.max_connections = flags.max_connections;
  http.max_header_bytes = flags.max_header_bytes;
  http.max_body_bytes = flags.max_body_bytes;
  http.max_pending_body_bytes = std::max(flags.max_pending_body_bytes, flags.max_body_bytes);
  http.header_timeout = to_ms(flags.header_timeout_s);
  http.body_timeout = to_ms(flags.body_timeout_s);
  http.idle_timeout = to_ms(flags.idle_timeout_s);
  http.write_timeout = to_ms(flags.write_timeout_s);
  options.model_names = flags.served_model_names;
  if (options.model_names.empty()) {
    options.model_names.push_back(
        without_trailing_slash(fs::absolute(flags.model).lexically_normal()).filename().string());
  }
  if (!flags.api_key_file.empty()) options.keys = ApiKeys::load(flags.api_key_file);
  options.cors_origins = flags.cors_origins;
  options.limits.max_choices = flags.max_choices;
  options.num_workers = flags.workers;
  options.ping_interval = to_ms(flags.ping_s);
  options.web_page = flags.web_page;
  if (log != nullptr) {
    options.access_log = [log](std::string line) { log->write(std::move(line)); };
  }
  return options;
}

/// What SIGHUP does: keys and certificate are read and the log file is opened again. What is not
/// good is named, and the old one stays.
void reload(const ServeFlags& flags, ApiServer& server, AccessLog* log) {
  const auto again = [](const char* what, const auto& action) {
    try {
      action();
      fmt::print(stderr, "SIGHUP: {} again\n", what);
    } catch (const Error& error) {
      fmt::print(stderr, "SIGHUP: {}; what was there before stays in use\n", error.what());
    }
  };
  again("read API keys and certificate", [&] {
    server.reload(flags.api_key_file.empty() ? ApiKeys() : ApiKeys::load(flags.api_key_file));
  });
  again("opened the access log", [&] {
    if (log != nullptr) log->reopen();
  });
}

}  // namespace

int run_serve(const ServeFlags& flags) {
  install_reload_handler();
  std::unique_ptr<AccessLog> log;
  if (flags.access_log != "off") log = AccessLog::open(flags.access_log);
  // The socket first: a taken port should not show after an hour of quantizing.
  const auto server = ApiServer::start(api_options(flags, log.get()));
  const std::string url =
      fmt::format("{}://{}:{}", flags.tls_cert.empty() ? "http" : "https",
                  flags.host.find(':') == std::string::npos ? flags.host : "[" + flags.host + "]",
                  server->port());
  ChatModelOptions options;
  options.load.num_threads = flags.threads;
  options.tokenizer.regex = parse_tokenizer_regex(flags.tokenizer_regex);
  options.roles = flags.roles == "strict" ? RolePolicy::kStrict : RolePolicy::kTolerant;
  options.chat_template = flags.chat_template;
  options.kv_cache_bytes = flags.kv_cache_bytes;
  options.kv_cache_free_fraction = flags.kv_cache_free_fraction;
  options.kv_cache_sequences = 0;
  options.max_queue = flags.max_queue;
  options.on_memory_plan = [](const std::string& plan) { fmt::print(stderr, "{}\n", plan); };
  const Prepared prepared = prepare_engine(flags, options);
  const fs::path& engine = prepared.engine;
  auto model = open_model(prepared, options);
  const SamplingParams defaults = read_sampling_defaults(flags, engine);
  for (const std::string& notice : model->notices()) fmt::print(stderr, "{}\n", notice);
  fmt::print(stderr,
             "serving {} at {}/v1 ({} tokens of context, {} sequences a step, KV cache of {}; "
             "template: {}{})\n",
             engine.string(), url, model->engine().max_seq_len(),
             model->plan().limits.max_batch_size, human_bytes(model->kv_cache_bytes()),
             model->chat_template().origin(),
             flags.api_key_file.empty() ? "" : "; API keys needed");
  server->set_model(std::move(model), defaults);

  while (!interrupt_requested()) {
    if (take_reload_request()) reload(flags, *server, log.get());
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  fmt::print(stderr, "draining: running answers have {:g} s\n", flags.drain_s);
  const bool clean = server->drain(to_ms(flags.drain_s));
  server->stop();
  fmt::print(stderr, "{}\n",
             clean ? "stopped; every answer was completed"
                   : "stopped; answers that were not complete at the deadline were cut");
  return 0;
}

}  // namespace nibble::cli
