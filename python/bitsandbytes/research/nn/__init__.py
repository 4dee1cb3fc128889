# SPDX-License-Identifier: MIT
"""Layers of `bitsandbytes.research`."""

from . import modules
from .modules import LinearFP8Global, LinearFP8Mixed

__all__ = ["LinearFP8Global", "LinearFP8Mixed", "modules"]
