"""Tiny siblings in a folder of a test's own, and the edits that make bad inputs of them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import branchmix
from families import BY_NAME

Edit = Callable[["Inputs"], object]
WEIGHTS = "model.safetensors"
GATE, NORM = "model.layers.1.mlp.gate_proj.weight", "model.norm.weight"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
Q = "model.layers.0.self_attn.q_proj.weight"


@dataclass
class Inputs:
    """Three siblings, a recipe and a place for the output, all below one folder of the test."""

    root: Path
    family: str = "llama"
    recipe: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    """The recipe's text, where it is no mapping of keys to values."""

    def __post_init__(self) -> None:
        self.models = self.root / "models"
        self.seed, self.code, self.math = (self.models / name for name in ("seed", "code", "math"))
        self.out = self.root / "outputs" / "mixture"

    def write_recipe(self) -> Path:
        experts = [{"name": name, "model": f"models/{name}"} for name in ("code", "math")]
        recipe = {"seed": "models/seed", "experts": experts, **self.recipe}
        file = self.root / "recipe.yaml"
        if self.text is not None or not file.exists():
            file.write_text(yaml.safe_dump(recipe) if self.text is None else self.text)
        return file

    def mixture(self, **recipe: Any) -> str:
        """A finished mixture of the siblings, without math."""
        folder = self.models / "mixture"
        experts = [{"name": "code", "model": str(self.code)}]
        branchmix.upcycle({"seed": str(self.seed), "experts": experts, **recipe}, folder)
        return str(folder)


def broken_mixture(edit: Callable[[Path], object], **recipe: Any) -> Edit:
    """A mixture whose folder is edited then."""
    return lambda inputs: edit(Path(inputs.mixture(**recipe)))


def of_mixture(command: str, *more: str) -> Callable[[Inputs], list[str]]:
    """A command line with the mixture as its first argument; ``OUT`` stands for the output."""
    return lambda i: [command, str(i.models / "mixture"), *(str(i.out) if word == "OUT" else word for word in more)]


def config(folder: Path, remove: str = "", **changes: Any) -> None:
    """Edit config.json."""
    file = folder / "config.json"
    found = {**json.loads(file.read_text()), **changes}
    found.pop(remove, None)
    file.write_text(json.dumps(found))


def source(folder: Path, number: int, remove: str) -> None:
    """Take a key from one source of branchmix.json."""
    file = folder / "branchmix.json"
    record = json.loads(file.read_text())
    del record["sources"][number][remove]
    file.write_text(json.dumps(record))


def weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def resave(inputs: Inputs, folder: Path, **changes: Any) -> None:
    """Another model of the family, of other sizes."""
    shutil.rmtree(folder)
    BY_NAME[inputs.family].save(folder, 7, **changes)
    tokenizer(folder)


def tokenizer(folder: Path, size: int = 97, swap: bool = False, merges: str = "t1 0", zero: int = 0) -> None:
    """A tokenizer.json that has what is compared; of text it knows only "0", as token ``zero``."""
    names = ["0", *(f"t{number}" for number in range(1, size))]
    if swap:
        names[5], names[6] = names[6], names[5]
    vocabulary = {name: number for number, name in enumerate(names)} | {"0": zero}
    content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": [merges]}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def poison(name: str, value: float, model: str = "code") -> Edit:
    return lambda i: weights(i.models / model, lambda tensors: tensors[name].view(-1)[3].fill_(value))


def without(folder: Path, name: str) -> None:
    weights(folder, lambda tensors: tensors.pop(name))


def own_head(folder: Path) -> None:
    """An output layer of its own in the weights of a tied Llama, whose config stays."""
    embeddings = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    with_extra(folder, "lm_head.weight", embeddings + 0.1)


def with_extra(folder: Path, name: str, value: torch.Tensor | None = None) -> None:
    weights(folder, lambda tensors: tensors.update({name: torch.ones(4) if value is None else value}))


def rows(folder: Path, number: int, name: str = "model.embed_tokens.weight") -> None:
    """Another number of rows of a table, which config.json does not know of."""
    weights(folder, lambda tensors: tensors.update({name: torch.ones(number, tensors[name].shape[1])}))


def cut(folder: Path, nbytes: int = 100) -> None:
    file = folder / WEIGHTS
    os.truncate(file, file.stat().st_size - nbytes)


def shard(folder: Path) -> None:
    """Two shards, of which the second is missing."""
    tensors = load_file(folder / WEIGHTS)
    names = {name: f"model-0000{1 + (name == NORM)}-of-00002.safetensors" for name in tensors}
    save_file({name: tensors[name] for name in tensors if name != NORM}, folder / names[Q])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / WEIGHTS).unlink()


def theta(folder: Path, value: float = 1e6) -> None:
    config(folder, rope_parameters={"rope_theta": value, "rope_type": "default"})


def adapter(inputs: Inputs, settings: dict[str, Any], name: str = "adapter_model.safetensors", **shapes: Any) -> None:
    """``code`` becomes a LoRA adapter folder."""
    shutil.rmtree(inputs.code)
    inputs.code.mkdir()
    (inputs.code / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {f"base_model.model.{key}.lora_A.weight": torch.ones(shape) for key, shape in shapes.items()}
    save_file(tensors, inputs.code / name)


def experts(**models: str) -> dict[str, Any]:
    return {"experts": [{"name": name, "model": f"models/{model}"} for name, model in models.items()]}


def ffn(**routing: Any) -> dict[str, Any]:
    return {"routing": {"ffn": routing}}


def upcycle(inputs: Inputs, out: Path) -> list[str]:
    return ["upcycle", str(inputs.write_recipe()), str(out)]


def all_three(edit: Callable[[Path], object]) -> Edit:
    return lambda inputs: [edit(folder) for folder in (inputs.seed, inputs.code, inputs.math)]


def setting(**changes: Any) -> Edit:
    return lambda inputs: config(inputs.code, **changes)


def text(content: str) -> Edit:
    return lambda inputs: setattr(inputs, "text", content)


def family(inputs: Inputs, member: dict[str, Any]) -> None:
    """A family file of one model."""
    models = [{"model": str(inputs.seed), **member}]
    (inputs.root / "family.yaml").write_text(yaml.safe_dump({"models": models}))


def score(inputs: Inputs) -> list[str]:
    """The command that scores the family; three folders below the test's, from where a name could lead out."""
    out = inputs.root / "outputs" / "scores"
    return ["scaling", "run", str(inputs.root / "family.yaml"), "--tasks", "neqa", "--out", str(out)]


def sharded(folder: Path, shard: str) -> None:
    """An index file that names one shard for everything."""
    names = dict.fromkeys(load_file(folder / WEIGHTS), shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / WEIGHTS).unlink()


def header(text: str) -> bytes:
    """A safetensors file with this header and nothing behind it."""
    return struct.pack("<Q", len(text)) + text.encode()


def record(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit branchmix.json."""
    file = folder / "branchmix.json"
    found = json.loads(file.read_text())
    edit(found)
    file.write_text(json.dumps(found))
