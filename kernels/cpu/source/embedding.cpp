// Some rows of a weight in strips, dequantised in float32: the rows of a token table.
#include <omp.h>

#include <vector>

#include "gemm.h"

using namespace compress;

// Rows [count] of the weight, given by their numbers, as float32 [count, columns].
extern "C" void compress_rows(const Linear* linear, const int64_t* rows, int64_t count, float* to) {
  const Linear& l = *linear;
  const Dequantiser& dequantiser = dequantisers[l.kind];
  const int chunk = dequantiser.chunk(l), groups = ceil_div(l.columns, l.group);
  const int group = ceil_div(l.group, chunk) * chunk, last = l.columns - (groups - 1) * l.group;
  const int padded = (groups - 1) * group + ceil_div(last, chunk) * chunk;
#pragma omp parallel if (count >= 16)
  {
    std::vector<float> block((size_t)padded * STRIP);
#pragma omp for
    for (int64_t i = 0; i < count; i++) {
      dequantiser.write(l, (int)(rows[i] / STRIP), 0, padded, SINGLES, block.data());
      float* row = to + i * l.columns;
      for (int column = 0; column < l.columns; column++)
        row[column] = block[(size_t)(column / l.group * group + column % l.group) * STRIP + rows[i] % STRIP];
    }
  }
}
