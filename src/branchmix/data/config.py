"""Settings of the text: where each domain comes from, what is held out, and the YAML file of ``--data``."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from branchmix.settings import Count, Settings, SettingsFile, Share, absolute


class Source(Settings):
    """Where the text of one domain comes from: ``files``, or ``hub``."""

    files: str | list[str] | None = None
    """Paths or globs (``**`` for folders at any depth), from the YAML file's folder. ``.jsonl``, ``.json``, ``.csv``,
    ``.tsv`` and ``.parquet`` (also compressed: ``.gz``, ``.zst``) hold a document a row; any other file of text is one
    document. Archives, binary tables, PDF and the like are refused."""
    exclude: list[str] = []
    """Paths or globs of files to leave out, though ``files`` matches them."""
    hub: str | None = None
    """Data set on the Hub, or a local folder in the Hub's layout; ``@revision`` after the id."""
    name: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    column: str = "text"
    """Column that holds the text."""
    streaming: bool = True
    """Read a Hub data set as far as the run needs it, instead of downloading all of it first."""

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.files is None) == (self.hub is None):
            raise ValueError("give either files or hub")
        if self.files is not None and self.name is not None:
            raise ValueError("name belongs to a data set of the Hub")
        if self.files is None and self.exclude:
            raise ValueError("exclude belongs to files")
        return self

    @property
    def patterns(self) -> list[str]:
        return [self.files] if isinstance(self.files, str) else list(self.files or ())

    def absolute(self, base: Path, *, out: Path) -> Source:
        """The same text for a process in any folder: paths start from ``base``, files in ``out`` are left out."""
        changes: dict[str, Any] = {}
        if self.files is not None:
            start = Path(glob.escape(str(absolute(base, Path()))))
            changes["files"] = [str(absolute(file, start)) for file in self.patterns]
            changes["exclude"] = [*(str(absolute(file, start)) for file in self.exclude), f"{glob.escape(str(out))}/**"]
        elif self.hub is not None and (base / self.hub).expanduser().exists():
            changes["hub"] = str(absolute(self.hub, base))
        return self.model_copy(update=changes)


class HeldOut(Settings):
    """Documents that are never trained on, by the hash of their text, so that the same ones are held out everywhere."""

    share: Share = 0.02
    """Share of a domain's documents."""
    tokens: Count = 65536
    """Tokens of them that an evaluation reads, of each domain."""


class Selection(Settings):
    """The documents that training with the same ``share`` and ``tokens`` holds out, and evaluates."""

    share: Share = HeldOut().share
    """Share of a domain's documents, by the hash of their text."""
    tokens: Count | None = HeldOut().tokens
    """Maximum of each domain, counted as training counts them, with the first model's tokenizer."""
    documents: Count | None = None
    """Maximum of each domain, instead of ``tokens``."""

    @model_validator(mode="after")
    def _one_maximum(self) -> Selection:
        if "documents" in self.model_fields_set:
            if "tokens" in self.model_fields_set:
                raise ValueError("give either tokens or documents")
            self.tokens = None
        return self


class EvalData(SettingsFile):
    """Domains by name, and which of their documents count. A file of ``train`` or ``branch`` works too."""

    data: dict[str, Source]
    """As in a run: ``{code: {files: ...}, law: {hub: ...}}``."""
    held_out: Selection | Literal["all"] = Selection()
    """``all``: every document. Otherwise those that training never sees."""

    @model_validator(mode="before")
    @classmethod
    def _of_a_run(cls, content: Any) -> Any:
        if isinstance(content, dict) and ("budget" in content or "learning_rate" in content):
            return {key: value for key, value in content.items() if key in cls.model_fields}
        return content

    @model_validator(mode="after")
    def _some_domain(self) -> EvalData:
        if not self.data:
            raise ValueError("data: there is no domain")
        return self
