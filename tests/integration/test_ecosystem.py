"""Other people's tools on a mixture's folder, in a process where branchmix cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_remote_code import WITHOUT_BRANCHMIX
from transformers import PreTrainedTokenizerFast

import branchmix
from mixtures import load, recipe
from tokenizers_of_bytes import save_byte_tokenizer

Siblings = Callable[..., dict[str, Path]]


@pytest.fixture(scope="module")
def mixture(siblings: Siblings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BAM mixture of 2 layers with a tokenizer of bytes, as a user has it."""
    folder = tmp_path_factory.mktemp("ecosystem") / "mixture"
    branchmix.upcycle(recipe(siblings("llama", vocab_size=300), routing={"ffn": {"top_k": 2}}), folder)
    save_byte_tokenizer(folder)
    return folder


def without_branchmix(script: str, *arguments: object, work: Path) -> str:
    """Runs a script in a process of its own; returns what it printed."""
    command = [sys.executable, "-c", WITHOUT_BRANCHMIX + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


LORA = """
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
with torch.no_grad():
    before = model(ids).logits
targets = ["q_proj", "k_proj", "v_proj", "self_attn.o_proj"]
lora = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=True))
names = [name for name, parameter in lora.named_parameters() if parameter.requires_grad]
assert len(names) == 2 * 2 * 4 and all("lora_" in name for name in names), names
optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], 0.05)
for _ in range(3):
    loss = lora(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
lora.eval()
with torch.no_grad():
    adapted = lora(ids).logits
lora.save_pretrained(sys.argv[2] + "/adapter")
merged = lora.merge_and_unload()
merged.save_pretrained(sys.argv[2] + "/merged")
save_file({"before": before, "adapted": adapted, "ids": ids}, sys.argv[2] + "/logits.safetensors")
"""


@pytest.mark.slow
def test_peft_trains_saves_and_merges_a_lora(mixture: Path, tmp_path: Path) -> None:
    """LoRA on the experts' attention; adapter and merged folder load again here and compute what PEFT computed."""
    from peft import PeftModel

    without_branchmix(LORA, mixture, tmp_path, work=tmp_path)
    logits = load_file(tmp_path / "logits.safetensors")
    assert not torch.allclose(logits["before"], logits["adapted"], atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(load(mixture)(logits["ids"]).logits, logits["before"], rtol=0, atol=1e-5)
        adapted = PeftModel.from_pretrained(load(mixture), tmp_path / "adapter").eval()
        torch.testing.assert_close(adapted(logits["ids"]).logits, logits["adapted"], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            load(tmp_path / "merged")(logits["ids"]).logits, logits["adapted"], rtol=0, atol=1e-4
        )


SFT = """
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = Dataset.from_dict({"text": ["def area(r): return r * r", "The court held that"] * 8})
config = SFTConfig(
    output_dir=sys.argv[2], max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
    max_length=32, report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
)
trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
trainer.train()
assert model.config.output_router_logits, "TRL adds its balance loss"
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
assert losses[-1] < 0.9 * losses[0], losses
router = model.model.model.layers[0].mlp.gate.weight
trainer.save_model(sys.argv[2] + "/trained")
print(losses[0], losses[-1])
"""


@pytest.mark.slow
def test_trl_trains_and_saves_a_mixture(mixture: Path, tmp_path: Path) -> None:
    """SFTTrainer lowers the loss, moves experts and both kinds of routers, and leaves a mixture."""
    without_branchmix(SFT, mixture, tmp_path, work=tmp_path)
    before, after = load(mixture).state_dict(), load(tmp_path / "trained").state_dict()
    assert before.keys() == after.keys()
    for part in (".mlp.gate.weight", ".expert_gate.weight", ".heads.q_proj.weight", ".experts.down_proj"):
        moved = [name for name in before if name.endswith(part)]
        assert moved and all(not torch.equal(before[name], after[name]) for name in moved), part
    assert (tmp_path / "trained" / "modeling_branchmix.py").is_file()


TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
metadata: {version: 1}
"""

LM_EVAL = """
from lm_eval.__main__ import cli_evaluate

sys.argv[0] = "lm_eval"
cli_evaluate()
"""


@pytest.mark.slow
def test_lm_eval_command(mixture: Path, tmp_path: Path) -> None:
    """lm-eval's own command line; its log-likelihoods are the model's, computed here."""
    rows = [
        {"question": "ab", "choices": ["c", "zzz"], "answer": 0},
        {"question": "The", "choices": [" x", " y"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    without_branchmix(
        LM_EVAL, "run", "--model", "hf", "--model_args", f"pretrained={mixture},trust_remote_code=True,dtype=float32",
        "--tasks", "tiny", "--include_path", tmp_path / "tasks", "--batch_size", 2, "--device", "cpu",
        "--output_path", tmp_path / "out", "--log_samples", work=tmp_path,
    )  # fmt: skip
    (samples,) = (tmp_path / "out").rglob("samples_tiny_*.jsonl")
    model, tokenizer = load(mixture), PreTrainedTokenizerFast.from_pretrained(mixture)
    for line in map(json.loads, samples.read_text().splitlines()):
        document = line["doc"]
        for choice, answer in zip(document["choices"], line["filtered_resps"], strict=True):
            context = tokenizer(document["question"]).input_ids
            ids = torch.tensor([[*context, *tokenizer(" " + choice).input_ids]])
            with torch.no_grad():
                scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
            expected = float(scores[len(context) - 1 :].sum())
            assert abs(float(answer[0]) - expected) < 1e-3, (choice, answer, expected)
