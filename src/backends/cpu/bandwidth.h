// The roof: how fast this machine's cores together read memory. Measured in the same run as what is
// compared to it, because machines are shared and clocks move. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace nibble {

/// GB/s (1e9) of `num_threads` (0: usable_cpu_count()) threads reading `bytes` once, front to back
/// in 1 MiB pieces; the best of `passes`. `bytes` should be many times the last-level cache.
double measure_read_bandwidth(int num_threads = 0, size_t bytes = size_t{512} << 20,
                              int passes = 5);

}  // namespace nibble
