#pragma once

// Why a stream ended, from the attention worker's word to the API's.

#include "attention_worker/generation.h"
#include "moebius/v1/generation.pb.h"

namespace moebius::services {

// kNone, and kError (whose call ends with a status instead), are UNSPECIFIED.
inline v1::FinishReason ToProto(attention_worker::FinishReason reason) {
  switch (reason) {
    case attention_worker::FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case attention_worker::FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case attention_worker::FinishReason::kCancelled:
      return v1::FINISH_REASON_CANCELLED;
    case attention_worker::FinishReason::kDeadline:
      return v1::FINISH_REASON_DEADLINE;
    default:
      return v1::FINISH_REASON_UNSPECIFIED;
  }
}

}  // namespace moebius::services
