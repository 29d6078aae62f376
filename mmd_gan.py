# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "torchvision>=0.21", "tyro>=1.0.17", "wandb>=0.30", "numpy>=1.26", "tqdm>=4.66",
#     "matplotlib>=3.8", "scikit-learn>=1.4",
# ]
# ///
"""MMD-GAN: a generator that matches the data in the eyes of a kernel, and a critic that sharpens the kernel.

The critic maps samples to features. The generator minimises the squared maximum mean discrepancy of real and
fake features, MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y) for x real and y fake; the critic is trained, in
the same three terms, to tell them apart. Read it beside
    Gretton et al. 2012          A Kernel Two-Sample Test: MMD and its estimators    JMLR 13
    Li et al. 2015 and 2017      moment matching networks and MMD-GAN                1502.02761, 1705.08584
    Binkowski et al. 2018        Demystifying MMD GANs: the gradient penalty         1801.01401
    Wang et al. 2019             the repulsive loss and the bounded kernel           1812.09916

    python mmd_gan.py                                                      # MNIST, repulsive, spectral norm
    python mmd_gan.py --dataset digits                                     # no download, two minutes
    python mmd_gan.py --dataset grid                                       # 25 Gaussians, no encoder
    python mmd_gan.py --repulsion -1 --kernel rational_quadratic --no-spectral-norm --gradient-penalty 1
    python mmd_gan.py --resume runs/<run>                                  # goes on as if never stopped
    python mmd_gan.py --generate 10000 --checkpoint runs/<run>/checkpoint.pt --out samples/

The default run takes 14 minutes on two CPU cores: fid 2.0, which is 2.3 times that of real images, precision
0.72 and recall 0.85 (means of 3 seeds; results/mmd_gan.md has the rest).
"""

import atexit
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

SCRIPT = "mmd_gan"
TOYS = ("ring", "grid")
BOUNDS = (0.25, 4.0)  # on squared distances in the bounded kernel, for sigma = 1 (Wang et al. 2019)
TOY = {"num_steps": 45_000, "batch_size": 256, "latent_dim": 2, "encoder": "none", "lr_decay": 0.4}
IMAGES = {"num_steps": 12_000, "batch_size": 64, "latent_dim": 32, "encoder": "learned", "lr_decay": 0.7}
DEFAULTS = {"digits": IMAGES | {"num_steps": 1500}, "ring": TOY | {"num_steps": 20_000}, "grid": TOY}
# The kernel mixture, by kernel, or by data set where the kernel acts on the data itself: from the width of a
# mode to the width of the whole, in steps of two.
MIXTURES = {
    "gaussian": (1.0,),
    "rational_quadratic": (0.2, 0.5, 1.0, 2.0, 5.0),  # Binkowski et al. 2018
    "linear": (1.0,),
    "ring": tuple(0.01 * 2**i for i in range(8)),
    "grid": tuple(0.05 * 2**i for i in range(7)),
    "images": (2.0, 4.0, 8.0, 16.0, 32.0),
}


@dataclasses.dataclass
class Args:
    exp_name: str = SCRIPT
    """first part of the run folder's name"""
    seed: int = 1
    """seed of every random number of the run"""
    torch_deterministic: bool = True
    """ask torch for deterministic algorithms where it has them"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where to train; auto takes CUDA, then MPS, then the CPU"""
    compile: bool = False
    """on CUDA: record a training step as a CUDA graph and replay it; elsewhere nothing"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "minimal-gans"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user; by default your own"""

    dataset: Literal["mnist", "fashion-mnist", "kmnist", "digits", "ring", "grid"] = "mnist"
    """images; digits needs no download; ring (8 Gaussians) and grid (25 Gaussians) are 2-D toys"""
    data_dir: str = "data"
    """folder of the image files in torchvision's layout; missing files are downloaded to it"""
    eval_split: Literal["test", "validation"] = "test"
    """what samples are compared with; validation takes the last sixth of the training images out for it"""

    num_steps: int | None = None
    """generator updates (default: by data set)"""
    batch_size: int | None = None
    """real and fake samples in a batch (default: 64 images, 256 points)"""
    latent_dim: int | None = None
    """size of the generator's Gaussian input (default: 32 for images, 2 for toys)"""
    channels: int = 32
    """channels of the image networks' 14 x 14 maps; those of 7 x 7 have twice, of 28 x 28 half as many"""
    encoder: Literal["learned", "none"] | None = None
    """none: the kernel acts on the data itself, a moment matching network (default: none for toys)"""
    feature_dim: int = 16
    """size of the critic's output, the space in which the kernel acts"""
    feature_scale: float = 8.0
    """factor on the critic's output; under spectral_norm it bounds the critic's Lipschitz constant"""
    critic_steps: int = 1
    """critic updates per generator update"""
    lr_generator: float = 3e-3
    """Adam's learning rate for the generator"""
    lr_critic: float = 2e-3
    """Adam's learning rate for the critic and a learned kernel"""
    beta1: float = 0.5
    """Adam's decay of the first moment"""
    lr_decay: float | None = None
    """last share of the run, over which the learning rates fall to zero (default: 0.7 images, 0.4 toys)"""
    ema_decay: float = 0.999
    """decay per step of the averaged generator, which draws the samples"""

    kernel: Literal["gaussian", "rational_quadratic", "linear"] = "gaussian"
    """mixture of Gaussians, mixture of rational quadratics, or the dot product"""
    bandwidths: tuple[float, ...] | None = None
    """the mixture: Gaussian widths sigma, or rational-quadratic exponents alpha (default: by data set)"""
    bandwidth_mode: Literal["fixed", "median", "learned"] = "fixed"
    """median: in units of the batch's median distance; learned: widths and weights train with the critic"""
    repulsion: float = 1.0
    """lambda of Wang et al. (2019): 1 is the repulsive critic loss, -1 the attractive one, minus MMD^2"""
    bounded_kernel: bool = False
    """bound the squared distances in the critic's loss (Wang et al. 2019)"""
    unbiased: bool = True
    """leave the pairs of a sample with itself out of the means"""
    gradient_penalty: float = 0.0
    """weight of the penalty on the gradient of the witness function (Binkowski et al. 2018)"""
    spectral_norm: bool = True
    """divide each of the critic's weight matrices by its spectral norm"""

    num_eval_samples: int = 10_000
    """samples drawn for an evaluation; 0 switches evaluation off"""
    eval_every: int | None = None
    """steps between evaluations, pictures and checkpoints (default: a fifth of the run)"""
    log_every: int = 100
    """steps between lines of metrics.jsonl"""
    run_dir: str = "runs"
    """folder in which run folders are made"""
    resume: str | None = None
    """run folder to go on with"""
    generate: int = 0
    """draw this many samples from --checkpoint into the new folder --out, instead of training"""
    checkpoint: str | None = None
    """a run's checkpoint.pt, for --generate"""
    out: str | None = None
    """folder for --generate"""

    def __post_init__(self) -> None:
        if self.resume is None:  # else what was not given is taken from the run
            for name, value in DEFAULTS.get(self.dataset, IMAGES).items():
                setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
            if self.bandwidths is None:
                gaussian = self.kernel == "gaussian" and self.bandwidth_mode == "fixed"
                space = self.dataset if self.dataset in TOYS else "images"
                self.bandwidths = MIXTURES[space if gaussian and self.encoder == "none" else self.kernel]
            self.eval_every = math.ceil(self.num_steps / 5) if self.eval_every is None else self.eval_every
        positive = "num_steps latent_dim channels feature_dim critic_steps eval_every log_every feature_scale"
        for names, wanted, fits in (
            (f"{positive} lr_generator lr_critic", "positive", lambda v: 0 < v < math.inf),
            ("bandwidths", "positive", lambda v: v and all(0 < s < math.inf for s in v)),
            ("batch_size", "at least 2", lambda v: v >= 2),
            ("repulsion", "finite", math.isfinite),
            ("gradient_penalty generate", "in [0, inf)", lambda v: 0 <= v < math.inf),
            ("num_eval_samples", "0 or at least 10", lambda v: v == 0 or 10 <= v < math.inf),
            ("ema_decay lr_decay", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("beta1", "in [0, 1)", lambda v: 0 <= v < 1),
            ("seed", "in [0, 2^32)", lambda v: 0 <= v < 2**32),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
        if self.encoder == "none" and (self.gradient_penalty or self.bandwidth_mode == "learned"):
            raise ValueError("--encoder none has no critic to penalise, and none to learn bandwidths with")
        if not bool(self.generate) == bool(self.checkpoint) == bool(self.out):
            raise ValueError("--generate, --checkpoint <run>/checkpoint.pt and --out <folder> go together")
        if self.kernel == "linear" and (self.bandwidth_mode != "fixed" or self.bounded_kernel):
            raise ValueError("--kernel linear has no bandwidths and no bounds: leave these options away")


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong and what to do about it, and leave with exit code 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------
# Data


def load_images(dataset: str, data_dir: str, eval_split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and evaluation images (n, 28, 28) uint8 and labels (n,) int64: x, y, x_eval, y_eval.

    `digits` is scikit-learn's 1,797 digits of 8 x 8, enlarged; the others are read in torchvision's layout,
    and downloaded if they are not there. With eval_split "validation" the last sixth of the training images
    is the evaluation part, and the test images are not touched.
    """
    if dataset == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
        images = F.interpolate(images, size=28, mode="bilinear").squeeze(1).round().to(torch.uint8)
        # The file is in the order of its writers; mix them, always in the same way.
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
        images, labels = images[order], torch.from_numpy(labels).long()[order]
        x, y, x_eval, y_eval = images[:1437], labels[:1437], images[1437:], labels[1437:]
    else:
        from torchvision import datasets

        name = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[dataset]
        try:
            sets = [getattr(datasets, name)(data_dir, train, download=True) for train in (True, False)]
            for s in sets:
                if s.data.shape != (len(s.targets), 28, 28) or not 0 <= s.targets.max() <= 9:
                    raise ValueError(f"images {tuple(s.data.shape)}, labels {tuple(s.targets.shape)}")
        except Exception as error:
            where = f"{dataset} is missing or damaged in {Path(data_dir) / name / 'raw'} ({error!r:.200})"
            other = "name another folder with --data-dir, or take --dataset digits, which needs no download"
            fail(f"{where}; delete damaged files there to download it again, {other}")
        x, y, x_eval, y_eval = (v for s in sets for v in (s.data, s.targets))
    if eval_split == "validation":
        n = len(x) * 5 // 6
        x, y, x_eval, y_eval = x[:n], y[:n], x[n:], y[n:]
    return x, y, x_eval, y_eval


def toy_modes(dataset: str) -> tuple[Tensor, float]:
    """Means (k, 2) and standard deviation of a 2-D mixture, as in VEEGAN (2017) and PacGAN (2018)."""
    if dataset == "ring":
        angle = torch.arange(8) * (math.pi / 4)
        return torch.stack((angle.cos(), angle.sin()), 1), 0.01
    axis = torch.arange(-4.0, 5.0, 2.0)
    return torch.cartesian_prod(axis, axis), 0.05


def load_toy(dataset: str, num_samples: int = 100_000) -> Tensor:
    """Samples (num_samples, 2) of a 2-D mixture with equal weights, the same ones in every run."""
    modes, std = toy_modes(dataset)
    rng = torch.Generator().manual_seed(0)
    index = torch.randint(len(modes), (num_samples,), generator=rng)
    return modes[index] + std * torch.randn(num_samples, 2, generator=rng)


def to_float(images: Tensor) -> Tensor:
    """uint8 images (n, 28, 28) as floats (n, 1, 28, 28) in [-1, 1]."""
    return images.unsqueeze(1).float() / 127.5 - 1


def draw_batch(data: Tensor, batch_size: int) -> Tensor:
    """A batch drawn with replacement: images (b, 1, 28, 28) in [-1, 1], or points (b, 2)."""
    batch = data[torch.randint(len(data), (batch_size,), device=data.device)]
    return to_float(batch) if batch.dtype == torch.uint8 else batch


# ---------------------------------------------------------------------------------------------------------
# Networks


def make_generator(latent_dim: int, channels: int, toy: bool) -> nn.Sequential:
    """Latent (b, latent_dim) to image (b, 1, 28, 28) in [-1, 1], or to point (b, 2)."""
    if toy:
        return nn.Sequential(
            *(nn.Linear(latent_dim, 128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.ReLU()),
            nn.Linear(128, 2),
        )
    c, half = channels, max(1, channels // 2)
    return nn.Sequential(
        *(nn.Linear(latent_dim, 2 * c * 49, bias=False), nn.Unflatten(1, (2 * c, 7, 7))),
        *(nn.BatchNorm2d(2 * c), nn.ReLU()),
        *(nn.Conv2d(2 * c, 2 * c, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * c, c, 4, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()),
        *(nn.ConvTranspose2d(c, half, 4, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU()),
        *(nn.Conv2d(half, 1, 3, 1, 1), nn.Tanh()),
    ).to(memory_format=torch.channels_last)  # half the time of a step on a CPU


class Affine(nn.Module):
    """factor * x + shift, with two constants."""

    def __init__(self, factor: float, shift: float = 0.0):
        super().__init__()
        self.factor, self.shift = factor, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.shift


def make_critic(feature_dim: int, channels: int, toy: bool, spectral_norm: bool, scale: float) -> nn.Module:
    """Image (b, 1, 28, 28) or point (b, 2) to features (b, feature_dim)."""
    sn = nn.utils.parametrizations.spectral_norm if spectral_norm else nn.Identity()
    c, act = channels, nn.LeakyReLU(0.2)
    if toy:
        return nn.Sequential(
            *(sn(nn.Linear(2, 128)), act),
            *(sn(nn.Linear(128, 128)), act),
            *(sn(nn.Linear(128, 128)), act),
            *(sn(nn.Linear(128, feature_dim)), Affine(scale)),
        )
    return nn.Sequential(
        Affine(1.0, 1.0),  # black becomes the 0 with which convolutions pad; or else they see a grey frame
        *(sn(nn.Conv2d(1, c, 4, 2, 1)), act),
        *(sn(nn.Conv2d(c, 2 * c, 4, 2, 1)), act),
        *(sn(nn.Conv2d(2 * c, 2 * c, 3, 1, 1)), act),
        *(nn.Flatten(), sn(nn.Linear(2 * c * 49, feature_dim)), Affine(scale)),
    ).to(memory_format=torch.channels_last)


class Kernel(nn.Module):
    """Widths and weights of a kernel mixture: fixed, in units of the batch's median distance, or learned."""

    def __init__(self, bandwidths: tuple[float, ...], mode: str):
        super().__init__()
        self.bandwidths, self.mode = tuple(bandwidths), mode
        if mode == "learned":
            self.log_bandwidth = nn.Parameter(torch.tensor(self.bandwidths).log())
            self.logit = nn.Parameter(torch.zeros(len(bandwidths)))

    def mixture(self) -> tuple:
        """Bandwidths and weights: constants, or tensors that train."""
        if self.mode == "learned":
            return self.log_bandwidth.exp(), self.logit.softmax(0) * len(self.logit)
        return self.bandwidths, None

    def unit(self, x: Tensor, y: Tensor) -> Tensor | float:
        """The length in which features x (n, d) and y (m, d) are measured."""
        return median_distance(x, y) if self.mode == "median" else 1.0


def average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model and its buffers, with a shorter memory in the first steps."""
    device = next(iter(model.state_dict().values())).device  # the count's too: a graph would take it as it is
    averaged = AveragedModel(model, device, use_buffers=True)

    @torch.no_grad()
    def update(model: nn.Module) -> None:
        pairs = zip(averaged.module.state_dict().values(), model.state_dict().values())
        averages, values = zip(*((a, v) for a, v in pairs if a.is_floating_point()))  # no counters
        # At update n what is kept is min(decay, (1 + n) / (10 + n)), and at the first one nothing.
        n = averaged.n_averaged
        weight = (torch.full_like(n, 9) / (n + 10)).clamp(min=1 - decay).masked_fill(n == 0, 1)
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
        n += 1

    averaged.update_parameters = update  # torch's own reads the count, for which the host would wait
    return averaged


# ---------------------------------------------------------------------------------------------------------
# Loss

ROADS = "auto", "triton", "tiled", "dense"
TILE = 512  # 512 x 512 float32 pairs are 1 MB: they stay in a core's cache for all the bandwidths


def kernel_means(
    x: Tensor,
    y: Tensor,
    bandwidths: tuple[float, ...] | Tensor,
    kernel: str = "gaussian",
    unbiased: bool = True,
    weights: tuple[float, ...] | Tensor | None = None,
    bounds: tuple[float, float] | None = None,
    road: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The three means that every MMD loss is made of: k_xx, k_yy and k_xy, scalars differentiable in x and y.

    Args:
        x, y: features (n, d) and (m, d), float32 or float64, on one device.
        bandwidths: (s,) positive numbers: widths sigma of "gaussian" in the units of x, or exponents alpha of
            "rational_quadratic"; a tensor gets gradients (a learned kernel); "linear" does not use them.
        kernel: "gaussian", sum over sigma of exp(-|a - b|^2 / 2 sigma^2); "rational_quadratic", sum over
            alpha of (1 + |a - b|^2 / 2 alpha)^-alpha (Binkowski et al. 2018, section 2.1); "linear", a . b.
        unbiased: leave the pairs (i, i) out of k_xx and k_yy (Gretton et al. 2012, eq. 3), or not (eq. 5).
        weights: (s,) factors of the mixture's parts, 1 by default; a tensor gets gradients.
        bounds: (low, high) of the bounded kernel (Wang et al. 2019, eq. 6): squared distances count as at
            least low within x and as at most high within y, so that pairs beyond are no longer pushed.
        road: "triton", kernels for float32 on CUDA, and "tiled", for all else: passes over the pairs in
            memory for n + m points; "dense", plain torch with a matrix per bandwidth, which second
            derivatives always take; "auto", dense for tensors of bandwidths or weights, else what can.

    Raises ValueError for shapes, dtypes or devices that do not fit, for fewer than two points in an unbiased
    mean, for bandwidths or bounds that are not positive (tensors are not looked into), and for unknown names.
    """
    check_points(x, y, 2 if unbiased else 1)
    if kernel not in ("gaussian", "rational_quadratic", "linear") or road not in ROADS:
        raise ValueError(f"unknown kernel {kernel!r} or road {road!r}")
    if kernel == "linear":
        if bounds:
            raise ValueError(f"the linear kernel takes no bounds, given {bounds}")
        n, m, sum_x, sum_y = len(x), len(y), x.sum(0), y.sum(0)
        own_x, own_y = (x.square().sum(), y.square().sum()) if unbiased else (0, 0)
        k_xx, k_yy = sum_x @ sum_x - own_x, sum_y @ sum_y - own_y
        return k_xx / pairs(n, unbiased), k_yy / pairs(m, unbiased), sum_x @ sum_y / (n * m)
    weights = (1.0,) * len(bandwidths) if weights is None else weights
    constant = not isinstance(bandwidths, Tensor) and not isinstance(weights, Tensor)
    if len(bandwidths) == 0 or len(weights) != len(bandwidths):
        raise ValueError(f"{len(bandwidths)} bandwidths with {len(weights)} weights")
    for name, values in (("bandwidths", bandwidths), ("bounds", bounds or ())):
        if not isinstance(values, Tensor) and not all(0 < v < math.inf for v in values):
            raise ValueError(f"{name} must be positive and finite, not {values}")
    if road == "dense" or (road == "auto" and not constant):
        return dense_means(x, y, bandwidths, weights, kernel, unbiased, bounds)
    if any(isinstance(v, Tensor) and v.requires_grad for v in (bandwidths, weights)):
        raise ValueError(f"road {road!r} has no gradient for bandwidths and weights; use 'dense' or 'auto'")
    mix = (tuple(v.tolist() if isinstance(v, Tensor) else v) for v in (bandwidths, weights))
    means = TritonMeans if takes_triton(x, road) else TiledMeans
    with torch.cuda.device_of(x):  # Triton takes the current one
        return means.apply(x, y, *mix, kernel, unbiased, bounds)


def mmd2(x: Tensor, y: Tensor, bandwidths: tuple[float, ...] | Tensor, **options) -> Tensor:
    """Squared maximum mean discrepancy k_xx + k_yy - 2 k_xy between x (n, d) and y (m, d): a scalar.

    Gretton et al. 2012, Lemma 6; arguments and errors are those of kernel_means. With unbiased=True it can be
    negative, with unbiased=False it cannot.
    """
    k_xx, k_yy, k_xy = kernel_means(x, y, bandwidths, **options)
    return k_xx + k_yy - 2 * k_xy


def critic_loss(k_xx: Tensor, k_yy: Tensor, k_xy: Tensor, repulsion: float) -> Tensor:
    """The critic's loss  lambda k_xx - (lambda - 1) k_xy - k_yy  (Wang et al. 2019, section 3.2), x real.

    repulsion is lambda: -1 is the attractive loss -MMD^2 (Li et al. 2017); 1 is the repulsive k_xx - k_yy, in
    which the critic spreads the real samples out instead of drawing them together.
    """
    return repulsion * k_xx - (repulsion - 1) * k_xy - k_yy


def witness(
    t: Tensor,
    x: Tensor,
    y: Tensor,
    bandwidths: tuple[float, ...] | Tensor,
    kernel: str = "gaussian",
    weights: tuple[float, ...] | Tensor | None = None,
) -> Tensor:
    """The witness function mean_i k(x_i, t) - mean_j k(y_j, t) at points t (l, d): (l,).

    Gretton et al. 2012, section 2.3, for x (n, d) and y (m, d); arguments as in kernel_means.
    """
    if kernel == "linear":
        return t @ (x.mean(0) - y.mean(0))
    weights = (1.0,) * len(bandwidths) if weights is None else weights
    k_x, k_y = (kernel_profile(squared_distances(t, v), bandwidths, weights, kernel)[0] for v in (x, y))
    return k_x.mean(1) - k_y.mean(1)


def gradient_penalty(
    critic: nn.Module, unit: Tensor | float, real: Tensor, fake: Tensor, h_real: Tensor, h_fake: Tensor, *mix
) -> Tensor:
    """Mean of (|grad f(t)| - 1)^2 of a batch's witness f, at random points t between real and fake samples.

    Binkowski et al. 2018, section 2.3. real and fake have one shape (b, ...), h_real and h_fake (b, d) are
    their features divided by unit; mix is bandwidths, kernel and weights, as in witness.
    """
    u = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype, device=real.device)
    t = torch.lerp(real, fake, u).requires_grad_()
    (grad,) = torch.autograd.grad(witness(critic(t) / unit, h_real, h_fake, *mix).sum(), t, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


def median_distance(x: Tensor, y: Tensor, max_points: int = 1000) -> Tensor:
    """Median distance between two of the points x (n, d) and y (m, d), of at most max_points each: a scalar.

    The "median heuristic" for sigma (Gretton et al. 2012, section 8); it carries no gradient.
    """
    z = torch.cat((x.detach()[:max_points], y.detach()[:max_points]))
    return F.pdist(z).median().clamp(min=1e-12)


def check_points(x: Tensor, y: Tensor, least: int) -> None:
    """Raise ValueError unless x (n, d) and y (m, d) share floating dtype and device and have least points."""
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be (n, d) and (m, d), not {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device or x.dtype not in (torch.float32, torch.float64):
        kinds = f"{x.dtype} on {x.device} and {y.dtype} on {y.device}"
        raise ValueError(f"x and y must both be float32 or both float64, on one device, not {kinds}")
    if min(len(x), len(y)) < least:
        raise ValueError(f"{len(x)} and {len(y)} points given, at least {least} of each are needed")


def pairs(n: int, unbiased: bool) -> int:
    """Number of ordered pairs of n points, without the pairs (i, i) if unbiased."""
    return n * (n - 1) if unbiased else n * n


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 of x (n, d) and y (m, d): (n, m), not negative, differentiable as often as you like."""
    center = x.detach().mean(0)  # distances do not change, and far from the origin they keep their digits
    x, y = x - center, y - center
    t = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
    return t + (t.clamp(min=0) - t).detach()  # clamp the value alone: duplicates keep their second derivative


def kernel_profile(t: Tensor, bandwidths, weights, kernel: str) -> tuple[Tensor, Tensor]:
    """The mixture k at squared distances t, and its slope -2 dk/dt; both have the shape of t."""
    k, slope = 0, 0
    for s, w in zip(bandwidths, weights):
        if kernel == "gaussian":
            part = w * (-t / (2 * s * s)).exp()
            part_slope = part / (s * s)
        else:
            base = 1 + t / (2 * s)
            part = w * (-s * base.log()).exp()
            part_slope = part / base
        k, slope = k + part, slope + part_slope
    return k, slope


def dense_means(x, y, bandwidths, weights, kernel, unbiased, bounds) -> tuple[Tensor, Tensor, Tensor]:
    """kernel_means in plain torch, with a matrix per bandwidth."""
    means = []
    for a, b, bound in ((x, x, "min"), (y, y, "max"), (x, y, None)):
        t = squared_distances(a, b)
        if bounds and bound:
            t = t.clamp(**{bound: bounds[bound == "max"]})
        k, _ = kernel_profile(t, bandwidths, weights, kernel)
        if unbiased and bound:
            k = k - k.diag().diag()
        means.append(k.sum() / (pairs(len(a), unbiased) if bound else k.numel()))
    return tuple(means)


class TiledMeans(torch.autograd.Function):
    """kernel_means in one pass over tiles of pairs, gradients included; it keeps n + m points, no matrix."""

    @staticmethod
    def forward(ctx, x, y, bandwidths, weights, kernel, unbiased, bounds):
        ctx.options = mix = bandwidths, weights, kernel, unbiased, bounds
        n, m, (low, high), (need_x, need_y) = len(x), len(y), bounds or (None, None), ctx.needs_input_grad[:2]
        x_, y_, y_own = x - x.mean(0), y - x.mean(0), y - y.mean(0)  # centred, as in squared_distances
        if n == m and 3 * n * n <= TILE * TILE and not bounds:
            (xx, yy, xy), (d_xx, d_yy, d_xy), d_yx = batched_sums(x_, y_own, y_, *mix[:4])
        else:
            xx, d_xx, _ = tile_sums(x_, x_, *mix[:3], low, None, unbiased, need_x, need_x)
            yy, d_yy, _ = tile_sums(y_own, y_own, *mix[:3], None, high, unbiased, need_y, need_y)
            xy, d_xy, d_yx = tile_sums(x_, y_, *mix[:3], None, None, False, need_x, need_y)
        n_xx, n_yy, n_xy = pairs(n, unbiased), pairs(m, unbiased), n * m
        ctx.save_for_backward(
            x, y, d_xx.mul_(2 / n_xx), d_yy.mul_(2 / n_yy), d_xy.div_(n_xy), d_yx.div_(n_xy)
        )
        return xx / n_xx, yy / n_yy, xy / n_xy

    @staticmethod
    def backward(ctx, g_xx, g_yy, g_xy):
        x, y, d_xx, d_yy, d_xy, d_yx = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():  # create_graph=True: someone wants second derivatives
            return dense_gradients(x, y, ctx, g_xx, g_yy, g_xy)
        grad_x = (g_xx * d_xx).addcmul_(g_xy, d_xy) if need[0] else None
        grad_y = (g_yy * d_yy).addcmul_(g_xy, d_yx) if need[1] else None
        return grad_x, grad_y, None, None, None, None, None


def dense_gradients(x: Tensor, y: Tensor, ctx, *g_means: Tensor) -> tuple:
    """What a backward pass of kernel_means returns where it is to be differentiated again."""
    inputs = [v for v, needed in zip((x, y), ctx.needs_input_grad) if needed]
    means = zip(dense_means(x, y, *ctx.options), g_means)
    means, g_means = zip(*((mean, g) for mean, g in means if mean.requires_grad))
    grads = torch.autograd.grad(means, inputs, g_means, create_graph=True)
    both = (grads[i] if needed else None for i, needed in zip((0, -1), ctx.needs_input_grad))
    return *both, None, None, None, None, None


def chain_unit(mix: list, kernel: str) -> float | None:
    """If each sigma of the mixture is half the one before, exp(-t / 2 sigma^2) is the fourth power of the one
    before, and one exponential serves them all: the c of 2^(c t) for the first of them, or else None."""
    chain = kernel == "gaussian" and all(mix[0][0] == s * 2**i for i, (s, _) in enumerate(mix))
    return -math.log2(math.e) / (2 * mix[0][0] ** 2) if chain else None


def chain_profile(p: Tensor, mix: list, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of k over the last two dimensions, and the slope, put into slope, from the first exponentials p."""
    total = mix[0][1] * p.sum((-2, -1))
    torch.mul(p, mix[0][1] / mix[0][0] ** 2, out=slope)
    for s, w in mix[1:]:
        slope.add_(p.mul_(p).mul_(p), alpha=w / s**2)
        total.add_(p.sum((-2, -1)), alpha=w)
    return total, slope


def batched_sums(x: Tensor, y_own: Tensor, y: Tensor, bandwidths, weights, kernel: str, unbiased: bool):
    """tile_sums of (x, x), (y, y) and (x, y) at once, for small x and y of one shape (n, d); y_own is y
    centred on itself. It makes a third of the calls, and calls are what a small batch spends its time on."""
    mix = sorted(zip(bandwidths, weights), reverse=True)
    unit = chain_unit(mix, kernel) or 1.0
    a, b = torch.stack((x, y_own, x)), torch.stack((x, y_own, y))
    a2, b2 = a.square().sum(2, keepdim=True), b.square().sum(2).unsqueeze(1)
    t = (a2 + b2).baddbmm_(a, b.mT, beta=unit, alpha=-2 * unit)  # (3, n, n), in units of the chain
    t.clamp_(max=0) if unit < 0 else t.clamp_(min=0)
    t[:2].diagonal(dim1=1, dim2=2).zero_()
    if unit < 0:
        p = t.exp2_()
        if unbiased:
            p[:2].diagonal(dim1=1, dim2=2).zero_()
        sums, slope = chain_profile(p, mix, torch.empty_like(p))
    else:
        k, slope = kernel_profile(t, bandwidths, weights, kernel)
        if unbiased:
            k[:2].diagonal(dim1=1, dim2=2).zero_()
        sums = k.sum((1, 2))
    d_a = (a * slope.sum(2, keepdim=True)).baddbmm_(slope, b, beta=-1)
    return sums, d_a, (slope[2].sum(0)[:, None] * y).addmm_(slope[2].T, x, beta=-1)


def tile_sums(a, b, bandwidths, weights, kernel, low, high, skip_diagonal, need_a, need_b):
    """Sum of k(a_i, b_j) over all pairs of a (n, d) and b (m, d), and its gradients in a and in b.

    With W_ij = -2 k'(t_ij) for squared distances t_ij, the gradient in a_i is sum_j W_ij b_j - a_i sum_j W_ij
    and likewise in b: two matrix products per tile, however many bandwidths there are. If b is a, tiles below
    the diagonal are left out, and the gradient is that in the first argument, which is half of the whole.
    """
    same = a is b
    mix = sorted(zip(bandwidths, weights), reverse=True)
    factor = chain_unit(mix, kernel) if low is None and high is None else None
    chain, unit = factor is not None, factor or 1.0
    # One matrix product makes a tile of unit * t. The gradient in b is transposed: that product is faster.
    a2, b2 = a.square().sum(1, keepdim=True), b.square().sum(1, keepdim=True)
    left = torch.cat((-2 * unit * a, unit * a2, torch.full_like(a2, unit)), 1)
    right = torch.cat((b, torch.ones_like(b2), b2), 1)
    a_t = a.T.contiguous()
    d_a, row_sums = torch.zeros_like(a), a.new_zeros(len(a), 1)
    d_bt, column_sums = torch.zeros_like(b.T.contiguous()), b.new_zeros(len(b))
    buffers = a.new_empty(2, min(TILE, len(a)) * min(TILE, len(b)))  # new memory for each tile costs time
    sums = []
    for i in range(0, len(a), TILE):
        for j in range(i if same else 0, len(b), TILE):
            rows, columns, diagonal = slice(i, i + TILE), slice(j, j + TILE), same and i == j
            size = len(a[rows]), len(b[columns])
            t, slope = (buffer[: size[0] * size[1]].view(size) for buffer in buffers)
            torch.mm(left[rows], right[columns].T, out=t)
            t.clamp_(max=0) if chain else t.clamp_(min=0)
            if diagonal:
                t.fill_diagonal_(0)
            if chain:
                p = t.exp2_()
                if diagonal and skip_diagonal:
                    p.fill_diagonal_(0)
                total, slope = chain_profile(p, mix, slope)
            else:
                inside = t > low if low else t < high if high else None
                t = t.clamp_(low, high) if low or high else t
                k, slope = kernel_profile(t, bandwidths, weights, kernel)
                slope = slope if inside is None else slope * inside
                if diagonal and skip_diagonal:
                    k.fill_diagonal_(0)
                total = k.sum()
            sums.append(2 * total if same and not diagonal else total)
            if need_a:
                d_a[rows].addmm_(slope, b[columns])
                row_sums[rows] += slope.sum(1, keepdim=True)
            if need_b and not diagonal:
                d_bt[:, columns].addmm_(a_t[:, rows], slope)
                column_sums[columns] += slope.sum(0)
    if same:
        d_a, row_sums = d_a + d_bt.T, row_sums + column_sums[:, None]
    return torch.stack(sums).sum(), d_a.addcmul_(row_sums, a, value=-1), (d_bt - column_sums * b.T).T


# On CUDA two Triton kernels make the same numbers without a matrix, from the squared distances t of the rows
# of z = (x, y):
#     means     k_xx, k_yy, k_xy: sums of k(t) over a quarter of the pairs each
#     gradient  d_i = sum_j c_ij W(t_ij) (z_j - z_i), with W = -2 dk/dt and c_ij the weight of the pair's mean
#
#          x . . . . . y . . . . .     A program of `means` owns a tile of one quarter, and puts its sum in a
#    x   [ xx : tile | xy : tile ]     place of its own; of xx and yy, tiles below the diagonal are left out.
#    .   ========= strip =========     One of `gradient` owns a strip of rows and goes along all columns,
#    y   [           | yy : tile ]     or, of few points, every so many tiles of them. No sum depends on who
#                                      comes first: each run gives the same numbers.

# Up to d coordinates: how many `gradient` takes at once, how many of them it makes, and its warps.
GRADIENT_BLOCKS = (16, 16, 16, 2), (32, 32, 32, 2), (64, 64, 64, 4), (math.inf, 32, 128, 8)


@cache
def triton_means() -> tuple:
    """The kernels `means` and `gradient`, made at their first use: no other road needs Triton."""
    global tl, load, profile  # where Triton looks for what a kernel names
    import triton
    import triton.language as tl

    # fmt: off
    @triton.jit
    def load(z, center, first, end, k, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
        # Rows first, first + 1, ... of z, centred, from coordinate k on; 0 after row `end`: (BLOCK, BLOCK_D).
        i, j = tl.arange(0, BLOCK), k + tl.arange(0, BLOCK_D)
        inside = (i < end - first)[:, None] & (j < D)[None, :]
        values = tl.load(z + tl.cast(first, tl.int64) * D + (i[:, None] * D + j[None, :]), inside, 0.0)
        return tl.where(inside, values - tl.load(center + j, j < D, 0.0)[None, :], 0.0)

    @triton.jit
    def profile(z, center, own, row, row_end, col, col_end, mix, low, high, KIND: tl.constexpr,
                PARTS: tl.constexpr, UNBIASED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
        # k and W, (BLOCK, BLOCK) each, of the pairs from (row, col) on; 0 where there is none. own are the
        # rows' first BLOCK_D coordinates, loaded already, and those of the columns are returned.
        other = load(z, center, col, col_end, 0, D, BLOCK, BLOCK_D)
        dot = tl.dot(own, tl.trans(other), input_precision=PRECISION)
        a2, b2 = tl.sum(own * own, 1), tl.sum(other * other, 1)
        for k in range(BLOCK_D, D, BLOCK_D):  # none, where all coordinates fit
            a = load(z, center, row, row_end, k, D, BLOCK, BLOCK_D)
            b = load(z, center, col, col_end, k, D, BLOCK, BLOCK_D)
            dot = tl.dot(a, tl.trans(b), dot, input_precision=PRECISION)
            a2 += tl.sum(a * a, 1)
            b2 += tl.sum(b * b, 1)
        rows, cols = row + tl.arange(0, BLOCK), col + tl.arange(0, BLOCK)
        same = rows[:, None] == cols[None, :]
        pair = (rows < row_end)[:, None] & (cols < col_end)[None, :]
        t = tl.where(same, 0.0, tl.maximum(a2[:, None] + b2[None, :] - 2 * dot, 0.0))
        pushed = (t > low) & (t < high) & ~same
        t = tl.minimum(tl.maximum(t, low), high)
        total, slope = tl.zeros_like(t), tl.zeros_like(t)
        chain = tl.exp2(tl.load(mix) * t) if KIND == "chain" else t
        for s in tl.static_range(PARTS):
            unit, weight, last = tl.load(mix + 3 * s), tl.load(mix + 3 * s + 1), tl.load(mix + 3 * s + 2)
            if KIND == "rational_quadratic":
                part = weight * tl.exp2(-last * tl.log2(1 + unit * t))
                slope += part / (1 + unit * t)
            elif KIND == "chain":  # see chain_unit
                part = weight * chain
                slope += last * part
                chain = (chain * chain) * (chain * chain)
            else:
                part = weight * tl.exp2(unit * t)
                slope += last * part
            total += part
        counted = pair & ~same if UNBIASED else pair
        return tl.where(counted, total, 0.0), tl.where(pair & pushed, slope, 0.0), other

    @triton.jit
    def means(z, centers, mix, sums, n, m, low, high, KIND: tl.constexpr, PARTS: tl.constexpr,
              UNBIASED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
              PRECISION: tl.constexpr):
        i, j, quarter = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # quarters: xx, yy, xy
        row_end, col_end = tl.where(quarter == 1, n + m, n), tl.where(quarter == 0, n, n + m)
        row, col = tl.where(quarter == 1, n, 0) + i * BLOCK, tl.where(quarter == 0, 0, n) + j * BLOCK
        low, high = tl.where(quarter == 0, low, -1.0), tl.where(quarter == 1, high, float("inf"))
        total = 0.0
        if ((j >= i) | (quarter == 2)) & (row < row_end) & (col < col_end):
            center = centers + tl.where(quarter == 1, D, 0)
            own = load(z, center, row, row_end, 0, D, BLOCK, BLOCK_D)
            k, _, _ = profile(z, center, own, row, row_end, col, col_end, mix, low, high, KIND, PARTS,
                              UNBIASED, D, BLOCK, BLOCK_D, PRECISION)
            total = tl.sum(k) * tl.where((quarter < 2) & (j > i), 2.0, 1.0)
        tl.store(sums + (quarter * tl.num_programs(0) + i) * tl.num_programs(1) + j, total)

    @triton.jit(do_not_specialize=["first"])
    def gradient(z, centers, mix, factors, out, first, n, m, low, high, KIND: tl.constexpr,
                 PARTS: tl.constexpr, UNBIASED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                 BLOCK_D: tl.constexpr, OUT_D: tl.constexpr, PRECISION: tl.constexpr):
        strip, strips, k = first + tl.program_id(0), tl.cdiv(n, BLOCK), tl.program_id(1) * OUT_D
        share, shares = tl.program_id(2), tl.num_programs(2)
        in_y = strip >= strips
        row, row_end = tl.where(in_y, n + (strip - strips) * BLOCK, strip * BLOCK), tl.where(in_y, n + m, n)
        grad = tl.zeros((BLOCK, OUT_D), tl.float32)
        for side in range(2):  # columns of x, of y
            quarter = tl.where((side == 1) != in_y, 2, side)
            center, col_end = centers + tl.where(quarter == 1, D, 0), n + side * m
            least, most = tl.where(quarter == 0, low, -1.0), tl.where(quarter == 1, high, float("inf"))
            pulled, weight = tl.zeros((BLOCK, OUT_D), tl.float32), tl.zeros((BLOCK,), tl.float32)
            own = load(z, center, row, row_end, 0, D, BLOCK, BLOCK_D)
            for col in range(side * n + share * BLOCK, col_end, shares * BLOCK):
                _, w, other = profile(z, center, own, row, row_end, col, col_end, mix, least, most, KIND,
                                      PARTS, UNBIASED, D, BLOCK, BLOCK_D, PRECISION)
                b = other if D <= BLOCK_D else load(z, center, col, col_end, k, D, BLOCK, OUT_D)
                pulled = tl.dot(w, b, pulled, input_precision=PRECISION)
                weight += tl.sum(w, 1)
            a = own if D <= BLOCK_D else load(z, center, row, row_end, k, D, BLOCK, OUT_D)
            grad += tl.load(factors + quarter) * (pulled - weight[:, None] * a)
        i, k = tl.arange(0, BLOCK), k + tl.arange(0, OUT_D)
        inside = (i < row_end - row)[:, None] & (k < D)[None, :]
        first_row = tl.cast(share, tl.int64) * (n + m) + row
        tl.store(out + first_row * D + (i[:, None] * D + k[None, :]), grad, inside)

    # fmt: on
    return means, gradient


class TritonMeans(torch.autograd.Function):
    """kernel_means by Triton kernels, a pass for the value and one for the gradients; no matrix is kept."""

    @staticmethod
    def forward(ctx, x, y, bandwidths, weights, kernel, unbiased, bounds):
        n, m, d, (low, high) = len(x), len(y), x.shape[1], bounds or (-1.0, math.inf)
        z, centers = torch.cat((x, y)), torch.stack((x.mean(0), y.mean(0)))  # centred as in squared_distances
        mix, kind = mixture_table(bandwidths, weights, kernel, x.device)
        ctx.options = bandwidths, weights, kernel, unbiased, bounds
        ctx.sizes = n, m, float(low), float(high), kind, len(bandwidths), unbiased, d
        tiles, block_d = -(-max(n, m) // 64), 16 if d <= 16 else 32
        sums = x.new_empty(3, tiles, tiles)
        launch, options = triton_means()[0][(tiles, tiles, 3)], {"num_warps": 4, "num_stages": 2}
        launch(z, centers, mix, sums, *ctx.sizes, 64, block_d, dot_precision(x), **options)
        ctx.save_for_backward(x, y, z, centers, mix)
        xx, yy, xy = sums.sum((1, 2))
        return xx / pairs(n, unbiased), yy / pairs(m, unbiased), xy / (n * m)

    @staticmethod
    def backward(ctx, g_xx, g_yy, g_xy):
        x, y, z, centers, mix = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: someone wants second derivatives
            return dense_gradients(x, y, ctx, g_xx, g_yy, g_xy)
        n, m, *_, unbiased, d = ctx.sizes
        factors = g_xx * (2 / pairs(n, unbiased)), g_yy * (2 / pairs(m, unbiased)), g_xy / (n * m)
        # With these blocks, warps and stages the compiler keeps all in registers (tests/test_triton.py).
        block_d, out_d, warps = next(sizes for most, *sizes in GRADIENT_BLOCKS if d <= most)
        need_x, need_y = ctx.needs_input_grad[:2]
        strips = -(-n // 32) * need_x + -(-m // 32) * need_y, -(-d // out_d)
        # Where strips are few, several programs share the columns of one, so that all of a GPU has work.
        shares = max(1, min(512 // math.prod(strips), max(n, m) // 32))
        out, factors = x.new_empty(shares, n + m, d), torch.stack(factors)
        launch, first = triton_means()[1][(*strips, shares)], 0 if need_x else -(-n // 32)
        blocks, options = (32, block_d, out_d, dot_precision(x)), {"num_warps": warps, "num_stages": 2}
        launch(z, centers, mix, factors, out, first, *ctx.sizes, *blocks, **options)
        out = out.sum(0)
        grads = (g if needed else None for g, needed in zip(out.split((n, m)), ctx.needs_input_grad))
        return *grads, None, None, None, None, None


@lru_cache(maxsize=64)
def mixture_table(bandwidths: tuple, weights: tuple, kernel: str, device: torch.device) -> tuple[Tensor, str]:
    """What the kernels read of a mixture, (s, 3), on the device from the first time on; and their KIND."""
    mix, log2_e = sorted(zip(bandwidths, weights), reverse=True), math.log2(math.e)
    if kernel == "gaussian":
        rows = [(-log2_e / (2 * s * s), w, 1 / (s * s)) for s, w in mix]
    else:
        rows = [(1 / (2 * s), w, s) for s, w in mix]
    with torch.inference_mode(False):  # a table of inference could not be used in training
        table = torch.tensor(rows, dtype=torch.float32, device=device)
    return table, "chain" if chain_unit(mix, kernel) else kernel


def takes_triton(x: Tensor, road: str) -> bool:
    """Whether Triton's kernels are to run: where they can, for float32 on CUDA, or if the road says so.

    Where Triton is missing, fails, or has no such device, it warns, and another road gives the same numbers.
    """
    if road != "triton" and not (road == "auto" and x.is_cuda and x.dtype == torch.float32):
        return False
    lacks = "" if x.dtype == torch.float32 else f"Triton's kernels take float32, not {x.dtype}"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        lacks = f"Triton has no {x.device.type}"
    if lacks := lacks or triton_lacks(x.device):
        warnings.warn(f"{lacks}; the loss takes a slower road", stacklevel=3)
    return not lacks


@cache
def triton_lacks(device: torch.device) -> str:
    """Why Triton cannot be used on a device, as by its first kernel there; nothing if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import triton

        @triton.jit
        def nothing(x):
            pass

        with torch.cuda.device_of(x := torch.zeros(1, device=device)):
            nothing[(1,)](x)
    except Exception as error:  # no C compiler, for one, or a GPU that is too old
        return f"Triton fails ({error!r:.200})"
    return ""


def dot_precision(x: Tensor) -> str:
    """How the kernels multiply: TF32 if torch may, else three TF32 products, which are as good as float32."""
    if not x.is_cuda or torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "ieee"
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set in the newer way, of which the older one knows nothing
        exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


# ---------------------------------------------------------------------------------------------------------
# Evaluation


def make_judge() -> nn.Sequential:
    """Images (b, 1, 28, 28) to class logits (b, 10). Compared are the 128 inputs of the last layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 5, 2, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


def train_judge(images: Tensor, labels: Tensor, epochs: int = 4, batch_size: int = 128) -> nn.Sequential:
    """A judge trained on images (n, 28, 28) uint8 and labels (n,), from seed 0; leaves torch's alone."""
    with torch.random.fork_rng([images.device] * images.is_cuda):
        torch.manual_seed(0)
        judge = make_judge().to(images.device)
        optimizer = torch.optim.Adam(judge.parameters())
        steps = epochs * math.ceil(len(images) / batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for _ in range(epochs):
            for index in torch.randperm(len(images), device=images.device).split(batch_size):
                loss = F.cross_entropy(judge(to_float(images[index])), labels[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return judge.eval().requires_grad_(False)


def load_judge(args, images: Tensor, labels: Tensor) -> tuple[nn.Sequential, str]:
    """The judge of these training images, from --run-dir if it is there, and the hash of its weights."""
    data = hashlib.sha256(images.cpu().numpy().tobytes() + labels.cpu().numpy().tobytes()).hexdigest()[:12]
    path = Path(args.run_dir) / f"judge__{args.dataset}__{data}.pt"
    judge = make_judge().to(images.device).eval().requires_grad_(False)
    try:
        judge.load_state_dict(torch.load(path, map_location=images.device, weights_only=True))
    except Exception:  # not there yet, or damaged
        print(f"training the judge of the images, once; it is kept in {path}", flush=True)
        judge = train_judge(images, labels)
        write_file(path, partial(torch.save, judge.state_dict()))
    weights = b"".join(v.cpu().numpy().tobytes() for v in judge.state_dict().values())
    return judge, hashlib.sha256(weights).hexdigest()[:12]


def judge_images(judge: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of images, uint8 (n, 28, 28) or float (n, 1, 28, 28), in blocks of 1,000."""
    blocks = [judge[:-1](to_float(b) if b.dtype == torch.uint8 else b) for b in images.split(1000)]
    return torch.cat(blocks), torch.cat([judge[-1](features) for features in blocks])


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features x (n, d) and y (m, d) (Heusel et al. 2017, eq. 6)."""
    x, y = x.cpu().double(), y.cpu().double()  # MPS has no float64
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.nan  # some LAPACKs crash on it
    cov_x, cov_y = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()  # trace of (cov_x cov_y)^(1/2)
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of features fake (m, d) for real (n, d) (Kynkaanniemi et al. 2019, eq. 1-3): the
    share of each set in reach of the other, where a point reaches as far as its k-th neighbour in its set."""

    def share_within(points: Tensor, others: Tensor) -> float:
        reach = torch.cat([torch.cdist(b, others).kthvalue(k + 1).values for b in others.split(1000)])
        within = [(torch.cdist(b, others) <= reach).any(1) for b in points.split(1000)]
        return torch.cat(within).float().mean().item()

    return share_within(fake, real), share_within(real, fake)


def image_metrics(judge: nn.Sequential, fake: Tensor, real: Tensor, labels: Tensor) -> dict:
    """Metrics of images fake (m, ...) against real (n, 28, 28) and the classes labels (l,), by the judge."""
    f_fake, logits = judge_images(judge, fake)
    f_real, _ = judge_images(judge, real)
    precision, recall = precision_recall(f_real, f_fake)
    shares, target = (c.cpu().bincount(minlength=10) / len(c) for c in (logits.argmax(1), labels))
    kl = torch.xlogy(shares, shares / target).sum().item()
    metrics = {"fid": frechet_distance(f_real, f_fake), "precision": precision, "recall": recall}
    return metrics | {"class_kl": kl, "class_shares": [round(s, 4) for s in shares.tolist()]}


def toy_metrics(samples: Tensor, modes: Tensor, std: float) -> dict:
    """Of samples (n, 2) and a mixture's modes (k, 2): modes covered, share of samples of high quality (within
    3 std of the nearest mode), and the KL divergence of the modes' shares, by nearest mode, from uniform."""
    distance, nearest = torch.cdist(samples, modes).min(1)
    good = distance <= 3 * std
    shares = nearest.bincount(minlength=len(modes)) / len(samples)
    kl = torch.xlogy(shares, shares * len(modes)).sum().item()
    return {"modes": len(nearest[good].unique()), "high_quality": good.float().mean().item(), "mode_kl": kl}


class Evaluation:
    """Measures samples: points by a toy's modes, images by the judge against images that are held out.

    `data` are the training samples, `held` their labels and the images (n, 28, 28) and labels of the other
    part.
    """

    def __init__(self, args, data: Tensor, held: list[Tensor]):
        self.modes = toy_modes(args.dataset) if not held else None
        self.count, self.split = args.num_eval_samples, args.eval_split
        if held and self.count:
            labels, x, self.labels = held
            self.count = min(self.count, len(x))
            self.judge, self.judge_hash = load_judge(args, data, labels)
            self.images, self.known = x[: self.count], data[: self.count]

    @cached_property
    def facts(self) -> dict:
        """What results.json says of the judge, with its metrics for training images: the floor."""
        if self.modes or not self.count:
            return {}
        hits = judge_images(self.judge, self.images)[1].argmax(1) == self.labels[: self.count]
        facts = {"judge": self.judge_hash, "judge_accuracy": hits.float().mean().item()}
        floor = image_metrics(self.judge, self.known, self.images, self.labels)
        print(f"floor of fid, training against {self.split} images: {floor['fid']:.3f}", flush=True)
        return facts | {"num_eval": self.count} | {f"floor_{name}": v for name, v in floor.items()}

    def __call__(self, samples: Tensor) -> dict:
        """Metrics of images (n, ...) or points (n, 2), of which the first num_eval_samples count."""
        if not self.count:
            return {}
        if self.modes:
            return toy_metrics(samples[: self.count].cpu(), *self.modes)
        _ = self.facts  # says the floor, once
        return image_metrics(self.judge, samples[: self.count], self.images, self.labels)


@torch.no_grad()
def draw_samples(generator: nn.Module, latent_dim: int, count: int, seed: int, device) -> Tensor:
    """Samples (count, ...) of a generator in evaluation mode; the latents have a seed of their own."""
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, latent_dim, generator=rng).to(device)
    return torch.cat([generator.eval()(z) for z in latents.split(1000)])


# ---------------------------------------------------------------------------------------------------------
# Run folder and tracking


def write_file(path: Path, content: str | Callable) -> None:
    """Write text, or what content(file) writes, beside the file and rename: nobody sees half a file."""
    buffer, beside = io.BytesIO(), path.with_name(path.name + ".tmp")
    buffer.write(content.encode()) if isinstance(content, str) else content(buffer)
    beside.write_bytes(buffer.getbuffer())  # at once: on a full disk torch.save would not say what is wrong
    os.replace(beside, path)


@contextlib.contextmanager
def new_folder(name: str) -> Iterator[Path]:
    """A new folder of that name, which appears when it is full: nobody sees half of it."""
    out = Path(name)
    if out.exists():
        fail(f"--out {out} exists; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        (folder := Path(beside, out.name)).mkdir()
        yield folder
        os.replace(folder, out)


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of this script, on the CPU. Code in it is not run; what is wrong is said in one line."""
    if not path.is_file():
        fail(f"there is no checkpoint {path}; a run folder that was saved holds a checkpoint.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        origin, options = state["script"], state["args"].keys()
    except Exception as error:
        fail(f"checkpoint {path} is damaged, not a run's, or holds code, which is never run ({error!r:.80})")
    if origin != SCRIPT:
        fail(f"checkpoint {path} comes from {origin}, not from {SCRIPT}")
    unknown = sorted(options - Args.__dataclass_fields__.keys())
    if unknown or "rows" not in state:
        fail(f"checkpoint {path} is of another version of {SCRIPT}, with {', '.join(unknown) or 'no rows'}")
    return state


def resumed_args(args, saved: dict):
    """The saved arguments, updated by the options that were given and that a resumed run may change."""
    free = "num_steps eval_every log_every num_eval_samples device compile track data_dir run_dir resume"
    default = {field.name: field.default for field in dataclasses.fields(args)}
    typed = {a.split("=")[0].lstrip("-").replace("-", "_").removeprefix("no_") for a in sys.argv[1:]}
    given = {k: v for k, v in vars(args).items() if v != default[k] or k in typed}
    for name in given.keys() - {*free.split(), "wandb_project_name", "wandb_entity"}:
        if given[name] != saved[name]:
            fail(f"--{name.replace('_', '-')} {given[name]}: the run has {saved[name]}, and must keep it")
    near = str(Path(args.resume).resolve().parent)  # a run may have been moved
    return type(args)(**{**saved, "track": False, "device": "auto", "run_dir": near, **given})


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is the best there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in there if there[d]) if name == "auto" else name
    if not there[name]:
        fail(f"--device {name}: torch {torch.__version__} finds no such device; use --device cpu or auto")
    return torch.device(name)


def start_wandb(args, name: str, run_id: str | None):
    """A W&B run, going on with run_id if given; without a login it leaves with one line."""
    try:
        import wandb
    except ImportError:
        fail("--track needs wandb: pip install wandb")
    online = os.environ.get("WANDB_MODE", wandb.setup().settings.mode) == "online"
    if online and not wandb.login(prompt=False, verify=False):
        fail("--track: you are not logged in to W&B; run `wandb login`, or set WANDB_MODE=offline")
    options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": name, "id": run_id}
    options |= {"resume": "allow", "config": vars(args), "dir": args.run_dir}
    Path(args.run_dir).mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(**options)
    except Exception as error:
        offline = "logging offline, `wandb sync` sends it later"
        print(f"W&B is out of reach ({error!s:.200}); {offline}", file=sys.stderr)
        return wandb.init(**options, mode="offline")


def plot_curves(folder: Path, rows: list[dict]) -> None:
    """curves.png: every scalar of the rows of metrics.jsonl against the step; of no rows, nothing."""
    from matplotlib.figure import Figure

    names = dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, list))
    if names.pop("step", ...) is ...:
        return
    height = math.ceil(len(names) / 4)
    figure = Figure(figsize=(14, 2.6 * height))
    # By hand: a layout engine would draw all of it twice.
    figure.subplots_adjust(0.05, 0.2 / height, 0.99, 1 - 0.12 / height, 0.25, 0.5)
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(height, 4, place, title=name, xlabel="step")
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points), marker="o" if len(points) < 20 else None, markersize=3)
        axes.grid(alpha=0.3)
    write_file(folder / "curves.png", partial(figure.savefig, format="png", dpi=70))


def save_images(path: Path, images: Tensor) -> None:
    """A PNG of images (n, 1, 28, 28) in [-1, 1], ten in a row."""
    from torchvision.utils import save_image

    write_file(path, partial(save_image, (images + 1) / 2, format="png", nrow=10))


def save_points(path: Path, samples: Tensor, data: Tensor) -> None:
    """A PNG of 2,500 points (n, 2) over as many of the data (m, 2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    for points, name in ((data, "data"), (samples, "samples")):
        axes.scatter(*points[:2500].cpu().T, s=3, alpha=0.4, label=name)
    axes.legend(loc="upper right")
    write_file(path, partial(figure.savefig, format="png", dpi=70))


def run_facts(device: torch.device) -> dict:
    """What results.json says of the machine: peak memory (of the process, on a CPU), device, versions."""
    peak, name = 0, f"{device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_name(device)
    elif os.name == "posix":  # Windows does not say
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in kB, on macOS in bytes
        peak *= 1 if sys.platform == "darwin" else 1024
    versions = {"torch": torch.__version__, "torchvision": version("torchvision")}
    versions["python"] = sys.version.split()[0]
    return {"peak_memory_mb": round(peak / 1e6), "device": name, "versions": versions}


class Run:
    """A run: its folder, its steps, its checkpoints, and its twin at W&B."""

    quiet = None  # a bar where there is a terminal; with True there is none
    agree: Callable[[int], int] = int  # where several processes run: the signal that came to any of them
    evaluate: Callable[[], dict]  # measures the networks as they are, and draws samples.png: set by train

    def __init__(self, args, checkpoint: dict | None, device: torch.device):
        self.args, self.checkpoint, self.device = args, checkpoint or {}, device
        self.step = self.last_saved = self.checkpoint.get("step", 0)
        self.rows, self.signal, self.stopped = self.checkpoint.get("rows", []), 0, 0
        self.metrics = self.checkpoint.get("metrics", {})  # the latest; None where they are yet to be taken
        name = f"{args.exp_name}__{args.dataset}__{args.seed}__{int(time.time())}"
        self.folder = Path(args.run_dir) / name if args.resume is None else Path(args.resume)
        # With no step left, the metrics of the last must be there or still to be taken, and results.json not.
        last, results = self.rows[-1] if self.rows else {"step": 0}, self.folder / "results.json"
        ended = results.exists() and json.loads(results.read_text())["steps"] == self.step
        ended |= last["step"] < self.step or not (self.metrics or {}).keys() <= last.keys()
        if self.step > args.num_steps or (self.step == args.num_steps and ended):
            fail(f"{args.resume} has done its {self.step} steps; give more of them with --num-steps")
        wandb_id, name = self.checkpoint.get("wandb_id"), self.folder.resolve().name
        self.wandb_run = start_wandb(args, name, wandb_id) if args.track else None
        self.wandb_id = self.wandb_run.id if self.wandb_run else wandb_id
        self.folder.mkdir(parents=True, exist_ok=bool(checkpoint))
        write_file(self.folder / "args.json", json.dumps(vars(args), indent=2))
        # What an interrupted run has logged after its last checkpoint will be logged again.
        done = self.rows if self.metrics is not None else self.rows[:-1]
        write_file(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in done))

    def hold(self, **parts) -> None:
        """Networks and optimizers that a checkpoint holds; a resumed run's take their state from it."""
        self.parts = parts
        if self.checkpoint:
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint[name])
            torch.set_rng_state(self.checkpoint["rng"])
            if self.device.type == "cuda" and self.checkpoint["rng_cuda"] is not None:
                torch.cuda.set_rng_state(self.checkpoint["rng_cuda"], self.device)

    def save(self) -> None:
        """Write checkpoint.pt."""
        rng_cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"script": SCRIPT, "args": vars(self.args), "step": self.step, "rows": self.rows}
        state |= {"metrics": self.metrics, "seconds": time.time() - self.start, "paused": self.paused}
        state |= {"rng": torch.get_rng_state(), "rng_cuda": rng_cuda, "wandb_id": self.wandb_id}
        write_file(self.folder / "checkpoint.pt", partial(torch.save, state))
        self.last_saved = self.step

    def train_seconds(self) -> float:
        """Seconds of training up to now, before a resume too; evaluations do not count."""
        return time.time() - self.start - self.paused

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is to be done now."""
        return self.step % every == 0 or self.step == self.args.num_steps

    def stop(self, number: int, _) -> None:
        """Take a signal: the step at hand is the last one, and a second signal breaks it off."""
        self.signal = number
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sends every signal again
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, signal.default_int_handler)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to do. After Ctrl-C or SIGTERM the step at hand is the last, and saved."""
        handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.start = time.time() - self.checkpoint.get("seconds", 0.0)  # as if it had never been stopped
        total, self.paused = self.args.num_steps, self.checkpoint.get("paused", 0.0)
        self.bar = tqdm(total=total, initial=self.step, desc=SCRIPT, disable=self.quiet, dynamic_ncols=True)
        try:
            if self.metrics is None:  # the run was broken off while it was evaluated
                self.write_row()
                self.save()
            while self.step < total and not self.stopped:
                self.step += 1
                yield self.step
                self.bar.update()
                self.stopped = self.agree(self.signal)
                if self.stopped or self.due(self.args.eval_every):
                    self.save()
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def log(self, scalars: dict[str, Tensor | float]) -> None:
        """Log a step's scalars and, when it is due, the metrics and the samples.png of evaluate()."""
        scalars = {name: torch.as_tensor(value).item() for name, value in scalars.items()}
        evaluated, finite = self.due(self.args.eval_every), all(map(math.isfinite, scalars.values()))
        if evaluated:
            modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
            finite &= all(bool(v.isfinite().all()) for part in modules for v in part.state_dict().values())
        if not finite:
            why = f"the loss is not finite at step {self.step}: {scalars}; try lower learning rates"
            saved = f"{self.folder / 'checkpoint.pt'} of step {self.last_saved}"
            fail(f"{why}; last good checkpoint: {saved if self.last_saved else 'none yet'}")
        speed = {"steps_per_second": self.step / self.train_seconds()}
        self.rows.append({"step": self.step} | scalars | speed)
        if evaluated:
            self.metrics = None
            self.save()  # a run that is broken off in an evaluation goes on with it
        self.write_row()

    def write_row(self) -> None:
        """Write the last row to metrics.jsonl, W&B and the bar, with the metrics if they are to be taken."""
        row, evaluated = self.rows[-1], self.metrics is None
        if evaluated:
            pause = time.time()
            self.metrics = self.evaluate()
            self.paused += time.time() - pause
            row |= self.metrics
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.log_wandb(row, evaluated)
        plain = {name: value for name, value in self.metrics.items() if not isinstance(value, list)}
        shown = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in plain.items()}
        self.bar.set_postfix(loss=f"{list(row.values())[1]:.4f}", **shown, refresh=False)
        if evaluated and shown:
            self.bar.write(f"step {self.step}: " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def log_wandb(self, row: dict, evaluated: bool) -> None:
        """Send a row and, if there is a new one, samples.png to W&B, whose failures never cost a model; or,
        without a row, that this is the end."""
        if self.wandb_run is None:
            return
        try:
            import wandb

            if not row:
                return self.wandb_run.finish()
            pictures = {"samples": wandb.Image(str(self.folder / "samples.png"))} if evaluated else {}
            self.wandb_run.log({k: v for k, v in row.items() if k != "step"} | pictures, step=row["step"])
        except Exception as error:
            print(f"W&B failed ({error!s:.200}); the run goes on in {self.folder}", file=sys.stderr)
            self.wandb_run = None

    def finish(self, facts: Callable[[], dict]) -> Path:
        """Draw the curves; of a run that is done write results.json, with facts in it; returns the folder."""
        plot_curves(self.folder, self.rows)
        self.log_wandb({}, False)
        if self.step < self.args.num_steps:
            go_on = f"go on with: python {SCRIPT}.py --resume {self.folder}"
            print(f"stopped after step {self.step}; {go_on}", file=sys.stderr)
            raise SystemExit(128 + self.stopped)
        results = self.metrics | facts() | {"steps": self.step, "seconds": round(time.time() - self.start)}
        results |= {"steps_per_second": round(self.rows[-1]["steps_per_second"], 2)} | run_facts(self.device)
        write_file(self.folder / "results.json", json.dumps(results, indent=2))
        print("\n".join(f"{name:>20}  {value}" for name, value in results.items()))
        print("\n".join(f"{self.folder / name}" for name in ("samples.png", "curves.png", "checkpoint.pt")))
        return self.folder


# ---------------------------------------------------------------------------------------------------------
# Processes: torchrun starts several, each has a part of every batch, and all have the same weights

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ["RANK"]) if PROCESSES > 1 else 0  # the first one writes


def join_processes(args, device: torch.device) -> None:
    """Meet the other processes, if there are any: over NCCL on CUDA, a device for each, else over gloo."""
    if PROCESSES == 1:
        return
    if args.batch_size % PROCESSES:
        fail(f"--batch-size {args.batch_size} cannot be divided among {PROCESSES} processes; take a multiple")
    if device.type == "cuda":
        if (local := int(os.environ["LOCAL_RANK"])) >= (count := torch.cuda.device_count()):
            fail(f"more processes than the {count} GPUs of this machine: lower --nproc-per-node")
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The first process does what is inside before the others, which find what it has made."""
    if RANK:
        dist.barrier()
    yield
    if not RANK and PROCESSES > 1:
        dist.barrier()


def share(batch: Tensor) -> Tensor:
    """This process's part of a batch (b, ...) that all have drawn from one seed: (b / processes, ...)."""
    return batch.chunk(PROCESSES)[RANK]


def gather(x: Tensor) -> Tensor:
    """The whole batch (b processes, ...), in the order of one process, from everyone's part x (b, ...).

    Every process takes the same loss of it, so that gradients in x sum up to as many times the gradient as
    there are processes; average_gradients takes the mean.
    """
    before, after = RANK * len(x), (PROCESSES - 1 - RANK) * len(x)  # zeros, where the others have theirs
    return Sum.apply(F.pad(x, (0, 0) * (x.dim() - 1) + (before, after))) if PROCESSES > 1 else x


class Sum(torch.autograd.Function):
    """The sum of everyone's x, whose gradient is the sum of everyone's gradients."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    backward = forward


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace each parameter's gradient by its mean over the processes."""
    for p in parameters if PROCESSES > 1 else ():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= PROCESSES


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the moments of the whole batch (nn.SyncBatchNorm has no CPU)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or PROCESSES == 1:
            return super().forward(x)
        n, dims = x.numel() // x.shape[1] * PROCESSES, (0, 2, 3)
        mean = Sum.apply(x.sum(dims, keepdim=True)) / n
        var = Sum.apply((x - mean).square().sum(dims, keepdim=True)) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        weight, bias = (v[:, None, None] for v in (self.weight, self.bias))
        return (x - mean) * torch.rsqrt(var + self.eps) * weight + bias


def globalise(network: nn.Sequential) -> nn.Sequential:
    """Let the network's batch normalisation see all processes."""
    for layer in network:
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = GlobalBatchNorm2d
    return network


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if PROCESSES > 1:
        dist.all_reduce(number := torch.tensor(number), dist.ReduceOp.MAX)
    return int(number)


class Follower(Run):
    """The run of a process that is not the first: it keeps step, and writes nothing."""

    quiet = True

    def __init__(self, args, checkpoint: dict | None, device: torch.device):
        self.args, self.checkpoint, self.device = args, checkpoint or {}, device
        self.step, self.metrics = self.checkpoint.get("step", 0), {}
        self.signal = self.stopped = 0

    def save(self) -> None:
        """Leave it to the first process."""

    def log(self, scalars: dict[str, Tensor | float]) -> None:
        """Leave it to the first process, but stop as that one does where the loss is not finite."""
        if not all(math.isfinite(value) for value in scalars.values()):
            raise SystemExit(2)

    def finish(self, facts: Callable[[], dict]) -> None:
        """Leave it to the first process, but for the exit code of a run that was stopped."""
        if self.step < self.args.num_steps:
            raise SystemExit(128 + self.stopped)


# ---------------------------------------------------------------------------------------------------------
# Training


class Recorded:
    """A training step that is recorded as a CUDA graph and replayed: one launch in place of hundreds.

    What differs from step to step is in tensors, or in the kind with which it is called: each kind has its
    graph, whose scalars are always the same tensors. Where that is not enabled the step runs as it is.
    """

    warmup = 3  # plain steps of a kind come first: libraries load their kernels, Adam makes its state

    def __init__(self, step: Callable[..., dict], device: torch.device, enabled: bool, *optimizers):
        cuda = device.type == "cuda"
        self.step, self.enabled = step, cuda and enabled
        self.calls, self.graphs, self.scalars = {}, {}, {}
        self.stream = torch.cuda.Stream(device) if self.enabled else None
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            # A graph reads the rate from a tensor. A checkpoint may have been written on another device.
            group |= {"capturable": cuda, "lr": torch.zeros((), device=device) if cuda else 0.0}

    def __call__(self, *kind) -> dict[str, Tensor]:
        """Do a step of that kind; returns its scalars."""
        if not self.enabled:
            return self.step(*kind)
        self.calls[kind] = self.calls.get(kind, 0) + 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.calls[kind] <= self.warmup:
                scalars = self.step(*kind)
            else:
                if kind not in self.graphs:
                    self.record(kind)
                self.graphs[kind].replay()
                scalars = self.scalars[kind]
        torch.cuda.current_stream().wait_stream(self.stream)
        return scalars

    def record(self, kind: tuple) -> None:
        """Record a step of that kind without doing it."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                scalars = self.step(*kind)
        except Exception as error:  # on leaving the graph another one follows the first
            why = error.__context__ or error
            fail(f"--compile: the training step cannot be recorded ({why!r:.200}); leave --compile away")
        self.graphs[kind] = graph
        self.scalars[kind] = {name: value.detach() for name, value in scalars.items()}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of an optimizer, in place where a graph reads it."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate


def train(args: Args) -> Path:
    """Train, evaluate and save; returns the run folder."""
    checkpoint = None if args.resume is None else load_checkpoint(Path(args.resume) / "checkpoint.pt")
    args = resumed_args(args, checkpoint["args"]) if checkpoint else args
    device = pick_device(args.device)
    join_processes(args, device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    torch.manual_seed(args.seed)
    toy = args.dataset in TOYS
    with first_process_first():
        where = args.dataset, args.data_dir, args.eval_split
        parts = [load_toy(args.dataset)] if toy else load_images(*where)
        data, *held = (part.to(device) for part in parts)
        if args.batch_size > len(data):
            fail(f"--batch-size {args.batch_size} exceeds the {len(data)} training samples of {args.dataset}")
        run = (Follower if RANK else Run)(args, checkpoint, device)
        evaluation = Evaluation(args, data, held)

    generator = globalise(make_generator(args.latent_dim, args.channels, toy)).to(device)
    averaged = average(generator, args.ema_decay)
    critic = make_critic(args.feature_dim, args.channels, toy, args.spectral_norm, args.feature_scale)
    critic = critic.to(device) if args.encoder == "learned" else nn.Flatten()
    kernel = Kernel(args.bandwidths, args.bandwidth_mode).to(device)
    adam = partial(torch.optim.Adam, betas=(args.beta1, 0.999), fused=True)
    optimizers = {"opt_generator": adam(generator.parameters(), args.lr_generator)}
    if args.encoder == "learned":
        optimizers["opt_critic"] = adam([*critic.parameters(), *kernel.parameters()], args.lr_critic)
    run.hold(generator=generator, averaged=averaged, critic=critic, kernel=kernel, **optimizers)
    bounds = BOUNDS if args.bounded_kernel else None

    def latent() -> Tensor:
        return share(torch.randn(args.batch_size, args.latent_dim, device=device))

    def draw_real() -> Tensor:
        return share(draw_batch(data, args.batch_size))

    def update(name: str, loss: Tensor) -> None:
        (group,) = optimizers[name].param_groups
        optimizers[name].zero_grad()
        loss.backward(inputs=group["params"])  # the generator's loss leaves the critic's weights alone
        average_gradients(group["params"])
        optimizers[name].step()

    def evaluate() -> dict:
        count = max(evaluation.count, 2500 if toy else 100)
        samples = draw_samples(averaged, args.latent_dim, count, args.seed, device)
        for name in (f"samples_{run.step:06d}.png", "samples.png"):
            path = run.folder / name
            save_points(path, samples, data) if toy else save_images(path, samples[:100])
        return evaluation(samples)

    def step() -> dict[str, Tensor]:
        # The critic minimises  lambda k_xx - (lambda - 1) k_xy - k_yy  and its regulariser.
        scalars = {}
        for _ in range(args.critic_steps if args.encoder == "learned" else 0):
            real = draw_real()
            with torch.no_grad():
                fake = generator(latent())
            h_real, h_fake = map(gather, critic(torch.cat((real, fake))).chunk(2))
            unit, (bandwidths, weights) = kernel.unit(h_real, h_fake), kernel.mixture()
            h_real, h_fake = h_real / unit, h_fake / unit
            means = kernel_means(h_real, h_fake, bandwidths, args.kernel, args.unbiased, weights, bounds)
            loss = scalars["loss_critic"] = critic_loss(*means, args.repulsion)
            if args.gradient_penalty:
                inputs = critic, unit, gather(real), gather(fake), h_real, h_fake
                inputs = *inputs, bandwidths, args.kernel, weights
                penalty = scalars["gradient_penalty"] = gradient_penalty(*inputs)
                loss = loss + args.gradient_penalty * penalty
            update("opt_critic", loss)

        # The generator minimises MMD^2 in the critic's features, without bounds.
        with torch.no_grad():
            h_real, (bandwidths, weights) = gather(critic(draw_real())), kernel.mixture()
        h_fake = gather(critic(generator(latent())))
        unit = kernel.unit(h_real, h_fake)
        mix = bandwidths, args.kernel, args.unbiased, weights
        k_xx, k_yy, k_xy = kernel_means(h_real / unit, h_fake / unit, *mix)
        loss = k_xx + k_yy - 2 * k_xy
        update("opt_generator", loss)
        averaged.update_parameters(generator)
        scalars = {"loss_generator": loss, "k_xx": k_xx, "k_yy": k_yy, "k_xy": k_xy} | scalars
        if args.bandwidth_mode != "fixed":
            scalars |= {f"bandwidth_{i}": s * unit for i, s in enumerate(bandwidths)}
        return scalars

    lrs = {"opt_generator": args.lr_generator, "opt_critic": args.lr_critic}
    recorded = Recorded(step, device, args.compile and PROCESSES == 1, *optimizers.values())
    run.evaluate, run.agree = evaluate, largest
    for _ in run.steps():
        # Learning rates stay, and in the last part of the run fall linearly to zero.
        rate = min(1.0, (args.num_steps + 1 - run.step) / max(1.0, args.lr_decay * args.num_steps))
        for name, optimizer in optimizers.items():
            set_rate(optimizer, lrs[name] * rate)
        scalars = recorded()
        if run.due(args.log_every) or run.due(args.eval_every):
            run.log(scalars)
    return run.finish(lambda: evaluation.facts)


def generate(args: Args) -> Path:
    """Samples of a checkpoint, as a folder of PNG files or, for a toy, of samples.npy (n, 2); returns it."""
    checkpoint = load_checkpoint(Path(args.checkpoint))
    device, made = pick_device(args.device), Args(**checkpoint["args"])
    averaged = average(make_generator(made.latent_dim, made.channels, made.dataset in TOYS), made.ema_decay)
    averaged.load_state_dict(checkpoint["averaged"])
    with new_folder(args.out) as folder:
        samples = draw_samples(averaged.to(device), made.latent_dim, args.generate, args.seed, device).cpu()
        if samples.dim() == 2:
            np.save(folder / "samples.npy", samples.numpy())
        else:
            pixels = ((samples.squeeze(1) + 1) * 127.5).round().to(torch.uint8).numpy()
            for i, image in enumerate(tqdm(pixels, desc=args.out, disable=None)):
                Image.fromarray(image).save(folder / f"{i:06d}.png")
    print(f"{args.generate} samples in {args.out}")
    return Path(args.out)


def main(args: Args) -> Path:
    """Train, or sample with --generate; returns the folder that was written."""
    try:
        return generate(args) if args.generate else train(args)
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        places = "make room, or name other places with --run-dir and --out"
        fail(f"cannot read or write: {error}; {places}; a run that has saved goes on with --resume")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        print("interrupted; a run that has saved a checkpoint.pt goes on with --resume", file=sys.stderr)
        raise SystemExit(130) from None
