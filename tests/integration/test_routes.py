"""`branchmix routes`: every number against a naive computation, on mixtures of ours and of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import corpora
from branchmix.cli import app
from branchmix.errors import BranchMixError, CheckpointError, OutputError, RecipeError
from branchmix.evaluate.routing.routes import Routes, read_texts, routes
from branchmix.models.routers import RouterOutput, Rule, find_routers
from families import SIZES
from routed import NAMES, OTHERS, TEXTS, data_file, ours, save, theirs

WINDOW = 16
# ---- the naive computation ----


@torch.no_grad()
def recorded(model: Any, places: list[Any], tokens: list[int], window: int) -> list[list[tuple[Any, Any]]]:
    """(probabilities, chosen) of each token of one document in each router, from windows written out by hand."""
    prefix = corpora.tokenizer().eos_token_id
    row = [prefix, *tokens]
    found: list[list[tuple[Any, Any]]] = [[] for _ in places]
    done = 0
    while done < len(row):
        end = min(done + (window // 2 if done else window), len(row))
        start = max(0, end - window)
        kept: dict[int, Any] = {}
        hooks = [
            place.module.register_forward_hook(lambda _, __, output, n=n, kept=kept: kept.__setitem__(n, output))
            for n, place in enumerate(places)
        ]
        model(torch.tensor([row[start:end]]))
        for hook in hooks:
            hook.remove()
        for n, place in enumerate(places):
            for position in range(max(done, 1), end):
                found[n].append(by_model(place.module, kept[n], position - start))
        done = end
    return found


def by_model(router: Any, output: Any, position: int) -> tuple[torch.Tensor, list[int]]:
    """What the model's own code makes of a token's logits, by the kind of its router."""
    name = type(router).__name__
    if name == "BranchMixAttentionRouter":
        p = output[0][0, position].double().softmax(-1)
        return p, p.argsort(descending=True)[: router.top_k].tolist()
    logits = output[0][position].double()
    if name == "DeepseekV3TopkRouter":
        p = logits.sigmoid()
        choice = p + router.e_score_correction_bias.double()
        groups = choice.view(2, 4).topk(2, dim=-1)[0].sum(-1)
        choice = torch.where(torch.arange(8) // 4 == groups.argmax(), choice, -math.inf)
        return p / p.sum(), sorted(choice.topk(3).indices.tolist(), key=lambda e: -p[e])
    p = logits.softmax(-1)
    return p, p.argsort(descending=True)[: router.top_k].tolist()


def naive(folder: Path, texts: dict[str, list[str]] = TEXTS, window: int = WINDOW) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    places = find_routers(model)
    rows = {
        domain: [recorded(model, places, corpora.tokenizer()(text)["input_ids"], window) for text in documents]
        for domain, documents in texts.items()
    }
    found: dict[str, Any] = {"routers": {}, "agreement": {}}
    strongest: dict[tuple[str, int], list[int]] = {}
    gates: dict[tuple[str, int], list[Any]] = {}
    for n, place in enumerate(places):
        experts = len(rows["prose"][0][n][0][0])
        loads, probabilities = {}, {}
        for domain, documents in rows.items():
            of_domain = [token for document in documents for token in document[n]]
            load = torch.zeros(len(of_domain), experts, dtype=torch.float64)
            for row, (p, chosen) in enumerate(of_domain):
                load[row] = (
                    p if len(chosen) == experts else load[row].index_fill(0, torch.tensor(chosen), 1 / len(chosen))
                )
            loads[domain], probabilities[domain] = load, torch.stack([p for p, _ in of_domain])
            strongest.setdefault((place.kind, place.layer), []).extend(chosen[0] for _, chosen in of_domain)
            gates.setdefault((place.kind, place.layer), []).extend(p for p, _ in of_domain)
        everything = torch.cat(list(probabilities.values()))
        found["routers"][place.kind, place.layer] = {
            "load": torch.cat(list(loads.values())).mean(0).tolist(),
            "gate": everything.mean(0).tolist(),
            "by_domain": {domain: load.mean(0).tolist() for domain, load in loads.items()},
            "gate_by_domain": {domain: p.mean(0).tolist() for domain, p in probabilities.items()},
            "token_entropy": float(-(everything * everything.log2()).sum(-1).mean()),
            "strongest": torch.tensor(strongest[place.kind, place.layer]).bincount(minlength=experts).tolist(),
        }
    for kind, layer in strongest:
        if kind == "ffn" and ("attention", layer) in strongest:
            pairs = list(zip(strongest["ffn", layer], strongest["attention", layer], strict=True))
            overlap = [
                float(torch.minimum(a, b).sum())
                for a, b in zip(gates["ffn", layer], gates["attention", layer], strict=True)
            ]
            found["agreement"][layer] = (sum(a == b for a, b in pairs) / len(pairs), sum(overlap) / len(overlap))
    return found


def check(found: Routes, expected: dict[str, Any]) -> None:
    report = found.report
    assert {(kind, layer["layer"]) for kind, layers in report.layers.items() for layer in layers} == set(
        expected["routers"]
    )
    for kind, layers in report.layers.items():
        for layer in layers:
            wanted = expected["routers"][kind, layer["layer"]]
            for key in ("load", "gate", "token_entropy"):
                assert layer[key] == pytest.approx(wanted[key], abs=1e-5), (kind, layer["layer"], key)
            for key in ("by_domain", "gate_by_domain"):
                for domain, shares in layer[key].items():
                    assert shares == pytest.approx(wanted[key][domain], abs=1e-5)
                    assert sum(shares) == pytest.approx(1.0)
    for (
        router
    ) in found.counts.routers:  # among the chosen, which a bias or a group may have made others than the greatest
        wanted = expected["routers"][router.place.kind, router.place.layer]
        assert router.strongest_E.tolist() == wanted["strongest"]
    assert {pair["layer"] for pair in report.agreement} == set(expected["agreement"])
    for pair in report.agreement:
        assert (pair["same"], pair["overlap"]) == pytest.approx(expected["agreement"][pair["layer"]], abs=1e-5)


# ---- numbers ----


@pytest.mark.parametrize(
    ("attention", "top_k", "attention_top_k", "family"),
    [
        ("kv_experts", 1, None, "llama"),
        ("kv_sharing", 2, None, "cohere"),
        ("kv_experts", 3, 2, "llama"),
        ("kv_sharing", 1, 1, "gpt2"),
        ("average", 2, None, "llama"),
    ],
)
def test_our_mixtures(tmp_path: Path, attention: str, top_k: int, attention_top_k: int | None, family: str) -> None:
    folder = ours(tmp_path / "model", attention, top_k, attention_top_k, family)
    found = routes(str(folder), data=data_file(tmp_path), max_length=WINDOW, dtype="float32")
    check(found, naive(folder))
    report = found.report
    assert report.experts == NAMES and bool(report.agreement) == (attention != "average")
    sizes = {name: [len(corpora.tokenizer()(text)["input_ids"]) for text in texts] for name, texts in TEXTS.items()}
    assert report.domains == {name: {"documents": len(n), "tokens": sum(n)} for name, n in sizes.items()}
    facts = report.routers["ffn"]
    assert (facts["top_k"], facts["soft"], facts["score"]) == (top_k, top_k == 3, "softmax")
    assert facts["score_found"] and facts["weights"] == "raw"
    assert not report.notes


@pytest.mark.parametrize("model_type", OTHERS)
def test_mixtures_of_transformers(tmp_path: Path, model_type: str) -> None:
    folder = theirs(tmp_path / "model", model_type)
    found = routes(str(folder), data=data_file(tmp_path), max_length=WINDOW, dtype="float32")
    check(found, naive(folder))
    options = OTHERS[model_type]
    facts = found.report.routers["ffn"]
    assert found.report.routers.keys() == {"ffn"} and facts["top_k"] == options["num_experts_per_tok"]
    assert facts["score"] == ("sigmoid" if model_type == "deepseek_v3" else "softmax")
    assert facts["score_found"] == (facts["top_k"] > 1)
    raw = model_type in ("qwen2_moe", "olmoe")
    assert facts["weights"] == ("raw" if raw else "normalised")
    layers = [layer["layer"] for layer in found.report.layers["ffn"]]
    assert layers == ([1, 2] if model_type == "deepseek_v3" else [0, 1])
    assert any("divided by their sum" in note for note in found.report.notes) == (model_type == "deepseek_v3")
    assert any("softmax is assumed" in note for note in found.report.notes) == (model_type == "qwen3_moe")


def test_batches_order_and_padding_change_nothing(tmp_path: Path) -> None:
    folder = ours(tmp_path / "model", "kv_experts", 1, None)
    data = data_file(tmp_path)
    reports = [
        routes(str(folder), data=data, max_length=WINDOW, dtype="float32", batch_tokens=size).report
        for size in (1, 50, 100_000)
    ]
    backwards = data_file(tmp_path, {name: texts[::-1] for name, texts in TEXTS.items()})
    reports.append(routes(str(folder), data=backwards, max_length=WINDOW, dtype="float32").report)
    for report in reports[1:]:
        assert_same(report.as_dict(), reports[0].as_dict())


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if key != "typical":  # ties stand in any order
                assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == (pytest.approx(other, abs=1e-5) if isinstance(one, float) else other)


def test_experts_by_domain_are_told_apart_and_typical_tokens_found(tmp_path: Path) -> None:
    """A model whose gates are set by hand: the first layer's by the token, so that shares are known exactly."""
    folder = ours(tmp_path / "model", "kv_experts", 1, None)
    tokenizer = corpora.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    first, second = tokenizer(" two")["input_ids"][0], tokenizer(" large")["input_ids"][0]
    with torch.no_grad():  # layer 0 sees the embedding alone in its attention gate
        embedding = model.get_input_embeddings().weight
        embedding[first], embedding[second] = torch.ones(32), -torch.ones(32)
        gate = next(place for place in find_routers(model) if (place.kind, place.layer) == ("attention", 0))
        gate.module.weight.zero_()
        gate.module.weight[1], gate.module.weight[2] = 50.0, -50.0
    save(model, folder)
    data = data_file(tmp_path, {"a": [" two" * 9, " two" * 7], "b": [" large" * 8, " large" * 5]})
    report = routes(str(folder), data=data, dtype="float32").report
    layer = report.layers["attention"][0]
    assert layer["by_domain"]["a"] == pytest.approx([0, 1, 0], abs=1e-6)
    assert layer["by_domain"]["b"] == pytest.approx([0, 0, 1], abs=1e-6)
    assert layer["mutual_information"] == pytest.approx(1.0, abs=1e-6)
    assert layer["mutual_information_corrected"] == pytest.approx(1.0, abs=1e-6)
    assert layer["token_entropy"] == pytest.approx(0.0, abs=1e-6)
    assert layer["load_entropy"] == pytest.approx(0.993, abs=1e-3)
    assert layer["max_violation"] == pytest.approx(3 * max(layer["load"]) - 1) and layer["dead_experts"] == 1
    assert layer["bias_spread"] is None
    words = [[token["token"] for token in tokens] for tokens in layer["typical"]]
    assert words == [[], [" two"], [" large"]]
    assert (layer["typical"][1][0]["share"], layer["typical"][1][0]["count"]) == (1.0, 16)


def test_what_made_the_weights_is_found_by_trying() -> None:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    for name, score in (
        ("softmax", logits.softmax(-1)),
        ("sigmoid", logits.sigmoid()),
        ("sqrt(softplus)", torch.nn.functional.softplus(logits).sqrt()),
    ):
        for top_k in (1, 2):
            values, index = score.topk(top_k, dim=-1)
            assert Rule.found_in(RouterOutput(logits, index, 2.5 * values)) == Rule(name, "raw", True)
        shares = values / values.sum(-1, keepdim=True)
        assert Rule.found_in(RouterOutput(logits, index, shares)) == Rule(name, "normalised", True)
        coarse = shares.bfloat16().float()
        assert Rule.found_in(RouterOutput(logits.bfloat16().float(), index, coarse)) == Rule(name, "normalised", True)
    probabilities = logits.softmax(-1)
    values, index = probabilities.topk(2, dim=-1)
    assert Rule.found_in(RouterOutput(probabilities, index, values)) == Rule("probabilities", "raw", True)
    torch.testing.assert_close(Rule("probabilities", "raw", True).probabilities(probabilities), probabilities)
    assert Rule.found_in(RouterOutput(logits, index, None)) == Rule("softmax", "unknown", False)
    assert not Rule.found_in(RouterOutput(logits, index, torch.rand(40, 2) + 0.1)).found


def test_other_shapes_of_outputs() -> None:
    """Logits alone, as in DBRX; scores of all experts with zeros for those not chosen, as in Llama 4."""
    for model_type, options, changes in (
        (
            "dbrx",
            {
                "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48},
                "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
            },
            {"d_model": 32},
        ),
        (
            "llama4_text",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
            {"intermediate_size_mlp": 48},
        ),
    ):
        sizes = {"n_layers": 2, "n_heads": 4, **SIZES} if model_type == "dbrx" else SIZES
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **{**sizes, **options, **changes})
        ).eval()
        places = find_routers(model)
        assert places and {place.kind for place in places} == {"ffn"}
        kept = []
        places[0].module.register_forward_hook(lambda _, __, output, kept=kept: kept.append(output))
        with torch.no_grad():
            model(torch.arange(3, 12)[None])
        found = places[0].read(kept[0])
        torch.testing.assert_close(found.index_Sk, found.logits_SE.topk(2, dim=-1).indices)
        rule = Rule.found_in(found)
        assert (rule.score, rule.found) == (("softmax", False) if model_type == "dbrx" else ("sigmoid", True))


def test_a_router_of_attention_is_told_from_one_of_the_ffn() -> None:
    """JetMoE has both; the recorded attention block contains its router, which is the one that counts."""
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jetmoe", **sizes)).eval()
    places = find_routers(model)
    assert [(place.kind, place.layer) for place in places] == [
        ("ffn", 0),
        ("ffn", 1),
        ("attention", 0),
        ("attention", 1),
    ]
    assert all(place.name.endswith(".router") and place.top_k == 2 for place in places)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    assert find_routers(dense) == []


# ---- the command ----


def test_the_command(tmp_path: Path) -> None:
    folder = ours(tmp_path / "model", "kv_experts", 1, None)
    out, page, plots = tmp_path / "numbers", tmp_path / "routes.html", tmp_path / "plots"
    options = [
        "--data",
        str(data_file(tmp_path)),
        "--out",
        str(out),
        "--html",
        str(page),
        "--plots",
        str(plots),
        "--json",
    ]
    done = CliRunner().invoke(app, ["routes", str(folder), *options])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((out / "routes.json").read_text())
    assert [layer["layer"] for layer in found["ffn"]] == [layer["layer"] for layer in found["attention"]] == [0, 1]
    rows = (out / "shares.csv").read_text().splitlines()
    assert rows[0] == "router,layer,domain,expert,load,gate" and len(rows) == 1 + 2 * 2 * 2 * 3
    kind, layer, domain, expert, load, _ = rows[1].split(",")
    assert float(load) == pytest.approx(found[kind][int(layer)]["by_domain"][domain][NAMES.index(expert)], abs=1e-6)
    assert sorted(file.name for file in plots.iterdir()) == [
        f"routing-{name}.{kind}" for name in ("layers", "shares") for kind in ("pdf", "png")
    ]
    assert all(file.stat().st_size > 4000 for file in plots.iterdir()) and page.stat().st_size > 10_000
    table = CliRunner().invoke(app, ["routes", str(folder), *options[:2]]).stdout
    assert "FFN experts: share of tokens by domain (top-1 of 3)" in table and "soft gate over all experts" in table
    share = f"{100 * found['ffn'][0]['by_domain']['prose'][0]:.0f}"
    assert share in next(line for line in table.splitlines() if line.strip().startswith("0 "))


def test_nothing_is_overwritten_or_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ours(tmp_path / "model", "kv_experts", 1, None)
    page, out = tmp_path / "routes.html", tmp_path / "routing"
    command = ["routes", str(folder), "--text", "one two", "--html", str(page), "--out", str(out)]
    page.write_text("mine")
    for more, message in (
        ([], "routes.html: exists already"),
        (["--out", str(tmp_path / "model.json" / "x"), "--force"], "model.json is a file, not a folder"),
        (["--plots", "/proc/nowhere", "--force"], "is not writable|cannot be written"),
        (["--html", str(tmp_path), "--force"], "is a folder: give the name of a file"),
    ):
        (tmp_path / "model.json").write_text("{}")
        monkeypatch.setattr("os.access", lambda place, mode: not str(place).startswith("/proc"))
        with pytest.raises(OutputError, match=message):
            CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
        assert page.read_text() == "mine" and not out.exists()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop)
        assert CliRunner().invoke(app, [*command, "--force"]).exit_code != 0
    assert page.read_text() == "mine" and list(out.iterdir()) == []
    assert CliRunner().invoke(app, [*command, "--force"]).exit_code == 0
    assert page.read_text().startswith("<!doctype html>") and len(list(out.iterdir())) == 2


def test_texts_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ours(tmp_path / "model", "kv_experts", 1, None)
    (tmp_path / "three.txt").write_text("three four")
    words = [
        "routes",
        str(folder),
        "--json",
        "--text",
        "one two",
        "--text",
        "-",
        "--text",
        f"@{tmp_path / 'three.txt'}",
    ]
    done = CliRunner().invoke(app, words, input="two three")
    found = json.loads(done.stdout)
    texts = ("one two", "two three", "three four")
    tokens = sum(len(corpora.tokenizer()(text)["input_ids"]) for text in texts)
    assert found["domains"] == {"text": {"documents": 3, "tokens": tokens}}
    assert found["ffn"][0]["mutual_information"] is None
    expected = naive(folder, {"prose": list(texts)}, window=64)["routers"]["ffn", 1]["load"]
    assert found["ffn"][1]["load"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, RecipeError, "no text to route"),
        ({"texts": ["one"], "data": "data.yaml"}, RecipeError, "either --text or --data, not both"),
        ({"texts": ["one"], "max_length": 65}, RecipeError, "max_length: 65 is more than the 64 positions"),
        ({"texts": ["one"], "dtype": "int4"}, RecipeError, "dtype: 'int4' is not one of"),
        ({"texts": ["one"], "model": "nowhere/at/all"}, CheckpointError, "no such folder"),
        ({"texts": ["one"], "model": "dense"}, CheckpointError, r"dense: a dense model \(llama\): it has no routers"),
        ({"data": "empty.yaml"}, BranchMixError, "b: has no"),
        ({"data": "missing.yaml"}, RecipeError, "missing.yaml: there is no such"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ours(Path("mixture"), "kv_experts", 1, None)
    if options.get("model") == "dense":
        config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 300})
        save(AutoModelForCausalLM.from_config(config), Path("dense"))
    Path("empty.yaml").write_text("data: {a: {files: a.txt}, b: {files: b.jsonl}}\nheld_out: all")
    Path("a.txt").write_text("one two")
    Path("b.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    options = {"model": "mixture", **options}
    with pytest.raises(error, match=message) as caught:
        routes(options.pop("model"), **options)
    assert "\n" not in str(caught.value)


def test_empty_texts_and_missing_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    for given, message in (
        (" ", "the text is empty"),
        (f"@{tmp_path}/empty.txt", r"empty.txt is empty"),
        (f"@{tmp_path}/none.txt", "none.txt: No such file"),
        (f"@{tmp_path}", "Is a directory"),
    ):
        with pytest.raises(RecipeError, match=message):
            read_texts([given])


def test_broken_weights_are_one_line(tmp_path: Path) -> None:
    folder = ours(tmp_path / "model", "kv_experts", 1, None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        find_routers(model)[-1].module.weight.fill_(math.nan)
    save(model, folder)
    with pytest.raises(CheckpointError, match=r"model: the logits of .*layers.1.* are not finite"):
        routes(str(folder), texts=["one two"])
