"""``branchmix calibrate`` and recipes with ``gates``: what is read, what is fitted, and what is written."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch.nn import functional as F
from transformers import AutoTokenizer
from typer.testing import CliRunner

import branchmix
import dialects
from branchmix.cli import app
from branchmix.data.config import EvalData
from branchmix.data.sources import is_held_out
from branchmix.errors import CheckpointError, DataError, OutputError, RecipeError
from branchmix.evaluate.documents import select
from branchmix.evaluate.evaluation import evaluate
from branchmix.evaluate.perplexity import score_documents
from branchmix.evaluate.scores import aggregate
from branchmix.models import chunked_branchmix
from branchmix.models.routers import one_hot_gates
from branchmix.models.routing_branchmix import BranchMixAttentionRouter, BranchMixFFNRouter, BranchMixRouter
from branchmix.upcycling import execute
from branchmix.upcycling.gates import calibrate, measure, run
from branchmix.upcycling.gates import text as reading
from branchmix.upcycling.gates.evidence import fit_posterior
from branchmix.upcycling.gates.fit import NEARLY, log_shares, losses
from branchmix.upcycling.mixture import NOT_CALIBRATED, OpenedMixture
from families import BY_NAME
from mixtures import load

EXPERTS = ("seed", *dialects.DOMAINS)


@pytest.fixture(scope="module", autouse=True)
def in_fp32() -> Iterator[None]:
    """Losses are measured in fp32, whatever this machine computes faster in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_branchmix, "faster_in_bf16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained siblings, and text that they have not seen."""
    folder = tmp_path_factory.mktemp("dialects")
    dialects.siblings(folder)
    dialects.write(folder)
    return folder


def recipe_of(home: Path, **options: Any) -> dict[str, Any]:
    experts = [{"name": name, "model": str(home / name)} for name in dialects.DOMAINS]
    return {"seed": str(home / "seed"), "experts": experts, **options}


@pytest.fixture(scope="module")
def mixture(home: Path) -> Path:
    branchmix.upcycle(recipe_of(home, merge={"fold_norms": True}), home / "mixture")
    return home / "mixture"


@pytest.fixture(scope="module")
def calibrated(home: Path, mixture: Path) -> Any:
    return calibrate(mixture, home / "data.yaml", home / "calibrated")


def perplexities(home: Path, *folders: Path) -> dict[str, dict[str, float]]:
    """On held-out documents, by model and domain."""
    report = evaluate([str(folder) for folder in folders], home / "data.yaml", max_length=64)
    return {
        Path(model.model).name: {name: score.perplexity for name, score in model.domains.items()}
        for model in report.models
    }


def mean(by_domain: dict[str, float]) -> float:
    return float(np.exp(np.mean(np.log(list(by_domain.values())))))


# ---- good at once ----


def test_a_calibrated_mixture_beats_the_soup_everywhere(home: Path, mixture: Path, calibrated: Any) -> None:
    """And closes most of the gap to the experts on their own domains, without training."""
    branchmix.upcycle(recipe_of(home, attention="average", ffn="average"), home / "soup")
    found = perplexities(home, mixture, home / "calibrated", home / "soup", *(home / name for name in EXPERTS))
    own = {name: found[name][name] for name in dialects.DOMAINS}
    for name in dialects.DOMAINS:
        assert found["calibrated"][name] < min(found["soup"][name], found["mixture"][name])
    gap = math.log(mean(found["soup"]) / mean(own))
    assert math.log(mean(found["soup"]) / mean(found["calibrated"])) > 0.7 * gap
    for domain in calibrated.fitted.domains:
        assert domain.after < domain.before
        assert max(domain.shares, key=domain.shares.__getitem__) == domain.name


def test_what_is_no_gate_keeps_its_bytes(mixture: Path, tmp_path: Path) -> None:
    """Also where a dtype is another one than the config's."""
    shutil.copytree(mixture, tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed" / "model.safetensors")
    odd = next(name for name in tensors if "norm" in name)
    save_file(tensors | {odd: tensors[odd].bfloat16()}, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    opened = OpenedMixture(str(tmp_path / "mixed"), otherwise="")
    planned = {tensor.name: tensor.expression for tensor in measure.plan_with_gates(opened).tensors}
    assert planned.keys() == tensors.keys() and planned[odd].dtype == "BF16"
    assert all(part.ranges() is not None for part in planned.values())


def test_recipes_calibrate_at_once(home: Path, calibrated: Any) -> None:
    gates = {"data": str(home / "data.yaml")}
    report = branchmix.upcycle(
        recipe_of(home, merge={"fold_norms": True}, gates=gates), home / "from-recipe", verify=True
    )
    assert report.gates.posterior == calibrated.fitted.posterior and report.verification is not None
    one, other = (load_file(home / name / "model.safetensors") for name in ("from-recipe", "calibrated"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert not (home / "from-recipe" / "uncalibrated").exists()
    record = json.loads((home / "from-recipe" / "branchmix.json").read_text())
    assert record["recipe"]["gates"]["data"] == gates["data"]
    card = (home / "from-recipe" / "README.md").read_text()
    assert "calibrated on text of north, south, west" in card and "train the mixture" not in card
    later = json.loads((home / "calibrated" / "branchmix.json").read_text())
    assert record["changes"] == later["changes"] and record["notes"] == later["notes"], "by either way"
    (fit,) = (step["calibrated"] for step in record["changes"])
    assert set(fit["domains"]) == set(dialects.DOMAINS)
    for domain in report.gates.domains:
        assert fit["losses"][domain.name] == pytest.approx({"before": domain.before, "after": domain.after}, abs=1e-5)
        assert f"{domain.name} {math.exp(domain.before):.2f} -> {math.exp(domain.after):.2f}" in card
    (line,) = (line for line in card.splitlines() if "were calibrated on" in line)
    assert line in (home / "calibrated" / "README.md").read_text()


# ---- what is read ----


def test_held_out_documents_are_never_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = EvalData.load(home / "data.yaml")
    held_out = {d.text for chosen in select(data, dialects.tokenizer()).values() for d in chosen}
    read: list[str] = []
    real = reading.encode
    monkeypatch.setattr(
        reading, "encode", lambda tok, texts, **kw: read.extend(filter(None, texts)) or real(tok, texts, **kw)
    )
    found = reading.read(data, dialects.tokenizer())
    assert len(read) > 200 and not held_out & set(read) and not any(is_held_out(text, 0.2) for text in read)
    for domain in found.values():
        counted, measured = ({tokens.tobytes() for tokens in part} for part in (domain.counted, domain.measured))
        assert counted and measured and not counted & measured


def test_the_one_document_that_training_holds_out_is_not_read(tmp_path: Path) -> None:
    """Of few documents none may fall below the share; then training holds out the one of the lowest hash."""
    file = dialects.write(tmp_path, documents=12, share=1e-9)
    data = EvalData.load(file)
    (held_out,) = select(data, dialects.tokenizer())["north"]
    texts = list(map(dialects.document, ["north"] * 12, range(12)))
    chosen = reading._chosen(texts, 1e-9, streamed=False)
    assert held_out.text in texts and sorted([*chosen, held_out.text]) == sorted(texts)


def test_bad_data_is_refused(home: Path, mixture: Path, tmp_path: Path) -> None:
    file = dialects.write(tmp_path, documents=3)
    with pytest.raises(DataError, match=r"data.north: has only \d+ tokens .* gates need 200"):
        calibrate(mixture, file, tmp_path / "out")
    (tmp_path / "all.yaml").write_text(f"held_out: all\ndata: {{a: {{files: {home}/north.jsonl}}}}")
    with pytest.raises(RecipeError, match="held_out: all leaves no document"):
        calibrate(mixture, tmp_path / "all.yaml", tmp_path / "out")
    (tmp_path / "one.yaml").write_text(f"data: {{north: {{files: {home}/north.jsonl}}}}")
    with pytest.raises(RecipeError, match="'north' is the only domain"):
        calibrate(mixture, tmp_path / "one.yaml", tmp_path / "out")
    with pytest.raises(CheckpointError, match="not a mixture: calibrate the mixture"):
        calibrate(home / "seed", home / "data.yaml", tmp_path / "out")
    with pytest.raises(RecipeError, match="a soup has no experts"):
        branchmix.upcycle(recipe_of(home, attention="average", ffn="average", gates={"data": "x"}), tmp_path / "soup")
    with pytest.raises(RecipeError, match=r"missing.yaml: there is no such file"):
        branchmix.upcycle(recipe_of(home, gates={"data": "missing.yaml"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_refuse_bad_text_before_anything_is_merged(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "write_output", lambda *args, **kw: pytest.fail("merged"))
    short = dialects.write(tmp_path, documents=3)
    for name, text in (("all", "held_out: all\n"), ("one", ""), ("lost", "")):
        file = "lost" if name == "lost" else f"{home}/north"
        other = f", south: {{files: {home}/south.jsonl}}" if name == "lost" else ""
        (tmp_path / f"{name}.yaml").write_text(f"{text}data: {{north: {{files: {file}.jsonl}}{other}}}")
    (tmp_path / "all.yaml").write_text("held_out: all\n" + (home / "data.yaml").read_text().partition("\n")[2])
    for data, kind, reason in (
        (short, DataError, r"data.north: has only \d+ tokens"),
        (tmp_path / "all.yaml", RecipeError, "held_out: all leaves no document"),
        (tmp_path / "one.yaml", RecipeError, "'north' is the only domain"),
        (tmp_path / "lost.yaml", DataError, "^data.north: files 'lost.jsonl'"),
    ):
        for dry_run in (False, True):
            with pytest.raises(kind, match=reason):
                branchmix.upcycle(recipe_of(home, gates={"data": str(data)}), tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_replaced_is_not_calibrated(
    home: Path, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the user's beside the mixture is found before the minutes of the fit."""
    copy = Path(shutil.copytree(mixture, tmp_path / "mixture"))
    (copy / "notes.md").write_text("mine")
    monkeypatch.setattr(run, "fit", lambda *args, **kw: pytest.fail("fitted"))
    with pytest.raises(OutputError, match=r"holds notes\.md.*--out"):
        calibrate(copy, home / "data.yaml")


# ---- what is fitted ----


def test_forced_losses_are_those_of_one_hot_gates(home: Path, mixture: Path, calibrated: Any) -> None:
    """Computed here by hooks on the uncalibrated mixture, document by document."""
    model = load(mixture)
    text = reading.read(EvalData.load(home / "data.yaml"), dialects.tokenizer())
    record = json.loads((home / "calibrated" / "config.json").read_text())["document_gate"]
    for number, expert in enumerate(EXPERTS):

        def one_hot(module: Any, args: Any, output: Any, number: int = number) -> Any:
            if isinstance(module, BranchMixAttentionRouter):
                return output[0], torch.zeros_like(output[1]).index_fill_(-1, torch.tensor([number]), 1.0)
            first = torch.zeros_like(output[1]).index_fill_(-1, torch.tensor([0]), 1.0)  # of the k chosen
            return output[0], first, torch.full_like(output[2], number)

        hooks = [m.register_forward_hook(one_hot) for m in model.modules() if isinstance(m, BranchMixRouter)]
        for domain in ("north", "west"):
            total, count = 0.0, 0
            for tokens in text[domain].measured:
                ids = torch.from_numpy(tokens)[None]
                with torch.no_grad():
                    logits = model(ids).logits[0, :-1]
                total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                count += len(tokens) - 1
            assert record["losses"][domain][expert] == pytest.approx(total / count, abs=2e-5)
        for hook in hooks:
            hook.remove()


def test_the_posterior_is_chosen_on_what_is_counted_last(home: Path, mixture: Path, tmp_path: Path) -> None:
    told: list[str] = []
    out = tmp_path / "out"
    fitted = calibrate(mixture, home / "data.yaml", out, progress=lambda step, *_: told.append(step)).fitted
    text = reading.read(EvalData.load(home / "data.yaml"), dialects.tokenizer())
    stored = load_file(out / "model.safetensors")["document_gate.counts"]

    def counts(part: str) -> np.ndarray:
        documents = [np.concatenate(getattr(domain, part)) for domain in text.values()]
        return np.stack([np.bincount(tokens, minlength=len(stored)) for tokens in documents], axis=1)

    assert np.array_equal(stored.numpy(), counts("counted")) and counts("checked").sum() > 1000
    others = {m: domain.checked + domain.measured for m, domain in enumerate(text.values())}
    assert fitted.posterior == fit_posterior(counts("counted") - counts("checked"), others)
    assert told.count("reading text") == len(text) < told.count("calibrating")


def test_tokens_around_every_text_say_nothing(
    home: Path, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, a BOS would speak for the domain with the shortest documents, at each document's start."""
    folder = Path(shutil.copytree(mixture, tmp_path / "mixture"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.eos_token, tokenizer.eos_token_id
    template = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids[0] == bos[1]
    chosen_on: list[np.ndarray] = []
    monkeypatch.setattr(measure, "fit_posterior", lambda n, texts: chosen_on.append(n) or fit_posterior(n, texts))
    calibrate(folder, data=home / "data.yaml")
    assert not chosen_on[0][bos[1]].any(), "nor where the posterior's parameters are chosen"
    gates = load_file(folder / "model.safetensors")
    assert not gates["document_gate.counts"][bos[1]].any() and not gates["document_gate.evidence"][bos[1]].any()
    assert gates["document_gate.counts"].any()


def test_shares_follow_the_losses(home: Path, calibrated: Any) -> None:
    config = json.loads((home / "calibrated" / "config.json").read_text())
    record, tensors = config["document_gate"], load_file(home / "calibrated" / "model.safetensors")
    assert config["norm_topk_prob"] and config["num_experts_per_tok"] == 2 and config["routed_scaling_factor"] == 1.0
    for column, domain in enumerate(record["domains"]):
        row = np.array([record["losses"][domain][expert] for expert in EXPERTS])
        expected = log_shares(row, record["sharpness"][domain])
        for kind in ("attention", "ffn"):
            np.testing.assert_allclose(tensors[f"document_gate.{kind}"][:, column], expected, atol=2e-3)
    routers = [key for key in tensors if key.endswith(("mlp.gate.weight", "expert_gate.weight"))]
    assert routers and (calibrated.fitted.routers == "kept") == any(tensors[key].any() for key in routers)
    assert tensors["document_gate.counts"].dtype == torch.int32


def test_domains_need_no_expert_of_their_name(home: Path, mixture: Path, tmp_path: Path) -> None:
    """The label is not the target: a domain of any name goes to whoever is good at it."""
    names = {"alps": "north", "desert": "south"}
    (tmp_path / "data.yaml").write_text(
        "data: {" + ", ".join(f"{name}: {{files: {home}/{file}.jsonl}}" for name, file in names.items()) + "}"
    )
    report = calibrate(mixture, tmp_path / "data.yaml", tmp_path / "out")
    assert json.loads(json.dumps(report.as_dict()))["domains"][0]["name"] == "alps"
    for domain in report.fitted.domains:
        assert max(domain.shares, key=domain.shares.__getitem__) == names[domain.name]


def test_routers_that_know_something_are_kept(home: Path, mixture: Path, tmp_path: Path) -> None:
    """Of a mixture that may have been trained: here, with routers that were fitted to single tokens."""
    report = calibrate(mixture, home / "data.yaml", tmp_path / "tokens", token_only=True)
    assert report.fitted.routers == "fitted" and not report.as_dict()["document_gate"]
    before = load_file(tmp_path / "tokens" / "model.safetensors")
    assert not [key for key in before if key.startswith("document_gate")]
    found = perplexities(home, mixture, tmp_path / "tokens")
    assert mean(found["tokens"]) < mean(found["mixture"])
    (tmp_path / "tokens" / "branchmix.json").unlink()  # as if saved by a trainer
    again = calibrate(tmp_path / "tokens", home / "data.yaml", tmp_path / "both").fitted
    after = load_file(tmp_path / "both" / "model.safetensors")
    routers = [key for key in before if key.endswith(("mlp.gate.weight", "expert_gate.weight"))]
    assert routers and all(torch.equal(before[key], after[key]) == (again.routers == "kept") for key in routers)
    assert np.mean([d.after for d in again.domains]) < np.mean([d.before for d in again.domains]) + NEARLY


@pytest.mark.parametrize("token_only", [False, True])
def test_sigmoid_gates_are_fitted_too(token_only: bool, home: Path, calibrated: Any, tmp_path: Path) -> None:
    """About as good as softmax gates."""
    routing = {"ffn": {"top_k": 2, "normalize": True, "score": "sigmoid"}}
    branchmix.upcycle(recipe_of(home, routing=routing, merge={"fold_norms": True}), tmp_path / "mixture")
    fitted = calibrate(tmp_path / "mixture", home / "data.yaml", tmp_path / "out", token_only=token_only).fitted
    assert fitted.config["scoring_func"] == "sigmoid"
    after, before = (np.mean([getattr(d, name) for d in fitted.domains]) for name in ("after", "before"))
    softmax = np.mean([domain.after for domain in calibrated.fitted.domains])
    assert after < before - 0.05
    assert token_only or after < softmax + 0.1 * (before - softmax)


def test_raw_sigmoid_gates_are_fitted_to_sum_to_1(home: Path, tmp_path: Path) -> None:
    """Whether the document or the token says which expert is wanted, the FFN output has the dense scale; and the losses
    are those of what is written."""
    routing = {"ffn": {"top_k": 2, "score": "sigmoid"}}
    merged = recipe_of(home, routing=routing, merge={"fold_norms": True}, routed_scaling_factor="auto")
    branchmix.upcycle(merged, tmp_path / "mixture")
    text = reading.read(EvalData.load(home / "data.yaml"), dialects.tokenizer())
    for out, token_only in (("documents", False), ("tokens", True)):
        fitted = calibrate(
            tmp_path / "mixture", home / "data.yaml", tmp_path / out, token_only=token_only, keep_top_k=True
        ).fitted
        assert not fitted.config["norm_topk_prob"] and fitted.config["scoring_func"] == "sigmoid"
        model = load(tmp_path / out)
        after = losses(model, {name: domain.measured for name, domain in text.items()})
        assert {domain.name: domain.after for domain in fitted.domains} == pytest.approx(after, abs=1e-5)
        sums: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, BranchMixFFNRouter):
                module.register_forward_hook(lambda module, args, output, sums=sums: sums.append(output[1].sum(-1)))
        with torch.no_grad():
            for domain in text.values():
                model(torch.from_numpy(domain.measured[0])[None])
        scale = torch.cat([each[20:] for each in sums]).mean() * model.config.routed_scaling_factor
        assert scale == pytest.approx(1.0, abs=0.1), out


def test_mixtures_that_may_be_trained(home: Path, mixture: Path, calibrated: Any, tmp_path: Path) -> None:
    """Also after calibrate, experts that come or go, and an upload, which all write a record."""

    def may_be_trained(folder: Path) -> bool:
        return OpenedMixture(str(folder), otherwise="").may_be_trained

    assert not may_be_trained(mixture) and not may_be_trained(home / "calibrated")
    trained = Path(shutil.copytree(mixture, tmp_path / "trained", ignore=shutil.ignore_patterns("branchmix.json")))
    (trained / "training.json").write_text(json.dumps({"config": {"model": str(mixture)}, "tokens": 1}))
    branchmix.remove_expert(trained, "west", tmp_path / "smaller")
    branchmix.add_expert(tmp_path / "smaller", "west", home / "west", tmp_path / "again")
    pushed = {file.name: file.content for file in branchmix.push(trained, "org/name", dry_run=True).files}
    downloaded = Path(shutil.copytree(mixture, tmp_path / "downloaded"))
    (downloaded / "branchmix.json").write_bytes(pushed["branchmix.json"])
    for folder in (trained, tmp_path / "smaller", tmp_path / "again", downloaded):
        assert may_be_trained(folder), folder
        assert branchmix.inspect(folder).lossless is None, "that was said of the merge"


# ---- what is written ----


def test_only_gates_change(mixture: Path, home: Path, calibrated: Any) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (mixture, home / "calibrated"))
    new = {f"document_gate.{name}" for name in ("evidence", "prior", "attention", "ffn", "counts")}
    assert after.keys() - before.keys() == new and before.keys() <= after.keys()
    for key in before:
        assert key.endswith(("mlp.gate.weight", "expert_gate.weight")) or torch.equal(before[key], after[key]), key


def test_what_the_merge_found_stays_on_record(
    home: Path, mixture: Path, tmp_path: Path, calibrated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it lost anything, and its notes beside those of the fit, also when it is calibrated later."""
    assert branchmix.inspect(mixture).lossless is branchmix.inspect(home / "calibrated").lossless is True
    twice = recipe_of(home, gates={"data": str(home / "data.yaml")})
    twice["experts"][2] = {"name": "west", "model": twice["experts"][0]["model"]}
    real = measure.fit
    monkeypatch.setattr(measure, "fit", lambda *args, **kw: replace(real(*args, **kw), notes=["of the fit"]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(twice))
    shown = CliRunner().invoke(app, ["upcycle", str(recipe), str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    del twice["gates"]
    branchmix.upcycle(twice, tmp_path / "later")
    monkeypatch.setattr(run, "fit", measure.fit)
    calibrate(tmp_path / "later", home / "data.yaml")
    for folder in (tmp_path / "out", tmp_path / "later"):
        record = json.loads((folder / "branchmix.json").read_text())
        assert record["lossless"] is True and branchmix.inspect(folder).lossless is True
        (note,) = record["notes"]
        assert "is the same model as" in note and record["changes"][-1]["calibrated"]["notes"] == ["of the fit"]
        card = (folder / "README.md").read_text()
        assert "Lossless" in card and "; of the fit" in card and f"- {note}" in card
        assert f"note: {note}" in shown.stderr and "note: of the fit" in shown.stderr


def test_in_place_and_again(home: Path, mixture: Path, tmp_path: Path, calibrated: Any) -> None:
    copy = Path(shutil.copytree(mixture, tmp_path / "mixture"))
    (copy / "LICENSE").write_text("mine")
    calibrate(copy, home / "data.yaml")
    first = load_file(copy / "model.safetensors")
    expected = load_file(home / "calibrated" / "model.safetensors")
    assert all(torch.equal(first[key], expected[key]) for key in expected)
    assert (copy / "LICENSE").read_text() == "mine" and not list(tmp_path.glob(".*"))
    calibrate(copy, home / "data.yaml")
    again = load_file(copy / "model.safetensors")
    for key in first:
        torch.testing.assert_close(again[key], first[key], rtol=0, atol=1e-4)
    assert len(json.loads((copy / "branchmix.json").read_text())["changes"]) == 2
    with pytest.raises(OutputError, match="--force"):
        calibrate(copy, home / "data.yaml", home / "calibrated")
    (copy / "training").mkdir()
    with pytest.raises(OutputError, match="holds the folder training"):
        calibrate(copy, home / "data.yaml")


def test_a_failed_fit_leaves_nothing(
    home: Path, mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(mixture, tmp_path / "mixture"))
    before = {file.name: file.read_bytes() for file in copy.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "write_output", fail)
    with pytest.raises(KeyboardInterrupt):
        calibrate(copy, home / "data.yaml")
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mixture"]


# ---- experts in and out ----


def test_removed_experts_leave_the_gates(home: Path, tmp_path: Path, calibrated: Any) -> None:
    branchmix.remove_expert(home / "calibrated", "south", tmp_path / "smaller")
    model, whole = load(tmp_path / "smaller"), load(home / "calibrated")
    assert torch.equal(model.document_gate.ffn, whole.document_gate.ffn[[0, 1, 3]])
    assert torch.equal(model.document_gate.evidence, whole.document_gate.evidence)
    losses = model.config.document_gate["losses"]
    assert set(losses) == set(dialects.DOMAINS) and all(
        set(row) == {"seed", "north", "west"} for row in losses.values()
    )
    found = perplexities(home, tmp_path / "smaller", home / "calibrated")
    for domain in ("north", "west"):
        assert found["smaller"][domain] < 1.01 * found["calibrated"][domain]


def test_domains_go_to_the_next_best_expert(home: Path, tmp_path: Path, calibrated: Any) -> None:
    """Also where the expert that leaves had everything, so that what the gates hold of the others says nothing."""
    sure = Path(shutil.copytree(home / "calibrated", tmp_path / "sure"))
    config, tensors = json.loads((sure / "config.json").read_text()), load_file(sure / "model.safetensors")
    config["document_gate"]["losses"]["south"] = {"seed": 4.0, "north": 5.0, "south": 0.5, "west": 3.8}
    config["document_gate"]["sharpness"]["south"] = 0.1
    row = np.array([4.0, 5.0, 0.5, 3.8])
    for kind in ("attention", "ffn"):
        tensors[f"document_gate.{kind}"][:, 1] = torch.from_numpy(log_shares(row, 0.1))
        assert (tensors[f"document_gate.{kind}"][[0, 1, 3], 1] == -30).all()
    (sure / "config.json").write_text(json.dumps(config))
    save_file(tensors, sure / "model.safetensors", metadata={"format": "pt"})
    branchmix.remove_expert(sure, "south", tmp_path / "left")
    left = load_file(tmp_path / "left" / "model.safetensors")
    for kind in ("attention", "ffn"):
        shares = left[f"document_gate.{kind}"]
        np.testing.assert_allclose(shares[:, 1], log_shares(row[[0, 1, 3]], 0.1), atol=1e-5)
        assert torch.equal(shares[:, [0, 2]], tensors[f"document_gate.{kind}"][[0, 1, 3]][:, [0, 2]])


def test_added_experts_are_silent_until_there_is_text(home: Path, tmp_path: Path) -> None:
    """And then their own domain's text is enough: counts and losses of the others are in the checkpoint."""
    two = {**recipe_of(home, merge={"fold_norms": True}), "gates": {"data": str(home / "data.yaml")}}
    two["experts"] = [expert for expert in two["experts"] if expert["name"] != "west"]
    text = home / "two.yaml"
    text.write_text("\n".join(line for line in (home / "data.yaml").read_text().splitlines() if "west" not in line))
    two["gates"] = {"data": str(text)}
    branchmix.upcycle(two, tmp_path / "two")
    report = branchmix.add_expert(tmp_path / "two", "west", home / "west", tmp_path / "three")
    assert any("know nothing of 'west'" in note and "branchmix calibrate" in note for note in report.plan.notes)
    before, added = perplexities(home, tmp_path / "two", tmp_path / "three").values()
    assert added["north"] == pytest.approx(before["north"], rel=1e-3)
    own = home / "west.yaml"
    own.write_text(f"held_out: {{share: 0.2}}\ndata: {{west: {{files: {home}/west.jsonl}}}}")
    with pytest.raises(RecipeError, match="data: lacks text of north, south"):
        calibrate(tmp_path / "three", own, tmp_path / "tokens", token_only=True)
    fitted = calibrate(tmp_path / "three", own, tmp_path / "fitted").fitted
    assert "know nothing of" not in (tmp_path / "fitted" / "README.md").read_text()
    assert [domain.name for domain in fitted.domains] == ["north", "south", "west"]
    assert any("west: not measured on north" in note for note in fitted.notes)
    assert max(fitted.domains[2].shares, key=fitted.domains[2].shares.__getitem__) == "west"
    found = perplexities(home, tmp_path / "fitted")["fitted"]
    assert found["west"] < 0.95 * added["west"]
    assert found["north"] < 1.05 * before["north"], "a third domain makes documents a little less certain, no more"


def test_documents_longer_than_the_table_of_positions(home: Path, tmp_path: Path) -> None:
    """Only their beginnings are measured."""
    for number, name in enumerate(("seed", "a")):
        model = BY_NAME["gpt2"].model(number, vocab_size=len(dialects.tokenizer()), n_positions=32)
        model.save_pretrained(tmp_path / name)
        dialects.tokenizer().save_pretrained(tmp_path / name)
    experts = [{"name": "a", "model": str(tmp_path / "a")}]
    branchmix.upcycle({"seed": str(tmp_path / "seed"), "experts": experts}, tmp_path / "gpt2")
    fitted = calibrate(tmp_path / "gpt2", home / "data.yaml", token_only=True).fitted
    assert fitted.routers == "fitted"
    assert {domain.measured_tokens % 32 for domain in fitted.domains} == {0}, "all are longer"


# ---- elsewhere ----


def test_inspect_and_export_know_of_the_gates(home: Path, tmp_path: Path, calibrated: Any) -> None:
    runner = CliRunner()
    result = runner.invoke(app, ["inspect", str(home / "calibrated"), "--json"])
    found = json.loads(result.stdout)
    assert (
        found["document_gate"] == list(dialects.DOMAINS)
        and found["parameters"]["stored"] == found["parameters"]["total"]
    )
    assert "document gates: north, south, west" in runner.invoke(app, ["inspect", str(home / "calibrated")]).stdout
    branchmix.export_model(home / "calibrated", tmp_path / "dense", to="dense", expert="north")
    assert not [key for key in load_file(tmp_path / "dense" / "model.safetensors") if "document_gate" in key]
    gates = {"data": str(home / "data.yaml")}
    branchmix.upcycle(recipe_of(home, attention="average", gates=gates), tmp_path / "btx")
    with pytest.raises(branchmix.errors.CompatibilityError, match=r"document gates .* --token-only"):
        branchmix.export_model(tmp_path / "btx", tmp_path / "native", to="mixtral")
    calibrate(tmp_path / "btx", home / "data.yaml", tmp_path / "tokens", token_only=True)
    branchmix.export_model(tmp_path / "tokens", tmp_path / "native", to="mixtral")


def test_the_command(home: Path, mixture: Path, tmp_path: Path) -> None:
    arguments = ["calibrate", str(mixture), "--data", str(home / "data.yaml"), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "best expert alone" in shown.stdout and "wrote" in shown.stdout
    assert re.search(r"north +[\d,]+ +[\d.]+ +[\d.]+ +[\d.]+ \(north\)", shown.stdout)


def test_top_k_and_raw_gates_stay_where_that_is_asked_for(home: Path, tmp_path: Path) -> None:
    """By the recipe and by the command alike; but for that, gates of top-1 become those of two experts."""
    top1 = {"routing": {"ffn": {"top_k": 1, "normalize": False}, "attention": {"top_k": 1}}}
    raw = recipe_of(home, **top1, routed_scaling_factor="auto")
    branchmix.upcycle({**raw, "gates": {"data": str(home / "data.yaml"), "keep_top_k": True}}, tmp_path / "recipe")
    branchmix.upcycle(raw, tmp_path / "raw")
    for out, option in (("kept", ["--keep-top-k"]), ("shared", [])):
        command = ["calibrate", str(tmp_path / "raw"), "--data", str(home / "data.yaml"), "--out", str(tmp_path / out)]
        assert CliRunner().invoke(app, [*command, *option]).exit_code == 0
    names = ("num_experts_per_tok", "attention_num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor")
    configs = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("recipe", "kept", "shared")}
    assert [configs["shared"][name] for name in names] == [2, 2, True, 1.0]
    assert [configs["kept"][name] for name in names] == [1, 1, False, 1.0]
    assert configs["recipe"] == configs["kept"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("recipe", "kept"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def with_biases(folder: Path, out: Path, std: float) -> Path:
    """A copy whose FFN routers choose by random biases too."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    biases = {
        name.replace("weight", "expert_bias"): torch.randn(4, generator=torch.Generator().manual_seed(len(name))) * std
        for name in tensors
        if name.endswith("mlp.gate.weight")
    }
    save_file(tensors | biases, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"expert_bias": True}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_selection_biases_have_no_part_in_a_fit(home: Path, mixture: Path, calibrated: Any, tmp_path: Path) -> None:
    """They were moved for the gates as they were: what is written is what a fit without them writes."""
    report = calibrate(with_biases(mixture, tmp_path / "biased", 1.0), home / "data.yaml", tmp_path / "out")
    assert any("selection biases are dropped" in note for note in report.fitted.notes)
    ours, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", home / "calibrated"))
    assert ours.keys() == plain.keys() and all(torch.equal(ours[name], plain[name]) for name in plain)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", home / "calibrated")]
    assert configs[0] == configs[1] and configs[0]["expert_bias"] is False
    found = {d.name: (d.before, d.after) for d in report.fitted.domains}
    for domain in calibrated.fitted.domains:
        assert found[domain.name][1] == domain.after and found[domain.name][0] != domain.before


def test_better_gates_are_kept(home: Path, tmp_path: Path, calibrated: Any) -> None:
    """Such as trained ones, with their biases: here, a fit to text whose domains are mixed up."""
    rows = [json.dumps({"text": dialects.document(domain, n)}) for n in range(30) for domain in dialects.DOMAINS]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    files = {"north": f"{home}/north.jsonl", "south": f"{home}/south.jsonl", "west": "a.jsonl"}
    sources = ", ".join(f"{name}: {{files: {file}}}" for name, file in files.items())
    (tmp_path / "mixed.yaml").write_text(f"data: {{{sources}}}")
    start = with_biases(home / "calibrated", tmp_path / "start", 1e-3)
    record = json.loads((start / "branchmix.json").read_text())
    (start / "branchmix.json").write_text(json.dumps({**record, "notes": [NOT_CALIBRATED.format(name="west")]}))
    report = calibrate(start, tmp_path / "mixed.yaml", tmp_path / "out").fitted
    before, after = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "out"))
    assert report.routers == "unchanged" and any("better than a fit's" in note for note in report.notes)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["document_gate"]["domains"] and config["expert_bias"]
    assert "know nothing of 'west'" in (tmp_path / "out" / "README.md").read_text(), "nor do the gates now"


def test_forced_rows_are_the_mixture_with_one_expert(home: Path, calibrated: Any) -> None:
    """`eval --forced`: what was measured when the gates were fitted, now on held-out documents."""
    report = evaluate([str(home / "calibrated")], home / "data.yaml", max_length=64, forced=True)
    assert [model.model.partition(": ")[2] for model in report.models] == ["", *(f"{name} only" for name in EXPERTS)]
    model = load(home / "calibrated")
    texts = [d.text for d in select(EvalData.load(home / "data.yaml"), dialects.tokenizer())["west"]]
    with one_hot_gates(model, 3):
        scores = score_documents(model, dialects.tokenizer(), texts, max_length=64)
        expected = aggregate(score for _, score in scores).perplexity
    found = {model.model: model.domains["west"].perplexity for model in report.models}
    assert found[f"{home / 'calibrated'}: west only"] == pytest.approx(expected, rel=1e-5)
    assert found[f"{home / 'calibrated'}: seed only"] > 1.1 * expected
