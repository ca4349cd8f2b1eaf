// Stands in for the instructions that kernels/cuda/source/ptx.cuh wraps. test_instructions.py holds both against
// each other: it reads the wrappers' PTX and interprets it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace compress::ptx {

__forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
  emulation::mma(emulation::Number::HALF, d, a, b, EMULATION_HERE);
}
__forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
  emulation::mma(emulation::Number::BFLOAT16, d, a, b, EMULATION_HERE);
}
__forceinline__ void mma(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma(emulation::Number::INT8, d, a, b, EMULATION_HERE);
}
__forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  emulation::load_matrix(r, 4, false, row, EMULATION_HERE);
}
__forceinline__ void copy_async16(void* shared, const void* global) {
  emulation::copy_async(shared, global, 16, 16, EMULATION_HERE);
}
__forceinline__ void copy_async16(void* shared, const void* global, bool present) {
  emulation::copy_async(shared, global, 16, present ? 16 : 0, EMULATION_HERE);
}
__forceinline__ void copy_async_commit() { emulation::copy_async_commit(); }
template <int GROUPS>
__forceinline__ void copy_async_wait() {
  emulation::copy_async_wait(GROUPS);
}
template <class T>
__forceinline__ T load_once(const T* p) {
  return *p;
}
template <int TABLE>
__forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (TABLE >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

}  // namespace compress::ptx
