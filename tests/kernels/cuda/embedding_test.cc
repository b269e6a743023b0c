#include "kernels/cuda/embedding/embedding.h"

#include "tests/kernels/cuda/gpu_test.h"

namespace moebius::kernels::cuda {
namespace {

class EmbeddingTest : public GpuTest {};

TEST_F(EmbeddingTest, EveryRowIsItsTokensRowWhateverTheOthersAre) {
  struct Case {
    int64_t m, vocab, dim;
  };
  for (const Case c : {Case{1, 100, 7168}, Case{130, 517, 1040}, Case{301, 50, 7168},
                       Case{4096, 64, 77}, Case{9, 3, 1}, Case{7, 20, 8}}) {
    Prng random(1);
    std::vector<Bf16> table(static_cast<size_t>(c.vocab * c.dim));
    for (Bf16& value : table) value.bits = static_cast<uint16_t>(random.Next());
    std::vector<TokenId> ids;
    for (int64_t i = 0; i < c.m; ++i)
      ids.push_back(static_cast<TokenId>(random.Below(static_cast<uint64_t>(c.vocab))));
    ids.back() = static_cast<TokenId>(c.vocab - 1);
    const DeviceBuffer<Bf16> device_table(table), out(static_cast<size_t>(c.m * c.dim));
    const DeviceBuffer<TokenId> device_ids(ids);
    EmbeddingParams params;
    params.m = c.m;
    params.vocab = c.vocab;
    params.dim = c.dim;
    params.table = device_table.get();
    params.ids = device_ids.get();
    params.out = out.get();
    ASSERT_STATUS_OK(LaunchEmbedding(params, nullptr));
    const std::vector<Bf16> found = out.Download();
    for (int64_t i = 0; i < c.m; ++i) {
      for (int64_t d = 0; d < c.dim; ++d) {
        ASSERT_EQ(found[static_cast<size_t>(i * c.dim + d)],
                  table[static_cast<size_t>(ids[static_cast<size_t>(i)] * c.dim + d)])
            << "row " << i << ", element " << d;
      }
    }
  }
}

TEST_F(EmbeddingTest, IdsOutsideOfTheVocabularyGiveNanRowsAndReadNothing) {
  const DeviceBuffer<Bf16> table(std::vector<Bf16>(4 * 16, Bf16{0x3f80})), out(4 * 16);
  const DeviceBuffer<TokenId> ids(std::vector<TokenId>{3, -1, 4, 0});
  EmbeddingParams params;
  params.m = 4;
  params.vocab = 4;
  params.dim = 16;
  params.table = table.get();
  params.ids = ids.get();
  params.out = out.get();
  ASSERT_STATUS_OK(LaunchEmbedding(params, nullptr));
  const std::vector<Bf16> found = out.Download();
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_EQ(found[i].bits, i / 16 == 1 || i / 16 == 2 ? 0x7fc0 : 0x3f80) << i;
  }
}

TEST_F(EmbeddingTest, ArgumentsThatItCannotTakeAreRefusedByName) {
  EmbeddingParams params;
  EXPECT_TRUE(LaunchEmbedding(params, nullptr).ok()) << "no rows";
  const auto refusal = [&] { return std::string(LaunchEmbedding(params, nullptr).message()); };
  params.m = 1;
  EXPECT_NE(refusal().find("vocab is 0"), std::string::npos);
  params.vocab = 4;
  EXPECT_NE(refusal().find("dim is 0"), std::string::npos);
  params.dim = 4;
  EXPECT_NE(refusal().find("table is null"), std::string::npos);
}

}  // namespace
}  // namespace moebius::kernels::cuda
