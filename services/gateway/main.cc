// moebius-gateway: the gRPC front door.

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "services/common/flags.h"
#include "services/common/process.h"
#include "services/gateway/gateway_service.h"

int main(int argc, char** argv) {
  using namespace moebius::services;
  BlockStopSignals();
  const ServiceFlags flags = ParseFlagsOrExit(ServiceRole::kGateway, argc, argv);
  absl::StatusOr<std::unique_ptr<Gateway>> gateway = Gateway::Start(flags);
  if (!gateway.ok()) {
    LOG_ERROR(gateway.status().ToString());
    return 1;
  }
  LOG_INFO(absl::StrCat("serving on ", (*gateway)->address()));
  WaitForStop();
  (*gateway)->Drain();
  return 0;
}
