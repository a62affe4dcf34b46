"""The groups of tasks that the BAM paper reports (arXiv 2408.08274, section 5.3 and Table 3), as named suites.

Tasks are lm-eval's, with the paper's number of examples in the prompt. What the paper leaves open:

- MATH, 4-shot: ``minerva_math``, whose fixed four examples are what "4-shot" means; GSM8K, 8-shot: ``gsm8k_cot``, the
  fixed eight.
- LegalBench's citizenship questions have no number of shots in the paper: lm-eval's four.
- Which metric of a task counts: plain accuracy, exact match, pass@1; for QuAC the F1 of words.
- A group is the plain mean of its tasks, and the last column the plain mean of the groups, as in the table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """A task of a suite."""

    task: str
    """In lm-eval, or in ``definitions``."""
    num_fewshot: int
    metric: str
    """The one that counts for the suite, as ``TaskScore.metrics`` has it."""
    runs_code: bool = False
    """What the model writes is run."""


@dataclass(frozen=True)
class Suite:
    """Tasks whose mean is one column of the paper's Table 3."""

    title: str
    members: tuple[Member, ...]


EVERYTHING = "bam"
SUITES = {
    "bam-math": Suite(
        "Math", (Member("gsm8k_cot", 8, "exact_match,strict-match"), Member("minerva_math", 4, "exact_match"))
    ),
    "bam-code": Suite(
        "Code",
        (Member("humaneval", 0, "pass@1,create_test", runs_code=True), Member("mbpp", 3, "pass_at_1", runs_code=True)),
    ),
    "bam-law": Suite("Law", (Member("legalbench_international_citizenship_questions", 4, "exact_match,get-answer"),)),
    "bam-knowledge": Suite(
        "Know.",
        (
            Member("nq_open", 0, "exact_match,remove_whitespace"),
            Member("triviaqa", 0, "exact_match,remove_whitespace"),
        ),
    ),
    "bam-reasoning": Suite(
        "Reason.",
        (
            Member("arc_easy", 0, "acc"),
            Member("arc_challenge", 0, "acc"),
            Member("social_iqa", 0, "acc"),
            Member("piqa", 0, "acc"),
            Member("winogrande", 0, "acc"),
            Member("quac", 0, "f1"),
        ),
    ),
    "bam-mmlu": Suite("MMLU", (Member("mmlu", 5, "acc"),)),
}
"""In the order of the paper's columns; ``bam`` is all of them."""


def chosen_suites(names: tuple[str, ...]) -> dict[str, Suite]:
    """The suites among ``names``."""
    wanted = set(SUITES) if EVERYTHING in names else {name for name in names if name in SUITES}
    return {name: suite for name, suite in SUITES.items() if name in wanted}
