"""Records in one archive: everything that reads runs gets the same from archive and folders."""

import shutil
import zipfile

import pytest

from bikd.archive import ARCHIVE
from bikd.basics import ParameterError, RecordError
from bikd.cli import main, remove_run
from bikd.experiment import project_root
from bikd.pack import SUMMARY, copy_run, pack_runs, record_files, unpack_runs
from bikd.pages import write_index
from bikd.runs import find_run, find_runs, run

SET = "paper_figures/records/threads"


@pytest.fixture
def folder(tmp_path):
    "Three committed runs and their teachers in a folder of their own."
    runs = find_runs(project_root() / SET)
    wanted = {name for r in runs[-3:] for name in (r.config.run_id, *r.config.teachers)}
    for r in runs:
        if r.config.run_id in wanted:
            copy_run(r, tmp_path)
    return tmp_path


def contents(runs):
    return {r.config.run_id: record_files(r) for r in runs}


def test_runs_are_read_alike_from_folders_and_archive(folder):
    loose = find_runs(folder)
    before = contents(loose)
    curves = [r.metrics.to_csv() for r in loose]
    taught = [[t.config.run_id for t in r.teachers] for r in loose]
    pack_runs(folder)
    packed = find_runs(folder)
    assert sorted(p.name for p in folder.iterdir()) == [ARCHIVE, SUMMARY]
    assert contents(packed) == before
    assert [r.metrics.to_csv() for r in packed] == curves
    assert [[t.config.run_id for t in r.teachers] for r in packed] == taught
    assert any(taught)


def test_a_rebuilt_archive_has_the_same_bytes_wherever_and_whenever(folder):
    (archive, table) = pack_runs(folder)
    first = archive.read_bytes(), table.read_bytes()
    unpack_runs(folder)
    for path in folder.rglob("*"):
        path.touch()
    pack_runs(folder)
    assert (archive.read_bytes(), table.read_bytes()) == first


def test_an_interrupted_copy_hides_no_packed_run_and_is_made_again(folder, monkeypatch):
    everything = contents(find_runs(folder))
    pack_runs(folder)

    def interrupted(path, data):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bikd.pack.atomic_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack_runs(folder)
    assert contents(find_runs(folder)) == everything
    unpack_runs(folder)
    assert contents(find_runs(folder)) == everything
    assert not [p for p in folder.iterdir() if p.name[0] == "."]


def test_what_joins_later_is_packed_too(folder):
    everything = contents(find_runs(folder))
    late = folder / find_runs(folder)[-1].folder.name
    shutil.move(late, folder.parent / "late")
    pack_runs(folder)
    shutil.move(folder.parent / "late", folder / late.name)
    assert contents(find_runs(folder)) == everything
    pack_runs(folder)
    assert contents(find_runs(folder)) == everything
    assert not (folder / late.name).exists()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda d: (d / "metrics.csv").write_text("epoch\n"), "metrics.csv"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "notes.txt").write_text("mine"), "notes.txt does not belong"),
        (lambda d: (d / "summary.json").unlink(), "summary.json"),
        (lambda d: (d.parent / "half").mkdir(), "is not a finished run"),
    ],
)
def test_a_record_that_cannot_be_verified_is_refused_and_nothing_is_changed(folder, harm, words):
    harm(folder / find_runs(folder)[0].folder.name)
    before = sorted(folder.rglob("*"))
    with pytest.raises(RecordError, match=words):
        pack_runs(folder)
    assert sorted(folder.rglob("*")) == before


def test_a_damaged_archive_is_named(folder):
    archive, _ = pack_runs(folder)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecordError, match=r"runs\.zip cannot be read as an archive of runs"):
        find_runs(folder)
    spot = whole.index(b'"run_id"') + 12
    archive.write_bytes(whole[:spot] + b"#" + whole[spot + 1 :])
    with pytest.raises(RecordError, match=r"cannot be read|differs|damaged"):
        contents(find_runs(folder))


def test_a_packed_run_is_finished_and_is_not_trained_again(folder):
    r = find_runs(folder)[-1]
    pack_runs(folder)
    again = run(r.config, folder, show=False)
    assert again.folder.name == r.folder.name
    assert isinstance(again.folder, zipfile.Path)
    assert sorted(p.name for p in folder.iterdir() if p.name[0] != ".") == [ARCHIVE, SUMMARY]


def test_a_packed_run_is_removed_only_after_unpacking(folder):
    pack_runs(folder)
    last = find_runs(folder)[-1]
    with pytest.raises(ParameterError, match=r"Unpack it first: bikd unpack"):
        remove_run(find_runs(folder), last)
    unpack_runs(folder)
    remove_run(find_runs(folder), find_runs(folder)[-1])
    assert find_run(folder, last.folder.name) is None


def test_the_table_of_all_runs_links_to_the_archive(folder):
    pack_runs(folder)
    assert f'<a href="{ARCHIVE}">' in write_index(folder).read_text()


def test_pack_and_unpack_from_a_terminal(folder, capsys):
    main(["pack", str(folder)])
    assert capsys.readouterr().out.split() == [str(folder / ARCHIVE), str(folder / SUMMARY)]
    main(["unpack", str(folder)])
    assert "holds folders again" in capsys.readouterr().out
    assert main(["unpack", str(folder)]) == 1
    assert "holds no runs.zip" in capsys.readouterr().err
    assert find_runs(folder)
