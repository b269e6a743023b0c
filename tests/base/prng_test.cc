// Goal: draws are what their documentation says, for ever (a seed is part of a request's identity).

#include "base/prng.h"

#include <array>

#include "gtest/gtest.h"

namespace moebius {
namespace {

TEST(Prng, SplitMix64KnownAnswers) {
  // First outputs of SplitMix64 from state 1234567 (published test vector).
  Prng prng(1234567);
  EXPECT_EQ(prng.Next(), 6457827717110365317ull);
  EXPECT_EQ(prng.Next(), 3203168211198807973ull);
  EXPECT_EQ(prng.Next(), 9817491932198370423ull);
}

TEST(Prng, BelowCoversItsRangeEvenly) {
  Prng prng(1);
  std::array<int, 10> counts{};
  for (int i = 0; i < 100000; ++i) ++counts[prng.Below(10)];
  for (int count : counts) EXPECT_NEAR(count, 10000, 500);
}

TEST(CounterDraw, DependsOnEveryPartOfItsKey) {
  const uint64_t base = CounterDraw(1, 2, 3);
  EXPECT_EQ(base, CounterDraw(1, 2, 3));
  EXPECT_NE(base, CounterDraw(2, 2, 3));
  EXPECT_NE(base, CounterDraw(1, 3, 3));
  EXPECT_NE(base, CounterDraw(1, 2, 4));
}

TEST(ToUnitFloat, StaysBelowOne) {
  EXPECT_EQ(ToUnitFloat(0), 0.0f);
  EXPECT_LT(ToUnitFloat(~0ull), 1.0f);
}

}  // namespace
}  // namespace moebius
