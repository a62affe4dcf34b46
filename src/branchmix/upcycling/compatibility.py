"""Do these dense checkpoints fit together? Every problem is found before a byte is written, and all are told at once.

Reads configs, safetensors headers and tokenizer files, no weights but buffers of whole numbers and tied embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from branchmix.checkpoint.families import Config, Dimensions, Family, dimensions, is_head
from branchmix.checkpoint.index import CheckpointIndex, TensorRef
from branchmix.checkpoint.numbers import FLOAT_DTYPES
from branchmix.checkpoint.rotary import rope_of
from branchmix.checkpoint.tying import same_values
from branchmix.checkpoint.unfit import why_bidirectional
from branchmix.recipe import Recipe
from branchmix.upcycling.config_match import config_differences
from branchmix.upcycling.sources import SAME_SEED, DenseExpert, ExpertSource, Kind, MixtureExpert, Role
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


@dataclass
class Findings:
    """What the check found: problems forbid the merge, notes tell what will be done about a difference."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expert_rope_parameters: list[dict[str, Any]] | None = None
    """Rotary parameters of each expert of the mixture, where they differ and may."""


def check(recipe: Recipe, seed: DenseExpert, experts: list[DenseExpert]) -> Findings:
    """Compare every expert with the seed.

    Args:
        recipe: decides which differences matter (rotary bases of their own need Expert KV).
        seed: the seed, whether it is an expert or not.
        experts: the specialised models.
    """
    found = Findings()
    for who, model in (("seed", seed), *((f"expert {expert.name!r}", expert) for expert in experts)):
        found.notes += [f"{who}: {note}" for note in model.index.notes]
    seeds_own = [*contradictions(seed), *structure_problems(seed)] or list(incompleteness(seed))
    found.problems += [f"seed: {problem}" for problem in seeds_own]
    if (key := why_bidirectional(seed.index.config)) is not None:
        found.notes.append(
            f"attention is not causal ({key}): tokens see later ones, so generating with a cache and without differ in "
            "the mixture as they do in the seed"
        )
    related = [expert for expert in experts if expert.family.model_type == seed.family.model_type]
    different = _config_problems(seed.index.config, related) if not seeds_own else {}
    found.problems += different.pop("seed", [])
    for model in (seed, *experts):
        if model.own_head:
            found.notes.append(
                f"{_who(model)}: config.json ties the output layer to the embeddings, but the weights of the two "
                "differ: taken as untied"
            )
    for expert in experts:
        _compare(seed, expert, recipe, found, told=seeds_own, different=different.get(expert.name, []))
    _check_rotary(recipe, seed, related, found)
    if recipe.merge.fold_norms:
        found.problems += _fold_problems(recipe, seed)
    return found


def check_newcomer(mixture: CheckpointIndex, config: Config, newcomer: DenseExpert) -> Findings:
    """Compare a dense model with a mixture that it shall join.

    Args:
        mixture: headers of the mixture.
        config: its config.
        newcomer: the dense model.
    """
    found = Findings()
    who, seed_config = f"expert {newcomer.name!r}", config["seed_config"]
    theirs = newcomer.index.config
    if theirs.get("model_type") != seed_config.get("model_type"):
        found.problems.append(
            f"{who}: model_type is {theirs.get('model_type')}, but the mixture's seed is "
            f"{seed_config.get('model_type')}: {SAME_SEED}"
        )
        return found
    found.notes += [f"{who}: {note}" for note in newcomer.index.notes]
    dims = dimensions(seed_config)
    contradicting = list(contradictions(newcomer))
    structure = [*contradicting, *structure_problems(newcomer)]
    found.problems += [f"{who}: {problem}" for problem in structure]
    sizes = [] if contradicting else list(_size_problems(who, dims, newcomer.dims))
    found.problems += sizes
    found.problems += [problem for told in _config_problems(seed_config, [newcomer]).values() for problem in told]
    if not structure and not sizes:
        found.problems += _part_problems(who, MixtureExpert("", mixture, newcomer.family, dims, 0), newcomer)
    tokenizer = compare_tokenizers(mixture.folder, newcomer.index.folder)
    if tokenizer.problem:
        found.problems.append(f"{who}: {tokenizer.problem}")
    if tokenizer.note:
        found.notes.append(f"{who}: {tokenizer.note}")
    if _rotated_part(theirs) != _rotated_part(seed_config):
        found.problems.append(_other_part(who, theirs, seed_config))
    elif rope_of(theirs) != rope_of(seed_config):
        if config["attention"] == "kv_experts" and _may_rotate_apart(newcomer.family, (newcomer,)):
            found.notes.append(f"{who}: keeps its own rotary settings, {_rope_words(newcomer)}")
        else:
            found.problems.append(
                f"{who}: rotary settings are {_rope_words(newcomer)}, but the mixture's are "
                f"{json.dumps(rope_of(seed_config), sort_keys=True)}: only attention: kv_experts of a family with "
                "plain rotary attention lets experts keep their own"
            )
    return found


def _compare(
    seed: DenseExpert, expert: DenseExpert, recipe: Recipe, found: Findings, *, told: list[str], different: list[str]
) -> None:
    who = _who(expert)
    ours, theirs = seed.index.config, expert.index.config
    if ours.get("model_type") != theirs.get("model_type"):
        found.problems.append(
            f"{who}: model_type is {theirs.get('model_type')}, but the seed's is {ours.get('model_type')}: {SAME_SEED}"
        )
        return
    contradicting = list(contradictions(expert))
    structure = [problem for problem in (*contradicting, *structure_problems(expert)) if problem not in told]
    found.problems += [f"{who}: {problem}" for problem in structure]
    sizes = [] if contradicting else list(_size_problems(who, seed.dims, expert.dims))
    if not contradicting and seed.dims.tied_embeddings != expert.dims.tied_embeddings:
        sizes.append(_tying_problem(who, seed, expert))
    found.problems += sizes
    found.problems += different
    if not sizes and not contradicting:
        found.problems += _tensor_problems(who, seed, expert)
    if ours.get("max_position_embeddings") != theirs.get("max_position_embeddings"):
        found.notes.append(
            f"{who}: max_position_embeddings is {theirs.get('max_position_embeddings')}, the mixture takes the seed's "
            f"{ours.get('max_position_embeddings')}"
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if ours.get(key) != theirs.get(key):
            found.notes.append(f"{who}: {key} is {theirs.get(key)}, the mixture takes the seed's {ours.get(key)}")
    tokenizer = compare_tokenizers(seed.index.folder, expert.index.folder)
    if tokenizer.problem:
        found.problems.append(f"{who}: {tokenizer.problem}")
    if tokenizer.note:
        found.notes.append(f"{who}: {tokenizer.note}")
    _check_vocabulary(who, seed, expert, tokenizer, found)
    ours_dtypes, theirs_dtypes = _dtypes(seed), _dtypes(expert)
    if ours_dtypes != theirs_dtypes:
        target = recipe.dtype or "the seed's dtype"
        found.notes.append(
            f"{who}: stored as {'+'.join(sorted(theirs_dtypes))}, the seed as {'+'.join(sorted(ours_dtypes))}: cast to "
            f"{target}"
        )


def _size_problems(who: str, ours: Dimensions, theirs: Dimensions) -> Iterator[str]:
    names = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "intermediate_size": "intermediate_size",
    }
    if all(dims.head_dim == dims.hidden_size // dims.num_heads for dims in (ours, theirs)):
        del names["head_dim"]  # follows from the two others
    for attribute, name in names.items():
        mine, other = getattr(ours, attribute), getattr(theirs, attribute)
        if mine != other:
            yield f"{who}: {name} is {other}, but the seed's is {mine}: {SAME_SEED}"


def _tying_problem(who: str, seed: DenseExpert, expert: DenseExpert) -> str:
    words = [
        "tied"
        if model.dims.tied_embeddings
        else "untied" + (" (its config.json ties them, but the weights of the two differ)" if model.own_head else "")
        for model in (expert, seed)
    ]
    return (
        f"{who}: input and output embeddings are {words[0]}, but the seed's are {words[1]}: untie the tied one (load "
        "it with tie_word_embeddings=False, copy the input embeddings to the output layer, save)"
    )


def _config_problems(seed_config: Config, experts: list[DenseExpert]) -> dict[str, list[str]]:
    """By expert, what its config computes otherwise; only for those whose config and weights belong together."""
    sound = {e.name: e.index.config for e in experts if not any(contradictions(e)) and not any(structure_problems(e))}
    found = config_differences(seed_config, sound)
    return {
        name: [f"seed: {text}" if name == "seed" else f"expert {name!r}: {text}" for text in texts]
        for name, texts in found.items()
    }


def _who(model: DenseExpert) -> str:
    return "seed" if model.name == "seed" else f"expert {model.name!r}"


def _part_problems(who: str, member: MixtureExpert, newcomer: DenseExpert) -> Iterator[str]:
    """The first thing (bias, norm, matrix) in which a newcomer differs from the experts that a mixture has."""
    config = member.index.config
    for layer in range(newcomer.dims.num_layers):
        ours, theirs = (_parts(model, layer, config) for model in (member, newcomer))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                shapes = [
                    f"has shape {list(found[name])}" if name in found else "is missing" for found in (theirs, ours)
                ]
                yield (
                    f"{who}: its {name} of layer {layer} {shapes[0]}, but that of the mixture's experts {shapes[1]}: "
                    f"{SAME_SEED}"
                )
                return


def _parts(model: ExpertSource, layer: int, config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of an expert's share of a layer, as far as a mixture of this config keeps it for each expert."""
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: tuple[Kind, ...] = ("weight", "bias")
    roles: dict[str, tuple[Role, ...]] = {"kv_experts": ("q", "k", "v", "o"), "kv_sharing": ("q", "o")}
    for role in roles.get(config["attention"], ()):
        for kind in kinds:
            part = model.attention(layer, role, kind)
            if part is not None:
                shapes[f"attention's {role} {kind}"] = tuple(part.shape)
        norm = model.attention_norm(layer, role) if role in ("q", "k") else {}
        shapes |= {f"attention's {role} norm {name}": tuple(part.shape) for name, part in norm.items()}
    if config["ffn"] == "experts":
        shapes |= {f"FFN's {name}": tuple(part.shape) for name, part in model.ffn(layer).items()}
    return shapes


def _tensor_problems(who: str, seed: DenseExpert, expert: DenseExpert) -> Iterator[str]:
    ours, theirs = seed.tensors, expert.tensors
    told = {*missing_tensors(seed), *missing_tensors(expert), *unplaced_tensors(seed), *unplaced_tensors(expert)}
    missing = [name for name in ours if name not in theirs and name not in told]
    extra = [name for name in theirs if name not in ours and name not in told]
    if missing:
        yield f"{who}: lacks {count_tensors(missing)} that the seed has, first {missing[0]}: {SAME_SEED}"
    if extra:
        yield f"{who}: has {count_tensors(extra)} that the seed lacks, first {extra[0]}: {SAME_SEED}"
    for name in ours.keys() & theirs.keys():
        mine, other = ours[name].shape, theirs[name].shape
        if mine != other and not (_is_vocabulary(name, seed) and mine[1:] == other[1:]):
            yield f"{who}: {name} has shape {list(other)}, but the seed's is {list(mine)}: {SAME_SEED}"
        elif not _averaged_or_equal(ours[name], theirs[name]):
            yield (
                f"{who}: {name} is stored as {theirs[name].dtype} and not equal to the seed's ({ours[name].dtype}): "
                f"whole numbers have no mean, {SAME_SEED}"
            )


def _averaged_or_equal(ours: TensorRef, theirs: TensorRef) -> bool:
    """Whether two tensors of one name are both of floats, or small buffers of other numbers with the same bytes."""
    if ours.dtype in FLOAT_DTYPES and theirs.dtype in FLOAT_DTYPES:
        return True
    return ours.dtype == theirs.dtype and same_values(ours, theirs)


def _check_vocabulary(
    who: str, seed: DenseExpert, expert: DenseExpert, tokenizer: TokenizerComparison, found: Findings
) -> None:
    ours, theirs = seed.dims.vocab_size, expert.dims.vocab_size
    if ours == theirs or tokenizer.problem:
        return
    size = tokenizer.size
    if not tokenizer.same or size is None:
        found.problems.append(
            f"{who}: vocab_size is {theirs}, but the seed's is {ours}, and without both tokenizers nobody can tell "
            "whether the rest is padding: put the tokenizers beside the weights"
        )
    elif size > min(ours, theirs):
        found.problems.append(
            f"{who}: vocab_size is {theirs}, but the seed's is {ours}, and the tokenizer has {size} tokens, "
            "so rows in use are missing: resize the embeddings to the tokenizer first"
        )
    elif theirs > ours:
        found.notes.append(f"{who}: rows {ours} to {theirs - 1} of its embeddings are padding, they are left out")
    else:
        found.notes.append(
            f"{who}: has no rows {theirs} to {ours - 1} of the padded embeddings, they are averaged over the others"
        )


def _check_rotary(recipe: Recipe, seed: DenseExpert, experts: list[DenseExpert], found: Findings) -> None:
    ours = rope_of(seed.index.config)
    different = [expert for expert in experts if rope_of(expert.index.config) != ours]
    if not different:
        return
    for expert in list(different):
        if _rotated_part(expert.index.config) != _rotated_part(seed.index.config):
            different.remove(expert)
            found.problems.append(_other_part(f"expert {expert.name!r}", expert.index.config, seed.index.config))
    if not different:
        return
    if recipe.attention == "kv_experts" and _may_rotate_apart(seed.family, (seed, *experts)):
        models = [seed, *experts] if recipe.include_seed else list(experts)
        copies = [seed] * recipe.seed_copies
        found.expert_rope_parameters = [rope_of(model.index.config) for model in (*models, *copies)]
        names = ", ".join(f"{expert.name} {_rope_words(expert)}" for expert in different)
        found.notes.append(f"rotary settings differ (seed {_rope_words(seed)}; {names}): each expert keeps its own")
        return
    for expert in different:
        reason = (
            "only attention: kv_experts lets experts keep their own"
            if recipe.attention != "kv_experts"
            else f"{seed.family.model_type} cannot give experts their own"
        )
        found.problems.append(
            f"expert {expert.name!r}: rotary settings are {_rope_words(expert)}, but the seed's are "
            f"{_rope_words(seed)}: {reason}"
        )


def _may_rotate_apart(family: Family, models: Iterable[DenseExpert]) -> bool:
    """Whether a family's attention can rotate each expert's heads in their own way: one way for all layers."""
    return family.plain_attention and all("rope_theta" in rope_of(model.index.config) for model in models)


def _rotated_part(config: Config) -> Any:
    """The share of a head that is rotated; of layer types that differ, each one's."""
    rope = rope_of(config)
    if "rope_theta" in rope:
        return rope.get("partial_rotary_factor", 1.0)
    return {kind: given.get("partial_rotary_factor", 1.0) for kind, given in rope.items()}


def _other_part(who: str, theirs: Config, ours: Config) -> str:
    return (
        f"{who}: partial_rotary_factor is {json.dumps(_rotated_part(theirs))}, but the seed's is "
        f"{json.dumps(_rotated_part(ours))}: the rotated parts of all experts' heads must be equal, {SAME_SEED}"
    )


def _rope_words(model: DenseExpert) -> str:
    return json.dumps(rope_of(model.index.config), sort_keys=True)


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
    family = seed.family
    readers: dict[str, list[bool]] = {}
    for norm, is_expert in (
        (family.attention_input_norm, recipe.attention in ("kv_experts", "kv_sharing")),
        (family.ffn_input_norm, recipe.ffn == "experts"),
    ):
        if norm is not None:
            readers.setdefault(norm, []).append(is_expert)
    return [norm for norm, experts in readers.items() if all(experts)]


def _is_vocabulary(name: str, seed: DenseExpert) -> bool:
    return not name.startswith(f"{seed.family.layers}.") and (
        is_head(name) or name.rpartition(".")[0].endswith(TOKEN_TABLES)
    )


def _dtypes(model: DenseExpert) -> set[str]:
    return {ref.dtype for ref in model.tensors.values()}
