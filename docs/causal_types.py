"""Tries every causal language model type of the installed transformers as a seed, and keeps what came of it.

``python docs/generate.py families`` runs it (two minutes, 1 GB of memory) and writes ``causal_types.json``, from which
``families.md`` is made. A type whose default config rules it out is not built. All others are built tiny, from the
config's defaults with its sizes made small: a seed and an expert, which are merged into two mixtures, with Expert KV
and with Shared KV. A type works if the mixture computes what each dense model does when both gates are forced on it.
"""

from __future__ import annotations

import gc
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("causal_types.json")

TOLERANCE = 1e-5
"""Greatest difference of logits, as a share of the greatest, that counts as working."""

MOST_PARAMETERS = 2_000_000
"""No tiny model is larger; most have 30,000 parameters."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size",), 97),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "shared_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    "head_dim": 8,
    "rotary_dim": 4,
    "mamba_n_heads": 8,
}
"""What the sizes of a default config become, wherever they are larger."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LACKING: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
}
"""What the default config of a type leaves out, so that not even transformers can build it."""

DENSE_VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "granitemoehybrid": (
        {"num_local_experts": 0, "layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
        "no experts, attention in every layer",
    ),
    "jamba": ({"num_experts": 1}, "one expert"),
}
"""Settings beside the default that many models of a type have, and words for them."""


def survey() -> dict[str, Any]:
    """What came of every type: transformers' version, and of each type whether it works or why not."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = {}
    for model_type in sorted(NAMES):
        rows[model_type] = attempt(model_type)
        if model_type in DENSE_VARIANTS:
            changes, words = DENSE_VARIANTS[model_type]
            rows[f"{model_type}, {words}"] = attempt(model_type, changes)
    return {"transformers": transformers.__version__, "types": rows}


def refusal(model_type: str, changes: dict[str, Any] | None = None) -> str | None:
    """Why a type's default config rules it out, before anything is built; None: it does not.

    Args:
        model_type: of a causal language model.
        changes: settings beside its default config.
    """
    from transformers import CONFIG_MAPPING

    from branchmix.checkpoint.families import why_unfit

    try:
        config = CONFIG_MAPPING[model_type](**LACKING.get(model_type, {}), **(changes or {}))
        return why_unfit(json.loads(config.to_json_string(use_diff=False)))
    except Exception as error:  # whatever a class says of its own default config
        return why_unfit({"model_type": model_type}) or _not_tried(error)


def attempt(model_type: str, changes: dict[str, Any] | None = None) -> str:
    """``works``, ``works, by inference``, or the reason why not.

    Args:
        model_type: of a causal language model.
        changes: settings beside its default config.
    """
    from branchmix.checkpoint.families import families
    from branchmix.errors import CompatibilityError

    reason = refusal(model_type, changes)
    if reason is not None:
        return reason
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(scratch)
        try:
            for seed, name in enumerate(("seed", "expert")):
                model = build(model_type, seed, changes)
                model.save_pretrained(folder / name)
        except Exception as error:  # whatever its class says of a config it was not made for
            return _not_tried(error)
        finally:
            gc.collect()
        try:
            greatest = max(_differences(folder))
        except CompatibilityError as error:
            return str(error).split("\n")[0].removeprefix("seed: ").strip()
    if not greatest <= TOLERANCE:
        return f"fails: logits differ by {greatest:.1g}"
    return "works" if model.config.model_type in families() else "works, by inference"


def _not_tried(error: Exception) -> str:
    last = str(error).strip().split("\n")[-1].strip()[:100]
    return f"not tried: no tiny model of it could be built ({type(error).__name__}: {last})"


def _differences(folder: Path) -> Iterator[float]:
    """Of each expert of both mixtures, relative to the greatest logit."""
    import branchmix

    recipe = {"seed": str(folder / "seed"), "experts": [{"name": "expert", "model": str(folder / "expert")}]}
    for attention in ("kv_experts", "kv_sharing"):
        report = branchmix.upcycle({**recipe, "attention": attention}, folder / attention, verify=True)
        assert report.verification is not None
        for check in report.verification.experts:
            assert check.skipped is None
            yield check.max_difference / max(1.0, check.max_logit)


def build(model_type: str, seed: int, changes: dict[str, Any] | None = None) -> Any:
    """A tiny random model in fp32, tried without memory first, whose norms, biases and matrices all matter.

    Args:
        model_type: of a causal language model.
        seed: of its random numbers.
        changes: settings beside its default config.

    Raises:
        Exception: whatever the type's classes say of such a config; ValueError if it is larger than MOST_PARAMETERS.
    """
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _tiny_config(model_type, {**LACKING.get(model_type, {}), **(changes or {})})
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"its smallest model has {size:,} parameters")
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.08)
    model.tie_weights()
    return model


def _tiny_config(model_type: str, changes: dict[str, Any]) -> Any:
    """The default config with ``SIZES``; special tokens are within the vocabulary, and lists as long as the layers."""
    from transformers import CONFIG_MAPPING

    maker = CONFIG_MAPPING[model_type]
    base = maker()
    default = base.to_dict()
    renamed = set(getattr(maker, "attribute_map", {}))
    layers = getattr(base, "num_hidden_layers", None)
    small: dict[str, Any] = {}
    for key, value in default.items():
        size = SIZES.get(key)
        if key in renamed:
            continue
        if size is not None and not isinstance(value, bool) and isinstance(value, int) and value > size:
            small[key] = size
        elif key in ("head_dim", "num_key_value_heads") and value is None:
            small[key] = SIZES[key]
        elif key.endswith("token_id") and isinstance(value, int) and value >= SIZES["vocab_size"]:
            small[key] = 3
        elif key.endswith("token_id") and isinstance(value, list):
            small[key] = [3]
        elif isinstance(value, list) and layers and len(value) == layers > 2:
            small[key] = (list(dict.fromkeys(value)) * 2)[:2]
    return maker(**{**small, **changes})


def write() -> None:
    """Make ``causal_types.json`` anew."""
    DATA.write_text(json.dumps(survey(), indent=1) + "\n", encoding="utf-8")


def read() -> dict[str, Any]:
    """What ``causal_types.json`` holds."""
    found: dict[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found
