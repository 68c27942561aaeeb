#include "machine.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "fiber.h"

namespace hra::emulation {

Options options;

namespace {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMaxThreads = 16 * 1024;  // a cluster of 16 full blocks
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuardBytes = 0;  // AddressSanitizer guards the allocation, and says where
#else
constexpr size_t kGuardBytes = 4096;
#endif
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

struct AsyncCopy {
  void* destination;
  const void* source;
  unsigned bytes;
};

// Threads that meet: the last of `expected` to arrive releases the others.
struct Meeting {
  std::string what;
  unsigned arrived = 0;
};

struct Block;
struct Warp;

enum class State { kReady, kWaiting, kDone };

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  Dim3 index;
  unsigned lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  const Meeting* waiting_for = nullptr;
  std::vector<AsyncCopy> issued;                 // not committed yet
  std::deque<std::vector<AsyncCopy>> in_flight;  // committed groups, oldest first
};

struct Warp {
  Thread* threads[kWarpSize] = {};
  uint32_t ready = 0;
  bool done = false;  // one of its threads is
  Meeting meeting;
  void* arguments[kWarpSize] = {};
};

struct MailboxState {
  Meeting meeting{"a mailbox"};
  std::vector<Thread*> waiting;
  bool armed = false;
  int64_t bytes_to_come = 0;  // negative: sent before they were expected
  unsigned phase = 0;
};

struct Block {
  Dim3 index;
  unsigned rank = 0;
  unsigned done = 0;
  Meeting meeting;
  std::vector<Thread*> threads;
  char* allocation = nullptr;
  char* shared = nullptr;
  std::map<size_t, MailboxState> mailboxes;  // by offset in shared memory
};

struct Machine {
  LaunchShape shape;
  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;  // of the cluster that runs now
  Meeting cluster_meeting;
  bool cluster_has_met = false;
  size_t done = 0;
  Fiber scheduler;
  Thread* current = nullptr;
  std::string error;
  char* stacks = nullptr;
  std::vector<LaunchShape> launches;

  // the schedule
  size_t warp_turn = 0;
  uint64_t random = 1;
};
Machine machine;

uint64_t next_random() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

std::string place(const Thread& thread) {
  return "thread " + std::to_string(thread.index.x) + " of block " + std::to_string(thread.block->index.x);
}

void to_scheduler() {
  Thread* self = machine.current;
  switch_fibers(self->fiber, machine.scheduler);
}

void set_ready(Thread& thread) {
  thread.state = State::kReady;
  thread.waiting_for = nullptr;
  thread.warp->ready |= 1u << thread.lane;
}

void wait_at(Meeting& meeting) {
  Thread& self = *machine.current;
  self.state = State::kWaiting;
  self.waiting_for = &meeting;
  self.warp->ready &= ~(1u << self.lane);
  to_scheduler();
}

// Arrives at a barrier of `threads`; `someone_left`: one of them has ended.
void meet(Meeting& meeting, const std::string& what, const std::vector<Thread*>& threads, bool someone_left) {
  Thread& self = *machine.current;
  if (someone_left) fail(place(self) + " waits at " + what + ", which another thread ended without reaching");
  if (meeting.arrived == 0) meeting.what = what;
  if (meeting.what != what) fail(place(self) + " is at " + what + " while others are at " + meeting.what);
  if (++meeting.arrived < threads.size()) return wait_at(meeting);
  meeting.arrived = 0;
  for (Thread* thread : threads) {
    if (thread != &self) set_ready(*thread);
  }
}

void finish(Thread& self) {
  bool copying = !self.issued.empty();
  for (const auto& group : self.in_flight) copying |= !group.empty();
  if (copying) fail(place(self) + " ended with cp.async copies in flight");
  if (self.warp->meeting.arrived) {
    fail(place(self) + " ended while its warp waits for it at " + self.warp->meeting.what);
  }
  if (self.block->meeting.arrived) {
    fail(place(self) + " ended while its block waits for it at " + self.block->meeting.what);
  }
  if (machine.cluster_meeting.arrived) {
    fail(place(self) + " ended while its cluster waits for it at " + machine.cluster_meeting.what);
  }
  self.state = State::kDone;
  self.warp->ready &= ~(1u << self.lane);
  self.warp->done = true;
  ++self.block->done;
  ++machine.done;
  to_scheduler();
}

void thread_entry() {
  (*machine.body)();
  finish(*machine.current);
  std::abort();  // a finished thread is never resumed
}

// The next thread to run, or null when all wait.
Thread* pick() {
  const size_t count = machine.warps.size();
  const uint64_t seed = options.seed;
  const bool run_ahead = seed % 2, randomly = seed >= 4, descending = seed % 4 >= 2;
  if (randomly && !run_ahead) machine.warp_turn = next_random() % count;
  for (size_t step = 0; step < count; ++step) {
    // running ahead keeps to one warp while it can run; interleaving moves on each time
    size_t turn = (machine.warp_turn + step) % count;
    Warp& warp = machine.warps[descending ? count - 1 - turn : turn];
    if (!warp.ready) continue;
    machine.warp_turn = run_ahead ? (randomly && next_random() % 64 == 0 ? next_random() % count : turn) : turn + 1;
    int lane = descending ? 31 - __builtin_clz(warp.ready) : __builtin_ctz(warp.ready);
    return warp.threads[lane];
  }
  return nullptr;
}

MailboxState& mailbox_at(Block& block, size_t offset) {
  auto found = block.mailboxes.find(offset);
  if (found == block.mailboxes.end()) fail(place(*machine.current) + " uses a mailbox that was not initialized");
  return found->second;
}

size_t offset_of(const void* box) {
  check_shared(box, 8, "a mailbox");
  return static_cast<size_t>(static_cast<const char*>(box) - machine.current->block->shared);
}

void end_phase_if_complete(MailboxState& box) {
  if (!box.armed || box.bytes_to_come > 0) return;
  if (box.bytes_to_come < 0) fail(place(*machine.current) + " sends more bytes than a mailbox expects");
  box.armed = false;
  ++box.phase;
  for (Thread* thread : box.waiting) set_ready(*thread);
  box.waiting.clear();
}

void begin_cluster(unsigned first) {
  const LaunchShape& shape = machine.shape;
  const unsigned warps_per_block = shape.threads / kWarpSize;
  machine.blocks.assign(shape.cluster, Block{});
  machine.warps.assign(shape.cluster * warps_per_block, Warp{});
  machine.cluster_meeting = Meeting{};
  machine.cluster_has_met = false;
  machine.done = 0;
  machine.warp_turn = 0;
  size_t next = 0;
  for (unsigned rank = 0; rank < shape.cluster; ++rank) {
    Block& block = machine.blocks[rank];
    block.index = {first + rank};
    block.rank = rank;
    void* allocation = nullptr;
    if (posix_memalign(&allocation, 1024, 2 * kGuardBytes + shape.shared_bytes + (kGuardBytes ? 0 : 1))) {
      throw std::bad_alloc();
    }
    block.allocation = static_cast<char*>(allocation);
    block.shared = block.allocation + kGuardBytes;
    std::memset(block.allocation, kGuard, kGuardBytes);
    std::memset(block.shared, kPoison, shape.shared_bytes);
    std::memset(block.shared + shape.shared_bytes, kGuard, kGuardBytes);
    for (unsigned i = 0; i < shape.threads; ++i, ++next) {
      if (next == machine.threads.size()) machine.threads.push_back(std::make_unique<Thread>());
      Thread& thread = *machine.threads[next];
      Fiber fiber = thread.fiber;
      thread = Thread{};
      thread.fiber = fiber;
      thread.index = {i};
      thread.lane = i % kWarpSize;
      thread.block = &block;
      thread.warp = &machine.warps[rank * warps_per_block + i / kWarpSize];
      thread.warp->threads[thread.lane] = &thread;
      block.threads.push_back(&thread);
      set_ready(thread);
      prepare(thread.fiber, machine.stacks + next * kStackBytes, kStackBytes, thread_entry);
    }
  }
}

void end_cluster() {
  for (Block& block : machine.blocks) {
    for (size_t i = 0; i < kGuardBytes && machine.error.empty(); ++i) {
      auto byte = [](char value) { return static_cast<unsigned char>(value); };
      if (byte(block.allocation[i]) != kGuard) machine.error = "a block wrote in front of its shared memory";
      if (byte(block.shared[machine.shape.shared_bytes + i]) != kGuard) {
        machine.error = "a block wrote past its " + std::to_string(machine.shape.shared_bytes) +
                        " bytes of shared memory, at byte " + std::to_string(machine.shape.shared_bytes + i);
      }
    }
    std::free(block.allocation);
  }
  machine.blocks.clear();
}

void run_cluster(unsigned first) {
  begin_cluster(first);
  const size_t count = machine.shape.cluster * machine.shape.threads;
  while (machine.error.empty() && machine.done < count) {
    machine.current = pick();
    if (!machine.current) {
      machine.error = "deadlock:";
      for (size_t i = 0, shown = 0; i < count && shown < 3; ++i) {
        const Thread& thread = *machine.threads[i];
        if (thread.state != State::kWaiting) continue;
        machine.error += " " + place(thread) + " waits at " + thread.waiting_for->what + ";";
        ++shown;
      }
      break;
    }
    switch_fibers(machine.scheduler, machine.current->fiber);
    machine.current = nullptr;
  }
  end_cluster();
}

}  // namespace

std::string run(const LaunchShape& shape, const std::function<void()>& body) {
  if (shape.threads == 0 || shape.threads > 1024 || shape.threads % kWarpSize) return "a block has 1 to 32 warps";
  if (shape.cluster == 0 || shape.cluster > 16) return "a cluster has 1 to 16 blocks";
  if (shape.blocks % shape.cluster) return "the grid is not a whole number of clusters";
  if (!machine.stacks) machine.stacks = reserve_stacks(kMaxThreads, kStackBytes);
  machine.shape = shape;
  machine.launches.push_back(shape);
  machine.body = &body;
  machine.error.clear();
  machine.random = options.seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d;
  for (unsigned first = 0; first < shape.blocks && machine.error.empty(); first += shape.cluster) run_cluster(first);
  return machine.error;
}

std::vector<LaunchShape> take_launches() { return std::exchange(machine.launches, {}); }

const Dim3& thread_index() { return machine.current->index; }
const Dim3& block_index() { return machine.current->block->index; }
Dim3 grid_size() { return {machine.shape.blocks}; }
unsigned cluster_rank() { return machine.current->block->rank; }
char* dynamic_shared() { return machine.current->block->shared; }

void fail(const std::string& message) {
  machine.error = message;
  to_scheduler();
  std::abort();  // the scheduler never resumes a failed launch
}

void block_barrier(const char* file, int line) {
  Block& block = *machine.current->block;
  meet(block.meeting, std::string("__syncthreads in ") + file + ":" + std::to_string(line), block.threads, block.done);
}

void cluster_barrier(const char* file, int line) {
  std::vector<Thread*> everyone;
  for (Block& block : machine.blocks) everyone.insert(everyone.end(), block.threads.begin(), block.threads.end());
  meet(machine.cluster_meeting, std::string("cluster barrier in ") + file + ":" + std::to_string(line), everyone,
       machine.done);
  machine.cluster_has_met = true;
}

void warp_collective(const char* what, void* arguments, WarpOperation operation) {
  Thread& self = *machine.current;
  Warp& warp = *self.warp;
  if (warp.done) fail(place(self) + " is at " + what + ", which another lane of its warp ended without reaching");
  if (warp.meeting.arrived == 0) warp.meeting.what = what;
  if (warp.meeting.what != what) {
    fail(place(self) + " is at " + what + " while other lanes of its warp are at " + warp.meeting.what);
  }
  warp.arguments[self.lane] = arguments;
  if (++warp.meeting.arrived < kWarpSize) return wait_at(warp.meeting);
  warp.meeting.arrived = 0;
  if (operation) operation(warp.arguments);
  for (Thread* thread : warp.threads) {
    if (thread != &self) set_ready(*thread);
  }
}

void* map_shared(void* local, unsigned rank, size_t bytes) {
  Thread& self = *machine.current;
  check_shared(local, bytes, "an address for another block of the cluster");
  if (rank >= machine.blocks.size()) fail(place(self) + " names a block outside its cluster");
  Block& target = machine.blocks[rank];
  if (!machine.cluster_has_met && &target != self.block) {
    fail(place(self) + " reaches into a block's shared memory before the cluster has met");
  }
  if (target.done) fail(place(self) + " reaches into the shared memory of a block that has ended");
  return target.shared + (static_cast<char*>(local) - self.block->shared);
}

void mailbox_init(void* box) { machine.current->block->mailboxes[offset_of(box)] = MailboxState{}; }

void mailbox_expect(void* box, int bytes) {
  MailboxState& state = mailbox_at(*machine.current->block, offset_of(box));
  if (state.armed) fail(place(*machine.current) + " arms a mailbox twice in one phase");
  state.armed = true;
  state.bytes_to_come += bytes;
  end_phase_if_complete(state);
}

void mailbox_wait(void* box, unsigned phase) {
  MailboxState& state = mailbox_at(*machine.current->block, offset_of(box));
  if (state.phase % 2 != phase) return;
  state.waiting.push_back(machine.current);
  wait_at(state.meeting);
}

void send(void* local, void* box, unsigned rank, const void* value, unsigned bytes) {
  const size_t offset = offset_of(box);
  std::memcpy(map_shared(local, rank, bytes), value, bytes);
  MailboxState& state = mailbox_at(machine.blocks[rank], offset);
  state.bytes_to_come -= bytes;
  end_phase_if_complete(state);
}

void async_copy(void* destination, const void* source, unsigned bytes) {
  check_shared(destination, 16, "cp.async");
  if (bytes > 16) fail(place(*machine.current) + " copies more than 16 bytes with one cp.async");
  if (bytes && reinterpret_cast<uintptr_t>(source) % 16) {
    fail(place(*machine.current) + " reads from an address that is not 16-byte aligned with cp.async");
  }
  std::memset(destination, kPoison, 16);
  machine.current->issued.push_back({destination, source, bytes});
}

void async_commit() {
  Thread& self = *machine.current;
  self.in_flight.push_back(std::move(self.issued));
  self.issued.clear();
}

void async_wait(unsigned groups_left) {
  Thread& self = *machine.current;
  for (; self.in_flight.size() > groups_left; self.in_flight.pop_front()) {
    for (const AsyncCopy& copy : self.in_flight.front()) {
      std::memset(copy.destination, 0, 16);
      if (copy.bytes) std::memcpy(copy.destination, copy.source, copy.bytes);
    }
  }
}

void check_shared(const void* pointer, size_t bytes, const char* what) {
  const Block& block = *machine.current->block;
  const auto* byte = static_cast<const char*>(pointer);
  if (byte < block.shared || byte + bytes > block.shared + machine.shape.shared_bytes) {
    fail(place(*machine.current) + ": " + what + " is outside of the block's shared memory");
  }
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail(place(*machine.current) + ": " + what + " is not aligned");
}

}  // namespace hra::emulation
