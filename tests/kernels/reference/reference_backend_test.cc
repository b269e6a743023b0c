// Goal: the operations of kernels/backend.h, put together as an attention worker does, are the
// model. Method: whole models run through ReferenceBackend in chunks, over a paged cache with
// scattered blocks; logits must equal, bit for bit, those of ModelForward, which knows neither.

#include "kernels/reference/reference_backend.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/reference/model_forward.h"
#include "model/rope.h"
#include "tests/kernels/reference/golden_files.h"

namespace moebius::kernels::reference {
namespace {

class Pipeline {
 public:
  Pipeline(const ModelForward& model, int64_t tokens_max)
      : model_(model),
        c_(model.config),
        dims_{c_.num_attention_heads, c_.qk_nope_head_dim, c_.qk_rope_head_dim, c_.v_head_dim,
              c_.kv_lora_rank},
        cos_sin_(model::RopeCosSinTable(c_, tokens_max)) {
    // Blocks in descending order, every other one: nothing may depend on where a block lies.
    const int64_t blocks = CeilDiv(tokens_max, kCacheBlockTokens);
    for (int64_t i = 0; i < blocks; ++i) {
      block_table_.push_back(static_cast<int32_t>(2 * (blocks - 1 - i)));
    }
    caches_.assign(static_cast<size_t>(c_.num_hidden_layers),
                   std::vector<Bf16>(2 * blocks * kCacheBlockTokens * dims_.latent_dim(),
                                     Bf16{0x7FC0}));  // NaN: an entry not written must not be read
  }

  // Logits [m, vocab] of the next m tokens.
  std::vector<float> Step(absl::Span<const TokenId> ids) {
    m_ = static_cast<int64_t>(ids.size());
    rows_.clear();
    for (int64_t i = 0; i < m_; ++i) {
      rows_.push_back({static_cast<int32_t>(position_ + i), block_table_.data()});
    }
    std::vector<Bf16> h(m_ * c_.hidden_size);
    Ok(backend_.Embed(
        {.m = m_, .table = model_.weights.embed_tokens, .ids = ids.data(), .out = h.data()}));
    for (size_t layer = 0; layer < model_.weights.layers.size(); ++layer) Layer(layer, h);
    const std::vector<Bf16> final_hidden = Norm(h, model_.weights.norm, c_.rms_norm_eps);
    std::vector<float> logits(m_ * model_.weights.lm_head.rows);
    Ok(backend_.Linear({.m = m_,
                        .weight = model_.weights.lm_head,
                        .x = final_hidden.data(),
                        .x_stride = c_.hidden_size,
                        .out_f32 = logits.data(),
                        .out_stride = model_.weights.lm_head.rows}));
    position_ += m_;
    return logits;
  }

 private:
  static void Ok(const absl::Status& status) { ASSERT_TRUE(status.ok()) << status; }

  std::vector<Bf16> Norm(const std::vector<Bf16>& x, absl::Span<const float> weight, double eps) {
    const int64_t dim = static_cast<int64_t>(weight.size());
    const int64_t stride = static_cast<int64_t>(x.size()) / m_;
    std::vector<Bf16> out(m_ * dim);
    Ok(backend_.RmsNorm({.m = m_,
                         .dim = dim,
                         .x = x.data(),
                         .x_stride = stride,
                         .weight = weight.data(),
                         .eps = static_cast<float>(eps),
                         .out = out.data(),
                         .out_stride = dim}));
    return out;
  }

  std::vector<Bf16> Linear(const MatrixView& weight, const std::vector<Bf16>& x) {
    std::vector<Bf16> out(m_ * weight.rows);
    Ok(backend_.Linear({.m = m_,
                        .weight = weight,
                        .x = x.data(),
                        .x_stride = weight.cols,
                        .out_bf16 = out.data(),
                        .out_stride = weight.rows}));
    return out;
  }

  std::vector<Bf16> Mlp(const model::MlpWeights& mlp, const std::vector<Bf16>& x) {
    const std::vector<Bf16> gate = Linear(mlp.gate_proj, x), up = Linear(mlp.up_proj, x);
    std::vector<Bf16> inner(gate.size());
    Ok(backend_.SwiGlu({.m = m_,
                        .dim = mlp.gate_proj.rows,
                        .gate = gate.data(),
                        .up = up.data(),
                        .out = inner.data()}));
    return Linear(mlp.down_proj, inner);
  }

  std::vector<Bf16> Attention(size_t index, const std::vector<Bf16>& x) {
    const model::AttentionLayerWeights& layer = model_.weights.layers[index];
    const double eps = model::ModelConfig::kLatentNormEps;
    std::vector<Bf16> q =
        layer.q_proj.empty()
            ? Linear(layer.q_b_proj, Norm(Linear(layer.q_a_proj, x), layer.q_a_layernorm, eps))
            : Linear(layer.q_proj, x);
    const std::vector<Bf16> kv = Linear(layer.kv_a_proj_with_mqa, x);
    Ok(backend_.RopeAndCache({.m = m_,
                              .dims = dims_,
                              .q = q.data(),
                              .kv = kv.data(),
                              .kv_stride = dims_.latent_dim(),
                              .kv_norm = layer.kv_a_layernorm.data(),
                              .kv_norm_eps = static_cast<float>(eps),
                              .cos_sin = cos_sin_.data(),
                              .rows = rows_.data(),
                              .cache = caches_[index].data()}));
    std::vector<Bf16> heads(m_ * dims_.num_heads * dims_.v_head_dim);
    Ok(backend_.MlaAttention({.m = m_,
                              .dims = dims_,
                              .q = q.data(),
                              .kv_b = layer.kv_b_proj,
                              .softmax_scale = static_cast<float>(c_.softmax_scale()),
                              .rows = rows_.data(),
                              .cache = caches_[index].data(),
                              .out = heads.data()}));
    return Linear(layer.o_proj, heads);
  }

  std::vector<Bf16> Routed(const model::AttentionLayerWeights& layer, const std::vector<Bf16>& x) {
    const GateConfig gate = MakeGateConfig(c_);
    const int64_t top_k = gate.num_experts_per_tok, hidden = c_.hidden_size;
    std::vector<float> logits(m_ * gate.n_routed_experts);
    Ok(backend_.Linear({.m = m_,
                        .weight = layer.moe->gate,
                        .x = x.data(),
                        .x_stride = hidden,
                        .out_f32 = logits.data(),
                        .out_stride = gate.n_routed_experts}));
    std::vector<ExpertId> experts(m_ * top_k);
    std::vector<float> weights(m_ * top_k);
    const absl::Span<const float> bias = layer.moe->e_score_correction_bias;
    Ok(backend_.GateSelect({.m = m_,
                            .config = gate,
                            .logits = logits.data(),
                            .bias = bias.empty() ? nullptr : bias.data(),
                            .experts = experts.data(),
                            .weights = weights.data()}));

    // Group the (token, slot) pairs by expert, as an expert worker receives them.
    std::vector<int32_t> slots(m_ * top_k);
    std::iota(slots.begin(), slots.end(), 0);
    std::stable_sort(slots.begin(), slots.end(),
                     [&](int32_t a, int32_t b) { return experts[a] < experts[b]; });
    std::vector<int32_t> row_index;
    std::vector<ExpertGroup> groups;
    for (int64_t i = 0; i < m_ * top_k; ++i) {
      const ExpertId expert = experts[slots[i]];
      if (i == 0 || expert != experts[slots[i - 1]]) {
        const model::MlpWeights& w = model_.experts[layer.layer.value()][expert.value()].weights;
        groups.push_back({i, i, {w.gate_proj, w.up_proj, w.down_proj}});
      }
      groups.back().end = i + 1;
      row_index.push_back(slots[i] / static_cast<int32_t>(top_k));
    }
    std::vector<Bf16> packed(m_ * top_k * hidden);
    ExpertFfnParams ffn{.hidden = hidden,
                        .intermediate = c_.moe_intermediate_size,
                        .groups = groups.data(),
                        .num_groups = static_cast<int64_t>(groups.size()),
                        .m = m_ * top_k,
                        .row_index = row_index.data(),
                        .out = packed.data()};
    std::vector<E4m3> codes(m_ * hidden);
    std::vector<float> scales(m_ * CeilDiv(hidden, kQuantBlock));
    if (c_.wire_dtype() == model::WireDtype::kE4m3) {
      Ok(backend_.QuantizeRows({.m = m_,
                                .dim = hidden,
                                .x = x.data(),
                                .codes = codes.data(),
                                .scales = scales.data(),
                                .power_of_two_scales = c_.power_of_two_scales()}));
      ffn.power_of_two_scales = c_.power_of_two_scales();
      ffn.x_codes = codes.data();
      ffn.x_scales = scales.data();
    } else {
      ffn.x_bf16 = x.data();
    }
    Ok(backend_.ExpertFfn(ffn));

    std::vector<const Bf16*> rows(m_ * top_k);
    for (int64_t i = 0; i < m_ * top_k; ++i) rows[slots[i]] = &packed[i * hidden];
    std::vector<Bf16> routed(m_ * hidden);
    Ok(backend_.Combine({.m = m_,
                         .dim = hidden,
                         .top_k = static_cast<int32_t>(top_k),
                         .experts_per_group = CombineGroupSize(gate),
                         .experts = experts.data(),
                         .weights = weights.data(),
                         .rows = rows.data(),
                         .out = routed.data()}));
    return routed;
  }

  void Layer(size_t index, std::vector<Bf16>& h) {
    const model::AttentionLayerWeights& layer = model_.weights.layers[index];
    const std::vector<Bf16> attention =
        Attention(index, Norm(h, layer.input_layernorm, c_.rms_norm_eps));
    Ok(backend_.ResidualAdd(
        {.m = m_, .dim = c_.hidden_size, .h = h.data(), .y = attention.data()}));
    const std::vector<Bf16> x = Norm(h, layer.post_attention_layernorm, c_.rms_norm_eps);
    if (layer.moe.has_value()) {
      const std::vector<Bf16> routed = Routed(layer, x);
      const std::vector<Bf16> shared = Mlp(*layer.moe->shared_experts, x);
      Ok(backend_.MoeResidual({.m = m_,
                               .dim = c_.hidden_size,
                               .h = h.data(),
                               .routed = routed.data(),
                               .shared = shared.data()}));
    } else {
      const std::vector<Bf16> y = Mlp(*layer.mlp, x);
      Ok(backend_.ResidualAdd({.m = m_, .dim = c_.hidden_size, .h = h.data(), .y = y.data()}));
    }
  }

  const ModelForward& model_;
  const model::ModelConfig& c_;
  const MlaDims dims_;
  const std::vector<float> cos_sin_;
  ReferenceBackend backend_;
  std::vector<int32_t> block_table_;
  std::vector<std::vector<Bf16>> caches_;  // per layer
  int64_t position_ = 0;
  int64_t m_ = 0;
  std::vector<SequenceRow> rows_;
};

class ReferenceBackendTest : public testing::TestWithParam<std::string> {};

INSTANTIATE_TEST_SUITE_P(Models, ReferenceBackendTest, testing::ValuesIn(GoldenModelNames()),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST_P(ReferenceBackendTest, ChunksOverAPagedCacheHaveTheBitsOfTheWholeModel) {
  const auto model = ModelForward::Load(GoldenDir(GetParam()));
  ASSERT_TRUE(model.ok()) << model.status();
  std::vector<TokenId> ids = LoadGolden(GetParam()).sequences[2].token_ids;
  ids.resize(std::min<size_t>(ids.size(), 70));  // crosses a cache block where long enough
  const ForwardResult expected = (*model)->Forward(ids, Rounding::kServing);
  for (const size_t chunk : {size_t{1}, size_t{7}, ids.size()}) {
    Pipeline pipeline(**model, static_cast<int64_t>(ids.size()));
    std::vector<float> logits;
    for (size_t begin = 0; begin < ids.size(); begin += chunk) {
      const std::vector<float> part = pipeline.Step(absl::MakeConstSpan(ids).subspan(begin, chunk));
      logits.insert(logits.end(), part.begin(), part.end());
    }
    EXPECT_EQ(logits, expected.logits.values) << "chunks of " << chunk;
  }
}

TEST(ReferenceBackend, RowDigestCoversHiddenRowAndLogProb) {
  ReferenceBackend backend;
  const std::vector<Bf16> hidden = {ToBf16(1), ToBf16(2), ToBf16(1), ToBf16(2),
                                    ToBf16(1), ToBf16(3), ToBf16(1), ToBf16(2)};
  const std::vector<float> logprobs = {-0.5f, -0.5f, -0.5f, -0.25f};
  std::vector<uint64_t> digests(4);
  ASSERT_TRUE(backend
                  .RowDigest({.m = 4,
                              .dim = 2,
                              .hidden = hidden.data(),
                              .hidden_stride = 2,
                              .logprobs = logprobs.data(),
                              .digests = digests.data()})
                  .ok());
  EXPECT_EQ(digests[0], digests[1]);
  EXPECT_NE(digests[0], digests[2]);
  EXPECT_NE(digests[0], digests[3]);
}

TEST(ReferenceBackend, SampleNeverChoosesPaddingRowsOfTheHead) {
  ReferenceBackend backend;
  const std::vector<float> logits = {0, 1, 9, 0, 2, 9};
  const std::vector<SamplingParams> params(2);
  const std::vector<uint64_t> index(2);
  std::vector<TokenId> tokens(2);
  std::vector<float> logprobs(2);
  ASSERT_TRUE(backend
                  .Sample({.m = 2,
                           .vocab = 2,
                           .logits_stride = 3,
                           .logits = logits.data(),
                           .params = params.data(),
                           .token_index = index.data(),
                           .tokens = tokens.data(),
                           .logprobs = logprobs.data()})
                  .ok());
  EXPECT_EQ(tokens, (std::vector<TokenId>{1, 1}));
  EXPECT_NEAR(logprobs[0], -0.3132617, 1e-6);
}

}  // namespace
}  // namespace moebius::kernels::reference
