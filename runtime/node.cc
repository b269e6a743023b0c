#include "runtime/node.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace moebius::runtime {

class Node::ActorContext final : public Context {
 public:
  ActorContext(Node& node, Slot& slot) : node_(node), slot_(slot) {}

  ActorAddress Self() const override { return {node_.id(), slot_.id}; }
  Incarnation SelfIncarnation() const override { return node_.incarnation(); }
  TimePoint Now() const override { return node_.clock_.Now(); }
  uint64_t Random() override { return node_.prng_.Next(); }

  SendResult Send(const ActorAddress& to, Frame& frame) override {
    frame.header.source_actor = slot_.id.value();
    frame.header.destination_actor = to.actor.value();
    if (to.node != node_.id()) {
      const SendResult result = node_.sessions_.Send(to.node, frame);
      if (result == SendResult::kBusy) AddUnique(slot_.busy, to.node);
      return result;
    }
    Slot* receiver = node_.FindSlot(to.actor);
    if (receiver == nullptr) return SendResult::kUnreachable;
    if (node_.LocalFull()) {
      AddUnique(slot_.busy, to.node);
      return SendResult::kBusy;
    }
    frame.header.payload_bytes = frame.payload.size();
    node_.Enqueue(receiver, FrameReceived{Self(), node_.incarnation(), std::move(frame)});
    return SendResult::kSent;
  }

  std::optional<Buffer> AcquireBuffer(size_t bytes) override {
    // Read before: a buffer that comes back meanwhile, from a compute thread, is then noticed.
    const uint64_t releases = node_.pool_.releases();
    std::optional<Buffer> buffer = node_.pool_.Acquire(bytes);
    if (!buffer) {
      if (std::find(node_.buffer_waiters_.begin(), node_.buffer_waiters_.end(), &slot_) ==
          node_.buffer_waiters_.end()) {
        node_.buffer_waiters_.push_back(&slot_);
      }
      node_.buffer_releases_at_wait_ = releases;
    }
    return buffer;
  }

  uint64_t SetTimer(Duration delay, uint64_t tag) override {
    return node_.timers_.Set(Now() + delay, slot_.id, tag);
  }
  void CancelTimer(uint64_t timer) override { node_.timers_.Cancel(timer); }

  void Submit(std::function<absl::Status()> work, uint64_t tag) override {
    ++slot_.works;
    if (node_.compute_ != nullptr) {
      node_.compute_->Submit(slot_.id, std::move(work), tag);
      return;
    }
    const TimePoint start = std::max(Now(), slot_.compute_free_at);
    slot_.compute_free_at = start + node_.options_.simulated_compute_delay();
    node_.simulated_works_.push_back(SimulatedWork{
        slot_.compute_free_at, node_.simulated_sequence_++, &slot_, tag, std::move(work)});
  }

  void Connect(const PeerInfo& peer) override {
    const bool watches_already = std::find(slot_.connected.begin(), slot_.connected.end(),
                                           peer.node) != slot_.connected.end();
    AddUnique(slot_.connected, peer.node);
    node_.sessions_.Connect(peer, Now());
    if (watches_already) return;
    // Another actor's session: this one hears what it missed.
    if (std::optional<LinkChanged> link = node_.sessions_.LinkTo(peer.node)) {
      const LinkState state = std::exchange(link->state, LinkState::kUp);
      node_.Enqueue(&slot_, *link);
      link->state = state;
      if (state != LinkState::kUp) node_.Enqueue(&slot_, *link);
    }
  }
  void Disconnect(NodeId node) override {
    std::erase(slot_.connected, node);
    std::erase(slot_.busy, node);
    for (const auto& other : node_.slots_) {
      if (std::find(other->connected.begin(), other->connected.end(), node) !=
          other->connected.end()) {
        return;  // another actor still wants the session
      }
    }
    node_.sessions_.Disconnect(node);
  }

 private:
  static void AddUnique(std::vector<NodeId>& nodes, NodeId node) {
    if (std::find(nodes.begin(), nodes.end(), node) == nodes.end()) nodes.push_back(node);
  }
  Node& node_;
  Slot& slot_;
};

Node::Node(NodeOptions options, Transport& transport, Clock& clock, BufferPool& pool)
    : options_(std::move(options)),
      transport_(transport),
      clock_(clock),
      pool_(pool),
      prng_(options_.seed),
      sessions_(options_.identity, options_.timings, options_.credits_per_session,
                pool.max_buffer_bytes(), transport, pool, Mix64(options_.seed)),
      local_limit_(options_.local_messages),
      // Every session's credits can be in the mailbox at once, on top of what is local. Link news
      // and the like are a handful per session.
      remote_limit_(options_.local_messages +
                    size_t{SessionTable::kMaxSessions} * options_.credits_per_session),
      mailbox_(remote_limit_ + 8 * size_t{SessionTable::kMaxSessions}) {
  posted_.reserve(options_.local_messages);
  posted_taken_.reserve(options_.local_messages);
  transport_events_.reserve(256);
  session_events_.reserve(256);
  completions_.reserve(256);
  simulated_works_.reserve(64);
  if (!options_.simulated_compute_delay) {
    compute_ =
        std::make_unique<ComputePool>(options_.compute_threads, [this] { transport_.Wake(); });
  }
}

Node::~Node() = default;

Node::Slot* Node::FindSlot(ActorId id) {
  for (const auto& slot : slots_) {
    if (slot->id == id) return slot.get();
  }
  return nullptr;
}

void Node::AddActor(ActorId id, std::unique_ptr<Actor> actor) {
  CHECK(!started_);
  CHECK(FindSlot(id) == nullptr);
  auto slot = std::make_unique<Slot>();
  slot->id = id;
  slot->actor = std::move(actor);
  slot->context = std::make_unique<ActorContext>(*this, *slot);
  slots_.push_back(std::move(slot));
}

absl::Status Node::Post(ActorId to, std::any body) {
  if (stop_.load(std::memory_order_relaxed)) return absl::UnavailableError("node is stopping");
  bool known = false;  // slots_ does not change once turns have begun
  for (const auto& slot : slots_) known = known || slot->id == to;
  if (!known) return absl::NotFoundError(absl::StrCat("no actor ", to.value()));
  {
    std::lock_guard<std::mutex> lock(posted_mutex_);
    if (posted_.size() >= options_.local_messages / 2) {
      return absl::ResourceExhaustedError("node's queue of posted messages is full");
    }
    posted_.push_back(PostedMessage{to, std::move(body)});
  }
  transport_.Wake();
  return absl::OkStatus();
}

void Node::Enqueue(Slot* to, Message message, uint64_t session) {
  mailbox_.Push(Envelope{to, std::move(message), session});
}

void Node::Start() {
  started_ = true;
  for (const auto& slot : slots_) slot->actor->Start(*slot->context);
}

void Node::NotifyWritable(NodeId node) {
  for (const auto& slot : slots_) {
    const auto it = std::find(slot->busy.begin(), slot->busy.end(), node);
    if (it == slot->busy.end()) continue;
    slot->busy.erase(it);
    Enqueue(slot.get(), Writable{node});
  }
}

void Node::DispatchEvents(TimePoint now) {
  // By index: refusing a frame appends what follows from it.
  for (size_t i = 0; i < session_events_.size(); ++i) {
    SessionEvent event = std::move(session_events_[i]);
    if (auto* inbound = std::get_if<InboundFrame>(&event)) {
      Slot* receiver = FindSlot(ActorId(inbound->message.frame.header.destination_actor));
      if (receiver == nullptr) {
        sessions_.Acknowledge(inbound->session);  // nobody of that number: void, but taken in
      } else if (mailbox_.size() >= remote_limit_) {
        sessions_.Refuse(inbound->session, "mailbox is full", now, session_events_);
      } else {
        Enqueue(receiver, std::move(inbound->message), inbound->session);
      }
    } else if (auto* change = std::get_if<LinkChanged>(&event)) {
      for (const auto& slot : slots_) {
        if (std::find(slot->connected.begin(), slot->connected.end(), change->node) !=
            slot->connected.end()) {
          Enqueue(slot.get(), *change);
        }
      }
      // A Send that was refused as busy will find out that the peer is gone, or back.
      if (change->state == LinkState::kDown || change->state == LinkState::kUp)
        NotifyWritable(change->node);
    } else {
      NotifyWritable(std::get<Writable>(event).node);
    }
  }
  session_events_.clear();
}

bool Node::RunSimulatedWorks() {
  bool ran = false;
  while (true) {
    const TimePoint now = clock_.Now();
    auto next = simulated_works_.end();
    for (auto it = simulated_works_.begin(); it != simulated_works_.end(); ++it) {
      if (it->ready_at <= now &&
          (next == simulated_works_.end() || it->ready_at < next->ready_at ||
           (it->ready_at == next->ready_at && it->sequence < next->sequence))) {
        next = it;
      }
    }
    if (next == simulated_works_.end()) return ran;
    SimulatedWork work = std::move(*next);
    simulated_works_.erase(next);
    absl::Status status = work.work();
    work.work = nullptr;
    --work.slot->works;
    Enqueue(work.slot, ComputeDone{work.tag, std::move(status)});
    ran = true;
  }
}

bool Node::Deliver() {
  bool delivered = false;
  for (uint32_t i = 0; i < options_.deliveries_per_turn && !mailbox_.empty(); ++i) {
    Envelope envelope = mailbox_.Pop();
    envelope.to->actor->Receive(std::move(envelope.message), *envelope.to->context);
    if (envelope.session != 0) sessions_.Acknowledge(envelope.session);
    delivered = true;
  }
  return delivered;
}

bool Node::RunOnce() {
  bool busy = false;
  if (!started_) {
    Start();
    busy = true;
  }
  const TimePoint now = clock_.Now();
  transport_.Poll(transport_events_);
  for (TransportEvent& event : transport_events_) {
    sessions_.OnTransportEvent(event, now, session_events_);
    busy = true;
  }
  transport_events_.clear();
  if (now >= sessions_.NextTick()) sessions_.Tick(now, session_events_);
  busy = busy || !session_events_.empty();
  DispatchEvents(now);

  if (compute_ != nullptr) {
    compute_->TakeCompletions(completions_);
    for (ComputeCompletion& completion : completions_) {
      Slot* slot = FindSlot(completion.actor);
      --slot->works;
      Enqueue(slot, ComputeDone{completion.tag, std::move(completion.status)});
      busy = true;
    }
    completions_.clear();
  } else {
    busy = RunSimulatedWorks() || busy;
  }
  {
    std::lock_guard<std::mutex> lock(posted_mutex_);
    posted_.swap(posted_taken_);
  }
  size_t taken = 0;
  for (; taken < posted_taken_.size() && !LocalFull(); ++taken) {
    Enqueue(FindSlot(posted_taken_[taken].to), Posted{std::move(posted_taken_[taken].body)});
    busy = true;
  }
  if (taken < posted_taken_.size()) {  // the rest goes back in front
    std::lock_guard<std::mutex> lock(posted_mutex_);
    posted_.insert(posted_.begin(), std::make_move_iterator(posted_taken_.begin() + taken),
                   std::make_move_iterator(posted_taken_.end()));
  }
  posted_taken_.clear();
  while (!LocalFull()) {
    const std::optional<TimerQueue::Fired> fired = timers_.Pop(now);
    if (!fired) break;
    Enqueue(FindSlot(fired->actor), TimerFired{fired->timer, fired->tag});
    busy = true;
  }
  if (!buffer_waiters_.empty() && pool_.releases() != buffer_releases_at_wait_) {
    for (Slot* slot : buffer_waiters_) Enqueue(slot, Writable{id()});
    buffer_waiters_.clear();
    busy = true;
  }
  const bool was_full = LocalFull();
  busy = Deliver() || busy;
  if (!LocalFull() && (was_full || !mailbox_.empty() || busy)) NotifyWritable(id());
  if (busy) {
    std::lock_guard<std::mutex> lock(counters_mutex_);
    published_counters_ = sessions_.counters();
  }
  return busy || !mailbox_.empty();
}

TimePoint Node::NextWake() const {
  TimePoint next = sessions_.NextTick();
  if (const auto timer = timers_.NextDeadline()) next = std::min(next, *timer);
  for (const SimulatedWork& work : simulated_works_) next = std::min(next, work.ready_at);
  return next;
}

void Node::Run() {
  TimePoint idle_since = clock_.Now();
  while (!stop_.load(std::memory_order_acquire)) {
    if (RunOnce()) {
      idle_since = clock_.Now();
      continue;
    }
    const TimePoint now = clock_.Now();
    if (now - idle_since < options_.spin) continue;
    const Duration until = NextWake() - now;
    if (until > Duration::zero()) transport_.Wait(until);
    idle_since = clock_.Now();
  }
}

void Node::Stop() {
  stop_.store(true, std::memory_order_release);
  transport_.Wake();
}

SessionCounters Node::counters() const {
  std::lock_guard<std::mutex> lock(counters_mutex_);
  return published_counters_;
}

}  // namespace moebius::runtime
