"""Starting a vLLM engine inside this process, and workarounds for its version 0.32.0."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from support.processes import world
from support.settings import UserError, one_line


def start_engine(device: torch.device, **settings: Any) -> tuple[Any, type]:
    """Start vLLM's LLM(**settings): -> it, and the class of its sampling parameters.

    Raises: UserError if vLLM is missing or does not start.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine shares this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, CPU engines only
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # do not log each sleep and wake
    try:
        from vllm import LLM, SamplingParams
    except ImportError as problem:
        raise UserError(f"vLLM does not import ({problem}): install it or use hf") from None
    settings["enforce_eager"] |= device.type == "cpu"
    # The CPU engine cannot rewind a seeded request whose prompt was split.
    settings["enable_chunked_prefill"] = device.type != "cpu"
    if world() > 1:  # the engine uses the launcher's processes instead of starting its own
        settings["distributed_executor_backend"] = "external_launcher"
    threads = torch.get_num_threads()
    try:
        engine = LLM(**settings)
    except Exception as problem:  # too little memory, an unknown model, vLLM's own asserts
        raise UserError(f"the vLLM engine does not start: {one_line(problem)}") from problem
    if device.type == "cuda":
        torch.set_num_threads(threads)  # the engine leaves 1
    # At every sync vLLM reports tied heads and rotary angles as not loaded.
    reload_log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    reload_log.addFilter(lambda record: "Failed to load weights" not in str(record.msg))
    # It also warns when the trainer's own kernels are compiled.
    logging.getLogger("vllm.utils.jit_monitor").setLevel(logging.ERROR)
    return engine, SamplingParams


def repack_tied_head(engine: Any) -> None:
    """Update the packed copy of the head that a CPU engine multiplies by.

    A reload of tied embeddings does not update it: log-probs would drift from the trainer's.
    """

    def repack(model: Any) -> None:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)

    engine.apply_model(repack)
