"""What runs compiled on a GPU, compiled here for the processor: whole, and with the numbers of the plain form."""

import shutil

import pytest
import torch

import oisd

FORMS = [(1, 0, 1.0, 0.0), (2, 0, 2.0, 0.0), (1, 1, 1.0, 0.05), (0, 0, 1.0, 0.0)]  # students, teachers, tau, clip


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("layers,teachers,tau,clip", FORMS)
def test_lens_rows_compile_whole(layers, teachers, tau, clip):
    torch.manual_seed(0)
    for n in (7, 9):
        logits = (3 * torch.randn(1 + layers + teachers, n, 1000)).bfloat16()
        targets, plain = torch.randint(1000, (n,)), logits.clone()
        found = oisd._compiled(oisd._lens_rows)(logits, targets, layers, 0.7, tau, clip)
        expected = oisd._lens_rows(plain, targets, layers, 0.7, tau, clip)
        for mine, other in zip(found, expected):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(logits, plain, rtol=0.01, atol=1e-6)  # one unit of bfloat16
