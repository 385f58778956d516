// The int4 kernels of a plan (EnginePlan::tactics) for people.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>

#include "spec/engine_plan.h"

namespace nibble {

/// A line for each matrix and range of rows that one kernel serves.
std::string chosen_kernels(std::span<const LinearTactic> tactics);

/// Every time that was measured: a line for each size, the chosen kernel first.
std::string kernel_times(std::span<const LinearTactic> tactics);

}  // namespace nibble
