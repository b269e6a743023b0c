#include "tests/services/raw_call.h"

#include <vector>

namespace moebius::services {
namespace {

grpc::ByteBuffer ToBuffer(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

std::string ToString(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  std::string bytes;
  if (!buffer.Valid() || !buffer.Dump(&slices).ok()) return bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

}  // namespace

RawReply RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                 const std::string& request, grpc_compression_algorithm compression) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  context.set_compression_algorithm(compression);
  grpc::CompletionQueue queue;
  auto call = stub.PrepareUnaryCall(&context, method, ToBuffer(request), &queue);
  call->StartCall();
  RawReply reply;
  grpc::ByteBuffer buffer;
  call->Finish(&buffer, &reply.status, &queue);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  reply.bytes = ToString(buffer);
  return reply;
}

RawStream::RawStream(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const std::string& request) {
  grpc::GenericStub stub(channel);
  call_ = stub.PrepareCall(&context_, method, &queue_);
  call_->StartCall(&queue_);
  if (!Next(std::chrono::seconds(60))) return;
  call_->Write(ToBuffer(request), &queue_);
  Next(std::chrono::seconds(60));
}

RawStream::~RawStream() {
  context_.TryCancel();
  queue_.Shutdown();
  void* tag = nullptr;
  bool ok = false;
  while (queue_.Next(&tag, &ok)) {
  }
}

bool RawStream::Next(std::chrono::seconds limit) {
  void* tag = nullptr;
  bool ok = false;
  if (queue_.AsyncNext(&tag, &ok, std::chrono::system_clock::now() + limit) ==
      grpc::CompletionQueue::GOT_EVENT) {
    return ok;
  }
  // The operation must end before what it writes to does.
  context_.TryCancel();
  queue_.Next(&tag, &ok);
  return false;
}

std::optional<std::string> RawStream::Read(std::chrono::seconds limit) {
  grpc::ByteBuffer buffer;
  call_->Read(&buffer, &queue_);
  if (!Next(limit)) return std::nullopt;
  return ToString(buffer);
}

grpc::Status RawStream::Finish() {
  grpc::Status status;
  call_->Finish(&status, &queue_);
  Next(std::chrono::seconds(60));
  return status;
}

}  // namespace moebius::services
