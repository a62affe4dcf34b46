"""The prize's own files scored with a real model: each example as lm-eval and as a plain loop score it, to 1e-4.

``BRANCHMIX_SCORE_EVERY=1`` takes every example; by default some, evenly spread, for an example of hindsight-neglect is
780 tokens long.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from branchmix.scaling.examples import jsonl, load_examples
from branchmix.scaling.score_family import run
from branchmix.scaling.tasks import TASKS
from inverse_scaling import official_file
from mixtures import load
from scaling_runs import naive, write_family

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from smollm2 import seed

EVERY = {"memo-trap": 9, "hindsight-neglect": 40}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if seed.find_gguf() is None:
        pytest.skip(f"needs the real weights: {seed.INSTALL}")
    return Path(seed.prepare(tmp_path_factory.mktemp("real") / "smollm2"))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EVERY))
def test_official_examples_score_as_lm_eval_and_a_plain_loop(smollm2: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    task = TASKS[name]
    source = official_file(task.file)
    every = int(os.environ.get("BRANCHMIX_SCORE_EVERY", EVERY[name]))
    examples = load_examples(source, "classification")[::every]
    (tmp_path / "data").mkdir()
    if every == 1:
        shutil.copyfile(source, tmp_path / "data" / task.file)
    else:
        (tmp_path / "data" / task.file).write_bytes(jsonl(examples))
    family = write_family(tmp_path, [str(smollm2)])
    found = run(family, tasks=name, data=[tmp_path / "data"], dtype="float32").results[0]
    assert found.refused == [] and found.merged == 0 and len(found.scored) == len(examples)
    assert found.selected.data == "official" and found.selected.is_release is (every == 1)

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, tokenizer = load(smollm2), AutoTokenizer.from_pretrained(smollm2)
    theirs: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    requests = [
        Instance("loglikelihood", {}, (example.prompt, option), number)
        for number, example in enumerate(examples)
        for option in example.classes
    ]
    wanted = iter(theirs.loglikelihood(requests, disable_tqdm=True))
    for number, example, numbers, answer in found.scored:
        by_lm_eval = [next(wanted)[0] for _ in example.classes]
        assert answer["logprobs"] == pytest.approx(by_lm_eval, abs=1e-4), number
        assert numbers.predicted == by_lm_eval.index(max(by_lm_eval))
        if number % 3 == 0:
            plainly = [naive(model, tokenizer, example.prompt, option) for option in example.classes]
            assert answer["logprobs"] == pytest.approx(plainly, abs=1e-4), number
