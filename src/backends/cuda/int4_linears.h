// The int4 linears of a step: which kernel takes them, and what their inputs are rounded to on the
// way. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <span>
#include <unordered_map>

#include "backends/cuda/device_memory.h"
#include "backends/cuda/put_off.h"
#include "backends/cuda/tune.h"
#include "backends/cuda/variant.h"
#include "backends/cuda/wgmma_tactic.h"
#include "base/error.h"

namespace nibble::cuda {

class Int4Linears {
 public:
  /// As what the linears of a step read x.
  enum class Input { kBf16, kDigits, kE4m3 };

  /// fp8: e4m3 inputs, in steps with rows of prompts and in those of kFp8MinTokens and more.
  /// `moves` counts what scratch memory moves, as in Scratch.
  Int4Linears(int num_sms, bool fp8, bool dependent, void* stream, uint64_t* moves)
      : num_sms_(num_sms),
        fp8_(fp8),
        dependent_(dependent),
        stream_(stream),
        workspace_(moves),
        squares_(moves),
        largest_(moves),
        rounded_{Scratch(moves), Scratch(moves)} {
    const size_t bytes = int4_workspace_bytes(num_sms_);
    check(memory_fill(workspace_.get(bytes, stream_), 0xff, bytes, stream_),
          "clearing a workspace");
    squares();
    if (fp8_) largest_.get(sizeof(float), stream_);
  }

  /// Scratch for steps up to these sizes.
  void reserve(const ModelSpec& spec, const EngineLimits& limits) {
    if constexpr (!kPortable) {
      const auto widest_input = std::max({spec.hidden_size, spec.q_size(), spec.ffn_size});
      for (Scratch& rounded : rounded_) {
        rounded.get(digits_bytes(kDigitTokens, widest_input), stream_);
        if (fp8_) rounded.get(quantized_x_bytes(kFp8GroupedTokens, widest_input), stream_);
      }
      if (fp8_) rounded_[0].get(quantized_x_bytes(limits.max_num_tokens, widest_input), stream_);
    }
  }
  void use_tactics(std::span<const LinearTactic> tactics) {
    if constexpr (!kPortable) tactics_.set(tactics);
  }
  void* workspace() { return workspace_.get(int4_workspace_bytes(num_sms_), stream_); }

  /// `prompts`: the step has rows of prompts, whose bits do not depend on how many rows there are.
  void begin_step(bool prompts) { in_order_ = !kPortable && prompts; }

  Input input_of(int rows) const {
    if (kPortable) return Input::kBf16;
    if (in_order_) return fp8_ ? Input::kE4m3 : Input::kBf16;
    if (rows >= kMinDigitTokens && rows <= kDigitTokens) return Input::kDigits;
    return fp8_ && rows >= kFp8MinTokens ? Input::kE4m3 : Input::kBf16;
  }
  bool rounds_input(int rows) const { return input_of(rows) != Input::kBf16; }
  bool fuses_norm(int rows, int64_t hidden) const {
    return !kPortable && !in_order_ && linear_fuses_norm(rows, hidden);
  }
  /// Whether a linear of this shape can write its result as the next one reads it, too.
  bool rounds_output(int64_t out_rows, const LinearOperand& w, int rows, Epilogue epilogue) const {
    if constexpr (!kPortable) {
      LinearArgs args{};
      args.rows = out_rows;
      args.k = w.in_features;
      args.tokens = rows;
      args.epilogue = epilogue;
      args.num_sms = num_sms_;
      args.in_order = in_order_;
      args.tactic = -1;
      switch (input_of(rows)) {
        case Input::kBf16: return false;
        case Input::kDigits: return linear_digits_rounds(args);
        case Input::kE4m3: return linear_fp8_rounds(args);
      }
    }
    return false;
  }

  /// For `rows` rows of k, rounded as input_of() says. Two take turns: a linear reads one and
  /// writes the other.
  void* rounding_buffer(int rows, int64_t k) {
    if constexpr (!kPortable) {
      next_rounded_ ^= 1;
      return rounded_[rows > kFp8GroupedTokens ? 0 : next_rounded_].get(
          input_of(rows) == Input::kDigits ? digits_bytes(rows, k) : quantized_x_bytes(rows, k),
          stream_);
    }
    return nullptr;
  }
  /// Rounds the linear's x into fused.x, if nobody has. NOTE: before its output's rounding_buffer()
  /// is asked for, because buffers that take turns must be asked for in the order of use.
  void round_input(const void* x, const LinearOperand& w, int rows, Fused& fused) {
    if (fused.x) return;
    if constexpr (!kPortable) {
      void* out = rounding_buffer(rows, w.in_features);
      const bool one_scale = in_order_ || rows > kFp8GroupedTokens;
      const QuantizeArgs args{.x = x,
                              .x_stride = w.in_features,
                              .norm_weight = fused.weight,
                              .eps = fused.eps,
                              .pre_scale = w.pre_scale,
                              .out = out,
                              .squares = squares(),
                              .tokens = rows,
                              .k = w.in_features,
                              .one_scale = one_scale,
                              .dependent = dependent_};
      check(input_of(rows) == Input::kDigits ? split_digits(args, stream_)
                                             : quantize_x(args, stream_),
            "rounding activations");
      fused.x = out;
      if (fused.weight && !one_scale) fused.scales = true;  // 1/rms is left
    }
  }

  /// y = x W^T with what the epilogue adds; logits (kFloat) are made of x as it is. `x`: bf16,
  /// times the linear's pre-scale where it is not rounded. `rounded`: y once more, as the next
  /// linear reads it, or null.
  void run(const void* x, const LinearOperand& w, int64_t out_rows, int tokens, Epilogue epilogue,
           const float* out_scale, void* y, Fused fused, void* rounded) {
    const Input input = epilogue == Epilogue::kFloat ? Input::kBf16 : input_of(tokens);
    const float largest =
        input == Input::kE4m3 ? largest_scale_of(w.weight, out_rows, w.in_features) : 0;
    if constexpr (!kPortable) {
      if (input != Input::kBf16) {
        round_input(x, w, tokens, fused);
        x = fused.x;
      }
    }
    NIBBLE_CHECK(x != fused.next && x != rounded);  // other CTAs still read it
    TensorMap map;
    const LinearArgs args{.weights = w.weight,
                          .rows = out_rows,
                          .k = w.in_features,
                          .tokens = tokens,
                          .x = x,
                          .x_stride = w.in_features,
                          .x_map = &map,
                          .out = y,
                          .residual = epilogue == Epilogue::kResidual ? y : nullptr,
                          .out_scale = out_scale,
                          .epilogue = epilogue,
                          .next = fused.next,
                          .next_weight = fused.next_weight,
                          .next_squares = squares(),
                          .squares = fused.scales ? squares() : nullptr,
                          .eps = fused.eps,
                          .rounded = rounded,
                          .largest_scale = largest,
                          .workspace = workspace(),
                          .num_sms = num_sms_,
                          .dependent = dependent_,
                          .in_order = in_order_,
                          .tactic = -1,
                          .early = 0,
                          .trace = nullptr};
    if constexpr (kPortable) {
      check(portable_linear(args, stream_), "int4 linear");
    } else {
      if (input == Input::kBf16) {
        check(make_tensor_map(&map, x, tokens, args.k, args.x_stride * 2,
                              linear_wgmma_box_rows(args)),
              "making a tensor map");
      }
      check(input == Input::kDigits ? linear_digits(args, stream_)
            : input == Input::kE4m3 ? linear_fp8(args, stream_)
                                    : tactics_.linear(args, stream_),
            "int4 linear");
    }
  }
  /// Weights that lay there are no longer there.
  void forget(const void* weights) { largest_scales_.erase(weights); }

 private:
  float* squares() {  // LinearArgs::next_squares of any that fuses
    constexpr size_t kBytes =
        size_t{kMaxNormTokens} * (kMaxNormRows / kNormTileRows) * sizeof(float);
    return static_cast<float*>(squares_.get(kBytes, stream_));
  }

  /// Of packed weights; looked for when first asked, which is before a step is recorded.
  float largest_scale_of(const void* weights, int64_t rows, int64_t k) {
    if constexpr (!kPortable) {
      const auto found = largest_scales_.find(weights);
      if (found != largest_scales_.end()) return found->second;
      float largest = 0;
      check(
          largest_scale(weights, rows, k, largest_.get(sizeof(float), stream_), &largest, stream_),
          "looking at the scales of weights");
      return largest_scales_.emplace(weights, largest).first->second;
    }
    return 0;
  }

  const int num_sms_;
  const bool fp8_, dependent_;
  void* const stream_;
  bool in_order_ = false;
  TacticTable tactics_;
  std::unordered_map<const void*, float> largest_scales_;
  Scratch workspace_, squares_, largest_;
  Scratch rounded_[2];
  int next_rounded_ = 0;
};

}  // namespace nibble::cuda
