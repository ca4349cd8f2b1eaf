// The eight tiles of AMX: 16 rows of 64 bytes each. COMPRESS_EMULATE_TILES makes them plain memory, so that what is
// built on them can be tested on processors without.
#pragma once
#include "isa.h"

#if (defined(__AMX_TILE__) && defined(__AMX_BF16__)) || defined(COMPRESS_EMULATE_TILES)
#define COMPRESS_TILES

namespace compress {

#if defined(COMPRESS_EMULATE_TILES)

struct Tile {
  uint32_t at[16][16];
};
inline thread_local Tile tiles[8];

inline void configure_tiles() {}
inline void release_tiles() {}

template <int TILE>
void zero_tile() {
  tiles[TILE] = {};
}

template <int TILE>
void load_tile(const void* from, size_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(tiles[TILE].at[row], (const char*)from + row * stride, 64);
}

template <int TILE>
void store_tile(void* to, size_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy((char*)to + row * stride, tiles[TILE].at[row], 64);
}

// sums[m][n] += left[m][k] right[k][n], where left and right hold pairs of bfloat16.
template <int SUMS, int LEFT, int RIGHT>
void multiply_tiles() {
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 16; n++) {
        uint32_t x = tiles[LEFT].at[m][k], w = tiles[RIGHT].at[k][n];
        float sum = as_float(tiles[SUMS].at[m][n]);
        sum += from_bfloat((uint16_t)x) * from_bfloat((uint16_t)w);
        sum += from_bfloat(x >> 16) * from_bfloat(w >> 16);
        tiles[SUMS].at[m][n] = as_bits(sum);
      }
}

#else

// In assembler, because the intrinsics of g++ 12 paste their argument into the name of a register, so it cannot be a
// parameter of a template, and do not say that they read and write memory.

COMPRESS_INLINE void configure_tiles() {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  static_assert(sizeof shape == 64);
  asm volatile("ldtilecfg %0" : : "m"(shape));
}

COMPRESS_INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
COMPRESS_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

template <int TILE>
COMPRESS_INLINE void load_tile(const void* from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(TILE) : "memory");
}

template <int TILE>
COMPRESS_INLINE void store_tile(void* to, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(TILE) : "memory");
}

template <int SUMS, int LEFT, int RIGHT>
COMPRESS_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

#endif

}  // namespace compress
#endif
