# SPDX-License-Identifier: MIT
"""Old import path of the SwitchBack layers."""

from .switchback import (
    StandardLinear,
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
)

__all__ = [
    "StandardLinear",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
]
