"""Headers: what a healthy folder gives, and the one line for each kind of broken one."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from branchmix.checkpoint.index import CheckpointIndex, float32_bytes, read_header
from branchmix.errors import CheckpointError

TENSORS = {
    "model.embed_tokens.weight": torch.randn(6, 4, dtype=torch.bfloat16),
    "model.norm.weight": torch.randn(4, dtype=torch.float32),
    "counter": torch.tensor(7),
}


def write_config(folder: Path, **extra: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **extra}))
    return folder


def single(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    write_config(folder, **config)
    save_file(TENSORS if tensors is None else tensors, folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    write_config(folder)
    weight_map = {}
    for number, (name, tensor) in enumerate(TENSORS.items(), start=1):
        shard = f"model-{number:05d}-of-00003.safetensors"
        save_file({name: tensor}, folder / shard)
        weight_map[name] = shard
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw(folder: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A folder whose weight file has just this header and data."""
    write_config(folder)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(start + text + data)
    return folder


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(folder: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointIndex.open(folder)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line, line
    return line


@pytest.mark.parametrize("build", [single, sharded])
def test_tensors_are_where_the_index_says(tmp_path, build):
    index = CheckpointIndex.open(str(build(tmp_path)))
    assert index.config == {"model_type": "llama"}
    assert set(index.tensors) == set(TENSORS)
    assert {name: ref.nbytes for name, ref in index.tensors.items()} == {n: t.nbytes for n, t in TENSORS.items()}
    assert len(index.files) == (1 if build is single else 3)
    for name, tensor in TENSORS.items():
        ref = index.tensors[name]
        assert ref.shape == tuple(tensor.shape)
        with ref.file.open("rb") as stream:
            stream.seek(ref.offset)
            stored = stream.read(ref.nbytes)
        assert stored == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert index.tensors["model.embed_tokens.weight"].dtype == "BF16"
    assert index.tensors["counter"].dtype == "I64"


def test_bytes_as_float32() -> None:
    sizes = [float32_bytes(8, dtype) for dtype in ("F8_E4M3", "BF16", "F16", "F32", "F64", "I64")]
    assert sizes == [32, 16, 16, 8, 4, 4]


def test_a_single_file_beats_an_index(tmp_path):
    sharded(tmp_path)
    single(tmp_path)
    assert [file.name for file in CheckpointIndex.open(tmp_path).files] == ["model.safetensors"]


def test_index_needs_neither_numpy_nor_torch():
    code = "import sys, branchmix.checkpoint.index; assert not {'numpy', 'torch', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Folders and files that are something else.


def test_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such folder")


@pytest.mark.parametrize(
    ("name", "words"),
    [("m.gguf", "GGUF"), ("m.bin", "never loaded"), ("model.safetensors", "folder that holds it"), ("m.txt", "a file")],
)
def test_file_instead_of_folder(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    refused(tmp_path / name, name, words)


def test_no_config(tmp_path):
    single(tmp_path)
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "no config.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON at line 1"),
        ("[1]", "not a JSON object"),
        ("", "is empty"),
        ("{}", "no model_type"),
        ("\xff", "not valid JSON"),
    ],
)
def test_bad_config(tmp_path, text, words):
    single(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "config.json", words)


def test_lfs_pointers(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    single(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pointer)
    refused(tmp_path, "model.safetensors", "git lfs pull")
    (tmp_path / "config.json").write_bytes(pointer)
    refused(tmp_path, "config.json", "git lfs pull")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ["no weights"]),
        (["training_args.bin"], ["no weights"]),
        (["pytorch_model.bin"], ["pickles are never loaded", "AutoModelForCausalLM", "save_pretrained"]),
        (["consolidated.00.pth"], ["pickles are never loaded", "consolidated.00.pth"]),
        (["model.Q4_K_M.gguf"], ["GGUF", "model.Q4_K_M.gguf"]),
        (["adapter_model.safetensors", "adapter_config.json"], ["LoRA adapter"]),
        (["adapter_model.safetensors"], ["LoRA adapter"]),
        (["model-00001-of-00002.safetensors"], ["index.json is missing"]),
        (["pytorch_model-00001.safetensors", "x.safetensors"], ["pytorch_model-00001.safetensors and 1 more"]),
    ],
)
def test_folders_without_usable_weights(tmp_path, names, words):
    write_config(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, *words)


def test_the_conversion_that_is_advised_is_valid_python(tmp_path):
    write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    command = re.search(r'python -c "(.*)"$', refused(tmp_path))
    assert command is not None
    compile(command[1], "advice", "exec")
    assert str(tmp_path) in command[1]


# Shards.


def test_missing_shard(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00003.safetensors is missing", "3 are named")


def test_shard_lacks_a_tensor(tmp_path):
    sharded(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    write_index(tmp_path, {**weight_map, "lm_head.weight": "model-00003-of-00003.safetensors"})
    refused(tmp_path, "lm_head.weight", "model-00003-of-00003.safetensors", "lacks")
    write_index(tmp_path, {**weight_map, "counter": "model-00001-of-00003.safetensors"})
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    refused(tmp_path, "counter", "model-00001-of-00003.safetensors", "lacks")


def test_tensor_in_two_shards(tmp_path):
    sharded(tmp_path)
    save_file(TENSORS, tmp_path / "model-00003-of-00003.safetensors")
    refused(tmp_path, "stored twice", "and in model-00003-of-00003.safetensors")


@pytest.mark.parametrize("content", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{"])
def test_bad_shard_index(tmp_path, content):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refused(tmp_path, "model.safetensors.index.json")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_shards_outside_the_folder(tmp_path, shard):
    write_config(tmp_path)
    write_index(tmp_path, {"a": shard})
    refused(tmp_path, "not a file name in this folder")


# Damaged weight files.


def test_truncated_shard(tmp_path):
    file = single(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    refused(tmp_path, "truncated", f"{len(whole) - 5:,} bytes", "not fully covered")
    file.write_bytes(whole + b"more")
    refused(tmp_path, f"{len(whole) + 4:,} bytes", "not fully covered")
    file.write_bytes(whole[:30])
    refused(tmp_path, "truncated", "30 bytes", "invalid header length")
    file.write_bytes(whole[:5])
    refused(tmp_path, "truncated", "5 bytes")
    file.write_bytes(b"")
    refused(tmp_path, "truncated", "0 bytes")


GOOD = entry("F32", [2], 0, 8)
TWICE = json.dumps(entry("F32", [2], 8, 16)).encode()


@pytest.mark.parametrize(
    ("header", "nbytes", "words"),
    [
        (b"{not json", 0, "invalid JSON"),
        (b"\xff\xfe{}", 0, "invalid UTF-8"),
        (b"[" * 100_000, 0, "invalid JSON"),
        ([1], 0, "invalid JSON"),
        ({}, 0, "no tensors"),
        ({"__metadata__": {"format": "pt"}}, 0, "no tensors"),
        ({"a": GOOD, "b": entry("F33", [2], 8, 16)}, 16, "unknown variant `F33`"),
        ({"a": GOOD, "b": entry("F32", [3], 8, 16)}, 16, "invalid shape, data type, or offset"),
        ({"a": GOOD, "b": entry("F32", [2], 4, 12)}, 12, "invalid offset for tensor `b`"),
        ({"a": GOOD, "b": GOOD}, 8, "invalid offset for tensor"),
        ({"a": GOOD, "b": entry("F32", [2], 12, 20)}, 20, "invalid offset for tensor `b`"),
        ({"a": entry("F32", [2], 8, 0)}, 8, "invalid offset for tensor `a`"),
        ({"a": entry("F32", [-2], 0, 8)}, 8, "invalid JSON"),
        ({"a": entry("F32", [2.0], 0, 8)}, 8, "invalid JSON"),  # type: ignore[list-item]
        ({"a": entry("F32", [True], 0, 4)}, 4, "invalid JSON"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "invalid JSON"),
        ({"a": 3}, 8, "invalid JSON"),
        (b'{"a": %b, "a": %b}' % (json.dumps(GOOD).encode(), TWICE), 16, "invalid offset for tensor `a`"),
    ],
)
def test_bad_headers(tmp_path, header, nbytes, words):
    refused(raw(tmp_path, header, bytes(nbytes)), str(tmp_path), words)


def test_absurd_header_length(tmp_path):
    refused(raw(tmp_path, b"{}", length=1 << 60), "not a safetensors file")
    refused(raw(tmp_path, b"{}", length=1 << 20), "truncated", "invalid header length")


def test_order_of_the_header_does_not_matter(tmp_path):
    header = {"b": entry("F32", [2], 8, 16), "empty": entry("F32", [0, 3], 8, 8), "a": GOOD}
    refs = read_header(raw(tmp_path, header, np.arange(4, dtype="<f4").tobytes()) / "model.safetensors")
    assert [ref.name for ref in refs] == ["a", "empty", "b"]


# Quantised checkpoints.


def test_quantised_config(tmp_path):
    single(tmp_path, quantization_config={"quant_method": "bitnet"})
    refused(tmp_path, "quantised", "bitnet", "dequantise")
    single(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    index = CheckpointIndex.open(tmp_path)
    assert "quantization_config" not in index.config and "gptq, but the weights are not quantised" in index.notes[0]
    single(tmp_path, quantization_config=None)
    CheckpointIndex.open(tmp_path)


def test_quantised_config_is_told_before_missing_weights(tmp_path):
    write_config(tmp_path, quantization_config={"quant_method": "gptq"})
    (tmp_path / "gptq_model-4bit-128g.safetensors").write_bytes(b"x")
    refused(tmp_path, "quantised (gptq")


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("l.q_proj.qweight", torch.zeros(2, dtype=torch.int32), "GPTQ"),
        ("l.q_proj.SCB", torch.zeros(2), "bitsandbytes"),
        ("l.q_proj.weight_scale_inv", torch.zeros(2), "FP8"),
        ("l.q_proj.weight", torch.zeros(2, dtype=torch.int8), "is I8"),
        ("l.q_proj.weight", torch.zeros(2, dtype=torch.uint8), "is U8"),
        ("l.q_proj.weight", torch.zeros(2).to(torch.float8_e4m3fn), "is F8_E4M3"),
    ],
)
def test_quantised_tensors(tmp_path, name, tensor, words):
    refused(single(tmp_path, {name: tensor}), "quantised", words, name)


def test_causal_mask_buffers_are_not_quantised_weights(tmp_path):
    single(tmp_path, {"gpt_neox.layers.0.attention.bias": torch.zeros(1, 1, 4, 4, dtype=torch.uint8)})
    assert len(CheckpointIndex.open(tmp_path).tensors) == 1
