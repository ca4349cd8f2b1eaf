// The registry of kernels, and the product of one linear layer as the operators call it.
#include "product.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "isa.h"

namespace compress {

Kernel kernels[KINDS];

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

size_t to_line(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace
}  // namespace compress

using namespace compress;

// y = x W^T + bias. x [rows, columns of the layer] and y [rows, rows of the layer] have the type of the layer.
extern "C" void compress_linear(const Linear* linear, const void* x, void* y, int32_t rows) {
  const Kernel& kernel = kernels[linear->kind];
  const bool same = linear->type == FLOAT32;
  const size_t inputs = (size_t)rows * linear->columns, outputs = (size_t)rows * linear->rows;
  const size_t wide_x = same ? 0 : to_line(4 * inputs), wide_y = same ? 0 : to_line(4 * outputs);
  char* memory = workspace(wide_x + wide_y + to_line(kernel.scratch(*linear, rows)));
  char* scratch = memory + wide_x + wide_y;
  float* to = same ? (float*)y : (float*)(memory + wide_x);
#pragma omp parallel if ((int64_t)outputs * linear->columns >= ALONE)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
#pragma omp master
    {
      if (!same) widen(x, linear->type, inputs, (float*)memory);
      kernel.prepare(*linear, same ? (const float*)x : (const float*)memory, rows, scratch);
    }
#pragma omp barrier
    kernel.multiply(*linear, scratch, rows, to, thread, threads);
    if (!same) {
#pragma omp barrier
      narrow(to, linear->type, outputs * thread / threads, outputs * (thread + 1) / threads, y);
    }
  }
}
