"""``evaluate(models, data, tasks=...)``: several models, and ensembles of them, on the same documents and tasks.

What is on record in ``out`` is not computed again; every number is computed from the records of all documents and all
requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from branchmix.checkpoint.folder import write_json
from branchmix.checkpoint.hub import ResolvedModel, resolve
from branchmix.checkpoint.text import replaced_note
from branchmix.data.config import EvalData
from branchmix.errors import RecipeError
from branchmix.evaluate.candidate import Candidate, ForcedCandidate
from branchmix.evaluate.document_records import DocumentReader, DocumentRecords
from branchmix.evaluate.documents import HashedDocument, select
from branchmix.evaluate.ensemble import mixed
from branchmix.evaluate.perplexity import BATCH_TOKENS, Progress
from branchmix.evaluate.scores import EvalReport, ModelReport
from branchmix.evaluate.tasks.options import TaskOptions
from branchmix.likelihood.forward import max_positions
from branchmix.likelihood.models import check_dtype

MAX_LENGTH = 2048
"""Tokens of the window if none is given and all models have as many positions."""
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

    Args:
        models: folders or Hub ids, dense or mixtures.
        data: the documents (see ``EvalData``), or the YAML file that names them.
        tasks: lm-eval's tasks, groups and tags, and suites (see ``TaskOptions``), or just their names.
        out: folder for the records, from which a later call resumes, for ``results.json`` and the tasks' examples.
        max_length: tokens of the window; on documents ``MAX_LENGTH`` or the least that a model has positions for if not
            given, on tasks as many as the model has positions for, as lm-eval does.
        stride: tokens by which the window advances; the whole window if not given, so that windows do not overlap.
        batch_tokens: tokens of a forward pass.
        dtype: of the weights: ``auto`` as stored.
        limit: documents of a domain, and examples of a task, at most.
        ensemble: ``seed,code,law``, or with their prior ``seed=0.5,code=0.25,law=0.25``: models given, by their name or
            their folder's.
        posterior: weight the ensemble by the posterior of the domain (see ``ensemble_log_probs``), not just the prior.
        forced: of each mixture, also every expert: the mixture with all its gates forced to it.
        trust_remote_code: run code that checkpoints bring along.
        progress: called with step, done, total.

    Raises:
        RecipeError: data file, tasks, options or ensemble do not make sense.
        DataError: a source or a task's data set cannot be read, or has no document that counts.
        CheckpointError: a model cannot be loaded, or is none.
    """
    check_dtype(dtype)
    options = tasks if isinstance(tasks, TaskOptions) or tasks is None else TaskOptions(tuple(tasks))
    if data is None and options is None:
        raise RecipeError("there is nothing to evaluate on: give --data, --tasks or both")
    if data is None and ensemble:
        raise RecipeError("ensemble: the outputs are averaged on the documents of --data, which is not given")
    with ExitStack() as stack:
        if options is not None:
            options.check()  # at once, before anything is read
        if data is not None and not isinstance(data, EvalData):
            data = EvalData.load(data)
        candidates = [Candidate(resolve(given), dtype, trust_remote_code) for given in models]
        members = _members(ensemble, candidates) if ensemble else {}
        if forced:
            candidates = [one for candidate in candidates for one in _with_forced(candidate, trust_remote_code)]
        length = _window(candidates, max_length)
        folder = Path(out) if out is not None else None
        report = EvalReport([ModelReport(candidate.given, dtype) for candidate in candidates])
        report.notes += [note for candidate in candidates for note in candidate.notes]
        if options is not None:
            from branchmix.evaluate.tasks.task_evaluation import TaskEvaluation

            loaded = stack.enter_context(TaskEvaluation.open(options, folder, limit=limit, progress=progress))
            report.notes += loaded.notes
        if data is not None:
            documents = select(data, candidates[0].tokenizer, limit=limit)
            report.notes += _notes(data, documents, candidates)
            records = DocumentRecords(folder)
        readers = {}
        for number, candidate in enumerate(candidates):
            if data is not None:
                reader = DocumentReader(
                    candidate, records, max_length=length, stride=length if stride is None else stride
                )
                readers[candidate] = reader
                for domain, chosen in documents.items():
                    reader.read(domain, chosen, batch_tokens, progress)
                every = [document for chosen in documents.values() for document in chosen]
                if known := sum(records.was_there(reader.key, document.hash) for document in every):
                    report.notes.append(f"{candidate.given}: {known} of {len(every)} documents were on record")
                report.models[number] = reader.report(
                    {domain: map(reader.scored, chosen) for domain, chosen in documents.items()}
                )
            if options is not None:
                of_tasks = loaded.evaluate(
                    candidate, max_length=max_length, batch_tokens=batch_tokens, progress=progress
                )
                report.models[number].tasks, report.models[number].suites = of_tasks.tasks, of_tasks.suites
                report.notes += of_tasks.notes
            candidate.release()
        if data is not None and members:
            weights = {readers[member]: share for member, share in members.items()}
            report.models.append(_ensemble(weights, posterior, documents))
    if folder is not None:
        write_json(folder / RESULTS, report.as_dict())
    return report


def _with_forced(candidate: Candidate, trust_remote_code: bool) -> Iterator[Candidate]:
    """A model, and if it is a mixture, with its gates forced to each expert."""
    yield candidate
    if candidate.config.model_type == "branchmix":
        resolved = ResolvedModel(candidate.given, candidate.folder, candidate.revision)
        for number in range(candidate.config.num_experts):
            yield ForcedCandidate(resolved, candidate.dtype, trust_remote_code, number)


def _window(candidates: Sequence[Candidate], max_length: int | None) -> int:
    """The same window for all models: they are compared with as much context."""
    positions = {c.given: limit for c in candidates if (limit := max_positions(c.config)) is not None}
    if max_length is None:
        return min([MAX_LENGTH, *positions.values()])
    for given, limit in positions.items():
        if max_length > limit:
            raise RecipeError(f"max_length: {max_length} is more than the {limit} positions of {given}")
    return max_length


def _notes(data: EvalData, documents: Documents, candidates: Sequence[Candidate]) -> list[str]:
    notes = []
    for name, chosen in documents.items():
        if count := sum(document.replaced for document in chosen):
            notes.append(f"{name}: {replaced_note(count)}")
    if "held_out" not in data.model_fields_set:
        counts = ", ".join(f"{len(chosen)} of {name}" for name, chosen in documents.items())
        notes.append(f"held-out documents only, as in training: {counts}; `held_out: all` takes every document")
    prefixes = {candidate.prefix_name for candidate in candidates}
    if len(prefixes) > 1:
        words = ", ".join(f"{c.prefix_name!r} ({c.given})" for c in candidates)
        notes.append(f"the models predict a document's first token from different ones: {words}")
    if len({candidate.tokenizer_hash for candidate in candidates}) > 1:
        notes.append("the models' tokenizers differ: compare bits per byte, not perplexities")
    return notes


# ---- ensembles ----


def _members(ensemble: str, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
    """The members of an ensemble, each with its share of the prior.

    Raises:
        RecipeError: a name fits none or several of the models, or the members do not fit together.
    """
    members: dict[Candidate, float | None] = {}
    for part in ensemble.split(","):
        name, _, share = part.strip().partition("=")
        exact = [c for c in candidates if c.given == name]
        fitting = exact[:1] or [c for c in candidates if c.folder.name == name]
        if len(fitting) != 1:
            what = "is none of the models" if not fitting else "is the name of several of the models"
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


def _ensemble(members: dict[DocumentReader, float], posterior: bool, documents: Documents) -> ModelReport:
    """Mixes the members' probabilities of every token, from the records."""
    prior = list(members.values())
    report = next(iter(members)).report(
        {
            domain: [
                mixed([member.scored(document) for member in members], prior_E=prior, posterior=posterior)
                for document in chosen
            ]
            for domain, chosen in documents.items()
        }
    )
    report.model = f"ensemble of {', '.join(member.candidate.folder.name for member in members)}"
    report.ensemble = {
        "members": {member.candidate.given: share for member, share in members.items()},
        "weights": "posterior" if posterior else "prior",
    }
    return report
