"""Time, error and memory of the losses of mmd_gan.py and sinkhorn_gan.py, beside what people use instead.

    python benchmarks/losses.py --loss mmd --markdown results/losses.md
    python benchmarks/losses.py --loss sinkhorn --markdown results/losses_sinkhorn.md
    python benchmarks/losses.py --device cuda              # both, up to n = 65,536, and the goals
    python benchmarks/losses.py --max-n 256 --repeats 3    # a few minutes, to see that it runs

Every row is a value and its gradients in x and in y, in float32, for n points x ~ N(0, 1) and as many
y ~ N(0.5, 1) in d dimensions. MMD^2 is the biased one with five Gaussian bandwidths:

- copied form: concatenate x and y, one Gram matrix, five exponentials, three block means, autograd;
- copied form compiled: the same under torch.compile; on the CPU only with --compile, its memory with that of
  compiling;
- mmd2: the loss of mmd_gan.py;
- mmd2 dense: its plain torch, whole matrices and autograd (dense_means).

The second table of MMD^2 is the time of mmd2 against the data's scale: for 1024 of these points in 64
dimensions, times each of DEVIATIONS, and each of MIXTURES, unbiased, as a ratio to the least of the row.
Where a kernel all but vanishes numbers are subnormal, which slow a CPU down if the loss lets them arise.

The debiased Sinkhorn divergence has an epsilon of 0.05 times the mean cost. Each implementation gets the
cheapest of its settings that is within 1e-3 of the value and 1e-2 of both gradients of a converged solution
in float64, or a dash if it takes too long (LIMIT_S) or too much memory (LIMIT_GB, or the device's) before it
gets there, or did so for fewer points:

- sinkhorn_divergence: the loss of sinkhorn_gan.py, by its tolerance;
- geomloss tensorized, geomloss online: GeomLoss's SamplesLoss, by scaling; online needs KeOps and a compiler;
- pot sinkhorn_log, pot sinkhorn_stabilized: POT's plan, whose value autograd follows with the plan held
  constant, by stopThr;
- autograd: log-sum-exp half-steps with autograd through all of them, by their number;
- flash-sinkhorn: pip install flash-sinkhorn==0.4.1, on CUDA only: its SamplesLoss, by scaling, and symmetric
  and alternating updates at one epsilon, by their number; all as it comes, with products in TF32.

From n = 16,384 on, on the CPU only this repository's losses run, without a reference. On CUDA all run, at
65,536 without a reference, with the settings that were found for fewer points.

Times: each round runs every implementation twice, in random order, so that a machine that drifts hits all
alike, and counts the second; the table has the median and the quartiles. Compiling and tuning come before.
Errors: relative to float64, as norms.
x floor: the time of mmd2 over that of the operations and bytes that it needs at least (mmd_operations, and
the inputs read and the gradients written once), at the rates of a matrix product and a copy that are measured
first. An exponential counts as one operation of a product, though
a device makes fewer of them: the true gap is smaller.
Memory: what one evaluation adds at its peak to the inputs, gradients included (2 n d float32); on the CPU the
rise of the resident memory of a fresh process which has warmed up on four points and whose malloc gives freed
memory back at once, on CUDA what torch's allocator says.
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
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

os.environ.setdefault("PYKEOPS_VERBOSE", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gmgan_mnist import fail
from mmd_gan import dense_means, mmd2
from sinkhorn_gan import mean_cost, sinkhorn_divergence

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
DEVIATIONS = (0.1, 0.5, 1.0, 1.2, 1.5, 2.0, 5.0, 10.0, 100.0)  # of the second table of MMD^2
MIXTURES = [("gaussian", s) for s in ((1.0,), (1.0, 2.0, 4.0, 8.0, 16.0), (0.3, 1.0))]
MIXTURES += [("rational_quadratic", (1.0, 2.0, 4.0))]
SIZES = {
    "mmd": [(n, d) for d in (16, 64) for n in (64, 256, 1024, 4096)] + [(1024, 784)],
    "sinkhorn": [(n, d) for d in (16, 64, 784) for n in (64, 256, 1024, 4096)],
}
LARGE = {
    "cpu": {"mmd": [(16_384, 64)], "sinkhorn": [(20_000, 64)]},
    "cuda": {loss: [(16_384, 64), (65_536, 64)] for loss in ("mmd", "sinkhorn")},
}
ALONE = {"cpu": 16_384, "cuda": math.inf}  # from this n on only this repository's losses run
UNKNOWN = {"cpu": 16_384, "cuda": 65_536}  # from this n on there is no reference
EPSILON = 0.05  # in units of the mean cost
WITHIN = (1e-3, 1e-2, 1e-2)  # relative errors that count as the same accuracy: value, gradients
LIMIT_S, LIMIT_GB = 6, 8  # of one evaluation; LIMIT_S without a reference is five times that
WIDTHS = {  # of the table's columns
    **{"n = m": 6, "d": 3, "implementation": 26, "setting": 13, "ms": 8, "quartiles": 18, "speed-up": 8},
    "x floor": 8,
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
    max_n: int = 65_536
    """leave larger inputs out"""
    compile: bool = False
    """on the CPU too, time the copied form under torch.compile, which compiles for minutes"""
    markdown: str | None = None
    """write the table and the facts of the machine to this file as well"""

    def __post_init__(self) -> None:
        for name in ("threads", "repeats", "max_n"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                option = f"--{name.replace('_', '-')}"
                fail(f"{option} must be at least 1, not {getattr(self, name)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            fail(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu")


def copied_kernel(x: Tensor, y: Tensor, bandwidths: tuple[float, ...], kernel: str = "gaussian") -> Tensor:
    """The kernels' sum for all pairs of x (n, d) and y (m, d) together: (n + m, n + m)."""
    z = torch.cat((x, y))
    gram = z @ z.T
    squares = gram.diag()
    t = squares[:, None] + squares[None, :] - 2 * gram
    if kernel == "rational_quadratic":
        return sum((1 + t / (2 * s)) ** -s for s in bandwidths)
    return sum(torch.exp(-t / (2 * s**2)) for s in bandwidths)


def copied_form(x: Tensor, y: Tensor) -> Tensor:
    """MMD^2 of x (n, d) and y (m, d) as it is passed from repository to repository: a scalar."""
    k, n = copied_kernel(x, y, BANDWIDTHS), len(x)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


@cache
def compile_copied() -> Callable:
    """copied_form under torch.compile, with code of its own for each size, as a training loop would have."""
    torch._dynamo.config.recompile_limit = 64  # after eight sizes it would go on without compiling
    return torch.compile(copied_form, dynamic=False)


def compiled_form(x: Tensor, y: Tensor) -> Tensor:
    """copied_form under torch.compile."""
    return compile_copied()(x, y)


def dense_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """mmd2 by whole matrices and autograd."""
    k_xx, k_yy, k_xy = dense_means(x, y, BANDWIDTHS, "gaussian", False, (1.0,) * len(BANDWIDTHS))
    return k_xx + k_yy - 2 * k_xy


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


def flash(x: Tensor, y: Tensor, eps: float, setting: float, backend: str, annealed: bool) -> Tensor:
    """FlashSinkhorn's divergence, by scaling if annealed, else by a number of updates at eps."""
    from flash_sinkhorn import SamplesLoss

    if annealed:
        options = {"blur": eps**0.5, "scaling": setting}
    else:
        options = {"use_epsilon_scaling": False, "eps": eps, "n_iters": setting}
    return SamplesLoss("sinkhorn", half_cost=True, debias=True, backend=backend, **options)(x, y)


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
UPDATES = ("updates", (*range(2, 10), 11, 13, 16, 19, 22, 27, 32, 38, 45, 64, 90, 128, 181, 256, 512, 1000))
FORMS: dict[str, tuple[Callable, str, tuple]] = {
    "copied form": (copied_form, "", ()),
    "copied form compiled": (compiled_form, "", ()),
    "mmd2": (partial(mmd2, bandwidths=BANDWIDTHS, unbiased=False), "", ()),
    "mmd2 dense": (dense_mmd2, "", ()),
    "sinkhorn_divergence": (ours, "tol", (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)),
    "geomloss tensorized": (partial(geomloss, backend="tensorized"), *SCALING),
    "geomloss online": (partial(geomloss, backend="online"), *SCALING),
    "pot sinkhorn_log": (partial(pot, method="sinkhorn_log"), *STOP),
    "pot sinkhorn_stabilized": (partial(pot, method="sinkhorn_stabilized"), *STOP),
    "autograd": (unrolled, "iterations", (5, 10, 20, 50, 100, 200, 500, 1000)),
    "flash-sinkhorn": (
        partial(flash, backend="symmetric", annealed=True),
        "scaling",
        (0.1, 0.2, 0.3, 0.4, *SCALING[1]),
    ),
    "flash-sinkhorn symmetric": (partial(flash, backend="symmetric", annealed=False), *UPDATES),
    "flash-sinkhorn alternating": (partial(flash, backend="alternating", annealed=False), *UPDATES),
}
MMD, SINKHORN = list(FORMS)[:4], list(FORMS)[4:]
COMPILED, FLASH = "copied form compiled", SINKHORN[6:]
OURS = "mmd2", "mmd2 dense", "sinkhorn_divergence"
SETTINGS: dict[tuple[str, int], float] = {}  # what was found last in d dimensions
GIVEN_UP: dict[tuple[str, int], str] = {}  # why a form is not tried in d dimensions any more
NEEDS = {"geomloss tensorized": "geomloss", "geomloss online": "pykeops"}
NEEDS |= dict.fromkeys(SINKHORN[3:5], "ot") | dict.fromkeys(FLASH, "flash_sinkhorn")

# What is to be reached on CUDA: by which form, over the fastest of which, how many times as fast, for which n
# and d. And the most that an evaluation may take beside inputs and gradients, in MB, for which n and d.
RIVALS = *FLASH, "geomloss tensorized", "geomloss online"
GOALS = (
    ("sinkhorn_divergence", RIVALS, 3, (64, 256, 1024, 4096), (16, 64, 784)),
    ("sinkhorn_divergence", RIVALS, 1, (16_384, 65_536), (64,)),
    ("mmd2", ("copied form",), 10, (1024, 4096), (16, 64)),
    ("mmd2", (COMPILED,), 3, (1024, 4096), (16, 64)),
)
MEMORY_GOAL = 64, 65_536, 64


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
        if x.is_cuda and setting == FORMS[form][2][0]:  # compiles and tunes kernels
            evaluate(form, x, y, eps, setting)
        start = time.perf_counter()
        errors = relative_errors(evaluate(form, x, y, eps, setting), exact)
        if time.perf_counter() - start > LIMIT_S:
            return f"over {LIMIT_S} s"
        if all(error <= limit for error, limit in zip(errors, WITHIN)):
            return eps, setting
    return "not reached"


def settled(form: str, x: Tensor, y: Tensor, exact: tuple[Tensor, ...] | None) -> tuple | str:
    """(epsilon, setting), () for a form without settings, or why the form is left out."""
    d = x.shape[1]
    if reason := GIVEN_UP.get((form, d)):
        return reason
    limit = 5 * LIMIT_S
    try:
        if FORMS[form][2] and exact:
            setting = cheapest(form, x, y, exact)
        elif FORMS[form][2] and form not in OURS and (form, d) not in SETTINGS:
            setting = "no setting"
        else:
            setting = (epsilon(x, y), SETTINGS.get((form, d), 1e-3)) if FORMS[form][2] else ()
            # The first time it may compile and tune; what is too slow is so the second time as well.
            if x.is_cuda and all(time_once(form, x, y, *setting) > 1e3 * limit for _ in range(2)):
                setting = f"over {limit} s"
    except torch.OutOfMemoryError:
        setting = "out of memory"
    except Exception as error:  # of somebody else's package: the others' rows are still wanted
        if form in OURS:
            raise
        print(f"{form}: {error!r:.500}", file=sys.stderr)
        setting = "fails"
    if x.is_cuda:
        torch.cuda.empty_cache()
    SETTINGS.pop((form, d), None)
    if isinstance(setting, tuple):
        SETTINGS.update({(form, d): setting[1]} if setting else {})
    elif setting != "not reached":  # a loss of more points may be easier
        GIVEN_UP[form, d] = setting
    return setting


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


def milliseconds(call: Callable, cuda: bool) -> float:
    """How long a call takes until its results are there."""
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def time_once(form: str, x: Tensor, y: Tensor, *setting) -> float:
    """Milliseconds of one evaluation."""
    return milliseconds(lambda: evaluate(form, x, y, *setting), x.is_cuda)


@cache
def rates(device: str) -> tuple[float, float]:
    """Bytes per second, read and written, of a large copy, and operations per second of float32 products.

    Where Triton's kernels put three TF32 products in a float32 one's place, that counts if it is faster.
    """
    cuda = device == "cuda"
    source = torch.ones(2 ** (28 if cuda else 25), device=device)
    target, size = torch.empty_like(source), 8192 if cuda else 2048
    copy = min(milliseconds(lambda: target.copy_(source), cuda) for _ in range(5))
    a, b = torch.randn(2, size, size, device=device)
    product = min(milliseconds(lambda: a @ b, cuda) for _ in range(5))
    if cuda:  # Triton makes float32 products of three in tf32
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        product = min(product, *(3 * milliseconds(lambda: a @ b, cuda) for _ in range(5)))
        torch.set_float32_matmul_precision(precision)
    return 8e3 * len(source) / copy, 2e3 * size**3 / product


def mmd_operations(n: int, d: int) -> int:
    """What MMD^2 of n and n points and its gradients need at least.

    For each of the pairs a distance and, per bandwidth, a power, an addition and, for the slope, a
    multiplication and an addition; then the product of the slopes with the points.
    """
    points = 2 * n
    return points * (points + 1) // 2 * (2 * d + 4 * len(BANDWIDTHS)) + points**2 * 2 * d


def floor(x: Tensor) -> float:
    """Milliseconds below which mmd2 cannot get on this device."""
    n, d = x.shape
    per_byte, per_operation = (1e3 / rate for rate in rates(x.device.type))
    return max(4 * n * d * 4 * per_byte, mmd_operations(n, d) * per_operation)


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
    if device == "cuda":  # where the sizes' kernels were compiled and tuned before
        x, y = points(n, d, device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        evaluate(form, x, y, *setting)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    evaluate(form, *points(4, d, device), *setting)
    x, y = points(n, d, device)
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
    base, cuda = "copied form" if loss == "mmd" else forms[0], args.device == "cuda"
    alone, exact = n >= ALONE[args.device], None
    if alone:
        forms = ["mmd2" if loss == "mmd" else forms[0]]
        SETTINGS.clear()  # nothing is looked up: the script's own tolerance
    if n < UNKNOWN[args.device]:
        exact = (reference if loss == "mmd" else reference_divergence)(x, y)
    settings = {form: settled(form, x, y, exact) for form in forms}
    able = [form for form in forms if not isinstance(settings[form], str)]
    memory = {form: extra_memory(form, n, d, args.device, threads, *settings[form]) for form in able}
    floors = {"mmd2": floor(x)} if "mmd2" in able else {}
    for form in list(floors) if cuda else []:
        time_once(form, x, y, *settings[form])
    least = 3 if exact or alone else 1
    times = {form: [] for form in forms}
    for done in range(1 if alone else max(3, args.repeats * 1024 // n)):
        for form in random.sample(able, len(able)):
            if done < least or sum(times[form]) < 3000:
                if not alone:  # as in training: after itself, not on memory that another one gave back
                    time_once(form, x, y, *settings[form])
                times[form].append(time_once(form, x, y, *settings[form]))
    rows, digits = [], 3 if cuda else 2
    for form in forms:
        if form not in able:
            rows.append([f"{n}", f"{d}", form, settings[form], *["-"] * (len(WIDTHS) - 4)])
            continue
        low, median, high = (f"{q:.{digits}f}" for q in np.quantile(times[form], (0.25, 0.5, 0.75)))
        ratio = np.median(times[base]) / np.median(times[form]) if base in able else math.nan
        ratio = "-" if alone else f"{ratio if loss == 'mmd' else 1 / ratio:.1f}"
        setting = f"{FORMS[form][1]} {settings[form][1]:g}" if settings[form] else "-"
        gap = f"{np.median(times[form]) / floors[form]:.1f}" if form in floors else "-"
        errors = relative_errors(evaluate(form, x, y, *settings[form]), exact) if exact else ()
        errors = [f"{error:.0e}" for error in errors] or ["-"] * 3
        rows.append([f"{n}", f"{d}", form, setting, median, f"{low} to {high}", ratio, gap])
        rows[-1] += [*errors, f"{memory[form]:.1f}"]
    return rows


def scale_rows(args: Args) -> list[list[str]]:
    """The second table of MMD^2, with its head: times against the data's scale."""
    x, y = points(min(1024, args.max_n), 64, args.device)

    def once(mixture: tuple, deviation: float) -> float:
        inputs = [(deviation * v).detach().requires_grad_() for v in (x, y)]
        value = partial(mmd2, bandwidths=mixture[1], kernel=mixture[0])
        return milliseconds(lambda: torch.autograd.grad(value(*inputs), inputs), x.is_cuda)

    times = {(mixture, deviation): [] for mixture in MIXTURES for deviation in DEVIATIONS}
    for _ in range(args.repeats):
        for case in random.sample(list(times), len(times)):
            once(*case)  # as in measure, the second one counts
            times[case].append(once(*case))
    head = ["kernel", "bandwidths", *(f"{deviation:g}" for deviation in DEVIATIONS), "largest", "least, ms"]
    rows = [head, ["---"] * 2 + ["--:"] * (len(head) - 2)]
    for mixture in MIXTURES:
        medians = np.array([np.median(times[mixture, deviation]) for deviation in DEVIATIONS])
        ratios = [f"{ratio:.2f}" for ratio in medians / medians.min()]
        widths = ", ".join(f"{s:g}" for s in mixture[1])
        rows.append([mixture[0], widths, *ratios, max(ratios, key=float), f"{medians.min():.3f}"])
    return rows


def batch_rows(args: Args) -> list[list[str]]:
    """The second table of the Sinkhorn loss, with its head: 64 problems of 64 points in 16 dimensions.

    Each form by its cheapest setting whose errors over the batch are within WITHIN.
    """
    rng = torch.Generator().manual_seed(0)
    x, y = (mean + torch.randn(64, 64, 16, generator=rng) for mean in (0.0, 0.5))
    x, y = (v.to(args.device).requires_grad_() for v in (x, y))
    eps = epsilon(x[0], y[0])
    exact = [v.detach().double().requires_grad_() for v in (x, y)]
    value = sinkhorn_divergence(*exact, eps, tol=1e-7, max_iterations=100_000)
    exact = value.detach(), *torch.autograd.grad(value.sum(), exact)

    def looped(form: Callable) -> Callable:
        return lambda x, y, *setting: torch.stack([form(*pair, *setting) for pair in zip(x, y)])

    tolerances, scalings = FORMS["sinkhorn_divergence"][2], SCALING[1]
    forms = {"sinkhorn_divergence, a batch": (ours, tolerances), "in a loop": (looped(ours), tolerances)}
    if find_spec("geomloss"):
        theirs = FORMS["geomloss tensorized"][0]
        forms |= {"geomloss, a batch": (theirs, scalings), "geomloss in a loop": (looped(theirs), scalings)}
    if find_spec("ot"):
        forms["pot sinkhorn_log in a loop"] = looped(FORMS["pot sinkhorn_log"][0]), STOP[1]

    def once(form: Callable, setting: float) -> tuple[Tensor, ...]:
        value = form(x, y, eps, setting)
        return value.detach(), *torch.autograd.grad(value.sum(), (x, y))

    rows = [["64 problems", "setting", "ms", "x ours"], ["---", "--:", "--:", "--:"]]
    for name, (form, settings) in forms.items():
        for setting in settings:
            errors = relative_errors(once(form, setting), exact)
            if all(error <= limit for error, limit in zip(errors, WITHIN)):
                break
        least = min(milliseconds(lambda f=form, s=setting: once(f, s), x.is_cuda) for _ in range(5))
        first = float(rows[2][2]) if len(rows) > 2 else least
        rows.append([name, f"{setting:g}", f"{least:.2f}", f"{least / first:.1f}"])
    return rows


def goal_lines(rows: list[list[str]]) -> list[str]:
    """A line for each of the goals of which there are rows: reached or missed, and the worst figure."""
    cells = {}
    for row in rows:
        row = dict(zip(WIDTHS, row))
        cells[row["implementation"], int(row["n = m"]), int(row["d"])] = row["ms"], row["extra MB"]
    lines = []
    for ours, rivals, factor, ns, ds in GOALS:
        figures = []
        for n, d in [(n, d) for n in ns for d in ds if (ours, n, d) in cells]:
            times = {form: cells.get((form, n, d), "-")[0] for form in (ours, *rivals)}
            times = {form: float(ms) for form, ms in times.items() if ms != "-"}
            own = times.pop(ours, math.inf)
            if times:
                rival = min(times, key=times.get)
                figures.append((times[rival] / own, f"{n}, d = {d}, beside {rival}"))
        what = f"{ours} at least {factor} times as fast as {' or '.join(rivals)}"
        if figures:
            worst, where = min(figures)
            verdict = "reached" if worst >= factor else "missed"
            met = sum(figure >= factor for figure, _ in figures)
            figure = f"{worst:.2f} times at worst, for n = {where}; {met} of {len(figures)} sizes reach it"
            lines.append(f"Goal: {what}: {verdict}, {figure}.")
    most, n, d = MEMORY_GOAL
    for ours in ("sinkhorn_divergence", "mmd2"):
        extra = cells.get((ours, n, d), "--")[1]
        if extra != "-":
            extra = float(extra) - 2 * n * d * 4 / 1e6
            verdict = "reached" if extra <= most else "missed"
            what = f"{ours}, n = {n}, d = {d}, in at most {most} MB beside inputs and gradients"
            lines.append(f"Goal: {what}: {verdict}, {extra:.1f} MB.")
    return lines


def machine(args: Args) -> str:
    """One line: device, threads, versions, rates, and how busy the machine was."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    cpu = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    gpu = f"{torch.cuda.get_device_name()}, host " if args.device == "cuda" else ""
    load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    per_second = "{:.0f} GB/s copied, {:.0f} GFLOP/s in float32 products".format(
        *(rate / 1e9 for rate in rates(args.device))
    )
    return f"{gpu}{cpu}, {torch.get_num_threads()} threads, {versions}, {per_second}{load}"


def chosen(loss: str, args: Args) -> tuple[list[str], list[str]]:
    """The forms of a loss that can run here, and the packages that others lack."""
    cuda = args.device == "cuda"
    left_out = () if cuda else FLASH if args.compile else (*FLASH, COMPILED)
    forms = [form for form in (MMD if loss == "mmd" else SINKHORN) if form not in left_out]
    missing = {NEEDS[form] for form in forms if form in NEEDS and not find_spec(NEEDS[form])}
    return [form for form in forms if NEEDS.get(form) not in missing], sorted(missing)


def main(args: Args) -> None:
    """Measure every size, print the table as it grows, and write it."""
    if args.threads:
        torch.set_num_threads(args.threads)
    random.seed(0)
    lines, rows = [], []
    rates(args.device)  # while the machine is as it was found

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    def say_row(cells: list[str]) -> None:
        padded = (c.ljust(w) if c in FORMS else c.rjust(w) for c, w in zip(cells, WIDTHS.values()))
        say(f"| {' | '.join(padded)} |")

    for loss in ("mmd", "sinkhorn") if args.loss == "all" else (args.loss,):
        forms, missing = chosen(loss, args)
        say_row([name if name != "speed-up" or loss == "mmd" else "x ours" for name in WIDTHS])
        say_row(["-" * (w - 1) + ("-" if name == "implementation" else ":") for name, w in WIDTHS.items()])
        for n, d in SIZES[loss] + LARGE[args.device][loss]:
            if n <= args.max_n:
                for row in measure(loss, forms, n, d, args, torch.get_num_threads()):
                    say_row(row)
                    rows.append(row)
        what = {
            "mmd": f"bandwidths {BANDWIDTHS}, biased; speed-up over the copied form",
            "sinkhorn": f"epsilon {EPSILON} mean cost, errors within {WITHIN}; time as a multiple of ours",
        }
        say(f"\nValue and both gradients, float32, {what[loss]}.")
        if missing:
            say(f"Left out, as they are not installed: {', '.join(missing)}.")
        if args.max_n >= ALONE[args.device]:
            say(f"From n = {ALONE[args.device]} on the others are left out.")
        if loss == "mmd":
            say("\nTime of mmd2 and its gradients against the data's standard deviation, over the row's")
            say(f"least, for n = {min(1024, args.max_n)}, d = 64; medians of {args.repeats}.\n")
            for row in scale_rows(args):
                say(f"| {' | '.join(row)} |")
        if loss == "sinkhorn":
            say("\nThe same of 64 problems of 64 points in 16 dimensions; the least of five times.\n")
            for row in batch_rows(args) if args.max_n >= 64 else []:
                say(f"| {' | '.join(row)} |")
        say("")  # before the next table, the goals or the machine
    for line in goal_lines(rows) if args.device == "cuda" else []:
        say(f"{line}\n")
    say(f"Machine: {machine(args)}.")
    say(f"\nCommand: `{shlex.join(['python', *sys.argv])}`")
    if args.markdown:
        path = Path(args.markdown)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
