# SPDX-License-Identifier: MIT
"""The engine behind every optimizer: states, overrides, checkpoints, one native call per list."""

import copy
import itertools
import operator
import warnings
from collections import abc, defaultdict
from typing import Any

import torch
from torch import Tensor

from ..plain.optimizer import BLOCK
from ..plain.quantize import dequantize_blocks
from ..quant.codes import default_code
from .overrides import GlobalOptimManager

__all__ = ["MockArgs", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

LEGACY_BLOCK = 2048  # BLOCK in checkpoints of bitsandbytes 0.43 and older


class MockArgs:
    """A bag of attributes, filled from a dictionary."""

    def __init__(self, initial_data: dict[str, Any]):
        for key, value in initial_data.items():
            setattr(self, key, value)


def _same_objects(a: list, b: list) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _holds_none(objects: list) -> bool:
    return any(map(operator.is_, objects, itertools.repeat(None)))


class _Bucket:
    """Parameters that advance together: same group, dtype, device, precision and step number.

    The number of the step lives in a tensor beside the parameters, where a captured CUDA graph
    advances it too; the Python integers in ``state[p]["step"]`` are written only when looked at.
    """

    def __init__(self, group: dict, override: dict | None, params: list, states: list):
        self.group = group
        self.override = override
        self.params = params
        self.states = states
        first = states[0]
        self.eight_bit = first["state1"].dtype == torch.uint8
        self.state1 = [state["state1"] for state in states]
        self.state2 = [state["state2"] for state in states] if "state2" in first else []
        self.absmax1 = [state["absmax1"] for state in states] if self.eight_bit else []
        self.absmax2 = [state["absmax2"] for state in states] if "absmax2" in first else []
        self.qmap1 = first.get("qmap1")
        self.qmap2 = first.get("qmap2")
        self.steps = first["step"]
        self.step_tensor = torch.full((), self.steps, dtype=torch.int64, device=params[0].device)
        self.captured = False
        self.pending = False

    def write_steps(self) -> None:
        """Brings ``state["step"]`` of every member up to date."""
        if self.captured:
            # Replays of the graph advanced the tensor without this process counting.
            self.steps = int(self.step_tensor.item())
            self.pending = True
        if self.pending:
            for state in self.states:
                state["step"] = self.steps
            self.pending = False


class Optimizer8bit(torch.optim.Optimizer):
    """Base of all optimizers whose states may be 8-bit codes.

    Args:
        params: Parameters or parameter groups.
        defaults: Values for groups that do not name them.
        optim_bits: 8 or 32: bits per element of the states.
        is_paged: Keep large states in memory that can move to the host.
    """

    # Keys whose tensors keep their dtype when a checkpoint is loaded.
    non_castable_tensor_keys = frozenset(
        {
            "qmap1",
            "qmap2",
            "max1",
            "max2",
            "new_max1",
            "new_max2",
            "state1",
            "state2",
            "gnorm_vec",
            "absmax1",
            "absmax2",
            "unorm_vec",
        }
    )
    _FSDP_WRAPPED_QUANT_STATE_KEY = "__bnb_optimizer_quant_state__"
    always_paged = False  # the Paged... classes: whatever `is_paged` says

    def __init__(self, params, defaults: dict, optim_bits: int = 32, is_paged: bool = False):
        self._buckets: list[_Bucket] | None = None
        self._signature: Any = None
        super().__init__(params, defaults)
        self.initialized = False
        self.is_paged = is_paged or self.always_paged
        self.optim_bits = optim_bits
        self.mng = GlobalOptimManager.get_instance()
        self.name2qmap: dict[str, Tensor] = {}
        if self.is_paged:
            warnings.warn(
                f"{type(self).__name__}: this build has no paged memory; states stay in the "
                "memory of their parameter's device",
                stacklevel=3,
            )

    # ---- State access ---------------------------------------------------------------------------
    #
    # Between steps the optimizer works on lists prepared once (buckets). Whoever looks at `state`
    # gets current step numbers, and may change anything: the lists are then prepared anew.

    @property
    def state(self) -> defaultdict:
        """Per-parameter state, as in every torch optimizer."""
        self._release_buckets()
        return self._state

    @state.setter
    def state(self, value: defaultdict) -> None:
        self._buckets = None
        self._state = value

    def _release_buckets(self) -> None:
        if self._buckets is not None:
            for bucket in self._buckets:
                bucket.write_steps()
            self._buckets = None

    # ---- Configuration --------------------------------------------------------------------------

    def get_config(self, gindex: int, pindex: int, group: dict) -> dict[str, Any]:
        """Returns the settings of one parameter: group, then `args`, then overrides.

        Args:
            gindex: Index of the group.
            pindex: Index of the parameter in the group.
            group: The group.
        """
        override = self.mng.config_of(gindex, pindex, group["params"][pindex])
        return self._merge_config(group, override)

    def _merge_config(self, group: dict, override: dict | None) -> dict[str, Any]:
        config = {
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "lr": group["lr"],
            "alpha": group.get("alpha", 0.0),
            "t_alpha": group.get("t_alpha"),
            "t_beta3": group.get("t_beta3"),
            "optim_bits": self.args.optim_bits,
            "min_8bit_size": self.args.min_8bit_size,
            "max_unorm": self.args.max_unorm,
            "skip_zeros": self.args.skip_zeros,
        }
        if override:
            config.update(override)
        return config

    def check_overrides(self) -> None:
        """Looks up the parameters of modules that asked for settings of their own."""
        self.mng.apply_module_overrides(p for group in self.param_groups for p in group["params"])

    def fill_qmap(self) -> None:
        """Puts the levels of 8-bit states into `name2qmap`."""
        cpu = torch.device("cpu")
        self.name2qmap["dynamic"] = default_code("dynamic", cpu)
        self.name2qmap["udynamic"] = default_code("udynamic", cpu)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters; see :meth:`torch.optim.Optimizer.add_param_group`."""
        if hasattr(self, "_state"):
            self._release_buckets()
        super().add_param_group(param_group)

    # ---- States ---------------------------------------------------------------------------------

    @torch.no_grad()
    def init_state(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Creates the state of one parameter. Subclasses say what it holds."""
        raise NotImplementedError("init_state: implemented by Optimizer1State and Optimizer2State")

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns zeros of p's shape for a state.

        Row-major whatever p's strides: blocks, and with them checkpoints, do not depend on those.
        """
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)

    def to_gpu(self) -> None:
        """Moves states to the devices of their parameters."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self._state.get(p)
                if state:
                    for key, value in state.items():
                        if isinstance(value, Tensor) and value.device != p.device:
                            state[key] = value.to(p.device)

    def prefetch_state(self, p: Tensor) -> None:
        """Brings the paged states of one parameter to its device."""

    # ---- Step -----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step with the gradients at hand.

        Args:
            closure: Recomputes and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for bucket, grads in self._prepared_buckets():
            self._update_bucket(bucket, grads)
        return loss

    def _prepared_buckets(self) -> list[tuple[_Bucket, list[Tensor]]]:
        if self._buckets is not None and self._still_valid():
            ready = [(bucket, [p.grad for p in bucket.params]) for bucket in self._buckets]
            if not any(_holds_none(grads) for _, grads in ready):
                return ready
        self._build_buckets()
        self._signature = (self.mng.version, [list(g["params"]) for g in self.param_groups])
        return [(bucket, [p.grad for p in bucket.params]) for bucket in self._buckets]

    def _still_valid(self) -> bool:
        """Whether the buckets hold the parameters of today's groups, as far as they have grads."""
        version, members = self._signature
        return (
            version == self.mng.version
            and len(members) == len(self.param_groups)
            and all(
                _same_objects(known, group["params"])
                for known, group in zip(members, self.param_groups, strict=True)
            )
            and all(p.grad is None for p in self._without_grad)
        )

    def _build_buckets(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step: states must exist before a CUDA graph is captured, "
                "take one step eagerly first"
            )
        self._release_buckets()
        members: dict[tuple, tuple[list, list]] = {}
        contexts: dict[tuple, tuple[dict, dict | None]] = {}
        self._without_grad = []
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None:
                    self._without_grad.append(p)
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__}.step: gradients must be dense, parameter {pindex} "
                        f"of group {gindex} has a sparse one"
                    )
                state = self._state[p]
                if len(state) == 0:
                    self.init_state(group, p, gindex, pindex)
                self._check_state(state, p, gindex, pindex)
                override = self.mng.config_of(gindex, pindex, p)
                key = (
                    gindex,
                    id(override) if override else None,
                    p.dtype,
                    p.device,
                    state["state1"].dtype,
                    id(state.get("qmap1")),
                    id(state.get("qmap2")),
                    state["step"],
                )
                params, states = members.setdefault(key, ([], []))
                params.append(p)
                states.append(state)
                contexts[key] = (group, override)
        self._buckets = [
            _Bucket(*contexts[key], params, states) for key, (params, states) in members.items()
        ]

    def _check_state(self, state: dict, p: Tensor, gindex: int, pindex: int) -> None:
        state1 = state.get("state1")
        if not isinstance(state1, Tensor) or state1.dtype not in (torch.uint8, torch.float32):
            got = state1.dtype if isinstance(state1, Tensor) else type(state1).__name__
            raise RuntimeError(
                f"{type(self).__name__}.step: the state of parameter {pindex} of group {gindex} "
                f"must hold 'state1' in uint8 or float32, got {got}"
            )

    def _update_bucket(self, bucket: _Bucket, grads: list[Tensor]) -> None:
        config = self._merge_config(bucket.group, bucket.override)
        if config["max_unorm"] > 0.0:
            raise ValueError(
                f"{type(self).__name__}.step: max_unorm must be 0 for this optimizer, "
                f"got {config['max_unorm']}"
            )
        device = bucket.step_tensor.device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        lr, lr_tensor = config["lr"], None
        if isinstance(lr, Tensor):
            if lr.device == device:
                lr, lr_tensor = 0.0, lr.to(torch.float32)
            else:
                lr = float(lr)
        betas = config["betas"]
        hyper = (
            bucket.step_tensor,
            lr_tensor,
            lr,
            betas[0],
            betas[1],
            betas[2] if len(betas) > 2 else 0.0,
            config["alpha"],
            config["eps"],
            config["weight_decay"],
            1.0,
            bool(config["skip_zeros"]),
        )
        lists = (bucket.params, grads, bucket.state1, bucket.state2)
        if bucket.eight_bit:
            torch.ops.bitsandbytes.optimizer_step_8bit_blockwise(
                self.optimizer_name,
                *lists,
                bucket.absmax1,
                bucket.absmax2,
                bucket.qmap1,
                bucket.qmap2,
                *hyper,
            )
        else:
            torch.ops.bitsandbytes.optimizer_step_32bit(self.optimizer_name, *lists, *hyper)
        bucket.step_tensor.add_(1)
        bucket.steps += 1
        bucket.pending = True
        bucket.captured = bucket.captured or capturing

    # The protocol of optimizers that drive single parameters themselves (GaLore and the like).

    @torch.no_grad()
    def update_step(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Takes the step of one parameter whose state exists."""
        state = self.state[p]
        self._check_state(state, p, gindex, pindex)
        override = self.mng.config_of(gindex, pindex, p)
        bucket = _Bucket(group, override, [p], [state])
        self._update_bucket(bucket, [p.grad])
        bucket.write_steps()

    # ---- Checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer, in the format of bitsandbytes 0.49.2 and newer.

        The tensors of the states stand in a dictionary of their own per parameter, under
        ``__bnb_optimizer_quant_state__``.
        """
        state_dict = super().state_dict()
        for key, value in state_dict["state"].items():
            inner = {k: v for k, v in value.items() if k in self.non_castable_tensor_keys}
            if inner:
                outer = {k: v for k, v in value.items() if k not in inner}
                outer[self._FSDP_WRAPPED_QUANT_STATE_KEY] = inner
                state_dict["state"][key] = outer
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Loads what :meth:`state_dict` of this or any older version returned.

        Args:
            state_dict: The checkpoint. It is not changed and shares no memory afterwards.
            move_to_device: Move each state to the device of its parameter.

        Raises:
            ValueError: The checkpoint has other groups than this optimizer, or a state that does
                not fit its parameter. Nothing is changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state_dict = copy.deepcopy(state_dict)
        saved_groups = state_dict["param_groups"]
        if len(self.param_groups) != len(saved_groups):
            raise ValueError(
                f"load_state_dict: the checkpoint must have {len(self.param_groups)} parameter "
                f"groups, got {len(saved_groups)}"
            )
        for i, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if len(group["params"]) != len(saved["params"]):
                raise ValueError(
                    f"load_state_dict: group {i} of the checkpoint must have "
                    f"{len(group['params'])} parameters, got {len(saved['params'])}"
                )
        saved_ids = (i for group in saved_groups for i in group["params"])
        parameters = (p for group in self.param_groups for p in group["params"])
        parameter_of = dict(zip(saved_ids, parameters, strict=True))

        loaded: defaultdict = defaultdict(dict)
        for key, value in state_dict["state"].items():
            parameter = parameter_of.get(key)
            if parameter is None:
                loaded[key] = value
            else:
                loaded[parameter] = self._load_state(key, parameter, value, move_to_device)

        def merge(group: dict, saved: dict) -> dict:
            # Values the checkpoint does not know keep what the constructor set.
            return {**group, **saved, "params": group["params"]}

        groups = [
            merge(group, saved)
            for group, saved in zip(self.param_groups, saved_groups, strict=True)
        ]
        self.__setstate__({"state": loaded, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _load_state(self, key: Any, p: Tensor, value: dict, move_to_device: bool) -> dict:
        value = dict(value)
        value.update(value.pop(self._FSDP_WRAPPED_QUANT_STATE_KEY, {}))
        self._check_loaded_state(key, p, value)
        shared = {}
        for name, entry in value.items():
            if name in self.non_castable_tensor_keys:
                if move_to_device and isinstance(entry, Tensor):
                    entry = entry.to(p.device)
                if name in ("qmap1", "qmap2"):
                    entry = self._shared_qmap(entry)
            elif isinstance(entry, Tensor) and entry.is_floating_point() and p.is_floating_point():
                entry = entry.to(dtype=p.dtype, device=p.device if move_to_device else entry.device)
            elif isinstance(entry, Tensor) and move_to_device:
                entry = entry.to(p.device)
            shared[name] = entry
        return shared

    def _shared_qmap(self, qmap: Tensor) -> Tensor:
        # Equal tables become one object, so that the parameters stay in one native call.
        for name in ("dynamic", "udynamic"):
            known = default_code(name, qmap.device)
            if torch.equal(known, qmap):
                return known
        return qmap

    def _check_loaded_state(self, key: Any, p: Tensor, value: dict) -> None:
        where = f"load_state_dict: the state of parameter {key}"
        if "state1" not in value:
            return  # of an optimizer that keeps something else there; step() looks again
        if not isinstance(value.get("step"), int):
            raise ValueError(f"{where}: step must be an int, got {value.get('step')!r}")
        if ("state2" in value) != (self.states == 2):
            raise ValueError(f"{where}: state2 must {'not ' if self.states == 1 else ''}be there")
        for i in (1, 2):
            state = value.get(f"state{i}")
            if state is None:
                continue
            if not isinstance(state, Tensor) or state.dtype not in (torch.uint8, torch.float32):
                got = state.dtype if isinstance(state, Tensor) else type(state).__name__
                raise ValueError(f"{where}: state{i} must be uint8 or float32, got {got}")
            if state.shape != p.shape:
                raise ValueError(
                    f"{where}: state{i} must have the parameter's shape {tuple(p.shape)}, "
                    f"got {tuple(state.shape)}"
                )
            if i == 2 and state.dtype != value["state1"].dtype:
                raise ValueError(
                    f"{where}: state2 must be {value['state1'].dtype} like state1, "
                    f"got {state.dtype}"
                )
            if state.dtype == torch.uint8:
                self._check_loaded_blocks(where, i, value)

    def _check_loaded_blocks(self, where: str, i: int, value: dict) -> None:
        codes, absmax, qmap = (
            value[f"state{i}"],
            value.get(f"absmax{i}"),
            value.get(f"qmap{i}"),
        )
        if not isinstance(absmax, Tensor) or absmax.dtype != torch.float32:
            got = absmax.dtype if isinstance(absmax, Tensor) else type(absmax).__name__
            raise ValueError(f"{where}: absmax{i} must be a float32 tensor, got {got}")
        if qmap is None or qmap.numel() != 256 or qmap.dtype != torch.float32:
            raise ValueError(f"{where}: qmap{i} must be a float32 table of 256 levels")
        n = codes.numel()
        if absmax.numel() == -(-n // BLOCK):
            return
        if absmax.numel() != -(-n // LEGACY_BLOCK):
            raise ValueError(
                f"{where}: absmax{i} must have {-(-n // BLOCK)} elements (one per {BLOCK}), "
                f"got {absmax.numel()}"
            )
        numbers = dequantize_blocks(codes.reshape(-1), absmax, qmap, LEGACY_BLOCK)
        new, value[f"absmax{i}"] = torch.ops.bitsandbytes.quantize_blockwise(numbers, qmap, BLOCK)
        value[f"state{i}"] = new.view(codes.shape)

    # ---- Copies ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        own = {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("mng", "_buckets", "_signature", "_without_grad", "_state")
            and not key.startswith("_optimizer_")
        }
        return {**own, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._buckets = None
        self._signature = None
        self.mng = GlobalOptimManager.get_instance()
        # torch writes into __dict__, past the property.
        own = {key: value for key, value in state.items() if key != "state"}
        self._state = state["state"]
        super().__setstate__(own)


class _StateOptimizer(Optimizer8bit):
    """What optimizers with one and with two states share: checks, `args`, the state's layout."""

    states = 1

    def __init__(
        self,
        optimizer_name: str,
        params,
        lr,
        betas,
        eps: float,
        weight_decay: float,
        optim_bits: int,
        args,
        min_8bit_size: int,
        percentile_clipping: int,
        block_wise: bool,
        max_unorm: float,
        skip_zeros: bool,
        is_paged: bool,
        extra_defaults: dict | None = None,
    ):
        name = type(self).__name__
        # `not >=` also refuses NaN.
        for argument, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name}: {argument} must be zero or positive, got {value}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"{name}: betas[{i}] must lie in [0, 1), got {beta}")
        if optim_bits not in (8, 32):
            raise ValueError(f"{name}: optim_bits must be 8 or 32, got {optim_bits}")
        if percentile_clipping != 100:
            raise ValueError(
                f"{name}: percentile_clipping must be 100 (off), got {percentile_clipping}"
            )
        if not block_wise:
            raise ValueError(f"{name}: block_wise must be True, got {block_wise}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **(extra_defaults or {})}, optim_bits, is_paged)
        self.optimizer_name = optimizer_name
        self.args = args or MockArgs(
            {
                "optim_bits": optim_bits,
                "min_8bit_size": min_8bit_size,
                "max_unorm": max_unorm,
                "skip_zeros": skip_zeros,
                "percentile_clipping": percentile_clipping,
                "block_wise": block_wise,
            }
        )
        if optim_bits == 8:
            self.fill_qmap()

    @torch.no_grad()
    def init_state(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Creates zero states for `p`: 8-bit codes from `min_8bit_size` elements on.

        Args:
            group: The parameter group.
            p: The parameter.
            gindex: Index of the group.
            pindex: Index of the parameter in the group.
        """
        config = self.get_config(gindex, pindex, group)
        if config["optim_bits"] not in (8, 32):
            raise ValueError(
                f"{type(self).__name__}: optim_bits must be 8 or 32, got {config['optim_bits']}"
            )
        eight_bit = config["optim_bits"] == 8 and p.numel() >= config["min_8bit_size"]
        dtype = torch.uint8 if eight_bit else torch.float32
        state = self._state[p]
        state["step"] = 0
        blocks = -(-p.numel() // BLOCK)
        for i, qmap in zip(range(1, self.states + 1), ("dynamic", "udynamic"), strict=False):
            state[f"state{i}"] = self.get_state_buffer(p, dtype)
            if eight_bit:
                self.name2qmap[qmap] = state[f"qmap{i}"] = default_code(qmap, p.device)
        if eight_bit:
            for i in range(1, self.states + 1):
                state[f"absmax{i}"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)


class Optimizer2State(_StateOptimizer):
    """Base of optimizers that keep two numbers per element, such as Adam.

    Args:
        optimizer_name: Name of the update rule.
        params: Parameters or parameter groups.
        lr: Learning rate.
        betas: Decay rates of the states, or their text such as ``"(0.9, 0.95)"``.
        eps: Added to the denominator.
        weight_decay: Weight decay.
        optim_bits: 8 or 32: bits per element of the states.
        args: Object whose attributes replace the settings below, or None.
        min_8bit_size: Parameters with fewer elements keep 32-bit states.
        percentile_clipping: 100: off.
        block_wise: Scale 8-bit states by blocks.
        max_unorm: Bound on the norm of an update relative to its parameter's; 0: none.
        skip_zeros: Leave elements alone whose gradient is zero.
        is_paged: Keep large states in memory that can move to the host.
        alpha: Weight of the slow average (AdEMAMix).
        t_alpha: Steps until `alpha` is reached.
        t_beta3: Steps until the third beta is reached.
    """

    states = 2

    def __init__(
        self,
        optimizer_name: str,
        params,
        lr: float = 1e-3,
        betas: tuple[float, ...] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
    ):
        if isinstance(betas, str):
            betas = [float(beta) for beta in betas.strip("()[] ").split(",")]
        super().__init__(
            optimizer_name,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            max_unorm,
            skip_zeros,
            is_paged,
            {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3},
        )


class Optimizer1State(_StateOptimizer):
    """Base of optimizers that keep one number per element, such as SGD with momentum.

    The arguments are those of :class:`Optimizer2State` without the last three.
    """

    states = 1

    def __init__(
        self,
        optimizer_name: str,
        params,
        lr: float = 1e-3,
        betas: tuple[float, ...] = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args=None,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
    ):
        if not isinstance(betas, abc.Sequence) or isinstance(betas, str):
            raise TypeError(f"{type(self).__name__}: betas must be a sequence of floats")
        super().__init__(
            optimizer_name,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            percentile_clipping,
            block_wise,
            max_unorm,
            skip_zeros,
            is_paged,
        )
