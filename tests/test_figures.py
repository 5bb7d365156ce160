"""The figures' notebooks by papermill.

What they write is the same every time; bad input ends with a message and without a file.
"""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

RECORDS = "paper_figures/records"


def papermill(root, notebook, to, *parameters):
    command = [sys.executable, "-m", "papermill", "--no-progress-bar"]
    command += [str(root / "nbs" / f"{notebook}.ipynb"), str(to)]
    for name, value in parameters:
        command += ["-p", name, value]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def made(root, notebook, folder, *parameters):
    page, out = folder.with_suffix(".ipynb"), ("out", str(folder))
    done = papermill(root, notebook, page, out, *parameters)
    assert done.returncode == 0, done.stderr[-2000:]
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(
    "notebook,parameters,names",
    [
        ("figure1_2", [], ["figure1", "figure2"]),
        ("figure3", [], ["figure3-mnist5k-rho50"]),
        ("figure4", [], ["figure4-mnist5k-rho50"]),
    ],
)
def test_a_rebuild_is_byte_identical_and_the_committed_numbers_are_those_of_the_records(
    root, tmp_path, notebook, parameters, names
):
    once, again = (made(root, notebook, tmp_path / n, *parameters) for n in "ab")
    assert once == again
    assert all(f"{n}{e}" in once for n in names for e in (".pdf", ".png"))
    # pictures may differ between versions of matplotlib
    numbers = {n: b for n, b in once.items() if n.endswith(".csv")}
    assert {n: (root / "paper_figures" / n).read_bytes() for n in numbers} == numbers
    assert bool(numbers) == (notebook != "figure1_2")


def test_the_records_of_fashion_mnist_make_figures_too(root, tmp_path):
    parameters = [("dataset", "fashion_mnist"), ("rho", "100"), ("seeds", "0 1 2")]
    files = made(root, "figure3", tmp_path / "f", *parameters)
    for name in ("figure3-fashion_mnist-rho100.csv", "figure3-fashion_mnist-rho100-claims.csv"):
        assert files[name] == (root / "paper_figures" / name).read_bytes()
    assert files["figure3-fashion_mnist-rho100.csv"].count(b"\n") == 12156 + 1


@pytest.mark.parametrize("notebook,n_files", [("figure3", 4), ("beyond", 9)])
def test_of_two_settings_in_one_folder_the_nets_choose_one(root, tmp_path, notebook, n_files):
    parameters = [("dataset", "cifar10_jpeg"), ("rho", "100"), ("student", "resnet8")]
    files = made(root, notebook, tmp_path / "f", *parameters)
    assert len(files) == n_files
    drawn = [Path(name).stem for name in files if "claims" not in name]
    assert all(stem.endswith("-cifar10_jpeg-rho100-resnet8") for stem in drawn)
    numbers = {n: b for n, b in files.items() if n.endswith(".csv")}
    assert {n: (root / "paper_figures" / n).read_bytes() for n in numbers} == numbers


def test_the_student_that_was_watched_is_the_one_of_the_records(root):
    from bikd.runs import find_runs

    watched = pd.read_csv(root / RECORDS / "alignment" / "alignment.csv")
    for r in find_runs(root / RECORDS / "mnist5k"):
        if (r.config.method, r.config.rho) != ("bikd", 100.0):
            continue
        mine = watched[watched.seed == r.config.seed].pivot(
            index=["epoch", "class"], columns="term", values="weight"
        )
        theirs = r.class_weights.set_index(["epoch", "class"])[["w_hard", "w_soft"]]
        assert len(mine) == 300
        assert (abs(mine.values - theirs.values) < 1e-6).all()


@pytest.mark.parametrize(
    "notebook,name,value,message",
    [
        ("figure3", "rho", "7", "no finished run of bikd on mnist5k at rho=7"),
        ("figure3", "seed", "0", "did you mean 'seeds'?"),
        ("figure3", "student", "resnet14", "no run has these nets; there are: resnet20"),
        ("figure4", "k_runs_dir", "nowhere", "no finished run"),
        ("figure4", "dataset", "cifar10", "no finished run of kd on cifar10"),
        ("beyond", "methods", "nope", "method 'nope' is unknown"),
        ("explore", "runs_dir", f"{RECORDS}/cost", "no run with a trace"),
        ("alignment", "records", "nowhere", "holds no alignment.csv"),
    ],
)
def test_bad_input_is_named(root, tmp_path, notebook, name, value, message):
    parameters = [(name, value)]
    if notebook not in ("explore", "alignment"):
        parameters.append(("out", str(tmp_path / "out")))
    done = papermill(root, notebook, tmp_path / "x.ipynb", *parameters)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
