"""The import arrows of the design, read from the code."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"pipeline": {"pipeline", "engines", "calibration"}, "engines": {"engines"}, "calibration": {"calibration"}}


def imports_of(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names.add(f"{node.module}.{alias.name}" if is_module(node.module, alias.name) else node.module)
    return names


def is_module(package: str, name: str) -> bool:
    inside = ROOT.joinpath(*package.split("."), name)
    return inside.is_dir() or inside.with_suffix(".py").is_file()


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_arrows_point_from_pipeline_to_engines_and_calibration_only(package: str):
    for file in files_of(package):
        for name in imports_of(file):
            top = name.split(".")[0]
            assert top not in ALLOWED or top in ALLOWED[package], f"{file.relative_to(ROOT)} imports {name}"


def test_the_running_pipeline_never_imports_training_or_evaluation():
    for file in files_of("pipeline"):
        if file.name == "cli.py" or "commands" in file.parts:
            continue  # the command line offers every command, and imports each one's code when it is called
        for name in imports_of(file):
            assert not name.startswith(("engines.training", "engines.evaluation")), f"{file.name} imports {name}"


def test_viewer_and_client_know_messages_only():
    allowed = {"pipeline.messages", "pipeline.client", "pipeline.viewer"}
    for file in [ROOT / "pipeline" / "client.py", *files_of("pipeline/viewer")]:
        for name in imports_of(file):
            if name.split(".")[0] in ALLOWED:
                assert any(name == ok or name.startswith(ok + ".") for ok in allowed), f"{file.name} imports {name}"


def test_every_package_is_installed():
    """They are stated in pyproject.toml, so a new folder is easily forgotten; an editable install hides that."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent for package in (*ALLOWED, "configs") for file in files_of(package)}
    assert sorted(stated) == sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
