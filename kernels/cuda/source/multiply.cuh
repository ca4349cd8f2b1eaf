// Products with packed weights, for every way in which they are packed.
//
// A lane holds 32 neighbouring codes of two rows, straight from global memory in loads of 128 bits where the width
// allows. The order of columns within a product is free, as long as both operands have the same: so lane t of four has
// codes 32t to 32t + 31 (of 8 bits, 16t to 16t + 15 and 64 more), and tile j of the tensor cores takes 4j to 4j + 3 of
// each. Weights are the 16-row operand, so up to eight rows of the input cost one product, and each packed weight is read
// once for up to 64 rows.
//
// Up to eight rows of the input (`multiply`): a block takes 16 rows of the weight, and each of its warps every WARPS-th
// block of 128 columns. Every block reads all of the input, which is little. More rows (`multiply_many`): a block takes 64 rows of
// the weight, 16 for each warp, and its warps share the input in shared memory. So it is read a quarter as often: the
// second-level cache would else give more of it than memory gives of the weight.
//
// Weights are scaled before they are multiplied, because neighbouring lanes may have columns of different groups.
//
// Where there are too few blocks to fill a GPU, several share the columns (blockIdx.z); `add_parts` adds their sums.
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
  float* parts = nullptr;  // [splits, rows, out]: sums that are still to be added, if splits > 1
  int32_t splits = 1;
};

// Puts a sum into the output, or among the parts.
template <class T, class Source>
__device__ __forceinline__ void put(const Product<Source>& p, float sum, int row, int input) {
  const int64_t at = (int64_t)input * p.weight.out + row;
  if (p.splits > 1) {
    p.parts[(int64_t)blockIdx.z * p.rows * p.weight.out + at] = sum;
  } else {
    if (p.bias) sum += number(p.bias, row, p.bias_type);
    ((T*)p.output)[at] = T(sum);
  }
}

template <class T>
__global__ void __launch_bounds__(256) add_parts(const float* parts, int splits, int rows, int out, const void* bias,
                                                 int bias_type, T* output) {
  const int64_t all = (int64_t)rows * out, at = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (at >= all) return;
  float sum = bias ? number(bias, at % out, bias_type) : 0;
  for (int split = 0; split < splits; split++) sum += parts[split * all + at];
  output[at] = T(sum);
}

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
// description, TABLE entries of a table in shared memory (1: none), `read`, and `two` neighbouring weights. A block of
// threads takes at most MOST_TILES times eight rows of the input, which is what registers allow.
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

// The operand of two products from eight weights of a lane in each of two rows: a[product][register].
template <class T, class Source>
__device__ __forceinline__ void weights_of(const Source (&sides)[2], int part, uint32_t (&a)[2][4]) {
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float first, second;
    sides[i % 2].two(part * 8 + i / 2 % 2 * 2 + i / 4 * 4, first, second);
    a[i / 4][i % 4] = pair_of(first, second, T());
  }
}

template <class T>
__device__ __forceinline__ void multiply_eight(float (&d)[4], const uint32_t (&a)[2][4], const uint32_t (&x)[4]) {
  const uint32_t first[2] = {x[0], x[1]}, second[2] = {x[2], x[3]};
  ptx::mma(d, a[0], first, T());
  ptx::mma(d, a[1], second, T());
}

template <class Source, class T, int TILES>
__global__ void __launch_bounds__(THREADS, TILES > 2 ? Source::MOST_TILES / 4 : TILES == Source::MOST_TILES ? 2 : 3)
    multiply(const Product<Source> p) {
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
  for (int block = blockIdx.z * WARPS + warp; block * COLUMNS < w.width; block += p.splits * WARPS) {
    Source sides[2] = {Source(table), Source(table)};
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int row = first_row + g + 8 * side;
      if (row < w.out) sides[side].read(w, row, block, t);
    }
#pragma unroll
    for (int part = 0; part < 4; part++) {  // eight codes, which are two products
      uint32_t a[2][4];
      weights_of<T>(sides, part, a);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const int input = first_input + tile * 8 + g;
        uint32_t x[4] = {0, 0, 0, 0};
        if (input < p.rows)
          eight((const unsigned short*)p.input + (int64_t)input * w.width, Source::column(block, t, part), w.width, x);
        multiply_eight<T>(d[tile], a, x);
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
    if (to < w.out && input < p.rows) put<T>(p, sum, to, input);
  }
}

constexpr int MANY_WARPS = 4, MANY_THREADS = 32 * MANY_WARPS, MANY_ROWS = 16 * MANY_WARPS;
constexpr int VECTORS = COLUMNS / 8;  // of eight numbers, in a block of columns

// Blocks of columns of the input that are in shared memory at a time: at most 32 KiB.
template <int TILES>
constexpr int STAGES = TILES == 8 ? 2 : 4;

// Where a vector of the input lies in a stage: part `part` of lane t in row `row`. Those that eight lanes ask for at a
// time lie in different banks.
__device__ __forceinline__ int place_of(int row, int part, int t) {
  return row * VECTORS + ((part * 4 + t) ^ (row % 2 * 4));
}

template <class Source, class T, int TILES>
__global__ void __launch_bounds__(MANY_THREADS, Source::BITS > 6 && TILES > 4 ? 3 : 4)
    multiply_many(const Product<Source> p) {
  __shared__ uint4 stages[STAGES<TILES>][TILES * 8 * VECTORS];
  __shared__ float table[Source::TABLE];
  const typename Source::Of& w = p.weight;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * MANY_ROWS + warp * 16, first_input = blockIdx.y * TILES * 8;
  const int blocks = (w.width + COLUMNS - 1) / COLUMNS, share = (blocks + p.splits - 1) / p.splits;
  const int begin = blockIdx.z * share, end = min(begin + share, blocks);
  if constexpr (Source::TABLE > 1) {
    if (threadIdx.x < Source::TABLE) table[threadIdx.x] = w.table[threadIdx.x];
    __syncthreads();
  }
  const auto fetch = [&](int block) {
    uint4* stage = stages[block % STAGES<TILES>];
    for (int i = threadIdx.x; block < end && i < TILES * 8 * VECTORS; i += MANY_THREADS) {
      const int row = i / VECTORS, part = i % VECTORS / 4, of = i % 4;
      const int input = first_input + row, column = Source::column(block, of, part);
      const bool present = input < p.rows && column < w.width;
      const int64_t at = present ? (int64_t)input * w.width + column : 0;
      ptx::copy_async16(stage + place_of(row, part, of), (const unsigned short*)p.input + at, present);
    }
    ptx::copy_async_commit();
  };
  const auto read = [&](Source(&sides)[2], int block) {
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int row = first_row + g + 8 * side;
      if (row < w.out && block < end) sides[side].read(w, row, block, t);
    }
  };
  float d[TILES][4];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[tile][i] = 0;
#pragma unroll
  for (int ahead = 0; ahead < STAGES<TILES> - 1; ahead++) fetch(begin + ahead);
  Source sides[2] = {Source(table), Source(table)};
  read(sides, begin);
  for (int block = begin; block < end; block++) {
    ptx::copy_async_wait<STAGES<TILES> - 2>();
    __syncthreads();  // the copies of all threads are there, and nobody reads the stage before any more
    fetch(block + STAGES<TILES> - 1);
    Source next[2] = {Source(table), Source(table)};
    read(next, block + 1);
    const uint4* stage = stages[block % STAGES<TILES>];
#pragma unroll
    for (int part = 0; part < 4 && first_row < w.out; part++) {
      uint32_t a[2][4];
      weights_of<T>(sides, part, a);
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        const uint4 four = stage[place_of(tile * 8 + g, part, t)];
        const uint32_t x[4] = {four.x, four.y, four.z, four.w};
        multiply_eight<T>(d[tile], a, x);
      }
    }
    sides[0] = next[0], sides[1] = next[1];
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = first_row + g + i / 2 * 8, input = first_input + tile * 8 + 2 * t + i % 2;
      if (row < w.out && input < p.rows) put<T>(p, d[tile][i], row, input);
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

// Whether many rows can be copied to shared memory in vectors.
template <class Source>
bool in_vectors(const Product<Source>& p) {
  return p.weight.width % 8 == 0 && (uintptr_t)p.input % 16 == 0;
}

template <class Source, class T>
cudaError_t multiplied(const Product<Source>& p, void* stream) {
  constexpr int MOST_TILES = Source::MOST_TILES;
  const int tiles = min((p.rows + 7) / 8, MOST_TILES);
  const auto run = [&](auto kernel, int of, int rows, int threads) {
    const dim3 grid((p.weight.out + rows - 1) / rows, (p.rows + 8 * of - 1) / (8 * of), p.splits);
    return launched(kernel, grid, threads, stream, p);
  };
  const auto start = [&] {
    if (tiles == 1) return run(multiply<Source, T, 1>, 1, ROWS, THREADS);
    if constexpr (MOST_TILES == 8) {
      if (in_vectors(p) && tiles == 2) return run(multiply_many<Source, T, 2>, 2, MANY_ROWS, MANY_THREADS);
      if (in_vectors(p) && tiles <= 4) return run(multiply_many<Source, T, 4>, 4, MANY_ROWS, MANY_THREADS);
      if (in_vectors(p)) return run(multiply_many<Source, T, 8>, 8, MANY_ROWS, MANY_THREADS);
    }
    if (tiles == 2) return run(multiply<Source, T, 2>, 2, ROWS, THREADS);
    return run(multiply<Source, T, MOST_TILES>, MOST_TILES, ROWS, THREADS);
  };
  const cudaError_t error = start();
  if (error != cudaSuccess || p.splits == 1) return error;
  const dim3 grid(((int64_t)p.rows * p.weight.out + 255) / 256);
  return launched(add_parts<T>, grid, 256, stream, (const float*)p.parts, p.splits, p.rows, p.weight.out, p.bias,
                  p.bias_type, (T*)p.output);
}

template <class Source>
cudaError_t multiplied_as(const Product<Source>& p, int type, void* stream) {
  if (type == FLOAT16) return multiplied<Source, half>(p, stream);
  return type == BFLOAT16 ? multiplied<Source, __nv_bfloat16>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace
}  // namespace compress
