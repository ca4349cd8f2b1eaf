// What all native files share: a linear layer, and its product with a few rows of activations.
//
// Each kind of weight registers the functions that multiply with it (see Kernel). Operators called from Python and
// the fused decoder both go through them, so a kind is written once.
#pragma once
#include <cstddef>
#include <cstdint>

namespace compress {

enum Kind : int32_t {
  INTEGER,  // s (q - z), q of 2 to 8 bits
  TABLE,    // s table[q], q of 2 or 4 bits: NF4, MXFP4, NVFP4, ternary
  FP8,      // s q, q in E4M3
  DENSE,    // floating point
  PLANES,   // nested codes: s sum_j 2^-j S_j
  FACTORS,  // BitStack: sum_i S_i * (a_i b_i)
  KINDS
};

enum Type : int32_t { FLOAT32, BFLOAT16, FLOAT16 };

// How activations are rounded before they are multiplied.
enum Activations : int32_t {
  FLOATING,    // not below the type they come in
  INT8_BLOCK,  // int8, one scale max|x| / 127 for each group of the weight
  INT8_TOKEN   // int8, one scale (max|x| + TOKEN_EPSILON) / 127 for each row, as in the training of LLM-QAT
};

constexpr float TOKEN_EPSILON = 1e-6f;

constexpr int MOST_BLOCKS = 32;

// A weight [rows, columns] with its bias. compress.kernels.cpu.linear mirrors this struct in ctypes.
// All memory belongs to the tensors of the Python layer, which must outlive it.
struct Linear {
  int32_t kind, rows, columns;
  int32_t bits;                      // of a code
  int32_t group;                     // columns that share a scale; the last group may be shorter. DENSE: how far
                                     // columns are apart: 1, or `rows` if the weight is stored [columns, rows]
  int32_t scale_type;                // Type of scales, or of the weight itself if it is DENSE
  int32_t activations;               // Activations
  int32_t type;                      // Type of the model: inputs have it, and results are rounded to it by the caller
  int32_t blocks;                    // pointers in codes: 1, or the blocks of a stack
  int32_t rank;                      // FACTORS
  const void* codes[MOST_BLOCKS];    // INTEGER, TABLE and FP8: one, in strips of 16 rows (kernels/cpu/layout.py)
  const void* left[MOST_BLOCKS];     // FACTORS: a, float16 [rows, rank]
  const void* right[MOST_BLOCKS];    // FACTORS: b, float16 [rank, columns]
  const void* scales;                // [strips, groups, 16]
  const uint8_t* zeros;              // [strips, groups, 16]; null: 2^(bits-1)
  const float* table;                // TABLE: 2^bits values
  const float* bias;                 // [rows], or null
  int32_t bias_type;                 // Type of bias: compress_linear makes float32 of it, which all kernels take
};

// The functions of one kind. A product has two phases, so that products which share their input prepare it once
// where their kernels agree, and so that all threads of one parallel region can share the second phase.
struct Kernel {
  // Bytes of scratch memory, aligned to 64 bytes, that a product with `count` rows of activations needs.
  size_t (*scratch)(const Linear&, int count);
  // Round and arrange the activations x, float32 [count, columns], into the scratch memory. Called by one thread.
  void (*prepare)(const Linear&, const float* x, int count, void* scratch);
  // y = x W^T + bias, float32 [count, rows], for this thread's share of the rows. Called by every thread.
  void (*multiply)(const Linear&, const void* scratch, int count, float* y, int thread, int threads);
};

extern Kernel kernels[KINDS];  // filled before main by the Register of each kind's file

// The functions that multiply so many rows of activations fastest: those of the kind, or those of gemm.h.
const Kernel& kernel_for(const Linear& linear, int count);

struct Register {
  Register(Kind kind, Kernel kernel) { kernels[kind] = kernel; }
};

}  // namespace compress
