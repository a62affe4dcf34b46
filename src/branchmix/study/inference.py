"""What a model costs while it generates, as in BAM's section 7.3: seconds for some tokens after a prompt, and cache.

Models are timed in turn, run after run, so that a machine that becomes slower does so for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from branchmix.study.settings import Inference


def measure_inference(
    models: Mapping[str, Path], settings: Inference, *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Latency and KV memory of each model: ``{name: {"seconds": [...], "kv_cache_bytes": ...}}``.

    Weights and cache are bf16 where the device is faster in it, else fp32; greedy, one sequence, random tokens. The
    first run is not timed. All models have to fit into memory together.
    """
    import torch
    from transformers.utils import logging

    from branchmix.likelihood.loading import load_language_model
    from branchmix.models.chunked_branchmix import faster_in_bf16

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if faster_in_bf16(device) else torch.float32
    loaded = {
        name: load_language_model(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval().to(device)
        for name, folder in models.items()
    }
    measured: dict[str, Any] = {name: {"seconds": []} for name in loaded}
    for run in range(settings.runs + 1):
        for name, model in loaded.items():
            vocabulary = model.config.get_text_config().vocab_size
            generator = torch.Generator().manual_seed(run)
            ids = torch.randint(0, vocabulary, (1, settings.prompt), generator=generator).to(device)
            begin = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=settings.new_tokens,
                min_new_tokens=settings.new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
            if device.type == "cuda":
                torch.cuda.synchronize()
            if run:
                measured[name]["seconds"].append(round(time.perf_counter() - begin, 5))
            cached = [kept for layer in output.past_key_values.layers for kept in (layer.keys, layer.values)]
            measured[name]["kv_cache_bytes"] = sum(kept.numel() * kept.element_size() for kept in cached)
    return {
        "models": measured,
        **settings.model_dump(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
