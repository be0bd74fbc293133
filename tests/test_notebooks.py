"""The notebooks run from top to bottom, with settings so small that they take seconds."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient
from runs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# In place of the values in the cell that is tagged "parameters".
SMALL = {"STEPS": "4", "MODEL": '"tiny"'}


def cells(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def text_of(notebook) -> str:
    """What the cells print."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept(path):
    """No outputs, which would grow old; no network; the cell for Colab."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert len(cells(notebook, "setup")) == len(cells(notebook, "parameters")) == 1
    assert 'REPOSITORY = ""' in cells(notebook, "setup")[0].source


@pytest.mark.parametrize(
    "name, expected",
    [
        pytest.param(
            "quickstart",
            ["1,287 training images, 72% of their labels are wrong", "ieg:", "--logdir"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "own_data_and_audit",
            ["of the labels are wrong", "labels in cleaned.csv are wrong", "path,class,probability"],
            marks=pytest.mark.slow,
        ),
        pytest.param("new_method", ["q = 1 half the absolute error", "gce:"], marks=pytest.mark.slow),
    ],
)
def test_runs(name, expected, tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (parameters,) = cells(notebook, "parameters")
    lines = parameters.source.splitlines()
    for number, line in enumerate(lines):
        variable = line.partition(" = ")[0]
        if variable in SMALL:
            lines[number] = f"{variable} = {SMALL[variable]}"
        elif 'pathlib.Path("runs/' in line:
            lines[number] = f"{variable} = pathlib.Path({str(tmp_path / 'runs')!r})"
    parameters.source = "\n".join(lines)
    assert all(f"{variable} = {value}" in parameters.source for variable, value in SMALL.items())
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "notebooks")}})
    client.execute()  # raises where a cell does
    shown = text_of(notebook)
    assert all(part in shown for part in expected), shown
    assert not (pathlib.Path(ROOT) / "notebooks" / "runs").exists()


def test_every_notebook_is_run():
    assert [path.stem for path in NOTEBOOKS] == ["new_method", "own_data_and_audit", "quickstart"]
