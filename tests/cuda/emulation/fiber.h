// Switching between stacks: about 30 machine instructions on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>

namespace hra::emulation {

struct Fiber {
  void* context = nullptr;  // stack pointer, or ucontext_t*
};

// Prepares `fiber` to run `entry` (which must never return) on the given stack at the first switch to it.
void prepare(Fiber& fiber, void* stack, size_t bytes, void (*entry)());
void switch_fibers(Fiber& from, Fiber& to);

// Room for `count` stacks of `bytes` each, reserved once and only backed by memory where touched.
char* reserve_stacks(size_t count, size_t bytes);

}  // namespace hra::emulation
