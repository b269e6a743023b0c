// Goal: every expert has as many hosts as it shall have, for any number of workers, shares differ
// by at most one expert a layer, and a change of workers moves little.

#include "services/controller/placement_planner.h"

#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "base/prng.h"
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
  const size_t replicas = std::min<size_t>(input.replicas, shares.size());
  for (size_t layer = 0; layer < input.moe_layers.size(); ++layer) {
    std::map<uint32_t, size_t> copies;
    size_t smallest = SIZE_MAX, largest = 0;
    for (const WorkerShare& share : shares) {
      const std::vector<uint32_t>& experts = share.experts[layer];
      EXPECT_EQ(std::set<uint32_t>(experts.begin(), experts.end()).size(), experts.size())
          << "two copies on one worker";
      for (const uint32_t expert : experts) ++copies[expert];
      smallest = std::min(smallest, experts.size());
      largest = std::max(largest, experts.size());
      EXPECT_TRUE(std::is_sorted(experts.begin(), experts.end()));
    }
    if (!input.moe_layers[layer]) {
      EXPECT_TRUE(copies.empty());
      continue;
    }
    ASSERT_EQ(copies.size(), input.experts_per_layer);
    for (const auto& [expert, count] : copies) EXPECT_EQ(count, replicas) << "expert " << expert;
    EXPECT_LE(largest - smallest, 1u);
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

// Workers come and go in any order, the number of replicas changes: every plan is whole and
// balanced, and nobody who stays is given what a survivor could keep.
TEST(PlanPlacement, AnyHistoryWithAnyNumberOfReplicas) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(seed);
    Prng prng(seed);
    PlanInput input = Input();
    input.experts_per_layer = 1 + static_cast<uint32_t>(prng.Below(40));
    input.group_size = 1 + static_cast<uint32_t>(prng.Below(6));
    std::set<uint64_t> nodes{5};
    std::vector<WorkerShare> shares;
    for (int step = 0; step < 12; ++step) {
      const uint64_t node = 1 + prng.Below(12);
      if (nodes.size() > 1 && nodes.count(node) > 0) {
        nodes.erase(node);
      } else {
        nodes.insert(node);
      }
      if (prng.Below(4) == 0) input.replicas = 1 + static_cast<uint32_t>(prng.Below(4));
      shares = PlanPlacement(input, std::vector<uint64_t>(nodes.begin(), nodes.end()), shares);
      ExpectWhole(input, shares);
      ASSERT_EQ(shares.size(), nodes.size());
      const auto again =
          PlanPlacement(input, std::vector<uint64_t>(nodes.begin(), nodes.end()), shares);
      for (size_t w = 0; w < shares.size(); ++w) {
        EXPECT_EQ(again[w].experts, shares[w].experts) << "no change, no move";
      }
      if (HasFailure()) return;
    }
  }
}

TEST(PlanPlacement, ALostWorkersReplicasAreMadeAgainAndLittleElseMoves) {
  PlanInput input = Input();
  input.replicas = 2;
  const std::vector<WorkerShare> four = PlanPlacement(input, {1, 2, 3, 4}, {});
  const std::vector<WorkerShare> three = PlanPlacement(input, {1, 2, 4}, four);
  ExpectWhole(input, three);
  for (size_t layer = 1; layer < input.moe_layers.size(); ++layer) {
    size_t loads = 0;
    for (const WorkerShare& share : three) {
      const std::vector<uint32_t>& old = four[share.node - 1].experts[layer];
      for (const uint32_t expert : share.experts[layer]) {
        loads += std::binary_search(old.begin(), old.end(), expert) ? 0 : 1;
      }
    }
    // Eight are lost. Some may find room only where their other copy lies; then another expert
    // makes way for each.
    EXPECT_GE(loads, 8u);
    EXPECT_LE(loads, 12u);
  }
}

TEST(PlanPlacement, TheReplicasOfOneWorkersExpertsLieWithSeveralOthers) {
  PlanInput input = Input();
  input.replicas = 2;
  const std::vector<WorkerShare> shares = PlanPlacement(input, {1, 2, 3, 4}, {});
  for (size_t w = 0; w < shares.size(); ++w) {
    std::set<size_t> others;
    for (size_t o = 0; o < shares.size(); ++o) {
      for (size_t layer = 1; o != w && layer < input.moe_layers.size(); ++layer) {
        for (const uint32_t expert : shares[w].experts[layer]) {
          const std::vector<uint32_t>& held = shares[o].experts[layer];
          if (std::binary_search(held.begin(), held.end(), expert)) others.insert(o);
        }
      }
    }
    EXPECT_GE(others.size(), 2u) << "a dead worker's load would go to one";
  }
}

}  // namespace
}  // namespace moebius::services
