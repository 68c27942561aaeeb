// wy_factor and its gradient (hra_kernels/reference.py spells out the algebra):
//
//   v (R, D)   u's columns scaled by powers of two, the second of each pair replaced by the scaled difference
//   t (R, R)   closed form on the 2 x 2 diagonal blocks, one block column after the other above them
//   Gram-Schmidt instead: v = l⁻¹ ûᵀ with l the Cholesky factor of ûᵀû, t = 2 on the columns it keeps
//
// The Gram matrix and everything of size R x R is float64, whatever u is: t does not lose the digits that near-parallel
// columns cancel. Cost: R^2 D multiply-adds in float64 forward (half of it: the matrix is symmetric) and backward, one
// read of u and one write of v. At D = 4096, R = 8 that is 0.13 million of each: tens of microseconds.
#include "scratch.h"
#include "tiles.h"
#include "wy_columns.h"

namespace hra::cpu::HRA_ISA {
namespace {

constexpr double kGsRtol = 0x1p-13;            // reference.GS_RTOL
constexpr int kSide = kManyRegisters ? 4 : 3;  // of a tile of accumulators of the Gram matrix
constexpr int64_t kSlice = 64;                 // columns of D that the backward works on at a time
constexpr int64_t kParallelWork = 500 * 1000;  // as in reflect.cpp

// g (R, stride) = a bᵀ in float64 for rows [begin, end) of tiles; `symmetric` leaves out what is left of the diagonal.
template <class C>
void gram_rows(double* g, int64_t stride, const C* a, const C* b, int64_t R, int64_t D, int64_t i0, bool symmetric) {
  constexpr int kLane = kLanes<double>;
  const C *row_a[kSide], *row_b[kSide];
  for (int i = 0; i < kSide; ++i) row_a[i] = a + smaller(i0 + i, R - 1) * D;
  for (int64_t j0 = symmetric ? i0 : 0; j0 < R; j0 += kSide) {
    for (int j = 0; j < kSide; ++j) row_b[j] = b + smaller(j0 + j, R - 1) * D;
    Vec<double> acc[kSide][kSide] = {};
    for (int64_t d = 0; d < D; d += kLane) {
      const int64_t count = smaller(kLane, D - d);
      const auto take = [&](const C* row) { return count == kLane ? load_wide(row) : load_wide_first(row, count); };
      Vec<double> from_b[kSide];
      HRA_UNROLL
      for (int j = 0; j < kSide; ++j) from_b[j] = take(row_b[j] + d);
      HRA_UNROLL
      for (int i = 0; i < kSide; ++i) {
        const Vec<double> from_a = take(row_a[i] + d);
        HRA_UNROLL
        for (int j = 0; j < kSide; ++j) acc[i][j] += from_a * from_b[j];
      }
    }
    HRA_UNROLL
    for (int i = 0; i < kSide; ++i) {
      HRA_UNROLL
      for (int j = 0; j < kSide; ++j) {
        if (i0 + i >= R || j0 + j >= R) continue;
        const double total = sum(acc[i][j]);
        g[(i0 + i) * stride + j0 + j] = total;
        if (symmetric) g[(j0 + j) * stride + i0 + i] = total;
      }
    }
  }
}

// out (rows, kSlice) += coefficients (rows, R) times in (R, kSlice).
HRA_INLINE void combine(double* out, const double* coefficients, int64_t stride, const double* in, int64_t rows,
                        int64_t R) {
  constexpr int kLane = kLanes<double>;
  constexpr int kRows = kManyRegisters ? 4 : 2;
  for (int64_t i = 0; i < rows; i += kRows)
    for (int64_t d = 0; d < kSlice; d += 2 * kLane) {
      Vec<double> acc[kRows][2];
      HRA_UNROLL
      for (int k = 0; k < kRows; ++k) {
        acc[k][0] = load(out + (i + k) * kSlice + d);
        acc[k][1] = load(out + (i + k) * kSlice + d + kLane);
      }
      for (int64_t j = 0; j < R; ++j) {
        const Vec<double> first = load(in + j * kSlice + d), second = load(in + j * kSlice + d + kLane);
        HRA_UNROLL
        for (int k = 0; k < kRows; ++k) {
          const Vec<double> factor = broadcast(coefficients[(i + k) * stride + j]);
          acc[k][0] += factor * first;
          acc[k][1] += factor * second;
        }
      }
      HRA_UNROLL
      for (int k = 0; k < kRows; ++k) {
        store(out + (i + k) * kSlice + d, acc[k][0]);
        store(out + (i + k) * kSlice + d + kLane, acc[k][1]);
      }
    }
}

// (R, kSlice) of a (R, D) array from column d0 on, in float64, zero beyond D.
template <class C>
void take_slice(double* to, const C* from, int64_t R, int64_t D, int64_t d0) {
  const int64_t count = smaller(kSlice, D - d0);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t d = 0; d < kSlice; ++d) to[r * kSlice + d] = d < count ? static_cast<double>(from[r * D + d0 + d]) : 0;
}

HRA_INLINE double dot(const double* a, const double* b, int64_t count) {
  Vec<double> acc{};
  for (int64_t k = 0; k < count; k += kLanes<double>) acc += load(a + k) * load(b + k);
  return sum(acc);
}

// t (R, stride) of a chain from the Gram matrix of v; stride is whole vectors, zero beyond R.
template <class T>
void chain_t(double* t, const double* g, int64_t stride, const Columns<T>& columns, double* column) {
  const int64_t R = columns.R;
  std::memset(t, 0, static_cast<size_t>(R * stride) * sizeof(double));
  for (int64_t j = 0; j < R; j += 2) {
    const int64_t width = smaller(2, R - j);
    double corner[2][2] = {};
    if (width == 1) {
      if (columns.nonzero[j]) corner[0][0] = 2 / g[j * stride + j];
    } else {
      const double aa = g[j * stride + j], ad = g[j * stride + j + 1], dd = g[(j + 1) * stride + j + 1];
      const double phi = __builtin_ldexp(1.0, columns.log_phi[j / 2]);
      if (columns.has_both(j / 2)) {
        const double bb = aa + 2 * phi * ad + phi * phi * dd, scale = 2 / (aa * bb);
        corner[0][0] = scale * phi * phi * dd;
        corner[0][1] = -scale * phi * (aa + 2 * phi * ad);
        corner[1][0] = scale * phi * aa;
        corner[1][1] = scale * phi * phi * aa;
      } else if (columns.nonzero[j]) {
        corner[0][0] = 2 / aa;
      } else if (columns.nonzero[j + 1]) {
        corner[1][1] = 2 / dd;
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      std::memset(column, 0, static_cast<size_t>(stride) * sizeof(double));
      for (int64_t k = 0; k < j; ++k) {
        column[k] = g[k * stride + j] * corner[0][c];
        if (width == 2) column[k] += g[k * stride + j + 1] * corner[1][c];
      }
      // the rows above are read up to column j only, which this sweep does not write
      for (int64_t i = 0; i < j; ++i) t[i * stride + j + c] = -dot(t + i * stride, column, j);
      for (int64_t i = 0; i < width; ++i) t[(j + i) * stride + j + c] = corner[i][c];
    }
  }
}

// l⁻¹ (R, stride) of Gram-Schmidt from the Gram matrix of ûᵀ; a row of zeros for each column it drops.
void gram_schmidt(double* inverse, bool* kept, const double* g, int64_t R, int64_t stride) {
  std::memset(inverse, 0, static_cast<size_t>(R * stride) * sizeof(double));
  for (int64_t j = 0; j < R; ++j) {
    double* row = inverse + j * stride;
    double residual = g[j * stride + j];
    for (int64_t i = 0; i < j; ++i) {
      const double overlap = dot(inverse + i * stride, g + j * stride, stride);
      residual -= overlap * overlap;
      for (int64_t k = 0; k < R; ++k) row[k] -= overlap * inverse[i * stride + k];
    }
    kept[j] = !(residual <= kGsRtol * kGsRtol * g[j * stride + j]);  // a NaN is kept, so that it shows
    row[j] += 1;
    const double scale = 1 / __builtin_sqrt(residual);
    for (int64_t k = 0; k < R; ++k) row[k] = kept[j] ? row[k] * scale : 0;
  }
}

template <class T>
struct Factor {
  using C = Accumulator<T>;
  static constexpr int64_t kPadRows = 4;

  Columns<T> columns;
  bool apply_gs;
  int tasks;
  int64_t stride;  // of every R x R matrix
  bool kept[kMaxRank];
  Scratch shared, own;
  int64_t g, t, first, second, third, slice_v, slice_dv, slice_out;
  const WyFactorFwdParams* fwd = nullptr;
  const WyFactorBwdParams* bwd = nullptr;

  template <class Params>
  Factor(const Params& params, bool backward, int num_threads) {
    const int64_t D = params.D, R = params.R;
    columns.D = D;
    columns.R = R;
    columns.u = static_cast<const T*>(params.u_ptr);
    columns.stride_ud = params.stride_ud;
    columns.stride_ur = params.stride_ur;
    apply_gs = params.apply_gs;
    tasks = static_cast<int>(D * R * R < kParallelWork ? 1 : num_threads);
    stride = round_up(R, larger(8, kLanes<double>));
    const int64_t square = round_up(R, kPadRows) * stride;
    g = shared.add<double>(square);
    t = shared.add<double>(square);
    first = shared.add<double>(square);
    second = shared.add<double>(square);
    third = shared.add<double>(square);
    // the chain's forward writes v in place; else ûᵀ is scratch
    const int64_t rows = shared.add<C>(backward || apply_gs ? R * D : 0);
    shared.allocate(1);
    std::memset(shared.get<double>(0, g), 0, static_cast<size_t>(5 * square) * sizeof(double));
    columns.rows = shared.get<C>(0, rows);
    slice_v = own.add<double>(round_up(R, kPadRows) * kSlice);
    slice_dv = own.add<double>(round_up(R, kPadRows) * kSlice);
    slice_out = own.add<double>(round_up(R, kPadRows) * kSlice);
    own.allocate(tasks);
  }

  double* matrix(int64_t offset) const { return shared.get<double>(0, offset); }

  void gram(int task, const C* a, const C* b, bool symmetric) const {
    // tiles are dealt out one by one: above the diagonal their rows differ in length
    for (int64_t i = task * kSide; i < columns.R; i += tasks * kSide)
      gram_rows(matrix(g), stride, a, b, columns.R, columns.D, i, symmetric);
  }

  struct Slices {
    int64_t begin, end;
  };
  Slices slices_of(int task) const {
    const int64_t slices = (columns.D + kSlice - 1) / kSlice;
    return {slices * task / tasks * kSlice, smaller(columns.D, slices * (task + 1) / tasks * kSlice)};
  }

  // v = l⁻¹ ûᵀ
  void orthonormal_rows(int task) const {
    const int64_t D = columns.D, R = columns.R;
    double* const in = own.get<double>(task, slice_v);
    double* const out = own.get<double>(task, slice_out);
    const Slices range = slices_of(task);
    for (int64_t d0 = range.begin; d0 < range.end; d0 += kSlice) {
      take_slice(in, columns.rows, R, D, d0);
      std::memset(out, 0, static_cast<size_t>(round_up(R, kPadRows) * kSlice) * sizeof(double));
      combine(out, matrix(first), stride, in, R, R);
      for (int64_t r = 0; r < R; ++r)
        for (int64_t d = 0; d < smaller(kSlice, D - d0); ++d)
          static_cast<C*>(fwd->v_ptr)[r * D + d0 + d] = static_cast<C>(out[r * kSlice + d]);
    }
  }

  // du of a range of D from the R x R matrices that `forward` or `backward` left.
  void gradient_rows(int task) const {
    const int64_t D = columns.D, R = columns.R;
    double* const v = own.get<double>(task, slice_v);
    double* const out = own.get<double>(task, slice_out);
    double* const dhat = apply_gs ? own.get<double>(task, slice_dv) : out;
    const Slices range = slices_of(task);
    for (int64_t d0 = range.begin; d0 < range.end; d0 += kSlice) {
      const int64_t count = smaller(kSlice, D - d0);
      take_slice(v, static_cast<const C*>(bwd->v_ptr), R, D, d0);
      take_slice(out, static_cast<const C*>(bwd->dv_ptr), R, D, d0);
      combine(out, matrix(second), stride, v, R, R);
      if (apply_gs) {
        std::memset(dhat, 0, static_cast<size_t>(round_up(R, kPadRows) * kSlice) * sizeof(double));
        combine(dhat, matrix(third), stride, out, R, R);
      } else {
        for (int64_t pair = 0; pair < R / 2; ++pair) {
          double *a = dhat + 2 * pair * kSlice, *d = a + kSlice;
          const double scale = __builtin_ldexp(1.0, -columns.log_phi[pair]);
          const bool both = columns.has_both(pair);
          for (int64_t k = 0; k < kSlice; ++k) {
            d[k] *= scale;
            if (both) a[k] -= d[k];
          }
        }
      }
      T* du = static_cast<T*>(bwd->du_ptr) + d0 * R;
      for (int64_t r = 0; r < R; ++r) {
        const double scale = columns.nonzero[r] ? __builtin_ldexp(1.0, -columns.exponent[r]) : 0;
        C wide[kSlice];
        T narrow[kSlice];
        for (int64_t d = 0; d < kSlice; ++d) wide[d] = scale != 0 ? static_cast<C>(dhat[r * kSlice + d] * scale) : 0;
        for (int64_t d = 0; d < kSlice; d += kLanes<C>) store(narrow + d, load(wide + d));
        for (int64_t d = 0; d < count; ++d) du[d * R + r] = narrow[d];
      }
    }
  }

  template <class Work>
  void run(Work work) {
    struct Call {
      Factor* factor;
      Work* work;
    } call{this, &work};
    run_tasks(
        tasks, tasks,
        [](int task, void* context) {
          const Call* call = static_cast<Call*>(context);
          (*call->work)(*call->factor, task);
        },
        &call);
  }

  void forward(const WyFactorFwdParams& params) {
    fwd = &params;
    const int64_t R = columns.R;
    C* const v = static_cast<C*>(params.v_ptr);
    C* const t_out = static_cast<C*>(params.t_ptr);
    if (!apply_gs) columns.rows = v;
    run([](Factor& f, int task) { f.columns.prepare(task, f.tasks, !f.apply_gs); });
    run([](Factor& f, int task) { f.gram(task, f.columns.rows, f.columns.rows, true); });
    if (apply_gs) {
      gram_schmidt(matrix(first), kept, matrix(g), R, stride);
      run([](Factor& f, int task) { f.orthonormal_rows(task); });
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = 0; j < R; ++j) t_out[i * R + j] = i == j && kept[i] ? 2 : 0;
    } else {
      chain_t(matrix(t), matrix(g), stride, columns, matrix(first));
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = 0; j < R; ++j) t_out[i * R + j] = static_cast<C>(matrix(t)[i * stride + j]);
    }
  }

  void backward(const WyFactorBwdParams& params) {
    bwd = &params;
    const int64_t R = columns.R;
    double *const a = matrix(first), *const b = matrix(second), *const c = matrix(third);
    run([](Factor& f, int task) { f.columns.prepare(task, f.tasks, !f.apply_gs); });
    if (apply_gs) {
      run([](Factor& f, int task) { f.gram(task, f.columns.rows, f.columns.rows, true); });
      gram_schmidt(a, kept, matrix(g), R, stride);
      run([](Factor& f, int task) {
        f.gram(task, static_cast<const C*>(f.bwd->dv_ptr), static_cast<const C*>(f.bwd->v_ptr), false);
      });
      // dhat = l⁻ᵀ (dv - (k + tril(k, -1)ᵀ) v), k = tril(dv vᵀ)
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = 0; j < R; ++j) {
          b[i * stride + j] = -matrix(g)[larger(i, j) * stride + smaller(i, j)];
          c[j * stride + i] = a[i * stride + j];
        }
    } else {
      // ds = -tᵀ dt tᵀ; then b = dg + dgᵀ
      const C* t_in = static_cast<const C*>(params.t_ptr);
      const C* dt_in = static_cast<const C*>(params.dt_ptr);
      double* const t_flipped = matrix(t);
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = 0; j < R; ++j) {
          a[i * stride + j] = static_cast<double>(dt_in[i * R + j]);
          t_flipped[j * stride + i] = static_cast<double>(t_in[i * R + j]);
        }
      small_product(c, t_flipped, a, R, R, stride);
      small_product(a, c, t_flipped, R, R, stride);
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = i; j < R; ++j) b[i * stride + j] = b[j * stride + i] = -a[i * stride + j];
      for (int64_t pair = 0; pair < R / 2; ++pair) {
        if (!columns.has_both(pair)) continue;
        const int64_t i = 2 * pair;
        // twice the term of the diagonal: b holds dg + dgᵀ
        b[i * stride + i] +=
            (a[(i + 1) * stride + i] - a[i * stride + i + 1]) / __builtin_ldexp(1.0, columns.log_phi[pair]);
      }
    }
    run([](Factor& f, int task) { f.gradient_rows(task); });
  }
};

}  // namespace

void wy_factor_fwd(const WyFactorFwdParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Factor<float>(params, false, num_threads).forward(params);
    case DType::kFloat64:
      return Factor<double>(params, false, num_threads).forward(params);
    case DType::kBFloat16:
      return Factor<BFloat16>(params, false, num_threads).forward(params);
    case DType::kFloat16:
      return Factor<Float16>(params, false, num_threads).forward(params);
  }
}

void wy_factor_bwd(const WyFactorBwdParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::kFloat32:
      return Factor<float>(params, true, num_threads).backward(params);
    case DType::kFloat64:
      return Factor<double>(params, true, num_threads).backward(params);
    case DType::kBFloat16:
      return Factor<BFloat16>(params, true, num_threads).backward(params);
    case DType::kFloat16:
      return Factor<Float16>(params, true, num_threads).backward(params);
  }
}

}  // namespace hra::cpu::HRA_ISA
