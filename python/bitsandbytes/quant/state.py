# SPDX-License-Identifier: MIT
"""QuantState: everything needed to turn quantized codes back into numbers."""

from typing import Any

import torch
from torch import Tensor

from .._checks import check
from ..utils import pack_dict_to_tensor, unpack_tensor_to_dict

__all__ = ["QuantState"]

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def _packed_entry(quant_type: str) -> property:
    """Returns a property that only states of `quant_type` have.

    Not `__getattr__`: a class that has it reads every attribute more slowly.
    """
    name = f"bitsandbytes__{quant_type}"

    def get(self):
        if self.quant_type != quant_type:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return self.as_dict(packed=True)[f"quant_state.{name}"]

    return property(get, doc="The packed entry of :meth:`as_dict`.")


class QuantState:
    """Scales, code and shape of a quantized tensor.

    Args:
        absmax: float32 scales, one per block; uint8 codes of them when they are themselves
            quantized (`state2` given).
        shape: Shape of the original tensor, or None when the codes carry it.
        code: float32 levels: 256 of them for 8-bit codes, 16 for 4-bit codes.
        blocksize: Elements that share one scale.
        quant_type: ``"fp4"``, ``"nf4"`` or None for 8-bit codes.
        dtype: dtype that dequantization returns.
        offset: 0-dim float32 that was subtracted from the scales before they were quantized.
        state2: QuantState of the quantized scales.
    """

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = [f"bitsandbytes__{name}" for name in valid_quant_types]  # noqa: RUF012
    valid_qs_keys = [  # noqa: RUF012
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: "QuantState | None" = None,
    ):
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    @property
    def code(self) -> Tensor | None:
        """The levels. They may be changed, so a table shared until then is copied here."""
        if self._shares_code:
            self._code = self._code.clone()
            self._shares_code = False
        return self._code

    @code.setter
    def code(self, code: Tensor | None) -> None:
        self._code = code
        self._shares_code = False

    def share_code(self, code: Tensor) -> None:
        """Sets the levels to a table that is not to be changed, without a copy."""
        self._code = code
        self._shares_code = True

    def levels(self) -> Tensor | None:
        """Returns the levels for reading only."""
        return self._code

    def __getstate__(self) -> dict[str, Any]:
        # Under the names of the public format.
        fields = dict(self.__dict__)
        del fields["_code"], fields["_shares_code"]
        return {**fields, "code": self.code}

    def __setstate__(self, fields: dict[str, Any]) -> None:
        fields = dict(fields)
        self.code = fields.pop("code", None)
        self.__dict__.update(fields)

    # Modules that flatten state dicts (FSDP) resolve the packed entry as an attribute.
    bitsandbytes__fp4 = _packed_entry("fp4")
    bitsandbytes__nf4 = _packed_entry("nf4")

    def __getitem__(self, index):
        """Reads the state as the list that bitsandbytes 0.41 and older returned."""
        nested = [self.offset, self.state2] if self.nested else None
        fields = [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type]
        return fields[index]

    @classmethod
    def from_list(cls, fields: "list | tuple", blocksize: int = 4096) -> "QuantState":
        """Builds a state from the lists and pairs that stood for it until bitsandbytes 0.41.

        Args:
            fields: One of ``[absmax, code]`` (8 bits, until 0.38, of no dtype);
                ``[absmax, code, blocksize, nested, dtype, offset, state2]`` (8 bits);
                ``[absmax, shape, dtype, blocksize, nested, quant_type]``, also with the table
                behind it (4 bits; ``list(state)`` today), where `nested` is None or ``[offset,
                state2]``. `state2` may be a list itself.
            blocksize: Block size of a pair, which does not tell it.

        Returns:
            The state.

        Raises:
            ValueError: The list has none of these forms.

        Example:
            >>> state = QuantState.from_list([torch.ones(2), torch.linspace(-1, 1, 256)], 64)
            >>> state.blocksize, state.dtype
            (64, None)
        """
        code = shape = quant_type = offset = second = None
        if len(fields) == 2:
            absmax, code = fields
            dtype = None
        elif len(fields) == 7 and isinstance(fields[1], Tensor):
            absmax, code, blocksize, nested, dtype, offset, second = fields
            if not nested:
                offset = second = None
        elif len(fields) in (6, 7):
            absmax, shape, dtype, blocksize, nested, quant_type = fields[:6]
            if nested is not None:
                offset, second = nested
            code = fields[6] if len(fields) == 7 else None
            shape = torch.Size(shape) if shape is not None else None
        else:
            raise ValueError(
                "QuantState.from_list: fields must be a list of 2, 6 or 7 entries, got "
                f"{len(fields)}"
            )
        if isinstance(second, (list, tuple)):
            second = cls.from_list(second, 256 if quant_type else blocksize)
        return cls(absmax, shape, code, blocksize, quant_type, dtype, offset, second)

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> "QuantState":
        """Builds a state from :meth:`as_dict`, packed or not.

        Args:
            qs_dict: Entries with or without a dotted prefix. A packed entry is taken out of it and
                its content put in.
            device: Where the tensors go.

        Returns:
            The state.

        Raises:
            ValueError: There is not exactly one packed entry of a known type, or an entry has a
                value that no state can have.
            AssertionError: An entry is unknown.
            KeyError: An entry is missing.
        """
        packed_keys = [
            key
            for key, value in qs_dict.items()
            if "quant_state" in key and isinstance(value, Tensor)
        ]
        if "quant_type" not in qs_dict:
            if not packed_keys:
                raise ValueError(
                    "QuantState.from_dict: qs_dict must hold 'quant_type' or a packed "
                    f"'quant_state' tensor, got keys {sorted(qs_dict)}"
                )
            suffix = packed_keys[0].split(".")[-1]
            if len(packed_keys) != 1 or suffix not in cls.valid_qs_type_keys:
                raise ValueError(
                    "QuantState.from_dict: qs_dict must hold exactly one packed entry ending in "
                    f"one of {cls.valid_qs_type_keys}, got {packed_keys}"
                )
        if len(packed_keys) == 1:
            qs_dict.update(_unpacked(packed_keys[0], qs_dict.pop(packed_keys[0])))
        fields = {key.split(".")[-1]: value for key, value in qs_dict.items()}
        unknown = set(fields) - set(cls.valid_qs_keys)
        assert not unknown, f"QuantState.from_dict: unknown entries {sorted(unknown)} in qs_dict"

        read = _Entries(fields)
        offset = state2 = None
        if "nested_absmax" in fields:
            offset = torch.tensor(read.number("nested_offset")).to(device)
            state2 = cls(
                absmax=read.tensor("nested_absmax").to(device),
                blocksize=read.size("nested_blocksize"),
                code=read.tensor("nested_quant_map").to(device),
                dtype=read.dtype("nested_dtype"),
            )
        return cls(
            quant_type=read["quant_type"],
            absmax=read.tensor("absmax").to(device),
            blocksize=read.size("blocksize"),
            code=read.tensor("quant_map").to(device),
            dtype=read.dtype("dtype"),
            shape=read.shape("shape"),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """Returns the state as a dictionary.

        Args:
            packed: Only tensors: everything else goes as JSON into one uint8 tensor under
                ``quant_state.bitsandbytes__<quant_type>``. 8-bit states have no packed form and
                are returned as they are.

        Returns:
            The entries, in the order of the public format.
        """
        entries: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": tuple(self.shape) if self.shape is not None else None,
        }
        if self.nested:
            entries |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                # safetensors refuses tensors that share memory, and this table is shared.
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return entries
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in entries.items() if not isinstance(value, Tensor)}
        tensors[f"quant_state.bitsandbytes__{self.quant_type}"] = pack_dict_to_tensor(others)
        return tensors

    def to(self, device: torch.device | str) -> None:
        """Moves every tensor of the state to `device`, in place."""
        self.code = self.code.to(device)
        self.absmax = self.absmax.to(device)
        if self.nested:
            self.offset = self.offset.to(device)
            self.state2.absmax = self.state2.absmax.to(device)
            self.state2.code = self.state2.code.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            _close(self.absmax, other.absmax)
            and self.shape == other.shape
            and _close(self.code, other.code)
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and _close(self.offset, other.offset)
            and self.state2 == other.state2
        )

    __hash__ = None  # compares by value and can be changed in place


def _unpacked(key: str, packed: Tensor) -> dict[str, Any]:
    """Returns the content of a packed entry."""
    try:
        content = unpack_tensor_to_dict(packed)
    except (TypeError, ValueError) as error:  # not bytes, not UTF-8, not JSON
        raise ValueError(
            f"QuantState.from_dict: {key} must be JSON in bytes, got {packed.numel()} elements of "
            f"{packed.dtype} ({error})"
        ) from error
    check(isinstance(content, dict), "QuantState.from_dict", key, "a dictionary in JSON", content)
    return content


class _MissingEntry(KeyError):
    """A key that is missing, with a sentence about it."""

    __str__ = Exception.__str__  # that of KeyError puts quotes around


class _Entries:
    """Reads entries of a checkpoint, which may hold anything."""

    def __init__(self, fields: dict[str, Any]):
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise _MissingEntry(
                f"QuantState.from_dict: qs_dict must hold '{key}', got keys {sorted(self._fields)}"
            )
        return self._fields[key]

    def _check(self, condition: bool, key: str, expected: str) -> None:
        if not condition:
            check(False, "QuantState.from_dict", key, expected, repr(self._fields[key]))

    def tensor(self, key: str) -> Tensor:
        value = self[key]
        self._check(isinstance(value, Tensor), key, "a tensor")
        return value

    def number(self, key: str) -> float:
        value = self[key]
        one = value.numel() == 1 if isinstance(value, Tensor) else _is_number(value)
        self._check(one, key, "a number")
        return float(value)

    def size(self, key: str) -> int:
        value = self[key]
        self._check(type(value) is int and value > 0, key, "a whole number above 0")
        return value

    def shape(self, key: str) -> torch.Size | None:
        value = self[key]
        if value is None:
            return None
        sizes = isinstance(value, (list, tuple)) and all(type(n) is int and n >= 0 for n in value)
        self._check(sizes, key, "a list of sizes")
        return torch.Size(value)

    def dtype(self, key: str) -> torch.dtype | None:
        name = self[key]
        if name == "None":
            return None
        self._check(isinstance(name, str) and name in DTYPES, key, f"one of {sorted(DTYPES)}")
        return DTYPES[name]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return torch.allclose(a, b, atol=1e-6)
