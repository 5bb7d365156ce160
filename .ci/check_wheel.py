"""That an installed bikd works without its extras: import it, then distil on small arrays.

python -I .ci/check_wheel.py
"""

import re
import sys
from importlib.metadata import metadata, version
from importlib.util import find_spec
from pathlib import Path

import bikd

EXTRAS = ("matplotlib", "scipy", "ipywidgets", "anywidget", "fastcore", "nbdev", "papermill")


def check_installation() -> None:
    folder = Path(bikd.__file__).parent
    assert folder.parent.name == "site-packages", folder
    assert bikd.__version__ == version("bikd")
    assert "torch" not in sys.modules, "import bikd alone loads torch"
    assert [name for name in EXTRAS if find_spec(name)] == []
    for name in ("py.typed", "explorer.js", "explorer.css", "pages.js", "pages.css"):
        assert (folder / name).exists(), name


def check_readme() -> None:
    "No link of the page that a package index shows is relative."
    described = metadata("bikd").json["description"]
    links = re.findall(r"\]\(([^)]+)\)", str(described))
    assert len(links) > 10
    assert [link for link in links if not re.match("https?:|#", link)] == []


def check_distill() -> None:
    import numpy as np
    from torch import nn

    def net(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(36 * width, 2)
        )

    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    labels = np.array([0] * 30 + [1] * 10)
    done = bikd.distill(net(6), net(3), images, labels, epochs=2, batch_size=5, k=1, show=False)
    assert len(done.history) == 2
    print(done.history.to_string(index=False))


if __name__ == "__main__":
    check_installation()
    check_readme()
    check_distill()
    print(f"bikd {bikd.__version__} works from {Path(bikd.__file__).parent}")
