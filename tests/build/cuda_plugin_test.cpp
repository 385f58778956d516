// What is said of a GPU that nobody uses. Opening plugins: tests/cuda_op, on a GPU.
// SPDX-License-Identifier: Apache-2.0
#include "build/cuda_plugin.h"

#include "formats/testing.h"

namespace nibble {
namespace {

using testing::HasSubstr;

TEST(UnusedGpu, IsNamedBesideACpuTargetOnly) {
  const testing_::TemporaryDirectory dir;
  const fs::path gpus = dir / "gpus";
  EXPECT_EQ(unused_gpu("cpu:avx2", gpus), std::nullopt) << "no driver";
  fs::create_directories(gpus / "0000:04:00.0");
  EXPECT_EQ(unused_gpu("cpu:avx2", gpus), std::nullopt) << "nothing known of it";
  write_file_atomically(gpus / "0000:04:00.0" / "information",
                        "IRQ:   \t 60\nModel: \t\t NVIDIA H200\nGPU UUID: \t GPU-1\n");
  const auto said = unused_gpu("cpu:avx2", gpus);
  ASSERT_TRUE(said);
  EXPECT_THAT(*said, HasSubstr("target cpu:avx2 does not use it: NVIDIA H200; --target cuda:"));
  EXPECT_EQ(unused_gpu("cuda:sm_90", gpus), std::nullopt);
  EXPECT_EQ(unused_gpu("ref", gpus), std::nullopt);
}

}  // namespace
}  // namespace nibble
