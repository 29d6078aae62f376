"""Triton's kernels: in the interpreter and on a GPU against float64, and compiled without a GPU.

The interpreter is a mode of a whole process, so its cases run as commands: `python tests/test_triton.py mmd`.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

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
    "odd sizes": (40, 33, 17, {"bandwidths": (8.0, 4.0, 2.0, 1.0, 0.5)}),
    "one bandwidth": (33, 65, 17, {"kernel": "rational_quadratic", "bandwidths": (0.5,)}),
    "full strips": (64, 32, 32, {"kernel": "rational_quadratic"}),
    "rational quadratic images": (4, 3, 784, {"kernel": "rational_quadratic", "bandwidths": (0.2, 5.0)}),
}
SINKHORN = {  # and whether y is x
    "one point": (1, 1, 1, {}),
    "odd sizes": (5, 9, 3, {}),
    "several programs": (70, 33, 17, {}),
    "itself": (40, 40, 2, {"same": True}),
    "images": (9, 3, 784, {}),
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
    mixture = tuple(zip(bandwidths, weights))
    got = mmd_gan.triton_sums(z, n, kernel, mixture)
    want = mmd_gan.torch_sums(z.double(), n, kernel, mixture)
    return [error for part in range(2) for error in errors(got[part], want[part])]


def sinkhorn_errors(n: int, m: int, d: int, options: dict, device: str = "cpu") -> list[float]:
    """Errors of a half-step of two problems by Triton, and of its barycentres, against float64."""
    same = options.get("same", False)
    x = torch.stack(points(n, n, d, device))
    y = x if same else torch.stack(points(m, m, d, device))
    rng = torch.Generator().manual_seed(0)
    log_b, p = (s * torch.rand(2, m, generator=rng, dtype=torch.float64).to(device) for s in (-6, 9))
    scale = torch.tensor([[0.3], [3.0]], dtype=torch.float64, device=device) / d
    x, y = x - 10, y - 10  # centred, as solve hands them over
    found = []
    for barycentres in (True, False):
        got = sinkhorn_gan.triton_soft_minimum(x, y, log_b, scale, same, p, barycentres)
        want = sinkhorn_gan.soft_minimum(x.double(), y.double(), log_b, scale, same, p, barycentres)
        found += errors(got[: 1 + barycentres], want[: 1 + barycentres])
    return found


CASES = {"mmd": (MMD, mmd_errors, 3e-5), "sinkhorn": (SINKHORN, sinkhorn_errors, 3e-5)}


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
    if loss == "mmd":  # a maximum would hide it
        sums, _ = mmd_gan.triton_sums(torch.full((5, 2), math.nan), 3, "gaussian", ((1.0, 1.0),))
        wrong += not sums.isnan().all()
    raise SystemExit(wrong > 0)


# Compiled ahead of time


PAIRS = {"MIX": ((8.0, 1.0), (4.0, 0.5), (2.0, 1.0), (1.0, 2.0), (0.5, 1.0)), "BLOCK": 32, "BLOCK_D": 32}
MMD_LAUNCHES = [
    PAIRS | {"D": d, "OUT_D": out, "GAUSSIAN": gaussian}
    for d, out in ((2, 16), (16, 16), (32, 32), (64, 64), (784, 64))
    for gaussian in (True, False)
]
SINKHORN_LAUNCHES = [
    {"BLOCK": 32, "BLOCK_D": 32, "D": d, "OUT_D": out, "SAME": same, "MEANS": means}
    for d, out, means in ((2, 16, True), (16, 16, True), (64, 64, True), (784, 64, True), (784, 16, False))
    for same in (True, False)
]


def resources(kernel, constants: dict, capability: int) -> str:
    """What ptxas says of a kernel that is compiled, as it is launched, for a GPU of that capability."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    sizes = ("n", "m", "size")
    kinds = dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # Pointers, and sizes that are a multiple of it, are known to be divisible by 16.
    even = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in sizes]
    source = ASTSource(kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in even})
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": 8, "num_stages": 2}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= 99 * 1024  # what a block may have on a GPU that one buys
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


LAUNCHES = [("mmd_gan", constants) for constants in MMD_LAUNCHES]
LAUNCHES += [("sinkhorn_gan", constants) for constants in SINKHORN_LAUNCHES]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("script, constants", LAUNCHES)
def test_no_registers_spill(script, constants, capability, tmp_path, monkeypatch):
    """Nothing lies on the stack or in the local memory of a thread."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = mmd_gan.mmd_kernel() if script == "mmd_gan" else sinkhorn_gan.sinkhorn_kernel()
    found = resources(kernel, constants, capability)
    assert re.findall(r"STACK:(\d+)", found)[-1] == "0", found
    assert {*re.findall(r"LOCAL:(\d+)", found)} <= {"0"}, found


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("loss, name", [(loss, name) for loss in CASES for name in CASES[loss][0]])
def test_cuda_agrees_with_float64(loss, name):
    cases, measure, _ = CASES[loss]
    assert max(measure(*cases[name], device="cuda")) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("n, m, d", [(1000, 777, 64), (4096, 4096, 16), (65_536, 65_536, 64)])
@pytest.mark.parametrize("loss", CASES)
def test_cuda_agrees_with_float64_for_many_points(loss, n, m, d):
    options = {"bandwidths": (32.0, 16.0, 8.0, 4.0, 2.0)} if loss == "mmd" else {}
    assert max(CASES[loss][1](n, m, d, options, device="cuda")) < 1e-4


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
