# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch", "torchvision", "tyro", "pydantic", "wandb", "numpy", "tqdm", "matplotlib", "scikit-learn",
# ]
# ///
"""Sinkhorn GAN: a generator that moves its samples to the data along the cheapest plan, smoothed by entropy.

The generator minimises a distance of optimal transport between a batch of samples and a batch of data: the
debiased Sinkhorn divergence S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, or OT-GAN's minibatch energy
distance. The cost of a pair is half its squared distance or one minus its cosine, between the samples as they
are (--critic fixed) or features of a critic, which spreads real samples out and draws fake ones together, or
else makes the distance large.
    Genevay et al. 2018          Learning generative models with Sinkhorn divergences      1706.00292
    Salimans et al. 2018         OT-GAN and the minibatch energy distance                  1803.05573
    Feydy et al. 2019            Sinkhorn divergences between optimal transport and MMD    1810.08278

    python sinkhorn_gan.py --track                              # MNIST, logged to Weights & Biases
    python sinkhorn_gan.py --critic fixed                       # MNIST, transport of pixels
    python sinkhorn_gan.py --loss minibatch-energy --no-repulsive --critic-every 3          # OT-GAN
    python sinkhorn_gan.py --critic fixed --loss sinkhorn --unroll --max-iterations 20      # as in 2018
    python sinkhorn_gan.py --resume runs/<run> --generate 1000  # draw samples
    torchrun --nproc-per-node 2 sinkhorn_gan.py                 # share every batch among processes or GPUs

The default run takes 18 minutes on one CPU core, 41 on a slower one: fid 3.1 to 3.3, precision 0.70 and
recall 0.85 (two seeds; results/sinkhorn_gan.md has the rest).
"""

import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections import namedtuple
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torchvision
import tyro
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

SCRIPT = "sinkhorn_gan"
TOY = {"num_steps": 10_000, "eval_every": 2000, "batch_size": 512, "latent_dim": 2, "critic": "fixed"}
TOY |= {"cost": "euclidean", "epsilon": 5e-4, "tolerance": 0.1, "max_iterations": 30, "loss": "sinkhorn"}
# Pixel by pixel the Sinkhorn divergence of two batches is least for averages of digits.
FIXED = {"num_steps": 2000, "eval_every": 400, "batch_size": 512, "cost": "euclidean", "epsilon": 0.05}
FIXED |= {"loss": "minibatch-energy"}
DIGITS = {"num_steps": 1500, "eval_every": 500, "lr_critic": 5e-4}
PRESETS = {"fixed": FIXED, "digits": DIGITS, "ring": TOY | {"epsilon": 1e-4}, "grid": TOY}


class UserError(ValueError):
    """A mistake that the user can fix; the command line shows nothing but its message."""


class Args(BaseModel, strict=True, extra="forbid", allow_inf_nan=False):
    exp_name: str = SCRIPT  # first part of the run folder's name
    seed: int = Field(1, ge=0)  # seed of the run
    torch_deterministic: bool = True  # use deterministic algorithms where torch has them
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # as torch names it: cpu, cuda:1, mps
    track: bool = False  # log to Weights & Biases
    wandb_project_name: str = ""  # W&B project; by default WANDB_PROJECT, or minimal-gans
    wandb_entity: str = ""  # W&B team or user; by default WANDB_ENTITY, or you
    # images of 28 x 28 (digits needs no download), or points of 8 or 25 Gaussians
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "digits", "ring", "grid"] = "mnist"
    data_dir: str = "data"  # folder of the images, in torchvision's layout; downloaded if missing
    eval_split: Literal["test", "validation"] = "test"  # validation: the last sixth of the training images
    run_dir: str = "runs"  # folder of the run folders
    resume: str = ""  # run folder to resume; its options apply unless given again
    generate: int = Field(0, ge=0)  # write so many samples of the run in --resume to its generated/, then end
    log_every: int = Field(100, gt=0)  # steps between lines of metrics.jsonl, each with a checkpoint
    eval_every: int = Field(2800, gt=0)  # steps between evaluations, each with a picture
    num_eval_samples: int = Field(10_000, ge=0)  # samples per evaluation; 0 skips it for images
    num_steps: int = Field(14_000, gt=0)  # updates of the generator
    batch_size: int = Field(64, gt=0, multiple_of=2)  # samples in a batch, of two independent halves
    latent_dim: int = Field(32, gt=0)  # size of the generator's Gaussian input
    critic: Literal["learned", "fixed"] = "learned"  # the cost is one of its features, or of the data itself
    critic_every: int = Field(1, gt=0)  # updates of the generator per update of the critic
    repulsive: bool = True  # the critic's loss spreads real and draws fake samples together, else -loss
    lr_generator: float = Field(3e-3, gt=0)  # learning rate, which falls to zero in the last part of the run
    lr_critic: float = Field(2e-3, gt=0)  # likewise
    # the Sinkhorn divergence, or OT-GAN's distance between two halves of a batch
    loss: Literal["sinkhorn", "minibatch-energy"] = "sinkhorn"
    cost: Literal["cosine", "euclidean"] = "cosine"  # one minus the cosine, or half the squared distance
    epsilon: float = Field(0.3, gt=0)  # entropic regularisation, in units of the batch's mean cost
    # marginal error, a sum of absolute differences, at which iterations stop
    tolerance: float = Field(0.01, gt=0)
    max_iterations: int = Field(100, gt=0)  # iterations at most
    unroll: bool = False  # differentiate through the iterations, instead of by the envelope theorem
    stratified: bool = True  # ring and grid: even batches, a real point per cell and latents of a Sobol set

    def __init__(self, **options):
        for name, value in options.items():
            if isinstance(value, str | os.PathLike):
                options[name] = os.path.expanduser(value)
        # The command line gives every option, of a resumed run those of the run that were not typed.
        if options.get("resume") and len(options) < len(Args.model_fields):
            saved = load_checkpoint(options["resume"])["args"]
            del saved["device"]  # another machine may go on
            options = saved | options
        for name in ("dataset", "critic"):
            options = PRESETS.get(str(options.get(name)), {}) | options
        try:
            super().__init__(**options)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise UserError("; ".join(wrong)) from None
        if self.generate and not self.resume:
            raise UserError("--generate needs --resume, the folder of the run that draws the samples")
        if self.unroll and self.loss == "minibatch-energy":
            raise UserError("unroll: in the loss minibatch-energy no gradient flows through the plan")


# ---- Data -----------------------------------------------------------------------------------------------
def load_images(dataset: str, data_dir: str, eval_split: str) -> list[Tensor]:
    """Return training images (n, 28, 28) uint8, labels (n,), and those for evaluation. Raises UserError."""
    if dataset == "digits":  # scikit-learn's 1,797 digits of 8 x 8, enlarged
        from sklearn.datasets import load_digits

        pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
        images = F.interpolate(pixels.float().view(-1, 1, 8, 8) * (255 / 16), size=28, mode="bilinear")
        images = images.squeeze(1).round().to(torch.uint8)
        order = np.random.default_rng(0).permutation(len(labels))  # they come writer by writer
        parts = [v[order[i]] for i in (slice(1437), slice(1437, None)) for v in (images, labels)]
    else:
        name = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[dataset]
        parts = []
        try:
            for train in (True, False):
                part = getattr(torchvision.datasets, name)(data_dir, train=train, download=True)
                if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                    raise ValueError(f"expected 28 x 28 images of classes 0 to 9, not {part.data.shape}")
                parts += [part.data, part.targets]
        except Exception as error:
            where = f"{Path(data_dir, name, 'raw')}, see --data-dir"
            raise UserError(f"no {dataset} in {where}: {error!r:.200}") from error
    if eval_split == "validation":
        n = len(parts[0]) * 5 // 6
        parts = [parts[0][:n], parts[1][:n], parts[0][n:], parts[1][n:]]
    return parts


def load_toy(dataset: str) -> tuple[Tensor, Callable[[Tensor], dict]]:
    """Return points (n, 2) of the ring or grid of VEEGAN (2017) and PacGAN (2018), and their metrics."""
    angle = torch.arange(8) * (math.pi / 4)
    modes, std = torch.stack((angle.cos(), angle.sin()), 1), 0.01
    if dataset == "grid":
        modes, std = torch.cartesian_prod(*[torch.arange(-4.0, 5.0, 2.0)] * 2), 0.05
    rng = torch.Generator().manual_seed(0)  # the same points in every run
    points = modes[torch.randint(len(modes), (100_000,), generator=rng)]
    points += std * torch.randn(points.shape, generator=rng)

    def measure(samples: Tensor) -> dict:
        """Return modes covered, share of samples within 3 std of a mode, and the modes' KL to uniform."""
        distance, nearest = torch.cdist(samples.cpu(), modes).min(1)
        good = distance <= 3 * std
        shares = nearest.bincount(minlength=len(modes)) / len(samples)
        kl = torch.xlogy(shares, shares * len(modes)).sum().item()
        covered = len(nearest[good].unique())
        return {"modes": covered, "high_quality": good.float().mean().item(), "mode_kl": kl}

    return points, measure


def load_data(args) -> tuple[Tensor, Callable[[Tensor], dict]]:
    """Return the training samples, on the device, and the function that measures generated ones."""
    if args.dataset in ("ring", "grid"):
        points, measure = load_toy(args.dataset)
        return points.to(args.device), measure
    parts = load_images(args.dataset, args.data_dir, args.eval_split)
    images, labels, real, _ = (part.to(args.device) for part in parts)
    n = args.num_eval_samples
    if n == 0:
        return images, lambda samples: {}
    classifier = load_classifier(args, images, labels)
    return images, lambda samples: image_metrics(samples[:n], real[:n], classifier)


def to_float(batch: Tensor) -> Tensor:
    """Return uint8 images (b, 28, 28) as floats (b, 1, 28, 28) in [-1, 1], and any floats as they are."""
    return batch.unsqueeze(1).float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch


def kd_order(points: Tensor) -> Tensor:
    """Return points (n, 2) in the order of a k-d tree's leaves, near ones side by side; a few are lost."""
    cells, axis = points[None], 0
    while cells.shape[1] > 8:
        cells = cells[:, : cells.shape[1] // 2 * 2]
        order = cells[:, :, axis].argsort(dim=1, stable=True)
        cells = cells.gather(1, order[..., None].expand_as(cells)).reshape(2 * len(cells), -1, 2)
        axis = 1 - axis
    return cells.flatten(0, 1)


def draw_strata(points: Tensor, count: int) -> Tensor:
    """Return one random point (b, 2) out of each of b equal runs of points (n, 2) in k-d order."""
    place = torch.arange(count, device=points.device) + torch.rand(count, device=points.device)
    return points[(place * (len(points) / count)).long().clamp(max=len(points) - 1)]


def draw_sobol(uniform: Tensor) -> Tensor:
    """Return Gaussian latents (b, d) from a Sobol set in the unit cube (b, d), moved around it at random."""
    u = (uniform + torch.rand(uniform.shape[1], device=uniform.device)) % 1
    return math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-6, 1 - 1e-6) - 1)


# ---- Evaluation -----------------------------------------------------------------------------------------
def load_classifier(args, images: Tensor, labels: Tensor) -> nn.Sequential:
    """Return the classifier of these images (n, 28, 28), trained once and then kept in args.run_dir."""
    torch.manual_seed(0)
    classifier = nn.Sequential(
        block(nn.Conv2d(1, 32, 5, 2, 2, bias=False), 32),
        block(nn.Conv2d(32, 64, 5, 2, 2, bias=False), 64),
        nn.Flatten(),
        nn.Linear(64 * 49, 128),
        nn.ReLU(),  # the features (b, 128)
        nn.Linear(128, 10),
    ).to(images.device)
    mark = (images.sum((1, 2)) * (labels + 1)).sum().item()  # other images or labels have another one
    path = Path(args.run_dir, f"classifier__{args.dataset}__{mark}.pt")
    if not path.exists():
        print(f"training the classifier that evaluates samples, once, for {path}", flush=True)
        optimizer = torch.optim.Adam(classifier.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 4 * math.ceil(len(images) / 128))
        for _ in range(4):
            for index in torch.randperm(len(images), device=images.device).split(128):
                optimizer.zero_grad()
                logits = classifier(to_float(images[index]))
                F.cross_entropy(logits, labels[index], label_smoothing=0.05).backward()
                optimizer.step()
                schedule.step()
        replace_file(path, partial(torch.save, classifier.state_dict()))
    classifier.load_state_dict(torch.load(path, map_location=images.device, weights_only=True))
    return classifier.eval().requires_grad_(False)


def image_metrics(samples: Tensor, real: Tensor, classifier: nn.Sequential) -> dict:
    """Return metrics of samples against real images, (n, ...) and (m, ...), by the classifier's features."""
    y, x = (torch.cat([classifier[:-1](to_float(b)) for b in v.split(1000)]) for v in (samples, real))
    precision, recall = precision_recall(x, y[: len(x)])
    shares = (classifier[-1](y).argmax(1).bincount(minlength=10) / len(y)).tolist()
    return {"fid": frechet_distance(x, y), "precision": precision, "recall": recall, "class_shares": shares}


def frechet_distance(x: Tensor, y: Tensor) -> float | None:
    """Return the Fréchet distance of features (n, d) and (m, d) (Heusel et al. 2017, eq. 6), or None."""
    x, y = x.cpu().double(), y.cpu().double()
    if min(len(x), len(y)) < 2 or not (x.isfinite().all() and y.isfinite().all()):
        return None
    cov_x, cov_y = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cov_x.trace() + cov_y.trace() - 2 * root).item()


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> list[float | None]:
    """Return the shares of fake (m, d) near real (n, d), and vice versa (Kynkäänniemi et al. 2019, eq. 1)."""
    if min(len(real), len(fake)) <= k:
        return [None, None]
    shares = []
    for points, others in ((fake, real), (real, fake)):
        # Near is within the distance of the other's k-th neighbour in its own set.
        reach = torch.cdist(others, others).topk(k + 1, largest=False).values[:, -1]
        near = (torch.cdist(points, others) <= reach).any(1)
        shares.append(near.float().mean().item())
    return shares


# ---- Run folder -----------------------------------------------------------------------------------------
def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside path and move it into place, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_stem(f"{path.stem}.{os.getpid()}-{threading.get_ident()}")
    write(beside)
    try:
        os.replace(beside, path)
    except PermissionError:  # on Windows, while a viewer has it open
        tqdm.write(f"warning: {path} is open elsewhere and stays; the new one is {beside}")


def load_checkpoint(run: str | os.PathLike) -> dict:
    """Return the checkpoint of a run folder, without running code in it. Raises UserError."""
    try:
        path = Path(run, "checkpoint.pt").expanduser()
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"written by {checkpoint['script']}.py, not {SCRIPT}.py")
    except Exception as error:
        raise UserError(f"{run}/checkpoint.pt is missing, damaged or not a run's: {error!r:.80}") from error
    return checkpoint


def save_samples(path: Path, samples: Tensor, data: Tensor) -> None:
    """Draw 100 images (n, 1, 28, 28), or 2,500 points (n, 2) over as many of the data."""
    if samples.dim() == 4:
        return replace_file(path, partial(torchvision.utils.save_image, (samples[:100] + 1) / 2, nrow=10))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5))
    axes = figure.add_subplot(aspect="equal")
    for points in (data, samples):
        axes.scatter(*points[:2500].cpu().T, s=3, alpha=0.4)
    replace_file(path, figure.savefig)


def save_curves(path: Path, rows: list[dict]) -> None:
    """Draw each number of the log against the step."""
    from matplotlib.figure import Figure

    names = sorted({name for row in rows for name in row} - {"step", "class_shares"})
    figure = Figure(figsize=(12, len(names) + 2), layout="tight")
    for place, name in enumerate(names, 1):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        figure.add_subplot(-(-len(names) // 3), 3, place, title=name).plot(*zip(*points), marker=".")
    replace_file(path, figure.savefig)


# ---- Networks -------------------------------------------------------------------------------------------
def block(layer: nn.Module, channels: int) -> nn.Sequential:
    """Return a layer followed by batch normalisation and ReLU."""
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


def make_mlp(inputs: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    """Return a network from points (b, inputs) to (b, outputs), for the 2-D mixtures."""
    layers = [nn.Linear(inputs, 128), activation]
    for _ in range(2):
        layers += [nn.Linear(128, 128), activation]
    return nn.Sequential(*layers, nn.Linear(128, outputs))


def make_generator(latent_dim: int) -> nn.Sequential:
    """Return a network from latents (b, latent_dim) to images (b, 1, 28, 28) in [-1, 1]."""
    network = nn.Sequential(
        nn.Linear(latent_dim, 64 * 49, bias=False),
        block(nn.Unflatten(1, (64, 7, 7)), 64),
        block(nn.Conv2d(64, 64, 3, 1, 1, bias=False), 64),
        block(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), 32),  # (b, 32, 14, 14)
        block(nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False), 16),  # (b, 16, 28, 28)
        nn.Conv2d(16, 1, 3, 1, 1),
        nn.Tanh(),
    )
    return network.to(memory_format=torch.channels_last)  # half the time of a step on a CPU


def make_encoder(toy: bool) -> nn.Sequential:
    """Return a network from images (b, 1, 28, 28) or points (b, 2) to features (b, 16)."""
    network = nn.Sequential(
        nn.ConstantPad2d(1, -1.0),  # black: a frame of grey, which is 0, would be seen
        nn.Conv2d(1, 32, 4, 2),  # (b, 32, 14, 14)
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1),  # (b, 64, 7, 7)
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 64, 3, 1, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 49, 16),
    )
    if toy:
        network = make_mlp(2, 16, nn.LeakyReLU(0.2))
    for layer in network:
        if hasattr(layer, "weight"):
            nn.utils.parametrizations.spectral_norm(layer)
    return network.to(memory_format=torch.channels_last)


@torch.no_grad()
def draw_samples(generator: nn.Module, args, count: int) -> Tensor:
    """Return samples (count, ...) of a generator in evaluation mode; the latents have a seed of their own."""
    rng = torch.Generator().manual_seed(args.seed)
    latents = torch.randn(count, args.latent_dim, generator=rng).to(args.device)
    return torch.cat([generator.eval()(z) for z in latents.split(1000)])


# ---- Loss -----------------------------------------------------------------------------------------------
# Entropic optimal transport of weights a (n,) at x (n, d) to b (m,) at y (m, d), with costs C (n, m):
#     OT(x, y) = min of  <P, C> + eps KL(P | a b^T)  over P >= 0 with row sums a and column sums b     (1)
#              = max of  a.f + b.g - eps (sum P - 1)  over f, g, for P = a b^T exp((f + g - C) / eps)  (2)
# (Peyre and Cuturi 2019, proposition 4.4). At the maximum f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps),
# and likewise g from f: Sinkhorn's half-steps. All of it is done for a batch of B problems at once. While
# they are iterated, potentials are in units of eps ln 2, for powers of two: q for f, p for g.

DENSE = 2**26  # pairs in a batch, up to which kernels are kept as matrices: 256 MB of float32
BLOCK_PAIRS = 2**20  # pairs in a block of rows, where they are not: 4 MB
RANGE = 40.0  # log2 of the scalings for which float32, which ends at 2^-126, has room
MEMORY = 5  # steps that the extrapolation looks back on
COARSE, COOLING, LOOSE = 0.0125, 4.0, 3e-3  # anneal from eps = COARSE mean(C), each level to the error LOOSE


def sinkhorn_potentials(
    x: Tensor, y: Tensor, eps: float, a: Tensor | None = None, b: Tensor | None = None,
    cost: str = "euclidean", tol: float = 1e-3, max_iterations: int = 2000,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dual potentials f (n,) and g (m,) of entropic transport of x (n, d) to y (m, d), with a.f = b.g.

    Sinkhorn's half-steps (Cuturi 2013, algorithm 1), stabilised, extrapolated and, where eps is less than
    0.0125 times the mean cost, annealed. They have no gradients.

    Args:
        x, y: points, float32 or float64, on one device; or batches (B, n, d) and (B, m, d) of B problems,
            whose results have a dimension B in front. Each is solved as if alone.
        eps: the entropy's weight in (1), in the units of the cost; GeomLoss's blur^2, POT's reg.
        a, b: weights (n,) and (m,), or (B, n) and (B, m), not negative, that sum to one; uniform by default.
        cost: "euclidean", |x - y|^2 / 2 (GeomLoss's p=2); "cosine", 1 - cos(x, y), which is the same cost on
            normalised vectors.
        tol: stop when the plan's marginals differ from a and b by this, in the 1-norm; float32 does not get
            below 1e-6. A loss that is small beside OT(x, y), as that of nearly equal clouds, needs less.
        max_iterations: stop after so many (two half-steps each), with a warning that says the error (unroll
            has none).

    Raises ValueError for shapes, dtypes or devices that do not fit, for no points, points whose squares are
    not finite, eps, tol or max_iterations that are not positive, weights that are negative or do not sum to
    one (within 1e-4), vectors of length zero under "cosine", and unknown names.
    """
    x, y, a, b, single = as_batch(x, y, eps, a, b, cost, tol, max_iterations)
    solution = solve(x, y, eps, a, b, tol, max_iterations)
    return (solution.f[0], solution.g[0]) if single else (solution.f, solution.g)


def transport_plan(x: Tensor, y: Tensor, eps: float, a=None, b=None, cost="euclidean", **options) -> Tensor:
    """Return the plan P (n, m), or (B, n, m), whose row sums are a, for problems that are small enough.

    Arguments and errors are those of sinkhorn_potentials.
    """
    x, y, a, b, single = as_batch(x.detach(), y.detach(), eps, a, b, cost, **options)
    p = solve(x, y, eps, a, b, **options).g * (math.log2(math.e) / eps)
    scale = x.new_full((len(x), 1), math.log2(math.e) / eps)
    center = x.mean(1, keepdim=True)
    left, right = log_factors(x - center, y - center, b.log2() + p, scale)
    plan = a[..., None] * (left @ right).mul_(math.log(2)).softmax(2)
    return plan[0] if single else plan


def ot_cost(
    x: Tensor, y: Tensor, eps: float, a: Tensor | None = None, b: Tensor | None = None,
    cost: str = "euclidean", tol: float = 1e-3, max_iterations: int = 2000, unroll: bool = False,
) -> Tensor:  # fmt: skip
    """Return the entropic transport cost (1) between x (n, d) and y (m, d): a scalar, or (B,).

    The value is (2) at the potentials reached: below the exact one, by the square of their error. Its
    gradient is that of (2) with f and g held, sum_j P_ij (x_i - y_j) in x_i (the envelope theorem; Feydy et
    al. 2019): no graph through the iterations, and no second derivative. unroll=True differentiates through
    plain iterations, as Genevay et al. 2018 did, and keeps a matrix for each half-step. Weights have no
    gradient. Arguments and errors are those of sinkhorn_potentials.
    """
    x, y, a, b, single = as_batch(x, y, eps, a, b, cost, tol, max_iterations)
    if unroll:
        value = unrolled_cost(x, y, eps, a, b, tol, max_iterations)
    else:
        found = solve(x, y, eps, a, b, tol, max_iterations)
        value = GivenGradients.apply(found.value, found.grad_x, found.grad_y, x, y)
    return value[0] if single else value


def sinkhorn_divergence(
    x: Tensor, y: Tensor, eps: float, a: Tensor | None = None, b: Tensor | None = None,
    cost: str = "euclidean", tol: float = 1e-3, max_iterations: int = 2000, unroll: bool = False,
) -> Tensor:  # fmt: skip
    """Return the debiased OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 between x (n, d) and y (m, d), or (B,).

    Feydy et al. 2019, eq. 3: never negative, and zero only if x and y are one measure (theorem 1). Genevay et
    al. 2018 take twice this with <P, C> in place of OT, without the entropy. Arguments, gradients and errors
    are those of ot_cost.
    """
    x, y, a, b, single = as_batch(x, y, eps, a, b, cost, tol, max_iterations)
    if unroll:
        sides = (x, y, a, b), (x, x, a, a), (y, y, b, b)
        xy, xx, yy = (unrolled_cost(u, v, eps, *w, tol, max_iterations) for u, v, *w in sides)
        value = xy - (xx + yy) / 2
    else:
        # OT(x, x) / 2 has the gradient of OT(x, .) in its first argument. With that, and OT(x, y) started
        # from the more exact potential of y, all cancels where x equals y.
        if x.shape == y.shape:
            both, weights = torch.cat((x, y)), torch.cat((a, b))
            found = solve(both, both, eps, weights, weights, tol / 10, max_iterations, same=True)
            xx, yy = (Solution(*half) for half in zip(*(part.chunk(2) for part in found)))
        else:
            xx, yy = (
                solve(v, v, eps, w, w, tol / 10, max_iterations, same=True) for v, w in ((x, a), (y, b))
            )
        xy = solve(x, y, eps, a, b, tol, max_iterations, start=yy.g)
        grads = xy.grad_x - xx.grad_x, xy.grad_y - yy.grad_x
        value = GivenGradients.apply(xy.value - (xx.value + yy.value) / 2, *grads, x, y)
    return value[0] if single else value


def minibatch_energy_distance(
    x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor, eps: float, cost: str = "cosine", **options
) -> Tensor:  # fmt: skip
    """Return OT-GAN's loss, from two independent halves each of real and of fake samples, (n, d): a scalar.

    W(x1, y1) + W(x1, y2) + W(x2, y1) + W(x2, y2) - 2 W(x1, x2) - 2 W(y1, y2)  (Salimans et al. 2018, section
    3 and algorithm 1); one batch's may be negative. W is <P, C>, the part of (1) without the entropy, for P
    whose entries sum to one (theirs to the batch size). As in the paper, no gradient flows through P, which
    makes it the gradient of (1) (the envelope theorem), not of the value. Arguments and errors are those of
    ot_cost, but that torch.stack refuses clouds of different shapes.
    """
    problems = (x1, y1), (x1, y2), (x2, y1), (x2, y2), (x1, x2), (y1, y2)
    x, y = (torch.stack(clouds).flatten(0, -3) for clouds in zip(*problems))
    x, y, a, b, _ = as_batch(x, y, eps, None, None, cost, **options)
    found = solve(x, y, eps, a, b, **options)
    w = GivenGradients.apply(found.moved, found.grad_x, found.grad_y, x, y).unflatten(0, (6, *x1.shape[:-2]))
    return w[:4].sum(0) - 2 * w[4:].sum(0)


def repulsive_loss(x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor, eps: float, **options) -> Tensor:
    """Return OT(y1, y2) - OT(x1, x2): a critic spreads real samples x out and draws fake samples y together.

    The repulsive loss of MMD-GAN (Wang et al. 2019, 1812.09916, section 3.2) with transport costs between
    independent halves, all (n, d), in place of minus a kernel's means: the parts of the energy distance that
    do not compare real with fake, one with its sign turned. Arguments and errors are those of ot_cost.
    """
    fake, real = ot_cost(torch.stack((y1, x1)), torch.stack((y2, x2)), eps, **options)
    return fake - real


def mean_cost(x: Tensor, y: Tensor, cost: str = "euclidean") -> Tensor:
    """Return the mean cost of the pairs of x (n, d) and y (m, d), a scalar, or (B,): a unit for eps."""
    if cost == "cosine":
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    between = (x.mean(-2) - y.mean(-2)).square().sum(-1)
    return (between + x.var(-2, correction=0).sum(-1) + y.var(-2, correction=0).sum(-1)) / 2


class GivenGradients(torch.autograd.Function):
    """Values (B,) whose gradients in x (B, n, d) and y (B, m, d) are known already."""

    @staticmethod
    def forward(ctx, values, grad_x, grad_y, x, y):
        ctx.save_for_backward(grad_x, grad_y)
        return values.clone()

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # create_graph=True: they would be missing silently
            raise RuntimeError("no second derivatives but with unroll=True")
        return None, None, None, *(g[:, None, None] * grad for grad in ctx.saved_tensors)


def as_batch(x, y, eps, a, b, cost, tol=1e-3, max_iterations=2000) -> tuple:
    """Return x, y, a, b as a batch, normalised if the cost is cosine, and whether they were one problem."""
    if torch.is_autocast_enabled(x.device.type):
        raise ValueError("transport needs products in full precision: call it outside of torch.autocast")
    single, shapes = x.dim() == 2, f"{tuple(x.shape)} and {tuple(y.shape)}"
    if single:
        x, y, a, b = (None if v is None else v[None] for v in (x, y, a, b))
    if x.dim() != 3 or y.dim() != 3 or x.shape[::2] != y.shape[::2] or min(*x.shape, *y.shape) < 1:
        raise ValueError(f"x and y must be (n, d) and (m, d), or (B, n, d) and (B, m, d), not {shapes}")
    if not (x.dtype == y.dtype in (torch.float32, torch.float64) and x.device == y.device):
        kinds = f"{x.dtype} on {x.device} and {y.dtype} on {y.device}"
        raise ValueError(f"x and y must both be float32 or both float64, on one device, not {kinds}")
    if cost not in ("euclidean", "cosine"):
        raise ValueError(f"cost must be euclidean or cosine, not {cost!r}")
    for name, value in (("eps", eps), ("tol", tol), ("max_iterations", max_iterations)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value}")
    weights = []
    for name, points, w in (("x", x, a), ("y", y, b)):
        norms = points.detach().square().sum(2)
        if not norms.isfinite().all() or (cost == "cosine" and not norms.all()):
            raise ValueError(f"{name} and its squares must be finite, and not zero if the cost is cosine")
        w = torch.full_like(norms, 1 / norms.shape[1]) if w is None else w.detach()
        if w.shape != norms.shape or w.dtype != norms.dtype or w.device != norms.device:
            raise ValueError(f"weights of {name} must be {tuple(norms.shape)}, like it, not {tuple(w.shape)}")
        if not (w.min() >= 0 and (w.sum(1) - 1).abs().max() < 1e-4):
            raise ValueError(f"weights of {name} must not be negative, with sum 1, not {w.sum(1).tolist()}")
        weights.append(w / w.sum(1, keepdim=True))
    if cost == "cosine":
        x, y = F.normalize(x, dim=2, eps=0), F.normalize(y, dim=2, eps=0)
    return x, y, *weights, single


# Of solved problems (1): potentials, the values and their parts <P, C> (B,), and the gradients
Solution = namedtuple("Solution", "f g value moved grad_x grad_y")


@torch.no_grad()
def solve(x, y, eps, a, b, tol=1e-3, max_iterations=2000, same=False, start=None) -> Solution:
    """Solve problems (1) of x (B, n, d), y (B, m, d), a (B, n) and b (B, m).

    same: y is x and b is a, so that one potential will do. start: a potential g (B, m) to start from.
    """
    # Centred, with t = mean x - mean y, the cost is C = C' + x'.t - y'.t + |t|^2 / 2. The terms in x' or y'
    # alone leave the plan as it is. In units of length that make the mean of C' one, all scales are alike.
    mean_x, mean_y = a[:, None] @ x, b[:, None] @ y  # (B, 1, d)
    x, y, t = x - mean_x, y - mean_y, mean_x - mean_y
    spread_x, spread_y = (a * x.square().sum(2)).sum(1), (b * y.square().sum(2)).sum(1)
    spread = (spread_x + spread_y)[:, None] / 2  # (B, 1)
    unit = torch.where(spread > 0, spread, 1.0).sqrt()  # of one point the spread is zero
    x, y, t = (v / unit[..., None] for v in (x, y, t))
    # Potentials may be 1e4 and more: in float32 too coarse for a marginal error of 1e-3
    fine = torch.float32 if x.device.type == "mps" else torch.float64
    log_a, log_b = (w.to(fine).clamp(min=1e-18).log2() for w in (a, b))
    eps = eps / unit.to(fine).square()
    g = torch.zeros_like(log_b) if start is None else start / unit.to(fine).square()

    # From a large eps to the one that is wanted; a self problem needs only that.
    steepest = (COARSE * (spread > 0) / eps).max().clamp(min=1).item()
    left = max_iterations
    for level in range(0 if same else math.ceil(math.log(steepest, COOLING)), -1, -1):
        scale = math.log2(math.e) / (eps * COOLING**level)  # (B, 1)
        rows, columns = half_steps(x, y, log_a, log_b, scale, same)
        wanted = max(tol, LOOSE) if level else tol
        limit = max(1, left - level)
        if same:
            p, count = iterate_self(rows, g * scale, log_b.exp2(), wanted, limit)
        else:
            p, count = iterate(rows, columns, g * scale, log_a.exp2(), log_b.exp2(), wanted, limit)
        g = p / scale
        left -= count

    # The last half-steps and the barycentres of the plans, of exact rows and of exact columns
    q, to_y = rows(p, True)
    last, to_x = (q, to_y) if same else columns(q, True)
    error = marginal_error(p - last, b).max()
    if left <= 0 and error > tol:
        message = f"Sinkhorn's {max_iterations} iterations ended with a marginal error of {error:.1e}"
        warnings.warn(f"{message}, above tol={tol}: raise max_iterations or eps", stacklevel=4)
    grad_x = a[..., None] * (x - to_y)
    grad_y = b[..., None] * (y - to_x)
    apart = t.square().sum((1, 2))  # (B,)
    value = (((a * q).sum(1) + (b * p).sum(1)) / scale[:, 0]).to(x.dtype) + apart / 2
    moved = ((grad_x * x).sum((1, 2)) + (grad_y * y).sum((1, 2)) + apart) / 2
    if not (value * unit[:, 0].square()).isfinite().all():
        raise ValueError("the transport cost is not finite: scale x, y and eps")

    # Back from C' to C, with a.f = b.g, and to the units that were given
    f = (q / scale).to(x.dtype) + (x @ t.mT).squeeze(2) + apart[:, None] / 2
    g = (p / scale).to(x.dtype) - (y @ t.mT).squeeze(2)
    shift = ((b * g).sum(1) - (a * f).sum(1))[:, None] / 2
    f, g, value, moved = (v * unit.square() for v in (f + shift, g - shift, value[:, None], moved[:, None]))
    grad_x = (grad_x + a[..., None] * t) * unit[..., None]
    grad_y = (grad_y - b[..., None] * t) * unit[..., None]
    return Solution(f, g, value[:, 0], moved[:, 0], grad_x, grad_y)


def marginal_error(step: Tensor, weights: Tensor) -> Tensor:
    """Return the 1-norm (B,) of weights less those of the plan, for a step (B, m) of potentials."""
    return (weights * (step.clamp(max=RANGE).exp2() - 1)).abs().sum(1)


def half_steps(x, y, log_a, log_b, scale, same) -> tuple:
    """Return the functions from p (B, m) to q (B, n) and back, by Triton, matrices or blocks of rows.

    With barycentres=True they also return the means (B, n, d) of y, or of x, in the plan.
    """
    if x.is_cuda and x.dtype == torch.float32 and find_spec("triton"):
        step = triton_soft_minimum
    elif len(x) * x.shape[1] * y.shape[1] > DENSE:
        step = soft_minimum
    else:
        kernel = GibbsKernel(x, y, log_a, log_b, scale, same)
        return kernel.rows, kernel.columns
    return partial(step, x, y, log_b, scale, same), partial(step, y, x, log_a, scale, same)


def iterate(rows, columns, p: Tensor, a: Tensor, b: Tensor, tol: float, limit: int) -> tuple[Tensor, int]:
    """Return potentials p (B, m) whose marginal errors are at most tol, and the number of steps that it took.

    Each second step is extrapolated (Anderson 1965). Plain steps raise the dual (2): where it fell, the
    extrapolation went too far, and it goes on from the last plain step, without its history.
    """
    steps = p.new_empty(0, 2, *p.shape)  # the last potentials, and the plain steps from them: (k, 2, B, m)
    dual = None
    for count in range(1, limit + 1):
        q, _ = rows(p)
        plain, _ = columns(q)
        going = marginal_error(p - plain, b)[:, None] > tol
        if count == limit or ended(going, count):
            break
        step = torch.stack((p, plain))
        last_dual, dual = dual, (a * q).sum(1) + (b * p).sum(1)
        if count > 1 and count % 2:  # p was extrapolated
            fell = dual < last_dual - 1e-6
            dual = torch.where(fell, last_dual, dual)
            step = torch.where(fell[:, None], steps[-1], step)
            steps = torch.where(fell[:, None], step, steps)
        steps = torch.cat((steps[1 - MEMORY :], step[None]))
        p = torch.where(going, step[1] if count % 2 else extrapolate(steps, b), p)
    return p, count


def iterate_self(rows, p: Tensor, b: Tensor, tol: float, limit: int) -> tuple[Tensor, int]:
    """Return what iterate does for y = x, by p <- (p + q) / 2, which leaves at most half of the error.

    The marginal error is at most twice that of p - q.
    """
    for count in range(1, limit + 1):
        q, _ = rows(p)
        going = 2 * marginal_error(p - q, b)[:, None] > tol
        if count == limit or ended(going, count):
            break
        p = torch.where(going, (p + q) / 2, p)
    return p, count


def ended(going: Tensor, count: int) -> bool:
    """Return whether no problem goes on; every fourth time on CUDA, where a look makes the host wait."""
    return (not going.is_cuda or count % 4 == 0) and not going.any()


def extrapolate(steps: Tensor, b: Tensor) -> Tensor:
    """Return the mix (B, m) of plain steps, of steps (k, 2, B, m), whose residual is least in weights b."""
    p, plain = steps.unbind(1)
    residual = plain - p
    d_plain, d_residual = plain[:-1] - plain[-1], residual[:-1] - residual[-1]
    gram = torch.einsum("kbm,lbm,bm->bkl", d_residual, d_residual, b)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += 1e-5 * diagonal.amax(1, keepdim=True) + 1e-30  # differences are nearly parallel at the end
    target = torch.einsum("kbm,bm,bm->bk", d_residual, residual[-1], b)
    return plain[-1] - torch.einsum("bk,kbm->bm", torch.linalg.solve_ex(gram, target).result, d_plain)


class GibbsKernel:
    """The matrices K_ij = b_j 2^(p_j - scale C_ij - top_i) of a batch, top_i making row i's largest entry 1.

    Half-steps are products with scalings v = 2^(p' - p). Where v leaves float32's range, p' becomes p.
    """

    def __init__(self, x, y, log_a, log_b, scale, same):
        self.problem, self.p = (x, y, log_a, log_b, scale, same), None

    def rows(self, p: Tensor, barycentres: bool = False) -> tuple[Tensor, Tensor | None]:
        x, y, _, log_b, scale, same = self.problem
        if self.p is None or not (p - self.p).abs().max() < RANGE:
            self.p = p
            left, right = log_factors(x, y, log_b + p, scale)
            self.k = left @ right
            if same:  # no point has a cost to itself, not even one by rounding
                self.k.diagonal(dim1=1, dim2=2).copy_(log_b + p)
            self.top = self.k.amax(2)
            self.k.sub_(self.top[..., None]).exp2_()
        v = (p - self.p).exp2().to(x.dtype)
        r = (v[:, None] @ self.k.mT)[:, 0]  # a row times a matrix: of columns torch.bmm is slow
        means = (self.k @ (v[..., None] * y)) / r[..., None] if barycentres else None
        return -(self.top.to(p.dtype) + r.log2()), means

    def columns(self, q: Tensor, barycentres: bool = False) -> tuple[Tensor, Tensor | None]:
        x, y, log_a, log_b, scale, same = self.problem
        w = (log_a + q + self.top).exp2().to(x.dtype)
        s = (w[:, None] @ self.k)[:, 0]
        p = self.p + log_b - s.log2()
        if not (p - self.p).abs().max() < RANGE:  # columns that are zero to float32
            return soft_minimum(y, x, log_a, scale, same, q, barycentres)
        return p, (self.k.mT @ (w[..., None] * x)) / s[..., None] if barycentres else None


def log_factors(x, y, shift, scale) -> tuple[Tensor, Tensor]:
    """Return factors of the matrix shift_j - scale |x_i - y_j|^2 / 2, for shifts (B, m), scales (B, 1)."""
    scale, shift = scale[..., None].to(x.dtype), shift.to(x.dtype)
    x2, y2 = (-scale / 2 * z.square().sum(2, keepdim=True) for z in (x, y))
    left = torch.cat((scale * x, x2, torch.ones_like(x2)), 2)
    right = torch.cat((y, torch.ones_like(y2), y2 + shift[..., None]), 2)
    return left, right.mT


def soft_minimum(x, y, log_b, scale, same, p, barycentres=False) -> tuple[Tensor, Tensor]:
    """Return q_i = -log2 sum_j b_j 2^(p_j - scale C_ij), in blocks of rows, and the means of y."""
    left, right = log_factors(x, y, log_b + p, scale)
    rows = max(1, BLOCK_PAIRS // (y.shape[1] * len(x)))
    buffer = x.new_empty(len(x), min(rows, x.shape[1]), y.shape[1])
    q, means = [], []
    for i in range(0, x.shape[1], rows):
        block = left[:, i : i + rows]
        k = torch.bmm(block, right, out=buffer[:, : block.shape[1]])
        if same:
            k[:, :, i : i + rows].diagonal(dim1=1, dim2=2).copy_((log_b + p)[:, i : i + rows])
        top = k.amax(2)
        r = k.sub_(top[..., None]).exp2_().sum(2)
        q.append(-(top.to(p.dtype) + r.log2()))
        means.append((k @ y) / r[..., None] if barycentres else x[:, :0])
    return torch.cat(q, 1), torch.cat(means, 1)


def unrolled_cost(x, y, eps, a, b, tol, max_iterations) -> Tensor:
    """Return ot_cost by plain log-domain iterations that autograd follows."""
    center = x.detach().mean(1, keepdim=True)
    x, y = x - center, y - center
    cost = x.square().sum(2, keepdim=True) / 2 + y.square().sum(2)[:, None] / 2 - x @ y.mT  # (B, n, m)
    log_a, log_b = (w.clamp(min=1e-18).log()[:, None] for w in (a, b))
    g = torch.zeros_like(b)
    for _ in range(max_iterations):
        f = -eps * ((g[:, None] - cost) / eps + log_b).logsumexp(2)
        last, g = g, -eps * ((f[:, None] - cost.mT) / eps + log_a).logsumexp(2)
        if marginal_error((last - g).detach() * (math.log2(math.e) / eps), b).max() <= tol:
            break
    return (a * f).sum(1) + (b * g).sum(1)


def triton_soft_minimum(x, y, log_b, scale, same, p, barycentres=False) -> tuple[Tensor, Tensor]:
    """Return what soft_minimum does, by one Triton kernel without a matrix."""
    size, (n, d), m = len(x), x.shape[1:], y.shape[1]
    q, means = x.new_empty(size, n), torch.empty_like(x) if barycentres else x
    out = min(64, max(16, 2 ** (d - 1).bit_length())) if barycentres else 16
    grid = (-(-n // 32), -(-d // out) if barycentres else 1, size)
    shift, scale = (log_b + p).to(x.dtype), scale.to(x.dtype)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        options = {"num_warps": 8, "num_stages": 2}  # all stays in registers (tests/test_triton.py)
        points = x.contiguous(), y.contiguous(), shift.contiguous(), scale.contiguous()
        sinkhorn_kernel()[grid](*points, q, means, n, m, d, same, barycentres, 32, 32, out, **options)
    return q.to(p.dtype), means


@cache
def sinkhorn_kernel():
    """Return the kernel of triton_soft_minimum, made at its first use: nothing else needs Triton."""
    global tl  # where a kernel looks names up
    import triton
    import triton.language as tl

    # A program takes BLOCK rows of x in a problem and goes along all of y. As attention does, it keeps of
    # each row the largest exponent yet, and the sums of powers, and of powers times y, below it.
    @triton.jit
    def soft_minimum_kernel(
        x, y, shift, scale, q, means, n, m, D: tl.constexpr, SAME: tl.constexpr, MEANS: tl.constexpr,
        BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, OUT_D: tl.constexpr,
    ):  # fmt: skip
        problem = tl.program_id(2).to(tl.int64)
        rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        out = tl.program_id(1) * OUT_D + tl.arange(0, OUT_D)
        x += problem * n * D
        y += problem * m * D
        half_scale = tl.load(scale + problem) / 2
        top, r = tl.full((BLOCK,), -float("inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
        pull = tl.zeros((BLOCK, OUT_D), tl.float32)
        for col in range(0, m, BLOCK):
            cols = col + tl.arange(0, BLOCK)
            # Squared distances t (BLOCK, BLOCK), from BLOCK_D coordinates at a time
            dot = tl.zeros((BLOCK, BLOCK), tl.float32)
            a2, b2 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for first in range(0, D, BLOCK_D):
                at = first + tl.arange(0, BLOCK_D)[None, :]
                a = tl.load(x + rows[:, None] * D + at, (rows < n)[:, None] & (at < D), 0.0)
                b = tl.load(y + cols[:, None] * D + at, (cols < m)[:, None] & (at < D), 0.0)
                dot = tl.dot(a, tl.trans(b), dot, input_precision="tf32x3")
                a2 += tl.sum(a * a, 1)
                b2 += tl.sum(b * b, 1)
            t = tl.maximum(a2[:, None] + b2[None, :] - 2 * dot, 0.0, tl.PropagateNan.ALL)
            if SAME:
                t = tl.where(rows[:, None] == cols[None, :], 0.0, t)
            exponent = tl.load(shift + problem * m + cols, cols < m, -float("inf"))[None, :] - half_scale * t
            largest = tl.maximum(top, tl.max(exponent, 1))
            k = tl.exp2(exponent - largest[:, None])
            shrink = tl.exp2(top - largest)
            r = r * shrink + tl.sum(k, 1)
            if MEANS:
                inside = (cols < m)[:, None] & (out < D)[None, :]
                b = tl.load(y + cols[:, None] * D + out[None, :], inside, 0.0)
                pull = tl.dot(k, b, pull * shrink[:, None], input_precision="tf32x3")
            top = largest
        tl.store(q + problem * n + rows, -(top + tl.log2(r)), (rows < n) & (tl.program_id(1) == 0))
        if MEANS:
            place = problem * n * D + rows[:, None] * D + out[None, :]
            tl.store(means + place, pull / r[:, None], (rows < n)[:, None] & (out < D)[None, :])

    return soft_minimum_kernel


# ---- Training -------------------------------------------------------------------------------------------
def gather(h: Tensor) -> Tensor:
    """Return the global batch under torchrun, this rank's part (b, d) with its gradient; else the batch."""
    if not dist.is_initialized():
        return h
    parts = [torch.empty_like(h) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, h.detach())
    parts[dist.get_rank()] = h
    return torch.cat(parts)


def train(args: Args) -> Path:
    """Train, evaluate and save; return the run folder. With args.generate draw samples of a run instead.

    Raises UserError for what the user can fix. After Ctrl-C or SIGTERM it saves and raises SystemExit.
    """
    toy, device = args.dataset in ("ring", "grid"), torch.device(args.device)
    with ExitStack() as stack:  # puts back what a run changes in the process
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn" if args.torch_deterministic else "default")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS is not deterministic
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Sinkhorn")  # a few of a run's problems take max_iterations
        # torchrun starts several processes: each has a part of every batch, and the first one writes
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if args.batch_size % (2 * world_size):
            raise UserError(f"batch_size must be a multiple of {2 * world_size}, twice the processes")
        batch_size = args.batch_size // world_size
        if world_size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            stack.callback(dist.destroy_process_group)
        if rank > 0:
            dist.barrier()  # the first one downloads, and trains the classifier
        data, measure = load_data(args)
        if rank == 0 and world_size > 1:
            dist.barrier()

        torch.manual_seed(args.seed)
        generator = make_mlp(args.latent_dim, 2, nn.ReLU()) if toy else make_generator(args.latent_dim)
        critic = make_encoder(toy) if args.critic == "learned" else nn.Flatten()
        generator.to(device)
        critic.to(device)
        for p in (*generator.parameters(), *critic.parameters()) if world_size > 1 else ():
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))  # the sum over processes
        decay = min(0.999, 1 - 10 / max(10, args.num_steps))  # a short run averages over fewer steps
        averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        optimizer_g = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.999), fused=True)
        parts = {"generator": generator, "averaged": averaged, "optimizer_g": optimizer_g}
        if args.critic == "learned":
            optimizer_c = torch.optim.Adam(critic.parameters(), betas=(0.5, 0.999), fused=True)
            parts |= {"critic": critic, "optimizer_c": optimizer_c}

        # What a batch of points has too much of in a mode, transport carries to another one.
        strata = kd_order(data) if toy and args.stratified else None
        halves = 2 if args.loss == "minibatch-energy" or args.critic == "learned" else 1
        sobol = torch.quasirandom.SobolEngine(args.latent_dim, scramble=True, seed=args.seed)
        sobol = sobol.draw(batch_size // halves).to(device)

        def draw_latents() -> Tensor:
            if strata is None:
                return torch.randn(batch_size, args.latent_dim, device=device)
            return torch.cat([draw_sobol(sobol) for _ in range(halves)])

        def draw_real() -> Tensor:
            if strata is None:
                return to_float(data[torch.randint(len(data), (batch_size,), device=device)])
            return torch.cat([draw_strata(strata, batch_size // halves) for _ in range(halves)])

        def distance(loss: str, h_real: Tensor, h_fake: Tensor) -> Tensor:
            eps = args.epsilon * mean_cost(h_real.detach(), h_fake.detach(), args.cost).item()
            if not 0 < eps < math.inf:
                raise UserError(f"features are alike or not finite at step {step}: lower the learning rates")
            options = {"cost": args.cost, "tol": args.tolerance, "max_iterations": args.max_iterations}
            if loss == "minibatch-energy":
                return minibatch_energy_distance(*h_real.chunk(2), *h_fake.chunk(2), eps, **options)
            options["unroll"] = args.unroll
            if loss == "repulsive":
                return repulsive_loss(*h_real.chunk(2), *h_fake.chunk(2), eps, **options)
            return sinkhorn_divergence(h_real, h_fake, eps, **options)

        # A new run folder, or that of the run to go on with
        name = f"{args.exp_name}__{args.dataset}__{args.seed}__{time.time_ns()}"
        folder = Path(args.resume or Path(args.run_dir, name))
        step, seconds, run_id, rows = 0, 0.0, None, []
        if args.resume:
            checkpoint = load_checkpoint(folder)
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            torch.set_rng_state(checkpoint["rng"])
            torch.cuda.set_rng_state_all(checkpoint["rng_cuda"][: torch.cuda.device_count()])
            step, seconds, run_id, rows = checkpoint["progress"]
        if args.generate:
            samples = draw_samples(averaged, args, args.generate).cpu().numpy()
            replace_file(folder / "generated" / "samples.npy", lambda path: np.save(path, samples))
            return folder / "generated"
        if rank > 0:
            torch.manual_seed(args.seed + 1000 * rank + step)  # other samples than the first one's
        else:
            folder.mkdir(parents=True, exist_ok=bool(args.resume))
        wandb_run = None
        if rank == 0 and args.track:
            import wandb

            project = args.wandb_project_name or os.environ.get("WANDB_PROJECT", "minimal-gans")
            names = {"project": project, "name": os.environ.get("WANDB_NAME", folder.name), "id": run_id}
            names["entity"] = args.wandb_entity or None
            wandb_run = wandb.init(**names, resume="allow", config=vars(args), dir=args.run_dir)
            stack.push(lambda kind, error, trace: wandb_run.finish(exit_code=int(kind is not None)))
            run_id = wandb_run.id
        signals: list[int] = []  # Ctrl-C or SIGTERM, which end the loop; no other thread can catch them
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, lambda number, frame: signals.append(number))
                stack.callback(signal.signal, number, before)

        def evaluate() -> dict:
            samples = draw_samples(averaged, args, max(args.num_eval_samples, 2500 if toy else 100))
            for name in (f"samples_{step:06d}.png", "samples.png"):
                save_samples(folder / name, samples, data)
            if wandb_run:
                wandb_run.log({"samples": wandb.Image(str(folder / "samples.png"))}, step=step)
            metrics = measure(samples)
            tqdm.write(f"step {step}: {metrics}")
            return metrics

        metrics, logged, clock = None, step, time.perf_counter()
        for step in tqdm(range(logged + 1, args.num_steps + 1), desc=SCRIPT, disable=True if rank else None):
            # Learning rates are constant at first, then fall linearly to zero.
            rate = min(1.0, (args.num_steps - step + 1) / ((0.6 if toy else 0.7) * args.num_steps))

            # The critic minimises  OT(y1, y2) - OT(x1, x2)  of halves of the batch, or minus the loss below.
            loss_c = None
            if args.critic == "learned" and step % args.critic_every == 0:
                with torch.no_grad():
                    fake = generator(draw_latents())
                h_real, h_fake = (gather(h) for h in critic(torch.cat((draw_real(), fake))).chunk(2))
                if args.repulsive:
                    loss_c = distance("repulsive", h_real, h_fake)
                else:
                    loss_c = -distance(args.loss, h_real, h_fake)
                optimizer_c.param_groups[0]["lr"] = rate * args.lr_critic
                optimizer_c.zero_grad()
                loss_c.backward()
                optimizer_c.step()

            # The generator minimises  S(x, y),  or the minibatch energy distance.
            with torch.no_grad():
                h_real = gather(critic(draw_real()))
            loss_g = distance(args.loss, h_real, gather(critic(generator(draw_latents()))))
            optimizer_g.param_groups[0]["lr"] = rate * args.lr_generator
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            optimizer_g.step()
            averaged.update_parameters(generator)

            stop = torch.tensor(len(signals))
            if world_size > 1:
                dist.all_reduce(stop)
            last = bool(stop) or step == args.num_steps
            due = last or step % args.log_every == 0 or step % args.eval_every == 0
            if due and not all(p.isfinite().all() for p in (loss_g, *averaged.parameters())):
                raise UserError(f"loss or weights are not finite at step {step}: lower the learning rate")
            if due and rank == 0:
                elapsed = time.perf_counter() - clock
                seconds += elapsed
                row = {"step": step, "steps_per_second": (step - logged) / elapsed, "loss_g": loss_g.item()}
                if loss_c is not None:
                    row["loss_c"] = loss_c.item()
                if step % args.eval_every == 0 or step == args.num_steps:
                    metrics = evaluate()
                    row |= metrics
                rows.append(row)
                lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
                replace_file(folder / "metrics.jsonl", partial(Path.write_text, data=lines))
                if wandb_run:
                    wandb_run.log(row, step=step)
                checkpoint = {name: part.state_dict() for name, part in parts.items()}
                checkpoint |= {"script": SCRIPT, "args": vars(args)}
                checkpoint["progress"] = step, seconds, run_id, rows
                checkpoint |= {"rng": torch.get_rng_state(), "rng_cuda": torch.cuda.get_rng_state_all()}
                replace_file(folder / "checkpoint.pt", partial(torch.save, checkpoint))
                logged, clock = step, time.perf_counter()
            if last:
                break

        if rank > 0:
            return folder
        save_curves(folder / "curves.png", rows)
        if step < args.num_steps:
            command = shlex.join(["python", f"{SCRIPT}.py", f"--resume={folder}"])
            tqdm.write(f"stopped after step {step}; go on with: {command}")
            raise SystemExit(128 + signals[0] if signals else 1)
        metrics = evaluate() if metrics is None else metrics  # None: the run was done already
        results = metrics | {"real": measure(data), "steps": step, "seconds": seconds, "device": args.device}
        results |= {"torch": torch.__version__, "args": vars(args)}
        replace_file(folder / "results.json", partial(Path.write_text, data=json.dumps(results, indent=2)))
        print(folder)
        return folder


def parse_args(argv: list[str] | None = None) -> Args:
    """Return the command line's options, over those of the resumed run or the data set's preset."""
    typed = tyro.cli(Args, args=argv)
    chosen = {name: value for name, value in vars(typed).items() if value in PRESETS}
    default = Args(resume=typed.resume) if typed.resume else Args(**chosen)
    return tyro.cli(Args, args=argv, default=default)


if __name__ == "__main__":
    try:
        train(parse_args())
    except UserError as error:
        print(f"{SCRIPT}.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
