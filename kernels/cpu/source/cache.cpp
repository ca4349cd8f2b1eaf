// Keys and values in codes of 4 or 8 bits: rounding them, and attention over a cache of them without a dense copy.
//
// A token has a row of words, in which the codes of all heads follow each other, the first in the lowest bits, and
// one scale or one for each head. Code q of b bits stands for s (q - 2^(b-1)).
#include <omp.h>

#include <cmath>
#include <vector>

#include "strips.h"

namespace compress {
namespace {

constexpr float EPSILON = 1e-6f;  // added to the largest magnitude, as in compress.kernels.codes.minmax
constexpr int64_t ALONE = 1 << 14;

void encode(const float* x, int count, int bits, int64_t at, float scale, uint8_t* row) {
  const float top = (float)((1 << (bits - 1)) - 1);
  for (int i = 0; i < count; i++) {
    const float level = std::min(std::max(std::nearbyintf(x[i] / scale), -top), top);
    const uint8_t code = (uint8_t)((int)level + (1 << (bits - 1)));
    if (bits == 8) {
      row[at + i] = code;
    } else {
      row[(at + i) >> 1] |= code << 4 * ((at + i) & 1);
    }
  }
}

struct Cache {
  const uint8_t* codes;  // [batch, tokens, stride]
  const float* scales;   // [batch, tokens, heads or 1]
  int64_t tokens, stride, width, scale_heads;
  int bits;

  // The vector of one head of one token.
  COMPRESS_INLINE void read(int64_t batch, int64_t token, int64_t head, float* to) const {
    const int64_t row = batch * tokens + token;
    const float scale = scales[row * scale_heads + (scale_heads > 1 ? head : 0)];
    const uint8_t* from = codes + row * stride;
    const int64_t first = head * width;
    if (bits == 8) {
      for (int64_t i = 0; i < width; i++) to[i] = scale * (float)((int)from[first + i] - 128);
    } else if (first % 2 == 0 && width % 2 == 0) {
      from += first / 2;
      for (int64_t i = 0; i < width / 2; i++) {
        to[2 * i] = scale * (float)((from[i] & 15) - 8);
        to[2 * i + 1] = scale * (float)((from[i] >> 4) - 8);
      }
    } else {
      for (int64_t i = first; i < first + width; i++)
        to[i - first] = scale * (float)((from[i >> 1] >> 4 * (i & 1) & 15) - 8);
    }
  }
};

// The rotary embedding of the first `width` values, whose halves make up pairs.
void rotate(float* vector, float* copy, int64_t width, const float* cosines, const float* sines) {
  const int64_t half = width / 2;
  std::memcpy(copy, vector, sizeof(float) * width);
  for (int64_t i = 0; i < half; i++) {
    vector[i] = copy[i] * cosines[i] - copy[i + half] * sines[i];
    vector[i + half] = copy[i + half] * cosines[i + half] + copy[i] * sines[i + half];
  }
}

COMPRESS_INLINE float dot(const float* a, const float* b, int64_t padded) {
  Floats sum{};
  for (int64_t i = 0; i < padded; i += LANES) sum += load<Floats>(a + i) * load<Floats>(b + i);
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  return total;
}

COMPRESS_INLINE void add(float weight, const float* from, int64_t padded, float* to) {
  for (int64_t i = 0; i < padded; i += LANES) store(to + i, load<Floats>(to + i) + weight * load<Floats>(from + i));
}

// Of a query that sees no token, such as padding, every share is 0.
void softmax(float* scores, int64_t count) {
  if (std::count(scores, scores + count, -INFINITY) == count) return (void)std::fill(scores, scores + count, 0.0f);
  float most = scores[0], sum = 0;
  for (int64_t i = 1; i < count; i++) most = std::max(most, scores[i]);
  for (int64_t i = 0; i < count; i++) sum += scores[i] = std::exp(scores[i] - most);
  for (int64_t i = 0; i < count; i++) scores[i] /= sum;
}

}  // namespace

// compress.kernels.cpu.cache mirrors this struct in ctypes. All numbers are float32.
struct Attention {
  int64_t batch, heads, key_heads, queries, tokens, width, stride;  // stride: bytes of a token's row
  int64_t key_scales, value_scales;                                  // of a token: key_heads or 1
  int64_t rotated, rotations;                                        // width of cosines; their batch: 1 or batch
  int64_t mask_batch, mask_heads;                                    // 1, or batch and heads
  int64_t bits;
  float scaling;
  const uint8_t *keys, *values;                 // [batch, tokens, stride]
  const float *scales_of_keys, *scales_of_values;
  const float *cosines, *sines;                 // [rotations, tokens, rotated], or null
  const float* mask;                            // [mask_batch, mask_heads, queries, tokens], added; null: causal
  const float* query;                           // [batch, heads, queries, width]
  float* output;                                // [batch, queries, heads, width]
};

namespace {

// All queries that share one head of keys of one row of the batch.
void attend(const Attention& a, int64_t batch, int64_t head, std::vector<float>& memory) {
  const int64_t shared = a.heads / a.key_heads, rows = shared * a.queries;
  const int64_t padded = (a.width + STRIP - 1) / STRIP * STRIP;
  memory.assign((2 + 2 * rows) * padded + rows * a.tokens, 0);
  float *vector = memory.data(), *copy = vector + padded, *queries = copy + padded;
  float *sums = queries + rows * padded, *scores = sums + rows * padded;
  const Cache keys{a.keys, a.scales_of_keys, a.tokens, a.stride, a.width, a.key_scales, (int)a.bits};
  const Cache values{a.values, a.scales_of_values, a.tokens, a.stride, a.width, a.value_scales, (int)a.bits};
  for (int64_t row = 0; row < rows; row++)
    std::memcpy(queries + row * padded, a.query + ((batch * a.heads + head * shared) * a.queries + row) * a.width,
                sizeof(float) * a.width);
  for (int64_t token = 0; token < a.tokens; token++) {
    keys.read(batch, token, head, vector);
    const int64_t turn = ((a.rotations > 1 ? batch : 0) * a.tokens + token) * a.rotated;
    if (a.cosines) rotate(vector, copy, a.rotated, a.cosines + turn, a.sines + turn);
    for (int64_t row = 0; row < rows; row++) {
      const int64_t query = row % a.queries, by = head * shared + row / a.queries;
      float score = a.scaling * dot(vector, queries + row * padded, padded);
      if (a.mask) {
        const int64_t of = (a.mask_batch > 1 ? batch : 0) * a.mask_heads + (a.mask_heads > 1 ? by : 0);
        score += a.mask[(of * a.queries + query) * a.tokens + token];
      } else if (token > a.tokens - a.queries + query) {
        score = -INFINITY;
      }
      scores[row * a.tokens + token] = score;
    }
  }
  for (int64_t row = 0; row < rows; row++) softmax(scores + row * a.tokens, a.tokens);
  std::memset(vector, 0, sizeof(float) * padded);
  for (int64_t token = 0; token < a.tokens; token++) {
    values.read(batch, token, head, vector);
    for (int64_t row = 0; row < rows; row++) add(scores[row * a.tokens + token], vector, padded, sums + row * padded);
  }
  for (int64_t row = 0; row < rows; row++) {
    const int64_t query = row % a.queries, by = head * shared + row / a.queries;
    std::memcpy(a.output + ((batch * a.queries + query) * a.heads + by) * a.width, sums + row * padded,
                sizeof(float) * a.width);
  }
}

}  // namespace
}  // namespace compress

using namespace compress;

// Round vectors [tokens, scales, width] to codes [tokens, stride bytes] and scales [tokens, scales].
extern "C" void compress_kv_quantize(const float* vectors, int64_t tokens, int64_t scales, int64_t width,
                                     int64_t stride, int32_t bits, uint8_t* codes, float* to) {
  const float top = (float)((1 << (bits - 1)) - 1);
#pragma omp parallel for if (tokens * scales * width >= ALONE)
  for (int64_t token = 0; token < tokens; token++) {
    std::memset(codes + token * stride, 0, stride);
    for (int64_t s = 0; s < scales; s++) {
      const float* x = vectors + (token * scales + s) * width;
      const float scale = to[token * scales + s] = (largest_magnitude(x, (int)width) + EPSILON) / top;
      encode(x, (int)width, bits, s * width, scale, codes + token * stride);
    }
  }
}

extern "C" void compress_kv_attention(const Attention* attention) {
  const Attention& a = *attention;
  const int64_t parts = a.batch * a.key_heads;
#pragma omp parallel if (parts * a.tokens * a.width >= ALONE)
  {
    std::vector<float> memory;
#pragma omp for
    for (int64_t part = 0; part < parts; part++) attend(a, part / a.key_heads, part % a.key_heads, memory);
  }
}
