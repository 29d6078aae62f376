"""What users do with the scripts: as a library, as commands, and by mistake.

What all scripts have in common, to the letter (tests/test_scripts.py), is tested with one or two of them.
"""

import math
import os
import signal
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_bars
from test_gans import (
    ALL,
    DRAWING,
    MEASURED,
    SCRIPTS,
    TOYS,
    again,
    assert_complete,
    each,
    load,
    results,
    rows,
    steps,
    stopped,
)

import baseline_cnn
import cyclegan_mnist_usps
import gmgan_mnist
import mmd_gan
import sgan_mnist
import sinkhorn_gan
import wgan_gp

RATE = dict.fromkeys(SCRIPTS, "learning_rate")
RATE |= {mmd_gan: "lr_generator", sinkhorn_gan: "lr_generator", sgan_mnist: "lr_classifier"}
IMAGES = [script for script in SCRIPTS if script is not cyclegan_mnist_usps]  # of one data set
UNREACHABLE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}
UNREACHABLE |= {name.upper(): value for name, value in UNREACHABLE.items()}
UNREACHABLE |= {"no_proxy": None, "NO_PROXY": None}


@pytest.fixture
def quick(tiny):
    """quick(script, **options): Args of a small run, on the ring if there is one."""
    return lambda script, **options: tiny(script, **({"dataset": "ring"} if script in TOYS else {}) | options)


def fail(*args, **options):
    """Stands for an error of torch."""
    raise RuntimeError("the lights went out")


def broken(script, args, monkeypatch) -> None:
    """A run that ends with an error."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lights"):
        patch.setattr(torch.optim.Adam, "step", fail)
        script.train(args)


# From Python


@ALL
def test_two_threads(script, quick, monkeypatch):
    """Runs of one name that start together have folders of their own; no thread can set signal handlers."""
    args, found = quick(script), []
    mode = torch.get_deterministic_debug_mode()
    threads = [threading.Thread(target=lambda: found.append(script.train(args))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_deterministic_debug_mode(mode)  # one run may have put back the other's
    assert sorted(found) == sorted(Path(args.run_dir).glob(f"{args.exp_name}__*")) and len(set(found)) == 2
    for folder in found:
        assert_complete(folder, [3, 4])


@ALL
def test_paths(script, tiny, tiny_mnist, tmp_path, monkeypatch):
    """Of pathlib, for every option that is one; ~ is the home; and what train returns can be resumed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = script.train(tiny(script, data_dir=Path(tiny_mnist), run_dir=Path("~/a/b"), num_steps=2))
    assert isinstance(folder, Path) and folder.parent == tmp_path / "a" / "b"
    assert again(script, folder, num_steps=3) == folder
    assert results(folder)["args"]["run_dir"] == str(tmp_path / "a" / "b")
    short = "~/" + str(folder.relative_to(tmp_path))
    assert script.load_checkpoint(short)["script"] == script.SCRIPT
    assert script.Args(resume=short).resume == str(folder) == script.parse_args(["--resume", short]).resume


# Weights & Biases


class FakeWandb(types.ModuleType):
    """Stands for the package: notes what it is asked for."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.rows, self.ends = [], [], []

    def init(self, **options):
        self.inits.append(options)
        run = types.SimpleNamespace(id=options["id"] or f"id{len(self.inits)}")
        run.log = lambda row, step: self.rows.append((step, row))
        run.finish = lambda exit_code: self.ends.append(exit_code)
        return run

    def Image(self, path):
        assert Path(path).is_file()
        return f"picture {Path(path).name}"

    def asked(self, name: str) -> list:
        """An option of all calls of init."""
        return [options[name] for options in self.inits]


@pytest.fixture
def wandb(monkeypatch):
    """A FakeWandb in the package's place, and none of its variables."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_ENTITY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def state_of_the_process() -> dict:
    """What a run could leave changed."""
    cudnn = torch.backends.cudnn
    return {
        "deterministic": torch.get_deterministic_debug_mode(),
        "cudnn": (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
    }


@ALL
def test_runs_that_end_fail_stop_and_go_on(script, quick, wandb, monkeypatch):
    """W&B hears of it; each leaves the process as it was, whatever sys.argv."""
    monkeypatch.setattr(sys, "argv", ["host", "--nonsense", "3"])
    torch.set_deterministic_debug_mode("default")
    torch.manual_seed(77)
    before, args = state_of_the_process(), quick(script, track=True)
    first = script.train(args)
    assert state_of_the_process() == before
    assert wandb.inits[0]["project"] == "minimal-gans" and wandb.inits[0]["config"] == vars(args)
    got = [{k: v for k, v in row.items() if k != "steps_per_second"} for _, row in wandb.rows]
    pictures = {"samples": "picture samples.png"}, {"components": "picture components.png"}
    assert [row for row in got if row not in pictures] == rows(first)
    assert [step for step, row in wandb.rows if row == pictures[0]] == [3, 4]
    broken(script, quick(script, track=True), monkeypatch)
    assert state_of_the_process() == before
    folder = stopped(script, quick(script, track=True), monkeypatch, 2, signal.SIGTERM)
    assert state_of_the_process() == before
    again(script, folder)  # which was tracked
    assert wandb.asked("id") == [None, None, None, "id3"] and wandb.inits[3]["resume"] == "allow"
    assert wandb.asked("name")[0] == first.name and wandb.asked("name")[2:] == [folder.name] * 2
    assert wandb.ends == [0, 1, 1, 0]  # W&B calls 1 failed


@each((baseline_cnn, mmd_gan))
def test_variables_of_wandb(script, quick, wandb, monkeypatch):
    """Win over the defaults, and not over what is given; a run that was not tracked can be from now on."""
    monkeypatch.setenv("WANDB_PROJECT", "of the shell")
    monkeypatch.setenv("WANDB_NAME", "a name")
    options = {"num_steps": 1, "num_eval_samples": 1}
    folder = script.train(quick(script, **options))
    again(script, folder, track=True, num_steps=2)
    assert wandb.asked("id") == [None] and load(folder)["progress"][2] == "id1"
    script.train(quick(script, **options, track=True, wandb_project_name="given", wandb_entity="us"))
    assert wandb.asked("project") == ["of the shell", "given"]
    assert wandb.asked("name") == ["a name"] * 2 and wandb.asked("entity") == [None, "us"]


def test_track_offline(run_cli, tmp_path):
    """The true package, once."""
    options = ["--dataset", "ring", "--num-steps", 3, "--batch-size", 8, "--num-eval-samples", 1]
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": None, "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    result = run_cli("--track", *options, "--device", "cpu", env=env, script="wgan_gp.py")
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("runs/wandb/offline-run-*/*.wandb"))) == 1
    assert load(next(tmp_path.glob("runs/wgan_gp__*")))["progress"][2]


# Options

WRONG = [
    (mmd_gan, {"eval_split": "val"}, "eval_split.*'test', 'validation'.*'val'"),
    (mmd_gan, {"loss": None}, "loss.*'repulsive', 'attractive'.*None"),
    (mmd_gan, {"seed": "3"}, "seed.*int.*'3'"),
    (mmd_gan, {"seed": -1}, "seed.*-1"),
    (mmd_gan, {"seed": np.int64(3)}, "seed.*int.*3"),
    (mmd_gan, {"num_steps": 3.0}, "num_steps.*int.*3.0"),
    (mmd_gan, {"num_steps": True}, "num_steps.*int.*True"),
    (mmd_gan, {"log_every": 0}, "log_every.*positive.*0"),
    (mmd_gan, {"torch_deterministic": 1}, "torch_deterministic.*bool.*1"),
    (mmd_gan, {"run_dir": 3}, "run_dir.*str.*3"),
    (mmd_gan, {"nonsense": 1}, "unknown options.*nonsense"),
    (mmd_gan, {"lr_generator": math.inf}, "lr_generator.*inf"),
    (mmd_gan, {"lr_critic": 0.0}, "lr_critic.*0.0"),
    (mmd_gan, {"lr_critic": math.nan}, "lr_critic.*nan"),
    (mmd_gan, {"bandwidths": ()}, r"bandwidths.*\(\)"),
    (mmd_gan, {"bandwidths": (1.0, -2.0)}, "bandwidths.*-2.0"),
    (mmd_gan, {"bandwidths": ("1",)}, "bandwidths.*'1'"),
    (mmd_gan, {"batch_size": 1}, "batch_size must be at least 2"),
    (wgan_gp, {"lipschitz": "clipping"}, "lipschitz.*'penalty', 'clip'.*'clipping'"),
    (sinkhorn_gan, {"batch_size": 9}, "even.*9"),
    (sinkhorn_gan, {"unroll": True, "loss": "minibatch-energy"}, "unroll"),
    (baseline_cnn, {"batch_size": 1}, "batch_size.*at least 2"),
    (sgan_mnist, {"batch_size": 3}, "batch_size.*at least 4"),
    (gmgan_mnist, {"component": (10,)}, "component must be of 0 to 9"),
    (cyclegan_mnist_usps, {"batch_size": 51}, "batch_size.*50"),
    (cyclegan_mnist_usps, {"input": "pictures"}, "--resume"),
    *((script, {"generate": 3}, "--resume") for script in (*DRAWING, cyclegan_mnist_usps)),
]


@pytest.mark.parametrize("script, options, message", WRONG, ids=[f"{s.SCRIPT}-{o}" for s, o, _ in WRONG])
def test_wrong_options(script, options, message):
    """A ValueError, the script's own, says which option it is and what it may be."""
    assert issubclass(script.UserError, ValueError)
    with pytest.raises(script.UserError, match=message):
        script.Args(**options)


@each(TOYS)
def test_presets(script):
    """A data set's preset is there from Python too, and gives way to what is given; an int may be a float."""
    preset = script.PRESETS["dataset"]["grid"]
    for args in (script.Args(dataset="grid"), script.parse_args(["--dataset", "grid"])):
        assert {name: getattr(args, name) for name in preset} == preset
    default = script.Args().batch_size
    assert preset["batch_size"] != default
    for args in (
        script.Args(dataset="grid", batch_size=default, **{RATE[script]: 1}),
        script.parse_args(["--dataset", "grid", "--batch-size", str(default), "--num-steps", "3"]),
    ):
        assert args.batch_size == default and type(getattr(args, RATE[script])) is float
        assert args.latent_dim == preset["latent_dim"]


@each((baseline_cnn, wgan_gp))
def test_what_is_typed_wins_over_the_run(script, quick):
    """Also where it is the class's default."""
    folder = str(script.train(quick(script, num_eval_samples=1)))
    args = script.parse_args(["--resume", folder, "--num-steps", "7"])
    assert (args.num_steps, args.batch_size, args.eval_every, args.log_every) == (7, 8, 3, 1)
    default = script.Args.batch_size
    for args in (
        script.parse_args(["--batch-size", str(default), "--resume", folder]),
        script.Args(resume=folder, batch_size=default),
    ):
        assert (args.num_steps, args.batch_size, args.eval_every) == (4, default, 3)
    assert script.parse_args(["--resume", folder]) == script.Args(resume=folder)
    assert script.parse_args(["--resume", folder, "--no-torch-deterministic"]).torch_deterministic is False


@each((baseline_cnn, sgan_mnist))
def test_the_command_draws_the_labels_of_its_seed(script, monkeypatch):
    """What follows from other options is not fixed by the defaults that the command line is read with."""
    drawn = []

    def stop(labels, num_labels, label_seed):
        drawn.append(label_seed)
        raise script.UserError("enough")

    monkeypatch.setattr(script, "split_labels", stop)
    for options in (["--seed", "3"], ["--seed", "3", "--label-seed", "5"]):
        args = script.parse_args([*options, "--dataset", "digits"])
        assert args.seed == 3 and args == script.Args(seed=3, label_seed=args.label_seed, dataset="digits")
        with pytest.raises(script.UserError, match="enough"):
            script.train(args)
    assert drawn == [3, 5]


@each((wgan_gp, sgan_mnist))
def test_options_that_do_not_fit_the_run(script, quick):
    """Another network than that of the checkpoint is refused by torch, and nothing is changed."""
    folder = script.train(quick(script, num_eval_samples=1))
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(RuntimeError, match="size mismatch"):
        again(script, folder, latent_dim=9, num_steps=6)
    assert (folder / "checkpoint.pt").read_bytes() == before


# Data of one's own


@each(IMAGES)
def test_images_of_ones_own(script, tiny, tmp_path):
    """Of which half of the classes is absent; where labels are learned, none of ten may be."""
    options = {"data_dir": tmp_path, "run_dir": tmp_path / "runs"}
    write_bars(tmp_path / "MNIST", 50, 30, classes=5)
    if script not in MEASURED:
        with pytest.raises(script.UserError, match=r"num_labels.*up to 0"):
            script.train(tiny(script, **options))
        write_bars(tmp_path / "MNIST", 50, 30)
    folder = script.train(tiny(script, **options))
    assert_complete(folder, [3, 4])
    if script in MEASURED:
        assert len(results(folder)["class_shares"]) == 10 and results(folder)["real"]["fid"] is not None


@each(MEASURED)
@pytest.mark.parametrize("count", [1, 3])
def test_very_few_samples(script, count, tiny):
    """Numbers, or null where there is none; never NaN in a JSON file."""
    folder = script.train(tiny(script, num_eval_samples=count))
    assert_complete(folder, [3, 4])
    found = results(folder)
    assert (found["fid"] is None) == (count == 1) == (found["real"]["fid"] is None)
    assert found["precision"] is found["recall"] is None
    assert sum(found["class_shares"]) == pytest.approx(1)


def test_fewer_than_ten_images_to_compare_with(tiny, tmp_path):
    write_bars(tmp_path / "MNIST", 30, 4, classes=3)
    folder = mmd_gan.train(tiny(mmd_gan, data_dir=tmp_path, run_dir=tmp_path / "runs"))
    assert_complete(folder, [3, 4])
    assert all(math.isfinite(results(folder)[name]) for name in ("fid", "precision", "recall"))


@each((mmd_gan, cyclegan_mnist_usps))
def test_images_of_another_size(script, tiny, tmp_path):
    """Are refused, with the size that is needed, and nobody is told to throw files away."""
    write_bars(tmp_path / "MNIST", 20, 10, size=32)
    with pytest.raises(script.UserError, match=r"28.*32") as error:
        script.train(tiny(script, data_dir=tmp_path, run_dir=tmp_path / "runs"))
    assert "delete" not in str(error.value) and not (tmp_path / "runs").exists()


# Files, numbers, devices


def test_a_file_that_is_open_elsewhere(quick, monkeypatch, capsys):
    """A warning; the new one is kept beside it, and the run goes on."""
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "samples.png":
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    folder = wgan_gp.train(quick(wgan_gp))
    assert "samples.png is open elsewhere" in capsys.readouterr().out
    assert results(folder)["steps"] == 4 and not (folder / "samples.png").exists()
    (beside,) = folder.glob("samples.*.png")
    assert beside.read_bytes() == (folder / "samples_000004.png").read_bytes()


@ALL
def test_numbers_that_are_not_finite(script, tiny):
    """End the run, and the last finite checkpoint stays, whether loss or weights were seen first."""
    folder = script.train(tiny(script, num_steps=2, num_eval_samples=0))
    before = (folder / "checkpoint.pt").read_bytes()
    for log_every, eval_every, rate in ((100, 1, 1e39), (100, 100, 1e38), (1, 100, 1e38)):
        options = {"num_steps": 9, "log_every": log_every, "eval_every": eval_every, RATE[script]: rate}
        with pytest.raises(script.UserError, match=r"not finite.*learning.rate"):
            again(script, folder, **options)
        assert log_every == 1 or (folder / "checkpoint.pt").read_bytes() == before
        name = "teacher" if script is sgan_mnist else "averaged"
        assert all(v.isfinite().all() for v in load(folder)[name].values())
    assert steps(folder)


@ALL
def test_a_device_that_is_not_there(script, quick, tmp_path):
    """Is torch's own error, before there is a run folder."""
    with pytest.raises((RuntimeError, AssertionError)):
        script.train(quick(script, device="cuda:77", run_dir=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


# Commands


def one_line(result, *texts: str) -> None:
    """A command that ended with exit code 2 and said why in one line."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(text in lines[0] for text in texts), lines[0]


@each((mmd_gan, cyclegan_mnist_usps))
def test_no_data_and_no_network(script, run_cli, tmp_path):
    one_line(run_cli("--device", "cpu", env=UNREACHABLE, script=f"{script.SCRIPT}.py"), "mnist in data")
    assert not (tmp_path / "runs").exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoints_that_cannot_be_used(tmp_path, run_cli):
    """Missing, damaged, of something else or of another script; and nothing in one is run."""
    path = tmp_path / "run" / "checkpoint.pt"
    for run, message in ((tmp_path / "run", r"checkpoint\.pt"), (7, "7")):
        with pytest.raises(mmd_gan.UserError, match=message):
            mmd_gan.Args(resume=run)
    one_line(run_cli("--resume", "run"), "checkpoint.pt")
    path.parent.mkdir()
    for content, message in (
        ({"weight": torch.ones(2)}, "checkpoint"),
        ([1, 2], "checkpoint"),
        ({"script": "wgan_gp", "args": {}}, "wgan_gp.py, not mmd_gan.py"),
        (Evil(tmp_path / "evil"), "checkpoint"),
    ):
        torch.save(content, path)
        with pytest.raises(mmd_gan.UserError, match=message):
            mmd_gan.load_checkpoint(path.parent)
    path.write_bytes(path.read_bytes()[:100])
    one_line(run_cli("--resume", "run", "--num-steps", 3), "checkpoint.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "options, texts",
    [
        (["--dataset", "cifar"], ["cifar", "mnist"]),
        (["--batch-size", "0"], ["batch", "0"]),
        (["--generate", "3"], ["--resume"]),
        (["--nonsense", "3"], ["--nonsense"]),
    ],
    ids=["dataset", "batch", "generate", "unknown"],
)
def test_bad_options_of_the_command(options, texts, run_cli, tmp_path):
    result = run_cli(*options, "--device", "cpu")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert all(text in result.stderr for text in texts), result.stderr
    assert not (tmp_path / "runs").exists()
