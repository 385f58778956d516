// Maps the ops to launchers and owns the device memory they share. Nothing here knows a CUDA type.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/cuda_backend.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "backends/cuda/checked_device.h"
#include "backends/cuda/cuda_calibration.h"
#include "backends/cuda/device_memory.h"
#include "backends/cuda/generic.h"
#include "backends/cuda/int4_linears.h"
#include "backends/cuda/kernels.h"
#include "backends/cuda/put_off.h"
#include "backends/cuda/runtime.h"
#include "backends/cuda/step_graphs.h"
#include "backends/cuda/tune.h"
#include "backends/cuda/variant.h"
#include "backends/cuda/weight_loader.h"
#include "base/error.h"

namespace nibble::cuda {
namespace {

constexpr int kHeadDim = 128, kPageTokens = 64, kFastGroup = 4;
constexpr size_t kActBytes = 2;
static_assert(kFp8GroupedTokens == kE4m3GroupedRows);

// Programmatic dependent launch of the kernels that know it. The other generic ones are launched
// plainly and wait for all before them. Portable code has no griddepcontrol and must not use it.
#ifdef NIBBLE_CUDA_NO_PDL
constexpr bool kDependent = false;
#else
constexpr bool kDependent = !kPortable;
#endif

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(ActivationPrecision precision)
      : device_(open_checked_device()),
        stream_(new_stream()),
        int4_(device_.num_sms, precision == ActivationPrecision::kE4m3, kDependent, stream_,
              &scratch_moves_),
        graphs_(stream_, &scratch_moves_) {
    for (void*& mark : marks_) check(event_create(&mark), "making an event");
    const size_t decode = attention_workspace_bytes(device_.num_sms);
    decode_workspace_ = own(decode);
    check(memory_fill(decode_workspace_, 0xff, decode, stream_), "clearing a workspace");
  }

  ~CudaBackend() override {
    stream_sync(stream_);
    loader_.reset();  // they use the stream
    calibration_.reset();
    graphs_.clear();
    for (void* data : owned_) memory_free(data);
    for (void* mark : marks_) event_destroy(mark);
    stream_destroy(stream_);
  }

  std::string name() const override { return fmt::format("{} ({})", kTarget, device_.name); }
  size_t act_bytes() const override { return kActBytes; }
  CudaPlatform cuda_platform() const override {
    return {.major = runtime_major(), .gpu = device_.name};
  }

  void reserve(const ModelSpec& spec, const EngineLimits& limits, int max_logit_rows) override {
    flush();
    loader_.reset();  // the weights are there
    max_logit_rows_ = max_logit_rows;
    const auto rows = static_cast<size_t>(std::max(limits.max_num_tokens, 2 * max_logit_rows));
    const auto widest = static_cast<size_t>(std::max({spec.hidden_size, spec.q_size()}));
    scratch_.get(rows * widest * kActBytes, stream_);
    page_starts_.get((static_cast<size_t>(limits.max_batch_size) + 1) * sizeof(int), stream_);
    int4_.reserve(spec, limits);
    if constexpr (!kPortable) {
      if (spec.num_heads == kFastGroup * spec.num_kv_heads) {
        prefill_.get(prefill_attention_workspace_bytes(limits.max_seq_len(), spec.num_kv_heads),
                     stream_);
      }
    }
  }

  std::vector<LinearTactic> tune(const ModelSpec& spec, int max_rows) override {
    flush();
    if constexpr (kPortable) {
      return {};  // its sums must not depend on the number of rows
    } else {
      return tune_linears(*this, spec, max_rows, device_.num_sms, int4_.workspace(), stream_);
    }
  }
  void use_tactics(std::span<const LinearTactic> tactics) override { int4_.use_tactics(tactics); }

  // Memory
  // ------------------------------------------------------------------------------------------

  Buffer alloc(size_t bytes) override {
    void* data = nullptr;
    const int status = memory_alloc(&data, std::max<size_t>(bytes, 1));
    if (status != 0) {
      fail(ErrorKind::kMemory,
           "cuda: cannot allocate {} bytes, {} of {} are free on the {}; lower --max-batch-size, "
           "--max-num-tokens or the KV cache: {}",
           bytes, free_memory_bytes(), device_.total_bytes, device_.name, error_text(status));
    }
    return Buffer(this, data, bytes);
  }
  void free(void* data, size_t) noexcept override {
    put_off_.reset();  // whoever frees reads nothing of it any more
    put_off_linear_.reset();
    put_off_norm_.reset();
    rounded_.reset();
    int4_.forget(data);
    memory_free(data);
  }
  void upload(void* device, const void* host, size_t bytes) override {
    flush();
    constexpr size_t kLoaderBytes = size_t{4} << 20;
    if (calibration_ && bytes >= kLoaderBytes) {  // a layer's weights
      loader().add(device, static_cast<const std::byte*>(host), bytes);
      loader().finish();
    } else {
      check(copy_to_device(device, host, bytes, stream_), "copying to the device");
    }
  }
  void download(void* host, const void* device, size_t bytes) override {
    flush();
    check(copy_to_host(host, device, bytes, stream_), "copying from the device");
  }
  void sync() override {
    flush();
    check(stream_sync(stream_), "a kernel or copy before this point");
  }
  void copy(void* to, const void* from, size_t bytes) override {
    flush();
    check(copy_on_device(to, from, bytes, stream_), "copying on the device");
  }
  bool overlaps() const override { return true; }
  void* host_alloc(size_t bytes) override {
    void* data = pinned_alloc(bytes);
    if (data == nullptr) {
      fail(ErrorKind::kMemory, "cuda: cannot pin {} bytes of host memory", bytes);
    }
    return data;
  }
  void host_free(void* data) noexcept override { pinned_free(data); }
  int mark() override {
    flush();
    const int mark = next_mark_;
    next_mark_ = (next_mark_ + 1) % kNumMarks;
    check(event_record(marks_[mark], stream_), "recording an event");
    return mark;
  }
  void wait(int mark) override {
    check(event_sync(marks_[mark]), "a kernel or copy before this point");
  }
  const void* import_weights(const std::byte* host, size_t bytes) override {
    void* data = own(bytes);
    loader().add(data, host, bytes);
    return data;
  }
  void run(uint64_t key, const std::function<void()>& step) override {
    flush();
    const auto whole = [&] {
      step();
      flush();
    };
    if (key == 0) {
      whole();
    } else {
      graphs_.run(key, whole);
    }
  }

  CalibrationOps* calibration_ops() override {
    if (!calibration_) {
      calibration_ = std::make_unique<CudaCalibrationOps>(stream_, [this] { flush(); });
    }
    return calibration_.get();
  }

  uint64_t free_memory_bytes() override {
    uint64_t bytes = 0;
    check(memory_free_bytes(&bytes), "asking for free memory");
    return bytes;
  }

  double measure_read_gb_per_s() override {
    size_t bytes = size_t{1} << 30;
    bytes = std::min<size_t>(bytes, free_memory_bytes() / 2 / 16 * 16);
    const Buffer data = alloc(bytes), sink = alloc(sizeof(float));
    check(memory_fill(data.data(), 0, bytes, stream_), "clearing memory");
    double best = 0;
    for (int i = 0; i < 5; ++i) {
      constexpr int kPasses = 10;  // so that launching and waiting weigh little
      sync();
      const auto start = std::chrono::steady_clock::now();
      for (int pass = 0; pass < kPasses; ++pass) {
        check(read_all(data.data(), bytes, sink.as<float>(), device_.num_sms, stream_), "reading");
      }
      sync();
      const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
      best = std::max(best, static_cast<double>(bytes) * kPasses / time.count() * 1e-9);
    }
    return best;
  }

  // KV cache
  // ------------------------------------------------------------------------------------------

  size_t kv_block_bytes(KvFormat format, int block_tokens, int num_kv_heads,
                        int head_dim) const override {
    return page_bytes(page_format(format, block_tokens, head_dim), num_kv_heads);
  }

  // Rows
  // ------------------------------------------------------------------------------------------

  void begin_step(const StepBatch& batch) override {
    flush();
    int4_.begin_step(batch.num_decode_seqs < batch.num_seqs);
  }

  void embed(const StepBatch& batch, const LinearOperand& table, void* x) override {
    flush();
    dense_weight(table, "the embedding");
    if (batch.num_tokens == 0) return;
    check(cuda::embed(batch.token_ids, batch.previous_tokens, table.weight, x, batch.num_tokens,
                      table.in_features, kDependent, stream_),
          "embed");
  }

  void rms_norm(const void* x, const float* weight, float eps, int rows, int hidden,
                void* y) override {
    if (put_off_linear_ && put_off_linear_->y == x && put_off_linear_->x != y &&
        put_off_linear_->rows == rows && put_off_linear_->w.out_features == hidden) {
      // The linear that is still to come writes x; it writes the norm's input to the next one too.
      ResidualLinear l = *put_off_linear_;
      put_off_linear_.reset();
      void* rounded = nullptr;
      if (int4_.rounds_input(rows)) {
        int4_.round_input(l.x, l.w, rows, l.before);
        rounded = int4_.rounding_buffer(rows, hidden);
      }
      l.before.next = rounded ? rounded : y;
      l.before.next_weight = weight;
      int4(l.x, l.w, hidden, rows, Epilogue::kResidual, nullptr, l.y, l.before);
      put_off_norm_ = {x, weight, eps, rows, hidden, y, false, rounded};
      return;
    }
    flush();
    if (int4_.rounds_input(rows)) {
      put_off_norm_ = {x, weight, eps, rows, hidden, y, true, nullptr};
      return;
    }
    norm(x, weight, eps, nullptr, rows, hidden, y);
  }

  // Linears
  // ------------------------------------------------------------------------------------------

  void linear(const void* x, const LinearOperand& w, int rows, bool add, void* y) override {
    if (rows == 0) return;
    if (w.layout == WeightLayout::kCudaInt4) {
      const Fused before = take_before(x, w, rows);  // flushes
      const Epilogue epilogue = add ? Epilogue::kResidual : Epilogue::kPlain;
      const bool after_norm = before.scales || before.weight;  // one norm a kernel
      if (int4_.fuses_norm(rows, w.out_features) && add && w.pre_scale == nullptr && !after_norm &&
          (!int4_.rounds_input(rows) || int4_.rounds_output(w.out_features, w, rows, epilogue))) {
        put_off_linear_ = {x, w, rows, y, before};
        return;
      }
      int4(x, w, w.out_features, rows, epilogue, nullptr, y, before);
    } else {
      flush();
      x = pre_scaled(x, w, rows);
      if (calibration_) {
        dense_weight(w, "a linear");
        calibration_->linear(x, w, rows, add, y);
      } else {
        dense(x, w, rows, add ? y : nullptr, false, y);
      }
    }
  }

  void gate_up(const void* x, const LinearOperand& gate, const LinearOperand& up, int rows,
               const float* out_scale, void* y) override {
    NIBBLE_CHECK(gate.out_features == up.out_features && gate.in_features == up.in_features &&
                 gate.pre_scale == up.pre_scale && gate.layout == up.layout);
    if (rows == 0) return;
    if (gate.layout == WeightLayout::kCudaInt4 && gate.weight == up.weight) {
      Fused before = take_before(x, gate, rows);
      void* rounded = nullptr;
      if (int4_.rounds_output(2 * gate.out_features, gate, rows, Epilogue::kSiluMul)) {
        int4_.round_input(x, gate, rows, before);
        rounded = int4_.rounding_buffer(rows, gate.out_features);
      }
      int4(x, gate, 2 * gate.out_features, rows, Epilogue::kSiluMul, out_scale, y, before, rounded);
      if (rounded) rounded_ = {y, rows, gate.out_features, rounded};
      return;
    }
    flush();
    LinearOperand plain_gate = gate, plain_up = up;
    plain_gate.pre_scale = plain_up.pre_scale = nullptr;
    const void* scaled = pre_scaled(x, gate, rows);
    const size_t bytes =
        static_cast<size_t>(rows) * static_cast<size_t>(gate.out_features) * kActBytes;
    void* up_out = halves_.get(bytes, stream_);
    linear(scaled, plain_gate, rows, false, y);
    linear(scaled, plain_up, rows, false, up_out);
    check(silu_multiply(y, up_out, out_scale, y, rows, gate.out_features, stream_),
          "silu multiply");
  }

  void lm_head(const StepBatch& batch, const void* x, const float* norm_weight, float eps,
               const LinearOperand& head, float* logits) override {
    flush();
    const int rows = batch.num_logit_rows;
    if (rows == 0) return;
    // In 8 bits: high and low halves of the integers are one int4 matrix, each reads the inputs.
    const int copies = head.layout == WeightLayout::kCudaInt8 ? 2 : 1;
    void* normed = scratch_.get(
        static_cast<size_t>(rows * copies) * static_cast<size_t>(head.in_features) * kActBytes,
        stream_);
    norm(x, norm_weight, eps, batch.logit_rows, rows, head.in_features, normed, copies);
    if (head.layout == WeightLayout::kCudaInt4 || head.layout == WeightLayout::kCudaInt8) {
      LinearOperand halves = head;
      halves.in_features *= copies;
      int4(normed, halves, head.out_features, rows, Epilogue::kFloat, nullptr, logits);
      return;
    }
    dense_weight(head, "lm_head");
    if constexpr (kPortable) {
      dense(normed, head, rows, nullptr, true, logits);
    } else {
      const DenseArgs args{.x = normed,
                           .weight = head.weight,
                           .out = logits,
                           .rows = rows,
                           .n = head.out_features,
                           .k = head.in_features,
                           .num_sms = device_.num_sms,
                           .dependent = kDependent};
      check(dense_linear(args, stream_), "lm_head");
    }
  }

  // Attention
  // ------------------------------------------------------------------------------------------

  /// Waits for attention() where one kernel does both; any other op first does what was put off.
  void rope_store_kv(const StepBatch& batch, void* qkv, int num_heads, const RopeTable& rope,
                     const KvLayer& kv) override {
    flush();
    if (batch.num_tokens == 0) return;
    if (is_step(batch, num_heads, kv)) {
      put_off_ = {batch, qkv, num_heads, rope, kv};
    } else {
      rope_store(batch, qkv, num_heads, rope, kv);
    }
  }

  /// NOTE: the decode kernel reads the page sums that rope_store_kv() of the same batch left.
  void attention(const StepBatch& batch, const void* qkv, int num_heads, const KvLayer& kv,
                 const float* out_scale, void* y) override {
    if (put_off_ && put_off_->qkv == qkv && put_off_->kv.data == kv.data &&
        put_off_->batch.num_seqs == batch.num_seqs) {
      if constexpr (!kPortable) {  // there nothing is put off
        const RopeTable rope = put_off_->rope;
        put_off_.reset();
        step(batch, qkv, rope, kv, out_scale, y);
      }
      return;
    }
    flush();
    attend(batch, qkv, num_heads, kv, out_scale, y);
  }

  // Sampling
  // ------------------------------------------------------------------------------------------

  void sample(const SampleBatch& batch, float* logits, const SampleResult& result) override {
    flush();
    if (batch.num_rows == 0) return;
    const int most_rows = std::max(batch.num_rows, max_logit_rows_);
    void* workspace = sampling_.get(sample_workspace_bytes(most_rows, batch.vocab_size), stream_);
    check(cuda::sample(batch, logits, result, workspace, kDependent, stream_), "sample");
  }

 private:
  // A step of one token a sequence: attention_step.cu. Decided by what graph_key() covers.
  static bool is_step(const StepBatch& batch, int num_heads, const KvLayer& kv) {
    return !kPortable && batch.num_decode_seqs == batch.num_seqs &&
           num_heads == kFastGroup * kv.num_kv_heads &&
           page_format(kv.format, kv.block_tokens, kv.head_dim) == PageFormat::kInt8;
  }

  /// Does whatever has been put off, loading weights included. Every op begins with it or takes
  /// what was put off for it.
  void flush() {
    if (loader_) loader_->finish();
    rounded_.reset();
    if (put_off_) {
      const RopeStore r = *put_off_;
      put_off_.reset();
      rope_store(r.batch, r.qkv, r.num_heads, r.rope, r.kv);
    }
    if (put_off_linear_) {
      const ResidualLinear l = *put_off_linear_;
      put_off_linear_.reset();
      int4(l.x, l.w, l.w.out_features, l.rows, Epilogue::kResidual, nullptr, l.y, l.before);
    }
    if (put_off_norm_) {
      const PutOffNorm n = *put_off_norm_;
      put_off_norm_.reset();
      norm(n.x, n.weight, n.eps, nullptr, n.rows, n.hidden, n.y);
    }
  }

  /// What is left of the op before to a linear that reads x; other work that was put off is done.
  Fused take_before(const void*& x, const LinearOperand& w, int rows) {
    const std::optional<Rounded> rounded = std::exchange(rounded_, std::nullopt);
    if (rounded && rounded->source == x && rounded->rows == rows &&
        rounded->features == w.in_features && w.pre_scale == nullptr) {
      flush();
      return {.x = rounded->data};
    }
    if (put_off_norm_ && put_off_norm_->y == x && put_off_norm_->rows == rows &&
        put_off_norm_->hidden == w.in_features &&
        (put_off_norm_->whole || w.pre_scale == nullptr)) {
      const PutOffNorm n = *put_off_norm_;
      put_off_norm_.reset();
      if (!n.whole) return {.scales = true, .eps = n.eps, .x = n.rounded};
      x = n.x;
      return {.weight = n.weight, .eps = n.eps};
    }
    flush();
    return {};
  }

  void step(const StepBatch& batch, const void* qkv, const RopeTable& rope, const KvLayer& kv,
            const float* out_scale, void* y) {
    const bool fixed = kv.format == KvFormat::kInt8Static;
    const int features = kFastGroup * kv.num_kv_heads * kHeadDim;
    void* rounded = nullptr;
    if (int4_.rounds_input(batch.num_seqs) &&
        step_attention_rounds(batch.num_seqs, kv.num_kv_heads, device_.num_sms)) {
      rounded = int4_.rounding_buffer(batch.num_seqs, features);
    }
    const StepAttentionArgs args{
        .qkv = qkv,
        .qkv_stride = int64_t{(kFastGroup + 2) * kv.num_kv_heads} * kHeadDim,
        .cos = rope.cos,
        .sin = rope.sin,
        .pages = kv.data,
        .page_table = batch.block_tables,
        .page_table_stride = batch.max_blocks_per_seq,
        .lengths = batch.kv_lens,
        .out = y,
        .out_stride = features,
        .sequences = batch.num_seqs,
        .kv_heads = kv.num_kv_heads,
        .k_scale = fixed ? kv.k_scale : 0,
        .v_scale = fixed ? kv.v_scale : 0,
        .softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim)),
        .out_scale = out_scale,
        .rounded = rounded,
        .uneven = batch.is_uneven,
        .split = 0,
        .num_sms = device_.num_sms,
        .dependent = kDependent};
    check(step_attention(args, stream_), "decode step attention");
    if (rounded) rounded_ = {y, batch.num_seqs, features, rounded};
  }

  void rope_store(const StepBatch& batch, void* qkv, int num_heads, const RopeTable& rope,
                  const KvLayer& kv) {
    const bool fixed = kv.format == KvFormat::kInt8Static;
    const GenericRopeArgs args{.qkv = qkv,
                               .positions = batch.positions,
                               .seq_starts = batch.seq_starts,
                               .kv_lens = batch.kv_lens,
                               .page_table = batch.block_tables,
                               .cos = rope.cos,
                               .sin = rope.sin,
                               .pages = kv.data,
                               .page_starts = page_starts(batch),
                               .format = page_format(kv.format, kv.block_tokens, kv.head_dim),
                               .k_scale = fixed ? kv.k_scale : 0,
                               .v_scale = fixed ? kv.v_scale : 0,
                               .tokens = batch.num_tokens,
                               .sequences = batch.num_seqs,
                               .page_table_stride = batch.max_blocks_per_seq,
                               .heads = num_heads,
                               .kv_heads = kv.num_kv_heads};
    check(generic_rope_store(args, stream_), "rope_store_kv");
  }

  void attend(const StepBatch& batch, const void* qkv, int num_heads, const KvLayer& kv,
              const float* out_scale, void* y) {
    if (batch.num_tokens == 0) return;
    const PageFormat format = page_format(kv.format, kv.block_tokens, kv.head_dim);
    if constexpr (kPortable) {
      attend_portable(batch, num_split(batch, num_heads, kv), qkv, num_heads, kv, out_scale, y);
    } else if (format != PageFormat::kInt8 || num_heads != kFastGroup * kv.num_kv_heads) {
      attend_portable(batch, 0, qkv, num_heads, kv, out_scale, y);
    } else {
      attend_hopper(batch, qkv, num_heads, kv, out_scale, y);
    }
  }

  void attend_hopper(const StepBatch& batch, const void* qkv, int num_heads, const KvLayer& kv,
                     const float* out_scale, void* y) {
    const int64_t stride = int64_t{num_heads + 2 * kv.num_kv_heads} * kHeadDim;
    const int32_t* starts = batch.host_seq_starts;
    const int decode = batch.num_decode_seqs;
    const float softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
    if (decode > 0) {
      const DecodeAttentionArgs args{.q = qkv,
                                     .q_stride = stride,
                                     .pages = kv.data,
                                     .page_table = batch.block_tables,
                                     .page_table_stride = batch.max_blocks_per_seq,
                                     .lengths = batch.kv_lens,
                                     .page_starts = page_starts(batch),
                                     .out = y,
                                     .out_stride = int64_t{num_heads} * kHeadDim,
                                     .sequences = decode,
                                     .kv_heads = kv.num_kv_heads,
                                     .softmax_scale = softmax_scale,
                                     .out_scale = out_scale,
                                     .workspace = decode_workspace_,
                                     .num_sms = device_.num_sms,
                                     .dependent = kDependent,
                                     .tactic = 0};
      check(decode_attention(args, stream_), "decode attention");
    }
    for (int s = decode; s < batch.num_seqs; ++s) {
      const int count = starts[s + 1] - starts[s];
      if (count == 0) continue;
      const int64_t first = starts[s];
      const PrefillAttentionArgs args{
          .q = static_cast<const std::byte*>(qkv) + first * stride * kActBytes,
          .q_stride = stride,
          .pages = kv.data,
          .page_table = batch.block_tables + int64_t{s} * batch.max_blocks_per_seq,
          .count = count,
          .length = batch.host_kv_lens[s],
          .out = static_cast<std::byte*>(y) + first * num_heads * kHeadDim * int64_t{kActBytes},
          .out_stride = int64_t{num_heads} * kHeadDim,
          .out_scale = out_scale,
          .kv_heads = kv.num_kv_heads,
          .softmax_scale = softmax_scale,
          .workspace = prefill_.get(
              prefill_attention_workspace_bytes(batch.host_kv_lens[s], kv.num_kv_heads), stream_),
          .dependent = false};
      check(prefill_attention(args, stream_), "prefill attention");
    }
  }

  static void* new_stream() {
    void* stream = nullptr;
    check(stream_create(&stream), "making a stream");
    return stream;
  }

  WeightLoader& loader() {
    if (!loader_) loader_ = std::make_unique<WeightLoader>(stream_);
    return *loader_;
  }

  static PageFormat page_format(KvFormat format, int block_tokens, int head_dim) {
    if (block_tokens != kPageTokens || head_dim != kHeadDim) {
      fail(ErrorKind::kUnsupported,
           "the cuda backend's KV pages have 64 tokens and head_dim 128, asked for {} and {}; "
           "rebuild the engine with --target {}",
           block_tokens, head_dim, kTarget);
    }
    if (format == KvFormat::kF32) {
      fail(ErrorKind::kUnsupported,
           "the cuda backend has no f32 KV cache; use --kv-cache int8, int8-static or f16");
    }
    return format == KvFormat::kF16 ? PageFormat::kF16 : PageFormat::kInt8;
  }

  static void dense_weight(const LinearOperand& w, const char* what) {
    if (w.layout == WeightLayout::kBf16Rows) return;
    fail(ErrorKind::kUnsupported,
         "the cuda backend cannot read {} in this layout ({}), it wants bf16 rows or cuda-int4; "
         "rebuild with --target {}",
         what, static_cast<int>(w.layout), kTarget);
  }

  void* own(size_t bytes) {
    void* data = nullptr;
    const int status = memory_alloc(&data, std::max<size_t>(bytes, 1));
    if (status != 0) {
      fail(ErrorKind::kMemory, "cuda: cannot allocate {} bytes, {} of {} are free on the {}: {}",
           bytes, free_memory_bytes(), device_.total_bytes, device_.name, error_text(status));
    }
    owned_.push_back(data);
    return data;
  }

  int* page_starts(const StepBatch& batch) {
    return static_cast<int*>(
        page_starts_.get((static_cast<size_t>(batch.num_seqs) + 1) * sizeof(int), stream_));
  }

  void norm(const void* x, const float* weight, float eps, const int32_t* row_index, int rows,
            int hidden, void* y, int copies = 1) {
    if (rows == 0) return;
    const RmsNormArgs args{.x = x,
                           .weight = weight,
                           .pre_scale = nullptr,
                           .row_index = row_index,
                           .y = y,
                           .eps = eps,
                           .rows = rows,
                           .hidden = hidden,
                           .copies = copies,
                           .dependent = kDependent};
    check(cuda::rms_norm(args, stream_), "rms_norm");
  }

  const void* pre_scaled(const void* x, const LinearOperand& w, int rows) {
    if (w.pre_scale == nullptr) return x;
    void* scaled = scratch_.get(
        static_cast<size_t>(rows) * static_cast<size_t>(w.in_features) * kActBytes, stream_);
    check(scale_columns(x, w.pre_scale, scaled, rows, w.in_features, stream_), "pre-scale");
    return scaled;
  }

  void dense(const void* x, const LinearOperand& w, int rows, const void* residual, bool f32,
             void* y) {
    dense_weight(w, "a linear");
    const GenericLinearArgs args{.x = x,
                                 .w = w.weight,
                                 .out = y,
                                 .residual = residual,
                                 .m = rows,
                                 .n = w.out_features,
                                 .k = w.in_features,
                                 .f32_out = f32};
    check(generic_linear(args, stream_), "linear");
  }

  /// An int4 linear, its AWQ pre-scale included.
  void int4(const void* x, const LinearOperand& w, int64_t out_rows, int tokens, Epilogue epilogue,
            const float* out_scale, void* y, const Fused& fused = {}, void* rounded = nullptr) {
    if (w.group_size != 128 || w.in_features % 8 != 0 ||
        out_rows % (epilogue == Epilogue::kSiluMul ? 16 : 8) != 0) {
      fail(ErrorKind::kUnsupported,
           "the cuda backend's int4 linears have groups of 128 and sizes that are multiples of 8; "
           "this one is {} x {} in groups of {}",
           out_rows, w.in_features, w.group_size);
    }
    if (epilogue == Epilogue::kFloat || !int4_.rounds_input(tokens)) x = pre_scaled(x, w, tokens);
    int4_.run(x, w, out_rows, tokens, epilogue, out_scale, y, fused, rounded);
  }

  /// `count` sequences from `first` on, each in tiles of `queries` tokens.
  static GenericAttentionArgs attention_args(const StepBatch& batch, int first, int count,
                                             int queries, const void* qkv, int num_heads,
                                             const KvLayer& kv, const float* out_scale, void* y) {
    int tiles = 0;
    for (int s = first; s < first + count; ++s) {
      tiles += (batch.host_seq_starts[s + 1] - batch.host_seq_starts[s] + queries - 1) / queries;
    }
    return {.q = qkv,
            .q_stride = int64_t{num_heads + 2 * kv.num_kv_heads} * kHeadDim,
            .pages = kv.data,
            .positions = batch.positions,
            .seq_starts = batch.seq_starts + first,
            .kv_lens = batch.kv_lens + first,
            .page_table = batch.block_tables + int64_t{first} * batch.max_blocks_per_seq,
            .out_scale = out_scale,
            .out = y,
            .format = page_format(kv.format, kv.block_tokens, kv.head_dim),
            .tokens = batch.num_tokens,
            .sequences = count,
            .page_table_stride = batch.max_blocks_per_seq,
            .heads = num_heads,
            .kv_heads = kv.num_kv_heads,
            .tiles = tiles};
  }

  /// How many one-token sequences at the front (the scheduler puts them there) the portable kernel
  /// spreads over the device; decided by what graph_key() covers.
  int num_split(const StepBatch& batch, int num_heads, const KvLayer& kv) const {
    const int32_t* starts = batch.host_seq_starts;
    int split = 0;
    while (split < batch.num_seqs && starts[split + 1] - starts[split] == 1) ++split;
    return portable_attention_splits(num_heads, kv.num_kv_heads, split, batch.max_blocks_per_seq,
                                     device_.num_sms)
               ? split
               : 0;
  }

  /// Any heads and page format. The first `split` sequences have one token each and are spread over
  /// the device, which does not change their bits.
  void attend_portable(const StepBatch& batch, int split, const void* qkv, int num_heads,
                       const KvLayer& kv, const float* out_scale, void* y) {
    const int queries = portable_attention_queries(num_heads, kv.num_kv_heads);
    const auto args = [&](int first, int count) {
      return attention_args(batch, first, count, queries, qkv, num_heads, kv, out_scale, y);
    };
    if (split > 0) {
      check(portable_attention(args(0, split), decode_workspace_, device_.num_sms, stream_),
            "attention");
    }
    const GenericAttentionArgs rest = args(split, batch.num_seqs - split);
    if (rest.tiles > 0) {
      check(portable_attention(rest, nullptr, device_.num_sms, stream_), "attention");
    }
  }

  const Device device_;
  void* const stream_;
  uint64_t scratch_moves_ = 0;
  Int4Linears int4_;
  StepGraphs graphs_;
  static constexpr int kNumMarks = 2;
  void* marks_[kNumMarks] = {};  // events
  int next_mark_ = 0;
  int max_logit_rows_ = 0;
  std::optional<RopeStore> put_off_;
  std::optional<ResidualLinear> put_off_linear_;
  std::optional<PutOffNorm> put_off_norm_;
  std::optional<Rounded> rounded_;
  std::unique_ptr<WeightLoader> loader_;             // while weights are loaded
  std::unique_ptr<CudaCalibrationOps> calibration_;  // when quantizing
  std::vector<void*> owned_;  // weights and workspaces, freed with the backend
  void* decode_workspace_ = nullptr;
  // scratch_: pre-scaled or normed rows; halves_: up's output of an unfused gate_up.
  Scratch scratch_{&scratch_moves_}, halves_{&scratch_moves_}, page_starts_{&scratch_moves_},
      prefill_{&scratch_moves_}, sampling_{&scratch_moves_};
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(ActivationPrecision precision) {
  return std::make_unique<CudaBackend>(precision);
}

}  // namespace nibble::cuda
