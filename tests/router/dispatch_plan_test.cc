// Goal: every pair goes to exactly one live host of it, a row to few destinations, and the choice
// is a pure function.

#include "router/dispatch_plan.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/prng.h"
#include "gtest/gtest.h"

namespace moebius::router {
namespace {

constexpr uint32_t kExperts = 8;

runtime::ActorAddress Host(uint64_t node) { return {NodeId(node), runtime::kExpertWorker}; }

// Experts 0-3 on node 1, 4-7 on node 2; all of them also on node 3.
Placement MakePlacement() {
  Placement placement(Epoch(1), 2, kExperts);
  for (uint32_t expert = 0; expert < kExperts; ++expert) {
    placement.AddReplica(LayerId(1), ExpertId(expert), Host(expert < 4 ? 1 : 2));
    placement.AddReplica(LayerId(1), ExpertId(expert), Host(3));
  }
  return placement;
}

struct Fixture {
  Fixture() {
    replicas.Build(MakePlacement(), destinations);
    for (Destination& destination : destinations) destination.state = DestinationState::kUp;
  }
  std::vector<PlanItem> Plan(std::vector<std::pair<uint32_t, uint32_t>> pairs) {
    std::vector<PlanItem> items;
    for (const auto& [row, expert] : pairs) {
      PlanItem item;
      item.row = row;
      item.expert = expert;
      items.push_back(item);
    }
    PlanDispatch(replicas, destinations, exclusions, 1, absl::MakeSpan(items), scratch);
    return items;
  }
  ReplicaTable replicas;
  std::vector<Destination> destinations;  // 0: node 1, 1: node 2, 2: node 3
  std::vector<Exclusion> exclusions;
  PlanScratch scratch;
};

TEST(PlanDispatch, PlacesEveryPairOnAHostOfIt) {
  Fixture fixture;
  Prng prng(1);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::pair<uint32_t, uint32_t>> pairs;
    for (uint32_t row = 0; row < 10; ++row) {
      for (uint32_t expert = 0; expert < kExperts; ++expert) {
        if (prng.Below(3) == 0) pairs.emplace_back(row, expert);
      }
    }
    for (Destination& destination : fixture.destinations)
      destination.outstanding_items = prng.Below(20);
    const std::vector<PlanItem> items = fixture.Plan(pairs);
    for (const PlanItem& item : items) {
      const auto hosts = fixture.replicas.Replicas(1, item.expert);
      EXPECT_NE(std::find(hosts.begin(), hosts.end(), item.destination), hosts.end());
    }
    const std::vector<PlanItem> again = fixture.Plan(pairs);
    for (size_t i = 0; i < items.size(); ++i) EXPECT_EQ(items[i].destination, again[i].destination);
  }
}

TEST(PlanDispatch, ARowStaysTogetherWhereItCan) {
  Fixture fixture;
  std::set<uint16_t> used;
  for (const PlanItem& item : fixture.Plan({{0, 0}, {0, 1}, {0, 2}, {0, 3}}))
    used.insert(item.destination);
  EXPECT_EQ(used.size(), 1u);
}

TEST(PlanDispatch, LoadSpreadsRowsOverReplicas) {
  Fixture fixture;
  std::vector<std::pair<uint32_t, uint32_t>> pairs;
  for (uint32_t row = 0; row < 100; ++row) pairs.emplace_back(row, 0);
  int first = 0;
  for (const PlanItem& item : fixture.Plan(pairs)) first += item.destination == 0 ? 1 : 0;
  EXPECT_EQ(first, 50);
}

// A decoding step: few rows, each with experts of its own. No expert's weights are read twice.
TEST(PlanDispatch, FewRowsOfAnExpertGoToOneReplica) {
  Fixture fixture;
  Prng prng(2);
  for (int round = 0; round < 100; ++round) {
    std::vector<std::pair<uint32_t, uint32_t>> pairs;
    for (uint32_t row = 0; row < 16; ++row) {
      pairs.emplace_back(row, static_cast<uint32_t>(prng.Below(kExperts)));
    }
    std::map<uint32_t, std::set<uint16_t>> readers;
    std::map<uint16_t, size_t> experts_at;
    for (const PlanItem& item : fixture.Plan(pairs)) {
      readers[item.expert].insert(item.destination);
    }
    for (const auto& [expert, destinations] : readers) {
      EXPECT_EQ(destinations.size(), 1u) << "expert " << expert;
      ++experts_at[*destinations.begin()];
    }
    if (readers.size() == kExperts) {
      EXPECT_EQ(experts_at.size(), 3u) << "and experts are dealt to all who have them";
    }
  }
}

TEST(PlanDispatch, AvoidsSlowDownExcludedAndAsked) {
  Fixture fixture;
  fixture.destinations[0].state = DestinationState::kSlow;
  EXPECT_EQ(fixture.Plan({{0, 0}})[0].destination, 2);
  fixture.destinations[2].state = DestinationState::kDown;
  EXPECT_EQ(fixture.Plan({{0, 0}})[0].destination, 0) << "slow is better than nobody";
  fixture.exclusions.push_back({0, 1, 0});
  EXPECT_EQ(fixture.Plan({{0, 0}})[0].destination, kNoDestination);
  EXPECT_EQ(fixture.Plan({{0, 1}})[0].destination, 0) << "only that expert is excluded there";
  std::vector<PlanItem> hedge(1);
  hedge[0].expert = 4;
  hedge[0].avoid[0] = 1;
  PlanDispatch(fixture.replicas, fixture.destinations, {}, 1, absl::MakeSpan(hedge),
               fixture.scratch);
  EXPECT_EQ(hedge[0].destination, kNoDestination) << "asked already, and the other host is down";
}

}  // namespace
}  // namespace moebius::router
