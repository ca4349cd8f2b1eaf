// Strips of codes as blocks of numbers, for products with many rows.
#include "codes.h"
#include "gemm.h"

namespace compress {

Dequantiser dequantisers[KINDS];

namespace {

int chunk(const Linear& linear) { return chunk_of(linear.bits); }

typedef uint8_t Bytes __attribute__((vector_size(LANES)));

// s (q - z)
template <int BITS>
struct Integers {
  static constexpr int WIDTH = BITS;
  const Linear& linear;
  Floats zeros;

  void start(size_t row) {
    Ints whole = Ints{} + (1 << (BITS - 1));
    if (linear.zeros) whole = __builtin_convertvector(load<Bytes>(linear.zeros + row), Ints);
    zeros = __builtin_convertvector(whole + 256, Floats);
  }
  // The byte becomes the upper bits of the mantissa of a number from 256 to 511, which saves a conversion.
  template <int BYTE>
  COMPRESS_INLINE Floats value(Words codes) const {
    Words moved = BYTE < 2 ? codes << (15 - 8 * BYTE) : codes >> (8 * BYTE - 15);
    return (Floats)((moved & 0x007f8000) | 0x43800000) - zeros;
  }
};

// s table[q]
template <int BITS>
struct Numbers {
  static constexpr int WIDTH = BITS;
  const Linear& linear;
  float table[16];

  void start(size_t) {
    for (int code = 0; code < 16; code++) table[code] = linear.table[code & ((1 << BITS) - 1)];
  }
  template <int BYTE>
  COMPRESS_INLINE Floats value(Words codes) const {
    codes >>= 8 * BYTE;
#if defined(COMPRESS_AVX512)
    return (Floats)_mm512_permutexvar_ps((__m512i)codes, _mm512_loadu_ps(table));
#elif defined(COMPRESS_AVX2)
    __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)codes);
    __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)codes);
    return (Floats)_mm256_blendv_ps(low, high, (__m256)(codes << 28));
#else
    Floats values;
    for (int lane = 0; lane < LANES; lane++) values[lane] = table[codes[lane] & 15];
    return values;
#endif
  }
};

// s q, q in E4M3
struct Eights {
  static constexpr int WIDTH = 8;
  const Linear& linear;

  void start(size_t) {}
  template <int BYTE>
  COMPRESS_INLINE Floats value(Words codes) const {
    return e4m3_at(codes, BYTE) * E4M3_UNIT;
  }
};

template <class Values, Form form>
void write_form(const Linear& linear, int strip, int from, int to, char* block) {
  constexpr int CHUNK = chunk_of(Values::WIDTH), BYTES = CHUNK * Values::WIDTH * 2;
  const int group = ceil_div(linear.group, CHUNK), groups = ceil_div(linear.columns, linear.group);
  const int last = ceil_div(linear.columns - (groups - 1) * linear.group, CHUNK), chunks = (groups - 1) * group + last;
  const uint8_t* lines = (const uint8_t*)linear.codes[0] + (size_t)strip * chunks * BYTES;
  for (int v = 0; v < VECTORS; v++) {
    Values values{linear};
    Floats scales{};
    char* line = block + 4 * LANES * v;
    for (int c = from / CHUNK, before = -1; c < to / CHUNK; c++) {
      const uint8_t* chunk = lines + (size_t)c * BYTES + 4 * LANES * v;
      if (c / group != before) {
        before = c / group;
        size_t row = ((size_t)strip * groups + before) * STRIP + v * LANES;
        values.start(row);
        scales = scales_at(linear, row);
      }
#pragma GCC unroll 8
      for (int at = 0; at < CHUNK / 4; at++) {
        Words codes = codes_at<Values::WIDTH, CHUNK>([&](int line) { return load<Words>(chunk + 64 * line); }, at);
        Floats four[4] = {scales * values.template value<0>(codes), scales * values.template value<1>(codes),
                          scales * values.template value<2>(codes), scales * values.template value<3>(codes)};
        store_four<form>(four, line);
        line += 4 * bytes_of(form);
      }
    }
  }
}

// What 32 weights cost, in cycles of a core: a dot product of one digit of the codes with one of the activations (see
// integer.cpp), for each row; the way into a block; and the product with the block, for each row.
struct Costs {
  float dot, block, row;
};

Costs costs_of([[maybe_unused]] const Linear& linear) {
  [[maybe_unused]] const bool pairs = form_of(linear) == PAIRS;
#if defined(__AMX_BF16__)
  return {0.6, 7.5, pairs ? 0.1f : 1.9f};
#elif defined(COMPRESS_AVX512)
  return {0.6, 7.5, pairs ? 1.0f : 1.9f};
#elif defined(COMPRESS_AVX2)
  return {linear.bits == 8 ? 3.0f : 1.5f, 11.5, 2.4};
#elif defined(__ARM_FEATURE_DOTPROD)
  return {1, 16, 4};
#else
  return {20, 16, 8};
#endif
}

bool pays(const Linear& linear, int count) {
  const int digits = linear.activations != FLOATING ? 1 : linear.type == FLOAT32 ? 3 : 2;
  const int dots = linear.kind == INTEGER ? digits : digits == 1 ? 2 : digits * (digits + 1) / 2;
  const Costs costs = costs_of(linear);
  return count * costs.dot * dots > costs.block + count * costs.row;
}

template <class Values>
void write(const Linear& linear, int strip, int from, int to, Form form, void* block) {
#if defined(COMPRESS_PAIRS)
  if (form == PAIRS) return write_form<Values, PAIRS>(linear, strip, from, to, (char*)block);
#endif
  write_form<Values, SINGLES>(linear, strip, from, to, (char*)block);
}

void write_integers(const Linear& linear, int strip, int from, int to, Form form, void* block) {
  static constexpr decltype(&write<Eights>) by_bits[] = {
      write<Integers<2>>, write<Integers<3>>, write<Integers<4>>, write<Integers<5>>,
      write<Integers<6>>, write<Integers<7>>, write<Integers<8>>};
  by_bits[linear.bits - 2](linear, strip, from, to, form, block);
}

void write_numbers(const Linear& linear, int strip, int from, int to, Form form, void* block) {
  auto of_bits = linear.bits == 2 ? write<Numbers<2>> : write<Numbers<4>>;
  of_bits(linear, strip, from, to, form, block);
}

const RegisterDequantiser integers(INTEGER, {chunk, write_integers, pays});
const RegisterDequantiser numbers(TABLE, {chunk, write_numbers, pays});
const RegisterDequantiser eights(FP8, {chunk, write<Eights>, [](const Linear&, int count) { return count >= 8; }});

}  // namespace
}  // namespace compress
