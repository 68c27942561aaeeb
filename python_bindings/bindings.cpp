// hra_kernels._native: integers in, checked here, passed on to csrc/hra.h. Pointers are tensors' data_ptr(); outputs
// come first. Every call releases the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "hra.h"

namespace py = pybind11;

namespace {

using hra::DType;

[[noreturn]] void fail(const char* op, const char* argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(op) + ": " + argument + " must be " + expected + ", got " + got);
}

// One call's arguments while they are checked.
class Call {
 public:
  Call(const char* op, int dtype, int num_threads) : op_(op) {
    if (dtype < 0 || dtype > 3)
      fail(op, "dtype", "0 (float32), 1 (float64), 2 (bfloat16) or 3 (float16)", std::to_string(dtype));
    if (num_threads < 1) fail(op, "num_threads", "at least 1", std::to_string(num_threads));
    dtype_ = static_cast<DType>(dtype);
  }

  DType dtype() const { return dtype_; }

  void size(const char* name, int64_t value) const {
    if (value < 0) fail(op_, name, "at least 0", std::to_string(value));
  }
  void rank(int64_t value) const {
    if (value < 1 || value > hra::kMaxRank)
      fail(op_, "R", "between 1 and " + std::to_string(hra::kMaxRank), std::to_string(value));
  }
  // Rows of an output may not overlap; those of an input may, as in an expanded tensor.
  void output_stride(const char* name, int64_t value, int64_t rows, int64_t columns) const {
    if (rows > 1 && value < columns)
      fail(op_, name, "at least the row's " + std::to_string(columns) + " elements", std::to_string(value));
  }
  void input_stride(const char* name, int64_t value) const {
    if (value < 0) fail(op_, name, "at least 0", std::to_string(value));
  }

  // A pointer to `count` elements of the activations' dtype, or of the factor's.
  template <class T = void>
  T* activation(const char* name, uintptr_t value, int64_t count) const {
    return static_cast<T*>(pointer(name, value, count, element_size()));
  }
  template <class T = void>
  T* factor(const char* name, uintptr_t value, int64_t count) const {
    return static_cast<T*>(pointer(name, value, count, dtype_ == DType::kFloat64 ? 8 : 4));
  }
  // Of the activations' dtype, in bytes.
  uintptr_t element_size() const { return dtype_ == DType::kFloat64 ? 8 : dtype_ == DType::kFloat32 ? 4 : 2; }

 private:
  void* pointer(const char* name, uintptr_t value, int64_t count, uintptr_t alignment) const {
    if (value == 0 && count > 0) fail(op_, name, "a pointer to " + std::to_string(count) + " elements", "null");
    if (value % alignment != 0)
      fail(op_, name, "aligned to its " + std::to_string(alignment) + "-byte elements",
           "an address " + std::to_string(value % alignment) + " bytes past one");
    return reinterpret_cast<void*>(value);
  }

  const char* op_;
  DType dtype_ = DType::kFloat32;
};

void reflect_fwd(uintptr_t y, uintptr_t p, uintptr_t x, uintptr_t v, uintptr_t t, int64_t M, int64_t D, int64_t R,
                 int64_t stride_ym, int64_t stride_xm, int dtype, bool transpose, int num_threads) {
  const Call call("reflect_fwd", dtype, num_threads);
  call.size("M", M);
  call.size("D", D);
  call.rank(R);
  call.output_stride("stride_ym", stride_ym, M, D);
  call.input_stride("stride_xm", stride_xm);
  hra::ReflectFwdParams params{};
  params.y_ptr = call.activation("y", y, M * D);
  params.p_ptr = call.factor("p", p, 0);
  params.x_ptr = call.activation("x", x, M * D);
  params.v_ptr = call.factor("v", v, R * D);
  params.t_ptr = call.factor("t", t, R * R);
  params.M = M;
  params.D = D;
  params.R = R;
  params.stride_ym = stride_ym;
  params.stride_xm = stride_xm;
  params.dtype = call.dtype();
  params.transpose = transpose;
  const py::gil_scoped_release release;
  hra::cpu::reflect_fwd(params, num_threads);
}

void reflect_bwd(uintptr_t dx, uintptr_t dv, uintptr_t dt, uintptr_t dy, uintptr_t x, uintptr_t v, uintptr_t t,
                 uintptr_t p, int64_t M, int64_t D, int64_t R, int64_t stride_dxm, int64_t stride_dym,
                 int64_t stride_xm, int dtype, bool transpose, int num_threads) {
  const Call call("reflect_bwd", dtype, num_threads);
  call.size("M", M);
  call.size("D", D);
  call.rank(R);
  if (dx != 0) call.output_stride("stride_dxm", stride_dxm, M, D);
  call.input_stride("stride_dym", stride_dym);
  call.input_stride("stride_xm", stride_xm);
  hra::ReflectBwdParams params{};
  params.dx_ptr = call.activation("dx", dx, 0);
  params.dv_ptr = call.factor("dv", dv, 0);
  params.dt_ptr = call.factor("dt", dt, 0);
  params.dy_ptr = call.activation("dy", dy, M * D);
  params.x_ptr = call.activation("x", x, dv != 0 ? M * D : 0);
  params.v_ptr = call.factor("v", v, R * D);
  params.t_ptr = call.factor("t", t, R * R);
  params.p_ptr = call.factor("p", p, dv != 0 || dt != 0 ? M * R : 0);
  params.M = M;
  params.D = D;
  params.R = R;
  params.stride_dxm = stride_dxm;
  params.stride_dym = stride_dym;
  params.stride_xm = stride_xm;
  params.dtype = call.dtype();
  params.transpose = transpose;
  const py::gil_scoped_release release;
  hra::cpu::reflect_bwd(params, num_threads);
}

void weight_side_bwd(uintptr_t dv, uintptr_t dt, uintptr_t dx, uintptr_t x, uintptr_t v, uintptr_t t, int64_t M,
                     int64_t D, int64_t R, int64_t stride_dxm, int64_t stride_xm, int dtype, int num_threads) {
  const Call call("weight_side_bwd", dtype, num_threads);
  call.size("M", M);
  call.size("D", D);
  call.rank(R);
  call.input_stride("stride_dxm", stride_dxm);
  call.input_stride("stride_xm", stride_xm);
  hra::WeightSideBwdParams params{};
  params.dv_ptr = call.factor("dv", dv, R * D);
  params.dt_ptr = call.factor("dt", dt, R * R);
  params.dx_ptr = call.activation("dx", dx, M * D);
  params.x_ptr = call.activation("x", x, M * D);
  params.v_ptr = call.factor("v", v, R * D);
  params.t_ptr = call.factor("t", t, R * R);
  params.M = M;
  params.D = D;
  params.R = R;
  params.stride_dxm = stride_dxm;
  params.stride_xm = stride_xm;
  params.dtype = call.dtype();
  const py::gil_scoped_release release;
  hra::cpu::weight_side_bwd(params, num_threads);
}

// With a `copy` of u (0: none is wanted) the factor is the copy's: others may write to u meanwhile.
void wy_factor_fwd(uintptr_t v, uintptr_t t, uintptr_t copy, uintptr_t u, int64_t D, int64_t R, int dtype,
                   bool apply_gs, int num_threads) {
  const Call call("wy_factor_fwd", dtype, num_threads);
  call.size("D", D);
  call.rank(R);
  hra::WyFactorFwdParams params{};
  params.v_ptr = call.factor("v", v, R * D);
  params.t_ptr = call.factor("t", t, R * R);
  params.u_ptr = call.activation("u", u, R * D);
  params.D = D;
  params.R = R;
  params.dtype = call.dtype();
  params.apply_gs = apply_gs;
  void* const copy_ptr = copy == 0 ? nullptr : call.activation("copy", copy, R * D);
  const py::gil_scoped_release release;
  if (copy_ptr != nullptr) {
    std::memcpy(copy_ptr, params.u_ptr, static_cast<size_t>(R * D) * call.element_size());
    params.u_ptr = copy_ptr;
  }
  hra::cpu::wy_factor_fwd(params, num_threads);
}

void wy_factor_bwd(uintptr_t du, uintptr_t dv, uintptr_t dt, uintptr_t u, uintptr_t v, uintptr_t t, int64_t D,
                   int64_t R, int dtype, bool apply_gs, int num_threads) {
  const Call call("wy_factor_bwd", dtype, num_threads);
  call.size("D", D);
  call.rank(R);
  hra::WyFactorBwdParams params{};
  params.du_ptr = call.activation("du", du, R * D);
  params.dv_ptr = call.factor("dv", dv, R * D);
  params.dt_ptr = call.factor("dt", dt, R * R);
  params.u_ptr = call.activation("u", u, R * D);
  params.v_ptr = call.factor("v", v, R * D);
  params.t_ptr = call.factor("t", t, R * R);
  params.D = D;
  params.R = R;
  params.dtype = call.dtype();
  params.apply_gs = apply_gs;
  const py::gil_scoped_release release;
  hra::cpu::wy_factor_bwd(params, num_threads);
}

// reflect_bwd, then wy_factor_bwd of the dv and dt that it gives.
void chain_bwd(uintptr_t dx, uintptr_t du, uintptr_t dy, uintptr_t x, uintptr_t u, uintptr_t v, uintptr_t t,
               uintptr_t p, int64_t M, int64_t D, int64_t R, int64_t stride_dym, int64_t stride_xm, int dtype,
               int dtype_u, bool transpose, bool apply_gs, int num_threads) {
  const Call call("chain_bwd", dtype, num_threads), call_u("chain_bwd", dtype_u, num_threads);
  if ((call.dtype() == DType::kFloat64) != (call_u.dtype() == DType::kFloat64))
    fail("chain_bwd", "dtype_u", "float64 where dtype is, and only there", std::to_string(dtype_u));
  call.size("D", D);
  call.rank(R);
  const int64_t element = call.dtype() == DType::kFloat64 ? 8 : 4;
  const std::unique_ptr<char[]> memory(new char[static_cast<size_t>((R * D + R * R) * element)]);
  const auto dv = reinterpret_cast<uintptr_t>(memory.get()), dt = dv + static_cast<uintptr_t>(R * D * element);
  reflect_bwd(dx, dv, dt, dy, x, v, t, p, M, D, R, D, stride_dym, stride_xm, dtype, transpose, num_threads);
  wy_factor_bwd(du, dv, dt, u, v, t, D, R, dtype_u, apply_gs, num_threads);
}

// Whether the same bytes lie in two places.
bool same_bytes(uintptr_t a, uintptr_t b, int64_t bytes) {
  if (bytes < 0) fail("same_bytes", "bytes", "at least 0", std::to_string(bytes));
  if (bytes > 0 && (a == 0 || b == 0))
    fail("same_bytes", a == 0 ? "a" : "b", "a pointer to " + std::to_string(bytes) + " bytes", "null");
  const py::gil_scoped_release release;
  return bytes == 0 || std::memcmp(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                                   static_cast<size_t>(bytes)) == 0;
}

py::tuple isas() {
  int count = 0;
  const char* const* names = hra::cpu::available_isas(&count);
  py::tuple result(count);
  for (int i = 0; i < count; ++i) result[i] = py::str(names[i]);
  return result;
}

void set_isa(const std::string& name) {
  if (hra::cpu::set_isa(name.c_str())) return;
  std::string expected = "one of";
  for (const auto& isa : isas()) expected += " " + isa.cast<std::string>();
  fail("set_isa", "name", expected, "'" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of hra_kernels; see csrc/hra.h.";
  using namespace py::literals;
  m.def("reflect_fwd", &reflect_fwd, "y"_a, "p"_a, "x"_a, "v"_a, "t"_a, "M"_a, "D"_a, "R"_a, "stride_ym"_a,
        "stride_xm"_a, "dtype"_a, "transpose"_a, "num_threads"_a);
  m.def("reflect_bwd", &reflect_bwd, "dx"_a, "dv"_a, "dt"_a, "dy"_a, "x"_a, "v"_a, "t"_a, "p"_a, "M"_a, "D"_a, "R"_a,
        "stride_dxm"_a, "stride_dym"_a, "stride_xm"_a, "dtype"_a, "transpose"_a, "num_threads"_a);
  m.def("weight_side_bwd", &weight_side_bwd, "dv"_a, "dt"_a, "dx"_a, "x"_a, "v"_a, "t"_a, "M"_a, "D"_a, "R"_a,
        "stride_dxm"_a, "stride_xm"_a, "dtype"_a, "num_threads"_a);
  m.def("wy_factor_fwd", &wy_factor_fwd, "v"_a, "t"_a, "copy"_a, "u"_a, "D"_a, "R"_a, "dtype"_a, "apply_gs"_a,
        "num_threads"_a);
  m.def("wy_factor_bwd", &wy_factor_bwd, "du"_a, "dv"_a, "dt"_a, "u"_a, "v"_a, "t"_a, "D"_a, "R"_a, "dtype"_a,
        "apply_gs"_a, "num_threads"_a);
  m.def("chain_bwd", &chain_bwd, "dx"_a, "du"_a, "dy"_a, "x"_a, "u"_a, "v"_a, "t"_a, "p"_a, "M"_a, "D"_a, "R"_a,
        "stride_dym"_a, "stride_xm"_a, "dtype"_a, "dtype_u"_a, "transpose"_a, "apply_gs"_a, "num_threads"_a);
  m.def("same_bytes", &same_bytes, "a"_a, "b"_a, "bytes"_a);
  m.def("isa", &hra::cpu::isa);
  m.def("isas", &isas);
  m.def("set_isa", &set_isa, "name"_a);
  m.def("thread_pool", &hra::cpu::thread_pool);
}
