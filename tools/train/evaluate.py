#!/usr/bin/env python3
"""Measures a trained moebius-tiny: held-out bits per byte, recall, MTP acceptance, balance, samples.

    evaluate.py --weights DIR --data packed.npz --tokenizer tokenizer.json --out evaluation.json

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
from model import Model, linear  # noqa: E402
from tasks import Tasks  # noqa: E402
from train import load_weights  # noqa: E402

LENGTHS = [256, 512, 1024, 2048, 4096]
DEPTHS = 10


@torch.no_grad()
def windows(model, ids, length, device):
    """Main logits and MTP argmax over consecutive windows of `ids`: yields (targets, logprobs, argmax, draft argmax)."""
    count = max(1, (len(ids) - 2) // length)
    for w in range(count):
        chunk = torch.from_numpy(ids[w * length:(w + 1) * length + 2].astype(np.int64)).to(device)[None]
        if chunk.shape[1] < 16:
            continue
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
def recall(model, packed, tokenizer, device, per_cell):
    encode = lambda s: tokenizer.encode(s).ids  # noqa: E731
    glosses = json.loads(packed["glosses"].tobytes())
    text = np.concatenate([packed[k] for k in sorted(packed.files) if k.startswith("heldout_") and "bytes" not in k])
    def prose(n, rng):
        at = rng.randrange(len(text) - n)
        return [int(i) for i in text[at:at + n] if i > 1]
    grid, drafts, accepted = {}, 0, 0
    for length in LENGTHS:
        tasks = Tasks(length, "heldout", encode, prose, glosses)
        row = []
        for depth in range(DEPTHS):
            right = 0
            for _ in range(per_cell):
                segments, answers = tasks.recall(length, questions=1, depth=depth / (DEPTHS - 1), absent=0)
                ids = [i for part, _ in tasks.ids(segments) for i in part][-model.c["max_position_embeddings"]:]
                answer = len(encode(answers[0])) + 1  # and eos
                x = torch.tensor(ids, device=device)[None]
                hidden, _, _ = model.trunk(x[:, :-1])
                best = linear(hidden[:, -answer:], model.head).float().argmax(-1)
                right += bool((best[0] == x[0, -answer:]).all())
                drafted, _, _ = model.draft(hidden[:, :-1], x[:, 1:-1])
                draft = linear(drafted[:, -(answer - 1):], model.head).float().argmax(-1)
                accepted += (draft[0] == best[0, 1:]).sum().item()
                drafts += answer - 1
            row.append(round(right / per_cell, 4))
        grid[length] = row
        print("recall", length, sum(row) / DEPTHS, row, flush=True)
    return {"prompts_per_length": per_cell * DEPTHS, "grid": grid,
            "mean": {k: round(sum(v) / DEPTHS, 4) for k, v in grid.items()},
            "mtp_acceptance_on_answers": round(accepted / drafts, 4)}


@torch.no_grad()
def sample(model, tokenizer, prompt, seed, device, temperature=0.7, top_p=0.9, tokens=120):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--per-cell", type=int, default=50, help="prompts for each length and depth")
    args = parser.parse_args()
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(args.tokenizer)
    packed = np.load(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model()
    load_weights(model, args.weights)
    model = model.to(device).eval()
    result = {}
    result["held_out"], result["balance_max_over_mean"] = held_out(model, packed, device)
    print(json.dumps(result["held_out"]["all"]), result["balance_max_over_mean"], flush=True)
    result["samples"] = [sample(model, tokenizer, p, s, device) for p, s in (
        ("Mr. Holmes looked", 1), ("The admiral said", 2), ("It was a dark evening when Emma", 3), ("In the beginning", 4))]
    result["samples"] += [sample(model, tokenizer, "The old king of the north", 5, device, temperature=0)]
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    result["recall"] = recall(model, packed, tokenizer, device, args.per_cell)
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
