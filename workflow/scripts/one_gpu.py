"""Run a command with a GPU of its own.

    python workflow/scripts/one_gpu.py --gpus 1 --locks runs -- papermill ...

Snakemake counts GPUs on one machine but does not say which one a job may use. This takes the first
that nobody holds (a lock file each, freed by the system when the holder dies) and tells the command
by CUDA_VISIBLE_DEVICES. Where a scheduler has chosen already, and for jobs without a GPU, it only
runs the command.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    "The GPUs of this machine, as CUDA_VISIBLE_DEVICES calls them."
    if "BIKD_GPUS" in os.environ:
        return os.environ["BIKD_GPUS"].split(",")
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=1)
    parser.add_argument(
        "--locks",
        type=Path,
        default=Path("."),
        help="folder of the lock files, the same for all jobs of a machine",
    )
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    if not args.gpus or VISIBLE in os.environ:
        return subprocess.call(args.command)
    gpus = visible()
    if not gpus:
        sys.exit(
            "this job needs a GPU, and PyTorch finds none; "
            "set `device: cpu` in the file of experiments."
        )
    args.locks.mkdir(parents=True, exist_ok=True)
    while True:
        for gpu in gpus:
            lock = FileLock(args.locks / f".{os.uname().nodename}-gpu{gpu}.lock", timeout=0)
            with suppress(Timeout), lock:
                return subprocess.call(args.command, env=os.environ | {VISIBLE: gpu})
        time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
