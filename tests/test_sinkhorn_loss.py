"""The Sinkhorn losses: values, gradients and plans against float64, and all that goes wrong elsewhere."""

import math
import warnings

import pytest
import torch
from conftest import memory_of

import sinkhorn_gan
from sinkhorn_gan import (
    mean_cost,
    minibatch_energy_distance,
    ot_cost,
    repulsive_loss,
    sinkhorn_divergence,
    sinkhorn_potentials,
    transport_plan,
)


def cloud(n: int, d: int, seed: int = 0, shift: float = 0.0, dtype=torch.float64) -> torch.Tensor:
    """n Gaussian points around (shift, ..., shift)."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=rng, dtype=torch.float64) + shift).to(dtype)


def weights_of(n: int, seed: int, orders: float = 1.0) -> torch.Tensor:
    """n weights over so many orders of magnitude, with sum one."""
    w = 10 ** (-orders * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return w / w.sum()


def brute(x, y, eps, a=None, b=None, cost="euclidean", steps=20_000, tol=1e-10):
    """f, g, the plan P and <P, C> of plain log-domain iterations in float64, from costs of differences."""
    x, y = x.detach().double(), y.detach().double()
    a = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if a is None else a.double()
    b = torch.full((len(y),), 1 / len(y), dtype=torch.float64) if b is None else b.double()
    if cost == "cosine":
        x, y = (v / v.norm(dim=1, keepdim=True) for v in (x, y))
    c = (x[:, None] - y).square().sum(2) / 2
    g = torch.zeros_like(b)
    for _ in range(steps):
        f = -eps * ((g - c) / eps + b.log()).logsumexp(1)
        last, g = g, -eps * ((f[:, None] - c) / eps + a.log()[:, None]).logsumexp(0)
        if (b * ((last - g) / eps).expm1()).abs().sum() < tol:
            break
    plan = a[:, None] * b * ((f[:, None] + g - c) / eps).exp()
    return f, g, plan, (plan * c).sum()


def brute_cost(x, y, eps, a=None, b=None, cost="euclidean"):
    """The primal (1) at the plan: <P, C> + eps KL(P | a b^T)."""
    _, _, plan, moved = brute(x, y, eps, a, b, cost)
    a, b = plan.sum(1), plan.sum(0)
    return moved + eps * (plan * (plan / (a[:, None] * b)).log()).nan_to_num().sum()


def with_gradients(function, *points) -> list[torch.Tensor]:
    """The value and its gradients in the points."""
    points = [p.clone().requires_grad_() for p in points]
    value = function(*points)
    return [value.detach(), *torch.autograd.grad(value.sum(), points)]


def relative(got, want) -> float:
    """The error as a share of the norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())


# Against float64


@pytest.mark.parametrize("cost", ["euclidean", "cosine"])
@pytest.mark.parametrize(
    "n, m, d, eps", [(5, 9, 3, 0.5), (30, 21, 2, 0.05), (16, 16, 784, 100.0), (1, 7, 4, 0.3)]
)
def test_values_against_iterations_in_float64(n, m, d, eps, cost):
    eps = min(eps, 0.5) if cost == "cosine" else eps
    x, y, a, b = cloud(n, d), cloud(m, d, 1, 0.7), weights_of(n, 0), weights_of(m, 1)
    f, g, plan, _ = brute(x, y, eps, a, b, cost)
    want = brute_cost(x, y, eps, a, b, cost)
    double = ot_cost(x, y, eps, a, b, cost=cost, tol=1e-9, max_iterations=20_000)
    assert relative(double, want) < 1e-8
    single = [v.float() for v in (x, y)]
    masses = [w.float() for w in (a, b)]
    assert relative(ot_cost(*single, eps, *masses, cost=cost), want) < 1e-3
    got_f, got_g = sinkhorn_potentials(x, y, eps, a, b, cost=cost, tol=1e-9, max_iterations=20_000)
    shift = (a @ f - b @ g) / 2
    torch.testing.assert_close(got_f, f - shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_g, g + shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a @ got_f, b @ got_g)
    got = transport_plan(x, y, eps, a, b, cost=cost, tol=1e-9, max_iterations=20_000)
    torch.testing.assert_close(got, plan, rtol=1e-6, atol=1e-9)


def test_rows_of_a_plan_are_exact():
    x, y = cloud(20, 3, dtype=torch.float32), cloud(30, 3, 1, dtype=torch.float32)
    plan = transport_plan(x, y, 0.1, tol=1e-2)
    assert plan.shape == (20, 30) and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.full((20,), 1 / 20))
    assert (plan.sum(0) - 1 / 30).abs().sum() < 2e-2
    batch = transport_plan(torch.stack((x, 2 * x)), torch.stack((y, y)), 0.1, tol=1e-6)
    torch.testing.assert_close(batch[0], transport_plan(x, y, 0.1, tol=1e-6), rtol=1e-3, atol=1e-6)


def test_gradients_by_differences():
    x, y, options = cloud(5, 2), cloud(4, 2, 1, 0.5), {"tol": 1e-11, "max_iterations": 5000}
    for loss in (ot_cost, sinkhorn_divergence):
        assert torch.autograd.gradcheck(lambda x, y, f=loss: f(x, y, 0.4, **options), (x.requires_grad_(), y))
        assert torch.autograd.gradcheck(lambda y, f=loss: f(x, y, 0.4, **options), y.requires_grad_())
        y.requires_grad_(False)


@pytest.mark.parametrize("cost", ["euclidean", "cosine"])
@pytest.mark.parametrize("loss", [ot_cost, sinkhorn_divergence])
def test_unrolled_is_the_same_and_has_second_derivatives(loss, cost):
    x, y, options = cloud(6, 3), cloud(7, 3, 1, 0.5), {"tol": 1e-10, "max_iterations": 3000, "cost": cost}
    for got, want in zip(
        with_gradients(lambda x, y: loss(x, y, 0.5, **options), x, y),
        with_gradients(lambda x, y: loss(x, y, 0.5, unroll=True, **options), x, y),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    short = options | {"max_iterations": 5, "tol": 1e-3}
    assert torch.autograd.gradgradcheck(lambda x: loss(x, y, 1.0, unroll=True, **short), x.requires_grad_())
    value = loss(x, y, 0.5, **options)
    with pytest.raises(RuntimeError, match="unroll=True"):
        torch.autograd.grad(value, x, create_graph=True)


def test_divergence_of_equal_clouds_is_zero_and_else_positive():
    x, y = cloud(40, 5, dtype=torch.float32), cloud(40, 5, 1, dtype=torch.float32)
    scale = ot_cost(x, y, 0.1).item()
    value, *grads = with_gradients(lambda x, y: sinkhorn_divergence(x, y, 0.1), x, x.clone())
    assert abs(value) < 1e-5 * scale and all(grad.abs().max() < 1e-4 for grad in grads)
    assert sinkhorn_divergence(x, y, 0.1) > 1e-3 * scale
    third = ot_cost(x, x, 0.1) / 2 + ot_cost(y, y, 0.1) / 2
    assert relative(sinkhorn_divergence(x, y, 0.1), ot_cost(x, y, 0.1) - third) < 1e-3
    assert relative(sinkhorn_divergence(x, y[:30], 0.1), sinkhorn_divergence(y[:30], x, 0.1)) < 1e-3


def test_energy_distance_and_repulsive_loss_by_their_terms():
    x1, x2, y1, y2 = (cloud(12, 4, k, 0.2 * k) for k in range(4))
    options = {"tol": 1e-9, "max_iterations": 20_000}
    terms = [(x1, y1, 1), (x1, y2, 1), (x2, y1, 1), (x2, y2, 1), (x1, x2, -2), (y1, y2, -2)]
    want = sum(sign * brute(p, q, 0.1, cost="cosine")[3] for p, q, sign in terms)
    assert relative(minibatch_energy_distance(x1, x2, y1, y2, 0.1, **options), want) < 1e-7
    got = with_gradients(lambda x1, y1: minibatch_energy_distance(x1, x2, y1, y2, 0.1, **options), x1, y1)
    parts = [
        with_gradients(lambda x1, y1, f=f: f(x1, y1), x1, y1)
        for f in (
            lambda x1, y1: ot_cost(x1, y1, 0.1, cost="cosine", **options) + 0 * y1.sum(),
            lambda x1, y1: ot_cost(x1, y2, 0.1, cost="cosine", **options) + 0 * y1.sum(),
            lambda x1, y1: ot_cost(x2, y1, 0.1, cost="cosine", **options) + 0 * x1.sum(),
            lambda x1, y1: -2 * ot_cost(x1, x2, 0.1, cost="cosine", **options) + 0 * y1.sum(),
            lambda x1, y1: -2 * ot_cost(y1, y2, 0.1, cost="cosine", **options) + 0 * x1.sum(),
        )
    ]
    for side in (1, 2):
        torch.testing.assert_close(got[side], sum(part[side] for part in parts), rtol=1e-5, atol=1e-9)
    got = with_gradients(lambda *v: repulsive_loss(*v, 0.4, **options), x1, x2, y1, y2)
    want = with_gradients(
        lambda x1, x2, y1, y2: ot_cost(y1, y2, 0.4, **options) - ot_cost(x1, x2, 0.4, **options),
        x1,
        x2,
        y1,
        y2,
    )
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-9)


def test_against_pot_and_geomloss():
    ot, geomloss = pytest.importorskip("ot"), pytest.importorskip("geomloss")
    x, y = cloud(30, 3), cloud(40, 3, 1, 0.5)
    cost = (x[:, None] - y).square().sum(2) / 2
    plan = ot.sinkhorn(torch.full((30,), 1 / 30), torch.full((40,), 1 / 40), cost, 0.3, stopThr=1e-12)
    ours = transport_plan(x, y, 0.3, tol=1e-10, max_iterations=5000)
    torch.testing.assert_close(ours, torch.as_tensor(plan), rtol=1e-5, atol=1e-8)
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.3**0.5, scaling=0.99, backend="tensorized")(x, y)
    assert relative(sinkhorn_divergence(x, y, 0.3, tol=1e-8), theirs) < 1e-3


# Batches


@pytest.mark.parametrize("m", [30, 40])
def test_a_batch_is_its_problems_each_alone(m):
    scales, shifts = torch.tensor([1.0, 10.0, 0.1, 3.0]), torch.arange(4.0)
    x = torch.stack([cloud(40, 3, k) * s for k, s in enumerate(scales)]).float()
    y = torch.stack([cloud(m, 3, 9 + k) + s for k, s in enumerate(shifts)]).float()
    a = torch.stack([weights_of(40, k) for k in range(4)]).float()
    for loss in (ot_cost, sinkhorn_divergence):
        got = with_gradients(lambda x, y, f=loss: f(x, y, 0.02, a, tol=1e-5), x, y)
        assert got[0].shape == (4,)
        for k in range(4):
            alone = with_gradients(lambda x, y, f=loss, k=k: f(x, y, 0.02, a[k], tol=1e-5), x[k], y[k])
            for g, w in zip(got, alone, strict=True):
                assert relative(g[k], w) < 2e-3
    halves = x[:, :20], x[:, 20:], y[:, : m // 2][:, :20], y[:, m // 2 :][:, :20]
    if m == 40:
        got = minibatch_energy_distance(*halves, 0.1)
        alone = torch.stack([minibatch_energy_distance(*(h[k] for h in halves), 0.1) for k in range(4)])
        torch.testing.assert_close(got, alone, rtol=1e-3, atol=1e-4)


def test_blocks_of_rows_are_the_matrix(monkeypatch):
    x, y = cloud(70, 3, dtype=torch.float32), cloud(50, 3, 1, 0.5, torch.float32)
    want = with_gradients(lambda x, y: sinkhorn_divergence(x, y, 0.05, tol=1e-4), x, y)
    monkeypatch.setattr(sinkhorn_gan, "DENSE", 100)
    monkeypatch.setattr(sinkhorn_gan, "BLOCK", 160)
    got = with_gradients(lambda x, y: sinkhorn_divergence(x, y, 0.05, tol=1e-4), x, y)
    for g, w in zip(got, want, strict=True):
        assert relative(g, w) < 1e-3


# Never a NaN


def assert_right(x, y, eps, rel=1e-3, **options) -> None:
    """A value as in float64, gradients that are finite; a warning where the iterations did not suffice."""
    for loss in (ot_cost, sinkhorn_divergence):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value, *grads = with_gradients(lambda x, y, f=loss: f(x, y, eps, **options), x, y)
        assert all(grad.isfinite().all() for grad in grads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            want = loss(x.double(), y.double(), eps, **double | {"tol": 1e-6, "max_iterations": 20_000})
        size = ot_cost(x.double(), y.double(), eps, **double).item()
        assert caught or abs(value - want) < rel * abs(size) + 1e-30, (loss.__name__, value, want)
        assert all("marginal error of" in str(w.message) for w in caught)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e15, 1e18])
def test_every_scale(scale):
    x, y = (v.float() * scale for v in (cloud(60, 4), cloud(70, 4, 1, 0.5)))
    assert_right(x, y, 0.05 * scale**2)
    assert relative(ot_cost(x, y, 0.05 * scale**2) / scale**2, ot_cost(x / scale, y / scale, 0.05)) < 1e-3


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-6, 1e-10])
def test_every_epsilon(share):
    x, y = cloud(60, 4, dtype=torch.float32), cloud(50, 4, 1, 0.5, torch.float32)
    assert_right(x, y, share * mean_cost(x, y).item(), max_iterations=300)


def test_what_was_nan():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 64, 784), generator=rng).float() * (
        torch.rand(784, generator=rng) < 0.2
    )
    for eps in (0.01, 0.0025, 0.001):
        assert_right(*pixels, eps)
    assert_right(cloud(200, 3).float() * 500, cloud(200, 3, 1).float() * 500, 0.0025)
    x = cloud(256, 16, dtype=torch.float32)
    x[0] *= 750
    assert_right(x, cloud(256, 16, 1, dtype=torch.float32), 0.05)


def test_few_points_and_duplicates():
    x, y = cloud(1, 3, dtype=torch.float32), cloud(7, 3, 1, dtype=torch.float32)
    assert ot_cost(x, y[:1], 0.1).item() == pytest.approx((x - y[0]).square().sum().item() / 2, rel=1e-5)
    assert_right(x, y, 0.1)
    many = cloud(20, 3, 2, dtype=torch.float32)
    assert_right(torch.cat((many, many)), torch.cat((many, many)), 1e-3)
    assert abs(ot_cost(x.expand(9, 3), x.expand(5, 3), 0.1)) < 1e-5


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["duplicates", "clusters", "outlier", "weights", "plain"])
def test_hard_problems_converge(kind, seed):
    """Within 2,000 iterations, for epsilons down to 1e-4 of the mean cost."""
    rng = torch.Generator().manual_seed(seed)
    n, m = (int(k) for k in torch.randint(20, 150, (2,), generator=rng))
    x, y = cloud(n, 3, seed), cloud(m, 3, seed + 50, 1.0)
    a, b = weights_of(n, seed, 6.0 * (kind == "weights")), weights_of(m, seed + 1, 6.0 * (kind == "weights"))
    if kind == "duplicates":
        y = x[torch.randint(n, (m,), generator=rng)]
    if kind == "clusters":
        x[: n // 2] += 30
        y[: m // 3] += 30
    if kind == "outlier":
        x[0] *= 300
    eps = 10 ** (-4 * torch.rand(1, generator=rng).item()) * mean_cost(x, y).item()
    x, y, a, b = (v.float() for v in (x, y, a, b))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = ot_cost(x, y, eps, a, b)
        want = ot_cost(
            *(v.double() for v in (x, y)), eps, a.double(), b.double(), tol=1e-5, max_iterations=50_000
        )
    assert relative(value, want) < 3e-3


def test_iterations_that_do_not_suffice_are_a_warning():
    x, y = cloud(30, 2, dtype=torch.float32), cloud(30, 2, 1, 3.0, torch.float32)
    with pytest.warns(
        UserWarning, match=r"3 iterations ended with a marginal error of \d.*tol=0.001"
    ) as found:
        ot_cost(x, y, 1e-3, max_iterations=3)
    assert found[0].filename == __file__  # where the user called it


# What cannot work is refused, with the value in the message

X, Y = cloud(4, 3), cloud(5, 3, 1)


@pytest.mark.parametrize(
    "x, y, eps, options, message",
    [
        (X[0], Y, 0.1, {}, r"\(3,\) and \(5, 3\)"),
        (X, Y[:, :2], 0.1, {}, r"\(4, 3\) and \(5, 2\)"),
        (X[None], Y, 0.1, {}, r"\(1, 4, 3\) and \(5, 3\)"),
        (torch.stack((X, X)), Y[None], 0.1, {}, r"\(2, 4, 3\) and \(1, 5, 3\)"),
        (X[:0], Y, 0.1, {}, r"\(0, 3\)"),
        (X, Y.float(), 0.1, {}, "torch.float64 .*torch.float32"),
        (X.half(), Y.half(), 0.1, {}, "torch.float16"),
        (X, Y.to("meta"), 0.1, {}, "cpu.*meta"),
        (X * math.nan, Y, 0.1, {}, "x and its squares must be finite"),
        (X, Y * 1e200, 0.1, {}, "y and its squares must be finite"),
        (X, 0 * Y, 0.1, {"cost": "cosine"}, "y.*not zero if the cost is cosine"),
        (X, Y, 0.0, {}, "eps.*0.0"),
        (X, Y, math.nan, {}, "eps.*nan"),
        (X, Y, 0.1, {"tol": -1.0}, "tol.*-1.0"),
        (X, Y, 0.1, {"max_iterations": 0}, "max_iterations.*0"),
        (X, Y, 0.1, {"cost": "manhattan"}, "cost must be euclidean or cosine.*'manhattan'"),
        (X, Y, 0.1, {"a": torch.ones(4).double()}, "weights of x.*sum 1.*4.0"),
        (X, Y, 0.1, {"b": torch.ones(4).double() / 4}, r"weights of y must be \(1, 5\).*\(1, 4\)"),
        (X, Y, 0.1, {"a": torch.tensor([1.5, -0.5, 0, 0]).double()}, "weights of x must not be negative"),
    ],
)
@pytest.mark.parametrize("function", [sinkhorn_potentials, ot_cost, sinkhorn_divergence, transport_plan])
def test_value_errors(function, x, y, eps, options, message):
    with pytest.raises(ValueError, match=message):
        function(x, y, eps, **options)


def test_memory_is_linear():
    """9,000 x 9,000 points need far less than the matrix of their pairs, 324 MB."""
    code = """
        import sinkhorn_gan
        def run(n):
            x, y = (torch.randn(n, 8, requires_grad=True) for _ in range(2))
            sinkhorn_gan.ot_cost(x, y, 8.0, tol=0.1).backward()
        run(600)
        start()
        run(9000)
        peak()
    """
    assert memory_of(code)[0] < 80
