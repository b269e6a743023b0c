// moebius-expert: hosts the routed experts that the controller gives it.

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "services/common/flags.h"
#include "services/common/process.h"
#include "services/expert/expert_service.h"

int main(int argc, char** argv) {
  using namespace moebius::services;
  BlockStopSignals();
  const ServiceFlags flags = ParseFlagsOrExit(ServiceRole::kExpert, argc, argv);
  absl::StatusOr<std::unique_ptr<ExpertService>> service = ExpertService::Start(flags);
  if (!service.ok()) {
    LOG_ERROR(service.status().ToString());
    return 1;
  }
  LOG_INFO(absl::StrCat("serving on ", (*service)->address()));
  WaitForStop();
  (*service)->Drain();
  return ExitCode();
}
