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

// Runs work(task) for every task in [0, tasks); see run_tasks.
template <class Work>
void run_each(int tasks, int num_threads, const Work& work) {
  run_tasks(
      tasks, num_threads, [](int task, void* context) { (*static_cast<const Work*>(context))(task); },
      const_cast<Work*>(&work));
}

template <class Element>
struct Type {
  using T = Element;
};

// Calls work(Type<T>()) for the T of a dtype.
template <class Work>
void with_type(DType dtype, const Work& work) {
  switch (dtype) {
    case DType::kFloat32:
      return work(Type<float>());
    case DType::kFloat64:
      return work(Type<double>());
    case DType::kBFloat16:
      return work(Type<BFloat16>());
    case DType::kFloat16:
      return work(Type<Float16>());
  }
}

}  // namespace hra::cpu::HRA_ISA
