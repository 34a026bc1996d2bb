"""Draws the figure of the README from what the benchmarks have written.

    python benchmarks/figures.py [RESULTS] [--out FOLDER]

`RESULTS` is the folder of `python benchmarks --only work_precision small_init`, or of one of the two by itself. On the
left: what an error costs in gradients, for gradient flow of a tanh network. On the right: gradient flow of a linear
network from weights of norm 1e-12, and the saddles that theory predicts.
"""

import argparse
import json
import pathlib

import matplotlib
from work_precision import draw_case

from gradflow import plot
from gradflow.plot._style import STYLE, figure

HERE = pathlib.Path(__file__).parent
SHOWN = {
    "default": "gradflow, default",
    "RKC2": "gradflow, RKC2",
    "CVODE, GMRES": "SUNDIALS CVODE, GMRES",
    "diffrax Tsit5": "diffrax Tsit5",
    "gradient descent": "gradient descent",
}
"""Beginning of the name of a method -> what the figure calls it."""


def find(results, name):
    """The record of a benchmark, wherever below a folder it lies."""
    paths = sorted(results.glob(f"**/{name}.json"))
    if not paths:
        raise SystemExit(f"{results} holds no {name}.json: run `python benchmarks --only {name} --out {results}` first")
    return json.loads(paths[0].read_text())


def renamed(rows):
    """Rows of the methods that are shown, by the names that they have here."""
    chosen = []
    for start, title in SHOWN.items():
        chosen += [row | {"method": title} for row in rows if row["method"].startswith(start)]
    return [row | {"method": "default"} if row["method"] == SHOWN["default"] else row for row in chosen]


def draw(work, small):
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "gradflow"}):
        drawn = figure(figsize=(7.0, 2.9))
        left, right = drawn.subplots(1, 2)
        rows = renamed(work["rows"])
        case = next(about["case"] for about in work["cases"] if about["case"].startswith("tanh net, square loss"))
        draw_case(left, case, list(dict.fromkeys(row["method"] for row in rows)), rows, "equivalents")
        left.set(title=f"what an error costs: {case}", xlabel="gradients of the loss")
        lines, labels = left.get_legend_handles_labels()
        left.legend(
            lines, [SHOWN.get(label, label) for label in labels], loc="lower center", bbox_to_anchor=(0.64, 0.0)
        )
        stairs = small["staircase"]
        right.plot(stairs["t"], stairs["loss"], color="black", label="gradient flow")
        style = {"color": "black", "markerfacecolor": "white", "markersize": 5, "linestyle": "none", "marker": "o"}
        right.plot(stairs["saddle times"], stairs["saddle losses"], label="predicted saddles: arrival, loss", **style)
        right.set(title=r"saddle to saddle, from $\|\theta\| = 10^{-12}$", xlabel="flow time $t$", ylabel="loss")
        right.legend(loc="upper right")
        return drawn


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=pathlib.Path, nargs="?", default=HERE / "results")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "figures")
    arguments = parser.parse_args()
    drawn = draw(find(arguments.results, "work_precision"), find(arguments.results, "small_init"))
    print(f"written: {plot.save(drawn, arguments.out / 'readme.png')}")


if __name__ == "__main__":
    main()
