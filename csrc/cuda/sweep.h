// p = x vᵀ of a block of rows, the columns streamed through shared memory: the first half of the portable kernels.
//
// A block of 256 threads owns 32 rows. Tiles of x arrive through three cp.async stages; v is read as float32 one tile
// ahead, split into bfloat16 terms in registers and stored to one of two buffers. So there is one barrier per tile:
// it makes tile i and its terms visible, and all warps that reach it are done with tile i - 1, whose places tile i + 2
// and the terms of tile i + 1 take. Warps split a tile into 2 row groups x 4 column groups.
#pragma once

#include "reflect.h"

namespace hra::cuda {

using namespace device;

// What a block may ask for on the GPU that has least: sm_120, NVIDIA's published limit.
constexpr int kSharedEverywhere = 101376;

template <typename T, int kRank>
struct Sweep {
  static constexpr int kRows = 32;
  static constexpr int kColumns = sizeof(T) == 2 && kRank <= 32 ? 128 : 64;
  static constexpr int kStages = 3;
  static constexpr int kColumnGroups = 4;
  static constexpr int kWarpColumns = kColumns / kColumnGroups;
  using XTile = RowTile<T, kRows, kColumns>;
  using VTile = TermTile<Split<T>::kV, kRank, kColumns>;

  XTile x[kStages];
  union {
    VTile v[2];
    float p[kColumnGroups][kRows][kRank];  // partial sums of the column groups, then their sum in p[0]
  };
  TermTile<Split<T>::kV, kRows, kRank> s;

  static __device__ __forceinline__ int warp_row() { return warp_id() % 2 * 16; }
  static __device__ __forceinline__ int warp_column() { return warp_id() / 2 * kWarpColumns; }

  // visit(x tile, v tile, first column) for every tile, left to right or right to left; ends with a barrier.
  template <bool kReverse, typename Visitor>
  __device__ __forceinline__ void over_columns(const Rows<const T>& from, const Rows<const float>& vectors,
                                               int64_t row0, Visitor visit) {
    const int64_t tiles = ceil_div(from.columns, kColumns);
    if (tiles == 0) return;
    auto first_column = [&](int64_t i) { return (kReverse ? tiles - 1 - i : i) * kColumns; };
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < tiles) load_tile(x[i], from, row0, first_column(i));
      cp_async_commit();
    }
    VectorsInFlight<kRank, kColumns> flight;
    flight.fetch(vectors, first_column(0));
    int stage = 0;
    for (int64_t i = 0; i < tiles; ++i) {
      flight.put(v[i % 2]);
      cp_async_wait<kStages - 2>();
      __syncthreads();
      if (i + kStages - 1 < tiles) {
        load_tile(x[(stage + kStages - 1) % kStages], from, row0, first_column(i + kStages - 1));
      }
      cp_async_commit();
      if (i + 1 < tiles) flight.fetch(vectors, first_column(i + 1));
      visit(x[stage], v[i % 2], first_column(i));
      stage = (stage + 1) % kStages;
    }
    __syncthreads();
  }

  // Leaves x vᵀ of the rows from row0 in p[0], zero for rows that do not exist.
  __device__ __forceinline__ void project_rows(const Rows<const T>& from, const Rows<const float>& vectors,
                                               int64_t row0) {
    float sum[kRank / 8][4] = {};
    over_columns<false>(from, vectors, row0, [&](const XTile& x_tile, const VTile& v_tile, int64_t) {
      if constexpr (sizeof(T) == 2) {
        project<kWarpColumns>(sum, x_tile, v_tile, warp_row(), warp_column());
      } else {
        // tensor cores truncate their sums: float32 results must not add up a whole row there
        float part[kRank / 8][4] = {};
        project<kWarpColumns>(part, x_tile, v_tile, warp_row(), warp_column());
#pragma unroll
        for (int n = 0; n < kRank / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[n][i] += part[n][i];
        }
      }
    });
    const int lane = lane_id();
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[warp_id() / 2][warp_row() + lane / 4 + i / 2 * 8][8 * n + lane % 4 * 2 + i % 2] = sum[n][i];
      }
    }
    __syncthreads();
    for (int i = thread_id(); i < kRows * kRank; i += kThreads) {
      float* here = &p[0][0][0] + i;
#pragma unroll
      for (int group = 1; group < kColumnGroups; ++group) *here += here[group * kRows * kRank];
    }
    __syncthreads();
  }
};

// --- what sweep_fwd.cu and sweep_bwd.cu offer to reflect.cu ---

Status sweep_fwd(const ReflectFwdParams& params, void* stream);
Status sweep_bwd_workspace_bytes(const ReflectBwdParams& params, int64_t& bytes);
Status sweep_bwd(const ReflectBwdParams& params, void* workspace, void* stream);

}  // namespace hra::cuda
