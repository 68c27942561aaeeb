// As much of CUDA's runtime as the launcher calls, counted instead of done; device code is parsed and never compiled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#define __global__
#define __host__
#define __device__
#define __shared__
#define __align__(bytes)
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_, unsigned z_) : x(x_), y(y_), z(z_) {}
  dim3() : dim3(1, 1, 1) {}
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline dim3 threadIdx, blockIdx, gridDim;
size_t __cvta_generic_to_shared(const void*);
void __syncthreads();
void __syncwarp();
void __trap();
float __shfl_xor_sync(unsigned, float, int);
float __uint_as_float(unsigned);

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
using cudaStream_t = struct Stream*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {

using Setting = std::tuple<int, const void*, int>;  // device, kernel, attribute
inline std::mutex mutex;
inline std::map<Setting, int> times, values;
inline int unready = 0;  // launches of kernels that had not all of their attributes
inline bool refuse = false, pending = false;
inline thread_local int device = 0;

}  // namespace fake

inline const char* cudaGetErrorString(cudaError_t) { return "refused"; }
inline cudaError_t cudaGetLastError() {
  fake::pending = false;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake::device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
  *value = 1000 + device;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  if (fake::refuse) return cudaErrorInvalidValue;
  const fake::Setting setting{fake::device, kernel, attribute};
  ++fake::times[setting];
  fake::values[setting] = value;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
  if (fake::refuse) {
    fake::pending = true;
    return cudaErrorInvalidValue;
  }
  *count = 7;
  return cudaSuccess;
}
template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* how, void (*kernel)(Expected...), Given&&...) {
  const std::lock_guard<std::mutex> lock(fake::mutex);
  if (how->numAttrs) {
    for (int attribute : {cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout,
                          cudaFuncAttributeNonPortableClusterSizeAllowed}) {
      fake::unready += !fake::times.count({fake::device, reinterpret_cast<const void*>(kernel), attribute});
    }
  }
  return cudaSuccess;
}
