"""What pip-audit has found, in words; fails for a known vulnerability.

python .ci/audit.py audit.json

pip-audit itself passes where it can ask about no package at all.
"""

import json
import sys
from pathlib import Path


def main(path: str) -> None:
    try:
        packages = json.loads(Path(path).read_text())["dependencies"]
    except ValueError:
        print("not to be had here")
        return
    audited = [p for p in packages if "vulns" in p]
    print(f"{len(audited)} of {len(packages)} packages could be audited")
    bad = [p for p in audited if p["vulns"]]
    for p in bad:
        print(f"{p['name']} {p['version']}: {', '.join(v['id'] for v in p['vulns'])}")
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
