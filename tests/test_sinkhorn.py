"""The losses of sinkhorn_gan.py against a float64 log-domain solver, POT, GeomLoss and exact assignment."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.autograd import grad, gradcheck

import sinkhorn_gan
from sinkhorn_gan import minibatch_energy_distance, ot_cost, sinkhorn_divergence, sinkhorn_potentials

torch.set_num_threads(1)
ROADS = ["dense", "blocked"]
COSTS = ["euclidean", "cosine"]
TIGHT = {"tol": 1e-11, "max_iterations": 20_000}


def cloud(n, d, seed=0, dtype=torch.float64, shift=0.0, scale=1.0):
    """n Gaussian points in d dimensions."""
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * z + shift).to(dtype)


def clusters(n, d, seed=0, dtype=torch.float64):
    """n points in five tight clusters of random sizes, in the same places for every seed."""
    rng = torch.Generator().manual_seed(seed)
    which = torch.multinomial(torch.rand(5, generator=rng), n, True, generator=rng)
    return (3 * cloud(5, d, 99)[which] + 0.3 * cloud(n, d, seed + 1000)).to(dtype)


def weights(n, seed=0, dtype=torch.float64):
    """n random weights with sum one."""
    w = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return (w / w.sum()).to(dtype)


def uniform(x):
    return x.new_full((len(x),), 1 / len(x))


def brute_cost(x, y, cost="euclidean"):
    """The matrix of costs, from the differences x_i - y_j, or from the cosines."""
    if cost == "cosine":
        return 1 - (x[:, None] * y).sum(-1) / (x.norm(dim=1)[:, None] * y.norm(dim=1))
    return (x[:, None] - y).square().sum(-1) / 2


def mean_cost(x, y):
    return brute_cost(x.double(), y.double()).mean().item()


def brute_potentials(c, eps, a, b):
    """f and g in float64: annealed half-steps by log-sum-exp, then Newton's method on a.f(g) + b.g."""

    def half_step(g, eps):
        return -eps * ((g - c) / eps + b.log()).logsumexp(1)

    g, warm = torch.zeros_like(b), max(eps, c.max().item())
    while True:
        for _ in range(50):
            g = -warm * ((half_step(g, warm)[:, None] - c) / warm + a.log()[:, None]).logsumexp(0)
        if warm == eps:
            break
        warm = max(eps, warm / 2)
    for _ in range(30):
        f = half_step(g, eps)
        plan = a[:, None] * b * ((f[:, None] + g - c) / eps).exp()
        hessian = plan.sum(0).diag() - plan.T @ (plan / a[:, None])
        step = eps * torch.linalg.pinv(hessian, rtol=1e-13, hermitian=True) @ (b - plan.sum(0))
        while step.abs().max() > 1e-14 and a @ half_step(g + step, eps) + b @ (g + step) < a @ f + b @ g:
            step = step / 2
        g = g + step
    return half_step(g, eps), g


def brute(x, y, eps, a=None, b=None, cost="euclidean"):
    """Value (1), <P, C> and the gradients of (1) in x and y, all in float64."""
    x, y = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    a, b = (uniform(p) if w is None else w.double() for p, w in ((x, a), (y, b)))
    c = brute_cost(x, y, cost)
    f, g = brute_potentials(c.detach(), eps, a, b)
    plan = a[:, None] * b * ((f[:, None] + g - c.detach()) / eps).exp()
    moved = (plan * c).sum()
    kl = (plan * ((f[:, None] + g - c.detach()) / eps)).sum()
    return (moved + eps * kl).detach(), moved.detach(), *grad(moved, (x, y))


def brute_divergence(x, y, eps, a=None, b=None, cost="euclidean"):
    """The debiased value and its gradients in x and y, in float64."""
    xy, xx, yy = (brute(*p, cost) for p in ((x, y, eps, a, b), (x, x, eps, a, a), (y, y, eps, b, b)))
    return xy[0] - (xx[0] + yy[0]) / 2, xy[2] - (xx[2] + xx[3]) / 2, xy[3] - (yy[2] + yy[3]) / 2


def value_and_gradients(loss, x, y, *rest, **options):
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    value = loss(x, y, *rest, **options)
    assert value.shape == () and value.dtype == x.dtype
    return value.detach(), *grad(value, (x, y))


def relative(ours, theirs):
    """Error of a tensor as a share of its norm."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


# Against brute force

SHAPES = [(12, 9, 3), (7, 20, 1), (40, 35, 8), (1, 6, 2), (6, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_cost_and_gradients(n, m, d, cost, road, weighted, monkeypatch):
    monkeypatch.setattr(sinkhorn_gan, "BLOCK", 64)
    x, y = cloud(n, d), cloud(m, d, 1, shift=0.5)
    a, b = (weights(n), weights(m, 1)) if weighted else (None, None)
    eps = 0.1 * brute_cost(x, y, cost).mean().item() + 1e-3
    ours = value_and_gradients(ot_cost, x, y, eps, a, b, cost, road=road, **TIGHT)
    value, _, *theirs = brute(x, y, eps, a, b, cost)
    torch.testing.assert_close(ours[0], value, rtol=1e-9, atol=1e-12)
    for p, q in zip(ours[1:], theirs):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    ours = value_and_gradients(sinkhorn_divergence, x, y, eps, a, b, cost, road=road, **TIGHT)
    for p, q in zip(ours, brute_divergence(x, y, eps, a, b, cost)):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("road", ROADS)
def test_potentials(road):
    x, y, a, b = cloud(15, 3), cloud(11, 3, 1), weights(15), weights(11, 1)
    f, g, info = sinkhorn_potentials(x, y, 0.3, a, b, return_info=True, road=road, **TIGHT)
    assert info["error"] <= 1e-11 and 1 < info["iterations"] < 1000
    plan = a[:, None] * b * ((f[:, None] + g - brute_cost(x, y)) / 0.3).exp()
    torch.testing.assert_close(plan.sum(1), a)
    torch.testing.assert_close(plan.sum(0), b)
    assert (a @ f).item() == pytest.approx((b @ g).item())
    h, k = brute_potentials(brute_cost(x, y), 0.3, a, b)
    torch.testing.assert_close(f - a @ f, h - a @ h)
    torch.testing.assert_close(g - b @ g, k - b @ k)


def test_potentials_of_points_with_themselves():
    """x and y the same tensor goes a way of its own, but only if their weights are the same."""
    x, a, b = cloud(15, 3), weights(15), weights(15, 1)
    f, g = sinkhorn_potentials(x, x, 0.3, a, a, **TIGHT)
    torch.testing.assert_close(f, g)
    torch.testing.assert_close(f - a @ f, sinkhorn_potentials(x, x.clone(), 0.3, a, a, **TIGHT)[0] - a @ f)
    torch.testing.assert_close(ot_cost(x, x, 0.3, a, b, **TIGHT), brute(x, x, 0.3, a, b)[0])


@pytest.mark.parametrize("share, value_within, gradient_within", [(0.05, 1e-3, 1e-2), (1e-2, 1e-3, 3e-2)])
@pytest.mark.parametrize("make, d", [(cloud, 1), (cloud, 2), (cloud, 16), (cloud, 64), (clusters, 16)])
def test_default_tolerance_in_float32(make, d, share, value_within, gradient_within):
    """What the default settings promise: value to 1e-3, gradient to 1e-2 at eps = 0.05 mean cost."""
    x, y = make(200, d, 0, torch.float32), make(150, d, 1, torch.float32) + 0.3
    eps = share * mean_cost(x, y)
    ours = value_and_gradients(sinkhorn_divergence, x, y, eps)
    theirs = value_and_gradients(sinkhorn_divergence, x.double(), y.double(), eps, **TIGHT)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=value_within)
    assert relative(ours[1], theirs[1]) < gradient_within
    assert relative(ours[2], theirs[2]) < gradient_within


@pytest.mark.parametrize("make", [cloud, clusters])
def test_roads_agree(make, monkeypatch):
    monkeypatch.setattr(sinkhorn_gan, "BLOCK", 1000)
    for dtype, rtol in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        x, y = make(300, 5, 0, dtype), make(170, 5, 1, dtype) + 0.2
        results = [
            value_and_gradients(loss, x, y, share * mean_cost(x, y), road=road)
            for loss in (ot_cost, sinkhorn_divergence)
            for road in ROADS
            for share in (0.05, 1e-2)
        ]
        for dense, blocked in zip(results[:2] + results[4:6], results[2:4] + results[6:]):
            for p, q in zip(dense, blocked):
                assert relative(p, q) < (rtol if p.dim() == 0 else 30 * rtol)


def test_size_decides_the_road(monkeypatch):
    roads = []
    kernel = sinkhorn_gan.GibbsKernel
    monkeypatch.setattr(sinkhorn_gan, "GibbsKernel", lambda *args: roads.append(args[-1]) or kernel(*args))
    monkeypatch.setattr(sinkhorn_gan, "DENSE", 50)
    for n, dense in ((10, True), (11, False)):
        roads.clear()
        sinkhorn_potentials(cloud(n, 2), cloud(5, 2, 1), 1.0)
        assert set(roads) == {dense}


# Against other libraries


@pytest.mark.parametrize("share", [0.5, 0.05])
def test_pot(share):
    ot = pytest.importorskip("ot")
    x, y, a, b = cloud(40, 3), cloud(30, 3, 1), weights(40), weights(30, 1)
    eps = share * mean_cost(x, y)
    c = brute_cost(x, y).numpy()
    plan, log = ot.sinkhorn(
        a.numpy(), b.numpy(), c, eps, method="sinkhorn_log", stopThr=1e-12, numItermax=10_000, log=True
    )
    f, g = sinkhorn_potentials(x, y, eps, a, b, **TIGHT)
    ours = a[:, None] * b * ((f[:, None] + g - torch.from_numpy(c)) / eps).exp()
    np.testing.assert_allclose(ours, plan, rtol=1e-6, atol=1e-12)
    # POT's potentials are those of KL(P | 1): they hold the logarithms of the weights.
    theirs = torch.from_numpy(log["log_u"]) * eps - eps * a.log()
    torch.testing.assert_close(f - f[0], theirs - theirs[0], rtol=1e-6, atol=1e-8)
    value = (plan * c).sum() + eps * (plan * np.log(plan / (a[:, None] * b).numpy())).sum()
    assert ot_cost(x, y, eps, a, b, **TIGHT).item() == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("debias", [True, False])
def test_geomloss(debias):
    geomloss = pytest.importorskip("geomloss")
    x, y, a, b = cloud(40, 3), cloud(30, 3, 1, shift=0.7), weights(40), weights(30, 1)
    blur = math.sqrt(0.1 * mean_cost(x, y))
    loss = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=blur, scaling=0.995, debias=debias, backend="tensorized"
    )
    theirs = value_and_gradients(lambda x, y: loss(a, x, b, y), x, y)
    ours = value_and_gradients(sinkhorn_divergence if debias else ot_cost, x, y, blur**2, a, b, **TIGHT)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-4)
    assert relative(ours[1], theirs[1]) < 1e-2 and relative(ours[2], theirs[2]) < 1e-2


# Gradients


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("loss", [ot_cost, sinkhorn_divergence])
def test_gradcheck(loss, cost, unroll):
    x, y = cloud(5, 2).requires_grad_(), (cloud(4, 2, 1) + 0.5).requires_grad_()
    a, b, eps = weights(5), weights(4, 1), 0.3
    options = {"cost": cost, "unroll": unroll, **TIGHT}
    assert gradcheck(lambda x, y: loss(x, y, eps, a, b, **options), (x, y))
    assert gradcheck(lambda x: loss(x, y.detach(), eps, a, b, **options), (x,))
    assert gradcheck(lambda y: loss(x.detach(), y, eps, a, b, **options), (y,))


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_gradcheck_of_a_few_unrolled_iterations(iterations):
    """The gradient through the iterations is that of the value that they reached, converged or not."""
    x, y = cloud(5, 2).requires_grad_(), (cloud(4, 2, 1) + 0.5).requires_grad_()
    options = {"unroll": True, "max_iterations": iterations, "tol": 1e-30}
    for loss in (ot_cost, sinkhorn_divergence):
        assert gradcheck(lambda x, y, loss=loss: loss(x, y, 0.1, **options), (x, y))


@pytest.mark.parametrize("loss", [ot_cost, sinkhorn_divergence])
def test_both_gradient_modes_agree(loss):
    x, y, a, b = cloud(12, 3), cloud(9, 3, 1, shift=0.5), weights(12), weights(9, 1)
    ours = value_and_gradients(loss, x, y, 0.5, a, b, **TIGHT)
    theirs = value_and_gradients(loss, x, y, 0.5, a, b, unroll=True, **TIGHT)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_unrolled_has_second_derivatives_and_the_envelope_says_that_it_has_none():
    x, y = cloud(4, 2).requires_grad_(), cloud(5, 2, 1)
    (first,) = grad(ot_cost(x, y, 0.5, unroll=True), x, create_graph=True)
    assert grad(first.square().sum(), x)[0].isfinite().all()
    with pytest.raises(RuntimeError, match=r"no second derivatives.*unroll=True"):
        grad(ot_cost(x, y, 0.5), x, create_graph=True)


@pytest.mark.parametrize("loss", [ot_cost, sinkhorn_divergence])
def test_one_input_without_gradient(loss):
    x, y = cloud(9, 3), cloud(6, 3, 1)
    _, *expected = value_and_gradients(loss, x, y, 0.5)
    for i in (0, 1):
        points = [x.clone(), y.clone()]
        points[i].requires_grad_()
        torch.testing.assert_close(grad(loss(*points, 0.5), points[i])[0], expected[i])
    assert not loss(x, y, 0.5).requires_grad
    with torch.no_grad():
        assert not loss(x.clone().requires_grad_(), y, 0.5).requires_grad


@pytest.mark.parametrize("cost", COSTS)
def test_backward_accumulates_into_leaves(cost):
    """The usual way of use, loss.backward(), with both inputs from one network."""
    net, x, y = nn.Linear(4, 3).double(), cloud(8, 4), cloud(8, 4, 1)
    (3 * sinkhorn_divergence(net(x), net(y), 0.2, cost=cost, **TIGHT)).backward()
    ours = net.weight.grad.clone()
    net.weight.grad = None
    (3 * sinkhorn_divergence(net(x), net(y), 0.2, cost=cost, unroll=True, **TIGHT)).backward()
    torch.testing.assert_close(ours, net.weight.grad)


# The minibatch energy distance


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("n, m", [(8, 8), (6, 9)])
def test_minibatch_energy_distance(cost, n, m, road):
    """Value and gradient from six plans that are held constant."""
    halves = [cloud(n, 3, 0), cloud(m, 3, 1), cloud(m, 3, 2) + 0.5, cloud(n, 3, 3) + 0.5]
    for p in halves:
        p.requires_grad_()
    ours = minibatch_energy_distance(*halves, 0.1, cost, road=road, **TIGHT)
    theirs = 0
    for i, j, sign in ((0, 2, 1), (0, 3, 1), (1, 2, 1), (1, 3, 1), (0, 1, -2), (2, 3, -2)):
        x, y = halves[i], halves[j]
        c, a, b = brute_cost(x, y, cost), uniform(x), uniform(y)
        f, g = brute_potentials(c.detach(), 0.1, a.detach(), b.detach())
        plan = a[:, None] * b * ((f[:, None] + g - c) / 0.1).exp()
        theirs = theirs + sign * (plan.detach() * c).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(grad(ours, halves), grad(theirs, halves), rtol=1e-6, atol=1e-8)


def test_repulsive_loss():
    """Larger for fakes spread out, smaller for reals spread out; the cost of halves, and its gradients."""
    x1, x2, y1, y2 = (cloud(n, 3, s) for s, n in enumerate((9, 8, 7, 6)))
    for p in (x1, x2, y1, y2):
        p.requires_grad_()
    value = sinkhorn_gan.repulsive_loss(x1, x2, y1, y2, 0.3, **TIGHT)
    theirs = ot_cost(y1, y2, 0.3, **TIGHT) - ot_cost(x1, x2, 0.3, **TIGHT)
    torch.testing.assert_close(value, theirs)
    torch.testing.assert_close(grad(value, (x1, x2, y1, y2)), grad(theirs, (x1, x2, y1, y2)))
    assert sinkhorn_gan.repulsive_loss(x1, x2, 2 * y1, 2 * y2, 0.3) > value
    assert sinkhorn_gan.repulsive_loss(2 * x1, 2 * x2, y1, y2, 0.3) < value


@pytest.mark.parametrize("cost", COSTS)
def test_mean_cost(cost):
    x, y = cloud(9, 3, shift=100.0), cloud(8, 3, 1, shift=99.0)
    torch.testing.assert_close(sinkhorn_gan.mean_cost(x, y, cost), brute_cost(x, y, cost).mean())
    near, noise = torch.ones(9, 16), cloud(9, 16, 2, torch.float32)
    x, y = near + 1e-4 * noise, near - 1e-4 * noise  # no cancellation
    exact = brute_cost(x.double(), y.double(), cost).mean().item()
    assert sinkhorn_gan.mean_cost(x, y, cost).item() == pytest.approx(exact, rel=0.05)


def test_minibatch_energy_distance_sees_a_difference():
    same = minibatch_energy_distance(*(cloud(100, 4, s, torch.float32, 1.0) for s in range(4)), 0.01).item()
    halves = [cloud(100, 4, s, torch.float32, shift) for s, shift in enumerate((1.0, 1.0, -1.0, -1.0))]
    assert abs(same) < 0.1 < 1 < minibatch_energy_distance(*halves, 0.01).item()


# Where others break

HARD = [pytest.param(make, d, share, id=f"{make.__name__}-{d}-{share}")
        for make, d in ((cloud, 1), (cloud, 2), (cloud, 16), (clusters, 2), (clusters, 16))
        for share in (1e-2, 1e-3, 1e-4)]  # fmt: skip


@pytest.mark.parametrize("make, d, share", HARD)
def test_small_epsilon(make, d, share):
    """float32 by default agrees with a converged float64 solution to 1e-3 of the value, down to 1e-4."""
    x, y = make(50, d, 0, torch.float32), make(40, d, 1, torch.float32) + 0.3
    eps = share * mean_cost(x, y)
    value = sinkhorn_divergence(x, y, eps).item()
    expected = sinkhorn_divergence(x.double(), y.double(), eps, tol=1e-6, max_iterations=20_000).item()
    assert value == pytest.approx(expected, rel=1e-3)


def test_small_epsilon_against_brute_force():
    x, y = cloud(12, 2), cloud(10, 2, 1, shift=0.5)
    for share in (1e-2, 1e-3, 1e-4):
        eps = share * mean_cost(x, y)
        value, *_ = brute_divergence(x, y, eps)
        for dtype, rtol in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
            ours = sinkhorn_divergence(x.to(dtype), y.to(dtype), eps, tol=1e-4)
            assert ours.item() == pytest.approx(value.item(), rel=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.05, 1e-4])
@pytest.mark.parametrize("gap", [10, 1000])
def test_clouds_far_apart(gap, share, dtype):
    """A gap between clouds adds half its square to the value; the plan does not see it."""
    x, y = cloud(50, 3, 0, dtype), cloud(40, 3, 1, dtype) + gap
    y0 = y - y.mean(0) + x.mean(0)
    eps = share * mean_cost(x, y0)
    far = value_and_gradients(sinkhorn_divergence, x, y, eps)
    near = value_and_gradients(sinkhorn_divergence, x.double(), y0.double(), eps, tol=1e-6)
    between = x.double().mean(0) - y.double().mean(0)
    rest = far[0].item() - (between @ between).item() / 2
    rounding = 1e-3 * near[0].item() + (1e-7 if dtype == torch.float32 else 1e-15) * 3 * gap**2
    assert abs(rest - near[0].item()) < rounding
    assert relative(far[1] - between / 50, near[1]) < 2e-2  # what is left once the common pull is taken away
    eps = share * mean_cost(x, y)  # for 1000 the plan is nearly a b^T
    expected = sinkhorn_divergence(x.double(), y.double(), eps, tol=1e-8).item()
    assert sinkhorn_divergence(x, y, eps).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("share", [1.0, 0.05, 1e-2, 1e-4])
@pytest.mark.parametrize("make", [cloud, clusters])
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_equal_clouds(make, share, shift, dtype, rounding):
    """The loss of points with a copy of them, in the same or another order, is 0 and so is its gradient."""
    x = make(70, 3, 0, dtype)
    scale = mean_cost(x, x)
    x = x + shift
    x[1] = x[0]
    value, *gradients = value_and_gradients(sinkhorn_divergence, x, x.clone(), share * scale)
    assert abs(value.item()) <= rounding * scale
    for g in gradients:
        assert g.abs().sum() <= 20 * rounding * math.sqrt(scale)
    value = sinkhorn_divergence(x, x.flip(0), share * scale).item()
    assert abs(value) <= rounding * scale * (1 if shift == 0 else 3)


@pytest.mark.parametrize("share", [0.05, 1e-4])
def test_never_negative_near_zero(share):
    """Clouds that differ by less and less: the loss goes to zero, and not below."""
    x = cloud(60, 4, 0, torch.float32)
    eps = share * mean_cost(x, x)
    for step in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        value = sinkhorn_divergence(x, x + step * cloud(60, 4, 1, torch.float32), eps).item()
        assert -2e-6 * mean_cost(x, x) <= value <= 10 * step**2 + 2e-6 * mean_cost(x, x)


def test_equal_clouds_unrolled():
    x = cloud(20, 3)
    value, *gradients = value_and_gradients(sinkhorn_divergence, x, x.clone(), 0.5, unroll=True, **TIGHT)
    assert abs(value.item()) < 1e-10 and max(g.abs().max() for g in gradients) < 1e-9


@pytest.mark.parametrize("far", [1.0, 5.0])
@pytest.mark.parametrize("n, eps", [(64, 1e-4), (256, 1e-4), (256, 1e-2)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loose_tolerance_loses_no_point(seed, n, eps, far):
    """A point that is far from all others has no mass at first, less than the tolerance minds: it counts.

    Its gradient is that of a plan whose columns sum to the weights, y_j / n minus a mean of the x_i / n.
    """
    x = cloud(n, 2, seed, torch.float32)
    y = x.clone()
    y[0] += far
    y.requires_grad_()
    (gradient,) = grad(ot_cost(x, y, eps, tol=0.1), y)
    assert gradient.isfinite().all()
    source = y[0] - n * gradient[0]
    assert (source >= x.amin(0) - 1e-3).all() and (source <= x.amax(0) + 1e-3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates(dtype):
    """A point given twice is a point of twice the weight."""
    x, y = cloud(20, 3, 0, dtype), cloud(15, 3, 1, dtype)
    doubled = sinkhorn_divergence(torch.cat((x, x[:5])), y, 0.1, tol=1e-5)
    a = torch.tensor([2.0] * 5 + [1.0] * 15, dtype=dtype) / 25
    torch.testing.assert_close(doubled, sinkhorn_divergence(x, y, 0.1, a, tol=1e-5), rtol=1e-4, atol=0)
    ones = torch.ones(6, 2, dtype=dtype)
    assert sinkhorn_divergence(ones, 2 * torch.ones(3, 2, dtype=dtype), 0.1).item() == pytest.approx(1.0)
    assert sinkhorn_divergence(ones, ones.clone(), 1e-6).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("eps", [1e-6, 1.0, 1e6])
def test_one_point(eps):
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])
    for loss in (ot_cost, sinkhorn_divergence):
        value, g_x, g_y = value_and_gradients(loss, x, y, eps)
        assert value.item() == pytest.approx(12.5)
        torch.testing.assert_close(g_x, x - y)
        torch.testing.assert_close(g_y, y - x)


def test_zero_weights():
    """A point without weight changes nothing, wherever it is, and feels nothing."""
    for dtype in (torch.float32, torch.float64):
        x, y = cloud(12, 2, 0, dtype), cloud(10, 2, 1, dtype)
        far = torch.cat((x, x.new_tensor([[50.0, -50.0], [0.0, 0.0]])))
        a = torch.cat((x.new_full((12,), 1 / 12), x.new_zeros(2)))
        ours = value_and_gradients(sinkhorn_divergence, far, y, 0.1, a, tol=1e-5)
        theirs = value_and_gradients(sinkhorn_divergence, x, y, 0.1, tol=1e-5)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours[1][:12], theirs[1], rtol=1e-2, atol=1e-4)
        assert ours[1][12:].abs().max() < 1e-12
        assert all(p.isfinite().all() for p in sinkhorn_potentials(far, y, 0.1, a))


def test_non_contiguous_inputs():
    x, y = cloud(3, 40).T, cloud(60, 6, 1)[::2, ::2]
    assert not x.is_contiguous() and not y.is_contiguous()
    ours = value_and_gradients(sinkhorn_divergence, x, y, 0.3)
    torch.testing.assert_close(
        ours, value_and_gradients(sinkhorn_divergence, x.contiguous(), y.contiguous(), 0.3)
    )


# Stopping and starting


def test_stops_by_error_or_by_count():
    x, y = cloud(60, 2), cloud(50, 2, 1, shift=1.0)
    counts = []
    for tol in (1e-1, 1e-3, 1e-6):
        _, _, info = sinkhorn_potentials(x, y, 0.05, tol=tol, return_info=True)
        assert info["error"] <= tol
        counts.append(info["iterations"])
    assert counts[0] < counts[1] < counts[2]
    for most in (1, 2, 7):
        f, g, info = sinkhorn_potentials(x, y, 1e-3, max_iterations=most, tol=1e-9, return_info=True)
        assert info["iterations"] <= most and info["error"] > 1e-9
        plan = ((f[:, None] + g - brute_cost(x, y)) / 1e-3).exp() / 3000
        assert (plan.sum(0) - 1 / 50).abs().sum().item() == pytest.approx(info["error"], rel=1e-3)


def test_value_is_below_the_exact_one_and_gains_with_iterations():
    x, y = cloud(60, 2), cloud(50, 2, 1, shift=1.0)
    values = [ot_cost(x, y, 0.5, tol=1e-13, max_iterations=k).item() for k in (1, 3, 10, 1000)]
    assert values[0] < values[1] < values[2] <= values[3] + 1e-12


@pytest.mark.parametrize("unroll", [False, True])
def test_value_of_few_iterations_is_below_the_exact_one(unroll):
    """Of different clouds and of a cloud with itself: (2) at any potentials made by a half-step."""
    x, y = cloud(30, 2), cloud(25, 2, 1, shift=1.0)
    for p, q in ((x, y), (x, x)):
        exact = brute(p, q, 0.1)[0].item()
        for k in (1, 2, 5, 50):
            value = ot_cost(p, q, 0.1, tol=1e-13, max_iterations=k, unroll=unroll).item()
            assert exact - 0.5 < value <= exact + 1e-12


def test_start_of_points_with_themselves():
    """A start takes the general way, however far off it is."""
    x = cloud(30, 2)
    f, g = sinkhorn_potentials(x, x, 0.1, tol=1e-8)
    for start in (torch.zeros(30).double(), 10 * cloud(30, 1, 3)[:, 0]):
        h, k, info = sinkhorn_potentials(x, x, 0.1, tol=1e-8, init=(start, start), return_info=True)
        assert info["error"] <= 1e-8
        plans = [((p[:, None] + q - brute_cost(x, x)) / 0.1).exp() / 900 for p, q in ((f, g), (h, k))]
        torch.testing.assert_close(
            *plans, rtol=0, atol=1e-6
        )  # a lonely point's potentials are hardly defined


def test_start_from_the_other_side_of_a_translation():
    """y = x + c: the plan is that of x with itself, and the warm start of the divergence is exact."""
    x = cloud(40, 3, 0, torch.float32)
    value = sinkhorn_divergence(x, x + torch.tensor([3.0, 0.0, 4.0]), 0.1)
    assert value.item() == pytest.approx(12.5, rel=1e-5)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_clouds_far_from_the_origin(weighted, dtype, rtol):
    """What rounding leaves of the means, and weights that sum to one only nearly, do not reach the value."""
    x, y = cloud(50, 3, 0, dtype), cloud(40, 3, 1, dtype)
    a = (weights(50) * (1 + 9e-5)).to(dtype) if weighted else None
    x, y = x + 1000, y + 1000  # exactly what is measured below, rounding included
    exact = sinkhorn_divergence(
        x.double() - 1000, y.double() - 1000, 0.1, weights(50) if weighted else None, tol=1e-9
    )
    ours = sinkhorn_divergence(x, y, 0.1, a, tol=1e-5)
    assert ours.item() == pytest.approx(exact.item(), rel=rtol)


@pytest.mark.parametrize("share", [0.05, 1e-3])
def test_warm_start(share):
    """From the potentials of nearly the same points it takes less; from useless ones it still arrives."""
    x, y = cloud(60, 2, shift=5.0), cloud(50, 2, 1, shift=-3.0)
    eps = share * mean_cost(x - 5, y + 3)
    f, g, cold = sinkhorn_potentials(x, y, eps, tol=1e-6, return_info=True)
    *_, again = sinkhorn_potentials(x, y, eps, tol=1e-6, init=(f, g), return_info=True)
    assert again["iterations"] <= 2
    moved = x + 1e-3 * cloud(60, 2, 2)
    *_, cold = sinkhorn_potentials(moved, y, eps, tol=1e-3, return_info=True)
    *_, warm = sinkhorn_potentials(moved, y, eps, tol=1e-3, init=(f, g), return_info=True)
    assert warm["iterations"] < cold["iterations"]
    useless = 100 * cloud(60, 1, 3)[:, 0], 100 * cloud(50, 1, 4)[:, 0]
    h, k, info = sinkhorn_potentials(x, y, eps, tol=1e-6, init=useless, return_info=True)
    assert info["error"] <= 1e-6
    torch.testing.assert_close((h, k), (f, g), rtol=1e-3, atol=1e-3)


def test_extrapolation_that_fails_is_taken_back(monkeypatch):
    """With an extrapolation that ruins the iterate each time, it still converges."""
    x, y = cloud(40, 2), cloud(30, 2, 1, shift=1.0)
    expected = ot_cost(x, y, 0.2, tol=1e-9)
    noise = 20 * cloud(30, 1, 5)[:, 0]
    for bad in (noise, *(torch.full((30,), v, dtype=torch.float64) for v in (math.nan, -2000.0, 2000.0))):
        monkeypatch.setattr(sinkhorn_gan, "extrapolate", lambda history, b, bad=bad: history[-1][0] + bad)
        torch.testing.assert_close(ot_cost(x, y, 0.2, tol=1e-9), expected)


# What cannot work is refused, with the value in the message

X, Y = cloud(4, 3), cloud(5, 3, 1)
ERRORS = [
    (X[0], Y, {}, r"\(3,\) and \(5, 3\)"),
    (X, Y[:, :2], {}, r"\(4, 3\) and \(5, 2\)"),
    (X[None], Y, {}, r"\(1, 4, 3\)"),
    (X, Y.float(), {}, "torch.float64 .*torch.float32"),
    (X.long(), Y.long(), {}, "torch.int64"),
    (X, Y.to("meta"), {}, "cpu.*meta"),
    (X[:0], Y, {}, r"no points .*\(0, 3\)"),
    (X, Y[:0], {}, r"no points .*\(0, 3\)"),
    (X[:, :0], Y[:, :0], {}, r"no coordinates.*\(4, 0\)"),
    (X.clone().fill_(math.nan), Y, {}, "x and its squares must be finite, but it holds nan"),
    (X, Y.clone().index_fill_(0, torch.tensor(2), -math.inf), {}, "y and its squares .* holds -inf"),
    (1e25 * X.float(), Y.float(), {}, "x and its squares must be finite"),
    (X, Y, {"eps": 0.0}, "eps must be positive and finite, not 0.0"),
    (X, Y, {"eps": -1.0}, "eps .*-1.0"),
    (X, Y, {"eps": math.inf}, "eps .*inf"),
    (X, Y, {"eps": math.nan}, "eps .*nan"),
    (X, Y, {"tol": 0.0}, "tol must be positive and finite, not 0.0"),
    (X, Y, {"tol": math.nan}, "tol .*nan"),
    (X, Y, {"max_iterations": 0}, "max_iterations .*not 0"),
    (X, Y, {"cost": "manhattan"}, "unknown cost 'manhattan'"),
    (X, Y, {"road": "high"}, "road 'high'"),
    (torch.zeros(4, 3).double(), Y, {"cost": "cosine"}, "length 0.0, and x holds one"),
]
WEIGHTS = [
    ({"a": weights(5)}, r"weights of x .*\(4,\).*\(5,\)"),
    ({"b": weights(5).float()}, r"weights of y .*float64.*float32"),
    ({"a": weights(4).to("meta")}, "weights of x .*meta"),
    ({"a": torch.tensor([0.5, 0.75, -0.25, 0.0]).double()}, r"weights of x .*least -0.25, sum 1.0"),
    ({"b": torch.full((5,), 0.3).double()}, r"weights of y .*sum 1.5"),
    ({"b": torch.full((5,), math.nan).double()}, r"weights of y .*nan"),
    ({"a": weights(4).requires_grad_()}, "weights of x .*without gradient"),
]


def test_points_are_looked_at_once(monkeypatch):
    """On a GPU each look waits for the device."""
    looks, usable = [], sinkhorn_gan.usable
    monkeypatch.setattr(sinkhorn_gan, "usable", lambda *given: looks.append(given) or usable(*given))
    ot_cost(X, Y, 1.0)
    sinkhorn_divergence(X, Y, 1.0)
    minibatch_energy_distance(X, X.flip(1), Y, Y.flip(1), 1.0)
    assert [len(given) - 1 for given in looks] == [2, 2, 4]


@pytest.mark.parametrize("x, y, options, message", ERRORS + [(X, Y, *w) for w in WEIGHTS])
@pytest.mark.parametrize("function", [sinkhorn_potentials, ot_cost, sinkhorn_divergence])
def test_value_errors(function, x, y, options, message, monkeypatch):
    monkeypatch.setattr(sinkhorn_gan, "transport", None)  # before any iteration
    with pytest.raises(ValueError, match=message):
        function(x, y, **{"eps": 1.0, **options})


@pytest.mark.parametrize("x, y, options, message", ERRORS)
def test_value_errors_of_the_minibatch_energy_distance(x, y, options, message, monkeypatch):
    monkeypatch.setattr(sinkhorn_gan, "transport", None)
    with pytest.raises(ValueError, match=message):
        minibatch_energy_distance(x, x, y, y, **{"eps": 1.0, **options})


def test_half_precision_is_not_silent():
    """autocast would make the products of float32 points in bfloat16."""
    x, y = X.float(), Y.float()
    with torch.autocast("cpu", torch.bfloat16):
        for function in (sinkhorn_potentials, ot_cost, sinkhorn_divergence):
            with pytest.raises(ValueError, match=r"torch.autocast\('cpu', enabled=False\)"):
                function(x, y, 1.0)
        with torch.autocast("cpu", enabled=False):
            inside = sinkhorn_divergence(x, y, 1.0)
    assert inside == sinkhorn_divergence(x, y, 1.0)


def test_other_value_errors():
    with pytest.raises(ValueError, match="road 'blocked' keeps no matrices"):
        ot_cost(X, Y, 1.0, unroll=True, road="blocked")
    for bad in ((Y[:, 0], X[:, 0]), (X[:, 0], Y[:, 0] * math.nan), (X, Y), (X[:, 0],)):
        with pytest.raises(ValueError, match="init must be finite"):
            sinkhorn_potentials(X, Y, 1.0, init=bad)


# Properties

quick = settings(max_examples=25, deadline=None, database=None, derandomize=True)
samples = st.tuples(
    *(st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(0, 10**6)),
    st.sampled_from(ROADS),
    st.floats(1e-2, 30),
    st.floats(1e-2, 3),
)


def made(case):
    """Points, epsilon and options that a drawn case stands for."""
    n, m, d, seed, road, scale, share = case
    x, y = scale * cloud(n, d, seed), scale * cloud(m, d, seed + 1, shift=0.3)
    return x, y, share * mean_cost(x, y), {"road": road, "tol": 1e-8}


@quick
@given(samples)
def test_property_symmetry(case):
    x, y, eps, options = made(case)
    for loss in (ot_cost, sinkhorn_divergence):
        there, back = loss(x, y, eps, **options), loss(y, x, eps, **options)
        torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12 * mean_cost(x, y))


@quick
@given(samples)
def test_property_never_negative(case):
    x, y, eps, options = made(case)
    assert sinkhorn_divergence(x, y, eps, **options) >= -1e-12 * mean_cost(x, y)
    assert sinkhorn_divergence(x.float(), y.float(), eps, road=options["road"]) >= -2e-6 * mean_cost(x, y)
    assert abs(sinkhorn_divergence(x, x.clone(), eps, **options)) <= 1e-12 * mean_cost(x, y)


@quick
@given(samples, st.floats(-100, 100))
def test_property_translation_of_both(case, shift):
    x, y, eps, options = made(case)
    for loss in (ot_cost, sinkhorn_divergence):
        here, there = loss(x, y, eps, **options), loss(x + shift, y + shift, eps, **options)
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-10)


@quick
@given(samples)
def test_property_scale(case):
    """Twice the points are four times the cost, at four times epsilon."""
    x, y, eps, options = made(case)
    one, four = (sinkhorn_divergence(k * x, k * y, k * k * eps, **options) for k in (1, 2))
    torch.testing.assert_close(four, 4 * one, rtol=1e-9, atol=1e-12 * mean_cost(x, y))


@quick
@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_property_small_epsilon_is_exact_assignment(n, d, seed):
    """W <= OT_eps <= W + eps log n, and the divergence within as much of W, for n points each."""
    x, y = cloud(n, d, seed), cloud(n, d, seed + 1)
    c = brute_cost(x, y)
    rows, columns = linear_sum_assignment(c.numpy())
    exact, eps = c[rows, columns].mean().item(), 1e-4 * c.mean().item()
    for dtype, slack in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        value = ot_cost(x.to(dtype), y.to(dtype), eps).item()
        slack *= exact
        assert exact - slack <= value <= exact + eps * math.log(n) + slack
        divergence = sinkhorn_divergence(x.to(dtype), y.to(dtype), eps).item()
        assert abs(divergence - exact) <= eps * math.log(n) + slack


# Memory


def test_memory_grows_linearly():
    """Value and gradients of 6,000 x 6,000 points need less than the matrix of their pairs, 144 MB."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak of memory from /proc")
    code = """
        import re, torch
        from sinkhorn_gan import sinkhorn_divergence
        torch.set_num_threads(1)
        def peak():  # unlike ru_maxrss, not that of the parent before exec
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3
        def run(n, road):
            x, y = (torch.randn(n, 16, requires_grad=True) for _ in range(2))
            sinkhorn_divergence(x, y, 3.0, road=road, tol=0.1).backward()
            assert x.grad.isfinite().all() and y.grad.abs().max() > 0
        run(600, "blocked")
        before = peak()
        for road in ("blocked", "dense"):  # were dense not seen to take the matrix, blocked were not measured
            run(6000, road)
            print(peak() - before)
    """
    here = Path(sinkhorn_gan.__file__).parent
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    blocked, dense = map(float, result.stdout.split())
    assert blocked < 50 and dense > 130


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("share", [0.05, 1e-3])
def test_cuda_agrees_with_float64(share, road, cost):
    x, y = cloud(700, 16, 0, torch.float32), cloud(600, 16, 1, torch.float32, shift=0.5)
    eps = share * sinkhorn_gan.mean_cost(x, y, cost).item()
    exact = value_and_gradients(sinkhorn_divergence, x.double(), y.double(), eps, cost=cost, tol=1e-6)
    ours = value_and_gradients(sinkhorn_divergence, x.cuda(), y.cuda(), eps, cost=cost, road=road)
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-3)
    assert all(relative(p.cpu(), q) < 3e-2 for p, q in zip(ours[1:], exact[1:]))
