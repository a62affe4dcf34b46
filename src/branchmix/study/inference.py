"""What a model costs while it generates, as in BAM's section 7.3: seconds for some tokens after a prompt, and cache.

Models are timed in turn, run after run, so that a machine that becomes slower does so for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any


def measure_inference(
    models: Mapping[str, Path], *, prompt: int, new_tokens: int, runs: int, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Latency and KV memory of each model: ``{name: {"seconds": [...], "kv_cache_bytes": ...}}``.

    Weights and cache are bf16 where the device is faster in it, else fp32; greedy, one sequence, random tokens.

    Args:
        models: folders by name; those that are too large to hold together are no use here.
        prompt: tokens.
        new_tokens: generated after it.
        runs: timed ones, after one that is not.
        trust_remote_code: run code that the seed brings along.
    """
    import torch
    from transformers.utils import logging

    from branchmix.likelihood.loading import load_language_model
    from branchmix.models.chunked_branchmix import faster_in_bf16

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if faster_in_bf16(device) else torch.float32
    load = partial(load_language_model, dtype=dtype, trust_remote_code=trust_remote_code)
    loaded = {name: load(folder).eval().to(device) for name, folder in models.items()}
    found: dict[str, Any] = {name: {"seconds": []} for name in loaded}
    for run in range(runs + 1):
        for name, model in loaded.items():
            vocabulary = model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(run)
            ids = torch.randint(0, vocabulary, (1, prompt), generator=generator).to(device)
            begin = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:
                found[name]["seconds"].append(round(time.perf_counter() - begin, 5))
            layers = output.past_key_values.layers
            sizes = [
                layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size()
                for layer in layers
            ]
            found[name]["kv_cache_bytes"] = sum(sizes)
    return {
        "models": found,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "runs": runs,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
