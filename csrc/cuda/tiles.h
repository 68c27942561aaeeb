// Tiles of activations and of v (as bfloat16 terms) in shared memory, and how v gets there. Row pitches are padded by
// 16 bytes, which spreads the eight rows of a matrix fragment over all banks.
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

// A row-major matrix in global memory; `vectors`: base, stride and width allow 16-byte accesses.
template <typename T>
struct Rows {
  T* ptr;
  int64_t rows, columns, stride;
  bool vectors;
};

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
        if (v.vectors && column < v.columns) {
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
};

}  // namespace hra::device
