#!/usr/bin/env python3
"""Trains moebius-tiny. Resumable: each run covers a part of the schedule and stops on the clock.

    train.py --data packed.npz --tokenizer tokenizer.json --out DIR --seconds 480 --from 0 --to 0.65 --length 1024
    train.py ... --resume DIR --from 0.65 --to 1 --length 4096

The position in the schedule (learning rate, bias speed, task mix) is a function of the fraction done, not of the
step count. A fixed seed gives the same data order within a run, not the same bits (atomics in backward passes).
Writes weights.{0..3}.f32 (flat float32 masters and balance biases), log.csv and summary.json.
"""

import argparse
import csv
import json
import math
import multiprocessing as mp
import pathlib
import queue
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from model import Model, linear  # noqa: E402
from tasks import BOS_ID, Tasks  # noqa: E402

PROSE_MIX = {1024: {"narrative": 0.38, "expository": 0.36, "technical": 0.26},
             4096: {"narrative": 0.38, "expository": 0.38, "technical": 0.24}}
PARTS = 4


class Text:
    """Running text of the packed corpus, drawn at random places."""

    def __init__(self, packed, mix):
        self.kinds = sorted(mix)
        self.mix = [mix[k] for k in self.kinds]
        self.data = {k: packed["train_" + k] for k in self.kinds}

    def take(self, n, rng):
        data = self.data[rng.choices(self.kinds, self.mix)[0]]
        at = rng.randrange(len(data) - n)
        return data[at:at + n]

    def filler(self, n, rng):
        ids = self.take(n, rng)
        return [int(i) for i in ids if i > 1]


def produce(seed, data, tokenizer_file, length, mix, task_share, recall, bos_share, rows, longest, out,
            stop):
    """A worker process: puts (tokens uint16 [rows, length + 2], weights float16) on `out` for ever."""
    import os
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(tokenizer_file)
    packed = np.load(data)
    text = Text(packed, mix)
    glosses = json.loads(packed["glosses"].tobytes())
    tasks = Tasks(seed, "train", lambda s: tokenizer.encode(s).ids, text.filler, glosses, *recall)
    rng = tasks.rng
    while not stop.is_set():
        tokens = np.zeros((rows, length + 2), dtype=np.uint16)
        weights = np.zeros((rows, length + 2), dtype=np.float16)
        for row in range(rows):
            if rng.random() >= task_share:
                tokens[row] = text.take(length + 2, rng)
                weights[row] = 1
                if rng.random() < bos_share:  # or a prompt of plain text would look like a task: to be copied
                    tokens[row, 0] = BOS_ID
                continue
            at = 0
            while at < length + 2:
                for ids, weight in tasks.draw(longest.value, length + 2 - at, at == 0):
                    n = min(len(ids), length + 2 - at)
                    tokens[row, at:at + n] = ids[:n]
                    weights[row, at:at + n] = weight
                    at += n
                    if at >= length + 2:
                        break
        while not stop.is_set():
            try:
                out.put((tokens, weights), timeout=1)
                break
            except queue.Full:
                pass


def named_tensors(model):
    """Everything a checkpoint holds, in a fixed order: parameters, then balance biases."""
    yield from model.named_parameters()
    yield from ((n, b) for n, b in model.named_buffers() if n.endswith("bias"))


def save_weights(model, out: pathlib.Path):
    flat = torch.cat([t.detach().float().cpu().flatten() for _, t in named_tensors(model)]).numpy()
    for i, part in enumerate(np.array_split(flat, PARTS)):
        part.astype("<f4").tofile(out / f"weights.{i}.f32")


def load_weights(model, folder: pathlib.Path):
    flat = torch.from_numpy(np.concatenate([np.fromfile(folder / f"weights.{i}.f32", "<f4") for i in range(PARTS)]))
    at = 0
    with torch.no_grad():
        for _, tensor in named_tensors(model):
            n = tensor.numel()
            tensor.copy_(flat[at:at + n].view(tensor.shape))
            at += n
    assert at == len(flat), "weights of another configuration"


def held_out_windows(data, device, most, length=1024):
    """A few windows of every held-out source, to watch overfitting while training runs."""
    packed = np.load(data)
    rows = []
    for name in sorted(k for k in packed.files if k.startswith("heldout_") and "bytes" not in k):
        ids = packed[name].astype(np.int64)
        rows += [ids[i * length:(i + 1) * length + 2] for i in range(min(most, (len(ids) - 2) // length))]
    return torch.from_numpy(np.stack(rows)).to(device) if rows else None


@torch.no_grad()
def held_out_loss(model, held):
    """(main, MTP) cross-entropy in nats per token and the share of drafts equal to the main model's choice."""
    if held is None:
        return []
    model.eval()
    sums = [0.0, 0.0, 0.0]
    for rows in held.split(16):
        hidden, _, _ = model.trunk(rows[:, :-2])
        drafted, _, _ = model.draft(hidden, rows[:, 1:-1])
        logits, draft = linear(hidden, model.head).float(), linear(drafted, model.head).float()
        sums[0] += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:-1].flatten()).item() * len(rows)
        sums[1] += F.cross_entropy(draft.flatten(0, 1), rows[:, 2:].flatten()).item() * len(rows)
        sums[2] += (draft.argmax(-1)[:, :-1] == logits.argmax(-1)[:, 1:]).float().mean().item() * len(rows)
    model.train()
    return [round(s / len(held), 4) for s in sums]


def profile_step(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=90), flush=True)


def learning_rate(done: float, peak: float) -> float:
    if done < 0.7:
        return peak
    return peak * (1 - 0.98 * (done - 0.7) / 0.3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--resume", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, required=True, help="wall clock of this run, compiling included")
    parser.add_argument("--from", dest="start", type=float, default=0.0)
    parser.add_argument("--to", dest="end", type=float, default=1.0)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tokens-per-step", type=int, default=65536)
    parser.add_argument("--peak-lr", type=float, default=2.5e-3)
    parser.add_argument("--task-share", type=float, default=0.4)
    parser.add_argument("--recall-share", type=float, default=0.22, help="of the tasks that do not begin a row")
    parser.add_argument("--recall-weight", type=float, default=2, help="of the loss on recall's answers; text has 1")
    parser.add_argument("--bos-share", type=float, default=0.5, help="of the rows of text begin with bos, as prompts do")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--watch", type=int, default=4, help="held-out windows per source to watch, 0 for none")
    parser.add_argument("--min-rate", type=float, default=0, help="give up below this many tokens a second")
    parser.add_argument("--dropout", type=float, default=0.1, help="on what each block adds to the residual stream")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--eager", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("highest")

    batch = max(1, args.tokens_per_step // args.length)
    rows = min(8, batch)
    ctx = mp.get_context("spawn")
    produced, stop, longest = ctx.Queue(maxsize=64), ctx.Event(), ctx.Value("i", 200)
    held = held_out_windows(args.data, device, args.watch)
    mix = PROSE_MIX[4096 if args.length > 1024 else 1024]
    workers = [ctx.Process(target=produce, daemon=True, args=(
        args.seed * 1000 + i + int(args.start * 1e6), args.data, args.tokenizer, args.length, mix, args.task_share,
        (args.recall_share, args.recall_weight), args.bos_share, rows, longest, produced, stop)) for i in range(args.workers)]
    for w in workers:
        w.start()

    model = Model(dropout=args.dropout)
    if args.resume:
        load_weights(model, args.resume)
    model = model.to(device)
    step_model = model if args.eager else torch.compile(model, dynamic=False, fullgraph=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=device == "cuda")

    log = open(args.out / "log.csv", "w", newline="")
    writer = csv.writer(log)
    writer.writerow(["step", "done", "seconds", "tokens", "lr", "loss", "mtp_loss", "grad_norm",
                     *(f"balance_{i}" for i in range(len(model.moe_layers())))])
    watched = []
    step, trained, warm_at, saved_at, watched_at = 0, 0, None, time.monotonic(), time.monotonic()
    recent = None
    while step < args.max_steps:
        elapsed = time.monotonic() - began
        if elapsed > args.seconds:
            break
        if step == 3:  # compiled and warm: from here the clock is the schedule
            if device == "cuda":
                torch.cuda.synchronize()
            warm_at, trained_warm = time.monotonic() - began, trained
        progress = 0.0 if warm_at is None else (elapsed - warm_at) / max(args.seconds - warm_at, 1e-9)
        done = args.start + (args.end - args.start) * min(progress, 1.0)
        longest.value = int(200 if done < 0.08 else 600 if done < 0.15 else args.length)
        lr = learning_rate(done, args.peak_lr) * min(1.0, (step + 1) / (150 if args.start == 0 else 50))
        for group in optimizer.param_groups:
            group["lr"] = lr

        parts = [produced.get(timeout=120) for _ in range(batch // rows)]
        tokens = torch.from_numpy(np.concatenate([p[0] for p in parts]).astype(np.int64)).to(device, non_blocking=True)
        weights = torch.from_numpy(np.concatenate([p[1] for p in parts]).astype(np.float32)).to(device, non_blocking=True)
        mtp_weight = torch.tensor(0.3, device=device)
        loss, main_loss, mtp_loss, counts = step_model(tokens, weights, mtp_weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gamma = 1e-3 if done < 0.9 else 0.0
        with torch.no_grad():
            for moe, n in zip(model.moe_layers(), counts):
                moe.bias += gamma * torch.sign(n.mean() - n)
        if step == 60 and (trained - trained_warm) / (elapsed - warm_at) < args.min_rate:
            profile_step(lambda: step_model(tokens, weights, mtp_weight)[0].backward())
            sys.exit("too slow")
        step += 1
        trained += tokens.shape[0] * args.length
        recent = counts if recent is None else recent + counts
        if step % 10 == 0 or step <= 3:
            balance = (recent.max(1).values / recent.mean(1)).tolist()
            recent = None
            row = [step, round(done, 5), round(time.monotonic() - began, 1), trained, f"{lr:.2e}",
                   round(main_loss.item(), 4), round(mtp_loss.item(), 4), round(norm.item(), 3), *(round(b, 3) for b in balance)]
            writer.writerow(row)
            log.flush()
            if step % 100 == 0 or step <= 30:
                print(*row, f"queue {produced.qsize()}", flush=True)
            if not math.isfinite(row[5]):
                sys.exit("loss is not finite")
        if time.monotonic() - watched_at > 30:
            watched.append([step, round(done, 4), trained, *held_out_loss(model, held)])
            print("held out: step, done, tokens, nats, MTP nats, MTP acceptance", *watched[-1], flush=True)
            watched_at = time.monotonic()
        if time.monotonic() - saved_at > 90:
            save_weights(model, args.out)
            saved_at = time.monotonic()
    stop.set()
    watched.append([step, args.end, trained, *held_out_loss(model, held)])
    print("held out: step, done, tokens, nats, MTP nats, MTP acceptance", *watched[-1], flush=True)
    save_weights(model, args.out)
    seconds = time.monotonic() - began
    summary = {"steps": step, "tokens": trained, "seconds": round(seconds, 1), "warm_at": warm_at, "from": args.start,
               "to": args.end, "length": args.length, "batch": batch, "seed": args.seed, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
               "held_out": watched, "tokens_per_second": round(trained / max(seconds - (warm_at or 0), 1e-9)),
               "arguments": {name: str(value) for name, value in vars(args).items()}}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary), flush=True)
    for w in workers:
        w.terminate()


if __name__ == "__main__":
    main()
