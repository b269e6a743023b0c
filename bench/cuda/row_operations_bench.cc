// Operations on rows at DeepSeek-V3's shapes: hidden 7,168, 128 heads, top 8 of 256 experts. Inputs
// and outputs rotate past L2, though in a layer the kernel in front leaves most of them there.

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/prng.h"
#include "bench/cuda/benches.h"
#include "kernels/cuda/combine/combine.h"
#include "kernels/cuda/dequantize_weight/dequantize_weight.h"
#include "kernels/cuda/embedding/embedding.h"
#include "kernels/cuda/quantize_rows/quantize_rows.h"
#include "kernels/cuda/residual/residual.h"
#include "kernels/cuda/rms_norm/rms_norm.h"
#include "kernels/cuda/rope_and_cache/rope_and_cache.h"
#include "kernels/cuda/row_digest/row_digest.h"
#include "kernels/cuda/swiglu/swiglu.h"

namespace moebius::bench {
namespace {

namespace cuda = kernels::cuda;

constexpr int64_t kHidden = 7168;
constexpr int64_t kTopK = 8;
constexpr int64_t kRows[] = {1, 128, 4096};

int64_t Blocks(int64_t dim) { return (dim + 127) / 128; }

template <typename T>
DeviceArray<T> OnDevice(const std::vector<T>& host) {
  DeviceArray<T> array(static_cast<int64_t>(host.size()));
  array.Upload(host.data());
  return array;
}

// Sets of buffers of `bytes` to rotate through. Few rows are a matter of latency: no more than 256.
int Copies(double bytes) { return std::min(256, CopiesPastL2(static_cast<int64_t>(bytes))); }

// Times launch(copy) for copies 0 .. Copies(bytes) - 1 in turn and reports it.
template <typename Launch>
void Measure(Report& report, const char* kernel, const std::string& shape, double bytes,
             const Launch& launch, double aim_us = 0, const std::string& peer = "") {
  const int copies = Copies(bytes);
  Row row;
  row.kernel = kernel;
  row.shape = shape;
  row.bytes = bytes;
  row.aim_us = aim_us;
  row.peer = peer;
  row.timing = TimeGraph(std::max(copies, 32),
                         [&](int i, cudaStream_t stream) { return launch(i % copies, stream); });
  report.Add(row);
}

struct Norm {
  const char* name;
  int64_t dim, stride;
  bool add, shared, out, codes;
};

void MeasureNorm(Report& report, const Norm& n, int64_t m) {
  const double row_bytes =
      2.0 * n.dim * (1 + 2 * n.add + n.shared + n.out) + n.codes * (n.dim + 4.0 * Blocks(n.dim));
  const double bytes = static_cast<double>(m) * row_bytes + 4.0 * n.dim;
  const int64_t copies = Copies(bytes), size = m * n.dim;
  const DeviceArray<Bf16> x = RandomBf16(copies * m * n.stride, 1);
  const DeviceArray<Bf16> add = RandomBf16(n.add ? copies * size : 1, 2);
  const DeviceArray<Bf16> shared = RandomBf16(n.shared ? copies * size : 1, 3);
  const DeviceArray<Bf16> sum(n.add ? copies * size : 1), out(n.out ? copies * size : 1);
  const DeviceArray<float> weight = RandomFloats(n.dim, 4);
  const DeviceArray<E4m3> codes(n.codes ? copies * size : 1);
  const DeviceArray<float> scales(copies * m * Blocks(n.dim));
  Measure(report, "rms_norm", absl::StrCat(n.name, " ", n.dim, ", M=", m), bytes,
          [&](int64_t i, cudaStream_t stream) {
            cuda::RmsNormParams p;
            p.m = m;
            p.dim = n.dim;
            p.x = x.get() + i * m * n.stride;
            p.x_stride = n.stride;
            if (n.add) {
              p.add = add.get() + i * size;
              p.sum = sum.get() + i * size;
            }
            if (n.shared) p.add_shared = shared.get() + i * size;
            p.weight = weight.get();
            if (n.out) p.out = out.get() + i * size;
            p.out_stride = n.dim;
            if (n.codes) p.codes = codes.get() + i * size;
            p.scales = scales.get() + i * m * Blocks(n.dim);
            return cuda::LaunchRmsNorm(p, stream);
          });
}

void MeasureQuantize(Report& report, int64_t m) {
  const double bytes = static_cast<double>(m) * (3.0 * kHidden + 4.0 * Blocks(kHidden));
  const int64_t copies = Copies(bytes), size = m * kHidden;
  const DeviceArray<Bf16> x = RandomBf16(copies * size, 1);
  const DeviceArray<E4m3> codes(copies * size);
  const DeviceArray<float> scales(copies * m * Blocks(kHidden));
  Measure(report, "quantize_rows", absl::StrCat(kHidden, ", M=", m), bytes,
          [&](int64_t i, cudaStream_t stream) {
            cuda::QuantizeRowsParams p;
            p.m = m;
            p.dim = p.x_stride = kHidden;
            p.x = x.get() + i * size;
            p.codes = codes.get() + i * size;
            p.scales = scales.get() + i * m * Blocks(kHidden);
            return cuda::LaunchQuantizeRows(p, stream);
          });
}

// Every token goes to eight of 32 destinations.
void MeasureDispatch(Report& report, int64_t m) {
  constexpr int kTargets = 32;
  const int64_t blocks = Blocks(kHidden);
  const double row_bytes = 2.0 * kHidden + kTopK * (kHidden + 4.0 * blocks + 16);
  const double bytes = static_cast<double>(m) * row_bytes;
  const int64_t copies = Copies(bytes);
  std::vector<int32_t> begin = {0}, filled(kTargets, 0);
  std::vector<std::pair<int32_t, int32_t>> places;  // target and row there
  Prng random(5);
  for (int64_t row = 0; row < m; ++row) {
    const auto first = static_cast<int32_t>(random.Below(kTargets));
    for (int32_t j = 0; j < kTopK; ++j) {
      const int32_t target = (first + 5 * j) % kTargets;
      places.push_back({target, filled[static_cast<size_t>(target)]++});
    }
    begin.push_back(static_cast<int32_t>(places.size()));
  }
  const DeviceArray<Bf16> x = RandomBf16(copies * m * kHidden, 1);
  const DeviceArray<E4m3> codes(copies * kTopK * m * kHidden);
  const DeviceArray<float> scales(copies * kTopK * m * blocks);
  std::vector<int64_t> first_row = {0};
  for (const int32_t rows : filled) first_row.push_back(first_row.back() + rows);
  std::vector<cuda::RowCopy> row_copies;
  for (int64_t copy = 0; copy < copies; ++copy) {
    for (const auto& [target, place] : places) {
      const int64_t row = copy * kTopK * m + first_row[static_cast<size_t>(target)] + place;
      row_copies.push_back({codes.get() + row * kHidden, scales.get() + row * blocks});
    }
  }
  const auto device_begin = OnDevice(begin);
  const auto device_copies = OnDevice(row_copies);
  Measure(
      report, "dispatch_rows", absl::StrCat(kHidden, " to 8 of 32 targets, M=", m), bytes,
      [&](int64_t i, cudaStream_t stream) {
        cuda::DispatchRowsParams p;
        p.m = m;
        p.dim = p.x_stride = kHidden;
        p.x = x.get() + i * m * kHidden;
        p.copy_begin = device_begin.get();
        p.copies = device_copies.get() + i * kTopK * m;
        return cuda::LaunchDispatchRows(p, stream);
      },
      m == 128 ? 4 : 0, m == 128 ? "good 6, excellent 4" : "");
}

// Which rows each of m tokens sums: eight, of two experts in each of four groups.
struct Choices {
  explicit Choices(int64_t tokens) : m(tokens) {
    std::vector<ExpertId> chosen;
    std::vector<int32_t> order(static_cast<size_t>(kTopK * m));
    Prng random(6);
    for (int64_t i = 0; i < m; ++i) {
      for (uint32_t j = 0; j < kTopK; j += 2) {
        const auto group = static_cast<uint32_t>(random.Below(2)) + j;
        chosen.push_back(ExpertId(32 * group + 3));
        chosen.push_back(ExpertId(32 * group + 19));
      }
    }
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.Below(i)]);
    experts.Upload(chosen.data());
    index.Upload(order.data());
  }
  cuda::CombineParams Params() const {
    cuda::CombineParams p;
    p.m = m;
    p.dim = kHidden;
    p.top_k = kTopK;
    p.experts = experts.get();
    p.weights = weights.get();
    p.row_index = index.get();
    return p;
  }
  int64_t m;
  DeviceArray<ExpertId> experts = DeviceArray<ExpertId>(kTopK * m);
  DeviceArray<int32_t> index = DeviceArray<int32_t>(kTopK * m);
  DeviceArray<float> weights = RandomScales(kTopK * m, 7, 0.3f);
};

void MeasureCombine(Report& report, int64_t m, bool residual) {
  const double bytes =
      static_cast<double>(m) * (2.0 * kHidden * (kTopK + (residual ? 3 : 1)) + kTopK * 12.0);
  const int64_t copies = Copies(bytes), size = m * kHidden;
  const DeviceArray<Bf16> rows = RandomBf16(copies * kTopK * size, 1);
  const DeviceArray<Bf16> shared = RandomBf16(copies * size, 2), h = RandomBf16(copies * size, 3);
  const DeviceArray<Bf16> out(copies * size);
  const Choices choices(m);
  Measure(
      report, "combine",
      absl::StrCat(kHidden, " x 8 rows", residual ? ", residual" : "", ", M=", m), bytes,
      [&](int64_t i, cudaStream_t stream) {
        cuda::CombineParams p = choices.Params();
        p.buffer = rows.get() + i * kTopK * size;
        if (residual) {
          p.shared = shared.get() + i * size;
          p.h = h.get() + i * size;
        } else {
          p.out = out.get() + i * size;
        }
        return cuda::LaunchCombine(p, stream);
      },
      m == 128 && !residual ? 5 : 0, m == 128 && !residual ? "good 7, excellent 5" : "");
}

void MeasureRope(Report& report, int64_t m, int64_t heads) {
  kernels::MlaDims dims;
  dims.num_heads = heads;
  dims.qk_nope_head_dim = 128;
  dims.qk_rope_head_dim = 64;
  dims.v_head_dim = 128;
  dims.kv_lora_rank = 512;
  constexpr int64_t kPositions = 8192, kKvStride = 2112;
  const int64_t q_size = m * heads * dims.q_head_dim();
  const int64_t absorbed_size = m * heads * dims.latent_dim();
  const double bytes =
      static_cast<double>(m) * (4.0 * 64 * static_cast<double>(heads) + 4.0 * 576 + 256 + 16 + 4);
  // Rows of q and q_absorbed are strided: a few copies of them already exceed L2.
  const int64_t copies =
      std::min<int64_t>(Copies(bytes), std::max<int64_t>(8, 1'000'000'000 / absorbed_size));
  const DeviceArray<Bf16> q = RandomBf16(copies * q_size, 1);
  const DeviceArray<Bf16> absorbed(copies * absorbed_size);
  const DeviceArray<Bf16> kv = RandomBf16(copies * m * kKvStride, 2);
  const DeviceArray<float> kv_norm = RandomFloats(512, 3),
                           cos_sin = RandomFloats(kPositions * 64, 4);
  const DeviceArray<Bf16> cache(copies * m * 64 * 576);
  std::vector<int32_t> tables(static_cast<size_t>(m) * (kPositions / 64), 0);
  std::vector<int32_t> positions;
  Prng random(5);
  for (int64_t i = 0; i < m; ++i) {
    positions.push_back(static_cast<int32_t>(random.Below(kPositions)));
    tables[static_cast<size_t>(i * (kPositions / 64) + positions.back() / 64)] =
        static_cast<int32_t>(i);
  }
  const auto device_tables = OnDevice(tables);
  std::vector<kernels::SequenceRow> rows;
  for (int64_t i = 0; i < m; ++i) {
    rows.push_back(
        {positions[static_cast<size_t>(i)], device_tables.get() + i * (kPositions / 64)});
  }
  const auto device_rows = OnDevice(rows);
  Measure(report, "rope_and_cache", absl::StrCat(heads, " heads, M=", m), bytes,
          [&](int64_t i, cudaStream_t stream) {
            i %= copies;
            cuda::RopeAndCacheParams p;
            p.m = m;
            p.dims = dims;
            p.q = q.get() + i * q_size;
            p.q_absorbed = absorbed.get() + i * absorbed_size;
            p.kv = kv.get() + i * m * kKvStride;
            p.kv_stride = kKvStride;
            p.kv_norm = kv_norm.get();
            p.cos_sin = cos_sin.get();
            p.rows = device_rows.get();
            p.cache = cache.get() + i * m * 64 * 576;
            return cuda::LaunchRopeAndCache(p, stream);
          });
}

void MeasureSwiGlu(Report& report, int64_t m, int64_t dim) {
  const double bytes = static_cast<double>(m) *
                       (5.0 * static_cast<double>(dim) + 4.0 * static_cast<double>(Blocks(dim)));
  const int64_t copies = Copies(bytes), size = m * dim;
  const DeviceArray<Bf16> in = RandomBf16(copies * 2 * size, 1, 2.0f);
  const DeviceArray<E4m3> codes(copies * size);
  const DeviceArray<float> scales(copies * m * Blocks(dim));
  Measure(report, "swiglu", absl::StrCat(dim, " and quantise, M=", m), bytes,
          [&](int64_t i, cudaStream_t stream) {
            cuda::SwiGluParams p;
            p.m = m;
            p.dim = dim;
            p.gate = in.get() + i * 2 * size;
            p.up = p.gate + dim;
            p.in_stride = 2 * dim;
            p.codes = codes.get() + i * size;
            p.scales = scales.get() + i * m * Blocks(dim);
            return cuda::LaunchSwiGlu(p, stream);
          });
}

void MeasureResidual(Report& report, int64_t m, bool moe) {
  const double bytes = static_cast<double>(m) * 2.0 * kHidden * (moe ? 4 : 3);
  const int64_t copies = Copies(bytes), size = m * kHidden;
  const DeviceArray<Bf16> h = RandomBf16(copies * size, 1), y = RandomBf16(copies * size, 2);
  const DeviceArray<Bf16> shared = RandomBf16(moe ? copies * size : 1, 3);
  Measure(report, "residual", absl::StrCat(moe ? "MoE, " : "", kHidden, ", M=", m), bytes,
          [&](int64_t i, cudaStream_t stream) {
            cuda::ResidualParams p;
            p.m = m;
            p.dim = kHidden;
            p.h = h.get() + i * size;
            p.y = y.get() + i * size;
            if (moe) p.shared = shared.get() + i * size;
            return cuda::LaunchResidual(p, stream);
          });
}

void MeasureEmbedding(Report& report, int64_t m) {
  constexpr int64_t kVocab = 129280;
  const double bytes = static_cast<double>(m) * (4.0 * kHidden + 4);
  const int64_t copies = Copies(bytes);
  const DeviceArray<Bf16> table = RandomBf16(kVocab * kHidden, 1);
  const DeviceArray<Bf16> out(copies * m * kHidden);
  std::vector<TokenId> ids;
  Prng random(2);
  for (int64_t i = 0; i < copies * m; ++i)
    ids.push_back(static_cast<TokenId>(random.Below(kVocab)));
  const auto device_ids = OnDevice(ids);
  Measure(report, "embedding", absl::StrCat(kHidden, ", M=", m), bytes,
          [&](int64_t i, cudaStream_t stream) {
            cuda::EmbeddingParams p;
            p.m = m;
            p.vocab = kVocab;
            p.dim = kHidden;
            p.table = table.get();
            p.ids = device_ids.get() + i * m;
            p.out = out.get() + i * m * kHidden;
            return cuda::LaunchEmbedding(p, stream);
          });
}

void MeasureDigest(Report& report, int64_t m) {
  const double bytes = static_cast<double>(m) * (2.0 * kHidden + 12);
  const int64_t copies = Copies(bytes);
  const DeviceArray<Bf16> hidden = RandomBf16(copies * m * kHidden, 1);
  const DeviceArray<float> logprobs = RandomFloats(m, 2);
  const DeviceArray<uint64_t> digests(copies * m);
  Measure(report, "row_digest", absl::StrCat(kHidden, ", M=", m), bytes,
          [&](int64_t i, cudaStream_t stream) {
            cuda::RowDigestParams p;
            p.m = m;
            p.dim = p.hidden_stride = kHidden;
            p.hidden = hidden.get() + i * m * kHidden;
            p.logprobs = logprobs.get();
            p.digests = digests.get() + i * m;
            return cuda::LaunchRowDigest(p, stream);
          });
}

void MeasureDequantize(Report& report, const char* name, int64_t n, int64_t k) {
  const int64_t size = n * k, scale_count = Blocks(n) * Blocks(k);
  const double bytes = 3.0 * static_cast<double>(size) + 4.0 * static_cast<double>(scale_count);
  const int64_t copies = Copies(bytes);
  const DeviceArray<E4m3> weight = RandomE4m3(copies * size, 1);
  const DeviceArray<float> scales = RandomScales(scale_count, 2, 0.01f);
  const DeviceArray<Bf16> out(copies * size);
  Measure(report, "dequantize_weight", absl::StrCat(name, " ", n, " x ", k), bytes,
          [&](int64_t i, cudaStream_t stream) {
            cuda::DequantizeWeightParams p;
            p.n = n;
            p.k = k;
            p.weight = weight.get() + i * size;
            p.weight_scales = scales.get();
            p.out = out.get() + i * size;
            return cuda::LaunchDequantizeWeight(p, stream);
          });
}

}  // namespace

void BenchRmsNorm(Report& report) {
  for (const Norm& n :
       {Norm{"to bf16", kHidden, kHidden, false, false, true, false},
        Norm{"residual, to bf16 and codes", kHidden, kHidden, true, false, true, true},
        Norm{"MoE residual, to codes", kHidden, kHidden, true, true, false, true},
        Norm{"of q_a, to codes", 1536, 2112, false, false, false, true}}) {
    for (const int64_t m : kRows) MeasureNorm(report, n, m);
  }
}

void BenchQuantizeRows(Report& report) {
  for (const int64_t m : kRows) MeasureQuantize(report, m);
  for (const int64_t m : kRows) MeasureDispatch(report, m);
}

void BenchCombine(Report& report) {
  for (const bool residual : {false, true}) {
    for (const int64_t m : kRows) MeasureCombine(report, m, residual);
  }
}

void BenchRopeAndCache(Report& report) {
  for (const int64_t m : kRows) MeasureRope(report, m, 128);
  MeasureRope(report, 128, 16);
}

void BenchSwiGlu(Report& report) {
  for (const int64_t m : kRows) MeasureSwiGlu(report, m, 2048);
  MeasureSwiGlu(report, 128, 18432);
}

void BenchResidual(Report& report) {
  for (const bool moe : {false, true}) {
    for (const int64_t m : kRows) MeasureResidual(report, m, moe);
  }
}

void BenchEmbedding(Report& report) {
  for (const int64_t m : kRows) MeasureEmbedding(report, m);
}

void BenchRowDigest(Report& report) {
  for (const int64_t m : kRows) MeasureDigest(report, m);
}

void BenchDequantizeWeight(Report& report) { MeasureDequantize(report, "kv_b", 32768, 512); }

}  // namespace moebius::bench
