// Vectors of one instruction set: GCC/Clang vector extensions, x86 intrinsics only for float16 and masks.
//
// Every translation unit that includes this is compiled once per instruction set, with HRA_ISA naming the namespace, so
// that no function compiled for a wide set can replace a narrow one at link time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Sanitizer builds define these two as less: every access in every copy of a tile would be instrumented.
#if !defined(HRA_INLINE)
#define HRA_INLINE inline __attribute__((always_inline))
#endif
#if !defined(HRA_UNROLL)  // before each loop over the registers of a tile
#define HRA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace hra::cpu::HRA_ISA {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

// Vector registers decide how many columns of a tile of accumulators fit.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that products of T accumulate in, that v, t and p have.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class C>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(C));

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVecBytes)));
  typedef int32_t index __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVecBytes)));
  typedef int64_t index __attribute__((vector_size(kVecBytes)));
};
template <class C>
using Vec = typename VecOf<C>::type;

typedef uint32_t VecU32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes / 2)));

template <class To, class From>
HRA_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Keeps a value that several multiply-adds share in a register; GCC would load it again for each of them.
template <class V>
HRA_INLINE V in_register(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

template <class C>
HRA_INLINE Vec<C> broadcast(C value) {
  return value - Vec<C>{};  // x - 0 is x for every x, x + 0 is not: only the subtraction compiles to nothing
}

HRA_INLINE VecU32 select(VecU32 mask, VecU32 yes, VecU32 no) { return (mask & yes) | (~mask & no); }

// GCC 12 widens a whole register in two halves and an insertion where one instruction does.
HRA_INLINE VecU32 widen_bits(VecU16 bits) {
#if defined(__AVX512F__)
  return bit_cast<VecU32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<VecU32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, VecU32);
#endif
}

HRA_INLINE Vec<float> widen(BFloat16, VecU16 bits) { return bit_cast<Vec<float>>(widen_bits(bits) << 16); }

// Round to nearest even; every NaN becomes 0x7fc0, as in torch.
HRA_INLINE VecU16 narrow(BFloat16, Vec<float> value) {
  const VecU32 bits = bit_cast<VecU32>(value);
  const VecU32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU32 nan = bit_cast<VecU32>(value != value);
  return __builtin_convertvector(select(nan, VecU32{} + 0x7fc0, rounded), VecU16);
}

#if defined(__AVX512F__)
HRA_INLINE Vec<float> widen(Float16, VecU16 bits) { return _mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)); }
HRA_INLINE VecU16 narrow(Float16, Vec<float> value) {
  return bit_cast<VecU16>(_mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
HRA_INLINE Vec<float> widen(Float16, VecU16 bits) { return _mm256_cvtph_ps(bit_cast<__m128i>(bits)); }
HRA_INLINE VecU16 narrow(Float16, Vec<float> value) {
  return bit_cast<VecU16>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
// The exponent is moved by a multiplication with a power of two, which also normalizes subnormal numbers.
HRA_INLINE Vec<float> widen(Float16, VecU16 half) {
  const VecU32 bits = widen_bits(half);
  const VecU32 magnitude = (bits & 0x7fff) << 13;
  const VecU32 finite = bit_cast<VecU32>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  const VecU32 special = bit_cast<VecU32>(magnitude >= (0x7c00u << 13));
  return bit_cast<Vec<float>>(((bits & 0x8000) << 16) | select(special, magnitude | 0x7f800000, finite));
}

// Adding a power of two 2^13 ulps(float16) above the value lets the addition round to nearest even; the two scalings
// send what is too large to infinity.
HRA_INLINE VecU16 narrow(Float16, Vec<float> value) {
  const VecU32 bits = bit_cast<VecU32>(value);
  const Vec<float> magnitude = bit_cast<Vec<float>>(bits & 0x7fffffff) * 0x1p112f * 0x1p-110f;
  const VecU32 twice = bits + bits;
  const VecU32 exponent = twice & 0xff000000;
  const VecU32 bias = select(bit_cast<VecU32>(exponent < 0x71000000), VecU32{} + 0x71000000, exponent);
  const VecU32 sum = bit_cast<VecU32>(bit_cast<Vec<float>>((bias >> 1) + 0x07800000) + magnitude);
  const VecU32 finite = ((sum >> 13) & 0x7c00) + (sum & 0x0fff);
  const VecU32 nan = bit_cast<VecU32>(twice > 0xff000000);
  return __builtin_convertvector(((bits & 0x80000000) >> 16) | select(nan, VecU32{} + 0x7e00, finite), VecU16);
}
#endif

template <class T>
HRA_INLINE Vec<float> load(const T* from) {
  VecU16 bits;
  __builtin_memcpy(&bits, from, sizeof(bits));
  return widen(T{}, bits);
}
template <>
HRA_INLINE Vec<float> load(const float* from) {
  Vec<float> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
HRA_INLINE Vec<double> load(const double* from) {
  Vec<double> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <class T>
HRA_INLINE void store(T* to, Vec<float> value) {
  const VecU16 bits = narrow(T{}, value);
  __builtin_memcpy(to, &bits, sizeof(bits));
}
template <>
HRA_INLINE void store(float* to, Vec<float> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}
HRA_INLINE void store(double* to, Vec<double> value) { __builtin_memcpy(to, &value, sizeof(value)); }

// Two neighboring vectors.
template <class T>
HRA_INLINE void store_two(T* to, Vec<Accumulator<T>> first, Vec<Accumulator<T>> second) {
  store(to, first);
  store(to + kLanes<Accumulator<T>>, second);
}

#if defined(__AVX512F__)
// narrow(BFloat16) without its last shift.
HRA_INLINE __m512i round_to_upper_half(Vec<float> value) {
  const __m512i bits = bit_cast<__m512i>(value);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i even_rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_mask_add_epi32(even_rounded, odd, bits, _mm512_set1_epi32(0x8000));
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}

// One shuffle takes the upper halves of both vectors: conversions compete with multiply-adds for two ports.
template <>
HRA_INLINE void store_two(BFloat16* to, Vec<float> first, Vec<float> second) {
  typedef uint16_t Bits __attribute__((vector_size(64)));
  const Bits odd = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i upper =
      _mm512_permutex2var_epi16(round_to_upper_half(first), bit_cast<__m512i>(odd), round_to_upper_half(second));
  __builtin_memcpy(to, &upper, sizeof(upper));
}
#endif

// Lane l of the result is lane index(l) of a and b side by side.
template <class C, class Index>
HRA_INLINE Vec<C> pick(Vec<C> a, Vec<C> b, Index index) {
#if defined(__clang__)
  Vec<C> picked;
  HRA_UNROLL
  for (int l = 0; l < kLanes<C>; ++l) picked[l] = index(l) < kLanes<C> ? a[index(l)] : b[index(l) - kLanes<C>];
  return picked;
#else
  typename VecOf<C>::index from;
  HRA_UNROLL
  for (int l = 0; l < kLanes<C>; ++l) from[l] = index(l);
  return __builtin_shuffle(a, b, from);
#endif
}

// The first `count` elements; the other lanes are zero.
template <class T>
HRA_INLINE Vec<Accumulator<T>> load_first(const T* from, int count) {
  T lanes[kLanes<Accumulator<T>>] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}

template <class T>
HRA_INLINE void store_first(T* to, Vec<Accumulator<T>> value, int count) {
  T lanes[kLanes<Accumulator<T>>];
  store(lanes, value);
  std::memcpy(to, lanes, static_cast<size_t>(count) * sizeof(T));
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace hra::cpu::HRA_ISA
