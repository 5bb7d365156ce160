"""Small runs in processes of their own, to be killed, starved and compared.

The tests of runs use them.
"""

import json
import subprocess
import sys
from pathlib import Path

from bikd.runs import make_config

TRAIN = """
import sys
import torch
from bikd.runs import RunConfig, run
torch.set_num_threads(1)
for text in sys.argv[2:]:
    done = run(RunConfig.model_validate_json(text), sys.argv[1])
    print('fresh' if done.fresh else 'loaded', flush=True)
"""


def start(runs_dir, *configs):
    "A process that runs them in turn and says of each whether it trained or loaded it."
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(runs_dir), *(c.model_dump_json() for c in configs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    "All it says."
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def configs(epochs=4):
    "A teacher and a student of it."
    protocol = dict(epochs=epochs)
    teacher = make_config("mnist5k", 100, 0, "teacher", net="resnet8", protocol=protocol)
    student = make_config(
        "mnist5k",
        100,
        0,
        "bikd",
        protocol=protocol,
        settings=dict(k=3),
        teacher_run=teacher.run_id,
    )
    return teacher, student


def record(runs_dir, cfg):
    "A run's files, less what names the moment."
    folder = Path(runs_dir) / cfg.run_id
    # files alone: the teacher's memo, a folder, is a cache and no record
    files = [p for p in folder.iterdir() if p.is_file() and p.name != "env.json"]
    out = {p.name: p.read_bytes() for p in files}
    summary = json.loads(out.pop("summary.json"))
    del out["SHA256SUMS"]  # it names the moment too, by env.json and summary.json
    for name in ("train_time_s", "teacher_time_s", "teacher_answers_computed"):
        del summary[name]
    return out | dict(summary=summary)
