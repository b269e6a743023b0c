// moebius-attention: attention, dense layers, latent cache, scheduling and sampling, with a router
// aboard.

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "services/attention/attention_service.h"
#include "services/common/flags.h"
#include "services/common/process.h"

int main(int argc, char** argv) {
  using namespace moebius::services;
  BlockStopSignals();
  const ServiceFlags flags = ParseFlagsOrExit(ServiceRole::kAttention, argc, argv);
  absl::StatusOr<std::unique_ptr<AttentionProcess>> process = AttentionProcess::Start(flags);
  if (!process.ok()) {
    LOG_ERROR(process.status().ToString());
    return 1;
  }
  LOG_INFO(absl::StrCat("serving on ", (*process)->address()));
  WaitForStop();
  (*process)->Drain();
  return ExitCode();
}
