"""The loss of mmd_gan.py against float64 sums over all pairs, written down pair by pair."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

import mmd_gan
from mmd_gan import critic_loss, gradient_penalty, kernel_means, median_distance, mmd2, witness

CHAIN = (1.0, 2.0, 4.0)
KERNELS = [
    pytest.param("gaussian", CHAIN, id="chained"),
    pytest.param("gaussian", (4.0, 1.0, 2.0), id="chained-unsorted"),
    pytest.param("gaussian", (0.7, 1.9, 3.0), id="not-chained"),
    pytest.param("gaussian", (1.3,), id="one"),
    pytest.param("rational_quadratic", (0.2, 0.5, 1.0, 5.0), id="rational-quadratic"),
    pytest.param("linear", (1.0,), id="linear"),
]
ROADS = ["tiled", "dense"]


def cloud(n, d, seed=0, dtype=torch.float64, shift=0.0):
    """n Gaussian points in d dimensions."""
    return (
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .add(shift)
        .to(dtype)
    )


def brute_kernel(a, b, bandwidths, kernel, weights=None, low=None, high=None):
    """The matrix of k(a_i, b_j), from the differences a_i - b_j."""
    if kernel == "linear":
        return (a[:, None] * b[None]).sum(-1)
    t = (a[:, None] - b[None]).square().sum(-1).clamp(min=low or -1.0, max=high or math.inf)
    weights = [1.0] * len(bandwidths) if weights is None else weights
    if kernel == "gaussian":
        return sum(w * torch.exp(-t / (2 * s**2)) for s, w in zip(bandwidths, weights))
    return sum(w * (1 + t / (2 * s)) ** (-s) for s, w in zip(bandwidths, weights))


def brute_means(x, y, bandwidths, kernel="gaussian", unbiased=True, weights=None, bounds=None):
    """k_xx, k_yy and k_xy in float64, without any shortcut."""
    x, y, (low, high) = x.double(), y.double(), bounds or (None, None)
    k_xx = brute_kernel(x, x, bandwidths, kernel, weights, low=low)
    k_yy = brute_kernel(y, y, bandwidths, kernel, weights, high=high)
    k_xy = brute_kernel(x, y, bandwidths, kernel, weights)
    if unbiased:
        k_xx, k_yy = (k[~torch.eye(len(k), dtype=torch.bool)] for k in (k_xx, k_yy))
    return k_xx.mean(), k_yy.mean(), k_xy.mean()


def assert_same_means_and_gradients(x, y, bandwidths, rtol=1e-9, atol=1e-12, brute=None, **options):
    """Three means, and both gradients of a weighted sum of them, against brute force."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    means = kernel_means(x, y, bandwidths, **options)
    options.pop("road", None)
    expected = brute_means(x, y, bandwidths, **options)
    for mean, value in zip(means, expected):
        assert mean.dtype == x.dtype and mean.shape == ()
        torch.testing.assert_close(mean.double(), value, rtol=rtol, atol=atol)
    factors = (0.3, -1.7, 0.9)
    ours = grad(sum(f * v for f, v in zip(factors, means)), (x, y))
    theirs = grad(sum(f * v for f, v in zip(factors, expected)), (x, y))
    for a, b in zip(ours, theirs):
        assert a.dtype == x.dtype
        scale = b.abs().max().item()
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=max(atol, rtol * scale))


# Against brute force


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel, bandwidths", KERNELS)
@pytest.mark.parametrize("n, m, d", [(7, 5, 3), (2, 9, 1), (50, 35, 4)])
def test_means_and_gradients(kernel, bandwidths, unbiased, road, n, m, d, monkeypatch):
    monkeypatch.setattr(mmd_gan, "TILE", 16)
    x, y = cloud(n, d), cloud(m, d, 1, shift=0.5)
    assert_same_means_and_gradients(x, y, bandwidths, kernel=kernel, unbiased=unbiased, road=road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel, bandwidths", KERNELS[:5])
def test_weights(kernel, bandwidths, unbiased, road, monkeypatch):
    monkeypatch.setattr(mmd_gan, "TILE", 16)
    x, y, weights = cloud(21, 3), cloud(33, 3, 1), (0.5, 2.0, 0.1, 3.0)[: len(bandwidths)]
    options = {"kernel": kernel, "unbiased": unbiased, "road": road, "weights": weights}
    assert_same_means_and_gradients(x, y, bandwidths, **options)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel, bandwidths", KERNELS[:5])
def test_bounded_kernel(kernel, bandwidths, unbiased, road, monkeypatch):
    """Wang et al.'s bounds hold within x (below) and within y (above), and not between them."""
    monkeypatch.setattr(mmd_gan, "TILE", 16)
    x, y = 0.4 * cloud(40, 2), cloud(30, 2, 1)
    options = {"kernel": kernel, "unbiased": unbiased, "road": road, "bounds": mmd_gan.BOUNDS}
    t_x, t_y = torch.pdist(x).square(), torch.pdist(y).square()
    assert (t_x < 0.25).any() and (t_x > 0.25).any() and (t_y < 4).any() and (t_y > 4).any()
    assert_same_means_and_gradients(x, y, bandwidths, **options)


@pytest.mark.parametrize("kernel, bandwidths", [KERNELS[0], KERNELS[4]])
def test_real_tile(kernel, bandwidths):
    """More points than the tile of every day, and not a multiple of it."""
    n, m = mmd_gan.TILE + 37, 2 * mmd_gan.TILE + 1
    x, y = cloud(n, 2), cloud(m, 2, 1)
    assert_same_means_and_gradients(x, y, bandwidths, kernel=kernel, road="tiled")


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kernel, bandwidths", KERNELS)
def test_float32_is_close_to_float64(kernel, bandwidths, road, monkeypatch):
    monkeypatch.setattr(mmd_gan, "TILE", 64)
    x, y = cloud(150, 8, dtype=torch.float32), cloud(130, 8, 1, torch.float32, shift=0.5)
    assert_same_means_and_gradients(x, y, bandwidths, rtol=1e-4, kernel=kernel, road=road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kernel, bandwidths", KERNELS[:5])
@pytest.mark.parametrize("shift_x, shift_y", [(1000, 1000), (-1000, -1000), (0, 1000)])
def test_clouds_far_from_the_origin_keep_their_digits(kernel, bandwidths, road, shift_x, shift_y):
    x, y = cloud(60, 8, 0, torch.float32, shift_x), cloud(70, 8, 1, torch.float32, shift_y)
    assert_same_means_and_gradients(x, y, bandwidths, rtol=1e-4, kernel=kernel, road=road)


@pytest.mark.parametrize("road", ROADS)
def test_non_contiguous_inputs(road, monkeypatch):
    monkeypatch.setattr(mmd_gan, "TILE", 16)
    transposed, strided = cloud(3, 40).T, cloud(60, 6, 1)[::2, ::2]
    assert not transposed.is_contiguous() and not strided.is_contiguous()
    assert_same_means_and_gradients(transposed, strided, CHAIN, road=road)
    assert_same_means_and_gradients(strided, cloud(1, 3).expand(5, 3), CHAIN, road=road)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kernel, bandwidths", KERNELS)
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_input_without_gradient(kernel, bandwidths, road, create_graph):
    x, y = cloud(9, 3), cloud(6, 3, 1)
    both = x.clone().requires_grad_(), y.clone().requires_grad_()
    expected = grad(mmd2(*both, bandwidths, kernel=kernel, road=road), both)
    for i in (0, 1):
        points = [x.clone(), y.clone()]
        points[i].requires_grad_()
        value = mmd2(*points, bandwidths, kernel=kernel, road=road)
        (only,) = grad(value, points[i], create_graph=create_graph)
        torch.testing.assert_close(only.detach(), expected[i])
    assert not mmd2(x, y, bandwidths, kernel=kernel, road=road).requires_grad


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kernel, bandwidths", KERNELS)
def test_sample_against_itself(kernel, bandwidths, road):
    """The biased MMD of a sample with itself is 0 and so is its gradient, and both are finite."""
    x = cloud(40, 5, dtype=torch.float32)
    x[1] = x[0]  # a duplicate inside the sample too
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    value = mmd2(x, y, bandwidths, kernel=kernel, unbiased=False, road=road)
    assert abs(value.item()) < 1e-5
    for g in grad(value, (x, y)):
        assert g.abs().max() < 1e-5


def test_mmd2_is_the_sum_of_the_means():
    x, y = cloud(8, 3), cloud(9, 3, 1)
    k_xx, k_yy, k_xy = brute_means(x, y, CHAIN)
    torch.testing.assert_close(mmd2(x, y, CHAIN), k_xx + k_yy - 2 * k_xy)


def test_backward_accumulates_into_leaves():
    """The usual way of use, loss.backward(), with both inputs from one network."""
    net, x, y = nn.Linear(4, 3).double(), cloud(8, 4), cloud(8, 4, 1)
    mmd2(net(x), net(y), CHAIN).backward()
    ours = net.weight.grad.clone()
    net.weight.grad = None
    k_xx, k_yy, k_xy = brute_means(net(x), net(y), CHAIN)
    (k_xx + k_yy - 2 * k_xy).backward()
    torch.testing.assert_close(ours, net.weight.grad)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel, bandwidths", KERNELS)
def test_small_batches_of_one_size(kernel, bandwidths, unbiased):
    """x and y of one small size take a short cut, with the same means and gradients."""
    x, y = cloud(7, 3).requires_grad_(), (cloud(7, 3, 1) + 0.5).requires_grad_()
    results = []
    for road in ("tiled", "dense"):
        means = kernel_means(x, y, bandwidths, kernel, unbiased, road=road)
        results.append([*means, *grad(1.3 * means[0] - 0.7 * means[1] + 2.2 * means[2], (x, y))])
    torch.testing.assert_close(*results)


# First and second derivatives


@pytest.mark.parametrize("bounds", [None, mmd_gan.BOUNDS])
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kernel, bandwidths", KERNELS)
def test_gradcheck_and_gradgradcheck(kernel, bandwidths, road, bounds, monkeypatch):
    if kernel == "linear" and bounds:
        pytest.skip("the linear kernel takes no bounds")
    monkeypatch.setattr(mmd_gan, "TILE", 2)
    x, y = cloud(4, 2).requires_grad_(), cloud(3, 2, 1).requires_grad_()

    def means(x, y):
        return kernel_means(x, y, bandwidths, kernel, road=road, bounds=bounds)

    assert gradcheck(means, (x, y))
    assert gradgradcheck(means, (x, y))
    assert gradgradcheck(lambda x: means(x, y.detach()), (x,))
    assert gradgradcheck(lambda y: means(x.detach(), y), (y,))


@pytest.mark.parametrize("road", ROADS)
def test_second_derivative_at_duplicates(road):
    """Points that coincide have a distance of exactly zero; the curvature of the kernel is still there."""
    x = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(2, 1, dtype=torch.float64)
    (first,) = grad(mmd2(x, y, (1.0,), road=road), x, create_graph=True)
    (second,) = grad(first[0, 0], x)
    # k_xx = exp(-(x0 - x1)^2 / 2) and k_xy = mean_i exp(-x_i^2 / 2): d2/dx0^2 is -1 + 1, d2/dx0dx1 is 1
    torch.testing.assert_close(second, torch.tensor([[0.0], [1.0]], dtype=torch.float64))


@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic"])
def test_learned_bandwidths_and_weights_get_gradients(kernel):
    x, y = cloud(5, 2).requires_grad_(), cloud(4, 2, 1).requires_grad_()
    bandwidths = torch.tensor([0.7, 2.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.3, 1.5], dtype=torch.float64, requires_grad=True)

    def means(x, y, bandwidths, weights):
        return kernel_means(x, y, bandwidths, kernel, weights=weights)

    assert gradcheck(means, (x, y, bandwidths, weights))
    assert gradcheck(lambda b: mmd2(x.detach(), y.detach(), b, kernel=kernel), (bandwidths,))
    assert gradcheck(lambda w: mmd2(x.detach(), y.detach(), (1.0, 2.0), kernel=kernel, weights=w), (weights,))
    ours = torch.stack(means(x, y, bandwidths, weights))
    torch.testing.assert_close(ours, torch.stack(brute_means(x, y, bandwidths, kernel, weights=weights)))


# What the critic's losses are made of


def test_critic_losses():
    k_xx, k_yy, k_xy = torch.tensor([0.5, 0.3, 0.2]).unbind()
    assert critic_loss(k_xx, k_yy, k_xy, -1.0) == pytest.approx(-(0.5 + 0.3 - 2 * 0.2))  # minus MMD^2
    assert critic_loss(k_xx, k_yy, k_xy, 1.0) == pytest.approx(0.5 - 0.3)
    assert critic_loss(k_xx, k_yy, k_xy, 0.3) == pytest.approx(0.3 * 0.5 + 0.7 * 0.2 - 0.3)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 0.1, 1.0)])
@pytest.mark.parametrize("kernel, bandwidths", KERNELS)
def test_witness(kernel, bandwidths, weights):
    t, x, y = cloud(6, 3, 2), cloud(5, 3), cloud(8, 3, 1)
    weights = weights and weights[: len(bandwidths)]
    k_x, k_y = (brute_kernel(t, v, bandwidths, kernel, weights) for v in (x, y))
    ours = witness(t, x, y, bandwidths, kernel, weights)
    torch.testing.assert_close(ours, k_x.mean(1) - k_y.mean(1))


@pytest.mark.parametrize("unit", [1.0, 2.0])
def test_gradient_penalty_of_a_linear_critic(unit):
    """With h(t) = A t and the linear kernel the witness's gradient is A^T mean(h_real - h_fake) / unit."""
    critic = nn.Linear(3, 2, bias=False).double()
    real, fake = cloud(7, 3), cloud(7, 3, 1)
    h_real, h_fake = critic(real) / unit, critic(fake) / unit
    norm = (critic.weight.T @ (h_real - h_fake).mean(0) / unit).norm()
    penalty = gradient_penalty(critic, unit, real, fake, h_real, h_fake, (1.0,), "linear", None)
    torch.testing.assert_close(penalty, (norm - 1).square())


def test_gradient_penalty_trains_the_critic():
    """Its gradient in the critic's weights agrees with finite differences (the same random points)."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    real, fake = cloud(6, 3), cloud(6, 3, 1, shift=1.0)

    def penalty():
        torch.manual_seed(1)
        return gradient_penalty(critic, 1.0, real, fake, critic(real), critic(fake), CHAIN, "gaussian", None)

    weight = critic[0].weight
    (g,) = grad(penalty(), weight)
    assert g.isfinite().all() and g.abs().max() > 1e-4
    with torch.no_grad():
        step = 1e-5 * torch.sign(g)
        weight += step
    up = penalty().item()
    with torch.no_grad():
        weight -= 2 * step
    down = penalty().item()
    assert (up - down) / 2e-5 == pytest.approx(g.abs().sum().item(), rel=1e-5)


def test_median_distance():
    """The median of all distances between two different points of both sets together."""
    x, y = cloud(6, 3), cloud(5, 3, 1, shift=2.0)
    z = torch.cat((x, y)).numpy()
    distances = [np.linalg.norm(a - b) for i, a in enumerate(z) for b in z[:i]]  # 55 of them: an odd number
    x.requires_grad_()
    median = median_distance(x, y)
    assert median.item() == pytest.approx(np.median(distances), rel=1e-12)
    assert not median.requires_grad
    far = torch.cat((x.detach(), x.detach() + 1e6))
    assert median_distance(far, y, max_points=6).item() == pytest.approx(median.item())


def test_median_distance_of_one_point_repeated_is_not_zero():
    assert median_distance(torch.ones(4, 2), torch.ones(4, 2)).item() > 0


# What cannot work is refused, with the value in the message

X, Y = cloud(4, 3), cloud(5, 3, 1)


@pytest.mark.parametrize(
    "x, y, bandwidths, options, message",
    [
        (X[0], Y, CHAIN, {}, r"\(3,\) and \(5, 3\)"),
        (X, Y[:, :2], CHAIN, {}, r"\(4, 3\) and \(5, 2\)"),
        (X[None], Y, CHAIN, {}, r"\(1, 4, 3\)"),
        (X, Y.float(), CHAIN, {}, "torch.float64 .*torch.float32"),
        (X.long(), Y.long(), CHAIN, {}, "torch.int64"),
        (X, Y.to("meta"), CHAIN, {}, "cpu.*meta"),
        (X[:1], Y, CHAIN, {}, "1 and 5 points.*at least 2"),
        (X, Y[:1], CHAIN, {"kernel": "linear"}, "4 and 1 points.*at least 2"),
        (X[:0], Y, CHAIN, {"unbiased": False}, "0 and 5 points.*at least 1"),
        (X, Y, (1.0, 0.0), {}, r"bandwidths must be positive.*\(1.0, 0.0\)"),
        (X, Y, (-1.0,), {"kernel": "rational_quadratic"}, r"bandwidths must be positive.*-1.0"),
        (X, Y, (math.inf,), {}, "bandwidths must be positive and finite.*inf"),
        (X, Y, (math.nan,), {"road": "dense"}, "bandwidths must be positive and finite.*nan"),
        (X, Y, (), {}, "0 bandwidths"),
        (X, Y, CHAIN, {"weights": (1.0, 2.0)}, "3 bandwidths with 2 weights"),
        (X, Y, CHAIN, {"bounds": (0.0, 4.0)}, r"bounds must be positive.*\(0.0, 4.0\)"),
        (X, Y, CHAIN, {"bounds": (0.25, -4.0)}, r"bounds must be positive.*-4.0"),
        (X, Y, CHAIN, {"bounds": (0.25, 4.0), "kernel": "linear"}, r"no bounds, given \(0.25, 4.0\)"),
        (X, Y, torch.ones(1, requires_grad=True), {"road": "tiled"}, "road 'tiled' has no gradient"),
        (X, Y, CHAIN, {"kernel": "laplace"}, "unknown kernel 'laplace'"),
        (X, Y, CHAIN, {"road": "high"}, "road 'high'"),
    ],
)
@pytest.mark.parametrize("function", [kernel_means, mmd2])
def test_value_errors(function, x, y, bandwidths, options, message):
    with pytest.raises(ValueError, match=message):
        function(x, y, bandwidths, **options)


def test_one_point_will_do_for_the_biased_estimator():
    assert mmd2(X[:1], Y[:1], CHAIN, unbiased=False).isfinite()


# Properties

quick = settings(max_examples=25, deadline=None, database=None, derandomize=True)
samples = st.tuples(
    *(st.integers(2, 20), st.integers(2, 20), st.integers(1, 5), st.integers(0, 10**6)),
    st.sampled_from([p.values for p in KERNELS[:5]]),
    st.sampled_from(ROADS),
    st.floats(1e-3, 30),
)


def made(case):
    """The points and options that a drawn case stands for."""
    n, m, d, seed, (kernel, bandwidths), road, scale = case
    return (
        scale * cloud(n, d, seed),
        scale * cloud(m, d, seed + 1),
        bandwidths,
        {"kernel": kernel, "road": road},
    )


@quick
@given(samples)
def test_property_sample_with_itself(case):
    x, _, bandwidths, options = made(case)
    assert abs(mmd2(x, x.clone(), bandwidths, unbiased=False, **options).item()) < 1e-10


@quick
@given(samples, st.booleans())
def test_property_symmetry(case, unbiased):
    x, y, bandwidths, options = made(case)
    there, back = (mmd2(*pair, bandwidths, unbiased=unbiased, **options) for pair in ((x, y), (y, x)))
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)


@quick
@given(samples, st.booleans())
def test_property_order_does_not_matter(case, unbiased):
    x, y, bandwidths, options = made(case)
    rng = torch.Generator().manual_seed(case[3])
    mixed = x[torch.randperm(len(x), generator=rng)], y[torch.randperm(len(y), generator=rng)]
    values = (mmd2(*pair, bandwidths, unbiased=unbiased, **options) for pair in ((x, y), mixed))
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)


@quick
@given(samples)
def test_property_biased_is_never_negative(case):
    x, y, bandwidths, options = made(case)
    for dtype, least in ((torch.float64, -1e-12), (torch.float32, -3e-6)):
        assert mmd2(x.to(dtype), y.to(dtype), bandwidths, unbiased=False, **options).item() >= least


@quick
@given(samples, st.floats(-100, 100), st.booleans())
def test_property_translation_of_both(case, shift, unbiased):
    x, y, bandwidths, options = made(case)
    here, there = (mmd2(x + s, y + s, bandwidths, unbiased=unbiased, **options) for s in (0, shift))
    torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-8)


# Memory


def test_memory_grows_linearly():
    """Value and both gradients of 3,000 x 3,000 points need less than the matrix of their pairs, 36 MB."""
    if "VmHWM" not in (Path("/proc/self/status").read_text() if sys.platform == "linux" else ""):
        pytest.skip("no peak of the resident memory here")  # ru_maxrss starts at the peak of pytest itself
    code = """
        import torch
        from mmd_gan import mmd2
        torch.set_num_threads(1)
        def peak():
            (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024 / 1e6
        def run(n, road):
            x, y = (torch.randn(n, 64, requires_grad=True) for _ in range(2))
            mmd2(x, y, (4.0, 8.0), road=road).backward()
            assert x.grad.isfinite().all() and y.grad.abs().max() > 0
        run(600, "tiled")
        before = peak()
        for road in ("tiled", "dense"):  # were dense not seen to take matrices, tiled were not measured
            run(3000, road)
            print(peak() - before)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tiled, dense = map(float, result.stdout.split())
    assert tiled < 36 and dense > 3 * 36
