// Int4 GEMM for 512-bit registers: a 64-byte load is one block, 16 out features x 8 in features.
//
// int8 activations: vpdpbusd, weights q + 8 unsigned, activations broadcast four at a time; the
// accumulator starts at
//   -8 sum(x). Per block: 3 unpack instructions, then 2 dots a row. Bytes N K / 2 (+ scales), flops
//   2 M N K.
// f32 activations: vpermps turns a nibble into its float value (its index uses the low four bits
// only), so a channel
//   of 16 outputs costs a shift and a permute; one partial sum per (output, group) in ascending k,
//   then acc += partial * scale.
// Work split: the caller's tile range; here tiles outermost, so that weights stay in L1/L2 across
// row blocks. Included inside an anonymous namespace. SPDX-License-Identifier: Apache-2.0

using vi = __m512i;

constexpr int kPrefetchBytes = 1536;  // ahead in each tile's stream

/// Stores or adds the 16 outputs of `tile`, clipped to N.
inline void store_tile(const Int4Gemm& g, int row, int tile, vf v) {
  const int n = tile * kCpuTileRows, count = min_int(kCpuTileRows, g.n - n);
  float* y = g.y + row * g.ldy + (n - g.tile_begin * kCpuTileRows);
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  if (g.add) v = add(v, _mm512_maskz_loadu_ps(mask, y));
  _mm512_mask_storeu_ps(y, mask, v);
}

inline vi broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

/// dot += four products a lane. NOTE: asm because GCC 12 copies and spills the accumulator around
/// the intrinsic (32 register moves and 16 spills in the 12-row block); tied to one register here,
/// it stays there.
inline void dot4(vi& dot, vi weights, vi x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(dot) : "v"(weights), "v"(x));
}

template <int MB, int NT>
inline void int8_block(const Int4Gemm& g, int row, int tile) {
  const size_t tile_bytes = cpu_int4_tile_bytes(g.k, g.group),
               group_bytes = cpu_int4_group_bytes(g.group);
  const uint8_t* w[NT];
  NIBBLE_UNROLL for (int t = 0; t < NT; ++t) w[t] = g.weight + (tile + t) * tile_bytes;
  const int num_act = g.k / g.act_group;
  const int8_t* x = g.xq + static_cast<int64_t>(row) * g.k;
  const vi nibble = _mm512_set1_epi8(15);
  vf acc[MB][NT];
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int t = 0; t < NT; ++t) acc[m][t] = zero();
  }
  for (int a = 0, at = 64, left = g.group; a < num_act; ++a) {
    vi dot[MB][NT];
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      const vi offset = _mm512_set1_epi32(g.xoffset[static_cast<int64_t>(row + m) * num_act + a]);
      NIBBLE_UNROLL for (int t = 0; t < NT; ++t) dot[m][t] = offset;
    }
    for (int k = 0; k < g.act_group; k += 8, x += 8, at += kCpuQuadBlockBytes) {
      vi lo[NT], hi[NT];
      NIBBLE_UNROLL for (int t = 0; t < NT; ++t) {
        _mm_prefetch(reinterpret_cast<const char*>(w[t] + at + kPrefetchBytes), _MM_HINT_T0);
        const vi bytes = _mm512_loadu_si512(w[t] + at);
        lo[t] = _mm512_and_si512(bytes, nibble);
        hi[t] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble);
      }
      NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
        const vi x0 = broadcast4(x + static_cast<int64_t>(m) * g.k),
                 x1 = broadcast4(x + static_cast<int64_t>(m) * g.k + 4);
        NIBBLE_UNROLL for (int t = 0; t < NT; ++t) dot4(dot[m][t], lo[t], x0);
        NIBBLE_UNROLL for (int t = 0; t < NT; ++t) dot4(dot[m][t], hi[t], x1);
      }
    }
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      const vf xs = set1(g.xscale[static_cast<int64_t>(row + m) * num_act + a]);
      NIBBLE_UNROLL for (int t = 0; t < NT; ++t) {
        const vf scale = load(reinterpret_cast<const float*>(w[t]));
        acc[m][t] = fma(mul(_mm512_cvtepi32_ps(dot[m][t]), xs), scale, acc[m][t]);
      }
    }
    left -= g.act_group;
    if (left == 0) {
      NIBBLE_UNROLL for (int t = 0; t < NT; ++t) w[t] += group_bytes;
      at = 64;
      left = g.group;
    }
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int t = 0; t < NT; ++t) store_tile(g, row + m, tile + t, acc[m][t]);
  }
}

template <int MB, int NT, int i>
inline void f32_channel(const vi* bytes, const float* x, int64_t ldx, vf table, vf (*partial)[NT]) {
  vf w[NT];
  constexpr int kShift = i < 4 ? 8 * i : 8 * (i - 4) + 4;
  NIBBLE_UNROLL for (int t = 0; t < NT; ++t) {
    w[t] =
        _mm512_permutexvar_ps(kShift == 0 ? bytes[t] : _mm512_srli_epi32(bytes[t], kShift), table);
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    const vf xv = set1(x[m * ldx + i]);
    NIBBLE_UNROLL for (int t = 0; t < NT; ++t) partial[m][t] = fma(xv, w[t], partial[m][t]);
  }
}

template <int MB, int NT>
inline void f32_block(const Int4Gemm& g, int row, int tile) {
  const size_t tile_bytes = cpu_int4_tile_bytes(g.k, g.group),
               group_bytes = cpu_int4_group_bytes(g.group);
  const uint8_t* w[NT];
  NIBBLE_UNROLL for (int t = 0; t < NT; ++t) w[t] = g.weight + (tile + t) * tile_bytes;
  const float* x = g.x + static_cast<int64_t>(row) * g.k;
  const vf table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  vf acc[MB][NT];
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int t = 0; t < NT; ++t) acc[m][t] = zero();
  }
  for (int group = 0; group < g.k / g.group; ++group) {
    vf partial[MB][NT];
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      NIBBLE_UNROLL for (int t = 0; t < NT; ++t) partial[m][t] = zero();
    }
    for (int b = 0; b < g.group / 8; ++b, x += 8) {
      vi bytes[NT];
      NIBBLE_UNROLL for (int t = 0; t < NT; ++t) bytes[t] =
          _mm512_loadu_si512(w[t] + 64 + b * kCpuQuadBlockBytes);
      f32_channel<MB, NT, 0>(bytes, x, g.k, table, partial);
      f32_channel<MB, NT, 1>(bytes, x, g.k, table, partial);
      f32_channel<MB, NT, 2>(bytes, x, g.k, table, partial);
      f32_channel<MB, NT, 3>(bytes, x, g.k, table, partial);
      f32_channel<MB, NT, 4>(bytes, x, g.k, table, partial);
      f32_channel<MB, NT, 5>(bytes, x, g.k, table, partial);
      f32_channel<MB, NT, 6>(bytes, x, g.k, table, partial);
      f32_channel<MB, NT, 7>(bytes, x, g.k, table, partial);
    }
    NIBBLE_UNROLL for (int t = 0; t < NT; ++t) {
      const vf scale = load(reinterpret_cast<const float*>(w[t]));
      NIBBLE_UNROLL for (int m = 0; m < MB; ++m) acc[m][t] = fma(partial[m][t], scale, acc[m][t]);
      w[t] += group_bytes;
    }
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int t = 0; t < NT; ++t) store_tile(g, row + m, tile + t, acc[m][t]);
  }
}

template <bool kInt8, int MB, int NT>
inline int row_blocks(const Int4Gemm& g, int row, int tile) {
  for (; row + MB <= g.rows; row += MB) {
    if constexpr (kInt8) {
      int8_block<MB, NT>(g, row, tile);
    } else {
      f32_block<MB, NT>(g, row, tile);
    }
  }
  return row;
}

template <bool kInt8>
void int4_gemm(const Int4Gemm& g) {
  int tile = g.tile_begin;
  if (g.rows <= 3) {
    for (; tile + 4 <= g.tile_end; tile += 4) {
      const int row = row_blocks<kInt8, 2, 4>(g, 0, tile);
      row_blocks<kInt8, 1, 4>(g, row, tile);
    }
  }
  for (; tile + 2 <= g.tile_end; tile += 2) {
    int row = row_blocks<kInt8, 8, 2>(g, 0, tile);  // 12 rows would spill
    row = row_blocks<kInt8, 4, 2>(g, row, tile);
    row = row_blocks<kInt8, 2, 2>(g, row, tile);
    row_blocks<kInt8, 1, 2>(g, row, tile);
  }
  for (; tile < g.tile_end; ++tile) {
    const int row = row_blocks<kInt8, 8, 1>(g, 0, tile);
    row_blocks<kInt8, 1, 1>(g, row, tile);
  }
}

void int4_int8(const Int4Gemm& gemm) {
  const Int4Gemm g = gemm;
  int4_gemm<true>(g);
}
void int4_f32(const Int4Gemm& gemm) {
  const Int4Gemm g = gemm;
  int4_gemm<false>(g);
}

uint64_t read_all(const void* data, size_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  vi sum[4] = {};
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    NIBBLE_UNROLL for (int j = 0; j < 4; ++j) sum[j] =
        _mm512_add_epi64(sum[j], _mm512_loadu_si512(p + i + 64 * j));
  }
  int64_t lanes[8];
  _mm512_storeu_si512(
      lanes, _mm512_add_epi64(_mm512_add_epi64(sum[0], sum[1]), _mm512_add_epi64(sum[2], sum[3])));
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += static_cast<uint64_t>(lanes[i]);
  return total;
}
