// Nested codes (compress.quantization.nested), read as they are stored: one plane of bits for each S_j in
// y = s sum_j 2^-j S_j x. The planes may lie anywhere, because blocks come and go while a model runs.
//
// With u = sum_j place_j b_j of the bits b_j, where the places are 64, 32, ... (128, ... for 8 planes), the sum of the
// signs is 2 u / place_0 - (2 - 2^(1-n)) for n planes. So the bits of all planes are put together to codes of a byte.
// Activations become integers of one to three signed bytes with a scale for each block of columns, as in integer.cpp.
#include <vector>

#include "bits.h"
#include "strips.h"

namespace compress {
namespace {

constexpr int FINE = 128;        // most columns that share a scale of floating activations
constexpr int LONG = 16384;      // most columns whose products surely fit into 32 bits
constexpr float SMALL = 1e-30f;  // blocks of smaller activations count as 0: the inverse of their scale overflows
constexpr int MOST_PLANES = 8;

// Columns that are summed up in integers: a group, or a part of one. They begin in the first byte of a step, and
// activations at the positions of other columns are 0.
struct Block {
  int32_t group, column, columns, first_byte, steps;

  Block(int group, int column, int columns)
      : group(group), column(column), columns(columns), first_byte(column / 8),
        steps(ceil_div(ceil_div(column + columns, 8) - first_byte, 8)) {}
};

int digits_of(const Linear& linear) {
  return linear.activations != FLOATING ? 1 : linear.type == FLOAT32 ? 3 : 2;
}

template <class Visit>
void each_block(const Linear& linear, Visit visit) {
  const int most = linear.activations == FLOATING ? FINE : LONG;
  for (int start = 0; start < linear.columns; start += linear.group)
    for (int end = std::min(start + linear.group, linear.columns), at = start; at < end; at += most)
      visit(Block{start / linear.group, at, std::min(most, end - at)});
}

// The scratch memory: digits of the activations [count, steps, digits, STEP], the blocks, scales and sums
// [count, blocks].
struct Plan {
  int blocks = 0, digits;
  size_t row = 0;  // bytes of digits

  explicit Plan(const Linear& linear) : digits(digits_of(linear)) {
    each_block(linear, [&](Block block) { blocks++, row += (size_t)block.steps * digits * STEP; });
  }
  size_t head(int count) const { return count * row + to_line(blocks * sizeof(Block)); }
};

// The parts of the scratch memory, from a row of activations on.
struct Prepared {
  const int8_t* digits;
  const Block* blocks;
  const float *scales, *sums;

  Prepared(const Plan& plan, const void* memory, int count, int first)
      : digits((const int8_t*)memory + first * plan.row),
        blocks((const Block*)((const int8_t*)memory + count * plan.row)),
        scales((const float*)((const int8_t*)memory + plan.head(count)) + (size_t)first * plan.blocks),
        sums(scales + (size_t)count * plan.blocks) {}
};

size_t scratch(const Linear& linear, int count) {
  const Plan plan(linear);
  return plan.head(count) + to_line(2 * sizeof(float) * count * plan.blocks);
}

float largest(const float* x, int count) {
  uint32_t most = 0;  // compared as integers, NaN is above infinity, so it reaches the result
  for (int i = 0; i < count; i++) most = std::max(most, as_bits(x[i]) & 0x7fffffff);
  return as_float(most);
}

float magnitude(const Linear& linear, const Block& block, const float* x, float of_row) {
  if (linear.activations == INT8_TOKEN) return of_row;
  if (linear.activations == FLOATING) return largest(x + block.column, block.columns);
  const int start = block.group * linear.group;
  return largest(x + start, std::min(linear.group, linear.columns - start));
}

// Write the digits of one step, the highest first, and return the sum of the integers.
template <int DIGITS>
int64_t write_digits(const float* step, float scale, int8_t* to) {
  typedef int8_t Bytes __attribute__((vector_size(LANES)));
  int64_t sum = 0;
  for (int at = 0; at < STEP; at += LANES) {
    Ints whole = rounded(load<Floats>(step + at) / scale);
    for (int lane = 0; lane < LANES; lane++) sum += whole[lane];
    for (int digit = DIGITS - 1; digit >= 0; digit--) {
      const Ints low = (whole << 24) >> 24;
      whole = (whole - low) >> 8;
      store(to + digit * STEP + at, __builtin_convertvector(low, Bytes));
    }
  }
  return sum;
}

// What the largest activation becomes. With three digits it stays below the limit, because the quotient is rounded.
constexpr float STEPS[] = {127, 127 * 256 + 127, 127 * 65536};

template <int DIGITS>
void prepare_row(const Linear& linear, const float* x, int8_t* digits, float* scales, float* sums) {
  const float of_row = linear.activations == INT8_TOKEN ? largest(x, linear.columns) + TOKEN_EPSILON : 0;
  each_block(linear, [&](Block block) {
    const float scale = magnitude(linear, block, x, of_row) / STEPS[DIGITS - 1];
    const bool zero = scale < SMALL;
    int64_t sum = 0;
    for (int s = 0, first = 8 * block.first_byte; s < block.steps; s++, first += STEP) {
      float step[STEP] = {};
      const int end = std::min(block.column + block.columns, first + STEP);
      for (int column = std::max(block.column, first); column < end; column++)
        step[(column - first) ^ 7] = zero ? 0 : x[column];
      sum += write_digits<DIGITS>(step, zero ? 1 : scale, digits);
      digits += DIGITS * STEP;
    }
    *scales++ = zero ? 0 : scale;
    *sums++ = zero ? 0 : scale * (float)sum;
  });
}

void prepare(const Linear& linear, const float* x, int count, void* memory) {
  const Plan plan(linear);
  const auto row = plan.digits == 1 ? prepare_row<1> : plan.digits == 2 ? prepare_row<2> : prepare_row<3>;
  for (int m = 0; m < count; m++) {
    const Prepared to(plan, memory, count, m);
    row(linear, x + (size_t)m * linear.columns, (int8_t*)to.digits, (float*)to.scales, (float*)to.sums);
  }
  Block* blocks = (Block*)Prepared(plan, memory, count, 0).blocks;
  each_block(linear, [&](Block block) { *blocks++ = block; });
}

constexpr int place_of(int planes, int plane) { return (planes == 8 ? 128 : 64) >> plane; }

// The planes at a row. Steps read up to 7 bytes beyond a row, so where the tensor ends there, the row is copied.
template <int PLANES>
struct Row {
  const uint8_t* planes[PLANES];
  std::vector<uint8_t> copy;

  void move(const Linear& linear, size_t row) {
    const size_t stride = ceil_div(linear.columns, 8);
    for (int j = 0; j < PLANES; j++) planes[j] = (const uint8_t*)linear.codes[j] + row * stride;
    if ((linear.rows - 1 - row) * stride >= 7) return;
    copy.assign(PLANES * (stride + 7), 0);
    for (int j = 0; j < PLANES; j++)
      planes[j] = (const uint8_t*)std::memcpy(copy.data() + j * (stride + 7), planes[j], stride);
  }
};

// One row of the weight times a tile of M rows of activations.
template <int PLANES, int DIGITS, int M>
void multiply_row(const Plan& plan, const Prepared& x, const uint8_t* const* planes, const uint16_t* weight_scales,
                  float* results) {
  Floats totals[M] = {};
  float signs[M] = {};  // scales times sums
  const int8_t* digits = x.digits;
  for (int b = 0; b < plan.blocks; b++) {
    Ints found[DIGITS][M] = {};
    const Block& block = x.blocks[b];
    const int steps = block.steps;
    size_t byte = block.first_byte;
    for (int s = 0; s < steps; s++, byte += 8, digits += DIGITS * STEP) {
      Codes codes;
#pragma GCC unroll 8
      for (int j = 0; j < PLANES; j++) codes.add(planes[j] + byte, place_of(PLANES, j));
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
#pragma GCC unroll 3
        for (int d = 0; d < DIGITS; d++)
#pragma GCC unroll 4
          for (int m = 0; m < M; m++)
            found[d][m] = dot<PLANES == 8 ? 8 : 7>(found[d][m], codes.words(v),
                                                  load<Words>(digits + m * plan.row + d * STEP + v * 4 * LANES));
    }
    const float scale = from_half(weight_scales[block.group]);
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      Floats product = __builtin_convertvector(found[0][m], Floats);
      for (int d = 1; d < DIGITS; d++) product = product * 256 + __builtin_convertvector(found[d][m], Floats);
      totals[m] += product * (scale * x.scales[m * plan.blocks + b]);
      signs[m] += scale * x.sums[m * plan.blocks + b];
    }
  }
  constexpr float unit = 2.0f / place_of(PLANES, 0), middle = 2 - 2.0f / (1 << PLANES);
  for (int m = 0; m < M; m++) {
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += totals[m][lane];
    results[m] = unit * total - middle * signs[m];
  }
}

template <int PLANES, int DIGITS>
void multiply_rows(const Linear& linear, const void* memory, int count, float* y, size_t begin, size_t end) {
  const Plan plan(linear);
  const int groups = ceil_div(linear.columns, linear.group);
  Row<PLANES> at;
  for (size_t row = begin; row < end; row++) {
    at.move(linear, row);
    const uint16_t* scales = (const uint16_t*)linear.scales + row * groups;
    each_tile(count, [&](int first, int rows) {
      const auto tile = rows == 4   ? multiply_row<PLANES, DIGITS, 4>
                        : rows == 2 ? multiply_row<PLANES, DIGITS, 2>
                                    : multiply_row<PLANES, DIGITS, 1>;
      float results[TILE];
      tile(plan, Prepared(plan, memory, count, first), at.planes, scales, results);
      for (int m = 0; m < rows; m++)
        y[(size_t)(first + m) * linear.rows + row] = results[m] + (linear.bias ? linear.bias[row] : 0);
    });
  }
}

template <int PLANES>
void multiply_planes(const Linear& linear, const void* memory, int count, float* y, size_t begin, size_t end) {
  const int digits = digits_of(linear);
  const auto rows = digits == 1   ? multiply_rows<PLANES, 1>
                    : digits == 2 ? multiply_rows<PLANES, 2>
                                  : multiply_rows<PLANES, 3>;
  rows(linear, memory, count, y, begin, end);
}

#define FOR_PLANES(function, planes)                                                                             \
  (planes == 2   ? function<2>                                                                                   \
   : planes == 3 ? function<3>                                                                                   \
   : planes == 4 ? function<4>                                                                                   \
   : planes == 5 ? function<5>                                                                                   \
   : planes == 6 ? function<6>                                                                                   \
   : planes == 7 ? function<7>                                                                                   \
                 : function<8>)

void multiply(const Linear& linear, const void* memory, int count, float* y, int thread, int threads) {
  const size_t begin = (size_t)linear.rows * thread / threads, end = (size_t)linear.rows * (thread + 1) / threads;
  FOR_PLANES(multiply_planes, linear.bits)(linear, memory, count, y, begin, end);
}

const Register planes(PLANES, {scratch, prepare, multiply});

}  // namespace

}  // namespace compress
