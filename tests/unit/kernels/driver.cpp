// Multiplies known weights by every kernel of the sources it is linked with, and compares with a plain loop.
//
// It needs neither Python nor torch, so it also runs in an emulator of another processor, and with a sanitizer. It
// prints what is wrong, and then how many products were right.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "codes.h"
#include "strips.h"

using namespace compress;

extern "C" void compress_linear_by(const Linear* linear, const void* x, void* y, int32_t rows, int32_t many);

namespace {

std::mt19937 generator(1);

int below(int end) { return generator() % end; }
float uniform() { return generator() / 4294967296.0f; }

float from_e4m3(int code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  float size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return code & 128 ? -size : size;
}

// Puts codes [rows, columns] into strips, as kernels/cpu/layout.py says.
std::vector<uint8_t> to_strips(const std::vector<uint8_t>& codes, int rows, int columns, int bits, int group) {
  const int chunk = chunk_of(bits), strips = ceil_div(rows, STRIP);
  std::vector<uint8_t> bytes;
  for (int strip = 0; strip < strips; strip++)
    for (int start = 0; start < columns; start += group)
      for (int at = 0; at < std::min(group, columns - start); at += chunk)
        for (int plane = 0, low = 0; low < bits; low += plane) {
          plane = wide_plane(bits - low);
          const int fields = 8 / plane;
          for (int line = 0; line < chunk * plane / 32; line++)
            for (int row = strip * STRIP; row < (strip + 1) * STRIP; row++)
              for (int c = 0; c < 4; c++) {
                int byte = 0;
                for (int j = 0; j < fields; j++) {
                  int column = at + 4 * fields * line + 4 * j + c;
                  if (row < rows && column < std::min(group, columns - start))
                    byte |= (codes[row * columns + start + column] >> low & ((1 << plane) - 1)) << (plane * j);
                }
                bytes.push_back(byte);
              }
        }
  return bytes;
}

float tolerance(const Linear& linear) {
  if (linear.type == FLOAT32) return linear.kind == TABLE ? 2e-5f : 5e-6f;
  return linear.type == FLOAT16 ? 1e-3f : 1e-2f;
}

template <class T>
const T* kept(std::vector<T>&& values) {
  return (new std::vector<T>(std::move(values)))->data();
}

struct Weight {
  Linear linear{};
  std::vector<double> values;

  Weight(Kind kind, int rows, int columns, int bits, int group, Type type, bool zeros) {
    const int groups = ceil_div(columns, group), strips = ceil_div(rows, STRIP);
    std::vector<uint8_t> codes(rows * columns), points(strips * groups * STRIP);
    std::vector<float> scales(strips * groups * STRIP), table(1 << bits), bias(rows);
    for (auto& code : codes) do code = below(1 << bits); while (kind == FP8 && (code & 127) == 127);
    for (auto& point : points) point = below(1 << bits);
    for (auto& number : table) number = uniform() - 0.5f;
    for (auto& value : bias) value = uniform();
    for (int row = 0; row < rows; row++)
      for (int g = 0; g < groups; g++) scales[((row / STRIP) * groups + g) * STRIP + row % STRIP] = uniform() + 0.5f;
    for (int row = 0; row < rows; row++)
      for (int column = 0; column < columns; column++) {
        int code = codes[row * columns + column];
        int at = ((row / STRIP) * groups + column / group) * STRIP + row % STRIP;
        double level = kind == FP8     ? from_e4m3(code)
                       : kind == TABLE ? table[code]
                                       : code - (zeros ? points[at] : 1 << (bits - 1));
        values.push_back(level * scales[at]);
      }
    linear.kind = kind, linear.rows = rows, linear.columns = columns, linear.bits = bits, linear.group = group;
    linear.type = type, linear.scale_type = FLOAT32, linear.blocks = 1, linear.bias_type = FLOAT32;
    linear.codes[0] = kept(to_strips(codes, rows, columns, bits, group));
    linear.scales = kept(std::move(scales)), linear.bias = kept(std::move(bias));
    if (zeros && kind == INTEGER) linear.zeros = kept(std::move(points));
    if (kind == TABLE) linear.table = kept(std::move(table));
  }
};

// Round a number to a type, and back.
float rounded(float value, int type) {
  if (type == FLOAT32) return value;
  return type == BFLOAT16 ? from_bfloat(to_bfloat(value)) : from_half(to_half(value));
}

void write(float value, int type, std::vector<char>& to, size_t at) {
  uint16_t narrow = type == BFLOAT16 ? to_bfloat(value) : to_half(value);
  if (type == FLOAT32)
    std::memcpy(&to[4 * at], &value, 4);
  else
    std::memcpy(&to[2 * at], &narrow, 2);
}

float read(const std::vector<char>& from, int type, size_t at) {
  float value;
  uint16_t narrow;
  if (type == FLOAT32) return std::memcpy(&value, &from[4 * at], 4), value;
  std::memcpy(&narrow, &from[2 * at], 2);
  return type == BFLOAT16 ? from_bfloat(narrow) : from_half(narrow);
}

bool right(const Weight& weight, int rows, bool many) {
  const Linear& linear = weight.linear;
  const int size = linear.type == FLOAT32 ? 4 : 2;
  std::vector<float> x(rows * linear.columns);
  std::vector<char> input(x.size() * size), output((size_t)rows * linear.rows * size);
  for (size_t i = 0; i < x.size(); i++) x[i] = rounded(uniform() - 0.5f, linear.type), write(x[i], linear.type, input, i);
  compress_linear_by(&linear, input.data(), output.data(), rows, many);
  double error = 0, norm = 0;
  for (int row = 0; row < rows; row++)
    for (int n = 0; n < linear.rows; n++) {
      double sum = linear.bias[n];
      for (int k = 0; k < linear.columns; k++) sum += weight.values[n * linear.columns + k] * x[row * linear.columns + k];
      double difference = read(output, linear.type, (size_t)row * linear.rows + n) - sum;
      error += difference * difference, norm += sum * sum;
    }
  if (std::sqrt(error / norm) <= tolerance(linear)) return true;
  std::printf("kind %d, %d bits, type %d, group %d, %d x %d, %d rows, many %d: an error of %g\n", linear.kind, linear.bits,
              linear.type, linear.group, linear.rows, linear.columns, rows, many, std::sqrt(error / norm));
  return false;
}

}  // namespace

int main() {
  int done = 0, wrong = 0;
  auto check = [&](Kind kind, int bits) {
    for (Type type : {FLOAT32, BFLOAT16, FLOAT16})
      for (int group : {32, 24, 100}) {
        Weight weight(kind, 1 + below(40), 100 + below(60), bits, group, type, below(2));
        for (int rows : {1, 3, 4, 21})
          for (bool many : {false, true}) (right(weight, rows, many) ? done : wrong)++;
      }
  };
  for (int bits = 2; bits <= 8; bits++) check(INTEGER, bits);
  check(TABLE, 2), check(TABLE, 4), check(FP8, 8);
  std::printf("%d right, %d wrong\n", done, wrong);
  return wrong != 0;
}
