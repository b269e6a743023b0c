// Feeds arbitrary text to the parser of cluster.json. What is accepted survives being written again
// and names no process that a signal must not reach.

#include <cstdint>

#include "base/check.h"
#include "services/cli/cluster_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto cluster = moebius::services::ParseClusterFile(text);
  if (!cluster.ok()) return 0;
  for (const auto& process : cluster->processes) CHECK(process.pid >= 0);
  const auto again = moebius::services::ParseClusterFile(WriteClusterFile(*cluster));
  CHECK(again.ok());
  CHECK(*again == *cluster);
  return 0;
}
