#pragma once

// The actor base: a synchronous state machine. Receive runs on the node's loop thread, to
// completion, one message at a time; it must not block, lock, sleep, start threads, read a clock or
// use randomness other than Context's. State belongs to the actor alone, so it needs no
// synchronisation.

#include "runtime/context.h"
#include "runtime/message.h"

namespace moebius::runtime {

class Actor {
 public:
  virtual ~Actor() = default;
  // Once, before the first message.
  virtual void Start(Context& context) { (void)context; }
  virtual void Receive(Message message, Context& context) = 0;
};

}  // namespace moebius::runtime
