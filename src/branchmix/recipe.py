"""The YAML that users write, as pydantic models: what goes into a mixture and how. Unknown keys are refused.

``Recipe.load(path)`` for files, ``Recipe.model_validate(dict)`` or keyword arguments from Python. The reference page
in the docs is generated from the docstrings below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from branchmix.checkpoint.families import Family, nearest
from branchmix.checkpoint.folder import EXPERT, is_expert_name
from branchmix.settings import Settings, SettingsFile, parse

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Names of output dtypes, and their codes in safetensors."""

STITCHED = {"seed", "experts", "stitches", "dtype", "max_shard_size"}
"""Keys that a recipe with stitches may have."""

_SEED_COPY = "seed-copy-"
"""How the names of the seed's copies begin."""

_ALWAYS_1 = (
    "normalize with top_k 1 makes every gate 1, so the router never learns: give top_k: 2 or more, or leave it out"
)


def even_scaling(score: str, num_experts: int, top_k: int) -> float:
    """The factor that makes up for raw gates of logits near zero, which are 1 / N each, or 1 / 2 if sigmoids."""
    return (2 if score == "sigmoid" else num_experts) / top_k


class Expert(Settings):
    """One dense model fine-tuned from the seed."""

    name: str
    """Letters, digits, ``-``, ``_`` and ``.``; unique in the recipe, and not ``seed``, ``auto`` or
    ``seed-copy-...``."""
    model: str
    """Local folder, Hub id, or folder of a PEFT LoRA adapter, which is merged first. ``@revision`` after a Hub id."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not is_expert_name(name):
            raise ValueError(f"must be {EXPERT}, got {name!r}")
        if name.startswith(_SEED_COPY):
            raise ValueError(f"{name!r} is a name of seed_copies ({_SEED_COPY}...): call the expert something else")
        return name


class FFNRouting(Settings):
    """How tokens find FFN experts (BAM section 3.3)."""

    top_k: int = Field(1, ge=1)
    """Experts that each token goes to. A recipe without ``routing.ffn`` has 2, with ``normalize: true``: see
    ``start``."""
    normalize: bool = False
    """Divide the chosen gates by their sum. The paper does not; with top_k 1 it would cut the router's gradient."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become gates. ``sigmoid`` gives each expert a gate of its own, as DeepSeek-V3 and GLM-4.5 do (arXiv
    2412.19437); experts are still chosen by top-k."""
    soft: bool = False
    """Every token goes to all experts (as in the BTS paper's BAM)."""

    @model_validator(mode="before")
    @classmethod
    def _top_k_is_not_soft(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("soft") is True and data.get("top_k", 1) != 1:
            raise ValueError("soft and top_k exclude each other: remove one")
        return data


class AttentionRouting(Settings):
    """How tokens weigh attention experts (BAM section 4.1)."""

    soft: bool = True
    """All experts, weighted by the gate: the paper's choice."""
    top_k: int | None = Field(None, ge=1)
    """Only the best k (the paper's ablation, Table 6). Only their queries and outputs are computed."""
    normalize: bool = False
    """Divide the chosen gates by their sum."""

    @model_validator(mode="before")
    @classmethod
    def _top_k_is_not_soft(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("top_k") is not None:
            if data.get("soft"):
                raise ValueError("soft and top_k exclude each other: remove one")
            return {**data, "soft": False}
        return data

    @model_validator(mode="after")
    def _one_of_both(self) -> AttentionRouting:
        if not self.soft and self.top_k is None:
            raise ValueError("soft is false but top_k is missing: say how many experts a token uses")
        return self


class Domains(Settings):
    """Text of the experts' domains, from which routers compute an expert's row."""

    data: Path
    """YAML file with a domain of each expert's name, in the format of ``branchmix eval --data``; held-out documents are
    not read. The seed, where it is an expert, takes all domains that no expert is named after."""


class Routing(Settings):
    """Both routers of a block."""

    ffn: FFNRouting = FFNRouting()
    attention: AttentionRouting = AttentionRouting()
    shared: bool = False
    """One router in each block for both attention and FFN experts. The paper has two."""
    domains: Domains | None = None
    """An expert's row of every router is a learned projection of an embedding of its domain's text (Nexus, arXiv
    2408.15901), so that an expert that is added later gets its rows without training. If not set, rows are weights."""


class RouterInit(Settings):
    """How routers start. ``zeros`` alone is short for ``{method: zeros}``; with ``prompts`` or ``text``, the method is
    ``hidden`` unless given."""

    method: Literal["normal", "zeros", "hidden"] = "normal"
    """``normal``: N(0, std^2). ``zeros``: uniform gates, for soft routing only. ``hidden``: rows are the mean hidden
    states of the seed on each expert's ``prompts`` or ``text``."""
    std: float = Field(0.02, gt=0)
    """Standard deviation; for ``hidden``, rows get the length that random rows of this deviation would have."""
    seed: int = Field(0, ge=0)
    """Random seed; each tensor's values depend only on it and on the tensor's name."""
    attention: Literal["zeros"] | None = None
    """``zeros``: the attention gates start uniform, however the FFN routers start."""
    prompts: dict[str, list[str]] | None = None
    """For ``hidden``: some sentences typical of each expert."""
    text: dict[str, Path] | None = None
    """For ``hidden``: a text file typical of each expert."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"method": data}
        if isinstance(data, dict) and (data.get("prompts") or data.get("text")):
            return {"method": "hidden", **data}
        return data

    @model_validator(mode="after")
    def _hidden_needs_text(self) -> RouterInit:
        if (self.method == "hidden") != bool(self.prompts or self.text):
            raise ValueError("method hidden needs prompts or text for every expert, and only it takes them")
        for name, prompts in (self.prompts or {}).items():
            if any(not prompt.strip() for prompt in prompts):
                raise ValueError(f"prompts: one of {name!r} is empty, so there is nothing to read: write a sentence")
        return self


class Merge(Settings):
    """How everything that is not an expert is merged: embeddings, norms, the head, and averaged attention. ``seed``
    alone is short for ``{method: seed}``, and ``{weighted: {code: 2}}`` for
    ``{method: weighted, weights: {code: 2}}``."""

    method: Literal["average", "seed", "weighted"] = "average"
    """``average``: uniform mean over all dense models, the seed among them (BAM section 4). ``seed``: the seed's.
    ``weighted``: with ``weights``."""
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weight of each expert by name, 1 where none is given; ``seed`` is the seed. They are divided by their sum."""
    kv_init: str = "merge"
    """Shared K and V of ``kv_sharing``: ``merge`` (as everything else), ``average``, ``seed``, or an expert's name."""
    fold_norms: bool = False
    """Multiply each model's norm gains into its own projections, so that they are not averaged. For norms without
    biases."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"method": data}
        if isinstance(data, dict) and "weighted" in data:
            rest = {key: value for key, value in data.items() if key != "weighted"}
            return {"method": "weighted", "weights": data["weighted"], **rest}
        return data

    @model_validator(mode="after")
    def _weights_belong_to_weighted(self) -> Merge:
        if (self.method == "weighted") != (self.weights is not None):
            raise ValueError("method weighted needs weights, and only it takes them")
        return self


class SparseUpcycling(Settings):
    """What may be done to FFN experts that are copies of the seed, so that they differ from the start."""

    weight_scaling: bool | Annotated[float, Field(gt=0)] = False
    """Scale the matrices so that top-k raw gates keep the dense output's size (NVIDIA, arXiv 2410.07524): true takes
    the cube root of N / k for gated FFNs, the square root for plain ones, and one root more for a squared ReLU."""
    redraw_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the inner width that is drawn anew from its own mean and deviation (Drop-Upcycling, arXiv
    2502.19261, which uses 0.5)."""


class Gates(Settings):
    """Gates that are fitted on text, so that the mixture is good before it is trained."""

    data: Path
    """YAML file with domains of text, in the format of ``branchmix eval --data``; held-out documents are not read."""
    token_only: bool = False
    """Gates that see one token only, for servers that keep no state of the document, and for export."""
    keep_top_k: bool = False
    """Keep ``top_k`` and raw gates as ``routing`` has them. By default, two experts or more share gates that sum to 1,
    which is better before training, at the cost of the second expert."""


class Recipe(SettingsFile):
    """Everything that ``branchmix upcycle`` needs to know."""

    seed: str
    """The dense model that all experts were fine-tuned from: local folder or Hub id, with ``@revision``."""
    start: Literal["even", "paper"] = "even"
    """FFN routing of a recipe that has none of ``routing.ffn``, ``routed_scaling_factor`` and ``sparse_upcycling``.
    ``even``: top-2 with gates that sum to 1, which keeps the dense model's scale, so that a mixture with random gates
    is about as good as a soup. ``paper``: raw top-1 gates (BAM section 3.3), which have to be trained."""
    include_seed: bool = True
    """The seed is expert 0, and takes part in averages."""
    experts: list[Expert] = []
    """The fine-tuned models."""
    seed_copies: int = Field(0, ge=0, le=1024)
    """Number of further copies of the seed as experts (sparse upcycling; the paper's BTX with 5 to 8 experts), called
    ``seed-copy-1`` and so on."""
    attention: Literal["kv_experts", "kv_sharing", "average", "seed"] = "kv_experts"
    """``kv_experts``: BAM, every expert with its own q, k, v and o. ``kv_sharing``: own q and o, one k and v.
    ``average``: one averaged attention (BTX). ``seed``: the seed's attention."""
    ffn: Literal["experts", "average"] = "experts"
    """``experts``, or ``average``: one averaged FFN (a soup, if attention is averaged too)."""
    expert_rank: Annotated[int, Field(ge=1)] | Literal["auto", "full"] = "full"
    """``full``: every expert has matrices of its own. A number: attention and FFN of all experts are the seed's
    matrices, once, and each expert's change of them as two factors (``W + B A``); LoRA adapters keep their own factors,
    exactly, and full fine-tunes are cut to this rank. ``auto``: to the rank that ``expert_energy`` asks for, found for
    each matrix."""
    expert_energy: float = Field(0.9, gt=0, le=1)
    """For ``expert_rank: auto``: the share of a change's sum of squares that the smallest sufficient rank keeps."""
    routing: Routing = Routing()
    """How tokens choose experts."""
    routed_scaling_factor: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Factor on the FFN experts' output: 1.0 in the paper; ``auto`` is N / k for raw gates (2 / k for sigmoids), which
    keeps the dense scale while logits are near zero, and 1 for gates that sum to 1."""
    shared_expert: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None = None
    """Weight of the seed's FFN as an expert that every token goes to; the routed experts get the rest (Nexus, arXiv
    2408.15901). ``auto`` is 1 / (k + 1). With gates forced to one expert, the FFN is then a mix of this expert and the
    seed, so the mixture is not lossless."""
    router_aux_loss_coef: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss in training (eq. 2's alpha)."""
    router_z_loss_coef: float = Field(0.001, ge=0)
    """Weight of the router z-loss in training (eq. 2's beta)."""
    router_init: RouterInit = RouterInit()
    """How routers start."""
    gates: Gates | None = None
    """Calibrate the gates on text once the mixture is merged, as ``branchmix calibrate`` does."""
    trunk: Literal["average", "experts"] = "average"
    """Embeddings, norms and head. ``average``: one of each, by ``merge``. ``experts``: every expert keeps its own, and
    document gates choose; needs ``gates``. Lossless for any experts, for N times the memory of the embeddings."""
    stitches: Annotated[int, Field(ge=1)] | None = None
    """BTS (arXiv 2502.00075): all models stay whole and frozen, side by side, and this many stitches, or one after
    every layer if there are fewer layers, move states between the seed and the experts. The paper has 4. They start
    closed, so that the mixture is the seed until they are trained. No other key about experts, gates or averages
    applies."""
    merge: Merge = Merge()
    """How everything that is not an expert is merged."""
    sparse_upcycling: SparseUpcycling = SparseUpcycling()
    """Options for copies of the seed."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Dtype of the output; the seed's own if not given."""
    max_shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?\s*[KMG]B$")
    """Greatest size of one weights file."""

    @model_validator(mode="before")
    @classmethod
    def _start(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("start", "even") != "even" or data.get("stitches") is not None:
            return data
        routing = data.get("routing", {})
        if isinstance(routing, Routing):
            routing = routing.model_dump(exclude_unset=True)
        given = not isinstance(routing, dict) or "ffn" in routing
        if given or data.get("ffn") == "average" or "routed_scaling_factor" in data or "sparse_upcycling" in data:
            return data
        return {**data, "routing": {**routing, "ffn": {"top_k": 2, "normalize": True}}}

    @model_validator(mode="after")
    def _experts_make_sense(self) -> Recipe:
        names = [expert.name for expert in self.experts]
        for name in names:
            if name == "seed":
                raise ValueError("experts: 'seed' is the seed's own name: call the expert something else")
            if names.count(name) > 1:
                raise ValueError(f"experts: the name {name!r} is listed {names.count(name)} times")
        if self.stitches is not None:
            for name, field in type(self).model_fields.items():
                if name not in STITCHED and getattr(self, name) != field.default:
                    raise ValueError(f"{name}: with stitches, every model stays whole and its own: leave {name} out")
        if len(self.expert_names) < 2:
            raise ValueError(
                f"experts: there {'is' if self.expert_names else 'are'} only {len(self.expert_names)}, a mixture needs "
                "two or more (the seed counts unless include_seed is false)"
            )
        self._check_merge()
        for section, given in (
            ("merge.weights", self.merge.weights),
            ("router_init.prompts", self.router_init.prompts),
            ("router_init.text", self.router_init.text),
        ):
            for name in given or ():
                seed_weight = section == "merge.weights" and name == "seed"
                if name not in self.expert_names and not seed_weight:
                    raise ValueError(f"{section}: no expert is called {name!r}{nearest(name, self.expert_names)}")
        self._check_routing()
        if self.is_low_rank:
            self._check_low_rank()
        if self.gates and not (self.has_attention_experts or self.has_ffn_experts):
            raise ValueError("gates: a soup has no experts to choose from: leave gates out, or give ffn: experts")
        if self.trunk == "experts" and (self.gates is None or self.gates.token_only):
            raise ValueError("trunk: experts needs gates: {data: FILE}, without token_only: the document chooses them")
        return self

    def _check_low_rank(self) -> None:
        if not (self.has_attention_experts or self.has_ffn_experts):
            raise ValueError("expert_rank: a soup has no experts: leave it out, or give ffn: experts")
        if self.seed_copies or self.sparse_upcycling != SparseUpcycling():
            what = "seed_copies" if self.seed_copies else "sparse_upcycling"
            raise ValueError(f"{what}: with expert_rank a copy of the seed has no matrices of its own: leave out one")

    def _check_merge(self) -> None:
        weights = self.merge.weights or {}
        copies = [name for name in weights if name in self.seed_copy_names]
        if copies:
            raise ValueError(f"merge.weights: {copies[0]} is the seed again, which averages take once: weight 'seed'")
        averaged = [expert.name for expert in self.experts]
        if self.include_seed or self.seed_copies:
            averaged.append("seed")
        elif "seed" in weights:
            raise ValueError(
                "merge.weights: 'seed' takes no part in averages, since include_seed is false: leave it out"
            )
        if all(weights.get(name, 1.0) == 0 for name in averaged):
            raise ValueError("merge.weights: all are zero, so nothing is left to average: give one model a weight")

    def _check_routing(self) -> None:
        if self.routing.domains is not None:
            self._check_domains()
        if self.shared_expert is not None and not self.has_ffn_experts:
            raise ValueError("shared_expert: needs FFN experts beside it: give ffn: experts, or leave it out")
        count = len(self.expert_names)
        for where, top_k in (
            ("routing.ffn.top_k", self.routing.ffn.top_k),
            ("routing.attention.top_k", self.routing.attention.top_k),
        ):
            if top_k is not None and top_k > count:
                raise ValueError(f"{where} is {top_k}, but there are only {count} experts")
        if self.routing.ffn.normalize and self.num_experts_per_tok == 1 and self.ffn == "experts":
            raise ValueError(f"routing.ffn: {_ALWAYS_1}")
        attention_top_k = self.routing.attention.top_k if self.has_attention_experts else None
        if self.routing.attention.normalize and attention_top_k == 1:
            raise ValueError(f"routing.attention: {_ALWAYS_1}")
        if self.routing.shared and not (self.has_attention_experts and self.has_ffn_experts):
            raise ValueError("routing.shared: one router for both needs attention experts and ffn: experts")
        if self.routing.shared and self.routing.ffn.score == "sigmoid":
            raise ValueError(
                "routing.shared: attention gates are softmaxed, so score: sigmoid needs a router of its own"
            )
        if self.routing.shared and self.router_init.attention is not None:
            raise ValueError("router_init.attention: with routing.shared, attention has no router: remove it")
        kv_init = self.merge.kv_init
        choices = ["merge", "average", "seed", *self.expert_names]
        if kv_init not in choices:
            raise ValueError(f"merge.kv_init: {kv_init!r} is not one of the choices{nearest(kv_init, choices)}")
        if self.router_init.method == "zeros" and self.ffn == "experts" and self.num_experts_per_tok < count:
            raise ValueError("router_init: zeros ties the top-k of the FFN router; use it with soft routing only")
        zeros = "zeros" in (self.router_init.method, self.router_init.attention)
        if zeros and attention_top_k is not None and attention_top_k < count:
            raise ValueError("router_init: zeros ties the top-k of the attention router; use it with soft routing only")
        prompted = {name for name, prompts in (self.router_init.prompts or {}).items() if prompts}
        given = prompted | (self.router_init.text or {}).keys()
        missing = [name for name in self.expert_names if name not in given]
        if self.router_init.method == "hidden" and missing:
            raise ValueError(f"router_init: hidden needs prompts or text for every expert, {missing[0]!r} has none")

    def _check_domains(self) -> None:
        if not (self.has_attention_experts or self.has_ffn_experts):
            raise ValueError("routing.domains: a soup has no experts to choose from: leave it out")
        if self.router_init.method != "normal" or self.router_init.attention is not None:
            raise ValueError("router_init: with routing.domains, rows are computed: give std and seed only")
        if self.gates is not None:
            raise ValueError("gates: are fitted with routers that have weights of their own: remove routing.domains")
        if self.seed_copies:
            raise ValueError("seed_copies: copies of the seed have one domain and so one row: remove routing.domains")

    @property
    def expert_names(self) -> list[str]:
        """Names of all experts, in the order of the routers' rows."""
        experts = [expert.name for expert in self.experts]
        return (["seed"] if self.include_seed else []) + experts + self.seed_copy_names

    @property
    def seed_copy_names(self) -> list[str]:
        """Names of the experts that ``seed_copies`` adds."""
        return [f"{_SEED_COPY}{number}" for number in range(1, self.seed_copies + 1)]

    @property
    def has_attention_experts(self) -> bool:
        return self.stitches is None and self.attention in ("kv_experts", "kv_sharing")

    @property
    def has_ffn_experts(self) -> bool:
        return self.stitches is None and self.ffn == "experts"

    @property
    def parts(self) -> dict[str, str]:
        """``attention``, ``ffn`` and ``trunk`` as the mixture's config has them."""
        own: dict[str, str] = {"attention": self.attention, "ffn": self.ffn, "trunk": self.trunk}
        return own if self.stitches is None else dict.fromkeys(own, "whole")

    def stitched_layers(self, num_layers: int) -> list[str | None] | None:
        """For each layer, where the stitch behind it moves states, ``hub`` or ``experts``; None without stitches.

        As in the paper they are ``L // K`` layers apart and of both kinds in turn, the last one behind the last layer
        and into the hub.
        """
        if self.stitches is None:
            return None
        stitches = min(self.stitches, num_layers)
        behind = {num_layers - 1 - number * (num_layers // stitches): number for number in range(stitches)}
        return [("hub", "experts")[behind[layer] % 2] if layer in behind else None for layer in range(num_layers)]

    @property
    def is_low_rank(self) -> bool:
        """Whether experts are changes of the seed of low rank."""
        return self.expert_rank != "full"

    def routers(self, family: Family) -> dict[str, str]:
        """Names of the routers' weights below a block, by kind."""
        return family.routers(
            attention=self.has_attention_experts, ffn=self.has_ffn_experts, shared=self.routing.shared
        )

    @property
    def num_experts_per_tok(self) -> int:
        """k of the FFN router; soft routing is k = N."""
        is_soft = self.routing.ffn.soft or self.stitches is not None
        return len(self.expert_names) if is_soft else self.routing.ffn.top_k

    @property
    def scaling(self) -> float:
        """``routed_scaling_factor`` as a number."""
        if self.routed_scaling_factor != "auto":
            return float(self.routed_scaling_factor)
        ffn = self.routing.ffn
        return 1.0 if ffn.normalize else even_scaling(ffn.score, len(self.expert_names), self.num_experts_per_tok)

    @property
    def shared_expert_weight(self) -> float | None:
        """``shared_expert`` as a number."""
        return 1 / (self.num_experts_per_tok + 1) if self.shared_expert == "auto" else self.shared_expert

    @property
    def max_shard_bytes(self) -> int:
        """``max_shard_size`` in bytes."""
        number, unit = self.max_shard_size[:-2].strip(), self.max_shard_size[-2:]
        return max(1, int(float(number) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[unit]))

    @property
    def files(self) -> list[Path]:
        """The files it was read from: its own, if there is one, and the texts for routers and gates."""
        texts = [self.folder / path for path in (self.router_init.text or {}).values()]
        texts += [self.folder / section.data for section in (self.gates, self.routing.domains) if section]
        return texts if self._file is None else [self._file, *texts]

    @classmethod
    def of(cls, given: Recipe | dict[str, Any] | str | Path) -> Recipe:
        """A recipe as it is, from its dictionary, or from its file."""
        if isinstance(given, Recipe):
            return given
        return parse(cls, given, "recipe") if isinstance(given, dict) else cls.load(given)
