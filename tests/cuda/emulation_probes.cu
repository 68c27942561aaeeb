// Small kernels that show what the CUDA emulation notices: each is right, or has one planted bug.
//
//     emulation_probes NAME BUG SEED     prints "ok", "wrong", or what the emulation reports
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace {

using namespace hra::device;

constexpr int kThreads = 128;
bool planted = false;

struct Global {
  alignas(16) float in[1024];
  float out[1024];
};
Global global;

int tid() { return static_cast<int>(threadIdx.x); }

void barrier_unless_planted() {
  if (!planted) __syncthreads();
}

float expected_sum(int first, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += global.in[first + i];
  return sum;
}

bool out_is(int count, float (*value)(int)) {
  for (int i = 0; i < count; ++i) {
    if (!(global.out[i] == value(i))) return false;
  }
  return true;
}

// Every thread reads all that the others stored.
void missing_barrier() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[tid()] = global.in[tid()];
  barrier_unless_planted();
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += shared[i];
  global.out[tid()] = sum;
}
bool missing_barrier_ok() {
  return out_is(kThreads, [](int) { return expected_sum(0, kThreads); });
}

// One buffer used twice: the second stores must wait for the first reads.
void missing_trailing_barrier() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    shared[tid()] = global.in[kThreads * round + tid()];
    __syncthreads();
    sum += shared[kThreads - 1 - tid()];
    barrier_unless_planted();
  }
  global.out[tid()] = sum;
}
bool missing_trailing_barrier_ok() {
  return out_is(kThreads, [](int i) {
    float sum = 0;
    for (int round = 0; round < 4; ++round) sum += global.in[kThreads * round + kThreads - 1 - i];
    return sum;
  });
}

// Lanes of one warp exchange through shared memory.
void missing_warp_sync() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[tid()] = global.in[tid()];
  if (!planted) sync_warp();
  global.out[tid()] = shared[tid() ^ 31];
}
bool missing_warp_sync_ok() {
  return out_is(kThreads, [](int i) { return global.in[i ^ 31]; });
}

// Two cp.async groups; the first must be there after waiting for all but one.
void wait_off_by_one() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  for (int group = 0; group < 2; ++group) {
    cp_async_16(shared + 4 * (kThreads * group + tid()), global.in + 4 * (tid() % 64) + 256 * group, 16);
    cp_async_commit();
  }
  if (planted) {
    cp_async_wait<2>();
  } else {
    cp_async_wait<1>();
  }
  global.out[tid()] = shared[4 * tid() + 3];
  cp_async_wait<0>();
}
bool wait_off_by_one_ok() {
  return out_is(kThreads, [](int i) { return global.in[4 * (i % 64) + 3]; });
}

// A copied value read by another thread before the barrier that follows the wait.
void copy_read_before_barrier() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  cp_async_16(shared + 4 * tid(), global.in + 4 * tid(), 16);
  cp_async_commit();
  cp_async_wait<0>();
  barrier_unless_planted();
  global.out[tid()] = shared[4 * (kThreads - 1 - tid())];
}
bool copy_read_before_barrier_ok() {
  return out_is(kThreads, [](int i) { return global.in[4 * (kThreads - 1 - i)]; });
}

void copy_never_waited_for() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  cp_async_16(shared + 4 * tid(), global.in + 4 * tid(), 16);
  cp_async_commit();
  global.out[tid()] = 1;
  if (!planted) cp_async_wait<0>();
}
bool copy_never_waited_for_ok() { return true; }

void misaligned_copy() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  cp_async_16(shared + 4 * tid(), global.in + tid() * 4 + (planted ? 1 : 0), 16);
  cp_async_commit();
  cp_async_wait<0>();
}
bool misaligned_copy_ok() { return true; }

void exited_lane() {
  if (planted && tid() % 32 == 7) return;
  global.out[tid()] = shuffle_xor(global.in[tid()], 1);
}
bool exited_lane_ok() {
  return out_is(kThreads, [](int i) { return global.in[i ^ 1]; });
}

void divergent_barrier() {
  if (planted && tid() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
bool divergent_barrier_ok() { return true; }

void barrier_after_exit() {
  if (planted && tid() == 5) return;
  __syncthreads();
}
bool barrier_after_exit_ok() { return true; }

void shared_overrun() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[1024 + (planted ? tid() : tid() - kThreads)] = 1;
}
bool shared_overrun_ok() { return true; }

void unwritten_shared() {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  if (!planted || tid() > 0) shared[tid()] = global.in[tid()];
  global.out[tid()] = shared[tid()];
}
bool unwritten_shared_ok() {
  return out_is(kThreads, [](int i) { return global.in[i]; });
}

// Four blocks add up what each of them holds, in four rounds of messages.
void cluster_sum(bool first_meeting, bool two_copies, bool last_wait, bool armed, int bytes) {
  auto* slots = reinterpret_cast<float4*>(dynamic_shared());  // (2, 4, 32)
  auto* mailboxes = reinterpret_cast<Mailbox*>(slots + 256);
  const int rank = static_cast<int>(cluster_rank()), lane = tid() % 32;
  if (tid() < 2) mailbox_init(mailboxes + tid());
  if (first_meeting) HRA_CLUSTER_BARRIER();
  float sum = 0;
  for (int round = 0; round < 4; ++round) {
    float4* arriving = slots + (two_copies ? round % 2 : 0) * 128;
    Mailbox* mailbox = mailboxes + round % 2;
    if (tid() == 0 && armed) mailbox_expect(mailbox, bytes);
    __syncthreads();            // all warps have read the last round's
    if (tid() / 32 % 3 == 0) {  // the first warp to two blocks, the last one to the others
      for (int to = tid() / 64 * 2; to < tid() / 64 * 2 + 2; ++to) {
        send_in_cluster(arriving + 32 * rank + lane, mailbox, to, {global.in[128 * round + 32 * rank + lane], 0, 0, 0});
      }
    }
    if (last_wait || round < 3) mailbox_wait(mailbox, round / 2 % 2);
    for (int i = 0; i < 20 * rank; ++i) sync_warp();  // blocks do not keep step
    for (int from = 0; from < 4; ++from) sum += arriving[32 * from + lane].x;
  }
  global.out[rank * kThreads + tid()] = sum;
}
bool cluster_ok() {
  return out_is(4 * kThreads, [](int i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += global.in[32 * k + i % 32];
    return sum;
  });
}
void cluster_not_met() { cluster_sum(!planted, true, true, true, 2048); }
void cluster_single_copy() { cluster_sum(true, !planted, true, true, 2048); }
void cluster_ended() { cluster_sum(true, true, !planted, true, 2048); }
void mailbox_not_armed() { cluster_sum(true, true, true, !planted, 2048); }
void mailbox_overfilled() { cluster_sum(true, true, true, true, planted ? 2040 : 2048); }

// Rows of a against rows of b through ldmatrix and mma.sync, and b again through the transposing load and in registers.
void fragments() {
  auto* a = reinterpret_cast<bf16*>(dynamic_shared());  // (16, 16)
  auto* b = a + 256;                                    // (16, 16): b's columns as rows
  auto* c = b + 256;                                    // (16, 16): b as it is multiplied
  const int lane = tid() % 32;
  for (int i = tid(); i < 256; i += kThreads) {
    a[i].bits = static_cast<uint16_t>(pack_bf16(float(i % 13) - 6, 0));
    b[i].bits = c[i % 16 * 16 + i / 16].bits = static_cast<uint16_t>(pack_bf16(float(i % 7) - 3, 0));
  }
  __syncthreads();
  uint32_t a_registers[4], b_registers[4], again[4], transposed[4];
  ldmatrix<false>(a_registers, a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix<false>(b_registers, b + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  ldmatrix<true>(again, c + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix<true>(transposed, b + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  bool same = true;
  for (int i = 0; i < 4; ++i) same &= b_registers[i] == again[i] && transpose_8x8(b_registers[i]) == transposed[i];
  for (int n = 0; n < 2; ++n) {
    float sum[4] = {};
    const uint32_t tile[2] = {b_registers[2 * n], b_registers[2 * n + 1]};
    mma(sum, a_registers, tile);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
      if (tid() < 32) global.out[row * 16 + (planted ? 15 - column : column)] = same ? sum[i] : NAN;
    }
  }
}
bool fragments_ok() {
  return out_is(256, [](int i) {
    float sum = 0;
    for (int k = 0; k < 16; ++k) sum += (float((i / 16 * 16 + k) % 13) - 6) * (float((i % 16 * 16 + k) % 7) - 3);
    return sum;
  });
}

struct Probe {
  const char* name;
  void (*kernel)();
  bool (*ok)();
  unsigned cluster;
};

#define HRA_PROBE(name) {#name, name, name##_ok, 1}
const Probe kProbes[] = {
    HRA_PROBE(missing_barrier),
    HRA_PROBE(missing_trailing_barrier),
    HRA_PROBE(missing_warp_sync),
    HRA_PROBE(wait_off_by_one),
    HRA_PROBE(copy_read_before_barrier),
    HRA_PROBE(copy_never_waited_for),
    HRA_PROBE(misaligned_copy),
    HRA_PROBE(exited_lane),
    HRA_PROBE(divergent_barrier),
    HRA_PROBE(barrier_after_exit),
    HRA_PROBE(shared_overrun),
    HRA_PROBE(unwritten_shared),
    HRA_PROBE(fragments),
    {"cluster_not_met", cluster_not_met, cluster_ok, 4},
    {"cluster_single_copy", cluster_single_copy, cluster_ok, 4},
    {"cluster_ended", cluster_ended, cluster_ok, 4},
    {"mailbox_not_armed", mailbox_not_armed, cluster_ok, 4},
    {"mailbox_overfilled", mailbox_overfilled, cluster_ok, 4},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  planted = std::atoi(arguments[2]) != 0;
  hra::emulation::options.seed = std::strtoull(arguments[3], nullptr, 10);
  for (int i = 0; i < 1024; ++i) {
    global.in[i] = static_cast<float>(i * 37 % 101);
    global.out[i] = NAN;
  }
  for (const Probe& probe : kProbes) {
    if (std::strcmp(probe.name, arguments[1]) != 0) continue;
    hra::emulation::LaunchShape shape;
    shape.blocks = probe.cluster;
    shape.threads = kThreads;
    shape.cluster = probe.cluster;
    shape.shared_bytes = probe.cluster > 1 ? 4096 + 2 * sizeof(Mailbox) : 4096;
    const std::string error = hra::emulation::run(shape, probe.kernel);
    std::puts(!error.empty() ? error.c_str() : probe.ok() ? "ok" : "wrong");
    return 0;
  }
  return 2;
}
