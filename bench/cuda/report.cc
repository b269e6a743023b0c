#include "bench/cuda/report.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_split.h"

namespace moebius::bench {
namespace {

std::string Today() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%d", std::gmtime(&now));
  return text;
}

// Three significant digits: more would pretend.
double Rounded(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", value);
  return std::strtod(text, nullptr);
}

}  // namespace

Report::Report(double read_bandwidth) : read_bandwidth_(read_bandwidth) {
  std::printf("read bandwidth of this run: %.0f GB/s\n", read_bandwidth);
  std::printf("%-14s %-44s %9s %19s %8s %6s %7s %8s %7s %7s  %s\n", "kernel", "shape", "us",
              "(min .. max)", "floor", "ratio", "GB/s", "TFLOP/s", "must", "aim", "others");
}

double Report::FloorUs(const Row& row) const {
  const double memory = row.bytes / read_bandwidth_ * 1e-3;
  return row.flop_rate > 0 ? std::max(memory, row.flops / row.flop_rate * 1e6) : memory;
}

void Report::Add(Row row) {
  const double us = row.timing.us, floor = FloorUs(row);
  const auto bar = [](double value) {
    char text[16] = "-";
    if (value > 0) std::snprintf(text, sizeof text, "%.1f", value);
    return std::string(text);
  };
  std::printf("%-14s %-44s %9.2f (%7.2f .. %6.2f) %8.2f %6.2f %7.0f %8.1f %7s %7s  %s%s\n",
              row.kernel.c_str(), row.shape.c_str(), us, row.timing.us_min, row.timing.us_max,
              floor, us / floor, row.bytes / us * 1e-3, row.flops / us * 1e-6,
              bar(row.must_us).c_str(), bar(row.aim_us).c_str(), row.peer.c_str(),
              row.must_us > 0 && us > row.must_us ? "  MISSED" : "");
  std::fflush(stdout);
  rows_.push_back(std::move(row));
}

int Report::MissedMusts() const {
  return static_cast<int>(std::count_if(rows_.begin(), rows_.end(), [](const Row& row) {
    return row.must_us > 0 && row.timing.us > row.must_us;
  }));
}

void Report::WriteJson(const std::string& path, const std::string& command,
                       const TestResults& tests) const {
  int driver = 0;
  cudaDeviceProp device;
  CheckCuda(cudaGetDeviceProperties(&device, 0), "device");
  CheckCuda(cudaDriverGetVersion(&driver), "driver");
  nlohmann::ordered_json json;
  json["date"] = Today();
  json["device"] = device.name;
  json["cuda_driver"] = driver;
  json["command"] = command;
  json["kernels_cuda_hash"] = MOEBIUS_CUDA_HASH;
  json["read_bandwidth_gb_s"] = Rounded(read_bandwidth_);
  for (const auto& [key, names] :
       {std::pair<const char*, const std::string&>{"tests_passed", tests.passed},
        {"tests_failed", tests.failed},
        {"sanitized", tests.sanitized}}) {
    json[key] = std::vector<std::string>(absl::StrSplit(names, ' ', absl::SkipEmpty()));
  }
  for (const Row& row : rows_) {
    nlohmann::ordered_json out;
    out["kernel"] = row.kernel;
    out["shape"] = row.shape;
    out["us"] = Rounded(row.timing.us);
    out["us_min"] = Rounded(row.timing.us_min);
    out["us_max"] = Rounded(row.timing.us_max);
    out["floor_us"] = Rounded(FloorUs(row));
    out["gb_s"] = Rounded(row.bytes / row.timing.us * 1e-3);
    if (row.flops > 0) out["tflop_s"] = Rounded(row.flops / row.timing.us * 1e-6);
    if (row.must_us > 0) out["must_us"] = row.must_us;
    if (row.aim_us > 0) out["aim_us"] = row.aim_us;
    if (!row.peer.empty()) out["others"] = row.peer;
    json["rows"].push_back(out);
  }
  std::ofstream file(path);
  file << json.dump(1) << "\n";
  if (!file.flush()) {
    std::fprintf(stderr, "cannot write %s\n", path.c_str());
    std::exit(1);
  }
}

}  // namespace moebius::bench
