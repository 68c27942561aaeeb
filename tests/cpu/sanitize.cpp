// Runs the CPU kernels without Python, for builds under AddressSanitizer and UndefinedBehaviorSanitizer
// (cmake -DHRA_SANITIZE=ON): every instruction set, dtype and rank tile, ragged sizes, strided rows, one thread and
// three.
//
// Every array is a heap block of exactly its size, so that one element too many is caught; what lies between strided
// rows must not change; results must agree with plain loops in float64. Exits with 1 after printing what did not.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "hra.h"

namespace {

using hra::DType;

std::mt19937 generator(7);
int failures = 0;
int checks = 0;
std::string running;

double normal() { return std::normal_distribution<double>()(generator); }

void check(bool good, const char* what) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("FAILED %s: %s\n", running.c_str(), what);
}

uint16_t to_bfloat16(double value) {
  const float narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  if (std::isnan(value)) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

double from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<double>(value);
}

// By way of the integer of which the value is a multiple of 2^-24, the smallest float16.
uint16_t to_float16(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  int exponent;
  std::frexp(value, &exponent);
  const int ulp = std::max(exponent - 11, -24);
  const double rounded = std::nearbyint(std::ldexp(std::fabs(value), -ulp));
  if (std::isinf(value) || std::ldexp(rounded, ulp) > 65504) return sign | 0x7c00;
  return static_cast<uint16_t>(sign | (static_cast<int>(rounded) + ((ulp + 24) << 10)));
}

double from_float16(uint16_t half) {
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  double value = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 31) value = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
  return half & 0x8000 ? -value : value;
}

// A heap block of exactly `count` elements of one dtype.
class Array {
 public:
  Array(DType dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(new char[std::max<size_t>(1, size())]) {
    std::memset(bytes_.get(), 0xff, size());  // NaN in every dtype
  }
  void* data() { return bytes_.get(); }
  int64_t count() const { return count_; }
  double get(int64_t i) const {
    const char* at = bytes_.get() + i * element();
    uint16_t half;
    std::memcpy(&half, at, sizeof(half));
    if (dtype_ == DType::kBFloat16) return from_bfloat16(half);
    if (dtype_ == DType::kFloat16) return from_float16(half);
    float single;
    double wide;
    std::memcpy(&single, at, sizeof(single));
    if (dtype_ == DType::kFloat32) return static_cast<double>(single);
    std::memcpy(&wide, at, sizeof(wide));
    return wide;
  }
  void set(int64_t i, double value) {
    char* at = bytes_.get() + i * element();
    const float single = static_cast<float>(value);
    const uint16_t half = dtype_ == DType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
    const void* from = dtype_ == DType::kFloat64   ? static_cast<const void*>(&value)
                       : dtype_ == DType::kFloat32 ? static_cast<const void*>(&single)
                                                   : static_cast<const void*>(&half);
    std::memcpy(at, from, static_cast<size_t>(element()));
  }
  void fill(double scale) {
    for (int64_t i = 0; i < count_; ++i) set(i, normal() * scale);
  }
  bool untouched(int64_t i) const {
    for (int64_t byte = i * element(); byte < (i + 1) * element(); ++byte)
      if (bytes_[static_cast<size_t>(byte)] != static_cast<char>(0xff)) return false;
    return true;
  }

 private:
  int64_t element() const { return dtype_ == DType::kFloat64 ? 8 : dtype_ == DType::kFloat32 ? 4 : 2; }
  size_t size() const { return static_cast<size_t>(count_ * element()); }

  DType dtype_;
  int64_t count_;
  std::unique_ptr<char[]> bytes_;
};

// (M, D) rows `stride` apart.
struct Rows {
  int64_t M, D, stride;
  Array array;
  Rows(DType dtype, int64_t M, int64_t D, int64_t gap)
      : M(M), D(D), stride(D + gap), array(dtype, M > 0 ? (M - 1) * stride + D : 0) {}
  double at(int64_t m, int64_t d) const { return array.get(m * stride + d); }
  void fill() {
    for (int64_t m = 0; m < M; ++m)
      for (int64_t d = 0; d < D; ++d) array.set(m * stride + d, normal());
  }
  void check_gaps(const char* what) const {
    bool good = true;
    for (int64_t m = 0; m + 1 < M; ++m)
      for (int64_t d = D; d < stride; ++d) good = good && array.untouched(m * stride + d);
    check(good, what);
  }
};

double tolerance(DType dtype) {
  const double unit = dtype == DType::kFloat64 ? 1e-14 : dtype == DType::kFloat32 ? 1e-6 : 0;
  return dtype == DType::kBFloat16 ? 0x1p-7 : dtype == DType::kFloat16 ? 0x1p-9 : 20 * unit;
}

// |got - want| within tolerance of the largest |want|.
template <class Got, class Want>
void check_close(int64_t count, double allowed, Got got, Want want, const char* what) {
  double largest = 0, error = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::fmax(largest, std::fabs(want(i)));
  for (int64_t i = 0; i < count; ++i) {
    const double off = std::fabs(got(i) - want(i));
    error = off <= error ? error : off;  // keeps a NaN
  }
  check(error <= allowed * std::fmax(largest, 1), what);
}

using Matrix = std::vector<double>;

// (rows, columns) = a (rows, inner) b (inner, columns), each through an accessor.
template <class A, class B>
Matrix product(int64_t rows, int64_t inner, int64_t columns, A a, B b) {
  Matrix out(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < inner; ++k)
      for (int64_t j = 0; j < columns; ++j) out[static_cast<size_t>(i * columns + j)] += a(i, k) * b(k, j);
  return out;
}

void test_reflect(DType dtype, int64_t M, int64_t D, int64_t R, int64_t gap, bool transpose, int threads) {
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const double close = tolerance(dtype), close_wide = tolerance(wide);
  Rows x(dtype, M, D, gap), dy(dtype, M, D, 2 * gap), y(dtype, M, D, gap), dx(dtype, M, D, gap);
  Array v(wide, R * D), t(wide, R * R), p(wide, M * R), dv(wide, R * D), dt(wide, R * R);
  x.fill();
  dy.fill();
  v.fill(1 / std::sqrt(static_cast<double>(D + 1)));
  t.fill(1 / std::sqrt(static_cast<double>(R)));
  const auto at = [](const Matrix& matrix, int64_t columns) {
    return [&matrix, columns](int64_t i, int64_t j) { return matrix[static_cast<size_t>(i * columns + j)]; };
  };
  const auto flat = [](const Matrix& matrix) {
    return [&matrix](int64_t i) { return matrix[static_cast<size_t>(i)]; };
  };
  const auto v_at = [&](int64_t r, int64_t d) { return v.get(r * D + d); };
  const auto v_flipped = [&](int64_t d, int64_t r) { return v.get(r * D + d); };
  const auto m_at = [&](int64_t i, int64_t j) { return transpose ? t.get(j * R + i) : t.get(i * R + j); };
  const auto m_flipped = [&](int64_t i, int64_t j) { return m_at(j, i); };

  const Matrix p_want = product(M, D, R, [&](int64_t m, int64_t d) { return x.at(m, d); }, v_flipped);
  const Matrix pm = product(M, R, R, at(p_want, R), m_at);
  const Matrix pmv = product(M, R, D, at(pm, R), v_at);
  hra::ReflectFwdParams fwd{};
  fwd.y_ptr = y.array.data();
  fwd.p_ptr = p.data();
  fwd.x_ptr = x.array.data();
  fwd.v_ptr = v.data();
  fwd.t_ptr = t.data();
  fwd.M = M;
  fwd.D = D;
  fwd.R = R;
  fwd.stride_ym = y.stride;
  fwd.stride_xm = x.stride;
  fwd.dtype = dtype;
  fwd.transpose = transpose;
  hra::cpu::reflect_fwd(fwd, threads);
  check_close(M * R, close_wide, [&](int64_t i) { return p.get(i); }, flat(p_want), "p");
  check_close(
      M * D, close, [&](int64_t i) { return y.at(i / D, i % D); },
      [&](int64_t i) { return x.at(i / D, i % D) - pmv[static_cast<size_t>(i)]; }, "y");
  y.check_gaps("between the rows of y");

  const auto dy_at = [&](int64_t m, int64_t d) { return dy.at(m, d); };
  const Matrix q = product(M, D, R, dy_at, v_flipped);
  const Matrix qm = product(M, R, R, at(q, R), m_flipped);
  const Matrix qmv = product(M, R, D, at(qm, R), v_at);
  Matrix dv_want = product(R, M, D, [&](int64_t r, int64_t m) { return -at(pm, R)(m, r); }, dy_at);
  const Matrix from_x = product(
      R, M, D, [&](int64_t r, int64_t m) { return at(qm, R)(m, r); }, [&](int64_t m, int64_t d) { return x.at(m, d); });
  for (size_t i = 0; i < dv_want.size(); ++i) dv_want[i] -= from_x[i];
  const Matrix dm = product(R, M, R, [&](int64_t i, int64_t m) { return -at(p_want, R)(m, i); }, at(q, R));
  for (const int wanted : {7, 1, 2, 4}) {
    hra::ReflectBwdParams bwd{};
    if (wanted & 1) bwd.dx_ptr = dx.array.data();
    if (wanted & 2) bwd.dv_ptr = dv.data();
    if (wanted & 4) bwd.dt_ptr = dt.data();
    bwd.dy_ptr = dy.array.data();
    bwd.x_ptr = wanted & 2 ? x.array.data() : nullptr;
    bwd.v_ptr = v.data();
    bwd.t_ptr = t.data();
    bwd.p_ptr = wanted & 6 ? p.data() : nullptr;
    bwd.M = M;
    bwd.D = D;
    bwd.R = R;
    bwd.stride_dxm = dx.stride;
    bwd.stride_dym = dy.stride;
    bwd.stride_xm = x.stride;
    bwd.dtype = dtype;
    bwd.transpose = transpose;
    hra::cpu::reflect_bwd(bwd, threads);
  }
  check_close(
      M * D, close, [&](int64_t i) { return dx.at(i / D, i % D); },
      [&](int64_t i) { return dy.at(i / D, i % D) - qmv[static_cast<size_t>(i)]; }, "dx");
  check_close(R * D, close_wide, [&](int64_t i) { return dv.get(i); }, flat(dv_want), "dv");
  check_close(
      R * R, close_wide, [&](int64_t i) { return dt.get(i); },
      [&](int64_t i) { return transpose ? at(dm, R)(i % R, i / R) : at(dm, R)(i / R, i % R); }, "dt");
  dx.check_gaps("between the rows of dx");
}

// Against reflect's backward: with Q orthogonal, dy = dx Qᵀ has the same gradients.
void test_weight_side(DType dtype, int64_t M, int64_t D, int64_t R, int64_t gap, int threads) {
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Array u(wide, D * R), v(wide, R * D), t(wide, R * R), p(wide, M * R);
  Array dv(wide, R * D), dt(wide, R * R), dv_want(wide, R * D), dt_want(wide, R * R);
  Rows x(dtype, M, D, gap), dx(dtype, M, D, 2 * gap);
  u.fill(1);
  x.fill();
  dx.fill();
  hra::WyFactorFwdParams factor{v.data(), t.data(), u.data(), D, R, wide, false};
  hra::cpu::wy_factor_fwd(factor, threads);
  hra::WeightSideBwdParams params{dv.data(), dt.data(), dx.array.data(), x.array.data(), v.data(), t.data(), M,
                                  D,         R,         dx.stride,       x.stride,       dtype};
  hra::cpu::weight_side_bwd(params, threads);
  // the same rows in the factor's dtype: dy is not rounded to x's
  Rows x_wide(wide, M, D, 0), dx_wide(wide, M, D, 0), dy(wide, M, D, 0);
  for (int64_t i = 0; i < M * D; ++i) {
    x_wide.array.set(i, x.at(i / D, i % D));
    dx_wide.array.set(i, dx.at(i / D, i % D));
  }
  hra::ReflectFwdParams to_dy{
      dy.array.data(), nullptr, dx_wide.array.data(), v.data(), t.data(), M, D, R, D, D, wide, true};
  hra::cpu::reflect_fwd(to_dy, threads);
  Rows y(wide, M, D, 0);
  hra::ReflectFwdParams to_p{y.array.data(), p.data(), x_wide.array.data(), v.data(), t.data(), M, D, R, D, D,
                             wide,           true};
  hra::cpu::reflect_fwd(to_p, threads);
  hra::ReflectBwdParams bwd{nullptr,
                            dv_want.data(),
                            dt_want.data(),
                            dy.array.data(),
                            x_wide.array.data(),
                            v.data(),
                            t.data(),
                            p.data(),
                            M,
                            D,
                            R,
                            0,
                            D,
                            D,
                            wide,
                            true};
  hra::cpu::reflect_bwd(bwd, threads);
  const double allowed = 4 * tolerance(wide) * static_cast<double>(R);
  check_close(
      R * D, allowed, [&](int64_t i) { return dv.get(i); }, [&](int64_t i) { return dv_want.get(i); },
      "weight side dv");
  check_close(
      R * R, allowed, [&](int64_t i) { return dt.get(i); }, [&](int64_t i) { return dt_want.get(i); },
      "weight side dt");
}

struct Factor {
  Array v, t;
  hra::WyFactorFwdParams params{};

  Factor(Array& u, DType dtype, int64_t D, int64_t R, bool apply_gs, int threads)
      : v(dtype == DType::kFloat64 ? dtype : DType::kFloat32, R * D),
        t(dtype == DType::kFloat64 ? dtype : DType::kFloat32, R * R) {
    params.v_ptr = v.data();
    params.t_ptr = t.data();
    params.u_ptr = u.data();
    params.D = D;
    params.R = R;
    params.dtype = dtype;
    params.apply_gs = apply_gs;
    hra::cpu::wy_factor_fwd(params, threads);
  }

  Array backward(Array& dv, Array& dt, int threads) {
    Array du(params.dtype, params.D * params.R);
    hra::WyFactorBwdParams bwd{};
    bwd.du_ptr = du.data();
    bwd.dv_ptr = dv.data();
    bwd.dt_ptr = dt.data();
    bwd.u_ptr = params.u_ptr;
    bwd.v_ptr = v.data();
    bwd.t_ptr = t.data();
    bwd.D = params.D;
    bwd.R = params.R;
    bwd.dtype = params.dtype;
    bwd.apply_gs = params.apply_gs;
    hra::cpu::wy_factor_bwd(bwd, threads);
    return du;
  }
};

double inner(const Array& a, const Array& b) {
  double total = 0;
  for (int64_t i = 0; i < a.count(); ++i) total += a.get(i) * b.get(i);
  return total;
}

void test_wy(DType dtype, int64_t D, int64_t R, bool apply_gs, int threads) {
  const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Array u(dtype, D * R);
  u.fill(1);
  Factor factor(u, dtype, D, R, apply_gs, threads);
  if (!apply_gs) {
    // one row through H_1 ... H_R, and through I - vᵀ t v
    Matrix row(static_cast<size_t>(D)), start;
    for (double& value : row) value = normal();
    start = row;
    for (int64_t r = 0; r < R; ++r) {
      double dot = 0, square = 0;
      for (int64_t d = 0; d < D; ++d) {
        dot += row[static_cast<size_t>(d)] * u.get(d * R + r);
        square += u.get(d * R + r) * u.get(d * R + r);
      }
      for (int64_t d = 0; d < D && square > 0; ++d) row[static_cast<size_t>(d)] -= 2 * dot / square * u.get(d * R + r);
    }
    const auto v_flipped = [&](int64_t d, int64_t r) { return factor.v.get(r * D + d); };
    const Matrix p = product(1, D, R, [&](int64_t, int64_t d) { return start[static_cast<size_t>(d)]; }, v_flipped);
    const Matrix s = product(
        1, R, R, [&](int64_t, int64_t r) { return p[static_cast<size_t>(r)]; },
        [&](int64_t i, int64_t j) { return factor.t.get(i * R + j); });
    const Matrix sv = product(
        1, R, D, [&](int64_t, int64_t r) { return s[static_cast<size_t>(r)]; },
        [&](int64_t r, int64_t d) { return factor.v.get(r * D + d); });
    check_close(
        D, 20 * tolerance(wide) * static_cast<double>(R),
        [&](int64_t d) { return start[static_cast<size_t>(d)] - sv[static_cast<size_t>(d)]; },
        [&](int64_t d) { return row[static_cast<size_t>(d)]; }, "v and t as a chain");
  }
  // d<dv, v> + d<dt, t> along a direction, against a central difference
  Array dv(wide, R * D), dt(wide, R * R);
  dv.fill(1);
  dt.fill(1);
  const Array du = factor.backward(dv, dt, threads);
  if (dtype != DType::kFloat64 || D == 0) return;
  const double step = 1e-6;
  Array up(dtype, u.count()), down(dtype, u.count()), along(dtype, R * D);
  along.fill(1);
  for (int64_t d = 0; d < D; ++d)
    for (int64_t r = 0; r < R; ++r) {
      up.set(d * R + r, u.get(d * R + r) + step * along.get(d * R + r));
      down.set(d * R + r, u.get(d * R + r) - step * along.get(d * R + r));
    }
  Factor above(up, dtype, D, R, apply_gs, threads), below(down, dtype, D, R, apply_gs, threads);
  const double difference =
      (inner(dv, above.v) + inner(dt, above.t) - inner(dv, below.v) - inner(dt, below.t)) / (2 * step);
  const double slope = inner(du, along);
  check(std::fabs(slope - difference) <= 1e-4 * std::fmax(1, std::sqrt(inner(du, du))), "du against a difference");
}

// Values no kernel can do sums with: nothing may crash or run on, and NaN in a row of x stays in its row.
void test_hostile(DType dtype) {
  const int64_t M = 13, D = 37, R = 5;
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {std::nan(""), infinity, -infinity, 0.0, 1e-310, 1e-42, 1e-20, 1e30, 1e300}) {
    for (const bool apply_gs : {false, true}) {
      Array u(dtype, D * R);
      u.fill(1);
      for (int64_t d = 0; d < D; ++d) u.set(d * R + 1, bad);
      u.set(3 * R + 4, bad);
      Factor factor(u, dtype, D, R, apply_gs, 1);
      Array dv(dtype == DType::kFloat64 ? dtype : DType::kFloat32, R * D),
          dt(dtype == DType::kFloat64 ? dtype : DType::kFloat32, R * R);
      dv.fill(bad);
      dt.fill(bad);
      factor.backward(dv, dt, 1);
    }
    Rows x(dtype, M, D, 0), y(dtype, M, D, 0);
    const DType wide = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    Array v(wide, R * D), t(wide, R * R);
    x.fill();
    v.fill(0.1);
    t.fill(0.1);
    x.array.set(4 * D + 2, bad);
    hra::ReflectFwdParams fwd{};
    fwd.y_ptr = y.array.data();
    fwd.x_ptr = x.array.data();
    fwd.v_ptr = v.data();
    fwd.t_ptr = t.data();
    fwd.M = M;
    fwd.D = D;
    fwd.R = R;
    fwd.stride_ym = fwd.stride_xm = D;
    fwd.dtype = dtype;
    hra::cpu::reflect_fwd(fwd, 1);
    bool row_is_nan = true, others_finite = true;
    for (int64_t m = 0; m < M; ++m)
      for (int64_t d = 0; d < D; ++d) (m == 4 ? row_is_nan : others_finite) &= std::isnan(y.at(m, d)) == (m == 4);
    check(!std::isnan(bad) || row_is_nan, "NaN in a row of x fills its row of y");
    check(others_finite, "the other rows stay");
  }
}

}  // namespace

// Fresh memory is NaN in every dtype: a kernel that reads scratch memory before it wrote it shows.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "max_malloc_fill_size=1000000000:malloc_fill_byte=255";
}

int main() {
  const char* const dtype_names[] = {"float32", "float64", "bfloat16", "float16"};
  int isas = 0;
  const char* const* names = hra::cpu::available_isas(&isas);
  for (int isa = 0; isa < isas; ++isa) {
    hra::cpu::set_isa(names[isa]);
    for (int code = 0; code < 4; ++code) {
      const auto dtype = static_cast<DType>(code);
      running = std::string(names[isa]) + " " + dtype_names[code];
      const int before = checks;
      for (const int64_t R : {1, 2, 3, 4, 5, 8, 9, 12, 17, 31}) {
        const int64_t sizes[][2] = {{0, 5}, {1, 1}, {4, 0}, {3, 7}, {7, 64}, {13, 33}, {50, 97}, {2, 801}};
        for (const auto& size : sizes) {
          running = std::string(names[isa]) + " " + dtype_names[code] + " M=" + std::to_string(size[0]) +
                    " D=" + std::to_string(size[1]) + " R=" + std::to_string(R);
          test_reflect(dtype, size[0], size[1], R, size[0] % 3, R % 2 == 0, 1);
          test_weight_side(dtype, size[0], size[1], R, size[0] % 3, 1);
        }
      }
      running = std::string(names[isa]) + " " + dtype_names[code] + " three threads";
      test_reflect(dtype, 173, 353, 9, 1, true, 3);
      test_reflect(dtype, 64, 70, 256, 0, false, 3);
      test_weight_side(dtype, 173, 353, 9, 1, 3);
      test_weight_side(dtype, 64, 1100, 37, 0, 3);
      for (const bool apply_gs : {false, true}) {
        for (const int64_t R : {1, 2, 3, 4, 7, 8, 13, 16}) {
          for (const int64_t D : {0, 29, 64, 131}) {
            running = std::string(names[isa]) + " " + dtype_names[code] + " D=" + std::to_string(D) +
                      " R=" + std::to_string(R) + (apply_gs ? " Gram-Schmidt" : "");
            test_wy(dtype, D, R, apply_gs, 1);
          }
        }
        test_wy(dtype, 130, 64, apply_gs, 3);
      }
      running = std::string(names[isa]) + " " + dtype_names[code] + " hostile";
      test_hostile(dtype);
      std::printf("%s %s: %d checks\n", names[isa], dtype_names[code], checks - before);
    }
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
