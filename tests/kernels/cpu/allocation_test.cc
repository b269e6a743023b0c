// After warm-up no operation allocates, on any number of threads: the global operator new of this
// binary counts.

#include <memory>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/allocation_counter.h"
#include "tests/kernels/cpu/row_ops.h"
#include "tests/kernels/forwarding_backend.h"

namespace moebius::kernels::cpu {
namespace {

// Counts what is allocated, by any thread, while an operation runs.
class CountingBackend final : public ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  int64_t count() const { return count_; }

 protected:
  void BeforeCall() override { before_ = testing_support::allocations.load(); }
  void AfterCall() override { count_ += testing_support::allocations.load() - before_; }

 private:
  int64_t before_ = 0;
  int64_t count_ = 0;
};

TEST(Allocation, NoneAfterWarmUp) {
  const std::vector<RowOp> ops = AllRowOps();
  for (int threads = 1; threads <= 3; ++threads) {
    const auto backend = *CpuBackend::Create({.num_threads = threads, .min_parallel_work = 0});
    std::vector<int> rows(40);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<int>(i % 5);
    CountingBackend warm_up(backend.get());
    for (const RowOp& op : ops) op.run(warm_up, rows);
    EXPECT_GT(warm_up.count(), 0) << "the counter must see the first calls' scratch";
    CountingBackend counted(backend.get());
    for (const size_t m : {40, 1, 17, 3, 40}) {
      rows.resize(m, 0);
      for (const RowOp& op : ops) {
        const int64_t before = counted.count();
        op.run(counted, rows);
        EXPECT_EQ(counted.count(), before) << op.name << ", m = " << m << ", " << threads;
      }
    }
  }
}

}  // namespace
}  // namespace moebius::kernels::cpu
