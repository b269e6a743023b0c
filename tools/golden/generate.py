#!/usr/bin/env python3
"""Writes tests/golden: random models with the results that transformers gives for them.

    python tools/golden/generate.py [--out tests/golden] [--only NAME ...]

See README.md beside this file for what is written and why. Needs torch, transformers and
safetensors; no GPU. Asserts everything it promises, so a run that ends has a valid result.
"""

import argparse
import copy
import json
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM

import numpy_model
from numpy_model import MISTAKES, NumpyModel, log_softmax
from random_models import EOS, LENGTHS, MODELS, VOCAB, write_model

BOUND = 0.02  # mean absolute log-probability difference per unit of logit standard deviation
MISTAKE_FACTOR = 5  # a deliberate mistake must miss the bound by this much on some model
FP8_FACTOR = 1.25  # an FP8 engine may differ this much more than the quantising reference does
MARGIN = 0.05  # greedy steps are compared until the reference's own margin falls below
STEPS = 24
MIN_STEPS = 8
NOISE_DRAWS = 4  # perturbed bfloat16 estimates that weights and prompts must withstand
PROMPT_LENGTHS = (5, 12, 30, 60)
DETAILED = 1  # the sequence whose hidden states and logits are kept whole


def load_transformers(directory, scratch):
    """The Hugging Face model in float32. FP8 directories go through a dequantised float32 copy and
    kimi_k2, which the library does not know by name, through its deepseek_v3 class."""
    with open(os.path.join(directory, "config.json"), encoding="utf-8") as stream:
        config = json.load(stream)
    fp8 = config.pop("quantization_config", None) is not None
    load_from = directory
    if fp8 or config["model_type"] == "kimi_k2":
        config["model_type"] = "deepseek_v3"
        load_from = os.path.join(scratch, os.path.basename(directory))
        os.makedirs(load_from)
        tensors = numpy_model.load_weights(directory)
        save_file({n: torch.from_numpy(np.ascontiguousarray(t)) for n, t in tensors.items()},
                  os.path.join(load_from, "model.safetensors"), {"format": "pt"})  # fmt: skip
        with open(os.path.join(load_from, "config.json"), "w", encoding="utf-8") as stream:
            json.dump(config, stream)
    model, info = AutoModelForCausalLM.from_pretrained(
        load_from, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    mtp_prefix = f"model.layers.{config['num_hidden_layers']}."
    assert all(k.startswith(mtp_prefix) for k in info["unexpected_keys"]), info["unexpected_keys"]
    kind = DeepseekV2ForCausalLM if config["model_type"] == "deepseek_v2" else DeepseekV3ForCausalLM
    assert isinstance(model, kind)
    model.set_experts_implementation("eager")
    return model.eval()


def check_softmax_scale(model, reference):
    """transformers left the factor m^2 out of DeepSeek-V2 for two years; refuse such a version."""
    for layer in model.model.layers:
        assert abs(layer.self_attn.scaling - reference.softmax_scale) < 1e-9, (
            f"transformers {transformers.__version__} uses softmax scale "
            f"{layer.self_attn.scaling}, expected {reference.softmax_scale}"
        )


@torch.no_grad()
def hf_forward(model, ids):
    """As NumpyModel.forward: hidden states before model.norm, final hidden, logits."""
    captured = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: captured.append(
        out[0] if isinstance(out, tuple) else out)) for layer in model.model.layers]  # fmt: skip
    ids = torch.as_tensor(np.asarray(ids))[None]
    logits = model(ids, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    hidden = [model.model.embed_tokens(ids)[0]] + [h.reshape(h.shape[-2:]) for h in captured]
    final = model.model.norm(hidden[-1])
    return [h.numpy() for h in hidden], final.numpy(), logits.numpy()


@torch.no_grad()
def hf_mtp(model, reference, ids, final_hidden):
    """Logits of transformers' own MTP layer, as a third opinion; None if the library has none."""
    try:
        from transformers.modeling_layers import MtpLayer
    except ImportError:
        return None
    config = copy.deepcopy(model.config.get_mtp_config())
    kinds = [type(model.model.layers[-1]), type(model.model.norm)]
    layer = MtpLayer(config, *kinds, 0)
    prefix = f"model.layers.{reference.config['num_hidden_layers']}."
    state, experts = {}, {}
    for name, value in reference.weights.items():
        if not name.startswith(prefix):
            continue
        name, value = name[len(prefix) :], torch.from_numpy(value)
        if name in ("embed_tokens.weight", "shared_head.head.weight"):
            continue
        if name.startswith("mlp.experts."):
            _, _, expert, projection, _ = name.split(".")
            experts[int(expert), projection] = value
        elif name.startswith(("enorm", "hnorm", "eh_proj")):
            state[name] = value
        elif name == "shared_head.norm.weight":
            state["post_norm.weight"] = value
        else:
            state["mtp_block." + name] = value
    count = reference.config["n_routed_experts"]
    state["mtp_block.mlp.experts.gate_up_proj"] = torch.stack([
        torch.cat([experts[e, "gate_proj"], experts[e, "up_proj"]]) for e in range(count)])  # fmt: skip
    state["mtp_block.mlp.experts.down_proj"] = torch.stack(
        [experts[e, "down_proj"] for e in range(count)])  # fmt: skip
    layer.load_state_dict(state, strict=True)
    layer.eval()
    rows = len(ids) - 1
    positions = torch.arange(rows)[None]
    embeds = model.model.embed_tokens(torch.as_tensor(np.asarray(ids))[None, 1:])
    mask = torch.full((rows, rows), -torch.inf).triu(1)[None, None]
    out = layer(inputs_embeds=embeds, previous_hidden_state=torch.from_numpy(final_hidden)[None, :-1],
                position_embeddings=model.model.rotary_emb(embeds, positions),
                attention_mask=mask, position_ids=positions, past_key_values=None)  # fmt: skip
    out = out[0] if isinstance(out, tuple) else out
    return model.lm_head(out)[0].numpy()


def next_logprobs(ids, logits, shift=1):
    rows = len(ids) - shift
    return log_softmax(logits)[np.arange(rows), np.asarray(ids)[shift:]]


def rounded(values, digits=7):
    return [round(float(v), digits) for v in values]


def describe_sequence(ids, logits):
    logprob = log_softmax(logits)
    top = np.argsort(-logprob, axis=1, kind="stable")[:, :5]
    return {
        "token_ids": [int(i) for i in ids],
        "next_logprob": rounded(next_logprobs(ids, logits)),
        "top_ids": top.tolist(),
        "top_logprob": [rounded(row) for row in np.take_along_axis(logprob, top, axis=1)],
    }


def greedy(forward, prompt):
    """STEPS greedy tokens; margin = logit of the best minus the second. compare_steps: how many
    come before the first margin below MARGIN, and not after an end token, where engines stop."""
    ids, margins = list(prompt), []
    for _ in range(STEPS):
        logits = forward(ids)[2][-1]
        best = int(np.argmax(logits))
        margins.append(float(logits[best] - np.delete(logits, best).max()))
        ids.append(best)
    low = [i for i, m in enumerate(margins) if m < MARGIN]
    low += [i + 1 for i, token in enumerate(ids[len(prompt) :]) if token == EOS]
    return {
        "prompt": [int(i) for i in prompt],
        "token_ids": [int(i) for i in ids[len(prompt) :]],
        "margin": rounded(margins, 5),
        "compare_steps": min(low + [STEPS]),
    }


def draw_prompts(rng, truth_forward, quantized, estimates):
    """One prompt per length with its greedy continuations (float32, quantising reference or None).

    A continuation can pass a near-tie between two experts: there bfloat16 has no right answer, and
    the logits after it say nothing about an engine. So prompts are drawn until all bfloat16
    estimates keep the continuation, over at least MIN_STEPS steps."""
    drawn, tries = [], 0
    for length in PROMPT_LENGTHS:
        while True:
            tries += 1
            assert tries < 500
            prompt = rng.integers(2, VOCAB, length)
            runs = [greedy(quantized.forward, prompt)] if quantized else []
            if not runs or keeps(estimates, runs[0]):
                runs.insert(0, greedy(truth_forward, prompt))
                if keeps(estimates, runs[0]):
                    break
        drawn.append(runs + [None] * (2 - len(runs)))
    return [d[0] for d in drawn], [d[1] for d in drawn], tries


def keeps(estimates, run):
    steps, begin = run["compare_steps"], len(run["prompt"])
    if steps < MIN_STEPS:
        return False
    ids = run["prompt"] + run["token_ids"][:steps]
    return all(
        (model.forward(ids)[2][begin - 1 : -1].argmax(axis=1) == ids[begin:]).all()
        for model in estimates
    )


def generate_model(name, out, scratch):
    directory = os.path.join(out, name)
    write_model(directory, name)
    _, options = MODELS[name]
    rng = np.random.Generator(np.random.PCG64(10_000 + options["seed"]))
    sequences = [rng.integers(0, VOCAB, n) for n in options.get("lengths", LENGTHS)]

    model = load_transformers(directory, scratch)
    reference = NumpyModel(directory)
    check_softmax_scale(model, reference)

    truth = [hf_forward(model, ids) for ids in sequences]
    ours = [reference.forward(ids) for ids in sequences]
    for (hidden_a, final_a, logits_a), (hidden_b, final_b, logits_b) in zip(truth, ours):
        for a, b in zip(hidden_a + [final_a, logits_a], hidden_b + [final_b, logits_b]):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)
    golden_logprob = np.concatenate([next_logprobs(i, t[2]) for i, t in zip(sequences, truth)])
    logit_std = float(np.sqrt(np.concatenate([t[2] for t in truth]).var(axis=1).mean()))
    assert logit_std >= 2, logit_std
    assert reference.router_margin > 2e-6, "a router decision too close to a tie; change the seed"

    def logprob_difference(**kwargs):
        other = NumpyModel(directory, **kwargs)
        with np.errstate(all="ignore"):
            values = np.concatenate(
                [next_logprobs(i, other.forward(i)[2]) for i in sequences]
            )  # fmt: skip
        if not np.isfinite(values).all():
            return None
        return float(np.abs(values - golden_logprob).mean())

    quantized = NumpyModel(directory, arithmetic="e4m3_experts") if reference.fp8 else None
    estimates = [
        NumpyModel(directory, arithmetic="bf16", noise_seed=seed)
        for seed in [None, *range(NOISE_DRAWS)]
    ]
    greedy_runs, quantized_runs, tries = draw_prompts(
        rng, lambda ids: hf_forward(model, ids), quantized, estimates
    )
    noisy = max(
        logprob_difference(arithmetic="bf16", noise_seed=seed) for seed in range(NOISE_DRAWS)
    )
    result = {
        "transformers": transformers.__version__,
        "logit_std": logit_std,
        "sequences": [describe_sequence(i, t[2]) for i, t in zip(sequences, truth)],
        "greedy": greedy_runs,
        "greedy_prompts_drawn": tries,
        "router_margin": reference.router_margin,
        "bf16_estimate_per_std": logprob_difference(arithmetic="bf16") / logit_std,
        "perturbed_estimate_per_std": noisy / logit_std,
    }
    if reference.fp8:
        difference = logprob_difference(arithmetic="e4m3_experts")
        result["quantizing_reference"] = {
            "mean_abs_difference": difference,
            "per_std": difference / logit_std,
            "next_logprob": [
                rounded(next_logprobs(i, quantized.forward(i)[2])) for i in sequences
            ],
            "greedy": quantized_runs,
        }
        assert noisy < 0.97 * FP8_FACTOR * difference, noisy / difference
    else:
        assert noisy / logit_std < BOUND, noisy / logit_std

    hidden, final, logits = truth[DETAILED]
    tensors = {"hidden_states": np.stack(hidden), "final_hidden": final, "logits": logits}
    if reference.config.get("num_nextn_predict_layers"):
        ids = sequences[DETAILED]
        mtp_hidden, mtp_logits = reference.mtp(ids, final)
        tensors |= {"mtp_hidden": mtp_hidden, "mtp_logits": mtp_logits}
        third = hf_mtp(model, reference, ids, final)
        if third is not None:
            np.testing.assert_allclose(third, mtp_logits, rtol=0, atol=2e-4)
        result["mtp"] = {
            "sequence": DETAILED,
            "next_logprob": rounded(next_logprobs(ids, mtp_logits, shift=2)),
            "agrees_with_transformers": third is not None,
        }
    save_file({n: torch.from_numpy(np.ascontiguousarray(t, np.float32)) for n, t in tensors.items()},
              os.path.join(directory, "golden.safetensors"))  # fmt: skip
    with open(os.path.join(directory, "golden.json"), "w", encoding="utf-8") as stream:
        stream.write(compact(result))
    for file in os.listdir(directory):
        os.chmod(os.path.join(directory, file), 0o644)

    scores = {}
    for mistake in MISTAKES:
        difference = logprob_difference(mistakes=[mistake])
        # A result that is not a number at all misses every bound.
        scores[mistake] = 1000.0 if difference is None else round(difference / logit_std, 5)
    return result, scores


def compact(value):
    """JSON with one line per entry of the outer two levels: diffs stay readable, files small."""
    text = json.dumps(value)
    lines, depth = [], 0
    for char in text:
        if char in "]}":
            depth -= 1
        if char in "[{":
            depth += 1
        lines.append(char)
        if char == "," and depth <= 2 or char == "{" and depth <= 1:
            lines.append("\n")
    return "".join(lines).replace("\n ", "\n") + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    parser.add_argument("--out", default=os.path.join(root, "tests", "golden"))
    parser.add_argument("--only", nargs="*", help="models to write (scores.json is left alone)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    models, mistakes, steps = {}, {m: {} for m in MISTAKES}, 0
    for name in args.only or MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            result, scores = generate_model(name, os.path.normpath(args.out), scratch)
        model_bound = BOUND
        if "quantizing_reference" in result:
            model_bound = max(BOUND, FP8_FACTOR * result["quantizing_reference"]["per_std"])
        models[name] = {"logit_std": round(result["logit_std"], 4), "bound": round(model_bound, 5),
                        "bf16_estimate": round(result["bf16_estimate_per_std"], 5),
                        "perturbed_estimate": round(result["perturbed_estimate_per_std"], 5)}  # fmt: skip
        for mistake, score in scores.items():
            mistakes[mistake][name] = score
        compared = sum(g["compare_steps"] for g in result["greedy"])
        models[name]["greedy_compare_steps"] = compared
        steps += compared
        print(name, models[name], f"router margin {result['router_margin']:.2e}", flush=True)
    if args.only:
        return
    for mistake, scores in mistakes.items():
        factor, where = max((s / models[n]["bound"], n) for n, s in scores.items())
        print(f"{mistake}: misses the bound {factor:.1f}x on {where}")
        assert factor >= MISTAKE_FACTOR, mistake
    assert steps >= 200, steps
    print(f"{steps} greedy steps to compare")
    summary = {"bound_per_std": BOUND, "mistake_factor": MISTAKE_FACTOR, "fp8_factor": FP8_FACTOR,
               "greedy_margin": MARGIN, "greedy_compare_steps": steps,
               "models": models, "mistakes": mistakes}  # fmt: skip
    with open(os.path.join(args.out, "scores.json"), "w", encoding="utf-8") as stream:
        json.dump(summary, stream, indent=1)
        stream.write("\n")


if __name__ == "__main__":
    main()
