// SPDX-License-Identifier: Apache-2.0
#include "base/interrupt.h"

#include <atomic>

#include "base/error.h"

namespace nibble {
namespace {
std::atomic<bool> interrupted{false}, reload{false};
static_assert(std::atomic<bool>::is_always_lock_free);
}  // namespace

void request_interrupt() noexcept { interrupted.store(true, std::memory_order_relaxed); }
void clear_interrupt() noexcept { interrupted.store(false, std::memory_order_relaxed); }
bool interrupt_requested() noexcept { return interrupted.load(std::memory_order_relaxed); }
void request_reload() noexcept { reload.store(true, std::memory_order_relaxed); }
bool take_reload_request() noexcept { return reload.exchange(false, std::memory_order_relaxed); }
void throw_if_interrupted() {
  if (interrupt_requested())
    fail(ErrorKind::kInterrupted, "interrupted; nothing half-written was left behind");
}

}  // namespace nibble
