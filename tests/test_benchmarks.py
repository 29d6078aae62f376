"""losses.py: its forms compute the same; training.py: its loops train, with the scripts' losses; accuracy.py:
its figure. All refuse bad options."""

import importlib.util
import json
import math
import signal
import sys

import pytest
import torch
from conftest import ROOT

import baseline_cnn
import gmgan_mnist
import mmd_gan
import sinkhorn_gan
import wgan_gp


def load(name):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


losses, training = load("losses"), load("training")


EAGER = [form for form in losses.MMD if form != losses.COMPILED]


@pytest.mark.parametrize("form", EAGER)
def test_forms_of_mmd_agree(form):
    x, y = losses.points(40, 5, "cpu")
    errors = losses.relative_errors(losses.evaluate(form, x, y), losses.reference(x, y, block=16))
    assert max(errors) < 1e-4


@pytest.mark.parametrize("form", [form for form in losses.SINKHORN if form not in losses.FLASH])
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


@pytest.mark.gpu
@pytest.mark.parametrize("form", [losses.COMPILED, *losses.FLASH])
def test_forms_on_cuda_agree(form):
    """What compiles for long or runs nowhere else."""
    pytest.importorskip(losses.NEEDS.get(form, "torch"))
    x, y = losses.points(64, 16, "cuda")
    exact = (losses.reference if form == losses.COMPILED else losses.reference_divergence)(x, y)
    setting = losses.settled(form, x, y, exact)
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
    monkeypatch.setattr(losses, "rates", lambda device: (1e10, 1e11))
    monkeypatch.setitem(losses.FORMS, "autograd", (losses.unrolled, "iterations", (500,)))
    args = losses.Args(repeats=1)
    for loss, forms in (("mmd", EAGER), ("sinkhorn", ["sinkhorn_divergence", "autograd"])):
        rows = losses.measure(loss, forms, 16, 8, args, torch.get_num_threads())
        assert [row[2] for row in rows] == forms and {len(row) for row in rows} == {len(losses.WIDTHS)}
        base = rows[0]
        assert base[6] == "1.0" and all(float(row[4]) > 0 for row in rows)
        assert [row[7] != "-" for row in rows] == [form == "mmd2" for form in forms]
        assert all(float(row[7]) > 0 for row in rows if row[7] != "-")


def test_operations_by_hand():
    # The points 0 and 1: three pairs, of which one has two orders; five bandwidths.
    assert losses.mmd_operations(1, 1) == 3 * (2 + 5 * 4) + 4 * 2


def test_floor_is_the_larger_of_bytes_and_operations(monkeypatch):
    x, _ = losses.points(16, 8, "cpu")
    monkeypatch.setattr(losses, "rates", lambda device: (math.inf, 1e3))
    assert losses.floor(x) == pytest.approx(losses.mmd_operations(16, 8))
    monkeypatch.setattr(losses, "rates", lambda device: (1e3, math.inf))
    assert losses.floor(x) == pytest.approx(4 * 16 * 8 * 4)


def row(form, n, d, ms, extra="-"):
    """A row of the table with what goals look at."""
    cells = {"n = m": f"{n}", "d": f"{d}", "implementation": form, "ms": ms, "extra MB": extra}
    return [cells.get(name, "-") for name in losses.WIDTHS]


def test_goals_of_made_up_rows():
    rows = [row("sinkhorn_divergence", n, 16, "1.000") for n in (64, 256, 1024)]
    rows += [row("flash-sinkhorn alternating", n, 16, ms) for n, ms in ((64, "3.500"), (256, "9.000"))]
    rows += [row("geomloss tensorized", 64, 16, "5.000"), row("geomloss tensorized", 1024, 16, "-")]
    rows += [row("pot sinkhorn_log", 64, 16, "0.100")]  # no goal speaks of it
    (line,) = losses.goal_lines(rows)
    assert "reached, 3.50 times at worst, for n = 64, d = 16, beside flash-sinkhorn alternating" in line
    assert "2 of 2 sizes" in line
    (line,) = losses.goal_lines([*rows, row("geomloss online", 256, 16, "2.900")])
    assert "missed, 2.90 times at worst, for n = 256" in line and "1 of 2 sizes" in line

    rows = [row("mmd2", 1024, 64, "2.000"), row("copied form", 1024, 64, "20.000")]
    rows += [row("copied form compiled", 1024, 64, "5.900"), row("mmd2", 64, 64, "9.000")]
    ten, three = losses.goal_lines(rows)
    assert "reached, 10.00 times" in ten and "missed, 2.95 times" in three
    (ours_failed, _) = losses.goal_lines([row("mmd2", 1024, 64, "-"), *rows[1:]])
    assert "missed, 0.00 times" in ours_failed

    # 65,536 x 64 float32 gradients of x and of y are 33.554 MB.
    for extra, verdict in (("97.5", "reached, 63.9 MB"), ("97.6", "missed, 64.0 MB")):
        (line,) = losses.goal_lines([row("mmd2", 65_536, 64, "1.000", extra)])
        assert verdict in line
    assert losses.goal_lines([]) == []


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(losses, "find_spec", lambda name: None)
    monkeypatch.setattr(losses, "rates", lambda device: (1e10, 1e11))
    losses.main(losses.Args(loss="sinkhorn", max_n=1))
    assert "\nLeft out, as they are not installed: geomloss, ot, pykeops.\n" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    forms, missing = losses.chosen("sinkhorn", losses.Args(device="cuda"))
    assert forms == ["sinkhorn_divergence", "autograd"] and "flash_sinkhorn" in missing
    assert losses.chosen("mmd", losses.Args(device="cuda")) == (losses.MMD, [])
    assert losses.COMPILED not in losses.chosen("mmd", losses.Args())[0]
    assert losses.chosen("mmd", losses.Args(compile=True))[0] == losses.MMD


def test_settings_for_more_points(monkeypatch, capsys):
    """Without a reference, those found for fewer points. What fails is not tried again; ours has to run."""
    monkeypatch.setattr(losses, "SETTINGS", {})
    monkeypatch.setattr(losses, "GIVEN_UP", {})
    x, y = losses.points(16, 8, "cpu")
    assert losses.settled("autograd", x, y, None) == "no setting"
    losses.GIVEN_UP.clear()
    found = losses.settled("autograd", x, y, losses.reference_divergence(x, y))
    assert losses.settled("autograd", x, y, None) == found and isinstance(found, tuple)
    monkeypatch.setitem(losses.FORMS, "autograd", (lambda *_: 1 / 0, "iterations", (5,)))
    assert losses.settled("autograd", x, y, (x,)) == "fails" == losses.GIVEN_UP["autograd", 8]
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setitem(losses.FORMS, "sinkhorn_divergence", (lambda *_: 1 / 0, "tol", (5,)))
    with pytest.raises(ZeroDivisionError):
        losses.settled("sinkhorn_divergence", x, y, (x,))


def started(name, data_dir):
    """A script's copied loop, with its default Args."""
    args = training.script_args(name, training.Args(data_dir=str(data_dir)))
    return training.copied_loop(name, args, "cpu")


@pytest.mark.parametrize("name", training.SCRIPTS)
def test_copied_loops_train(name, tiny_mnist, capsys):
    """Two steps: finite losses, which are printed, and weights in torch's default format that change."""
    networks, to_contiguous = [], training.contiguous

    def contiguous(network, device):
        networks.append(to_contiguous(network, device))
        return networks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "contiguous", contiguous)
        loop = started(name, tiny_mnist)
        first = next(loop)
        before = [[p.detach().clone() for p in network.parameters()] for network in networks]
        second = next(loop)
    assert first.keys() == second.keys() and first != second
    assert all(map(math.isfinite, [*first.values(), *second.values()]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("loss") for line in lines] == [len(first)] * 2
    assert len(networks) == {"baseline_cnn": 1, "cyclegan_mnist_usps": 4}.get(name, 2)
    for network, old in zip(networks, before):
        assert all(p.is_contiguous() for p in network.parameters())
        assert any(not torch.equal(p, q) for p, q in zip(network.parameters(), old))


@pytest.fixture
def features():
    """Features (64, 16) of real and of fake images, of a critic's size, that take a gradient."""
    torch.manual_seed(0)
    return [(mean + torch.randn(64, 16)).requires_grad_() for mean in (0.0, 0.5)]


def assert_same(copied, script, inputs, tolerance):
    """Value and gradients."""
    for a, b in zip(
        *([v.detach(), *torch.autograd.grad(v, inputs, retain_graph=True)] for v in (copied, script))
    ):
        assert (a - b).norm() <= tolerance * b.norm()


def test_copied_mmd_is_the_scripts(features):
    args = mmd_gan.Args()
    means = mmd_gan.kernel_means(*features, args.bandwidths, args.kernel)
    terms = training.mmd_terms(*features, args.bandwidths, args.kernel)
    for copied, script in zip(terms, means):
        assert copied.item() == pytest.approx(script.item(), rel=1e-4)
    assert_same(*(k_xx - k_yy for k_xx, k_yy, _ in (terms, means)), features, 1e-3)


def test_copied_sinkhorn_is_the_scripts(features):
    """With the number of iterations of the benchmark, as exactly as the script's tolerance is."""
    args = sinkhorn_gan.Args()
    eps = args.epsilon * sinkhorn_gan.mean_cost(*features, args.cost).item()
    options = {"eps": eps, "cost": args.cost, "tol": 1e-5}
    halves = [half for v in features for half in v.chunk(2)]
    copied = training.repulsive_sinkhorn_loss(*features, args.epsilon)
    assert_same(copied, sinkhorn_gan.repulsive_loss(*halves, **options), features, args.tolerance)
    copied = training.sinkhorn_loss(*features, args.epsilon)
    assert_same(copied, sinkhorn_gan.sinkhorn_divergence(*features, **options), features, args.tolerance)


def test_copied_penalties_are_the_scripts(features):
    """Of a linear critic, whose gradient is the same at all points, and of one that is not."""
    real, fake = (v.detach().view(64, 1, 4, 4) for v in features)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 1))
    copied = training.gradient_penalty(linear, real, fake)
    script = wgan_gp.gradient_penalty(linear, real, fake)
    assert_same(copied, script, [linear[1].weight], 1e-5)
    hidden = torch.nn.Linear(16, 8), torch.nn.LeakyReLU(0.2), torch.nn.Linear(8, 1)
    critic = torch.nn.Sequential(torch.nn.Flatten(), *hidden)
    copied = training.input_gradients(critic(real.requires_grad_()), real).square().sum(1).mean()
    copied.backward(inputs=(weights := [critic[1].weight, critic[3].weight]))
    expected = [weight.grad for weight in weights]
    slopes = gmgan_mnist.penalised_backward(critic, real, lambda logits: 0 * logits.sum(), 1.0)[1]
    torch.testing.assert_close(slopes.mean(), copied.detach())
    torch.testing.assert_close([weight.grad for weight in weights], expected)


def test_a_table_of_training_speeds(tiny_mnist, tmp_path, monkeypatch, capsys):
    """A row for each script that is named, and the process as it was."""
    monkeypatch.setattr(training, "WARM_UP", 1)
    names, path = ("wgan_gp", "baseline_cnn"), tmp_path / "results" / "training.md"

    def state():
        functions = baseline_cnn.Run.steps, baseline_cnn.Run.quiet, baseline_cnn.average, wgan_gp.tqdm
        modes = torch.get_deterministic_debug_mode(), signal.getsignal(signal.SIGINT)
        return functions, torch.Tensor.backward, modes

    before = state()
    options = {"data_dir": str(tiny_mnist), "steps": 1, "rounds": 2, "markdown": str(path)}
    training.main(training.Args(scripts=names, **options))
    table = capsys.readouterr().out
    assert path.read_text() == table and "2 rounds of 1 steps" in table
    head, _, *rows = ([c.strip() for c in r.split("|")[1:-1]] for r in table.splitlines() if r[:1] == "|")
    rows = [dict(zip(head, row)) for row in rows]
    assert [row["script"] for row in rows] == [*names] and head == [*training.WIDTHS]
    for row in rows:
        assert float(row["steps/s"]) > 0 and float(row["copied"]) > 0 and float(row["ratio"]) > 0
        shares = [int(row[part].rstrip("%")) for part in training.PARTS]
        assert abs(sum(shares) - 100) <= 2 and min(shares[1:3]) > 0
    assert state() == before


def test_each_step_is_timed_once(tiny_mnist, monkeypatch):
    """Two rounds of two steps, and the steps of the copied loop in between."""
    monkeypatch.setattr(training, "WARM_UP", 1)
    args, done = training.Args(data_dir=str(tiny_mnist), steps=2, rounds=2), []
    settings = training.script_args("baseline_cnn", args)
    loop = training.copied_baseline_cnn

    def counted(*values):
        for result in loop(*values):
            done.append("copied")
            yield result

    monkeypatch.setattr(training, "LOOPS", (counted, *training.LOOPS[1:]))
    watch = training.watch_training

    def watched(name, settings, before_step):
        def before(step):
            before_step(step)
            done.append("script")

        watch(name, settings, before)

    monkeypatch.setattr(training, "watch_training", watched)
    speeds = training.time_rounds("baseline_cnn", settings, args)
    assert [len(v) for v in speeds] == [2, 2] and all((v > 0).all() for v in speeds)
    expected = ["script", "copied"] + (["script"] * 2 + ["copied"] * 2) * 2
    assert done == expected


def test_missing_images_are_said_in_one_line(tmp_path, monkeypatch, capsys):
    for name in ("http_proxy", "https_proxy"):  # nothing can be downloaded through this
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stopped:
        training.main(training.Args(data_dir=str(tmp_path)))
    error = capsys.readouterr()
    assert stopped.value.code == 2 and str(tmp_path) in error.err and not error.out
    assert len(error.err.splitlines()) == 1


@pytest.mark.parametrize(
    "script, options",
    [
        ("losses", ["--repeats", "0"]),
        ("losses", ["--loss", "wasserstein"]),
        ("training", ["--scripts", "dcgan"]),
    ],
)
def test_bad_options(script, options, run_cli):
    result = run_cli(*options, script=f"benchmarks/{script}.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr and options[0] in result.stderr


@pytest.mark.parametrize("option, value", [("steps", 0), ("rounds", -1), ("scripts", ()), ("device", "cuda")])
def test_options_that_cannot_work(option, value, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        training.Args(**{option: value})
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"--{option}" in error and len(error.splitlines()) == 1


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
