// Kernels for the tests of the emulation: small, right, and of every kind of thing that real ones do.
// test_emulation.py plants bugs in them.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "ptx.cuh"

namespace ptx = compress::ptx;

namespace {

// y = W x, one warp for each row: x comes through shared memory, and a tail that fills no vector is read last.
__global__ void __launch_bounds__(128) rows(const float* weight, const float* x, float* y, int out, int width) {
  extern __shared__ __align__(16) unsigned char memory[];
  float* shared = (float*)memory;
  const int whole = width / 4;
  for (int i = threadIdx.x; i < whole; i += blockDim.x) ptx::copy_async16(shared + 4 * i, x + 4 * i);
  ptx::copy_async_commit();
  for (int i = 4 * whole + threadIdx.x; i < width; i += blockDim.x) shared[i] = x[i];
  ptx::copy_async_wait<0>();
  __syncthreads();
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= out) return;
  float sum = 0;
  for (int i = lane; i < width; i += 32) sum = __fmaf_rn(weight[(size_t)row * width + i], shared[i], sum);
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) y[row] = sum;
}

// D = A B on one tensor core; A [16, 16] and B [8, 16], both along k; D [16, 8].
__global__ void fragment(const half* a, const half* b, float* d) {
  __shared__ __align__(16) half tile[16][24];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  *(uint4*)&tile[lane / 2][lane % 2 * 8] = *(const uint4*)(a + lane * 8);
  __syncwarp();
  uint32_t left[4], right[2];
  ptx::load_matrix_x4(left, &tile[lane % 16][lane / 16 * 8]);
  right[0] = *(const uint32_t*)(b + g * 16 + 2 * t);
  right[1] = *(const uint32_t*)(b + g * 16 + 2 * t + 8);
  float sums[4] = {0, 0, 0, 0};
  ptx::mma(sums, left, right, half());
  for (int r = 0; r < 4; r++) d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = sums[r];
}

// The sum of x: every block reverses its part in shared memory, halves it again and again, and adds to y.
__global__ void total(const float* x, float* y, int count) {
  __shared__ float part[64], turned[64];
  const int i = blockIdx.x * 64 + threadIdx.x;
  part[threadIdx.x] = i < count ? x[i] : 0.0f;
  __syncthreads();
  turned[63 - threadIdx.x] = part[threadIdx.x];
  __syncthreads();
  for (int size = 32; size; size /= 2) {
    if (threadIdx.x < size) turned[threadIdx.x] += turned[threadIdx.x + size];
    __syncthreads();
  }
  if (threadIdx.x == 0) atomicAdd(y, turned[0]);
}

template <class... Expected, class... Given>
int launch(void (*kernel)(Expected...), int grid, int block, size_t shared, void* stream, Given... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  config.stream = (cudaStream_t)stream;
  return cudaLaunchKernelEx(&config, kernel, given...);
}

}  // namespace

extern "C" int test_rows(const float* weight, const float* x, float* y, int out, int width, void* stream) {
  return launch(rows, (out + 3) / 4, 128, sizeof(float) * width, stream, weight, x, y, out, width);
}
extern "C" int test_fragment(const half* a, const half* b, float* d, void* stream) {
  return launch(fragment, 1, 32, 0, stream, a, b, d);
}
extern "C" int test_total(const float* x, float* y, int count, void* stream) {
  return launch(total, (count + 63) / 64, 64, 0, stream, x, y, count);
}
