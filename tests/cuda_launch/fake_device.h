// A CUDA device made of host memory: the runtime of runtime.h and the launchers of kernels.h and
// generic.h, so that the CUDA backend's host code runs, and is tested, without a GPU. A kernel
// computes nothing. It notes down what its output means, as an expression over what its inputs
// mean: "linear W of norm w of embed ..."; the test compares that with what the ops mean.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace nibble::test {

/// An expression; equal ones are one number.
using Meaning = int;
inline constexpr Meaning kNothing = 0;  // memory nobody has written, or not as a whole

/// `op` of `of`.
Meaning meaning(const std::string& op, std::vector<Meaning> of = {});
const std::string& op_of(Meaning m);
const std::vector<Meaning>& operands_of(Meaning m);
/// For messages, down to `depth` operands.
std::string text_of(Meaning m, int depth = 6);

/// What bytes of memory mean.
class Contents {
 public:
  void write(const void* at, size_t bytes, Meaning m);
  /// What all of them mean, or kNothing.
  Meaning read(const void* at, size_t bytes) const;
  void copy(void* to, const void* from, size_t bytes);
  /// From here on using any of them is a fault.
  void forbid(const void* at, size_t bytes) { write(at, bytes, kForbidden); }
  /// How often forbidden bytes were used.
  int num_forbidden_uses() const { return forbidden_uses_; }

 private:
  static constexpr Meaning kForbidden = -1;
  struct Range {
    uintptr_t end;
    Meaning m;
  };
  void erase(uintptr_t begin, uintptr_t end);
  mutable int forbidden_uses_ = 0;
  std::map<uintptr_t, Range> ranges_;  // by begin, disjoint
};

struct Launch {
  std::string kernel;
  int tokens = 0;
  bool in_order = false;  // of linears
  bool fuses = false;     // part of a norm, or rounding for the next linear
  int tactic = -1;
  const void* weights = nullptr;
};

struct FakeDevice {
  // Which kernels can round for the next linear (linear_fp8_rounds() and the like).
  bool residual_rounds = true, silu_rounds = true, attention_rounds = true;

  Contents memory;
  std::vector<Launch> launches;
  std::vector<std::string> faults;  // what no kernel may do
  int allocations = 0, graph_launches = 0;
  int waits = 0;  // of the host for the device
};
/// The device; reset() makes it new.
FakeDevice& fake_device();
void reset_fake_device();

}  // namespace nibble::test
