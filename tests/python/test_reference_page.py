# SPDX-License-Identifier: MIT
"""docs/reference.md names what there is."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "reference.py"


def test_the_page_is_what_its_script_writes():
    """If it is not: `python scripts/reference.py`."""
    subprocess.run([sys.executable, SCRIPT, "--check"], check=True)
