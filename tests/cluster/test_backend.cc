#include "tests/cluster/test_backend.h"

#include "tests/cluster/scalar_backend.h"

namespace moebius::cluster_test {

std::unique_ptr<kernels::Backend> MakeTestBackend() {
  static const auto* weights = new std::shared_ptr<DecodedWeights>(new DecodedWeights);
  return std::make_unique<ScalarBackend>(*weights);
}

}  // namespace moebius::cluster_test
