// Goal: the controller's state machine places, publishes, survives loss and repetition, and never
// unpublishes what serves. Method: time is a parameter.

#include "services/controller/cluster_state.h"

#include "gtest/gtest.h"

namespace moebius::services {
namespace {

ClusterOptions Options(uint32_t expected) {
  ClusterOptions options;
  options.plan.moe_layers = {false, true};
  options.plan.experts_per_layer = 4;
  options.plan.group_size = 2;
  options.model_digest = std::string(8, 'd');
  options.expected_experts = expected;
  return options;
}

WorkerRecord Expert(uint64_t node, uint64_t incarnation = 1) {
  WorkerRecord record;
  record.node = node;
  record.incarnation = incarnation;
  record.role = WorkerRole::kExpert;
  record.model_digest = std::string(8, 'd');
  return record;
}

// Renews `record` as a worker that has carried out whatever it was told.
void RenewDone(ClusterState& state, WorkerRecord record, int64_t now) {
  ASSERT_TRUE(state.Renew(record, now).ok());
  if (const WorkerRecord* known = state.Find(record.node)) record.operation_done = known->operation;
  record.ready = true;
  ASSERT_TRUE(state.Renew(record, now).ok());
}

TEST(ClusterState, PublishesOnceAllExpectedWorkersHaveLoaded) {
  ClusterState state(Options(2));
  ASSERT_TRUE(state.Renew(Expert(1), 0).ok());
  state.Tick(1000);
  EXPECT_EQ(state.Find(1)->operation, 0u) << "one of two: nothing is planned yet";
  ASSERT_TRUE(state.Renew(Expert(2), 1000).ok());
  state.Tick(1001);
  EXPECT_NE(state.Find(1)->operation, 0u);
  EXPECT_EQ(state.epoch(), 0u) << "ordered, not carried out";
  RenewDone(state, Expert(1), 1002);
  state.Tick(1003);
  EXPECT_EQ(state.epoch(), 0u);
  RenewDone(state, Expert(2), 1004);
  state.Tick(1005);
  EXPECT_EQ(state.epoch(), 1u);
  EXPECT_TRUE(state.complete());
  EXPECT_EQ(state.published().size(), 2u);
}

ClusterState Ready() {
  ClusterState state(Options(2));
  (void)state.Renew(Expert(1), 0);
  (void)state.Renew(Expert(2), 0);
  state.Tick(1);
  RenewDone(state, Expert(1), 2);
  RenewDone(state, Expert(2), 2);
  state.Tick(3);
  return state;
}

TEST(ClusterState, ALapsedWorkerIsPlannedAwayFromAndThePlacementStaysUntilTheNextIsReady) {
  ClusterState state = Ready();
  for (int64_t now = 500; now <= 5000; now += 500) {
    RenewDone(state, Expert(1), now);
    state.Tick(now);
  }
  EXPECT_EQ(state.Find(2), nullptr) << "no renewal for longer than the lease";
  RenewDone(state, Expert(1), 5500);
  state.Tick(5500);
  EXPECT_EQ(state.epoch(), 2u);
  EXPECT_TRUE(state.complete()) << "the survivor hosts everything";
  EXPECT_EQ(state.published()[0].share.experts[1].size(), 4u);
}

TEST(ClusterState, ANewIncarnationIsGivenItsOrderAgain) {
  ClusterState state = Ready();
  const uint64_t before = state.Find(2)->operation;
  ASSERT_TRUE(state.Renew(Expert(2, /*incarnation=*/2), 100).ok());
  EXPECT_FALSE(state.complete()) << "the old one is gone";
  state.Tick(1000);
  EXPECT_GT(state.Find(2)->operation, before);
  EXPECT_EQ(state.Renew(Expert(2, 1), 1001).code(), absl::StatusCode::kAborted)
      << "the zombie is fenced";
}

TEST(ClusterState, WithReplicasItIsCompleteWithoutOneOfThem) {
  ClusterOptions options = Options(3);
  options.plan.replicas = 2;
  ClusterState state(options);
  for (uint64_t node : {1, 2, 3}) ASSERT_TRUE(state.Renew(Expert(node), 0).ok());
  state.Tick(1);
  for (uint64_t node : {1, 2, 3}) RenewDone(state, Expert(node), 2);
  state.Tick(3);
  ASSERT_EQ(state.epoch(), 1u);
  ASSERT_TRUE(state.complete());
  ASSERT_TRUE(state.Renew(Expert(2, /*incarnation=*/2), 100).ok());
  EXPECT_TRUE(state.complete()) << "each of its experts has another host";
  ASSERT_TRUE(state.Renew(Expert(3, /*incarnation=*/2), 101).ok());
  EXPECT_FALSE(state.complete()) << "some lay on these two alone";
  // They load again what they had.
  state.Tick(1000);
  for (uint64_t node : {2, 3}) RenewDone(state, Expert(node, 2), 1001);
  RenewDone(state, Expert(1), 1001);
  state.Tick(1002);
  EXPECT_EQ(state.epoch(), 2u);
  EXPECT_TRUE(state.complete());
}

// Stopped for longer than its lease while the others load, then back as the same incarnation: it
// has lost its order, and nothing may be published as if it had carried it out.
TEST(ClusterState, AWorkerThatWasAwayForALeaseIsGivenItsOrderAgain) {
  ClusterState state(Options(3));
  for (uint64_t node : {1, 2, 3}) ASSERT_TRUE(state.Renew(Expert(node), 0).ok());
  state.Tick(1);
  ASSERT_NE(state.Find(3)->operation, 0u);
  for (int64_t now = 1000; now <= 4000; now += 1000) {
    for (uint64_t node : {1, 2}) ASSERT_TRUE(state.Renew(Expert(node), now).ok());
    state.Tick(now);
  }
  ASSERT_EQ(state.Find(3), nullptr);
  ASSERT_TRUE(state.Renew(Expert(3), 4100).ok());
  for (uint64_t node : {1, 2}) RenewDone(state, Expert(node), 4100);
  state.Tick(4101);
  EXPECT_EQ(state.epoch(), 0u) << "the third has loaded nothing";
  EXPECT_FALSE(state.complete());
  state.Tick(4500);
  EXPECT_NE(state.Find(3)->operation, 0u);
  for (uint64_t node : {1, 2, 3}) RenewDone(state, Expert(node), 4600);
  state.Tick(4601);
  EXPECT_EQ(state.epoch(), 1u);
  EXPECT_TRUE(state.complete());
}

// The controller itself was stopped: every lease has lapsed when it goes on, a plan was pending.
TEST(ClusterState, APauseOfTheControllerPublishesNothingThatIsNotHosted) {
  ClusterState state = Ready();
  ASSERT_TRUE(state.Renew(Expert(2, /*incarnation=*/2), 100).ok());
  state.Tick(500);  // planned for the new incarnation, not carried out
  const uint64_t epoch = state.epoch();
  state.Tick(10'000);
  ASSERT_EQ(state.Find(1), nullptr);
  ASSERT_TRUE(state.Renew(Expert(1), 10'001).ok());
  ASSERT_TRUE(state.Renew(Expert(2, 2), 10'001).ok());
  state.Tick(10'002);
  EXPECT_EQ(state.epoch(), epoch);
  state.Tick(10'500);
  RenewDone(state, Expert(1), 10'501);
  RenewDone(state, Expert(2, 2), 10'501);
  state.Tick(10'502);
  EXPECT_EQ(state.epoch(), epoch + 1);
  EXPECT_TRUE(state.complete());
}

TEST(ClusterState, ALaterControllersEpochsAreNewer) {
  ClusterOptions options = Options(1);
  options.first_epoch = 1000;
  ClusterState state(options);
  ASSERT_TRUE(state.Renew(Expert(1), 0).ok());
  state.Tick(1);
  RenewDone(state, Expert(1), 2);
  state.Tick(3);
  EXPECT_EQ(state.epoch(), 1001u);
}

TEST(ClusterState, AWorkerOfAnotherModelIsRefused) {
  ClusterState state(Options(1));
  WorkerRecord stranger = Expert(1);
  stranger.model_digest = std::string(8, 'x');
  EXPECT_EQ(state.Renew(stranger, 0).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(ClusterState, ALeavingWorkerGetsNothingNew) {
  ClusterState state = Ready();
  WorkerRecord leaving = Expert(2);
  leaving.leaving = true;
  leaving.operation_done = state.Find(2)->operation;
  ASSERT_TRUE(state.Renew(leaving, 10).ok());
  state.Tick(1000);
  RenewDone(state, Expert(1), 1001);
  state.Tick(1002);
  ASSERT_EQ(state.published().size(), 1u);
  EXPECT_EQ(state.published()[0].node, 1u);
}

TEST(ClusterState, IsSettledOnceEveryLiveWorkerHasHadALeaseToRenew) {
  ClusterState state(Options(2));
  state.Tick(1000);
  state.Tick(4000);
  EXPECT_FALSE(state.settled());
  EXPECT_TRUE(state.Tick(4001)) << "watchers hear of it";
  EXPECT_TRUE(state.settled());
}

TEST(ClusterState, WhatWasDoneForAnEarlierControllerIsNotDoneForThisOne) {
  ClusterOptions options = Options(1);
  options.first_epoch = 1000;
  ClusterState state(options);
  WorkerRecord expert = Expert(1);
  expert.operation_done = 7;  // of the earlier one
  ASSERT_TRUE(state.Renew(expert, 0).ok());
  state.Tick(1);
  EXPECT_GT(state.Find(1)->operation, 7u);
  EXPECT_EQ(state.epoch(), 0u) << "ordered, not carried out";
  EXPECT_FALSE(state.complete());
}

}  // namespace
}  // namespace moebius::services
