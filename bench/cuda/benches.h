#pragma once

// Every benchmark of kernels/cuda, a file each: measures its shapes and adds its rows.

#include "bench/cuda/report.h"

namespace moebius::bench {

void BenchBf16Linear(Report& report);
void BenchExpertFfn(Report& report);
void BenchChoose(Report& report);
void BenchFp8Linear(Report& report);
void BenchMlaAttention(Report& report);
void BenchRmsNorm(Report& report);
void BenchQuantizeRows(Report& report);
void BenchCombine(Report& report);
void BenchRopeAndCache(Report& report);
void BenchSwiGlu(Report& report);
void BenchResidual(Report& report);
void BenchEmbedding(Report& report);
void BenchRowDigest(Report& report);
void BenchDequantizeWeight(Report& report);

}  // namespace moebius::bench
