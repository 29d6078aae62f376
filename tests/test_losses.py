"""The short losses, of sgan_mnist.py, gmgan_mnist.py and cyclegan_mnist_usps.py, and changes of images."""

import math

import pytest
import torch

from cyclegan_mnist_usps import center_digits, cycle_loss, exchange, least_squares_loss, semantic_loss
from gmgan_mnist import Mixture, information_loss, non_saturating_losses, relativistic_losses, squared_slope
from sgan_mnist import (
    UserError,
    align,
    augment,
    discriminator_loss,
    feature_matching_loss,
    paste_patches,
    pseudo_label_loss,
    split_labels,
)


def numbers(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softplus(v: float) -> float:
    return math.log1p(math.exp(v))


# sgan_mnist.py


def test_discriminator_loss_by_its_definition():
    """-log D(x) - log(1 - D(y)), D = Z / (Z + 1), is -log of softmax over K + 1 logits, the last 0."""
    real, fake = 3 * numbers(5, 4), 3 * numbers(7, 4, seed=1)
    total = 0.0
    for logits, sign in ((real, 1), (fake, -1)):
        parts = []
        for row in logits.tolist():
            z = sum(math.exp(v) for v in row)
            parts.append(-math.log(z / (z + 1) if sign > 0 else 1 / (z + 1)))
        total += sum(parts) / len(parts)
    assert discriminator_loss(real, fake).item() == pytest.approx(total, rel=1e-12)
    large = torch.full((2, 4), 1e4)
    assert discriminator_loss(large, -large).item() == 0 and discriminator_loss(-large, large).isfinite()
    assert torch.autograd.gradcheck(discriminator_loss, (real.requires_grad_(), fake.requires_grad_()))


def test_feature_matching_loss():
    x, y = numbers(5, 3), numbers(4, 3, seed=1)
    expected = sum((x[:, k].sum() / 5 - y[:, k].sum() / 4) ** 2 for k in range(3))
    assert feature_matching_loss(x, y).item() == pytest.approx(expected.item(), rel=1e-12)
    assert feature_matching_loss(x, x.flip(0)).item() == pytest.approx(0, abs=1e-20)


def test_align():
    """Divided by the shares and normalised; equal shares change nothing."""
    p = numbers(6, 4).softmax(1)
    torch.testing.assert_close(align(p, torch.full((4,), 0.25)), p.to(torch.float64))
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    for row, found in zip(p.tolist(), align(p, shares).tolist()):
        scaled = [v / s for v, s in zip(row, shares.tolist())]
        assert found == pytest.approx([v / sum(scaled) for v in scaled])


def test_pseudo_label_loss():
    """Only sure rows count, and the mean is over all."""
    logits = numbers(3, 4)
    p = torch.tensor([[0.9, 0.1, 0, 0], [0.4, 0.3, 0.2, 0.1], [0, 0, 0.2, 0.8]])
    expected = -(logits.log_softmax(1)[0, 0] + logits.log_softmax(1)[2, 3]) / 3
    assert pseudo_label_loss(logits, p, 0.8).item() == pytest.approx(expected.item())
    assert pseudo_label_loss(logits, p, 0.95).item() == 0


def test_split_labels():
    """Balanced, disjoint, nested, by the seed alone; what cannot be is refused."""
    labels = torch.arange(200) % 10
    few, rest = split_labels(labels, 20, 3)
    assert (labels[few].bincount(minlength=10) == 2).all() and len(rest) == 180
    assert sorted([*few.tolist(), *rest.tolist()]) == list(range(200))
    more, _ = split_labels(labels, 50, 3)
    assert {*few.tolist()} < {*more.tolist()}
    assert not torch.equal(few, split_labels(labels, 20, 4)[0])
    assert len(split_labels(labels, 200, 3)[1]) == 0
    for count in (15, 210, 5):
        with pytest.raises(UserError, match=f"multiple of 10, up to 200, not {count}"):
            split_labels(labels, count, 3)


def test_augment():
    """Images move a little, their border stays black, and gradients pass."""
    images = -torch.ones(50, 1, 28, 28)
    images[:, :, 10:18, 10:18] = 1
    images.requires_grad_()
    torch.manual_seed(0)
    moved = augment(images)
    assert moved.shape == images.shape and moved.min() >= -1.001 and moved.max() <= 1.001
    assert (moved[:, :, :3] < -0.99).all() and not torch.allclose(moved[0], moved[1])
    mass = ((moved + 1) / 2).sum((1, 2, 3))
    assert 45 < mass.min() < mass.mean() < 75 < 90 and mass.max() < 90
    moved.sum().backward()
    assert images.grad.abs().sum() > 0


def test_paste_patches():
    images = torch.rand(200, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert torch.equal(paste_patches(images, 0.0), images)
    changed = paste_patches(images, 0.5) != images
    share = changed.flatten(1).any(1).float().mean().item()
    assert 0.35 < share < 0.65 and (paste_patches(images, 1.0) >= images).all()
    for image in changed[changed.flatten(1).any(1)]:  # a rectangle of at most 8 pixels a side
        rows, columns = image[0].any(1).nonzero(), image[0].any(0).nonzero()
        assert rows.max() - rows.min() < 8 and columns.max() - columns.min() < 8


# gmgan_mnist.py


def test_losses_of_pairs_and_of_each():
    real, fake = 3 * numbers(6), 3 * numbers(6, seed=1)
    pairs = list(zip(real.tolist(), fake.tolist()))
    loss_d, loss_g = relativistic_losses(real, fake)
    assert loss_d.item() == pytest.approx(sum(softplus(y - x) for x, y in pairs) / 6)
    assert loss_g.item() == pytest.approx(sum(softplus(x - y) for x, y in pairs) / 6)
    loss_d, loss_g = non_saturating_losses(real, fake)
    assert loss_d.item() == pytest.approx(sum(softplus(-x) + softplus(y) for x, y in pairs) / 6)
    assert loss_g.item() == pytest.approx(sum(softplus(-y) for _, y in pairs) / 6)


def test_squared_slope():
    """Of a quadratic form, whose gradient is known, and with a gradient in the weights."""
    x = numbers(5, 2, 3).requires_grad_()
    weight = numbers(2, 3, seed=1).requires_grad_()
    value = squared_slope((weight * x.square()).sum((1, 2)), x)
    expected = (2 * weight * x).square().sum((1, 2)).mean()
    assert value.item() == pytest.approx(expected.item())
    found = torch.autograd.grad(value, weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, weight)[0])


def test_information_loss():
    """By its terms; least where clusters are confident, balanced and the same of augmented images."""
    logits, other = numbers(6, 3), numbers(6, 3, seed=1)
    p, q = logits.softmax(1).tolist(), other.softmax(1).tolist()
    mean = [sum(row[k] for row in p) / 6 for k in range(3)]
    expected = -sum(v * math.log(v) for row in p for v in row) / 6 + sum(v * math.log(v) for v in mean)
    expected -= sum(a * math.log(b) for x, y in zip(p, q) for a, b in zip(x, y)) / 6
    assert information_loss(logits, other).item() == pytest.approx(expected)
    best = 50 * torch.eye(3).repeat(2, 1)
    assert information_loss(best, best).item() == pytest.approx(-math.log(3), abs=1e-6)
    assert information_loss(best, best.roll(1, 0)) > information_loss(best[:1], best[:1]) > -1e-6
    assert torch.isfinite(information_loss(1e3 * best, 1e3 * best))


@pytest.mark.parametrize("trained", [True, False])
def test_mixture(trained):
    torch.manual_seed(0)
    mixture = Mixture(3, 4, 2.0, 0.5, trained)
    assert mixture.means.shape == (3, 4) and mixture.means.abs().max() <= 2
    components, noise = torch.tensor([2, 0]), torch.randn(2, 4)
    latents = mixture(components, noise)
    torch.testing.assert_close(latents, mixture.means[components] + 0.5 * noise)
    assert latents.requires_grad == trained


# cyclegan_mnist_usps.py


def test_losses_of_translations():
    x, y = numbers(2, 1, 3, 3), numbers(2, 1, 3, 3, seed=1)
    mean = sum((v - 1) ** 2 for v in x.flatten().tolist()) / 18
    assert least_squares_loss(x, 1).item() == pytest.approx(mean)
    assert least_squares_loss(x, 0).item() == pytest.approx(x.square().mean().item())
    pairs = zip(x.flatten().tolist(), y.flatten().tolist())
    assert cycle_loss(x, y).item() == pytest.approx(sum(abs(a - b) for a, b in pairs) / 18)
    logits, translated = numbers(4, 5).requires_grad_(), numbers(4, 5, seed=1).requires_grad_()
    loss = semantic_loss(logits, translated)
    expected = -sum(translated.log_softmax(1)[i, logits[i].argmax()] for i in range(4)) / 4
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert logits.grad is None and translated.grad.abs().sum() > 0


def test_exchange():
    """Each image comes out or an earlier one in its place, and none is lost."""
    torch.manual_seed(0)
    buffer = torch.arange(50.0).view(50, 1, 1, 1).clone()
    swapped = 0
    for start in range(100, 200, 10):
        images = torch.arange(start, start + 10.0).view(10, 1, 1, 1)
        before = [*buffer.flatten().tolist(), *images.flatten().tolist()]
        out = exchange(buffer, images)
        assert sorted(before) == sorted([*buffer.flatten().tolist(), *out.flatten().tolist()])
        swapped += (out != images).sum().item()
    assert 30 < swapped < 70


def test_center_digits():
    """20 x 20 pixels, their centre of mass in the middle, wherever the digit was."""
    images = torch.zeros(3, 16, 16, dtype=torch.uint8)
    images[0, 6:10, 6:10] = 200
    images[1, 3:7, 8:12] = 200
    images[2, 4:12, 5:9] = 100
    found = center_digits(images)
    assert found.shape == (3, 28, 28) and found.dtype == torch.uint8
    mass = found.double()
    for dim in (1, 2):
        center = (mass.sum(3 - dim) * torch.arange(28)).sum(1) / mass.sum((1, 2))
        assert (center - 14).abs().max() <= 0.51
    ratio = mass.sum((1, 2)) / images.double().sum((1, 2))
    assert ((ratio - (20 / 16) ** 2).abs() < 0.1).all()
    assert torch.equal(center_digits(torch.zeros(1, 16, 16, dtype=torch.uint8)).sum(), torch.tensor(0))
