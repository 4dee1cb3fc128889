# SPDX-License-Identifier: MIT
"""The engine behind every optimizer: settings, paging, steps, checkpoints."""

import functools
from collections import abc, defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import paged
from .._checks import warn_user
from ..quant.codes import default_code
from . import sharding
from .buckets import Bucket
from .checkpoint import QUANT_STATE_KEYS, WRAPPER, StateReader, nested, read_state_dict
from .lists import all_are, holds_none
from .overrides import GlobalOptimManager
from .signature import derived_init

if TYPE_CHECKING:
    from .compiled import Layout

__all__ = ["Optimizer8bit"]

PAGED_SIZE = 100_000  # elements from which on states of paged optimizers lie in paged memory
# Bytes of states that are prefetched before one native call. Where all states do not fit the
# device, those of the next call displace those of the last.
PAGED_RUN = 2**30


class Optimizer8bit(torch.optim.Optimizer):
    """Base of all optimizers whose states may be 8-bit codes.

    A subclass says where it differs from its base: `state_bits` and `always_paged` overrule
    arguments; the class arguments `without` and `defaults` take arguments away and change defaults.

        class PagedLion8bit(Lion, without=("optim_bits", "is_paged")):
            state_bits = 8
            always_paged = True

    Args:
        params: Parameters or parameter groups.
        defaults: Values for groups that do not name them.
        optim_bits: 8 or 32: bits per element of the states.
        is_paged: Keep large states in memory that can move to the host.
    """

    # Keys whose tensors keep their dtype when a checkpoint is loaded.
    non_castable_tensor_keys = QUANT_STATE_KEYS
    _FSDP_WRAPPED_QUANT_STATE_KEY = WRAPPER
    state_bits: int | None = None  # None: as `optim_bits` says
    always_paged = False  # the Paged... classes: whatever `is_paged` says
    _warned_of_plain_memory = False
    # Rows of each state tensor: two if it holds two numbers per element.
    state_rows: tuple[int, ...] = ()

    def __init_subclass__(
        cls,
        *,
        without: abc.Sequence[str] = (),
        defaults: abc.Mapping[str, Any] | None = None,
        **kwargs,
    ):
        super().__init_subclass__(**kwargs)
        if without or defaults:
            cls.__init__ = derived_init(cls, without, defaults or {})  # type: ignore[method-assign]

    def __init__(self, params, defaults: dict, optim_bits: int = 32, is_paged: bool = False):
        self._forget_buckets()
        super().__init__(params, defaults)
        self._state_was_seen = False  # torch has set it, and keeps nothing of it
        self.initialized = False
        self.is_paged = is_paged or self.always_paged
        self.optim_bits = optim_bits
        self.mng = GlobalOptimManager.get_instance()
        self.name2qmap: dict[str, Tensor] = {}

    @property
    def page_mng(self) -> paged.GlobalPageManager:
        """The paged tensors of this process."""
        return paged.GlobalPageManager.get_instance()

    # ---- State access ---------------------------------------------------------------------------
    #
    # Between steps the optimizer works on lists prepared once (buckets). Whoever looks at `state`
    # gets current step numbers, and may change anything: the lists are then prepared anew. Who has
    # looked once may keep tensors, and later give them other memory: from then on every step looks
    # where the states lie.

    @property
    def state(self) -> defaultdict:
        """Per-parameter state, as in every torch optimizer."""
        self._release_buckets()
        self._state_was_seen = True
        return self._state

    @state.setter
    def state(self, value: defaultdict) -> None:
        self._forget_buckets()
        self._state_was_seen = True
        self._state = value

    def _forget_buckets(self) -> None:
        self._buckets: list[Bucket] | None = None
        # What compiled steps read, once there was one. It follows `_buckets`.
        self._layout: Layout | None = None
        # Buckets that replays of a CUDA graph go on using after someone looked at `state`.
        self._captured_buckets: list[Bucket] = []
        self._signature: Any = None
        self._without_grad: list[Tensor] = []

    def _release_buckets(self) -> None:
        if self._layout is not None:
            self._layout.write_steps(self._state)
        if self._buckets is not None:
            self._captured_buckets = [b for b in self._buckets if b.captured]
            for bucket in self._buckets:
                bucket.write_steps()
            self._buckets = None
        else:
            for bucket in self._captured_buckets:
                bucket.write_steps()

    # ---- Settings -------------------------------------------------------------------------------

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
        args = self.args
        config = {
            "betas": group["betas"],
            "eps": group["eps"],
            "weight_decay": group["weight_decay"],
            "lr": group["lr"],
            "alpha": group.get("alpha", 0.0),
            "t_alpha": group.get("t_alpha"),
            "t_beta3": group.get("t_beta3"),
            "rounding_seed": group.get("rounding_seed"),
            "optim_bits": args.optim_bits,
            "min_8bit_size": args.min_8bit_size,
            "max_unorm": args.max_unorm,
            "skip_zeros": args.skip_zeros,
            # `args` of programs for 0.50 and newer have neither.
            "percentile_clipping": getattr(args, "percentile_clipping", 100),
            "block_wise": getattr(args, "block_wise", True),
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

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32, rows: int = 1):
        """Returns zeros for a state: of p's shape, or of `rows` times that.

        Row-major whatever p's strides: blocks, and with them checkpoints, do not depend on those.
        """
        shape = p.shape if rows == 1 else (rows, *p.shape)
        if self._pages_state_of(p):
            return paged.get_paged(*shape, dtype=dtype, device=p.device)
        return torch.zeros(shape, dtype=dtype, device=p.device)

    def _pages_state_of(self, p: Tensor) -> bool:
        """Whether states of this parameter belong in paged memory; warns once if there is none."""
        reason = paged.unavailable(p.device) if self.is_paged else None
        if reason is not None and not self._warned_of_plain_memory:
            self._warned_of_plain_memory = True
            warn_user(
                f"{type(self).__name__}: states on {p.device} lie in plain memory, there is no "
                f"paged memory: {reason}"
            )
        return self.is_paged and reason is None and p.numel() >= PAGED_SIZE

    def _own_buffer(self, p: Tensor, entry: Tensor) -> Tensor:
        """Copies a state of a parameter into a buffer like those that this optimizer makes."""
        rows = () if entry.dim() == p.dim() else (entry.shape[0],)
        return self.get_state_buffer(p, entry.dtype, *rows).copy_(entry)

    def _page_states(self) -> None:
        """Moves states that came into ordinary memory by copying or unpickling."""
        for p in (p for group in self.param_groups for p in group["params"]):
            part, state = sharding.local(p), self._state.get(p, {})
            for key in ("state1", "state2"):
                entry = sharding.local(state.get(key))
                if isinstance(entry, Tensor) and entry.device == part.device:
                    if self._pages_state_of(part) and not paged.is_paged(entry):
                        new = {key: self._own_buffer(part, entry)}
                        state.update(sharding.attached(p, new, self.state_rows))

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
        if self.is_paged:
            state = self._state.get(p, {})
            entries = [sharding.local(state[k]) for k in ("state1", "state2") if k in state]
            paged.prefetch_pages(paged.pages_of(entries), p.device)

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
        if torch.compiler.is_compiling():
            from . import compiled

            compiled.step(self)
            return loss
        self._initialize()
        ready = [
            (bucket, self._merge_config(bucket.group, bucket.override), grads)
            for bucket, grads in self._prepared_buckets()
        ]
        for bucket, config, _ in ready:
            if bucket.flattened:
                sharding.refuse_bounds(config)
        for bucket, config, grads in ready:
            if self.is_paged:
                bucket.prefetch()
            bucket.step(self.optimizer_name, config, grads)
        return loss

    def _initialize(self) -> None:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True

    @torch.no_grad()
    def _lay_out(self, places: abc.Iterable[tuple[int, int]]) -> None:
        """Creates what a compiled step of the parameters at `places` needs, while it is traced.

        The compiled code does not contain this call (see compiled.py).
        """
        from .compiled import Layout

        self._initialize()
        self._build_buckets(set(places))
        for bucket in self._buckets:
            if bucket.flattened:
                sharding.refuse_bounds(self._merge_config(bucket.group, bucket.override))
        self._layout = Layout(self)

    def _prepared_buckets(self) -> list[tuple[Bucket, list[Tensor]]]:
        if self._buckets is not None and self._still_valid():
            ready = [(bucket, bucket.gradients()) for bucket in self._buckets]
            if not any(holds_none(grads) for _, grads in ready):
                return ready
        self._build_buckets()
        return [(bucket, bucket.gradients()) for bucket in self._buckets]

    def _still_valid(self) -> bool:
        """Whether the buckets hold the parameters of today's groups, as far as they have grads."""
        version, members = self._signature
        return (
            version == self.mng.version
            and len(members) == len(self.param_groups)
            and all(
                known_group is group and all_are(known, group["params"])
                for (known_group, known), group in zip(members, self.param_groups, strict=True)
            )
            and all(p.grad is None for p in self._without_grad)
        )

    def _build_buckets(self, chosen: abc.Container[tuple[int, int]] | None = None) -> None:
        """Sorts parameters into buckets: those at `chosen`, or if None those with gradients."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}.step: states must exist before a CUDA graph is captured, "
                "take one step eagerly first"
            )
        self._release_buckets()
        members: dict[tuple, tuple[list, list, list]] = {}
        contexts: dict[tuple, tuple[dict, dict | None]] = {}
        self._without_grad = []
        paged_bytes = 0
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                if p.grad is None if chosen is None else (gindex, pindex) not in chosen:
                    self._without_grad.append(p)
                    continue
                self._check_gradient(p, gindex, pindex)
                state = self._state[p]
                if len(state) == 0:
                    self.init_state(group, p, gindex, pindex)
                elif WRAPPER in state:
                    # As checkpoints hold it: ZeroRedundancyOptimizer puts it here itself.
                    config = functools.partial(self.get_config, gindex, pindex, group)
                    state = self._state_reader()(pindex, p, state, config)
                    self._state[p] = state
                self._check_state(state, gindex, pindex)
                override = self.mng.config_of(gindex, pindex, p)
                if self.is_paged:
                    # The same on every process, so that all exchange norms of the same lists.
                    held = (state[k] for k in ("state1", "state2") if k in state)
                    paged_bytes += sum(map(sharding.part_bytes, held))
                key = (
                    paged_bytes // PAGED_RUN,
                    gindex,
                    _by_content(override),
                    p.dtype,
                    p.device,
                    state["state1"].dtype,
                    "absmax1" in state,
                    id(state.get("qmap1")),
                    id(state.get("qmap2")),
                    state["step"],
                    sharding.split_of(p),
                )
                places, params, states = members.setdefault(key, ([], [], []))
                places.append((gindex, pindex))
                params.append(p)
                states.append(state)
                contexts.setdefault(key, (group, override))
        captured, self._captured_buckets = self._captured_buckets, []
        self._buckets = []
        for key, lists in members.items():
            new = Bucket(*contexts[key], *lists)
            self._buckets.append(next((b for b in captured if b.serves(new)), new))
            self._buckets[-1].watch(self._state_was_seen)
        self._signature = (self.mng.version, [(g, list(g["params"])) for g in self.param_groups])
        if self._layout is not None:
            self._layout = type(self._layout)(self)

    def _check_gradient(self, p: Tensor, gindex: int, pindex: int) -> None:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(
                f"{type(self).__name__}.step: gradients must be dense, parameter {pindex} "
                f"of group {gindex} has a sparse one"
            )

    def _check_state(self, state: dict, gindex: int, pindex: int) -> None:
        state1 = state.get("state1")
        if not isinstance(state1, Tensor) or state1.dtype not in (torch.uint8, torch.float32):
            got = state1.dtype if isinstance(state1, Tensor) else type(state1).__name__
            raise RuntimeError(
                f"{type(self).__name__}.step: the state of parameter {pindex} of group {gindex} "
                f"must hold 'state1' in uint8 or float32, got {got}"
            )

    # The protocol of optimizers that drive single parameters themselves (GaLore and the like).

    @torch.no_grad()
    def update_step(self, group: dict, p: Tensor, gindex: int, pindex: int) -> None:
        """Takes the step of one parameter whose state exists."""
        state = self.state[p]
        self._check_gradient(p, gindex, pindex)
        self._check_state(state, gindex, pindex)
        override = self.mng.config_of(gindex, pindex, p)
        bucket = Bucket(group, override, [(gindex, pindex)], [p], [state])
        config = self._merge_config(group, override)
        if bucket.flattened:
            sharding.refuse_bounds(config)
        bucket.step(self.optimizer_name, config, [p.grad])
        bucket.write_steps()

    # ---- Checkpoints ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the optimizer, in the format of bitsandbytes 0.49.2 and newer.

        The tensors of the states stand in a dictionary of their own per parameter, under
        ``__bnb_optimizer_quant_state__``; with distributed parameters they stand beside ``step``,
        in the layout that :mod:`bitsandbytes.optim.sharding` describes.
        """
        state_dict = super().state_dict()
        states = state_dict["state"]
        parameters = [p for group in self.param_groups for p in group["params"]]
        if sharding.is_distributed(parameters):
            written = {
                i: sharding.portable(p, states[i], self.state_rows)
                for i, p in enumerate(parameters)
                if i in states
            }
        else:
            written = {k: nested(v, self.non_castable_tensor_keys) for k, v in states.items()}
        state_dict["state"] = {**states, **written}
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
        read = self._state_reader(move_to_device)
        states, groups = read_state_dict(state_dict, self.param_groups, read, self.get_config)
        layout = self._layout
        self.__setstate__({"state": states, "param_groups": groups})
        self._state_was_seen = False  # `states` are copies that were made for this optimizer
        if layout is not None:  # compiled code goes on, with the new states
            self._lay_out(layout.places())
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _state_reader(self, move_to_device: bool = True) -> StateReader:
        own_buffer = self._own_buffer if self.is_paged else None
        keys = self.non_castable_tensor_keys
        return StateReader(self.state_rows, keys, move_to_device, own_buffer)

    # ---- Copies ---------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        prepared = ("_buckets", "_captured_buckets", "_layout", "_signature", "_without_grad")
        prepared = (*prepared, "_state_was_seen")
        own = {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("mng", "_state", *prepared) and not key.startswith("_optimizer_")
        }
        return {**own, "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget_buckets()
        self.mng = GlobalOptimManager.get_instance()
        # torch writes into __dict__, past the property.
        own = {key: value for key, value in state.items() if key != "state"}
        self._state = state["state"]
        self._state_was_seen = True
        super().__setstate__(own)
        if self.is_paged:
            self._page_states()


def _by_content(override: dict[str, Any] | None) -> Any:
    """Overrides of equal content, as a key of a dictionary."""
    if not override:
        return None
    key = tuple(sorted(override.items(), key=lambda item: item[0]))
    try:
        hash(key)
    except TypeError:  # a value that is not hashable
        return id(override)
    return key
