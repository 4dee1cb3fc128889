# SPDX-License-Identifier: MIT
"""`python -m bitsandbytes`: shows what is installed, checks it, and exits with 0 if all is well."""

import sys

from .diagnostics.main import main

if __name__ == "__main__":
    sys.exit(main())
