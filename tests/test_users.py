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
    assert_complete,
    each,
    load,
    results,
    rows,
    short_classifiers,  # noqa: F401, a fixture
    signal_at,
    small_args,
)

import baseline_cnn
import cyclegan_mnist_usps
import gmgan_mnist
import mmd_gan
import sgan_mnist
import sinkhorn_gan
import wgan_gp

RATE = dict.fromkeys(SCRIPTS.values(), "learning_rate")
RATE |= dict.fromkeys((mmd_gan, sinkhorn_gan), "lr_generator") | {sgan_mnist: "lr_classifier"}
DATASETS = dict.fromkeys(SCRIPTS.values(), "mnist") | {cyclegan_mnist_usps: "mnist-usps"}
IMAGES = [script for script in SCRIPTS.values() if script is not cyclegan_mnist_usps]  # of one data set
UNREACHABLE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "all_proxy")}
UNREACHABLE |= {name.upper(): value for name, value in UNREACHABLE.items()}
UNREACHABLE |= {"no_proxy": None, "NO_PROXY": None}


@pytest.fixture
def tiny(runs, tiny_mnist, run_name):
    """tiny(script, **options): Args of a small run, on the ring if there is one, with a name of its own."""

    def make(script, **options):
        fixed = {"run_dir": runs, "data_dir": tiny_mnist, "exp_name": run_name()}
        fixed |= {"dataset": "ring" if script in TOYS else DATASETS[script]}
        if not hasattr(script.Args, "num_eval_samples"):
            options.pop("num_eval_samples", None)
        return small_args(script, fixed | options)

    return make


# From Python


@ALL
def test_train_in_another_thread(script, tiny):
    """Where no signal handler can be set; whatever the host's command line is."""
    done = []
    thread = threading.Thread(target=lambda: done.append(script.train(tiny(script))))
    thread.start()
    thread.join()
    assert_complete(done[0], [3, 4])


@each((baseline_cnn, mmd_gan))
def test_three_runs_that_start_together(script, tiny):
    """Have folders of their own, under one name."""
    args, found = tiny(script, num_eval_samples=1), []
    threads = [threading.Thread(target=lambda: found.append(script.train(args))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted(Path(args.run_dir).glob(f"{args.exp_name}__*")) and len(set(found)) == 3
    for folder in found:
        assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]


@ALL
def test_paths(script, tiny, tiny_mnist, tmp_path, monkeypatch):
    """Of pathlib, for every option that is one; ~ is the home; and what train returns can be resumed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    paths = {"data_dir": Path(tiny_mnist), "run_dir": Path("~/a/b")}
    folder = script.train(tiny(script, dataset=DATASETS[script], **paths, num_steps=2))
    assert isinstance(folder, Path) and folder.parent == tmp_path / "a" / "b"
    assert script.train(script.Args(resume=folder, num_steps=3)) == folder
    assert results(folder)["args"]["run_dir"] == str(tmp_path / "a" / "b")
    short = "~/" + str(folder.relative_to(tmp_path))
    assert script.load_checkpoint(short)["script"] == script.SCRIPT
    assert script.Args(resume=short).resume == str(folder) == script.parse_args(["--resume", short]).resume


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
def test_the_process_is_left_as_it_was(script, tiny, monkeypatch):
    """By a run that ends, one that raises and one that is stopped, whatever sys.argv."""
    monkeypatch.setattr(sys, "argv", ["host", "--nonsense", "3"])
    torch.set_deterministic_debug_mode("default")
    torch.manual_seed(77)
    args, before = tiny(script, num_eval_samples=0), state_of_the_process()
    script.train(args)
    assert state_of_the_process() == before
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lights"):
        patch.setattr(torch.optim.Adam, "step", fail)
        script.train(args)
    assert state_of_the_process() == before
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_at(patch, 2, signal.SIGTERM)
        script.train(args)
    assert state_of_the_process() == before


def fail(*args, **options):
    """Stands for an error of torch."""
    raise RuntimeError("the lights went out")


# Options

WRONG = [
    (mmd_gan, {"eval_split": "val"}, "eval_split.*'test', 'validation'.*'val'"),
    (mmd_gan, {"dataset": "cifar"}, "dataset.*'mnist.*'cifar'"),
    (mmd_gan, {"encoder": "Learned"}, "encoder.*'learned', 'none'.*'Learned'"),
    (mmd_gan, {"loss": None}, "loss.*'repulsive', 'attractive'.*None"),
    (mmd_gan, {"seed": "3"}, "seed.*int.*'3'"),
    (mmd_gan, {"seed": -1}, "seed.*-1"),
    (mmd_gan, {"seed": np.int64(3)}, "seed.*int.*3"),
    (mmd_gan, {"num_steps": 3.0}, "num_steps.*int.*3.0"),
    (mmd_gan, {"num_steps": True}, "num_steps.*int.*True"),
    (mmd_gan, {"log_every": 0}, "log_every.*positive.*0"),
    (mmd_gan, {"log_every": None}, "log_every.*None"),
    (mmd_gan, {"torch_deterministic": 1}, "torch_deterministic.*bool.*1"),
    (mmd_gan, {"run_dir": 3}, "run_dir.*str.*3"),
    (mmd_gan, {"nonsense": 1}, "no options.*nonsense"),
    (mmd_gan, {"lr_generator": math.inf}, "lr_generator.*inf"),
    (mmd_gan, {"lr_critic": 0.0}, "lr_critic.*0.0"),
    (mmd_gan, {"lr_critic": math.nan}, "lr_critic.*nan"),
    (mmd_gan, {"bandwidths": ()}, r"bandwidths.*\(\)"),
    (mmd_gan, {"bandwidths": (1.0, -2.0)}, "bandwidths.*-2.0"),
    (mmd_gan, {"bandwidths": ("1",)}, "bandwidths.*'1'"),
    (mmd_gan, {"batch_size": 1}, "batch_size must be at least 2"),
    (wgan_gp, {"lipschitz": "clipping"}, "lipschitz.*'penalty', 'clip'.*'clipping'"),
    (wgan_gp, {"critic_steps": 1.5}, "critic_steps.*int.*1.5"),
    (sinkhorn_gan, {"batch_size": 9}, "even.*9"),
    (sinkhorn_gan, {"unroll": True, "loss": "minibatch-energy"}, "unroll"),
    (baseline_cnn, {"batch_size": 1}, "batch_size.*at least 2"),
    (sgan_mnist, {"num_labels": 0}, "num_labels.*positive.*0"),
    (gmgan_mnist, {"component": 3}, "component.*tuple.*3"),
    (gmgan_mnist, {"component": (10,)}, "component must be of 0 to 9"),
    (cyclegan_mnist_usps, {"semantic_consistency": "both"}, "semantic_consistency.*'none', 'mnist', 'usps'"),
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
def test_what_is_typed_wins_over_the_run(script, tiny):
    """Also where it is the class's default."""
    folder = str(script.train(tiny(script, num_eval_samples=1)))
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
def test_options_that_do_not_fit_the_run(script, tiny):
    """Another network than that of the checkpoint is refused by torch, and nothing is changed."""
    folder = script.train(tiny(script, num_eval_samples=1))
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(RuntimeError, match="size mismatch"):
        script.train(script.Args(resume=folder, latent_dim=9, num_steps=6))
    assert (folder / "checkpoint.pt").read_bytes() == before


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


@pytest.fixture
def wandb(monkeypatch):
    """A FakeWandb in the package's place, and none of its variables."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_ENTITY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@ALL
def test_tracked_runs(script, tiny, wandb, monkeypatch):
    """One that ends well, one that fails, one that is stopped, one that goes on."""
    args = tiny(script, track=True)
    first = script.train(args)
    assert wandb.inits[0]["id"] is None and wandb.inits[0]["name"] == first.name
    assert wandb.inits[0]["project"] == "minimal-gans" and wandb.inits[0]["config"] == vars(args)
    got = [{k: v for k, v in row.items() if k != "steps_per_second"} for _, row in wandb.rows]
    pictures = {"samples": "picture samples.png"}, {"components": "picture components.png"}
    assert [row for row in got if row not in pictures] == rows(first)
    assert [step for step, row in wandb.rows if row == pictures[0]] == [3, 4]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lights"):
        patch.setattr(torch.optim.Adam, "step", fail)
        script.train(tiny(script, track=True))
    args = tiny(script, track=True, num_eval_samples=0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_at(patch, 2, signal.SIGINT)
        script.train(args)
    assert [options["id"] for options in wandb.inits] == [None] * 3
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    script.train(script.Args(resume=folder))  # which was tracked
    assert wandb.inits[3]["id"] == "id3" and wandb.inits[3]["resume"] == "allow"
    assert wandb.inits[3]["name"] == folder.name
    with pytest.raises(script.UserError, match="not finite"):
        script.train(tiny(script, track=True, num_steps=6, **{RATE[script]: 1e38}))
    assert wandb.ends == [0, 1, 1, 0, 1]  # W&B calls 1 failed


@each((baseline_cnn, mmd_gan))
def test_variables_of_wandb(script, tiny, wandb, monkeypatch):
    """Win over the defaults, and not over what is given; a run that was not tracked can be from now on."""
    monkeypatch.setenv("WANDB_PROJECT", "of the shell")
    monkeypatch.setenv("WANDB_NAME", "a name")
    options = {"num_steps": 1, "num_eval_samples": 1}
    folder = script.train(tiny(script, **options))
    script.train(script.Args(resume=folder, track=True, num_steps=2))
    assert wandb.inits[0]["id"] is None and load(folder)["progress"][2] == "id1"
    script.train(tiny(script, **options, track=True, wandb_project_name="given", wandb_entity="us"))
    assert [o["project"] for o in wandb.inits] == ["of the shell", "given"]
    assert [o["name"] for o in wandb.inits] == ["a name"] * 2
    assert [o["entity"] for o in wandb.inits] == [None, "us"]


def test_track_offline(run_cli, tmp_path):
    """The true package, once."""
    options = ["--dataset", "ring", "--num-steps", 3, "--batch-size", 8, "--num-eval-samples", 1]
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": None, "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    result = run_cli("--track", *options, "--device", "cpu", env=env, script="wgan_gp.py")
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("runs/wandb/offline-run-*/*.wandb"))) == 1
    assert load(next(tmp_path.glob("runs/wgan_gp__*")))["progress"][2]


# Data of one's own


@each(IMAGES)
def test_images_of_ones_own(script, tiny, tmp_path):
    """Of which half of the classes is absent; where labels are learned, none of ten may be."""
    labelled = script in (baseline_cnn, sgan_mnist)
    data = write_bars(tmp_path / "MNIST", 50, 30, classes=10 if labelled else 5)
    folder = script.train(tiny(script, dataset="mnist", data_dir=tmp_path, run_dir=tmp_path / "runs"))
    assert_complete(folder, [3, 4])
    if script in MEASURED:
        assert len(results(folder)["class_shares"]) == 10 and results(folder)["real"]["fid"] is not None
    else:
        write_bars(data, 50, 30, classes=5)
        with pytest.raises(script.UserError, match=r"num_labels.*up to 0"):
            script.train(tiny(script, dataset="mnist", data_dir=tmp_path, run_dir=tmp_path / "none"))


@each(MEASURED)
@pytest.mark.parametrize("count", [1, 3])
def test_very_few_samples(script, count, tiny):
    """Numbers, or null where there is none; never NaN in a JSON file."""
    folder = script.train(tiny(script, dataset="mnist", num_eval_samples=count))
    assert_complete(folder, [3, 4])
    found = results(folder)
    assert (found["fid"] is None) == (count == 1) == (found["real"]["fid"] is None)
    assert found["precision"] is found["recall"] is None
    assert sum(found["class_shares"]) == pytest.approx(1)


def test_fewer_than_ten_images_to_compare_with(tiny, tmp_path):
    write_bars(tmp_path / "MNIST", 30, 4, classes=3)
    folder = mmd_gan.train(tiny(mmd_gan, dataset="mnist", data_dir=tmp_path, run_dir=tmp_path / "runs"))
    assert_complete(folder, [3, 4])
    assert all(math.isfinite(results(folder)[name]) for name in ("fid", "precision", "recall"))


@each((mmd_gan, cyclegan_mnist_usps))
def test_images_of_another_size(script, tiny, tmp_path):
    """Are refused, with the size that is needed, and nobody is told to throw files away."""
    write_bars(tmp_path / "MNIST", 20, 10, size=32)
    with pytest.raises(script.UserError, match="28") as error:
        script.train(tiny(script, dataset=DATASETS[script], data_dir=tmp_path, run_dir=tmp_path / "runs"))
    assert "32" in str(error.value) and "delete" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_metrics_of_almost_nothing():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert mmd_gan.frechet_distance(x[:1], x) is mmd_gan.frechet_distance(x, x[:1]) is None
    assert mmd_gan.frechet_distance(x * math.nan, x) is None
    assert mmd_gan.frechet_distance(x[:2], x[2:4]) >= 0
    for few in (x[:1], x[:3]):
        assert [*mmd_gan.precision_recall(few, x)] == [None, None] == [*mmd_gan.precision_recall(x, few)]
    assert [*mmd_gan.precision_recall(x[:4], x[:4])] == [1, 1]


# Files


def test_a_file_that_is_open_elsewhere(tiny, monkeypatch, capsys):
    """A warning; the new one is kept beside it, and the run goes on."""
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "samples.png":
            raise PermissionError("in use")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    folder = wgan_gp.train(tiny(wgan_gp))
    assert "samples.png is open elsewhere" in capsys.readouterr().out
    assert results(folder)["steps"] == 4 and not (folder / "samples.png").exists()
    (beside,) = (p for p in folder.glob("samples*.png") if p.name[7:8] == ".")
    assert beside.read_bytes() == (folder / "samples_000004.png").read_bytes()


def test_replace_file(tmp_path):
    """What is half written is not there; folders are made."""
    path = tmp_path / "a" / "b.txt"
    mmd_gan.replace_file(path, lambda p: p.write_text("one"))
    assert path.read_text() == "one"

    def half(p):
        p.write_text("tw")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        mmd_gan.replace_file(path, half)
    assert path.read_text() == "one"


@ALL
def test_numbers_that_are_not_finite(script, tiny):
    """End the run, and the last finite checkpoint stays, whether loss or weights were seen first."""
    folder = script.train(tiny(script, dataset=DATASETS[script], num_steps=2, num_eval_samples=0))
    before = (folder / "checkpoint.pt").read_bytes()
    for log_every, eval_every, rate in ((100, 1, 1e39), (100, 100, 1e38), (1, 100, 1e38)):
        with pytest.raises(script.UserError, match=r"not finite.*learning.rate"):
            options = {"num_steps": 9, "log_every": log_every, "eval_every": eval_every, RATE[script]: rate}
            script.train(script.Args(resume=folder, **options))
        assert log_every == 1 or (folder / "checkpoint.pt").read_bytes() == before
        name = "teacher" if script is sgan_mnist else "averaged"
        assert all(v.isfinite().all() for v in load(folder)[name].values())
    rows(folder)


@ALL
def test_a_device_that_is_not_there(script, tiny, tmp_path):
    """Is torch's own error, before there is a run folder."""
    with pytest.raises((RuntimeError, AssertionError)):
        script.train(tiny(script, device="cuda:77", run_dir=tmp_path / "runs"))
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
    result = run_cli("--device", "cpu", env=UNREACHABLE, script=f"{script.SCRIPT}.py")
    one_line(result, "mnist in data")
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
    with pytest.raises(mmd_gan.UserError, match=r"checkpoint\.pt"):
        mmd_gan.Args(resume=tmp_path / "run")
    with pytest.raises(mmd_gan.UserError, match="7"):
        mmd_gan.Args(resume=7)
    one_line(run_cli("--resume", "run"), "checkpoint.pt")
    path.parent.mkdir()
    for content, message in (
        ({"weight": torch.ones(2)}, "checkpoint"),
        ([1, 2], "checkpoint"),
        ({"script": "wgan_gp", "args": {}}, "wgan_gp.py, not of mmd_gan.py"),
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
