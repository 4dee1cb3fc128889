# SPDX-License-Identifier: MIT
"""GlobalOptimManager: settings for single parameters that differ from the optimizer's."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GlobalOptimManager"]

Config = dict[str, Any]


class GlobalOptimManager:
    """Overrides optimizer settings for single parameters, across all optimizers of the process.

    Get the one instance with :meth:`get_instance`. Settings that can be overridden: ``lr``,
    ``betas``, ``eps``, ``weight_decay``, ``alpha``, ``t_alpha``, ``t_beta3``, ``max_unorm``,
    ``skip_zeros``, ``percentile_clipping`` and ``rounding_seed``, which count at every step;
    ``optim_bits``, ``min_8bit_size`` and ``block_wise``, which count at a parameter's first.

    Example:
        >>> manager = GlobalOptimManager.get_instance()
        >>> layer = torch.nn.Linear(64, 64)
        >>> manager.override_config(layer.weight, "optim_bits", 32)
        >>> optimizer = bitsandbytes.optim.Adam8bit(layer.parameters())
    """

    _instance: "GlobalOptimManager | None" = None

    def __init__(self):
        raise RuntimeError("GlobalOptimManager: call get_instance() instead")

    @classmethod
    def get_instance(cls) -> "GlobalOptimManager":
        """Returns the instance of this process."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forgets every override and registration."""
        # id(parameter) -> settings. The weak reference tells a parameter from a later one that got
        # the same id.
        self.pid2config: dict[int, Config] = {}
        self._owners: dict[int, weakref.ref[Tensor]] = {}
        # (group, index) -> settings of the parameter registered there, and itself; see config_of.
        self._registered: dict[
            tuple[int, int], tuple[Config | None, weakref.ref[Tensor], torch.Size]
        ] = {}
        self.module_weight_config_triple: list[tuple[Any, str, Config]] = []
        self.uses_config_override = False
        self.version = getattr(self, "version", 0) + 1

    def register_parameters(self, params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> None:
        """Remembers where each parameter stands, before the model moves to its device.

        A move that replaces a parameter by a new tensor would lose its override; the optimizer
        finds it again by its place.

        Args:
            params: Parameters or parameter groups, in the order the optimizer will get them.
        """
        groups = list(params)
        if not groups:
            raise ValueError("register_parameters: params must not be empty")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            members = group["params"]
            for index, parameter in enumerate(
                [members] if isinstance(members, Tensor) else members
            ):
                known = self._config_by_id(parameter)
                self._registered[group_index, index] = (
                    known,
                    weakref.ref(parameter),
                    parameter.shape,
                )
        self.version += 1

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Config | None = None,
    ) -> None:
        """Overrides settings for some parameters.

        Args:
            parameters: One parameter or several.
            key: Name of one setting.
            value: Its value.
            key_value_dict: Several settings instead of `key` and `value`.

        Raises:
            ValueError: Both forms were given.
        """
        if key is not None and value is not None:
            if key_value_dict is not None:
                raise ValueError("override_config: give key and value or key_value_dict, not both")
            key_value_dict = {key: value}
        if key_value_dict is None:
            return
        self.uses_config_override = True
        for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
            known = self._config_by_id(parameter)
            self._set(parameter, {**(known or {}), **key_value_dict})

    def register_module_override(self, module: nn.Module, param_name: str, config: Config) -> None:
        """Overrides settings for the parameter that `module` will hold under `param_name`.

        The parameter is looked up when an optimizer takes its first step, so the module may still
        be moved or have its parameter replaced.
        """
        self.module_weight_config_triple.append((weakref.ref(module), param_name, config))
        self.version += 1

    def apply_module_overrides(self, parameters: Iterable[Tensor]) -> None:
        """Turns the module overrides that concern `parameters` into parameter overrides."""
        if not self.module_weight_config_triple:
            return
        members = {id(parameter) for parameter in parameters}
        alive = []
        for entry in self.module_weight_config_triple:
            reference, name, config = entry
            module = reference()
            if module is None:
                continue
            alive.append(entry)
            parameter = getattr(module, name)
            if id(parameter) in members:
                known = self._config_by_id(parameter)
                self._set(parameter, {**(known or {}), **config})
        self.module_weight_config_triple = alive

    def config_of(self, group_index: int, index: int, parameter: Tensor) -> Config | None:
        """Returns the override of one parameter of an optimizer, or None.

        Args:
            group_index: Its parameter group.
            index: Its place in the group.
            parameter: The parameter itself.
        """
        config = self._config_by_id(parameter)
        if config is not None:
            return config
        registered = self._registered.get((group_index, index))
        if registered is None:
            return None
        settings, reference, shape = registered
        # A registered parameter that still lives is another optimizer's, not this one's past.
        return settings if reference() is None and shape == parameter.shape else None

    def _config_by_id(self, parameter: Tensor) -> Config | None:
        owner = self._owners.get(id(parameter))
        return (
            self.pid2config[id(parameter)] if owner is not None and owner() is parameter else None
        )

    def _set(self, parameter: Tensor, config: Config) -> None:
        key = id(parameter)

        def forget(reference: weakref.ref) -> None:
            if self._owners.get(key) is reference:
                del self._owners[key], self.pid2config[key]

        self.pid2config[key] = config
        self._owners[key] = weakref.ref(parameter, forget)
        for place, (_, reference, shape) in self._registered.items():
            if reference() is parameter:
                self._registered[place] = (config, reference, shape)
        self.version += 1
