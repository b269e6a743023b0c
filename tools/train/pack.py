#!/usr/bin/env python3
"""Tokenises the corpus once: packed.npz for train.py and evaluate.py.

    pack.py --corpus corpus.jsonl.xz --work DIR --tokenizer models/moebius-tiny/tokenizer.json --out packed.npz

Arrays: train_<kind> (uint16, documents joined by eos, bos), heldout_<source>, heldout_bytes_<source>, and the
WordNet nouns with their glosses for the tasks.
"""

import argparse
import json
import lzma
import pathlib
import re

import numpy as np
from tokenizers import Tokenizer


def glosses(work: pathlib.Path):
    """(noun, definition) pairs of common single words, sorted by the noun's hash to mix the alphabet."""
    import zlib
    out = {}
    for path in (work / "x" / "wordnet-base").rglob("data.noun"):
        for line in path.read_text(errors="replace").splitlines():
            fields = line.split("|", 1)
            if len(fields) != 2 or line.startswith("  "):
                continue
            word = fields[0].split()[4]
            gloss = re.split(r';\s*"|;', fields[1].strip())[0].strip()
            if re.fullmatch(r"[a-z]{3,10}", word) and word not in out and 12 <= len(gloss) <= 90 and "(" not in gloss:
                out[word] = gloss
    return sorted(out.items(), key=lambda item: zlib.crc32(item[0].encode()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    arrays = {}
    with lzma.open(args.corpus, "rt") as corpus:
        for line in corpus:
            d = json.loads(line)
            ids = [0, *tokenizer.encode(d["text"]).ids, 1]
            if d["split"] == "train":
                arrays.setdefault("train_" + d["kind"], []).extend(ids)
            else:
                arrays.setdefault("heldout_" + d["source"], []).extend(ids)
                arrays.setdefault("heldout_bytes_" + d["source"], [0])[0] += len(d["text"].encode())
    packed = {k: np.array(v, dtype=np.int64 if "bytes" in k else np.uint16) for k, v in arrays.items()}
    pairs = glosses(args.work)
    packed["glosses"] = np.frombuffer(json.dumps(pairs).encode(), dtype=np.uint8)
    np.savez_compressed(args.out, **packed)
    for k, v in packed.items():
        if k.startswith("train"):
            print(k, len(v), "tokens")
    print(len(pairs), "glosses")


if __name__ == "__main__":
    main()
