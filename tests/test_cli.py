"""The command `bikd` as a user gives it: in a process of its own, with runs in a fresh folder."""

import os
import signal
import subprocess
import sys
import time

import pytest
from lab import CHROMIUM, browser

from bikd.pages import index_html

MAIN = "import sys; from bikd.cli import main; sys.exit(main())"


def command(*words, **kw):
    "The process of `bikd`, in a group of its own as a terminal makes it."
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kw,
    )


def ended(process, code):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


def experiment(runs_dir, *words):
    return ("run", "-p", "methods", "ce", "-p", "runs_dir", str(runs_dir), *words)


def test_an_experiment_leaves_its_page_and_an_index(tmp_path, root):
    runs = tmp_path / "runs"
    words = experiment(runs, "-p", "epochs", "1", "-p", "rho", "50")
    out, err = ended(command(*words, cwd=root), 0)
    page = runs / "methodsce-epochs1-rho50.ipynb"
    assert out.splitlines()[-2:] == [str(page), str(page.with_suffix(".html"))]
    assert "Traceback" not in err
    assert "data:image/png;base64" in page.with_suffix(".html").read_text()
    assert "1 finished run." in (runs / "index.html").read_text()
    run = next(p for p in runs.glob("ce-*/") if p.is_dir())
    listed, _ = ended(command("runs", "--runs-dir", str(runs), "--method", "ce", cwd=root), 0)
    assert run.name in listed
    before = (run / "SHA256SUMS").read_bytes()
    ended(command(*words, cwd=root), 0)  # loads it
    assert (run / "SHA256SUMS").read_bytes() == before


def test_a_wrong_parameter_is_one_line_and_nothing_is_written(tmp_path, root):
    for words in (("-p", "epohcs", "1"), ("-p", "epochs", "0"), ("-p", "rho", "many")):
        out, err = ended(command(*experiment(tmp_path / "runs", *words), cwd=root), 2)
        assert (out, len(err.splitlines())) == ("", 1), err
    assert list(tmp_path.iterdir()) == []


def test_without_the_notebooks_it_says_where_they_are(tmp_path):
    alone = "import bikd.cli as c; c.__file__ = '/nowhere/bikd/cli.py'; c.main()"
    words = [sys.executable, "-c", alone, *experiment(tmp_path / "runs")]
    p = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert "clone the repository" in p.stderr
    assert len(p.stderr.splitlines()) == 1


def test_ctrl_c_says_how_to_go_on(tmp_path, root):
    runs = tmp_path / "runs"
    words = experiment(runs, "-p", "epochs", "40")
    # started in the background, this process ignores SIGINT, and would hand that down
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = command(*words, cwd=root)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 240
    while not list(runs.glob("*/checkpoint.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
    _, err = ended(process, 130)
    said = err.strip().splitlines()[-1]
    assert said == "bikd: stopped. The same command goes on from the last epoch."
    assert list(runs.glob("*/checkpoint.pt"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_index_is_sorted_by_a_click(tmp_path, root):
    pytest.importorskip("playwright")
    index = tmp_path / "index.html"
    index.write_text(index_html(root / "paper_figures/records/cifar10_jpeg"), encoding="utf-8")
    with browser() as page:
        page.goto(index.as_uri())
        column = page.locator("th", has_text="test %")
        cells = f"td:nth-child({column.evaluate('th => th.cellIndex') + 1})"
        for order in (sorted, lambda v: sorted(v, reverse=True)):
            column.locator("button").click()
            shown = [float(t) for t in page.locator(f"tbody tr {cells}").all_inner_texts()]
            assert len(shown) > 10
            assert shown == order(shown)
