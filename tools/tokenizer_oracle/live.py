#!/usr/bin/env python3
"""Compares our tokenizer with the installed Hugging Face `tokenizers` on freshly made strings.

    live.py TEST_BINARY SOURCE_DIR

TEST_BINARY is tokenizer_golden_test. The module is looked for in the running Python, then in SOURCE_DIR/.venv; exit
status 77 (skipped) if neither has it.
"""

import os
import subprocess
import sys
import tempfile


def main():
    binary, source = sys.argv[1:3]
    try:
        import tokenizers
    except ImportError as error:
        private = os.path.join(source, ".venv/bin/python")
        if os.path.exists(private) and not os.environ.get("MOEBIUS_ORACLE_VENV"):
            os.environ["MOEBIUS_ORACLE_VENV"] = "tried"
            os.execv(private, [private] + sys.argv)
        print(f"skipped: {error}; the committed golden is still compared by tokenizer_golden_test")
        return 77
    print(f"oracle: tokenizers {tokenizers.__version__}")
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "make_golden.py")
    golden = os.path.join(source, "tests/model/golden")
    status = subprocess.call([sys.executable, script, "check", f"{golden}/tokenizer.json",
                              f"{golden}/tokenizer_cases.bin"])
    trained = os.path.join(source, "models/moebius-tiny/tokenizer.json")
    if not os.path.exists(trained):
        print(f"{trained} is not there: compared the test tokenizer only")
        return status
    with tempfile.TemporaryDirectory() as directory:
        cases = os.path.join(directory, "cases.bin")
        status |= subprocess.call([sys.executable, script, "cases", trained, cases])
        environment = dict(os.environ, MOEBIUS_TOKENIZER_JSON=trained,
                           MOEBIUS_TOKENIZER_CASES=cases)
        status |= subprocess.call([binary], env=environment)
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
