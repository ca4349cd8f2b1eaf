// What the kernels over strips of 16 rows share: tiles of activations, a thread's strips, scales, results.
#pragma once
#include <algorithm>

#include "isa.h"
#include "product.h"

namespace compress {

constexpr int STRIP = 16;  // rows
constexpr int TILE = 4;    // most rows of activations that are multiplied at once
constexpr int AHEAD = 4096;  // bytes that codes are fetched before they are needed

// Whether codes are fetched before they are needed. Processors see for themselves that memory is read from one end to
// the other, unless so much is done with each line that they lose the thread; else fetching is in their way.
constexpr bool fetched_ahead(int bits, int levels) { return bits <= 3 || levels > 1; }

constexpr float SMALLEST_SCALE = 1e-30f;  // of activations: the inverse of a smaller one overflows; they count as 0

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline size_t to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }

// The size of the next tile of so many rows of activations: 4, 2 or 1.
inline int tile_of(int rows) { return rows >= 4 ? 4 : rows >= 2 ? 2 : 1; }

// Call visit(first row, rows) for every tile.
template <class Visit>
void each_tile(int count, Visit visit) {
  for (int row = 0; row < count; row += tile_of(count - row)) visit(row, tile_of(count - row));
}

// Call visit(strip) for the share of one thread.
template <class Visit>
void each_strip(const Linear& linear, int thread, int threads, Visit visit) {
  int64_t strips = ceil_div(linear.rows, STRIP);
  for (int strip = strips * thread / threads; strip < strips * (thread + 1) / threads; strip++) visit(strip);
}

inline float largest_magnitude(const float* x, int count) {
  Ints most = {};  // compared as integers, NaN is above infinity, so it reaches the result
  int i = 0;
  for (; i + LANES <= count; i += LANES) {
    Ints magnitude = load<Ints>(x + i) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  int32_t largest = largest_of(most);
  for (; i < count; i++) largest = std::max(largest, (int32_t)(as_bits(x[i]) & 0x7fffffff));
  return as_float(largest);
}

// LANES scales, from number `at`.
COMPRESS_INLINE Floats scales_at(const Linear& linear, size_t at) {
  if (linear.scale_type == FLOAT16) return from_halves((const uint16_t*)linear.scales + at);
  if (linear.scale_type == BFLOAT16) return from_bfloats((const uint16_t*)linear.scales + at);
  return load<Floats>((const float*)linear.scales + at);
}

// Write one row of a strip's results, with the bias.
COMPRESS_INLINE void finish(const Linear& linear, int strip, const Floats* total, float* y) {
  const int first = strip * STRIP, rows = std::min(STRIP, linear.rows - first);
  float bias[STRIP] = {}, results[STRIP];
  if (linear.bias) std::memcpy(bias, linear.bias + first, 4 * rows);
  for (int v = 0; v < VECTORS; v++) store(results + v * LANES, total[v] + load<Floats>(bias + v * LANES));
  std::memcpy(y + first, results, 4 * rows);
}

}  // namespace compress
