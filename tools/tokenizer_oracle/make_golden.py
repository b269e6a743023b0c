#!/usr/bin/env python3
"""Makes the tokenizer fixtures of tests/model/golden, with Hugging Face `tokenizers` as the oracle.

    make_golden.py train OUT/tokenizer.json          trains the small test tokenizer
    make_golden.py cases TOKENIZER.json OUT.bin      writes strings with the oracle's ids
    make_golden.py check TOKENIZER.json IN.bin       compares a golden with the installed oracle

The strings come from a fixed seed: words of many scripts, digits, code, white space, added tokens,
emoji, random code points. Code points newer than Unicode 14 are left out, since PCRE2 10.42 and
Oniguruma disagree about them. Format of a golden (all numbers LEB128):

    "MTOK1\n"
    count, then per string: byte length, bytes, id count, ids        (added tokens matched)
                            0, or 1 + id count, ids                  (added tokens ignored, if different)
    count, then per id list: id count, ids, byte length, text with special tokens,
                            byte length, text without them
"""

import json
import random
import sys
import unicodedata

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPLITS = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]
SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
MARKERS = ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜tool▁calls▁begin｜>",
           "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"]
# A token that is a prefix of another, and tokens of the second matching pass.
NORMALIZED = ["<｜User", "[[mark]]", "<|EOT|>"]

WORDS = """the of and to in is that for it was on with as his he be at by which this had not are but
from or have an they her all their would there been one so will more no if out said what when your
up some into than time only could these two may then do first any my now such like our over man me
even most made after also did many before must through years where much way well down should because
each just those people how too little state good very make world still own see men work long get here
between both life being under never day same another know while last might us great old year off come
since against go came right used take three Hello WORLD It's won't I'll you've they'd can't naïve café
Übergröße straße garçon señor Ærøskøbing łódź žluťoučký kůň őrült ţară İstanbul ağaç
Привет мир съешь ещё этих мягких французских булок Ελληνικά αλφάβητο ξεσκεπάζω Հայերեն ქართული
שלום עולם בראשית مرحبا بالعالم اللغة العربية हिन्दी में नमस्ते दुनिया বাংলা தமிழ் ไทย ภาษาไทย ລາວ
한국어 안녕하세요 세계 中文 你好世界 简体字 繁體字 日本語 ひらがな カタカナ 漢字 東京 ภาษา tiếng Việt nhé
int x = 0; for (i = 0; i < n; ++i) { return f(a[i], b->c); } def __init__(self): print("ok")
std::vector<int> #include template constexpr lambda: await async null undefined != == <= >= && || ->
SELECT * FROM t WHERE id = 42; http://example.org/path?q=1&r=2 user@example.org C:\\Windows\\x 3.14159
""".split()
MARKS = list(".,;:!?'\"()[]{}<>-_=+*/\\|@#$%^&~`") + ["...", "--", "—", "«", "»", "„", "“", "。", "、",
                                                     "！", "€", "£", "∑", "≤", "→", "°", "①", "½", "Ⅷ"]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", " \n", "\u00a0", "\u3000", "\u2003",
          "\u180e", "\u0085", "\u2028", "\x0b", "\x0c", "\u200b", "\ufeff"]
DIGITS = ["0", "7", "12", "123", "1234", "1234567", "2024", "3.14", "1,000,000", "0x1F", "٣٤٥", "१२३",
          "１２３４", "²³", "⅓", "1e-6", "192.168.0.1"]
EMOJI = ["😀", "👍🏽", "👨‍👩‍👧", "🇩🇪", "❤️", "🤖🤖"]


def random_code_point(rng):
    while True:
        block = rng.choice([(0x20, 0x7F), (0x80, 0x250), (0x250, 0x600), (0x600, 0xE00),
                            (0xE00, 0x2000), (0x2000, 0x2C00), (0x2C00, 0xA000), (0xA000, 0xD7FF),
                            (0xE000, 0xFFFF), (0x10000, 0x1F000), (0x1F000, 0x20000),
                            (0x20000, 0x110000), (0, 0x20)])
        c = chr(rng.randrange(*block))
        # Known to Python 3.11's Unicode 14 tables, or permanently without assignment.
        if unicodedata.category(c) not in ("Cn", "Cs"):
            return c


def random_string(rng):
    kind = rng.random()
    if kind < 0.05:
        return "".join(random_code_point(rng) for _ in range(rng.randrange(1, 12)))
    if kind < 0.08:
        c = rng.choice(["a", " ", "\n", "!", "9", "한", "中", "é", "=", "ab", " a", "the"])
        return c * rng.randrange(1, 120)
    out = []
    for _ in range(rng.randrange(1, 9)):
        part = rng.random()
        if part < 0.52:
            out.append(rng.choice(WORDS))
        elif part < 0.62:
            out.append(rng.choice(MARKS))
        elif part < 0.72:
            out.append(rng.choice(DIGITS))
        elif part < 0.76:
            out.append(str(rng.randrange(10 ** rng.randrange(1, 12))))
        elif part < 0.79:
            out.append(rng.choice(EMOJI))
        elif part < 0.83:
            out.append(rng.choice(SPECIAL + MARKERS + NORMALIZED))
        elif part < 0.85:
            token = rng.choice(SPECIAL + MARKERS)
            out.append(token[:rng.randrange(1, len(token))])
        elif part < 0.89:
            out.append(random_code_point(rng))
        elif part < 0.93:
            word = rng.choice(WORDS)
            out.append(unicodedata.normalize("NFD", word).swapcase())
        if rng.random() < 0.8:
            out.append(" " if rng.random() < 0.7 else rng.choice(SPACES))
    return "".join(out)


def configure(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(s), "isolated", invert=False) for s in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()


def train(path):
    rng = random.Random(20240)
    tokenizer = Tokenizer(models.BPE())
    configure(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    corpus = []
    for _ in range(4000):
        corpus.append(" ".join(rng.choice(WORDS) for _ in range(rng.randrange(2, 12))))
        corpus.append(rng.choice([" ", "    ", "\n", "\n\n", "        "]) + rng.choice(WORDS))
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in MARKERS])
    tokenizer.add_tokens([AddedToken(t, normalized=True, special=t == "<|EOT|>")
                          for t in NORMALIZED])
    data = json.loads(tokenizer.to_str())
    with open(path, "w", encoding="utf-8") as f:
        json.dump(data, f, ensure_ascii=False, separators=(",", ":"))


def without_added_tokens(path):
    with open(path, encoding="utf-8") as f:
        data = json.load(f)
    data["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(data))


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def strings():
    rng = random.Random(7)
    fixed = ["", " ", "\n", "a", "Hello, WORLD!! How's it going? 123 一二三", "    int x = 1234;\n",
             "a.b_c  d\r\n\r\n e", "Hello!", "Hello <｜begin▁of▁sentence｜> world"]
    fixed += SPECIAL + MARKERS + NORMALIZED + ["<｜User｜", "<｜User<｜User｜>", "[[mark", "<|EOT|>>"]
    fixed += WORDS + MARKS + SPACES + DIGITS + EMOJI
    seen = dict.fromkeys(fixed)
    while len(seen) < 12000:
        seen.setdefault(random_string(rng))
    return list(seen)


def id_lists(tokenizer):
    rng = random.Random(11)
    size = tokenizer.get_vocab_size()
    lists = [[], [0], [size - 1], [size + 5, 3]]
    while len(lists) < 1500:
        lists.append([rng.randrange(size + 2) if rng.random() < 0.5 else rng.randrange(3, 259)
                      for _ in range(rng.randrange(1, 14))])
    return lists


def blob(data):
    return varint(len(data)) + data


def encode_cases(tokenizer_path, texts, lists):
    tokenizer = Tokenizer.from_file(tokenizer_path)
    plain = without_added_tokens(tokenizer_path)
    out = [b"MTOK1\n", varint(len(texts))]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ignored = plain.encode(text, add_special_tokens=False).ids
        out += [blob(text.encode()), varint(len(ids))] + [varint(i) for i in ids]
        if ignored == ids:
            out.append(varint(0))
        else:
            out += [varint(1 + len(ignored))] + [varint(i) for i in ignored]
    out.append(varint(len(lists)))
    for ids in lists:
        out += [varint(len(ids))] + [varint(i) for i in ids]
        for skip in (False, True):
            out.append(blob(tokenizer.decode(ids, skip_special_tokens=skip).encode()))
    return b"".join(out)


def read_inputs(path):
    """The strings and id lists of a golden, without the oracle's answers."""
    with open(path, "rb") as f:
        data = f.read()
    at = 6

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def bytes_():
        nonlocal at
        size = number()
        at += size
        return data[at - size:at]

    def ids(count):
        return [number() for _ in range(count)]

    texts, lists = [], []
    for _ in range(number()):
        texts.append(bytes_().decode())
        ids(number())
        ids(max(0, number() - 1))
    for _ in range(number()):
        lists.append(ids(number()))
        bytes_()
        bytes_()
    return data, texts, lists


def main():
    if sys.argv[1] == "train":
        train(sys.argv[2])
        return 0
    if sys.argv[1] == "cases":
        texts, lists = strings(), id_lists(Tokenizer.from_file(sys.argv[2]))
        golden = encode_cases(sys.argv[2], texts, lists)
        with open(sys.argv[3], "wb") as f:
            f.write(golden)
        print(f"{len(texts)} strings, {len(lists)} id lists, {len(golden)} bytes")
        return 0
    if sys.argv[1] == "check":
        golden, texts, lists = read_inputs(sys.argv[3])
        same = encode_cases(sys.argv[2], texts, lists) == golden
        print(f"{len(texts)} strings:",
              "the golden is what this oracle gives" if same else "THE GOLDEN DIFFERS")
        return 0 if same else 1
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main())
