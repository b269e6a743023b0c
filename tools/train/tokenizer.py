#!/usr/bin/env python3
"""Trains the byte-level BPE of moebius-tiny: 4,096 ids with DeepSeek-V3's pre-tokenizer.

    tokenizer.py --corpus corpus.jsonl.xz --out models/moebius-tiny

Ids 0-2 are bos, eos and pad, then 256 bytes, 3,813 merges, and 24 markers at the end. No merge holds two
digits: the pre-tokenizer still groups up to three, but numbers end up as single digits, which is what
sums, spelling and recall need. Writes tokenizer.json and tokenizer_config.json.
"""

import argparse
import collections
import heapq
import json
import lzma
import pathlib

import regex  # PyPI; Perl-style classes such as \p{L}

VOCAB = 4096
BAR, JOIN = "\uff5c", "\u2581"


def marker(words: str) -> str:
    return f"<{BAR}{words.replace(' ', JOIN)}{BAR}>"


BOS, EOS, PAD = marker("begin of sentence"), marker("end of sentence"), marker(" pad ")
# (text, special): the order is the order of ids, as in DeepSeek-V3's table.
MARKERS = (
    [(f"<{BAR}place{JOIN}holder{JOIN}no{JOIN}{i}{BAR}>", True) for i in range(5)]
    + [(marker("search begin"), False), (marker("search end"), False), ("<think>", False), ("</think>", False)]
    + [(marker("fim hole"), False), (marker("fim begin"), False), (marker("fim end"), False)]
    + [(marker("User"), False), (marker("Assistant"), False), ("<|EOT|>", True)]
    + [(marker(m), False) for m in ("tool calls begin", "tool calls end", "tool call begin", "tool call end",
                                    "tool outputs begin", "tool outputs end", "tool output begin",
                                    "tool output end", "tool sep")]
)
SPLITS = [
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]
CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + ('\\n\\n' if ns.system else '') + message['content'] %}"
    "{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '" + marker("User") + "' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' %}"
    "{{ '" + marker("Assistant") + "' + message['content'] + eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{% if add_generation_prompt %}{{ '" + marker("Assistant") + "' }}{% endif %}"
)


def byte_symbols():
    """GPT-2's map of bytes to printable characters."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 0
    for b in range(256):
        if b in keep:
            table[b] = chr(b)
        else:
            table[b] = chr(256 + extra)
            extra += 1
    return table


def pieces(text: str):
    """Split text by the three patterns in turn; matches and gaps are both pieces."""
    parts = [text]
    for pattern in SPLITS:
        compiled = regex.compile(pattern)
        following = []
        for part in parts:
            at = 0
            for match in compiled.finditer(part):
                if match.start() > at:
                    following.append(part[at:match.start()])
                if match.end() > match.start():
                    following.append(match.group(0))
                at = match.end()
            if at < len(part):
                following.append(part[at:])
        parts = following
    return parts


def train(counts, merges_wanted: int, symbols):
    """Classic BPE on piece counts; ties go to the pair that sorts first. Returns the merges in order."""
    words = [[symbols[b] for b in piece.encode()] for piece in counts]
    weights = list(counts.values())
    pair_count = collections.Counter()
    where = collections.defaultdict(set)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += weights[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    merges = []
    while len(merges) < merges_wanted and heap:
        negative, pair = heapq.heappop(heap)
        if pair_count[pair] != -negative:
            if pair_count[pair] > 0:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        merged = pair[0] + pair[1]
        if sum(c.isdigit() for c in merged) >= 2:
            continue
        merges.append(pair)
        changed = set()
        for w in where.pop(pair):
            word, weight = words[w], weights[w]
            for old in zip(word, word[1:]):
                pair_count[old] -= weight
                changed.add(old)
            at, out = 0, []
            while at < len(word):
                if at + 1 < len(word) and (word[at], word[at + 1]) == pair:
                    out.append(merged)
                    at += 2
                else:
                    out.append(word[at])
                    at += 1
            words[w] = out
            for new in zip(out, out[1:]):
                pair_count[new] += weight
                where[new].add(w)
                changed.add(new)
        for p in changed:
            if pair_count[p] > 0:
                heapq.heappush(heap, (-pair_count[p], p))
    return merges


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()

    counts = collections.Counter()
    with lzma.open(args.corpus, "rt") as corpus:
        for line in corpus:
            document = json.loads(line)
            if document["split"] == "train":
                # Stories are read more often in training than manuals: weigh them so here too.
                weight = {"narrative": 3, "expository": 2, "technical": 1}[document["kind"]]
                for paragraph in document["text"].split("\n"):
                    for piece in pieces(paragraph + "\n"):
                        counts[piece] += weight
    symbols = byte_symbols()
    merges = train(counts, VOCAB - 3 - 256 - len(MARKERS), symbols)

    vocab = {BOS: 0, EOS: 1, PAD: 2}
    for b in range(256):
        vocab[symbols[b]] = 3 + b
    for a, b in merges:
        vocab[a + b] = len(vocab)
    added = [(0, BOS, True), (1, EOS, True), (2, PAD, True)]
    added += [(len(vocab) + i, text, special) for i, (text, special) in enumerate(MARKERS)]
    assert added[-1][0] == VOCAB - 1, added[-1]

    def added_token(token_id, text, special):
        return {"id": token_id, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": special}

    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added_token(*a) for a in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            *({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in SPLITS),
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "vocab": vocab, "merges": [f"{a} {b}" for a, b in merges]},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")))
    config = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS, "pad_token": EOS,
        "clean_up_tokenization_spaces": False, "model_max_length": 4096, "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None, "chat_template": CHAT_TEMPLATE,
    }
    (args.out / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n")
    print(f"{len(counts)} distinct pieces, {len(merges)} merges, {len(vocab)} + {len(MARKERS)} ids")


if __name__ == "__main__":
    main()
