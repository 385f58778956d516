// Ctrl-C: main's signal handler sets one flag; long work calls throw_if_interrupted() at its
// natural steps, so that destructors remove temporaries. Only the CLI installs the handler.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace nibble {

void request_interrupt() noexcept;  // async-signal-safe
void clear_interrupt() noexcept;
bool interrupt_requested() noexcept;
/// SIGHUP: read keys, certificates and logs again. `serve` asks; other commands die of it as usual.
void request_reload() noexcept;       // async-signal-safe
bool take_reload_request() noexcept;  // and clears it
void throw_if_interrupted();          // throws Error{kInterrupted}

}  // namespace nibble
