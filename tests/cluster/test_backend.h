#pragma once

// The Backend that tests of whole workers compute with.

#include <memory>

#include "kernels/backend.h"

namespace moebius::cluster_test {

// A fresh instance; all instances give equal bits. Use all of them from one thread, on models that
// live as long as the process.
std::unique_ptr<kernels::Backend> MakeTestBackend();

}  // namespace moebius::cluster_test
