"""How the library is laid out, counted: lines, cells, parameters, branches, and no comment lost.

Lines in a cell say nothing while statements share lines. So one statement a line, laid out by
`ruff format`, and then counted.
"""

import ast
import importlib
import inspect
import io
import json
import re
import statistics
import textwrap
import tokenize
from pathlib import Path
from typing import Any

import pytest
from fastcore.docments import docments
from radon.complexity import cc_visit

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
MEDIAN, P90, LONGEST = 14, 32, 45  # non-blank lines of a page's exported cells
PARAMETERS, COMPLEXITY = 10, 12
ALL_KEYWORDS = {"train", "distill"}  # the front doors: each keyword has its own line and comment

PAGES = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if re.match(r"\d\d[a-z]?_", p.name)]
MODULES = [p for p in sorted((ROOT / "bikd").glob("*.py")) if p.name != "_modidx.py"]
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def tokens(source):
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def functions(source):
    "Each function of a module, with its dotted name; those within functions too."

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = f"{prefix}{getattr(child, 'name', '')}"
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, child
                yield from walk(child, f"{name}.<locals>.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, prefix)

    return list(walk(ast.parse(source), ""))


def exported_cells(page):
    "The sources of a page's exported cells, without nbdev's directives."
    for cell in json.loads(page.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.match(r"#\|\s*export", source):
            lines = source.splitlines()
            yield "\n".join(line for line in lines if not line.startswith("#|"))


def all_lines(source):
    "The numbers of the lines of `__all__`, which nbdev writes."
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return range(node.lineno, (node.end_lineno or node.lineno) + 1)
    return range(0)


@every_module
def test_lines_are_short(module):
    source = module.read_text()
    listed = all_lines(source)
    long = [
        f"{n}: {line}"
        for n, line in enumerate(source.splitlines(), 1)
        if len(line) > COLUMNS and n not in listed and "://" not in line
    ]
    assert not long, f"{len(long)} lines over {COLUMNS} characters\n" + "\n".join(long)


@every_module
def test_each_statement_has_a_line_of_its_own(module):
    joined = [
        t.line for t in tokens(module.read_text()) if t.type == tokenize.OP and t.string == ";"
    ]
    assert joined == []


@every_page
def test_exported_cells_are_short(page):
    cells = exported_cells(page)
    sizes = sorted(sum(bool(line.strip()) for line in cell.splitlines()) for cell in cells)
    assert sizes
    assert statistics.median(sizes) <= MEDIAN, sizes
    assert sizes[int(0.9 * (len(sizes) - 1))] <= P90, sizes
    assert sizes[-1] <= LONGEST, sizes


@every_module
def test_functions_take_few_parameters(module):
    for name, node in functions(module.read_text()):
        a = node.args
        n = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
        assert n <= PARAMETERS or name in ALL_KEYWORDS, f"{name} has {n} parameters"


@every_module
def test_functions_branch_little(module):
    blocks = [b for b in cc_visit(module.read_text()) if b.letter in "FM"]
    branching = {b.fullname: b.complexity for b in blocks if b.complexity > COMPLEXITY}
    assert branching == {}


def signature_comments(source):
    "The comments between a function's `def` and the first line of its body, linters' ones aside."
    comments, depth, begun, done = [], 0, False, False
    for t in tokens(source):
        if t.type == tokenize.COMMENT and begun:
            comments.append(t.string)
        elif t.type == tokenize.NAME and t.string == "def":
            begun = True
        elif t.type == tokenize.NEWLINE and done:
            break
        elif t.type == tokenize.OP and begun:
            depth += (t.string in "([{") - (t.string in ")]}")
            done = done or (t.string == ":" and not depth)
    return [c.lstrip("# ") for c in comments if not re.match(r"#\s*(noqa|type:|pragma)", c)]


def find(module, name):
    "A function by its dotted name."
    found: Any = importlib.import_module(f"bikd.{module.stem}")
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    for wrapper in ("fget", "func", "__func__"):
        found = getattr(found, wrapper, None) or found
    return inspect.unwrap(found)


@every_module
def test_no_comment_on_a_parameter_is_lost(module):
    "What docments does not see is in no table of parameters."
    source = module.read_text()
    lost = {}
    for name, node in functions(source):
        if "<locals>" in name:
            continue
        text = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
        written = " ".join(signature_comments(text)).split()
        if not written:
            continue
        seen = docments(find(module, name), args_kwargs=True)
        if written != " ".join(filter(None, seen.values())).split():
            lost[name] = written
    assert lost == {}


@every_module
def test_methods_are_not_asked_what_they_have(module):
    "What training wants to know of a method is a member of `Method`."
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            owner = ast.unparse(node.args[0])
            assert not re.search(r"\bmethod(\(\))?$", owner), ast.unparse(node)
