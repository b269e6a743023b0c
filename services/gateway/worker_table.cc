#include "services/gateway/worker_table.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"

namespace moebius::services {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr milliseconds kFirstBackOff(50);
constexpr milliseconds kLongestBackOff(1000);
// A probe has ended by then: a worker that says nothing is given up earlier.
constexpr milliseconds kProbeTime(3000);
// How late a cancellation is noticed while nothing else happens.
constexpr milliseconds kCancelPoll(100);

}  // namespace

WorkerTable::Hold::~Hold() {
  Cleared();
  std::lock_guard<std::mutex> lock(table_.mutex_);
  const auto it = table_.workers_.find(node_);
  if (it == table_.workers_.end()) return;
  // A probe that ended without a word leaves the next one to others.
  if (probe_ && it->second.incarnation == incarnation_) it->second.not_before = TimePoint();
  --it->second.held;
  if (it->second.held == 0 && !it->second.ready) table_.workers_.erase(it);
}

void WorkerTable::Hold::Answered() {
  if (answered_) return;
  answered_ = true;
  probe_ = false;
  std::lock_guard<std::mutex> lock(table_.mutex_);
  const auto it = table_.workers_.find(node_);
  if (it == table_.workers_.end() || it->second.incarnation != incarnation_) return;
  if (it->second.back_off == milliseconds(0)) return;
  it->second.back_off = milliseconds(0);
  it->second.not_before = TimePoint();
  table_.changed_.notify_all();
}

void WorkerTable::Hold::Failed() {
  std::lock_guard<std::mutex> lock(table_.mutex_);
  const auto it = table_.workers_.find(node_);
  if (it == table_.workers_.end() || it->second.incarnation != incarnation_) return;
  Worker& worker = it->second;
  const TimePoint now = steady_clock::now();
  // Many requests notice one death: that is one failure. So is the one that tries whether it is
  // over.
  if (now < worker.not_before && !probe_) return;
  probe_ = false;
  worker.back_off = std::clamp(worker.back_off * 2, kFirstBackOff, kLongestBackOff);
  worker.not_before = now + worker.back_off;
}

void WorkerTable::Hold::Cleared() {
  if (!suspect_) return;
  suspect_ = false;
  std::lock_guard<std::mutex> lock(table_.mutex_);
  const auto it = table_.workers_.find(node_);
  if (it == table_.workers_.end() || it->second.incarnation != incarnation_) return;
  it->second.suspect = false;
  table_.changed_.notify_all();
}

void WorkerTable::OnView(const v1::ClusterView& view) {
  std::lock_guard<std::mutex> lock(mutex_);
  // A controller that has just started knows less than we do: what it does not list yet stays.
  complete_ = view.complete() || (!view.settled() && complete_);
  if (view.settled()) {
    for (auto& [node, worker] : workers_) worker.ready = false;
  }
  for (const v1::Worker& seen : view.workers()) {
    if (seen.role() != v1::ROLE_ATTENTION) continue;
    Worker& worker = workers_[seen.node()];
    if (worker.incarnation != seen.incarnation() || worker.address != seen.grpc_address()) {
      worker.incarnation = seen.incarnation();
      worker.address = seen.grpc_address();
      worker.stub = dial_(worker.address);
      worker.suspect = false;
      worker.back_off = milliseconds(0);
      worker.not_before = TimePoint();
    }
    worker.numerics_class = absl::StrCat(seen.model_digest(), "/", seen.numerics());
    worker.ready = seen.ready();
  }
  std::erase_if(workers_,
                [](const auto& entry) { return !entry.second.ready && entry.second.held == 0; });
  changed_.notify_all();
}

bool WorkerTable::CanServe() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return complete_ && std::any_of(workers_.begin(), workers_.end(),
                                  [](const auto& entry) { return entry.second.ready; });
}

WorkerTable::Workers::iterator WorkerTable::Choose(const Wish& wish, TimePoint now,
                                                   TimePoint& wake) {
  const auto own = [&](const Worker& worker) {
    return wish.numerics_class.empty() || worker.numerics_class == wish.numerics_class;
  };
  const bool own_left = std::any_of(workers_.begin(), workers_.end(), [&](const auto& entry) {
    const Worker& worker = entry.second;
    return worker.ready && own(worker) && worker.back_off < kLongestBackOff;
  });
  const bool any_class = !own_left && now >= wish.any_class_from;
  auto best = workers_.end();
  // Rather of the own class, then one that has not refused it, without a suspect, with few aboard.
  const auto rank = [&](const Workers::value_type& entry) {
    const Worker& worker = entry.second;
    return std::make_tuple(!own(worker), entry.first == wish.refused_by, worker.suspect,
                           worker.held);
  };
  for (auto it = workers_.begin(); it != workers_.end(); ++it) {
    const Worker& worker = it->second;
    if (!worker.ready || (!own(worker) && !any_class)) continue;
    if (wish.suspect && worker.suspect) continue;
    if (worker.not_before > now) {
      wake = std::min(wake, worker.not_before);
      continue;
    }
    if (best == workers_.end() || rank(*it) < rank(*best)) best = it;
  }
  return best;
}

absl::StatusOr<std::unique_ptr<WorkerTable::Hold>> WorkerTable::Take(
    const Wish& wish, TimePoint until, const std::function<bool()>& cancelled) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    const TimePoint now = steady_clock::now();
    TimePoint wake = std::min(until, now + kCancelPoll);
    if (now >= wish.not_before) {
      const auto it = Choose(wish, now, wake);
      if (it != workers_.end()) {
        Worker& worker = it->second;
        ++worker.held;
        worker.suspect = worker.suspect || wish.suspect;
        const bool probe = worker.back_off != milliseconds(0);
        if (probe) worker.not_before = now + kProbeTime;  // or until it answers
        return std::unique_ptr<Hold>(new Hold(*this, it->first, worker.incarnation, worker.stub,
                                              worker.numerics_class, wish.suspect, probe));
      }
    } else {
      wake = std::min(wake, wish.not_before);
    }
    if (now >= until) return absl::UnavailableError("no attention worker is ready");
    changed_.wait_until(lock, wake);
    lock.unlock();
    const bool gone = cancelled();
    lock.lock();
    if (gone) return absl::CancelledError("the client is gone");
  }
}

}  // namespace moebius::services
