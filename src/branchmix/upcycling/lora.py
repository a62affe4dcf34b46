"""PEFT LoRA adapters as experts: merged into their base model, by peft itself, before anything else happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from branchmix.checkpoint.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from branchmix.checkpoint.families import entry_of, is_head, is_tied
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import CheckpointIndex, TensorRef, read_header, read_json_object
from branchmix.checkpoint.tying import as_stored
from branchmix.errors import CheckpointError
from branchmix.upcycling.structure import TOKEN_TABLES


def check_adapter(adapter: Path, seed: CheckpointIndex) -> None:
    """Refuse, from headers alone, an adapter that cannot be merged into the seed.

    Raises:
        CheckpointError: it is not a LoRA adapter, its weights are pickled, it was trained on a model of other modules
            or sizes, or it changes one of two matrices that the seed ties.
    """
    file = adapter / ADAPTER_CONFIG
    settings = read_json_object(file)
    kind = settings.get("peft_type")
    if kind != "LORA":
        what = f"peft_type {kind}" if kind else "no peft_type"
        raise CheckpointError(f"{file}: has {what}, only LORA can be merged: merge the adapter yourself first")
    weights = adapter / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{adapter}: has no {weights.name} (pickles are never loaded): save it as such")
    refs = read_header(weights)
    if is_tied(as_stored(seed).config) and (unties := _unties(settings, refs, seed)):
        raise CheckpointError(
            f"{weights}: trains {unties} apart, but the seed's input and output embeddings are one matrix: untie the "
            "seed first (load it with tie_word_embeddings=False, copy the input embeddings to the output layer, save)"
        )
    for ref in refs:
        module, lora, which = ref.name.removeprefix("base_model.model.").partition(".lora_")
        last = ref.name.rpartition(".weight")[0].rpartition(".")[2]
        if not lora and last in (*TOKEN_TABLES, "lm_head"):
            ours = next((ref for name, ref in seed.tensors.items() if name.endswith(f"{last}.weight")), None)
            if ours is not None and ours.shape[0] != ref.shape[0]:
                raise CheckpointError(
                    f"{weights}: its vocabulary was resized: {ref.name} has {ref.shape[0]} rows, the seed's "
                    f"{ours.name} has {ours.shape[0]}: resize the seed to {ref.shape[0]} tokens "
                    "(resize_token_embeddings, with the adapter's tokenizer) and use that as the seed, or merge the "
                    "adapter yourself"
                )
        # Of a checkpoint of the base model alone, names lack the first part.
        target = seed.tensors.get(f"{module}.weight") or seed.tensors.get(f"{module.partition('.')[2]}.weight")
        if not lora or is_head(module):
            continue
        if target is None:
            raise CheckpointError(f"{weights}: adapts {module}, which the seed lacks: give the seed it was trained on")
        wide = {"A": ref.shape[-1], "B": ref.shape[0]}.get(which.split(".")[0])
        if wide is not None and wide not in target.shape:
            raise CheckpointError(
                f"{weights}: {ref.name} has shape {list(ref.shape)}, but the seed's {target.name} has "
                f"{list(target.shape)}: give the seed it was trained on"
            )


def _unties(settings: dict[str, Any], refs: list[TensorRef], seed: CheckpointIndex) -> str | None:
    """Name of the module, if an adapter changes a tied seed's two embeddings in different ways, or only one of them.

    Tokens trained one by one (``trainable_token_indices``) change both, unless each lists tokens of its own.
    """
    ends = (entry_of(seed.config).embeddings.rpartition(".")[2], "lm_head", "embed_out")
    trained = {ref.name.partition(".lora_")[0].rpartition(".")[2] for ref in refs if ".lora_" in ref.name}
    trained |= {str(name).rpartition(".")[2] for name in settings.get("modules_to_save") or ()}
    if settings.get("ensure_weight_tying") and trained & {"embed_tokens", "lm_head"}:  # peft knows no other names
        return None
    tokens = settings.get("trainable_token_indices")
    if isinstance(tokens, dict):
        of_ends = {str(name).rpartition(".")[2]: rows for name, rows in tokens.items()}
        if ends[0] not in of_ends or any(of_ends[end] != of_ends[ends[0]] for end in ends if end in of_ends):
            trained |= of_ends.keys()
    return next((end for end in ends if end in trained), None)


def merge_adapter(adapter: Path, seed: ResolvedModel, target: Path) -> None:
    """Merge an adapter's folder into the seed, and save the result in a new folder.

    Raises CheckpointError if peft is not installed, or cannot merge it.
    """
    try:
        import peft
    except ImportError:
        raise CheckpointError(f"{adapter}: merging a LoRA adapter needs peft: pip install 'branchmix[lora]'") from None
    import torch

    from branchmix.likelihood.loading import load_language_model

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # fp32, so that the low-rank update is added before anything is rounded.
        base = load_language_model(seed.folder, given=seed.given, dtype=torch.float32)
        tuned = peft.PeftModel.from_pretrained(base, adapter)
        tied = _given_own_head(base)
        merged = tuned.merge_and_unload(safe_merge=True)
        if tied:
            _tied_again(merged)
        merged.save_pretrained(target)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{adapter}: cannot be merged into the seed: {reason}") from error


def _given_own_head(model: Any) -> bool:
    """Whether peft wrapped one of two tied matrices; then the output layer gets a copy, which peft merges apart.

    As one matrix it would get the changes of both, and each change would show in both places.
    """
    import torch

    wrapped = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings, head = (_base_layer(module) for module in wrapped)
    if embeddings.weight is not head.weight or (embeddings, head) == wrapped:
        return False
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _base_layer(module: Any) -> Any:
    """The module of the base model below peft's wrappers."""
    for inner in ("base_layer", "original_module"):
        if hasattr(module, inner):
            return _base_layer(getattr(module, inner))
    return module


def _tied_again(model: Any) -> None:
    """One matrix again where both got the same change, as peft computes it; else a config that says untied."""
    import torch

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    noise = 1e-6 * float(embeddings.weight.abs().max())
    model.config.tie_word_embeddings = torch.allclose(embeddings.weight, head.weight, rtol=0, atol=noise)
    if model.config.tie_word_embeddings:
        head.weight = embeddings.weight
