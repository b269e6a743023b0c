#pragma once

// Which instruction sets the CPU kernels are compiled for: AVX2 (with FMA and F16C), AVX-512
// (F, BW, DQ, VL) and the portable baseline. Targets between the baseline and AVX2 have no fused
// multiply-add, which the arithmetic is defined with, so they are left out; AVX-512 extensions
// beyond the four would be a numerics class of their own (BF16 dot products) or bring nothing here.
//
// REQUIRES: included before any Highway header.

#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL)
