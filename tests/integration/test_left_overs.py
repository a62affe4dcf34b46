"""Files that do not count: an adapter's beside the merged weights, quantisation that is gone; and files that belong to
a tokenizer although they lie in a folder of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import branchmix
import corpora
from bad_inputs import config as edit_config
from branchmix.checkpoint.companions import TEMPLATES
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.errors import BranchMixError, CheckpointError
from branchmix.evaluate.evaluation import evaluate
from branchmix.likelihood import loading
from branchmix.likelihood.loading import load_language_model
from branchmix.likelihood.records import model_hash
from branchmix.train.models import TokenizerFiles
from mixtures import close, load, recipe, tokens
from tokenizers_of_bytes import sentencepiece_model
from training import command, settings, write_run, write_text

peft = pytest.importorskip("peft")

Siblings = Callable[..., dict[str, Path]]
NOTE = "an adapter's files (adapter_config.json) lie beside the model's weights: they are ignored"


@pytest.fixture
def models(siblings: Siblings, tmp_path: Path) -> dict[str, Path]:
    """A seed; an adapter of it, one with the base's config.json beside it; and the merged model, alone and with the
    adapter's files in its folder."""
    found = {"seed": Path(shutil.copytree(siblings("llama", vocab_size=300)["seed"], tmp_path / "seed"))}
    corpora.tokenizer().save_pretrained(found["seed"])
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(found["seed"])
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(base, options)
    for name in ("adapter", "axolotl"):
        tuned.save_pretrained(tmp_path / name)
        found[name] = tmp_path / name
    shutil.copy(found["seed"] / "config.json", found["axolotl"])
    whole = tuned.merge_and_unload()
    for name in ("merged", "both"):
        found[name] = Path(shutil.copytree(found["seed"], tmp_path / name))
        whole.save_pretrained(found[name])
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(found["adapter"] / file, found["both"])
    return found


def test_a_merged_models_own_weights_count(models: dict[str, Path], tmp_path: Path) -> None:
    dense, ids = load(models["merged"]), tokens()
    again = load(models["both"])
    with torch.no_grad():
        assert (again(ids).logits - dense(ids).logits).abs().max() > 0.01  # transformers applies the adapter once more
        close(load_language_model(models["both"])(ids).logits, dense(ids).logits)
    assert model_hash(models["both"]) == model_hash(models["merged"])


def test_every_command_ignores_the_left_over_adapter(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpora.write_jsonl(tmp_path / "a.jsonl", range(8))
    (tmp_path / "data.yaml").write_text(json.dumps({"data": {"prose": {"files": "a.jsonl"}}, "held_out": "all"}))
    found = evaluate([str(models["merged"]), str(models["both"])], tmp_path / "data.yaml", max_length=16)
    perplexities = [model.domains["prose"].perplexity for model in found.models]
    assert perplexities[0] == perplexities[1] and [note for note in found.notes if NOTE in note]
    answers, notes = [], ""
    for name in ("merged", "both"):
        assert command(monkeypatch, "generate", models[name], "the", "--max-new-tokens", 8, "--json") == 0
        printed = capsys.readouterr()
        answers.append(json.loads(printed.out))
        notes += printed.err
    first, second = answers
    assert first["text"] == second["text"] and notes.count(NOTE) == 1

    report = branchmix.upcycle(recipe({"seed": models["seed"], "both": models["both"]}), tmp_path / "mixture")
    other = branchmix.upcycle(recipe({"seed": models["seed"], "both": models["merged"]}), tmp_path / "other")
    assert [note for note in report.plan.notes if note == f"expert 'both': {models['both']}: {NOTE}"]
    assert not [note for note in other.plan.notes if NOTE in note]
    assert (tmp_path / "mixture/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()
    # As the seed of an adapter, the adapter is added once.
    branchmix.upcycle(recipe({"seed": models["both"], "more": models["adapter"]}), tmp_path / "more")
    branchmix.upcycle(recipe({"seed": models["merged"], "more": models["adapter"]}), tmp_path / "same")
    assert (tmp_path / "more/model.safetensors").read_bytes() == (tmp_path / "same/model.safetensors").read_bytes()

    run = settings(write_text(tmp_path), model=str(models["both"]), budget={"steps": 2})
    assert command(monkeypatch, "train", write_run(tmp_path, run)) == 0
    assert NOTE in capsys.readouterr().err
    assert command(monkeypatch, "serve", models["both"]) == 2
    assert "move adapter_config.json away" in capsys.readouterr().err


def test_an_adapter_with_a_config_is_an_adapter(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapter", "axolotl"):
        branchmix.upcycle(recipe({"seed": models["seed"], "tuned": models[name]}), tmp_path / f"of-{name}", verify=True)
    first, second = (tmp_path / f"of-{name}/model.safetensors" for name in ("adapter", "axolotl"))
    assert first.read_bytes() == second.read_bytes()
    corpora.tokenizer().save_pretrained(models["axolotl"])
    corpora.write_jsonl(tmp_path / "a.jsonl", range(4))
    (tmp_path / "data.yaml").write_text(json.dumps({"data": {"prose": {"files": "a.jsonl"}}, "held_out": "all"}))
    run = write_run(tmp_path, settings(write_text(tmp_path), model=str(models["axolotl"]), budget={"steps": 2}))
    mean = {}
    for name in ("merged", "adapter", "axolotl"):
        words = ("eval", models[name], "--data", tmp_path / "data.yaml", "--dtype", "float32", "--json")
        assert command(monkeypatch, *words) == 0
        mean[name] = json.loads(capsys.readouterr().out)["models"][0]["domains"]["prose"]["perplexity"]
    assert mean["adapter"] == mean["axolotl"] == pytest.approx(mean["merged"], rel=1e-5)
    assert command(monkeypatch, "generate", models["axolotl"], "the", "--max-new-tokens", "2") == 0
    capsys.readouterr()
    for words in (
        ("inspect", models["axolotl"]),
        ("train", run),
        ("serve", models["axolotl"]),
        ("push", models["axolotl"], "org/name", "--dry-run"),
    ):
        assert command(monkeypatch, *words) == 2, words
        assert "axolotl: is a LoRA adapter folder, not a full checkpoint" in capsys.readouterr().err


def test_quantisation_that_is_gone(siblings: Siblings, tmp_path: Path) -> None:
    """Merged QLoRA models keep the entry in config.json beside 16-bit weights."""
    models = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in siblings("llama").items()}
    for name in models:
        load(models[name], dtype=torch.bfloat16).save_pretrained(models[name])
    plain = branchmix.upcycle(recipe(models), tmp_path / "plain")
    for name in ("seed", "code"):
        edit_config(models[name], quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    report = branchmix.upcycle(recipe(models), tmp_path / "mixture", verify=True)
    notes = [note for note in report.plan.notes if "the weights are not quantised" in note]
    assert [note.split(":")[0] for note in notes] == ["seed", "expert 'code'"]
    assert report.plan.config == plain.plan.config
    for name in ("plain", "mixture"):
        assert load(tmp_path / name).dtype == torch.float32


def test_every_command_leaves_out_a_quantisation_that_is_gone(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = Path(shutil.copytree(models["seed"], tmp_path / "left"))
    edit_config(left, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    note = "the weights are not quantised: its quantization_config is left out"
    corpora.write_jsonl(tmp_path / "a.jsonl", range(8))
    (tmp_path / "data.yaml").write_text(json.dumps({"data": {"prose": {"files": "a.jsonl"}}, "held_out": "all"}))
    found = evaluate([str(models["seed"]), str(left)], tmp_path / "data.yaml", max_length=16)
    perplexities = [model.domains["prose"].perplexity for model in found.models]
    assert perplexities[0] == perplexities[1] and sum(note in told for told in found.notes) == 1
    assert command(monkeypatch, "generate", left, "the", "--max-new-tokens", 8) == 0
    assert note in capsys.readouterr().err
    run = settings(write_text(tmp_path), model=str(left), budget={"steps": 2})
    assert command(monkeypatch, "train", write_run(tmp_path, run)) == 0
    assert note in capsys.readouterr().err
    assert command(monkeypatch, "serve", left) == 2
    assert "remove quantization_config from config.json" in capsys.readouterr().err


def test_an_adapter_of_a_resized_vocabulary_is_refused_with_the_reason(models: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(models["seed"])
    base.resize_token_embeddings(302)
    options: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], **options))
    tuned.save_pretrained(tmp_path / "wider")
    with pytest.raises(BranchMixError, match=r"vocabulary was resized: .* has 302 rows, the seed's .* has 300: resize"):
        branchmix.upcycle(recipe({"seed": models["seed"], "wider": tmp_path / "wider"}), tmp_path / "mixture")


def test_further_chat_templates_come_along(siblings: Siblings, tmp_path: Path) -> None:
    models = {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in siblings("llama").items()}
    edit = corpora.tokenizer()
    edit.chat_template = {"default": "{{ 'd' }}", "tool_use": "{{ 't' }}"}
    for path in models.values():
        edit.save_pretrained(path)
    assert (models["seed"] / TEMPLATES / "tool_use.jinja").is_file()
    (tmp_path / "trained").mkdir()
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    assert AutoTokenizer.from_pretrained(tmp_path / "mixture").chat_template == edit.chat_template
    branchmix.upcycle(recipe(models), tmp_path / "mixture", force=True)  # a folder of templates is no obstacle
    uploads = branchmix.push(tmp_path / "mixture", "org/name", licence="mit", dry_run=True).files
    assert f"{TEMPLATES}/tool_use.jinja" in [upload.name for upload in uploads]
    TokenizerFiles(edit, ResolvedModel("seed", models["seed"])).save_pretrained(tmp_path / "trained")
    assert (tmp_path / "trained" / TEMPLATES / "tool_use.jinja").is_file()


def test_a_sentencepiece_model_without_its_library(
    siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(siblings("llama")["seed"], tmp_path / "seed"))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    monkeypatch.setattr(loading, "find_spec", lambda name: None)

    def not_there(*args: Any) -> None:
        raise ImportError("not installed")

    monkeypatch.setattr(import_module("transformers.convert_slow_tokenizer"), "requires_backends", not_there)
    with pytest.raises(CheckpointError, match=r"tokenizer.model needs sentencepiece: pip install sentencepiece"):
        loading.load_tokenizer(folder)
