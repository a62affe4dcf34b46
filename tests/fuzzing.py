"""Files of users, broken at random: a seeded mutator, and what of the package reads each kind of file.

A reader may refuse a file with an error of ``branchmix.errors`` or take it; anything else is a finding, and so is a
message of more than a screen, an unprintable one, or an answer that takes seconds. Everything runs in this process
and needs neither torch nor a model's weights.

By hand, a slice of any size (a finding prints its number, which reproduces it):
    PYTHONPATH=src:tests python tests/fuzzing.py 20000 --first 0 --only checkpoint
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from branchmix.errors import BranchMixError

SECONDS = 3.0
"""CPU time after which an answer counts as a finding; most take a millisecond."""
HUGE, DEEP = "\0huge\0", "\0deep\0"
"""Stand for what Python's own writer refuses: 10**400, and lists in lists."""

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 2**64, 10**6, 10**9, 10**30, -(2**63), HUGE, HUGE),
    *(0.0, -0.5, 1e-320, 1e308, math.inf, -math.inf, math.nan, 1.5),
    *(
        "",
        "x",
        "a" * 300,
        "b" * 100_000,
        "\ud800",
        "a\0b",
        "../../up",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "a\nb",
        "ü" * 99,
    ),
    *("llama", "branchmix", "gpt2", "mixtral", "float32", "bfloat16", "F32", "BF16", "I64", "full_attention", "normal"),
    *("auto", "none", "zeros", "1e400", "10**400", "true", "~", "$x_1$", "<b>", "model.safetensors", "seed", "code"),
    *([], {}, [[]], [{}], {"": 1}, [None], ["x"], [1, 2], [-1], [0], {"x": {"y": [1]}}, {"model": "x"}, [1.5], DEEP),
    *({"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 8.0}, {"rope_type": ["x"]}, {"rope_theta": HUGE}),
    *([HUGE], ["sliding_attention"], ["full_attention", 3], {"type": "linear", "factor": "x"}, {"a" * 300: 1}),
]


def _as_text(value: Any, *, as_yaml: bool) -> str:
    try:
        text = yaml.safe_dump(value, sort_keys=False) if as_yaml else json.dumps(value)
    except (yaml.YAMLError, RecursionError):
        text = json.dumps(value)
    quoted = (f'"{token}"' for token in ("\\0huge\\0", "\\u0000huge\\u0000"))
    for one in quoted:
        text = text.replace(one, "1" + "0" * 400)
    for one in ('"\\0deep\\0"', '"\\u0000deep\\u0000"'):
        text = text.replace(one, "[" * 300 + "]" * 300)
    return text


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value in a document, keys and indices that lead to it."""
    found = [place]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += _places(inner, (*place, key))
    return found


def edited(document: Any, rng: random.Random) -> Any:
    """The document with a value replaced, removed, renamed, doubled or moved."""
    place = rng.choice(_places(document))
    if not place:
        return copy.deepcopy(rng.choice(VALUES)) if rng.random() < 0.2 else document
    holder = document
    for key in place[:-1]:
        holder = holder[key]
    key, act = place[-1], rng.random()
    if act < 0.65:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif act < 0.75:
        del holder[key]
    elif act < 0.85 and isinstance(holder, dict):
        name = rng.choice([value for value in VALUES if isinstance(value, str) and value not in (HUGE, DEEP)])
        holder[name] = holder.pop(key)
    elif act < 0.92:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
    else:
        whole = copy.deepcopy(document)
        holder[key] = rng.choice([1, -1, 1000]) * holder[key] if isinstance(holder[key], int | float) else whole
    return document


TAGS = ["!!int ''", "!!float x", "!!timestamp 1", "!!binary x", "!!python/object:os.system x", "!!map x", "!!set {a}"]
TAGS += [
    "&a [*a]",
    "!!str [1]",
    "!!omap [a]",
    "!!bool ''",
    "!!null x",
    "<<: 1",
    "? [a]",
    "!!pairs {a: 1}",
    "2024-13-45",
]
SCRAPS = [b"\0", b"\xff", b"[", b"{", b'"', b"\\", b"\n", b",", b":", b"0", b"-", b"e9", b"1e999", b"\xef\xbb\xbf"]
SCRAPS += [b"[" * 2000, b'{"a":' * 500, b"\\ud800", b"9" * 5000, b"NaN", b"\r", b"\xc2\x85", b"&a", b"*a", b"- ", b"\t"]


def broken(raw: bytes, rng: random.Random) -> bytes:
    """Bytes cut, doubled, flipped, or with scraps of something else in between."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at, act = rng.randrange(len(raw) + 1), rng.random()
        if act < 0.2:
            raw = raw[:at] if rng.random() < 0.5 else raw[at:]
        elif act < 0.35:
            end = min(len(raw), at + rng.randrange(1, 60))
            raw = raw[:at] + raw[end:]
        elif act < 0.5:
            end = min(len(raw), at + rng.randrange(1, 60))
            raw = raw[:end] + raw[at:]
        elif act < 0.7 and raw:
            at = min(at, len(raw) - 1)
            raw = raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :]
        else:
            raw = raw[:at] + rng.choice(SCRAPS) + raw[at:]
    return raw


def mutated(raw: bytes, name: str, rng: random.Random) -> bytes:
    """A file's content, broken in a way that its kind of file invites."""
    if rng.random() < 0.25:
        return broken(raw, rng)
    if name.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", raw[:8])
        if rng.random() < 0.1:
            return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1])) + raw[8:]
        header = edited(json.loads(raw[8 : 8 + length]), rng)
        text = _as_text(header, as_yaml=False).encode()
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]
    if name.endswith((".json", ".jsonl")):
        lines = raw.splitlines() if name.endswith(".jsonl") else [raw]
        at = rng.randrange(len(lines))
        document = json.loads(lines[at])
        for _ in range(rng.choice([1, 1, 2, 4])):
            document = edited(document, rng)
        lines[at] = _as_text(document, as_yaml=False).encode()
        return b"\n".join(lines)
    if name.endswith((".yaml", ".yml")):
        if rng.random() < 0.2:
            text = raw.decode()
            words = [at for at in range(len(text)) if text[at - 1 : at] == " "] or [0]
            at = rng.choice(words)
            end = text.find("\n", at)
            return (text[:at] + rng.choice(TAGS) + text[end if end >= 0 else len(text) :]).encode()
        document = yaml.safe_load(raw)
        for _ in range(rng.choice([1, 1, 2, 4])):
            document = edited(document, rng)
        return _as_text(document, as_yaml=True).encode("utf-8", "surrogatepass")
    if name.endswith(".csv"):
        rows = [line.split(b",") for line in raw.splitlines()]
        row = rng.choice(rows)
        value = rng.choice(VALUES)
        word = "1" + "0" * 400 if value == HUGE else str(value)
        row[rng.randrange(len(row))] = word.encode("utf-8", "surrogatepass")
        return b"\n".join(b",".join(row) for row in rows)
    return broken(raw, rng)


HARNESSES = {
    "lm-eval": ("lm-eval/results_d.json", "lm-eval/samples_choice_d.jsonl"),
    "inspect": ("inspect/log.json", "inspect/log.eval"),
    "raw": ("raw/m/memo-trap.jsonl",),
}
"""Results of other harnesses, by folder."""


@dataclass(frozen=True)
class Target:
    """A kind of file, with what reads it."""

    name: str
    files: tuple[str, ...]
    """Below the folder of the inputs; one of them is broken."""
    read: Callable[[Path], object]
    weight: int = 1
    """How often it is chosen."""


def targets() -> list[Target]:
    """All readers; imported here, as the test's file is collected by every run."""
    from branchmix import export_model, inspect, push, upcycle
    from branchmix.accounting.lineage import lineage
    from branchmix.checkpoint.companions import licence_of_folder
    from branchmix.checkpoint.index import CheckpointIndex
    from branchmix.likelihood.records import Journal
    from branchmix.recipe import Recipe
    from branchmix.scaling.family import FamilyFile, subjects
    from branchmix.scaling.readers.results import read_results
    from branchmix.scaling.tasks import UserTask
    from branchmix.scaling.trends.table import read_scores, read_table
    from branchmix.study.settings import StudyFile
    from branchmix.train.config import BranchConfig, RunConfig
    from branchmix.train.run_folder import RunFolder
    from branchmix.upcycling import add_expert
    from branchmix.upcycling.mixture import provenance_of
    from branchmix.upcycling.tokenizer_match import compare_tokenizers

    def merge(root: Path) -> object:
        return upcycle(root / "recipe.yaml", root / "out", dry_run=True)

    def of_tables(root: Path) -> None:
        table = read_table(root / "scores")
        for row in table.rows:
            read_scores(root / "scores" / "examples", row)

    weights = ("code/config.json", "code/model.safetensors", "seed/config.json", "seed/model.safetensors")
    companions = ("code/tokenizer.json", "seed/tokenizer.json", "code/training.json", "code/README.md")
    mixture = ("mixture/config.json", "mixture/model.safetensors.index.json", "mixture/branchmix.json")
    mixture += ("mixture/model-00001-of-00002.safetensors",)
    ours = ("mixture/README.md", "mixture/tokenizer_config.json", "mixture/generation_config.json", "results.json")

    def run_of(root: Path) -> object:
        config = RunConfig.load(root / "run.yaml", [])
        return RunFolder(config).look(config, force=False)

    return [
        Target("checkpoint", (weights[0], weights[1]), lambda root: CheckpointIndex.open(root / "code"), 3),
        Target("sharded", mixture[:2], lambda root: CheckpointIndex.open(root / "mixture"), 2),
        Target("inspect", (weights[0],), lambda root: inspect(root / "code").as_dict(), 3),
        Target("inspect mixture", mixture, lambda root: inspect(root / "mixture").as_dict(), 2),
        Target("inspect config", ("gemma.json", "olmo3.json", "falcon.json"), inspect_one, 3),
        Target("upcycle", (*weights, *companions, "recipe.yaml"), merge, 4),
        Target(
            "upcycle adapter", ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"), with_adapter, 1
        ),
        Target(
            "add expert",
            (*mixture, *weights[:2]),
            lambda root: add_expert(root / "mixture", "law", root / "code", root / "out", dry_run=True),
            2,
        ),
        Target(
            "export",
            (*mixture, *ours[1:3]),
            lambda root: export_model(root / "mixture", root / "out", to="dense", expert="code", dry_run=True),
            2,
        ),
        Target(
            "push",
            (*mixture, *ours),
            lambda root: push(root / "mixture", "org/name", dry_run=True, results=root / "results.json"),
            2,
        ),
        Target("tokenizers", companions[:2], lambda root: compare_tokenizers(root / "seed", root / "code").size, 2),
        Target(
            "records",
            ("code/training.json", "mixture/branchmix.json"),
            lambda root: (lineage(root / "code"), lineage(root / "mixture"), provenance_of(root / "mixture")),
            2,
        ),
        Target("licence", ("code/README.md",), lambda root: licence_of_folder(root / "code")),
        Target("recipe", ("recipe.yaml",), lambda root: Recipe.load(root / "recipe.yaml"), 3),
        Target("run", ("run.yaml", "run/run.json"), run_of, 3),
        Target("branch", ("branch.yaml",), lambda root: BranchConfig.load(root / "branch.yaml", []), 2),
        Target("study", ("study.yaml",), lambda root: StudyFile.load(root / "study.yaml"), 2),
        Target(
            "family",
            ("family.yaml", "code/training.json", weights[0]),
            lambda root: subjects(FamilyFile.load(root / "family.yaml")),
            2,
        ),
        Target("task", ("task.yaml",), lambda root: UserTask.load(root / "task.yaml")),
        Target("table", ("scores/results.csv", "scores/examples/m/neqa.jsonl"), of_tables, 3),
        Target("lm-eval", HARNESSES["lm-eval"], lambda root: read_results(root / "lm-eval", "lm-eval"), 2),
        Target("inspect logs", HARNESSES["inspect"], lambda root: read_results(root / "inspect", "inspect"), 2),
        Target("budgets", HARNESSES["raw"], lambda root: read_results(root / "raw", "inverse-scaling-ttc")),
        Target("requests", ("requests.jsonl",), lambda root: Journal(root, "requests.jsonl", "request")),
    ]


def inspect_one(root: Path) -> None:
    from branchmix import inspect

    for name in ("gemma", "olmo3", "falcon"):
        inspect(root / f"{name}.json", context=100).as_dict()


def with_adapter(root: Path) -> object:
    from branchmix import upcycle

    experts = [{"name": "code", "model": str(root / "adapter")}]
    return upcycle({"seed": str(root / "seed"), "experts": experts}, root / "out", dry_run=True)


def in_memory() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder, in memory where the system has such: files are written a hundred thousand times."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)


@dataclass
class Finding:
    """What a reader should not have done."""

    number: int
    target: str
    file: str
    what: str
    """One line."""
    trace: str = ""


def tried(number: int, chosen: Target, root: Path) -> Finding | None:
    """Breaks one file in the way that ``number`` stands for, has it read, and mends it."""
    rng = random.Random(number)
    name = rng.choice(chosen.files)
    file = root / name
    before = file.read_bytes()
    start = time.process_time()
    try:
        file.write_bytes(mutated(before, name, rng))
        chosen.read(root)
    except BranchMixError as error:
        lines = str(error).split("\n")
        what = ""
        if not lines[0].strip():
            what = "an empty message"
        elif max(map(len, lines)) > 2000 or len(lines) > 300:
            what = f"a message of {len(lines)} lines, the longest of {max(map(len, lines))} characters"
        found = Finding(number, chosen.name, name, what) if what else None
    except Exception as error:
        text = traceback.format_exc()
        found = Finding(number, chosen.name, name, f"{type(error).__name__}: {str(error)[:150]}", text)
    else:
        found = None
    finally:
        file.write_bytes(before)
    seconds = time.process_time() - start
    if found is None and seconds > SECONDS:
        found = Finding(number, chosen.name, name, f"took {seconds:.1f} s")
    if (root / "out").exists():
        shutil.rmtree(root / "out")
        found = found or Finding(number, chosen.name, name, "wrote something in a dry run")
    return found


def findings(numbers: range, root: Path, *, only: str = "", until: float = math.inf) -> tuple[int, list[Finding]]:
    """How many mutations were tried, and what they found.

    Args:
        numbers: of mutations; each is the same one in every run.
        root: folder of the inputs: see ``make_inputs``.
        only: name of one target.
        until: value of ``time.monotonic()`` at which to stop.
    """
    pool = [target for target in targets() for _ in range(target.weight) if only in ("", target.name)]
    found = []
    for done, number in enumerate(numbers):
        if time.monotonic() > until:
            return done, found
        one = tried(number, pool[random.Random(f"target {number}").randrange(len(pool))], root)
        if one is not None:
            found.append(one)
    return len(numbers), found


RUN = {
    "model": "seed",
    "out": "run",
    "data": {"text": {"files": "*.txt"}, "web": {"files": ["a.jsonl", "b.jsonl"], "column": "text"}},
    "mix": {"text": 0.5, "web": 0.5},
    "budget": {"tokens": "1M"},
    "sequence_length": 64,
    "batch_size": 8,
    "learning_rate": {"peak": 1e-3, "warmup": 0.1},
    "checkpoints": {"steps": 10, "keep": 2},
}


def make_inputs(root: Path) -> Path:
    """Tiny valid files of every kind below ``root``."""
    import torch

    import branchmix
    from bad_inputs import tokenizer
    from families import BY_NAME

    for name, seed in (("seed", 0), ("code", 1)):
        BY_NAME["llama"].save(root / name, seed)
        tokenizer(root / name)
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a, b]\n---\nText\n")
    for name in ("gemma", "olmo3", "falcon"):
        BY_NAME[name if name != "gemma" else "gemma2"].save(root / name, 2)
        shutil.copyfile(root / name / "config.json", root / f"{name}.json")
        shutil.rmtree(root / name)
    recipe = {
        "seed": "seed",
        "experts": [{"name": "code", "model": "code"}],
        "attention": "kv_experts",
        "router_init": {"method": "normal", "std": 0.02},
        "routing": {"ffn": {"top_k": 1}, "attention": {"soft": True}},
        "merge": {"method": "weighted", "weights": {"code": 0.5, "seed": 0.5}},
        "dtype": "bfloat16",
        "max_shard_size": "5GB",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    small = {**recipe, "seed": str(root / "seed"), "max_shard_size": "60KB"}
    branchmix.upcycle({**small, "experts": [{"name": "code", "model": str(root / "code")}]}, root / "mixture")
    shards = sorted(file.name for file in (root / "mixture").glob("*.safetensors"))
    assert shards[0] == "model-00001-of-00002.safetensors", shards
    (root / "mixture/tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "a": {"b": [1]}}'
    )
    (root / "mixture/generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.5}')
    ancestors = [{"key": "k", "name": "n", "tokens": 5, "flops": 1e9, "flops_per_token": 2.0}]
    training = {
        "config": {**RUN, "model": "org/base"}, "tokens": 1000, "flops": 1e12, "started": "x", "ended": "y",
        "ancestors": ancestors, "peak_learning_rate": 1e-3,
        "domains": {"text": {"tokens": 5}}, "held_out": {"start": {}, "end": {"text": {"perplexity": 2.0}}},
    }  # fmt: skip
    (root / "code/training.json").write_text(json.dumps(training))
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    )
    from safetensors.torch import save_file

    module = "base_model.model.model.layers.0.self_attn.q_proj"
    lora = {f"{module}.lora_A.weight": torch.ones(2, 32), f"{module}.lora_B.weight": torch.ones(32, 2)}
    save_file(lora, adapter / "adapter_model.safetensors")
    (root / "run").mkdir()
    (root / "run/run.json").write_text(json.dumps({"config": {**RUN}}))
    (root / "run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    branch = {key: value for key, value in RUN.items() if key not in ("model", "mix")}
    branch |= {"seed": "seed", "out": "b", "experts": {"code": {"domain": "text"}, "web": None}, "general": "text"}
    (root / "branch.yaml").write_text(yaml.safe_dump(branch, sort_keys=False))
    study = {
        "seed": "seed", "data": {"installed": "10M"}, "tokens": {"expert": "1M", "mixture": "1M"},
        "sequence_length": 64, "batch_size": 8,
        "methods": ["bam-expert-kv", {"method": "btx", "name": "b", "match": ["dm"]}],
        "reference": "bam-expert-kv", "learning_rate": {"peak": 1e-3, "mixture": 1e-4}, "random_seeds": [0, 1],
    }  # fmt: skip
    (root / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    family = {"family": "f", "models": [
        "seed", {"model": "code", "name": "c", "seed": "1", "tokens": "1M", "axes": {"quality": 2.0}}]}  # fmt: skip
    (root / "family.yaml").write_text(yaml.safe_dump(family, sort_keys=False))
    (root / "mine.jsonl").write_text("{}\n")
    (root / "task.yaml").write_text(
        "name: my-task\ndata: mine.jsonl\nmetric: classification\ncause: unwanted imitation\n"
    )
    (root / "scores/examples/m").mkdir(parents=True)
    (root / "scores/results.csv").write_text(
        "task,model,params,metric,value,stderr,n,seed,data\nneqa,m,1e6,accuracy,0.5,0.1,9,,official\n"
        "neqa,n,2e6,accuracy,0.6,0.1,9,1,fresh\n"
    )
    (root / "scores/examples/m/neqa.jsonl").write_text('{"key": "1", "correct": 1, "template": "a"}\n' * 1)
    recorded = Path(__file__).parent / "data" / "harnesses"
    sources = ("lm-eval/tiny-16-0/*/results_*", "lm-eval/tiny-16-0/*/samples_choice*", "inspect-json/*", "inspect/*")
    for pattern, name in zip(sources, (*HARNESSES["lm-eval"], *HARNESSES["inspect"]), strict=True):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(min(recorded.glob(pattern)), root / name)
    (root / "raw/m").mkdir(parents=True)
    answer = {"model": "m", "task_id": "t", "reasoning_budget": 1024, "metric": "accuracy", "icl_num_examples": 2}
    pairs = (("q_run2", True), ("p_run2", False))
    lines = [json.dumps({**answer, "instance_id": name, "correct": right, "error": None}) for name, right in pairs]
    (root / HARNESSES["raw"][0]).write_text("\n".join(lines) + "\n")
    (root / "requests.jsonl").write_text('{"model": "m", "request": "a", "value": 2}\n{"model": "m", "facts": 1}\n')
    scores = {"bits_per_byte": 1.0, "stderr": 0.1}
    results = {"models": [{"model": "mixture", "domains": {"text": scores}, "max_length": 64}]}
    (root / "results.json").write_text(json.dumps(results))
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=60)
    args = parser.parse_args()
    start = time.monotonic()
    with in_memory() as folder:
        root = make_inputs(Path(folder))
        numbers = range(args.first, args.first + args.count)
        done, found = findings(numbers, root, only=args.only, until=time.monotonic() + 60 * args.minutes)
    kinds: dict[str, list[Finding]] = {}
    for one in found:
        where = [line.strip() for line in one.trace.splitlines() if line.startswith("  File ") and "branchmix" in line]
        kinds.setdefault(f"{one.what.split(':')[0]} at {where[-1] if where else '?'}", []).append(one)
    for kind, group in sorted(kinds.items(), key=lambda entry: -len(entry[1])):
        one = group[0]
        print(f"{len(group)} x {kind}\n    number {one.number}, {one.target}, {one.file}: {one.what}")
    print(f"{done} mutations in {time.monotonic() - start:.0f} s, {len(found)} findings")


if __name__ == "__main__":
    main()
