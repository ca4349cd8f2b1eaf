// Products with many rows of activations (see gemm.h).
//
// The activations lie row by row in scratch memory, in the form of the weight's block and with the padding of its
// groups. A block of the weight is WIDTH strips of up to DEPTH columns.
#include "gemm.h"

#include <omp.h>

#include <cmath>
#include <vector>

#include "block.h"

namespace compress {
namespace {

constexpr int DEPTH = 256;      // columns of a block, which stays in the second-level cache
constexpr int MOST_ROWS = 240;  // whose sums stay there as well

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

// Round some activations to int8. They stay multiplied with their scale, unless it is left to the `sums`, which is
// so for whole rows.
float round_int8(float* x, int count, bool sums) {
  float scale = (largest_magnitude(x, count) + (sums ? TOKEN_EPSILON : 0)) / 127;
  if (scale < SMALLEST_SCALE) scale = 0;
  const float divisor = scale == 0 ? 1 : scale;  // divided as the reference does: inverses round ties another way
  for (int i = 0; i < count; i++) x[i] = std::rint(x[i] / divisor) * (sums ? 1 : scale);
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
        multiply_block(layout.form, x, layout.stride, rows, block, columns, wide, c, column == 0);
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

Form form_of([[maybe_unused]] const Linear& linear) {
#if defined(COMPRESS_PAIRS)
  if (linear.type == BFLOAT16) return PAIRS;
#endif
  return SINGLES;
}

extern const Kernel gemm{scratch, prepare_floats, multiply_floats};

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
