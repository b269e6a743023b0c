#include "tests/kernels/cpu/row_ops.h"

#include <limits>
#include <memory>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "tests/kernels/cpu/random_tensors.h"

namespace moebius::kernels::cpu {
namespace {

constexpr int kGood = 5;

// A BF16 row by number.
std::vector<Bf16> RowValues(int row, int64_t dim, uint64_t stream) {
  if (row == kNanRow) return std::vector<Bf16>(static_cast<size_t>(dim), Bf16{0x7FC0});
  if (row == kInfRow) {
    std::vector<Bf16> out(static_cast<size_t>(dim));
    for (int64_t i = 0; i < dim; ++i) {
      out[i] = Bf16{static_cast<uint16_t>(i % 2 == 0 ? 0x7F80 : 0xFF80)};
    }
    return out;
  }
  Prng prng(CounterDraw(77, stream, static_cast<uint64_t>(row)));
  return RandomBf16(prng, dim);
}

std::vector<Bf16> Stack(const std::vector<int>& rows, int64_t dim, uint64_t stream) {
  std::vector<Bf16> out;
  for (const int row : rows) {
    const std::vector<Bf16> values = RowValues(row, dim, stream);
    out.insert(out.end(), values.begin(), values.end());
  }
  return out;
}

std::vector<float> StackFloats(const std::vector<int>& rows, int64_t dim, uint64_t stream) {
  std::vector<float> out;
  for (const Bf16 value : Stack(rows, dim, stream)) out.push_back(ToFloat(value));
  return out;
}

template <typename T>
std::vector<uint64_t> HashRows(const std::vector<T>& out, int64_t rows) {
  const int64_t dim = static_cast<int64_t>(out.size()) / rows;
  std::vector<uint64_t> hashes;
  for (int64_t i = 0; i < rows; ++i) hashes.push_back(HashRow(out.data() + i * dim, dim));
  return hashes;
}

int64_t Count(const std::vector<int>& rows) { return static_cast<int64_t>(rows.size()); }

// Good row g is token g * 3; what a lookup gives cannot depend on neighbours unless it reads them.
RowOp EmbedOp() {
  static constexpr int64_t kVocab = 19, kDim = 83;
  static constexpr TokenId kNanToken = 17, kInfToken = 18;
  Prng prng(40);
  std::vector<Bf16> table = RandomBf16(prng, kVocab * kDim);
  const std::vector<Bf16> poison = Stack({kNanRow, kInfRow}, kDim, 0);
  std::copy(poison.begin(), poison.end(), table.begin() + kNanToken * kDim);
  return {
      "Embed", kGood, [table = std::move(table)](Backend& backend, const std::vector<int>& rows) {
        std::vector<TokenId> ids;
        for (const int row : rows) {
          ids.push_back(row == kNanRow   ? kNanToken
                        : row == kInfRow ? kInfToken
                                         : static_cast<TokenId>(row * 3));
        }
        MatrixView view;
        view.dtype = DType::kBf16;
        view.rows = kVocab;
        view.cols = kDim;
        view.data = reinterpret_cast<const std::byte*>(table.data());
        std::vector<Bf16> out(rows.size() * kDim);
        CHECK(backend.Embed({.m = Count(rows), .table = view, .ids = ids.data(), .out = out.data()})
                  .ok());
        return HashRows(out, Count(rows));
      }};
}

RowOp LinearOp(DType dtype, int64_t n, int64_t k, bool f32_out) {
  Prng prng(1);
  const auto weight = std::make_shared<RandomMatrix>(prng, dtype, n, k);
  return {absl::StrCat("Linear ", Name(dtype), " ", n, "x", k, f32_out ? " f32" : " bf16"), kGood,
          [=](Backend& backend, const std::vector<int>& rows) {
            const std::vector<Bf16> x = Stack(rows, k, 2);
            std::vector<Bf16> out_bf16(f32_out ? 0 : rows.size() * n);
            std::vector<float> out_f32(f32_out ? rows.size() * n : 0);
            CHECK(backend
                      .Linear({.m = Count(rows),
                               .weight = weight->view(),
                               .x = x.data(),
                               .x_stride = k,
                               .out_bf16 = f32_out ? nullptr : out_bf16.data(),
                               .out_f32 = f32_out ? out_f32.data() : nullptr,
                               .out_stride = n})
                      .ok());
            return f32_out ? HashRows(out_f32, Count(rows)) : HashRows(out_bf16, Count(rows));
          }};
}

RowOp RmsNormOp() {
  constexpr int64_t kDim = 77;
  Prng prng(3);
  return {"RmsNorm", kGood,
          [weight = RandomFloats(prng, kDim)](Backend& backend, const std::vector<int>& rows) {
            std::vector<Bf16> x = Stack(rows, kDim, 4);
            CHECK(backend
                      .RmsNorm({.m = Count(rows),
                                .dim = kDim,
                                .x = x.data(),
                                .x_stride = kDim,
                                .weight = weight.data(),
                                .out = x.data(),
                                .out_stride = kDim})
                      .ok());
            return HashRows(x, Count(rows));
          }};
}

RowOp ElementwiseOp(const std::string& name) {
  constexpr int64_t kDim = 45;
  return {name, kGood, [name](Backend& backend, const std::vector<int>& rows) {
            std::vector<Bf16> a = Stack(rows, kDim, 5);
            const std::vector<Bf16> b = Stack(rows, kDim, 6), c = Stack(rows, kDim, 7);
            const int64_t m = Count(rows);
            absl::Status status;
            if (name == "SwiGlu") {
              status = backend.SwiGlu(
                  {.m = m, .dim = kDim, .gate = a.data(), .up = b.data(), .out = a.data()});
            } else if (name == "ResidualAdd") {
              status = backend.ResidualAdd({.m = m, .dim = kDim, .h = a.data(), .y = b.data()});
            } else {
              status = backend.MoeResidual(
                  {.m = m, .dim = kDim, .h = a.data(), .routed = b.data(), .shared = c.data()});
            }
            CHECK(status.ok());
            return HashRows(a, m);
          }};
}

constexpr MlaDims kDims = {.num_heads = 9,
                           .qk_nope_head_dim = 20,
                           .qk_rope_head_dim = 8,
                           .v_head_dim = 12,
                           .kv_lora_rank = 40};

RowOp RopeAndCacheOp() {
  Prng prng(8);
  return {"RopeAndCache", kGood,
          [norm = RandomFloats(prng, kDims.kv_lora_rank),
           table = RandomFloats(prng, kGood * 40 * kDims.qk_rope_head_dim)](
              Backend& backend, const std::vector<int>& rows) {
            const int64_t m = Count(rows), latent = kDims.latent_dim();
            std::vector<Bf16> q = Stack(rows, kDims.num_heads * kDims.q_head_dim(), 9);
            const std::vector<Bf16> kv = Stack(rows, latent, 10);
            // Each row in a block of its own, at a position that belongs to its contents.
            std::vector<SequenceRow> where(rows.size());
            std::vector<int32_t> tables(rows.size() * 4);
            for (int64_t i = 0; i < m; ++i) {
              where[i].position = rows[i] < 0 ? 3 : rows[i] * 39;
              where[i].block_table = &tables[i * 4];
              for (int b = 0; b < 4; ++b) tables[i * 4 + b] = static_cast<int32_t>(i);
            }
            std::vector<Bf16> cache(rows.size() * kCacheBlockTokens * latent);
            CHECK(backend
                      .RopeAndCache({.m = m,
                                     .dims = kDims,
                                     .q = q.data(),
                                     .kv = kv.data(),
                                     .kv_stride = latent,
                                     .kv_norm = norm.data(),
                                     .cos_sin = table.data(),
                                     .rows = where.data(),
                                     .cache = cache.data()})
                      .ok());
            std::vector<uint64_t> hashes = HashRows(q, m);
            for (int64_t i = 0; i < m; ++i) {
              hashes[i] = HashRow(&cache[i * kCacheBlockTokens * latent],
                                  kCacheBlockTokens * latent, hashes[i]);
            }
            return hashes;
          }};
}

// Good row g is the last position of a context of its own, its blocks scattered; poison rows read a
// cache full of poison.
RowOp MlaAttentionOp(DType dtype) {
  static constexpr int32_t kContexts[] = {63, 64, 65, 127, 513, 62, 126, 512};
  static constexpr int kBlocksPerRow = 9;
  static constexpr int kRows = static_cast<int>(std::size(kContexts));
  Prng prng(11);
  const int64_t latent = kDims.latent_dim();
  const auto kv_b = std::make_shared<RandomMatrix>(
      prng, dtype, kDims.num_heads * (kDims.qk_nope_head_dim + kDims.v_head_dim),
      kDims.kv_lora_rank);
  const int64_t block = kCacheBlockTokens * latent;
  // Rows g and g + 5 are the last two rows of one sequence. Unused entries stay NaN: reading a
  // masked one would show.
  auto cache = std::make_shared<std::vector<Bf16>>(
      static_cast<size_t>((kRows * kBlocksPerRow + 2) * block), Bf16{0x7FC0});
  std::vector<int32_t> tables(kRows * kBlocksPerRow);
  for (int g = 0; g < kRows; ++g) {
    for (int b = 0; b < kBlocksPerRow; ++b) {
      const int number = (g * kBlocksPerRow + b) * 31 % (kRows * kBlocksPerRow);
      tables[g * kBlocksPerRow + b] = number;
      for (int t = 0; t < kCacheBlockTokens; ++t) {
        if (b * kCacheBlockTokens + t >= kContexts[g]) continue;
        const std::vector<Bf16> row = RandomBf16(prng, latent);
        std::copy(row.begin(), row.end(), cache->begin() + number * block + t * latent);
      }
    }
  }
  const int32_t nan_block = kRows * kBlocksPerRow, inf_block = nan_block + 1;
  const std::vector<Bf16> infinities = RowValues(kInfRow, block, 0);
  std::copy(infinities.begin(), infinities.end(), cache->begin() + inf_block * block);
  return {absl::StrCat("MlaAttention ", Name(dtype)), kRows,
          [=](Backend& backend, const std::vector<int>& rows) {
            const int64_t m = Count(rows);
            const std::vector<Bf16> q = Stack(rows, kDims.num_heads * kDims.q_head_dim(), 12);
            std::vector<SequenceRow> where(rows.size());
            for (int64_t i = 0; i < m; ++i) {
              if (rows[i] < 0) {
                where[i] = {5, rows[i] == kNanRow ? &nan_block : &inf_block};
              } else {
                where[i] = {kContexts[rows[i]] - 1, &tables[rows[i] * kBlocksPerRow]};
              }
            }
            std::vector<Bf16> out(rows.size() * kDims.num_heads * kDims.v_head_dim);
            CHECK(backend
                      .MlaAttention({.m = m,
                                     .dims = kDims,
                                     .q = q.data(),
                                     .kv_b = kv_b->view(),
                                     .softmax_scale = 0.2f,
                                     .rows = where.data(),
                                     .cache = cache->data(),
                                     .out = out.data()})
                      .ok());
            return HashRows(out, m);
          }};
}

RowOp GateSelectOp(const std::string& name, const GateConfig& config) {
  Prng prng(13);
  return {absl::StrCat("GateSelect ", name), kGood,
          [config, bias = RandomFloats(prng, config.n_routed_experts)](
              Backend& backend, const std::vector<int>& rows) {
            const std::vector<float> logits = StackFloats(rows, config.n_routed_experts, 14);
            const size_t slots = rows.size() * config.num_experts_per_tok;
            std::vector<ExpertId> experts(slots);
            std::vector<float> weights(slots);
            const bool biased = config.topk_method == TopkMethod::kNoauxTc;
            CHECK(backend
                      .GateSelect({.m = Count(rows),
                                   .config = config,
                                   .logits = logits.data(),
                                   .bias = biased ? bias.data() : nullptr,
                                   .experts = experts.data(),
                                   .weights = weights.data()})
                      .ok());
            std::vector<uint64_t> hashes = HashRows(experts, Count(rows));
            const std::vector<uint64_t> weight_hashes = HashRows(weights, Count(rows));
            for (size_t i = 0; i < rows.size(); ++i) hashes[i] ^= weight_hashes[i];
            return hashes;
          }};
}

RowOp QuantizeRowsOp() {
  return {"QuantizeRows", kGood, [](Backend& backend, const std::vector<int>& rows) {
            constexpr int64_t kDim = 300, kBlocks = 3;
            const std::vector<Bf16> x = Stack(rows, kDim, 15);
            std::vector<E4m3> codes(rows.size() * kDim);
            std::vector<float> scales(rows.size() * kBlocks);
            CHECK(backend
                      .QuantizeRows({.m = Count(rows),
                                     .dim = kDim,
                                     .x = x.data(),
                                     .codes = codes.data(),
                                     .scales = scales.data()})
                      .ok());
            std::vector<uint64_t> hashes = HashRows(codes, Count(rows));
            const std::vector<uint64_t> scale_hashes = HashRows(scales, Count(rows));
            for (size_t i = 0; i < rows.size(); ++i) hashes[i] ^= scale_hashes[i];
            return hashes;
          }};
}

// Good row g belongs to expert g % 3, poison rows to all experts in turn.
RowOp ExpertFfnOp(DType dtype) {
  static constexpr int64_t kHidden = 152, kInner = 136, kExperts = 3;
  Prng prng(16);
  const auto weights = std::make_shared<std::vector<RandomMatrix>>();
  for (int64_t e = 0; e < kExperts; ++e) {
    weights->emplace_back(prng, dtype, kInner, kHidden);
    weights->emplace_back(prng, dtype, kInner, kHidden);
    weights->emplace_back(prng, dtype, kHidden, kInner);
  }
  return {absl::StrCat("ExpertFfn ", Name(dtype)), kGood,
          [=](Backend& backend, const std::vector<int>& rows) {
            const int64_t m = Count(rows), blocks = CeilDiv(kHidden, kQuantBlock);
            const std::vector<Bf16> x = Stack(rows, kHidden, 17);
            std::vector<E4m3> codes(x.size());
            std::vector<float> scales(rows.size() * blocks);
            CHECK(backend
                      .QuantizeRows({.m = m,
                                     .dim = kHidden,
                                     .x = x.data(),
                                     .codes = codes.data(),
                                     .scales = scales.data()})
                      .ok());
            std::vector<ExpertGroup> groups;
            std::vector<int32_t> packed;
            for (int64_t e = 0; e < kExperts; ++e) {
              ExpertGroup group{.begin = static_cast<int64_t>(packed.size())};
              for (int64_t i = 0; i < m; ++i) {
                if ((rows[i] < 0 ? i : rows[i]) % kExperts == e) {
                  packed.push_back(static_cast<int32_t>(i));
                }
              }
              group.end = static_cast<int64_t>(packed.size());
              group.weights = {(*weights)[e * 3].view(), (*weights)[e * 3 + 1].view(),
                               (*weights)[e * 3 + 2].view()};
              groups.push_back(group);
            }
            std::vector<Bf16> out(x.size());
            const bool fp8 = dtype == DType::kE4m3;
            CHECK(backend
                      .ExpertFfn({.hidden = kHidden,
                                  .intermediate = kInner,
                                  .groups = groups.data(),
                                  .num_groups = kExperts,
                                  .m = m,
                                  .x_codes = fp8 ? codes.data() : nullptr,
                                  .x_scales = fp8 ? scales.data() : nullptr,
                                  .x_bf16 = fp8 ? nullptr : x.data(),
                                  .row_index = packed.data(),
                                  .out = out.data()})
                      .ok());
            std::vector<uint64_t> hashes(rows.size());
            for (int64_t i = 0; i < m; ++i) {
              hashes[packed[i]] = HashRow(&out[i * kHidden], kHidden);
            }
            return hashes;
          }};
}

RowOp CombineOp() {
  return {"Combine", kGood, [](Backend& backend, const std::vector<int>& rows) {
            constexpr int64_t kDim = 50;
            constexpr int32_t kTopK = 6;
            const int64_t m = Count(rows);
            std::vector<std::vector<Bf16>> stacks;
            for (int j = 0; j < kTopK; ++j) stacks.push_back(Stack(rows, kDim, 20 + j));
            std::vector<ExpertId> experts;
            std::vector<float> weights;
            std::vector<const Bf16*> pointers;
            for (int64_t i = 0; i < m; ++i) {
              for (uint32_t j = 0; j < kTopK; ++j) {
                experts.push_back(ExpertId(j * 7 + static_cast<uint32_t>(rows[i] + 2)));
                weights.push_back(0.1f + 0.3f * static_cast<float>(j));
                pointers.push_back(&stacks[j][i * kDim]);
              }
            }
            std::vector<Bf16> out(rows.size() * kDim);
            CHECK(backend
                      .Combine({.m = m,
                                .dim = kDim,
                                .top_k = kTopK,
                                .experts_per_group = 16,
                                .experts = experts.data(),
                                .weights = weights.data(),
                                .rows = pointers.data(),
                                .out = out.data()})
                      .ok());
            return HashRows(out, m);
          }};
}

// Good rows differ in parameters as well: greedy, plain temperature, top-k, top-p, both.
RowOp SampleOp() {
  return {"Sample", kGood, [](Backend& backend, const std::vector<int>& rows) {
            constexpr int64_t kVocab = 131;
            static const SamplingParams kParams[kGood] = {
                {.temperature = 0.0f},
                {.temperature = 1.0f, .seed = 5},
                {.temperature = 0.7f, .top_k = 10, .seed = 6},
                {.temperature = 1.3f, .top_p = 0.8f, .seed = 7},
                {.temperature = 2.0f, .top_k = 40, .top_p = 0.9f, .seed = 8}};
            const int64_t m = Count(rows);
            const std::vector<float> logits = StackFloats(rows, kVocab, 30);
            std::vector<SamplingParams> params;
            std::vector<uint64_t> index;
            for (const int row : rows) {
              params.push_back(kParams[row < 0 ? 4 : row]);
              index.push_back(static_cast<uint64_t>(row + 100));
            }
            std::vector<TokenId> tokens(rows.size());
            std::vector<float> logprobs(rows.size());
            CHECK(backend
                      .Sample({.m = m,
                               .vocab = kVocab,
                               .logits_stride = kVocab,
                               .logits = logits.data(),
                               .params = params.data(),
                               .token_index = index.data(),
                               .tokens = tokens.data(),
                               .logprobs = logprobs.data()})
                      .ok());
            std::vector<uint64_t> digests(rows.size());
            const std::vector<Bf16> hidden = Stack(rows, 33, 31);
            CHECK(backend
                      .RowDigest({.m = m,
                                  .dim = 33,
                                  .hidden = hidden.data(),
                                  .hidden_stride = 33,
                                  .logprobs = logprobs.data(),
                                  .digests = digests.data()})
                      .ok());
            for (int64_t i = 0; i < m; ++i) digests[i] = Mix64(digests[i] ^ tokens[i]);
            return digests;
          }};
}

// Log-probabilities of given tokens; what was asked for beside a token does not matter.
RowOp TokenLogprobsOp() {
  return {"TokenLogprobs", kGood, [](Backend& backend, const std::vector<int>& rows) {
            constexpr int64_t kVocab = 131, kPerRow = 3;
            const std::vector<float> logits = StackFloats(rows, kVocab, 41);
            std::vector<TokenId> tokens;
            for (const int row : rows) {
              tokens.insert(tokens.end(), {row < 0 ? -1 : row * 7, -1, row + 50});
            }
            std::vector<float> logprobs(tokens.size());
            CHECK(backend
                      .TokenLogprobs({.m = Count(rows),
                                      .vocab = kVocab,
                                      .logits_stride = kVocab,
                                      .logits = logits.data(),
                                      .per_row = kPerRow,
                                      .tokens = tokens.data(),
                                      .logprobs = logprobs.data()})
                      .ok());
            return HashRows(logprobs, Count(rows));
          }};
}

}  // namespace

std::vector<RowOp> AllRowOps() {
  GateConfig v3{.n_routed_experts = 40, .num_experts_per_tok = 5, .n_group = 4, .topk_group = 2};
  GateConfig v2{.n_routed_experts = 24,
                .num_experts_per_tok = 4,
                .n_group = 3,
                .topk_group = 2,
                .scoring_func = ScoringFunc::kSoftmax,
                .topk_method = TopkMethod::kGroupLimitedGreedy,
                .norm_topk_prob = false};
  std::vector<RowOp> ops;
  // Float32 outputs show the last bit of a chain; BF16 hides most.
  ops.push_back(LinearOp(DType::kBf16, 35, 150, true));
  ops.push_back(LinearOp(DType::kBf16, 16, 64, false));
  ops.push_back(LinearOp(DType::kE4m3, 139, 263, true));
  ops.push_back(LinearOp(DType::kE4m3, 21, 128, false));
  ops.push_back(LinearOp(DType::kF32, 13, 77, true));
  ops.push_back(EmbedOp());
  ops.push_back(RmsNormOp());
  for (const char* name : {"SwiGlu", "ResidualAdd", "MoeResidual"}) {
    ops.push_back(ElementwiseOp(name));
  }
  ops.push_back(RopeAndCacheOp());
  ops.push_back(MlaAttentionOp(DType::kBf16));
  ops.push_back(MlaAttentionOp(DType::kE4m3));
  ops.push_back(GateSelectOp("V3", v3));
  ops.push_back(GateSelectOp("V2", v2));
  ops.push_back(QuantizeRowsOp());
  ops.push_back(ExpertFfnOp(DType::kE4m3));
  ops.push_back(ExpertFfnOp(DType::kBf16));
  ops.push_back(CombineOp());
  ops.push_back(SampleOp());
  ops.push_back(TokenLogprobsOp());
  return ops;
}

std::vector<uint64_t> SingleRowHashes(const RowOp& op, Backend& backend) {
  std::vector<uint64_t> hashes;
  for (int g = 0; g < op.good_rows; ++g) hashes.push_back(op.run(backend, {g})[0]);
  return hashes;
}

std::vector<std::string> RowRuleViolations(const RowOp& op, Backend& backend,
                                           const std::vector<uint64_t>& expected,
                                           const std::vector<int64_t>& ms) {
  std::vector<std::string> violations;
  for (const int64_t m : ms) {
    for (int64_t index = 0; index <= m; ++index) {
      // index == m: no poison, every row is good.
      std::vector<int> rows(static_cast<size_t>(m));
      for (int64_t i = 0; i < m; ++i) {
        const bool good = index == m || i == index;
        const int poison = i % 2 == 0 ? kNanRow : kInfRow;
        rows[i] = good ? static_cast<int>((i + m) % op.good_rows) : poison;
      }
      const std::vector<uint64_t> hashes = op.run(backend, rows);
      for (int64_t i = 0; i < m; ++i) {
        if (rows[i] >= 0 && hashes[i] != expected[rows[i]]) {
          violations.push_back(absl::StrCat(op.name, ": row ", i, " of m = ", m,
                                            index == m ? ", good neighbours" : ", poisoned"));
        }
      }
    }
  }
  return violations;
}

}  // namespace moebius::kernels::cpu
