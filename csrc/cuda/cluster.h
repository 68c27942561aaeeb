// A reflection in one pass over memory: a cluster of thread blocks holds whole rows on chip.
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
#include "launch.h"

namespace hra::cuda {

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int kRank, int kSlice>
struct ClusterShared {
  static constexpr int kWarpColumns = kSlice / kWarps, kTiles = kRank / 8, kParts = 32 * kTiles;

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

// A (rows, columns) matrix of the host's untyped pointers; its rows move 16 bytes at a time only if they end there.
template <typename T, typename Void>
Rows<T> rows_of(Void* ptr, int64_t rows, int64_t columns, int64_t stride) {
  const bool vectors =
      reinterpret_cast<uintptr_t>(ptr) % 16 == 0 && stride % kVector<T> == 0 && columns % kVector<T> == 0;
  return {static_cast<T*>(ptr), rows, columns, stride, vectors};
}

// A number as a type.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// visit(T{}, padded rank as a type, slice as a type) for the instantiation of `Pass` that serves a problem.
template <typename Pass, typename Visitor>
Status with_kernel(DType dtype, int64_t R, int64_t slice, Visitor visit) {
  auto with_slice = [&](auto zero, auto rank) -> Status {
    if constexpr (Pass::kWidestSlice >= 2048) {
      if (slice == 2048) return visit(zero, rank, Constant<2048>{});
    }
    return slice == 512 ? visit(zero, rank, Constant<512>{}) : visit(zero, rank, Constant<1024>{});
  };
  auto with_rank = [&](auto zero) {
    return R <= 8 ? with_slice(zero, Constant<8>{}) : with_slice(zero, Constant<16>{});
  };
  return dtype == DType::kBFloat16 ? with_rank(bf16{}) : with_rank(fp16{});
}

inline int cluster_size(int64_t D, int64_t slice) { return D > slice ? static_cast<int>(ceil_div(D, slice)) : 1; }

template <typename Shared>
Launch cluster_launch(int64_t clusters, int cluster, void* stream) {
  const auto bytes = static_cast<int64_t>(sizeof(Shared)) + Shared::exchange_bytes(cluster);
  return {clusters * cluster, kThreads, bytes, stream, cluster};
}

template <typename Pass>
Status count_resident_of(int64_t D, int64_t R, DType dtype, int64_t slice, int64_t& count) {
  return with_kernel<Pass>(dtype, R, slice, [&](auto zero, auto rank, auto slice_type) {
    using T = decltype(zero);
    constexpr int kRank = decltype(rank)::value, kSlice = decltype(slice_type)::value;
    using Shared = typename Pass::template Shared<T, kRank, kSlice>;
    const Launch how = cluster_launch<Shared>(1, cluster_size(D, kSlice), nullptr);
    return count_resident(Pass::template kernel<T, kRank, kSlice>(), how, count);
  });
}

// No more clusters than there are tiles of rows.
inline int64_t busy_clusters(int64_t M, const Clusters& clusters) {
  const int64_t tiles = ceil_div(M, kRowsOfWarp);
  return tiles < clusters.count ? tiles : clusters.count;
}

// `arguments_of(T{}, blocks of a cluster)` are the kernel's; M is not 0.
template <typename Pass, typename Params, typename Fill>
Status launch_clusters(const Params& params, const Clusters& clusters, void* stream, Fill arguments_of) {
  return with_kernel<Pass>(params.dtype, params.R, clusters.slice, [&](auto zero, auto rank, auto slice) {
    using T = decltype(zero);
    constexpr int kRank = decltype(rank)::value, kSlice = decltype(slice)::value;
    using Shared = typename Pass::template Shared<T, kRank, kSlice>;
    const int cluster = cluster_size(params.D, kSlice);
    return launch(Pass::template kernel<T, kRank, kSlice>(),
                  cluster_launch<Shared>(busy_clusters(params.M, clusters), cluster, stream),
                  arguments_of(zero, cluster));
  });
}

// The forward's part of resident_clusters().
Status resident_clusters_fwd(int64_t D, int64_t R, DType dtype, int64_t slice, int64_t& count);

}  // namespace hra::cuda
