"""What a dense checkpoint folder holds, read from its headers alone: no weights, no torch.

``CheckpointIndex.open(folder)`` parses config.json and the headers of model.safetensors or of its shards, and refuses
in one line whatever the writer could not copy faithfully: pickles, quantised weights, truncated or overlapping data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from branchmix.checkpoint.companions import ADAPTER_WEIGHTS, adapter_message, left_over_adapter, refuse_adapter
from branchmix.checkpoint.families import model_type_of
from branchmix.checkpoint.folder import is_entry
from branchmix.checkpoint.hub import is_there
from branchmix.checkpoint.json_text import read_json
from branchmix.checkpoint.rotary import with_current_names
from branchmix.errors import BranchMixError, CheckpointError, short

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of one element, by safetensors code."""

DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
DTYPE_ALIASES |= {"fp64": "float64", "double": "float64", "fp8": "float8_e4m3fn"}
"""Other names of dtypes, with those that torch has."""


def dtype_name(given: str) -> str:
    """A dtype as torch spells it, such as ``bfloat16`` for ``bf16``; other words in lower case."""
    name = given.removeprefix("torch.").lower()
    return DTYPE_ALIASES.get(name, name)


def float32_bytes(nbytes: int, dtype: str) -> int:
    """Bytes in fp32 of a tensor that is stored in ``nbytes`` bytes of ``dtype``, a safetensors code."""
    return nbytes * DTYPE_BITS["F32"] // DTYPE_BITS[dtype]


_QUANTISED_SUFFIXES = {
    "GPTQ or AWQ": (".qweight", ".qzeros", ".scales"),
    "bitsandbytes int8": (".SCB", ".weight_format"),
    "bitsandbytes 4-bit": (".absmax", ".quant_map"),
    "compressed-tensors or FP8": (".weight_scale",),
    "FP8": (".weight_scale_inv", ".input_scale"),
    "compressed-tensors": (".weight_packed", ".weight_zero_point"),
    "MXFP4": (".weight_blocks", ".weight_scales"),
}
_STORED_QUANTISED = frozenset("bitsandbytes gptq awq compressed-tensors fp8 fbgemm_fp8 mxfp4".split())
"""Methods whose tensors show that they were quantised; others quantise 16-bit weights as they compute."""
_QUANTISATION = ("quantization_config", "compression_config")
"""Keys of config.json that name one."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_QUANTISED_DTYPES = {"I8", "U8"} | {code for code in DTYPE_BITS if code.startswith(("F8_", "F6_", "F4"))}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one stored tensor lies."""

    name: str
    dtype: str
    """safetensors code: "BF16", "F16", "F32", "I64" ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Absolute byte offset in the file."""
    nbytes: int


@dataclass(frozen=True)
class CheckpointIndex:
    """All tensors of a checkpoint folder, by name, and its config.

    Example:
        >>> index = CheckpointIndex.open("experts/code")
        >>> index.tensors["model.norm.weight"].shape
        (2048,)
    """

    folder: Path
    config: dict[str, Any]
    """Parsed config.json."""
    tensors: dict[str, TensorRef]
    """The tensors of all shards, in file order."""
    files: tuple[Path, ...]
    """The weight files."""
    notes: tuple[str, ...] = ()
    """For the user: what is ignored in the folder."""

    @classmethod
    def open(cls, folder: str | Path) -> CheckpointIndex:
        """Reads the config and all headers of ``folder``; raises CheckpointError with what to do about a problem."""
        folder = Path(folder)
        require_folder(folder)
        config = read_config(folder)
        if not any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
            _refuse_quantised_config(folder, config, but=())  # whose weights have names of their own
        shards, shard_of = _find_shards(folder)
        tensors: dict[str, TensorRef] = {}
        for file in shards:
            for ref in read_header(file):
                first = tensors.get(ref.name)
                if first is not None:
                    raise CheckpointError(
                        f"{folder}: tensor {ref.name} is stored twice, in {first.file.name} and in {file.name}: "
                        "remove the shard that does not belong to this checkpoint"
                    )
                tensors[ref.name] = ref
        if not tensors:
            raise CheckpointError(f"{folder}: the weights hold no tensors: save or download the checkpoint again")
        for name, shard in shard_of.items():
            if name not in tensors or tensors[name].file.name != shard:
                raise CheckpointError(
                    f"{folder / INDEX_FILE}: says that tensor {name} is in {shard}, which lacks it: "
                    "download or save the checkpoint again"
                )
        _refuse_quantised_tensors(folder, tensors)
        notes = [left_over_adapter(folder), _refuse_quantised_config(folder, config, but=_STORED_QUANTISED)]
        return cls(folder, config, tensors, tuple(shards), tuple(note for note in notes if note is not None))


def read_header(file: Path) -> list[TensorRef]:
    """The tensors of one safetensors file, in the order of their data.

    Raises CheckpointError if the file is truncated or not a safetensors file, or its header contradicts itself.
    """
    from safetensors import SafetensorError, safe_open  # here, as it brings numpy along

    try:
        size = file.stat().st_size
        with safe_open(file, framework="np") as stored:  # checks that tensors cover the file without gaps or overlaps
            parts = {name: stored.get_slice(name) for name in stored.offset_keys()}
            described = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()]
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        with file.open("rb") as stream:
            refuse_lfs_pointer(file, stream.read(64))
        raise CheckpointError(
            f"{file}: truncated or not a safetensors file ({size:,} bytes; {error}): download or save it again"
        ) from error
    if unknown := [dtype for _, dtype, _ in described if dtype not in DTYPE_BITS]:  # of a newer library
        raise CheckpointError(f"{file}: has the unknown dtype {unknown[0]}: save it in bfloat16, float16 or float32")
    sizes = [math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in described]
    offsets = accumulate(sizes, initial=size - sum(sizes))
    return [
        TensorRef(*one, file, offset, nbytes) for one, offset, nbytes in zip(described, offsets, sizes, strict=False)
    ]


def _find_shards(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files, and the file name of each tensor according to the index, if there is one.

    A single file takes precedence over an index, as in transformers.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE], {}
    file = folder / INDEX_FILE
    if not file.is_file():
        raise CheckpointError(_why_no_weights(folder))
    weight_map = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{file}: has no weight_map of tensor names to files: download or save it again")
    for shard in weight_map.values():
        if not is_entry(shard):
            raise CheckpointError(
                f"{file}: names the shard {short(shard)}, which is not a file name in this folder: download or save "
                "the checkpoint again"
            )
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in shards if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder}: shard {missing[0]}{more} is missing ({len(shards)} are named in {INDEX_FILE}): "
            "finish the download, or copy it here"
        )
    return shards, weight_map


def require_folder(folder: Path) -> None:
    """Raises CheckpointError for what is not a folder, with what it is instead."""
    if is_there(folder) and folder.is_dir():
        return
    if is_there(folder):
        pickle = "a pickle, which is never loaded: give a folder with safetensors weights"
        kinds = {
            ".gguf": "a GGUF file: give the folder of the original transformers checkpoint",
            ".safetensors": "a single weight file: give the folder that holds it and its config.json",
            **dict.fromkeys(_PICKLES, pickle),
        }
        kind = kinds.get(folder.suffix, "a file: give a checkpoint folder (config.json and safetensors weights)")
        raise CheckpointError(f"{folder}: is {kind}")
    raise CheckpointError(f"{folder}: no such folder: check the path")


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model's folder; raises CheckpointError if it is an adapter's, or its config names no family."""
    refuse_adapter(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: no config.json: not a transformers checkpoint, or an unfinished download")
    config = read_json_object(file)
    model_type_of(config, file)
    return with_current_names(config)


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object that a checkpoint's file holds; raises CheckpointError with what is wrong and what to do."""
    try:
        value = read_json(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        with file.open("rb") as stream:
            refuse_lfs_pointer(file, stream.read(64))
        if not file.stat().st_size:
            raise CheckpointError(f"{file}: is empty: download or save it again") from error
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else f" ({error})"
        raise CheckpointError(f"{file}: is not valid JSON{where}: download or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: is not a JSON object: download or save it again")
    return value


def refuse_lfs_pointer(file: Path, start: bytes, kind: type[BranchMixError] = CheckpointError) -> None:
    """Raises ``kind`` for a file that Git put there in another's place, by its first bytes."""
    if start.startswith(b"version https://git-lfs"):
        raise kind(f"{file}: is a Git LFS pointer, not the file itself: run `git lfs pull` in that folder")


def _why_no_weights(folder: Path) -> str:
    """The one line for a folder without model.safetensors and without its index."""
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        return f"{folder}: cannot be read: {error.strerror}"

    def ending(*suffixes: str) -> list[str]:
        return [name for name in names if name.endswith(suffixes)]

    convert = (
        'convert them with python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
    )
    safetensors = ending(".safetensors")
    if safetensors == [ADAPTER_WEIGHTS]:
        return adapter_message(folder)
    if any(name.startswith("model-") for name in safetensors):
        return (
            f"{folder}: {INDEX_FILE} is missing beside {len(safetensors)} shards ({safetensors[0]} ...): "
            "copy or download it too"
        )
    if safetensors:
        return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}; found {_some(safetensors)}: {convert}"
    of_a_trainer = ("training_args.bin", "optimizer.pt", "scheduler.pt")
    if pickles := [name for name in ending(*_PICKLES) if name not in of_a_trainer]:
        return f"{folder}: only pickled weights ({_some(pickles)}); pickles are never loaded: {convert}"
    if gguf := ending(".gguf"):
        return f"{folder}: only GGUF weights ({_some(gguf)}): give the folder of the original transformers checkpoint"
    return f"{folder}: no weights (no {SINGLE_FILE}, no {INDEX_FILE}): finish the download, or check the path"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _refuse_quantised_config(folder: Path, config: dict[str, Any], *, but: Collection[str]) -> str | None:
    """Removes the quantisation that merged QLoRA models have in their config, and returns a note on it.

    Raises CheckpointError for a method not in ``but``, those whose weights would show that they are quantised.
    """
    quantisation = _quantisation(config)
    if not quantisation:
        return None
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method not in but:
        raise CheckpointError(_quantised(folder, f"{method or 'unnamed method'}, says config.json"))
    without_quantisation(config)
    return (
        f"{folder}: config.json says {method}, but the weights are not quantised: its quantization_config is left out"
    )


def left_over_quantisation(folder: Path) -> str | None:
    """A note on a folder whose config names a quantisation that its weights do not have."""
    try:
        if not _quantisation(read_config(folder)):
            return None
        notes = CheckpointIndex.open(folder).notes
    except CheckpointError:  # quantised indeed, or damaged, which loading the weights will report
        return None
    return next((note for note in notes if note != left_over_adapter(folder)), None)


def without_quantisation(config: Any) -> None:
    """Take the entry of a quantisation out of a config.json, or out of the attributes of transformers' config."""
    for key in _QUANTISATION:
        config.pop(key, None)


def _quantisation(config: dict[str, Any]) -> Any:
    return next((config[key] for key in _QUANTISATION if config.get(key)), None)


def _refuse_quantised_tensors(folder: Path, tensors: dict[str, TensorRef]) -> None:
    for ref in tensors.values():
        method = next((method for method, ends in _QUANTISED_SUFFIXES.items() if ref.name.endswith(ends)), None)
        if method is not None:
            raise CheckpointError(_quantised(folder, f"{method}, tensor {ref.name}"))
        # GPT-NeoX checkpoints carry their causal mask as a U8 buffer called bias.
        if ref.dtype in _QUANTISED_DTYPES and not (ref.dtype == "U8" and ref.name.endswith(".bias")):
            raise CheckpointError(_quantised(folder, f"tensor {ref.name} is {ref.dtype}"))


def _quantised(folder: Path, what: str) -> str:
    return f"{folder}: is quantised ({what}): dequantise it first, or give the original bfloat16/float16 checkpoint"
