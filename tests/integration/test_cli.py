"""The command as users run it, in processes of its own: what it prints where, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from branchmix.checkpoint.index import CheckpointIndex
from branchmix.cli import app
from branchmix.errors import BranchMixError, CheckpointError
from checkpoints import same_bytes, weights
from families import BY_NAME
from mixtures import load

COMMANDS = ("upcycle", "inspect", "generate", "add-expert", "remove-expert")
TEXT = "the mixture of attention experts reads a text and the experts of the mixture write a text"


def tokenizer() -> PreTrainedTokenizerFast:
    """97 tokens at most, trained on one sentence."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    inner.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(vocab_size=90, special_tokens=special))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a seed, three experts, a recipe and the mixture that it gives."""
    folder = tmp_path_factory.mktemp("home")
    words = tokenizer()
    for seed, name in enumerate(("seed", "code", "math", "law")):
        words.save_pretrained(BY_NAME["llama"].save(folder / name, seed))
    write_recipe(folder / "recipe.yaml")
    done = run(folder, "upcycle", "recipe.yaml", "mixture", "--json")
    assert done.returncode == 0, done.stderr
    return folder


def write_recipe(file: Path, **options: Any) -> None:
    experts = [{"name": name, "model": f"./{name}"} for name in ("code", "math")]
    file.write_text(yaml.safe_dump({"seed": "./seed", "experts": experts, **options}))


def run(folder: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "branchmix", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, **options)


def parsed(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """stdout as JSON, and nothing but JSON."""
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


# --- happy paths


def test_upcycle_prints_the_plan_and_the_proof(home: Path, tmp_path: Path) -> None:
    done = run(home, "upcycle", "recipe.yaml", tmp_path / "out", "--verify")
    assert done.returncode == 0, done.stderr
    for text in ("BAM with Expert KV", "seed, code, math", "averaged", "copied", "parameters:", "KV cache:", "wrote"):
        assert text in done.stdout, text
    for text in ("tensors (", "byte-identical", "gates forced to one expert", "largest difference"):
        assert text in done.stdout, text
    assert "note:" not in done.stderr + done.stdout
    assert f"branchmix calibrate {tmp_path / 'out'} --data" in done.stdout.splitlines()[-1]
    write_recipe(tmp_path / "paper.yaml", start="paper")
    for name in ("seed", "code", "math"):
        (tmp_path / name).symlink_to(home / name)
    paper = run(tmp_path, "upcycle", "paper.yaml", "paper", "--dry-run")
    assert "note: raw top-1 gates" in paper.stderr and "note:" not in paper.stdout
    assert "\x1b" not in done.stdout + done.stderr  # no colours, no bars where nobody watches


def test_json_is_all_that_stdout_gets(home: Path, tmp_path: Path) -> None:
    for arguments in (
        ("upcycle", "recipe.yaml", tmp_path / "dry", "--dry-run"),
        ("add-expert", "mixture", "law=law", tmp_path / "added"),
        ("remove-expert", "mixture", "code", tmp_path / "removed"),
    ):
        found = parsed(run(home, *arguments, "--json"))
        assert found["method"].startswith("BAM") and found["bytes"] > 0 and found["groups"]
    assert not (tmp_path / "dry").exists()
    proof = parsed(run(home, "upcycle", "recipe.yaml", tmp_path / "out", "--verify", "--json"))["verification"]
    assert [expert["name"] for expert in proof["experts"]] == ["seed", "code", "math"]
    assert all(expert["max_difference"] < 1e-4 for expert in proof["experts"])
    assert proof["tensors_byte_identical"] > 10 and proof["averages_checked"] > 2 and proof["tokens"] > 10
    assert parsed(run(home, "inspect", tmp_path / "added", "--json"))["parameters"]["total"] > 0


def test_generate(home: Path) -> None:
    prompt = "the mixture"
    arguments = ("generate", "mixture", prompt, "--max-new-tokens", 6)
    printed, found = run(home, *arguments), parsed(run(home, *arguments, "--json"))
    assert found["prompt"] == prompt and 1 <= found["new_tokens"] <= 6 and found["tokens_per_second"] > 0
    assert printed.returncode == 0 and printed.stdout.startswith(prompt) and "tokens/s" in printed.stderr
    assert found["text"].strip() in printed.stdout
    sampled = [parsed(run(home, *arguments, "--temperature", 1, "--seed", 1, "--json"))["text"] for _ in range(2)]
    assert sampled[0] == sampled[1]
    for more, note in ((63, ""), (64, "note: a context of 65 exceeds the model's 64 positions\n")):
        found = invoked("generate", home / "mixture", prompt, "--max-new-tokens", more, "--dtype", "fp32", "--json")
        assert found.exit_code == 0 and found.stderr == note


def test_generate_on_the_experts_asked_for(home: Path) -> None:
    """The same text as from the mixture of those experts alone; ``invoked`` shares the imports."""
    prompt = ("generate", home / "mixture", "the mixture of experts", "--max-new-tokens", 4, "--json")
    for asked, kept in (("code", ["code"]), ("math,seed", ["seed", "math"]), ("3", ["seed", "code", "math"])):
        answer = json.loads(invoked(*prompt, "--experts", asked).stdout)
        words, model = AutoTokenizer.from_pretrained(home / "mixture"), load(home / "mixture").keep_experts(kept)
        ids = words(prompt[2], return_tensors="pt").input_ids
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[
            0, ids.shape[1] :
        ]
        assert answer["experts"] == kept
        assert answer["text"] == words.decode(new, skip_special_tokens=True)
    chosen = invoked(*prompt[:-1], "--experts", "auto")
    assert chosen.exit_code == 0 and "experts kept: " in chosen.stderr


def test_generate_leaves_out_what_the_model_does_not_read(home: Path, tmp_path: Path) -> None:
    """BERT's tokenizers, and many made with ``tokenizers``, number the segments of a text: ``token_type_ids``."""
    shutil.copytree(home / "seed", tmp_path / "seed")
    settings = tmp_path / "seed" / "tokenizer_config.json"
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_input_names": inputs}))
    done = run(tmp_path, "generate", "seed", "the mixture", "--max-new-tokens", 2)
    assert done.returncode == 0, done.stderr


TEMPLATES = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{% for m in messages %}{{ m.content": "unexpected end of template",
    "{{ messages[0].author.name }}": "has no attribute 'author'",
    "{{ messages[7]['content'] }}": "list object has no element 7",
    "{{ 1 / 0 }}": "division by zero",
    "{{ messages[0].content + 1 }}": "can only concatenate str",
    "{{ nothing() }}": "'nothing' is undefined",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{% include 'other' %}": "no loader for this environment",
    "{{ '' }}": "makes no tokens of PROMPT",
    "": "is missing: leave --chat out",
}


def test_what_is_wrong_with_a_chat_template_is_one_line(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "seed", tmp_path / "seed")
    for template, words in TEMPLATES.items():
        (tmp_path / "seed" / "chat_template.jinja").write_text(template)
        done = invoked("generate", tmp_path / "seed", "the mixture", "--chat")
        assert isinstance(done.exception, BranchMixError), (template, done.exception)
        assert words in str(done.exception) and "\n" not in str(done.exception), (template, done.exception)
    (tmp_path / "seed" / "chat_template.jinja").write_text('user: {{ messages[0].content }} {{ "\\ud83d" }}')
    assert invoked("generate", tmp_path / "seed", "the mixture", "--chat", "--max-new-tokens", 2).exit_code == 0


def invoked(*arguments: object) -> Any:
    """The command in this process."""
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_prompt_that_is_not_utf_8(home: Path) -> None:
    """As Python hands on a command line's bytes."""
    found = [
        json.loads(invoked("generate", home / "seed", f"the {text}", "--max-new-tokens", 4, "--json").stdout)["text"]
        for text in ("\udcff", "\ufffd")
    ]
    assert found[0] == found[1]


def test_experts_join_and_leave(home: Path, tmp_path: Path) -> None:
    added = run(home, "add-expert", "mixture", "law=./law", tmp_path / "added")
    assert added.returncode == 0 and "seed, code, math, law" in added.stdout and "wrote" in added.stdout
    removed = run(home, "remove-expert", tmp_path / "added", "law", tmp_path / "removed")
    assert removed.returncode == 0 and "seed, code, math" in removed.stdout and "law" not in removed.stdout
    same_bytes(weights(tmp_path / "removed"), weights(home / "mixture"))


# --- help and mistakes


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str, home: Path) -> None:
    done = run(home, command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    examples = done.stdout.split("Example")[1]
    assert f"branchmix {command} " in examples and done.stdout.startswith("Usage: ")


def test_the_commands_are_listed(home: Path) -> None:
    listed = run(home, "--help").stdout
    assert all(f"  {command}" in listed for command in COMMANDS)
    assert run(home, "--version").stdout.startswith("branchmix 0.")
    bare = run(home)
    assert bare.returncode == 2 and "Usage" in bare.stdout + bare.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("upcycle", "nowhere.yaml", "out"),
        ("upcycle", "recipe.yaml", "mixture"),
        ("upcycle", "recipe.yaml", "seed"),
        ("upcycle", "recipe.yaml"),
        ("upcycle", "recipe.yaml", "out", "--dryrun"),
        ("upcycel", "recipe.yaml", "out"),
        ("inspect", "nowhere"),
        ("generate", "nowhere", "text"),
        ("generate", "mixture", ""),
        ("generate", "mixture", "text", "--dtype", "int8"),
        ("generate", "mixture", "text", "--max-new-tokens", "0"),
        ("generate", "mixture", "text", "--experts", "law"),
        ("generate", "mixture", "text", "--experts", "0"),
        ("generate", "seed", "text", "--experts", "auto"),
        ("add-expert", "mixture", "law", "out"),
        ("add-expert", "mixture", "code=./law", "out"),
        ("add-expert", "seed", "law=./law", "out"),
        ("remove-expert", "mixture", "low", "out"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line_on_stderr(arguments: tuple[str, ...], home: Path) -> None:
    done = run(home, *arguments)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (home / "out").exists()


def test_generate_without_weights_or_tokenizer_is_one_line(home: Path, tmp_path: Path) -> None:
    config = (home / "mixture" / "config.json").read_text()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(config)
    assert "no tokenizer" in run(tmp_path, "generate", "bare", "text").stderr
    tokenizer().save_pretrained(tmp_path / "bare")
    done = run(tmp_path, "generate", "bare", "text")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")


# --- runs that do not come to their end

SLOW = """
import sys, time
import branchmix.upcycling.execute as execute
write = execute.write_checkpoint
def slowly(*arguments, **options):
    written = write(*arguments, **options)
    print("weights written", file=sys.stderr, flush=True)
    time.sleep(60)
    return written
execute.write_checkpoint = slowly
from branchmix.cli import main
main()
"""


def started(folder: Path, recipe: Path, out: Path) -> subprocess.Popen[str]:
    """An upcycling that has written its weights and not yet its config.json."""
    command = [sys.executable, "-c", SLOW, "upcycle", str(recipe), str(out)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while line := process.stderr.readline():
        if "weights written" in line:
            return process
    raise AssertionError("it ended before it was interrupted")


def test_killed_leaves_nothing_that_loads_and_says_so_next_time(home: Path, tmp_path: Path) -> None:
    process = started(home, home / "recipe.yaml", tmp_path / "out")
    process.kill()
    process.communicate()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.incomplete-") and (left / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="no config"):
        CheckpointIndex.open(left)
    again = run(home, "upcycle", "recipe.yaml", tmp_path / "out")
    assert again.returncode == 0 and str(left) in again.stderr and "remove it" in again.stderr
    assert left.exists() and (tmp_path / "out" / "config.json").exists()  # told, not taken


def test_killed_with_force_keeps_the_old_one(home: Path, tmp_path: Path) -> None:
    run(home, "upcycle", "recipe.yaml", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    command = [sys.executable, "-c", SLOW, "upcycle", "recipe.yaml", str(tmp_path / "out"), "--force"]
    process = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "weights written" not in process.stderr.readline():
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
def test_interrupted_leaves_nothing(home: Path, tmp_path: Path) -> None:
    process = started(home, home / "recipe.yaml", tmp_path / "out")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and not list(tmp_path.iterdir())
    assert stderr.splitlines() == ["interrupted: nothing was left behind"]


def test_a_reader_that_leaves_early_is_no_error(home: Path) -> None:
    command = [sys.executable, "-m", "branchmix", "inspect", "mixture", "--json"]
    process = subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(30)
