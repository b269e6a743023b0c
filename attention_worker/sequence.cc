#include "attention_worker/sequence.h"

#include "model/tokenizer.h"

namespace moebius::attention_worker {

// Here, where StreamDecoder is complete.
Sequence::Sequence() = default;
Sequence::~Sequence() = default;

}  // namespace moebius::attention_worker
