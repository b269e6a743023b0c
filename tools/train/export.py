#!/usr/bin/env python3
"""Writes the trained model as a Hugging Face checkpoint: DeepSeek-V3's names, FP8 weights with 128x128 scales.

    export.py --weights RUN_DIR --out models/moebius-tiny        (or --untrained SEED in place of --weights)
    export.py --check models/moebius-tiny                        (the BF16 copy against transformers)

The codes written are exactly those the forward pass of training used. The MTP layer's copies of the embedding and
the head are left out (DeepSeek calls them shared). Fails if the directory would pass 16 MiB.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from model import CONFIG, Model, dequantize_weight, quantize_weight  # noqa: E402
from train import load_weights  # noqa: E402

LIMIT = 16 * 1024 * 1024
GENERATION = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.7,
              "top_p": 0.9}


def entries(model):
    """(checkpoint name, tensor of the model, kind) for every stored matrix and vector; kind is fp8, bf16 or f32."""
    yield "model.embed_tokens.weight", model.embed, "bf16"
    yield "model.norm.weight", model.norm, "bf16"
    yield "lm_head.weight", model.head, "bf16"
    n = model.c["num_hidden_layers"]
    for index, layer in enumerate([*model.layers, model.mtp]):
        at = f"model.layers.{index}."
        yield at + "input_layernorm.weight", layer.norm1, "bf16"
        yield at + "post_attention_layernorm.weight", layer.norm2, "bf16"
        a = layer.attn
        yield at + "self_attn.q_a_proj.weight", a.q_a, "fp8"
        yield at + "self_attn.q_a_layernorm.weight", a.q_norm, "bf16"
        yield at + "self_attn.q_b_proj.weight", a.q_b, "fp8"
        yield at + "self_attn.kv_a_proj_with_mqa.weight", a.kv_a, "fp8"
        yield at + "self_attn.kv_a_layernorm.weight", a.kv_norm, "bf16"
        yield at + "self_attn.kv_b_proj.weight", a.kv_b, "fp8"
        yield at + "self_attn.o_proj.weight", a.o, "fp8"
        f = layer.ffn
        if layer.is_moe:
            yield at + "mlp.gate.weight", f.router, "bf16"
            yield at + "mlp.gate.e_score_correction_bias", f.bias, "f32"
            for e in range(model.c["n_routed_experts"]):
                for name in ("gate", "up", "down"):
                    yield at + f"mlp.experts.{e}.{name}_proj.weight", getattr(f, name)[e], "fp8"
        dense, prefix = (f.shared, "mlp.shared_experts.") if layer.is_moe else (f, "mlp.")
        for name in ("gate", "up", "down"):
            yield at + prefix + f"{name}_proj.weight", getattr(dense, name), "fp8"
        if index == n:
            yield at + "enorm.weight", model.enorm, "bf16"
            yield at + "hnorm.weight", model.hnorm, "bf16"
            yield at + "eh_proj.weight", model.eh, "bf16"
            yield at + "shared_head.norm.weight", model.mtp_norm, "bf16"


def centre_biases(model):
    """Shifts each layer's balance biases so that the smallest is 0. The choice of experts does not change, and
    engines that mask groups with 0 instead of minus infinity then choose alike."""
    for moe in model.moe_layers():
        moe.bias -= moe.bias.min()


def export(model, out: pathlib.Path):
    model = model.cpu()
    tensors = {}
    with torch.no_grad():
        centre_biases(model)
        for name, tensor, kind in entries(model):
            tensor = tensor.detach().float()
            assert torch.isfinite(tensor).all(), name
            if kind == "fp8":
                codes, scale, (rows, cols) = quantize_weight(tensor)
                blocks = codes.flatten(-2).flatten(-3, -2)[:rows, :cols]
                tensors[name] = blocks.to(torch.float8_e4m3fn).contiguous()
                tensors[name + "_scale_inv"] = scale[:, 0, :, 0].contiguous()
            else:
                tensors[name] = tensor.to(torch.bfloat16 if kind == "bf16" else torch.float32).contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    (out / "moebius.manifest.json").unlink(missing_ok=True)  # of other weights: `moebius inspect --manifest` makes it anew
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    total = sum(p.stat().st_size for p in out.iterdir())
    print(f"{len(tensors)} tensors, model.safetensors {(out / 'model.safetensors').stat().st_size} bytes, "
          f"directory {total} of {LIMIT} bytes")
    assert total <= LIMIT, "the directory is over 16 MiB"


def load_export(folder: pathlib.Path) -> Model:
    """The checkpoint back into the training model, weights dequantised."""
    stored = load_file(folder / "model.safetensors")
    model = Model(json.loads((folder / "config.json").read_text()))
    used = set()
    with torch.no_grad():
        for name, tensor, kind in entries(model):
            value = stored[name].float()
            used.add(name)
            if kind == "fp8":
                scale = stored[name + "_scale_inv"]
                used.add(name + "_scale_inv")
                value = value * scale.repeat_interleave(128, 0)[:value.shape[0]].repeat_interleave(128, 1)[:, :value.shape[1]]
            assert value.shape == tensor.shape, name
            tensor.copy_(value)
    assert used == set(stored), sorted(set(stored) - used)
    return model


def check(folder: pathlib.Path):
    """Loads the dequantised copy with transformers and compares logits with our own model."""
    from transformers import AutoTokenizer, DeepseekV3ForCausalLM
    model = load_export(folder).eval()
    with tempfile.TemporaryDirectory() as copy:
        copy = pathlib.Path(copy)
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (copy / "config.json").write_text(json.dumps(config))
        save_file({name: t.detach().clone().to(torch.float32 if kind == "f32" else torch.bfloat16)
                   for name, t, kind in entries(model)}, copy / "model.safetensors", metadata={"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (copy / name).write_bytes((folder / name).read_bytes())
        reference, info = DeepseekV3ForCausalLM.from_pretrained(copy, dtype=torch.bfloat16, output_loading_info=True)
        reference32 = DeepseekV3ForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(copy)
    reference.eval()
    print("missing keys:", len(info["missing_keys"]), " mismatched:", len(info.get("mismatched_keys", [])),
          " unexpected outside layer 6:",
          [k for k in info["unexpected_keys"] if not k.startswith("model.layers.6.")])
    assert not info["missing_keys"]
    assert all(k.startswith("model.layers.6.") for k in info["unexpected_keys"])
    text = "Mr. Holmes looked out of the window, and then he turned to me with a smile. It was a cold morning in"
    prompt = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}],
                                           add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    with torch.no_grad():
        own = torch.nn.functional.linear(model.trunk(ids)[0].float(), model.head.bfloat16().float())
        theirs, theirs32 = reference(ids).logits.float(), reference32(ids).logits
    def versus(a, b):
        return float((a - b).abs().mean()), float((a - b).norm() / b.norm()), float((a.argmax(-1) == b.argmax(-1)).float().mean())
    print("logit standard deviation", round(float(theirs32.std()), 4))
    for name, a, b in (("ours / transformers F32", own, theirs32), ("transformers BF16 / F32", theirs, theirs32)):
        mean, relative, same = versus(a, b)
        print(f"{name}: mean |difference| {mean:.5f}, relative {relative:.5f}, same argmax {same:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=pathlib.Path)
    parser.add_argument("--untrained", type=int)
    parser.add_argument("--check", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    if args.check:
        return check(args.check)
    torch.manual_seed(args.untrained or 0)
    model = Model()
    if args.weights:
        load_weights(model, args.weights)
    export(model, args.out)


if __name__ == "__main__":
    main()
