// Int4 GEMM in plain C++: the same arithmetic as the vector kernels (exact integer dots per
// activation group; one float partial per weight group), 16 outputs at a time so that a compiler
// can vectorize. Included inside an anonymous namespace. SPDX-License-Identifier: Apache-2.0

inline void store_tile(const Int4Gemm& g, int row, int tile, const float* v) {
  const int n = tile * kCpuTileRows, count = min_int(kCpuTileRows, g.n - n);
  float* y = g.y + row * g.ldy + (n - g.tile_begin * kCpuTileRows);
  for (int i = 0; i < count; ++i) y[i] = g.add ? y[i] + v[i] : v[i];
}

void int4_int8(const Int4Gemm& g) {
  const size_t tile_bytes = cpu_int4_tile_bytes(g.k, g.group),
               group_bytes = cpu_int4_group_bytes(g.group);
  const int num_act = g.k / g.act_group;
  for (int tile = g.tile_begin; tile < g.tile_end; ++tile) {
    for (int row = 0; row < g.rows; ++row) {
      float acc[kCpuTileRows] = {};
      const int8_t* x = g.xq + static_cast<int64_t>(row) * g.k;
      for (int a = 0; a < num_act; ++a) {
        const int k0 = a * g.act_group;
        const uint8_t* group = g.weight + tile * tile_bytes + k0 / g.group * group_bytes;
        const uint8_t* block = group + 64 + k0 % g.group / 8 * kCpuQuadBlockBytes;
        int32_t dot[kCpuTileRows];
        for (int r = 0; r < kCpuTileRows; ++r)
          dot[r] = g.xoffset[static_cast<int64_t>(row) * num_act + a];
        for (int k = 0; k < g.act_group; k += 8, x += 8, block += kCpuQuadBlockBytes) {
          for (int r = 0; r < kCpuTileRows; ++r) {
            for (int j = 0; j < 4; ++j) {
              dot[r] += (block[4 * r + j] & 15) * x[j] + (block[4 * r + j] >> 4) * x[j + 4];
            }
          }
        }
        const float xs = g.xscale[static_cast<int64_t>(row) * num_act + a];
        const float* scale = reinterpret_cast<const float*>(group);
        for (int r = 0; r < kCpuTileRows; ++r) acc[r] += static_cast<float>(dot[r]) * xs * scale[r];
      }
      store_tile(g, row, tile, acc);
    }
  }
}

void int4_f32(const Int4Gemm& g) {
  constexpr int kRows = 4;
  const size_t tile_bytes = cpu_int4_tile_bytes(g.k, g.group),
               group_bytes = cpu_int4_group_bytes(g.group);
  for (int tile = g.tile_begin; tile < g.tile_end; ++tile) {
    for (int row = 0; row < g.rows; row += kRows) {
      const int rows = min_int(kRows, g.rows - row);
      float acc[kRows][kCpuTileRows] = {};
      const uint8_t* group = g.weight + tile * tile_bytes;
      for (int k0 = 0; k0 < g.k; k0 += g.group, group += group_bytes) {
        float partial[kRows][kCpuTileRows] = {};
        for (int k = 0; k < g.group; ++k) {
          const uint8_t* block = group + 64 + k / 8 * kCpuQuadBlockBytes + k % 4;
          const int shift = k % 8 < 4 ? 0 : 4;
          float w[kCpuTileRows];
          for (int r = 0; r < kCpuTileRows; ++r)
            w[r] = static_cast<float>((block[4 * r] >> shift & 15) - 8);
          for (int m = 0; m < rows; ++m) {
            const float x = g.x[static_cast<int64_t>(row + m) * g.k + k0 + k];
            for (int r = 0; r < kCpuTileRows; ++r) partial[m][r] += x * w[r];
          }
        }
        const float* scale = reinterpret_cast<const float*>(group);
        for (int m = 0; m < rows; ++m) {
          for (int r = 0; r < kCpuTileRows; ++r) acc[m][r] += partial[m][r] * scale[r];
        }
      }
      for (int m = 0; m < rows; ++m) store_tile(g, row + m, tile, acc[m]);
    }
  }
}

uint64_t read_all(const void* data, size_t bytes) {
  const uint64_t* p = static_cast<const uint64_t*>(data);
  uint64_t sum[4] = {};
  for (size_t i = 0; i + 4 <= bytes / 8; i += 4) {
    for (int j = 0; j < 4; ++j) sum[j] += p[i + j];
  }
  return sum[0] + sum[1] + sum[2] + sum[3];
}
