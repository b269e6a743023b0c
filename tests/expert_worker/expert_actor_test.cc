// One expert worker, message by message.

#include "expert_worker/expert_actor.h"

#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "base/prng.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/reference/reference_backend.h"
#include "tests/kernels/forwarding_backend.h"
#include "tests/runtime/fake_context.h"

namespace moebius::expert_worker {
namespace {

using runtime::ActorAddress;
using runtime::SendResult;

constexpr uint32_t kHidden = 128;
constexpr uint32_t kInter = 64;
constexpr uint32_t kExperts = 4;
const wire::RowLimits kLimits{kHidden, 2, kExperts, /*top_k=*/2, /*max_rows=*/8, /*e4m3=*/false};

ActorAddress Router(uint64_t node) { return {NodeId(node), runtime::kRouter}; }

struct Answered {
  ActorAddress to;
  wire::FrameHeader header;
  std::vector<wire::CombineItem> items;
  std::vector<std::vector<Bf16>> rows;  // empty for kNotHosted
};

class ExpertActorTest : public ::testing::Test {
 protected:
  ExpertActorTest()
      : pool_({{4096, 8}, {1 << 16, 8}}), context_({NodeId(5), runtime::kExpertWorker}, pool_) {
    Prng prng(3);
    for (auto* matrix : {&up_, &down_}) {
      matrix->resize(kExperts * kHidden * kInter);
      for (Bf16& value : *matrix) value = ToBf16((prng.Unit() - 0.5f) * 0.3f);
    }
    actor_ = std::make_unique<ExpertActor>(Options(), &backend_);
    counters_ = actor_->counters();
  }
  static ExpertOptions Options() {
    ExpertOptions options;
    options.limits = kLimits;
    options.intermediate = kInter;
    options.max_batch_items = 16;
    options.max_queued_frames = 4;
    return options;
  }
  void TearDown() override {
    context_.sent.clear();
    actor_.reset();
    EXPECT_EQ(pool_.in_use(), 0u) << "a buffer was kept";
  }

  kernels::ExpertWeights WeightsOf(uint32_t expert) const {
    const auto view = [&](const std::vector<Bf16>& values, int64_t rows, int64_t cols) {
      MatrixView matrix;
      matrix.dtype = DType::kBf16;
      matrix.rows = rows;
      matrix.cols = cols;
      matrix.data = reinterpret_cast<const std::byte*>(values.data() + expert * kHidden * kInter);
      return matrix;
    };
    return {view(up_, kInter, kHidden), view(up_, kInter, kHidden), view(down_, kHidden, kInter)};
  }
  void Host(const std::vector<uint32_t>& experts, std::shared_ptr<const void> owner = nullptr) {
    HostExperts order;
    for (const uint32_t e : experts)
      order.experts.push_back({LayerId(1), ExpertId(e), WeightsOf(e)});
    order.owner = std::move(owner);
    actor_->Receive(runtime::Posted{std::move(order)}, context_);
  }
  void Drop(uint32_t expert) {
    actor_->Receive(runtime::Posted{DropExperts{{{LayerId(1), ExpertId(expert)}}}}, context_);
  }

  // A dispatch of one row for each entry: experts of that row. The row's values follow from `seed`.
  runtime::FrameReceived Dispatch(const ActorAddress& from, uint64_t correlation,
                                  const std::vector<std::vector<uint32_t>>& experts,
                                  uint64_t seed) {
    size_t items = 0;
    for (const auto& row : experts) items += row.size();
    const wire::DispatchLayout layout = wire::LayoutOfDispatch(kLimits, experts.size(), items);
    runtime::FrameReceived received;
    received.from = from;
    received.frame.payload = *pool_.Acquire(layout.total_bytes);
    std::byte* data = received.frame.payload.data();
    std::memset(data, 0, layout.total_bytes);
    auto* rows = reinterpret_cast<wire::DispatchRow*>(data);
    auto* ids = reinterpret_cast<uint32_t*>(data + layout.experts_offset);
    auto* values = reinterpret_cast<Bf16*>(data + layout.rows_offset);
    for (uint32_t r = 0; r < experts.size(); ++r) {
      rows[r] = {r, static_cast<uint32_t>(experts[r].size())};
      for (const uint32_t e : experts[r]) *ids++ = e;
      Prng prng(seed + r);
      for (uint32_t i = 0; i < kHidden; ++i) values[r * kHidden + i] = ToBf16(prng.Unit() - 0.5f);
    }
    wire::FrameHeader& header = received.frame.header;
    header.type = static_cast<uint16_t>(wire::FrameType::kDispatch);
    header.step = 4;
    header.layer = 1;
    header.row_count = static_cast<uint32_t>(experts.size());
    header.item_count = static_cast<uint32_t>(items);
    header.row_bytes = wire::EncodedRowBytes(kLimits);
    header.correlation = correlation;
    return received;
  }
  void Receive(runtime::FrameReceived received) { actor_->Receive(std::move(received), context_); }

  std::vector<Answered> TakeAnswers() {
    std::vector<Answered> answers;
    for (const auto& sent : context_.sent) {
      wire::CombineView view;
      EXPECT_TRUE(
          wire::CombineView::Parse(sent.frame.header, sent.frame.payload.bytes(), kLimits, &view)
              .ok());
      Answered answer{sent.to, sent.frame.header, {}, {}};
      for (uint32_t i = 0; i < view.item_count(); ++i) {
        answer.items.push_back(view.items()[i]);
        if (view.rows() == nullptr) continue;
        answer.rows.emplace_back(view.rows() + i * kHidden, view.rows() + (i + 1) * kHidden);
      }
      answers.push_back(std::move(answer));
    }
    context_.sent.clear();
    return answers;
  }
  // The answer of an idle worker to one row for one expert.
  std::vector<Bf16> Alone(uint32_t expert, uint64_t seed) {
    Receive(Dispatch(Router(1), 1, {{expert}}, seed));
    context_.RunWorks(*actor_);
    const std::vector<Answered> answers = TakeAnswers();
    EXPECT_EQ(answers.size(), 1u);
    return answers.at(0).rows.at(0);
  }

  runtime::BufferPool pool_;
  runtime::FakeContext context_;
  std::vector<Bf16> up_, down_;
  kernels::reference::ReferenceBackend backend_;
  std::unique_ptr<ExpertActor> actor_;
  std::shared_ptr<const ExpertCounters> counters_;
};

TEST_F(ExpertActorTest, WhatArrivesDuringABatchFormsTheNextOneAcrossSenders) {
  Host({0, 1, 2, 3});
  const std::vector<Bf16> alone = Alone(2, 50);
  const uint64_t batches = counters_->batches;
  Receive(Dispatch(Router(1), 11, {{0}}, 40));  // an idle worker waits for nobody
  EXPECT_EQ(context_.works(), 1u);
  Receive(Dispatch(Router(2), 22, {{2}}, 50));
  Receive(Dispatch(Router(3), 33, {{1, 2}, {2}}, 60));
  EXPECT_EQ(context_.works(), 1u) << "one batch at a time";
  context_.RunWorks(*actor_);
  EXPECT_EQ(counters_->batches - batches, 2u) << "the two that waited are one batch";
  const std::vector<Answered> answers = TakeAnswers();
  ASSERT_EQ(answers.size(), 3u);
  EXPECT_EQ(answers[1].to, Router(2));
  EXPECT_EQ(answers[1].header.correlation, 22u);
  EXPECT_EQ(answers[1].header.step, 4u);
  EXPECT_EQ(answers[1].rows.at(0), alone) << "neighbours in the batch reached the bits";
  EXPECT_EQ(answers[2].to, Router(3));
  ASSERT_EQ(answers[2].items.size(), 3u);
  EXPECT_EQ(answers[2].items[1].row, 0u);
  EXPECT_EQ(answers[2].items[1].expert, 2u);
  EXPECT_EQ(answers[2].items[2].row, 1u);
}

TEST_F(ExpertActorTest, ABatchStopsAtItsBoundAndTheRestFollows) {
  Host({0, 1, 2, 3});
  Receive(Dispatch(Router(1), 1, {{0}}, 1));
  const std::vector<std::vector<uint32_t>> eight(5, {0, 1});  // 10 items; the bound is 16
  Receive(Dispatch(Router(2), 2, eight, 2));
  Receive(Dispatch(Router(3), 3, eight, 3));
  const uint64_t batches = counters_->batches;
  context_.RunWorks(*actor_);
  EXPECT_EQ(counters_->batches - batches, 2u);
  EXPECT_EQ(counters_->items_served.load(), 21u);
}

TEST_F(ExpertActorTest, PairsThatAreNotHostedAreNamedAndTheOthersAnswered) {
  Host({1});
  const std::vector<Bf16> alone = Alone(1, 70);
  Receive(Dispatch(Router(1), 9, {{0, 1}, {3}}, 70));
  context_.RunWorks(*actor_);
  const std::vector<Answered> answers = TakeAnswers();
  ASSERT_EQ(answers.size(), 2u);
  EXPECT_EQ(answers[0].header.type, static_cast<uint16_t>(wire::FrameType::kCombine));
  EXPECT_EQ(answers[0].rows.at(0), alone);
  EXPECT_EQ(answers[1].header.type, static_cast<uint16_t>(wire::FrameType::kNotHosted));
  ASSERT_EQ(answers[1].items.size(), 2u);
  EXPECT_EQ(answers[1].items[0].expert, 0u);
  EXPECT_EQ(answers[1].items[1].row, 1u);
  EXPECT_EQ(answers[1].items[1].expert, 3u);
  EXPECT_EQ(counters_->not_hosted.load(), 2u);
  Receive(Dispatch(Router(1), 10, {{2}}, 71));  // nothing of it is here: refused without computing
  EXPECT_EQ(context_.works(), 0u);
  EXPECT_EQ(TakeAnswers().size(), 1u);
}

TEST_F(ExpertActorTest, DroppingWaitsForTheRunningBatchAndReleasesTheWeights) {
  auto owner = std::make_shared<int>(1);
  const std::weak_ptr<int> alive = owner;
  Host({0, 1}, std::move(owner));
  EXPECT_EQ(counters_->experts_hosted.load(), 2u);
  Receive(Dispatch(Router(1), 1, {{0}}, 5));
  Drop(0);
  Drop(1);
  EXPECT_FALSE(alive.expired()) << "the batch still reads them";
  context_.RunWorks(*actor_);
  EXPECT_TRUE(alive.expired());
  EXPECT_EQ(counters_->experts_hosted.load(), 0u);
  ASSERT_EQ(TakeAnswers().at(0).rows.size(), 1u) << "what was accepted is answered";
  Receive(Dispatch(Router(1), 2, {{0}}, 5));
  EXPECT_EQ(TakeAnswers().at(0).header.type, static_cast<uint16_t>(wire::FrameType::kNotHosted));
  Drop(1);  // twice does no harm
  EXPECT_EQ(counters_->experts_hosted.load(), 0u);
}

TEST_F(ExpertActorTest, DrainedOnlyWhenEverythingHasLeft) {
  Host({0});
  int drained = 0;
  Receive(Dispatch(Router(1), 1, {{0}}, 5));
  Receive(Dispatch(Router(2), 2, {{0}}, 6));
  actor_->Receive(runtime::Posted{Drain{[&] { ++drained; }}}, context_);
  EXPECT_EQ(drained, 0);
  context_.answers[NodeId(2)] = SendResult::kBusy;
  context_.RunWorks(*actor_);
  EXPECT_EQ(drained, 0) << "an answer waits for its link";
  EXPECT_EQ(TakeAnswers().size(), 1u);
  context_.answers.clear();
  actor_->Receive(runtime::Writable{NodeId(2)}, context_);
  EXPECT_EQ(drained, 1);
  EXPECT_EQ(TakeAnswers().size(), 1u);
  actor_->Receive(runtime::Posted{Drain{[&] { ++drained; }}}, context_);
  EXPECT_EQ(drained, 2) << "an idle worker is drained at once";
}

TEST_F(ExpertActorTest, ABusyLinkKeepsItsOrderAndHoldsNobodyElseUp) {
  Host({0});
  context_.answers[NodeId(1)] = SendResult::kBusy;
  Receive(Dispatch(Router(1), 1, {{0}}, 5));
  Receive(Dispatch(Router(1), 2, {{0}}, 6));
  Receive(Dispatch(Router(2), 3, {{0}}, 7));
  context_.RunWorks(*actor_);
  std::vector<Answered> answers = TakeAnswers();
  ASSERT_EQ(answers.size(), 1u);
  EXPECT_EQ(answers[0].to, Router(2));
  context_.answers.clear();
  actor_->Receive(runtime::Writable{NodeId(1)}, context_);
  answers = TakeAnswers();
  ASSERT_EQ(answers.size(), 2u);
  EXPECT_EQ(answers[0].header.correlation, 1u);
  EXPECT_EQ(answers[1].header.correlation, 2u);
}

// Fails at every expert FFN, and counts them.
class LostDevice final : public kernels::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  absl::Status ExpertFfn(const kernels::ExpertFfnParams&) override {
    ++calls;
    return absl::InternalError("device lost");
  }
  int calls = 0;
};

TEST_F(ExpertActorTest, AfterABackendErrorItHostsNothingAndSaysSo) {
  LostDevice lost(&backend_);
  std::vector<absl::Status> told;
  ExpertOptions options = Options();
  options.on_backend_failure = [&](const absl::Status& status) { told.push_back(status); };
  actor_ = std::make_unique<ExpertActor>(options, &lost);
  counters_ = actor_->counters();
  Host({0, 1});
  Receive(Dispatch(Router(1), 1, {{0}, {1}}, 5));
  Receive(Dispatch(Router(2), 2, {{1}}, 6));  // waits for the batch that fails
  context_.RunWorks(*actor_);
  const std::vector<Answered> answers = TakeAnswers();
  ASSERT_EQ(answers.size(), 2u) << "nobody has to wait for a timeout";
  for (const Answered& answer : answers) {
    EXPECT_EQ(answer.header.type, static_cast<uint16_t>(wire::FrameType::kNotHosted));
  }
  EXPECT_EQ(answers[0].items.size(), 2u);
  EXPECT_EQ(counters_->experts_hosted.load(), 0u);
  Host({2});
  Receive(Dispatch(Router(1), 3, {{2}}, 7));
  context_.RunWorks(*actor_);
  EXPECT_EQ(TakeAnswers().at(0).header.type, static_cast<uint16_t>(wire::FrameType::kNotHosted));
  EXPECT_EQ(lost.calls, 1) << "a failed backend is never used again";
  ASSERT_EQ(told.size(), 1u);
  EXPECT_EQ(told[0].message(), "device lost");
}

TEST_F(ExpertActorTest, AnswersOfALostPeerAreDropped) {
  Host({0});
  Receive(Dispatch(Router(1), 1, {{0}}, 5));
  context_.answers[NodeId(1)] = SendResult::kUnreachable;
  context_.RunWorks(*actor_);
  EXPECT_TRUE(TakeAnswers().empty());
  EXPECT_EQ(pool_.in_use(), 0u);
}

TEST_F(ExpertActorTest, WithoutBuffersAnswersWaitAndNothingIsSentTwice) {
  Host({0});
  Receive(Dispatch(Router(1), 1, {{0, 1}}, 5));  // needs two buffers: an answer and a refusal
  std::vector<runtime::Buffer> hoard;
  while (std::optional<runtime::Buffer> buffer = pool_.Acquire(1))
    hoard.push_back(std::move(*buffer));
  hoard.pop_back();  // one is free, not two
  context_.RunWorks(*actor_);
  EXPECT_TRUE(TakeAnswers().empty());
  hoard.clear();
  actor_->Receive(runtime::Writable{NodeId(5)}, context_);
  EXPECT_EQ(TakeAnswers().size(), 2u);
  EXPECT_EQ(counters_->items_served.load(), 1u);
}

TEST_F(ExpertActorTest, MalformedFramesAndAFullQueueAreRefusedAndCounted) {
  Host({0});
  const auto refused = [&](auto change, const char* what) {
    const uint64_t before = counters_->refused_frames;
    runtime::FrameReceived received = Dispatch(Router(1), 1, {{0}}, 5);
    change(received.frame);
    Receive(std::move(received));
    EXPECT_EQ(counters_->refused_frames, before + 1) << what;
    EXPECT_EQ(context_.works(), 0u) << what;
  };
  refused(
      [](runtime::Frame& f) { f.header.type = static_cast<uint16_t>(wire::FrameType::kCombine); },
      "another type");
  refused([](runtime::Frame& f) { f.header.layer = 7; }, "a layer that does not exist");
  refused([](runtime::Frame& f) { f.header.row_count = 9; }, "too many rows");
  refused([](runtime::Frame& f) { f.header.item_count = 2; }, "items that are not there");
  refused([](runtime::Frame& f) { f.header.row_bytes = 3; }, "another row size");
  refused([](runtime::Frame& f) { f.payload.resize(f.payload.size() - 1); }, "a payload cut short");
  refused(
      [](runtime::Frame& f) {
        const wire::DispatchLayout layout = wire::LayoutOfDispatch(kLimits, 1, 1);
        const uint32_t expert = kExperts;
        std::memcpy(f.payload.data() + layout.experts_offset, &expert, sizeof(expert));
      },
      "an expert that does not exist");
  Receive(Dispatch(Router(1), 1, {{0}}, 5));  // computes
  for (int i = 0; i < 4; ++i) Receive(Dispatch(Router(1), 2, {{0}}, 5));
  const uint64_t before = counters_->refused_frames;
  Receive(Dispatch(Router(1), 3, {{0}}, 5));
  EXPECT_EQ(counters_->refused_frames, before + 1) << "over the bound of the queue";
  context_.RunWorks(*actor_);
  EXPECT_EQ(TakeAnswers().size(), 5u);
}

}  // namespace
}  // namespace moebius::expert_worker
