"""Every model on every domain: bits per byte and perplexity of held-out documents.

python -m branchmix.demo.measure OUT seed experts/code ...      # writes OUT/scores/seed.json, ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from branchmix.data.config import HeldOut, Source
from branchmix.demo.settings import sources
from branchmix.study.measure import measure


def score_file(out: Path, model: str) -> Path:
    """Where the scores of the model in ``out / model`` are."""
    return out / "scores" / f"{model.replace('/', '-')}.json"


def routing_file(out: Path, run: str) -> Path:
    """Where the numbers of the routers of ``out / trained / run`` are."""
    return out / "routing" / f"{run}.json"


def routes_page(run: str) -> str:
    """Name of the page that shows them token by token, beside the demo's own."""
    return f"routes-{run}.html"


def main(out: Path, names: list[str]) -> None:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    held_out = HeldOut(share=plan["scale"]["held_out_share"], tokens=plan["budgets"]["held_out"])
    domains = {domain: Source(**source) for domain, source in sources().items()}
    for name in names:
        file = score_file(out, name)
        if file.is_file():
            continue
        length = plan["scale"]["sequence_length"]
        scores = measure(out / name, domains, folder=out, held_out=held_out, max_length=length, routing=False)
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps({"model": name, "domains": scores["domains"]}), encoding="utf-8")
        part.rename(file)
        print(f"{name}: measured", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
