// The columns of u as rows: transposed, scaled by powers of two to norms in [1/2, 1), and taken in pairs
// (hra_kernels/reference.py: _scaled_rows, _paired_rows).
#pragma once

#include "internal.h"
#include "vec.h"

namespace hra::cpu::HRA_ISA {
namespace {

template <class C>
HRA_INLINE Vec<double> load_wide(const C* from) {
  constexpr int kLane = kLanes<double>;
  typedef C Narrow __attribute__((vector_size(kLane * sizeof(C))));
  Narrow value;
  __builtin_memcpy(&value, from, sizeof(value));
  return __builtin_convertvector(value, Vec<double>);
}

template <class C>
HRA_INLINE Vec<double> load_wide_first(const C* from, int64_t count) {
  C lanes[kLanes<double>] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(C));
  return load_wide(lanes);
}

HRA_INLINE double sum(Vec<double> lanes) {
  double total = 0;
  HRA_UNROLL
  for (int l = 0; l < kLanes<double>; ++l) total += lanes[l];
  return total;
}

// The largest magnitude of a row, NaN if it has one: as integers, magnitudes are in order and NaN is the largest.
float largest(const float* row, int64_t D) {
  uint32_t most = 0;
  for (int64_t d = 0; d < D; ++d) {
    const uint32_t bits = bit_cast<uint32_t>(row[d]) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return bit_cast<float>(most);
}
double largest(const double* row, int64_t D) {
  uint64_t most = 0;
  for (int64_t d = 0; d < D; ++d) {
    const uint64_t bits = bit_cast<uint64_t>(row[d]) & 0x7fffffffffffffff;
    most = bits > most ? bits : most;
  }
  return bit_cast<double>(most);
}

struct Exponent {
  int value;     // 2^-value brings the norm into [1/2, 1); 0 for zero and non-finite rows
  bool nonzero;  // at or above reference._norm_exponent's threshold, or not finite
};

template <class C>
Exponent norm_exponent(const C* row, int64_t D) {
  constexpr int kThreshold = sizeof(C) == sizeof(float) ? -105 : -1001;
  constexpr int kMostAboveLargest = 40;  // |row| <= sqrt(D) max |row|
  const double most = static_cast<double>(largest(row, D));
  if (!(most <= static_cast<double>(sizeof(C) == sizeof(float) ? __FLT_MAX__ : __DBL_MAX__))) return {0, true};
  int coarse, fine;
  __builtin_frexp(most, &coarse);
  if (most == 0 || coarse + kMostAboveLargest < kThreshold) return {0, false};
  const Vec<double> scale = broadcast(__builtin_ldexp(1.0, -coarse));
  Vec<double> even{}, odd{};
  constexpr int kLane = kLanes<double>;
  int64_t d = 0;
  for (; d + 2 * kLane <= D; d += 2 * kLane) {
    const Vec<double> first = load_wide(row + d) * scale, second = load_wide(row + d + kLane) * scale;
    even += first * first;
    odd += second * second;
  }
  for (; d < D; d += kLane) {
    const Vec<double> rest = load_wide_first(row + d, smaller(kLane, D - d)) * scale;
    even += rest * rest;
  }
  __builtin_frexp(__builtin_sqrt(sum(even + odd)), &fine);
  const bool nonzero = coarse + fine >= kThreshold;
  return {nonzero ? coarse + fine : 0, nonzero};
}

template <class C>
void scale_row(C* row, int64_t D, int exponent) {
  if (exponent == 0) return;
  const double scale = __builtin_ldexp(1.0, exponent);
  for (int64_t d = 0; d < D; ++d) row[d] = static_cast<C>(static_cast<double>(row[d]) * scale);
}

// What the forward finds out about u and the backward needs again.
template <class T>
struct Columns {
  using C = Accumulator<T>;
  int64_t D, R;
  const T* u;
  int64_t stride_ud, stride_ur;
  C* rows;  // (R, D) ûᵀ, or v when the chain takes it in pairs
  int exponent[kMaxRank];
  bool nonzero[kMaxRank];
  int log_phi[kMaxRank / 2];

  bool has_both(int64_t pair) const { return nonzero[2 * pair] && nonzero[2 * pair + 1]; }

  // rows [begin, end) = those columns of u. Column by column within a few rows of u, whose cache lines then stay in L1.
  void transpose(int64_t begin, int64_t end) {
    constexpr int64_t kLane = kLanes<C>, kBlock = 32;
    for (int64_t d0 = 0; d0 < D; d0 += kBlock) {
      const int64_t count = smaller(kBlock, D - d0);
      for (int64_t r = begin; r < end; ++r) {
        T column[kBlock] = {};
        for (int64_t d = 0; d < count; ++d) column[d] = u[(d0 + d) * stride_ud + r * stride_ur];
        C* row = rows + r * D + d0;
        for (int64_t d = 0; d < count; d += kLane)
          store_first(row + d, load(column + d), static_cast<int>(smaller(kLane, count - d)));
      }
    }
  }

  void scale(int64_t r) {
    C* row = rows + r * D;
    const Exponent found = norm_exponent(row, D);
    exponent[r] = found.value;
    nonzero[r] = found.nonzero && D > 0;
    if (nonzero[r])
      scale_row(row, D, -exponent[r]);
    else
      std::memset(row, 0, static_cast<size_t>(D) * sizeof(C));
  }

  void subtract(int64_t pair) {
    const C* first = rows + 2 * pair * D;
    C* second = rows + (2 * pair + 1) * D;
    if (has_both(pair))
      for (int64_t d = 0; d < D; ++d) second[d] -= first[d];
    log_phi[pair] = norm_exponent(second, D).value;
    scale_row(second, D, -log_phi[pair]);
  }

  // Tasks share the pairs out.
  void prepare(int task, int tasks, bool in_pairs) {
    const int64_t pairs = (R + 1) / 2, first = pairs * task / tasks, last = pairs * (task + 1) / tasks;
    transpose(2 * first, smaller(R, 2 * last));
    for (int64_t pair = first; pair < last; ++pair) {
      scale(2 * pair);
      if (2 * pair + 1 == R) continue;
      scale(2 * pair + 1);
      if (in_pairs) subtract(pair);
    }
  }
};

}  // namespace
}  // namespace hra::cpu::HRA_ISA
