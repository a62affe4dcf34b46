"""Benchmark: peak memory of one large document, as it is tokenised for training, for evaluation, and by a tokenizer.

    python benchmarks/documents.py                  # Linux; up to 48 MB of text, some minutes, under 1 GB of memory

Each measurement is a process of its own, which makes one document of Python's standard library and does one thing with
it; memory is anonymous memory (RssAnon, sampled every 20 ms) beyond what the same process has with a document of a few
lines. `in one go` is the tokenizer's own call on the whole text. Results go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measure

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (1, 4, 16, 48)
IN_ONE_GO = 4
"""MB of text, at most, that are tokenised in one go: that takes about 112 bytes a character."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="MB of text")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        WAYS[args.child[0]](Path(args.child[1]))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        least = {way: _measured(folder, way, 2_000)[0] for way in WAYS}
        for size in args.sizes:
            for way in WAYS:
                if way != "in one go" or size <= IN_ONE_GO:
                    peak, cpu = _measured(folder, way, size * 10**6)
                    rows.append({"way": way, "mb": size, "peak": peak, "beyond": peak - least[way], "cpu_seconds": cpu})
                    print(rows[-1], flush=True)
        facts = measure.machine_facts(folder)
    _report(rows, facts)
    return 0


def _measured(folder: Path, way: str, characters: int) -> tuple[int, float]:
    """Peak of anonymous memory, and CPU seconds."""
    file = folder / "text.txt"
    file.write_text(_text(characters), encoding="utf-8")
    command = [sys.executable, __file__, "--child", way, str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "BRANCHMIX_CACHE": str(folder / "cache")}
    found = measure.run(command, env=env, log=folder / "log", timeout=1800)
    if found.exit_code:
        raise RuntimeError((folder / "log").read_text())
    return found.peak_anon, found.cpu_seconds


def _text(characters: int) -> str:
    """So many characters of the standard library's modules, from the beginning again where they end."""
    parts: list[str] = []
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    size = 0
    while size < characters:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="ignore")
            parts.append(text)
            size += len(text)
            if size >= characters:
                break
    return "".join(parts)[:characters]


def _tokenizer() -> Any:
    from branchmix.data.tokenizer import train_tokenizer

    return train_tokenizer([_text(300_000)], 4096)


def _train(file: Path) -> None:
    from branchmix.data.config import HeldOut, Source
    from branchmix.data.corpus import open_corpus

    sources = {"text": Source(files=file.name)}
    opened = open_corpus(sources, _tokenizer(), folder=file.parent, cache=None, held_out=HeldOut(share=0.0))
    assert opened.domains["text"].complete


def _evaluate(file: Path) -> None:
    from branchmix.likelihood.models import encode

    assert len(encode(_tokenizer(), [file.read_text(encoding="utf-8")])[0])


def _fit(file: Path) -> None:
    from branchmix.data.tokenizer import train_tokenizer

    _tokenizer()
    train_tokenizer([file.read_text(encoding="utf-8")], 300)


def _in_one_go(file: Path) -> None:
    _tokenizer().backend_tokenizer.encode(file.read_text(encoding="utf-8"))


WAYS = {"training": _train, "evaluation": _evaluate, "train_tokenizer": _fit, "in one go": _in_one_go}


def _report(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    day = datetime.date.today().isoformat()
    versions = {name: version(name) for name in ("tokenizers", "transformers")}
    file = RESULTS / f"documents-{day}.json"
    file.write_text(json.dumps({"machine": facts, "versions": versions, "rows": rows}, indent=1) + "\n")
    lines = [
        f"# Memory of one large document, {day}",
        "",
        "One run each, one thread. Anonymous memory beyond that of the same process with a document of 2 KB.",
        "",
        "| what | text | beyond the smallest document | bytes a character | CPU |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        each = row["beyond"] / (row["mb"] * 10**6)
        beyond = f"{row['beyond'] / 1e6:,.0f} MB"
        lines.append(f"| {row['way']} | {row['mb']} MB | {beyond} | {each:.1f} | {row['cpu_seconds']:.0f} s |")
    cpu = f"{facts['cpu']}, {facts['cores']} cores, {facts['ram_gb']} GB RAM, Python {facts['python']}"
    lines += ["", f"{cpu}, {', '.join(f'{name} {number}' for name, number in versions.items())}."]
    file.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
