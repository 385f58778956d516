// The vector operations of kernel_body.h in plain C++ (GCC and clang vector types): 4 lanes, no
// FMA: fma() rounds twice. Included inside an anonymous namespace. SPDX-License-Identifier:
// Apache-2.0

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
constexpr int kDenseMB = 3, kDenseNB = 3;
constexpr int kDenseWideMB = 0, kDenseWideNB = 0, kDenseManyRows = 12;

inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline vf set1(float x) { return vf{x, x, x, x}; }
inline vf zero() { return vf{}; }
inline vf add(vf a, vf b) { return a + b; }
inline vf sub(vf a, vf b) { return a - b; }
inline vf mul(vf a, vf b) { return a * b; }
inline vf div(vf a, vf b) { return a / b; }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
/// Adding 1.5 * 2^23 leaves no room for a fraction; right for |a| < 2^22, larger values are
/// returned as they are.
inline vf round_even(vf a) {
  const vf magic = set1(12582912.0f), limit = set1(4194304.0f);
  const vf rounded = (a + magic) - magic;
  return (a < limit) & (a > -limit) ? rounded : a;
}
inline vf exp_scale(vf p, vf n) {
  const vi bits = (__builtin_convertvector(n, vi) + 127) << 23;
  vf scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
inline float hsum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline float hmax(vf v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline vf load_i8(const int8_t* p) {
  return vf{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
            static_cast<float>(p[3])};
}
/// 4 W bytes, lane t of quad[j] is byte 4 t + j.
inline void load_i8_quad(const int8_t* p, vf* quad) {
  for (int j = 0; j < 4; ++j) {
    quad[j] = vf{static_cast<float>(p[j]), static_cast<float>(p[4 + j]),
                 static_cast<float>(p[8 + j]), static_cast<float>(p[12 + j])};
  }
}
inline float bits_to_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}
inline vf load_bf16(const uint16_t* p) {
  return vf{bits_to_float(uint32_t{p[0]} << 16), bits_to_float(uint32_t{p[1]} << 16),
            bits_to_float(uint32_t{p[2]} << 16), bits_to_float(uint32_t{p[3]} << 16)};
}
inline float f16_one(uint16_t h) {
  const uint32_t sign = uint32_t{h} >> 15 << 31, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Scaling the shifted bits by 2^112 moves the exponent's bias and makes denormals right.
  return bits_to_float(sign) + (sign != 0 ? -1.0f : 1.0f) * (bits_to_float(rest << 13) * 0x1p112f);
}
inline vf load_f16(const uint16_t* p) {
  return vf{f16_one(p[0]), f16_one(p[1]), f16_one(p[2]), f16_one(p[3])};
}
inline void store_i8(int8_t* p, vf v) {
  for (int i = 0; i < W; ++i) p[i] = static_cast<int8_t>(v[i]);
}
inline float round_even_one(float x) {
  return x < 4194304.0f && x > -4194304.0f ? (x + 12582912.0f) - 12582912.0f : x;
}
inline uint16_t to_f16_one(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (rest >> 13 & 0x3ffu));
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (rest < 0x38800000u) {  // below 2^-14: fixed point of 2^-24; adding 0.5 rounds half to even in
                             // the FPU
    const float shifted = bits_to_float(rest) + 0.5f;
    uint32_t out;
    __builtin_memcpy(&out, &shifted, sizeof out);
    return static_cast<uint16_t>(sign | (out - 0x3f000000u));
  }
  const uint32_t rounded = rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u);
  return static_cast<uint16_t>(sign | rounded >> 13);
}
