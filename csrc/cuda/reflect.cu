// Which kernels serve a reflection: clusters of the slice that the caller asks for, where plan_cluster() in cluster.h
// finds that they can run (sm_90, 16 bits, R <= 16, at most 16 blocks), else the sweeps.
#include "cluster.h"
#include "sweep.h"

namespace hra::cuda {

Status reflect_fwd(const ReflectFwdParams& params, void* stream) {
  if (params.M == 0) return 0;
  ClusterPlan plan;
  if (Status status = plan_cluster_fwd(params, plan)) return status;
  return plan.clusters > 0 ? cluster_fwd(params, plan, stream) : sweep_fwd(params, stream);
}

Status reflect_bwd_workspace_bytes(const ReflectBwdParams& params, int64_t& bytes) {
  ClusterPlan plan;
  if (Status status = plan_cluster_bwd(params, plan)) return status;
  bytes = cluster_bwd_workspace_bytes(params, plan);
  return plan.clusters > 0 ? 0 : sweep_bwd_workspace_bytes(params, bytes);
}

Status reflect_bwd(const ReflectBwdParams& params, void* workspace, void* stream) {
  if (!params.dt_ptr) {
    return reflect_fwd({params.dx_ptr, nullptr, params.dy_ptr, params.v_ptr, params.t_ptr, params.M, params.D, params.R,
                        params.stride_dxm, params.stride_dym, params.dtype, !params.transpose, params.slice},
                       stream);
  }
  ClusterPlan plan;
  if (Status status = plan_cluster_bwd(params, plan)) return status;
  return plan.clusters > 0 ? cluster_bwd(params, plan, workspace, stream) : sweep_bwd(params, workspace, stream);
}

}  // namespace hra::cuda
