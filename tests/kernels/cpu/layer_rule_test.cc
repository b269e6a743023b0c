// The row rule for whole models: the bits of every position are the same whatever the chunk size,
// the number of query rows, the company in the batch, the threads and the instruction set. Run on
// the small checkpoints of tests/golden, so that FP8 with ragged blocks, q_lora and its absence,
// groups and softmax gates are all in it.

#include <algorithm>
#include <limits>
#include <memory>
#include <set>

#include "base/check.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/cpu/batch_dependent_backend.h"
#include "tests/kernels/cpu/batched_forward.h"
#include "tests/kernels/cpu/random_tensors.h"

namespace moebius::kernels::cpu {
namespace {

constexpr int64_t kLength = 514;  // crosses 63/64/65, 127/128 and 512/513
constexpr int64_t kBlocks = 9;    // of the sequence under test
constexpr int64_t kDecoys = 3;    // other sequences, of one block each

std::unique_ptr<reference::ModelForward> LoadGolden(const std::string& name) {
  auto model = reference::ModelForward::Load(MOEBIUS_SOURCE_DIR "/tests/golden/" + name);
  CHECK(model.ok());
  return *std::move(model);
}

std::unique_ptr<CpuBackend> MakeBackend(CpuTarget target, int threads) {
  return *CpuBackend::Create({.num_threads = threads, .target = target, .min_parallel_work = 0});
}

// Hashes of positions [0, length) of one sequence that is prefilled in chunks, each chunk in a
// batch with poisoned and finite decoy rows before, between and after its own.
std::vector<uint64_t> PositionHashes(const reference::ModelForward& model, Backend& backend,
                                     int64_t length, int64_t chunk, bool decoys) {
  BatchedForward forward(model, backend, kBlocks + kDecoys);
  std::vector<int32_t> table(kBlocks), decoy_tables(kDecoys);
  for (int32_t b = 0; b < kBlocks; ++b) table[b] = b * 5 % static_cast<int32_t>(kBlocks);
  for (int32_t d = 0; d < kDecoys; ++d) decoy_tables[d] = static_cast<int32_t>(kBlocks) + d;
  const float poison[kDecoys] = {std::numeric_limits<float>::quiet_NaN(),
                                 std::numeric_limits<float>::infinity(), 0.0f};
  Prng prng(99);
  std::vector<TokenId> ids;
  for (int64_t t = 0; t < length; ++t) {
    ids.push_back(static_cast<TokenId>(prng.Below(static_cast<uint64_t>(model.config.vocab_size))));
  }
  std::vector<uint64_t> hashes;
  int32_t decoy_position = 0;
  for (int64_t begin = 0; begin < length; begin += chunk) {
    const int64_t end = std::min(begin + chunk, length);
    std::vector<BatchRow> rows;
    std::vector<size_t> own;
    const auto add_decoy = [&](int64_t d) {
      rows.push_back(
          {.token = 7, .where = {decoy_position % 64, &decoy_tables[d]}, .poison = poison[d]});
    };
    if (decoys) add_decoy(0);
    for (int64_t t = begin; t < end; ++t) {
      own.push_back(rows.size());
      rows.push_back({.token = ids[t], .where = {static_cast<int32_t>(t), table.data()}});
      if (decoys && t == begin) add_decoy(1);
    }
    if (decoys) add_decoy(2);
    ++decoy_position;
    const BatchResult result = forward.Run(rows);
    for (const size_t i : own) hashes.push_back(Mix64(result.hashes[i] ^ result.digests[i]));
  }
  return hashes;
}

// Positions at which the two differ.
int64_t Differences(const std::vector<uint64_t>& a, const std::vector<uint64_t>& b) {
  CHECK_EQ(a.size(), b.size());
  int64_t count = 0;
  for (size_t t = 0; t < a.size(); ++t) count += a[t] != b[t];
  return count;
}

// One decode step of `rows.size()` sequences, each at its second position and in a block of its
// own. Row g >= 0 continues tokens that g names; kNanRow and kInfRow have a poisoned embedding.
constexpr int kNanRow = -1, kInfRow = -2, kGoodRows = 5;
std::vector<uint64_t> DecodeHashes(const reference::ModelForward& model, Backend& backend,
                                   const std::vector<int>& rows) {
  BatchedForward forward(model, backend, static_cast<int64_t>(rows.size()));
  std::vector<int32_t> blocks(rows.size());
  std::vector<BatchRow> batch(rows.size());
  const auto token = [&](int row, uint64_t position) {
    return static_cast<TokenId>(CounterDraw(5, position, static_cast<uint64_t>(row + 2)) %
                                static_cast<uint64_t>(model.config.vocab_size));
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    blocks[i] = static_cast<int32_t>(rows.size() - 1 - i);
    batch[i] = {.token = token(rows[i], 0), .where = {0, &blocks[i]}};
  }
  forward.Run(batch);
  for (size_t i = 0; i < rows.size(); ++i) {
    batch[i].token = token(rows[i], 1);
    batch[i].where.position = 1;
    if (rows[i] == kNanRow) batch[i].poison = std::numeric_limits<float>::quiet_NaN();
    if (rows[i] == kInfRow) batch[i].poison = std::numeric_limits<float>::infinity();
  }
  const BatchResult result = forward.Run(batch);
  std::vector<uint64_t> hashes;
  for (size_t i = 0; i < rows.size(); ++i) {
    hashes.push_back(Mix64(result.hashes[i] ^ result.digests[i]));
  }
  return hashes;
}

class LayerRule : public testing::TestWithParam<std::string> {};

TEST_P(LayerRule, ChunksCompanyThreadsAndTargetsChangeNothing) {
  const std::unique_ptr<reference::ModelForward> model = LoadGolden(GetParam());
  const std::vector<uint64_t> expected =
      PositionHashes(*model, *MakeBackend(BestTarget(), 1), kLength, 512, false);
  for (const CpuTarget target : SupportedTargets()) {
    const bool portable = target == CpuTarget::kPortable;  // slow: a sample of the product
    const int64_t length = portable ? 66 : kLength;
    const std::vector<uint64_t> prefix(expected.begin(), expected.begin() + length);
    for (int threads = 1; threads <= 4; ++threads) {
      std::vector<int64_t> chunks = {1, 7, 16, 64, 512};
      if (threads > 1) chunks.push_back(threads);  // 2, 3 and 4 query rows
      if (portable) chunks = {16};
      for (const int64_t chunk : chunks) {
        const std::vector<uint64_t> hashes =
            PositionHashes(*model, *MakeBackend(target, threads), length, chunk, /*decoys=*/true);
        EXPECT_EQ(Differences(hashes, prefix), 0)
            << Name(target) << ", chunks of " << chunk << ", " << threads << " threads";
      }
    }
  }
}

// Every row index of every m, its neighbours poisoned (seven of eight rows are), and once among
// good neighbours only.
TEST_P(LayerRule, EveryRowOfABatchHasOneHash) {
  const std::unique_ptr<reference::ModelForward> model = LoadGolden(GetParam());
  std::vector<uint64_t> expected;
  for (int g = 0; g < kGoodRows; ++g) {
    expected.push_back(DecodeHashes(*model, *MakeBackend(BestTarget(), 1), {g})[0]);
  }
  EXPECT_EQ(std::set<uint64_t>(expected.begin(), expected.end()).size(), expected.size());
  constexpr int kPhases = 8;
  for (const CpuTarget target : SupportedTargets()) {
    std::vector<int> ms = {1, 2, 3, 7, 16, 17, 33, 64, 200};
    if (target == CpuTarget::kPortable) ms = {7};
    for (int threads = 1; threads <= 4; ++threads) {
      const std::unique_ptr<CpuBackend> backend = MakeBackend(target, threads);
      for (const int m : ms) {
        for (int phase = 0; phase <= std::min(m, kPhases); ++phase) {
          std::vector<int> rows(static_cast<size_t>(m));
          for (int i = 0; i < m; ++i) {
            const bool good = i % kPhases == phase || phase == std::min(m, kPhases);
            rows[i] = good ? (i + m) % kGoodRows : i % 2 == 0 ? kNanRow : kInfRow;
          }
          const std::vector<uint64_t> hashes = DecodeHashes(*model, *backend, rows);
          for (int i = 0; i < m; ++i) {
            if (rows[i] >= 0) {
              ASSERT_EQ(hashes[i], expected[rows[i]])
                  << "row " << i << " of " << m << ", " << Name(target) << ", " << threads
                  << " threads, phase " << phase;
            }
          }
        }
      }
    }
  }
}

std::string CaseName(const testing::TestParamInfo<std::string>& golden) {
  std::string name = golden.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Golden, LayerRule,
                         testing::Values("v3-groups", "v3-fp8", "v31-fp8", "v2-lite", "moonlight"),
                         CaseName);

TEST(LayerRuleChecker, FindsABatchDependentBackend) {
  const std::unique_ptr<reference::ModelForward> model = LoadGolden("v3-groups");
  const std::unique_ptr<CpuBackend> inner = MakeBackend(BestTarget(), 1);
  BatchDependentBackend broken(inner.get());
  const std::vector<uint64_t> expected = PositionHashes(*model, *inner, 64, 64, false);
  EXPECT_EQ(Differences(PositionHashes(*model, broken, 64, 1, false), expected), 0);
  EXPECT_GT(Differences(PositionHashes(*model, broken, 64, 16, false), expected), 0);
  const std::vector<int> many(16, 3);
  EXPECT_EQ(DecodeHashes(*model, broken, {3}), DecodeHashes(*model, *inner, {3}));
  EXPECT_NE(DecodeHashes(*model, broken, many), DecodeHashes(*model, *inner, many));
}

}  // namespace
}  // namespace moebius::kernels::cpu
