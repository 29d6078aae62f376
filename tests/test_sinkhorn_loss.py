"""The Sinkhorn losses: values, gradients and plans against float64, and all that goes wrong elsewhere."""

import math
import warnings
from functools import partial

import pytest
import torch
from conftest import assert_near, cloud, memory_of, with_gradients

import sinkhorn_gan
from sinkhorn_gan import mean_cost, ot_cost, sinkhorn_divergence, transport_plan


def weights_of(n: int, seed: int, orders: float = 1.0) -> torch.Tensor:
    """n weights over so many orders of magnitude, with sum one."""
    w = 10 ** (-orders * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return w / w.sum()


def brute(x, y, eps, a, b, cost):
    """f, g, the plan, costs of differences and the primal (1), by plain log-domain iterations."""
    if cost == "cosine":
        x, y = (v / v.norm(dim=1, keepdim=True) for v in (x, y))
    c = (x[:, None] - y).square().sum(2) / 2
    g = torch.zeros_like(b)
    for _ in range(20_000):
        f = -eps * ((g - c) / eps + b.log()).logsumexp(1)
        last, g = g, -eps * ((f[:, None] - c) / eps + a.log()[:, None]).logsumexp(0)
        if (b * ((last - g) / eps).expm1()).abs().sum() < 1e-10:
            break
    product = a[:, None] * b
    plan = product * ((f[:, None] + g - c) / eps).exp()
    value = (plan * c).sum() + eps * (plan * (plan / product).log()).nan_to_num().sum()
    return f, g, plan, c, value


FUNCTIONS = ot_cost, sinkhorn_divergence, transport_plan, sinkhorn_gan.sinkhorn_potentials
COSTS = pytest.mark.parametrize("cost", ["euclidean", "cosine"])


@COSTS
@pytest.mark.parametrize(
    "n, m, d, eps", [(5, 9, 3, 0.5), (30, 21, 2, 0.05), (16, 16, 784, 100.0), (1, 7, 4, 0.3)]
)
def test_values_against_iterations_in_float64(n, m, d, eps, cost):
    eps = min(eps, 0.5) if cost == "cosine" else eps
    a, b = weights_of(n, 0), weights_of(m, 1)
    problem = cloud(n, d), cloud(m, d, 1, 0.7), eps, a, b, cost
    f, g, plan, costs, value = brute(*problem)
    assert_near(mean_cost(*problem[:2], cost), costs.mean(), 1e-12)
    options = {"tol": 1e-9, "max_iterations": 20_000}
    assert_near(ot_cost(*problem, **options), value, 1e-8)
    single = [v.float() if isinstance(v, torch.Tensor) else v for v in problem]
    assert_near(ot_cost(*single), value, 1e-3)
    shift = (a @ f - b @ g) / 2
    got = sinkhorn_gan.sinkhorn_potentials(*problem, **options)
    torch.testing.assert_close(got, (f - shift, g + shift), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(transport_plan(*problem, **options), plan, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(transport_plan(*problem, tol=0.5).sum(1), a)  # exact at any tolerance


@pytest.mark.parametrize("loss", [ot_cost, sinkhorn_divergence])
def test_gradients_by_differences(loss):
    """Of both sides, and of one alone."""
    x, y = cloud(5, 2), cloud(4, 2, 1, 0.5)
    for x_free, y_free in ((True, True), (True, False), (False, True)):
        points = x.requires_grad_(x_free), y.requires_grad_(y_free)
        assert torch.autograd.gradcheck(lambda x, y: loss(x, y, 0.4, tol=1e-11, max_iterations=5000), points)


@COSTS
@pytest.mark.parametrize("loss", [ot_cost, sinkhorn_divergence])
def test_unrolled_is_the_same_and_has_second_derivatives(loss, cost):
    x, y, options = cloud(6, 3), cloud(7, 3, 1, 0.5), {"tol": 1e-10, "max_iterations": 3000, "cost": cost}
    got = with_gradients(lambda x, y: loss(x, y, 0.5, **options), x, y)
    assert_near(got, with_gradients(lambda x, y: loss(x, y, 0.5, unroll=True, **options), x, y), 1e-6)
    short = options | {"max_iterations": 5, "tol": 1e-3}
    assert torch.autograd.gradgradcheck(lambda x: loss(x, y, 1.0, unroll=True, **short), x.requires_grad_())
    with pytest.raises(RuntimeError, match="unroll=True"):
        torch.autograd.grad(loss(x, y, 0.5, **options), x, create_graph=True)


def test_divergence_of_equal_clouds_is_zero_and_else_positive():
    x, y = cloud(40, 5, dtype=torch.float32), cloud(40, 5, 1, dtype=torch.float32)
    scale = ot_cost(x, y, 0.1).item()
    value, *grads = with_gradients(lambda x, y: sinkhorn_divergence(x, y, 0.1), x, x.clone())
    assert abs(value) < 1e-5 * scale and all(grad.abs().max() < 1e-4 for grad in grads)
    for v in (y, y[:30]):
        found = sinkhorn_divergence(x, v, 0.1)
        assert found > 1e-3 * scale
        assert_near(found, ot_cost(x, v, 0.1) - ot_cost(x, x, 0.1) / 2 - ot_cost(v, v, 0.1) / 2, 1e-3)
        assert_near(found, sinkhorn_divergence(v, x, 0.1), 1e-3)


def test_energy_distance_and_repulsive_loss_by_their_terms():
    """The value of the one has no entropy, and its gradient is that with it."""
    clouds = [cloud(12, 4, k, 0.2 * k) for k in range(4)]
    options = {"tol": 1e-9, "max_iterations": 20_000}

    def energy(w, x1, x2, y1, y2):
        across = w(x1, y1) + w(x1, y2) + w(x2, y1) + w(x2, y2)
        return across - 2 * w(x1, x2) - 2 * w(y1, y2)

    value, *grads = with_gradients(
        lambda *v: sinkhorn_gan.minibatch_energy_distance(*v, 0.1, **options), *clouds
    )

    def moved(x, y):
        even = torch.full((12,), 1 / 12, dtype=torch.float64)
        _, _, plan, costs, _ = brute(x, y, 0.1, even, even, "cosine")
        return (plan * costs).sum()

    assert_near(value, energy(moved, *clouds), 1e-7)
    cost = partial(ot_cost, eps=0.1, cost="cosine", **options)
    _, *want = with_gradients(lambda *v: energy(cost, *v), *clouds)
    assert_near(grads, want, 1e-5)
    got = with_gradients(lambda *v: sinkhorn_gan.repulsive_loss(*v, 0.4, **options), *clouds)
    cost = partial(ot_cost, eps=0.4, **options)
    assert_near(got, with_gradients(lambda x1, x2, y1, y2: cost(y1, y2) - cost(x1, x2), *clouds), 1e-6)


def test_against_pot_and_geomloss():
    ot, geomloss = pytest.importorskip("ot"), pytest.importorskip("geomloss")
    x, y = cloud(30, 3), cloud(40, 3, 1, 0.5)
    cost = (x[:, None] - y).square().sum(2) / 2
    plan = ot.sinkhorn(torch.full((30,), 1 / 30), torch.full((40,), 1 / 40), cost, 0.3, stopThr=1e-12)
    ours = transport_plan(x, y, 0.3, tol=1e-10, max_iterations=5000)
    torch.testing.assert_close(ours, torch.as_tensor(plan), rtol=1e-5, atol=1e-8)
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.3**0.5, scaling=0.99, backend="tensorized")(x, y)
    assert_near(sinkhorn_divergence(x, y, 0.3, tol=1e-8), theirs, 1e-3)


@pytest.mark.parametrize("loss", [ot_cost, sinkhorn_divergence])
@pytest.mark.parametrize("m", [30, 40])
def test_a_batch_is_its_problems_each_alone(loss, m):
    """Problems of other scales, other means and other weights."""
    x = torch.stack([cloud(40, 3, k) * s for k, s in enumerate((1.0, 10.0, 0.1, 3.0))]).float()
    y = torch.stack([cloud(m, 3, 9 + k, shift) for k, shift in enumerate((0.0, 1.0, 2.0, 3.0))]).float()
    a = torch.stack([weights_of(40, k) for k in range(4)]).float()
    got = with_gradients(lambda x, y: loss(x, y, 0.02, a, tol=1e-5), x, y)
    assert got[0].shape == (4,)
    for k in range(4):
        alone = with_gradients(lambda x, y, k=k: loss(x, y, 0.02, a[k], tol=1e-5), x[k], y[k])
        assert_near([v[k] for v in got], alone, 2e-3)


def test_a_batch_of_other_functions():
    halves = [torch.stack([cloud(20, 3, 4 * k + i, i / 2) * (1 + k) for k in range(4)]) for i in range(4)]
    for function, clouds in (
        (lambda *v: sinkhorn_gan.minibatch_energy_distance(*v, 0.1), halves),
        (lambda *v: transport_plan(*v, 0.1, tol=1e-6), halves[:2]),
        (mean_cost, halves[:2]),
    ):
        alone = [function(*(v[k] for v in clouds)) for k in range(4)]
        torch.testing.assert_close(function(*clouds), torch.stack(alone), rtol=1e-3, atol=1e-6)


def test_blocks_of_rows_are_the_matrix(monkeypatch):
    x, y = cloud(70, 3, dtype=torch.float32), cloud(50, 3, 1, 0.5, torch.float32)
    want = with_gradients(lambda x, y: sinkhorn_divergence(x, y, 0.05, tol=1e-4), x, y)
    monkeypatch.setattr(sinkhorn_gan, "DENSE", 100)
    monkeypatch.setattr(sinkhorn_gan, "BLOCK_PAIRS", 160)
    assert_near(with_gradients(lambda x, y: sinkhorn_divergence(x, y, 0.05, tol=1e-4), x, y), want, 1e-3)


def assert_right(x, y, eps, max_iterations=2000) -> None:
    """A value as in float64, gradients that are finite; a warning where the iterations did not suffice."""
    long = {"tol": 1e-6, "max_iterations": 20_000}
    for loss in (ot_cost, sinkhorn_divergence):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = partial(loss, eps=eps, max_iterations=max_iterations)
            value, *grads = with_gradients(found, x, y)
        assert all(grad.isfinite().all() for grad in grads)
        assert all("marginal error of" in str(w.message) for w in caught)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want, size = (f(x.double(), y.double(), eps, **long) for f in (loss, ot_cost))
        assert caught or abs(value - want) < 1e-3 * abs(size) + 1e-30, (loss.__name__, value, want)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e15, 1e18])
def test_every_scale(scale):
    x, y = (v.float() * scale for v in (cloud(60, 4), cloud(70, 4, 1, 0.5)))
    assert_right(x, y, 0.05 * scale**2)
    assert_near(ot_cost(x, y, 0.05 * scale**2) / scale**2, ot_cost(x / scale, y / scale, 0.05), 1e-3)


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-6, 1e-10])
def test_every_epsilon(share):
    x, y = cloud(60, 4, dtype=torch.float32), cloud(50, 4, 1, 0.5, torch.float32)
    assert_right(x, y, share * mean_cost(x, y).item(), max_iterations=300)


def test_what_was_nan():
    rng = torch.Generator().manual_seed(0)
    ink = torch.rand(784, generator=rng) < 0.2
    pixels = torch.randint(0, 256, (2, 64, 784), generator=rng) * ink.float()
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
    """Within 1,000 iterations, for epsilons down to 1e-4 of the mean cost: without annealing two fail."""
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
        value = ot_cost(x, y, eps, a, b, max_iterations=1000)
        x, y, a, b = (v.double() for v in (x, y, a, b))
        assert_near(value, ot_cost(x, y, eps, a, b, tol=1e-5, max_iterations=50_000), 3e-3)


def test_iterations_that_do_not_suffice_are_a_warning():
    x, y = cloud(30, 2, dtype=torch.float32), cloud(30, 2, 1, 3.0, torch.float32)
    message = r"3 iterations ended with a marginal error of \d.*tol=0.001"
    for function in FUNCTIONS:
        with pytest.warns(UserWarning, match=message) as found:
            function(x, y, 1e-3, max_iterations=3)
        assert found[0].filename == __file__  # where the user called it


X, Y = cloud(4, 3), cloud(5, 3, 1)


@pytest.mark.parametrize(
    "x, y, eps, options, message",
    [
        (X[0], Y, 0.1, {}, r"\(3,\) and \(5, 3\)"),
        (X, Y[:, :2], 0.1, {}, r"\(4, 3\) and \(5, 2\)"),
        (torch.stack((X, X)), Y[None], 0.1, {}, r"\(2, 4, 3\) and \(1, 5, 3\)"),
        (X[:0], Y, 0.1, {}, r"\(0, 3\)"),
        (X, Y.float(), 0.1, {}, "torch.float64 .*torch.float32"),
        (X.half(), Y.half(), 0.1, {}, "torch.float16"),
        (X, Y.to("meta"), 0.1, {}, "cpu.*meta"),
        (X * math.nan, Y, 0.1, {}, "x and its squares must be finite"),
        (X, Y * 1e200, 0.1, {}, "y and its squares must be finite"),
        (X, 0 * Y, 0.1, {"cost": "cosine"}, "y.*not zero if the cost is cosine"),
        (X, Y, 0.0, {}, "eps.*0.0"),
        (X, Y, 0.1, {"tol": math.nan}, "tol.*nan"),
        (X, Y, 0.1, {"max_iterations": 0}, "max_iterations.*0"),
        (X, Y, 0.1, {"cost": "manhattan"}, "cost must be euclidean or cosine.*'manhattan'"),
        (X, Y, 0.1, {"a": torch.ones(4).double()}, "weights of x.*sum 1.*4.0"),
        (X, Y, 0.1, {"b": torch.ones(4).double() / 4}, r"weights of y must be \(1, 5\).*\(1, 4\)"),
        (X, Y, 0.1, {"a": torch.tensor([1.5, -0.5, 0, 0]).double()}, "weights of x must not be negative"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_value_errors(function, x, y, eps, options, message):
    """What cannot work is refused, with the value in the message."""
    with pytest.raises(ValueError, match=message):
        function(x, y, eps, **options)
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu"):
        function(X, Y, 0.1)


def test_memory_is_linear():
    """9,000 x 9,000 points need far less than the matrix of their pairs, 324 MB."""
    code = """
        import sinkhorn_gan
        def run(n):
            x, y = (torch.randn(n, 8, requires_grad=True) for _ in range(2))
            sinkhorn_gan.ot_cost(x, y, 8.0, tol=0.1).backward()
        run(600)
        peak()
        run(9000)
        peak()
    """
    assert memory_of(code)[0] < 80
