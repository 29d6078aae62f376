# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "torchvision>=0.21", "tyro>=1.0.17", "wandb>=0.30", "numpy>=1.26", "tqdm>=4.66",
#     "matplotlib>=3.8", "scikit-learn>=1.4",
# ]
# ///
"""CycleGAN between MNIST and USPS: handwriting of one collection in the manner of the other, without pairs.

Two generators translate, G from MNIST to USPS and F back; two discriminators judge patches of what they make.
An image that goes there and back must return, and one that is there already must stay. Nothing in that asks
for the digit to survive, and a pair of generators that swaps threes with eights is perfectly consistent: so
this script measures it, and starts the generators at the identity. Read it beside
    Zhu et al. 2017              CycleGAN: adversarial, cycle and identity loss      1703.10593
    Mao et al. 2017              the least-squares loss                              1611.04076
    Shrivastava et al. 2017      the buffer of earlier translations                  1612.07828
    Hoffman et al. 2018          CyCADA: semantic consistency                        1711.03213

Departures from CycleGAN, for images of 28 x 28: USPS's digits are scaled to 20 pixels and centred by mass, as
MNIST was made (--usps-size); 16 channels, in discriminators 32, instead of 64; one halving instead of two,
two residual blocks instead of nine, transposed convolutions of kernel 4 instead of 3, instance normalisation
without scale and shift, patches of 22 pixels instead of 70, batches of 16 instead of 1 and higher learning
rates for a shorter run; generators add to their input, in the logits of the pixels, and begin with adding
nothing; what is kept of them is an average over the steps. With --semantic-consistency CyCADA's classifier of
the source stays as it is, and sees its images augmented.

    python cyclegan_mnist_usps.py                                # 1,000 steps, no label is used
    python cyclegan_mnist_usps.py --semantic-consistency mnist   # with the labels of MNIST; usps: of USPS
    python cyclegan_mnist_usps.py --resume runs/<run>            # goes on as if never stopped
    run=runs/<run>/checkpoint.pt
    python cyclegan_mnist_usps.py --generate 1000 --direction mnist2usps --checkpoint $run --out usps/
    python cyclegan_mnist_usps.py --input my-pngs/ --direction usps2mnist --checkpoint $run --out mnist/
"""

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
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

SCRIPT = "cyclegan_mnist_usps"
DIRECTIONS = ("mnist2usps", "usps2mnist")
BUFFER_SIZE = 50  # translations kept for the discriminators (Zhu et al. 2017, section 4)
# Images, and updates, of a classifier that is trained in one domain for the other.
TASK_IMAGES, TASK_STEPS = 20_000, 600


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

    dataset: Literal["mnist-usps"] = "mnist-usps"
    """the two domains"""
    data_dir: str = "data"
    """folder of MNIST in torchvision's layout and of usps.bz2 and usps.t.bz2; missing files are downloaded"""
    eval_split: Literal["test", "validation"] = "test"
    """what translations are measured on; validation takes the last sixth of both training sets out for it"""
    usps_size: int = 20
    """side to which USPS's 16 x 16 pixels are scaled, in a black frame up to 28; MNIST's digits have 20"""

    num_steps: int = 1000
    """updates of the generators"""
    batch_size: int = 16
    """images of each domain in a batch"""
    channels: int = 16
    """channels of the networks' first layers"""
    num_blocks: int = 2
    """residual blocks of a generator"""
    identity_start: bool = True
    """let the generators add to their input, and begin with nothing; else they make all of their output"""
    cycle_weight: float = 10.0
    """factor lambda of the cycle loss"""
    identity_weight: float = 5.0
    """factor of the identity loss"""
    semantic_consistency: Literal["none", "mnist", "usps"] = "none"
    """let a classifier that knows the labels of this domain alone find the same digit in every translation"""
    semantic_weight: float = 1.0
    """factor of the semantic loss"""
    spectral_norm: bool = False
    """divide each of the discriminators' weight matrices by its spectral norm"""
    augment: bool = False
    """turn, scale and shift the training images at random"""
    lr_generator: float = 1e-3
    """Adam's learning rate for the generators"""
    lr_discriminator: float = 1e-3
    """Adam's learning rate for the discriminators"""
    beta1: float = 0.5
    """Adam's decay of the first moment"""
    lr_decay: float = 0.5
    """last share of the run, over which the learning rates fall to zero"""
    ema_decay: float = 0.99
    """decay per step of the averaged generators, which translate"""

    num_eval_samples: int = 10_000
    """test images of each domain that are translated for an evaluation; 0 switches evaluation off"""
    eval_every: int | None = None
    """steps between evaluations, pictures and checkpoints (default: half of the run)"""
    log_every: int = 50
    """steps between lines of metrics.jsonl"""
    run_dir: str = "runs"
    """folder in which run folders are made"""
    resume: str | None = None
    """run folder to go on with"""
    direction: Literal["mnist2usps", "usps2mnist"] = "mnist2usps"
    """which way --generate and --input translate"""
    generate: int = 0
    """translate this many test images of the source by --checkpoint into the new folder --out"""
    input: str | None = None
    """folder of PNG files to translate instead: 28 x 28, or for usps2mnist also 16 x 16, white on black"""
    checkpoint: str | None = None
    """a run's checkpoint.pt, for --generate and --input"""
    out: str | None = None
    """folder for --generate and --input"""

    def __post_init__(self) -> None:
        if self.resume is None:  # else what was not given is taken from the run
            self.eval_every = math.ceil(self.num_steps / 2) if self.eval_every is None else self.eval_every
        for names, wanted, fits in (
            ("num_steps batch_size channels num_blocks eval_every log_every", "positive", lambda v: v >= 1),
            ("lr_generator lr_discriminator", "positive", lambda v: 0 < v < math.inf),
            ("cycle_weight identity_weight semantic_weight", "in [0, inf)", lambda v: 0 <= v < math.inf),
            ("generate", "in [0, inf)", lambda v: v >= 0),
            ("num_eval_samples", "0 or at least 10", lambda v: v == 0 or 10 <= v < math.inf),
            ("ema_decay lr_decay", "in [0, 1]", lambda v: 0 <= v <= 1),
            ("beta1", "in [0, 1)", lambda v: 0 <= v < 1),
            ("usps_size", "in [8, 28]", lambda v: 8 <= v <= 28),
            ("seed", "in [0, 2^32)", lambda v: 0 <= v < 2**32),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {wanted}, not {value}")
        translating = bool(self.generate) + bool(self.input)
        if translating > 1 or not translating == bool(self.checkpoint) == bool(self.out):
            raise ValueError("--checkpoint and --out go together with --generate or with --input")
        if not translating and self.direction != Args.direction:
            raise ValueError("--direction is of translations: give --generate or --input as well")
        weighted = self.semantic_weight != Args.semantic_weight
        if weighted and self.semantic_consistency == "none" and self.resume is None:
            raise ValueError("--semantic-weight is for --semantic-consistency: give that as well")


def fail(message: str) -> NoReturn:
    """Say in one line what is wrong and what to do about it, and leave with exit code 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------
# Data


def load_domain(
    domain: str, data_dir: str, eval_split: str, usps_size: int, run_dir: str | None = None
) -> list[Tensor]:
    """Training and evaluation images (n, 28, 28) uint8 and labels (n,) int64: x, y, x_eval, y_eval.

    "mnist" and "usps" are read in torchvision's layout, and downloaded if they are not there; USPS is scaled
    and framed by frame_usps. With eval_split "validation" the last sixth of the training images is the
    evaluation part, and the test images are not touched. USPS is 18 MB of text that take seconds to unpack
    and read: its images are kept in run_dir, if that is given, under the hash of their files.
    """
    files = [Path(data_dir) / name for name in ("usps.bz2", "usps.t.bz2")]
    try:
        if domain == "usps" and run_dir and all(file.is_file() for file in files):
            packed = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
            kept = Path(run_dir) / f"usps__{packed[:12]}.pt"
            x, y, x_eval, y_eval = remembered(kept, partial(read_domain, domain, data_dir))
        else:
            x, y, x_eval, y_eval = read_domain(domain, data_dir)
    except Exception as error:
        folder = Path(data_dir) / "MNIST" / "raw" if domain == "mnist" else data_dir
        where = f"{domain} is missing or damaged in {folder} ({error!r:.200})"
        fail(f"{where}; delete damaged files there to download it again, or name another --data-dir")
    if eval_split == "validation":
        n = len(x) * 5 // 6
        x, y, x_eval, y_eval = x[:n], y[:n], x[n:], y[n:]
    if domain == "usps":
        x, x_eval = frame_usps(x, usps_size), frame_usps(x_eval, usps_size)
    return [x, y, x_eval, y_eval]


def read_domain(domain: str, data_dir: str) -> list[Tensor]:
    """torchvision's images and labels for training, and those of the test set."""
    from torchvision import datasets

    make = datasets.MNIST if domain == "mnist" else datasets.USPS
    sets = [make(data_dir, train, download=True) for train in (True, False)]
    parts = [torch.as_tensor(v) for s in sets for v in (s.data, s.targets)]
    for images, labels in (parts[:2], parts[2:]):
        side = 28 if domain == "mnist" else 16
        fits = images.shape == (len(labels), side, side) and len(labels)
        if not fits or labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    return parts


def remembered(path: Path, read: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What read() returns, from the file that an earlier run has left if it is there and whole."""
    try:
        return torch.load(path, weights_only=True)["parts"]
    except Exception:  # not there yet, or damaged
        parts = read()
    with contextlib.suppress(OSError):  # else it is read again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, partial(torch.save, {"parts": parts}))
    return parts


def frame_usps(images: Tensor, size: int) -> Tensor:
    """Images (n, 16, 16) uint8 the way MNIST was made: scaled to size x size, and put into black ones
    (n, 28, 28) with the centre of mass at the middle, pixel (14, 14), as far as they stay within."""
    scaled = F.interpolate(images.unsqueeze(1).float(), size=size, mode="bilinear", antialias=True).squeeze(1)
    scaled, room, places = scaled.round().clamp(0, 255), 28 - size, torch.arange(size)
    mass = scaled.sum((1, 2)).clamp(min=1)
    wide = F.pad(scaled, [room] * 4)
    for dim in (1, 2):
        centre = (scaled.sum(3 - dim) * places).sum(1) / mass
        first = room - (14 - centre).round().clamp(0, room).long()  # a window's first row, or column, of wide
        index = (first[:, None] + torch.arange(28)).unsqueeze(3 - dim)
        wide = torch.take_along_dim(wide, index, dim)
    return wide.to(torch.uint8)


def load_domains(args: Args, device: torch.device) -> dict[str, list[Tensor]]:
    """x, y, x_eval, y_eval of both domains, images (n, 28, 28) uint8, on the device."""
    where = args.data_dir, args.eval_split, args.usps_size, args.run_dir
    return {name: [v.to(device) for v in load_domain(name, *where)] for name in ("mnist", "usps")}


def read_pngs(folder: Path, usps: bool, size: int) -> tuple[list[str], Tensor]:
    """Names and images (n, 28, 28) uint8 of a folder's PNG files; those of USPS may have 16 x 16 pixels."""
    names = sorted(p.name for p in folder.glob("*.[pP][nN][gG]")) if folder.is_dir() else []
    images = []
    if not names:
        fail(f"--input {folder} is no folder with PNG files in it")
    for name in names:
        try:
            picture = Image.open(folder / name)
            if picture.mode[0] in "IF":  # Pillow would clip them, mostly to white
                fail(f"{folder / name} has more than 8 bits per pixel; convert it first")
            image = torch.from_numpy(np.array(picture.convert("L")))
        except Exception as error:
            fail(f"{folder / name} is no picture ({error!s:.100}); take it away")
        image = frame_usps(image[None], size)[0] if usps and image.shape == (16, 16) else image
        if image.shape != (28, 28):
            sizes = "16 x 16 or 28 x 28" if usps else "28 x 28"
            fail(
                f"{folder / name} has {image.shape[1]} x {image.shape[0]} pixels, not {sizes}; scale it first"
            )
        images.append(image)
    return names, torch.stack(images)


def to_float(images: Tensor) -> Tensor:
    """uint8 images (n, 28, 28) as floats (n, 1, 28, 28) in [-1, 1]."""
    return images.unsqueeze(1).float() / 127.5 - 1


def draw_batch(data: Tensor, batch_size: int) -> Tensor:
    """A batch drawn with replacement: images (b, 1, 28, 28) in [-1, 1], or points (b, 2)."""
    batch = data[torch.randint(len(data), (batch_size,), device=data.device)]
    return to_float(batch) if batch.dtype == torch.uint8 else batch


def augment(images: Tensor) -> Tensor:
    """Images (n, 1, 28, 28) in [-1, 1], each turned, sheared, scaled and shifted at random, its border black.

    Differentiable in the images, so that generated ones can go the same way as real ones. On CUDA gradients
    are sums in no fixed order: there a run repeats itself, or resumes, up to rounding.
    """
    # Up to 7.5 degrees, a shear of 0.1, a scale in [0.93, 1.07] and a shift of 1.5 of the 28 pixels.
    ranges = math.pi / 24, 0.1, 0.07, 0.07, 1.5 / 14, 1.5 / 14
    draws = (2 * torch.rand(len(images), 6, device=images.device) - 1).to(images.dtype).unbind(1)
    angle, shear, wide, high, right, down = (draw * limit for draw, limit in zip(draws, ranges))
    wide, high, cos, sin = wide.exp(), high.exp(), angle.cos(), angle.sin()
    rows = (wide * cos, wide * (shear * cos - sin), right), (high * sin, high * (shear * sin + cos), down)
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)  # (n, 2, 3), output to input places
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


class ImageBuffer(nn.Module):
    """Earlier translations, which the discriminators see again (Shrivastava et al. 2017, section 2.3).

    A module, so that a checkpoint holds its images (size, 1, 28, 28) and how many there are.
    """

    def __init__(self, size: int):
        super().__init__()
        self.count = 0
        self.register_buffer("images", torch.zeros(size, 1, 28, 28))

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.count)

    def set_extra_state(self, state: Tensor) -> None:
        self.count = int(state)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (b, 1, 28, 28), each of them, with a chance of a half, exchanged for an earlier one, which
        leaves the buffer; until that is full it takes all images, and hands them on as they are."""
        images, size = images.detach(), len(self.images)
        first, rest = images.split((n := min(size - self.count, len(images)), len(images) - n))
        self.images[self.count : self.count + n] = first
        self.count += n
        rest, beyond = rest[:size], rest[size:]
        places = torch.randperm(size, device=images.device)[: len(rest)]
        swap = torch.rand(len(rest), 1, 1, 1, device=images.device) < 0.5
        old = self.images[places]
        self.images[places] = torch.where(swap, rest, old)
        return torch.cat((first, torch.where(swap, old, rest), beyond))


# ---------------------------------------------------------------------------------------------------------
# Networks


class Generator(nn.Module):
    """Images (b, 1, 28, 28) in [-1, 1] to images of the other domain; the identity, but for 3%, at first.

    What the network makes is added to the input's logits: y = tanh(atanh(0.97 x) + net(x)), and the last
    layer of net starts at zero; without identity_start y = tanh(net(x)), as in the paper. Layers are in
    CycleGAN's order: 7 x 7, halving, residual blocks, doubling, 7 x 7.
    """

    def __init__(self, channels: int, num_blocks: int, identity_start: bool = True):
        super().__init__()
        c, self.identity_start = channels, identity_start
        last = nn.Conv2d(c, 1, 7, padding=3, padding_mode="reflect")
        if identity_start:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.net = nn.Sequential(
            *(nn.Conv2d(1, c, 7, padding=3, padding_mode="reflect"), InstanceNorm(), nn.ReLU()),
            *(nn.Conv2d(c, 2 * c, 3, 2, 1), InstanceNorm(), nn.ReLU()),  # (b, 2 c, 14, 14)
            *(ResidualBlock(2 * c) for _ in range(num_blocks)),
            *(nn.ConvTranspose2d(2 * c, c, 4, 2, 1), InstanceNorm(), nn.ReLU()),
            last,
        ).to(memory_format=torch.channels_last)  # three quarters of the time of a step on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Translations (b, 1, 28, 28) in [-1, 1] of images (b, 1, 28, 28)."""
        added = self.net(images)
        return torch.tanh(torch.atanh(0.97 * images) + added if self.identity_start else added)


class InstanceNorm(nn.Module):
    """Features (b, c, h, w) with mean 0 and variance 1 in every channel of every image, in channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        y = Standardize.apply(x.permute(0, 2, 3, 1).flatten(1, 2))
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Standardize(torch.autograd.Function):
    """x (b, n, c) with mean 0 and variance 1 over n, as (x - mean) / sqrt(var + 1e-5).

    Ulyanov et al. 2016, eq. 4. torch's own goes over to another memory format and back; here the sums over n
    are products with a row of ones. No second derivatives: autograd refuses them.
    """

    @staticmethod
    def forward(ctx, x):
        ones = x.new_full((1, 1, x.shape[1]), 1 / x.shape[1]).expand(len(x), -1, -1)
        y = x - ones @ x
        scale = (ones @ y.square()).add_(1e-5).rsqrt_()
        y *= scale
        ctx.save_for_backward(y, scale, ones)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, scale, ones = ctx.saved_tensors
        return (grad - ones @ grad).addcmul_(y, ones @ (grad * y), value=-1).mul_(scale)


class ResidualBlock(nn.Module):
    """Features (b, c, h, w) to themselves and two convolutions of them."""

    def __init__(self, channels: int):
        super().__init__()
        conv = partial(nn.Conv2d, channels, channels, 3, padding=1, padding_mode="reflect")
        self.body = nn.Sequential(conv(), InstanceNorm(), nn.ReLU(), conv(), InstanceNorm())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def make_discriminator(channels: int, spectral_norm: bool) -> nn.Sequential:
    """Images (b, 1, 28, 28) to a verdict on each of their patches of 22 x 22: (b, 1, 6, 6)."""
    sn = nn.utils.parametrizations.spectral_norm if spectral_norm else nn.Identity()
    c, act = 2 * channels, nn.LeakyReLU(0.2)
    return nn.Sequential(
        *(sn(nn.Conv2d(1, c, 4, 2, 1)), act),
        *(sn(nn.Conv2d(c, 2 * c, 4, 2, 1)), InstanceNorm(), act),
        *(sn(nn.Conv2d(2 * c, 2 * c, 3, 1, 1)), InstanceNorm(), act),
        sn(nn.Conv2d(2 * c, 1, 2, 1)),
    ).to(memory_format=torch.channels_last)


def make_generators(args: Args) -> nn.ModuleDict:
    """The two generators, by direction."""
    make = partial(Generator, args.channels, args.num_blocks, args.identity_start)
    return nn.ModuleDict({direction: make() for direction in DIRECTIONS})


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


def least_squares_loss(verdicts: Tensor, real: bool) -> Tensor:
    """Mean of (D - 1)^2 over verdicts D of any shape, or of D^2 if they should be 0: a scalar.

    Mao et al. 2017, eq. 2 with b = c = 1 and a = 0, as Zhu et al. 2017, section 4, take it. The discriminator
    minimises half of real + fake; the generator minimises that of its fakes as if they were real.
    """
    return (verdicts - 1).square().mean() if real else verdicts.square().mean()


def cycle_loss(there_and_back: Tensor, images: Tensor) -> Tensor:
    """Mean |F(G(x)) - x| of two tensors of one shape: a scalar (Zhu et al. 2017, eq. 2).

    Raises ValueError for two shapes.
    """
    if there_and_back.shape != images.shape:
        raise ValueError(f"two shapes: {tuple(there_and_back.shape)} and {tuple(images.shape)}")
    return (there_and_back - images).abs().mean()


def identity_loss(translated: Tensor, images: Tensor) -> Tensor:
    """Mean |G(y) - y| for images y that are in G's target domain already: a scalar (Zhu et al. 2017, section
    5.2). It keeps a generator from changing what needs no change. Raises ValueError for two shapes."""
    if translated.shape != images.shape:
        raise ValueError(f"two shapes: {tuple(translated.shape)} and {tuple(images.shape)}")
    return (translated - images).abs().mean()


def semantic_loss(logits: Tensor, logits_translated: Tensor) -> Tensor:
    """Cross-entropy of a translation's class logits (b, k) with the class found in the original: a scalar.

    Hoffman et al. 2018, eq. 4, for logits (b, k) of the originals, which get no gradient. Raises ValueError
    for two shapes.
    """
    if logits.shape != logits_translated.shape or logits.dim() != 2:
        raise ValueError(f"not (b, k) twice: {tuple(logits.shape)} and {tuple(logits_translated.shape)}")
    return F.cross_entropy(logits_translated, logits.detach().argmax(1))


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


def load_domain_judge(args, images: Tensor, labels: Tensor) -> tuple[nn.Sequential, str]:
    """load_judge of a domain's images (n, 28, 28): of USPS each one counts up to eight times, so that its
    judge is trained for about as many steps as that of MNIST."""
    times = max(1, min(8, 50_000 // len(images)))
    return load_judge(args, images.repeat(times, 1, 1), labels.repeat(times))


def accuracy(judge: nn.Sequential, images: Tensor, labels: Tensor) -> float:
    """Share of images (n, ...) whose class, by the judge, is that of labels (n,)."""
    return (judge_images(judge, images)[1].argmax(1) == labels).float().mean().item()


def train_classifier(images: Tensor, labels: Tensor, seed: int = 0, batch_size: int = 128) -> nn.Sequential:
    """A classifier of images, uint8 (n, 28, 28) or float (n, 1, 28, 28), and labels (n,), which sees them
    augmented twice over, so that it holds beyond its own domain; from that seed, leaves torch's alone."""
    with torch.random.fork_rng([images.device] * images.is_cuda):
        torch.manual_seed(seed)
        classifier = make_judge().to(images.device)
        optimizer = torch.optim.Adam(classifier.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, TASK_STEPS)
        for _ in range(TASK_STEPS):
            index = torch.randint(len(images), (batch_size,), device=images.device)
            batch = images[index]
            batch = to_float(batch) if batch.dtype == torch.uint8 else batch
            logits = classifier(augment(augment(batch)))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def translate(generator: nn.Module, images: Tensor) -> Tensor:
    """Translations (n, 1, 28, 28) of images, uint8 (n, 28, 28) or float (n, 1, 28, 28), by the thousand."""
    blocks = images.split(1000)
    return torch.cat([generator(to_float(b) if b.dtype == torch.uint8 else b) for b in blocks])


class TranslationMetrics:
    """Measures two generators on the held-out parts of two domains.

    `domains` are x, y, x_eval, y_eval of "mnist" and "usps", images (n, 28, 28) uint8. Each has a judge, for
    fid, precision and recall, and a classifier trained on its real images, augmented, for the labels. `facts`
    says of results.json how accurate both are on real images, which fid, precision and recall the training
    images have, and `source_only`, the accuracy of each classifier in the other domain: what adaptation has
    to surpass, and the other direction's preservation where nothing is translated.
    """

    def __init__(self, args, domains: dict[str, list[Tensor]]):
        self.args, self.count, self.domains = args, args.num_eval_samples, domains
        self.judges, self.classifiers = {}, {}

    @cached_property
    def facts(self) -> dict:
        """Make the judges and the classifiers, and measure them on real images, at the first use."""
        facts = {}
        for name, (x, y, x_eval, y_eval) in self.domains.items() if self.count else ():
            # A resumed run, or one with fewer evaluations, draws as this one.
            with torch.random.fork_rng([x.device] * x.is_cuda):
                judge, judge_hash = load_domain_judge(self.args, x, y)
            classifier, n = train_classifier(x, y), min(self.count, len(x_eval))
            self.judges[name], self.classifiers[name] = judge, classifier
            right = [accuracy(network, x_eval[:n], y_eval[:n]) for network in (judge, classifier)]
            facts |= {f"{name}_judge": judge_hash, f"{name}_judge_accuracy": right[0]}
            facts[f"{name}_classifier_accuracy"] = right[1]
            n = min(n, len(x))
            floor = image_metrics(judge, x[:n], x_eval[:n], y_eval)
            facts |= {f"{name}_floor_{key}": floor[key] for key in ("fid", "precision", "recall")}
        for direction in DIRECTIONS if self.count else ():
            source, target = direction.split("2")
            real = (v[: self.count] for v in self.domains[target][2:])
            facts[f"{direction}_source_only"] = accuracy(self.classifiers[source], *real)
        return facts

    def __call__(self, generators: dict[str, nn.Module]) -> dict:
        """For both directions: label_preservation, adaptation, fid, precision, recall and cycle_error.

        label_preservation: share of source images whose translation has their label in the eyes of the
        target's classifier. adaptation: accuracy on real target images of a classifier that was trained on
        translated source images and the source's labels. fid, precision and recall: translations against
        real target images, as many of each. cycle_error: mean |F(G(x)) - x|, of pixels in [-1, 1].
        """
        metrics = {}
        _ = self.facts  # makes the judges, once
        for direction in DIRECTIONS if self.count else ():
            source, target = direction.split("2")
            there, back = generators[direction], generators[f"{target}2{source}"]
            x, y, x_eval, y_eval = self.domains[source]
            real, y_real = (v[: self.count] for v in self.domains[target][2:])
            x_eval, y_eval = x_eval[: self.count], y_eval[: self.count]
            fake = translate(there, x_eval)
            found = {"label_preservation": accuracy(self.classifiers[target], fake, y_eval)}
            learner = train_classifier(translate(there, x[:TASK_IMAGES]), y[:TASK_IMAGES])
            found["adaptation"], n = accuracy(learner, real, y_real), min(len(fake), len(real))
            measured = image_metrics(self.judges[target], fake[:n], real[:n], y_real)
            found |= {key: measured[key] for key in ("fid", "precision", "recall")}
            found["cycle_error"] = cycle_loss(translate(back, fake), to_float(x_eval)).item()
            metrics |= {f"{direction}_{key}": value for key, value in found.items()}
        return metrics


def save_translations(path: Path, generators: dict[str, nn.Module], sources: dict[str, Tensor]) -> None:
    """A PNG of 20 columns and six rows: source, translated, reconstructed, for both directions in turn.

    sources are 20 images (20, 28, 28) uint8 of "mnist" and of "usps".
    """
    from torchvision.utils import save_image

    rows = []
    for direction in DIRECTIONS:
        source, target = direction.split("2")
        images = to_float(sources[source])
        there = translate(generators[direction], images)
        rows += [images, there, translate(generators[f"{target}2{source}"], there)]
    write_file(path, partial(save_image, (torch.cat(rows) + 1) / 2, format="png", nrow=20))


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
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    domains = load_domains(args, device)
    smallest = min(len(x) for x, *_ in domains.values())
    if args.batch_size > smallest:
        fail(f"--batch-size {args.batch_size} exceeds the {smallest} training images of the smaller domain")
    run = Run(args, checkpoint, device)
    metrics = TranslationMetrics(args, domains)
    torch.manual_seed(args.seed)

    generators = make_generators(args).to(device)
    averaged = average(generators, args.ema_decay)
    make = partial(make_discriminator, args.channels, args.spectral_norm)
    discriminators = nn.ModuleDict({name: make() for name in domains}).to(device)
    buffers = nn.ModuleDict({name: ImageBuffer(BUFFER_SIZE) for name in domains}).to(device)
    adam = partial(torch.optim.Adam, betas=(args.beta1, 0.999), fused=True)
    classifier = nn.Identity()
    if args.semantic_consistency != "none":
        x, y, *_ = domains[args.semantic_consistency]
        classifier = make_judge().eval().requires_grad_(False).to(device)
        if not checkpoint:  # another one than the metrics'
            classifier = train_classifier(x, y, seed=1 + args.seed)
    opt_generator = adam(generators.parameters(), args.lr_generator)
    opt_discriminator = adam(discriminators.parameters(), args.lr_discriminator)
    networks = {"generators": generators, "averaged": averaged, "discriminators": discriminators}
    networks |= {"buffers": buffers, "classifier": classifier}
    run.hold(**networks, opt_generator=opt_generator, opt_discriminator=opt_discriminator)

    def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        (group,) = optimizer.param_groups
        optimizer.zero_grad()
        loss.backward(inputs=group["params"])  # the generators' loss leaves the discriminators alone
        optimizer.step()

    def evaluate() -> dict:
        shown = {name: x_eval[:20] for name, (_, _, x_eval, _) in domains.items()}
        for name in (f"samples_{run.step:06d}.png", "samples.png"):
            save_translations(run.folder / name, averaged.module, shown)
        return metrics(averaged.module)

    g, f = (generators[direction] for direction in DIRECTIONS)

    def step(*stored: int) -> dict[str, Tensor]:
        x, y = (draw_batch(images, args.batch_size) for images, *_ in domains.values())
        x, y = (augment(v) if args.augment else v for v in (x, y))

        # The generators minimise  adversarial + lambda cycle + identity  (Zhu et al. 2017, eq. 3), in four
        # passes: what is translated and what should stay as it is go together, as nothing mixes images.
        fake_y, same_y = g(torch.cat((x, y))).chunk(2)
        fake_x, same_x = f(torch.cat((y, x))).chunk(2)
        verdicts = discriminators["usps"](fake_y), discriminators["mnist"](fake_x)
        scalars = {"adversarial": sum(least_squares_loss(v, real=True) for v in verdicts)}
        scalars["cycle"] = cycle_loss(f(fake_y), x) + cycle_loss(g(fake_x), y)
        scalars["identity"] = identity_loss(same_y, y) + identity_loss(same_x, x)
        loss = scalars["adversarial"] + args.cycle_weight * scalars["cycle"]
        loss = loss + args.identity_weight * scalars["identity"]
        if args.semantic_consistency != "none":
            with torch.no_grad():
                logits = classifier(torch.cat((x, y)))
            logits_translated = classifier(torch.cat((fake_y, fake_x)))
            scalars["semantic"] = semantic_loss(logits, logits_translated)
            loss = loss + args.semantic_weight * scalars["semantic"]
        update(opt_generator, loss)
        averaged.update_parameters(generators)

        # The discriminators tell real images from translations, of which some are from earlier steps.
        loss_discriminator = 0.0
        for name, real, fake in (("mnist", x, fake_x), ("usps", y, fake_y)):
            on_real, on_fake = discriminators[name](torch.cat((real, buffers[name](fake)))).chunk(2)
            halves = least_squares_loss(on_real, real=True) + least_squares_loss(on_fake, real=False)
            loss_discriminator = loss_discriminator + halves / 2
        update(opt_discriminator, loss_discriminator)
        return {"loss_generator": loss, "loss_discriminator": loss_discriminator} | scalars

    recorded = Recorded(step, device, args.compile, opt_generator, opt_discriminator)
    run.evaluate = evaluate
    for _ in run.steps():
        # Learning rates stay, and in the last part of the run fall linearly to zero.
        rate = min(1.0, (args.num_steps + 1 - run.step) / max(1.0, args.lr_decay * args.num_steps))
        set_rate(opt_generator, args.lr_generator * rate)
        set_rate(opt_discriminator, args.lr_discriminator * rate)
        scalars = recorded(*(buffer.count for buffer in buffers.values()))  # alike once these are full
        if run.due(args.log_every) or run.due(args.eval_every):
            run.log(scalars)
    return run.finish(lambda: metrics.facts)


def generate_translations(args: Args) -> Path:
    """Translations of a checkpoint as a folder of PNG files, named as their originals; returns it."""
    checkpoint = load_checkpoint(Path(args.checkpoint))
    device, made = pick_device(args.device), Args(**checkpoint["args"])
    averaged = average(make_generators(made), made.ema_decay).to(device)
    averaged.load_state_dict(checkpoint["averaged"])
    source = args.direction.split("2")[0]
    if args.input:
        names, images = read_pngs(Path(args.input), source == "usps", made.usps_size)
    else:
        data_dir = made.data_dir if args.data_dir == "data" else args.data_dir
        images = load_domain(source, data_dir, made.eval_split, made.usps_size)[2]
        if args.generate > len(images):
            fail(f"--generate {args.generate}: {source} has {len(images)} {made.eval_split} images")
        images = images[: args.generate]
        names = [f"{i:06d}.png" for i in range(len(images))]
    with new_folder(args.out) as folder:
        translated = translate(averaged.module[args.direction], images.to(device)).cpu()
        pixels = ((translated.squeeze(1) + 1) * 127.5).round().to(torch.uint8).numpy()
        for name, image in zip(names, tqdm(pixels, desc=args.out, disable=None)):
            Image.fromarray(image).save(folder / name)
    print(f"{len(names)} translations in {args.out}")
    return Path(args.out)


def main(args: Args) -> Path:
    """Train, or translate with --generate or --input; returns the folder that was written."""
    try:
        return generate_translations(args) if args.generate or args.input else train(args)
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
