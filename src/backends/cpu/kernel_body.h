// Every kernel that needs no instruction of its own, written once over the vector operations that
// each isa_*.cpp defines before including this file: W lanes, vf (float vector) and load, store,
// set1, zero, add, sub, mul, div, fma, vmax, vmin, round_even, exp_scale (2^n), hsum, hmax,
// load_i8, load_i8_quad, load_bf16, load_f16, store_i8, store_f16. All of it has internal linkage.
// No std headers. SPDX-License-Identifier: Apache-2.0

// NOTE: everything is in the including file's anonymous namespace on purpose: no weak symbols.
#define NIBBLE_UNROLL _Pragma("GCC unroll 16")

constexpr float kMinusInfinity = -__builtin_inff();

inline int min_int(int a, int b) { return a < b ? a : b; }

/// First n < W floats, the other lanes zero.
inline vf load_partial(const float* x, int n) {
  float buffer[W] = {};
  for (int i = 0; i < n; ++i) buffer[i] = x[i];
  return load(buffer);
}
inline void store_partial(float* y, vf v, int n) {
  float buffer[W];
  store(buffer, v);
  for (int i = 0; i < n; ++i) y[i] = buffer[i];
}

/// e^x for x <= 88, 0 below -87.3: 2^n p(r) with |r| <= ln(2)/2, relative error below 3e-7. One
/// function for every path, so that bits never depend on the path.
inline vf exp_vector(vf x) {
  x = vmax(x, set1(-87.33654f));  // smaller results would be denormal; masked scores are -infinity
  const vf n = round_even(mul(x, set1(1.44269504f)));
  vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  vf p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(r, r), p, add(r, set1(1.0f)));
  return exp_scale(p, n);
}
inline float exp_one(float x) {
  float buffer[W];
  store(buffer, exp_vector(set1(x)));
  return buffer[0];
}

// Rows
// ---------------------------------------------------------------------------------------------------------

template <Dense kType>
inline vf load_dense(const void* x, int64_t i) {
  if constexpr (kType == Dense::kF32) return load(static_cast<const float*>(x) + i);
  if constexpr (kType == Dense::kBf16) return load_bf16(static_cast<const uint16_t*>(x) + i);
  if constexpr (kType == Dense::kF16) return load_f16(static_cast<const uint16_t*>(x) + i);
}
template <Dense kType>
inline void prefetch_dense(const void* x, int64_t i) {
  __builtin_prefetch(static_cast<const uint8_t*>(x) + i * (kType == Dense::kF32 ? 4 : 2));
}
template <Dense kType>
inline vf load_dense_partial(const void* x, int64_t i, int n) {
  if constexpr (kType == Dense::kF32) return load_partial(static_cast<const float*>(x) + i, n);
  uint16_t buffer[W] = {};
  if constexpr (kType != Dense::kF32) {
    for (int j = 0; j < n; ++j) buffer[j] = static_cast<const uint16_t*>(x)[i + j];
  }
  return load_dense<kType>(buffer, 0);
}
template <Dense kType>
inline void widen_row(const void* x, int n, float* y) {
  int i = 0;
  for (; i + W <= n; i += W) store(y + i, load_dense<kType>(x, i));
  if (i < n) store_partial(y + i, load_dense_partial<kType>(x, i, n - i), n - i);
}
void widen(Dense type, const void* x, int n, float* y) {
  if (type == Dense::kF32) widen_row<Dense::kF32>(x, n, y);
  if (type == Dense::kBf16) widen_row<Dense::kBf16>(x, n, y);
  if (type == Dense::kF16) widen_row<Dense::kF16>(x, n, y);
}

void multiply(const float* x, const float* scale, int n, float* y) {
  for (int i = 0; i < n; ++i) y[i] = x[i] * scale[i];
}

inline float absolute(float x) { return x < 0 ? -x : x; }

/// amax of W | n floats times pre_scale (may be null).
inline float amax_of(const float* x, const float* pre_scale, int n) {
  vf high = zero(), low = zero();
  for (int i = 0; i < n; i += W) {
    vf v = load(x + i);
    if (pre_scale != nullptr) v = mul(v, load(pre_scale + i));
    high = vmax(high, v);
    low = vmin(low, v);
  }
  high = vmax(high, sub(zero(), low));
  return hmax(high);
}

void quantize_row(const float* x, const float* pre_scale, int k, int act_group, int8_t* q,
                  float* scale, int32_t* offset) {
  for (int g = 0; g < k / act_group; ++g) {
    const int begin = g * act_group;
    const float* pre = pre_scale == nullptr ? nullptr : pre_scale + begin;
    const float amax = amax_of(x + begin, pre, act_group);
    const bool tiny = !(amax > 1e-30f);  // its reciprocal may be infinite
    scale[g] = tiny ? 0.0f : amax / 127.0f;
    const vf inverse = set1(tiny ? 0.0f : 127.0f / amax);
    int32_t sum = 0;
    vf sums = zero();
    for (int i = 0; i < act_group; i += W) {
      vf v = load(x + begin + i);
      if (pre != nullptr) v = mul(v, load(pre + i));
      v = round_even(mul(v, inverse));
      sums = add(sums, v);  // integers below 2^24: exact
      store_i8(q + begin + i, v);
    }
    sum = static_cast<int32_t>(hsum(sums));
    offset[g] = -8 * sum;
  }
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* y) {
  vf sum[4] = {zero(), zero(), zero(), zero()};
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    NIBBLE_UNROLL for (int j = 0; j < 4; ++j) {
      const vf v = load(x + i + j * W);
      sum[j] = fma(v, v, sum[j]);
    }
  }
  for (; i < n; i += W) {
    const vf v = load_partial(x + i, min_int(W, n - i));
    sum[0] = fma(v, v, sum[0]);
  }
  const float mean = hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3]))) / static_cast<float>(n);
  const vf scale = set1(1.0f / __builtin_sqrtf(mean + eps));
  for (i = 0; i + W <= n; i += W) store(y + i, mul(mul(load(x + i), scale), load(weight + i)));
  if (i < n) {
    const int m = n - i;
    store_partial(y + i, mul(mul(load_partial(x + i, m), scale), load_partial(weight + i, m)), m);
  }
}

inline vf silu_vector(vf x) {
  return div(x, add(set1(1.0f), exp_vector(vmin(sub(zero(), x), set1(88.0f)))));
}

void silu_multiply(const float* gate, const float* up, const float* out_scale, int n, float* y) {
  for (int i = 0; i < n; i += W) {
    const int m = min_int(W, n - i);
    const bool whole = m == W;
    vf v = silu_vector(whole ? load(gate + i) : load_partial(gate + i, m));
    v = mul(v, whole ? load(up + i) : load_partial(up + i, m));
    if (out_scale != nullptr)
      v = mul(v, whole ? load(out_scale + i) : load_partial(out_scale + i, m));
    if (whole) {
      store(y + i, v);
    } else {
      store_partial(y + i, v, m);
    }
  }
}

void rope(float* head, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i] + a * sin[i];
  }
}

float max_of(const float* x, int n) {
  vf v = set1(kMinusInfinity);
  int i = 0;
  for (; i + W <= n; i += W) v = vmax(v, load(x + i));
  float m = hmax(v);
  for (; i < n; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

float exp_sum(const float* x, float max, float scale, int n, float* y) {
  vf sum = zero();
  const vf s = set1(scale), m = set1(max);
  int i = 0;
  for (; i + W <= n; i += W) {
    const vf e = exp_vector(mul(sub(load(x + i), m), s));
    sum = add(sum, e);
    if (y != nullptr) store(y + i, e);
  }
  float total = hsum(sum);
  for (; i < n; ++i) {
    const float e = exp_one((x[i] - max) * scale);
    total += e;
    if (y != nullptr) y[i] = e;
  }
  return total;
}

// Dense GEMM
// ---------------------------------------------------------------------------------------------------
// Lane l of an output's accumulator holds the channels l mod W in ascending order; the lanes are
// summed at the end. That order is the same for one row (weights straight from memory) and for
// thousands (weights widened once per block of kDenseMBlock rows), so bits agree. Flops 2 M N K;
// bytes N K elements, once per kDenseMBlock rows.

template <Dense kType, int MB, int NB>
inline void dense_direct(const DenseGemm& g, int row, int n) {
  vf acc[MB][NB];
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) acc[m][j] = zero();
  }
  const float* x = g.x + static_cast<int64_t>(row) * g.k;
  const int64_t at = static_cast<int64_t>(n) * g.k;
  int i = 0;
  for (; i + W <= g.k; i += W) {
    vf w[NB];
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) w[j] =
        load_dense<kType>(g.weight, at + static_cast<int64_t>(j) * g.k + i);
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      const vf xv = load(x + static_cast<int64_t>(m) * g.k + i);
      NIBBLE_UNROLL for (int j = 0; j < NB; ++j) acc[m][j] = fma(xv, w[j], acc[m][j]);
    }
  }
  if (i < g.k) {
    for (int m = 0; m < MB; ++m) {
      const vf xv = load_partial(x + static_cast<int64_t>(m) * g.k + i, g.k - i);
      for (int j = 0; j < NB; ++j) {
        const vf w =
            load_dense_partial<kType>(g.weight, at + static_cast<int64_t>(j) * g.k + i, g.k - i);
        acc[m][j] = fma(xv, w, acc[m][j]);
      }
    }
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    float* y = g.y + (row + m) * g.ldy + (n - g.n_begin);
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) y[j] =
        g.add ? y[j] + hsum(acc[m][j]) : hsum(acc[m][j]);
  }
}

/// NB outputs from n, every row: the weights stay in L1 from one row block to the next.
template <Dense kType, int NB>
inline void dense_columns(const DenseGemm& g, int row, int n) {
  for (; row + 4 <= g.rows; row += 4) dense_direct<kType, 4, NB>(g, row, n);
  for (; row + 2 <= g.rows; row += 2) dense_direct<kType, 2, NB>(g, row, n);
  for (; row < g.rows; ++row) dense_direct<kType, 1, NB>(g, row, n);
}

/// Rows [row, row + MB) by NB outputs over the channels [k0, k1); between blocks of channels the
/// accumulators wait in `acc` (MB NB W floats).
template <Dense kType, int MB, int NB>
inline void dense_wide_block(const DenseGemm& g, int row, int n, int k0, int k1, float* acc) {
  vf a[MB][NB];
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) a[m][j] =
        k0 == 0 ? zero() : load(acc + (m * NB + j) * W);
  }
  const float* x = g.x + static_cast<int64_t>(row) * g.k;
  const int64_t at = static_cast<int64_t>(n) * g.k;
  for (int i = k0; i < k1; i += W) {
    vf w[NB];
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) {
      w[j] = load_dense<kType>(g.weight, at + static_cast<int64_t>(j) * g.k + i);
      prefetch_dense<kType>(g.weight, at + static_cast<int64_t>(NB + j) * g.k + i);
    }
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      const vf xv = load(x + static_cast<int64_t>(m) * g.k + i);
      NIBBLE_UNROLL for (int j = 0; j < NB; ++j) a[m][j] = fma(xv, w[j], a[m][j]);
    }
  }
  if (k1 < g.k) {
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      NIBBLE_UNROLL for (int j = 0; j < NB; ++j) store(acc + (m * NB + j) * W, a[m][j]);
    }
    return;
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    float* y = g.y + (row + m) * g.ldy + (n - g.n_begin);
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) y[j] = g.add ? y[j] + hsum(a[m][j]) : hsum(a[m][j]);
  }
}

/// As many whole blocks of MB rows as there are; returns the rows done. A block of
/// channels of x stays in L1 while the outputs pass by, straight from memory.
template <Dense kType, int MB, int NB>
int dense_wide_rows(const DenseGemm& g) {
  constexpr int kBlock = 32768 / (MB * static_cast<int>(sizeof(float)));
  const int num_wide = (g.n_end - g.n_begin) / NB;
  if (g.k % W != 0 || num_wide * MB * NB * W > kDenseScratch) return 0;
  int row = 0;
  for (; row + MB <= g.rows; row += MB) {
    for (int k0 = 0; k0 < g.k; k0 += kBlock) {
      for (int i = 0; i < num_wide; ++i) {
        dense_wide_block<kType, MB, NB>(g, row, g.n_begin + i * NB, k0, min_int(g.k, k0 + kBlock),
                                        g.scratch + i * MB * NB * W);
      }
    }
  }
  if (row > 0) {
    DenseGemm rest = g;
    rest.rows = row;
    for (int n = g.n_begin + num_wide * NB; n < g.n_end; ++n) dense_columns<kType, 1>(rest, 0, n);
  }
  return row;
}

template <Dense kType>
void dense_few_rows(const DenseGemm& gemm) {
  DenseGemm g = gemm;
  if constexpr (kDenseWideMB > 0) {
    const int done = dense_wide_rows<kType, kDenseWideMB, kDenseWideNB>(g);
    g.x += static_cast<int64_t>(done) * g.k;
    g.y += done * g.ldy;
    g.rows -= done;
    if (g.rows == 0) return;
  }
  int n = g.n_begin;
  if (g.rows == 1) {
    for (; n + 8 <= g.n_end; n += 8) dense_direct<kType, 1, 8>(g, 0, n);
  }
  for (; n + kDenseNB <= g.n_end; n += kDenseNB) dense_columns<kType, kDenseNB>(g, 0, n);
  for (; n < g.n_end; ++n) dense_columns<kType, 1>(g, 0, n);
}

/// acc[m][j] (vectors in memory, W floats each) += over a K block. x row stride ldx, w row stride
/// kDenseKBlock.
template <int MB, int NB>
inline void dense_block(const float* x, int64_t ldx, const float* w, int k, bool first, float* acc,
                        int acc_ld) {
  vf a[MB][NB];
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) a[m][j] =
        first ? zero() : load(acc + (m * acc_ld + j) * W);
  }
  int i = 0;
  for (; i + W <= k; i += W) {
    vf wv[NB];
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) wv[j] = load(w + j * kDenseKBlock + i);
    NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
      const vf xv = load(x + m * ldx + i);
      NIBBLE_UNROLL for (int j = 0; j < NB; ++j) a[m][j] = fma(xv, wv[j], a[m][j]);
    }
  }
  if (i < k) {
    for (int m = 0; m < MB; ++m) {
      const vf xv = load_partial(x + m * ldx + i, k - i);
      for (int j = 0; j < NB; ++j)
        a[m][j] = fma(xv, load_partial(w + j * kDenseKBlock + i, k - i), a[m][j]);
    }
  }
  NIBBLE_UNROLL for (int m = 0; m < MB; ++m) {
    NIBBLE_UNROLL for (int j = 0; j < NB; ++j) store(acc + (m * acc_ld + j) * W, a[m][j]);
  }
}

template <int MB>
inline void dense_block_row(const float* x, int64_t ldx, const float* w, int n, int k, bool first,
                            float* acc) {
  int j = 0;
  for (; j + kDenseNB <= n; j += kDenseNB) {
    dense_block<MB, kDenseNB>(x, ldx, w + j * kDenseKBlock, k, first, acc + j * W, kDenseNBlock);
  }
  for (; j < n; ++j)
    dense_block<MB, 1>(x, ldx, w + j * kDenseKBlock, k, first, acc + j * W, kDenseNBlock);
}

template <Dense kType>
void dense_many_rows(const DenseGemm& g) {
  float* w = g.scratch;
  float* acc = w + kDenseNBlock * kDenseKBlock;
  const int element = kType == Dense::kF32 ? 4 : 2;
  for (int row0 = 0; row0 < g.rows; row0 += kDenseMBlock) {
    const int rows = min_int(kDenseMBlock, g.rows - row0);
    for (int n0 = g.n_begin; n0 < g.n_end; n0 += kDenseNBlock) {
      const int cols = min_int(kDenseNBlock, g.n_end - n0);
      for (int k0 = 0; k0 < g.k; k0 += kDenseKBlock) {
        const int k = min_int(kDenseKBlock, g.k - k0);
        for (int j = 0; j < cols; ++j) {
          const int64_t at = static_cast<int64_t>(n0 + j) * g.k + k0;
          widen_row<kType>(static_cast<const uint8_t*>(g.weight) + at * element, k,
                           w + j * kDenseKBlock);
        }
        const float* x = g.x + static_cast<int64_t>(row0) * g.k + k0;
        int m = 0;
        for (; m + kDenseMB <= rows; m += kDenseMB) {
          dense_block_row<kDenseMB>(x + static_cast<int64_t>(m) * g.k, g.k, w, cols, k, k0 == 0,
                                    acc + m * kDenseNBlock * W);
        }
        for (; m < rows; ++m) {
          dense_block_row<1>(x + static_cast<int64_t>(m) * g.k, g.k, w, cols, k, k0 == 0,
                             acc + m * kDenseNBlock * W);
        }
      }
      for (int m = 0; m < rows; ++m) {
        float* y = g.y + static_cast<int64_t>(row0 + m) * g.ldy + (n0 - g.n_begin);
        for (int j = 0; j < cols; ++j) {
          const float sum = hsum(load(acc + (m * kDenseNBlock + j) * W));
          y[j] = g.add ? y[j] + sum : sum;
        }
      }
    }
  }
}

template <Dense kType>
inline void dense_typed(const DenseGemm& g) {
  if (g.rows < kDenseManyRows) {
    dense_few_rows<kType>(g);
  } else {
    dense_many_rows<kType>(g);
  }
}
void dense(const DenseGemm& g) {
  if (g.type == Dense::kF32) dense_typed<Dense::kF32>(g);
  if (g.type == Dense::kBf16) dense_typed<Dense::kBf16>(g);
  if (g.type == Dense::kF16) dense_typed<Dense::kF16>(g);
}

// KV cache
// -----------------------------------------------------------------------------------------------------

inline int8_t to_i8(float v) {
  v = v > 127.0f ? 127.0f : v < -127.0f ? -127.0f : v;
  return static_cast<int8_t>(round_even_one(v));
}

void kv_store(const KvStore& s) {
  const KvLayout& l = *s.layout;
  const int d_count = l.head_dim, t = s.row, tokens = l.block_tokens;
  if (l.type == Kv::kInt8Dynamic || l.type == Kv::kInt8Static) {
    float scales[2] = {s.k_scale, s.v_scale};
    if (l.type == Kv::kInt8Dynamic) {
      for (int which = 0; which < 2; ++which) {
        const float* x = which == 0 ? s.k : s.v;
        float amax = 0;
        for (int d = 0; d < d_count; ++d) amax = absolute(x[d]) > amax ? absolute(x[d]) : amax;
        scales[which] = amax / 127.0f;
      }
      reinterpret_cast<float*>(s.head + l.k_scale)[t] = scales[0];
      reinterpret_cast<float*>(s.head + l.v_scale)[t] = scales[1];
    }
    int8_t* k = reinterpret_cast<int8_t*>(s.head);
    int8_t* v = reinterpret_cast<int8_t*>(s.head + l.v) + static_cast<int64_t>(t) * d_count;
    const float k_div = scales[0] > 0 ? scales[0] : 1.0f, v_div = scales[1] > 0 ? scales[1] : 1.0f;
    for (int d = 0; d < d_count; ++d) {
      k[((d / 4) * tokens + t) * 4 + d % 4] = to_i8(s.k[d] / k_div);
      v[d] = to_i8(s.v[d] / v_div);
    }
  } else if (l.type == Kv::kF16) {
    uint16_t* k = reinterpret_cast<uint16_t*>(s.head);
    uint16_t* v = reinterpret_cast<uint16_t*>(s.head + l.v) + static_cast<int64_t>(t) * d_count;
    for (int d = 0; d < d_count; ++d) {
      k[d * tokens + t] = to_f16_one(s.k[d]);
      v[d] = to_f16_one(s.v[d]);
    }
  } else {
    float* k = reinterpret_cast<float*>(s.head);
    float* v = reinterpret_cast<float*>(s.head + l.v) + static_cast<int64_t>(t) * d_count;
    for (int d = 0; d < d_count; ++d) {
      k[d * tokens + t] = s.k[d];
      v[d] = s.v[d];
    }
  }
}

// Attention
// ----------------------------------------------------------------------------------------------------
// Per (sequence, kv head): tiles of 32 keys are widened once into kt [D][32] and v [32][Dp], then
// every (query, head) row scores them (lanes = keys) and adds p V (lanes = channels). Rows go in
// blocks of four: the heads that share the kv head. Tiles and spans start at absolute positions and
// a row never touches a key past its own position, so chunking, batch-mates and block ids cannot
// change bits.

/// Keys [first, first + count) of one block row range into columns [column, ...) of kt and rows of
/// v.
inline void load_kv_run(const Attend& a, const uint8_t* head, int first, int count, int column,
                        float* kt, float* v, float* k_scale, float* v_scale) {
  const KvLayout& l = *a.layout;
  const int dim = l.head_dim, tokens = l.block_tokens, dp = padded(dim);
  if (l.type == Kv::kInt8Dynamic || l.type == Kv::kInt8Static) {
    for (int d4 = 0; d4 < (dim + 3) / 4; ++d4) {
      const int8_t* k =
          reinterpret_cast<const int8_t*>(head) + (static_cast<int64_t>(d4) * tokens + first) * 4;
      float* out = kt + d4 * 4 * kKvTile + column;
      int i = 0;
      for (; i + W <= count; i += W) {
        vf quad[4];
        load_i8_quad(k + i * 4, quad);
        NIBBLE_UNROLL for (int j = 0; j < 4; ++j) store(out + j * kKvTile + i, quad[j]);
      }
      for (; i < count; ++i) {
        for (int j = 0; j < 4; ++j) out[j * kKvTile + i] = k[i * 4 + j];
      }
    }
    for (int t = 0; t < count; ++t) {
      const int8_t* row =
          reinterpret_cast<const int8_t*>(head + l.v) + static_cast<int64_t>(first + t) * dim;
      float* out = v + (column + t) * dp;
      int d = 0;
      for (; d + W <= dim; d += W) store(out + d, load_i8(row + d));
      for (; d < dim; ++d) out[d] = row[d];
    }
    for (int t = 0; t < count; ++t) {
      const bool dynamic = l.type == Kv::kInt8Dynamic;
      k_scale[column + t] =
          dynamic ? reinterpret_cast<const float*>(head + l.k_scale)[first + t] : a.k_scale;
      v_scale[column + t] =
          dynamic ? reinterpret_cast<const float*>(head + l.v_scale)[first + t] : a.v_scale;
    }
    return;
  }
  const bool half = l.type == Kv::kF16;
  for (int d = 0; d < dim; ++d) {
    const int64_t at = static_cast<int64_t>(d) * tokens + first;
    float* out = kt + d * kKvTile + column;
    if (half) {
      widen_row<Dense::kF16>(reinterpret_cast<const uint16_t*>(head) + at, count, out);
    } else {
      widen_row<Dense::kF32>(reinterpret_cast<const float*>(head) + at, count, out);
    }
  }
  for (int t = 0; t < count; ++t) {
    const int64_t at = static_cast<int64_t>(first + t) * dim;
    float* out = v + (column + t) * dp;
    if (half) {
      widen_row<Dense::kF16>(reinterpret_cast<const uint16_t*>(head + l.v) + at, dim, out);
    } else {
      widen_row<Dense::kF32>(reinterpret_cast<const float*>(head + l.v) + at, dim, out);
    }
    k_scale[column + t] = 1.0f;
    v_scale[column + t] = 1.0f;
  }
}

/// K and V of the int8 block that the next tile begins with, or null: brought into the caches while
/// this one is computed. A block of one head is too short for the hardware to see it coming.
struct Ahead {
  const uint8_t *k = nullptr, *v = nullptr;
};
inline void prefetch_l2(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

/// scores[r][32] = q_r . k; two vectors of keys at a time.
template <int RB>
inline void score_rows(const float* const* q, int dim, const float* kt, float* scores,
                       const uint8_t* ahead) {
  for (int key = 0; key < kKvTile; key += 2 * W) {
    vf acc[RB][2];
    NIBBLE_UNROLL for (int r = 0; r < RB; ++r) acc[r][0] = acc[r][1] = zero();
    for (int d = 0; d < dim; ++d) {
      if (ahead != nullptr && d % 2 == 0 && key == 0) prefetch_l2(ahead + d * 32);
      const vf k0 = load(kt + d * kKvTile + key), k1 = load(kt + d * kKvTile + key + W);
      NIBBLE_UNROLL for (int r = 0; r < RB; ++r) {
        const vf qv = set1(q[r][d]);
        acc[r][0] = fma(qv, k0, acc[r][0]);
        acc[r][1] = fma(qv, k1, acc[r][1]);
      }
    }
    NIBBLE_UNROLL for (int r = 0; r < RB; ++r) {
      store(scores + r * kKvTile + key, acc[r][0]);
      store(scores + r * kKvTile + key + W, acc[r][1]);
    }
  }
}

template <int RB, int NV>
inline void accumulate_columns(float* const* acc, const float* correction, const float* p,
                               const float* v, int dp, int keys, int d, const uint8_t* ahead) {
  vf a[RB][NV];
  NIBBLE_UNROLL for (int r = 0; r < RB; ++r) {
    NIBBLE_UNROLL for (int i = 0; i < NV; ++i) a[r][i] =
        mul(load(acc[r] + d + i * W), set1(correction[r]));
  }
  if (d % 64 != 0) ahead = nullptr;  // 64 channels are a cache line
  for (int t = 0; t < keys; ++t) {
    if (ahead != nullptr) prefetch_l2(ahead + t * dp + d);
    vf value[NV];
    NIBBLE_UNROLL for (int i = 0; i < NV; ++i) value[i] = load(v + t * dp + i * W);
    NIBBLE_UNROLL for (int r = 0; r < RB; ++r) {
      const vf pv = set1(p[r * kKvTile + t]);
      NIBBLE_UNROLL for (int i = 0; i < NV; ++i) a[r][i] = fma(pv, value[i], a[r][i]);
    }
  }
  NIBBLE_UNROLL for (int r = 0; r < RB; ++r) {
    NIBBLE_UNROLL for (int i = 0; i < NV; ++i) store(acc[r] + d + i * W, a[r][i]);
  }
}

/// acc_r = acc_r * correction_r + sum over the first `keys` of p_r[t] v[t].
template <int RB>
inline void accumulate_rows(float* const* acc, const float* correction, const float* p,
                            const float* v, int dp, int keys, const uint8_t* ahead) {
  int d = 0;
  for (; d + 2 * W <= dp; d += 2 * W)
    accumulate_columns<RB, 2>(acc, correction, p, v + d, dp, keys, d, ahead);
  for (; d < dp; d += W) accumulate_columns<RB, 1>(acc, correction, p, v + d, dp, keys, d, ahead);
}

/// Rows [row, row + RB) against the tile at absolute position `tile`.
template <int RB>
inline void attend_rows(const Attend& a, int row, int tile, const float* kt, const float* v,
                        const float* k_scale, const float* v_scale, float* p, float* max,
                        float* sum, float* acc, const Ahead& ahead) {
  const int dim = a.layout->head_dim, dp = padded(dim);
  const float* q[RB];
  float* acc_row[RB];
  float correction[RB];
  int keys[RB];
  bool same = true;
  for (int r = 0; r < RB; ++r) {
    const int query = (row + r) / a.heads, head = (row + r) % a.heads;
    q[r] = a.q + query * a.q_stride + static_cast<int64_t>(head) * dim;
    acc_row[r] = acc + static_cast<int64_t>(row + r) * dp;
    keys[r] = min_int(kKvTile, a.positions[query] - tile + 1);
    same = same && keys[r] == keys[0];
  }
  score_rows<RB>(q, dim, kt, p, ahead.k);
  for (int r = 0; r < RB; ++r) {
    correction[r] = 1.0f;
    if (keys[r] <= 0) continue;
    float* s = p + r * kKvTile;
    vf tile_max = set1(kMinusInfinity);
    const vf softmax_scale = set1(a.softmax_scale);
    for (int t = 0; t < kKvTile; t += W) {
      store(s + t, mul(mul(load(s + t), load(k_scale + t)), softmax_scale));
    }
    for (int t = keys[r]; t < kKvTile; ++t) s[t] = kMinusInfinity;
    for (int t = 0; t < kKvTile; t += W) tile_max = vmax(tile_max, load(s + t));
    const float old_max = max[row + r];
    float new_max = hmax(tile_max);
    new_max = new_max > old_max ? new_max : old_max;
    vf total = zero();
    for (int t = 0; t < kKvTile; t += W) {
      const vf e = exp_vector(sub(load(s + t), set1(new_max)));
      store(s + t, e);
    }
    for (int t = keys[r]; t < kKvTile; ++t) s[t] = 0.0f;
    for (int t = 0; t < kKvTile; t += W) {
      const vf e = load(s + t);
      total = add(total, e);
      store(s + t, mul(e, load(v_scale + t)));
    }
    correction[r] = old_max == kMinusInfinity ? 0.0f : exp_one(old_max - new_max);
    sum[row + r] = sum[row + r] * correction[r] + hsum(total);
    max[row + r] = new_max;
  }
  if (same) {
    if (keys[0] > 0) accumulate_rows<RB>(acc_row, correction, p, v, dp, keys[0], ahead.v);
  } else {
    for (int r = 0; r < RB; ++r) {
      if (keys[r] > 0)
        accumulate_rows<1>(acc_row + r, correction + r, p + r * kKvTile, v, dp, keys[r], ahead.v);
    }
  }
}

void attend_merge(float* max, float* sum, float* acc, float max2, float sum2, const float* acc2,
                  int dim) {
  const float new_max = *max > max2 ? *max : max2;
  const float c1 = exp_one(*max - new_max), c2 = exp_one(max2 - new_max);
  *sum = *sum * c1 + sum2 * c2;
  *max = new_max;
  for (int d = 0; d < dim; ++d) acc[d] = acc[d] * c1 + acc2[d] * c2;
}

void attend_finish(float sum, const float* acc, const float* out_scale, int dim, float* y) {
  const float inverse = 1.0f / sum;
  for (int d = 0; d < dim; ++d) {
    const float value = acc[d] * inverse;
    y[d] = out_scale == nullptr ? value : value * out_scale[d];
  }
}

void attend(const Attend& a) {
  const KvLayout& l = *a.layout;
  const int dim = l.head_dim, dp = padded(dim), rows = a.num_queries * a.heads;
  float* kt = a.scratch;
  float* v = kt + kKvTile * dp;
  float* k_scale = v + kKvTile * dp;
  float* v_scale = k_scale + kKvTile;
  float* p = v_scale + kKvTile;
  float* max = p + 4 * kKvTile;
  float* sum = max + padded(rows);
  float* acc = sum + padded(rows);
  const int last_position = a.positions[a.num_queries - 1];
  for (int i = 0; i < kKvTile * (2 * dp + 2); ++i) kt[i] = 0;  // padding lanes must be finite
  const auto block_of = [&](int t) {
    return a.kv + static_cast<int64_t>(a.block_table[t / l.block_tokens]) * l.block_bytes +
           static_cast<int64_t>(a.kv_head) * l.head_bytes;
  };
  const bool int8 = l.type == Kv::kInt8Dynamic || l.type == Kv::kInt8Static;
  for (int span = a.span_begin; span < a.span_end; ++span) {
    for (int r = 0; r < rows; ++r) {
      max[r] = kMinusInfinity;
      sum[r] = 0;
    }
    for (int i = 0; i < rows * dp; ++i) acc[i] = 0;
    const int begin = span * kKvSpan;
    const int end = min_int(begin + kKvSpan, last_position + 1);
    for (int tile = begin; tile < end; tile += kKvTile) {
      const int tile_end = min_int(tile + kKvTile, a.kv_len);
      for (int t = tile; t < tile_end;) {
        const int in_block = t % l.block_tokens;
        const int count = min_int(l.block_tokens - in_block, tile_end - t);
        load_kv_run(a, block_of(t), in_block, count, t - tile, kt, v, k_scale, v_scale);
        t += count;
      }
      Ahead ahead;  // once a tile, with its first rows
      if (int8 && tile_end < end && tile_end % l.block_tokens == 0) {
        ahead = {block_of(tile_end), block_of(tile_end) + l.v};
      }
      int row = 0;
      for (; row + 4 <= rows; row += 4) {
        attend_rows<4>(a, row, tile, kt, v, k_scale, v_scale, p, max, sum, acc, ahead);
        ahead = {};
      }
      for (; row < rows; ++row) {
        attend_rows<1>(a, row, tile, kt, v, k_scale, v_scale, p, max, sum, acc, ahead);
        ahead = {};
      }
    }
    for (int r = 0; r < rows; ++r) {
      float* out = a.acc + static_cast<int64_t>(r) * dp;
      const float* in = acc + static_cast<int64_t>(r) * dp;
      if (span == a.span_begin) {
        a.max[r] = max[r];
        a.sum[r] = sum[r];
        for (int d = 0; d < dp; ++d) out[d] = in[d];
      } else if (max[r] != kMinusInfinity) {
        attend_merge(a.max + r, a.sum + r, out, max[r], sum[r], in, dp);
      }
    }
  }
}
