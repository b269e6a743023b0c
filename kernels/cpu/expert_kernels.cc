#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/target_dispatch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/expert_kernels.cc"
// The next line includes this file once per target.
#include "hwy/foreach_target.h"
// Per-target part of the file from here.
#include "kernels/cpu/lanes16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace moebius::kernels::cpu {
namespace HWY_NAMESPACE {
namespace {

void QuantizeRow(const Bf16* x, int64_t dim, bool power_of_two_scales, E4m3* codes, float* scales) {
  for (int64_t begin = 0; begin < dim; begin += kQuantBlock) {
    const int64_t end = HWY_MIN(begin + kQuantBlock, dim);
    // |x| orders as its bits do, and a NaN or infinity is above all finite values.
    uint16_t largest = 0;
    for (int64_t k = begin; k < end; ++k) {
      const uint16_t magnitude = x[k].bits & 0x7FFF;
      largest = magnitude > largest ? magnitude : largest;
    }
    float scale = std::numeric_limits<float>::quiet_NaN();
    if (largest < 0x7F80) {
      const float amax = ToFloat(Bf16{largest});
      scale = (amax > 1e-4f ? amax : 1e-4f) / 448.0f;
      if (power_of_two_scales) scale = RoundUpToPowerOfTwo(scale);
    }
    scales[begin / kQuantBlock] = scale;
    const F32x16 divisor = Set(scale);
    ForLaneSteps(end - begin, [&](int64_t k, int64_t count) HWY_ATTR {
      const Bf16* from = x + begin + k;
      E4m3* to = codes + begin + k;
      if (count == kLanes) {
        StoreE4m3(Div(LoadBf16(from), divisor), to);
      } else {
        StoreE4m3Tail(Div(LoadBf16Tail(from, count), divisor), to, count);
      }
    });
  }
}

// Every e4m3 value is a BF16 value, so a decoded row needs no rounding.
void DecodeRow(const E4m3* codes, int64_t dim, Bf16* out) {
  ForLaneSteps(dim, [&](int64_t k, int64_t count) HWY_ATTR {
    if (HasNanCode(codes + k, count)) {
      for (int64_t j = k; j < k + count; ++j) {
        const bool nan = (codes[j].bits & 0x7F) == 0x7F;
        out[j] = nan ? Bf16{0x7FC0} : ToBf16(ToFloat(codes[j]));
      }
    } else if (count == kLanes) {
      StoreRoundedBf16(Mul(DecodeDiv256(codes + k), Set(256.0f)), out + k);
    } else {
      StoreBf16Tail(Mul(DecodeDiv256Tail(codes + k, count), Set(256.0f)), out + k, count);
    }
  });
}

// The canonical sum over [k, k + count) of one token.
template <bool kTail>
HWY_INLINE void CombineLanes(const uint32_t* groups, const float* weights, const Bf16* const* rows,
                             int32_t top_k, int64_t k, int64_t count, Bf16* out) {
  F32x16 total = Zero();
  for (int32_t j = 0; j < top_k;) {
    const uint32_t group = groups[j];
    F32x16 chain =
        Mul(Set(weights[j]), kTail ? LoadBf16Tail(rows[j] + k, count) : LoadBf16(rows[j] + k));
    for (++j; j < top_k && groups[j] == group; ++j) {
      chain = Fma(Set(weights[j]), kTail ? LoadBf16Tail(rows[j] + k, count) : LoadBf16(rows[j] + k),
                  chain);
    }
    total = Add(total, RoundBf16(chain));
  }
  if (kTail) {
    StoreBf16Tail(total, out + k, count);
  } else {
    StoreBf16(total, out + k);
  }
}

void CombineRow(const uint32_t* groups, const float* weights, const Bf16* const* rows,
                int32_t top_k, int64_t dim, Bf16* out) {
  ForLaneSteps(dim, [&](int64_t k, int64_t count) HWY_ATTR {
    if (count == kLanes) {
      CombineLanes<false>(groups, weights, rows, top_k, k, count, out);
    } else {
      CombineLanes<true>(groups, weights, rows, top_k, k, count, out);
    }
  });
}

}  // namespace

void FillExpert(KernelTable& table) {
  table.quantize_row = &QuantizeRow;
  table.decode_row = &DecodeRow;
  table.combine_row = &CombineRow;
}

}  // namespace HWY_NAMESPACE
}  // namespace moebius::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace moebius::kernels::cpu {

MOEBIUS_DEFINE_FILL(FillExpertKernels, FillExpert)

}  // namespace moebius::kernels::cpu
#endif
