# SPDX-License-Identifier: MIT
"""The version, as the installed distribution states it."""

from importlib import metadata

__all__ = ["__version__"]

try:
    __version__ = metadata.version("bitsandbytes")
except metadata.PackageNotFoundError:  # running from a source tree
    __version__ = "0+unknown"
