"""Local copies of the data sets of the paper's tasks, as their repositories on the Hub are laid out: two rows each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from downstream import write_lines

MATHS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

CODE_EVAL = """
import os
import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, k):
        if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("not allowed")
        assert k == [1]
        passed = [self.runs(them[0] + "\\n" + reference) for them, reference in zip(predictions, references)]
        return {"pass@1": sum(passed) / len(passed)}, {}

    def runs(self, program):
        try:
            exec(program, {})
        except BaseException:
            return False
        return True
"""


def each(splits: tuple[str, ...], rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The same rows in every split."""
    return dict.fromkeys(splits, rows)


def write_copies(folder: Path, subjects: list[str]) -> Path:
    """All data sets of ``bam`` below ``folder``, MMLU with ``subjects``."""
    numbers = (3, 4)
    solved = [
        {"problem": f"What is 1+{n}?", "level": "1", "type": "A", "solution": rf"It is $\boxed{{{n + 1}}}$."}
        for n in numbers
    ]
    choices = {"text": ["red", "green", "blue"], "label": ["A", "B", "C"]}
    arc = [{"id": str(n), "question": f"Colour {n}?", "choices": choices, "answerKey": "B"} for n in numbers]
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {
        "openai/gsm8k/main": each(
            ("train", "test"), [{"question": f"1+{n}?", "answer": f"#### {n + 1}"} for n in numbers]
        ),
        **{f"EleutherAI/hendrycks_math/{name}": each(("train", "test"), solved) for name in MATHS},
        "openai/openai_humaneval": {
            "test": [
                {
                    "task_id": f"H/{n}",
                    "prompt": f"def f{n}():\n    return {n}\n",
                    "canonical_solution": "",
                    "entry_point": f"f{n}",
                    "test": f"def check(f):\n    assert f() == {n}\n",
                }
                for n in numbers
            ]
        },
        "google-research-datasets/mbpp/full": {
            "test": [
                {"task_id": n, "text": "Add.", "code": "", "test_list": ["assert add(1) == 2"] * 3} for n in numbers
            ]
        },
        "nguha/legalbench/international_citizenship_questions": each(
            ("train", "test"), [{"answer": "Yes", "index": str(n), "question": f"Is it so {n}?"} for n in range(5)]
        ),
        "google-research-datasets/nq_open": each(
            ("train", "validation"), [{"question": f"who is {n}", "answer": ["him", "he"]} for n in numbers]
        ),
        "mandarjoshi/trivia_qa/rc.nocontext": each(
            ("train", "validation"),
            [{"question": f"Who is {n}", "answer": {"aliases": ["Him", "He"]}} for n in numbers],
        ),
        "allenai/ai2_arc/ARC-Easy": each(("train", "validation", "test"), arc),
        "allenai/ai2_arc/ARC-Challenge": each(("train", "validation", "test"), arc),
        "lighteval/siqa": each(
            ("train", "validation"),
            [
                {
                    "context": f"Kim has {n}.",
                    "question": "Why?",
                    "answerA": "a",
                    "answerB": "b",
                    "answerC": "c",
                    "label": "2",
                }
                for n in numbers
            ],
        ),
        "baber/piqa": each(
            ("train", "validation"), [{"goal": f"Do {n}", "sol1": "so", "sol2": "or so", "label": 1} for n in numbers]
        ),
        "allenai/winogrande/winogrande_xl": each(
            ("train", "validation"),
            [{"sentence": f"The {n} fits _ well.", "option1": "it", "option2": "her", "answer": "2"} for n in numbers],
        ),
        "lighteval/quac_helm": each(
            ("train", "validation"),
            [{"prompt": f"Text {n}\n\nQuestion: What?", "references": ["that", "", "the other"]} for n in numbers],
        ),
        **{
            f"cais/mmlu/{name}": each(
                ("dev", "test"),
                [
                    {"question": f"Which {n}?", "subject": name, "choices": ["a", "b", "c", "d"], "answer": n % 4}
                    for n in range(5)
                ],
            )
            for name in subjects
        },
    }
    for place, splits in rows.items():
        for split, lines in splits.items():
            write_lines(folder / place / f"{split}.jsonl", lines)
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}.jsonl"} for split in ("dev", "test")],
        }
        for name in subjects
    ]
    (folder / "cais/mmlu/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    metric = folder / "evaluate-metric" / "code_eval" / "code_eval.py"
    metric.parent.mkdir(parents=True)
    metric.write_text(CODE_EVAL)
    return folder
