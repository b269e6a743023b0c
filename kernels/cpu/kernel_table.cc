#include "kernels/cpu/kernel_table.h"

#include <array>

namespace moebius::kernels::cpu {
namespace {

KernelTable MakeTable(CpuTarget target) {
  KernelTable table = {};
  FillLinearKernels(target, table);
  FillAttentionKernels(target, table);
  FillDenseKernels(target, table);
  FillExpertKernels(target, table);
  FillSamplingKernels(target, table);
  return table;
}

}  // namespace

const KernelTable& KernelsFor(CpuTarget target) {
  static const std::array<KernelTable, 3> tables = {
      MakeTable(CpuTarget::kPortable), MakeTable(CpuTarget::kAvx2), MakeTable(CpuTarget::kAvx512)};
  return tables[static_cast<size_t>(target)];
}

}  // namespace moebius::kernels::cpu
