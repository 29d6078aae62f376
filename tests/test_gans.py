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
from PIL import Image

import baseline_cnn
import cyclegan_mnist_usps
import gmgan_mnist
import mmd_gan
import sgan_mnist
import sinkhorn_gan
import wgan_gp

TINY = {"num_steps": 4, "batch_size": 8, "latent_dim": 4, "device": "cpu", "channels": 4, "eval_views": 1}
TINY |= {"log_every": 1, "eval_every": 3, "num_eval_samples": 60, "num_labels": 20, "label_batch_size": 8}
FILES = ["checkpoint.pt", "curves.png", "metrics.jsonl", "results.json", "samples.png"]
MORE_FILES = {"sgan_mnist": ["confusion.png"], "gmgan_mnist": ["components.png"]}
SCRIPTS = (baseline_cnn, cyclegan_mnist_usps, gmgan_mnist, mmd_gan, sgan_mnist, sinkhorn_gan, wgan_gp)
SCRIPTS = {script.SCRIPT: script for script in SCRIPTS}
TOYS = mmd_gan, sinkhorn_gan, wgan_gp  # which have 2-D mixtures
DRAWING = gmgan_mnist, mmd_gan, sgan_mnist, sinkhorn_gan, wgan_gp  # which draw samples from latents
MEASURED = gmgan_mnist, mmd_gan, sinkhorn_gan, wgan_gp  # whose images have a fid


def each(scripts) -> pytest.MarkDecorator:
    """A test for each of the scripts."""
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.SCRIPT)


ALL = each(SCRIPTS.values())


@pytest.fixture(autouse=True)
def short_classifiers(monkeypatch):
    """The classifiers of translations learn for two steps."""
    monkeypatch.setattr(cyclegan_mnist_usps.train_classifier, "__defaults__", (None, 0, 2))


def small_args(script, options: dict):
    """Args of a small run: those of TINY that the script has, and the options."""
    small = {name: value for name, value in TINY.items() if hasattr(script.Args, name)}
    if script is cyclegan_mnist_usps:
        small["num_eval_samples"] = 0  # it trains four classifiers for an evaluation
    return script.Args(**(small | options))


@pytest.fixture
def tiny(runs, tiny_mnist, run_name):
    """tiny(script, **options): Args of a small run; mnist unless a data set is named."""

    def make(script, **options):
        fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": run_name()}
        return small_args(script, fixed | options)

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
    more = MORE_FILES.get(load(folder)["script"], [])
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES + more + steps)
    for name in [*steps, *more, "samples.png", "curves.png"]:
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
    (mmd_gan, {"encoder": "none", "bandwidths": (5.0, 10.0)}),
    (mmd_gan, {"dataset": "ring", "encoder": "learned", "loss": "attractive", "torch_deterministic": False}),
    *((wgan_gp, {"dataset": name}) for name in ("mnist", "kmnist", "digits", "ring", "grid")),
    (wgan_gp, {"lipschitz": "clip", "critic_steps": 2}),
    (wgan_gp, {"dataset": "grid", "lipschitz": "clip", "torch_deterministic": False}),
    (wgan_gp, {"penalty_weight": 0.0, "eval_split": "validation"}),
    *((sinkhorn_gan, {"dataset": name}) for name in ("mnist", "digits", "ring", "grid")),
    (sinkhorn_gan, {"critic": "fixed", "eval_split": "validation"}),
    (sinkhorn_gan, {"critic": "fixed", "loss": "sinkhorn", "unroll": True, "max_iterations": 5}),
    (sinkhorn_gan, {"loss": "minibatch-energy", "repulsive": False}),
    (sinkhorn_gan, {"dataset": "ring", "critic": "learned", "cost": "cosine", "stratified": False}),
    *((baseline_cnn, {"dataset": name}) for name in ("mnist", "kmnist", "digits")),
    (baseline_cnn, {"augment": True, "eval_split": "validation", "num_labels": 200}),
    *((sgan_mnist, {"dataset": name}) for name in ("mnist", "fashion-mnist", "digits")),
    (sgan_mnist, {"augment": False, "torch_deterministic": False}),
    (sgan_mnist, {"gan_weight": 0.0, "paste": 0.0, "eval_views": 0}),
    (sgan_mnist, {"consistency_weight": 0.0, "eval_split": "validation"}),
    *((gmgan_mnist, {"dataset": name}) for name in ("mnist", "digits")),
    (gmgan_mnist, {"latent": "normal", "loss": "non-saturating", "gamma": 0.0}),
    (gmgan_mnist, {"latent": "static", "component_weight": 0.0, "eval_split": "validation"}),
    (gmgan_mnist, {"num_components": 13}),
    (cyclegan_mnist_usps, {"num_eval_samples": 60}),
    (
        cyclegan_mnist_usps,
        {"num_eval_samples": 60, "semantic_consistency": "usps", "eval_split": "validation"},
    ),
]
LOSSES = {  # what a line of metrics.jsonl has of training, and an evaluation of samples
    "baseline_cnn": ({"loss"}, {"accuracy", "errors"}),
    "sgan_mnist": ({"loss_c", "loss_labelled"}, {"accuracy", "errors"}),
    "gmgan_mnist": ({"loss_d", "loss_g", "logit_std"}, {"fid", "precision", "recall", "class_shares"}),
    "cyclegan_mnist_usps": (
        {"loss_d", "loss_g", "adversarial", "cycle", "identity"},
        {f"{pair}_{name}" for pair in ("mnist2usps", "usps2mnist") for name in ("preserved", "adaptation")},
    ),
    "mmd_gan": ({"mmd2", "k_xx", "k_yy", "k_xy"}, {"fid", "precision", "recall", "class_shares"}),
    "sinkhorn_gan": ({"loss_g"}, {"fid", "precision", "recall", "class_shares"}),
    "wgan_gp": ({"loss_c", "loss_g", "w1", "critic_std"}, {"fid", "precision", "recall", "class_shares"}),
}


@pytest.mark.parametrize(
    "script, options", CASES, ids=lambda v: getattr(v, "SCRIPT", None) or "-".join(map(str, v.values()))
)
def test_a_run(script, options, tiny, capsys):
    """It leaves all files, and its numbers are finite."""
    args = tiny(script, **options)
    folder = script.train(args)
    assert_complete(folder, [3, 4])
    losses, measures = LOSSES[script.SCRIPT]
    if args.dataset in ("ring", "grid"):
        measures = {"modes", "high_quality", "mode_kl"}
    lines = rows(folder)
    assert [row["step"] for row in lines] == [1, 2, 3, 4]
    assert [row["step"] for row in lines if measures < row.keys()] == [3, 4]
    assert all(math.isfinite(row[name]) for row in lines for name in losses)
    learned = "learned" in (getattr(args, "encoder", None), getattr(args, "critic", None))
    if script in (mmd_gan, sinkhorn_gan):
        assert all(("loss_c" in row) == learned for row in lines) and ("critic" in load(folder)) == learned
    final = results(folder)
    assert measures | {"steps", "seconds", "device", "torch", "args"} <= final.keys()
    assert final["steps"] == 4 and final["args"]["batch_size"] == 8
    assert final["args"]["exp_name"] in folder.name
    if script in MEASURED:
        assert final["real"].keys() == measures
    assert str(folder) in capsys.readouterr().out


@pytest.mark.curves
def test_curves(tmp_path):
    """A panel for each number of the log, however rarely it is there."""
    mmd_gan.save_curves(
        tmp_path / "a.png", [{"step": 1, "fid": None, "class_shares": [1.0]}, {"step": 2, "loss": 1.0}]
    )
    mmd_gan.save_curves(tmp_path / "b.png", [{"step": k, "loss": k, "fid": k * k} for k in range(5)])
    for name in "ab":
        assert len(np.unique(np.asarray(Image.open(tmp_path / f"{name}.png")))) > 2


@each((*MEASURED, cyclegan_mnist_usps))
def test_without_evaluation_no_classifier_is_trained(script, tiny, tmp_path):
    folder = script.train(tiny(script, num_eval_samples=0, run_dir=tmp_path))
    assert_complete(folder, [3, 4])
    assert [path for path in tmp_path.iterdir() if path != folder] == []


@ALL
def test_same_seed_same_run(script, tiny, finished):
    first, second, other = finished(script), script.train(tiny(script)), script.train(tiny(script, seed=2))
    assert rows(first) == rows(second) != rows(other)
    pairs = zip(tensors(load(first)), tensors(load(second)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (first / "samples.png").read_bytes() == (second / "samples.png").read_bytes()
    if script is not baseline_cnn:  # of which all is wrong so early
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


def test_networks():
    """Their shapes, and as many images of a generator as latents."""
    images = mmd_gan.make_generator(5)(torch.randn(3, 5))
    assert images.shape == (3, 1, 28, 28) and images.abs().max() <= 1
    assert wgan_gp.make_critic()(images).shape == (3, 1)
    assert mmd_gan.make_encoder(False)(images).shape == (3, 16)
    assert mmd_gan.make_encoder(True)(torch.randn(3, 2)).shape == (3, 16)
    assert gmgan_mnist.make_discriminator(7)(images).shape == (3, 8)
    classifier = sgan_mnist.make_classifier(4)
    assert classifier(images).shape == (3, 10) and classifier[:-2](images).shape == (3, 16)
    assert cyclegan_mnist_usps.make_patch_discriminator(4)(images).shape == (3, 1, 6, 6)
    translator = cyclegan_mnist_usps.Translator(4)
    torch.testing.assert_close(translator(images), 0.97 * images, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize(
    "script, options, update", RESUMED, ids=[f"{i}-{case[0].SCRIPT}" for i, case in enumerate(RESUMED)]
)
def test_resume_is_bit_for_bit(script, options, update, tiny, monkeypatch, capsys):
    """A run stopped in its 4th of 8 steps and resumed has the losses and weights of one that was not."""
    options = {"num_steps": 8, **options}
    straight = script.train(tiny(script, **options))
    folder = stopped(script, tiny(script, **options), monkeypatch, update)
    assert "stopped after step 4" in capsys.readouterr().out
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
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


@each((cyclegan_mnist_usps, mmd_gan))
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
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5] and load(folder)["progress"][0] == 4
    script.train(script.Args(resume=folder, device="cpu"))
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert rows(folder) == rows(straight)


@each((baseline_cnn, wgan_gp))
def test_more_steps_for_a_finished_run(script, finished):
    folder = finished(script)
    assert script.train(script.Args(resume=folder, num_steps=7, device="cpu")) == folder
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6, 7]
    assert results(folder)["steps"] == 7 and results(folder)["args"]["num_steps"] == 7
    assert_complete(folder, [3, 4, 6, 7])


@ALL
def test_a_finished_run_is_evaluated_again(script, finished):
    """With the same result and the same log."""
    folder = finished(script)
    before_rows = rows(folder)
    name = "averaged" if script is not sgan_mnist else "teacher"
    before, weights = results(folder), load(folder)[name]
    (folder / "results.json").unlink()
    script.train(script.Args(resume=folder, device="cpu"))
    after = results(folder)
    assert all(after[name] == before[name] for name in before.keys() - {"args", "seconds"})
    assert rows(folder) == before_rows and after["steps"] == 4
    assert all(map(torch.equal, weights.values(), load(folder)[name].values()))
    if script in MEASURED:
        script.train(script.Args(resume=folder, device="cpu", num_eval_samples=20))
        assert results(folder)["fid"] != before["fid"]


@pytest.mark.parametrize(
    "script, number",
    [(script, signal.SIGINT) for script in SCRIPTS.values()] + [(mmd_gan, signal.SIGTERM)],
    ids=lambda v: getattr(v, "SCRIPT", None),
)
def test_signals_end_a_command(script, number, tmp_path, start_cli, run_cli, tiny_mnist):
    """Exit code 130 or 143, and the command that it prints goes on, whatever is in the path."""
    name, run_dir = f"{script.SCRIPT}.py", 'my "runs" & it\'s $HOME'
    options = ["--num-steps", 10**6, "--eval-every", 10**6, "--log-every", 5]
    options += ["--batch-size", 16, "--device", "cpu", "--run-dir", run_dir, "--data-dir", tiny_mnist]
    if script in TOYS:
        options += ["--dataset", "ring"]
    elif hasattr(script.Args, "num_eval_samples"):
        options += ["--num-eval-samples", 0]
    if script is cyclegan_mnist_usps:
        options += ["--channels", 4]
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
    if script is mmd_gan:  # once will do
        python, printed, *rest = shlex.split(re.search("go on with: (.*)", result.stdout)[1])
        assert (python, printed) == ("python", name)
        again = run_cli(*rest, "--num-steps", step + 2, "--device", "cpu", script=name)
        assert again.returncode == 0, again.stderr
        assert rows(folder)[-1]["step"] == step + 2 and results(folder)["steps"] == step + 2
        assert again.stdout.splitlines()[-1] == str(Path(run_dir, folder.name))


# Samples of a run


@each(DRAWING)
def test_generate_images(script, finished):
    """The pictures that training drew; one file more, and no other changed."""
    folder = finished(script)
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    out = script.train(script.Args(resume=folder, generate=12, device="cpu"))
    assert out == folder / "generated"
    images = np.load(out / "samples.npy")
    assert images.shape == (12, 1, 28, 28) and images.dtype == np.float32 and np.abs(images).max() <= 1
    sheet = np.asarray(Image.open(folder / "samples.png").convert("L"))
    for i in () if script is gmgan_mnist else (0, 11):  # whose latents depend on how many are drawn
        y, x = 2 + 30 * (i // 10), 2 + 30 * (i % 10)
        assert np.abs(sheet[y : y + 28, x : x + 28] - (images[i, 0] + 1) * 127.5).max() <= 1
    script.train(script.Args(resume=folder, generate=3, device="cpu"))
    assert len(np.load(out / "samples.npy")) == 3
    assert [path.name for path in out.iterdir()] == ["samples.npy"]
    shutil.rmtree(out)
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


@each(TOYS)
def test_generate_points(script, finished):
    folder = finished(script, dataset="ring")
    out = script.train(script.Args(resume=folder, generate=1001, device="cpu"))
    points = np.load(out / "samples.npy")
    assert points.shape == (1001, 2) and np.isfinite(points).all() and points.std(0).min() > 0


def test_generate_a_component(finished):
    """--component draws from that one alone, and --truncation nearer to its mean."""
    folder = finished(gmgan_mnist)
    options = {"resume": folder, "generate": 40, "device": "cpu"}
    spread = []
    for truncation in (1.0, 0.1):
        out = gmgan_mnist.train(gmgan_mnist.Args(**options, component=(3,), truncation=truncation))
        spread.append(np.load(out / "samples.npy").std(0).mean())
    assert spread[1] < 0.5 * spread[0]


def test_translate(finished, tmp_path):
    """Test images, and PNG files of any mode; each by its name."""
    folder = finished(cyclegan_mnist_usps, num_eval_samples=0)
    options = {"resume": folder, "direction": "usps2mnist", "device": "cpu"}
    out = cyclegan_mnist_usps.train(cyclegan_mnist_usps.Args(**options, generate=3))
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert out == folder / "generated" / "usps2mnist"
    shutil.rmtree(out)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (28, 28), dtype=np.uint8)
    for mode in ("L", "RGB", "RGBA", "LA", "P", "1"):
        Image.fromarray(grey).convert(mode).save(pictures / f"{mode}.PNG")
    Image.fromarray(grey.astype(np.uint16) * 257).save(pictures / "deep.png")
    Image.fromarray(grey[:16, :16]).save(pictures / "usps.png")
    names, images = cyclegan_mnist_usps.read_pictures(pictures, usps=True)
    for name in ("L.PNG", "RGB.PNG", "RGBA.PNG", "LA.PNG", "P.PNG", "deep.png"):
        assert np.abs(images[names.index(name)].numpy().astype(int) - grey).max() <= 1, name
    out = cyclegan_mnist_usps.train(cyclegan_mnist_usps.Args(**options, input=pictures))
    assert sorted(path.name for path in out.iterdir()) == sorted(names) and len(names) == 8
    for bad, message in ((b"no picture", "no picture"), (None, "30 x 28")):
        path = pictures / "bad.png"
        path.write_bytes(bad) if bad else Image.new("L", (30, 28)).save(path)
        with pytest.raises(cyclegan_mnist_usps.UserError, match=message):
            cyclegan_mnist_usps.train(cyclegan_mnist_usps.Args(**options, input=pictures))
    with pytest.raises(cyclegan_mnist_usps.UserError, match="no folder with PNG"):
        cyclegan_mnist_usps.train(cyclegan_mnist_usps.Args(**options, input=tmp_path / "nothing"))
