"""A second, independent implementation of the DeepSeek-V3 family in plain numpy, float32.

It shares no code with transformers or with the C++ kernels: it reads the safetensors file itself,
uses the naive (non-absorbed) form of attention, and rotates interleaved pairs directly. Three uses:

  * the MTP layer: its results are the golden ones (generate.py also holds them against
    transformers' MtpLayer where the installed version has it);
  * the quantising reference of FP8 models: `arithmetic="e4m3_experts"` rounds what the routed
    experts read to e4m3 codes in 1x128 blocks and leaves everything else in float32;
  * deliberate mistakes: names in MISTAKES switch on one wrong formula each, so that generate.py
    can state how far from the truth each of them lands.

`arithmetic="bf16"` rounds activations where a bfloat16 engine rounds them; it is an estimate used
to choose the random weights and prompts, not a specification. `noise_seed` then adds a random
relative error of up to 2^-9 to every rounding: a continuation that survives several such draws does
not hang on how one engine happens to round.
"""

import json
import math
import os

import numpy as np

F32 = np.float32
LATENT_NORM_EPS = 1e-6
QUANT_BLOCK = 128

MISTAKES = (
    "softmax_scale_without_m2",
    "half_rotation_rope",
    "bias_in_weights",
    "group_max_instead_of_top2",
    "no_routed_scaling_factor",
    "shared_expert_dropped",
    "layer_dropped",
    "inverted_scale",
    "yarn_off",
    "k_nope_and_v_swapped",
)


# ---------------------------------------------------------------------------------- number formats


def bf16_to_f32(bits):
    return (bits.astype(np.uint32) << 16).view(F32)


def round_bf16(x):
    """float32 rounded to the nearest bfloat16, ties to even, as float32."""
    bits = np.ascontiguousarray(x, F32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(F32)


def _e4m3_table():
    table = np.zeros(256, F32)
    for code in range(256):
        exponent, mantissa = (code >> 3) & 15, code & 7
        if code & 0x7F == 0x7F:
            value = math.nan
        elif exponent == 0:
            value = mantissa / 8 * 2.0**-6
        else:
            value = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        table[code] = -value if code & 0x80 else value
    return table


E4M3 = _e4m3_table()
_POSITIVE = E4M3[:127].astype(np.float64)
_MIDPOINTS = (_POSITIVE[:-1] + _POSITIVE[1:]) / 2


def to_e4m3(x):
    """Codes of the nearest e4m3 values, ties to the even code, saturating at 448."""
    magnitude = np.abs(x.astype(np.float64))
    below = np.searchsorted(_MIDPOINTS, magnitude, side="left")  # ties go down ...
    tie = (below < len(_MIDPOINTS)) & (magnitude == _MIDPOINTS[np.minimum(below, 125)])
    code = below + (tie & (below % 2 == 1))  # ... unless the lower code is odd
    return (code | (np.signbit(x).astype(np.int64) << 7)).astype(np.uint8)


def round_up_to_power_of_two(x):
    """What the format ue8m0 holds: 2^ceil(log2(x)), exactly."""
    mantissa, exponent = np.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    return np.ldexp(F32(1), np.where(mantissa == 0.5, exponent - 1, exponent)).astype(F32)


def fake_quantize_rows(x, power_of_two_scales=False):
    """Each row in blocks of 128: s = max(amax, 1e-4) / 448, value = e4m3(x / s) * s."""
    out = np.empty_like(x)
    for begin in range(0, x.shape[1], QUANT_BLOCK):
        block = x[:, begin : begin + QUANT_BLOCK]
        amax = np.maximum(np.abs(block).max(axis=1, keepdims=True), F32(1e-4))
        scale = (amax / F32(448)).astype(F32)
        if power_of_two_scales:
            scale = round_up_to_power_of_two(scale)
        out[:, begin : begin + QUANT_BLOCK] = E4M3[to_e4m3(block / scale)] * scale
    return out


# ------------------------------------------------------------------------------------ model files


def read_safetensors(path):
    """{name: (dtype string, array of raw or float values)}; BF16 as uint16, F8_E4M3 as uint8."""
    raw = np.fromfile(path, np.uint8)
    header_bytes = int(raw[:8].view(np.uint64)[0])
    header = json.loads(raw[8 : 8 + header_bytes].tobytes())
    storage = {"F32": np.float32, "BF16": np.uint16, "F8_E4M3": np.uint8}
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        data = raw[8 + header_bytes + begin : 8 + header_bytes + end].copy()
        tensors[name] = (entry["dtype"], data.view(storage[entry["dtype"]]).reshape(entry["shape"]))
    return tensors


def load_weights(directory, invert_scale=False):
    """All tensors of a model directory in float32, FP8 ones multiplied by their block scales."""
    index = os.path.join(directory, "model.safetensors.index.json")
    files = ["model.safetensors"]
    if os.path.exists(index):
        with open(index, encoding="utf-8") as stream:
            files = sorted(set(json.load(stream)["weight_map"].values()))
    raw = {}
    for name in files:
        raw.update(read_safetensors(os.path.join(directory, name)))
    weights = {}
    for name, (dtype, data) in raw.items():
        if name.endswith("_scale_inv"):
            continue
        if dtype == "BF16":
            weights[name] = bf16_to_f32(data)
        elif dtype == "F32":
            weights[name] = data
        else:
            scale = raw[name + "_scale_inv"][1]
            if invert_scale:
                scale = (1 / scale).astype(F32)
            rows, cols = data.shape
            spread = scale.repeat(QUANT_BLOCK, 0)[:rows].repeat(QUANT_BLOCK, 1)[:, :cols]
            weights[name] = (E4M3[data] * spread).astype(F32)
    return weights


def rope_settings(config):
    """(theta, scaling dict or None) from either spelling of the file."""
    new = config.get("rope_parameters")
    if new:
        kind = new.get("rope_type", "default")
        return new["rope_theta"], (new if kind == "yarn" else None)
    return config["rope_theta"], config.get("rope_scaling")


# ---------------------------------------------------------------------------------------- the model


def yarn_m(factor, mscale):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


class NumpyModel:
    def __init__(self, directory, mistakes=(), arithmetic="float32", noise_seed=None):
        assert set(mistakes) <= set(MISTAKES)
        with open(os.path.join(directory, "config.json"), encoding="utf-8") as stream:
            self.config = json.load(stream)
        self.mistakes = set(mistakes)
        self.arithmetic = arithmetic
        self.noise = None if noise_seed is None else np.random.Generator(np.random.PCG64(noise_seed))
        self.weights = load_weights(directory, "inverted_scale" in self.mistakes)
        self.fp8 = "quantization_config" in self.config
        quantization = self.config.get("quantization_config", {})
        self.power_of_two_scales = quantization.get("scale_fmt") == "ue8m0"
        c = self.config
        self.dn, self.dr = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        self.dv, self.dc, self.heads = c["v_head_dim"], c["kv_lora_rank"], c["num_attention_heads"]
        self.inv_freq, self.cos_sin_multiplier, self.softmax_scale = self._rope_constants()
        self.router_margin = math.inf  # smallest gap seen between the last chosen and next expert

    def _rope_constants(self):
        theta, scaling = rope_settings(self.config)
        half = self.dr // 2
        base = np.array([theta ** (-2 * i / self.dr) for i in range(half)])
        scale = (self.dn + self.dr) ** -0.5
        if not scaling:
            return base.astype(F32), 1.0, scale
        factor, length = scaling["factor"], scaling["original_max_position_embeddings"]

        def dim(rotations):
            return self.dr * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dim(scaling.get("beta_fast", 32))), 0)
        high = min(math.ceil(dim(scaling.get("beta_slow", 1))), self.dr - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(half) - low) / (high - low), 0, 1)
        frequencies = base * (1 - ramp) + base / factor * ramp
        all_dim = scaling.get("mscale_all_dim", 0)
        multiplier = yarn_m(factor, scaling.get("mscale", 1)) / yarn_m(factor, all_dim)
        if "yarn_off" in self.mistakes:
            frequencies, multiplier = base, 1.0
        if all_dim and "softmax_scale_without_m2" not in self.mistakes:
            scale *= yarn_m(factor, all_dim) ** 2
        return frequencies.astype(F32), multiplier, scale

    # Rounds an activation where the chosen arithmetic stores it.
    def _r(self, x):
        if self.arithmetic != "bf16":
            return x
        if self.noise is not None:
            x = x * (1 + 2.0**-9 * self.noise.uniform(-1, 1, x.shape)).astype(F32)
        return round_bf16(x)

    def _norm(self, x, weight, eps):
        variance = np.mean(np.square(x), axis=-1, keepdims=True, dtype=F32)
        return self._r((x / np.sqrt(variance + F32(eps)) * weight).astype(F32))

    def _linear(self, x, name):
        return self._r(x @ self.weights[name + ".weight"].T)

    def _rope(self, x):
        """x: [tokens, ..., dr], token t at position t."""
        angle = np.arange(x.shape[0], dtype=F32)[:, None] * self.inv_freq
        cos = (np.cos(angle) * F32(self.cos_sin_multiplier)).astype(F32)
        sin = (np.sin(angle) * F32(self.cos_sin_multiplier)).astype(F32)
        shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (self.dr // 2,)
        cos, sin = cos.reshape(shape), sin.reshape(shape)
        out = np.empty_like(x)
        if "half_rotation_rope" in self.mistakes:
            half = self.dr // 2
            first, second = x[..., :half], x[..., half:]
            out[..., :half] = first * cos - second * sin
            out[..., half:] = second * cos + first * sin
        else:
            even, odd = x[..., 0::2], x[..., 1::2]
            out[..., 0::2] = even * cos - odd * sin
            out[..., 1::2] = even * sin + odd * cos
        return self._r(out)

    def _attention(self, x, prefix):
        tokens = x.shape[0]
        w = self.weights
        if prefix + "q_proj.weight" in w:
            q = self._linear(x, prefix + "q_proj")
        else:
            cq = self._linear(x, prefix + "q_a_proj")
            cq = self._norm(cq, w[prefix + "q_a_layernorm.weight"], LATENT_NORM_EPS)
            q = self._linear(cq, prefix + "q_b_proj")
        q = q.reshape(tokens, self.heads, self.dn + self.dr)
        kv = self._linear(x, prefix + "kv_a_proj_with_mqa")
        latent = self._norm(kv[:, : self.dc], w[prefix + "kv_a_layernorm.weight"], LATENT_NORM_EPS)
        k_rope = self._rope(kv[:, self.dc :])
        q_rope = self._rope(q[..., self.dn :])
        expanded = self._linear(latent, prefix + "kv_b_proj")
        expanded = expanded.reshape(tokens, self.heads, self.dn + self.dv)
        if "k_nope_and_v_swapped" in self.mistakes:
            v, k_nope = expanded[..., : self.dv], expanded[..., self.dv :]
        else:
            k_nope, v = expanded[..., : self.dn], expanded[..., self.dn :]
        out = np.empty((tokens, self.heads, self.dv), F32)
        future = np.triu(np.ones((tokens, tokens), bool), 1)
        for h in range(self.heads):
            score = q[:, h, : self.dn] @ k_nope[:, h].T + q_rope[:, h] @ k_rope.T
            score = np.where(future, F32(-np.inf), score * F32(self.softmax_scale))
            p = np.exp(score - score.max(axis=1, keepdims=True))
            out[:, h] = (p / p.sum(axis=1, keepdims=True)) @ v[:, h]
        return self._linear(self._r(out.reshape(tokens, -1)), prefix + "o_proj")

    def _mlp(self, x, prefix, quantize=False):
        if quantize:
            x = fake_quantize_rows(x, self.power_of_two_scales)
        w = self.weights
        gate = x @ w[prefix + "gate_proj.weight"].T
        up = x @ w[prefix + "up_proj.weight"].T
        inner = self._r((gate / (1 + np.exp(-gate)) * up).astype(F32))
        if quantize:
            inner = fake_quantize_rows(inner, self.power_of_two_scales)
        return self._linear(inner, prefix + "down_proj")

    def route(self, x, prefix):
        """([tokens, K] expert ids, [tokens, K] weights), K in descending order of the choice."""
        c = self.config
        k, groups = c["num_experts_per_tok"], c.get("n_group") or 1
        z = x @ self.weights[prefix + "gate.weight"].T
        experts = z.shape[1]
        sigmoid = c.get("scoring_func", "softmax") == "sigmoid"
        if sigmoid:
            score = 1 / (1 + np.exp(-z))
            choice = score + self.weights[prefix + "gate.e_score_correction_bias"]
        else:
            e = np.exp(z - z.max(axis=1, keepdims=True))
            score = choice = e / e.sum(axis=1, keepdims=True)
        if c["topk_method"] != "greedy" and groups > 1:
            members = choice.reshape(-1, groups, experts // groups)
            if sigmoid and "group_max_instead_of_top2" not in self.mistakes:
                group_score = np.sort(members, axis=2)[..., -2:].sum(axis=2)
            else:
                group_score = members.max(axis=2)
            order = np.argsort(-group_score, axis=1, kind="stable")
            kept = np.zeros_like(group_score, bool)
            np.put_along_axis(kept, order[:, : c["topk_group"]], True, axis=1)
            ranked = np.take_along_axis(group_score, order, axis=1)
            gap = ranked[:, c["topk_group"] - 1] - ranked[:, c["topk_group"]]
            self.router_margin = min(self.router_margin, float(gap.min()))
            masked = F32(-np.inf) if sigmoid else F32(0)
            choice = np.where(kept.repeat(experts // groups, axis=1), choice, masked)
        order = np.argsort(-choice, axis=1, kind="stable")
        ranked = np.take_along_axis(choice, order, axis=1)
        self.router_margin = min(self.router_margin, float((ranked[:, k - 1] - ranked[:, k]).min()))
        chosen = order[:, :k]
        source = choice if "bias_in_weights" in self.mistakes and sigmoid else score
        weight = np.take_along_axis(source, chosen, axis=1)
        if c.get("norm_topk_prob") and sigmoid:
            weight = weight / (weight.sum(axis=1, keepdims=True) + F32(1e-20))
        if "no_routed_scaling_factor" not in self.mistakes:
            weight = weight * F32(c["routed_scaling_factor"])
        return chosen, weight.astype(F32)

    def _moe(self, x, prefix):
        chosen, weight = self.route(x, prefix)
        quantize = self.fp8 and self.arithmetic in ("e4m3_experts", "bf16")
        routed = np.zeros_like(x)
        for expert in np.unique(chosen):
            rows, slots = np.nonzero(chosen == expert)
            y = self._mlp(x[rows], f"{prefix}experts.{expert}.", quantize)
            routed[rows] += y * weight[rows, slots][:, None]
        routed = self._r(routed)
        shared = prefix + "shared_experts."
        if shared + "up_proj.weight" in self.weights and (
            "shared_expert_dropped" not in self.mistakes
        ):
            routed = self._r(routed + self._mlp(x, shared))
        return routed

    def _layer(self, h, layer):
        prefix, eps = f"model.layers.{layer}.", self.config["rms_norm_eps"]
        w = self.weights
        x = self._norm(h, w[prefix + "input_layernorm.weight"], eps)
        h = self._r(h + self._attention(x, prefix + "self_attn."))
        x = self._norm(h, w[prefix + "post_attention_layernorm.weight"], eps)
        if prefix + "mlp.gate.weight" in w:
            y = self._moe(x, prefix + "mlp.")
        else:
            y = self._mlp(x, prefix + "mlp.")
        return self._r(h + y)

    def forward(self, ids):
        """Hidden states after the embedding and each layer (before model.norm), the normalised
        final hidden state and the logits, each [tokens, ...] float32."""
        h = self.weights["model.embed_tokens.weight"][np.asarray(ids)]
        hidden = [h]
        layers = self.config["num_hidden_layers"]
        for layer in range(layers):
            if not ("layer_dropped" in self.mistakes and layer == layers - 1):
                h = self._layer(h, layer)
            hidden.append(h)
        final = self._norm(h, self.weights["model.norm.weight"], self.config["rms_norm_eps"])
        return hidden, final, final @ self.weights["lm_head.weight"].T

    def mtp(self, ids, final_hidden):
        """Row i pairs final_hidden[i] with the embedding of token i + 1 and predicts token i + 2.
        Returns (hidden after shared_head.norm, logits), each [tokens - 1, ...]."""
        layer = self.config["num_hidden_layers"]
        prefix, eps = f"model.layers.{layer}.", self.config["rms_norm_eps"]
        w = self.weights
        embedding = w["model.embed_tokens.weight"][np.asarray(ids)[1:]]
        e = self._norm(embedding, w[prefix + "enorm.weight"], eps)
        g = self._norm(final_hidden[:-1], w[prefix + "hnorm.weight"], eps)
        z = self._linear(np.concatenate([e, g], axis=1), prefix + "eh_proj")
        z = self._layer(z, layer)
        out = self._norm(z, w[prefix + "shared_head.norm.weight"], eps)
        return out, out @ w["lm_head.weight"].T


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
