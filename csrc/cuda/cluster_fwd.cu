// Forward in one pass: p = x vᵀ over the cluster, s = p m, y = x - s v from the tile that is still on chip. cluster.h
// says how; bench/gpu/notes.md has the counts and the predictions.
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
__global__ void __launch_bounds__(kThreads, kRank * kSlice * kTermsOf<T> <= 8192 ? 2 : 1)
    cluster_fwd_kernel(const HRA_GRID_CONSTANT ClusterForwardArguments<T> to) {
  using Shared = ClusterShared<kRank, kSlice>;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  auto* slots = reinterpret_cast<float4*>(&shared + 1);
  const int R = to.m.R, column = Shared::warp_column();
  const unsigned rank = cluster_rank();
  const int block_column = static_cast<int>(rank) * kSlice, column0 = block_column + column;
  const int64_t step = gridDim.x / to.cluster * kRowsOfWarp;
  int64_t row0 = blockIdx.x / to.cluster * kRowsOfWarp;

  RowsInFlight<T, Shared::kWarpColumns> x, next;
  x.fetch(to.x, row0, column0);
  shared.load_vectors(to.v, block_column);
  put_middle(shared.m, to.m);
  shared.open_mailboxes();
  HRA_CLUSTER_BARRIER();  // v and m are here, and nobody sends to a block that has not begun
  for (int turn = 0; row0 < to.x.rows; row0 += step, ++turn) {
    if (row0 + step < to.x.rows) next.fetch(to.x, row0 + step, column0);
    Result<kRank> p = {};
    add_projection(p, x, shared.v, column);
    shared.exchange(p, slots, turn, rank, to.cluster);
    if (to.p && rank == 0 && warp_id() == 0) store_result(to.p + row0 * R, to.x.rows - row0, R, p);
    Result<kRank> s;
    times(s, Terms<3, kRank>(p), shared.m);
    reflect_rows<Shared::kWarpColumns>(
        to.y, [&](int group, int half) { return x.vectors[group][half]; }, Coefficients16<kRank>(Terms<2, kRank>(s)),
        shared.v, column, row0, column0);
    x = next;
  }
}

struct Forward {
  static constexpr int kWidestSlice = 2048;
  template <typename T, int kRank, int kSlice>
  using Shared = ClusterShared<kRank, kSlice>;
  template <typename T, int kRank, int kSlice>
  static auto kernel() {
    return cluster_fwd_kernel<T, kRank, kSlice>;
  }
};

}  // namespace

Status resident_clusters_fwd(int64_t D, int64_t R, DType dtype, int64_t slice, int64_t& count) {
  return count_resident_of<Forward>(D, R, dtype, slice, count);
}

Status reflect_fwd(const ReflectFwdParams& params, const Clusters& clusters, void* stream) {
  if (params.M == 0) return 0;
  return launch_clusters<Forward>(params, clusters, stream, [&](auto zero, int cluster) {
    using T = decltype(zero);
    ClusterForwardArguments<T> arguments;
    arguments.y = rows_of<T>(params.y_ptr, params.M, params.D, params.stride_ym);
    arguments.p = static_cast<float*>(params.p_ptr);
    arguments.x = rows_of<const T>(params.x_ptr, params.M, params.D, params.stride_xm);
    arguments.v = rows_of<const float>(params.v_ptr, params.R, params.D, params.D);
    arguments.m = {static_cast<const float*>(params.t_ptr), static_cast<int>(params.R), params.transpose};
    arguments.cluster = cluster;
    return arguments;
  });
}

}  // namespace hra::cuda
