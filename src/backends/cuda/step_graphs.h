// Steps recorded as graphs. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <unordered_map>

#include "backends/cuda/device_memory.h"

namespace nibble::cuda {

class StepGraphs {
 public:
  /// `moves`: how often scratch memory has moved; a recorded graph holds its old address.
  StepGraphs(void* stream, const uint64_t* moves) : stream_(stream), moves_(moves) {}
  StepGraphs(const StepGraphs&) = delete;
  StepGraphs& operator=(const StepGraphs&) = delete;
  ~StepGraphs() { clear(); }

  /// The first step of a key runs directly, so that every scratch buffer has its size; the second
  /// is recorded, and from then on replayed. A key that comes once, as most do while prompts are
  /// read, costs no graph.
  void run(uint64_t key, const std::function<void()>& step) {
    if (*moves_ != recorded_moves_ || graphs_.size() > kMaxGraphs) {
      check(stream_sync(stream_), "waiting for the stream");
      clear();
      recorded_moves_ = *moves_;
    }
    auto [it, is_new] = graphs_.try_emplace(key, nullptr);
    if (is_new) {
      step();
      return;
    }
    if (it->second == nullptr) {
      check(capture_begin(stream_), "beginning a graph");
      try {
        step();
      } catch (...) {
        void* unfinished = nullptr;
        capture_end(stream_, &unfinished);
        if (unfinished != nullptr) graph_destroy(unfinished);
        throw;
      }
      check(capture_end(stream_, &it->second), "ending a graph");
    }
    check(graph_launch(it->second, stream_), "launching a graph");
  }

  void clear() {
    for (const auto& [key, graph] : graphs_) {
      if (graph != nullptr) graph_destroy(graph);
    }
    graphs_.clear();
  }

 private:
  static constexpr size_t kMaxGraphs = 256;

  void* const stream_;
  const uint64_t* const moves_;
  uint64_t recorded_moves_ = 0;
  std::unordered_map<uint64_t, void*> graphs_;  // null: seen once
};

}  // namespace nibble::cuda
