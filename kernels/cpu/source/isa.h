// The native vector of the path that is compiled, and the few instructions that the kernels need from it.
//
// Everything else is written once, with the vector extensions of GCC and Clang. A vector holds LANES lanes of 32
// bits, one for each row of a strip, and 16 / LANES vectors make up a line of 64 bytes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define COMPRESS_INLINE inline __attribute__((always_inline))

namespace compress {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define COMPRESS_AVX512
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__F16C__)
#define COMPRESS_AVX2
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int VECTORS = 16 / LANES;  // in a line

typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));  // of four bytes each
typedef float Floats __attribute__((vector_size(4 * LANES)));

template <class Vector>
COMPRESS_INLINE Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
COMPRESS_INLINE void store(void* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof vector);
}

COMPRESS_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

COMPRESS_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Keep a vector that was loaded in a register. Compilers load it again for every use, but loads are what is scarce.
COMPRESS_INLINE Words in_register(Words vector) {
#if defined(COMPRESS_AVX512)
  asm("" : "+v"(vector));
#elif defined(__x86_64__)
  asm("" : "+x"(vector));
#endif
  return vector;
}

// acc + the products of four unsigned bytes below 128 with four signed bytes.
COMPRESS_INLINE Ints dot7(Ints acc, Words codes, Words x) {
#if defined(COMPRESS_AVX512)
  return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x);
#elif defined(COMPRESS_AVX2)
  __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, (__m256i)x);  // at most 2 * 127 * 128: nothing saturates
  return acc + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Ints)vdotq_s32((int32x4_t)acc, (int8x16_t)codes, (int8x16_t)x);
#else
  typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
  Ints even = (Ints)((Shorts)(codes & 0x00ff00ff) * (((Shorts)x << 8) >> 8));  // all fit into 16 bits
  Ints odd = (Ints)((Shorts)((codes >> 8) & 0x00ff00ff) * ((Shorts)x >> 8));
  return acc + ((even << 16) >> 16) + (even >> 16) + ((odd << 16) >> 16) + (odd >> 16);
#endif
}

// The same for codes of BITS bits.
template <int BITS>
COMPRESS_INLINE Ints dot(Ints acc, Words codes, Words x) {
#if defined(COMPRESS_AVX2) || defined(__ARM_FEATURE_DOTPROD)
  if constexpr (BITS == 8)
    return dot7(acc, codes & 0x7f7f7f7f, x) + (dot7(Ints{}, (codes >> 7) & 0x01010101, x) << 7);
#endif
  return dot7(acc, codes, x);
}

// Bytes below 16 replaced by those of a table of 16 bytes.
COMPRESS_INLINE Words look_up(const uint8_t* table, Words codes) {
#if defined(COMPRESS_AVX512)
  __m512i tables = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
  return (Words)_mm512_shuffle_epi8(tables, (__m512i)codes);
#elif defined(COMPRESS_AVX2)
  __m256i tables = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return (Words)_mm256_shuffle_epi8(tables, (__m256i)codes);
#elif defined(__aarch64__)
  return (Words)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)codes);
#else
  uint8_t bytes[sizeof codes];
  store(bytes, codes);
  for (uint8_t& byte : bytes) byte = table[byte];
  return load<Words>(bytes);
#endif
}

// To the nearest integer, even where two are as near. What does not fit into 32 bits gives anything.
COMPRESS_INLINE Ints rounded(Floats x) {
#if defined(COMPRESS_AVX512)
  return (Ints)_mm512_cvtps_epi32((__m512)x);
#elif defined(COMPRESS_AVX2)
  return (Ints)_mm256_cvtps_epi32((__m256)x);
#elif defined(__aarch64__)
  return (Ints)vcvtnq_s32_f32((float32x4_t)x);
#else
  Ints whole;
  for (int lane = 0; lane < LANES; lane++) whole[lane] = (int32_t)std::lrintf(x[lane]);
  return whole;
#endif
}

COMPRESS_INLINE Floats smaller(Floats a, Floats b) {
#if defined(COMPRESS_AVX512)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(COMPRESS_AVX2)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

COMPRESS_INLINE int32_t sum_of(Ints values) {
#if defined(COMPRESS_AVX512)
  return _mm512_reduce_add_epi32((__m512i)values);
#else
  int32_t sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += values[lane];
  return sum;
#endif
}

COMPRESS_INLINE int32_t largest_of(Ints values) {
#if defined(COMPRESS_AVX512)
  return _mm512_reduce_max_epi32((__m512i)values);
#else
  int32_t largest = values[0];
  for (int lane = 1; lane < LANES; lane++) largest = values[lane] > largest ? values[lane] : largest;
  return largest;
#endif
}

inline float from_half(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | rest << 13);
  float magnitude = rest < 0x0400 ? (float)rest * 0x1p-24f : as_float((rest << 13) + (112u << 23));
  return as_float(sign | as_bits(magnitude));
}

inline uint16_t to_half(float value) {
  uint16_t sign = as_bits(value) >> 16 & 0x8000;
  float magnitude = std::fabs(value);
  if (!(magnitude <= 3.4028235e38f)) return sign | 0x7c00 | (magnitude != magnitude) << 9;
  if (magnitude >= 65520) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | (uint16_t)std::lrintf(magnitude * 0x1p24f);
  uint32_t bits = as_bits(magnitude) - (112u << 23);
  return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

inline float from_bfloat(uint16_t value) { return as_float((uint32_t)value << 16); }

inline uint16_t to_bfloat(float value) {
  uint32_t bits = as_bits(value);
  if (value != value) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// LANES numbers of float16.
COMPRESS_INLINE Floats from_halves(const uint16_t* from) {
#if defined(COMPRESS_AVX512)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(COMPRESS_AVX2)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__aarch64__)
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
  Floats values;
  for (int lane = 0; lane < LANES; lane++) values[lane] = from_half(from[lane]);
  return values;
#endif
}

// LANES numbers of bfloat16.
COMPRESS_INLINE Floats from_bfloats(const uint16_t* from) {
#if defined(COMPRESS_AVX512)
  Words bits = (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#elif defined(COMPRESS_AVX2)
  Words bits = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));
  Words bits = __builtin_convertvector(load<Shorts>(from), Words);
#endif
  return (Floats)(bits << 16);
}

// LANES unsigned bytes. Compilers widen and narrow long vectors piece by piece if they are not told how.
COMPRESS_INLINE Ints from_bytes(const uint8_t* from) {
#if defined(COMPRESS_AVX512)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(COMPRESS_AVX2)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  return __builtin_convertvector(load<Bytes>(from), Ints);
#endif
}

// The lowest byte of each lane.
COMPRESS_INLINE void store_bytes(void* to, Ints values) {
#if defined(COMPRESS_AVX512)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)values));
#elif defined(COMPRESS_AVX2)
  const __m256i lowest = _mm256_set1_epi32(0x0c080400);
  __m256i bytes = _mm256_shuffle_epi8((__m256i)values, lowest);
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
  _mm_storel_epi64((__m128i*)to, _mm256_castsi256_si128(bytes));
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  store(to, __builtin_convertvector(values, Bytes));
#endif
}

}  // namespace compress
