#include "launch.h"

#ifdef HRA_EMULATION
#include <string>
#else
#include <mutex>
#include <set>
#include <utility>
#endif

namespace hra::cuda {

#ifdef HRA_EMULATION

namespace {
std::string last_message;
constexpr Status kEmulationFailed = -1;
}  // namespace

Status report(const std::string& message) {
  if (message.empty()) return 0;
  last_message = message;
  return kEmulationFailed;
}

const char* describe(Status) { return last_message.c_str(); }

#else

const char* describe(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

namespace detail {

cudaLaunchConfig_t configuration(const Launch& how, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(static_cast<unsigned>(how.blocks), 1, 1);
  configuration.blockDim = dim3(static_cast<unsigned>(how.threads), 1, 1);
  configuration.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  configuration.stream = static_cast<cudaStream_t>(how.stream);
  if (how.cluster > 0) {  // one block too: cudaOccupancyMaxActiveClusters demands a size
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = static_cast<unsigned>(how.cluster);
    attribute->val.clusterDim.y = 1;
    attribute->val.clusterDim.z = 1;
    configuration.attrs = attribute;
    configuration.numAttrs = 1;
  }
  return configuration;
}

cudaError_t allow_clusters(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*> > allowed;
  int device = 0, most_shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({device, kernel})) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  auto set = [&](cudaFuncAttribute attribute, int value) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, attribute, value);
  };
  // the most that there is, not what one launch needs: another thread may be about to launch with more
  set(cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);  // as the occupancy is counted
  set(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) allowed.emplace(device, kernel);
  return error;
}

Status count_resident(const void* kernel, const Launch& how, int64_t& clusters) {
  cudaError_t error = allow_clusters(kernel);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t launch = configuration(how, &attribute);
  int count = 0;
  error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch);
  if (error != cudaSuccess) {
    constexpr int kPortable = 8;
    if (how.cluster <= kPortable) return error;
    cudaGetLastError();  // not every GPU forms larger clusters: none is an answer, not a failure
    count = 0;
  }
  clusters = count;
  return 0;
}

}  // namespace detail

#endif

}  // namespace hra::cuda
