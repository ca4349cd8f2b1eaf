// The registry of kernels, and the product of one linear layer as the operators call it.
#include "product.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "gemm.h"
#include "isa.h"

namespace compress {

Kernel kernels[KINDS];

const Kernel& kernel_for(const Linear& linear, int count) {
  const auto pays = dequantisers[linear.kind].pays;
  return pays && pays(linear, count) ? gemm : kernels[linear.kind];
}

namespace {

constexpr int64_t ALONE = 1 << 16;  // a product of fewer multiplications is done by one thread

// Memory that a thread keeps for its next call.
char* workspace(size_t bytes) {
  static thread_local std::unique_ptr<char, void (*)(void*)> memory(nullptr, std::free);
  static thread_local size_t size = 0;
  if (size < bytes) {
    size = (bytes + 4095) / 4096 * 4096;
    memory.reset((char*)std::aligned_alloc(4096, size));
  }
  return memory.get();
}

void widen(const void* from, int32_t type, size_t count, float* to) {
  const uint16_t* narrow = (const uint16_t*)from;
  size_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, type == BFLOAT16 ? from_bfloats(narrow + i) : from_halves(narrow + i));
  for (; i < count; i++) to[i] = type == BFLOAT16 ? from_bfloat(narrow[i]) : from_half(narrow[i]);
}

void narrow(const float* from, int32_t type, size_t start, size_t end, void* to) {
  uint16_t* values = (uint16_t*)to;
  for (size_t i = start; i < end; i++) values[i] = type == BFLOAT16 ? to_bfloat(from[i]) : to_half(from[i]);
}

// y = x W^T + bias by one kernel. x and y have the type of the layer.
void multiply(const Kernel& kernel, Linear linear, const void* x, void* y, int rows) {
  const bool many = &kernel == &gemm;  // which reads and writes any type
  const bool wide = many || linear.type == FLOAT32, wide_bias = linear.bias_type == FLOAT32 || !linear.bias;
  const size_t inputs = (size_t)rows * linear.columns, outputs = (size_t)rows * linear.rows;
  const size_t x_bytes = wide ? 0 : to_line(4 * inputs), y_bytes = wide ? 0 : to_line(4 * outputs);
  const size_t bias_bytes = wide_bias ? 0 : to_line(4 * (size_t)linear.rows);
  char* memory = workspace(x_bytes + y_bytes + bias_bytes + kernel.scratch(linear, rows));
  float *from = wide ? (float*)x : (float*)memory, *to = wide ? (float*)y : (float*)(memory + x_bytes);
  float* bias = (float*)(memory + x_bytes + y_bytes);
  char* scratch = memory + x_bytes + y_bytes + bias_bytes;
  if (!wide_bias) widen(linear.bias, linear.bias_type, linear.rows, bias), linear.bias = bias;
  if (many) return gemm_product(linear, x, y, rows, scratch);
  if (!wide) widen(x, linear.type, inputs, from);
  kernel.prepare(linear, from, rows, scratch);
#pragma omp parallel if ((int64_t)outputs * linear.columns >= ALONE)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    kernel.multiply(linear, scratch, rows, to, thread, threads);
    if (!wide) {
#pragma omp barrier
      narrow(to, linear.type, outputs * thread / threads, outputs * (thread + 1) / threads, y);
    }
  }
}

}  // namespace
}  // namespace compress

using namespace compress;

// y = x W^T + bias. x [rows, columns of the layer] and y [rows, rows of the layer] have the type of the layer.
extern "C" void compress_linear(const Linear* linear, const void* x, void* y, int32_t rows) {
  multiply(kernel_for(*linear, rows), *linear, x, y, rows);
}

// The same by the kernel for few rows or by that for many, whichever is faster. For tests and benchmarks.
extern "C" void compress_linear_by(const Linear* linear, const void* x, void* y, int32_t rows, int32_t many) {
  multiply(many ? gemm : kernels[linear->kind], *linear, x, y, rows);
}
