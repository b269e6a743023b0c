#!/usr/bin/env python3
"""Structure checks over the tracked files. Exit status 1 and one line per finding.

    tests/tidy/tidy.py [--root DIR]

Rules: includes point downward only, and each library from outside is seen by the folders it belongs to alone;
actor code reads no clock, starts no thread, takes no lock, draws no system randomness and holds no unordered
container (so that none can be iterated); files stay short; every test source is in the build; headers say
#pragma once; no leftover markers.
"""

import argparse
import pathlib
import re
import sys

# Floor of each folder; the longest matching prefix decides. Siblings on a floor are blind to each other
# unless one contains the other.
FLOORS = {
    "base": 0,
    "proto/wire": 1,
    "runtime": 2,
    "model": 2,
    "kernels": 2,
    "runtime/sim": 3,
    "runtime/ucx": 3,
    "kernels/cpu": 3,
    "kernels/cuda": 3,
    "kernels/reference": 3,
    "router": 3,
    "attention_worker": 3,
    "expert_worker": 3,
    "services": 4,
    "tests": 5,
    "bench": 5,
}

# Includes from outside the tree, and the folders that may name them.
OUTSIDE = [
    (r"grpc|google/protobuf/|moebius/v1/", ("services", "tests"), "gRPC and protobuf"),
    (r"uc[pst]/", ("runtime/ucx", "tests"), "UCX"),
    (r"cuda|cublas|nv[a-z]+\.h", ("kernels/cuda", "bench/cuda", "tests/kernels/cuda"), "CUDA"),
    (r"hwy/", ("kernels/cpu", "tests/kernels/cpu"), "Highway"),
    (r"spdlog/", ("base",), "spdlog: use base/log.h"),
]

# Code that runs inside Actor::Receive.
ACTOR_CODE = ("router/", "attention_worker/", "expert_worker/")

BANNED_IN_ACTORS = [
    (r"\b(system|steady|high_resolution|utc|file)_clock\b|\bclock_gettime\b|\bgettimeofday\b|absl::Now\b|\btime\(",
     "reads a clock: use Context::Now()"),
    (r"\b(std::)?(jthread|async|(recursive_|shared_|timed_)*mutex|condition_variable(_any)?|this_thread|"
     r"lock_guard|unique_lock|scoped_lock|shared_lock)\b|\bstd::thread\b|absl::(Mutex|MutexLock|SleepFor)\b|\bpthread_\w+"
     r"|\b(sleep|usleep|nanosleep|sched_yield)\(",
     "uses threads, locks or sleeps: use Context::Submit or a timer"),
    (r"\b(rand|srand|random|drand48|getrandom|getentropy|arc4random)\(|std::(random_device|mt19937|default_random_engine)"
     r"|absl::(Insecure)?BitGen\b",
     "uses foreign randomness: use Context::Random() or base/prng.h"),
    (r"\b(?:std::unordered_(?:map|set|multimap|multiset)|absl::(?:flat|node)_hash_(?:map|set))\b",
     "has an order that differs from run to run as soon as it is iterated: use a sorted vector or absl::btree_map"),
]

LINE_LIMIT = 700
# Files over the limit, each with the reason it is one concept.
LONG_FILES: dict[str, str] = {}

MARKERS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
INCLUDE = re.compile(r'^\s*#\s*include\s+["<]([^">]+)[">]', re.M)


def floor_of(path: str):
    """(folder, floor) of a path, or None outside the floors."""
    best = None
    for folder, floor in FLOORS.items():
        if inside(path, folder):
            if best is None or len(folder) > len(best[0]):
                best = (folder, floor)
    return best


def strip_comments(text: str) -> str:
    """Blanks comments and string literals, keeping line numbers."""
    def blank(match):
        return re.sub(r"[^\n]", " ", match.group(0))
    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.S)


def line_of(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1


def inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def check_includes(path, text, findings):
    here = floor_of(path)
    if here is None:
        return
    for match in INCLUDE.finditer(text):
        where = f"{path}:{line_of(text, match.start())}"
        for pattern, folders, library in OUTSIDE:
            if re.match(pattern, match.group(1)) and not any(inside(path, f) for f in folders):
                findings.append(f"{where}: {match.group(1)}: only {', '.join(folders)} may see {library}")
        target = floor_of(match.group(1))
        if target is None:
            continue
        if target[1] > here[1]:
            findings.append(f"{where}: floor {here[1]} ({here[0]}) includes upward: {match.group(1)}")
        elif target[1] == here[1] and target[0] != here[0] and here[1] < 5:
            findings.append(f"{where}: {here[0]} includes its sibling {target[0]}: {match.group(1)}")


def check_actor_code(path, text, findings):
    if not path.startswith(ACTOR_CODE):
        return
    code = strip_comments(text)
    for pattern, why in BANNED_IN_ACTORS:
        for match in re.finditer(pattern, code):
            findings.append(f"{path}:{line_of(code, match.start())}: {match.group(0)} {why}")


def check_file(path, text, findings):
    lines = text.count("\n")
    if lines > LINE_LIMIT and path not in LONG_FILES:
        findings.append(f"{path}:1: {lines} lines, limit {LINE_LIMIT}: split it by concept")
    if path.endswith(".h") and "#pragma once" not in text:
        findings.append(f"{path}:1: header without #pragma once")
    if not path.startswith("tests/tidy/"):
        for match in MARKERS.finditer(text):
            findings.append(f"{path}:{line_of(text, match.start())}: leftover marker {match.group(0)}")


def check_tests_built(root: pathlib.Path, sources, findings):
    for path in sources:
        if not re.search(r"^tests/.*_(test|fuzz)\.(cc|cu)$", path):
            continue
        cmake = (root / path).parent / "CMakeLists.txt"
        name = pathlib.PurePath(path).name
        lists = expand_loops(strip_cmake(cmake.read_text())) if cmake.exists() else ""
        listed = re.search(rf"(?<![\w/]){re.escape(name)}\b", lists)
        if not listed:
            findings.append(f"{path}:1: a test that is not in the build: list it in {path.rsplit('/', 1)[0]}/CMakeLists.txt")
        folder = path[len("tests/"):].rsplit("/", 1)[0]
        top = strip_cmake((root / "tests/CMakeLists.txt").read_text())
        if not re.search(rf"(?<![\w/]){re.escape(folder)}(?![\w/])", top):
            findings.append(f"{path}:1: folder tests/{folder} is not added by tests/CMakeLists.txt")


def strip_cmake(text: str) -> str:
    return re.sub(r"#[^\n]*", "", text)


def expand_loops(text: str) -> str:
    """Writes out `foreach(x IN ITEMS a b)` bodies, once for each item."""
    def expand(match):
        name, items, body = match.group(1), match.group(2).split(), match.group(3)
        return "".join(body.replace("${" + name + "}", item) for item in items)
    return re.sub(r"foreach\((\w+) IN ITEMS ([^)]*)\)(.*?)endforeach\(\)", expand, text, flags=re.S)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", default=str(pathlib.Path(__file__).resolve().parents[2]))
    root = pathlib.Path(parser.parse_args().root)
    skip = {"build", ".git", ".venv", "models", ".carry", ".whl", ".gpu"}
    sources = sorted(
        str(p.relative_to(root)) for p in root.rglob("*")
        if p.suffix in {".h", ".cc", ".cu", ".cuh"} and not skip & set(p.relative_to(root).parts))
    findings: list[str] = []
    for path in sources:
        text = (root / path).read_text(errors="replace")
        check_includes(path, text, findings)
        check_actor_code(path, text, findings)
        check_file(path, text, findings)
    check_tests_built(root, sources, findings)
    for finding in findings:
        print(finding)
    print(f"tidy: {len(sources)} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
