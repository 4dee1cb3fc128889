# SPDX-License-Identifier: MIT
"""The rules that docs/numerics.md states, for tests that quote them.

A rule reaches from its anchor on the page to the next anchor or heading.
"""

import re
from pathlib import Path

import pytest

__all__ = ["Rules"]

PAGE = Path(__file__).parents[2] / "docs" / "numerics.md"
RULE = re.compile(r'<a id="([^"]*)"></a>(.*?)(?=<a id=|\n##|\Z)', re.DOTALL)


class Rules:
    """Rules of the part of the page between two headings, of which the second is outside."""

    def __init__(self, first: str, end: str):
        if not PAGE.is_file():
            pytest.skip("the documentation is not here", allow_module_level=True)
        text = PAGE.read_text()
        self._part = text[text.index(f"\n## {first}\n") : text.index(f"\n## {end}\n")]
        self._texts = {name: " ".join(rule.split()) for name, rule in RULE.findall(self._part)}
        self._quotes: dict[str, list[str]] = {}
        self.names = sorted(self._texts)

    def __call__(self, name: str, *quotes: str):
        """Marks a test of a rule, which has `quotes` in its text."""
        self._quotes.setdefault(name, []).extend(quotes)
        return lambda test: test

    def assert_tested(self):
        """Every rule has a test, and every test a rule."""
        assert len(RULE.findall(self._part)) == len(self._texts), "two rules have the same name"
        assert self.names == sorted(self._quotes)

    def assert_quoted(self, name: str):
        """The words that the tests of a rule quote are on the page."""
        assert self._quotes.get(name), f"no test quotes {name}"
        for quote in self._quotes[name]:
            assert quote in self._texts[name]

    def assert_marked(self, *tables: str):
        """Every section has rules, and each row of the tables in the sections named is one."""
        sections = [part.partition("\n") for part in re.split(r"\n##+ ", self._part)[1:]]
        assert set(tables) <= {title for title, _, _ in sections}
        for title, _, text in sections:
            assert '<a id="' in text, f"{title}: no rules"
            rows = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
            for row in rows[2:] if title in tables else ():  # below the titles of the columns
                assert row.startswith(' <a id="'), f"{title}: no rule: {row}"
