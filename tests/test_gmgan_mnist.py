"""gmgan_mnist.py: latents, losses, rejection and clusters against what is known, and the whole script."""

import copy
import itertools
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_few_pixels
from PIL import Image
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import gmgan_mnist
from gmgan_mnist import (
    Affine,
    Args,
    Mixture,
    average,
    calibrate,
    cluster_images,
    cluster_scores,
    draw_mixture_samples,
    drs_acceptance,
    drs_scores,
    main,
    make_mixture,
    mixture_latents,
    non_saturating_losses,
    penalised_backward,
    reject_samples,
    relativistic_losses,
)

TINY = {"num_steps": 4, "batch_size": 8, "latent_dim": 6, "channels": 4, "num_components": 3, "device": "cpu"}
TINY |= {"log_every": 1, "eval_every": 3, "num_eval_samples": 60}
FILES = ["args.json", "checkpoint.pt", "components.png", "curves.png", "metrics.jsonl", "results.json"]
FILES += ["samples.png", "samples_000003.png", "samples_000004.png"]
COVARIANCES = pytest.mark.parametrize("covariance", ["scalar", "diagonal", "full"])
NETWORKS = ("generator", "averaged", "discriminator", "mixture", "averaged_mixture")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One --run-dir for the module, so that a judge is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tiny(runs, tiny_mnist, run_name, monkeypatch):
    """tiny(**options): Args of a small run; its clustering takes three steps."""
    monkeypatch.setattr(gmgan_mnist, "CLUSTER_STEPS", 3)

    def make(**options):
        fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": run_name()}
        small = {k: v for k, v in TINY.items() if k != "num_components" or options.get("latent") != "normal"}
        return Args(**(small | fixed | options))

    return make


@pytest.fixture
def light(monkeypatch):
    """Runs without pictures: they take seconds, which other tests spend."""
    for name in ("save_images", "save_components"):
        monkeypatch.setattr(gmgan_mnist, name, lambda *args: None)


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the one scalar that the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in lines]


def load(folder: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(first: dict, second: dict) -> bool:
    """Whether two states hold the same tensors."""
    return all(torch.equal(v, second[name]) for name, v in first.items())


def refused(capsys, args: Args) -> str:
    """What main says, in one line, when it refuses these arguments with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return line


# The mixture


def trained_mixture(covariance: str, k: int = 3, d: int = 4) -> Mixture:
    """A mixture whose parameters have all moved from where they begin."""
    mixture = Mixture(torch.randn(k, d), 1.5, covariance, True)
    with torch.no_grad():
        mixture.log_scales += 0.3 * torch.randn_like(mixture.log_scales)
    return mixture


def covariances(mixture: Mixture) -> torch.Tensor:
    """The covariances of the first three components that a mixture's parameters stand for, entry by entry."""
    d, k, parameters = mixture.means.shape[1], 3, mixture.log_scales.detach()
    factors = torch.zeros(k, d, d)
    for n, i, j in itertools.product(range(k), range(d), range(d)):
        if parameters.dim() == 3:
            entry = parameters[n, i, j]
            factors[n, i, j] = entry.exp() if i == j else entry if i > j else 0.0
        elif i == j:
            factors[n, i, i] = parameters[n, i if parameters.shape[1] == d else 0].exp()
    return factors @ factors.mT


@COVARIANCES
def test_mixture_moments(covariance):
    """Mean and covariance of each component, and of the mixture: E cov + cov of the means."""
    torch.manual_seed(0)
    mixture, n = trained_mixture(covariance), 200_000
    means, expected = mixture.means.detach(), covariances(mixture)
    components = torch.randint(3, (n,))
    with torch.no_grad():
        z = mixture(components, torch.randn(n, 4))
    for k in range(3):
        part = z[components == k]
        torch.testing.assert_close(part.mean(0), means[k], atol=0.05, rtol=0)
        torch.testing.assert_close(part.T.cov(), expected[k], atol=0.06, rtol=0.04)
    whole = expected.mean(0) + means.T.cov(correction=0)
    torch.testing.assert_close(z.T.cov(), whole, atol=0.06, rtol=0.04)


def test_static_mixture():
    """Means uniform in [-c, c]^d, covariances sigma^2 I, nothing to train."""
    torch.manual_seed(0)
    args = Args(latent="static", latent_range=2.0, sigma=0.5, num_components=400)
    mixture = make_mixture(args)
    assert not list(mixture.parameters()) and mixture.means.shape == (400, 32)
    assert 1.99 < mixture.means.abs().max() <= 2 and abs(mixture.means.mean()) < 0.05
    assert mixture.means.var() == pytest.approx(4 / 3, rel=0.03)  # (2c)^2 / 12
    torch.testing.assert_close(covariances(mixture), 0.25 * torch.eye(32).expand(3, 32, 32))


@COVARIANCES
def test_first_covariances_of_a_trained_mixture(covariance):
    mixture = make_mixture(Args(sigma=0.5, covariance=covariance))
    torch.testing.assert_close(covariances(mixture), 0.25 * torch.eye(32).expand(3, 32, 32))


def test_normal_latent():
    mixture, noise = make_mixture(Args(latent="normal")), torch.randn(5, 32)
    assert not list(mixture.parameters()) and mixture.means.shape == (1, 32)
    assert torch.equal(mixture(torch.zeros(5, dtype=torch.long), noise), noise)


@COVARIANCES
def test_gradients_reach_means_and_covariances(covariance):
    """Against finite differences in double; nothing above the diagonal trains."""
    mixture = trained_mixture(covariance).double()
    components, noise = torch.tensor([0, 2, 2, 0]), torch.randn(4, 4, dtype=torch.float64)

    def latents(means, log_scales):
        state = {"means": means, "log_scales": log_scales}
        return torch.func.functional_call(mixture, state, (components, noise))

    assert torch.autograd.gradcheck(latents, (mixture.means, mixture.log_scales))
    latents(*mixture.parameters()).square().sum().backward()
    for parameter in mixture.parameters():
        grad = parameter.grad.tril() if parameter.dim() == 3 else parameter.grad
        assert torch.equal(parameter.grad, grad) and (grad[1] == 0).all()  # no sample of component 1
        wanted = torch.ones(4, 4).tril().bool() if parameter.dim() == 3 else torch.ones(grad.shape[1:]).bool()
        assert (grad[0][wanted] != 0).all() and (grad[2][wanted] != 0).all()


@pytest.mark.parametrize("shapes", [((3,), (4, 5), (3, 4)), ((4,), (4, 4), (3, 3)), ((4,), (4, 4), (2, 4))])
def test_latents_that_do_not_fit(shapes):
    components, noise, scales = shapes
    with pytest.raises(ValueError, match="do not fit"):
        mixture_latents(
            torch.zeros(3, 4), torch.ones(scales), torch.zeros(components).long(), torch.ones(noise)
        )


class Echo(nn.Module):
    """A generator that shows its latent."""

    def forward(self, z):
        return z


def test_samples_of_a_mixture():
    """Uniform components; truncation scales the noise alone; one component; the rng decides."""
    mixture = average(Mixture(torch.tensor([[-50.0, 0.0], [50.0, 0.0]]), 2.0, "diagonal", True), 0.9)

    def draw(seed=0, **options):
        return draw_mixture_samples(Echo(), mixture, 4000, torch.Generator().manual_seed(seed), **options)

    z = draw()
    assert torch.equal(z, draw()) and not torch.equal(z, draw(1))
    assert (z[:, 0] > 0).float().mean() == pytest.approx(0.5, abs=0.03) and z[:, 1].std() > 1.9
    assert draw(truncation=0.25)[:, 1].std() == pytest.approx(0.5, rel=0.05)
    assert set(map(tuple, draw(truncation=0.0).tolist())) == {(-50.0, 0.0), (50.0, 0.0)}
    assert (draw(component=1)[:, 0] > 0).all() and (draw(component=0)[:, 0] < 0).all()


# Losses


def test_losses_against_their_formulas():
    l_real, l_fake = torch.randn(2, 7, dtype=torch.float64)
    p_real, p_fake = 1 / (1 + (-l_real).exp()), 1 / (1 + (-l_fake).exp())
    found = [*non_saturating_losses(l_real, l_fake), *relativistic_losses(l_real, l_fake)]
    difference = l_real - l_fake
    expected = [-(p_real.log() + (1 - p_fake).log()).mean(), -p_fake.log().mean()]
    expected += [(1 + (-difference).exp()).log().mean(), (1 + difference.exp()).log().mean()]
    torch.testing.assert_close(found, expected)
    shifted = relativistic_losses(l_real + 9, l_fake + 9)
    torch.testing.assert_close(list(shifted), expected[2:])


@pytest.mark.parametrize("losses", [non_saturating_losses, relativistic_losses])
@pytest.mark.parametrize("shapes", [((4,), (5,)), ((4,), (4, 1)), ((4, 1), (4, 1))])
def test_logits_that_do_not_pair(losses, shapes):
    with pytest.raises(ValueError, match="must both be"):
        losses(*map(torch.zeros, shapes))


def reference(discriminator, x: torch.Tensor, loss, weight: float) -> tuple:
    """Loss, |grad D(x_i)|^2 (b,) and the gradients of loss + weight mean_i |grad D(x_i)|^2, by autograd of
    autograd, sample after sample."""
    points = [point.requires_grad_() for point in x.split(1)]
    logits = torch.cat([discriminator(point) for point in points]).squeeze(1)
    grads = torch.autograd.grad(logits.sum(), points, create_graph=True)
    slopes, value = torch.stack([grad.square().sum() for grad in grads]), loss(logits)
    parameters = [*discriminator.parameters()]
    found = torch.autograd.grad(value + weight * slopes.mean(), parameters, allow_unused=True)
    found = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found)]
    return value.detach(), slopes.detach(), found


@pytest.mark.parametrize("loss", [relativistic_losses, non_saturating_losses])
@pytest.mark.parametrize("arch", ["dcgan", "mlp"])
@pytest.mark.parametrize("weight", [0.0, 0.1, 5.0])
def test_penalised_gradients_against_autograd(loss, arch, weight):
    torch.manual_seed(0)
    discriminator = gmgan_mnist.make_networks(Args(arch=arch, channels=2))[1].double()
    for parameter in discriminator.parameters():  # biases that count
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(6, 1, 28, 28, dtype=torch.float64)
    of_pairs = lambda logits: loss(*logits.chunk(2))[0]  # noqa: E731
    value, slopes, expected = reference(discriminator, x, of_pairs, weight)
    found = penalised_backward(discriminator, x, of_pairs, weight, (Affine,))
    torch.testing.assert_close(found, (value, slopes))
    assert (slopes > 0).all() and slopes.std() > 1e-3 * slopes.mean() and not x.requires_grad
    torch.testing.assert_close([p.grad for p in discriminator.parameters()], expected, atol=1e-12, rtol=1e-9)
    penalised_backward(discriminator, x, of_pairs, weight, (Affine,))  # writes and does not add
    torch.testing.assert_close([p.grad for p in discriminator.parameters()], expected, atol=1e-12, rtol=1e-9)


def test_penalised_gradients_against_differences():
    """Along one direction in the space of the weights, without autograd."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.LeakyReLU(0.3), nn.Linear(6, 1)
    discriminator, x = nn.Sequential(*layers).double(), torch.randn(9, 5, dtype=torch.float64)
    loss = lambda logits: (logits.exp() * torch.arange(1, 10)).mean()  # noqa: E731
    penalised_backward(discriminator, x, loss, 0.7)
    parameters = [*discriminator.parameters()]
    direction, grads = [torch.randn_like(p) for p in parameters], [p.grad.clone() for p in parameters]

    def objective(t: float) -> float:
        moved = copy.deepcopy(discriminator)
        for p, d in zip(moved.parameters(), direction):
            p.data += t * d
        value, slopes = penalised_backward(moved, x, loss, 0.7)
        return (value + 0.7 * slopes.mean()).item()

    difference = (objective(1e-6) - objective(-1e-6)) / 2e-6
    assert sum((g * d).sum().item() for g, d in zip(grads, direction)) == pytest.approx(difference, rel=1e-6)


def test_penalty_of_a_linear_discriminator():
    """Its gradient is w everywhere: |w|^2, with the gradient 2 w, and none of the bias."""
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    w, b = discriminator[1].parameters()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    _, slopes = penalised_backward(discriminator, x, lambda logits: 0 * logits.sum(), 1.0)
    torch.testing.assert_close(slopes, w.detach().square().sum().expand(5))
    torch.testing.assert_close((w.grad, b.grad), (2 * w.detach(), torch.zeros_like(b)))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.Tanh(), nn.LeakyReLU(inplace=True), spectral_norm(nn.Linear(4, 4))],
    ids=["normalisation", "curved", "in place", "parametrised"],
)
def test_layers_that_the_penalty_cannot_pass(layer):
    discriminator = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 1))
    with pytest.raises(TypeError, match=r"layers must be Linear, .*LeakyReLU, not in place: "):
        penalised_backward(discriminator, torch.zeros(3, 4), torch.sum, 1.0)
    assert all(p.grad is None for p in discriminator.parameters())


# Rejection


def test_acceptance_against_its_formula():
    logits = torch.tensor([-30.0, -2.0, 0.5, 2.9, 3.0], dtype=torch.float64)
    ratio = np.exp(logits.numpy() - 3.0 - 1e-8)
    expected = logits.numpy() - 3.0 - np.log(1 - ratio)
    np.testing.assert_allclose(drs_scores(logits, 3.0).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(
        drs_acceptance(logits, 3.0, 0.7).numpy(), 1 / (1 + np.exp(0.7 - expected)), rtol=1e-6
    )
    torch.testing.assert_close(drs_acceptance(logits, 3.0), (logits - 3).exp(), atol=2e-8, rtol=1e-6)
    with pytest.raises(ValueError, match=r"a logit of 3.0 exceeds the largest one, 2.5"):
        drs_acceptance(logits, 2.5)


def proposals(n: int) -> torch.Tensor:
    """Samples (n, 1) of p_g = N(0, 2^2)."""
    return 2 * torch.randn(n, 1, dtype=torch.float64)


def log_ratio(x: torch.Tensor) -> torch.Tensor:
    """log p_d / p_g (n, 1) for p_d = N(1, 1)."""
    return x.square() / 8 - (x - 1).square() / 2 + math.log(2)


def test_rejection_brings_a_known_density_ratio_to_the_target():
    torch.manual_seed(0)
    x = proposals(100_000)
    logits = log_ratio(x).squeeze(1)
    top = math.log(2) + 1 / 6  # at x = 4/3
    kept = x[torch.rand(len(x)) < drs_acceptance(logits, top)]
    assert len(kept) / len(x) == pytest.approx(math.exp(-top), rel=0.02)
    assert kept.mean().item() == pytest.approx(1, abs=0.02) and kept.std().item() == pytest.approx(
        1, abs=0.02
    )


@pytest.mark.parametrize("percentile", [50.0, 90.0])
def test_samples_that_are_rejected(percentile):
    """Nearer to the target than the proposals; a higher percentile rejects more, and comes nearer."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    x, share = reject_samples(proposals, log_ratio, 5000, percentile, rng)
    # Half of a batch has a chance above 1/2 at 50; the known ratio has a gamma of 0 at the 73rd percentile.
    low, high, mean = {50.0: (0.4, 0.6, 0.7), 90.0: (0.1, 0.35, 0.95)}[percentile]
    assert x.shape == (5000, 1) and low < share < high and x.mean() > mean
    assert x.std() < (1.5 if percentile == 50 else 1.1)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_rejection_ends(value, capsys):
    """Percentile 100 accepts nearly nothing, and a broken discriminator nothing: one line, not for ever."""
    calls = []

    def draw(n):
        calls.append(n)
        return torch.linspace(-40, 0, n, dtype=torch.float64)[:, None]

    with pytest.raises(SystemExit) as stop:
        rng = torch.Generator().manual_seed(0)
        reject_samples(draw, lambda x: x + value, 50, 100.0, rng)
    assert stop.value.code == 2 and len(calls) <= 7
    assert capsys.readouterr().err.strip().endswith("of 5000, not 50; lower --drs-percentile")


def test_calibration_finds_the_log_density_ratio(capsys):
    """Images of one shade, N(150, 20^2) and N(110, 20^2): log p_d / p_g = (shade - 130) / 10. Logits of a
    relativistic loss that are 50 too high come to that; the discriminator itself stays as it was."""
    rng = torch.Generator().manual_seed(0)
    real = (
        (150 + 20 * torch.randn(5000, 1, 1, generator=rng)).clamp(0, 255).to(torch.uint8).expand(-1, 28, 28)
    )

    def draw(n):
        return (110 + 20 * torch.randn(n, 1, 1, 1, generator=rng)).expand(-1, -1, 28, 28) / 127.5 - 1

    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 1))
    nn.init.constant_(discriminator[2].weight, 0.3)
    nn.init.constant_(discriminator[2].bias, 50.0)
    before = [p.clone() for p in discriminator.parameters()]
    calibrated = calibrate(discriminator, real[1000:], real[:1000], draw, 0)
    assert all(torch.equal(p, q) for p, q in zip(discriminator.parameters(), before))
    shades = torch.linspace(100, 160, 7)
    with torch.no_grad():
        logits = calibrated(shades.view(-1, 1, 1, 1).expand(-1, 1, 28, 28) / 127.5 - 1).squeeze(1)
    torch.testing.assert_close(logits, (shades - 130) / 10, atol=0.6, rtol=0)
    assert float(capsys.readouterr().out.split("cross-entropy ")[1].split()[0]) < 0.4


# Clusters


def test_cluster_scores_of_shuffled_labels():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 10, 500))
    names = torch.from_numpy(rng.permutation(10))
    assert cluster_scores(labels, names[labels]) == pytest.approx((1, 1))
    wrong = names[labels].clone()
    wrong[:50] = names[(labels[:50] + 1) % 10]
    assert cluster_scores(labels, wrong)[0] == pytest.approx(0.9)
    assert cluster_scores(labels, torch.zeros(500).long()) == pytest.approx(
        (labels.bincount().max().item() / 500, 0)
    )


@pytest.mark.parametrize("k", [4, 10, 17])
def test_cluster_scores_against_scikit_learn(k):
    """More or fewer clusters than classes; brute force finds no better matching of four, or of seventeen,
    which may share a class."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(k)
    labels, noise = rng.integers(0, 10, 400), rng.integers(0, k, 400)
    found = np.where(rng.random(400) < 0.6, labels % k, noise)
    accuracy, nmi = cluster_scores(torch.from_numpy(labels), torch.from_numpy(found))
    assert nmi == pytest.approx(metrics.normalized_mutual_info_score(labels, found))
    if k == 4:
        best = max(
            sum((labels[found == cluster] == name).sum() for cluster, name in enumerate(names))
            for names in itertools.permutations(range(10), 4)
        )
        assert accuracy == best / 400
    if k == 17:
        assert accuracy == pytest.approx(sum(np.bincount(labels[found == c]).max() for c in range(k)) / 400)
    assert accuracy >= max(np.bincount(labels[found == c]).max() for c in range(k)) / 400


class Bars(nn.Module):
    """A generator that draws the bar of tiny_mnist at the place of its latent's largest coordinate."""

    def forward(self, z):
        images = torch.rand(len(z), 1, 28, 28) * 0.7 - 1
        for image, place in zip(images, z.argmax(1).tolist()):
            image[:, 4 + 2 * place : 6 + 2 * place, 4:24] += 1.25
        return images


def test_clustering_finds_the_components(monkeypatch):
    """Images of the bars that the components draw, in another order, are found without their labels."""
    monkeypatch.setattr(gmgan_mnist, "CLUSTER_STEPS", 40)
    torch.manual_seed(0)
    order = torch.randperm(5)
    mixture = average(Mixture(4 * torch.eye(5)[order], 0.3, "scalar", True), 0.9)
    labels = torch.arange(100) % 5
    images = ((Bars()(torch.eye(5)[labels]) + 1) * 127.5).squeeze(1).clamp(0, 255).to(torch.uint8)
    state = torch.get_rng_state()
    found = cluster_images(Bars(), mixture, images, 0, 32)
    assert torch.equal(state, torch.get_rng_state())
    accuracy, nmi = cluster_scores(labels, found)
    assert accuracy > 0.9 and nmi > 0.8
    assert (order[found] == labels).float().mean() == pytest.approx(accuracy)


# The script


@pytest.mark.curves
def test_a_run_and_what_it_leaves(tiny, monkeypatch):
    measured, measure = [], gmgan_mnist.image_metrics
    monkeypatch.setattr(
        gmgan_mnist, "image_metrics", lambda *args: measured.append(args[1]) or measure(*args)
    )
    args = tiny()
    folder = main(args)
    assert sorted(p.name for p in folder.iterdir()) == FILES
    results, lines = json.loads((folder / "results.json").read_text()), rows(folder)
    assert {"fid", "precision", "recall", "cluster_accuracy", "cluster_nmi", "floor_fid"} < results.keys()
    assert 0.1 <= results["cluster_accuracy"] <= 1 and 0 <= results["cluster_nmi"] <= 1
    assert [line["step"] for line in lines if "fid" in line] == [3, 4]
    assert all({"loss_discriminator", "loss_generator", "r1", "r2"} < line.keys() for line in lines)
    assert results["num_eval"] == 60
    # What is measured are samples of the averaged networks; a row of ten for each of three components.
    networks = averaged_networks(folder)
    drawn = draw_mixture_samples(*networks, 100, torch.Generator().manual_seed(args.seed))
    torch.testing.assert_close(measured[-1], drawn[:60])
    with Image.open(folder / "components.png") as image:
        picture = torch.from_numpy(np.asarray(image)[..., 0].copy())
    assert picture.shape == (2 + 3 * 30, 2 + 10 * 30)
    for k in range(3):
        row = draw_mixture_samples(*networks, 10, torch.Generator().manual_seed(args.seed), component=k)
        shown = picture[2 + 30 * k :][:28, 2:].unfold(1, 28, 30).permute(1, 0, 2).float()
        assert ((row.squeeze(1) + 1) * 127.5 - shown).abs().max() <= 1


OPTIONS = [
    {"latent": "normal"},
    {"latent": "normal", "arch": "mlp", "loss": "non-saturating", "gamma": 0.0},
    {"latent": "static"},
    *({"covariance": covariance} for covariance in ("scalar", "diagonal", "full")),
    {"arch": "mlp", "num_components": 1, "beta1": 0.5},
    {"loss": "non-saturating", "eval_split": "validation", "lr_decay": 0.0, "ema_decay": 0.0},
    *({"dataset": name, "gamma": 0.0} for name in ("fashion-mnist", "kmnist", "digits")),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_every_option(options, tiny, light, monkeypatch):
    """A run ends, its losses are finite, what was asked for was used, and what should train has moved."""
    calls = []
    for name in ("relativistic_losses", "non_saturating_losses", "penalised_backward"):
        function = getattr(gmgan_mnist, name)

        def called(*args, name=name, function=function, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(gmgan_mnist, name, called)
    args = tiny(num_steps=3, num_eval_samples=0, **options)
    folder = main(args)
    lines, state, results = rows(folder), load(folder), json.loads((folder / "results.json").read_text())
    assert len(lines) == 3 and all(math.isfinite(v) for line in lines for v in line.values())
    assert calls.count(args.loss.replace("-", "_") + "_losses") == 6 == len(calls) - (3 if args.gamma else 0)
    assert "cluster_nmi" not in results  # evaluation is off
    torch.manual_seed(args.seed)
    networks = gmgan_mnist.make_networks(args)
    first, last_bias = make_mixture(args).state_dict(), [*networks[1].state_dict()][-1]
    for name, network in zip(("generator", "discriminator"), networks):
        for key, parameter in network.named_parameters():
            # A constant of all logits has no gradient where only their differences count.
            if (name, key) != ("discriminator", last_bias) or args.loss == "non-saturating":
                assert not torch.equal(parameter, state[name][key]), (name, key)
    for kind, module in (("mixture", ""), ("averaged_mixture", "module.")):
        names = "means", "log_scales"
        moved = [not torch.equal(first[name], state[kind][module + name]) for name in names]
        assert moved == [args.latent == "dynamic"] * 2, kind


def test_held_out_images_are_not_trained_on(tiny, light, monkeypatch, tiny_mnist):
    seen, draw = [], gmgan_mnist.draw_batch
    monkeypatch.setattr(gmgan_mnist, "draw_batch", lambda data, n: seen.append(data) or draw(data, n))
    main(tiny(num_eval_samples=0, num_steps=1))
    x = gmgan_mnist.load_images("mnist", str(tiny_mnist), "test")[0]
    assert torch.equal(seen[0], x[8:])


def test_learning_rates_fall(tiny, light):
    """Generator and mixture have one; it falls to a share of 1 / decay steps in the last one."""
    options = {"lr_generator": 1e-3, "lr_discriminator": 2e-3, "lr_decay": 1.0}
    state = load(main(tiny(num_steps=2, num_eval_samples=0, **options)))
    assert [g["lr"] for g in state["opt_generator"]["param_groups"]] == pytest.approx([5e-4])
    assert [g["lr"] for g in state["opt_discriminator"]["param_groups"]] == pytest.approx([1e-3])


def test_half_of_gamma_weighs_each_penalty(tiny, light, monkeypatch):
    """The discriminator descends on its loss and on gamma / 2 of R1 and of R2, which are logged."""
    seen = []

    def checked(discriminator, x, loss, weight, affine):
        model, points = copy.deepcopy(discriminator), x.clone().requires_grad_()
        logits = model(points).squeeze(1)
        (grad,) = torch.autograd.grad(logits.sum(), points, create_graph=True)
        r1, r2 = (half.flatten(1).square().sum(1).mean() for half in grad.chunk(2))
        (relativistic_losses(*logits.chunk(2))[0] + 1000 * (r1 + r2)).backward()
        found = penalised_backward(discriminator, x, loss, weight, affine)
        grads = ([p.grad for p in network.parameters()] for network in (discriminator, model))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
        seen.append((r1.item(), r2.item()))
        return found

    monkeypatch.setattr(gmgan_mnist, "penalised_backward", checked)
    lines = rows(main(tiny(num_eval_samples=0, gamma=2000.0, num_steps=2)))
    assert [(line["r1"], line["r2"]) for line in lines] == [pytest.approx(pair) for pair in seen]
    assert all(abs(r1 - r2) > 1e-3 * r1 for r1, r2 in seen)  # so that neither stands for the other


def test_same_seed_same_run(tiny, light):
    first, second, third = (main(tiny(num_eval_samples=0, seed=seed)) for seed in (1, 1, 2))
    assert rows(first) == rows(second) != rows(third)
    assert all(same(load(first)[name], load(second)[name]) for name in NETWORKS)


def test_training_learns(tiny, light):
    """Seconds bring the mean image of the samples much nearer to that of the data."""
    options = {"num_steps": 60, "batch_size": 32, "channels": 8, "log_every": 20, "eval_every": 60}
    args = tiny(num_eval_samples=0, **options)
    folder, x = main(args), gmgan_mnist.load_images("mnist", args.data_dir, "test")[0]
    target, distances = gmgan_mnist.to_float(x).mean(0), []
    generator, mixture = (average(v, 0.9) for v in (gmgan_mnist.make_networks(args)[0], make_mixture(args)))
    for state in (None, load(folder)):
        if state:
            generator.load_state_dict(state["averaged"])
            mixture.load_state_dict(state["averaged_mixture"])
        samples = draw_mixture_samples(generator, mixture, 100, torch.Generator().manual_seed(0))
        distances.append((samples.mean(0) - target).square().mean().item())
    assert distances[1] < 0.3 * distances[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"latent": "normal", "arch": "mlp", "gamma": 0.0},
        {"num_eval_samples": 20, "eval_every": 2},
    ],
    ids=str,
)
def test_resume_is_bit_for_bit(options, tiny, light, monkeypatch):
    """A run stopped after 4 of 6 steps and resumed has the losses and weights of one that was not stopped."""
    options = {"num_steps": 6, "num_eval_samples": 0, **options}
    straight, args = main(tiny(**options)), tiny(**options)
    draw, calls = gmgan_mnist.draw_batch, itertools.count(1)

    def interrupted(*inputs):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(gmgan_mnist, "draw_batch", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(args)
    assert stop.value.code == 130
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert load(folder)["step"] == 4
    torch.manual_seed(1234)
    assert main(Args(resume=str(folder))) == folder
    assert rows(folder) == rows(straight)
    assert all(same(load(folder)[name], load(straight)[name]) for name in NETWORKS)


# Start from another run


def test_init_from(tiny, light, monkeypatch):
    """A mixture after a plain GAN: its networks, a latent of its own; a resume does not start over."""
    first = main(tiny(latent="normal", num_eval_samples=0))
    started, hold = {}, gmgan_mnist.Run.hold

    def held(run, **parts):
        hold(run, **parts)
        started.update({k: {n: v.clone() for n, v in parts[k].state_dict().items()} for k in NETWORKS})

    monkeypatch.setattr(gmgan_mnist.Run, "hold", held)
    second = main(tiny(init_from=str(first), num_eval_samples=0, num_steps=2))
    assert all(same(started[name], load(first)[name]) for name in ("generator", "discriminator"))
    assert started["averaged"].pop("n_averaged") == 0  # it forgets as fast as the new mixture's average
    assert same(started["averaged"], load(first)["averaged"])
    assert started["mixture"]["means"].shape == (3, 6)
    stopped = load(second)
    main(Args(resume=str(second), num_steps=3))
    assert all(same(started[name], stopped[name]) for name in NETWORKS)


def test_init_from_other_networks(tiny, light, capsys, tmp_path):
    first = main(tiny(latent="normal", num_eval_samples=0, num_steps=1))
    others = ("arch", "dcgan", "mlp"), ("channels", 4, 5), ("latent_dim", 6, 7)
    others += ("dataset", "mnist", "kmnist"), ("eval_split", "test", "validation")
    for option, theirs, value in others:
        args = tiny(init_from=str(first), num_eval_samples=0, **{option: value})
        name = "--" + option.replace("_", "-")
        assert f"--init-from {first} has {name} {theirs}, and this run {value}" in refused(capsys, args)
        assert not list(Path(args.run_dir).glob(f"{args.exp_name}__*"))
    torch.save({"script": "mmd_gan", "step": 3, "args": {}}, tmp_path / "checkpoint.pt")
    said = refused(capsys, tiny(init_from=str(tmp_path)))
    assert "comes from mmd_gan, not from gmgan_mnist" in said
    assert "there is no checkpoint" in refused(capsys, tiny(init_from=str(tmp_path / "none")))


# Generate


@pytest.fixture(scope="module")
def mixture_run(runs, tiny_mnist) -> Path:
    """A run of a few steps with three components, and its judge beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gmgan_mnist, "CLUSTER_STEPS", 3)
        patch.setattr(gmgan_mnist, "plot_curves", draw_few_pixels)
        fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": "mixture"}
        return main(Args(**(TINY | fixed)))


def averaged_networks(folder: Path) -> list[torch.nn.Module]:
    """The averaged generator and mixture of a run's checkpoint."""
    state = load(folder)
    made = Args(**state["args"])
    parts = {"averaged": gmgan_mnist.make_networks(made)[0], "averaged_mixture": make_mixture(made)}
    networks = [average(part, made.ema_decay) for part in parts.values()]
    for network, name in zip(networks, parts):
        network.load_state_dict(state[name])
    return networks


def pixels(folder: Path) -> np.ndarray:
    """The written images (n, 28, 28) in order."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


SAMPLING = {}, {"truncation": 0.5}, {"component": 2}, {"seed": 2}, {"drs": True, "drs_percentile": 80.0}


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_generate(options, mixture_run, tmp_path, capsys, monkeypatch):
    seen, reject = [], gmgan_mnist.reject_samples

    def calibrated(discriminator, real, held, draw, seed):
        seen.extend((real, held, draw(5), calibrate(discriminator, real, held, draw, seed, steps=300)))
        return seen[-1]

    def rejected(draw, discriminator, count, percentile, rng):
        seen.extend((discriminator, percentile))
        return reject(draw, discriminator, count, percentile, rng)

    monkeypatch.setattr(gmgan_mnist, "calibrate", calibrated)
    monkeypatch.setattr(gmgan_mnist, "reject_samples", rejected)
    fixed = {"generate": 12, "checkpoint": str(mixture_run / "checkpoint.pt"), "device": "cpu"}
    out = main(Args(**fixed, **options, measure=True, out=str(tmp_path / "out")))
    names = sorted(p.name for p in out.iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(12)), "metrics.json"]
    metrics, images = json.loads((out / "metrics.json").read_text()), pixels(out)
    assert metrics["num_eval"] == 12
    assert all(math.isfinite(metrics[name]) for name in ("fid", "precision", "recall"))
    assert metrics["judge"] == json.loads((mixture_run / "results.json").read_text())["judge"]
    how = {name: value for name, value in options.items() if name != "seed"}
    assert {k: metrics[k] for k in how} == how and ("drs_accepted" in metrics) == ("drs" in options)
    made = Args(**load(mixture_run)["args"])
    x, y, x_eval, y_eval = gmgan_mnist.load_images("mnist", made.data_dir, "test")
    if "drs" in options:  # trained on the images of the run, judged on those it has not seen, in whole bytes
        real, held, drawn, taken, used, percentile = seen
        assert torch.equal(real, x[8:]) and torch.equal(held, x[:8])
        torch.testing.assert_close((drawn + 1) * 127.5, ((drawn + 1) * 127.5).round(), rtol=0, atol=1e-4)
        assert used is taken and percentile == 80
    else:  # the files are what the averaged networks draw
        rng = torch.Generator().manual_seed(options.get("seed", 1))
        drawn = draw_mixture_samples(*averaged_networks(mixture_run), 12, rng, **(how))
        assert np.array_equal(images, ((drawn.squeeze(1) + 1) * 127.5).round().byte().numpy())
    # And they are what metrics.json measures.
    judge, _ = gmgan_mnist.load_judge(made, x, y)
    again = gmgan_mnist.image_metrics(judge, torch.from_numpy(images), x_eval[:12], y_eval)
    assert metrics["fid"] == pytest.approx(again["fid"], rel=1e-4)
    assert "exists; name a new folder" in refused(capsys, Args(**fixed, out=str(out)))


def test_where_the_judge_of_a_measurement_is_kept(mixture_run, tmp_path, capsys, monkeypatch):
    """In --run-dir if that is given; where nothing can be written, one line says so, before any drawing."""
    monkeypatch.setattr(gmgan_mnist, "train_judge", lambda images, labels: gmgan_mnist.make_judge().eval())
    fixed = {"generate": 12, "checkpoint": str(mixture_run / "checkpoint.pt"), "measure": True}
    (tmp_path / "file").touch()
    said = refused(capsys, Args(**fixed, run_dir=str(tmp_path / "file"), out=str(tmp_path / "out")))
    assert "cannot read or write" in said and str(tmp_path / "file") in said and "--run-dir" in said
    main(Args(**fixed, run_dir=str(tmp_path / "judges"), out=str(tmp_path / "out")))
    assert [p.name.split("__")[0] for p in (tmp_path / "judges").iterdir()] == ["judge"]


def test_generate_what_does_not_exist(mixture_run, tiny, light, tmp_path, capsys):
    normal = main(tiny(latent="normal", num_eval_samples=0, num_steps=1)) / "checkpoint.pt"
    fixed = {"generate": 12, "device": "cpu", "out": str(tmp_path / "out")}
    mixed = {"checkpoint": str(mixture_run / "checkpoint.pt")}
    assert "checkpoint.pt are 0 to 2" in refused(capsys, Args(**fixed, **mixed, component=3))
    assert "checkpoint.pt are 0 to 0" in refused(capsys, Args(**fixed, checkpoint=str(normal), component=1))
    assert not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_components": 0}, "--num-components must be positive, not 0"),
        ({"sigma": 0.0}, "--sigma must be positive, not 0.0"),
        ({"sigma": math.nan}, "--sigma must be positive, not nan"),
        ({"latent_range": -1.0}, r"--latent-range must be in \[0, inf\), not -1.0"),
        ({"gamma": -0.1}, r"--gamma must be in \[0, inf\), not -0.1"),
        ({"truncation": -0.5}, r"--truncation must be in \[0, inf\), not -0.5"),
        ({"component": -1}, r"--component must be in \[0, inf\), not -1"),
        ({"drs_percentile": 101.0}, r"--drs-percentile must be in \[0, 100\], not 101.0"),
        ({"drs_percentile": -1.0}, r"--drs-percentile must be in \[0, 100\], not -1.0"),
        ({"batch_size": 1}, "--batch-size must be at least 2, not 1"),
        ({"num_eval_samples": 5}, "--num-eval-samples must be 0 or at least 10, not 5"),
        ({"drs": True}, "--drs is for --generate: give that as well"),
        ({"component": 99}, "--component is for --generate"),
        ({"truncation": 0.5}, "--truncation is for --generate"),
        ({"out": "x"}, "--checkpoint <run>/checkpoint.pt and --out <folder> go together"),
        ({"generate": 3}, "--checkpoint <run>/checkpoint.pt and --out <folder> go together"),
        ({"generate": 3, "drs_percentile": 80.0}, "--drs-percentile is for --drs"),
        ({"generate": 3, "drs": True, "component": 1}, "--drs is calibrated on samples of all components"),
        ({"latent": "static", "covariance": "full"}, "--covariance is for --latent dynamic"),
        ({"latent": "normal", "sigma": 1.0}, "--sigma is for --latent static or dynamic"),
        ({"generate": 3, "sigma": 0.5}, "--sigma is of the run in --checkpoint"),
        ({"generate": 3, "init_from": "x"}, "--init-from is of the run in --checkpoint"),
        ({"measure": True, "generate": 5}, "--measure needs at least 10 samples, not --generate 5"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        Args(**options)


@pytest.mark.parametrize(
    "options, text",
    [
        (["--num-components", "0"], "--num-components must be positive, not 0"),
        (["--dataset", "digits", "--batch-size", "2000"], "--batch-size 2000 exceeds the 1390"),
    ],
)
def test_bad_options_of_the_command(options, text, run_cli, tmp_path):
    result = run_cli(*options, "--device", "cpu", script="gmgan_mnist.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert text in result.stderr and not (tmp_path / "runs").exists()


def test_learning_rate_that_explodes(tiny, light, capsys):
    args = tiny(num_steps=100, lr_generator=1e30, lr_discriminator=1e30, log_every=50, num_eval_samples=0)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and "not finite at step" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_trains(tiny, tmp_path):
    folder = main(tiny(device="cuda"))
    main(Args(resume=str(folder), num_steps=5))
    assert rows(folder)[-1]["step"] == 5
    options = {"generate": 12, "checkpoint": str(folder / "checkpoint.pt"), "out": str(tmp_path / "out")}
    assert len(pixels(main(Args(**options, drs=True, measure=True)))) == 12
