"""The notebook of the small story runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "story.ipynb"


def test_it_is_kept_without_output() -> None:
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert [cell for cell in cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.get("outputs")]


@pytest.mark.slow
def test_the_story_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("STORY_SCALE", "0.15")
    monkeypatch.setenv("BRANCHMIX_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = {
        cell["id"]: "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    table = next(text for text in printed.values() if "bits per byte" in text)
    table = table[table.index("bits per byte") :]
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in table.splitlines()[1:]}
    assert rows["experts/code"][1] < rows["seed"][1]
    assert sum(rows["trained"]) < sum(rows["mixture"])
    assert (tmp_path / "story" / "routes.html").is_file()
