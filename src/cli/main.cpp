// SPDX-License-Identifier: Apache-2.0
#include "cli/options.h"

int main(int argc, char** argv) { return nibble::cli::main(argc, argv); }
