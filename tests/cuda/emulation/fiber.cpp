#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__x86_64__)
extern "C" void hra_emulation_switch(void** save, void* restore);
asm(R"(
.text
.hidden hra_emulation_switch
.globl hra_emulation_switch
.type hra_emulation_switch, @function
hra_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size hra_emulation_switch, .-hra_emulation_switch
)");
#else
#include <ucontext.h>
#endif

namespace hra::emulation {

void prepare(Fiber& fiber, void* stack, size_t bytes, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);  // frames of a launch that was ended early
#endif
#if defined(__x86_64__)
  auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto* slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;  // keeps the stack aligned as at a call, and ends back traces
  *--slot = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slot = nullptr;  // the registers that the first switch pops
  fiber.context = slot;
#else
  if (!fiber.context) fiber.context = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(fiber.context);
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#endif
}

void switch_fibers(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
  hra_emulation_switch(&from.context, to.context);
#else
  if (!from.context) from.context = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.context), static_cast<ucontext_t*>(to.context));
#endif
}

char* reserve_stacks(size_t count, size_t bytes) {
  void* region =
      mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(region);
}

}  // namespace hra::emulation
