// The whole native interface: plain structs in, nothing of Python or PyTorch.
//
//   wy_factor   u (D, R)            ->  v (R, D), t (R, R)   with   H_1 ... H_R = I - vᵀ t v
//   reflect     x (M, D), v, t      ->  y = x - (x vᵀ) m v,  m = transpose ? tᵀ : t
//   weight_side_bwd   the gradients of v and t when W Q stands in for W in y = x Wᵀ, from x and its gradient dx
//
// hra_kernels/reference.py is the specification of each, line by line. Strides count elements. `u`, `v`, `t`, `p`,
// `dv` and `dt` are contiguous, float64 when `dtype` is float64 and float32 otherwise. Rows of x, y and their gradients
// are contiguous along D and may be apart by any stride along M. Pointers are checked by the bindings, not here.
#pragma once

#include <cstdint>

namespace hra {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

constexpr int64_t kMaxRank = 256;

struct ReflectFwdParams {
  void* y_ptr;        // (M, D)
  void* p_ptr;        // (M, R) x vᵀ, or null when no gradient will want it
  const void* x_ptr;  // (M, D)
  const void* v_ptr;  // (R, D)
  const void* t_ptr;  // (R, R)
  int64_t M, D, R;
  int64_t stride_ym, stride_xm;
  DType dtype;  // of x and y
  bool transpose;
};

struct ReflectBwdParams {
  void* dx_ptr;        // (M, D), or null
  void* dv_ptr;        // (R, D), or null; x_ptr is read for it alone
  void* dt_ptr;        // (R, R), or null; p_ptr is read for it and for dv
  const void* dy_ptr;  // (M, D)
  const void* x_ptr;   // (M, D)
  const void* v_ptr;   // (R, D)
  const void* t_ptr;   // (R, R)
  const void* p_ptr;   // (M, R)
  int64_t M, D, R;
  int64_t stride_dxm, stride_dym, stride_xm;
  DType dtype;  // of x, dy and dx
  bool transpose;
};

struct WeightSideBwdParams {
  void* dv_ptr;        // (R, D)
  void* dt_ptr;        // (R, R)
  const void* dx_ptr;  // (M, D)
  const void* x_ptr;   // (M, D)
  const void* v_ptr;   // (R, D)
  const void* t_ptr;   // (R, R)
  int64_t M, D, R;
  int64_t stride_dxm, stride_xm;
  DType dtype;  // of x and dx
};

struct WyFactorFwdParams {
  void* v_ptr;        // (R, D)
  void* t_ptr;        // (R, R)
  const void* u_ptr;  // (D, R)
  int64_t D, R;
  DType dtype;  // of u
  bool apply_gs;
};

struct WyFactorBwdParams {
  void* du_ptr;        // (D, R), contiguous, u's dtype
  const void* dv_ptr;  // (R, D)
  const void* dt_ptr;  // (R, R)
  const void* u_ptr;   // (D, R)
  const void* v_ptr;   // (R, D)
  const void* t_ptr;   // (R, R)
  int64_t D, R;
  DType dtype;  // of u and du
  bool apply_gs;
};

namespace cpu {

void reflect_fwd(const ReflectFwdParams& params, int num_threads);
void reflect_bwd(const ReflectBwdParams& params, int num_threads);
void weight_side_bwd(const WeightSideBwdParams& params, int num_threads);
void wy_factor_fwd(const WyFactorFwdParams& params, int num_threads);
void wy_factor_bwd(const WyFactorBwdParams& params, int num_threads);

// The instruction set in use: at first the widest that this processor has.
const char* isa();
// Those that this build has and this processor runs, widest first; `count` of them.
const char* const* available_isas(int* count);
// Uses another one from now on; false if it is not available. For tests.
bool set_isa(const char* name);

// "openmp" where the process has an OpenMP runtime (torch's), else "std::thread".
const char* thread_pool();

}  // namespace cpu

// Reflections on NVIDIA GPUs of compute capability 9.0, for bfloat16 and float16 x and up to 16 vectors; pointers are
// device pointers. A cluster of thread blocks holds whole rows on chip, and each block a slice of their columns. Each
// call launches on `stream` (a cudaStream_t) of the current device and returns at once; nothing is allocated.
namespace cuda {

constexpr int64_t kMaxRank = 16, kLargestCluster = 16;

// 0, or what describe() puts into words.
using Status = int;
const char* describe(Status status);

// How rows are shared out. D is at most kLargestCluster slices.
struct Clusters {
  int64_t slice;  // columns of a block: 512, 1024 or, in the forward, 2048
  int64_t count;  // clusters that share out the rows: any number is right, and those that run at once are fastest
};

// How many clusters of this slice run at once on the current device; 0: it forms none of this size. Takes the driver
// microseconds: ask once for each device, kernel and D.
Status resident_clusters(bool backward, int64_t D, int64_t R, DType dtype, int64_t slice, int64_t& count);

Status reflect_fwd(const ReflectFwdParams& params, const Clusters& clusters, void* stream);
// dx, dv and dt, none of them null: dx alone is the forward of dy with the other `transpose`. `workspace`: as many
// bytes as asked for, 16-byte aligned, free for other use once the stream has passed.
int64_t reflect_bwd_workspace_bytes(int64_t M, int64_t D, int64_t R, const Clusters& clusters);
Status reflect_bwd(const ReflectBwdParams& params, const Clusters& clusters, void* workspace, void* stream);

}  // namespace cuda
}  // namespace hra
