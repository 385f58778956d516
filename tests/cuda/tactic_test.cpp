// Names of the int4 kernels in engines: every kernel has one of its own, which leads back to it.
// And what K2's rule gives for any shape: the kernel's assumptions about its grid hold.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/tactic.h"

#include <gtest/gtest.h>

#include <set>

#include "backends/cuda/attention_split.h"
#include "backends/cuda/wgmma_tactic.h"

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

void expect_sound(const LinearArgs& args, const WgmmaTactic& rule) {
  const auto name = [&] {
    return fmt::format("{} x {}, {} tokens, {} SMs, in order {}: {}", args.rows, args.k,
                       args.tokens, args.num_sms, args.in_order, rule.encode());
  };
  const WgmmaTactic t = wgmma_fit(args, rule);
  ASSERT_EQ(WgmmaTactic::decode(t.encode()).encode(), t.encode()) << name();
  // Warpgroups: one or two to a block, and only four fuse norms or share the k of 64 rows.
  ASSERT_TRUE(t.warpgroups == t.row_blocks || (t.warpgroups == 4 && t.row_blocks == 2)) << name();
  ASSERT_TRUE(t.warpgroups == 4 || args.in_order || args.tokens > kMaxNormTokens) << name();
  ASSERT_TRUE(t.row_blocks > 1 || t.split == 1) << name();
  const int64_t tiles128 = (args.rows + 127) / 128;
  ASSERT_EQ(tiles128 * 2 % (t.row_blocks * t.cluster), 0) << name();
  ASSERT_TRUE(!args.in_order || t.in_order(args.k)) << name();

  const WgmmaShares s = wgmma_shares(args, t);
  ASSERT_GE(s.split, 1) << name();
  ASSERT_EQ(s.clusters % s.split, 0) << name();
  ASSERT_LE(s.clusters * t.cluster, args.num_sms) << name() << ": all resident at once";
  const int tile = wgmma_tile_tokens(args), octets = tile / 8 * t.row_blocks / t.warpgroups;
  const int64_t tiles = tiles128 * 2 / t.row_blocks / t.cluster * ((args.tokens + tile - 1) / tile);
  ASSERT_TRUE(s.split == 1 || tiles * s.split <= s.clusters || octets >= s.split)
      << name() << ": with many tiles each of the CTAs that share k owns sums";
  // Sums do not depend on the number of tokens: k is cut as wgmma_parts() says, by CTAs or in one.
  ASSERT_TRUE(!args.in_order || s.split * s.parts == wgmma_parts(args.k)) << name();
  ASSERT_TRUE(args.in_order || s.parts == 1) << name();
}

TEST(WgmmaTactic, EveryShapeHasASoundGrid) {
  int cases = 0;
  for (const int sms : {132, 114, 78, 16}) {
    for (const int rows : {8, 128, 136, 264, 1000, 2048, 5120, 6144, 28672, 65536, 131072}) {
      for (const int k : {8, 192, 4096, 5120, 16376, 16384, 16512, 32768, 53248}) {
        for (int tokens = 1; tokens < 6000; tokens += tokens < 400 ? 7 : 97) {
          LinearArgs args{};
          args.rows = rows;
          args.k = k;
          args.tokens = tokens;
          args.num_sms = sms;
          for (const bool in_order : {false, true}) {
            args.in_order = in_order;
            expect_sound(args, wgmma_tactic(args));
            ++cases;
          }
          args.in_order = false;
          for (const WgmmaTactic& t : wgmma_tactics(args)) expect_sound(args, t);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
  EXPECT_GT(cases, 50000);
}

// For a 24B's qkv, o, gate_up and down what was fastest on an H200, or as fast (docs/kernels.md).
TEST(WgmmaTile, IsWhatWasMeasured) {
  const auto tile = [](int rows, int k, int tokens) {
    LinearArgs args{};
    args.rows = rows;
    args.k = k;
    args.tokens = tokens;
    args.num_sms = 132;
    return wgmma_tile_tokens(args);
  };
  EXPECT_EQ(tile(6144, 5120, 17), 32);
  EXPECT_EQ(tile(6144, 5120, 64), 64);
  EXPECT_EQ(tile(65536, 5120, 65), 80);
  EXPECT_EQ(tile(65536, 5120, 90), 96);
  EXPECT_EQ(tile(65536, 5120, 100), 112);
  EXPECT_EQ(tile(65536, 5120, 128), 128);
  EXPECT_EQ(tile(65536, 5120, 160), 80);
  // 500 new tokens of a turn, alone and with those that are drawn meanwhile.
  EXPECT_EQ(tile(6144, 5120, 512), 112);  // one turn either way
  EXPECT_EQ(tile(65536, 5120, 512), 128);
  EXPECT_EQ(tile(6144, 5120, 545), 112);
  EXPECT_EQ(tile(5120, 4096, 545), 96);
  EXPECT_EQ(tile(65536, 5120, 545), 112);
  EXPECT_EQ(tile(5120, 32768, 545), 96);
  EXPECT_EQ(tile(65536, 5120, 2048), 128);
}

// What was measured on an H200 (8 KV heads, pages of 64 tokens; docs/kernels.md).
TEST(StepAttentionSplit, IsWhatWasMeasured) {
  const auto split = [](int sequences, int pages, bool uneven) {
    return step_attention_split(sequences, 8, pages, uneven, 132);
  };
  for (const bool uneven : {false, true}) {
    EXPECT_EQ(split(1, 88, uneven), 8);
    EXPECT_EQ(split(8, 88, uneven), 2);
    EXPECT_EQ(split(40, 88, uneven), 4);
    EXPECT_EQ(split(64, 16, uneven), 1);
  }
  EXPECT_EQ(split(16, 88, false), 1);
  EXPECT_EQ(split(16, 88, true), 4);
  EXPECT_EQ(split(24, 88, false), 1);
  EXPECT_EQ(split(24, 88, true), 4);
  EXPECT_EQ(split(24, 48, true), 2);
  EXPECT_EQ(split(57, 88, false), 2);
  EXPECT_EQ(split(64, 88, false), 1);
  EXPECT_EQ(split(64, 88, true), 4);
}

// Kernels exist for these, and a head's outputs are one CTA's where they are rounded.
TEST(StepAttentionSplit, HasAKernel) {
  for (const int num_sms : {60, 78, 114, 132}) {
    for (int sequences = 1; sequences <= 130; ++sequences) {
      for (const int kv_heads : {1, 2, 8, 12}) {
        for (int pages = 1; pages <= 2048; pages += 5) {
          for (const bool uneven : {false, true}) {
            const int split = step_attention_split(sequences, kv_heads, pages, uneven, num_sms);
            EXPECT_TRUE(split == 1 || split == 2 || split == 4 || split == 8);
            if (2 * sequences * kv_heads > num_sms) {
              EXPECT_LE(split, 4);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cuda
