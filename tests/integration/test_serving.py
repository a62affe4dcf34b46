"""Servers: transformers' own on a native export, and what vLLM's transformers backend asks of a mixture.

vLLM itself is no dependency (docs/ecosystem.md tells what was run with it). What it does to a model is done here: sizes
are read from the config as it reads them, the model is built on the meta device from ``auto_map``, and attention runs
through an implementation registered under a name, which gets its state as an argument of ``forward``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import branchmix
from branchmix.checkpoint.hub import ResolvedModel
from branchmix.cli import app, main
from branchmix.cli.serve import serve_command
from branchmix.errors import RecipeError
from families import NAMES
from mixtures import BOTH, close, load, random_mixture, recipe, tokens
from tokenizers_of_bytes import save_byte_tokenizer

Siblings = Callable[..., dict[str, Path]]


# ---------------------------------------------------------------------------------------------------------------------
# transformers serve
# ---------------------------------------------------------------------------------------------------------------------


TRANSFORMERS = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
BRANCHMIX = [sys.executable, "-m", "branchmix", "serve"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(command: list[str], folder: Path, log: Path) -> tuple[str, str]:
    """What a server of the model in ``folder`` says to an OpenAI client, at once and streamed; greedy.

    A stream ends before a character that it has only some bytes of; the other ends with a replacement character.
    """
    from openai import OpenAI

    port = free_port()
    options = ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*command, str(folder), *options], stdout=file, stderr=file, env=environment, cwd=log.parent
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        ask: dict[str, Any] = {"model": str(folder), "messages": MESSAGES, "max_tokens": 8, "temperature": 0.0}
        whole = client.chat.completions.create(**ask, seed=0).choices[0].message.content
        chunks = client.chat.completions.create(**ask, seed=0, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return whole, streamed + whole[len(whole.rstrip("\ufffd")) :] * (not streamed.endswith("\ufffd"))
    finally:
        server.terminate()
        server.wait(30)


MESSAGES = [{"role": "user", "content": "The court"}]


def generated(folder: Path) -> str:
    """The same answer by ``generate`` here."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.slow
def test_transformers_serves_a_native_export(siblings: Siblings, tmp_path: Path) -> None:
    """In a process that knows nothing of branchmix."""
    gates = {"ffn": {"top_k": 2, "normalize": True}}
    models = siblings("llama", vocab_size=300)
    branchmix.upcycle(recipe(models, attention="average", routing=gates), tmp_path / "btx")
    save_byte_tokenizer(tmp_path / "btx")
    branchmix.export_model(tmp_path / "btx", tmp_path / "native", to="mixtral")
    expected = generated(tmp_path / "btx")
    assert expected and answers(TRANSFORMERS, tmp_path / "native", tmp_path / "log") == (expected, expected)


@pytest.mark.slow
@pytest.mark.parametrize("attention", BOTH)
def test_transformers_serves_a_mixture(attention: str, siblings: Siblings, tmp_path: Path) -> None:
    """With attention experts, which no native checkpoint has."""
    models = siblings("llama", vocab_size=300)
    branchmix.upcycle(recipe(models, attention=attention), tmp_path / "bam")
    save_byte_tokenizer(tmp_path / "bam")
    expected = generated(tmp_path / "bam")
    assert expected and answers(BRANCHMIX, tmp_path / "bam", tmp_path / "log") == (expected, expected)


def test_serve_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"none")
    for folder, reason in (("pickled", "pytorch_model.bin"), ("nothing", "no such folder")):
        command = [*BRANCHMIX, str(tmp_path / folder), "--port", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "{used}", "--host", "127.0.0.1"], "127.0.0.1, port {used}: Address already in use: give another"),
        (["--port", "99999"], "--port 99999: give a whole number from 0 to 65535"),
        (["--log-level", "loud"], "--log-level loud: give one of detail, debug, info"),
        (["--dtype", "bf99"], "serve: .*'bf99'.*bfloat16"),
        (["--device", "gpu7"], "serve: .*gpu7"),
        pytest.param(
            ["--quantization", "bnb-4bit"],
            "serve: .*bitsandbytes",
            marks=pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"),
        ),
        (["--quantization", "q4"], "serve: .*'q4'.*bnb-4bit"),
        (["--attn-implementation", "flash9"], "serve: .*'flash9'.*sdpa"),
        (["--port", "abc"], "Invalid value for '--port': .*: see `transformers serve --help`"),
        (["--prot", "8000"], "No such option: --prot.*: see `transformers serve --help`"),
    ],
)
def test_serve_refuses_options_in_one_line(
    options: list[str],
    message: str,
    siblings: Siblings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    shutil.copytree(siblings("llama", vocab_size=300)["code"], tmp_path, dirs_exist_ok=True)
    save_byte_tokenizer(tmp_path)
    monkeypatch.setattr("uvicorn.Server.run", lambda self: None)
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = str(used.getsockname()[1])
        given = [word.format(used=port) for word in options]
        monkeypatch.setattr(sys, "argv", ["branchmix", "serve", str(tmp_path), *given])
        with pytest.raises(SystemExit) as stopped:
            main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and re.search(message.format(used=port), line), line


def served_as(given: str, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[str, str]:
    """What the server is told to load, and its dtype."""
    served = []

    def server(
        force_model: str, host: str = "127.0.0.1", port: int = 0, dtype: str = "auto", log_level: str = "info"
    ) -> None:
        served.append((force_model, dtype))

    monkeypatch.setattr("transformers.cli.serve.Serve", server)
    left = CliRunner().invoke(app, ["serve", given, *options])
    assert left.exit_code == 0, left.output
    return served[0]


@pytest.mark.parametrize(("given", "name"), [("bf16", "bfloat16"), ("auto", "auto"), ("float64", "float64")])
def test_dtypes_have_the_names_of_other_commands(
    given: str, name: str, siblings: Siblings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served_as(str(siblings("llama")["code"]), monkeypatch, "--dtype", given)[1] == name


def test_the_server_gets_what_was_found(siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without the ~ that the server would not know; what looks like a revision to it is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("code", "code@v1"):
        (tmp_path / name).symlink_to(siblings("llama")["code"])
    assert served_as("~/code", monkeypatch)[0] == str(tmp_path / "code")
    found = ResolvedModel("org/code@v1", siblings("llama")["code"], revision="0" * 40)
    monkeypatch.setattr("branchmix.checkpoint.hub.resolve", lambda given: found)
    assert served_as("org/code@v1", monkeypatch)[0] == "org/code@v1", "as clients name it"
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="code@v1: the server takes what follows @ for a revision"):
        serve_command(None, str(tmp_path / "code@v1"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def client(siblings: Siblings, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of transformers' server in this process, as `branchmix serve` starts it with a model of 64 positions."""
    from starlette.testclient import TestClient

    folder = Path(shutil.copytree(siblings("llama", vocab_size=300)["code"], tmp_path_factory.mktemp("served") / "m"))
    save_byte_tokenizer(folder)
    with pytest.MonkeyPatch.context() as patch:
        apps: list[Any] = []
        patch.setattr("uvicorn.Server.run", lambda self: apps.append(self.config.app))
        left = CliRunner().invoke(app, ["serve", str(folder), "--port", "0", "--device", "cpu", "--dtype", "float32"])
    assert left.exit_code == 0 and apps, left.output
    return TestClient(apps[0], raise_server_exceptions=False)


@pytest.mark.parametrize(("asked", "kept"), [("code", ["code"]), ("math,seed", ["seed", "math"]), ("3", None)])
def test_serve_runs_requests_on_the_experts_asked_for(
    asked: str, kept: list[str] | None, siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.testclient import TestClient

    from branchmix.models.modeling_branchmix import BranchMixForCausalLM

    branchmix.upcycle(recipe(siblings("llama", vocab_size=300)), tmp_path / "m")
    save_byte_tokenizer(tmp_path / "m")
    apps: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self: apps.append(self.config.app))
    monkeypatch.setattr(BranchMixForCausalLM, "experts_at_inference", None)
    command = ["serve", str(tmp_path / "m"), "--experts", asked, "--port", "0", "--device", "cpu", "--dtype", "float32"]
    assert CliRunner().invoke(app, command).exit_code == 0
    status, answer = chat(TestClient(apps[0], raise_server_exceptions=False), "The court", max_tokens=8)
    mixture, tokenizer = load(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    model = mixture if kept is None else mixture.keep_experts(kept)
    messages = [{"role": "user", "content": "The court"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    monkeypatch.setattr(BranchMixForCausalLM, "experts_at_inference", None)
    new = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--experts", "code", "--continuous-batching"], "cannot be combined"),
        (["--experts", "law"], "no expert is called 'law': choose from seed, code, math"),
        (["--experts", "4"], "give 1 to 3, this mixture has 3 experts"),
        (["--experts", ","], "--experts is empty"),
    ],
)
def test_serve_refuses_experts_that_are_not_there(
    options: list[str], message: str, siblings: Siblings, tmp_path: Path
) -> None:
    branchmix.upcycle(recipe(siblings("llama")), tmp_path / "m")
    left = CliRunner().invoke(app, ["serve", str(tmp_path / "m"), *options])
    assert isinstance(left.exception, RecipeError) and message in str(left.exception)


def chat(client: Any, content: str = "The court", **more: Any) -> tuple[int, dict[str, Any]]:
    messages = [{"role": "user", "content": content}]
    body = json.dumps({"messages": messages, "temperature": 0.0, **more})  # in ASCII: so half a pair can be sent
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    return answer.status_code, answer.json()


def test_serve_refuses_what_the_model_has_no_positions_for(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerFast.__call__", never)
        for key in ("max_tokens", "max_completion_tokens"):
            status, found = chat(client, **{key: 10**9})
            assert status == 400 and f"{key}: 1000000000 is more than the model's 64" in found["error"]["message"]
        for value in (0, -1, 1.5, "many", True):
            assert chat(client, max_tokens=value)[0] == 400
        status, found = chat(client, "x" * 200_000)
        assert status == 413 and "at most 65,536 are taken" in found["error"]["message"]
        answer = client.post("/v1/completions", content=(b"x" * 9000 for _ in range(20)))  # without its length
        assert answer.status_code == 413 and "180,000 bytes" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", content=b"[" * 60_000).status_code in (400, 422)
    for ask in ({}, {"stream": True}):
        status, found = chat(client, "y" * 64, **ask)
        assert status == 400 and "the prompt has 64 tokens, and the model 64 positions" in found["error"]["message"]
        answer = client.post("/v1/completions", json={"prompt": "y" * 300, **ask})
        assert answer.status_code == 400 and "300 tokens" in answer.json()["error"]["message"]


def test_serve_limits_what_is_written_at_once(client: Any) -> None:
    for key in ("num_beams", "num_return_sequences"):
        for value in (17, 10**9):
            status, found = chat(client, generation_config=json.dumps({"do_sample": True, key: value}))
            assert status == 400 and f"{key}: should be a whole number up to 16, got" in found["error"]["message"]
        assert chat(client, generation_config=json.dumps({key: "many"}))[0] == 400
    assert chat(client, generation_config=json.dumps({"max_new_tokens": 2, "num_beams": 2, **EOS}))[0] == 200
    for asked in ("no JSON", "[1]", "[" * 5000, '{"num_return_sequences": 2}'):
        status, found = chat(client, generation_config=asked)
        assert status == 400 and found["error"]["message"].startswith("generation_config: "), asked


def test_serve_gives_the_room_that_the_prompt_leaves(client: Any) -> None:
    """The server's own default is 1,024 tokens."""
    for more, wanted in (({}, 14), ({"max_tokens": 5}, 5), ({"max_tokens": 64}, 14)):
        status, found = chat(client, "z" * 50, generation_config=json.dumps({"max_new_tokens": 10**9, **EOS}), **more)
        assert status == 200 and found["usage"]["completion_tokens"] == wanted
    status, found = chat(client, "a half \ud83d", max_tokens=3)
    assert status == 200 and found["usage"]["prompt_tokens"] == len("a half \ufffd".encode())
    assert chat(client, "a half \ufffd", max_tokens=3)[1]["choices"] == found["choices"]


EOS = {"eos_token_id": 299, "do_sample": False}
"""An EOS that these models never say, so that they write as much as they may."""


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers."""
    limit = time.monotonic() + 300
    while True:
        assert server.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5)
        except OSError:
            time.sleep(0.5)
        else:
            return


# ---------------------------------------------------------------------------------------------------------------------
# vLLM's transformers backend
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [*BOTH, "average"])
@pytest.mark.parametrize("name", NAMES)
def test_config_tells_the_sizes_that_attention_really_has(name: str, attention: str) -> None:
    """In total, over all experts, of every family; and nothing of it gets into config.json."""
    model = random_mixture(name, attention)
    config = model.config
    assert config.get_text_config() == config, "a config of parts would be taken for a multimodal model's"
    module = model.model.get_submodule(config.layout["layers"])[0].get_submodule(config.layout["attention"])
    if attention != "average":
        heads = module.heads
        assert heads.q_proj.out_features == config.num_attention_heads * config.head_dim
        assert heads.k_proj.out_features == config.num_key_value_heads * config.head_dim
    else:
        seed = config.seed_config
        assert config.num_attention_heads == seed.num_attention_heads
    assert not {"num_attention_heads", "num_key_value_heads", "vocab_size"} & set(config.to_dict())
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (3, 2, False)
    assert config.vocab_size == 97 and config.hidden_size == 32


def test_sizes_are_the_seeds_to_set() -> None:
    """``resize_token_embeddings`` sets the vocabulary on the text config."""
    config = random_mixture("llama").config
    config.get_text_config().vocab_size = 98
    assert config.seed_config.vocab_size == 98 and not hasattr(config, "layer_types")
    with pytest.raises(AttributeError):
        config.no_such_size  # noqa: B018


def stand_in(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, attention_instances: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As vLLM's: its state by layer index, tensors as [tokens, heads * head_dim]."""
    instance = attention_instances[module.layer_idx]
    flat = [x.transpose(1, 2).reshape(query.shape[-2], -1) for x in (query, key, value)]
    return instance(*flat, scaling), None


class Instance:
    """One layer's attention, sized by the config alone."""

    def __init__(self, config: Any):
        self.sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.head_dim = config.head_dim
        self.calls = 0

    def __call__(self, query: Any, key: Any, value: Any, scaling: float) -> torch.Tensor:
        self.calls += 1
        q, k, v = (
            x.view(-1, heads, self.head_dim).transpose(0, 1)[None]
            for x, heads in zip((query, key, value), self.sizes, strict=True)
        )
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        return out[0].transpose(0, 1).reshape(query.shape)


@pytest.mark.parametrize("attention", [*BOTH, "average"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_what_vllms_backend_does_to_a_model(
    name: str, attention: str, siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"attention": attention, "routing": {"ffn": {"top_k": 2}}}
    changes = {"sliding_window": None} if name == "mistral" else {}
    branchmix.upcycle(recipe(siblings(name, **changes), **options), tmp_path / "mixture")
    config = AutoConfig.from_pretrained(tmp_path / "mixture")
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(config.auto_map)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "stand_in", stand_in)
    config.get_text_config()._attn_implementation = "stand_in"
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert model._supports_attention_backend and model.is_backend_compatible()
    blocks = [module for module in model.modules() if hasattr(module, "experts")]
    assert len(blocks) == config.num_hidden_layers
    for block in blocks:
        assert all(parameter.ndim == 3 for parameter in block.experts.parameters())
        assert [name for name, _ in block.gate.named_parameters()] == ["weight"]
        assert block.scaling == config.routed_scaling_factor, "read from the config by name"
    assert any(style.startswith("colwise") for style in model.tp_plan.values())

    # The tensors' names: those of the causal LM on disk, one prefix less of which vLLM puts back.
    reference = load(tmp_path / "mixture")
    state = {key.removeprefix("model."): value for key, value in reference.state_dict().items()}
    fresh = AutoModel.from_config(config).eval()
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not missing and set(unexpected) <= {"lm_head.weight"}
    assert {key for key, _ in model.named_parameters()} == {key for key, _ in fresh.named_parameters()}
    ids = tokens(rows=1)
    instances = {layer: Instance(config.get_text_config()) for layer in range(config.num_hidden_layers)}
    with torch.no_grad():
        outputs = fresh(
            input_ids=ids,
            use_cache=False,
            position_ids=torch.arange(ids.shape[1])[None],
            attention_instances=instances,
            return_dict=False,
        )
        logits = reference.get_output_embeddings()(outputs[0][0, ...])
        close(logits, reference(ids).logits[0])
    assert [instance.calls for instance in instances.values()] == [1] * config.num_hidden_layers
