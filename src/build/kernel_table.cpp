// SPDX-License-Identifier: Apache-2.0
#include "build/kernel_table.h"

#include <fmt/format.h>

namespace nibble {
namespace {

bool same_matrix(const LinearTactic& a, const LinearTactic& b) {
  return a.out_features == b.out_features && a.in_features == b.in_features;
}

std::string matrix_name(const LinearTactic& t) {
  return fmt::format("{} x {}", t.out_features, t.in_features);
}

}  // namespace

std::string chosen_kernels(std::span<const LinearTactic> tactics) {
  std::string out;
  for (size_t first = 0, last = 0; first < tactics.size(); first = last) {
    const LinearTactic& t = tactics[first];
    last = first + 1;
    while (last < tactics.size() && same_matrix(t, tactics[last]) &&
           t.best.kernel == tactics[last].best.kernel) {
      ++last;
    }
    const bool begins = first == 0 || !same_matrix(t, tactics[first - 1]);
    const std::string rows = fmt::format("{} ... {}", begins ? 1 : tactics[first - 1].max_rows + 1,
                                         tactics[last - 1].max_rows);
    out += fmt::format("{}  {:14}{:>13} rows  {}", out.empty() ? "" : "\n",
                       begins ? matrix_name(t) : std::string(), rows, t.best.kernel);
  }
  return out;
}

std::string kernel_times(std::span<const LinearTactic> tactics) {
  std::string out;
  for (const LinearTactic& t : tactics) {
    out += fmt::format("{}  {} with {} rows: {} {:.2f} us", out.empty() ? "" : "\n", matrix_name(t),
                       t.max_rows, t.best.kernel, t.best.microseconds);
    const char* separator = "; slower: ";
    for (const KernelTime& other : t.slower) {
      out += fmt::format("{}{} {:.2f}", separator, other.kernel, other.microseconds);
      separator = ", ";
    }
  }
  return out;
}

}  // namespace nibble
