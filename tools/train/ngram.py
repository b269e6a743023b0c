#!/usr/bin/env python3
"""The baseline beside moebius-tiny's held-out numbers: an interpolated n-gram model with modified Kneser-Ney
smoothing (Chen and Goodman 1998, section 3), over the same tokens, trained on the same text.

    ngram.py --data packed.npz --out ngram.json [--orders 3,4,5]

Scores the very tokens evaluate.py scores, so bits per byte compare directly. The context is never cut at a window's
start, which favours this model by a hair. CPU only, NumPy only; under two minutes and 2 GB.
"""

import argparse
import json
import math
import pathlib
import time

import numpy as np

BITS = 12  # of a token id: 4,096 ids; five of them fit 60 bits
VOCAB = 1 << BITS


def grams(ids, order):
    """Every run of `order` ids as one integer, the first id in the highest bits."""
    out = np.zeros(len(ids) - order + 1, dtype=np.uint64)
    for i in range(order):
        out = (out << np.uint64(BITS)) | ids[i:len(ids) - order + 1 + i].astype(np.uint64)
    return out


def suffix(keys, order):
    """The last order - 1 ids of grams of `order` ids."""
    return keys & np.uint64((1 << (BITS * (order - 1))) - 1)


class Level:
    """One order: sorted grams with discounted probability, and the weight each context leaves to the order below."""

    def __init__(self, keys, counts):
        ones, twos, threes, fours = (max(int((counts == n).sum()), 1) for n in (1, 2, 3, 4))
        y = ones / (ones + 2 * twos)
        discounts = np.array([0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes])
        self.discounts = [round(float(d), 4) for d in discounts[1:]]
        taken = discounts[np.minimum(counts, 3)]
        context = keys >> np.uint64(BITS)
        first = np.flatnonzero(np.concatenate([[True], context[1:] != context[:-1]]))
        total = np.add.reduceat(counts.astype(np.float64), first)
        self.contexts = context[first]
        self.left = np.add.reduceat(taken, first) / total
        lengths = np.diff(np.append(first, len(keys)))
        self.keys = keys
        self.prob = (counts - taken) / np.repeat(total, lengths)

    @staticmethod
    def find(table, wanted):
        at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
        return at, table[at] == wanted

    def interpolate(self, keys, below):
        """Probability of each gram, given that of its suffix under the order below."""
        at, known = self.find(self.keys, keys)
        own = np.where(known, self.prob[at], 0.0)
        at, seen = self.find(self.contexts, keys >> np.uint64(BITS))
        return np.where(seen, own + self.left[at] * below, below)


def train(ids, order):
    """Levels 1 .. order. The highest counts occurrences, each lower one the distinct ids seen to the left."""
    keys, counts = np.unique(grams(ids, order), return_counts=True)
    levels = [Level(keys, counts)]
    for n in range(order, 1, -1):
        keys, counts = np.unique(suffix(keys, n), return_counts=True)
        levels.append(Level(keys, counts))
    return levels[::-1]


def log_probs(levels, ids):
    """Natural log of the probability of ids[1:], each given at most len(levels) - 1 ids before it."""
    order = len(levels)
    # Ids before the text: eos, as documents are joined in the training text.
    padded = np.concatenate([np.ones(order, dtype=np.uint64), ids.astype(np.uint64)])
    p = np.full(len(ids) - 1, 1.0 / VOCAB)
    for n, level in enumerate(levels, 1):
        p = level.interpolate(grams(padded[order + 2 - n:], n)[:len(ids) - 1], p)
    return np.log(p)


def check_sums(levels, ids, rng):
    """Over all next ids the probabilities must add to 1, whatever the context."""
    order = len(levels)
    for at in rng.integers(order, len(ids) - 1, 20):
        context = ids[at - order + 1:at].astype(np.uint64)
        p = np.full(VOCAB, 1.0 / VOCAB)
        for n, level in enumerate(levels, 1):
            head = np.uint64(0)
            for i in context[len(context) - n + 1:]:
                head = (head << np.uint64(BITS)) | i
            p = level.interpolate((head << np.uint64(BITS)) | np.arange(VOCAB, dtype=np.uint64), p)
        assert abs(p.sum() - 1) < 1e-9, p.sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--orders", default="3,4,5")
    parser.add_argument("--window", type=int, default=1024, help="of evaluate.py: the tail that it leaves out")
    args = parser.parse_args()
    packed = np.load(args.data)
    ids = np.concatenate([packed[k] for k in sorted(packed.files) if k.startswith("train_")])
    result = {"training_tokens": len(ids), "orders": {}}
    for order in map(int, args.orders.split(",")):
        began = time.monotonic()
        levels = train(ids, order)
        per_source, nats, size = {}, 0.0, 0.0
        for name in sorted(k for k in packed.files if k.startswith("heldout_") and "bytes" not in k):
            source, text = name[len("heldout_"):], packed[name]
            tokens = max(1, (len(text) - 2) // args.window) * args.window
            own = -log_probs(levels, text[:tokens + 1]).sum()
            own_size = int(packed["heldout_bytes_" + source][0]) * tokens / len(text)
            per_source[source] = round(own / math.log(2) / own_size, 4)
            nats, size = nats + own, size + own_size
        check_sums(levels, text, np.random.default_rng(order))
        per_source["all"] = round(nats / math.log(2) / size, 4)
        result["orders"][order] = {"bits_per_byte": per_source, "grams": [len(level.keys) for level in levels],
                                   "discounts": [level.discounts for level in levels]}
        print(f"order {order}: {per_source['all']} bits per byte, {time.monotonic() - began:.0f} s", flush=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
