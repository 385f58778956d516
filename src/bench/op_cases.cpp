// SPDX-License-Identifier: Apache-2.0
#include "bench/op_cases.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numbers>
#include <numeric>

#include "base/error.h"
#include "base/half.h"
#include "pack/int8.h"
#include "spec/weight_table.h"

namespace nibble::ops {
namespace {

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

double weight_bytes(WeightLayout layout, double n, double k, int group) {
  if (is_int4(layout)) return n * k / 2 + n * k / group * 4;
  if (is_int8(layout)) return n * k + n * k / group * 4;
  return n * k * (layout == WeightLayout::kF32Rows ? 4 : 2);
}

constexpr uint32_t kCanary = 0x5ca1ab1eu;

}  // namespace

float normal_value(uint64_t seed, uint64_t index) {
  const uint64_t bits = mix(mix(seed) ^ index);
  const double u = (static_cast<double>(bits >> 40) + 0.5) * 0x1p-24;
  const double v = static_cast<double>(bits & 0xffffffu) * 0x1p-24;
  return static_cast<float>(std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v));
}

void fill_normal(std::vector<float>& out, uint64_t seed, float scale) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = normal_value(seed, i) * scale;
}

Buffer to_device(Backend& backend, const void* host, size_t bytes) {
  Buffer buffer = backend.alloc(std::max<size_t>(bytes, 1));
  backend.upload(buffer.data(), host, bytes);
  return buffer;
}

// Weights
// --------------------------------------------------------------------------------------------------------

TestWeight::TestWeight(Backend& backend, WeightLayout layout, int out_features, int in_features,
                       int group_size, uint64_t seed, bool pre_scale)
    : packed_memory_(nullptr, [](void* p) { std::free(p); }) {
  const auto n = static_cast<size_t>(out_features), k = static_cast<size_t>(in_features);
  operand_ = {.layout = layout, .out_features = out_features, .in_features = in_features};
  const float scale = 1.0f / std::sqrt(static_cast<float>(k));
  std::vector<std::byte> bytes;
  if (is_int4(layout) || is_int8(layout)) {
    operand_.group_size = group_size;
    Int4Matrix m{
        .out_features = out_features, .in_features = in_features, .group_size = group_size};
    m.q.resize(n * k);
    for (size_t i = 0; i < m.q.size(); i += 16) {
      const uint64_t bits = mix(seed ^ mix(i));
      for (size_t j = 0; j < std::min<size_t>(16, m.q.size() - i); ++j) {
        m.q[i + j] = static_cast<int8_t>(static_cast<int>(bits >> (4 * j) & 15) - 8);
        if (is_int8(layout)) {  // all of -119..119
          m.q[i + j] =
              static_cast<int8_t>(static_cast<int>(mix(bits + j) % (2 * kMaxInt8 + 1)) - kMaxInt8);
        }
      }
    }
    m.scales.resize(n * k / static_cast<size_t>(group_size));
    for (size_t i = 0; i < m.scales.size(); ++i) {
      m.scales[i] = scale * 0.2f * (1.0f + 0.5f * std::fabs(normal_value(seed + 1, i)));
    }
    if (is_int8(layout)) {
      for (float& value : m.scales) value /= 16;
    }
    PackedLinear packed =
        is_int4(layout) ? pack_int4(m, layout)
                        : pack_int8({out_features, in_features, group_size, m.q, m.scales}, layout);
    bytes = std::move(packed.weight);
    if (!packed.scales.empty()) {
      scales_ = to_device(backend, packed.scales);
      operand_.scales = scales_.as<float>();
    }
  } else {
    std::vector<float> values(n * k);
    fill_normal(values, seed, scale);
    bytes.resize(n * k * (layout == WeightLayout::kF32Rows ? 4 : 2));
    if (layout == WeightLayout::kF32Rows) {
      std::memcpy(bytes.data(), values.data(), bytes.size());
    } else {
      auto* out = reinterpret_cast<uint16_t*>(bytes.data());
      for (size_t i = 0; i < values.size(); ++i) {
        out[i] =
            layout == WeightLayout::kBf16Rows ? float_to_bf16(values[i]) : float_to_f16(values[i]);
      }
    }
  }
  // A weight lies in a mapping of its exact size in real use: leave no slack that a kernel could
  // read by mistake under AddressSanitizer.
  packed_memory_.reset(
      static_cast<std::byte*>(std::aligned_alloc(64, (bytes.size() + 63) / 64 * 64)));
  std::memcpy(packed_memory_.get(), bytes.data(), bytes.size());
  operand_.weight = backend.import_weights(packed_memory_.get(), bytes.size());
  if (pre_scale) {
    std::vector<float> values(k);
    for (size_t i = 0; i < k; ++i) values[i] = std::exp(0.5f * normal_value(seed + 2, i));
    pre_scale_ = to_device(backend, values);
    operand_.pre_scale = pre_scale_.as<float>();
  }
}

std::string LinearCase::name() const {
  return fmt::format("{} {}x{}{} rows {}{}{}", gate_up ? "gate_up" : "linear", out_features,
                     in_features,
                     is_int4(layout)   ? fmt::format(" int4 g{}", group_size)
                     : is_int8(layout) ? fmt::format(" int8 g{}", group_size)
                                       : fmt::format(" {}", weight_layout_name(layout)),
                     rows, add ? " add" : "", pre_scale ? " pre_scale" : "");
}
double LinearCase::flops() const {
  return 2.0 * rows * out_features * in_features * (gate_up ? 2 : 1);
}
double LinearCase::bytes() const {
  return weight_bytes(layout, out_features, in_features, group_size) * (gate_up ? 2 : 1) +
         4.0 * rows * (double{1} * in_features + out_features * (add ? 2.0 : 1.0));
}

std::vector<LinearCase> linear_cases() {
  std::vector<LinearCase> cases;
  uint64_t seed = 100;
  // N even because the portable layout pairs rows; N not a multiple of 16; K of one and several
  // groups.
  const int int4_shapes[][3] = {{2, 64, 64},      {16, 128, 128}, {18, 64, 64},
                                {34, 256, 128},   {50, 384, 64},  {98, 192, 64},
                                {130, 1024, 128}, {66, 512, 256}, {20, 96, 32}};
  const int rows[] = {1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 16, 17, 33, 100, 200};
  for (const auto& [n, k, group] : int4_shapes) {
    for (const int r : rows) {
      const bool gate_up = seed % 3 == 0;
      cases.push_back({.layout = WeightLayout::kCpuInt4,
                       .out_features = n,
                       .in_features = k,
                       .group_size = group,
                       .rows = r,
                       .add = !gate_up && seed % 2 == 0,
                       .pre_scale = seed % 5 < 2,
                       .gate_up = gate_up,
                       .seed = seed});
      ++seed;
    }
  }
  // lm_head in 8 bits; a vocabulary may be odd.
  const int int8_shapes[][3] = {{2, 64, 64}, {17, 128, 128}, {50, 384, 64}, {131, 1024, 128}};
  for (const auto& [n, k, group] : int8_shapes) {
    for (const int r : {1, 2, 5, 12, 33, 200}) {
      cases.push_back({.layout = WeightLayout::kCpuInt8,
                       .out_features = n,
                       .in_features = k,
                       .group_size = group,
                       .rows = r,
                       .add = seed % 2 == 0,
                       .pre_scale = seed % 5 < 2,
                       .seed = seed});
      ++seed;
    }
  }
  const WeightLayout dense[] = {WeightLayout::kBf16Rows, WeightLayout::kF16Rows,
                                WeightLayout::kF32Rows};
  const int dense_shapes[][2] = {{1, 1},   {3, 5},     {13, 33},  {17, 100},
                                 {37, 64}, {100, 257}, {25, 1030}};
  for (const WeightLayout layout : dense) {
    for (const auto& [n, k] : dense_shapes) {
      for (const int r : {1, 2, 3, 5, 6, 8, 11, 12, 13, 19, 100, 200}) {
        const bool gate_up = seed % 3 == 0;
        cases.push_back({.layout = layout,
                         .out_features = n,
                         .in_features = k,
                         .rows = r,
                         .add = !gate_up && seed % 2 == 0,
                         .pre_scale = seed % 5 < 1,
                         .gate_up = gate_up,
                         .seed = seed});
        ++seed;
      }
    }
  }
  return cases;
}

std::vector<LinearCase> model_linear_cases(const ModelSpec& s, WeightLayout int4_layout,
                                           int group_size, int rows) {
  const auto int4 = [&](int n, int k, bool add, bool gate_up) {
    return LinearCase{.layout = int4_layout,
                      .out_features = n,
                      .in_features = k,
                      .group_size = group_size,
                      .rows = rows,
                      .add = add,
                      .gate_up = gate_up,
                      .seed = static_cast<uint64_t>(n + k)};
  };
  return {
      int4(s.qkv_size(), s.hidden_size, false, false), int4(s.hidden_size, s.q_size(), true, false),
      int4(s.ffn_size, s.hidden_size, false, true), int4(s.hidden_size, s.ffn_size, true, false),
      LinearCase{.layout = WeightLayout::kBf16Rows,
                 .out_features = s.vocab_size,
                 .in_features = s.hidden_size,
                 .rows = rows,
                 .seed = 7}};
}

// Outputs
// --------------------------------------------------------------------------------------------------------

GuardedOutput::GuardedOutput(Backend& backend, size_t size, size_t element_bytes)
    : backend_(backend),
      size_(size),
      element_bytes_(element_bytes),
      buffer_(backend.alloc((words() + 2 * kGuard) * sizeof(uint32_t))) {
  NIBBLE_CHECK(element_bytes == sizeof(float) || element_bytes == sizeof(uint16_t));
  fill(std::vector<float>(size, std::numeric_limits<float>::quiet_NaN()));
}

void GuardedOutput::fill(const std::vector<float>& values) {
  NIBBLE_CHECK(values.size() == size_);
  std::vector<uint32_t> all(words() + 2 * kGuard, kCanary);
  auto* inside = reinterpret_cast<std::byte*>(all.data() + kGuard);
  for (size_t i = 0; i < size_; ++i) {
    if (element_bytes_ == sizeof(float)) {
      std::memcpy(inside + i * sizeof(float), &values[i], sizeof(float));
    } else {
      const uint16_t bits = float_to_bf16(values[i]);
      std::memcpy(inside + i * sizeof bits, &bits, sizeof bits);
    }
  }
  backend_.upload(buffer_.data(), all.data(), all.size() * sizeof(uint32_t));
}

std::vector<float> GuardedOutput::read() const {
  std::vector<uint32_t> all(words() + 2 * kGuard);
  backend_.sync();
  backend_.download(all.data(), buffer_.data(), all.size() * sizeof(uint32_t));
  for (size_t i = 0; i < kGuard; ++i) {
    NIBBLE_CHECK(all[i] == kCanary, "wrote {} words before the output", kGuard - i);
    NIBBLE_CHECK(all[kGuard + words() + i] == kCanary, "wrote {} words past the output", i + 1);
  }
  const auto* inside = reinterpret_cast<const std::byte*>(all.data() + kGuard);
  std::vector<float> values(size_);
  for (size_t i = 0; i < size_; ++i) {
    if (element_bytes_ == sizeof(float)) {
      std::memcpy(&values[i], inside + i * sizeof(float), sizeof(float));
    } else {
      uint16_t bits;
      std::memcpy(&bits, inside + i * sizeof bits, sizeof bits);
      values[i] = bf16_to_float(bits);
    }
    NIBBLE_CHECK(!std::isnan(values[i]), "element {} is NaN or unwritten", i);
  }
  return values;
}

void round_to_bf16(std::vector<float>& values) {
  for (float& value : values) value = bf16_to_float(float_to_bf16(value));
}

Buffer acts_to_device(Backend& backend, const std::vector<float>& values) {
  if (backend.act_bytes() == sizeof(float)) return to_device(backend, values);
  NIBBLE_CHECK(backend.act_bytes() == sizeof(uint16_t));
  std::vector<uint16_t> narrow;
  for (const float value : values) narrow.push_back(float_to_bf16(value));
  return to_device(backend, narrow);
}

// Attention
// ------------------------------------------------------------------------------------------------------

std::string AttentionShape::name() const {
  return fmt::format("heads {} kv {} dim {} block {} {}", num_heads, num_kv_heads, head_dim,
                     block_tokens, kv_format_name(format));
}

std::vector<AttentionShape> attention_shapes() {
  std::vector<AttentionShape> shapes;
  for (const KvFormat format :
       {KvFormat::kInt8Dynamic, KvFormat::kInt8Static, KvFormat::kF16, KvFormat::kF32}) {
    shapes.push_back({4, 2, 32, 16, format});
    shapes.push_back({6, 2, 64, 32, format});
    shapes.push_back({8, 1, 40, 32, format});  // head_dim not a multiple of 16; 8 heads a kv head
    shapes.push_back(
        {3, 3, 18, 5, format});  // odd everything: no grouping, blocks that divide nothing
    shapes.push_back({4, 1, 128, 64, format});
  }
  return shapes;
}

AttentionRun::AttentionRun(Backend& backend, const AttentionShape& shape, int num_sequences,
                           int max_tokens, uint64_t shuffle, bool out_scale)
    : backend_(backend),
      shape_(shape),
      blocks_per_seq_((max_tokens + shape.block_tokens - 1) / shape.block_tokens),
      lengths_(static_cast<size_t>(num_sequences)) {
  const int num_blocks = num_sequences * blocks_per_seq_;
  tables_.resize(static_cast<size_t>(num_blocks));
  std::iota(tables_.begin(), tables_.end(), 0);
  for (size_t i = tables_.size(); shuffle != 0 && i > 1; --i)
    std::swap(tables_[i - 1], tables_[mix(shuffle + i) % i]);

  const auto half = static_cast<size_t>(shape.head_dim / 2);
  std::vector<float> cos(kMaxPosition * half), sin(cos.size());
  for (size_t p = 0; p < kMaxPosition; ++p) {
    for (size_t d = 0; d < half; ++d) {
      const double angle = static_cast<double>(p) *
                           std::pow(10000.0, -static_cast<double>(d) / static_cast<double>(half));
      cos[p * half + d] = static_cast<float>(std::cos(angle));
      sin[p * half + d] = static_cast<float>(std::sin(angle));
    }
  }
  cos_ = to_device(backend, cos);
  sin_ = to_device(backend, sin);
  const size_t kv_bytes =
      static_cast<size_t>(num_blocks) *
      backend.kv_block_bytes(shape.format, shape.block_tokens, shape.num_kv_heads, shape.head_dim);
  kv_ = to_device(backend, std::vector<uint8_t>(kv_bytes, 0xff));  // NaN wherever nobody wrote
  layer_ = {.format = shape.format,
            .num_blocks = num_blocks,
            .block_tokens = shape.block_tokens,
            .num_kv_heads = shape.num_kv_heads,
            .head_dim = shape.head_dim,
            .data = kv_.data(),
            .k_scale = 0.02f,
            .v_scale = 0.015f};  // static: normal values saturate past 2.5 and 1.9 sigma
  if (out_scale) {
    std::vector<float> values(static_cast<size_t>(shape.num_heads * shape.head_dim));
    for (size_t i = 0; i < values.size(); ++i) values[i] = std::exp(0.3f * normal_value(77, i));
    out_scale_ = to_device(backend, values);
  }
}

void AttentionRun::prepare(const std::vector<Chunk>& chunks) {
  const int row_size = (shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim;
  positions_.clear();
  seq_starts_.assign(1, 0);
  kv_lens_.clear();
  step_tables_.clear();
  std::vector<float> qkv;
  int used_blocks = 0;
  for (const Chunk& chunk : chunks) {
    int& length = lengths_[static_cast<size_t>(chunk.sequence)];
    NIBBLE_CHECK(length + chunk.count <= blocks_per_seq_ * shape_.block_tokens);
    for (int i = 0; i < chunk.count; ++i) {
      const int position = length + i;
      positions_.push_back(position);
      const uint64_t seed =
          1000 + static_cast<uint64_t>(chunk.sequence) * 100000 + static_cast<uint64_t>(position);
      for (int j = 0; j < row_size; ++j)
        qkv.push_back(normal_value(seed, static_cast<uint64_t>(j)));
    }
    length += chunk.count;
    seq_starts_.push_back(static_cast<int32_t>(positions_.size()));
    kv_lens_.push_back(length);
    used_blocks += (length + shape_.block_tokens - 1) / shape_.block_tokens;
    const auto table = tables_.begin() + chunk.sequence * blocks_per_seq_;
    step_tables_.insert(step_tables_.end(), table, table + blocks_per_seq_);
  }
  positions_dev_ = to_device(backend_, positions_);
  seq_starts_dev_ = to_device(backend_, seq_starts_);
  kv_lens_dev_ = to_device(backend_, kv_lens_);
  tables_dev_ = to_device(backend_, step_tables_);
  round_to_bf16(qkv);
  qkv_ = acts_to_device(backend_, qkv);
  batch_ = {
      .num_tokens = static_cast<int>(positions_.size()),
      .num_seqs = static_cast<int>(chunks.size()),
      .num_decode_seqs = static_cast<int>(
          std::ranges::find_if(chunks, [](const Chunk& c) { return c.count > 1 || c.is_prompt; }) -
          chunks.begin()),
      .max_blocks_per_seq = blocks_per_seq_,
      .is_uneven = is_uneven(used_blocks, static_cast<int>(chunks.size()), blocks_per_seq_),
      .positions = positions_dev_.as<int32_t>(),
      .seq_starts = seq_starts_dev_.as<int32_t>(),
      .kv_lens = kv_lens_dev_.as<int32_t>(),
      .block_tables = tables_dev_.as<int32_t>(),
      .host_seq_starts = seq_starts_.data(),
      .host_kv_lens = kv_lens_.data()};
  y_ = backend_.alloc(positions_.size() * static_cast<size_t>(shape_.num_heads * shape_.head_dim) *
                      backend_.act_bytes());
}

void AttentionRun::store() {
  backend_.rope_store_kv(
      batch_, qkv_.data(), shape_.num_heads,
      {.cos = cos_.as<float>(), .sin = sin_.as<float>(), .max_position = kMaxPosition}, layer_);
}
void AttentionRun::attend() {
  backend_.attention(batch_, qkv_.data(), shape_.num_heads, layer_, out_scale_.as<float>(),
                     y_.data());
}

std::vector<float> AttentionRun::step(const std::vector<Chunk>& chunks) {
  prepare(chunks);
  store();
  GuardedOutput y(backend_,
                  positions_.size() * static_cast<size_t>(shape_.num_heads * shape_.head_dim),
                  backend_.act_bytes());
  backend_.attention(batch_, qkv_.data(), shape_.num_heads, layer_, out_scale_.as<float>(),
                     y.data());
  return y.read();
}

double AttentionRun::attend_flops() const {
  double pairs = 0;
  for (const int32_t position : positions_) pairs += position + 1;
  return 4.0 * pairs * shape_.num_heads * shape_.head_dim;
}
double AttentionRun::attend_bytes() const {
  int64_t blocks = 0;
  for (const int32_t length : kv_lens_)
    blocks += (length + shape_.block_tokens - 1) / shape_.block_tokens;
  return static_cast<double>(blocks) *
         static_cast<double>(backend_.kv_block_bytes(shape_.format, shape_.block_tokens,
                                                     shape_.num_kv_heads, shape_.head_dim));
}

}  // namespace nibble::ops
