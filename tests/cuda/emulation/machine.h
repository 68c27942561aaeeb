// A model of the GPU on which the kernels of csrc/cuda run as ordinary C++, for tests on machines without one.
//
// Each CUDA thread is a fiber; the blocks of a cluster run together, clusters one after another. What the model adds to
// plain execution is what makes wrong synchronization visible:
//   - dynamic shared memory starts as NaN (0xff bytes) in every block and ends at a guard (or at AddressSanitizer's);
//   - the destination of a cp.async is NaN from its issue to the wait that completes it;
//   - the order in which warps and lanes run between synchronizations depends on `Options::seed`: even seeds interleave
//     warps, odd seeds let one warp run as far ahead as it can, and the lanes of a warp run in either direction;
//   - a barrier that some thread of the block has left, or reaches elsewhere, is an error, and so is a warp operation
//     of which a lane has ended, an access to another block's shared memory before the cluster has met or after that
//     block has ended, a mailbox that is sent more than it expects, a copy that nobody waited for, and a deadlock.
// Not modeled: time, registers, bank conflicts, weak memory ordering, concurrency between clusters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace hra::emulation {

// An index or a size; nothing here has more than one dimension.
struct Dim3 {
  unsigned x = 0;
};

struct Options {
  uint64_t seed = 0;
};
extern Options options;

struct LaunchShape {
  unsigned blocks = 1;
  unsigned threads = 1;
  unsigned cluster = 1;  // blocks that form one
  size_t shared_bytes = 0;
};

// Runs `body` once per thread; returns what went wrong, or an empty string.
std::string run(const LaunchShape& shape, const std::function<void()>& body);

// The shapes of all launches since this was last asked.
std::vector<LaunchShape> take_launches();

// --- what a running thread can ask for ---

const Dim3& thread_index();
const Dim3& block_index();
Dim3 grid_size();
unsigned cluster_rank();
char* dynamic_shared();

void block_barrier(const char* file, int line);
void cluster_barrier(const char* file, int line);

// Every lane of a warp calls with its own `arguments`; the last to arrive runs `operation` on all of them.
using WarpOperation = void (*)(void* const arguments[32]);
void warp_collective(const char* what, void* arguments, WarpOperation operation);

// The address in block `rank` of the cluster that corresponds to `local` in this block.
void* map_shared(void* local, unsigned rank, size_t bytes);

// A barrier in shared memory: a phase ends when one thread has said how many bytes to expect and as many were sent.
void mailbox_init(void* box);
void mailbox_expect(void* box, int bytes);
void mailbox_wait(void* box, unsigned phase);  // 0 or 1, as they alternate
// Writes to the addresses in block `rank` that correspond to `local` and `box` in this block.
void send(void* local, void* box, unsigned rank, const void* value, unsigned bytes);

void async_copy(void* destination, const void* source, unsigned bytes);  // 16 bytes, of which `bytes` are copied
void async_commit();
void async_wait(unsigned groups_left);

// Ends the launch with an error unless [pointer, pointer + bytes) is in this block's shared memory and aligned.
void check_shared(const void* pointer, size_t bytes, const char* what);
[[noreturn]] void fail(const std::string& message);

}  // namespace hra::emulation
