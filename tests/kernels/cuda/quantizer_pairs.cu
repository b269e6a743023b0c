#include "tests/kernels/cuda/quantizer_pairs.h"

#include "kernels/cuda/device/quantizer.cuh"

namespace moebius::kernels::cuda {
namespace {

__global__ void QuantizerPairs(bool power_of_two, unsigned long long* mismatches,
                               unsigned long long* compared) {
  const uint32_t largest = blockIdx.x;  // 0 .. 0x7f7f
  const BlockScale s = ScaleOfBlock(largest, power_of_two);
  const BlockScale finite = ScaleOfFinite(largest, power_of_two);
  unsigned long long wrong = 0, count = 0;
  wrong += __float_as_uint(finite.scale) != __float_as_uint(s.scale);
  wrong += __float_as_uint(finite.reciprocal) != __float_as_uint(s.reciprocal);
  for (uint32_t magnitude = threadIdx.x; magnitude <= largest; magnitude += blockDim.x) {
    const float x = __uint_as_float(magnitude << 16);
    const uint32_t fast = ToE4m3Pair(DivideByScale(x, s), DivideByScale(-x, s));
    const uint32_t ieee = ToE4m3Pair(__fdiv_rn(x, s.scale), __fdiv_rn(-x, s.scale));
    wrong += (fast & 0xff) != (ieee & 0xff);
    wrong += (fast >> 8) != (ieee >> 8);
    count += 2;
  }
  atomicAdd(compared, count);
  if (wrong != 0) atomicAdd(mismatches, wrong);
}

}  // namespace

cudaError_t LaunchQuantizerPairs(bool power_of_two, unsigned long long* mismatches,
                                 unsigned long long* compared, cudaStream_t stream) {
  QuantizerPairs<<<0x7f80, 256, 0, stream>>>(power_of_two, mismatches, compared);
  return cudaGetLastError();
}

}  // namespace moebius::kernels::cuda
