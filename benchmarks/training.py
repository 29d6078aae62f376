"""Steps per second of the image scripts, beside the same training written the way that it is usually copied.

    python benchmarks/training.py --markdown results/training.md
    python benchmarks/training.py --device cuda
    python benchmarks/training.py --scripts wgan_gp mmd_gan --steps 5 --rounds 3    # to see that it runs

A row is a script's own train() with its defaults and no evaluation; on CUDA there is one more for
--compile, where the script has it. The copied loop beside it has the networks, batch sizes, updates and
losses of the script, and for the rest does as PyTorch-GAN (github.com/eriklindernoren/PyTorch-GAN) does:

- a DataLoader without workers over torchvision's data set: PIL, Resize, ToTensor, Normalize, for each image;
- one batch of real images per step, for critic and generator, and noise from NumPy;
- contiguous networks, Adam as torch sets it (not fused; a loop over the weights on the CPU), no averages;
- real and fake images in passes of their own, where no batch normalisation has to see both;
- gradients of all weights, also of those that the optimizer at hand does not change;
- the losses as autograd takes them: the MMD of one Gram matrix, Sinkhorn through its iterations
  (SINKHORN_ITERATIONS), the gradient penalty of PyTorch-GAN;
- every loss read back and printed at every step, here into os.devnull.

The copied sgan_mnist keeps the script's augmentation, joint passes and averaged teacher: they are the method.

Times: a round is --steps of the script, then as many of the copied loop, so that a machine that drifts hits
both alike. The table has the medians of the rounds and their quartiles, and of the ratio of both in a round.
Shares of the script's step are from another pass, without --compile: data (drawing, scaling, augmentation;
of wgan_gp and mmd_gan scaling alone), backward (with all of gmgan_mnist's penalised_backward), optimizer
(with the averages), and loss, which is all the rest: forward passes, losses, and the gradient inside a
penalty.
"""

import contextlib
import copy
import dataclasses
import functools
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from losses import copied_kernel, fail, machine, squared_cost, unrolled, unrolled_cost
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

Script = Literal[
    "baseline_cnn", "sgan_mnist", "gmgan_mnist", "wgan_gp", "mmd_gan", "sinkhorn_gan", "cyclegan_mnist_usps"
]
SCRIPTS: tuple[Script, ...] = get_args(Script)
GOALS = {"cpu": 1.5, "cuda": 5.0}  # of the ratio
WARM_UP = 20  # steps of both that do not count, in which memory is taken and CUDA graphs are recorded
# The script stops by its tolerance, a marginal error of 0.01. In the first 500 steps of a default run nine of
# ten of its problems need at most 8 plain iterations for that; a fixed number has a small margin.
SINKHORN_ITERATIONS = 10
PARTS = ("data", "loss", "backward", "optimizer")
WIDTHS = {
    **{"script": 26, "steps/s": 8, "quartiles": 16, "copied": 8, "its quartiles": 16, "ratio": 6},
    **{"ratio's quartiles": 17} | dict.fromkeys(PARTS, 9),
}


@dataclasses.dataclass
class Args:
    scripts: tuple[Script, ...] = SCRIPTS
    """what to measure"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where to measure"""
    data_dir: str = "data"
    """folder of MNIST, and for CycleGAN of USPS, in torchvision's layout; missing files are downloaded"""
    steps: int = 50
    """steps in a round"""
    rounds: int = 9
    """rounds of either form"""
    markdown: str | None = None
    """write the table and the facts of the machine to this file as well"""

    def __post_init__(self) -> None:
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                fail(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not self.scripts:
            fail(f"--scripts must name at least one of {', '.join(SCRIPTS)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            fail(f"--device cuda: torch {torch.__version__} finds no CUDA device; use --device cpu")


# ---------------------------------------------------------------------------------------------------------
# The copied loops: each is given a script, its Args and a device, and does a step whenever it is asked for
# the next losses


def image_data(name: str, data_dir: str) -> Dataset:
    """The training images of torchvision's MNIST or USPS, as floats (1, 28, 28) in [-1, 1]."""
    from torchvision import datasets, transforms

    chain = [transforms.Resize(28), transforms.ToTensor(), transforms.Normalize([0.5], [0.5])]
    return getattr(datasets, name)(data_dir, train=True, transform=transforms.Compose(chain))


def batches(data: Dataset, batch_size: int, device: str) -> Iterator[list[Tensor]]:
    """Images (b, 1, 28, 28) and labels (b,), epoch after epoch; what is left of one is dropped."""
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    while True:
        for batch in loader:
            yield [part.to(device) for part in batch]


def to_device(array: np.ndarray, device: str) -> Tensor:
    """NumPy's numbers as floats on the device."""
    return torch.from_numpy(array).float().to(device)


def noise(args, device: str) -> Tensor:
    """Latents for a batch."""
    return to_device(np.random.normal(size=(args.batch_size, args.latent_dim)), device)


def contiguous(network: nn.Module, device: str) -> nn.Module:
    """The network in torch's default memory format."""
    return network.to(device, memory_format=torch.contiguous_format)


def report(**losses: Tensor) -> dict[str, float]:
    """Read the losses back and print them."""
    values = {name: loss.item() for name, loss in losses.items()}
    print(" ".join(f"[{name} loss: {value:f}]" for name, value in values.items()))
    return values


def input_gradients(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Gradients (b, d) of outputs (b, 1) in their inputs (b, ...), differentiable once more."""
    ones = torch.ones_like(outputs)
    options = {"create_graph": True, "retain_graph": True}
    return torch.autograd.grad(outputs, inputs, grad_outputs=ones, **options)[0].view(len(inputs), -1)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Mean of (|grad f| - 1)^2 at random points between real and fake images."""
    alpha = to_device(np.random.random((len(real), 1, 1, 1)), real.device)
    points = (alpha * real + (1 - alpha) * fake).detach().requires_grad_()
    return ((input_gradients(critic(points), points).norm(2, dim=1) - 1) ** 2).mean()


def mmd_terms(
    h_real: Tensor, h_fake: Tensor, bandwidths: tuple[float, ...], kernel: str = "gaussian"
) -> tuple[Tensor, ...]:
    """k_xx, k_yy and k_xy of features (n, d), without the pairs of a sample with itself."""
    k, n = copied_kernel(h_real, h_fake, bandwidths, kernel), len(h_real)
    own = [(block.sum() - block.trace()) / (n * (n - 1)) for block in (k[:n, :n], k[n:, n:])]
    return *own, k[:n, n:].mean()


def cosine_problem(h_real: Tensor, h_fake: Tensor, epsilon: float) -> tuple[Tensor, Tensor, float]:
    """Features (n, d) on the sphere, where half a squared distance is the cosine cost, and their epsilon."""
    x, y = F.normalize(h_real), F.normalize(h_fake)
    return x, y, epsilon * squared_cost(x, y).mean().item()


def sinkhorn_loss(h_real: Tensor, h_fake: Tensor, epsilon: float) -> Tensor:
    """The Sinkhorn divergence, with autograd through its iterations."""
    return unrolled(*cosine_problem(h_real, h_fake, epsilon), SINKHORN_ITERATIONS)


def repulsive_sinkhorn_loss(h_real: Tensor, h_fake: Tensor, epsilon: float) -> Tensor:
    """OT(y1, y2) - OT(x1, x2) of the halves of a batch, with autograd through the iterations."""
    x, y, eps = cosine_problem(h_real, h_fake, epsilon)
    apart, together = (unrolled_cost(*v.chunk(2), eps, SINKHORN_ITERATIONS) for v in (x, y))
    return together - apart


def copied_baseline_cnn(script: ModuleType, args, device: str) -> Iterator[dict[str, float]]:
    """Cross-entropy of the labelled images."""
    data = image_data("MNIST", args.data_dir)
    labelled, _ = script.split_labels(data.targets, args.num_labels, args.label_seed)
    classifier = contiguous(script.Classifier(args.channels), device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=args.lr)
    for images, labels in batches(Subset(data, labelled.tolist()), args.batch_size, device):
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(images)[1], labels)
        loss.backward()
        optimizer.step()
        yield report(C=loss)


def copied_sgan_mnist(script: ModuleType, args, device: str) -> Iterator[dict[str, float]]:
    """Labels, real against generated, pseudo-labels; feature matching."""
    data = image_data("MNIST", args.data_dir)
    labelled, unlabelled = script.split_labels(data.targets, args.num_labels, args.label_seed)
    labelled = batches(Subset(data, labelled.tolist()), args.label_batch_size, device)
    unlabelled = batches(Subset(data, unlabelled.tolist()), args.batch_size, device)
    generator = contiguous(script.make_generator(args.latent_dim, args.channels, False), device)
    classifier = contiguous(script.Classifier(args.channels), device)
    teacher, half = copy.deepcopy(classifier).eval(), args.batch_size // 2
    opt_c = torch.optim.Adam(classifier.parameters(), lr=args.lr, betas=(args.beta1, 0.999))
    opt_g = torch.optim.Adam(generator.parameters(), lr=args.lr_generator, betas=(args.beta1, 0.999))

    def distort(images: Tensor) -> Tensor:
        return script.paste_patches(script.augment(images), args.paste)

    for (images, labels), (clean, _) in zip(labelled, unlabelled):
        opt_c.zero_grad()
        images = distort(torch.cat((images, clean)))
        script.hold_statistics(classifier, False)
        l_labelled, l_real = classifier(images)[1].split((len(labels), len(clean)))
        script.hold_statistics(classifier, True)
        fake = generator(noise(args, device)[:half])
        l_both = classifier(torch.cat((images[-half:], distort(fake.detach()))))[1]
        with torch.no_grad():
            l_teacher = teacher(clean)[1]
        loss_c = F.cross_entropy(l_labelled, labels)
        loss_c = loss_c + args.gan_weight * script.discriminator_loss(*l_both.chunk(2))
        consistency = script.pseudo_label_loss(l_real, l_teacher, args.threshold)
        loss_c = loss_c + args.consistency_weight * consistency
        loss_c.backward()
        opt_c.step()
        with torch.no_grad():
            for a, v in zip(teacher.state_dict().values(), classifier.state_dict().values()):
                if a.is_floating_point():
                    a.mul_(args.ema_decay).add_(v, alpha=1 - args.ema_decay)

        opt_g.zero_grad()
        features = classifier(torch.cat((images[-half:], distort(fake))))[0]
        loss_g = script.feature_matching_loss(*features.chunk(2))
        loss_g.backward()
        opt_g.step()
        yield report(C=loss_c, G=loss_g)


def copied_gmgan_mnist(script: ModuleType, args, device: str) -> Iterator[dict[str, float]]:
    """The relativistic loss with both penalties, from a mixture that trains."""
    generator, discriminator = (contiguous(network, device) for network in script.make_networks(args))
    mixture = script.make_mixture(args).to(device)
    adam = functools.partial(torch.optim.Adam, betas=(args.beta1, 0.99))
    opt_g = adam([*generator.parameters(), *mixture.parameters()], lr=args.lr_generator)
    opt_d = adam(discriminator.parameters(), lr=args.lr_discriminator)
    for real, _ in batches(image_data("MNIST", args.data_dir), args.batch_size, device):
        opt_d.zero_grad()
        components = np.random.randint(0, args.num_components, args.batch_size)
        fake = generator(mixture(torch.from_numpy(components).to(device), noise(args, device)))
        inputs = [v.detach().requires_grad_() for v in (real, fake)]
        logits = [discriminator(v) for v in inputs]
        r1, r2 = ((input_gradients(logit, v) ** 2).sum(1).mean() for logit, v in zip(logits, inputs))
        loss_d = script.relativistic_losses(*(logit.squeeze(1) for logit in logits))[0]
        loss_d = loss_d + args.gamma / 2 * (r1 + r2)
        loss_d.backward()
        opt_d.step()

        opt_g.zero_grad()
        l_real, l_fake = discriminator(real).squeeze(1), discriminator(fake).squeeze(1)
        loss_g = script.relativistic_losses(l_real, l_fake)[1]
        loss_g.backward()
        opt_g.step()
        yield report(D=loss_d, G=loss_g)


def copied_wgan_gp(script: ModuleType, args, device: str) -> Iterator[dict[str, float]]:
    """Wasserstein's estimate and the gradient penalty."""
    generator = contiguous(script.make_generator(args.latent_dim), device)
    critic = contiguous(script.make_critic(), device)
    adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, betas=(0.0, 0.9))
    opt_g, opt_d = adam(generator.parameters()), adam(critic.parameters())
    for real, _ in batches(image_data("MNIST", args.data_dir), args.batch_size, device):
        opt_d.zero_grad()
        fake = generator(noise(args, device))  # whose gradient PyTorch-GAN takes here, too
        loss_d = -critic(real).mean() + critic(fake).mean()
        loss_d = loss_d + args.penalty_weight * gradient_penalty(critic, real, fake)
        loss_d.backward()
        opt_d.step()

        opt_g.zero_grad()
        loss_g = -critic(generator(noise(args, device))).mean()
        loss_g.backward()
        opt_g.step()
        yield report(D=loss_d, G=loss_g)


def copied_feature_gan(
    networks: tuple[nn.Module, nn.Module], args, device: str, beta1: float, losses: tuple[Callable, Callable]
) -> Iterator[dict[str, float]]:
    """Two losses, critic's and generator's, of the critic's features (b, d) of real and of fake images."""
    generator, critic = (contiguous(network, device) for network in networks)
    loss_of_critic, loss_of_generator = losses
    opt_g = torch.optim.Adam(generator.parameters(), lr=args.lr_generator, betas=(beta1, 0.999))
    opt_d = torch.optim.Adam(critic.parameters(), lr=args.lr_critic, betas=(beta1, 0.999))
    for real, _ in batches(image_data("MNIST", args.data_dir), args.batch_size, device):
        opt_d.zero_grad()
        fake = generator(noise(args, device)).detach()
        loss_d = loss_of_critic(critic(real), critic(fake))
        loss_d.backward()
        opt_d.step()

        opt_g.zero_grad()
        loss_g = loss_of_generator(critic(real), critic(generator(noise(args, device))))
        loss_g.backward()
        opt_g.step()
        yield report(D=loss_d, G=loss_g)


def copied_mmd_gan(script: ModuleType, args, device: str) -> Iterator[dict[str, float]]:
    """The repulsive critic, and MMD^2."""

    def loss_of_critic(h_real: Tensor, h_fake: Tensor) -> Tensor:
        k_xx, k_yy, _ = mmd_terms(h_real, h_fake, args.bandwidths, args.kernel)
        return k_xx - k_yy

    def loss_of_generator(h_real: Tensor, h_fake: Tensor) -> Tensor:
        k_xx, k_yy, k_xy = mmd_terms(h_real, h_fake, args.bandwidths, args.kernel)
        return k_xx + k_yy - 2 * k_xy

    networks = script.make_generator(args.latent_dim), script.make_critic(False, args.spectral_norm)
    return copied_feature_gan(networks, args, device, 0.5, (loss_of_critic, loss_of_generator))


def copied_sinkhorn_gan(script: ModuleType, args, device: str) -> Iterator[dict[str, float]]:
    """The repulsive critic, and the Sinkhorn divergence."""
    losses = [functools.partial(f, epsilon=args.epsilon) for f in (repulsive_sinkhorn_loss, sinkhorn_loss)]
    networks = script.make_generator(args.latent_dim), script.make_critic(False, args.spectral_norm)
    return copied_feature_gan(networks, args, device, 0.5, losses)


class Replay:
    """Earlier translations, kept and exchanged one by one."""

    def __init__(self, size: int):
        self.size, self.images = size, []

    def exchange(self, images: Tensor) -> Tensor:
        """Images (b, 1, 28, 28), some of them earlier ones."""
        out = []
        for image in images.detach().split(1):
            if len(self.images) < self.size:
                self.images.append(image)
            elif random.random() < 0.5:
                place = random.randrange(self.size)
                image, self.images[place] = self.images[place].clone(), image
            out.append(image)
        return torch.cat(out)


class CopiedNorm(nn.Module):
    """torch's instance normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x)


def copied_norm(script: ModuleType, network: nn.Module) -> nn.Module:
    """The network with torch's instance normalisation in place of the script's."""
    for module in [*network.modules()]:
        for name, child in module.named_children():
            if isinstance(child, script.InstanceNorm):
                setattr(module, name, CopiedNorm())
    return network


def copied_cyclegan_mnist_usps(script: ModuleType, args, device: str) -> Iterator[dict[str, float]]:
    """Least squares, cycles and identity, each pass by itself, with an optimizer for each discriminator."""
    g, f = script.make_generators(args).values()
    d_x, d_y = (script.make_discriminator(args.channels, args.spectral_norm) for _ in range(2))
    g, f, d_x, d_y = (contiguous(copied_norm(script, network), device) for network in (g, f, d_x, d_y))
    adam = functools.partial(torch.optim.Adam, betas=(args.beta1, 0.999))
    opt_g = adam([*g.parameters(), *f.parameters()], lr=args.lr_generator)
    opt_x, opt_y = (adam(d.parameters(), lr=args.lr_discriminator) for d in (d_x, d_y))
    seen_x, seen_y = Replay(script.BUFFER_SIZE), Replay(script.BUFFER_SIZE)
    mnist, usps = (
        batches(image_data(name, args.data_dir), args.batch_size, device) for name in ("MNIST", "USPS")
    )
    patches = (args.batch_size, 1, 6, 6)
    for (x, _), (y, _) in zip(mnist, usps):
        valid, fake = to_device(np.ones(patches), device), to_device(np.zeros(patches), device)
        opt_g.zero_grad()
        identity = F.l1_loss(f(x), x) + F.l1_loss(g(y), y)
        fake_y, fake_x = g(x), f(y)
        adversarial = F.mse_loss(d_y(fake_y), valid) + F.mse_loss(d_x(fake_x), valid)
        cycle = F.l1_loss(f(fake_y), x) + F.l1_loss(g(fake_x), y)
        loss_g = adversarial + args.cycle_weight * cycle + args.identity_weight * identity
        loss_g.backward()
        opt_g.step()

        losses = []
        parts = (d_x, opt_x, x, fake_x, seen_x), (d_y, opt_y, y, fake_y, seen_y)
        for discriminator, optimizer, real, translated, seen in parts:
            optimizer.zero_grad()
            on_real = F.mse_loss(discriminator(real), valid)
            on_fake = F.mse_loss(discriminator(seen.exchange(translated)), fake)
            losses.append((on_real + on_fake) / 2)
            losses[-1].backward()
            optimizer.step()
        yield report(D=sum(losses), G=loss_g, adversarial=adversarial, cycle=cycle, identity=identity)


LOOPS = (copied_baseline_cnn, copied_sgan_mnist, copied_gmgan_mnist, copied_wgan_gp, copied_mmd_gan)
LOOPS += (copied_sinkhorn_gan, copied_cyclegan_mnist_usps)


def copied_loop(name: Script, args, device: str) -> Iterator[dict[str, float]]:
    """The copied loop of a script, for its Args."""
    return LOOPS[SCRIPTS.index(name)](import_module(name), args, device)


# ---------------------------------------------------------------------------------------------------------
# Measuring


class Enough(Exception):
    """Ends a script's training, as all has been measured."""


def script_args(name: Script, args: Args, **changes):
    """The script's default Args, without evaluations, and with more steps than will be measured."""
    fields = import_module(name).Args.__dataclass_fields__
    options = {"device": args.device, "data_dir": args.data_dir, "num_eval_samples": 0, **changes}
    options |= dict.fromkeys(("num_steps", "eval_every"), 10**6)
    return import_module(name).Args(**{k: v for k, v in options.items() if k in fields})


def watch_training(name: Script, settings, before_step: Callable[[int], None]) -> None:
    """Run the script's train() until before_step, called with the number of steps done, raises Enough."""
    script = import_module(name)
    deterministic = torch.get_deterministic_debug_mode()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    if hasattr(script, "Run"):
        steps = script.Run.steps

        def watched(run) -> Iterator[int]:
            for step in steps(run):
                before_step(step - 1)
                yield step

        watching = patch.multiple(script.Run, steps=watched, quiet=True)
    else:  # wgan_gp, mmd_gan and sinkhorn_gan have no more than a progress bar around their steps

        def bar(steps: range, **options) -> Iterator[int]:
            for step in steps:
                before_step(step - 1)
                yield step

        watching = patch.object(script, "tqdm", bar)
    try:
        with tempfile.TemporaryDirectory() as folder, watching, contextlib.suppress(Enough):
            script.train(dataclasses.replace(settings, run_dir=folder))
    finally:  # what train() sets for the process it thinks is its own
        torch.set_deterministic_debug_mode(deterministic)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def like_a_copy() -> Iterator[None]:
    """Algorithms need not be deterministic, and what is printed is thrown away."""
    deterministic = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):
        yield
    torch.set_deterministic_debug_mode(deterministic)


def synchronizer(device: str) -> Callable[[], None]:
    """What waits until the device has done its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def time_rounds(name: Script, settings, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Steps per second of the script and of its copied loop, (rounds,) each."""
    synchronize, copied = synchronizer(args.device), copied_loop(name, settings, args.device)
    seconds, start = {"script": [], "copied": []}, 0.0

    def do_copied(steps: int) -> float:
        with like_a_copy():
            start = time.perf_counter()
            for _ in range(steps):
                next(copied)
            synchronize()
            return time.perf_counter() - start

    def before_step(done: int) -> None:
        nonlocal start
        rounds, rest = divmod(done - WARM_UP, args.steps)
        if rounds < 0 or rest:
            return
        synchronize()
        if rounds:
            seconds["script"].append(time.perf_counter() - start)
            seconds["copied"].append(do_copied(args.steps))
        else:
            do_copied(WARM_UP)
        if rounds == args.rounds:
            raise Enough
        start = time.perf_counter()

    watch_training(name, settings, before_step)
    return tuple(args.steps / np.array(s) for s in seconds.values())


def measure_shares(name: Script, settings, args: Args) -> dict[str, float]:
    """The shares of the script's step that its PARTS take."""
    script, synchronize = import_module(name), synchronizer(args.device)
    spent, inside, start = dict.fromkeys(PARTS, 0.0), False, 0.0

    def timed(part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*values, **options):
            nonlocal inside
            if inside:  # a part of what is being timed
                return function(*values, **options)
            synchronize()
            inside, begin = True, time.perf_counter()
            result = function(*values, **options)
            synchronize()
            spent[part] += time.perf_counter() - begin
            inside = False
            return result

        return call

    def average(*values, **options):
        averaged = make_average(*values, **options)
        averaged.update_parameters = timed("optimizer", averaged.update_parameters)
        return averaged

    def before_step(done: int) -> None:
        nonlocal start
        synchronize()
        if done == WARM_UP:
            spent.update(dict.fromkeys(PARTS, 0.0))
            start = time.perf_counter()
        elif done == WARM_UP + args.steps:
            spent["loss"] = time.perf_counter() - start - sum(spent.values())
            raise Enough

    make_average = getattr(script, "average", None)
    with contextlib.ExitStack() as stack:
        places = [(script, part, "data") for part in ("draw_batch", "to_float", "augment", "paste_patches")]
        places += [(Tensor, "backward", "backward"), (script, "penalised_backward", "backward")]
        places += [(torch.optim.Adam, "step", "optimizer")]
        places += [(torch.optim.swa_utils.AveragedModel, "update_parameters", "optimizer")]
        for owner, function, part in places:
            if hasattr(owner, function):
                wrapped = timed(part, getattr(owner, function))
                stack.enter_context(patch.object(owner, function, wrapped))
        if make_average:  # it replaces AveragedModel's own method
            stack.enter_context(patch.object(script, "average", average))
        watch_training(name, settings, before_step)
    return {part: seconds / sum(spent.values()) for part, seconds in spent.items()}


def measure(name: Script, args: Args) -> Iterator[list[str]]:
    """The table's rows for a script."""
    compiles = args.device == "cuda" and "compile" in import_module(name).Args.__dataclass_fields__
    for options in ({"compile": True}, {}) if compiles else ({},):
        ours, copied = time_rounds(name, script_args(name, args, **options), args)
        cells = [f"{name} --compile" if options else name]
        for values, digits in ((ours, 1), (copied, 1), (ours / copied, 2)):
            low, median, high = (f"{v:.{digits}f}" for v in np.quantile(values, (0.25, 0.5, 0.75)))
            cells += [median, f"{low} to {high}"]
        shares = {} if options else measure_shares(name, script_args(name, args), args)
        yield cells + [f"{shares[part]:.0%}" if shares else "-" for part in PARTS]


def check_data(args: Args) -> None:
    """Leave with one line if the images are not there and cannot be downloaded."""
    load = import_module("cyclegan_mnist_usps").load_domain
    for domain in ("mnist", "usps") if "cyclegan_mnist_usps" in args.scripts else ("mnist",):
        load(domain, args.data_dir, "test", 20)


def main(args: Args) -> None:
    """Measure every script, print the table as it grows, and write it."""
    check_data(args)
    lines = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    def say_row(cells: list[str]) -> None:
        first, *rest = zip(cells, WIDTHS.values())
        say(f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])} |")

    say_row([*WIDTHS])
    say_row(["-" * WIDTHS["script"], *("-" * (width - 1) + ":" for width in [*WIDTHS.values()][1:])])
    for name in args.scripts:
        for row in measure(name, args):
            say_row(row)
    say(f"\nMedians of {args.rounds} rounds of {args.steps} steps; goal: a ratio of {GOALS[args.device]}.")
    say(f"\nMachine: {machine(args)}.")
    say(f"\nCommand: `{shlex.join(['python', *sys.argv])}`")
    if args.markdown:
        path = Path(args.markdown)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Args))
