// Goal: a journal goes on where the stream was cut, ends with what no other worker would change,
// and does not let one request kill worker after worker. In company: cluster_sim_test.

#include "services/gateway/request_journal.h"

#include "gtest/gtest.h"

namespace moebius::services {
namespace {

const absl::Status kGone = absl::UnavailableError("connection lost");

TEST(RequestJournal, GoesOnBehindWhatWasTold) {
  RequestJournal journal({7, 8});
  journal.BeginAttempt();
  EXPECT_TRUE(journal.Record(2, 9, false).ok());
  EXPECT_TRUE(journal.AttemptEnded(kGone).ok());
  EXPECT_EQ(journal.generated(), (std::vector<TokenId>{7, 8, 9}));
  journal.BeginAttempt();
  EXPECT_EQ(journal.attempts(), 2u);
  EXPECT_TRUE(journal.Record(3, 10, false).ok());
  EXPECT_TRUE(journal.Record(4, -1, true).ok());  // an end without a token
  EXPECT_TRUE(journal.finished());
  EXPECT_EQ(journal.generated().size(), 4u);
}

TEST(RequestJournal, TakesNoTokenTwiceAndLeavesNoneOut) {
  RequestJournal journal;
  journal.BeginAttempt();
  EXPECT_TRUE(journal.Record(0, 5, false).ok());
  for (const uint64_t index : {0u, 2u, 1000u}) {
    EXPECT_EQ(journal.Record(index, 6, false).code(), absl::StatusCode::kDataLoss) << index;
  }
  EXPECT_EQ(journal.generated().size(), 1u);
  EXPECT_TRUE(journal.AttemptEnded(absl::DataLossError("out of order")).ok()) << "another one may";
  journal.BeginAttempt();
  EXPECT_TRUE(journal.Record(1, 6, true).ok());
  EXPECT_EQ(journal.Record(2, 6, false).code(), absl::StatusCode::kDataLoss) << "after the end";
}

TEST(RequestJournal, WhatAnotherWorkerWouldSayTooIsTheEnd) {
  for (const absl::StatusCode code :
       {absl::StatusCode::kInvalidArgument, absl::StatusCode::kOutOfRange,
        absl::StatusCode::kFailedPrecondition, absl::StatusCode::kDeadlineExceeded,
        absl::StatusCode::kCancelled}) {
    RequestJournal journal;
    journal.BeginAttempt();
    EXPECT_EQ(journal.AttemptEnded(absl::Status(code, "no")).code(), code);
  }
  for (const absl::StatusCode code :
       {absl::StatusCode::kUnavailable, absl::StatusCode::kInternal, absl::StatusCode::kUnknown,
        absl::StatusCode::kAborted, absl::StatusCode::kUnimplemented,
        absl::StatusCode::kUnauthenticated, absl::StatusCode::kOk}) {
    RequestJournal journal;
    journal.BeginAttempt();
    EXPECT_TRUE(journal.AttemptEnded(absl::Status(code, "no")).ok()) << static_cast<int>(code);
  }
}

TEST(RequestJournal, AFullWorkerRefusesNewRequestsButEndsNoStream) {
  const absl::Status full = absl::ResourceExhaustedError("too many requests are waiting");
  RequestJournal fresh;
  fresh.BeginAttempt();
  fresh.TakenAboard();  // its beat comes before its answer
  EXPECT_EQ(fresh.AttemptEnded(full), full);
  RequestJournal begun;
  begun.BeginAttempt();
  begun.TakenAboard();
  EXPECT_TRUE(begun.AttemptEnded(kGone).ok());
  EXPECT_TRUE(begun.aboard_once());
  begun.BeginAttempt();
  EXPECT_TRUE(begun.AttemptEnded(full).ok());
  RequestJournal resumed({1, 2});
  resumed.BeginAttempt();
  EXPECT_TRUE(resumed.AttemptEnded(full).ok()) << "it has begun elsewhere";
}

TEST(RequestJournal, ThreeDeathsAboardWithoutATokenAreItsOwnFault) {
  RequestJournal journal;
  for (int death = 0; death < 2; ++death) {
    EXPECT_FALSE(journal.suspect());
    journal.BeginAttempt();
    journal.TakenAboard();
    EXPECT_TRUE(journal.AttemptEnded(kGone).ok());
  }
  EXPECT_TRUE(journal.suspect());
  // A token clears it.
  journal.BeginAttempt();
  EXPECT_TRUE(journal.Record(0, 5, false).ok());
  EXPECT_FALSE(journal.suspect());
  EXPECT_TRUE(journal.AttemptEnded(kGone).ok());
  for (int death = 0; death < 2; ++death) {
    journal.BeginAttempt();
    journal.TakenAboard();
    const absl::Status status = journal.AttemptEnded(kGone);
    EXPECT_EQ(status.code(), death == 0 ? absl::StatusCode::kOk : absl::StatusCode::kInternal);
  }
}

TEST(RequestJournal, AWorkerThatDrainsOrIsFullHasNotDied) {
  for (const absl::Status& status : {absl::AbortedError("this worker is going"),
                                     absl::ResourceExhaustedError("too many are waiting")}) {
    RequestJournal journal({1});
    for (int attempt = 0; attempt < 10; ++attempt) {
      journal.BeginAttempt();
      journal.TakenAboard();
      EXPECT_TRUE(journal.AttemptEnded(status).ok());
    }
    EXPECT_EQ(journal.deaths(), 0);
  }
}

TEST(RequestJournal, WhatNeverFittedHereIsRefusedWhateverTheClientHas) {
  RequestJournal journal({1, 2, 3});
  journal.BeginAttempt();
  journal.TakenAboard();
  EXPECT_EQ(journal.AttemptEnded(absl::OutOfRangeError("max_tokens: too many")).code(),
            absl::StatusCode::kOutOfRange);
}

TEST(RequestJournal, WhatHasFittedIntoAnotherWorkerWaitsForSuchAOne) {
  RequestJournal journal;
  journal.BeginAttempt();
  EXPECT_TRUE(journal.Record(0, 5, false).ok());
  EXPECT_TRUE(journal.AttemptEnded(kGone).ok());
  for (int attempt = 0; attempt < 5; ++attempt) {
    journal.BeginAttempt();
    journal.TakenAboard();
    EXPECT_TRUE(journal.AttemptEnded(absl::OutOfRangeError("a smaller cache")).ok());
  }
}

TEST(RequestJournal, ANewRequestThatWasOnlyRefusedHasNotBegun) {
  RequestJournal journal;
  journal.BeginAttempt();
  journal.TakenAboard();
  EXPECT_TRUE(journal.AttemptEnded(absl::AbortedError("this worker is draining")).ok());
  EXPECT_FALSE(journal.aboard_once());
  EXPECT_EQ(journal.deaths(), 0);
}

TEST(RequestJournal, ProgressClearsWithoutATokenToo) {
  RequestJournal journal;
  for (int attempt = 0; attempt < 10; ++attempt) {
    journal.BeginAttempt();
    journal.TakenAboard();
    journal.Progressed();
    EXPECT_TRUE(journal.AttemptEnded(kGone).ok());
  }
}

TEST(RequestJournal, WorkersThatNeverTookItInDoNotCount) {
  RequestJournal journal;
  for (int attempt = 0; attempt < 100; ++attempt) {
    journal.BeginAttempt();
    EXPECT_TRUE(journal.AttemptEnded(kGone).ok());
  }
  EXPECT_FALSE(journal.suspect());
  EXPECT_FALSE(journal.aboard_once());
}

}  // namespace
}  // namespace moebius::services
