"""What the repository promises about itself.

One list of dependencies, clean notebooks, commands that exist, light imports, numbers from records.
"""

import ast
import configparser
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from bikd.explorer import is_explorable
from bikd.methods import methods_named
from bikd.runs import Sealed, find_runs
from bikd.select import records_digest


@pytest.fixture(scope="module")
def settings(root):
    parser = configparser.ConfigParser()
    parser.read(root / "settings.ini")
    return parser["DEFAULT"]


def test_settings_and_pyproject_name_the_same_dependencies(root, settings):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert sorted(settings["requirements"].split()) == sorted(project["dependencies"])
    extras = project["optional-dependencies"]
    assert sorted(settings["notebooks_requirements"].split()) == sorted(extras["notebooks"])
    assert sorted(settings["bench_requirements"].split()) == sorted(extras["bench"])
    assert sorted(settings["grid_requirements"].split()) == sorted(extras["grid"])
    assert sorted(settings["explore_requirements"].split()) == sorted(extras["explore"])
    assert sorted(settings["dev_requirements"].split()) == sorted(
        d for d in extras["dev"] if not d.startswith("bikd[")
    )
    assert settings["min_python"] in project["requires-python"]
    assert project["urls"]["Repository"] == settings["git_url"]
    assert all(url.startswith(settings["git_url"]) for url in project["urls"].values())


def test_the_lock_is_complete_and_within_the_ranges(root, settings):
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (root / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    locked = {canonicalize_name(name): version for name, version in pins}
    lists = {k: v for k, v in settings.items() if k.endswith("requirements")}
    assert len(lists) == 6
    waiting = [Requirement(r) for names in lists.values() for r in names.split()]
    for r in waiting:
        assert r.specifier.contains(locked[canonicalize_name(r.name)]), r

    def applies(requirement, extras):
        "Here, if these extras are asked for."
        marker = requirement.marker
        return marker is None or any(marker.evaluate(dict(extra=e)) for e in ("", *extras))

    # And all that these need, as far as it is installed here. Setuptools and wheel come with the
    # environment; pip freeze omits them.
    seen = set()
    while waiting:
        r = waiting.pop()
        name = canonicalize_name(r.name)
        if (name, *r.extras) in seen or name in ("setuptools", "wheel"):
            continue
        if not applies(r, r.extras):
            continue
        seen.add((name, *r.extras))
        assert name in locked, f"{r} is not in requirements.lock"
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # of an extra that is not installed
        waiting += [n for n in map(Requirement, needs) if applies(n, r.extras)]
    assert len(seen) > 100


def notebooks(root):
    return {p.name: json.loads(p.read_text()) for p in sorted((root / "nbs").glob("*.ipynb"))}


def code_cells(notebook):
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


RUNS_CODE_FROM_DATA = re.compile(
    r"import pickle|\bpickle\.|read_pickle|allow_pickle=True|joblib\.load"
    r"|yaml\.(?:unsafe_|full_)?load\(|(?<![.\w])(?:eval|exec)\((?!\))"
)


def calls(function, text):
    "Each call of a function: its text up to the bracket that closes it."
    for part in text.split(f"{function}(")[1:]:
        depth = 1
        for end, letter in enumerate(part):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                yield part[:end]
                break


def test_no_code_comes_from_data(root):
    "No pickle of ours: weights and arrays without objects, YAML by the safe loader."
    code = {name: "\n".join(code_cells(nb)) for name, nb in notebooks(root).items()}
    for folder in ("bikd", "workflow"):
        for p in (root / folder).rglob("*"):
            if p.suffix == ".py" or p.name == "Snakefile":
                code[p.name] = p.read_text()
    for name, text in code.items():
        assert not RUNS_CODE_FROM_DATA.findall(text), name
        for call in calls("torch.load", text):
            assert "weights_only=True" in call, (name, call)


def test_servers_in_the_docs_keep_their_token_and_stay_on_this_machine(root):
    for name in ("README.md", "CONTRIBUTING.md", "workflow/README.md"):
        text = (root / name).read_text()
        assert not re.search(r"--ip|token\s*=\s*['\"]{2}|0\.0\.0\.0|--allow-origin", text), name
    text = (root / "README.md").read_text()
    assert all("--token" in line for line in re.findall(r".*voila nbs.*|.*&& voila.*", text))


def test_versions_agree(root, settings):
    import bikd

    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert bikd.__version__ == settings["version"] == str(citation["version"])
    assert f"## {settings['version']}" in (root / "CHANGELOG.md").read_text()


def test_papermill_notebooks_have_one_parameters_cell_of_literals(root):
    from bikd.experiment import Parameters

    for name, nb in notebooks(root).items():
        tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
        if re.match(r"\d\d[a-z]?_", name):
            assert not tagged, name
            continue
        assert len(tagged) == 1, name
        nodes: list[Any] = ast.parse("".join(tagged[0]["source"])).body
        values = {n.target.id: ast.literal_eval(n.value) for n in nodes}
        if name == "run_experiment.ipynb":
            assert values == {k: f.default for k, f in Parameters.model_fields.items()}


def on_digits(folder, rho, *methods):
    "Committed runs on `mnist5k` at one ρ; of all methods but LFME's experts if none is named."
    runs = [r for r in find_runs(folder / "mnist5k") if r.config.rho == rho]
    wanted = methods or methods_named("all controls")
    return [r for r in runs if r.config.method in wanted]


def of_bikd(folder):
    return [r for r in find_runs(folder / "ablations") if r.config.method == "bikd"]


def of_the_table(folder):
    names = "mnist5k", "fashion_mnist", "cifar10_jpeg"
    runs = [r for name in names for r in find_runs(folder / name)]
    return [r for r in runs if r.config.method in methods_named("all controls")]


def of_figure4(folder):
    at_k = [r for r in of_bikd(folder) if r.config.rho == 50]
    return {r.folder.name: r for r in [*on_digits(folder, 50, "kd", "bikd"), *at_k]}.values()


READ = {  # page -> the records that it reads, by its default parameters, from their folder
    "ablations": of_bikd,
    "alignment": lambda folder: [Sealed(folder / "alignment")],
    "beyond": lambda folder: on_digits(folder, 100),
    "cost": lambda folder: [Sealed(folder / "cost")],
    "differences": of_bikd,
    "explore": lambda folder: [r for r in find_runs(folder / "mnist5k") if is_explorable(r)],
    "figure3": lambda folder: on_digits(folder, 50, "bikd"),
    "figure4": of_figure4,
    "mnist5k_rho100": lambda folder: on_digits(folder, 100),
    "precision": lambda folder: [
        r for name in ("mnist5k", "cifar10_jpeg") for r in find_runs(folder / "precision" / name)
    ],
    "provenance": lambda folder: find_runs(folder / "mnist5k"),
    "run_experiment": lambda folder: [
        r for r in on_digits(folder, 100, "teacher", "ce", "kd", "bikd") if r.config.seed == 0
    ],
    "table1": of_the_table,
}
READ_NOTHING = {"benchmark", "figure1_2", "own_method"}  # they measure, draw a scheme, or train


def papermill_pages(root):
    "Pages without a number, by name."
    pages = {Path(name).stem: nb for name, nb in notebooks(root).items()}
    return {name: nb for name, nb in pages.items() if not re.match(r"\d", name)}


def printed(nb):
    "What a page's cells print as plain text."
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    return "\n".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


def test_every_page_says_which_records_it_read(root):
    pages = papermill_pages(root)
    assert set(pages) == set(READ) | READ_NOTHING
    for name in READ_NOTHING:
        assert "records_digest" not in "\n".join(code_cells(pages[name])), name


@pytest.mark.parametrize("page", READ)
def test_pages_show_the_records_that_are_committed(root, page):
    "If this fails, the records have changed since the page was executed: execute it again."
    found = re.findall(r"\bdigest ([0-9a-f]{64})$", printed(papermill_pages(root)[page]), re.M)
    assert found == [records_digest(READ[page](root / "paper_figures" / "records"))]


def test_outputs_of_pages_are_small_and_of_no_machine(root):
    for name, nb in papermill_pages(root).items():
        size = (root / "nbs" / f"{name}.ipynb").stat().st_size
        assert size < 400_000, f"{name}: {size} bytes"
        outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
        assert outputs or name == "benchmark", name
        assert not [o for o in outputs if o["output_type"] == "error"], name
        kinds = {kind for o in outputs for kind in o.get("data", {})}
        assert not any("widget" in kind for kind in kinds), name  # they need a kernel
        texts = [o["data"] for o in outputs if "data" in o]
        text = json.dumps([{k: v for k, v in t.items() if "image" not in k} for t in texts])
        place = re.search(
            r"(?<![\w.<])/(home|root|tmp|opt|usr|work|mnt|Users)/", text + printed(nb)
        )
        assert not place, f"{name}: {place}"
        assert str(Path.home()) + "/" not in text + printed(nb), name


def test_library_notebooks_teach(root):
    "Each exports one module and asserts. tests/test_layout.py counts their lines."
    modules = []
    for name, nb in notebooks(root).items():
        if not re.match(r"\d\d[a-z]?_", name):
            continue
        code = code_cells(nb)
        modules += re.findall(r"#\| default_exp (\S+)", "\n".join(code))
        assert any(re.search(r"\bassert\b|\btest_\w+\(", c) for c in code), name
    exported = {p.stem for p in (root / "bikd").glob("*.py")} - {"__init__", "_modidx"}
    assert sorted(modules) == sorted(exported)


@pytest.mark.parametrize(
    "module,forbidden",
    [
        ("losses", "pandas pydantic matplotlib torchvision fastcore nbdev papermill IPython"),
        ("hypergradient", "pandas pydantic matplotlib fastcore nbdev papermill IPython"),
        ("runs", "matplotlib fastcore nbdev papermill IPython mlxtend sklearn"),
    ],
)
def test_imports_stay_light(module, forbidden):
    loaded = f"[m for m in {forbidden.split()} if m in sys.modules]"
    command = [sys.executable, "-c", f"import sys, bikd.{module}; print(*{loaded})"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_readme_commands_are_real(root, settings):
    text = (root / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.S))
    assert "papermill nbs/run_experiment.ipynb runs/rho100.ipynb -p rho 100" in blocks
    assert "nbdev_test" in blocks
    assert "pytest" in blocks
    from bikd.experiment import Parameters

    for command in re.findall(r"papermill nbs.*", blocks):
        if "run_experiment" not in command:
            continue
        for name in re.findall(r" -p (\w+) ", command):
            assert name in Parameters.model_fields, name
    assert len(text.split()) <= 1000
    for page in ("README.md", "RESULTS.md", "COSTS.md", "nbs/README.md"):
        for path in re.findall(r"\]\((?!http)([^)#]+)", (root / page).read_text()):
            assert (root / page).parent.joinpath(path).exists(), (page, path)
    address = "https://github.com/{user}/{repo}".format(**settings)
    assert f"git clone {address} && cd {settings['repo']}" in blocks
    assert ".[dev]" in blocks
    assert ".[dev]" in (root / ".ci" / "run").read_text()


def test_the_readmes_links_work_on_a_package_index(root, settings):
    absolute_links = runpy.run_path(str(root / "setup.py"))["absolute_links"]
    text = "![A](a.png), [b](c/d.md#e), [f](https://g.org/h), [i](#j), [![k](l.svg)](m.md)"
    assert absolute_links(text, "https://x.org/r", "main") == (
        "![A](https://x.org/r/raw/main/a.png), [b](https://x.org/r/blob/main/c/d.md#e), "
        "[f](https://g.org/h), [i](#j), "
        "[![k](https://x.org/r/raw/main/l.svg)](https://x.org/r/blob/main/m.md)"
    )
    readme = absolute_links((root / "README.md").read_text(), "https://x.org/r", "main")
    assert re.findall(r"\]\((?!https?:|#)[^)]*\)", readme) == []


def test_the_readmes_table_is_that_of_the_records(root):
    from bikd.report import spread
    from bikd.runs import find_runs

    text = (root / "README.md").read_text()
    labels = {
        "ce": "Student alone (CE)",
        "kd": "Plain distillation (KD)",
        "bikd": "**BiKD**",
        "bsce": "Balanced softmax, no teacher",
        "ce_val": "CE on train ∪ validation images",
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("mnist5k", "fashion_mnist", "cifar10_jpeg"):
        for r in find_runs(root / "paper_figures" / "records" / name):
            if (r.config.rho, r.config.net) == (100, "resnet8") and r.config.method in labels:
                accuracy = r.summary["test_acc_pct_last"]
                found.setdefault(r.config.method, {}).setdefault(name, []).append(accuracy)
    for method, label in labels.items():
        cells = (f"{spread(v)} ({len(v)})" for v in found[method].values())
        assert f"| {label} | {' | '.join(cells)} |" in text, label


def test_readme_numbers_are_those_of_the_records(root):
    from bikd.report import accuracy_table, spread
    from bikd.runs import find_runs

    folder = root / "paper_figures" / "records" / "mnist5k"
    every = find_runs(folder)
    for r in every:
        assert r.config.run_id == r.folder.name
        assert len(r.metrics) == r.summary["epochs"]
    first_rows = ("teacher", "ce", "kd", "bikd")
    runs = [r for r in every if r.config.rho == 100 and r.config.method in first_rows]
    assert len(runs) == 12
    assert {r.config.seed for r in runs} == {0, 1, 2}
    text = (root / "RESULTS.md").read_text()
    for method, row in accuracy_table(runs).iterrows():
        rows = re.findall(r"^\| (?:Teacher|Student|KD|BiKD).*", text, re.M)
        (line,) = [row_of for row_of in rows if f"`{method}`" in row_of]
        for column in ("last", "val-selected", "best on test", "many", "medium", "few"):
            assert row[column] in line, (method, column, row[column])

    def at(where, method):
        found = find_runs(root / "paper_figures" / "records" / where)
        chosen = [r for r in found if (r.config.method, r.config.rho) == (method, 100)]
        return spread([r.summary["test_acc_pct_last"] for r in chosen])

    low, full = at("bfloat16/estimator", "bikd"), at("mnist5k", "bikd")
    assert f"reaches {low} with it and {full} without" in text
    low, low_kd = at("bfloat16/teacher_mode", "bikd"), at("bfloat16/teacher_mode", "kd")
    assert f"gives {low}, and KD {low_kd} beside {at('mnist5k', 'kd')}" in text
    places = root / "paper_figures" / "records" / "rounding"
    rounding = [r for name in ("product", "pytorch_rules") for r in find_runs(places / name)]
    (twin,) = (r for r in runs if r.config == rounding[0].config)
    assert rounding[1].config == twin.config
    a, b, ours = (r.summary["test_acc_pct_last"] for r in (*rounding, twin))
    assert f"ended at {a:.1f} and {b:.1f} instead of {ours:.1f}" in text


def test_readme_table_and_its_reading_are_those_of_the_records(root):
    from bikd.methods import table_rows
    from bikd.report import markdown_table
    from bikd.select import find_cells
    from bikd.table import pairs, table1, wide

    text = (root / "RESULTS.md").read_text()
    rows = [*table_rows("table1"), *table_rows("controls")]
    sets = ["mnist5k", "fashion_mnist"]
    columns = [(d, rho) for d in sets for rho in (10.0, 50.0, 100.0)]
    columns.remove(("fashion_mnist", 50.0))
    runs = find_cells(root / "paper_figures" / "records", sets)
    cells = table1(runs, columns, rows)

    def printed_table(cells):
        return markdown_table(wide(cells).rename_axis("method").reset_index())

    assert printed_table(cells).strip() in text
    assert all(cells.n[cells["mean"].notna()] == 3)
    printed = (root / "paper_figures" / "table1.md").read_text()
    for d in sets:
        assert printed_table(cells[cells.dataset == d]) in printed
    mean = cells.pivot(index="method", columns=["dataset", "rho"], values="mean")

    def above(a, b):
        return mean.loc[a] - mean.loc[b]

    assert not (mean.drop("teacher").idxmax() == "bikd").any()  # first in no column
    over_kd = above("bikd", "kd").drop(index=10.0, level="rho")
    assert f"{over_kd.min():.1f} to {over_kd.max():.1f} points above KD" in text
    verdicts = {d: pairs(runs, [(d, 100.0)], "bikd", rows[1:]).set_index("b").verdict for d in sets}
    behind = {d: set(v.index[v == "behind"]) for d, v in verdicts.items()}
    ahead = {d: set(v.index[v == "ahead"]) for d, v in verdicts.items()}
    both = {"cckd", "lfme", "bsce", "ce_balanced", "ce_val", "bsce_val"}
    assert behind == dict(mnist5k=both | {"ltkd", "l2rw"}, fashion_mnist=both | {"kd_val"})
    assert ahead == dict(mnist5k={"mwn"}, fashion_mnist={"bkd"})
    by = {m: [f"{above(m, 'bikd')[d, 100.0]:.0f}" for d in sets] for m in ("bsce", "ce_val")}
    assert f"is {' and '.join(by['bsce'])} points above BiKD" in text
    assert f"is {' and '.join(by['ce_val'])} points above BiKD" in text
    assert all(abs(above("lfme", "ce_balanced")[d, 100.0]) < 2 for d in sets)
    ends: dict[tuple[str, str], list[float]]
    ends = {(d, c): [] for d in sets for c in ("w_hard", "w_soft")}
    for r in runs:
        if (r.config.method, r.config.rho) != ("bikd", 100.0):
            continue
        weights = r.class_weights
        last = weights[weights.epoch == weights.epoch.max()].set_index("class")
        for c in ("w_hard", "w_soft"):
            ends[r.config.dataset, c].append(last[c][9] / last[c][0])

    def span(*key):
        return " to ".join(dict.fromkeys(f"{f(ends[key]):.1f}" for f in (min, max)))

    hard, soft = span("mnist5k", "w_hard"), span("mnist5k", "w_soft")
    assert f"ends with {hard} times the hard and {soft} times the soft weight" in text
    hard, soft = span("fashion_mnist", "w_hard"), span("fashion_mnist", "w_soft")
    assert f"with {hard} and {soft} times on" in text


def test_the_planners_record_is_what_the_workflows_page_says(root):
    compared = pd.read_csv(root / "paper_figures" / "records" / "cost" / "compared.csv")
    off = compared.off.sort_values().tolist()
    text = (root / "workflow" / "README.md").read_text()
    assert len(off) == 12
    assert f"nine took {off[0]:.2f} to {off[8]:.2f} times" in text
    assert f"took {off[9]:.1f} to {off[11]:.1f} times" in text


def test_readme_costs_are_those_of_the_benchmark(root):
    text = (root / "COSTS.md").read_text()
    folder = root / "paper_figures" / "records" / "benchmark"
    assert (folder / "benchmark.md").read_text().strip() in text
    ratios = pd.read_csv(folder / "ratios.csv")
    ratio = {(r.what, r.against.split(",")[0]): f"{r.ratio:.2f}" for r in ratios.itertuples()}
    share = pd.read_csv(folder / "where_time_goes.csv", index_col=0).sum(axis=1)
    compiled = ratio["exact BiKD step, compiled", "double backward"]
    assert f"takes {compiled} of double backward instead of 0.35" in text
    step = ratio["exact BiKD step", "KD step"]
    iteration = ratio["full BiKD iteration, memo warm", "plain KD iteration"]
    assert f"{step} KD steps instead of 2.9, and {iteration} of plain KD" in text
    floor = share["floor of BiKD"] / share["double backward"]
    assert f"is itself {floor:.2f} of double backward" in text
    env = json.loads((folder / "env.json").read_text())
    assert f"to repay {env['compile_s']:.0f} s of compiling" in text
    assert not env["git_dirty"]


def test_the_page_of_limits_names_tests_that_exist(root):
    page = (root / "LIMITS.md").read_text()
    tests = "\n".join(p.read_text() for p in (root / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 10
    assert all(f"def {n}(" in tests for n in named)
    for path in re.findall(r"\]\((?!http)([^)#]+)|`(tests/[\w/.]+)`", page):
        assert (root / "".join(path)).exists(), path


def test_ablations_and_the_threads_share_of_chance_are_those_of_the_records(root):
    from bikd.runs import find_runs
    from bikd.table import effects

    records, readme = root / "paper_figures" / "records", (root / "RESULTS.md").read_text()
    e = effects([r for r in find_runs(records / "ablations") if r.config.method == "bikd"])
    changes = e[e.index != ""]
    assert len(changes) == 30
    assert (changes.n == 3).all()
    assert (changes.verdict == "open").sum() == 26
    assert (changes.verdict == "behind").sum() == 4
    rows = dict(re.findall(r"^\| `(\w+=\w+)`[^|]*\| ([^|]+) \| behind \|$", readme, re.M))
    assert rows == changes[changes.verdict == "behind"].text.to_dict()

    def last(where):
        runs = [r for r in find_runs(records / where) if r.config.rho == 100]
        keys = [(r.config.method, r.config.seed) for r in runs]
        return pd.Series(
            dict(zip(keys, [r.summary["test_acc_pct_last"] for r in runs], strict=True))
        )

    one = last("threads")
    moved = one - last("mnist5k")[one.index]
    by = moved.groupby(level=0).mean().abs().round(2)
    assert len(one) == 12
    teacher, kd, bikd, ce = (f"{by[m]:.2f}" for m in ("teacher", "kd", "bikd", "ce"))
    said = (
        f"teacher's mean by {teacher} points, KD's by {kd}, BiKD's by {bikd} and CE's by {ce}, "
        f"and one single run by {moved.abs().max():.1f}"
    )
    assert said in readme
    said = f"{teacher} points for the teacher, {kd} for KD, {bikd} for BiKD, {ce} for CE"
    assert said in (root / "LIMITS.md").read_text()
