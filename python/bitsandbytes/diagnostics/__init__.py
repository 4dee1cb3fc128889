# SPDX-License-Identifier: MIT
"""What `python -m bitsandbytes` shows and checks. Nothing here runs or prints at import."""

__all__: list[str] = []
