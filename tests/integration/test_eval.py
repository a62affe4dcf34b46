"""`branchmix eval`: which documents, resuming, ensembles, and what the command prints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from typer.testing import CliRunner

import corpora
from branchmix.cli import app
from branchmix.data.config import EvalData, HeldOut, Source
from branchmix.errors import CheckpointError, DataError, RecipeError
from branchmix.evaluate import evaluation
from branchmix.evaluate.documents import select
from branchmix.evaluate.evaluation import evaluate
from branchmix.evaluate.perplexity import score_documents
from branchmix.evaluate.scores import ScoredDocument, aggregate, ensemble_log_probs
from branchmix.likelihood.records import FILE, Journal, model_hash
from branchmix.upcycling import upcycle
from mixtures import load, recipe

MAX_LENGTH = 16


@pytest.fixture(scope="module")
def models(siblings: Callable[..., dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three dense siblings and their mixture, with a tokenizer."""
    home = tmp_path_factory.mktemp("models")
    found = {}
    for name, path in siblings("llama", vocab_size=300).items():
        found[name] = Path(shutil.copytree(path, home / name))
        corpora.tokenizer().save_pretrained(home / name)
    upcycle(recipe(found), home / "mixture")
    return {**found, "mixture": home / "mixture"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 40 documents and one of 20, all of which count."""
    corpora.write_jsonl(tmp_path / "a.jsonl", range(40))
    corpora.write_jsonl(tmp_path / "b.jsonl", range(100, 120))
    return data_file(tmp_path, "all")


def data_file(folder: Path, held_out: Any = None, **keys: Any) -> Path:
    content: dict[str, Any] = {"data": {"prose": {"files": "a.jsonl"}, "maths": {"files": "b.jsonl"}}, **keys}
    if held_out is not None:
        content["held_out"] = held_out
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "data.yaml"


# ---- documents ----


@pytest.mark.parametrize(("share", "tokens"), [(0.2, 150), (0.5, 65536), (1e-9, 100), (0.3, 1)])
def test_the_documents_are_those_that_training_holds_out(tmp_path: Path, share: float, tokens: int) -> None:
    corpora.write_jsonl(tmp_path / "a.jsonl", range(120))
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() * 2)  # each document twice
    corpora.write_jsonl(tmp_path / "b.jsonl", range(200, 230))
    file = data_file(tmp_path, {"share": share, "tokens": tokens})
    chosen = select(EvalData.load(file), corpora.tokenizer())
    sources = {"prose": Source(files="a.jsonl"), "maths": Source(files="b.jsonl")}
    trained = corpora.corpus(tmp_path, sources, held_out=HeldOut(share=share, tokens=tokens))
    for name in sources:
        assert [document.text for document in chosen[name]] == trained.held_out_texts(name)


def test_all_documents_or_some_of_them(tmp_path: Path, data: Path) -> None:
    everything = select(EvalData.load(data), corpora.tokenizer())
    assert [document.text for document in everything["prose"]] == [corpora.text(n) for n in range(40)]
    few = select(EvalData.load(data), corpora.tokenizer(), limit=3)
    assert few["prose"] == everything["prose"][:3]
    some = select(EvalData.load(data_file(tmp_path, {"share": 1.0, "documents": 7})), corpora.tokenizer())
    assert [len(chosen) for chosen in some.values()] == [7, 7]
    assert {document.hash for document in some["prose"]} < {document.hash for document in everything["prose"]}
    with pytest.raises(DataError, match=r"data.prose: has no document"):
        select(EvalData.load(data_file(tmp_path, {"share": 0.0})), corpora.tokenizer())
    (tmp_path / "b.jsonl").unlink()
    for held_out in ("all", {"share": 0.5}):
        with pytest.raises(DataError, match=r"^data.maths: files 'b.jsonl': no file matches"):
            select(EvalData.load(data_file(tmp_path, held_out)), corpora.tokenizer())


def test_a_run_file_names_what_the_run_held_out(tmp_path: Path, data: Path) -> None:
    plain = EvalData.load(data_file(tmp_path, {"share": 0.5}))
    keys = {"model": "seed", "out": "out", "budget": {"tokens": "1M"}, "learning_rate": {"peak": 0.1}}
    of_run = EvalData.load(data_file(tmp_path, {"share": 0.5}, **keys))
    assert of_run.model_dump() == plain.model_dump() and of_run.folder == tmp_path
    with pytest.raises(RecipeError, match="there is no such key"):
        EvalData.load(data_file(tmp_path, {"share": 0.5}, model="seed"))
    with pytest.raises(RecipeError, match="either tokens or documents"):
        EvalData.load(data_file(tmp_path, {"tokens": 5, "documents": 5}))


# ---- the command ----


def test_models_side_by_side(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    names = [str(models[name]) for name in ("seed", "code", "mixture")]
    options = ["--data", str(data), "--max-length", str(MAX_LENGTH), "--dtype", "float32"]
    result = CliRunner().invoke(app, ["eval", *names, *options, "--json", "--ensemble", "seed,code"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["models"]
    assert [model["model"] for model in found] == [*names, "ensemble of seed, code"]
    assert {model["prefix"] for model in found} == {"<|endoftext|>"}
    for name, model in zip(names, found, strict=False):
        texts = {"prose": [corpora.text(n) for n in range(40)], "maths": [corpora.text(n) for n in range(100, 120)]}
        for domain, numbers in model["domains"].items():
            scores = score_documents(load(Path(name)), corpora.tokenizer(), texts[domain], max_length=MAX_LENGTH)
            wanted = aggregate(score for _, score in scores)
            assert numbers == pytest.approx(vars(wanted), rel=1e-5)
    table = CliRunner().invoke(app, ["eval", *names[:2], *options, "--limit", "3"])
    assert table.exit_code == 0 and table.stdout.count("* ") == 3  # the best of two domains, and the legend
    assert "±" in table.stdout and "held-out" not in table.output


def test_held_out_by_default_is_said(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    report = evaluate([str(models["seed"])], data_file(tmp_path), max_length=MAX_LENGTH)
    assert "held-out documents only" in report.notes[0]


# ---- records ----


def test_a_killed_evaluation_goes_on(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(models["seed"]), str(models["mixture"])]
    whole = evaluate(names, data, max_length=MAX_LENGTH)
    out = tmp_path / "out"

    def stop(step: str, done: int, total: int) -> None:
        if step == "mixture: prose" and done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(names, data, out=out, max_length=MAX_LENGTH, batch_tokens=32, progress=stop)
    assert not (out / "results.json").exists()
    file = out / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-40])  # the last line is torn, as after a power cut
    kept = file.read_bytes()
    computed = []
    score = evaluation.score_documents

    def counted(model: Any, tokenizer: Any, texts: Any, **options: Any) -> Any:
        computed.append(len(texts))
        return score(model, tokenizer, texts, **options)

    monkeypatch.setattr(evaluation, "score_documents", counted)
    resumed = evaluate(names, data, out=out, max_length=MAX_LENGTH)
    assert file.read_bytes().startswith(kept)
    assert [len(computed), computed[1]] == [2, 20] and 0 < computed[0] < 40  # of the mixture, what was missing
    assert_same(resumed, whole)
    assert json.loads((out / "results.json").read_text()) == resumed.as_dict()
    again = evaluate(names, data, out=out, max_length=MAX_LENGTH)
    assert again.as_dict() == resumed.as_dict() and len(computed) == 2
    evaluate(names[:1], data, out=out, max_length=MAX_LENGTH, stride=3)
    assert computed[2:] == [40, 20]  # another window is another result


def test_documents_of_two_domains_are_not_on_record_in_a_fresh_folder(models: dict[str, Path], tmp_path: Path) -> None:
    """Nor is a model that is given twice; what an earlier run wrote is, in every domain that has it."""
    corpora.write_jsonl(tmp_path / "a.jsonl", range(6))
    corpora.write_jsonl(tmp_path / "b.jsonl", range(3, 8))
    names, data = [str(models["seed"])] * 2, data_file(tmp_path, "all")
    first = evaluate(names, data, out=tmp_path / "out", max_length=MAX_LENGTH)
    assert not [note for note in first.notes if "on record" in note]
    second = evaluate(names[:1], data, out=tmp_path / "out", max_length=MAX_LENGTH)
    assert f"{names[0]}: 11 of 11 documents were on record" in second.notes


def test_a_dtype_has_one_name_on_record(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    given: Any = {"out": tmp_path / "out", "max_length": MAX_LENGTH, "limit": 2}
    for name in ("bfloat16", "bf16", "torch.bfloat16"):
        found = evaluate([str(models["seed"])], data, **given, dtype=name)
        assert found.models[0].dtype == "bfloat16"
        assert any("on record" in note for note in found.notes) == (name != "bfloat16")


def test_a_resumed_evaluation_has_the_numbers_of_one_that_was_not_stopped(
    models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Bit for bit, wherever it was stopped; and further documents are computed alone."""
    given: Any = {"max_length": MAX_LENGTH, "batch_tokens": 100, "dtype": "float32"}
    evaluate([str(models["mixture"])], data, out=tmp_path / "whole", **given)
    whole = log_probs_in(tmp_path / "whole")
    for share in (0.2, 0.5, 0.9):
        out = tmp_path / str(share)

        def stop(step: str, done: int, total: int, share: float = share) -> None:
            if done > share * total:
                raise KeyboardInterrupt

        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                evaluate([str(models["mixture"])], data, out=out, progress=stop, **given)
        lines = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
        (out / "records.jsonl").write_bytes(b"".join(lines[:-2]))  # a batch of which some documents are on record
        assert 0 < len(log_probs_in(out)) < 60
        resumed = evaluate([str(models["mixture"])], data, out=out, **given)
        assert log_probs_in(out) == whole
        assert resumed.as_dict() == json.loads((tmp_path / "whole" / "results.json").read_text())


def log_probs_in(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return {line["document"]: line["log_probs"] for line in lines if "document" in line}


def test_halves_of_surrogate_pairs_are_replaced_and_counted(models: dict[str, Path], tmp_path: Path) -> None:
    texts = ["half \ud83d of a pair", *(corpora.text(n) for n in range(5))]
    scores = []
    for replaced in (False, True):
        rows = [text.replace("\ud83d", "\ufffd") if replaced else text for text in texts]
        for name in "ab":
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        report = evaluate([str(models["seed"])], data_file(tmp_path, "all"), max_length=MAX_LENGTH)
        notes = [note for note in report.notes if "half of a surrogate pair" in note]
        assert len(notes) == (0 if replaced else 2)
        scores.append(report.as_dict())
    assert scores[0] == scores[1]


def assert_same(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours.models, theirs.models, strict=True):
        for name, score in b.domains.items():
            assert vars(a.domains[name]) == pytest.approx(vars(score), rel=1e-5)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("branchmix.evaluate.evaluation.evaluate", interrupted)
    with_records = CliRunner().invoke(app, ["eval", "seed", "--out", str(tmp_path)])
    assert f"rerun the command to resume from the records in {tmp_path}" in with_records.stderr
    without = CliRunner().invoke(app, ["eval", "seed"])
    assert with_records.exit_code == without.exit_code == 130 and "on record" not in without.stderr


def test_a_model_is_known_by_its_content(models: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(models["seed"], tmp_path / "copy"))
    assert model_hash(copy) == model_hash(models["seed"]) != model_hash(models["code"])
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_hash(copy) != model_hash(models["seed"])


def test_many_may_write_at_once(tmp_path: Path) -> None:
    def work(writer: int) -> None:
        journal = Journal(tmp_path, FILE, "document")
        for number in range(25):
            scored = ScoredDocument(np.full(3000, writer + number / 100, dtype=np.float32), number)
            journal.add({"model": f"model {writer % 2}", "document": str(number), **scored.as_record()})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 100
    journal = Journal(tmp_path, FILE, "document")
    for writer in range(2):
        for number in range(25):
            found = ScoredDocument.from_record(journal.known[f"model {writer}", str(number)])
            assert (found.tokens, found.bytes) == (3000, number)
            assert found.log_probs[0] in (np.float32(writer + number / 100), np.float32(writer + 2 + number / 100))


def test_a_line_waits_for_the_one_being_written(tmp_path: Path) -> None:
    Journal(tmp_path, FILE, "document").add({"model": "model"})
    file = tmp_path / "records.jsonl"
    with ThreadPoolExecutor(1) as pool:
        with FileLock(tmp_path / "records.lock"), file.open("ab") as other:
            other.write(b'{"model": "other", ')
            other.flush()
            waiting = pool.submit(Journal(tmp_path, FILE, "document").add, {"model": "mine"})
            time.sleep(0.3)
            other.write(b'"path": null}\n')
        waiting.result()
    assert [json.loads(line)["model"] for line in file.read_text().splitlines()] == ["model", "other", "mine"]


# ---- ensembles ----


@torch.no_grad()
def naive_ensemble(members: list[Any], tokens: list[int], prior: list[float], posterior: bool) -> float:
    """Nats of a text under the mixed distribution over the whole vocabulary, token by token."""
    weights = torch.tensor(prior, dtype=torch.float64)
    total = 0.0
    for t in range(1, len(tokens)):
        p_EV = torch.stack([m(torch.tensor([tokens[:t]])).logits[0, -1].double().softmax(-1) for m in members])
        mixed_V = (weights[:, None] * p_EV).sum(0)
        assert float(mixed_V.sum()) == pytest.approx(1.0)
        total -= float(mixed_V[tokens[t]].log())
        if posterior:
            weights = weights * p_EV[:, tokens[t]]
            weights = weights / weights.sum()
    return total


@pytest.mark.parametrize("posterior", [True, False])
@pytest.mark.parametrize("words", ["seed,code,math", "seed=2,math=6"])
def test_an_ensemble_mixes_whole_distributions(
    models: dict[str, Path], data: Path, words: str, posterior: bool
) -> None:
    names = [str(models[name]) for name in ("seed", "code", "math")]
    report = evaluate(names, data, max_length=64, limit=2, dtype="float32", ensemble=words, posterior=posterior)
    members, prior = (["seed", "code", "math"], [1 / 3] * 3) if "=" not in words else (["seed", "math"], [0.25, 0.75])
    dense = [load(models[name]) for name in members]
    texts = [corpora.text(n) for n in range(2)]
    prefix = corpora.tokenizer().eos_token_id
    nats = [
        naive_ensemble(dense, [prefix, *corpora.tokenizer()(text)["input_ids"]], prior, posterior) for text in texts
    ]
    bits = sum(nats) / math.log(2) / sum(map(len, texts))
    assert report.models[-1].domains["prose"].bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert report.models[-1].ensemble is not None
    assert list(report.models[-1].ensemble["members"].values()) == pytest.approx(prior)


def test_the_posterior_makes_a_text_as_likely_as_under_a_mixture_of_its_members() -> None:
    logp_ET = -np.random.default_rng(0).gamma(2.0, 1.5, size=(3, 500))
    prior = [0.5, 0.3, 0.2]
    mixed_T = ensemble_log_probs(logp_ET, prior_E=prior)
    assert mixed_T.sum() == pytest.approx(np.logaddexp.reduce(np.log(prior) + logp_ET.sum(1)))
    never = ensemble_log_probs(logp_ET, prior_E=[1.0, 0.0, 0.0])
    np.testing.assert_allclose(never, logp_ET[0])


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": "seed,cod"}, "'cod' is not one of the models"),
        ({"ensemble": ""}, "ensemble: '' is not one of the models"),
        ({"posterior": False}, "--fixed-prior: is about an ensemble: name its members with --ensemble"),
        ({"forced": True}, "--forced: none of the models is a mixture: leave it out"),
        ({"ensemble": "seed,seed"}, "is listed twice"),
        ({"ensemble": "seed=0.5,code"}, "give a share"),
        ({"ensemble": "seed=x,code"}, "'x' is not a share"),
        ({"max_length": 65}, "max_length: 65 is more than the 64 positions"),
        ({"stride": 17}, "stride: 17 does not fit"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
    ],
)
def test_mistakes_are_one_line(models: dict[str, Path], data: Path, options: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        evaluate([str(models[n]) for n in ("seed", "code")], data, **{"max_length": MAX_LENGTH, **options})
    assert "\n" not in str(caught.value)


def test_broken_models_are_one_line(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(models["seed"], tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer files"):
        evaluate([str(bare)], data)
    broken = Path(shutil.copytree(models["seed"], tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="broken: transformers cannot load it"):
        evaluate([str(broken)], data, max_length=MAX_LENGTH)
