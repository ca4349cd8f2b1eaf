// How codes lie in strips of 16 rows (see kernels/cpu/layout.py), and how they are taken out of them.
#pragma once
#include "isa.h"

namespace compress {

constexpr int wide_plane(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
constexpr int chunk_of(int bits) { return wide_plane(bits) == bits ? 16 : 32; }
constexpr uint32_t in_each_byte(int value) { return value * 0x01010101u; }

// The codes of columns 4 at to 4 at + 3 of a chunk, one row in a lane, each shifted left by SHIFT.
template <int BITS, int CHUNK, int SHIFT = 0, class Lines>
COMPRESS_INLINE Words codes_at(const Lines& line, int at, int first = 0) {
  constexpr int WIDE = wide_plane(BITS), FIELDS = 8 / WIDE;
  Words word = line(first + at / FIELDS);
  int right = WIDE * (at % FIELDS) - SHIFT;
  word = right > 0 ? word >> right : word << -right;
  word &= in_each_byte(((1 << WIDE) - 1) << SHIFT);
  if constexpr (WIDE < BITS)
    word |= codes_at<BITS - WIDE, CHUNK, SHIFT + WIDE>(line, at, first + CHUNK / (4 * FIELDS));
  return word;
}

constexpr float E4M3_UNIT = 256;

// The numbers, divided by E4M3_UNIT, of the codes in E4M3 in byte `at` of every word.
//
// A code is a sign, four bits of exponent (bias 7) and three of mantissa, which are put where float32 has them. With
// the float32 exponent 112 + e, a normal number becomes g, 2^-8 times what it is. For the numbers with e = 0, which
// have no leading one, 2 g - 2^-14 is right, and for all others it is larger than g. So the smaller of the two is
// right for all codes, and no arithmetic meets a subnormal number.
COMPRESS_INLINE Floats e4m3_at(Words words, int at) {
  Words top = words << (24 - 8 * at);
  Floats normal = (Floats)(((top >> 4) & 0x07f00000) | 0x38000000);
  Floats magnitude = smaller(normal, normal * 2 - 0x1p-14f);
  return (Floats)((Words)magnitude | (top & 0x80000000));
}

}  // namespace compress
