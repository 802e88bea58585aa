"""The benchmark programs, each with what it measures; each has --help.

python -m benchmarks
"""

import ast
from pathlib import Path

from wan_mini.runs.cli import Parser


def programs() -> dict[str, str]:
    """Every program of these folders by its module's name, and the first line of what it says of itself."""
    folder = Path(__file__).parent
    files = sorted(folder.glob("*.py")) + sorted(folder.glob("*/__main__.py")) + sorted(folder.glob("studies/*.py"))
    lines = {}
    for file in files:
        source = file.read_text(encoding="utf-8")
        if file == Path(__file__) or '__name__ == "__main__"' not in source:
            continue
        path = file.parent if file.name == "__main__.py" else file.with_suffix("")
        name = ".".join(path.relative_to(folder.parent).parts)
        docstring = ast.get_docstring(ast.parse(source)) or ""
        lines[name] = docstring.partition("\n")[0]
    return lines


def main(argv: list[str] | None = None) -> None:
    """Print the list."""
    parser = Parser(prog="python -m benchmarks", description="List the benchmark programs.")
    parser.parse_args(argv)
    for name, line in programs().items():
        print(f"python -m {name}\n    {line}")


if __name__ == "__main__":
    main()
