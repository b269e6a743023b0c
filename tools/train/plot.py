#!/usr/bin/env python3
"""Draws a training as one SVG: loss and expert balance over the steps of all runs, and the recall grid.

    plot.py --runs run1 run2 run3 --evaluation run3/evaluation.json --out models/moebius-tiny/training.svg

Reads log.csv and summary.json of each run. Curves are means over equal spans of steps. Plain Python.
"""

import argparse
import csv
import json
import pathlib

WIDTH, HEIGHT, LEFT, RIGHT = 860, 190, 62, 150
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7"]
INK, FAINT = "#222", "#ddd"


def read_run(folder):
    with open(folder / "log.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return rows, json.loads((folder / "summary.json").read_text())


def thin(points, span):
    """Means of the points over spans of x."""
    bins = {}
    for x, y in points:
        bins.setdefault(int(x // span), []).append((x, y))
    return [tuple(sum(axis) / len(part) for axis in zip(*part)) for _, part in sorted(bins.items())]


def text(x, y, words, anchor="start", size=11, fill=INK):
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


class Panel:
    """A frame with axes; data coordinates to pixels."""

    def __init__(self, top, title, x_max, y_low, y_high, ticks):
        self.top, self.x_max, self.y_low, self.y_high = top, x_max, y_low, y_high
        self.out = [text(LEFT, top - 8, title, size=13)]
        for tick in ticks:
            self.out.append(f'<path d="M{LEFT} {self.y(tick):.1f}H{WIDTH - RIGHT}" stroke="{FAINT}"/>')
            self.out.append(text(LEFT - 6, self.y(tick) + 4, f"{tick:g}", "end"))

    def x(self, value):
        return LEFT + (WIDTH - RIGHT - LEFT) * value / self.x_max

    def y(self, value):
        value = min(max(value, self.y_low), self.y_high)
        return self.top + HEIGHT * (self.y_high - value) / (self.y_high - self.y_low)

    def curve(self, points, colour, width=1.3):
        path = "L".join(f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in points)
        self.out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

    def dots(self, points, colour):
        self.out += [f'<circle cx="{self.x(a):.1f}" cy="{self.y(b):.1f}" r="2.6" fill="{colour}"/>' for a, b in points]

    def legend(self, names):
        for i, (name, colour) in enumerate(names):
            at = self.top + 12 + 17 * i
            self.out.append(f'<path d="M{WIDTH - RIGHT + 10} {at - 4}h14" stroke="{colour}" stroke-width="3"/>')
            self.out.append(text(WIDTH - RIGHT + 29, at, name))

    def steps(self, starts):
        for number, start in enumerate(starts, 1):
            self.out.append(f'<path d="M{self.x(start):.1f} {self.top}V{self.top + HEIGHT}" stroke="#999" stroke-dasharray="3 3"/>')
            self.out.append(text(self.x(start) + 4, self.top + 12, f"run {number}", fill="#666"))
        for tick in range(0, int(self.x_max) + 1, 2000):
            self.out.append(text(self.x(tick), self.top + HEIGHT + 15, f"{tick:,}", "middle"))


def recall_grid(top, grid):
    out = [text(LEFT, top - 8, "Exact recall of held-out keys (%), by prompt length in tokens and depth of the fact", size=13)]
    width, height = 56, 24
    for column in range(11):
        out.append(text(LEFT + width * (column + 0.5), top + 12, f"{10 * column} %", "middle"))
    for row, (length, cells) in enumerate(sorted(grid.items(), key=lambda item: int(item[0]))):
        at = top + 20 + height * row
        out.append(text(LEFT - 6, at + 16, length, "end"))
        for column, share in enumerate(cells):
            light = 30 + 62 * (1 - share) / 0.3 if share > 0.7 else 92  # 70 % and less is palest
            out.append(f'<rect x="{LEFT + width * column}" y="{at}" width="{width - 1}" height="{height - 1}" '
                       f'fill="hsl(203 70% {light:.0f}%)"/>')
            out.append(text(LEFT + width * (column + 0.5), at + 16, f"{100 * share:.0f}", "middle",
                            fill="#fff" if light < 60 else INK))
        out.append(text(LEFT + width * 11 + 10, at + 16, f"mean {100 * sum(cells) / len(cells):.1f}"))
    return out, top + 20 + height * len(grid)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--evaluation", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    starts, total = [], 0
    for _, summary in runs:
        starts.append(total)
        total += summary["steps"]
    loss = Panel(34, "Cross-entropy, nats per token", total, 1.5, 5.5, [2, 3, 4, 5])
    balance = Panel(34 + HEIGHT + 58, "Expert balance: rows of the busiest expert over the mean, each 10 steps (above 1.6 cut off)",
                    total, 1.0, 1.6, [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6])
    span = total / 150
    for (rows, summary), start in zip(runs, starts):
        for column, colour in (("loss", COLOURS[0]), ("mtp_loss", COLOURS[1])):
            loss.curve(thin([(start + r["step"], r[column]) for r in rows], span), colour)
        held = [(start + h[0], h[3]) for h in summary["held_out"] if h[3] < loss.y_high]
        loss.curve(held, COLOURS[3], 1)
        loss.dots(held, COLOURS[3])
        for layer in range(6):
            balance.curve(thin([(start + r["step"], r[f"balance_{layer}"]) for r in rows], span), COLOURS[layer], 1)
    loss.legend([("training", COLOURS[0]), ("training, MTP", COLOURS[1]), ("held-out text", COLOURS[3])])
    balance.legend([(f"layer {i + 1}" if i < 5 else "MTP layer", c) for i, c in enumerate(COLOURS)])
    loss.steps(starts)
    balance.steps(starts)
    top = balance.top + HEIGHT + 56
    cells, bottom = recall_grid(top, json.loads(args.evaluation.read_text())["recall"]["grid"])
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 14}" width="{WIDTH}" '
           f'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>', *loss.out, *balance.out, *cells, "</svg>"]
    args.out.write_text("\n".join(svg) + "\n")
    print(args.out, args.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
