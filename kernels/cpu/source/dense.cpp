// Linear layers whose weight is dense: float32, bfloat16 or float16. One pass over the weight for all rows of activations.
#include <algorithm>

#include "numbers.h"
#include "product.h"

namespace compress {
namespace {

constexpr int TOGETHER = 4;  // rows of activations that share a load of the weight

// Dot products of ROWS rows of the weight, `columns` apart, with COUNT rows of activations.
template <class T, int ROWS, int COUNT>
void dots(const T* weight, int columns, const float* x, float* y, int stride) {
  Floats total[ROWS][COUNT] = {};
  int c = 0;
  for (; c + LANES <= columns; c += LANES)
    for (int r = 0; r < ROWS; r++) {
      const Floats w = load_lanes(weight + size_t(r) * columns + c);
      for (int i = 0; i < COUNT; i++) total[r][i] += w * load_lanes(x + size_t(i) * columns + c);
    }
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < COUNT; i++) {
      float rest = 0;
      for (int d = c; d < columns; d++) rest += load(weight[size_t(r) * columns + d]) * x[size_t(i) * columns + d];
      y[size_t(i) * stride + r] = sum(total[r][i]) + rest;
    }
}

// A weight [rows, columns]: rows `first` to `last` of the result.
template <class T, int COUNT>
void by_rows(const Linear& linear, const float* x, float* y, int first, int last) {
  const T* weight = static_cast<const T*>(linear.codes[0]) + size_t(first) * linear.columns;
  int r = first;
  for (; r + 4 <= last; r += 4, weight += 4 * size_t(linear.columns))
    dots<T, 4, COUNT>(weight, linear.columns, x, y + r, linear.rows);
  for (; r < last; r++, weight += linear.columns) dots<T, 1, COUNT>(weight, linear.columns, x, y + r, linear.rows);
}

// A weight [columns, rows] (Conv1D): rows `first` to `last` of the result, of which a few lines stay in registers.
template <class T, int COUNT>
void by_columns(const Linear& linear, const float* x, float* y, int first, int last) {
  constexpr int LINES = COUNT == 1 ? 8 : 4;
  const T* weight = static_cast<const T*>(linear.codes[0]);
  int r = first;
  for (; r + LINES * LANES <= last; r += LINES * LANES) {
    Floats total[COUNT][LINES] = {};
    for (int c = 0; c < linear.columns; c++)
      for (int l = 0; l < LINES; l++) {
        const Floats w = load_lanes(weight + size_t(c) * linear.rows + r + l * LANES);
        for (int i = 0; i < COUNT; i++) total[i][l] += w * x[size_t(i) * linear.columns + c];
      }
    for (int i = 0; i < COUNT; i++) std::memcpy(y + size_t(i) * linear.rows + r, total[i], sizeof total[i]);
  }
  for (int i = 0; i < COUNT && r < last; i++) {
    float* to = y + size_t(i) * linear.rows;
    std::fill(to + r, to + last, 0.0f);
    for (int c = 0; c < linear.columns; c++)
      for (int s = r; s < last; s++)
        to[s] += load(weight[size_t(c) * linear.rows + s]) * x[size_t(i) * linear.columns + c];
  }
}

template <class T, int COUNT>
void some(const Linear& linear, const float* x, float* y, int first, int last) {
  if (linear.group == 1)
    by_rows<T, COUNT>(linear, x, y, first, last);
  else
    by_columns<T, COUNT>(linear, x, y, first, last);
}

template <class T>
void all(const Linear& linear, const float* x, int count, float* y, int first, int last) {
  int i = 0;
  for (; i + TOGETHER <= count; i += TOGETHER)
    some<T, TOGETHER>(linear, x + size_t(i) * linear.columns, y + size_t(i) * linear.rows, first, last);
  for (; i < count; i++) some<T, 1>(linear, x + size_t(i) * linear.columns, y + size_t(i) * linear.rows, first, last);
  if (linear.bias)
    for (i = 0; i < count; i++)
      for (int r = first; r < last; r++) y[size_t(i) * linear.rows + r] += linear.bias[r];
}

size_t scratch(const Linear& linear, int count) { return sizeof(float) * linear.columns * size_t(count); }

void prepare(const Linear& linear, const float* x, int count, void* to) {
  std::memcpy(to, x, scratch(linear, count));
}

void multiply(const Linear& linear, const void* from, int count, float* y, int thread, int threads) {
  const int blocks = (linear.rows + 15) / 16;  // threads share no line of the result
  const int first = std::min<int64_t>(linear.rows, int64_t(blocks) * thread / threads * 16);
  const int last = std::min<int64_t>(linear.rows, int64_t(blocks) * (thread + 1) / threads * 16);
  const float* x = static_cast<const float*>(from);
  switch (linear.scale_type) {
    case FLOAT32: return all<float>(linear, x, count, y, first, last);
    case BFLOAT16: return all<bfloat16>(linear, x, count, y, first, last);
    default: return all<float16>(linear, x, count, y, first, last);
  }
}

const Register dense(DENSE, {scratch, prepare, multiply});

}  // namespace
}  // namespace compress
