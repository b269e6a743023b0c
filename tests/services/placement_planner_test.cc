// Goal: every expert has exactly one host for any number of workers, shares differ by at most one
// expert a layer, and a change of workers moves little.

#include "services/controller/placement_planner.h"

#include <algorithm>
#include <set>

#include "gtest/gtest.h"

namespace moebius::services {
namespace {

PlanInput Input() {
  PlanInput input;
  input.moe_layers = {false, true, true, true, true};
  input.experts_per_layer = 16;
  input.group_size = 4;
  return input;
}

void ExpectWhole(const PlanInput& input, const std::vector<WorkerShare>& shares) {
  for (size_t layer = 0; layer < input.moe_layers.size(); ++layer) {
    std::multiset<uint32_t> placed;
    size_t smallest = SIZE_MAX, largest = 0;
    for (const WorkerShare& share : shares) {
      placed.insert(share.experts[layer].begin(), share.experts[layer].end());
      smallest = std::min(smallest, share.experts[layer].size());
      largest = std::max(largest, share.experts[layer].size());
      EXPECT_TRUE(std::is_sorted(share.experts[layer].begin(), share.experts[layer].end()));
    }
    EXPECT_EQ(placed.size(), input.moe_layers[layer] ? input.experts_per_layer : 0u);
    EXPECT_EQ(std::set<uint32_t>(placed.begin(), placed.end()).size(), placed.size());
    if (input.moe_layers[layer]) {
      EXPECT_LE(largest - smallest, 1u);
    }
  }
}

TEST(PlanPlacement, PlacesEveryExpertOnceOverAnyNumberOfWorkers) {
  for (uint64_t workers : {1, 2, 3, 5, 7, 16, 20}) {
    std::vector<uint64_t> nodes;
    for (uint64_t n = 1; n <= workers; ++n) nodes.push_back(n * 10);
    ExpectWhole(Input(), PlanPlacement(Input(), nodes, {}));
  }
}

TEST(PlanPlacement, KeepsGateGroupsWholeWhereTheyFit) {
  for (const WorkerShare& share : PlanPlacement(Input(), {1, 2}, {})) {
    for (size_t layer = 1; layer < share.experts.size(); ++layer) {
      std::set<uint32_t> groups;
      for (uint32_t expert : share.experts[layer]) groups.insert(expert / 4);
      EXPECT_EQ(groups.size(), 2u) << "eight experts of two whole groups";
    }
  }
}

TEST(PlanPlacement, MovesOnlyWhatAChangeNeeds) {
  const std::vector<WorkerShare> two = PlanPlacement(Input(), {1, 2}, {});
  const std::vector<WorkerShare> three = PlanPlacement(Input(), {1, 2, 3}, two);
  ExpectWhole(Input(), three);
  for (size_t layer = 1; layer < 5; ++layer) {
    for (size_t w = 0; w < 2; ++w) {
      for (uint32_t expert : three[w].experts[layer]) {
        const auto& before = two[w].experts[layer];
        EXPECT_TRUE(std::find(before.begin(), before.end(), expert) != before.end())
            << "nothing moves between old workers";
      }
    }
  }
  EXPECT_EQ(PlanPlacement(Input(), {1, 2, 3}, three)[1].experts, three[1].experts)
      << "no change, no move";
}

}  // namespace
}  // namespace moebius::services
