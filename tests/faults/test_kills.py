"""A short version of what tests/faults/harness.py does a hundred times; and the record of that."""
import json, subprocess, sys


def test_three_kills_leave_no_trace(root):
    done = subprocess.run([sys.executable, str(root/'tests/faults/harness.py'), '--kills', '3', '--seed', '7', '--methods', 'bikd', '--kinds', 'checkpoint', 'record', 'memo'], capture_output=True, text=True)
    assert done.returncode == 0 and '3 of 3 records are bit-identical' in done.stdout, done.stdout + done.stderr
    assert done.stdout.count('"killed": true') == 3
