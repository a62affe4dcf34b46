"""The YAML files of training: one run (``branchmix train``), and all experts of a study (``branchmix branch``).

``RunConfig.load(path, overrides)`` for files. The reference page in the docs is generated from the docstrings below.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.names import EXPERT, is_expert_name
from branchmix.data.config import HeldOut, Source
from branchmix.errors import RecipeError
from branchmix.settings import Count, Settings, Share, parse, parse_yaml, read_yaml


def _listed(value: Any) -> Any:
    """A word alone is a list of one."""
    return [value] if isinstance(value, str) else value


class NewModel(Settings):
    """A dense model from scratch: ``model_type`` and the config keys of that family."""

    model_config = ConfigDict(extra="allow")

    model_type: str = "cohere"
    """Any family of transformers; Cohere's blocks are parallel, as in the paper."""
    tokenizer: str | None = None
    """Folder or Hub id of a tokenizer; or give ``train_tokenizer``."""
    train_tokenizer: Annotated[int, Field(ge=300)] | None = None
    """Train a byte-level BPE of so many tokens on the run's own data."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> NewModel:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("a new model needs either tokenizer or train_tokenizer")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        """The family's config keys that were given."""
        return dict(self.model_extra or {})


class Budget(Settings):
    """When the run is over: one of these."""

    tokens: Count | None = None
    """Tokens trained on."""
    steps: Count | None = None
    """Optimizer steps."""
    flops: Count | None = None
    """Training FLOPs: three times those of the forward pass (``branchmix inspect``), less the gradients of weights that
    are frozen."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall time of the command; steps are measured at the start, and their number is fixed from then on."""
    training_minutes: Annotated[float, Field(gt=0)] | None = None
    """The same from the first step to the end: data and model are there already."""

    @property
    def is_time(self) -> bool:
        """Whether steps have to be measured to know their number."""
        return self.minutes is not None or self.training_minutes is not None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            *names, last = type(self).model_fields
            raise ValueError(f"give one of {', '.join(names)} and {last}, not {' and '.join(given) or 'none'}")
        return self


class Optimizer(Settings):
    """AdamW, fused where the device has it."""

    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.1, ge=0)
    """Of everything but norms and biases."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this length; 0 never clips."""


class LearningRate(Settings):
    """Linear warm-up to the peak, then cosine to a share of it (BAM section 5)."""

    peak: Annotated[float, Field(gt=0)] | None = None
    """The highest rate."""
    ratio: Annotated[float, Field(gt=0)] | None = None
    """Instead of ``peak``: times the peak that the model's own run had. The paper: 0.5 for experts, 1 for mixtures."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Share of the steps below 1, else a number of steps."""
    final: Share = 0.1
    """The last rate as a share of the peak."""

    @model_validator(mode="after")
    def _one(self) -> LearningRate:
        if (self.peak is None) == (self.ratio is None):
            raise ValueError("give either peak or ratio")
        return self


class Lora(Settings):
    """PEFT LoRA on a dense model; the result is an adapter folder that ``branchmix upcycle`` takes as an expert."""

    rank: int = Field(16, ge=1)
    """Inner width of the two matrices."""
    alpha: float = Field(32, gt=0)
    """Their product counts alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """In front of them."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules."""


class Checkpoints(Settings):
    """Where a run can go on from after it was stopped."""

    minutes: float = Field(15, gt=0)
    """Time between two."""
    steps: Count | None = None
    """Also every so many steps."""
    keep: int = Field(2, ge=1)
    """The newest so many."""


class Evaluation(Settings):
    """Held-out loss by domain while training."""

    steps: Count | None = None
    """Every so many steps. Always at the end."""
    at_start: bool = True
    """Before the first step too: for a mixture, the merge itself."""


class Logging(Settings):
    """Numbers while training; all of them also go to ``metrics.jsonl`` in the output folder."""

    steps: Count = 10
    """Every so many steps."""
    to: Annotated[list[Literal["tensorboard", "trackio", "wandb"]], BeforeValidator(_listed)] = []
    """Loggers, which have to be installed."""
    project: str = "branchmix"
    """For Trackio and W&B."""


class Parallel(Settings):
    """How one run uses many processes (``torchrun`` or ``accelerate launch``); without these, each holds the model."""

    fsdp: bool = False
    """FSDP2: parameters, gradients and optimizer are sharded."""
    expert_parallel: bool = False
    """FFN experts are spread over the processes."""

    @model_validator(mode="after")
    def _one(self) -> Parallel:
        if self.fsdp and self.expert_parallel:
            raise ValueError("fsdp and expert_parallel exclude each other in one run: choose one")
        return self


class _Training(Settings):
    """What a run and the runs of a study have in common."""

    data: dict[str, Source] = Field(min_length=1)
    """Domains by name."""
    sequence_length: int = Field(1024, ge=8)
    """Tokens of a packed sequence; documents in it do not see each other."""
    batch_size: int = Field(32, ge=1)
    """Sequences of one optimizer step, all processes together."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences that a process computes at once; all of its share if not given. The result does not depend on it, but
    for the routers' own losses, which look at one micro-batch at a time."""
    held_out: HeldOut = HeldOut()
    budget: Budget
    optimizer: Optimizer = Optimizer()
    learning_rate: LearningRate
    freeze: Annotated[
        list[Literal["experts", "all_but_routers", "attention", "embeddings"]], BeforeValidator(_listed)
    ] = []
    """Parts that are not trained: ``experts`` (attention and FFN), ``all_but_routers``, ``attention`` (all of it, but
    routers), ``embeddings`` (both)."""
    lora: Lora | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``bf16`` is autocast over fp32 weights; ``auto`` takes it where matrix products are faster in it."""
    gradient_checkpointing: bool = False
    """Less memory for a third more compute."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Also keep an exponential moving average of the weights with this decay, and write it to ``ema/`` at the end."""
    attn_implementation: str | None = None
    """transformers' name; chosen by device and length if not given."""
    experts_implementation: str | None = None
    """``branchmix``, ``grouped_mm``, ``batched_mm`` or ``eager``; the first if not given, which trains as
    ``grouped_mm``."""
    random_seed: int = Field(0, ge=0, lt=2**32)
    """Of new weights, of dropout, and of the order of the data."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Of a CPU process."""
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    parallel: Parallel = Parallel()
    trust_remote_code: bool = False
    """Run code that a model or tokenizer brings along."""

    _folder: Path = Path()

    @property
    def folder(self) -> Path:
        """Folder that relative paths start from: that of the YAML file."""
        return self._folder

    def _check_mix(self, where: str, mix: dict[str, float] | str | None) -> None:
        if not isinstance(mix, dict):
            return
        for name in mix:
            if name not in self.data:
                raise ValueError(f"{where}: no domain of data is called {name!r}{nearest(name, list(self.data))}")
        if sum(mix.values()) <= 0:
            raise ValueError(f"{where}: all shares are zero, so there is nothing to train on")

    def _check_batch(self) -> None:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, which micro_batch_size {self.micro_batch_size} does not divide"
            )


Mix = dict[str, Annotated[float, Field(ge=0)]] | Literal["equal", "proportional"]


class RunConfig(_Training):
    """One training run."""

    model: str | NewModel
    """Folder or Hub id of a dense model or a mixture, or a new dense model."""
    out: str
    """Folder of the result: the model, ``metrics.jsonl``, ``training.json``, and checkpoints until it is done."""
    mix: Mix = "equal"
    """Share of each domain in the tokens (divided by their sum); ``equal``, or ``proportional`` to what there is."""
    adapters: Annotated[bool, BeforeValidator(lambda value: True if value == {} else value)] = False
    """BAM Adapters (BTS, arXiv 2502.00075): everything is frozen but the routers and a d x d linear after each
    attention and FFN expert, which starts as the identity and is folded into the expert at the end.
    ``{}`` is ``true``: there is nothing to choose."""

    @model_validator(mode="after")
    def _makes_sense(self) -> RunConfig:
        self._check_mix("mix", self.mix)
        self._check_batch()
        if self.adapters and (self.freeze or self.lora):
            raise ValueError("adapters freezes everything itself: remove freeze and lora")
        if isinstance(self.model, NewModel) and (self.freeze or self.lora or self.adapters):
            raise ValueError("a new model has nothing worth freezing: remove freeze, lora and adapters")
        if isinstance(self.model, NewModel) and self.learning_rate.ratio is not None:
            raise ValueError("learning_rate.ratio: a new model has no earlier run: give peak")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> RunConfig:
        """Read a run file; ``overrides`` are ``key=value`` with dots (``budget.tokens=2M``), values as YAML.

        Raises:
            RecipeError: it is missing, no YAML, or does not make sense; all problems at once.
        """
        return _load(cls, Path(path), overrides or [])


class Branch(Settings):
    """One expert of a study."""

    domain: str | None = None
    """The domain it is trained on; its own name if not given."""
    mix: Mix | None = None
    """Instead of ``domain``: shares of several."""


class BranchConfig(_Training):
    """All experts of a study: each its own run from the same seed, independent of the others."""

    seed: str
    """Folder or Hub id of the dense model they all start from."""
    out: str
    """Folder that gets one folder for each expert, and ``recipe.yaml`` for ``branchmix upcycle``."""
    experts: dict[str, Branch | None]
    """Experts by name. ``code:`` alone trains on the domain ``code``."""
    general: str | None = None
    """The seed's own kind of data, mixed in everywhere."""
    general_share: Share = 0.1
    """Its share (the paper: 10 % Common Crawl), which keeps experts near the seed."""
    at_once: Annotated[int, Field(ge=1)] | None = None
    """Runs side by side on this machine; on CPUs as many as there are cores, each with its share of the threads, on
    GPUs one for each."""
    retries: int = Field(1, ge=0)
    """How often a run that failed is started again, from its last checkpoint."""

    @model_validator(mode="after")
    def _makes_sense(self) -> BranchConfig:
        self._check_batch()
        if not self.experts:
            raise ValueError("experts: there is none")
        if self.general is not None and self.general not in self.data:
            raise ValueError(
                f"general: no domain of data is called {self.general!r}{nearest(self.general, list(self.data))}"
            )
        for name in self.experts:
            if not is_expert_name(name) or name == "seed":
                raise ValueError(f"experts: {name!r} is no name for an expert: {EXPERT}, and not 'seed'")
            self._check_mix(f"experts.{name}", self.mix_of(name))
        return self

    def mix_of(self, expert: str) -> Mix:
        """Shares of the domains that an expert is trained on."""
        branch = self.experts[expert] or Branch()
        if branch.mix is not None:
            return branch.mix
        domain = branch.domain or expert
        if self.general is None or domain == self.general:
            return {domain: 1.0}
        return {domain: 1.0 - self.general_share, self.general: self.general_share}

    def run_of(self, expert: str) -> RunConfig:
        """The run of one expert, to be started with ``branchmix train``."""
        shared = {name: getattr(self, name) for name in self.model_fields_set if name in RunConfig.model_fields}
        out = str(Path(self.out) / expert)
        run = RunConfig(**{**shared, "model": self.seed, "out": out, "mix": self.mix_of(expert)})
        run._folder = self._folder
        return run

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> BranchConfig:
        """As ``RunConfig.load``."""
        return _load(cls, Path(path), overrides or [])


def _load(kind: type[Any], path: Path, overrides: list[str]) -> Any:
    data = read_yaml(path)
    for words in overrides:
        apply_override(data, words)
    config = parse(kind, data, str(path))
    config._folder = path.parent
    return config


def apply_override(data: Any, words: str) -> None:
    """Change ``data``, what a YAML file says, by one ``key=value``; dots lead into mappings.

    Raises:
        RecipeError: it is no such thing, or there is no place for it.
    """
    keys, equals, value = words.partition("=")
    if not equals or not keys:
        raise RecipeError(f"{words}: is no key=value, such as budget.tokens=2M")
    *parents, last = keys.split(".")
    place = data
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise RecipeError(f"{words}: there is no place for it in the file: {'.'.join(parents)} is no mapping")
    place[last] = parse_yaml(value, words)
