#pragma once

// MOEBIUS_DEFINE_FILL: the bridge from a CpuTarget to the namespace compiled for it. For use once
// per file of kernels, after `#if HWY_ONCE` and inside moebius::kernels::cpu, where HWY_NAMESPACE
// is the baseline's namespace.
//
// REQUIRES: HWY_TARGETS (hwy/detect_targets.h); highway.h itself must come after foreach_target.h.

#include "kernels/cpu/highway_targets.h"
#include "kernels/cpu/targets.h"
// Highway reads the list of targets above.
#include "hwy/detect_targets.h"

#if HWY_TARGETS & HWY_AVX2
#define MOEBIUS_CASE_AVX2(Fill, table)            \
  case ::moebius::kernels::cpu::CpuTarget::kAvx2: \
    N_AVX2::Fill(table);                          \
    return;
#else
#define MOEBIUS_CASE_AVX2(Fill, table)
#endif

#if HWY_TARGETS & HWY_AVX3
#define MOEBIUS_CASE_AVX512(Fill, table)            \
  case ::moebius::kernels::cpu::CpuTarget::kAvx512: \
    N_AVX3::Fill(table);                            \
    return;
#else
#define MOEBIUS_CASE_AVX512(Fill, table)
#endif

// Defines void FillFunction(CpuTarget, KernelTable&), which calls `Fill` of the target's namespace.
#define MOEBIUS_DEFINE_FILL(FillFunction, Fill)             \
  void FillFunction(CpuTarget target, KernelTable& table) { \
    switch (target) {                                       \
      MOEBIUS_CASE_AVX2(Fill, table)                        \
      MOEBIUS_CASE_AVX512(Fill, table)                      \
      default:                                              \
        HWY_NAMESPACE::Fill(table); /* the baseline */      \
    }                                                       \
  }
