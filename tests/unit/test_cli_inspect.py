"""``branchmix inspect`` as a user runs it: what stands on stdout, what on stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from branchmix.cli import app
from branchmix.cli.models import inspect_command
from branchmix.errors import CheckpointError

CONFIG: dict[str, Any] = {
    "model_type": "branchmix",
    "seed_config": {
        "model_type": "cohere",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "vocab_size": 256_000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "num_experts": 4,
    "attention": "kv_experts",
    "ffn": "experts",
    "num_experts_per_tok": 1,
}
APP = typer.Typer()
APP.command("inspect")(inspect_command)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIG))
    return file


def test_json_has_the_promised_keys_and_nothing_else_is_printed(config_file: Path) -> None:
    result = CliRunner().invoke(APP, [str(config_file), "--context", "256", "--json"])
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found["parameters"]["total"] == 776_002_560
    assert found["parameters"]["active"] == 662_756_352
    flops = found["flops_per_token"]
    assert flops["total"] == flops["attention"] + flops["ffn"] + flops["routers"] == 48_250_880
    assert flops["whole_model"]["non_embedding"] == flops["layers"] * flops["total"]
    assert found["kv_cache_bytes_per_token"] == 6 * 2 * 4 * 8 * 128 * 2
    assert found["paper"]["table_7_per_layer"]["total"] == 48_257_024
    assert (found["context"], found["dtype"], found["block"]) == (256, "bfloat16", "parallel")


def test_parts_sum_to_the_totals(config_file: Path) -> None:
    counts = json.loads(CliRunner().invoke(APP, [str(config_file), "--json"]).stdout)["parameters"]
    parts = counts["active_by_part"]
    assert sum(counts[part] for part in parts) == counts["total"]
    assert sum(parts.values()) == counts["active"]


def test_dtype_scales_the_cache(config_file: Path) -> None:
    bf16, fp32 = (
        json.loads(CliRunner().invoke(APP, [str(config_file), "--dtype", dtype, "--json"]).stdout)
        for dtype in ("bf16", "fp32")
    )
    assert fp32["kv_cache_bytes_per_token"] == 2 * bf16["kv_cache_bytes_per_token"]
    assert fp32["weight_bytes"] == 2 * bf16["weight_bytes"] == 4 * 776_002_560


def test_tables_show_the_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "a [bold] name"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    result = CliRunner().invoke(APP, [str(folder), "--context", "256"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    for text in (
        "a [bold] name",
        "776,002,560",
        "662,756,352",
        "35,651,584",
        "48,250,880",
        "98,304 bytes",
        "4 x cohere",
    ):
        assert text in result.stdout


def test_pipes_get_whole_lines_and_the_sizes_of_other_commands(config_file: Path) -> None:
    lines = CliRunner().invoke(APP, [str(config_file)], env={"COLUMNS": "80"}).stdout.splitlines()
    assert lines[0].startswith(f"{config_file}: mixture of 4") and lines[0].endswith("FFN 2048")
    assert "weights in bfloat16: 1.55 GB" in lines
    assert any(line.startswith("the BAM paper's tables") and line.endswith("--json says why") for line in lines)


def test_notices_go_to_stderr(config_file: Path) -> None:
    result = CliRunner().invoke(APP, [str(config_file), "--context", "4096", "--json"])
    assert "exceeds the model's 2,048 positions" in result.stderr
    assert json.loads(result.stdout)["notices"]


def test_errors_are_ours(tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, [str(tmp_path / "missing")])
    assert isinstance(result.exception, CheckpointError)


def test_help_has_examples() -> None:
    result = CliRunner().invoke(app, ["inspect", "--help"], env={"COLUMNS": "200"})
    assert "branchmix inspect config.json --context 256 --json" in result.stdout


def test_json_needs_neither_torch_nor_rich_tables(config_file: Path) -> None:
    code = (
        "import sys, typer; from branchmix.cli.models import inspect_command;"
        f"inspect_command({str(config_file)!r}, as_json=True);"
        "print({'torch', 'transformers', 'numpy', 'pydantic', 'rich.table'} & set(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "set()"
