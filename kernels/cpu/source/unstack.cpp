// Stacks as blocks of numbers, for products with many rows. 32 columns of a strip are written at once, with a row in a
// lane: a word of each row holds the signs, from the highest bit on.
#include <vector>

#include "gemm.h"

namespace compress {
namespace {

constexpr int WIDE = 32;  // columns

int chunk(const Linear&) { return WIDE; }

// The bits of WIDE columns from a given one in the rows of a strip; rows and columns that do not exist have any.
struct Bits {
  Words words[VECTORS];

  void read(const Linear& linear, const void* plane, int strip, int column) {
    const size_t stride = ceil_div(linear.columns, 8), byte = column / 8;
    const int rows = std::min(STRIP, linear.rows - strip * STRIP);
    const uint8_t* at = (const uint8_t*)plane + (size_t)strip * STRIP * stride + byte;
    uint32_t found[STRIP] = {};
    if (byte + 8 <= stride) {
      for (int row = 0; row < rows; row++) found[row] = first_bits(at + row * stride, column % 8);
    } else {
      for (int row = 0; row < rows; row++) {
        uint8_t some[8] = {};
        std::memcpy(some, at + row * stride, stride - byte);
        found[row] = first_bits(some, column % 8);
      }
    }
    for (int v = 0; v < VECTORS; v++) words[v] = load<Words>(found + v * LANES);
  }

  static uint32_t first_bits(const uint8_t* bytes, int skipped) {
    return __builtin_bswap64(load<uint64_t>(bytes)) << skipped >> 32;
  }
};

// A column of a strip of float16 numbers, whose rows are a stride apart.
void gather(const uint16_t* from, size_t stride, int rows, float* to) {
  for (int row = 0; row < STRIP; row++) to[row] = row < rows ? from_half(from[row * stride]) : 0;
}

// 32 columns of a strip, with their scales.
template <Form form, int PLANES>
void write_wide(const Linear& linear, int strip, int column, const float* scales, char* block) {
  constexpr float top = (float)((1 << PLANES) - 1) / 2, unit = 2.0f / (1 << (PLANES - 1));
  Bits planes[PLANES];
  for (int j = 0; j < PLANES; j++) planes[j].read(linear, linear.codes[j], strip, column);
  for (int v = 0; v < VECTORS; v++) {
    const Floats scale = load<Floats>(scales + v * LANES) * unit;
    for (int first = 0; first < WIDE; first += 4) {
      Floats four[4];
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        Ints code{};
#pragma GCC unroll 8
        for (int j = 0; j < PLANES; j++) code = code + code - ((Ints)(planes[j].words[v] << (first + k)) >> 31);
        four[k] = scale * (__builtin_convertvector(code, Floats) - top);
      }
      store_four<form>(four, block + first * bytes_of(form) + v * 4 * LANES);
    }
  }
}

template <Form form>
void write_planes(const Linear& linear, int strip, int from, int to, char* block) {
  static constexpr decltype(&write_wide<form, 2>) by_planes[] = {
      write_wide<form, 2>, write_wide<form, 3>, write_wide<form, 4>, write_wide<form, 5>,
      write_wide<form, 6>, write_wide<form, 7>, write_wide<form, 8>};
  const int padded = ceil_div(linear.group, WIDE) * WIDE, groups = ceil_div(linear.columns, linear.group);
  const int rows = std::min(STRIP, linear.rows - strip * STRIP);
  float scales[STRIP];
  for (int at = from, before = -1; at < to; at += WIDE, block += (size_t)WIDE * bytes_of(form)) {
    const int group = at / padded, column = std::min(group * linear.group + at % padded, linear.columns - 1);
    if (group != before)
      gather((const uint16_t*)linear.scales + (size_t)strip * STRIP * groups + group, groups, rows, scales);
    before = group;
    by_planes[linear.bits - 2](linear, strip, column, scales, block);
  }
}

// The factors of a strip as numbers: a of each block and rank, and b of some columns.
struct Factors {
  std::vector<float> left, right;  // [blocks, ranks, STRIP], [ranks, WIDE]

  Factors(const Linear& linear, int strip)
      : left((size_t)linear.blocks * linear.rank * STRIP), right((size_t)linear.rank * WIDE) {
    const int rows = std::min(STRIP, linear.rows - strip * STRIP);
    float* to = left.data();
    for (int block = 0; block < linear.blocks; block++)
      for (int r = 0; r < linear.rank; r++, to += STRIP)
        gather((const uint16_t*)linear.left[block] + (size_t)strip * STRIP * linear.rank + r, linear.rank, rows, to);
  }

  void take(const Linear& linear, int block, int column) {
    const int columns = std::min(WIDE, linear.columns - column);
    for (int r = 0; r < linear.rank; r++) {
      uint16_t some[WIDE] = {};
      const uint16_t* row = (const uint16_t*)linear.right[block] + (size_t)r * linear.columns + column;
      std::memcpy(some, row, sizeof(uint16_t) * columns);
      for (int c = 0; c < WIDE; c += LANES) store(&right[r * WIDE + c], from_halves(some + c));
    }
  }
};

// Add the products of a and b in four columns of a strip, with their signs.
COMPRESS_INLINE void add_four(const Linear& linear, const float* left, const float* right, const Bits& signs, int first,
                              Floats (*sums)[VECTORS]) {
  Floats products[4][VECTORS] = {};
  for (int r = 0; r < linear.rank; r++)
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        products[k][v] += load<Floats>(left + r * STRIP + v * LANES) * right[r * WIDE + first + k];
#pragma GCC unroll 4
  for (int k = 0; k < 4; k++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++)
      sums[first + k][v] += (Floats)((Words)products[k][v] ^ (~(signs.words[v] << (first + k)) & 0x80000000u));
}

template <Form form>
void write_factors(const Linear& linear, int strip, int from, int to, char* block) {
  Factors factors(linear, strip);
  for (int column = from; column < to; column += WIDE, block += (size_t)WIDE * bytes_of(form)) {
    Floats sums[WIDE][VECTORS] = {};
    for (int b = 0; b < linear.blocks; b++) {
      Bits signs;
      signs.read(linear, linear.codes[b], strip, column);
      factors.take(linear, b, column);
      const float* left = factors.left.data() + (size_t)b * linear.rank * STRIP;
      for (int first = 0; first < WIDE; first += 4)
        add_four(linear, left, factors.right.data(), signs, first, sums);
    }
    for (int first = 0; first < WIDE; first += 4)
      for (int v = 0; v < VECTORS; v++) {
        const Floats four[4] = {sums[first][v], sums[first + 1][v], sums[first + 2][v], sums[first + 3][v]};
        store_four<form>(four, block + first * bytes_of(form) + v * 4 * LANES);
      }
  }
}

template <void (*Singles)(const Linear&, int, int, int, char*), void (*Pairs)(const Linear&, int, int, int, char*)>
void write(const Linear& linear, int strip, int from, int to, Form form, void* block) {
  (form == PAIRS ? Pairs : Singles)(linear, strip, from, to, (char*)block);
}

bool many_planes(const Linear&, int count) { return count > 8; }
bool many_factors(const Linear&, int count) { return count > 5; }

#if defined(COMPRESS_PAIRS)
const RegisterDequantiser planes(PLANES, {chunk, write<write_planes<SINGLES>, write_planes<PAIRS>>, many_planes});
const RegisterDequantiser factors(FACTORS, {chunk, write<write_factors<SINGLES>, write_factors<PAIRS>>, many_factors});
#else
const RegisterDequantiser planes(PLANES, {chunk, write<write_planes<SINGLES>, write_planes<SINGLES>>, many_planes});
const RegisterDequantiser factors(FACTORS, {chunk, write<write_factors<SINGLES>, write_factors<SINGLES>>, many_factors});
#endif

}  // namespace
}  // namespace compress
