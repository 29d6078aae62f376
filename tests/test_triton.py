"""Triton's kernels: in the interpreter and on a GPU against float64, and compiled without a GPU.

The interpreter is a mode of a whole process, so its cases run as commands: `python tests/test_triton.py mmd`.
"""

import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mmd_gan
import sinkhorn_gan

pytest.importorskip("triton", reason="Triton is there for Linux only")

# n, m, d, options
MMD = {  # strips of 32 rows go along 32 columns and 32 coordinates at a time; gradients take 16 to 64
    "one coordinate": (5, 37, 1, {"bandwidths": (0.7, 1.1, 5.0), "weights": (1.0, 0.5, 2.0)}),
    "two points": (2, 2, 3, {}),
    "odd sizes": (70, 33, 17, {"bandwidths": (8.0, 4.0, 2.0, 1.0, 0.5)}),
    "one bandwidth": (33, 65, 17, {"kernel": "rational_quadratic", "bandwidths": (0.5,)}),
    "full strips": (64, 32, 32, {"kernel": "rational_quadratic"}),
    "images": (9, 3, 784, {"bandwidths": (14.0, 28.0, 56.0)}),
    "rational quadratic images": (4, 3, 784, {"kernel": "rational_quadratic", "bandwidths": (0.2, 5.0)}),
}
SINKHORN = {
    "one point": (1, 1, 1, {}),
    "odd sizes": (5, 9, 3, {}),
    "weights": (20, 13, 17, {"weighted": True}),
    "several programs and chunks": (130, 3, 2, {"eps": 0.1}),
    "cosine": (6, 7, 17, {"cost": "cosine", "wanted": "y"}),
    "images": (3, 2, 784, {"eps": 2.0, "wanted": "x"}),
}


def points(n: int, m: int, d: int, device: str = "cpu") -> list[torch.Tensor]:
    """x (n, d) and y (m, d), far from the origin, where digits are lost unless they are centred."""
    generator = torch.Generator().manual_seed(n + m + d)
    x, y = (torch.randn(k, d, generator=generator) for k in (n, m))
    return [(v + shift).to(device) for v, shift in ((x, 10.0), (y, 10.5))]


def gradients(loss, x: torch.Tensor, y: torch.Tensor, wanted: str = "xy") -> list[torch.Tensor]:
    """What loss(x, y) returns, and the wanted gradients of the sum of it, with factors 1, -0.7, 0.4."""
    x, y = x.clone().requires_grad_("x" in wanted), y.clone().requires_grad_("y" in wanted)
    values = torch.atleast_1d(loss(x, y))
    (values * values.new_tensor((1.0, -0.7, 0.4))[: len(values)]).sum().backward()
    return [values.detach(), *(v.grad for v in (x, y) if v.requires_grad)]


def errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    """Relative errors, as norms; absolute ones of what is zero."""
    return [
        float((g.double() - w).norm() / (w.norm() if w.norm() > 1e-9 else 1.0)) for g, w in zip(got, want)
    ]


def mmd_errors(n: int, m: int, d: int, options: dict, device: str = "cpu") -> list[float]:
    """Errors of the sums and gradients of triton_sums, against torch_sums in float64."""
    options = {"kernel": "gaussian", "bandwidths": (1.0, 2.0, 4.0)} | options
    bandwidths, kernel = options["bandwidths"], options["kernel"]
    weights = options.get("weights", (1.0,) * len(bandwidths))
    z = torch.cat(points(n, m, d, device))
    z -= z.mean(0)
    got = mmd_gan.triton_sums(z, n, bandwidths, kernel, weights)
    want = mmd_gan.torch_sums(z.double(), n, bandwidths, kernel, weights)
    return [error for part in range(2) for error in errors(got[part], want[part])]


def sinkhorn_errors(n: int, m: int, d: int, options: dict, device: str = "cpu") -> list[float]:
    """Errors of sinkhorn_divergence by Triton, and of its gradients, against float64; with products of the
    points that are kept and, if there is no matrix, without."""
    errors = kept_errors(n, m, d, options, device)
    kept, sinkhorn_gan.KEPT = sinkhorn_gan.KEPT, 0
    sinkhorn_gan.triton_loop.cache_clear()
    try:
        return errors + kept_errors(n, m, d, options, device)
    finally:
        sinkhorn_gan.KEPT = kept
        sinkhorn_gan.triton_loop.cache_clear()


def kept_errors(n: int, m: int, d: int, options: dict, device: str) -> list[float]:
    """sinkhorn_errors with products that are kept for up to sinkhorn_gan.KEPT pairs."""
    x, y = points(n, m, d, device)
    options = options.copy()
    wanted = options.pop("wanted", "xy")
    eps = options.pop("eps", 0.4) * float(sinkhorn_gan.mean_cost(x, y, options.get("cost", "euclidean")))
    eps = eps or 1.0
    weights = [torch.arange(1.0, k + 1, device=device) for k in (n, m)]
    weights = [w / w.sum() for w in weights] if options.pop("weighted", False) else [None, None]

    def divergence(road: str, tol: float):
        def loss(x, y):
            a, b = (w if w is None else w.to(x) / w.to(x).sum() for w in weights)
            return sinkhorn_gan.sinkhorn_divergence(x, y, eps, a, b, road=road, tol=tol, **options)

        return loss

    road = "dense" if n * m < 2**24 else "blocked"
    want = gradients(divergence(road, 1e-7), x.double(), y.double(), wanted)
    times = 3 if device == "cuda" else 1  # plain, recorded as graphs, and by these
    found = [errors(gradients(divergence("triton", 1e-4), x, y, wanted), want) for _ in range(times)]
    return [max(error) for error in zip(*found)]


CASES = {"mmd": (MMD, mmd_errors, 3e-5), "sinkhorn": (SINKHORN, sinkhorn_errors, 1e-3)}


@pytest.mark.parametrize("loss", CASES)
def test_interpreted_kernels_agree_with_float64(loss):
    command = [sys.executable, __file__, loss]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in result.stderr:
        pytest.skip("the interpreter of Triton 3.6 fails with NumPy 2.4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == len(CASES[loss][0])


def interpret(loss: str) -> None:
    """Run the cases of a loss here, a line each, and leave with 1 if one is off."""
    cases, measure, limit = CASES[loss]
    wrong = 0
    for name, (n, m, d, options) in cases.items():
        found = measure(n, m, d, options)
        wrong += not all(error < limit for error in found)
        print(name, n, m, d, *(f"{error:.1e}" for error in found), flush=True)
    raise SystemExit(wrong > 0)


# Compiled ahead of time


PAIRS = {"MIX": ((8.0, 1.0), (4.0, 0.5), (2.0, 1.0), (1.0, 2.0), (0.5, 1.0)), "BLOCK": 32, "BLOCK_D": 32}
ITERATE = {"SELF": False, "IS_KEPT": False, "COLS": 64}
FINISH = {"IS_KEPT": False, "BLOCK": 32, "COLS": 64}
MMD_LAUNCHES = [
    PAIRS | {"D": d, "OUT_D": out, "GAUSSIAN": gaussian}
    for d, out in ((2, 16), (16, 16), (32, 32), (64, 64), (784, 64))
    for gaussian in (True, False)
]
LAUNCHES = [  # the largest forms of the kernels that are launched: kernel, its constants, warps
    ("iterate", ITERATE | {"D": 64, "BLOCK": 32, "BLOCK_D": 64}, 4),
    ("iterate", ITERATE | {"D": 784, "BLOCK": 32, "BLOCK_D": 32}, 4),
    ("iterate", ITERATE | {"D": 784, "BLOCK": 16, "BLOCK_D": 32, "COLS": 256, "IS_KEPT": True}, 4),
    (
        "iterate",
        ITERATE | {"D": 64, "BLOCK": 32, "BLOCK_D": 64, "COLS": 128, "IS_KEPT": True, "SELF": True},
        4,
    ),
    ("finish", FINISH | {"D": 64, "BLOCK_D": 64, "OUT_D": 64}, 4),
    ("finish", FINISH | {"D": 784, "BLOCK_D": 32, "OUT_D": 128}, 8),
    ("finish", FINISH | {"D": 784, "BLOCK_D": 32, "OUT_D": 128, "IS_KEPT": True}, 8),
]
INTEGERS = ["n", "m", "size", "first", "steps", "limit"]


def resources(kernel, constants: dict, warps: int, capability: int, stages: int = 2) -> str:
    """What ptxas says of a kernel that is compiled for a GPU of that capability: registers, stack, ..."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {name: "i32" for name in INTEGERS} | dict.fromkeys(("low", "high", "tol"), "fp32")
    kinds |= {"counts": "*i32"} | dict.fromkeys((*constants, "PRECISION"), "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in names}
    constants = constants | ({"PRECISION": "tf32x3"} if "PRECISION" in names else {})
    values = {(names.index(name),): value for name, value in constants.items()}
    # As at a launch, where pointers, and sizes that are a multiple of it, are known to be divisible by 16.
    sizes = ("n", "m", "size")
    even = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in sizes]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(kernel, signature, values, attributes)
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= 99 * 1024  # what a block may have on a GPU that one buys
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name, constants, warps", LAUNCHES)
def test_no_registers_spill(name, constants, warps, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (kernel,) = (k for k in sinkhorn_gan.triton_sinkhorn() if k.__name__ == name)
    assert_no_spills(resources(kernel, constants, warps, capability))


def assert_no_spills(found: str) -> None:
    """Nothing lies on the stack or in the local memory of a thread."""
    assert re.findall(r"STACK:(\d+)", found)[-1] == "0", found
    assert {*re.findall(r"LOCAL:(\d+)", found)} <= {"0"}, found


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("constants", MMD_LAUNCHES, ids=lambda v: f"d{v['D']}-{v['GAUSSIAN']}")
def test_no_registers_of_the_mmd_spill(constants, capability, tmp_path, monkeypatch):
    """With the sizes, warps and stages of triton_sums."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert_no_spills(resources(mmd_gan.mmd_kernel(), constants, 8, capability))


# Roads


def test_without_cuda_another_road_gives_the_same_with_one_warning(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, y = points(6, 7, 3)

    def compute(road):
        return sinkhorn_gan.sinkhorn_divergence(x, y, 0.3, road=road)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            assert compute("triton") == compute("auto")
    (warning,) = caught
    assert "Triton has no cpu" in str(warning.message)


@pytest.mark.parametrize("what", ["missing", "failing"])
def test_where_triton_cannot_run_another_road_does(what, monkeypatch):
    """As on a machine without a C compiler, where the first kernel says so."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else it would look no further on the CPU
    if what == "missing":
        monkeypatch.setattr(sinkhorn_gan, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr("triton.jit", lambda kernel: {(1,): fails})
    sinkhorn_gan.triton_lacks.cache_clear()
    try:
        with pytest.warns(UserWarning) as caught:
            assert not sinkhorn_gan.takes_triton(torch.zeros(2, 2), "triton")
        (warning,) = caught
        said = "Triton is not installed" if what == "missing" else "Failed to find C compiler"
        assert said in str(warning.message) and "slower road" in str(warning.message)
    finally:
        sinkhorn_gan.triton_lacks.cache_clear()


def fails(x):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def test_tf32_is_taken_where_torch_may(monkeypatch):
    """In whichever of torch's two ways that is said, of which the older raises an error after the newer."""
    points = SimpleNamespace(is_cuda=True, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert sinkhorn_gan.dot_precision(points) == "tf32x3"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision("high")
        assert sinkhorn_gan.dot_precision(points) == "tf32"
        torch.set_float32_matmul_precision("highest")
        for newer, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
            torch.backends.cuda.matmul.fp32_precision = newer
            assert sinkhorn_gan.dot_precision(points) == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert sinkhorn_gan.dot_precision(points) == "ieee"


def test_buffers_are_float32_whatever_the_default():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        options = False, (True, True), False, 1e-3, 10, torch.device("cpu"), "ieee"
        loop = sinkhorn_gan.TritonLoop(3, 4, 2, *options)
    finally:
        torch.set_default_dtype(before)
    assert {v.dtype for v in (loop.z, loop.log_w, loop.p, loop.errors, loop.scale)} == {torch.float32}


def test_auto_says_nothing_on_the_cpu():
    x, y = points(6, 7, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkhorn_gan.sinkhorn_divergence(x, y, 0.3)


def test_epsilon_may_be_a_tensor():
    """As in a CUDA graph, where no number can be read: nothing else differs."""
    x, y = points(6, 7, 3)
    for loss in (sinkhorn_gan.sinkhorn_divergence, sinkhorn_gan.ot_cost):
        torch.testing.assert_close(loss(x, y, torch.tensor(0.3)), loss(x, y, 0.3))
        with pytest.raises(ValueError, match="eps must be positive"):
            loss(x, y, torch.tensor(-0.3))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("loss, name", [(loss, name) for loss in CASES for name in CASES[loss][0]])
def test_cuda_agrees_with_float64(loss, name):
    cases, measure, _ = CASES[loss]
    assert max(measure(*cases[name], device="cuda")) < (1e-4 if loss == "mmd" else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("n, m, d", [(1000, 777, 64), (4096, 4096, 16), (65_536, 65_536, 64)])
@pytest.mark.parametrize("loss", CASES)
def test_cuda_agrees_with_float64_for_many_points(loss, n, m, d):
    options = {"bandwidths": (32.0, 16.0, 8.0, 4.0, 2.0)} if loss == "mmd" else {}
    assert max(CASES[loss][1](n, m, d, options, device="cuda")) < (1e-4 if loss == "mmd" else 1e-3)


@pytest.mark.gpu
def test_cuda_graphs_of_a_problem_with_many_chunks():
    """A chunk is recorded first there, as it comes twice in the first solution; replayed, nothing changes."""
    x, y = points(4096, 4096, 16, "cuda")
    sinkhorn_gan.triton_loop.cache_clear()
    first, *others = [sinkhorn_gan.ot_cost(x, y, 0.05, tol=1e-5, road="triton") for _ in range(4)]
    options = False, (False, False), False, 5e-6, 2000, x.device, sinkhorn_gan.dot_precision(x)
    loop = sinkhorn_gan.triton_loop(4096, 4096, 16, *options)
    assert list(loop.graphs) == ["chunk", "prepare", "conclude"]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-5, atol=0)


@pytest.mark.gpu
def test_cuda_is_deterministic_and_keeps_no_matrix():
    x, y = points(20_000, 10_000, 64, "cuda")
    for loss in (
        lambda x, y: mmd_gan.mmd2(x, y, (4.0, 8.0)),
        lambda x, y: sinkhorn_gan.sinkhorn_divergence(x, y, 5.0),
    ):
        first = gradients(loss, x, y)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert all(torch.equal(p, q) for p, q in zip(first, gradients(loss, x, y)))
        assert torch.cuda.max_memory_allocated() - before < 100e6  # the matrix has 800 MB


if __name__ == "__main__":
    interpret(sys.argv[1])
