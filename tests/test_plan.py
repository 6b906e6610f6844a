"""The plan against arithmetic and a measured step."""

import dataclasses
import functools
import sys

import pytest
from conftest import ROOT
from transformers import Qwen3Config, Qwen3MoeConfig

import oisd
import plumbing
from tools import bench, plan


@pytest.fixture(scope="session")
def shape(tmp_path_factory):
    """The config of a model of 21 M parameters, without weights."""
    folder = tmp_path_factory.mktemp("shape")
    large = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096}
    Qwen3Config(**large, **heads, tie_word_embeddings=False, dtype="float32").save_pretrained(folder)
    return folder


def plan_words(shape, **changes):
    fields = {"model": shape, "max_response_tokens": 256, "max_tokens_per_gpu": 1024} | changes
    return ["--config", f"{ROOT / 'configs.toml'}:tiny", *(f"--{name}={value}" for name, value in fields.items())]


@pytest.fixture(scope="session")
def planned(shape):
    return functools.cache(lambda gpus=1, **changes: plan.plan(oisd.load_config(plan_words(shape, **changes))[1], gpus))


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is a measure with glibc's allocator only")
@pytest.mark.parametrize("changes", [{}, {"recompute_layers": "all"}, {"recompute_layers": "2"}], ids=str)
def test_planned_memory_is_what_a_step_takes(shape, planned, changes):
    (measured,) = bench.measured(plan_words(shape, **changes), ranks=1)
    print(f"{changes}: planned {planned(**changes).training / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert planned(**changes).training == pytest.approx(measured, rel=0.15)


def test_planned_parts_are_arithmetic(planned):
    layer = 512 * (8 + 2 * 4 + 8) * 64 + 3 * 512 * 1536 + 2 * 512 + 2 * 64
    parameters = 4 * layer + 2 * 8000 * 512 + 512
    for gpus in (1, 4):
        found = planned(gpus)
        assert found.parts["parameters"] == pytest.approx(4 * parameters / gpus, rel=0.01)
        assert found.parts["optimizer"] == pytest.approx(8 * parameters / gpus, rel=0.01)
        assert found.parts["gradients"] >= 4 * parameters / gpus * 0.7
        assert found.resident == pytest.approx(12 * parameters / gpus, rel=0.01)
        # 1,024 tokens; a layer keeps its input, both norms' outputs, query, key, value, attention's output, and three
        # of the MLP's width; the final norm, student and policy gradients of the 896 response tokens come on top.
        layers = 4 * 1024 * (4 * (5 * 512 + 2 * 4 * 64 + 3 * 1536))
        assert layers < found.parts["activations, rest"] < 2.5 * layers
        assert found.parts["logits chunk"] == 2 * 4 * 8000 * 1024  # float32 logits of policy and student
    # Three responses of 256 tokens and one of 128, 32 more of each the prompt. The layers: scoring, forward, twice that
    # backward. The head: once in scoring, twice forward and four times backward in training.
    dense = 2 * (4 * 4 * layer * 1024 + 7 * 8000 * 512 * (3 * 256 + 128))
    attention = 4.5 * 2 * 4 * 512 * (3 * 288**2 + 160**2)  # causal: 2 H d T^2 forward, 2.5 times that backward
    assert found.flops == pytest.approx((dense + attention) / 1024 * found.tokens, rel=0.02)


def test_adapters_need_less(planned):
    all_weights, adapters = planned(4), planned(4, lora_rank=8)
    assert all(adapters.parts[part] < all_weights.parts[part] / 10 for part in ("optimizer", "gradients"))
    assert all_weights.training - adapters.training > 0.9 * 12 / 4 * 20e6  # gradient and moments of a quarter of them
    offloaded = planned(4, cpu_offload="true")
    assert offloaded.host == pytest.approx(16 * 5.2e6, rel=0.02) and offloaded.resident == 0
    left = sum(all_weights.parts[part] for part in ("gathered weights", "logits chunk", "activations, rest"))
    assert offloaded.training >= left and offloaded.parts["optimizer"] == 0
    assert offloaded.training == pytest.approx(left + 4 * 5.2e6, rel=0.1)  # and a gradient on its way to the host


def test_the_plan_says_what_to_turn(shape, planned, capsys, monkeypatch):
    words, found = plan_words(shape, sampler="vllm"), planned(4, sampler="vllm")
    monkeypatch.setattr(plan, "plan", lambda config, gpus: found if gpus == 4 else None)
    assert plan.main([*words, "--gpus", "2x2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("card: yes; vllm_memory = 0.90 holds") == 4 and all(part in shown for part in found.parts)
    config = dataclasses.replace(oisd.load_config(words)[1], recompute_layers="all", vllm_memory=0.4)
    for changes, message in (
        ({"training": 23e9, "parts": found.parts | {"activations, rest": 20e9}}, "a smaller max_tokens_per_gpu"),
        ({"training": 23e9, "parts": found.parts | {"logits chunk": 20e9}}, "a smaller lens_chunk_tokens"),
        ({"training": 23e9, "parts": found.parts | {"optimizer": 22e9}}, "more GPUs, lora_rank"),
        ({"training": 10e9, "kept_layer": 5e9}, "recompute_layers = 2 instead of 4 fits"),
        ({"resident": 15e9}, "vllm_memory at most 0.31"),
        ({"vllm_least": 12e9}, "vllm_memory at least 0.50"),
    ):
        assert message in plan.verdicts(dataclasses.replace(found, **changes), config)[24]
    for gpus in ("0", "x2", "2x", "four"):
        assert plan.main([*words, "--gpus", gpus]) == 2
        assert "name the GPUs" in capsys.readouterr().err




def test_what_cannot_be_traced_is_one_line(tmp_path, capsys):
    """Experts' products have no form without numbers in float32, in bfloat16 they do."""
    small = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32}
    Qwen3MoeConfig(**small, **heads, max_position_embeddings=2048, dtype="float32").save_pretrained(tmp_path)
    for dtype, code in (("float32", 2), ("bfloat16", 0)):
        assert plan.main([*plan_words(tmp_path, dtype=dtype), "--gpus", "2"]) == code
    shown = capsys.readouterr()
    assert "cannot be traced in float32" in shown.err and shown.err.count("\n") == 1 and "planned in" in shown.out


def test_vllm_counts_what_it_takes_beyond_weights_and_cache(planned, shape):
    config = oisd.load_config(plan_words(shape, sampler="vllm", vllm_memory=0.1))[1]
    found = planned(4, sampler="vllm", vllm_memory=0.1)
    longest = config.max_prompt_tokens + config.max_response_tokens
    weights = 2 * 4 * found.parts["parameters"] / 4  # of all four GPUs, in bfloat16
    cache = 2 * 2 * longest * 4 * 4 * 64  # 4 layers, 4 key heads of 64
    assert found.vllm_least == pytest.approx(weights + cache + plan.VLLM_WORKS, rel=0.01)
    room = 24e9 - plan.RESERVE
    full = dataclasses.replace(found, training=room - plan.VLLM_SLEEPS / 2, resident=0)
    assert "training takes" in plan.verdicts(full, config)[24]  # a sleeping engine keeps some


def test_layers_that_are_not_recomputed_are_planned(planned):
    """What every second layer keeps is half of what all keep, and the card's room decides how many may."""
    every, half, none = (planned(4, recompute_layers=count) for count in ("all", "2", "0"))
    assert every.training < half.training < none.training and every.flops > half.flops > none.flops
    assert every.kept_layer == pytest.approx((none.training - every.training) / 4, rel=1e-3) and none.kept_layer == 0
    assert half.training == pytest.approx((every.training + none.training) / 2, rel=0.05)


def test_auto_takes_what_the_plan_calls_the_most(planned, shape):
    config = oisd.load_config(plan_words(shape, sampler="vllm"))[1]
    found = dataclasses.replace(planned(4, sampler="vllm"), resident=10e9)
    assert config.vllm_memory == "auto" and "vllm_memory = 0.52" in plan.verdicts(found, config)[24]
    assert plumbing.largest_share(24e9, 24e9, 10e9) == 0.52  # (24 - 1.5 - 10) / 24
    assert plumbing.largest_share(80e9, 80e9, 0) == 0.9 and plumbing.largest_share(24e9, 24e9, 23e9) == 0
    assert plumbing.largest_share(12e9, 24e9, 4e9) == 0.27  # another process has half of the card
