"""Time, error and memory of the losses of mmd_gan.py and sinkhorn_gan.py, beside what people use instead.

    python benchmarks/losses.py --loss mmd --markdown results/losses.md
    python benchmarks/losses.py --loss sinkhorn --markdown results/losses_sinkhorn.md
    python benchmarks/losses.py --loss sinkhorn --device cuda
    python benchmarks/losses.py --max-n 256 --repeats 3    # a few minutes, to see that it runs

Every row is a value and its gradients in x and in y, in float32, for n points x ~ N(0, 1) and as many
y ~ N(0.5, 1) in d dimensions. MMD^2 is the biased one with five Gaussian bandwidths:

- copied form: concatenate x and y, one Gram matrix, five exponentials, three block means, autograd;
- mmd2: the loss as mmd_gan.py uses it;
- mmd2 dense: the same function forced to plain torch (road="dense").

The debiased Sinkhorn divergence has an epsilon of 0.05 times the mean cost. Each implementation gets the
cheapest of its settings that is within 1e-3 of the value and 1e-2 of both gradients of a converged solution
in float64, or a dash if it takes too long (LIMIT_S) or too much memory (LIMIT_GB) before it gets there, or
did so for fewer points:

- sinkhorn_divergence: the loss of sinkhorn_gan.py, by its tolerance;
- geomloss tensorized, geomloss online: GeomLoss's SamplesLoss, by scaling; online needs KeOps and a compiler;
- pot sinkhorn_log, pot sinkhorn_stabilized: POT's plan, whose value autograd follows with the plan held
  constant, by stopThr;
- autograd: log-sum-exp half-steps with autograd through all of them, by their number.

Times: each round runs every implementation twice, in random order, so that a machine that drifts hits all
alike, and counts the second; the table has the median and the quartiles. Errors: relative to float64, as
norms.
Memory: what one evaluation adds at its peak, gradients included; on the CPU the rise of the resident memory
of a fresh process which has warmed up on four points and whose malloc gives freed memory back at once, on
CUDA what torch's allocator says.
"""

import dataclasses
import math
import multiprocessing
import os
import platform
import random
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

os.environ.setdefault("PYKEOPS_VERBOSE", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mmd_gan import fail, mmd2
from sinkhorn_gan import mean_cost, sinkhorn_divergence

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
SIZES = {
    "mmd": [(n, d) for d in (16, 64) for n in (64, 256, 1024, 4096)] + [(1024, 784), (16_384, 64)],
    "sinkhorn": [(n, d) for d in (16, 64, 784) for n in (64, 256, 1024, 4096)] + [(20_000, 64)],
}
ALONE = 16_384  # from this n on only this repository's loss runs, and without the float64 reference
EPSILON = 0.05  # in units of the mean cost
WITHIN = (1e-3, 1e-2, 1e-2)  # relative errors that count as the same accuracy: value, gradients
LIMIT_S, LIMIT_GB = 6, 8  # of one evaluation
WIDTHS = {  # of the table's columns
    **{"n = m": 6, "d": 3, "implementation": 23, "setting": 13, "ms": 8, "quartiles": 18, "speed-up": 8},
    **{"error: value": 12, "grad x": 7, "grad y": 7, "extra MB": 8},
}


@dataclasses.dataclass
class Args:
    loss: Literal["all", "mmd", "sinkhorn"] = "all"
    """what to measure"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to measure"""
    threads: int | None = None
    """CPU threads (default: torch's choice)"""
    repeats: int = 15
    """timed runs per row at n = 1024; for other n as many times more or fewer, and at least 3"""
    max_n: int = 20_000
    """leave larger inputs out"""
    markdown: str | None = None
    """write the table and the facts of the machine to this file as well"""

    def __post_init__(self) -> None:
        for name in ("threads", "repeats", "max_n"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            fail(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu")


def copied_kernel(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """The Gaussian kernels' sum for all pairs of x (n, d) and y (m, d) together: (n + m, n + m)."""
    z = torch.cat((x, y))
    gram = z @ z.T
    squares = gram.diag()
    t = squares[:, None] + squares[None, :] - 2 * gram
    return sum(torch.exp(-t / (2 * s**2)) for s in bandwidths)


def copied_form(x: Tensor, y: Tensor) -> Tensor:
    """MMD^2 of x (n, d) and y (m, d) as it is passed from repository to repository: a scalar."""
    k, n = copied_kernel(x, y, BANDWIDTHS), len(x)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


def squared_cost(x: Tensor, y: Tensor) -> Tensor:
    """Half the squared distances (n, m) of x (n, d) and y (m, d)."""
    return x.square().sum(1, keepdim=True) / 2 + y.square().sum(1) / 2 - x @ y.T


def debiased(ot: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The Sinkhorn divergence made of an entropic cost."""
    return ot(x, y) - ot(x, x) / 2 - ot(y, y) / 2


def geomloss(x: Tensor, y: Tensor, eps: float, scaling: float, backend: str) -> Tensor:
    """GeomLoss's Sinkhorn divergence."""
    from geomloss import SamplesLoss

    return SamplesLoss("sinkhorn", p=2, blur=eps**0.5, scaling=scaling, backend=backend)(x, y)


def pot(x: Tensor, y: Tensor, eps: float, tolerance: float, method: str) -> Tensor:
    """The divergence from POT's plans, which are held constant in the gradient."""
    import ot

    def entropic_cost(x: Tensor, y: Tensor) -> Tensor:
        cost = squared_cost(x, y)
        a, b = x.new_full((len(x),), 1 / len(x)), y.new_full((len(y),), 1 / len(y))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says so when it meets infinities or stops early
            options = {"method": method, "stopThr": tolerance, "numItermax": 1000}
            plan = ot.sinkhorn(a, b, cost.detach(), eps, **options)
            entropy = torch.xlogy(plan, plan * cost.numel()).sum()
        return (plan * cost).sum() + eps * entropy

    return debiased(entropic_cost, x, y)


def unrolled_cost(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    """The entropic cost after some iterations from zero, through which autograd goes back."""
    cost, g = squared_cost(x, y), torch.zeros_like(y[:, 0])
    for _ in range(iterations):
        f = eps * math.log(len(y)) - eps * ((g - cost) / eps).logsumexp(1)
        g = eps * math.log(len(x)) - eps * ((f[:, None] - cost) / eps).logsumexp(0)
    return f.mean() + g.mean()


def unrolled(x: Tensor, y: Tensor, eps: float, iterations: int) -> Tensor:
    """The divergence after some iterations, as the first Sinkhorn GANs took it."""
    return debiased(partial(unrolled_cost, eps=eps, iterations=iterations), x, y)


def ours(x: Tensor, y: Tensor, eps: float, tolerance: float) -> Tensor:
    """The divergence of sinkhorn_gan.py."""
    return sinkhorn_divergence(x, y, eps, tol=tolerance, max_iterations=20_000)


# The forms of each loss, with a setting and its values from cheap to dear if they have one. The speed-up of
# the MMD's is over the first form; of the Sinkhorn divergence's forms it is the first one's over theirs.
SCALING = ("scaling", (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995))
STOP = ("stopThr", tuple(10.0**-k for k in range(2, 9)))
FORMS: dict[str, tuple[Callable, str, tuple]] = {
    "copied form": (copied_form, "", ()),
    "mmd2": (partial(mmd2, bandwidths=BANDWIDTHS, unbiased=False), "", ()),
    "mmd2 dense": (partial(mmd2, bandwidths=BANDWIDTHS, unbiased=False, road="dense"), "", ()),
    "sinkhorn_divergence": (ours, "tol", (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)),
    "geomloss tensorized": (partial(geomloss, backend="tensorized"), *SCALING),
    "geomloss online": (partial(geomloss, backend="online"), *SCALING),
    "pot sinkhorn_log": (partial(pot, method="sinkhorn_log"), *STOP),
    "pot sinkhorn_stabilized": (partial(pot, method="sinkhorn_stabilized"), *STOP),
    "autograd": (unrolled, "iterations", (5, 10, 20, 50, 100, 200, 500, 1000)),
}
MMD, SINKHORN = list(FORMS)[:3], list(FORMS)[3:]
GIVEN_UP: dict[tuple[str, int], str] = {}  # why a form is not tried in d dimensions any more
NEEDS = {"geomloss tensorized": "geomloss", "geomloss online": "pykeops"} | dict.fromkeys(SINKHORN[3:5], "ot")


def points(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """The inputs x and y, (n, d) each, the same on every call and device."""
    generator = torch.Generator().manual_seed(n + d)
    x, y = (mean + torch.randn(n, d, generator=generator) for mean in (0.0, 0.5))
    return x.to(device).requires_grad_(), y.to(device).requires_grad_()


def evaluate(form: str, x: Tensor, y: Tensor, *setting) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients; setting is epsilon and the form's setting, if it has one."""
    value = FORMS[form][0](x, y, *setting)
    return value.detach(), *torch.autograd.grad(value, (x, y))


def epsilon(x: Tensor, y: Tensor) -> float:
    """The epsilon of the Sinkhorn rows."""
    return EPSILON * mean_cost(x, y).item()


def reference_divergence(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients of a converged Sinkhorn divergence in float64.

    The same solver, whose float64 values the tests compare with a brute force, POT and GeomLoss.
    """
    x, y = (v.detach().double().requires_grad_() for v in (x, y))
    value = sinkhorn_divergence(x, y, epsilon(x, y), tol=1e-7, max_iterations=100_000)
    return value.detach(), *torch.autograd.grad(value, (x, y))


def relative_errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    """Errors of a value and gradients as shares of their norms."""
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want)]


def cheapest(form: str, x: Tensor, y: Tensor, exact: tuple[Tensor, ...]) -> tuple | str:
    """(epsilon, setting) that is accurate enough, or why there is none."""
    eps = epsilon(x, y)
    for setting in FORMS[form][2]:
        if form == "autograd" and 3 * 6 * 4 * len(x) * len(y) * setting > LIMIT_GB * 1e9:
            return (
                f"over {LIMIT_GB} GB"  # of each half-step of three problems, log-sum-exp keeps some matrices
            )
        start = time.perf_counter()
        errors = relative_errors(evaluate(form, x, y, eps, setting), exact)
        if time.perf_counter() - start > LIMIT_S:
            return f"over {LIMIT_S} s"
        if all(error <= limit for error, limit in zip(errors, WITHIN)):
            return eps, setting
    return "not reached"


def reference(x: Tensor, y: Tensor, block: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients in float64, block by block, as sum_ij w_i w_j k(z_i, z_j)."""
    z = torch.cat((x, y)).detach().double().requires_grad_()
    w = torch.cat([z.new_full((len(v),), sign / len(v)) for v, sign in ((x, 1), (y, -1))])
    value = z.new_zeros(())
    for rows in torch.arange(len(z), device=z.device).split(block):
        t = z[rows].square().sum(1, keepdim=True) + z.square().sum(1) - 2 * z[rows] @ z.T
        part = w[rows] @ sum(torch.exp(-t / (2 * s**2)) for s in BANDWIDTHS) @ w
        part.backward()
        value += part.detach()
    return value, *z.grad.split((len(x), len(y)))


def time_once(form: str, x: Tensor, y: Tensor, *setting) -> float:
    """Milliseconds of one evaluation."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    evaluate(form, x, y, *setting)
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def resident(peak: bool) -> int:
    """Bytes of this process in memory, now or at the peak (off Linux, always at the peak)."""
    # ru_maxrss alone will not do on Linux: a new process starts with the peak of the one that started it.
    if sys.platform == "linux":
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        if "VmHWM" in lines:
            return 1024 * int(lines["VmHWM" if peak else "VmRSS"].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_here(form: str, n: int, d: int, device: str, threads: int, *setting) -> float:
    """MB (10^6 bytes) that one evaluation adds at its peak, in this process."""
    torch.set_num_threads(threads)
    evaluate(form, *points(4, d, device), *setting)
    x, y = points(n, d, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        evaluate(form, x, y, *setting)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resident(peak=False)
    evaluate(form, x, y, *setting)
    return (resident(peak=True) - before) / 1e6


def extra_memory(form: str, n: int, d: int, device: str, threads: int, *setting) -> float:
    """memory_here, on the CPU in a fresh process; nan if that was killed, as by a lack of memory."""
    if device == "cuda":
        return memory_here(form, n, d, device, threads, *setting)
    # glibc keeps a random share of what is freed (100 to 400 MB for one and the same run); like this none.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(memory_here, form, n, d, device, threads, *setting).result()
        except BrokenProcessPool:
            return float("nan")


def measure(loss: str, forms: list[str], n: int, d: int, args: Args, threads: int) -> list[list[str]]:
    """The table's rows for one size."""
    x, y = points(n, d, args.device)
    base = "copied form" if loss == "mmd" else forms[0]
    settings = {form: () for form in forms}
    if n >= ALONE:
        forms, exact = ["mmd2" if loss == "mmd" else forms[0]], None
        settings = {form: () if loss == "mmd" else (epsilon(x, y), 1e-3) for form in forms}
    elif loss == "mmd":
        exact = reference(x, y)
    else:
        exact = reference_divergence(x, y)
        settings = {form: GIVEN_UP.get((form, d)) or cheapest(form, x, y, exact) for form in forms}
        GIVEN_UP.update({(form, d): s for form, s in settings.items() if isinstance(s, str)})
    able = [form for form in forms if not isinstance(settings[form], str)]
    memory = {form: extra_memory(form, n, d, args.device, threads, *settings[form]) for form in able}
    times = {form: [] for form in forms}
    for done in range(max(3, args.repeats * 1024 // n) if exact else 1):
        for form in random.sample(able, len(able)):
            if done < 3 or sum(times[form]) < 3000:
                if exact:  # as in training: after itself, not on memory that another one gave back
                    time_once(form, x, y, *settings[form])
                times[form].append(time_once(form, x, y, *settings[form]))
    rows = []
    for form in forms:
        if form not in able:
            rows.append([f"{n}", f"{d}", form, settings[form], *["-"] * 7])
            continue
        low, median, high = np.quantile(times[form], (0.25, 0.5, 0.75))
        ratio = np.median(times[base]) / median if base in able and exact else math.nan
        ratio = f"{ratio if loss == 'mmd' else 1 / ratio:.1f}" if exact else "-"
        setting = f"{FORMS[form][1]} {settings[form][1]:g}" if settings[form] else "-"
        errors = relative_errors(evaluate(form, x, y, *settings[form]), exact) if exact else ()
        errors = [f"{error:.0e}" for error in errors] or ["-"] * 3
        rows.append([f"{n}", f"{d}", form, setting, f"{median:.2f}", f"{low:.2f} to {high:.2f}", ratio])
        rows[-1] += [*errors, f"{memory[form]:.1f}"]
    return rows


def machine(args: Args) -> str:
    """One line: device, threads, versions, and how busy the machine was."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    cpu = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, host " if args.device == "cuda" else ""
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads, {versions}{load}"


def main(args: Args) -> None:
    """Measure every size, print the table as it grows, and write it."""
    if args.threads:
        torch.set_num_threads(args.threads)
    random.seed(0)
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    def say_row(cells: list[str]) -> None:
        padded = (c.ljust(w) if c in FORMS else c.rjust(w) for c, w in zip(cells, WIDTHS.values()))
        say(f"| {' | '.join(padded)} |")

    for loss in ("mmd", "sinkhorn") if args.loss == "all" else (args.loss,):
        forms = [form for form in (MMD if loss == "mmd" else SINKHORN) if find_spec(NEEDS.get(form, "torch"))]
        say_row([name if name != "speed-up" or loss == "mmd" else "x ours" for name in WIDTHS])
        say_row(["-" * (w - 1) + ("-" if name == "implementation" else ":") for name, w in WIDTHS.items()])
        for n, d in SIZES[loss]:
            if n <= args.max_n:
                for row in measure(loss, forms, n, d, args, torch.get_num_threads()):
                    say_row(row)
        what = {
            "mmd": f"bandwidths {BANDWIDTHS}, biased; speed-up over the copied form",
            "sinkhorn": f"epsilon {EPSILON} mean cost, errors within {WITHIN}; time as a multiple of ours",
        }
        say(f"\nValue and both gradients, float32, {what[loss]}.")
        if missing := {NEEDS[form] for form in set(SINKHORN) - set(forms) if form in NEEDS and loss != "mmd"}:
            say(f"Left out, as they are not installed: {', '.join(sorted(missing))}.")
        if args.max_n >= ALONE:
            say(f"From n = {ALONE} on the others are left out.\n")
    say(f"Machine: {machine(args)}.")
    say(f"\nCommand: `{shlex.join(['python', *sys.argv])}`")
    if args.markdown:
        path = Path(args.markdown)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
