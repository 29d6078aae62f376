# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch", "torchvision", "tyro", "pydantic", "wandb", "numpy", "tqdm", "matplotlib", "scikit-learn",
# ]
# ///
"""Wasserstein GAN: a critic measures how far samples are from data, and the generator lowers that distance.

If the critic f is 1-Lipschitz, the largest E f(x) - E f(y), for x real and y fake, is the Wasserstein-1
distance of the two. The critic maximises it under a bound: a penalty on its slope, or clipped weights.
    Arjovsky et al. 2017    Wasserstein GAN: duality, weight clipping            1701.07875
    Gulrajani et al. 2017   Improved training of WGANs: the gradient penalty     1704.00028

    python wgan_gp.py --track                              # MNIST, logged to Weights & Biases
    python wgan_gp.py --lipschitz clip                     # the first WGAN
    python wgan_gp.py --resume runs/<run> --generate 1000  # draw samples

The default run takes 12 minutes on one CPU core: fid 2.3, 2.6 times that of real images, precision 0.72 and
recall 0.80 (means of 3 seeds; results/wgan_gp.md has the rest).
"""

import json
import math
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
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

SCRIPT = "wgan_gp"
TOY = {"batch_size": 256, "latent_dim": 2, "penalty_weight": 1.0, "clip": 0.3}
RING = TOY | {"num_steps": 10_000, "eval_every": 2000}
GRID = TOY | {"num_steps": 20_000, "eval_every": 4000}
PRESETS = {"digits": {"num_steps": 1500, "eval_every": 500}, "ring": RING, "grid": GRID}


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
    eval_every: int = Field(1400, gt=0)  # steps between evaluations, each with a picture
    num_eval_samples: int = Field(10_000, ge=0)  # samples per evaluation; 0 skips it for images
    num_steps: int = Field(7000, gt=0)  # updates of the generator
    batch_size: int = Field(64, gt=0)  # samples in a batch
    latent_dim: int = Field(32, gt=0)  # size of the generator's Gaussian input
    lipschitz: Literal["penalty", "clip"] = "penalty"  # bound the critic's slope, or clip its weights
    penalty_weight: float = Field(10.0, ge=0)  # weight lambda of the gradient penalty
    clip: float = Field(0.03, gt=0)  # bound on the critic's weights, for --lipschitz clip
    critic_steps: int = Field(1, gt=0)  # updates of the critic per update of the generator
    learning_rate: float = Field(2e-3, gt=0)  # of both networks; it falls to zero in the last part of the run

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


def make_critic() -> nn.Sequential:
    """Return a network from images (b, 1, 28, 28) to values (b, 1)."""
    network = nn.Sequential(
        nn.ConstantPad2d(1, -1.0),  # black: a frame of grey, which is 0, would be seen
        nn.Conv2d(1, 32, 4, 2),  # (b, 32, 14, 14)
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1),  # (b, 64, 7, 7)
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 64, 3, 1, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(64 * 49, 1),
    )
    return network.to(memory_format=torch.channels_last)


@torch.no_grad()
def draw_samples(generator: nn.Module, args, count: int) -> Tensor:
    """Return samples (count, ...) of a generator in evaluation mode; the latents have a seed of their own."""
    rng = torch.Generator().manual_seed(args.seed)
    latents = torch.randn(count, args.latent_dim, generator=rng).to(args.device)
    return torch.cat([generator.eval()(z) for z in latents.split(1000)])


# ---- Loss -----------------------------------------------------------------------------------------------
def gradient_penalty(f: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> Tensor:
    """Return the mean of (|grad f(t)| - 1)^2 at random points t between real and fake (b, ...): a scalar.

    Gulrajani et al. 2017, eq. 3. f maps samples to values, (b,) or (b, 1), each by itself: no batch
    normalisation. Raises ValueError for other shapes.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real {tuple(real.shape)} and fake {tuple(fake.shape)} must have one shape")
    u = torch.rand(len(real), *[1] * (real.dim() - 1), dtype=real.dtype, device=real.device)
    t = torch.lerp(real.detach(), fake.detach(), u).requires_grad_()
    values = f(t)
    if values.numel() != len(t):
        raise ValueError(f"f must return a value per sample, ({len(t)},), not {tuple(values.shape)}")
    (grad,) = torch.autograd.grad(values.sum(), t, create_graph=True)
    return (grad.flatten(1).norm(dim=1) - 1).square().mean()


# ---- Training -------------------------------------------------------------------------------------------
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
        data, measure = load_data(args)
        torch.manual_seed(args.seed)
        generator = make_mlp(args.latent_dim, 2, nn.ReLU()) if toy else make_generator(args.latent_dim)
        critic = (make_mlp(2, 1, nn.LeakyReLU(0.2)) if toy else make_critic()).to(device)
        generator.to(device)
        decay = min(0.999, 1 - 10 / max(10, args.num_steps))  # a short run averages over fewer steps
        averaged = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        optimizer_g = torch.optim.Adam(generator.parameters(), betas=(0.0, 0.9), fused=True)  # no momentum
        optimizer_c = torch.optim.Adam(critic.parameters(), betas=(0.0, 0.9), fused=True)
        parts = {"generator": generator, "averaged": averaged, "critic": critic}
        parts |= {"optimizer_g": optimizer_g, "optimizer_c": optimizer_c}

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
        for step in tqdm(range(logged + 1, args.num_steps + 1), desc=SCRIPT, disable=None):
            # The learning rate is constant at first, then falls linearly to zero.
            rate = min(1.0, (args.num_steps - step + 1) / ((0.4 if toy else 0.7) * args.num_steps))
            optimizer_g.param_groups[0]["lr"] = rate * args.learning_rate
            optimizer_c.param_groups[0]["lr"] = rate * args.learning_rate

            # The critic minimises  E f(y) - E f(x) + lambda E (|grad f(t)| - 1)^2,  or clips its weights.
            for _ in range(args.critic_steps):
                real = to_float(data[torch.randint(len(data), (args.batch_size,), device=args.device)])
                with torch.no_grad():
                    fake = generator(torch.randn(args.batch_size, args.latent_dim, device=args.device))
                f_real, f_fake = critic(torch.cat((real, fake))).chunk(2)
                w1 = f_real.mean() - f_fake.mean()
                loss_c = -w1
                if args.lipschitz == "penalty":
                    loss_c = loss_c + args.penalty_weight * gradient_penalty(critic, real, fake)
                optimizer_c.zero_grad()
                loss_c.backward()
                optimizer_c.step()
                if args.lipschitz == "clip":
                    for weight in critic.parameters():
                        weight.data.clamp_(-args.clip, args.clip)

            # The generator minimises  -E f(y).
            fake = generator(torch.randn(args.batch_size, args.latent_dim, device=args.device))
            loss_g = -critic(fake).mean()
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            optimizer_g.step()
            averaged.update_parameters(generator)

            last = bool(signals) or step == args.num_steps
            if last or step % args.log_every == 0 or step % args.eval_every == 0:
                if not all(p.isfinite().all() for p in (loss_c, loss_g, *averaged.parameters())):
                    raise UserError(f"loss or weights are not finite at step {step}: lower the learning rate")
                elapsed = time.perf_counter() - clock
                seconds += elapsed
                row = {"step": step, "steps_per_second": (step - logged) / elapsed, "w1": w1.item()}
                row |= {"loss_c": loss_c.item(), "loss_g": loss_g.item()}
                row["critic_std"] = f_real.std(correction=0).item()
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
