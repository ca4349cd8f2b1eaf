// Keys and values in few bits: rounding them (kv_quantize), and attention over them (kv_attention).
//
// Codes lie as compress.kernels.cache_ops says: the row of a token is a dense little-endian stream of all its
// heads. Eight neighbouring codes of a head, a piece, are what a thread reads at once.
//
// Attention: a block takes one head of keys, up to ROWS rows of queries that share it, and a part of the tokens.
// It goes through them a tile at a time: scores (eight lanes for a token), softmax with a running maximum, and
// the sum of values (every thread has one piece of the width, and every so many tokens). Parts of the tokens are
// put together by a second kernel. Codes are read once, straight into registers, but not past the first-level
// cache, since the halves of a pair may share a sector.
#include "numbers.cuh"

namespace compress {

// compress.kernels.cuda.cache mirrors this struct in ctypes.
struct Attention {
  int32_t batch, heads, key_heads, queries, tokens, width, words;  // words: of a token's row
  int32_t key_scales, value_scales;                                // of a token: key_heads or 1
  int32_t rotated, rotations;                                      // width of cosines; their batch: 1 or batch
  int32_t mask_batch, mask_heads;                                  // 1, or batch and heads
  int32_t bits, splits, tiles;                                     // splits of the tokens, and tiles of each
  int32_t type, rotation_type;                                     // of query and output; of cosines and sines
  float scaling;
  const uint32_t *keys, *values;  // [batch, tokens, words]
  const float *scales_of_keys, *scales_of_values;
  const void *cosines, *sines;    // [rotations, tokens, rotated], or null
  const float* mask;              // [mask_batch, mask_heads, queries, tokens], added; null: causal
  const void* query;              // [batch, heads, queries, width]
  void* output;                   // [batch, queries, heads, width]
  float* partial;                 // [batch, queries, heads, splits, 2 + width], where there are splits
};

namespace {

constexpr int THREADS = 128, TILE = 64, PIECE = 8, LANES = 8;
constexpr float EPSILON = 1e-6f;  // added to the largest magnitude, as in compress.kernels.codes.minmax
// Numbers of a piece; those from `count` on are 0. Whole pieces that lie well are read as vectors.
__device__ __forceinline__ void numbers(const void* from, int64_t at, int count, int type, float (&to)[PIECE]) {
  const int size = type == FLOAT32 ? 4 : 2;
  const char* first = (const char*)from + at * size;
  uint32_t bits[PIECE];
  if (count == PIECE && (uintptr_t)first % 16 == 0) {
    const uint4 low = __ldg((const uint4*)first), high = size == 4 ? __ldg((const uint4*)first + 1) : low;
    const uint32_t words[PIECE] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < PIECE; i++) bits[i] = size == 4 ? words[i] : words[i / 2] >> 16 * (i % 2) & 0xffff;
  } else {
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
      bits[i] = 0;
      if (i < count) bits[i] = size == 4 ? ((const uint32_t*)first)[i] : ((const unsigned short*)first)[i];
    }
  }
#pragma unroll
  for (int i = 0; i < PIECE; i++) {
    if (type == FLOAT16) {
      to[i] = __half2float(__ushort_as_half((unsigned short)bits[i]));
    } else {
      to[i] = __uint_as_float(type == BFLOAT16 ? bits[i] << 16 : bits[i]);
    }
  }
}

// Codes first, first + 1, ... of a token's row, minus 2^(BITS - 1), as numbers; those from `count` on are 0.
template <int BITS>
__device__ __forceinline__ void codes(const uint32_t* row, int first, int count, float (&to)[PIECE]) {
  const int64_t bit = (int64_t)first * BITS;
  const uint32_t* from = row + bit / 32;
  const int shift = (int)(bit % 32), end = shift + count * BITS;
  uint32_t low, high = 0;
  if (PIECE * BITS == 64 && count == PIECE && bit % 64 == 0 && (uintptr_t)row % 8 == 0) {
    const uint2 both = __ldg((const uint2*)from);
    low = both.x, high = both.y;
  } else {
    const uint32_t a = __ldg(from), b = end > 32 ? __ldg(from + 1) : 0;
    low = __funnelshift_r(a, b, shift);
    if (PIECE * BITS > 32) high = __funnelshift_r(b, end > 64 ? __ldg(from + 2) : 0, shift);
  }
#pragma unroll
  for (int i = 0; i < PIECE; i++) {
    // A code of 3 bits may lie in both words, but eight of them fill no more than the first.
    const uint32_t word = i * BITS < 32 ? low >> i * BITS : high >> (i * BITS - 32);
    to[i] = i < count ? (float)((int)(word & ((1 << BITS) - 1)) - (1 << (BITS - 1))) : 0.0f;
  }
}

struct Part {
  int batch, head, first_row, rows, start, end;  // rows of queries; tokens
};

template <int ROWS>
__device__ __forceinline__ Part part_of(const Attention& a) {
  const int rows = a.heads / a.key_heads * a.queries, row_tiles = (rows + ROWS - 1) / ROWS;
  Part part;
  part.batch = blockIdx.z;
  part.head = blockIdx.y / row_tiles;
  part.first_row = blockIdx.y % row_tiles * ROWS;
  part.rows = min(ROWS, rows - part.first_row);
  part.start = blockIdx.x * a.tiles * TILE;
  part.end = min(a.tokens, part.start + a.tiles * TILE);
  return part;
}

// Row `row` of a part is query `row % queries` of head `row / queries` of those that share a head of keys.
__device__ __forceinline__ int head_of(const Attention& a, const Part& part, int row) {
  return part.head * (a.heads / a.key_heads) + (part.first_row + row) / a.queries;
}
__device__ __forceinline__ int query_of(const Attention& a, const Part& part, int row) {
  return (part.first_row + row) % a.queries;
}

// The products of the queries with the key of one token, of which this lane takes every LANES-th piece. All lanes
// of a warp come here, as they shuffle; those whose token is not there read nothing.
template <int BITS, int ROWS>
__device__ __forceinline__ void products(const Attention& a, const Part& part, const float* query, int token,
                                         bool there, int lane, float (&dots)[ROWS]) {
  const int half_width = there ? a.rotated / 2 : 0, width = there ? a.width : 0, first = part.head * a.width;
  const int64_t at = (int64_t)part.batch * a.tokens + token;
  const uint32_t* row = a.keys + at * a.words;
  const int64_t turn = ((int64_t)(a.rotations > 1 ? part.batch : 0) * a.tokens + token) * a.rotated;
#pragma unroll
  for (int r = 0; r < ROWS; r++) dots[r] = 0;
  for (int i = lane * PIECE; i < half_width; i += LANES * PIECE) {
    const int count = min(PIECE, half_width - i);
    float low[PIECE], high[PIECE], cosines[PIECE], sines[PIECE];
    codes<BITS>(row, first + i, count, low);
    codes<BITS>(row, first + half_width + i, count, high);
#pragma unroll 1
    for (int side = 0; side < 2; side++) {  // of the pairs
      const int from = side * half_width + i;
      numbers(a.cosines, turn + from, count, a.rotation_type, cosines);
      numbers(a.sines, turn + from, count, a.rotation_type, sines);
#pragma unroll
      for (int e = 0; e < PIECE; e++) {
        const float own = side ? high[e] : low[e], other = side ? low[e] : -high[e];
        const float turned = own * cosines[e] + other * sines[e];
#pragma unroll
        for (int r = 0; r < ROWS; r++)
          if (e < count) dots[r] += turned * query[r * a.width + from + e];
      }
    }
  }
  for (int i = 2 * half_width + lane * PIECE; i < width; i += LANES * PIECE) {
    const int count = min(PIECE, width - i);
    float key[PIECE];
    codes<BITS>(row, first + i, count, key);
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int e = 0; e < PIECE; e++)
        if (e < count) dots[r] += key[e] * query[r * a.width + i + e];
  }
  const float* scales = a.scales_of_keys + at * a.key_scales + (a.key_scales > 1 ? part.head : 0);
  const float scale = there ? a.scaling * __ldg(scales) : 0.0f;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    for (int offset = LANES / 2; offset; offset /= 2) dots[r] += __shfl_xor_sync(~0u, dots[r], offset);
    dots[r] *= scale;
  }
}

// What the mask adds to a score: minus infinity where a token is not seen.
__device__ __forceinline__ float masked(const Attention& a, const Part& part, int row, int token) {
  const int query = query_of(a, part, row);
  if (!a.mask) return token > a.tokens - a.queries + query ? -INFINITY : 0.0f;
  const int64_t of = (int64_t)(a.mask_batch > 1 ? part.batch : 0) * a.mask_heads +
                     (a.mask_heads > 1 ? head_of(a, part, row) : 0);
  return __ldg(a.mask + (of * a.queries + query) * a.tokens + token);
}

// A sum of values over the sum of their weights: 0 for a query that sees no token, such as padding.
__device__ __forceinline__ float mean(float sum, float weights) { return weights == 0 ? 0.0f : sum / weights; }

template <int BITS, int ROWS>
__global__ void __launch_bounds__(THREADS, ROWS == 8 ? 3 : 4) attend(const Attention a) {
  extern __shared__ __align__(16) unsigned char memory[];
  float* query = (float*)memory;              // [ROWS, width]
  float* scores = query + ROWS * a.width;     // [ROWS, TILE]
  float* factors = scores + ROWS * TILE;      // [ROWS]: what the sums before this tile are multiplied by
  float* sums = factors + ROWS;               // [THREADS, PIECE]
  const Part part = part_of<ROWS>(a);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int WARPS = THREADS / 32, OWN = (ROWS + WARPS - 1) / WARPS;  // rows whose softmax a warp does
  for (int i = threadIdx.x; i < ROWS * a.width; i += THREADS) {
    const int row = i / a.width;
    const int64_t from = ((int64_t)part.batch * a.heads + head_of(a, part, row)) * a.queries + query_of(a, part, row);
    query[i] = row < part.rows ? number(a.query, from * a.width + i % a.width, a.type) : 0.0f;
  }
  const int pieces = (a.width + PIECE - 1) / PIECE, groups = THREADS / pieces;
  const int piece = threadIdx.x % pieces, group = threadIdx.x / pieces;
  const int count = min(PIECE, a.width - piece * PIECE);
  float most[OWN], weights[OWN], total[ROWS][PIECE];
#pragma unroll
  for (int o = 0; o < OWN; o++) most[o] = -INFINITY, weights[o] = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int e = 0; e < PIECE; e++) total[r][e] = 0;
  __syncthreads();

  for (int start = part.start; start < part.end; start += TILE) {
    const int tokens = min(TILE, part.end - start);
    for (int t = threadIdx.x / LANES; t < TILE; t += THREADS / LANES) {
      float dots[ROWS];
      products<BITS, ROWS>(a, part, query, start + t, t < tokens, lane % LANES, dots);
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (lane % LANES == r && r < part.rows)
          scores[r * TILE + t] = t < tokens ? dots[r] + masked(a, part, r, start + t) : -INFINITY;
    }
    __syncthreads();
#pragma unroll
    for (int o = 0; o < OWN; o++) {
      const int row = warp + o * WARPS;
      if (row >= part.rows) break;
      float here = most[o], sum = 0;
      for (int t = lane; t < TILE; t += 32) here = fmaxf(here, scores[row * TILE + t]);
      for (int offset = 16; offset; offset /= 2) here = fmaxf(here, __shfl_xor_sync(~0u, here, offset));
      for (int t = lane; t < TILE; t += 32) {
        const float score = scores[row * TILE + t], weight = score == -INFINITY ? 0.0f : expf(score - here);
        scores[row * TILE + t] = weight;
        sum += weight;
      }
      for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
      const float factor = here == -INFINITY ? 1.0f : expf(most[o] - here);
      weights[o] = weights[o] * factor + sum;
      most[o] = here;
      if (lane == 0) factors[row] = factor;
    }
    __syncthreads();
    if (group < groups) {
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (r < part.rows)
#pragma unroll
          for (int e = 0; e < PIECE; e++) total[r][e] *= factors[r];
      for (int t = group; t < tokens; t += groups) {
        const int64_t at = (int64_t)part.batch * a.tokens + start + t;
        float value[PIECE];
        codes<BITS>(a.values + at * a.words, part.head * a.width + piece * PIECE, count, value);
        const float scale = __ldg(a.scales_of_values + at * a.value_scales + (a.value_scales > 1 ? part.head : 0));
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          if (r >= part.rows) continue;
          const float weight = scale * scores[r * TILE + t];
#pragma unroll
          for (int e = 0; e < PIECE; e++) total[r][e] += weight * value[e];
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int o = 0; o < OWN; o++) {
    const int row = warp + o * WARPS;
    if (row < part.rows && lane == 0) scores[2 * row] = most[o], scores[2 * row + 1] = weights[o];
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (r >= part.rows) break;
#pragma unroll
    for (int e = 0; e < PIECE; e++) sums[threadIdx.x * PIECE + e] = total[r][e];
    __syncthreads();
    const int64_t to = ((int64_t)part.batch * a.queries + query_of(a, part, r)) * a.heads + head_of(a, part, r);
    float* partial = a.partial + (to * a.splits + blockIdx.x) * (2 + a.width);
    for (int i = threadIdx.x; i < a.width; i += THREADS) {
      float sum = 0;
      for (int g = 0; g < groups; g++) sum += sums[(g * pieces + i / PIECE) * PIECE + i % PIECE];
      if (a.splits == 1) {
        write_number(mean(sum, scores[2 * r + 1]), a.output, to * a.width + i, a.type);
      } else {
        partial[2 + i] = sum;
      }
    }
    if (a.splits > 1 && threadIdx.x < 2) partial[threadIdx.x] = scores[2 * r + threadIdx.x];
    __syncthreads();
  }
}

// Puts the splits of a row together: every one has its maximum, its sum of weights, and its sum of values.
__global__ void __launch_bounds__(THREADS) combine(const Attention a) {
  const int64_t row = blockIdx.x;
  const float* partial = a.partial + row * a.splits * (2 + a.width);
  float most = -INFINITY, weights = 0;
  for (int s = 0; s < a.splits; s++) most = fmaxf(most, partial[s * (2 + a.width)]);
  for (int s = 0; s < a.splits; s++) {
    const float* of = partial + s * (2 + a.width);
    if (of[1] != 0) weights += expf(of[0] - most) * of[1];
  }
  for (int i = threadIdx.x; i < a.width; i += THREADS) {
    float sum = 0;
    for (int s = 0; s < a.splits; s++) {
      const float* of = partial + s * (2 + a.width);
      if (of[1] != 0) sum += expf(of[0] - most) * of[2 + i];
    }
    write_number(mean(sum, weights), a.output, row * a.width + i, a.type);
  }
}

// One block for each token: first the scales of its groups, then its words.
template <int BITS>
__global__ void __launch_bounds__(THREADS) quantize(const void* vectors, int type, int groups, int width, int words,
                                                    uint32_t* packed, float* scales) {
  extern __shared__ __align__(16) unsigned char memory[];
  float* shared = (float*)memory;
  constexpr float TOP = (1 << (BITS - 1)) - 1;
  const int64_t token = blockIdx.x, first = token * groups * width;
  const int lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < groups; g += THREADS / 32) {
    float most = 0;
    for (int i = lane; i < width; i += 32) most = fmaxf(most, fabsf(number(vectors, first + g * width + i, type)));
    for (int offset = 16; offset; offset /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
    const float scale = __fdiv_rn(most + EPSILON, TOP);
    if (lane == 0) shared[g] = scales[token * groups + g] = scale;
  }
  __syncthreads();
  const int count = groups * width;
  for (int w = threadIdx.x; w < words; w += THREADS) {
    uint32_t word = 0;
    // The first and the last code of 3 bits may have bits in the words beside this one.
    for (int i = w * 32 / BITS; i < count && i * BITS < (w + 1) * 32; i++) {
      const float level = rintf(__fdiv_rn(number(vectors, first + i, type), shared[i / width]));
      const uint32_t code = (uint32_t)((int)fminf(fmaxf(level, -TOP), TOP) + (1 << (BITS - 1)));
      const int shift = i * BITS - w * 32;
      word |= shift < 0 ? code >> -shift : code << shift;
    }
    packed[token * words + w] = word;
  }
}

template <class... Expected, class... Given>
cudaError_t launched(void (*kernel)(Expected...), dim3 grid, size_t shared, void* stream, Given... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared;
  config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

template <int BITS, int ROWS>
cudaError_t attention(const Attention& a, void* stream) {
  const int rows = a.heads / a.key_heads * a.queries;
  const dim3 grid(a.splits, a.key_heads * ((rows + ROWS - 1) / ROWS), a.batch);
  const size_t shared = sizeof(float) * (ROWS * (a.width + TILE + 1) + THREADS * PIECE);
  const cudaError_t error = launched(attend<BITS, ROWS>, grid, shared, stream, a);
  if (error != cudaSuccess || a.splits == 1) return error;
  return launched(combine, dim3(a.batch * a.queries * a.heads), 0, stream, a);
}

template <int BITS>
cudaError_t attention_of(const Attention& a, void* stream) {
  const int rows = a.heads / a.key_heads * a.queries;
  if (rows == 1) return attention<BITS, 1>(a, stream);
  return rows <= 4 ? attention<BITS, 4>(a, stream) : attention<BITS, 8>(a, stream);
}

}  // namespace
}  // namespace compress

using namespace compress;

// Codes and scales of vectors [tokens, groups, width]: words [tokens, words], and float [tokens, groups].
extern "C" int compress_cuda_kv_quantize(const void* vectors, int type, int64_t tokens, int groups, int width,
                                         int words, int bits, uint32_t* packed, float* scales, void* stream) {
  const dim3 grid((unsigned)tokens);
  const size_t shared = sizeof(float) * groups;
  const auto run = [&](auto kernel) {
    return launched(kernel, grid, shared, stream, vectors, type, groups, width, words, packed, scales);
  };
  switch (bits) {
    case 2: return run(quantize<2>);
    case 3: return run(quantize<3>);
    case 4: return run(quantize<4>);
    case 8: return run(quantize<8>);
  }
  return cudaErrorInvalidValue;
}

// The width is 1 to 1024, and splits · tiles · 64 tokens are all, with none of the splits empty.
extern "C" int compress_cuda_kv_attention(const Attention* attention, void* stream) {
  switch (attention->bits) {
    case 2: return attention_of<2>(*attention, stream);
    case 3: return attention_of<3>(*attention, stream);
    case 4: return attention_of<4>(*attention, stream);
    case 8: return attention_of<8>(*attention, stream);
  }
  return cudaErrorInvalidValue;
}
