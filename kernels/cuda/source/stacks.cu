// Products with weights in blocks, straight from the bits of their signs (see compress.kernels.stack_ops).
//
// Nested codes: the bits of all planes that belong to a column are put together to a code, and multiplied as such.
//
// Factors: a warp multiplies the factors of a block of the stack on tensor cores, 16 rows and 128 columns at a time,
// turns the signs around as the bits say, and adds what the next block gives. The sum lies in the lanes as the tensor
// cores want the weight of the product that follows, so the weight is never stored. The order of columns within a
// product is free: column n = 2t + e of tile j of step s is 32t + 8s + 4e + j. So a lane has the signs of its columns
// in one word, four neighbouring numbers of the right factor, and eight of the input.
#include "multiply.cuh"

namespace compress {
namespace {

constexpr int MOST_PLANES = 8, MOST_BLOCKS = 128, RANK = 16;

// compress.kernels.cuda.stacks mirrors these structs in ctypes.
struct Planes {
  const unsigned char* signs[MOST_PLANES];  // [out, pitch]: of each plane, the first bit of a byte is the highest
  const half* scales;                       // [out, groups]
  int32_t out, width, pitch, groups, group_size, count;  // group_size: a multiple of CHUNK, or the width
};

struct Factors {
  const unsigned char* signs[MOST_BLOCKS];  // [out, pitch]
  const half* left[MOST_BLOCKS];            // [out, rank]
  const half* right[MOST_BLOCKS];           // [rank, width]
  int32_t out, width, pitch, rank, count;
};

// The signs of 32 columns, of which the first is the lowest bit; those past the end of the row are 0.
__device__ __forceinline__ uint32_t signs_of(const unsigned char* row, int byte, int pitch) {
  uint32_t word = 0;
  if (byte + 4 <= pitch && (uintptr_t)(row + byte) % 4 == 0) {
    word = __ldg((const uint32_t*)(row + byte));
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) word |= byte + i < pitch ? (uint32_t)__ldg(row + byte + i) << 8 * i : 0;
  }
  return __byte_perm(__brev(word), 0, 0x0123);
}

// 32 codes of N planes of a row: code · scale - offset, where the first plane has the highest bit.
template <int N>
struct Nested {
  using Of = Planes;
  static constexpr int TABLE = 1, MOST_TILES = N > 6 ? 2 : 4;
  uint32_t bits[N][2];  // of columns 0 to 15, and 16 to 31: the even ones in the lower half, the odd ones in the upper
  float scale, offset;

  Nested() = default;
  __device__ __forceinline__ explicit Nested(const float*) : scale(0), offset(0) {
#pragma unroll
    for (int i = 0; i < N; i++) bits[i][0] = bits[i][1] = 0;
  }
  __device__ __forceinline__ static int column(int block, int t, int part) { return column_of<1>(block, t, part); }
  __device__ __forceinline__ void read(const Planes& w, int row, int block, int t) {
    const int first = column(block, t, 0);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint32_t word = signs_of(w.signs[i] + (int64_t)row * w.pitch, first / 8, w.pitch);
      const uint32_t even = word & 0x55555555, odd = word >> 1 & 0x55555555;
      bits[i][0] = __byte_perm(even, odd, 0x5410), bits[i][1] = __byte_perm(even, odd, 0x7632);
    }
    const int group = min(first / w.group_size, w.groups - 1);
    scale = __half2float(w.scales[(int64_t)row * w.groups + group]) * (4.0f / (1 << N));
    offset = scale * (0.5f * ((1 << N) - 1));
  }
  __device__ __forceinline__ void two(int at, float& first, float& second) const {
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const uint32_t word = bits[i][at / 16];
      const int place = N - 1 - i, by = at % 16 - place;
      codes |= (by < 0 ? word << -by : word >> by) & 0x00010001u << place;
    }
    first = (__uint_as_float(0x4b000000u | (codes & 0xffff)) - 8388608.0f) * scale - offset;
    second = (__uint_as_float(0x4b000000u | codes >> 16) - 8388608.0f) * scale - offset;
  }
};

// --- factors ---

constexpr int ROW_WARPS = 2, COLUMN_WARPS = WARPS / ROW_WARPS, STEPS = 1, FACTOR_TILES = 4;

struct FactorProduct {
  Factors weight;
  const void* input;  // [rows, width]
  const void* bias;   // [out], or null
  void* output;       // [rows, out]
  int32_t rows, bias_type;
};

// Two neighbouring numbers of a row of 16-bit numbers as a pair; those past its end are 0.
__device__ __forceinline__ uint32_t two_of(const half* row, int at, int count) {
  const unsigned short* from = (const unsigned short*)row;
  if (at + 2 <= count && (uintptr_t)(from + at) % 4 == 0) return __ldg((const uint32_t*)(from + at));
  return (at + 1 < count ? (uint32_t)__ldg(from + at + 1) << 16 : 0) | (at < count ? __ldg(from + at) : 0);
}

__device__ __forceinline__ uint2 four_of(const half* row, int at, int count) {
  if (at + 4 <= count && (uintptr_t)(row + at) % 8 == 0) return __ldg((const uint2*)(row + at));
  return make_uint2(two_of(row, at, count), two_of(row, at + 2, count));
}

// The sum of the blocks of a stack for 16 rows and STEPS steps of 128 columns: of a step and of tile j, as sums of tensor
// cores. All steps at once would take more registers than there are.
__device__ __forceinline__ void add_factors(const Factors& w, int first_row, int block, int first_step,
                                            int g, int t, float (&weight)[STEPS][4][4]) {
  for (int i = 0; i < w.count; i++) {
    uint32_t signs[2] = {0, 0};
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const int row = first_row + g + 8 * side;
      if (row < w.out)
        signs[side] = ~signs_of(w.signs[i] + (int64_t)row * w.pitch, block * (COLUMNS / 8) + t * 4, w.pitch);
    }
    for (int from = 0; from < w.rank; from += RANK) {
      uint32_t a[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int row = first_row + g + j % 2 * 8, at = from + t * 2 + j / 2 * 8;
        a[j] = row < w.out ? two_of(w.left[i] + (int64_t)row * w.rank, at, w.rank) : 0;
      }
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        const int s = first_step + step;
        uint2 b[4];  // of the ranks 2t, 2t + 1, 2t + 8 and 2t + 9
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int rank = from + t * 2 + j / 2 * 8 + j % 2, column = block * COLUMNS + g / 2 * 32 + s * 8 + g % 2 * 4;
          b[j] = rank < w.rank ? four_of(w.right[i] + (int64_t)rank * w.width, column, w.width) : make_uint2(0, 0);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const unsigned pick = j % 2 ? 0x7632 : 0x5410;
          const uint32_t pairs[2] = {j < 2 ? __byte_perm(b[0].x, b[1].x, pick) : __byte_perm(b[0].y, b[1].y, pick),
                                     j < 2 ? __byte_perm(b[2].x, b[3].x, pick) : __byte_perm(b[2].y, b[3].y, pick)};
          float sums[4] = {0, 0, 0, 0};
          ptx::mma(sums, a, pairs, half());
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const uint32_t turned = signs[k / 2] >> (s * 8 + k % 2 * 4 + j) << 31;  // where the bit is 0
            weight[step][j][k] += __uint_as_float(__float_as_uint(sums[k]) ^ turned);
          }
        }
      }
    }
  }
}

template <class T, int TILES>
__global__ void __launch_bounds__(THREADS, 1) multiply_factors(const FactorProduct p) {
  __shared__ float sums[WARPS][TILES * 4][32];
  const Factors& w = p.weight;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int first_row = (blockIdx.x * ROW_WARPS + warp % ROW_WARPS) * ROWS, first_input = blockIdx.y * TILES * 8;
  float d[TILES][4];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) d[tile][i] = 0;
  for (int block = warp / ROW_WARPS; block * COLUMNS < w.width; block += COLUMN_WARPS) {
#pragma unroll 1
    for (int first_step = 0; first_step < 4; first_step += STEPS) {
      float weight[STEPS][4][4];
#pragma unroll
      for (int i = 0; i < STEPS * 16; i++) weight[i / 16][i / 4 % 4][i % 4] = 0;
      add_factors(w, first_row, block, first_step, g, t, weight);
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        const int column = block * COLUMNS + t * 32 + (first_step + step) * 8;
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const float* pair = &weight[step][i / 4 * 2 + i / 2 % 2][i % 2 * 2];
          a[i / 4][i % 4] = pair_of(pair[0], pair[1], T());
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
          const int input = first_input + tile * 8 + g;
          uint32_t x[4] = {0, 0, 0, 0};
          if (input < p.rows) eight((const unsigned short*)p.input + (int64_t)input * w.width, column, w.width, x);
          const uint32_t first[2] = {__byte_perm(x[0], x[2], 0x5410), __byte_perm(x[0], x[2], 0x7632)};
          const uint32_t second[2] = {__byte_perm(x[1], x[3], 0x5410), __byte_perm(x[1], x[3], 0x7632)};
          ptx::mma(d[tile], a[0], first, T());
          ptx::mma(d[tile], a[1], second, T());
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
#pragma unroll
    for (int i = 0; i < 4; i++) sums[warp][tile * 4 + i][lane] = d[tile][i];
  __syncthreads();
  for (int at = threadIdx.x; at < TILES * 8 * ROWS * ROW_WARPS; at += THREADS) {
    const int row = at % (ROWS * ROW_WARPS), column = at / (ROWS * ROW_WARPS), inside = row % ROWS;
    const int from = inside % 8 * 4 + column % 8 / 2, i = column / 8 * 4 + inside / 8 * 2 + column % 2;
    float sum = 0;
#pragma unroll
    for (int other = 0; other < COLUMN_WARPS; other++) sum += sums[other * ROW_WARPS + row / ROWS][i][from];
    const int to = blockIdx.x * ROWS * ROW_WARPS + row, input = first_input + column;
    if (to >= w.out || input >= p.rows) continue;
    if (p.bias) sum += number(p.bias, to, p.bias_type);
    ((T*)p.output)[(int64_t)input * w.out + to] = T(sum);
  }
}

template <class T>
cudaError_t factors_multiplied(const FactorProduct& p, void* stream) {
  const auto run = [&](auto kernel, int of) {
    const dim3 grid((p.weight.out + ROWS * ROW_WARPS - 1) / (ROWS * ROW_WARPS), (p.rows + 8 * of - 1) / (8 * of));
    return launched(kernel, grid, THREADS, stream, p);
  };
  return p.rows <= 8 ? run(multiply_factors<T, 1>, 1) : run(multiply_factors<T, FACTOR_TILES>, FACTOR_TILES);
}

}  // namespace
}  // namespace compress

using namespace compress;

// Output [rows, out] of `type`, which is that of the input: FLOAT16 or BFLOAT16.
extern "C" int compress_cuda_plane_linear(const Planes* weight, const void* input, const void* bias, void* output,
                                          int rows, int type, int bias_type, void* stream) {
  const auto run = [&](auto source) {
    using Source = decltype(source);
    return multiplied_as(Product<Source>{*weight, input, bias, output, rows, bias_type}, type, stream);
  };
  switch (weight->count) {
    case 2: return run(Nested<2>());
    case 3: return run(Nested<3>());
    case 4: return run(Nested<4>());
    case 5: return run(Nested<5>());
    case 6: return run(Nested<6>());
    case 7: return run(Nested<7>());
    case 8: return run(Nested<8>());
  }
  return cudaErrorInvalidValue;
}

extern "C" int compress_cuda_factor_linear(const Factors* weight, const void* input, const void* bias, void* output,
                                           int rows, int type, int bias_type, void* stream) {
  const FactorProduct p{*weight, input, bias, output, rows, bias_type};
  if (type == FLOAT16) return factors_multiplied<half>(p, stream);
  return type == BFLOAT16 ? factors_multiplied<__nv_bfloat16>(p, stream) : cudaErrorInvalidValue;
}
