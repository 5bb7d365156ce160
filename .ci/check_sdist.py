"""That an sdist holds every file of the repository, so that its tests can be run.

python .ci/check_sdist.py dist/bikd-0.2.0.tar.gz
"""

import subprocess
import sys
import tarfile

FOR_GIT = (".git", ".pre-commit-config.yaml")  # files that only a clone needs begin like these


def main(path: str) -> None:
    with tarfile.open(path) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    listed = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, check=True
    ).stdout
    tracked = {name for name in listed.split("\0") if name and not name.startswith(FOR_GIT)}
    lacking = sorted(tracked - packed)
    if lacking:
        sys.exit(f"MANIFEST.in leaves out {len(lacking)} files: {', '.join(lacking[:20])}")
    print(f"{path} holds all {len(tracked)} files")


if __name__ == "__main__":
    main(sys.argv[1])
