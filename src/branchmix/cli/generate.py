"""``branchmix generate``: let a mixture (or any causal LM) continue a text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from branchmix.errors import CheckpointError, RecipeError

EPILOG = """\b
Examples:
  branchmix generate mixture "The capital of France is"
  branchmix generate mixture "def fibonacci(n):" --max-new-tokens 80 --temperature 0.7 --seed 1
"""


def generate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.", show_default=False)],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling, for temperature > 0.")] = 0,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32, or auto: as stored.")] = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that a checkpoint brings along.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompt, text and tokens/s as JSON.")] = False,
) -> None:
    """Continue a text."""
    from branchmix.checkpoint.hub import resolve
    from branchmix.cli.console import quiet_libraries

    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise RecipeError(f"--dtype {dtype}: is none of auto, bfloat16, float16, float32")
    folder = resolve(model).folder
    if not prompt:
        raise RecipeError("PROMPT is empty: give some text to continue")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json: give the folder of a model")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(f"{folder}: has no tokenizer files: copy the seed's tokenizer beside the weights")
    quiet_libraries()
    _generate(folder, prompt, max_new_tokens, temperature, seed, dtype, chat, trust_remote_code, as_json)


def _generate(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
    chat: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    except Exception as error:  # whatever transformers and the readers below it raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = "it brings code of its own: read that code, then allow it with --trust-remote-code"
        raise CheckpointError(f"{folder}: transformers cannot load it: {reason}") from error
    if chat and not tokenizer.chat_template:
        raise RecipeError(f"--chat: the tokenizer of {folder} has no chat template: leave --chat out")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if torch.cuda.is_available():
        model, inputs = model.to("cuda"), inputs.to("cuda")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    start = time.perf_counter()
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - start
    new = tokens[0, inputs["input_ids"].shape[1] :]
    if as_json:
        text = tokenizer.decode(new, skip_special_tokens=True)
        typer.echo(
            json.dumps(
                {
                    "prompt": prompt,
                    "text": text,
                    "new_tokens": len(new),
                    "tokens_per_second": round(len(new) / seconds, 2),
                }
            )
        )
    else:
        typer.echo(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s", err=True)
