// SPDX-License-Identifier: Apache-2.0
#include "engine/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <random>

#include "base/error.h"

namespace nibble {
namespace {

constexpr int kBlock = 4;
using Tokens = std::vector<int32_t>;

uint64_t constant_hash(uint64_t, std::span<const int32_t>) { return 7; }
uint64_t weak_hash(uint64_t parent, std::span<const int32_t> tokens) {
  return (parent + static_cast<uint64_t>(tokens[0])) % 3;
}

/// A holder of blocks that writes tokens as a sequence does.
struct Writer {
  BlockPool& pool;
  int32_t root = -1;
  Tokens tokens;
  std::vector<int32_t> blocks;

  bool write(const Tokens& more) {
    for (const int32_t token : more) {
      if (tokens.size() % kBlock == 0) {
        const auto block = pool.allocate();
        if (!block) return false;
        blocks.push_back(*block);
      }
      tokens.push_back(token);
      const size_t i = blocks.size() - 1;
      blocks[i] = pool.publish(blocks[i], i == 0 ? root : blocks[i - 1],
                               std::span(tokens).subspan(i * kBlock));
    }
    return true;
  }
  void drop() {
    for (; !blocks.empty(); blocks.pop_back()) pool.release(blocks.back());
    tokens.clear();
  }
};

std::vector<int32_t> acquire(BlockPool& pool, const Tokens& tokens, int32_t root = -1) {
  std::vector<int32_t> blocks;
  pool.acquire_prefix(root, tokens, blocks);
  return blocks;
}

void release(BlockPool& pool, std::vector<int32_t> blocks) {
  for (; !blocks.empty(); blocks.pop_back()) pool.release(blocks.back());
}

TEST(BlockPool, FullBlocksAreFoundOnceWrittenAndConfirmed) {
  BlockPool pool(8, kBlock);
  Writer writer{pool};
  writer.write({1, 2, 3});
  EXPECT_TRUE(acquire(pool, {1, 2, 3, 4}).empty());  // not full yet
  writer.write({4, 5, 6, 7, 8, 9});
  const auto found = acquire(pool, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});
  EXPECT_EQ(found, (std::vector<int32_t>{writer.blocks[0], writer.blocks[1]}));
  EXPECT_EQ(pool.ref_count(found[0]), 2);
  EXPECT_TRUE(acquire(pool, {1, 2, 3, 5, 5, 6, 7, 8}).empty());
  EXPECT_TRUE(acquire(pool, {5, 6, 7, 8}).empty());  // only after its parent
  release(pool, found);
  writer.drop();
  EXPECT_EQ(pool.num_used(), 0);
  EXPECT_EQ(pool.num_cached(), 3);
  pool.check_invariants();
}

TEST(BlockPool, CollidingHashesNeverMixPrefixes) {
  BlockPool pool(16, kBlock, constant_hash);
  Writer a{pool}, b{pool}, c{pool};
  a.write({1, 2, 3, 4, 5, 6, 7, 8});
  b.write({9, 9, 9, 9, 5, 6, 7, 8});
  c.write({5, 6, 7, 8, 5, 6, 7, 8});
  for (const Writer* writer : {&a, &b, &c}) {
    const auto found = acquire(pool, writer->tokens);
    EXPECT_EQ(found, writer->blocks);
    release(pool, found);
  }
  EXPECT_TRUE(acquire(pool, {1, 2, 3, 5}).empty());
  EXPECT_EQ(acquire(pool, {1, 2, 3, 4, 9, 9, 9, 9}), (std::vector<int32_t>{a.blocks[0]}));
  release(pool, {a.blocks[0]});
  pool.check_invariants();
}

TEST(BlockPool, SaltsAreSeparateAndForgotten) {
  for (const auto hash : {BlockPool::default_hash, constant_hash}) {
    BlockPool pool(8, kBlock, hash);
    const int32_t alice = pool.intern_salt("alice"), bob = pool.intern_salt("bob");
    EXPECT_NE(alice, bob);
    Writer writer{pool, alice};
    writer.write({1, 2, 3, 4, 5, 6});
    EXPECT_TRUE(acquire(pool, {1, 2, 3, 4}, bob).empty());
    EXPECT_TRUE(acquire(pool, {1, 2, 3, 4}).empty());
    EXPECT_EQ(pool.find_partial(bob, Tokens{1, 2}).block, -1);
    EXPECT_EQ(pool.find_partial(alice, Tokens{1, 2}).num_tokens, 2);
    writer.drop();
    pool.release_salt(alice);
    pool.release_salt(bob);
    EXPECT_EQ(pool.num_salts(), 2u);  // "" and alice, whose blocks are cached
    EXPECT_EQ(pool.intern_salt("alice"), alice);
    EXPECT_EQ(acquire(pool, {1, 2, 3, 4}, alice).size(), 1u);
    for (int i = 0; i < 7; ++i) (void)pool.allocate();  // bob's turn: all but the block alice holds
    pool.check_invariants();
    pool.release_salt(alice);
    EXPECT_EQ(pool.num_salts(), 2u);
  }
}

TEST(BlockPool, TwinsBecomeOne) {
  BlockPool pool(8, kBlock);
  Writer a{pool}, b{pool};
  a.write({1, 2, 3});
  b.write({1, 2, 3});
  EXPECT_NE(a.blocks[0], b.blocks[0]);
  a.write({4});
  b.write({4});
  EXPECT_EQ(a.blocks, b.blocks);
  EXPECT_EQ(pool.num_used(), 1);
  b.write({5, 6});
  a.write({5, 7});
  pool.check_invariants();
  a.drop();
  b.drop();
  EXPECT_EQ(pool.num_used(), 0);
  EXPECT_EQ(pool.num_cached(), 3);
  pool.check_invariants();
}

TEST(BlockPool, SeveralBranchesStay) {
  BlockPool pool(16, kBlock);
  Writer writer{pool};
  for (int branch = 0; branch < 4; ++branch) {
    writer.write({1, 2, 3, 4});
    for (int i = 0; i < 6; ++i) writer.write({10 * branch + i});
    writer.drop();
  }
  for (int branch = 0; branch < 4; ++branch) {
    const Tokens prefix = {
        1, 2, 3, 4, 10 * branch, 10 * branch + 1, 10 * branch + 2, 10 * branch + 3};
    const auto found = acquire(pool, prefix);
    ASSERT_EQ(found.size(), 2u);
    EXPECT_EQ(pool.find_partial(found[1], Tokens{10 * branch + 4, 10 * branch + 5, 99}).num_tokens,
              2);
    release(pool, found);
  }
  pool.check_invariants();
}

TEST(BlockPool, PartialMatchTakesTheLongestAndAdoptsOnlyWhatIsWhole) {
  BlockPool pool(8, kBlock);
  Writer a{pool}, b{pool};
  a.write({1, 2, 3, 4});
  b.write({1, 2, 9});
  EXPECT_EQ(pool.find_partial(-1, Tokens{1, 2, 9, 9}).block, b.blocks[0]);
  EXPECT_EQ(pool.find_partial(-1, Tokens{1, 2, 3, 9}).block, a.blocks[0]);
  EXPECT_EQ(pool.find_partial(-1, Tokens{2}).block, -1);
  EXPECT_FALSE(pool.adopt(b.blocks[0], 3));  // held
  const int32_t block = b.blocks[0];
  b.drop();
  EXPECT_FALSE(pool.adopt(block, 2));        // more content than matched
  EXPECT_FALSE(pool.adopt(a.blocks[0], 4));  // full
  ASSERT_TRUE(pool.adopt(block, 3));
  EXPECT_EQ(pool.publish(block, -1, Tokens{1, 2, 9, 8}), block);
  EXPECT_EQ(acquire(pool, {1, 2, 9, 8}).size(), 1u);
  pool.check_invariants();
}

TEST(BlockPool, LeastRecentlyUsedGoesFirstLeavesBeforeParents) {
  BlockPool pool(4, kBlock);
  Writer a{pool}, b{pool};
  a.write({1, 1, 1, 1, 2, 2, 2, 2});
  b.write({3, 3, 3, 3, 4, 4, 4, 4});
  const auto a_blocks = a.blocks, b_blocks = b.blocks;
  a.drop();
  b.drop();
  release(pool, acquire(pool, {1, 1, 1, 1, 2, 2, 2, 2}));  // a is younger now
  EXPECT_EQ(pool.allocate(), b_blocks[1]);
  pool.check_invariants();
  EXPECT_EQ(pool.allocate(), b_blocks[0]);
  EXPECT_EQ(pool.allocate(), a_blocks[1]);
  EXPECT_EQ(acquire(pool, {1, 1, 1, 1, 2, 2, 2, 2}), (std::vector<int32_t>{a_blocks[0]}));
  EXPECT_EQ(pool.allocate(), std::nullopt);
  pool.check_invariants();
}

TEST(BlockPool, MisuseIsCaught) {
  BlockPool pool(4, kBlock);
  Writer a{pool}, b{pool};
  a.write({1, 2, 3, 4});
  EXPECT_THROW((void)pool.publish(a.blocks[0], -1, Tokens{1, 2, 3, 4}), Error);  // nothing new
  b.write({1, 2, 3, 4});
  EXPECT_EQ(pool.ref_count(a.blocks[0]), 2);
  a.drop();
  b.drop();
  EXPECT_THROW(pool.release(0), Error);
}

/// Writers come, match, copy, write, leave; a model of "which prefixes have been written" says what
/// a hit may be.
struct NumFound {
  int full = 0, partial = 0;
};

void random_operations(uint32_t seed, BlockPool::HashFn hash, NumFound* found) {
  std::mt19937 random(seed);
  const auto pick = [&](int n) { return static_cast<int>(random() % n); };
  const int num_blocks = 3 + pick(20);
  BlockPool pool(num_blocks, kBlock, hash);
  struct Live {
    Writer writer;
    std::string salt;
  };
  std::list<Live> live;
  std::vector<Tokens> content(
      num_blocks);  // what each block really holds: prefix through its last token
  const auto check_content = [&](const Writer& w, size_t i, size_t num_tokens) {
    const Tokens expected(w.tokens.begin(), w.tokens.begin() + i * kBlock + num_tokens);
    ASSERT_GE(content[w.blocks[i]].size(), expected.size());
    ASSERT_TRUE(std::equal(expected.begin(), expected.end(), content[w.blocks[i]].begin()));
  };
  for (int step = 0; step < 1500; ++step) {
    const int what = pick(10);
    if (what < 3 && live.size() < 6) {
      Live item{Writer{pool}, std::string(pick(2), 'x')};
      Writer& w = item.writer;
      w.root = pool.intern_salt(item.salt);
      Tokens wanted;
      for (int i = pick(14); i >= 0; --i) wanted.push_back(pick(3) == 0);
      const int num_full = pool.acquire_prefix(w.root, wanted, w.blocks);
      w.tokens.assign(wanted.begin(), wanted.begin() + num_full * kBlock);
      for (int i = 0; i < num_full; ++i, ++found->full) check_content(w, i, kBlock);
      const int32_t parent = num_full ? w.blocks.back() : w.root;
      const auto partial = pool.find_partial(parent, std::span(wanted).subspan(num_full * kBlock));
      if (partial.num_tokens > 0) {
        const int32_t source = partial.block;
        if (pool.adopt(source, partial.num_tokens)) {
          w.blocks.push_back(source);
        } else if (const auto block = pool.allocate()) {
          content[*block] = content[source];  // the copy
          w.blocks.push_back(*block);
        }
        if (static_cast<int>(w.blocks.size()) > num_full) {
          const auto begin = wanted.begin() + num_full * kBlock;
          w.tokens.insert(w.tokens.end(), begin, begin + partial.num_tokens);
          check_content(w, num_full, partial.num_tokens);
          ++found->partial;
        }
      }
      live.push_back(std::move(item));
    } else if (what < 8 && !live.empty()) {
      Writer& w = std::next(live.begin(), pick(static_cast<int>(live.size())))->writer;
      const int32_t token = pick(3) == 0;
      if (w.tokens.size() < 24 && (w.tokens.size() % kBlock != 0 || pool.num_available() > 0)) {
        // What the device would do: the row is written where the table points before it is
        // published.
        if (w.tokens.size() % kBlock == 0) {
          const auto block = pool.allocate();
          ASSERT_TRUE(block);
          w.blocks.push_back(*block);
        }
        w.tokens.push_back(token);
        const size_t i = w.blocks.size() - 1;
        ASSERT_EQ(pool.ref_count(w.blocks[i]), 1);
        content[w.blocks[i]] = w.tokens;
        w.blocks[i] = pool.publish(w.blocks[i], i == 0 ? w.root : w.blocks[i - 1],
                                   std::span(w.tokens).subspan(i * kBlock));
        for (size_t b = 0; b < w.blocks.size(); ++b) {
          check_content(w, b, std::min<size_t>(kBlock, w.tokens.size() - b * kBlock));
        }
      }
    } else if (!live.empty()) {
      const auto item = std::next(live.begin(), pick(static_cast<int>(live.size())));
      item->writer.drop();
      pool.release_salt(item->writer.root);
      live.erase(item);
    }
    ASSERT_NO_THROW(pool.check_invariants());
    std::vector<int> holders(num_blocks, 0);
    for (const Live& item : live) {
      for (const int32_t block : item.writer.blocks) ++holders[block];
    }
    for (int block = 0; block < num_blocks; ++block)
      ASSERT_EQ(pool.ref_count(block), holders[block]);
    ASSERT_EQ(pool.num_used(), std::ranges::count_if(holders, [](int n) { return n > 0; }));
  }
}

TEST(BlockPool, RandomOperations) {
  NumFound found;
  for (uint32_t seed = 0; seed < 30; ++seed) {
    random_operations(seed, BlockPool::default_hash, &found);
  }
  EXPECT_GT(found.full, 1000);
  EXPECT_GT(found.partial, 1000);
}

TEST(BlockPool, RandomOperationsUnderCollisions) {
  NumFound found;
  for (uint32_t seed = 100; seed < 115; ++seed) random_operations(seed, weak_hash, &found);
  for (uint32_t seed = 200; seed < 215; ++seed) random_operations(seed, constant_hash, &found);
  EXPECT_GT(found.full, 1000);
  EXPECT_GT(found.partial, 1000);
}

}  // namespace
}  // namespace nibble
