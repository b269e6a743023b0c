#include "services/gateway/request_journal.h"

#include "absl/strings/str_cat.h"

namespace moebius::services {
namespace {

// Another worker would say the same, or the client is the reason (CANCELLED: it does not read what
// the worker sends). Codes that speak of the call and not of the request are no end: a port may be
// somebody else's by now, a certificate in the middle of its replacement.
bool IsFinal(const absl::Status& status, bool ever_aboard, bool aboard_here) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:
      return true;
    case absl::StatusCode::kOutOfRange:
      // Too long for this worker's cache. One that has fitted into another's waits for such a one;
      // a client's word that it has begun somewhere proves nothing.
      return !aboard_here;
    case absl::StatusCode::kResourceExhausted:
      // A new request may be refused by a full worker. One whose stream has begun waits.
      return !ever_aboard;
    default:
      return false;
  }
}

}  // namespace

bool RequestJournal::IsRefusal(const absl::Status& status) {
  return absl::IsResourceExhausted(status) || absl::IsOutOfRange(status) || absl::IsAborted(status);
}

void RequestJournal::BeginAttempt() {
  ++attempts_;
  aboard_ = false;
}

absl::Status RequestJournal::Record(uint64_t index, TokenId token, bool last) {
  if (finished_ || index != generated_.size()) {
    return absl::DataLossError(absl::StrCat("token_index: ", index, " from the worker, ",
                                            generated_.size(),
                                            finished_ ? " after the end" : " is the next"));
  }
  aboard_ = ever_aboard_ = aboard_here_ = true;
  if (token >= 0) {
    generated_.push_back(token);
    deaths_ = 0;
  }
  finished_ = last;
  return absl::OkStatus();
}

absl::Status RequestJournal::AttemptEnded(const absl::Status& status) {
  if (IsFinal(status, ever_aboard_, aboard_here_)) return status;
  if (IsRefusal(status)) aboard_ = false;
  if (!aboard_) return absl::OkStatus();
  ever_aboard_ = aboard_here_ = true;
  aboard_ = false;
  if (++deaths_ < kMostDeaths) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(
      "request: ", deaths_, " workers ended while it was aboard, without a new token; the last: ",
      status.ok() ? "the stream broke off" : status.message()));
}

}  // namespace moebius::services
