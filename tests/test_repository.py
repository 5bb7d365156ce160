"""What the repository promises about itself: one list of dependencies, clean notebooks, commands that exist, light imports."""

import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib

import pandas as pd
import pytest
import yaml


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


def test_the_lock_is_complete_and_within_the_ranges(root, settings):
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    locked = dict(
        l.split("==")
        for l in (root / "requirements.lock").read_text().splitlines()
        if not l.startswith("#")
    )
    locked = {canonicalize_name(n): v for n, v in locked.items()}
    lists = {k: v for k, v in settings.items() if k.endswith("requirements")}
    assert len(lists) == 6
    waiting, seen = [Requirement(r) for l in lists.values() for r in l.split()], set()
    for r in waiting:
        assert r.specifier.contains(locked[canonicalize_name(r.name)]), r
    while waiting:  # and all that these need, as far as it is installed here; setuptools and wheel come with the environment, pip freeze leaves them out
        r = waiting.pop()
        name = canonicalize_name(r.name)
        if (
            (name, *r.extras) in seen
            or name in ("setuptools", "wheel")
            or r.marker
            and not any(r.marker.evaluate(dict(extra=e)) for e in ("", *r.extras))
        ):
            continue
        seen.add((name, *r.extras))
        assert name in locked, f"{r} is not in requirements.lock"
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # of an extra that is not installed
        waiting += [
            n
            for n in map(Requirement, needs)
            if n.marker is None or any(n.marker.evaluate(dict(extra=e)) for e in ("", *r.extras))
        ]
    assert len(seen) > 100


def test_no_code_comes_from_data(root):
    "No pickle of ours: `torch.load` by `weights_only` alone, arrays without objects, YAML by the safe loader."
    code = {
        p: "".join(c["source"])
        for p, nb in notebooks(root).items()
        for c in nb["cells"]
        if c["cell_type"] == "code"
    } | {
        p.name: p.read_text()
        for f in ("bikd", "workflow")
        for p in (root / f).rglob("*")
        if p.suffix == ".py" or p.name == "Snakefile"
    }
    for name, text in code.items():
        calls = re.findall(r"torch\.load\([^\n]*", text)
        assert all("weights_only=True" in c for c in calls), (name, calls)
        found = re.findall(
            r"import pickle|\bpickle\.|read_pickle|allow_pickle=True|joblib\.load|yaml\.(?:unsafe_|full_)?load\(|(?<![.\w])(?:eval|exec)\((?!\))",
            text,
        )
        assert not found, (name, found)
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "workflow/README.md",
    ):  # servers in the docs keep their token and stay on this machine
        assert not re.search(
            r"--ip|token\s*=\s*['\"]{2}|0\.0\.0\.0|--allow-origin", (root / name).read_text()
        ), name
    assert all(
        "--token" in line
        for line in re.findall(r".*voila nbs.*|.*&& voila.*", (root / "README.md").read_text())
    )


def test_versions_agree(root, settings):
    import bikd

    assert (
        bikd.__version__
        == settings["version"]
        == str(yaml.safe_load((root / "CITATION.cff").read_text())["version"])
    )
    assert f"## {settings['version']}" in (root / "CHANGELOG.md").read_text()


def notebooks(root):
    return {p.name: json.loads(p.read_text()) for p in sorted((root / "nbs").glob("*.ipynb"))}


def test_papermill_notebooks_have_one_parameters_cell_of_literals(root):
    from bikd.experiment import Parameters

    for name, nb in notebooks(root).items():
        tagged = [c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", [])]
        if re.match(r"\d\d[a-z]?_", name):
            assert not tagged, name
            continue
        assert len(tagged) == 1, name
        nodes = ast.parse("".join(tagged[0]["source"])).body
        values = {n.target.id: ast.literal_eval(n.value) for n in nodes}
        if name == "run_experiment.ipynb":
            assert values == {k: f.default for k, f in Parameters.model_fields.items()}


# laid out one statement a line, and not yet cut into short cells
TO_BE_CUT = {
    "07_runs.ipynb",
    "07a_experiment.ipynb",
    "11_graph.ipynb",
    "12_cost.ipynb",
    "13_table.ipynb",
    "14_figures.ipynb",
}


def test_library_notebooks_teach(root):
    "Each exports one module, asserts, and keeps its cells short enough to read."
    modules = []
    for name, nb in notebooks(root).items():
        if not re.match(r"\d\d[a-z]?_", name):
            continue
        code = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
        modules += re.findall(r"#\| default_exp (\S+)", "\n".join(code))
        assert any(re.search(r"\bassert\b|\btest_\w+\(", c) for c in code), name
        limit = 150 if name in TO_BE_CUT else 60
        assert max(c.count("\n") for c in code) < limit, name
    assert (
        len(modules) == len(set(modules)) == len(list((root / "bikd").glob("*.py"))) - 2
    )  # less __init__ and _modidx


@pytest.mark.parametrize(
    "module,forbidden",
    [
        ("losses", "pandas pydantic matplotlib torchvision fastcore nbdev papermill IPython"),
        ("hypergradient", "pandas pydantic matplotlib fastcore nbdev papermill IPython"),
        ("runs", "matplotlib fastcore nbdev papermill IPython mlxtend sklearn"),
    ],
)
def test_imports_stay_light(module, forbidden):
    code = (
        f"import sys, bikd.{module}; print(*[m for m in {forbidden.split()} if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        == []
    )


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
    found = {}
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
    from bikd.runs import Run, find_runs

    folder = root / "paper_figures" / "records" / "mnist5k"
    every = find_runs(folder)
    for r in every:
        assert r.config.run_id == r.folder.name
        assert len(r.metrics) == r.summary["epochs"]
    runs = [
        r
        for r in every
        if r.config.rho == 100 and r.config.method in ("teacher", "ce", "kd", "bikd")
    ]
    assert len(runs) == 12
    assert {r.config.seed for r in runs} == {0, 1, 2}
    text = (root / "RESULTS.md").read_text()
    for method, row in accuracy_table(runs).iterrows():
        (line,) = [
            l
            for l in text.splitlines()
            if re.match(r"\| (Teacher|Student|KD|BiKD)", l) and f"`{method}`" in l
        ]
        for column in ("last", "val-selected", "best on test", "many", "medium", "few"):
            assert row[column] in line, (method, column, row[column])

    def at(where, method):
        return spread(
            [
                r.summary["test_acc_pct_last"]
                for r in find_runs(root / "paper_figures" / "records" / where)
                if r.config.method == method and r.config.rho == 100
            ]
        )

    assert (
        f"reaches {at('bfloat16/estimator', 'bikd')} with it and {at('mnist5k', 'bikd')} without"
        in text
    )
    assert (
        f"gives {at('bfloat16/teacher_mode', 'bikd')}, and KD {at('bfloat16/teacher_mode', 'kd')} beside {at('mnist5k', 'kd')}"
        in text
    )
    rounding = [
        Run(p.parent)
        for p in sorted((root / "paper_figures" / "records" / "rounding").glob("*/*/summary.json"))
    ]
    (twin,) = (r for r in runs if r.config == rounding[0].config)
    assert rounding[1].config == twin.config
    a, b, ours = (r.summary["test_acc_pct_last"] for r in (*rounding, twin))
    assert f"ended at {a:.1f} and {b:.1f} instead of {ours:.1f}" in text


def test_readme_table_and_its_reading_are_those_of_the_records(root):
    from bikd.methods import table_rows
    from bikd.report import markdown_table
    from bikd.select import find_cells
    from bikd.table import pairs, table1, wide

    text, rows, sets = (
        (root / "RESULTS.md").read_text(),
        table_rows("table1") + table_rows("controls"),
        ["mnist5k", "fashion_mnist"],
    )
    columns = [
        (d, rho) for d in sets for rho in (10.0, 50.0, 100.0) if (d, rho) != ("fashion_mnist", 50.0)
    ]
    runs = find_cells(root / "paper_figures" / "records", sets)
    cells = table1(runs, columns, rows)
    table = markdown_table(wide(cells).rename_axis("method").reset_index())
    assert table.strip() in text
    assert all(cells.n[cells["mean"].notna()] == 3)
    printed = (root / "paper_figures" / "table1.md").read_text()
    for d in sets:
        assert (
            markdown_table(wide(cells[cells.dataset == d]).rename_axis("method").reset_index())
            in printed
        )
    mean = cells.pivot(index="method", columns=["dataset", "rho"], values="mean")

    def above(a, b):
        return mean.loc[a] - mean.loc[b]

    assert not (mean.drop("teacher").idxmax() == "bikd").any()  # first in no column
    over_kd = above("bikd", "kd").drop(index=10.0, level="rho")
    assert f"{over_kd.min():.1f} to {over_kd.max():.1f} points above KD" in text
    verdicts = {d: pairs(runs, [(d, 100.0)], "bikd", rows[1:]).set_index("b").verdict for d in sets}
    behind, ahead = (
        {d: set(v.index[v == word]) for d, v in verdicts.items()} for word in ("behind", "ahead")
    )
    both = {"cckd", "lfme", "bsce", "ce_balanced", "ce_val", "bsce_val"}
    assert behind == dict(mnist5k=both | {"ltkd", "l2rw"}, fashion_mnist=both | {"kd_val"})
    assert ahead == dict(mnist5k={"mwn"}, fashion_mnist={"bkd"})
    by = {m: [f"{above(m, 'bikd')[d, 100.0]:.0f}" for d in sets] for m in ("bsce", "ce_val")}
    assert f"is {' and '.join(by['bsce'])} points above BiKD" in text
    assert f"is {' and '.join(by['ce_val'])} points above BiKD" in text
    assert all(abs(above("lfme", "ce_balanced")[d, 100.0]) < 2 for d in sets)
    ends = {(d, c): [] for d in sets for c in ("w_hard", "w_soft")}
    for r in runs:
        if (r.config.method, r.config.rho) != ("bikd", 100.0):
            continue
        last = r.class_weights[r.class_weights.epoch == r.class_weights.epoch.max()].set_index(
            "class"
        )
        for c in ("w_hard", "w_soft"):
            ends[r.config.dataset, c].append(last[c][9] / last[c][0])

    def span(*key):
        return " to ".join(dict.fromkeys(f"{f(ends[key]):.1f}" for f in (min, max)))

    assert (
        f"ends with {span('mnist5k', 'w_hard')} times the hard and {span('mnist5k', 'w_soft')} times the soft weight"
        in text
    )
    assert (
        f"with {span('fashion_mnist', 'w_hard')} and {span('fashion_mnist', 'w_soft')} times on"
        in text
    )


def test_the_planners_record_is_what_the_workflows_page_says(root):
    off = (
        pd.read_csv(root / "paper_figures" / "records" / "cost" / "compared.csv")
        .off.sort_values()
        .tolist()
    )
    text = (root / "workflow" / "README.md").read_text()
    assert len(off) == 12
    assert f"nine took {off[0]:.2f} to {off[8]:.2f} times" in text
    assert f"took {off[9]:.1f} to {off[11]:.1f} times" in text


def test_readme_costs_are_those_of_the_benchmark(root):
    text, folder = (
        (root / "COSTS.md").read_text(),
        root / "paper_figures" / "records" / "benchmark",
    )
    assert (folder / "benchmark.md").read_text().strip() in text
    ratio = {
        (r.what, r.against.split(",")[0]): f"{r.ratio:.2f}"
        for r in pd.read_csv(folder / "ratios.csv").itertuples()
    }
    share = pd.read_csv(folder / "where_time_goes.csv", index_col=0).sum(axis=1)
    assert (
        f"takes {ratio['exact BiKD step, compiled', 'double backward']} of double backward instead of 0.35"
        in text
    )
    assert (
        f"{ratio['exact BiKD step', 'KD step']} KD steps instead of 2.9, and {ratio['full BiKD iteration, memo warm', 'plain KD iteration']} of plain KD"
        in text
    )
    assert (
        f"is itself {share['floor of BiKD'] / share['double backward']:.2f} of double backward"
        in text
    )
    env = json.loads((folder / "env.json").read_text())
    assert f"to repay {env['compile_s']:.0f} s of compiling" in text
    assert not env["git_dirty"]


def test_the_page_of_limits_names_tests_that_exist(root):
    page, tests = (
        (root / "LIMITS.md").read_text(),
        "\n".join(p.read_text() for p in (root / "tests").rglob("test_*.py")),
    )
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
        return pd.Series(
            {
                (r.config.method, r.config.seed): r.summary["test_acc_pct_last"]
                for r in find_runs(records / where)
                if r.config.rho == 100
            }
        )

    one = last("threads")
    moved = one - last("mnist5k")[one.index]
    by = moved.groupby(level=0).mean().abs().round(2)
    assert len(one) == 12
    assert (
        f"teacher's mean by {by['teacher']:.2f} points, KD's by {by['kd']:.2f}, BiKD's by {by['bikd']:.2f} and CE's by {by['ce']:.2f}, and one single run by {moved.abs().max():.1f}"
        in readme
    )
    assert (
        f"{by['teacher']:.2f} points for the teacher, {by['kd']:.2f} for KD, {by['bikd']:.2f} for BiKD, {by['ce']:.2f} for CE"
        in (root / "LIMITS.md").read_text()
    )
