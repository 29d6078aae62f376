"""cyclegan_mnist_usps.py: buffer, losses and metrics against what is known, and the whole script."""

import bz2
import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cyclegan_mnist_usps as script
from cyclegan_mnist_usps import (
    DIRECTIONS,
    Args,
    Generator,
    ImageBuffer,
    TranslationMetrics,
    cycle_loss,
    frame_usps,
    identity_loss,
    least_squares_loss,
    load_domain,
    main,
    make_discriminator,
    make_generators,
    semantic_loss,
    to_float,
    translate,
)

TINY = {"num_steps": 4, "batch_size": 4, "channels": 2, "num_blocks": 1, "device": "cpu"}
TINY |= {"log_every": 1, "eval_every": 3, "num_eval_samples": 40}
FILES = ["args.json", "checkpoint.pt", "curves.png", "metrics.jsonl", "results.json"]
FILES += ["samples.png", "samples_000003.png", "samples_000004.png"]
NETWORKS = ("generators", "averaged", "discriminators", "buffers")
METRICS = ["label_preservation", "adaptation", "fid", "precision", "recall", "cycle_error"]
UNREACHABLE = {
    name: "http://127.0.0.1:9"
    for p in ("http", "https", "all")
    for name in (f"{p}_proxy", f"{p}_PROXY".upper())
}
UNREACHABLE |= {"no_proxy": None, "NO_PROXY": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One --run-dir for the module, so that judges are trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tiny(runs, tiny_mnist, run_name, monkeypatch):
    """tiny(**options): Args of a small run; its task classifiers take three steps."""
    monkeypatch.setattr(script, "TASK_STEPS", 3)

    def make(**options):
        fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": run_name()}
        return Args(**(TINY | fixed | options))

    return make


@pytest.fixture
def light(monkeypatch):
    """Runs without pictures: they take seconds, which other tests spend."""
    monkeypatch.setattr(script, "save_translations", lambda *args: None)


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the one scalar that the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in lines]


def load(folder: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(first: dict, second: dict) -> bool:
    """Whether two states hold the same tensors."""
    return first.keys() == second.keys() and all(torch.equal(v, second[name]) for name, v in first.items())


def refused(capsys, args: Args) -> str:
    """What main says, in one line, when it refuses these arguments with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return line


# Buffer


def numbered(first: int, count: int) -> torch.Tensor:
    """Images (count, 1, 28, 28) of one shade each: first, first + 1, ..."""
    return torch.arange(first, first + count).float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


def shades(images: torch.Tensor) -> list[float]:
    """The shades of images, each of which has one."""
    assert (images == images[:, :, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def test_buffer_fills_then_exchanges():
    torch.manual_seed(0)
    buffer, size = ImageBuffer(10), 10
    assert shades(buffer(numbered(0, 4))) == [0, 1, 2, 3] and buffer.count == 4
    assert shades(buffer(numbered(4, 4))) == [4, 5, 6, 7] and buffer.count == 8
    out = shades(buffer(numbered(8, 4)))  # two that fill it, and two that may be exchanged
    assert out[:2] == [8, 9] and buffer.count == size
    old = 0
    for step in range(3, 203):
        before, new = shades(buffer.images), shades(numbered(4 * step, 4))
        out = shades(buffer(numbered(4 * step, 4)))
        # Nothing is lost or doubled; an image goes straight through, or an earlier one takes its place.
        assert sorted(out + shades(buffer.images)) == sorted(before + new)
        for place, image in enumerate(out):
            assert image == new[place] or (image in before and new[place] in shades(buffer.images))
            old += image != new[place]
    assert 340 < old < 460  # half of 800, within four standard deviations


@pytest.mark.parametrize("size, batch", [(3, 8), (0, 4), (5, 5)])
def test_buffer_and_batches_of_any_size(size, batch):
    torch.manual_seed(0)
    buffer = ImageBuffer(size)
    for step in range(5):
        before = shades(buffer.images)[: buffer.count]
        out = buffer(numbered(batch * step, batch))
        assert out.shape == (batch, 1, 28, 28)
        held = shades(out) + shades(buffer.images)[: buffer.count]
        assert set(held) == {*before, *shades(numbered(batch * step, batch))}


@pytest.mark.parametrize("count", [4, 6])
def test_buffer_in_a_checkpoint(count):
    """A copy goes on as the first one does, from a buffer that is full or not."""
    torch.manual_seed(0)
    first, second = ImageBuffer(6), ImageBuffer(6)
    first(numbered(0, count))
    second.load_state_dict(first.state_dict())
    assert second.count == first.count == count
    outs = []
    for buffer in (first, second):
        torch.manual_seed(1)
        outs.append(buffer(numbered(90, 4)))
    assert torch.equal(*outs) and torch.equal(first.images, second.images) and second.count == 6


def test_buffer_carries_no_gradient():
    assert not ImageBuffer(3)(torch.ones(5, 1, 28, 28, requires_grad=True) * 2).requires_grad


# Losses


def test_losses_against_their_formulas():
    d = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    x, y = torch.randn(2, 3, 1, 28, 28, dtype=torch.float64)
    found = [least_squares_loss(d, real=True), least_squares_loss(d, real=False)]
    found += [cycle_loss(x, y), identity_loss(x, y)]
    distance = np.abs(x.numpy() - y.numpy()).mean()
    expected = [((d.numpy() - 1) ** 2).mean(), (d.numpy() ** 2).mean(), distance, distance]
    assert [v.item() for v in found] == pytest.approx(expected)
    assert (
        least_squares_loss(torch.ones(2, 3), real=True) == 0 == least_squares_loss(torch.zeros(2), real=False)
    )


def test_semantic_loss_against_its_formula():
    """Minus log-probability of the class that the original is in; nothing flows to the original."""
    z = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    p = np.exp(z[1].detach().numpy())
    p /= p.sum(1, keepdims=True)
    loss = semantic_loss(z[0], z[1])
    assert loss.item() == pytest.approx(-np.log(p[range(5), z[0].argmax(1)]).mean())
    loss.backward()
    assert (z.grad[0] == 0).all() and (z.grad[1] != 0).all()


@pytest.mark.parametrize("loss", [cycle_loss, identity_loss, semantic_loss])
@pytest.mark.parametrize("shapes", [((4, 3), (1, 3)), ((4, 3), (4, 1)), ((4, 3), (4,))])
def test_shapes_that_do_not_fit(loss, shapes):
    """Broadcasting would make a number of them."""
    with pytest.raises(ValueError, match=r"\(4, 3\) and"):
        loss(*map(torch.zeros, shapes))


# Networks


def test_generators_start_at_the_identity():
    """All grey levels come back within 3%, a cycle within twice as much; the network's gradient is alive."""
    torch.manual_seed(0)
    generator = Generator(4, 2)
    images = torch.linspace(-1, 1, 784).view(1, 1, 28, 28)
    out = generator(images)
    torch.testing.assert_close(out, 0.97 * images, atol=1e-6, rtol=0)
    assert cycle_loss(generator(out), images) < 0.06
    (out * torch.randn_like(out)).sum().backward()
    moved = [name for name, p in generator.named_parameters() if p.grad is not None and (p.grad != 0).any()]
    assert {name.split(".")[1] for name in moved} == {
        str(len(generator.net) - 1)
    }  # the zero layer shields the rest


def test_generators_may_start_anywhere():
    """Without the identity start the input does not pass by the network, and every layer learns at once."""
    torch.manual_seed(0)
    generator = Generator(4, 2, identity_start=False)
    images = torch.linspace(-1, 1, 784).view(1, 1, 28, 28)
    out = generator(images)
    torch.testing.assert_close(out, torch.tanh(generator.net(images)))
    assert (out - images).abs().mean() > 0.1
    (out * torch.randn_like(out)).sum().backward()
    assert all((p.grad != 0).any() for name, p in generator.named_parameters() if name.endswith("weight"))


def test_discriminators_see_patches():
    """Without instance normalisation, which looks at the whole image, a verdict depends on 22 x 22 pixels."""
    for spectral_norm in (False, True):
        discriminator = make_discriminator(3, spectral_norm)
        images = torch.randn(2, 1, 28, 28, requires_grad=True)
        assert discriminator(images).shape == (2, 1, 6, 6)
        local = nn.Sequential(*(m for m in discriminator if not isinstance(m, script.InstanceNorm)))
        (grad,) = torch.autograd.grad(local(images)[0, 0, 2, 2], images)
        seen = grad[0, 0].nonzero()
        assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [22, 22] and (grad[1] == 0).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_instance_normalisation_is_torchs(memory_format):
    x = (3 * torch.randn(2, 3, 4, 5, dtype=torch.float64) + 7).to(memory_format=memory_format)
    x.requires_grad_()
    ours, theirs = script.InstanceNorm()(x), torch.nn.functional.instance_norm(x)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad((y**3).sum(), x)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads)
    assert torch.autograd.gradcheck(script.InstanceNorm(), x)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad((script.InstanceNorm()(x) ** 3).sum(), x, create_graph=True)
        grad.sum().backward()


def test_spectral_norm_bounds_the_weights():
    torch.manual_seed(0)
    discriminator = make_discriminator(3, True)
    for _ in range(50):
        discriminator(torch.randn(2, 1, 28, 28))
    norms = [
        torch.linalg.matrix_norm(m.weight.flatten(1), 2) for m in discriminator if isinstance(m, nn.Conv2d)
    ]
    torch.testing.assert_close(torch.stack(norms), torch.ones(4), atol=0.02, rtol=0)


def test_networks_do_not_mix_images():
    """Real and fake ones go through together: each comes out as it would alone."""
    torch.manual_seed(0)
    images = torch.rand(3, 1, 28, 28) * 2 - 1
    generator = Generator(2, 1)
    nn.init.normal_(generator.net[-1].weight)
    for network in (generator, make_discriminator(2, False)):
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(network(images), alone, atol=1e-4, rtol=1e-4)


# Data


def test_domains_as_they_are_read(tiny_mnist):
    """Both have 28 x 28 pixels and labels 0 to 9, and a bar of the right class in the right place."""
    for name, sizes in (("mnist", (240, 60)), ("usps", (120, 40))):
        x, y, x_eval, y_eval = load_domain(name, str(tiny_mnist), "test", 20)
        assert (len(x), len(x_eval)) == sizes
        for images, labels in ((x, y), (x_eval, y_eval)):
            assert images.shape == (len(labels), 28, 28) and images.dtype == torch.uint8
            assert labels.dtype == torch.int64 and torch.equal(labels, torch.arange(len(labels)) % 10)
            rows = images[:, :, 4:24].float().mean(2)
            bars = rows.argmax(1)  # those of USPS move a little towards the middle
            assert ((bars - 4.5 - 2 * labels).abs() < (2 if name == "mnist" else 4)).all()
            assert torch.stack((bars.float(), labels.float())).corrcoef()[0, 1] > 0.98


@pytest.mark.parametrize("name, n", [("mnist", 240), ("usps", 120)])
def test_validation_leaves_the_test_images_alone(name, n, tiny_mnist):
    x, y, *_ = load_domain(name, str(tiny_mnist), "test", 20)
    parts = load_domain(name, str(tiny_mnist), "validation", 20)
    assert len(parts[0]) == n * 5 // 6
    assert torch.equal(torch.cat(parts[::2]), x) and torch.equal(torch.cat(parts[1::2]), y)


def test_usps_is_unpacked_once(tiny_mnist, tmp_path, monkeypatch):
    """From then on its images come from the run folder, unless that is damaged or the files are others."""
    data, runs = tmp_path / "data", tmp_path / "runs"
    shutil.copytree(tiny_mnist, data)
    read, calls = script.read_domain, []
    monkeypatch.setattr(script, "read_domain", lambda *args, **kw: calls.append(args) or read(*args, **kw))

    def load(split="test"):
        parts = load_domain("usps", str(data), split, 20, str(runs))
        plain = load_domain("usps", str(data), split, 20)
        assert all(torch.equal(a, b) for a, b in zip(parts, plain, strict=True))
        times = len(calls) - 1  # but for the plain one
        calls.clear()
        return times

    assert load() == 1
    (kept,) = runs.glob("usps__*.pt")
    assert load() == load("validation") == 0
    kept.write_bytes(kept.read_bytes()[:100])
    assert load() == 1 and load() == 0
    (data / "usps.bz2").write_bytes((data / "usps.t.bz2").read_bytes())
    assert load() == 1 and load() == 0 and len(list(runs.glob("usps__*.pt"))) == 2
    runs = tmp_path / "file"
    runs.touch()  # nowhere to keep it
    assert load() == load() == 1


@pytest.mark.parametrize("size", [16, 20, 21, 28])
def test_frame(size):
    images = torch.full((2, 16, 16), 200, dtype=torch.uint8)
    images[1, :, :8] = 0  # its mass lies to the right, and comes back to the middle
    framed, before = frame_usps(images, size), round(14 - (size - 1) / 2)
    before = min(before, 28 - size)
    assert framed.shape == (2, 28, 28) and framed.dtype == torch.uint8
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[before : before + size, before : before + size] = True
    assert (framed[0, inside] == 200).all() and (framed[0, ~inside] == 0).all()
    mass = framed[1].float().sum(0)
    column = (mass * torch.arange(28)).sum() / mass.sum()
    furthest = 28 - size  # the frame's end, where a large image stops
    moved = round(14 - size * 0.75)
    assert column == pytest.approx(14 if moved > 0 else size * 0.75 - 0.5, abs=1) and furthest >= 0
    images = torch.randint(0, 256, (3, 16, 16)).to(torch.uint8)
    for image, one in zip(images, frame_usps(images, 16)):
        rows, columns = (one.sum(dim).nonzero().squeeze(1)[0] for dim in (1, 0))
        assert torch.equal(one[rows : rows + 16, columns : columns + 16], image)


def test_frame_of_nothing_is_black():
    assert not frame_usps(torch.zeros(1, 16, 16, dtype=torch.uint8), 20).any()


# Metrics


def bars(n: int) -> list[torch.Tensor]:
    """x, y, x_eval, y_eval, n of each, as in write_mnist_like: a label is the place of a bar."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 90, (2 * n, 28, 28), generator=rng)
    labels = torch.randint(0, 10, (2 * n,), generator=rng)
    for image, label in zip(images, labels.tolist()):
        image[4 + 2 * label : 6 + 2 * label, 4:24] += 160
    images = images.to(torch.uint8)
    return [images[:n], labels[:n], images[n:], labels[n:]]


class Map(nn.Module):
    """A generator that is a function."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def rolled(rows: int) -> Map:
    """Every bar moved to the place of another class, round about."""

    def roll(images):
        return torch.cat((images[:, :, :4], images[:, :, 4:24].roll(rows, 2), images[:, :, 24:]), 2)

    return Map(roll)


@pytest.fixture(scope="module")
def measure(runs):
    """measure(there, back) of two identical domains of 200 + 200 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "TASK_STEPS", 30)
        patch.setattr(script, "augment", lambda images: images)  # the place of a bar is its class
        domain = bars(200)
        metrics = TranslationMetrics(Args(run_dir=str(runs)), {"mnist": domain, "usps": domain})
        measured = lambda there, back: metrics(dict(zip(DIRECTIONS, (there, back))))  # noqa: E731
        measured.facts = metrics.facts
        yield measured


def test_metrics_of_identical_domains(measure):
    """Identity networks: no cycle error, every label preserved, and real images are like real images."""
    found = measure(nn.Identity(), nn.Identity())
    assert list(found) == [f"{d}_{name}" for d in DIRECTIONS for name in METRICS]
    for direction in DIRECTIONS:
        assert found[f"{direction}_cycle_error"] == 0
        assert found[f"{direction}_label_preservation"] > 0.98 and found[f"{direction}_adaptation"] > 0.9
        assert measure.facts[f"{direction}_source_only"] == found[f"{direction}_label_preservation"]
        assert found[f"{direction}_fid"] == pytest.approx(0, abs=0.01)
        assert found[f"{direction}_precision"] == found[f"{direction}_recall"] == 1


def test_metrics_see_what_the_cycle_does_not(measure):
    """Swapped digits: nothing is wrong with the images or the cycle, and every label is lost."""
    found = measure(rolled(2), rolled(-2))
    for direction in DIRECTIONS:
        assert found[f"{direction}_cycle_error"] == 0 and found[f"{direction}_precision"] > 0.7
        assert found[f"{direction}_label_preservation"] < 0.05 and found[f"{direction}_adaptation"] < 0.1


def test_metrics_of_shuffled_labels(measure):
    """A translation to the image of any digit, there: 10% by chance; and none back."""
    torch.manual_seed(0)
    found = measure(Map(lambda images: images[torch.randperm(len(images))]), nn.Identity())
    assert found["mnist2usps_label_preservation"] == pytest.approx(0.1, abs=0.06)
    assert found["usps2mnist_label_preservation"] > 0.98
    assert found["mnist2usps_fid"] == pytest.approx(0, abs=0.01) and found["mnist2usps_cycle_error"] > 0.1


# The script


@pytest.mark.curves
def test_a_run_and_what_it_leaves(tiny):
    folder = main(tiny())
    assert sorted(p.name for p in folder.iterdir()) == FILES
    results, lines = json.loads((folder / "results.json").read_text()), rows(folder)
    for direction in DIRECTIONS:
        assert {f"{direction}_{name}" for name in [*METRICS, "source_only"]} < results.keys()
    assert {"mnist_judge_accuracy", "usps_judge_accuracy", "mnist_floor_fid"} < results.keys()
    assert [line["step"] for line in lines if "usps2mnist_label_preservation" in line] == [3, 4]
    assert [line["step"] for line in lines if "usps2mnist_adaptation" in line] == [3, 4]
    losses = {"loss_generator", "loss_discriminator", "adversarial", "cycle", "identity"}
    assert all(losses < line.keys() for line in lines)
    with Image.open(folder / "samples.png") as image:
        assert image.size == (2 + 20 * 30, 2 + 6 * 30)
        assert len(np.unique(np.asarray(image))) > 20


OPTIONS = [
    {"semantic_consistency": "mnist"},
    {"semantic_consistency": "usps", "semantic_weight": 0.5, "augment": True},
    {"spectral_norm": True, "eval_split": "validation", "identity_start": False},
    {"augment": True, "lr_decay": 0.0, "ema_decay": 0.0},
    {"identity_weight": 0.0, "cycle_weight": 0.0, "usps_size": 28},
    {"num_blocks": 3, "beta1": 0.0, "lr_generator": 1e-4, "lr_discriminator": 1e-4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_every_option(options, tiny, light, monkeypatch):
    """A run ends, its losses are finite, what was asked for was used, and all weights have moved."""
    calls, halves = [], []
    spied = lambda *a, **k: halves.append(least_squares_loss(*a, **k)) or halves[-1]  # noqa: E731
    monkeypatch.setattr(script, "least_squares_loss", spied)
    for name in ("augment", "semantic_loss", "train_classifier"):
        function = getattr(script, name)
        called = lambda *a, name=name, function=function, **k: calls.append(name) or function(*a, **k)  # noqa: E731
        monkeypatch.setattr(script, name, called)
    args = tiny(num_steps=3, num_eval_samples=0, **options)
    folder = main(args)
    lines, state = rows(folder), load(folder)
    assert len(lines) == 3 and all(math.isfinite(v) for line in lines for v in line.values())
    semantic = args.semantic_consistency != "none"
    assert calls.count("semantic_loss") == 3 * semantic and calls.count("train_classifier") == semantic
    # Augmented are both batches of three steps and, twice, the three of the classifier.
    assert calls.count("augment") == 6 * args.augment + 6 * semantic
    assert all(("semantic" in line) == semantic for line in lines)
    weights = 1, args.cycle_weight, args.identity_weight, args.semantic_weight * semantic
    for line in lines:
        parts = (line.get(name, 0) for name in ("adversarial", "cycle", "identity", "semantic"))
        assert line["loss_generator"] == pytest.approx(sum(w * v for w, v in zip(weights, parts)), rel=1e-4)
    for i, line in enumerate(
        lines
    ):  # after the generators' two verdicts of a step, real and fake of both domains
        halved = sum(loss.item() for loss in halves[6 * i + 2 : 6 * i + 6]) / 2
        assert line["loss_discriminator"] == pytest.approx(halved, rel=1e-5)
    torch.manual_seed(args.seed)
    generators = make_generators(args)
    discriminators = {
        name: make_discriminator(args.channels, args.spectral_norm) for name in ("mnist", "usps")
    }
    for key, parameter in generators.named_parameters():
        # A constant before instance normalisation has no effect.
        if key.endswith("weight") or key.startswith(
            tuple(f"{d}.net.{len(generators[d].net) - 1}" for d in DIRECTIONS)
        ):
            assert not torch.equal(parameter, state["generators"][key]), key
    for name, discriminator in discriminators.items():
        for key, parameter in discriminator.named_parameters():
            if "weight" in key:
                assert not torch.equal(parameter, state["discriminators"][f"{name}.{key}"]), key


def test_no_label_is_used_by_default(tiny, light, monkeypatch):
    """Without evaluation, a run with other labels is the same run; with semantic consistency it is not."""
    read = script.load_domain

    def relabelled(*where):
        x, y, *held = read(*where)
        return [x, 9 - y, *held]

    for consistency, alike in (("none", True), ("mnist", False)):
        options = {"num_eval_samples": 0, "num_steps": 3, "semantic_consistency": consistency}
        first = main(tiny(**options))
        with monkeypatch.context() as patch:
            patch.setattr(script, "load_domain", relabelled)
            second = main(tiny(**options))
        assert (rows(first) == rows(second)) == alike
        assert same(load(first)["averaged"], load(second)["averaged"]) == alike


@pytest.mark.parametrize("domain", ["mnist", "usps"])
def test_semantic_classifier_knows_one_domain(domain, tiny, light, monkeypatch):
    seen, train = [], script.train_classifier
    monkeypatch.setattr(
        script, "train_classifier", lambda x, y, seed: seen.append((x, y)) or train(x, y, seed)
    )
    args = tiny(num_steps=1, num_eval_samples=0, semantic_consistency=domain)
    main(args)
    x, y, *_ = load_domain(domain, args.data_dir, "test", args.usps_size)
    assert len(seen) == 1 and torch.equal(seen[0][0], x) and torch.equal(seen[0][1], y)


def test_learning_rates_fall(tiny, light):
    options = {"lr_generator": 1e-3, "lr_discriminator": 2e-3, "lr_decay": 1.0}
    state = load(main(tiny(num_steps=2, num_eval_samples=0, **options)))
    assert [
        state[f"opt_{n}"]["param_groups"][0]["lr"] for n in ("generator", "discriminator")
    ] == pytest.approx([5e-4, 1e-3])


def test_same_seed_same_run(tiny, light):
    first, second, third = (main(tiny(num_eval_samples=0, seed=seed)) for seed in (1, 1, 2))
    assert rows(first) == rows(second) != rows(third)
    assert all(same(load(first)[name], load(second)[name]) for name in NETWORKS)


def test_training_learns(tiny, light):
    """Where one domain is the other, darkened, some steps bring translations much nearer to their targets."""
    read = script.load_domain
    shade = {"mnist": 1.0, "usps": 0.5}

    def darkened(domain, data_dir, *rest):
        parts = read("mnist", data_dir, *rest)
        parts[::2] = ((v * shade[domain]).to(torch.uint8) for v in parts[::2])
        return parts

    options = {"num_steps": 80, "log_every": 20, "eval_every": 80, "num_eval_samples": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_domain", darkened)
        args = tiny(**options, batch_size=8, lr_generator=4e-3, lr_discriminator=4e-3, ema_decay=0.9)
        state = load(main(args))
    averaged = script.average(make_generators(args), 0.9)
    averaged.load_state_dict(state["averaged"])
    light_ones, dark = (darkened(name, args.data_dir, "test", 20)[2] for name in ("mnist", "usps"))
    for direction, source, target in (("mnist2usps", light_ones, dark), ("usps2mnist", dark, light_ones)):
        before = cycle_loss(to_float(source), to_float(target))
        after = cycle_loss(translate(averaged.module[direction], source), to_float(target))
        assert after < 0.85 * before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_eval_samples": 20, "eval_every": 2, "num_steps": 8},
        {"semantic_consistency": "usps", "spectral_norm": True, "augment": True},
    ],
    ids=str,
)
def test_resume_is_bit_for_bit(options, tiny, light, monkeypatch):
    """A run stopped after 4 of 6 steps and resumed is one that was not stopped, buffers and all."""
    monkeypatch.setattr(script, "BUFFER_SIZE", 10)
    options = {"num_steps": 6, "num_eval_samples": 0, **options}
    straight, args = main(tiny(**options)), tiny(**options)
    draw, calls = script.draw_batch, itertools.count(1)

    def interrupted(*inputs):
        if next(calls) == 8:  # two batches a step
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(script, "draw_batch", interrupted)
        with pytest.raises(SystemExit) as stop:
            main(args)
    assert stop.value.code == 130
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    state = load(folder)
    assert state["step"] == 4 and (state["buffers"]["usps.images"] != 0).any()
    torch.manual_seed(1234)
    assert main(Args(resume=str(folder))) == folder
    assert rows(folder) == rows(straight)
    assert all(same(load(folder)[name], load(straight)[name]) for name in (*NETWORKS, "classifier"))


# Generate


@pytest.fixture(scope="module")
def finished(runs, tiny_mnist) -> Path:
    """A run of a few steps with large ones, so that it changes images visibly."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_curves", "save_translations"):
            patch.setattr(script, name, lambda *args: None)
        fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": "finished"}
        fixed |= {"num_eval_samples": 0, "lr_generator": 0.05}
        return main(Args(**(TINY | fixed)))


def pixels(folder: Path) -> np.ndarray:
    """The written images (n, 28, 28) in the order of their names."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def translations(folder: Path, direction: str, images: torch.Tensor) -> np.ndarray:
    """What a run's averaged generator makes of images (n, 28, 28), as pixels."""
    state = load(folder)
    averaged = script.average(make_generators(Args(**state["args"])), 0.9)
    averaged.load_state_dict(state["averaged"])
    made = translate(averaged.module[direction], images)
    return ((made.squeeze(1) + 1) * 127.5).round().byte().numpy()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_generate_from_the_test_set(direction, finished, tiny_mnist, tmp_path, capsys):
    fixed = {"generate": 12, "direction": direction, "checkpoint": str(finished / "checkpoint.pt")}
    out = main(Args(**fixed, device="cpu", out=str(tmp_path / "out")))
    assert sorted(p.name for p in out.iterdir()) == [f"{i:06d}.png" for i in range(12)]
    source = load_domain(direction.split("2")[0], str(tiny_mnist), "test", 20)[2][:12]
    expected = translations(finished, direction, source)
    assert np.array_equal(pixels(out), expected)
    assert np.abs(expected.astype(float) - source.numpy()).mean() > 4  # more than the identity's 3%
    assert "exists; name a new folder" in refused(capsys, Args(**fixed, out=str(out)))


def write_pngs(folder: Path, images: torch.Tensor, **options) -> None:
    """Images (n, h, w) as PNG files a0.png, a1.png, ..."""
    folder.mkdir()
    for i, image in enumerate(images.to(torch.uint8).numpy()):
        Image.fromarray(image).convert(options.get("mode", "L")).save(folder / f"a{i}.png")


@pytest.mark.parametrize(
    "direction, side, mode", [("mnist2usps", 28, "RGB"), ("usps2mnist", 28, "L"), ("usps2mnist", 16, "L")]
)
def test_generate_from_a_folder(direction, side, mode, finished, tmp_path):
    """Names stay, A0.PNG too; of USPS 16 x 16 pixels are taken as well, and framed as in the run."""
    images = torch.randint(0, 256, (5, side, side)).to(torch.uint8)
    write_pngs(tmp_path / "in", images, mode=mode)
    (tmp_path / "in" / "a0.png").rename(tmp_path / "in" / "A0.PNG")
    options = {"input": str(tmp_path / "in"), "direction": direction, "out": str(tmp_path / "out")}
    out = main(Args(**options, checkpoint=str(finished / "checkpoint.pt"), device="cpu"))
    assert sorted(p.name for p in out.iterdir()) == ["A0.PNG", *(f"a{i}.png" for i in range(1, 5))]
    framed = frame_usps(images, load(finished)["args"]["usps_size"]) if side == 16 else images
    assert np.array_equal(pixels(out), translations(finished, direction, framed))


def test_generate_what_cannot_be(finished, tmp_path, capsys):
    checkpoint, out = str(finished / "checkpoint.pt"), str(tmp_path / "out")
    fixed = {"checkpoint": checkpoint, "out": out, "device": "cpu"}
    said = refused(capsys, Args(generate=41, direction="usps2mnist", **fixed))
    assert "--generate 41: usps has 40 test images" in said
    assert "no folder with PNG files" in refused(capsys, Args(input=str(tmp_path / "none"), **fixed))
    write_pngs(tmp_path / "small", torch.zeros(1, 16, 16))
    said = refused(capsys, Args(input=str(tmp_path / "small"), **fixed))
    assert "a0.png has 16 x 16 pixels, not 28 x 28" in said
    write_pngs(tmp_path / "wide", torch.zeros(1, 28, 30))
    said = refused(capsys, Args(input=str(tmp_path / "wide"), direction="usps2mnist", **fixed))
    assert "a0.png has 30 x 28 pixels, not 16 x 16 or 28 x 28" in said
    Image.fromarray(np.full((28, 28), 300, np.uint16)).save(tmp_path / "wide" / "a0.png")
    assert "a0.png has more than 8 bits" in refused(capsys, Args(input=str(tmp_path / "wide"), **fixed))
    (tmp_path / "wide" / "a0.png").write_bytes(b"no picture")
    assert "a0.png is no picture" in refused(capsys, Args(input=str(tmp_path / "wide"), **fixed))
    assert not (tmp_path / "out").exists()


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": 0}, "--num-steps must be positive, not 0"),
        ({"batch_size": -1}, "--batch-size must be positive, not -1"),
        ({"num_blocks": 0}, "--num-blocks must be positive, not 0"),
        ({"cycle_weight": -1.0}, r"--cycle-weight must be in \[0, inf\), not -1.0"),
        ({"identity_weight": math.nan}, r"--identity-weight must be in \[0, inf\), not nan"),
        ({"semantic_weight": math.inf}, r"--semantic-weight must be in \[0, inf\), not inf"),
        ({"usps_size": 29}, r"--usps-size must be in \[8, 28\], not 29"),
        ({"lr_generator": 0.0}, "--lr-generator must be positive, not 0.0"),
        ({"beta1": 1.0}, "--beta1 must be in"),
        ({"num_eval_samples": 5}, "--num-eval-samples must be 0 or at least 10, not 5"),
        ({"semantic_weight": 2.0}, "--semantic-weight is for --semantic-consistency"),
        ({"direction": "usps2mnist"}, "--generate or "),
        ({"checkpoint": "x"}, "--generate or "),
        ({"generate": 3}, "--checkpoint and --out go together with"),
        ({"input": "x", "checkpoint": "x"}, "--checkpoint and --out go together with"),
        ({"generate": 3, "input": "x", "checkpoint": "x", "out": "x"}, "--generate or with --input"),
        ({"generate": -1}, r"--generate must be in \[0, inf\), not -1"),
    ],
)
def test_values_that_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        Args(**options)


def test_bad_options_of_the_command(run_cli, tmp_path):
    result = run_cli("--usps-size", "40", "--device", "cpu", script="cyclegan_mnist_usps.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "--usps-size must be in [8, 28], not 40" in result.stderr and not (tmp_path / "runs").exists()


def test_batch_larger_than_a_domain(tiny, tmp_path, capsys):
    said = refused(capsys, tiny(batch_size=121, run_dir=str(tmp_path / "runs")))
    assert "--batch-size 121 exceeds the 120" in said
    assert [path.name.split("__")[0] for path in (tmp_path / "runs").iterdir()] == ["usps"]  # no run


def test_usps_missing_and_no_network(run_cli, tiny_mnist, tmp_path):
    """As a command: the line says what is missing and where it would go."""
    shutil.copytree(tiny_mnist / "MNIST", tmp_path / "some" / "MNIST")
    shutil.copy(tiny_mnist / "usps.bz2", tmp_path / "some")  # and not usps.t.bz2
    result = run_cli("--data-dir", "some", env=UNREACHABLE, script="cyclegan_mnist_usps.py")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "usps is missing or damaged in some" in line and "--data-dir" in line
    assert not (tmp_path / "runs").exists()


def test_mnist_missing_and_no_network(tiny, tmp_path, monkeypatch, capsys):
    for name, value in UNREACHABLE.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    said = refused(capsys, tiny(data_dir=str(tmp_path / "none"), run_dir=str(tmp_path / "runs")))
    assert f"mnist is missing or damaged in {tmp_path / 'none' / 'MNIST' / 'raw'}" in said
    assert "--dataset" not in said and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["usps.bz2", "usps.t.bz2"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"<html>not found</html>" * 50,
        lambda b: bz2.compress(bz2.decompress(b)[:-50]),
        lambda b: bz2.compress(b"1" + bz2.decompress(b)),
        lambda b: bz2.compress(b"0" + bz2.decompress(b)[1:]),
    ],
    ids=["truncated", "empty", "text", "short", "label 11", "label 0"],
)
def test_damaged_usps_files(name, damage, tiny, tiny_mnist, tmp_path, capsys):
    shutil.copytree(tiny_mnist / "MNIST", tmp_path / "MNIST")
    for file in ("usps.bz2", "usps.t.bz2"):
        whole = (tiny_mnist / file).read_bytes()
        (tmp_path / file).write_bytes(damage(whole) if file == name else whole)
    said = refused(capsys, tiny(data_dir=str(tmp_path), run_dir=str(tmp_path / "runs")))
    assert f"usps is missing or damaged in {tmp_path} " in said and "delete damaged files" in said
    assert not (tmp_path / "runs").exists() and (tmp_path / name).exists()


def test_damaged_mnist_files(tiny, tiny_mnist, tmp_path, capsys):
    shutil.copytree(tiny_mnist, tmp_path, dirs_exist_ok=True)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"")
    said = refused(capsys, tiny(data_dir=str(tmp_path), run_dir=str(tmp_path / "runs")))
    assert f"mnist is missing or damaged in {tmp_path / 'MNIST' / 'raw'} " in said
    assert not (tmp_path / "runs").exists()


def test_resume_with_what_cannot_change(finished, capsys):
    for name, value in (("semantic_consistency", "mnist"), ("usps_size", 28), ("spectral_norm", True)):
        said = refused(capsys, Args(resume=str(finished), **{name: value}))
        assert f"--{name.replace('_', '-')} {value}: the run has" in said


def test_learning_rate_that_explodes(tiny, light, capsys):
    args = tiny(num_steps=60, lr_generator=1e30, lr_discriminator=1e30, log_every=30, num_eval_samples=0)
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2 and "not finite at step" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_trains(tiny, tmp_path):
    folder = main(tiny(device="cuda", semantic_consistency="mnist"))
    main(Args(resume=str(folder), num_steps=5))
    assert rows(folder)[-1]["step"] == 5
    options = {"generate": 12, "checkpoint": str(folder / "checkpoint.pt"), "out": str(tmp_path / "out")}
    assert len(pixels(main(Args(**options)))) == 12
