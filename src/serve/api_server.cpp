// SPDX-License-Identifier: Apache-2.0
#include "serve/api_server.h"

#include <algorithm>
#include <atomic>
#include <ctime>
#include <future>
#include <map>
#include <random>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "serve/access_log.h"
#include "serve/api_error.h"
#include "serve/generation.h"
#include "serve/metrics.h"
#include "serve/token_hub.h"
#include "serve/web_page.h"
#include "serve/worker_pool.h"
#include "text/output_parser.h"
#include "text/utf8.h"

namespace nibble {
namespace {

using Clock = std::chrono::steady_clock;
using ExchangePtr = std::shared_ptr<HttpExchange>;

constexpr int kMaxTextJobs = 256;  // /tokenize and /detokenize at work or waiting
constexpr size_t kMaxRequestIdBytes = 128;
constexpr JsonStyle kCompact{.item_separator = ",", .key_separator = ":"};

bool is_plain_id(std::string_view id) {
  return !id.empty() && id.size() <= kMaxRequestIdBytes &&
         std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < 0x7f; });
}

class ApiServerImpl final : public ApiServer {
 public:
  explicit ApiServerImpl(ApiOptions options)
      : options_(std::move(options)), random_(std::random_device{}()) {
    if (options_.model_names.empty()) options_.model_names.push_back("nibble");
    hub_ = std::make_shared<TokenHub>([this] { http_->post([this] { deliver(); }); });
    workers_ = std::make_unique<WorkerPool>(options_.num_workers);
    std::promise<void> ready;  // the handler must not run before http_ is set
    const std::shared_future<void> is_ready = ready.get_future().share();
    http_ = HttpServer::start(options_.http,
                              {.handler =
                                   [this, is_ready](const ExchangePtr& exchange) {
                                     is_ready.wait();
                                     handle(exchange);
                                   },
                               .error_reply =
                                   [this](int status, std::string_view message) {
                                     metrics_.count_reply(status);
                                     return ApiError::from_status(status, message).response();
                                   },
                               .tick = [this] { ping_silent(); }});
    ready.set_value();
  }

  ~ApiServerImpl() override {
    stop();
    generations_.clear();  // before the model they point to
    http_.reset();
  }

  void set_model(std::unique_ptr<ChatModel> model, const SamplingParams& defaults) override {
    model_ = std::move(model);
    std::promise<void> done;
    http_->post([&] {
      defaults_ = defaults;
      serving_ = model_.get();
      done.set_value();
    });
    done.get_future().wait();
  }

  int port() const override { return http_->port(); }
  bool healthy() const override { return model_ != nullptr && model_->engine().healthy(); }
  const ChatModel* model() const override { return model_.get(); }

  void reload(ApiKeys keys) override {
    http_->reload_certificate();
    http_->post([this, keys = std::move(keys)]() mutable { options_.keys = std::move(keys); });
  }

  bool drain(std::chrono::milliseconds deadline) override {
    const Clock::time_point end = Clock::now() + deadline;
    draining_ = true;
    bool clean = model_ == nullptr || model_->engine().drain(deadline);
    http_->stop_accepting();
    // The last tokens still have to leave; readers that take none are cut.
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
    clean = http_->wait_idle(std::max(left, std::chrono::milliseconds(3000))) && clean;
    return clean;
  }

  void stop() override {
    if (stopped_) return;
    stopped_ = true;
    draining_ = true;
    workers_->stop();
    if (model_) model_->engine().stop();
    http_->stop();
  }

 private:
  // ---- I/O thread: requests ---------------------------------------------------------------

  struct Call {
    ExchangePtr exchange;
    std::shared_ptr<AccessRecord> record;
    std::vector<HttpHeader> headers;  // of every reply to it
    Clock::time_point arrival;
  };

  void handle(const ExchangePtr& exchange) {
    Call call{
        .exchange = exchange, .record = std::make_shared<AccessRecord>(), .arrival = Clock::now()};
    const HttpRequest& request = exchange->request;
    call.record->remote = request.remote;
    call.record->method = request.method;
    call.record->path = request.path;
    const std::string_view sent_id = request.header("X-Request-Id");
    call.record->request_id = is_plain_id(sent_id) ? std::string(sent_id) : random_id();
    call.headers.push_back({"X-Request-Id", call.record->request_id});
    add_cors_headers(request, call.headers);
    exchange->on_done = [this, record = call.record, arrival = call.arrival,
                         exchange = exchange.get()](bool complete) {
      log(*record, *exchange, arrival, complete);
    };
    try {
      route(call);
    } catch (const ApiError& error) {
      reply_error(call, error);
    } catch (const Error& error) {
      reply_error(call, ApiError::from(error));
    }
  }

  void route(const Call& call) {
    const HttpRequest& request = call.exchange->request;
    using Handler = void (ApiServerImpl::*)(const Call&);
    struct Route {
      std::string_view path, method;
      Handler handler;
      bool open = false;  // without a key
    };
    static constexpr Route kRoutes[] = {
        {"/v1/chat/completions", "POST", &ApiServerImpl::generate},
        {"/v1/completions", "POST", &ApiServerImpl::generate},
        {"/v1/models", "GET", &ApiServerImpl::list_models},
        {"/tokenize", "POST", &ApiServerImpl::tokenize},
        {"/detokenize", "POST", &ApiServerImpl::detokenize},
        {"/health", "GET", &ApiServerImpl::health, true},
        {"/ready", "GET", &ApiServerImpl::ready, true},
        {"/version", "GET", &ApiServerImpl::version, true},
        {"/metrics", "GET", &ApiServerImpl::metrics, true},
    };
    if (request.method == "OPTIONS") {
      preflight(call);
      return;
    }
    const std::string_view method =
        request.method == "HEAD" ? std::string_view("GET") : std::string_view(request.method);
    for (const Route& route : kRoutes) {
      if (route.path != request.path) continue;
      if (route.method != method) wrong_method(request, route.method);
      if (!route.open) {
        refuse_blind_posts(request);
        check_key(request);
      }
      (this->*route.handler)(call);
      return;
    }
    if (options_.web_page || request.path == kOpenApiPath) {
      if (const WebFile* file = find_web_file(request.path)) {
        if (method != "GET") wrong_method(request, "GET");
        page(call, *file);
        return;
      }
    }
    check_key(request);
    if (request.path.starts_with("/v1/models/")) {
      if (method != "GET") wrong_method(request, "GET");
      one_model(call, request.path.substr(std::string_view("/v1/models/").size()));
      return;
    }
    throw ApiError::not_found("not_found",
                              fmt::format("{} {}: there is no such endpoint; nibble answers "
                                          "/v1/chat/completions, /v1/completions, /v1/models, "
                                          "/tokenize, /detokenize, /health, /ready, /version and "
                                          "/metrics",
                                          request.method, request.path.substr(0, 200)));
  }

  [[noreturn]] static void wrong_method(const HttpRequest& request, std::string_view wanted) {
    ApiError error(
        fmt::format("{} {}: this endpoint wants {}", request.method, request.path, wanted));
    error.status = 405;
    error.type = "invalid_request_error";
    error.code = "method_not_allowed";
    error.allow = wanted == "GET" ? "GET, HEAD, OPTIONS" : "POST, OPTIONS";
    throw error;
  }

  /// A page of any site can make a browser send such a request without asking (no preflight), to
  /// a server that only this machine should reach. It cannot read the answer, but it would be made.
  static void refuse_blind_posts(const HttpRequest& request) {
    if (request.header("Sec-Fetch-Mode") != "no-cors") return;
    ApiError error(
        "a web page sent this with mode \"no-cors\", whose answer it may not read; allow its "
        "origin "
        "with --cors-origin and send it as an ordinary request");
    error.status = 403;
    error.type = "invalid_request_error";
    error.code = "forbidden";
    throw error;
  }

  void check_key(const HttpRequest& request) const {
    if (options_.keys.empty()) return;
    std::string_view header = request.header("Authorization");
    constexpr std::string_view kScheme = "bearer ";
    if (header.empty()) {
      throw ApiError::unauthorized(
          "no API key was sent; send the header \"Authorization: Bearer KEY\"");
    }
    const bool bearer =
        header.size() > kScheme.size() &&
        std::equal(kScheme.begin(), kScheme.end(), header.begin(),
                   [](char a, char b) { return a == (b >= 'A' && b <= 'Z' ? b - 'A' + 'a' : b); });
    if (bearer) header.remove_prefix(kScheme.size());
    if (!bearer || !options_.keys.accepts(header)) {
      throw ApiError::unauthorized("the API key is not one of this server's");
    }
  }

  void add_cors_headers(const HttpRequest& request, std::vector<HttpHeader>& headers) const {
    const auto& origins = options_.cors_origins;
    if (origins.empty()) return;
    const bool any = std::find(origins.begin(), origins.end(), "*") != origins.end();
    const std::string origin(request.header("Origin"));
    if (!any) headers.push_back({"Vary", "Origin"});
    if (origin.empty()) return;
    if (!any && std::find(origins.begin(), origins.end(), origin) == origins.end()) return;
    headers.push_back({"Access-Control-Allow-Origin", any ? "*" : origin});
    headers.push_back({"Access-Control-Expose-Headers", "X-Request-Id, Retry-After"});
    if (request.method != "OPTIONS") return;
    headers.push_back({"Access-Control-Allow-Methods", "GET, POST, OPTIONS"});
    const std::string wanted(request.header("Access-Control-Request-Headers"));
    headers.push_back(
        {"Access-Control-Allow-Headers", wanted.empty() ? "Authorization, Content-Type" : wanted});
    headers.push_back({"Access-Control-Max-Age", "86400"});
  }

  void preflight(const Call& call) {
    reply(call, {.status = 204, .content_type = "", .headers = {{"Allow", "GET, POST, OPTIONS"}}});
  }

  ChatModel& model_or_refuse() {
    if (serving_ == nullptr) {
      metrics_.count_rejected("loading");
      throw ApiError::unavailable("the model is still loading", 5);
    }
    return *serving_;
  }

  /// The name a reply carries. Throws ApiError{404} for a model that is not served.
  std::string resolve_model(const std::string& name) const {
    const auto& names = options_.model_names;
    if (name.empty()) return names.front();
    if (std::find(names.begin(), names.end(), name) != names.end()) return name;
    ApiError error = ApiError::not_found(
        "model_not_found", fmt::format("The model `{}` does not exist; this server has {}",
                                       name.substr(0, 200), fmt::join(names, ", ")));
    error.param = "model";
    throw error;
  }

  void generate(const Call& call) {
    ChatModel& model = model_or_refuse();
    if (draining_) {
      metrics_.count_rejected("draining");
      throw ApiError::unavailable("the server is shutting down", 5);
    }
    if (!model.engine().healthy()) {
      metrics_.count_rejected("failed");
      throw ApiError::unavailable("the engine has failed: " + model.engine().failure(), 30);
    }
    // A place in the queue comes first: an overloaded server says so before it does any work.
    auto slot = std::make_shared<QueueSlot>(model.engine().reserve_slot());
    if (!*slot) {
      metrics_.count_rejected("queue_full");
      throw ApiError::queue_full(
          "the server is busy and its queue is full (--max-queue); retry in a moment");
    }
    const bool is_chat = call.exchange->request.path == "/v1/chat/completions";
    auto body = std::make_shared<std::string>(std::move(call.exchange->request.body));
    workers_->post([this, call, slot, body, is_chat, &model] {
      const auto prepared = std::make_shared<PreparedRequest>();
      try {
        *prepared = prepare(model, is_chat, *body);
      } catch (const std::exception& error) {
        post_error(call, error);
        return;
      }
      *body = {};
      http_->post([this, call, slot, prepared] {
        call.exchange->release_body();
        begin(call, std::move(*slot), std::move(*prepared));
      });
    });
  }

  // ---- workers ------------------------------------------------------------------------------

  PreparedRequest prepare(const ChatModel& model, bool is_chat, std::string_view text) const {
    PreparedRequest out;
    out.body = is_chat ? parse_chat_body(text, defaults_, options_.limits)
                       : parse_completion_body(text, defaults_, options_.limits);
    GenerationBody& body = out.body;
    body.model = resolve_model(body.model);
    if (body.format) body.params.constraint = constraint(model, body.format);
    if (is_chat) {
      if (body.uses_tools() && !can_call_tools(model.tokenizer())) {
        throw ApiError::unsupported("tools",
                                    "tools is given, but this model's tokenizer has no "
                                    "[TOOL_CALLS]: it cannot call tools; leave tools out");
      }
      out.prompts.push_back(encode_chat(model, std::move(body.chat)));
      if (body.format && ends_in_reasoning(model.tokenizer(), out.prompts[0])) {
        throw ApiError::unsupported(
            body.format.field,
            fmt::format("the prompt ends inside of [THINK], where {} cannot hold; leave one out",
                        body.format.field));
      }
      using Choice = GenerationBody::ToolChoice;
      if (body.tool_choice == Choice::kRequired || body.tool_choice == Choice::kNamed) {
        out.forced = forced_tool_call(model.tokenizer(), body.tool_name);
        out.prompts[0].insert(out.prompts[0].end(), out.forced.begin(), out.forced.end());
      }
      return out;
    }
    for (Prompt& prompt : body.prompts) {
      if (auto* ids = std::get_if<std::vector<int32_t>>(&prompt)) {
        check_ids(model, *ids, "prompt");
        if (body.echo) {
          out.prompt_texts.push_back(model.tokenizer().decode(*ids, body.skip_special));
        }
        out.prompts.push_back(std::move(*ids));
        continue;
      }
      auto& string = std::get<std::string>(prompt);
      out.prompts.push_back(encode_prompt(model, string, body.add_special_tokens));
      if (body.echo) out.prompt_texts.push_back(std::move(string));
    }
    body.prompts = {};
    return out;
  }

  static std::shared_ptr<const TokenConstraint> constraint(const ChatModel& model,
                                                           const OutputFormat& format) {
    try {
      return model.constraint(format);
    } catch (const Error& error) {
      throw ApiError::from(error, format.field);
    }
  }

  static std::vector<int32_t> encode_chat(const ChatModel& model, ChatRequest chat) {
    try {
      return model.encode_chat(std::move(chat));
    } catch (const Error& error) {
      throw ApiError::from(error, "messages");
    }
  }

  static std::vector<int32_t> encode_prompt(const ChatModel& model, std::string_view text,
                                            bool add_special) {
    return model.tokenizer().encode(text, /*parse_special=*/true, /*add_bos=*/add_special);
  }

  static void check_ids(const ChatModel& model, const std::vector<int32_t>& ids,
                        std::string_view param) {
    const int vocab = model.plan().spec.vocab_size;
    for (size_t i = 0; i < ids.size(); ++i) {
      if (ids[i] >= vocab) {
        throw ApiError::bad_request(
            param, fmt::format("{}[{}] is {}, but token ids run from 0 to {}", param, i, ids[i],
                               vocab - 1));
      }
    }
  }

  /// An error found by a worker, sent from the I/O thread.
  void post_error(const Call& call, const std::exception& error) {
    std::shared_ptr<ApiError> api;
    if (const auto* known = dynamic_cast<const ApiError*>(&error)) {
      api = std::make_shared<ApiError>(*known);
    } else if (const auto* ours = dynamic_cast<const Error*>(&error)) {
      api = std::make_shared<ApiError>(ApiError::from(*ours));
    } else {
      api = std::make_shared<ApiError>(error.what());
      api->code = "internal_error";
    }
    http_->post([this, call, api] { reply_error(call, *api); });
  }

  // ---- I/O thread: generations --------------------------------------------------------------

  void begin(const Call& call, QueueSlot slot, PreparedRequest prepared) {
    if (!call.exchange->is_open()) return;  // the client left meanwhile; the slot goes back
    const uint64_t key = next_key_++;
    Generation::Origin origin{
        .exchange = call.exchange,
        .record = call.record,
        .headers = call.headers,
        .reply_id = (prepared.body.is_chat ? "chatcmpl-" : "cmpl-") + random_id(),
        .model_name = prepared.body.model,
        .arrival = call.arrival};
    auto generation = std::make_shared<Generation>(Generation::Services{*serving_, *hub_, metrics_},
                                                   key, std::move(origin), std::move(prepared));
    generations_.emplace(key, generation);
    call.exchange->on_done = [this, key, record = call.record, arrival = call.arrival,
                              exchange = call.exchange.get()](bool complete) {
      const auto found = generations_.find(key);
      if (found != generations_.end()) {
        const auto gone = found->second;
        generations_.erase(found);
        gone->abandon();
      }
      log(*record, *exchange, arrival, complete);
    };
    try {
      generation->start(std::move(slot));
    } catch (const ApiError& error) {
      generations_.erase(key);
      reply_error(call, error);
    }
  }

  /// What the engine made since the last time.
  void deliver() {
    hub_->take(batch_);
    touched_.clear();
    for (const TokenHub::Event& event : batch_.events) {
      const auto found = generations_.find(event.reply);
      if (found == generations_.end()) continue;  // its client has gone
      const auto generation = found->second;
      generation->on_event(event, batch_);
      if (generation->is_finished()) {
        generations_.erase(event.reply);
      } else {
        touched_.push_back(generation);
      }
    }
    for (const auto& generation : touched_) {
      if (!generation->is_finished()) generation->flush();
    }
    touched_.clear();
  }

  void ping_silent() {
    if (options_.ping_interval.count() == 0) return;
    const Clock::time_point now = Clock::now();
    keys_.clear();  // a write may cut its reader and erase its generation
    for (const auto& [key, generation] : generations_) keys_.push_back(key);
    for (const uint64_t key : keys_) {
      const auto found = generations_.find(key);
      if (found == generations_.end()) continue;
      const auto generation = found->second;
      generation->ping(now, options_.ping_interval);
    }
  }

  // ---- I/O thread: the small endpoints --------------------------------------------------------

  template <class Work>  // json::value(const ChatModel&, std::string_view body), on a worker
  void answer_on_worker(const Call& call, Work work) {
    ChatModel& model = model_or_refuse();
    if (num_text_jobs_ >= kMaxTextJobs) {
      metrics_.count_rejected("queue_full");
      throw ApiError::queue_full("too many texts are being tokenized; retry in a moment");
    }
    ++num_text_jobs_;
    auto body = std::make_shared<std::string>(std::move(call.exchange->request.body));
    workers_->post([this, call, body, work = std::move(work), &model] {
      try {
        auto text = std::make_shared<std::string>(dump_json(work(model, *body), kCompact));
        http_->post([this, call, text] {
          --num_text_jobs_;
          reply(call, {.body = std::move(*text)});
        });
      } catch (const std::exception& error) {
        http_->post([this] { --num_text_jobs_; });
        post_error(call, error);
      }
    });
  }

  void tokenize(const Call& call) {
    answer_on_worker(call, [this](const ChatModel& model, std::string_view text) -> json::value {
      TokenizeBody body = parse_tokenize_body(text);
      resolve_model(body.model);
      const std::vector<int32_t> ids =
          body.is_chat ? encode_chat(model, std::move(body.chat))
                       : encode_prompt(model, body.prompt, body.add_special_tokens);
      json::array tokens(ids.begin(), ids.end());
      json::object out{{"count", ids.size()},
                       {"max_model_len", model.engine().max_seq_len()},
                       {"tokens", std::move(tokens)}};
      if (body.return_token_strs) {
        json::array strings;
        for (const int32_t id : ids) {
          std::string shown;
          utf8::append_lossy(shown, model.tokenizer().token_bytes(id));
          strings.push_back(json::string(shown));
        }
        out["token_strs"] = std::move(strings);
      }
      return out;
    });
  }

  void detokenize(const Call& call) {
    answer_on_worker(call, [this](const ChatModel& model, std::string_view text) -> json::value {
      const DetokenizeBody body = parse_detokenize_body(text);
      resolve_model(body.model);
      check_ids(model, body.tokens, "tokens");
      return json::object{{"prompt", model.tokenizer().decode(body.tokens, false)}};
    });
  }

  json::object model_object(const std::string& name) const {
    return {{"id", name},
            {"object", "model"},
            {"created", started_at_},
            {"owned_by", "nibble"},
            {"root", options_.model_names.front()},
            {"parent", nullptr},
            {"max_model_len", serving_->engine().max_seq_len()},
            {"permission", json::array()}};
  }

  void list_models(const Call& call) {
    model_or_refuse();
    json::array data;
    for (const std::string& name : options_.model_names) data.push_back(model_object(name));
    reply_json(call, 200, json::object{{"object", "list"}, {"data", std::move(data)}});
  }

  void one_model(const Call& call, const std::string& name) {
    model_or_refuse();
    reply_json(call, 200, model_object(resolve_model(name)));
  }

  /// Lives: the model is there and the engine has not failed. Stays 200 while draining.
  void health(const Call& call) {
    if (serving_ == nullptr) {
      reply_json(call, 503, json::object{{"status", "loading"}});
    } else if (!serving_->engine().healthy()) {
      reply_json(call, 503,
                 json::object{{"status", "failed"}, {"reason", serving_->engine().failure()}});
    } else {
      reply_json(call, 200, json::object{{"status", "ok"}});
    }
  }

  /// Takes new requests.
  void ready(const Call& call) {
    if (draining_) {
      reply_json(call, 503, json::object{{"status", "draining"}});
    } else {
      health(call);
    }
  }

  void version(const Call& call) {
    reply_json(call, 200, json::object{{"version", NIBBLE_VERSION}});
  }

  void metrics(const Call& call) {
    EngineStats stats;
    Metrics::Context context{.model_name = options_.model_names.front(),
                             .http = http_->stats(),
                             .streams = static_cast<int>(generations_.size())};
    if (serving_ != nullptr) {
      stats = serving_->engine().stats();
      context.engine = &stats;
      context.kv_block_tokens = serving_->plan().kv_block_tokens;
      context.cache_dtype = kv_format_name(serving_->plan().kv_format);
    }
    reply(call, {.content_type = "text/plain; version=0.0.4; charset=utf-8",
                 .body = metrics_.render(context)});
  }

  void page(const Call& call, const WebFile& file) {
    HttpResponse response{.content_type = std::string(file.content_type)};
    response.headers = {{"ETag", std::string(file.etag)},
                        {"Cache-Control", "no-cache"},
                        {"X-Content-Type-Options", "nosniff"},
                        {"Referrer-Policy", "no-referrer"},
                        {"Content-Security-Policy", std::string(kContentSecurityPolicy)}};
    if (call.exchange->request.header("If-None-Match") == file.etag) {
      response.status = 304;
    } else {
      response.body = file.content;
    }
    reply(call, std::move(response));
  }

  // ---- I/O thread: replies ------------------------------------------------------------------

  void reply(const Call& call, HttpResponse response) {
    response.headers.insert(response.headers.end(), call.headers.begin(), call.headers.end());
    call.exchange->respond(std::move(response));
  }
  void reply_json(const Call& call, int status, const json::value& value) {
    reply(call, {.status = status, .body = dump_json(value, kCompact)});
  }
  void reply_error(const Call& call, const ApiError& error) {
    call.exchange->release_body();
    reply(call, error.response());
  }

  void log(AccessRecord& record, const HttpExchange& exchange, Clock::time_point arrival,
           bool complete) {
    record.status = exchange.status();
    if (record.status != 0) metrics_.count_reply(record.status);
    if (!options_.access_log) return;
    const bool probe =
        record.path == "/health" || record.path == "/ready" || record.path == "/metrics";
    if (probe && record.status == 200) return;
    record.complete = complete;
    record.bytes = exchange.bytes_queued();
    record.ms = std::chrono::duration<double, std::milli>(Clock::now() - arrival).count();
    options_.access_log(record.to_json());
  }

  std::string random_id() { return fmt::format("{:016x}{:016x}", random_(), random_()); }

  ApiOptions options_;
  const int64_t started_at_ = std::time(nullptr);
  std::atomic<bool> draining_{false};
  bool stopped_ = false;

  std::unique_ptr<ChatModel> model_;
  std::shared_ptr<TokenHub> hub_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<WorkerPool> workers_;

  // I/O thread.
  ChatModel* serving_ = nullptr;  // model_ once requests may use it
  SamplingParams defaults_;
  Metrics metrics_;
  std::unordered_map<uint64_t, std::shared_ptr<Generation>> generations_;
  uint64_t next_key_ = 1;
  int num_text_jobs_ = 0;
  TokenHub::Batch batch_;
  std::vector<std::shared_ptr<Generation>> touched_;
  std::vector<uint64_t> keys_;
  std::mt19937_64 random_;
};

}  // namespace

std::unique_ptr<ApiServer> ApiServer::start(ApiOptions options) {
  return std::make_unique<ApiServerImpl>(std::move(options));
}

}  // namespace nibble
