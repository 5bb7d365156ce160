"""The package without its extras, and what is shipped beside its Python files."""

import subprocess
import sys
import tomllib
from fnmatch import fnmatch

import pytest

NEEDS = {  # module -> the package of the extra `notebooks` that it meets first
    "report": "matplotlib",
    "table": "scipy",  # where matplotlib is there
    "figures": "matplotlib",
    "alignment": "matplotlib",
    "explorer": "anywidget",  # where matplotlib and scipy are there
}
SHOWING = ["matplotlib", "scipy", "anywidget", "ipywidgets", "traitlets"]
OTHERS = ["IPython", "fastcore", "nbdev", "papermill", "mlxtend", "snakemake", "voila"]


def without(packages: list[str], statement: str) -> subprocess.CompletedProcess:
    "A statement in a Python in which these packages cannot be imported."
    code = f"import sys; sys.modules.update(dict.fromkeys({packages})); {statement}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", NEEDS)
def test_a_module_that_needs_an_extra_names_it(module):
    package = NEEDS[module]
    importer = "report" if package == "matplotlib" else module  # all of them import bikd.report
    p = without([package, *OTHERS], f"import bikd.{module}")
    assert p.returncode == 1
    assert p.stderr.strip().splitlines()[-1] == (
        f"ModuleNotFoundError: bikd.{importer} needs {package}: pip install 'bikd[notebooks]'"
    )


def test_all_other_modules_need_no_extra(root):
    modules = sorted(p.stem for p in (root / "bikd").glob("*.py") if p.stem[0] != "_")
    core = [f"bikd.{m}" for m in modules if m not in NEEDS]
    p = without(SHOWING + OTHERS, f"import {', '.join(core)}")
    assert p.returncode == 0, p.stderr


def test_distill_is_listed_and_loaded_only_when_used():
    p = without([], "import bikd; print('distill' in dir(bikd), 'torch' in sys.modules)")
    assert p.stdout.split() == ["True", "False"]
    p = without([], "from bikd import *; print(distill.__module__)")
    assert p.stdout.split() == ["bikd.own_data"]


def test_every_file_of_the_package_is_shipped(root):
    "setuptools takes Python files by itself, other files only where pyproject.toml says so."
    tools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = tools["package-data"]["bikd"]
    files = [p.name for p in (root / "bikd").iterdir() if p.is_file() and p.suffix != ".py"]
    assert {"explorer.js", "explorer.css", "py.typed"} <= set(files)
    assert [f for f in files if not any(fnmatch(f, p) for p in patterns)] == []
