// The MLA core at DeepSeek-V3's shapes: decode with all heads of one GPU (128) or of an eighth
// (16), two queries a sequence, and a prefill chunk.

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/prng.h"
#include "bench/cuda/benches.h"
#include "kernels/cuda/mla_attention/mla_attention.h"

namespace moebius::bench {
namespace {

using kernels::cuda::MlaRow;

struct Case {
  int64_t heads, sequences, context, queries;
  double must_us, aim_us;
  const char* peer;
  int64_t max_context = 0;  // that the caller allows; 0: `context`
};

void Measure(Report& report, const Case& c, int64_t segment_tokens) {
  const int64_t m = c.sequences * c.queries, blocks = (c.context + 63) / 64;
  const int64_t block_bytes = 64 * 576 * 2;
  const int copies = CopiesPastL2(c.sequences * blocks * block_bytes);
  const int64_t num_blocks = copies * c.sequences * blocks;
  const DeviceArray<Bf16> cache = RandomBf16(num_blocks * 64 * 576, 1);
  const DeviceArray<Bf16> q = RandomBf16(m * c.heads * 576, 2);
  const DeviceArray<Bf16> out(m * c.heads * 512);
  // Pages in random order; every copy has its own.
  std::vector<int32_t> order(static_cast<size_t>(num_blocks));
  std::iota(order.begin(), order.end(), 0);
  Prng random(3);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.Below(i)]);
  const int64_t max_context = c.max_context == 0 ? c.context : c.max_context;
  const int64_t max_blocks = (max_context + 63) / 64;
  std::vector<int32_t> host_tables(static_cast<size_t>(copies * c.sequences * max_blocks));
  for (int64_t sequence = 0; sequence < copies * c.sequences; ++sequence)
    std::copy_n(order.begin() + sequence * blocks, blocks,
                host_tables.begin() + sequence * max_blocks);
  DeviceArray<int32_t> tables(static_cast<int64_t>(host_tables.size()));
  tables.Upload(host_tables.data());
  std::vector<MlaRow> rows;
  for (int64_t i = 0; i < m; ++i) {
    rows.push_back({static_cast<int32_t>(c.context - c.queries + i % c.queries),
                    static_cast<int32_t>(i / c.queries)});
  }
  DeviceArray<MlaRow> device_rows(m);
  device_rows.Upload(rows.data());
  kernels::cuda::MlaAttentionCoreParams params;
  params.m = m;
  params.num_heads = c.heads;
  params.q = q.get();
  params.softmax_scale = 0.0721688f;
  params.rows = device_rows.get();
  params.cache = cache.get();
  params.num_blocks = num_blocks;
  params.max_blocks = max_blocks;
  params.max_context = max_context;
  params.out = out.get();
  const DeviceArray<uint8_t> workspace(kernels::cuda::MlaAttentionWorkspaceBytesWithSegments(
      m, c.heads, max_context, segment_tokens));
  params.workspace = workspace.get();
  params.workspace_bytes = workspace.count();
  Row row;
  row.kernel = "mla_attention";
  row.shape = absl::StrCat(c.heads, " heads, B=", c.sequences, ", S=", c.context, ", ", c.queries,
                           c.queries == 1 ? " query" : " queries");
  if (c.max_context != 0) absl::StrAppend(&row.shape, ", ", c.max_context, " allowed");
  if (segment_tokens != 0) absl::StrAppend(&row.shape, ", segments of ", segment_tokens);
  row.timing = TimeGraph(std::max(copies, c.queries > 64 ? 1 : 4), [&](int i, cudaStream_t stream) {
    params.block_tables = tables.get() + i % copies * c.sequences * max_blocks;
    return kernels::cuda::LaunchMlaAttentionWithSegments(params, segment_tokens, stream);
  });
  double pairs = 0;  // of a query and a position
  for (const MlaRow& r : rows) pairs += r.position + 1;
  row.bytes =
      static_cast<double>(c.sequences * blocks * block_bytes + m * c.heads * (576 + 512) * 2);
  row.flops = 2.0 * static_cast<double>(c.heads) * pairs * (576 + 512);
  row.flop_rate = kBf16FlopRate;
  if (segment_tokens == 0) {
    row.must_us = c.must_us;
    row.aim_us = c.aim_us;
    row.peer = c.peer;
  }
  report.Add(row);
}

}  // namespace

void BenchMlaAttention(Report& report) {
  for (const int64_t segment_tokens : {0, 512, 1024, 2048}) {  // 0: those of the kernel
    for (const Case& c : {Case{128, 128, 4096, 1, 285, 240, "FlashMLA 227.6 + 29 scheduling"},
                          Case{128, 1, 8192, 1, 40, 26, "FlashMLA 24.5 + 15"},
                          Case{128, 64, 4096, 2, 290, 245, "FlashMLA 229"},
                          Case{16, 128, 8192, 1, 340, 300, "FlashMLA 285.5"}}) {
      if (segment_tokens != 0 && c.queries == 2) continue;
      Measure(report, c, segment_tokens);
    }
    // What shorter segments cost where long rows share the card (docs/adr/0012).
    if (segment_tokens == 0 || segment_tokens == 512) {
      Measure(report, {128, 16, 8192, 1, 0, 0, "FlashMLA 68.3"}, segment_tokens);
      Measure(report, {128, 64, 8192, 1, 0, 0, ""}, segment_tokens);
      Measure(report, {128, 8, 32768, 1, 0, 0, ""}, segment_tokens);
    }
    if (segment_tokens != 0) continue;
    for (const Case& c :  // few segments
         {Case{128, 1, 512, 1, 0, 0, ""}, Case{128, 1, 4096, 1, 0, 0, ""},
          Case{128, 4, 4096, 1, 0, 0, ""}, Case{128, 2, 8192, 1, 0, 0, ""},
          Case{16, 4, 8192, 1, 0, 0, ""}}) {
      Measure(report, c, segment_tokens);
    }
    Measure(report, {128, 16, 8192, 1, 0, 0, "", 131072}, segment_tokens);
    Measure(report, {128, 1, 32768, 2048, 0, 0, ""}, segment_tokens);
  }
}

}  // namespace moebius::bench
