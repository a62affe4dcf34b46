"""Numbers of a model from its config alone: sizes, FLOPs, and what a training step of it costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from branchmix.accounting import active_parameters, flops_per_token, kv_cache_bytes_per_token, parameters, shape_of
from branchmix.errors import RecipeError
from branchmix.study.graph import Cost
from branchmix.study.settings import StudyFile
from branchmix.train.schedule import optimizer_flops, token_flops


def step_cost(study: StudyFile, config: dict[str, Any], train: dict[str, Any]) -> Cost:
    """What one optimizer step of a run costs.

    Args:
        study: for the batch and the optimizer.
        config: of the model.
        train: keys of the run that say what is trained.

    Raises:
        RecipeError: there is no formula for the family's FLOPs.
    """
    shares, lora, trained = None, 0, None
    if train.get("freeze") or train.get("adapters"):
        shares, lora, trained = _what_is_trained(config, train)
    flops = token_flops(config, study.sequence_length, shares, lora)
    if flops is None:
        model_type = config.get("seed_config", config)["model_type"]
        raise RecipeError(f"seed: there is no formula for the FLOPs of {model_type}, and no equal compute without")
    if trained is None:
        trained = parameters(config).total
    clips = study.run_of(train)["optimizer"]["max_grad_norm"] > 0
    return Cost(1, study.step_tokens, flops.training * study.step_tokens, optimizer_flops(trained, clips=clips))


def _what_is_trained(config: dict[str, Any], train: dict[str, Any]) -> tuple[dict[str, float], int, int]:
    """Shares by part, LoRA's parameters, and all trained parameters, of a model without storage."""
    import torch

    from branchmix.study.speed import new_model
    from branchmix.train import adapters, freeze
    from branchmix.train.record import trained_parts

    with torch.device("meta"):
        model = new_model(config)
    if train.get("adapters"):
        adapters.add(model)
    if named := train.get("freeze"):
        freeze.apply(model, [named] if isinstance(named, str) else named)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return *trained_parts(model), trained


def facts_of(config: dict[str, Any], context: int) -> dict[str, Any]:
    """Sizes of a model from its config: parameters, active ones, FLOPs of a token, bytes of its cache in bf16."""
    flops, counts, layers = flops_per_token(config, context), parameters(config), shape_of(config).sizes.num_layers
    layer = flops.layer
    return {
        "parameters": counts.total,
        "active_parameters": active_parameters(config).total,
        "forward_flops_per_token": flops.total,
        "layer_flops": {**asdict(layer), "attention": layer.attention, "total": layer.total},
        # In the parts of the paper's Table 10; a matrix takes two FLOPs for each of its parameters.
        "layer_parameters": {
            "attention_router": layer.attention_router // 2,
            "qkv": layer.qkv // 2,
            "output": counts.attention // layers - layer.qkv // 2,
            "ffn_router": layer.ffn_router // 2,
            "ffn": counts.ffn // layers,
        },
        "experts": config.get("num_experts", 1),
        "top_k": config.get("num_experts_per_tok", 1),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config, "bfloat16"),
    }
