#pragma once

// The real clock, for nodes of service processes.

#include <chrono>

#include "runtime/clock.h"

namespace moebius::services {

class SteadyClock final : public runtime::Clock {
 public:
  runtime::TimePoint Now() const override {
    return runtime::TimePoint{std::chrono::steady_clock::now().time_since_epoch().count()};
  }
};

}  // namespace moebius::services
