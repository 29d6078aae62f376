"""What users do with the scripts: as a library, as commands, and by mistake.

What all scripts have in common, to the letter (tests/test_scripts.py), is tested with one or two of them.
"""

import math
import os
import signal
import sys
import threading
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ALL, DRAWING, MEASURED, SCRIPTS, TOYS, each, write_bars
from test_gans import again, assert_complete, load, results, rows, steps, stopped

import baseline_cnn
import cyclegan_mnist_usps
import gmgan_mnist
import mmd_gan
import sgan_mnist
import sinkhorn_gan
import wgan_gp

RATE = dict.fromkeys(SCRIPTS, "learning_rate")
RATE |= {mmd_gan: "lr_generator", sinkhorn_gan: "lr_generator", sgan_mnist: "lr_classifier"}
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
UNREACHABLE = dict.fromkeys(PROXIES, "http://127.0.0.1:9") | {"no_proxy": None, "NO_PROXY": None}


@pytest.fixture
def quick(tiny):
    """quick(script, **options): Args of a small run, on the ring if there is one."""
    return lambda script, **options: tiny(script, **({"dataset": "ring"} if script in TOYS else {}) | options)


@each((baseline_cnn, cyclegan_mnist_usps, mmd_gan))
def test_two_threads(script, quick):
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


@each((baseline_cnn, cyclegan_mnist_usps, mmd_gan))
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


@pytest.fixture
def wandb(monkeypatch):
    """Stands for the package, and notes what it is asked for; none of its variables is set."""
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_ENTITY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    fake = MagicMock()
    fake.init.return_value.id = "an id"
    fake.init.return_value.finish.return_value = None
    fake.Image = lambda path: Path(path).resolve(strict=True).name
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def asked(wandb, name: str) -> list:
    """An option of all calls of init."""
    return [call.kwargs[name] for call in wandb.init.call_args_list]


def state_of_the_process() -> list:
    """What a run could leave changed."""
    cudnn = torch.backends.cudnn
    modes = torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    random = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    defaults = torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()
    return [modes, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, handlers, random, defaults]


@ALL
def test_runs_that_end_fail_stop_and_go_on(script, quick, wandb, monkeypatch):
    """W&B hears of it; each leaves the process as it was, whatever sys.argv."""
    monkeypatch.setattr(sys, "argv", ["host", "--nonsense", "3"])
    torch.set_deterministic_debug_mode("default")
    torch.manual_seed(77)
    before, args = state_of_the_process(), quick(script, track=True)
    first = script.train(args)
    assert state_of_the_process() == before
    assert asked(wandb, "project") == ["minimal-gans"] and asked(wandb, "config") == [vars(args)]
    logged = [(call.args[0], call.kwargs["step"]) for call in wandb.init.return_value.log.call_args_list]
    assert [step for row, step in logged if row == {"samples": "samples.png"}] == [3, 4]
    lines = [row for row, step in logged if row.get("step") == step]
    assert [{k: v for k, v in row.items() if k != "steps_per_second"} for row in lines] == rows(first)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="lights"):
        patch.setattr(torch.optim.Adam, "step", MagicMock(side_effect=RuntimeError("the lights went out")))
        script.train(quick(script, track=True))
    assert state_of_the_process() == before
    folder = stopped(script, quick(script, track=True), monkeypatch, 2, signal.SIGTERM)
    assert state_of_the_process() == before
    again(script, folder)  # which was tracked
    assert asked(wandb, "id") == [None, None, None, "an id"] and asked(wandb, "resume")[3] == "allow"
    assert asked(wandb, "name")[0] == first.name and asked(wandb, "name")[2:] == [folder.name] * 2
    ends = [call.kwargs["exit_code"] for call in wandb.init.return_value.finish.call_args_list]
    assert ends == [0, 1, 1, 0]  # W&B calls 1 failed


@each((baseline_cnn, mmd_gan))
def test_variables_of_wandb(script, quick, wandb, monkeypatch):
    """Win over the defaults, and not over what is given; a run that was not tracked can be from now on."""
    monkeypatch.setenv("WANDB_PROJECT", "of the shell")
    monkeypatch.setenv("WANDB_NAME", "a name")
    again(script, script.train(quick(script, num_steps=1)), track=True, num_steps=2)
    script.train(quick(script, track=True, wandb_project_name="given", wandb_entity="us"))
    assert asked(wandb, "id") == [None, None]
    assert asked(wandb, "project") == ["of the shell", "given"]
    assert asked(wandb, "name") == ["a name"] * 2 and asked(wandb, "entity") == [None, "us"]


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
    (mmd_gan, {"eval_split": "val"}, "^eval_split = 'val': .*'test' or 'validation'$"),
    *((script, {"dataset": ["ring"]}, r"^dataset = \['ring'\]: ") for script in SCRIPTS),
    (mmd_gan, {"seed": "3"}, "^seed = '3': .*integer$"),
    (mmd_gan, {"num_steps": True}, "^num_steps = True: .*integer$"),
    (mmd_gan, {"log_every": 0}, "^log_every = 0: .*greater than 0$"),
    (mmd_gan, {"run_dir": 3, "seed": -1}, "^seed = -1: .*; run_dir = 3: .*string$"),
    (mmd_gan, {"nonsense": 1}, "^nonsense = 1: .*not permitted$"),
    (mmd_gan, {"lr_generator": math.inf}, "lr_generator.*inf"),
    (mmd_gan, {"lr_critic": math.nan}, "lr_critic.*nan"),
    (mmd_gan, {"bandwidths": ()}, r"bandwidths.*\(\)"),
    (mmd_gan, {"bandwidths": (1.0, -2.0)}, "bandwidths.*-2.0"),
    (mmd_gan, {"bandwidths": ("1",)}, "bandwidths.*'1'"),
    (mmd_gan, {"batch_size": 1}, "batch_size = 1: .*2"),
    (sinkhorn_gan, {"batch_size": 9}, "batch_size = 9: .*multiple of 2"),
    (sinkhorn_gan, {"unroll": True, "loss": "minibatch-energy"}, "unroll"),
    (baseline_cnn, {"batch_size": 1}, "batch_size = 1: .*2"),
    (sgan_mnist, {"batch_size": 3}, "batch_size = 3: .*4"),
    (gmgan_mnist, {"component": (10,)}, "component must be of 0 to 9"),
    (cyclegan_mnist_usps, {"batch_size": 51}, "batch_size.*50"),
    (cyclegan_mnist_usps, {"input": "pictures"}, "--resume"),
    *((script, {"generate": 3}, "--resume") for script in (*DRAWING, cyclegan_mnist_usps)),
]


@each(WRONG, "script, options, message")
def test_wrong_options(script, options, message):
    """A ValueError, the script's own, says which option it is and what it may be."""
    assert issubclass(script.UserError, ValueError)
    with pytest.raises(script.UserError, match=message):
        script.Args(**options)


@each(TOYS)
def test_presets(script):
    """A data set's preset is there from Python too, and gives way to what is given; an int may be a float."""
    preset, default = script.PRESETS["grid"], script.Args().batch_size
    for args in (script.Args(dataset="grid"), script.parse_args(["--dataset", "grid"])):
        assert preset.items() <= vars(args).items()
    typed = ["--dataset", "grid", "--batch-size", str(default)]
    for args in (script.Args(dataset="grid", batch_size=default), script.parse_args(typed)):
        assert args.batch_size == default != preset["batch_size"]
        assert args.latent_dim == preset["latent_dim"]
    assert type(getattr(script.Args(**{RATE[script]: 1}), RATE[script])) is float


@each((baseline_cnn, wgan_gp))
def test_what_is_typed_wins_over_the_run(script, quick):
    """Also where it is the class's default."""
    folder = str(script.train(quick(script)))
    args = script.parse_args(["--resume", folder, "--num-steps", "7"])
    assert (args.num_steps, args.batch_size, args.eval_every, args.log_every) == (7, 8, 3, 1)
    default = script.Args().batch_size
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
    drawn = MagicMock(side_effect=script.UserError("enough"))
    monkeypatch.setattr(script, "split_labels", drawn)
    for options in ([], ["--label-seed", "5"]):
        args = script.parse_args(["--seed", "3", "--dataset", "digits", *options])
        assert args == script.Args(seed=3, label_seed=args.label_seed, dataset="digits")
        with pytest.raises(script.UserError, match="enough"):
            script.train(args)
    assert [call.args[2] for call in drawn.call_args_list] == [3, 5]


# Data of one's own, files, numbers, devices, commands


@each([script for script in SCRIPTS if script is not cyclegan_mnist_usps])
def test_images_of_ones_own(script, tiny, tmp_path):
    """Few, of which half of the classes is absent; where labels are learned, none of ten may be."""
    options = {"data_dir": tmp_path, "run_dir": tmp_path / "runs"}
    write_bars(tmp_path / "MNIST", 50, 4, classes=5)
    if script not in MEASURED:
        with pytest.raises(script.UserError, match=r"num_labels.*up to 0"):
            script.train(tiny(script, **options))
        write_bars(tmp_path / "MNIST", 50, 4)
    folder = script.train(tiny(script, **options))
    assert_complete(folder, [3, 4])
    if script in MEASURED:
        assert len(results(folder)["class_shares"]) == 10
        assert all(math.isfinite(results(folder)["real"][name]) for name in ("fid", "precision", "recall"))


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


@each((mmd_gan, cyclegan_mnist_usps))
def test_images_of_another_size(script, tiny, tmp_path):
    """Are refused, with the size that is needed, and nobody is told to throw files away."""
    write_bars(tmp_path / "MNIST", 20, 10, size=32)
    with pytest.raises(script.UserError, match=r"28.*32") as error:
        script.train(tiny(script, data_dir=tmp_path, run_dir=tmp_path / "runs"))
    assert "delete" not in str(error.value) and not (tmp_path / "runs").exists()


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
    folder = script.train(tiny(script, num_steps=2))
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


def one_line(result, text: str) -> None:
    """A command that ended with exit code 2 and said why in one line."""
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.strip())
    assert text in line


@each((mmd_gan, cyclegan_mnist_usps))
def test_no_data_and_no_network(script, run_cli, tmp_path):
    one_line(run_cli("--device", "cpu", env=UNREACHABLE, script=f"{script.SCRIPT}.py"), "mnist in data")
    assert not (tmp_path / "runs").exists()


def test_checkpoints_that_cannot_be_used(tmp_path, run_cli):
    """Missing, damaged, of something else or of another script; and nothing in one is run."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    path = tmp_path / "run" / "checkpoint.pt"
    for run, message in ((tmp_path / "run", r"checkpoint\.pt"), (7, "7")):
        with pytest.raises(mmd_gan.UserError, match=message):
            mmd_gan.Args(resume=run)
    one_line(run_cli("--resume", "run"), "checkpoint.pt")
    path.parent.mkdir()
    for content, message in (
        ({"weight": torch.ones(2)}, "checkpoint"),
        ({"script": "wgan_gp", "args": {}}, "wgan_gp.py, not mmd_gan.py"),
        (Evil(), "checkpoint"),
    ):
        torch.save(content, path)
        with pytest.raises(mmd_gan.UserError, match=message):
            mmd_gan.load_checkpoint(path.parent)
    path.write_bytes(path.read_bytes()[:100])
    one_line(run_cli("--resume", "run", "--num-steps", 3), "checkpoint.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "options, text", [("dataset cifar", "kmnist"), ("generate 3", "--resume"), ("odd 3", "--odd")]
)
def test_bad_options_of_the_command(options, text, run_cli, tmp_path):
    """The error names what is wrong."""
    result = run_cli(*f"--{options} --device cpu".split())
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert text in result.stderr and not (tmp_path / "runs").exists()
