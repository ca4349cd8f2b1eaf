// Numbers of the types that tensors come in, and codes of 2 to 8 bits in canonical rows.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace compress {

enum Type { FLOAT32, FLOAT16, BFLOAT16, E8M0, E4M3 };  // numbered as in compress.kernels.cuda.linear

// A byte of E4M3: sign, four bits of the exponent and three of the mantissa.
__device__ __forceinline__ float from_e4m3(uint32_t byte) {
  const uint32_t magnitude = byte & 0x7f;
  // The bits as those of a float have an exponent that is too small by 120, which also holds below the normal ones.
  const float value = __uint_as_float((byte & 0x80) << 24 | magnitude << 20) * __uint_as_float((127 + 120) << 23);
  return magnitude == 0x7f ? __uint_as_float(0x7fffffff) : value;
}

// A byte that is an exponent plus 127; 0 stands for a number that is not a normal one.
__device__ __forceinline__ float from_e8m0(uint32_t byte) {
  return __uint_as_float(byte ? byte << 23 : 1u << 22);
}

__device__ __forceinline__ float number(const void* from, int64_t at, int type) {
  if (type == FLOAT16) return __half2float(((const half*)from)[at]);
  if (type == BFLOAT16) return __bfloat162float(((const __nv_bfloat16*)from)[at]);
  if (type == E8M0) return from_e8m0(((const unsigned char*)from)[at]);
  if (type == E4M3) return from_e4m3(((const unsigned char*)from)[at]);
  return ((const float*)from)[at];
}

__device__ __forceinline__ void write_number(float value, void* to, int64_t at, int type) {
  if (type == FLOAT16) {
    ((half*)to)[at] = __float2half(value);
  } else if (type == BFLOAT16) {
    ((__nv_bfloat16*)to)[at] = __float2bfloat16(value);
  } else {
    ((float*)to)[at] = value;
  }
}

constexpr int CHUNK = 32;  // codes that fill whole words, whatever their width

// Pieces that the codes of a lane come in. Those of 8 bits are two vectors, and lanes whose vectors are neighbours ask
// for each sector of memory once.
template <int BITS>
constexpr int PIECES = BITS == 8 ? 2 : 1;

// The words of a piece that begins with column `column` of a row; those past its end are 0. Vectors are read where rows
// are whole vectors.
template <int BITS>
__device__ __forceinline__ void piece_words(const uint32_t* row, int column, int words, uint32_t (&to)[BITS],
                                            int piece = 0) {
  constexpr int COUNT = BITS / PIECES<BITS>;
  const int first = column * BITS / 32, left = words - first;
  const uint32_t* from = row + first;
  uint32_t* put = to + piece * COUNT;
  if (COUNT % 4 == 0 && left >= COUNT && (uintptr_t)row % 16 == 0) {
    const uint4 four = ptx::load_once((const uint4*)from);
    put[0] = four.x, put[1] = four.y, put[2] = four.z, put[3] = four.w;
  } else if (COUNT == 2 && left >= COUNT && (uintptr_t)row % 8 == 0) {
    const uint2 two = ptx::load_once((const uint2*)from);
    put[0] = two.x, put[1] = two.y;
  } else if (COUNT % 2 == 0 && left >= COUNT && (uintptr_t)row % 8 == 0) {
    // From here on through the first-level cache, because lanes share sectors.
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const uint2 two = __ldg((const uint2*)(from + i));
      put[i] = two.x, put[i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) put[i] = i < left ? __ldg(from + i) : 0;
  }
}

template <int BITS>
__device__ __forceinline__ uint32_t code_of(const uint32_t (&words)[BITS], int i) {
  const int word = i * BITS / 32, shift = i * BITS % 32;
  const uint32_t low = words[word];
  const uint32_t code = shift + BITS <= 32 ? low >> shift : __funnelshift_r(low, words[min(word + 1, BITS - 1)], shift);
  return code & ((1u << BITS) - 1);
}

// A weight that lies in canonical rows. compress.kernels.cuda.linear mirrors this struct in ctypes.
struct Weight {
  const uint32_t* packed;   // [out, words]
  const void* scales;       // [out, groups]
  const unsigned char* zeros;  // [out, groups], or null for 2^(bits - 1)
  const float* table;       // [2^bits], or null
  int32_t out, width, words, groups, group_size;  // group_size: a multiple of CHUNK (of 16 with a table), or the width
  int32_t bits, scales_type;
};

__device__ __forceinline__ int64_t group_of(const Weight& w, int64_t row, int column) {
  return row * w.groups + min(column / w.group_size, w.groups - 1);
}

// How codes become numbers. Every kind has BITS of a code, TABLE entries of a table in shared memory (1: none), and
// as many SCALES for a chunk as its groups may need. It is made of the table and reads what belongs to a column.

// scale · (code - zero).
template <int BITS_>
struct Integer {
  static constexpr int BITS = BITS_, TABLE = 1, SCALES = PIECES<BITS>;
  float scale, zero;

  Integer() = default;
  __device__ __forceinline__ explicit Integer(const float*) : scale(0), zero(0) {}
  __device__ __forceinline__ void read(const Weight& w, int64_t row, int column) {
    const int64_t at = group_of(w, row, column);
    scale = number(w.scales, at, w.scales_type);
    zero = 8388608.0f + (float)(w.zeros ? __ldg(w.zeros + at) : 1 << (BITS - 1));
  }
  // 2^23 + code is a float whose last bits are the code.
  __device__ __forceinline__ float operator()(uint32_t code) const {
    return scale * (__uint_as_float(0x4b000000u | code) - zero);
  }
};

// scale · table[code].
template <int BITS_>
struct LookedUp {
  static constexpr int BITS = BITS_, TABLE = 1 << BITS, SCALES = 2;
  float scale;
  const float* table;

  LookedUp() = default;
  __device__ __forceinline__ explicit LookedUp(const float* table) : scale(0), table(table) {}
  __device__ __forceinline__ void read(const Weight& w, int64_t row, int column) {
    scale = number(w.scales, group_of(w, row, column), w.scales_type);
  }
  __device__ __forceinline__ float operator()(uint32_t code) const { return scale * table[code]; }
};

// scale · the number that the code is.
struct Float8 {
  static constexpr int BITS = 8, TABLE = 1, SCALES = PIECES<BITS>;
  float scale;

  Float8() = default;
  __device__ __forceinline__ explicit Float8(const float*) : scale(0) {}
  __device__ __forceinline__ void read(const Weight& w, int64_t row, int column) {
    scale = number(w.scales, group_of(w, row, column), w.scales_type);
  }
  __device__ __forceinline__ float operator()(uint32_t code) const { return scale * from_e4m3(code); }
};

}  // namespace compress
