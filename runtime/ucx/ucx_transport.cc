#include "runtime/ucx/ucx_transport.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <ucs/config/global_opts.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "runtime/ucx/ucx_handles.h"

namespace moebius::runtime::ucx {

absl::Status FromUcs(ucs_status_t status, absl::string_view what) {
  if (status == UCS_OK) return absl::OkStatus();
  const std::string message = absl::StrCat(what, ": ", ucs_status_string(status));
  switch (status) {
    case UCS_ERR_INVALID_PARAM:
    case UCS_ERR_INVALID_ADDR:
      return absl::InvalidArgumentError(message);
    case UCS_ERR_NO_MEMORY:
    case UCS_ERR_NO_RESOURCE:
      return absl::ResourceExhaustedError(message);
    case UCS_ERR_CANCELED:
      return absl::CancelledError(message);
    case UCS_ERR_UNSUPPORTED:
      return absl::UnimplementedError(message);
    default:
      return absl::UnavailableError(message);
  }
}

namespace {

constexpr unsigned kFrameMessage = 1;  // the one active-message id in use

absl::StatusOr<sockaddr_in> ParseAddress(const std::string& text) {
  const size_t colon = text.rfind(':');
  sockaddr_in address{};
  address.sin_family = AF_INET;
  uint32_t port = 0;
  if (colon == std::string::npos || !absl::SimpleAtoi(text.substr(colon + 1), &port) ||
      port > 65535 || inet_pton(AF_INET, text.substr(0, colon).c_str(), &address.sin_addr) != 1) {
    return absl::InvalidArgumentError(absl::StrCat("address '", text, "' is not IPv4:port"));
  }
  address.sin_port = htons(static_cast<uint16_t>(port));
  return address;
}

std::string FormatAddress(const sockaddr_in& address) {
  char text[INET_ADDRSTRLEN] = {};
  inet_ntop(AF_INET, &address.sin_addr, text, sizeof(text));
  return absl::StrCat(text, ":", ntohs(address.sin_port));
}

// The device that owns the address; an unspecified address (0.0.0.0) leaves the choice to UCX.
std::string DeviceOf(const sockaddr_in& address) {
  std::string device = "all";
  ifaddrs* list = nullptr;
  if (address.sin_addr.s_addr == INADDR_ANY || getifaddrs(&list) != 0) return device;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || entry->ifa_addr->sa_family != AF_INET) continue;
    const auto* own = reinterpret_cast<const sockaddr_in*>(entry->ifa_addr);
    // All of 127.0.0.0/8 is the loopback device's.
    const bool loopback =
        (ntohl(address.sin_addr.s_addr) >> 24) == 127 && (ntohl(own->sin_addr.s_addr) >> 24) == 127;
    if (own->sin_addr.s_addr == address.sin_addr.s_addr || loopback) device = entry->ifa_name;
  }
  freeifaddrs(list);
  return device;
}

class UcxTransport final : public Transport {
 public:
  UcxTransport(const UcxOptions& options, BufferPool& pool) : options_(options), pool_(pool) {}
  ~UcxTransport() override;

  absl::Status Open();

  std::string ListenAddress() const override { return listen_address_; }
  ConnectionId Connect(const std::string& address) override;
  SendResult Send(ConnectionId connection, Frame& frame) override;
  void Close(ConnectionId connection) override;
  void Poll(std::vector<TransportEvent>& events) override;
  void Wait(Duration timeout) override;
  void Wake() override;

 private:
  // A frame on its way in. Frames of a connection are reported in order, each once it is whole.
  struct Incoming {
    wire::FrameHeader header;
    Buffer buffer;
    std::vector<std::byte> spill;  // eager data that found no pool buffer
    void* descriptor = nullptr;    // data UCX keeps for us (rendezvous, or persistent eager)
    size_t length = 0;
    bool rendezvous = false;
    bool fetching = false;
    bool whole = false;
    bool failed = false;
  };
  struct Connection {
    UcxTransport* owner = nullptr;
    ConnectionId id = 0;
    ucp_ep_h endpoint = nullptr;
    bool announced = false;  // kConnected / kAccepted was reported
    bool accepted = false;
    bool broken = false;  // closed by us, or UCX reported an error
    bool endpoint_closed = false;
    bool sender_blocked = false;
    uint32_t sends_in_flight = 0;
    absl::Status why;
    std::list<Incoming> incoming;
  };
  // Owns what a send reads until UCX is done with it.
  struct SendSlot {
    UcxTransport* owner = nullptr;
    Connection* connection = nullptr;
    wire::FrameHeader header;
    Buffer payload;
    bool busy = false;
  };

  static void OnConnectionRequest(ucp_conn_request_h request, void* self);
  static void OnEndpointError(void* connection, ucp_ep_h endpoint, ucs_status_t status);
  static void OnSendDone(void* request, ucs_status_t status, void* slot);
  static void OnFetchDone(void* request, ucs_status_t status, size_t length, void* incoming);
  static ucs_status_t OnMessage(void* self, const void* header, size_t header_length, void* data,
                                size_t length, const ucp_am_recv_param_t* param);

  Connection* Find(ConnectionId id);
  Connection* NewConnection();
  SendSlot* FreeSlot();
  void FinishSend(SendSlot& slot);
  bool Fetch(Connection& connection, Incoming& incoming);
  void Pump(Connection& connection, std::vector<TransportEvent>& events);
  void Break(Connection& connection, absl::Status why);
  void CloseEndpoint(Connection& connection);
  void Drop(Connection& connection);

  const UcxOptions options_;
  BufferPool& pool_;
  UcxContext context_;
  UcxWorker worker_;
  UcxListener listener_;
  UniqueFd epoll_;
  UniqueFd wake_;
  std::string listen_address_;
  // unique_ptr: UCX callbacks hold addresses of connections and slots.
  std::vector<std::unique_ptr<Connection>> connections_;
  std::vector<std::unique_ptr<SendSlot>> slots_;
  std::vector<SendSlot*> free_slots_;
  std::vector<ucp_conn_request_h> requests_;
  std::vector<void*> closing_;  // endpoint close requests
  // Records of frames already reported, for the next ones: a list, because UCX holds their
  // addresses while a rendezvous runs, and because splicing allocates nothing.
  std::list<Incoming> spare_;
  ConnectionId next_id_ = 1;
};

absl::Status UcxTransport::Open() {
  // UCX would take over SIGSEGV and friends to print backtraces; a crash is ours to report.
  ucs_global_opts_set_value("HANDLE_ERRORS", "none");
  ASSIGN_OR_RETURN(const sockaddr_in bind, ParseAddress(options_.bind_address));
  ucp_config_t* raw_config = nullptr;
  RETURN_IF_ERROR(FromUcs(ucp_config_read(nullptr, nullptr, &raw_config), "ucp_config_read"));
  UcxConfig config(raw_config);
  const std::pair<const char*, std::string> settings[] = {
      {"TLS", "tcp,self"},     {"NET_DEVICES", DeviceOf(bind)}, {"SOCKADDR_TLS_PRIORITY", "tcp"},
      {"RNDV_THRESH", "256k"}, {"KEEPALIVE_INTERVAL", "1s"},
  };
  // The tcp layer below UCP reads its settings from the environment alone, when it is opened (1.13
  // refuses them in ucp_config_modify). What an operator has set stays.
  const std::pair<const char*, const char*> tcp_settings[] = {
      {"UCX_TCP_TX_SEG_SIZE", "64k"}, {"UCX_TCP_CM_REUSEADDR", "y"}, {"UCX_TCP_KEEPIDLE", "1s"},
      {"UCX_TCP_KEEPINTVL", "1s"},    {"UCX_TCP_KEEPCNT", "3"},
  };
  for (const auto& [name, value] : tcp_settings) setenv(name, value, /*overwrite=*/0);
  for (const auto& [name, value] : settings) {
    RETURN_IF_ERROR(FromUcs(ucp_config_modify(config.get(), name, value.c_str()),
                            absl::StrCat("UCX setting ", name)));
  }
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES;
  params.features = UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  ucp_context_h context = nullptr;
  RETURN_IF_ERROR(FromUcs(ucp_init(&params, config.get(), &context), "ucp_init"));
  context_.reset(context);
  ucp_worker_params_t worker_params{};
  worker_params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  worker_params.thread_mode = UCS_THREAD_MODE_SINGLE;
  ucp_worker_h worker = nullptr;
  RETURN_IF_ERROR(
      FromUcs(ucp_worker_create(context_.get(), &worker_params, &worker), "ucp_worker_create"));
  worker_.reset(worker);

  ucp_am_handler_param_t handler{};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                       UCP_AM_HANDLER_PARAM_FIELD_ARG | UCP_AM_HANDLER_PARAM_FIELD_FLAGS;
  handler.id = kFrameMessage;
  handler.cb = &UcxTransport::OnMessage;
  handler.arg = this;
  handler.flags = UCP_AM_FLAG_WHOLE_MSG;
  RETURN_IF_ERROR(FromUcs(ucp_worker_set_am_recv_handler(worker_.get(), &handler),
                          "ucp_worker_set_am_recv_handler"));

  ucp_listener_params_t listen{};
  listen.field_mask = UCP_LISTENER_PARAM_FIELD_SOCK_ADDR | UCP_LISTENER_PARAM_FIELD_CONN_HANDLER;
  listen.sockaddr.addr = reinterpret_cast<const sockaddr*>(&bind);
  listen.sockaddr.addrlen = sizeof(bind);
  listen.conn_handler.cb = &UcxTransport::OnConnectionRequest;
  listen.conn_handler.arg = this;
  ucp_listener_h listener = nullptr;
  RETURN_IF_ERROR(FromUcs(ucp_listener_create(worker_.get(), &listen, &listener),
                          absl::StrCat("listening on ", options_.bind_address)));
  listener_.reset(listener);
  ucp_listener_attr_t attributes{};
  attributes.field_mask = UCP_LISTENER_ATTR_FIELD_SOCKADDR;
  RETURN_IF_ERROR(FromUcs(ucp_listener_query(listener_.get(), &attributes), "ucp_listener_query"));
  sockaddr_in bound = bind;
  bound.sin_port = reinterpret_cast<const sockaddr_in*>(&attributes.sockaddr)->sin_port;
  listen_address_ = FormatAddress(bound);

  int worker_fd = -1;
  RETURN_IF_ERROR(FromUcs(ucp_worker_get_efd(worker_.get(), &worker_fd), "ucp_worker_get_efd"));
  epoll_.reset(epoll_create1(EPOLL_CLOEXEC));
  wake_.reset(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!epoll_ || !wake_) return absl::ResourceExhaustedError("no file descriptors for epoll");
  for (int fd : {worker_fd, wake_.get()}) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0)
      return absl::InternalError("epoll_ctl");
  }
  return absl::OkStatus();
}

UcxTransport::~UcxTransport() {
  if (!worker_) return;
  listener_.reset();
  for (auto& connection : connections_) {
    if (connection != nullptr) Break(*connection, absl::CancelledError("transport is closing"));
  }
  // Every send and fetch must hand back its buffer before the pool may go.
  for (int turn = 0; turn < 100000; ++turn) {
    while (ucp_worker_progress(worker_.get()) != 0) {
    }
    const bool busy = std::any_of(connections_.begin(), connections_.end(), [](const auto& c) {
      return c->sends_in_flight > 0 || std::any_of(c->incoming.begin(), c->incoming.end(),
                                                   [](const Incoming& i) { return i.fetching; });
    });
    if (!busy) break;
  }
  for (auto& connection : connections_) Drop(*connection);
  for (void* request : closing_) ucp_request_free(request);
}

UcxTransport::Connection* UcxTransport::Find(ConnectionId id) {
  for (auto& connection : connections_) {
    if (connection->id == id) return connection.get();
  }
  return nullptr;
}

UcxTransport::Connection* UcxTransport::NewConnection() {
  connections_.push_back(std::make_unique<Connection>());
  Connection* connection = connections_.back().get();
  connection->owner = this;
  connection->id = next_id_++;
  return connection;
}

void UcxTransport::OnConnectionRequest(ucp_conn_request_h request, void* self) {
  static_cast<UcxTransport*>(self)->requests_.push_back(request);
}

void UcxTransport::OnEndpointError(void* raw, ucp_ep_h, ucs_status_t status) {
  auto* connection = static_cast<Connection*>(raw);
  if (connection->broken) return;
  connection->broken = true;
  connection->why = FromUcs(status, "connection");
}

ConnectionId UcxTransport::Connect(const std::string& text) {
  Connection* connection = NewConnection();
  const absl::StatusOr<sockaddr_in> address = ParseAddress(text);
  if (!address.ok()) {
    Break(*connection, address.status());
    return connection->id;
  }
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR |
                      UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
  params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
  params.sockaddr.addr = reinterpret_cast<const sockaddr*>(&*address);
  params.sockaddr.addrlen = sizeof(*address);
  params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  params.err_handler.cb = &UcxTransport::OnEndpointError;
  params.err_handler.arg = connection;
  const ucs_status_t status = ucp_ep_create(worker_.get(), &params, &connection->endpoint);
  if (status != UCS_OK) {
    connection->endpoint = nullptr;
    Break(*connection, FromUcs(status, absl::StrCat("connecting to ", text)));
  }
  return connection->id;
}

UcxTransport::SendSlot* UcxTransport::FreeSlot() {
  if (free_slots_.empty()) {
    slots_.push_back(std::make_unique<SendSlot>());
    slots_.back()->owner = this;
    free_slots_.reserve(slots_.capacity());
    return slots_.back().get();
  }
  SendSlot* slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

SendResult UcxTransport::Send(ConnectionId id, Frame& frame) {
  Connection* connection = Find(id);
  if (connection == nullptr || connection->broken) return SendResult::kUnreachable;
  if (connection->sends_in_flight >= options_.max_sends_per_connection) {
    connection->sender_blocked = true;
    return SendResult::kBusy;
  }
  SendSlot* slot = FreeSlot();
  slot->connection = connection;
  slot->header = frame.header;
  slot->payload = std::move(frame.payload);
  slot->busy = true;
  ++connection->sends_in_flight;
  ucp_request_param_t param{};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_AM_SEND_FLAG_REPLY;
  param.cb.send = &UcxTransport::OnSendDone;
  param.user_data = slot;
  // The slot keeps header and payload alive until the completion.
  const ucs_status_ptr_t request =
      ucp_am_send_nbx(connection->endpoint, kFrameMessage, &slot->header, sizeof(slot->header),
                      slot->payload.data(), slot->payload.size(), &param);
  if (UCS_PTR_IS_ERR(request)) {
    frame.payload = std::move(slot->payload);
    FinishSend(*slot);
    if (!connection->broken) {
      connection->broken = true;
      connection->why = FromUcs(UCS_PTR_STATUS(request), "send");
    }
    return SendResult::kUnreachable;
  }
  if (request == nullptr) FinishSend(*slot);  // done on the spot; no callback follows
  return SendResult::kSent;
}

void UcxTransport::FinishSend(SendSlot& slot) {
  CHECK(slot.busy);
  slot.busy = false;
  slot.payload = Buffer();
  --slot.connection->sends_in_flight;
  slot.connection = nullptr;
  free_slots_.push_back(&slot);
}

void UcxTransport::OnSendDone(void* request, ucs_status_t, void* raw) {
  auto* slot = static_cast<SendSlot*>(raw);
  // Failure shows on the endpoint; completion only frees the buffer, either way.
  slot->owner->FinishSend(*slot);
  ucp_request_free(request);
}

ucs_status_t UcxTransport::OnMessage(void* self, const void* header, size_t header_length,
                                     void* data, size_t length, const ucp_am_recv_param_t* param) {
  auto* transport = static_cast<UcxTransport*>(self);
  Connection* connection = nullptr;
  if (param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) {
    for (auto& candidate : transport->connections_) {
      if (candidate->endpoint == param->reply_ep && !candidate->endpoint_closed)
        connection = candidate.get();
    }
  }
  if (connection == nullptr || connection->broken) return UCS_OK;  // of a connection we gave up
  if (header_length != sizeof(wire::FrameHeader) ||
      length > transport->options_.max_payload_bytes) {
    connection->broken = true;
    connection->why = absl::InvalidArgumentError(
        absl::StrCat("frame of ", header_length, " header and ", length, " payload bytes"));
    return UCS_OK;
  }
  if (transport->spare_.empty()) transport->spare_.emplace_back();
  connection->incoming.splice(connection->incoming.end(), transport->spare_,
                              transport->spare_.begin());
  Incoming& incoming = connection->incoming.back();
  std::memcpy(&incoming.header, header, sizeof(incoming.header));
  incoming.length = length;
  if (length == 0) {
    incoming.whole = true;
    return UCS_OK;
  }
  if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) {
    incoming.rendezvous = true;
    incoming.descriptor = data;
    return UCS_INPROGRESS;  // fetched from Poll
  }
  if (std::optional<Buffer> buffer = transport->pool_.Acquire(length)) {
    std::memcpy(buffer->data(), data, length);
    incoming.buffer = std::move(*buffer);
    incoming.whole = true;
    return UCS_OK;
  }
  if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_DATA) {
    incoming.descriptor = data;  // UCX keeps it until a buffer is free
    return UCS_INPROGRESS;
  }
  incoming.spill.assign(static_cast<std::byte*>(data), static_cast<std::byte*>(data) + length);
  return UCS_OK;
}

void UcxTransport::OnFetchDone(void* request, ucs_status_t status, size_t, void* raw) {
  auto* incoming = static_cast<Incoming*>(raw);
  incoming->fetching = false;
  incoming->whole = status == UCS_OK;
  incoming->failed = status != UCS_OK;
  ucp_request_free(request);
}

// Moves one incoming frame forward; true once it is whole.
bool UcxTransport::Fetch(Connection& connection, Incoming& incoming) {
  if (incoming.whole || incoming.fetching || incoming.failed) return incoming.whole;
  std::optional<Buffer> buffer = pool_.Acquire(incoming.length);
  if (!buffer) {
    if (incoming.length > pool_.max_buffer_bytes()) {
      Break(connection, absl::InvalidArgumentError(
                            absl::StrCat("frame of ", incoming.length, " payload bytes")));
    }
    return false;
  }
  incoming.buffer = std::move(*buffer);
  if (!incoming.rendezvous) {
    const void* source =
        incoming.descriptor != nullptr ? incoming.descriptor : incoming.spill.data();
    std::memcpy(incoming.buffer.data(), source, incoming.length);
    if (incoming.descriptor != nullptr) ucp_am_data_release(worker_.get(), incoming.descriptor);
    incoming.descriptor = nullptr;
    incoming.spill = {};
    incoming.whole = true;
    return true;
  }
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.recv_am = &UcxTransport::OnFetchDone;
  param.user_data = &incoming;
  incoming.fetching = true;
  const ucs_status_ptr_t request = ucp_am_recv_data_nbx(
      worker_.get(), incoming.descriptor, incoming.buffer.data(), incoming.length, &param);
  incoming.descriptor = nullptr;
  if (UCS_PTR_IS_ERR(request)) {
    incoming.fetching = false;
    incoming.failed = true;
  } else if (request == nullptr) {
    incoming.fetching = false;
    incoming.whole = true;
  }
  return incoming.whole;
}

void UcxTransport::Pump(Connection& connection, std::vector<TransportEvent>& events) {
  if (!connection.announced) {
    connection.announced = true;
    TransportEvent event;
    event.kind =
        connection.accepted ? TransportEvent::Kind::kAccepted : TransportEvent::Kind::kConnected;
    event.connection = connection.id;
    if (!connection.broken) events.push_back(std::move(event));
  }
  // Start every fetch that has a buffer, report from the front only.
  for (Incoming& incoming : connection.incoming) Fetch(connection, incoming);
  while (!connection.incoming.empty() && !connection.broken) {
    Incoming& front = connection.incoming.front();
    if (front.failed) {
      Break(connection, absl::DataLossError("a frame broke off"));
      break;
    }
    if (!front.whole) break;
    TransportEvent event;
    event.kind = TransportEvent::Kind::kFrame;
    event.connection = connection.id;
    event.frame.header = front.header;
    event.frame.payload = std::move(front.buffer);
    events.push_back(std::move(event));
    front = Incoming();
    spare_.splice(spare_.begin(), connection.incoming, connection.incoming.begin());
  }
  // What is left waits for a buffer, or for a frame before it that does.
  if (connection.incoming.size() > options_.max_waiting_frames && !connection.broken) {
    Break(connection, absl::ResourceExhaustedError("too many frames wait for buffers"));
  }
  if (connection.sender_blocked && !connection.broken &&
      connection.sends_in_flight <= options_.max_sends_per_connection / 2) {
    connection.sender_blocked = false;
    TransportEvent event;
    event.kind = TransportEvent::Kind::kWritable;
    event.connection = connection.id;
    events.push_back(std::move(event));
  }
}

void UcxTransport::Break(Connection& connection, absl::Status why) {
  if (!connection.broken) {
    connection.broken = true;
    connection.why = std::move(why);
  }
  CloseEndpoint(connection);
}

void UcxTransport::CloseEndpoint(Connection& connection) {
  if (connection.endpoint == nullptr || connection.endpoint_closed) return;
  connection.endpoint_closed = true;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  param.flags = UCP_EP_CLOSE_FLAG_FORCE;
  const ucs_status_ptr_t request = ucp_ep_close_nbx(connection.endpoint, &param);
  if (request != nullptr && !UCS_PTR_IS_ERR(request)) closing_.push_back(request);
}

// Gives back what UCX holds for frames that will never be reported.
void UcxTransport::Drop(Connection& connection) {
  for (Incoming& incoming : connection.incoming) {
    if (incoming.descriptor != nullptr) ucp_am_data_release(worker_.get(), incoming.descriptor);
    incoming.descriptor = nullptr;
  }
  connection.incoming.clear();
}

void UcxTransport::Close(ConnectionId id) {
  if (Connection* connection = Find(id)) Break(*connection, absl::CancelledError("closed here"));
}

void UcxTransport::Poll(std::vector<TransportEvent>& events) {
  for (int turn = 0; turn < 64 && ucp_worker_progress(worker_.get()) != 0; ++turn) {
  }
  for (ucp_conn_request_h request : requests_) {
    Connection* connection = NewConnection();
    connection->accepted = true;
    ucp_ep_params_t params{};
    params.field_mask = UCP_EP_PARAM_FIELD_CONN_REQUEST | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.conn_request = request;
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = &UcxTransport::OnEndpointError;
    params.err_handler.arg = connection;
    const ucs_status_t status = ucp_ep_create(worker_.get(), &params, &connection->endpoint);
    if (status != UCS_OK) {
      connection->endpoint = nullptr;
      LOG_WARNING(std::string(FromUcs(status, "accepting a connection").message()));
      connections_.pop_back();
    }
  }
  requests_.clear();
  for (size_t i = 0; i < closing_.size();) {
    if (ucp_request_check_status(closing_[i]) == UCS_INPROGRESS) {
      ++i;
      continue;
    }
    ucp_request_free(closing_[i]);
    closing_[i] = closing_.back();
    closing_.pop_back();
  }
  for (size_t i = 0; i < connections_.size();) {
    Connection& connection = *connections_[i];
    Pump(connection, events);
    if (!connection.broken) {
      ++i;
      continue;
    }
    CloseEndpoint(connection);
    const bool fetching = std::any_of(connection.incoming.begin(), connection.incoming.end(),
                                      [](const Incoming& incoming) { return incoming.fetching; });
    if (connection.sends_in_flight > 0 || fetching) {  // their buffers come back first
      ++i;
      continue;
    }
    Drop(connection);
    TransportEvent event;
    event.kind = TransportEvent::Kind::kClosed;
    event.connection = connection.id;
    event.status = connection.why;
    events.push_back(std::move(event));
    connections_.erase(connections_.begin() + static_cast<int64_t>(i));
  }
}

void UcxTransport::Wait(Duration timeout) {
  // Arming fails while something is waiting to be progressed.
  if (ucp_worker_arm(worker_.get()) != UCS_OK) return;
  const int64_t ms = std::clamp<int64_t>((timeout.count() + 999'999) / 1'000'000, 0, 1000);
  epoll_event event{};
  epoll_wait(epoll_.get(), &event, 1, static_cast<int>(ms));
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t drained = read(wake_.get(), &count, sizeof(count));
}

void UcxTransport::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Transport>> MakeUcxTransport(const UcxOptions& options,
                                                            BufferPool& pool) {
  auto transport = std::make_unique<UcxTransport>(options, pool);
  RETURN_IF_ERROR(transport->Open());
  return std::unique_ptr<Transport>(std::move(transport));
}

}  // namespace moebius::runtime::ucx
