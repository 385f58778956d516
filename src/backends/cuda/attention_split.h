// How many CTAs attention_step.cu gives a (sequence, KV head). SPDX-License-Identifier: Apache-2.0
#pragma once

namespace nibble::cuda {

/// 1, 2, 4 or 8. `pages`: of the longest sequence; `uneven`: StepBatch::is_uneven. Above half an SM
/// per (sequence, head) at most 4: then a head's outputs are one CTA's.
///
/// While there is an SM for each CTA, as many as fit. With more, a CTA reads what it has at no more
/// than a 350th of the memory's speed (four warps, three pages in flight), all are there at once,
/// and the step takes as long as the longest. Smaller pieces come one after the other and keep the
/// SMs full, but each costs 2 us at its ends. Where which is quicker: an H200 (docs/kernels.md).
inline int step_attention_split(int sequences, int kv_heads, int pages, bool uneven, int num_sms) {
  const int items = sequences * kv_heads;
  for (const int split : {8, 4, 2}) {
    if (items * split <= num_sms) return split;
  }
  if (items > 2 * num_sms && items <= 3 * num_sms && pages >= 40) return 4;
  if (uneven)
    return pages >= (items > num_sms ? 56 : 48) ? 4 : pages >= 32 && items > num_sms ? 2 : 1;
  return items > 3 * num_sms && 2 * items <= 7 * num_sms && pages >= 64 ? 2 : 1;
}

}  // namespace nibble::cuda
