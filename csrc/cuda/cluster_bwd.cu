// Backward in one pass: q = dy vᵀ over the cluster, s = p m, qm = q mᵀ, dx = dy - qm v from the tile that is still on
// chip, and dv = -(sᵀ dy + qmᵀ x) summed in registers over all tiles of a cluster. cluster.h says how the cluster
// works; bench/gpu/notes.md has the counts and the predictions.
//
// The products for dv add over rows, so they read dy and x transposed: each warp keeps its own columns of both in
// shared memory, dy's from the registers that hold it for q. Nobody else reads them, and no barrier guards them. x is
// wanted last in a tile, so that one stage is enough: its next rows arrive during the exchange.
//
// Each cluster writes its sums for dv once, each block its share of dm; a second launch adds the shares in a fixed
// order.
#include "cluster.h"
#include "reflect_bwd.h"

namespace hra::cuda {
namespace {

template <typename T>
struct ClusterBackwardArguments {
  Rows<T> dx;       // dx.ptr may be null
  float* dv_parts;  // (clusters, R, D), sign not yet changed
  float* dm_parts;  // (clusters * cluster, R, R), sign not yet changed
  Rows<const T> dy, x;
  Rows<const float> v;
  const float* p;  // (M, R)
  Middle m;
  int cluster;
};

template <typename T, int kRank, int kSlice>
struct ClusterBackwardShared : ClusterShared<T, kRank, kSlice> {
  MiddleTile m_transposed;
  RowTile<T, kRowsOfWarp, kSlice> dy, x;
};

// dvᵀ (16 columns each) += rowsᵀ s over a tile, in a warp's columns.
template <typename T, int kRank, int kSlice, int kCount>
__device__ __forceinline__ void add_vectors(Result<kRank> (&dv)[kCount], const RowTile<T, kRowsOfWarp, kSlice>& rows,
                                            const Terms<2, kRank>& s, int column) {
  const int lane = lane_id();
  uint32_t b[kRank / 8][2][2];
#pragma unroll
  for (int n = 0; n < kRank / 8; ++n) s.tile(b[n], n);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sync_warp();  // for the compiler, which would load the operands of all steps at once, and spill
    uint32_t packed[4], a[Split<T>::kX][4];
    ldmatrix<4, true>(packed, rows.at(fragment_row(lane % 8 + lane / 16 * 8), column + 16 * i + lane / 8 % 2 * 8));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t terms[Split<T>::kX];
      split_packed<T>(terms, packed[k]);
#pragma unroll
      for (int term = 0; term < Split<T>::kX; ++term) a[term][k] = terms[term];
    }
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) mma_terms<1>(dv[i][n], a, b[n]);
  }
}

// dm += pᵀ q over a tile.
template <int kRank>
__device__ __forceinline__ void add_middle(Result<kRank>& dm, const Terms<3, kRank>& p, const Terms<3, kRank>& q) {
  uint32_t a[3][4];
  p.columns(a);
#pragma unroll
  for (int n = 0; n < kRank / 8; ++n) {
    uint32_t b[3][2];
    q.tile(b, n);
    mma_terms<2>(dm[n], a, b);
  }
}

// Writes a warp's sums, of the columns from column0 on, to a share (R, D).
template <int kCount, int kTiles>
__device__ __forceinline__ void store_transposed(float* share, int64_t R, int64_t D,
                                                 const float (&dv)[kCount][kTiles][4], int column0) {
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = 8 * n + lane % 4 * 2 + k % 2, column = column0 + 16 * i + lane / 4 + k / 2 * 8;
        if (row < R && column < D) share[row * D + column] = dv[i][n][k];
      }
    }
  }
}

template <typename T, int kRank, int kSlice>
__global__ void __launch_bounds__(kThreads, kSlice == 512 && Split<T>::kX == 1 ? 2 : 1)
    cluster_bwd_kernel(const HRA_GRID_CONSTANT ClusterBackwardArguments<T> to) {
#ifdef HRA_HAS_CLUSTERS
  using Shared = ClusterBackwardShared<T, kRank, kSlice>;
  constexpr int kWarpColumns = Shared::kWarpColumns;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  auto* slots = reinterpret_cast<float4*>(&shared + 1);
  const int R = to.m.R, column = Shared::warp_column();
  const unsigned rank = cluster_rank();
  const int block_column = static_cast<int>(rank) * kSlice, column0 = block_column + column;
  const int64_t cluster_index = blockIdx.x / to.cluster, step = gridDim.x / to.cluster * kRowsOfWarp;
  int64_t row0 = cluster_index * kRowsOfWarp;

  RowsInFlight<T, kWarpColumns> dy, next;
  dy.fetch(to.dy, row0, column0);
  copy_rows<kWarpColumns>(shared.x, to.x, row0, column0, column);
  cp_async_commit();
  shared.load_vectors(to.v, block_column);
  put_middle(shared.m, to.m);
  put_middle(shared.m_transposed, {to.m.t, R, !to.m.transpose});
  Result<kRank> dv[kWarpColumns / 16] = {};
  Result<kRank> dm = {};  // of warp 0
  shared.open_mailboxes();
  HRA_CLUSTER_BARRIER();  // v and m are here, and nobody sends to a block that has not begun
  for (int turn = 0; row0 < to.dy.rows; row0 += step, ++turn) {
    const bool more = row0 + step < to.dy.rows;
    if (more) next.fetch(to.dy, row0 + step, column0);
    Result<kRank> p, q = {};
    load_result(p, to.p + row0 * R, to.dy.rows - row0, R);
    add_projection(q, dy, shared.v, column);
    dy.put(shared.dy, column);
    shared.exchange(q, slots, turn, rank, to.cluster);
    const Terms<3, kRank> p_terms(p), q_terms(q);
    // blocks take turns at dm
    if (warp_id() == 0 && turn % to.cluster == static_cast<int>(rank)) add_middle(dm, p_terms, q_terms);
    Result<kRank> s, qm;
    times(s, p_terms, shared.m);
    times(qm, q_terms, shared.m_transposed);
    const Terms<2, kRank> s_terms(s), qm_terms(qm);
    cp_async_wait<0>();
    sync_warp();  // all lanes' parts of dy and x are here
    add_vectors(dv, shared.dy, s_terms, column);
    add_vectors(dv, shared.x, qm_terms, column);
    sync_warp();  // x's place is free
    if (more) copy_rows<kWarpColumns>(shared.x, to.x, row0 + step, column0, column);
    cp_async_commit();
    if (to.dx.ptr) {
      reflect_rows<kWarpColumns>(
          to.dx,
          [&](int group, int half) { return *RowsInFlight<T, kWarpColumns>::place(shared.dy, column, group, half); },
          Coefficients16<kRank>(qm_terms), shared.v, column, row0, column0);
    }
    dy = next;
  }
  store_transposed(to.dv_parts + cluster_index * R * to.v.columns, R, to.v.columns, dv, column0);
  if (warp_id() == 0) store_result(to.dm_parts + static_cast<int64_t>(blockIdx.x) * R * R, R, R, dm);
#endif
}

struct Backward {
  static constexpr int kWidestSlice = 1024;
  template <typename T, int kRank, int kSlice>
  using Shared = ClusterBackwardShared<T, kRank, kSlice>;
  template <typename T, int kRank, int kSlice>
  static auto kernel() {
    return cluster_bwd_kernel<T, kRank, kSlice>;
  }
};

}  // namespace

Status plan_cluster_bwd(const ReflectBwdParams& params, ClusterPlan& plan) {
  return plan_cluster<Backward>(params, plan);
}

int64_t cluster_bwd_workspace_bytes(const ReflectBwdParams& params, const ClusterPlan& plan) {
  return 4 * plan.clusters * (params.R * params.D + plan.cluster * params.R * params.R);
}

Status cluster_bwd(const ReflectBwdParams& params, const ClusterPlan& plan, void* workspace, void* stream) {
  auto* dv_parts = static_cast<float*>(workspace);
  float* dm_parts = dv_parts + plan.clusters * params.R * params.D;
  const Status status = launch_cluster<Backward>(params, plan, stream, [&](auto zero) {
    using T = decltype(zero);
    ClusterBackwardArguments<T> arguments;
    arguments.dx = cluster_rows<T>(params.dx_ptr, params.M, params.D, params.stride_dxm);
    arguments.dv_parts = dv_parts;
    arguments.dm_parts = dm_parts;
    arguments.dy = cluster_rows<const T>(params.dy_ptr, params.M, params.D, params.stride_dym);
    arguments.x = cluster_rows<const T>(params.x_ptr, params.M, params.D, params.stride_xm);
    arguments.v = rows_of<const float>(params.v_ptr, params.R, params.D, params.D);
    arguments.p = static_cast<const float*>(params.p_ptr);
    arguments.m = {static_cast<const float*>(params.t_ptr), static_cast<int>(params.R), params.transpose};
    arguments.cluster = plan.cluster;
    return arguments;
  });
  if (status) return status;
  return reduce_shares(params, dv_parts, plan.clusters, dm_parts, plan.clusters * plan.cluster, stream);
}

}  // namespace hra::cuda
