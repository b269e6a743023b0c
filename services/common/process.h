#pragma once

// What every service process does around its work: signals, and telling its starter where it
// listens.

#include <string>

#include "absl/status/status.h"

namespace moebius::services {

// Call first in main(), before any thread starts: SIGTERM and SIGINT are blocked everywhere and
// taken by WaitForStop alone; SIGPIPE is ignored.
void BlockStopSignals();

// Blocks until SIGTERM or SIGINT. A second one during the drain that follows ends the process at
// once (exit 130).
void WaitForStop();

// A worker whose device failed can serve no more; a fresh start of it may. Lets WaitForStop return
// as after SIGTERM and ExitCode be 1. Any thread; calls after the first do nothing.
void EndAfterFailure(const absl::Status& why);

// What main() returns: 0, or 1 after EndAfterFailure.
int ExitCode();

// Writes `address` to `path` atomically (a starter polls for the file). Empty path: does nothing.
absl::Status PublishAddress(const std::string& path, const std::string& address);

}  // namespace moebius::services
