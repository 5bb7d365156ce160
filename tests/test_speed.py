"""What is fast must be equal: the memo to the live teacher, the compiled pass to the plain one.

That holds whatever happens to the memo's file.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from nets import conv_net
from torch import nn

from bikd.bikd import BiKD
from bikd.data import pixel_stats, toy_split
from bikd.memo import CHUNK, Memo
from bikd.models import create_model
from bikd.protocol import Protocol
from bikd.runs import make_config, run
from bikd.training import train
from bikd.views import DeviceImages

# a memo is for one number of threads
pytestmark = pytest.mark.usefixtures("one_thread")


def toy_memo(folder=None, **kw):
    torch.manual_seed(0)
    net, split = create_model("resnet8", 3, 1).eval(), toy_split(60)
    return Memo(net, DeviceImages(split.train, split.views, *pixel_stats(split)), 3, folder, **kw)


def everything(memo):
    rows = torch.arange(len(memo.gallery) * memo.gallery.views.n)
    return memo(rows // memo.gallery.views.n, rows % memo.gallery.views.n)


def test_students_from_a_memo_and_from_a_live_teacher_leave_equal_records(tmp_path):
    "The real thing: mnist5k's nets, run() as papermill calls it. KD fills the memo, BiKD reads it."
    from processes import record

    few = dict(epochs=2)
    teacher = make_config("mnist5k", 100, 0, "teacher", "resnet14", protocol=few)
    kd, bikd = (
        make_config("mnist5k", 100, 0, m, protocol=few, teacher_run=teacher.run_id)
        for m in ("kd", "bikd")
    )
    with_memo, live = tmp_path / "memo", tmp_path / "live"
    for cfg in (teacher, kd, bikd):
        last = run(cfg, with_memo, show=False)
    shutil.copytree(
        with_memo / teacher.run_id, live / teacher.run_id, ignore=shutil.ignore_patterns("memo")
    )
    alone = run(bikd, live, memo_gib=0.0, show=False)
    assert record(with_memo, bikd) == record(live, bikd)
    assert last.summary["teacher_answers_computed"] == CHUNK  # the check of the file, nothing else
    assert alone.summary["teacher_answers_computed"] == 2 * sum(alone.summary["n_per_class"])
    assert not (live / teacher.run_id / "memo").exists()
    assert len(list((with_memo / teacher.run_id / "memo").glob("*.bin"))) == 1


def test_a_process_killed_while_it_fills_the_memo_leaves_no_wrong_answer(tmp_path):
    code = textwrap.dedent(f"""
        import sys
        import torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_speed import toy_memo
        torch.set_num_threads(1)
        memo = toy_memo({str(tmp_path)!r})
        n = memo.gallery.views.n
        print('filling', flush=True)
        while True:
            memo.table.map[:] = 0
            for part in torch.randperm(len(memo.gallery) * n).split(20):
                memo(part // n, part % n)
    """)
    expected = everything(toy_memo())
    for wait in (0.05, 0.11, 0.23):
        p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert p.stdout is not None
        assert p.stdout.readline() == "filling\n"
        time.sleep(wait)
        p.send_signal(signal.SIGKILL)
        p.wait()
        memo = toy_memo(tmp_path)
        assert torch.equal(everything(memo), expected)
        assert memo.table is not None


def test_a_full_disk_costs_the_memo_and_nothing_else(tmp_path, monkeypatch):
    def full(*a):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(UserWarning, match="No space left on device.*asked live"):
        memo = toy_memo(tmp_path)
    assert memo.table is None
    assert torch.equal(everything(memo), everything(toy_memo()))
    assert [p.name for p in tmp_path.iterdir()] in ([], [".memo.lock"])


def test_the_limit_falls_back_to_the_live_teacher(tmp_path):
    with pytest.warns(UserWarning, match="limit is 1e-09 GiB"):
        memo = toy_memo(tmp_path, limit_gib=1e-9)
    assert memo.table is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)
def test_a_compiled_run_is_the_same_student_up_to_rounding():
    def net(width, seed):
        inplace = partial(nn.ReLU, inplace=True)
        return conv_net(width, activation=inplace, pool=False, seed=seed).double()

    def trained(compile):
        student, method = net(6, seed=0), BiKD(k=2)
        protocol = Protocol(epochs=2, batch_size=10, lr=0.02)
        options = dict(teacher=net(8, seed=1), compile=compile, show=False)
        state, _ = train(student, method, toy_split(), protocol, **options)
        parameters = (*student.parameters(), *method.weight_net.parameters())
        return state, torch.cat([p.detach().flatten() for p in parameters])

    (plain, a), (fused, b) = trained(False), trained(True)
    assert plain.push is None
    assert fused.push is not None
    assert (a - b).norm() / a.norm() < 1e-9
