"""`pytest tests/test_families.py`: the families that the program trains are right, and others are refused by name.

Tiny random models, about a minute; `tools/families.py` builds and judges them, and does the same for every family.
"""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import inputs
import oisd
import plumbing
from settings import UserError
from tools.families import CONFIG, LONGEST, judge, made_rollouts, tiny_config, tiny_model

RIGHT = (
    "llama qwen2 qwen3 qwen2_moe qwen3_moe mistral ministral mixtral gemma gemma3_text phi3 olmo olmo2 olmo3 olmoe "
    "smollm3 gpt_neox opt glm4 granite cohere ernie4_5 exaone4 starcoder2 seed_oss deepseek_v2 apertus "
    "hunyuan_v1_dense hunyuan_v1_moe bitnet gpt2"
).split()
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [4.0, 5.0, 6.0, 7.0],
}


def tapped(family, config=CONFIG, **changes):
    return oisd.TappedModel(tiny_model(tiny_config(family, **changes)), config)


@pytest.mark.parametrize("family", RIGHT)
def test_packed_is_alone_and_gradients_are_those_of_dense_autograd(family):
    assert judge(family, tiny_config(family)).startswith("right")


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("stablelm", {}, "mixes up packed rows: its layers drop the borders"),
        ("lfm2", {}, "mixes up packed rows: a rollout alone has other log-probs"),
        ("jamba", {}, "mixes up packed rows: a rollout alone has other log-probs"),
        ("qwen3_next", {"layer_types": ["full_attention", "linear_attention"] * 2}, "has no attention in layer 2"),
        ("gemma3", {}, "is a gemma3, no plain language model"),
        ("gemma2", {}, "caps its attention scores"),
        ("nanochat", {}, "does more than unembed"),
        ("phi", {}, "or it adds a bias"),
        ("phimoe", {}, "training computes something else"),
        ("doge", {}, "more than a softmax of queries and keys"),
        ("deepseek_v32", {}, "layers of the kind 'indexed_attention'"),
        ("bert", {}, "no stack of decoder layers"),
        ("jetmoe", {}, "set recompute_layers = 0"),
        ("mistral", {"sliding_window": LONGEST - 1}, f"window of {LONGEST - 1} tokens, but"),
    ],
)
def test_what_would_be_wrong_is_refused_by_a_line_of_its_own(family, changes, line):
    verdict = judge(family, tiny_config(family, **changes))
    assert verdict.startswith("refused: ") and line in verdict, verdict


def test_rotary_angles_that_depend_on_the_longest_rollout_are_refused():
    """Longrope turns every rollout of a row by other angles as soon as one of them is long."""
    for longest, allowed in ((64, True), (65, False)):
        config = dataclasses.replace(CONFIG, max_response_tokens=longest - CONFIG.max_prompt_tokens)
        model = tapped("phi3", config, rope_parameters=LONGROPE, original_max_position_embeddings=64)
        refused = pytest.raises(UserError, match="positions up to 64 change the predictions of short rollouts")
        with contextlib.nullcontext() if allowed else refused:
            inputs.check_model(model)


def test_weights_that_are_not_finite_are_named():
    model = tapped("llama")
    model.model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"weight model\.layers\.1\.mlp\.up_proj\.weight is finite"):
        inputs.check_model(model)


def test_training_draws_no_dropout(tmp_path):
    """GPT-2 has three kinds of it, OPT drops whole layers as well."""
    for family, changes in (("gpt2", dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.1)), ("opt", {})):
        changes |= {"dropout": 0.1, "attention_dropout": 0.1, "layerdrop": 0.5} if family == "opt" else {}
        tiny_model(tiny_config(family, **changes)).save_pretrained(tmp_path / family)
        config = dataclasses.replace(CONFIG, model=str(tmp_path / family))
        model = oisd.TappedModel(oisd.load_model(config)[0], config)
        batch = oisd.pack(made_rollouts(), config)
        train, score = (model.train(mode)(model.response_logprobs, batch)[0] for mode in (True, False))
        assert torch.equal(train, score)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])  # the second: full and sliding layers by turns
def test_sampled_attention_ends_where_a_layers_window_does(family):
    """The rollouts are longer than the window; the pass is the model's own, for only FlashAttention packs such."""
    flash = {"attention": "flash_attention_2", "dtype": "bfloat16"}
    config = dataclasses.replace(CONFIG, **flash, attention_window=8, attention_strided=7)
    model = tapped(family, config, sliding_window=12)
    inputs.check_model(model)  # its tap agrees with eager attention, and flash would be allowed
    model.model.set_attn_implementation("eager")
    row = made_rollouts()[0].prompt_ids * 5  # 40 tokens
    with torch.no_grad(), model.recording(*model.taps, packed=False):
        attentions = model.model(input_ids=torch.tensor([row]), use_cache=False, output_attentions=True).attentions
    queries = torch.arange(len(row))
    keys, valid = oisd.sample_attention_keys(queries, 8, 7)
    assert (valid & (queries[:, None] - keys >= 12)).any()  # some lie before the window
    for tap, weights in zip(model.taps, attentions):
        mine = oisd.attention_scores(tap, queries, keys, valid).softmax(-1)  # (S, H, K)
        sampled = weights[0].transpose(0, 1).gather(2, keys[:, None].expand(-1, weights.shape[1], -1)) * valid[:, None]
        torch.testing.assert_close(mine, sampled / sampled.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    batch = SimpleNamespace(queries=queries, position_ids=queries[None])
    js = oisd.attention_js(model.student_tap, model.taps[-1], batch, config)
    assert js.isfinite().all()


@contextlib.contextmanager
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.use_deterministic_algorithms(False)
        dist.destroy_process_group()


def test_a_sharded_model_gets_every_tensor_of_its_source(tmp_path, monkeypatch):
    """Phi3's longrope after one forward pass: `inv_freq` and `original_inv_freq` are one object."""
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}
    tiny_model(tiny_config("phi3", **changes)).save_pretrained(tmp_path)
    config = dataclasses.replace(CONFIG, model=str(tmp_path))
    source, ids = oisd.TappedModel(oisd.load_model(config)[0], config), torch.tensor([made_rollouts()[0].prompt_ids])
    inputs.check_model(source)
    rope = source.model.model.rotary_emb
    assert rope.inv_freq is rope.original_inv_freq
    with group_of_one() as mesh, torch.no_grad():
        model = oisd.TappedModel(oisd.load_model(config, empty_on="meta")[0], config)
        oisd.shard(model, mesh, config)
        plumbing.load_shards(model, source, torch.device("cpu"))
        logits = model.eval()(lambda: model.model(ids, use_cache=False).logits)
        assert torch.equal(logits, source.model.eval()(ids, use_cache=False).logits)
        rope = model.model.model.rotary_emb
        rope.original_inv_freq = rope.original_inv_freq + 1
        with pytest.raises(UserError, match=r"rotary_emb\.original_inv_freq did not reach"):
            plumbing.hold_to_source(model, source, torch.device("cpu"))
        monkeypatch.setattr(plumbing.sharded_state, "set_model_state_dict", lambda *_, **__: None)
        with pytest.raises(UserError, match=r"embed_tokens\.weight did not reach"):
            plumbing.load_shards(model, source, torch.device("cpu"))
