// Backward, on any GPU from sm_80 on, in three launches:
//
//   project   q = dy vᵀ,  s = p m,  qm = q mᵀ  to the workspace, and each block's share of  dm = -pᵀ q
//   apply     dx = dy - qm v,  and each block's share of  dv = -(sᵀ dy + qmᵀ x)
//   reduce    the shares in a fixed order: results repeat bit for bit
//
// A block of `apply` owns a group of columns and walks down the rows, so that v is split once, the sums for dv stay in
// registers, and x and dy are read with no hope placed in the cache: dy twice, x once, dx written once. Shares of dv
// cost 8 R / (6 rows per block) of the traffic of x, dy and dx in 16 bits; `row_tiles_per_block` keeps that below 5%
// for R = 8 wherever M is large.
#include "reflect_bwd.h"
#include "sweep.h"

namespace hra::cuda {
namespace {

template <typename T>
struct ProjectArguments {
  float* s;   // (ceil(M / 32) * 32, kRank)
  float* qm;  // (ceil(M / 32) * 32, kRank)
  float* dm;  // (ceil(M / 32), R, R), sign not yet changed
  Rows<const T> dy;
  Rows<const float> v;
  const float* p;  // (M, R)
  Middle m;
};

template <typename T, int kRank>
__global__ void __launch_bounds__(kThreads, 1)
    sweep_bwd_project_kernel(const HRA_GRID_CONSTANT ProjectArguments<T> to) {
  using Shared = Sweep<T, kRank>;
  static_assert(sizeof(Shared) <= kSharedEverywhere, "fits on every GPU that is served");
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * Shared::kRows;
  const int R = to.m.R;
  shared.project_rows(to.dy, to.v, row0);
  auto& q = shared.p[0];
  auto& p = shared.p[1];
  for (int i = thread_id(); i < Shared::kRows * kRank; i += kThreads) {
    const int row = i / kRank, column = i % kRank;
    p[row][column] = row0 + row < to.dy.rows && column < R ? to.p[(row0 + row) * R + column] : 0.0f;
  }
  __syncthreads();
  const Middle transposed = {to.m.t, R, !to.m.transpose};
  for (int i = thread_id(); i < Shared::kRows * kRank; i += kThreads) {
    const int row = i / kRank, column = i % kRank;
    to.s[row0 * kRank + i] = times_middle(p[row], to.m, column);
    to.qm[row0 * kRank + i] = times_middle(q[row], transposed, column);
  }
  float* dm = to.dm + static_cast<int64_t>(blockIdx.x) * R * R;
  for (int i = thread_id(); i < R * R; i += kThreads) {
    float sum = 0;
    for (int row = 0; row < Shared::kRows; ++row) sum += p[row][i / R] * q[row][i % R];
    dm[i] = sum;
  }
}

template <typename T>
struct ApplyArguments {
  Rows<T> dx;  // dx.ptr may be null
  float* dv;   // (splits, R, D), sign not yet changed
  Rows<const T> dy, x;
  Rows<const float> v;
  const float *s, *qm;
  int64_t row_tiles_per_block;
};

template <typename T, int kRank>
struct ApplyShared {
  static constexpr int kRows = Sweep<T, kRank>::kRows;
  static constexpr int kColumns = Sweep<T, kRank>::kColumns;
  static constexpr int kWarpColumns = kColumns / kWarps;
  RowTile<T, kRows, kColumns> dy[2], x[2];
  TermTile<Split<T>::kV, kRank, kColumns> v;
  TermTile<Split<T>::kV, kRows, kRank> s, qm;
};

// A (32, kRank) block of s or qm on its way from the workspace to terms in shared memory.
template <int kRank>
struct CoefficientsInFlight {
  static constexpr int kEach = 32 * kRank / 2 / kThreads;
  float2 values[kEach];

  __device__ __forceinline__ void fetch(const float* from) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = reinterpret_cast<const float2*>(from)[i * kThreads + thread_id()];
  }
  template <int kTerms>
  __device__ __forceinline__ void put(TermTile<kTerms, 32, kRank>& tile) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int index = i * kThreads + thread_id();
      tile.put(index / (kRank / 2), index % (kRank / 2) * 2, values[i].x, values[i].y);
    }
  }
};

template <typename T, int kRank>
__global__ void __launch_bounds__(kThreads, 1) sweep_bwd_apply_kernel(const HRA_GRID_CONSTANT ApplyArguments<T> to) {
  using Shared = ApplyShared<T, kRank>;
  static_assert(sizeof(Shared) <= kSharedEverywhere, "fits on every GPU that is served");
  constexpr int kRows = Shared::kRows, kTiles = Shared::kWarpColumns / 8;
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * Shared::kColumns;
  const int column = warp_id() * Shared::kWarpColumns;
  const int64_t first = blockIdx.y * to.row_tiles_per_block;
  const int64_t all = ceil_div(to.dy.rows, kRows);
  const int64_t end = first + to.row_tiles_per_block < all ? first + to.row_tiles_per_block : all;

  load_tile(shared.dy[0], to.dy, first * kRows, column0);
  load_tile(shared.x[0], to.x, first * kRows, column0);
  cp_async_commit();
  {
    VectorsInFlight<kRank, Shared::kColumns> flight;
    flight.fetch(to.v, column0);
    flight.put(shared.v);
  }
  CoefficientsInFlight<kRank> s_flight, qm_flight;
  s_flight.fetch(to.s + first * kRows * kRank);
  qm_flight.fetch(to.qm + first * kRows * kRank);
  float dv[kTiles][kRank / 16][4] = {};
  for (int64_t tile = first; tile < end; ++tile) {
    const int stage = static_cast<int>((tile - first) % 2);
    s_flight.put(shared.s);
    qm_flight.put(shared.qm);
    if (tile + 1 < end) {
      load_tile(shared.dy[stage ^ 1], to.dy, (tile + 1) * kRows, column0);
      load_tile(shared.x[stage ^ 1], to.x, (tile + 1) * kRows, column0);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    if (tile + 1 < end) {
      s_flight.fetch(to.s + (tile + 1) * kRows * kRank);
      qm_flight.fetch(to.qm + (tile + 1) * kRows * kRank);
    }
    auto& dy = shared.dy[stage];
    accumulate_both<kRank>(dv, dy, shared.s, shared.x[stage], shared.qm, column);
    sync_warp();  // dx takes dy's place, and other lanes have read it
    if (to.dx.ptr) {
#pragma unroll
      for (int row = 0; row < kRows; row += 16) {
        Coefficients<T, kRank> qm;
        qm.load(shared.qm, row);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) reflect_tile(dy, qm, shared.v, row, column + 8 * n);
      }
      sync_warp();
      store_warp_tile<kRows, Shared::kWarpColumns>(to.dx, dy, 0, column, tile * kRows, column0 + column);
    }
    __syncthreads();
  }
  store_vector_share(to.dv + static_cast<int64_t>(blockIdx.y) * to.v.rows * to.v.columns, to.v.rows, to.v.columns, dv,
                     column0 + column);
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

struct Plan {
  int64_t row_tiles, row_tiles_per_block, splits;
  int64_t s, qm, dm_parts, dv_parts, floats;  // offsets into the workspace and its size, in floats
};

Plan plan_of(const ReflectBwdParams& params, int rank, int columns, int multiprocessors) {
  constexpr int64_t kLeastTiles = 4, kBlocksPerMultiprocessor = 4;
  Plan plan;
  plan.row_tiles = ceil_div(params.M, 32);
  const int64_t column_blocks = params.D > 0 ? ceil_div(params.D, columns) : 1;
  const int64_t wanted = ceil_div(kBlocksPerMultiprocessor * multiprocessors, column_blocks);
  plan.row_tiles_per_block = ceil_div(plan.row_tiles, wanted);
  if (plan.row_tiles_per_block < kLeastTiles) plan.row_tiles_per_block = kLeastTiles;
  plan.splits = ceil_div(plan.row_tiles, plan.row_tiles_per_block);
  plan.s = 0;
  plan.qm = plan.s + plan.row_tiles * 32 * rank;
  plan.dm_parts = plan.qm + plan.row_tiles * 32 * rank;
  plan.dv_parts = plan.dm_parts + plan.row_tiles * params.R * params.R;
  plan.floats = plan.dv_parts + plan.splits * params.R * params.D;
  return plan;
}

}  // namespace

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
  return launch(reduce_kernel, Launch{blocks, 1, kThreads, kThreads * sizeof(float), stream}, arguments);
}

Status sweep_bwd_workspace_bytes(const ReflectBwdParams& params, int64_t& bytes) {
  Device gpu;
  if (Status status = current_device(gpu)) return status;
  return with_dtype(params.dtype, [&](auto zero) {
    return with_rank<decltype(zero)>(params.R, [&](auto rank) {
      constexpr int kRank = decltype(rank)::value;
      bytes = 4 * plan_of(params, kRank, Sweep<decltype(zero), kRank>::kColumns, gpu.multiprocessors).floats;
      return Status{0};
    });
  });
}

Status sweep_bwd(const ReflectBwdParams& params, void* workspace, void* stream) {
  Device gpu;
  if (Status status = current_device(gpu)) return status;
  return with_dtype(params.dtype, [&](auto zero) {
    return with_rank<decltype(zero)>(params.R, [&](auto rank) -> Status {
      using T = decltype(zero);
      constexpr int kRank = decltype(rank)::value;
      using Shared = ApplyShared<T, kRank>;
      const Plan plan = plan_of(params, kRank, Shared::kColumns, gpu.multiprocessors);
      auto* floats = static_cast<float*>(workspace);

      if (plan.row_tiles > 0) {
        ProjectArguments<T> project;
        project.s = floats + plan.s;
        project.qm = floats + plan.qm;
        project.dm = floats + plan.dm_parts;
        project.dy = rows_of<const T>(params.dy_ptr, params.M, params.D, params.stride_dym);
        project.v = rows_of<const float>(params.v_ptr, params.R, params.D, params.D);
        project.p = static_cast<const float*>(params.p_ptr);
        project.m = {static_cast<const float*>(params.t_ptr), static_cast<int>(params.R), params.transpose};
        Launch how{plan.row_tiles, 1, kThreads, sizeof(Sweep<T, kRank>), stream};
        if (Status status = launch(sweep_bwd_project_kernel<T, kRank>, how, project)) return status;

        ApplyArguments<T> apply;
        apply.dx = rows_of<T>(params.dx_ptr, params.M, params.D, params.stride_dxm);
        apply.dv = floats + plan.dv_parts;
        apply.dy = project.dy;
        apply.x = rows_of<const T>(params.x_ptr, params.M, params.D, params.stride_xm);
        apply.v = project.v;
        apply.s = project.s;
        apply.qm = project.qm;
        apply.row_tiles_per_block = plan.row_tiles_per_block;
        how = {ceil_div(params.D, Shared::kColumns), plan.splits, kThreads, sizeof(Shared), stream};
        if (params.D > 0) {
          if (Status status = launch(sweep_bwd_apply_kernel<T, kRank>, how, apply)) return status;
        }
      }
      if (params.R == 0) return 0;
      return reduce_shares(params, floats + plan.dv_parts, plan.splits, floats + plan.dm_parts, plan.row_tiles, stream);
    });
  });
}

}  // namespace hra::cuda
