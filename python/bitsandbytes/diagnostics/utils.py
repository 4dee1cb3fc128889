# SPDX-License-Identifier: MIT
"""Printing of the report."""

import textwrap

__all__ = ["print_dedented", "print_header"]


def print_header(txt: str, width: int = 60, filler: str = "=") -> None:
    """Prints `txt` in the middle of a line of `filler`; without text, the line alone."""
    print((f" {txt} " if txt else "").center(width, filler))


def print_dedented(text: str) -> None:
    """Prints `text` without its common indentation and without blank lines around it."""
    print(textwrap.dedent(text).strip())
