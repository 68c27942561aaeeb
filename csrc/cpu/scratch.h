#pragma once

#include "internal.h"
#include "vec.h"

namespace hra::cpu::HRA_ISA {

// Scratch memory of a call, cut into one piece per task and the pieces into arrays of whole cache lines. Pieces are an
// odd number of lines apart: the same array of two tasks does not compete for the same cache sets.
class Scratch {
 public:
  template <class C>
  int64_t add(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(C)), 64);
    return offset;
  }
  void allocate(int tasks) {
    stride_ = round_up(bytes_, 128) + 64;
    memory_ = static_cast<char*>(cpu::allocate(static_cast<size_t>(stride_) * static_cast<size_t>(tasks)));
  }
  ~Scratch() { release(memory_); }
  template <class C>
  C* get(int task, int64_t offset) const {
    return reinterpret_cast<C*>(memory_ + task * stride_ + offset);
  }

 private:
  int64_t bytes_ = 0, stride_ = 0;
  char* memory_ = nullptr;
};

}  // namespace hra::cpu::HRA_ISA
