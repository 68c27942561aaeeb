// The warp instructions and number formats the kernels use, with the register layouts of the PTX manual.
#pragma once

#include <cstdint>

namespace hra::emulation {

uint16_t bfloat16_from_float(float value);  // to nearest, ties to even
uint16_t float16_from_float(float value);
float float_from_bfloat16(uint16_t bits);
float float_from_float16(uint16_t bits);

float shuffle_xor(float value, int lane_mask);

// Four 8 x 8 matrices of 16-bit values: lane 8 i + j gives the address of row j of matrix i.
void ldmatrix(uint32_t registers[4], bool transpose, const void* row);

// The transpose of an 8 x 8 matrix of 16-bit values, of which lane 4 g + c has columns 2 c and 2 c + 1 of row g.
uint32_t movmatrix(uint32_t pair);

// c (16, 8) += a (16, 16) b (16, 8) in bfloat16 with float32 sums. Tensor cores do not document how they round the
// sums; here each result is the exact sum rounded towards zero once, the least accurate rounding they are known to use.
void mma_bf16_16x8x16(float c[4], const uint32_t a[4], const uint32_t b[2]);

}  // namespace hra::emulation
