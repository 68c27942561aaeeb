// What a task does with a block of rows that stays in L2: products with vᵀ, updates by v, and sums over the rows.
#pragma once

#include "tiles.h"

namespace hra::cpu::HRA_ISA {
namespace {

// 24 vectors of v for 8 columns are 12 KiB with 64-byte vectors: v and the rows streaming past fit 32 KiB of L1. A
// multiple of every tile's number of vectors.
constexpr int64_t kChunkVecs = 24;
constexpr int64_t kBlockBytes = 512 * 1024;  // of x: a quarter to a half of the L2 of current server cores
constexpr int64_t kMaxBlockRows = 48;
// Below this many multiply-adds a second thread costs more than it saves: one thread does them in about 20 us.
constexpr int64_t kParallelWork = 500 * 1000;

int64_t block_rows(int64_t D, int64_t element) {
  const int64_t rows = kBlockBytes / larger(1, D * element) / kApplyRows * kApplyRows;
  return smaller(kMaxBlockRows, larger(kApplyRows, rows));
}

int count_tasks(int64_t M, int64_t D, int64_t R, int num_threads) {
  if (M * D * R < kParallelWork) return 1;
  return static_cast<int>(larger(1, smaller(num_threads, (M + kApplyRows - 1) / kApplyRows)));
}

struct Range {
  int64_t begin, end;
};

// The rows of one task: as even as whole tiles allow.
Range rows_of(int task, int tasks, int64_t M) {
  const int64_t tiles = (M + kApplyRows - 1) / kApplyRows;
  return {smaller(M, tiles * task / tasks * kApplyRows), smaller(M, tiles * (task + 1) / tasks * kApplyRows)};
}

// What a task's block of rows is worked on with.
template <class T>
struct Block {
  using C = Accumulator<T>;
  Packed<C> v;
  int64_t stride_s;  // of p, q, a and b in the scratch memory: R rounded up, zero beyond R
  Vec<C>* sums;      // partial sums of one block's products with vᵀ

  int64_t full() const { return v.D / kLanes<C>; }
  int tail() const { return static_cast<int>(v.D % kLanes<C>); }
};

template <class T, int G, class C = Accumulator<T>>
HRA_INLINE void dot_group(const Block<T>& block, const T* x, int64_t stride_xm, int64_t rows, int64_t g, int64_t first,
                          int64_t last) {
  const C* v = block.v.at(g, first);
  Vec<C>* sums = block.sums + g * kMaxBlockRows * kGroup;
  int64_t m = 0;
  for (; m + kDotRows <= rows; m += kDotRows)
    dot_tile<T, kDotRows, G>(sums + m * G, first == 0, x + m * stride_xm, stride_xm, v, block.v.step(), first, last,
                             block.full(), block.tail());
  for (; m < rows; ++m)
    dot_tile<T, 1, G>(sums + m * G, first == 0, x + m * stride_xm, stride_xm, v, block.v.step(), first, last,
                      block.full(), block.tail());
}

template <class C, int G>
HRA_INLINE void finish_dots(C* p, int64_t stride_p, const Vec<C>* sums, int64_t rows) {
  for (int64_t m = 0; m < rows; ++m) sum_lanes<C, G>(p + m * stride_p, sums + m * G);
}

// p (rows, stride_s) = x vᵀ.
template <class T, class C = Accumulator<T>>
void dots(C* p, const Block<T>& block, const T* x, int64_t stride_xm, int64_t rows) {
  const int64_t vecs = block.v.vecs();
  if (vecs == 0) std::memset(p, 0, static_cast<size_t>(rows * block.stride_s) * sizeof(C));
  for (int64_t first = 0; first < vecs; first += kChunkVecs) {
    const int64_t last = smaller(vecs, first + kChunkVecs);
    for (int64_t g = 0; g < block.v.groups(); ++g) switch (block.v.width(g)) {
        case 1:
          dot_group<T, 1>(block, x, stride_xm, rows, g, first, last);
          break;
        case 2:
          dot_group<T, 2>(block, x, stride_xm, rows, g, first, last);
          break;
        case 4:
          dot_group<T, 4>(block, x, stride_xm, rows, g, first, last);
          break;
        default:
          dot_group<T, kGroup>(block, x, stride_xm, rows, g, first, last);
      }
  }
  for (int64_t g = 0; vecs > 0 && g < block.v.groups(); ++g) {
    const Vec<C>* sums = block.sums + g * kMaxBlockRows * kGroup;
    C* to = p + g * kGroup;
    switch (block.v.width(g)) {
      case 1:
        finish_dots<C, 1>(to, block.stride_s, sums, rows);
        break;
      case 2:
        finish_dots<C, 2>(to, block.stride_s, sums, rows);
        break;
      case 4:
        finish_dots<C, 4>(to, block.stride_s, sums, rows);
        break;
      default:
        finish_dots<C, kGroup>(to, block.stride_s, sums, rows);
    }
  }
}

template <class T, int ROWS, class C = Accumulator<T>>
HRA_INLINE void apply_rows(T* y, int64_t stride_ym, const T* x, int64_t stride_xm, const C* s, const Block<T>& block,
                           int64_t first, int64_t last, const T* ahead, int64_t stride_ahead) {
  const int64_t end = smaller(last, block.full());
  int64_t k = first;
  for (; k + kApplyVecs <= end; k += kApplyVecs)
    apply_tile<T, ROWS, kApplyVecs, false>(y, stride_ym, x, stride_xm, s, block.stride_s, block.v, k, 0, ahead,
                                           stride_ahead);
  for (; k < end; ++k)
    apply_tile<T, ROWS, 1, false>(y, stride_ym, x, stride_xm, s, block.stride_s, block.v, k, 0, ahead, stride_ahead);
  if (k < last)
    apply_tile<T, ROWS, 1, true>(y, stride_ym, x, stride_xm, s, block.stride_s, block.v, k, block.tail(), ahead,
                                 stride_ahead);
}

// y = x + s v on the vectors [first, last) of the block's rows; `ahead` is null or as many rows that are needed next.
template <class T, class C = Accumulator<T>>
void apply(T* y, int64_t stride_ym, const T* x, int64_t stride_xm, const C* s, const Block<T>& block, int64_t rows,
           int64_t first, int64_t last, const T* ahead, int64_t stride_ahead) {
  const auto ahead_of = [&](int64_t m) { return ahead != nullptr ? ahead + m * stride_ahead : nullptr; };
  int64_t m = 0;
  for (; m + kApplyRows <= rows; m += kApplyRows)
    apply_rows<T, kApplyRows>(y + m * stride_ym, stride_ym, x + m * stride_xm, stride_xm, s + m * block.stride_s, block,
                              first, last, ahead_of(m), stride_ahead);
  for (; m < rows; ++m)
    apply_rows<T, 1>(y + m * stride_ym, stride_ym, x + m * stride_xm, stride_xm, s + m * block.stride_s, block, first,
                     last, ahead_of(m), stride_ahead);
}

// out (R, :) += aᵀ first + bᵀ second over the rows of a block, vectors [begin, end) of `full` whole ones and a tail.
template <class T, class C>
struct Outer {
  C* out;
  int64_t stride_out;
  bool fresh;
  const C* a;
  const T* first;
  int64_t stride_first;
  const C* b;
  const T* second;
  int64_t stride_second;
  int64_t stride_ab, rows;
  int64_t full;
  int tail;

  // out (+)= aᵀ first alone.
  static Outer one(C* out, int64_t stride_out, bool fresh, const C* a, const T* first, int64_t stride_first,
                   int64_t stride_ab, int64_t rows, int64_t full, int tail) {
    return {out, stride_out, fresh, a, first, stride_first, nullptr, nullptr, 0, stride_ab, rows, full, tail};
  }
};

template <class T, int G, int VECS, bool kPartial, bool kTwo, class C>
HRA_INLINE void outer_at(const Outer<T, C>& o, int64_t r, int64_t k) {
  const int64_t d = k * kLanes<C>;
  outer_tile<T, G, VECS, kPartial, kTwo>(o.out + r * o.stride_out + d, o.stride_out, o.fresh, o.a + r, o.first + d,
                                         o.stride_first, kTwo ? o.b + r : nullptr, kTwo ? o.second + d : nullptr,
                                         o.stride_second, o.stride_ab, o.rows, o.tail);
}

template <class T, int G, bool kTwo, class C>
HRA_INLINE void outer_group(const Outer<T, C>& o, int64_t r, int64_t begin, int64_t end) {
  const int64_t whole = smaller(end, o.full);
  int64_t k = begin;
  for (; k + kOuterVecs <= whole; k += kOuterVecs) outer_at<T, G, kOuterVecs, false, kTwo>(o, r, k);
  for (; k < whole; ++k) outer_at<T, G, 1, false, kTwo>(o, r, k);
  if (k < end) outer_at<T, G, 1, true, kTwo>(o, r, k);
}

template <class T, bool kTwo, class C, class C2>
HRA_INLINE void outer(const Outer<T, C>& o, const Packed<C2>& shape, int64_t begin, int64_t end) {
  for (int64_t g = 0; g < shape.groups(); ++g) switch (shape.width(g)) {
      case 1:
        outer_group<T, 1, kTwo>(o, g * kGroup, begin, end);
        break;
      case 2:
        outer_group<T, 2, kTwo>(o, g * kGroup, begin, end);
        break;
      case 4:
        outer_group<T, 4, kTwo>(o, g * kGroup, begin, end);
        break;
      default:
        outer_group<T, kGroup, kTwo>(o, g * kGroup, begin, end);
    }
}

// Elements from a row of `vecs` vectors to the next: an odd number of cache lines, so that the rows of a tile of sums
// do not compete for the same cache sets.
template <class C>
constexpr int64_t odd_lines(int64_t vecs) {
  const int64_t count = vecs * kLanes<C>, line = 64 / static_cast<int64_t>(sizeof(C));
  return count / line % 2 == 0 ? count + line : count;
}

// -m, or -mᵀ if `flip`, with rows `stride` apart and zeros beyond R.
template <class C>
void negated(C* to, const C* t, int64_t R, int64_t stride, bool flip) {
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < R; ++j) to[i * stride + j] = -(flip ? t[j * R + i] : t[i * R + j]);
    for (int64_t j = R; j < stride; ++j) to[i * stride + j] = 0;
  }
}

}  // namespace
}  // namespace hra::cpu::HRA_ISA
