#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/target_dispatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/dense_kernels.cc"
// The next line includes this file once per target.
#include "hwy/foreach_target.h"
// Per-target part of the file from here.
#include "kernels/cpu/lanes16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moebius::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

void RmsNorm(const Bf16* x, const float* weight, float eps, int64_t dim, Bf16* out) {
  F32x16 squares = Zero();
  ForLaneSteps(dim, [&](int64_t k, int64_t count) HWY_ATTR {
    const F32x16 v = count == kLanes ? LoadBf16(x + k) : LoadBf16Tail(x + k, count);
    squares = Fma(v, v, squares);
  });
  const float mean = ReduceAdd(squares) / static_cast<float>(dim);
  const F32x16 scale = Set(1.0f / std::sqrt(mean + eps));
  ForLaneSteps(dim, [&](int64_t k, int64_t count) HWY_ATTR {
    if (count == kLanes) {
      StoreBf16(Mul(Mul(LoadBf16(x + k), scale), Load(weight + k)), out + k);
    } else {
      const F32x16 v = Mul(Mul(LoadBf16Tail(x + k, count), scale), LoadTail(weight + k, count));
      StoreBf16Tail(v, out + k, count);
    }
  });
}

HWY_INLINE F32x16 SiluTimes(const F32x16& gate, const F32x16& up) {
  const F32x16 denominator = Add(Set(1.0f), Exp(Sub(Zero(), gate)));
  return Mul(Div(gate, denominator), up);
}

void SwiGluBf16(const Bf16* gate, const Bf16* up, int64_t dim, Bf16* out) {
  ForLaneSteps(dim, [&](int64_t k, int64_t count) HWY_ATTR {
    if (count == kLanes) {
      StoreBf16(SiluTimes(LoadBf16(gate + k), LoadBf16(up + k)), out + k);
    } else {
      StoreBf16Tail(SiluTimes(LoadBf16Tail(gate + k, count), LoadBf16Tail(up + k, count)), out + k,
                    count);
    }
  });
}

void SwiGluF32(const float* gate, const float* up, int64_t dim, Bf16* out) {
  ForLaneSteps(dim, [&](int64_t k, int64_t count) HWY_ATTR {
    if (count == kLanes) {
      StoreBf16(SiluTimes(Load(gate + k), Load(up + k)), out + k);
    } else {
      StoreBf16Tail(SiluTimes(LoadTail(gate + k, count), LoadTail(up + k, count)), out + k, count);
    }
  });
}

void ResidualAdd(Bf16* h, const Bf16* y, int64_t dim) {
  ForLaneSteps(dim, [&](int64_t k, int64_t count) HWY_ATTR {
    if (count == kLanes) {
      StoreBf16(Add(LoadBf16(h + k), LoadBf16(y + k)), h + k);
    } else {
      StoreBf16Tail(Add(LoadBf16Tail(h + k, count), LoadBf16Tail(y + k, count)), h + k, count);
    }
  });
}

void MoeResidual(Bf16* h, const Bf16* routed, const Bf16* shared, int64_t dim) {
  ForLaneSteps(dim, [&](int64_t k, int64_t count) HWY_ATTR {
    if (count == kLanes) {
      const F32x16 y = RoundBf16(Add(LoadBf16(routed + k), LoadBf16(shared + k)));
      StoreBf16(Add(LoadBf16(h + k), y), h + k);
    } else {
      const F32x16 y =
          RoundBf16(Add(LoadBf16Tail(routed + k, count), LoadBf16Tail(shared + k, count)));
      StoreBf16Tail(Add(LoadBf16Tail(h + k, count), y), h + k, count);
    }
  });
}

}  // namespace

void FillDense(KernelTable& table) {
  table.rms_norm = &RmsNorm;
  table.swiglu_bf16 = &SwiGluBf16;
  table.swiglu_f32 = &SwiGluF32;
  table.residual_add = &ResidualAdd;
  table.moe_residual = &MoeResidual;
}

}  // namespace HWY_NAMESPACE
}  // namespace moebius::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moebius::kernels::cpu {

MOEBIUS_DEFINE_FILL(FillDenseKernels, FillDense)

}  // namespace moebius::kernels::cpu
#endif
