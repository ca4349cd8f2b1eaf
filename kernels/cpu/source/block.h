// The product of rows of activations with one block of the weight (see gemm.h).
//
// The micro kernel multiplies a few rows with a few strips and keeps all sums in registers; with AMX, tiles hold the
// sums of 32 rows with two strips.
#pragma once
#include "gemm.h"
#include "tiles.h"

namespace compress {
namespace {

#if defined(COMPRESS_AVX512)
constexpr int WIDTH = 4, HEIGHT = 6;  // strips and rows whose sums fit into 32 registers of 16 lanes
#elif defined(COMPRESS_AVX2) || defined(__aarch64__)
constexpr int WIDTH = 1, HEIGHT = 6;
#else
constexpr int WIDTH = 1, HEIGHT = 2;
#endif

constexpr int WIDE = WIDTH * STRIP;
constexpr int UNIT = 16;  // rows of a tile

// The sums of HEIGHT rows and S strips: c [rows, WIDE] is set if this is the first block of columns, else added to.
template <Form form, int H, int S>
void micro(const char* x, size_t stride, const char* block, int columns, float* c, bool first) {
  const size_t strip = (size_t)columns * bytes_of(form);
  Floats sums[H][S][VECTORS];
#pragma GCC unroll 6
  for (int h = 0; h < H; h++)
#pragma GCC unroll 4
    for (int s = 0; s < S; s++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        sums[h][s][v] = first ? Floats{} : load<Floats>(c + h * WIDE + s * STRIP + v * LANES);
  for (size_t at = 0; at < strip / 16; at += 4) {
    Floats weights[S][VECTORS];
#pragma GCC unroll 4
    for (int s = 0; s < S; s++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) weights[s][v] = load<Floats>(block + s * strip + at * 16 + v * 4 * LANES);
#pragma GCC unroll 6
    for (int h = 0; h < H; h++) {
      uint32_t one;
      std::memcpy(&one, x + h * stride + at, 4);
      Floats all = (Floats)(Words{} + one);
#pragma GCC unroll 4
      for (int s = 0; s < S; s++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
          Floats& sum = sums[h][s][v];
#if defined(COMPRESS_PAIRS)
          if (form == PAIRS)
            sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights[s][v], (__m512bh)all);
          else
#endif
            sum += weights[s][v] * all;
        }
    }
  }
#pragma GCC unroll 6
  for (int h = 0; h < H; h++)
#pragma GCC unroll 4
    for (int s = 0; s < S; s++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) store(c + h * WIDE + s * STRIP + v * LANES, sums[h][s][v]);
}

typedef void (*Micro)(const char*, size_t, const char*, int, float*, bool);

template <Form form, int S>
Micro of_height(int rows) {
  static constexpr Micro by_rows[] = {
      micro<form, 1, S>,
      micro<form, 2, S>,
#if defined(COMPRESS_AVX2) || defined(COMPRESS_AVX512) || defined(__aarch64__)
      micro<form, 3, S>, micro<form, 4, S>, micro<form, 5, S>, micro<form, 6, S>,
#endif
  };
  return by_rows[rows - 1];
}

// Multiply rows of activations with a block of S strips.
template <Form form, int S>
void rows_by_strips(const char* x, size_t stride, int rows, const char* block, int columns, float* c, bool first) {
  for (int parts = ceil_div(rows, HEIGHT), part = 0; part < parts; part++) {
    int from = rows * part / parts, to = rows * (part + 1) / parts;
    of_height<form, S>(to - from)(x + from * stride, stride, block, columns, c + from * WIDE, first);
  }
}

template <Form form>
void by_vectors(const char* x, size_t stride, int rows, const char* block, int columns, int strips, float* c, bool first) {
  for (int s = 0; s < strips;) {
    const char* at = block + (size_t)s * columns * bytes_of(form);
    if (WIDTH == 4 && strips - s == 4) {
      rows_by_strips<form, WIDTH>(x, stride, rows, at, columns, c, first);
      s += 4;
    } else if (WIDTH == 4 && strips - s >= 2) {
      rows_by_strips<form, (WIDTH + 1) / 2>(x, stride, rows, at, columns, c + s * STRIP, first);
      s += 2;
    } else {
      rows_by_strips<form, 1>(x, stride, rows, at, columns, c + s * STRIP, first);
      s += 1;
    }
  }
}

#if defined(COMPRESS_TILES)

// 16 or 32 rows of activations times one or two strips.
template <int ROWS, int S>
void by_tiles(const char* x, size_t stride, const char* block, int columns, float* c, bool first) {
  const size_t strip = (size_t)columns * bytes_of(PAIRS);
  auto each_sum = [&](auto visit) {
    visit(std::integral_constant<int, 0>(), c);
    if constexpr (S == 2) visit(std::integral_constant<int, 1>(), c + STRIP);
    if constexpr (ROWS == 2) visit(std::integral_constant<int, 2>(), c + UNIT * WIDE);
    if constexpr (ROWS == 2 && S == 2) visit(std::integral_constant<int, 3>(), c + UNIT * WIDE + STRIP);
  };
  each_sum([&](auto tile, float* sums) {
    if (first)
      zero_tile<tile()>();
    else
      load_tile<tile()>(sums, 4 * WIDE);
  });
  for (int at = 0; at < columns; at += 32, x += 64, block += 1024) {
    load_tile<4>(x, stride);
    load_tile<6>(block, 64);
    multiply_tiles<0, 4, 6>();
    if constexpr (S == 2) {
      load_tile<7>(block + strip, 64);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (ROWS == 2) {
      load_tile<5>(x + UNIT * stride, stride);
      multiply_tiles<2, 5, 6>();
      if constexpr (S == 2) multiply_tiles<3, 5, 7>();
    }
  }
  each_sum([&](auto tile, float* sums) { store_tile<tile()>(sums, 4 * WIDE); });
}

void in_tiles(const char* x, size_t stride, int rows, const char* block, int columns, int strips, float* c, bool first) {
  for (int s = 0; s < strips; s += 2)
    for (int row = 0; row < rows; row += 2 * UNIT) {
      bool two_strips = strips - s > 1, two_units = rows - row > UNIT;
      auto kernel = two_units ? (two_strips ? by_tiles<2, 2> : by_tiles<2, 1>)
                              : (two_strips ? by_tiles<1, 2> : by_tiles<1, 1>);
      kernel(x + row * stride, stride, block + (size_t)s * columns * bytes_of(PAIRS), columns,
             c + row * WIDE + s * STRIP, first);
    }
}

#endif

// c [rows, WIDE] = or += x block, where the sums of `strips` strips are meant, and the columns a multiple of 32.
inline void multiply_block(Form form, const char* x, size_t stride, int rows, const char* block, int columns, int strips,
                           float* c, bool first) {
#if defined(COMPRESS_TILES)
  if (form == PAIRS) return in_tiles(x, stride, rows, block, columns, strips, c, first);
#elif defined(COMPRESS_PAIRS)
  if (form == PAIRS) return by_vectors<PAIRS>(x, stride, rows, block, columns, strips, c, first);
#endif
  by_vectors<SINGLES>(x, stride, rows, block, columns, strips, c, first);
}

}  // namespace
}  // namespace compress
