"""What transformers loads from a folder, without what it would let pass: strangers' code, pickles, missing weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from branchmix.checkpoint.companions import left_over_adapter, refuse_adapter
from branchmix.checkpoint.index import left_over_quantisation, without_quantisation
from branchmix.checkpoint.token_ids import sentencepieces, vocabulary_of
from branchmix.errors import CheckpointError


def load_language_model(
    folder: Path, *, given: str | None = None, trust_remote_code: bool = False, **options: Any
) -> Any:
    """The causal LM of a folder, every weight of it from safetensors.

    Args:
        folder: of the checkpoint.
        given: what the user calls it, for errors; the folder itself if None.
        trust_remote_code: run code that the checkpoint brings along.
        **options: of ``from_pretrained``, such as ``dtype``.

    Raises:
        CheckpointError: it cannot be loaded, or lacks weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_adapter(folder)
    if left_over_quantisation(folder):  # transformers would quantise the weights
        options["config"] = load(AutoConfig, folder, given=given, trust_remote_code=trust_remote_code)
        without_quantisation(vars(options["config"]))
    options |= without_adapter(folder)
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, info = load(AutoModelForCausalLM, folder, given=given, trust_remote_code=trust_remote_code, **options)
    refuse_missing(info, given or str(folder))
    return model


def without_adapter(folder: Path) -> dict[str, Any]:
    """Options of ``from_pretrained`` for a model in whose folder an adapter was left, which it would apply on top: told
    to look for adapters in a folder that is not there, it finds none."""
    return {"adapter_kwargs": {"subfolder": "no adapter"}} if left_over_adapter(folder) else {}


def load_tokenizer(folder: Path, *, given: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder; arguments and errors as for ``load_language_model``."""
    if vocabulary_of(folder) is None:  # from which transformers makes an empty tokenizer for some families
        raise CheckpointError(f"{folder}: has no tokenizer files: copy the seed's tokenizer beside the weights")
    from transformers import AutoTokenizer

    return load(AutoTokenizer, folder, given=given, trust_remote_code=trust_remote_code)


def load(kind: Any, folder: Path, *, given: str | None = None, trust_remote_code: bool = False, **options: Any) -> Any:
    """``kind.from_pretrained``, for one of transformers' Auto classes; its errors become one line.

    ``trust_remote_code`` is always given: left out, transformers asks on the terminal, and runs the code after a "y".
    """
    try:
        return kind.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # whatever transformers and the readers below it raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "tiktoken" in str(error) and _lacks_sentencepiece(folder):
            reason = "its tokenizer.model needs sentencepiece: pip install sentencepiece protobuf"
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = (
                "it brings code of its own: read that code, then allow it with --trust-remote-code (in a run's file: "
                "trust_remote_code: true)"
            )
        raise CheckpointError(f"{given or folder}: transformers cannot load it: {reason}") from error


def _lacks_sentencepiece(folder: Path) -> bool:
    """Whether a folder's tokenizer is a sentencepiece model, and the library is not there: transformers then takes the
    file for another library's."""
    file = vocabulary_of(folder)
    if file is None or file.name != "tokenizer.model" or find_spec("sentencepiece") is not None:
        return False
    return sentencepieces(file.read_bytes()) is not None


def refuse_missing(info: dict[str, Any], given: str) -> None:
    """Refuse a model of which transformers had to draw weights at random, by its ``info`` on loading; raises
    CheckpointError, which names the first of the missing ones."""
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{given}: the weights lack {missing[0]}{more}, which would be random numbers: download or save the model "
            "again"
        )
