"""The YAML files of training: one run (``branchmix train``), and all experts of one seed (``branchmix branch``).

``RunConfig.load(path, overrides)`` for files. The reference page in the docs is generated from the docstrings below.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.folder import EXPERT, is_expert_name
from branchmix.data.config import HeldOut, Source
from branchmix.settings import Count, Settings, SettingsFile, Share


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
    """Train a byte-level BPE tokenizer with this many tokens on the run's own data."""

    @model_validator(mode="after")
    def _one_tokenizer(self) -> NewModel:
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("a new model needs either tokenizer or train_tokenizer")
        return self

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Budget(Settings):
    """When training ends: set exactly one of these."""

    tokens: Count | None = None
    """Tokens trained on."""
    steps: Count | None = None
    """Optimizer steps."""
    flops: Count | None = None
    """Training FLOPs: three times those of the forward pass (``branchmix inspect``), minus the gradients of frozen
    weights; and a forward pass that counts the load ahead (``balance.scope: global_batch``)."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall time of the command. The time of a step is measured at the start, which fixes the number of steps."""
    training_minutes: Annotated[float, Field(gt=0)] | None = None
    """The same, but counted from the first step: without the time to prepare data and model."""

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
    """Decay rates of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    weight_decay: float = Field(0.1, ge=0)
    """Applied to everything except norms and biases."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 turns clipping off."""


class LearningRate(Settings):
    """Linear warm-up to the peak, then cosine to a share of it (BAM section 5)."""

    peak: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate."""
    ratio: Annotated[float, Field(gt=0)] | None = None
    """Instead of ``peak``: the peak as a multiple of the peak in the run that made the model. The paper uses 0.5 for
    experts and 1 for mixtures."""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """Warm-up steps: a share of all steps if below 1, else a number of steps."""
    final: Share = 0.1
    """Final learning rate as a share of the peak."""

    @model_validator(mode="after")
    def _one(self) -> LearningRate:
        if (self.peak is None) == (self.ratio is None):
            raise ValueError("give either peak or ratio")
        return self


class Lora(Settings):
    """PEFT LoRA on a dense model; the result is an adapter folder that ``branchmix upcycle`` takes as an expert."""

    rank: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the update."""
    targets: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the modules to adapt."""


class Checkpoints(Settings):
    """When a run writes checkpoints, from which it can resume."""

    minutes: float = Field(15, gt=0)
    """Minutes between checkpoints."""
    steps: Count | None = None
    """Also write one every this many steps."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints to keep."""


class Evaluation(Settings):
    """Held-out loss by domain while training."""

    steps: Count | None = None
    """Evaluate every this many steps, and always at the end."""
    at_start: bool = True
    """Also evaluate before the first step; for a mixture, this measures the merge itself."""


class Logging(Settings):
    """Metrics during training; all of them are also written to ``metrics.jsonl`` in the output folder."""

    steps: Count = 10
    """Log every this many steps."""
    to: Annotated[list[Literal["tensorboard", "trackio", "wandb"]], BeforeValidator(_listed)] = []
    """Loggers to use, a list or one of them; they must be installed."""
    project: str = "branchmix"
    """Project name for Trackio and W&B."""


class Parallel(Settings):
    """How one run uses many processes (``torchrun`` or ``accelerate launch``). By default, each holds the model."""

    fsdp: bool = False
    """FSDP2: shard parameters, gradients and optimizer."""
    expert_parallel: bool = False
    """Spread FFN experts over the processes."""

    @model_validator(mode="after")
    def _one(self) -> Parallel:
        if self.fsdp and self.expert_parallel:
            raise ValueError("fsdp and expert_parallel cannot be combined: choose one")
        return self


def _named(value: Any) -> Any:
    """Names that are whole numbers, which YAML reads as numbers, as text."""
    if not isinstance(value, dict):
        return value
    return {str(name) if type(name) is int else name: share for name, share in value.items()}


class Balance(Settings):
    """How the load of a mixture's experts is balanced. Applies to FFN routers and to top-k attention routers."""

    scope: Literal["micro_batch", "sequence", "global_batch", "last_batch"] = "micro_batch"
    """Tokens over which the balance loss counts the load. ``micro_batch``: those that a process computes at once.
    ``sequence``: each sequence. ``global_batch``: the whole optimizer step, which lets experts specialise in a domain;
    with several micro-batches a step, a forward pass of all of them counts first, for up to a third more FLOPs.
    ``last_batch``: the optimizer step before, without that pass. With all but ``micro_batch``, and where the loss is
    off, ``micro_batch_size`` and the number of processes do not change the result."""
    target: Annotated[dict[str, Annotated[float, Field(gt=0)]] | None, BeforeValidator(_named)] = None
    """Share of the load that each expert should get, by its name (normalised to sum to 1); equal if not set. A token
    goes to an expert only once, so with top-k no share can be above 1 / k."""
    loss: Annotated[float, Field(ge=0)] | None = None
    """Weight of the balance loss; the mixture's own (``router_aux_loss_coef``) if not set, and 0 with a ``bias``."""
    bias: Literal["sign", "quantile"] | None = None
    """Balance without a loss: experts are chosen by their gate plus a bias, which each step moves and the checkpoint
    keeps. ``sign``: up by ``bias_rate`` for experts with less than their share, down for the others. ``quantile``: to
    where the step's tokens would have given every expert its share."""
    bias_rate: Annotated[float, Field(gt=0)] | None = None
    """How far ``bias: sign`` moves a bias in a step, 0.001 if not set; gates are between 0 and 1."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Balance:
        if self.bias != "sign" and self.bias_rate is not None:
            raise ValueError("bias_rate needs bias: sign")
        if self.bias is not None and self.loss is None and self.scope != "micro_batch":
            raise ValueError("scope: a bias turns the balance loss off, so nothing counts the load over it: give loss")
        if self.loss == 0 and self.scope != "micro_batch":
            raise ValueError("scope: a loss of 0 turns the balance loss off, so nothing counts the load over it")
        if self.target == {}:
            raise ValueError("target: is empty: give every expert a share, or leave it out")
        return self


class _Training(SettingsFile):
    """The settings that a run and the runs of a study share."""

    data: dict[str, Source] = Field(min_length=1)
    """The text of each domain, by the domain's name."""
    sequence_length: int = Field(1024, ge=8)
    """Tokens in a packed sequence. Documents packed together cannot attend to each other."""
    batch_size: int = Field(32, ge=1)
    """Sequences in one optimizer step, over all processes."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences that a process computes at once; its whole share of the batch if not set. This does not change the
    result, except for the routers' own losses, which are computed for each micro-batch unless ``balance`` sets another
    scope or turns them off."""
    held_out: HeldOut = HeldOut()
    budget: Budget
    optimizer: Optimizer = Optimizer()
    learning_rate: LearningRate
    freeze: Annotated[
        list[Literal["experts", "all_but_factors", "all_but_routers", "attention", "embeddings", "trunk"]],
        BeforeValidator(_listed),
    ] = []
    """Parts that are not trained, a list or one of them: ``experts`` (attention and FFN), ``all_but_routers``,
    ``all_but_factors`` (all but the routers and the factors of low-rank experts), ``attention`` (without its routers),
    ``embeddings`` (input and output), ``trunk`` (everything outside attention and FFNs). Experts trained with a frozen
    trunk share it with the seed, so a mixture with its gates forced to one expert is exactly that expert."""
    lora: Lora | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``bf16`` is autocast over fp32 weights; ``auto`` uses it where matrix products are faster in bf16."""
    gradient_checkpointing: bool = False
    """Save memory at the cost of a third more compute."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Also keep an exponential moving average of the weights (and of the biases of ``balance``) with this decay, and
    write it to ``ema/`` at the end."""
    attn_implementation: str | None = None
    """As in transformers; chosen by device and sequence length if not set."""
    experts_implementation: str | None = None
    """``branchmix``, ``grouped_mm``, ``batched_mm`` or ``eager``. ``branchmix`` if not set, which trains like
    ``grouped_mm``."""
    random_seed: int = Field(0, ge=0, lt=2**32)
    """Seed for new weights, dropout and the order of the data."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of a process."""
    checkpoints: Checkpoints = Checkpoints()
    evaluation: Evaluation = Evaluation()
    logging: Logging = Logging()
    parallel: Parallel = Parallel()
    trust_remote_code: bool = False
    """Run code that is included with a model or tokenizer."""

    def _check_mix(self, where: str, mix: dict[str, float] | str | None) -> None:
        if not isinstance(mix, dict):
            return
        for name in mix:
            if name not in self.data:
                raise ValueError(f"{where}: no domain of data is called {name!r}{nearest(name, list(self.data))}")
        if sum(mix.values()) <= 0:
            raise ValueError(f"{where}: all shares are zero, so there is nothing to train on")

    @model_validator(mode="after")
    def _batch_can_be_divided(self) -> _Training:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size is {self.batch_size}, which micro_batch_size {self.micro_batch_size} does not divide"
            )
        return self


Mix = dict[str, Annotated[float, Field(ge=0)]] | Literal["equal", "proportional"]


class RunConfig(_Training):
    """One training run."""

    model: str | NewModel
    """Folder or Hub id of a dense model or mixture, or the settings of a new dense model."""
    out: str
    """Output folder: the model, ``metrics.jsonl``, ``training.json``, and checkpoints until the run is done."""
    mix: Mix = "equal"
    """Each domain's share of the tokens (normalised to sum to 1), ``equal``, or ``proportional`` to the text's size."""
    adapters: Annotated[bool, BeforeValidator(lambda value: True if value == {} else value)] = False
    """BAM Adapters (BTS, arXiv 2502.00075): train only the routers and a d x d matrix after each attention and FFN
    expert, which starts as the identity and is folded into the expert at the end. ``{}`` means ``true``."""
    balance: Balance | None = None
    """How the load of a mixture's experts is balanced; by the balance loss of each micro-batch if not set."""

    @model_validator(mode="after")
    def _makes_sense(self) -> RunConfig:
        self._check_mix("mix", self.mix)
        if self.adapters and (self.freeze or self.lora):
            raise ValueError("adapters already freezes the rest of the model: remove freeze and lora")
        if isinstance(self.model, NewModel) and (self.freeze or self.lora or self.adapters):
            raise ValueError("a new model must be trained as a whole: remove freeze, lora and adapters")
        if isinstance(self.model, NewModel) and self.learning_rate.ratio is not None:
            raise ValueError("learning_rate.ratio: a new model has no earlier run: give peak")
        return self


class Branch(Settings):
    """One expert."""

    domain: str | None = None
    """The domain it is trained on; the one with its own name if not set."""
    mix: Mix | None = None
    """Instead of ``domain``: shares of several domains."""


class BranchConfig(_Training):
    """All experts of one seed. Each is trained in its own run, independently of the others."""

    seed: str
    """Folder or Hub id of the dense model they all start from."""
    out: str
    """Output folder: one folder per expert, and ``recipe.yaml`` for ``branchmix upcycle``."""
    experts: dict[str, Branch | None]
    """Experts by name. ``code:`` alone trains on the domain ``code``."""
    general: str | None = None
    """Domain with text like the seed's own training data, mixed into every expert's data."""
    general_share: Share = 0.1
    """Its share, which keeps experts close to the seed (the paper: 10 % Common Crawl)."""
    at_once: Annotated[int, Field(ge=1)] | None = None
    """How many runs are active at a time on this machine. By default one per GPU or, without GPUs, one per core; they
    share the threads."""
    retries: int = Field(1, ge=0)
    """How often a failed run is restarted, from its last checkpoint."""

    @model_validator(mode="after")
    def _makes_sense(self) -> BranchConfig:
        if not self.experts:
            raise ValueError("experts: give at least one")
        if self.general is not None:
            self._check_mix("general", {self.general: 1.0})
        for name in self.experts:
            if not is_expert_name(name) or name == "seed":
                raise ValueError(f"experts: {name!r} is not a valid name: {EXPERT} or 'seed'")
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
