// Int4 GEMM for 256-bit registers. A 32-byte load is half a block: 8 out features ("half tile") x 8
// in features.
//
// int8 activations: weights q + 8 in 0..15 are the unsigned operand, activations the signed one.
//   AVX2: vpmaddubsw adds two products of at most 15 * 127, so a 16-bit lane holds 8 of them
//   (30480) without saturation: 32 in features, then vpmaddwd widens. AVX-VNNI: vpdpbusd into 32
//   bits. Per 32 weight bytes and row: 2 dot instructions (+ 2 adds); per 32 bytes 4 unpack
//   instructions.
// f32 activations: q as float, one partial sum per (output, group) in ascending k, then acc +=
// partial * scale.
//   Few rows dequantize in registers; more rows dequantize a (tile, group) once into L1 and run 6 x
//   16 FMA tiles.
// Work split: the caller's tile range; here rows in blocks, weights of a tile stay in L1/L2 across
// row blocks. Included inside an anonymous namespace. SPDX-License-Identifier: Apache-2.0

using vi = __m256i;

template <int NH>
inline void half_pointers(const Int4Gemm& g, int tile, int half, const uint8_t** w) {
  const size_t tile_bytes = cpu_int4_tile_bytes(g.k, g.group);
  for (int h = 0; h < NH; ++h)
    w[h] = g.weight + (tile + (half + h) / 2) * tile_bytes + (half + h) % 2 * 32;
}

/// Stores or adds 8 outputs of half tile `half` of `tile`, clipped to N.
inline void store_half(const Int4Gemm& g, int row, int tile, int half, vf v) {
  const int n = tile * kCpuTileRows + half * 8, count = min_int(8, g.n - n);
  if (count <= 0) return;
  float* y = g.y + row * g.ldy + (n - g.tile_begin * kCpuTileRows);
  if (g.add) v = add(v, count == 8 ? load(y) : load_partial(y, count));
  if (count == 8) {
    store(y, v);
  } else {
    store_partial(y, v, count);
  }
}

inline vi load_bytes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const vi*>(p));
}
inline vi broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

/// sum += two products a 16-bit lane; asm for the reason given in int4_avx512.h.
inline void dot2(vi& sum, vi weights, vi x) {
  vi products;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
      : "+x"(sum), "=&x"(products)
      : "x"(weights), "x"(x));
}
#if NIBBLE_AVXVNNI
/// dot += four products a lane; asm for the reason given in int4_avx512.h.
inline void dot4(vi& dot, vi weights, vi x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(dot) : "x"(weights), "x"(x));
}
#endif

/// MB rows x NH half tiles; scales of half h lie at w[h]'s group start.
template <int MB, int NH>
inline void int8_block(const Int4Gemm& g, int row, int tile, int half) {
  const uint8_t* w[NH];
  half_pointers<NH>(g, tile, half, w);
  const size_t group_bytes = cpu_int4_group_bytes(g.group);
  const int num_act = g.k / g.act_group;
  const int8_t* x = g.xq + static_cast<int64_t>(row) * g.k;
  const vi nibble = _mm256_set1_epi8(15);
  vf acc[MB][NH];
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int h = 0; h < NH; ++h) acc[m][h] = zero();
  }
  for (int a = 0, at = 64, left = g.group; a < num_act; ++a) {
    vi dot[MB][NH];
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      const vi offset = _mm256_set1_epi32(g.xoffset[static_cast<int64_t>(row + m) * num_act + a]);
      NIBBLE_UNROLL for (int h = 0; h < NH; ++h) dot[m][h] = offset;
    }
    for (int k = 0; k < g.act_group; k += 32, x += 32, at += 4 * kCpuQuadBlockBytes) {
#if NIBBLE_AVXVNNI
      NIBBLE_UNROLL for (int b = 0; b < 4; ++b) {
        vi lo[NH], hi[NH];
        NIBBLE_UNROLL for (int h = 0; h < NH; ++h) {
          const vi bytes = load_bytes(w[h] + at + b * kCpuQuadBlockBytes);
          lo[h] = _mm256_and_si256(bytes, nibble);
          hi[h] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        }
        NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
          const vi x0 = broadcast4(x + static_cast<int64_t>(m) * g.k + b * 8);
          const vi x1 = broadcast4(x + static_cast<int64_t>(m) * g.k + b * 8 + 4);
          NIBBLE_UNROLL for (int h = 0; h < NH; ++h) {
            dot4(dot[m][h], lo[h], x0);
            dot4(dot[m][h], hi[h], x1);
          }
        }
      }
#else
      vi sum[MB][NH];
      NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
        NIBBLE_UNROLL for (int h = 0; h < NH; ++h) sum[m][h] = _mm256_setzero_si256();
      }
      // Rolled: the body is long enough, and unrolled GCC 12 runs out of registers.
      _Pragma("GCC unroll 1") for (int b = 0; b < 4; ++b) {
        vi lo[NH], hi[NH];
        NIBBLE_UNROLL for (int h = 0; h < NH; ++h) {
          const vi bytes = load_bytes(w[h] + at + b * kCpuQuadBlockBytes);
          lo[h] = _mm256_and_si256(bytes, nibble);
          hi[h] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        }
        NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
          const vi x0 = broadcast4(x + static_cast<int64_t>(m) * g.k + b * 8);
          NIBBLE_UNROLL for (int h = 0; h < NH; ++h) dot2(sum[m][h], lo[h], x0);
          const vi x1 = broadcast4(x + static_cast<int64_t>(m) * g.k + b * 8 + 4);
          NIBBLE_UNROLL for (int h = 0; h < NH; ++h) dot2(sum[m][h], hi[h], x1);
        }
      }
      NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
        NIBBLE_UNROLL for (int h = 0; h < NH; ++h) {
          dot[m][h] =
              _mm256_add_epi32(dot[m][h], _mm256_madd_epi16(sum[m][h], _mm256_set1_epi16(1)));
        }
      }
#endif
    }
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      const vf xs = set1(g.xscale[static_cast<int64_t>(row + m) * num_act + a]);
      NIBBLE_UNROLL for (int h = 0; h < NH; ++h) {
        const vf scale = load(reinterpret_cast<const float*>(w[h]));
        acc[m][h] = fma(mul(_mm256_cvtepi32_ps(dot[m][h]), xs), scale, acc[m][h]);
      }
    }
    left -= g.act_group;
    if (left == 0) {
      NIBBLE_UNROLL for (int h = 0; h < NH; ++h) w[h] += group_bytes;
      at = 64;
      left = g.group;
    }
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int h = 0; h < NH; ++h)
        store_half(g, row + m, tile + (half + h) / 2, (half + h) % 2, acc[m][h]);
  }
}

/// Rows [row, rows) of tiles [tile, tile + NT) in row blocks of MB while they last.
template <int MB, int NT>
inline int int8_rows(const Int4Gemm& g, int row, int tile) {
  for (; row + MB <= g.rows; row += MB) int8_block<MB, 2 * NT>(g, row, tile, 0);
  return row;
}

void int4_int8(const Int4Gemm& gemm) {
  const Int4Gemm g = gemm;
  int tile = g.tile_begin;
  if (g.rows <= 2) {
    for (; tile + 2 <= g.tile_end; tile += 2) int8_rows<1, 2>(g, int8_rows<2, 2>(g, 0, tile), tile);
  }
  for (; tile < g.tile_end; ++tile) {
    int row = int8_rows<4, 1>(g, 0, tile);
    row = int8_rows<2, 1>(g, row, tile);
    int8_rows<1, 1>(g, row, tile);
  }
}

/// Channel i (0..7) of a block's half as float.
template <int i>
inline vf dequant(vi bytes) {
  const vi q = _mm256_and_si256(_mm256_srli_epi32(bytes, i < 4 ? 8 * i : 8 * (i - 4) + 4),
                                _mm256_set1_epi32(15));
  return sub(_mm256_cvtepi32_ps(q), set1(8.0f));
}

template <int MB, int NH, int i>
inline void f32_channel(const vi* bytes, const float* x, int64_t ldx, vf (*partial)[NH]) {
  vf w[NH];
  NIBBLE_UNROLL for (int h = 0; h < NH; ++h) w[h] = dequant<i>(bytes[h]);
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    const vf xv = set1(x[m * ldx + i]);
    NIBBLE_UNROLL for (int h = 0; h < NH; ++h) partial[m][h] = fma(xv, w[h], partial[m][h]);
  }
}

template <int MB, int NH>
inline void f32_block(const Int4Gemm& g, int row, int tile) {
  const uint8_t* w[NH];
  half_pointers<NH>(g, tile, 0, w);
  const size_t group_bytes = cpu_int4_group_bytes(g.group);
  const float* x = g.x + static_cast<int64_t>(row) * g.k;
  vf acc[MB][NH];
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int h = 0; h < NH; ++h) acc[m][h] = zero();
  }
  for (int group = 0; group < g.k / g.group; ++group) {
    vf partial[MB][NH];
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      NIBBLE_UNROLL for (int h = 0; h < NH; ++h) partial[m][h] = zero();
    }
    for (int b = 0; b < g.group / 8; ++b, x += 8) {
      vi bytes[NH];
      NIBBLE_UNROLL for (int h = 0; h < NH; ++h) bytes[h] =
          load_bytes(w[h] + 64 + b * kCpuQuadBlockBytes);
      f32_channel<MB, NH, 0>(bytes, x, g.k, partial);
      f32_channel<MB, NH, 1>(bytes, x, g.k, partial);
      f32_channel<MB, NH, 2>(bytes, x, g.k, partial);
      f32_channel<MB, NH, 3>(bytes, x, g.k, partial);
      f32_channel<MB, NH, 4>(bytes, x, g.k, partial);
      f32_channel<MB, NH, 5>(bytes, x, g.k, partial);
      f32_channel<MB, NH, 6>(bytes, x, g.k, partial);
      f32_channel<MB, NH, 7>(bytes, x, g.k, partial);
    }
    NIBBLE_UNROLL for (int h = 0; h < NH; ++h) {
      const vf scale = load(reinterpret_cast<const float*>(w[h]));
      NIBBLE_UNROLL for (int m = 0; m < MB; ++m) acc[m][h] = fma(partial[m][h], scale, acc[m][h]);
      w[h] += group_bytes;
    }
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int h = 0; h < NH; ++h)
        store_half(g, row + m, tile + h / 2, h % 2, acc[m][h]);
  }
}

/// MB rows against a dequantized (tile, group) panel [k][16]; acc [MB][16] in memory.
template <int MB>
inline void f32_panel(const float* x, int64_t ldx, const float* panel, int k, vf scale0, vf scale1,
                      float* acc) {
  vf partial[MB][2];
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) partial[m][0] = partial[m][1] = zero();
  for (int i = 0; i < k; ++i) {
    const vf w0 = load(panel + i * 16), w1 = load(panel + i * 16 + 8);
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      const vf xv = set1(x[m * ldx + i]);
      partial[m][0] = fma(xv, w0, partial[m][0]);
      partial[m][1] = fma(xv, w1, partial[m][1]);
    }
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    store(acc + m * 16, fma(partial[m][0], scale0, load(acc + m * 16)));
    store(acc + m * 16 + 8, fma(partial[m][1], scale1, load(acc + m * 16 + 8)));
  }
}

constexpr int kPanelRows = 96;  // rows that share one dequantization
constexpr int kMaxGroup = 256;

inline void f32_many_rows(const Int4Gemm& g, int row0, int rows, int tile) {
  float panel[kMaxGroup * 16];
  float acc[kPanelRows * 16];
  for (int i = 0; i < rows * 16; ++i) acc[i] = 0;
  const uint8_t* w = g.weight + tile * cpu_int4_tile_bytes(g.k, g.group);
  for (int k0 = 0; k0 < g.k; k0 += g.group, w += cpu_int4_group_bytes(g.group)) {
    for (int b = 0; b < g.group / 8; ++b) {
      for (int h = 0; h < 2; ++h) {
        const vi bytes = load_bytes(w + 64 + b * kCpuQuadBlockBytes + h * 32);
        float* out = panel + b * 8 * 16 + h * 8;
        store(out, dequant<0>(bytes));
        store(out + 16, dequant<1>(bytes));
        store(out + 32, dequant<2>(bytes));
        store(out + 48, dequant<3>(bytes));
        store(out + 64, dequant<4>(bytes));
        store(out + 80, dequant<5>(bytes));
        store(out + 96, dequant<6>(bytes));
        store(out + 112, dequant<7>(bytes));
      }
    }
    const vf scale0 = load(reinterpret_cast<const float*>(w)),
             scale1 = load(reinterpret_cast<const float*>(w) + 8);
    const float* x = g.x + static_cast<int64_t>(row0) * g.k + k0;
    int m = 0;
    for (; m + 6 <= rows; m += 6) {
      f32_panel<6>(x + static_cast<int64_t>(m) * g.k, g.k, panel, g.group, scale0, scale1,
                   acc + m * 16);
    }
    for (; m < rows; ++m) {
      f32_panel<1>(x + static_cast<int64_t>(m) * g.k, g.k, panel, g.group, scale0, scale1,
                   acc + m * 16);
    }
  }
  for (int m = 0; m < rows; ++m) {
    store_half(g, row0 + m, tile, 0, load(acc + m * 16));
    store_half(g, row0 + m, tile, 1, load(acc + m * 16 + 8));
  }
}

void int4_f32(const Int4Gemm& gemm) {
  const Int4Gemm g = gemm;
  if (g.rows > 4) {
    for (int tile = g.tile_begin; tile < g.tile_end; ++tile) {
      for (int row = 0; row < g.rows; row += kPanelRows)
        f32_many_rows(g, row, min_int(kPanelRows, g.rows - row), tile);
    }
    return;
  }
  int tile = g.tile_begin;
  if (g.rows <= 2) {
    for (; tile + 2 <= g.tile_end; tile += 2) {
      int row = 0;
      for (; row + 2 <= g.rows; row += 2) f32_block<2, 4>(g, row, tile);
      for (; row < g.rows; ++row) f32_block<1, 4>(g, row, tile);
    }
  }
  for (; tile < g.tile_end; ++tile) {
    int row = 0;
    for (; row + 4 <= g.rows; row += 4) f32_block<4, 2>(g, row, tile);
    for (; row < g.rows; ++row) f32_block<1, 2>(g, row, tile);
  }
}

uint64_t read_all(const void* data, size_t bytes) {
  const vi* p = static_cast<const vi*>(data);
  vi sum[4] = {};
  for (size_t i = 0; i + 4 <= bytes / sizeof(vi); i += 4) {
    NIBBLE_UNROLL for (int j = 0; j < 4; ++j) sum[j] =
        _mm256_add_epi64(sum[j], _mm256_load_si256(p + i + j));
  }
  const vi all =
      _mm256_add_epi64(_mm256_add_epi64(sum[0], sum[1]), _mm256_add_epi64(sum[2], sum[3]));
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  return static_cast<uint64_t>(_mm_extract_epi64(half, 0)) +
         static_cast<uint64_t>(_mm_extract_epi64(half, 1));
}
