// The steps of the WY factor that run inside one block for one layer: scales, Gram matrices, the R x R algebra.
// hra_kernels/reference.py derives them; everything but u, v and their gradients is float64.
#pragma once

#include "reflect.h"

namespace hra::cuda {

using namespace device;

constexpr int kRankLimit = static_cast<int>(kMaxRank);
constexpr double kDroppedSquare = 1.0 / (1 << 26);  // reference.GS_RTOL squared
// exponent of 2^20 times the smallest normal float32: shorter columns count as zero
constexpr int kLeastExponent = -105;

struct Columns {
  const void* ptr;
  DType dtype;
  int64_t stride_d, stride_r;

  __device__ __forceinline__ float at(int64_t d, int r) const {
    const int64_t i = d * stride_d + r * stride_r;
    if (dtype == DType::kBFloat16) return to_float(static_cast<const bf16*>(ptr)[i]);
    if (dtype == DType::kFloat16) return to_float(static_cast<const fp16*>(ptr)[i]);
    return static_cast<const float*>(ptr)[i];
  }
};

struct WyShared {
  double sums[2][kWarps][16];
  int exponent[kRankLimit];     // 2^-exponent brings the column's norm into [1/2, 1)
  int log_phi[kRankLimit / 2];  // the same for the difference row of a pair
  bool nonzero[kRankLimit];
  bool kept[kRankLimit];  // by Gram-Schmidt

  __device__ __forceinline__ bool has_both(int pair) const { return nonzero[2 * pair] && nonzero[2 * pair + 1]; }
  // column r of û
  __device__ __forceinline__ float hat(const Columns& u, int64_t d, int r) const;
  // what row 2 k + 1 of v is before it is scaled by φ
  __device__ __forceinline__ float second(const Columns& u, int64_t d, int pair) const {
    const float b = hat(u, d, 2 * pair + 1);
    return has_both(pair) ? b - hat(u, d, 2 * pair) : b;
  }
};

__device__ __forceinline__ double power_of_two(int exponent) {
  return double_from_bits(static_cast<int64_t>(exponent + 1023) << 52);
}

__device__ __forceinline__ float WyShared::hat(const Columns& u, int64_t d, int r) const {
  return nonzero[r] ? static_cast<float>(u.at(d, r) * power_of_two(-exponent[r])) : 0.0f;
}

struct NormExponent {
  int exponent;
  bool nonzero;
};

// From the square of a float32 vector's norm, which float64 holds without over- or underflow.
__device__ __forceinline__ NormExponent norm_exponent(double square) {
  const int biased = static_cast<int>(bits_of(square) >> 52 & 0x7ff);
  const int exponent = (biased - 1022 + 1) >> 1;
  const bool finite = biased != 0x7ff, nonzero = !finite || (square != 0 && exponent >= kLeastExponent);
  return {finite && nonzero ? exponent : 0, nonzero};
}

// Sums over the block, the same in every thread, in an order that is always the same. `slot` alternates from call to
// call: one barrier then separates the reads of a slot from its next writes.
template <int kCount>
__device__ __forceinline__ void block_sums(double (&values)[kCount], WyShared& shared, int slot) {
  // halving: at each step a lane hands half of its values to its partner and keeps the sums of the other half
  int mine = 0;
#pragma unroll
  for (int half = kCount / 2, step = 16; half > 0; half /= 2, step /= 2) {
    const bool upper = lane_id() & step;
    mine += upper ? half : 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i < half) {
        const double given = upper ? values[i] : values[half + i];
        values[i] = (upper ? values[half + i] : values[i]) + shuffle_xor(given, step);
      }
    }
  }
#pragma unroll
  for (int step = 16 / kCount; step > 0; step /= 2) values[0] += shuffle_xor(values[0], step);
  if (lane_id() % (32 / kCount) == 0) shared.sums[slot][warp_id()][mine] = values[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) values[i] += shared.sums[slot][warp][i];
  }
}

// Fills exponent and nonzero and, for a chain, log_phi; ends with a barrier.
__device__ __forceinline__ void find_scales(WyShared& shared, const Columns& u, int64_t D, int R, bool in_pairs) {
  for (int r = 0; r < R; r += 2) {
    const bool has_second = r + 1 < R;
    double squares[2] = {};
    for (int64_t d = thread_id(); d < D; d += kThreads) {
      const double a = u.at(d, r), b = has_second ? u.at(d, r + 1) : 0.0f;
      squares[0] += a * a;
      squares[1] += b * b;
    }
    block_sums(squares, shared, r / 2 % 2);
    if (thread_id() < 2 && r + thread_id() < R) {
      const NormExponent norm = norm_exponent(thread_id() == 0 ? squares[0] : squares[1]);
      shared.exponent[r + thread_id()] = norm.exponent;
      shared.nonzero[r + thread_id()] = norm.nonzero;
    }
  }
  __syncthreads();
  if (!in_pairs) return;
  for (int pair = 0; pair < R / 2; ++pair) {
    double square[1] = {};
    for (int64_t d = thread_id(); d < D; d += kThreads) {
      const double b = shared.second(u, d, pair);
      square[0] += b * b;
    }
    block_sums(square, shared, pair % 2);
    if (thread_id() == 0) shared.log_phi[pair] = norm_exponent(square[0]).exponent;
  }
  __syncthreads();
}

// out[i, j] = Σ_d a(i, d) b(j, d) for all i, j < R; only i <= j is summed and mirrored where `symmetric`.
template <typename A, typename B>
__device__ __forceinline__ void gram(double* out, WyShared& shared, int64_t D, int R, bool symmetric, A a, B b) {
  int slot = 0;
  for (int i0 = 0; i0 < R; i0 += 4) {
    for (int j0 = symmetric ? i0 : 0; j0 < R; j0 += 4, slot ^= 1) {
      double sums[16] = {};
      for (int64_t d = thread_id(); d < D; d += kThreads) {
        double left[4], right[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          left[k] = i0 + k < R ? a(i0 + k, d) : 0.0f;
          right[k] = j0 + k < R ? b(j0 + k, d) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < 16; ++k) sums[k] += left[k / 4] * right[k % 4];
      }
      block_sums(sums, shared, slot);
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const int i = i0 + k / 4, j = j0 + k % 4;
        if (thread_id() == k && i < R && j < R) {
          out[i * R + j] = sums[k];
          if (symmetric) out[j * R + i] = sums[k];
        }
      }
    }
  }
  __syncthreads();
}

// The 2 x 2 diagonal block of t of the pair that starts at row `first`; its first entry where R ends the pair.
struct Corner {
  double c00, c01, c10, c11;
};

__device__ __forceinline__ Corner pair_block(const WyShared& shared, const double* g, int R, int first) {
  const bool has_a = shared.nonzero[first];
  const double aa = g[first * R + first];
  Corner corner = {has_a ? 2 / aa : 0, 0, 0, 0};
  if (first + 1 == R) return corner;
  const bool has_b = shared.nonzero[first + 1];
  const double ad = g[first * R + first + 1], dd = g[(first + 1) * R + first + 1];
  if (has_a && has_b) {
    const double phi = power_of_two(shared.log_phi[first / 2]);
    const double bb = aa + 2 * phi * ad + phi * phi * dd, scale = 2 / (aa * bb);
    corner = {scale * phi * phi * dd, -scale * phi * (aa + 2 * phi * ad), scale * phi * aa, scale * phi * phi * aa};
  } else if (has_b) {
    corner.c11 = 2 / dd;
  }
  return corner;
}

// t (R, R) of the chain, block upper triangular, from the Gram matrix of v; ends with a barrier.
__device__ __forceinline__ void chain_triangle(double* t, const WyShared& shared, const double* g, int R) {
  for (int i = thread_id(); i < R * R; i += kThreads) t[i] = 0;
  __syncthreads();
  for (int j = 0; j < R; j += 2) {
    const Corner corner = pair_block(shared, g, R, j);
    const int width = j + 1 < R ? 2 : 1;
    for (int i = thread_id(); i < (j + width) * width; i += kThreads) {
      const int row = i / width, column = i % width;
      const double upper = column == 0 ? corner.c00 : corner.c01, lower = column == 0 ? corner.c10 : corner.c11;
      double value = row == j ? upper : row > j ? lower : 0;
      if (row < j) {
        // t is zero below the diagonal blocks
        for (int k = row / 2 * 2; k < j; ++k) {
          double product = g[k * R + j] * upper;
          if (width == 2) product += g[k * R + j + 1] * lower;
          value -= t[row * R + k] * product;
        }
      }
      t[row * R + j + column] = value;
    }
    __syncthreads();
  }
}

// l⁻¹ (R, R) of Gram-Schmidt on û from g = ûᵀ û, and which columns are kept; ends with a barrier.
__device__ __forceinline__ void gram_schmidt(double* inverse, WyShared& shared, const double* g, double* overlap,
                                             int R) {
  for (int i = thread_id(); i < R * R; i += kThreads) inverse[i] = 0;
  __syncthreads();
  for (int j = 0; j < R; ++j) {
    for (int i = thread_id(); i < j; i += kThreads) {
      double sum = 0;
      for (int k = 0; k <= i; ++k) sum += inverse[i * R + k] * g[k * R + j];
      overlap[i] = sum;
    }
    __syncthreads();
    double residual = g[j * R + j];
    for (int i = 0; i < j; ++i) residual -= overlap[i] * overlap[i];
    const bool keep = !(residual <= kDroppedSquare * g[j * R + j]);  // a NaN is kept, so that it shows
    const double scale = keep ? 1 / sqrt(residual) : 0;
    for (int k = thread_id(); k <= j; k += kThreads) {
      double sum = k == j ? 1 : 0;
      for (int i = k; i < j; ++i) sum -= overlap[i] * inverse[i * R + k];
      inverse[j * R + k] = keep ? sum * scale : 0;
    }
    if (thread_id() == 0) shared.kept[j] = keep;
    __syncthreads();
  }
}

}  // namespace hra::cuda
