"""The house: who imports whom, how long commands and functions are, and that every module is in the wheel."""

import ast
import re
import tomllib

import pytest
from runs import ROOT

# From top to bottom; a module imports from its own room, or from a floor below. Rooms of one floor do not know each
# other. What stands in the package's root and is not named here is a command.
FLOORS = [
    {"commands"},
    {"classifier", "model_selection"},
    {"audit", "plan", "reproduce"},
    {"arguments", "train", "inference"},
    {"data"},
    {"runtime", "methods", "models"},
    {"cli"},
    {"buckets", "config", "files", "hardware", "unpickle"},
    {"errors", "lazy"},
]
COMMANDS = {"main", "quickstart", "predict", "export", "embed", "clean", "semantic_noise"}
COMMANDS_OF_DATA = {"doctor", "prepare", "contact_sheet", "semantic_noise"}


def modules():
    """Name -> file."""
    found = {}
    for file in sorted((ROOT / "ieg_jax").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = file
    return found


MODULES = modules()
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def imported(tree, known):
    """The modules of the package that a module imports, anywhere in it, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in names]
        else:
            continue
        for name in names:
            if name in known:
                yield name, node.lineno


def circles(graph):
    """The sets of modules that import each other, directly or through others."""
    reach = {name: set() for name in graph}

    def walk(start, name):
        for other in graph[name]:
            if other not in reach[start]:
                reach[start].add(other)
                walk(start, other)

    for name in graph:
        walk(name, name)
    return [name for name in graph if name in reach[name]]


def floor(module):
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else "__init__"
    # The doctor rehearses a training; the other commands of the data need nothing but these.
    if room in COMMANDS or module == "ieg_jax.data.doctor":
        room = "commands"
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None), room


def upward(graph):
    found = []
    for name, others in graph.items():
        for other in others:
            (own_floor, own), (their_floor, theirs) = floor(name), floor(other)
            if own != theirs and not (own_floor is not None and their_floor is not None and own_floor < their_floor):
                found.append(f"{name} imports {other}")
    return found


GRAPH = {name: {other for other, _ in imported(tree, MODULES)} - {"ieg_jax"} for name, tree in TREES.items()}
del GRAPH["ieg_jax"]  # imports the classifier when it is asked for


def test_no_module_imports_itself_through_others():
    assert circles(GRAPH) == []


def test_imports_lead_downward():
    assert upward(GRAPH) == []


def test_the_check_sees_a_circle_and_an_upward_import():
    tree = ast.parse("def f():\n    from ieg_jax.train import loop\n")
    assert [name for name, _ in imported(tree, MODULES)] == ["ieg_jax.train.loop"]
    changed = {**GRAPH, "ieg_jax.data.splits": {*GRAPH["ieg_jax.data.splits"], "ieg_jax.train.loop"}}
    assert "ieg_jax.data.splits" in circles(changed)
    assert upward(changed) == ["ieg_jax.data.splits imports ieg_jax.train.loop"]
    assert upward({"ieg_jax.train.loop": {"ieg_jax.inference.trained"}}) != [], "rooms of one floor"


def test_models_methods_and_configuration_know_no_data():
    for name, others in GRAPH.items():
        room = name.split(".")[1]
        if room in ("models", "methods"):
            assert not [other for other in others if other.startswith("ieg_jax.data")], name
    assert GRAPH["ieg_jax.config"] <= {"ieg_jax.errors"}


def commands():
    roots = [name for name in MODULES if name.count(".") == 1 and name.split(".")[1] in COMMANDS]
    return [
        *roots,
        *(f"ieg_jax.data.{name}" for name in sorted(COMMANDS_OF_DATA)),
        *(n for n in MODULES if "__main__" in n),
    ]


@pytest.mark.parametrize("name", commands())
def test_a_command_is_flags_and_one_call(name):
    assert len(MODULES[name].read_text().splitlines()) < 90


def test_no_function_is_longer_than_a_hundred_lines():
    long = [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 100
    ]
    assert long == []


def test_the_loop_is_a_story():
    assert len(MODULES["ieg_jax.train.loop"].read_text().splitlines()) < 300


def test_own_modules_are_imported_at_the_top_or_a_comment_says_why():
    unexplained = []
    for name, tree in TREES.items():
        top = {node.lineno for node in tree.body}
        lines = MODULES[name].read_text().splitlines()
        for other, line in imported(tree, MODULES):
            if line in top:
                continue
            block = next(  # the comment may stand above the first of several imports
                number for number in range(line - 1, 0, -1) if not re.match(r"\s+(import|from) ", lines[number - 1])
            )
            if "#" not in lines[line - 1] and not lines[block - 1].strip().startswith("#"):
                unexplained.append(f"{name}:{line} imports {other}")
    # The package's classifier is imported when it is asked for; the docstring of the function says why.
    assert [text for text in unexplained if not text.startswith("ieg_jax:")] == []


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {".".join(file.parent.relative_to(ROOT).parts) for file in MODULES.values()}
    assert sorted(listed) == sorted(packages | {"ieg_jax.configs"})
