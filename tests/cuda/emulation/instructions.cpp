#include "instructions.h"

#include <cmath>
#include <cstring>

#include "machine.h"

namespace hra::emulation {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t half_of(uint32_t packed, int index) { return static_cast<uint16_t>(packed >> (16 * index)); }

float toward_zero(double exact) {
  float rounded = static_cast<float>(exact);
  if (std::isfinite(exact) && std::fabs(static_cast<double>(rounded)) > std::fabs(exact)) {
    rounded = std::nextafter(rounded, 0.0f);
  }
  return rounded;
}

struct ShuffleArguments {
  float value, result;
  int lane_mask;
};

struct LoadArguments {
  uint32_t* registers;
  const void* row;
  bool transpose;
};

struct MmaArguments {
  float* c;
  const uint32_t *a, *b;
};

void shuffle_operation(void* const arguments[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<ShuffleArguments*>(arguments[lane]);
    mine->result = static_cast<ShuffleArguments*>(arguments[lane ^ mine->lane_mask])->value;
  }
}

void load_operation(void* const arguments[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<LoadArguments*>(arguments[lane]);
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        int row = mine->transpose ? 2 * (lane % 4) + i : lane / 4;
        int column = mine->transpose ? lane / 4 : 2 * (lane % 4) + i;
        auto* from = static_cast<LoadArguments*>(arguments[8 * matrix + row]);
        std::memcpy(&pair[i], static_cast<const char*>(from->row) + 2 * column, 2);
      }
      mine->registers[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

struct TransposeArguments {
  uint32_t pair, result;
};

void transpose_operation(void* const arguments[32]) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<TransposeArguments*>(arguments[lane]);
    mine->result = 0;
    for (int i = 0; i < 2; ++i) {
      int row = 2 * (lane % 4) + i, column = lane / 4;
      auto* from = static_cast<TransposeArguments*>(arguments[4 * row + column / 2]);
      mine->result |= static_cast<uint32_t>(half_of(from->pair, column % 2)) << (16 * i);
    }
  }
}

void mma_operation(void* const arguments[32]) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<MmaArguments*>(arguments[lane]);
    int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 2; ++i) {
      a[group][pair + i] = float_from_bfloat16(half_of(mine->a[0], i));
      a[group + 8][pair + i] = float_from_bfloat16(half_of(mine->a[1], i));
      a[group][pair + 8 + i] = float_from_bfloat16(half_of(mine->a[2], i));
      a[group + 8][pair + 8 + i] = float_from_bfloat16(half_of(mine->a[3], i));
      b[pair + i][group] = float_from_bfloat16(half_of(mine->b[0], i));
      b[pair + 8 + i][group] = float_from_bfloat16(half_of(mine->b[1], i));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* c = static_cast<MmaArguments*>(arguments[lane])->c;
    for (int i = 0; i < 4; ++i) {
      int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = c[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[i] = toward_zero(sum);
    }
  }
}

}  // namespace

uint16_t bfloat16_from_float(float value) {
  uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float_from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

uint16_t float16_from_float(float value) {
  uint16_t sign = static_cast<uint16_t>(bits_of(value) >> 16 & 0x8000);
  if (std::isnan(value)) return 0x7fff;
  double size = std::fabs(static_cast<double>(value));
  if (size >= 65520.0) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent = 0;
  std::frexp(size, &exponent);
  if (exponent < -13) exponent = -13;  // subnormal: the step is that of the smallest normal number
  auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  // the implicit leading bit of `steps` carries into the exponent field; a subnormal has none
  return static_cast<uint16_t>(sign | (static_cast<uint32_t>(exponent + 13) * 1024 + steps));
}

float float_from_float16(uint16_t bits) {
  int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float size = exponent == 31  ? (mantissa ? std::nanf("") : INFINITY)
               : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits & 0x8000 ? -size : size;
}

float shuffle_xor(float value, int lane_mask) {
  ShuffleArguments arguments{value, 0, lane_mask};
  warp_collective("__shfl_xor_sync", &arguments, shuffle_operation);
  return arguments.result;
}

void ldmatrix(uint32_t registers[4], bool transpose, const void* row) {
  check_shared(row, 16, "ldmatrix");
  LoadArguments arguments{registers, row, transpose};
  warp_collective("ldmatrix", &arguments, load_operation);
}

uint32_t movmatrix(uint32_t pair) {
  TransposeArguments arguments{pair, 0};
  warp_collective("movmatrix", &arguments, transpose_operation);
  return arguments.result;
}

void mma_bf16_16x8x16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  MmaArguments arguments{c, a, b};
  warp_collective("mma.sync", &arguments, mma_operation);
}

}  // namespace hra::emulation
