"""The YAML file of ``branchmix study``: a seed, domains, budgets, methods, repetitions. Unknown keys are refused.

``StudyFile.load(path)``. The reference page in the docs is generated from the docstrings below. ``METHODS`` is what a
study can compare, from ``methods.yaml``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.folder import is_expert_name
from branchmix.data.config import HeldOut, Source
from branchmix.errors import RecipeError
from branchmix.recipe import Recipe
from branchmix.settings import Count, FileName, Settings, SettingsFile, Share, overlaid, parse, read_yaml
from branchmix.train.config import Mix, NewModel, Optimizer, RunConfig

Match = Literal["dm", "cm"]

SEED = "seed"
DEMO = Path(__file__).parent / "recipes" / "demo.yaml"
"""The study of ``branchmix demo``."""


@dataclass(frozen=True)
class Preset:
    """A method that papers describe."""

    label: str
    what: str
    kind: Literal["mixture", "merge", "forced", "dense", "ensemble"] = "mixture"
    """``mixture``: merged and trained. ``merge``: merged only. ``forced``: merged only, and measured with all gates
    forced to each domain's best expert, the bound for any gates. ``dense``: the seed, trained on the mixtures' data.
    ``ensemble``: all dense models, nothing trained."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """Keys of the recipe, with those of the method that it varies."""
    train: dict[str, Any] = field(default_factory=dict)
    """Keys of the run that trains the mixture."""
    match: Sequence[Match] = ("dm", "cm")
    larger: Literal["total", "active"] | None = None
    """Copies of the seed are added until the parameters (and for ``active`` top-k until the active ones) are those of
    BAM Expert KV."""
    varies: str | None = None
    """The method that this one differs from in one thing: a report compares both."""
    warning: str = ""


def _presets() -> dict[str, Preset]:
    content: dict[str, dict[str, Any]] = read_yaml(Path(__file__).with_name("methods.yaml"))

    def recipe(name: str) -> dict[str, Any]:
        fields = content[name]
        return {**(recipe(fields["varies"]) if "varies" in fields else {}), **fields.get("recipe", {})}

    return {name: Preset(**{**fields, "recipe": recipe(name)}) for name, fields in content.items()}


METHODS: dict[str, Preset] = _presets()
"""By the name that a study's YAML uses."""


class InstalledText(Settings):
    """Text from installed Python packages, so that nothing has to be downloaded."""

    installed: Count
    """Maximum bytes of each domain; some domains have less."""
    domains: list[Literal["general", "code", "law", "math", "cpp"]] = Field(
        ["general", "code", "law", "math"], min_length=2
    )
    """English, Python, licences, docstrings of mathematics, C++ headers. There is little of ``law``."""
    max_chars: Count = 8000
    """Longer documents are cut, so that the held-out text comes from many documents."""


class TokenBudgets(Settings):
    """Tokens of each phase."""

    seed: Count | None = None
    """Tokens for the seed, if the study trains one."""
    expert: Count
    """Tokens for each expert."""
    mixture: Count
    """Tokens for the reference method and the runs matched to its data; compute-matched runs get its FLOPs."""


class Rates(Settings):
    """Learning rates of the phases: linear warm-up, cosine."""

    peak: Annotated[float, Field(gt=0)]
    """Peak rate of the seed's own training."""
    expert: Annotated[float, Field(gt=0)] = 0.5
    """Peak of the experts, times the seed's. The paper: half."""
    mixture: Annotated[float, Field(gt=0)] = 1.0
    """Peak of the mixtures and of ``dense``, times the seed's. The paper: the same, lower where gradients spiked."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Share of the steps below 1, else a number of steps."""
    final: Share = 0.1
    """The last rate as a share of the peak."""


class Method(Settings):
    """One method. Its name alone is short for ``{method: NAME}``."""

    method: str
    """One of the methods listed below."""
    name: Annotated[FileName, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")] | None = None
    """Required if a method is listed more than once, with different options."""
    label: str | None = None
    """Name in tables and figures."""
    match: list[Match] | None = None
    """``dm``: the reference's tokens in the same order. ``cm``: its training FLOPs."""
    repetitions: Annotated[int, Field(ge=1)] | None = None
    """Run only the first N repetitions; all if not given."""
    recipe: dict[str, Any] = {}
    """Keys of the merge's recipe; they replace the method's own."""
    train: dict[str, Any] = {}
    """Keys of the run that trains it, such as ``freeze``; they replace the study's."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        return {"method": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _known(self) -> Method:
        if self.method not in METHODS:
            near = nearest(self.method, list(METHODS))
            raise ValueError(f"there is no method {self.method!r}{near}; there are {', '.join(METHODS)}")
        _check_keys("recipe", self.recipe, Recipe, without=("seed", "experts"))
        if "stitches" in self.recipe:
            stitched = [name for name, preset in METHODS.items() if "stitches" in preset.recipe]
            if self.method not in stitched:
                raise ValueError(
                    f"recipe.stitches: {self.method} has none: leave it out, or use {' or '.join(stitched)}"
                )
            if self.recipe["stitches"] is None:
                raise ValueError(f"recipe.stitches: {self.method} is made of them: give a number, or leave it out")
        _check_keys("train", self.train, RunConfig, without=(*_OF_THE_STUDY, "lora"))
        return self

    @property
    def title(self) -> str:
        return self.name or self.method

    @property
    def preset(self) -> Preset:
        """What it is an instance of."""
        return METHODS[self.method]

    @property
    def run(self) -> dict[str, Any]:
        """All keys of the run that trains it, the preset's too."""
        return overlaid(self.preset.train, self.train)


_OF_THE_STUDY = (
    *("model", "out", "mix", "data", "held_out", "budget", "sequence_length", "batch_size", "random_seed", "threads"),
    *("evaluation", "logging", "trust_remote_code"),
)
"""Keys of runs that the study decides."""


def _check_keys(where: str, given: dict[str, Any], kind: type[Settings], *, without: Collection[str]) -> None:
    """Keys of recipes and runs that a study may have; what their values may be, ``_check_runs`` knows."""
    known, what = kind.model_fields.keys() - set(without), "recipe" if kind is Recipe else "run"
    for key in given:
        if key not in known:
            beside = f": the study has {key} itself" if key in StudyFile.model_fields else nearest(key, sorted(known))
            raise ValueError(f"{where}.{key}: a {what} here has no such key{beside}")


class Inference(Settings):
    """What each model costs during generation, as in the paper's section 7.3."""

    prompt: Count = 256
    """Tokens of the prompt."""
    new_tokens: Count = 16
    """Tokens to generate."""
    runs: Count = 10
    """Number of runs; the report gives their mean."""


class StudyFile(SettingsFile):
    """A whole study."""

    seed: str | NewModel
    """Folder or Hub id of a dense model, or a new one, which is trained first."""
    data: dict[str, Source] | InstalledText
    """Domains by name, as in a run; or ``{installed: 10M}``."""
    general: str = "general"
    """The seed's own kind of data."""
    general_share: Share = 0.1
    """Its share in each expert's (the paper: 10 %)."""
    experts: list[str] | None = None
    """Domains that get an expert; all but ``general`` if not given."""
    seed_mix: Mix | None = None
    """Shares of the domains in the seed's training; all of ``general`` if not given."""
    mix: Mix = "equal"
    """Shares of the domains in the mixtures' training (the paper: equal)."""
    held_out: HeldOut = HeldOut()
    tokens: TokenBudgets
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Approximate time limit for the whole study, in minutes on this machine's CPUs. ``tokens`` and ``data.installed``
    are then proportions: they are scaled by a forecast when the study begins, and kept after that."""
    learning_rate: Rates
    optimizer: Optimizer = Optimizer()
    sequence_length: int = Field(1024, ge=8)
    """Tokens of a packed sequence, and of the evaluation window."""
    batch_size: int = Field(32, ge=1)
    """Sequences of one optimizer step."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences computed at once; all if not given."""
    recipe: dict[str, Any] = {}
    """Keys of every mixture's recipe; the method's own keys take precedence."""
    train: dict[str, Any] = {}
    """Keys of every run, such as ``precision``."""
    expert_train: dict[str, Any] = {}
    """Keys of the experts' runs, such as ``freeze: [trunk]``, or ``lora: {}`` for adapters; they replace those of
    ``train``."""
    methods: list[Method] = Field(min_length=1)
    """Methods to compare. All their repetitions run first."""
    ablations: list[Method] = []
    """Methods that run after those."""
    reference: str = "btx"
    """The method that the others are compared with, and whose tokens and FLOPs they match."""
    random_seeds: list[Annotated[int, Field(ge=0, lt=2**30)]] = Field([0], min_length=1)
    """One repetition for each: everything that the study trains is trained again. Within a repetition all methods see
    the same data in the same order."""
    routes: list[str] = []
    """Methods whose first trained mixture gets a page that shows the expert of each held-out token."""
    inference: Inference | None = Inference()
    """``null`` skips this measurement."""
    keep: Literal["weights", "results"] = "weights"
    """What to keep of merges and mixtures that no step needs any more. Seeds and experts always stay."""
    at_once: Annotated[int, Field(ge=1)] | None = None
    """Steps to run side by side; as many as there are cores or GPUs if not given."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of a step on CPUs; if not given, its share of this machine's cores, and one on a Ray cluster."""
    retries: int = Field(1, ge=0)
    """How often to restart a failed step."""
    trust_remote_code: bool = False
    """Run code from the seed's checkpoint."""

    @model_validator(mode="after")
    def _makes_sense(self) -> StudyFile:
        self._check_domains()
        self._check_methods()
        if isinstance(self.seed, NewModel) and self.tokens.seed is None:
            raise ValueError("tokens.seed: is missing: a new seed has to be trained")
        if isinstance(self.seed, str) and (self.tokens.seed is not None or self.seed_mix is not None):
            raise ValueError("tokens.seed, seed_mix: the seed is given, it is not trained here: leave them out")
        if len(set(self.random_seeds)) < len(self.random_seeds):
            raise ValueError("random_seeds: one is listed twice, which would be no repetition")
        _check_keys("recipe", self.recipe, Recipe, without=("seed", "experts", "attention", "ffn", "stitches"))
        whole = (*_OF_THE_STUDY, "adapters", "balance", "learning_rate", "optimizer", "micro_batch_size")
        _check_keys("train", self.train, RunConfig, without=(*whole, "freeze", "lora"))
        _check_keys("expert_train", self.expert_train, RunConfig, without=whole)
        self._check_runs()
        if not 0 < self.held_out.share < 1:
            raise ValueError(f"held_out.share: {self.held_out.share:g} leaves no text to measure or none to train on")
        return self

    def _check_domains(self) -> None:
        mixes = {name: list(mix) for name in ("mix", "seed_mix") if isinstance(mix := getattr(self, name), dict)}
        for where, names in {"experts": self.experts or [], "general": [self.general], **mixes}.items():
            for name in names:
                if name not in self.domains:
                    raise ValueError(f"{where}: no domain of data is called {name!r}{nearest(name, self.domains)}")
        if not self.expert_names:
            raise ValueError("experts: there is none: data has no domain but general's")
        for name in self.expert_names:
            if name == SEED or not is_expert_name(name) or "." in name:
                wanted = "use letters, digits, - and _, not 'seed' or 'auto'"
                raise ValueError(f"experts: {name!r} cannot name an expert: {wanted}")

    def _check_methods(self) -> None:
        titles = [method.title for method in self.all_methods]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"methods: {title!r} is listed {titles.count(title)} times: give each a name")
            if title in (*self.expert_names, SEED):
                raise ValueError(f"methods: {title!r} is the name of a dense model here: give the method another")
        if self.reference not in titles:
            raise ValueError(f"reference: no method is called {self.reference!r}{nearest(self.reference, titles)}")
        if self.method(self.reference).preset.kind not in ("mixture", "dense"):
            raise ValueError(f"reference: {self.reference} is not trained, so it has no budget to match")

    def _check_runs(self) -> None:
        """Whether all runs can be settings of ``branchmix train``, before any of them has cost an hour."""
        given = {"model": "seed", "out": "run", "data": {"text": {"files": "text"}}, "budget": {"steps": 1}}
        runs = {"train": {}, "expert_train": self.expert_train}
        runs |= {f"methods: {method.title}: train": method.run for method in self.all_methods}
        for where, own in runs.items():
            try:
                parse(RunConfig, self.run_of({"learning_rate": {"peak": 1.0}}, own) | given, where)
            except RecipeError as error:
                raise ValueError("; ".join(str(error).splitlines())) from None

    @property
    def domains(self) -> list[str]:
        return list(self.data.domains if isinstance(self.data, InstalledText) else self.data)

    @property
    def expert_names(self) -> list[str]:
        """Domains with an expert."""
        return self.experts if self.experts is not None else [name for name in self.domains if name != self.general]

    @property
    def all_methods(self) -> list[Method]:
        return [*self.methods, *self.ablations]

    def method(self, title: str) -> Method:
        return next(method for method in self.all_methods if method.title == title)

    def run_of(self, *layers: dict[str, Any]) -> dict[str, Any]:
        """Keys of a run: what all have in common, and over it, one after the other, what this one has."""
        shared = {**self.train, "sequence_length": self.sequence_length, "batch_size": self.batch_size}
        shared["optimizer"] = self.optimizer.model_dump(mode="json")
        if self.micro_batch_size is not None:
            shared["micro_batch_size"] = self.micro_batch_size
        if self.trust_remote_code:
            shared["trust_remote_code"] = True
        run = overlaid(shared, *layers)
        rate = run.get("learning_rate")
        if isinstance(rate, dict) and "ratio" in rate:  # a method's own, instead of the study's peak
            rate.pop("peak", None)
        return run

    @property
    def precision(self) -> str:
        """``auto``, ``fp32`` or ``bf16``: what runs compute in, and what models are measured in."""
        return str(self.train.get("precision", "auto"))

    @property
    def step_tokens(self) -> int:
        return self.sequence_length * self.batch_size
