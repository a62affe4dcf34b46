"""Proof that a mixture is what its recipe says: bytes against the sources, and logits against the dense experts.

With both gates one-hot on expert i, a mixture must compute what dense model i computes: the whole dense model, if the
plan is lossless, else dense model i on the mixture's trunk (embeddings, norms and head). The dense side runs in the
family's own transformers class, with the expert's own config, on tensors read straight from its checkpoint (and with
PEFT's own layers, if it is a LoRA adapter), so it shares no code with the upcycler or the widened model. Models that
closed stitches join must compute the seed's logits, and in the stream of each other model its last hidden state.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from branchmix.checkpoint.expressions import Average, Expression, Scaled, Stored
from branchmix.checkpoint.generated_tensors import PartlyRedrawn
from branchmix.checkpoint.index import CheckpointIndex, float32_bytes
from branchmix.checkpoint.numbers import FLOAT_DTYPES, to_float32
from branchmix.errors import VerificationError
from branchmix.likelihood.adapters import put_on
from branchmix.pages.numbers import human_bytes
from branchmix.recipe import DTYPES
from branchmix.upcycling.layers import cast, dense_tensors
from branchmix.upcycling.low_rank import LowRankExpert
from branchmix.upcycling.plan import Plan, Progress
from branchmix.upcycling.sources import (
    DenseExpert,
    ExpertSource,
    below,
    fused_rows,
    inside,
    of_trunk,
)
from branchmix.upcycling.transformers_view import transformers_config
from branchmix.upcycling.verify_changes import as_written, check_changes

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Greatest difference of logits that passes, as a share of the greatest logit; fp32 gives 1e-6 to 1e-5."""
FOLDED_TOLERANCE = 2e-2
"""The same where norm gains were folded into 16-bit matrices, which rounds every weight once more."""

_WORK = 4e12
"""Bytes of weights times tokens: a minute on a few cores. Longer texts are not computed, whatever they would show."""
_LOGITS = 1 << 27
"""Greatest number of logits of a text, 512 MB."""
_BEYOND = 8
"""Tokens of the text after a boundary."""

SAMPLE = (
    "The court held that the licence was valid, and the defendant appealed. def area(radius): return math.pi * radius "
    "** 2. Let n be an even number; then n squared is divisible by four. The weather in spring changes every day."
)


@dataclass(frozen=True)
class ExpertCheck:
    """One expert's line of the table."""

    name: str
    max_difference: float
    """Greatest absolute difference of logits."""
    max_logit: float
    skipped: str | None = None
    """Why the expert could not be compared."""


@dataclass(frozen=True)
class Verification:
    """What was proved."""

    tensors_byte_identical: int
    """Tensors that consist of source bytes only, compared byte for byte."""
    bytes_compared: int
    averages_checked: int
    """Averaged tensors, recomputed in fp64."""
    changes_checked: int = 0
    """Matrices of experts that are changes of the seed: the written factors against the expert's own matrix."""
    change_error: float = 0.0
    """The greatest error among them, relative to the norm of the change; 0 except for rounding if all are LoRA."""
    tokens: int = 0
    """Length of the text."""
    stitched: bool = False
    """Experts are whole models, joined by closed stitches: the logits are the seed's, what is compared of the others is
    their last hidden states."""
    whole_experts: bool = False
    """The logits were compared with those of the whole dense models, their own embeddings, norms and head included."""
    experts: tuple[ExpertCheck, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        rows = [{key: value for key, value in vars(check).items() if value is not None} for check in self.experts]
        return {**vars(self), "experts": rows}


def verify_plan(plan: Plan, folder: Path, *, progress: Progress | None = None) -> Verification:
    """Check a folder just written against its plan; ``progress`` gets the step's name, steps done and steps in all.

    Raises:
        VerificationError: the first thing that is wrong.
    """
    index = CheckpointIndex.open(folder)
    compared, nbytes = compare_bytes(plan, index, progress)
    averages = _check_averages(plan, index)
    if plan.is_dense:
        return Verification(compared, nbytes, averages)
    changes, error = check_changes(plan, index, progress)
    checks, tokens = _compare_logits(plan, folder, index, progress)
    stitched = plan.config["stitches"] is not None
    return Verification(
        compared, nbytes, averages, changes, error, tokens, stitched, bool(plan.lossless), tuple(checks)
    )


def compare_bytes(plan: Plan, index: CheckpointIndex, progress: Progress | None) -> tuple[int, int]:
    """Number and bytes of the tensors that are pure copies, each compared with its source's bytes.

    Raises:
        VerificationError: one differs.
    """
    copies = [(tensor, ranges) for tensor in plan.tensors if (ranges := tensor.expression.ranges()) is not None]
    total = sum(tensor.expression.nbytes for tensor, _ in copies)
    done = 0
    for tensor, ranges in copies:
        ref = index.tensors[tensor.name]
        written = np.memmap(ref.file, np.uint8, "r", ref.offset, (ref.nbytes,))
        position = 0
        for file, offset, nbytes in ranges:
            source = np.memmap(file, np.uint8, "r", offset, (nbytes,))
            if not np.array_equal(written[position : position + nbytes], source):
                raise VerificationError(
                    f"{tensor.name}: differs from its source bytes in {file}: write the output again"
                )
            position += nbytes
        done += position
        if progress is not None:
            progress("comparing bytes", done, total)
    return len(copies), done


def _check_averages(plan: Plan, index: CheckpointIndex) -> int:
    """The first rows of averaged tensors, recomputed in fp64: they must be the nearest value of the output's dtype."""
    means = [(tensor.name, tensor.expression) for tensor in plan.tensors if isinstance(tensor.expression, Average)]
    of_stored = [(name, mean) for name, mean in means if all(isinstance(part, Stored) for part in mean.parts)]
    for name, mean in of_stored:
        rows = min(64, *(part.num_rows for part in mean.parts))
        weights = mean.weights or (1.0,) * len(mean.parts)
        exact = sum(
            weight * to_float32(part.rows(0, rows), part.dtype).astype(np.float64)
            for part, weight in zip(mean.parts, weights, strict=True)
        ) / sum(weights)
        written = to_float32(Stored(index.tensors[name]).rows(0, rows), mean.dtype).astype(np.float64)
        half_step = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-22}[mean.dtype]
        if not np.all(np.abs(written - exact) <= half_step * 1.01 * np.abs(exact) + 1e-7):
            raise VerificationError(f"{name}: is not the mean of its sources: write the output again")
    return len(of_stored)


def _compare_logits(
    plan: Plan, folder: Path, index: CheckpointIndex, progress: Progress | None
) -> tuple[list[ExpertCheck], int]:
    import torch

    from branchmix.models.modeling_branchmix import BranchMixForCausalLM
    from branchmix.models.routers import one_hot_gates
    from branchmix.models.stitched_branchmix import last_states

    # fp32 copies of the mixture and of one dense model have to fit.
    need = sum(float32_bytes(tensor.expression.nbytes, tensor.expression.dtype) for tensor in plan.tensors)
    require_memory(need + need // max(1, len(plan.sources)), "--verify", "leave it out")
    vocab_size = plan.config["seed_config"]["vocab_size"]
    affordable = int(min(_WORK // max(1, plan.nbytes), _LOGITS // vocab_size))
    least, most = sample_length([_dense_config(plan, expert) for expert in plan.sources], affordable)
    tokens = sample_tokens(folder, vocab_size, least=least, most=most)
    mixture = BranchMixForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checks, states = [], []
    if plan.config["stitches"] is not None:
        with torch.no_grad():
            states = [mixture(tokens).logits, *last_states(mixture, tokens)[1:]]
    for number, expert in enumerate(plan.sources):
        if progress is not None:
            progress("comparing logits", number, len(plan.sources))
        assert isinstance(expert, DenseExpert | LowRankExpert), "only an upcycling is verified"
        of_expert = [tensor.expression for tensor in plan.tensors if f".experts.{number}." in tensor.name]
        if any(isinstance(part, Scaled | PartlyRedrawn) for part in of_expert):
            skipped = "its FFN was changed on purpose (sparse upcycling's options)"
            checks.append(ExpertCheck(expert.name, 0.0, 0.0, skipped))
            continue
        with torch.no_grad(), nullcontext() if states else one_hot_gates(mixture, number):
            ours = states[number] if states else mixture(tokens).logits
        own = expert.own if isinstance(expert, LowRankExpert) else expert
        try:
            dense = _dense(plan, index, expert, number)
        except ModuleNotFoundError as error:
            if error.name != "peft":
                raise
            skipped = "PEFT, which would compute them, is not installed (pip install 'branchmix[lora]')"
            checks.append(ExpertCheck(expert.name, 0.0, 0.0, skipped))
            continue
        with torch.no_grad():
            theirs = dense.base_model(tokens).last_hidden_state if states and number else dense(tokens).logits
        del dense
        gc.collect()
        # Folded gains round a matrix once more, and factors round a merged adapter once less, than in dense model i.
        merged = isinstance(expert, LowRankExpert) and expert.adapter is None and bool(expert.factors)
        compared = own is expert or plan.lossless
        rounded = compared and (own.fold_norms or merged) and plan.config["dtype"] != "float32"
        tolerance = FOLDED_TOLERANCE if rounded else TOLERANCE
        difference, greatest = difference_of(ours, theirs)
        if not difference <= tolerance * max(greatest, 1.0):
            place, what = ("with the gates on", "logits") if not states else ("in the stream of", "states or logits")
            raise VerificationError(
                f"{folder.name}: {place} expert {expert.name!r} its {what} differ from the dense model's by "
                f"{difference:.3g} (greatest {greatest:.3g}): the mixture is not its experts"
            )
        checks.append(ExpertCheck(expert.name, difference, greatest))
    return checks, tokens.shape[1]


def difference_of(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Greatest absolute difference of two tensors of logits, and the greatest absolute value of the second."""
    return float((ours - theirs).abs().max()), float(theirs.abs().max())


def refuse_strangers(model: Any, info: dict[str, Any], name: str) -> None:
    """Raises VerificationError if loading a model (with ``output_loading_info``) left tensors over, or lacked some."""
    if strangers := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise VerificationError(f"{name}: {strangers[0]} has no counterpart in {type(model).__name__}")


def _dense_config(plan: Plan, expert: ExpertSource) -> Any:
    """The expert's own config, in its class; of the seed's only what belongs to an averaged trunk."""
    assert isinstance(expert, DenseExpert | LowRankExpert), "only an upcycling is verified"
    of_trunk = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    not_computed = ("torch_dtype", "dtype", "auto_map", "attn_implementation", "quantization_config")
    own = expert.index.config if isinstance(expert, DenseExpert) else expert.own.index.config
    config = {key: value for key, value in own.items() if key not in (*of_trunk, *not_computed)}
    trunk = own if plan.lossless else plan.config["seed_config"]
    config |= {key: value for key, value in trunk.items() if key in of_trunk}
    return transformers_config(config)


def _dense(plan: Plan, index: CheckpointIndex, expert: DenseExpert | LowRankExpert, number: int) -> Any:
    """Dense model i in its family's own class: its experts' tensors from its checkpoint; the rest, unless the trunk is
    lossless, from the mixture. Of changes of the seed, a lossless mixture's are what PEFT computes with the adapters;
    others are those of the mixture, put together.

    Raises:
        ModuleNotFoundError: PEFT is needed, and not installed.
    """
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    dense_config = _dense_config(plan, expert)
    if isinstance(expert, DenseExpert):
        state = _state_of_own(plan, index, expert, number)
    elif plan.lossless:
        state = _state_of_own(plan, index, expert.own, number)
    else:
        state = _state_of_change(plan, index, expert, number)
    # As from a checkpoint, so that transformers' own renamings (GPT-NeoX's embed_out) apply.
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(dense_config)].from_pretrained(
        None, config=dense_config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    refuse_strangers(model, info, expert.name)
    if isinstance(expert, LowRankExpert) and expert.adapter is not None and plan.lossless:
        put_on(model, expert.adapter)
        _round_factors(model, getattr(torch, plan.config["dtype"]))
    return model.eval()


def _round_factors(model: Any, dtype: torch.dtype) -> None:
    """Round A and scaled B of PEFT's layers as they are stored: a large adapter's rounding is not a difference."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            for name in getattr(module, "lora_A", ()):
                A, B, scale = module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]
                A.copy_(A.to(dtype))
                B.copy_((B * scale).to(dtype).to(B) / scale)


def _state_of_change(plan: Plan, index: CheckpointIndex, expert: LowRankExpert, number: int) -> dict[str, Any]:
    own, written, state = expert.own, as_written(plan, index, expert, number), {}
    for name, ref in own.tensors.items():
        if ref.dtype in FLOAT_DTYPES:
            shared = index.tensors.get(f"model.{name}") or index.tensors.get(f"model.{of_trunk(name, number)}", ref)
            state[name] = _tensor(cast(Stored(shared), "F32"))
    attention = plan.config["attention"] in ("kv_experts", "kv_sharing")
    for layer in range(own.dims.num_layers):
        for name, part in dense_tensors(written, layer, attention=attention, ffn=plan.config["ffn"] == "experts"):
            state[f"{own.family.layers}.{layer}.{name}"] = _tensor(part)
    return state


def _state_of_own(plan: Plan, index: CheckpointIndex, expert: DenseExpert, number: int) -> dict[str, Any]:
    attention = plan.config["attention"] in ("kv_experts", "kv_sharing")
    owned = expert.expert_tensors(attention, plan.config["ffn"] == "experts")
    dtype, family = DTYPES[plan.config["dtype"]], expert.family
    norms = filter(None, [family.attention_input_norm, family.ffn_input_norm])
    gains = inside(family, list(norms) if expert.fold_norms else [])
    state = {}
    floats = {name: ref for name, ref in expert.tensors.items() if ref.dtype in FLOAT_DTYPES}
    for name, ref in floats.items():  # other numbers are buffers, which the class computes
        shared = index.tensors.get(f"model.{name}") or index.tensors.get(f"model.{of_trunk(name, number)}", ref)
        source = ref if plan.lossless or name in owned else shared
        state[name] = _tensor(cast(Stored(source), dtype))  # the output's dtype may be narrower than the source's
        if gains.match(name):  # which the mixture has folded into its matrices
            state[name] = _tensor(Stored(ref))
    if plan.config["attention"] == "kv_sharing" and not plan.lossless:
        _share_keys_and_values(state, expert, index)
    return state


def _share_keys_and_values(state: dict[str, Any], expert: DenseExpert, index: CheckpointIndex) -> None:
    """Put the mixture's shared K, V and key norm where dense model i has its own."""
    family = expert.family
    for layer in range(expert.dims.num_layers):
        module = f"{family.layers}.{layer}.{family.attention}"
        for kind in ("weight", "bias"):
            for role, own in (("k", family.key), ("v", family.value)):
                shared = index.tensors.get(f"model.{module}.heads.{role}_proj.{kind}")
                if shared is None:
                    continue
                value = _tensor(Stored(shared))
                if expert.fold_norms and family.attention_input_norm and kind == "weight":
                    gain = state[f"{family.layers}.{layer}.{family.attention_input_norm}.weight"] + family.gain_offset
                    value = value / gain
                if family.fused_qkv is None:
                    state[f"{module}.{own}.{kind}"] = value
                    continue
                fused = state[f"{module}.{family.fused_qkv}.{kind}"]
                rows = fused.T if family.transposed and kind == "weight" else fused
                spans = fused_rows(family, expert.dims, role)  # type: ignore[arg-type]
                rows[[row for span in spans for row in range(*span)]] = value
        if family.key_norm:
            prefix = f"model.{module}.heads.{family.key_norm}."
            for name, part in below(prefix, index.tensors).items():
                state[f"{module}.{family.key_norm}.{name}"] = _tensor(part)


def _tensor(source: Expression) -> Any:
    import torch

    rows = to_float32(source.rows(0, source.num_rows), source.dtype)
    return torch.from_numpy(np.ascontiguousarray(rows).reshape(source.shape))  # a scalar is one row


def sample_length(configs: Sequence[Any], affordable: int) -> tuple[int, int | None]:
    """Tokens that reach what transformers' configs do differently late in a text, and the most that they allow.

    The text reaches beyond sliding windows and the lengths at which a rotary scaling changes, if so many tokens are
    ``affordable``.
    """
    passed, positions = [0], []
    for config in configs:
        own = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        ropes = [rope, *(nested for nested in rope.values() if isinstance(nested, dict))]
        boundaries = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
        boundaries += [rope.get("original_max_position_embeddings") for rope in ropes]
        if any(rope.get("rope_type") in ("dynamic", "longrope") for rope in ropes):
            boundaries.append(own)
        elif own:
            positions.append(own)
        passed += [length + _BEYOND for length in boundaries if length and length + _BEYOND <= affordable]
    return max(passed), min(positions, default=None)


def sample_tokens(folder: Path, vocab_size: int, *, least: int = 0, most: int | None = None) -> Any:
    """[1, T]: the sample text through a model's tokenizer, or random ids where it has none that works.

    Random ids are appended until T is ``least``, and T is cut to ``most``.
    """
    import torch

    from branchmix.likelihood.loading import load_tokenizer

    generator = torch.Generator().manual_seed(0)

    def random(length: int) -> Any:
        return torch.randint(0, vocab_size, (1, length), generator=generator)

    ids_T: list[int] = []
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        with suppress(Exception):  # a broken one: weights are compared here, and any ids will do
            ids_T = load_tokenizer(folder)(SAMPLE).input_ids
    tokens = torch.tensor([ids_T]) if ids_T and max(ids_T) < vocab_size else random(48)
    return torch.cat([tokens, random(max(0, least - tokens.shape[1]))], dim=1)[:, :most]


def require_memory(need: int, what: str, otherwise: str) -> None:
    """Raises VerificationError where ``what`` needs more bytes of memory than the system says are free."""
    import psutil

    if need > (free := psutil.virtual_memory().available):
        raise VerificationError(
            f"{what} needs about {human_bytes(need)} of memory (fp32), but {human_bytes(free)} are free: use a larger "
            f"machine, or {otherwise}"
        )
