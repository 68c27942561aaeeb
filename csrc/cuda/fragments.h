// What a warp of the cluster kernels keeps in registers, 16-bit activations only.
//
// A warp owns 16 rows and some columns. lane = 4 g + c holds, as in every fragment of mma.m16n8k16, rows g and g + 8.
// Within each group of 32 columns it holds 8 c .. 8 c + 7: 16 bytes of memory, and what the matrix instructions want of
// four 8-column tiles, if tile j takes its columns in the order 2 j, 2 j + 1, 8 + 2 j, 8 + 2 j + 1, ... A product does
// not mind in which order its columns come, so only v has to lie in shared memory in this one: `fragment_column`. So
// activations go from memory to matrix instructions and back with no detour over shared memory. Columns are int: there
// are no more than a cluster holds.
#pragma once

#include "tiles.h"

namespace hra::cuda {

using namespace device;

constexpr int kRowsOfWarp = 16;

// Where column `column` of v lies in its tile.
__device__ __forceinline__ int fragment_column(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

__device__ __forceinline__ uint32_t& word(uint4& vector, int i) {
  return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// Where row `row` of a warp's 16 lies in its tile: eight lanes that store or load 16 bytes each, of rows g and g + 1,
// hit all banks, and so do the eight rows of an ldmatrix.
__device__ __forceinline__ int fragment_row(int row) { return row / 8 * 8 + row % 2 * 4 + row % 8 / 2; }

// How many of the `width` columns from `column` on a row has; none where the row does not exist.
template <typename T>
__device__ __forceinline__ int columns_left(const Rows<T>& rows, int64_t row, int column, int width) {
  const int left = static_cast<int>(rows.columns) - column;
  return row >= rows.rows ? 0 : left < width ? left : width;
}

// 16 rows of kColumns activations on their way from memory, zero where there are none.
template <typename T, int kColumns>
struct RowsInFlight {
  static constexpr int kGroups = kColumns / 32;
  uint4 vectors[kGroups][2];

  __device__ __forceinline__ void fetch(const Rows<const T>& from, int64_t row0, int column0) {
    const int column = column0 + lane_id() % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + lane_id() / 4 + 8 * half;
      const int left = columns_left(from, row, column, kColumns);
      const T* source = from.ptr + row * from.stride + column;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) vectors[group][half] = {0, 0, 0, 0};
      if (from.vectors) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          if (32 * group < left) vectors[group][half] = *reinterpret_cast<const uint4*>(source + 32 * group);
        }
      } else {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (32 * group + i >= left) continue;
            word(vectors[group][half], i / 2) |= static_cast<uint32_t>(source[32 * group + i].bits) << i % 2 * 16;
          }
        }
      }
    }
  }

  // Where a lane's 16 bytes lie in a tile of which its warp owns the columns from column0 on.
  template <typename Tile>
  static __device__ __forceinline__ uint4* place(Tile& tile, int column0, int group, int half) {
    const int lane = lane_id();
    return reinterpret_cast<uint4*>(tile.at(fragment_row(lane / 4 + 8 * half), column0 + 32 * group + lane % 4 * 8));
  }

  template <int kTileColumns>
  __device__ __forceinline__ void put(RowTile<T, kRowsOfWarp, kTileColumns>& tile, int column0) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) *place(tile, column0, group, half) = vectors[group][half];
    }
  }
};

// Issues the copies of 16 rows of a warp's columns into a tile that no other warp reads; what lies outside of the
// matrix becomes zero. Needs commit and wait.
template <int kColumns, typename T, int kTileColumns>
__device__ __forceinline__ void copy_rows(RowTile<T, kRowsOfWarp, kTileColumns>& tile, const Rows<const T>& from,
                                          int64_t row0, int column0, int tile_column) {
  constexpr int kPerRow = kColumns / kVector<T>, kRowsAtOnce = 32 / kPerRow;
  static_assert(kRowsAtOnce * kPerRow == 32, "a lane keeps to its columns");
  const int column = lane_id() % kPerRow * kVector<T>;
  auto each = [&](int i, auto copy) {
    const int64_t row = row0 + i + lane_id() / kPerRow;
    const int left = columns_left(from, row, column0 + column, kVector<T>);
    copy(tile.at(fragment_row(i + lane_id() / kPerRow), tile_column + column),
         left > 0 ? from.ptr + row * from.stride + column0 + column : from.ptr, left);
  };
  if (from.vectors) {
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; i += kRowsAtOnce) {
      each(i, [](T* to, const T* source, int left) { cp_async_16(to, source, left > 0 ? 16 : 0); });
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRowsOfWarp; i += kRowsAtOnce) {
      each(i, [](T* to, const T* source, int left) {
        for (int j = 0; j < kVector<T>; ++j) to[j] = j < left ? source[j] : T{};
      });
    }
  }
}

// 16 bytes of a row to memory, as far as the row goes.
template <typename T>
__device__ __forceinline__ void store_vector(const Rows<T>& to, T* target, int left, uint4 vector) {
  if (to.vectors) {
    if (left > 0) *reinterpret_cast<uint4*>(target) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < left) target[i] = {static_cast<uint16_t>(word(vector, i / 2) >> i % 2 * 16)};
    }
  }
}

// 16 rows x kRank values as a matrix instruction leaves them: of tile n (8 columns) rows g and g + 8, two columns each.
template <int kRank>
using Result = float[kRank / 8][4];

// A result (rows, R) from and to memory; entries that do not exist are zero.
template <int kTiles>
__device__ __forceinline__ void load_result(float (&values)[kTiles][4], const float* from, int64_t rows, int R) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
      values[n][i] = row < rows && column < R ? from[row * R + column] : 0.0f;
    }
  }
}
template <int kTiles>
__device__ __forceinline__ void store_result(float* to, int64_t rows, int R, const float (&values)[kTiles][4]) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
      if (row < rows && column < R) to[row * R + column] = values[n][i];
    }
  }
}

// A Result as bfloat16 terms: pairs of columns, of tile n and row g (0) or g + 8 (1).
template <int kTerms, int kRank>
struct Terms {
  uint32_t pairs[kRank / 8][2][kTerms];

  __device__ __forceinline__ explicit Terms(const Result<kRank>& values) {
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) split_pair(pairs[n][half], values[n][2 * half], values[n][2 * half + 1]);
    }
  }

  // The 16 x 16 operand a; columns beyond kRank are zero.
  __device__ __forceinline__ void rows(uint32_t (&a)[kTerms][4]) const {
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[term][i] = i / 2 < kRank / 8 ? pairs[i / 2 % (kRank / 8)][i % 2][term] : 0;
    }
  }

  // The transposed 16 x 16 operand a; rows beyond kRank are zero.
  __device__ __forceinline__ void columns(uint32_t (&a)[kTerms][4]) const {
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[term][i] = i % 2 < kRank / 8 ? transpose_8x8(pairs[i % 2 % (kRank / 8)][i / 2][term]) : 0;
    }
  }

  // Tile n as operand b: 16 rows, 8 columns.
  __device__ __forceinline__ void tile(uint32_t (&b)[kTerms][2], int n) const {
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
#pragma unroll
      for (int half = 0; half < 2; ++half) b[term][half] = transpose_8x8(pairs[n][half][term]);
    }
  }
};

// m = t, or its transpose.
struct Middle {
  const float* t;  // (R, R)
  int R;
  bool transpose;
};

// m's terms in shared memory, zero beyond (R, R).
using MiddleTile = TermTile<3, 16, 16>;

__device__ __forceinline__ void put_middle(MiddleTile& tile, const Middle& m) {
  auto entry = [&](int row, int column) {
    if (row >= m.R || column >= m.R) return 0.0f;
    return m.transpose ? m.t[column * m.R + row] : m.t[row * m.R + column];
  };
  for (int i = thread_id(); i < 16 * 8; i += kThreads) {
    const int row = i / 8, column = i % 8 * 2;
    tile.put(row, column, entry(row, column), entry(row, column + 1));
  }
}

// One term of the operands b of two tiles, as one ldmatrix leaves them.
template <int kTerms>
__device__ __forceinline__ void two_tiles(uint32_t (&b)[2][kTerms][2], int term, const uint32_t (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2][term][i % 2] = r[i];
}

// product = p m, to float32's accuracy.
template <int kRank>
__device__ __forceinline__ void times(Result<kRank>& product, const Terms<3, kRank>& p, const MiddleTile& m) {
  uint32_t a[3][4];
  p.rows(a);
  uint32_t b[2][3][2], r[4];
  const int lane = lane_id();
  if constexpr (kRank ==
                8) {  // the three terms of m's first 8 x 8, all that p's 8 columns meet; the fourth is not used
    ldmatrix<true>(r, m.at(lane / 8 % 3, lane % 8, 0));
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      b[0][term][0] = r[term];
      b[0][term][1] = 0;
    }
  } else {
#pragma unroll
    for (int term = 0; term < 3; ++term) {
      ldmatrix<true>(r, m.at(term, lane % 16, lane / 16 * 8));
      two_tiles(b, term, r);
    }
  }
#pragma unroll
  for (int n = 0; n < kRank / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) product[n][i] = 0;
    mma_terms<2>(product[n], a, b[n]);
  }
}

// sum += x vᵀ over a warp's columns.
template <typename T, int kRank, int kColumns, int kTileColumns>
__device__ __forceinline__ void add_projection(Result<kRank>& sum, RowsInFlight<T, kColumns>& x,
                                               const TermTile<2, kRank, kTileColumns>& v, int column0) {
  const int lane = lane_id();
#pragma unroll
  for (int k = 0; k < kColumns; k += 16) {
    uint32_t a[kTermsOf<T>][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t terms[kTermsOf<T>];
      split_packed<T>(terms, word(x.vectors[k / 32][i % 2], k % 32 / 8 + i / 2));
#pragma unroll
      for (int term = 0; term < kTermsOf<T>; ++term) a[term][i] = terms[term];
    }
    if constexpr (kRank == 8) {
      uint32_t r[4];
      ldmatrix<false>(r, v.at(lane / 16, lane % 8, column0 + k + lane / 8 % 2 * 8));
      const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
      mma_terms<1>(sum[0], a, b);
    } else {
      uint32_t b[2][2][2];
#pragma unroll
      for (int term = 0; term < 2; ++term) {
        uint32_t r[4];
        ldmatrix<false>(r, v.at(term, lane % 8 + lane / 16 * 8, column0 + k + lane / 8 % 2 * 8));
        two_tiles(b, term, r);
      }
      mma_terms<1>(sum[0], a, b[0]);
      mma_terms<1>(sum[1], a, b[1]);
    }
  }
}

// s as operands of `minus_product`. With kRank 8 the 16 vectors that an instruction takes are v's two terms.
template <int kRank>
struct Coefficients16 {
  uint32_t a[2][4];

  __device__ __forceinline__ explicit Coefficients16(const Terms<2, kRank>& s) {
    s.rows(a);
    if constexpr (kRank == 8) {
#pragma unroll
      for (int term = 0; term < 2; ++term) {
        a[term][2] = a[term][0];
        a[term][3] = a[term][1];
      }
    }
  }
};

// change[j] = s v over the four tiles of the 32 columns from `column` on.
template <int kRank, int kTileColumns>
__device__ __forceinline__ void change_of_group(float (&change)[4][4], const Coefficients16<kRank>& s,
                                                const TermTile<2, kRank, kTileColumns>& v, int column) {
  const int lane = lane_id();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) change[j][i] = 0;
  }
  if constexpr (kRank == 8) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      uint32_t r[4];
      ldmatrix<true>(r, v.at(lane / 8 % 2, lane % 8, column + 8 * j + lane / 16 * 8));
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t b[2] = {r[2 * k], r[2 * k + 1]};
        mma(change[j + k], s.a[0], b);
        mma(change[j + k], s.a[1], b);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t r[4];
      ldmatrix<true>(r, v.at(lane / 16, lane % 16, column + 8 * j));
      const uint32_t b[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
      mma_terms<1>(change[j], s.a, b);
    }
  }
}

// to = x - s v over a warp's columns, rounded once; `x(group, half)` gives 16 bytes of x.
template <int kColumns, typename T, int kRank, int kTileColumns, typename Vectors>
__device__ __forceinline__ void reflect_rows(const Rows<T>& to, Vectors x, const Coefficients16<kRank>& s,
                                             const TermTile<2, kRank, kTileColumns>& v, int tile_column, int64_t row0,
                                             int column0) {
  const int column = column0 + lane_id() % 4 * 8;
  T* target[2];
  int left[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = row0 + lane_id() / 4 + 8 * half;
    left[half] = columns_left(to, row, column, kColumns);
    target[half] = to.ptr + row * to.stride + column;
  }
#pragma unroll
  for (int group = 0; group < kColumns / 32; ++group) {
    float change[4][4];
    change_of_group(change, s, v, tile_column + 32 * group);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 vector = x(group, half);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Pair old = unpack(T{}, word(vector, j));
        word(vector, j) = pack(T{}, Pair{old.low - change[j][2 * half], old.high - change[j][2 * half + 1]});
      }
      store_vector(to, target[half] + 32 * group, left[half] - 32 * group, vector);
    }
  }
}

}  // namespace hra::cuda
