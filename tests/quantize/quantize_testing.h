// Scratch directories and made-up calibration data for the tests of this floor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <random>
#include <vector>

#include "formats/testing.h"
#include "quantize/calibration.h"

namespace nibble::testing_ {

using ScratchDirectory = TemporaryDirectory;

inline CalibrationData random_calibration(std::vector<size_t> lengths, int vocab = 320) {
  CalibrationData data;
  std::mt19937 random(3);
  for (const size_t length : lengths) {
    auto& sequence = data.sequences.emplace_back();
    for (size_t i = 0; i < length; ++i)
      sequence.push_back(static_cast<int32_t>(random() % static_cast<unsigned>(vocab)));
    data.tokens += static_cast<int64_t>(length);
  }
  return data;
}

}  // namespace nibble::testing_
