// SPDX-License-Identifier: Apache-2.0
#include "cuda_launch/fake_device.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <optional>

#include "backends/cuda/calibration_kernels.h"
#include "backends/cuda/generic.h"
#include "backends/cuda/kernels.h"
#include "backends/cuda/runtime.h"
#include "backends/cuda/variant.h"
#include "backends/cuda/wgmma_tactic.h"

namespace nibble::test {
namespace {

struct Expression {
  std::string op;
  std::vector<Meaning> of;
  auto operator<=>(const Expression&) const = default;
};
std::vector<Expression>& expressions() {
  static std::vector<Expression> all{{"nothing", {}}};
  return all;
}

struct Command {
  Launch launch;
  std::function<void()> effect;
};
using Graph = std::vector<Command>;
std::unique_ptr<FakeDevice> device;
Graph* recording = nullptr;
// Of all that was ever allocated: a freed one stays, so that nothing else is where it was.
std::map<void*, std::pair<std::unique_ptr<std::byte[]>, size_t>> allocated;

}  // namespace

Meaning meaning(const std::string& op, std::vector<Meaning> of) {
  static std::map<Expression, Meaning> known;
  Expression e{op, std::move(of)};
  const auto [it, is_new] = known.try_emplace(e, static_cast<Meaning>(expressions().size()));
  if (is_new) expressions().push_back(std::move(e));
  return it->second;
}
const std::string& op_of(Meaning m) { return expressions()[static_cast<size_t>(m)].op; }
const std::vector<Meaning>& operands_of(Meaning m) {
  return expressions()[static_cast<size_t>(m)].of;
}
std::string text_of(Meaning m, int depth) {
  std::string text = op_of(m);
  if (operands_of(m).empty()) return text;
  if (depth == 0) return text + "(...)";
  text += "(";
  for (const Meaning operand : operands_of(m)) text += text_of(operand, depth - 1) + ", ";
  text.resize(text.size() - 2);
  return text + ")";
}

void Contents::erase(uintptr_t begin, uintptr_t end) {
  auto it = ranges_.lower_bound(begin);
  if (it != ranges_.begin() && std::prev(it)->second.end > begin) --it;
  while (it != ranges_.end() && it->first < end) {
    const auto [from, range] = *it;
    if (range.m == kForbidden) ++forbidden_uses_;
    it = ranges_.erase(it);
    if (from < begin) ranges_[from] = {begin, range.m};
    if (range.end > end) it = ranges_.insert({end, range}).first;
  }
}
void Contents::write(const void* at, size_t bytes, Meaning m) {
  const auto begin = reinterpret_cast<uintptr_t>(at);
  erase(begin, begin + bytes);
  if (m != kNothing) ranges_[begin] = {begin + bytes, m};
}
Meaning Contents::read(const void* at, size_t bytes) const {
  auto begin = reinterpret_cast<uintptr_t>(at);
  const uintptr_t end = begin + bytes;
  auto it = ranges_.upper_bound(begin);
  if (it == ranges_.begin()) return kNothing;
  const Meaning m = (--it)->second.m;
  if (m == kForbidden && it->second.end > begin) {
    ++forbidden_uses_;
    return kNothing;
  }
  for (; it != ranges_.end() && it->first <= begin && it->second.m == m; ++it) {
    if (it->second.end <= begin) return kNothing;
    begin = it->second.end;
    if (begin >= end) return m;
  }
  return kNothing;
}
void Contents::copy(void* to, const void* from, size_t bytes) {
  const auto source = reinterpret_cast<uintptr_t>(from);
  std::vector<std::pair<uintptr_t, Range>> found;
  for (const auto& [begin, range] : ranges_) {
    const uintptr_t first = std::max(begin, source), last = std::min(range.end, source + bytes);
    if (first < last) found.push_back({first - source, {last - source, range.m}});
  }
  write(to, bytes, kNothing);
  for (const auto& [begin, range] : found) {
    write(static_cast<std::byte*>(to) + begin, range.end - begin, range.m);
  }
}

FakeDevice& fake_device() { return *device; }
void reset_fake_device() {
  device = std::make_unique<FakeDevice>();
  allocated.clear();
  recording = nullptr;
}

}  // namespace nibble::test

namespace nibble::cuda {
namespace {

using test::fake_device;
using test::kNothing;
using test::Launch;
using test::Meaning;
using test::meaning;

// A kernel, now or when its graph is launched.
int submit(Launch launch, std::function<void()> effect) {
  test::Command command{std::move(launch), std::move(effect)};
  if (test::recording) {
    test::recording->push_back(std::move(command));
  } else {
    fake_device().launches.push_back(command.launch);
    command.effect();
  }
  return 0;
}

void fault(std::string what) { fake_device().faults.push_back(std::move(what)); }
test::Contents& memory() { return fake_device().memory; }

size_t bf16_bytes(int64_t rows, int64_t columns) { return static_cast<size_t>(rows * columns) * 2; }
std::string with(const char* op, const void* operand) { return fmt::format("{} {}", op, operand); }
bool begins(Meaning m, std::string_view op) {
  return std::string_view(test::op_of(m)).starts_with(op);
}

// As what a linear reads x. Rows of another kind are no input of it.
enum class Kind { kBf16, kDigits, kE4m3Grouped, kE4m3 };
const char* kind_name(Kind kind) {
  constexpr const char* kNames[] = {"bf16", "digits", "e4m3 grouped", "e4m3"};
  return kNames[static_cast<int>(kind)];
}
Meaning rounded(Kind kind, Meaning m) {
  return kind == Kind::kBf16 ? m : meaning(kind_name(kind), {m});
}
size_t input_bytes(Kind kind, int tokens, int64_t k) {
  if (kind == Kind::kBf16) return bf16_bytes(tokens, k);
  return kind == Kind::kDigits ? digits_bytes(tokens, k) : quantized_x_bytes(tokens, k);
}

// `times w` of x is x w, a norm without its 1/rms; `squares` of x brings that.
Meaning with_rms(Meaning m, Meaning squares) {
  if (begins(m, "prescaled")) {
    return meaning(test::op_of(m), {with_rms(test::operands_of(m)[0], squares)});
  }
  if (!begins(m, "times") || squares != meaning("squares", {test::operands_of(m)[0]})) {
    fault(fmt::format("1/rms of {} for {}", test::text_of(squares), test::text_of(m)));
    return kNothing;
  }
  return meaning("norm" + test::op_of(m).substr(5), {test::operands_of(m)[0]});
}

int run_linear(const char* kernel, Kind kind, const LinearArgs& a) {
  const bool fuses = a.next || a.squares || a.rounded;
  const Launch launch{kernel, a.tokens, a.in_order, fuses, a.tactic, a.weights};
  const TensorMap map = kPortable ? TensorMap{} : *a.x_map;
  return submit(launch, [a, kind, kernel, map] {
    const size_t x_bytes = input_bytes(kind, a.tokens, a.k);
    Meaning x = memory().read(a.x, x_bytes);
    if (!kPortable && kind == Kind::kBf16) {
      const uint64_t wanted[] = {reinterpret_cast<uintptr_t>(a.x), static_cast<uint64_t>(a.tokens),
                                 static_cast<uint64_t>(a.k), static_cast<uint64_t>(a.x_stride * 2),
                                 static_cast<uint64_t>(linear_wgmma_box_rows(a))};
      if (!std::equal(std::begin(wanted), std::end(wanted), map.opaque)) {
        fault(fmt::format("{} with the tensor map of another x, or other boxes", kernel));
      }
    }
    if (kind != Kind::kBf16) {
      if (test::op_of(x) != kind_name(kind)) {
        fault(fmt::format("{} reads {}, wants {}", kernel, test::text_of(x), kind_name(kind)));
        x = kNothing;
      } else {
        x = test::operands_of(x)[0];
      }
    }
    if (a.squares) x = with_rms(x, memory().read(a.squares, sizeof(float)));
    const bool silu = a.epilogue == Epilogue::kSiluMul;
    Meaning y = silu ? meaning(fmt::format("gate_up {} {}", a.weights,
                                           static_cast<const void*>(a.out_scale)),
                               {x})
                     : meaning(with("linear", a.weights), {x});
    const int64_t columns = silu ? a.rows / 2 : a.rows;
    const size_t out_bytes =
        bf16_bytes(a.tokens, columns) * (a.epilogue == Epilogue::kFloat ? 2 : 1);
    if (a.epilogue == Epilogue::kResidual) {
      y = meaning("add", {memory().read(a.residual, out_bytes), y});
    }
    const size_t next_bytes = input_bytes(kind, a.tokens, columns);
    // Other CTAs of the kernel still read x where one is done.
    auto write = [&](const void* to, size_t bytes, Meaning m) {
      const auto begin = reinterpret_cast<uintptr_t>(to);
      const auto from = reinterpret_cast<uintptr_t>(a.x);
      if (begin < from + x_bytes && from < begin + bytes) {
        fault(fmt::format("{} of {} rows writes over its own input", kernel, a.tokens));
      }
      memory().write(to, bytes, m);
    };
    write(a.out, out_bytes, y);
    if (a.next) {
      if (a.squares) fault(fmt::format("{} reads and writes squares", kernel));
      write(a.next, next_bytes, rounded(kind, meaning(with("times", a.next_weight), {y})));
      memory().write(a.next_squares, sizeof(float), meaning("squares", {y}));
    }
    if (a.rounded) write(a.rounded, next_bytes, rounded(kind, y));
  });
}

int run_rounding(const char* kernel, Kind kind, const QuantizeArgs& a) {
  return submit({kernel, a.tokens, false, false}, [a, kind] {
    const Meaning source = memory().read(a.x, bf16_bytes(a.tokens, a.x_stride));
    Meaning x = source;
    if (a.norm_weight) {
      x = meaning(with(kind == Kind::kE4m3 ? "norm" : "times", a.norm_weight), {x});
    }
    if (a.pre_scale) x = meaning(with("prescaled", a.pre_scale), {x});
    memory().write(a.out, input_bytes(kind, a.tokens, a.k), rounded(kind, x));
    if (a.norm_weight && kind != Kind::kE4m3) {
      memory().write(a.squares, sizeof(float), meaning("squares", {source}));
    }
  });
}

// Pages are one thing: what was appended to them, in order.
Meaning append(void* pages, Meaning qkv) {
  const Meaning all = meaning("append", {memory().read(pages, 1), qkv});
  memory().write(pages, 1, all);
  return all;
}

// `rows` rows of q, rotated, over what the pages hold.
void attend(const void* q, int64_t q_stride, const void* pages, const float* out_scale, void* out,
            int64_t out_stride, int rows) {
  const Meaning y =
      meaning(with("attention", out_scale),
              {memory().read(q, bf16_bytes(rows, q_stride)), memory().read(pages, 1)});
  memory().write(out, bf16_bytes(rows, out_stride), y);
}

// What only quantizing and measuring kernels use: no test of this program comes here.
int unused() { std::abort(); }

}  // namespace

// runtime.h
// ------------------------------------------------------------------------------------------------

const char* error_text(int) { return "an error of the fake device"; }
int open_device(Device* device, int* count) {
  *device = {
      .name = "a fake H200", .major = 9, .minor = 0, .num_sms = 132, .total_bytes = 1u << 30};
  *count = 1;
  return 0;
}
void runtime_versions(int* driver, int* runtime) { *driver = *runtime = 13000; }
int runtime_major() { return 13; }
int stream_create(void** stream) {
  *stream = nullptr;
  return 0;
}
void stream_destroy(void*) {}
int stream_sync(void*) {
  if (test::recording) fault("waited for the stream while recording");
  ++fake_device().waits;
  return 0;
}
void* pinned_alloc(size_t bytes) { return std::malloc(bytes); }
void pinned_free(void* data) { std::free(data); }
int pin(void*, size_t) { return 0; }
void unpin(void*) {}
int event_create(void** event) {
  *event = nullptr;
  return 0;
}
void event_destroy(void*) {}
int event_record(void*, void*) { return 0; }
int event_sync(void*) {
  ++fake_device().waits;
  return 0;
}

int capture_begin(void*) {
  test::recording = new test::Graph;
  return 0;
}
int capture_end(void*, void** graph) {
  *graph = std::exchange(test::recording, nullptr);
  return 0;
}
int graph_launch(void* graph, void*) {
  ++fake_device().graph_launches;
  for (const test::Command& command : *static_cast<test::Graph*>(graph)) {
    fake_device().launches.push_back(command.launch);
    command.effect();
  }
  return 0;
}
void graph_destroy(void* graph) { delete static_cast<test::Graph*>(graph); }

int memory_alloc(void** data, size_t bytes) {
  if (test::recording) fault("allocated while recording");
  ++fake_device().allocations;
  auto held = std::make_unique<std::byte[]>(bytes);
  *data = held.get();
  test::allocated[*data] = {std::move(held), bytes};
  return 0;
}
void memory_free(void* data) {
  if (data) memory().forbid(data, test::allocated.at(data).second);
}
int memory_free_bytes(uint64_t* bytes) {
  *bytes = 1u << 30;
  return 0;
}
int memory_fill(void* data, int byte, size_t bytes, void*) {
  return submit({"fill"}, [=] {
    std::memset(data, byte, bytes);
    memory().write(data, bytes, kNothing);
  });
}
int copy_to_device(void* device, const void* host, size_t bytes, void*) {
  return submit({"copy"}, [=] {
    std::memcpy(device, host, bytes);
    memory().write(device, bytes, kNothing);
  });
}
int copy_to_host(void* host, const void* device, size_t bytes, void*) {
  return submit({"copy"}, [=] { std::memcpy(host, device, bytes); });
}
int copy_on_device(void* to, const void* from, size_t bytes, void*) {
  return submit({"copy"}, [=] {
    std::memcpy(to, from, bytes);
    memory().copy(to, from, bytes);
  });
}

// kernels.h
// ------------------------------------------------------------------------------------------------

int make_tensor_map(TensorMap* map, const void* base, int64_t rows, int64_t columns,
                    int64_t row_stride_bytes, int box_rows) {
  *map = {};
  map->opaque[0] = reinterpret_cast<uintptr_t>(base);
  const int64_t numbers[] = {rows, columns, row_stride_bytes, box_rows};
  std::copy(std::begin(numbers), std::end(numbers), &map->opaque[1]);
  return 0;
}
size_t linear_workspace_bytes(int) { return 64; }
size_t portable_linear_workspace_bytes(int) { return 64; }
size_t decode_attention_workspace_bytes(int) { return 64; }
size_t prefill_attention_workspace_bytes(int max_length, int kv_heads) {
  return static_cast<size_t>(max_length) * static_cast<size_t>(kv_heads);
}
size_t sample_workspace_bytes(int rows, int) { return static_cast<size_t>(rows) * 64; }
size_t digits_bytes(int tokens, int64_t k) { return bf16_bytes(tokens, k) + 64; }
size_t quantized_x_bytes(int tokens, int64_t k) { return bf16_bytes(tokens, k) / 2 + 64; }

bool linear_fp8_rounds(const LinearArgs& args) {
  return linear_digits_rounds(args) && args.tokens <= kFp8GroupedTokens && !args.in_order;
}
bool linear_digits_rounds(const LinearArgs& args) {
  return args.epilogue == Epilogue::kSiluMul ? fake_device().silu_rounds
                                             : fake_device().residual_rounds;
}
bool step_attention_rounds(int sequences, int, int) {
  return fake_device().attention_rounds && sequences <= kFp8GroupedTokens;
}
int largest_scale(const void*, int64_t, int64_t, void*, float* out, void*) {
  if (test::recording) fault("looked for the largest scale while recording");
  *out = 1;
  return 0;
}

int linear(const LinearArgs& args, void*) { return run_linear("linear", Kind::kBf16, args); }
int linear_small(const LinearArgs& args, void*) {
  return run_linear("linear_small", Kind::kBf16, args);
}
int linear_wgmma(const LinearArgs& args, void*) {
  return run_linear("linear_wgmma", Kind::kBf16, args);
}
int fill_random_int4(void*, int64_t, uint64_t, void*) { return unused(); }
int fill_random_bf16(void*, int64_t, uint64_t, void*) { return unused(); }
int linear_digits(const LinearArgs& args, void*) {
  return run_linear("linear_digits", Kind::kDigits, args);
}
int linear_fp8(const LinearArgs& args, void*) {
  const bool grouped = args.tokens <= kFp8GroupedTokens && !args.in_order;
  return run_linear("linear_fp8", grouped ? Kind::kE4m3Grouped : Kind::kE4m3, args);
}
int portable_linear(const LinearArgs& args, void*) {
  return run_linear("portable_linear", Kind::kBf16, args);
}
int quantize_x(const QuantizeArgs& args, void*) {
  const bool grouped = args.tokens <= kFp8GroupedTokens && !args.one_scale;
  return run_rounding("quantize_x", grouped ? Kind::kE4m3Grouped : Kind::kE4m3, args);
}
int split_digits(const QuantizeArgs& args, void*) {
  return run_rounding("split_digits", Kind::kDigits, args);
}

int step_attention(const StepAttentionArgs& args, void*) {
  const bool fuses = args.rounded != nullptr;
  return submit({"step_attention", args.sequences, false, fuses}, [a = args] {
    const Meaning qkv = memory().read(a.qkv, bf16_bytes(a.sequences, a.qkv_stride));
    const Meaning y =
        meaning(with("attention", a.out_scale), {meaning("rope", {qkv}), append(a.pages, qkv)});
    memory().write(a.out, bf16_bytes(a.sequences, a.out_stride), y);
    const Kind kind = a.sequences <= kDigitTokens ? Kind::kDigits : Kind::kE4m3Grouped;
    if (a.rounded) {
      memory().write(a.rounded, input_bytes(kind, a.sequences, a.out_stride), rounded(kind, y));
    }
  });
}
int decode_attention(const DecodeAttentionArgs& args, void*) {
  return submit({"decode_attention", args.sequences}, [a = args] {
    attend(a.q, a.q_stride, a.pages, a.out_scale, a.out, a.out_stride, a.sequences);
  });
}
int prefill_attention(const PrefillAttentionArgs& args, void*) {
  return submit({"prefill_attention", args.count}, [a = args] {
    attend(a.q, a.q_stride, a.pages, a.out_scale, a.out, a.out_stride, a.count);
  });
}

int embed(const int* ids, const int*, const void* table, void* x, int tokens, int hidden, bool,
          void*) {
  return submit({"embed", tokens}, [=] {
    std::string op = with("embed", table);
    for (int i = 0; i < tokens; ++i) op += fmt::format(" {}", ids[i]);
    memory().write(x, bf16_bytes(tokens, hidden), meaning(op));
  });
}
int rms_norm(const RmsNormArgs& args, void*) {
  return submit({"rms_norm", args.rows}, [a = args] {
    // Rows that are picked: of one thing, whichever they are.
    const Meaning x = memory().read(a.x, bf16_bytes(a.row_index ? 1 : a.rows, a.hidden));
    memory().write(a.y, bf16_bytes(a.rows, int64_t{a.copies} * a.hidden),
                   meaning(with("norm", a.weight), {x}));
  });
}
int dense_linear(const DenseArgs& args, void*) {
  return submit({"dense_linear", args.rows}, [a = args] {
    memory().write(
        a.out, 2 * bf16_bytes(a.rows, a.n),
        meaning(with("linear", a.weight), {memory().read(a.x, bf16_bytes(a.rows, a.k))}));
  });
}
int sample(const SampleBatch& batch, const float*, const SampleResult&, void*, bool, void*) {
  return submit({"sample", batch.num_rows}, [] {});
}

// generic.h
// ------------------------------------------------------------------------------------------------

size_t page_bytes(PageFormat, int kv_heads) { return static_cast<size_t>(kv_heads) * 64; }
size_t portable_attention_workspace_bytes(int) { return 64; }
int portable_attention_queries(int, int) { return 16; }
bool portable_attention_splits(int, int, int sequences, int, int) { return sequences > 1; }

int generic_rope_store(const GenericRopeArgs& args, void*) {
  return submit({"rope_store", args.tokens}, [a = args] {
    const size_t bytes = bf16_bytes(a.tokens, int64_t{a.heads + 2 * a.kv_heads} * 128);
    const Meaning qkv = memory().read(a.qkv, bytes);
    memory().write(a.qkv, bytes, meaning("rope", {qkv}));
    append(a.pages, qkv);
  });
}
int portable_attention(const GenericAttentionArgs& args, void*, int, void*) {
  return submit({"portable_attention", args.tokens}, [a = args] {
    const int first = a.seq_starts[0], rows = a.seq_starts[a.sequences] - first;
    const int64_t columns = int64_t{a.heads} * 128;
    attend(static_cast<const std::byte*>(a.q) + bf16_bytes(first, a.q_stride), a.q_stride, a.pages,
           a.out_scale, static_cast<std::byte*>(a.out) + bf16_bytes(first, columns), columns, rows);
  });
}
int generic_linear(const GenericLinearArgs& args, void*) {
  return submit({"generic_linear", args.m}, [a = args] {
    const size_t bytes = bf16_bytes(a.m, a.n) * (a.f32_out ? 2 : 1);
    Meaning y = meaning(with("linear", a.w), {memory().read(a.x, bf16_bytes(a.m, a.k))});
    if (a.residual) y = meaning("add", {memory().read(a.residual, bytes), y});
    memory().write(a.out, bytes, y);
  });
}
int scale_columns(const void* x, const float* scale, void* y, int64_t rows, int columns, void*) {
  return submit({"scale_columns", static_cast<int>(rows)}, [=] {
    const size_t bytes = bf16_bytes(rows, columns);
    memory().write(y, bytes, meaning(with("prescaled", scale), {memory().read(x, bytes)}));
  });
}
int silu_multiply(const void* gate, const void* up, const float* scale, void* y, int64_t rows,
                  int columns, void*) {
  return submit({"silu_multiply", static_cast<int>(rows)}, [=] {
    const size_t bytes = bf16_bytes(rows, columns);
    memory().write(
        y, bytes,
        meaning(with("silu", scale), {memory().read(gate, bytes), memory().read(up, bytes)}));
  });
}
int read_all(const void*, size_t, float*, int, void*) { return 0; }

// calibration_kernels.h
// ------------------------------------------------------------------------------------------------

int add_column_abs(const void*, bool, int64_t, int64_t, double*, float*, void*) { return unused(); }
int add_range(const void*, int64_t, int64_t, int64_t, float*, void*) { return unused(); }
int subtract_bf16(const void*, const void*, int64_t, void*, void*) { return unused(); }
int combine(float, float*, float, const float*, int64_t, void*) { return unused(); }
int widen_bf16(const void*, float*, int64_t, void*) { return unused(); }
int divide_columns(float*, const float*, int64_t, int64_t, void*) { return unused(); }
int dot(const float*, const float*, int64_t, double*, void*) { return unused(); }
int diagonal_sum(const float*, int64_t, int64_t, double*, void*) { return unused(); }
int damp_diagonal(float*, int64_t, int64_t, float, float, void*) { return unused(); }
int factor_diagonal(float*, int64_t, int64_t, int64_t, int64_t, int*, void*) { return unused(); }
int unit_diagonal(float*, int64_t, int64_t, float*, void*) { return unused(); }
int choose_scales(const RoundingArgs&, const float*, const float*, int, unsigned long long*,
                  void*) {
  return unused();
}
int round_nearest(const RoundingArgs&, void*) { return unused(); }
int restate_error(const RoundingArgs&, void*) { return unused(); }
int compensate_group(const RoundingArgs&, const float*, const float*, int64_t, void*) {
  return unused();
}
int descend_group(const RoundingArgs&, const float*, const float*, float*, int64_t, void*) {
  return unused();
}
int write_results(const RoundingArgs&, int8_t*, void*, void*) { return unused(); }

}  // namespace nibble::cuda
