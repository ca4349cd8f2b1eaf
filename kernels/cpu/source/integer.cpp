// Products of integer codes with activations: INTEGER, and TABLE after a look-up.
//
// Activations become integers, too. Each block of columns has one scale for them, and an integer is written with one
// to three digits of base 256, each a signed byte: one for int8 activations, two for a model in 16 bits, three for
// float32. Then every product is a sum of dot products of bytes, which are exact, and the error is that of the
// rounding to the block's largest value: 2^-16 or 2^-24 of it. Dot products of bytes do twice the work of those of
// bfloat16 in the same time, and codes need no conversion.
//
// The numbers of a table become unsigned integers as well, with one to three digits of base 128 (see Levels).
#include <cfloat>

#include "codes.h"
#include "strips.h"

namespace compress {
namespace {

constexpr int FINE = 128;     // most columns that share a scale of floating activations
constexpr int LONG = 16384;   // most columns whose products surely fit into 32 bits

// Columns that are summed up in integers: a group, or a part of one.
struct Block {
  int32_t group, column, columns, chunks;
};

int most_columns(const Linear& linear) { return linear.activations == FLOATING ? FINE : LONG; }
int digits_of(const Linear& linear) { return linear.activations != FLOATING ? 1 : linear.type == FLOAT32 ? 3 : 2; }

template <class Visit>
void each_block(const Linear& linear, Visit visit) {
  int chunk = chunk_of(linear.bits), most = most_columns(linear);
  for (int start = 0; start < linear.columns; start += linear.group)
    for (int end = std::min(start + linear.group, linear.columns), at = start; at < end; at += most)
      visit(Block{start / linear.group, at, std::min(most, end - at), ceil_div(std::min(most, end - at), chunk)});
}

// How the prepared activations lie in memory: the blocks, then for each tile of M rows the arrays scales [blocks, M],
// sums [blocks, digits, M] and x [columns / 4, digits, M], four columns in a word.
struct Plan {
  int blocks = 0, chunks = 0, digits;
  size_t words;  // of 32 bits, for each row

  explicit Plan(const Linear& linear) : digits(digits_of(linear)) {
    each_block(linear, [&](Block block) { blocks++, chunks += block.chunks; });
    words = blocks * (1 + digits) + (size_t)chunks * (chunk_of(linear.bits) / 4) * digits;
  }
  size_t head() const { return to_line(blocks * sizeof(Block)); }
};

size_t scratch(const Linear& linear, int count) {
  Plan plan(linear);
  return plan.head() + to_line(4 * plan.words * count);
}

// Write one block of one row as digits, the highest first: x[word][digit][row of M].
template <int DIGITS>
void write_digits(const float* from, int columns, int chunk, float scale, int M, int32_t* sums, uint32_t* x) {
  const float inverse = scale == 0 ? 0 : 1 / scale, divisor = scale == 0 ? FLT_MAX : scale;
  Ints total[DIGITS] = {};
  for (int at = 0; at < columns; at += chunk) {
    float padded[32];
    const float* source = from + at;
    if (columns - at < chunk) {
      std::fill(padded, padded + chunk, 0.0f);
      source = std::copy(source, from + columns, padded) - (columns - at);
    }
    for (int i = 0; i < chunk; i += LANES, x += LANES / 4 * DIGITS * M) {
      // With one digit ties are as frequent as in the reference, so they are rounded alike.
      Ints whole = rounded(DIGITS == 1 ? load<Floats>(source + i) / divisor : load<Floats>(source + i) * inverse);
#pragma GCC unroll 3
      for (int digit = DIGITS - 1; digit >= 0; digit--) {
        Ints low = (whole << 24) >> 24;
        total[digit] += low;
        whole = (whole - low) >> 8;
        uint32_t words[LANES / 4];
        store_bytes(words, low);
#pragma GCC unroll 4
        for (int word = 0; word < LANES / 4; word++) x[(word * DIGITS + digit) * M] = words[word];
      }
    }
  }
  for (int digit = 0; digit < DIGITS; digit++) sums[digit * M] = sum_of(total[digit]);
}

// What the largest activation becomes. With three digits it stays below the limit, because the quotient is rounded.
constexpr float STEPS[] = {127, 127 * 256 + 127, 127 * 65536};

// The largest magnitude among the activations that share a scale with those of a block.
float magnitude(const Linear& linear, const Block& block, const float* x, float of_row) {
  if (linear.activations == INT8_TOKEN) return of_row;
  if (linear.activations == FLOATING) return largest_magnitude(x + block.column, block.columns);
  int start = block.group * linear.group;
  return largest_magnitude(x + start, std::min(linear.group, linear.columns - start));
}

template <int DIGITS>
void prepare_row(const Linear& linear, const Plan& plan, const float* x, int M, float* scales) {
  int chunk = chunk_of(linear.bits);
  int32_t* sums = (int32_t*)scales + (size_t)plan.blocks * M;
  uint32_t* words = (uint32_t*)sums + (size_t)plan.blocks * DIGITS * M;
  float of_row = linear.activations == INT8_TOKEN ? largest_magnitude(x, linear.columns) + TOKEN_EPSILON : 0;
  each_block(linear, [&](Block block) {
    float scale = magnitude(linear, block, x, of_row) / STEPS[DIGITS - 1];
    if (scale < SMALLEST_SCALE) scale = 0;
    write_digits<DIGITS>(x + block.column, block.columns, chunk, scale, M, sums, words);
    *scales = scale;
    scales += M, sums += DIGITS * M, words += (size_t)block.chunks * (chunk / 4) * DIGITS * M;
  });
}

void prepare(const Linear& linear, const float* x, int count, void* memory) {
  Plan plan(linear);
  Block* blocks = (Block*)memory;
  each_block(linear, [&](Block block) { *blocks++ = block; });
  auto row = plan.digits == 1 ? prepare_row<1> : plan.digits == 2 ? prepare_row<2> : prepare_row<3>;
  each_tile(count, [&](int first, int rows) {
    float* tile = (float*)((char*)memory + plan.head()) + plan.words * first;
    for (int m = 0; m < rows; m++) row(linear, plan, x + (size_t)(first + m) * linear.columns, rows, tile + m);
  });
}

// The table as integers k, with table = unit (k - zero), and the digits of base 128 of each k, the highest first.
// If all numbers are multiples of the smallest, one digit is exact; else two serve 8 and 16 bits, and three float32.
struct Levels {
  static constexpr int UNITS = 256;
  int digits = 1;
  float unit = 1;
  int32_t zero = 0;  // in the highest digit
  uint8_t digit[3][16] = {};

  Levels(const float* table, int count, int most_digits) {
    float largest = 0, smallest = FLT_MAX, lowest = 0;
    for (int i = 0; i < count; i++) {
      float size = std::fabs(table[i]);
      largest = std::max(largest, size), lowest = std::min(lowest, table[i]);
      if (size > 0) smallest = std::min(smallest, size);
    }
    if (largest == 0) return;
    bool whole = largest / smallest <= 63;
    for (int i = 0; i < count; i++) {
      float multiple = table[i] / smallest;  // of numbers that have been divided by a scale, as those of NVFP4
      whole &= std::fabs(multiple - std::rint(multiple)) <= 1e-6f * std::fabs(multiple);
    }
    digits = whole ? 1 : most_digits;
    zero = whole ? (int32_t)std::rint(-lowest / smallest) : 64;
    int low = 7 * (digits - 1);
    unit = whole ? smallest : largest / ((64 << low) - 1);
    if (digits == 3) unit = best_unit(table, count, unit);
    for (int i = 0; i < count; i++) {
      int32_t k = (int32_t)std::rint(table[i] / unit) + (zero << low);
      for (int at = 0; at < digits; at++) digit[at][i] = k >> (7 * (digits - 1 - at)) & 127;
    }
  }

  // Of units up to a hundredth larger than the finest one, that whose multiples are nearest to all numbers, each error
  // taken relative to its number: a small one is only some ten thousand units large.
  static float best_unit(const float* table, int count, float finest) {
    float best = finest, least = FLT_MAX;
    for (int at = 0; at < UNITS; at++) {
      float unit = finest * (1 + at * (0.01f / UNITS)), worst = 0;
      for (int i = 0; i < count; i++) {
        float error = std::fabs((float)(std::rint((double)table[i] / unit) * unit - table[i]));
        worst = std::max(worst, table[i] == 0 ? 0 : error / std::fabs(table[i]));
      }
      if (worst < least) least = worst, best = unit;
    }
    return best;
  }
};

// 128^-i 256^-j, the weight of the product of digit i of a level and digit j of an activation.
constexpr float weight_of(int i, int j) { return 1.0f / (1ll << (7 * i + 8 * j)); }

// One strip times one tile of M rows. L: digits of a level, 0 if codes are multiplied as they are; X: of activations.
template <int BITS, int L, int X, int M>
void multiply_strip(const Linear& linear, const Levels& levels, const Block* blocks, const Plan& plan, const float* tile,
                    int strip, float* y) {
  constexpr int CHUNK = chunk_of(BITS), BYTES = CHUNK * BITS * 2, D = L ? L : 1;
  constexpr int COPIES = M * X * D >= 4 ? 1 : 4 / (M * X * D);  // sums that do not wait for each other
  const uint8_t* lines = (const uint8_t*)linear.codes[0] + (size_t)strip * plan.chunks * BYTES;
  const int32_t* sums = (const int32_t*)tile + (size_t)plan.blocks * M;
  const uint32_t* x = (const uint32_t*)sums + (size_t)plan.blocks * X * M;
  size_t groups = ceil_div(linear.columns, linear.group);
  Floats total[M][VECTORS] = {};
  for (int b = 0; b < plan.blocks; b++) {
    const int chunks = blocks[b].chunks;
    const size_t row = (strip * groups + blocks[b].group) * STRIP;
    for (int v = 0; v < VECTORS; v++) {
      Ints acc[COPIES][D][X][M] = {};
      for (int c = 0; c < chunks; c++) {
        const uint8_t* from = lines + c * BYTES + v * 4 * LANES;
        const uint32_t* words = x + c * (CHUNK / 4) * X * M;
        Words chunk[BYTES / 64];
#pragma GCC unroll 8
        for (int line = 0; line < BYTES / 64; line++) {
          chunk[line] = in_register(load<Words>(from + 64 * line));
          if (v == 0 && fetched_ahead(BITS, L)) __builtin_prefetch(from + AHEAD + 64 * line);
        }
#pragma GCC unroll 8
        for (int at = 0; at < CHUNK / 4; at++) {
          Words codes = codes_at<BITS, CHUNK>([&](int line) { return chunk[line]; }, at);
#pragma GCC unroll 3
          for (int i = 0; i < D; i++) {
            Words level = L ? look_up(levels.digit[i], codes) : codes;
#pragma GCC unroll 3
            for (int j = 0; j < X; j++)
              if (i + j < std::max(D, X))  // the rest is below the rounding
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) {
                  Ints& sum = acc[at % COPIES][i][j][m];
                  sum = dot<L ? 7 : BITS>(sum, level, Words{} + words[(at * X + j) * M + m]);
                }
          }
        }
      }
      Ints zeros = Ints{} + (L ? levels.zero : 1 << (BITS - 1));
      if (!L && linear.zeros) zeros = from_bytes(linear.zeros + row + v * LANES);
      Floats scales = scales_at(linear, row + v * LANES) * levels.unit;
      for (int m = 0; m < M; m++) {
        Floats product{};
        for (int i = 0; i < D; i++)
          for (int j = 0; j < X; j++) {
            Ints sum = acc[0][i][j][m];
            for (int copy = 1; copy < COPIES; copy++) sum += acc[copy][i][j][m];
            if (i == 0) sum -= zeros * sums[(b * X + j) * M + m];
            product += __builtin_convertvector(sum, Floats) * (1 / weight_of(D - 1 - i, X - 1 - j));
          }
        total[m][v] += scales * tile[b * M + m] * product;
      }
    }
    lines += (size_t)chunks * BYTES;
    x += (size_t)chunks * (CHUNK / 4) * X * M;
  }
  for (int m = 0; m < M; m++) finish(linear, strip, total[m], y + (size_t)m * linear.rows);
}

typedef void (*Multiply)(const Linear&, const Levels&, const Block*, const Plan&, const float*, int, float*);

template <int BITS, int L, int X>
Multiply for_rows(int rows) {
  if (rows == 4) return multiply_strip<BITS, L, X, 4>;
  return rows == 2 ? multiply_strip<BITS, L, X, 2> : multiply_strip<BITS, L, X, 1>;
}

template <int BITS, int L>
Multiply for_digits(int digits, int rows) {
  if (digits == 1) return for_rows<BITS, L, 1>(rows);
  return digits == 2 ? for_rows<BITS, L, 2>(rows) : for_rows<BITS, L, 3>(rows);
}

template <int BITS>
Multiply for_levels(int levels, int digits, int rows) {
  if (levels == 1) return for_digits<BITS, 1>(digits, rows);
  if (levels == 3) return for_rows<BITS, 3, 3>(rows);
  return digits == 1 ? for_rows<BITS, 2, 1>(rows) : for_rows<BITS, 2, 2>(rows);
}

Multiply choose(const Linear& linear, int levels, int digits, int rows) {
  if (linear.kind == TABLE) return linear.bits == 2 ? for_levels<2>(levels, digits, rows) : for_levels<4>(levels, digits, rows);
  switch (linear.bits) {
    case 2: return for_digits<2, 0>(digits, rows);
    case 3: return for_digits<3, 0>(digits, rows);
    case 4: return for_digits<4, 0>(digits, rows);
    case 5: return for_digits<5, 0>(digits, rows);
    case 6: return for_digits<6, 0>(digits, rows);
    case 7: return for_digits<7, 0>(digits, rows);
    default: return for_digits<8, 0>(digits, rows);
  }
}

void multiply(const Linear& linear, const void* memory, int count, float* y, int thread, int threads) {
  Plan plan(linear);
  const float* tiles = (const float*)((const char*)memory + plan.head());
  const Levels levels(linear.table, linear.kind == TABLE ? 1 << linear.bits : 0, plan.digits == 3 ? 3 : 2);
  Multiply by_rows[TILE + 1];
  for (int rows : {1, 2, 4}) by_rows[rows] = choose(linear, levels.digits, plan.digits, rows);
  each_strip(linear, thread, threads, [&](int strip) {
    each_tile(count, [&](int first, int rows) {
      by_rows[rows](linear, levels, (const Block*)memory, plan, tiles + plan.words * first, strip,
                    y + (size_t)first * linear.rows);
    });
  });
}

const Register integer(INTEGER, {scratch, prepare, multiply});
const Register table(TABLE, {scratch, prepare, multiply});

}  // namespace
}  // namespace compress
