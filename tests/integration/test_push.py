"""Uploads: what goes to a Hub on this machine, byte for byte, what stays here, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import branchmix
from branchmix.accounting.lineage import as_records, lineage
from branchmix.checkpoint.companions import licence_of_folder
from branchmix.errors import CheckpointError, OutputError, RecipeError
from branchmix.upcycling.execute import CODE_FILES
from branchmix.upcycling.plan import AUTO_MAP
from hub_server import Hub, Repository, environment_for
from mixtures import mixtures_of_0_1, recipe
from tokenizers_of_bytes import save_byte_tokenizer

Siblings = Callable[..., dict[str, Path]]


@pytest.fixture
def mixture(siblings: Siblings, tmp_path: Path) -> Path:
    """A BAM mixture with a tokenizer file, a user's notes, and something that is nobody's business."""
    folder = tmp_path / "mixture"
    branchmix.upcycle(recipe(siblings("llama")), folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    (folder / ".env").write_text("SECRET=1")
    return folder


def results(tmp_path: Path) -> Path:
    """As ``branchmix eval --out`` writes them."""
    score = {"stderr": 0.0123, "perplexity": 9.0, "tokens": 5, "bytes": 20, "documents": 2}
    models = [
        {"model": f"/home/me/{name}", "max_length": 2048, "domains": {"code": {**score, "bits_per_byte": bits}}}
        for name, bits in (("seed", 1.25), ("mixture", 0.75))
    ]
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"models": models}))
    return file


def front(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---")[1]))


@pytest.mark.parametrize("name", ["plain", "one_router"])
def test_a_mixture_of_an_older_version_goes_up_with_todays_code(name: str, tmp_path: Path) -> None:
    """All of it, and nothing of the older version's."""
    folder = mixtures_of_0_1(tmp_path)[name]
    report = branchmix.push(folder, "org/bam", dry_run=True)
    uploaded = {file.name: file.content for file in report.files if file.name.endswith(".py")}
    assert uploaded == {file.name: file for file in CODE_FILES}
    assert any("streams_branchmix.py" in note for note in report.notes)


def test_a_dry_run_tells_everything_and_asks_nobody(
    mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a dry run asked the network"))
    report = branchmix.push(mixture, "org/bam", results=results(tmp_path), licence="apache-2.0", dry_run=True)
    names = {file.name for file in report.files}
    assert report.url is None and not names & {"notes.txt", ".env"}
    assert names >= {"config.json", "model.safetensors", "README.md", "branchmix.json", "tokenizer_config.json"}
    assert names >= {"modeling_branchmix.py", "attention_branchmix.py", "routing_branchmix.py"}
    card = report.card
    assert front(card)["license"] == "apache-2.0" and "branchmix" in front(card)["tags"]
    for text in (
        "BAM with Expert KV",
        "| 1 | code | code | - | unknown |",
        "| parameters |",
        "| mixture | 0.7500 (0.0123) |",
        "attention: kv_experts",
        'from_pretrained("org/bam")',
    ):
        assert text in card, text
    uploaded = [file.content for file in report.files if isinstance(file.content, bytes)]
    assert len(uploaded) == 2 and all(str(tmp_path).encode() not in text for text in uploaded)
    assert b"/home/me" not in b"".join(uploaded) and b"pytest" not in b"".join(uploaded)


COMMANDS = """
import contextlib, io, json, os, sys
from branchmix.cli import main
for token, *arguments in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    sys.argv[1:] = ["push", *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as left:
        print(json.dumps([left.code, out.getvalue(), err.getvalue()]))
"""
"""Several commands in one process: each start costs seconds, and the client reads its address when it is imported."""


def test_upload(mixture: Path, tmp_path: Path) -> None:
    """Through huggingface_hub's own client: made, filled with the same bytes, refused, and replaced with --force."""
    hub = Hub()
    hub.repositories["org/else"] = Repository(False, {"model-00001-of-00002.safetensors": b"old", "README.md": b"old"})
    right = "hf_right"

    def push(address: str, *commands: tuple[str, ...]) -> list[tuple[int, str, str]]:
        listed = json.dumps([[token, str(mixture), *arguments] for token, *arguments in commands])
        environment = environment_for(address, tmp_path / "home")
        script = [sys.executable, "-c", COMMANDS, listed]
        done = subprocess.run(script, capture_output=True, text=True, env=environment, check=True)
        return [tuple(json.loads(line)) for line in done.stdout.splitlines()]

    with hub.running() as address:
        first, again, over, seen, nobody, wrong = push(
            address,
            (right, "org/bam", "--private", "--json"),
            (right, "org/bam"),
            (right, "org/else", "--force", "--json"),
            (right, "org/else", "--force", "--private"),
            ("", "org/new"),
            ("hf_wrong", "org/new"),
        )
    code, out, err = first
    assert code == 0, err
    told, stored = json.loads(out), hub.repositories["org/bam"]
    assert (
        stored.private
        and told["private"]
        and stored.commits == ["Upload with branchmix"]
        and told["url"].endswith("0" * 40)
    )
    assert {file["name"]: file["bytes"] for file in told["files"]} == {n: len(c) for n, c in stored.files.items()}
    for name, content in stored.files.items():
        if name not in ("README.md", "branchmix.json"):
            assert content == (mixture / name).read_bytes(), name
    assert stored.files["README.md"].decode() == told["card"]
    assert again[0] == 2 and "exists already and holds" in again[2]
    assert over[0] == 0 and not json.loads(over[1])["private"], over
    assert set(hub.repositories["org/else"].files) == set(stored.files), "old shards are gone"
    assert seen[0] == 2 and "org/else: is a public repository, so --private cannot be had" in seen[2]
    assert len(hub.repositories["org/else"].commits) == 1, "nothing went to where everybody reads"
    assert nobody[0] == 2 and "there is no Hub token: `hf auth login`" in nobody[2]
    assert wrong[0] == 2 and "the token may not write there" in wrong[2]
    assert len([line for line in wrong[2].splitlines() if not line.startswith("note:")]) == 1
    assert "org/new" not in hub.repositories
    (gone,) = push(address, (right, "org/bam"))
    assert gone[0] == 2 and "cannot be reached" in gone[2]


def test_offline_is_told(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE is set"):
        branchmix.push(mixture, "org/bam")


@pytest.mark.parametrize("name", ["optimizer.pt", "trainer_state.json", "training/files.json"])
def test_checkpoints_of_runs_are_refused(name: str, mixture: Path) -> None:
    (mixture / name).parent.mkdir(exist_ok=True)
    (mixture / name).write_text("{}")
    with pytest.raises(CheckpointError, match="checkpoint of a run"):
        branchmix.push(mixture, "org/bam", dry_run=True)


def test_what_is_no_whole_checkpoint_is_refused(mixture: Path, tmp_path: Path) -> None:
    (mixture / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not done"):
        branchmix.push(mixture, "org/bam", dry_run=True)
    (mixture / "run.json").unlink()
    with pytest.raises(RecipeError, match="write org/name"):
        branchmix.push(mixture, "bam", dry_run=True)
    for content in ('{"models": []}', "[]", "x"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(RecipeError, match=r"is not a results.json"):
            branchmix.push(mixture, "org/bam", results=tmp_path / "bad.json", dry_run=True)
    config = json.loads((mixture / "config.json").read_text())
    (mixture / "config.json").write_text(json.dumps({**config, "num_experts": 2, "expert_names": ["seed", "code"]}))
    with pytest.raises(CheckpointError, match="but the weights hold"):
        branchmix.push(mixture, "org/bam", dry_run=True)
    (mixture / "config.json").write_text(json.dumps(config))
    weights = mixture / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        branchmix.push(mixture, "org/bam", dry_run=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        branchmix.push(tmp_path / "nowhere", "org/bam", dry_run=True)


def with_licences(siblings: Siblings, folder: Path, **licences: str) -> dict[str, Path]:
    """The tiny models, each with a card that names a licence."""
    models = {}
    for name, licence in licences.items():
        models[name] = folder / name
        models[name].mkdir(parents=True)
        for file in siblings("llama")[name].iterdir():
            (models[name] / file.name).symlink_to(file)
        (models[name] / "README.md").write_text(f"---\nlicense: {licence}\n---\n# {name}\n")
    return models


def test_licences(siblings: Siblings, tmp_path: Path) -> None:
    """Known of all sources and the same: the upload's; else only told."""
    models = with_licences(siblings, tmp_path, seed="mit", code="mit", math="mit")
    for name, file, text in (
        ("code", "LICENSE", "MIT License\n\nCopyright ..."),
        ("math", "LICENSE.txt", "Do what you like"),
    ):
        (models[name] / "README.md").unlink()
        (models[name] / file).write_text(text)
    assert [licence_of_folder(path) for path in models.values()] == ["mit", "mit", "see its LICENSE.txt"]
    branchmix.upcycle(recipe(models), tmp_path / "mixed")
    report = branchmix.push(tmp_path / "mixed", "org/bam", dry_run=True)
    assert report.licences == {"seed": "mit", "code": "mit", "math": "see its LICENSE.txt"}
    assert (
        report.licence is None and "license" not in front(report.card) and any("--license" in n for n in report.notes)
    )
    (models["math"] / "LICENSE.txt").write_text("The MIT License")
    branchmix.upcycle(recipe(models), tmp_path / "again")
    report = branchmix.push(tmp_path / "again", "org/bam", dry_run=True)
    assert report.licence == front(report.card)["license"] == "mit" and not report.notes


def test_a_folder_of_licences_names_none(tmp_path: Path) -> None:
    """As the REUSE tool makes it: which of its texts is the model's, it does not say."""
    (tmp_path / "LICENSES").mkdir()
    assert licence_of_folder(tmp_path) is None
    (tmp_path / "LICENSES.md").write_text("MIT License")
    assert licence_of_folder(tmp_path) == "mit"


def test_experts_that_joined_have_licences_too(siblings: Siblings, tmp_path: Path) -> None:
    """One of another licence takes the claim away, and stays on the card when it has left: averages hold it."""
    models = with_licences(siblings, tmp_path, seed="mit", code="mit", math="cc-by-nc-4.0")
    law = models.pop("math")
    branchmix.upcycle(recipe(models), tmp_path / "mixed")
    assert branchmix.push(tmp_path / "mixed", "org/bam", dry_run=True).licence == "mit"
    branchmix.add_expert(tmp_path / "mixed", "law", law, tmp_path / "more")
    branchmix.remove_expert(tmp_path / "more", "code", tmp_path / "fewer")
    branchmix.add_expert(tmp_path / "fewer", "code", law, tmp_path / "other")
    report = branchmix.push(tmp_path / "other", "org/bam", dry_run=True)
    assert report.licence is None and "license" not in front(report.card)
    assert report.licences == {"seed": "mit", "code": "mit", "law": "cc-by-nc-4.0", "code (3)": "cc-by-nc-4.0"}
    assert "| 2 | law | math | - | cc-by-nc-4.0 |" in report.card and "| 3 | code (3) | math |" in report.card


@pytest.mark.parametrize("recorded", [True, False])
def test_licences_are_found_from_anywhere(
    recorded: bool, siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sources by relative paths: those of the merge, and never those of folders of that name elsewhere."""
    with_licences(siblings, tmp_path / "here", seed="mit", code="mit")
    with_licences(siblings, tmp_path / "there", seed="gemma", code="gemma")
    given = {"seed": "seed", "experts": [{"name": "code", "model": "code"}]}
    (tmp_path / "here" / "recipe.yaml").write_text(yaml.safe_dump(given))
    branchmix.upcycle(tmp_path / "here" / "recipe.yaml", tmp_path / "mixed")
    if not recorded:  # as versions before wrote it
        file = tmp_path / "mixed" / "branchmix.json"
        record = json.loads(file.read_text())
        for source in record["sources"]:
            del source["license"]
        file.write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path / "there")
    report = branchmix.push(tmp_path / "mixed", "org/bam", dry_run=True)
    assert set(report.licences.values()) == {"mit" if recorded else "unknown"}
    assert report.licence == ("mit" if recorded else None)


def test_a_trained_model_is_told_by_its_own_mixture_only(
    siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the run's settings name it by a relative path, a mixture of that name elsewhere is another."""
    for place, licence, other in (("here", "mit", "code"), ("there", "gemma", "math")):
        models = with_licences(siblings, tmp_path / place, **{"seed": licence, other: licence})
        branchmix.upcycle(recipe(models), tmp_path / place / "mixed")
    trained = tmp_path / "trained"
    shutil.copytree(tmp_path / "here" / "mixed", trained)
    (trained / "branchmix.json").unlink()
    ancestors = as_records(lineage(tmp_path / "here" / "mixed"))
    record = {"config": {"model": "mixed"}, "tokens": 1000, "ancestors": ancestors}
    (trained / "training.json").write_text(json.dumps(record))
    for place, licence in (("here", "mit"), ("there", None)):
        monkeypatch.chdir(tmp_path / place)
        assert branchmix.push(trained, "org/trained", dry_run=True).licence == licence


def test_no_path_leaves_this_machine(siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the texts of routers, under whatever name, nor what transformers notes in configs."""
    models, texts = {}, {}
    for name in ("seed", "code"):
        models[name], texts[name] = tmp_path / "private" / name, str(tmp_path / "private" / f"{name}.txt")
        shutil.copytree(siblings("llama", vocab_size=259)[name], models[name])
        save_byte_tokenizer(models[name])
        Path(texts[name]).write_text("some words")
        for noted, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
            content = json.loads((models[name] / noted).read_text())
            (models[name] / noted).write_text(json.dumps({**content, key: str(models[name])}))
    monkeypatch.chdir(tmp_path)
    given = {name: f"private/../private/{name}" for name in models}
    branchmix.upcycle(recipe(given, router_init={"text": texts}), "mixed")
    for name in ("config.json", "tokenizer_config.json"):
        assert "name_or_path" not in (tmp_path / "mixed" / name).read_text(), name

    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    config["seed_config"]["_name_or_path"] = str(models["seed"])  # as versions before wrote it
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    (tmp_path / "mixed" / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(models["seed"])}))
    report = branchmix.push(tmp_path / "mixed", "org/bam", dry_run=True)
    assert "seed: seed.txt" in report.card and "code: code.txt" in report.card
    for file in report.files:
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        assert str(tmp_path).encode() not in content and b"private/" not in content, file.name
    weights = {file.name: file.content for file in report.files}["model.safetensors"]
    assert weights == tmp_path / "mixed" / "model.safetensors", "what holds no path goes up as it is"


def test_somebodys_own_card_is_kept(mixture: Path, tmp_path: Path) -> None:
    (mixture / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    report = branchmix.push(mixture, "org/bam", dry_run=True)
    assert report.card.endswith("# Mine\n") and report.licence == "mit"
    assert len(report.notes) == 1 and "is uploaded unchanged" in report.notes[0]
    for option, given in (("--license", {"licence": "gemma"}), ("--eval", {"results": results(tmp_path)})):
        with pytest.raises(
            RecipeError, match=rf"^{option}: .*README.md was not written by branchmix .* move the file away"
        ):
            branchmix.push(mixture, "org/bam", dry_run=True, **given)


@pytest.mark.parametrize(
    ("methods", "title"),
    [
        ({"attention": "average", "ffn": "average"}, "Soup: everything averaged."),
        ({"attention": "seed", "ffn": "average"}, "The seed's attention, averaged FFN."),
    ],
)
def test_cards_of_soups(methods: dict[str, str], title: str, siblings: Siblings, tmp_path: Path) -> None:
    report = branchmix.upcycle(recipe(siblings("llama"), **methods), tmp_path / "soup")
    assert report.recipe["ffn"] == "average"
    assert f"# {title[0].lower()}{title[1:-1]}\n" in (tmp_path / "soup" / "README.md").read_text()
    card = branchmix.push(tmp_path / "soup", "org/soup", dry_run=True).card
    assert f"\n{title}\n" in card and front(card)["tags"] == ["branchmix", "merge"]


def test_a_model_that_nothing_merged_is_told_as_such(siblings: Siblings) -> None:
    card = branchmix.push(siblings("llama")["code"], "org/code", dry_run=True).card
    assert "\nA dense llama model.\n" in card and front(card)["tags"] == ["branchmix"]
    assert "oup" not in card and "Uploaded with [branchmix]" in card


def test_exports_and_trained_models(siblings: Siblings, tmp_path: Path) -> None:
    """An export knows what it came from; a trained mixture is told by the one it was trained from."""
    options = {"attention": "average", "routing": {"ffn": {"top_k": 2, "normalize": True}}}
    branchmix.upcycle(recipe(siblings("llama"), **options), tmp_path / "btx")
    routing = {"ffn": {"top_k": 2, "score": "sigmoid"}}
    branchmix.upcycle(recipe(siblings("llama"), attention="average", routing=routing), tmp_path / "sigmoid")
    for mixture, to in (("btx", "mixtral"), ("sigmoid", "glm4_moe")):
        branchmix.export_model(tmp_path / mixture, tmp_path / to, to=to, verify=False)
        report = branchmix.push(tmp_path / to, "org/native", dry_run=True)
        assert f"exported to {to}" in report.card and "moe" in front(report.card)["tags"]
        assert "modeling_branchmix.py" not in {f.name for f in report.files}

    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("config.json", "model.safetensors"):
        (trained / name).write_bytes((tmp_path / "btx" / name).read_bytes())
    record = {
        "config": {"model": str(tmp_path / "btx"), "data": {}},
        "tokens": 1000,
        "flops": 2e9,
        "domains": {"law": {"tokens": 600}},
        "held_out": {"start": {"law": {"perplexity": 9.5}}, "end": {"law": {"perplexity": 8.25}}},
    }
    (trained / "training.json").write_text(json.dumps(record))
    report = branchmix.push(trained, "org/trained", dry_run=True)
    assert "| law | 600 | 9.50 | 8.25 |" in report.card and "attention: average" in report.card
    assert "modeling_branchmix.py" in {file.name for file in report.files}
    assert "training.json" not in {file.name for file in report.files}
    (record,) = (json.loads(file.content) for file in report.files if file.name == "branchmix.json")
    assert record["trained"] is True and "lossless" not in record, "what the merge was is not what the model is"


def test_code_of_strangers_is_not_uploaded(mixture: Path, tmp_path: Path) -> None:
    """Neither what differs from the package's, nor other files, nor what configs name on the Hub; each is reported."""
    own = (mixture / "modeling_branchmix.py").read_bytes()
    (mixture / "modeling_branchmix.py").write_bytes(own + b"\nimport os; os.system('evil')\n")
    (mixture / "routing_branchmix.py").unlink()
    (mixture / "attention_branchmix.py").unlink()
    (tmp_path / "evil.py").write_text("evil = 1")
    (mixture / "attention_branchmix.py").symlink_to(tmp_path / "evil.py")
    (mixture / "tokenization_evil.py").write_text("evil = 1")
    (mixture / "custom_generate").mkdir()
    (mixture / "custom_generate" / "generate.py").write_text("evil = 1")
    for name, named in (
        ("config.json", {"AutoConfig": "evil/repo--configuration.Evil", "AutoModelForCausalLM": "evil.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]}),
    ):
        content = json.loads((mixture / name).read_text())
        (mixture / name).write_text(json.dumps({**content, "auto_map": named}))
    report = branchmix.push(mixture, "org/bam", dry_run=True)
    uploaded = {
        file.name: file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        for file in report.files
    }
    assert not [name for name, content in uploaded.items() if b"evil" in content.lower()]
    assert {name for name in uploaded if name.endswith(".py")} == {file.name for file in CODE_FILES}
    assert uploaded["modeling_branchmix.py"] == own
    assert json.loads(uploaded["config.json"])["auto_map"] == AUTO_MAP
    assert "auto_map" not in json.loads(uploaded["tokenizer_config.json"])
    notes = "\n".join(report.notes)
    assert "attention_branchmix.py, modeling_branchmix.py differ from branchmix" in notes
    assert "custom_generate/generate.py, tokenization_evil.py: Python code is not uploaded" in notes
    assert "/config.json: auto_map names" in notes and "tokenizer_config.json: auto_map names" in notes


def test_a_mixture_as_it_was_written_has_no_note_on_code(mixture: Path) -> None:
    assert not [note for note in branchmix.push(mixture, "org/bam", dry_run=True).notes if "licence" not in note]


def test_code_of_a_dense_model_is_not_uploaded(siblings: Siblings, tmp_path: Path) -> None:
    folder = shutil.copytree(siblings("llama")["code"], tmp_path / "dense")
    (folder / "modeling_own.py").write_text("own = 1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "else/where--modeling.Own"}}))
    report = branchmix.push(folder, "org/dense", dry_run=True)
    assert not [file.name for file in report.files if file.name.endswith(".py")]
    (uploaded,) = [file.content for file in report.files if file.name == "config.json"]
    assert isinstance(uploaded, bytes) and json.loads(uploaded) == config
    assert "'else/where--modeling.Own'" in "\n".join(report.notes)


@pytest.mark.parametrize("name", ["LICENSE.txt", "tokenizer_config.json", "README.md"])
def test_links_out_of_the_folder_are_not_published(name: str, mixture: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"key": "of somebody"}')
    (mixture / name).unlink(missing_ok=True)
    (mixture / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=rf"{name}: is a link to .*secret, outside the folder: put the file"):
        branchmix.push(mixture, "org/bam", dry_run=True)


def test_links_into_the_hubs_cache_are_published(mixture: Path, tmp_path: Path) -> None:
    """As snapshots are made of them; weights may lie on any disk."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(mixture.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    weights = (snapshot / "model.safetensors").resolve()
    shutil.move(weights, tmp_path / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    names = {file.name for file in branchmix.push(snapshot, "org/bam", dry_run=True).files}
    assert names >= {"config.json", "model.safetensors", "tokenizer_config.json", *(file.name for file in CODE_FILES)}


def test_names_of_code_do_not_come_along(siblings: Siblings, tmp_path: Path) -> None:
    """Into mixtures, soups, grown mixtures and exports: their sources' Python files do not either."""
    models = {name: shutil.copytree(folder, tmp_path / name) for name, folder in siblings("llama").items()}
    for folder in models.values():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
        (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Words", null]}}')
        (folder / "evil.py").write_text("evil = 1")
    branchmix.upcycle(recipe(models), tmp_path / "mixture")
    branchmix.upcycle(recipe(models, attention="average", ffn="average"), tmp_path / "soup")
    config = json.loads((tmp_path / "mixture/config.json").read_text())
    config["seed_config"]["auto_map"] = config["auto_map"] = {"AutoConfig": "evil/repo--evil.Config"}
    (tmp_path / "mixture/config.json").write_text(json.dumps(config))
    branchmix.add_expert(tmp_path / "mixture", "law", models["math"], tmp_path / "grown")
    branchmix.export_model(tmp_path / "grown", tmp_path / "dense", to="dense", expert="law", verify=False)
    for name in ("soup", "grown", "dense"):
        files = {file.name: file.read_text() for file in (tmp_path / name).glob("*.json")}
        evil = [file for file, text in files.items() if "evil" in text and file != "branchmix.json"]
        assert not evil, name
        assert ("auto_map" in files["config.json"]) == (name == "grown")
        assert not (tmp_path / name / "evil.py").exists()
