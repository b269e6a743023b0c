#!/usr/bin/env python3
"""Measures a trained moebius-tiny: held-out bits per byte, recall, MTP acceptance, balance, samples.

    evaluate.py --model models/moebius-tiny --data packed.npz --out evaluation.json [--parts held_out,recall,samples]
    evaluate.py --weights RUN_DIR --tokenizer tokenizer.json ...     (before export; the same numbers)

Weights go through the FP8 quantisers, as exported. Recall is greedy and exact: with the answer fed in, every token
of it must be the argmax. Keys, values, names and nouns are disjoint from those of training.
"""

import argparse
import json
import math
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import model as graph  # noqa: E402
from export import load_export  # noqa: E402
from model import Model, linear  # noqa: E402
from tasks import Tasks  # noqa: E402
from train import load_weights  # noqa: E402

# Prompt length in tokens -> prompts for each of the depths 0, 10, .. 100 %.
PROMPTS = {1024: 50, 4096: 50, 256: 20, 512: 20, 2048: 20}
DEPTHS = 11


@torch.no_grad()
def windows(model, ids, length, device, batch=16):
    """Consecutive windows of `ids`, in batches: yields (targets, logprobs, argmax, draft argmax, expert counts). A
    source shorter than a window is one short window."""
    count = max(1, (len(ids) - 2) // length)
    for first in range(0, count, batch):
        chunk = np.stack([ids[w * length:(w + 1) * length + 2] for w in range(first, min(first + batch, count))])
        chunk = torch.from_numpy(chunk.astype(np.int64)).to(device)
        hidden, counts, _ = model.trunk(chunk[:, :-2])
        drafted, _, _ = model.draft(hidden, chunk[:, 1:-1])
        logits = linear(hidden, model.head).float()
        draft = linear(drafted, model.head).float().argmax(-1)
        targets = chunk[:, 1:-1]
        logprob = F.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
        yield targets, logprob, logits.argmax(-1), draft, counts


@torch.no_grad()
def held_out(model, packed, device):
    out, balance = {}, None
    total = {"nats": 0.0, "bytes": 0, "accepted": 0, "drafts": 0}
    for name in sorted(k for k in packed.files if k.startswith("heldout_") and "bytes" not in k):
        source = name[len("heldout_"):]
        nats = tokens = accepted = drafts = 0
        for targets, logprob, best, draft, counts in windows(model, packed[name], 1024, device):
            nats -= logprob.sum().item()
            tokens += targets.numel()
            # The draft of row i and the main choice of row i + 1 are for the same position.
            accepted += (draft[:, :-1] == best[:, 1:]).sum().item()
            drafts += draft[:, :-1].numel()
            n = torch.stack(counts).double()
            balance = n if balance is None else balance + n
        size = int(packed["heldout_bytes_" + source][0]) * tokens / max(len(packed[name]), 1)
        out[source] = {"bits_per_byte": round(nats / math.log(2) / size, 4), "nats_per_token": round(nats / tokens, 4),
                       "mtp_acceptance": round(accepted / max(drafts, 1), 4), "tokens": tokens}
        for key, value in (("nats", nats), ("bytes", size), ("accepted", accepted), ("drafts", drafts)):
            total[key] += value
    out["all"] = {"bits_per_byte": round(total["nats"] / math.log(2) / total["bytes"], 4),
                  "mtp_acceptance": round(total["accepted"] / total["drafts"], 4)}
    load = (balance.max(1).values / balance.mean(1)).tolist()
    return out, [round(b, 3) for b in load]


@torch.no_grad()
def recall(model, packed, tokenizer, device, share, seed):
    encode = lambda s: tokenizer.encode(s).ids  # noqa: E731
    glosses = json.loads(packed["glosses"].tobytes())
    text = np.concatenate([packed[k] for k in sorted(packed.files) if k.startswith("heldout_") and "bytes" not in k])
    def prose(n, rng):
        at = rng.randrange(len(text) - n)
        return [int(i) for i in text[at:at + n] if i > 1]
    grid, drafts, accepted, wrong = {}, 0, 0, []
    for length, per_cell in PROMPTS.items():
        per_cell = max(1, int(per_cell * share))
        tasks = Tasks(seed + length, "heldout", encode, prose, glosses)
        row = []
        for depth in range(DEPTHS):
            prompts = []
            for _ in range(per_cell):
                segments, answers = tasks.recall(length, questions=1, depth=depth / (DEPTHS - 1), absent=0)
                ids = [i for part, _ in tasks.ids(segments) for i in part]
                assert len(ids) <= model.c["max_position_embeddings"]
                prompts.append((ids, len(encode(answers[0])) + 1, answers[0]))  # the answer, then eos
            right = 0
            for at in range(0, per_cell, 10):
                some = prompts[at:at + 10]
                x = torch.zeros(len(some), max(len(ids) for ids, _, _ in some), dtype=torch.int64)
                for i, (ids, _, _) in enumerate(some):  # padding on the right: nothing before it sees it
                    x[i, :len(ids)] = torch.tensor(ids)
                x = x.to(device)
                hidden, _, _ = model.trunk(x[:, :-1])
                drafted, _, _ = model.draft(hidden[:, :-1], x[:, 1:-1])
                for i, (ids, n, answer) in enumerate(some):
                    end = len(ids) - 1
                    best = linear(hidden[i, end - n:end], model.head).float().argmax(-1)
                    draft = linear(drafted[i, end - n:end - 1], model.head).float().argmax(-1)
                    correct = bool((best == x[i, end - n + 1:end + 1]).all())
                    right += correct
                    if not correct and len(wrong) < 40:
                        wrong.append([length, depth * 10, answer, tokenizer.decode(best.tolist(), skip_special_tokens=False)])
                    accepted += (draft == best[1:]).sum().item()
                    drafts += n - 1
            row.append(round(right / per_cell, 4))
        grid[length] = row
        print("recall", length, round(sum(row) / DEPTHS, 4), row, flush=True)
    return {"prompts": {k: max(1, int(v * share)) * DEPTHS for k, v in PROMPTS.items()}, "grid": grid,
            "mean": {k: round(sum(v) / DEPTHS, 4) for k, v in grid.items()},
            "mtp_acceptance_on_answers": round(accepted / drafts, 4), "wrong_teacher_forced": wrong}


@torch.no_grad()
def sample(model, tokenizer, prompt, seed, device, temperature=0.7, top_p=0.9, tokens=100):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ids = [0, *tokenizer.encode(prompt).ids]
    drafts = accepted = 0
    guess = None
    for _ in range(tokens):
        x = torch.tensor(ids, device=device)[None]
        hidden, _, _ = model.trunk(x)
        logits = linear(hidden[:, -1], model.head).float()[0].cpu()
        if temperature == 0:
            choice = int(logits.argmax())
        else:
            p, order = torch.softmax(logits / temperature, -1).sort(descending=True)
            p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
            choice = int(order[torch.multinomial(p, 1, generator=generator)])
        if guess is not None:
            drafts += 1
            accepted += guess == choice
        ids.append(choice)
        following = torch.tensor(ids[1:], device=device)[None]
        guess = int(linear(model.draft(hidden, following)[0][:, -1], model.head).argmax())
        if choice == 1:
            break
    return {"prompt": prompt, "seed": seed, "temperature": temperature, "text": tokenizer.decode(ids[1:], skip_special_tokens=False),
            "mtp_accepted": accepted, "mtp_drafts": drafts}


PROMPTS_TO_CONTINUE = [("Mr. Holmes looked", 1), ("The admiral said", 2), ("It was a dark evening when Emma", 3),
                       ("The old king of the north", 4)]
QUESTIONS = ["Who are you?", "What is 27 + 58?", "Spell lantern.", "What is a castle?",
             "The code of Alice is 4711. The code of Bob is 2093. The code of Carol is 8825.\nWhat is the code of Bob?"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=pathlib.Path)
    source.add_argument("--weights", type=pathlib.Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--parts", default="held_out,recall,samples")
    parser.add_argument("--share", type=float, default=1.0, help="of the recall prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the recall prompts: another seed, other prompts")
    args = parser.parse_args()
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(args.tokenizer or str(args.model / "tokenizer.json"))
    packed = np.load(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model:
        model = load_export(args.model)
    else:
        model = Model()
        load_weights(model, args.weights)
    model = model.to(device).eval()
    result = {}
    def write():
        args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if "held_out" in args.parts:
        result["held_out"], result["balance_max_over_mean"] = held_out(model, packed, device)
        print(json.dumps(result["held_out"]["all"]), result["balance_max_over_mean"], flush=True)
        graph.FP8_ACTIVATIONS = False
        result["held_out_bf16_activations"] = held_out(model, packed, device)[0]["all"]
        graph.FP8_ACTIVATIONS = True
        print("BF16 activations", json.dumps(result["held_out_bf16_activations"]), flush=True)
        write()
    if "recall" in args.parts:
        result["recall"] = recall(model, packed, tokenizer, device, args.share, args.seed)
        write()
    if "samples" in args.parts:
        user, assistant = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
        result["samples"] = [sample(model, tokenizer, p, s, device) for p, s in PROMPTS_TO_CONTINUE]
        result["samples"] += [sample(model, tokenizer, user + q + assistant, 0, device, temperature=0) for q in QUESTIONS]
        for s in result["samples"]:
            print(f"--- seed {s['seed']}, temperature {s['temperature']}, drafts accepted {s['mtp_accepted']} of {s['mtp_drafts']}\n"
                  + s["text"], flush=True)
        write()


if __name__ == "__main__":
    main()
