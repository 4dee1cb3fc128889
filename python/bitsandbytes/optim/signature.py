# SPDX-License-Identifier: MIT
"""Constructors of classes that differ from their base in a few arguments only."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["derived_init"]


def derived_init(
    cls: type, without: Iterable[str], defaults: Mapping[str, Any]
) -> Callable[..., None]:
    """Returns a constructor for `cls` that takes the arguments of its base, with differences.

    Args:
        cls: The class; what it inherits as ``__init__`` is called in the end.
        without: Arguments that the class does not take. They keep the base's default, and later
            ones move up by position.
        defaults: Arguments with another default.

    Raises:
        TypeError: The base has no argument of such a name.
    """
    inherited = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(inherited)
    unknown = {*without, *defaults} - signature.parameters.keys()
    if unknown:
        raise TypeError(f"{cls.__name__}: the base takes no argument {sorted(unknown)}")
    own = signature.replace(
        parameters=[
            parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in signature.parameters.items()
            if name not in without
        ]
    )

    @functools.wraps(inherited)
    def __init__(self, *args, **kwargs):
        try:
            bound = own.bind(self, *args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}: {error}") from None
        inherited(**{**defaults, **bound.arguments})

    __init__.__signature__ = own  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__
