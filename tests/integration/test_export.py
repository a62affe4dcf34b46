"""Exports against the mixture itself: the same logits from transformers' own classes, or a refusal with all reasons."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

import branchmix
from branchmix.checkpoint.families import families
from branchmix.cli import main
from branchmix.errors import CheckpointError, CompatibilityError, OutputError, RecipeError, VerificationError
from branchmix.export import conversion
from branchmix.export.native import NATIVES
from branchmix.models.routers import one_hot_gates
from branchmix.models.routing_branchmix import BranchMixRouter
from checkpoints import config, in_dtype, weights
from families import BY_NAME, NAMES
from mixtures import BOTH, close, load, recipe, tokens

Siblings = Callable[..., dict[str, Path]]

RAW_TOP_1: dict[str, Any] = {"top_k": 1}
RAW_TOP_2: dict[str, Any] = {"top_k": 2}
NORMAL_TOP_2: dict[str, Any] = {"top_k": 2, "normalize": True}
SOFT: dict[str, Any] = {"soft": True}
SIGMOID: dict[str, Any] = {"top_k": 2, "normalize": True, "score": "sigmoid"}
RAW_SIGMOID: dict[str, Any] = {"top_k": 2, "score": "sigmoid"}


def mixed(models: dict[str, Path], out: Path, gates: dict[str, Any], **options: Any) -> Path:
    """A BTX mixture (or another) with these FFN gates."""
    branchmix.upcycle(recipe(models, **{"attention": "average", "routing": {"ffn": gates}, **options}), out)
    return out


def same_logits(mixture: Path, export: Path, tolerance: float = 1e-5) -> Any:
    """Both in fp32 by transformers' own loaders; returns the export."""
    ours, native, ids = load(mixture), load(export), tokens()
    with torch.no_grad():
        close(native(ids).logits, ours(ids).logits, tolerance)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0  # left padding, positions and all
        shown = mask.bool()
        close(native(ids, attention_mask=mask).logits[shown], ours(ids, attention_mask=mask).logits[shown], tolerance)
    assert torch.equal(
        native.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False),
        ours.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False),
    )
    return native


EXACT = [
    ("llama", {}, "mixtral", (NORMAL_TOP_2, SOFT)),
    ("llama", {"head_dim": 16, "tie_word_embeddings": True}, "mixtral", (NORMAL_TOP_2,)),
    (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
         | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}},
        "mixtral",
        (NORMAL_TOP_2,),
    ),
    ("mistral", {}, "mixtral", (NORMAL_TOP_2, SOFT)),
    ("phi3", {}, "mixtral", (NORMAL_TOP_2,)),
    ("qwen2", {}, "qwen2_moe", (RAW_TOP_1, RAW_TOP_2, NORMAL_TOP_2, SOFT)),
    ("llama", {}, "qwen2_moe", (RAW_TOP_1, RAW_TOP_2)),
    ("qwen3", {}, "qwen3_moe", (RAW_TOP_1, RAW_TOP_2, NORMAL_TOP_2, SOFT)),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}, "qwen3_moe", (RAW_TOP_2,)),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        "qwen3_moe",
        (RAW_TOP_2,),
    ),
    ("olmo2", {}, "flex_olmo", (RAW_TOP_1, RAW_TOP_2, NORMAL_TOP_2, SOFT)),
    ("llama", {"tie_word_embeddings": True}, "glm4_moe", (SIGMOID, RAW_SIGMOID)),
    ("phi3", {}, "glm4_moe", (SIGMOID,)),
    ("qwen2", {}, "glm4_moe", (SIGMOID, RAW_SIGMOID, SOFT | RAW_SIGMOID | {"top_k": 1})),
    ("qwen3", {}, "glm4_moe", (SIGMOID,)),
]  # fmt: skip
CASES = [(name, changes, to, gates) for name, changes, to, all_gates in EXACT for gates in all_gates]


def case_name(value: Any) -> str:
    return (
        "-".join(f"{k}={v}" for k, v in value.items() if not isinstance(v, dict)) if isinstance(value, dict) else value
    )


@pytest.mark.parametrize(("name", "changes", "to", "gates"), CASES, ids=case_name)
def test_native_class_computes_the_mixture(
    name: str, changes: dict[str, Any], to: str, gates: dict[str, Any], siblings: Siblings, tmp_path: Path
) -> None:
    mixture = mixed(siblings(name, **changes), tmp_path / "mixture", gates)
    report = branchmix.export_model(mixture, tmp_path / "native", to=to)
    native = same_logits(mixture, tmp_path / "native")
    assert type(native).__name__ == NATIVES[to].architecture == config(tmp_path / "native")["architectures"][0]
    check = report.verification
    assert check is not None and check.max_difference <= 1e-5 * check.max_logit and check.tensors_byte_identical > 20
    stored = set(weights(tmp_path / "native"))
    assert any(tensor.endswith(f".experts.2.{NATIVES[to].names[2]}.weight") for tensor in stored)


@pytest.mark.parametrize("factor", [2.0, 1.3])
@pytest.mark.parametrize(("name", "to"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_scaled_gates_go_into_down_proj(name: str, to: str, factor: float, siblings: Siblings, tmp_path: Path) -> None:
    mixture = mixed(siblings(name), tmp_path / "mixture", NORMAL_TOP_2, routed_scaling_factor=factor)
    report = branchmix.export_model(mixture, tmp_path / "native", to=to)
    same_logits(mixture, tmp_path / "native")
    assert any("routed_scaling_factor" in note for note in report.plan.notes)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_what_glm_has_and_other_classes_lack_is_carried_over(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """Selection biases, a shared expert, and a factor that leaves the experts' bytes as they are."""
    options: dict[str, Any] = {"routed_scaling_factor": 1.3, "shared_expert": 0.3}
    model, ids = load(mixed(siblings(name), tmp_path / "plain", SIGMOID, **options)), tokens()
    plain = model(ids).logits
    model.config.expert_bias = True
    for number, router in enumerate(module for module in model.modules() if isinstance(module, BranchMixRouter)):
        router.add_bias()
        router.expert_bias.copy_(torch.tensor([0.4, 0.0, -0.4]).roll(number))
    assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
    model.save_pretrained(tmp_path / "mixture")
    branchmix.export_model(tmp_path / "mixture", tmp_path / "native", to="glm4_moe")
    same_logits(tmp_path / "mixture", tmp_path / "native")
    ours, native = weights(tmp_path / "mixture"), weights(tmp_path / "native")
    expert = "model.layers.0.mlp.experts.1.down_proj.weight"
    assert torch.equal(ours[f"model.{expert}"], native[expert])


def test_scaling_rounds_16_bit_weights_unless_it_is_a_power_of_two(siblings: Siblings, tmp_path: Path) -> None:
    models = in_dtype(siblings("llama"), tmp_path / "bf16", torch.bfloat16)
    for factor, exact in ((2.0, True), (1.5, False)):
        mixture = mixed(models, tmp_path / f"m{factor}", NORMAL_TOP_2, routed_scaling_factor=factor)
        report = branchmix.export_model(mixture, tmp_path / f"x{factor}", to="mixtral")
        check = report.verification
        assert check is not None
        assert (check.tolerance < 1e-3) == exact
        assert (check.max_difference <= 1e-5 * check.max_logit) == exact
        assert any("rounds" in note for note in report.plan.notes) != exact


def test_what_is_not_multiplied_is_not_rounded(siblings: Siblings, tmp_path: Path) -> None:
    """glm4_moe has a key for the factor, so that any is exact; and its biases are fp32, as the mixture's are."""
    models = in_dtype(siblings("llama"), tmp_path / "bf16", torch.bfloat16)
    folder = mixed(models, tmp_path / "mixture", SIGMOID, routed_scaling_factor=1.3, shared_expert=0.5)
    file = folder / "model.safetensors"
    biases = {
        name.replace("weight", "expert_bias"): torch.tensor([1 / 3, 0.0, -1 / 3])
        for name in weights(folder)
        if name.endswith("mlp.gate.weight")
    }
    save_file(weights(folder) | biases, file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(folder) | {"expert_bias": True}))
    report = branchmix.export_model(folder, tmp_path / "native", to="glm4_moe")
    check, native = report.verification, weights(tmp_path / "native")
    assert check is not None and check.tolerance < 1e-3
    assert not any("rounds" in note for note in report.plan.notes)
    assert len(biases) == 2
    for name, bias in biases.items():
        stored = native[name.removeprefix("model.").replace("expert_bias", "e_score_correction_bias")]
        assert stored.dtype == torch.float32 and torch.equal(stored, bias)


def test_bfloat16_bytes_are_moved(siblings: Siblings, tmp_path: Path) -> None:
    models = in_dtype(siblings("qwen3"), tmp_path / "bf16", torch.bfloat16)
    mixture = mixed(models, tmp_path / "mixture", RAW_TOP_2)
    branchmix.export_model(mixture, tmp_path / "native", to="qwen3_moe", verify=False)
    ours, native = weights(mixture), weights(tmp_path / "native")
    assert len(native) == len(ours)
    for name, tensor in native.items():
        assert torch.equal(tensor, ours[f"model.{name}"]), name


@pytest.mark.parametrize(
    ("name", "to", "gates", "told"),
    [
        ("qwen3", "qwen3_moe", RAW_TOP_2, "divides the chosen gates"),
        ("qwen3", "qwen3_moe", NORMAL_TOP_2, None),
        ("qwen3", "qwen3_moe", SOFT, None),
        ("qwen2", "qwen2_moe", RAW_TOP_2, None),
        ("qwen2", "qwen2_moe", NORMAL_TOP_2, "takes gates as they are"),
        ("llama", "mixtral", NORMAL_TOP_2, None),
    ],
)
def test_gates_that_llama_cpp_computes_otherwise_are_told(
    name: str, to: str, gates: dict[str, Any], told: str | None, siblings: Siblings, tmp_path: Path
) -> None:
    mixture = mixed(siblings(name), tmp_path / "mixture", gates)
    notes = branchmix.export_model(mixture, tmp_path / "native", to=to, dry_run=True).plan.notes
    about = [note for note in notes if "llama.cpp" in note]
    assert bool(about) == (told is not None) and all(str(told) in note for note in about)


def test_attention_of_the_seed(siblings: Siblings, tmp_path: Path) -> None:
    mixture = mixed(siblings("llama"), tmp_path / "mixture", NORMAL_TOP_2, attention="seed")
    branchmix.export_model(mixture, tmp_path / "native", to="mixtral")
    same_logits(mixture, tmp_path / "native")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def refusal(mixture: Path, out: Path, to: str, **options: Any) -> str:
    with pytest.raises(CompatibilityError) as error:
        branchmix.export_model(mixture, out, to=to, **options)
    assert not out.exists()
    return str(error.value)


REFUSED = [
    ("llama", {}, "mixtral", RAW_TOP_1, ["raw", "qwen2_moe computes the same"]),
    ("llama", {}, "qwen3_moe", NORMAL_TOP_2, ["query and a key norm", "mixtral or qwen2_moe computes the same"]),
    ("llama-bias", {}, "mixtral", NORMAL_TOP_2, ["FFN experts have biases", "biases of q, k, v, o"]),
    ("llama", {"hidden_act": "gelu"}, "mixtral", NORMAL_TOP_2, ["gelu"]),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "mixtral",
     NORMAL_TOP_2, ["0.5 of each head"]),
    ("qwen2", {}, "mixtral", NORMAL_TOP_2, ["biases of q, k, v,", "qwen2_moe"]),
    ("mistral", {}, "qwen2_moe", RAW_TOP_2, ["sliding window of 4"]),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "qwen3_moe", RAW_TOP_2,
     ["some layers"]),
    ("olmo", {}, "olmoe", RAW_TOP_2, ["without gains", "query and a key norm over all"]),
    ("olmo2", {}, "olmoe", RAW_TOP_2, ["norms behind", "flex_olmo computes the same"]),
    ("cohere", {}, "mixtral", RAW_TOP_2, ["side by side", "LayerNorms", "raw"]),
    ("gpt2", {}, "qwen2_moe", RAW_TOP_2, ["LayerNorms", "learned positions", "no gate", "biases"]),
    ("seed-oss", {}, "mixtral", NORMAL_TOP_2, ["not in the table"]),
    ("gemma", {}, "mixtral", NORMAL_TOP_2, ["stored less 1"]),
    ("qwen2", {}, "qwen2_moe", SIGMOID, ["gates are made by sigmoid, and those of qwen2_moe by softmax",
                                         "glm4_moe computes the same"]),
    ("qwen2", {}, "glm4_moe", NORMAL_TOP_2, ["gates are made by softmax", "qwen2_moe computes the same"]),
    ("mistral", {}, "glm4_moe", SIGMOID, ["sliding window of 4"]),
    ("olmo2", {}, "glm4_moe", SIGMOID, ["norms behind", "over all heads together"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "to", "gates", "words"), REFUSED)
def test_what_computes_something_else_is_refused(
    name: str, changes: dict[str, Any], to: str, gates: dict[str, Any], words: list[str], siblings: Siblings,
    tmp_path: Path,
) -> None:  # fmt: skip
    mixture = mixed(siblings(name, **changes), tmp_path / "mixture", gates)
    text = refusal(mixture, tmp_path / "out", to)
    for word in words:
        assert word in text


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_exact_or_refused(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """Whatever the table lets through has the mixture's logits; every family is asked for every class."""
    mixture = mixed(siblings(name), tmp_path / "mixture", NORMAL_TOP_2)
    exact = {to for known, _, to, _ in EXACT if known == name and to != "glm4_moe"}
    for to in NATIVES:
        if to in exact:
            branchmix.export_model(mixture, tmp_path / to, to=to, verify=False)
            same_logits(mixture, tmp_path / to)
        elif to == "qwen2_moe" and name == "phi3":
            branchmix.export_model(mixture, tmp_path / to, to=to)
        else:
            refusal(mixture, tmp_path / to, to)


@pytest.mark.parametrize("attention", BOTH)
def test_attention_experts_are_refused_with_the_way_out(attention: str, siblings: Siblings, tmp_path: Path) -> None:
    mixture = mixed(siblings("llama"), tmp_path / "mixture", RAW_TOP_1, attention=attention)
    text = refusal(mixture, tmp_path / "out", "mixtral")
    assert "attention experts have no native form" in text and "--to dense --expert NAME" in text
    assert "raw" in text, "all reasons at once"


def test_wrong_words(siblings: Siblings, tmp_path: Path) -> None:
    models = siblings("llama")
    mixture, out = mixed(models, tmp_path / "mixture", NORMAL_TOP_2), tmp_path / "out"
    for options, words in (
        ({"to": "mixtrel"}, "did you mean 'mixtral'"),
        ({"to": "mixtral", "expert": "code"}, "goes with --to dense"),
        ({"to": "dense"}, "--expert NAME, of seed, code, math"),
        ({"to": "dense", "expert": "cod"}, "did you mean 'code'"),
    ):
        with pytest.raises(RecipeError, match=words):
            branchmix.export_model(mixture, out, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="llama model, not a mixture"):
        branchmix.export_model(models["code"], out, to="mixtral")
    with pytest.raises(OutputError, match="source folder"):
        branchmix.export_model(mixture, mixture, to="mixtral", force=True)
    assert not out.exists()


def test_other_logits_leave_nothing_behind(siblings: Siblings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is not for show: a wrong export is caught by it."""
    mixture = mixed(siblings("llama"), tmp_path / "mixture", NORMAL_TOP_2, routed_scaling_factor=2.0)
    plan = conversion.plan_export

    def wrong(*args: Any) -> Any:
        found = plan(*args)
        found.config["rms_norm_eps"] = 0.1
        return found

    monkeypatch.setattr(conversion, "plan_export", wrong)
    with pytest.raises(VerificationError, match="differ from the mixture's by"):
        branchmix.export_model(mixture, tmp_path / "out", to="mixtral")
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Dense
# ---------------------------------------------------------------------------------------------------------------------

DENSE = ["llama", "qwen3", "cohere-qk-norm", "gpt-neox", "gpt2", "olmo", "olmo2", "opt", "falcon-new", "phi3", "gemma2"]


@pytest.mark.parametrize("attention", [*BOTH, "average"])
@pytest.mark.parametrize("name", DENSE)
def test_one_expert_is_the_mixture_with_its_gates_on_it(
    name: str, attention: str, siblings: Siblings, tmp_path: Path
) -> None:
    mixture = mixed(siblings(name), tmp_path / "mixture", RAW_TOP_1, attention=attention)
    report = branchmix.export_model(mixture, tmp_path / "math", to="dense", expert="math")
    ours, dense, ids = load(mixture), load(tmp_path / "math"), tokens()
    assert dense.config.model_type == BY_NAME[name].model_type
    with torch.no_grad(), one_hot_gates(ours, 2):
        close(dense(ids).logits, ours(ids).logits)
    with torch.no_grad(), one_hot_gates(ours, 1):
        assert not torch.allclose(dense(ids).logits, ours(ids).logits, atol=1e-3)
    assert report.verification is not None and "seed, code are left out" in report.plan.notes[0]


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2", "falcon-new", "phi3", "opt"])
def test_an_expert_of_identical_ones_is_the_seed(name: str, siblings: Siblings, tmp_path: Path) -> None:
    """Byte for byte, fused and transposed matrices too."""
    seed = siblings(name)["seed"]
    same = {"seed": seed, "code": seed, "math": seed}
    mixture = mixed(same, tmp_path / "mixture", RAW_TOP_1, attention="kv_experts")
    branchmix.export_model(mixture, tmp_path / "code", to="dense", expert="code", verify=False)
    ours, theirs = weights(tmp_path / "code"), weights(seed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[tensor], value) for tensor, value in theirs.items())


def test_folded_norms_and_rotary_bases_of_the_expert_come_along(siblings: Siblings, tmp_path: Path) -> None:
    models = dict(siblings("llama"))
    models["math"] = BY_NAME["llama"].save(
        tmp_path / "math", 2, rope_parameters={"rope_type": "default", "rope_theta": 77.0}
    )
    mixture = mixed(models, tmp_path / "m", RAW_TOP_1, attention="kv_experts", merge={"fold_norms": True})
    branchmix.export_model(mixture, tmp_path / "dense", to="dense", expert="math")
    dense = load(tmp_path / "dense")
    assert dense.config.rope_parameters["rope_theta"] == 77.0
    assert bool((dense.model.layers[0].input_layernorm.weight == 1).all())


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_mixture_of_one_expert_is_dense(factor: float, siblings: Siblings, tmp_path: Path) -> None:
    from mixtures import random_mixture

    one = random_mixture("llama", num_experts=1, num_experts_per_tok=1, routed_scaling_factor=factor)
    one.save_pretrained(tmp_path / "one")
    branchmix.export_model(tmp_path / "one", tmp_path / "dense", to="dense")
    same_logits(tmp_path / "one", tmp_path / "dense")


def test_a_mixture_without_experts_is_dense(tmp_path: Path) -> None:
    from mixtures import random_mixture

    random_mixture("llama", "average", ffn="average").save_pretrained(tmp_path / "soup")
    branchmix.export_model(tmp_path / "soup", tmp_path / "dense", to="dense")
    same_logits(tmp_path / "soup", tmp_path / "dense")
    with pytest.raises(RecipeError, match="leave --expert out"):
        branchmix.export_model(tmp_path / "soup", tmp_path / "x", to="dense", expert="code")
    assert "not experts: --to dense" in refusal(tmp_path / "soup", tmp_path / "x", "mixtral")


def test_a_trained_mixture_as_transformers_saves_it(siblings: Siblings, tmp_path: Path) -> None:
    """Other order of tensors, a seed_config with all defaults, and no branchmix.json."""
    mixture = mixed(siblings("qwen3", tie_word_embeddings=True), tmp_path / "mixture", RAW_TOP_2)
    load(mixture).save_pretrained(tmp_path / "saved")
    branchmix.export_model(tmp_path / "saved", tmp_path / "native", to="qwen3_moe")
    same_logits(tmp_path / "saved", tmp_path / "native")


# ---------------------------------------------------------------------------------------------------------------------
# Folder and command
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Done:
    """What a command did."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command line, in this process: each start of a new one imports torch."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["branchmix", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        assert isinstance(left.value.code, int)
        return Done(left.value.code, *capsys.readouterr())

    return call


def test_the_command(siblings: Siblings, tmp_path: Path, run: Callable[..., Done]) -> None:
    mixture, out = mixed(siblings("llama"), tmp_path / "mixture", NORMAL_TOP_2), tmp_path / "out"
    (mixture / "chat_template.jinja").write_text("{{ messages }}")
    planned = run("export", mixture, out, "--to", "mixtral", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["dry_run"] is True and not out.exists()
    done = run("export", mixture, out, "--to", "mixtral", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bytes"] == json.loads(planned.stdout)["bytes"] == sum(t.nbytes for t in weights(out).values())
    assert told["verification"]["max_difference"] <= 1e-4 and told["to"] == told["model_type"] == "mixtral"
    names = {file.name for file in out.iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "branchmix.json", "chat_template.jinja"} | (
        {"generation_config.json"} & {file.name for file in mixture.iterdir()}
    )
    record = json.loads((out / "branchmix.json").read_text())
    assert record["exported"]["to"] == "mixtral" and record["recipe"]["attention"] == "average"
    card = (out / "README.md").read_text()
    assert "# BTX: FFN experts, averaged attention, as mixtral" in card and "trust_remote_code" not in card

    again = run("export", mixture, out, "--to", "mixtral")
    assert again.returncode == 2 and "exists already" in again.stderr
    forced = run("export", mixture, out, "--to", "dense", "--expert", "code", "--force", "--no-verify")
    assert forced.returncode == 0 and "wrote" in forced.stdout, forced.stderr
    assert config(out)["model_type"] == "llama" and "Expert code of a mixture" in (out / "README.md").read_text()

    refused = run("export", mixture, tmp_path / "no", "--to", "qwen3_moe")
    assert refused.returncode == 2 and all(line.startswith("error: ") for line in refused.stderr.splitlines())


def test_planning_reads_no_weights(siblings: Siblings, tmp_path: Path) -> None:
    mixture = mixed(siblings("llama"), tmp_path / "mixture", NORMAL_TOP_2)
    code = (
        f"import sys, branchmix\nbranchmix.export_model({str(mixture)!r}, {str(tmp_path / 'out')!r}, to='mixtral', "
        "verify=False)\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_table_has_transformers_defaults() -> None:
    """For config.json files that leave keys out."""
    for name, family in families().items():
        default = AutoConfig.for_model(name)
        if hasattr(default, "rms_norm_eps") and family.native_norms is not None and family.special is None:
            assert default.rms_norm_eps == family.defaults.get("rms_norm_eps", 1e-6), name
        if family.windowed == "all":
            assert default.sliding_window == family.window, name


def test_written_configs_hold_what_their_classes_know(siblings: Siblings, tmp_path: Path) -> None:
    """No key that the class does not have, but for rotary parameters in the older form and head_dim."""
    for name, to, gates in (("llama", "mixtral", NORMAL_TOP_2), ("qwen2", "qwen2_moe", RAW_TOP_2),
                            ("qwen3", "qwen3_moe", RAW_TOP_2), ("olmo2", "flex_olmo", RAW_TOP_2)):  # fmt: skip
        mixture = mixed(siblings(name), tmp_path / f"{to}-mixture", gates)
        branchmix.export_model(mixture, tmp_path / to, to=to, verify=False)
        known, older = AutoConfig.for_model(to), {"rope_theta", "rope_scaling", "head_dim"}
        assert all(hasattr(known, key) for key in config(tmp_path / to) if key not in older), to
