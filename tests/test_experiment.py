"""`run_experiment.ipynb` through the real papermill, as a person calls it."""

import os
import subprocess
import sys

import nbformat
import pytest

CLI = [sys.executable, "-m", "papermill"]
QUICK = ["-p", "epochs", "1", "-p", "student", "resnet8", "-p", "teacher", "resnet8"]


def papermill(root, *args, out=None, cwd=None):
    env = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "MPLBACKEND")}
    notebook = root / "nbs" / "run_experiment.ipynb"
    command = [*CLI, notebook, *([out] if out else []), *args]
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cwd or root,
        env=env,
        timeout=600,
    )


def outputs(nb, kind):
    cells = [c for c in nb.cells if c.cell_type == "code"]
    return [o for c in cells for o in c.outputs if o.output_type == kind]


def text_of(nb):
    printed = [o.text for o in outputs(nb, "stream")]
    shown = [o.data.get("text/plain", "") for o in outputs(nb, "execute_result")]
    return "\n".join(printed) + "\n".join(shown)


def test_the_page_is_worth_reading_and_a_second_call_repeats_nothing(root, tmp_path):
    args = ["-p", "rho", "100", "-p", "runs_dir", tmp_path / "runs", *QUICK]
    first = papermill(root, *args, out=tmp_path / "a.ipynb")
    assert first.returncode == 0, first.stderr[-2000:]
    assert "unknown parameter" not in first.stderr.lower()
    assert "Unable to parse" not in first.stderr
    nb = nbformat.read(tmp_path / "a.ipynb", 4)
    text = text_of(nb)
    pictures = [o for o in outputs(nb, "display_data") if "image/png" in o.data]
    assert len(pictures) == 5  # counts, curves, classes, the weight net, weights over training
    for words in (
        "n_per_class",
        "[380, 227, 136, 81, 49, 29, 17, 10, 6, 3]",
        "epoch   1/1",
        "left",
        "val-selected",
        "best on test",
        "many",
        "medium",
        "few",
        "times; mean weights",
        str(tmp_path / "runs"),
    ):
        assert words in text, words
    assert text.count("trained: ") == 4
    # The same again, without an output path and from another folder: the runs are loaded, and the
    # notebook comes on stdout.
    second = papermill(root, *args, cwd=tmp_path)
    assert second.returncode == 0, second.stderr[-2000:]
    again = text_of(nbformat.reads(second.stdout, 4))
    assert again.count("loaded, it was finished before: ") == 4
    assert "trained: " not in again


BAD = [
    (["roh", "100"], "unknown parameter 'roh' (did you mean 'rho'?)"),
    (["rho", "0.5"], ">= 1"),
    (["rho", "abc"], "rho = 'abc'"),
    (["dataset", "cifar11"], "mnist5k, fashion_mnist, cifar10, cifar10_jpeg, cifar100"),
    (["methods", "kd nope"], "method 'nope' is unknown; there are: teacher, ce, kd, bkd, cckd"),
    (["epochs", "0"], "epochs = 0"),
    (["k", "0"], "k = 0"),
    (["data_dir", "/no/such/folder"], "data_dir='/no/such/folder' does not exist"),
    (["rho", "1000"], "without an image"),
    (["seeds", "one"], "whole numbers"),
    (["epochs", "2.5"], "epochs = 2.5"),
]


@pytest.mark.parametrize("given,message", BAD, ids=[" ".join(g) for g, _ in BAD])
def test_bad_parameters_end_in_one_message_and_leave_nothing(root, tmp_path, given, message):
    args = ["-p", *given, "-p", "runs_dir", tmp_path / "runs"]
    done = papermill(root, *args, out=tmp_path / "out.ipynb")
    assert done.returncode != 0
    nb = nbformat.read(tmp_path / "out.ipynb", 4)
    (error,) = outputs(nb, "error")
    assert error.ename == "ParameterError"
    assert message in error.evalue
    assert "\n" not in error.evalue
    assert error.traceback == [f"ParameterError: {error.evalue}"]  # no frames of ours
    assert message in done.stderr
    # nothing trained, nothing written
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]


def test_a_lost_tag_is_noticed(root, tmp_path):
    """Without its tag, papermill puts the values before the defaults, which win.

    The guard must not let that pass.
    """
    nb = nbformat.read(root / "nbs" / "run_experiment.ipynb", 4)
    for c in nb.cells:
        c.metadata.pop("tags", None)
    nbformat.write(nb, tmp_path / "untagged.ipynb")
    given = ["-p", "rho", "10", "-p", "runs_dir", str(tmp_path / "runs")]
    done = subprocess.run(
        [*CLI, "untagged.ipynb", "out.ipynb", *given],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "tag 'parameters' is lost" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_papermill_infers_every_parameter_with_its_help(root):
    shown = subprocess.run(
        [*CLI, "--help-notebook", str(root / "nbs" / "run_experiment.ipynb")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    from bikd.experiment import Parameters

    for name in Parameters.model_fields:
        assert f"\n  {name}: " in shown.stdout, name
    assert "Unable to parse" not in shown.stdout + shown.stderr
