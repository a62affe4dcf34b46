"""Writes an export: tensors streamed, companions copied, logits compared, all or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from branchmix.accounting.formulas import configured_positions
from branchmix.checkpoint.folder import atomic_folder
from branchmix.checkpoint.index import CheckpointIndex, float32_bytes
from branchmix.checkpoint.writer import WriteReport
from branchmix.errors import VerificationError
from branchmix.export.conversion_plan import chosen_expert, plan_export, rounds_nothing
from branchmix.upcycling.execute import refuse_overlap, require_space, write_output
from branchmix.upcycling.mixture import DEFAULT_SHARD_BYTES, OpenedMixture
from branchmix.upcycling.model_card import model_card
from branchmix.upcycling.plan import Plan
from branchmix.upcycling.verify import (
    FOLDED_TOLERANCE,
    TOLERANCE,
    compare_bytes,
    difference_of,
    refuse_strangers,
    require_memory,
    sample_tokens,
)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LogitCheck:
    """The export compared with the mixture, both in fp32, on the sample text."""

    tensors_compared: int
    """Tensors that are source bytes only, compared byte for byte."""
    bytes_compared: int
    tokens: int
    difference: float
    """Greatest absolute difference of logits."""
    greatest_logit: float
    tolerance: float
    """Greatest difference that passes, as a share of the greatest logit."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "tensors_byte_identical": self.tensors_compared,
            "bytes_compared": self.bytes_compared,
            "tokens": self.tokens,
            "max_difference": self.difference,
            "max_logit": self.greatest_logit,
            "tolerance": self.tolerance,
        }


@dataclass(frozen=True)
class ExportReport:
    """What ``export_model`` did, or would do."""

    out: Path
    to: str
    expert: str | None
    """Whose dense model it is; None for targets that take all experts."""
    plan: Plan
    written: WriteReport | None
    """None after a dry run."""
    verification: LogitCheck | None
    seconds: float


def export_model(
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    expert: str | None = None,
    verify: bool = True,
    dry_run: bool = False,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a mixture as a checkpoint of a class that other tools know, where that computes the same.

    Args:
        model: folder or Hub id of a mixture.
        out: folder to write.
        to: ``mixtral``, ``qwen2_moe``, ``qwen3_moe``, ``olmoe``, ``flex_olmo``, or ``dense``.
        expert: for ``dense``, whose dense model: the one that the mixture is with all gates on that expert.
        verify: compare the logits of both on text before the folder gets its name (needs both in fp32).
        dry_run: plan and check only.
        force: replace ``out``.
        check: refuse NaN and Inf in the mixture.
        progress: called with the step's name, bytes done and bytes in all.

    Raises:
        CompatibilityError: the target cannot compute what the mixture does; with all reasons.
        VerificationError: the logits differ.
        BranchMixError: another of its kinds.

    Example:
        >>> branchmix.export_model("btx", "btx-mixtral", to="mixtral")
    """
    start = time.perf_counter()
    out = Path(out)
    mixture = OpenedMixture(str(model), otherwise="there is nothing to export")
    plan = plan_export(mixture, to, expert)
    chosen = chosen_expert(mixture, expert) if to == "dense" else None
    refuse_overlap(out, [mixture.resolved.folder], force=force)
    written = verification = None
    if not dry_run:
        require_space(out, plan)
        exported = {
            "to": to,
            "expert": chosen.name if chosen else None,
            "model": mixture.resolved.given,
            "revision": mixture.resolved.revision,
        }
        with atomic_folder(out, force=force) as folder:
            written = write_output(
                plan,
                folder,
                mixture.resolved.folder,
                lambda: {**mixture.provenance(), "exported": exported},
                DEFAULT_SHARD_BYTES,
                check=check,
                progress=progress,
                card=partial(model_card, exported_from=mixture.config),
            )
            if verify:
                one_hot = chosen.number if chosen is not None and expert is not None else None
                verification = _verify(mixture, plan, folder, one_hot, progress)
    return ExportReport(
        out, to, chosen.name if chosen else None, plan, written, verification, time.perf_counter() - start
    )


def _verify(
    mixture: OpenedMixture, plan: Plan, folder: Path, one_hot: int | None, progress: Progress | None
) -> LogitCheck:
    """Copies byte for byte, and the logits of both models in fp32; with ``one_hot`` the gates on that expert.

    Raises VerificationError if they differ, or there is not enough memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from branchmix.likelihood.loading import without_adapter
    from branchmix.models.modeling_branchmix import BranchMixForCausalLM
    from branchmix.models.routers import one_hot_gates

    ours = sum(float32_bytes(ref.nbytes, ref.dtype) for ref in mixture.index.tensors.values())
    theirs = float32_bytes(plan.nbytes, mixture.dtype)
    require_memory(ours + theirs, "comparing logits", "--no-verify leaves it out")
    compared, nbytes = compare_bytes(plan, CheckpointIndex.open(folder), progress)
    tokens = sample_tokens(
        mixture.resolved.folder, mixture.dims.vocab_size, most=configured_positions(mixture.seed_config)
    )
    logits = []
    for number, (name, where) in enumerate((("mixture", mixture.resolved.folder), ("export", folder))):
        if progress is not None:
            progress("comparing logits", number, 2)
        loader = BranchMixForCausalLM if name == "mixture" else AutoModelForCausalLM
        model, info = loader.from_pretrained(
            where, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **without_adapter(where)
        )
        refuse_strangers(model, info, where.name)
        gates = one_hot_gates(model, one_hot) if name == "mixture" and one_hot is not None else nullcontext()
        with torch.no_grad(), gates:
            logits.append(model.eval()(tokens).logits)
    difference, greatest = difference_of(logits[1], logits[0])
    scaled = any("scaled" in group.how for group in plan.groups)
    tolerance = FOLDED_TOLERANCE if scaled and not rounds_nothing(mixture) else TOLERANCE
    if not difference <= tolerance * max(greatest, 1.0):
        raise VerificationError(
            f"{mixture.resolved.given}: the logits of the export differ from the mixture's by {difference:.3g} "
            f"(greatest logit {greatest:.3g}), so nothing was written: report this, please"
        )
    return LogitCheck(compared, nbytes, tokens.shape[1], difference, greatest, tolerance)
