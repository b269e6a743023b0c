#!/usr/bin/env python3
"""Plants one violation of each tidy rule in a scratch tree and expects tidy.py to name it."""

import pathlib
import subprocess
import sys
import tempfile

TIDY = pathlib.Path(__file__).with_name("tidy.py")

# rule -> (files to write, what the finding must contain)
PLANTED = {
    "upward include": ({"base/low.h": '#pragma once\n#include "router/placement.h"\n'}, "includes upward"),
    "sibling include": ({"router/a.h": '#pragma once\n#include "expert_worker/b.h"\n'}, "includes its sibling"),
    "seam blind to implementation": ({"runtime/node.h": '#pragma once\n#include "runtime/ucx/ucx.h"\n'},
                                     "includes upward"),
    "clock": ({"router/a.cc": "auto t = std::chrono::steady_clock::now();\n"}, "reads a clock"),
    "thread": ({"expert_worker/a.cc": "std::thread worker;\n"}, "uses threads"),
    "rand": ({"attention_worker/a.cc": "int x = rand();\n"}, "foreign randomness"),
    "clock by another name": ({"router/a.cc": "using std::chrono::steady_clock;\nauto t = steady_clock::now();\n"},
                              "reads a clock"),
    "lock": ({"router/a.h": "#pragma once\nvoid F() { std::lock_guard lock(m); }\n"}, "uses threads"),
    "sleep": ({"router/a.cc": "void F() { absl::SleepFor(d); }\n"}, "uses threads"),
    "random generator": ({"router/a.cc": "absl::BitGen gen;\n"}, "foreign randomness"),
    # The member may be declared in one file and iterated in another: the member is what is found.
    "unordered container": ({"router/a.h": "#pragma once\nabsl::flat_hash_map<int, int> rows_;\n",
                             "router/a.cc": "void F() { for (auto& r : rows_) {} }\n"},
                            "has an order that differs"),
    "gRPC in a role": ({"router/a.cc": "#include <grpcpp/grpcpp.h>\n"}, "may see gRPC"),
    "protobuf in a role": ({"expert_worker/a.cc": '#include "moebius/v1/worker.pb.h"\n'}, "may see gRPC"),
    "UCX in a role": ({"attention_worker/a.cc": "#include <ucp/api/ucp.h>\n"}, "may see UCX"),
    "CUDA in a role": ({"expert_worker/a.cc": "#include <cuda_runtime.h>\n"}, "may see CUDA"),
    "Highway beside the CPU kernels": ({"kernels/reference/a.cc": "#include <hwy/highway.h>\n"}, "may see Highway"),
    "spdlog in a service": ({"services/a.cc": "#include <spdlog/spdlog.h>\n"}, "may see spdlog"),
    "file length": ({"model/long.cc": "int x;\n" * 701}, "limit 700"),
    "test not in the build": ({"tests/model/lost_test.cc": "int x;\n"}, "not in the build"),
    "test commented out": ({"tests/model/lost_test.cc": "int x;\n",
                            "tests/model/CMakeLists.txt": "# moebius_test(lost_test SRCS lost_test.cc)\n"},
                           "not in the build"),
    "folder not added": ({"tests/ghost/a_test.cc": "int x;\n",
                          "tests/ghost/CMakeLists.txt": "moebius_test(a_test SRCS a_test.cc)\n"}, "is not added"),
    "no pragma once": ({"base/bare.h": "int x;\n"}, "#pragma once"),
    "leftover marker": ({"base/a.cc": "// TO" + "DO: later\n"}, "leftover marker"),
}
# Things that look like violations and are not.
CLEAN = {
    "router/ok.cc": '#include "base/check.h"\n// std::thread in a comment\nconst char* s = "rand()";\n'
                    "absl::btree_map<int, int> rows_;\nconst char* t = \"absl::flat_hash_map\";\n",
    "services/ok.cc": "#include <grpcpp/grpcpp.h>\nabsl::flat_hash_map<int, int> names_;\n",
    "runtime/ucx/ok.cc": "#include <ucp/api/ucp.h>\n",
    "runtime/sim/ok.cc": '#include "runtime/node.h"\n',
    "tests/model/kept_test.cc": '#include "services/cli/x.h"\n',
    "tests/model/CMakeLists.txt": "moebius_test(kept_test SRCS kept_test.cc)\n",
}


def run(files: dict[str, str]) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        (root / "tests").mkdir()
        (root / "tests/CMakeLists.txt").write_text("foreach(folder IN ITEMS base model tidy)\n")
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        done = subprocess.run([sys.executable, TIDY, "--root", scratch], capture_output=True, text=True)
        return done.returncode, done.stdout


def main() -> int:
    failed = 0
    for rule, (files, expected) in PLANTED.items():
        code, output = run(files)
        if code != 1 or expected not in output:
            failed += 1
            print(f"NOT CAUGHT: {rule}: exit {code}, output: {output}")
        else:
            print(f"caught: {rule}")
    code, output = run(CLEAN)
    if code != 0:
        failed += 1
        print(f"false alarm on clean files: {output}")
    print(f"{len(PLANTED)} planted violations, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
