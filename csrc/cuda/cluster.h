// The single-pass path, for sm_90 and newer: a cluster of thread blocks holds whole rows on chip.
//
// Block `rank` of a cluster owns kSlice columns: its part of v lies in shared memory as bfloat16 terms for as long as
// the block lives, and tiles of 16 rows pass through registers, each warp's own columns of them (fragments.h). For each
// tile the blocks compute their parts of x vᵀ, send them into every block's shared memory (distributed shared memory)
// and add up in the order of the ranks: all warps of all blocks hold the same bits, and every element of x, y (dy, x,
// dx) crosses device memory once.
//
// Blocks meet by messages: each has two mailboxes and two copies of the arriving parts, for even and odd tiles. A copy
// is filled again for tile i + 2 only by a block that has all parts of tile i + 1, and a block sends its own part of
// that when all its warps have read tile i's.
#pragma once

#include "fragments.h"

#if defined(HRA_EMULATION) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define HRA_HAS_CLUSTERS
#endif

namespace hra::cuda {

// Which cluster serves a problem. `clusters` 0: none does, and the sweeps take it.
struct ClusterPlan {
  int slice = 0, cluster = 0;
  int64_t clusters = 0;  // that are launched; each takes tiles until none is left
};

template <typename T, int kRank, int kSlice>
struct ClusterShared {
  static constexpr int kWarpColumns = kSlice / kWarps, kTiles = kRank / 8, kParts = 32 * kTiles;
  static_assert(Split<T>::kV == 2, "16-bit activations");

  TermTile<2, kRank, kSlice> v;  // columns in the order of fragment_column
  MiddleTile m;
  float4 parts[2][kWarps][kParts];  // of even and odd tiles: slow warps still read the last one's
  alignas(16) Mailbox mailboxes[2];

  // Behind this struct: the parts of all blocks, (2, cluster, kParts) as lanes hold them.
  static constexpr int64_t exchange_bytes(int64_t cluster) { return 2 * cluster * kParts * int64_t{sizeof(float4)}; }

  static __device__ __forceinline__ int warp_column() { return warp_id() * kWarpColumns; }

  // v's slice; the caller's next barrier makes it visible.
  __device__ __forceinline__ void load_vectors(const Rows<const float>& vectors, int column0) {
    constexpr int kInFlight = 8 * 4 * kThreads / kRank;  // 8 loads of 16 bytes a thread
    constexpr int kPiece = kSlice < kInFlight ? kSlice : kInFlight;
    for (int column = 0; column < kSlice; column += kPiece) {
      VectorsInFlight<kRank, kPiece> flight;
      flight.fetch(vectors, column0 + column);
      flight.put(v, [&](int at) { return fragment_column(column + at); });
    }
  }

  // Before the cluster's first meeting.
  __device__ __forceinline__ void open_mailboxes() {
    if (thread_id() < 2) mailbox_init(&mailboxes[thread_id()]);
  }

  // The whole product of tile `turn` (0, 1, ...) from the parts of all warps of all blocks.
  __device__ __forceinline__ void exchange(Result<kRank>& product, float4* slots, int turn, unsigned rank,
                                           int cluster) {
    const int lane = lane_id(), copy = turn % 2;
    Mailbox* mailbox = &mailboxes[copy];
    float4* arriving = slots + copy * cluster * kParts + lane;
    auto& summands = parts[copy];
    if (thread_id() == 0) mailbox_expect(mailbox, cluster * kParts * static_cast<int>(sizeof(float4)));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      summands[warp_id()][32 * n + lane] = {product[n][0], product[n][1], product[n][2], product[n][3]};
    }
    __syncthreads();
    const int n = warp_id() % kTiles;  // a warp adds up one tile, for every (kWarps / kTiles)-th block
    if (warp_id() / kTiles < cluster) {
      float4 total = summands[0][32 * n + lane];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) add(total, summands[warp][32 * n + lane]);
#pragma unroll 1
      for (int to = warp_id() / kTiles; to < cluster; to += kWarps / kTiles) {
        send_in_cluster(arriving + rank * kParts + 32 * n, mailbox, to, total);
      }
    }
    mailbox_wait(mailbox, turn / 2 % 2);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float4 total = arriving[32 * n];
#pragma unroll 4
      for (int other = 1; other < cluster; ++other) add(total, arriving[other * kParts + 32 * n]);
      product[n][0] = total.x;
      product[n][1] = total.y;
      product[n][2] = total.z;
      product[n][3] = total.w;
    }
  }

 private:
  static __device__ __forceinline__ void add(float4& sum, const float4& term) {
    sum.x += term.x;
    sum.y += term.y;
    sum.z += term.z;
    sum.w += term.w;
  }
};

// --- the host's side ---

// A matrix whose rows move 16 bytes at a time only if they end there.
template <typename T, typename Void>
Rows<T> cluster_rows(Void* ptr, int64_t rows, int64_t columns, int64_t stride) {
  Rows<T> found = rows_of<T>(ptr, rows, columns, stride);
  found.vectors &= columns % kVector<T> == 0;
  return found;
}

template <int kSlice>
struct Slice {
  static constexpr int value = kSlice;
};

// Calls visit(T{}, padded rank as a type, slice as a type) for the instantiation of `Pass` that serves a problem;
// returns 0 without a call where there is none.
template <typename Pass, typename Visitor>
Status with_cluster_kernel(DType dtype, int64_t R, int64_t slice, Visitor visit) {
  if (dtype == DType::kFloat32 || R == 0 || R > 16) return 0;
  auto with_slice = [&](auto zero, auto rank) -> Status {
    if (slice == 512) return visit(zero, rank, Slice<512>{});
    if (slice == 1024) return visit(zero, rank, Slice<1024>{});
    if constexpr (Pass::kWidestSlice >= 2048) {
      if (slice == 2048) return visit(zero, rank, Slice<2048>{});
    }
    return 0;
  };
  auto with_narrow_rank = [&](auto zero) {
    return R <= 8 ? with_slice(zero, PaddedRank<8>{}) : with_slice(zero, PaddedRank<16>{});
  };
  return dtype == DType::kBFloat16 ? with_narrow_rank(bf16{}) : with_narrow_rank(fp16{});
}

template <typename Pass, typename T, int kRank, int kSlice>
Launch how_to_launch(const ClusterPlan& plan, void* stream) {
  using Shared = typename Pass::template Shared<T, kRank, kSlice>;
  const int64_t bytes = sizeof(Shared) + Shared::exchange_bytes(plan.cluster);
  return {plan.clusters * plan.cluster, 1, kThreads, bytes, stream, plan.cluster};
}

// Whether the slice that the caller wants can run here, and with how many clusters. The answer depends on nothing but
// the sizes and the device, so a workspace sized by one call serves the next.
template <typename Pass, typename Params>
Status plan_cluster(const Params& params, ClusterPlan& plan) {
  constexpr int kLargestCluster = 16;
  plan = {};
  if (params.slice <= 0 || params.M == 0 || params.D == 0) return 0;
  const int64_t cluster = ceil_div(params.D, params.slice);
  if (cluster > kLargestCluster) return 0;
  return with_cluster_kernel<Pass>(
      params.dtype, params.R, params.slice, [&](auto zero, auto rank, auto slice) -> Status {
        constexpr int kRank = decltype(rank)::value, kSlice = decltype(slice)::value;
        Device gpu;
        if (Status status = current_device(gpu)) return status;
        ClusterPlan found;
        found.slice = kSlice;
        found.cluster = static_cast<int>(cluster);
        found.clusters = 1;
        const Launch how = how_to_launch<Pass, decltype(zero), kRank, kSlice>(found, nullptr);
        if (gpu.capability < 90 || how.shared_bytes > gpu.shared_bytes) return 0;
        const auto kernel = Pass::template kernel<decltype(zero), kRank, kSlice>();
        if (Status status = resident_clusters(kernel, how, found.clusters)) return status;
        const int64_t row_tiles = ceil_div(params.M, kRowsOfWarp);
        if (found.clusters > row_tiles) found.clusters = row_tiles;
        plan = found;
        return 0;
      });
}

// Launches the kernel of a plan that has clusters.
template <typename Pass, typename Params, typename Fill>
Status launch_cluster(const Params& params, const ClusterPlan& plan, void* stream, Fill arguments_of) {
  return with_cluster_kernel<Pass>(params.dtype, params.R, plan.slice, [&](auto zero, auto rank, auto slice) {
    using T = decltype(zero);
    constexpr int kRank = decltype(rank)::value, kSlice = decltype(slice)::value;
    return launch(Pass::template kernel<T, kRank, kSlice>(), how_to_launch<Pass, T, kRank, kSlice>(plan, stream),
                  arguments_of(zero));
  });
}

// --- what cluster_fwd.cu and cluster_bwd.cu offer to reflect.cu ---

Status plan_cluster_fwd(const ReflectFwdParams& params, ClusterPlan& plan);
Status cluster_fwd(const ReflectFwdParams& params, const ClusterPlan& plan, void* stream);
Status plan_cluster_bwd(const ReflectBwdParams& params, ClusterPlan& plan);
int64_t cluster_bwd_workspace_bytes(const ReflectBwdParams& params, const ClusterPlan& plan);
Status cluster_bwd(const ReflectBwdParams& params, const ClusterPlan& plan, void* workspace, void* stream);

}  // namespace hra::cuda
