"""A default that cannot lose its gradient, judged by its worst seed: many short runs of a script.

    python benchmarks/robustness.py --script mmd_gan --options "kernel=gaussian bandwidths=(1.0,2.0)"

A row is a data set: digits, or the first 10,000 images of MNIST, of MNIST inverted or blurred, or of USPS.
"least" and "end" are the median of the seeds, and the worst, which is the smallest, with its seed.

- mmd_gan, largest of k_xx, k_yy and k_xy as a share of the kernel at distance 0: the least of all steps, and
  the mean of the last 20 (end). dead: a least under 1e-3, features are far apart. bad: the smallest of the
  three is over 0.999 in one of the last 20 steps, features are alike. alike: its peak over steps and seeds.
- wgan_gp, critic_std in the last 20 steps: the least and the mean (end). dead: a least under 1e-4, the critic
  is flat. bad: a loss over 1e4 in absolute value.
- sinkhorn_gan, the generator's loss as a share of the mean cost where it is a cosine, so of at most 2: the
  least of all steps, and the mean of the last 20 (end). dead: a least under 1e-5, all features are alike.

failed, of all: an error, as of a loss that is not finite.
"""

import contextlib
import json
import sys
import tempfile
from ast import literal_eval
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from io import StringIO
from itertools import repeat
from multiprocessing import cpu_count, get_context
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torchvision.datasets import MNIST, USPS
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
Data = Literal["digits", "mnist", "inverted", "blurred", "usps"]


def write_images(name: Data, data_dir: str, folder: Path) -> None:
    """Write images (n, 28, 28) of a data set into the folder, as torchvision has MNIST."""
    data = (USPS if name == "usps" else MNIST)(data_dir, download=True)
    x, labels = torch.as_tensor(data.data)[:10_000, None].float(), torch.as_tensor(data.targets)[:10_000]
    x = F.interpolate(255 - x if name == "inverted" else x, size=28, mode="bilinear")
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    for _ in range(2 if name == "blurred" else 0):
        x = F.conv2d(x, torch.outer(row, row)[None, None], padding=2)
    for kind, v in (("images-idx3", x[:, 0].round()), ("labels-idx1", labels)):
        head = np.array([0x800 + v.dim(), *v.shape], ">u4").tobytes()
        for part in ("train", "t10k"):
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + v.to(torch.uint8).numpy().tobytes())


def train(script: str, steps: int, options: dict) -> list[float] | str:
    """Least, end, dead, bad, alike and steps per second of a run, or the error, in a silent process."""
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = StringIO()
    module = import_module(script)

    class Enough(Exception):
        """Raised after so many steps of a run that was to be longer: its learning rates have not fallen."""

    def bar(all_steps: range, **options):
        for step in all_steps:
            if step > steps:
                raise Enough
            yield step

    bar.write = print
    module.tqdm = bar
    module.replace_file = lambda path, write: write(path) if path.suffix == ".jsonl" else None
    with tempfile.TemporaryDirectory() as folder:
        args = module.Args(run_dir=folder, **options)
        try:
            module.train(args)
        except Enough:
            (log,) = Path(folder).glob("*/metrics.jsonl")
            rows = [json.loads(line) for line in log.read_text().splitlines()]
        except (Exception, SystemExit) as error:
            return repr(error)
    speed = np.median([row["steps_per_second"] for row in rows])
    if script == "mmd_gan":
        k = np.array([[row["k_xx"], row["k_yy"], row["k_xy"]] for row in rows]) / len(args.bandwidths)
        high, low = k.max(1), k.min(1)
        return [high.min(), high[-20:].mean(), high.min() < 1e-3, low[-20:].max() > 0.999, low.max(), speed]
    if script == "sinkhorn_gan":
        loss = np.abs([row["loss_g"] for row in rows])
        return [loss.min(), loss[-20:].mean(), loss.min() < 1e-5, loss.max() > 1e4, np.nan, speed]
    std = [row["critic_std"] for row in rows[-20:]]
    loss = max(abs(row[name]) for row in rows for name in ("loss_c", "loss_g"))
    return [min(std), np.mean(std), min(std) < 1e-4, loss > 1e4, np.nan, speed]


def main(script: Literal["mmd_gan", "sinkhorn_gan", "wgan_gp"] = "mmd_gan", seeds: int = 40, steps: int = 100,
         datasets: tuple[Data, ...] = get_args(Data), data_dir: str = "data",
         jobs: int = cpu_count(), options: str = "") -> None:  # fmt: skip
    """Run seeds 1, 2, ... on every data set in processes of one thread; options are the script's, a=1 b=2."""
    given = {"device": "cpu", "num_eval_samples": 0, "log_every": 1}
    for name, _, value in (word.partition("=") for word in options.split()):
        given[name] = value
        with contextlib.suppress(ValueError, SyntaxError):
            given[name] = literal_eval(value)
    try:
        import_module(script).Args(**given)
    except ValueError as error:
        sys.exit(f"robustness.py: error: {error}")
    print("| data | seeds | dead | bad | failed | least | worst | end | worst | alike | steps/s |")
    print(f"|{' --- |' * 11}", flush=True)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for name in set(datasets) - {"digits"}:
            (raw := Path(folder, name, "MNIST", "raw")).mkdir(parents=True)
            write_images(name, data_dir, raw)
        images = [{"data_dir": f"{folder}/{d}", "dataset": d if d == "digits" else "mnist"} for d in datasets]
        cases = [given | where | {"seed": seed} for where in images for seed in range(1, seeds + 1)]
        results = iter(tqdm(pool.map(train, repeat(script), repeat(steps), cases), total=len(cases)))
        for name in datasets:
            runs = {seed: next(results) for seed in range(1, seeds + 1)}
            good = {seed: run for seed, run in runs.items() if not isinstance(run, str)}
            for seed in runs.keys() - good:
                print(f"{name}, seed {seed}: {runs[seed]}", file=sys.stderr)
            least, end, dead, bad, alike, speed = np.array(list(good.values()) or [[np.nan] * 6]).T
            cells = [name, seeds, (dead == 1).sum(), (bad == 1).sum(), seeds - len(good)]
            for v in (least, end):
                cells += [f"{np.median(v):.2g}", f"{v.min():.2g} (seed {[*good, '-'][v.argmin()]})"]
            cells += [f"{alike.max():.4f}", f"{np.median(speed):.1f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
