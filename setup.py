"""The README for package indexes, where relative links lead nowhere; all else: pyproject.toml."""

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
RELATIVE = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)[^)]+")
IMAGES = (".png", ".svg", ".jpg")


def absolute_links(
    text: str,  # Markdown
    repository: str,  # its address, as settings.ini's git_url
    branch: str,
) -> str:
    "The text with relative links led to the repository: pages to show, images as they are."

    def absolute(link: re.Match) -> str:
        path = link[0]
        return f"{repository}/{'raw' if path.endswith(IMAGES) else 'blob'}/{branch}/{path}"

    return RELATIVE.sub(absolute, text)


if __name__ == "__main__":
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    setup(
        long_description=absolute_links(
            (ROOT / "README.md").read_text(encoding="utf-8"),
            settings["DEFAULT"]["git_url"],
            settings["DEFAULT"]["branch"],
        ),
        long_description_content_type="text/markdown",
    )
