#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/target_dispatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sampling_kernels.cc"
// The next line includes this file once per target.
#include "hwy/foreach_target.h"
// Per-target part of the file from here.
#include "kernels/cpu/lanes16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moebius::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

void Sigmoid(const float* x, int64_t count, float* out) {
  ForLaneSteps(count, [&](int64_t k, int64_t n) HWY_ATTR {
    const F32x16 z = n == kLanes ? Load(x + k) : LoadTail(x + k, n);
    const F32x16 s = Div(Set(1.0f), Add(Set(1.0f), Exp(Sub(Zero(), z))));
    if (n == kLanes) {
      Store(s, out + k);
    } else {
      StoreTail(s, out + k, n);
    }
  });
}

float MaxOf(const float* x, int64_t count) {
  const float lowest = -std::numeric_limits<float>::infinity();
  F32x16 largest = Set(lowest);
  int64_t k = 0;
  // A NaN is the first operand and loses the comparison.
  for (; k + kLanes <= count; k += kLanes) largest = Max(Load(x + k), largest);
  float lanes[kLanes];
  Store(largest, lanes);
  float result = lowest;
  for (int l = 0; l < kLanes; ++l) result = lanes[l] > result ? lanes[l] : result;
  for (; k < count; ++k) result = x[k] > result ? x[k] : result;
  return result;
}

float SumExp(const float* x, int64_t count, float shift, float divisor, float* out) {
  F32x16 sum = Zero();
  const F32x16 shifts = Set(shift), divisors = Set(divisor);
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    const F32x16 e = Exp(Div(Sub(Load(x + k), shifts), divisors));
    if (out != nullptr) Store(e, out + k);
    sum = Add(sum, e);
  }
  if (k < count) {
    // Lanes beyond the end add zero.
    alignas(64) float lanes[kLanes] = {}, terms[kLanes];
    Store(Exp(Div(Sub(LoadTail(x + k, count - k), shifts), divisors)), terms);
    std::memcpy(lanes, terms, static_cast<size_t>(count - k) * sizeof(float));
    if (out != nullptr) std::memcpy(out + k, lanes, static_cast<size_t>(count - k) * sizeof(float));
    sum = Add(sum, Load(lanes));
  }
  return ReduceAdd(sum);
}

void ExpOf(const float* x, int64_t count, float* out) {
  ForLaneSteps(count, [&](int64_t k, int64_t n) HWY_ATTR {
    if (n == kLanes) {
      Store(Exp(Load(x + k)), out + k);
    } else {
      StoreTail(Exp(LoadTail(x + k, n)), out + k, n);
    }
  });
}

}  // namespace

void FillSampling(KernelTable& table) {
  table.sigmoid = &Sigmoid;
  table.max = &MaxOf;
  table.sum_exp = &SumExp;
  table.exp = &ExpOf;
}

}  // namespace HWY_NAMESPACE
}  // namespace moebius::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moebius::kernels::cpu {

MOEBIUS_DEFINE_FILL(FillSamplingKernels, FillSampling)

}  // namespace moebius::kernels::cpu
#endif
