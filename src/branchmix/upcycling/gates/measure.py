"""What text says about a mixture: gates fitted to it, and the plan of the mixture with these gates; writes nothing.

Counts and losses are kept in the checkpoint by the names of domains and experts, so that a later fit needs text of new
domains only. Shapes: V vocabulary, M domains, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from branchmix.accounting.formulas import table_positions
from branchmix.accounting.shape import EXPERT_BIAS, Shape
from branchmix.checkpoint.expressions import Expression, Stored
from branchmix.checkpoint.generated_tensors import Held
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.writer import OutputTensor
from branchmix.data.config import EvalData
from branchmix.errors import RecipeError
from branchmix.upcycling.gates.evidence import Posterior, evidence_table, fit_posterior
from branchmix.upcycling.gates.text import DomainText, read, require_known_tokens
from branchmix.upcycling.mixture import NOT_CALIBRATED, OpenedMixture
from branchmix.upcycling.plan import Plan, Progress

PREFIX = "document_gate."
"""How the names of the document gates' tensors begin."""


@dataclass(frozen=True)
class DomainFit:
    """What was measured on one domain; losses are nats a token on documents that were not counted."""

    name: str
    counted_tokens: int
    measured_tokens: int
    before: float | None
    """Loss of the mixture as it was; None for a domain without text, which an earlier fit has measured."""
    after: float | None
    """Loss with the new gates."""
    forced: dict[str, float]
    """Loss with all gates forced to each expert, where it is known."""
    shares: dict[str, float]
    """How the domain's gates are shared among experts, once the domain is certain."""


@dataclass(frozen=True)
class Fitted:
    """Gates, ready to be written."""

    domains: list[DomainFit]
    posterior: Posterior
    config: dict[str, Any]
    """Keys of config.json that change."""
    tensors: dict[str, Expression]
    """New tensors by name: those of the document gates, and routers."""
    routers: str
    """``zeros``, ``kept`` or ``fitted``: the weights of the token gates. ``unchanged``: all gates are as they were."""
    notes: list[str] = field(default_factory=list)

    def added_to(self, provenance: dict[str, Any]) -> dict[str, Any]:
        """A mixture's provenance with this fit, its measurements and its notes among the changes."""
        step = {
            "calibrated": {
                "domains": {domain.name: domain.counted_tokens for domain in self.domains},
                "losses": {
                    domain.name: {"before": round(domain.before, 5), "after": round(domain.after, 5)}
                    for domain in self.domains
                    if domain.before is not None and domain.after is not None
                },
                "document_gate": self.config["document_gate"] is not None,
                "notes": self.notes,
            }
        }
        steps = [step] if self.routers != "unchanged" else []
        return {**provenance, "changes": [*provenance.get("changes", []), *steps]}

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "domains": [vars(domain) for domain in self.domains],
            "posterior": vars(self.posterior),
            "routers": self.routers,
            "config": {key: value for key, value in self.config.items() if key != "document_gate"},
            "document_gate": self.config["document_gate"] is not None,
            "notes": self.notes,
        }


def text_for(
    shape: Shape,
    model: ResolvedModel,
    data: EvalData,
    *,
    token_only: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, DomainText]:
    """Text to fit a mixture's gates on, by domain, read with the tokenizer of ``model``; errors and options as for
    ``calibrate``, before anything is written."""
    from branchmix.likelihood.loading import load_tokenizer

    given = model.given
    if not shape.routers:
        raise RecipeError(f"{given}: everything is averaged, so there are no experts to choose from")
    if token_only and shape.trunk == "experts":
        raise RecipeError(f"{given}: its trunk has experts, which the document chooses: leave --token-only out")
    text = read(data, load_tokenizer(model.folder, given=given, trust_remote_code=trust_remote_code), progress)
    names = [*shape.domains, *(name for name in text if name not in shape.domains)]
    if len(names) < 2:
        raise RecipeError(f"data: {names[0]!r} is the only domain, and gates need two or more to distinguish")
    if token_only and (lacking := [name for name in names if name not in text]):
        raise RecipeError(
            f"data: lacks text of {', '.join(lacking)}, and token gates are fitted to the text of all domains at once: "
            "add it to the data file"
        )
    require_known_tokens(text, shape.sizes.vocab_size, given)
    return text


def fit(
    mixture: OpenedMixture,
    text: Mapping[str, DomainText],
    *,
    token_only: bool = False,
    keep_top_k: bool = False,
    progress: Progress | None = None,
) -> Fitted:
    """Fit gates for a mixture to the text that ``text_for`` gives; other arguments as for ``calibrate``.

    What an earlier fit left in the checkpoint counts as well.
    """
    import torch

    from branchmix.likelihood.loading import load_language_model
    from branchmix.models.chunked_branchmix import faster_in_bf16
    from branchmix.upcycling.gates import fit as fitting

    earlier = mixture.config.get("document_gate") or {}
    vocab_size = mixture.dims.vocab_size
    counts = _stored_counts(mixture)
    counts |= {name: _counts(found.counted, found.around, vocab_size) for name, found in text.items()}
    names, counts_VM = list(counts), np.stack(list(counts.values()), axis=1)
    if set(text) == set(names) or not {"smoothing", "temperature"} <= earlier.keys():
        checked_VM = np.zeros_like(counts_VM)
        others = {m: text[name].checked + text[name].measured for m, name in enumerate(names) if name in text}
        for m, name in enumerate(names):
            if name in text:
                checked_VM[:, m] = _counts(text[name].checked, text[name].around, vocab_size)
        posterior = fit_posterior(counts_VM - checked_VM, others)
    else:  # a fit to some of the domains would favour them
        posterior = Posterior(earlier["smoothing"], earlier["temperature"], earlier["decay"])

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "auto" if device.type == "cuda" else torch.bfloat16 if faster_in_bf16(device) else torch.float32
    folder, given = mixture.resolved.folder, mixture.resolved.given
    model = load_language_model(folder, given=given, dtype=dtype).eval().to(device)
    experts = mixture.names
    passes = len(fitting.PENALTIES) + 3 if token_only else 1 + 2 * mixture.may_be_trained
    total, done = 1 + len(experts) + len(fitting.SHARPNESS) + passes, itertools.count(1)

    def tell() -> None:
        if progress is not None:
            progress("calibrating", next(done), total)

    positions = table_positions(mixture.config)
    measured = {name: [tokens[:positions] for tokens in found.measured] for name, found in text.items()}
    no_trunk = mixture.shape.trunk == "experts" and not mixture.shape.domains  # nothing chooses one yet
    before = {} if no_trunk else fitting.losses(model, measured)
    tell()

    evidence_VM = evidence_table(counts_VM, posterior.smoothing) / posterior.temperature
    gated = fitting.Gated(model, names, posterior.decay, evidence_VM)
    own = gated.own_routing
    calibrated = own.calibrated(len(experts), keep_top_k=keep_top_k)
    forced = fitting.forced_losses(model, measured, tell)
    losses = {name: dict((earlier.get("losses") or {}).get(name, {})) for name in names}
    for name, row in zip(measured, forced, strict=True):
        losses[name] = dict(zip(experts, map(float, row), strict=True))
    losses_ME, notes = _matrix(losses, experts)

    calibrated.apply(model)
    gated.set_routers(None)
    sharpness = dict.fromkeys(names, fitting.SHARPNESS[1]) | (earlier.get("sharpness") or {})
    sharpness |= fitting.best_sharpness(gated, losses_ME, measured, tell)
    shares_ME = np.stack([fitting.log_shares(losses_ME[m], sharpness[name]) for m, name in enumerate(names)])
    gated.set_experts(shares_ME)
    tensors: dict[str, Expression] = {}
    record: dict[str, Any] | None = None
    if token_only:
        counted = {name: [tokens[:positions] for tokens in found.counted] for name, found in text.items()}
        weights = fitting.fit_token_routers(gated, shares_ME, counted, measured, calibrated, tell)
        after, routing, routers = fitting.losses(model, measured), calibrated, "fitted"
        tell()
    else:
        routers, routing, after = "zeros", calibrated, fitting.losses(model, measured)
        tell()
        if mixture.may_be_trained:  # then routers may know more than nothing
            gated.set_routers(gated.weights)
            for option in (calibrated, own):
                option.apply(model)
                found = fitting.losses(model, measured)
                tell()
                if np.mean(list(found.values())) < np.mean(list(after.values())) - fitting.NEARLY:
                    routers, routing, after = "kept", option, found
        weights = {name: torch.zeros_like(w) for name, w in gated.weights.items()} if routers == "zeros" else {}
        record = {
            "domains": names,
            "decay": posterior.decay,
            "temperature": posterior.temperature,
            "smoothing": posterior.smoothing,
            "sharpness": {name: sharpness[name] for name in names},
            "losses": {name: {expert: round(loss, 5) for expert, loss in losses[name].items()} for name in names},
        }
        tensors |= {
            f"{PREFIX}evidence": Held(evidence_VM.astype(np.float32), "F32"),
            f"{PREFIX}prior": Held(np.zeros(len(names), np.float32), "F32"),
            f"{PREFIX}counts": Held(counts_VM.astype(np.int32), "I32"),
        }
        for kind in gated.kinds:
            tensors[f"{PREFIX}{kind}"] = Held(np.ascontiguousarray(shares_ME.T, np.float32), "F32")
    tensors |= {f"{name}.weight": Held(w.float().cpu().numpy(), "F32") for name, w in weights.items()}
    gain = np.mean(list(before.values())) - np.mean(list(after.values())) if before else 0.0
    if not token_only and gain < -fitting.NEARLY:
        notes.append(
            f"the gates that the mixture has are better than a fit's, by {-gain:.3f} nats a token, so they are kept"
        )
        stored = mixture.index.tensors.items()
        tensors = {name: Stored(ref) for name, ref in stored if name.startswith(PREFIX)}
        after, routing, routers, record = before, own, "unchanged", mixture.config["document_gate"]
    domains = []
    for m, name in enumerate(names):
        tokens = int(counts_VM[:, m].sum()), sum(map(len, measured.get(name, [])))
        shares = dict(zip(experts, np.exp(shares_ME[m]).round(4).tolist(), strict=True))
        domains.append(DomainFit(name, *tokens, before.get(name), after.get(name), losses[name], shares))
    has_biases = routers == "unchanged" and mixture.config["expert_bias"]
    if mixture.config["expert_bias"] and not has_biases:
        notes.append(
            "the routers' selection biases are dropped, since training moved them for the gates that it had: a run "
            "with balance.bias starts new ones at zero"
        )
    config = {**vars(routing), "document_gate": record, "expert_bias": has_biases}
    return Fitted(domains, posterior, config, tensors, routers, notes)


def _matrix(losses: dict[str, dict[str, float]], experts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Losses [M, E], and notes: an expert that was never measured on a domain counts as the worst one there."""
    rows, notes = [], []
    for name, row in losses.items():
        lacking = [expert for expert in experts if expert not in row]
        if lacking:
            notes.append(
                f"{', '.join(lacking)}: not measured on {name}, since there is no text of it here, so {name} goes to "
                "the other experts"
            )
        worst = max(row.values(), default=0.0)
        rows.append([row.get(expert, worst) for expert in experts])
    return np.array(rows), notes


def _counts(documents: Sequence[np.ndarray], around: Collection[int], vocab_size: int) -> np.ndarray:
    """How often each token occurs, [V], except for those around every document."""
    counts_V = np.bincount(np.concatenate([*documents, np.array([], dtype=int)]), minlength=vocab_size)
    counts_V[list(around)] = 0
    return counts_V


def _stored_counts(mixture: OpenedMixture) -> dict[str, np.ndarray]:
    """How often each token occurred in the text of earlier fits, [V] by domain."""
    if not mixture.shape.domains:
        return {}
    stored = Stored(mixture.index.tensors[f"{PREFIX}counts"])
    counts_VM = stored.rows(0, stored.num_rows).astype(np.int64)
    return dict(zip(mixture.shape.domains, counts_VM.T, strict=True))


def plan_with_gates(mixture: OpenedMixture, fitted: Fitted | None = None) -> Plan:
    """All tensors of a mixture, with new gates in place of its own; without any gates of documents if None."""
    new = fitted.tensors if fitted else {}
    fitted_now = fitted is not None and fitted.routers != "unchanged"
    calibrated_now = [NOT_CALIBRATED.format(name=name) for name in mixture.names] if fitted_now else []
    config = {**mixture.config, **(fitted.config if fitted else {})}
    stored = [
        (name, ref) for name, ref in mixture.index.tensors.items() if not (name in new or name.startswith(PREFIX))
    ]
    if not config["expert_bias"]:
        stored = [(name, ref) for name, ref in stored if not name.endswith(EXPERT_BIAS)]
    kept = [OutputTensor(name, Stored(ref)) for name, ref in stored]
    plan = Plan.of(
        new.items(),
        mixture.dtype,
        config,
        notes=tuple(note for note in mixture.notes if note not in calibrated_now),
        sources=tuple(mixture.experts),
        lossless=mixture.lossless,
    )
    return replace(plan, tensors=(*kept, *plan.tensors))
