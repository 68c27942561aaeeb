// The three products that reflect is made of, as register tiles over vectors of D:
//
//   dot_tile     p[m, r] += x[m, :] . v[r, :]              rows x group sums, one vector of partial sums each
//   apply_tile   y[m, :]  = x[m, :] + sum_r s[m, r] v[r, :]
//   outer_tile   dv[r, :] += sum_m a[m, r] dy[m, :] + b[m, r] x[m, :]
//
// v is packed: groups of kGroup rows, within a group vector by vector with the rows side by side. A tile then streams
// one array; rows of v a power of two apart would compete for the same few cache lines of L1. A group is kGroup wide,
// or 1, 2 or 4 if R is smaller; absent rows and the rest of a row's last vector are zero.
#pragma once

#include "vec.h"

namespace hra::cpu::HRA_ISA {

// Accumulators: 3 x 8, 6 x 4 and 8 x 3 of 32 registers, 3 x 4, 6 x 2 and 4 x 3 of 16. Loads stay below the two per
// cycle that the two multiply-adds per cycle leave room for.
constexpr int kGroup = kManyRegisters ? 8 : 4;
constexpr int kDotRows = 3;
constexpr int kApplyRows = 6;
constexpr int kApplyVecs = kManyRegisters ? 4 : 2;
constexpr int kOuterVecs = 3;
constexpr int kProductRows = 4;
constexpr int kProductVecs = kManyRegisters ? 4 : 2;

template <int N>
struct Count {
  static constexpr int value = N;
};

// The number of rows a tile is compiled for that holds `rows` of them.
constexpr int64_t tile_rows(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : kGroup; }

// A matrix v (R, D) in packed form, and how R and D are cut.
template <class C>
struct Packed {
  const C* data;
  int64_t R, D;

  static constexpr int64_t kLane = kLanes<C>;
  int64_t vecs() const { return (D + kLane - 1) / kLane; }
  int64_t groups() const { return (R + kGroup - 1) / kGroup; }
  int64_t width(int64_t g) const { return tile_rows(smaller(kGroup, R - g * kGroup)); }
  // From a vector of a row to the next one: every group is laid out as wide as the first.
  int64_t step() const { return width(0) * kLane; }
  int64_t group_size() const { return vecs() * step(); }
  const C* at(int64_t g, int64_t vec) const { return data + g * group_size() + vec * step(); }
  int64_t size() const { return groups() * group_size(); }
};

template <class C>
HRA_INLINE void pack(C* to, const Packed<C>& shape, const C* v) {
  constexpr int kLane = kLanes<C>;
  const int64_t full = shape.D / kLane, tail = shape.D % kLane, step = shape.step();
  for (int64_t g = 0; g < shape.groups(); ++g) {
    C* panel = to + g * shape.group_size();
    for (int64_t r = 0; r < shape.width(0); ++r) {
      const bool real = g * kGroup + r < shape.R;
      const C* row = v + (g * kGroup + r) * shape.D;
      C* out = panel + r * kLane;
      for (int64_t k = 0; k < full; ++k, out += step) store(out, real ? load(row + k * kLane) : Vec<C>{});
      if (tail) store(out, real ? load_first(row + full * kLane, static_cast<int>(tail)) : Vec<C>{});
    }
  }
}

// Adds vectors [first, last) of ROWS rows of x against G rows of v to sums[row][r]; the vector at `full`, if in the
// range, has only `tail` elements.
template <class T, int ROWS, int G, class C = Accumulator<T>>
HRA_INLINE void dot_tile(Vec<C>* sums, bool fresh, const T* x, int64_t stride_xm, const C* v, int64_t step,
                         int64_t first, int64_t last, int64_t full, int tail) {
  constexpr int kLane = kLanes<C>;
  Vec<C> acc[ROWS][G];
  HRA_UNROLL
  for (int m = 0; m < ROWS; ++m) {
    HRA_UNROLL
    for (int r = 0; r < G; ++r) acc[m][r] = fresh ? Vec<C>{} : sums[m * G + r];
  }

  const int64_t end = smaller(last, full);
  int64_t k = first;
  for (; k < end; ++k, v += step) {
    Vec<C> row[ROWS];
    HRA_UNROLL
    for (int m = 0; m < ROWS; ++m) row[m] = load(x + m * stride_xm + k * kLane);
    HRA_UNROLL
    for (int r = 0; r < G; ++r) {
      const Vec<C> vr = in_register(load(v + r * kLane));
      HRA_UNROLL
      for (int m = 0; m < ROWS; ++m) acc[m][r] += row[m] * vr;
    }
  }
  if (k < last) {
    HRA_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      const Vec<C> row = load_first(x + m * stride_xm + k * kLane, tail);
      HRA_UNROLL
      for (int r = 0; r < G; ++r) acc[m][r] += row * load(v + r * kLane);
    }
  }
  HRA_UNROLL
  for (int m = 0; m < ROWS; ++m) {
    HRA_UNROLL
    for (int r = 0; r < G; ++r) sums[m * G + r] = acc[m][r];
  }
}

// y = x + s v on VECS vectors of ROWS rows from vector k on; the last one has `tail` elements if kPartial. Meanwhile
// the same part of the rows at `ahead`, if not null, is fetched into L2.
template <class T, int ROWS, int VECS, bool kPartial, class C = Accumulator<T>>
HRA_INLINE void apply_tile(T* y, int64_t stride_ym, const T* x, int64_t stride_xm, const C* s, int64_t stride_s,
                           const Packed<C>& v, int64_t k, int tail, const T* ahead, int64_t stride_ahead) {
  constexpr int kLane = kLanes<C>;
  if (ahead != nullptr) {
    HRA_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      HRA_UNROLL
      for (int j = 0; j < VECS; ++j) __builtin_prefetch(ahead + m * stride_ahead + (k + j) * kLane, 0, 2);
    }
  }
  Vec<C> acc[ROWS][VECS];
  HRA_UNROLL
  for (int m = 0; m < ROWS; ++m) {
    HRA_UNROLL
    for (int j = 0; j < VECS; ++j) {
      const T* from = x + m * stride_xm + (k + j) * kLane;
      acc[m][j] = kPartial ? load_first(from, tail) : load(from);
    }
  }
  const int64_t step = v.step();
  const C* panel = v.at(0, k);
  const C* end = s + v.R;
  do {
    const C* group_end = s + kGroup < end ? s + kGroup : end;
    const C* vr_ptr = panel;
    do {
      Vec<C> vr[VECS];
      HRA_UNROLL
      for (int j = 0; j < VECS; ++j) vr[j] = load(vr_ptr + j * step);
      HRA_UNROLL
      for (int m = 0; m < ROWS; ++m) {
        const Vec<C> factor = in_register(broadcast(s[m * stride_s]));
        HRA_UNROLL
        for (int j = 0; j < VECS; ++j) acc[m][j] += factor * vr[j];
      }
      vr_ptr += kLane;
    } while (++s != group_end);
    panel += v.group_size();
  } while (s != end);
  HRA_UNROLL
  for (int m = 0; m < ROWS; ++m) {
    T* to = y + m * stride_ym + k * kLane;
    HRA_UNROLL
    for (int j = 0; j < VECS; j += 2) {
      if (kPartial)
        store_first(to, acc[m][j], tail);
      else if (j + 1 == VECS)
        store(to + j * kLane, acc[m][j]);
      else
        store_two(to + j * kLane, acc[m][j], acc[m][j + 1]);
    }
  }
}

// out[r, :] (+)= sum over rows of a[m, r] first[m, :] (+ b[m, r] second[m, :]) on VECS vectors, for G values of r. The
// sum over the rows runs in registers; `fresh` overwrites out. Each source may have its own element type.
template <class T, int G, int VECS, bool kPartial, bool kTwo, class C = Accumulator<T>>
HRA_INLINE void outer_tile(C* out, int64_t stride_out, bool fresh, const C* a, const T* first, int64_t stride_first,
                           const C* b, const T* second, int64_t stride_second, int64_t stride_ab, int64_t rows,
                           int tail) {
  constexpr int kLane = kLanes<C>;
  Vec<C> acc[G][VECS] = {};
  for (int64_t m = 0; m < rows; ++m) {
    Vec<C> row[VECS];
    HRA_UNROLL
    for (int j = 0; j < VECS; ++j) {
      const T* from = first + m * stride_first + j * kLane;
      row[j] = kPartial ? load_first(from, tail) : load(from);
    }
    HRA_UNROLL
    for (int r = 0; r < G; ++r) {
      const Vec<C> factor = in_register(broadcast(a[m * stride_ab + r]));
      HRA_UNROLL
      for (int j = 0; j < VECS; ++j) acc[r][j] += factor * row[j];
    }
    if (!kTwo) continue;
    HRA_UNROLL
    for (int j = 0; j < VECS; ++j) {
      const T* from = second + m * stride_second + j * kLane;
      row[j] = kPartial ? load_first(from, tail) : load(from);
    }
    HRA_UNROLL
    for (int r = 0; r < G; ++r) {
      const Vec<C> factor = in_register(broadcast(b[m * stride_ab + r]));
      HRA_UNROLL
      for (int j = 0; j < VECS; ++j) acc[r][j] += factor * row[j];
    }
  }
  HRA_UNROLL
  for (int r = 0; r < G; ++r) {
    HRA_UNROLL
    for (int j = 0; j < VECS; ++j) {
      C* to = out + r * stride_out + j * kLane;
      store(to, fresh ? acc[r][j] : load(to) + acc[r][j]);
    }
  }
}

// Lane l of the result adds, for the bit K of l, the two lanes l and l ^ K of a (bit clear) or of b (bit set).
template <class C, int K>
HRA_INLINE Vec<C> fold(Vec<C> a, Vec<C> b) {
  return pick<C>(a, b, [](int l) { return (l & K) ? kLanes<C> + l : l; }) +
         pick<C>(a, b, [](int l) { return (l & K) ? kLanes<C> + (l ^ K) : l ^ K; });
}

// sums[r] of the lanes of G vectors. With G lanes or twice as many, a tree of log2(lanes) folds does all G at once.
template <class C, int G>
HRA_INLINE void sum_lanes(C* sums, const Vec<C>* vectors) {
  constexpr int kLane = kLanes<C>;
  if constexpr ((G == 8 || G == 4) && (kLane == G || kLane == 2 * G)) {
    Vec<C> part[G];
    HRA_UNROLL
    for (int r = 0; r < G; ++r) part[r] = vectors[r];
    if constexpr (G == 8) {
      HRA_UNROLL
      for (int r = 0; r < 4; ++r) part[r] = fold<C, kLane / 2>(part[r], part[r + 4]);
    }
    constexpr int kNext = G == 8 ? kLane / 4 : kLane / 2;
    part[0] = fold<C, kNext>(part[0], part[2]);
    part[1] = fold<C, kNext>(part[1], part[3]);
    part[0] = fold<C, kNext / 2>(part[0], part[1]);
    if constexpr (kLane == 2 * G) part[0] = fold<C, 1>(part[0], part[0]);
    HRA_UNROLL
    for (int r = 0; r < G; ++r) sums[r] = part[0][r * (kLane / G)];
  } else {
    HRA_UNROLL
    for (int r = 0; r < G; ++r) {
      Vec<C> part = vectors[r];
      C sum = 0;
      HRA_UNROLL
      for (int l = 0; l < kLane; ++l) sum += part[l];
      sums[r] = sum;
    }
  }
}

template <class C, int ROWS, int VECS>
HRA_INLINE void product_tile(C* out, int64_t stride_out, bool fresh, const C* a, int64_t stride_a, const C* b,
                             int64_t stride_b, int64_t inner) {
  constexpr int kLane = kLanes<C>;
  Vec<C> acc[ROWS][VECS];
  HRA_UNROLL
  for (int m = 0; m < ROWS; ++m) {
    HRA_UNROLL
    for (int k = 0; k < VECS; ++k) acc[m][k] = fresh ? Vec<C>{} : load(out + m * stride_out + k * kLane);
  }
  for (int64_t j = 0; j < inner; ++j, b += stride_b) {
    Vec<C> row[VECS];
    HRA_UNROLL
    for (int k = 0; k < VECS; ++k) row[k] = load(b + k * kLane);
    HRA_UNROLL
    for (int m = 0; m < ROWS; ++m) {
      const Vec<C> factor = in_register(broadcast(a[m * stride_a + j]));
      HRA_UNROLL
      for (int k = 0; k < VECS; ++k) acc[m][k] += factor * row[k];
    }
  }
  HRA_UNROLL
  for (int m = 0; m < ROWS; ++m) {
    HRA_UNROLL
    for (int k = 0; k < VECS; ++k) store(out + m * stride_out + k * kLane, acc[m][k]);
  }
}

// out (rows, columns) = a (rows, inner) times b (inner, columns), added to what is there unless `fresh`; columns are
// whole vectors. The product of small matrices, whose b stays in cache: a row's sums do not depend on the other rows.
template <class C>
void product(C* out, int64_t stride_out, bool fresh, const C* a, int64_t stride_a, const C* b, int64_t stride_b,
             int64_t rows, int64_t inner, int64_t columns) {
  const auto panel = [&](auto vecs, int64_t d) {
    constexpr int kVecs = decltype(vecs)::value;
    int64_t m = 0;
    for (; m + kProductRows <= rows; m += kProductRows)
      product_tile<C, kProductRows, kVecs>(out + m * stride_out + d, stride_out, fresh, a + m * stride_a, stride_a,
                                           b + d, stride_b, inner);
    for (; m < rows; ++m)
      product_tile<C, 1, kVecs>(out + m * stride_out + d, stride_out, fresh, a + m * stride_a, stride_a, b + d,
                                stride_b, inner);
  };
  constexpr int kLane = kLanes<C>;
  int64_t d = 0;
  for (; d + kProductVecs * kLane <= columns; d += kProductVecs * kLane) panel(Count<kProductVecs>{}, d);
  for (; d < columns; d += kLane) panel(Count<1>{}, d);
}

}  // namespace hra::cpu::HRA_ISA
