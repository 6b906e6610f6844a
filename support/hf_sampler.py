"""Rollouts without vLLM, by Transformers' own `generate`. Slow for large models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

Sample = tuple[int, list[int], list[float], str]  # prompt index, response, log-probs, finish reason
SEGMENT = 16  # tokens after which finished sequences leave the batch


class SeededSampling(LogitsProcessor):
    """Draw each sequence's next token with that sequence's own generator; record its log-prob.

    Gumbel-max: argmax(log p - log E), with E ~ Exp(1), is a sample from p. Greedy decoding of the
    returned scores therefore samples, and a sequence's draws depend on its own seed alone.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, end_ids: Sequence[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.end_ids = set(end_ids)
        self.logprobs: list[list[float]] = [[] for _ in seeds]
        self.finished = [False] * len(seeds)
        self.rows = list(range(len(seeds)))  # the sequence of each row of the current batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logprobs = torch.log_softmax(scores.float() / self.temperature, dim=-1)  # (b, V)
        noise = torch.ones(scores.shape)
        for row, index in enumerate(self.rows):
            if not self.finished[index]:
                noise[row].exponential_(generator=self.generators[index])
        perturbed = logprobs - noise.to(logprobs.device).log()
        tokens = perturbed.argmax(dim=-1, keepdim=True)
        drawn = logprobs.gather(1, tokens)[:, 0].tolist()
        for index, token, logprob in zip(self.rows, tokens[:, 0].tolist(), drawn):
            if not self.finished[index]:
                self.logprobs[index].append(logprob)
                self.finished[index] = token in self.end_ids
        return perturbed


@dataclass
class HfSampler:
    """Sample from the very weights that are trained, with Transformers' `generate`."""

    model: PreTrainedModel
    end_ids: list[int]
    device: torch.device
    temperature: float
    max_response_tokens: int
    batch: int  # sequences generated at once
    dtype: str
    root: Callable | None = None  # module to generate within if weights are sharded
    ghost_bytes: ClassVar[int] = 0  # memory of its own that PyTorch would count

    def __post_init__(self) -> None:
        # Not the model's own generation config: its top-k or a penalty would bias every ratio.
        self.model.generation_config = GenerationConfig(eos_token_id=self.end_ids)
        sharded = self.root is not None and dist.is_initialized()
        self.ranks = dist.get_world_size() if sharded else 1

    def sync(self, model: PreTrainedModel) -> None:
        """Do nothing: these are the weights."""

    def sleep(self) -> None:
        """Do nothing: it has no memory of its own."""

    close = sleep

    def stream(self, prompts: list[list[int]], seeds: list[int]) -> Iterator[Sample]:
        """Yield a response per prompt and seed, batch by batch."""
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        starts = range(0, len(prompts), self.batch)
        batches = [by_length[start : start + self.batch] for start in starts]
        if self.ranks > 1:  # weights are gathered layer by layer, so all ranks take part to the end
            most = torch.tensor(len(batches), device=self.device)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            batches += [[]] * (int(most) - len(batches))
        for indices in batches:
            # a rank without prompts generates one token nobody reads
            batch_prompts = [prompts[i] for i in indices] or [[self.end_ids[0]]]
            batch_seeds = [seeds[i] for i in indices] or [0]
            samples = self._generate(batch_prompts, batch_seeds)
            yield from ((index, *sample) for index, sample in zip(indices, samples))

    @torch.no_grad()
    def _generate(
        self, prompts: list[list[int]], seeds: list[int]
    ) -> list[tuple[list[int], list[float], str]]:
        """Generate one batch, `SEGMENT` tokens at a time; then finished sequences leave it.

        With sharded weights all ranks must make the same calls, so there is a single segment.
        """
        longest = max(map(len, prompts))
        pad = self.end_ids[0]
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        mask = torch.tensor(mask, device=self.device)
        sampling = SeededSampling(seeds, self.temperature, self.end_ids)
        responses: list[list[int]] = [[] for _ in prompts]
        cache = None
        left = self.max_response_tokens
        was_training = self.model.training
        self.model.eval()
        while left and sampling.rows:
            generate = functools.partial(
                self.model.generate,
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                logits_processor=LogitsProcessorList([sampling]),
                do_sample=False,
                max_new_tokens=left if self.ranks > 1 else min(left, SEGMENT),
                eos_token_id=self.end_ids,
                pad_token_id=pad,
                synced_gpus=self.ranks > 1,
                return_dict_in_generate=True,
            )
            bfloat16 = self.dtype == "bfloat16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
                output = generate() if self.root is None else self.root(generate)
            new = output.sequences[:, ids.shape[1] :]
            cache = output.past_key_values
            left -= new.shape[1]
            for index, tokens in zip(sampling.rows, new.tolist()):
                responses[index] += tokens
            going = [row for row, i in enumerate(sampling.rows) if not sampling.finished[i]]
            ids = output.sequences[going]
            mask = torch.cat([mask, torch.ones_like(new)], dim=1)[going]
            if 0 < len(going) < len(sampling.rows):
                cache.batch_select_indices(torch.tensor(going, device=self.device))
            sampling.rows = [sampling.rows[row] for row in going]
        self.model.train(was_training)
        return [
            (response[: len(logprobs)], logprobs, "stop" if finished else "length")
            for response, logprobs, finished in zip(responses, sampling.logprobs, sampling.finished)
        ]
