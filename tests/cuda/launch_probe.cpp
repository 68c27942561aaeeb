// The launcher on a runtime that counts (fake_runtime): prints what is wrong, and "ok" where nothing is.
#include <cstdio>
#include <thread>
#include <vector>

#include "cuda/launch.h"

using hra::cuda::Launch;

namespace {

void first(int) {}
void second(float) {}
void plain(int) {}

void expect(bool right, const char* what) {
  if (!right) std::printf("wrong: %s\n", what);
}

void launch_from_many_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([i] {
      fake::device = i % 2;
      for (int64_t bytes : {500, 100, 900}) {
        const Launch how{16, 256, bytes, nullptr, 8};
        expect(!hra::cuda::launch(first, how, 1) && !hra::cuda::launch(second, how, 1.0f), "a launch failed");
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace

int main() {
  fake::refuse = true;
  expect(hra::cuda::launch(first, Launch{8, 256, 500, nullptr, 8}, 1) != 0, "a refused attribute is no error");
  fake::refuse = false;
  launch_from_many_threads();
  expect(!hra::cuda::launch(plain, Launch{8, 256, 500, nullptr}, 1), "a launch without clusters failed");
  expect(fake::unready == 0, "a kernel was launched before its attributes were set");
  expect(fake::times.size() == 2 * 2 * 3, "not three attributes for each of two kernels on each of two devices");
  for (const auto& [setting, times] : fake::times) {
    const auto& [device, kernel, attribute] = setting;
    expect(times == 1, "an attribute was set more than once");
    const int wanted = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize      ? 1000 + device
                       : attribute == cudaFuncAttributePreferredSharedMemoryCarveout ? cudaSharedmemCarveoutMaxShared
                                                                                     : 1;
    expect(fake::values[setting] == wanted, "an attribute is not the device's most");
  }
  int64_t clusters = 0;
  expect(!hra::cuda::count_resident(first, Launch{8, 256, 500, nullptr, 8}, clusters) && clusters == 7, "no count");
  fake::refuse = true;
  expect(hra::cuda::count_resident(first, Launch{8, 256, 500, nullptr, 8}, clusters) != 0, "a failure is no error");
  const auto status = hra::cuda::count_resident(first, Launch{16, 256, 500, nullptr, 16}, clusters);
  expect(!status && clusters == 0 && !fake::pending, "clusters of 16 that cannot be formed are not none");
  std::puts("ok");
}
