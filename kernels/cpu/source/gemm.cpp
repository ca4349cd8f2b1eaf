// Products with many rows of activations (see gemm.h).
//
// The activations lie row by row in scratch memory, in the form of the weight's block and with the padding of its
// groups. A block of the weight is WIDTH strips of up to DEPTH columns. The micro kernel multiplies a few rows with it
// and keeps all sums in registers; with AMX, it multiplies 32 rows with two strips in tiles.
#include "gemm.h"

#include <omp.h>

#include <cmath>
#include <vector>

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

constexpr int DEPTH = 512;      // columns of a block, which stays in the second-level cache
constexpr int MOST_ROWS = 240;  // whose sums stay there as well
constexpr int WIDE = WIDTH * STRIP;
constexpr int UNIT = 16;  // rows of a tile

Form form_of(const Linear& linear) {
#if defined(COMPRESS_PAIRS)
  if (linear.type == BFLOAT16) return PAIRS;
#endif
  return SINGLES;
}

// How the columns are padded, and how the scratch memory is laid out: rows of activations, then a scale for each row.
struct Layout {
  Form form;
  int groups, group, columns;  // a group and all columns, with padding
  int whole;                   // columns up to the end of a tile
  size_t stride;               // bytes of a row
  size_t scales;               // where they begin
  size_t bytes;

  Layout(const Linear& linear, int count) : form(form_of(linear)) {
    int chunk = dequantisers[linear.kind].chunk(linear);
    groups = ceil_div(linear.columns, linear.group);
    group = ceil_div(linear.group, chunk) * chunk;
    columns = (groups - 1) * group + ceil_div(linear.columns - (groups - 1) * linear.group, chunk) * chunk;
    whole = ceil_div(columns, 32) * 32;
    stride = (size_t)whole * bytes_of(form) / 16;
    if (stride % 128 == 0) stride += 64;  // or the rows would compete for the same lines of the first-level cache
    scales = stride * ceil_div(count, UNIT) * UNIT;
    bytes = scales + to_line(4 * count);
  }
};

// Numbers of any type as float32.
void widen(const void* x, Type type, size_t start, int count, float* to) {
  const uint16_t* narrow = (const uint16_t*)x + start;
  int i = 0;
  if (type == FLOAT32) std::memcpy(to, (const float*)x + start, 4 * count);
  if (type == BFLOAT16)
    for (; i < count; i++) to[i] = from_bfloat(narrow[i]);
  if (type == FLOAT16) {
    for (; i + LANES <= count; i += LANES) store(to + i, from_halves(narrow + i));
    for (; i < count; i++) to[i] = from_half(narrow[i]);
  }
}

// Round some activations to int8. They stay multiplied with their scale, unless it is left to the `sums`.
float round_int8(float* x, int count, bool sums) {
  float scale = largest_magnitude(x, count) / 127;
  if (scale < SMALLEST_SCALE) scale = 0;
  float inverse = scale == 0 ? 0 : 1 / scale;
  for (int i = 0; i < count; i++) x[i] = std::rint(x[i] * inverse) * (sums ? 1 : scale);
  return scale;
}

void write_row(const float* x, const Layout& layout, char* to) {
#if defined(COMPRESS_PAIRS)
  if (layout.form == PAIRS) {
    alignas(64) static constexpr uint16_t order[32] = {0,  2,  1,  3,  4,  6,  5,  7,  8,  10, 9,  11, 12, 14, 13, 15,
                                                       16, 18, 17, 19, 20, 22, 21, 23, 24, 26, 25, 27, 28, 30, 29, 31};
    for (int i = 0; i < layout.whole; i += 32, to += 64) {
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
    }
    return;
  }
#endif
  std::memcpy(to, x, 4 * layout.whole);
}

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

// Write the sums of some rows and strips as results.
void finish(const Linear& linear, const float* c, const float* scales, int rows, int strip, int strips, char* y, Type type) {
  const int start = strip * STRIP, width = std::min(strips * STRIP, linear.rows - start);
  for (int row = 0; row < rows; row++, c += WIDE) {
    float results[WIDE];
    for (int i = 0; i < width; i++) results[i] = c[i] * scales[row] + (linear.bias ? linear.bias[start + i] : 0);
    size_t at = (size_t)row * linear.rows + start;
    if (type == FLOAT32)
      std::memcpy((float*)y + at, results, 4 * width);
    else
      for (int i = 0; i < width; i++)
        ((uint16_t*)y)[at + i] = type == BFLOAT16 ? to_bfloat(results[i]) : to_half(results[i]);
  }
}

// Arrange the rows [from, to) of the activations x [count, columns], of this type, into the scratch memory.
void prepare(const Linear& linear, const void* x, Type type, int count, int from, int to, void* scratch) {
  const Layout layout(linear, count);
  float* scales = (float*)((char*)scratch + layout.scales);
  std::vector<float> padded(layout.whole);
  for (int row = from; row < to; row++) {
    scales[row] = 1;
    for (int group = 0, column = 0; group < layout.groups; group++, column += linear.group) {
      int columns = std::min(linear.group, linear.columns - column);
      float* values = &padded[(size_t)group * layout.group];
      widen(x, type, (size_t)row * linear.columns + column, columns, values);
      if (linear.activations == INT8_BLOCK) round_int8(values, columns, false);
    }
    if (linear.activations == INT8_TOKEN) scales[row] = round_int8(padded.data(), layout.columns, true);
    write_row(padded.data(), layout, (char*)scratch + row * layout.stride);
  }
}

// y = x W^T + bias, [count, rows] of this type: this thread's share.
void multiply(const Linear& linear, const void* scratch, int count, void* y, Type type, int thread, int threads) {
  const Layout layout(linear, count);
  const int strips = ceil_div(linear.rows, STRIP), units = ceil_div(count, UNIT);
  const int across = std::min(threads, ceil_div(strips, WIDTH)), along = std::min(threads / across, units);
  if (thread >= across * along) return;
  const int first = (int64_t)strips * (thread % across) / across, end = (int64_t)strips * (thread % across + 1) / across;
  const int top = units * (thread / across) / along * UNIT;
  const int bottom = std::min(count, units * (thread / across + 1) / along * UNIT);
  alignas(64) char block[WIDTH * DEPTH * bytes_of(SINGLES)];
  alignas(64) float c[MOST_ROWS * WIDE];
#if defined(COMPRESS_TILES)
  configure_tiles();
#endif
  for (int strip = first; strip < end; strip += WIDTH)
    for (int row = top; row < bottom; row += MOST_ROWS) {
      const int wide = std::min(WIDTH, end - strip), rows = std::min(MOST_ROWS, bottom - row);
      for (int column = 0; column < layout.columns; column += DEPTH) {
        const int to = std::min(column + DEPTH, layout.columns), columns = ceil_div(to - column, 32) * 32;
        for (int s = 0; s < wide; s++) {
          char* at = block + (size_t)s * columns * bytes_of(layout.form);
          dequantisers[linear.kind].write(linear, strip + s, column, to, layout.form, at);
          size_t used = (size_t)(to - column) * bytes_of(layout.form);
          std::memset(at + used, 0, (size_t)columns * bytes_of(layout.form) - used);
        }
        const char* x = (const char*)scratch + row * layout.stride + column * bytes_of(layout.form) / 16;
        if (layout.form == SINGLES) by_vectors<SINGLES>(x, layout.stride, rows, block, columns, wide, c, column == 0);
#if defined(COMPRESS_TILES)
        if (layout.form == PAIRS) in_tiles(x, layout.stride, rows, block, columns, wide, c, column == 0);
#elif defined(COMPRESS_PAIRS)
        if (layout.form == PAIRS) by_vectors<PAIRS>(x, layout.stride, rows, block, columns, wide, c, column == 0);
#endif
      }
      const float* scales = (const float*)((const char*)scratch + layout.scales) + row;
      size_t size = type == FLOAT32 ? 4 : 2;
      finish(linear, c, scales, rows, strip, wide, (char*)y + (size_t)row * linear.rows * size, type);
    }
#if defined(COMPRESS_TILES)
  release_tiles();
#endif
}

size_t scratch(const Linear& linear, int count) { return Layout(linear, count).bytes; }

void prepare_floats(const Linear& linear, const float* x, int count, void* memory) {
  prepare(linear, x, FLOAT32, count, 0, count, memory);
}

void multiply_floats(const Linear& linear, const void* memory, int count, float* y, int thread, int threads) {
  multiply(linear, memory, count, y, FLOAT32, thread, threads);
}

}  // namespace

extern const Kernel gemm{scratch, prepare_floats, multiply_floats};

bool many_rows(const Linear& linear, int count) { return dequantisers[linear.kind].write && count > 8; }

void gemm_product(const Linear& linear, const void* x, void* y, int count, void* memory) {
  const Type type = (Type)linear.type;
#pragma omp parallel
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    prepare(linear, x, type, count, count * thread / threads, count * (thread + 1) / threads, memory);
#pragma omp barrier
    multiply(linear, memory, count, y, type, thread, threads);
  }
}

}  // namespace compress
