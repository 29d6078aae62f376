"""What the tests share: points and tolerances, small data sets and small runs, and scripts as commands."""

import bz2
import itertools
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from forked import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT))
# Tests run in two processes (see pyproject.toml), one thread each; `-n 0` gives one process two threads.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(min(THREADS, torch.get_num_threads()))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # of the processes that tests start


# Losses


def cloud(n: int, d: int, seed: int = 0, shift: float = 0.0, dtype=torch.float64) -> torch.Tensor:
    """n Gaussian points around (shift, ..., shift)."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=rng, dtype=torch.float64) + shift).to(dtype)


def with_gradients(function, *points) -> list[torch.Tensor]:
    """What the function returns, and the gradients of each of it in each of the points."""
    points = [p.clone().requires_grad_() for p in points]
    values = function(*points)
    values = values if isinstance(values, tuple | list) else [values]
    out, more = [], len(values) > 1
    for value in values:
        grads = torch.autograd.grad(value.sum(), points, retain_graph=more, materialize_grads=True)
        out += [value.detach(), *grads]
    return out


def assert_near(got, want, rel: float) -> None:
    """Tensors, or those of two lists, are equal up to a share of the norm."""
    for g, w in zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]:
        assert g.isfinite().all()
        assert (g.double() - w.double()).norm() <= rel * w.double().norm() + 1e-30


def memory_of(code: str) -> list[float]:
    """What code prints by peak(): MB of resident memory at most since its start()."""
    if "VmHWM" not in (Path("/proc/self/status").read_text() if sys.platform == "linux" else ""):
        pytest.skip("no peak of the resident memory here")  # ru_maxrss starts at the peak of pytest itself
    head = """
        import torch
        torch.set_num_threads(1)
        def peak():
            (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
            print(int(line.split()[1]) * 1024 / 1e6)
        start = peak
    """
    command = [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    first, *peaks = map(float, result.stdout.split())
    return [peak - first for peak in peaks]


# Data


def bars(rng: np.random.Generator, count: int, size: int = 28, classes: int = 10) -> tuple:
    """Images and their classes, in turn: the place of a bright bar in noise."""
    labels = np.arange(count, dtype=np.uint8) % classes
    images = rng.integers(0, 90, (count, size, size), dtype=np.uint8)
    for image, label in zip(images, labels):
        np.array_split(image, 10)[label] += 160
    return images, labels


def write_bars(folder: Path, train: int, test: int, seed: int = 0, **options) -> None:
    """Bars in IDX files, as MNIST's, in `folder`/raw."""
    rng = np.random.default_rng(seed)
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        for kind, array in zip(("images-idx3", "labels-idx1"), bars(rng, count, **options)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / "raw" / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())


def write_usps_like(folder: Path) -> None:
    """120 + 40 bars of 16 x 16 in the text format of USPS's files."""
    rng = np.random.default_rng(3)
    for name, count in (("usps.bz2", 120), ("usps.t.bz2", 40)):
        lines = []
        for image, label in zip(*bars(rng, count, 16)):
            pixels = [f"{i}:{v / 127.5 - 1:.4f}" for i, v in enumerate(image.flat, 1)]
            lines.append(f"{label + 1} {' '.join(pixels)}\n")
        (folder / name).write_bytes(bz2.compress("".join(lines).encode()))


@pytest.fixture(scope="session")
def tiny_mnist(tmp_path_factory) -> Path:
    """A data folder with small MNIST, FashionMNIST, KMNIST and USPS; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("MNIST", "FashionMNIST", "KMNIST")):
        write_bars(folder / name, 240, 60, seed)
    write_usps_like(folder)
    return folder


# Runs

TINY = {"num_steps": 4, "batch_size": 8, "latent_dim": 4, "device": "cpu", "channels": 4, "eval_views": 1}
TINY |= {"log_every": 1, "eval_every": 3, "num_eval_samples": 60, "num_labels": 20, "label_batch_size": 8}
COUNTER = itertools.count()


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """One --run-dir, so that a classifier that evaluates samples is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tiny(runs, tiny_mnist):
    """tiny(script, **options): Args of a small run with a name of its own; mnist unless a data set is named.

    Of TINY and num_eval_samples the script has what it has.
    """

    def make(script, **options):
        small = TINY | ({"num_eval_samples": 0} if script.SCRIPT == "cyclegan_mnist_usps" else {})
        small |= {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": f"run{next(COUNTER)}"}
        known = {name: value for name, value in small.items() if hasattr(script.Args, name)}
        if not hasattr(script.Args, "num_eval_samples"):
            options.pop("num_eval_samples", None)
        return script.Args(**(known | options))

    return make


@pytest.fixture
def start_cli(tmp_path):
    """start_cli(*args): a script as a process in a folder of its own, which ends with the test."""
    started = []

    def start(*args, script="mmd_gan.py", env=None):
        command = [str(ROOT / script), *map(str, args)]
        started.append(forked.Command(forked.run_script, *command, folder=tmp_path, env=env))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()


@pytest.fixture
def run_cli(start_cli):
    """run_cli(*args): the result of a script that runs to its end."""
    return lambda *args, **options: start_cli(*args, **options).finish()


def draw_few_pixels(path: Path, rows: list[dict]) -> None:
    """save_curves, without what takes a second."""
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(path)


@pytest.fixture(autouse=True)
def no_slow_parts(request, monkeypatch):
    """Here curves are drawn for the mark `curves` alone, and the classifiers of translations hardly learn."""
    modules = {path.stem: sys.modules.get(path.stem) for path in ROOT.glob("*.py")}
    for module in filter(None, modules.values()):
        if not request.node.get_closest_marker("curves"):
            monkeypatch.setattr(module, "save_curves", draw_few_pixels)
    if modules["cyclegan_mnist_usps"]:
        monkeypatch.setattr(modules["cyclegan_mnist_usps"].train_classifier, "__defaults__", (None, 0, 2))


@pytest.fixture(autouse=True)
def no_gpu_but_for_its_tests(request, monkeypatch):
    """A machine's GPU is for the tests with the mark `gpu`: the others compare runs of the CPU."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
