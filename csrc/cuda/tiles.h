// Tiles of x (rows of activations) and of v (rows of vectors, as bfloat16 terms) in shared memory, and the matrix
// fragments read from them.
//
// A warp's fragments, in the layout of mma.m16n8k16: lane = 4 g + c holds rows g and g + 8 of a 16 x 16 operand and, of
// a result, columns 2 c and 2 c + 1. Row pitches are padded by 16 bytes (32 for float32), which spreads the eight rows
// of a fragment over all banks.
#pragma once

#include "split.h"

namespace hra::device {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int thread_id() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int warp_id() { return thread_id() / 32; }
__device__ __forceinline__ int lane_id() { return thread_id() % 32; }

template <typename T>
constexpr int kVector = 16 / sizeof(T);

// kRows x kColumns activations.
template <typename T, int kRows, int kColumns>
struct alignas(16) RowTile {
  static constexpr int kPitch = kColumns + 8;
  T data[kRows * kPitch];

  __device__ __forceinline__ T* at(int row, int column) { return data + row * kPitch + column; }
  __device__ __forceinline__ const T* at(int row, int column) const { return data + row * kPitch + column; }
};

// kRank x kColumns values as kTerms bfloat16 terms each.
template <int kTerms, int kRank, int kColumns>
struct alignas(16) TermTile {
  static constexpr int kPitch = kColumns + 8;
  bf16 data[kTerms][kRank * kPitch];

  __device__ __forceinline__ bf16* at(int term, int row, int column) { return data[term] + row * kPitch + column; }
  __device__ __forceinline__ const bf16* at(int term, int row, int column) const {
    return data[term] + row * kPitch + column;
  }
  // stores a pair of neighbors
  __device__ __forceinline__ void put(int row, int column, float low, float high) {
    uint32_t terms[kTerms];
    split_pair(terms, low, high);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) *reinterpret_cast<uint32_t*>(at(i, row, column)) = terms[i];
  }
};

// A row-major matrix in global memory; `vectors`: base and stride allow 16-byte accesses.
template <typename T>
struct Rows {
  T* ptr;
  int64_t rows, columns, stride;
  bool vectors;
};

// Issues the copies of a tile; what lies outside of the matrix becomes zero. Needs commit and wait.
template <typename T, int kRows, int kColumns>
__device__ __forceinline__ void load_tile(RowTile<T, kRows, kColumns>& tile, const Rows<const T>& from, int64_t row0,
                                          int64_t column0) {
  constexpr int kPerRow = kColumns / kVector<T>;
  for (int i = thread_id(); i < kRows * kPerRow; i += kThreads) {
    const int row = i / kPerRow, column = i % kPerRow * kVector<T>;
    const int64_t left = from.columns - column0 - column;
    int count = row0 + row >= from.rows || left <= 0 ? 0 : left < kVector<T> ? static_cast<int>(left) : kVector<T>;
    T* to = tile.at(row, column);
    const T* source = count ? from.ptr + (row0 + row) * from.stride + column0 + column : from.ptr;
    if (from.vectors) {
      cp_async_16(to, source, count * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        T value{};
        if (j < count) value = source[j];
        to[j] = value;
      }
    }
  }
}

// Writes a warp's own kColumns columns of kRows rows of a tile to global memory.
template <int kRows, int kColumns, typename T, int kTileRows, int kTileColumns>
__device__ __forceinline__ void store_warp_tile(const Rows<T>& to, const RowTile<T, kTileRows, kTileColumns>& tile,
                                                int tile_row, int tile_column, int64_t row0, int64_t column0) {
  constexpr int kPerRow = kColumns / kVector<T>;
  static_assert(kPerRow * kVector<T> == kColumns, "whole vectors");
  for (int i = lane_id(); i < kRows * kPerRow; i += 32) {
    const int row = i / kPerRow, column = i % kPerRow * kVector<T>;
    const int64_t left = to.columns - column0 - column;
    if (row0 + row >= to.rows || left <= 0) continue;
    const T* from = tile.at(tile_row + row, tile_column + column);
    T* target = to.ptr + (row0 + row) * to.stride + column0 + column;
    if (to.vectors && left >= kVector<T>) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        if (j < left) target[j] = from[j];
      }
    }
  }
}

// kRank x kColumns of v on their way from global memory (fetch) to terms in shared memory (put).
template <int kRank, int kColumns>
struct VectorsInFlight {
  static constexpr int kPerRow = kColumns / 4, kEach = kRank * kPerRow / kThreads;
  static_assert(kEach * kThreads == kRank * kPerRow, "the same for every thread");
  float4 values[kEach];

  __device__ __forceinline__ void fetch(const Rows<const float>& v, int64_t column0) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = i * kThreads + thread_id();
      const int row = index / kPerRow;
      const int64_t column = column0 + index % kPerRow * 4;
      const float* from = v.ptr + row * v.stride + column;
      float4 value = {0, 0, 0, 0};
      if (row < v.rows) {
        if (v.vectors && column + 4 <= v.columns) {
          value = *reinterpret_cast<const float4*>(from);
        } else {
          if (column < v.columns) value.x = from[0];
          if (column + 1 < v.columns) value.y = from[1];
          if (column + 2 < v.columns) value.z = from[2];
          if (column + 3 < v.columns) value.w = from[3];
        }
      }
      values[i] = value;
    }
  }

  // `place(column)` is where an even column goes, and its neighbor after it.
  template <int kTerms, int kTileColumns, typename Place>
  __device__ __forceinline__ void put(TermTile<kTerms, kRank, kTileColumns>& tile, Place place) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = i * kThreads + thread_id();
      const int row = index / kPerRow, column = index % kPerRow * 4;
      tile.put(row, place(column), values[i].x, values[i].y);
      tile.put(row, place(column + 2), values[i].z, values[i].w);
    }
  }
  template <int kTerms, int kTileColumns>
  __device__ __forceinline__ void put(TermTile<kTerms, kRank, kTileColumns>& tile) const {
    put(tile, [](int column) { return column; });
  }
};

// --- fragments
// --------------------------------------------------------------------------------------------------------

// a (16 rows, 16 columns) of a tile of activations.
template <typename T, int kRows, int kColumns>
__device__ __forceinline__ void a_from_rows(uint32_t (&a)[Split<T>::kX][4], const RowTile<T, kRows, kColumns>& tile,
                                            int row0, int column0) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    uint32_t packed[4];
    ldmatrix<4, false>(packed, tile.at(row0 + lane % 16, column0 + lane / 16 * 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t terms[Split<T>::kX];
      split_packed<T>(terms, packed[i]);
#pragma unroll
      for (int term = 0; term < Split<T>::kX; ++term) a[term][i] = terms[term];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* pair = tile.at(row0 + lane / 4 + i % 2 * 8, column0 + lane % 4 * 2 + i / 2 * 8);
      const Pair values = load_pair(pair);
      uint32_t terms[Split<T>::kX];
      split_pair(terms, values.low, values.high);
#pragma unroll
      for (int term = 0; term < Split<T>::kX; ++term) a[term][i] = terms[term];
    }
  }
}

// a (16 rows of the tile, 16 of its columns) from terms.
template <int kTerms, int kRank, int kColumns>
__device__ __forceinline__ void a_from_terms(uint32_t (&a)[kTerms][4], const TermTile<kTerms, kRank, kColumns>& tile,
                                             int row0, int column0) {
  const int lane = lane_id();
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    ldmatrix<4, false>(a[term], tile.at(term, row0 + lane % 16, column0 + lane / 16 * 8));
  }
}

// a = the transpose of 16 rows and 16 columns of terms.
template <int kTerms, int kRank, int kColumns>
__device__ __forceinline__ void a_from_terms_transposed(uint32_t (&a)[kTerms][4],
                                                        const TermTile<kTerms, kRank, kColumns>& tile, int row0,
                                                        int column0) {
  const int lane = lane_id();
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    ldmatrix<4, true>(a[term], tile.at(term, row0 + lane % 8 + lane / 16 * 8, column0 + lane / 8 % 2 * 8));
  }
}

// b[n] (16, 8) for two n: columns of the product are rows row0 + 8 n + .. of the tile (b = its transpose).
template <int kTerms, int kRank, int kColumns>
__device__ __forceinline__ void b_from_terms_transposed(uint32_t (&b)[2][kTerms][2],
                                                        const TermTile<kTerms, kRank, kColumns>& tile, int row0,
                                                        int column0) {
  const int lane = lane_id();
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    uint32_t r[4];
    ldmatrix<4, false>(r, tile.at(term, row0 + lane % 8 + lane / 16 * 8, column0 + lane / 8 % 2 * 8));
    b[0][term][0] = r[0];
    b[0][term][1] = r[1];
    b[1][term][0] = r[2];
    b[1][term][1] = r[3];
  }
}

// b (16, 8): 16 rows and 8 columns of terms as they lie.
template <int kTerms, int kRank, int kColumns>
__device__ __forceinline__ void b_from_terms(uint32_t (&b)[kTerms][2], const TermTile<kTerms, kRank, kColumns>& tile,
                                             int row0, int column0) {
  const int lane = lane_id();
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    ldmatrix<2, true>(b[term], tile.at(term, row0 + lane % 16, column0));
  }
}

// b (16, 8): 16 rows and 8 columns of activations as they lie.
template <typename T, int kRows, int kColumns>
__device__ __forceinline__ void b_from_rows(uint32_t (&b)[Split<T>::kX][2], const RowTile<T, kRows, kColumns>& tile,
                                            int row0, int column0) {
  const int lane = lane_id();
  uint32_t packed[2];
  if constexpr (sizeof(T) == 2) ldmatrix<2, true>(packed, tile.at(row0 + lane % 16, column0));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t terms[Split<T>::kX];
    if constexpr (sizeof(T) == 2) {
      split_packed<T>(terms, packed[i]);
    } else {
      const int row = row0 + lane % 4 * 2 + i * 8, column = column0 + lane / 4;
      split_pair(terms, *tile.at(row, column), *tile.at(row + 1, column));
    }
#pragma unroll
    for (int term = 0; term < Split<T>::kX; ++term) b[term][i] = terms[term];
  }
}

// --- the products
// -----------------------------------------------------------------------------------------------------

// p[n] (16, 8) += x[row0.., column0..+kColumns] v[8 n.., column0..+kColumns]ᵀ.
template <int kWidth, typename T, int kRows, int kColumns, int kRank>
__device__ __forceinline__ void project(float (&p)[kRank / 8][4], const RowTile<T, kRows, kColumns>& x,
                                        const TermTile<Split<T>::kV, kRank, kColumns>& v, int row0, int column0) {
  static_assert(kWidth % 16 == 0, "whole fragments");
#pragma unroll
  for (int k = 0; k < kWidth; k += 16) {
    uint32_t a[Split<T>::kX][4];
    a_from_rows(a, x, row0, column0 + k);
#pragma unroll
    for (int n = 0; n < kRank / 8; n += 2) {
      uint32_t b[2][Split<T>::kV][2];
      b_from_terms_transposed(b, v, 8 * n, column0 + k);
      mma_terms<Split<T>::kOrder>(p[n], a, b[0]);
      mma_terms<Split<T>::kOrder>(p[n + 1], a, b[1]);
    }
  }
}

// One row block's s as fragments, kept in registers over the columns.
template <typename T, int kRank>
struct Coefficients {
  static constexpr int kSteps = kRank / 16;
  uint32_t a[kSteps][Split<T>::kV][4];

  template <int kRows>
  __device__ __forceinline__ void load(const TermTile<Split<T>::kV, kRows, kRank>& s, int row0) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) a_from_terms(a[k], s, row0, 16 * k);
  }
};

// x[row0..+16, column0..+8] -= s v, in place, rounded once. Columns of a warp are its own.
template <typename T, int kRows, int kColumns, int kRank>
__device__ __forceinline__ void reflect_tile(RowTile<T, kRows, kColumns>& x, const Coefficients<T, kRank>& s,
                                             const TermTile<Split<T>::kV, kRank, kColumns>& v, int row0, int column0) {
  float change[4] = {};
#pragma unroll
  for (int k = 0; k < Coefficients<T, kRank>::kSteps; ++k) {
    uint32_t b[Split<T>::kV][2];
    b_from_terms(b, v, 16 * k, column0);
    mma_terms<Split<T>::kOrder>(change, s.a[k], b);
  }
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    T* pair = x.at(row0 + lane / 4 + 8 * i, column0 + lane % 4 * 2);
    const Pair old = load_pair(pair);
    store_pair(pair, Pair{old.low - change[2 * i], old.high - change[2 * i + 1]});
  }
}

// dv[n][k] (16, 8) += s[.., 16 k..]ᵀ x[.., column0 + 8 n..] over all rows of the tile.
template <typename T, int kRows, int kColumns, int kRank, int kCount>
__device__ __forceinline__ void accumulate_vectors(float (&dv)[kCount][kRank / 16][4],
                                                   const RowTile<T, kRows, kColumns>& x,
                                                   const TermTile<Split<T>::kV, kRows, kRank>& s, int column0) {
#pragma unroll
  for (int row = 0; row < kRows; row += 16) {
    uint32_t a[kRank / 16][Split<T>::kV][4];
#pragma unroll
    for (int k = 0; k < kRank / 16; ++k) a_from_terms_transposed(a[k], s, row, 16 * k);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      uint32_t b[Split<T>::kX][2];
      b_from_rows(b, x, row, column0 + 8 * n);
#pragma unroll
      for (int k = 0; k < kRank / 16; ++k) mma_terms<Split<T>::kOrder>(dv[n][k], a[k], b);
    }
  }
}

}  // namespace hra::device
