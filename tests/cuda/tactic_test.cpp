// Names of the int4 kernels in engines: every kernel has one of its own, which leads back to it.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/tactic.h"

#include <gtest/gtest.h>

#include <set>

namespace nibble::cuda {
namespace {

TEST(LinearKernel, NamesLeadBackToTheKernel) {
  std::set<std::string> names;
  for (const LinearKernel& kernel : all_linear_kernels()) {
    EXPECT_TRUE(names.insert(kernel.name()).second) << kernel.name() << " is two kernels";
    EXPECT_EQ(linear_kernel_of(kernel.name()), kernel) << kernel.name();
  }
  EXPECT_EQ(names.size(), 3u * 2 + 2u + 3u * 2 * 8);
}

TEST(LinearKernel, NamesSayWhatTheNumbersMean) {
  EXPECT_EQ((LinearKernel{.small = false, .tactic = 421, .early = 0}).name(),
            "wgmma 256 rows cluster 2 split 1");
  EXPECT_EQ((LinearKernel{.small = false, .tactic = 213, .early = 0}).name(),
            "wgmma 128 rows cluster 1 split 3");
  EXPECT_EQ((LinearKernel{.small = false, .tactic = 1121, .early = 0}).name(),
            "wgmma 64 rows cluster 2 split 1 warpgroups 1");
  EXPECT_EQ((LinearKernel{.small = true, .tactic = 0, .early = 1}).name(),
            "small 64 rows whole early 1");
  EXPECT_EQ((LinearKernel{.small = true, .tactic = 2, .early = 2}).name(),
            "small 128 rows shared early 2");
}

TEST(LinearKernel, OtherNamesAreNone) {
  for (const char* name :
       {"", "wgmma", "small", "wgmma 256 rows cluster 2 split 9",
        "wgmma 192 rows cluster 1 split 1", "wgmma 64 rows cluster 1 split 1",
        "wgmma 64 rows cluster 1 split 2 warpgroups 1",
        "wgmma 256 rows cluster 1 split 1 warpgroups 4", "wgmma 256 rows cluster 3 split 1",
        "small 128 rows whole early 1", "small 64 rows whole early 3",
        "small 64 rows whole early 1 ", "Wgmma 256 rows cluster 2 split 1"}) {
    EXPECT_EQ(linear_kernel_of(name), std::nullopt) << name;
  }
}

TEST(LinearKernel, KnowsHowManyRowsItTakes) {
  const auto takes = [](const char* name, int rows) {
    return linear_kernel_of(name).value().takes(rows);
  };
  EXPECT_TRUE(takes("small 128 rows shared early 1", 8));
  EXPECT_FALSE(takes("small 128 rows shared early 1", 9));
  EXPECT_TRUE(takes("small 64 rows shared early 1", 8));
  EXPECT_FALSE(takes("small 64 rows shared early 1", 9));
  EXPECT_FALSE(takes("wgmma 128 rows cluster 1 split 1", 8));
  EXPECT_TRUE(takes("wgmma 128 rows cluster 1 split 1", 9));
  EXPECT_FALSE(takes("wgmma 64 rows cluster 1 split 1 warpgroups 1", 64));
  EXPECT_TRUE(takes("wgmma 64 rows cluster 1 split 1 warpgroups 1", 65));
}

// Whose tokens can have bits that do not depend on how many there are.
TEST(LinearKernel, KnowsWhetherItAddsInOrder) {
  const auto in_order = [](const char* name, int64_t k = 4096) {
    return linear_kernel_of(name).value().in_order(k);
  };
  EXPECT_TRUE(in_order("wgmma 64 rows cluster 1 split 1 warpgroups 1"));
  EXPECT_TRUE(in_order("wgmma 128 rows cluster 2 split 1 warpgroups 2"));
  EXPECT_TRUE(in_order("wgmma 256 rows cluster 2 split 1"));
  EXPECT_TRUE(in_order("wgmma 256 rows cluster 2 split 1", 32768));
  EXPECT_FALSE(in_order("wgmma 256 rows cluster 2 split 3"));
  EXPECT_TRUE(in_order("wgmma 256 rows cluster 2 split 3", 32768));
  EXPECT_TRUE(in_order("wgmma 128 rows cluster 2 split 3 warpgroups 2", 32768));
  EXPECT_FALSE(in_order("wgmma 128 rows cluster 2 split 3", 32768));
  EXPECT_FALSE(in_order("wgmma 256 rows cluster 2 split 2", 32768));
  EXPECT_FALSE(in_order("wgmma 128 rows cluster 1 split 1"));
  EXPECT_FALSE(in_order("small 64 rows whole early 1"));
}

}  // namespace
}  // namespace nibble::cuda
