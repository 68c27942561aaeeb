// Threads and memory, compiled once for the baseline instruction set.
//
// PyTorch's CPU kernels run on an OpenMP pool. A second pool, of our own or of another OpenMP runtime, would leave
// twice as many threads spinning as there are cores. So nothing is linked: the entry points of the runtime that the
// process already has are looked up by name (libgomp, and libomp and libiomp5 under the same names), and the team has
// the size that torch's own regions have, because libgomp ends the surplus threads of a pool when a smaller team
// starts. Where there is no runtime, std::thread serves.
#include <dlfcn.h>

#include <atomic>
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

}  // namespace hra::cpu
