"""An existing mixture, opened by its headers: what adding, removing and exporting experts have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from branchmix.accounting.inspection import too_few_parameters
from branchmix.accounting.lineage import MERGE, as_records, lineage, phases_of
from branchmix.accounting.shape import MIXTURE_DEFAULTS, Shape, shape_of
from branchmix.checkpoint.companions import licence_of_folder
from branchmix.checkpoint.families import Config, Dimensions, Family, matrix_shapes
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.index import CheckpointIndex
from branchmix.checkpoint.json_text import read_object
from branchmix.checkpoint.tying import as_stored
from branchmix.errors import CheckpointError, short
from branchmix.recipe import DTYPES
from branchmix.upcycling.plan import ROUTER_DOMAINS
from branchmix.upcycling.sources import FFN_NAMES, MATRICES, ROLES, MixtureExpert

DEFAULT_SHARD_BYTES = 5_000_000_000
NOT_CALIBRATED = (
    "the document gates know nothing of {name!r} yet and send nothing to it: run branchmix calibrate with text that it "
    "is meant for"
)
"""Note on an expert that joined a calibrated mixture."""


class OpenedMixture:
    """Config (with the defaults of keys that are left out), tensors and experts of a mixture.

    Args:
        given: folder or Hub id, as the user wrote it.
        otherwise: what to do with a model that is not a mixture, for the error.

    Raises:
        CheckpointError: it cannot be read, is not a mixture, or its config and weights are not those of one.
    """

    def __init__(self, given: str, *, otherwise: str):
        self.resolved: ResolvedModel = resolve(given)
        folder = self.resolved.folder
        opened = as_stored(CheckpointIndex.open(folder))
        if opened.config.get("model_type") != "branchmix":
            raise CheckpointError(f"{given}: is a {opened.config.get('model_type')} model, not a mixture: {otherwise}")
        lacking = [key for key in ("seed_config", "num_experts", "num_experts_per_tok") if not opened.config.get(key)]
        if lacking:
            raise CheckpointError(f"{folder / 'config.json'}: has no {lacking[0]}: copy the mixture's own here")
        if opened.config.get("stitches") is not None:
            raise CheckpointError(
                f"{given}: its experts are whole models, joined by stitches: it has no gates to fit, no expert can "
                "join or leave, and no native class computes it: use a recipe without stitches for that"
            )
        self.config: Config = {**MIXTURE_DEFAULTS, **opened.config}
        self.index = replace(opened, config=self.config)
        try:
            self.shape: Shape = shape_of(self.config)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}: copy the mixture's own here") from None
        self.seed_config: Config = self.shape.seed
        self.family: Family = self.shape.family
        self.dims: Dimensions = self.shape.sizes
        self._check_tensors()
        count = self.shape.num_experts
        self.names: list[str] = self.config["expert_names"] or [f"expert-{number}" for number in range(count)]
        self.experts = [
            MixtureExpert(name, self.index, self.family, self.dims, number) for number, name in enumerate(self.names)
        ]
        stored = next(iter(self.index.tensors.values())).dtype
        self.dtype = DTYPES.get(str(self.config.get("dtype")), stored)
        self.dtype_name = next((name for name, code in DTYPES.items() if code == self.dtype), None)
        self.scaling = float(self.config["routed_scaling_factor"])

    @property
    def shard_bytes(self) -> int:
        """For writing it again in as many files as now; a single file may grow to the usual size."""
        largest = max(file.stat().st_size for file in self.index.files)
        return largest if len(self.index.files) > 1 else max(largest, DEFAULT_SHARD_BYTES)

    def _check_tensors(self) -> None:
        """Raises CheckpointError where weights are missing, or of other shapes than the config's."""
        folder = self.resolved.folder
        together = "config and weights do not belong together, download or save both again"
        for name, shape in self._expected_tensors():  # ends at the first that is wrong, were there a billion layers
            ref = self.index.tensors.get(name)
            if ref is None:
                raise CheckpointError(
                    f"{folder}: the weights lack {name}: download the mixture again, or save it again as a causal "
                    "language model"
                )
            if ref.shape != shape:
                raise CheckpointError(
                    f"{folder}: {name} has shape {list(ref.shape)}, but by config.json it should be {list(shape)}: "
                    f"{together}"
                )
        if lacking := too_few_parameters(self.index):
            raise CheckpointError(f"{folder}: {lacking}: {together}")

    def _expected_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Routers and matrices of the experts, with their shapes; biases and the rest are only counted."""
        shape, dims, family = self.shape, self.dims, self.family
        width, inner, count = dims.hidden_size, dims.intermediate_size, shape.num_experts
        query, shared = count * dims.num_heads * dims.head_dim, shape.kv_experts * dims.num_kv_heads * dims.head_dim
        wide = {"heads.q_proj": (query, width), "heads.k_proj": (shared, width), "heads.v_proj": (shared, width)}
        wide["o_proj"] = (width, query)
        shapes = matrix_shapes(dims)
        for layer in range(dims.num_layers):
            block = f"model.{family.layers}.{layer}"
            ranks = shape.ranks(layer)
            changes = {f"heads.{role}_proj" if role != "o" else "o_proj": role for role in ROLES if role in ranks}
            for name, size in wide.items() if shape.has_attention_experts else ():
                if name not in changes:
                    yield f"{block}.{family.attention}.{name}.weight", size
            modules: dict[str, str] = {f"{family.attention}.{name}": role for name, role in changes.items()}
            modules |= {f"{family.ffn}.experts.{name}": name for name in MATRICES[4:] if name in ranks}
            for module, name in modules.items():
                yield from _change(f"{block}.{module}", shapes[name], sum(ranks[name]))
            for router in shape.routers.values():
                yield from ((f"{block}.{name}", size) for name, size in shape.router_tensors(router).items())
            for bias in self.expert_biases(self.config):
                yield f"{block}.{bias}", (count,)
            experts = [f"experts.{number}" for number in range(count) if shape.has_ffn_experts and not ranks]
            for expert in experts + ["shared_expert"] * shape.shared_experts:
                for matrix in FFN_NAMES[family.gate is not None]:
                    size = (width, inner) if matrix == "down_proj" else (inner, width)
                    yield f"{block}.{family.ffn}.{expert}.{matrix}.weight", size
        if shape.domain_router:
            yield f"{ROUTER_DOMAINS}embeddings", (count, shape.domain_router[0])
            yield f"{ROUTER_DOMAINS}centre", (shape.domain_router[0],)
        if domains := len(shape.domains):
            yield from ((f"document_gate.{kind}", (count, domains)) for kind in shape.gated_kinds)
            for name in ("evidence", "counts"):
                yield f"document_gate.{name}", (dims.vocab_size, domains)

    def expert_biases(self, config: Config) -> list[str]:
        """Names of the routers' biases in a block, below the block, in a mixture of this family and config."""
        if not config["expert_bias"]:
            return []
        count = config["num_experts"]
        attention_top_k, top_k = config["attention_num_experts_per_tok"] or count, config["num_experts_per_tok"]
        attention = [f"{self.family.attention}.expert_gate.expert_bias"] * self.shape.has_attention_experts
        ffn = [f"{self.family.ffn}.gate.expert_bias"] * self.shape.has_ffn_experts
        return attention * (attention_top_k < count) + ffn * (top_k < count)

    @property
    def lossless(self) -> bool | None:
        """``Plan.lossless``, as recorded; None where nothing is on record, or the mixture was trained."""
        return self.provenance().get("lossless")

    @property
    def notes(self) -> list[str]:
        """What was noted when it was merged, or an expert joined."""
        notes = (read_object(self.resolved.folder / "branchmix.json") or {}).get("notes")
        return notes if isinstance(notes, list) else []

    @property
    def may_be_trained(self) -> bool:
        """Whether its routers may be more than what a recipe started them with, or a fit of gates."""
        folder, record = self.resolved.folder, self.provenance()
        return not record["recipe"] or bool(record.get("trained")) or (folder / "training.json").is_file()

    def sources_at(self, out: Path) -> list[Path]:
        """Folders of the models that it was merged from: those whose whole path is on record, and ``out`` if it is one.

        A relative path started from a folder that is not on record, so ``out`` is recognised by what it was trained on.
        """
        record = provenance_of(self.resolved.folder) or {"sources": []}
        added = [step["added"]["expert"] for step in record.get("changes", []) if "added" in step]
        sources = {source["model"]: source for source in (*record["sources"], *added)}
        folders = [Path(model) for model in sources if Path(model).is_absolute()]
        if (out / "config.json").is_file() and not (out / MERGE).is_file():
            trainings = [phases_of(source, "training", model) for model, source in sources.items()]
            keys = [[phase.key for phase in phases] for phases in (lineage(out), *trainings)]
            folders += [out] if keys[0] in keys[1:] else []
        return folders

    def provenance(self) -> dict[str, Any]:
        """Recipe, sources and changes; without a record of its own (it was trained since) the mixture is the source."""
        folder, given = self.resolved.folder, self.resolved.given
        if (record := _record(folder)) is not None:
            return record
        training = as_records(lineage(folder, given))
        source = {"name": "mixture", "model": given, "revision": self.resolved.revision, "training": training}
        return {"recipe": {}, "sources": [{**source, "license": licence_of_folder(folder)}]}


def _change(module: str, size: tuple[int, int], rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The seed's matrix and the factors of all experts' changes of it."""
    yield f"{module}.weight", size
    if rank:
        yield f"{module}.low_rank_A", (rank, size[1])
        yield f"{module}.low_rank_B", (rank, size[0])


def provenance_of(folder: Path) -> dict[str, Any] | None:
    """The ``branchmix.json`` of a checkpoint folder; for a trained model, that of the mixture it was trained from.

    That one then says ``trained``, and not whether the merge was lossless.
    """
    if (folder / "branchmix.json").is_file():
        return _record(folder)
    return provenance_of_start(folder)


def provenance_of_start(folder: Path) -> dict[str, Any] | None:
    """The ``branchmix.json`` of the mixture that a trained model in a folder was trained from; None for others."""
    training = read_object(folder / "training.json") or {}
    trained_from = (training.get("config") or {}).get("model")
    if not isinstance(trained_from, str):
        return None
    start = Path(trained_from)
    # A relative path started from a folder that is not on record: here another model may have that name.
    if not start.is_absolute():
        ancestors = [phase["key"] for phase in training.get("ancestors") or []]
        if [phase.key for phase in lineage(start)] != ancestors:
            return None
    if (record := _record(start)) is None:
        return None
    return {**{key: value for key, value in record.items() if key != "lossless"}, "trained": True}


def _record(folder: Path) -> dict[str, Any] | None:
    """Content of ``branchmix.json``, or None; raises CheckpointError if its readers cannot rely on it."""
    file = folder / "branchmix.json"
    record = read_object(file)
    if record is None or not isinstance(record.get("sources"), list):
        return None
    if problem := _problem_of(record):
        raise CheckpointError(f"{file}: {problem}: copy the model's own here, or remove it")
    kept = {key: value for key, value in record.items() if key not in ("versions", "notes")}
    return {"recipe": {}, **kept, "sources": [{"revision": None, **source} for source in record["sources"]]}


def _problem_of(record: dict[str, Any]) -> str | None:
    """The first part of a ``branchmix.json`` that is not what its readers rely on."""
    for key, kind in (("recipe", dict), ("exported", dict), ("changes", list)):
        if not isinstance(record.get(key, kind()), kind):
            return f"{key} is {short(record[key])}, not a {'list' if kind is list else 'mapping'}"
    models: dict[str, Any] = {f"sources.{number}": source for number, source in enumerate(record["sources"])}
    for number, change in enumerate(record.get("changes", [])):
        place, step = f"changes.{number}", change if isinstance(change, dict) else {}
        added, fit = step.get("added"), step.get("calibrated")
        if isinstance(added, dict) and {"expert", "router_std", "router_seed"} <= added.keys():
            models[place] = added["expert"]
        elif isinstance(fit, dict):
            losses = fit.get("losses", {})
            if not isinstance(fit.get("domains"), dict):
                return f"{place}.calibrated has no domains"
            pairs = losses.values() if isinstance(losses, dict) else [None]
            if not all(isinstance(pair, dict) and {"before", "after"} <= pair.keys() for pair in pairs):
                return f"{place}.calibrated.losses are not losses before and after by domain"
        elif not isinstance(step.get("removed"), str):
            return f"{place} names no expert that joined or left"
    for place, source in models.items():
        for key in ("name", "model"):
            if not isinstance(source, dict) or not isinstance(source.get(key), str):
                return f"{place} has no {key}"
        for key in ("revision", "license"):
            if not isinstance(source.get(key, ""), str | None):
                return f"{place}.{key} is {short(source[key])}, not text"
    return None
