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

namespace hra::cuda {
namespace {

template <typename T>
struct ClusterBackwardArguments {
  Rows<T> dx;
  float* dv_parts;  // (clusters, R, D), sign not yet changed
  float* dm_parts;  // (clusters * cluster, R, R), sign not yet changed
  Rows<const T> dy, x;
  Rows<const float> v;
  const float* p;  // (M, R)
  Middle m;
  int cluster;
};

template <typename T, int kRank, int kSlice>
struct ClusterBackwardShared : ClusterShared<kRank, kSlice> {
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
    uint32_t packed[4], a[kTermsOf<T>][4];
    ldmatrix<true>(packed, rows.at(fragment_row(lane % 8 + lane / 16 * 8), column + 16 * i + lane / 8 % 2 * 8));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t terms[kTermsOf<T>];
      split_packed<T>(terms, packed[k]);
#pragma unroll
      for (int term = 0; term < kTermsOf<T>; ++term) a[term][k] = terms[term];
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
__global__ void __launch_bounds__(kThreads, kSlice == 512 && kTermsOf<T> == 1 ? 2 : 1)
    cluster_bwd_kernel(const HRA_GRID_CONSTANT ClusterBackwardArguments<T> to) {
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
    reflect_rows<kWarpColumns>(
        to.dx,
        [&](int group, int half) { return *RowsInFlight<T, kWarpColumns>::place(shared.dy, column, group, half); },
        Coefficients16<kRank>(qm_terms), shared.v, column, row0, column0);
    dy = next;
  }
  store_transposed(to.dv_parts + cluster_index * R * to.v.columns, R, to.v.columns, dv, column0);
  if (warp_id() == 0) store_result(to.dm_parts + static_cast<int64_t>(blockIdx.x) * R * R, R, R, dm);
}

struct ReduceArguments {
  float* dv;              // (R, D)
  float* dt;              // (R, R)
  const float* dv_parts;  // (vector_parts, R, D)
  const float* dm_parts;  // (middle_parts, R, R)
  int64_t vector_parts, middle_parts, D;
  int R;
  bool transpose;
};

constexpr int kReducedByBlock = 32;

__global__ void __launch_bounds__(kThreads) reduce_kernel(const HRA_GRID_CONSTANT ReduceArguments to) {
  const int64_t vector_size = to.R * to.D, middle_size = static_cast<int64_t>(to.R) * to.R;
  const int64_t vector_blocks = ceil_div(vector_size, kReducedByBlock);
  if (blockIdx.x < vector_blocks) {
    // a warp adds up every eighth share: there are up to 132, and one after the other they would cost their latency
    auto* sums = reinterpret_cast<float*>(dynamic_shared());  // (kWarps, 32)
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kReducedByBlock + lane_id();
    float sum = 0;
    if (i < vector_size) {
#pragma unroll 8
      for (int64_t part = warp_id(); part < to.vector_parts; part += kWarps) sum += to.dv_parts[part * vector_size + i];
    }
    sums[thread_id()] = sum;
    __syncthreads();
    if (warp_id() > 0 || i >= vector_size) return;
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += sums[warp * 32 + lane_id()];
    to.dv[i] = -sum;
    return;
  }
  const int64_t i = (blockIdx.x - vector_blocks) * kWarps + warp_id();
  if (i >= middle_size) return;  // a whole warp
  float sum = 0;
#pragma unroll 8
  for (int64_t part = lane_id(); part < to.middle_parts; part += 32) sum += to.dm_parts[part * middle_size + i];
  for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  const int64_t transposed = i % to.R * to.R + i / to.R;
  if (lane_id() == 0) to.dt[to.transpose ? transposed : i] = -sum;
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

// dv and dt as minus the sums of their shares, in a fixed order.
Status reduce_shares(const ReflectBwdParams& params, const float* dv_parts, int64_t vector_parts, const float* dm_parts,
                     int64_t middle_parts, void* stream) {
  ReduceArguments arguments;
  arguments.dv = static_cast<float*>(params.dv_ptr);
  arguments.dt = static_cast<float*>(params.dt_ptr);
  arguments.dv_parts = dv_parts;
  arguments.dm_parts = dm_parts;
  arguments.vector_parts = vector_parts;
  arguments.middle_parts = middle_parts;
  arguments.D = params.D;
  arguments.R = static_cast<int>(params.R);
  arguments.transpose = params.transpose;
  const int64_t blocks = ceil_div(params.R * params.D, kReducedByBlock) + ceil_div(params.R * params.R, kWarps);
  if (blocks == 0) return 0;
  return launch(reduce_kernel, Launch{blocks, kThreads, kThreads * sizeof(float), stream}, arguments);
}

}  // namespace

Status resident_clusters(bool backward, int64_t D, int64_t R, DType dtype, int64_t slice, int64_t& count) {
  return backward ? count_resident_of<Backward>(D, R, dtype, slice, count)
                  : resident_clusters_fwd(D, R, dtype, slice, count);
}

int64_t reflect_bwd_workspace_bytes(int64_t M, int64_t D, int64_t R, const Clusters& clusters) {
  return 4 * busy_clusters(M, clusters) * R * (D + cluster_size(D, clusters.slice) * R);
}

Status reflect_bwd(const ReflectBwdParams& params, const Clusters& clusters, void* workspace, void* stream) {
  const int64_t parts = busy_clusters(params.M, clusters);
  auto* dv_parts = static_cast<float*>(workspace);
  float* dm_parts = dv_parts + parts * params.R * params.D;
  if (params.M > 0) {
    const Status status = launch_clusters<Backward>(params, clusters, stream, [&](auto zero, int cluster) {
      using T = decltype(zero);
      ClusterBackwardArguments<T> arguments;
      arguments.dx = rows_of<T>(params.dx_ptr, params.M, params.D, params.stride_dxm);
      arguments.dv_parts = dv_parts;
      arguments.dm_parts = dm_parts;
      arguments.dy = rows_of<const T>(params.dy_ptr, params.M, params.D, params.stride_dym);
      arguments.x = rows_of<const T>(params.x_ptr, params.M, params.D, params.stride_xm);
      arguments.v = rows_of<const float>(params.v_ptr, params.R, params.D, params.D);
      arguments.p = static_cast<const float*>(params.p_ptr);
      arguments.m = {static_cast<const float*>(params.t_ptr), static_cast<int>(params.R), params.transpose};
      arguments.cluster = cluster;
      return arguments;
    });
    if (status) return status;
  }
  return reduce_shares(params, dv_parts, parts, dm_parts, parts * cluster_size(params.D, clusters.slice), stream);
}

}  // namespace hra::cuda
