// How the host starts a kernel: on the given stream, without synchronizing, allocating or printing.
#pragma once

#include "../hra.h"
#include "device.h"

#ifdef HRA_EMULATION
#define HRA_GRID_CONSTANT
#else
#define HRA_GRID_CONSTANT __grid_constant__
#endif

namespace hra::cuda {

struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  void* stream;
  int cluster = 0;  // blocks that form a cluster; 0: the kernel knows no clusters
};

#ifdef HRA_EMULATION

Status report(const std::string& message);

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  emulation::LaunchShape shape;
  shape.blocks = static_cast<unsigned>(how.blocks);
  shape.threads = static_cast<unsigned>(how.threads);
  shape.cluster = how.cluster > 0 ? static_cast<unsigned>(how.cluster) : 1;
  shape.shared_bytes = static_cast<size_t>(how.shared_bytes);
  return report(emulation::run(shape, [&] { kernel(arguments...); }));
}

// How many clusters of this kernel run at once.
template <typename... Parameters>
Status count_resident(void (*)(Parameters...), const Launch&, int64_t& clusters) {
  clusters = 2;  // more than one, so that persistent kernels are seen both to loop and to share out their work
  return 0;
}

#else

namespace detail {

// The runtime's configuration for `how`; `attribute` must outlive it.
cudaLaunchConfig_t configuration(const Launch& how, cudaLaunchAttribute* attribute);

// What a kernel of clusters may ask for, set once for each kernel and device.
cudaError_t allow_clusters(const void* kernel);

Status count_resident(const void* kernel, const Launch& how, int64_t& clusters);

}  // namespace detail

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  if (how.cluster > 0) {
    const cudaError_t error = detail::allow_clusters(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t configuration = detail::configuration(how, &attribute);
  return cudaLaunchKernelEx(&configuration, kernel, static_cast<Parameters>(arguments)...);
}

// How many clusters of this kernel run at once; 0 where the device forms none of this size.
template <typename... Parameters>
Status count_resident(void (*kernel)(Parameters...), const Launch& how, int64_t& clusters) {
  return detail::count_resident(reinterpret_cast<const void*>(kernel), how, clusters);
}

#endif

}  // namespace hra::cuda
