"""Kill a training at a chosen moment, start it again, and compare its record bit for bit.

    python tests/faults/harness.py --kills 100 --out tests/faults/kills.json

It is compared with the record of an undisturbed training. The moments are counted, not guessed: an
undisturbed run lists every event of some kinds (a step of the optimizer, each fsync and rename of
checkpoint and record, each write into the memo), and a disturbed one kills itself with SIGKILL at
one of them. Before an fsync half of the file may be cut off first, as if it had not been written
yet. Kind 'clock' kills from outside, at a random time. Each run is a process of its own, forked
from one that has imported everything and computed nothing.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from bikd import memo
from bikd.experiment import Parameters, make_plan
from bikd.runs import Run, environment, run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from processes import record

METHODS = ("ce", "kd", "bikd", "lfme")
KINDS = ("step", "checkpoint", "record", "memo", "clock")
EPOCHS = 2


def plan(runs_dir, methods):
    "Configs, teachers and experts first: mnist5k, ρ = 100, two epochs, resnet8 for all."
    return make_plan(
        Parameters(
            methods=" ".join(methods), epochs=EPOCHS, teacher="resnet8", runs_dir=str(runs_dir)
        )
    ).configs


def watch(at):
    """From now on call `at(kind, path)` before and after each event of this process.

    The path is that of a file whose fsync is next.
    """

    def around(
        owner,
        name,
        look,  # look(*arguments): the event's kind, and the path; None: no event
    ):
        was = getattr(owner, name)

        def f(*a, **kw):
            kind, path = look(*a)
            if kind:
                at(kind, path)
            out = was(*a, **kw)
            if kind:
                at(kind, None)
            return out

        setattr(owner, name, f)

    def kind_of(path):
        return "checkpoint" if "checkpoint" in Path(path).name else "record"

    def synced(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        return (None, None) if os.path.isdir(path) else (kind_of(path), path)

    around(torch.optim.SGD, "step", lambda *a: ("step", None))
    around(memo.Table, "write", lambda *a: ("memo", None))
    around(os, "replace", lambda a, b: (kind_of(b), None))
    around(os, "fsync", lambda f: synced(f if isinstance(f, int) else f.fileno()))


def child(work):
    "Run `work` in a forked process; its pid."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            work()
        code = 0
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def finish(pid):
    "Wait; the exit code, negative for a signal."
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def whole(folder):
    "Whatever carries its final name is whole: checked as a reader would, right after the kill."
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        head, _, data = checkpoint.read_bytes().partition(b"\n")
        assert hashlib.sha256(data).hexdigest().encode() == head.split()[-1], checkpoint
    if (folder / "summary.json").exists():
        r = Run(folder)
        for part in (
            "config",
            "summary",
            "metrics",
            "class_weights",
            "samples",
            "trace",
            "confusion",
            "calibration",
        ):
            getattr(r, part)
        r.student()


class Calm:
    "Undisturbed runs of all methods, with the events of the students among them."

    def __init__(self, home, methods):
        self.home = home
        self.configs = {c.method: c for c in plan(home, methods)}
        self.events, self.records, self.seconds = {}, {}, {}
        for method in self.configs:
            self.watch_one(method)

    def watch_one(self, method):
        "The undisturbed run of a method: its events, its record and how long it took."
        cfg = self.configs[method]
        log = self.home / f"{method}.events"
        for t in cfg.teachers:
            # each fills its own, as its disturbed twin will
            shutil.rmtree(self.home / t / "memo", ignore_errors=True)

        def work():
            seen = []
            watch(lambda kind, path: seen.append(kind))
            run(cfg, self.home, show=False)
            log.write_text(json.dumps(seen))

        began = time.time()
        assert finish(child(work)) == 0, method
        self.seconds[method] = time.time() - began
        self.events[method] = json.loads(log.read_text())
        self.records[method] = record(self.home, cfg)

    def disturbed(self, method, kind, draw: random.Random) -> dict:
        "One kill and one new start; what happened."
        cfg = self.configs[method]
        with tempfile.TemporaryDirectory(dir=self.home.parent) as d:
            d = Path(d)
            for t in cfg.teachers:
                shutil.copytree(self.home / t, d / t, ignore=shutil.ignore_patterns("memo"))
            places = [i for i, k in enumerate(self.events[method]) if k == kind]
            target = draw.choice(places) if places else None
            cut = draw.random() < 0.5

            def work():
                count = [0]

                def at(_, path):
                    if count[0] == target:
                        if path and cut:
                            os.truncate(path, os.path.getsize(path) // 2)
                        os.kill(os.getpid(), signal.SIGKILL)
                    count[0] += 1

                if target is not None:
                    watch(at)
                run(cfg, d, show=False)

            pid = child(work)
            if target is None:  # by the clock
                time.sleep(draw.uniform(0.02, 1) * self.seconds[method])
                os.kill(pid, signal.SIGKILL)
            code = finish(pid)
            folder = d / cfg.run_id
            left = []
            if folder.exists():
                left = sorted(p.name for p in folder.iterdir() if p.is_file())
                whole(folder)
            again = finish(child(lambda: run(cfg, d, show=False)))
            same = again == 0 and record(d, cfg) == self.records[method]
            litter = [p for p in folder.iterdir() if p.name.startswith(("checkpoint", "."))]
            return dict(
                method=method,
                kind=kind if target is not None else "clock",
                event=target,
                of=len(self.events[method]),
                killed=code == -signal.SIGKILL,
                finished="summary.json" in left,
                resumed="checkpoint.pt" in left,
                identical=same and not litter,
            )


def kills(
    n: int, home, seed: int = 0, methods=METHODS, kinds=KINDS, say=lambda row: None
) -> list[dict]:
    "n kills, methods and kinds in turn."
    home = Path(home)
    home.mkdir(parents=True, exist_ok=True)
    calm, draw = Calm(home, methods), random.Random(seed)
    rows: list[dict] = []
    # CE asks no teacher, so it writes no memo
    pairs = [(m, k) for k in kinds for m in methods if (m, k) != ("ce", "memo")]
    while len(rows) < n:
        row = calm.disturbed(*pairs[len(rows) % len(pairs)], draw)
        if row["killed"] or not row["identical"]:
            rows.append(row)
            say(row)
        # else the clock came too late, and the next is drawn
    return rows


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as d:
        rows = kills(
            a.kills,
            Path(d) / "calm",
            a.seed,
            a.methods,
            a.kinds,
            say=lambda r: print(json.dumps(r), flush=True),
        )
    good, killed = sum(r["identical"] for r in rows), sum(r["killed"] for r in rows)
    print(
        f"{good} of {len(rows)} records are bit-identical to the undisturbed; "
        f"{killed} runs were killed before their end"
    )
    if a.out:
        a.out.write_text(
            json.dumps(
                dict(
                    identical=good,
                    kills=len(rows),
                    killed=killed,
                    seed=a.seed,
                    environment=environment(),
                    rows=rows,
                ),
                indent=1,
            )
        )
    sys.exit(good != len(rows))
