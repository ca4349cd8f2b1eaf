// Numbers as tensors store them, and functions of float32 that compilers turn into vector code: no branches, no calls.
#pragma once
#include "isa.h"

namespace compress {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) { return from_bfloat(x.bits); }
inline float load(float16 x) { return from_half(x.bits); }

inline void store(float& to, float x) { to = x; }
inline void store(float16& to, float x) { to.bits = to_half(x); }
inline void store(bfloat16& to, float x) {  // without a branch
  const uint32_t bits = as_bits(x);
  to.bits = uint16_t(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// x rounded to the type T.
template <class T>
inline float rounded(float x) {
  T y;
  store(y, x);
  return load(y);
}

// LANES numbers.
inline Floats load_lanes(const float* at) { return load<Floats>(at); }
inline Floats load_lanes(const bfloat16* at) { return from_bfloats(&at->bits); }
inline Floats load_lanes(const float16* at) { return from_halves(&at->bits); }

inline float sum(Floats lanes) {
  float parts[LANES];
  store(parts, lanes);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

// e^x, to 2 units in the last place; 0 below the smallest normal number.
inline float exponential(float x) {
  const float kept = x < -87.0f ? -87.0f : x > 88.5f ? 88.5f : x;
  const float shifted = kept * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
  const float whole = shifted - 12582912.0f;
  const float r = (kept - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts, the first is exact
  float p = 1.9841270e-4f;  // Taylor: |r| <= ln 2 / 2
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const float power = as_float((as_bits(shifted) + 127u) << 23);
  const float value = p * power;
  return x != x ? x : x < -87.0f ? 0.0f : x > 88.72284f ? INFINITY : value;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Polynomials were fitted at Chebyshev nodes.
inline float hyperbolic_tangent(float x) {
  const float a = std::fabs(x), z = x * x;
  float p = -5.58927e-3f;  // (tanh x - x) / x^3
  p = p * z + 2.060715e-2f;
  p = p * z - 5.375878e-2f;
  p = p * z + 1.333209e-1f;
  p = p * z - 3.3333321e-1f;
  const float small = p * z * x + x;
  const float large = std::copysign(1.0f - 2.0f / (exponential(2.0f * a) + 1.0f), x);
  return a < 0.7f ? small : large;
}

inline float error_function(float x) {
  const float a = std::fabs(x), z = x * x;
  float p = 7.88249711e-5f;  // erf(x) / x
  p = p * z - 8.01885499e-4f;
  p = p * z + 5.18931194e-3f;
  p = p * z - 2.68543288e-2f;
  p = p * z + 1.12835975e-1f;
  p = p * z - 3.76126269e-1f;
  p = p * z + 1.12837917f;
  const float t = 1.0f / (1.0f + 0.5f * a);
  float q = 8.42679023e-2f;  // (1 - erf(a)) e^(a^2)
  q = q * t - 3.57099380e-1f;
  q = q * t + 4.06607674e-1f;
  q = q * t + 1.40449289e-2f;
  q = q * t + 2.95612116e-1f;
  q = q * t + 2.73362817e-1f;
  q = q * t + 2.82951841e-1f;
  q = q * t - 3.54176052e-5f;
  const float large = std::copysign(1.0f - q * exponential(-z), x);
  return a < 1.0f ? p * x : large;
}

}  // namespace compress
