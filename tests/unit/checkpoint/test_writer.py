"""The writer: results read back by the safetensors library, failures that leave nothing, memory, the atomic folder."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from branchmix.checkpoint import expressions as ex
from branchmix.checkpoint import generated_tensors, numbers, writer
from branchmix.checkpoint.folder import atomic_folder, stale_folders
from branchmix.checkpoint.index import CheckpointIndex, read_header
from branchmix.checkpoint.writer import OutputTensor, shard_plan, write_checkpoint
from branchmix.errors import CheckpointError, OutputError


def save(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, ex.Stored]:
    save_file(tensors, file)
    return {ref.name: ex.Stored(ref) for ref in read_header(file)}


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def experts(tmp_path) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, ex.Stored]]]:
    torch.manual_seed(0)
    tensors = [
        {
            "up": torch.randn(1000, 700).bfloat16(),
            "out": torch.randn(300, 64).bfloat16(),
            "norm": torch.randn(700),
            "steps": torch.tensor([3, 2**40]),
        }
        for _ in range(3)
    ]
    return tensors, [save(tmp_path / f"expert{n}.safetensors", value) for n, value in enumerate(tensors)]


def mixture(sources: list[dict[str, ex.Stored]]) -> list[OutputTensor]:
    ups = tuple(source["up"] for source in sources)
    return [
        OutputTensor("steps", sources[0]["steps"]),
        *(OutputTensor(f"experts.{n}.up", up) for n, up in enumerate(ups)),
        OutputTensor("stacked", ex.Stack(ups)),
        OutputTensor("mean", ex.Average(ups)),
        OutputTensor("wide", ex.Columns(tuple((s["out"], h, h + 32) for h in (0, 32) for s in sources))),
        OutputTensor("transposed", ex.Transposed(ups[0])),
        OutputTensor("router", generated_tensors.Normal((8, 700), 0.02, 0, "router", "BF16")),
        OutputTensor("norm", sources[1]["norm"]),
        OutputTensor("scalar", generated_tensors.Constant((), 1.5, "F32")),
        OutputTensor("empty", generated_tensors.Constant((0, 5), 0.0, "F32")),
    ]


def expected(tensors: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ups = [tensor["up"] for tensor in tensors]
    return {
        "steps": tensors[0]["steps"],
        **{f"experts.{n}.up": up for n, up in enumerate(ups)},
        "stacked": torch.cat(ups),
        "mean": torch.stack([up.double() for up in ups]).mean(0).bfloat16(),
        "wide": torch.cat([t["out"][:, h : h + 32] for h in (0, 32) for t in tensors], 1),
        "transposed": ups[0].T,
        "norm": tensors[1]["norm"],
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 5),
    }


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("check", [True, False])
def test_one_file(experts, out, threads, check, monkeypatch):
    monkeypatch.setattr(writer, "TASK_BYTES", 1 << 19)  # many tasks
    tensors, sources = experts
    plan = mixture(sources)
    done: list[int] = []
    files = write_checkpoint(plan, out, threads=threads, check=check, progress=done.append)
    found = load_all(out)
    assert set(found) == {tensor.name for tensor in plan}
    for name, tensor in expected(tensors).items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert files == (out / "model.safetensors",) and names(out) == ["model.safetensors"]
    copied = {tensor.name for tensor in plan if tensor.expression.ranges() is not None}
    assert copied == {name for name in found if name[:3] in ("ste", "exp", "sta", "nor")}
    assert done == sorted(done)
    assert done[-1] == sum(tensor.nbytes for tensor in found.values())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards(experts, out):
    tensors, sources = experts
    plan = mixture(sources)
    planned = shard_plan(plan, max_shard_bytes=3_000_000)
    files = write_checkpoint(plan, out, max_shard_bytes=3_000_000)
    assert len(planned) > 2
    shard_names = [f"model-{n:05d}-of-{len(planned):05d}.safetensors" for n in range(1, len(planned) + 1)]
    assert [file.name for file in files] == [*shard_names, "model.safetensors.index.json"]
    for shard, file in zip(planned, files, strict=False):
        assert file == out / shard.name and file.stat().st_size == shard.nbytes
        assert shard.nbytes - len(shard.header) <= 3_000_000 or len(shard.tensors) == 1
    found = load_all(out)
    for name, tensor in expected(tensors).items():
        assert torch.equal(found[name], tensor), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(out / file)
    assert set(files) == set(out.iterdir())
    (out / "config.json").write_text('{"model_type": "x"}')
    assert set(CheckpointIndex.open(out).tensors) == set(found)


def test_data_is_aligned(tmp_path, out):
    sources = save(
        tmp_path / "s.safetensors",
        {
            "a": torch.zeros(3, dtype=torch.bool),
            "b": torch.zeros(3).half(),
            "c": torch.zeros(3),
            "d": torch.tensor([1]),
        },
    )
    for name in ("x", "xy", "xyz", "xyzz"):
        plan = [OutputTensor(name + key, source) for key, source in sorted(sources.items())]
        (shard,) = shard_plan(plan)
        assert len(shard.header) % 8 == 0
        for tensor in shard.tensors:
            assert tensor.offset % numbers.storage(tensor.expression.dtype).itemsize == 0
        write_checkpoint(plan, out)
        assert len(load_all(out)) == 4


def test_the_result_is_the_same_to_the_byte(experts, out, monkeypatch):
    plan = mixture(experts[1])
    write_checkpoint(plan, out, threads=1)
    first = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(writer, "TASK_BYTES", 100_000)
    monkeypatch.setattr(writer, "BUFFER_BYTES", 4096)
    write_checkpoint(plan, out, threads=4)
    assert (out / "model.safetensors").read_bytes() == first


def test_without_linux_calls(experts, out, monkeypatch):
    """As on macOS (no fallocate, no sync_file_range), and as on Windows (no positioned writes)."""
    plan = mixture(experts[1])
    write_checkpoint(plan, out)
    first = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(writer, "libc", lambda name: None)
    write_checkpoint(plan, out)
    assert (out / "model.safetensors").read_bytes() == first
    monkeypatch.delattr(os, "pwrite")
    write_checkpoint(plan, out, threads=4)
    assert (out / "model.safetensors").read_bytes() == first


def test_short_reads_and_writes_are_continued(experts, out, monkeypatch):
    tensors, sources = experts
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 2)], offset))

    class Short(FileIO):
        def readinto(self, into: memoryview) -> int:  # type: ignore[override]
            return super().readinto(into[:1001])

    monkeypatch.setattr(Path, "open", lambda file, mode, buffering: Short(file, mode))
    write_checkpoint([OutputTensor("up", sources[0]["up"])], out)
    assert torch.equal(load_all(out)["up"], tensors[0]["up"])


# Damaged sources.

EXTREMES = {
    torch.bfloat16: [0x0001, 0x8001, 0x8000, 0x7F7F, 0xFF7F],
    torch.float16: [0x0001, 0x8001, 0x8000, 0x7BFF, 0xFBFF],
    torch.float32: [0x00000001, 0x80000001, 0x80000000, 0x7F7FFFFF, 0xFF7FFFFF],
    torch.float64: [1, 1 << 63 | 1, 1 << 63, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF],
}


@pytest.mark.parametrize("dtype", EXTREMES)
def test_extreme_but_finite_values_pass(tmp_path, out, dtype):
    bits = np.array(EXTREMES[dtype] * 1000, np.uint64).astype(f"u{dtype.itemsize}")
    tensor = torch.from_numpy(bits.view(np.uint8)).view(dtype).reshape(100, 50)
    source = save(tmp_path / "s.safetensors", {"t": tensor})["t"]
    write_checkpoint([OutputTensor("t", source), OutputTensor("u", ex.Transposed(source))], out)
    assert torch.equal(load_all(out)["t"], tensor)


@pytest.mark.parametrize("how", ["copied", "columns", "mean", "transposed", "gained"])
@pytest.mark.parametrize("bad", ["nan", "-nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", EXTREMES)
def test_nan_and_inf_are_found_and_named(tmp_path, out, dtype, bad, how):
    where = (random.Random(f"{bad}{dtype}").randrange(900), random.Random(f"{how}{dtype}").randrange(500))
    tensor = torch.randn(900, 500).to(dtype)
    tensor[where] = float(bad.removeprefix("-"))
    if bad.startswith("-"):
        tensor[where] = torch.copysign(tensor[where], torch.tensor(-1.0).to(dtype))
    good = save(tmp_path / "good.safetensors", {"w": torch.randn(900, 500).to(dtype)})["w"]
    source = save(tmp_path / "bad.safetensors", {"w": tensor})["w"]
    expression = {
        "copied": ex.Stack((good, source)),
        "columns": ex.Columns(((good, 0, 250), (source, 0, 500))),
        "mean": ex.Average((good, source)),
        "transposed": ex.Transposed(source),
        "gained": ex.Gained(source, generated_tensors.Constant((500,), 0.0, "F32")),
    }[how]
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint([OutputTensor("w", expression)], out)
    kind = "NaN" if "nan" in bad else "Inf"
    assert f"{tmp_path / 'bad.safetensors'}: tensor w has {kind} at {list(where)}:" in str(caught.value)
    assert "\n" not in str(caught.value)
    write_checkpoint([OutputTensor("w", expression)], out, check=False)


def test_every_position_is_checked():
    for dtype, bits, nan in (
        ("BF16", 16, 0x7F81),
        ("F16", 16, 0xFC00),
        ("F32", 32, 0xFF800000),
        ("F64", 64, 0x7FF << 52),
    ):
        block = np.zeros(97, f"u{bits // 8}")
        assert writer.all_finite(block, dtype)
        for position in range(len(block)):
            block[position] = nan
            assert not writer.all_finite(block, dtype)
            assert not writer.all_finite(block.view(np.uint8), dtype)
            block[position] = 0
    assert writer.all_finite(np.zeros(0, np.uint16), "BF16")


def test_values_that_overflow_when_computed(tmp_path, out):
    source = save(tmp_path / "s.safetensors", {"t": torch.full((4, 4), 1e6)})["t"]
    with pytest.raises(CheckpointError, match="tensor half: computed values do not fit F16"):
        write_checkpoint([OutputTensor("half", ex.Cast(source, "F16"))], out)


def test_a_source_that_is_truncated_meanwhile(experts, out):
    _, sources = experts
    plan = mixture(sources)
    os.truncate(sources[1]["up"].ref.file, 500_000)
    with pytest.raises(CheckpointError, match=r"expert1.safetensors: has been truncated"):
        write_checkpoint(plan, out)


def test_equal_sources_are_checked_once(experts, out, monkeypatch):
    checks = []
    monkeypatch.setattr(writer, "all_finite", lambda block, dtype: checks.append(block.nbytes) or True)
    up = experts[1][0]["up"]
    write_checkpoint([OutputTensor(f"{n}", up) for n in range(4)], out, threads=1)
    assert sum(checks) == up.nbytes


# Full disks and kills.


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_midway_leaves_nothing(experts, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "TASK_BYTES", 100_000)
    pwrite, calls = os.pwrite, []

    def limited(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        return full() if len(calls) > 20 else pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    before = names(tmp_path)
    with pytest.raises(OutputError, match="disk is full") as caught, atomic_folder(tmp_path / "new", force=False) as t:
        write_checkpoint(mixture(experts[1]), t, threads=2)
    assert "\n" not in str(caught.value)
    assert len(calls) < 30, "the other thread stops too"
    assert names(tmp_path) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("branchmix-writer")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reserves space with fallocate")
def test_a_disk_too_small_shows_before_anything_is_written(tmp_path, out):
    huge = [OutputTensor("t", generated_tensors.Constant((1 << 40, 100), 0.0, "F32"))]
    with pytest.raises(OutputError):
        write_checkpoint(huge, out)


def test_an_error_in_progress_or_a_keyboard_interrupt_ends_all_threads(experts, tmp_path):
    for error in (KeyboardInterrupt, ZeroDivisionError):

        def progress(_: int, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error), atomic_folder(tmp_path / "new", force=False) as folder:
            write_checkpoint(mixture(experts[1]), folder, progress=progress)
        assert not (tmp_path / "new").exists()
        assert not list(tmp_path.glob(".new*"))


SLOW_RUN = """
import sys, time
from pathlib import Path
from branchmix.checkpoint import generated_tensors
from branchmix.checkpoint import expressions as ex
from branchmix.checkpoint.folder import atomic_folder
from branchmix.checkpoint.writer import OutputTensor, write_checkpoint

tensors = [OutputTensor(str(n), generated_tensors.Constant((1000,), 1.0, "F32")) for n in range(1000)]

def progress(done):
    print(done, flush=True)
    time.sleep(0.02)

with atomic_folder(Path(sys.argv[1]), force=True) as folder:
    write_checkpoint(tensors, folder, max_shard_bytes=400_000, progress=progress)
    (folder / "config.json").write_text('{"model_type": "llama"}')
"""


@pytest.mark.parametrize("existing", [False, True])
def test_kill_leaves_nothing_that_loads(tmp_path, existing):
    out = tmp_path / "mixture"
    if existing:
        out.mkdir()
        (out / "config.json").write_text('{"model_type": "old"}')
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    assert stale_folders(out) == [], "the run is alive"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = stale_folders(out)
    assert left.name.startswith(".mixture.incomplete-")
    assert any(left.iterdir())
    with pytest.raises(CheckpointError):
        CheckpointIndex.open(left)
    assert not (left / "model.safetensors.index.json").exists()
    if existing:
        assert [file.read_text() for file in out.iterdir()] == ['{"model_type": "old"}']
    else:
        assert not out.exists()
    assert stale_folders(tmp_path / "mix") == [], "another output's"


# The atomic folder.


def test_atomic_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    with atomic_folder(out, force=False) as folder:
        assert folder.parent == out.parent
        assert folder.name.startswith(f".out.incomplete-{os.getpid()}-")
        assert not out.exists()
        (folder / "config.json").write_text("{}")
    assert names(out.parent) == ["out"]
    assert names(out) == ["config.json"]


def test_existing_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "old"}')
    with pytest.raises(OutputError, match="--force"), atomic_folder(out, force=False):
        raise AssertionError("must not get here")
    with pytest.raises(ZeroDivisionError), atomic_folder(out, force=True) as folder:
        (folder / "config.json").write_text("new")
        raise ZeroDivisionError
    assert (out / "config.json").read_text() == '{"model_type": "old"}'
    with atomic_folder(out, force=True) as folder:
        (folder / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_force_does_not_replace_what_is_no_checkpoint(tmp_path):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"no config\.json"), atomic_folder(out, force=True):
        raise AssertionError("must not get here")
    assert (out / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("config", "beside", "words"),
    [
        ('{"site": "mine"}', "index.html", "no model_type in its config.json, and no weights"),
        ("{", "notes.txt", "no model_type in its config.json, and no weights"),
        ('{"model_type": "llama"}', "src/a.txt", "holds src, which is not part of a checkpoint"),
        ('{"model_type": "llama"}', "recipe.yaml", "holds recipe.yaml, which is not part of a checkpoint"),
        ('{"model_type": "llama"}', ".git/HEAD", "holds .git, which is not part of a checkpoint"),
        ("{}", "model.safetensors", None),
    ],
)
def test_force_replaces_a_checkpoint_and_nothing_else(tmp_path, config, beside, words):
    out = tmp_path / "out"
    (out / beside).parent.mkdir(parents=True)
    (out / beside).write_text("precious")
    (out / "config.json").write_text(config)
    if words is None:
        with atomic_folder(out, force=True):
            pass
        assert names(out) == []
        return
    with pytest.raises(OutputError, match=words), atomic_folder(out, force=True):
        raise AssertionError("must not get here")
    assert (out / beside).read_text() == "precious" and (out / "config.json").read_text() == config


def test_force_knows_what_stands_in_folders_of_models(tmp_path):
    """What this package, transformers' Trainer and downloads from the Hub leave beside the weights."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')
    for name in (
        *(
            "README.md",
            "LICENSE.txt",
            ".gitattributes",
            "generation_config.json",
            "tokenizer.json",
            "special_tokens_map.json",
        ),
        *(
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "modeling_branchmix.py",
        ),
        *("branchmix.json", "training.json", "metrics.jsonl", "log.txt", "run.yaml", "results.json", "routes.json"),
        *("training_args.bin", "trainer_state.json", "optimizer.pt", "rng_state_0.pth", "tokenization_own.py"),
    ):
        (out / name).touch()
    for name in ("original", ".cache", "results", "tensorboard"):
        (out / name).mkdir()
    with atomic_folder(out, force=True):
        pass
    assert names(out) == []


def test_output_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for out, words in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "out", "is a file, not a folder")):
        for force in (False, True):
            with pytest.raises(OutputError, match=words), atomic_folder(out, force=force):
                raise AssertionError("must not get here")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(OutputError, match="not writable"), atomic_folder(tmp_path / "out", force=False):
        raise AssertionError("must not get here")


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError), atomic_folder(out, force=False) as folder:
        (folder / "mine").write_text("x")
        out.mkdir()
        (out / "theirs").write_text("y")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["theirs"]


def test_force_through_a_link(tmp_path):
    real = tmp_path / "disk" / "out"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    with atomic_folder(tmp_path / "link", force=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert names(real) == ["config.json"]


# Memory.

MEASURED_RUN = """
import json, sys, threading, time
from pathlib import Path
from branchmix.checkpoint import generated_tensors
from branchmix.checkpoint import expressions as ex
from branchmix.checkpoint.index import read_header
from branchmix.checkpoint.writer import OutputTensor, write_checkpoint

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

source, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
refs = [ex.Stored(ref) for ref in read_header(source)]
make = {
    "copy": lambda a, b: a,
    "mean": lambda a, b: ex.Average((a, b)),
    "columns": lambda a, b: ex.Columns(tuple((p, h, h + 128) for h in range(0, 4096, 128) for p in (a, b))),
    "transposed": lambda a, b: ex.Transposed(a),
}[kind]
tensors = [OutputTensor(f"{n}", make(a, b)) for n, (a, b) in enumerate(zip(refs, refs[1:] + refs[:1]))]
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
write_checkpoint(tensors, out, threads=2)
done.set()
watcher.join()
print(json.dumps({"before": before, "peak": peak}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("kind", "limit_mib"), [("copy", 8), ("mean", 32), ("columns", 32), ("transposed", 48)])
def test_anonymous_memory(tmp_path, out, kind, limit_mib):
    """192 MiB of weights pass through a few MiB, beside the interpreter's and numpy's own 20-40."""
    rows, width, count = 4096, 4096, 6
    source = tmp_path / "s.safetensors"
    nbytes = rows * width * 2
    header = {
        f"t{n}": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [n * nbytes, (n + 1) * nbytes]}
        for n in range(count)
    }
    text = json.dumps(header).encode()
    with source.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        block = np.random.default_rng(0).standard_normal(nbytes // 2).astype(np.float32).view(np.uint32) >> 16
        for _ in range(count):
            stream.write(block.astype(np.uint16).tobytes())
    process = subprocess.run(
        [sys.executable, "-c", MEASURED_RUN, source, out, kind], stdout=subprocess.PIPE, check=True, text=True
    )
    found = json.loads(process.stdout)
    assert found["peak"] < 64 * 2**20, found
    assert found["peak"] - found["before"] < limit_mib * 2**20, found


def test_nothing_heavy_is_imported():
    heavy = "{'torch', 'transformers', 'safetensors'}"
    code = f"import sys, branchmix.checkpoint.writer; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
