"""The scripts from end to end: data sets and options, what runs leave, stop and resume."""

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
from conftest import ALL, DRAWING, MEASURED, TOYS, each
from PIL import Image

import baseline_cnn
import cyclegan_mnist_usps
import gmgan_mnist
import mmd_gan
import sgan_mnist
import sinkhorn_gan
import wgan_gp

DONE = {}  # folders of finished runs


@pytest.fixture
def finished(tiny, tmp_path):
    """finished(script): a copy of its own of the folder of a finished run."""

    def make(script) -> Path:
        if script not in DONE:
            DONE[script] = script.train(tiny(script))
        return Path(shutil.copytree(DONE[script], tmp_path / "a run"))

    return make


def again(script, folder: Path, **options) -> Path:
    """Go on with a run, or draw from it."""
    return script.train(script.Args(resume=folder, device="cpu", **options))


def parse(text: str) -> dict:
    """JSON, in which NaN and Infinity fail the test."""
    return json.loads(text, parse_constant=pytest.fail)


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what the clock decides."""
    found = map(parse, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in found]


def steps(folder: Path) -> list[int]:
    """The steps that have a line."""
    return [row["step"] for row in rows(folder)]


def results(folder: Path) -> dict:
    """results.json."""
    return parse((folder / "results.json").read_text())


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


def assert_complete(folder: Path, evaluated: list[int]) -> None:
    """Every file that a run leaves is there, readable, and nothing in it is infinite or NaN."""
    state = load(folder)
    drawn = [f"samples_{step:06d}.png" for step in evaluated]
    more = {"sgan_mnist": ["confusion.png"], "gmgan_mnist": ["components.png"]}.get(state["script"], [])
    pictures = [*drawn, *more, "samples.png", "curves.png"]
    files = ["checkpoint.pt", "metrics.jsonl", "results.json"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(files + pictures)
    for name in pictures:
        assert len(np.unique(np.asarray(Image.open(folder / name)))) > 1
    assert (folder / "samples.png").read_bytes() == (folder / drawn[-1]).read_bytes()
    assert rows(folder) and results(folder)
    assert len(tensors(state)) > 20
    assert all(t.isfinite().all() for t in tensors(state) if t.is_floating_point())


# Data sets and options

CASES = [
    *((mmd_gan, {"dataset": name}) for name in ("mnist", "fashion-mnist", "digits", "ring", "grid")),
    *((wgan_gp, {"dataset": name}) for name in ("mnist", "kmnist", "digits", "ring", "grid")),
    *((sinkhorn_gan, {"dataset": name}) for name in ("mnist", "digits", "ring", "grid")),
    *((script, {}) for script in (baseline_cnn, gmgan_mnist, sgan_mnist)),
    *((script, {"dataset": "digits"}) for script in (baseline_cnn, gmgan_mnist, sgan_mnist)),
    (mmd_gan, {"kernel": "gaussian", "eval_split": "validation"}),
    (mmd_gan, {"encoder": "none", "bandwidths": (5.0, 10.0)}),
    (mmd_gan, {"dataset": "ring", "encoder": "learned", "loss": "attractive", "torch_deterministic": False}),
    (wgan_gp, {"lipschitz": "clip", "critic_steps": 2, "clip": 0.02}),
    (wgan_gp, {"dataset": "grid", "lipschitz": "clip", "torch_deterministic": False}),
    (wgan_gp, {"penalty_weight": 0.0, "eval_split": "validation"}),
    (sinkhorn_gan, {"critic": "fixed", "eval_split": "validation"}),
    (sinkhorn_gan, {"critic": "fixed", "loss": "sinkhorn", "unroll": True, "max_iterations": 5}),
    (sinkhorn_gan, {"loss": "minibatch-energy", "repulsive": False}),
    (sinkhorn_gan, {"dataset": "ring", "critic": "learned", "cost": "cosine", "stratified": False}),
    (baseline_cnn, {"augment": True, "eval_split": "validation", "num_labels": 200}),
    (sgan_mnist, {"augment": False, "torch_deterministic": False}),
    (sgan_mnist, {"gan_weight": 0.0, "paste": 0.0, "eval_views": 0}),
    (sgan_mnist, {"consistency_weight": 0.0, "eval_split": "validation"}),
    (gmgan_mnist, {"latent": "normal", "loss": "non-saturating", "gamma": 0.0}),
    (gmgan_mnist, {"latent": "static", "cluster_weight": 0.0, "eval_split": "validation"}),
    (gmgan_mnist, {"num_components": 13}),
    (cyclegan_mnist_usps, {"num_eval_samples": 60, "semantic_consistency": "usps"}),
    (cyclegan_mnist_usps, {"num_eval_samples": 60, "eval_split": "validation"}),
]
LOSSES = {  # what every line of metrics.jsonl has
    baseline_cnn: "loss",
    sgan_mnist: "loss_c loss_labelled",
    gmgan_mnist: "loss_d loss_g logit_std",
    cyclegan_mnist_usps: "loss_d loss_g adversarial cycle identity",
    mmd_gan: "mmd2 k_xx k_yy k_xy",
    sinkhorn_gan: "loss_g",
    wgan_gp: "loss_c loss_g w1 critic_std",
}
PAIRS = "mnist2usps", "usps2mnist"
MEASURES = {script: {"fid", "precision", "recall", "class_shares"} for script in MEASURED}
MEASURES |= {script: {"accuracy", "errors"} for script in (baseline_cnn, sgan_mnist)}
MEASURES[cyclegan_mnist_usps] = {f"{pair}_{name}" for pair in PAIRS for name in ("preserved", "adaptation")}


@each(CASES, "script, options")
def test_a_run(script, options, tiny, capsys):
    """It leaves all files, and its numbers are finite."""
    args = tiny(script, **options)
    folder = script.train(args)
    assert_complete(folder, [3, 4])
    measures = MEASURES[script]
    if args.dataset in ("ring", "grid"):
        measures = {"modes", "high_quality", "mode_kl"}
    assert steps(folder) == [1, 2, 3, 4]
    assert [row["step"] for row in rows(folder) if measures < row.keys()] == [3, 4]
    assert all(math.isfinite(row[name]) for row in rows(folder) for name in LOSSES[script].split())
    learned = "learned" in (getattr(args, "encoder", None), getattr(args, "critic", None))
    if script in (mmd_gan, sinkhorn_gan):
        assert ("critic" in load(folder)) == learned
        assert all(("loss_c" in row) == learned for row in rows(folder))
    if getattr(args, "lipschitz", None) == "clip":
        assert max(v.abs().max().item() for v in load(folder)["critic"].values()) == pytest.approx(args.clip)
    final = results(folder)
    assert measures | {"steps", "seconds", "device", "torch", "args"} <= final.keys()
    assert final["steps"] == 4 and final["args"]["batch_size"] == 8
    assert final["args"]["exp_name"] in folder.name
    assert script not in MEASURED or final["real"].keys() == measures
    assert str(folder) in capsys.readouterr().out


@pytest.mark.curves
def test_curves(tmp_path):
    """A panel for each number of the log, however rarely it is there."""
    few = [{"step": 1, "fid": None, "class_shares": [1.0]}, {"step": 2, "loss": 1.0}]
    for log in (few, [{"step": k, "loss": k, "fid": k * k} for k in range(5)]):
        mmd_gan.save_curves(tmp_path / "a.png", log)
        assert len(np.unique(np.asarray(Image.open(tmp_path / "a.png")))) > 2


@each((*MEASURED, cyclegan_mnist_usps))
def test_without_evaluation_no_classifier_is_trained(script, tiny, tmp_path):
    folder = script.train(tiny(script, num_eval_samples=0, run_dir=tmp_path))
    assert_complete(folder, [3, 4])
    assert [*tmp_path.iterdir()] == [folder]


@each([*((script, {}) for script in TOYS), (mmd_gan, {"encoder": "learned"})], "script, options")
def test_training_learns(script, options, tiny):
    """Seconds on the ring bring the points that a run generates much nearer to it."""
    options = {"dataset": "ring", "batch_size": 128, "log_every": 100, "eval_every": 1000, **options}
    angle = torch.arange(1000) * (math.pi / 4)
    real = torch.stack((angle.cos(), angle.sin()), 1)
    distances = []
    for num_steps in (1, 250):
        folder = script.train(tiny(script, **options, num_steps=num_steps))
        points = torch.from_numpy(np.load(again(script, folder, generate=1001) / "samples.npy"))
        assert points.shape == (1001, 2)
        distances.append(mmd_gan.mmd2(points, real, (0.2, 0.5, 1.0), unbiased=False).item())
    assert distances[1] < 0.3 * distances[0]


# Stop and resume


def stopped(script, args, monkeypatch, update: int, number: int = signal.SIGINT) -> Path:
    """The folder of a run that gets a signal when an optimizer takes its so many-th step."""
    step, calls = torch.optim.Adam.step, []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == update:
            os.kill(os.getpid(), number)
        return step(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(torch.optim.Adam, "step", counted)
        script.train(args)
    assert stop.value.code == 128 + number
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    return folder


RESUMED = [
    (mmd_gan, {}, 8),
    (mmd_gan, {"dataset": "ring"}, 4),
    (mmd_gan, {"kernel": "gaussian", "loss": "attractive"}, 7),
    (wgan_gp, {}, 8),
    (wgan_gp, {"dataset": "grid", "lipschitz": "clip", "critic_steps": 2}, 11),
    (sinkhorn_gan, {}, 8),
    (sinkhorn_gan, {"dataset": "ring"}, 4),
    (sinkhorn_gan, {"critic_every": 3}, 5),
    (baseline_cnn, {"augment": True}, 4),
    (sgan_mnist, {}, 8),
    (gmgan_mnist, {}, 8),
    (cyclegan_mnist_usps, {"semantic_consistency": "mnist"}, 9),
]


@each(RESUMED, "script, options, update")
def test_resume_is_bit_for_bit(script, options, update, tiny, monkeypatch, capsys):
    """A run stopped in its 4th of 8 steps and resumed has the losses and weights of one that was not."""
    options = {"num_steps": 8, **options}
    straight = script.train(tiny(script, **options))
    folder = stopped(script, tiny(script, **options), monkeypatch, update)
    assert "stopped after step 4" in capsys.readouterr().out
    assert steps(folder) == [1, 2, 3, 4]
    assert (folder / "curves.png").is_file() and not (folder / "results.json").exists()
    torch.manual_seed(1234)
    assert again(script, folder) == folder
    assert rows(folder) == rows(straight)
    assert_complete(folder, [3, 6, 8])
    ours, theirs = load(folder), load(straight)
    assert ours.keys() == theirs.keys()
    for key in ours.keys() - {"args", "progress"}:
        pairs = zip(tensors(ours[key]), tensors(theirs[key]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), key
    assert (folder / "samples.png").read_bytes() == (straight / "samples.png").read_bytes()
    assert {**results(folder), "args": 0, "seconds": 0} == {**results(straight), "args": 0, "seconds": 0}


@each((cyclegan_mnist_usps, mmd_gan))
def test_resume_cuts_what_came_after_the_checkpoint(script, tiny, monkeypatch):
    """A run that died in the middle of its checkpoint of step 5 has the one before, and that step once."""
    straight = script.train(tiny(script, num_steps=6))
    args, save = tiny(script, num_steps=6), torch.save

    def die(content, path):
        if "progress" in content and content["progress"][0] == 5:
            Path(path).write_text("half")
            raise RuntimeError("the lights went out")
        save(content, path)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lights"):
        patch.setattr(torch, "save", die)
        script.train(args)
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert steps(folder) == [1, 2, 3, 4, 5] and load(folder)["progress"][0] == 4
    again(script, folder)
    assert steps(folder) == [1, 2, 3, 4, 5, 6]
    assert rows(folder) == rows(straight)


@ALL
def test_a_finished_run_is_evaluated_again_and_goes_on(script, finished, tiny):
    """First with the same result and the same log; then it has more steps, but not with another network."""
    folder = finished(script)
    log, before, weights = rows(folder), results(folder), tensors(load(folder))
    assert rows(script.train(tiny(script, seed=2))) != log
    (folder / "results.json").unlink()
    again(script, folder)
    after = results(folder)
    assert all(after[name] == before[name] for name in before.keys() - {"args", "seconds"})
    if script in MEASURED:
        again(script, folder, num_eval_samples=20)
        assert results(folder)["fid"] != before["fid"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        again(script, folder, num_steps=7, **{"latent_dim" if script in DRAWING else "channels": 9})
    assert rows(folder) == log and all(map(torch.equal, weights, tensors(load(folder))))
    again(script, folder, num_steps=7)
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7]
    assert results(folder)["steps"] == results(folder)["args"]["num_steps"] == 7
    assert_complete(folder, [3, 4, 6, 7])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_command(number, tmp_path, start_cli, run_cli):
    """Exit code 130 or 143, and the command that it prints goes on, whatever is in the path."""
    run_dir = 'my "runs" & it\'s $HOME'
    options = ["--dataset", "ring", "--num-steps", 10**6, "--eval-every", 10**6, "--log-every", 5]
    command = start_cli(*options, "--batch-size", 16, "--device", "cpu", "--run-dir", run_dir)
    end = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("*/*/metrics.jsonl")):
        assert command.process.is_alive() and time.monotonic() < end, command.finish()
        time.sleep(0.05)
    os.kill(command.process.pid, number)
    result = command.finish(timeout=120)
    assert result.returncode == 128 + number and "Traceback" not in result.stderr
    (folder,) = (tmp_path / run_dir).iterdir()
    step = load(folder)["progress"][0]
    assert step >= 5 and f"stopped after step {step}" in result.stdout
    python, script, *rest = shlex.split(re.search("go on with: (.*)", result.stdout)[1])
    assert (python, script) == ("python", "mmd_gan.py")
    result = run_cli(*rest, "--num-steps", step + 2, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert steps(folder)[-1] == results(folder)["steps"] == step + 2
    assert result.stdout.splitlines()[-1] == str(Path(run_dir, folder.name))


# Samples of a run


@each(DRAWING)
def test_generate_images(script, finished):
    """The pictures that training drew; one file more, and no other changed."""
    folder = finished(script)
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    out = again(script, folder, generate=12)
    assert out == folder / "generated"
    images = np.load(out / "samples.npy")
    assert images.shape == (12, 1, 28, 28) and images.dtype == np.float32 and np.abs(images).max() <= 1
    sheet = np.asarray(Image.open(folder / "samples.png").convert("L"))
    for i in () if script is gmgan_mnist else (0, 11):  # whose latents depend on how many are drawn
        y, x = 2 + 30 * (i // 10), 2 + 30 * (i % 10)
        assert np.abs(sheet[y : y + 28, x : x + 28] - (images[i, 0] + 1) * 127.5).max() <= 1
    again(script, folder, generate=3)
    assert len(np.load(out / "samples.npy")) == 3
    assert [path.name for path in out.iterdir()] == ["samples.npy"]
    shutil.rmtree(out)
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


def test_generate_a_component(finished):
    """--component draws from that one alone, and --truncation nearer to its mean."""
    folder = finished(gmgan_mnist)
    spread = []
    for truncation in (1.0, 0.1):
        out = again(gmgan_mnist, folder, generate=40, component=(3,), truncation=truncation)
        spread.append(np.load(out / "samples.npy").std(0).mean())
    assert spread[1] < 0.5 * spread[0]


def test_translate(finished, tmp_path):
    """Test images, and PNG files of any mode; each by its name."""
    script, folder = cyclegan_mnist_usps, finished(cyclegan_mnist_usps)
    out = again(script, folder, direction="usps2mnist", generate=3)
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert out == folder / "generated" / "usps2mnist"
    shutil.rmtree(out)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    grey = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    for mode in ("L", "RGB", "RGBA", "LA", "P", "1"):
        Image.fromarray(grey).convert(mode).save(pictures / f"{mode}.PNG")
    Image.fromarray(grey.astype(np.uint16) * 257).save(pictures / "deep.png")
    Image.fromarray(grey[:16, :16]).save(pictures / "usps.png")
    names, images = script.read_pictures(pictures, usps=True)
    for name in ("L.PNG", "RGB.PNG", "RGBA.PNG", "LA.PNG", "P.PNG", "deep.png"):
        assert np.abs(images[names.index(name)].numpy().astype(int) - grey).max() <= 1, name
    again(script, folder, direction="usps2mnist", input=pictures)
    assert sorted(path.name for path in out.iterdir()) == sorted(names) and len(names) == 8
    (pictures / "text.png").write_bytes(b"no picture")
    Image.new("L", (30, 28)).save(tmp_path / "wide.png")
    for path, message in ((pictures, "no picture"), (tmp_path, "30 x 28"), (folder / "x", "no folder with")):
        with pytest.raises(script.UserError, match=message):
            again(script, folder, direction="usps2mnist", input=path)
