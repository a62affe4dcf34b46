"""Add experts to a mixture or remove them: what stays is copied, routers keep the rows of the experts that stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from branchmix.checkpoint.companions import is_adapter
from branchmix.checkpoint.expressions import Expression, Rows, Stack, Stored
from branchmix.checkpoint.families import Config, layout_of, nearest
from branchmix.checkpoint.folder import atomic_folder
from branchmix.checkpoint.generated_tensors import Constant, Held, Normal
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.index import CheckpointIndex, TensorRef
from branchmix.checkpoint.numbers import widened
from branchmix.checkpoint.rotary import rope_of
from branchmix.checkpoint.writer import FileHashes
from branchmix.data.config import EvalData
from branchmix.errors import CheckpointError, CompatibilityError, RecipeError
from branchmix.recipe import Expert, RouterInit, even_scaling
from branchmix.settings import parse
from branchmix.upcycling.compatibility import check_newcomer
from branchmix.upcycling.execute import (
    Sourced,
    UpcycleReport,
    describe,
    naming_sources,
    refuse_overlap,
    require_space,
    write_output,
)
from branchmix.upcycling.layers import all_same, attention_tensors, ffn_tensors, same_keys_and_values
from branchmix.upcycling.lora import Adapter, adapter_factors, check_adapter, place_of
from branchmix.upcycling.low_rank import (
    Decomposed,
    LowRankExpert,
    changed_seed,
    matrices_of,
    ranks_of,
    singular_factors,
)
from branchmix.upcycling.mixture import NOT_CALIBRATED, OpenedMixture, provenance_of, provenance_of_start
from branchmix.upcycling.plan import ROUTER_DOMAINS, Plan, Progress
from branchmix.upcycling.sources import DenseExpert, MixtureExpert, in_trunk, inside, of_trunk
from branchmix.upcycling.transformers_view import require_buildable

Members = Sequence[MixtureExpert | DenseExpert | LowRankExpert]
"""Experts that stay or join, in the order of the routers' rows."""

_MERGE_IT = "merge the adapter into it, and give the merged model"
_NEVER_CHOSEN = -30.0
"""Logit of an expert that document gates know nothing of, as the least that a fit gives (``gates.fit``)."""


def add_expert(
    model: str | Path,
    name: str,
    expert: str | Path,
    out: str | Path,
    *,
    router_std: float | None = None,
    router_seed: int = 0,
    data: EvalData | str | Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    check: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> UpcycleReport:
    """A mixture with one more expert; everything that is not an expert stays unchanged.

    Args:
        model: the mixture.
        name: of the new expert.
        expert: its dense checkpoint. Where experts are changes of the seed, it is cut to the rank of the recipe; or it
            is a LoRA adapter of the recorded seed, which stays as it is.
        out: folder to write.
        router_std: standard deviation of the routers' new rows, above 0; the mixture's ``initializer_range`` if not
            given.
        router_seed: seed of their random numbers.
        data: where rows are computed from domains (``routing.domains``), text of the expert's, under its name, in the
            format of ``eval --data``. Text of other experts is not needed. The recorded seed reads it.
        dry_run, force, check, trust_remote_code, progress: as for ``upcycle``.

    Raises:
        CompatibilityError: the expert does not fit the mixture; with all problems.
        RecipeError: the name is taken or not valid, or so are the settings of the routers' new rows.
    """
    parse(Expert, {"name": name, "model": str(expert)}, f"{name}={expert}")
    mixture = EditedMixture(str(model))
    std = router_std if router_std is not None else mixture.config.get("initializer_range", 0.02)
    parse(RouterInit, {"std": std, "seed": router_seed}, "router_std and router_seed")
    if name in mixture.names:
        raise RecipeError(f"{model}: has an expert {name!r} already: choose another name")
    given = EvalData.load(data) if data is not None else None
    if given is None and mixture.shape.domain_router:
        raise RecipeError(f"{model}: its routers compute rows from text: give --data, a file with a domain {name!r}")
    if given is not None and not mixture.shape.domain_router:
        raise RecipeError(f"{model}: its routers have weights of their own and need no text: leave data out")
    if given is not None and router_std is not None:
        raise RecipeError("router_std: the rows are computed from the expert's domain, not drawn: leave it out")
    dense = resolve(str(expert))
    adapter = mixture.adapter(dense.folder) if mixture.shape.expert_ranks and is_adapter(dense.folder) else None
    folder = mixture.recorded_seed().folder if adapter else dense.folder
    newcomer = DenseExpert.open(name, CheckpointIndex.open(folder))
    findings = check_newcomer(mixture.index, mixture.config, newcomer)
    if findings.problems:
        raise CompatibilityError(findings.problems)
    require_buildable([(name, newcomer.index)])
    newcomer = newcomer.folding(mixture.config.get("folded_norms") or ())
    lossless = mixture.lossless and mixture.shares_trunk_with(newcomer)
    joins: DenseExpert | LowRankExpert = newcomer
    decomposed = Decomposed()
    if mixture.shape.expert_ranks:
        joins = mixture.as_change(newcomer, adapter, decomposed, progress)
        lossless = lossless and adapter is not None
    domain = None
    if given is not None:
        from branchmix.upcycling.domains import embedding_of

        seed = mixture.recorded_seed("an expert's domain is embedded by it, so put it back")
        centre_C = Stored(mixture.index.tensors[f"{ROUTER_DOMAINS}centre"])
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "progress": progress}
        domain = embedding_of(name, given, seed, centre_C, dry_run=dry_run, **options)
    plan = mixture.plan([*mixture.experts, joins], findings.notes, lossless, std, router_seed, domain)
    plan = replace(plan, decomposed=decomposed)
    added = Sourced(name, dense, newcomer.index, dense.folder if adapter else None)

    def step(hashes: FileHashes) -> dict[str, Any]:
        drawn = {"router_std": std, "router_seed": router_seed, "domain": domain is not None}
        return {"added": {"expert": describe([added], hashes)[0], **drawn}}

    return mixture.write(plan, Path(out), step, added, dry_run=dry_run, force=force, check=check, progress=progress)


def remove_expert(
    model: str | Path,
    name: str,
    out: str | Path,
    *,
    dry_run: bool = False,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> UpcycleReport:
    """A mixture without one of its experts. What was averaged over it (embeddings, norms, shared K/V) stays.

    Args:
        model: the mixture.
        name: of the expert to leave out.
        out: folder to write.
        dry_run, force, check, progress: as for ``upcycle``.

    Raises:
        RecipeError: there is no such expert, or fewer than two would be left.
    """
    mixture = EditedMixture(str(model))
    if name not in mixture.names:
        raise RecipeError(
            f"{model}: has no expert {name!r}{nearest(name, mixture.names)}; it has {', '.join(mixture.names)}"
        )
    staying = [expert for expert in mixture.experts if expert.name != name]
    if len(staying) < 2:
        raise RecipeError(f"{model}: only {staying[0].name!r} would be left, a mixture needs two or more experts")
    plan = mixture.plan(staying, (), mixture.lossless)
    step = {"removed": name}
    return mixture.write(plan, Path(out), lambda _: step, dry_run=dry_run, force=force, check=check, progress=progress)


class _WithOwnMatrices(MixtureExpert):
    """An expert that was a change of the seed, with matrices of its own."""

    def change(self, layer: int, matrix: str) -> None:
        return None


class EditedMixture(OpenedMixture):
    """An existing mixture, ready to be rebuilt with other experts."""

    def __init__(self, given: str, *, otherwise: str = "use upcycle"):
        self.start = time.perf_counter()
        super().__init__(given, otherwise=otherwise)

    @property
    def matrices(self) -> list[str]:
        """Those that are changes of the seed's, if the experts are."""
        return matrices_of(self.family, self.shape.attention, self.shape.ffn)

    def recorded_seed(self, otherwise: str = _MERGE_IT) -> ResolvedModel:
        """The seed that the mixture, or the one that it was trained from, was merged from.

        Args:
            otherwise: what to do without it, for errors.

        Raises:
            CheckpointError: none is on record, it is not there any more, or it is another model now.
        """
        folders, source = [self.resolved.folder], None
        for folder in folders:  # a trained mixture that was edited, maybe in place, has the trained one as its source
            for record in (provenance_of(folder), provenance_of_start(folder)):
                sources = {source["name"]: source for source in (record or {"sources": []})["sources"]}
                source = source or sources.get("seed")
                before = resolve(sources["mixture"]["model"]).folder if "mixture" in sources else folder
                folders += [before] if source is None and before not in folders else []
        if source is None:
            raise CheckpointError(f"{self.resolved.given}: its seed is not on record: {otherwise}")
        revision = f"@{source['revision']}" if source["revision"] and "@" not in source["model"] else ""
        seed = resolve(f"{source['model']}{revision}")
        for file in source.get("files", []):
            there = seed.folder / file["name"]
            if not there.is_file() or there.stat().st_size != file["bytes"]:
                raise CheckpointError(
                    f"{seed.folder}: is not the seed that {self.resolved.given} was merged from: {otherwise}"
                )
        return seed

    def adapter(self, folder: Path) -> Adapter:
        """A LoRA adapter of the recorded seed whose factors are all that it changes, and all have a place here.

        Raises:
            CheckpointError: there is none, or it changes more.
        """
        seed = DenseExpert.open("seed", CheckpointIndex.open(self.recorded_seed().folder))
        check_adapter(folder, seed.index)
        adapter = Adapter.read(folder, seed)
        reason = adapter.reason or ("it trains more than matrices of attention and FFN" if adapter.outside else None)
        places = {place_of(self.family, self.dims, matrix)[0] for matrix in self.matrices}
        shared = sorted({name for name in adapter.factors if not name.endswith(tuple(f".{place}" for place in places))})
        if reason is None and shared:
            reason = f"it changes {shared[0]}, which all experts of this mixture share"
        if reason is not None:
            raise CheckpointError(f"{folder}: {reason}: merge the adapter into the seed, and give the merged model")
        changed = changed_seed(
            self.experts[0], seed.folding(self.config.get("folded_norms") or ()), self.matrices, self.dtype
        )
        if changed is not None:
            raise CheckpointError(
                f"{self.resolved.given}: its {changed} is not the seed's any more, on which the adapter was trained: "
                "merge the adapter into the seed, and give the merged model"
            )
        return adapter

    def as_change(
        self, newcomer: DenseExpert, adapter: Adapter | None, decomposed: Decomposed, progress: Progress | None
    ) -> LowRankExpert:
        """A newcomer as a change of the seed's matrices: an adapter's own, or cut to the rank of the recipe."""
        seed = self.experts[0]
        if adapter is not None:
            factors = adapter_factors(adapter, newcomer, self.matrices)
        else:
            recipe = self.provenance()["recipe"]
            largest = max(rank for of in self.shape.expert_ranks for ranks in of.values() for rank in ranks)
            wanted = recipe.get("expert_rank", "full")
            kept = (max(largest, 1) if wanted == "full" else wanted, recipe.get("expert_energy", 0.9))
            factors = singular_factors(newcomer, seed, self.matrices, *kept, decomposed, progress)
        return LowRankExpert(newcomer, seed, factors, self.matrices)

    def shares_trunk_with(self, newcomer: DenseExpert) -> bool:
        """Whether everything that is not an expert's is the same in the mixture and in a dense model."""
        if self.config["attention"] == "kv_sharing" and not all(
            same_keys_and_values([self.experts[0], newcomer], layer, self.dtype)
            for layer in range(self.dims.num_layers)
        ):
            return False
        folded = tuple(f".{norm}.weight" for norm in self.config.get("folded_norms") or ())
        owned = newcomer.expert_tensors(self.shape.has_attention_experts, self.shape.has_ffn_experts)
        if self.shape.trunk == "experts":
            owned |= newcomer.trunk_tensors()
        shared = {name: Stored(ref) for name, ref in newcomer.tensors.items() if name not in owned}
        ours = {name: self.index.tensors.get(f"model.{name}") for name in shared if not name.endswith(folded)}
        return all(ref and all_same([Stored(ref), shared[name]], self.dtype) for name, ref in ours.items())

    def resized(self, experts: Members) -> tuple[Config, list[str]]:
        """The config for these experts, and notes: soft routing stays soft, ``auto`` scaling stays so.

        A config says neither (soft is k = N there), but the recipe does. Where none is recorded, k and the factor stay.
        """
        names = [expert.name for expert in experts]
        old, new = self.config["num_experts"], len(names)
        config = {**self.config, "num_experts": new, "expert_names": names}
        if (gate := self.config.get("document_gate")) and isinstance(gate.get("losses"), dict):
            rows = gate["losses"].items()
            kept = {domain: {name: loss for name, loss in row.items() if name in names} for domain, row in rows}
            config["document_gate"] = {**gate, "losses": kept}
        ropes, of_seed = self.config.get("expert_rope_parameters"), rope_of(self.seed_config)
        owned = [
            (ropes[expert.number] if ropes else of_seed)
            if isinstance(expert, MixtureExpert)
            else rope_of((expert.own if isinstance(expert, LowRankExpert) else expert).index.config)
            for expert in experts
        ]
        if self.shape.expert_ranks:
            apart_again = experts[0].change(0, self.matrices[0]) is None
            config["expert_ranks"] = None if apart_again else ranks_of(experts, self.matrices)
        apart = any(rope != of_seed for rope in owned)
        if ropes or apart:
            config["expert_rope_parameters"] = owned if apart else None
            config["layout"] = layout_of(self.family, per_expert_rotary=apart)
        old_k, scaling = self.config["num_experts_per_tok"], self.scaling
        recipe = (provenance_of(self.resolved.folder) or {}).get("recipe") or {}
        soft = old_k == old and ((recipe.get("routing") or {}).get("ffn") or {}).get("soft", False)
        top_k = config["num_experts_per_tok"] = new if soft else min(old_k, new)
        if (attention_top_k := self.config.get("attention_num_experts_per_tok")) is not None:
            config["attention_num_experts_per_tok"] = min(attention_top_k, new)
        score = self.config["scoring_func"]
        is_even = not self.config.get("norm_topk_prob") and scaling == even_scaling(score, old, old_k)
        even = even_scaling(score, new, top_k)
        if is_even and recipe.get("routed_scaling_factor") == "auto":
            config["routed_scaling_factor"] = even
        notes = []
        if self.shape.has_ffn_experts and not recipe:
            if old_k == old and top_k != new:
                notes.append(
                    f"each token still goes to {top_k} FFN experts, now of {new}: no recipe says whether routing was "
                    f"soft; if so, set num_experts_per_tok to {new} in config.json"
                )
            if is_even and scaling not in (1.0, even):
                notes.append(
                    f"routed_scaling_factor stays {scaling:g}: no recipe says whether it was auto; if so, set it to "
                    f"{even:g} in config.json"
                )
        return config, notes

    def plan_of_own_matrices(self) -> Plan:
        """The same mixture, whose experts have matrices of their own instead of changes of the seed's.

        Raises:
            CompatibilityError: they have already.
        """
        if not self.shape.expert_ranks:
            raise CompatibilityError([f"{self.resolved.given}: its experts have matrices of their own already"])
        experts = [_WithOwnMatrices(e.name, e.index, e.family, e.dims, e.number) for e in self.experts]
        return self.plan(experts, ["every expert's change was added to the seed's matrices"], self.lossless)

    def plan(
        self,
        experts: Members,
        notes: Sequence[str],
        lossless: bool | None,
        std: float = 0.0,
        seed: int = 0,
        domain: Expression | None = None,
    ) -> Plan:
        """All tensors again, with these experts in the new order of the routers' rows.

        New rows are N(0, std^2), or computed from the embedding [1, C] of the newcomer's ``domain``.
        """
        config, more = self.resized(experts)
        if self.shape.domains:
            more += [
                NOT_CALIBRATED.format(name=expert.name) for expert in experts if not isinstance(expert, MixtureExpert)
            ]
        parts = self._tensors(experts, std, seed, domain, self.expert_biases(config))
        sources, notes = tuple(experts), (*notes, *more)
        return Plan.of(parts, self.dtype, config, notes=notes, sources=sources, lossless=lossless)

    def _tensors(
        self, experts: Members, std: float, seed: int, domain: Expression | None, biases: Sequence[str]
    ) -> Iterator[tuple[str, Expression]]:
        family, width = self.family, self.dims.hidden_size
        for layer in range(self.dims.num_layers):
            block = f"model.{family.layers}.{layer}"
            if self.shape.has_attention_experts:
                shared = [(experts[0], 1.0)] if self.shape.attention == "kv_sharing" else []
                for name, part in attention_tensors(experts, layer, dtype=self.dtype, shared_kv=shared):
                    yield f"{block}.{family.attention}.{name}", part
            if self.shape.has_ffn_experts:
                for name, part in ffn_tensors(experts, layer, dtype=self.dtype):
                    yield f"{block}.{family.ffn}.experts.{name}", part
                shared_expert = f"{block}.{family.ffn}.shared_expert."
                yield from ((n, Stored(ref)) for n, ref in self.index.tensors.items() if n.startswith(shared_expert))
            for below in self.shape.routers.values():
                for name in self.shape.router_tensors(f"{block}.{below}"):
                    router = Stored(self.index.tensors[name])
                    new = {e.name: Normal((1, width), std, seed, f"{name}/{e.name}", router.dtype) for e in experts}
                    yield name, router if self.shape.domain_router else _rows(router, experts, new)
            for name in (f"{block}.{below}" for below in biases):
                yield name, self._biases(self.index.tensors.get(name), experts)
        modules = [family.attention] * self.shape.has_attention_experts + [family.ffn] * self.shape.has_ffn_experts
        of_experts = inside(family, modules, prefix=r"model\.")
        for name, ref in self.index.tensors.items():
            if name in ("document_gate.attention", "document_gate.ffn", "document_gate.trunk"):
                yield name, self._wanted_experts(Stored(ref), experts)
            elif name == f"{ROUTER_DOMAINS}embeddings":
                yield name, _rows(Stored(ref), experts, {} if domain is None else {experts[-1].name: domain})
            elif of_experts.match(name):
                continue
            elif self.shape.trunk == "experts" and (place := in_trunk(name.removeprefix("model."))):
                if place[1] == 0:
                    for number, expert in enumerate(experts):
                        yield f"model.{of_trunk(place[0], number)}", expert.trunk(place[0])
            else:
                yield name, Stored(ref)

    def _biases(self, ref: TensorRef | None, experts: Members) -> Expression:
        """A router's biases [E]: new experts start at the mean of those that are there, since only differences count.

        A router that used to choose all experts has none yet.
        """
        if ref is None:
            return Constant((len(experts),), 0.0, "F32")
        stored = Stored(ref)
        mean = float(widened(stored.rows(0, stored.num_rows), stored.dtype).mean())
        return _rows(stored, experts, {expert.name: Constant((1,), mean, stored.dtype) for expert in experts})

    def _wanted_experts(self, logits_EM: Expression, experts: Members) -> Expression:
        """What the document gates give the experts, [E, M]: those who stay keep theirs, new ones get nothing.

        A domain that wanted none of those who stay gets their shares by the losses that are on record.
        """
        nothing = Constant((1, logits_EM.shape[1]), _NEVER_CHOSEN, logits_EM.dtype)
        wanted_EM = _rows(logits_EM, experts, {expert.name: nothing for expert in experts})
        values_EM = widened(wanted_EM.rows(0, len(experts)), wanted_EM.dtype).astype(np.float32)
        gate = self.config["document_gate"]
        losses, sharpness = gate.get("losses") or {}, gate.get("sharpness") or {}
        left = [m for m in (values_EM.max(0) <= _NEVER_CHOSEN).nonzero()[0] if self.shape.domains[m] in sharpness]
        if not left:
            return wanted_EM
        from branchmix.upcycling.gates.fit import log_shares

        for m in left:
            domain = self.shape.domains[m]
            row = losses.get(domain, {})
            known = [e for e, expert in enumerate(experts) if expert.name in row]
            if known:
                values_EM[known, m] = log_shares(np.array([row[experts[e].name] for e in known]), sharpness[domain])
        return Held(values_EM, "F32")

    def write(
        self,
        plan: Plan,
        out: Path,
        step: Callable[[FileHashes], dict[str, Any]],
        *added: Sourced,
        dry_run: bool,
        force: bool,
        **options: Any,
    ) -> UpcycleReport:
        """Write the changed mixture, with ``write_output``'s options; its provenance is the old one and this step."""
        named = [(expert.name, expert.model.folder) for expert in added]
        sources = [self.resolved.folder, *(folder for _, folder in named), *self.sources_at(out)]
        refuse_overlap(out, sources, force=force)
        written = None
        if not dry_run:
            require_space(out, plan)
            files = [file for expert in added for file in expert.files]
            with atomic_folder(out, force=force) as folder, FileHashes(files) as hashes, naming_sources(named):

                def provenance() -> dict[str, Any]:
                    old = self.provenance()
                    return {**old, "changes": [*old.get("changes", []), step(hashes)]}

                companions = self.resolved.folder
                written = write_output(plan, folder, companions, provenance, self.shard_bytes, **options)
        return UpcycleReport(out, plan, written, None, time.perf_counter() - self.start)


def _rows(stored: Expression, experts: Members, new: Mapping[str, Expression]) -> Expression:
    """A tensor with a row for each expert: stored rows of those who stay, ``new`` ones by name for those who join."""
    numbers = {expert.name: expert.number for expert in experts if isinstance(expert, MixtureExpert)}
    kept = {name: Rows(stored, ((number, number + 1),)) for name, number in numbers.items()}
    parts: dict[str, Expression] = {**new, **kept}
    return Stack(tuple(parts[expert.name] for expert in experts))
