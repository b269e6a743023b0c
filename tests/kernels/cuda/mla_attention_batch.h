#pragma once

// Paged caches, queries and calls for tests of the MLA core.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/cuda/mla_attention/mla_attention.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/kernels/cuda/slow_copy.h"

namespace moebius::kernels::cuda {

inline constexpr int64_t kRank = kMlaLatentRank, kDim = kMlaLatentDim;
inline constexpr float kScale = 0.0721688f;  // 192^-1/2

// Sequences in one paged cache, blocks shuffled; what no position uses is NaN.
class Cache {
 public:
  // `contexts`: positions of each sequence that exist. `seed` decides contents, `order` the blocks.
  Cache(const std::vector<int64_t>& contexts, uint64_t seed, uint64_t order) {
    Prng random(order);
    for (const int64_t context : contexts) {
      max_blocks_ = std::max(max_blocks_, (context + 63) / 64);
      num_blocks_ += (context + 63) / 64;
    }
    num_blocks_ += 3;  // some that nobody uses
    std::vector<int32_t> ids(static_cast<size_t>(num_blocks_));
    std::iota(ids.begin(), ids.end(), 0);
    for (size_t i = ids.size(); i > 1; --i) std::swap(ids[i - 1], ids[random.Below(i)]);
    values_.assign(static_cast<size_t>(num_blocks_ * 64 * kDim), ToBf16(NAN));
    tables_.assign(contexts.size() * static_cast<size_t>(max_blocks_), 0);
    size_t next = 0;
    for (size_t sequence = 0; sequence < contexts.size(); ++sequence) {
      Prng contents(seed + 1000 * sequence);
      for (int64_t t = 0; t < contexts[sequence]; ++t) {
        if (t % 64 == 0)
          tables_[sequence * static_cast<size_t>(max_blocks_) + static_cast<size_t>(t / 64)] =
              ids[next++];
        for (int64_t i = 0; i < kDim; ++i) Row(sequence, t)[i] = ToBf16(contents.Unit() * 4 - 2);
      }
    }
  }
  Bf16* Row(size_t sequence, int64_t t) {
    const int64_t block =
        tables_[sequence * static_cast<size_t>(max_blocks_) + static_cast<size_t>(t / 64)];
    return values_.data() + (block * 64 + t % 64) * kDim;
  }
  void Upload() {
    device_values_ = std::make_unique<DeviceBuffer<Bf16>>(values_);
    device_tables_ = std::make_unique<DeviceBuffer<int32_t>>(tables_);
  }
  void Fill(MlaAttentionCoreParams& params) const {
    params.cache = device_values_->get();
    params.num_blocks = num_blocks_;
    params.block_tables = device_tables_->get();
    params.max_blocks = max_blocks_;
  }

 private:
  int64_t max_blocks_ = 0, num_blocks_ = 0;
  std::vector<Bf16> values_;
  std::vector<int32_t> tables_;
  std::unique_ptr<DeviceBuffer<Bf16>> device_values_;
  std::unique_ptr<DeviceBuffer<int32_t>> device_tables_;
};

// [m, heads, 576].
inline std::vector<Bf16> RandomQueries(int64_t m, int64_t heads, uint64_t seed) {
  Prng random(seed);
  std::vector<Bf16> q(static_cast<size_t>(m * heads * kDim));
  for (Bf16& v : q) v = ToBf16(random.Unit() * 4 - 2);
  return q;
}

// Grows, and is left as earlier launches left it: its contents must not matter.
inline std::unique_ptr<DeviceBuffer<uint8_t>> workspace;
inline const DeviceBuffer<uint8_t>& Workspace(int64_t bytes) {
  if (!workspace || static_cast<int64_t>(workspace->count()) < bytes)
    workspace = std::make_unique<DeviceBuffer<uint8_t>>(static_cast<size_t>(bytes));
  return *workspace;
}

// The parameters of a call but its output, and the device memory that they name.
struct Call {
  Call(const Cache& cache, const std::vector<MlaRow>& call_rows, int64_t heads,
       const std::vector<Bf16>& queries, int64_t segment_tokens = 0)
      : q(queries),
        rows(call_rows),
        out_size(call_rows.size() * static_cast<size_t>(heads * kRank)) {
    params.m = static_cast<int64_t>(call_rows.size());
    params.num_heads = heads;
    params.q = q.get();
    params.softmax_scale = kScale;
    params.rows = rows.get();
    cache.Fill(params);
    for (const MlaRow& row : call_rows)
      params.max_context = std::max<int64_t>(params.max_context, row.position + 1);
    params.workspace_bytes =
        MlaAttentionWorkspaceBytesWithSegments(params.m, heads, params.max_context, segment_tokens);
    params.workspace = Workspace(params.workspace_bytes).get();
  }

  DeviceBuffer<Bf16> q;
  DeviceBuffer<MlaRow> rows;
  size_t out_size;  // elements
  MlaAttentionCoreParams params;
};

inline std::vector<Bf16> Attend(const Cache& cache, const std::vector<MlaRow>& rows, int64_t heads,
                                const std::vector<Bf16>& q, int64_t segment_tokens = 0,
                                bool beside_another = false) {
  Call call(cache, rows, heads, q, segment_tokens);
  const DeviceBuffer<Bf16> out(call.out_size);
  call.params.out = out.get();
  std::optional<CompetingKernel> competing;  // only now: allocating would wait for its end
  if (beside_another) competing.emplace();
  const absl::Status status = LaunchMlaAttentionWithSegments(call.params, segment_tokens, nullptr);
  EXPECT_TRUE(status.ok()) << status.ToString();
  ExpectCudaOk(cudaStreamSynchronize(nullptr), "MlaAttention");
  if (competing) {
    EXPECT_TRUE(competing->Runs());
  }
  competing.reset();
  return out.Download();
}

inline uint64_t HashOfRow(const std::vector<Bf16>& out, int64_t heads, int64_t row) {
  const auto size = static_cast<size_t>(heads * kRank);
  const auto begin = out.begin() + static_cast<int64_t>(size) * row;
  return HashOf(std::vector<Bf16>(begin, begin + static_cast<int64_t>(size)));
}

class MlaAttentionTest : public GpuTest {
 protected:
  static void TearDownTestSuite() { workspace.reset(); }  // checks its guards
};

}  // namespace moebius::kernels::cuda
