"""Do these dense checkpoints fit together? All problems are found before a byte is written, and reported together.

Reads configs, safetensors headers and tokenizer files, no weights but buffers of whole numbers and tied embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from branchmix.checkpoint.expressions import same_numbers
from branchmix.checkpoint.families import Config, Dimensions, dimensions, is_head, why_bidirectional
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.numbers import FLOAT_DTYPES
from branchmix.checkpoint.rotary import rope_of
from branchmix.errors import BranchMixError, CompatibilityError
from branchmix.recipe import Recipe
from branchmix.upcycling.sources import (
    KINDS,
    ROLES,
    SAME_SEED,
    DenseExpert,
    ExpertSource,
    MixtureExpert,
    Role,
    of_trunk,
    who,
)
from branchmix.upcycling.structure import (
    TOKEN_TABLES,
    contradictions,
    count_tensors,
    incompleteness,
    missing_tensors,
    structure_problems,
    unplaced_tensors,
)
from branchmix.upcycling.tokenizer_match import TokenizerComparison, compare_tokenizers
from branchmix.upcycling.transformers_view import config_differences


@dataclass
class Findings:
    """Result of the check: problems forbid the merge, notes say how a difference will be handled."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    of_seed: set[str] = field(default_factory=set)
    """The seed's own problems, which are not repeated for experts that share them."""
    expert_rope_parameters: list[dict[str, Any]] | None = None
    """Rotary parameters of each expert of the mixture, where they differ and may."""

    def about(self, name: str, problems: Iterable[str] = (), notes: Iterable[str] = ()) -> None:
        """Add lines that name the seed, or the expert of this name."""
        for problem in problems:
            if name == "seed":
                self.of_seed.add(problem)
            if name == "seed" or problem not in self.of_seed:
                self.problems.append(f"{who(name)}: {problem}")
        self.notes += [f"{who(name)}: {note}" for note in notes]


class Fit(NamedTuple):
    """Dense models that fit together."""

    seed: DenseExpert
    experts: list[DenseExpert]
    findings: Findings


def check_fit(recipe: Recipe, indexes: Sequence[CheckpointIndex | None], unreadable: Sequence[str] = ()) -> Fit:
    """Open seed and experts and make sure that they fit together.

    The recipe decides whether experts may have rotary settings of their own.

    Args:
        indexes: headers of the seed and of the recipe's experts, in its order; None for those that cannot be read.
        unreadable: the problem of each None, reported together with those of the others.

    Raises:
        CompatibilityError: with all problems of all models; a problem that all share is reported for the seed only.
    """
    opened: dict[str, DenseExpert] = {}
    findings = Findings(list(unreadable))
    for name, index in zip(["seed", *(expert.name for expert in recipe.experts)], indexes, strict=True):
        try:
            if index is not None:
                opened[name] = DenseExpert.open(name, index)
        except BranchMixError as error:
            findings.about(name, [str(error).partition(": ")[2]])
    seed, experts = opened.pop("seed", None), list(opened.values())
    if seed is not None:
        _check(recipe, seed, experts, findings)
    if findings.problems or seed is None:
        raise CompatibilityError(findings.problems)
    return Fit(seed, experts, findings)


def _check(recipe: Recipe, seed: DenseExpert, experts: list[DenseExpert], findings: Findings) -> None:
    for model in (seed, *experts):
        findings.about(model.name, notes=model.index.notes)
    findings.about("seed", [*contradictions(seed), *structure_problems(seed)] or incompleteness(seed))
    if (key := why_bidirectional(seed.index.config)) is not None:
        findings.notes.append(
            f"attention is not causal ({key}): tokens see later ones, so generating with a cache and without differ in "
            "the mixture as they do in the seed"
        )
    related = [expert for expert in experts if expert.family.model_type == seed.family.model_type]
    different = {} if findings.of_seed else _config_problems(seed.index.config, related)
    findings.about("seed", different.get("seed", ()))
    for model in (seed, *experts):
        if model.own_head:
            note = "config.json ties the output layer to the embeddings, but the weights of the two differ"
            findings.about(model.name, notes=[f"{note}: taken as untied"])
    for expert in experts:
        _compare(seed, expert, recipe, findings, different.get(expert.name, ()))
    if apart := _rotated_apart(seed.index.config, related, recipe.parts["attention"], findings):
        models = [seed] * recipe.include_seed + related + [seed] * recipe.seed_copies
        findings.expert_rope_parameters = [rope_of(model.index.config) for model in models]
        names = ", ".join(f"{expert.name} {_rope_words(expert.index.config)}" for expert in apart)
        ours = _rope_words(seed.index.config)
        findings.notes.append(f"rotary settings differ (seed {ours}; {names}): each expert keeps its own")
    if recipe.merge.fold_norms:
        findings.problems += _fold_problems(recipe, seed)


def check_newcomer(mixture: CheckpointIndex, config: Config, newcomer: DenseExpert) -> Findings:
    """Compare a dense model with a mixture, of this config, that it shall join."""
    findings, seed_config = Findings(), config["seed_config"]
    if _is_other_type(newcomer, seed_config, "the mixture's seed is", findings):
        return findings
    findings.about(newcomer.name, notes=newcomer.index.notes)
    dims = dimensions(seed_config)
    sizes_fit = _check_structure(newcomer, dims, findings)
    findings.about(newcomer.name, chain(*_config_problems(seed_config, [newcomer]).values()))
    if sizes_fit and not any(structure_problems(newcomer)):
        findings.about(newcomer.name, _part_problems(MixtureExpert("", mixture, newcomer.family, dims, 0), newcomer))
    if config.get("trunk") == "experts":
        for name in sorted(newcomer.trunk_tensors(config.get("folded_norms") or ())):
            ours, shape = mixture.tensors.get(f"model.{of_trunk(name, 0)}"), newcomer.tensors[name].shape
            if ours is None or ours.shape != shape:
                had = "have none" if ours is None else f"have {list(ours.shape)}"
                problem = f"its {name} has shape {list(shape)}, but the mixture's experts {had}"
                findings.about(newcomer.name, [problem])
    _check_tokenizer(mixture, newcomer, findings)
    if _rotated_apart(seed_config, [newcomer], config["attention"], findings):
        own = _rope_words(newcomer.index.config)
        findings.about(newcomer.name, notes=[f"keeps its own rotary settings, {own}"])
    return findings


def _is_other_type(model: DenseExpert, reference: Config, whose: str, findings: Findings) -> bool:
    ours, theirs = reference.get("model_type"), model.index.config.get("model_type")
    if ours != theirs:
        findings.about(model.name, [f"model_type is {theirs}, but {whose} {ours}: {SAME_SEED}"])
    return bool(ours != theirs)


def _check_structure(model: DenseExpert, dims: Dimensions, findings: Findings) -> bool:
    """What is wrong with a model itself, and with its sizes: whether they fit."""
    contradicting = list(contradictions(model))
    sizes = [] if contradicting else list(_size_problems(dims, model.dims))
    findings.about(model.name, [*contradicting, *structure_problems(model), *sizes])
    return not sizes and not contradicting


def _check_tokenizer(reference: CheckpointIndex, model: DenseExpert, findings: Findings) -> TokenizerComparison:
    tokenizer = compare_tokenizers(reference.folder, model.index.folder)
    findings.about(model.name, filter(None, [tokenizer.problem]), filter(None, [tokenizer.note]))
    return tokenizer


def _compare(
    seed: DenseExpert, expert: DenseExpert, recipe: Recipe, findings: Findings, different: Iterable[str]
) -> None:
    ours, theirs = seed.index.config, expert.index.config
    if _is_other_type(expert, ours, "the seed's is", findings):
        return
    sizes_fit = _check_structure(expert, seed.dims, findings)
    if not any(contradictions(expert)) and seed.dims.tied_embeddings != expert.dims.tied_embeddings:
        but = " (its config.json ties them, but the weights of the two differ)"
        its, the_seeds = (
            "tied" if model.dims.tied_embeddings else "untied" + but * model.own_head for model in (expert, seed)
        )
        problem = (
            f"input and output embeddings are {its}, but the seed's are {the_seeds}: untie the tied one (load it with "
            "tie_word_embeddings=False, copy the input embeddings to the output layer, save)"
        )
        findings.about(expert.name, [problem])
        sizes_fit = False
    findings.about(expert.name, different)
    if sizes_fit:
        findings.about(expert.name, _tensor_problems(seed, expert))
    keys = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    other = [key for key in keys if ours.get(key) != theirs.get(key)]
    taken = [f"{key} is {theirs.get(key)}, the mixture takes the seed's {ours.get(key)}" for key in other]
    findings.about(expert.name, notes=taken)
    _check_vocabulary(seed, expert, _check_tokenizer(seed.index, expert, findings), findings)
    dtypes = ["+".join(sorted({ref.dtype for ref in model.tensors.values()})) for model in (expert, seed)]
    if dtypes[0] != dtypes[1]:
        target = recipe.dtype or "the seed's dtype"
        findings.about(expert.name, notes=[f"stored as {dtypes[0]}, the seed as {dtypes[1]}: cast to {target}"])


def _size_problems(ours: Dimensions, theirs: Dimensions) -> Iterator[str]:
    keys = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    attributes = ["num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"]
    if all(dims.head_dim == dims.hidden_size // dims.num_heads for dims in (ours, theirs)):
        attributes.remove("head_dim")  # follows from the two others
    for attribute in attributes:
        mine, other = getattr(ours, attribute), getattr(theirs, attribute)
        if mine != other:
            yield f"{keys.get(attribute, attribute)} is {other}, but the seed's is {mine}: {SAME_SEED}"


def _config_problems(seed_config: Config, experts: list[DenseExpert]) -> dict[str, list[str]]:
    """By expert, how its config differs in what it computes; only of those whose config and weights fit together."""
    sound = {e.name: e.index.config for e in experts if not any(contradictions(e)) and not any(structure_problems(e))}
    return config_differences(seed_config, sound)


def _part_problems(member: MixtureExpert, newcomer: DenseExpert) -> Iterator[str]:
    """The first thing (bias, norm, matrix) in which a newcomer differs from the experts that a mixture has."""
    config = member.index.config
    for layer in range(newcomer.dims.num_layers):
        ours, theirs = (_parts(model, layer, config) for model in (member, newcomer))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                own, had = (
                    f"has shape {list(parts[name])}" if name in parts else "is missing" for parts in (theirs, ours)
                )
                yield f"its {name} of layer {layer} {own}, but that of the mixture's experts {had}: {SAME_SEED}"
                return


def _parts(model: ExpertSource, layer: int, config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of an expert's share of a layer, as far as a mixture of this config keeps it for each expert."""
    kept: dict[str, tuple[Role, ...]] = {"kv_experts": ROLES, "kv_sharing": ("q", "o")}
    roles = kept.get(config["attention"], ())
    parts = {f"attention's {role} {kind}": model.attention(layer, role, kind) for role in roles for kind in KINDS}
    for role in roles:
        norm = model.attention_norm(layer, role) if role in ("q", "k") else {}
        parts |= {f"attention's {role} norm {name}": part for name, part in norm.items()}
    if config["ffn"] == "experts":
        parts |= {f"FFN's {name}": part for name, part in model.ffn(layer).items()}
    return {name: tuple(part.shape) for name, part in parts.items() if part is not None}


def _tensor_problems(seed: DenseExpert, expert: DenseExpert) -> Iterator[str]:
    ours, theirs = seed.tensors, expert.tensors
    reported = {*missing_tensors(seed), *missing_tensors(expert), *unplaced_tensors(seed), *unplaced_tensors(expert)}
    missing = [name for name in ours if name not in theirs and name not in reported]
    extra = [name for name in theirs if name not in ours and name not in reported]
    if missing:
        yield f"lacks {count_tensors(missing)} that the seed has, first {missing[0]}: {SAME_SEED}"
    if extra:
        yield f"has {count_tensors(extra)} that the seed lacks, first {extra[0]}: {SAME_SEED}"
    for name in (name for name in ours if name in theirs):
        mine, other = ours[name].shape, theirs[name].shape
        table = is_head(name) or name.rpartition(".")[0].endswith(TOKEN_TABLES)  # which may be padded differently
        in_block = name.startswith(f"{seed.family.layers}.")
        if mine != other and not (table and not in_block and mine[1:] == other[1:]):
            yield f"{name} has shape {list(other)}, but the seed's is {list(mine)}: {SAME_SEED}"
        elif not {ours[name].dtype, theirs[name].dtype} <= {*FLOAT_DTYPES} and (
            ours[name].dtype != theirs[name].dtype or not same_numbers(ours[name], theirs[name])
        ):
            yield (
                f"{name} is stored as {theirs[name].dtype} and not equal to the seed's ({ours[name].dtype}): "
                f"whole numbers have no mean, {SAME_SEED}"
            )


def _check_vocabulary(
    seed: DenseExpert, expert: DenseExpert, tokenizer: TokenizerComparison, findings: Findings
) -> None:
    ours, theirs = seed.dims.vocab_size, expert.dims.vocab_size
    if ours == theirs or tokenizer.problem:
        return
    size = tokenizer.size
    if size is None or size > min(ours, theirs):
        fate = (
            "without both tokenizers it is unknown whether the rest is padding: put the tokenizers beside the weights"
            if size is None
            else f"the tokenizer has {size} tokens, so rows in use are missing: resize the embeddings to the tokenizer "
            "first"
        )
        findings.about(expert.name, [f"vocab_size is {theirs}, but the seed's is {ours}, and {fate}"])
        return
    padding = f"has no rows {theirs} to {ours - 1} of the padded embeddings, they are averaged over the others"
    if theirs > ours:
        padding = f"rows {ours} to {theirs - 1} of its embeddings are padding, they are left out"
    findings.about(expert.name, notes=[padding])


def _rotated_apart(ours: Config, experts: list[DenseExpert], attention: str, findings: Findings) -> list[DenseExpert]:
    """Experts with other rotary settings than the seed's, if the mixture's attention lets them keep their own.

    It can where a family's attention rotates all layers in one way. Settings that cannot be kept are reported.
    """
    different, may_differ = [], attention == "kv_experts" and "rope_theta" in rope_of(ours)
    for expert in experts:
        theirs = expert.index.config
        if _rotated_part(theirs) != _rotated_part(ours):
            problem = (
                f"partial_rotary_factor is {json.dumps(_rotated_part(theirs))}, but the seed's is "
                f"{json.dumps(_rotated_part(ours))}: the rotated parts of all experts' heads must be equal, {SAME_SEED}"
            )
            findings.about(expert.name, [problem])
        elif rope_of(theirs) != rope_of(ours):
            different.append(expert)
            may_differ &= expert.family.plain_attention and "rope_theta" in rope_of(theirs)
    if may_differ:
        return different
    for expert in different:
        reason = f"{expert.family.model_type} cannot give experts their own"
        if attention == "whole":
            reason = "models that stitches join share the seed's: leave it out, or merge without stitches"
        elif attention != "kv_experts":
            reason = "only attention: kv_experts lets experts keep their own"
        own = _rope_words(expert.index.config)
        findings.about(expert.name, [f"rotary settings are {own}, but the seed's are {_rope_words(ours)}: {reason}"])
    return []


def _rotated_part(config: Config) -> Any:
    """The share of a head that is rotated; of layer types that differ, each one's."""
    rope = rope_of(config)
    if "rope_theta" in rope:
        return rope.get("partial_rotary_factor", 1.0)
    return {kind: given.get("partial_rotary_factor", 1.0) for kind, given in rope.items()}


def _rope_words(config: Config) -> str:
    return json.dumps(rope_of(config), sort_keys=True)


def _fold_problems(recipe: Recipe, seed: DenseExpert) -> Iterator[str]:
    family = seed.family
    norms = foldable_norms(recipe, seed)
    if not norms:
        yield (
            f"merge.fold_norms: {family.model_type} has no norm whose output only experts read (it is a post-norm or "
            "unknown family, or an averaged part reads the norm too): leave fold_norms out"
        )
    biased = [norm for norm in norms if f"{family.layers}.0.{norm}.bias" in seed.tensors]
    bare = [norm for norm in norms if f"{family.layers}.0.{norm}.weight" not in seed.tensors]
    if biased:
        yield f"merge.fold_norms: {' and '.join(biased)} have a bias, which cannot be folded: leave fold_norms out"
    if bare:
        yield f"merge.fold_norms: {' and '.join(bare)} have no gain to fold: leave fold_norms out"


def foldable_norms(recipe: Recipe, seed: DenseExpert) -> list[str]:
    """Norms of a block that only experts read, so that their gains can go into the experts' projections."""
    norms = (seed.family.attention_input_norm, seed.family.ffn_input_norm)
    has_experts = (recipe.has_attention_experts, recipe.has_ffn_experts)
    averaged = {norm for norm, experts in zip(norms, has_experts, strict=True) if not experts}
    return [norm for norm in dict.fromkeys(norms) if norm is not None and norm not in averaged]
