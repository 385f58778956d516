// A model with tied embeddings, seen with an lm_head of its own (the embedding's values): what an
// lm_head that is to be quantized is made from, because the embedding stays dense.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "formats/weight_source.h"

namespace nibble {

class UntiedSource final : public WeightSource {
 public:
  /// `tied` must outlive it.
  explicit UntiedSource(const WeightSource& tied) : tied_(tied), spec_(tied.spec()) {
    spec_.tied_embeddings = false;
    embedding_ = weight_table(spec_).front();
  }

  const ModelSpec& spec() const override { return spec_; }
  bool is_quantized(const WeightRow& row) const override { return tied_.is_quantized(in(row)); }
  std::vector<float> load_dense(const WeightRow& row) const override {
    return tied_.load_dense(in(row));
  }
  TensorView view_dense(const WeightRow& row, std::vector<std::byte>& storage) const override {
    return tied_.view_dense(in(row), storage);
  }
  Int4Weight load_int4(const WeightRow& row) const override { return tied_.load_int4(in(row)); }
  std::optional<KvScales> kv_scales() const override { return tied_.kv_scales(); }
  void release(const WeightRow& row) const override { tied_.release(in(row)); }
  std::vector<std::string> notices() const override { return tied_.notices(); }

 private:
  const WeightRow& in(const WeightRow& row) const {
    return row.role == WeightRole::kLmHead ? embedding_ : row;
  }

  const WeightSource& tied_;
  ModelSpec spec_;
  WeightRow embedding_{};
};

}  // namespace nibble
