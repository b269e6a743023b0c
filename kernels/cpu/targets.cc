#include "kernels/cpu/targets.h"

#include "kernels/cpu/highway_targets.h"
// Highway reads the list of targets above.
#include "hwy/targets.h"

namespace moebius::kernels::cpu {

const char* Name(CpuTarget target) {
  switch (target) {
    case CpuTarget::kPortable:
      return "portable";
    case CpuTarget::kAvx2:
      return "avx2";
    case CpuTarget::kAvx512:
      return "avx512";
  }
  return "?";
}

std::vector<CpuTarget> SupportedTargets() {
  std::vector<CpuTarget> targets = {CpuTarget::kPortable};
  [[maybe_unused]] const int64_t machine = hwy::SupportedTargets();
#if HWY_TARGETS & HWY_AVX2
  if (machine & HWY_AVX2) targets.push_back(CpuTarget::kAvx2);
#endif
#if HWY_TARGETS & HWY_AVX3
  if (machine & HWY_AVX3) targets.push_back(CpuTarget::kAvx512);
#endif
  return targets;
}

CpuTarget BestTarget() { return SupportedTargets().back(); }

}  // namespace moebius::kernels::cpu
