// Every function of ptx.cuh, on a warp: test_instructions.py holds what they do here against their text.
#include "ptx.cuh"

namespace ptx = compress::ptx;

namespace {

template <class T>
__device__ void multiply(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; i++) left[i] = a[threadIdx.x * 4 + i], sums[i] = d[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; i++) right[i] = b[threadIdx.x * 2 + i];
  ptx::mma(sums, left, right, T());
  for (int i = 0; i < 4; i++) d[threadIdx.x * 4 + i] = sums[i];
}

__global__ void multiply_half(const uint32_t* a, const uint32_t* b, float* d) { multiply<half>(a, b, d); }
__global__ void multiply_bfloat16(const uint32_t* a, const uint32_t* b, float* d) { multiply<__nv_bfloat16>(a, b, d); }

// All that moves: 16 words for each lane come in, and 16 go out.
__global__ void move(const uint32_t* in, uint32_t* out) {
  __shared__ __align__(16) uint32_t tile[32 * 8];
  const int lane = threadIdx.x;
  ptx::copy_async16(tile + lane * 8, in + lane * 16);
  ptx::copy_async_commit();
  ptx::copy_async16(tile + lane * 8 + 4, in + lane * 16 + 4, lane % 2 == 0);
  ptx::copy_async_commit();
  ptx::copy_async_wait<1>();
  __syncwarp();
  uint32_t matrices[4];
  ptx::load_matrix_x4(matrices, tile + lane * 8);
  ptx::copy_async_wait<0>();
  __syncwarp();
  const uint32_t* own = in + lane * 16;
  const uint2 two = ptx::load_once((const uint2*)(own + 2));
  const uint4 four = ptx::load_once((const uint4*)(own + 8));
  const uint32_t words[16] = {matrices[0], matrices[1], matrices[2], matrices[3],
                              tile[lane * 8 + 4], tile[lane * 8 + 5], tile[lane * 8 + 6], tile[lane * 8 + 7],
                              ptx::load_once(own + 1), two.x, two.y, four.x, four.y, four.z, four.w,
                              ptx::lop3<0xea>(own[0], own[1], own[2])};
  for (int i = 0; i < 16; i++) out[lane * 16 + i] = words[i];
}

template <class... Expected, class... Given>
int launch(void (*kernel)(Expected...), void* stream, Given... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

}  // namespace

extern "C" int test_multiply_half(const uint32_t* a, const uint32_t* b, float* d, void* stream) {
  return launch(multiply_half, stream, a, b, d);
}
extern "C" int test_multiply_bfloat16(const uint32_t* a, const uint32_t* b, float* d, void* stream) {
  return launch(multiply_bfloat16, stream, a, b, d);
}
extern "C" int test_move(const uint32_t* in, uint32_t* out, void* stream) { return launch(move, stream, in, out); }
