// Products with codes that stand for numbers of a table (NF4, MXFP4, NVFP4) or are numbers themselves (E4M3).
#include "multiply.cuh"

using namespace compress;

// As compress_cuda_packed_linear: codes of 2 or 4 bits with a table, or those of 8 bits, which are E4M3.
extern "C" int compress_cuda_format_linear(const Weight* weight, const void* input, const void* bias, void* output,
                                           int rows, int type, int bias_type, void* stream) {
  const Product p{*weight, input, bias, output, rows, bias_type};
  switch (weight->bits) {
    case 2: return multiplied_as<LookedUp<2>>(p, type, stream);
    case 4: return multiplied_as<LookedUp<4>>(p, type, stream);
    case 8: return multiplied_as<Float8>(p, type, stream);
  }
  return cudaErrorInvalidValue;
}
