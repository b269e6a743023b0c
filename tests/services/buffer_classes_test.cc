// Goal: a pool holds every round, however its rows fall to peers, and is not larger than that
// takes.

#include "services/common/buffer_classes.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <optional>
#include <set>

#include "base/prng.h"
#include "gtest/gtest.h"
#include "proto/wire/dispatch.h"
#include "services/common/model_host.h"

namespace moebius::services {
namespace {

model::ModelConfig Config(int64_t hidden, int64_t experts, int64_t top_k, bool fp8) {
  model::ModelConfig config;
  config.hidden_size = hidden;
  config.num_hidden_layers = 61;
  config.n_routed_experts = experts;
  config.num_experts_per_tok = top_k;
  if (fp8) config.quantization = model::Fp8Quantization{};
  return config;
}

uint64_t TotalBytes(const std::vector<runtime::BufferClass>& classes) {
  uint64_t bytes = 0;
  for (const runtime::BufferClass& c : classes) bytes += c.bytes * c.count;
  return bytes;
}

TEST(BufferClasses, AreNotLargerThanARoundNeeds) {
  const uint64_t v3 =
      TotalBytes(MakeBufferClasses(Config(7168, 256, 8, true), kMaxStepRows, kMostPeers));
  std::printf("V3: %.2f GB\n", static_cast<double>(v3) * 1e-9);
  EXPECT_LT(v3, 1'500'000'000u);
  // What a V3 round holds at least: 512 rows times 8 answers of 14 KiB.
  EXPECT_GT(v3, 512u * 8 * 7168 * 2);
  EXPECT_LT(TotalBytes(MakeBufferClasses(Config(256, 16, 4, true), kMaxStepRows, kMostPeers)),
            40'000'000u);
}

// One round: every row draws its experts, every expert lives on a random peer (or few of them hold
// nearly all), the router cuts frames of kRowsPerFrame rows, and all dispatches and answers are
// held at once.
TEST(BufferClasses, HoldEveryRound) {
  for (uint64_t seed = 1; seed <= 200; ++seed) {
    Prng prng(seed);
    const bool fp8 = prng.Below(2) == 0;
    const uint32_t top_k = 1 + static_cast<uint32_t>(prng.Below(8));
    const uint32_t experts = 8 + static_cast<uint32_t>(prng.Below(120));
    const uint32_t peers =
        1 + static_cast<uint32_t>(prng.Below(prng.Below(2) == 0 ? 8 : kMostPeers));
    const model::ModelConfig config = Config(384, experts, top_k, fp8);
    const wire::RowLimits limits = MakeRowLimits(config, kMaxStepRows);
    const std::vector<runtime::BufferClass> classes =
        MakeBufferClasses(config, kMaxStepRows, peers);
    runtime::BufferPool pool(classes);
    std::vector<uint32_t> home(experts);
    const uint64_t skew = 1 + prng.Below(peers);  // experts live on the first `skew` peers
    for (uint32_t& peer : home) peer = static_cast<uint32_t>(prng.Below(skew));
    std::map<uint32_t, std::vector<uint32_t>> rows_of;  // peer -> items of each row sent to it
    for (uint32_t row = 0; row < kMaxStepRows; ++row) {
      std::set<uint32_t> chosen;
      while (chosen.size() < top_k) chosen.insert(static_cast<uint32_t>(prng.Below(experts)));
      std::map<uint32_t, uint32_t> here;
      for (const uint32_t expert : chosen) ++here[home[expert]];
      for (const auto& [peer, items] : here) rows_of[peer].push_back(items);
    }
    std::vector<runtime::Buffer> held;
    for (const auto& [peer, rows] : rows_of) {
      for (size_t begin = 0; begin < rows.size(); begin += kRowsPerFrame) {
        const size_t end = std::min<size_t>(begin + kRowsPerFrame, rows.size());
        uint64_t items = 0;
        for (size_t r = begin; r < end; ++r) items += rows[r];
        for (const uint64_t bytes : {wire::LayoutOfDispatch(limits, end - begin, items).total_bytes,
                                     wire::CombineBytes(limits, items)}) {
          std::optional<runtime::Buffer> buffer = pool.Acquire(bytes);
          ASSERT_TRUE(buffer.has_value()) << "seed " << seed << ": none for " << bytes << " bytes";
          held.push_back(std::move(*buffer));
        }
      }
    }
  }
}

}  // namespace
}  // namespace moebius::services
