// Chooses the instruction set once, at load time.
#include <atomic>
#include <cstring>

#include "internal.h"

namespace hra::cpu {

#define HRA_DECLARE_KERNELS(isa)                                     \
  namespace isa {                                                    \
  void reflect_fwd(const ReflectFwdParams&, int num_threads);        \
  void reflect_bwd(const ReflectBwdParams&, int num_threads);        \
  void weight_side_bwd(const WeightSideBwdParams&, int num_threads); \
  void wy_factor_fwd(const WyFactorFwdParams&, int num_threads);     \
  void wy_factor_bwd(const WyFactorBwdParams&, int num_threads);     \
  }
#define HRA_KERNELS(isa) \
  {#isa, isa::reflect_fwd, isa::reflect_bwd, isa::weight_side_bwd, isa::wy_factor_fwd, isa::wy_factor_bwd}

#if defined(HRA_X86_ISAS)
HRA_DECLARE_KERNELS(avx512)
HRA_DECLARE_KERNELS(avx2)
#endif
HRA_DECLARE_KERNELS(baseline)

namespace {

constexpr int kMaxIsas = 3;

struct Available {
  Kernels kernels[kMaxIsas];
  const char* names[kMaxIsas];
  int count = 0;

  void add(const Kernels& entry) {
    kernels[count] = entry;
    names[count++] = entry.name;
  }

  Available() {
#if defined(HRA_X86_ISAS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      add(HRA_KERNELS(avx512));
    if (avx2) add(HRA_KERNELS(avx2));
#endif
    add(HRA_KERNELS(baseline));
  }
};

const Available& available() {
  static const Available found;
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{&available().kernels[0]};
  return kernels;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

int64_t element_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  return 0;
}

}  // namespace

const char* isa() { return kernels().name; }

const char* const* available_isas(int* count) {
  *count = available().count;
  return available().names;
}

bool set_isa(const char* name) {
  for (int i = 0; i < available().count; ++i)
    if (std::strcmp(available().names[i], name) == 0) {
      chosen() = &available().kernels[i];
      return true;
    }
  return false;
}

void reflect_fwd(const ReflectFwdParams& params, int num_threads) {
  if (params.stride_ym == params.D) will_write(params.y_ptr, params.M * params.D * element_bytes(params.dtype));
  kernels().reflect_fwd(params, num_threads);
}

void reflect_bwd(const ReflectBwdParams& params, int num_threads) {
  if (params.dx_ptr != nullptr && params.stride_dxm == params.D)
    will_write(params.dx_ptr, params.M * params.D * element_bytes(params.dtype));
  kernels().reflect_bwd(params, num_threads);
}

void weight_side_bwd(const WeightSideBwdParams& params, int num_threads) {
  kernels().weight_side_bwd(params, num_threads);
}
void wy_factor_fwd(const WyFactorFwdParams& params, int num_threads) { kernels().wy_factor_fwd(params, num_threads); }
void wy_factor_bwd(const WyFactorBwdParams& params, int num_threads) { kernels().wy_factor_bwd(params, num_threads); }

}  // namespace hra::cpu
