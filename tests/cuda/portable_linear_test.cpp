// The portable int4 linear on the CPU: its index functions, walked as the kernel walks them, with
// ldmatrix and mma.m16n8k16 done element by element as the PTX ISA describes them. Small integers,
// so that every sum is exact.
// SPDX-License-Identifier: Apache-2.0
#include "backends/cuda/portable/linear_index.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <vector>

namespace nibble::cuda::portable {
namespace {

struct Problem {
  cuda_layout::Shape shape;
  int tokens;
  bool silu;
  int num_sms;  // decides parts and split
  std::vector<uint8_t> packed;
  std::vector<float> x;      // [tokens, k]
  std::vector<double> want;  // [tokens, rows]: source rows; [tokens, rows / 2] with silu
};

double silu(double v) { return v / (1 + std::exp(-v)); }

Problem make_problem(int rows, int k, int tokens, bool with_silu, int num_sms) {
  Problem p{{rows, k}, tokens, with_silu, num_sms, {}, {}, {}};
  std::mt19937 rng(static_cast<unsigned>(rows * 131 + k * 7 + tokens));
  const auto r = static_cast<size_t>(rows), kk = static_cast<size_t>(k),
             m = static_cast<size_t>(tokens), groups = static_cast<size_t>(p.shape.num_groups());
  std::vector<uint8_t> nibbles(r * kk / 2);
  for (auto& byte : nibbles) byte = static_cast<uint8_t>(rng());
  std::vector<float> scales(r * groups);
  for (auto& scale : scales) scale = std::ldexp(1.0f, static_cast<int>(rng() % 3) - 12);
  p.packed.resize(static_cast<size_t>(p.shape.packed_bytes()));
  cuda_layout::pack(p.shape, with_silu, nibbles.data(), scales.data(), p.packed.data());
  p.x.resize(m * kk);
  for (auto& v : p.x) v = static_cast<float>(static_cast<int>(rng() % 9) - 4);
  std::vector<double> product(m * r);
  for (size_t token = 0; token < m; ++token)
    for (size_t row = 0; row < r; ++row) {
      double sum = 0;
      for (size_t i = 0; i < kk; ++i) {
        const int u = nibbles[row * (kk / 2) + i / 2] >> (i % 2 * 4) & 15;
        sum += double{p.x[token * kk + i]} * ((u ^ 8) - 8) * double{scales[row * groups + i / 128]};
      }
      product[token * r + row] = sum;
    }
  if (!with_silu) {
    p.want = product;
  } else {
    for (size_t token = 0; token < m; ++token)
      for (size_t c = 0; c < r / 2; ++c)
        p.want.push_back(silu(product[token * r + c]) * product[token * r + r / 2 + c]);
  }
  return p;
}

float bf16_value(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

// A 32-bit register of two 16-bit values.
struct Pair {
  float low, high;
};

// One warp's ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8, and gets of every
// matrix the pair at row l / 4, columns 2 * (l % 4).
void ldmatrix_x4(const std::vector<uint8_t>& stage, const int (&address)[32], Pair (&out)[32][4]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int at = address[matrix * 8 + lane / 4] + lane % 4 * 4;
      EXPECT_EQ(address[matrix * 8 + lane / 4] % 16, 0);
      uint16_t bits[2];
      std::memcpy(bits, stage.data() + at, 4);
      out[lane][matrix] = {bf16_value(bits[0]), bf16_value(bits[1])};
    }
}

// d += a b for a warp, m16n8k16: fragments as the PTX ISA lays them out.
void mma(double (&d)[32][4], const Pair (&a)[32][4], const Pair (&b)[32][4], int b_first) {
  double full_a[16][16], full_b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {  // a0: (g, 2t), a1: (g + 8, 2t), a2: (g, 2t + 8), a3: both
      const int row = g + 8 * (i & 1), k = 2 * t + 8 * (i >> 1);
      full_a[row][k] = double{a[lane][i].low};
      full_a[row][k + 1] = double{a[lane][i].high};
    }
    for (int i = 0; i < 2; ++i) {  // b0: (k 2t, n g), b1: (k 2t + 8, n g)
      full_b[2 * t + 8 * i][g] = double{b[lane][b_first + i].low};
      full_b[2 * t + 8 * i + 1][g] = double{b[lane][b_first + i].high};
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {  // c0, c1: (g, 2t), (g, 2t + 1); c2, c3: row g + 8
      const int row = lane / 4 + 8 * (i / 2), n = 2 * (lane % 4) + i % 2;
      for (int k = 0; k < 16; ++k) d[lane][i] += full_a[row][k] * full_b[k][n];
    }
}

// dequant() of ptx/dequant.cuh: a word's nibbles by mask, times their row's scale.
void dequant(Pair (&a)[4], uint32_t word, float low_row, float high_row) {
  const auto pair = [&](uint32_t masked, int shift, float scale) {
    return Pair{(static_cast<float>(masked >> shift & 15u) - 8.0f) * scale,
                (static_cast<float>(masked >> (16 + shift) & 15u) - 8.0f) * scale};
  };
  const uint32_t upper = word >> 8;
  a[0] = pair(word & 0x000f000fu, 0, low_row);
  a[1] = pair(word & 0x00f000f0u, 4, high_row);
  a[2] = pair(upper & 0x000f000fu, 0, low_row);
  a[3] = pair(upper & 0x00f000f0u, 4, high_row);
}

// The copies of one stage, thread by thread: every byte once.
template <typename S>
std::vector<uint8_t> load_stage(const Problem& p, TileAt at, int group) {
  std::vector<uint8_t> stage(S::kStageBytes);
  std::vector<int> written(S::kStageBytes / 16);
  const int groups = static_cast<int>(p.shape.num_groups());
  for (int tid = 0; tid < kThreads; ++tid) {
    for (int i = tid; i < kWeightBytes / 16; i += kThreads) {
      const size_t from = (static_cast<size_t>(at.row_tile) * static_cast<size_t>(groups) +
                           static_cast<size_t>(group)) *
                              kWeightBytes +
                          static_cast<size_t>(i) * 16;
      EXPECT_LE(from + 16, p.packed.size());
      std::memcpy(stage.data() + i * 16, p.packed.data() + from, 16);
      ++written[static_cast<size_t>(i)];
    }
    for (int item = tid; item < S::kXChunks; item += kThreads) {
      const int token = item / (kSlab / 8), chunk = item % (kSlab / 8);
      const int k = group * kSlab + chunk * 8, row = at.token_tile * S::kTokens + token;
      const int to = x_byte<S>(token, chunk);
      EXPECT_EQ(to % 16, 0);
      ++written[static_cast<size_t>(to / 16)];
      for (int j = 0; j < 8; ++j) {
        const bool real = row < p.tokens && k < p.shape.k;
        const uint16_t bits =
            real ? cuda_layout::bf16_bits(p.x[static_cast<size_t>(row * p.shape.k + k + j)]) : 0;
        std::memcpy(stage.data() + to + 2 * j, &bits, 2);
      }
    }
  }
  for (const int count : written) EXPECT_EQ(count, 1);
  return stage;
}

// The kernel for every CTA; parts are walked in reverse to show that their order does not matter.
template <typename S>
void expect_product(const Problem& p) {
  const int row_tiles = static_cast<int>(p.shape.num_tiles());
  const int groups = static_cast<int>(p.shape.num_groups());
  const int token_tiles = (p.tokens + S::kTokens - 1) / S::kTokens;
  const int parts = choose_parts(row_tiles, groups, p.num_sms);
  const int columns = static_cast<int>(p.silu ? p.shape.rows / 2 : p.shape.rows);
  std::vector<double> out(static_cast<size_t>(p.tokens * columns),
                          std::numeric_limits<double>::quiet_NaN());
  std::vector<double> pieces(
      static_cast<size_t>(int64_t{row_tiles} * token_tiles * parts * S::kPieceFloats), 1e300);
  for (int index = 0; index < row_tiles * token_tiles; ++index) {
    const TileAt at = tile_at(index, row_tiles, token_tiles);
    for (int part = parts - 1; part >= 0; --part) {
      std::vector<double> acc(S::kVectors * kThreads * 4);
      for (int group = part_begin(groups, parts, part); group < part_begin(groups, parts, part + 1);
           ++group) {
        const std::vector<uint8_t> stage = load_stage<S>(p, at, group);
        for (int warp = 0; warp < kWarps; ++warp)
          for (int i = 0; i < S::kRowTiles; ++i)
            for (int j = 0; j < S::kTokenTiles; ++j) {
              double d[32][4] = {};
              for (int k64 = 0; k64 < 2; ++k64)
                for (int pair = 0; pair < 2; ++pair) {
                  Pair a[2][32][4], b[32][4];
                  int address[32];
                  for (int lane = 0; lane < 32; ++lane) {
                    const int tile = first_row_tile<S>(warp) + i;
                    uint16_t scales[2];
                    std::memcpy(scales, stage.data() + scale_byte(tile, lane), 4);
                    uint32_t words[4];
                    std::memcpy(words, stage.data() + words_byte(tile, k64, lane), 16);
                    for (int step = 0; step < 2; ++step)
                      dequant(a[step][lane], words[2 * pair + step], bf16_value(scales[0]),
                              bf16_value(scales[1]));
                    address[lane] =
                        operand_b_byte<S>(first_token_tile<S>(warp) + j, k64, pair, lane);
                  }
                  ldmatrix_x4(stage, address, b);
                  mma(d, a[0], b, 0);
                  mma(d, a[1], b, 2);
                }
              for (int lane = 0; lane < 32; ++lane)
                for (int e = 0; e < 4; ++e)
                  acc[static_cast<size_t>(
                      ((i * S::kTokenTiles + j) * kThreads + warp * 32 + lane) * 4 + e)] +=
                      d[lane][e];
            }
      }
      for (int vector = 0; vector < S::kVectors; ++vector)
        for (int thread = 0; thread < kThreads; ++thread)
          for (int e = 0; e < 4; ++e) {
            double& to =
                pieces[static_cast<size_t>(piece_place<S>(index, parts, part, vector, thread) + e)];
            ASSERT_EQ(to, 1e300);  // a place of its own
            to = acc[static_cast<size_t>((vector * kThreads + thread) * 4 + e)];
          }
    }
    std::vector<double> staged(static_cast<size_t>(S::kTokens * S::kSumStride),
                               std::numeric_limits<double>::quiet_NaN());
    for (int thread = 0; thread < kThreads; ++thread) {
      const int warp = thread / 32, lane = thread % 32;
      for (int i = 0; i < S::kRowTiles; ++i)
        for (int j = 0; j < S::kTokenTiles; ++j) {
          double sum[4] = {};
          for (int part = 0; part < parts; ++part)
            for (int e = 0; e < 4; ++e)
              sum[e] += pieces[static_cast<size_t>(
                  piece_place<S>(index, parts, part, i * S::kTokenTiles + j, thread) + e)];
          for (int e = 0; e < 4; ++e) {
            const int token = (first_token_tile<S>(warp) + j) * 8 + sum_token(lane, e);
            const int tile = first_row_tile<S>(warp) + i;
            if (!p.silu) {
              staged[static_cast<size_t>(sum_place<S>(token, tile * 16 + sum_row(lane, e)))] =
                  sum[e];
            } else if (e < 2) {
              staged[static_cast<size_t>(sum_place<S>(token, tile * 8 + sum_row(lane, e)))] =
                  silu(sum[e]) * sum[e + 2];
            }
          }
        }
    }
    const int width = p.silu ? kTileRows / 2 : kTileRows;
    for (int i = 0; i < S::kTokens * width / 2; ++i) {
      const int place = i / (width / 2), within = i % (width / 2) * 2;
      const int token = at.token_tile * S::kTokens + place, column = at.row_tile * width + within;
      if (token >= p.tokens || column >= columns) continue;
      for (int e = 0; e < 2; ++e) {
        double& to = out[static_cast<size_t>(token * columns + column + e)];
        ASSERT_TRUE(std::isnan(to));  // written once
        to = staged[static_cast<size_t>(sum_place<S>(place, within + e))];
      }
    }
  }
  for (size_t i = 0; i < out.size(); ++i)
    ASSERT_NEAR(out[i], p.want[i], p.silu ? 1e-9 : 0) << "at " << i;
}

TEST(PortableLinear, EveryTileShapeMultiplies) {
  // Whole and ragged rows, k and tokens; one part and several; more than one run of token tiles.
  for (const bool with_silu : {false, true}) {
    expect_product<Tile8>(make_problem(256, 1024, 5, with_silu, 4));
    expect_product<Tile8>(make_problem(272, 328, 8, with_silu, 1));
    expect_product<Tile16>(make_problem(128, 1152, 13, with_silu, 4));
    expect_product<Tile32>(make_problem(144, 520, 29, with_silu, 3));
    expect_product<Tile64>(make_problem(144, 1288, 70, with_silu, 4));
  }
  expect_product<Tile8>(make_problem(136, 256, 8 * 19 - 3, false, 1));
}

TEST(PortableLinear, TilesAreEachTakenOnce) {
  for (const int row_tiles : {1, 3, 40})
    for (const int token_tiles : {1, 2, 15, 16, 17, 33, 87}) {
      std::set<std::pair<int, int>> seen;
      for (int i = 0; i < row_tiles * token_tiles; ++i) {
        const TileAt at = tile_at(i, row_tiles, token_tiles);
        ASSERT_TRUE(at.row_tile >= 0 && at.row_tile < row_tiles);
        ASSERT_TRUE(at.token_tile >= 0 && at.token_tile < token_tiles);
        seen.insert({at.row_tile, at.token_tile});
      }
      EXPECT_EQ(seen.size(), static_cast<size_t>(row_tiles * token_tiles));
    }
}

TEST(PortableLinear, SplitSumsFitTheWorkspace) {
  for (const int sms : {1, 20, 46, 84, 108, 132, 148})
    for (const int row_tiles : {1, 2, 40, 48, 512})
      for (const int groups : {1, 3, 4, 40, 256}) {
        const int parts = choose_parts(row_tiles, groups, sms);
        ASSERT_GE(parts, 1);
        ASSERT_LE(parts, kMaxParts);
        for (int part = 0; part < parts; ++part)
          ASSERT_LT(part_begin(groups, parts, part), part_begin(groups, parts, part + 1));
        EXPECT_EQ(part_begin(groups, parts, parts), groups);
        for (const int token_tiles : {1, 2, 7, 87}) {
          const bool split = choose_split(row_tiles, token_tiles, parts, sms);
          if (parts > 1 && token_tiles == 1) {
            EXPECT_TRUE(split);  // the small tiles know no other way
          }
          if (!split) continue;
          const int tiles = row_tiles * token_tiles;
          EXPECT_LE(tiles * 4, counters_bytes(sms));
          EXPECT_LE(
              counters_bytes(sms) + 4 * (piece_place<Tile64>(tiles - 1, parts, parts - 1,
                                                             Tile64::kVectors - 1, kThreads - 1) +
                                         4),
              workspace_bytes(sms));
          EXPECT_EQ(counters_bytes(sms) % 16, 0);
        }
      }
}

// Which banks a warp touches at once.
template <typename S>
void expect_no_bank_conflicts() {
  for (int token_tile = 0; token_tile < S::kTokens / 8; ++token_tile)
    for (int k64 = 0; k64 < 2; ++k64)
      for (int pair = 0; pair < 2; ++pair)
        for (int matrix = 0; matrix < 4; ++matrix) {
          std::set<int> sixteens;
          for (int row = 0; row < 8; ++row)
            sixteens.insert(operand_b_byte<S>(token_tile, k64, pair, matrix * 8 + row) / 16 % 8);
          EXPECT_EQ(sixteens.size(), 8u);
        }
  for (int e = 0; e < 4; ++e) {
    std::set<int> banks;
    for (int lane = 0; lane < 32; ++lane)
      banks.insert(sum_place<S>(sum_token(lane, e), sum_row(lane, e)) % 32);
    EXPECT_EQ(banks.size(), 32u);
  }
}
TEST(PortableLinear, NoBankConflicts) {
  expect_no_bank_conflicts<Tile8>();
  expect_no_bank_conflicts<Tile64>();
}

}  // namespace
}  // namespace nibble::cuda::portable
