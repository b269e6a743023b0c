"""moebius-tiny in PyTorch: the DeepSeek-V3 graph at small size, written for training speed.

Experts are computed densely (every expert for every token, the unchosen ones weighed with zero): exact, no
dropped tokens, static shapes, so that torch.compile takes the whole step as one graph. Weights that the
checkpoint stores in FP8 go through their quantiser in every forward pass (straight-through gradient), and the
inputs of routed experts through the 1x128 activation quantiser that serving uses.
"""

import json
import math

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 4096,
    "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "num_hidden_layers": 6,
    "num_nextn_predict_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "n_shared_experts": 1,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1024, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "max_position_embeddings": 4096, "attention_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 0, "eos_token_id": 1,
    "torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1, "ep_size": 1, "aux_loss_alpha": 0.0001,
    "seq_aux": True,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]},
}


def quantize_weight(w):
    """[..., rows, cols] float32 -> (e4m3 codes as float32, scale per 128x128 block). Ragged edges are padded."""
    rows, cols = w.shape[-2:]
    pr, pc = -rows % 128, -cols % 128
    blocks = F.pad(w, (0, pc, 0, pr)).unflatten(-1, (-1, 128)).unflatten(-3, (-1, 128))
    scale = blocks.abs().amax(dim=(-3, -1), keepdim=True).clamp_min(1e-12) / 448.0
    codes = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return codes, scale, (rows, cols)


def dequantize_weight(codes, scale, shape):
    full = (codes * scale).flatten(-2).flatten(-3, -2)
    return full[..., :shape[0], :shape[1]]


def fp8_weight(w):
    return w + (dequantize_weight(*quantize_weight(w)) - w).detach()


FP8_ACTIVATIONS = True  # evaluation switches it off to see what engines with BF16 activations see


def fp8_rows(x):
    """1x128 activation quantiser: amax floored at 1e-4, s = amax / 448."""
    if not FP8_ACTIVATIONS:
        return x
    blocks = x.float().unflatten(-1, (-1, 128))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448.0
    q = ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    return x + (q.to(x.dtype) - x).detach()


def rms_norm(x, weight, eps=1e-6):
    x = x.float()
    w = weight + (weight.bfloat16().float() - weight).detach()  # stored in BF16
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w).bfloat16()


def linear(x, w):
    return F.linear(x, w.bfloat16())


def yarn(config):
    """(inverse frequencies, softmax scale): DeepSeek-V3's static YaRN."""
    d, theta, s = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    length = s["original_max_position_embeddings"]
    def dim(r):
        return d * math.log(length / (2 * math.pi * r)) / (2 * math.log(theta))
    low, high = max(math.floor(dim(s["beta_fast"])), 0), min(math.ceil(dim(s["beta_slow"])), d - 1)
    if low == high:
        high += 0.001
    freq = []
    for i in range(d // 2):
        e = theta ** (-2 * i / d)
        ramp = min(max((i - low) / (high - low), 0), 1)
        freq.append(e * (1 - ramp) + e / s["factor"] * ramp)
    m = 0.1 * s["mscale_all_dim"] * math.log(s["factor"]) + 1
    sigma = (config["qk_nope_head_dim"] + d) ** -0.5 * m * m
    return torch.tensor(freq, dtype=torch.float32), sigma


def top_mask(x, k):
    """1 for the k largest of the last axis, ties to the lower index. Comparisons fuse; a sort does not."""
    a, b = x.unsqueeze(-1), x.unsqueeze(-2)  # rank of a among the b
    index = torch.arange(x.shape[-1], device=x.device)
    before = (b > a) | ((b == a) & (index[None, :] < index[:, None]))
    return (before.sum(-1) < k).float()


class Attention(nn.Module):
    def __init__(self, c, out_scale):
        super().__init__()
        self.c = c
        h, d = c["num_attention_heads"], c["hidden_size"]
        qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
        def p(*shape, std=0.02):
            return nn.Parameter(torch.randn(*shape) * std)
        self.q_a = p(c["q_lora_rank"], d)
        self.q_norm = nn.Parameter(torch.ones(c["q_lora_rank"]))
        self.q_b = p(h * qk, c["q_lora_rank"], std=0.05)
        self.kv_a = p(c["kv_lora_rank"] + c["qk_rope_head_dim"], d)
        self.kv_norm = nn.Parameter(torch.ones(c["kv_lora_rank"]))
        self.kv_b = p(h * (c["qk_nope_head_dim"] + c["v_head_dim"]), c["kv_lora_rank"], std=0.05)
        self.o = p(d, h * c["v_head_dim"], std=0.02 * out_scale)
        self.sigma = yarn(c)[1]

    def forward(self, x, cos, sin):
        c = self.c
        b, t, _ = x.shape
        h, dn, dr, dv, r = (c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"],
                            c["v_head_dim"], c["kv_lora_rank"])
        q = linear(rms_norm(linear(x, fp8_weight(self.q_a)), self.q_norm), fp8_weight(self.q_b)).view(b, t, h, dn + dr)
        kv = linear(x, fp8_weight(self.kv_a))
        latent = rms_norm(kv[..., :r], self.kv_norm)
        kvb = linear(latent, fp8_weight(self.kv_b)).view(b, t, h, dn + dv)
        q_rope = rotate(q[..., dn:], cos, sin)
        k_rope = rotate(kv[..., None, r:], cos, sin).expand(b, t, h, dr)
        q = torch.cat([q[..., :dn], q_rope], -1).transpose(1, 2)
        k = torch.cat([kvb[..., :dn], k_rope], -1).transpose(1, 2)
        v = kvb[..., dn:].transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.sigma)
        return linear(y.transpose(1, 2).reshape(b, t, h * dv), fp8_weight(self.o))


def rotate(x, cos, sin):
    """Interleaved pairs (2i, 2i+1); x [b, t, heads, dr], cos and sin [t, dr / 2]."""
    x = x.float().unflatten(-1, (-1, 2))
    a, b = x[..., 0], x[..., 1]
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).bfloat16()


def swiglu(gate, up):
    return (F.silu(gate.float()) * up.float()).bfloat16()


class Mlp(nn.Module):
    def __init__(self, c, width, out_scale):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(width, c["hidden_size"]) * 0.02)
        self.up = nn.Parameter(torch.randn(width, c["hidden_size"]) * 0.02)
        self.down = nn.Parameter(torch.randn(c["hidden_size"], width) * 0.02 * out_scale)

    def forward(self, x):
        return linear(swiglu(linear(x, fp8_weight(self.gate)), linear(x, fp8_weight(self.up))), fp8_weight(self.down))


class Moe(nn.Module):
    def __init__(self, c, out_scale):
        super().__init__()
        self.c = c
        e, w, d = c["n_routed_experts"], c["moe_intermediate_size"], c["hidden_size"]
        self.router = nn.Parameter(torch.randn(e, d) * 0.006)
        self.register_buffer("bias", torch.zeros(e))
        self.gate = nn.Parameter(torch.randn(e, w, d) * 0.02)
        self.up = nn.Parameter(torch.randn(e, w, d) * 0.02)
        self.down = nn.Parameter(torch.randn(e, d, w) * 0.02 * out_scale)
        self.shared = Mlp(c, w * c["n_shared_experts"], out_scale)

    def choose(self, x):
        """Routing weights [tokens, experts] (zero if not chosen), counts and the sequence balance terms."""
        c = self.c
        router = self.router + (self.router.bfloat16().float() - self.router).detach()
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(x.float() @ router.t())
        biased = scores.detach() + self.bias
        groups = biased.unflatten(-1, (c["n_group"], -1))
        group_score = (groups * top_mask(groups, 2)).sum(-1)
        kept = top_mask(group_score, c["topk_group"]).unsqueeze(-1)
        masked = torch.where(kept > 0, groups, -math.inf).flatten(-2)
        chosen = top_mask(masked, c["num_experts_per_tok"])
        weights = scores * chosen
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]
        return weights, chosen, scores

    def forward(self, x):
        c = self.c
        b, t, d = x.shape
        weights, chosen, scores = self.choose(x)
        e, w = c["n_routed_experts"], c["moe_intermediate_size"]
        xq = fp8_rows(x)
        gate = linear(xq, fp8_weight(self.gate).flatten(0, 1))
        up = linear(xq, fp8_weight(self.up).flatten(0, 1))
        act = fp8_rows(swiglu(gate, up)).unflatten(-1, (e, w)) * weights.unsqueeze(-1).bfloat16()
        down = fp8_weight(self.down).permute(1, 0, 2).flatten(1)  # [d, e * w]
        routed = linear(act.flatten(-2), down)
        # Sequence-wise balance loss (DeepSeek-V3 report, section 2.1.2), alpha applied by the caller.
        f = chosen.mean(1) * e / c["num_experts_per_tok"]
        p = (scores / scores.sum(-1, keepdim=True)).mean(1)
        return routed + self.shared(x), chosen.sum((0, 1)), (f * p).sum(-1).mean()


class Layer(nn.Module):
    def __init__(self, c, index, out_scale, dropout):
        super().__init__()
        self.dropout = dropout
        self.norm1 = nn.Parameter(torch.ones(c["hidden_size"]))
        self.attn = Attention(c, out_scale)
        self.norm2 = nn.Parameter(torch.ones(c["hidden_size"]))
        moe = index >= c["first_k_dense_replace"]
        self.ffn = Moe(c, out_scale) if moe else Mlp(c, c["intermediate_size"], out_scale)
        self.is_moe = moe

    def forward(self, h, cos, sin):
        def drop(y):
            return F.dropout(y, self.dropout, self.training)
        h = h + drop(self.attn(rms_norm(h, self.norm1), cos, sin))
        x = rms_norm(h, self.norm2)
        if self.is_moe:
            y, counts, balance = self.ffn(x)
            return h + drop(y), counts, balance
        return h + drop(self.ffn(x)), None, None


class Model(nn.Module):
    def __init__(self, c=None, dropout=0.0):
        super().__init__()
        c = self.c = json.loads(json.dumps(c or CONFIG))
        d, n = c["hidden_size"], c["num_hidden_layers"]
        out_scale = (2 * (n + 1)) ** -0.5
        self.embed = nn.Parameter(torch.randn(c["vocab_size"], d) * 0.02)
        self.layers = nn.ModuleList(Layer(c, i, out_scale, dropout) for i in range(n))
        self.norm = nn.Parameter(torch.ones(d))
        self.head = nn.Parameter(torch.randn(c["vocab_size"], d) * 0.02)
        self.enorm = nn.Parameter(torch.ones(d))
        self.hnorm = nn.Parameter(torch.ones(d))
        self.eh = nn.Parameter(torch.randn(d, 2 * d) * 0.02)
        self.mtp = Layer(c, n, out_scale, dropout)
        self.mtp_norm = nn.Parameter(torch.ones(d))
        freq, _ = yarn(c)
        angle = torch.arange(c["max_position_embeddings"], dtype=torch.float32)[:, None] * freq
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def moe_layers(self):
        return [l.ffn for l in [*self.layers, self.mtp] if l.is_moe]

    def trunk(self, ids):
        t = ids.shape[1]
        cos, sin = self.cos[:t], self.sin[:t]
        h = F.embedding(ids, self.embed).bfloat16()
        counts, balance = [], 0.0
        for layer in self.layers:
            h, n, f = layer(h, cos, sin)
            if n is not None:
                counts.append(n)
                balance = balance + f
        return rms_norm(h, self.norm), counts, balance

    def draft(self, hidden, next_ids):
        """MTP rows: hidden of row i with the embedding of token i + 1; predicts token i + 2."""
        t = next_ids.shape[1]
        e = rms_norm(F.embedding(next_ids, self.embed).bfloat16(), self.enorm)
        z = linear(torch.cat([e, rms_norm(hidden, self.hnorm)], -1), self.eh)
        z, counts, balance = self.mtp(z, self.cos[:t], self.sin[:t])
        return rms_norm(z, self.mtp_norm), counts, balance

    def forward(self, tokens, weights, mtp_weight):
        """tokens [b, t + 2], weights [b, t + 2] (of a token as a target). Returns (loss, main cross-entropy, MTP
        cross-entropy, expert counts). The MTP layer learns from the text and, in equal parts, from the main model's
        own distribution at the same position, which is what its drafts are judged by."""
        ids = tokens[:, :-2]
        hidden, counts, balance = self.trunk(ids)
        drafted, mtp_counts, mtp_balance = self.draft(hidden, tokens[:, 1:-1])
        w1, w2 = weights[:, 1:-1].flatten(), weights[:, 2:].flatten()
        logits = linear(hidden, self.head)
        main = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:-1].flatten(), reduction="none")
        main = (main * w1).sum() / w1.sum().clamp_min(1.0)
        draft_logp = F.log_softmax(linear(drafted, self.head).float(), -1)
        hard = F.nll_loss(draft_logp.flatten(0, 1), tokens[:, 2:].flatten(), reduction="none")
        hard = (hard * w2).sum() / w2.sum().clamp_min(1.0)
        soft = -(torch.softmax(logits[:, 1:].detach().float(), -1) * draft_logp[:, :-1]).sum(-1)
        w3 = weights[:, 2:-1]
        soft = (soft * w3).sum() / w3.sum().clamp_min(1.0)
        loss = main + mtp_weight * 0.5 * (hard + soft) + 1e-4 * (balance + mtp_balance)
        return loss, main.detach(), hard.detach(), torch.stack([*counts, mtp_counts])
