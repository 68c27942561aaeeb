#include "launch.h"

#ifdef HRA_EMULATION
#include <string>
#else
#include <map>
#include <mutex>
#include <tuple>
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

Status current_device(Device& device) {
  const int capability = emulation::options.capability;
  device = {capability, 4, capability >= 120 ? 101376 : capability >= 90 ? 232448 : 166912};
  return 0;
}

#else

const char* describe(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

Status current_device(Device& device) {
  int index = 0, major = 0, minor = 0, shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&index);
  auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  ask(major, cudaDevAttrComputeCapabilityMajor);
  ask(minor, cudaDevAttrComputeCapabilityMinor);
  ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.capability = 10 * major + minor;
  device.shared_bytes = shared_bytes;
  return error;
}

namespace detail {

cudaLaunchConfig_t configuration(const Launch& how, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(static_cast<unsigned>(how.grid_x), static_cast<unsigned>(how.grid_y), 1);
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

Status resident_clusters(const void* kernel, const Launch& how, int64_t& clusters) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int64_t>, int> answers;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, kernel, how.cluster, how.shared_bytes);
  auto found = answers.find(key);
  if (found == answers.end()) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t launch = configuration(how, &attribute);
    int count = 0;
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch);
    if (error != cudaSuccess) {
      if (how.cluster <= 8) return error;
      cudaGetLastError();  // not every GPU forms clusters beyond the portable 8: none is an answer, not a failure
      count = 0;
    }
    found = answers.emplace(key, count).first;
  }
  clusters = found->second;
  return 0;
}

}  // namespace detail

#endif

}  // namespace hra::cuda
