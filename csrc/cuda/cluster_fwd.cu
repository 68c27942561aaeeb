// Forward in one pass: p = x vᵀ over the cluster, s = p m, y = x - s v from the tile that is still on chip. cluster.h
// says how.
//
// Predictions for an H100 (132 SMs, 3.0 TB/s copy), bfloat16, R = 8, M = 8192; not measured, the kernel has not run:
//
//      D   cluster x slice   blocks per SM   bytes moved   floor      of copy bandwidth
//   2048       4 x 512             3            67 MB      0.022 ms         85%
//   4096       8 x 512             3           134 MB      0.045 ms         90%
//   8192       8 x 1024            1           268 MB      0.089 ms         85%
//  16384      16 x 1024            1           537 MB      0.179 ms         75%
//
// Three blocks per SM keep 3 x 16 KiB of loads in flight, of which 18 KiB cover 0.8 us of latency at 23 GB/s per SM and
// direction, while one of them exchanges. With one block per SM the exchange (about 1 us of the 4.3 us that a tile's
// bytes take) shows in part; a cluster of 16 also leaves SMs idle, where a GPC has 16 or 18 of them. R = 16 doubles the
// shared memory of v: two blocks per SM, a few percent less. v adds D R 4 bytes per cluster, out of L2.
#include "cluster.h"

namespace hra::cuda {
namespace {

template <typename T>
struct ClusterForwardArguments {
  Rows<T> y;
  float* p;  // (M, R), or null
  Rows<const T> x;
  Rows<const float> v;
  Middle m;
  int cluster;
};

template <typename T, int kRank, int kSlice>
struct ClusterForwardShared : ClusterTiles<T, kRank, kSlice> {
  typename ClusterTiles<T, kRank, kSlice>::XTile x[2];
  float p[kClusterRows][kRank];
  typename ClusterTiles<T, kRank, kSlice>::CoefficientTile s;
};

template <typename T, int kRank, int kSlice>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_fwd_kernel(const HRA_GRID_CONSTANT ClusterForwardArguments<T> to) {
#ifdef HRA_HAS_CLUSTERS
  using Shared = ClusterForwardShared<T, kRank, kSlice>;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int R = to.m.R;
  const ClusterTail tail(&shared + 1, R);
  const unsigned rank = cluster_rank();
  const int64_t column0 = static_cast<int64_t>(rank) * kSlice;
  const int64_t tiles = ceil_div(to.x.rows, kClusterRows), step = gridDim.x / to.cluster;
  int64_t tile = blockIdx.x / to.cluster;

  load_tile(shared.x[0], to.x, tile * kClusterRows, column0);
  cp_async_commit();
  shared.load_factor(tail, to.v, to.m, column0);
  const Middle m = {tail.t, R, to.m.transpose};
  HRA_CLUSTER_BARRIER();  // before anybody writes into another block's shared memory
  for (int parity = 0; tile < tiles; tile += step, parity ^= 1) {
    const int64_t row0 = tile * kClusterRows;
    cp_async_wait<0>();
    __syncthreads();  // this tile is here, and nobody still uses the other stage
    if (tile + step < tiles) load_tile(shared.x[parity ^ 1], to.x, (tile + step) * kClusterRows, column0);
    cp_async_commit();
    auto& x = shared.x[parity];
    shared.project_and_exchange(tail, x, R, parity, rank, to.cluster);
    for (int i = thread_id(); i < kClusterRows * kRank; i += kThreads) {
      const int row = i / kRank, column = i % kRank;
      const float p = Shared::exchanged(tail, R, parity, to.cluster, row, column);
      shared.p[row][column] = p;
      if (rank == 0 && to.p && column < R && row0 + row < to.x.rows) to.p[(row0 + row) * R + column] = p;
    }
    __syncthreads();
    constexpr int kPairs = kPaddedRank<kRank> / 2;
    for (int i = thread_id(); i < kClusterRows * kPairs; i += kThreads) {
      const int row = i / kPairs, column = i % kPairs * 2;
      const float* p = shared.p[row];
      shared.s.put(row, column, times_middle(p, m, column), times_middle(p, m, column + 1));
    }
    __syncthreads();
    Coefficients<T, kRank> s;
    s.load(shared.s, 0);
    const int column = Shared::warp_column();
#pragma unroll
    for (int n = 0; n < Shared::kWarpColumns; n += 8) reflect_tile(x, s, shared.v, 0, column + n);
    sync_warp();
    store_warp_tile<kClusterRows, Shared::kWarpColumns>(to.y, x, 0, column, row0, column0 + column);
  }
#endif
}

template <typename T, int kRank, int kSlice>
Launch how_to_launch(int64_t R, const ClusterPlan& plan, void* stream) {
  const int64_t bytes = sizeof(ClusterForwardShared<T, kRank, kSlice>) + ClusterTail::bytes(R, plan.cluster);
  return {plan.clusters * plan.cluster, 1, kThreads, bytes, stream, plan.cluster};
}

}  // namespace

Status plan_cluster_fwd(const ReflectFwdParams& params, ClusterPlan& plan) {
  auto count = [&](ClusterPlan& candidate, int64_t shared_bytes) {
    return with_cluster_kernel(params.dtype, params.R, candidate.slice, [&](auto zero, auto rank, auto slice) {
      using T = decltype(zero);
      constexpr int kRank = decltype(rank)::value, kSlice = decltype(slice)::value;
      ClusterPlan one = candidate;
      one.clusters = 1;
      const Launch how = how_to_launch<T, kRank, kSlice>(params.R, one, nullptr);
      if (how.shared_bytes > shared_bytes) return Status{0};
      return resident_clusters(cluster_fwd_kernel<T, kRank, kSlice>, how, candidate.clusters);
    });
  };
  return plan_clusters(params.M, params.D, params.R, params.dtype, count, plan);
}

Status cluster_fwd(const ReflectFwdParams& params, const ClusterPlan& plan, void* stream) {
  return with_cluster_kernel(params.dtype, params.R, plan.slice, [&](auto zero, auto rank, auto slice) {
    using T = decltype(zero);
    constexpr int kRank = decltype(rank)::value, kSlice = decltype(slice)::value;
    ClusterForwardArguments<T> arguments;
    arguments.y = rows_of<T>(params.y_ptr, params.M, params.D, params.stride_ym);
    arguments.p = static_cast<float*>(params.p_ptr);
    arguments.x = rows_of<const T>(params.x_ptr, params.M, params.D, params.stride_xm);
    arguments.v = rows_of<const float>(params.v_ptr, params.R, params.D, params.D);
    arguments.m = {static_cast<const float*>(params.t_ptr), static_cast<int>(params.R), params.transpose};
    arguments.cluster = plan.cluster;
    return launch(cluster_fwd_kernel<T, kRank, kSlice>, how_to_launch<T, kRank, kSlice>(params.R, plan, stream),
                  arguments);
  });
}

}  // namespace hra::cuda
