"""``branchmix demo``: its budgets, files, numbers and page; slow: all of it, stopped once, at a tiny scale."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from branchmix.demo import calibrate, page, results, story
from branchmix.demo.measure import routes_page, routing_file, score_file
from branchmix.demo.settings import (
    DOMAINS,
    EXPERTS,
    MIXTURES,
    RECIPES,
    ROUTED,
    Budgets,
    Scale,
    mixture_runs,
    training_flops,
    write_files,
)
from branchmix.errors import OutputError, RecipeError
from branchmix.recipe import Recipe
from branchmix.study.statistics import difference
from branchmix.train.config import BranchConfig, RunConfig

TINY = Scale(
    vocab_size=512,
    shape={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
    sequence_length=32,
    batch_size=8,
)
STEP = TINY.step_tokens
BUDGETS = Budgets(
    seed=20 * STEP, expert=8 * STEP, mixture=12 * STEP, held_out=600, enough_bytes=60_000, dense_baseline=True
)
SPEED = calibrate.Speed(
    dense=1e-4,
    btx=1.3e-4,
    bam_shared_kv=2e-4,
    bam_expert_kv=2.5e-4,
    cores=2,
    start=5.0,
    one_process=8e-5,
    many_processes=6e-5,
    processes=2,
)


# ---- budgets ----


@pytest.mark.parametrize("minutes", [8, 15, 60])
def test_budgets_fill_the_time_in_proportion(minutes: float) -> None:
    scale = Scale()
    budgets = calibrate.plan(SPEED, scale, minutes)
    seconds = calibrate.estimate(SPEED, scale, budgets)
    assert 0.93 * calibrate.MARGIN * 60 * minutes < seconds <= calibrate.MARGIN * 60 * minutes
    assert budgets.seed / budgets.expert == pytest.approx(scale.seed_tokens / scale.expert_tokens, rel=0.1)
    assert budgets.mixture / budgets.expert == pytest.approx(scale.mixture_tokens / scale.expert_tokens, rel=0.1)
    assert all(tokens % scale.step_tokens == 0 for tokens in (budgets.seed, budgets.expert, budgets.mixture))


def test_too_little_time_still_gives_every_run_some_steps() -> None:
    budgets = calibrate.plan(SPEED, Scale(), 0.1)
    assert min(budgets.seed, budgets.expert, budgets.mixture) >= 5 * Scale().step_tokens


def test_slower_machines_train_less() -> None:
    slow = calibrate.Speed(**{**vars(SPEED), **{name: 3 * getattr(SPEED, name) for name in ("dense", "btx")}})
    assert calibrate.plan(slow, Scale(), 15).seed < calibrate.plan(SPEED, Scale(), 15).seed


@pytest.mark.parametrize(("many", "processes"), [(6e-5, 2), (9e-5, 1), (None, 1)])
def test_the_seed_is_trained_by_what_is_faster(many: float | None, processes: int) -> None:
    speed = calibrate.Speed(**{**vars(SPEED), "many_processes": many})
    assert speed.seed_processes == processes
    assert speed.seed == min(8e-5, many or 1)


# ---- files ----


def test_all_files_can_be_loaded_and_compute_is_equal(tmp_path: Path) -> None:
    write_files(tmp_path, TINY, BUDGETS, threads=1, seed_threads=2, at_once=2)
    seed = RunConfig.load(tmp_path / "seed.yaml")
    assert seed.budget.tokens == BUDGETS.seed and seed.mix == {"general": 1.0}
    branch = BranchConfig.load(tmp_path / "branch.yaml")
    assert tuple(branch.experts) == EXPERTS
    assert branch.mix_of("law") == {"law": 0.9, "general": 0.1}
    for name, (attention, ffn, _) in RECIPES.items():
        recipe = Recipe.load(tmp_path / "recipes" / f"{name}.yaml")
        assert (recipe.attention, recipe.ffn, recipe.expert_names) == (attention, ffn, ["seed", *EXPERTS])
    for run in mixture_runs(BUDGETS):
        config = RunConfig.load(tmp_path / f"mix-{run.name}.yaml")
        assert config.mix == "equal" and config.learning_rate.peak == seed.learning_rate.peak / 2  # type: ignore[operator]
        assert (config.held_out, config.data) == (seed.held_out, seed.data)
        if run.match == "CM":
            assert config.budget.flops == training_flops(TINY, "btx", BUDGETS.mixture)
        else:
            assert config.budget.tokens == BUDGETS.mixture


def test_a_changed_file_stays(tmp_path: Path) -> None:
    (tmp_path / "seed.yaml").write_text("mine")
    write_files(tmp_path, TINY, BUDGETS, threads=1, seed_threads=2, at_once=2)
    assert (tmp_path / "seed.yaml").read_text() == "mine"


def test_other_folders_and_other_times_are_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("something")
    with pytest.raises(OutputError, match="no demo's folder"):
        story.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "demo.json").write_text(json.dumps({"minutes": 15, "scale": vars(TINY), "cores": 2}))
    with pytest.raises(RecipeError, match="15 minutes: choose another folder for one of 3"):
        story.run(demo, minutes=3)


def test_the_command_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "branchmix", "demo", "--out", "my demo", "--minutes", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while not (tmp_path / "my demo" / "logs").is_dir():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.splitlines()[-1] == "stopped; go on with: branchmix demo --out 'my demo'"
    assert "Traceback" not in said


# ---- numbers ----


def test_differences_are_paired() -> None:
    """Documents of very different difficulty, on which one model is better by as much each time."""
    ours = [[100.0, 50, 200], [900.0, 150, 600], [30.0, 20, 70]]
    theirs = [[nats + 0.1 * tokens, tokens, size] for nats, tokens, size in ours]
    found = difference(ours, theirs)
    assert found.value == pytest.approx(-0.1)
    assert found.stderr == pytest.approx(0, abs=1e-12)
    assert difference(ours[:1], theirs[:1]).stderr == math.inf


@pytest.mark.parametrize(
    ("relative", "noise", "words"),
    [
        (-0.05, 0.01, "is better than BTX (-5.0 % ± 1.0)"),
        (0.08, 0.01, "is worse than BTX (+8.0 % ± 1.0)"),
        (-0.05, 0.06, "cannot be told apart (-5.0 % ± 6.0)"),
        (-0.015, 0.001, "cannot be told apart (-1.5 % ± 0.1)"),  # below what another seed would do
        (0.08, None, "by +8.0 %, on too few documents to know the noise"),
    ],
)
def test_verdicts_stay_within_the_noise(relative: float, noise: float | None, words: str) -> None:
    documents = {domain: [[1.0, 1, 1]] for domain in DOMAINS}
    assert results._compared(documents, documents)["beyond_noise"] is False
    beyond = noise is not None and abs(math.log1p(relative)) > max(noise, results.SEED_NOISE)
    comparison = {"relative": relative, "twice_stderr": noise, "beyond_noise": beyond}
    assert words in results._verdict(comparison)


def finished_demo(out: Path) -> Path:
    """What the commands leave, with made-up numbers: Expert KV 10 % better at equal data, worse at equal compute."""
    levels = {"trained/bam-expert-kv-dm": 0.9, "trained/bam-expert-kv-cm": 1.1}
    cm = 7 * STEP
    seed = TINY.config()
    for folder in story.models(BUDGETS):
        kind = next((name for name in MIXTURES if name in folder), None)
        config: dict[str, Any] = seed
        if kind is not None:
            config = {"model_type": "branchmix", "seed_config": seed, **TINY.mixture(kind)}
        (out / folder).mkdir(parents=True)
        write(out / folder / "config.json", config)
        level = math.log(levels.get(folder, 1.0))
        documents = [[(4.0 + number / 10 + level) * 100, 100, 300] for number in range(6)]
        score_file(out, folder).parent.mkdir(exist_ok=True)
        write(score_file(out, folder), {"domains": dict.fromkeys(DOMAINS, documents)})
        if (run := folder.removeprefix("trained/")) in ROUTED:
            by_domain = {domain: [0.7, 0.1, 0.1, 0.1] for domain in DOMAINS}
            layers = [{"layer": number, "by_domain": by_domain, "typical": [["a"]]} for number in range(2)]
            routed = {"experts": ["seed", *EXPERTS], "ffn": layers}
            routing_file(out, run).parent.mkdir(exist_ok=True)
            write(routing_file(out, run), routed if run == "btx" else {**routed, "attention": layers})
        if folder.startswith("upcycled"):
            continue
        tokens = cm if folder.endswith("-cm") else 12 * STEP
        domain = {"documents": 9, "tokens": 99, "held_out_documents": 6, "held_out_tokens": 600, "epochs": 1.5}
        training = {
            "config": {"model": "upcycled/x" if kind else "seed"},
            "tokens": tokens,
            "flops": training_flops(TINY, kind, tokens),
            "seconds": 12.0,
            "data": {"domains": dict.fromkeys(DOMAINS, domain)},
            "machine": {"cores": 2},
            "computing": {"precision": "bf16"},
            "versions": {"torch": "2"},
        }
        write(out / folder / "training.json", training)
        # The mean over domains is 5.15 whatever the batch was made of.
        rows = [
            {"step": n, "tokens": n * STEP, "flops": n * 1e9, "loss": 4.9 + n / 10, "loss/law": 4.0, "loss/code": 6.3}
            for n in range(1, 8)
        ]
        lines = [json.dumps(row) for row in (*rows, {"step": 7, "held_out/law": 1.0})]
        (out / folder / "metrics.jsonl").write_text("\n".join(lines))
    (out / "text").mkdir()
    write(out / "text" / "extract.json", {domain: {"chars": 1000, "documents": 15} for domain in DOMAINS})
    write(out / "demo.json", {"minutes": 1, "scale": vars(TINY), "cores": 2})
    write(out / "plan.json", {"scale": vars(TINY), "budgets": vars(BUDGETS)})
    write(out / "speed.json", vars(SPEED))
    write(out / "steps.json", {"seed": {"command": "branchmix train 'a<b>.yaml'", "seconds": 3.0}})
    return out


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


class Checked(HTMLParser):
    """Elements that are closed in order, ids that occur once, and nothing from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())


def checked(html: str) -> Checked:
    parser = Checked()
    parser.feed(html)
    assert not parser.open and len(parser.ids) == len(set(parser.ids))
    inner = [link for link in parser.links if link not in map(routes_page, ROUTED)]
    assert all(link.startswith("#") and link[1:] in parser.ids for link in inner)
    assert not re.search(r"url\((?!#)|@import|<script", html)
    return parser


def test_results_and_page(tmp_path: Path) -> None:
    out = finished_demo(tmp_path)
    found = results.collect(out, seconds=61)
    models = {model["folder"]: model for model in found["models"]}
    assert [*models] == [folder for folder in results.LABELS if folder in models] and len(models) == 14
    assert models["trained/bam-expert-kv-dm"]["geometric_mean"] == pytest.approx(0.9 * math.exp(4.25))
    assert models["trained/btx"]["sunk_flops"] == 4 * models["seed"]["flops"]
    assert models["trained/dense"]["sunk_flops"] == models["experts/law"]["sunk_flops"] == models["seed"]["flops"]
    assert models["seed"]["sunk_flops"] == 0
    kv = {name: models[f"upcycled/{name}"]["kv_cache_bytes_per_token"] for name in RECIPES}
    assert kv["bam-expert-kv"] == 4 * kv["bam-shared-kv"] == 4 * kv["btx"] == 4 * kv["soup"]
    data, compute, few, slope, caveat = found["headline"]
    assert "for 12 steps:" in few
    assert "BAM Expert KV is better than BTX (-10.0 % ± 0.0)" in data and "cannot be told apart" in data
    assert "BAM Expert KV is worse than BTX (+10.0 % ± 0.0)" in compute
    assert f"tokens^{-math.log(1.1 / 0.9) / math.log(12 / 7):.2f}" in slope
    assert "would pay for them once it falls more slowly" in slope
    no_lead = json.loads(json.dumps(found))
    no_lead["comparisons"]["bam-expert-kv-dm"]["beyond_noise"] = False
    assert "would pay" not in " ".join(results.headline(no_lead))
    assert "One random seed" in caveat
    curve = found["curves"]["trained/btx"]
    assert len(curve) == 7 and all(point["loss"] == pytest.approx(5.15) for point in curve)
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(found))

    html = page.write(out, found).read_text(encoding="utf-8")
    checked(html)
    assert [*map(routes_page, ROUTED)] == re.findall(r'href="(routes-[^"]*)"', html)
    assert found["routing"].keys() == {f"trained/{run}" for run in ROUTED} and "typical" not in json.dumps(found)
    assert html.count("<svg ") == 4 and "currentColor" in html and "#010203" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    assert "branchmix train &#x27;a&lt;b&gt;.yaml&#x27;" in html
    for line in found["headline"]:
        assert line.replace("'", "&#x27;") in html
    for label in results.LABELS.values():
        assert f">{label}</th>" in html
    assert all((out / "plots" / f"{name}.png").stat().st_size > 10_000 for name in ("summary", "curves", "routing-btx"))


# ---- all of it ----

RUN = """
import sys
from pathlib import Path
from branchmix.demo import story
from branchmix.demo.settings import Budgets, Scale

if __name__ == "__main__":
    try:
        story.run(sys.argv[1], minutes=1, scale=Scale(**{scale}), budgets=Budgets(**{budgets}))
    except story.DemoStoppedError as stop:
        sys.exit(128 + stop.signal)
"""


@pytest.mark.slow
def test_the_whole_story_stopped_once(tmp_path: Path) -> None:
    script, out = tmp_path / "run.py", tmp_path / "demo"
    script.write_text(RUN.format(scale=vars(TINY), budgets=vars(BUDGETS)))
    command = [sys.executable, str(script), "demo"]  # a relative path, as users give it
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=tmp_path)
        while "[4/8]" not in log.read_text() or not (out / "experts" / "code").is_dir():
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130
    written = (out / "seed" / "model.safetensors").stat().st_mtime_ns
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (out / "seed" / "model.safetensors").stat().st_mtime_ns == written  # not trained again

    found = json.loads((out / "results.json").read_text())
    models = {model["folder"]: model for model in found["models"]}
    assert len(models) == 14
    seed, expert = models["seed"]["perplexity"], models["experts/law"]["perplexity"]
    assert expert["law"] < seed["law"]
    assert models["trained/bam-expert-kv-dm"]["tokens"] == models["trained/btx"]["tokens"] == BUDGETS.mixture
    for name in ("bam-expert-kv-cm", "bam-shared-kv-cm"):
        step = models[f"trained/{name}"]["forward_flops_per_token"] * 3 * STEP
        assert abs(models[f"trained/{name}"]["flops"] - models["trained/btx"]["flops"]) < step
    layers = found["routing"]["trained/bam-expert-kv-dm"]["attention"]
    assert len(layers) == 2
    assert all(sum(layer["by_domain"][domain]) == pytest.approx(1) for layer in layers for domain in DOMAINS)
    checked((out / "index.html").read_text())
    for run in ROUTED:
        assert f'"domain":"{DOMAINS[0]}"' in (out / routes_page(run)).read_text()
    # Once more: nothing is left to do, and the page is made again from what is there.
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=True, timeout=100, cwd=tmp_path)
    assert "$ " not in again.stderr and again.stderr.count("done before") == 7
