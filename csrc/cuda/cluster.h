// The single-pass path, for sm_90 and newer: a cluster of thread blocks holds whole rows on chip.
//
// Block `rank` of a cluster owns kSlice columns: its part of v lies in shared memory as bfloat16 terms for as long as
// the block lives, and tiles of 16 rows pass through two cp.async stages. For each tile the blocks compute their parts
// of x vᵀ, store them into every block's shared memory (distributed shared memory), meet once, and add up in the order
// of the ranks: all blocks hold the same bits, and every element of x, y (dy, x, dx) crosses device memory once.
//
// Of the two copies of `exchange`, one is filled for tile i + 1 while slower blocks still read that of tile i; nobody
// can be further ahead, since filling the same copy again takes a meeting that they attend after reading.
#pragma once

#include "reflect.h"

#if defined(HRA_EMULATION) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define HRA_HAS_CLUSTERS
#endif

namespace hra::cuda {

using namespace device;

constexpr int kClusterRows = 16;

// Which cluster serves a problem. `clusters` 0: none does, and the sweeps take it.
struct ClusterPlan {
  int slice = 0, cluster = 0;
  int64_t clusters = 0;
};

// Parts of a cluster kernel's shared memory whose size is known at launch only.
struct ClusterTail {
  float* t;         // (R, R)
  float* exchange;  // (2, cluster, 16, R)

  static int64_t bytes(int64_t R, int64_t cluster) { return 4 * (R * R + 2 * cluster * kClusterRows * R) + 16; }

  __device__ __forceinline__ ClusterTail(void* after, int R) {
    t = static_cast<float*>(after);
    exchange = t + R * R;
  }
};

template <typename T, int kRank, int kSlice>
struct ClusterTiles {
  static constexpr int kWarpColumns = kSlice / kWarps;
  using XTile = RowTile<T, kClusterRows, kSlice>;
  using VTile = TermTile<Split<T>::kV, kRank, kSlice>;
  using CoefficientTile = TermTile<Split<T>::kV, kClusterRows, kPaddedRank<kRank>>;

  VTile v;
  float parts[kWarps][kClusterRows][kRank];

  static __device__ __forceinline__ int warp_column() { return warp_id() * kWarpColumns; }

  // v's slice, and t; the caller's next barrier makes them visible.
  __device__ __forceinline__ void load_factor(const ClusterTail& tail, const Rows<const float>& vectors,
                                              const Middle& m, int64_t column0) {
    constexpr int kPiece = 128;
    for (int column = 0; column < kSlice; column += kPiece) {
      VectorsInFlight<kRank, kPiece> flight;
      flight.fetch(vectors, column0 + column);
      flight.put(v, column);
    }
    for (int i = thread_id(); i < m.R * m.R; i += kThreads) tail.t[i] = m.t[i];
  }

  // This block's part of x vᵀ, to all blocks of the cluster; ends with the cluster's meeting.
  __device__ __forceinline__ void project_and_exchange(const ClusterTail& tail, const XTile& x, int R, int parity,
                                                       unsigned rank, int cluster) {
    float sum[kRank / 8][4] = {};
    project<kWarpColumns>(sum, x, v, 0, warp_column());
    const int lane = lane_id();
#pragma unroll
    for (int n = 0; n < kRank / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        parts[warp_id()][lane / 4 + i / 2 * 8][8 * n + lane % 4 * 2 + i % 2] = sum[n][i];
      }
    }
    __syncthreads();
    for (int i = thread_id(); i < kClusterRows * kRank; i += kThreads) {
      const int row = i / kRank, column = i % kRank;
      if (column >= R) continue;
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) total += parts[warp][row][column];
      float* slot = tail.exchange + ((parity * cluster + rank) * kClusterRows + row) * R + column;
      for (int other = 0; other < cluster; ++other) store_in_cluster(slot, other, total);
    }
    HRA_CLUSTER_BARRIER();
  }

  // Entry (row, column) of the whole x vᵀ.
  static __device__ __forceinline__ float exchanged(const ClusterTail& tail, int R, int parity, int cluster, int row,
                                                    int column) {
    float total = 0;
    if (column < R) {
      const float* part = tail.exchange + (parity * cluster * kClusterRows + row) * R + column;
      for (int rank = 0; rank < cluster; ++rank) total += part[rank * kClusterRows * R];
    }
    return total;
  }
};

template <int kSlice>
struct Slice {
  static constexpr int value = kSlice;
};

// The first plan that fits: narrow slices before wide ones, and clusters that every GPU forms before larger ones.
// `count(plan, shared bytes there are)` fills in how many clusters of a plan run at once, or leaves 0.
template <typename Count>
Status plan_clusters(int64_t M, int64_t D, int64_t R, DType dtype, Count count, ClusterPlan& plan) {
  constexpr int kPortableCluster = 8, kLargestCluster = 16;
  plan = {};
  if (dtype == DType::kFloat32 || M == 0 || D == 0 || R == 0 || R > 16) return 0;
  Device gpu;
  if (Status status = current_device(gpu)) return status;
  if (gpu.capability < 90) return 0;
  auto attempt = [&](int slice, int largest) -> Status {
    const int64_t cluster = ceil_div(D, slice);
    if (plan.clusters > 0 || cluster > largest) return 0;
    ClusterPlan candidate;
    candidate.slice = slice;
    candidate.cluster = static_cast<int>(cluster);
    if (Status status = count(candidate, gpu.shared_bytes)) return status;
    const int64_t row_tiles = ceil_div(M, kClusterRows);
    if (candidate.clusters > row_tiles) candidate.clusters = row_tiles;
    plan = candidate;
    return 0;
  };
  if (Status status = attempt(512, kPortableCluster)) return status;
  if (Status status = attempt(1024, kPortableCluster)) return status;
  return attempt(1024, kLargestCluster);
}

// Calls visit(T{}, padded rank as a type, slice as a type) for the instantiation that serves a plan.
template <typename Visitor>
Status with_cluster_kernel(DType dtype, int64_t R, int slice, Visitor visit) {
  auto with_slice = [&](auto zero, auto rank) {
    return slice == 512 ? visit(zero, rank, Slice<512>{}) : visit(zero, rank, Slice<1024>{});
  };
  auto with_narrow_rank = [&](auto zero) {
    return R <= 8 ? with_slice(zero, PaddedRank<8>{}) : with_slice(zero, PaddedRank<16>{});
  };
  return dtype == DType::kBFloat16 ? with_narrow_rank(bf16{}) : with_narrow_rank(fp16{});
}

// --- what cluster_fwd.cu and cluster_bwd.cu offer to reflect.cu ---

Status plan_cluster_fwd(const ReflectFwdParams& params, ClusterPlan& plan);
Status cluster_fwd(const ReflectFwdParams& params, const ClusterPlan& plan, void* stream);
Status plan_cluster_bwd(const ReflectBwdParams& params, ClusterPlan& plan);
int64_t cluster_bwd_workspace_bytes(const ReflectBwdParams& params, const ClusterPlan& plan);
Status cluster_bwd(const ReflectBwdParams& params, const ClusterPlan& plan, void* workspace, void* stream);

}  // namespace hra::cuda
