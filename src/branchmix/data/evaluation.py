"""The YAML file of ``--data``: domains of text, and which of their documents an evaluation reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PrivateAttr

from branchmix.data.config import HeldOut, Source
from branchmix.errors import RecipeError
from branchmix.settings import Count, Settings, Share, parse, read_yaml

_OF_RUNS = ("budget", "learning_rate")
"""Keys that only files of ``branchmix train`` and ``branch`` have, and always."""


class Selection(Settings):
    """The documents that training with the same ``share`` and ``tokens`` holds out, and evaluates."""

    share: Share = HeldOut().share
    """Share of a domain's documents, by the hash of their text."""
    tokens: Count | None = HeldOut().tokens
    """Maximum of each domain, counted as training counts them, with the first model's tokenizer."""
    documents: Count | None = None
    """Maximum of each domain, instead of ``tokens``."""


class EvalData(Settings):
    """Domains by name, and which of their documents count."""

    data: dict[str, Source]
    """As in a run: ``{code: {files: ...}, law: {hub: ...}}``."""
    held_out: Selection | Literal["all"] = Selection()
    """``all``: every document. Otherwise those that training never sees."""
    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """Where relative paths start from."""
        return self._folder

    @classmethod
    def load(cls, path: str | Path) -> EvalData:
        """Read a data file; a file of ``train`` or ``branch`` works too, with what it holds out.

        Raises:
            RecipeError: it is missing, no YAML, or does not make sense; all problems at once.
        """
        path = Path(path)
        content = read_yaml(path)
        if isinstance(content, dict) and any(key in content for key in _OF_RUNS):
            content = {key: value for key, value in content.items() if key in cls.model_fields}
        config: EvalData = parse(cls, content, str(path))
        if not config.data:
            raise RecipeError(f"{path}: data: there is no domain")
        if isinstance(config.held_out, Selection) and "documents" in config.held_out.model_fields_set:
            if "tokens" in config.held_out.model_fields_set:
                raise RecipeError(f"{path}: held_out: give either tokens or documents")
            config.held_out.tokens = None
        config._folder = path.parent
        return config
