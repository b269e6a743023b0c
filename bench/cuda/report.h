#pragma once

// The table of a benchmark run: one row a kernel and shape, printed as it is measured and written
// as JSON with the device, the date, the command and the hash of kernels/cuda.

#include <cstdint>
#include <string>
#include <vector>

#include "bench/cuda/measure.h"

namespace moebius::bench {

// What the tensor cores of an H200 reach on random data: dense BF16 as measured on 8192-cubed
// products, FP8 the best published for Hopper. Floors use them; they are no promise.
inline constexpr double kBf16FlopRate = 790e12;
inline constexpr double kFp8FlopRate = 1500e12;

struct Row {
  std::string kernel;  // "mla_decode"
  std::string shape;   // "128 heads, B=128, S=4096, 1 query"
  Timing timing;
  double bytes = 0;      // read and written once each
  double flops = 0;      // 0: not counted
  double flop_rate = 0;  // flops a second of the unit that does them
  double must_us = 0;    // the project's own bars; 0: none
  double aim_us = 0;
  std::string peer;  // what others reach at this shape, and who
};

// What tests of the same build did before, names separated by spaces.
struct TestResults {
  std::string passed, failed;
  std::string sanitized;  // tool:test, for each that compute-sanitizer found clean
};

class Report {
 public:
  // `read_bandwidth`: GB/s of this run's probe.
  explicit Report(double read_bandwidth);

  // max(bytes / read bandwidth, flops / flop_rate), microseconds.
  double FloorUs(const Row& row) const;
  // Prints the row and keeps it.
  void Add(Row row);

  // Errors are fatal, as everywhere in benchmarks.
  void WriteJson(const std::string& path, const std::string& command,
                 const TestResults& tests) const;
  // How many rows with a must are above it.
  int MissedMusts() const;

 private:
  double read_bandwidth_;
  std::vector<Row> rows_;
};

}  // namespace moebius::bench
