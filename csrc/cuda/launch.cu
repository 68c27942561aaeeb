#include "launch.h"

#ifdef HRA_EMULATION
#include <string>
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
    if (how.cluster > 1) {
        attribute->id = cudaLaunchAttributeClusterDimension;
        attribute->val.clusterDim.x = static_cast<unsigned>(how.cluster);
        attribute->val.clusterDim.y = 1;
        attribute->val.clusterDim.z = 1;
        configuration.attrs = attribute;
        configuration.numAttrs = 1;
    }
    return configuration;
}

}  // namespace detail

#endif

}  // namespace hra::cuda
