"""The MMD loss: values and gradients against float64, a pair at a time, and all that it refuses."""

import math

import pytest
import torch
from conftest import assert_near, cloud, memory_of, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

import wgan_gp
from mmd_gan import kernel_means, mmd2

CHAIN = (1.0, 2.0, 4.0)
BOTH = pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic"])


def brute_kernel(a, b, bandwidths, kernel, weights=None) -> torch.Tensor:
    """The kernel of all pairs, from their differences."""
    t = (a[:, None] - b[None]).square().sum(2)
    k = torch.zeros_like(t)
    for s, w in zip(bandwidths, (1.0,) * len(bandwidths) if weights is None else weights):
        k = k + w * ((-t / (2 * s * s)).exp() if kernel == "gaussian" else (1 + t / (2 * s)) ** -s)
    return k


def brute_means(x, y, bandwidths, kernel="gaussian", unbiased=True, weights=None) -> list[torch.Tensor]:
    """k_xx, k_yy and k_xy by their definitions."""
    means = []
    for z in (x, y):
        k = brute_kernel(z, z, bandwidths, kernel, weights)
        n = len(z)
        means.append((k.sum() - k.diagonal().sum()) / (n * (n - 1)) if unbiased else k.mean())
    return [*means, brute_kernel(x, y, bandwidths, kernel, weights).mean()]


def both(x, y, *options, **more) -> tuple[list, list]:
    """The means of kernel_means and, in float64, of brute_means, with their gradients."""
    got = with_gradients(lambda x, y: kernel_means(x, y, *options, **more), x, y)
    want = with_gradients(lambda x, y: brute_means(x, y, *options, **more), x.double(), y.double())
    return got, want


SIZES = {  # n, m, d, shift, bandwidths: 0.8 is twice 0.4, and widths may be far apart
    "one point": (1, 1, 3, 0.0, (0.4, 0.8, 2.0, 5.0)),
    "two": (2, 2, 1, 0.0, (0.4, 0.8, 2.0, 5.0)),
    "odd": (5, 9, 3, 0.0, (0.4, 0.8, 2.0, 5.0)),
    "far": (30, 21, 4, 1000.0, (0.4, 0.8, 2.0, 5.0)),
    "tiles, one of a point": (513, 600, 2, 0.0, (0.4, 0.8, 2.0, 5.0)),
    "images": (65, 40, 784, 0.0, (10, 3, 0.5)),
    "images, rising": (65, 40, 784, 0.0, (0.5, 10, 3)),
    "images, halved": (65, 40, 784, 0.0, (32, 16, 8, 4, 2, 1)),
}


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("size", SIZES)
@BOTH
def test_means_and_gradients_against_pairs(kernel, size, unbiased):
    """In float64 to rounding, and in float32 to 1e-4."""
    n, m, d, shift, bandwidths = SIZES[size]
    x, y = cloud(n, d, 0, shift).float(), cloud(m, d, 1, shift + 0.3).float()
    weights = (0.5, 1.0, 3.0, 2.0, 1.0, 0.7)[: len(bandwidths)]
    options = {"kernel": kernel, "unbiased": unbiased and size != "one point", "weights": weights}
    got, want = both(x.double(), y.double(), bandwidths, **options)
    assert_near(got, want, 1e-10)
    single, _ = both(x, y, bandwidths, **options)
    assert {v.dtype for v in single} == {torch.float32}
    assert_near(single, want, 1e-4)  # the largest term of a gradient may be 100 times the sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@BOTH
def test_duplicates(kernel, dtype):
    """Points that come twice, and sets that are equal: squared distances of zero, and no negative ones."""
    x = cloud(20, 50, 0, 3.0, dtype).repeat(2, 1)
    assert_near(*both(x, x.clone(), CHAIN, kernel), 1e-4)
    assert abs(mmd2(x, x.clone(), CHAIN, kernel=kernel, unbiased=False)) < 1e-5
    same = torch.full((6, 4), 7.5, dtype=dtype)
    got, _ = both(same, same, CHAIN, kernel)
    assert [v.item() for v in got[::3]] == [3.0] * 3
    assert all((v == 0).all() for v in got[1::3] + got[2::3])


@pytest.mark.parametrize("unbiased", [True, False])
@BOTH
def test_derivatives_by_differences(kernel, unbiased):
    """Of both orders; also where one side is fixed, as of a penalty on the gradient in the fake points."""
    x, y = cloud(3, 2), cloud(4, 2, 1, 0.5)

    def means(x, y):
        return kernel_means(x, y, (0.7, 2.0), kernel=kernel, unbiased=unbiased)

    for x_free, y_free in ((True, False), (False, True), (True, True)):
        points = x.requires_grad_(x_free), y.requires_grad_(y_free)
        assert torch.autograd.gradgradcheck(means, points)
    assert torch.autograd.gradcheck(means, points)


@pytest.mark.parametrize("unbiased", [True, False])
@BOTH
def test_a_learned_kernel_gets_gradients(kernel, unbiased):
    """Also far from the origin, where float32 loses all digits of distances, unless points are centred."""
    s, w = (torch.tensor(v, dtype=torch.float64) for v in ((0.7, 2.0), (1.0, 0.5)))
    x, y = cloud(9, 3), cloud(7, 3, 1, 0.5)

    def learned(means):
        return lambda s, w, x, y: means(x, y, s, kernel, unbiased, w)

    for u, v, rel in ((x, y, 1e-10), ((x + 1000).float(), (y + 1000).float(), 1e-4)):
        got = with_gradients(learned(kernel_means), s, w, u, v)
        assert_near(got, with_gradients(learned(brute_means), s, w, u.double(), v.double()), rel)
    losses = (  # of numbers in a list, of one alone, and of weights
        lambda v: mmd2(x, y, [*v], kernel=kernel),
        lambda v: mmd2(x, y, v[0], kernel=kernel),
        lambda v: mmd2(x, y, (0.7, 2.0), kernel=kernel, weights=v),
    )
    assert all(with_gradients(loss, w)[1].abs().max() > 0 for loss in losses)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 10.0, 30.0, 100.0])
@pytest.mark.parametrize("kind", [tuple, torch.tensor])
@BOTH
def test_no_denormal_numbers(kernel, kind, scale):
    """They would take a CPU 100 times as long: what is far below all else counts as none."""
    x, y = (scale * v for v in (cloud(60, 8, dtype=torch.float32), cloud(50, 8, 1, dtype=torch.float32)))
    for g, w in zip(*both(x, y, kind((0.5, 1.0, 2.0)), kernel), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-6)
        assert not ((g != 0) & (g.abs() < torch.finfo(torch.float32).tiny)).any()


def test_options_and_inputs():
    """Gaussian, unbiased, weights of one; a number is a mixture of one; strides may be any; x and y stay."""
    x = cloud(3, 40, dtype=torch.float32).T.requires_grad_()
    y = cloud(80, 6, 1, dtype=torch.float32)[::2, ::2]
    before = x.detach().clone(), y.clone()
    plain = mmd2(x, y, CHAIN)
    plain.backward()
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and y.grad is None
    assert plain.shape == () and plain.dtype == torch.float32
    assert plain == mmd2(x, y, CHAIN, kernel="gaussian", unbiased=True, weights=(1.0, 1.0, 1.0))
    torch.testing.assert_close(plain, mmd2(x.contiguous(), y.contiguous(), CHAIN))
    k_xx, k_yy, k_xy = kernel_means(x, y, CHAIN)
    assert plain == k_xx + k_yy - 2 * k_xy
    assert mmd2(x, y, 1.0) == mmd2(x, y, (1.0,)) == mmd2(x, y, 1) == mmd2(x, y, [1.0])
    torch.testing.assert_close(mmd2(x, y, torch.tensor([1.0])), mmd2(x, y, 1.0))


@pytest.mark.parametrize("n, m", [(33, 20), (1024, 1024)])
def test_compiled(n, m):
    x, y = cloud(n, 8, dtype=torch.float32), cloud(m, 8, 1, 0.4, torch.float32)
    compiled = torch.compile(lambda v: mmd2(v, y, CHAIN), backend="aot_eager")
    value, grad = with_gradients(compiled, x)
    want = with_gradients(lambda v: mmd2(v, y, CHAIN), x)
    assert abs(value - want[0]) < 1e-5
    assert_near(grad, want[1], 1e-3)


@pytest.mark.parametrize("kind", [tuple, torch.tensor])
@BOTH
def test_autocast_changes_nothing(kernel, kind):
    """Matrix products in bfloat16 would lose all digits of small distances; also of second derivatives."""
    x, y = (v.float().requires_grad_() for v in (cloud(20, 16), cloud(9, 16, 1)))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            means = kernel_means(x, y, kind(CHAIN), kernel)
            inside = torch.autograd.grad(means[2], x, retain_graph=True)  # as one should not
            (grad,) = torch.autograd.grad(mmd2(x, y, CHAIN, kernel=kernel), x, create_graph=True)
        second = torch.autograd.grad((1e4 * grad).square().sum(), x)
        found.append([*means, *torch.autograd.grad(sum(means), (x, y)), grad, *second])
        found[-1] += inside if kind is tuple else ()
    assert_near(found[1], found[0], 1e-4)


X, Y = cloud(4, 3), cloud(5, 3, 1)


@pytest.mark.parametrize(
    "x, y, bandwidths, options, message",
    [
        (X[0], Y, CHAIN, {}, r"\(3,\) .* and \(5, 3\)"),
        (X, Y[:, :2], CHAIN, {}, r"\(4, 3\) .* and \(5, 2\)"),
        (X, Y.float(), CHAIN, {}, "torch.float64 .*torch.float32"),
        (X.half(), Y.half(), CHAIN, {}, "torch.float16"),
        (X, Y.to("meta"), CHAIN, {}, "cpu.*meta"),
        (X, Y[:1], CHAIN, {}, "4 and 1 points"),
        (X[:0], Y, CHAIN, {"unbiased": False}, "0 and 5 points"),
        (X, Y, (1.0, 0.0), {}, r"bandwidths must be positive.*\(1.0, 0.0\)"),
        (X, Y, (math.inf,), {}, "bandwidths must be positive.*inf"),
        (X, Y, (), {}, r"bandwidths must be positive.*\(\)"),
        (X, Y, CHAIN, {"weights": (1.0, 2.0)}, r"\(1.0, 2.0, 4.0\).*\(1.0, 2.0\)"),
        (X, Y, CHAIN, {"kernel": "laplace"}, "gaussian or rational_quadratic.*'laplace'"),
    ],
)
@pytest.mark.parametrize("function", [kernel_means, mmd2])
def test_value_errors(function, x, y, bandwidths, options, message):
    """What cannot work is refused, with the value in the message."""
    with pytest.raises(ValueError, match=message):
        function(x, y, bandwidths, **options)


@pytest.mark.parametrize("x, y", [(X * math.nan, Y), (X, Y / 0), (X[:, :1] / 0, Y[:, :1])])
@pytest.mark.parametrize("kind", [tuple, torch.tensor])
@BOTH
def test_points_that_are_not_finite(x, y, kind, kernel):
    """Are refused by mmd2; the means of a training step, which must not wait for a GPU, are NaN."""
    with pytest.raises(ValueError, match="not finite"):
        mmd2(x, y, kind(CHAIN), kernel=kernel)
    assert kernel_means(x, y, kind(CHAIN), kernel)[2].isnan()


def test_penalty_of_a_linear_function():
    """(|w| - 1)^2 at every point, with derivatives; of images, too, and of values (b,) or (b, 1)."""
    w = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    for shape in ((5, 2), (5, 1, 1, 2)):
        for values in ((5,), (5, 1)):
            real, fake = cloud(5, 2).view(shape), cloud(5, 2, 1).view(shape)
            penalty = wgan_gp.gradient_penalty(lambda t, v=values: (t.flatten(1) @ w).view(v), real, fake)
            assert penalty.item() == 16.0 and penalty.shape == ()
            torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], 2 * (5 - 1) * w.detach() / 5)


def test_penalty_is_taken_between_the_points():
    """Of t^2 / 2: (|t| - 1)^2, with one t per pair on the way from real to fake."""
    seen = []

    def f(t):
        seen.append(t.detach())
        return t.square().sum(1) / 2

    penalty = wgan_gp.gradient_penalty(f, torch.full((2000, 2), 1.0), torch.full((2000, 2), 3.0))
    (t,) = seen
    torch.testing.assert_close(t[:, 0], t[:, 1])
    assert 1 <= t.min() < 1.05 and 2.95 < t.max() <= 3 and abs(t.mean() - 2) < 0.1
    torch.testing.assert_close(penalty, (t.norm(dim=1) - 1).square().mean())


def test_penalty_refuses():
    with pytest.raises(ValueError, match=r"\(4, 3\) and fake \(5, 3\)"):
        wgan_gp.gradient_penalty(lambda t: t.sum(1), X, Y)
    for f in (lambda t: t, lambda t: t.sum()):
        with pytest.raises(ValueError, match="a value per sample"):
            wgan_gp.gradient_penalty(f, X, X)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    *(st.integers(2, 20), st.integers(2, 20), st.integers(1, 5), st.integers(0, 10**6)),
    st.sampled_from(["gaussian", "rational_quadratic"]),
    st.booleans(),
    st.floats(1e-3, 30),
    st.floats(-100, 100),
)
def test_properties(n, m, d, seed, kernel, unbiased, scale, shift):
    """Sides, the points' order and a shift of both do not matter; the biased estimate is never negative."""
    x, y = scale * cloud(n, d, seed), scale * cloud(m, d, seed + 1)

    def value(x, y, unbiased=unbiased):
        return mmd2(x, y, (0.3, 1.0, 5.0), kernel=kernel, unbiased=unbiased)

    rng = torch.Generator().manual_seed(seed)
    mixed = x[torch.randperm(n, generator=rng)], y[torch.randperm(m, generator=rng)]
    for pair in ((y, x), mixed, (x + shift, y + shift)):
        torch.testing.assert_close(value(*pair), value(x, y), rtol=1e-7, atol=1e-8)
    assert value(x, y, False) >= -1e-12 and value(x.float(), y.float(), False) >= -3e-6
    assert abs(value(x, x.clone(), False)) < 1e-10


def test_memory_grows_linearly():
    """Value and gradients of 6,000 x 6,000 points need far less than the matrix of their pairs, 144 MB."""
    code = """
        from mmd_gan import mmd2
        def run(n, bandwidths=(4.0, 8.0)):
            x, y = (torch.randn(n, 16, requires_grad=True) for _ in range(2))
            mmd2(x, y, bandwidths).backward()
        run(600)
        peak()
        run(6000)
        peak()
        run(3000, torch.tensor([4.0, 8.0]))  # were matrices of 36 MB not seen, nothing were measured
        peak()
    """
    tiled, dense = memory_of(code)
    assert tiled < 50 and dense > 72
