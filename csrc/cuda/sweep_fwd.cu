// Forward, on any GPU from sm_80 on:  p = x vᵀ,  s = p m,  y = x - s v.
//
// One block per 32 rows sweeps the columns twice: left to right for p, then right to left for y, so that the second
// sweep starts on what the cache still holds. Reads x once from memory and once from L2 (from memory where
// 32 rows x D of every resident block exceed it), writes y once; v comes from L2.
#include "sweep.h"

namespace hra::cuda {
namespace {

template <typename T>
struct ForwardArguments {
  Rows<T> y;
  float* p;  // (M, R), or null
  Rows<const T> x;
  Rows<const float> v;
  Middle m;
};

template <typename T, int kRank>
__global__ void __launch_bounds__(kThreads, 1) sweep_fwd_kernel(const HRA_GRID_CONSTANT ForwardArguments<T> to) {
  using Shared = Sweep<T, kRank>;
  static_assert(sizeof(Shared) <= kSharedEverywhere, "fits on every GPU that is served");
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Shared::kRows;
  shared.project_rows(to.x, to.v, row0);
  const int R = to.m.R;
  for (int i = thread_id(); i < Shared::kRows * kRank / 2; i += kThreads) {
    const int row = i / (kRank / 2), column = i % (kRank / 2) * 2;
    const float* p = shared.p[0][row];
    if (to.p && row0 + row < to.x.rows) {
      float* p_row = to.p + (row0 + row) * R;
      if (column < R) p_row[column] = p[column];
      if (column + 1 < R) p_row[column + 1] = p[column + 1];
    }
    shared.s.put(row, column, times_middle(p, to.m, column), times_middle(p, to.m, column + 1));
  }
  __syncthreads();
  Coefficients<T, kRank> s;
  s.load(shared.s, Shared::warp_row());
  // `p` has been read: the next sweep may overwrite it with vectors
  shared.template over_columns<true>(
      to.x, to.v, row0, [&](typename Shared::XTile& x, const typename Shared::VTile& v, int64_t column0) {
        const int row = Shared::warp_row(), column = Shared::warp_column();
#pragma unroll
        for (int n = 0; n < Shared::kWarpColumns; n += 8) reflect_tile(x, s, v, row, column + n);
        sync_warp();
        store_warp_tile<16, Shared::kWarpColumns>(to.y, x, row, column, row0 + row, column0 + column);
      });
}

}  // namespace

Status sweep_fwd(const ReflectFwdParams& params, void* stream) {
  return with_dtype(params.dtype, [&](auto zero) {
    return with_rank<decltype(zero)>(params.R, [&](auto rank) {
      using T = decltype(zero);
      constexpr int kRank = decltype(rank)::value;
      using Shared = Sweep<T, kRank>;
      ForwardArguments<T> arguments;
      arguments.y = rows_of<T>(params.y_ptr, params.M, params.D, params.stride_ym);
      arguments.p = static_cast<float*>(params.p_ptr);
      arguments.x = rows_of<const T>(params.x_ptr, params.M, params.D, params.stride_xm);
      arguments.v = rows_of<const float>(params.v_ptr, params.R, params.D, params.D);
      arguments.m = {static_cast<const float*>(params.t_ptr), static_cast<int>(params.R), params.transpose};
      Launch how{ceil_div(params.M, Shared::kRows), 1, kThreads, sizeof(Shared), stream};
      return launch(sweep_fwd_kernel<T, kRank>, how, arguments);
    });
  });
}

}  // namespace hra::cuda
