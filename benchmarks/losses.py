"""Time and memory of the losses of mmd_gan.py and sinkhorn_gan.py, beside what people use instead.

    python benchmarks/losses.py --loss mmd
    python benchmarks/losses.py --loss sinkhorn
    python benchmarks/losses.py --loss mmd --max-n 256    # a minute, to see that it runs

A row is a value and its gradients in x and in y, float32, for n points x ~ N(0, 1) and as many y ~ N(0.5, 1)
in d dimensions. MMD^2 is biased, with five Gaussian bandwidths; the copied form is one Gram matrix of x and y
together, five exponentials, three means of blocks, and autograd. The Sinkhorn divergence has an epsilon of
0.05 times the mean cost, and each form the first of its settings, from cheap to dear, that is within 1e-3 of
the value and 1e-2 of both gradients of a converged float64 solution; a dash if none is, or takes 6 seconds.

Times are medians of rounds, in each of which every form runs twice and its second run counts. Ratios are to
the loss of this repository. Memory is what a fresh process adds at its peak, inputs and gradients left out.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mmd_gan import mmd2
from sinkhorn_gan import mean_cost, sinkhorn_divergence

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
SIZES = {
    "mmd": [(n, d) for d in (16, 64) for n in (64, 256, 1024, 4096)] + [(1024, 784)],
    "sinkhorn": [(n, d) for d in (16, 64) for n in (64, 256, 1024)] + [(4096, 64), (1024, 784)],
}
LARGE = {"mmd": 16_384, "sinkhorn": 20_000}  # points whose memory is measured, in 64 dimensions
SCALES = (0.1, 0.5, 1.2, 2.0, 10.0, 100.0)
LIMIT_S = 6.0
Form = Callable[[Tensor, Tensor], Tensor]


def copied_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Return MMD^2 of x (n, d) and y (m, d) as it is passed from repository to repository."""
    z, n = torch.cat((x, y)), len(x)
    gram = z @ z.T
    t = gram.diag()[:, None] + gram.diag()[None, :] - 2 * gram
    k = sum(torch.exp(-t / (2 * s**2)) for s in BANDWIDTHS)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


def debiased(cost: Form, x: Tensor, y: Tensor) -> Tensor:
    """Return the Sinkhorn divergence that is made of an entropic cost."""
    return cost(x, y) - cost(x, x) / 2 - cost(y, y) / 2


def geomloss(x: Tensor, y: Tensor, eps: float, scaling: float) -> Tensor:
    """Return GeomLoss's Sinkhorn divergence, of points or of a batch."""
    from geomloss import SamplesLoss

    return SamplesLoss("sinkhorn", blur=eps**0.5, scaling=scaling, backend="tensorized")(x, y)


def flash_sinkhorn(x: Tensor, y: Tensor, eps: float, scaling: float) -> Tensor:
    """Return FlashSinkhorn's divergence (on CUDA; pip install flash-sinkhorn)."""
    from flash_sinkhorn import SamplesLoss

    return SamplesLoss("sinkhorn", half_cost=True, debias=True, blur=eps**0.5, scaling=scaling)(x, y)


def pot_cost(x: Tensor, y: Tensor, eps: float, tolerance: float) -> Tensor:
    """Return the entropic cost of POT's log-domain plan, which is constant in the gradient."""
    import ot

    cost = torch.cdist(x, y).square() / 2
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = x.new_full((len(x),), 1 / len(x)), y.new_full((len(y),), 1 / len(y))
        options = {"method": "sinkhorn_log", "stopThr": tolerance, "numItermax": 1000}
        plan = ot.sinkhorn(a, b, cost.detach(), eps, **options)
        entropy = torch.xlogy(plan, plan * cost.numel()).sum()
    return (plan * cost).sum() + eps * entropy


def unrolled_cost(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    """Return the entropic cost after so many iterations, through which autograd goes back."""
    cost = torch.cdist(x, y).square() / 2
    g = torch.zeros_like(y[:, 0])
    for _ in range(iterations):
        f = eps * math.log(len(y)) - eps * ((g - cost) / eps).logsumexp(1)
        g = eps * math.log(len(x)) - eps * ((f[:, None] - cost) / eps).logsumexp(0)
    return f.mean() + g.mean()


def forms_of(loss: str, eps: float) -> dict[str, tuple[Callable, tuple]]:
    """Return the forms of a loss, ours first, each with its settings from cheap to dear."""
    if loss == "mmd":
        ours = partial(mmd2, bandwidths=BANDWIDTHS, unbiased=False)
        return {
            "mmd2": (lambda x, y, _: ours(x, y), (0,)),
            "copied": (lambda x, y, _: copied_mmd2(x, y), (0,)),
        }
    scalings = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
    stops = tuple(10.0**-k for k in range(2, 9))
    forms = {
        "sinkhorn_divergence": (
            lambda x, y, tol: sinkhorn_divergence(x, y, eps, tol=tol),
            (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 1e-4),
        ),
        "geomloss": (lambda x, y, scaling: geomloss(x, y, eps, scaling), scalings),
        "flash-sinkhorn": (lambda x, y, scaling: flash_sinkhorn(x, y, eps, scaling), scalings),
        "pot": (lambda x, y, stop: debiased(partial(pot_cost, eps=eps, tolerance=stop), x, y), stops),
        "autograd": (
            lambda x, y, steps: debiased(partial(unrolled_cost, eps=eps, iterations=steps), x, y),
            (5, 10, 20, 50, 100, 200, 500),
        ),
    }
    needs = {"geomloss": "geomloss", "flash-sinkhorn": "flash_sinkhorn", "pot": "ot"}
    return {name: form for name, form in forms.items() if find_spec(needs.get(name, "torch"))}


def points(n: int, d: int, device: str = "cpu", scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return x and y, (n, d) each and the same at every call, with gradients."""
    rng = torch.Generator().manual_seed(n + d)
    x, y = (scale * (mean + torch.randn(n, d, generator=rng)) for mean in (0.0, 0.5))
    return x.to(device).requires_grad_(), y.to(device).requires_grad_()


def evaluate(form: Callable, setting: float, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Return a form's value and both gradients."""
    value = form(x, y, setting)
    return value.detach(), *torch.autograd.grad(value.sum(), (x, y))


def seconds(form: Callable, setting: float, x: Tensor, y: Tensor) -> float:
    """Return the time of one evaluation."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    evaluate(form, setting, x, y)
    wait()
    return time.perf_counter() - start


def settle(form: Callable, settings: tuple, x: Tensor, y: Tensor, exact: tuple[Tensor, ...]) -> float | None:
    """Return the first setting that is accurate enough, or None."""
    for setting in settings:
        start = time.perf_counter()
        found = evaluate(form, setting, x, y)
        errors = [(a - b).norm() / b.norm() for a, b in zip(found, exact)]
        if errors[0] < 1e-3 and max(errors[1:]) < 1e-2:
            return setting
        if time.perf_counter() - start > LIMIT_S:
            return None
    return None


def compare(loss: str, x: Tensor, y: Tensor, rounds: int) -> list[str]:
    """Return a line of the table for each form of a loss: time, ratio to ours, setting."""
    eps = 0.05 * mean_cost(x.detach().flatten(0, -2), y.detach().flatten(0, -2)).item()
    forms = forms_of(loss, eps)
    ours = next(iter(forms))
    exact_form = partial(sinkhorn_divergence, eps=eps, tol=1e-9)
    if loss == "mmd":
        exact_form = partial(mmd2, bandwidths=BANDWIDTHS, unbiased=False)
    exact = evaluate(lambda x, y, _: exact_form(x, y), 0, x.double(), y.double())
    settings = {name: settle(form, choices, x, y, exact) for name, (form, choices) in forms.items()}
    times = {name: [] for name, setting in settings.items() if setting is not None}
    for _ in range(rounds):
        for name in times:
            form = forms[name][0]
            seconds(form, settings[name], x, y)
            times[name].append(seconds(form, settings[name], x, y))
    medians = {name: 1e3 * np.median(times[name]) for name in times}
    lines = []
    for name in forms:
        cells = "- | - | -"
        if name in medians:
            cells = f"{medians[name]:.2f} | {medians[name] / medians[ours]:.1f} | {settings[name]:g}"
        lines.append(f"| {' x '.join(map(str, x.shape))} | {name} | {cells} |")
    return lines


def extra_memory(loss: str, n: int) -> float:
    """Return the megabytes that a fresh process adds for n points beside inputs and gradients."""
    from resource import RUSAGE_SELF, getrusage

    for size in (16, n):  # the first loads what is loaded once
        x, y = points(size, 64)
        (form, settings), *_ = forms_of(loss, 0.05 * mean_cost(x.detach(), y.detach()).item()).values()
        before = getrusage(RUSAGE_SELF).ru_maxrss
        evaluate(form, settings[0], x, y)
    return (getrusage(RUSAGE_SELF).ru_maxrss - before) / 1024 - 4 * 2 * n * 64 / 2**20


def main(loss: Literal["mmd", "sinkhorn"] = "mmd", device: str = "cpu", rounds: int = 9,
         max_n: int = 20_000) -> None:  # fmt: skip
    """Print the tables."""
    print("| points | form | ms | ratio | setting |\n| --- | --- | --- | --- | --- |")
    for n, d in SIZES[loss]:
        if n <= max_n:
            print(*compare(loss, *points(n, d, device), rounds), sep="\n", flush=True)
    if loss == "sinkhorn":  # 64 problems at once
        x, y = (v.detach().view(64, 64, 16).requires_grad_() for v in points(4096, 16, device))
        eps = 0.05 * mean_cost(x[0].detach(), y[0].detach()).item()
        for name in ("sinkhorn_divergence", "geomloss"):
            form, choices = forms_of(loss, eps)[name]
            loop = lambda x, y, s, form=form: torch.stack([form(u, v, s) for u, v in zip(x, y)])  # noqa: E731
            setting = choices[2] if name == "sinkhorn_divergence" else 0.95
            for kind, run in (("batch", form), ("loop", loop)):
                ms = 1e3 * min(seconds(run, setting, x, y) for _ in range(3))
                print(f"| 64 x 64 x 16 | {name}, {kind} | {ms:.2f} | - | {setting:g} |", flush=True)
    print("\n| scale of the points | time over the row's least |\n| --- | --- |")
    n = min(1024, max_n)
    times = []
    for scale in SCALES:
        x, y = points(n, 64, device, scale)
        (form, settings), *_ = forms_of(loss, 0.05 * mean_cost(x.detach(), y.detach()).item()).values()
        times.append(np.median([seconds(form, settings[2 % len(settings)], x, y) for _ in range(rounds)]))
    print(*(f"| {scale:g} | {t / min(times):.2f} |" for scale, t in zip(SCALES, times)), sep="\n")
    if device == "cpu" and max_n >= LARGE[loss]:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            extra = pool.submit(extra_memory, loss, LARGE[loss]).result()
        print(f"\n{LARGE[loss]} points a side, d = 64: {extra:.0f} MB beside inputs and gradients.")
    print(f"\ntorch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {rounds} rounds.")


if __name__ == "__main__":
    tyro.cli(main)
