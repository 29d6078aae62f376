"""Errors against seconds of training: a figure of runs of sgan_mnist.py and baseline_cnn.py.

    python benchmarks/accuracy.py runs/sgan_mnist__mnist__* runs/baseline_cnn__mnist__* --out accuracy.png

One line for a run, one colour for a script; both axes are logarithmic. What metrics.jsonl says of a run's
evaluations is all that is needed, so that runs may still be going on.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sgan_mnist import fail


def read_run(folder: Path) -> tuple[str, list[float], list[float]]:
    """The name of a run's experiment, and seconds of training and percent of errors of its evaluations."""
    try:
        name = json.loads((folder / "args.json").read_text(encoding="utf-8"))["exp_name"]
        rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        rows = [row for row in rows if "train_seconds" in row]
    except (OSError, ValueError, KeyError) as error:
        fail(f"{folder} is not a run folder ({error!r:.200}); name folders such as runs/<run>")
    if not rows:
        fail(
            f"{folder} has no evaluation with an accuracy yet; name runs of sgan_mnist.py or baseline_cnn.py"
        )
    return name, [row["train_seconds"] for row in rows], [100 * (1 - row["accuracy"]) for row in rows]


def main(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path) -> None:
    """Draw the figure.

    Args:
        runs: run folders
        out: the PNG to write
    """
    from matplotlib.figure import Figure

    if not runs:
        fail("name at least one run folder, such as runs/<run>")
    read = [read_run(folder) for folder in runs]
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of training", ylabel="errors, %", xscale="log", yscale="log")
    names = list(dict.fromkeys(name for name, *_ in read))
    for name, seconds, errors in read:
        first = name not in [line.get_label() for line in axes.get_lines()]
        label, color = name if first else "_", f"C{names.index(name)}"
        axes.plot(seconds, errors, ".-", label=label, color=color, lw=1, ms=4)
    axes.grid(which="both", alpha=0.3)
    limits = axes.get_ylim()
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100], minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_ylim(limits)
    axes.legend()
    try:
        figure.savefig(out, format="png", dpi=110)
    except OSError as error:
        fail(f"cannot write --out {out} ({error.strerror}); name a file in a folder that exists")
    print(out)


if __name__ == "__main__":
    tyro.cli(main)
