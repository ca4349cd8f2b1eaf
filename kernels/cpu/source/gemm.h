// Products with many rows of activations, for every kind of weight.
//
// A block of the weight is dequantised into a buffer that stays in the second-level cache, once for up to
// MOST_ROWS rows, and multiplied like a dense weight. How a kind is dequantised is all that it registers here.
#pragma once
#include "strips.h"

namespace compress {

#if defined(__AVX512BF16__)
#define COMPRESS_PAIRS  // of bfloat16 are multiplied with accumulation in float32, by vectors or by AMX tiles
#endif

// How a dequantised block lies in memory. PAIRS is what vdpbf16ps multiplies and what an AMX tile of weights holds.
enum Form {
  SINGLES,  // float32 [columns, 16 rows]
  PAIRS     // bfloat16 [columns / 2, 16 rows, 2], where column c of four goes with column c + 2
};

struct Dequantiser {
  // Each group of columns is padded to a multiple of this, at least 4. What the weights there are does not matter
  // as long as they are finite, because the activations there are 0.
  int (*chunk)(const Linear&);
  // Write the columns [from, to) of a strip, counted with the padding; both are multiples of the chunk.
  void (*write)(const Linear&, int strip, int from, int to, Form form, void* block);
  // Whether so many rows are multiplied faster this way than by the kernel of the kind.
  bool (*pays)(const Linear&, int count);
};

extern Dequantiser dequantisers[KINDS];  // null where a kind has none

struct RegisterDequantiser {
  RegisterDequantiser(Kind kind, Dequantiser dequantiser) { dequantisers[kind] = dequantiser; }
};

// The form of the blocks of a layer.
Form form_of(const Linear& linear);

// The functions for many rows of every kind that has a dequantiser.
extern const Kernel gemm;

// The whole product by all threads, for x [count, columns] and y [count, rows] of the type of the layer. It saves the
// way through float32, and the threads share the preparation.
void gemm_product(const Linear& linear, const void* x, void* y, int count, void* scratch);

#if defined(COMPRESS_PAIRS)
// Round to bfloat16: in each lane low | high << 16.
COMPRESS_INLINE Words pairs_of(Floats low, Floats high) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Words)_mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}
#endif

// Store four columns of LANES rows into a block; `line` is where the first column, or its pair, begins.
template <Form form>
COMPRESS_INLINE void store_four(const Floats* four, char* line) {
#if defined(COMPRESS_PAIRS)
  if (form == PAIRS) {
    store(line, pairs_of(four[0], four[2]));
    store(line + 64, pairs_of(four[1], four[3]));
    return;
  }
#endif
  for (int column = 0; column < 4; column++) store(line + 64 * column, four[column]);
}

// Bytes of a column of a block.
constexpr int bytes_of(Form form) { return form == PAIRS ? 32 : 64; }

}  // namespace compress
