// Speed of the CPU kernels against what the machine can do. One-row operations are bound by memory:
// their figure is bytes of weights a second, and of_read_probe sets it against a plain read of
// memory measured in the same run. Batches are bound by arithmetic: GFLOP/s.
//
//   kernels_cpu_bench [--benchmark_filter=...]     MOEBIUS_BENCH_TARGET=avx2|avx512|portable
//
// Shapes are DeepSeek-V3's. Weights are larger than the caches unless a name says otherwise.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "base/prng.h"
#include "benchmark/benchmark.h"
#include "kernels/cpu/cpu_backend.h"

namespace moebius::kernels::cpu {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

CpuTarget Target() {
  const char* name = std::getenv("MOEBIUS_BENCH_TARGET");
  for (const CpuTarget target : SupportedTargets()) {
    if (name != nullptr && std::string_view(Name(target)) == name) return target;
  }
  return BestTarget();
}

// Random codes or BF16 values of magnitude about 1; NaN codes and infinities excluded.
class Weights {
 public:
  Weights(DType dtype, int64_t rows, int64_t cols) {
    view_ = {dtype, rows, cols, nullptr, nullptr};
    data_.resize(static_cast<size_t>(view_.bytes()) / sizeof(uint64_t) + 1);
    Prng prng(1);
    const uint64_t mask = dtype == DType::kE4m3 ? 0xBFBFBFBFBFBFBFBFull : 0xBFFFBFFFBFFFBFFFull;
    for (uint64_t& word : data_) word = prng.Next() & mask;
    view_.data = reinterpret_cast<const std::byte*>(data_.data());
    if (dtype == DType::kE4m3) {
      scales_.assign(static_cast<size_t>(CeilDiv(rows, kQuantBlock) * CeilDiv(cols, kQuantBlock)),
                     0.01f);
      view_.scale_inv = scales_.data();
    }
  }
  const MatrixView& view() const { return view_; }

 private:
  MatrixView view_;
  std::vector<uint64_t> data_;
  std::vector<float> scales_;
};

std::vector<Bf16> Activations(int64_t count) {
  Prng prng(2);
  std::vector<Bf16> out(static_cast<size_t>(count));
  for (Bf16& value : out) value = ToBf16(prng.Unit() - 0.5f);
  return out;
}

// Best rate over a few rounds of reading 512 MiB with `threads` threads, each its own part.
double MeasureReadBandwidth(int threads) {
  constexpr int64_t kWords = int64_t{1} << 26;
  const std::vector<uint64_t> data(kWords, 1);
  ThreadPool pool(threads);
  double best = 0;
  for (int round = 0; round < 6; ++round) {
    std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);
    const Clock::time_point start = Clock::now();
    pool.Run(kWords, true, [&](int64_t begin, int64_t end, int thread) {
      uint64_t sum[8] = {};
      for (int64_t i = begin; i + 8 <= end; i += 8) {
        for (int j = 0; j < 8; ++j) sum[j] += data[i + j];
      }
      for (int j = 0; j < 8; ++j) sums[thread * 8] += sum[j];
    });
    const double rate = static_cast<double>(kWords) * 8 / Seconds(Clock::now() - start) / 1e9;
    benchmark::DoNotOptimize(sums.data());
    best = std::max(best, rate);
  }
  return best;
}

double ReadProbe(int threads) {
  static std::map<int, double> measured;
  auto [it, is_new] = measured.try_emplace(threads, 0.0);
  if (is_new) it->second = MeasureReadBandwidth(threads);
  return it->second;
}

std::unique_ptr<CpuBackend> MakeBackend(int threads) {
  return *CpuBackend::Create({.num_threads = threads, .target = Target()});
}

void Report(benchmark::State& state, int threads, double weight_bytes, double multiply_adds) {
  using benchmark::Counter;
  const double runs = static_cast<double>(state.iterations());
  state.counters["GB/s"] = Counter(weight_bytes * runs / 1e9, Counter::kIsRate);
  state.counters["GFLOP/s"] = Counter(2 * multiply_adds * runs / 1e9, Counter::kIsRate);
  state.counters["of_read_probe"] =
      Counter(weight_bytes * runs / 1e9 / ReadProbe(threads), Counter::kIsRate);
}

// Args: m, dtype, threads. Dense up-projection [18432, 7168]: 132 MB in FP8.
void BM_Linear(benchmark::State& state) {
  const int64_t m = state.range(0);
  const DType dtype = static_cast<DType>(state.range(1));
  const int threads = static_cast<int>(state.range(2));
  constexpr int64_t kCols = 7168;
  const int64_t rows = dtype == DType::kE4m3 ? 18432 : 9216;
  const Weights weights(dtype, rows, kCols);
  const std::vector<Bf16> x = Activations(m * kCols);
  std::vector<Bf16> out(static_cast<size_t>(m * rows));
  const auto backend = MakeBackend(threads);
  for (auto _ : state) {
    CHECK(backend
              ->Linear({.m = m,
                        .weight = weights.view(),
                        .x = x.data(),
                        .x_stride = kCols,
                        .out_bf16 = out.data(),
                        .out_stride = rows})
              .ok());
  }
  state.SetLabel(Name(dtype));
  Report(state, threads, static_cast<double>(weights.view().bytes()),
         static_cast<double>(m * rows * kCols));
}
BENCHMARK(BM_Linear)
    ->ArgNames({"m", "dtype", "threads"})
    ->ArgsProduct({{1, 16, 64}, {int(DType::kBf16), int(DType::kE4m3)}, {1, 2}})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// Args: rows per expert, threads. Four experts of [2048, 7168]: 176 MB.
void BM_ExpertFfn(benchmark::State& state) {
  const int64_t rows = state.range(0);
  const int threads = static_cast<int>(state.range(1));
  constexpr int64_t kHidden = 7168, kInner = 2048, kExperts = 4;
  std::vector<std::unique_ptr<Weights>> weights;
  std::vector<ExpertGroup> groups;
  double bytes = 0;
  for (int64_t e = 0; e < kExperts; ++e) {
    for (int part = 0; part < 3; ++part) {
      weights.push_back(std::make_unique<Weights>(DType::kE4m3, part < 2 ? kInner : kHidden,
                                                  part < 2 ? kHidden : kInner));
      bytes += static_cast<double>(weights.back()->view().bytes());
    }
    groups.push_back(
        {e * rows,
         (e + 1) * rows,
         {weights[e * 3]->view(), weights[e * 3 + 1]->view(), weights[e * 3 + 2]->view()}});
  }
  const int64_t m = rows * kExperts;
  const auto backend = MakeBackend(threads);
  const std::vector<Bf16> x = Activations(m * kHidden);
  std::vector<E4m3> codes(x.size());
  std::vector<float> scales(static_cast<size_t>(m * CeilDiv(kHidden, kQuantBlock)));
  std::vector<Bf16> out(x.size());
  for (auto _ : state) {
    CHECK(backend
              ->QuantizeRows({.m = m,
                              .dim = kHidden,
                              .x = x.data(),
                              .codes = codes.data(),
                              .scales = scales.data()})
              .ok());
    CHECK(backend
              ->ExpertFfn({.hidden = kHidden,
                           .intermediate = kInner,
                           .groups = groups.data(),
                           .num_groups = kExperts,
                           .m = m,
                           .x_codes = codes.data(),
                           .x_scales = scales.data(),
                           .out = out.data()})
              .ok());
  }
  Report(state, threads, bytes, static_cast<double>(m * kHidden * kInner * 3));
}
BENCHMARK(BM_ExpertFfn)
    ->ArgNames({"rows", "threads"})
    ->ArgsProduct({{1, 16}, {1, 2}})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// Args: context, query rows (of different sequences), threads. 128 heads of V3; GB/s counts kv_b
// and each row's cache once.
void BM_AttentionDecode(benchmark::State& state) {
  const int64_t context = state.range(0), m = state.range(1);
  const int threads = static_cast<int>(state.range(2));
  const MlaDims dims{.num_heads = 128,
                     .qk_nope_head_dim = 128,
                     .qk_rope_head_dim = 64,
                     .v_head_dim = 128,
                     .kv_lora_rank = 512};
  const Weights kv_b(DType::kE4m3, dims.num_heads * 256, dims.kv_lora_rank);
  const int64_t blocks = CeilDiv(context, kCacheBlockTokens);
  const std::vector<Bf16> cache = Activations(m * blocks * kCacheBlockTokens * dims.latent_dim());
  std::vector<int32_t> tables(static_cast<size_t>(m * blocks));
  for (size_t i = 0; i < tables.size(); ++i) tables[i] = static_cast<int32_t>(i);
  std::vector<SequenceRow> rows(static_cast<size_t>(m));
  for (int64_t i = 0; i < m; ++i) {
    rows[i] = {static_cast<int32_t>(context - 1), &tables[i * blocks]};
  }
  const std::vector<Bf16> q = Activations(m * dims.num_heads * dims.q_head_dim());
  std::vector<Bf16> out(static_cast<size_t>(m * dims.num_heads * dims.v_head_dim));
  const auto backend = MakeBackend(threads);
  for (auto _ : state) {
    CHECK(backend
              ->MlaAttention({.m = m,
                              .dims = dims,
                              .q = q.data(),
                              .kv_b = kv_b.view(),
                              .softmax_scale = 0.135f,
                              .rows = rows.data(),
                              .cache = cache.data(),
                              .out = out.data()})
              .ok());
  }
  const int64_t cache_bytes = m * context * dims.latent_dim() * 2;
  const int64_t per_head =
      256 * dims.kv_lora_rank + context * (dims.latent_dim() + dims.kv_lora_rank);
  Report(state, threads, static_cast<double>(kv_b.view().bytes() + cache_bytes),
         static_cast<double>(m * dims.num_heads * per_head));
}
BENCHMARK(BM_AttentionDecode)
    ->ArgNames({"context", "m", "threads"})
    ->ArgsProduct({{1, 1024, 4096}, {1}, {1, 2}})
    ->Args({1024, 8, 2})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace moebius::kernels::cpu

int main(int argc, char** argv) {
  using namespace moebius::kernels::cpu;
  benchmark::Initialize(&argc, argv);
  std::printf("target %s; memory read probe: %.1f GB/s on 1 thread, %.1f GB/s on 2\n",
              Name(Target()), ReadProbe(1), ReadProbe(2));
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
