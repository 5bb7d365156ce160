"""Runs: killed and resumed, asked for twice at once, logged, refused."""

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from processes import configs, finish, record, start

from bikd import training
from bikd.basics import RecordError
from bikd.graph import provenance
from bikd.measuring import NonFiniteLoss
from bikd.memo import Table
from bikd.methods import CE, METHODS, own_code, register
from bikd.runs import RunConfig, environment, find_run, load_runs, make_config, run, seal


def test_a_killed_run_resumes_to_the_same_record_bit_for_bit(tmp_path):
    teacher, student = configs()
    assert finish(start(tmp_path / "calm", teacher, student)).count("fresh") == 2
    for cfg in (teacher, student):  # kill -9 once after each run's second epoch
        checkpoint = tmp_path / "torn" / cfg.run_id / "checkpoint.pt"
        p = start(tmp_path / "torn", teacher, student)
        lines = iter(p.stdout.readline, "")
        assert any(cfg.method in line and "epoch   2/4" in line for line in lines)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert checkpoint.exists()
        assert find_run(tmp_path / "torn", cfg.run_id) is None
    finish(start(tmp_path / "torn", teacher, student))
    for cfg in (teacher, student):
        assert record(tmp_path / "calm", cfg) == record(tmp_path / "torn", cfg)
    assert set(load_runs(tmp_path / "torn").method) == {"teacher", "bikd"}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    "A teacher's and a student's records, one epoch each, by one process that nothing disturbed."
    folder = tmp_path_factory.mktemp("calm")
    finish(start(folder, *configs(epochs=1)))
    return {cfg.run_id: record(folder, cfg) for cfg in configs(epochs=1)}


def test_four_processes_train_a_teacher_and_a_student_once_and_one_alone_makes_the_same_bytes(
    tmp_path, calm
):
    both = configs(epochs=1)
    four = [start(tmp_path, *both) for _ in range(4)]
    said = [[word for word in finish(p).split() if word in ("fresh", "loaded")] for p in four]
    for i in (0, 1):  # the teacher, the student
        assert sorted(words[i] for words in said) == ["fresh", *["loaded"] * 3]
    assert {cfg.run_id: record(tmp_path, cfg) for cfg in both} == calm


def epochs_in(checkpoint):
    _, _, data = checkpoint.read_bytes().partition(b"\n")
    return len(torch.load(io.BytesIO(data), weights_only=True)["progress"]["history"])


def test_a_lock_whose_owner_was_killed_is_taken_over(tmp_path):
    teacher, _ = configs(epochs=200)
    owner = start(tmp_path, teacher)
    begun = tmp_path / teacher.run_id / "checkpoint.pt"
    while not begun.exists():
        time.sleep(0.05)
        assert owner.poll() is None
    heir = start(tmp_path, teacher)
    assert "another process is training" in heir.stdout.readline()
    owner.kill()
    owner.wait()
    left = epochs_in(begun)
    until = time.time() + 60
    while epochs_in(begun) == left and time.time() < until:
        time.sleep(0.05)
        assert heir.poll() is None
    heir.kill()
    heir.wait()
    assert left < epochs_in(begun) <= left + 2  # it went on from there


@contextmanager
def small_disk(path, size):
    "A file system of that size at `path`, and a function that mounts it anew with other options."
    path.mkdir()

    def mount(options):
        command = ["mount", "-o", options, "-t", "tmpfs", "tmpfs", str(path)]
        return subprocess.run(command, capture_output=True).returncode

    if os.geteuid() or mount(f"size={size}"):
        pytest.skip("a small disk cannot be made: it takes root and mount")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", str(path)])


FULL = "No space left on device. Files finished before are intact. Make room"
READ_ONLY = "Read-only file system. Files finished before are intact. Make it writable"


@pytest.mark.parametrize(
    "size,ills",
    [
        ("16k", [(None, FULL)]),  # not even the first checkpoint fits
        ("700k", [("ro", READ_ONLY), ("rw", FULL)]),  # the teacher fits, but not the student
    ],
)
def test_a_full_or_read_only_disk_is_said_and_costs_nothing_that_was_finished(
    tmp_path, calm, size, ills
):
    both = configs(epochs=1)
    disk = tmp_path / "disk"
    with small_disk(disk, size) as remount:
        for options, words in ills:
            if options:
                assert not remount(options)
            out = finish(start(disk, *both), code=1)
            assert words in out
            assert out.strip().splitlines()[-1].startswith("bikd.basics.StorageError:"), out
            for cfg in both:
                assert find_run(disk, cfg.run_id) is None or record(disk, cfg) == calm[cfg.run_id]
            assert not list(disk.glob("*/.*.tmp"))
        assert not remount("size=50m")
        finish(start(disk, *both))
        assert {cfg.run_id: record(disk, cfg) for cfg in both} == calm


def test_a_folder_that_is_removed_meanwhile_is_said(tmp_path):
    teacher, _ = configs(epochs=200)
    p = start(tmp_path, teacher)
    while not (tmp_path / teacher.run_id / "checkpoint.pt").exists():
        time.sleep(0.05)
        assert p.poll() is None
    shutil.rmtree(tmp_path / teacher.run_id, ignore_errors=True)
    shutil.rmtree(tmp_path / teacher.run_id, ignore_errors=True)
    words = (
        "checkpoint.pt could not be written: No such file or directory. "
        "Files finished before are intact. Its folder was removed during the run"
    )
    assert words in finish(p, code=1).splitlines()[-1]


def test_a_record_of_another_version_is_refused_in_words(tmp_path):
    cfg = make_config("mnist5k", 100, 0, "ce", net="resnet8", protocol=dict(epochs=1))
    folder = tmp_path / run(cfg, tmp_path, show=False).folder.name
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(schema_version=2)))
    seal(folder)
    words = (
        "config.json is not valid for this version: schema_version = 2: Input should be 1"
        ".*read it with the version of bikd that wrote it"
    )
    with pytest.raises(ValueError, match=words):
        load_runs(tmp_path)


def test_a_run_that_is_resumed_elsewhere_names_every_place(tmp_path, monkeypatch, capsys):
    cfg = make_config("mnist5k", 100, 0, "ce", net="resnet8", protocol=dict(epochs=2))
    real = training.save_checkpoint

    def cut_off(*a):
        real(*a)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, tmp_path, show=False)
    monkeypatch.undo()
    here = environment()
    monkeypatch.setattr("bikd.runs.environment", lambda device: here | dict(torch="9.9"))
    r = run(cfg, tmp_path)
    words = f"resumed after epoch 1 where not all is as before (torch: {here['torch']} -> 9.9)"
    assert words in capsys.readouterr().out
    places = [(p["first_epoch"], p["torch"]) for p in r.environment["places"]]
    assert places == [(1, here["torch"]), (2, "9.9")]
    assert provenance([r]).machine[0].endswith("(the last of 2 places)")


def test_tensorboard_scalars_are_those_of_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    teacher, _ = configs(epochs=2)
    r = run(teacher, tmp_path, show=False, tensorboard=True)
    events = EventAccumulator(str(r.folder / "tensorboard")).Reload()
    shown = [round(e.value, 3) for e in events.Scalars("test_acc_pct")]
    assert shown == [round(v, 3) for v in r.metrics.test_acc_pct]
    assert [e.step for e in events.Scalars("train_loss")] == [1, 2]


def test_summary_and_files_keep_the_contract(tmp_path):
    teacher, student = configs(epochs=1)
    run(teacher, tmp_path, show=False)
    r = run(student, tmp_path, show=False)
    files = {
        "config.json",
        "metrics.csv",
        "summary.json",
        "env.json",
        "student.safetensors",
        "weight_net.safetensors",
    }
    assert files <= {p.name for p in r.folder.iterdir()}
    keys = [
        "run_id",
        "dataset",
        "rho",
        "method",
        "seed",
        "preset",
        "n_per_class",
        "split_hash",
        "test_acc_pct_last",
        "test_acc_pct_val_selected",
        "test_acc_pct_best_on_test",
        "per_class_acc_pct",
        "many_acc_pct",
        "medium_acc_pct",
        "few_acc_pct",
        "ece",
        "epochs",
        "train_time_s",
        "device",
    ]
    assert set(keys) <= set(r.summary)
    assert r.folder.name == r.summary["run_id"] == r.config.run_id
    names = [p.name for p in r.folder.iterdir()]
    assert not [n for n in names if n.startswith("checkpoint") or n.endswith(".tmp")]


def test_a_diverging_run_stops_and_leaves_no_summary(tmp_path):
    cfg = make_config("mnist5k", 100, 0, "ce", protocol=dict(epochs=1, batch_size=1000, lr=1e30))
    with pytest.raises(NonFiniteLoss, match="after epoch 0: the val cross-entropy is"):
        run(cfg, tmp_path, show=False)
    assert find_run(tmp_path, cfg.run_id) is None
    assert len(load_runs(tmp_path)) == 0


def test_records_of_an_unknown_method_are_not_called_damaged(tmp_path):
    @register
    class Mine(CE):
        name = "mine"

    cfg = make_config("mnist5k", 100, 0, "mine", protocol=dict(epochs=1))
    assert run(cfg, tmp_path, show=False).fresh
    assert list(load_runs(tmp_path).method) == ["mine"]
    del METHODS["mine"]
    with pytest.raises(ValueError, match="'mine' is unknown.*register or install that first"):
        load_runs(tmp_path)


def test_a_method_whose_code_has_changed_does_not_get_the_old_numbers(tmp_path):
    @register
    class Mine(CE):
        name = "mine"

        def weights(self, losses, step):
            return torch.ones_like(losses)

    cfg = make_config("mnist5k", 100, 0, "mine", net="resnet8", protocol=dict(epochs=1))
    first = run(cfg, tmp_path, show=False)
    assert own_code(CE) == ""
    assert first.summary["method_code"] == own_code(Mine)
    assert not run(cfg, tmp_path, show=False).fresh

    @register
    class Mine(CE):  # type: ignore[no-redef]
        name = "mine"

        def weights(self, losses, step):
            return torch.ones_like(losses) / 10

    with pytest.raises(RecordError, match="the code of method 'mine' was another"):
        run(cfg, tmp_path, show=False)
    del METHODS["mine"]

    class Other(CE):
        name = "other"
        sampler = "class_aware"

    class Another(CE):
        name = "other"
        sampler = "instance"

    class Mixed:
        def weights(self, losses, step):
            return losses

    class WithIt(Mixed, CE):
        name = "other"

    class Without(CE):
        name = "other"

    assert len({own_code(c) for c in (Other, Another, WithIt, Without)}) == 4


MINE = """
from bikd.methods import CE, register


@register
class Mine(CE):
    name = "mine"

    def weights(self, losses, step):
        return {}
"""


def test_the_hash_of_a_methods_code_is_of_the_code_that_runs(tmp_path, monkeypatch):
    "The module is edited after it was imported."
    path = tmp_path / "mymethod.py"
    path.write_text(MINE.format("0 * losses + 1"))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("mymethod")
    code = own_code(module.Mine)
    path.write_text("# a line above\n" + MINE.format("0 * losses + 2"))
    os.utime(path, (1, 1))
    assert code
    assert own_code(module.Mine) == code
    importlib.reload(module)
    assert own_code(module.Mine) != code
    del METHODS["mine"]


def test_a_memo_with_holes_is_filled_before_it_is_mapped(tmp_path):
    def make():
        return Table(tmp_path / "m.bin", dict(a=1), 4000, 10)

    first = make()
    first.write(np.array([3]), torch.ones(1, 10))
    path = first.path
    head = path.read_bytes()[: Table.HEADER]
    path.unlink()
    with open(path, "wb") as f:
        f.write(head)
        f.truncate(first.bytes)  # as a copy by tar -S leaves it
    holes = path.stat().st_blocks * 512 < first.bytes
    again = make()
    assert not again.read(np.arange(9))[1].any()
    if not holes:
        pytest.skip("this file system makes no holes")
    assert path.stat().st_blocks * 512 >= first.bytes


def test_finished_runs_load_from_a_read_only_disk(tmp_path):
    cfg = make_config("mnist5k", 100, 0, "ce", net="resnet8", protocol=dict(epochs=1))
    disk = tmp_path / "disk"
    with small_disk(disk, "10m") as remount:
        first = run(cfg, disk, show=False)
        assert not remount("ro")
        again = run(cfg, disk, show=False)
        assert not again.fresh
        assert again.summary == first.summary


def test_what_a_killed_process_left_is_tidied(tmp_path):
    cfg = make_config("mnist5k", 100, 0, "ce", protocol=dict(epochs=1))
    folder = tmp_path / cfg.run_id
    folder.mkdir()
    (folder / ".checkpoint.pt.1.tmp").write_bytes(b"half")
    run(cfg, tmp_path, show=False)
    (folder / "checkpoint.pt").write_bytes(b"left")
    assert not run(cfg, tmp_path, show=False).fresh
    assert not list(folder.glob(".*.tmp"))
    assert not (folder / "checkpoint.pt").exists()


def test_configs_refuse_what_cannot_be_meant():
    good = make_config("mnist5k", 100, 0, "kd", teacher_run="t")
    for change, message in (
        (dict(rho=0.5), ">= 1"),
        (dict(rho=5000.0), "without an image"),
        (dict(dataset="x"), "unknown"),
        (dict(method="x"), "unknown"),
        (dict(net="x"), "unknown"),
        (dict(settings=dict(temperature=-1.0)), "greater than 0"),
        (dict(settings=dict(tau=1.0)), "tau"),
        (dict(seed=-1), "greater than or equal"),
        (dict(seed=1.5), "integer"),
        (dict(colour="red"), "colour"),
        (dict(teacher_run=None), "needs"),
    ):
        with pytest.raises(ValueError, match=message):
            RunConfig.model_validate_json(json.dumps(good.model_dump(mode="json") | change))
