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
  int64_t grid_x;
  int64_t grid_y;
  int threads;
  int64_t shared_bytes;
  void* stream;
  int cluster = 0;  // blocks along x that form a cluster; 0: the kernel knows no clusters
};

struct Device {
  int capability;  // times ten
  int multiprocessors;
  int64_t shared_bytes;  // most that one block can ask for
};

#ifdef HRA_EMULATION

Status report(const std::string& message);
Status current_device(Device& device);

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  emulation::LaunchShape shape;
  shape.grid = {static_cast<unsigned>(how.grid_x), static_cast<unsigned>(how.grid_y), 1};
  shape.threads = static_cast<unsigned>(how.threads);
  shape.cluster = how.cluster > 0 ? static_cast<unsigned>(how.cluster) : 1;
  shape.shared_bytes = static_cast<size_t>(how.shared_bytes);
  return report(emulation::run(shape, [&] { kernel(arguments...); }));
}

// How many clusters of this kernel run at once.
template <typename... Parameters>
Status resident_clusters(void (*)(Parameters...), const Launch&, int64_t& clusters) {
  clusters = 2;  // more than one, so that persistent kernels are seen both to loop and to share out their work
  return 0;
}

#else

Status current_device(Device& device);

namespace detail {

// The runtime's configuration for `how`; `attribute` must outlive it.
cudaLaunchConfig_t configuration(const Launch& how, cudaLaunchAttribute* attribute);

// Asks the driver once for each kernel, launch shape and device, and remembers: it takes microseconds to answer.
Status resident_clusters(const void* kernel, const Launch& how, int64_t& clusters);

template <typename Kernel>
cudaError_t allow(Kernel kernel, const Launch& how) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (how.shared_bytes > (48 << 10)) {
    cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(how.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  return how.cluster > 8 ? cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)
                         : cudaSuccess;
}

}  // namespace detail

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), const Launch& how, const Arguments&... arguments) {
  cudaError_t error = detail::allow(kernel, how);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t configuration = detail::configuration(how, &attribute);
  return cudaLaunchKernelEx(&configuration, kernel, static_cast<Parameters>(arguments)...);
}

// How many clusters of this kernel run at once.
template <typename... Parameters>
Status resident_clusters(void (*kernel)(Parameters...), const Launch& how, int64_t& clusters) {
  cudaError_t error = detail::allow(kernel, how);
  if (error != cudaSuccess) return error;
  return detail::resident_clusters(reinterpret_cast<const void*>(kernel), how, clusters);
}

#endif

}  // namespace hra::cuda
