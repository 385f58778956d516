// Ctrl-C: main's signal handler sets one flag; long work calls throw_if_interrupted() at its
// natural steps, so that destructors remove temporaries. Only the CLI installs the handler.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace nibble {

void request_interrupt() noexcept;  // async-signal-safe
void clear_interrupt() noexcept;
bool interrupt_requested() noexcept;
void throw_if_interrupted();  // throws Error{kInterrupted}

}  // namespace nibble
