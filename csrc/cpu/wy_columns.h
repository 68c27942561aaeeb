// The columns of u (D, R) as rows: transposed, scaled by powers of two to norms in [1/2, 1), and taken in pairs
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

// 2^exponent, also where that is outside C's range: two factors, applied one after the other. No product in between
// rounds unless the last one rounds to the same.
template <class C>
struct PowerOfTwo {
  C first, second;
  explicit PowerOfTwo(int exponent)
      : first(static_cast<C>(__builtin_ldexp(1.0, exponent / 2))),
        second(static_cast<C>(__builtin_ldexp(1.0, exponent - exponent / 2))) {}
  C times(C value) const { return value * first * second; }
  Vec<C> times(Vec<C> value) const { return value * first * second; }
};

template <class C>
constexpr int kThreshold = sizeof(C) == sizeof(float) ? -105 : -1001;  // reference._norm_exponent's

struct Exponent {
  int value;     // 2^-value brings the norm into [1/2, 1); 0 for zero and non-finite rows
  bool nonzero;  // at or above reference._norm_exponent's threshold, or not finite
};

// From a norm's square times 4^-coarse.
Exponent exponent_of(double square, int coarse, int threshold) {
  if (!(square <= __DBL_MAX__)) return {0, true};
  int fine;
  __builtin_frexp(__builtin_sqrt(square), &fine);
  const bool nonzero = square > 0 && coarse + fine >= threshold;
  return {nonzero ? coarse + fine : 0, nonzero};
}

// Of `count` elements `stride` apart. Squares of float32 are in float64's range, squares of float64 are not.
Exponent norm_exponent(const float* row, int64_t count) {
  constexpr int kLane = kLanes<double>;
  Vec<double> even{}, odd{};
  int64_t d = 0;
  for (; d + 2 * kLane <= count; d += 2 * kLane) {
    const Vec<double> first = load_wide(row + d), second = load_wide(row + d + kLane);
    even += first * first;
    odd += second * second;
  }
  for (; d < count; d += kLane) {
    const Vec<double> rest = load_wide_first(row + d, smaller(kLane, count - d));
    even += rest * rest;
  }
  return exponent_of(sum(even + odd), 0, kThreshold<float>);
}

Exponent norm_exponent(const double* row, int64_t count, int64_t stride = 1) {
  uint64_t most = 0;  // as integers, magnitudes are in order and NaN is the largest
  for (int64_t d = 0; d < count; ++d) {
    const uint64_t bits = bit_cast<uint64_t>(row[d * stride]) & 0x7fffffffffffffff;
    most = bits > most ? bits : most;
  }
  const double largest = bit_cast<double>(most);
  if (largest == 0) return {0, false};
  int coarse;
  __builtin_frexp(largest, &coarse);
  if (!(largest <= __DBL_MAX__)) return {0, true};
  const PowerOfTwo<double> scale(-coarse);
  double square = 0;
  for (int64_t d = 0; d < count; ++d) {
    const double value = scale.times(row[d * stride]);
    square += value * value;
  }
  return exponent_of(square, coarse, kThreshold<double>);
}

// The first element whose magnitude is at least `least`, or `count`.
template <class C>
int64_t first_above(const C* row, int64_t count, C least) {
  constexpr int64_t kAtOnce = 64;
  for (int64_t begin = 0; begin < count; begin += kAtOnce) {
    const int64_t end = smaller(begin + kAtOnce, count);
    int found = 0;
    for (int64_t d = begin; d < end; ++d) found |= row[d] >= least || row[d] <= -least;
    for (int64_t d = begin; found != 0 && d < end; ++d)
      if (row[d] >= least || row[d] <= -least) return d;
  }
  return count;
}

// The squares of the norms of u's columns, in an order that depends on D and R alone. kLane rows of u are R vectors in
// memory, and a lane of one of them meets the same column in each kLane rows.
template <class T>
struct Squares {
  static constexpr int kLane = kLanes<double>;
  const T* u;
  int64_t D, R;
  double* square;  // (R)

  HRA_INLINE Vec<double> wide(const T* from, int64_t count) const {
    if constexpr (sizeof(T) == 4) return count == kLane ? load_wide(from) : load_wide_first(from, count);
    float lanes[kLanes<float>];
    store(lanes, load_first(from, static_cast<int>(count)));
    return load_wide(lanes);
  }

  template <int COUNT>
  HRA_INLINE void add(int64_t j0, int64_t blocks) const {
    Vec<double> acc[COUNT] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      HRA_UNROLL
      for (int j = 0; j < COUNT; ++j) {
        const Vec<double> value = wide(u + (block * R + j0 + j) * kLane, kLane);
        acc[j] += value * value;
      }
    }
    for (int j = 0; j < COUNT; ++j)
      for (int l = 0; l < kLane; ++l) square[((j0 + j) * kLane + l) % R] += acc[j][l];
  }

  void run() const {
    constexpr int kAtOnce = 8;
    std::memset(square, 0, static_cast<size_t>(R) * sizeof(double));
    const int64_t blocks = D / kLane;
    int64_t j = 0;
    for (; j + kAtOnce <= R; j += kAtOnce) add<kAtOnce>(j, blocks);
    for (; j < R; ++j) add<1>(j, blocks);
    for (int64_t at = blocks * kLane * R; at < D * R; at += kLane) {
      const int64_t count = smaller(kLane, D * R - at);
      const Vec<double> value = wide(u + at, count);
      for (int64_t l = 0; l < count; ++l) square[(at + l) % R] += value[l] * value[l];
    }
  }
};

// Evens and odds of two vectors that follow each other, and back.
template <class C>
HRA_INLINE void split(Vec<C>& even, Vec<C>& odd, Vec<C> first, Vec<C> second) {
  even = pick<C>(first, second, [](int l) { return 2 * l; });
  odd = pick<C>(first, second, [](int l) { return 2 * l + 1; });
}
template <class C>
HRA_INLINE void merge(Vec<C>& first, Vec<C>& second, Vec<C> even, Vec<C> odd) {
  first = pick<C>(even, odd, [](int l) { return l % 2 * kLanes<C> + l / 2; });
  second = pick<C>(even, odd, [](int l) { return l % 2 * kLanes<C> + (l + kLanes<C>) / 2; });
}

// Eight rows of eight, transposed. For AVX2 evens and odds of two vectors are two or three instructions, but halves of
// their 16-byte parts, and these parts, are one.
template <class C>
HRA_INLINE void transpose_eight(Vec<C>* rows) {
  Vec<C> pairs[8], fours[8];
  HRA_UNROLL
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = pick<C>(rows[i], rows[i + 1], [](int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * 8; });
    pairs[i + 1] = pick<C>(rows[i], rows[i + 1], [](int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * 8 + 2; });
  }
  HRA_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int from = i / 4 * 4 + i % 4 / 2, half = i % 2 * 2;
    fours[i] = half ? pick<C>(pairs[from], pairs[from + 2], [](int l) { return l / 4 * 4 + l % 2 + l % 4 / 2 * 8 + 2; })
                    : pick<C>(pairs[from], pairs[from + 2], [](int l) { return l / 4 * 4 + l % 2 + l % 4 / 2 * 8; });
  }
  HRA_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[i] = pick<C>(fours[i], fours[i + 4], [](int l) { return l % 4 + l / 4 * 8; });
    rows[i + 4] = pick<C>(fours[i], fours[i + 4], [](int l) { return l % 4 + l / 4 * 8 + 4; });
  }
}
template <class C, int COUNT>
constexpr bool kTransposes = kVecBytes == 32 && sizeof(C) == sizeof(float) && COUNT == 8;

// kLanes rows of COUNT values each, row by row in COUNT vectors, as COUNT columns; and back. COUNT is a power of two.
template <class C, int COUNT>
HRA_INLINE void to_columns(Vec<C>* vectors) {
  if constexpr (kTransposes<C, COUNT>) return transpose_eight<C>(vectors);
  HRA_UNROLL
  for (int stage = 1; stage < COUNT; stage *= 2) {
    Vec<C> next[COUNT];
    HRA_UNROLL
    for (int i = 0; i < COUNT / 2; ++i) split<C>(next[i], next[i + COUNT / 2], vectors[2 * i], vectors[2 * i + 1]);
    HRA_UNROLL
    for (int i = 0; i < COUNT; ++i) vectors[i] = next[i];
  }
}
template <class C, int COUNT>
HRA_INLINE void to_rows(Vec<C>* vectors) {
  if constexpr (kTransposes<C, COUNT>) return transpose_eight<C>(vectors);
  HRA_UNROLL
  for (int stage = 1; stage < COUNT; stage *= 2) {
    Vec<C> next[COUNT];
    HRA_UNROLL
    for (int i = 0; i < COUNT / 2; ++i) merge<C>(next[2 * i], next[2 * i + 1], vectors[i], vectors[i + COUNT / 2]);
    HRA_UNROLL
    for (int i = 0; i < COUNT; ++i) vectors[i] = next[i];
  }
}

// The same from u (rows of R values) and into du, for all R: columns are (R, kLanes) values of the accumulator's type.
template <class T, int COUNT, class C = Accumulator<T>>
void load_columns(C* columns, const T* u) {
  Vec<C> vectors[COUNT];
  HRA_UNROLL
  for (int i = 0; i < COUNT; ++i) vectors[i] = load(u + i * kLanes<C>);
  to_columns<C, COUNT>(vectors);
  HRA_UNROLL
  for (int i = 0; i < COUNT; ++i) store(columns + i * kLanes<C>, vectors[i]);
}
template <class T, class C = Accumulator<T>>
void load_columns(C* columns, const T* u, int64_t R, int64_t count) {
  constexpr int kLane = kLanes<C>;
  int64_t first = 0;
  if (count == kLane)
    for (; first + kLane <= R; first += kLane) {  // one row of u is one vector
      Vec<C> vectors[kLane];
      HRA_UNROLL
      for (int l = 0; l < kLane; ++l) vectors[l] = load(u + l * R + first);
      to_columns<C, kLane>(vectors);
      HRA_UNROLL
      for (int r = 0; r < kLane; ++r) store(columns + (first + r) * kLane, vectors[r]);
    }
  if (count == kLane && R < kLane) switch (R) {
      case 1:
        return load_columns<T, 1>(columns, u);
      case 2:
        return load_columns<T, 2>(columns, u);
      case 4:
        return load_columns<T, 4>(columns, u);
      case 8:
        return load_columns<T, 8>(columns, u);
      default:
        break;
    }
  for (int64_t r = first; r < R; ++r) {
    T column[kLane] = {};
    for (int64_t l = 0; l < count; ++l) column[l] = u[l * R + r];
    store(columns + r * kLane, load(column));
  }
}
template <class T, int COUNT, class C = Accumulator<T>>
void store_columns(T* du, const C* columns, int64_t stride) {
  Vec<C> vectors[COUNT];
  HRA_UNROLL
  for (int i = 0; i < COUNT; ++i) vectors[i] = load(columns + i * stride);
  to_rows<C, COUNT>(vectors);
  HRA_UNROLL
  for (int i = 0; i < COUNT; ++i) store(du + i * kLanes<C>, vectors[i]);
}
template <class T, class C = Accumulator<T>>
void store_columns(T* du, const C* columns, int64_t stride, int64_t R, int64_t count) {
  constexpr int kLane = kLanes<C>;
  int64_t first = 0;
  if (count == kLane)
    for (; first + kLane <= R; first += kLane) {
      Vec<C> vectors[kLane];
      HRA_UNROLL
      for (int r = 0; r < kLane; ++r) vectors[r] = load(columns + (first + r) * stride);
      to_rows<C, kLane>(vectors);
      HRA_UNROLL
      for (int l = 0; l < kLane; ++l) store(du + l * R + first, vectors[l]);
    }
  if (count == kLane && R < kLane) switch (R) {
      case 1:
        return store_columns<T, 1>(du, columns, stride);
      case 2:
        return store_columns<T, 2>(du, columns, stride);
      case 4:
        return store_columns<T, 4>(du, columns, stride);
      case 8:
        return store_columns<T, 8>(du, columns, stride);
      default:
        break;
    }
  for (int64_t r = first; r < R; ++r) {
    T column[kLane];
    store(column, load(columns + r * stride));
    for (int64_t l = 0; l < count; ++l) du[l * R + r] = column[l];
  }
}

// What the forward finds out about u and the backward needs again.
template <class T>
struct Columns {
  using C = Accumulator<T>;
  static constexpr int kLane = kLanes<C>;
  int64_t D, R;
  const T* u;
  C* rows;  // (R, D) ûᵀ, or v when the chain takes it in pairs
  int exponent[kMaxRank];
  bool nonzero[kMaxRank];
  C power[kMaxRank][2];  // 2^-exponent as PowerOfTwo has it; zero for what counts as zero
  int log_phi[kMaxRank / 2];

  template <class V>
  V scaled(int64_t r, V value) const {
    return value * power[r][0] * power[r][1];
  }
  bool has_both(int64_t pair) const { return nonzero[2 * pair] && nonzero[2 * pair + 1]; }

  void find_exponents() {
    if constexpr (sizeof(T) == 8) {
      for (int64_t r = 0; r < R; ++r) set_exponent(r, norm_exponent(u + r, D, R));
    } else {
      double square[kMaxRank];
      Squares<T>{u, D, R, square}.run();
      for (int64_t r = 0; r < R; ++r) set_exponent(r, exponent_of(square[r], 0, kThreshold<float>));
    }
  }

  // ûᵀ on the vectors [begin, end) of D; `in_pairs`, the second row of each pair less the first, not yet scaled.
  void make_rows(int64_t begin, int64_t end, bool in_pairs) {
    C columns[kMaxRank * kLane];
    for (int64_t k = begin; k < end; ++k) {
      const int64_t d = k * kLane, count = smaller(kLane, D - d);
      load_columns(columns, u + d * R, R, count);
      Vec<C> before{};
      for (int64_t r = 0; r < R; ++r) {
        Vec<C> row = scaled(r, load(columns + r * kLane));
        const Vec<C> here = row;
        if (in_pairs && r % 2 == 1 && has_both(r / 2)) row -= before;
        before = here;
        C* to = rows + r * D + d;
        if (count == kLane)
          store(to, row);
        else
          store_first(to, row, static_cast<int>(count));
      }
    }
  }

  // log φ of pairs [first, last), and their second rows over φ.
  void scale_differences(int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair) {
      C* row = rows + (2 * pair + 1) * D;
      log_phi[pair] = norm_exponent(row, D).value;
      if (log_phi[pair] == 0) continue;
      const PowerOfTwo<C> power(-log_phi[pair]);
      for (int64_t d = 0; d < D; ++d) row[d] = power.times(row[d]);
    }
  }

  // log φ of each pair from v: the quotient of what `make_rows` and `scale_differences` leave, where it is exact.
  void find_log_phi(const C* v) {
    constexpr C kLargeEnough = 0x1p-30f;  // a row's norm is at least 1/2 or its φ is 1
    for (int64_t pair = 0; pair < R / 2; ++pair) {
      log_phi[pair] = 0;
      if (!has_both(pair)) continue;
      const int64_t r = 2 * pair + 1;
      const C* row = v + r * D;
      const int64_t d = first_above(row, D, kLargeEnough);
      if (d == D) continue;
      const double quotient = static_cast<double>(entry(d, r) - entry(d, r - 1)) / static_cast<double>(row[d]);
      int exponent;
      __builtin_frexp(quotient * 1.5, &exponent);  // 2^k is the middle of what gives k + 1
      if (quotient > 0 && quotient <= __DBL_MAX__) log_phi[pair] = exponent - 1;
    }
  }

 private:
  void set_exponent(int64_t r, Exponent found) {
    exponent[r] = found.value;
    nonzero[r] = found.nonzero;
    const PowerOfTwo<C> scale(-found.value);
    power[r][0] = found.nonzero ? scale.first : 0;
    power[r][1] = scale.second;
  }
  C entry(int64_t d, int64_t r) const { return scaled<C>(r, load_first(u + d * R + r, 1)[0]); }
};

}  // namespace
}  // namespace hra::cpu::HRA_ISA
