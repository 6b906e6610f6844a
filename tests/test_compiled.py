"""Kernels that run compiled on a GPU, compiled here for the CPU: their numbers, memory and number of variants."""

import dataclasses
import re
import shutil

import oisd
import pytest
import torch
from support import kernels
from tools.bench import lens_batch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from conftest import needs_vectors

pytestmark = [pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"), needs_vectors]
V = 1000
FORMS = [(1, 0, 1.0), (1, 1, 1.0), (2, 0, 0.7), (2, 1, 0.7), (2, 2, 0.7), (2, 2, 1.3)]  # layers, learning, tau


@pytest.fixture
def everything_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "on_gpu", lambda logits: len(logits) > 1)
    # The cache on disk ignores ATEN_CPU_CAPABILITY: code for AVX-512 would run with AVX2, and be wrong.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    kernels.compiled.cache_clear()


def large_buffers(code: list[str]) -> list[str]:
    """Find allocations of (n, V) in Inductor's generated code; n is a symbol there, V a number."""
    shapes = re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", "\n".join(code))
    return [shape for shape in shapes if str(V) in shape.replace(" ", "").split(",")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layers,learning,tau", FORMS)
def test_compiled_rows_are_the_plain_ones_and_allocate_no_logits(layers, learning, tau, dtype, request):
    torch.manual_seed(0)
    plain, targets = (3 * torch.randn(layers, 9, V)).to(dtype), torch.randint(V, (9,))
    logits = plain.clone()
    expected = kernels.lens_rows(plain, targets, 0.7, tau, learning)
    request.getfixturevalue("everything_compiled")
    found, code = run_and_get_code(kernels.lens_rows, logits, targets, 0.7, tau, learning)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logits, plain, rtol=0.01, atol=1e-6)  # one unit of bfloat16
    assert not large_buffers(code)
    assert len(code) == 1 + (learning > 0) + (layers > 1) + (learning > 1)  # statistics, a write, sums of JS, a write


def test_a_large_buffer_would_be_found(everything_compiled):
    def product(logits):  # whose left factor goes through memory
        return logits.exp() @ logits.mT

    assert large_buffers(run_and_get_code(kernels.kernel, product, torch.randn(9, V))[1])


def test_the_first_ratio_is_one_and_any_batch_uses_the_same_kernels(everything_compiled):
    torch.manual_seed(0)
    config = dataclasses.replace(oisd.Config(), lens_chunk_tokens=16, distill_temperature=1.5, dtype="float32")
    counters.clear()
    for N in (37, 16, 5, 50, 2, 1, 0):
        inputs = [torch.randn(n, 24).bfloat16().requires_grad_() for n in (N, N, V)]
        batch = lens_batch(torch.randint(V, (N,)), torch.randn(N), torch.randn(N))
        scored, _ = oisd.read_tokens(inputs[0], inputs[2], batch.target_ids, config)
        loss, _, _, logprobs, *_ = oisd.LensPass.apply(*inputs, batch, config)
        loss.backward()
        assert torch.equal(scored, logprobs)
    assert counters["stats"]["unique_graphs"] == 4  # row_stats, js_sums, and two writes
