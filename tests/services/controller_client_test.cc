// Goal: a worker's picture of the cluster neither stands still nor is lost. Method: a controller
// made by hand that falls silent, repeats itself and meets a handler that is busy.

#include "services/common/controller_client.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <future>
#include <vector>

#include "gtest/gtest.h"

namespace moebius::services {
namespace {

// Its first watch says epoch 1 and then nothing; every later one says epoch 2 again and again.
class SilentController final : public v1::Control::Service {
 public:
  grpc::Status Watch(grpc::ServerContext* context, const v1::WatchRequest*,
                     grpc::ServerWriter<v1::ClusterView>* writer) override {
    const int number = ++watches;
    v1::ClusterView view;
    view.set_epoch(number == 1 ? 1 : 2);
    if (number == 1) {
      writer->Write(view);
      std::unique_lock<std::mutex> lock(mutex_);
      while (!context->IsCancelled()) changed_.wait_for(lock, std::chrono::milliseconds(5));
      return grpc::Status::OK;
    }
    while (!context->IsCancelled() && writer->Write(view)) ++repeats;
    return grpc::Status::OK;
  }
  std::atomic<int> watches{0};
  std::atomic<int> repeats{0};

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
};

class ControllerClientTest : public testing::Test {
 protected:
  ControllerClientTest() {
    ListenOptions listen;
    listen.address = "127.0.0.1:0";
    absl::StatusOr<RunningServer> started = StartServer(listen, {&controller_});
    EXPECT_TRUE(started.ok()) << started.status();
    server_ = *std::move(started);
  }
  ~ControllerClientTest() override {
    server_.server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(5));
  }
  SilentController controller_;
  RunningServer server_;
};

TEST_F(ControllerClientTest, ASilentControllerIsConnectedToAnew) {
  std::promise<void> second;
  std::vector<uint64_t> epochs;
  ControllerClient client(server_.address, ListenOptions(), v1::Worker(),
                          {nullptr,
                           [&](const v1::ClusterView& view) {
                             epochs.push_back(view.epoch());
                             if (view.epoch() == 2) second.set_value();
                             return absl::OkStatus();
                           }},
                          std::chrono::milliseconds(200));
  client.Start();
  ASSERT_EQ(second.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
  // A view that is only repeated is not handed over again: epoch 2 would set the promise twice.
  while (controller_.repeats.load() < 100) std::this_thread::yield();
  client.Stop();
  EXPECT_EQ(controller_.watches.load(), 2);
  EXPECT_EQ(epochs, (std::vector<uint64_t>{1, 2}));
}

TEST_F(ControllerClientTest, AViewThatCouldNotBeTakenInComesAgain) {
  std::promise<void> taken;
  int tries = 0;
  ControllerClient client(server_.address, ListenOptions(), v1::Worker(),
                          {nullptr, [&](const v1::ClusterView&) {
                             if (++tries < 3) return absl::ResourceExhaustedError("mailbox full");
                             if (tries == 3) taken.set_value();
                             return absl::OkStatus();
                           }});
  client.Start();
  ASSERT_EQ(taken.get_future().wait_for(std::chrono::seconds(60)), std::future_status::ready);
  client.Stop();
  EXPECT_EQ(tries, 3);
  EXPECT_EQ(controller_.watches.load(), 1) << "the view was kept, not asked for again";
}

}  // namespace
}  // namespace moebius::services
