"""Is a dense checkpoint what its config and its family say? Problems of one model, before it is compared with others.

Reads configs and safetensors headers, no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from branchmix.accounting.formulas import configured_positions
from branchmix.accounting.inspection import too_few_parameters
from branchmix.checkpoint.families import is_head, transformers_knows
from branchmix.errors import CheckpointError
from branchmix.upcycling.sources import KINDS, ROLES, DenseExpert

TOKEN_TABLES = ("embed_tokens", "wte", "embed_in", "word_embeddings")
"""Last parts of the names of the modules that hold a row for each token..."""
POSITION_TABLES = ("wpe", "embed_positions")
"""...and a row for each position."""


def contradictions(model: DenseExpert) -> Iterator[str]:
    """Sizes in config.json that the weights do not have: then no other size of this config can be trusted."""
    together = "config and weights do not belong together, download or save both again"
    stored, said = len(_stored_layers(model)), model.dims.num_layers
    extra = model.index.config.get("num_nextn_predict_layers")
    if extra and stored == said + extra:
        yield (
            f"the last {extra} of its {stored} layers predict further tokens (num_nextn_predict_layers), which no "
            "mixture takes over: load it with AutoModelForCausalLM and save it again, which leaves them out"
        )
        return
    if stored and stored != said:
        yield f"config.json says num_hidden_layers is {said}, but the weights have {stored} layers: {together}"
        return
    dims = model.dims
    yield from _rows_unlike_config(model)
    width, query, shared = dims.hidden_size, dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    wanted = zip(ROLES, ((query, width), (shared, width), (shared, width), (width, query)), strict=True)
    matrices = [("down", model.ffn(0).get("down_proj.weight"), (width, dims.intermediate_size))]
    try:
        matrices[:0] = [(role, model.attention(0, role, "weight"), shape) for role, shape in wanted]
    except AssertionError:
        yield f"the fused projection of layer 0 is smaller than config.json's head counts ask for: {together}"
    for name, part, shape in matrices:
        if part is not None and tuple(part.shape) != shape:
            yield (
                f"the {name} projection of layer 0 has shape {list(part.shape)}, but by config.json it should be "
                f"{list(shape)}: {together}"
            )


def _rows_unlike_config(model: DenseExpert) -> Iterator[str]:
    """Embeddings, output embeddings or learned positions with other rows than config.json asks for."""
    extra = model.family.positions_offset
    for name, ref in model.tensors.items():
        if name.startswith(f"{model.family.layers}.") or not ref.shape:
            continue
        module = name.rpartition(".")[0]
        rows, said, what = ref.shape[0], None, "vocab_size is"
        if module.endswith(POSITION_TABLES) and extra is not None:
            rows, said, what = rows - extra, configured_positions(model.index.config), "the positions are"
        elif is_head(name) or module.endswith(TOKEN_TABLES):
            said = model.dims.vocab_size
        if said is not None and rows != said:
            yield (
                f"{name} has {ref.shape[0]} rows, but config.json says that {what} {said}: resize the embeddings to "
                f"the config, or write {rows} there if that is what the model was trained with"
            )
            return


def incompleteness(model: DenseExpert) -> Iterator[str]:
    """Embeddings, norms, output embeddings or biases that are not there, though the config asks for them.

    Loading such a model draws them at random. Sizes and projections are taken to be right.
    """
    again = "the checkpoint is incomplete, download or save it again"
    if not model.dims.tied_embeddings and not any(map(is_head, model.tensors)):
        yield (
            "the output embeddings (lm_head) are missing, and config.json does not tie them to the input embeddings: "
            "save the causal language model, not its base model"
        )
        return
    if model.family.inferred:
        outside = [name for name in model.tensors if not name.startswith(f"{model.family.layers}.")]
        if not any("embed" in name for name in outside):
            yield f"the embeddings are missing: {again}"
        if any("norm" in name for name in model.tensors) and not any("norm" in name for name in outside):
            yield f"the final norm is missing: {again}"
        return
    try:
        lacking = too_few_parameters(model.index)
    except CheckpointError as error:
        lacking = str(error)
    if lacking:
        yield f"{lacking}: {again}"


def structure_problems(model: DenseExpert) -> Iterator[str]:
    """A family that cannot be widened, projections that are not there, tensors without a place in the layout."""
    family = model.family
    unknown = f"{family.model_type} is not in the table of families, and its {{}}, so it cannot be widened"
    if family.inferred and not transformers_knows(family.model_type):
        yield (
            f"transformers has no causal language model of model_type {family.model_type!r}, and code that a "
            "checkpoint brings along is never run: convert it to a family that transformers has"
        )
        return
    missing = missing_tensors(model)
    if missing and any(".experts." in name for name in model.tensors):
        yield f"{family.model_type} is a mixture of experts already: seed and experts must be dense models"
        return
    if missing:
        reason = unknown.format("tensors are not named as Llama's")
        reason = reason if family.inferred else "the checkpoint is incomplete, download or save it again"
        yield f"{count_tensors(missing)} missing, first {missing[0]}: {reason}"
        return
    undescribed = [] if family.inferred else undescribed_tensors(model)
    if undescribed:
        yield (
            f"{count_tensors(undescribed)} that {family.model_type} does not have, first {undescribed[0]} (a vision "
            "part, heads for further tokens or the like): load it with AutoModelForCausalLM and save it again, which "
            "leaves them out"
        )
    if unplaced := sorted(unplaced_tensors(model)):
        reason = unknown.format("layers have parts that Llama's lack")
        reason = reason if family.inferred else "this variant of the family cannot be widened"
        yield (
            f"{count_tensors(unplaced)} with no place among {family.model_type}'s attention and FFN experts, first "
            f"{unplaced[0]}: {reason}"
        )


def missing_tensors(model: DenseExpert) -> list[str]:
    """Projections that the family must have, of the layers that are there."""
    layers = sorted(_stored_layers(model)) or [0]
    wanted = (f"{model.family.layers}.{layer}.{path}.weight" for layer in layers for path in model.projections)
    return [name for name in wanted if name not in model.tensors]


def _stored_layers(model: DenseExpert) -> set[int]:
    """Numbers of the blocks that the weights have."""
    prefix = f"{model.family.layers}."
    numbers = (name.removeprefix(prefix).split(".")[0] for name in model.tensors if name.startswith(prefix))
    return {int(number) for number in numbers if number.isdecimal()}


def unplaced_tensors(model: DenseExpert) -> set[str]:
    """Tensors inside attention or FFN that the family's entry does not name."""
    family = model.family
    norms = tuple(f"{family.attention}.{name}." for name in (family.query_norm, family.key_norm) if name)

    def has_place(name: str) -> bool:
        inner = name.removeprefix(f"{family.layers}.").split(".", 1)[1]
        module, _, kind = inner.rpartition(".")
        return inner.startswith(norms) or (module in model.projections and kind in KINDS)

    return {name for name in model.expert_tensors(attention=True, ffn=True) if not has_place(name)}


def undescribed_tensors(model: DenseExpert) -> list[str]:
    """Tensors outside a family's model: of a vision part, of heads for further tokens, of a value head.

    What a family has beside attention and FFN is no deeper than a module of a block, or one beside the blocks.
    """
    family = model.family
    beside, layers = (re.escape(path) for path in (family.layers.rpartition(".")[0], family.layers))
    own = re.compile(rf"({beside}|{layers}\.\d+)(\.\w+)?\.\w+$|{layers}\.\d+\.{re.escape(family.activation)}\.")
    of_experts = model.expert_tensors(attention=True, ffn=True)
    return [name for name in model.tensors if name not in of_experts and not is_head(name) and not own.match(name)]


def count_tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
