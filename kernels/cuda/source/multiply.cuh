// Products with packed weights, for every way in which they are packed.
//
// A block takes 16 rows of the weight, and each of its warps every WARPS-th block of 128 columns. A lane holds 32
// neighbouring codes of two rows, straight from global memory in loads of 128 bits where the width allows. The
// order of columns within a product is free, as long as both operands have the same: so lane t of four has codes
// 32t to 32t + 31 (of 8 bits, 16t to 16t + 15 and 64 more), and tile j of the tensor cores takes 4j to 4j + 3 of each. Weights are the 16-row operand, so
// up to eight rows of the input cost one product, and each packed weight is read once for up to 64 rows.
#pragma once
#include "numbers.cuh"

namespace compress {
namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16, COLUMNS = 4 * CHUNK;

template <class Source>
struct Product {
  typename Source::Of weight;
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

// The first of the eight columns that lane t of four has as part `part` of four of a block of columns.
template <int BITS>
__device__ __forceinline__ int column_of(int block, int t, int part) {
  constexpr int PARTS = 4 / PIECES<BITS>, COLUMNS_OF_PIECE = 8 * PARTS;
  return block * COLUMNS + part / PARTS * 4 * COLUMNS_OF_PIECE + t * COLUMNS_OF_PIECE + part % PARTS * 8;
}

// What a lane holds of a row: 32 codes of a block of columns. All such sources of weights have the type Of of a
// description, TABLE entries of a table in shared memory (1: none), `read`, and `two` neighbouring weights. A block of threads takes
// at most MOST_TILES times eight rows of the input, which is what registers allow.
template <class Code>
struct Rows {
  using Of = Weight;
  static constexpr int BITS = Code::BITS, TABLE = Code::TABLE, MOST_TILES = 8;
  uint32_t words[BITS];
  Code levels[Code::SCALES];

  __device__ __forceinline__ explicit Rows(const float* table) {
#pragma unroll
    for (int i = 0; i < BITS; i++) words[i] = 0;
#pragma unroll
    for (int i = 0; i < Code::SCALES; i++) levels[i] = Code(table);
  }
  __device__ __forceinline__ static int column(int block, int t, int part) { return column_of<BITS>(block, t, part); }
  __device__ __forceinline__ void read(const Weight& w, int row, int block, int t) {
    const uint32_t* packed = w.packed + (int64_t)row * w.words;
#pragma unroll
    for (int piece = 0; piece < PIECES<BITS>; piece++)
      piece_words<BITS>(packed, column(block, t, piece * 4 / PIECES<BITS>), w.words, words, piece);
#pragma unroll
    for (int i = 0; i < Code::SCALES; i++) levels[i].read(w, row, column(block, t, i * 4 / Code::SCALES));
  }
  __device__ __forceinline__ void two(int at, float& first, float& second) const {
    const Code& level = levels[at / 8 * Code::SCALES / 4];
    first = level(code_of<BITS>(words, at)), second = level(code_of<BITS>(words, at + 1));
  }
};

template <class Source, class T, int TILES>
__global__ void __launch_bounds__(THREADS, TILES > 2 ? Source::MOST_TILES / 4 : 3) multiply(const Product<Source> p) {
  __shared__ float sums[WARPS][TILES * 4][32];
  __shared__ float table[Source::TABLE];
  const typename Source::Of& w = p.weight;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_input = blockIdx.y * TILES * 8;
  if constexpr (Source::TABLE > 1) {
    if (threadIdx.x < Source::TABLE) table[threadIdx.x] = w.table[threadIdx.x];
    __syncthreads();
  }
  float d[TILES][4];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[tile][i] = 0;
  for (int block = warp; block * COLUMNS < w.width; block += WARPS) {
    Source sides[2] = {Source(table), Source(table)};
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int row = first_row + g + 8 * side;
      if (row < w.out) sides[side].read(w, row, block, t);
    }
#pragma unroll
    for (int part = 0; part < 4; part++) {  // eight codes, which are two products
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float first, second;
        sides[i % 2].two(part * 8 + i / 2 % 2 * 2 + i / 4 * 4, first, second);
        a[i / 4][i % 4] = pair_of(first, second, T());
      }
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const int input = first_input + tile * 8 + g;
        uint32_t x[4] = {0, 0, 0, 0};
        if (input < p.rows)
          eight((const unsigned short*)p.input + (int64_t)input * w.width, Source::column(block, t, part), w.width, x);
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

template <class... Expected, class... Given>
cudaError_t launched(void (*kernel)(Expected...), dim3 grid, int threads, void* stream, Given... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

template <class Source, class T>
cudaError_t multiplied(const Product<Source>& p, void* stream) {
  constexpr int MOST_TILES = Source::MOST_TILES;
  const int tiles = min((p.rows + 7) / 8, MOST_TILES);
  const auto run = [&](auto kernel, int of) {
    const dim3 grid((p.weight.out + ROWS - 1) / ROWS, (p.rows + 8 * of - 1) / (8 * of));
    return launched(kernel, grid, THREADS, stream, p);
  };
  if (tiles == 1) return run(multiply<Source, T, 1>, 1);
  return tiles == 2 ? run(multiply<Source, T, 2>, 2) : run(multiply<Source, T, MOST_TILES>, MOST_TILES);
}

template <class Source>
cudaError_t multiplied_as(const Product<Source>& p, int type, void* stream) {
  if (type == FLOAT16) return multiplied<Source, half>(p, stream);
  return type == BFLOAT16 ? multiplied<Source, __nv_bfloat16>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace
}  // namespace compress
