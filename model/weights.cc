#include "model/weights.h"

#include <cmath>
#include <cstring>
#include <new>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/float_formats.h"
#include "base/status_macros.h"

namespace moebius::model {
namespace {

constexpr std::align_val_t kAlignment{64};

// Loads tensors of one role; every error names file, tensor and what is wrong with it.
class Loader {
 public:
  Loader(const Checkpoint& checkpoint, const ModelConfig& config, WeightStorage& storage)
      : checkpoint_(checkpoint), config_(config), storage_(storage) {}

  enum class MatrixKind {
    kLinear,  // F8_E4M3 with scale (FP8 models) or BF16
    kExpert,  // F8_E4M3 exactly in FP8 models
    kPlain,   // BF16: embedding, head, eh_proj
    kGate,    // BF16, or F32 that BF16 can hold
  };

  absl::StatusOr<MatrixView> Matrix(const std::string& name, int64_t rows, int64_t cols,
                                    MatrixKind kind) {
    ASSIGN_OR_RETURN(const Checkpoint::Entry entry, Checked(name, {rows, cols}));
    const std::optional<DType> dtype = ToDType(entry.info->dtype);
    bool accepted = false;
    const char* expected = "";
    switch (kind) {
      case MatrixKind::kLinear:
        accepted = dtype == DType::kBf16 || (dtype == DType::kE4m3 && config_.quantization);
        expected = config_.quantization ? "F8_E4M3 or BF16"
                                        : "BF16 (the config has no quantization_config)";
        break;
      case MatrixKind::kExpert:
        accepted = dtype == (config_.quantization ? DType::kE4m3 : DType::kBf16);
        expected = config_.quantization ? "F8_E4M3, as quantization_config says"
                                        : "BF16 (the config has no quantization_config)";
        break;
      case MatrixKind::kPlain:
        accepted = dtype == DType::kBf16;
        expected = "BF16";
        break;
      case MatrixKind::kGate:
        accepted = dtype == DType::kBf16 || dtype == DType::kF32;
        expected = "BF16 or F32";
        break;
    }
    if (!accepted) {
      return Bad(entry, absl::StrCat(
                            "dtype ", Name(entry.info->dtype), ", expected ", expected,
                            dtype == DType::kF32 ? "; `moebius convert --to bf16` makes it" : ""));
    }
    MatrixView view;
    view.dtype = *dtype;
    view.rows = rows;
    view.cols = cols;
    if (kind == MatrixKind::kGate && dtype == DType::kF32) {
      view.dtype = DType::kBf16;
      ASSIGN_OR_RETURN(view.data, NarrowedData(entry));
      return view;
    }
    ASSIGN_OR_RETURN(view.data, AlignedData(entry, SizeOf(*dtype)));
    const std::string scale_name = absl::StrCat(name, "_scale_inv");
    if (view.dtype == DType::kE4m3) {
      ASSIGN_OR_RETURN(view.scale_inv,
                       Scales(scale_name, CeilDiv(rows, kQuantBlock), CeilDiv(cols, kQuantBlock)));
    } else if (const Checkpoint::Entry scale = checkpoint_.Find(scale_name); scale.file) {
      return Bad(scale, absl::StrCat("present, but \"", name, "\" is ", Name(entry.info->dtype)));
    }
    return view;
  }

  // A vector as F32, from BF16 or F32.
  absl::StatusOr<absl::Span<const float>> Vector(const std::string& name, int64_t size) {
    ASSIGN_OR_RETURN(const Checkpoint::Entry entry, Checked(name, {size}));
    ASSIGN_OR_RETURN(const absl::Span<const std::byte> bytes, entry.file->Bytes(*entry.info));
    float* out = reinterpret_cast<float*>(storage_.Allocate(size * sizeof(float)));
    if (entry.info->dtype == TensorDType::kF32) {
      std::memcpy(out, bytes.data(), bytes.size());
    } else if (entry.info->dtype == TensorDType::kBf16) {
      for (int64_t i = 0; i < size; ++i) {
        Bf16 value;
        std::memcpy(&value, bytes.data() + i * sizeof(Bf16), sizeof(Bf16));
        out[i] = ToFloat(value);
      }
    } else {
      return Bad(entry, absl::StrCat("dtype ", Name(entry.info->dtype), ", expected BF16 or F32"));
    }
    return absl::Span<const float>(out, size);
  }

  absl::StatusOr<MlpWeights> Mlp(const std::string& prefix, int64_t intermediate, MatrixKind kind) {
    const int64_t hidden = config_.hidden_size;
    MlpWeights mlp;
    ASSIGN_OR_RETURN(mlp.gate_proj,
                     Matrix(prefix + "gate_proj.weight", intermediate, hidden, kind));
    ASSIGN_OR_RETURN(mlp.up_proj, Matrix(prefix + "up_proj.weight", intermediate, hidden, kind));
    ASSIGN_OR_RETURN(mlp.down_proj,
                     Matrix(prefix + "down_proj.weight", hidden, intermediate, kind));
    return mlp;
  }

  absl::StatusOr<MoeLayerWeights> Moe(const std::string& prefix, bool with_shared_experts) {
    MoeLayerWeights moe;
    ASSIGN_OR_RETURN(moe.gate, Matrix(prefix + "gate.weight", config_.n_routed_experts,
                                      config_.hidden_size, MatrixKind::kGate));
    if (config_.topk_method == TopkMethod::kNoauxTc) {
      const std::string bias = prefix + "gate.e_score_correction_bias";
      ASSIGN_OR_RETURN(moe.e_score_correction_bias, Vector(bias, config_.n_routed_experts));
      for (const float value : moe.e_score_correction_bias) {
        if (!std::isfinite(value)) return Bad(checkpoint_.Find(bias), "holds a value not finite");
      }
    }
    if (with_shared_experts && config_.n_shared_experts > 0) {
      ASSIGN_OR_RETURN(
          moe.shared_experts,
          Mlp(prefix + "shared_experts.", config_.shared_intermediate_size(), MatrixKind::kLinear));
    }
    return moe;
  }

  absl::StatusOr<AttentionLayerWeights> Layer(int64_t layer) {
    const ModelConfig& c = config_;
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const std::string attention = prefix + "self_attn.";
    const auto linear = [&](const char* name, int64_t rows, int64_t cols) {
      return Matrix(attention + name + ".weight", rows, cols, MatrixKind::kLinear);
    };
    AttentionLayerWeights w;
    w.layer = LayerId(static_cast<uint32_t>(layer));
    ASSIGN_OR_RETURN(w.input_layernorm, Vector(prefix + "input_layernorm.weight", c.hidden_size));
    ASSIGN_OR_RETURN(w.post_attention_layernorm,
                     Vector(prefix + "post_attention_layernorm.weight", c.hidden_size));
    const int64_t q_rows = c.num_attention_heads * c.qk_head_dim();
    if (c.q_lora_rank) {
      ASSIGN_OR_RETURN(w.q_a_proj, linear("q_a_proj", *c.q_lora_rank, c.hidden_size));
      ASSIGN_OR_RETURN(w.q_a_layernorm, Vector(attention + "q_a_layernorm.weight", *c.q_lora_rank));
      ASSIGN_OR_RETURN(w.q_b_proj, linear("q_b_proj", q_rows, *c.q_lora_rank));
    } else {
      ASSIGN_OR_RETURN(w.q_proj, linear("q_proj", q_rows, c.hidden_size));
    }
    ASSIGN_OR_RETURN(w.kv_a_proj_with_mqa,
                     linear("kv_a_proj_with_mqa", c.latent_dim(), c.hidden_size));
    ASSIGN_OR_RETURN(w.kv_a_layernorm, Vector(attention + "kv_a_layernorm.weight", c.kv_lora_rank));
    ASSIGN_OR_RETURN(
        w.kv_b_proj,
        linear("kv_b_proj", c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim),
               c.kv_lora_rank));
    ASSIGN_OR_RETURN(w.o_proj,
                     linear("o_proj", c.hidden_size, c.num_attention_heads * c.v_head_dim));
    if (c.is_moe_layer(layer)) {
      ASSIGN_OR_RETURN(w.moe, Moe(prefix + "mlp.", true));
    } else {
      ASSIGN_OR_RETURN(w.mlp, Mlp(prefix + "mlp.", c.intermediate_size, MatrixKind::kLinear));
    }
    return w;
  }

  absl::StatusOr<MtpLayerWeights> Mtp(int64_t layer) {
    const int64_t hidden = config_.hidden_size;
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    MtpLayerWeights w;
    ASSIGN_OR_RETURN(w.enorm, Vector(prefix + "enorm.weight", hidden));
    ASSIGN_OR_RETURN(w.hnorm, Vector(prefix + "hnorm.weight", hidden));
    ASSIGN_OR_RETURN(w.eh_proj,
                     Matrix(prefix + "eh_proj.weight", hidden, 2 * hidden, MatrixKind::kPlain));
    ASSIGN_OR_RETURN(w.shared_head_norm, Vector(prefix + "shared_head.norm.weight", hidden));
    ASSIGN_OR_RETURN(w.layer, Layer(layer));
    return w;
  }

 private:
  static absl::Status Bad(const Checkpoint::Entry& entry, absl::string_view problem) {
    return absl::InvalidArgumentError(
        absl::StrCat(entry.file->path(), ": tensor \"", entry.info->name, "\": ", problem));
  }

  absl::StatusOr<Checkpoint::Entry> Checked(const std::string& name,
                                            const std::vector<int64_t>& shape) {
    const Checkpoint::Entry entry = checkpoint_.Find(name);
    if (entry.file == nullptr) {
      return absl::NotFoundError(
          absl::StrCat(checkpoint_.dir(), ": tensor \"", name, "\" is missing"));
    }
    if (entry.info->shape != shape) {
      TensorInfo expected = *entry.info;
      expected.shape = shape;
      return Bad(entry, absl::StrCat("is ", Describe(*entry.info), ", the config implies ",
                                     Describe(expected)));
    }
    storage_.AddTensorName(name);
    return entry;
  }

  absl::StatusOr<const std::byte*> AlignedData(const Checkpoint::Entry& entry, int64_t alignment) {
    ASSIGN_OR_RETURN(const absl::Span<const std::byte> bytes, entry.file->Bytes(*entry.info));
    if (reinterpret_cast<uintptr_t>(bytes.data()) % static_cast<uintptr_t>(alignment) == 0) {
      return bytes.data();
    }
    std::byte* copy = storage_.Allocate(bytes.size());
    std::memcpy(copy, bytes.data(), bytes.size());
    return const_cast<const std::byte*>(copy);
  }

  // An F32 tensor as BF16. The gate's rounding decides which experts are chosen, so a value that
  // BF16 cannot hold is refused rather than rounded.
  absl::StatusOr<const std::byte*> NarrowedData(const Checkpoint::Entry& entry) {
    ASSIGN_OR_RETURN(const absl::Span<const std::byte> bytes, entry.file->Bytes(*entry.info));
    const size_t count = bytes.size() / sizeof(float);
    std::byte* copy = storage_.Allocate(count * sizeof(Bf16));
    for (size_t i = 0; i < count; ++i) {
      float value;
      std::memcpy(&value, bytes.data() + i * sizeof(float), sizeof(float));
      const Bf16 narrow = ToBf16(value);
      if (ToFloat(narrow) != value) {
        return Bad(entry, absl::StrCat("dtype F32 with element ", i, " = ", value,
                                       ", which BF16 cannot hold: not supported for a gate"));
      }
      std::memcpy(copy + i * sizeof(Bf16), &narrow, sizeof(Bf16));
    }
    return const_cast<const std::byte*>(copy);
  }

  absl::StatusOr<const float*> Scales(const std::string& name, int64_t rows, int64_t cols) {
    ASSIGN_OR_RETURN(const Checkpoint::Entry entry, Checked(name, {rows, cols}));
    if (entry.info->dtype != TensorDType::kF32) {
      return Bad(entry, absl::StrCat("dtype ", Name(entry.info->dtype), ", expected F32"));
    }
    ASSIGN_OR_RETURN(const absl::Span<const std::byte> bytes, entry.file->Bytes(*entry.info));
    float* out = reinterpret_cast<float*>(storage_.Allocate(bytes.size()));
    std::memcpy(out, bytes.data(), bytes.size());
    for (int64_t i = 0; i < rows * cols; ++i) {
      if (!(std::isfinite(out[i]) && out[i] > 0)) {
        return Bad(entry, absl::StrCat("scale [", i / cols, ", ", i % cols, "] is ", out[i],
                                       ", expected a finite value above 0"));
      }
    }
    return const_cast<const float*>(out);
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  WeightStorage& storage_;
};

int64_t MatrixBytes(const MatrixView& matrix) {
  int64_t bytes = matrix.bytes();
  if (matrix.scale_inv != nullptr) {
    bytes += CeilDiv(matrix.rows, kQuantBlock) * CeilDiv(matrix.cols, kQuantBlock) *
             static_cast<int64_t>(sizeof(float));
  }
  return bytes;
}

}  // namespace

std::byte* WeightStorage::Allocate(size_t bytes) {
  const size_t rounded = (bytes + 63) / 64 * 64;
  std::unique_ptr<std::byte, Deleter> piece(
      static_cast<std::byte*>(::operator new(rounded == 0 ? 64 : rounded, kAlignment)));
  std::memset(piece.get(), 0, rounded);
  bytes_ += rounded;
  pieces_.push_back(std::move(piece));
  return pieces_.back().get();
}

void WeightStorage::Deleter::operator()(std::byte* data) const {
  ::operator delete(data, kAlignment);
}

int64_t ExpertShard::bytes() const {
  return MatrixBytes(weights.gate_proj) + MatrixBytes(weights.up_proj) +
         MatrixBytes(weights.down_proj);
}

absl::StatusOr<AttentionWorkerWeights> LoadAttentionWorkerWeights(const Checkpoint& checkpoint,
                                                                  const ModelConfig& config) {
  AttentionWorkerWeights w;
  Loader loader(checkpoint, config, w.storage);
  ASSIGN_OR_RETURN(w.embed_tokens, loader.Matrix("model.embed_tokens.weight", config.vocab_size,
                                                 config.hidden_size, Loader::MatrixKind::kPlain));
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    ASSIGN_OR_RETURN(AttentionLayerWeights weights, loader.Layer(layer));
    w.layers.push_back(std::move(weights));
  }
  ASSIGN_OR_RETURN(w.norm, loader.Vector("model.norm.weight", config.hidden_size));
  if (config.tie_word_embeddings) {
    w.lm_head = w.embed_tokens;
  } else {
    ASSIGN_OR_RETURN(w.lm_head, loader.Matrix("lm_head.weight", config.vocab_size,
                                              config.hidden_size, Loader::MatrixKind::kPlain));
  }
  for (int64_t module = 0; module < config.num_nextn_predict_layers; ++module) {
    if (!HasMtpLayer(checkpoint, config, module)) break;
    ASSIGN_OR_RETURN(MtpLayerWeights mtp, loader.Mtp(config.num_hidden_layers + module));
    w.mtp.push_back(std::move(mtp));
  }
  return w;
}

absl::StatusOr<ExpertShard> LoadExpertShard(const Checkpoint& checkpoint, const ModelConfig& config,
                                            LayerId layer, ExpertId expert) {
  if (layer.value() >= config.total_layers() || !config.is_moe_layer(layer.value())) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer.value(), " is not a mixture-of-experts layer"));
  }
  if (expert.value() >= config.n_routed_experts) {
    return absl::InvalidArgumentError(absl::StrCat("expert ", expert.value(), " of layer ",
                                                   layer.value(), ": the model has ",
                                                   config.n_routed_experts));
  }
  ExpertShard shard;
  shard.layer = layer;
  shard.expert = expert;
  Loader loader(checkpoint, config, shard.storage);
  ASSIGN_OR_RETURN(
      shard.weights,
      loader.Mlp(absl::StrCat("model.layers.", layer.value(), ".mlp.experts.", expert.value(), "."),
                 config.moe_intermediate_size, Loader::MatrixKind::kExpert));
  return shard;
}

absl::StatusOr<MoeLayerWeights> LoadGate(const Checkpoint& checkpoint, const ModelConfig& config,
                                         LayerId layer, WeightStorage& storage) {
  if (layer.value() >= config.total_layers() || !config.is_moe_layer(layer.value())) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer.value(), " is not a mixture-of-experts layer"));
  }
  Loader loader(checkpoint, config, storage);
  return loader.Moe(absl::StrCat("model.layers.", layer.value(), ".mlp."), false);
}

bool HasMtpLayer(const Checkpoint& checkpoint, const ModelConfig& config, int64_t module) {
  return module < config.num_nextn_predict_layers &&
         checkpoint.HasPrefix(
             absl::StrCat("model.layers.", config.num_hidden_layers + module, "."));
}

std::vector<LayerId> MoeLayers(const Checkpoint& checkpoint, const ModelConfig& config) {
  std::vector<LayerId> layers;
  for (int64_t layer = 0; layer < config.total_layers(); ++layer) {
    if (!config.is_moe_layer(layer)) continue;
    if (config.is_mtp_layer(layer) &&
        !HasMtpLayer(checkpoint, config, layer - config.num_hidden_layers)) {
      break;
    }
    layers.push_back(LayerId(static_cast<uint32_t>(layer)));
  }
  return layers;
}

}  // namespace moebius::model
