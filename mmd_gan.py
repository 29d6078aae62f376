# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch", "torchvision", "tyro", "pydantic", "wandb", "numpy", "tqdm", "matplotlib", "scikit-learn",
# ]
# ///
"""MMD-GAN: a generator that matches the data in the eyes of a kernel, and a critic that sharpens the kernel.

The critic maps samples to features. The generator minimises the squared maximum mean discrepancy of real and
fake features, MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), x real and y fake; the critic spreads the real
features out, or widens the discrepancy.
    Gretton et al. 2012          A Kernel Two-Sample Test: MMD and its estimators    JMLR 13
    Li et al. 2015 and 2017      moment matching networks and MMD-GAN                1502.02761, 1705.08584
    Binkowski et al. 2018        Demystifying MMD GANs: rational quadratic kernel    1801.01401
    Wang et al. 2019             the repulsive loss                                  1812.09916

    python mmd_gan.py --track                              # MNIST, logged to Weights & Biases
    python mmd_gan.py --dataset digits                     # no download
    python mmd_gan.py --resume runs/<run> --generate 1000  # draw samples
    torchrun --nproc-per-node 2 mmd_gan.py                 # share every batch among processes or GPUs

The default run takes 19 minutes on one shared CPU core: fid 2.1, 2.4 times that of real images, precision
0.72 and recall 0.86 (means of 3 seeds; results/mmd_gan.md has the rest).
"""

import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

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

SCRIPT = "mmd_gan"
TOY = {"batch_size": 256, "latent_dim": 2, "encoder": "none", "kernel": "gaussian"}
# Without an encoder the kernel sees the data: widths from that of a mode to that of the whole
RING = {"num_steps": 20_000, "eval_every": 4000, "bandwidths": tuple(0.01 * 2**i for i in range(8))}
GRID = {"num_steps": 45_000, "eval_every": 9000, "bandwidths": tuple(0.05 * 2**i for i in range(7))}
DIGITS = {"num_steps": 1500, "eval_every": 500}
PRESETS = {"digits": DIGITS, "ring": TOY | RING, "grid": TOY | GRID}


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
    eval_every: int = Field(2400, gt=0)  # steps between evaluations, each with a picture
    num_eval_samples: int = Field(10_000, ge=0)  # samples per evaluation; 0 skips it for images
    num_steps: int = Field(12_000, gt=0)  # updates of the generator
    batch_size: int = Field(64, ge=2)  # samples in a batch
    latent_dim: int = Field(32, gt=0)  # size of the generator's Gaussian input
    # none: no critic, the kernel acts on the data itself, as in a moment matching network
    encoder: Literal["learned", "none"] = "learned"
    # a mixture of rational quadratics, whose slope never vanishes, or of Gaussians
    kernel: Literal["rational_quadratic", "gaussian"] = "rational_quadratic"
    # exponents of rational quadratics, widths of Gaussians
    bandwidths: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0, 2.0, 4.0), min_length=1)
    loss: Literal["repulsive", "attractive"] = "repulsive"  # of the critic: k_xx - k_yy, or -MMD^2
    lr_generator: float = Field(3e-3, gt=0)  # learning rate, which falls to zero in the last part of the run
    lr_critic: float = Field(2e-3, gt=0)  # likewise

    def __init__(self, **options):
        for name, value in options.items():
            if isinstance(value, str | os.PathLike):
                options[name] = os.path.expanduser(value)
        # The command line gives every option, of a resumed run those of the run that were not typed.
        if options.get("resume") and len(options) < len(Args.model_fields):
            saved = load_checkpoint(options["resume"])["args"]
            del saved["device"]  # another machine may go on
            options = saved | options
        options = PRESETS.get(str(options.get("dataset")), {}) | options
        try:
            super().__init__(**options)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise UserError("; ".join(wrong)) from None
        if self.generate and not self.resume:
            raise UserError("--generate needs --resume, the folder of the run that draws the samples")


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
TILE = 512  # points a side: a tile of float32 pairs is 1 MB, which a core's cache holds for all bandwidths
TINY = -96.0  # the least exponent of 2: numbers below 2^-126 would take a CPU 10 to 100 times as long
Mixture = float | Sequence[float] | Tensor


def kernel_means(
    x: Tensor, y: Tensor, bandwidths: Mixture, kernel="gaussian", unbiased=True, weights: Mixture = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means that every MMD loss is made of: k_xx, k_yy and k_xy, scalars with gradients.

    Args:
        x, y: points (n, d) and (m, d), both float32 or both float64, on one device.
        bandwidths: the mixture, (s,) positive numbers or one; a tensor (a learned kernel) has gradients
            and is not checked.
        kernel: "gaussian", sum_s w_s exp(-|a - b|^2 / 2 s^2), or "rational_quadratic", sum_s w_s
            (1 + |a - b|^2 / 2 s)^-s (Binkowski et al. 2018, section 2.1).
        unbiased: omit the pairs of a point with itself (Gretton et al. 2012, eq. 3), or not (eq. 5).
        weights: (s,) weights w of the mixture, 1 by default; a tensor has gradients.

    Raises ValueError for other shapes, dtypes, devices, kernels or bandwidths, and for fewer than two points
    in an unbiased mean. Of points that are not finite the means are NaN.
    """
    one = isinstance(bandwidths, int | float) or getattr(bandwidths, "ndim", 1) == 0
    bandwidths = (bandwidths,) if one else bandwidths
    weights = weights if len(weights) else (1.0,) * len(bandwidths)
    n, m = len(x), len(y)
    shapes = x.dim() == y.dim() == 2 and x.shape[1] == y.shape[1]
    if not (shapes and x.dtype == y.dtype in (torch.float32, torch.float64) and x.device == y.device):
        found = " and ".join(f"{tuple(v.shape)} {v.dtype} on {v.device}" for v in (x, y))
        raise ValueError(f"x and y must be (n, d) and (m, d), both float32 or both float64, not {found}")
    if kernel not in ("gaussian", "rational_quadratic"):
        raise ValueError(f"kernel must be gaussian or rational_quadratic, not {kernel!r}")
    positive = isinstance(bandwidths, Tensor) or all(0 < s < math.inf for s in bandwidths)
    if not positive or not 0 < len(bandwidths) == len(weights):
        raise ValueError(f"bandwidths must be positive, one for each weight, not {bandwidths}, {weights}")
    if min(n, m) < 1 + unbiased:
        raise ValueError(f"{n} and {m} points are too few")
    learned = any(isinstance(v, Tensor) for v in (*bandwidths, *weights))
    pair_sums = dense_sums if learned or torch.compiler.is_compiling() else PairSums.apply
    with torch.autocast(x.device.type, enabled=False):
        z = torch.cat((x, y))
        z = z - z.detach().mean(0)  # far from the origin digits would be lost
        sums = pair_sums(z, n, kernel, tuple(zip(bandwidths, weights)))
        own = 0.0 if unbiased else sum(weights)  # k(z_i, z_i)
        k_xx = (sums[0, 0] + n * own) / (n * (n - unbiased))
        k_yy = (sums[1, 1] + m * own) / (m * (m - unbiased))
        k_xy = sums[0, 1] / (n * m)
    return k_xx.to(x.dtype), k_yy.to(x.dtype), k_xy.to(x.dtype)


def mmd2(x: Tensor, y: Tensor, bandwidths: Mixture, **options) -> Tensor:
    """Return the squared maximum mean discrepancy k_xx + k_yy - 2 k_xy of x (n, d) and y (m, d): a scalar.

    Gretton et al. 2012, Lemma 6. Arguments and errors are those of kernel_means; ValueError, too, for points
    that are not finite (on CUDA, where a look would wait, and in a compiled function the value is NaN).
    """
    k_xx, k_yy, k_xy = kernel_means(x, y, bandwidths, **options)
    value = k_xx + k_yy - 2 * k_xy
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and value.isnan():
        raise ValueError("x or y is not finite")
    return value


def dense_sums(z: Tensor, n: int, kernel: str, mixture) -> Tensor:
    """Return the sums (2, 2) of torch_sums by the whole matrix of k, with derivatives of every order."""
    norms = z.square().sum(1)
    t = norms[:, None] + norms - 2 * z @ z.T
    t = t + (t.clamp(min=0) - t).detach()  # clamps the value alone
    k = torch.zeros_like(t)
    for s, weight in mixture:
        exponent = -t / (2 * s * s) if kernel == "gaussian" else -s * (1 + t / (2 * s)).log()
        k = k + weight * exponent.clamp(min=TINY * math.log(2)).exp()
    k = k.tril(-1)  # each pair once, and no point with itself
    k_xx, k_yy, k_xy = 2 * k[:n, :n].sum(), 2 * k[n:, n:].sum(), k[n:, :n].sum()
    return torch.stack((k_xx, k_xy, k_xy, k_yy)).view(2, 2)


class PairSums(torch.autograd.Function):
    """The sums (2, 2) of torch_sums, in one pass over the pairs that makes the gradients too."""

    @staticmethod
    def forward(ctx, z, n, kernel, mixture):
        on_gpu = z.is_cuda and z.dtype == torch.float32 and find_spec("triton")
        sums, grads = (triton_sums if on_gpu else torch_sums)(z, n, kernel, mixture)
        ctx.options = n, kernel, mixture
        ctx.save_for_backward(z, grads)
        return sums

    @staticmethod
    def backward(ctx, g):
        z, grads = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: someone wants second derivatives
            with torch.autocast(z.device.type, enabled=False):
                _, vjp = torch.func.vjp(lambda z: dense_sums(z, *ctx.options), z)
                return *vjp(g.to(z.dtype)), None, None, None
        side = (torch.arange(len(z), device=z.device) >= ctx.options[0]).long()  # 0 in x, 1 in y
        factors = (g + g.T).to(z.dtype)[:, side]  # (2, n + m)
        return (factors[..., None] * grads).sum(0), None, None, None


def torch_sums(z: Tensor, n: int, kernel: str, mixture) -> tuple[Tensor, Tensor]:
    """Return sums of k and their gradients over pairs of z = (x, y), (n + m, d), x its first n points.

    sums[s, t] (2, 2) is that of k(z_i, z_j) with i on side s, 0 in x and 1 in y, and j on side t; grads[t, i]
    (2, n + m, d) that of W_ij (z_j - z_i), the gradient of k in z_i for W = -2 dk/d|z_i - z_j|^2. A point has
    no pair with itself: in float32 W_ii z_i - W_ii z_i is not zero.
    """
    blocks = [slice(i, min(i + TILE, n)) for i in range(0, n, TILE)]
    blocks += [slice(i, min(i + TILE, len(z))) for i in range(n, len(z), TILE)]
    norms = z.square().sum(1)
    sums = z.new_zeros(2, 2, dtype=torch.float32 if z.is_mps else torch.float64)
    grads = z.new_zeros(2, *z.shape)
    width = min(TILE, max(n, len(z) - n))  # of a tile at most; deterministic torch fills what is empty
    buffers = z.new_empty(3, width * width)
    for i, rows in enumerate(blocks):
        for cols in blocks[i:]:  # a tile below the diagonal is the transpose of one above
            side, other = int(rows.start >= n), int(cols.start >= n)
            a, b = z[rows], z[cols]
            t, p, w = buffers[:, : len(a) * len(b)].unflatten(1, (len(a), len(b)))
            torch.addmm(norms[cols], a, b.T, alpha=-2, out=t).add_(norms[rows, None]).clamp_(min=0)
            if rows is cols:
                t.fill_diagonal_(math.inf)
            k = tile_sum(t, p, w, kernel, mixture)
            sums[side, other] += k
            grads[other, rows].addmm_(w, b).addcmul_(w.sum(1, keepdim=True), a, value=-1)
            if rows is not cols:
                sums[other, side] += k
                grads[side, cols].addmm_(w.T, a).addcmul_(w.sum(0)[:, None], b, value=-1)
    return sums, grads


def tile_sum(t: Tensor, p: Tensor, w: Tensor, kernel: str, mixture) -> float:
    """Return the sum of k over squared distances t (r, c), and put W in w; p is a buffer."""
    total = 0.0
    wider = None
    w.zero_()
    for s, weight in sorted(mixture, reverse=True):
        if kernel == "rational_quadratic":
            base = torch.add(1, t, alpha=1 / (2 * s))
            torch.log2(base, out=p).mul_(-s).clamp_(min=TINY).exp2_()
            w.addcdiv_(p, base, value=weight)
        else:
            if wider == 2 * s:  # exp(-t / 2 s^2) is the fourth power of the one before
                p.clamp_(min=2 ** (TINY / 4)).square_().square_()
            else:
                torch.mul(t, -0.5 / (s * s * math.log(2)), out=p).clamp_(min=TINY).exp2_()
            w.add_(p, alpha=weight / (s * s))
            wider = s
        total += weight * p.sum().item()
    return total


def triton_sums(z: Tensor, n: int, kernel: str, mixture) -> tuple[Tensor, Tensor]:
    """Return what torch_sums does, by one Triton kernel."""
    size, d = z.shape
    sums = z.new_empty(2, size)  # of a row's k over x, over y
    grads = z.new_empty(2, size, d)
    out = min(64, max(16, 2 ** (d - 1).bit_length()))
    grid = (-(-size // 32), 2, -(-d // out))
    with torch.cuda.device_of(z):  # Triton launches on the current device
        options = {"num_warps": 8, "num_stages": 2}  # all stays in registers (tests/test_triton.py)
        sizes = n, size, d, kernel == "gaussian", mixture, 32, 32, out
        mmd_kernel()[grid](z, sums, grads, *sizes, **options)
    return torch.stack((sums[:, :n].sum(1), sums[:, n:].sum(1))), grads


@cache
def mmd_kernel():
    """Return the Triton kernel of triton_sums, made at its first use: nothing else needs Triton."""
    global tl  # where a kernel looks names up
    import triton
    import triton.language as tl

    # A program takes BLOCK rows of z, goes along all columns of one side, x or y, and makes the sums over j
    # sums[side, i] = sum k(z_i, z_j)  and  OUT_D coordinates of  grads[side, i] = sum W_ij (z_j - z_i)
    @triton.jit
    def pair_kernel(
        z, sums, grads, n, size, D: tl.constexpr, GAUSSIAN: tl.constexpr, MIX: tl.constexpr,
        BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, OUT_D: tl.constexpr,
    ):  # fmt: skip
        side = tl.program_id(1)
        rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        out = tl.program_id(2) * OUT_D + tl.arange(0, OUT_D)[None, :]
        end = tl.where(side == 0, n, size)
        k_sum = tl.zeros((BLOCK,), tl.float32)
        w_sum = tl.zeros((BLOCK,), tl.float32)
        pull = tl.zeros((BLOCK, OUT_D), tl.float32)
        for col in range(side * n, end, BLOCK):
            cols = col + tl.arange(0, BLOCK).to(tl.int64)
            # Squared distances t (BLOCK, BLOCK), from BLOCK_D coordinates at a time
            dot = tl.zeros((BLOCK, BLOCK), tl.float32)
            a2 = tl.zeros((BLOCK,), tl.float32)
            b2 = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, D, BLOCK_D):
                at = first + tl.arange(0, BLOCK_D)[None, :]
                a = tl.load(z + rows[:, None] * D + at, (rows < size)[:, None] & (at < D), 0.0)
                b = tl.load(z + cols[:, None] * D + at, (cols < end)[:, None] & (at < D), 0.0)
                dot = tl.dot(a, tl.trans(b), dot, input_precision="tf32x3")
                a2 += tl.sum(a * a, 1)
                b2 += tl.sum(b * b, 1)
            t = tl.maximum(a2[:, None] + b2[None, :] - 2 * dot, 0.0, tl.PropagateNan.ALL)
            # The kernel k and its slope W, of pairs that are there and not of a point with itself
            k = tl.zeros_like(t)
            w = tl.zeros_like(t)
            for part in tl.static_range(len(MIX)):
                s = MIX[part][0]
                if GAUSSIAN:
                    value = MIX[part][1] * tl.exp(-t / (2 * s * s))
                    w += value / (s * s)
                else:
                    base = 1 + t / (2 * s)
                    value = MIX[part][1] * tl.exp2(-s * tl.log2(base))
                    w += value / base
                k += value
            pair = (rows < size)[:, None] & (cols < end)[None, :] & (rows[:, None] != cols[None, :])
            w = tl.where(pair, w, 0.0)
            k_sum += tl.sum(tl.where(pair, k, 0.0), 1)
            w_sum += tl.sum(w, 1)
            b = tl.load(z + cols[:, None] * D + out, (cols < end)[:, None] & (out < D), 0.0)
            pull = tl.dot(w, b, pull, input_precision="tf32x3")
        inside = (rows < size)[:, None] & (out < D)
        a = tl.load(z + rows[:, None] * D + out, inside, 0.0)
        place = side.to(tl.int64) * size + rows
        tl.store(grads + place[:, None] * D + out, pull - w_sum[:, None] * a, inside)
        tl.store(sums + place, k_sum, (rows < size) & (tl.program_id(2) == 0))

    return pair_kernel


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
        # torchrun starts several processes: each has a part of every batch, and the first one writes
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        batch_size = args.batch_size // world_size
        if args.batch_size % world_size:
            raise UserError(f"batch_size must be a multiple of the {world_size} processes")
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
        critic = nn.Flatten()
        if args.encoder == "learned":
            critic = make_encoder(toy)
            # Spectral norm bounds features' distances by those of images: too close for the kernel to tell
            critic[-1].register_forward_hook(lambda layer, inputs, output: 4 * output)
        generator.to(device)
        critic.to(device)
        for p in (*generator.parameters(), *critic.parameters()) if world_size > 1 else ():
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))  # the sum over processes
        decay = min(0.999, 1 - 10 / max(10, args.num_steps))  # a short run averages over fewer steps
        averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        optimizer_g = torch.optim.Adam(generator.parameters(), betas=(0.5, 0.999), fused=True)
        parts = {"generator": generator, "averaged": averaged, "optimizer_g": optimizer_g}
        if args.encoder == "learned":
            optimizer_c = torch.optim.Adam(critic.parameters(), betas=(0.5, 0.999), fused=True)
            parts |= {"critic": critic, "optimizer_c": optimizer_c}

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
        if args.track and rank == 0:
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
            rate = min(1.0, (args.num_steps - step + 1) / ((0.4 if toy else 0.7) * args.num_steps))

            # The critic minimises  k_xx - k_yy,  or  -MMD^2 = 2 k_xy - k_xx - k_yy.
            if args.encoder == "learned":
                real = to_float(data[torch.randint(len(data), (batch_size,), device=device)])
                with torch.no_grad():
                    fake = generator(torch.randn(batch_size, args.latent_dim, device=device))
                h_real, h_fake = (gather(h) for h in critic(torch.cat((real, fake))).chunk(2))
                k_xx, k_yy, k_xy = kernel_means(h_real, h_fake, args.bandwidths, args.kernel)
                loss_c = k_xx - k_yy if args.loss == "repulsive" else 2 * k_xy - k_xx - k_yy
                optimizer_c.param_groups[0]["lr"] = rate * args.lr_critic
                optimizer_c.zero_grad()
                loss_c.backward()
                optimizer_c.step()

            # The generator minimises  MMD^2 = k_xx + k_yy - 2 k_xy.
            real = to_float(data[torch.randint(len(data), (batch_size,), device=device)])
            with torch.no_grad():
                h_real = gather(critic(real))
            h_fake = gather(critic(generator(torch.randn(batch_size, args.latent_dim, device=device))))
            k_xx, k_yy, k_xy = kernel_means(h_real, h_fake, args.bandwidths, args.kernel)
            loss_g = k_xx + k_yy - 2 * k_xy
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
                row = {"step": step, "steps_per_second": (step - logged) / elapsed, "mmd2": loss_g.item()}
                row |= {"k_xx": k_xx.item(), "k_yy": k_yy.item(), "k_xy": k_xy.item()}
                if args.encoder == "learned":
                    row["loss_c"] = loss_c.item()
                if not 1e-3 < row["k_xy"] / len(args.bandwidths) < 1 - 1e-3:
                    tqdm.write(f"step {step}: the kernel is blind, all points are far apart or all the same")
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
