// SPDX-License-Identifier: Apache-2.0
#include "build/engine_builder.h"

#include <algorithm>
#include <chrono>

#include "base/error.h"
#include "base/hash.h"
#include "base/interrupt.h"
#include "build/cuda_plugin.h"
#include "build/engine_check.h"
#include "build/kernel_table.h"
#include "build/model_loader.h"
#include "build/tokenizer_files.h"
#include "pack/pack.h"

namespace nibble {
namespace {

constexpr uint64_t kAlignment = 64;

void check_limit(const char* name, int value, int low, int high) {
  if (value < low || value > high) {
    fail(ErrorKind::kUsage, "{} is {}; it must be between {} and {}", name, value, low, high);
  }
}

WeightLayout dense_layout_of(DType dtype) {
  switch (dtype) {
    case DType::kF16: return WeightLayout::kF16Rows;
    case DType::kF32: return WeightLayout::kF32Rows;
    default: return WeightLayout::kBf16Rows;
  }
}

// The rows the packer will emit, in its order, without packing anything.
std::vector<SafetensorsWriter::Declaration> declarations(const WeightSource& source,
                                                         const EnginePlan& plan) {
  std::vector<SafetensorsWriter::Declaration> out;
  describe_engine(source, plan,
                  [&](const std::string& name, DType dtype, const std::vector<int64_t>& shape) {
                    out.push_back({name, dtype, shape});
                  });
  // One checksum a tensor, and one of the header.
  out.push_back(
      {std::string(kEngineChecksums), DType::kU64, {static_cast<int64_t>(out.size()) + 1}});
  return out;
}

// What the cuda kernels are made for; everything else is refused here, before anything is packed.
void plan_cuda(EnginePlan& plan, const BuildOptions& options) {
  constexpr int kHeadDim = 128, kGroup = 128, kPageTokens = 64;
  const auto refuse = [&](const std::string& what, int seen, const std::string& wanted) {
    fail(ErrorKind::kUnsupported,
         "target {}: {} is {}, wanted {}; use --target cpu:native for this model", plan.target,
         what, seen, wanted);
  };
  const ModelSpec& spec = plan.spec;
  if (spec.head_dim != kHeadDim) refuse("head_dim", spec.head_dim, "128");
  if (spec.num_heads / spec.num_kv_heads > 64)
    refuse("query heads per KV head", spec.num_heads / spec.num_kv_heads, "at most 64");
  if (spec.hidden_size % 8 != 0) refuse("hidden_size", spec.hidden_size, "a multiple of 8");
  if (spec.ffn_size % 8 != 0) refuse("the ffn size", spec.ffn_size, "a multiple of 8");
  if (plan.linear_layout == WeightLayout::kCudaInt4 && plan.group_size != kGroup)
    refuse("the quantization group", plan.group_size, "128 (nibble quantize --group-size 128)");
  const bool fp8 = options.activation_precision == ActivationPrecision::kE4m3;
  if (options.activation_precision && !fp8) {
    fail(ErrorKind::kUsage,
         "--activations {} is a choice of the cpu targets; {} computes with bf16 activations: "
         "leave the flag out",
         activation_precision_name(*options.activation_precision), plan.target);
  }
  if (fp8 && plan.linear_layout != WeightLayout::kCudaInt4) {
    fail(ErrorKind::kUsage,
         "--activations fp8 feeds int4 linears, and this model has none; quantize it first "
         "(nibble quantize), or leave the flag out");
  }
  if (plan.kv_format == KvFormat::kF32) {
    fail(ErrorKind::kUsage, "--kv-cache f32: {} keeps an int8, int8-static or f16 cache",
         plan.target);
  }
  plan.activation_precision = fp8 ? ActivationPrecision::kE4m3 : ActivationPrecision::kBf16;
  plan.kv_block_tokens = kPageTokens;
  plan.dense_layout = WeightLayout::kBf16Rows;
  if (!is_int4(plan.lm_head_layout) && !is_int8(plan.lm_head_layout)) {
    plan.lm_head_layout = WeightLayout::kBf16Rows;
  } else if (spec.vocab_size % 8 != 0) {
    refuse("vocab_size of a model with a quantized lm_head", spec.vocab_size,
           "a multiple of 8 (or nibble quantize without --quantize-lm-head)");
  }
  if (plan.linear_layout != WeightLayout::kCudaInt4) plan.linear_layout = WeightLayout::kBf16Rows;
}

}  // namespace

WeightLayout int4_layout_of(std::string_view target) {
  return target.starts_with("cpu:")    ? WeightLayout::kCpuInt4
         : target.starts_with("cuda:") ? WeightLayout::kCudaInt4
                                       : WeightLayout::kInt4Portable;
}

WeightLayout int8_layout_of(std::string_view target) {
  return target.starts_with("cpu:")    ? WeightLayout::kCpuInt8
         : target.starts_with("cuda:") ? WeightLayout::kCudaInt8
                                       : WeightLayout::kInt8Portable;
}

int default_max_num_tokens(std::string_view target, int max_batch_size) {
  return std::max(target.starts_with("cuda") ? 2048 : 512, max_batch_size);
}

ActivationPrecision default_activation_precision(std::string_view target) {
  return target.starts_with("cpu:")    ? kDefaultCpuActivationPrecision
         : target.starts_with("cuda:") ? ActivationPrecision::kBf16
                                       : ActivationPrecision::kF32;
}

namespace {

/// Lets the backend measure its kernels where this machine has it, and says what was chosen.
void tune(EnginePlan& plan, const BuildOptions& options, Progress& progress) {
  if (plan.linear_layout != WeightLayout::kCudaInt4) return;
  if (plan.target != "cuda:sm_90" || !options.tune) {
    progress.note(fmt::format("kernels are chosen by built-in rules, not measured ({})",
                              options.tune ? plan.target : "--no-tune"));
    return;
  }
  const auto start = std::chrono::steady_clock::now();
  try {
    const auto backend = open_cuda_backend(plan.target, plan.activation_precision);
    plan.tactics = backend->tune(plan.spec, plan.limits.max_num_tokens);
    plan.cuda = backend->cuda_platform();
  } catch (const Error& error) {
    // Measuring is not worth a failed build: the GPU may be elsewhere, or full of a running server.
    if (error.kind() != ErrorKind::kDevice && error.kind() != ErrorKind::kMemory) throw;
    progress.note(
        fmt::format("kernels are chosen by built-in rules, as they could not be measured here: {}",
                    error.what()));
    return;
  }
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  progress.note(fmt::format(
      "int4 kernels, the fastest for {} sizes on {} (measured in {:.1f} s; all times: nibble "
      "inspect):\n{}",
      plan.tactics.size(), plan.cuda.gpu, time.count(), chosen_kernels(plan.tactics)));
}

}  // namespace

EnginePlan plan_engine(const WeightSource& source, const BuildOptions& options) {
  EnginePlan plan;
  plan.nibble_version = NIBBLE_VERSION;
  plan.target = resolve_target(options.target);
  plan.spec = source.spec();
  plan.limits = options.limits;
  check_limit("--max-batch-size", plan.limits.max_batch_size, 1, 4096);
  check_limit("--max-input-len", plan.limits.max_input_len, 1, 1 << 22);
  check_limit("--max-output-len", plan.limits.max_output_len, 1, 1 << 22);
  if (plan.limits.max_num_tokens == 0) {
    plan.limits.max_num_tokens = default_max_num_tokens(plan.target, plan.limits.max_batch_size);
  }
  check_limit("--max-num-tokens", plan.limits.max_num_tokens, plan.limits.max_batch_size, 1 << 20);
  if (plan.limits.max_seq_len() > plan.spec.max_position) {
    fail(ErrorKind::kUsage,
         "--max-input-len {} + --max-output-len {} is {} tokens, but the model has only {} "
         "positions; lower one of them",
         plan.limits.max_input_len, plan.limits.max_output_len, plan.limits.max_seq_len(),
         plan.spec.max_position);
  }
  plan.kv_format = options.kv_format;
  plan.kv_block_tokens = options.kv_block_tokens;
  if (plan.kv_format == KvFormat::kInt8Static && !source.kv_scales()) {
    fail(ErrorKind::kInput,
         "--kv-cache int8-static needs the checkpoint's calibrated KV scales and it has none; use "
         "--kv-cache int8 "
         "(scales made at run time), or quantize again with --kv-cache int8");
  }
  plan.dense_layout = dense_layout_of(plan.spec.dtype);
  plan.linear_layout = plan.lm_head_layout = plan.dense_layout;
  for (const WeightRow& row : weight_table(plan.spec)) {
    const int bits = source.bits(row);
    if (bits == 0) continue;
    if (row.role == WeightRole::kLmHead) {
      plan.lm_head_layout = bits == 8 ? int8_layout_of(plan.target) : int4_layout_of(plan.target);
    } else if (!is_int4(plan.linear_layout)) {
      plan.group_size = source.load_int4(row).group_size;
      plan.linear_layout = int4_layout_of(plan.target);
    }
  }
  plan.activation_precision =
      options.activation_precision.value_or(default_activation_precision(plan.target));
  check_activation_precision(plan.target, plan.activation_precision);
  if (plan.target.starts_with("cuda:")) plan_cuda(plan, options);
  return plan;
}

void build_engine(const fs::path& model_dir, const WeightSource& source,
                  const BuildOptions& options, const fs::path& out, Progress& progress) {
  EnginePlan plan = plan_engine(source, options);
  if (plan.target.starts_with("cuda:")) plan.cuda.major = cuda_plugin_major(plan.target);
  tune(plan, options, progress);
  const auto absolute = [](const fs::path& path) {
    return path.empty() ? std::string() : fs::absolute(path).lexically_normal().string();
  };
  plan.source = {.checkpoint = options.synthetic.empty() ? absolute(model_dir) : "",
                 .synthetic = options.synthetic,
                 .quantize_lm_head = options.synthetic_lm_head,
                 .tokenizer = absolute(options.tokenizer_dir.value_or("")),
                 .no_tune = !options.tune};
  AtomicDirectory directory = AtomicDirectory::create(out);
  std::vector<SafetensorsWriter::Declaration> tensors = declarations(source, plan);
  const auto total = static_cast<int64_t>(tensors.size());
  write_file_atomically(directory.path() / "config.json",
                        dump_json(plan.to_json(), {.indent = 2}) + "\n");
  const fs::path tokenizer_dir = options.tokenizer_dir.value_or(model_dir);
  if (!tokenizer_dir.empty()) copy_tokenizer_files(tokenizer_dir, directory.path());
  std::vector<std::pair<std::string, std::string>> metadata = {{"format", "nibble-engine"},
                                                               {"plan", dump_json(plan.to_json())}};
  add_file_checksums(directory.path(), metadata);
  SafetensorsWriter writer =
      SafetensorsWriter::create(directory.path() / "rank0.engine", tensors, metadata, kAlignment);
  progress.begin(fmt::format("packing weights for {}", plan.target), total, "tensors");
  std::vector<uint64_t> checksums;
  pack_engine(source, plan, [&](const PackedTensor& tensor) {
    throw_if_interrupted();
    const SafetensorsWriter::Declaration& declared = tensors[checksums.size()];
    NIBBLE_CHECK(declared.name == tensor.name && declared.shape == tensor.shape,
                 "{} was declared as {}", tensor.name, declared.name);
    checksums.push_back(xxh3_64(tensor.bytes));
    writer.write(tensor.bytes);
    progress.advance(static_cast<int64_t>(checksums.size()));
  });
  checksums.push_back(writer.header_checksum());
  writer.write(std::as_bytes(std::span(checksums)));
  writer.commit();
  progress.end();
  directory.commit();
}

}  // namespace nibble
