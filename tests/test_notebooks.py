"""The notebooks run as they are, but for SHORT in their first cell, and are kept without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
RUNS = {  # what each leaves in its workdir
    "dcal": ("report.html", "runs/full-0/figures/attention.png"), "doctor": ("sick/comparison.html", "cured/results.json"),
    "kd": ("report.html", "student/model.safetensors", "runs/kd-0/result.json"),
    "your_own_recipe": ("report.html", "runs/kd-0/export/model.safetensors"),
}  # fmt: skip


def read(path: Path):
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag: str):
    (found,) = (cell for cell in notebook.cells if tag in cell.metadata.get("tags", ()))
    return found


def shown(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_all_are_known():
    assert [path.stem for path in NOTEBOOKS] == list(RUNS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stripped_and_valid(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert not shown(notebook)
    assert all(cell.get("execution_count") is None for cell in notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    assert path.read_text() == nbformat.writes(notebook) + "\n", "as nbformat writes it"


def test_all_set_up_alike():
    ways = {tagged(read(path), "setup").source.removesuffix('\n\nPath("my_recipes").mkdir(exist_ok=True)') for path in NOTEBOOKS}
    assert len(ways) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))  # as if it lay in this clone; what it writes goes to tmp_path
    notebook = read(path)
    first = tagged(notebook, "parameters")
    assert "SHORT = False" in first.source
    first.source = first.source.replace("SHORT = False", "SHORT = True") + "\nWORKDIR = 'workdir'"
    ipc = Config({"KernelManager": {"transport": "ipc", "ip": str(tmp_path / "k")}})
    NotebookClient(notebook, timeout=300, kernel_name="python3", config=ipc, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all((tmp_path / "workdir" / name).is_file() for name in RUNS[path.stem])
    assert any("image/png" in output.get("data", {}) for output in shown(notebook))
