// What the reflect kernels share: problem sizes, the R x R step between the two products, and the host's dispatch.
#pragma once

#include "launch.h"
#include "tiles.h"

namespace hra::cuda {

using device::bf16;
using device::fp16;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
bool allows_vectors(const T* ptr, int64_t stride) {
  return reinterpret_cast<uintptr_t>(ptr) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

// A (rows, columns) matrix of the host's untyped pointers.
template <typename T, typename Void>
device::Rows<T> rows_of(Void* ptr, int64_t rows, int64_t columns, int64_t stride) {
  auto* typed = static_cast<T*>(ptr);
  return {typed, rows, columns, stride, allows_vectors(typed, stride)};
}

// m = t, or its transpose.
struct Middle {
  const float* t;  // (R, R)
  int R;
  bool transpose;

  Middle transposed() const { return {t, R, !transpose}; }
};

// (row m)[column], the row having R entries.
__device__ __forceinline__ float times_middle(const float* row, const Middle& m, int column) {
  float sum = 0;
  if (column < m.R) {
    const float* t = m.t + (m.transpose ? static_cast<int64_t>(column) * m.R : column);
    const int step = m.transpose ? 1 : m.R;
    for (int i = 0; i < m.R; ++i) sum += row[i] * t[i * step];
  }
  return sum;
}

// A rank as a type: with_rank and with_dtype call visit with the types of the instantiation that serves (dtype, R).
template <int kRank>
struct PaddedRank {
  static constexpr int value = kRank;
};

template <typename T, typename Visitor>
Status with_rank(int64_t R, Visitor visit) {
  if (R <= 16) return visit(PaddedRank<16>{});
  if constexpr (sizeof(T) == 2) {
    if (R <= 32) return visit(PaddedRank<32>{});
  }
  return visit(PaddedRank<64>{});
}

template <typename Visitor>
Status with_dtype(DType dtype, Visitor visit) {
  if (dtype == DType::kBFloat16) return visit(bf16{});
  if (dtype == DType::kFloat16) return visit(fp16{});
  return visit(float{});
}

}  // namespace hra::cuda
