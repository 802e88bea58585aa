"""The loops of the notebooks: what is defined in their cells tagged `naive`, for other notebooks and for the tests."""

import json
from pathlib import Path
from types import SimpleNamespace


def naive(notebook: str) -> SimpleNamespace:
    """Run the cells tagged `naive` of a notebook, in order and no others; returns the names that they define.

    notebook: its name without .ipynb, such as "06_attention_motion_flow". Raises FileNotFoundError for any other.
    """
    path = Path(__file__).with_name(f"{notebook}.ipynb")
    names: dict = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "naive" in cell["metadata"].get("tags", ()):
            exec(compile("".join(cell["source"]), str(path), "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if not name.startswith("__")})
