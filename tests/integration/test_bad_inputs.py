"""A table of bad inputs: each is refused with exit code 2 and one line a problem, and leaves nothing behind.

A line says what is wrong, where (file, tensor or expert), for mismatches both values, and what to do. A new case is one
entry of a table below: a name, words of its lines, and an edit of the tiny siblings seed, code and math.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import branchmix
from bad_inputs import (
    GATE,
    LFS_POINTER,
    NORM,
    WEIGHTS,
    Edit,
    Inputs,
    Q,
    adapter,
    all_three,
    broken_mixture,
    config,
    cut,
    experts,
    family,
    ffn,
    header,
    of_mixture,
    own_head,
    poison,
    record,
    resave,
    rows,
    score,
    setting,
    shard,
    sharded,
    source,
    text,
    theta,
    tokenizer,
    upcycle,
    weights,
    with_extra,
    without,
)
from branchmix.cli import main
from families import BY_NAME


def recipe_in_out(inputs: Inputs) -> Path:
    """A recipe that lies where the output shall go, beside a model."""
    inputs.out.mkdir()
    (inputs.out / "config.json").write_text('{"model_type": "llama"}')
    recipe = {"seed": str(inputs.seed), "experts": [{"name": "code", "model": str(inputs.code)}]}
    (inputs.out / "recipe.yaml").write_text(json.dumps(recipe))
    return inputs.out / "recipe.yaml"


@dataclass(frozen=True)
class Case:
    name: str
    lines: str
    """What stderr's lines hold, in order: ``|`` stands between the words of one line, a line feed between lines."""
    edit: Edit = lambda inputs: None
    recipe: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    args: Callable[[Inputs], list[str]] | None = None
    """The command line, where it is not ``upcycle RECIPE OUT``."""


LONG = "a" * 300
"""No disk takes a name like this."""
TABLE = "task,model,params,metric,value,n\n" + "".join(f"t,m{n},1e{n},accuracy,0.{n},99\n" for n in (6, 7, 8, 9))


# fmt: off
CHECKPOINTS = [
    # Sizes
    Case("hidden width", "expert 'code': | hidden_size is 40 | seed's is 32 | fine-tuned from the same seed",
         lambda i: resave(i, i.code, hidden_size=40)),
    Case("FFN width", "expert 'code': | intermediate_size is 64 | seed's is 48",
         lambda i: resave(i, i.code, intermediate_size=64)),
    Case("depth", "expert 'code': | num_hidden_layers is 3 | seed's is 2",
         lambda i: resave(i, i.code, num_hidden_layers=3)),
    Case("depth and layer types", "expert 'code': | num_hidden_layers is 3 | seed's is 2",
         lambda i: resave(i, i.code, num_hidden_layers=3), family="qwen2"),
    Case("head count", "expert 'code': | num_attention_heads is 8 | seed's is 4",
         lambda i: resave(i, i.code, num_attention_heads=8)),
    Case("tied beside untied", "expert 'code': | are tied | seed's are untied | untie the tied one",
         lambda i: resave(i, i.code, tie_word_embeddings=True)),
    Case("tied by config, untied by weights", "expert 'code': | untied (its config.json ties them, but the weights of "
         "the two differ) | seed's are tied | untie the tied one", lambda i: own_head(i.code), family="llama-bias"),
    Case("a seed tied by config alone", "expert 'code': | are tied | seed's are untied (its config.json ties them"
         "\nexpert 'math': | are tied | seed's are untied (its config.json ties them", lambda i: own_head(i.seed),
         family="llama-bias"),
    # Tokenizers
    Case("larger vocabulary", "expert 'code': | token 't97' is id 97 | in the seed's it is absent",
         lambda i: (resave(i, i.code, vocab_size=120), tokenizer(i.code, 120))),
    Case("larger vocabulary, no tokenizer", "expert 'code': | vocab_size is 120 | seed's is 97 | put the tokenizers",
         lambda i: (resave(i, i.code, vocab_size=120), (i.code / "tokenizer.json").unlink())),
    Case("vocabulary below the tokenizer", "expert 'code': | vocab_size is 90 | seed's is 97 | resize the embeddings",
         lambda i: resave(i, i.code, vocab_size=90)),
    Case("other token ids", "expert 'code': | token 't5' is id 6 | in the seed's it is id 5 | mix different tokens",
         lambda i: tokenizer(i.code, swap=True)),
    Case("other merges", "expert 'code': | other merge rules | fine-tuned from the same seed",
         lambda i: tokenizer(i.code, merges="t2 0")),
    Case("another added token", "expert 'code': | token '<a>' is id 97 | in the seed's it is absent | mix different",
         lambda i: (i.code / "added_tokens.json").write_text('{"<a>": 97}')),
    Case("broken added tokens", "expert 'code': | code/added_tokens.json: is not a tokenizer file | download it again",
         lambda i: (i.code / "added_tokens.json").write_text("[1]")),
    Case("added tokens that are none", "expert 'code': | models/code: the added tokens of its tokenizer cannot be read",
         lambda i: (i.code / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"x": {}}}')),
    Case("broken tokenizer", "expert 'code': | code/tokenizer.json: is not a tokenizer file | download it again",
         lambda i: (i.code / "tokenizer.json").write_text("[]")),
    Case("Git LFS pointers as tokenizers", "expert 'code': | code/tokenizer.json: is a Git LFS pointer | git lfs pull\n"
         "expert 'math': | math/tokenizer.json: is a Git LFS pointer | git lfs pull",
         all_three(lambda f: (f / "tokenizer.json").write_text(LFS_POINTER))),
    Case("the same broken tokenizer",
         "expert 'code': | seed/tokenizer.json: is not a tokenizer file | download it again\n"
         "expert 'math': | seed/tokenizer.json: is not a tokenizer file | download it again",
         all_three(lambda f: (f / "tokenizer.json").write_text("[]"))),
    Case("the same half tokenizer", "seed/tokenizer.json: is not a tokenizer file | download it again",
         lambda i: (resave(i, i.code, vocab_size=104), all_three(lambda f: (f / "tokenizer.json").write_text("{"))(i))),
    # Settings that change what is computed
    Case("rope_theta, Shared KV", "expert 'code': | 1000000.0 | seed's are | 10000.0 | only attention: kv_experts",
         lambda i: theta(i.code), {"attention": "kv_sharing"}),
    Case("rope_theta, average", "expert 'code': | 1000000.0 | seed's are | 10000.0 | only attention: kv_experts",
         lambda i: theta(i.code), {"attention": "average"}),
    Case("rope_theta, special attention", "expert 'code': | 1000000.0 | 10000.0 | olmo cannot give experts their own",
         lambda i: theta(i.code), family="olmo"),
    Case("rope settings of a wrong type", "expert 'code': | rope_parameters is 'linear', not a mapping",
         setting(rope_parameters="linear")),
    Case("activation", """expert 'code': | hidden_act is "gelu" | seed's is "silu" """, setting(hidden_act="gelu")),
    Case("activation left out of the seed", """expert 'code': | hidden_act is "gelu" | seed's is "silu" (filled in""",
         lambda i: (config(i.seed, remove="hidden_act"), config(i.code, hidden_act="gelu"))),
    Case("activation left out of an expert", """expert 'code': | hidden_act is "silu" (filled in | seed's is "gelu" """,
         lambda i: (config(i.seed, hidden_act="gelu"), config(i.math, hidden_act="gelu"),
                    config(i.code, remove="hidden_act"))),
    Case("a window by default", "expert 'code': | sliding_window is 4096 (filled in by transformers) | seed's is 4",
         lambda i: config(i.code, remove="sliding_window"), family="mistral"),
    Case("no window instead of the default", "expert 'code': | sliding_window is null | seed's is 4096 (filled in",
         lambda i: (config(i.seed, remove="sliding_window"), config(i.math, remove="sliding_window"),
                    config(i.code, sliding_window=None)), family="mistral"),
    Case("a value that the class refuses", "expert 'code': | transformers cannot read config.json: | rms_norm_eps",
         setting(rms_norm_eps="small")),
    Case("norm eps", "expert 'code': | rms_norm_eps is 0.1 | seed's is 1e-06", setting(rms_norm_eps=0.1)),
    Case("sliding window", "expert 'code': | sliding_window is 8 | seed's is 4", setting(sliding_window=8),
         family="mistral"),
    Case("other model_type", "expert 'code': | model_type is olmo | seed's is llama | fine-tuned from the same seed",
         lambda i: (shutil.rmtree(i.code), BY_NAME["olmo"].save(i.code, 7))),
    # Kinds of models
    Case("MoE as expert", "expert 'code': | mixtral is a mixture of experts already | must be dense models",
         setting(model_type="mixtral", num_local_experts=8)),
    Case("our mixture as expert", "expert 'code': | a mixture already | use add-expert",
         setting(model_type="branchmix")),
    Case("encoder-decoder", "expert 'code': | t5 is an encoder-decoder | must be causal language models",
         setting(model_type="t5", is_encoder_decoder=True)),
    Case("ALiBi Falcon", "seed: | falcon has ALiBi positions | number of heads",
         all_three(lambda f: config(f, alibi=True)), family="falcon"),
    Case("custom code", "seed: | no causal language model of model_type 'newllm' | never run | convert it",
         all_three(lambda f: (config(f, model_type="newllm", auto_map={"AutoConfig": "evil.Config"}),
                              (f / "evil.py").write_text("raise SystemExit(77)")))),
    Case("names that do not fit", "seed: | tensors missing, first model.layers.0.mlp.gate | ministral3 is not in the "
         "table of families",
         all_three(lambda f: (config(f, model_type="ministral3"),
                              weights(f, lambda t: [t.update({n.replace("mlp", "ff"): t.pop(n)}) for n in list(t)])))),
    Case("tensors with no place", "seed: | 1 tensor with no place | mlp.act_fn.alpha_p | cannot be widened",
         all_three(lambda f: with_extra(f, "model.layers.0.mlp.act_fn.alpha_p"))),
    # Weights
    Case("truncated", "expert 'code': | code/model.safetensors: truncated | download or save it again",
         lambda i: cut(i.code)),
    Case("missing shard", "expert 'code': | shard model-00002-of-00002.safetensors is missing | finish the download",
         lambda i: shard(i.code)),
    Case("NaN in an FFN", f"expert 'code': | code/model.safetensors | {GATE} has NaN at [0, 3] | damaged",
         poison(GATE, float("nan"))),
    Case("NaN in a norm", f"expert 'code': | code/model.safetensors | {NORM} has NaN at [3] | damaged",
         poison(NORM, float("nan"))),
    Case("Inf", f"expert 'code': | code/model.safetensors | {GATE} has Inf at [0, 3] | damaged",
         poison(GATE, float("-inf"))),
    Case("too large for float16", f"tensor model.{NORM} | do not fit F16 | bfloat16", poison(NORM, 1e30),
         {"dtype": "float16"}),
    Case("missing projection", f"expert 'code': | 1 tensor missing, first {GATE} | download or save it again",
         lambda i: without(i.code, GATE)),
    Case("missing norm", f"expert 'code': | lacks 1 tensor that the seed has, first {NORM} | from the same seed",
         lambda i: without(i.code, NORM)),
    Case("extra tensor", "expert 'code': | has 1 tensor that the seed lacks, first model.extra.weight",
         lambda i: with_extra(i.code, "model.extra.weight")),
    Case("extra tensor in an FFN", "expert 'code': | 1 tensor with no place | mlp.extra.weight",
         lambda i: with_extra(i.code, "model.layers.0.mlp.extra.weight")),
    Case("missing from the seed", f"seed: | 1 tensor missing, first {GATE} | download",
         lambda i: without(i.seed, GATE)),
    Case("base models", "seed: the output embeddings (lm_head) are missing | save the causal language model",
         all_three(lambda f: without(f, "lm_head.weight"))),
    Case("no embeddings", "seed: config.json describes 21,728 parameters | hold only 18,624 | incomplete | again",
         all_three(lambda f: without(f, "model.embed_tokens.weight"))),
    Case("no final norm to fold", "seed: config.json describes 21,728 parameters | hold only 21,696 | incomplete",
         all_three(lambda f: without(f, NORM)), {"merge": {"fold_norms": True}}),
    Case("no norm of a block", "seed: config.json describes 21,728 parameters | hold only 21,696 | incomplete",
         all_three(lambda f: without(f, "model.layers.1.input_layernorm.weight"))),
    Case("no embeddings, unknown family", "seed: the embeddings are missing | incomplete | again",
         all_three(lambda f: without(f, "model.embed_tokens.weight")), family="helium"),
    Case("no final norm, unknown family", "seed: the final norm is missing | incomplete | again",
         all_three(lambda f: without(f, NORM)), family="helium"),
    Case("config with more layers", "expert 'code': | num_hidden_layers is 3 | weights have 2 layers | download",
         setting(num_hidden_layers=3)),
    Case("config with fewer layers", "expert 'code': | num_hidden_layers is 1 | weights have 2 layers | download",
         setting(num_hidden_layers=1)),
    Case("config with a billion layers", "expert 'code': | num_hidden_layers is 1000000000 | weights have 2 layers",
         setting(num_hidden_layers=10**9)),
    Case("config of another width", "expert 'code': | the down projection | has shape [32, 48] | should be [32, 64]",
         setting(intermediate_size=64)),
    Case("more embeddings than vocab_size", "seed: | embed_tokens.weight has 104 rows | vocab_size is 97 | write 104",
         all_three(lambda f: rows(f, 104))),
    Case("an expert's embeddings", "expert 'code': | embed_tokens.weight has 90 rows | vocab_size is 97 | resize",
         lambda i: rows(i.code, 90)),
    Case("an output layer of other rows", "expert 'code': | lm_head.weight has 104 rows | vocab_size is 97 | resize",
         lambda i: rows(i.code, 104, "lm_head.weight")),
    Case("more rows of positions", "seed: | wpe.weight has 104 rows | the positions are 64 | write 104 there",
         all_three(lambda f: rows(f, 104, "transformer.wpe.weight")), family="gpt2"),
    Case("positions as many as tokens", "expert 'code': transformer.wpe.weight has shape [97, 32] | seed's is [64, 32]",
         lambda i: resave(i, i.code, n_positions=97), family="gpt2"),
    # What transformers cannot build
    Case("unknown rope type", "seed: transformers cannot build | it has no 'foo' | correct its config.json",
         all_three(lambda f: config(f, rope_parameters={"rope_type": "foo", "factor": 2.0}))),
    Case("an expert's rope type", "expert 'code': transformers cannot build | it has no 'foo' | correct its config",
         setting(rope_parameters={"rope_type": "foo", "rope_theta": 1e4})),
    Case("no rope_theta", "seed: transformers cannot build | NoneType | correct",
         all_three(lambda f: config(f, rope_parameters={"rope_type": "default", "rope_theta": None}))),
    Case("rope_theta: null", "seed: transformers cannot build | NoneType | correct",
         all_three(lambda f: config(f, remove="rope_parameters", rope_theta=None))),
    Case("scaling without its factor", "seed: transformers cannot build | Missing required keys | 'factor' | correct",
         all_three(lambda f: config(f, rope_parameters={"rope_type": "linear", "rope_theta": 1e4}))),
    Case("an attention kernel", "seed: transformers cannot build | FlashAttention2 | remove that key from config.json",
         all_three(lambda f: config(f, attn_implementation="flash_attention_2"))),
    Case("an expert's attention kernel", "expert 'code': transformers cannot build | FlashAttention2 | remove that key",
         setting(_attn_implementation="flash_attention_2")),
    Case("an attention kernel of the Hub", "seed: attn_implementation is org/kernel, code on the Hub | remove the key",
         all_three(lambda f: config(f, attn_implementation="org/kernel"))),
    Case("padding token beyond the rows", "seed: transformers cannot build | Padding_idx must be within | correct",
         all_three(lambda f: config(f, pad_token_id=97))),
    Case("unknown activation", "seed: transformers cannot build | it has no 'silu2' | correct",
         all_three(lambda f: config(f, hidden_act="silu2"))),
    Case("a number as text", "seed: transformers cannot build | 'rms_norm_eps' expected float, got str | correct",
         all_three(lambda f: config(f, rms_norm_eps="1e-6"))),
    Case("a key of one family", "seed: qwen2 has strange layers: every layer of seed and experts must have softmax",
         all_three(lambda f: config(f, layer_types=["full_attention", "strange"])), family="qwen2"),
    Case("Git LFS pointer", "expert 'code': | code/model.safetensors: is a Git LFS pointer | git lfs pull",
         lambda i: (i.code / WEIGHTS).write_text(LFS_POINTER)),
    Case("other whole numbers", "expert 'code': model.buffer is stored as I64 | not equal to the seed's | no mean",
         lambda i: (all_three(lambda f: with_extra(f, "model.buffer", torch.arange(4)))(i),
                    with_extra(i.code, "model.buffer", torch.arange(1, 5)))),
    Case("quantised as it computes", "expert 'code': | is quantised (bitnet, says config.json) | dequantise it first",
         setting(quantization_config={"quant_method": "bitnet"})),
    Case("quantised, nobody knows how", "expert 'code': | is quantised (unnamed method, says config.json)",
         setting(quantization_config=True)),
    Case("quantised tensors", "expert 'code': | is quantised | q_proj.weight is I8 | dequantise it first",
         lambda i: weights(i.code, lambda t: t.update({Q: t[Q].to(torch.int8)}))),
    # Files and folders
    Case("no such folder", "expert 'code': | ./nowhere: no such folder | check the path",
         recipe={"experts": [{"name": "code", "model": "./nowhere"}]}),
    Case("unknown Hub id, offline", "expert 'code': | nobody/nothing: no such folder | Hub cannot be reached | check",
         recipe={"experts": [{"name": "code", "model": "nobody/nothing"}]}),
    Case("a file", "expert 'code': | models/notes.txt: is a file | give a checkpoint folder",
         lambda i: (i.models / "notes.txt").write_text("x"), experts(code="notes.txt")),
    Case("a GGUF file", "expert 'code': | models/code.gguf: is a GGUF file | original transformers checkpoint",
         lambda i: (i.models / "code.gguf").write_text("x"), experts(code="code.gguf")),
    Case("a folder with GGUF", "expert 'code': | only GGUF weights (model.gguf) | original transformers checkpoint",
         lambda i: (i.code / WEIGHTS).rename(i.code / "model.gguf")),
    Case("pickles", "expert 'code': | only pickled weights (pytorch_model.bin) | never loaded | save_pretrained(",
         lambda i: (i.code / WEIGHTS).rename(i.code / "pytorch_model.bin")),
    Case("empty folder", "expert 'code': | models/empty: no config.json | unfinished download",
         lambda i: (i.models / "empty").mkdir(), experts(code="empty")),
    Case("config.json broken", "expert 'code': | code/config.json: is not valid JSON at line 1 | download",
         lambda i: (i.code / "config.json").write_text("{")),
    Case("config.json missing", "expert 'code': | models/code: no config.json | unfinished download",
         lambda i: (i.code / "config.json").unlink()),
    Case("model_type of two", """expert 'code': | config.json has model_type ["llama"], which is not a name | give a""",
         setting(model_type=["llama"])),
    Case("nobody's folder", "expert 'code': | ~nosuch/x: there is no user 'nosuch' | the whole path",
         recipe={"experts": [{"name": "code", "model": "~nosuch/x"}]}),
    Case("no model_type", "expert 'code': | config.json has no model_type | give a transformers checkpoint",
         lambda i: config(i.code, remove="model_type")),
    Case("no adapter type", "expert 'code': | adapter_config.json: has no peft_type | only LORA",
         lambda i: adapter(i, {})),
    Case("other adapter type", "expert 'code': | adapter_config.json: has peft_type IA3 | only LORA",
         lambda i: adapter(i, {"peft_type": "IA3"})),
    Case("pickled adapter", "expert 'code': | has no adapter_model.safetensors | never loaded",
         lambda i: adapter(i, {"peft_type": "LORA"}, "adapter_model.bin")),
    Case("adapter of a deeper model", "expert 'code': | adapts model.layers.5.mlp.up_proj, which the seed lacks",
         lambda i: adapter(i, {"peft_type": "LORA"}, **{"model.layers.5.mlp.up_proj": (2, 32)})),
    Case("adapter of a wider model", "expert 'code': | has shape [2, 40] | the seed's | has [48, 32] | trained on",
         lambda i: adapter(i, {"peft_type": "LORA"}, **{"model.layers.0.mlp.up_proj": (2, 40)})),
    Case("adapter of a tied output layer", "expert 'code': | trains lm_head apart | one matrix | untie the seed first",
         lambda i: adapter(i, {"peft_type": "LORA"}, lm_head=(2, 32)), family="llama-bias"),
    Case("whole embeddings beside an adapter", "expert 'code': | trains embed_tokens apart | untie the seed first",
         lambda i: adapter(i, {"peft_type": "LORA", "modules_to_save": ["embed_tokens"]}), family="llama-bias"),
    Case("adapter of tokens of the output layer", "expert 'code': | trains lm_head apart | untie the seed first",
         lambda i: adapter(i, {"peft_type": "LORA", "trainable_token_indices": {"lm_head": [1]}}), family="llama-bias"),
    Case("adapter of a resized vocabulary", "code/adapter_model.safetensors: its vocabulary was resized | 99 rows | 97",
         lambda i: (adapter(i, {"peft_type": "LORA"}),
                    save_file({"base_model.model.model.embed_tokens.weight": torch.ones(99, 32)},
                              i.code / "adapter_model.safetensors"))),
    Case("adapter as the seed", "seed: | models/seed: is a LoRA adapter folder | merge it into its base model first",
         lambda i: ((i.seed / WEIGHTS).unlink(), (i.seed / "adapter_config.json").write_text("{}"))),
    # Several at once
    Case("two bad experts", """expert 'code': | num_hidden_layers is 3\nexpert 'math': | hidden_act is "gelu" """,
         lambda i: (resave(i, i.code, num_hidden_layers=3), config(i.math, hidden_act="gelu"))),
    Case("unreadable and misfit", "expert 'math': | truncated\nexpert 'code': | hidden_size is 40",
         lambda i: (resave(i, i.code, hidden_size=40), cut(i.math))),
    Case("two missing folders", "expert 'code': | models/a: no such folder\nexpert 'math': | models/b: no such folder",
         recipe=experts(code="a", math="b")),
    # Options that these checkpoints don't allow
    Case("fold_norms, post-norm", "merge.fold_norms: | olmo2 has no norm | leave fold_norms out",
         recipe={"merge": {"fold_norms": True}}, family="olmo2"),
    Case("fold_norms, biases", "merge.fold_norms: | input_layernorm and post_attention_layernorm have a bias | leave",
         recipe={"merge": {"fold_norms": True}}, family="gpt-neox"),
]

RECIPES = [
    Case("empty", "recipe.yaml: | is empty | keys may be seed, ", text("")),
    Case("a list", "recipe.yaml: | is a list | keys may be seed, ", text("- seed: a\n")),
    Case("syntax error", "recipe.yaml, line 2: | not valid YAML", text("seed: a\nexperts: }\n")),
    Case("a key twice", "recipe.yaml, line 3: | the key 'seed' appears twice", text("seed: a\nexperts: []\nseed: b\n")),
    Case("no such date", "recipe.yaml, line 2: | not valid YAML: month must be in 1..12: in quotes it would be text",
         text("seed: a\nexperts: [{name: 2024-13-45, model: b}]\n")),
    Case("a word as a mapping", "recipe.yaml, line 2: | a mapping was expected", text("seed: a\nmerge: !!map b\n")),
    Case("a thousand brackets", "recipe.yaml: | not valid YAML: nested too deeply", text("seed: " + "[" * 3000 + "\n")),
    Case("a capital", "seed: | is missing\nSeed: | there is no such key (did you mean 'seed'?)",
         text("Seed: a\nexperts: [{name: a, model: b}]")),
    Case("a key that is a type's name", "float: | there is no such key; known: seed",
         text("seed: a\nfloat: 1\nexperts: [{name: a, model: b}]")),
    Case("a capital inside", "experts.0.name: | is missing\nexperts.0.Name: | no such key (did you mean 'name'?)",
         text("seed: a\nexperts: [{Name: a, model: b}]")),
    Case("a picture", "recipe.yaml: | is not UTF-8 text | give a YAML file",
         lambda i: (i.root / "recipe.yaml").write_bytes(b"\x89PNG\xff")),
    Case("no seed", "recipe.yaml: | seed: is missing", text("experts: [{name: a, model: b}]")),
    Case("no experts", "recipe.yaml: | experts: there is only 1 | two or more", recipe={"experts": []}),
    Case("one expert with top-2", "recipe.yaml: | there is only 1 | two or more",
         recipe={"include_seed": False, "routing": {"ffn": {"top_k": 2}}, **experts(code="code")}),
    Case("top-4 of three", "recipe.yaml: | routing.ffn.top_k is 4 | only 3 experts", recipe=ffn(top_k=4)),
    Case("expert called seed", "recipe.yaml: | 'seed' is the seed's own name | something else",
         recipe=experts(seed="code")),
    Case("duplicate names", "recipe.yaml: | the name 'a' is listed 2 times",
         recipe={"experts": [{"name": "a", "model": "models/code"}, {"name": "a", "model": "models/math"}]}),
    Case("name with a slash", "recipe.yaml: | experts.0.name: must be letters, digits | got 'a/b'",
         recipe=experts(**{"a/b": "code"})),
    Case("expert called auto", "recipe.yaml: | experts.0.name: must be letters, digits | not 'auto', got 'auto'",
         recipe=experts(auto="code")),
    Case("misspelt method", "recipe.yaml: | attention: 'kv_expert' is not one of | did you mean 'kv_experts'?",
         recipe={"attention": "kv_expert"}),
    Case("misspelt dtype", "recipe.yaml: | dtype: 'bf16' is not one of | did you mean 'bfloat16'?",
         recipe={"dtype": "bf16"}),
    Case("misspelt scaling", "recipe.yaml: | routed_scaling_factor: should be a number or 'auto', got 'atuo'",
         recipe={"routed_scaling_factor": "atuo"}),
    Case("unknown key", "recipe.yaml: | atention: | no such key | 'attention'?", recipe={"atention": "seed"}),
    Case("unknown key of an expert", "recipe.yaml: | experts.0.path: | no such key | known: name, model",
         recipe={"experts": [{"name": "a", "model": "b", "path": "c"}]}),
    Case("unknown key of routing", "recipe.yaml: | routing.fnn: | 'ffn'?", recipe={"routing": {"fnn": {}}}),
    Case("unknown key of routing.ffn", "recipe.yaml: | routing.ffn.topk: | 'top_k'?", recipe=ffn(topk=1)),
    Case("unknown key of routing.attention", "recipe.yaml: | routing.attention.sofd: | 'soft'?",
         recipe={"routing": {"attention": {"sofd": True}}}),
    Case("unknown key of router_init", "recipe.yaml: | router_init.sdt: | 'std'?", recipe={"router_init": {"sdt": 1}}),
    Case("unknown key of merge", "recipe.yaml: | merge.metod: | 'method'?", recipe={"merge": {"metod": "seed"}}),
    Case("unknown key of sparse_upcycling", "recipe.yaml: | sparse_upcycling.redraw_part: | 'redraw_fraction'?",
         recipe={"sparse_upcycling": {"redraw_part": 1}}),
    Case("several", "recipe.yaml: | dtype\nrecipe.yaml: | atention", recipe={"atention": 1, "dtype": "int4"}),
    Case("weights for an unknown expert", "recipe.yaml: | merge.weights: no expert is called 'cod' | 'code'?",
         recipe={"merge": {"weighted": {"cod": 2}}}),
    Case("weights all zero", "recipe.yaml: | merge.weights: all are zero | give one model a weight",
         recipe={"merge": {"weighted": {"seed": 0, "code": 0, "math": 0}}}),
    Case("normalize with top-1", "recipe.yaml: | routing.ffn: normalize with top_k 1 | never learns | leave it out",
         recipe=ffn(normalize=True)),
    Case("zeros with top-1", "recipe.yaml: | router_init: zeros | top-k of the FFN router | soft routing",
         recipe={"router_init": "zeros"}),
    Case("soft and top_k", "recipe.yaml: | routing.ffn: soft and top_k exclude | remove one",
         recipe=ffn(soft=True, top_k=2)),
]

COMMANDS = [
    Case("no RECIPE", "Missing argument 'RECIPE' | --help", args=lambda i: ["upcycle"]),
    Case("unknown command", "No such command 'upcyle' | 'upcycle'? | --help", args=lambda i: ["upcyle"]),
    Case("unknown option", "No such option: --dryrun | --help", args=lambda i: ["upcycle", "r", "o", "--dryrun"]),
    Case("no such recipe", "none.yaml: there is no such file: check the path",
         args=lambda i: ["upcycle", "none.yaml", "o"]),
    Case("no such text for gates", "none.yaml: there is no such file: check the path",
         recipe={"gates": {"data": "none.yaml"}}),
    Case("train: no such run", "none.yaml: there is no such file: check the path",
         args=lambda i: ["train", "none.yaml"]),
    Case("recipe is a folder", "models: is a folder: give a YAML file", args=lambda i: ["upcycle", str(i.models), "o"]),
    Case("dry run, no such text", "router_init.text: | none.txt cannot be read | check the path",
         recipe={"router_init": {"text": dict.fromkeys(("seed", "code", "math"), "none.txt")}},
         args=lambda i: [*upcycle(i, i.out), "--dry-run"]),
    Case("dry run, empty text", "router_init.text: | blank.txt is empty | text typical of 'seed'",
         lambda i: (i.root / "blank.txt").write_text(" "),
         recipe={"router_init": {"text": dict.fromkeys(("seed", "code", "math"), "blank.txt")}},
         args=lambda i: [*upcycle(i, i.out), "--dry-run"]),
    Case("OUT is an input", "models/code: is, holds or lies in the source folder | another",
         args=lambda i: [*upcycle(i, i.code), "--force"]),
    Case("OUT inside an input", "code/out: is, holds or lies in the source folder | another",
         args=lambda i: [*upcycle(i, i.code / "out"), "--force"]),
    Case("OUT holds the inputs", "models: is, holds or lies in the source folder | another",
         args=lambda i: [*upcycle(i, i.models), "--force"]),
    Case("OUT links to an input", "models/link: is, holds or lies in the source folder | another",
         lambda i: (i.models / "link").symlink_to(i.code), args=lambda i: [*upcycle(i, i.models / "link"), "--force"]),
    Case("OUT holds the recipe", "outputs/mixture: holds | recipe.yaml, which is read | choose another",
         args=lambda i: ["upcycle", str(recipe_in_out(i)), str(i.out), "--force"]),
    Case("OUT holds a text for routers", "outputs/mixture: holds | recipe.yaml, which is read | choose another",
         lambda i: recipe_in_out(i),
         {"router_init": {"text": dict.fromkeys(("seed", "code", "math"), "outputs/mixture/recipe.yaml")}},
         args=lambda i: [*upcycle(i, i.out), "--force"]),
    Case("OUT holds something else, dry run", "mixture: holds recipe.yaml | not part of a checkpoint | move that",
         lambda i: recipe_in_out(i), args=lambda i: [*upcycle(i, i.out), "--force", "--dry-run"]),
    Case("OUT exists", "models/other: exists already | --force", lambda i: (i.models / "other").mkdir(),
         args=lambda i: upcycle(i, i.models / "other")),
    Case("OUT is no checkpoint", "models/other: is not a checkpoint folder | not replaced | choose another",
         lambda i: ((i.models / "other").mkdir(), (i.models / "other" / "thesis.txt").write_text("x")),
         args=lambda i: [*upcycle(i, i.models / "other"), "--force"]),
    Case("add: name taken", "models/mixture: has an expert 'code' already | another name", lambda i: i.mixture(),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"code={i.math}", str(i.out)]),
    Case("add: not NAME=PATH", "'./law': | NAME=PATH", args=lambda i: ["add-expert", "m", "./law", str(i.out)]),
    Case("add: an expert called auto", "auto=models/math: name: must be letters, digits | not 'auto', got 'auto'",
         lambda i: i.mixture(), args=of_mixture("add-expert", "auto=models/math", "OUT")),
    Case("add: no such mixture", "models/none: no such folder | check the path",
         args=lambda i: ["add-expert", str(i.models / "none"), f"law={i.math}", str(i.out)]),
    Case("add: deviation of 0", "router_std and router_seed: std: should be greater than 0, got 0",
         lambda i: i.mixture(),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.out), "--router-std", "0"]),
    Case("add: other width", "expert 'law': | hidden_size is 40 | seed's is 32",
         lambda i: (i.mixture(), resave(i, i.math, hidden_size=40)),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.out)]),
    Case("add: activation by default", """expert 'law': | hidden_act is "gelu" | seed's is "silu" (filled in""",
         lambda i: (all_three(lambda f: config(f, remove="hidden_act"))(i), i.mixture(),
                    config(i.math, hidden_act="gelu")),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.out)]),
    Case("add: missing bias", "expert 'law': | its attention's q bias of layer 0 is missing | has shape [32]",
         lambda i: (i.mixture(), without(i.math, Q.replace("weight", "bias"))), family="llama-bias",
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.out)]),
    Case("add: unknown rope type", "expert 'law': transformers cannot build | it has no 'foo' | correct its config",
         lambda i: (i.mixture(), config(i.math, rope_parameters={"rope_type": "foo", "rope_theta": 1e4})),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.out)]),
    Case("add: other rows", "expert 'law': | embed_tokens.weight has 104 rows | vocab_size is 97 | resize",
         lambda i: (i.mixture(), rows(i.math, 104)),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.out)]),
    Case("add: NaN", "expert 'law': | math/model.safetensors | has NaN",
         lambda i: (i.mixture(), poison(GATE, float("nan"), "math")(i)),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.out)]),
    Case("add: dense model", "models/seed: is a llama model, not a mixture | use upcycle",
         args=lambda i: ["add-expert", str(i.seed), f"law={i.math}", str(i.out)]),
    Case("add: OUT is the seed", "models/seed: is, holds or lies in the source folder | another", lambda i: i.mixture(),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.seed), "--force"]),
    Case("add: OUT is the seed, by another path", "models/seed: is, holds or lies in the source folder | another",
         broken_mixture(lambda f: record(f, lambda r: r["sources"][0].update(model="../seed"))),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.seed), "--force"]),
    Case("remove: OUT is an expert", "models/code: is, holds or lies in the source folder | another",
         broken_mixture(lambda f: branchmix.add_expert(f, "math", f.parent / "math", f.parent / "three")),
         args=lambda i: ["remove-expert", str(i.models / "three"), "code", str(i.code), "--force"]),
    Case("remove: OUT is an expert that was added", "models/math: is, holds or lies in the source folder | another",
         broken_mixture(lambda f: branchmix.add_expert(f, "math", f.parent / "math", f.parent / "three")),
         args=lambda i: ["remove-expert", str(i.models / "three"), "code", str(i.math), "--force"]),
    Case("calibrate: OUT is the seed", "models/seed: is, holds or lies in the source folder | another",
         lambda i: (i.mixture(), (i.root / "data.yaml").write_text("data: {code: {files: recipe.yaml}}")),
         args=lambda i: ["calibrate", str(i.models / "mixture"), "--data", str(i.root / "data.yaml"),
                         "--out", str(i.seed), "--force"]),
    Case("export: OUT is an expert", "models/code: is, holds or lies in the source folder | another",
         lambda i: i.mixture(), args=lambda i: ["export", str(i.models / "mixture"), str(i.code), "--to", "dense",
                                                "--expert", "code", "--force"]),
    Case("remove: unknown name", "has no expert 'cod' | 'code'? | it has seed, code", lambda i: i.mixture(),
         args=lambda i: ["remove-expert", str(i.models / "mixture"), "cod", str(i.out)]),
    Case("remove: last but one", "only 'seed' would be left | two or more", lambda i: i.mixture(),
         args=lambda i: ["remove-expert", str(i.models / "mixture"), "code", str(i.out)]),
    Case("OUT of 300 letters", "aaa: File name too long: choose another name", args=lambda i: upcycle(i, Path(LONG))),
    Case("inspect: 300 letters", "aaa: no such file or folder", args=lambda i: ["inspect", LONG]),
    Case("inspect: a recipe", "recipe.yaml: is a file: give a checkpoint folder",
         args=lambda i: ["inspect", str(i.write_recipe())]),
    Case("inspect: a weight file", "seed/model.safetensors: is a single weight file: give the folder that holds it",
         args=lambda i: ["inspect", str(i.seed / WEIGHTS)]),
    Case("inspect: nobody's folder", "~nosuch/x: there is no user 'nosuch': write the whole path",
         args=lambda i: ["inspect", "~nosuch/x"]),
    Case("inspect: two families", "code/config.json has model_type | which is not a name",
         setting(model_type=["llama"]),
         args=lambda i: ["inspect", str(i.code)]),
    Case("generate: 300 letters", "aaa: no such folder", args=lambda i: ["generate", LONG, "hi"]),
    Case("generate: 300 letters on the Hub", "aaa: no such folder", args=lambda i: ["generate", f"org/{LONG}", "hi"]),
    Case("push: 300 letters", "aaa: no such folder: check the path", args=lambda i: ["push", LONG, "org/name"]),
    Case("export: OUT of 300 letters", "aaa: File name too long: choose another name", lambda i: i.mixture(),
         args=lambda i: ["export", str(i.models / "mixture"), LONG, "--to", "mixtral"]),
    Case("generate: no such model", "./none: no such folder | check the path",
         args=lambda i: ["generate", "./none", "hi"]),
    Case("generate: no tokenizer", "models/seed: has no tokenizer files | copy",
         lambda i: (i.seed / "tokenizer.json").unlink(), args=lambda i: ["generate", str(i.seed), "hi"]),
    Case("generate: an adapter of unknown kind", "has no peft_type, only LORA is supported | merge the adapter",
         lambda i: ((i.seed / WEIGHTS).unlink(), (i.seed / "adapter_config.json").write_text("{}")),
         args=lambda i: ["generate", str(i.seed), "hi"]),
    Case("inspect: an adapter with a config", "models/seed: is a LoRA adapter folder, not a full checkpoint | merge",
         lambda i: ((i.seed / WEIGHTS).unlink(), (i.seed / "adapter_config.json").write_text("{}")),
         args=lambda i: ["inspect", str(i.seed)]),
    Case("generate: bad dtype", "dtype: 'int3' is not one of auto, bfloat16",
         args=lambda i: ["generate", str(i.seed), "hi", "--dtype", "int3"]),
    Case("generate: empty prompt", "PROMPT is empty | give some text", args=lambda i: ["generate", str(i.seed), ""]),
    Case("generate: broken tokenizer", "models/seed: transformers cannot load it",
         lambda i: (i.seed / "tokenizer.json").write_text("[]"), args=lambda i: ["generate", str(i.seed), "hi"]),
    Case("generate: custom code", "models/seed: transformers cannot load it: | --trust-remote-code",
         lambda i: (config(i.seed, model_type="newllm", auto_map={"AutoConfig": "evil.Config"}),
                    (i.seed / "evil.py").write_text("raise SystemExit(77)")),
         args=lambda i: ["generate", str(i.seed), "hi"]),
    Case("generate: missing weights", "models/seed: the weights lack model.layers.1.mlp. | and 2 more tensors | again",
         lambda i: weights(i.seed, lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp" in n]),
         args=lambda i: ["generate", str(i.seed), "0"]),
    Case("generate: pickles", "models/seed: transformers cannot load it: | no file named model.safetensors",
         lambda i: (torch.save(load_file(i.seed / WEIGHTS), i.seed / "pytorch_model.bin"),
                    (i.seed / WEIGHTS).unlink()), args=lambda i: ["generate", str(i.seed), "0"]),
    Case("generate: beyond the positions", "--max-new-tokens 65: PROMPT has 1 tokens | only 64 positions | fewer",
         family="gpt2", args=lambda i: ["generate", str(i.seed), "0", "--max-new-tokens", "65"]),
    Case("generate: beyond computed positions", "--max-new-tokens 65: PROMPT has 1 tokens | only 64 positions | fewer",
         family="gptj", args=lambda i: ["generate", str(i.seed), "0", "--max-new-tokens", "65"]),
    Case("generate: no tokens in the prompt", "models/seed: its tokenizer makes no tokens of PROMPT | its own",
         args=lambda i: ["generate", str(i.seed), "hi"]),
    Case("generate: another model's tokenizer", "models/seed: | makes token 105 of PROMPT | has only 97 tokens",
         lambda i: tokenizer(i.seed, zero=105), args=lambda i: ["generate", str(i.seed), "0"]),
    Case("generate: tiny temperature", "--temperature 1e-320: give 1e-06 or more, or 0",
         args=lambda i: ["generate", str(i.seed), "0", "--temperature", "1e-320"]),
    Case("generate: large seed", "--seed 18446744073709551616: give a whole number from 0 to",
         args=lambda i: ["generate", str(i.seed), "0", "--temperature", "1", "--seed", str(2**64)]),
    Case("add: broken mixture", "mixture/config.json: has no seed_config | copy",
         lambda i: config(Path(i.mixture()), remove="seed_config"),
         args=lambda i: ["add-expert", str(i.models / "mixture"), f"law={i.math}", str(i.out)]),
    Case("generate: no tokens", "Invalid value for '--max-new-tokens' | --help",
         args=lambda i: ["generate", str(i.seed), "hi", "--max-new-tokens", "0"]),
    # Places and names
    Case("OUT is a link to itself", "loop: Too many levels of symbolic links: choose another name",
         lambda i: (i.root / "loop").symlink_to(i.root / "loop"), args=lambda i: upcycle(i, i.root / "loop")),
    Case("OUT is below a link to itself", "loop/out: Too many levels of symbolic links: choose another name",
         lambda i: (i.root / "loop").symlink_to(i.root / "loop"),
         args=lambda i: [*upcycle(i, i.root / "loop" / "out"), "--force"]),
    Case("trends: --html is a link to itself", "loop: Too many levels of symbolic links: choose another name",
         lambda i: ((i.root / "loop").symlink_to(i.root / "loop"), (i.root / "t.csv").write_text("task")),
         args=lambda i: ["scaling", "trends", str(i.root / "t.csv"), "--html", str(i.root / "loop")]),
    Case("trends: --plots of 300 letters", "sheet.png: File name too long: choose another name",
         lambda i: (i.root / "t.csv").write_text(TABLE),
         args=lambda i: ["scaling", "trends", str(i.root / "t.csv"), "--plots", LONG]),
    Case("trends: table of 300 letters", "characters left out | File name too long: choose another name",
         args=lambda i: ["scaling", "trends", LONG]),
    Case("report: no such folder", "models/none: no such folder: give the folder of a study, or of its results",
         args=lambda i: ["report", str(i.models / "none")]),
    Case("report: a file", "seed/config.json: is a file: give the folder of a study, or of its results",
         args=lambda i: ["report", str(i.seed / "config.json")]),
    Case("report: a model", "models/seed: has no results/study.json: give the folder of a study, or of its results",
         args=lambda i: ["report", str(i.seed)]),
    Case("report: 300 letters", "characters left out | File name too long: choose another name",
         args=lambda i: ["report", LONG]),
    Case("demo: 300 letters", "characters left out | File name too long: choose another name",
         args=lambda i: ["demo", "--out", LONG]),
    Case("family: seed leads out of OUT", "models.0.seed: may have letters, digits | got 'x/../../../escaped'",
         lambda i: family(i, {"seed": "x/../../../escaped"}), args=lambda i: score(i)),
    Case("family: name leads out of OUT", "family.yaml: models.0.name: may have letters, digits | got '..'",
         lambda i: family(i, {"name": ".."}), args=lambda i: score(i)),
    Case("family: seed of 300 letters", "family.yaml: models.0.seed: may have letters, digits | characters left out",
         lambda i: family(i, {"seed": LONG}), args=lambda i: score(i)),
    Case("shard outside the folder", "code/model.safetensors.index.json: names the shard '../seed/model.safetensors'",
         lambda i: sharded(i.code, "../seed/model.safetensors")),
    Case("shard is the folder above", "model.safetensors.index.json: names the shard '..', which is not a file name",
         lambda i: sharded(i.code, "..")),
    Case("shard of 300 letters", "code/model.safetensors.index.json: names the shard 'aaa | characters left out",
         lambda i: sharded(i.code, LONG)),
    Case("shard with a zero byte", "code/model.safetensors.index.json: names the shard 'a\\x00b', which is not a file",
         lambda i: sharded(i.code, "a\0b")),
    # Numbers and nesting that no honest file has
    Case("layers: 10**400", "code/config.json: is not valid JSON (there is a whole number of 401 digits)",
         setting(num_hidden_layers=10**400)),
    Case("layers: 10**12", "expert 'code': config.json: num_hidden_layers is 1000000000000, more than 2,147,483,647",
         setting(num_hidden_layers=10**12)),
    Case("head_dim: 10**400", "code/config.json: is not valid JSON (there is a whole number of 401 digits)",
         setting(head_dim=10**400)),
    Case("rope_theta: 10**400", "code/config.json: is not valid JSON (there is a whole number of 401 digits)",
         setting(rope_theta=10**400)),
    Case("model_type: half a surrogate", "expert 'code': | config.json: is not valid JSON | surrogates not allowed",
         setting(model_type="\ud800")),
    Case("model_type of 100,000 characters", "expert 'code': model_type is bbb | characters left out | the same seed",
         setting(model_type="b" * 100_000)),
    Case("shape: [10**400]", "code/model.safetensors: | not a safetensors file ( | invalid JSON in header",
         lambda i: (i.code / WEIGHTS).write_bytes(header('{"x": {"dtype": "F32", "shape": [1' + "0" * 400 + "]}}"))),
    Case("header nested deeply", "code/model.safetensors: | not a safetensors file ( | invalid JSON in header",
         lambda i: (i.code / WEIGHTS).write_bytes(header("[" * 200_000))),
    Case("tokenizer nested deeply", "expert 'code': | code/tokenizer.json: is not a tokenizer file | download it again",
         lambda i: (i.code / "tokenizer.json").write_text("[" * 200_000 + "]" * 200_000)),
    Case("tokenizer with a number as merges", "expert 'code': | code/tokenizer.json: is not a tokenizer file",
         lambda i: (i.code / "tokenizer.json").write_text('{"model": {"vocab": {}, "merges": [1.5]}}')),
    Case("inspect: 2**31 layers", "config.json: num_hidden_layers is 2147483648, more than 2,147,483,647",
         setting(num_hidden_layers=2**31), args=lambda i: ["inspect", str(i.code)]),
    Case("inspect: a million layers", "config.json: num_hidden_layers is 1,000,000, more than any model has",
         setting(num_hidden_layers=10**6), args=lambda i: ["inspect", str(i.code)]),
    Case("inspect: seed_config is a list", "seed_config is [1], not the config of a model",
         setting(model_type="x", seed_config=[1]), args=lambda i: ["inspect", str(i.code)]),
    Case("recipe: empty whole number", "recipe.yaml, line 2: not valid YAML: | in quotes it would be text",
         text("seed: models/seed\ninclude_seed: !!int ''\n")),
    Case("recipe: value of 100,000 characters", "recipe.yaml: attention: 'yyy | characters left out | is not one of",
         lambda i: None, {"attention": "y" * 100_000}),
    Case("recipe: empty key", "recipe.yaml: : there is no such key; known: seed", lambda i: None, {"": 1}),
    # Records that were edited
    Case("mixture: licence is a list", "mixture/branchmix.json: sources.1.license is ['mit'], not text: copy",
         broken_mixture(lambda f: record(f, lambda r: r["sources"][1].update(license=["mit"]))),
         args=of_mixture("push", "org/name", "--dry-run")),
    Case("mixture: changes are words", "mixture/branchmix.json: changes.0 names no expert that joined or left: copy",
         broken_mixture(lambda f: record(f, lambda r: r.update(changes=["x"]))),
         args=of_mixture("push", "org/name", "--dry-run")),
    Case("mixture: losses are words", "branchmix.json: changes.0.calibrated.losses are not losses before and after",
         broken_mixture(lambda f: record(f, lambda r: r.update(changes=[{"calibrated": {"domains": {}, "losses": {
             "law": "x"}}}]))), args=of_mixture("push", "org/name", "--dry-run")),
    Case("push: a licence that is a link", "mixture/LICENSE: is a link to | outside the folder: put the file itself",
         broken_mixture(lambda f: (f / "LICENSE").symlink_to("/etc/hostname")),
         args=of_mixture("push", "org/name", "--dry-run")),
    # Mixtures that are none
    Case("mixture: attention", "mixture: config.json: attention is 'nonsense', not one of kv_experts | mixture's own",
         broken_mixture(lambda f: config(f, attention="nonsense")), args=of_mixture("remove-expert", "code", "OUT")),
    Case("mixture: attention, for export", "mixture: config.json: attention is 'nonsense', not one of kv_experts",
         broken_mixture(lambda f: config(f, attention="nonsense")),
         args=of_mixture("export", "OUT", "--to", "dense", "--expert", "code", "--dry-run")),
    Case("mixture: seed_config is a word", "mixture: config.json: a branchmix model needs seed_config",
         broken_mixture(lambda f: config(f, seed_config="x")), args=of_mixture("remove-expert", "code", "OUT")),
    Case("mixture: num_experts is a word", "mixture: config.json: num_experts is 'x', not a positive whole number",
         broken_mixture(lambda f: config(f, num_experts="x")), args=of_mixture("remove-expert", "code", "OUT")),
    Case("mixture: more experts than names", "mixture: config.json: num_experts is 7, but expert_names has 2",
         broken_mixture(lambda f: config(f, num_experts=7)), args=of_mixture("remove-expert", "code", "OUT")),
    Case("mixture: more experts than weights", "q_proj.weight has shape [64, 32] | config.json it should be [96, 32]",
         broken_mixture(lambda f: config(f, num_experts=3, expert_names=["a", "b", "c"])),
         args=of_mixture("remove-expert", "a", "OUT")),
    Case("mixture: scaling is a word", "mixture: config.json: routed_scaling_factor is 'auto', not a number",
         broken_mixture(lambda f: config(f, routed_scaling_factor="auto")),
         args=of_mixture("remove-expert", "code", "OUT")),
    Case("mixture: no router", "mixture: the weights lack model.model.layers.1.mlp.gate.weight | download the mixture",
         broken_mixture(lambda f: without(f, "model.model.layers.1.mlp.gate.weight")),
         args=of_mixture("remove-expert", "code", "OUT")),
    Case("mixture: no final norm", "mixture: config.json describes 37,344 parameters | hold only 37,312 | belong",
         broken_mixture(lambda f: without(f, "model.model.norm.weight")),
         args=of_mixture("remove-expert", "code", "OUT")),
    Case("mixture: saved as the base model", "the weights lack model.model.layers.0.self_attn. | causal language model",
         broken_mixture(lambda f: AutoModel.from_pretrained(f).save_pretrained(f)),
         args=of_mixture("remove-expert", "code", "OUT")),
    Case("mixture: source without a model", "mixture/branchmix.json: sources.1 has no model | copy | or remove it",
         broken_mixture(lambda f: source(f, 1, "model")), args=of_mixture("push", "org/name", "--dry-run")),
]
# fmt: on


@pytest.fixture
def make(tmp_path: Path, siblings: Callable[..., dict[str, Path]]) -> Callable[..., Inputs]:
    def build(family: str = "llama", **recipe: Any) -> Inputs:
        inputs = Inputs(tmp_path, family, recipe)
        for name, folder in siblings(family).items():
            shutil.copytree(folder, inputs.models / name)
            tokenizer(inputs.models / name)
        inputs.out.parent.mkdir()
        return inputs

    return build


def state(inputs: Path) -> dict[str, Any]:
    """Everything below a test's folder: names and content, and times of what is in the models' folders."""
    found: dict[str, Any] = {}
    for path in sorted(inputs.rglob("*")):
        content = path.read_bytes() if path.is_file() else None
        found[str(path)] = (content, path.lstat().st_mtime_ns if "models" in path.parent.parts else None)
    return found


def refused(args: list[str], root: Path, monkeypatch: Any, capsys: Any) -> list[str]:
    """Lines on stderr of a command that must fail and leave everything as it was."""
    before = state(root)
    monkeypatch.setattr(sys, "argv", ["branchmix", *args])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2, printed.err
    assert printed.out == "" and "Traceback" not in printed.err
    assert state(root) == before, "something was left behind or changed"
    return printed.err.splitlines()


def check_lines(lines: list[str], wanted: str) -> None:
    assert len(lines) == len(wanted.splitlines()), "\n".join(lines)
    for line, words in zip(lines, wanted.splitlines(), strict=True):
        assert line.startswith("error: ")
        for word in words.split("|"):
            assert word.strip() in line, line


@pytest.mark.parametrize("case", CHECKPOINTS + RECIPES + COMMANDS, ids=lambda case: case.name)
def test_refused_in_one_line(case: Case, make: Any, monkeypatch: Any, capsys: Any) -> None:
    inputs = make(case.family, **case.recipe)
    case.edit(inputs)
    inputs.write_recipe()
    args = upcycle(inputs, inputs.out) if case.args is None else case.args(inputs)
    check_lines(refused(args, inputs.root, monkeypatch, capsys), case.lines)


def test_disk_too_small_is_seen_beforehand(make: Any, monkeypatch: Any, capsys: Any) -> None:
    inputs = make()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    lines = refused(upcycle(inputs, inputs.out), inputs.root, monkeypatch, capsys)
    check_lines(lines, "outputs/mixture: the output needs | kB, but only 1 kB are free ( | kB too few): make room")


@pytest.mark.parametrize("after", [0, 3])
def test_disk_full_while_weights_are_written(after: int, make: Any, monkeypatch: Any, capsys: Any) -> None:
    inputs, written, real = make(), [0], os.pwrite

    def pwrite(*args: Any) -> int:
        written[0] += 1
        if written[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    lines = refused(upcycle(inputs, inputs.out), inputs.root, monkeypatch, capsys)
    check_lines(lines, f"{inputs.out / WEIGHTS}: the disk is full | free space, or write elsewhere")


def test_disk_full_while_the_tokenizer_is_copied(make: Any, monkeypatch: Any, capsys: Any) -> None:
    inputs = make()

    def copyfile(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    lines = refused(upcycle(inputs, inputs.out), inputs.root, monkeypatch, capsys)
    check_lines(lines, f"{inputs.out}: the disk is full | free space")


@pytest.mark.parametrize(
    "name", ["hidden width", "custom code", "unknown Hub id, offline", "misspelt method", "no RECIPE"]
)
def test_message_comes_at_once(name: str, make: Any) -> None:
    """A process of its own, start-up included; gigabytes or torch would take longer. In CPU time: others work too."""
    case = next(case for case in CHECKPOINTS + RECIPES + COMMANDS if case.name == name)
    inputs = make(case.family, **case.recipe)
    case.edit(inputs)
    inputs.write_recipe()
    args = upcycle(inputs, inputs.out) if case.args is None else case.args(inputs)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "branchmix", *args], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    check_lines(done.stderr.splitlines(), case.lines)
    assert seconds < 2.5


def test_harmless_differences_are_noted(make: Any, monkeypatch: Any, capsys: Any) -> None:
    """A padded vocabulary, another dtype, and a rotary base of its own under Expert KV: done, with a note each."""
    inputs = make()
    resave(inputs, inputs.code, vocab_size=104)
    weights(inputs.math, lambda tensors: [tensors.update({n: t.to(torch.bfloat16)}) for n, t in list(tensors.items())])
    theta(inputs.math)
    monkeypatch.setattr(sys, "argv", ["branchmix", *upcycle(inputs, inputs.out)])
    with pytest.raises(SystemExit) as stopped:
        main()
    notes = capsys.readouterr().err
    assert stopped.value.code == 0
    assert "expert 'code': rows 97 to 103 of its embeddings are padding, they are left out" in notes
    assert "expert 'math': stored as BF16, the seed as F32: cast to" in notes
    assert "rotary settings differ" in notes and "each expert keeps its own" in notes
    rope = json.loads((inputs.out / "config.json").read_text())["expert_rope_parameters"]
    assert [expert["rope_theta"] for expert in rope] == [10000.0, 10000.0, 1000000.0]
    assert load_file(inputs.out / WEIGHTS)["model.model.embed_tokens.weight"].shape == (97, 32)
