"""Triton's kernels: in the interpreter and on a GPU against float64, and compiled without a GPU.

The interpreter is a mode of a whole process: with TRITON_INTERPRET=1 the tests of a GPU run in it instead.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_near, cloud, with_gradients

import mmd_gan
import sinkhorn_gan

pytest.importorskip("triton", reason="Triton is there for Linux only")
DEVICE, LIMIT = ("cpu", 3e-5) if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda", 1e-4)


def compare_mmd(n: int, m: int, d: int, bandwidths=(1.0, 2.0, 4.0), kernel="gaussian") -> None:
    """Sums and gradients of triton_sums are those of torch_sums in float64."""
    mixture = tuple((s, 1 + s / 2) for s in bandwidths)
    z = torch.cat((cloud(n, d), cloud(m, d, 1, 0.5))).to(DEVICE, torch.float32)
    z -= z.mean(0)
    sums, grads = mmd_gan.triton_sums(z, n, kernel, mixture)
    want = mmd_gan.torch_sums(z.double(), n, kernel, mixture)
    assert_near([*sums, *grads], [*want[0], *want[1]], LIMIT)


def compare_sinkhorn(n: int, m: int, d: int, same: bool = False) -> None:
    """A half-step of two problems, and its barycentres, are those of float64."""
    x = cloud(2 * n, d).view(2, n, d).to(DEVICE, torch.float32)
    y = x if same else cloud(2 * m, d, 1, 0.5).view(2, m, d).to(DEVICE, torch.float32)
    rng = torch.Generator().manual_seed(0)
    log_b, p = (s * torch.rand(2, m, generator=rng, dtype=torch.float64).to(DEVICE) for s in (-6, 9))
    scale = torch.tensor([[0.3], [3.0]], dtype=torch.float64, device=DEVICE) / d
    want = sinkhorn_gan.soft_minimum(x.double(), y.double(), log_b, scale, same, p, True)
    assert_near([*sinkhorn_gan.triton_soft_minimum(x, y, log_b, scale, same, p, True)], [*want], LIMIT)
    assert_near(sinkhorn_gan.triton_soft_minimum(x, y, log_b, scale, same, p)[0], want[0], LIMIT)


CASES = [  # strips of 32 rows go along 32 columns and 32 coordinates at a time; gradients take 16 to 64
    (compare_mmd, (5, 37, 1, (0.7, 1.1, 5.0))),
    (compare_mmd, (2, 2, 3)),
    (compare_mmd, (40, 33, 17, (8.0, 4.0, 2.0, 1.0, 0.5))),
    (compare_mmd, (33, 65, 17, (0.5,), "rational_quadratic")),
    (compare_mmd, (64, 32, 32, (1.0, 2.0, 4.0), "rational_quadratic")),
    (compare_mmd, (4, 3, 784, (0.2, 5.0), "rational_quadratic")),
    (compare_sinkhorn, (1, 1, 1)),
    (compare_sinkhorn, (5, 9, 3)),
    (compare_sinkhorn, (70, 33, 17)),
    (compare_sinkhorn, (40, 40, 2, True)),
    (compare_sinkhorn, (9, 3, 784)),
]
WIDE = (32.0, 16.0, 8.0, 4.0, 2.0)
MANY = [(compare_mmd, (n, n - 223, 64, WIDE)) for n in (1000, 4096, 65_536)]
MANY += [(compare_sinkhorn, (n, n - 223, 64)) for n in (1000, 4096, 65_536)]


@pytest.mark.gpu
@pytest.mark.parametrize("compare, problem", CASES)
def test_kernels_agree_with_float64(compare, problem):
    compare(*problem)


@pytest.mark.gpu
@pytest.mark.parametrize("compare, problem", MANY)
def test_many_points_agree_with_float64(compare, problem):
    compare(*problem)


@pytest.mark.gpu
def test_kernels_keep_nan():
    """A maximum would hide it."""
    z = torch.full((5, 2), math.nan, device=DEVICE)
    assert mmd_gan.triton_sums(z, 3, "gaussian", ((1.0, 1.0),))[0].isnan().all()


@pytest.mark.parametrize("part, count", [("mmd", 6), ("sinkhorn or nan", 6)])
def test_interpreter(part, count):
    """The two tests above, in Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-n0", "-mgpu", f"-kkernels and ({part})", __file__]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in result.stdout:
        pytest.skip("the interpreter of Triton 3.6 fails with NumPy 2.4")
    assert result.returncode == 0 and f"\n{count} passed" in result.stdout, result.stdout


MIX = ((8.0, 1.0), (4.0, 0.5), (2.0, 1.0), (1.0, 2.0), (0.5, 1.0))
LAUNCHES = [
    (mmd_gan.mmd_kernel, {"D": d, "OUT_D": out, "GAUSSIAN": gaussian, "MIX": MIX})
    for d, out in ((2, 16), (16, 16), (32, 32), (64, 64), (784, 64))
    for gaussian in (True, False)
]
LAUNCHES += [
    (sinkhorn_gan.sinkhorn_kernel, {"D": d, "OUT_D": out, "SAME": same, "MEANS": means})
    for d, out, means in ((2, 16, True), (16, 16, True), (64, 64, True), (784, 64, True), (784, 16, False))
    for same in (True, False)
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("make_kernel, constants", LAUNCHES)
def test_no_registers_spill(make_kernel, constants, capability, tmp_path, monkeypatch):
    """Compiled as it is launched, a kernel has nothing on the stack or in the local memory of a thread."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, constants = make_kernel(), constants | {"BLOCK": 32, "BLOCK_D": 32}
    names, sizes = kernel.arg_names, ("n", "m", "size")
    kinds = dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*fp32") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # Pointers, and sizes that are a multiple of it, are known to be divisible by 16.
    even = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in sizes]
    source = ASTSource(kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in even})
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": 8, "num_stages": 2}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= 99 * 1024  # what a block may have on a GPU that one buys
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = subprocess.check_output([tool, "--dump-resource-usage", path], text=True)
    assert re.findall(r"STACK:(\d+)", found)[-1] == "0", found
    assert {*re.findall(r"LOCAL:(\d+)", found)} <= {"0"}, found


@pytest.mark.gpu
def test_cuda_is_deterministic_and_keeps_no_matrix():
    x, y = (cloud(n, 64, n, dtype=torch.float32).cuda() for n in (20_000, 10_000))
    for loss in (
        lambda x, y: mmd_gan.mmd2(x, y, (4.0, 8.0)),
        lambda x, y: sinkhorn_gan.sinkhorn_divergence(x, y, 5.0),
    ):
        first = with_gradients(loss, x, y)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        assert all(map(torch.equal, first, with_gradients(loss, x, y)))
        assert torch.cuda.max_memory_allocated() - before < 100e6  # the matrix has 800 MB
