"""Loads or creates the model that a run trains, and chooses device, precision and kernels.

Weights are fp32 in whatever dtype they are stored; bf16 is autocast over them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from branchmix.checkpoint.companions import refuse_adapter, tokenizer_files
from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.checkpoint.json_text import read_json
from branchmix.errors import CheckpointError, RecipeError
from branchmix.likelihood.loading import load_language_model, load_tokenizer
from branchmix.train.config import NewModel, RunConfig
from branchmix.train.sharding import loading_options, shard_new

if TYPE_CHECKING:
    import torch

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

    def autocast(self) -> Any:
        """The context to run a forward pass in."""
        import torch

        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def computing_of(config: RunConfig, device: torch.device) -> Computing:
    """Choose the precision if the run leaves it open.

    Raises:
        RecipeError: bf16 was asked for on a device that has none.
    """
    import torch

    from branchmix.models.chunked_branchmix import faster_in_bf16

    if config.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RecipeError("precision: this GPU does not compute in bf16: give fp32")
    bf16 = faster_in_bf16(device) if config.precision == "auto" else config.precision == "bf16"
    return Computing(device, bf16)


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
    source = require_model_type(resolved)
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


def save_memory(model: Any) -> None:
    """Recompute activations in the backward pass instead of storing them."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


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
    known = _config_keys(kind)
    for key in new.fields:
        if key not in known:
            raise RecipeError(f"model.{key}: {new.model_type} has no such config key{nearest(key, sorted(known))}")
        if key in ("vocab_size", *SPECIAL):
            raise RecipeError(f"model.{key}: comes from the tokenizer: remove it")
    try:
        return kind(vocab_size=vocab_size, **(special or dict.fromkeys(SPECIAL)), **new.fields)
    except Exception as error:  # each family and its validators have their own kinds
        raise RecipeError(f"model: no {new.model_type} of these keys: {_cause(error)}") from error


def _config_keys(kind: Any) -> set[str]:
    """Config keys of a family, without those that do not describe a model."""
    import inspect

    names = {name for cls in kind.__mro__ for name in inspect.signature(cls.__init__).parameters}
    return (names | set(kind.attribute_map)) - {"self", "args", "kwargs", "transformers_version", "architectures"}


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


def tokenizer_for(
    new: NewModel, resolved: ResolvedModel | None, documents: Callable[[], dict[str, Iterator[str]]], config: RunConfig
) -> Any:
    """The tokenizer of a new model: that of a folder, or trained on equal amounts of text from every domain."""
    if resolved is not None:
        return training_tokenizer(resolved, trust_remote_code=config.trust_remote_code)
    from branchmix.data.tokenizer import train_tokenizer

    assert new.train_tokenizer is not None
    return train_tokenizer(equal_text(documents()), new.train_tokenizer)


TOKENIZER_CHARACTERS = 20_000_000
"""Maximum amount of text to train a tokenizer on; more text changes few merges."""


def equal_text(documents: dict[str, Iterator[str]], characters: int = TOKENIZER_CHARACTERS) -> Iterator[str]:
    """Documents of all domains, always from the domain with the least text so far; exhausted domains are skipped."""
    taken = dict.fromkeys(documents, 0)
    left = characters
    while taken and left > 0:
        name = min(taken, key=lambda domain: taken[domain])
        text = next(documents[name], None)
        if text is None:
            del taken[name]
            continue
        taken[name] += len(text)
        left -= len(text)
        yield text


def require_model_type(resolved: ResolvedModel) -> dict[str, Any]:
    """Content of a folder's config.json, read before anything large is loaded.

    Raises:
        CheckpointError: it is missing, or does not describe a model.
    """
    refuse_adapter(resolved.folder)
    file = Path(resolved.folder) / "config.json"
    try:
        content = read_json(file)
    except FileNotFoundError:
        raise CheckpointError(f"{resolved.given}: no config.json in {resolved.folder}: give a model's folder") from None
    except (OSError, ValueError):
        raise CheckpointError(f"{file}: cannot be read as JSON: give a model's folder") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise CheckpointError(f"{file}: no model_type in it: give a transformers model's folder")
    return content


class TokenizerFiles:
    """The tokenizer's files, saved unchanged with checkpoints if there are any.

    ``Trainer`` is not given the tokenizer itself, because it would write the tokenizer's special tokens into the config
    of a model that may have different ones, or several.
    """

    def __init__(self, tokenizer: Any, source: ResolvedModel | None):
        self.tokenizer = tokenizer
        self.files = {name: source.folder / name for name in tokenizer_files(source.folder)} if source else {}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files into ``folder``."""
        if not self.files:
            self.tokenizer.save_pretrained(folder)
        for name, file in self.files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, Path(folder) / name)
