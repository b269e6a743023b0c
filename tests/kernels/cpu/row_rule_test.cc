// The row rule for each kernel: a row's bits do not depend on the number, content or place of the
// other rows, on the number of threads, or on the instruction set (docs/exactness.md).

#include <iostream>
#include <memory>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/cpu/batch_dependent_backend.h"
#include "tests/kernels/cpu/row_ops.h"

namespace moebius::kernels::cpu {
namespace {

std::unique_ptr<CpuBackend> MakeBackend(CpuTarget target, int threads) {
  // Every operation large enough to split is split.
  return *CpuBackend::Create({.num_threads = threads, .target = target, .min_parallel_work = 0});
}

std::string Summary(const std::vector<std::string>& violations) {
  std::string out;
  for (size_t i = 0; i < violations.size() && i < 5; ++i) out += violations[i] + "\n";
  return out;
}

class RowRule : public testing::TestWithParam<RowOp> {};

TEST_P(RowRule, EveryRowHasOneHash) {
  const RowOp& op = GetParam();
  const std::vector<uint64_t> expected = SingleRowHashes(op, *MakeBackend(BestTarget(), 1));
  ASSERT_EQ(expected.size(), static_cast<size_t>(op.good_rows));
  for (size_t a = 0; a < expected.size(); ++a) {
    for (size_t b = a + 1; b < expected.size(); ++b) EXPECT_NE(expected[a], expected[b]);
  }
  for (const CpuTarget target : SupportedTargets()) {
    for (int threads = 1; threads <= 4; ++threads) {
      const std::unique_ptr<CpuBackend> backend = MakeBackend(target, threads);
      EXPECT_EQ(SingleRowHashes(op, *backend), expected) << Name(target) << " alone";
      std::vector<int64_t> ms = {1, 2, 3, 7, 16, 17, 33, 64, 200};
      if (target == CpuTarget::kPortable) ms = {2, 7, 17};  // the same source, ten times slower
      const std::vector<std::string> violations = RowRuleViolations(op, *backend, expected, ms);
      EXPECT_TRUE(violations.empty()) << violations.size() << " on " << Name(target) << " with "
                                      << threads << " threads, the first:\n"
                                      << Summary(violations);
    }
  }
}

std::string CaseName(const testing::TestParamInfo<RowOp>& info) {
  std::string name;
  for (const char c : info.param.name) name += std::isalnum(c) ? c : '_';
  return name;
}

INSTANTIATE_TEST_SUITE_P(Kernels, RowRule, testing::ValuesIn(AllRowOps()), CaseName);

TEST(RowRuleChecker, FindsABatchDependentLinear) {
  const std::unique_ptr<CpuBackend> inner = MakeBackend(BestTarget(), 1);
  BatchDependentBackend broken(inner.get());
  const RowOp op = AllRowOps().front();
  const std::vector<uint64_t> expected = SingleRowHashes(op, *inner);
  EXPECT_TRUE(RowRuleViolations(op, broken, expected, {1, 2, 3, 7}).empty());
  EXPECT_FALSE(RowRuleViolations(op, broken, expected, {16}).empty());
}

TEST(RowRuleTargets, AreThoseOfThisMachine) {
  // The comparison above covers what the machine has; say so where AVX-512 is missing.
  const std::vector<CpuTarget> targets = SupportedTargets();
  std::cout << "compared:";
  for (const CpuTarget target : targets) std::cout << ' ' << Name(target);
  if (targets.back() != CpuTarget::kAvx512) {
    std::cout << " (this machine or build has no AVX-512 F, BW, DQ and VL: not compared)";
  }
  std::cout << '\n';
  EXPECT_EQ(targets.front(), CpuTarget::kPortable);
}

}  // namespace
}  // namespace moebius::kernels::cpu
