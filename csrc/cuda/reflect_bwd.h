// The steps that the backward kernels have in common: how sums for dv are kept and handed over.
#pragma once

#include "reflect.h"

namespace hra::cuda {

using namespace device;

// dv += sᵀ dy + qmᵀ x over one tile of rows, in a warp's columns.
template <int kRank, typename T, int kRows, int kColumns, int kCount>
__device__ __forceinline__ void accumulate_both(float (&dv)[kCount][kRank / 16][4],
                                                const RowTile<T, kRows, kColumns>& dy,
                                                const TermTile<Split<T>::kV, kRows, kRank>& s,
                                                const RowTile<T, kRows, kColumns>& x,
                                                const TermTile<Split<T>::kV, kRows, kRank>& qm, int column) {
  if constexpr (sizeof(T) == 2) {
    accumulate_vectors(dv, dy, s, column);
    accumulate_vectors(dv, x, qm, column);
  } else {
    // tensor cores truncate their sums: float32 results must not add up all rows there
    float part[kCount][kRank / 16][4] = {};
    accumulate_vectors(part, dy, s, column);
    accumulate_vectors(part, x, qm, column);
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
      for (int k = 0; k < kRank / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dv[n][k][i] += part[n][k][i];
      }
    }
  }
}

// Writes a warp's sums, of the columns from column0 on, to a share (R, D).
template <int kMiddle, int kCount>
__device__ __forceinline__ void store_vector_share(float* share, int64_t R, int64_t D,
                                                   const float (&dv)[kCount][kMiddle][4], int64_t column0) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
#pragma unroll
    for (int k = 0; k < kMiddle; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = 16 * k + lane / 4 + i / 2 * 8, column = column0 + 8 * n + lane % 4 * 2 + i % 2;
        if (row < R && column < D) share[row * D + column] = dv[n][k][i];
      }
    }
  }
}

// dv and dt as minus the sums of their shares, in a fixed order.
Status reduce_shares(const ReflectBwdParams& params, const float* dv_parts, int64_t vector_parts, const float* dm_parts,
                     int64_t middle_parts, void* stream);

}  // namespace hra::cuda
