"""``evaluate(models, data, tasks=...)``: several models, and ensembles of them, on the same documents and tasks.

What is on record in ``out`` is not computed again; every number is computed from the records of all documents and all
requests. A result is found again by what it was computed from: the model's files, dtype, tokenizer, window and the
document's text. Names of folders and domains play no part, so moving a model or regrouping documents loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from branchmix.checkpoint.folder import write_json
from branchmix.checkpoint.hub import resolve
from branchmix.data.config import EvalData
from branchmix.errors import CheckpointError, RecipeError
from branchmix.evaluate.documents import HashedDocument, replaced_notes, select
from branchmix.evaluate.perplexity import BATCH_TOKENS, common_window, score_documents
from branchmix.evaluate.scores import EvalReport, ModelReport, ScoredDocument, aggregate, mixed
from branchmix.evaluate.tasks.compare import compare_with_first
from branchmix.evaluate.tasks.options import TaskOptions
from branchmix.likelihood.models import Progress, TextModel, check_dtype
from branchmix.likelihood.records import FILE, Journal

RESULTS = "results.json"

Documents = dict[str, list[HashedDocument]]


def evaluate(
    models: Sequence[str],
    data: EvalData | str | Path | None = None,
    *,
    tasks: TaskOptions | Sequence[str] | None = None,
    out: str | Path | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    dtype: str = "auto",
    limit: int | None = None,
    ensemble: str | None = None,
    posterior: bool = True,
    forced: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvalReport:
    """Bits per byte and perplexity of every model on every domain, and what it makes of downstream tasks.

    The arguments are the options of ``branchmix eval``; ``data`` and ``tasks`` may also be given ready-made. Without
    ``max_length`` the window on documents is ``common_window``'s, and on tasks as many as the model has positions for,
    as in lm-eval. Without ``posterior`` an ensemble keeps its prior. ``progress`` is called with step, done, total.

    Raises:
        RecipeError: data file, tasks, options or ensemble do not make sense.
        DataError: a source or a task's data set cannot be read, or has no document that counts.
        CheckpointError: a model cannot be loaded, or is none.
    """
    dtype = check_dtype(dtype)
    options = tasks if isinstance(tasks, TaskOptions) or tasks is None else TaskOptions(tuple(tasks))
    if data is None and options is None:
        raise RecipeError("there is nothing to evaluate on: give --data, --tasks or both")
    if not posterior and ensemble is None:
        raise RecipeError("--fixed-prior: is about an ensemble: name its members with --ensemble")
    if data is None and ensemble is not None:
        raise RecipeError("ensemble: the outputs are averaged on the documents of --data, which is not given")
    with ExitStack() as stack:
        if options is not None:
            options.check()  # at once, before anything is read
        if data is not None:
            data = EvalData.load(data)
        candidates = [TextModel(resolve(given), dtype, trust_remote_code) for given in models]
        members = _members(ensemble, candidates) if ensemble is not None else {}
        if forced:
            given, candidates = candidates, [one for c in candidates for one in (c, *_experts_of(c))]
            if candidates == given:
                raise RecipeError("--forced: none of the models is a mixture: leave it out")
        length = common_window(candidates, max_length)
        folder = Path(out) if out is not None else None
        report = EvalReport([ModelReport(candidate.given, dtype) for candidate in candidates])
        report.notes += [note for candidate in candidates for note in candidate.notes]
        if options is not None:
            from branchmix.evaluate.tasks.task_evaluation import TaskEvaluation

            opened = TaskEvaluation.open(
                options, folder, limit=limit, progress=progress, keep_questions=len(candidates) > 1
            )
            on_tasks = stack.enter_context(opened)
            report.notes += on_tasks.notes
        if data is not None:
            documents = select(data, candidates[0].tokenizer, limit=limit)
            report.notes += _notes(data, documents, candidates)
            journal = Journal(folder, FILE, "document")
        readers = {}
        for number, candidate in enumerate(candidates):
            if data is not None:
                reader = readers[candidate] = _Reader(candidate, journal, length, stride)
                for domain, chosen in documents.items():
                    reader.read(domain, chosen, batch_tokens, progress)
                every = [document.hash for chosen in documents.values() for document in chosen]
                if known := reader.records.num_earlier(every):
                    report.notes.append(f"{candidate.given}: {known} of {len(every)} documents were on record")
                report.models[number] = reader.report(
                    {domain: map(reader.scored, chosen) for domain, chosen in documents.items()}
                )
            if options is not None:
                how: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens, "progress": progress}
                report.notes += on_tasks.evaluate(candidate, report.models[number], **how)
            candidate.release()
        if data is not None and members:
            weights = {readers[member]: share for member, share in members.items()}
            report.models.append(_ensemble(weights, posterior, documents))
    report.comparisons = compare_with_first(report.models)
    if folder is not None:
        write_json(folder / RESULTS, report.as_dict())
    return report


class _Reader:
    """A model with its window on documents."""

    def __init__(self, candidate: TextModel, journal: Journal, max_length: int, stride: int | None):
        self.candidate = candidate
        self.window: dict[str, Any] = {"max_length": max_length, "stride": max_length if stride is None else stride}
        facts = {**candidate.facts, "prefix": candidate.prefix, **self.window}
        self.records = journal.of(facts, **candidate.source)

    def read(
        self, domain: str, documents: Sequence[HashedDocument], batch_tokens: int, progress: Progress | None
    ) -> None:
        """Computes what is not on record; errors are those of ``evaluate``."""
        candidate = self.candidate
        texts = {document.hash: document.text for document in documents}
        options = {**self.window, "batch_tokens": batch_tokens, "progress": candidate.named(progress, domain)}
        for keys, known in self.records.missing(texts, batch_tokens):
            asked = [texts[key] for key in keys]
            scores = score_documents(candidate.model(), candidate.tokenizer, asked, known=known, **options)
            try:
                for number, scored in scores:
                    self.records.add(keys[number], domain=domain, **scored.as_record())
            except CheckpointError as error:
                raise CheckpointError(f"{candidate.given}: {error}") from error

    def scored(self, document: HashedDocument) -> ScoredDocument:
        return ScoredDocument.from_record(self.records[document.hash])

    def report(self, domains: Mapping[str, Iterable[ScoredDocument]]) -> ModelReport:
        """The result of the whole model, from those of every domain's documents."""
        one, scores = self.candidate, {name: aggregate(scored) for name, scored in domains.items()}
        return ModelReport(one.given, one.dtype, _prefix_name(one), **self.window, domains=scores)


def _prefix_name(candidate: TextModel) -> str | None:
    prefix = candidate.prefix
    return None if prefix is None else str(candidate.tokenizer.convert_ids_to_tokens(prefix))


def _experts_of(candidate: TextModel) -> list[TextModel]:
    """A mixture with its gates forced to each of its experts; none of a dense model."""
    is_mixture = candidate.config.model_type == "branchmix"
    if is_mixture and candidate.config.stitches is not None:
        raise RecipeError(
            f"--forced: {candidate.given} has stitches instead of gates: evaluate the dense models instead"
        )
    return [candidate.forced(number) for number in range(candidate.config.num_experts if is_mixture else 0)]


def _notes(data: EvalData, documents: Documents, candidates: Sequence[TextModel]) -> list[str]:
    notes = replaced_notes(documents)
    if "held_out" not in data.model_fields_set:
        counts = ", ".join(f"{len(chosen)} of {name}" for name, chosen in documents.items())
        notes.append(f"held-out documents only, as in training: {counts}; `held_out: all` takes every document")
    prefixes = [_prefix_name(candidate) for candidate in candidates]
    if len(set(prefixes)) > 1:
        words = ", ".join(f"{prefix!r} ({c.given})" for prefix, c in zip(prefixes, candidates, strict=True))
        notes.append(f"the models predict a document's first token from different ones: {words}")
    if len({candidate.tokenizer_hash for candidate in candidates}) > 1:
        notes.append("the models' tokenizers differ: compare bits per byte, not perplexities")
    return notes


# ---- ensembles ----


def _members(ensemble: str, candidates: Sequence[TextModel]) -> dict[TextModel, float]:
    """The members of an ensemble, each with its share of the prior.

    Raises:
        RecipeError: a name fits none or several of the models, or the members do not fit together.
    """
    members: dict[TextModel, float | None] = {}
    for part in ensemble.split(","):
        name, _, share = part.strip().partition("=")
        exact = [c for c in candidates if c.given == name]
        fitting = exact[:1] or [c for c in candidates if c.folder.name == name]
        if len(fitting) != 1:
            what = "is not one of the models" if not fitting else "is the name of several of the models"
            raise RecipeError(f"ensemble: {name!r} {what}: there are {', '.join(c.given for c in candidates)}")
        if fitting[0] in members:
            raise RecipeError(f"ensemble: {name!r} is listed twice")
        try:
            members[fitting[0]] = float(share) if share else None
        except ValueError:
            raise RecipeError(f"ensemble: {part.strip()!r}: {share!r} is not a share, such as 0.5") from None
    given = [share for share in members.values() if share is not None]
    if given and (len(given) < len(members) or min(given) < 0 or not 0 < sum(given) < float("inf")):
        raise RecipeError("ensemble: give a share, 0 or more, to each member or to none")
    first, *others = members
    for other in others:
        if (other.tokenizer_hash, other.prefix) != (first.tokenizer_hash, first.prefix):
            raise RecipeError(f"ensemble: the tokenizers of {first.given} and {other.given} differ: nothing to average")
    shares = given or [1.0] * len(members)
    return {member: share / sum(shares) for member, share in zip(members, shares, strict=True)}


def _ensemble(members: dict[_Reader, float], posterior: bool, documents: Documents) -> ModelReport:
    """Mixes the members' probabilities of every token, from the records."""
    prior = list(members.values())

    def together(document: HashedDocument) -> ScoredDocument:
        return mixed([member.scored(document) for member in members], prior_E=prior, posterior=posterior)

    report = next(iter(members)).report({domain: map(together, chosen) for domain, chosen in documents.items()})
    report.model = f"ensemble of {', '.join(member.candidate.folder.name for member in members)}"
    report.ensemble = {
        "members": {member.candidate.given: share for member, share in members.items()},
        "weights": "posterior" if posterior else "prior",
    }
    return report
