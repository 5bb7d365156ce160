"""That an executed run_experiment.ipynb has loaded its four runs and trained none.

python .ci/check_loaded.py out.ipynb
"""

import sys

import nbformat


def main(path: str) -> None:
    cells = nbformat.read(path, 4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    loaded = text.count("loaded, it was finished before")
    if loaded != 4:
        sys.exit(f"{loaded} runs were loaded, 4 were expected:\n{text}")


if __name__ == "__main__":
    main(sys.argv[1])
