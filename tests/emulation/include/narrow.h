// Numbers of 16 bits: half and bfloat16 have the same functions under CUDA, so both are one template here.
// Results are rounded to the nearest number. A fused multiply-add is rounded to float first, which in rare
// cases differs in the last place from the device.
#pragma once
#include <cuda_runtime.h>

namespace emulation {

struct HalfFormat {
  static __forceinline__ uint16_t encode(float value) { return same_bits<uint16_t>((_Float16)value); }
  static __forceinline__ float decode(uint16_t bits) { return (float)same_bits<_Float16>(bits); }
};

struct BfloatFormat {
  static __forceinline__ uint16_t encode(float value) {
    if (value != value) return 0x7fff;
    const uint32_t bits = same_bits<uint32_t>(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static __forceinline__ float decode(uint16_t bits) { return same_bits<float>((uint32_t)bits << 16); }
};

template <class Format>
struct Narrow {
  uint16_t bits;
  Narrow() = default;
  __forceinline__ Narrow(float value) : bits(Format::encode(value)) {}
  __forceinline__ Narrow(double value) : bits(Format::encode((float)value)) {}
  __forceinline__ Narrow(int value) : bits(Format::encode((float)value)) {}
  __forceinline__ operator float() const { return Format::decode(bits); }
};

template <class Format>
struct alignas(4) Pair {
  Narrow<Format> x, y;
  Pair() = default;
  __forceinline__ Pair(Narrow<Format> x, Narrow<Format> y) : x(x), y(y) {}
};

template <class F, class Operation>
__forceinline__ Pair<F> both(Pair<F> a, Pair<F> b, Operation operation) {
  return {operation(a.x, b.x), operation(a.y, b.y)};
}

}  // namespace emulation

#define EMULATED_OPERATION(name, name2, symbol, expression)                                                \
  template <class F>                                                                                       \
  __forceinline__ emulation::Narrow<F> name(emulation::Narrow<F> x, emulation::Narrow<F> y) {              \
    const float a = x, b = y;                                                                              \
    return emulation::Narrow<F>((float)(expression));                                                      \
  }                                                                                                        \
  template <class F>                                                                                       \
  __forceinline__ emulation::Pair<F> name2(emulation::Pair<F> x, emulation::Pair<F> y) {                   \
    return {name(x.x, y.x), name(x.y, y.y)};                                                               \
  }
EMULATED_OPERATION(__hadd, __hadd2, +, a + b)
EMULATED_OPERATION(__hsub, __hsub2, -, a - b)
EMULATED_OPERATION(__hmul, __hmul2, *, a * b)
EMULATED_OPERATION(__hdiv, __h2div, /, a / b)
EMULATED_OPERATION(__hmax, __hmax2, , std::fmax(a, b))
EMULATED_OPERATION(__hmin, __hmin2, , std::fmin(a, b))
#undef EMULATED_OPERATION

#define EMULATED_OPERATOR(symbol, name, name2)                                                             \
  template <class F>                                                                                       \
  __forceinline__ emulation::Narrow<F> operator symbol(emulation::Narrow<F> a, emulation::Narrow<F> b) {   \
    return name(a, b);                                                                                     \
  }                                                                                                        \
  template <class F>                                                                                       \
  __forceinline__ emulation::Pair<F> operator symbol(emulation::Pair<F> a, emulation::Pair<F> b) {         \
    return name2(a, b);                                                                                    \
  }
EMULATED_OPERATOR(+, __hadd, __hadd2)
EMULATED_OPERATOR(-, __hsub, __hsub2)
EMULATED_OPERATOR(*, __hmul, __hmul2)
#undef EMULATED_OPERATOR

template <class F>
__forceinline__ emulation::Narrow<F> __hfma(emulation::Narrow<F> a, emulation::Narrow<F> b, emulation::Narrow<F> c) {
  emulation::count(emulation::Work::MULTIPLY_ADD, 1);
  return emulation::Narrow<F>(__builtin_fmaf((float)a, (float)b, (float)c));
}
template <class F>
__forceinline__ emulation::Pair<F> __hfma2(emulation::Pair<F> a, emulation::Pair<F> b, emulation::Pair<F> c) {
  emulation::count(emulation::Work::MULTIPLY_ADD, 2);
  return {emulation::Narrow<F>(__builtin_fmaf((float)a.x, (float)b.x, (float)c.x)),
          emulation::Narrow<F>(__builtin_fmaf((float)a.y, (float)b.y, (float)c.y))};
}
template <class F>
__forceinline__ emulation::Narrow<F> __habs(emulation::Narrow<F> a) {
  a.bits &= 0x7fff;
  return a;
}
template <class F>
__forceinline__ emulation::Pair<F> __habs2(emulation::Pair<F> a) { return {__habs(a.x), __habs(a.y)}; }
template <class F>
__forceinline__ emulation::Narrow<F> __hneg(emulation::Narrow<F> a) {
  a.bits ^= 0x8000;
  return a;
}
template <class F>
__forceinline__ emulation::Pair<F> __hneg2(emulation::Pair<F> a) { return {__hneg(a.x), __hneg(a.y)}; }
template <class F>
__forceinline__ float __low2float(emulation::Pair<F> a) { return a.x; }
template <class F>
__forceinline__ float __high2float(emulation::Pair<F> a) { return a.y; }

// The functions that have the type in their names.
#define EMULATED_NARROW(T, T2, from_float, to_float, pair_to_float, pair_of_floats, pair_of_float2, twice, halves, low, \
                        high, of_bits, bits_of)                                                                       \
  __forceinline__ T from_float(float v) { return T(v); }                                                              \
  __forceinline__ T from_float##_rn(float v) { return T(v); }                                                         \
  __forceinline__ float to_float(T v) { return v; }                                                                   \
  __forceinline__ float2 pair_to_float(T2 v) { return {v.x, v.y}; }                                                   \
  __forceinline__ T2 pair_of_floats(float a, float b) { return {T(a), T(b)}; }                                        \
  __forceinline__ T2 pair_of_float2(float2 v) { return {T(v.x), T(v.y)}; }                                            \
  __forceinline__ T2 twice(T v) { return {v, v}; }                                                                    \
  __forceinline__ T2 halves(T a, T b) { return {a, b}; }                                                              \
  __forceinline__ T low(T2 v) { return v.x; }                                                                         \
  __forceinline__ T high(T2 v) { return v.y; }                                                                        \
  __forceinline__ T of_bits(unsigned short v) { return emulation::same_bits<T>(v); }                                  \
  __forceinline__ unsigned short bits_of(T v) { return v.bits; }
