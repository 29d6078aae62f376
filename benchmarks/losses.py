"""Time, error and memory of the MMD loss of mmd_gan.py, beside the form that people copy.

    python benchmarks/losses.py --markdown results/losses.md
    python benchmarks/losses.py --device cuda
    python benchmarks/losses.py --max-n 256 --repeats 3    # a minute, to see that it runs

Every row is the value of MMD^2 (biased, five Gaussian bandwidths, float32) and its gradients in x and in y,
for n points x ~ N(0, 1) and as many y ~ N(0.5, 1) in d dimensions:

- copied form: concatenate x and y, one Gram matrix, five exponentials, three block means, autograd;
- mmd2: the loss as mmd_gan.py uses it;
- mmd2 dense: the same function forced to plain torch (road="dense").

Times: each round runs every implementation twice, in random order, so that a machine that drifts hits all
alike, and counts the second; the table has the median and the quartiles. Errors: relative to float64, as
norms.
Memory: what one evaluation adds at its peak, gradients included; on the CPU the rise of the resident memory
of a fresh process which has warmed up on four points and whose malloc gives freed memory back at once, on
CUDA what torch's allocator says.
"""

import dataclasses
import multiprocessing
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mmd_gan import fail, mmd2

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
SIZES = [(n, d) for d in (16, 64) for n in (64, 256, 1024, 4096)] + [(1024, 784), (16_384, 64)]
ALONE = 16_384  # from this n on only mmd2 runs, and without the float64 reference
WIDTHS = {  # of the table's columns
    **{"n = m": 6, "d": 3, "implementation": 14, "ms": 8, "quartiles": 18, "speed-up": 8},
    **{"error: value": 12, "grad x": 7, "grad y": 7, "extra MB": 8},
}


@dataclasses.dataclass
class Args:
    device: Literal["cpu", "cuda"] = "cpu"
    """where to measure"""
    threads: int | None = None
    """CPU threads (default: torch's choice)"""
    repeats: int = 15
    """timed runs per row at n = 1024; for other n as many times more or fewer, and at least 3"""
    max_n: int = ALONE
    """leave larger inputs out"""
    markdown: str | None = None
    """write the table and the facts of the machine to this file as well"""

    def __post_init__(self) -> None:
        for name in ("threads", "repeats", "max_n"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                fail(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            fail(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu")


def copied_form(x: Tensor, y: Tensor) -> Tensor:
    """MMD^2 of x (n, d) and y (m, d) as it is passed from repository to repository: a scalar."""
    z, n = torch.cat((x, y)), len(x)
    gram = z @ z.T
    squares = gram.diag()
    t = squares[:, None] + squares[None, :] - 2 * gram
    k = sum(torch.exp(-t / (2 * s**2)) for s in BANDWIDTHS)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "copied form": copied_form,
    "mmd2": partial(mmd2, bandwidths=BANDWIDTHS, unbiased=False),
    "mmd2 dense": partial(mmd2, bandwidths=BANDWIDTHS, unbiased=False, road="dense"),
}


def points(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """The inputs x and y, (n, d) each, the same on every call and device."""
    generator = torch.Generator().manual_seed(n + d)
    x, y = (mean + torch.randn(n, d, generator=generator) for mean in (0.0, 0.5))
    return x.to(device).requires_grad_(), y.to(device).requires_grad_()


def evaluate(form: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients."""
    value = FORMS[form](x, y)
    return value.detach(), *torch.autograd.grad(value, (x, y))


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


def time_once(form: str, x: Tensor, y: Tensor) -> float:
    """Milliseconds of one evaluation."""
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    evaluate(form, x, y)
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


def memory_here(form: str, n: int, d: int, device: str, threads: int) -> float:
    """MB (10^6 bytes) that one evaluation adds at its peak, in this process."""
    torch.set_num_threads(threads)
    evaluate(form, *points(4, d, device))
    x, y = points(n, d, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        evaluate(form, x, y)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = resident(peak=False)
    evaluate(form, x, y)
    return (resident(peak=True) - before) / 1e6


def extra_memory(form: str, n: int, d: int, device: str, threads: int) -> float:
    """memory_here, on the CPU in a fresh process; nan if that was killed, as by a lack of memory."""
    if device == "cuda":
        return memory_here(form, n, d, device, threads)
    # glibc keeps a random share of what is freed (100 to 400 MB for one and the same run); like this none.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(memory_here, form, n, d, device, threads).result()
        except BrokenProcessPool:
            return float("nan")


def measure(n: int, d: int, args: Args, threads: int) -> list[list[str]]:
    """The table's rows for one size."""
    forms = list(FORMS) if n < ALONE else ["mmd2"]
    memory = {form: extra_memory(form, n, d, args.device, threads) for form in forms}
    x, y = points(n, d, args.device)
    errors = {form: ["-"] * 3 for form in forms}
    if n < ALONE:
        exact = reference(x, y)
        for form in forms:
            pairs = zip(evaluate(form, x, y), exact)
            errors[form] = [f"{float((got.double() - want).norm() / want.norm()):.0e}" for got, want in pairs]
    times = {form: [] for form in forms}
    for _ in range(max(3, args.repeats * 1024 // n)):
        for form in random.sample(forms, len(forms)):
            time_once(form, x, y)  # as in training: after itself, not on memory that another one gave back
            times[form].append(time_once(form, x, y))
    rows = []
    for form in forms:
        low, median, high = np.quantile(times[form], (0.25, 0.5, 0.75))
        speed_up = f"{np.median(times['copied form']) / median:.1f}" if n < ALONE else "-"
        spread = f"{low:.2f} to {high:.2f}"
        rows.append([f"{n}", f"{d}", form, f"{median:.2f}", spread, speed_up, *errors[form]])
        rows[-1].append(f"{memory[form]:.1f}")
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

    say_row(list(WIDTHS))
    say_row(["-" * (w - 1) + ("-" if name == "implementation" else ":") for name, w in WIDTHS.items()])
    for n, d in SIZES:
        if n <= args.max_n:
            rows = measure(n, d, args, torch.get_num_threads())
            for row in rows:
                say_row(row)
            if (n, d) == (4096, 64):
                copied_gb = float(rows[0][-1]) / 1000 * (ALONE / n) ** 2
    say("\nValue and both gradients, float32, bandwidths 1 2 4 8 16, biased; speed-up over the copied form.")
    if args.max_n >= ALONE:
        say(f"At n = {ALONE} the others are left out: the copied form would need about {copied_gb:.0f} GB.")
    say(f"\nMachine: {machine(args)}.")
    say(f"\nCommand: `{shlex.join(['python', *sys.argv])}`")
    if args.markdown:
        path = Path(args.markdown)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
