#!/usr/bin/env python3
"""Averages the weights of runs, parameter by parameter, balance biases included: a start for a further run.

    average.py --runs run1 run2 --shares 0.6,0.4 --out mean
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from train import PARTS  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--shares", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    shares = [float(s) for s in args.shares.split(",")]
    if len(shares) != len(args.runs) or abs(sum(shares) - 1) > 1e-6:
        parser.error("one share per run, adding to 1")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in range(PARTS):
        name = f"weights.{part}.f32"
        mean = sum(s * np.fromfile(run / name, "<f4").astype(np.float64) for s, run in zip(shares, args.runs))
        mean.astype("<f4").tofile(args.out / name)


if __name__ == "__main__":
    main()
