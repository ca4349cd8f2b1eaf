// Numbers of the types that tensors come in, and codes of 2 to 8 bits in canonical rows.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace compress {

enum Type { FLOAT32, FLOAT16, BFLOAT16 };  // numbered as in compress.kernels.cuda.linear

__device__ __forceinline__ float number(const void* from, int64_t at, int type) {
  if (type == FLOAT16) return __half2float(((const half*)from)[at]);
  if (type == BFLOAT16) return __bfloat162float(((const __nv_bfloat16*)from)[at]);
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

// The words of chunk `chunk` of a row; those past its end are 0. Vectors are read where rows are whole vectors.
template <int BITS>
__device__ __forceinline__ void chunk_words(const uint32_t* row, int chunk, int words, uint32_t (&to)[BITS]) {
  const uint32_t* from = row + chunk * BITS;
  const int left = words - chunk * BITS;
  if (BITS % 4 == 0 && left >= BITS && (uintptr_t)row % 16 == 0) {
#pragma unroll
    for (int i = 0; i < BITS / 4; i++) {
      const uint4 four = ptx::load_once((const uint4*)from + i);
      to[4 * i] = four.x, to[4 * i + 1] = four.y, to[4 * i + 2] = four.z, to[4 * i + 3] = four.w;
    }
  } else if (BITS % 2 == 0 && left >= BITS && (uintptr_t)row % 8 == 0) {
#pragma unroll
    for (int i = 0; i < BITS / 2; i++) {
      const uint2 two = ptx::load_once((const uint2*)from + i);
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < BITS; i++) to[i] = i < left ? __ldg(from + i) : 0;
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
  int32_t out, width, words, groups, group_size;  // group_size: a multiple of CHUNK, or the width
  int32_t bits, scales_type;
};

// How the codes of a chunk become numbers: scale · (code - zero), or scale · table[code].
struct Levels {
  float scale, zero;
  const float* table;

  __device__ __forceinline__ float operator()(uint32_t code) const {
    // 2^23 + code is a float whose last bits are the code.
    return scale * (table ? table[code] : __uint_as_float(0x4b000000u | code) - zero);
  }
};

template <int BITS>
__device__ __forceinline__ Levels levels_of(const Weight& w, int64_t row, int chunk, const float* table) {
  const int64_t at = row * w.groups + min(chunk * CHUNK / w.group_size, w.groups - 1);
  const int zero = w.zeros ? __ldg(w.zeros + at) : 1 << (BITS - 1);
  return {number(w.scales, at, w.scales_type), 8388608.0f + (float)zero, table};
}

}  // namespace compress
