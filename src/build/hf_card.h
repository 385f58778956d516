// The front matter of a Hugging Face model card (README.md): the few fields nibble passes on or
// warns by. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

#include "base/file.h"

namespace nibble {

struct HfCard {
  std::string license, license_name, license_link;  // empty: not said
  std::vector<std::string> languages, base_models;
};

/// Of `model_dir`/README.md; empty fields when there is no card or it does not say. Reads `key:
/// value`, `key: [a, b]` and `- item` lists, which is what cards hold; anything else is skipped.
HfCard read_hf_card(const fs::path& model_dir);

}  // namespace nibble
