// Backward in one pass: q = dy vᵀ over the cluster, s = p m, qm = q mᵀ, dx = dy - qm v from the tile that is still on
// chip, and dv = -(sᵀ dy + qmᵀ x) summed in registers over all tiles of a cluster. cluster.h says how the cluster
// works.
//
// Each cluster writes its sums for dv once, each block its share of dm; a second launch adds the shares in a fixed
// order.
//
// Predictions for an H100 (132 SMs, 3.0 TB/s copy), bfloat16, R = 8, M = 8192; not measured, the kernel has not run:
//
//      D   cluster x slice   blocks per SM   bytes moved   floor      of copy bandwidth
//   2048       4 x 512             2           101 MB      0.034 ms         80%
//   4096       8 x 512             2           201 MB      0.067 ms         85%
//   8192       8 x 1024            1           403 MB      0.134 ms         80%
//  16384      16 x 1024            1           805 MB      0.268 ms         70%
//
// The shares of dv are written and read once more: 2 x 4 D R bytes per cluster, 2% of the bytes at D = 4096 and less of
// the time where they stay in L2. R = 16: one block per SM at slice 512, where the exchange shows; 5 to 10% less.
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
struct ClusterBackwardShared : ClusterTiles<T, kRank, kSlice> {
  typename ClusterTiles<T, kRank, kSlice>::XTile dy[2], x[2];
  float p[kClusterRows][kRank], q[kClusterRows][kRank];
  typename ClusterTiles<T, kRank, kSlice>::CoefficientTile s, qm;
};

template <typename T, int kRank, int kSlice>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_bwd_kernel(const HRA_GRID_CONSTANT ClusterBackwardArguments<T> to) {
#ifdef HRA_HAS_CLUSTERS
  using Shared = ClusterBackwardShared<T, kRank, kSlice>;
  constexpr int kTiles = Shared::kWarpColumns / 8, kPadded = kPaddedRank<kRank>;
  constexpr int kEach = (kClusterRows * kRank + kThreads - 1) / kThreads;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int R = to.m.R;
  const ClusterTail tail(&shared + 1, R);
  const unsigned rank = cluster_rank();
  const int64_t column0 = static_cast<int64_t>(rank) * kSlice;
  const int column = Shared::warp_column();
  const int64_t tiles = ceil_div(to.dy.rows, kClusterRows), step = gridDim.x / to.cluster;
  const int64_t cluster_index = blockIdx.x / to.cluster;
  int64_t tile = cluster_index;

  load_tile(shared.dy[0], to.dy, tile * kClusterRows, column0);
  load_tile(shared.x[0], to.x, tile * kClusterRows, column0);
  cp_async_commit();
  shared.load_factor(tail, to.v, to.m, column0);
  float dv[kTiles][kPadded / 16][4] = {};
  float dm = 0;           // thread i owns entry i
  HRA_CLUSTER_BARRIER();  // before anybody writes into another block's shared memory
  for (int parity = 0, turn = 0; tile < tiles; tile += step, parity ^= 1) {
    const int64_t row0 = tile * kClusterRows;
    float p[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = k * kThreads + thread_id(), row = i / kRank, at = i % kRank;
      p[k] = i < kClusterRows * kRank && at < R && row0 + row < to.dy.rows ? to.p[(row0 + row) * R + at] : 0.0f;
    }
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody still uses the other stage
    if (tile + step < tiles) {
      load_tile(shared.dy[parity ^ 1], to.dy, (tile + step) * kClusterRows, column0);
      load_tile(shared.x[parity ^ 1], to.x, (tile + step) * kClusterRows, column0);
    }
    cp_async_commit();
    auto& dy = shared.dy[parity];
    shared.project_and_exchange(tail, dy, R, parity, rank, to.cluster);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = k * kThreads + thread_id(), row = i / kRank, at = i % kRank;
      if (i >= kClusterRows * kRank) break;
      shared.p[row][at] = p[k];
      shared.q[row][at] = Shared::exchanged(tail, R, parity, to.cluster, row, at);
    }
    __syncthreads();
    constexpr int kPairs = kPadded / 2;
    for (int i = thread_id(); i < 2 * kClusterRows * kPairs; i += kThreads) {
      const bool second = i >= kClusterRows * kPairs;
      const int row = i / kPairs % kClusterRows, at = i % kPairs * 2;
      const float* from = second ? shared.q[row] : shared.p[row];
      const Middle middle = {tail.t, R, to.m.transpose != second};
      auto& tile_of = second ? shared.qm : shared.s;
      tile_of.put(row, at, times_middle(from, middle, at), times_middle(from, middle, at + 1));
    }
    // blocks take turns at dm = pᵀ q; R <= 16, so one entry per thread is enough
    if (turn == static_cast<int>(rank) && thread_id() < R * R) {
      for (int row = 0; row < kClusterRows; ++row) {
        dm += shared.p[row][thread_id() / R] * shared.q[row][thread_id() % R];
      }
    }
    turn = turn + 1 == to.cluster ? 0 : turn + 1;
    __syncthreads();
    accumulate_both<kPadded>(dv, dy, shared.s, shared.x[parity], shared.qm, column);
    sync_warp();  // dx takes dy's place, and other lanes have read it
    if (to.dx.ptr) {
      Coefficients<T, kRank> qm;
      qm.load(shared.qm, 0);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) reflect_tile(dy, qm, shared.v, 0, column + 8 * n);
      sync_warp();
      store_warp_tile<kClusterRows, Shared::kWarpColumns>(to.dx, dy, 0, column, row0, column0 + column);
    }
  }
  store_vector_share(to.dv_parts + cluster_index * R * to.v.columns, R, to.v.columns, dv, column0 + column);
  if (thread_id() < R * R) to.dm_parts[static_cast<int64_t>(blockIdx.x) * R * R + thread_id()] = dm;
#endif
}

template <typename T, int kRank, int kSlice>
Launch how_to_launch(int64_t R, const ClusterPlan& plan, void* stream) {
  const int64_t bytes = sizeof(ClusterBackwardShared<T, kRank, kSlice>) + ClusterTail::bytes(R, plan.cluster);
  return {plan.clusters * plan.cluster, 1, kThreads, bytes, stream, plan.cluster};
}

}  // namespace

Status plan_cluster_bwd(const ReflectBwdParams& params, ClusterPlan& plan) {
  auto count = [&](ClusterPlan& candidate, int64_t shared_bytes) {
    return with_cluster_kernel(params.dtype, params.R, candidate.slice, [&](auto zero, auto rank, auto slice) {
      using T = decltype(zero);
      constexpr int kRank = decltype(rank)::value, kSlice = decltype(slice)::value;
      ClusterPlan one = candidate;
      one.clusters = 1;
      const Launch how = how_to_launch<T, kRank, kSlice>(params.R, one, nullptr);
      if (how.shared_bytes > shared_bytes) return Status{0};
      return resident_clusters(cluster_bwd_kernel<T, kRank, kSlice>, how, candidate.clusters);
    });
  };
  return plan_clusters(params.M, params.D, params.R, params.dtype, count, plan);
}

int64_t cluster_bwd_workspace_bytes(const ReflectBwdParams& params, const ClusterPlan& plan) {
  return 4 * plan.clusters * (params.R * params.D + plan.cluster * params.R * params.R);
}

Status cluster_bwd(const ReflectBwdParams& params, const ClusterPlan& plan, void* workspace, void* stream) {
  auto* dv_parts = static_cast<float*>(workspace);
  float* dm_parts = dv_parts + plan.clusters * params.R * params.D;
  Status status = with_cluster_kernel(params.dtype, params.R, plan.slice, [&](auto zero, auto rank, auto slice) {
    using T = decltype(zero);
    constexpr int kRank = decltype(rank)::value, kSlice = decltype(slice)::value;
    ClusterBackwardArguments<T> arguments;
    arguments.dx = rows_of<T>(params.dx_ptr, params.M, params.D, params.stride_dxm);
    arguments.dv_parts = dv_parts;
    arguments.dm_parts = dm_parts;
    arguments.dy = rows_of<const T>(params.dy_ptr, params.M, params.D, params.stride_dym);
    arguments.x = rows_of<const T>(params.x_ptr, params.M, params.D, params.stride_xm);
    arguments.v = rows_of<const float>(params.v_ptr, params.R, params.D, params.D);
    arguments.p = static_cast<const float*>(params.p_ptr);
    arguments.m = {static_cast<const float*>(params.t_ptr), static_cast<int>(params.R), params.transpose};
    arguments.cluster = plan.cluster;
    return launch(cluster_bwd_kernel<T, kRank, kSlice>, how_to_launch<T, kRank, kSlice>(params.R, plan, stream),
                  arguments);
  });
  if (status) return status;
  return reduce_shares(params, dv_parts, plan.clusters, dm_parts, plan.clusters * plan.cluster, stream);
}

}  // namespace hra::cuda
