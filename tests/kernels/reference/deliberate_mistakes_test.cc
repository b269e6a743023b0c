// Goal: the bound tells right from wrong. Method: ten deliberate mistakes, scored by the golden
// generator; each must miss the bound of some model by at least five times. Nine of them are also
// planted here, in this implementation, by falsifying its config or weights: the score must come
// out as the generator's, so neither side can have measured something else.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/reference/dense.h"
#include "kernels/reference/model_forward.h"
#include "model/rope.h"
#include "tests/kernels/reference/golden_files.h"

namespace moebius::kernels::reference {
namespace {

TEST(DeliberateMistakes, EachMissesTheBoundFiveTimesSomewhere) {
  const GoldenScores scores = LoadGoldenScores();
  EXPECT_EQ(scores.bound_per_std, 0.02);
  EXPECT_EQ(scores.mistake_factor, 5);
  EXPECT_EQ(scores.mistakes.size(), 10u);
  for (const auto& [mistake, per_model] : scores.mistakes) {
    double worst = 0;
    for (const auto& [model, score] : per_model) {
      worst = std::max(worst, score / scores.model_bound.at(model));
    }
    std::printf("%-28s misses the bound %.1f times\n", mistake.c_str(), worst);
    EXPECT_GE(worst, scores.mistake_factor) << mistake;
  }
}

// Owns the falsified matrices of one model.
class Forgery {
 public:
  // `matrix` with its rows taken from `source_row(row)`, each multiplied by `factor(row)`.
  void ReplaceRows(MatrixView& matrix, const std::function<int64_t(int64_t)>& source_row,
                   const std::function<float(int64_t)>& factor) {
    std::vector<float> values;
    for (int64_t row = 0; row < matrix.rows; ++row) {
      for (int64_t col = 0; col < matrix.cols; ++col) {
        values.push_back(WeightAt(matrix, source_row(row), col) * factor(row));
      }
    }
    owned_.push_back(std::move(values));
    matrix.dtype = DType::kF32;
    matrix.scale_inv = nullptr;
    matrix.data = reinterpret_cast<const std::byte*>(owned_.back().data());
  }

  void InvertScale(MatrixView& matrix) {
    if (matrix.dtype != DType::kE4m3) return;
    std::vector<float> scales;
    const int64_t blocks = CeilDiv(matrix.rows, kQuantBlock) * CeilDiv(matrix.cols, kQuantBlock);
    for (int64_t i = 0; i < blocks; ++i) scales.push_back(1.0f / matrix.scale_inv[i]);
    owned_.push_back(std::move(scales));
    matrix.scale_inv = owned_.back().data();
  }

 private:
  std::vector<std::vector<float>> owned_;
};

float One(int64_t) { return 1.0f; }

MatrixView& QueryProjection(model::AttentionLayerWeights& layer) {
  return layer.q_proj.empty() ? layer.q_b_proj : layer.q_proj;
}

using Plant = std::function<void(ModelForward&, Forgery&)>;

void ExpectGeneratorsScore(const std::string& mistake, const std::string& model_name,
                           const Plant& plant) {
  auto model = ModelForward::Load(GoldenDir(model_name));
  ASSERT_TRUE(model.ok()) << model.status();
  Forgery forgery;
  plant(**model, forgery);
  const GoldenScores scores = LoadGoldenScores();
  const double expected = scores.mistakes.at(mistake).at(model_name);
  const double got = ScorePerStd(**model, LoadGolden(model_name), Rounding::kFloat32);
  EXPECT_GE(expected, scores.mistake_factor * scores.model_bound.at(model_name));
  EXPECT_NEAR(got, expected, 0.01 * expected) << mistake << " on " << model_name;
}

TEST(DeliberateMistakes, SoftmaxScaleWithoutM2) {
  ExpectGeneratorsScore("softmax_scale_without_m2", "kimi-k2", [](auto& model, auto& forgery) {
    const model::YarnScaling& yarn = *model.config.rope_scaling;
    const double m = model::YarnMscale(yarn.factor, yarn.mscale_all_dim);
    ASSERT_GT(m, 1.3);
    for (model::AttentionLayerWeights& layer : model.weights.layers) {
      forgery.ReplaceRows(
          QueryProjection(layer), [](int64_t row) { return row; },
          [&](int64_t) { return static_cast<float>(1 / (m * m)); });
    }
  });
}

TEST(DeliberateMistakes, HalfRotationOfUnpermutedWeights) {
  // Rotating (i, i + d/2) of the stored rows is rotating (2i, 2i + 1) of permuted ones.
  ExpectGeneratorsScore("half_rotation_rope", "kimi-k2", [](auto& model, auto& forgery) {
    const int64_t rope = model.config.qk_rope_head_dim, head = model.config.qk_head_dim();
    const auto unpermute = [rope](int64_t i) { return i % 2 * (rope / 2) + i / 2; };
    for (model::AttentionLayerWeights& layer : model.weights.layers) {
      const auto query_row = [&](int64_t row) {
        const int64_t in_head = row % head, nope = head - rope;
        return in_head < nope ? row : row - in_head + nope + unpermute(in_head - nope);
      };
      const auto kv_row = [&](int64_t row) {
        const int64_t rank = model.config.kv_lora_rank;
        return row < rank ? row : rank + unpermute(row - rank);
      };
      forgery.ReplaceRows(QueryProjection(layer), query_row, One);
      forgery.ReplaceRows(layer.kv_a_proj_with_mqa, kv_row, One);
    }
  });
}

TEST(DeliberateMistakes, GroupMaximumForTopTwoSum) {
  ExpectGeneratorsScore("group_max_instead_of_top2", "v3-groups", [](auto& model, auto&) {
    model.config.topk_method = model::TopkMethod::kGroupLimitedGreedy;
  });
}

TEST(DeliberateMistakes, NoRoutedScalingFactor) {
  ExpectGeneratorsScore("no_routed_scaling_factor", "v2-groups",
                        [](auto& model, auto&) { model.config.routed_scaling_factor = 1; });
}

TEST(DeliberateMistakes, SharedExpertDropped) {
  ExpectGeneratorsScore("shared_expert_dropped", "v3-groups", [](auto& model, auto&) {
    for (model::AttentionLayerWeights& layer : model.weights.layers) {
      if (layer.moe.has_value()) layer.moe->shared_experts.reset();
    }
  });
}

TEST(DeliberateMistakes, LayerDropped) {
  ExpectGeneratorsScore("layer_dropped", "v2-lite",
                        [](auto& model, auto&) { model.weights.layers.pop_back(); });
}

TEST(DeliberateMistakes, InvertedScale) {
  ExpectGeneratorsScore("inverted_scale", "v3-fp8", [](auto& model, auto& forgery) {
    const auto invert = [&](model::MlpWeights& mlp) {
      for (MatrixView* m : {&mlp.gate_proj, &mlp.up_proj, &mlp.down_proj}) forgery.InvertScale(*m);
    };
    for (model::AttentionLayerWeights& layer : model.weights.layers) {
      for (MatrixView* m : {&layer.q_a_proj, &layer.q_b_proj, &layer.kv_a_proj_with_mqa,
                            &layer.kv_b_proj, &layer.o_proj}) {
        forgery.InvertScale(*m);
      }
      if (layer.mlp.has_value()) invert(*layer.mlp);
      if (layer.moe.has_value()) invert(*layer.moe->shared_experts);
    }
    for (auto& experts : model.experts) {
      for (model::ExpertShard& expert : experts) invert(expert.weights);
    }
  });
}

TEST(DeliberateMistakes, YarnOff) {
  ExpectGeneratorsScore("yarn_off", "yarn-long", [](auto& model, auto& forgery) {
    // The softmax scale keeps its m^2: leaving it out is a mistake of its own.
    const model::YarnScaling& yarn = *model.config.rope_scaling;
    const double m = model::YarnMscale(yarn.factor, yarn.mscale_all_dim);
    model.config.rope_scaling.reset();
    for (model::AttentionLayerWeights& layer : model.weights.layers) {
      forgery.ReplaceRows(
          QueryProjection(layer), [](int64_t row) { return row; },
          [&](int64_t) { return static_cast<float>(m * m); });
    }
  });
}

TEST(DeliberateMistakes, KNopeAndVSwapped) {
  ExpectGeneratorsScore("k_nope_and_v_swapped", "v3-groups", [](auto& model, auto& forgery) {
    const int64_t half = model.config.qk_nope_head_dim;
    ASSERT_EQ(half, model.config.v_head_dim);
    for (model::AttentionLayerWeights& layer : model.weights.layers) {
      forgery.ReplaceRows(
          layer.kv_b_proj,
          [&](int64_t row) { return row % (2 * half) < half ? row + half : row - half; }, One);
    }
  });
}

}  // namespace
}  // namespace moebius::kernels::reference
