# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch", "torchvision", "tyro", "pydantic", "wandb", "numpy", "tqdm", "matplotlib", "scikit-learn",
# ]
# ///
"""CycleGAN between MNIST and USPS: handwriting of one collection in the manner of the other, without pairs.

Two generators translate, G from MNIST to USPS and F back; two discriminators tell patches of translations
from real ones. An image that goes there and back must return, one that is there already must stay. Nothing in
that asks for the digit to survive: so it is measured, and the generators start at the identity.
    Zhu et al. 2017             CycleGAN: adversarial, cycle and identity loss    1703.10593
    Mao et al. 2017             the least-squares loss                            1611.04076
    Shrivastava et al. 2017     the buffer of earlier translations                1612.07828
    Hoffman et al. 2018         CyCADA: semantic consistency                      1711.03213

Smaller than the paper's, for 28 x 28 pixels: one halving, two residual blocks, patches of 22 pixels. USPS is
scaled to 20 pixels and centred by mass, as MNIST was made; an average of the generators is kept.

    python cyclegan_mnist_usps.py                                # no label is used
    python cyclegan_mnist_usps.py --semantic-consistency mnist   # with the labels of MNIST; usps: of USPS
    python cyclegan_mnist_usps.py --resume runs/<run> --generate 1000 --direction usps2mnist
    python cyclegan_mnist_usps.py --resume runs/<run> --input my-pictures/ --direction mnist2usps

The default run takes 13 minutes on one CPU core: 97.5% and 97.1% of the digits survive, to USPS and to MNIST
(one seed, of commit 8ad0966; results/cyclegan_mnist_usps.md has the rest).
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
import tyro
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

SCRIPT = "cyclegan_mnist_usps"
PRESETS = {}  # no data set has options of its own


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
    dataset: Literal["mnist-usps"] = "mnist-usps"  # the two domains
    data_dir: str = "data"  # folder of MNIST in torchvision's layout and of usps.bz2 and usps.t.bz2
    eval_split: Literal["test", "validation"] = "test"  # validation: the last sixth of the training images
    run_dir: str = "runs"  # folder of the run folders
    resume: str = ""  # run folder to resume; its options apply unless given again
    generate: int = Field(0, ge=0)  # instead of training, translate so many test images by the run --resume
    input: str = ""  # likewise, but the images in this folder: 28 x 28, or 16 x 16 of USPS, white on black
    direction: Literal["mnist2usps", "usps2mnist"] = "mnist2usps"  # of --generate and --input
    log_every: int = Field(50, gt=0)  # steps between lines of metrics.jsonl, each with a checkpoint
    eval_every: int = Field(500, gt=0)  # steps between evaluations, each with a picture
    # test images of each domain that are translated for one; 0: none
    num_eval_samples: int = Field(10_000, ge=0)
    num_steps: int = Field(1000, gt=0)  # updates of the generators
    batch_size: int = Field(16, gt=0, le=50)  # images of each domain; 50 earlier translations are kept
    channels: int = Field(16, gt=0)  # of the generators' first layer; discriminators have twice as many
    cycle_weight: float = Field(10.0, ge=0)  # weight lambda of the cycle loss
    identity_weight: float = Field(5.0, ge=0)  # weight of the identity loss
    semantic_consistency: Literal["none", "mnist", "usps"] = "none"  # whose labels teach a classifier ...
    # ... that is to find the same digit in a translation; the weight of that
    semantic_weight: float = Field(1.0, ge=0)
    # of all networks; it falls to zero in the second half of the run
    learning_rate: float = Field(1e-3, gt=0)

    def __init__(self, **options):
        for name, value in options.items():
            if isinstance(value, str | os.PathLike):
                options[name] = os.path.expanduser(value)
        # The command line gives every option, of a resumed run those of the run that were not typed.
        if options.get("resume") and len(options) < len(Args.model_fields):
            saved = load_checkpoint(options["resume"])["args"]
            del saved["device"]  # another machine may go on
            options = saved | options
        try:
            super().__init__(**options)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors()]
            raise UserError("; ".join(wrong)) from None
        if (self.generate or self.input) and not self.resume:
            raise UserError("--generate and --input need --resume, the folder of the run that translates")


# ---- Data -----------------------------------------------------------------------------------------------
def load_domain(name: str, data_dir: str, eval_split: str) -> list[Tensor]:
    """Return training images (n, 28, 28) uint8 of "mnist" or "usps", labels (n,), and those for evaluation.

    USPS's digits are made as large as MNIST's. Raises UserError.
    """
    parts = []
    try:
        for train in (True, False):
            part = getattr(torchvision.datasets, name.upper())(data_dir, train=train, download=True)
            images, labels = torch.as_tensor(part.data), torch.as_tensor(part.targets)
            if name == "usps":
                images = center_digits(images)
            if images.shape != (len(labels), 28, 28) or labels.max() > 9:
                raise ValueError(f"expected 28 x 28 images of classes 0 to 9, not {images.shape}")
            parts += [images, labels]
    except Exception as error:
        raise UserError(f"no {name} in {data_dir}, see --data-dir: {error!r:.200}") from error
    if eval_split == "validation":
        n = len(parts[0]) * 5 // 6
        parts = [parts[0][:n], parts[1][:n], parts[0][n:], parts[1][n:]]
    return parts


def center_digits(images: Tensor) -> Tensor:
    """Return images (n, 16, 16) uint8 as MNIST was made: 20 x 20, centred by mass in a black (n, 28, 28)."""
    digits = F.interpolate(images[:, None].float(), size=20, mode="bilinear", antialias=True)
    digits = digits[:, 0].round().clamp(0, 255)
    mass = digits.sum((1, 2)).clamp(min=1)
    window = F.pad(digits, [8] * 4)  # (n, 36, 36), of which 28 x 28 are kept
    for dim in (1, 2):
        center = (digits.sum(3 - dim) * torch.arange(20)).sum(1) / mass
        first = 8 - (14 - center).round().clamp(0, 8).long()
        index = (first[:, None] + torch.arange(28)).unsqueeze(3 - dim)
        window = torch.take_along_dim(window, index, dim)
    return window.to(torch.uint8)


def read_pictures(folder: Path, usps: bool) -> tuple[list[str], Tensor]:
    """Return names and images (n, 28, 28) uint8 of a folder's PNG files. Raises UserError."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".png")
    if not paths:
        raise UserError(f"--input {folder} is no folder with PNG files in it")
    images = []
    for path in paths:
        try:
            picture = Image.open(path)
            if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip
                picture = Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
            black = Image.new("RGBA", picture.size, "black")  # behind what is transparent
            picture = Image.alpha_composite(black, picture.convert("RGBA")).convert("L")
            image = torch.from_numpy(np.array(picture))
        except OSError as error:
            raise UserError(f"{path} is no picture: {error}") from error
        if usps and image.shape == (16, 16):
            image = center_digits(image[None])[0]
        if image.shape != (28, 28):
            sizes = "16 x 16 or 28 x 28" if usps else "28 x 28"
            raise UserError(f"{path} is {image.shape[1]} x {image.shape[0]} pixels; needed are {sizes}")
        images.append(image)
    return [path.name for path in paths], torch.stack(images)


def to_float(batch: Tensor) -> Tensor:
    """Return uint8 images (b, 28, 28) as floats (b, 1, 28, 28) in [-1, 1], and any floats as they are."""
    return batch.unsqueeze(1).float() / 127.5 - 1 if batch.dtype == torch.uint8 else batch


# ---- Evaluation -----------------------------------------------------------------------------------------
def train_classifier(
    images: Tensor, labels: Tensor, unlabelled: Tensor | None = None, seed: int = 0, steps: int = 600
) -> nn.Sequential:
    """Return a classifier of images (n, 1, 28, 28) and labels (n,), randomly moved, with its own seed.

    With unlabelled images (m, 28, 28) uint8 of another domain it learns, from a quarter of the steps on, the
    classes that it is sure of there as well, from moved images (self-training).
    """
    with torch.random.fork_rng([images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        classifier = nn.Sequential(
            nn.Conv2d(1, 32, 5, 2, 2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, 2, 2),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 49, 128),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(128, 10),
        ).to(images.device)
        bilinear = torchvision.transforms.InterpolationMode.BILINEAR
        move = torchvision.transforms.RandomAffine(12, (0.07, 0.07), (0.9, 1.1), 9, bilinear, fill=-1.0)
        optimizer = torch.optim.Adam(classifier.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
        for step in range(steps):
            index = torch.randint(len(images), (128,), device=images.device)
            logits = classifier.train()(torch.stack([move(x) for x in images[index]]))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.05)
            if unlabelled is not None and step >= steps // 4:
                index = torch.randint(len(unlabelled), (128,), device=images.device)
                target = to_float(unlabelled[index])
                with torch.no_grad():
                    sure, classes = classifier.eval()(target).softmax(1).max(1)
                logits = classifier.train()(torch.stack([move(x) for x in target]))
                loss = loss + ((sure > 0.8) * F.cross_entropy(logits, classes, reduction="none")).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (n, 1, 28, 28) in which a classifier reads their labels (n,)."""
    found = torch.cat([classifier(b).argmax(1) for b in images.split(1000)])
    return (found == labels).float().mean().item()


@torch.no_grad()
def translate(generator: nn.Module, images: Tensor) -> Tensor:
    """Return translations (n, 1, 28, 28) of images (n, 28, 28) uint8."""
    return torch.cat([generator(to_float(b)) for b in images.split(1000)])


def translation_metrics(translator, source: list[Tensor], target: list[Tensor], reader, n: int) -> dict:
    """Return metrics of a translator between two domains, each x, y, x_eval, y_eval, on n images of x_eval.

    preserved: share of translations in which the reader, the target's classifier, finds the source's label.
    adaptation: accuracy on real target images of a classifier trained on translated images and their labels,
    and on the target's images without theirs.
    """
    fake = translate(translator, source[2][:n])
    learner = train_classifier(translate(translator, source[0][:20_000]), source[1][:20_000], target[0])
    return {
        "preserved": accuracy(reader, fake, source[3][:n]),
        "adaptation": accuracy(learner, to_float(target[2]), target[3]),
    }


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
def norm_block(layer: nn.Module, channels: int, activation: nn.Module) -> nn.Sequential:
    """Return a layer followed by instance normalisation and an activation."""
    return nn.Sequential(layer, nn.InstanceNorm2d(channels), activation)


class ResidualBlock(nn.Module):
    """Add two convolutions of features (b, c, h, w) to them."""

    def __init__(self, channels: int):
        super().__init__()
        conv = partial(nn.Conv2d, channels, channels, 3, 1, 1, padding_mode="reflect")
        self.body = nn.Sequential(
            norm_block(conv(), channels, nn.ReLU()),
            norm_block(conv(), channels, nn.Identity()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Translator(nn.Module):
    """Images (b, 1, 28, 28) in [-1, 1] to images of the other domain: tanh(atanh(0.97 x) + net(x)).

    The last layer of net starts at zero, and so the translator at the identity, but for 3%.
    """

    def __init__(self, channels: int):
        super().__init__()
        c = channels
        last = nn.Conv2d(c, 1, 7, 1, 3, padding_mode="reflect")
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(
            norm_block(nn.Conv2d(1, c, 7, 1, 3, padding_mode="reflect"), c, nn.ReLU()),
            norm_block(nn.Conv2d(c, 2 * c, 3, 2, 1), 2 * c, nn.ReLU()),  # (b, 2 c, 14, 14)
            ResidualBlock(2 * c),
            ResidualBlock(2 * c),
            norm_block(nn.ConvTranspose2d(2 * c, c, 4, 2, 1), c, nn.ReLU()),
            last,
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(torch.atanh(0.97 * images) + self.net(images))


def make_patch_discriminator(channels: int) -> nn.Sequential:
    """Return a network from images (b, 1, 28, 28) to values of its 22 x 22 patches (b, 1, 6, 6)."""
    c = 2 * channels
    return nn.Sequential(
        nn.Conv2d(1, c, 4, 2, 1),
        nn.LeakyReLU(0.2),
        norm_block(nn.Conv2d(c, 2 * c, 4, 2, 1), 2 * c, nn.LeakyReLU(0.2)),
        norm_block(nn.Conv2d(2 * c, 2 * c, 3, 1, 1), 2 * c, nn.LeakyReLU(0.2)),
        nn.Conv2d(2 * c, 1, 2),
    )


# ---- Loss -----------------------------------------------------------------------------------------------
def least_squares_loss(values: Tensor, target: float) -> Tensor:
    """Return the mean of (D - target)^2 over values D of any shape: 1 stands for real, 0 for fake.

    Mao et al. 2017, eq. 2, as Zhu et al. 2017, section 4, take it.
    """
    return (values - target).square().mean()


def cycle_loss(there_and_back: Tensor, images: Tensor) -> Tensor:
    """Return the mean of |F(G(x)) - x| (Zhu et al. 2017, eq. 2); of G(y) and y the identity loss."""
    return (there_and_back - images).abs().mean()


def semantic_loss(logits: Tensor, logits_translated: Tensor) -> Tensor:
    """Return the cross-entropy of translations' logits (b, k) with the classes found in the originals'.

    Hoffman et al. 2018, eq. 4.
    """
    return F.cross_entropy(logits_translated, logits.argmax(1))


def exchange(buffer: Tensor, images: Tensor) -> Tensor:
    """Return images (b, ...), each with a chance of a half exchanged for an earlier one in buffer (n, ...).

    Shrivastava et al. 2017, section 2.3; the buffer keeps what was exchanged.
    """
    places = torch.randperm(len(buffer), device=images.device)[: len(images)]
    swap = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    earlier = buffer[places]
    buffer[places] = torch.where(swap, images, earlier)
    return torch.where(swap, earlier, images)


# ---- Training -------------------------------------------------------------------------------------------
def train(args: Args) -> Path:
    """Train, evaluate and save; return the run folder. With args.generate or args.input translate instead.

    Raises UserError for what the user can fix. After Ctrl-C or SIGTERM it saves and raises SystemExit.
    """
    with ExitStack() as stack:  # puts back what a run changes in the process
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("warn" if args.torch_deterministic else "default")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without, cuBLAS is not deterministic
        domains = {}  # of each x, y, x_eval and y_eval
        for name in ("mnist", "usps"):
            parts = load_domain(name, args.data_dir, args.eval_split)
            domains[name] = [v.to(args.device) for v in parts]
        torch.manual_seed(args.seed)
        pairs = "mnist2usps", "usps2mnist"
        translators = nn.ModuleDict({pair: Translator(args.channels) for pair in pairs})
        discriminators = nn.ModuleDict({name: make_patch_discriminator(args.channels) for name in domains})
        for name, other in (("mnist", "usps"), ("usps", "mnist")):
            earlier = to_float(domains[other][0][:50])  # at first, translations are the images themselves
            discriminators[name].register_buffer("earlier", earlier)
        translators.to(args.device)
        discriminators.to(args.device)
        averaged = AveragedModel(translators, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
        optimizer_g = torch.optim.Adam(translators.parameters(), betas=(0.5, 0.999), fused=True)
        optimizer_d = torch.optim.Adam(discriminators.parameters(), betas=(0.5, 0.999), fused=True)
        parts = {"translators": translators, "averaged": averaged, "discriminators": discriminators}
        parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}

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
        if args.generate or args.input:
            source = args.direction.split("2")[0]
            names = [f"{i:06d}.png" for i in range(args.generate)]
            images = domains[source][2][: args.generate]
            if args.input:
                names, images = read_pictures(Path(args.input), source == "usps")
            translated = translate(averaged.module[args.direction], images.to(args.device)) / 2 + 0.5
            for name, image in zip(names, translated):
                save = partial(torchvision.utils.save_image, image)
                replace_file(folder / "generated" / args.direction / name, save)
            return folder / "generated" / args.direction
        folder.mkdir(parents=True, exist_ok=bool(args.resume))
        wandb_run = None
        if args.track:
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

        n = args.num_eval_samples
        readers, facts = {}, {}
        for name, other in (("mnist", "usps"), ("usps", "mnist")) if n else ():
            images, labels, *_ = domains[name]
            readers[name] = train_classifier(to_float(images), labels)
            _, _, images, labels = domains[other]
            facts[f"{name}2{other}_source_only"] = accuracy(readers[name], to_float(images), labels)

        def evaluate() -> dict:  # which trains classifiers: not without gradients
            rows_of_pictures = []
            metrics = {}
            for direction, translator in averaged.module.items():
                source, target = direction.split("2")
                x = domains[source][2][:20]
                there = translator(to_float(x))
                back = averaged.module[f"{target}2{source}"](there)
                rows_of_pictures += [to_float(x), there, back]
                if n:
                    pair = domains[source], domains[target]
                    found = translation_metrics(translator, *pair, readers[target], n)
                    metrics |= {f"{direction}_{name}": value for name, value in found.items()}
            picture = torch.cat(rows_of_pictures).detach() / 2 + 0.5
            for name in (f"samples_{step:06d}.png", "samples.png"):
                replace_file(folder / name, partial(torchvision.utils.save_image, picture, nrow=20))
            if wandb_run:
                wandb_run.log({"samples": wandb.Image(str(folder / "samples.png"))}, step=step)
            tqdm.write(f"step {step}: {metrics}")
            return metrics

        classifier = None
        if args.semantic_consistency != "none":
            x, y, *_ = domains[args.semantic_consistency]
            classifier = train_classifier(to_float(x), y, seed=1 + args.seed)  # not the one that measures
        g, f = translators.values()
        metrics, logged, clock = None, step, time.perf_counter()
        for step in tqdm(range(logged + 1, args.num_steps + 1), desc=SCRIPT, disable=None):
            # The learning rate is constant in the first half, then falls linearly to zero.
            rate = min(1.0, 2 * (args.num_steps - step + 1) / args.num_steps)
            optimizer_g.param_groups[0]["lr"] = rate * args.learning_rate
            optimizer_d.param_groups[0]["lr"] = rate * args.learning_rate
            x, y = (
                to_float(images[torch.randint(len(images), (args.batch_size,), device=args.device)])
                for images, *_ in domains.values()
            )

            # The translators minimise  adversarial + lambda cycle + identity  (Zhu et al. 2017, eq. 3), in
            # four passes: what is translated and what should stay go together, as nothing mixes images.
            fake_y, same_y = g(torch.cat((x, y))).chunk(2)
            fake_x, same_x = f(torch.cat((y, x))).chunk(2)
            adversarial = least_squares_loss(discriminators["usps"](fake_y), 1)
            adversarial = adversarial + least_squares_loss(discriminators["mnist"](fake_x), 1)
            cycle = cycle_loss(f(fake_y), x) + cycle_loss(g(fake_x), y)
            identity = cycle_loss(same_y, y) + cycle_loss(same_x, x)
            loss_g = adversarial + args.cycle_weight * cycle + args.identity_weight * identity
            if classifier is not None:
                logits = classifier(torch.cat((x, y)))
                semantic = semantic_loss(logits, classifier(torch.cat((fake_y, fake_x))))
                loss_g = loss_g + args.semantic_weight * semantic
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(translators.parameters()))
            optimizer_g.step()
            averaged.update_parameters(translators)

            # The discriminators tell real images from translations, of which some are from earlier steps.
            loss_d = 0
            for name, real, fake in (("mnist", x, fake_x), ("usps", y, fake_y)):
                fake = exchange(discriminators[name].earlier, fake.detach())
                d_real, d_fake = discriminators[name](torch.cat((real, fake))).chunk(2)
                loss_d = loss_d + (least_squares_loss(d_real, 1) + least_squares_loss(d_fake, 0)) / 2
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()

            last = bool(signals) or step == args.num_steps
            if last or step % args.log_every == 0 or step % args.eval_every == 0:
                if not all(p.isfinite().all() for p in (loss_d, loss_g, *averaged.parameters())):
                    raise UserError(f"loss or weights are not finite at step {step}: lower the learning rate")
                elapsed = time.perf_counter() - clock
                seconds += elapsed
                row = {"step": step, "steps_per_second": (step - logged) / elapsed}
                row |= {"loss_d": loss_d.item(), "loss_g": loss_g.item(), "adversarial": adversarial.item()}
                row |= {"cycle": cycle.item(), "identity": identity.item()}
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

        save_curves(folder / "curves.png", rows)
        if step < args.num_steps:
            command = shlex.join(["python", f"{SCRIPT}.py", f"--resume={folder}"])
            tqdm.write(f"stopped after step {step}; go on with: {command}")
            raise SystemExit(128 + signals[0])
        metrics = evaluate() if metrics is None else metrics  # None: the run was done already
        results = metrics | facts | {"steps": step, "seconds": seconds}
        results |= {"device": args.device, "torch": torch.__version__, "args": vars(args)}
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
