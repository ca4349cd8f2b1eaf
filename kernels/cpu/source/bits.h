// Signs of one bit each, as checkpoints store them: the most significant bit of a byte first, +1 for a set bit.
//
// Eight bytes of each plane make a step of 64 columns. Its codes are 64 bytes, sums of place_j b_j over the bits b_j of
// the planes. Byte 8i + k of them belongs to column 8i + 7 - k, because the other bit comes first in vectors; so
// activations are arranged once, and bits never.
#pragma once
#include "isa.h"

namespace compress {

constexpr int STEP = 64;  // columns

struct BytesOfBits {
  uint64_t of[256];  // byte k is bit k
  constexpr BytesOfBits() : of() {
    for (int bits = 0; bits < 256; bits++)
      for (int k = 0; k < 8; k++) of[bits] |= (uint64_t)(bits >> k & 1) << 8 * k;
  }
};

constexpr BytesOfBits BYTES_OF_BITS;

struct Codes {
#if defined(COMPRESS_AVX512) || defined(COMPRESS_AVX2) || defined(__aarch64__)
  Words part[VECTORS] = {};
  COMPRESS_INLINE Words words(int vector) const { return part[vector]; }
#else
  uint64_t part[8] = {};
  COMPRESS_INLINE Words words(int vector) const { return load<Words>(part + 2 * vector); }
#endif

  // Add `place` wherever a bit of the plane is set.
  COMPRESS_INLINE void add(const uint8_t* plane, int place) {
#if defined(COMPRESS_AVX512)
    const __m512i before = (__m512i)part[0];
    part[0] = (Words)_mm512_mask_add_epi8(before, load<uint64_t>(plane), before, _mm512_set1_epi8((char)place));
#elif defined(COMPRESS_AVX2)
    const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    for (int half = 0; half < 2; half++) {
      const __m256i copies = _mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(plane + 4 * half)), byte);
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(copies, bit), bit);
      const __m256i places = _mm256_and_si256(set, _mm256_set1_epi8((char)place));
      part[half] = (Words)_mm256_add_epi8((__m256i)part[half], places);
    }
#elif defined(__aarch64__)
    const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    for (int quarter = 0; quarter < 4; quarter++) {
      const uint8_t* two = plane + 2 * quarter;
      const uint8x16_t copies = vcombine_u8(vdup_n_u8(two[0]), vdup_n_u8(two[1]));
      const uint8x16_t places = vandq_u8(vtstq_u8(copies, bit), vdupq_n_u8((uint8_t)place));
      part[quarter] = (Words)vaddq_u8((uint8x16_t)part[quarter], places);
    }
#else
    for (int i = 0; i < 8; i++) part[i] += BYTES_OF_BITS.of[plane[i]] * place;  // places add up to less than 256
#endif
  }
};

}  // namespace compress
