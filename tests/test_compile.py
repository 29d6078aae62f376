"""Training steps that never wait for the device, and their CUDA graphs (--compile)."""

import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import cyclegan_mnist_usps
import gmgan_mnist

IMAGES = "--dataset mnist --batch-size 8 --channels 4"
RUNS = {
    "baseline": ("baseline_cnn", "--batch-size 8 --channels 4 --num-labels 20 --augment"),
    "sgan": ("sgan_mnist", f"{IMAGES} --num-labels 20 --label-batch-size 6"),
    "gmgan": ("gmgan_mnist", IMAGES),
    "gmgan-full": ("gmgan_mnist", f"{IMAGES} --arch mlp --covariance full --loss non-saturating"),
    "cyclegan": (
        "cyclegan_mnist_usps",
        "--batch-size 16 --channels 2 --num-blocks 1 --augment --spectral-norm --semantic-consistency mnist",
    ),
}
EVERY = pytest.mark.parametrize("name", RUNS)


@pytest.fixture
def run(tmp_path, tiny_mnist, run_name, monkeypatch):
    """run(name, *options): the folder of a run of 16 steps."""

    def start(name: str, *options: str) -> Path:
        script, fixed = RUNS[name]
        module = importlib.import_module(script)
        monkeypatch.setattr(cyclegan_mnist_usps, "train_classifier", untrained)  # it takes a minute
        fixed = f"{fixed} --num-steps 16 --log-every 1 --eval-every 100 --exp-name {run_name()}".split()
        fixed += ["--data-dir", str(tiny_mnist), "--run-dir", str(tmp_path)]
        fixed += [] if script == "baseline_cnn" else ["--num-eval-samples", "0"]
        return module.main(tyro.cli(module.Args, args=[*fixed, *options]))

    return start


def untrained(images: torch.Tensor, labels: torch.Tensor, seed: int) -> torch.nn.Module:
    """A classifier for --semantic-consistency."""
    return cyclegan_mnist_usps.make_judge().eval().requires_grad_(False).to(images.device)


def losses(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("_second", "_seconds"))} for line in lines]


# Steps on the CPU, taken as if they were recorded


class Waits(TorchDispatchMode):
    """Finds operations that on CUDA would wait for the device, or copy what the host has made to it."""

    names = "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "lift_fresh"

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        masks = [v for v in args[1] if v is not None and v.dtype == torch.bool] if "index" in name else []
        self.found += [name] if masks or name.startswith(self.names) else []
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Notes the operations of a step and does the same ones again, as a graph does, without its Python."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.notes.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self, scalars: dict) -> dict:
        """The new values of a step's scalars."""
        made = {}

        def place(x):  # autograd keeps results in tensors of its own, with the same memory
            return x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype

        def now(x):
            return made.get(place(x), x) if isinstance(x, torch.Tensor) else x

        for func, args, kwargs, out in self.notes:
            args, kwargs = tree_map(now, (args, kwargs))
            pairs = zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)))
            made |= {place(old): new for old, new in pairs if isinstance(old, torch.Tensor)}
        return {name: now(value.detach()) for name, value in scalars.items()}


@EVERY
def test_no_step_waits_and_replays_are_the_same_steps(name, run, monkeypatch):
    """Nothing is read from the device, and all that differs from step to step is in tensors or the kind."""
    script, found, steps = importlib.import_module(RUNS[name][0]), [], []

    class Watched(script.Recorded):
        def __init__(self, step, device, enabled, *optimizers):
            super().__init__(step, device, enabled, *optimizers)
            self.enabled = True
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = torch.zeros(())

        def __call__(self, *kind):
            steps.append(kind)
            with Waits(found):
                return self.step(*kind)

    class Replayed(Watched):
        def __call__(self, *kind):
            self.calls[kind] = self.calls.get(kind, 0) + 1
            if kind in self.graphs:
                return self.graphs[kind].replay(self.scalars[kind])
            with Tape() as tape:
                scalars = self.step(*kind)
            if self.calls[kind] > self.warmup:
                self.graphs[kind], self.scalars[kind] = tape, scalars
                steps.append("taped")
            return scalars

    for method in ("tolist", "numpy", "cpu"):
        read = getattr(torch.Tensor, method)

        def watched(tensor, *args, read=read, method=method, **options):
            found.extend([method] if Waits in map(type, modes()) else [])
            return read(tensor, *args, **options)

        monkeypatch.setattr(torch.Tensor, method, watched)
    monkeypatch.setattr(script, "Recorded", Watched)
    plain = run(name, "--device", "cpu")
    kinds = {"sgan": 2, "cyclegan": 5}.get(name, 1)
    assert len(steps) == 16 and len({*steps}) == kinds and found == []
    monkeypatch.setattr(script, "Recorded", Replayed)
    assert losses(run(name, "--device", "cpu")) == losses(plain)
    assert steps[16:] == ["taped"] * (1 if name == "cyclegan" else kinds)


def modes() -> list:
    """The dispatch modes that are on."""
    return torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_waits_are_found():
    x, found = torch.arange(3.0), []
    reads = [
        x.sum().item,
        lambda: int(x[0]),
        lambda: bool(x[0] > 1),
        lambda: x[x > 1],
        lambda: torch.equal(x, x + 1),
        lambda: torch.tensor([1.0, 2.0]),
    ]
    for read in reads:
        before = len(found)
        with Waits(found):
            read()
        assert len(found) > before
    with Waits(found := []):
        (x * 2).clamp(min=0.5).masked_fill(x == 0, 1)[torch.randint(3, (5,))].mean()
    assert found == []


# The graphs' bookkeeping, with a CUDA that only takes notes


@pytest.fixture
def notes(monkeypatch) -> list:
    """What a stand-in for torch.cuda was asked to do."""
    importlib.import_module("torch._inductor")  # for the clean-up, which cannot import it among stand-ins
    notes = []

    class Graph:
        def replay(self):
            notes.append("replay")

    @contextlib.contextmanager
    def record(graph, stream):
        notes.append("record")
        yield
        notes.append("recorded")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda device: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": record,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return notes


def test_plain_steps_then_a_recording_then_replays(notes):
    """For each kind by itself; a replayed step's scalars are the recorded ones, which have no gradient."""
    weight = torch.ones((), requires_grad=True)

    def step(kind):
        notes.append(kind)
        return {"loss": weight * 2}

    recorded = gmgan_mnist.Recorded(step, torch.device("cuda"), True)
    plain = [recorded("a")["loss"] for _ in range(3)]
    assert notes == ["a"] * 3 and len({*map(id, plain)}) == 3
    first = recorded("a")
    assert notes[3:] == ["record", "a", "recorded", "replay"]
    assert recorded("b") is not first and recorded("a") is first and not first["loss"].requires_grad
    assert notes[7:] == ["b", "replay"]
    for _ in range(3):
        recorded("b")
    assert notes[9:] == ["b", "b", "record", "b", "recorded", "replay"]
    recorded("a"), recorded("b")
    assert notes[15:] == ["replay"] * 2


def test_a_recording_that_fails(notes, capsys):
    """One line says why and what to do."""

    def step(kind):
        notes.append(kind)
        if notes[-2:] == ["record", kind]:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return {"loss": len(notes)}

    recorded = gmgan_mnist.Recorded(step, torch.device("cuda"), True)
    for _ in range(3):
        recorded("a")
    with pytest.raises(SystemExit) as stop:
        recorded("a")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "not permitted" in line and "leave --compile away" in line


@pytest.mark.parametrize(("device", "compile"), [("cpu", True), ("cuda", False)])
def test_where_nothing_is_recorded(device, compile, notes):
    recorded = gmgan_mnist.Recorded(lambda: notes.append("step"), torch.device(device), compile)
    for _ in range(6):
        recorded()
    assert notes == ["step"] * 6


def test_rates():
    """Numbers off CUDA, wherever the checkpoint comes from; where a graph has read a tensor, that one."""
    weights = [torch.ones(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.Adam([{"params": [weight]} for weight in weights], fused=True)
    first, second = optimizer.param_groups
    first["lr"], second["lr"] = rates = torch.zeros(()), torch.zeros(())
    gmgan_mnist.set_rate(optimizer, 0.5)
    assert first["lr"] is rates[0] and second["lr"] is rates[1] and rates == (0.5, 0.5)
    first["capturable"] = True
    gmgan_mnist.Recorded(None, torch.device("cpu"), True, optimizer)
    gmgan_mnist.set_rate(optimizer, 0.25)
    assert [type(g["lr"]) for g in (first, second)] == [float, float] and first["lr"] == 0.25
    assert not first["capturable"]


@pytest.mark.parametrize("script", sorted({script for script, _ in RUNS.values()}))
def test_the_averages_are_of_the_device(script):
    """Their count too: a recorded step would take one on the CPU as the number that it was."""
    averaged = importlib.import_module(script).average(torch.nn.Linear(2, 2).to("meta"), 0.9)
    assert {v.device.type for v in averaged.state_dict().values()} == {"meta"}


@EVERY
def test_a_resumed_run_may_change_it(name, monkeypatch):
    script = importlib.import_module(RUNS[name][0])
    saved = vars(tyro.cli(script.Args, args=RUNS[name][1].split()))
    for option, expected in (("--no-compile", False), ("--compile", True)):
        monkeypatch.setattr(sys, "argv", [name, "--resume", "runs/x", option])
        args = tyro.cli(script.Args)
        saved["compile"] = not expected
        assert args.compile is script.resumed_args(args, saved).compile is expected


# On CUDA


@pytest.mark.gpu
@EVERY
def test_graphs_take_the_same_steps(name, run, monkeypatch, run_name, tmp_path):
    """As plain steps do, after a resume too; and a checkpoint of one device goes on on the other."""
    script = importlib.import_module(RUNS[name][0])
    plain = run(name, "--device", "cuda")
    straight = losses(plain)
    # Gradients of turned images are sums in no fixed order, which Adam's first steps enlarge.
    rel = 1e-3 if name in ("sgan", "cyclegan") else 1e-5
    expected = [pytest.approx(line, rel=rel, abs=rel / 10) for line in straight]
    recorded = run(name, "--device", "cuda", "--compile")
    assert losses(recorded) == expected
    ours, theirs = (torch.load(f / "checkpoint.pt", map_location="cpu") for f in (recorded, plain))
    for kind in (kind for kind in ours if kind.startswith("averaged")):
        torch.testing.assert_close(ours[kind], theirs[kind], rtol=rel, atol=rel)

    class Stopping(script.Recorded):
        def __call__(self, *kind):
            scalars = super().__call__(*kind)
            if sum(self.calls.values()) == 8:
                os.kill(os.getpid(), signal.SIGINT)
            return scalars

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(script, "Recorded", Stopping)
        folder = f"stopped-{run_name()}"
        run(name, "--device", "cuda", "--compile", "--exp-name", folder)
    (folder,) = tmp_path.glob(f"{folder}__*")
    assert losses(script.main(script.Args(resume=str(folder), device="cuda"))) == expected
    more = script.Args(resume=str(folder), device="cpu", num_steps=18)
    assert len(losses(script.main(more))) == 18
    back = script.Args(resume=str(folder), device="cuda", num_steps=20)
    assert len(losses(script.main(back))) == 20
