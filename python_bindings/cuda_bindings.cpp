// hra_kernels._cuda: device pointers and sizes in, checked here, passed on to csrc/hra.h (namespace cuda). The same
// source, with HRA_EMULATION, is the module `_emulated`, whose device is the model in tests/cuda/emulation.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "hra.h"

#ifdef HRA_EMULATION
#include "emulation/machine.h"
#endif

namespace py = pybind11;

namespace {

using hra::DType;

[[noreturn]] void reject(const char* op, const char* argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(op) + ": " + argument + " must be " + expected + ", got " + got);
}

void check(const char* op, hra::cuda::Status status) {
  if (status != 0) throw std::runtime_error(std::string(op) + ": " + hra::cuda::describe(status));
}

DType dtype_of(const char* op, int code) {
  const auto dtype = static_cast<DType>(code);
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    reject(op, "dtype", "2 (bfloat16) or 3 (float16)", std::to_string(code));
  }
  return dtype;
}

void check_sizes(const char* op, int64_t M, int64_t D, int64_t R, bool backward, int64_t slice) {
  if (slice != 512 && slice != 1024 && (backward || slice != 2048)) {
    reject(op, "slice", backward ? "512 or 1024" : "512, 1024 or 2048", std::to_string(slice));
  }
  if (M < 0) reject(op, "M", "at least 0", std::to_string(M));
  const int64_t widest = hra::cuda::kLargestCluster * slice;
  if (D < 0 || D > widest) reject(op, "D", "between 0 and " + std::to_string(widest), std::to_string(D));
  if (R < 0 || R > hra::cuda::kMaxRank) {
    reject(op, "R", "between 0 and " + std::to_string(hra::cuda::kMaxRank), std::to_string(R));
  }
}

hra::cuda::Clusters clusters_of(const char* op, int64_t slice, int64_t clusters) {
  if (clusters < 1) reject(op, "clusters", "at least 1", std::to_string(clusters));
  return {slice, clusters};
}

int64_t resident_clusters(bool backward, int64_t D, int64_t R, int dtype, int64_t slice) {
  const char* op = "resident_clusters";
  check_sizes(op, 0, D, R, backward, slice);
  int64_t count = 0;
  check(op, hra::cuda::resident_clusters(backward, D, R, dtype_of(op, dtype), slice, count));
  return count;
}

// Null is for tensors without elements.
void* pointer(const char* op, const char* name, uintptr_t value, int64_t elements) {
  if (value == 0 && elements > 0) reject(op, name, "a pointer to " + std::to_string(elements) + " elements", "null");
  return reinterpret_cast<void*>(value);
}

void check_stride(const char* op, const char* name, int64_t stride, int64_t least, int64_t rows) {
  if (rows > 1 && stride < least) reject(op, name, "at least " + std::to_string(least), std::to_string(stride));
}

void reflect_fwd(uintptr_t y, uintptr_t p, uintptr_t x, uintptr_t v, uintptr_t t, int64_t M, int64_t D, int64_t R,
                 int64_t stride_ym, int64_t stride_xm, int dtype, bool transpose, int64_t slice, int64_t clusters,
                 uintptr_t stream) {
  const char* op = "reflect_fwd";
  check_sizes(op, M, D, R, false, slice);
  check_stride(op, "stride_ym", stride_ym, D, M);
  check_stride(op, "stride_xm", stride_xm, 0, M);
  hra::ReflectFwdParams params{};
  params.y_ptr = pointer(op, "y", y, M * D);
  params.p_ptr = pointer(op, "p", p, 0);
  params.x_ptr = pointer(op, "x", x, M * D);
  params.v_ptr = pointer(op, "v", v, R * D);
  params.t_ptr = pointer(op, "t", t, R * R);
  params.M = M;
  params.D = D;
  params.R = R;
  params.stride_ym = stride_ym;
  params.stride_xm = stride_xm;
  params.dtype = dtype_of(op, dtype);
  params.transpose = transpose;
  const hra::cuda::Clusters found = clusters_of(op, slice, clusters);
  const py::gil_scoped_release release;
  check(op, hra::cuda::reflect_fwd(params, found, reinterpret_cast<void*>(stream)));
}

int64_t reflect_bwd_workspace_bytes(int64_t M, int64_t D, int64_t R, int64_t slice, int64_t clusters) {
  const char* op = "reflect_bwd";
  check_sizes(op, M, D, R, true, slice);
  return hra::cuda::reflect_bwd_workspace_bytes(M, D, R, clusters_of(op, slice, clusters));
}

void reflect_bwd(uintptr_t dx, uintptr_t dv, uintptr_t dt, uintptr_t dy, uintptr_t x, uintptr_t v, uintptr_t t,
                 uintptr_t p, int64_t M, int64_t D, int64_t R, int64_t stride_dxm, int64_t stride_dym,
                 int64_t stride_xm, int dtype, bool transpose, int64_t slice, int64_t clusters, uintptr_t workspace,
                 int64_t workspace_bytes, uintptr_t stream) {
  const char* op = "reflect_bwd";
  check_sizes(op, M, D, R, true, slice);
  check_stride(op, "stride_dxm", stride_dxm, D, M);
  check_stride(op, "stride_dym", stride_dym, 0, M);
  check_stride(op, "stride_xm", stride_xm, 0, M);
  hra::ReflectBwdParams params{};
  params.dx_ptr = pointer(op, "dx", dx, M * D);
  params.dv_ptr = pointer(op, "dv", dv, R * D);
  params.dt_ptr = pointer(op, "dt", dt, R * R);
  params.dy_ptr = pointer(op, "dy", dy, M * D);
  params.x_ptr = pointer(op, "x", x, M * D);
  params.v_ptr = pointer(op, "v", v, R * D);
  params.t_ptr = pointer(op, "t", t, R * R);
  params.p_ptr = pointer(op, "p", p, M * R);
  params.M = M;
  params.D = D;
  params.R = R;
  params.stride_dxm = stride_dxm;
  params.stride_dym = stride_dym;
  params.stride_xm = stride_xm;
  params.dtype = dtype_of(op, dtype);
  params.transpose = transpose;
  const hra::cuda::Clusters found = clusters_of(op, slice, clusters);
  const int64_t needed = hra::cuda::reflect_bwd_workspace_bytes(M, D, R, found);
  if (workspace_bytes < needed) {
    reject(op, "workspace_bytes", "at least " + std::to_string(needed), std::to_string(workspace_bytes));
  }
  if (workspace % 16) {
    reject(op, "workspace", "16-byte aligned", "an address " + std::to_string(workspace % 16) + " past");
  }
  const py::gil_scoped_release release;
  check(op, hra::cuda::reflect_bwd(params, found, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream)));
}

#ifdef HRA_EMULATION
// (blocks, blocks per cluster, bytes of shared memory) of each launch since the last call
std::vector<std::tuple<unsigned, unsigned, size_t>> launches() {
  std::vector<std::tuple<unsigned, unsigned, size_t>> result;
  for (const auto& shape : hra::emulation::take_launches()) {
    result.emplace_back(shape.blocks, shape.cluster, shape.shared_bytes);
  }
  return result;
}

void emulate(uint64_t seed) { hra::emulation::options = {seed}; }
#endif

}  // namespace

PYBIND11_MODULE(HRA_MODULE_NAME, m) {
  using namespace py::literals;
  m.doc() = "CUDA kernels of hra_kernels; see csrc/hra.h.";
  m.attr("MAX_RANK") = hra::cuda::kMaxRank;
  m.attr("LARGEST_CLUSTER") = hra::cuda::kLargestCluster;
  m.def("resident_clusters", &resident_clusters, "backward"_a, "D"_a, "R"_a, "dtype"_a, "slice"_a);
  m.def("reflect_fwd", &reflect_fwd, "y"_a, "p"_a, "x"_a, "v"_a, "t"_a, "M"_a, "D"_a, "R"_a, "stride_ym"_a,
        "stride_xm"_a, "dtype"_a, "transpose"_a, "slice"_a, "clusters"_a, "stream"_a);
  m.def("reflect_bwd_workspace_bytes", &reflect_bwd_workspace_bytes, "M"_a, "D"_a, "R"_a, "slice"_a, "clusters"_a);
  m.def("reflect_bwd", &reflect_bwd, "dx"_a, "dv"_a, "dt"_a, "dy"_a, "x"_a, "v"_a, "t"_a, "p"_a, "M"_a, "D"_a, "R"_a,
        "stride_dxm"_a, "stride_dym"_a, "stride_xm"_a, "dtype"_a, "transpose"_a, "slice"_a, "clusters"_a, "workspace"_a,
        "workspace_bytes"_a, "stream"_a);
#ifdef HRA_EMULATION
  m.def("launches", &launches, "(blocks, blocks per cluster, shared bytes) of each launch since the last call.");
  m.def("emulate", &emulate, "seed"_a, "Chooses the schedule of the launches that follow.");
#endif
}
