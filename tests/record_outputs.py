"""Records what a fixed list of commands prints with ``--json`` on tiny inputs, and compares two such records.

    python tests/record_outputs.py record FOLDER       # half a minute on one core
    python tests/record_outputs.py compare OLD NEW     # exit code 1 and one line for each difference

For changes that should change no output: record before, record after, compare. Paths, times, dates and versions are
masked; numbers may differ by one part in a million.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "integration"), str(HERE.parent / "src")]
MASKED = re.compile(
    r"(seconds|time|started|ended|created|date|version|versions|machine|machines|per_second|minutes|cpu|threads|"
    r"at_once|inference|free_bytes)$|seconds_|_seconds"
)
TOLERANCE = 1e-6


def inputs(folder: Path) -> None:
    """Models with a tokenizer, texts, and the files that the commands read, made by the tests' own helpers."""
    import yaml
    from test_study import write_study

    import training
    from corpora import write_jsonl
    from downstream import write_tasks
    from families import BY_NAME
    from mixtures import recipe
    from scaling_runs import PLAIN, with_tokenizer, write_family, write_task

    sizes = {"vocab_size": 300, "max_position_embeddings": 256}
    models = {}
    for number, name in enumerate(("seed", "code", "math")):
        plain = BY_NAME["llama"].save(folder / "plain" / name, number, **sizes)
        models[name] = with_tokenizer(plain, folder / name)
    btx = {"attention": "average", "routing": {"ffn": {"top_k": 2, "normalize": True}}}
    recipes = {"bam": {"attention": "kv_experts"}, "shared": {"attention": "kv_sharing"}, "btx": btx}
    for name, options in recipes.items():
        of_two = {key: models[key] for key in ("seed", "code")}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe(of_two, **options)))
    for family in ("cohere", "gemma2", "qwen3"):
        BY_NAME[family].config().save_pretrained(folder / family)
    for name, numbers in {"general": range(40), "law": range(200, 240)}.items():
        write_jsonl(folder / f"{name}.jsonl", numbers)
    sources = {name: {"files": f"{name}.jsonl"} for name in ("general", "law")}
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": sources, "held_out": {"share": 0.3, "tokens": 400}}))
    write_tasks(folder / "tasks")
    run = training.settings(training.write_text(folder), out=str(folder / "run"))
    training.write_run(folder, run)
    branch = {key: value for key, value in run.items() if key not in ("model", "out")}
    branch |= {"seed": str(models["seed"]), "out": str(folder / "experts"), "experts": {"code": None, "law": None}}
    (folder / "branch.yaml").write_text(yaml.safe_dump(branch))
    (folder / "study").mkdir()
    write_study(folder / "study")
    write_task(folder, "plain-task", PLAIN)
    family = [{"model": str(models[name]), "params": size} for name, size in (("seed", 1e6), ("code", 2e6))]
    write_family(folder, [*family, {"model": str(models["math"]), "params": 4e6}])


def commands(at: Path) -> dict[str, list[str]]:
    """By the name of the record; each may use what those before it have written."""
    three = f"{at}/seed {at}/code {at}/bam"
    words = {f"inspect-{name}": f"inspect {at}/{name}" for name in ("seed", "cohere", "gemma2", "qwen3")}
    words |= {f"upcycle-dry-{name}": f"upcycle {at}/{name}.yaml {at}/{name} --dry-run" for name in ("bam", "shared")}
    words |= {f"upcycle-{name}": f"upcycle {at}/{name}.yaml {at}/{name} --verify" for name in ("bam", "shared", "btx")}
    words |= {f"inspect-{name}": f"inspect {at}/{name} --context 64" for name in ("bam", "shared", "btx")}
    words |= {
        "add-expert": f"add-expert {at}/bam math={at}/math {at}/three",
        "remove-expert": f"remove-expert {at}/three code {at}/without",
        "export-dry": f"export {at}/btx {at}/mixtral --to mixtral --dry-run",
        "export": f"export {at}/bam {at}/dense --to dense --expert code",
        "eval": f"eval {three} --data {at}/data.yaml --max-length 32 --ensemble {at}/seed,{at}/code",
        "eval-tasks": f"eval {at}/seed --tasks choice,words --include-path {at}/tasks",
        "routes": f"routes {at}/bam --data {at}/data.yaml --max-length 32",
        "train-dry": f"train {at}/run.yaml --dry-run",
        "train": f"train {at}/run.yaml",
        "branch-dry": f"branch {at}/branch.yaml --dry-run",
        "study-dry": f"study {at}/study/study.yaml --out {at}/study/out --dry-run",
        "study": f"study {at}/study/study.yaml --out {at}/study/out --launcher inline",
        "report": f"report {at}/study/out",
        "scaling-run": f"scaling run {at}/family.yaml --tasks {at}/plain-task.yaml --out {at}/scores --dtype float32",
        "scaling-trends": f"scaling trends {at}/scores --axis params",
    }
    made = {name: [*line.split(), "--json"] for name, line in words.items()}
    make = ["scaling", "data", "make", f"{at}/fresh", "--seed", "7", "--num", "5", "--tasks", "memo-trap,neqa"]
    return {**made, "scaling-data-make": make}


def masked(value: Any, at: str) -> Any:
    """The same without what differs from run to run."""
    if isinstance(value, dict):
        return {
            key.replace(at, "FOLDER"): "MASKED" if MASKED.search(key) else masked(inner, at)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [masked(inner, at) for inner in value]
    if isinstance(value, str):
        value = re.sub(r"\d{4}-\d\d-\d\d[T ][\d:.+Z]+", "DATE", value.replace(at, "FOLDER"))
        return re.sub(r"\b[\d.]+ (s|min|h)\b", "TIME", value)
    return value


def record(out: Path) -> None:
    """Runs all commands in this process."""
    import torch
    from typer.testing import CliRunner

    from branchmix.cli import app

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        os.environ["BRANCHMIX_CACHE"] = f"{at}/cache"
        inputs(at)
        os.chdir(at)
        for name, words in commands(at).items():
            done = CliRunner().invoke(app, words)
            said = str(done.exception) if done.exception and not isinstance(done.exception, SystemExit) else ""
            try:
                content: Any = json.loads(done.stdout)
            except ValueError:
                content = done.stdout.splitlines()
            made = masked({"exit_code": done.exit_code, "error": said, "output": content}, str(at))
            (out / f"{name}.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
            print(f"{name}: exit code {done.exit_code} {said}", flush=True)


def differences(old: Any, new: Any, where: str) -> Iterator[str]:
    """One line for each."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new))
    if numbers and math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key, "(none)"), new.get(key, "(none)"), f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{where}[{place}]")
    elif old != new:
        yield f"{where}: {json.dumps(old)[:200]} -> {json.dumps(new)[:200]}"


def compare(old: Path, new: Path) -> int:
    """Prints every difference; 1 if there is one."""
    found = []
    for name in sorted({file.name for folder in (old, new) for file in folder.glob("*.json")}):
        texts = [(folder / name).read_text() if (folder / name).is_file() else "null" for folder in (old, new)]
        found += differences(*map(json.loads, texts), name.removesuffix(".json"))
    print("\n".join(found) if found else "no difference")
    return int(bool(found))


if __name__ == "__main__":
    action, *folders = sys.argv[1:]
    paths = [Path(folder).absolute() for folder in folders]
    sys.exit(compare(*paths) if action == "compare" else record(*paths))
