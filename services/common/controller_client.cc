#include "services/common/controller_client.h"

#include <grpcpp/grpcpp.h>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "services/common/grpc_status.h"

namespace moebius::services {
namespace {
constexpr std::chrono::milliseconds kRenewEvery(250);
constexpr std::chrono::milliseconds kRetryEvery(200);
}  // namespace

ControllerClient::ControllerClient(const std::string& address, const ListenOptions& credentials,
                                   v1::Worker self, Handlers handlers,
                                   std::chrono::milliseconds silence)
    : address_(address),
      credentials_(credentials),
      handlers_(std::move(handlers)),
      silence_(silence),
      stub_(Connect()),
      self_(std::move(self)) {}

std::shared_ptr<v1::Control::Stub> ControllerClient::Connect() const {
  return v1::Control::NewStub(MakeChannel(address_, credentials_, /*own_connection=*/true));
}

void ControllerClient::Start() {
  if (self_.node() != 0) renew_thread_ = std::thread([this] { RenewLoop(); });
  if (handlers_.on_order) order_thread_ = std::thread([this] { OrderLoop(); });
  if (handlers_.on_view) watch_thread_ = std::thread([this] { WatchLoop(); });
}

ControllerClient::~ControllerClient() { Stop(); }

void ControllerClient::Stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    if (watching_ != nullptr) watching_->TryCancel();
  }
  wake_.notify_all();
  for (std::thread* thread : {&renew_thread_, &order_thread_, &watch_thread_}) {
    if (thread->joinable()) thread->join();
  }
}

void ControllerClient::SetReady(bool ready) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (self_.ready() == ready) return;
  self_.set_ready(ready);
  renew_now_ = true;
  wake_.notify_all();
}

void ControllerClient::Leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  leaving_ = true;
  renew_now_ = true;
  wake_.notify_all();
}

bool ControllerClient::Pause(std::chrono::milliseconds time) {
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait_for(lock, time, [this] { return stopping_; });
  return !stopping_;
}

void ControllerClient::RenewLoop() {
  bool reported = true;
  while (true) {
    v1::RenewRequest request;
    std::shared_ptr<v1::Control::Stub> stub;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
      renew_now_ = false;
      stub = stub_;
      *request.mutable_worker() = self_;
      request.set_operation_done(operation_done_);
      request.set_leaving(leaving_);
    }
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(1));
    v1::RenewReply reply;
    const grpc::Status status = stub->Renew(&context, request, &reply);
    std::unique_lock<std::mutex> lock(mutex_);
    if (status.ok()) {
      reported = false;
      const v1::HostOrder& order = reply.order();
      const bool newer_term = order.term() > term_;
      if (newer_term) {
        // A new controller numbers its operations afresh; what we hold is compared when its order
        // is carried out.
        term_ = order.term();
        operation_done_ = 0;
      }
      if (order.operation_id() > operation_done_ && order.term() == term_ &&
          !(order_waiting_ && order_.operation_id() == order.operation_id())) {
        order_ = order;
        order_waiting_ = true;
        wake_.notify_all();
      }
    } else if (!reported) {
      reported = true;
      LOG_WARNING(
          absl::StrCat("controller: ", status.error_message(), "; going on with what is in force"));
    }
    wake_.wait_for(lock, kRenewEvery, [this] { return stopping_ || renew_now_; });
  }
}

void ControllerClient::OrderLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stopping_ || order_waiting_; });
    if (stopping_) return;
    const v1::HostOrder order = order_;
    lock.unlock();
    const absl::Status status = handlers_.on_order(order);
    lock.lock();
    if (order_.operation_id() == order.operation_id() && order_.term() == order.term())
      order_waiting_ = false;
    if (status.ok()) {
      if (order.term() == term_) operation_done_ = order.operation_id();
      renew_now_ = true;
      wake_.notify_all();
    } else {
      LOG_ERROR(absl::StrCat("order ", order.operation_id(), ": ", status.ToString()));
      wake_.wait_for(lock, std::chrono::seconds(1), [this] { return stopping_; });
    }
  }
}

void ControllerClient::WatchLoop() {
  std::string taken_in;  // the last view handed over, as bytes
  do {
    grpc::ClientContext context;
    std::shared_ptr<v1::Control::Stub> stub;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
      watching_ = &context;
      stub = stub_;
    }
    std::atomic<bool> silent{false};
    StallWatch::Stream heard(silence_, [&] {
      silent.store(true);
      context.TryCancel();
    });
    heard.Begin();
    auto reader = stub->Watch(&context, v1::WatchRequest());
    v1::ClusterView view;
    for (; reader->Read(&view); heard.Begin()) {
      heard.End();
      std::string bytes = view.SerializeAsString();
      if (bytes == taken_in) continue;
      while (true) {
        const absl::Status taken = handlers_.on_view(view);
        if (taken.ok()) {
          taken_in = std::move(bytes);
          break;
        }
        LOG_WARNING(absl::StrCat("view of epoch ", view.epoch(), ": ", taken.ToString()));
        if (!Pause(kRetryEvery)) break;
      }
    }
    heard.End();
    (void)reader->Finish();
    if (silent.load()) {
      LOG_WARNING(absl::StrCat("controller at ", address_, " is silent; connecting anew"));
    }
    std::lock_guard<std::mutex> lock(mutex_);
    watching_ = nullptr;
    if (silent.load()) stub_ = Connect();
  } while (Pause(kRetryEvery));
}

}  // namespace moebius::services
