"""What the tests share: small data sets in torchvision's layout, and the scripts run as commands."""

import bz2
import itertools
import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Tests run in two processes (see pyproject.toml), one thread each; `-n 0` gives one process two threads.
THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(min(THREADS, torch.get_num_threads()))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))  # of the processes that tests start


def write_bars(folder: Path, train: int, test: int, seed: int = 0, size: int = 28, classes: int = 10) -> Path:
    """IDX files, as MNIST's, in `folder`/raw: the class, in turn, is the place of a bright bar in noise."""
    rng = np.random.default_rng(seed)
    for part, n in (("train", train), ("t10k", test)):
        labels = np.arange(n) % classes
        images = rng.integers(0, 90, (n, size, size))
        for image, label in zip(images, labels):
            image[4 + 2 * label : 6 + 2 * label, 4:24] += 160
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / "raw" / f"{part}-{kind}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            path.write_bytes(header + array.astype(np.uint8).tobytes())
    return folder


def write_usps_like(folder: Path, seed: int) -> None:
    """120 + 40 images of 16 x 16 in the text format of USPS's files: bars as in write_bars."""
    rng = np.random.default_rng(seed)
    for name, n in (("usps.bz2", 120), ("usps.t.bz2", 40)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 90, (n, 16, 16))
        for image, label in zip(images, labels):
            image[round(1.6 * label) : round(1.6 * label) + 2, :] += 160
        lines = [
            f"{label + 1} " + " ".join(f"{i}:{v:.4f}" for i, v in enumerate(image.flat, 1))
            for label, image in zip(labels, images / 127.5 - 1)
        ]
        (folder / name).write_bytes(bz2.compress("\n".join(lines).encode() + b"\n"))


@pytest.fixture(scope="session")
def tiny_mnist(tmp_path_factory) -> Path:
    """A data folder with small MNIST, FashionMNIST, KMNIST and USPS; not to be written to."""
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("MNIST", "FashionMNIST", "KMNIST")):
        write_bars(folder / name, 240, 60, seed)
    write_usps_like(folder, 3)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """One --run-dir, so that a classifier that evaluates samples is trained once."""
    return tmp_path_factory.mktemp("runs")


def environment(changes: dict | None) -> dict:
    """This process's environment with changes; None takes a variable away."""
    env = {"OMP_NUM_THREADS": str(THREADS)} | os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    env |= {"CUDA_VISIBLE_DEVICES": ""}  # see no_gpu_but_for_its_tests
    # A W&B service that this process has started writes to paths that are relative to this one's folder.
    env |= {"WANDB_SERVICE": None} | (changes or {})
    return {name: value for name, value in env.items() if value is not None}


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


@pytest.fixture
def run_cli(tmp_path):
    """run_cli(*args, env=None, timeout=300): a script as a command, in a folder of its own."""

    def run(*args, env=None, timeout=300, script="mmd_gan.py"):
        command = [str(ROOT / script), *map(str, args)]
        return forked.Command(forked.run_script, *command, folder=tmp_path, env=environment(env)).finish(
            timeout
        )

    return run


@pytest.fixture
def start_cli(tmp_path):
    """start_cli(*args): a script as a process that runs beside the test, and ends with it."""
    started = []

    def start(*args, script="mmd_gan.py"):
        command = [str(ROOT / script), *map(str, args)]
        started.append(forked.Command(forked.run_script, *command, folder=tmp_path, env=environment(None)))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()


def draw_few_pixels(path: Path, rows: list[dict]) -> None:
    """save_curves, without what takes a second."""
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(path)


@pytest.fixture(autouse=True)
def few_pixels(request, monkeypatch):
    """Scripts that run in this process draw no true curves, but for tests with the mark `curves`."""
    if not request.node.get_closest_marker("curves"):
        for path in ROOT.glob("*.py"):
            if path.stem in sys.modules:
                monkeypatch.setattr(sys.modules[path.stem], "save_curves", draw_few_pixels)


@pytest.fixture(autouse=True)
def no_gpu_but_for_its_tests(request, monkeypatch):
    """A machine's GPU is for the tests with the mark `gpu`: the others compare runs of the CPU."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def leave_process_as_it_was():
    """A script that runs in this process sets signal handlers and torch's modes: put them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def run_name():
    """run_name(): an --exp-name that no other run has (a run folder's name has whole seconds in it)."""
    counter = itertools.count()
    return lambda: f"run{next(counter)}"
