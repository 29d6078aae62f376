"""The second edition's GANs from end to end: data sets and options, what runs leave, stop and resume."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmd_gan
import sinkhorn_gan
import wgan_gp

TINY = {"num_steps": 4, "batch_size": 8, "latent_dim": 4, "device": "cpu"}
TINY |= {"log_every": 1, "eval_every": 3, "num_eval_samples": 60}
FILES = ["checkpoint.pt", "curves.png", "metrics.jsonl", "results.json", "samples.png"]
SCRIPTS = {"mmd_gan": mmd_gan, "sinkhorn_gan": sinkhorn_gan, "wgan_gp": wgan_gp}
ALL = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)


@pytest.fixture
def tiny(runs, tiny_mnist, run_name):
    """tiny(script, **options): Args of a small run; mnist unless a data set is named."""

    def make(script, **options):
        fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": run_name()}
        return script.Args(**(TINY | fixed | options))

    return make


@pytest.fixture
def finished(tiny, tmp_path):
    """finished(script, **options): a copy of its own of the folder of a finished run."""

    def make(script, **options) -> Path:
        key = script.SCRIPT, json.dumps(options, sort_keys=True)
        if key not in DONE:
            DONE[key] = script.train(tiny(script, **options))
        return Path(shutil.copytree(DONE[key], tmp_path / "a run"))

    return make


DONE: dict[tuple, Path] = {}


def refuse_constant(name: str):
    """NaN and Infinity are no JSON."""
    raise AssertionError(f"{name} in a JSON file")


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what the clock decides."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse_constant) for line in lines]
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in found]


def results(folder: Path) -> dict:
    """results.json."""
    return json.loads((folder / "results.json").read_text(), parse_constant=refuse_constant)


def load(folder: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def tensors(value) -> list[torch.Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def assert_complete(folder: Path, pictures: list[int]) -> None:
    """Every file that a run leaves is there, readable, and nothing in it is infinite or NaN."""
    steps = [f"samples_{step:06d}.png" for step in pictures]
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES + steps)
    for name in [*steps, "samples.png", "curves.png"]:
        with Image.open(folder / name) as image:
            image.load()
            assert len(np.unique(np.asarray(image))) > 1
    assert (folder / "samples.png").read_bytes() == (folder / steps[-1]).read_bytes()
    assert rows(folder) and results(folder)
    state = load(folder)
    assert len(tensors(state)) > 20
    assert all(t.isfinite().all() for t in tensors(state) if t.is_floating_point())


# Data sets and options

CASES = [
    *((mmd_gan, {"dataset": name}) for name in ("mnist", "fashion-mnist", "digits", "ring", "grid")),
    (mmd_gan, {"kernel": "gaussian", "eval_split": "validation"}),
    (mmd_gan, {"loss": "attractive", "spectral_norm": False, "penalty_weight": 1.0}),
    (mmd_gan, {"encoder": "none", "bandwidths": (5.0, 10.0)}),
    (mmd_gan, {"dataset": "ring", "encoder": "learned", "loss": "attractive", "torch_deterministic": False}),
    *((wgan_gp, {"dataset": name}) for name in ("mnist", "kmnist", "digits", "ring", "grid")),
    (wgan_gp, {"lipschitz": "clip", "critic_steps": 2}),
    (wgan_gp, {"dataset": "grid", "lipschitz": "clip", "torch_deterministic": False}),
    (wgan_gp, {"penalty_weight": 0.0, "eval_split": "validation"}),
    *((sinkhorn_gan, {"dataset": name}) for name in ("mnist", "digits", "ring", "grid")),
    (sinkhorn_gan, {"critic": "fixed", "eval_split": "validation"}),
    (sinkhorn_gan, {"critic": "fixed", "loss": "sinkhorn", "unroll": True, "max_iterations": 5}),
    (sinkhorn_gan, {"loss": "minibatch-energy", "repulsive": False, "spectral_norm": False}),
    (sinkhorn_gan, {"dataset": "ring", "critic": "learned", "cost": "cosine", "stratified": False}),
]


@pytest.mark.curves
@pytest.mark.parametrize(
    "script, options", CASES, ids=lambda v: getattr(v, "SCRIPT", None) or "-".join(map(str, v.values()))
)
def test_a_run(script, options, tiny, capsys):
    """It leaves all files, learns what should learn, and its numbers are finite."""
    folder = script.train(tiny(script, **options))
    assert_complete(folder, [3, 4])
    toy = options.get("dataset") in ("ring", "grid")
    measures = {"modes", "high_quality", "mode_kl"}
    measures = measures if toy else {"fid", "precision", "recall", "class_shares"}
    lines = rows(folder)
    assert [row["step"] for row in lines] == [1, 2, 3, 3, 4, 4]
    evaluated = [row for row in lines if measures < row.keys()]
    assert [row["step"] for row in evaluated] == [3, 4]
    trained = [row for row in lines if row not in evaluated]
    args = tiny(script, **options)
    learned = (
        "learned" in (getattr(args, "encoder", None), getattr(args, "critic", None)) or script is wgan_gp
    )
    assert all(("loss_c" in row) == learned for row in trained)
    assert all(math.isfinite(value) for row in trained for value in row.values())
    final = results(folder)
    assert measures | {"real", "steps", "seconds", "device", "torch", "args"} == final.keys()
    assert measures == final["real"].keys() and final["steps"] == 4
    assert final["args"]["batch_size"] == 8 and final["args"]["exp_name"] in folder.name
    state = load(folder)
    assert ("critic" in state) == learned and state["script"] == script.SCRIPT
    assert str(folder) in capsys.readouterr().out


@ALL
def test_without_evaluation_no_classifier_is_trained(script, tiny, tmp_path):
    folder = script.train(tiny(script, num_eval_samples=0, run_dir=tmp_path))
    assert_complete(folder, [3, 4])
    assert [path for path in tmp_path.iterdir() if path != folder] == []


@ALL
def test_same_seed_same_run(script, tiny, finished):
    first, second, other = finished(script), script.train(tiny(script)), script.train(tiny(script, seed=2))
    assert rows(first) == rows(second) != rows(other)
    state = load(first)
    for name in ("generator", "averaged", "critic", "optimizer_g", "optimizer_c"):
        pairs = zip(tensors(state[name]), tensors(load(second)[name]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name
    assert (first / "samples.png").read_bytes() == (second / "samples.png").read_bytes()
    assert (first / "samples.png").read_bytes() != (other / "samples.png").read_bytes()


LEARNING = [(mmd_gan, {"encoder": "none"}), (mmd_gan, {"encoder": "learned"}), (wgan_gp, {})]
LEARNING += [(sinkhorn_gan, {})]


@pytest.mark.parametrize("script, options", LEARNING, ids=["mmd-none", "mmd-learned", "wgan", "sinkhorn"])
def test_training_learns(script, options, tiny):
    """Seconds on the ring bring the samples much nearer to it than a generator's first ones are."""
    options = {"dataset": "ring", "batch_size": 128, "num_steps": 250, "log_every": 100, **options}
    folder = script.train(tiny(script, **options, eval_every=1000))
    network = script.make_mlp(4, 2, torch.nn.ReLU())
    distances = []
    for weights in (None, load(folder)["averaged"]):
        if weights:
            prefix = "module."
            network.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )
        with torch.no_grad():
            samples = network(torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)))
        angle = torch.rand(1000, generator=torch.Generator().manual_seed(1)).mul(8).floor() * (math.pi / 4)
        real = torch.stack((angle.cos(), angle.sin()), 1)
        distances.append(mmd_gan.mmd2(samples, real, (0.2, 0.5, 1.0), unbiased=False).item())
    assert distances[1] < 0.3 * distances[0]


@ALL
def test_networks(script):
    """Their shapes, and as many images of a generator as latents."""
    generator = script.make_generator(5)
    images = generator(torch.randn(3, 5))
    assert images.shape == (3, 1, 28, 28) and images.abs().max() <= 1
    if script is wgan_gp:
        assert script.make_critic()(images).shape == (3, 1)
    else:
        for norm in (True, False):
            assert script.make_critic(False, norm)(images).shape == (3, 16)
            assert script.make_critic(True, norm)(torch.randn(3, 2)).shape == (3, 16)


def test_clipped_weights_stay_within_the_bound(tiny):
    folder = wgan_gp.train(tiny(wgan_gp, lipschitz="clip", clip=0.02, num_eval_samples=0))
    largest = max(v.abs().max().item() for v in load(folder)["critic"].values())
    assert largest == pytest.approx(0.02)


# Stop and resume


def signal_at(monkeypatch, update: int, number: int) -> None:
    """Send this process a signal when an optimizer takes its so many-th step."""
    step, calls = torch.optim.Adam.step, []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == update:
            os.kill(os.getpid(), number)
        return step(*args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)


def stopped(script, args, monkeypatch, update: int, number: int = signal.SIGINT) -> Path:
    """The folder of a run that gets a signal."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        signal_at(patch, update, number)
        script.train(args)
    assert stop.value.code == 128 + number
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    return folder


RESUMED = [
    (mmd_gan, {}, 8),
    (mmd_gan, {"dataset": "ring"}, 4),
    (mmd_gan, {"spectral_norm": False, "loss": "attractive", "penalty_weight": 1.0}, 7),
    (wgan_gp, {}, 8),
    (wgan_gp, {"dataset": "grid", "lipschitz": "clip", "critic_steps": 2}, 11),
    (sinkhorn_gan, {}, 8),
    (sinkhorn_gan, {"dataset": "ring"}, 4),
    (sinkhorn_gan, {"critic_every": 3}, 5),
]


@pytest.mark.parametrize(
    "script, options, update",
    RESUMED,
    ids=[
        "mmd",
        "mmd-ring",
        "mmd-penalty",
        "wgan",
        "wgan-clip",
        "sinkhorn",
        "sinkhorn-ring",
        "sinkhorn-every",
    ],
)
def test_resume_is_bit_for_bit(script, options, update, tiny, monkeypatch, capsys):
    """A run stopped in its 4th of 8 steps and resumed has the losses and weights of one that was not."""
    options = {"num_steps": 8, **options}
    straight = script.train(tiny(script, **options))
    folder = stopped(script, tiny(script, **options), monkeypatch, update)
    assert "stopped after step 4" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 3, 4]
    assert (folder / "curves.png").is_file() and not (folder / "results.json").exists()
    torch.manual_seed(1234)
    assert script.train(script.Args(resume=str(folder), device="cpu")) == folder
    assert rows(folder) == rows(straight)
    assert_complete(folder, [3, 6, 8])
    ours, theirs = load(folder), load(straight)
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"args", "progress"}:
        pairs = zip(tensors(ours[key]), tensors(theirs[key]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), key
    assert (folder / "samples.png").read_bytes() == (straight / "samples.png").read_bytes()
    assert {**results(folder), "args": 0, "seconds": 0} == {**results(straight), "args": 0, "seconds": 0}


@ALL
def test_resume_cuts_what_came_after_the_checkpoint(script, tiny, monkeypatch):
    """A run that died while it wrote its checkpoint of step 5 has the line of that step once."""
    straight = script.train(tiny(script, num_steps=6))
    args, save = tiny(script, num_steps=6), torch.save

    def die(content, path):
        if "progress" in content and content["progress"][0] == 5:
            raise RuntimeError("the lights went out")
        save(content, path)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lights"):
        patch.setattr(torch, "save", die)
        script.train(args)
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 3, 4, 5] and load(folder)["progress"][0] == 4
    script.train(script.Args(resume=folder, device="cpu"))
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert rows(folder) == rows(straight)


@ALL
def test_more_steps_for_a_finished_run(script, finished):
    folder = finished(script)
    assert script.train(script.Args(resume=folder, num_steps=7, device="cpu")) == folder
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7]
    assert results(folder)["steps"] == 7 and results(folder)["args"]["num_steps"] == 7
    assert_complete(folder, [3, 4, 6, 7])


@ALL
def test_a_finished_run_is_evaluated_again(script, finished):
    """With the same result; its log has a second line for that, and no other."""
    folder = finished(script)
    before, weights = results(folder), load(folder)["averaged"]
    (folder / "results.json").unlink()
    script.train(script.Args(resume=folder, device="cpu"))
    after = results(folder)
    assert all(after[name] == before[name] for name in ("fid", "precision", "recall", "class_shares", "real"))
    assert after["steps"] == 4 and all(map(torch.equal, weights.values(), load(folder)["averaged"].values()))
    script.train(script.Args(resume=folder, device="cpu", num_eval_samples=20))
    assert results(folder)["fid"] != before["fid"]


@ALL
def test_another_seed_does_not_change_a_resumed_run(script, finished):
    """Options that were not given are the run's, whatever the class has."""
    args = script.Args(resume=finished(script))
    assert args.batch_size == 8 and args.num_steps == 4 and args.eval_every == 3 and args.seed == 1


@ALL
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_command(script, number, tmp_path, start_cli, run_cli):
    """Exit code 130 or 143, and the command that it prints goes on, whatever is in the path."""
    name, run_dir = f"{script.SCRIPT}.py", 'my "runs" & it\'s $HOME'
    options = ["--dataset", "ring", "--num-steps", 10**6, "--eval-every", 10**6, "--log-every", 5]
    options += ["--batch-size", 16, "--device", "cpu", "--run-dir", run_dir]
    command = start_cli(*options, script=name)
    end = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("*/*/metrics.jsonl")):
        assert command.process.is_alive() and time.monotonic() < end, command.finish()
        time.sleep(0.05)
    os.kill(command.process.pid, number)
    result = command.finish(timeout=120)
    assert result.returncode == 128 + number and "Traceback" not in result.stderr
    (folder,) = (path for path in (tmp_path / run_dir).iterdir() if path.is_dir())
    step = load(folder)["progress"][0]
    assert step >= 5 and f"stopped after step {step}" in result.stdout
    if number == signal.SIGTERM:  # once will do
        python, printed, *rest = shlex.split(re.search("go on with: (.*)", result.stdout)[1])
        assert (python, printed) == ("python", name)
        again = run_cli(*rest, "--num-steps", step + 2, "--device", "cpu", script=name)
        assert again.returncode == 0, again.stderr
        assert rows(folder)[-1]["step"] == step + 2 and results(folder)["steps"] == step + 2
        assert again.stdout.splitlines()[-1] == str(Path(run_dir, folder.name))


# Samples of a run


@ALL
def test_generate_images(script, finished):
    """The pictures that training drew; one file more, and no other changed."""
    folder = finished(script)
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    out = script.train(script.Args(resume=folder, generate=12, device="cpu"))
    assert out == folder / "generated"
    images = np.load(out / "samples.npy")
    assert images.shape == (12, 1, 28, 28) and images.dtype == np.float32 and np.abs(images).max() <= 1
    sheet = np.asarray(Image.open(folder / "samples.png").convert("L"))
    for i in (0, 11):
        y, x = 2 + 30 * (i // 10), 2 + 30 * (i % 10)
        assert np.abs(sheet[y : y + 28, x : x + 28] - (images[i, 0] + 1) * 127.5).max() <= 1
    script.train(script.Args(resume=folder, generate=3, device="cpu"))
    assert len(np.load(out / "samples.npy")) == 3
    assert [path.name for path in out.iterdir()] == ["samples.npy"]
    shutil.rmtree(out)
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


@ALL
def test_generate_points(script, finished):
    folder = finished(script, dataset="ring")
    out = script.train(script.Args(resume=folder, generate=1001, device="cpu"))
    points = np.load(out / "samples.npy")
    assert points.shape == (1001, 2) and np.isfinite(points).all() and points.std(0).min() > 0


@ALL
def test_generate_needs_a_run(script):
    with pytest.raises(script.UserError, match="--resume"):
        script.Args(generate=3)
