"""Which of Transformers' model families the program may train: every causal one, in a tiny random form.

    python tools/families.py              all of them, a line each; a few minutes
    python tools/families.py llama olmo2  only these

Each is saved to a folder and goes the program's own way: `load_model`, `TappedModel`, `check_model`. What those let
pass is held to an independent truth: each rollout alone through another copy of the model, eager, with Transformers'
own hidden states and attentions, and losses written out densely. Log-probs, sampled attention and the gradient of every
weight must agree to single precision. A family with a sliding window is made twice, the second time with one that is
shorter than the rollouts: those the program must refuse.

    right     what the program computes is what the model is
    refused   the program would not start, and says why
    WRONG     the program would start, and train on wrong numbers
    traceback an error without a line for the user
"""

import dataclasses
import logging
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import inputs
import oisd
from settings import UserError

SECONDS = 60  # of one family
LONGEST = 48  # tokens of a rollout
WINDOW = 20  # a window shorter than that
CONFIG = dataclasses.replace(
    oisd.Config(),
    student_layer=2,
    attention_steps=6,
    attention_window=5,
    attention_strided=4,
    attention_weight=1.0,
    internal_mean="token",  # the sums compared are then plain
    max_prompt_tokens=8,
    max_response_tokens=LONGEST - 8,
    lens_chunk_tokens=16,
    dtype="float32",
)
# What a config has of these is set; anything else stays as its authors chose.
SHAPE = (
    {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    | {"max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 256}  # grouped queries
    | dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4)
    | dict.fromkeys("num_experts_per_tok num_experts_per_token moe_k moe_topk".split(), 2)
    | dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size".split(), 16)
    | {"tie_word_embeddings": False, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    | {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
)
# Of mixed layers, student and teacher get those with attention: the others are refused for having none.
MIXED = ["linear_attention", "full_attention"] * 2
WINDOWED = ["full_attention", "sliding_attention"] * 2
CONVOLVED = {"layer_types": ["conv", "full_attention"] * 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
TWEAKS: dict[str, dict] = {
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "dots1": {"n_shared_experts": 1, "layer_types": WINDOWED},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 256},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "gemma3_text": {"layer_types": WINDOWED},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": MIXED},
    "laguna": {"layer_types": WINDOWED},
    "lfm2": CONVOLVED,
    "lfm2_moe": CONVOLVED | {"num_dense_layers": 1},
    "mellum": {"layer_types": WINDOWED},
    "minimax": {"layer_types": MIXED},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"] * 2},
    "olmo_hybrid": LINEAR | {"layer_types": MIXED},
    "qwen2": {"use_sliding_window": True, "layer_types": WINDOWED},
    "qwen3_5_moe_text": LINEAR | {"layer_types": MIXED},
    "qwen3_5_text": LINEAR | {"layer_types": MIXED},
    "qwen3_next": LINEAR | {"layer_types": MIXED},
    "smollm3": {"use_sliding_window": True, "layer_types": WINDOWED},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **changes) -> PreTrainedConfig:
    """Raises: what the family's config class does."""
    kind = CONFIG_MAPPING[family]
    known = kind()
    shape = {name: value for name, value in SHAPE.items() if name in known.to_dict() or name in known.attribute_map}
    if "kv_lora_rank" in shape:  # latent attention has a key for every query, and calls its rotary part a head
        shape |= {"num_key_value_heads": 4, "head_dim": 4}
    return kind(**shape | TWEAKS.get(family, {}) | changes)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Random, but not near-uniform in everything it computes, as the usual initialisation is."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        else:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def made_rollouts(vocabulary: int = 61) -> list[oisd.Rollout]:
    """Of many lengths, two of them equal and one as long as they get, with advantages and old log-probs."""
    torch.manual_seed(1)
    rollouts = []
    for prompt, response in ((8, LONGEST - 8), (3, 12), (5, 10), (2, 1), (4, 30)):
        ids = torch.randint(vocabulary, (prompt + response,)).tolist()
        old = -4 + 0.3 * torch.randn(response)
        parts = ids[:prompt], ids[prompt:], old.tolist(), "stop"
        rollouts.append(oisd.Rollout(*parts, advantage=1.5 * torch.randn(()).item(), old_logprobs=old))
    return rollouts


def js(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.clamp(min=1e-30), q.clamp(min=1e-30)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


def sampled_attention(weights: Tensor, rollout: oisd.Rollout, config: oisd.Config) -> list[Tensor]:
    """Attention (H, T, T) of one rollout alone -> (H, K_t) for each sampled step, renormalised (Eq. 9)."""
    rows = []
    for step in oisd.sample_attention_steps(len(rollout.response_ids), config.attention_steps):
        query = len(rollout.prompt_ids) - 1 + step
        window, strided = config.attention_window, config.attention_strided
        keys, valid = oisd.sample_attention_keys(torch.tensor([query]), window, strided)
        row = weights[:, query, keys[valid]]
        rows.append(row / row.sum(-1, keepdim=True))
    return rows


def truth(model: PreTrainedModel, rollouts: list[oisd.Rollout], config: oisd.Config) -> tuple[Tensor, list, Tensor]:
    """-> log-probs (N,); the sampled attention of student and teacher, step by step; the loss, with its graph."""
    logprobs, sampled, loss = [], [], 0.0
    backbone, head = model.get_decoder(), model.get_output_embeddings()
    norm = next(module for module in backbone.children() if "norm" in type(module).__name__.lower())
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
        rows, targets = slice(len(rollout.prompt_ids) - 1, -1), torch.tensor(rollout.response_ids)
        final, unscaled = out.logits[0, rows], head(out.hidden_states[-1][0, rows])
        scale = (final.detach().norm() / unscaled.detach().norm()).item()
        student = scale * head(norm(out.hidden_states[config.student_layer][0, rows]))
        logprob = final.log_softmax(-1)[range(len(targets)), targets]
        ratio, advantage = (logprob - rollout.old_logprobs).exp(), rollout.advantage
        policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        policy = policy.clamp(max=10 * abs(advantage)) if advantage < 0 else policy
        clipped = max(-1.0, min(1.0, advantage))
        loss += (policy + clipped * js(student.softmax(-1), final.detach().softmax(-1))).sum()
        layers = [out.attentions[layer - 1][0] for layer in (config.student_layer, len(out.attentions))]
        pairs = list(zip(*(sampled_attention(weights, rollout, config) for weights in layers)))
        loss += clipped * sum(js(mine, teacher.detach()).mean() for mine, teacher in pairs)
        logprobs.append(logprob.detach())
        sampled += pairs
    return torch.cat(logprobs), sampled, loss


def compare(tapped: oisd.TappedModel, plain: PreTrainedModel) -> dict[str, float]:
    """How far the program is from the truth: largest differences, gradients in units of their largest number."""
    rollouts, config = made_rollouts(), tapped.config
    batch = oisd.pack(rollouts, config)
    logprobs, sampled, loss = truth(plain.eval(), rollouts, config)
    loss.backward()
    tapped.train()
    scores = tapped(tapped.response_logprobs, batch)[0]
    found = {"log-probs": (scores - logprobs).abs().max().item(), "attention": 0.0}
    with torch.no_grad():
        tapped.hidden_states(batch)
        positions = batch.position_ids[0, batch.queries]
        keys, valid = oisd.sample_attention_keys(positions, config.attention_window, config.attention_strided)
        keys = keys + (batch.queries - positions)[:, None]
        for side, tap in enumerate((tapped.student_tap, tapped.taps[-1])):
            weights = oisd.attention_scores(tap, batch.queries, keys, valid).softmax(-1)
            for row, seen, pair in zip(weights, valid, sampled):
                found["attention"] = max(found["attention"], (row[:, seen] - pair[side]).abs().max().item())
    tapped.clear_taps()
    sums = tapped(tapped.losses, batch)
    total = sums["token_loss"] + sums["step_loss"]
    total.backward()
    found["loss"] = abs(total.item() - loss.item()) / max(1.0, abs(loss.item()))
    theirs = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in plain.named_parameters()}
    mine = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in tapped.model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in theirs.values())
    found["gradient"] = max(((mine[n] - theirs[n]).abs().max() / largest).item() for n in theirs)
    return found


def judge(family: str, config: PreTrainedConfig, attention: str = "sdpa") -> str:
    """-> `right ...`, `refused: ...`, `WRONG ...` or `not built ...`; any other error is the program's."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            if getattr(config, "num_hidden_layers", 0):
                tiny_model(config).save_pretrained(folder)
            else:  # of several models in one: its config is all that the program looks at
                config.save_pretrained(folder)
        except Exception as problem:
            return f"not built ({type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:160]})"
        settings = dataclasses.replace(CONFIG, model=folder, attention=attention)
        try:
            inputs.read_model_config(settings)
            tapped = oisd.TappedModel(oisd.load_model(settings)[0], settings)
            inputs.check_model(tapped)
        except UserError as problem:
            return f"refused: {str(problem).replace(folder, family)}"
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        found = compare(tapped, plain)
    verdict = "right" if all(value <= 1e-4 for value in found.values()) else "WRONG"
    return f"{verdict} (" + ", ".join(f"{name} {value:.0e}" for name, value in found.items()) + ")"


def verdict_of(family: str) -> str:
    try:
        config = tiny_config(family)
    except Exception as problem:
        return f"not built ({type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:160]})"
    attention = "sdpa"
    verdict = judge(family, config, attention)
    if "scaled_dot_product_attention" in verdict:  # it has none
        attention = "eager"
        verdict = judge(family, config, attention)
    if verdict.startswith("right") and getattr(config, "sliding_window", None):
        short = judge(family, tiny_config(family, sliding_window=WINDOW), attention)
        verdict = short if short.startswith("WRONG") else f"{verdict}; with a window of {WINDOW} {short}"
    return verdict


def work(family: str, pipe) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    try:
        pipe.send(verdict_of(family))
    except BaseException as problem:
        line = traceback.extract_tb(problem.__traceback__)[-1]
        pipe.send(f"traceback ({type(problem).__name__}: {problem}, {Path(line.filename).name}:{line.lineno})")


def main(families: list[str]) -> int:
    torch.set_num_threads(1)
    fork, counts = multiprocessing.get_context("fork"), Counter()
    for family in families or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        mine, theirs = fork.Pipe()
        process = fork.Process(target=work, args=(family, theirs))
        process.start()
        verdict = mine.recv() if mine.poll(SECONDS) else f"not built (not done within {SECONDS} s)"
        process.kill()
        process.join()
        counts[verdict.split(" ")[0].rstrip(":")] += 1
        print(f"{family:20} {verdict}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return int(counts["WRONG"] + counts["traceback"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
