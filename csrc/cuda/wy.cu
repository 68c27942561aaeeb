// The factor of many layers in one launch, one block per layer, and its gradient.
//
//   forward    u (D, R) -> v (R, D), t (R, R): scales, v, Gram matrix of v, t in shared memory
//   backward   dv, dt, u, v, t -> du (D, R)
//
// A layer reads u three times and v R / 4 + 1 times over, from L2 after the first; the latency of those reads binds for
// R <= 16, D R² / 2 float64 multiply-adds beyond. It runs once per optimizer step, for all layers side by side.
#include "wy_device.h"

namespace hra::cuda {
namespace {

constexpr int kLayersPerLaunch = 32;  // their descriptions travel as kernel arguments, 4 KiB in all

struct FactorLayer {
  float* v;
  float* t;
  Columns u;
  int64_t D;
  int R;
  bool apply_gs;
};

struct GradientLayer {
  void* du;  // (D, R), u's dtype
  const float *dv, *dt, *v, *t;
  Columns u;
  int64_t D;
  int R;
  bool apply_gs;
};

template <typename Layer>
struct Group {
  Layer layers[kLayersPerLaunch];
};

// An (R, R) float64 matrix in dynamic shared memory, after the fixed part.
__device__ __forceinline__ double* matrix(int index, int R) {
  constexpr int kOffset = (sizeof(WyShared) + 15) / 16 * 16;
  return reinterpret_cast<double*>(dynamic_shared() + kOffset) + static_cast<int64_t>(index) * R * R;
}

int64_t shared_bytes(int64_t R, int matrices) {
  return static_cast<int64_t>(sizeof(WyShared) + 15) / 16 * 16 + matrices * 8 * R * R;
}

__global__ void __launch_bounds__(kThreads) wy_factor_fwd_kernel(const HRA_GRID_CONSTANT Group<FactorLayer> group) {
  const FactorLayer& layer = group.layers[blockIdx.x];
  auto& shared = *reinterpret_cast<WyShared*>(dynamic_shared());
  const int R = layer.R;
  const int64_t D = layer.D;
  float* v = layer.v;
  double *g = matrix(0, R), *t = matrix(1, R);
  find_scales(shared, layer.u, D, R, !layer.apply_gs);
  for (int r = 0; r < R; ++r) {
    const bool difference = !layer.apply_gs && r % 2 == 1;
    const double scale = difference ? power_of_two(-shared.log_phi[r / 2]) : 1;
    for (int64_t d = thread_id(); d < D; d += kThreads) {
      const float row =
          difference ? static_cast<float>(shared.second(layer.u, d, r / 2) * scale) : shared.hat(layer.u, d, r);
      v[r * D + d] = row;
    }
  }
  // every thread reads back only the columns d that it wrote
  auto row = [&](int r, int64_t d) { return v[r * D + d]; };
  gram(g, shared, D, R, true, row, row);
  if (!layer.apply_gs) {
    chain_triangle(t, shared, g, R);
    for (int i = thread_id(); i < R * R; i += kThreads) layer.t[i] = static_cast<float>(t[i]);
    return;
  }
  double* inverse = t;
  gram_schmidt(inverse, shared, g, &shared.sums[0][0][0], R);
  for (int64_t d = thread_id(); d < D; d += kThreads) {
    for (int r = R - 1; r >= 0; --r) {  // downwards: row r needs the rows up to r as they were
      double sum = 0;
      for (int k = 0; k <= r; ++k) sum += inverse[r * R + k] * v[k * D + d];
      v[r * D + d] = static_cast<float>(sum);
    }
  }
  for (int i = thread_id(); i < R * R; i += kThreads) {
    layer.t[i] = i / R == i % R && shared.kept[i / R] ? 2.0f : 0.0f;
  }
}

// out = sign * op(a) op(b) for (R, R) matrices, op the transpose where asked; ends with a barrier.
__device__ __forceinline__ void multiply(double* out, const double* a, bool a_transposed, const double* b,
                                         bool b_transposed, double sign, int R) {
  for (int i = thread_id(); i < R * R; i += kThreads) {
    const int row = i / R, column = i % R;
    double sum = 0;
    for (int k = 0; k < R; ++k) {
      sum += a[a_transposed ? k * R + row : row * R + k] * b[b_transposed ? column * R + k : k * R + column];
    }
    out[i] = sign * sum;
  }
  __syncthreads();
}

// s (R, R) with dû before the pairs are taken apart = dv + s v.
__device__ __forceinline__ const double* chain_gradient(const GradientLayer& layer, const WyShared& shared) {
  const int R = layer.R;
  double *t = matrix(0, R), *dt = matrix(1, R), *work = matrix(2, R);
  for (int i = thread_id(); i < R * R; i += kThreads) {
    t[i] = layer.t[i];
    dt[i] = layer.dt[i];
  }
  __syncthreads();
  multiply(work, t, true, dt, false, -1, R);
  double* ds = dt;
  multiply(ds, work, false, t, true, 1, R);
  double* sum = t;  // dg + dgᵀ, of which ds gives the triangle on and above the diagonal
  for (int i = thread_id(); i < R * R; i += kThreads) {
    const int row = i / R, column = i % R;
    double value = row < column ? ds[row * R + column] : ds[column * R + row];
    if (row == column && row % 2 == 0 && row + 1 < R && shared.has_both(row / 2)) {
      const double phi = power_of_two(shared.log_phi[row / 2]);
      value += (ds[row * R + row + 1] - ds[(row + 1) * R + row]) / phi;
    }
    sum[i] = value;
  }
  __syncthreads();
  return sum;
}

// dû = w dv + s v for Gram-Schmidt: w = l⁻ᵀ is returned as l⁻¹, s through the argument.
__device__ __forceinline__ const double* gram_schmidt_gradient(const GradientLayer& layer, WyShared& shared,
                                                               const double** s) {
  const int R = layer.R;
  const int64_t D = layer.D;
  double *g = matrix(0, R), *inverse = matrix(1, R), *k = matrix(2, R);
  auto hat = [&](int r, int64_t d) { return shared.hat(layer.u, d, r); };
  gram(g, shared, D, R, true, hat, hat);
  gram_schmidt(inverse, shared, g, &shared.sums[0][0][0], R);
  gram(
      k, shared, D, R, false, [&](int r, int64_t d) { return layer.dv[r * D + d]; },
      [&](int r, int64_t d) { return layer.v[r * D + d]; });
  // tril(k) + tril(k, -1)ᵀ: the lower triangle, mirrored
  for (int i = thread_id(); i < R * R; i += kThreads) {
    const int row = i / R, column = i % R;
    if (row < column) k[i] = k[column * R + row];
  }
  __syncthreads();
  multiply(g, inverse, true, k, false, -1, R);
  *s = g;
  return inverse;
}

__device__ __forceinline__ void store_gradient(const GradientLayer& layer, const WyShared& shared, int64_t d, int r,
                                               double dhat) {
  const float value = shared.nonzero[r] ? static_cast<float>(dhat * power_of_two(-shared.exponent[r])) : 0.0f;
  const int64_t i = d * layer.R + r;
  if (layer.u.dtype == DType::kBFloat16) {
    static_cast<bf16*>(layer.du)[i].bits = static_cast<uint16_t>(pack_bf16(value, 0));
  } else if (layer.u.dtype == DType::kFloat16) {
    static_cast<fp16*>(layer.du)[i].bits = static_cast<uint16_t>(pack_fp16(value, 0));
  } else {
    static_cast<float*>(layer.du)[i] = value;
  }
}

__global__ void __launch_bounds__(kThreads) wy_factor_bwd_kernel(const HRA_GRID_CONSTANT Group<GradientLayer> group) {
  const GradientLayer& layer = group.layers[blockIdx.x];
  auto& shared = *reinterpret_cast<WyShared*>(dynamic_shared());
  const int R = layer.R;
  const int64_t D = layer.D;
  find_scales(shared, layer.u, D, R, !layer.apply_gs);
  const double *inverse = nullptr, *s = nullptr;
  if (layer.apply_gs) {
    inverse = gram_schmidt_gradient(layer, shared, &s);
  } else {
    s = chain_gradient(layer, shared);
  }
  for (int64_t d = thread_id(); d < D; d += kThreads) {
    for (int r = 0; r < R; r += 2) {
      const bool has_second = r + 1 < R;
      const int next = has_second ? r + 1 : r;
      double first = inverse ? 0 : layer.dv[r * D + d], second = inverse ? 0 : layer.dv[next * D + d];
      for (int k = 0; k < R; ++k) {
        const double v = layer.v[k * D + d];
        first += s[r * R + k] * v;
        second += s[next * R + k] * v;
        if (inverse) {
          const double dv = layer.dv[k * D + d];
          first += inverse[k * R + r] * dv;
          second += inverse[k * R + next] * dv;
        }
      }
      if (!inverse && has_second) {
        second *= power_of_two(-shared.log_phi[r / 2]);
        if (shared.has_both(r / 2)) first -= second;
      }
      store_gradient(layer, shared, d, r, first);
      if (has_second) store_gradient(layer, shared, d, r + 1, second);
    }
  }
}

// Launches groups of layers; `fill` sets what forward and backward do not share.
template <typename Layer, typename Params, typename Fill>
Status launch_groups(void (*kernel)(Group<Layer>), const Params* layers, int64_t count, int matrices, void* stream,
                     Fill fill) {
  for (int64_t first = 0; first < count; first += kLayersPerLaunch) {
    const int64_t here = count - first < kLayersPerLaunch ? count - first : kLayersPerLaunch;
    Group<Layer> group = {};
    int64_t rank = 0;
    for (int64_t i = 0; i < here; ++i) {
      const Params& params = layers[first + i];
      Layer& layer = group.layers[i];
      layer.u = {params.u_ptr, params.dtype, params.stride_ud, params.stride_ur};
      layer.D = params.D;
      layer.R = static_cast<int>(params.R);
      layer.apply_gs = params.apply_gs;
      fill(layer, params);
      if (params.R > rank) rank = params.R;
    }
    const Launch how{here, 1, kThreads, shared_bytes(rank, matrices), stream};
    if (Status status = launch(kernel, how, group)) return status;
  }
  return 0;
}

}  // namespace

Status wy_factor_fwd(const WyFactorFwdParams* layers, int64_t count, void* stream) {
  return launch_groups<FactorLayer>(wy_factor_fwd_kernel, layers, count, 2, stream,
                                    [](FactorLayer& layer, const WyFactorFwdParams& params) {
                                      layer.v = static_cast<float*>(params.v_ptr);
                                      layer.t = static_cast<float*>(params.t_ptr);
                                    });
}

Status wy_factor_bwd(const WyFactorBwdParams* layers, int64_t count, void* stream) {
  return launch_groups<GradientLayer>(wy_factor_bwd_kernel, layers, count, 3, stream,
                                      [](GradientLayer& layer, const WyFactorBwdParams& params) {
                                        layer.du = params.du_ptr;
                                        layer.dv = static_cast<const float*>(params.dv_ptr);
                                        layer.dt = static_cast<const float*>(params.dt_ptr);
                                        layer.v = static_cast<const float*>(params.v_ptr);
                                        layer.t = static_cast<const float*>(params.t_ptr);
                                      });
}

}  // namespace hra::cuda
