// Everything the kernels take from the hardware, in one place: nvcc compiles it to PTX; with HRA_EMULATION any C++
// compiler builds the same kernels on the model in tests/cuda/emulation, which is how they are tested without a GPU.
// Nothing in this directory has run on a GPU yet.
#pragma once

#include <cstdint>

#ifdef HRA_EMULATION

#include <cmath>

#include "emulation/instructions.h"
#include "emulation/machine.h"

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::hra::emulation::thread_index())
#define blockIdx (::hra::emulation::block_index())
#define gridDim (::hra::emulation::grid_size())
#define __syncthreads() ::hra::emulation::block_barrier(__FILE__, __LINE__)
#define HRA_CLUSTER_BARRIER() ::hra::emulation::cluster_barrier(__FILE__, __LINE__)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#else

#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "thread-block clusters need compute capability 9.0: CMAKE_CUDA_ARCHITECTURES=90a-real"
#endif

#define HRA_CLUSTER_BARRIER() ::hra::device::cluster_barrier()

#endif

namespace hra::device {

// Raw bits: neither nvcc's bfloat16 header nor a compiler's own type is needed.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr unsigned kFullWarp = 0xffffffffu;

// An mbarrier in shared memory. One thread arms it for each phase with the bytes to come; the phase ends when blocks of
// the cluster have sent that many, and phases count 0, 1, 0, ... Unlike a cluster's barrier it waits for nothing else:
// a barrier with release semantics would first wait for all loads and stores in flight.
struct Mailbox {
  uint64_t state;
};

#ifdef HRA_EMULATION

inline char* dynamic_shared() { return emulation::dynamic_shared(); }
inline unsigned cluster_rank() { return emulation::cluster_rank(); }
inline void sync_warp() { emulation::warp_collective("__syncwarp", nullptr, nullptr); }
inline float shuffle_xor(float value, int mask) { return emulation::shuffle_xor(value, mask); }

inline void cp_async_16(void* shared, const void* global, int bytes) {
  emulation::async_copy(shared, global, static_cast<unsigned>(bytes));
}
inline void cp_async_commit() { emulation::async_commit(); }
template <int kGroupsLeft>
inline void cp_async_wait() {
  emulation::async_wait(kGroupsLeft);
}

template <bool kTranspose>
inline void ldmatrix(uint32_t (&registers)[4], const void* row) {
  emulation::ldmatrix(registers, kTranspose, row);
}
inline uint32_t transpose_8x8(uint32_t pair) { return emulation::movmatrix(pair); }
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulation::mma_bf16_16x8x16(c, a, b); }

inline void mailbox_init(Mailbox* box) { emulation::mailbox_init(box); }
inline void mailbox_expect(Mailbox* box, int bytes) { emulation::mailbox_expect(box, bytes); }
inline void mailbox_wait(Mailbox* box, unsigned phase) { emulation::mailbox_wait(box, phase); }
inline void send_in_cluster(float4* local, Mailbox* box, unsigned rank, const float4& value) {
  emulation::send(local, box, rank, &value, sizeof(float4));
}

inline uint32_t pack_bf16(float low, float high) {
  return emulation::bfloat16_from_float(low) | static_cast<uint32_t>(emulation::bfloat16_from_float(high)) << 16;
}
inline float to_float(fp16 value) { return emulation::float_from_float16(value.bits); }
inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t pack_fp16(float low, float high) {
  return emulation::float16_from_float(low) | static_cast<uint32_t>(emulation::float16_from_float(high)) << 16;
}

#else

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(kFullWarp, value, mask); }

// Copies the first `bytes` of 16 and writes zeros for the rest.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit values: lane 8 i + j gives the address of row j of matrix i.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* row) {
  const unsigned address = shared_address(row);
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// Of an 8 x 8 matrix, lane 4 g + c has columns 2 c and 2 c + 1 of row g; it gets rows 2 c and 2 c + 1 of column g.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void mailbox_init(Mailbox* box) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mailbox_expect(Mailbox* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool mailbox_has_ended(Mailbox* box, unsigned phase) {
  unsigned ended;
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, done;\n\t}"
      : "=r"(ended)
      : "r"(shared_address(box)), "r"(phase)
      : "memory");
  return ended;
}
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
// With HRA_SPIN_LIMIT a message that does not come within so many nanoseconds is an error instead of a hang.
__device__ __forceinline__ void mailbox_wait(Mailbox* box, unsigned phase) {
#ifdef HRA_SPIN_LIMIT
  if (mailbox_has_ended(box, phase)) return;
  const uint64_t begin = nanoseconds();
  while (!mailbox_has_ended(box, phase)) {
    if (nanoseconds() - begin > HRA_SPIN_LIMIT) __trap();
  }
#else
  while (!mailbox_has_ended(box, phase)) {
  }
#endif
}
__device__ __forceinline__ void send_in_cluster(float4* local, Mailbox* box, unsigned rank, const float4& value) {
  unsigned remote, remote_box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(local)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_box) : "r"(shared_address(box)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(remote_box)
      : "memory");
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ float to_float(fp16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
__device__ __forceinline__ float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#endif

// Two neighbors, whose address is a multiple of their size.
struct Pair {
  float low, high;
};
__device__ __forceinline__ Pair unpack(bf16, uint32_t packed) {
  return {float_from_bits(packed << 16), float_from_bits(packed & 0xffff0000u)};
}
__device__ __forceinline__ Pair unpack(fp16, uint32_t packed) {
  return {to_float(fp16{static_cast<uint16_t>(packed)}), to_float(fp16{static_cast<uint16_t>(packed >> 16)})};
}
__device__ __forceinline__ uint32_t pack(bf16, Pair pair) { return pack_bf16(pair.low, pair.high); }
__device__ __forceinline__ uint32_t pack(fp16, Pair pair) { return pack_fp16(pair.low, pair.high); }

}  // namespace hra::device
