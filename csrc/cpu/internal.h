// What the per-instruction-set kernels share with the code that is compiled once. Nothing here may be an inline
// function or a template that emits code: a copy compiled for AVX-512 could be linked into the baseline path.
#pragma once

#include <cstddef>

#include "hra.h"

namespace hra::cpu {

// Runs work(task, context) for every task in [0, tasks) on torch's own OpenMP pool where the process has one
// (parallel.cpp).
void run_tasks(int tasks, int num_threads, void (*work)(int task, void* context), void* context);

// 64-byte aligned memory for one call; throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* memory);

// Announces that a whole tensor is about to be written for the first time (parallel.cpp).
void will_write(void* begin, int64_t bytes);

struct Kernels {
  const char* name;
  void (*reflect_fwd)(const ReflectFwdParams&, int num_threads);
  void (*reflect_bwd)(const ReflectBwdParams&, int num_threads);
  void (*weight_side_bwd)(const WeightSideBwdParams&, int num_threads);
  void (*wy_factor_fwd)(const WyFactorFwdParams&, int num_threads);
  void (*wy_factor_bwd)(const WyFactorBwdParams&, int num_threads);
};

}  // namespace hra::cpu
