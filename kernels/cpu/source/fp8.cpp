// Products of E4M3 codes with activations: FP8.
#include "codes.h"
#include "strips.h"

namespace compress {
namespace {

constexpr int CHUNK = 16;  // columns
constexpr int BYTES = CHUNK * STRIP;

int chunks_of(const Linear& linear) {
  int full = linear.columns / linear.group, rest = linear.columns % linear.group;
  return full * ceil_div(linear.group, CHUNK) + ceil_div(rest, CHUNK);
}

size_t scratch(const Linear& linear, int count) {
  return sizeof(float) * count * chunks_of(linear) * CHUNK;
}

// x [columns, M], with each group filled up to a multiple of a chunk.
void prepare_row(const Linear& linear, const float* from, int M, float* x) {
  float of_row = linear.activations == INT8_TOKEN ? largest_magnitude(from, linear.columns) + TOKEN_EPSILON : 0;
  for (int start = 0; start < linear.columns; start += linear.group) {
    int columns = std::min(linear.group, linear.columns - start), padded = ceil_div(columns, CHUNK) * CHUNK;
    float of_group = linear.activations == INT8_BLOCK ? largest_magnitude(from + start, columns) : of_row;
    float scale = of_group / 127, inverse = scale >= SMALLEST_SCALE ? 1 / scale : 0;
    for (int i = 0; i < padded; i++, x += M) {
      float value = i < columns ? from[start + i] : 0;
      *x = linear.activations == FLOATING ? value : std::rint(value * inverse) * scale;
    }
  }
}

void prepare(const Linear& linear, const float* x, int count, void* memory) {
  size_t width = (size_t)chunks_of(linear) * CHUNK;
  each_tile(count, [&](int first, int rows) {
    for (int m = 0; m < rows; m++)
      prepare_row(linear, x + (size_t)(first + m) * linear.columns, rows, (float*)memory + first * width + m);
  });
}

template <int M>
void multiply_strip(const Linear& linear, const float* x, int strip, float* y) {
  constexpr int COPIES = 4 / M;  // sums that do not wait for each other
  const uint8_t* lines = (const uint8_t*)linear.codes[0] + (size_t)strip * chunks_of(linear) * BYTES;
  size_t groups = ceil_div(linear.columns, linear.group);
  Floats total[M][VECTORS] = {};
  for (size_t group = 0; group < groups; group++) {
    int chunks = ceil_div(std::min<int>(linear.group, linear.columns - group * linear.group), CHUNK);
    for (int v = 0; v < VECTORS; v++) {
      Floats acc[COPIES][M] = {};
      for (int line = 0; line < 4 * chunks; line++) {
        const uint8_t* from = lines + 64 * line + 4 * LANES * v;
        if (v == 0) __builtin_prefetch(from + AHEAD);
        Words words = in_register(load<Words>(from));
#pragma GCC unroll 4
        for (int at = 0; at < 4; at++) {
          Floats numbers = e4m3_at(words, at);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) acc[at % COPIES][m] += numbers * x[(4 * line + at) * M + m];
        }
      }
      Floats scales = scales_at(linear, (strip * groups + group) * STRIP + v * LANES) * E4M3_UNIT;
      for (int m = 0; m < M; m++) {
        for (int copy = 1; copy < COPIES; copy++) acc[0][m] += acc[copy][m];
        total[m][v] += scales * acc[0][m];
      }
    }
    lines += (size_t)chunks * BYTES;
    x += (size_t)chunks * CHUNK * M;
  }
  for (int m = 0; m < M; m++) finish(linear, strip, total[m], y + (size_t)m * linear.rows);
}

void multiply(const Linear& linear, const void* memory, int count, float* y, int thread, int threads) {
  size_t width = (size_t)chunks_of(linear) * CHUNK;
  each_strip(linear, thread, threads, [&](int strip) {
    each_tile(count, [&](int first, int rows) {
      auto tile = rows == 4 ? multiply_strip<4> : rows == 2 ? multiply_strip<2> : multiply_strip<1>;
      tile(linear, (const float*)memory + first * width, strip, y + (size_t)first * linear.rows);
    });
  });
}

const Register fp8(FP8, {scratch, prepare, multiply});

}  // namespace
}  // namespace compress
