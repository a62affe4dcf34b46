"""Loads or creates the model that a run trains, and chooses device, precision and kernels.

Weights are fp32 in whatever dtype they are stored; bf16 is autocast over them.
"""

from __future__ import annotations

import gc
import inspect
import os
import shutil
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from branchmix.checkpoint.companions import tokenizer_files
from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.folder import libc, writing
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.index import read_config
from branchmix.errors import CheckpointError, RecipeError
from branchmix.likelihood.loading import load_language_model, load_tokenizer
from branchmix.train.config import NewModel, RunConfig
from branchmix.train.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
EAGER_LENGTH = 512
"""Up to this many tokens, a dense model's eager attention trains faster than sdpa in bf16 on CPUs: 2.6 times at 128
tokens with AMX.

A mixture chooses its own kernel (``chunked_branchmix``), which is 1.3 to 1.9 times faster than eager.
"""


@dataclass(frozen=True)
class Computing:
    """Device and precision of a run."""

    device: torch.device
    bf16: bool

    @classmethod
    def of(cls, precision: str, device: torch.device | None = None) -> Computing:
        """Choose the precision if it is ``auto``, on a device or this machine's CPUs.

        Raises:
            RecipeError: bf16 on a device that has none.
        """
        import torch

        from branchmix.models.chunked_branchmix import faster_in_bf16

        device = device or torch.device("cpu")
        if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise RecipeError("precision: this GPU does not compute in bf16: give fp32")
        return cls(device, faster_in_bf16(device) if precision == "auto" else precision == "bf16")

    def autocast(self) -> Any:
        import torch

        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def attention_options(model_type: str, computing: Computing, length: int, given: str | None = None) -> dict[str, str]:
    """``attn_implementation`` for loading a model to train, as a keyword argument; none if the model is to choose.

    ``length`` is the number of tokens in a sequence; what the user has ``given`` takes precedence.
    """
    if given is not None:
        return {"attn_implementation": given}
    slow = computing.device.type == "cpu" and computing.bf16 and length <= EAGER_LENGTH
    return {"attn_implementation": "eager"} if slow and model_type != "branchmix" else {}


def load_model(resolved: ResolvedModel, config: RunConfig, computing: Computing) -> tuple[Any, Any]:
    """Load the model of a folder in fp32, and its tokenizer.

    Raises:
        CheckpointError: it is not a causal LM, lacks weights or a tokenizer, or needs code that was not allowed.
    """
    import torch

    tokenizer = training_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
    source = read_config(resolved.folder)
    options: dict[str, Any] = {"given": resolved.given, "trust_remote_code": config.trust_remote_code}
    options |= attention_options(source["model_type"], computing, config.sequence_length, config.attn_implementation)
    if config.experts_implementation is not None:
        options["experts_implementation"] = config.experts_implementation
    options |= loading_options(config, source)
    model = load_language_model(resolved.folder, dtype=torch.float32, **options)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise CheckpointError(
            f"{resolved.given}: the tokenizer has {len(tokenizer):,} tokens, but the model only "
            f"{model.get_input_embeddings().num_embeddings:,} embeddings: give the folder its own tokenizer"
        )
    return model, tokenizer


def training_tokenizer(resolved: ResolvedModel, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder, with an end-of-text token to put between documents.

    Raises:
        CheckpointError: there is none, or it has no such token.
    """
    tokenizer = load_tokenizer(resolved.folder, given=resolved.given, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise CheckpointError(f"{resolved.given}: the tokenizer has no end-of-text token: set eos_token in its config")
    return tokenizer


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the next step, instead of returning it to the kernel.

    By default, glibc maps each block over 32 MB and unmaps it when it is freed, so every step would page in, and zero,
    the same gigabytes of gradients again: half the time of a bf16 step of 8 experts with 512 tokens. From this call on,
    the process keeps its peak memory.

    Returns:
        Whether it was done: only glibc has the switch.
    """
    mallopt = libc("mallopt")
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def new_config(new: NewModel, vocab_size: int, special: dict[str, int | None] | None = None) -> Any:
    """The transformers config of a new model, with a tokenizer's size and ids of special tokens, if it is known yet.

    Raises:
        RecipeError: an unknown family or config key, or invalid values.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    families = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if new.model_type not in families or new.model_type not in CONFIG_MAPPING or new.model_type == "branchmix":
        advice = "a mixture is made with branchmix upcycle" if new.model_type == "branchmix" else "see transformers"
        raise RecipeError(
            f"model.model_type: {new.model_type!r} is not a family of dense language models"
            f"{nearest(new.model_type, families)}: {advice}"
        )
    kind = CONFIG_MAPPING[new.model_type]
    known = {name for cls in kind.__mro__ for name in inspect.signature(cls.__init__).parameters}
    known = (known | set(kind.attribute_map)) - {"self", "args", "kwargs", "transformers_version", "architectures"}
    for key in new.fields:
        if key not in known:
            raise RecipeError(f"model.{key}: {new.model_type} has no such config key{nearest(key, sorted(known))}")
        if key in ("vocab_size", *SPECIAL):
            raise RecipeError(f"model.{key}: comes from the tokenizer: remove it")
    try:
        return kind(vocab_size=vocab_size, **(special or dict.fromkeys(SPECIAL)), **new.fields)
    except Exception as error:  # each family and its validators have their own kinds
        raise RecipeError(f"model: no {new.model_type} of these keys: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def make_model(new: NewModel, tokenizer: Any, config: RunConfig, computing: Computing) -> Any:
    """Create a model with the family's own random initialisation, seeded with ``random_seed``."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    fields = new_config(new, len(tokenizer), {name: getattr(tokenizer, name) for name in SPECIAL})
    options = attention_options(new.model_type, computing, config.sequence_length, config.attn_implementation)
    set_seed(config.random_seed)
    try:
        model = AutoModelForCausalLM.from_config(fields, **options)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 2, dtype=torch.long))
    except Exception as error:  # families refuse wrong sizes in different ways, some only in the forward pass
        raise RecipeError(f"model: no {new.model_type} of these keys: {_cause(error)}") from error
    return shard_new(model.train().to(computing.device), config)


class TokenizerFiles:
    """The tokenizer's files, saved unchanged with checkpoints if there are any.

    ``Trainer`` is not given the tokenizer itself, because it would write the tokenizer's special tokens into the config
    of a model that may have different ones, or several.
    """

    def __init__(self, tokenizer: Any, source: ResolvedModel | None):
        self.tokenizer = tokenizer
        self.files = {name: source.folder / name for name in tokenizer_files(source.folder)} if source else {}

    def save_pretrained(self, folder: str | Path) -> None:
        if not self.files:
            self.tokenizer.save_pretrained(folder)
        for name, file in self.files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, Path(folder) / name)


# ---- One run on many processes ----
#
# By default, every process holds the whole model (DDP). With ``fsdp`` (FSDP2) a process reads and keeps its share of
# every weight. With ``expert_parallel`` it keeps some of the FFN experts whole, tokens travel to their experts and
# back, and all other weights are sharded as in FSDP2. Both are implemented by transformers. (accelerate's FSDP2
# silently becomes DDP on CPUs, so it could not be tested without GPUs.) A single process ignores these settings, and
# can resume such a run.


def loading_options(config: RunConfig, described: dict[str, Any]) -> dict[str, Any]:
    """Options for ``from_pretrained`` that make a process read only its part."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes == 1 or not (config.parallel.fsdp or config.parallel.expert_parallel):
        return {}
    from transformers.distributed import DistributedConfig

    # Experts are spread over groups of so many processes, each of which together holds all of them.
    spread = gcd(described["num_experts"], num_processes) if config.parallel.expert_parallel else 1
    return {"distributed_config": DistributedConfig(fsdp_size=num_processes, ep_size=spread)}


def shard_new(model: Any, config: RunConfig) -> Any:
    """Shard a new model, whose weights are the same on every process, by saving it next to OUT and loading it sharded.

    Sharding it in memory would untie tied embeddings.
    """
    options = loading_options(config, {})
    if not options:
        return model
    from accelerate import PartialState

    process = PartialState()
    out = RunFolder(config).path
    folder = out.with_name(f".{out.name}.new")
    if process.is_main_process:
        with writing(folder):
            model.save_pretrained(folder)
    process.wait_for_everyone()
    options["attn_implementation"] = model.config._attn_implementation
    sharded = type(model).from_pretrained(folder, dtype=model.dtype, **options)
    process.wait_for_everyone()
    if process.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    return sharded.train()


def reshard(model: Any) -> None:
    """Shard weights again that a forward pass without a backward pass left gathered.

    FSDP2 keeps the root's weights gathered after a forward pass, because the backward pass needs them first. An
    optimizer that is created then, or whose state is read by parameter names, would see the gathered tensors.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def leave_group() -> None:
    """Wait for all processes of a run, then destroy the process group.

    A model that outlives its group, or a process whose peers are gone, sometimes aborts in gloo's threads.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        gc.collect()
        distributed.barrier()
        distributed.destroy_process_group()
