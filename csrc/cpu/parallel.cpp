// Threads and memory, compiled once for the baseline instruction set.
//
// PyTorch's CPU kernels run on an OpenMP pool. A second pool, of our own or of another OpenMP runtime, would leave
// twice as many threads spinning as there are cores. So nothing is linked: the entry points of the runtime that the
// process already has are looked up by name (libgomp, and libomp and libiomp5 under the same names), and the team has
// the size that torch's own regions have, because libgomp ends the surplus threads of a pool when a smaller team
// starts. Where there is no runtime, std::thread serves.
#include <dlfcn.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "internal.h"

namespace hra::cpu {
namespace {

struct OpenMp {
  using Parallel = void (*)(void (*)(void*), void*, unsigned num_threads, unsigned flags);
  using Query = int (*)();
  Parallel parallel;
  Query in_parallel;
};

const OpenMp& open_mp() {
  static const OpenMp found = [] {
    OpenMp entry{};
    entry.in_parallel = reinterpret_cast<OpenMp::Query>(dlsym(RTLD_DEFAULT, "omp_in_parallel"));
    if (entry.in_parallel != nullptr)
      entry.parallel = reinterpret_cast<OpenMp::Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return entry;
  }();
  return found;
}

struct Tasks {
  int count;
  void (*work)(int, void*);
  void* context;
  std::atomic<int> next;

  // Whichever thread comes takes the next task: a team smaller than asked for still does them all.
  void run() {
    for (int task = next++; task < count; task = next++) work(task, context);
  }
};

}  // namespace

void run_tasks(int tasks, int num_threads, void (*work)(int, void*), void* context) {
  if (tasks == 1) return work(0, context);
  Tasks shared{tasks, work, context, {0}};
  const OpenMp& omp = open_mp();
  if (omp.parallel != nullptr) {
    if (omp.in_parallel()) return shared.run();
    return omp.parallel([](void* tasks) { static_cast<Tasks*>(tasks)->run(); }, &shared,
                        static_cast<unsigned>(num_threads), 0);
  }
  std::vector<std::thread> team;
  for (int i = 1; i < (tasks < num_threads ? tasks : num_threads); ++i) team.emplace_back([&] { shared.run(); });
  shared.run();
  for (std::thread& thread : team) thread.join();
}

const char* thread_pool() { return open_mp().parallel != nullptr ? "openmp" : "std::thread"; }

void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
  return memory;
}

void release(void* memory) { std::free(memory); }

// A large tensor fresh from the allocator is memory that the kernel has yet to map. In pages of 4 KiB that costs as
// much as copying the tensor: a clone of 32 MiB took 23 ms so, and 8 ms into mapped memory. Pages of 2 MiB are asked
// for where the system gives them on request; elsewhere, and for memory that is mapped already, this does nothing.
void will_write([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  if (bytes < static_cast<int64_t>(2 * kHugePage)) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace hra::cpu
