// Products with packed weights (packed_linear) and rows of packed tables (packed_embedding), from canonical rows.
//
// A block takes 16 rows of the weight, and each of its warps every WARPS-th block of 128 columns. A lane holds 32
// neighbouring codes of two rows, straight from global memory in loads of 128 bits where the width allows. The
// order of columns within a product is free, as long as both operands have the same: so lane t of four has codes
// 32t to 32t + 31, and tile j of the tensor cores takes 4j to 4j + 3 of each. Weights are the 16-row operand, so
// up to eight rows of the input cost one product, and each packed weight is read once for up to 64 rows.
#include "numbers.cuh"

namespace compress {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16, COLUMNS = 4 * CHUNK, MOST_TILES = 8;

struct Product {
  Weight weight;
  const void* input;  // [rows, width]
  const void* bias;   // [out], or null
  void* output;       // [rows, out]
  int32_t rows, bias_type;
};

__device__ __forceinline__ uint32_t pair_of(float a, float b, half) {
  const half2 pair = __floats2half2_rn(a, b);
  return (uint32_t)__half_as_ushort(__high2half(pair)) << 16 | __half_as_ushort(__low2half(pair));
}
__device__ __forceinline__ uint32_t pair_of(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return (uint32_t)__bfloat16_as_ushort(__high2bfloat16(pair)) << 16 | __bfloat16_as_ushort(__low2bfloat16(pair));
}

// Eight numbers of an input row as pairs; those past the end are 0. Rows of whole vectors are read as such.
__device__ __forceinline__ void eight(const unsigned short* row, int at, int width, uint32_t (&to)[4]) {
  if (at + 8 <= width && (uintptr_t)(row + at) % 16 == 0) {
    const uint4 four = __ldg((const uint4*)(row + at));
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t low = at + 2 * i < width ? row[at + 2 * i] : 0;
    const uint32_t high = at + 2 * i + 1 < width ? row[at + 2 * i + 1] : 0;
    to[i] = high << 16 | low;
  }
}

template <int BITS, class T, int TILES>
__global__ void __launch_bounds__(THREADS, TILES == MOST_TILES ? 2 : 3) multiply(const Product p) {
  __shared__ float sums[WARPS][TILES * 4][32];
  __shared__ float table[1 << (BITS < 5 ? BITS : 1)];
  const Weight& w = p.weight;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_input = blockIdx.y * TILES * 8;
  if (w.table && threadIdx.x < (1 << BITS)) table[threadIdx.x] = w.table[threadIdx.x];
  __syncthreads();
  float d[TILES][4];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[tile][i] = 0;
  for (int block = warp; block * COLUMNS < w.width; block += WARPS) {
    const int chunk = block * 4 + t;
    const bool there = chunk * CHUNK < w.width;
    uint32_t words[2][BITS];
    Levels levels[2];
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int row = first_row + g + 8 * side;
#pragma unroll
      for (int i = 0; i < BITS; i++) words[side][i] = 0;
      levels[side] = {0.0f, 0.0f, w.table ? table : nullptr};
      if (there && row < w.out) {
        chunk_words<BITS>(w.packed + (int64_t)row * w.words, chunk, w.words, words[side]);
        levels[side] = levels_of<BITS>(w, row, chunk, levels[side].table);
      }
    }
#pragma unroll
    for (int part = 0; part < 4; part++) {  // eight codes, which are two products
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int side = i % 2, at = part * 8 + i / 2 % 2 * 2 + i / 4 * 4;
        a[i / 4][i % 4] = pair_of(levels[side](code_of<BITS>(words[side], at)),
                                  levels[side](code_of<BITS>(words[side], at + 1)), T());
      }
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const int input = first_input + tile * 8 + g;
        uint32_t x[4] = {0, 0, 0, 0};
        if (input < p.rows)
          eight((const unsigned short*)p.input + (int64_t)input * w.width, chunk * CHUNK + part * 8, w.width, x);
        const uint32_t first[2] = {x[0], x[1]}, second[2] = {x[2], x[3]};
        ptx::mma(d[tile], a[0], first, T());
        ptx::mma(d[tile], a[1], second, T());
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[warp][tile * 4 + i][lane] = d[tile][i];
  __syncthreads();
  for (int at = threadIdx.x; at < TILES * 8 * ROWS; at += THREADS) {
    const int row = at % ROWS, column = at / ROWS;  // of the fragment: row of the weight, row of the input
    const int from = row % 8 * 4 + column % 8 / 2, i = column / 8 * 4 + row / 8 * 2 + column % 2;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < WARPS; other++) sum += sums[other][i][from];
    const int to = first_row + row, input = first_input + column;
    if (to >= w.out || input >= p.rows) continue;
    if (p.bias) sum += number(p.bias, to, p.bias_type);
    ((T*)p.output)[(int64_t)input * w.out + to] = T(sum);
  }
}

// One block for each row that is asked for; every thread takes some chunks.
template <int BITS>
__global__ void __launch_bounds__(128) embed(const Weight w, const int64_t* rows, float* output) {
  const int64_t row = rows[blockIdx.x];
  float* to = output + (int64_t)blockIdx.x * w.width;
  for (int chunk = threadIdx.x; chunk * CHUNK < w.width; chunk += 128) {
    uint32_t words[BITS];
    chunk_words<BITS>(w.packed + row * w.words, chunk, w.words, words);
    const Levels levels = levels_of<BITS>(w, row, chunk, nullptr);
#pragma unroll
    for (int i = 0; i < CHUNK; i++)
      if (chunk * CHUNK + i < w.width) to[chunk * CHUNK + i] = levels(code_of<BITS>(words, i));
  }
}

template <class... Expected, class... Given>
cudaError_t launched(void (*kernel)(Expected...), dim3 grid, int threads, void* stream, Given... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

template <int BITS, class T>
cudaError_t multiplied(const Product& p, void* stream) {
  const int tiles = min((p.rows + 7) / 8, MOST_TILES);
  const auto run = [&](auto kernel, int of) {
    const dim3 grid((p.weight.out + ROWS - 1) / ROWS, (p.rows + 8 * of - 1) / (8 * of));
    return launched(kernel, grid, THREADS, stream, p);
  };
  if (tiles == 1) return run(multiply<BITS, T, 1>, 1);
  return tiles == 2 ? run(multiply<BITS, T, 2>, 2) : run(multiply<BITS, T, MOST_TILES>, MOST_TILES);
}

template <int BITS>
cudaError_t multiplied_as(const Product& p, int type, void* stream) {
  if (type == FLOAT16) return multiplied<BITS, half>(p, stream);
  return type == BFLOAT16 ? multiplied<BITS, __nv_bfloat16>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace
}  // namespace compress

using namespace compress;

// Output [rows, out] of `type`, which is that of the input: FLOAT16 or BFLOAT16. Tables have codes of 2 or 4 bits.
extern "C" int compress_cuda_packed_linear(const Weight* weight, const void* input, const void* bias, void* output,
                                           int rows, int type, int bias_type, void* stream) {
  const Product p{*weight, input, bias, output, rows, bias_type};
  switch (weight->bits) {
    case 2: return multiplied_as<2>(p, type, stream);
    case 3: return multiplied_as<3>(p, type, stream);
    case 4: return multiplied_as<4>(p, type, stream);
    case 5: return multiplied_as<5>(p, type, stream);
    case 6: return multiplied_as<6>(p, type, stream);
    case 7: return multiplied_as<7>(p, type, stream);
    case 8: return multiplied_as<8>(p, type, stream);
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
