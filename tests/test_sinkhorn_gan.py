"""The script sinkhorn_gan.py from end to end; its losses are tested in test_sinkhorn.py."""

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

import sinkhorn_gan
from sinkhorn_gan import Args, main, sinkhorn_divergence

TINY = {"num_steps": 4, "batch_size": 8, "latent_dim": 8, "channels": 4, "feature_dim": 4, "device": "cpu"}
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
    monkeypatch.setattr(sinkhorn_gan, "save_points", lambda *args: None)


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the one scalar that the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in lines]


def load(folder: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def spy(monkeypatch, name: str) -> list[tuple]:
    """Positional arguments and options of every call of one of the script's functions."""
    function, calls = getattr(sinkhorn_gan, name), []

    def called(*args, **options):
        calls.append((args, options))
        return function(*args, **options)

    monkeypatch.setattr(sinkhorn_gan, name, called)
    return calls


# Every data set, every option


@pytest.mark.curves
@pytest.mark.parametrize("dataset", ["mnist", "digits", "ring", "grid"])  # test_mmd_gan.py reads the others
def test_every_data_set(dataset, tiny):
    folder = main(tiny(dataset=dataset))
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, *PICTURES])
    lines, results = rows(folder), json.loads((folder / "results.json").read_text())
    toy = dataset in ("ring", "grid")
    measures = {"modes", "high_quality", "mode_kl"} if toy else {"fid", "precision", "recall", "class_kl"}
    assert all((measures <= line.keys()) == (line["step"] in (3, 4)) for line in lines)
    assert all(("loss_critic" in line) != toy and "loss_generator" in line for line in lines)
    assert measures < results.keys() and results["steps"] == 4
    values = [v for line in lines for v in line.values() if not isinstance(v, list)]
    assert all(map(math.isfinite, values))


OPTIONS = [
    *({"loss": loss, "critic": c} for loss in ("sinkhorn", "minibatch-energy") for c in ("fixed", "learned")),
    *({"loss": loss, "critic": "learned", "repulsive": False} for loss in ("sinkhorn", "minibatch-energy")),
    *({"cost": cost, "critic": "fixed", "epsilon": 1e-3} for cost in ("euclidean", "cosine")),
    {"cost": "euclidean", "critic": "learned", "loss": "minibatch-energy"},
    {"unroll": True, "critic": "learned", "repulsive": False, "max_iterations": 5, "spectral_norm": False},
    {"unroll": True, "critic": "learned", "max_iterations": 5},
    {"unroll": True, "critic": "fixed", "loss": "sinkhorn", "max_iterations": 5},
    {"critic": "learned", "critic_every": 3, "tolerance": 0.1, "max_iterations": 1},
    {"lr_decay": 0.0, "ema_decay": 0.0, "beta1": 0.0, "torch_deterministic": False},
    {"eval_split": "validation"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("dataset", ["mnist", "ring"])
def test_every_option(options, dataset, tiny, light, monkeypatch):
    """A run ends, its losses are finite, and what was asked for was used."""
    names = ("sinkhorn_divergence", "minibatch_energy_distance", "repulsive_loss")
    calls = {name: spy(monkeypatch, name) for name in names}
    args = tiny(dataset=dataset, num_steps=3, num_eval_samples=0, **options)
    folder = main(args)
    lines, state = rows(folder), load(folder)
    assert len(lines) == 3 and all(math.isfinite(v) for line in lines for v in line.values())
    learned = args.critic == "learned"
    updates = (1 if args.critic_every == 3 else 3) if learned else 0
    assert ("opt_critic" in state) == learned
    assert sum("loss_critic" in line for line in lines) == updates
    names = list(names)
    own = names[args.loss == "minibatch-energy"]
    other = names[args.loss != "minibatch-energy"]
    assert len(calls["repulsive_loss"]) == (updates if args.repulsive else 0)
    assert len(calls[own]) == 3 + (0 if args.repulsive else updates) and not calls[other]
    for _, used in calls[own] + calls["repulsive_loss"]:
        assert used["cost"] == args.cost and used["tol"] == args.tolerance
        assert used["max_iterations"] == args.max_iterations and used.get("unroll", False) == args.unroll
    spectral = any("parametrizations" in name for name in state["critic"])
    assert spectral == (learned and args.spectral_norm)
    assert all(v.isfinite().all() for v in state["generator"].values())


def test_epsilon_is_relative_to_the_mean_cost(tiny, light, monkeypatch):
    calls = spy(monkeypatch, "sinkhorn_divergence")
    main(tiny(dataset="ring", num_steps=2, num_eval_samples=0, epsilon=0.3))
    assert len(calls) == 2
    for (x, y, eps), options in calls:
        cost = (x.detach()[:, None] - y.detach()).square().sum(-1).mean().item() / 2
        assert eps == pytest.approx(0.3 * cost, rel=1e-5) and options["cost"] == "euclidean"


class Scale(nn.Module):
    """A critic that returns its input, as long as its one weight has not moved."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.flatten(1)


@pytest.mark.parametrize("name", ["repulsive_loss", "minibatch_energy_distance"])
def test_the_halves_are_independent(name, tiny, light, monkeypatch):
    """The real batch in two, then the fake one, each sample in one half."""
    monkeypatch.setattr(sinkhorn_gan, "make_critic", lambda *args: Scale())
    drawn, draw = [], sinkhorn_gan.draw_batch
    monkeypatch.setattr(sinkhorn_gan, "draw_batch", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    calls = spy(monkeypatch, name)
    loss = "minibatch-energy" if name == "minibatch_energy_distance" else "sinkhorn"
    options = {"num_steps": 1, "num_eval_samples": 0, "lr_critic": 1e-12, "lr_generator": 1e-12}
    main(tiny(critic="learned", loss=loss, repulsive=name == "repulsive_loss", **options))
    assert len(calls) == (1 if name == "repulsive_loss" else 2) and len(drawn) == 2
    for ((x1, x2, y1, y2, _), _), real in zip(calls, drawn):
        assert [len(half) for half in (x1, x2, y1, y2)] == [4, 4, 4, 4]
        torch.testing.assert_close(torch.cat((x1, x2)).detach(), real.flatten(1))
        assert len(torch.cat((x1, x2, y1, y2)).unique(dim=0)) == 16


@pytest.mark.parametrize(
    "options", [{}, {"repulsive": False}, {"loss": "minibatch-energy", "repulsive": False}]
)
def test_the_critic_keeps_real_and_fake_apart(options, tiny, light):
    """With a generator that stands still the critic's loss falls and the generator's rises."""
    options = {"dataset": "grid", "critic": "learned", "batch_size": 64, "num_steps": 60, **options}
    lines = rows(main(tiny(num_eval_samples=0, lr_generator=1e-12, lr_critic=5e-3, epsilon=0.3, **options)))
    first, last = lines[:10], lines[-10:]
    assert sum(r["loss_critic"] for r in last) < sum(r["loss_critic"] for r in first)
    assert sum(r["loss_generator"] for r in last) > 1.1 * sum(r["loss_generator"] for r in first)


def test_learned_critics_compare_by_cosine():
    assert Args().cost == "cosine" == Args(loss="minibatch-energy").cost
    assert Args(critic="fixed").cost == "euclidean" == Args(dataset="grid").cost


def test_strata_take_the_luck_out_of_batches():
    """Each mode gets its share of a stratified batch, and each quarter of the plane its latents."""
    torch.manual_seed(0)
    data = sinkhorn_gan.load_toy("grid")
    ordered, (modes, _) = sinkhorn_gan.kd_order(data), sinkhorn_gan.toy_modes("grid")
    assert 0.95 * len(data) < len(ordered) <= len(data) and len(ordered.unique(dim=0)) > 0.999 * len(ordered)
    assert torch.isin(ordered[:, 0], data[:, 0]).all()

    def spread(batches):
        counts = [torch.cdist(b, modes).argmin(1).bincount(minlength=25).double() for b in batches]
        return torch.stack(counts).std(0).mean().item()

    iid = spread([sinkhorn_gan.draw_batch(data, 500) for _ in range(50)])
    stratified = [sinkhorn_gan.draw_strata(ordered, 500) for _ in range(50)]
    assert spread(stratified) < 0.6 * iid
    assert not torch.equal(stratified[0], stratified[1])
    torch.testing.assert_close(torch.cat(stratified).mean(0), data.mean(0), atol=0.05, rtol=0)
    cube = torch.quasirandom.SobolEngine(2, scramble=True, seed=1).draw(512)
    for _ in range(20):
        z = sinkhorn_gan.draw_sobol(cube)
        assert z.shape == (512, 2) and z.isfinite().all()
        assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
        quarters = ((z > 0).long() @ torch.tensor([1, 2])).bincount(minlength=4)
        assert (quarters - 128).abs().max() <= 8  # of independent ones: 10 is one standard deviation
    pairs = torch.stack(
        [sinkhorn_gan.draw_sobol(cube)[7] for _ in range(2000)]
    )  # one latent over many batches
    assert pairs.mean(0).abs().max() < 0.1 and (pairs.std(0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("options", [{}, {"stratified": False}, {"loss": "minibatch-energy"}], ids=str)
def test_strata_are_for_toys(options, tiny, light, monkeypatch):
    """Independent halves are stratified each for itself."""
    names = ("draw_strata", "draw_sobol", "draw_batch")
    for dataset in ("ring", "mnist"):
        calls = {name: spy(monkeypatch, name) for name in names}
        main(tiny(dataset=dataset, num_steps=1, num_eval_samples=0, critic="fixed", **options))
        used = [
            [len(args[0]) if name == "draw_sobol" else args[1] for args, _ in calls[name]] for name in names
        ]
        if dataset == "mnist" or options.get("stratified") is False:
            assert used == [[], [], [8]]
        else:
            assert used == ([[4, 4], [4, 4], []] if "loss" in options else [[8], [8], []])


def test_same_seed_same_run(tiny, light):
    first, second, third = (main(tiny(num_eval_samples=0, seed=seed)) for seed in (1, 1, 2))
    assert rows(first) == rows(second) != rows(third)
    pairs = zip(load(first)["averaged"].values(), load(second)["averaged"].values())
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("loss", ["sinkhorn", "minibatch-energy"])
def test_training_learns(loss, tiny, light):
    """Seconds on the ring bring the samples much nearer to it than a generator's first ones."""
    options = {"num_steps": 300, "batch_size": 128, "latent_dim": 2, "log_every": 100, "eval_every": 300}
    args = tiny(dataset="ring", num_eval_samples=1000, loss=loss, cost="euclidean", **options)
    state = load(main(args))
    torch.manual_seed(0)
    generator = sinkhorn_gan.average(sinkhorn_gan.make_generator(2, 4, True), 0.999)
    real, distances = sinkhorn_gan.load_toy("ring", 1000), []
    for weights in (None, state["averaged"]):
        if weights:
            generator.load_state_dict(weights)
        samples = sinkhorn_gan.draw_samples(generator, 2, 1000, 1, torch.device("cpu"))
        distances.append(sinkhorn_divergence(samples, real, 0.05).item())
    assert distances[1] < 0.1 * distances[0]


# Resume and generate


@pytest.mark.parametrize(
    "options",
    [{}, {"critic": "fixed", "dataset": "ring"}, {"critic_every": 3, "loss": "minibatch-energy"}],
    ids=["default", "fixed", "critic_every"],
)
def test_resume_is_bit_for_bit(options, tiny, light, monkeypatch):
    """A run stopped after 4 of 6 steps and resumed has the losses and weights of one that was not stopped."""
    options = {"num_steps": 6, "num_eval_samples": 0, **options}
    straight, args = main(tiny(**options)), tiny(**options)
    make, calls = sinkhorn_gan.mean_cost, itertools.count(1)
    per_step = {"fixed": [1, 1, 1, 1], "learned": [2, 2, 2, 2]}[args.critic]
    last = 6 if args.critic_every == 3 else sum(per_step)  # critic updates in steps 1 and 4 alone

    def interrupted(*inputs):
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGINT)
        return make(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(sinkhorn_gan, "mean_cost", interrupted)
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


def test_track_offline(run_cli, tmp_path):
    options = ["--dataset", "ring", "--num-steps", 3, "--num-eval-samples", 50, "--device", "cpu"]
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": None, "WANDB_SILENT": "true"}
    result = run_cli("--track", *options, env=env | {"HOME": str(tmp_path)}, script="sinkhorn_gan.py")
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("runs/wandb/offline-run-*/*.wandb"))) == 1
    (folder,) = tmp_path.glob("runs/sinkhorn_gan__*")
    assert sorted(p.name for p in folder.iterdir() if "_0" not in p.name) == FILES


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": 0.0}, "--epsilon must be positive, not 0.0"),
        ({"epsilon": -0.1}, "--epsilon must be positive, not -0.1"),
        ({"epsilon": math.nan}, "--epsilon must be positive, not nan"),
        ({"tolerance": 0.0}, "--tolerance must be positive, not 0.0"),
        ({"max_iterations": 0}, "--max-iterations must be positive, not 0"),
        ({"critic_every": 0}, "--critic-every must be positive, not 0"),
        ({"feature_dim": 0}, "--feature-dim must be positive, not 0"),
        ({"lr_critic": math.inf}, "--lr-critic must be positive, not inf"),
        ({"num_eval_samples": 5}, "--num-eval-samples must be 0 or at least 10, not 5"),
        ({"out": "x"}, "--checkpoint <run>/checkpoint.pt and --out"),
        ({"batch_size": 7}, "--batch-size must be even .*halves, not 7"),
        ({"batch_size": 7, "loss": "minibatch-energy", "critic": "fixed"}, "--batch-size must be even"),
        ({"unroll": True, "loss": "minibatch-energy"}, "--unroll: in --loss minibatch-energy"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        Args(**options)


def test_an_odd_batch_where_nothing_is_halved():
    assert Args(batch_size=7, critic="fixed", loss="sinkhorn").batch_size == 7
    assert Args(batch_size=7, repulsive=False).batch_size == 7


@pytest.mark.parametrize(
    "options, texts",
    [
        (["--epsilon", "0"], ["--epsilon must be positive, not 0.0"]),
        (["--loss", "wasserstein"], ["wasserstein", "minibatch-energy"]),
        (["--dataset", "digits", "--batch-size", "2000"], ["--batch-size 2000", "1437"]),
    ],
)
def test_bad_options_of_the_command(options, texts, run_cli, tmp_path):
    result = run_cli(*options, "--device", "cpu", script="sinkhorn_gan.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(text in result.stderr for text in texts), result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [{}, {"critic": "fixed"}, {"loss": "minibatch-energy"}], ids=str)
@pytest.mark.parametrize("dataset", ["ring", "mnist"])
def test_learning_rate_that_explodes(dataset, options, tiny, light, capsys):
    """Features overflow: one line ends the run, not a traceback from the loss."""
    args = tiny(dataset=dataset, num_steps=100, lr_generator=1e30, log_every=50, eval_every=100, **options)
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
@pytest.mark.parametrize("options", [{}, {"loss": "minibatch-energy"}, {"dataset": "ring"}], ids=str)
def test_cuda_trains(options, tiny):
    folder = main(tiny(device="cuda", **options))
    main(Args(resume=str(folder), num_steps=5))
    assert rows(folder)[-1]["step"] == 5
