"""``branchmix generate``: continue a text with a mixture (or any causal LM)."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from branchmix.checkpoint.text import whole_characters
from branchmix.cli import console
from branchmix.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from branchmix.likelihood.models import TextModel

EPILOG = """\b
Examples:
  branchmix generate mixture "The capital of France is"
  branchmix generate mixture "def fibonacci(n):" --max-new-tokens 80 --temperature 0.7 --seed 1
  branchmix generate mixture "def fibonacci(n):" --experts auto       only the experts that suit the prompt
"""

MIN_TEMPERATURE = 1e-6
"""Below this, logits divided by the temperature may be infinite. At this value, sampling is already greedy."""
GREATEST_SEED = 2**64 - 1
"""Largest seed of torch's random numbers."""


def generate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 40,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 takes the most likely token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling, for temperature > 0.")] = 0,
    dtype: console.Dtype = "auto",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    experts: console.Experts = None,
    trust_remote_code: console.TrustRemoteCode = False,
    as_json: console.AsJson = False,
) -> None:
    """Continue a text."""
    from branchmix.checkpoint.hub import resolve

    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise RecipeError(f"--dtype {dtype}: give auto, bfloat16, float16 or float32")
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise RecipeError(
            f"--temperature {temperature}: give {MIN_TEMPERATURE} or more, or 0 for the most likely token"
        )
    if not 0 <= seed <= GREATEST_SEED:
        raise RecipeError(f"--seed {seed}: give a whole number from 0 to {GREATEST_SEED}")
    resolved = resolve(model)
    if not prompt:
        raise RecipeError("PROMPT is empty: give some text to continue")
    console.quiet_libraries()
    import torch
    from transformers import TextStreamer

    from branchmix.likelihood.models import TextModel

    text_model = TextModel(resolved, dtype, trust_remote_code)
    console.print_notes(text_model.notes)
    tokenizer = text_model.tokenizer
    inputs = _inputs(text_model, prompt, chat)
    _require_positions(text_model, inputs["input_ids"].shape[1], max_new_tokens)
    wanted = None if experts is None else console.experts_to_keep(experts, text_model.config.to_dict())
    loaded = text_model.load()
    inputs = {name: value.to(loaded.device) for name, value in inputs.items()}
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    streamer = None if as_json else TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    start = time.perf_counter()
    kept: dict[str, list[str]] = {}
    if wanted is not None:
        from branchmix.models.kept_branchmix import chosen_experts

        (rows,) = chosen_experts(loaded, wanted, **inputs)
        sampling["experts"] = rows
        names = loaded.config.expert_names or [f"expert-{row}" for row in range(loaded.config.num_experts)]
        kept = {"experts": [names[row] for row in rows]}
    tokens = loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=pad, **sampling)
    seconds = time.perf_counter() - start
    new = tokens[0, inputs["input_ids"].shape[1] :]
    if as_json:
        text, speed = tokenizer.decode(new, skip_special_tokens=True), round(len(new) / seconds, 2)
        numbers = {"new_tokens": len(new), "tokens_per_second": speed}
        console.print_json({"prompt": prompt, "text": text, **numbers, **kept})
    else:
        if kept:
            console.notice(f"experts kept: {', '.join(kept['experts'])}")
        console.notice(f"{len(new)} tokens, {len(new) / seconds:.1f} tokens/s")


def _inputs(text_model: TextModel, prompt: str, chat: bool) -> dict[str, Any]:
    """The prompt's tokens [1, T] and their mask, without other tokenizer outputs (``token_type_ids``).

    Raises:
        RecipeError: see ``_in_template``.
        CheckpointError: the tokenizer makes no tokens, or some that the model does not have.
    """
    tokenizer, folder = text_model.tokenizer, text_model.folder
    text = whole_characters(_in_template(text_model, prompt) if chat else prompt)
    made = tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False)
    ids_BT = made["input_ids"]
    if not ids_BT.numel():
        raise CheckpointError(f"{folder}: its tokenizer makes no tokens of PROMPT: give the folder its own tokenizer")
    size = text_model.config.get_text_config().vocab_size
    if int(ids_BT.max()) >= size:
        raise CheckpointError(
            f"{folder}: its tokenizer makes token {int(ids_BT.max())} of PROMPT, but the model has only {size} tokens: "
            "give the folder its own tokenizer"
        )
    return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}


def _in_template(text_model: TextModel, prompt: str) -> str:
    """The prompt as the model's chat template puts it, as one message of a user.

    Raises:
        RecipeError: there is no template, or it does not take such a message.
    """
    where = f"--chat: the chat template of {text_model.folder}"
    if not text_model.tokenizer.chat_template:
        raise RecipeError(f"{where} is missing: leave --chat out")
    try:
        text = text_model.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program: it may raise whatever Python does
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RecipeError(f"{where} does not take PROMPT: {reason}: mend the template, or leave --chat out") from error
    return str(text)


def _require_positions(text_model: TextModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse more tokens than a model has learned positions for; the last token needs none.

    Raises:
        RecipeError: gives the number of positions.
    """
    from branchmix.accounting.formulas import table_positions

    positions = table_positions(text_model.config.to_dict())
    if positions is not None and prompt_tokens + max_new_tokens - 1 > positions:
        raise RecipeError(
            f"--max-new-tokens {max_new_tokens}: PROMPT has {prompt_tokens} tokens, and {text_model.folder} has only "
            f"{positions} positions: give a shorter PROMPT, or ask for fewer tokens"
        )
