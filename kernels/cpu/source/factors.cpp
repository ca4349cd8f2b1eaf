// The blocks of BitStack (compress.quantization.bitstack), read as they are stored: y = sum_i (S_i * (a_i b_i)) x.
//
// One block and rank r give a_r * (S (b_r * x)), a sum of +-(b_r * x) over all columns for each row. A table holds, for
// four columns, the sums of all 16 patterns of signs for 16 ranks: 1 KiB. Then one row costs, for each four columns,
// one addition of 16 lanes from a place that half a byte of signs names. Additions of float32 are exact enough for all
// models, and cost as much as the products of int8 that they replace, which would need the bits as bytes. Tables of as
// many columns as fit into the first cache are made, and all rows of a thread run through them.
#include <memory>

#include "strips.h"

namespace compress {
namespace {

constexpr int RANKS = 16;          // that are summed up together
constexpr int COLUMNS = 128;       // whose tables are made together
constexpr int ROWS = 1024;         // that run through them
constexpr int PATTERNS = 16;       // of four signs

struct alignas(64) Lanes {  // one for each of 16 ranks
  Floats part[VECTORS];

  COMPRESS_INLINE void operator+=(const Lanes& other) {
    for (int v = 0; v < VECTORS; v++) part[v] += other.part[v];
  }
};

// The memory of a thread.
struct Tables {
  Lanes sums[ROWS];
  Lanes table[COLUMNS / 4][PATTERNS];
  float weighted[COLUMNS][RANKS];  // b * x
};

const uint16_t* halves(const void* from) { return (const uint16_t*)from; }

// b * x of some columns and ranks; the rest of the four columns that are begun gets 0.
void weigh(const Linear& linear, int block, int rank, const float* x, int column, int columns, Tables& to) {
  const int ranks = std::min(RANKS, linear.rank - rank), padded = ceil_div(columns, 8) * 8;
  std::memset(to.weighted, 0, sizeof(float) * RANKS * padded);
  for (int r = 0; r < ranks; r++) {
    const uint16_t* right = halves(linear.right[block]) + (size_t)(rank + r) * linear.columns + column;
    int c = 0;
    for (; c + LANES <= columns; c += LANES) {
      const Floats product = from_halves(right + c) * load<Floats>(x + column + c);
      for (int lane = 0; lane < LANES; lane++) to.weighted[c + lane][r] = product[lane];
    }
    for (; c < columns; c++) to.weighted[c][r] = from_half(right[c]) * x[column + c];
  }
}

// The sums of each pattern: bit 3 is the sign of the first of the four columns.
void tabulate(const float (*weighted)[RANKS], Lanes* table) {
  for (int v = 0; v < VECTORS; v++) {
    Floats w[4], sums[PATTERNS];
    for (int c = 0; c < 4; c++) w[c] = load<Floats>(weighted[c] + v * LANES);
    sums[0] = -(w[0] + w[1]) - (w[2] + w[3]);
    for (int bit = 0; bit < 4; bit++)
      for (int low = 0; low < 1 << bit; low++) sums[1 << bit | low] = sums[low] + 2 * w[3 - bit];
    for (int pattern = 0; pattern < PATTERNS; pattern++) table[pattern].part[v] = sums[pattern];
  }
}

// The sums that half a byte of the signs names, which begins `shift` bits after the lowest bit.
COMPRESS_INLINE const Lanes& named(const Lanes* table, uint32_t word, int shift) {
  static_assert(sizeof(Lanes) == 64);  // 2^6, so one shift gives an offset in bytes
  const uint32_t offset = (shift < 6 ? word << (6 - shift) : word >> (shift - 6)) & (PATTERNS - 1) << 6;
  return *(const Lanes*)((const char*)table + offset);
}

// Four columns of a table each, the high half of a byte first.
template <int BYTES>
COMPRESS_INLINE void add_bytes(const Lanes (*table)[PATTERNS], uint32_t word, Lanes (&sums)[4]) {
#pragma GCC unroll 4
  for (int k = 0; k < BYTES; k++) {
    sums[2 * k & 3] += named(table[2 * k], word, 8 * k + 4);
    sums[(2 * k + 1) & 3] += named(table[2 * k + 1], word, 8 * k);
  }
}

// All rows through the tables of some bytes of signs; WHOLE: of as many as there can be.
template <bool WHOLE>
void add_rows(const Linear& linear, const uint8_t* signs, int bytes, int rows, Tables& tables) {
  const size_t stride = ceil_div(linear.columns, 8);
  for (int row = 0; row < rows; row++, signs += stride) {
    Lanes sums[4] = {tables.sums[row]};
    if constexpr (WHOLE) {
#pragma GCC unroll 4
      for (int k = 0; k < COLUMNS / 8; k += 4) add_bytes<4>(tables.table + 2 * k, load<uint32_t>(signs + k), sums);
    } else {
      for (int k = 0; k < bytes; k++) add_bytes<1>(tables.table + 2 * k, signs[k], sums);
    }
    sums[0] += sums[1], sums[2] += sums[3], sums[0] += sums[2];
    tables.sums[row] = sums[0];
  }
}

// y += a * sums.
void finish_rows(const Linear& linear, int block, int rank, int first, int rows, const Tables& tables, float* y) {
  const int ranks = std::min(RANKS, linear.rank - rank);
  for (int row = 0; row < rows; row++) {
    const uint16_t* left = halves(linear.left[block]) + (size_t)(first + row) * linear.rank + rank;
    float sums[RANKS], total = 0;
    std::memcpy(sums, &tables.sums[row], sizeof sums);
    for (int r = 0; r < ranks; r++) total += from_half(left[r]) * sums[r];
    y[first + row] += total;
  }
}

// Some ranks of a block, some rows of W and one row of activations.
void add_product(const Linear& linear, int block, int rank, const float* x, int first, int rows, Tables& tables, float* y) {
  const uint8_t* signs = (const uint8_t*)linear.codes[block] + (size_t)first * ceil_div(linear.columns, 8);
  std::memset((void*)tables.sums, 0, sizeof(Lanes) * rows);
  for (int column = 0; column < linear.columns; column += COLUMNS) {
    const int columns = std::min(COLUMNS, linear.columns - column), bytes = ceil_div(columns, 8);
    weigh(linear, block, rank, x, column, columns, tables);
    for (int four = 0; four < 2 * bytes; four++) tabulate(tables.weighted + 4 * four, tables.table[four]);
    const auto add = columns == COLUMNS ? add_rows<true> : add_rows<false>;
    add(linear, signs + column / 8, bytes, rows, tables);
  }
  finish_rows(linear, block, rank, first, rows, tables, y);
}

void by_tables(const Linear& linear, const float* x, int count, float* y, int begin, int end) {
  const std::unique_ptr<Tables> tables(new Tables);
  for (int m = 0; m < count; m++, x += linear.columns, y += linear.rows) {
    for (int row = begin; row < end; row++) y[row] = linear.bias ? linear.bias[row] : 0;
    for (int first = begin; first < end; first += ROWS)
      for (int block = 0; block < linear.blocks; block++)
        for (int rank = 0; rank < linear.rank; rank += RANKS)
          add_product(linear, block, rank, x, first, std::min(ROWS, end - first), *tables, y);
  }
}

size_t scratch(const Linear& linear, int count) { return to_line(sizeof(float) * count * linear.columns); }

void prepare(const Linear& linear, const float* x, int count, void* memory) {
  std::memcpy(memory, x, sizeof(float) * count * linear.columns);
}

void multiply(const Linear& linear, const void* memory, int count, float* y, int thread, int threads) {
  const int begin = (int64_t)linear.rows * thread / threads, end = (int64_t)linear.rows * (thread + 1) / threads;
  by_tables(linear, (const float*)memory, count, y, begin, end);
}

const Register factors(FACTORS, {scratch, prepare, multiply});

}  // namespace

}  // namespace compress
