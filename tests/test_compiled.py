"""What runs compiled on a GPU, compiled here for the processor: its numbers, its memory, its number of variants."""

import dataclasses
import re
import shutil

import pytest
import torch
from conftest import needs_vectors
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

import oisd
import rows
from test_oisd import CONFIG, tokens_of

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU"),
    needs_vectors,
]
V = 1000
FORMS = [(1, 0, 1.0), (1, 1, 1.0), (2, 0, 0.7), (2, 1, 0.7), (2, 2, 0.7), (2, 2, 1.3)]  # layers, learning, tau


@pytest.fixture
def everything_compiled(monkeypatch, tmp_path):
    for module in (oisd, rows):
        monkeypatch.setattr(module, "on_gpu", lambda logits: len(logits) > 1)
    # Its cache on disk does not know ATEN_CPU_CAPABILITY: code made for AVX-512 would be run with AVX2, and be wrong.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    rows.compiled.cache_clear()


def large_buffers(code: list[str]) -> list[str]:
    """Allocations of (n, V) in Inductor's generated code; n is a symbol there, V a number."""
    shapes = re.findall(r"= empty_strided_cpu\(\(([^)]*)\)", "\n".join(code))
    return [shape for shape in shapes if str(V) in shape.replace(" ", "").split(",")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layers,learning,tau", FORMS)
def test_compiled_rows_are_the_plain_ones_and_allocate_no_logits(layers, learning, tau, dtype, request):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, temperature=0.7, distill_temperature=tau)
    plain, targets = (3 * torch.randn(layers, 9, V)).to(dtype), torch.randint(V, (9,))
    logits = plain.clone()
    expected = oisd.lens_rows(plain, targets, config, learning)
    request.getfixturevalue("everything_compiled")
    found, code = run_and_get_code(oisd.lens_rows, logits, targets, config, learning)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logits, plain, rtol=0.01, atol=1e-6)  # one unit of bfloat16
    kernels = 1 + (learning > 0) + (layers > 1) + (learning > 1)  # statistics; a write; sums of JS; another write
    assert len(code) == kernels and not large_buffers(code), large_buffers(code)


def test_a_large_buffer_would_be_found(everything_compiled):
    """The check above sees what it looks for: the sums and the write of JS in one function go through memory."""

    def sum_and_write(student, teacher, *rest):
        kl, js = rows.js_sums(student, teacher, *rest)
        rows.write_js_derivative(student, teacher, *rest, kl)
        rows.write_softmax(teacher, rest[1], rest[2])
        return js

    student, teacher, scale = torch.randn(9, V), torch.randn(9, V), torch.tensor(1.0)
    stats = [rows.kernel(rows.row_stats, logits, scale) for logits in (student, teacher)]
    _, code = run_and_get_code(rows.kernel, sum_and_write, student, teacher, *stats, scale)
    assert large_buffers(code)


def test_the_first_ratio_is_one_and_any_batch_uses_the_same_kernels(everything_compiled):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, lens_chunk_tokens=16, distill_temperature=1.5)
    counters.clear()
    for N in (37, 16, 5, 50, 2, 1, 0):
        final, student, head = (torch.randn(n, 24).bfloat16().requires_grad_() for n in (N, N, V))
        numbers = torch.randn(N)
        batch = tokens_of(torch.randint(V, (N,)), numbers, torch.ones(N), numbers)
        scored, _ = oisd.read_tokens(final, head, batch.target_ids, config)
        loss, _, _, logprobs, *_ = oisd.LensPass.apply(final, student, head, batch, config)
        loss.backward()
        assert torch.equal(scored, logprobs)
    assert counters["stats"]["unique_graphs"] == 4  # row_stats, js_sums, and two writes
