"""A short version of what tests/faults/harness.py does a hundred times; and the record of that."""

import json
import subprocess
import sys


def test_three_kills_leave_no_trace(root):
    done = subprocess.run(
        [
            sys.executable,
            str(root / "tests/faults/harness.py"),
            "--kills",
            "3",
            "--seed",
            "7",
            "--methods",
            "bikd",
            "--kinds",
            "checkpoint",
            "record",
            "memo",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 records are bit-identical" in done.stdout
    assert done.stdout.count('"killed": true') == 3


def test_the_long_run_on_record_lost_nothing(root):
    record = json.loads((root / "tests/faults/kills.json").read_text())
    rows = record["rows"]
    assert record["kills"] == record["identical"] == record["killed"] == len(rows) == 100
    assert all(r["identical"] and r["killed"] for r in rows)
    assert {r["method"] for r in rows} == {"ce", "kd", "bikd", "lfme"}
    assert {r["kind"] for r in rows} == {"step", "checkpoint", "record", "memo", "clock"}
    assert not record["environment"]["git_dirty"]
