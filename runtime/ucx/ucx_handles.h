#pragma once

// UCX handles with one owner each, and the one place where its status codes become ours.

#include <ucp/api/ucp.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "base/unique_handle.h"

namespace moebius::runtime::ucx {

absl::Status FromUcs(ucs_status_t status, absl::string_view what);

struct UcxConfigTraits {
  using Type = ucp_config_t*;
  static constexpr Type kInvalid = nullptr;
  static void Close(Type config) { ucp_config_release(config); }
};
struct UcxContextTraits {
  using Type = ucp_context_h;
  static constexpr Type kInvalid = nullptr;
  static void Close(Type context) { ucp_cleanup(context); }
};
struct UcxWorkerTraits {
  using Type = ucp_worker_h;
  static constexpr Type kInvalid = nullptr;
  static void Close(Type worker) { ucp_worker_destroy(worker); }
};
struct UcxListenerTraits {
  using Type = ucp_listener_h;
  static constexpr Type kInvalid = nullptr;
  static void Close(Type listener) { ucp_listener_destroy(listener); }
};
using UcxConfig = UniqueHandle<UcxConfigTraits>;
using UcxContext = UniqueHandle<UcxContextTraits>;
using UcxWorker = UniqueHandle<UcxWorkerTraits>;
using UcxListener = UniqueHandle<UcxListenerTraits>;

}  // namespace moebius::runtime::ucx
