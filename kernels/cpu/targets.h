#pragma once

// The instruction sets a CpuBackend can run on. All give the same bits (lanes16-inl.h says how), so
// the choice is one of speed and, in tests, of proof.

#include <cstdint>
#include <vector>

namespace moebius::kernels::cpu {

enum class CpuTarget : uint8_t {
  kPortable = 0,  // plain C++ with std::fma: runs anywhere, about a hundred times slower
  kAvx2 = 1,      // AVX2, FMA, F16C
  kAvx512 = 2,    // AVX-512 F, BW, DQ, VL
};

const char* Name(CpuTarget target);

// What this build has and this machine can execute, slowest first; never empty.
std::vector<CpuTarget> SupportedTargets();

// The fastest of them.
CpuTarget BestTarget();

}  // namespace moebius::kernels::cpu
