// Every product runs on bfloat16 matrix instructions with float32 sums. Wider values enter as sums of bfloat16 terms:
//
//   x in bfloat16   1 term, exact            v and s                    2 terms, to 2^-17
//   x in float16    2 terms, exact           p, q, m of size R x R      3 terms, to 2^-24
//
// and a product keeps the pairs of terms (i, j) with i + j <= kOrder. bfloat16's range is float32's, so that nothing
// over- or underflows where the float32 value would not: s has columns of 1e-7 where HRA's pairs are nearly equal, and
// gradients may be small; float16 terms would lose both.
#pragma once

#include "device.h"

namespace hra::device {

// Terms of an activation.
template <typename T>
constexpr int kTermsOf = 1;
template <>
constexpr int kTermsOf<fp16> = 2;

// (low, high) as kTerms packed pairs whose sum is (low, high).
template <int kTerms>
__device__ __forceinline__ void split_pair(uint32_t (&terms)[kTerms], float low, float high) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = pack_bf16(low, high);
    low -= float_from_bits(terms[i] << 16);
    high -= float_from_bits(terms[i] & 0xffff0000u);
  }
}

// Two neighboring activations, as they lie in a register, into terms.
template <typename T>
__device__ __forceinline__ void split_packed(uint32_t (&terms)[kTermsOf<T>], uint32_t packed) {
  if constexpr (kTermsOf<T> == 1) {
    terms[0] = packed;
  } else {
    const Pair pair = unpack(T{}, packed);
    split_pair(terms, pair.low, pair.high);
  }
}

// c += a b over the pairs of terms that count.
template <int kOrder, int kA, int kB>
__device__ __forceinline__ void mma_terms(float (&c)[4], const uint32_t (&a)[kA][4], const uint32_t (&b)[kB][2]) {
#pragma unroll
  for (int i = 0; i < kA; ++i) {
#pragma unroll
    for (int j = 0; j < kB; ++j) {
      if (i + j <= kOrder) mma(c, a[i], b[j]);
    }
  }
}

}  // namespace hra::device
