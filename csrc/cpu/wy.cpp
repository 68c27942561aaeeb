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
constexpr int64_t kGramElements = 2048;        // of a slice for the Gram matrix, where it is wider: half of L1
constexpr int64_t kPadRows = kProductRows;
constexpr int64_t kParallelWork = 500 * 1000;  // as in reflect.cpp

// to (R, width) = the columns [d0, d0 + width) of a (R, D) array, zero beyond D. Rows a power of two apart would
// compete for the same few cache lines of L1.
template <class A, class C>
void take_slice(A* to, const C* from, int64_t R, int64_t D, int64_t d0, int64_t width = kSlice) {
  const int64_t count = smaller(width, D - d0);
  for (int64_t r = 0; r < R; ++r, to += width) {
    const C* row = from + r * D + d0;
    for (int64_t d = 0; d < count; ++d) to[d] = static_cast<A>(row[d]);
    for (int64_t d = count; d < width; ++d) to[d] = 0;
  }
}

// Adds to the tile (i0, j0) of g (R, stride) that of a bᵀ, both (R, width); with kDiagonal i0 = j0 and a = b, and
// half of it is computed.
template <bool kDiagonal>
HRA_INLINE void gram_tile(double* g, int64_t stride, const double* a, const double* b, int64_t R, int64_t width,
                          int64_t i0, int64_t j0) {
  const double *row_a[kSide], *row_b[kSide];
  for (int i = 0; i < kSide; ++i) row_a[i] = a + smaller(i0 + i, R - 1) * width;
  for (int j = 0; j < kSide; ++j) row_b[j] = b + smaller(j0 + j, R - 1) * width;
  Vec<double> acc[kSide][kSide] = {};
  for (int64_t d = 0; d < width; d += kLanes<double>) {
    Vec<double> from_b[kSide];
    HRA_UNROLL
    for (int j = 0; j < kSide; ++j) from_b[j] = load(row_b[j] + d);
    HRA_UNROLL
    for (int i = 0; i < kSide; ++i) {
      const Vec<double> from_a = kDiagonal ? from_b[i] : load(row_a[i] + d);
      HRA_UNROLL
      for (int j = kDiagonal ? i : 0; j < kSide; ++j) acc[i][j] += from_a * from_b[j];
    }
  }
  HRA_UNROLL
  for (int i = 0; i < kSide; ++i) {
    HRA_UNROLL
    for (int j = kDiagonal ? i : 0; j < kSide; ++j)
      if (i0 + i < R && j0 + j < R) g[(i0 + i) * stride + j0 + j] += sum(acc[i][j]);
  }
}

// Adds the tiles of a bᵀ in the rows from i0 on; where a is b, only those from the diagonal on.
void gram_rows(double* g, int64_t stride, const double* a, const double* b, int64_t R, int64_t width, int64_t i0) {
  if (a == b) gram_tile<true>(g, stride, a, b, R, width, i0, i0);
  for (int64_t j0 = a == b ? i0 + kSide : 0; j0 < R; j0 += kSide) gram_tile<false>(g, stride, a, b, R, width, i0, j0);
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

  Columns<T> columns;
  bool apply_gs;
  int tasks;
  int64_t stride;  // of every R x R matrix
  bool kept[kMaxRank];
  Scratch shared, own;
  int64_t g, t, first, second, third, narrow, gram_a, gram_width, slice_v, slice_dv, slice_out;
  const WyFactorFwdParams* fwd = nullptr;
  const WyFactorBwdParams* bwd = nullptr;

  template <class Params>
  Factor(const Params& params, int num_threads) {
    const int64_t D = params.D, R = params.R, rows = round_up(R, kPadRows);
    columns.D = D;
    columns.R = R;
    columns.u = static_cast<const T*>(params.u_ptr);
    apply_gs = params.apply_gs;
    tasks = static_cast<int>(D * R * R < kParallelWork ? 1 : num_threads);
    stride = round_up(R, larger(8, kProductVecs * kLanes<double>));
    const int64_t square = rows * stride;
    g = shared.add<double>(square);
    t = shared.add<double>(square);
    first = shared.add<double>(square);
    second = shared.add<double>(square);
    third = shared.add<double>(square);
    narrow = shared.add<C>(square);
    // the chain's forward writes v in place; with Gram-Schmidt ûᵀ is scratch
    const int64_t hat = shared.add<C>(apply_gs ? R * D : 0);
    shared.allocate(1);
    std::memset(shared.get<double>(0, g), 0, static_cast<size_t>(5 * square) * sizeof(double));
    columns.rows = shared.get<C>(0, hat);
    gram_width = larger(kSlice, kGramElements / R / kSlice * kSlice);
    gram_a = own.add<double>(2 * R * gram_width);
    slice_v = own.add<double>(rows * kSlice);
    slice_dv = own.add<double>(rows * kSlice);
    slice_out = own.add<double>(rows * kSlice);
    own.allocate(tasks);
  }

  double* matrix(int64_t offset) const { return shared.get<double>(0, offset); }

  // g = a bᵀ, slice by slice: each row is converted once, not once for each tile that it is in.
  void gram(int task, const C* a, const C* b) const {
    const int64_t D = columns.D, R = columns.R;
    double *const slice_a = own.get<double>(task, gram_a), *const slice_b = a == b ? slice_a : slice_a + R * gram_width;
    for (int64_t d0 = 0; d0 < D; d0 += gram_width) {
      const int64_t width = smaller(gram_width, round_up(D - d0, kLanes<double>));
      take_slice(slice_a, a, R, D, d0, width);
      if (a != b) take_slice(slice_b, b, R, D, d0, width);
      // tiles are dealt out one by one: above the diagonal their rows differ in length
      for (int64_t i = task * kSide; i < R; i += tasks * kSide)
        gram_rows(matrix(g), stride, slice_a, slice_b, R, width, i);
    }
  }

  void find_gram(const C* a, const C* b) {
    const int64_t R = columns.R;
    std::memset(matrix(g), 0, static_cast<size_t>(R * stride) * sizeof(double));
    run([a, b](Factor& f, int task) { f.gram(task, a, b); });
    for (int64_t i = 0; a == b && i < R; ++i)
      for (int64_t j = 0; j < i; ++j) matrix(g)[i * stride + j] = matrix(g)[j * stride + i];
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
    double* const out = own.get<double>(task, slice_out);
    const Slices range = slices_of(task);
    for (int64_t d0 = range.begin; d0 < range.end; d0 += kSlice) {
      double* const in = own.get<double>(task, slice_v);
      take_slice(in, columns.rows, R, D, d0);
      product(out, kSlice, true, matrix(first), stride, in, kSlice, round_up(R, kPadRows), R, kSlice);
      for (int64_t r = 0; r < R; ++r)
        for (int64_t d = 0; d < smaller(kSlice, D - d0); ++d)
          static_cast<C*>(fwd->v_ptr)[r * D + d0 + d] = static_cast<C>(out[r * kSlice + d]);
    }
  }

  // du of a slice from (R, kSlice).
  void write_du(const C* rows, int64_t d0) const {
    constexpr int64_t kLane = kLanes<C>;
    const int64_t R = columns.R, count = smaller(kSlice, columns.D - d0);
    T* const du = static_cast<T*>(bwd->du_ptr) + d0 * R;
    for (int64_t d = 0; d < count; d += kLane)
      store_columns(du + d * R, rows + d, kSlice, R, smaller(kLane, count - d));
  }

  // Rows r and r + 1 of dhat on a slice, to be rows of duᵀ.
  void finish_pair(C* a, int64_t r) const {
    const bool second = r + 1 < columns.R, both = second && columns.has_both(r / 2);
    const PowerOfTwo<C> phi(second ? -columns.log_phi[r / 2] : 0);
    C* const b = a + kSlice;
    for (int64_t d = 0; d < kSlice; d += kLanes<C>) {
      Vec<C> first = load(a + d);
      if (second) {
        const Vec<C> difference = phi.times(load(b + d));
        store(b + d, columns.scaled(r + 1, difference));
        if (both) first -= difference;
      }
      store(a + d, columns.scaled(r, first));
    }
  }

  // du of a range of D: with dhat = dv + (dg + dgᵀ) v, the second row of a pair is dhat / φ, and the first loses that.
  void gradient_rows(int task) const {
    const int64_t D = columns.D, R = columns.R;
    C* const v = own.get<C>(task, slice_v);
    C* const out = own.get<C>(task, slice_out);
    const Slices range = slices_of(task);
    for (int64_t d0 = range.begin; d0 < range.end; d0 += kSlice) {
      take_slice(v, static_cast<const C*>(bwd->v_ptr), R, D, d0);
      take_slice(out, static_cast<const C*>(bwd->dv_ptr), R, D, d0);
      product(out, kSlice, false, shared.get<C>(0, narrow), stride, v, kSlice, round_up(R, kPadRows), R, kSlice);
      for (int64_t r = 0; r < R; r += 2) finish_pair(out + r * kSlice, r);
      write_du(out, d0);
    }
  }

  // The same with Gram-Schmidt, in float64: dhat = l⁻ᵀ (dv - (k + tril(k, -1)ᵀ) v).
  void orthonormal_gradient_rows(int task) const {
    const int64_t D = columns.D, R = columns.R;
    double* const v = own.get<double>(task, slice_v);
    double* const sum = own.get<double>(task, slice_dv);
    double* const out = own.get<double>(task, slice_out);
    const Slices range = slices_of(task);
    for (int64_t d0 = range.begin; d0 < range.end; d0 += kSlice) {
      take_slice(v, static_cast<const C*>(bwd->v_ptr), R, D, d0);
      take_slice(sum, static_cast<const C*>(bwd->dv_ptr), R, D, d0);
      product(sum, kSlice, false, matrix(second), stride, v, kSlice, round_up(R, kPadRows), R, kSlice);
      product(out, kSlice, true, matrix(third), stride, sum, kSlice, round_up(R, kPadRows), R, kSlice);
      C* const scaled = own.get<C>(task, slice_v);
      for (int64_t r = 0; r < R; ++r) {
        const PowerOfTwo<double> power(-columns.exponent[r]);
        for (int64_t d = 0; d < kSlice; ++d)
          scaled[r * kSlice + d] = columns.nonzero[r] ? static_cast<C>(power.times(out[r * kSlice + d])) : 0;
      }
      write_du(scaled, d0);
    }
  }

  template <class Work>
  void run(const Work& work) {
    run_each(tasks, tasks, [&](int task) { work(*this, task); });
  }

  void make_rows() {
    run([](Factor& f, int task) {
      const Slices range = f.slices_of(task);
      const int64_t lane = kLanes<C>;
      f.columns.make_rows(range.begin / lane, (range.end + lane - 1) / lane, !f.apply_gs);
    });
  }

  void forward(const WyFactorFwdParams& params) {
    fwd = &params;
    const int64_t R = columns.R;
    C* const t_out = static_cast<C*>(params.t_ptr);
    if (!apply_gs) columns.rows = static_cast<C*>(params.v_ptr);
    columns.find_exponents();
    make_rows();
    if (!apply_gs)
      run([](Factor& f, int task) {
        const int64_t pairs = f.columns.R / 2;
        f.columns.scale_differences(pairs * task / f.tasks, pairs * (task + 1) / f.tasks);
      });
    find_gram(columns.rows, columns.rows);
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
    columns.find_exponents();
    if (apply_gs) {
      make_rows();
      orthonormal_coefficients();
      run([](Factor& f, int task) { f.orthonormal_gradient_rows(task); });
    } else {
      columns.find_log_phi(static_cast<const C*>(params.v_ptr));
      chain_coefficients();
      run([](Factor& f, int task) { f.gradient_rows(task); });
    }
  }

  // second = -(k + tril(k, -1)ᵀ) with k = tril(dv vᵀ), third = l⁻ᵀ
  void orthonormal_coefficients() {
    const int64_t R = columns.R;
    double *const inverse = matrix(first), *const b = matrix(second), *const c = matrix(third);
    find_gram(columns.rows, columns.rows);
    gram_schmidt(inverse, kept, matrix(g), R, stride);
    find_gram(static_cast<const C*>(bwd->dv_ptr), static_cast<const C*>(bwd->v_ptr));
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < R; ++j) {
        b[i * stride + j] = -matrix(g)[larger(i, j) * stride + smaller(i, j)];
        c[j * stride + i] = inverse[i * stride + j];
      }
  }

  // narrow = dg + dgᵀ from ds = -tᵀ dt tᵀ
  void chain_coefficients() {
    const int64_t R = columns.R;
    double *const a = matrix(first), *const b = matrix(second), *const c = matrix(third);
    const C* t_in = static_cast<const C*>(bwd->t_ptr);
    const C* dt_in = static_cast<const C*>(bwd->dt_ptr);
    double* const t_flipped = matrix(t);
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < R; ++j) {
        a[i * stride + j] = static_cast<double>(dt_in[i * R + j]);
        t_flipped[j * stride + i] = static_cast<double>(t_in[i * R + j]);
      }
    product(c, stride, true, t_flipped, stride, a, stride, R, R, stride);
    product(a, stride, true, c, stride, t_flipped, stride, R, R, stride);
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = i; j < R; ++j) b[i * stride + j] = b[j * stride + i] = -a[i * stride + j];
    for (int64_t pair = 0; pair < R / 2; ++pair) {
      if (!columns.has_both(pair)) continue;
      const int64_t i = 2 * pair;
      // twice the term of the diagonal: b holds dg + dgᵀ
      b[i * stride + i] +=
          (a[(i + 1) * stride + i] - a[i * stride + i + 1]) / __builtin_ldexp(1.0, columns.log_phi[pair]);
    }
    C* const coefficients = shared.get<C>(0, narrow);
    for (int64_t i = 0; i < round_up(R, kPadRows) * stride; ++i) coefficients[i] = static_cast<C>(b[i]);
  }
};

}  // namespace

void wy_factor_fwd(const WyFactorFwdParams& params, int num_threads) {
  with_type(params.dtype, [&](auto type) { Factor<typename decltype(type)::T>(params, num_threads).forward(params); });
}

void wy_factor_bwd(const WyFactorBwdParams& params, int num_threads) {
  with_type(params.dtype, [&](auto type) { Factor<typename decltype(type)::T>(params, num_threads).backward(params); });
}

}  // namespace hra::cpu::HRA_ISA
