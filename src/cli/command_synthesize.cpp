// synthesize: random weights at a real model's size, for measuring the path from quantize on.
// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <chrono>

#include "base/error.h"
#include "base/thread_pool.h"
#include "build/tokenizer_files.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "formats/inspect.h"
#include "formats/synthetic.h"
#include "text/tokenizer.h"

namespace nibble::cli {

int run_synthesize(const SynthesizeFlags& flags) {
  const SyntheticShape& shape = synthetic_shape(flags.shape);
  ModelSpec spec = shape.spec;
  if (flags.layers > 0) spec.num_layers = flags.layers;
  if (!flags.tokenizer.empty()) {
    const int vocab = Tokenizer::load(flags.tokenizer).vocab_size();
    if (vocab > spec.vocab_size) {
      fail(ErrorKind::kInput, "{} has {} tokens, {} has embeddings for {}; wanted no more",
           flags.tokenizer, vocab, flags.shape, spec.vocab_size);
    }
  }
  const auto start = std::chrono::steady_clock::now();
  ThreadPool pool(flags.threads);
  write_synthetic_hf(flags.out, spec, flags.seed,
                     flags.shards > 0 ? flags.shards : shape.num_shards, pool);
  if (!flags.tokenizer.empty()) copy_tokenizer_files(flags.tokenizer, flags.out);
  uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(flags.out)) bytes += entry.file_size();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print("wrote {}: {} of random bf16 weights, {} layers, in {} ({:.2f} GB/s)\n", flags.out,
             human_bytes(bytes), spec.num_layers, human_duration(seconds),
             static_cast<double>(bytes) * 1e-9 / seconds);
  return 0;
}

}  // namespace nibble::cli
