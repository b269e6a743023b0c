#include "attention_worker/attention_actor.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "attention_worker/kv_block_pool.h"
#include "gtest/gtest.h"
#include "model/tokenizer.h"
#include "tests/attention_worker/fake_node.h"
#include "tests/attention_worker/fake_router.h"
#include "tests/cluster/sequential_oracle.h"
#include "tests/cluster/test_backend.h"
#include "tests/cluster/toy_model.h"
#include "tests/kernels/forwarding_backend.h"

namespace moebius::attention_worker {
namespace {

using cluster_test::OracleRequest;
using cluster_test::OracleToken;
using cluster_test::SequentialOracle;
using cluster_test::ToyModel;
using std::chrono::milliseconds;

constexpr TokenId kNoEos = 191;

// What a client has received of one request.
struct Stream {
  std::vector<OracleToken> tokens;
  std::vector<ScoreEvent> scores;
  FinishReason finish = FinishReason::kNone;
  absl::Status status;
  uint32_t preemptions = 0;
};

const ToyModel& Model() {
  static const ToyModel* model = new ToyModel({});
  return *model;
}

AttentionOptions SmallOptions() {
  AttentionOptions options;
  options.router = {NodeId(1), runtime::kRouter};
  options.num_blocks = 64;
  options.max_step_tokens = 64;
  options.prefill_chunk = 16;
  options.max_running = 16;
  options.max_waiting = 64;
  options.head_slice_rows = 4;
  options.max_top_n = 5;
  options.route_timeout = milliseconds(20);
  options.eos_token_ids = {kNoEos};
  return options;
}

class Harness {
 public:
  explicit Harness(const AttentionOptions& options, uint64_t seed = 1,
                   const RouterFaults& faults = {})
      : backend_(cluster_test::MakeTestBackend()),
        oracle_backend_(cluster_test::MakeTestBackend()),
        oracle_(&Model(), oracle_backend_.get()),
        node_(seed, milliseconds(2)),
        router_(&node_, &oracle_, Model().config().hidden_size, milliseconds(3), faults),
        actor_(
            {.config = &Model().config(), .weights = &Model().weights(), .backend = backend_.get()},
            options) {
    node_.Host(&actor_);
  }

  Submit Request(uint64_t id, int64_t prompt, uint64_t max_tokens, float temperature = 0) {
    Submit submit;
    submit.request = RequestId(id);
    Prng prng(id * 977 + 5);
    for (int64_t i = 0; i < prompt; ++i) {
      submit.prompt.push_back(static_cast<TokenId>(prng.Below(190)));
    }
    submit.max_tokens = max_tokens;
    submit.sampling.temperature = temperature;
    submit.sampling.seed = id * 31;
    submit.ignore_eos = true;
    submit.on_token = [this, id](const TokenEvent& event) {
      Stream& stream = streams_[id];
      EXPECT_EQ(event.request, RequestId(id));
      EXPECT_EQ(stream.finish, FinishReason::kNone) << "an event after the last, request " << id;
      EXPECT_EQ(event.index, stream.tokens.size());
      if (event.token >= 0) {
        stream.tokens.push_back({event.token, event.logprob, event.row_digest});
      }
      stream.finish = event.finish_reason;
      stream.status = event.status;
      stream.preemptions = event.preemptions;
    };
    return submit;
  }
  void Send(const Submit& submit) {
    sent_[submit.request.value()] = submit;
    node_.Post(submit);
  }

  std::vector<OracleToken> Expected(const Submit& submit) {
    return oracle_.Generate(
        {submit.prompt, submit.sampling, submit.max_tokens,
         submit.ignore_eos ? std::vector<TokenId>{} : std::vector<TokenId>{kNoEos}});
  }
  // Every finished stream equals the oracle's; one that was ended early equals a beginning of it.
  void ExpectExact() {
    for (const auto& [id, submit] : sent_) {
      const Stream& stream = streams_[id];
      ASSERT_NE(stream.finish, FinishReason::kNone) << "request " << id << " never ended";
      std::vector<OracleToken> expected = Expected(submit);
      if (stream.finish == FinishReason::kCancelled || stream.finish == FinishReason::kDeadline) {
        ASSERT_LE(stream.tokens.size(), expected.size());
        expected.resize(stream.tokens.size());
      }
      ASSERT_EQ(stream.tokens.size(), expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        ASSERT_EQ(stream.tokens[i].token, expected[i].token) << "request " << id << " token " << i;
        ASSERT_EQ(stream.tokens[i].row_digest, expected[i].row_digest);
        ASSERT_EQ(stream.tokens[i], expected[i]);
      }
    }
  }
  void ExpectBalanced() {
    const AttentionCounters counters = actor_.counters();
    EXPECT_EQ(counters.blocks_used, 0u);
    EXPECT_EQ(counters.running, 0u);
    EXPECT_EQ(counters.waiting, 0u);
    EXPECT_EQ(node_.pool().in_use(), 0u);
  }

  std::unique_ptr<kernels::Backend> backend_, oracle_backend_;
  SequentialOracle oracle_;
  FakeNode node_;
  FakeRouter router_;
  AttentionActor actor_;
  std::map<uint64_t, Stream> streams_;
  std::map<uint64_t, Submit> sent_;
};

TEST(AttentionActorTest, OneGreedyRequestEqualsTheOracle) {
  Harness h(SmallOptions());
  h.Send(h.Request(1, 40, 30));
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kLength);
  EXPECT_EQ(h.streams_[1].tokens.size(), 30u);
  h.ExpectExact();
  h.ExpectBalanced();
  EXPECT_EQ(h.actor_.counters().tokens_out, 30u);
  EXPECT_EQ(h.actor_.counters().steps, 3u + 29u);  // chunks of 16, then one step a token
  EXPECT_EQ(h.actor_.counters().route_resends, 0u);
}

TEST(AttentionActorTest, RandomLoadsEqualTheOracle) {
  for (uint64_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(seed);
    Prng prng(seed);
    AttentionOptions options = SmallOptions();
    options.max_running = 1 + static_cast<int32_t>(prng.Below(8));
    options.max_step_tokens = options.max_running + static_cast<int32_t>(prng.Below(90));
    options.prefill_chunk = 1 + static_cast<int32_t>(prng.Below(70));
    options.head_slice_rows = 1 + static_cast<int32_t>(prng.Below(5));
    options.num_blocks = 3 + static_cast<int32_t>(prng.Below(10));
    Harness h(
        options, seed,
        {.drop_percent = 3, .busy_percent = 10, .duplicate_percent = 10, .garbage_percent = 10});
    for (uint64_t id = 1; id <= 8; ++id) {
      h.Send(h.Request(id, 1 + static_cast<int64_t>(prng.Below(90)), 1 + prng.Below(60),
                       id % 2 == 0 ? 1.0f : 0.0f));
      for (uint64_t i = prng.Below(60); i > 0; --i) h.node_.Step();
      if (prng.Below(4) == 0) h.node_.Post(Cancel{RequestId(1 + prng.Below(id))});
    }
    h.node_.RunUntilIdle();
    h.ExpectExact();
    h.ExpectBalanced();
  }
}

TEST(AttentionActorTest, PreemptionRecomputesTheSameBitsAndRepeatsNothing) {
  AttentionOptions options = SmallOptions();
  options.num_blocks = 4;
  Harness h(options);
  for (uint64_t id = 1; id <= 4; ++id) h.Send(h.Request(id, 50, 70, id % 2 == 0 ? 1.0f : 0.0f));
  h.node_.RunUntilIdle();
  EXPECT_GE(h.actor_.counters().preemptions, 2u);
  EXPECT_GE(h.streams_[4].preemptions, 1u);
  h.ExpectExact();
  h.ExpectBalanced();
}

TEST(AttentionActorTest, CancelFreesBlocksAtOnceAndTellsTheRouter) {
  Harness h(SmallOptions());
  h.Send(h.Request(1, 30, 50));
  h.Send(h.Request(2, 30, 50));
  while (h.streams_[1].tokens.size() < 3) ASSERT_TRUE(h.node_.Step());
  // Until a request is with the router.
  const uint64_t requests = h.router_.requests;
  while (h.router_.requests == requests) ASSERT_TRUE(h.node_.Step());
  const uint64_t used = h.actor_.counters().blocks_used;
  const size_t tokens = h.streams_[1].tokens.size();
  h.node_.Post(Cancel{RequestId(1)});
  ASSERT_TRUE(h.node_.Step());
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kCancelled);
  EXPECT_EQ(h.streams_[1].status.code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(h.actor_.counters().blocks_used, used - 1);
  EXPECT_EQ(h.router_.abandoned, 1u);
  h.node_.Post(Cancel{RequestId(77)});  // unknown: ignored
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].tokens.size(), tokens);
  EXPECT_EQ(h.streams_[2].tokens.size(), 50u);
  h.ExpectExact();
  h.ExpectBalanced();
}

TEST(AttentionActorTest, DeadlineEndsTheStream) {
  Harness h(SmallOptions());
  Submit late = h.Request(1, 30, 400);
  late.deadline_ms = 100;
  h.Send(late);
  h.Send(h.Request(2, 20, 40));
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kDeadline);
  EXPECT_EQ(h.streams_[1].status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_GT(h.streams_[1].tokens.size(), 0u);
  EXPECT_LT(h.streams_[1].tokens.size(), 400u);
  h.ExpectExact();
  h.ExpectBalanced();
}

TEST(AttentionActorTest, ALostRouterCostsARetryNotARequest) {
  Harness h(SmallOptions());
  h.Send(h.Request(1, 30, 20));
  while (h.streams_[1].tokens.size() < 5) ASSERT_TRUE(h.node_.Step());
  h.router_.unreachable = true;
  for (int i = 0; i < 200; ++i) ASSERT_TRUE(h.node_.Step());  // the watchdog keeps trying
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kNone);
  h.router_.unreachable = false;
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].tokens.size(), 20u);
  h.ExpectExact();
  h.ExpectBalanced();
}

TEST(AttentionActorTest, LinkDownSendsAgainUnderTheNextAttemptAndTheSameCorrelation) {
  Harness h(SmallOptions());
  h.Send(h.Request(1, 10, 4));
  while (h.router_.requests == 0) ASSERT_TRUE(h.node_.Step());
  h.node_.Deliver(
      runtime::LinkChanged{NodeId(1), Incarnation(1), runtime::LinkState::kDown, "test"}, {});
  ASSERT_TRUE(h.node_.Step());
  EXPECT_EQ(h.router_.requests, 2u);
  EXPECT_EQ(h.router_.resent, 1u);
  EXPECT_EQ(h.router_.correlations.size(), 1u);
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.actor_.counters().route_resends, 1u);
  EXPECT_EQ(h.actor_.counters().route_rejected, 1u);  // the answer to the other attempt
  h.ExpectExact();
  h.ExpectBalanced();
}

TEST(AttentionActorTest, RouterUpdateMovesTheOutstandingRows) {
  AttentionOptions options = SmallOptions();
  options.router = {NodeId(7), runtime::kRouter};
  options.router_peer = runtime::PeerInfo{NodeId(7), Incarnation(0), "router"};
  Harness h(options);
  EXPECT_EQ(h.node_.connected_, std::vector<NodeId>{NodeId(7)});
  h.router_.unreachable = true;
  h.Send(h.Request(1, 10, 4));
  for (int i = 0; i < 30; ++i) ASSERT_TRUE(h.node_.Step());
  h.router_.unreachable = false;
  h.node_.Post(RouterUpdate{{NodeId(8), runtime::kRouter},
                            runtime::PeerInfo{NodeId(8), Incarnation(0), "other"}});
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.node_.connected_.back(), NodeId(8));
  EXPECT_EQ(h.node_.disconnected_, std::vector<NodeId>{NodeId(7)});
  h.ExpectExact();
  h.ExpectBalanced();
}

TEST(AttentionActorTest, DrainFinishesWhatIsAboardAndRefusesTheRest) {
  Harness h(SmallOptions());
  h.Send(h.Request(1, 20, 10));
  while (h.streams_[1].tokens.empty()) ASSERT_TRUE(h.node_.Step());
  int drained = 0;
  h.node_.Post(Drain{[&] {
    ++drained;
    EXPECT_EQ(h.streams_[1].finish, FinishReason::kLength);
  }});
  h.node_.Post(Drain{[&] { ++drained; }});
  h.node_.Post(h.Request(2, 5, 5));
  h.node_.RunUntilIdle();
  EXPECT_EQ(drained, 2);
  EXPECT_EQ(h.streams_[2].finish, FinishReason::kError);
  EXPECT_EQ(h.streams_[2].status.code(), absl::StatusCode::kAborted);
  h.ExpectExact();
  h.node_.Post(Drain{[&] { ++drained; }});  // nothing aboard: at once
  ASSERT_TRUE(h.node_.Step());
  EXPECT_EQ(drained, 3);
  h.ExpectBalanced();
}

TEST(AttentionActorTest, RefusalsNameTheField) {
  AttentionOptions options = SmallOptions();
  options.max_waiting = 1;
  options.max_running = 1;
  Harness h(options);
  Submit empty = h.Request(1, 0, 5);
  h.node_.Post(empty);
  Submit outside = h.Request(2, 5, 5);
  outside.prompt[3] = 192;
  h.node_.Post(outside);
  h.Send(h.Request(3, 5, 5));
  Submit twice = h.Request(4, 5, 5);
  twice.request = RequestId(3);
  absl::Status twice_status;
  twice.on_token = [&](const TokenEvent& event) { twice_status = event.status; };
  h.node_.Post(twice);
  h.node_.RunUntilIdle();
  EXPECT_EQ(twice_status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(absl::StartsWith(h.streams_[1].status.message(), "prompt:"));
  EXPECT_TRUE(absl::StartsWith(h.streams_[2].status.message(), "prompt[3]:"));
  EXPECT_EQ(h.actor_.counters().refused, 3u);
  h.ExpectExact();
}

TEST(AttentionActorTest, AFullWaitingListRefuses) {
  AttentionOptions options = SmallOptions();
  options.max_waiting = 2;
  options.max_running = 1;
  Harness h(options);
  h.Send(h.Request(1, 5, 5));
  ASSERT_TRUE(h.node_.Step());  // 1 runs
  h.Send(h.Request(2, 5, 5));
  h.Send(h.Request(3, 5, 5));
  h.node_.Post(h.Request(4, 5, 5));
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[4].finish, FinishReason::kError);
  EXPECT_EQ(h.streams_[4].status.code(), absl::StatusCode::kResourceExhausted);
  h.ExpectExact();
}

TEST(AttentionActorTest, EosEndsTheStreamUnlessIgnored) {
  // The eos is a token that the model does produce.
  Harness probe(SmallOptions());
  const std::vector<OracleToken> tokens = probe.Expected(probe.Request(1, 20, 12));
  AttentionOptions options = SmallOptions();
  options.eos_token_ids = {tokens[5].token};
  Harness h(options);
  Submit ignoring = h.Request(1, 20, 12);
  Submit stopping = ignoring;
  stopping.ignore_eos = false;
  h.node_.Post(stopping);
  h.node_.RunUntilIdle();
  const size_t first =
      std::find_if(tokens.begin(), tokens.end(),
                   [&](const OracleToken& t) { return t.token == tokens[5].token; }) -
      tokens.begin();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kStop);
  EXPECT_EQ(h.streams_[1].tokens.size(), first + 1);
  h.streams_.clear();
  h.node_.Post(ignoring);
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kLength);
  EXPECT_EQ(h.streams_[1].tokens, tokens);
}

TEST(AttentionActorTest, AStopStringAcrossTokensEndsTheStream) {
  const absl::StatusOr<model::Tokenizer> tokenizer =
      model::Tokenizer::Load(MOEBIUS_SOURCE_DIR "/tests/model/golden");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  Harness h(SmallOptions());
  AttentionActor actor({.config = &Model().config(),
                        .weights = &Model().weights(),
                        .backend = h.backend_.get(),
                        .tokenizer = &*tokenizer},
                       SmallOptions());
  h.node_.Host(&actor);
  Submit request = h.Request(1, 20, 40, 1.0f);
  const std::vector<OracleToken> tokens = h.Expected(request);
  // The end of one token and the beginning of the next.
  std::string stop;
  for (size_t i = 5; stop.empty() && i + 1 < tokens.size(); ++i) {
    const absl::string_view left = tokenizer->TokenBytes(tokens[i].token);
    const absl::string_view right = tokenizer->TokenBytes(tokens[i + 1].token);
    if (tokenizer->IsSpecial(tokens[i].token) || tokenizer->IsSpecial(tokens[i + 1].token))
      continue;
    if (!left.empty() && !right.empty()) stop = {left.back(), right.front()};
  }
  ASSERT_EQ(stop.size(), 2u);
  std::string text;
  size_t expected = 0;
  while (text.find(stop) == std::string::npos) {
    const TokenId token = tokens[expected++].token;
    if (!tokenizer->IsSpecial(token)) {
      text.append(tokenizer->TokenBytes(token).data(), tokenizer->TokenBytes(token).size());
    }
  }
  request.stop_strings = {"never in the text", stop};
  h.node_.Post(request);
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kStop);
  EXPECT_EQ(h.streams_[1].tokens.size(), expected);
  // Cut off between its two bytes and taken up again, the stop string is found as well.
  const std::vector<OracleToken> before(tokens.begin(),
                                        tokens.begin() + static_cast<int64_t>(expected) - 1);
  h.streams_[1] = {};
  h.streams_[1].tokens = before;
  for (const OracleToken& token : before) request.generated.push_back(token.token);
  h.node_.Post(request);
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kStop);
  EXPECT_EQ(h.streams_[1].tokens.size(), expected);
}

// A request cut off behind any of its tokens and taken up by another worker: the rest of the stream
// has the bits and the indices that it would have had.
TEST(AttentionActorTest, AStreamGoesOnBehindWhatAnotherWorkerGenerated) {
  for (const float temperature : {0.0f, 1.0f}) {
    for (uint64_t cut = 0; cut < 30; ++cut) {
      SCOPED_TRACE(testing::Message() << "cut behind " << cut);
      Harness h(SmallOptions());
      h.Send(h.Request(1, 70, 90, 1.0f));  // company
      Submit request = h.Request(2, 50, 30, temperature);
      h.sent_[2] = request;
      const std::vector<OracleToken> tokens = h.Expected(request);
      ASSERT_EQ(tokens.size(), 30u);
      for (uint64_t i = 0; i < cut; ++i) {
        request.generated.push_back(tokens[i].token);
        h.streams_[2].tokens.push_back(tokens[i]);
      }
      h.node_.Post(request);
      h.node_.RunUntilIdle();
      EXPECT_EQ(h.streams_[2].finish, FinishReason::kLength);
      h.ExpectExact();
      h.ExpectBalanced();
      EXPECT_EQ(h.actor_.counters().tokens_out, 90u + 30u - cut);
    }
  }
}

TEST(AttentionActorTest, AStreamWhoseLastEventWasLostEndsAtOnce) {
  AttentionOptions options = SmallOptions();
  Harness probe(options);
  const std::vector<OracleToken> tokens = probe.Expected(probe.Request(1, 20, 12));
  options.eos_token_ids = {tokens[11].token};
  Harness h(options);
  Submit request = h.Request(1, 20, 12);
  for (const OracleToken& token : tokens) {
    request.generated.push_back(token.token);
    h.streams_[1].tokens.push_back(token);
  }
  h.node_.Post(request);
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kLength);
  h.streams_[1].finish = FinishReason::kNone;
  request.ignore_eos = false;
  request.max_tokens = 40;
  h.node_.Post(request);
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kStop);
  EXPECT_EQ(h.actor_.counters().steps, 0u);
  EXPECT_EQ(h.actor_.counters().requests, 2u);
}

TEST(AttentionActorTest, APingIsAnsweredDuringAStep) {
  Harness h(SmallOptions());
  h.Send(h.Request(1, 40, 30));
  h.node_.Step();
  int pongs = 0;
  h.node_.Post(Ping{[&] { ++pongs; }});
  h.node_.Step();
  EXPECT_EQ(pongs, 1);
  h.node_.RunUntilIdle();
  h.ExpectExact();
}

TEST(AttentionActorTest, ContextEndAndZeroTokens) {
  AttentionOptions options = SmallOptions();
  options.max_context = 40;
  Harness h(options);
  h.node_.Post(h.Request(1, 35, 100));
  h.node_.Post(h.Request(2, 40, 0));
  h.node_.Post(h.Request(3, 40, 1));
  h.node_.RunUntilIdle();
  EXPECT_EQ(h.streams_[1].finish, FinishReason::kLength);
  EXPECT_EQ(h.streams_[1].tokens.size(), 5u);
  EXPECT_EQ(h.streams_[2].finish, FinishReason::kLength);
  EXPECT_TRUE(h.streams_[2].status.ok());
  EXPECT_EQ(h.streams_[2].tokens.size(), 0u);
  EXPECT_EQ(h.streams_[3].status.code(), absl::StatusCode::kOutOfRange);
}

// Scores of a continuation: the same digests and logprobs that generating it reported, also of
// tokens that were drawn and are not the likeliest.
void ExpectScoreAgreesWithGeneration(float temperature) {
  AttentionOptions options = SmallOptions();
  options.num_blocks = 4;
  Harness h(options);
  const Submit generate = h.Request(1, 30, 20, temperature);
  const std::vector<OracleToken> generated = h.Expected(generate);
  ASSERT_EQ(generated.size(), 20u);
  Submit score = h.Request(2, 0, 0);
  score.prompt = generate.prompt;
  for (const OracleToken& token : generated) score.prompt.push_back(token.token);
  score.top_n = 3;
  score.on_score = [&](const ScoreEvent& event) { h.streams_[2].scores.push_back(event); };
  h.Send(h.Request(3, 60, 90, 1.0f));  // company that crowds the pool
  h.Send(h.Request(4, 60, 90, 1.0f));
  h.node_.Post(score);
  h.node_.RunUntilIdle();
  const std::vector<ScoreEvent>& events = h.streams_[2].scores;
  ASSERT_EQ(events.size(), 50u);
  EXPECT_EQ(h.streams_[2].finish, FinishReason::kNone);  // no event of on_token
  int likeliest = 0;
  for (size_t i = 0; i < events.size(); ++i) {
    EXPECT_EQ(events[i].position, i);
    EXPECT_EQ(events[i].last, i == 49);
    ASSERT_EQ(events[i].top_ids.size(), 3u);
    EXPECT_GE(events[i].top_logprobs[0], events[i].top_logprobs[1]);
    if (i < 29 || i == 49) continue;
    EXPECT_EQ(events[i].next_logprob, generated[i - 29].logprob);
    EXPECT_EQ(events[i].row_digest, generated[i - 29].row_digest);
    if (events[i].top_ids[0] == generated[i - 29].token) {
      EXPECT_EQ(events[i].top_logprobs[0], generated[i - 29].logprob);
      ++likeliest;
    }
  }
  if (temperature == 0) {
    EXPECT_EQ(likeliest, 20);
  } else {
    EXPECT_LT(likeliest, 20);
  }
  EXPECT_EQ(events[49].next_logprob, 0.0f);
  h.ExpectExact();
  h.ExpectBalanced();
}

TEST(AttentionActorTest, ScoreAgreesWithGreedyGeneration) { ExpectScoreAgreesWithGeneration(0.0f); }
TEST(AttentionActorTest, ScoreAgreesWithSampledGeneration) {
  ExpectScoreAgreesWithGeneration(1.0f);
}

// A Backend whose Linear fails at a chosen call.
class FailingBackend final : public kernels::ForwardingBackend {
 public:
  FailingBackend(kernels::Backend* inner, int fail_at)
      : ForwardingBackend(inner), countdown_(fail_at) {}
  absl::Status Linear(const kernels::LinearParams& p) override {
    if (--countdown_ == 0) return absl::InternalError("device lost");
    return ForwardingBackend::Linear(p);
  }

 private:
  int countdown_;
};

TEST(AttentionActorTest, ABackendErrorEndsEverythingAboard) {
  // Wherever it strikes, attention or the shared expert beside the router.
  for (int fail_at = 1; fail_at < 60; fail_at += 3) {
    SCOPED_TRACE(fail_at);
    Harness h(SmallOptions());
    FailingBackend failing(h.backend_.get(), fail_at);
    AttentionOptions options = SmallOptions();
    std::vector<absl::Status> told;
    options.on_backend_failure = [&](const absl::Status& status) { told.push_back(status); };
    AttentionActor actor(
        {.config = &Model().config(), .weights = &Model().weights(), .backend = &failing}, options);
    h.node_.Host(&actor);
    h.node_.Post(h.Request(1, 20, 20));
    h.node_.Post(h.Request(2, 20, 20));
    h.node_.RunUntilIdle();
    for (uint64_t id = 1; id <= 2; ++id) {
      EXPECT_EQ(h.streams_[id].finish, FinishReason::kError);
      EXPECT_EQ(h.streams_[id].status.code(), absl::StatusCode::kInternal);
    }
    EXPECT_EQ(actor.counters().blocks_used, 0u);
    EXPECT_EQ(h.node_.pool().in_use(), 0u);
    h.node_.Post(h.Request(3, 20, 20));
    h.node_.RunUntilIdle();
    EXPECT_EQ(h.streams_[3].status.code(), absl::StatusCode::kAborted);
    ASSERT_EQ(told.size(), 1u) << "once, whatever comes after";
    EXPECT_EQ(told[0].message(), "device lost");
  }
}

TEST(AttentionActorTest, ValidateOptionsNamesTheOption) {
  AttentionOptions options = SmallOptions();
  EXPECT_TRUE(ValidateOptions(Model().config(), options).ok());
  options.max_running = options.max_step_tokens + 1;
  EXPECT_TRUE(
      absl::StartsWith(ValidateOptions(Model().config(), options).message(), "max_running:"));
  options = SmallOptions();
  options.max_context = 513;
  EXPECT_TRUE(
      absl::StartsWith(ValidateOptions(Model().config(), options).message(), "max_context:"));
  options = SmallOptions();
  options.eos_token_ids = {192};
  EXPECT_TRUE(
      absl::StartsWith(ValidateOptions(Model().config(), options).message(), "eos_token_ids:"));
}

}  // namespace
}  // namespace moebius::attention_worker
