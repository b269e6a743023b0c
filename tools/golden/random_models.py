"""Writes the small random model directories: config.json and weights in Hugging Face layout.

Gains are chosen so that attention, gate, routed and shared experts each move the logits: a wrong
component must show. Random numbers come from numpy's PCG64, whose stream is fixed for a seed.
"""

import json
import os

import numpy as np
import torch
from safetensors.torch import save_file

from numpy_model import E4M3, F32, QUANT_BLOCK, round_up_to_power_of_two, to_e4m3

VOCAB = 256
BOS, EOS = 0, 1

YARN_40 = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip

COMMON = {
    "vocab_size": VOCAB, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "initializer_range": 0.02, "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "bfloat16",
    "use_cache": True, "moe_layer_freq": 1, "max_position_embeddings": 163840,
}  # fmt: skip

V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "n_shared_experts": 1, "num_nextn_predict_layers": 0,
    "rope_scaling": YARN_40,
}  # fmt: skip

V2 = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 2,
}  # fmt: skip


def dims(hidden, layers, dense, heads, q_lora, kv_lora, nope, rope, v, inter, moe, experts, top_k,
         n_group=1, topk_group=1):  # fmt: skip
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "first_k_dense_replace": dense,
        "num_attention_heads": heads, "num_key_value_heads": heads, "q_lora_rank": q_lora,
        "kv_lora_rank": kv_lora, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope,
        "v_head_dim": v, "intermediate_size": inter, "moe_intermediate_size": moe,
        "n_routed_experts": experts, "num_experts_per_tok": top_k,
        "n_group": n_group, "topk_group": topk_group,
    }  # fmt: skip


# name -> (config, options). shards: number of files. mtp_copies: store the MTP layer's copies of
# embedding and head. gains: replace entries of GAINS. lengths: of the scored sequences, in tokens.
MODELS = {
    "v3-groups": (
        V3 | dims(64, 3, 1, 4, 48, 48, 32, 16, 32, 160, 24, 16, 4, 4, 2)
        | {"num_nextn_predict_layers": 1},
        {"seed": 10, "mtp_copies": True, "gains": {"q": 0.5, "expert": 0.6, "bias": 0.8}},
    ),
    "v2-lite": (
        V2 | dims(96, 3, 1, 3, None, 40, 24, 16, 32, 160, 32, 12, 3)
        | {"topk_method": "greedy", "routed_scaling_factor": 1.0,
           "rope_scaling": YARN_40 | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        {"seed": 1},
    ),
    "v2-groups": (
        V2 | dims(64, 3, 1, 4, 56, 64, 16, 16, 16, 144, 16, 24, 6, 8, 3)
        | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
           "rope_scaling": YARN_40 | {"mscale": 1.0, "mscale_all_dim": 0.707}},
        {"seed": 5, "shards": 2, "gains": {"q": 0.6, "expert": 0.22}},
    ),
    "moonlight": (
        V3 | dims(64, 2, 1, 4, None, 64, 32, 16, 32, 176, 16, 40, 6)
        | {"rms_norm_eps": 1e-5, "rope_theta": 50000, "rope_scaling": None,
           "routed_scaling_factor": 2.446, "max_position_embeddings": 8192},
        {"seed": 3},
    ),
    "kimi-k2": (
        V3 | dims(64, 2, 1, 2, 32, 64, 32, 16, 32, 128, 16, 20, 4)
        | {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2",
           "rms_norm_eps": 1e-5, "rope_theta": 50000, "routed_scaling_factor": 2.827,
           "max_position_embeddings": 131072,
           "rope_scaling": YARN_40 | {"factor": 32, "beta_fast": 1}},
        {"seed": 4},
    ),
    "yarn-long": (
        V3 | dims(64, 2, 1, 4, 32, 64, 24, 24, 32, 128, 24, 8, 2, 2, 1)
        | {"max_position_embeddings": 512, "rope_theta": None, "rope_scaling": None,
           "rope_parameters": {
               "rope_type": "yarn", "rope_theta": 10000, "factor": 8,
               "original_max_position_embeddings": 64, "beta_fast": 4, "beta_slow": 1,
               "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"seed": 6, "lengths": (24, 40, 150, 320)},
    ),
    "v3-fp8": (
        V3 | dims(136, 2, 1, 4, 136, 64, 32, 16, 32, 200, 136, 6, 2, 2, 1)
        | {"num_nextn_predict_layers": 1,
           "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
                                   "quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"seed": 21, "shards": 3, "gains": {"q": 0.5, "expert": 1.6, "bias": 0.8, "gate": 1.0}},
    ),
    "v31-fp8": (
        V3 | dims(136, 2, 1, 2, 48, 48, 32, 16, 32, 136, 136, 4, 2, 2, 1)
        | {"quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
                                   "quant_method": "fp8", "scale_fmt": "ue8m0",
                                   "weight_block_size": [128, 128]}},
        {"seed": 22, "gains": {"q": 0.5, "expert": 1.6, "bias": 0.8, "gate": 1.0}},
    ),
}  # fmt: skip
LENGTHS = (8, 40, 65, 130)

GAINS = {"q": 0.9, "kv_a": 1.0, "kv_b": 1.0, "o": 1.2, "mlp": 1.0, "down": 1.2, "gate": 1.5,
         "head": 3.0, "bias": 0.5, "expert": 1.0}  # fmt: skip


class _Tensors:
    """Draws tensors in a fixed order and stores them as the model's files do."""

    def __init__(self, seed, quantization, gains):
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.fp8, self.gains = quantization is not None, GAINS | gains
        self.power_of_two_scales = self.fp8 and quantization.get("scale_fmt") == "ue8m0"
        self.out = {}

    def _store_bf16(self, name, values):
        self.out[name] = torch.from_numpy(values).to(torch.bfloat16)

    def norm(self, name, size):
        self._store_bf16(name, (1 + 0.2 * self.rng.standard_normal(size)).astype(F32))

    def bf16(self, name, rows, cols, gain):
        values = self.rng.standard_normal((rows, cols)) * (gain / cols**0.5)
        self._store_bf16(name, values.astype(F32))

    def linear(self, name, rows, cols, gain):
        if not self.fp8:
            return self.bf16(name, rows, cols, gain)
        values = (self.rng.standard_normal((rows, cols)) * (gain / cols**0.5)).astype(F32)
        # Blocks get different magnitudes, so that a scale taken from the wrong block shows.
        block_rows, block_cols = -(-rows // QUANT_BLOCK), -(-cols // QUANT_BLOCK)
        magnitude = self.rng.uniform(0.5, 1.5, (block_rows, block_cols)).astype(F32)
        codes = np.empty((rows, cols), np.uint8)
        scales = np.empty((block_rows, block_cols), F32)
        for i in range(block_rows):
            for j in range(block_cols):
                block = (slice(i * 128, min(i * 128 + 128, rows)),
                         slice(j * 128, min(j * 128 + 128, cols)))  # fmt: skip
                values[block] *= magnitude[i, j]
                scales[i, j] = np.abs(values[block]).max() / F32(448)
                if self.power_of_two_scales:
                    scales[i, j] = round_up_to_power_of_two(scales[i, j])
                codes[block] = to_e4m3(values[block] / scales[i, j])
        assert not np.isnan(E4M3[codes]).any()
        self.out[name] = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        self.out[name + "_scale_inv"] = torch.from_numpy(scales)

    def f32(self, name, values):
        self.out[name] = torch.from_numpy(values.astype(F32))


def _mlp(t, prefix, hidden, inter, out_gain):
    t.linear(prefix + "gate_proj.weight", inter, hidden, t.gains["mlp"])
    t.linear(prefix + "up_proj.weight", inter, hidden, t.gains["mlp"])
    t.linear(prefix + "down_proj.weight", hidden, inter, t.gains["down"] * out_gain)


def _layer(t, c, layer, moe):
    p, d = f"model.layers.{layer}.", c["hidden_size"]
    heads, dn, dr = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    dv, dc, dq = c["v_head_dim"], c["kv_lora_rank"], c["q_lora_rank"]
    t.norm(p + "input_layernorm.weight", d)
    t.norm(p + "post_attention_layernorm.weight", d)
    a = p + "self_attn."
    if dq is None:
        t.linear(a + "q_proj.weight", heads * (dn + dr), d, t.gains["q"])
    else:
        t.linear(a + "q_a_proj.weight", dq, d, 1.0)
        t.norm(a + "q_a_layernorm.weight", dq)
        t.linear(a + "q_b_proj.weight", heads * (dn + dr), dq, t.gains["q"])
    t.linear(a + "kv_a_proj_with_mqa.weight", dc + dr, d, t.gains["kv_a"])
    t.norm(a + "kv_a_layernorm.weight", dc)
    t.linear(a + "kv_b_proj.weight", heads * (dn + dv), dc, t.gains["kv_b"])
    t.linear(a + "o_proj.weight", d, heads * dv, t.gains["o"])
    m = p + "mlp."
    if not moe:
        _mlp(t, m, d, c["intermediate_size"], 2.0)
        return
    experts, inter = c["n_routed_experts"], c["moe_intermediate_size"]
    t.bf16(m + "gate.weight", experts, d, t.gains["gate"])
    if c["topk_method"] == "noaux_tc":
        bias = t.rng.uniform(-0.5, 0.5, experts) * t.gains["bias"] * 2
        t.f32(m + "gate.e_score_correction_bias", bias)
    for expert in range(experts):
        _mlp(t, f"{m}experts.{expert}.", d, inter, t.gains["expert"])
    _mlp(t, m + "shared_experts.", d, inter * c["n_shared_experts"], 1.0)


def write_model(directory, name):
    config, options = MODELS[name]
    config = {key: value for key, value in config.items()
              if value is not None or key in ("q_lora_rank", "rope_scaling")}  # fmt: skip
    if "rope_parameters" in config:
        del config["rope_scaling"]
    t = _Tensors(options["seed"], config.get("quantization_config"), options.get("gains", {}))
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    t.bf16("model.embed_tokens.weight", VOCAB, d, d**0.5)
    for layer in range(layers):
        _layer(t, config, layer, layer >= config["first_k_dense_replace"])
    t.norm("model.norm.weight", d)
    t.bf16("lm_head.weight", VOCAB, d, t.gains["head"])
    if config.get("num_nextn_predict_layers"):
        p = f"model.layers.{layers}."
        t.norm(p + "enorm.weight", d)
        t.norm(p + "hnorm.weight", d)
        t.bf16(p + "eh_proj.weight", d, 2 * d, 1.0)
        _layer(t, config, layers, True)
        t.norm(p + "shared_head.norm.weight", d)
        if options.get("mtp_copies"):
            t.out[p + "embed_tokens.weight"] = t.out["model.embed_tokens.weight"].clone()
            t.out[p + "shared_head.head.weight"] = t.out["lm_head.weight"].clone()

    os.makedirs(directory, exist_ok=True)
    for file in os.listdir(directory):
        os.remove(os.path.join(directory, file))
    with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as stream:
        json.dump(config, stream, indent=2)
        stream.write("\n")
    shards = options.get("shards", 1)
    if shards == 1:
        save_file(t.out, os.path.join(directory, "model.safetensors"), {"format": "pt"})
        return
    # Round robin in order of creation: an FP8 weight and its scale land in different shards.
    names = list(t.out)
    weight_map, total = {}, 0
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:06d}.safetensors"
        part = {n: t.out[n] for n in names[shard::shards]}
        save_file(part, os.path.join(directory, file), {"format": "pt"})
        weight_map |= {n: file for n in part}
        total += sum(v.numel() * v.element_size() for v in part.values())
    with open(os.path.join(directory, "model.safetensors.index.json"), "w", encoding="utf-8") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f, indent=0)
        f.write("\n")
