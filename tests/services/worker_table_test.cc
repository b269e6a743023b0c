// Goal: an attempt goes to a worker that can serve it, not to one that has just failed, one suspect
// at a time. Method: views made by hand; stubs are never called.

#include "services/gateway/worker_table.h"

#include <atomic>
#include <chrono>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::services {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;
using Hold = WorkerTable::Hold;

v1::Worker MakeWorker(uint64_t node, uint64_t incarnation, bool ready = true,
                      const std::string& numerics = "cpu") {
  v1::Worker worker;
  worker.set_node(node);
  worker.set_incarnation(incarnation);
  worker.set_role(v1::ROLE_ATTENTION);
  worker.set_grpc_address("127.0.0.1:" + std::to_string(node));
  worker.set_model_digest("digest");
  worker.set_numerics(numerics);
  worker.set_ready(ready);
  return worker;
}

v1::ClusterView ViewOf(const std::vector<v1::Worker>& workers, bool settled = true) {
  v1::ClusterView view;
  view.set_complete(true);
  view.set_settled(settled);
  for (const v1::Worker& worker : workers) *view.add_workers() = worker;
  return view;
}

class WorkerTableTest : public testing::Test {
 protected:
  WorkerTableTest()
      : table_([this](const std::string& address) {
          dialled_.push_back(address);
          return std::shared_ptr<WorkerTable::Stub>();
        }) {}
  // Whom it would be now; "" for nobody.
  std::unique_ptr<Hold> TakeNow(const WorkerTable::Wish& wish = {}) {
    auto hold = table_.Take(wish, steady_clock::now(), [] { return false; });
    return hold.ok() ? *std::move(hold) : nullptr;
  }
  std::vector<std::string> dialled_;
  WorkerTable table_;
};

TEST_F(WorkerTableTest, TheOneWithTheFewestAboard) {
  EXPECT_EQ(TakeNow(), nullptr);
  EXPECT_FALSE(table_.CanServe());
  table_.OnView(ViewOf({MakeWorker(1, 1), MakeWorker(2, 1), MakeWorker(3, 1, /*ready=*/false)}));
  EXPECT_TRUE(table_.CanServe());
  const auto a = TakeNow(), b = TakeNow();
  ASSERT_TRUE(a && b);
  EXPECT_NE(a->node(), b->node()) << "one each";
  EXPECT_NE(a->node(), 3u);
  EXPECT_NE(b->node(), 3u) << "not ready";
}

TEST_F(WorkerTableTest, AControllerThatHasJustStartedTakesNobodyAway) {
  table_.OnView(ViewOf({MakeWorker(1, 1)}));
  v1::ClusterView fresh = ViewOf({}, /*settled=*/false);
  fresh.set_complete(false);
  table_.OnView(fresh);
  EXPECT_TRUE(table_.CanServe());
  EXPECT_NE(TakeNow(), nullptr);
  table_.OnView(ViewOf({}));
  EXPECT_FALSE(table_.CanServe());
  EXPECT_EQ(TakeNow(), nullptr);
}

TEST_F(WorkerTableTest, OneThatFailedIsPutOffUntilItsNextIncarnation) {
  table_.OnView(ViewOf({MakeWorker(1, 1), MakeWorker(2, 1)}));
  const auto first = TakeNow();
  const uint64_t failed = first->node();
  first->Failed();
  first->Failed();  // of another request, the same death
  for (int i = 0; i < 3; ++i) {
    const auto next = TakeNow();
    if (!next) break;  // the machine was busy for longer than a back-off: nothing to see
    EXPECT_NE(next->node(), failed);
  }
  // It came back: nothing is held against it.
  table_.OnView(ViewOf({MakeWorker(failed, 2)}));
  const auto again = TakeNow();
  ASSERT_NE(again, nullptr);
  EXPECT_EQ(again->node(), failed);
  EXPECT_EQ(dialled_.size(), 3u) << "and it was dialled anew";
  // What an old attempt says of the incarnation before has no effect.
  first->Failed();
  EXPECT_NE(TakeNow(), nullptr);
}

TEST_F(WorkerTableTest, OnesThatFailedAreAskedAgainWhenNobodyElseIsThere) {
  table_.OnView(ViewOf({MakeWorker(1, 1)}));
  TakeNow()->Failed();
  const auto hold = table_.Take({}, steady_clock::now() + seconds(60), [] { return false; });
  EXPECT_TRUE(hold.ok());
}

TEST_F(WorkerTableTest, WaitingEndsWithAViewATimeOrTheClient) {
  auto waiting = std::async(std::launch::async, [&] {
    return table_.Take({}, steady_clock::now() + seconds(60), [] { return false; }).ok();
  });
  table_.OnView(ViewOf({MakeWorker(1, 1)}));
  EXPECT_TRUE(waiting.get());
  table_.OnView(ViewOf({}));
  EXPECT_EQ(
      table_.Take({}, steady_clock::now() + milliseconds(20), [] { return false; }).status().code(),
      absl::StatusCode::kUnavailable);
  EXPECT_EQ(table_.Take({}, steady_clock::now() + seconds(60), [] { return true; }).status().code(),
            absl::StatusCode::kCancelled);
}

TEST_F(WorkerTableTest, ASuspectHasAWorkerToItself) {
  table_.OnView(ViewOf({MakeWorker(1, 1), MakeWorker(2, 1)}));
  WorkerTable::Wish suspect;
  suspect.suspect = true;
  auto first = TakeNow(suspect);
  ASSERT_NE(first, nullptr);
  for (int i = 0; i < 3; ++i) {
    const auto other = TakeNow();
    ASSERT_NE(other, nullptr);
    EXPECT_NE(other->node(), first->node()) << "others keep away where they can";
  }
  auto second = TakeNow(suspect);
  ASSERT_NE(second, nullptr);
  EXPECT_NE(second->node(), first->node());
  EXPECT_EQ(TakeNow(suspect), nullptr) << "one to a worker";
  EXPECT_NE(TakeNow(), nullptr) << "better beside a suspect than nowhere";
  first->Cleared();
  auto third = TakeNow(suspect);
  ASSERT_NE(third, nullptr);
  EXPECT_EQ(third->node(), first->node());
  first.reset();
  EXPECT_EQ(TakeNow(suspect), nullptr) << "the first was cleared once, not twice";
  second.reset();
  EXPECT_NE(TakeNow(suspect), nullptr);
}

TEST_F(WorkerTableTest, OneThatFailedIsTriedByOneRequest) {
  table_.OnView(ViewOf({MakeWorker(1, 1)}));
  TakeNow()->Failed();
  auto probe = table_.Take({}, steady_clock::now() + seconds(60), [] { return false; });
  ASSERT_TRUE(probe.ok());
  EXPECT_EQ(TakeNow(), nullptr) << "it has not answered yet";
  (*probe)->Answered();
  EXPECT_NE(TakeNow(), nullptr);
}

TEST_F(WorkerTableTest, AProbeWithoutAnEndLeavesTheNextToOthers) {
  table_.OnView(ViewOf({MakeWorker(1, 1)}));
  TakeNow()->Failed();
  {
    auto probe = table_.Take({}, steady_clock::now() + seconds(60), [] { return false; });
  }
  EXPECT_NE(TakeNow(), nullptr) << "its client went away";
}

TEST_F(WorkerTableTest, RatherAnotherThanTheOneThatRefused) {
  table_.OnView(ViewOf({MakeWorker(1, 1), MakeWorker(2, 1)}));
  std::vector<std::unique_ptr<Hold>> aboard;
  WorkerTable::Wish wish;
  wish.refused_by = 1;
  for (int i = 0; i < 3; ++i) {
    aboard.push_back(TakeNow(wish));
    EXPECT_EQ(aboard.back()->node(), 2u) << "though it has more aboard";
  }
  table_.OnView(ViewOf({MakeWorker(1, 1)}));
  EXPECT_EQ(TakeNow(wish)->node(), 1u) << "better than nobody";
}

TEST_F(WorkerTableTest, ARequestMayBePutOffItself) {
  table_.OnView(ViewOf({MakeWorker(1, 1)}));
  WorkerTable::Wish wish;
  wish.not_before = steady_clock::now() + milliseconds(50);
  EXPECT_EQ(TakeNow(wish), nullptr);
  EXPECT_NE(TakeNow(), nullptr) << "nobody else";
  EXPECT_TRUE(table_.Take(wish, steady_clock::now() + seconds(60), [] { return false; }).ok());
  EXPECT_GE(steady_clock::now(), wish.not_before);
}

TEST_F(WorkerTableTest, TheOwnClassBeforeAnother) {
  table_.OnView(ViewOf({MakeWorker(1, 1, true, "other"), MakeWorker(2, 1, true, "mine")}));
  WorkerTable::Wish wish;
  wish.numerics_class = "digest/mine";
  wish.any_class_from = steady_clock::now() + seconds(60);
  std::vector<std::unique_ptr<Hold>> holds;
  for (int i = 0; i < 3; ++i) {
    holds.push_back(TakeNow(wish));
    ASSERT_NE(holds.back(), nullptr);
    EXPECT_EQ(holds.back()->numerics_class(), "digest/mine") << "even with more aboard";
  }
  // It fails: it is still there, and may be back.
  wish.any_class_from = steady_clock::now();
  for (const auto& hold : holds) hold->Failed();
  holds.clear();
  EXPECT_EQ(TakeNow(wish), nullptr);
  // It is gone; but not yet for long enough.
  table_.OnView(ViewOf({MakeWorker(1, 1, true, "other")}));
  wish.any_class_from = steady_clock::now() + seconds(60);
  EXPECT_EQ(TakeNow(wish), nullptr);
  wish.any_class_from = steady_clock::now();
  const std::unique_ptr<Hold> other = TakeNow(wish);
  ASSERT_NE(other, nullptr);
  EXPECT_EQ(other->numerics_class(), "digest/other");
  table_.OnView(ViewOf({MakeWorker(1, 1, true, "other"), MakeWorker(2, 2, true, "mine")}));
  const auto later = TakeNow(wish), last = TakeNow(wish);
  EXPECT_EQ(later->numerics_class(), "digest/mine");
  EXPECT_EQ(last->numerics_class(), "digest/mine") << "still rather the own one";
}

}  // namespace
}  // namespace moebius::services
