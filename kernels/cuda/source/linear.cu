// Products with integer codes (packed_linear) and rows of packed tables (packed_embedding), from canonical rows.
#include "multiply.cuh"

namespace compress {
namespace {

// One block for each row that is asked for; every thread takes some chunks.
template <int BITS>
__global__ void __launch_bounds__(128) embed(const Weight w, const int64_t* rows, float* output) {
  const int64_t row = rows[blockIdx.x];
  float* to = output + (int64_t)blockIdx.x * w.width;
  for (int chunk = threadIdx.x; chunk * CHUNK < w.width; chunk += 128) {
    uint32_t words[BITS];
#pragma unroll
    for (int piece = 0; piece < PIECES<BITS>; piece++)
      piece_words<BITS>(w.packed + row * w.words, chunk * CHUNK + piece * CHUNK / PIECES<BITS>, w.words, words, piece);
    Integer<BITS> levels(nullptr);
    levels.read(w, row, chunk * CHUNK);
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
      if (chunk * CHUNK + i < w.width) to[chunk * CHUNK + i] = levels(code_of<BITS>(words, i));
  }
}

}  // namespace
}  // namespace compress

using namespace compress;

// Output [rows, out] of `type`, which is that of the input: FLOAT16 or BFLOAT16.
extern "C" int compress_cuda_packed_linear(const Weight* weight, const void* input, const void* bias, void* output,
                                           int rows, int type, int bias_type, float* parts, int splits, void* stream) {
  const auto run = [&](auto code) {
    using Source = Rows<decltype(code)>;
    return multiplied_as(Product<Source>{*weight, input, bias, output, rows, bias_type, parts, splits}, type, stream);
  };
  switch (weight->bits) {
    case 2: return run(Integer<2>());
    case 3: return run(Integer<3>());
    case 4: return run(Integer<4>());
    case 5: return run(Integer<5>());
    case 6: return run(Integer<6>());
    case 7: return run(Integer<7>());
    case 8: return run(Integer<8>());
  }
  return cudaErrorInvalidValue;
}

// Float rows [count, width] of a table of codes.
extern "C" int compress_cuda_packed_embedding(const Weight* weight, const int64_t* rows, int count, float* output,
                                              void* stream) {
  const auto run = [&](auto kernel) { return launched(kernel, dim3(count), 128, stream, *weight, rows, output); };
  switch (weight->bits) {
    case 2: return run(embed<2>);
    case 3: return run(embed<3>);
    case 4: return run(embed<4>);
    case 5: return run(embed<5>);
    case 6: return run(embed<6>);
    case 7: return run(embed<7>);
    case 8: return run(embed<8>);
  }
  return cudaErrorInvalidValue;
}
