"""The script mmd_gan.py from end to end: every option for a few steps, and everything that can go wrong."""

import itertools
import json
import math
import os
import shutil
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import mmd_gan
from mmd_gan import Args, kernel_means, main

TINY = {"num_steps": 4, "batch_size": 8, "latent_dim": 8, "channels": 4, "feature_dim": 4, "device": "cpu"}
TINY |= {"log_every": 1, "eval_every": 3, "num_eval_samples": 60, "encoder": "learned"}
FILES = ["args.json", "metrics.jsonl", "samples.png", "curves.png", "checkpoint.pt", "results.json"]
UNREACHABLE = {
    name: "http://127.0.0.1:9"
    for p in ("http", "https", "all")
    for name in (f"{p}_proxy", f"{p}_PROXY".upper())
}
UNREACHABLE |= {"no_proxy": None, "NO_PROXY": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One --run-dir for the module, so that a judge is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tiny(runs, tiny_mnist, run_name):
    """tiny(**options): Args of a small run; mnist unless a data set is named."""

    def make(**options):
        fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": run_name()}
        return Args(**(TINY | fixed | options))

    return make


@pytest.fixture(scope="module")
def finished(runs, tiny_mnist) -> Path:
    """The folder of a finished run; not to be written to."""
    fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": "finished"}
    return main(Args(**(TINY | fixed)))


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the one scalar that the clock decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]


def numbers(value):
    """All numbers in nested dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, int | float) else []


def tensors(value) -> list[torch.Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def load(folder: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_complete(folder: Path, pictures: list[int]) -> None:
    """Every file that a run leaves is there, readable, and nothing in it is infinite or NaN."""
    steps = [f"samples_{step:06d}.png" for step in pictures]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES + steps)
    for name in [*steps, "samples.png", "curves.png"]:
        with Image.open(folder / name) as image:
            image.load()
            assert len(np.unique(np.asarray(image))) > 1
    rows, results = metrics(folder), json.loads((folder / "results.json").read_text())
    values = numbers(rows) + numbers(results)
    assert len(values) > 20 and all(map(math.isfinite, values))
    assert all(t.isfinite().all() for t in tensors(load(folder)) if t.is_floating_point())
    assert not list(folder.parent.rglob("*.tmp"))


# Every data set, every option


@pytest.mark.curves
@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist", "kmnist", "digits", "ring", "grid"])
def test_every_data_set(dataset, tiny, capsys):
    folder = main(tiny(dataset=dataset))
    assert_complete(folder, [3, 4])
    rows, results = metrics(folder), json.loads((folder / "results.json").read_text())
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    toy = dataset in ("ring", "grid")
    measures = {"modes", "high_quality", "mode_kl"} if toy else {"fid", "precision", "recall", "class_kl"}
    assert all((measures <= row.keys()) == (row["step"] in (3, 4)) for row in rows)
    assert all({"loss_generator", "loss_critic", "k_xx", "k_yy", "k_xy"} < row.keys() for row in rows)
    assert measures | {"steps", "seconds", "steps_per_second", "peak_memory_mb"} < results.keys()
    assert {"device", "versions"} < results.keys() and results["steps"] == 4
    assert toy or {"floor_fid", "floor_precision", "judge", "judge_accuracy", "num_eval"} < results.keys()
    assert json.loads((folder / "args.json").read_text())["dataset"] == dataset
    out = capsys.readouterr().out
    assert all(str(folder / name) in out for name in ("samples.png", "curves.png", "checkpoint.pt"))
    assert toy or f"{results['floor_fid']:.3f}" in out  # the floor is printed


OPTIONS = [
    *({"kernel": kernel} for kernel in ("rational_quadratic", "linear")),
    *({"kernel": k, "encoder": "none"} for k in ("gaussian", "rational_quadratic", "linear")),
    *({"repulsion": lam, "bounded_kernel": b} for lam in (1.0, -1.0, 0.3) for b in (True, False)),
    {
        "kernel": "rational_quadratic",
        "bandwidths": (0.2, 0.5, 1.0),
        "repulsion": -1.0,
        "gradient_penalty": 1.0,
    },
    {"kernel": "linear", "gradient_penalty": 0.1, "repulsion": -1.0},
    {"bandwidths": (1.0, 2.0, 4.0), "unbiased": False},
    {"bandwidths": (1.0, 2.0, 4.0), "bandwidth_mode": "median"},
    {"bandwidths": (1.0, 2.0), "bandwidth_mode": "learned", "gradient_penalty": 1.0, "bounded_kernel": True},
    {"kernel": "rational_quadratic", "bandwidth_mode": "learned", "unbiased": False},
    {"kernel": "rational_quadratic", "bandwidth_mode": "median", "encoder": "none"},
    {"bandwidth_mode": "median", "gradient_penalty": 0.5, "spectral_norm": False},
    {"spectral_norm": False, "critic_steps": 3},
    {"eval_split": "validation"},
    {"lr_decay": 0.0, "ema_decay": 0.0, "beta1": 0.0, "torch_deterministic": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("dataset", ["mnist", "ring"])
def test_every_loss_option(options, dataset, tiny, monkeypatch):
    """A run ends, its losses are finite, and what should train has trained."""
    if dataset == "ring":
        monkeypatch.setattr(mmd_gan, "save_points", lambda *args: None)
    before = {}

    class Kept(mmd_gan.Kernel):
        def __init__(self, *args):
            super().__init__(*args)
            before.update({name: value.clone() for name, value in self.state_dict().items()})

    monkeypatch.setattr(mmd_gan, "Kernel", Kept)
    folder = main(tiny(dataset=dataset, num_steps=3, num_eval_samples=0, **options))
    rows = metrics(folder)
    assert len(rows) == 3 and all(map(math.isfinite, numbers(rows)))
    state = load(folder)
    assert ("loss_critic" in rows[0]) == (options.get("encoder") != "none")
    assert ("gradient_penalty" in rows[0]) == ("gradient_penalty" in options)
    assert ("bandwidth_0" in rows[0]) == ("bandwidth_mode" in options)
    assert ("opt_critic" in state) == (options.get("encoder") != "none")
    learned = options.get("bandwidth_mode") == "learned"
    assert len(before) == len(state["kernel"]) == (2 if learned else 0)
    assert not learned or not torch.equal(before["log_bandwidth"], state["kernel"]["log_bandwidth"])
    assert all(t.isfinite().all() for t in tensors(state) if t.is_floating_point())
    k_xx, k_yy, k_xy = (rows[0][k] for k in ("k_xx", "k_yy", "k_xy"))
    assert rows[0]["loss_generator"] == pytest.approx(k_xx + k_yy - 2 * k_xy, rel=1e-4, abs=1e-5)


def test_samples_differ_between_steps_and_between_seeds(tiny):
    first, second = main(tiny()), main(tiny(seed=2))
    pictures = [first / "samples_000003.png", first / "samples_000004.png", second / "samples_000004.png"]
    assert len({path.read_bytes() for path in pictures}) == 3
    assert (first / "samples.png").read_bytes() == pictures[1].read_bytes()


def test_same_seed_same_run(tiny):
    first, second = main(tiny()), main(tiny())
    assert metrics(first) == metrics(second)
    assert all(torch.equal(a, b) for a, b in zip(tensors(load(first)), tensors(load(second)), strict=True))


def test_training_learns(tiny):
    """Seconds on the ring bring the averaged samples much nearer to it than a generator's first ones."""
    options = {"dataset": "ring", "num_steps": 300, "batch_size": 128, "feature_dim": 16, "eval_every": 300}
    options |= {"lr_decay": 0.5, "num_eval_samples": 2000, "log_every": 50, "encoder": "none"}
    folder = main(tiny(**options))
    state, device = load(folder), torch.device("cpu")
    torch.manual_seed(0)
    generator = mmd_gan.average(mmd_gan.make_generator(8, 4, True), 0.999)
    distances = []
    for weights in (None, state["averaged"]):
        if weights:
            generator.load_state_dict(weights)
        samples = mmd_gan.draw_samples(generator, 8, 2000, 1, device)
        real = mmd_gan.load_toy("ring", 2000)
        distances.append(mmd_gan.mmd2(samples, real, (0.2, 0.5, 1.0), unbiased=False).item())
    assert distances[1] < 0.2 * distances[0]


# Resume

RESUMED = [
    {},
    {"bandwidth_mode": "learned", "gradient_penalty": 1.0, "repulsion": -1.0},
    {"encoder": "none", "dataset": "ring", "bandwidth_mode": "median"},
    {"critic_steps": 2, "spectral_norm": False, "dataset": "digits"},
]


def interrupt_at(monkeypatch, step: int, batches_per_step: int, number: int) -> None:
    """Send this process a signal when the last batch of a step is drawn."""
    draw, calls = mmd_gan.draw_batch, itertools.count(1)

    def drawn(*args):
        if next(calls) == step * batches_per_step:
            os.kill(os.getpid(), number)
        return draw(*args)

    monkeypatch.setattr(mmd_gan, "draw_batch", drawn)


@pytest.mark.parametrize(
    "options", RESUMED, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "default"
)
def test_resume_is_bit_for_bit(options, tiny, monkeypatch, capsys):
    """A run stopped after 4 of 8 steps and resumed has the losses and weights of one that was not stopped."""
    options = {"num_steps": 8, **options}
    straight = main(tiny(**options))
    batches = 1 + (options.get("critic_steps", 1) if options.get("encoder") != "none" else 0)
    args = tiny(**options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4, batches, signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            main(args)
    assert stop.value.code == 130
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert "--resume" in capsys.readouterr().err and load(folder)["step"] == 4
    assert len(metrics(folder)) == 4 and not (folder / "results.json").exists()
    torch.manual_seed(1234)
    assert main(Args(resume=str(folder))) == folder
    assert metrics(folder) == metrics(straight)
    assert_complete(folder, [3, 6, 8])
    ours, theirs = load(folder), load(straight)
    for key in ("generator", "averaged", "critic", "kernel", "opt_generator", "rng"):
        pairs = zip(tensors(ours[key]), tensors(theirs[key]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), key
    assert (folder / "samples.png").read_bytes() == (straight / "samples.png").read_bytes()


@pytest.mark.parametrize("number, step", [(1, 3), (2, 4)], ids=["midway", "last"])
def test_broken_off_in_an_evaluation(number, step, finished, tiny, monkeypatch):
    """The second Ctrl-C ends an evaluation at once; the step is saved, and a resumed run evaluates it."""
    args, measure, calls = tiny(), mmd_gan.Evaluation.__call__, itertools.count(1)

    def interrupted(*inputs):
        if next(calls) == number:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return measure(*inputs)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mmd_gan.Evaluation, "__call__", interrupted)
        main(args)
    assert signal.getsignal(signal.SIGINT) is before
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert load(folder)["step"] == step and [row["step"] for row in metrics(folder)] == list(range(1, step))
    assert main(Args(resume=str(folder))) == folder
    assert metrics(folder) == metrics(finished)
    assert_complete(folder, [3, 4])
    pairs = zip(tensors(load(folder)), tensors(load(finished)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_died_between_an_evaluation_and_its_checkpoint(finished, tmp_path, monkeypatch):
    """The step is evaluated again, and has one line."""
    folder = shutil.copytree(finished, tmp_path / "run")
    state, last = load(folder), metrics(folder)[-1]
    for name in ("fid", "precision"):
        del state["rows"][-1][name]
    torch.save(state | {"metrics": None}, folder / "checkpoint.pt")
    (folder / "results.json").unlink()
    main(Args(resume=str(folder), run_dir=str(finished.parent)))
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4] and metrics(folder)[-1]["fid"] == last[
        "fid"
    ]
    assert json.loads((folder / "results.json").read_text())["fid"] == last["fid"]


def test_going_on_after_more_steps_were_done_but_not_reported(finished, tmp_path, refused):
    """results.json is of an earlier end; and of a run that stopped where it is to end there is no metric."""
    folder = shutil.copytree(finished, tmp_path / "run")
    before = (folder / "results.json").read_text()
    main(Args(resume=str(folder), num_steps=6))
    (folder / "results.json").write_text(before)
    main(Args(resume=str(folder)))
    assert json.loads((folder / "results.json").read_text())["steps"] == 6
    state = load(folder)
    for rows in (state["rows"][:-1], []):
        torch.save(state | {"rows": rows}, folder / "checkpoint.pt")
        refused(Args(resume=str(folder)), "has done its 6 steps", "--num-steps")


def test_a_disk_that_fills_up_in_a_checkpoint(tmp_path):
    """An error of the system, which main turns into a line, and the old file is whole."""
    resource = pytest.importorskip("resource")
    mmd_gan.write_file(tmp_path / "a", "old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(OSError, match="large"):
            mmd_gan.write_file(tmp_path / "a", lambda file: torch.save(torch.zeros(100_000), file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "a").read_text() == "old"


def test_stop_before_anything_is_logged(tiny, monkeypatch, capsys):
    """Ctrl-C in the first step of a run that logs every hundred: one line, a checkpoint, and it resumes."""
    args, unpatched = tiny(log_every=100, eval_every=100), mmd_gan.Run.steps

    def steps(run):
        for number in unpatched(run):
            os.kill(os.getpid(), signal.SIGINT)
            yield number

    with monkeypatch.context() as patch:
        patch.setattr(mmd_gan.Run, "steps", steps)
        with pytest.raises(SystemExit) as stop:
            main(args)
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert stop.value.code == 130 and "stopped after step 1" in capsys.readouterr().err
    assert load(folder)["step"] == 1 and not metrics(folder)
    assert main(Args(resume=str(folder))) == folder and [row["step"] for row in metrics(folder)] == [4]


def test_resume_writes_again_what_came_after_the_checkpoint(tiny, monkeypatch):
    """A run that died (no signal, nothing saved) leaves lines after its checkpoint: they are not doubled."""
    straight, args = main(tiny(num_steps=6)), tiny(num_steps=6)
    draw, calls = mmd_gan.draw_batch, itertools.count(1)

    def die(*inputs):
        if next(calls) == 10:
            raise RuntimeError("the lights went out")
        return draw(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(mmd_gan, "draw_batch", die)
        with pytest.raises(RuntimeError, match="lights"):
            main(args)
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4] and load(folder)["step"] == 3
    main(Args(resume=str(folder)))
    assert metrics(folder) == metrics(straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_stop(number, tmp_path, start_cli):
    """As a command: the exit code is the shell's for that signal, and the checkpoint resumes."""
    options = ["--dataset", "ring", "--num-steps", 10**6, "--eval-every", 10**6, "--num-eval-samples", 0]
    command = start_cli(*options, "--log-every", 5, "--batch-size", 16, "--device", "cpu")
    end = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.jsonl")):
        assert command.process.is_alive() and time.monotonic() < end, command.finish()
        time.sleep(0.05)
    os.kill(command.process.pid, number)
    result = command.finish(timeout=120)
    err = result.stderr
    assert result.returncode == 128 + number
    (folder,) = tmp_path.glob("runs/*")
    step = load(folder)["step"]
    assert step >= 5 and f"stopped after step {step}" in err and "Traceback" not in err
    assert not list(folder.glob("*.tmp")) and (folder / "curves.png").is_file()
    main(Args(resume=str(folder), num_steps=step + 2, eval_every=10**6, log_every=1))
    assert metrics(folder)[-1]["step"] == step + 2 and (folder / "results.json").is_file()


def test_more_steps_for_a_finished_run(finished, tiny, tmp_path):
    """--num-steps may change; all else stays, but for where the run now is."""
    folder = shutil.copytree(finished, tmp_path / "run")
    before = json.loads((folder / "args.json").read_text())
    main(Args(resume=str(folder), num_steps=6))
    after = json.loads((folder / "args.json").read_text())
    changed = {k for k in before if before[k] != after[k]}
    assert changed - {"track", "device"} == {"num_steps", "resume", "run_dir"}
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_died_after_its_last_step(finished, tmp_path):
    """All steps are done and saved, but there is no results.json: resuming writes it, with the metrics."""
    folder = shutil.copytree(finished, tmp_path / "run")
    before = json.loads((folder / "results.json").read_text())
    (folder / "results.json").unlink()
    assert main(Args(resume=str(folder))) == folder
    after = json.loads((folder / "results.json").read_text())
    ours = {"seconds", "peak_memory_mb"}
    assert {k: v for k, v in after.items() if k not in ours} == {
        k: v for k, v in before.items() if k not in ours
    }
    (folder / "results.json").unlink()
    (folder / "metrics.jsonl").unlink()
    main(Args(resume=str(folder)))
    assert metrics(folder) == metrics(finished) and (folder / "results.json").exists()


def test_resume_of_a_run_that_was_moved(tiny, tmp_path, monkeypatch):
    """From any folder, with the folder of the runs gone: the judge is kept beside the run."""
    folder = main(tiny(dataset="digits", run_dir=str(tmp_path / "gone"), num_steps=2, eval_every=2))
    moved = folder.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mmd_gan, "train_judge", lambda images, labels: mmd_gan.make_judge().eval())
    main(Args(resume="moved", num_steps=3))
    assert metrics(moved)[-1]["step"] == 3 and not (tmp_path / "gone").exists()
    assert [path.name.split("__")[0] for path in tmp_path.glob("*.pt")] == ["judge"]


def test_an_option_typed_with_its_default_counts_as_given(monkeypatch, capsys):
    """`--resume RUN --no-unbiased` of a run that has --unbiased is refused, whichever is the default."""
    saved, default = vars(Args(unbiased=not Args().unbiased, seed=4)), Args()
    typed = "--unbiased" if default.unbiased else "--no-unbiased"
    for option, text in (([typed], "--unbiased"), (["--seed", "1"], "--seed 1"), (["--seed=1"], "--seed 1")):
        monkeypatch.setattr(sys, "argv", ["mmd_gan.py", "--resume", "run", *option])
        with pytest.raises(SystemExit) as stop:
            mmd_gan.resumed_args(Args(resume="run"), saved)
        assert stop.value.code == 2 and text in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["mmd_gan.py", "--resume", "run"])
    assert mmd_gan.resumed_args(Args(resume="run"), saved).seed == 4


def test_a_number_that_is_another_data_sets_default_counts_as_given(tiny):
    saved, default = vars(tiny(dataset="ring")), Args().num_steps
    assert saved["num_steps"] == 4
    assert mmd_gan.resumed_args(Args(resume="run", num_steps=default), saved).num_steps == default


# Generate


def test_generate_images(finished, tmp_path, capsys):
    """The folder holds that many 28 x 28 PNG files, the same ones for the same seed."""
    checkpoint = str(finished / "checkpoint.pt")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = str(tmp_path / name)
        assert main(Args(generate=12, checkpoint=checkpoint, out=out, seed=seed)) == tmp_path / name
    names = [f"{i:06d}.png" for i in range(12)]
    assert all(sorted(p.name for p in (tmp_path / n).iterdir()) == names for n in "abc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    a, b, c = ([(tmp_path / n / name).read_bytes() for name in names] for n in "abc")
    assert a == b and not set(a) & set(c) and len(set(a)) == 12
    with Image.open(tmp_path / "a" / names[0]) as image:
        assert image.size == (28, 28) and image.mode == "L"
    with pytest.raises(SystemExit) as stop:
        main(Args(generate=3, checkpoint=checkpoint, out=str(tmp_path / "a")))
    assert stop.value.code == 2 and str(tmp_path / "a") in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names


def test_generate_is_what_training_drew(finished, tmp_path):
    """With the run's seed the first images are those of its samples.png."""
    main(Args(generate=100, checkpoint=str(finished / "checkpoint.pt"), out=str(tmp_path / "out")))
    with Image.open(finished / "samples.png") as image:
        grid = np.asarray(image.convert("L")).astype(int)
    for i in (0, 37, 99):
        with Image.open(tmp_path / "out" / f"{i:06d}.png") as image:
            row, column = 2 + 30 * (i // 10), 2 + 30 * (i % 10)
            assert abs(grid[row : row + 28, column : column + 28] - np.asarray(image)).max() <= 1


def test_generate_points(tiny, tmp_path):
    folder = main(tiny(dataset="grid", num_eval_samples=0))
    out = main(Args(generate=50, checkpoint=str(folder / "checkpoint.pt"), out=str(tmp_path / "new" / "out")))
    points = np.load(out / "samples.npy")
    assert [p.name for p in out.iterdir()] == ["samples.npy"]
    assert points.shape == (50, 2) and points.dtype == np.float32 and np.isfinite(points).all()


# Weights & Biases


def wandb_records(path: Path):
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            parsed = Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def test_track_offline_writes_scalars_and_pictures(run_cli, tmp_path, tiny_mnist):
    """What WANDB_MODE=offline left on disk holds the scalars of metrics.jsonl, options and pictures."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    env = {
        "WANDB_MODE": "offline",
        "HOME": str(tmp_path / "home"),
        "WANDB_API_KEY": None,
        "WANDB_SILENT": "true",
    }
    result = run_cli("--track", "--data-dir", tiny_mnist, "--wandb-project-name", "tested", *options, env=env)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.glob("runs/mmd_gan__*")
    (path,) = tmp_path.glob("runs/wandb/offline-run-*/*.wandb")
    records = list(wandb_records(path))
    history = []
    for record in records:
        if record.HasField("history"):
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            history.append(items)
    rows = metrics(folder)
    assert len(history) == len(rows) == 4
    for ours, theirs in zip(rows, history):
        assert theirs["_step"] == ours["step"] and "steps_per_second" in theirs
        for name, value in ours.items():
            assert name in ("step", "class_shares") or theirs[name] == pytest.approx(value, rel=1e-12)
        assert any(name.startswith("samples") for name in theirs) == (ours["step"] in (3, 4))
    (run,) = (record.run for record in records if record.HasField("run"))
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert run.project == "tested" and run.display_name == folder.name
    assert config["batch_size"] == 8 and config["kernel"] == "gaussian"
    pictures = {p.read_bytes() for p in path.parent.glob("files/media/images/*.png")}
    assert pictures == {(folder / f"samples_00000{step}.png").read_bytes() for step in (3, 4)}
    assert load(folder)["wandb_id"] == run.run_id
    assert_complete(folder, [3, 4])


class FakeWandb:
    """Stands for a W&B run; fails where it is told to."""

    id = "abc123"

    def __init__(self, failing=()):
        self.failing, self.rows, self.finished = failing, [], 0

    def log(self, row, step):
        if "log" in self.failing:
            raise ConnectionError("no route to W&B")
        self.rows.append((step, row))

    def finish(self, **options):
        if "finish" in self.failing:
            raise ConnectionError("no route to W&B")
        self.finished += 1


def fake_wandb(monkeypatch, failing=()) -> tuple[FakeWandb, list]:
    """Put a FakeWandb in wandb.init's place; returns it and the options of the calls."""
    import wandb

    run, calls = FakeWandb(failing), []

    def init(**options):
        calls.append(options)
        if "init" in failing and options.get("mode") != "offline":
            raise ConnectionError("no route to W&B")
        return run

    monkeypatch.setenv("WANDB_MODE", "offline")  # so that nothing asks for a login
    monkeypatch.setattr(wandb, "init", init)
    return run, calls


def test_wandb_out_of_reach_falls_back_to_offline(tiny, monkeypatch, capsys):
    run, calls = fake_wandb(monkeypatch, ["init"])
    folder = main(tiny(track=True))
    assert [options.get("mode") for options in calls] == [None, "offline"]
    assert [step for step, _ in run.rows] == [1, 2, 3, 4] and run.finished == 1
    assert "no route to W&B" in capsys.readouterr().err
    assert_complete(folder, [3, 4])


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_wandb_failing_never_costs_a_model(failing, tiny, monkeypatch, capsys):
    """The run ends as if untracked, and says once what went wrong."""
    fake_wandb(monkeypatch, [failing])
    folder = main(tiny(track=True))
    assert capsys.readouterr().err.count("no route to W&B") == 1
    assert_complete(folder, [3, 4])


def test_resumed_run_goes_on_in_the_same_wandb_run(tiny, monkeypatch):
    run, calls = fake_wandb(monkeypatch)
    folder = main(tiny(track=True))
    main(Args(resume=str(folder), num_steps=5, track=True, device="cpu"))
    assert [options["id"] for options in calls] == [None, run.id]
    assert [step for step, _ in run.rows] == [1, 2, 3, 4, 5]


def test_tracked_without_login_stops_before_anything_is_written(run_cli, tmp_path):
    env = {"WANDB_MODE": None, "WANDB_API_KEY": None, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    env |= {
        "HOME": str(tmp_path / "home"),
        "NETRC": str(tmp_path / "netrc"),
        "WANDB_CONFIG_DIR": str(tmp_path),
    }
    result = run_cli("--track", "--dataset", "ring", "--num-steps", 2, env=env)
    assert result.returncode == 2
    (line,) = (line for line in result.stderr.splitlines() if "error" in line)
    assert "wandb login" in line and "WANDB_MODE=offline" in line and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


# Bad input: one clear line, exit code 2, nothing half-written


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(args, *texts): main(args) leaves with code 2 and one line with these texts; returns it."""

    def check(args, *texts):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(args)
        err = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert len(err.splitlines()) == 1 and "error: " in err
        assert all(text in err for text in texts), err
        return err

    return check


def no_run_folder(folder) -> bool:
    """Whether a --run-dir holds nothing."""
    return not Path(folder).exists() or not list(Path(folder).iterdir())


@pytest.mark.parametrize(
    "options, texts",
    [
        (["--dataset", "cifar"], ["cifar", "fashion-mnist", "digits"]),
        (["--bandwidths", "1", "0"], ["--bandwidths must be positive", "0.0"]),
        (["--dataset", "digits", "--batch-size", "2000"], ["--batch-size 2000", "1437"]),
    ],
)
def test_bad_options_of_the_command(options, texts, run_cli, tmp_path):
    result = run_cli(*options, "--device", "cpu")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(text in result.stderr for text in texts), result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bandwidths": (0.0,)}, r"--bandwidths must be positive, not \(0.0,\)"),
        ({"bandwidths": (1.0, -1.0)}, r"--bandwidths must be positive, not \(1.0, -1.0\)"),
        ({"bandwidths": (math.nan,)}, r"--bandwidths must be positive, not \(nan,\)"),
        ({"bandwidths": ()}, r"--bandwidths must be positive, not \(\)"),
        ({"batch_size": 0}, "--batch-size must be at least 2, not 0"),
        ({"batch_size": 1}, "--batch-size must be at least 2, not 1"),
        ({"num_steps": -5}, "--num-steps must be positive, not -5"),
        ({"log_every": 0}, "--log-every must be positive, not 0"),
        ({"eval_every": 0}, "--eval-every must be positive, not 0"),
        ({"critic_steps": 0}, "--critic-steps must be positive, not 0"),
        ({"lr_generator": math.nan}, "--lr-generator must be positive, not nan"),
        ({"lr_critic": math.inf}, "--lr-critic must be positive, not inf"),
        ({"feature_scale": 0.0}, "--feature-scale must be positive, not 0.0"),
        ({"beta1": -0.1}, "--beta1 must be in"),
        ({"ema_decay": 1.5}, r"--ema-decay must be in \[0, 1\], not 1.5"),
        ({"gradient_penalty": -1.0}, r"--gradient-penalty must be in \[0, inf\), not -1.0"),
        ({"num_eval_samples": 5}, "--num-eval-samples must be 0 or at least 10, not 5"),
        ({"beta1": 1.0}, "--beta1 must be in"),
        ({"out": "x"}, "--checkpoint <run>/checkpoint.pt and --out"),
        ({"generate": 3}, "--checkpoint <run>/checkpoint.pt and --out"),
        ({"generate": 3, "checkpoint": "x"}, "--checkpoint <run>/checkpoint.pt and --out"),
        ({"generate": -1}, r"--generate must be in \[0, inf\), not -1"),
        ({"encoder": "none", "gradient_penalty": 1.0}, "--encoder none has no critic"),
        ({"encoder": "none", "bandwidth_mode": "learned"}, "--encoder none has no critic"),
        ({"kernel": "linear", "bandwidth_mode": "median"}, "--kernel linear has no bandwidths"),
        ({"kernel": "linear", "bounded_kernel": True}, "--kernel linear has no bandwidths"),
        ({"seed": -1}, "--seed must be in .*not -1"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        Args(**options)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_numpy_does_not_take(seed):
    with pytest.raises(ValueError, match=f"--seed .*{seed}"):
        Args(seed=seed)


def test_mnist_missing_and_no_network(run_cli, tmp_path):
    """The line says what is missing, where it would go and which data set needs no download."""
    result = run_cli("--data-dir", "empty", "--num-steps", 2, env=UNREACHABLE)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert all(
        text in line for text in ("mnist", str(Path("empty/MNIST/raw")), "--dataset digits", "--data-dir")
    )
    assert not (tmp_path / "runs").exists()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:5], lambda b: b"<html>not found</html>" * 50],
    ids=["truncated", "empty", "header", "text"],
)
def test_damaged_data_files(name, damage, tiny, tiny_mnist, tmp_path, refused):
    shutil.copytree(tiny_mnist / "MNIST", tmp_path / "MNIST")
    file = tmp_path / "MNIST" / "raw" / name
    file.write_bytes(damage(file.read_bytes()))
    args = tiny(data_dir=str(tmp_path), run_dir=str(tmp_path / "runs"))
    refused(args, str(tmp_path / "MNIST" / "raw"), "damaged", "delete")
    assert no_run_folder(args.run_dir) and file.exists()


def test_images_and_labels_that_do_not_fit(tiny, tiny_mnist, tmp_path, refused):
    raw = shutil.copytree(tiny_mnist / "MNIST", tmp_path / "MNIST") / "raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    refused(tiny(data_dir=str(tmp_path), run_dir=str(tmp_path / "runs")), "damaged", "(240, 28, 28)", "(60,)")


def test_batch_larger_than_the_data(tiny, tmp_path, refused):
    args = tiny(batch_size=241, run_dir=str(tmp_path / "runs"))
    refused(args, "--batch-size 241", "240", "mnist")
    assert no_run_folder(args.run_dir)


def test_resume_without_a_checkpoint(tmp_path, refused):
    refused(Args(resume=str(tmp_path / "none")), str(tmp_path / "none"), "no checkpoint")
    refused(Args(resume=str(tmp_path)), str(tmp_path), "no checkpoint")
    assert no_run_folder(tmp_path)


class Touch:
    """A pickle that creates a file when it is loaded by a loader that runs code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_damaged_and_foreign_checkpoints(finished, tmp_path, refused):
    """Neither resume nor generate takes them, and the folder stays as it was."""
    whole, path, marker = (
        (finished / "checkpoint.pt").read_bytes(),
        tmp_path / "checkpoint.pt",
        tmp_path / "ran",
    )
    resume, out = Args(resume=str(tmp_path)), str(tmp_path / "out")
    generate = Args(generate=3, checkpoint=str(path), out=out)
    for content, text in (
        (whole[: len(whole) // 2], "damaged"),
        (b"", "damaged"),
        (b"not a checkpoint", "damaged"),
        ({"script": "sinkhorn_gan", "step": 3, "args": {}}, "sinkhorn_gan"),
        ({"script": "mmd_gan", "args": {}}, "another version of mmd_gan, with no rows"),
        ({"model": torch.zeros(3)}, "not a run's"),
        ([torch.zeros(3)], "not a run's"),
        ({"script": "mmd_gan", "args": Touch(marker)}, "code"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        for args in (resume, generate):
            refused(args, str(path), text)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    torch.load(path, weights_only=False)  # the pickle does run where code may
    assert marker.exists()


def test_a_checkpoint_without_its_parts_is_damaged(tmp_path, refused):
    torch.save({"script": "mmd_gan"}, tmp_path / "checkpoint.pt")
    refused(Args(resume=str(tmp_path)), "checkpoint.pt", "damaged")


@pytest.mark.parametrize(
    "options, texts",
    [
        ({"kernel": "linear"}, ["--kernel linear", "gaussian"]),
        ({"seed": 3}, ["--seed 3", "1"]),
        ({"dataset": "ring"}, ["--dataset ring", "mnist"]),
        ({"channels": 5}, ["--channels 5", "4"]),
        ({}, ["has done its 4 steps", "--num-steps"]),
    ],
)
def test_resume_with_what_cannot_change(options, texts, finished, refused):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    refused(Args(resume=str(finished), **options), *texts)
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


def test_generate_from_what_is_not_there(finished, tmp_path, refused):
    checkpoint = str(finished / "checkpoint.pt")
    refused(Args(generate=3, checkpoint=str(tmp_path / "none.pt"), out=str(tmp_path / "out")), "none.pt")
    (tmp_path / "file").write_text("")
    refused(Args(generate=3, checkpoint=checkpoint, out=str(tmp_path / "file" / "out")), "file", "--out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_unwritable_run_folder(tiny, tmp_path, refused):
    """A place below a file, which nobody can write to."""
    (tmp_path / "file").write_text("kept")
    args = tiny(run_dir=str(tmp_path / "file" / "runs"))
    refused(args, str(tmp_path / "file" / "runs"), "--run-dir")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none(tiny, tmp_path, refused):
    args = tiny(device="cuda", run_dir=str(tmp_path / "runs"))
    refused(args, "--device cuda", "--device cpu")
    assert no_run_folder(args.run_dir)


def test_loss_that_is_not_finite(tiny, monkeypatch, refused):
    """The line names the step and the last good checkpoint, which is still the one before."""
    args = tiny(dataset="ring", num_steps=8, num_eval_samples=0)
    means, calls = mmd_gan.kernel_means, itertools.count(1)
    monkeypatch.setattr(
        mmd_gan,
        "kernel_means",
        lambda *a: tuple(v * math.nan for v in means(*a)) if next(calls) == 10 else means(*a),
    )
    refused(args, "not finite at step 5", "checkpoint.pt of step 3", "learning rates")
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    state = load(folder)
    assert state["step"] == 3 and all(t.isfinite().all() for t in tensors(state) if t.is_floating_point())
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("what", ["checkpoint.pt", "metrics.jsonl"])
def test_a_disk_that_is_full(what, tiny, monkeypatch, refused):
    """One line says so; and the run can be resumed, though a line of metrics.jsonl was cut off."""
    args = tiny(dataset="ring", num_steps=8, num_eval_samples=0)
    log = mmd_gan.Run.log

    def logged(run, scalars):
        if run.step == 5:
            file = run.folder / {"checkpoint.pt": "checkpoint.pt.tmp"}.get(what, what)
            if what == "metrics.jsonl":
                file.write_text(file.read_text() + '{"step": 5, "loss_ge')
                file.rename(run.folder / "kept")
            file.symlink_to("/dev/full")
        log(run, scalars)

    with monkeypatch.context() as patch:
        patch.setattr(mmd_gan.Run, "log", logged)
        refused(args, "cannot read or write", "No space left", "--run-dir")
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert load(folder)["step"] == 3
    if what == "metrics.jsonl":
        (folder / "kept").rename(folder / "metrics.jsonl")
    else:
        (folder / "checkpoint.pt.tmp").unlink()
    main(Args(resume=str(folder)))
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("dataset", ["ring", "mnist"])
@pytest.mark.parametrize("eval_every", [1, 100])
def test_learning_rate_that_explodes(dataset, eval_every, tiny, refused):
    """However soon the weights overflow, one line ends the run, and no checkpoint with NaN is called good."""
    args = tiny(dataset=dataset, num_steps=100, eval_every=eval_every, lr_generator=1e30)
    err = refused(args, "not finite at step", "last good checkpoint")
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    if "of step" in err:
        floats = [t for t in tensors(load(folder)) if t.is_floating_point()]
        assert all(t.isfinite().all() for t in floats)
    else:
        assert "none yet" in err and not (folder / "checkpoint.pt").exists()


# CUDA, and minutes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic", "linear"])
@pytest.mark.parametrize("road", ["auto", "dense", "tiled"])
def test_cuda_agrees_with_float64(kernel, road):
    torch.manual_seed(0)
    x, y = torch.randn(700, 16), torch.randn(600, 16) + 0.5
    results = []
    for points in ((x.double(), y.double()), (x.cuda(), y.cuda())):
        a, b = (p.requires_grad_() for p in points)
        means = kernel_means(a, b, (1.0, 2.0, 4.0), kernel, road=road)
        sum(f * v for f, v in zip((1.0, -0.5, 0.7), means)).backward()
        results.append([v.detach().double().cpu() for v in (*means, a.grad, b.grad)])
    for exact, ours in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4 * exact.abs().max().item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dataset", ["mnist", "ring"])
def test_cuda_trains(dataset, tiny):
    folder = main(tiny(dataset=dataset, device="cuda", gradient_penalty=1.0))
    assert_complete(folder, [3, 4])
    main(Args(resume=str(folder), num_steps=5))
    assert metrics(folder)[-1]["step"] == 5


def real_mnist() -> str | None:
    """A folder with MNIST in torchvision's layout: the one that MNIST_DIR names, or one near by."""
    places = [os.environ.get("MNIST_DIR"), *(ROOT / p for p in ("data", "../shared/data"))]
    files = "MNIST/raw/train-images-idx3-ubyte"
    return next((str(p) for p in places if p and (Path(p) / files).is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(real_mnist() is None, reason="no MNIST here; name its folder in MNIST_DIR")
def test_mnist_gets_better(tmp_path):
    """600 steps of the default run: far from its end, but on the way, with most classes there."""
    folder = main(Args(data_dir=real_mnist(), run_dir=str(tmp_path), num_steps=600, num_eval_samples=5000))
    results = json.loads((folder / "results.json").read_text())
    assert results["judge_accuracy"] > 0.99
    assert results["fid"] < 200 * results["floor_fid"]
    assert results["precision"] > 0.3 and results["recall"] > 0.1
    assert sum(share > 0.01 for share in results["class_shares"]) >= 8
