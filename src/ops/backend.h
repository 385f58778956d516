// The seam: one virtual call per fused op. model/decoder runs any backend through it. The reference
// backend is the executable specification of every op; cpu and cuda are tested against it
// (tests/ops).
//
// Invariant every backend keeps: an output row depends only on its own sequence's inputs, bit for
// bit. The same token at the same position gives the same bits whatever the chunking, the
// batch-mates, the cached prefix or the block ids. (cuda:sm_90 keeps it for rows of prompts and not
// for drawn tokens, docs/cuda-backend.md; all others have no exceptions.)
//
// Not thread-safe: one thread owns a backend. Ops may be asynchronous until sync().
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "ops/calibration_ops.h"
#include "ops/operands.h"

namespace nibble {

class Backend;

/// Device memory, freed by its backend. Move-only; must not outlive the backend.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Backend* backend, void* data, size_t bytes)
      : backend_(backend), data_(data), bytes_(bytes) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  inline ~Buffer();

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;  // "reference", "cpu:avx2", ...
  virtual size_t act_bytes() const = 0;  // bytes of one activation element
  /// The CUDA and the GPU behind it; empty for backends without.
  virtual CudaPlatform cuda_platform() const { return {}; }
  /// Scratch the ops need for steps up to these sizes; called once before the first op.
  virtual void reserve(const ModelSpec& spec, const EngineLimits& limits, int max_logit_rows) = 0;

  /// Measures which kernel serves each of the model's int4 matrices best on this device, up to
  /// `max_rows` rows of activations. Empty where there is nothing to choose.
  virtual std::vector<LinearTactic> tune(const ModelSpec& spec, int max_rows) {
    (void)spec, (void)max_rows;
    return {};
  }
  /// What tune() found, before the first op. Throws Error{kInput} for what it cannot have found.
  virtual void use_tactics(std::span<const LinearTactic> tactics) { (void)tactics; }

  // Memory
  // ------------------------------------------------------------------------------------------
  virtual Buffer alloc(size_t bytes) = 0;  // 64-byte aligned, uninitialised; throws Error{kMemory}
  virtual void free(void* data, size_t bytes) noexcept = 0;
  virtual void upload(void* device, const void* host, size_t bytes) = 0;
  virtual void download(void* host, const void* device, size_t bytes) = 0;
  virtual void sync() = 0;
  /// Whether ops, uploads from and downloads to host_alloc() memory are asynchronous, so that a
  /// step can be launched while the one before runs.
  virtual bool overlaps() const { return false; }
  /// Host memory for uploads and downloads that do not wait; 64-byte aligned.
  virtual void* host_alloc(size_t bytes) { return ::operator new(bytes, std::align_val_t{64}); }
  virtual void host_free(void* data) noexcept { ::operator delete(data, std::align_val_t{64}); }
  /// A point in the order of everything asked for so far; wait() returns when that is done. At most
  /// two marks are outstanding.
  virtual int mark() { return 0; }
  virtual void wait(int mark) {
    (void)mark;
    sync();
  }
  /// Device to device, ranges that do not overlap; ordered with the ops. The default is a host
  /// backend's.
  virtual void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
  /// Makes weight bytes usable by the ops: host backends return `host` itself (zero copy, so the
  /// mapping must outlive the backend's use), device backends copy, until sync() or the next op.
  virtual const void* import_weights(const std::byte* host, size_t bytes) = 0;
  /// Of the backend's own memory, free now; 0: it has none, it works in the host's.
  virtual uint64_t free_memory_bytes() { return 0; }
  /// Read bandwidth of that memory, measured; 0: measure the host's.
  virtual double measure_read_gb_per_s() { return 0; }
  /// Runs `step`. Steps of one key (not 0) give the ops the same arguments, pointers and host
  /// arrays included; only device memory differs. cuda records such a step as a graph and replays
  /// it.
  virtual void run(uint64_t key, const std::function<void()>& step) {
    (void)key;
    step();
  }

  /// What quantizing on this backend needs; null: its memory and activations are the host's (f32),
  /// and the quantizer does the work itself. Throws Error{kDevice} when something is missing.
  virtual CalibrationOps* calibration_ops() { return nullptr; }

  // KV cache
  // ----------------------------------------------------------------------------------------
  virtual size_t kv_block_bytes(KvFormat format, int block_tokens, int num_kv_heads,
                                int head_dim) const = 0;

  // Ops
  // ---------------------------------------------------------------------------------------------
  /// The ops from here to the next call are this batch's: a backend may choose kernels by what its
  /// rows are. Without a call a batch is taken for one of drawn tokens.
  virtual void begin_step(const StepBatch& batch) { (void)batch; }

  /// x[t] = table[token_ids[t]]. table: dense layout [vocab, hidden].
  virtual void embed(const StepBatch& batch, const LinearOperand& table,
                     void* x /*[T, hidden]*/) = 0;

  /// y = rms_norm(x) * weight, x * rsqrt(mean(x^2) + eps). rows x hidden. A backend may leave it to
  /// the linear that reads y: after that y is spent, nobody reads it again before it is written.
  virtual void rms_norm(const void* x, const float* weight /*[hidden]*/, float eps, int rows,
                        int hidden, void* y) = 0;

  /// y = (x * pre_scale) W^T, plus y's old content when `add`. x: [rows, K], y: [rows, N].
  virtual void linear(const void* x, const LinearOperand& w, int rows, bool add, void* y) = 0;

  /// y = silu(x Wg^T) * (x Wu^T) * out_scale. y: [rows, ffn]; out_scale: [ffn] or null (down's AWQ
  /// pre-scale). kCudaInt4 with gate.weight == up.weight: one matrix holds both, rows interleaved.
  virtual void gate_up(const void* x, const LinearOperand& gate, const LinearOperand& up, int rows,
                       const float* out_scale, void* y) = 0;

  /// Rotates q and k in place (half-split rotation), then stores k and v of every token into the
  /// cache: quantized first, so that attention only ever sees what the cache holds. qkv: [T, (H + 2
  /// G) D]. A backend may leave it to attention(): after that qkv is spent as above.
  virtual void rope_store_kv(const StepBatch& batch, void* qkv, int num_heads,
                             const RopeTable& rope, const KvLayer& kv) = 0;

  /// Causal attention of each token over cache positions [0, its position], softmax scale
  /// 1/sqrt(D). y: [T, H D], times out_scale [H D] or null (o's AWQ pre-scale).
  virtual void attention(const StepBatch& batch, const void* qkv, int num_heads, const KvLayer& kv,
                         const float* out_scale, void* y) = 0;

  /// logits[r] = rms_norm(x[logit_rows[r]]) lm_head^T, fp32 [R, vocab].
  virtual void lm_head(const StepBatch& batch, const void* x /*[T, hidden]*/,
                       const float* norm_weight, float eps, const LinearOperand& head,
                       float* logits) = 0;

  /// Draws one token a row. Row r's result depends on its own logits and parameters only. Logits
  /// may be overwritten. Ids outside of `allowed` or of the row's mask [vocab/64 bits] are never
  /// drawn; log-probabilities know nothing of either.
  virtual void sample(const SampleBatch& batch, float* logits /*[R, vocab]*/,
                      const SampleResult& result) = 0;

  /// Sum over tensor-parallel ranks; nothing to do for one rank.
  virtual void all_reduce(void* x, size_t num_elements) {
    (void)x;
    (void)num_elements;
  }
};

/// Memory of Backend::host_alloc(). Move-only; must not outlive the backend.
class HostBuffer {
 public:
  HostBuffer() = default;
  HostBuffer(Backend& backend, size_t bytes)
      : backend_(&backend), data_(backend.host_alloc(bytes)) {}
  HostBuffer(HostBuffer&& other) noexcept { *this = std::move(other); }
  HostBuffer& operator=(HostBuffer&& other) noexcept {
    std::swap(backend_, other.backend_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~HostBuffer() {
    if (data_ != nullptr) backend_->host_free(data_);
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
};

inline Buffer::~Buffer() {
  if (data_ != nullptr) backend_->free(data_, bytes_);
}

}  // namespace nibble
