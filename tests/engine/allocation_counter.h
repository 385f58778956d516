// Counts heap allocations of the calling thread: the test program replaces operator new
// (allocation_counter.cpp). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace nibble {

uint64_t num_allocations();  // of this thread, since it started

}  // namespace nibble
