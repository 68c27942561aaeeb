// Everything the kernels take from the hardware, in one place: nvcc compiles it to PTX; with HRA_EMULATION any C++
// compiler builds the same kernels on the model in emulation/, which is how they are tested without a GPU.
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
#define blockDim (::hra::emulation::block_size())
#define gridDim (::hra::emulation::grid_size())
#define __syncthreads() ::hra::emulation::block_barrier(__FILE__, __LINE__)
#define HRA_CLUSTER_BARRIER() ::hra::emulation::cluster_barrier(__FILE__, __LINE__)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#else

#include <cuda_runtime.h>

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
inline void sync_warp() { emulation::warp_collective("__syncwarp", kFullWarp, nullptr, nullptr); }
inline float shuffle_xor(float value, int mask) {
  return static_cast<float>(emulation::shuffle_xor(kFullWarp, value, mask));
}
inline double shuffle_xor(double value, int mask) { return emulation::shuffle_xor(kFullWarp, value, mask); }

inline void cp_async_16(void* shared, const void* global, int bytes) {
  emulation::async_copy(shared, global, static_cast<unsigned>(bytes));
}
inline void cp_async_commit() { emulation::async_commit(); }
template <int kGroupsLeft>
inline void cp_async_wait() {
  emulation::async_wait(kGroupsLeft);
}

template <int kCount, bool kTranspose>
inline void ldmatrix(uint32_t (&registers)[kCount], const void* row) {
  emulation::ldmatrix(registers, kCount, kTranspose, row);
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
inline double double_from_bits(int64_t bits) {
  double value;
  __builtin_memcpy(&value, &bits, 8);
  return value;
}
inline int64_t bits_of(double value) {
  int64_t bits;
  __builtin_memcpy(&bits, &value, 8);
  return bits;
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
__device__ __forceinline__ double shuffle_xor(double value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}

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

template <int kCount, bool kTranspose>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 2 || kCount == 4, "two or four matrices");
  const unsigned address = shared_address(row);
  if constexpr (kCount == 4 && kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
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

// Thread-block clusters exist from sm_90 on; kernels that use them are not instantiated below it.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void mailbox_init(Mailbox* box) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mailbox_expect(Mailbox* box, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)), "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void mailbox_wait(Mailbox* box, unsigned phase) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned complete = 0;
  while (!complete) {
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(complete)
        : "r"(shared_address(box)), "r"(phase)
        : "memory");
  }
#endif
}
__device__ __forceinline__ void send_in_cluster(float4* local, Mailbox* box, unsigned rank, const float4& value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned remote, remote_box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(local)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_box) : "r"(shared_address(box)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote),
      "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(remote_box)
      : "memory");
#endif
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
__device__ __forceinline__ double double_from_bits(int64_t bits) { return __longlong_as_double(bits); }
__device__ __forceinline__ int64_t bits_of(double value) { return __double_as_longlong(value); }
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

#endif

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) {
  return float_from_bits(static_cast<uint32_t>(value.bits) << 16);
}

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

template <typename T>
__device__ __forceinline__ Pair load_pair(const T* from) {
  return unpack(T{}, *reinterpret_cast<const uint32_t*>(from));
}
__device__ __forceinline__ Pair load_pair(const float* from) {
  const float2 pair = *reinterpret_cast<const float2*>(from);
  return {pair.x, pair.y};
}
template <typename T>
__device__ __forceinline__ void store_pair(T* to, Pair pair) {
  *reinterpret_cast<uint32_t*>(to) = pack(T{}, pair);
}
__device__ __forceinline__ void store_pair(float* to, Pair pair) {
  *reinterpret_cast<float2*>(to) = float2{pair.low, pair.high};
}

}  // namespace hra::device
