// The part of cuda_runtime.h, and of what nvcc knows by itself, that our kernels use.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulation.h"

#define COMPRESS_EMULATION 1
#define __CUDACC__ 1
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__
// In a function it is static, and `extern __shared__` stays legal; build.py gives the storage.
#define __shared__ thread_local

namespace emulation {
// Not macros, since a launch's configuration has fields of these names.
template <uint3 (*GET)()>
struct Index {
  struct X {
    __forceinline__ operator unsigned() const { return GET().x; }
  } x;
  struct Y {
    __forceinline__ operator unsigned() const { return GET().y; }
  } y;
  struct Z {
    __forceinline__ operator unsigned() const { return GET().z; }
  } z;
};
}  // namespace emulation
inline constexpr emulation::Index<emulation::thread_index> threadIdx{};
inline constexpr emulation::Index<emulation::block_index> blockIdx{};
inline constexpr emulation::Index<emulation::block_size> blockDim{};
inline constexpr emulation::Index<emulation::grid_size> gridDim{};
inline constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------- vectors

namespace emulation {
template <int BYTES>
struct Whole;
template <>
struct Whole<2> {
  typedef uint16_t type;
};
template <>
struct Whole<4> {
  typedef uint32_t type;
};
template <>
struct Whole<8> {
  typedef uint64_t type;
};
template <>
struct Whole<16> {
  typedef unsigned type __attribute__((vector_size(16)));
};
}  // namespace emulation

// Vectors are copied as a whole, since g++ would else split a load of 16 bytes into four.
#define EMULATED_COPIES(name, bytes)                                                    \
  typedef emulation::Whole<bytes>::type whole;                                          \
  name() = default;                                                                     \
  __forceinline__ name(const name& other) { *(whole*)this = *(const whole*)&other; }    \
  __forceinline__ name& operator=(const name& other) {                                  \
    *(whole*)this = *(const whole*)&other;                                              \
    return *this;                                                                       \
  }
#define EMULATED_VECTORS(T, name, align2, align4)                                       \
  struct alignas(align2) name##2 {                                                      \
    T x, y;                                                                             \
    EMULATED_COPIES(name##2, align2)                                                    \
    __forceinline__ name##2(T x, T y) : x(x), y(y) {}                                   \
  };                                                                                    \
  struct alignas(align4) name##4 {                                                      \
    T x, y, z, w;                                                                       \
    EMULATED_COPIES(name##4, align4)                                                    \
    __forceinline__ name##4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}             \
  };                                                                                    \
  __forceinline__ name##2 make_##name##2(T x, T y) { return {x, y}; }                   \
  __forceinline__ name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(unsigned, uint, 8, 16)
EMULATED_VECTORS(int, int, 8, 16)
EMULATED_VECTORS(float, float, 8, 16)
EMULATED_VECTORS(unsigned short, ushort, 4, 8)
EMULATED_VECTORS(short, short, 4, 8)
EMULATED_VECTORS(unsigned char, uchar, 2, 4)
EMULATED_VECTORS(signed char, char, 2, 4)
#undef EMULATED_VECTORS
#undef EMULATED_COPIES

// ---------------------------------------------------------------------------------------------- launching

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9;

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... given) {
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<std::decay_t<Expected>...> arguments;
  } call{kernel, {std::forward<Given>(given)...}};
  const auto run = [](void* c) { std::apply(((Call*)c)->kernel, ((Call*)c)->arguments); };
  return emulation::launch((const void*)kernel, {config->gridDim, config->blockDim, config->dynamicSmemBytes}, run,
                           &call);
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize)
    emulation::allow_dynamic_shared((const void*)kernel, value);
  return cudaSuccess;
}

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return emulation::device_attribute(attribute, value);
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "the emulation knows"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- barriers, votes

#define __syncthreads() ((void)emulation::block_barrier(emulation::Vote::NONE, 0, EMULATION_HERE))
#define __syncthreads_count(v) emulation::block_barrier(emulation::Vote::COUNT, v, EMULATION_HERE)
#define __syncthreads_and(v) emulation::block_barrier(emulation::Vote::ALL, v, EMULATION_HERE)
#define __syncthreads_or(v) emulation::block_barrier(emulation::Vote::ANY, v, EMULATION_HERE)
// An argument may be left out, as in CUDA.
#define __syncwarp(...) emulation::warp_barrier(emulation::mask_of(__VA_ARGS__), EMULATION_HERE)
#define __ballot_sync(mask, v) emulation::ballot(mask, v, EMULATION_HERE)
#define __any_sync(mask, v) (emulation::ballot(mask, v, EMULATION_HERE) != 0)
#define __all_sync(mask, v) (emulation::ballot(mask, v, EMULATION_HERE) == (unsigned)(mask))
#define __activemask() emulation::active_mask()
#define __shfl_sync(mask, v, ...) emulation::moved<emulation::Shuffle::INDEX>(EMULATION_HERE, mask, v, __VA_ARGS__)
#define __shfl_up_sync(mask, v, ...) emulation::moved<emulation::Shuffle::UP>(EMULATION_HERE, mask, v, __VA_ARGS__)
#define __shfl_down_sync(mask, v, ...) emulation::moved<emulation::Shuffle::DOWN>(EMULATION_HERE, mask, v, __VA_ARGS__)
#define __shfl_xor_sync(mask, v, ...) emulation::moved<emulation::Shuffle::XOR>(EMULATION_HERE, mask, v, __VA_ARGS__)

namespace emulation {
constexpr unsigned mask_of(unsigned mask = ~0u) { return mask; }
template <Shuffle KIND, class T>
__forceinline__ T moved(const char* where, unsigned mask, T value, unsigned by, unsigned width = 32) {
  static_assert(sizeof(T) <= 8, "Values of at most 8 bytes are shuffled.");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(KIND, mask, bits, by, width, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emulation

// All blocks share one thread of the operating system, in which nothing is ever out of order.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---------------------------------------------------------------------------------------------- memory

template <class T>
__forceinline__ T __ldg(const T* p) { return *p; }
template <class T>
__forceinline__ T __ldcs(const T* p) { return *p; }
template <class T>
__forceinline__ T __ldcg(const T* p) { return *p; }
template <class T>
__forceinline__ void __stcs(T* p, T v) { *p = v; }

namespace emulation {
template <class T, class Change>
__attribute__((no_sanitize("thread"), noinline)) T exchanged(T* at, Change change) {
  touch(at, sizeof(T), false, true);
  touch(at, sizeof(T), true, true);
  const T old = *at;
  *at = change(old);
  return old;
}
}  // namespace emulation

#define EMULATED_ATOMIC(T)                                                                                      \
  inline T atomicAdd(T* p, T v) { return emulation::exchanged(p, [=](T o) { return (T)(o + v); }); }            \
  inline T atomicMax(T* p, T v) { return emulation::exchanged(p, [=](T o) { return o > v ? o : v; }); }         \
  inline T atomicExch(T* p, T v) { return emulation::exchanged(p, [=](T) { return v; }); }                      \
  inline T atomicCAS(T* p, T c, T v) { return emulation::exchanged(p, [=](T o) { return o == c ? v : o; }); }
EMULATED_ATOMIC(int)
EMULATED_ATOMIC(unsigned)
EMULATED_ATOMIC(unsigned long long)
#undef EMULATED_ATOMIC
inline float atomicAdd(float* p, float v) { return emulation::exchanged(p, [=](float o) { return o + v; }); }
inline unsigned atomicOr(unsigned* p, unsigned v) { return emulation::exchanged(p, [=](unsigned o) { return o | v; }); }
inline unsigned atomicInc(unsigned* p, unsigned most) {
  return emulation::exchanged(p, [=](unsigned o) { return o >= most ? 0 : o + 1; });
}

// ---------------------------------------------------------------------------------------------- numbers

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) { return (std::common_type_t<A, B>)b < (std::common_type_t<A, B>)a ? b : a; }
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) { return (std::common_type_t<A, B>)a < (std::common_type_t<A, B>)b ? b : a; }

namespace emulation {
template <class To, class From>
__forceinline__ To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "Both have the same size.");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace emulation

__forceinline__ float __uint_as_float(unsigned v) { return emulation::same_bits<float>(v); }
__forceinline__ float __int_as_float(int v) { return emulation::same_bits<float>(v); }
__forceinline__ unsigned __float_as_uint(float v) { return emulation::same_bits<unsigned>(v); }
__forceinline__ int __float_as_int(float v) { return emulation::same_bits<int>(v); }
__forceinline__ int __float2int_rn(float v) { return (int)std::nearbyintf(v); }
__forceinline__ unsigned __float2uint_rn(float v) { return (unsigned)std::nearbyintf(v); }
__forceinline__ float __int2float_rn(int v) { return (float)v; }
__forceinline__ float __uint2float_rn(unsigned v) { return (float)v; }
__forceinline__ float __expf(float v) { return std::exp(v); }
__forceinline__ float __fdividef(float a, float b) { return a / b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float rsqrtf(float v) { return 1 / std::sqrt(v); }
__forceinline__ float __fmaf_rn(float a, float b, float c) {
  emulation::count(emulation::Work::MULTIPLY_ADD, 1);
  return __builtin_fmaf(a, b, c);
}
#define fmaf __fmaf_rn
#define __builtin_assume(condition) ((void)0)

__forceinline__ int __popc(unsigned v) { return __builtin_popcount(v); }
__forceinline__ int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
__forceinline__ int __ffs(int v) { return __builtin_ffs(v); }
__forceinline__ unsigned __brev(unsigned v) {
  v = (v & 0x55555555u) << 1 | (v >> 1 & 0x55555555u);
  v = (v & 0x33333333u) << 2 | (v >> 2 & 0x33333333u);
  v = (v & 0x0f0f0f0fu) << 4 | (v >> 4 & 0x0f0f0f0fu);
  return __builtin_bswap32(v);
}
__forceinline__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
__forceinline__ unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (shift < 32 ? shift : 32));
}
__forceinline__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
__forceinline__ unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned choice = selector >> 4 * i & 15;
    unsigned byte = (unsigned)(bytes >> 8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
__forceinline__ int __dp4a(int a, int b, int c) {
  emulation::count(emulation::Work::MULTIPLY_ADD, 4);
  for (int i = 0; i < 32; i += 8) c += (int)(int8_t)(a >> i) * (int)(int8_t)(b >> i);
  return c;
}
__forceinline__ unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  emulation::count(emulation::Work::MULTIPLY_ADD, 4);
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}
__forceinline__ unsigned __vsub4(unsigned a, unsigned b) {
  unsigned result = 0;
  for (int i = 0; i < 32; i += 8) result |= (((a >> i) - (b >> i)) & 255) << i;
  return result;
}
