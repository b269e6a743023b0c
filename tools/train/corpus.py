#!/usr/bin/env python3
"""Rebuilds the training text from Debian packages (downloaded, unpacked, never installed).

    corpus.py --work DIR --out corpus.jsonl.xz

One JSON line per document: {"source", "kind", "split", "text"}; kind is narrative, expository or
technical; split is train or heldout (the last documents of each source, 2 % of its characters, so that
no paragraph of a held-out document was trained on). Beside it corpus.sources.json records package
versions, licences, sizes and the SHA-256 of the text.
"""

import argparse
import gzip
import hashlib
import html
import json
import lzma
import pathlib
import re
import struct
import subprocess
import zlib

# source -> (packages, kind, cap in characters or None, licence as Debian's copyright file has it)
SOURCES = {
    "austen": (["r-cran-janeaustenr"], "narrative", None, "text public domain; package MIT"),
    "twain_doyle": (["golang-github-pierrec-lz4-dev"], "narrative", None, "texts public domain; package BSD-3-clause"),
    "wesnoth": (["wesnoth-1.16-" + c for c in (
        "core did dm dw ei httt l low nr sof sota sotbe thot trow tsg ttb utbs data").split()],
        "narrative", None, "GPL-2+"),
    "endless_sky": (["endless-sky-data"], "narrative", None, "GPL-3+"),
    "bible_web": (["sword-text-web"], "narrative", None, "public domain"),
    "opticks": (["golang-1.19-src"], "expository", None, "text public domain; package BSD-3-clause"),
    "henry": (["sword-comm-mhcc"], "expository", None, "public domain"),
    "cataclysm": (["cataclysm-dda-data"], "expository", None, "CC-BY-SA-3.0"),
    "crawl": (["crawl-common"], "expository", None, "GPL-2+"),
    "fortunes": (["fortunes", "fortunes-min"], "expository", None, "BSD and mixed, see the packages"),
    "dictionaries": (["dict-jargon", "dict-foldoc", "dict-devil"], "expository", None,
                     "public domain; FOLDOC GFDL"),
    "wordnet": (["wordnet-base"], "expository", None, "WordNet licence (permissive)"),
    "debian_books": (["debian-handbook", "debian-reference-en", "developers-reference", "debian-policy",
                      "debian-faq"], "technical", None, "GPL-2+ or CC-BY-SA-3.0"),
    "python": (["python3.11-doc"], "technical", None, "PSF"),
    "postgresql": (["postgresql-doc-15"], "technical", None, "PostgreSQL"),
    "perl": (["perl-doc"], "technical", 1_500_000, "Artistic or GPL-1+"),
    "django": (["python-django-doc"], "technical", 1_500_000, "BSD-3-clause"),
    "git": (["git-doc"], "technical", 1_000_000, "GPL-2"),
    "emacs": (["emacs-common"], "technical", 1_000_000, "GPL-3+"),
    "vim": (["vim-runtime"], "technical", 1_000_000, "Vim licence"),
}
HELD_OUT = 0.02

FOLD = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--",
                      "\u2026": "...", "\u00a0": " ", "\u2010": "-", "\u2011": "-", "\u2212": "-"})
FUNCTION_WORDS = set((
    "the of and to a in is it that for on with as be by this are was or an not from at you have which but if"
    " he his they we can will when has their there one all her she had were been so no more than into out do"
    " its would your my me him them who what about up other some any may only such these those then how also"
    " just over after before where because most must each between through same own does both under while very"
    " should could still here now our us did").split())


def tidy_paragraph(text: str) -> str:
    return re.sub(r"\s+", " ", text.translate(FOLD)).strip()


def good_prose(p: str) -> bool:
    """Novels and stories: short lines of dialogue stay."""
    if len(p) < 12 or not p.isascii() and sum(c.isascii() for c in p) < 0.985 * len(p):
        return False
    return sum(c.isalpha() or c == " " for c in p) >= 0.80 * len(p)


def good_exposition(p: str) -> bool:
    """Manuals and games: whole sentences of English, no code, tables or paths."""
    if len(p) < 60 or sum(c.isascii() for c in p) < 0.985 * len(p):
        return False
    if sum(c.isalpha() or c == " " for c in p) < 0.88 * len(p):
        return False
    if re.search(r"[{}<>|\\=_]|\(\)|::|https?:|(^|\s)/\w+/", p):
        return False
    words = re.findall(r"[a-z']+", p.lower())
    return len(words) >= 8 and sum(w in FUNCTION_WORDS for w in words) >= 0.22 * len(words)


def paragraphs(text: str):
    for block in re.split(r"\n\s*\n", text):
        p = tidy_paragraph(block)
        if p:
            yield p


def strip_html(raw: str) -> str:
    raw = re.sub(r"(?is)<(script|style|pre|table|head|code\b[^>]*>\s*<pre)\b.*?</\1>", " ", raw)
    raw = re.sub(r"(?i)</?(p|div|li|dd|dt|h[1-6]|br|tr|ul|ol|dl|section)\b[^>]*>", "\n\n", raw)
    return html.unescape(re.sub(r"<[^>]+>", "", raw))


def read(path: pathlib.Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")


def files(roots, *patterns):
    found = set()
    for root in roots:
        for pattern in patterns:
            found.update(p for p in root.rglob(pattern) if p.is_file() and not p.is_symlink())
    return sorted(found)


def austen(roots):
    raw = files(roots, "Rdata.rdb")[0].read_bytes()
    rest = raw
    while len(rest) > 4:  # records of [4-byte length after unpacking, zlib stream]
        stream = zlib.decompressobj()
        data = stream.decompress(rest[4:])
        rest = stream.unused_data
        lines = []
        for match in re.finditer(rb"\x00[\x04\x01]\x00\x09(....)", data, flags=re.S):
            (length,) = struct.unpack(">I", match.group(1))
            if length <= 200:
                lines.append(data[match.end():match.end() + length].decode("utf-8", errors="replace"))
        book = "\n".join(lines)
        if len(book) < 100_000:
            continue
        # A document per chapter, so that the held-out part is the last chapters.
        for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter)\s+[\dIVXLC]+)", book):
            yield "\n\n".join(p for p in paragraphs(chapter) if good_prose(p))


def gutenberg(text: str) -> str:
    text = text.replace("\r", "")
    start = re.search(r"\*\*\* ?START[^\n]*\n", text)
    end = re.search(r"\*\*\* ?END|End of (the )?Project Gutenberg", text)
    return text[start.end() if start else 0:end.start() if end else len(text)]


def twain_doyle(roots):
    for name in ("Mark.Twain-Tom.Sawyer_long.txt", "pg1661.txt"):
        text = gutenberg(read(files(roots, name)[0]))
        for chapter in re.split(r"\n(?=CHAPTER [IVXLC]+|ADVENTURE [IVXLC]+|[IVX]+\. THE ADVENTURE)", text):
            yield "\n\n".join(p for p in paragraphs(chapter) if good_prose(p))


def opticks(roots):
    text = gutenberg(read([p for p in files(roots, "Isaac.Newton-Opticks.txt")][0]))
    for part in re.split(r"\n(?=_?PROP\. [IVXLC]+|_?Qu\. \d+|OBS\. )", text):
        yield "\n\n".join(p.replace("_", "") for p in paragraphs(part) if good_prose(p.replace("_", "")))


def sword(roots, block_name):
    """SWORD's compressed modules: .bzs holds 12-byte records (offset, size, unpacked size) into .bzz."""
    for index in files(roots, "*.bzs"):
        blob = index.with_suffix(".bzz").read_bytes()
        records = index.read_bytes()
        for at in range(0, len(records) - 11, 12):
            offset, size, _ = struct.unpack("<III", records[at:at + 12])
            text = zlib.decompress(blob[offset:offset + size]).decode("utf-8", errors="replace")
            text = re.sub(r"(?is)<(note|title|div type=.?x-)[^>]*>.*?</\1[^>]*>", " ", text)
            text = re.sub(r"(?i)<(chapter|p|div|lb|br)\b[^>]*/?>", "\n\n", text)
            text = re.sub(r"(?i)</(p|div|verse)>", " ", text)
            text = html.unescape(re.sub(r"<[^>]+>", " ", text))
            text = re.sub(r"\s+([,.;:!?'])", r"\1", re.sub(r"[ \t\0]+", " ", text))
            if "\n\n" not in text.strip():  # one long block: cut it at sentence ends
                text = re.sub(r"((?:[^.!?]+[.!?]['\"]?\s+){8})", r"\1\n\n", text)
            yield "\n\n".join(p for p in paragraphs(text) if good_prose(p))


def wesnoth(roots):
    for path in files(roots, "*.cfg"):
        if "/campaigns/" not in str(path):
            continue
        out = []
        for match in re.finditer(r'_\s*"((?:[^"]|"")*)"', read(path)):
            text = re.sub(r"^[\w ,:*]*\^", "", match.group(1).replace('""', '"'))
            text = re.sub(r"<[^>]+>", "", text)
            for p in paragraphs(text):
                if good_prose(p) and len(p) > 25:
                    out.append(p)
        yield "\n\n".join(out)


def endless_sky(roots):
    names = {"<first>": "Sam", "<last>": "Carter", "<ship>": "Wanderer", "<origin>": "Earth",
             "<destination>": "New Boston", "<planet>": "Earth", "<commodity>": "grain", "<npc>": "the ship",
             "<system>": "Sol", "<bunks>": "four", "<tons>": "ten tons", "<cargo>": "ten tons of grain"}
    for path in files(roots, "*.txt"):
        if "/data/" not in str(path):
            continue
        out = []
        for match in re.finditer(r'`([^`]+)`|"([^"\n]{50,})"', read(path)):
            text = match.group(1) or match.group(2)
            text = re.sub(r"<[^>]+>", lambda m: names.get(m.group(0), "them"), text)
            for p in paragraphs(text):
                if good_prose(p):
                    out.append(p)
        yield "\n\n".join(out)


CRUDE = re.compile(r"\b(fuck|shit|cunt|piss|dick|cock|whore|slut|nigg|rape|penis|porn|tits)\w*", re.I)


def cataclysm(roots):
    def strings(node):
        if isinstance(node, str):
            if len(node) > 50:
                yield node
        elif isinstance(node, dict):
            for value in node.values():
                yield from strings(value)
        elif isinstance(node, list):
            for value in node:
                yield from strings(value)
    for path in files(roots, "*.json"):
        try:
            tree = json.loads(read(path))
        except ValueError:
            continue
        out = []
        for text in strings(tree):
            for p in paragraphs(re.sub(r"<[^>]+>", "", text)):
                if good_exposition(p) and not CRUDE.search(p):
                    out.append(p)
        yield "\n\n".join(out)


def crawl(roots):
    for path in files(roots, "*.txt"):
        if "/descript/" in str(path) or "/database/" in str(path):
            out = [p for p in paragraphs(read(path)) if good_exposition(p) and not CRUDE.search(p)]
            yield "\n\n".join(out)


def fortunes(roots):
    for path in files(roots, "*"):
        if "/games/fortunes/" not in str(path) or path.suffix in (".dat", ".u8"):
            continue
        if "off" in str(path) or path.name in ("limerick", "ascii-art", "zippy"):
            continue
        out = []
        for item in re.split(r"\n%\n", read(path)):
            out += [p for p in paragraphs(item) if good_exposition(p) and not CRUDE.search(p)]
        yield "\n\n".join(out)


def dictionaries(roots):
    for path in files(roots, "*.dict.dz"):
        out = []
        for p in paragraphs(read(path)):
            p = re.sub(r"[{}]", "", p)
            if good_exposition(p) and not CRUDE.search(p):
                out.append(p)
        for at in range(0, len(out), 50):
            yield "\n\n".join(out[at:at + 50])


def wordnet(roots):
    """Quoted examples only; the glosses serve the question tasks (tasks.py)."""
    out = []
    for path in files(roots, "data.noun", "data.verb", "data.adj", "data.adv"):
        for line in read(path).splitlines():
            if "|" in line:
                for example in re.findall(r'"([^"]{30,})"', line.split("|", 1)[1]):
                    if good_prose(example):
                        out.append(example[0].upper() + example[1:] + ("" if example[-1] in ".!?" else "."))
    for at in range(0, len(out), 40):
        yield "\n\n".join(tidy_paragraph(p) for p in out[at:at + 40])


def manuals(roots, *patterns, reject=None):
    for path in files(roots, *patterns):
        if reject and re.search(reject, str(path)):
            continue
        raw = read(path)
        text = strip_html(raw) if path.suffix in (".html", ".htm") else raw
        text = re.sub(r"[A-Z]<+ ?([^<>]*) ?>+", r"\1", text)  # POD markup
        yield "\n\n".join(p for p in paragraphs(text) if good_exposition(p) and not CRUDE.search(p))


READERS = {
    "austen": austen, "twain_doyle": twain_doyle, "wesnoth": wesnoth, "endless_sky": endless_sky,
    "bible_web": lambda r: sword(r, "web"), "opticks": opticks, "henry": lambda r: sword(r, "mhcc"),
    "cataclysm": cataclysm, "crawl": crawl, "fortunes": fortunes, "dictionaries": dictionaries,
    "wordnet": wordnet,
    "debian_books": lambda r: manuals(r, "*.html", reject=r"/(de|fr|es|it|ja|ru|pt|zh|pl|ko|nl|id|tr|vi|sv|cs|el|fa|hr|nb|ro|da)(-\w+)?/|\.(de|fr|es|it|ja|ru|pt|zh|pl|ko|nl)(-\w+)?\.html"),
    "python": lambda r: manuals(r, "*.html", reject=r"genindex|py-modindex|changelog"),
    "postgresql": lambda r: manuals(r, "*.html", reject=r"release-"),
    "perl": lambda r: manuals(r, "*.pod", "*.pod.gz", reject=r"perl5\d+delta"),
    "django": lambda r: manuals(r, "*.html", reject=r"genindex|/releases/"),
    "git": lambda r: manuals(r, "*.html", reject=r"RelNotes"),
    "emacs": lambda r: manuals(r, "NEWS*"),
    "vim": lambda r: manuals(r, "*.txt", "*.txt.gz"),
}


def fetch(packages, work: pathlib.Path):
    """Downloads and unpacks; returns (roots, versions)."""
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    missing = [p for p in packages if not list(debs.glob(f"{p}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=debs, check=True)
    roots, versions = [], {}
    for package in packages:
        deb = sorted(debs.glob(f"{package}_*.deb"))[-1]
        root = work / "x" / package
        if not root.exists():
            root.mkdir(parents=True)
            subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
        roots.append(root)
        versions[package] = deb.name.split("_")[1].replace("%3a", ":")
    return roots, versions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    seen, digest, record = set(), hashlib.sha256(), {}
    with lzma.open(args.out, "wt", preset=4) as out:
        for source, (packages, kind, cap, licence) in SOURCES.items():
            roots, versions = fetch(packages, args.work)
            documents = []
            total = 0
            for document in READERS[source](roots):
                kept = []
                for p in document.split("\n\n"):
                    key = hash(p)
                    if key not in seen:
                        seen.add(key)
                        kept.append(p)
                text = "\n\n".join(kept)
                if len(text) < 200:
                    continue
                documents.append(text)
                total += len(text)
                if cap and total >= cap:
                    break
            held, held_from = 0, len(documents)
            while held_from > 1 and held < HELD_OUT * total:
                held_from -= 1
                held += len(documents[held_from])
            for number, text in enumerate(documents):
                split = "heldout" if number >= held_from else "train"
                line = json.dumps({"source": source, "kind": kind, "split": split, "text": text})
                digest.update(line.encode())
                out.write(line + "\n")
            record[source] = {"kind": kind, "licence": licence, "packages": versions,
                              "documents": len(documents), "characters": total, "heldout_characters": held}
            print(f"{source:14} {kind:10} {total/1e6:6.2f} MB {len(documents)} documents", flush=True)
    record_path = args.out.with_name("corpus.sources.json")
    record_path.write_text(json.dumps({"sha256": digest.hexdigest(), "sources": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
