"""PEFT LoRA adapters as experts: merged into their base model, by peft itself, or kept as the factors that they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.checkpoint.companions import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from branchmix.checkpoint.expressions import Columns, Expression, Gained, Scaled, Span, Stored, Transposed, same_values
from branchmix.checkpoint.families import Config, Dimensions, Family, entry_of, is_head, is_tied
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import CheckpointIndex, TensorRef, read_header, read_json_object
from branchmix.checkpoint.tying import as_stored
from branchmix.errors import CheckpointError
from branchmix.likelihood.adapters import lora_settings, put_on, require_peft
from branchmix.upcycling.layers import cast
from branchmix.upcycling.sources import ROLES, DenseExpert, fused_rows
from branchmix.upcycling.structure import TOKEN_TABLES


def check_adapter(adapter: Path, seed: CheckpointIndex) -> None:
    """Refuse, from headers alone, an adapter that cannot be merged into the seed.

    Raises:
        CheckpointError: it is not a LoRA adapter, its weights are pickled, it was trained on a model of other modules
            or sizes, or it changes one of two matrices that the seed ties.
    """
    settings, weights = lora_settings(adapter), adapter / ADAPTER_WEIGHTS
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
        # Names lack their first part in a seed's checkpoint without a head, and in an adapter trained on such a model.
        of_base = entry_of(seed.config).layers.partition(".")[0]
        places = (module, module.partition(".")[2], f"{of_base}.{module}")
        target = next((seed.tensors[f"{place}.weight"] for place in places if f"{place}.weight" in seed.tensors), None)
        if not lora or is_head(module):
            continue
        if which[:2] in ("A.", "B.") and which[2:] not in ("weight", "bias"):
            raise CheckpointError(
                f"{weights}: {ref.name} is not a name that PEFT reads: save the adapter with save_pretrained"
            )
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
    import torch

    from branchmix.likelihood.loading import load_language_model

    require_peft(adapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # fp32, so that the low-rank update is added before anything is rounded.
        base = load_language_model(seed.folder, given=seed.given, dtype=torch.float32)
        tuned = put_on(base, adapter)
        tied = _given_own_head(base)
        tuned.merge_and_unload(safe_merge=True)
        if tied:
            _tied_again(base)
        base.save_pretrained(target)
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


# ---- Factors as they are, for experts that stay changes of the seed ----

_CHANGES_MORE = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "arrow_config",
    "loftq_config",
    "corda_config",
    "use_bdlora",
)
"""Settings of peft's with which an adapter is more than ``W + B A``, or was trained on other matrices than W."""
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter's factors, where its changes of attention and FFN are nothing else."""

    folder: Path
    factors: dict[str, tuple[TensorRef, TensorRef, float]]
    """A [r, in], B [out, r] and scale by the name of the seed's matrix, without ``.weight``."""
    outside: bool
    """Whether it changes more than matrices of attention and FFN."""
    reason: str | None = None
    """Why its changes of attention and FFN are more than these factors."""

    @property
    def is_more(self) -> bool:
        """Whether the factors are not all that it changes, so that it has to be merged."""
        return self.outside or self.reason is not None

    @classmethod
    def read(cls, folder: Path, seed: DenseExpert) -> Adapter:
        """The adapter in a folder that ``check_adapter`` let through."""
        settings = read_json_object(folder / ADAPTER_CONFIG)
        reason = next((key for key in _CHANGES_MORE if settings.get(key)), None)
        if settings.get("init_lora_weights", True) not in _PLAIN_INIT:
            reason = f"init_lora_weights: {settings['init_lora_weights']}"
        inside = re.compile(
            rf"(.*\.)?{re.escape(seed.family.layers.partition('.')[2] or seed.family.layers)}\.\d+\."
            rf"({'|'.join(map(re.escape, seed.projections))})"
        )
        found: dict[str, dict[str, TensorRef]] = {}
        trains = (settings.get("modules_to_save"), settings.get("trainable_token_indices"))
        outside = any(trains) or settings.get("bias", "none") != "none"
        for ref in read_header(folder / ADAPTER_WEIGHTS):
            module, _, which = ref.name.removeprefix("base_model.model.").partition(".lora_")
            if which in ("A.weight", "B.weight") and inside.fullmatch(module):
                name = next(n for n in seed.tensors if n == f"{module}.weight" or n.endswith(f".{module}.weight"))
                found.setdefault(name.removesuffix(".weight"), {})[which[0]] = ref
            elif inside.match(module) and not module.endswith(".bias"):
                reason = reason or f"it has {ref.name}"
            else:
                outside = True
        for module, pair in found.items():
            if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
                weights = folder / ADAPTER_WEIGHTS
                raise CheckpointError(f"{weights}: A and B of {module} do not belong together: save the adapter again")
        factors = {
            module: (pair["A"], pair["B"], _scale(settings, module, pair["A"].shape[0]))
            for module, pair in found.items()
        }
        return cls(folder, factors, outside, reason)

    def squared_change(self, name: str) -> float:
        """The square of the norm of its change ``scale B A`` of one of the seed's tensors."""
        if (factors := self.factors.get(name.removesuffix(".weight"))) is None:
            return 0.0
        A, B = (cast(Stored(ref), "F32") for ref in factors[:2])
        A_RI, B_OR = A.rows(0, A.num_rows).astype(np.float64), B.rows(0, B.num_rows).astype(np.float64)
        return float(factors[2] ** 2 * ((B_OR.T @ B_OR) * (A_RI @ A_RI.T)).sum())


def _scale(settings: Config, module: str, rank: int) -> float:
    """peft's factor on B A: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, other in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = other
            break
    return float(alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def adapter_factors(
    adapter: Adapter, expert: DenseExpert, matrices: Sequence[str]
) -> dict[tuple[int, str], tuple[Expression, Expression]]:
    """An adapter's factors for the matrices of experts, verbatim except for scale and folded gains.

    Args:
        expert: what else the adapter trained, or the seed; its gains are folded if its norms are.
    """
    family, dims, found = expert.family, expert.dims, {}
    for layer in range(dims.num_layers):
        block = f"{family.layers}.{layer}"
        for matrix in matrices:
            module, rows, norm = place_of(family, dims, matrix)
            if (factors := adapter.factors.get(f"{block}.{module}")) is None:
                continue
            ref_A, ref_B, scale = factors
            A: Expression = Stored(ref_A)
            B: Expression = Transposed(Stored(ref_B))
            if rows is not None:
                B = Columns(tuple((B, *span) for span in rows))
            if expert.fold_norms and norm is not None:
                A = Gained(cast(A, "F32"), Stored(expert.tensors[f"{block}.{norm}.weight"]), family.gain_offset)
            found[layer, matrix] = (
                A,
                B if scale == 1.0 else Scaled(cast(B, "F32"), scale),
            )  # rounded once, to the output's dtype
    return found


def place_of(family: Family, dims: Dimensions, matrix: str) -> tuple[str, Sequence[Span] | None, str | None]:
    """Where the seed keeps a matrix: module below the block, its rows there if it shares it, and the norm before it."""
    if matrix in ROLES:
        own = {"q": family.query, "k": family.key, "v": family.value, "o": family.output}[matrix]
        if matrix == "o" or not family.fused_qkv:
            return f"{family.attention}.{own}", None, None if matrix == "o" else family.attention_input_norm
        rows = fused_rows(family, dims, matrix)
        return f"{family.attention}.{family.fused_qkv}", rows, family.attention_input_norm
    if matrix == "down":
        return family.down, None, None
    if family.fused_gate_up:
        inner = dims.intermediate_size
        first = 0 if matrix == "gate" else inner
        return family.fused_gate_up, ((first, first + inner),), family.ffn_input_norm
    return str(family.gate if matrix == "gate" else family.up), None, family.ffn_input_norm


def gains_differ(expert: DenseExpert, seed: DenseExpert) -> bool:
    """Whether folding gains makes an adapter's change more than its factors: it trained norms before matrices."""
    if not expert.fold_norms:
        return False
    norms = [norm for norm in (expert.family.attention_input_norm, expert.family.ffn_input_norm) if norm]
    names = [f"{seed.family.layers}.{layer}.{norm}.weight" for layer in range(seed.dims.num_layers) for norm in norms]
    return not all(same_values(Stored(expert.tensors[name]), Stored(seed.tensors[name])) for name in names)
