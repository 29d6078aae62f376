"""sgan_mnist.py and baseline_cnn.py: the draw of labels, each loss term, and both scripts from end to end."""

import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import baseline_cnn
import sgan_mnist
from sgan_mnist import split_labels

SCRIPTS = pytest.mark.parametrize("script", [sgan_mnist, baseline_cnn], ids=["sgan", "baseline"])
TINY = {"num_labels": 20, "num_steps": 4, "batch_size": 8, "channels": 4, "log_every": 1, "eval_every": 3}
SGAN = {"label_batch_size": 6, "latent_dim": 8, "num_eval_samples": 60}
FILES = {"args.json", "metrics.jsonl", "samples.png", "samples_000003.png", "samples_000004.png"}
FILES |= {"curves.png", "confusion.png", "checkpoint.pt", "results.json"}
CLOCK = {"steps_per_second", "train_seconds"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """One --run-dir for the module, so that a judge is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tiny(runs, tiny_mnist, run_name):
    """tiny(script, **options): Args of a small run of that script."""

    def make(script, **options):
        fixed = {"run_dir": str(runs), "data_dir": str(tiny_mnist), "exp_name": run_name(), "device": "cpu"}
        return script.Args(**TINY | (SGAN if script is sgan_mnist else {}) | fixed | options)

    return make


def rows(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def load(folder: Path) -> dict:
    """A run's checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def tensors(value) -> list[torch.Tensor]:
    """All tensors in nested dictionaries and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def assert_complete(folder: Path) -> None:
    """Every file that a run leaves is there and readable, and all of its numbers are finite."""
    assert {path.name for path in folder.iterdir()} == FILES
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert len(np.unique(np.asarray(image))) > 1
    for row in [*rows(folder), json.loads((folder / "results.json").read_text())]:
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, int | float))
    assert all(t.isfinite().all() for t in tensors(load(folder)) if t.is_floating_point())


# The draw of the labels


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    """1,200 labels of ten classes of different size."""
    shares = torch.tensor([0.8, 1.2, 1.0, 1.0, 0.9, 0.7, 1.0, 1.3, 1.0, 1.1])
    return torch.multinomial(shares, 1200, True, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("num_labels", [10, 20, 100, 500])
def test_split_is_balanced_and_disjoint(num_labels, labels):
    labelled, rest = split_labels(labels, num_labels, 1)
    assert labels[labelled].bincount().tolist() == [num_labels // 10] * 10
    assert torch.equal(torch.cat((labelled, rest)).sort().values, torch.arange(len(labels)))


def test_split_depends_on_the_label_seed_alone(labels):
    first = split_labels(labels, 100, 3)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, split_labels(labels, 100, 3)))
    assert torch.equal(state, torch.get_rng_state())
    draws = {tuple(sorted(split_labels(labels, 100, seed)[0].tolist())) for seed in range(10)}
    assert len(draws) == 10


def test_split_of_fewer_labels_is_part_of_that_of_more(labels):
    few, many = (set(split_labels(labels, n, 5)[0].tolist()) for n in (20, 200))
    assert few < many


def test_split_with_all_labels(labels):
    labelled, rest = split_labels(labels, len(labels), 1)
    assert len(rest) == 0 and len(labelled.unique()) == len(labels)


@pytest.mark.parametrize(
    "num_labels, texts",
    [(105, ["multiple of the 10 classes", "105"]), (1210, ["1210", "exceeds", "1200"]), (1100, ["balanced"])],
)
def test_split_that_cannot_be(num_labels, texts, labels, capsys):
    with pytest.raises(SystemExit) as stop:
        split_labels(labels, num_labels, 1)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and all(text in err for text in texts)


@SCRIPTS
def test_label_seed_is_the_seed_unless_given(script):
    assert script.Args(seed=4).label_seed == 4 and script.Args(seed=4, label_seed=2).label_seed == 2


def test_both_scripts_see_the_same_labels_whatever_the_training_seed(tiny, monkeypatch):
    drawn = []
    for script in (sgan_mnist, baseline_cnn):
        split = script.split_labels

        def spy(*args, split=split):
            drawn.append(split(*args))
            raise LookupError

        monkeypatch.setattr(script, "split_labels", spy)
        for seed in (1, 2):
            with pytest.raises(LookupError):
                script.main(tiny(script, seed=seed, label_seed=9))
    assert len(drawn) == 4
    assert all(torch.equal(a, b) for pair in drawn for a, b in zip(pair, drawn[0]))


# Augmentation


def test_augmentation_keeps_shape_range_and_black():
    torch.manual_seed(0)
    images = torch.rand(50, 1, 28, 28) * 2 - 1
    out = sgan_mnist.augment(images)
    assert out.shape == images.shape and out.dtype == images.dtype
    assert out.min() >= -1 and out.max() <= 1 + 1e-6
    black = torch.full((5, 1, 28, 28), -1.0)
    assert torch.equal(sgan_mnist.augment(black), black)
    one = images[:1].expand(2, -1, -1, -1)
    assert not torch.equal(*sgan_mnist.augment(one))


def test_augmentation_moves_by_a_few_pixels():
    """The centre of a bright square moves by up to 1.5 pixels in both directions, and its mass stays near."""
    torch.manual_seed(0)
    images = torch.full((500, 1, 28, 28), -1.0)
    images[:, :, 11:17, 11:17] = 1
    mass = (sgan_mnist.augment(images).squeeze(1) + 1) / 2
    place = torch.arange(28.0) - 13.5
    centres = torch.stack([(mass.sum(axis) * place).sum(1) / mass.sum((1, 2)) for axis in (1, 2)], 1)
    assert 1.2 < centres.abs().max() < 1.9 and (centres.std(0) > 0.7).all()
    assert (centres.mean(0).abs() < 0.2).all()
    assert (mass.sum((1, 2)) > 36 * 0.8).all() and (mass.sum((1, 2)) < 36 * 1.25).all()


def test_augmentation_is_differentiable():
    images = torch.rand(2, 1, 6, 6, dtype=torch.float64, requires_grad=True)

    def seeded(x):
        torch.manual_seed(1)
        return sgan_mnist.augment(x)

    assert torch.autograd.gradcheck(seeded, (images,))


def test_patches_are_rectangles_of_another_image():
    """Image i has the level i everywhere: what a patch shows is another level, and never a lower one."""
    torch.manual_seed(0)
    levels = torch.linspace(-1, 1, 200).view(-1, 1, 1, 1)
    images = levels.expand(-1, 1, 28, 20)
    out = sgan_mnist.paste_patches(images, 1.0)
    assert out.shape == images.shape and out.dtype == images.dtype
    changed = (out != images).squeeze(1)
    touched = changed.flatten(1).any(1)
    assert 60 < touched.sum() < 140  # half of all the other images are lighter
    for image, patch in zip(out[touched].squeeze(1), changed[touched]):
        rows, columns = patch.any(1).nonzero().flatten(), patch.any(0).nonzero().flatten()
        sides = {int(places[-1] - places[0]) + 1 for places in (rows, columns)}
        assert sides <= set(range(4, 9)) and patch.sum() == len(rows) * len(columns)
        shown = image[patch]
        assert (shown == shown[0]).all() and (shown[0] > image[~patch][0]) and (shown[0] == levels).any()
    assert changed.any(0)[4:-4, 4:-4].float().mean() > 0.9  # anywhere
    assert torch.equal(sgan_mnist.paste_patches(images, 0.0), images)
    touched = (sgan_mnist.paste_patches(images, 0.3) != images).flatten(1).any(1)
    assert 10 < touched.sum() < 55


def test_patches_fade_by_half_of_the_run(tiny, monkeypatch):
    shares, paste = [], sgan_mnist.paste_patches
    spy = lambda images, share: shares.append(float(share)) or paste(images, share)  # noqa: E731
    monkeypatch.setattr(sgan_mnist, "paste_patches", spy)
    sgan_mnist.main(tiny(sgan_mnist, num_eval_samples=0, num_steps=6, paste=0.6))
    # Real images, fakes for the classifier, and fakes for the generator.
    assert shares == pytest.approx([0.4] * 3 + [0.2] * 3)
    sgan_mnist.main(tiny(sgan_mnist, num_eval_samples=0, num_steps=1, paste=0.0))
    sgan_mnist.main(tiny(sgan_mnist, num_eval_samples=0, num_steps=3, augment=False))
    assert len(shares) == 6


# Evaluation


class Brightness(torch.nn.Module):
    """Logits (n, 12) by which black is of class 0 with 2 / 3, and any light of class 1 with 0.99."""

    def forward(self, images):
        black = torch.tensor([2.0, 1.0, *[1e-9] * 8, 99.0, 99.0]).log()
        light = torch.tensor([0.01, 0.99, *[1e-9] * 8, 99.0, 99.0]).log()
        return None, torch.where((images > -1).flatten(1).any(1, keepdim=True), light, black)


def test_classify_takes_the_mean_probability_of_views(monkeypatch):
    """As it is the lit image is of class 1, in views gone black of class 0, which the third view decides."""
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[0, 5, 5] = 255
    monkeypatch.setattr(sgan_mnist, "augment", lambda images: torch.full_like(images, -1.0))
    metrics, found = sgan_mnist.classify(Brightness(), images, torch.tensor([0, 1]), views=0)
    assert metrics == {"accuracy": 0.0, "errors": 2} and found.tolist() == [1, 0]
    metrics, found = sgan_mnist.classify(Brightness(), images, torch.tensor([0, 1]), views=2)
    assert metrics == {"accuracy": 0.0, "errors": 2, "single_errors": 2} and found.tolist() == [1, 0]
    metrics, found = sgan_mnist.classify(Brightness(), images, torch.tensor([0, 1]), views=3)
    assert metrics == {"accuracy": 0.5, "errors": 1, "single_errors": 2} and found.tolist() == [0, 0]


def test_classify_draws_the_same_views_each_time():
    """And none of the numbers of the training."""
    seen = []

    class Spy(Brightness):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    images = torch.randint(256, (3, 28, 28), dtype=torch.uint8)
    before = torch.get_rng_state()
    for _ in range(2):
        sgan_mnist.classify(Spy(), images, torch.zeros(3, dtype=torch.long), views=2)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:])) and not torch.equal(seen[1], seen[2])


# Loss terms, in float64


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (7, 10) and (5, 10) in float64 that ask for gradients."""
    torch.manual_seed(0)
    return tuple((3 * torch.randn(n, 10, dtype=torch.float64)).requires_grad_() for n in (7, 5))


def test_discriminator_and_generator_loss(logits):
    """Against -log D and -log(1 - D) with D = Z / (Z + 1)."""
    d_real, d_fake = (z.exp().sum(1) / (z.exp().sum(1) + 1) for z in logits)
    expected = -d_real.log().mean() - (1 - d_fake).log().mean()
    torch.testing.assert_close(sgan_mnist.discriminator_loss(*logits), expected)
    torch.testing.assert_close(sgan_mnist.generator_loss(logits[1]), -d_fake.log().mean())
    assert torch.autograd.gradcheck(sgan_mnist.discriminator_loss, logits)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_losses_of_huge_logits_are_finite(size):
    z = torch.full((3, 10), size, requires_grad=True)
    for loss in (sgan_mnist.discriminator_loss(z, z), sgan_mnist.generator_loss(z)):
        loss.backward()
        assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_explicit_fake_class_agrees_with_the_fixed_zero():
    """K + 1 logits by softmax, and the K that are left when the last is taken away, say the same."""
    torch.manual_seed(0)
    explicit = (3 * torch.randn(6, 11, dtype=torch.float64)).requires_grad_()
    folded = sgan_mnist.fold_fake_class(explicit)
    p = explicit.softmax(1)
    d = folded.exp().sum(1) / (folded.exp().sum(1) + 1)
    torch.testing.assert_close(1 - p[:, -1], d)
    torch.testing.assert_close(p[:, :-1] / (1 - p[:, -1:]), folded.softmax(1))
    # The losses of Salimans et al. 2016 in the explicit form, and their gradients.
    classes = torch.arange(6)
    expected = (
        F.cross_entropy(explicit[:, :-1], classes) - (1 - p[:3, -1]).log().mean() - p[3:, -1].log().mean()
    )
    ours = F.cross_entropy(folded, classes) + sgan_mnist.discriminator_loss(folded[:3], folded[3:])
    torch.testing.assert_close(ours, expected)
    gradients = [torch.autograd.grad(v, explicit, retain_graph=True)[0] for v in (ours, expected)]
    torch.testing.assert_close(*gradients)
    zero = torch.cat((folded, torch.zeros(6, 1)), 1)
    torch.testing.assert_close(sgan_mnist.fold_fake_class(zero), folded)


def test_feature_matching_loss():
    torch.manual_seed(0)
    real, fake = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    expected = sum((sum(real[:, k]) / 5 - sum(fake[:, k]) / 3) ** 2 for k in range(4))
    torch.testing.assert_close(sgan_mnist.feature_matching_loss(real, fake), expected)
    assert torch.autograd.gradcheck(sgan_mnist.feature_matching_loss, (real, fake))


def test_pseudo_label_loss():
    torch.manual_seed(0)
    student, teacher = (torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, q = teacher.softmax(1), student.softmax(1)
    threshold = p.max(1).values.median().item()
    expected = sum(-q[i, p[i].argmax()].log() for i in range(6) if p[i].max() >= threshold) / 6
    loss = sgan_mnist.pseudo_label_loss(student, teacher, threshold)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert teacher.grad is None
    assert [bool(g.any()) for g in student.grad] == [bool(s >= threshold) for s in p.max(1).values]


# The scripts


@pytest.mark.curves
@SCRIPTS
@pytest.mark.parametrize("dataset", ["mnist", "digits"])  # test_mmd_gan.py reads the others
def test_every_data_set(script, dataset, tiny, capsys):
    judged = script is sgan_mnist and dataset == "mnist"  # the judge of another data set takes seconds
    options = {"num_eval_samples": 0} if script is sgan_mnist and not judged else {}
    folder = script.main(tiny(script, dataset=dataset, **options))
    assert_complete(folder)
    results, lines = json.loads((folder / "results.json").read_text()), rows(folder)
    assert [row["step"] for row in lines] == [1, 2, 3, 4]
    assert all(({"accuracy", "errors"} <= row.keys()) == (row["step"] in (3, 4)) for row in lines)
    total = 360 if dataset == "digits" else 60
    assert results["accuracy"] == pytest.approx(1 - results["errors"] / total)
    assert results["num_labels"] == 20 and results["label_seed"] == 1
    assert ({"fid", "floor_fid", "judge_accuracy"} <= results.keys()) == judged
    out = capsys.readouterr().out
    assert all(str(folder / name) in out for name in ("samples.png", "curves.png", "checkpoint.pt"))


OPTIONS = [
    {"feature_matching": False},
    {"explicit_fake_class": True, "consistency_weight": 0.0, "paste": 0.0},
    {"explicit_fake_class": True, "augment": False, "gan_weight": 0.0},
    {"gan_weight": 0.0, "ema_decay": 0.0, "threshold": 0.0},
    {"eval_split": "validation", "num_eval_samples": 0, "lr_decay": 0.0, "beta1": 0.0, "eval_views": 0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_every_option(options, tiny, monkeypatch):
    """A run ends, its terms are finite, and what should train has trained."""
    first = {}
    hold = sgan_mnist.Run.hold

    def spy(run, **parts):
        first.update(
            {n: [p.detach().clone() for p in parts[n].parameters()] for n in ("generator", "classifier")}
        )
        hold(run, **parts)

    monkeypatch.setattr(sgan_mnist.Run, "hold", spy)
    folder = sgan_mnist.main(tiny(sgan_mnist, **{"num_eval_samples": 0, "num_steps": 2, **options}))
    state, lines = load(folder), rows(folder)
    terms = {"loss", "loss_labelled", "step"}
    terms |= {"loss_gan", "loss_generator"} if options.get("gan_weight", 1) else set()
    consistent = options.get("augment", True) and options.get("consistency_weight", 1)
    terms |= {"loss_consistency"} if consistent else set()
    assert lines[0].keys() == terms and all(math.isfinite(v) for row in lines for v in row.values())
    assert all(t.isfinite().all() for t in tensors(state) if t.is_floating_point())
    assert len(state["classifier"]["head.1.bias"]) == 10 + options.get("explicit_fake_class", False)
    for name, trains in (("generator", options.get("gan_weight", 1) > 0), ("classifier", True)):
        names = [n for n in state[name] if "running" not in n and "num_batches" not in n]
        trained = [not torch.equal(a, state[name][n]) for a, n in zip(first[name], names, strict=True)]
        assert all(trained) if trains else not any(trained)
    assert "errors" not in lines[0] and 0 <= lines[1]["errors"] <= 60
    assert ("single_errors" in lines[1]) == (options.get("augment", True) and options.get("eval_views") != 0)


@pytest.mark.parametrize("options", [{"augment": True}, {"num_labels": 240}, {"eval_split": "validation"}])
def test_baseline_options(options, tiny):
    folder = baseline_cnn.main(tiny(baseline_cnn, num_steps=2, **options))
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert json.loads((folder / "results.json").read_text())["num_labels"] == options.get("num_labels", 20)


RESUMED = [
    (sgan_mnist, {}),
    (sgan_mnist, {"explicit_fake_class": True, "augment": False, "feature_matching": False}),
    (baseline_cnn, {"augment": True}),
]


@pytest.mark.parametrize("script, options", RESUMED, ids=["sgan", "sgan-2016", "baseline"])
def test_resume_is_bit_for_bit(script, options, tiny, monkeypatch, capsys):
    """A run stopped in its second step of four and resumed has the losses and weights of one that was not."""
    straight, args = script.main(tiny(script, **options)), tiny(script, **options)
    unpatched, number_of = script.Run.steps, iter(range(9))

    def steps(run):
        for number in unpatched(run):
            if next(number_of) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield number

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "steps", steps)
        with pytest.raises(SystemExit) as stop:
            script.main(args)
    assert stop.value.code == 130 and "--resume" in capsys.readouterr().err
    (folder,) = Path(args.run_dir).glob(f"{args.exp_name}__*")
    assert load(folder)["step"] == 2
    torch.manual_seed(1234)
    assert script.main(script.Args(resume=str(folder))) == folder
    assert rows(folder) == rows(straight)
    assert_complete(folder)
    ours, theirs = load(folder), load(straight)
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"args", "seconds", "paused", "rows"}:
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours[name]), tensors(theirs[name]), strict=True))
    assert (folder / "confusion.png").read_bytes() == (straight / "confusion.png").read_bytes()


def test_train_seconds_leave_evaluations_out(tiny, monkeypatch):
    """A resumed run goes on counting; each evaluation takes 1,000 seconds here."""
    unpatched, clock, ahead = sgan_mnist.classify, time.time, [0]

    def classify(*args):
        ahead[0] += 1000
        return unpatched(*args)

    monkeypatch.setattr(sgan_mnist, "classify", classify)
    monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])
    folder = sgan_mnist.main(tiny(sgan_mnist, num_eval_samples=0, num_steps=3, eval_every=1))
    sgan_mnist.main(sgan_mnist.Args(resume=str(folder), num_steps=5))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["train_seconds"] for line in lines]
    assert len(seconds) == 5 and seconds == sorted(seconds) and seconds[-1] < 1000
    assert json.loads((folder / "results.json").read_text())["seconds"] >= 5000


def test_measuring_samples_does_not_change_the_training(tiny):
    """The judge is made or read before the networks, and takes nothing from their random numbers."""
    measured, not_measured = (sgan_mnist.main(tiny(sgan_mnist, num_eval_samples=n)) for n in (60, 0))
    for ours, theirs in zip(rows(measured), rows(not_measured), strict=True):
        assert theirs.items() <= ours.items()


def test_statistics_of_labelled_and_real_images_alone(tiny, monkeypatch):
    """Neither generated nor adversarial images reach the running averages; with the GAN they are the same."""
    passes = []
    forward = sgan_mnist.Classifier.forward

    def spy(model, images):
        before = model.body[2].running_mean.clone()
        out = forward(model, images)
        passes.append((len(images), torch.equal(before, model.body[2].running_mean)))
        return out

    monkeypatch.setattr(sgan_mnist.Classifier, "forward", spy)
    options = {"num_steps": 1, "num_eval_samples": 0, "eval_every": 1}
    sgan_mnist.main(tiny(sgan_mnist, **options))
    moved = [size for size, held in passes if not held]
    assert moved == [6 + 8]  # label_batch_size + batch_size


def test_updates_leave_the_other_network_alone(tiny, monkeypatch):
    """Each Adam step changes its own network, and nothing has left a gradient in the other."""
    networks, seen = {}, []
    hold, step = sgan_mnist.Run.hold, torch.optim.Adam.step

    def spy_hold(run, **parts):
        networks.update(parts)
        hold(run, **parts)

    def spy_step(optimizer, *args):
        name = "classifier" if optimizer is networks["opt_classifier"] else "generator"
        other = networks["generator" if name == "classifier" else "classifier"]
        gradients = [None if p.grad is None else p.grad.clone() for p in other.parameters()]
        before = [p.detach().clone() for p in other.parameters()]
        step(optimizer, *args)
        same = all(torch.equal(a, b) for a, b in zip(before, other.parameters()))
        seen.append((name, same, gradients, [p.grad.clone() for p in networks[name].parameters()]))

    monkeypatch.setattr(sgan_mnist.Run, "hold", spy_hold)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_step)
    sgan_mnist.main(tiny(sgan_mnist, num_steps=1, num_eval_samples=0))
    assert [name for name, *_ in seen] == ["classifier", "generator"] and all(same for _, same, *_ in seen)
    assert all(g is None for g in seen[0][2]), "the classifier's loss reached the generator"
    left, own = seen[1][2], seen[0][3]
    assert all(torch.equal(a, b) for a, b in zip(left, own)), "the generator's loss reached the classifier"


@pytest.mark.parametrize(
    "lr_decay, rates", [(0.0, [1, 1, 1, 1]), (0.5, [1, 1, 1, 0.5]), (1.0, [1, 0.75, 0.5, 0.25])]
)
def test_learning_rates_fall_at_the_end(lr_decay, rates, tiny, monkeypatch):
    seen, step = [], torch.optim.Adam.step

    def spy(optimizer, *args):
        seen.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    sgan_mnist.main(tiny(sgan_mnist, num_eval_samples=0, lr_decay=lr_decay))
    assert seen[::2] == pytest.approx([3e-3 * r for r in rates])
    assert seen[1::2] == pytest.approx([2e-3 * r for r in rates])


def test_run_without_a_generator(tiny, tmp_path, capsys):
    """It measures no samples, and none can be drawn from it."""
    folder = sgan_mnist.main(tiny(sgan_mnist, gan_weight=0.0, num_steps=1))
    assert "fid" not in json.loads((folder / "results.json").read_text())
    options = {"generate": 2, "checkpoint": str(folder / "checkpoint.pt"), "out": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stop:
        sgan_mnist.main(sgan_mnist.Args(**options))
    assert stop.value.code == 2 and "has no generator" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"label_batch_size": 1}, {"batch_size": 3}, {"threshold": 0.0}])
def test_odd_sizes_and_every_pseudo_label(options, tiny):
    folder = sgan_mnist.main(tiny(sgan_mnist, num_eval_samples=0, num_steps=2, **options))
    assert all(math.isfinite(v) for row in rows(folder) for v in row.values())
    assert "threshold" not in options or all(row["loss_consistency"] > 0 for row in rows(folder))


def test_generate(tiny, tmp_path, capsys):
    """With the run's seed the images are those of its samples.png."""
    folder, out = sgan_mnist.main(tiny(sgan_mnist, num_eval_samples=0)), tmp_path / "out"
    options = {"generate": 12, "checkpoint": str(folder / "checkpoint.pt"), "out": str(out)}
    assert sgan_mnist.main(sgan_mnist.Args(**options)) == out
    assert sorted(path.name for path in out.iterdir()) == [f"{i:06d}.png" for i in range(12)]
    with Image.open(folder / "samples.png") as grid, Image.open(out / "000011.png") as image:
        tile = np.asarray(grid.convert("L")).astype(int)[32:60, 32:60]
        assert image.size == (28, 28) and abs(tile - np.asarray(image)).max() <= 1
    with pytest.raises(SystemExit) as stop:
        sgan_mnist.main(sgan_mnist.Args(**options))
    assert stop.value.code == 2 and "exists" in capsys.readouterr().err


# Bad input


@SCRIPTS
@pytest.mark.parametrize(
    "options, text",
    [
        ({"num_labels": 25}, "--num-labels must be a multiple of the 10 classes"),
        ({"num_labels": 300}, "--num-labels 300 exceeds the 240"),
        ({"num_labels": 210, "eval_split": "validation"}, "exceeds the 200"),
        ({"num_labels": 1430, "dataset": "digits"}, "cannot be balanced"),
    ],
)
def test_labels_that_cannot_be_drawn(script, options, text, tiny, tmp_path, capsys):
    """One line, exit code 2, and no run folder."""
    with pytest.raises(SystemExit) as stop:
        script.main(tiny(script, run_dir=str(tmp_path / "runs"), **options))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(err.splitlines()) == 1 and text in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options, texts",
    [
        ({"num_labels": 240}, ["leaves no image unlabelled", "baseline_cnn.py"]),
        ({"batch_size": 221}, ["--batch-size 221", "220 unlabelled"]),
    ],
)
def test_sgan_without_enough_unlabelled_images(options, texts, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sgan_mnist.main(tiny(sgan_mnist, run_dir=str(tmp_path / "runs"), **options))
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and all(text in err for text in texts) and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script, options, message",
    [
        (sgan_mnist, {"num_labels": 0}, "--num-labels must be positive, not 0"),
        (sgan_mnist, {"threshold": 1.5}, r"--threshold must be in \[0, 1\], not 1.5"),
        (sgan_mnist, {"gan_weight": -1.0}, r"--gan-weight must be in \[0, inf\), not -1.0"),
        (sgan_mnist, {"paste": -0.5}, r"--paste must be in \[0, 1\], not -0.5"),
        (sgan_mnist, {"lr": math.nan}, "--lr must be positive, not nan"),
        (sgan_mnist, {"label_seed": -1}, "--label-seed must be in"),
        (sgan_mnist, {"num_eval_samples": 5}, "--num-eval-samples must be 0 or at least 10, not 5"),
        (sgan_mnist, {"eval_views": -1}, r"--eval-views must be in \[0, inf\), not -1"),
        (sgan_mnist, {"batch_size": 1}, "--batch-size must be at least 2, not 1"),
        (sgan_mnist, {"beta1": 1.0}, "--beta1 must be in"),
        (sgan_mnist, {"out": "x"}, "--checkpoint <run>/checkpoint.pt and --out"),
        (baseline_cnn, {"num_labels": -10}, "--num-labels must be positive, not -10"),
        (baseline_cnn, {"batch_size": 1}, "--batch-size must be at least 2, not 1"),
        (baseline_cnn, {"num_steps": 0}, "--num-steps must be positive, not 0"),
        (baseline_cnn, {"ema_decay": 2.0}, r"--ema-decay must be in \[0, 1\], not 2.0"),
    ],
)
def test_values_that_cannot_work(script, options, message):
    with pytest.raises(ValueError, match=message):
        script.Args(**options)


@SCRIPTS
@pytest.mark.parametrize(
    "num_labels, text", [(55, "multiple of the 10 classes, not 55"), (-10, "positive, not -10")]
)
def test_bad_option_of_the_command(script, num_labels, text, run_cli, tmp_path, tiny_mnist):
    options = ["--num-labels", num_labels, "--data-dir", tiny_mnist, "--device", "cpu"]
    result = run_cli(*options, script=f"{script.SCRIPT}.py")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert text in " ".join(result.stderr.replace("│", " ").split()) and not (tmp_path / "runs").exists()


@SCRIPTS
def test_learning_rate_that_explodes(script, tiny, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(tiny(script, lr=1e37, num_steps=50, eval_every=50))
    assert stop.value.code == 2 and "not finite at step" in capsys.readouterr().err


# Minutes, or a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@SCRIPTS
def test_cuda_trains(script, tiny):
    folder = script.main(tiny(script, device="cuda"))
    assert_complete(folder)
    script.main(script.Args(resume=str(folder), num_steps=5))
    assert rows(folder)[-1]["step"] == 5


def real_mnist() -> str | None:
    """A folder with MNIST in torchvision's layout: the one that MNIST_DIR names, or one near by."""
    places = [os.environ.get("MNIST_DIR"), *(ROOT / p for p in ("data", "../shared/data"))]
    files = "MNIST/raw/train-images-idx3-ubyte"
    return next((str(p) for p in places if p and (Path(p) / files).is_file()), None)


@pytest.mark.slow
@pytest.mark.skipif(real_mnist() is None, reason="no MNIST here; name its folder in MNIST_DIR")
@pytest.mark.parametrize(
    "script, accuracy", [(sgan_mnist, 0.9), (baseline_cnn, 0.8)], ids=["sgan", "baseline"]
)
def test_short_runs_on_mnist(script, accuracy, tmp_path):
    options = {"num_steps": 500, "num_eval_samples": 0} if script is sgan_mnist else {}
    folder = script.main(script.Args(data_dir=real_mnist(), run_dir=str(tmp_path), **options))
    assert json.loads((folder / "results.json").read_text())["accuracy"] > accuracy
