// nibble_outlier_model HF_DIR OUT [SEED]: see outlier_model.h. bench/quality measures what it
// makes. SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <cstdlib>

#include "base/error.h"
#include "quantize/outlier_model.h"

int main(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::fprintf(stderr, "usage: nibble_outlier_model HF_DIR OUT [SEED]\n");
    return 2;
  }
  try {
    nibble::testing_::write_outlier_model(argv[1], argv[2],
                                          argc == 4 ? std::strtoull(argv[3], nullptr, 10) : 1);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "nibble_outlier_model: %s\n", error.what());
    return 1;
  }
  return 0;
}
