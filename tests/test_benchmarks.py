"""benchmarks/losses.py: its forms compute the same; accuracy.py: its figure; both refuse bad options."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT

spec = importlib.util.spec_from_file_location("losses", ROOT / "benchmarks" / "losses.py")
losses = sys.modules["losses"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(losses)


@pytest.mark.parametrize("form", losses.MMD)
def test_forms_of_mmd_agree(form):
    x, y = losses.points(40, 5, "cpu")
    errors = losses.relative_errors(losses.evaluate(form, x, y), losses.reference(x, y, block=16))
    assert max(errors) < 1e-4


@pytest.mark.parametrize("form", losses.SINKHORN)
def test_forms_of_the_sinkhorn_divergence_agree(form):
    """Each has a setting that is accurate enough, and what is called cheapest is."""
    pytest.importorskip(losses.NEEDS.get(form, "torch"))
    if form == "geomloss online":
        pytest.skip("compiles for a minute")
    x, y = losses.points(40, 16, "cpu")
    exact = losses.reference_divergence(x, y)
    setting = losses.cheapest(form, x, y, exact)
    assert isinstance(setting, tuple), setting
    errors = losses.relative_errors(losses.evaluate(form, x, y, *setting), exact)
    assert all(error <= limit for error, limit in zip(errors, losses.WITHIN))


def test_what_is_too_dear_is_left_out(monkeypatch):
    x, y = losses.points(40, 16, "cpu")
    exact = tuple(2 * v for v in losses.reference_divergence(x, y))  # out of reach
    assert losses.cheapest("autograd", x, y, exact) == "not reached"
    monkeypatch.setattr(losses, "LIMIT_S", 0)
    assert losses.cheapest("autograd", x, y, exact) == "over 0 s"
    monkeypatch.setattr(losses, "LIMIT_GB", 0)
    assert losses.cheapest("autograd", x, y, exact) == "over 0 GB"


def test_a_row_of_each_form(monkeypatch):
    """The cells of a table of one small size, without the processes that measure memory."""
    monkeypatch.setattr(losses, "extra_memory", lambda *args: 1.0)
    monkeypatch.setitem(losses.FORMS, "autograd", (losses.unrolled, "iterations", (500,)))
    args = losses.Args(repeats=1)
    for loss, forms in (("mmd", losses.MMD), ("sinkhorn", ["sinkhorn_divergence", "autograd"])):
        rows = losses.measure(loss, forms, 16, 8, args, torch.get_num_threads())
        assert [row[2] for row in rows] == forms and {len(row) for row in rows} == {len(losses.WIDTHS)}
        base = rows[0]
        assert base[6] == "1.0" and all(float(row[4]) > 0 for row in rows)


@pytest.mark.parametrize("options", [["--repeats", "0"], ["--loss", "wasserstein"]])
def test_bad_options(options, run_cli):
    result = run_cli(*options, script="benchmarks/losses.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr and options[0] in result.stderr


@pytest.fixture
def run_folder(tmp_path):
    """Makes run folders, with a line of training and a line for each of the evaluations."""

    def make(name, experiment, evaluations):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({"exp_name": experiment}))
        lines = [{"step": 1, "loss": 2.0}]
        lines += [{"step": 2, "loss": 1.0, "accuracy": a, "train_seconds": s} for s, a in evaluations]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def test_figure_of_errors_against_seconds(run_folder, run_cli, tmp_path):
    runs = [run_folder(f"a{i}", "sgan", [(10.0 + i, 0.9), (20.0, 0.98)]) for i in range(2)]
    runs.append(run_folder("b", "baseline", [(5.0, 0.8)]))
    result = run_cli(*runs, "--out", tmp_path / "out.png", script="benchmarks/accuracy.py")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "case, text",
    [("empty", "name at least one run"), ("other", "is not a run folder"), ("young", "no evaluation")],
)
def test_runs_without_a_figure(case, text, run_folder, run_cli, tmp_path):
    runs = {"empty": [], "other": [tmp_path], "young": [run_folder("young", "sgan", [])]}[case]
    result = run_cli(*runs, "--out", tmp_path / "out.png", script="benchmarks/accuracy.py")
    assert result.returncode == 2 and text in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out.png").exists()
