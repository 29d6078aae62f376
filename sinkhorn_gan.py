# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "torchvision>=0.21", "tyro>=1.0.17", "wandb>=0.30", "numpy>=1.26", "tqdm>=4.66",
#     "matplotlib>=3.8", "scikit-learn>=1.4",
# ]
# ///
"""Sinkhorn GAN: a generator that moves its samples to the data along the cheapest plan, smoothed by entropy.

The generator minimises a distance of optimal transport between a batch of samples and a batch of data: the
debiased Sinkhorn divergence S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, or OT-GAN's minibatch energy
distance. The cost of a pair is half its squared distance or one minus its cosine, between the samples
themselves (--critic fixed) or between features of a critic (--critic learned), which is trained to spread
real samples out and to draw fake ones together, or else to make the distance large. Read it beside
    Genevay et al. 2018          Learning generative models with Sinkhorn divergences      1706.00292
    Salimans et al. 2018         OT-GAN and the minibatch energy distance                  1803.05573
    Feydy et al. 2019            Sinkhorn divergences between optimal transport and MMD    1810.08278

    python sinkhorn_gan.py                                                       # MNIST, learned critic
    python sinkhorn_gan.py --critic fixed                                        # MNIST, transport of pixels
    python sinkhorn_gan.py --dataset digits                                      # no download
    python sinkhorn_gan.py --dataset grid                                        # 25 Gaussians
    python sinkhorn_gan.py --loss minibatch-energy --no-repulsive --critic-every 3     # OT-GAN
    python sinkhorn_gan.py --critic fixed --loss sinkhorn --unroll --max-iterations 20 # as in 2018
    python sinkhorn_gan.py --resume runs/<run>                                   # goes on as if never stopped
    python sinkhorn_gan.py --generate 10000 --checkpoint runs/<run>/checkpoint.pt --out samples/

The default run takes 25 minutes on one CPU core and some 15 on two: fid 3.2, which is 3.6 times that of real
images, precision 0.70 and recall 0.84 (means of 3 seeds; results/sinkhorn_gan.md has the rest).
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
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache, cached_property, lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

SCRIPT = "sinkhorn_gan"
TOYS = ("ring", "grid")
# What is not given is taken from here, by data set and by critic.
TOY = {"num_steps": 10_000, "batch_size": 512, "latent_dim": 2, "critic": "fixed", "lr_decay": 0.6}
TOY |= {"epsilon": 5e-4, "tolerance": 0.1, "max_iterations": 30, "loss": "sinkhorn"}
IMAGES = {"num_steps": 14_000, "batch_size": 64, "latent_dim": 32, "critic": "learned", "lr_decay": 0.7}
IMAGES |= {"epsilon": 0.3, "tolerance": 0.01, "max_iterations": 100, "loss": "sinkhorn"}
DEFAULTS = {"digits": IMAGES | {"num_steps": 1500}, "ring": TOY | {"epsilon": 1e-4}, "grid": TOY}
# Of images that are compared pixel by pixel; the Sinkhorn divergence of batches averages them.
FIXED = {"num_steps": 2000, "batch_size": 512, "epsilon": 0.05, "loss": "minibatch-energy"}
COSTS = {"fixed": "euclidean", "learned": "cosine"}  # a learned critic could stretch distances without end


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
    """real and fake samples in a batch (default: 64 images, 512 with a fixed critic, 512 points)"""
    stratified: bool = True
    """toys: one real point per cell of the data and latents of a Sobol sequence, so that batches are alike"""
    latent_dim: int | None = None
    """size of the generator's Gaussian input (default: 32 for images, 2 for toys)"""
    channels: int = 32
    """channels of the image networks' 14 x 14 maps; those of 7 x 7 have twice, of 28 x 28 half as many"""
    critic: Literal["learned", "fixed"] | None = None
    """fixed: the cost acts on the data itself; learned: on a critic's features (default: fixed for toys)"""
    feature_dim: int = 16
    """size of the critic's output, the space in which the cost acts"""
    spectral_norm: bool = True
    """divide each of the critic's weight matrices by its spectral norm"""
    critic_every: int = 1
    """generator updates per critic update (OT-GAN: 3)"""
    lr_generator: float = 3e-3
    """Adam's learning rate for the generator"""
    lr_critic: float = 2e-3
    """Adam's learning rate for the critic"""
    beta1: float = 0.5
    """Adam's decay of the first moment"""
    lr_decay: float | None = None
    """last share of the run, over which the learning rates fall to zero (default: 0.7 images, 0.6 toys)"""
    ema_decay: float = 0.999
    """decay per step of the averaged generator, which draws the samples"""

    loss: Literal["sinkhorn", "minibatch-energy"] | None = None
    """Sinkhorn divergence, or OT-GAN's energy distance (default: sinkhorn, but for images as they are)"""
    cost: Literal["euclidean", "cosine"] | None = None
    """half the squared distance, or one minus the cosine (default: cosine for a learned critic)"""
    epsilon: float | None = None
    """entropic regularisation, in units of the batch's mean cost (default: by data set and critic)"""
    max_iterations: int | None = None
    """cap on the Sinkhorn iterations of a loss (default: 100 images, 30 toys)"""
    tolerance: float | None = None
    """marginal error, a sum of absolute differences, at which they stop (default: 0.01 images, 0.1 toys)"""
    repulsive: bool = True
    """a learned critic's own loss: it spreads real and draws together fake samples (else minus --loss)"""
    unroll: bool = False
    """differentiate through the iterations (Genevay et al. 2018), instead of by the envelope theorem"""

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
            defaults = DEFAULTS.get(self.dataset, IMAGES)
            if self.critic == "fixed" and self.dataset not in TOYS:
                defaults = defaults | FIXED
            for name, value in defaults.items():
                setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
            self.cost = COSTS[self.critic] if self.cost is None else self.cost
            self.eval_every = math.ceil(self.num_steps / 5) if self.eval_every is None else self.eval_every
        positive = "num_steps batch_size latent_dim channels feature_dim critic_every eval_every log_every"
        for names, wanted, fits in (
            (f"{positive} lr_generator lr_critic", "positive", lambda v: 0 < v < math.inf),
            ("max_iterations epsilon tolerance", "positive", lambda v: 0 < v < math.inf),
            ("generate", "in [0, inf)", lambda v: 0 <= v < math.inf),
            ("num_eval_samples", "0 or at least 10", lambda v: v == 0 or 10 <= v < math.inf),
            ("ema_decay lr_decay", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("beta1", "in [0, 1)", lambda v: 0 <= v < 1),
            ("seed", "in [0, 2^32)", lambda v: 0 <= v < 2**32),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
        halves = self.loss == "minibatch-energy" or (self.critic == "learned" and self.repulsive)
        if halves and self.batch_size is not None and self.batch_size % 2:
            raise ValueError(f"--batch-size must be even for two independent halves, not {self.batch_size}")
        if self.unroll and self.loss == "minibatch-energy":
            raise ValueError("--unroll: in --loss minibatch-energy no gradient flows through the plan")
        if not bool(self.generate) == bool(self.checkpoint) == bool(self.out):
            raise ValueError("--generate, --checkpoint <run>/checkpoint.pt and --out <folder> go together")


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


def kd_order(points: Tensor) -> Tensor:
    """Points (n, 2) in the order of a k-d tree's leaves, where neighbours are near; a few may be left out."""
    cells, axis = points[None], 0
    while cells.shape[1] > 8:
        cells = cells[:, : cells.shape[1] // 2 * 2]
        order = cells[:, :, axis].argsort(dim=1, stable=True)
        cells = cells.gather(1, order[..., None].expand_as(cells)).reshape(2 * len(cells), -1, 2)
        axis = 1 - axis
    return cells.flatten(0, 1)


def draw_strata(points: Tensor, batch_size: int) -> Tensor:
    """One random point (b, 2) out of each of b equal runs of points (n, 2) in k-d order."""
    place = torch.arange(batch_size, device=points.device) + torch.rand(batch_size, device=points.device)
    return points[(place * (len(points) / batch_size)).long().clamp(max=len(points) - 1)]


def draw_sobol(uniform: Tensor) -> Tensor:
    """Gaussian latents (b, d) from a Sobol set in the unit cube (b, d), moved around it at random."""
    u = (uniform + torch.rand(uniform.shape[1], device=uniform.device)) % 1
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


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
#
# Entropic optimal transport of weights a (n,) at x (n, d) to b (m,) at y (m, d), with costs C (n, m):
#     OT(x, y) = min of  <P, C> + eps KL(P | a b^T)  over P >= 0 with row sums a and column sums b     (1)
#              = max of  a.f + b.g - eps (sum P - 1)  over f, g, for P = a b^T exp((f + g - C) / eps)  (2)
# (Peyre and Cuturi 2019, proposition 4.4). At the maximum f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps),
# and likewise g from f: Sinkhorn's half-steps. While iterated, potentials are in units of eps ln 2, for 2^x.

ROADS = "auto", "triton", "dense", "blocked"
DENSE = 2**26  # pairs, up to which the kernel is kept as one matrix: 256 MB of float32
BLOCK = 2**20  # pairs in a block of rows on the road that keeps no matrix: 4 MB of float32
RANGE = 40.0  # log2 of the scalings for which float32, which ends at 2^-126, has room
MEMORY = 5  # steps that the extrapolation looks back on
# Anneal from eps = COARSE mean(C) by COOLING, to the error LOOSE at each.
COARSE, COOLING, LOOSE = 0.0125, 4.0, 3e-3
NEAR = 0.02  # marginal error up to which potentials to start from need no annealing
STEPS = 1 / (1.5 + 8**-0.5), 1 / (1.5 - 8**-0.5)  # of a self problem, see iterate_self


@torch.no_grad()
def sinkhorn_potentials(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: str = "euclidean",
    tol: float = 1e-3,
    max_iterations: int = 2000,
    init: tuple[Tensor, Tensor] | None = None,
    return_info: bool = False,
    road: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict]:
    """Dual potentials f (n,) and g (m,) of entropic transport of x (n, d) to y (m, d), without gradients.

    Sinkhorn's half-steps (Cuturi 2013, algorithm 1), stabilised and extrapolated; where eps is less than
    0.0125 times the mean cost, first for larger eps. f + c and g - c serve as well for any c; these have
    a.f = b.g.

    Args:
        x, y: points, float32 or float64, on one device.
        eps: the entropy's weight in (1), in the units of the cost; GeomLoss's blur^2, POT's reg. On CUDA a
            tensor keeps the host from waiting: no value is looked at then, and bad ones make a NaN.
        a, b: weights (n,) and (m,), not negative, that sum to one; uniform by default.
        cost: "euclidean", |x - y|^2 / 2 (GeomLoss's p=2); "cosine", 1 - cos(x, y), which is the same cost on
            normalised vectors.
        tol: stop when the plan's marginals differ from a and b by this, in the 1-norm; float32 does not get
            below 1e-6. A loss that is small beside OT(x, y), as that of nearly equal clouds, needs less.
        max_iterations: stop after so many, whatever the error (an iteration is two half-steps).
        init: potentials to start from, such as those of nearly the same points; else zero.
        return_info: return also {"error": the marginal error reached, "iterations": their number}.
        road: "triton", kernels for float32 on CUDA, over-relaxed instead of annealed and extrapolated, in
            memory for n + m points and, up to 2^24 of them, the pairs' products; "dense", with an n x m
            matrix; "blocked", in memory for n + m points; "auto", the first that can, by size.

    Raises ValueError for shapes, dtypes or devices that do not fit, for no points, coordinates that are not
    finite, eps, tol or max_iterations that are not positive, weights that are negative or do not sum to one
    (within 1e-4), vectors of length zero under "cosine", and unknown names.
    """
    x, y, a, b = checked(x, y, eps, a, b, cost, tol, max_iterations, road)
    start = None
    if init is not None:
        if [p.shape for p in init] != [a.shape, b.shape] or not all(p.isfinite().all() for p in init):
            shapes = [tuple(p.shape) for p in init]
            raise ValueError(f"init must be finite, ({len(x)},) and ({len(y)},), not {shapes} or infinite")
        # f follows from g; transport takes that of the centred clouds.
        start = init[1].to(y) + (y - b @ y) @ (a @ x - b @ y)
    plan = transport(x, y, eps, a, b, tol, max_iterations, road, start)
    info = {"error": float(plan.error), "iterations": int(plan.count)} if return_info else {}
    return (plan.f, plan.g, info) if return_info else (plan.f, plan.g)


def ot_cost(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: str = "euclidean",
    tol: float = 1e-3,
    max_iterations: int = 2000,
    unroll: bool = False,
    road: str = "auto",
) -> Tensor:
    """Entropic transport cost (1) between x (n, d) and y (m, d): a scalar, differentiable in both.

    The value is (2) at the potentials reached: below the exact one, by the square of their error. Its
    gradient is that of (2) with f and g held, sum_j P_ij (x_i - y_j) in x_i (the envelope theorem; Feydy et
    al. 2019): no graph through the iterations, and no second derivative. unroll=True differentiates through
    plain iterations without annealing, as Genevay et al. 2018 did, and keeps a matrix for each half-step.

    Arguments and errors are those of sinkhorn_potentials, which tells whether it converges; weights get no
    gradient.
    """
    x, y, a, b = checked(x, y, eps, a, b, cost, tol, max_iterations, road, unroll)
    if unroll:
        return unrolled_cost(x, y, eps, a, b, tol, max_iterations)
    plan = transport(x, y, eps, a, b, tol, max_iterations, road, None, asked(x, y))
    return GivenGradients.apply(plan.cost, plan.grad_x, plan.grad_y, x, y)


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    eps: float,
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost: str = "euclidean",
    tol: float = 1e-3,
    max_iterations: int = 2000,
    unroll: bool = False,
    road: str = "auto",
) -> Tensor:
    """Debiased OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 between x (n, d) and y (m, d): a scalar.

    Feydy et al. 2019, eq. 3: never negative, and zero only if x and y are one measure (theorem 1). Genevay et
    al. 2018 take twice this with <P, C> in place of OT, without the entropy. Arguments, gradients and errors
    are those of ot_cost.
    """
    x, y, a, b = checked(x, y, eps, a, b, cost, tol, max_iterations, road, unroll)
    if unroll:
        sides = ((x, y, a, b), (x, x, a, a), (y, y, b, b))
        xy, xx, yy = (unrolled_cost(p, q, eps, *w, tol, max_iterations) for p, q, *w in sides)
        return xy - (xx + yy) / 2
    # OT(x, x) / 2 has the gradient of OT(x, .) in its first argument, or its second. With the one in which x
    # stands in OT(x, y), and that started from OT(y, y)'s more exact potential, all cancels where x equals y.
    # In this order, and in place, there are never more than three gradients.
    need_x, need_y = asked(x, y)
    yy = transport(y, y, eps, b, b, tol / 10, max_iterations, road, None, (False, need_y))
    xy = transport(x, y, eps, a, b, tol, max_iterations, road, yy.g, (need_x, need_y))
    grad_y = xy.grad_y.sub_(yy.grad_y) if need_y else None
    yy = yy.cost
    xx = transport(x, x, eps, a, a, tol / 10, max_iterations, road, None, (need_x, False))
    grad_x = xy.grad_x.sub_(xx.grad_x) if need_x else None
    return GivenGradients.apply(xy.cost - (xx.cost + yy) / 2, grad_x, grad_y, x, y)


def minibatch_energy_distance(
    x1: Tensor,
    x2: Tensor,
    y1: Tensor,
    y2: Tensor,
    eps: float,
    cost: str = "cosine",
    tol: float = 1e-3,
    max_iterations: int = 2000,
    road: str = "auto",
) -> Tensor:
    """OT-GAN's loss, from two independent halves each of real and of fake samples, all (., d): a scalar.

    W(x1, y1) + W(x1, y2) + W(x2, y1) + W(x2, y2) - 2 W(x1, x2) - 2 W(y1, y2)  (Salimans et al. 2018, section
    3 and algorithm 1); one batch's may be negative. W is <P, C>, the part of (1) without the entropy, for P
    whose entries sum to one (theirs to the batch size). As in the paper, no gradient flows through P, which
    makes it the gradient of (1) (the envelope theorem), not of the value. Arguments and errors are those of
    ot_cost.
    """
    signs = ((x1, y1, 1), (x1, y2, 1), (x2, y1, 1), (x2, y2, 1), (x1, x2, -2), (y1, y2, -2))
    options = eps, None, None, cost, tol, max_iterations, road
    problems = [(s, checked(p, q, *options, points=False)) for p, q, s in signs]
    if looks_at(x1, eps) and not usable(cost, x1, x2, y1, y2):
        for p, q, _ in signs:
            checked(p, q, *options)  # raises the error
    total = 0
    for sign, (p, q, a, b) in problems:
        plan = transport(p, q, eps, a, b, tol, max_iterations, road, None, (True, True))
        total = total + sign * GivenGradients.apply(plan.moved, plan.grad_x, plan.grad_y, p, q)
    return total


def repulsive_loss(x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor, eps: float, **options) -> Tensor:
    """OT(y1, y2) - OT(x1, x2): a critic spreads real samples x out and draws fake samples y together.

    The repulsive loss of MMD-GAN (Wang et al. 2019, 1812.09916, section 3.2) with transport costs between
    independent halves, all (., d), in place of minus a kernel's means: the parts of the energy distance that
    do not compare real with fake, one with its sign turned. Arguments and errors are those of ot_cost.
    """
    return ot_cost(y1, y2, eps, **options) - ot_cost(x1, x2, eps, **options)


class GivenGradients(torch.autograd.Function):
    """value, a scalar whose gradients in x and y are known already."""

    @staticmethod
    def forward(ctx, value, grad_x, grad_y, x, y):
        ctx.save_for_backward(grad_x, grad_y)
        return value.clone()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # create_graph=True: they would be missing without a word
            raise RuntimeError("no second derivatives here: take unroll=True for them")
        return None, None, None, *(grad if grad is None else g * grad for grad in ctx.saved_tensors)


def mean_cost(x: Tensor, y: Tensor, cost: str = "euclidean") -> Tensor:
    """Mean cost of the pairs of x (n, d) and y (m, d), a scalar: a natural unit for eps."""
    if cost == "cosine":
        x, y = F.normalize(x), F.normalize(y)
    between = (x.mean(0) - y.mean(0)).square().sum()
    return (between + x.var(0, correction=0).sum() + y.var(0, correction=0).sum()) / 2


def asked(*points: Tensor) -> tuple[bool, ...]:
    """Whether autograd will ask for the gradient in each of the points."""
    return tuple(torch.is_grad_enabled() and p.requires_grad for p in points)


def looks_at(x: Tensor, eps: float | Tensor) -> bool:
    """Whether values are looked at and not only shapes: not on CUDA if eps is a tensor, as the host waits."""
    return not (x.is_cuda and (isinstance(eps, Tensor) or torch.cuda.is_current_stream_capturing()))


def usable(cost: str, *points: Tensor) -> bool:
    """Whether all points have squares that are finite and, if the cost is cosine, a length."""
    norms = torch.cat([p.detach().norm(dim=1) for p in points])
    return bool((norms.isfinite() & ((norms > 0) | (cost != "cosine"))).all())


def checked(x, y, eps, a, b, cost, tol, max_iterations, road, unroll=False, points=True) -> tuple:
    """x and y, normalised if the cost is cosine, with a and b; or the ValueErrors of sinkhorn_potentials.

    With points=False the values of x and y are not looked at.
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be (n, d) and (m, d), not {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or x.device != y.device or x.dtype not in (torch.float32, torch.float64):
        kinds = f"{x.dtype} on {x.device} and {y.dtype} on {y.device}"
        raise ValueError(f"x and y must both be float32 or both float64, on one device, not {kinds}")
    if min(*x.shape, len(y)) < 1:
        raise ValueError(f"no points or no coordinates: x is {tuple(x.shape)} and y {tuple(y.shape)}")
    if torch.is_autocast_enabled(x.device.type):  # its products in half precision were 4% off, without a word
        raise ValueError(
            f"this loss needs float32: call it under torch.autocast({x.device.type!r}, enabled=False)"
        )
    if cost not in ("euclidean", "cosine") or road not in ROADS:
        raise ValueError(f"unknown cost {cost!r} or road {road!r}")
    if unroll and road in ("triton", "blocked"):
        raise ValueError(f"road {road!r} keeps no matrices to unroll; take 'dense' or 'auto'")
    looks, limits = looks_at(x, eps), {"tol": tol, "max_iterations": max_iterations}
    for name, value in (limits | {"eps": eps} if looks else limits).items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")
    if looks and points and not usable(cost, x, y):  # one wait for the device, where all is well
        for name, p in (("x", x.detach()), ("y", y.detach())):
            norm = p.norm(dim=1)
            if not norm.isfinite().all():
                point = p[~norm.isfinite()][0]
                worst = point[point.nan_to_num(math.inf, math.inf, -math.inf).abs().argmax()].item()
                raise ValueError(f"{name} and its squares must be finite, but it holds {worst}")
            if not norm.all():
                holds = f"and {name} holds one"
                raise ValueError(f"cost 'cosine' is not defined for vectors of length 0.0, {holds}")
    weights = []
    for name, p, w in (("x", x.detach(), a), ("y", y.detach(), b)):
        if w is None:
            w = p.new_full((len(p),), 1 / len(p))
        elif w.shape != (len(p),) or w.dtype != p.dtype or w.device != p.device or w.requires_grad:
            kind = f"{tuple(w.shape)} {w.dtype} on {w.device} with requires_grad={w.requires_grad}"
            raise ValueError(f"weights of {name} must be ({len(p)},) {p.dtype} without gradient, not {kind}")
        elif looks and not (w.min() >= 0 and abs(w.sum() - 1) < 1e-4):
            low, total = w.min().item(), w.sum().item()
            raise ValueError(f"weights of {name} must be >= 0 with sum 1, not with least {low}, sum {total}")
        weights.append(w / w.sum())
    if cost == "cosine":
        x, y = F.normalize(x, eps=0), F.normalize(y, eps=0)
    return x, y, *weights


class Plan(NamedTuple):
    """A solved problem (1): potentials, value, its part <P, C>, gradients, marginal error, iterations."""

    f: Tensor
    g: Tensor
    cost: Tensor
    moved: Tensor | None
    grad_x: Tensor | None
    grad_y: Tensor | None
    error: float
    count: int


@torch.no_grad()
def transport(x, y, eps, a, b, tol, max_iterations, road, start=None, need=(False, False)) -> Plan:
    """Solve (1) between x (n, d) and y (m, d); need: gradients in x, in y; start: a g of the centred clouds.

    With both clouds centred the cost changes by terms in x and y alone, C = C' + x'.t - y'.t + |t|^2 / 2 for
    t = mean x - mean y. So the plan stays, and however far apart the clouds are no digits are lost.
    """
    same = x is y and start is None and (a is b or torch.equal(a, b))
    if takes_triton(x, road):
        with torch.cuda.device_of(x):  # Triton takes the current one
            return triton_transport(x, y, eps, a, b, tol, max_iterations, start, need, same)
    eps = float(eps)
    mean_x, mean_y = a @ x, b @ y
    x, y, t = x - mean_x, y - mean_y, mean_x - mean_y
    a, b = a.clamp(min=1e-18), b.clamp(min=1e-18)  # log 0 never occurs, and the sums stay what they were
    dense = road == "dense" or (road == "auto" and len(x) * len(y) <= DENSE)
    g = torch.zeros_like(b) if start is None else start
    if same:
        kernel, v, count = iterate_self(x, a, eps, tol, max_iterations, dense)
    else:
        kernel, g, v, count = anneal(x, y, a, b, eps, g, tol, max_iterations, dense, start is not None)
    r, s, p_y, p_x = sweep(kernel, v, a, True, x, y, need)
    unit = eps * math.log(2)
    f, g = -unit * (kernel.top + r.log2()), unit * (g + v.log2())
    error = (v * s - b).abs().sum().item()
    value = a @ f + b @ g + (a @ x - b @ y) @ t + t @ t / 2  # the third is what rounding left of the means
    # The gradient in x takes the plan whose rows sum to a, that in y the one whose columns sum to b.
    grad_x = (x + t).mul_(a[:, None]).sub_(p_y) if need[0] else None
    grad_y = (y - t).mul_(b[:, None]).addcmul_((b / s)[:, None], p_x, value=-1) if need[1] else None
    # |x - y|^2 = x.(x - y) + y.(y - x), and the gradients are the sums of P (x - y) and P (y - x). They take
    # two plans, one with exact rows and one with exact columns, and most of the errors cancel.
    moved = ((grad_x * x).sum() + (grad_y * y).sum() + t @ t) / 2 if all(need) else None
    f, g = f + x @ t + t @ t / 2, g - y @ t  # from C' to C
    shift = (b @ g - a @ f) / 2
    return Plan(f + shift, g - shift, value, moved, grad_x, grad_y, error, count)


def anneal(x, y, a, b, eps, g, tol, max_iterations, dense, warm) -> tuple:
    """iterate, where eps is small first for larger ones; if warm only should g turn out to be far off."""
    spread = (a @ x.square().sum(1) + b @ y.square().sum(1)).item() / 2  # the mean cost of centred clouds
    steps = math.ceil(math.log(max(COARSE * spread / eps, 1e-9), COOLING))  # of one point the spread is 0
    ladder, count = [eps * COOLING**k for k in range(steps, 0, -1)], 0
    if ladder and warm and max_iterations > 1:
        _, _, _, count, error = iterate(x, y, a, b, eps, g, tol, 1, dense)
        ladder = ladder if error > NEAR else []
    for level in ladder:
        if count < max_iterations - 1:
            most = max_iterations - 1 - count
            _, g, v, done, _ = iterate(x, y, a, b, level, g, max(tol, LOOSE), most, dense)
            g, count = (g + v.log2()) * (level * math.log(2)), count + done
    kernel, g, v, done, _ = iterate(x, y, a, b, eps, g, tol, max(1, max_iterations - count), dense)
    return kernel, g, v, count + done


def iterate(x, y, a, b, eps, g, tol, max_iterations, dense) -> tuple:
    """Sinkhorn's iteration at one eps from the potential g (m,): its kernel, g, v (m,), count and error.

    The iterate is v, which scales the columns of the kernel of g: the potential is g + eps ln v. A
    half-step is a product of the kernel and a vector (Schmitzer 2019, section 3). Where v leaves the range
    in which float32 can scale, one half-step in the log domain makes a new kernel.
    """
    scale = math.log2(math.e) / eps
    log_a, log_b, g = a.log2(), b.log2(), g * scale
    kernel = GibbsKernel(x, y, log_b, g, scale, dense)
    log_v, history, last = torch.zeros_like(b), deque(maxlen=MEMORY), None
    for count in range(1, max_iterations + 1):
        v = log_v.exp2()
        r, s, *_ = sweep(kernel, v, a)
        plain, log_r = log_b - s.log2(), r.log2()
        # Each plain step raises (2), by eps times a Kullback-Leibler divergence of the marginals. What would
        # lower it is taken back, so that it converges whatever the extrapolation makes up.
        gain = b @ (log_v - last[0]) - a @ (log_r - last[1]) if history else b.new_zeros(())
        facts = torch.stack(((v * s - b).abs().sum(), plain.abs().amax(), gain))
        error, reach, gain = facts.tolist()  # all at once: on a GPU each one would be a wait
        if error <= tol and reach < RANGE:  # a light column may be lost below float32's range and not count
            break
        if not -1e-6 <= gain < math.inf:
            log_v = last[2]
            history.clear()
        elif not reach < RANGE:
            g = soft_minimum(y, x, log_a, -kernel.top - log_r, scale)  # from f, with the roles exchanged
            kernel, log_v = GibbsKernel(x, y, log_b, g, scale, dense), torch.zeros_like(b)
            history.clear()
        elif count < max_iterations:
            last = log_v, log_r, plain
            history.append((plain, plain - log_v))
            log_v = plain if count % 2 else extrapolate(history, b).clamp_(-RANGE, RANGE)
    return kernel, g, log_v.exp2(), count, error


def iterate_self(x, a, eps, tol, max_iterations, dense) -> tuple:
    """The same for y = x, where one potential g = f will do: steps from g towards f(g), a half-step from it.

    The slopes of f(g) are minus the plan's eigenvalues, in [0, 1] at any eps, so a step of w leaves of an
    error 1 - w (1 + eigenvalue): both STEPS, Chebyshev's pair, at most 1/17 of it, and two steps of 1/2, as
    in Feydy et al. 2019, 1/4.
    """
    kernel = GibbsKernel(x, x, a.log2(), torch.zeros_like(a), math.log2(math.e) / eps, dense)
    v, scaled = torch.ones_like(a), kernel.top
    for count in range(1, max_iterations + 1):
        r, *_ = sweep(kernel, v, a, columns=False)
        scaled = kernel.top.exp2() if count == 1 else scaled
        ratio = r * v * scaled  # of the symmetric plan's row sums to a: 1 when it is solved
        # Twice, as the plan whose rows are exact has the whole error in its columns.
        if count % 2 and 2 * (a @ (ratio - 1).abs()).item() <= tol:
            break
        v = v * ratio ** -STEPS[count % 2]
    return kernel, v, count


def extrapolate(history: deque, b: Tensor) -> Tensor:
    """Anderson's (1965) mix of the last plain steps: the one with the least residual in weights b.

    The differences of residuals are nearly parallel near the solution, hence the ridge.
    """
    if len(history) == 1:
        return history[0][0]
    plain, residual = (torch.stack(z) for z in zip(*history))  # (k, m)
    d_plain, d_residual = plain[:-1] - plain[-1], residual[:-1] - residual[-1]
    weighted = b * d_residual
    gram = weighted @ d_residual.T
    gram.diagonal().add_(1e-5 * gram.diagonal().amax() + 1e-30)
    return plain[-1] - torch.linalg.solve(gram, weighted @ residual[-1]) @ d_plain


class GibbsKernel:
    """Blocks of rows of K_ij = b_j 2^(g_j - scale C_ij - top_i), where top_i makes row i's largest entry 1.

    Dense, it is made once; else anew each time that it is iterated over. After the first time top is there.
    """

    def __init__(self, x, y, log_b, g, scale, dense):
        x2, y2 = (p.square().sum(1, keepdim=True) * (-scale / 2) for p in (x, y))
        one_x, one_y = torch.ones_like(x2), torch.ones_like(y2)
        # (scale x, -scale |x|^2 / 2, 1).(y, 1, g + log b - scale |y|^2 / 2) = g + log b - scale |x - y|^2 / 2
        self.left = torch.cat((scale * x, x2, one_x), 1)
        self.right = torch.cat((y, one_y, y2 + (g + log_b)[:, None]), 1)
        self.step = len(x) if dense else max(1, BLOCK // len(y))
        self.buffer = x.new_empty(min(self.step, len(x)), len(y))
        self.top = x.new_empty(len(x))
        self.stored = list(self.make()) if dense else None

    def make(self):
        for i in range(0, len(self.left), self.step):
            rows = slice(i, i + self.step)
            k = torch.mm(self.left[rows], self.right.T, out=self.buffer[: len(self.left[rows])])
            top = torch.amax(k, 1, out=self.top[rows])
            yield rows, k.sub_(top[:, None]).exp2_()

    def __iter__(self):
        return iter(self.stored or self.make())


def sweep(kernel, v, a, columns=True, x=None, y=None, need=(False, False)) -> tuple:
    """One pass over the kernel: its row sums r (n,) under v and, of the plan P whose rows sum to a, column
    sums s (m,) before v; if needed P y (n, d) and, before v, P^T x (m, d)."""
    r, s = torch.empty_like(a), torch.zeros_like(v)
    p_y, p_x = x.new_empty(x.shape) if need[0] else None, y.new_zeros(y.shape) if need[1] else None
    v_y = v[:, None] * y if need[0] else None
    for rows, k in kernel:
        torch.mv(k, v, out=r[rows])
        if columns:
            w = a[rows] / r[rows]
            s.addmv_(k.T, w)
        if need[0]:
            torch.mm(k, v_y, out=p_y[rows]).mul_(w[:, None])
        if need[1]:
            p_x.addmm_(k.T, w[:, None] * x[rows])
    return r, s, p_y, p_x


def soft_minimum(x, y, log_b, g, scale) -> Tensor:
    """The half-step f_i = -log2 sum_j b_j 2^(g_j - scale C_ij), (n,), in blocks, without limits of range."""
    kernel = GibbsKernel(x, y, log_b, g, scale, dense=False)
    r = torch.cat([k.sum(1) for _, k in kernel])
    return -kernel.top - r.log2()


def unrolled_cost(x, y, eps, a, b, tol, max_iterations) -> Tensor:
    """ot_cost in operations that autograd follows, centred as in transport."""
    same = x is y and torch.equal(a, b)
    mean_x, mean_y = a @ x, b @ y
    x, y, t = x - mean_x, y - mean_y, mean_x - mean_y
    cost = x.square().sum(1, keepdim=True) / 2 + y.square().sum(1) / 2 - x @ y.T  # (n, m)
    log_a, log_b = (w.clamp(min=1e-18).log() for w in (a, b))
    g = torch.zeros_like(b)
    for _ in range(max_iterations):
        f = -eps * ((g - cost) / eps + log_b).logsumexp(1)
        next_g = f if same else -eps * ((f[:, None] - cost) / eps + log_a[:, None]).logsumexp(0)
        if (b * (((g - next_g) / eps).exp() - 1)).abs().sum().item() <= tol:
            break
        g = (g + 2 * f) / 3 if same else next_g
    if same:  # (2) without its last term, which is 0 after a half-step, is true of f made from g
        f = -eps * ((g - cost) / eps + log_b).logsumexp(1)
    return a @ f + b @ g + (a @ x - b @ y) @ t + t @ t / 2


# On CUDA Triton kernels take the half-steps, in the log domain. With s = log2(e) / eps,
# p = f / (eps ln 2) - s |x|^2 / 2 at x, and likewise with g at y, the squares in the costs cancel: for
# points z of weights w, first x, then y, rows i of one cloud follow from columns j of the other by
#     p_i = -log2 sum_j w_j 2^(s z_i.z_j + p_j)                                                            (3)
#
#            columns ->                    A program owns strips of rows, goes along the columns, and keeps,
#    rows  [ tile | tile | tile ] -> p_i   as attention does, of each row the largest exponent yet, and the
#      |   [ ...... strip ..... ] -> p_i   sum of powers below it. Of few points one program takes all strips
#      v   [ tile | tile | tile ] -> p_i   and all half-steps; of more, a launch takes one half-step.
#
# The products z_i.z_j are the same in every half-step. Those of up to KEPT pairs are kept; of more they are
# made tile by tile, where they are needed, and there is no n x m matrix.

KEPT = 2**24  # pairs: 64 MB of float32
BIG = 1e30  # an error that has not been measured


@cache
def triton_sinkhorn() -> tuple:
    """The kernels `iterate` and `finish`, made at their first use: no other road needs Triton."""
    global tl, load, soft_rows  # where Triton looks for what a kernel names
    import triton
    import triton.language as tl

    # fmt: off
    @triton.jit
    def load(z, first, end, k, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
        # Rows first, first + 1, ... of z from coordinate k on; 0 from row `end` on: (BLOCK, BLOCK_D).
        i, j = tl.arange(0, BLOCK), k + tl.arange(0, BLOCK_D)
        inside = (i < end - first)[:, None] & (j < D)[None, :]
        return tl.load(z + tl.cast(first, tl.int64) * D + (i[:, None] * D + j[None, :]), inside, 0.0)

    @triton.jit
    def soft_rows(rows, cols, products, log_w, p, scale, row, n, m, out_k, D: tl.constexpr,
                  IS_KEPT: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr,
                  OUT_D: tl.constexpr, PRECISION: tl.constexpr):
        # (3) for rows row, row + 1, ... of n, from m columns; and, if OUT_D, coordinates out_k, ... of the
        # columns' means, weighted by the terms of the sum.
        top, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
        mean = tl.zeros((BLOCK, max(OUT_D, 16)), tl.float32)
        i = tl.arange(0, BLOCK)
        places = products + tl.cast(row, tl.int64) * m + i[:, None] * m
        if not IS_KEPT:
            own = load(rows, row, n, 0, D, BLOCK, BLOCK_D)
        for col in range(0, m, COLS):
            j = col + tl.arange(0, COLS)
            bias = tl.load(log_w + j, j < m, float("-inf")) + tl.load(p + j, j < m, 0.0)
            if IS_KEPT:
                dot = tl.load(places + j[None, :], (i < n - row)[:, None] & (j < m)[None, :], 0.0)
            else:
                other = load(cols, col, m, 0, D, COLS, BLOCK_D)
                dot = tl.dot(own, tl.trans(other), input_precision=PRECISION)
                for k in range(BLOCK_D, D, BLOCK_D):  # none, where all coordinates fit
                    a, b = load(rows, row, n, k, D, BLOCK, BLOCK_D), load(cols, col, m, k, D, COLS, BLOCK_D)
                    dot = tl.dot(a, tl.trans(b), dot, input_precision=PRECISION)
            t = scale * dot + bias[None, :]
            new = tl.maximum(top, tl.max(t, 1))
            power, fade = tl.exp2(t - new[:, None]), tl.exp2(top - new)
            top, total = new, total * fade + tl.sum(power, 1)
            if OUT_D:
                values = load(cols, col, m, out_k, D, COLS, OUT_D)
                mean = tl.dot(power, values, mean * fade[:, None], input_precision=PRECISION)
        return -(top + tl.log2(total)), mean / total[:, None]

    @triton.jit(do_not_specialize=["first", "steps", "limit"])
    def iterate(z, products, log_w, p, errors, counts, scale, n, m, tol, first, steps, limit,
                SELF: tl.constexpr, D: tl.constexpr, IS_KEPT: tl.constexpr, BLOCK: tl.constexpr,
                COLS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
        # Half-steps first, first + 1, ... of a chunk, but no more than limit in all; counts: how many came
        # before the chunk, and in all. errors (35, programs), a ring: row h + 2 is the error that half-step h
        # finds, row h + 3 what it leaves. SELF: y is x, p two vectors (n,) in turn, each step is damped; else
        # the even half-steps take the rows of x.
        program, programs = tl.program_id(0), tl.num_programs(0)
        s, before, lane = tl.load(scale), tl.load(counts), tl.arange(0, 1024)
        h, last = tl.cast(first, tl.int32), tl.cast(first, tl.int32) + steps
        error = tl.sum(tl.load(errors + ((h + 2) % 35) * programs + lane, lane < programs, 0.0))
        while (h < last) & (before + h < limit) & (error > tol):
            k = before + h
            if SELF:
                row_first, row_count, col_first, col_count = 0, n, 0, n
                source, target = (h % 2) * n, (1 - h % 2) * n
                step = tl.where(k % 2 == 0, 0.8723, 0.5395)  # see iterate_self
                dots = products
            else:
                even = h % 2 == 0
                row_first, row_count = tl.where(even, 0, n), tl.where(even, n, m)
                col_first, col_count = tl.where(even, n, 0), tl.where(even, m, n)
                source, target = 0, 0
                dots = products + tl.cast(tl.where(even, 0, n), tl.int64) * m  # those of y's rows follow
                # Over-relaxation (Thibault et al. 2017), more and more of it, unless the error grows.
                older = tl.sum(tl.load(errors + (h % 35) * programs + lane, lane < programs, 0.0))
                step = tl.where((k < 6) | (error > 1.3 * older), 1.0, tl.minimum(1.9, 2 - 4 / (k // 2 + 2.0)))
            partial = 0.0
            for row in range(program * BLOCK, row_count, programs * BLOCK):
                rows, cols = z + tl.cast(row_first, tl.int64) * D, z + tl.cast(col_first, tl.int64) * D
                new, _ = soft_rows(rows, cols, dots, log_w + col_first, p + source + col_first, s, row,
                                   row_count, col_count, 0, D, IS_KEPT, BLOCK, COLS, BLOCK_D, 0, PRECISION)
                i = row + tl.arange(0, BLOCK)
                inside = i < row_count
                old = tl.load(p + source + row_first + i, inside, 0.0)
                weight = tl.exp2(tl.load(log_w + row_first + i, inside, float("-inf")))
                off = tl.exp2(tl.minimum(old - new, 60.0)) - 1  # of the plan's marginal, as a share
                partial += tl.sum(tl.where(inside, weight * tl.abs(off), 0.0))
                tl.store(p + target + row_first + i, old + step * (new - old), inside)
            if SELF:
                partial = 2 * partial
            else:  # the rows of x have no error of their own: that of their potentials is the columns'
                found = tl.load(errors + ((h + 2) % 35) * programs + program)
                partial = tl.where(h % 2 == 0, found, partial)
            tl.store(errors + ((h + 3) % 35) * programs + program, partial)
            tl.debug_barrier()
            h += 1
            error = tl.sum(tl.load(errors + ((h + 2) % 35) * programs + lane, lane < programs, 0.0))
            if program == 0:
                tl.store(counts + 1, before + h)
        if h < last:  # it has converged before: hand on what there is
            found = tl.load(errors + ((h + 2) % 35) * programs + program)
            tl.store(errors + ((last + 2) % 35) * programs + program, found)
            if SELF and (last - h) % 2 == 1:
                for row in range(program * BLOCK, n, programs * BLOCK):
                    i = row + tl.arange(0, BLOCK)
                    tl.store(p + (last % 2) * n + i, tl.load(p + (h % 2) * n + i, i < n), i < n)

    @triton.jit
    def finish(rows, cols, products, log_w, p, out, means, scale, n, m, D: tl.constexpr,
               IS_KEPT: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr, BLOCK_D: tl.constexpr,
               OUT_D: tl.constexpr, PRECISION: tl.constexpr):
        row, k = tl.program_id(0) * BLOCK, tl.program_id(1) * OUT_D
        new, mean = soft_rows(rows, cols, products, log_w, p, tl.load(scale), row, n, m, k, D, IS_KEPT, BLOCK,
                              COLS, BLOCK_D, OUT_D, PRECISION)
        i = tl.arange(0, BLOCK)
        tl.store(out + row + i, new, i < n - row)
        if OUT_D:
            k += tl.arange(0, OUT_D)
            inside = (i < n - row)[:, None] & (k < D)[None, :]
            tl.store(means + tl.cast(row, tl.int64) * D + (i[:, None] * D + k[None, :]), mean, inside)

    # fmt: on
    return iterate, finish


class TritonLoop:
    """The buffers of a problem of n and m points, or of n with themselves, and its parts: prepare, chunk and
    conclude, where a chunk is CHUNK half-steps, or of few points all of them, in one launch.

    If graphs are wanted each part is one from its second use on, and the host looks at the error once after
    each chunk but the last; while a graph is recorded around them it never looks.
    """

    CHUNK = 32

    def __init__(self, n, m, d, same, need, warm, tol, max_iterations, device, precision, graphs=True):
        self.n, self.m, self.d, self.same, self.need, self.warm, self.tol = n, m, d, same, need, warm, tol
        self.limit, self.precision = max_iterations * (1 if same else 2), precision  # see dot_precision
        new = partial(torch.empty, dtype=torch.float32, device=device)
        size, most, self.kept = n if same else n + m, max(n, m), n * m <= KEPT
        self.z, self.log_w, self.p = new(size, d), new(size), new(2 * n if same else size)
        self.t = new(d)  # not of the graphs' pool, in which chunk may be recorded before prepare
        self.products = new(1 if same else 2, n * m if self.kept else 1)
        if self.kept:  # rows and columns of a tile
            self.tile = (32, 128) if most <= 128 else (8, 256) if most <= 1024 else (16, 256)
        else:
            self.tile = 32, 64
        self.programs = 1 if most <= 128 else min(-(-most // self.tile[0]), 1024)
        self.errors, self.counts, self.scale = new(35, self.programs), new(2, dtype=torch.int32), new(())
        self.graphs, self.used = {} if graphs and self.z.is_cuda else None, set()
        self.pool = torch.cuda.graph_pool_handle() if self.graphs is not None else None

    def prepare(self, x, y, a, b, eps, start) -> tuple:
        """Centre the points, and set all else to where the iteration starts."""
        mean_x, mean_y = a @ x, b @ y
        x_, y_ = self.z[: self.n], self.z[-self.m :]
        torch.sub(x, mean_x, out=x_)
        torch.sub(y, mean_y, out=y_)
        if self.kept:
            for products, rows, cols in zip(self.products, (x_, y_), (y_, x_)):
                torch.mm(rows, cols.T, out=products.view(len(rows), len(cols)))
        self.scale.fill_(math.log2(math.e)).div_(eps)
        self.log_w[: self.n], self.log_w[-self.m :] = a.log2(), b.log2()
        g = -y_.square().sum(1) / 2
        self.p.zero_()
        p = self.p[: self.n] if self.same else self.p[self.n :]
        p.copy_(self.scale * (g + start if self.warm else g))
        self.errors.fill_(BIG)
        self.counts.zero_()
        return (torch.sub(mean_x, mean_y, out=self.t),)

    def chunk(self) -> tuple:
        """The next half-steps; returns the error that is left."""
        few = self.programs == 1
        # Even, so that the last p of a self problem is p[:n].
        steps = self.limit + self.limit % 2 if few else self.CHUNK
        buffers = self.z, self.products, self.log_w, self.p, self.errors, self.counts, self.scale
        sizes, launch = (self.n, self.m, self.tol), triton_sinkhorn()[0][(self.programs,)]
        kernel = self.same, self.d, self.kept, *self.tile, block_of(self.d), self.precision
        at_once, options = steps if few else 1, {"num_warps": 4, "num_stages": 2}
        for first in range(0, steps, at_once):
            launch(*buffers, *sizes, first, at_once, self.limit, *kernel, **options)
        self.errors[:3] = self.errors[self.CHUNK :].clone()
        self.counts[0] += self.CHUNK
        return (self.errors[2].sum(),)

    def conclude(self, t, a, b, eps) -> tuple:
        """The entries of a Plan."""
        n, x, y = self.n, self.z[: self.n], self.z[-self.m :]
        v = self.p[:n] if self.same else self.p[n:]
        u, p_y = self.finish(x, y, self.products[0], self.log_w[-self.m :], v, self.need[0])
        again, p_x = self.finish(y, x, self.products[-1], self.log_w[:n], u, self.need[1])
        unit, x2, y2 = eps * math.log(2), x.square().sum(1) / 2, y.square().sum(1) / 2
        f, g, error = unit * u + x2, unit * v + y2, b @ ((v - again).exp2() - 1).abs()
        value = a @ f + b @ g + (a @ x - b @ y) @ t + t @ t / 2
        grad_x = p_y.neg_().add_(x).add_(t).mul_(a[:, None]) if self.need[0] else None
        grad_y = p_x.neg_().add_(y).sub_(t).mul_(b[:, None]) if self.need[1] else None
        products = ((grad_x, x), (grad_y, y)) if all(self.need) else ()
        moved = (sum(p.flatten() @ q.flatten() for p, q in products) + t @ t) / 2 if products else None
        f, g = f + x @ t + t @ t / 2, g - y @ t
        shift = (b @ g - a @ f) / 2
        count = self.counts[1].clone() if self.same else (self.counts[1] + 1) // 2
        return f + shift, g - shift, value, moved, grad_x, grad_y, error, count

    def finish(self, rows, cols, products, log_w, p, need: bool) -> tuple[Tensor, Tensor]:
        """(3) for all rows, (n,), and, if there is need of it, the means of the columns (n, d)."""
        out_d = (block_of(self.d) if self.d <= 64 else 128) if need else 0
        out, means = torch.empty_like(rows[:, 0]), torch.empty_like(rows) if need else rows
        grid = -(-len(rows) // 32), -(-self.d // out_d) if need else 1
        # With these blocks, warps and stages the compiler keeps all in registers (tests/test_triton.py).
        options = {"num_warps": 8 if out_d > 64 else 4, "num_stages": 2}
        sizes = len(rows), len(cols), self.d, self.kept, 32, 64, block_of(self.d), out_d
        launch = triton_sinkhorn()[1][grid]
        launch(rows, cols, products, log_w, p, out, means, self.scale, *sizes, self.precision, **options)
        return out, means

    def play(self, part: Callable[..., tuple], *inputs: Tensor | None) -> tuple:
        """Do a part, or replay its graph, which reads copies of the inputs and overwrites its results."""
        name = part.__name__
        if self.graphs is None or name not in self.used:
            self.used.add(name)
            return part(*inputs)
        if name not in self.graphs:
            graph, places = torch.cuda.CUDAGraph(), [v if v is None else v.detach().clone() for v in inputs]
            options = {"pool": self.pool, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, stream=side_stream(self.z.device), **options):
                results = part(*places)
            self.graphs[name] = graph, places, results
        graph, places, results = self.graphs[name]
        for place, value in zip(places, inputs):
            if value is not None:
                place.copy_(value)
        graph.replay()
        return results

    def run(self, x, y, a, b, eps, start) -> Plan:
        """Solve the problem."""
        recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
        (t,) = self.play(self.prepare, x, y, a, b, eps, start)
        chunks = 1 if self.programs == 1 else -(-self.limit // self.CHUNK)
        for k in range(chunks):
            (error,) = self.play(self.chunk)
            if k < chunks - 1 and not recording and error.item() <= self.tol:
                break
        plan = self.play(self.conclude, t, a, b, eps)
        return Plan(*(v if v is None or self.graphs is None else v.clone() for v in plan))


triton_loop = lru_cache(maxsize=12)(TritonLoop)  # of the problems met last
side_stream = cache(torch.cuda.Stream)  # of a device, to record on; torch's own is of the first that recorded


def block_of(d: int) -> int:
    """How many coordinates the kernels take at once."""
    return 16 if d <= 16 else 64 if 32 < d <= 64 else 32


def triton_transport(x, y, eps, a, b, tol, max_iterations, start, need, same) -> Plan:
    """transport by the kernels. Errors and counts are tensors, and eps may be one: no step waits for them."""
    (n, d), m = x.shape, len(y)
    eps = eps.detach().to(x).view(()) if isinstance(eps, Tensor) else x.new_full((), eps)
    # tol / 2, as over-relaxed rows are not exact.
    options = same, need, start is not None, tol / 2, max_iterations, x.device, dot_precision(x)
    recording = x.is_cuda and torch.cuda.is_current_stream_capturing()  # that graph has memory of its own
    with torch.inference_mode(False), torch.no_grad():  # buffers of inference could not be used in training
        if recording or n * m > KEPT or (n + m) * d > KEPT // 2:
            loop = TritonLoop(n, m, d, *options, graphs=False)
        else:
            loop = triton_loop(n, m, d, *options)
        return loop.run(x.detach(), y.detach(), a.clamp(min=1e-18), b.clamp(min=1e-18), eps, start)


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
    critic = make_critic(args.feature_dim, args.channels, toy, args.spectral_norm, 1.0)
    critic = critic.to(device) if args.critic == "learned" else nn.Flatten()
    adam = partial(torch.optim.Adam, betas=(args.beta1, 0.999), fused=True)
    optimizers = {"opt_generator": adam(generator.parameters(), args.lr_generator)}
    if args.critic == "learned":
        optimizers["opt_critic"] = adam(critic.parameters(), args.lr_critic)
    run.hold(generator=generator, averaged=averaged, critic=critic, **optimizers)

    # What one batch has too much of in a mode, transport carries to another one, and the generator with it.
    strata = kd_order(data) if toy and args.stratified else None
    parts = 2 if args.loss == "minibatch-energy" or (args.critic == "learned" and args.repulsive) else 1
    sobol = torch.quasirandom.SobolEngine(args.latent_dim, scramble=True, seed=args.seed)
    sobol = sobol.draw(args.batch_size // parts).to(device)

    def latent() -> Tensor:
        if strata is None:
            return share(torch.randn(args.batch_size, args.latent_dim, device=device))
        return share(torch.cat([draw_sobol(sobol) for _ in range(parts)]))

    def draw_real() -> Tensor:
        if strata is None:
            return share(draw_batch(data, args.batch_size))
        return share(torch.cat([draw_strata(strata, args.batch_size // parts) for _ in range(parts)]))

    def distance(loss: str, h_real: Tensor, h_fake: Tensor) -> Tensor:
        # Of features (b, d). epsilon is relative, as features have no scale of their own.
        unit = mean_cost(h_real.detach(), h_fake.detach(), args.cost)
        eps = args.epsilon * (unit if recorded.enabled or unit.is_cuda else unit.item())
        if not isinstance(eps, Tensor) and not 0 < eps < math.inf:
            run.log({"mean_cost": eps or math.nan})  # ends the run
        options = {"cost": args.cost, "max_iterations": args.max_iterations, "tol": args.tolerance}
        halves = *h_real.chunk(2), *h_fake.chunk(2)
        if loss == "minibatch-energy":
            return minibatch_energy_distance(*halves, eps, **options)
        if loss == "repulsive":
            return repulsive_loss(*halves, eps, unroll=args.unroll, **options)
        return sinkhorn_divergence(h_real, h_fake, eps, unroll=args.unroll, **options)

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

    def step(with_critic: bool) -> dict[str, Tensor]:
        # The critic drives real and fake features apart.
        scalars = {}
        if with_critic:
            with torch.no_grad():
                fake = generator(latent())
            features = [*map(gather, critic(torch.cat((draw_real(), fake))).chunk(2))]
            loss = distance("repulsive", *features) if args.repulsive else -distance(args.loss, *features)
            scalars["loss_critic"] = loss
            update("opt_critic", loss)

        # The generator brings them together.
        with torch.no_grad():
            h_real = gather(critic(draw_real()))
        loss = distance(args.loss, h_real, gather(critic(generator(latent()))))
        update("opt_generator", loss)
        averaged.update_parameters(generator)
        return {"loss_generator": loss} | scalars

    lrs = {"opt_generator": args.lr_generator, "opt_critic": args.lr_critic}
    # An unrolled loss looks at its error in each iteration.
    possible = PROCESSES == 1 and not args.unroll
    recorded = Recorded(step, device, args.compile and possible, *optimizers.values())
    run.evaluate, run.agree = evaluate, largest
    for _ in run.steps():
        # Learning rates stay, and in the last part of the run fall linearly to zero.
        rate = min(1.0, (args.num_steps + 1 - run.step) / max(1.0, args.lr_decay * args.num_steps))
        for name, optimizer in optimizers.items():
            set_rate(optimizer, lrs[name] * rate)
        scalars = recorded(args.critic == "learned" and (run.step - 1) % args.critic_every == 0)
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
