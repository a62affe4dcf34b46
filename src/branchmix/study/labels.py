"""What models are called in tables, pictures and sentences, and what their intervals are."""

from __future__ import annotations

from typing import Any

from branchmix.study.graph import About

Numbers = dict[str, Any]
"""What ``results.collect`` returns, or a model in it."""


def label_of(about: About) -> str:
    """As the paper's rows are called: BAM DM Expert KV."""
    label = about.label
    if about.role == "step 0":
        return f"{label}, step 0"
    if about.role != "trained":
        return label
    match = "/".join(about.match).upper()
    family, _, rest = label.partition(" ")
    return f"{family} {match} {rest}" if family == "BAM" else f"{label} ({match})"


def marked_label(study: Numbers, model: Numbers) -> str:
    """A model's label, and how many repetitions of it are done if not all."""
    done = len(model["repetitions"])
    return model["label"] + (f" ({done} of {study['repetitions']} repetitions)" if done < study["repetitions"] else "")


def merge_label(model: Numbers) -> str:
    """The label of a merge without a word on its training."""
    return str(model["label"].removesuffix(", step 0"))


def intervals_are(study: Numbers) -> str:
    """What the ± of comparisons with the reference is: over repetitions where there are several."""
    kinds = {row["over"] for row in study["comparisons"].values()}
    students = "Student's 95 % interval over repetitions with other random seeds, paired by the order of the data"
    documents = "twice the standard error over held-out documents"
    if kinds == {"documents"}:
        return f"{documents}, of one repetition"
    return f"{students}; for rows of one repetition, {documents}" if "documents" in kinds else students
