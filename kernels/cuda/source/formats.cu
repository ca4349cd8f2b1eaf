// Products with codes that stand for numbers of a table (NF4, MXFP4, NVFP4) or are numbers themselves (E4M3).
#include "multiply.cuh"

using namespace compress;

// As compress_cuda_packed_linear: codes of 2 or 4 bits with a table, or those of 8 bits, which are E4M3.
extern "C" int compress_cuda_format_linear(const Weight* weight, const void* input, const void* bias, void* output,
                                           int rows, int type, int bias_type, float* parts, int splits, void* stream) {
  const auto run = [&](auto code) {
    using Source = Rows<decltype(code)>;
    return multiplied_as(Product<Source>{*weight, input, bias, output, rows, bias_type, parts, splits}, type, stream);
  };
  switch (weight->bits) {
    case 2: return run(LookedUp<2>());
    case 4: return run(LookedUp<4>());
    case 8: return run(Float8());
  }
  return cudaErrorInvalidValue;
}
