// One router, message by message: every answer, loss and delay is dealt by the test.

#include "router/router_actor.h"

#include <cstring>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"
#include "tests/runtime/fake_context.h"

namespace moebius::router {
namespace {

using runtime::ActorAddress;
using runtime::LinkState;
using runtime::SendResult;
using ::testing::UnorderedElementsAre;

constexpr uint32_t kHidden = 128;
constexpr uint32_t kExperts = 4;
constexpr uint32_t kTopK = 2;
const ActorAddress kAttention{NodeId(2), runtime::kAttentionWorker};

ActorAddress Worker(uint64_t node) { return {NodeId(node), runtime::kExpertWorker}; }

using Pair = std::pair<uint32_t, uint32_t>;  // row, expert

struct Asked {
  ActorAddress to;
  wire::FrameHeader header;
  std::vector<Pair> pairs;
};

class RouterActorTest : public ::testing::Test {
 protected:
  RouterActorTest()
      : pool_({{4096, 16}, {1 << 16, 16}}),
        context_({NodeId(1), runtime::kRouter}, pool_),
        gate_(kExperts * kHidden) {
    // Expert e's logit is element e of the row, so a row chooses its own experts.
    for (uint32_t e = 0; e < kExperts; ++e) gate_[e * kHidden + e] = ToBf16(1.0f);
    RouterOptions options;
    options.limits = {kHidden, 2, kExperts, kTopK, /*max_rows=*/8, /*e4m3=*/false};
    options.gate.n_routed_experts = kExperts;
    options.gate.num_experts_per_tok = kTopK;
    options.gate.topk_method = kernels::TopkMethod::kGreedy;
    options.layers.resize(2);
    options.layers[1].gate.dtype = DType::kBf16;
    options.layers[1].gate.rows = kExperts;
    options.layers[1].gate.cols = kHidden;
    options.layers[1].gate.data = reinterpret_cast<const std::byte*>(gate_.data());
    options.max_rounds = 2;
    router_ = std::make_unique<RouterActor>(options, &backend_);
    counters_ = router_->counters();
  }
  void TearDown() override {
    context_.sent.clear();
    router_.reset();
    EXPECT_EQ(pool_.in_use(), 0u) << "a buffer was kept";
  }

  // holders[e] = nodes that host expert e.
  void Place(uint64_t epoch, const std::vector<std::vector<uint64_t>>& holders) {
    auto placement = std::make_shared<Placement>(Epoch(epoch), 2, kExperts);
    std::set<uint64_t> nodes;
    for (uint32_t e = 0; e < kExperts; ++e) {
      for (const uint64_t node : holders[e]) {
        placement->AddReplica(LayerId(1), ExpertId(e), Worker(node));
        nodes.insert(node);
      }
    }
    for (const uint64_t node : nodes) placement->AddPeer({NodeId(node), Incarnation(1), "peer"});
    router_->Receive(runtime::Posted{PlacementUpdate{placement}}, context_);
    for (const uint64_t node : nodes) {
      if (down_.count(node) == 0) Link(node, LinkState::kUp);
    }
  }
  void Link(uint64_t node, LinkState state) {
    if (state == LinkState::kDown) down_.insert(node);
    router_->Receive(runtime::LinkChanged{NodeId(node), Incarnation(1), state, "test"}, context_);
  }

  // A request whose row i chooses the experts choices[i].
  void Request(const std::vector<Pair>& choices, uint64_t step = 1, uint16_t lane = 0) {
    const size_t bytes = choices.size() * kHidden * sizeof(Bf16);
    std::optional<runtime::Buffer> buffer = pool_.Acquire(bytes);
    ASSERT_TRUE(buffer.has_value());
    auto* rows = reinterpret_cast<Bf16*>(buffer->data());
    std::fill_n(rows, choices.size() * kHidden, Bf16{});
    for (size_t i = 0; i < choices.size(); ++i) {
      rows[i * kHidden + choices[i].first] = ToBf16(3.0f);
      rows[i * kHidden + choices[i].second] = ToBf16(2.0f);
    }
    runtime::FrameReceived received;
    received.from = kAttention;
    wire::FrameHeader& header = received.frame.header;
    header.type = static_cast<uint16_t>(wire::FrameType::kRouteRequest);
    header.step = step;
    header.layer = 1;
    header.lane = lane;
    header.row_count = static_cast<uint32_t>(choices.size());
    header.row_bytes = kHidden * sizeof(Bf16);
    header.correlation = 100 + step;
    received.frame.payload = std::move(*buffer);
    router_->Receive(std::move(received), context_);
    context_.RunWorks(*router_);
  }

  void Abandon(uint64_t correlation, std::vector<uint32_t> rows) {
    runtime::FrameReceived received;
    received.from = kAttention;
    received.frame.header.type = static_cast<uint16_t>(wire::FrameType::kRouteAbandon);
    received.frame.header.correlation = correlation;
    received.frame.header.item_count = static_cast<uint32_t>(rows.size());
    received.frame.payload = *pool_.Acquire(rows.size() * sizeof(uint32_t));
    std::memcpy(received.frame.payload.data(), rows.data(), rows.size() * sizeof(uint32_t));
    router_->Receive(std::move(received), context_);
    context_.RunWorks(*router_);
  }

  // Takes the dispatch frames sent since the last call.
  std::vector<Asked> TakeAsked() {
    std::vector<Asked> asked;
    std::vector<runtime::FakeContext::Sent> others;
    for (auto& sent : context_.sent) {
      if (sent.frame.header.type != static_cast<uint16_t>(wire::FrameType::kDispatch)) {
        others.push_back(std::move(sent));
        continue;
      }
      wire::DispatchView view;
      const wire::RowLimits limits{kHidden, 2, kExperts, kTopK, 8, false};
      EXPECT_TRUE(
          wire::DispatchView::Parse(sent.frame.header, sent.frame.payload.bytes(), limits, &view)
              .ok());
      Asked ask{sent.to, sent.frame.header, {}};
      uint32_t at = 0;
      for (uint32_t r = 0; r < view.row_count(); ++r) {
        for (uint32_t k = 0; k < view.rows()[r].item_count; ++k) {
          ask.pairs.emplace_back(view.rows()[r].row, view.experts()[at++]);
        }
      }
      asked.push_back(std::move(ask));
    }
    context_.sent = std::move(others);
    return asked;
  }
  static const Asked* To(const std::vector<Asked>& asked, uint64_t node) {
    for (const Asked& ask : asked) {
      if (ask.to == Worker(node)) return &ask;
    }
    return nullptr;
  }

  // Answers `pairs` of `ask` as expert e would: a row of e + 1 (plus `error`), or kNotHosted.
  void Answer(const Asked& ask, const std::vector<Pair>& pairs, bool hosted = true,
              float error = 0) {
    const wire::RowLimits limits{kHidden, 2, kExperts, kTopK, 8, false};
    runtime::FrameReceived received;
    received.from = ask.to;
    received.from_incarnation = Incarnation(1);
    wire::FrameHeader& header = received.frame.header;
    header = ask.header;
    header.type =
        static_cast<uint16_t>(hosted ? wire::FrameType::kCombine : wire::FrameType::kNotHosted);
    header.row_count = 0;
    header.item_count = static_cast<uint32_t>(pairs.size());
    header.row_bytes = kHidden * sizeof(Bf16);
    const size_t bytes = hosted ? wire::CombineBytes(limits, pairs.size())
                                : pairs.size() * sizeof(wire::CombineItem);
    received.frame.payload = *pool_.Acquire(bytes);
    std::memset(received.frame.payload.data(), 0, bytes);
    auto* items = reinterpret_cast<wire::CombineItem*>(received.frame.payload.data());
    for (size_t i = 0; i < pairs.size(); ++i) {
      items[i] = {pairs[i].first, pairs[i].second};
      if (!hosted) continue;
      auto* row = reinterpret_cast<Bf16*>(received.frame.payload.data() +
                                          wire::CombineRowsOffset(pairs.size())) +
                  i * kHidden;
      std::fill_n(row, kHidden, ToBf16(static_cast<float>(pairs[i].second + 1) + error));
    }
    router_->Receive(std::move(received), context_);
    context_.RunWorks(*router_);
  }
  void AnswerAll(const std::vector<Asked>& asked) {
    for (const Asked& ask : asked) Answer(ask, ask.pairs);
  }

  // The first element of every row of the replies sent since the last call.
  std::vector<float> TakeReply() {
    std::vector<float> values;
    for (const auto& sent : context_.sent) {
      EXPECT_EQ(sent.to, kAttention);
      EXPECT_EQ(sent.frame.header.type, static_cast<uint16_t>(wire::FrameType::kRouteReply));
      const auto* rows = reinterpret_cast<const Bf16*>(sent.frame.payload.data());
      for (uint32_t r = 0; r < sent.frame.header.row_count; ++r) {
        values.push_back(ToFloat(rows[r * kHidden]));
      }
    }
    context_.sent.clear();
    return values;
  }
  bool Replied() const { return !context_.sent.empty(); }

  // What an undisturbed round answers for these rows.
  std::vector<float> Undisturbed(const std::vector<Pair>& choices, uint64_t step = 900) {
    Request(choices, step);
    AnswerAll(TakeAsked());
    return TakeReply();
  }

  runtime::BufferPool pool_;
  runtime::FakeContext context_;
  std::vector<Bf16> gate_;
  kernels::reference::ReferenceBackend backend_;
  std::unique_ptr<RouterActor> router_;
  std::shared_ptr<const RouterCounters> counters_;
  std::set<uint64_t> down_;
};

const std::vector<Pair> kThreeRows = {{0, 2}, {1, 3}, {0, 1}};

TEST_F(RouterActorTest, AsksEachHolderOnceAndSumsWhenAllHaveAnswered) {
  Place(1, {{11}, {11}, {12}, {12}});
  Request(kThreeRows);
  const std::vector<Asked> asked = TakeAsked();
  ASSERT_EQ(asked.size(), 2u);
  EXPECT_THAT(To(asked, 11)->pairs,
              UnorderedElementsAre(Pair(0, 0), Pair(1, 1), Pair(2, 0), Pair(2, 1)));
  EXPECT_THAT(To(asked, 12)->pairs, UnorderedElementsAre(Pair(0, 2), Pair(1, 3)));
  EXPECT_EQ(To(asked, 11)->header.epoch, 1u);
  Answer(*To(asked, 12), To(asked, 12)->pairs);
  EXPECT_FALSE(Replied()) << "a partial sum was used";
  Answer(*To(asked, 11), To(asked, 11)->pairs);
  const std::vector<float> reply = TakeReply();
  ASSERT_EQ(reply.size(), 3u);
  // Weights are normalised and favour the first choice: between the two experts' values.
  EXPECT_GT(reply[0], 1.0f);
  EXPECT_LT(reply[0], 2.0f);
  EXPECT_GT(reply[1], 2.0f);
  EXPECT_LT(reply[1], 3.0f);
}

TEST_F(RouterActorTest, WhenAWorkerGoesDownOnlyItsPairsAreSentAgain) {
  Place(1, {{11, 13}, {11, 13}, {12}, {12}});
  Link(13, LinkState::kSlow);  // so that 11 is preferred
  const std::vector<float> expected = Undisturbed(kThreeRows);
  Request(kThreeRows);
  const std::vector<Asked> first = TakeAsked();
  ASSERT_NE(To(first, 11), nullptr);
  ASSERT_EQ(To(first, 13), nullptr);
  Answer(*To(first, 11), {{2, 0}});  // one of its four pairs arrives before the loss
  const uint64_t resent = counters_->items_resent;
  Link(11, LinkState::kDown);
  const std::vector<Asked> again = TakeAsked();
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].to, Worker(13));
  EXPECT_THAT(again[0].pairs, UnorderedElementsAre(Pair(0, 0), Pair(1, 1), Pair(2, 1)));
  EXPECT_EQ(counters_->items_resent - resent, 3u);
  EXPECT_GT(again[0].header.attempt, 0u);
  AnswerAll(again);
  EXPECT_FALSE(Replied());
  Answer(*To(first, 12), To(first, 12)->pairs);
  EXPECT_EQ(TakeReply(), expected);
}

TEST_F(RouterActorTest, AnUnreachableWorkerIsReplacedAtOnce) {
  Place(1, {{11, 13}, {11, 13}, {12}, {12}});
  Link(13, LinkState::kSlow);
  context_.answers[NodeId(11)] = SendResult::kUnreachable;
  Request({{0, 2}});
  const std::vector<Asked> asked = TakeAsked();
  ASSERT_NE(To(asked, 13), nullptr);
  EXPECT_THAT(To(asked, 13)->pairs, UnorderedElementsAre(Pair(0, 0)));
  AnswerAll(asked);
  EXPECT_EQ(TakeReply().size(), 1u);
}

TEST_F(RouterActorTest, WithoutAHolderAPairWaitsForTheNextPlacement) {
  Place(1, {{11}, {11}, {12}, {12}});
  const std::vector<float> expected = Undisturbed({{0, 2}});
  Request({{0, 2}});
  AnswerAll({*To(TakeAsked(), 12)});
  Link(11, LinkState::kDown);
  EXPECT_TRUE(TakeAsked().empty());
  EXPECT_GT(counters_->rows_without_holder.load(), 0u);
  EXPECT_FALSE(Replied());
  Place(2, {{13}, {13}, {12}, {12}});
  const std::vector<Asked> again = TakeAsked();
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].to, Worker(13));
  EXPECT_EQ(again[0].header.epoch, 2u);
  EXPECT_THAT(again[0].pairs, UnorderedElementsAre(Pair(0, 0)));
  EXPECT_EQ(context_.connected.count(NodeId(11)), 0u) << "a peer of no placement is left";
  AnswerAll(again);
  EXPECT_EQ(TakeReply(), expected);
}

TEST_F(RouterActorTest, AnOlderPlacementIsIgnored) {
  Place(5, {{11}, {11}, {11}, {11}});
  Place(4, {{12}, {12}, {12}, {12}});
  Request({{0, 2}});
  const std::vector<Asked> asked = TakeAsked();
  ASSERT_EQ(asked.size(), 1u);
  EXPECT_EQ(asked[0].to, Worker(11));
  AnswerAll(asked);
}

TEST_F(RouterActorTest, NotHostedIsAskedOfAReplicaAndNotOfTheSameAgain) {
  Place(1, {{11, 13}, {11}, {12}, {12}});
  Link(13, LinkState::kSlow);
  const std::vector<float> expected = Undisturbed({{0, 2}});
  Request({{0, 2}});
  const std::vector<Asked> first = TakeAsked();
  Answer(*To(first, 11), {{0, 0}}, /*hosted=*/false);
  const std::vector<Asked> again = TakeAsked();
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].to, Worker(13));
  Answer(again[0], {{0, 0}}, /*hosted=*/false);
  EXPECT_TRUE(TakeAsked().empty()) << "both holders have refused";
  Place(2, {{11}, {11}, {12}, {12}});  // a new placement makes 11 worth asking again
  const std::vector<Asked> third = TakeAsked();
  ASSERT_EQ(third.size(), 1u);
  EXPECT_EQ(third[0].to, Worker(11));
  AnswerAll(third);
  EXPECT_FALSE(Replied());
  Answer(*To(first, 12), To(first, 12)->pairs);
  EXPECT_EQ(TakeReply(), expected);
}

TEST_F(RouterActorTest, ASlowPairIsAskedOfAReplicaAndTheLoserIsCompared) {
  Place(1, {{11, 13}, {11, 13}, {12}, {12}});
  const std::vector<float> expected = Undisturbed({{0, 2}});
  for (const float error : {0.0f, 1.0f}) {
    const uint64_t hedged = counters_->items_hedged, duplicates = counters_->duplicate_answers;
    const uint64_t mismatches = counters_->exactness_mismatches;
    Request({{0, 2}}, error == 0 ? 1 : 2);
    const std::vector<Asked> first = TakeAsked();
    const uint64_t slow = To(first, 11) != nullptr ? 11 : 13;
    context_.Pass(*router_, std::chrono::milliseconds(200));
    const std::vector<Asked> hedge = TakeAsked();
    ASSERT_NE(To(hedge, 24 - slow), nullptr) << "the replica was not asked";
    EXPECT_EQ(To(hedge, slow), nullptr);
    EXPECT_GE(counters_->items_hedged - hedged, 1u);
    Answer(*To(hedge, 24 - slow), {{0, 0}});
    Answer(*To(first, slow), {{0, 0}}, true, error);  // the loser
    EXPECT_EQ(counters_->duplicate_answers - duplicates, 1u);
    EXPECT_EQ(counters_->exactness_mismatches - mismatches, error == 0 ? 0u : 1u);
    EXPECT_FALSE(Replied());
    Answer(*To(first, 12), {{0, 2}});
    EXPECT_EQ(TakeReply(), expected) << "the winner's bits count";
  }
}

TEST_F(RouterActorTest, SilenceWithoutAReplicaIsAskedAgainOfTheSameWorker) {
  Place(1, {{11}, {11}, {12}, {12}});
  const std::vector<float> expected = Undisturbed({{0, 2}});
  Request({{0, 2}});
  const std::vector<Asked> first = TakeAsked();
  Answer(*To(first, 12), {{0, 2}});
  context_.Pass(*router_, std::chrono::milliseconds(900));
  EXPECT_TRUE(TakeAsked().empty());
  context_.Pass(*router_, std::chrono::milliseconds(200));
  const std::vector<Asked> again = TakeAsked();
  ASSERT_EQ(again.size(), 1u);
  EXPECT_EQ(again[0].to, Worker(11));
  Answer(*To(first, 11), {{0, 0}});  // the first answer after all: as good as the second
  EXPECT_EQ(TakeReply(), expected);
}

TEST_F(RouterActorTest, AnswersOfNoOutstandingPairAreDroppedAndCounted) {
  Place(1, {{11}, {11}, {12}, {12}});
  Request({{0, 2}}, 1);
  const std::vector<Asked> old = TakeAsked();
  AnswerAll(old);
  TakeReply();
  Request({{0, 2}}, 2);
  const std::vector<Asked> asked = TakeAsked();
  uint64_t stale = counters_->stale_answers;
  const auto dropped = [&](const Asked& ask, const std::vector<Pair>& pairs, const char* what) {
    Answer(ask, pairs);
    EXPECT_EQ(counters_->stale_answers, stale + pairs.size()) << what;
    stale = counters_->stale_answers;
    EXPECT_FALSE(Replied()) << what;
  };
  dropped(*To(old, 11), {{0, 0}}, "of an earlier round");
  Asked wrong = *To(asked, 11);
  wrong.header.step = 77;
  dropped(wrong, {{0, 0}}, "of another step");
  wrong = *To(asked, 11);
  wrong.header.lane = 3;
  dropped(wrong, {{0, 0}}, "of another lane");
  wrong = *To(asked, 11);
  wrong.to = Worker(99);
  dropped(wrong, {{0, 0}}, "from a stranger");
  wrong.to = Worker(12);
  dropped(wrong, {{0, 0}}, "from a worker that was not asked for it");
  dropped(*To(asked, 11), {{0, 3}}, "of an expert that was not chosen");
  dropped(*To(asked, 11), {{5, 0}}, "of a row that does not exist");
  AnswerAll(asked);
  EXPECT_EQ(TakeReply().size(), 1u);
  EXPECT_EQ(counters_->exactness_mismatches.load(), 0u);
}

TEST_F(RouterActorTest, AbandonedRowsAreNotWaitedForAndComeBackAsZeros) {
  Place(1, {{11}, {11}, {12}, {12}});
  const std::vector<float> expected = Undisturbed(kThreeRows);
  Request(kThreeRows);
  const std::vector<Asked> asked = TakeAsked();
  Answer(*To(asked, 11), To(asked, 11)->pairs);
  Answer(*To(asked, 12), {{1, 3}});
  EXPECT_FALSE(Replied());
  Abandon(101, {0});
  EXPECT_EQ(TakeReply(), (std::vector<float>{0, expected[1], expected[2]}));
}

TEST_F(RouterActorTest, ABusyLinkGetsItsFrameWhenItIsWritable) {
  Place(1, {{11}, {11}, {12}, {12}});
  context_.answers[NodeId(11)] = SendResult::kBusy;
  Request({{0, 2}});
  std::vector<Asked> asked = TakeAsked();
  EXPECT_EQ(To(asked, 11), nullptr);
  AnswerAll(asked);
  context_.answers.clear();
  router_->Receive(runtime::Writable{NodeId(11)}, context_);
  asked = TakeAsked();
  ASSERT_NE(To(asked, 11), nullptr);
  context_.answers[kAttention.node] = SendResult::kBusy;  // now the reply has to wait
  AnswerAll(asked);
  EXPECT_FALSE(Replied());
  context_.answers.clear();
  router_->Receive(runtime::Writable{kAttention.node}, context_);
  EXPECT_EQ(TakeReply().size(), 1u);
}

TEST_F(RouterActorTest, WithoutBuffersNothingIsLost) {
  Place(1, {{11}, {11}, {12}, {12}});
  std::vector<runtime::Buffer> hoard;
  Request({{0, 2}}, 1);  // the request holds a buffer of its own
  std::vector<Asked> asked = TakeAsked();
  AnswerAll(asked);
  TakeReply();
  std::optional<runtime::Buffer> last;
  while (std::optional<runtime::Buffer> buffer = pool_.Acquire(1))
    hoard.push_back(std::move(*buffer));
  hoard.pop_back();  // one for the request
  Request({{0, 2}}, 2);
  EXPECT_TRUE(TakeAsked().empty());
  hoard.clear();
  router_->Receive(runtime::Writable{NodeId(1)}, context_);
  asked = TakeAsked();
  EXPECT_EQ(asked.size(), 2u);
  AnswerAll(asked);
  EXPECT_EQ(TakeReply().size(), 1u);
}

TEST_F(RouterActorTest, ANewRequestOfALaneReplacesTheOldOne) {
  Place(1, {{11}, {11}, {12}, {12}});
  const std::vector<float> expected = Undisturbed({{1, 3}});
  Request({{0, 2}}, 1);
  const std::vector<Asked> old = TakeAsked();
  Request({{1, 3}}, 2);
  const std::vector<Asked> asked = TakeAsked();
  const uint64_t stale = counters_->stale_answers;
  AnswerAll(old);
  EXPECT_EQ(counters_->stale_answers - stale, 2u);
  EXPECT_FALSE(Replied());
  AnswerAll(asked);
  EXPECT_EQ(TakeReply(), expected);
}

TEST_F(RouterActorTest, RequestsOverTheBoundAndMalformedFramesAreRefused) {
  Place(1, {{11}, {11}, {12}, {12}});
  Request({{0, 2}}, 1, 0);
  Request({{0, 2}}, 2, 1);
  std::vector<Asked> asked = TakeAsked();
  EXPECT_EQ(asked.size(), 4u);
  Request({{0, 2}}, 3, 2);  // max_rounds is 2
  EXPECT_TRUE(TakeAsked().empty());
  EXPECT_EQ(counters_->refused_frames.load(), 1u);
  Asked wrong = asked[0];
  wrong.header.item_count = 7;
  runtime::FrameReceived torn;
  torn.from = wrong.to;
  torn.frame.header = wrong.header;
  torn.frame.header.type = static_cast<uint16_t>(wire::FrameType::kCombine);
  torn.frame.payload = *pool_.Acquire(16);
  router_->Receive(std::move(torn), context_);
  EXPECT_EQ(counters_->refused_frames.load(), 2u);
  AnswerAll(asked);
  EXPECT_EQ(TakeReply().size(), 2u);
}

}  // namespace
}  // namespace moebius::router
