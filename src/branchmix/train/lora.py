"""PEFT LoRA on a dense model. The run writes an adapter folder, which ``branchmix upcycle`` takes as an expert."""

from __future__ import annotations

from typing import Any

from torch import nn

from branchmix.checkpoint.families import nearest
from branchmix.errors import RecipeError
from branchmix.models.attention_branchmix import is_conv1d
from branchmix.train.config import Lora


def add(model: Any, lora: Lora) -> Any:
    """Add low-rank updates to the model's linear layers, starting at zero, and train only these.

    ``all-linear`` means every linear layer except the output embedding. No module is trained as a whole, so everything
    an expert learns can be merged into the seed's matrices.

    Returns:
        A ``peft.PeftModel`` around the same model; its ``save_pretrained`` writes only the adapter.

    Raises:
        RecipeError: peft is not installed, the model is a mixture, or it has no linear layer of a name in ``targets``.
    """
    name = f"the {model.config.model_type} model {model.config.name_or_path}".rstrip()
    if model.config.model_type == "branchmix":
        raise RecipeError(
            f"lora: {name} is a mixture, whose FFN experts are not linear layers, so LoRA cannot adapt them: remove "
            "lora, and use adapters: true or freeze"
        )
    layers = {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module is not model.get_output_embeddings()
    }
    for target in lora.targets if isinstance(lora.targets, list) else []:
        if not any(f".{path}".endswith(f".{target}") for path in layers):
            known = sorted({path.rpartition(".")[2] for path in layers})
            raise RecipeError(
                f"lora.targets: {name} has no linear layer {target}{nearest(target, known)}: its layers are "
                f"{', '.join(known)}"
            )
    try:
        import peft
    except ImportError:
        raise RecipeError("lora: needs peft, which is not installed: pip install 'branchmix[lora]'") from None
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        fan_in_fan_out=any(is_conv1d(module) for module in layers.values()),
    )
    return peft.get_peft_model(model, settings)
