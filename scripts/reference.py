# SPDX-License-Identifier: MIT
"""Writes docs/reference.md: every public name with the first sentence of its docstring.

With ``--check`` it writes nothing, and exits with 1 where the page is another.
"""

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
MODULES = (
    "bitsandbytes",
    "bitsandbytes.functional",
    "bitsandbytes.nn",
    "bitsandbytes.nn.parametrize",
    "bitsandbytes.optim",
    "bitsandbytes.research",
    "bitsandbytes.research.nn",
    "bitsandbytes.utils",
)
HEAD = """\
# Reference

Every public name and what it is for. Shapes, dtypes, errors and examples: `help(name)` in Python.
Constants are left out. Written by `python scripts/reference.py`.
"""
OPS = """
## Ops

`torch.ops.bitsandbytes.*`: what the functions above call, and what other programs may. Each has a
schema, a shape rule for tracing, an implementation in plain PyTorch for any device, and those of
[native libraries](architecture.md). Names that begin with an underscore are not for others.
"""


def summary(value: object) -> str:
    """Returns the first sentence of a docstring as one line of a table."""
    text = inspect.getdoc(value) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?:])\s", paragraph)[0]
    sentence = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", sentence).replace("``", "`")
    return sentence.rstrip(":").replace("|", "\\|")


def is_ours(name: str, value: object) -> bool:
    """Whether a public name stands for a class or function of this package."""
    documented = inspect.isclass(value) or inspect.isfunction(value)
    return documented and not name.startswith("_") and value.__module__.startswith("bitsandbytes")


def page() -> str:
    """Returns the whole page."""
    parts = [HEAD.rstrip()]
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"\n## {name}\n\n| name | |\n|---|---|")
        for attribute in sorted(module.__all__, key=str.lower):
            value = getattr(module, attribute)
            if is_ours(attribute, value):
                parts.append(f"| `{attribute}` | {summary(value)} |")
    from bitsandbytes._ops import SCHEMAS

    parts.append(OPS)
    parts.append("```text")
    parts += sorted(schema for schema in SCHEMAS if not schema.startswith("_"))
    parts.append("```")
    return "\n".join(parts) + "\n"


def main() -> int:
    """Returns what the program exits with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
