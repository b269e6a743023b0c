#pragma once

// Every benchmark of kernels/cuda, a file each: measures its shapes and adds its rows.

#include "bench/cuda/report.h"

namespace moebius::bench {

void BenchChoose(Report& report);
void BenchFp8Linear(Report& report);

}  // namespace moebius::bench
