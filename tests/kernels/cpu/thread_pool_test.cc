#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <set>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/cpu/random_tensors.h"
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace moebius::kernels::cpu {
namespace {

TEST(ThreadPool, CoversEveryUnitOnceInTheSameParts) {
  for (int threads = 1; threads <= 5; ++threads) {
    ThreadPool pool(threads);
    for (const int64_t units : {0, 1, 2, 3, 7, 100}) {
      for (int repeat = 0; repeat < 50; ++repeat) {
        std::vector<std::atomic<int>> owner(static_cast<size_t>(units));
        for (auto& unit : owner) unit = -1;
        std::atomic<int> twice{0};
        pool.Run(units, true, [&](int64_t begin, int64_t end, int thread) {
          for (int64_t u = begin; u < end; ++u) {
            if (owner[u].exchange(thread) != -1) ++twice;
          }
        });
        EXPECT_EQ(twice, 0);
        for (int64_t u = 0; u < units; ++u) {
          EXPECT_GE(owner[u], 0);
          EXPECT_LT(owner[u], threads);
          // Contiguous, in the order of threads.
          EXPECT_LE(owner[u > 0 ? u - 1 : 0], owner[u]);
        }
      }
    }
  }
}

TEST(ThreadPool, DoesNotShareWhatIsNotWorthIt) {
  ThreadPool pool(3);
  std::set<int> threads;
  pool.Run(100, false, [&](int64_t, int64_t, int thread) { threads.insert(thread); });
  EXPECT_EQ(threads, std::set<int>{0});
}

TEST(ThreadPool, StartsAndStopsIdle) {
  for (int i = 0; i < 20; ++i) ThreadPool pool(4);
}

TEST(CpuBackendCreate, RefusesWhatItCannotDo) {
  EXPECT_EQ(CpuBackend::Create({.num_threads = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  for (const CpuTarget target : SupportedTargets()) {
    const auto backend = CpuBackend::Create({.target = target});
    ASSERT_TRUE(backend.ok());
    EXPECT_EQ((*backend)->target(), target);
    EXPECT_EQ((*backend)->NumericsName(), "cpu-f32x16-v1");
  }
}

#if defined(__x86_64__)
TEST(FloatEnvironment, TheCallersModesDoNotReachTheBits) {
  // Products and sums in the subnormal range: flush-to-zero and rounding modes would show.
  constexpr int64_t kDim = 64, kOuts = 32;
  Prng prng(8);
  const std::vector<Bf16> x = RandomBf16(prng, kDim, 1e-19f);
  std::vector<Bf16> weights = RandomBf16(prng, kOuts * kDim, 1e-20f);
  const MatrixView view{DType::kBf16, kOuts, kDim,
                        reinterpret_cast<const std::byte*>(weights.data())};
  for (const CpuTarget target : SupportedTargets()) {
    for (int threads = 1; threads <= 2; ++threads) {
      const auto backend =
          *CpuBackend::Create({.num_threads = threads, .target = target, .min_parallel_work = 0});
      std::vector<float> out[2] = {std::vector<float>(kOuts), std::vector<float>(kOuts)};
      for (int hostile = 0; hostile < 2; ++hostile) {
        const uint32_t before = _mm_getcsr();
        const uint32_t mode = hostile ? 0xFFC0 : before;  // toward zero, FTZ, DAZ
        _mm_setcsr(mode);
        const absl::Status status = backend->Linear({.m = 1,
                                                     .weight = view,
                                                     .x = x.data(),
                                                     .x_stride = kDim,
                                                     .out_f32 = out[hostile].data(),
                                                     .out_stride = kOuts});
        const uint32_t after = _mm_getcsr();
        _mm_setcsr(before);
        ASSERT_TRUE(status.ok());
        EXPECT_EQ(after & 0xFFC0, mode & 0xFFC0) << "the caller's modes are its own";
      }
      EXPECT_EQ(out[0], out[1]) << Name(target);
      int subnormal = 0;
      for (const float value : out[0]) subnormal += value != 0 && std::abs(value) < 1.2e-38f;
      EXPECT_GT(subnormal, 0) << "the inputs miss the subnormal range";
    }
  }
}
#endif

}  // namespace
}  // namespace moebius::kernels::cpu
