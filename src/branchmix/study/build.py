"""From a study's settings to its graph.

Budgets are exact: the steps of every run follow from the settings and the models' configs alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from branchmix.checkpoint.families import nearest
from branchmix.checkpoint.hub import resolve
from branchmix.checkpoint.json_text import key_of
from branchmix.checkpoint.writer import FileHashes
from branchmix.data.config import Source
from branchmix.data.sources import find_files, naming_domain
from branchmix.errors import RecipeError
from branchmix.likelihood.records import model_hash
from branchmix.settings import overlaid
from branchmix.study.graph import NEGLIGIBLE, SCORES, About, Cost, Graph, Group, Needs, Step, StepKind, has_routers
from branchmix.study.models import Config, Mixtures, seed_config, step_cost
from branchmix.study.settings import SEED, InstalledText, Method, StudyFile
from branchmix.train.config import NewModel
from branchmix.train.run_folder import FREE_TO_CHANGE

FORMAT = 1
"""Version of keys and results: another one makes every step a new one."""
HELD_OUT_WHILE_TRAINING = 2048
"""Tokens of a domain that a run itself evaluates at its end; the scores are a step of their own."""
_HASHED_BYTES = 4 << 30
"""Text up to this size is known by its content, above by sizes and dates."""
_LATER: dict[str, Any] = {
    "routing": {"shared": False, "domains": None, "ffn": {"score": "softmax"}},
    "gates": {"keep_top_k": False},
    "start": "even",
    "trunk": "average",
    "expert_rank": "full",
    "expert_energy": 0.9,
    "shared_expert": None,
    "stitches": None,
}
"""Options of recipes that came after `FORMAT` 1, with the values that mean what was done before there were any.

Left out of keys at these values, so that a study which an older version began is resumed."""
_SEED_PHASE, _EXPERT_PHASE, _MIXTURE_PHASE = 0, 1, 2


def build(study: StudyFile) -> Graph:
    """The graph of a study; reads configs and hashes of what is given, and no weights.

    Raises:
        BranchMixError: the seed or text is missing, or a recipe makes no sense.
    """
    return _Builder(study).build()


class _Builder:
    def __init__(self, study: StudyFile):
        self.study = study
        self.steps: dict[str, Step] = {}
        given = resolve(study.seed, study.folder) if isinstance(study.seed, str) else None
        # A given seed's revision on the Hub, or the hash of its folder; nothing if a step trains the seed.
        revision = f"{given.given}@{given.revision}" if given and given.revision else None
        self.given_identity: dict[str, Any] = {"seed": revision or model_hash(given.folder)} if given else {}
        self.seed_config = seed_config(study, given)
        self.mixtures = Mixtures(study, self.seed_config)
        self.text = "text" if isinstance(study.data, InstalledText) else None

    # ---- the main path ----

    def build(self) -> Graph:
        study, self.data = self.study, dict[str, Any]()
        if isinstance(study.data, InstalledText):
            self._add("text", study.data.model_dump(), Needs())
        else:
            for name, source in study.data.items():
                with naming_domain(name):
                    self.data[name] = _identity_of_source(source, study.folder)
        self.evaluation = {
            "held_out": study.held_out.model_dump(),
            "max_length": study.sequence_length,
            "precision": study.precision,
            "data": self.data,
        }
        self.reference_cost = self._reference_cost()
        groups: dict[Group, list[Method]] = {"methods": study.methods, "ablations": study.ablations}
        for group, methods in groups.items():
            for repetition in range(len(study.random_seeds)):
                if group == "methods":
                    self._dense_models(repetition)
                for method in methods:
                    if method.repetitions is None or repetition < method.repetitions:
                        self._method(method, repetition, group)
        self._routes()
        self._inference()
        return Graph(self.steps)

    def _dense_models(self, repetition: int) -> None:
        study, seed = self.study, self._seed_step(repetition)
        of_seed = About("dense", repetition, "seed", "Seed", title=SEED)
        if isinstance(study.seed, NewModel):
            assert study.tokens.seed is not None
            new = study.seed.model_dump(exclude_unset=True) | {"model_type": study.seed.model_type}
            run = {"model": new, "mix": study.seed_mix or {study.general: 1.0}, **self._rate(1.0)}
            self._train(None, run, study.tokens.seed // study.step_tokens, _SEED_PHASE, self.seed_config, of_seed)
        for expert in study.expert_names:
            about = About("dense", repetition, "expert", f"{expert.capitalize()} expert", title=expert)
            share = study.general_share if expert != study.general else 0.0
            mix = {expert: 1.0 - share, study.general: share} if share else {expert: 1.0}
            run = overlaid({"mix": mix, **self._rate(study.learning_rate.expert)}, study.expert_train)
            cost = step_cost(study, self.seed_config, study.expert_train)
            steps = study.tokens.expert // study.step_tokens
            step = self._train(seed, run, steps, _EXPERT_PHASE, self.seed_config, about, cost)
            self._scores(step, self.seed_config, about)
        self._scores(seed, self.seed_config, of_seed)

    def _method(self, method: Method, repetition: int, group: Group) -> None:
        preset, title = method.preset, method.title
        of_method = (method.label or preset.label, title, title, method.method, preset.what, preset.warning)
        about = About(group, repetition, "upcycle", *of_method)
        seed = self._seed_step(repetition)
        experts = {name: f"r{repetition + 1}.train.{name}" for name in self.study.expert_names}
        dense = ({SEED: seed} if seed else {}) | experts
        if preset.kind == "dense":
            self._runs(method, seed, self.seed_config, about)
            return
        if preset.kind == "ensemble":
            options = {"members": [SEED, *experts], **self.evaluation, **self.given_identity}
            needs = Needs(self.text, members=dense)
            self._add("ensemble", options, needs, replace(about, role="ensemble"), config=self.seed_config)
            return
        recipe = self.mixtures.recipe(method, self._random(repetition, _MIXTURE_PHASE))
        config = self.mixtures.config(recipe)
        content = _without(recipe.model_dump(mode="json", exclude={"seed", "experts"}), _LATER)
        names = [expert.name for expert in recipe.experts]
        needs = Needs(members={role: step for role, step in dense.items() if role in (SEED, *names)})
        options = {"recipe": content, "experts": names, **self.given_identity}
        if recipe.gates or recipe.routing.domains:
            needs = replace(needs, text=self.text)
            options |= {"data": self.data, "held_out": {"share": self.study.held_out.share}}
        name = self._add("upcycle", options, needs, about, recipe=content, config=config)
        same = next(step.name for step in self.steps.values() if step.key == self.steps[name].key)
        if same != name:  # another method measures the same merge, or trains it, in another way
            del self.steps[name]
        if preset.kind == "forced":
            self._scores(same, config, replace(about, role="forced"), "forced")
        elif not any(step.kind == "scores" and step.needs.model == same for step in self.steps.values()):
            step_0 = replace(about, role="step 0", title=f"{title}-step0")
            self._scores(same, config, replace(about, role="merge") if preset.kind == "merge" else step_0)
        if preset.kind == "mixture":
            self._runs(method, same, config, about)

    def _runs(self, method: Method, model: str | None, config: Config, about: About) -> None:
        """Training at equal data and at equal compute; where these are the same run, it is one."""
        study, train = self.study, method.run
        is_reference = method.title == study.reference
        reference_steps, total = self.reference_cost
        wanted = method.match if method.match is not None else method.preset.match
        per_step = step_cost(study, config, train)
        matches_of: dict[int, list[str]] = {}
        for match in ["dm"] if is_reference else wanted:
            steps = reference_steps
            if match == "cm" and abs(reference_steps * per_step.total - total) > NEGLIGIBLE * total:
                steps = total // per_step.total
            if steps < 1:
                raise RecipeError(
                    f"methods: {method.title}: one step costs more than all of {study.reference}: raise tokens.mixture"
                )
            matches_of.setdefault(steps, []).append(match)
        for steps, matches in matches_of.items():
            title = method.title if is_reference else f"{method.title}-{matches[0]}"
            matched = ["dm", "cm"] if is_reference else matches
            if steps == reference_steps and "dm" not in matched:  # equal data comes with equal compute
                matched = ["dm", *matched]
            role: Any = "reference" if is_reference else "trained"
            run_about = replace(about, role=role, title=title, match=tuple(matched))
            run = overlaid({"mix": study.mix, **self._rate(study.learning_rate.mixture)}, train)
            name = self._train(model, run, steps, _MIXTURE_PHASE, config, run_about, per_step)
            self._scores(name, config, run_about)

    # ---- kinds of steps ----

    def _train(
        self,
        model: str | None,
        settings: dict[str, Any],
        steps: int,
        phase: int,
        config: Config,
        about: About,
        per_step: Cost | None = None,
    ) -> str:
        """Adds a training run of what the step ``model`` makes; returns its name."""
        study = self.study
        if steps < 1:
            raise RecipeError(
                f"tokens: r{about.repetition + 1}.train.{about.title} has less than one step of "
                f"{study.step_tokens:,} tokens: raise its budget, or lower batch_size"
            )
        run = {
            **study.run_of(settings),
            "held_out": {"share": study.held_out.share, "tokens": HELD_OUT_WHILE_TRAINING},
            "budget": {"steps": steps},
            "random_seed": self._random(about.repetition, phase),
        }
        run = json.loads(json.dumps(run))
        per_step = per_step or step_cost(study, config, {})
        cost = Cost(steps, steps * study.step_tokens, steps * per_step.flops, steps * per_step.optimizer)
        # What does not change the result is not part of the key.
        free = FREE_TO_CHANGE - {"micro_batch_size"} if has_routers(config) else FREE_TO_CHANGE
        options = {"run": {key: value for key, value in run.items() if key not in free}, "data": self.data}
        options |= self.given_identity if model is None and "model" not in run else {}
        return self._add("train", options, Needs(self.text, model), about, run=run, config=config, cost=cost)

    def _scores(self, model: str | None, config: Config, about: About, kind: StepKind = "scores") -> None:
        options = {**self.evaluation, **(self.given_identity if model is None else {})}
        self._add(kind, options, Needs(self.text, model), about, config=config)

    def _routes(self) -> None:
        """Pages of the first repetition's routers, token by token: of a method's first trained run."""
        options = {name: value for name, value in self.evaluation.items() if name != "precision"}
        routed = [s for s in self._of_first("train") if has_routers(s.config) and not s.config.get("stitches")]
        runs = {s.about.method: s for s in reversed(routed)}
        for method in self.study.routes:
            if (run := runs.get(method)) is None:
                what = f"is not a mixture with routers that the study trains{nearest(method, list(runs))}"
                there = f"there are {', '.join(runs)}" if runs else "there is none: leave routes out"
                raise RecipeError(f"routes: {method!r} {what}; {there}")
            self._add("routes", options, Needs(self.text, run.name), run.about, config=run.config)

    def _inference(self) -> None:
        if self.study.inference is None:
            return
        models = {SEED: seed} if (seed := self._seed_step(0)) else {}
        models |= {s.about.method: s.name for s in self._of_first("upcycle") if s.about.group == "methods"}
        options = {**self.study.inference.model_dump(), **self.given_identity}
        self._add("inference", options, Needs(members=models))

    def _add(
        self, kind: StepKind, options: dict[str, Any], needs: Needs, about: About | None = None, **more: Any
    ) -> str:
        """Adds a step and returns its name; ``options`` and what it needs are all that its result depends on."""
        name: str = kind
        if about is not None:
            name = f"r{about.repetition + 1}.{'scores' if kind in SCORES else kind}.{about.title}"
        if name in self.steps:
            raise RecipeError(f"methods: two of them make {name}: give one another name")
        keys = {role: self.steps[needed].key for role, needed in needs.by_role().items()}
        key = key_of({"format": FORMAT, "kind": kind, "options": options, "needs": keys})
        self.steps[name] = Step(name, kind, needs, key, about=about or About(), **more)
        return name

    # ---- parts ----

    def _of_first(self, kind: StepKind) -> list[Step]:
        """Steps of one kind in the first repetition, in the order in which they were added."""
        return [step for step in self.steps.values() if step.kind == kind and not step.about.repetition]

    def _random(self, repetition: int, phase: int) -> int:
        """Phases draw different numbers: an expert's general text is not the seed's first."""
        return 4 * self.study.random_seeds[repetition] + phase

    def _seed_step(self, repetition: int) -> str | None:
        return f"r{repetition + 1}.train.{SEED}" if isinstance(self.study.seed, NewModel) else None

    def _rate(self, ratio: float) -> dict[str, Any]:
        rate = self.study.learning_rate
        return {"learning_rate": {"peak": rate.peak * ratio, "warmup": rate.warmup, "final": rate.final}}

    def _reference_cost(self) -> tuple[int, int]:
        """Steps of the reference, and all its FLOPs."""
        study = self.study
        method = study.method(study.reference)
        config = self.seed_config
        if method.preset.kind != "dense":
            config = self.mixtures.config(self.mixtures.recipe(method, self._random(0, _MIXTURE_PHASE)))
        steps = study.tokens.mixture // study.step_tokens
        return steps, steps * step_cost(study, config, method.run).total


# ---- What distinguishes one seed, text or merge from another: part of the keys of all steps that depend on them ----


def _without(content: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A mapping without the keys that have their default, at any depth; that of a mapping is None."""
    left = {}
    for key, value in content.items():
        default = defaults.get(key, ...)
        is_mapping = isinstance(default, dict)
        if value != (None if is_mapping else default):
            left[key] = _without(value, default) if is_mapping else value
    return left


def _identity_of_source(source: Source, folder: Path) -> dict[str, Any]:
    if source.files is None:
        return source.model_dump(exclude_none=True)
    files = find_files(source, folder)
    if sum(file.stat().st_size for file in files) > _HASHED_BYTES:
        known: list[Any] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    else:
        with FileHashes(files) as hashes:
            known = [[file.name, hashes.of(file)] for file in files]
    return {"files": known, "column": source.column}
