// All layers of a decoder for one new token in each row of a batch, in one parallel region.
//
// Between two barriers every thread does the same small things for itself (norms, residual sums, activations, preparing
// inputs), which is cheaper than waiting for one that does them, and then its share of the products or of the heads.
// Vectors are float32, rounded to the type of the model wherever the modules of transformers round.
#include "decoder.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>

#include "barrier.h"
#include "numbers.h"

namespace compress {
namespace {

constexpr size_t LINE = 64;

size_t lines(size_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

// Memory of one call, handed out in pieces that begin at a line of the cache.
class Memory {
 public:
  explicit Memory(size_t bytes) : start_(static_cast<char*>(std::aligned_alloc(LINE, std::max(bytes, LINE)))) {
    if (!start_) std::abort();
    next_ = start_;
  }
  ~Memory() { std::free(start_); }
  Memory(const Memory&) = delete;

  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += lines(count * sizeof(T));
    return piece;
  }

 private:
  char *start_, *next_;
};

// Linears of a layer that read the same input.
struct Group {
  const Linear* const* linear;
  int count;

  size_t outputs() const {
    size_t total = 0;
    for (int i = 0; i < count; i++) total += linear[i]->rows;
    return total;
  }
};

// Whether two linears arrange their input alike.
bool agree(const Linear& a, const Linear& b) {
  return a.kind <= DENSE && a.kind == b.kind && a.columns == b.columns && a.bits == b.bits && a.group == b.group &&
         a.activations == b.activations && a.type == b.type;
}

size_t scratch_of(const Group& group, int rows) {
  size_t total = 0;
  for (int i = 0; i < group.count; i++) total += lines(kernel_for(*group.linear[i], rows).scratch(*group.linear[i], rows));
  return total;
}

// Sizes that hold for every layer.
struct Sizes {
  size_t input = 0, output = 0, scratch = 0, head = 0;  // of a row; bytes for all rows; of a head

  Sizes(const Plan& plan, int rows) : input(plan.width) {
    for (int l = 0; l < plan.layers; l++) {
      const Layer& layer = plan.layer[l];
      if (layer.heads) consider({layer.project, layer.projections}, {&layer.output, 1}, rows);
      if (layer.neurons) consider({layer.input, layer.inputs}, {&layer.down, 1}, rows);
      head = std::max<size_t>(head, layer.width);
    }
  }

 private:
  void consider(const Group& in, const Group& out, int rows) {
    for (const Group& group : {in, out}) {
      output = std::max(output, group.outputs());
      scratch = std::max(scratch, scratch_of(group, rows));
      input = std::max<size_t>(input, group.linear[0]->columns);
    }
  }
};

// Dot products of a query with `count` keys that follow each other.
template <class T>
void dots(const float* query, const T* keys, int width, int count, float* products) {
  constexpr int TOGETHER = 4;
  int t = 0;
  for (; t + TOGETHER <= count; t += TOGETHER, keys += TOGETHER * size_t(width)) {
    Floats total[TOGETHER] = {};
    int d = 0;
    for (; d + LANES <= width; d += LANES) {
      const Floats q = load_lanes(query + d);
      for (int i = 0; i < TOGETHER; i++) total[i] += q * load_lanes(keys + size_t(i) * width + d);
    }
    for (int i = 0; i < TOGETHER; i++) {
      products[t + i] = sum(total[i]);
      for (int rest = d; rest < width; rest++) products[t + i] += query[rest] * load(keys[size_t(i) * width + rest]);
    }
  }
  for (; t < count; t++, keys += width) {
    products[t] = 0;
    for (int d = 0; d < width; d++) products[t] += query[d] * load(keys[d]);
  }
}

// to += the sum of `count` values that follow each other, each times its share.
template <class T>
void add_shares(const float* shares, const T* values, int width, int count, float* to) {
  constexpr int LINES = 4;
  int d = 0;
  for (; d + LINES * LANES <= width; d += LINES * LANES) {
    Floats total[LINES];
    for (int l = 0; l < LINES; l++) total[l] = load_lanes(to + d + l * LANES);
    for (int t = 0; t < count; t++) {
      if (shares[t] == 0) continue;  // outside a window
      for (int l = 0; l < LINES; l++) total[l] += shares[t] * load_lanes(values + size_t(t) * width + d + l * LANES);
    }
    for (int l = 0; l < LINES; l++) store(to + d + l * LANES, total[l]);
  }
  for (int t = 0; t < count && d < width; t++)
    for (int rest = d; rest < width; rest++) to[rest] += shares[t] * load(values[size_t(t) * width + rest]);
}

template <class T>
void normalize(const Norm& norm, const float* x, float* y, int width) {
  const T *weight = static_cast<const T*>(norm.weight), *bias = static_cast<const T*>(norm.bias);
  float mean = 0, squares = 0;
  if (norm.kind == LAYER) {
#pragma omp simd reduction(+ : mean)
    for (int i = 0; i < width; i++) mean += x[i];
    mean /= width;
  }
#pragma omp simd reduction(+ : squares)
  for (int i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / width + norm.epsilon);
  if (norm.kind == RMS)
    for (int i = 0; i < width; i++) y[i] = rounded<T>(load(weight[i]) * rounded<T>(x[i] * scale));
  else if (norm.kind == RMS_OFFSET)
    for (int i = 0; i < width; i++) y[i] = rounded<T>(x[i] * scale * (norm.offset + load(weight[i])));
  else if (norm.kind == LAYER)
    for (int i = 0; i < width; i++) {
      const float scaled = (x[i] - mean) * scale * (weight ? load(weight[i]) : 1.0f);
      y[i] = rounded<T>(scaled + (bias ? load(bias[i]) : 0.0f));
    }
  else if (x != y)
    std::copy(x, x + width, y);
}

// The activation of x, rounded where the module rounds.
template <class T, int KIND>
float activated(float x) {
  const auto r = rounded<T>;
  switch (KIND) {
    case SILU: return r(x * sigmoid(x));
    case GELU: return r(0.5f * x * (1.0f + error_function(x * 0.70710678f)));
    case GELU_TANH: return r(0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x))));
    case GELU_NEW: {
      const float inner = r(0.79788456f * r(x + r(0.044715f * r(r(x * x) * x))));
      return r(r(0.5f * x) * r(1.0f + r(hyperbolic_tangent(inner))));
    }
    case GELU_FAST: {
      const float inner = r(r(x * 0.79788456f) * r(1.0f + r(r(0.044715f * x) * x)));
      return r(r(0.5f * x) * r(1.0f + r(hyperbolic_tangent(inner))));
    }
    case GELU_QUICK: return r(x * r(sigmoid(r(1.702f * x))));
    default: return x > 0 ? x : x != x ? x : 0.0f;
  }
}

template <class T, int KIND>
void activate(const float* gate, const float* up, float* y, int count) {
  if (up)
#pragma omp simd
    for (int i = 0; i < count; i++) y[i] = rounded<T>(activated<T, KIND>(gate[i]) * up[i]);
  else
#pragma omp simd
    for (int i = 0; i < count; i++) y[i] = activated<T, KIND>(gate[i]);
}

template <class T>
void activate(int kind, const float* gate, const float* up, float* y, int count) {
  switch (kind) {
    case SILU: return activate<T, SILU>(gate, up, y, count);
    case GELU: return activate<T, GELU>(gate, up, y, count);
    case GELU_TANH: return activate<T, GELU_TANH>(gate, up, y, count);
    case GELU_NEW: return activate<T, GELU_NEW>(gate, up, y, count);
    case GELU_FAST: return activate<T, GELU_FAST>(gate, up, y, count);
    case GELU_QUICK: return activate<T, GELU_QUICK>(gate, up, y, count);
    default: return activate<T, RELU>(gate, up, y, count);
  }
}

// What all threads see.
struct Shared {
  const Plan& plan;
  const Step& step;
  const Sizes sizes;
  Barrier barrier;
  Memory memory;
  float* outputs[2];  // of the last group of linears, and of the next one

  Shared(const Plan& plan, const Step& step)
      : plan(plan), step(step), sizes(plan, step.rows), memory(2 * lines(bytes())) {
    for (float*& to : outputs) to = memory.take<float>(bytes() / sizeof(float));
  }
  size_t bytes() const { return sizeof(float) * step.rows * std::max(sizes.output, sizes.input); }
};

// What one thread does, with memory of its own.
template <class T>
class Worker {
 public:
  Worker(Shared& shared, int thread, int threads)
      : shared_(shared), step_(shared.step), rows_(shared.step.rows), width_(shared.plan.width), thread_(thread),
        threads_(threads), memory_(bytes()) {
    for (float** vectors : {&hidden_, &x_, &branch_, &kept_}) *vectors = memory_.take<float>(inputs());
    pair_ = memory_.take<float>(shared.sizes.output);
    scores_ = memory_.take<float>(tokens());
    for (float** of_head : {&query_, &key_, &value_, &sum_}) *of_head = memory_.take<float>(shared.sizes.head);
    scratch_ = memory_.take<char>(shared.sizes.scratch);
  }

  void run() {
    const T* input = static_cast<const T*>(step_.input);
    for (size_t i = 0; i < residual(); i++) hidden_[i] = load(input[i]);
    for (int l = 0; l < shared_.plan.layers; l++) pass(shared_.plan.layer[l], l);
    T* output = static_cast<T*>(step_.output);
    if (thread_ == 0)
      for (size_t i = 0; i < residual(); i++) store(output[i], hidden_[i]);
  }

 private:
  Shared& shared_;
  const Step& step_;
  const int rows_, width_, thread_, threads_;
  Memory memory_;
  float *hidden_, *x_, *branch_, *kept_, *pair_, *scores_, *query_, *key_, *value_, *sum_;
  char* scratch_;
  int turn_ = 0;

  size_t residual() const { return size_t(rows_) * width_; }
  size_t inputs() const { return shared_.sizes.input * rows_; }
  size_t tokens() const { return size_t(step_.length) + 1; }

  size_t bytes() const {
    const Sizes& sizes = shared_.sizes;
    return 4 * lines(4 * inputs()) + lines(4 * sizes.output) + lines(4 * tokens()) + 4 * lines(4 * sizes.head) +
           lines(sizes.scratch);
  }

  void pass(const Layer& layer, int index) {
    if (layer.parallel) return pass_parallel(layer, index);
    attention(layer, index);
    if (layer.heads) add(hidden_, branch_);
    if (!layer.norm_first) normalize_rows(layer.attention_norm, hidden_, hidden_);  // also where its block was removed
    mlp(layer);
    if (layer.neurons) add(hidden_, branch_);
    if (!layer.norm_first) normalize_rows(layer.mlp_norm, hidden_, hidden_);
  }

  void pass_parallel(const Layer& layer, int index) {
    attention(layer, index);
    std::copy(branch_, branch_ + residual(), kept_);
    mlp(layer);
    if (layer.heads && layer.neurons) add(branch_, kept_);
    if (layer.heads || layer.neurons) add(hidden_, layer.neurons ? branch_ : kept_);
  }

  void add(float* to, const float* what) {
    for (size_t i = 0; i < residual(); i++) to[i] = rounded<T>(to[i] + what[i]);
  }

  void normalize_rows(const Norm& norm, const float* x, float* y) {
    for (int b = 0; b < rows_; b++) normalize<T>(norm, x + size_t(b) * width_, y + size_t(b) * width_, width_);
  }

  const float* block_input(const Norm& norm, bool norm_first) {
    if (!norm_first) return hidden_;
    normalize_rows(norm, hidden_, x_);
    return x_;
  }

  // The shared memory whose content nobody reads any more.
  float* free_outputs() { return shared_.outputs[turn_ ^= 1]; }

  // The products of x with all linears of a group: of each [rows of the batch, its rows], one after the other.
  const float* products(const Group& group, const float* x) {
    float *const y = free_outputs(), *to = y;
    char *next = scratch_, *prepared = scratch_;
    for (int i = 0; i < group.count; i++) {
      const Linear& linear = *group.linear[i];
      const Kernel& kernel = kernel_for(linear, rows_);
      if (i == 0 || !agree(linear, *group.linear[i - 1])) {
        prepared = next;
        kernel.prepare(linear, x, rows_, prepared);
        next += lines(kernel.scratch(linear, rows_));
      }
      kernel.multiply(linear, prepared, rows_, to, thread_, threads_);
      to += size_t(linear.rows) * rows_;
    }
    shared_.barrier.wait(threads_);
    return y;
  }

  // One vector of what a group of linears made of row b of the batch, with its bias, rounded.
  void fetch(const Group& group, const float* y, const void* const* biases, const Place& place, int b, int h, int count,
             float* to) {
    for (int i = 0; i < place.linear; i++) y += size_t(group.linear[i]->rows) * rows_;
    const int start = place.start + h * place.stride;
    y += size_t(group.linear[place.linear]->rows) * b + start;
    const T* bias = static_cast<const T*>(biases[place.linear]);
    if (bias)
      for (int i = 0; i < count; i++) to[i] = rounded<T>(y[i] + load(bias[start + i]));
    else
      for (int i = 0; i < count; i++) to[i] = rounded<T>(y[i]);
  }

  // The output of a block, before it is added: branch_.
  void finish(const Linear* const& linear, const void* bias, const Norm& norm, const float* x) {
    const float* y = products({&linear, 1}, x);
    for (int b = 0; b < rows_; b++)
      fetch({&linear, 1}, y, &bias, {0, 0, 0}, b, 0, width_, branch_ + size_t(b) * width_);
    if (norm.kind != NO_NORM) normalize_rows(norm, branch_, branch_);
  }

  void mlp(const Layer& layer) {
    if (!layer.neurons) return;
    const Group group{layer.input, layer.inputs};
    const float* y = products(group, block_input(layer.mlp_norm, layer.norm_first));
    const int n = layer.neurons;
    const bool gated = layer.gate.linear >= 0;
    for (int b = 0; b < rows_; b++) {
      fetch(group, y, layer.input_bias, gated ? layer.gate : layer.up, b, 0, n, pair_);
      if (gated) fetch(group, y, layer.input_bias, layer.up, b, 0, n, pair_ + n);
      activate<T>(layer.activation, pair_, gated ? pair_ + n : nullptr, x_ + size_t(b) * n, n);
    }
    finish(layer.down, layer.down_bias, layer.post_mlp_norm, x_);
  }

  void attention(const Layer& layer, int index) {
    if (!layer.heads) return count_token(layer, index);
    const Group group{layer.project, layer.projections};
    const float* y = products(group, block_input(layer.attention_norm, layer.norm_first));
    float* heads = free_outputs();
    const int64_t count = int64_t(rows_) * layer.heads;
    for (int64_t i = count * thread_ / threads_; i < count * (thread_ + 1) / threads_; i++)
      head(layer, index, group, y, int(i / layer.heads), int(i % layer.heads), heads + i * layer.width);
    shared_.barrier.wait(threads_);
    finish(layer.output, layer.output_bias, layer.post_attention_norm, heads);
  }

  T* cached(void* const* tensors, const Layer& layer, int index, int b, int g) {
    return static_cast<T*>(tensors[index]) + (size_t(b) * layer.groups + g) * step_.capacity[index] * layer.width;
  }

  // A layer without attention has one number per token in the cache.
  void count_token(const Layer& layer, int index) {
    for (int b = 0; b < rows_ && thread_ == 0; b++)
      for (void* const* tensors : {step_.keys, step_.values})
        store(cached(tensors, layer, index, b, 0)[step_.length], 0.0f);
  }

  void rotate(const Given& given, int b, float* head) {
    const T* cosines = static_cast<const T*>(given.cosines) + b * given.rotation_stride;
    const T* sines = static_cast<const T*>(given.sines) + b * given.rotation_stride;
    const int half = given.rotated / 2;
    const auto r = rounded<T>;
    for (int i = 0; i < half; i++) {
      const float first = head[i], second = head[i + half];
      head[i] = r(r(first * load(cosines[i])) - r(second * load(sines[i])));
      head[i + half] = r(r(second * load(cosines[i + half])) + r(first * load(sines[i + half])));
    }
  }

  // One query head of row b: its attention over the cached tokens and the new one, which it appends to the cache if it
  // is the first head of its group. Its neighbours compute the new key and value again and never wait for them.
  void head(const Layer& layer, int index, const Group& group, const float* y, int b, int h, float* out) {
    const int width = layer.width, together = layer.heads / layer.groups, g = h / together;
    const Given& given = step_.given[layer.kind];
    fetch(group, y, layer.project_bias, layer.query, b, h, width, query_);
    fetch(group, y, layer.project_bias, layer.key, b, g, width, key_);
    fetch(group, y, layer.project_bias, layer.value, b, g, width, value_);
    if (layer.scales_query)
      for (int d = 0; d < width; d++) query_[d] = rounded<T>(query_[d] * layer.scaling);
    normalize<T>(layer.query_norm, query_, query_, width);
    normalize<T>(layer.key_norm, key_, key_, width);
    rotate(given, b, query_);
    rotate(given, b, key_);
    T* const keys = cached(step_.keys, layer, index, b, g);
    T* const values = cached(step_.values, layer, index, b, g);
    if (h % together == 0) append(key_, keys, width), append(value_, values, width);
    scores(layer, given, keys, b);
    const float total = probabilities(layer.eager);
    mix(values, width, layer.eager ? 1.0f : 1.0f / total, out);
  }

  void append(const float* vector, T* to, int width) {
    for (int d = 0; d < width; d++) store(to[size_t(step_.length) * width + d], vector[d]);
  }

  void scores(const Layer& layer, const Given& given, const T* keys, int b) {
    const float scaling = layer.scales_query ? 1.0f : layer.scaling;
    dots(query_, keys, layer.width, step_.length, scores_);
    dots(query_, key_, layer.width, 1, scores_ + step_.length);
    for (int t = 0; t <= step_.length; t++)
      scores_[t] = layer.eager ? rounded<T>(rounded<T>(scores_[t]) * scaling) : scores_[t] * scaling;
    if (layer.softcap != 0) cap(layer.softcap);
    if (given.mask_kind == BOOLEAN) {
      const bool* seen = static_cast<const bool*>(given.mask) + b * given.mask_stride;
      for (int t = 0; t <= step_.length; t++) scores_[t] = seen[t] ? scores_[t] : -INFINITY;
    }
    if (given.mask_kind == ADDITIVE) {
      const T* mask = static_cast<const T*>(given.mask) + b * given.mask_stride;
      for (int t = 0; t <= step_.length; t++) {
        scores_[t] += load(mask[t]);
        if (layer.eager) scores_[t] = rounded<T>(scores_[t]);
      }
    }
  }

  void cap(float softcap) {  // only eager attention has it
    const auto r = rounded<T>;
    for (int t = 0; t <= step_.length; t++)
      scores_[t] = r(r(hyperbolic_tangent(r(scores_[t] / softcap))) * softcap);
  }

  // Scores to probabilities, as eager attention makes them, or before they are divided by their sum, which is returned.
  float probabilities(bool eager) {
    const int count = step_.length + 1;
    float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
    for (int t = 0; t < count; t++) largest = scores_[t] > largest ? scores_[t] : largest;
#pragma omp simd reduction(+ : total)
    for (int t = 0; t < count; t++) total += scores_[t] = exponential(scores_[t] - largest);
    const float share = eager ? 1.0f / total : 1.0f;
    for (int t = 0; t < count; t++) scores_[t] = rounded<T>(scores_[t] * share);
    return total;
  }

  void mix(const T* values, int width, float scale, float* out) {
    const float last = scores_[step_.length];
    for (int d = 0; d < width; d++) sum_[d] = last * value_[d];
    add_shares(scores_, values, width, step_.length, sum_);
    for (int d = 0; d < width; d++) out[d] = rounded<T>(sum_[d] * scale);
  }
};

template <class T>
void decode(const Plan& plan, const Step& step) {
  Shared shared(plan, step);
#pragma omp parallel
  Worker<T>(shared, omp_get_thread_num(), omp_get_num_threads()).run();
}

}  // namespace
}  // namespace compress

// Run all layers of a plan for one step. The caller has checked every size.
extern "C" void compress_decode(const compress::Plan* plan, const compress::Step* step) {
  switch (plan->type) {
    case compress::FLOAT32: return compress::decode<float>(*plan, *step);
    case compress::BFLOAT16: return compress::decode<compress::bfloat16>(*plan, *step);
    default: return compress::decode<compress::float16>(*plan, *step);
  }
}
