"""Families of models: what the program trains is right, and what it could not train is refused.

The truth is independent but for the clipped policy loss: each rollout alone, eager attention, Transformers' own hidden
states and attentions, dense JS. `FAMILIES="glm4 exaone4" pytest tests/test_families.py` tries other families.
"""

import dataclasses
import os
import tomllib

import oisd
import pytest
import torch
from support import models
from support.settings import UserError
from test_oisd import js_by_hand, random_rollouts, with_config
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from conftest import ROOT

FAMILIES = "qwen3 qwen3_moe qwen2 llama mistral gemma gemma3_text phi3 olmo2 granite opt"
DATA = tomllib.loads((ROOT / "tests" / "families.toml").read_text())
CONFIG = with_config(attention_weight=1.0, internal_mean="token", max_tokens_per_gpu=65)


def make(family, folder, changes=None, **settings):
    """Save a tiny model of a family with large random weights; load, tap and check it as a run does."""
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict().keys() | kind().attribute_map
    shape = {name: DATA["shape"][name] for name in DATA["shape"].keys() & known}
    torch.manual_seed(0)
    model_config = kind(**shape | DATA["changes"].get(family, {}) | (changes or {}), pad_token_id=None)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.25 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    config = dataclasses.replace(CONFIG, model=str(folder), **settings)
    tapped = oisd.TappedModel(oisd.load_model(config)[0], config)
    oisd.check(tapped)
    return tapped


def js(p, q):
    return js_by_hand(p.clamp(min=1e-30), q.clamp(min=1e-30))


def sampled_attention(weights, queries):
    """Renormalize eager attention (H, T, T) over the sampled keys of some queries: -> (S, H, K)."""
    keys, valid = oisd.sample_attention_keys(queries, window=4, strided=3)
    sampled = weights[:, queries[:, None], keys].transpose(0, 1) * valid[:, None]
    return sampled / sampled.sum(-1, keepdim=True)


def true_loss(model, rollout):
    """Compute the loss of one rollout alone."""
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    output = model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    first = len(rollout.prompt_ids) - 1
    final = output.logits[0, first:-1]
    logprobs = final.log_softmax(-1)[range(len(final)), rollout.response_ids]
    A = torch.tensor(rollout.advantage)
    policy = oisd.policy_loss_sum(logprobs, rollout.old_logprobs, A, CONFIG)
    head = model.get_output_embeddings()
    norm = next(part for part in model.get_decoder().children() if "norm" in type(part).__name__.lower())
    student = head(norm(output.hidden_states[2][0, first:-1]))
    think = js(student.softmax(-1), final.detach().softmax(-1))
    queries = first + torch.tensor(oisd.sample_attention_steps(len(final), 5))
    mine, teacher = (sampled_attention(output.attentions[layer][0], queries) for layer in (1, -1))
    attention = js(mine, teacher.detach()).mean(1)
    return policy + A.clamp(-1, 1) * (think.sum() + attention.sum())


@pytest.mark.parametrize("family", os.getenv("FAMILIES", FAMILIES).split())
def test_packed_rows_have_the_losses_and_gradients_of_each_rollout_alone(family, tmp_path):
    model = make(family, tmp_path).train()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    rollouts = random_rollouts(4)
    expected = sum(true_loss(plain, rollout) for rollout in rollouts)
    expected.backward()
    total = sum(model(model.losses, oisd.pack(rollouts, CONFIG))[:2])  # token_loss + step_loss
    total.backward()
    assert_close(total, expected.float(), rtol=1e-4, atol=1e-4)
    largest = max(parameter.grad.abs().max() for parameter in plain.parameters())
    for name, parameter in plain.named_parameters():
        mine = model.model.get_parameter(name).grad
        assert_close(mine / largest, parameter.grad / largest, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("case", DATA["refused"], ids=lambda case: case["family"])
def test_other_models_are_refused_with_a_line_of_their_own(case, tmp_path):
    changes = dict(case)
    family, line = changes.pop("family"), changes.pop("line")
    with pytest.raises(UserError, match=line):
        make(family, tmp_path, changes, max_response_tokens=65 - 16)


def test_sampled_attention_ends_where_a_layers_window_does(tmp_path):
    """Full and sliding layers, in the model's own pass: only FlashAttention packs rows longer than a window."""
    model = make("gemma3_text", tmp_path, {"sliding_window": 20}, max_response_tokens=20 - 16)
    model.model.set_attn_implementation("eager")
    queries = torch.arange(40)
    with torch.no_grad(), model.recording(*model.taps, packed=False):
        attentions = model.model(input_ids=queries[None], use_cache=False, output_attentions=True).attentions
    keys, valid = oisd.sample_attention_keys(queries, window=4, strided=3)  # some are before the window
    for tap, weights in zip(model.taps, attentions):
        mine = oisd.attention_scores(tap, queries, keys, valid).softmax(-1)
        assert_close(mine, sampled_attention(weights[0], queries), rtol=1e-4, atol=1e-6)


def test_a_tensor_that_did_not_reach_the_sharded_model_is_named(tmp_path):
    """Rotary frequencies are in no state dict."""
    source, model = (make("llama", tmp_path) for _ in range(2))
    models.check_same_tensors(model, source, gathered=lambda tensor: tensor)
    model.model.model.rotary_emb.inv_freq += 1
    with pytest.raises(UserError, match=r"rotary_emb\.inv_freq did not reach"):
        models.check_same_tensors(model, source, gathered=lambda tensor: tensor)
