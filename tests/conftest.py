"""What the tests share: points and tolerances, small data sets and small runs, and scripts as commands."""

import bz2
import importlib
import itertools
import os
import struct
import sys
import textwrap
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from forked import ROOT
from PIL import Image

sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
# Tests run in two processes (see pyproject.toml), one thread each; `-n 0` gives one process two threads.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(min(THREADS, torch.get_num_threads()))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # of the processes that tests start


def cloud(n: int, d: int, seed: int = 0, shift: float = 0.0, dtype=torch.float64) -> torch.Tensor:
    """n Gaussian points around (shift, ..., shift)."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=rng, dtype=torch.float64) + shift).to(dtype)


def with_gradients(function, *points) -> list[torch.Tensor]:
    """What the function returns, and the gradients of each of it in each of the points."""
    points = [p.clone().requires_grad_() for p in points]
    values = function(*points)
    values = values if isinstance(values, tuple | list) else [values]
    out, several = [], len(values) > 1
    for value in values:
        grads = torch.autograd.grad(value.sum(), points, retain_graph=several, materialize_grads=True)
        out += [value.detach(), *grads]
    return out


def assert_near(got, want, rel: float) -> None:
    """Tensors, or those of two lists, are equal up to a share of the norm."""
    for g, w in zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]:
        assert g.isfinite().all()
        assert (g.double() - w.double()).norm() <= rel * w.double().norm() + 1e-30


def memory_of(code: str) -> list[float]:
    """What code prints by peak() after the first time: MB of resident memory at most since that."""
    if "VmHWM" not in (Path("/proc/self/status").read_text() if sys.platform == "linux" else ""):
        pytest.skip("no peak of the resident memory here")  # ru_maxrss starts at the peak of pytest itself
    head = "import torch\nfrom forked import peak\ntorch.set_num_threads(1)\n"
    result = forked.Command(forked.run_code, head + textwrap.dedent(code)).finish()
    assert result.returncode == 0, result.stderr
    first, *peaks = map(float, result.stdout.split())
    return [peak - first for peak in peaks]


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


SCRIPTS = [importlib.import_module(path.stem) for path in sorted(ROOT.glob("*.py"))]
TOYS = [script for script in SCRIPTS if hasattr(script, "load_toy")]  # which have 2-D mixtures
MEASURED = [script for script in SCRIPTS if hasattr(script, "image_metrics")]  # whose images have a fid
DRAWING = [script for script in SCRIPTS if hasattr(script, "make_generator")]  # from latents
TINY = {"num_steps": 4, "batch_size": 8, "latent_dim": 4, "device": "cpu", "channels": 4, "eval_views": 1}
TINY |= {"log_every": 1, "eval_every": 3, "num_eval_samples": 60, "num_labels": 20, "label_batch_size": 8}
COUNTER = itertools.count()


def each(cases, names: str = "script") -> pytest.MarkDecorator:
    """A test for each of the cases, whose name has that of the script in it."""
    return pytest.mark.parametrize(names, cases, ids=lambda value: getattr(value, "SCRIPT", None))


ALL = each(SCRIPTS)


@pytest.fixture
def tiny(tiny_mnist):
    """tiny(script, **options): Args of a small run with a name of its own."""

    def make(script, **options):
        small = TINY | {"exp_name": f"run{next(COUNTER)}", "data_dir": tiny_mnist}
        small["run_dir"] = tiny_mnist.with_name("runs")  # with the classifier that evaluates samples
        if script.SCRIPT == "cyclegan_mnist_usps":
            small["num_eval_samples"] = 0  # it trains four classifiers for an evaluation
        return script.Args(
            **{name: v for name, v in small.items() if name in script.Args.model_fields} | options
        )

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


@pytest.fixture(autouse=True)
def no_slow_parts_and_no_gpu(request, monkeypatch):
    """True curves are for the mark `curves`, a GPU for the mark `gpu`: the others compare runs of the CPU.

    The classifiers of translations hardly learn.
    """
    marks = {mark.name for mark in request.node.iter_markers()}
    if "gpu" not in marks:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gradient = Image.linear_gradient("L")
    for script in SCRIPTS if "curves" not in marks else ():
        monkeypatch.setattr(script, "save_curves", lambda path, rows: gradient.save(path))
    classifier = sys.modules["cyclegan_mnist_usps"].train_classifier
    monkeypatch.setattr(classifier, "__defaults__", (None, 0, 2))
