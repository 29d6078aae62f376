"""The benchmarks: forms of a loss compute the same, and each prints its table."""

import losses
import pytest
import torch
import training

import baseline_cnn
import wgan_gp


def cells(capsys) -> list[list[str]]:
    """The rows of the tables that were printed."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize("loss", ["mmd", "sinkhorn"])
def test_every_form_has_an_accurate_setting(loss, monkeypatch):
    """Within 1e-3 of the value and 1e-2 of the gradients of float64, or it would have a dash."""
    monkeypatch.setattr(losses, "LIMIT_S", 600)  # of a busy machine
    forms = losses.forms_of(loss, 0.05)
    lines = losses.compare(loss, *losses.points(40, 16), 1)
    assert len(lines) == len(forms) >= 2
    for line, name in zip(lines, forms):
        assert f"| {name} |" in line and "| - |" not in line
    assert "| 1.0 |" in lines[0]


def test_settle_says_no():
    x, y = losses.points(20, 4)
    form = losses.copied_mmd2
    exact = losses.evaluate(lambda x, y, _: 2 * form(x, y), 0, x, y)
    assert losses.settle(lambda x, y, _: form(x, y), (1, 2), x, y, exact) is None
    assert losses.settle(lambda x, y, factor: factor * form(x, y), (1, 2), x, y, exact) == 2


@pytest.mark.parametrize("loss", ["mmd", "sinkhorn"])
def test_tables_of_the_losses(loss, capsys, monkeypatch):
    monkeypatch.setattr(losses, "SIZES", {loss: [(32, 16)]})
    monkeypatch.setattr(losses, "SCALES", (1.0, 2.0))
    losses.main(loss, rounds=1, max_n=64)
    rows = cells(capsys)
    assert rows[0] == ["points", "form", "ms", "ratio", "setting"] and rows[2][0] == "32 x 16"
    assert len([row for row in rows if row[0].startswith("64 x 64")]) == (4 if loss == "sinkhorn" else 0)
    assert min(float(row[1]) for row in rows[-2:]) == 1


def test_a_table_of_training_speeds(tiny_mnist, capsys):
    """A row for each script, and the process as it was."""
    before = wgan_gp.tqdm, baseline_cnn.tqdm, torch.get_deterministic_debug_mode()
    training.main(data_dir=str(tiny_mnist), steps=2, rounds=1)
    table = cells(capsys)[2:]
    assert [row[0] for row in table] == ["baseline_cnn", "wgan_gp"]
    assert all(float(cell) > 0 for row in table for cell in row[1:4])
    assert before == (wgan_gp.tqdm, baseline_cnn.tqdm, torch.get_deterministic_debug_mode())


@pytest.mark.parametrize("script", ["losses", "training"])
def test_bad_options(script, run_cli):
    result = run_cli("--rounds", "many", script=f"benchmarks/{script}.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr and "rounds" in result.stderr
