"""The script wgan_gp.py: its losses against formulas, and the script from end to end."""

import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import wgan_gp
from wgan_gp import Args, between, clip_weights, exact_wasserstein, main, slope_penalty, wasserstein_estimate

TINY = {"num_steps": 4, "batch_size": 8, "latent_dim": 8, "channels": 4, "device": "cpu"}
TINY |= {"log_every": 1, "eval_every": 3, "num_eval_samples": 60}
FILES = ["args.json", "checkpoint.pt", "curves.png", "metrics.jsonl", "results.json", "samples.png"]
PICTURES = ["samples_000003.png", "samples_000004.png"]


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


@pytest.fixture
def light(monkeypatch):
    """Runs without pictures: they take seconds, which other tests spend."""
    monkeypatch.setattr(wgan_gp, "save_points", lambda *args: None)


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the one scalar that the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in lines]


def load(folder: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def spy(monkeypatch, name: str) -> list[tuple]:
    """Arguments of every call of one of the script's functions."""
    function, calls = getattr(wgan_gp, name), []

    def called(*args, **options):
        calls.append((args, options))
        return function(*args, **options)

    monkeypatch.setattr(wgan_gp, name, called)
    return calls


# Losses


class Linear(nn.Module):
    """f(x) = w . x, whose slope is |w| everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w))

    def forward(self, x):
        return x.flatten(1) @ self.w[:, None]


@pytest.mark.parametrize("norm", [0.0625, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("one_sided", [False, True])
def test_penalty_of_a_linear_critic(norm, one_sided):
    """(|w| - 1)^2, or nothing below 1 if one-sided; its gradient in w is 2 (|w| - 1) w / |w|."""
    torch.manual_seed(0)
    direction = nn.functional.normalize(torch.randn(12, dtype=torch.float64), dim=0)
    critic = Linear(norm * direction)
    real, fake = torch.randn(2, 5, 1, 3, 4, dtype=torch.float64)
    penalty, slope = slope_penalty(critic, between(real, fake), one_sided)
    excess = max(norm - 1, 0.0) if one_sided else norm - 1
    assert slope.item() == pytest.approx(norm, rel=1e-12)
    assert penalty.item() == pytest.approx(excess**2, rel=1e-9, abs=1e-20)
    (grad,) = torch.autograd.grad(penalty, critic.w)
    torch.testing.assert_close(grad, 2 * excess * direction, rtol=1e-9, atol=1e-12)


def test_penalty_against_brute_force():
    """Slopes by central differences, sample by sample, in float64; and the penalty's gradient likewise."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 7), nn.Softplus(), nn.Linear(7, 1)).double()
    points = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)

    def brute(one_sided):
        eps, slopes = 1e-5, []
        with torch.no_grad():
            for p in points:
                steps = eps * torch.eye(3, dtype=torch.float64)
                slopes.append(((critic(p + steps) - critic(p - steps)) / (2 * eps)).norm().item())
        excess = [max(s - 1, 0) if one_sided else s - 1 for s in slopes]
        return sum(e * e for e in excess) / len(excess), sum(slopes) / len(slopes)

    for one_sided, factor in itertools.product((False, True), (1.0, 20.0)):
        with torch.no_grad():
            critic[2].weight.mul_(factor)
        penalty, slope = slope_penalty(critic, points, one_sided)
        assert (penalty.item(), slope.item()) == pytest.approx(brute(one_sided), rel=1e-6, abs=1e-12)
        (grad,) = torch.autograd.grad(penalty, critic[0].weight)
        with torch.no_grad():
            critic[0].weight[2, 1] += 1e-4
            up, _ = brute(one_sided)
            critic[0].weight[2, 1] -= 2e-4
            down, _ = brute(one_sided)
            critic[0].weight[2, 1] += 1e-4
        assert grad[2, 1].item() == pytest.approx((up - down) / 2e-4, rel=1e-3, abs=1e-8)


def test_points_lie_between_real_and_fake():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 500, 2, dtype=torch.float64)
    points = between(real, fake)
    assert points.requires_grad and points.is_leaf
    share = (points.detach() - real) / (fake - real)
    torch.testing.assert_close(share[:, 0], share[:, 1])  # on the line, at one place for all dimensions
    assert 0 <= share.min() < 0.02 and 0.98 < share.max() <= 1 and abs(share.mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: wasserstein_estimate(torch.zeros(4, 2), torch.zeros(4)), r"\(4, 2\) and \(4,\)"),
        (lambda: wasserstein_estimate(torch.zeros(4), torch.zeros(0)), r"one value per sample"),
        (lambda: between(torch.zeros(4, 2), torch.zeros(1, 2)), r"\(4, 2\) and \(1, 2\)"),
        (lambda: slope_penalty(nn.Linear(2, 1), torch.zeros(4, 2)), "points.requires_grad=False"),
        (lambda: slope_penalty(nn.Linear(2, 3), torch.zeros(4, 2, requires_grad=True)), r"not \(4, 3\)"),
        (lambda: clip_weights(nn.Linear(2, 1), 0.0), "clip must be positive, not 0.0"),
        (lambda: clip_weights(nn.Linear(2, 1), math.nan), "clip must be positive, not nan"),
    ],
)
def test_what_losses_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_estimate_and_clip():
    assert wasserstein_estimate(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-1.0, 0.0, 4.0])).item() == 2
    critic = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    before = [p.clone() for p in critic.parameters()]
    clip_weights(critic, 0.1)
    for p, was in zip(critic.parameters(), before):
        assert torch.equal(p, was.clamp(-0.1, 0.1)) and p.requires_grad
    assert any(was.abs().max() > 0.1 for was in before)


def test_exact_wasserstein():
    """Against all permutations; a shift by a vector costs its length; in one dimension sorting is best."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 6, 3, dtype=torch.float64)
    cost = torch.cdist(x, y).tolist()
    best = min(sum(cost[i][j] for i, j in enumerate(p)) for p in itertools.permutations(range(6)))
    assert exact_wasserstein(x, y) == pytest.approx(best / 6, rel=1e-12)
    assert exact_wasserstein(x, x[torch.randperm(6)] + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(5)
    a, b = torch.randn(2, 200, 1)
    sorted_cost = (a.sort(0).values - b.sort(0).values).abs().mean().item()
    assert exact_wasserstein(a, b) == pytest.approx(sorted_cost, rel=1e-5)
    for bad in (torch.zeros(5, 3), torch.zeros(6, 2), torch.zeros(6)):
        with pytest.raises(ValueError, match="one shape"):
            exact_wasserstein(torch.zeros(6, 3), bad)


def test_a_trained_critic_measures_the_distance():
    """Two clouds two apart: under the penalty the critic's estimate comes to the exact distance."""
    torch.manual_seed(0)
    critic = wgan_gp.make_critic(1, 4, toy=True, spectral_norm=False, scale=1.0)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.5, 0.9))
    x, y = 0.3 * torch.randn(256, 2), 0.3 * torch.randn(256, 2) + torch.tensor([2.0, 0.0])
    for _ in range(300):
        estimate = wasserstein_estimate(critic(x), critic(y))
        penalty, slope = slope_penalty(critic, between(x, y[torch.randperm(256)]))
        optimizer.zero_grad()
        (10 * penalty - estimate).backward()
        optimizer.step()
    assert estimate.item() == pytest.approx(exact_wasserstein(x, y), rel=0.1)
    assert slope.item() == pytest.approx(1, abs=0.1)


# Every data set, every option


@pytest.mark.curves
@pytest.mark.parametrize("dataset", ["mnist", "digits", "ring", "grid"])  # test_mmd_gan.py reads the others
def test_every_data_set(dataset, tiny):
    folder = main(tiny(dataset=dataset))
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, *PICTURES])
    lines, results = rows(folder), json.loads((folder / "results.json").read_text())
    measures = {"modes", "high_quality", "mode_kl", "w1_critic", "critic_slope", "w1_exact", "w1_floor"}
    if dataset not in ("ring", "grid"):
        measures = {"fid", "precision", "recall", "class_kl"}
    assert all((measures <= line.keys()) == (line["step"] in (3, 4)) for line in lines)
    losses = {"loss_generator", "w1_batch", "gradient_penalty", "slope"}
    assert all(losses <= line.keys() for line in lines)
    assert measures < results.keys() and results["steps"] == 4
    values = [v for line in lines for v in line.values() if not isinstance(v, list)]
    assert all(map(math.isfinite, values))


def test_distances_of_a_toy(tiny, light, monkeypatch):
    """w1_exact is that of averaged samples to data, w1_floor that of data to other data."""
    calls = spy(monkeypatch, "exact_wasserstein")
    folder = main(tiny(dataset="grid", num_steps=2, num_eval_samples=300))
    results, data = json.loads((folder / "results.json").read_text()), wgan_gp.load_toy("grid")
    (real, samples), (same, others) = (args for args, _ in calls)
    assert torch.equal(real, same) and torch.equal(real, data[:300]) and torch.equal(others, data[-300:])
    averaged = wgan_gp.average(wgan_gp.make_generator(8, 4, True), 0.999)
    averaged.load_state_dict(load(folder)["averaged"])
    drawn = wgan_gp.draw_samples(averaged, 8, 2500, 1, torch.device("cpu"))
    assert torch.equal(samples, drawn[:300]) and not torch.equal(samples, real)
    assert results["w1_exact"] == exact_wasserstein(real, samples) > results["w1_floor"] > 0
    critic = wgan_gp.make_critic(1, 4, True, spectral_norm=False, scale=1.0)
    critic.load_state_dict(load(folder)["critic"])
    points = torch.lerp(real, samples, torch.linspace(0, 1, 300)[:, None]).requires_grad_()
    (grad,) = torch.autograd.grad(critic(points).sum(), points)
    assert results["critic_slope"] == pytest.approx(grad.norm(dim=1).mean().item())
    assert results["w1_critic"] == pytest.approx(
        (critic(data[:10_000]).mean() - critic(samples).mean()).item(), abs=1e-6
    )


OPTIONS = [
    {},
    {"lipschitz": "clip"},
    {"lipschitz": "clip", "clip": 0.003, "critic_steps": 3},
    {"one_sided": True},
    {"penalty_every": 2, "critic_steps": 3},
    {"penalty_every": 2},
    {"penalty_weight": 0.0},
    {"critic_steps": 2, "lr_decay": 0.0, "ema_decay": 0.0, "beta1": 0.5, "beta2": 0.999},
    {"eval_split": "validation", "torch_deterministic": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("dataset", ["mnist", "ring"])
def test_every_option(options, dataset, tiny, light, monkeypatch):
    """A run ends, its losses are finite, and what was asked for was used."""
    estimates, penalties, clips = (
        spy(monkeypatch, n) for n in ("wasserstein_estimate", "slope_penalty", "clip_weights")
    )
    args = tiny(dataset=dataset, num_steps=4, num_eval_samples=0, **options)
    folder = main(args)
    lines, state = rows(folder), load(folder)
    assert len(lines) == 4 and all(math.isfinite(v) for line in lines for v in line.values())
    updates, gp = 4 * args.critic_steps, args.lipschitz == "gp"
    assert len(estimates) == updates and len(clips) == (0 if gp else updates)
    assert len(penalties) == (updates // args.penalty_every if gp else 0)
    assert all(used[0][2] == args.one_sided for used in penalties)
    ended = [updates // 4 * step // args.penalty_every for step in range(5)]  # lazy penalties up to a step
    with_penalty = [gp and before < after for before, after in itertools.pairwise(ended)]
    assert ["gradient_penalty" in line for line in lines] == with_penalty
    largest = max(v.abs().max().item() for v in state["critic"].values())
    assert gp or largest == pytest.approx(args.clip)
    assert all(v.isfinite().all() for v in state["generator"].values())


def test_the_lazy_penalty_weighs_as_many_times_more(tiny, light, monkeypatch):
    """Without learning to speak of, the critic's loss is -W1 + k * weight * penalty, or -W1 between."""
    seen = []
    step = torch.optim.Adam.step

    def spied(self, *args, **options):
        seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", spied)
    monkeypatch.setattr(wgan_gp, "between", lambda real, fake: ((real + fake) / 2).requires_grad_())
    options = {
        "dataset": "ring",
        "num_steps": 2,
        "num_eval_samples": 0,
        "lr_critic": 1e-12,
        "lr_generator": 1e-12,
    }
    grads = []
    for extra in (
        {"penalty_weight": 2.0},
        {"penalty_weight": 1.0, "penalty_every": 2},
        {"penalty_weight": 0.0},
    ):
        seen.clear()
        main(tiny(**options, **extra))
        grads.append((seen[0], seen[2]))  # the critic's in steps 1 and 2
    always, lazy, never = grads
    for step, same, other in ((0, never, always), (1, always, never)):
        torch.testing.assert_close(lazy[step], same[step])
        assert any(not torch.allclose(a, b) for a, b in zip(lazy[step], other[step]))


def test_learning_rates_fall(tiny, light):
    options = {
        "lr_generator": 1e-3,
        "lr_critic": 2e-3,
        "lr_decay": 1.0,
        "num_steps": 2,
        "num_eval_samples": 0,
    }
    state = load(main(tiny(**options)))
    rates = [state[f"opt_{name}"]["param_groups"][0]["lr"] for name in ("generator", "critic")]
    assert rates == pytest.approx([5e-4, 1e-3])


def test_same_seed_same_run(tiny, light):
    first, second, third = (main(tiny(num_eval_samples=0, seed=seed)) for seed in (1, 1, 2))
    assert rows(first) == rows(second) != rows(third)
    pairs = zip(load(first)["averaged"].values(), load(second)["averaged"].values())
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("lipschitz", ["gp", "clip"])
def test_training_learns(lipschitz, tiny, light):
    """Seconds on the ring bring the samples much nearer to it than a generator's first ones."""
    options = {"num_steps": 250, "batch_size": 128, "latent_dim": 2, "log_every": 100, "eval_every": 250}
    options |= {"critic_steps": 3, "ema_decay": 0.9} | ({"clip": 0.1} if lipschitz == "clip" else {})
    folder = main(tiny(dataset="ring", num_eval_samples=500, lipschitz=lipschitz, **options))
    torch.manual_seed(0)
    untrained = wgan_gp.average(wgan_gp.make_generator(2, 4, True), 0.999)
    samples = wgan_gp.draw_samples(untrained, 2, 500, 1, torch.device("cpu"))
    before = exact_wasserstein(wgan_gp.load_toy("ring", 500), samples)
    assert json.loads((folder / "results.json").read_text())["w1_exact"] < 0.4 * before


# Resume and generate


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lipschitz": "clip", "dataset": "ring"},
        {"penalty_every": 3, "critic_steps": 2, "num_eval_samples": 20, "eval_every": 2},
        {"penalty_every": 4},
    ],
    ids=["default", "clip", "lazy", "lazier"],
)
def test_resume_is_bit_for_bit(options, tiny, light, monkeypatch):
    """A run stopped after 4 of 6 steps and resumed has the losses and weights of one that was not stopped."""
    options = {"num_steps": 6, "num_eval_samples": 0, **options}
    straight, args = main(tiny(**options)), tiny(**options)
    estimate, calls = wgan_gp.wasserstein_estimate, itertools.count(1)

    def interrupted(*inputs):
        if next(calls) == 4 * args.critic_steps:
            os.kill(os.getpid(), signal.SIGINT)
        return estimate(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(wgan_gp, "wasserstein_estimate", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(args)
    assert stop.value.code == 130
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert load(folder)["step"] == 4
    torch.manual_seed(1234)
    assert main(Args(resume=str(folder))) == folder
    assert rows(folder) == rows(straight)
    ours, theirs = load(folder), load(straight)
    for key in ("generator", "averaged", "critic"):
        assert all(torch.equal(v, theirs[key][name]) for name, v in ours[key].items()), key


@pytest.mark.parametrize("dataset", ["mnist", "ring"])
def test_generate(dataset, tiny, light, tmp_path):
    folder = main(tiny(dataset=dataset, num_eval_samples=0))
    args = Args(generate=12, checkpoint=str(folder / "checkpoint.pt"), out=str(tmp_path / "out"))
    out = main(args)
    names = sorted(p.name for p in out.iterdir())
    assert names == ([f"{i:06d}.png" for i in range(12)] if dataset == "mnist" else ["samples.npy"])
    assert dataset == "mnist" or np.load(out / "samples.npy").shape == (12, 2)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2


@pytest.mark.parametrize("broken", [None, OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
def test_out_is_whole_or_not_there(broken, tmp_path):
    """What stands beside it stays, and of what was broken off nothing does."""
    mine = [tmp_path / "out.tmp", tmp_path / ".out"]
    for folder in mine:
        folder.mkdir()
    try:
        with wgan_gp.new_folder(str(tmp_path / "out")) as folder:
            (folder / "a").touch()
            assert not (tmp_path / "out").exists()
            if broken:
                raise broken
    except (OSError, KeyboardInterrupt) as error:
        assert error is broken
    assert sorted(tmp_path.iterdir()) == sorted(mine + ([] if broken else [tmp_path / "out"]))


def test_out_cannot_be_written(tmp_path, capsys, monkeypatch, tiny, light):
    """It is said before anything is drawn."""
    folder = main(tiny(num_eval_samples=0, num_steps=1))
    monkeypatch.setattr(wgan_gp, "draw_samples", None)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(Args(generate=5, checkpoint=str(folder / "checkpoint.pt"), out=str(tmp_path / "file" / "out")))
    assert (
        stop.value.code == 2
        and "cannot read or write" in (said := capsys.readouterr().err)
        and "--out" in said
    )


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"penalty_weight": -1.0}, r"--penalty-weight must be in \[0, inf\), not -1.0"),
        ({"penalty_weight": math.nan}, r"--penalty-weight must be in \[0, inf\), not nan"),
        ({"penalty_every": 0}, "--penalty-every must be positive, not 0"),
        ({"clip": 0.0}, "--clip must be positive, not 0.0"),
        ({"critic_steps": 0}, "--critic-steps must be positive, not 0"),
        ({"beta2": 1.0}, r"--beta2 must be in \[0, 1\), not 1.0"),
        ({"lr_critic": math.inf}, "--lr-critic must be positive, not inf"),
        ({"num_eval_samples": 5}, "--num-eval-samples must be 0 or at least 10, not 5"),
        ({"lipschitz": "clip", "one_sided": True}, "--lipschitz clip has no gradient penalty"),
        ({"lipschitz": "clip", "penalty_every": 4}, "--lipschitz clip has no gradient penalty"),
        ({"lipschitz": "clip", "penalty_weight": 1.0}, "--lipschitz clip has no gradient penalty"),
        ({"clip": 0.1}, "--clip 0.1 is for --lipschitz clip"),
        ({"out": "x"}, "--checkpoint <run>/checkpoint.pt and --out"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        Args(**options)


@pytest.mark.parametrize(
    "options, texts",
    [
        (["--clip", "-1"], ["--clip must be positive, not -1.0"]),
        (["--lipschitz", "none"], ["none", "gp", "clip"]),
        (["--dataset", "digits", "--batch-size", "2000"], ["--batch-size 2000", "1437"]),
        (["--generate", "5"], ["--checkpoint", "--out"]),
    ],
)
def test_bad_options_of_the_command(options, texts, run_cli, tmp_path):
    result = run_cli(*options, "--device", "cpu", script="wgan_gp.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(text in result.stderr for text in texts), result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("dataset", ["ring", "mnist"])
def test_learning_rate_that_explodes(dataset, tiny, light, capsys):
    args = tiny(dataset=dataset, num_steps=100, lr_generator=1e30, log_every=50, eval_every=100)
    with pytest.raises(SystemExit) as stop:
        main(args)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "not finite at step" in err and "last good checkpoint: none yet" in err


def test_a_checkpoint_of_another_script_is_refused(tmp_path, capsys):
    torch.save({"script": "mmd_gan", "step": 3, "args": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as stop:
        main(Args(resume=str(tmp_path)))
    assert stop.value.code == 2 and "mmd_gan" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("options", [{}, {"lipschitz": "clip"}, {"dataset": "ring"}], ids=str)
def test_cuda_trains(options, tiny):
    folder = main(tiny(device="cuda", **options))
    main(Args(resume=str(folder), num_steps=5))
    assert rows(folder)[-1]["step"] == 5
