// One step of a decoder: what its layers are made of, and what they are given. compress.kernels.cpu.decoder mirrors
// these structs in ctypes. All memory belongs to tensors of the Python layer, which must outlive a call. Everything
// but Linear has the type of the model.
#pragma once
#include "product.h"

namespace compress {

enum NormKind : int32_t {
  NO_NORM,
  RMS,        // rounded, then multiplied by its weight
  RMS_OFFSET, // multiplied by (offset + weight), then rounded
  LAYER       // with mean and bias
};

enum Activation : int32_t { SILU, GELU, GELU_TANH, GELU_NEW, GELU_FAST, GELU_QUICK, RELU };

struct Norm {
  int32_t kind;
  float epsilon, offset;
  const void *weight, *bias;  // or null
};

// Where the vector of one role is in the outputs of the layer's linears: head h begins at start + h * stride.
struct Place {
  int32_t linear;  // index in its list
  int32_t start, stride;
};

struct Layer {
  int32_t heads, groups, width;    // query heads, key/value heads, width of a head; without attention 0, 1, 1
  int32_t neurons;                 // 0 without an MLP
  int32_t activation;
  int32_t kind;                    // which mask and rotation it is given
  int32_t norm_first, parallel;    // norms before their blocks; both blocks read the input of the layer
  int32_t eager;                   // attention rounds after each of its operations
  int32_t scales_query;            // the query is scaled and rounded before it meets the keys
  float scaling, softcap;          // 0: no softcap
  int32_t projections, inputs;     // number of linears below
  Place query, key, value, gate, up;  // gate.linear -1: none
  const Linear *project[3], *input[2], *output, *down;
  const void *project_bias[3], *input_bias[2], *output_bias, *down_bias;  // or null
  Norm attention_norm, query_norm, key_norm, post_attention_norm, mlp_norm, post_mlp_norm;
};

struct Plan {
  int32_t layers, width, type;
  const Layer* layer;
};

enum MaskKind : int32_t { NO_MASK, BOOLEAN, ADDITIVE };

// What the layers of one kind are given.
struct Given {
  int32_t mask_kind, rotated;      // rotated: of each head, 0 without rotary embedding
  int64_t mask_stride, rotation_stride;  // from one row of the batch to the next; 0 if all share one
  const void *mask, *cosines, *sines;
};

struct Step {
  int32_t rows;                    // of the batch, one new token each
  int32_t length;                  // tokens in the cache before
  const void* input;               // [rows, width]
  void* output;                    // [rows, width]
  void* const* keys;               // of each layer [rows, groups, capacity, width of a head]
  void* const* values;
  const int64_t* capacity;         // of each layer, at least length + 1
  const Given* given;
};

}  // namespace compress
