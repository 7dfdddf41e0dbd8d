"""Frozen records of tensors: values with `replace`, `to` and `index`, which torch.func can walk through.

A subclass of `Record` is a frozen dataclass and a pytree node, so `torch.func.grad`, `vmap` and `jvp` accept it
wherever they accept a tensor.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self, dataclass_transform

import torch
from torch.utils import _pytree


def hidden() -> bool:
    """Whether values cannot be looked at: inside a transform of torch.func, or while a graph is compiled."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def differentiated(value: Any) -> bool:
    """Whether derivatives in a value may be asked for: of a graph, of forward mode, or inside torch.func."""
    if not isinstance(value, torch.Tensor):
        return False
    return value.requires_grad or hidden() or torch.autograd.forward_ad._current_level >= 0


_COMPLEX_OF = {torch.float32: torch.complex64, torch.float64: torch.complex128, torch.float16: torch.complex32}


def item(ndim: int = 0, *, default: Any = dataclasses.MISSING) -> Any:
    """Field whose one item has `ndim` axes; every axis before those counts items (atoms, tilts, ...).

    Parameters
    ----------
    ndim : int
        Number of axes of one item: 0 for a number, 1 for a vector, 2 for an image.
    default : optional
        Default value.
    """
    return dataclasses.field(default=default, metadata={"item_ndim": ndim})


def static(default: Any = dataclasses.MISSING) -> Any:
    """Field that is part of the record's structure (a shape, a name): never a tensor, never differentiated."""
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(item, static, dataclasses.field))
class Record:
    """Base of every noun: subclass it and declare the fields."""

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        _pytree.register_pytree_node(
            cls,
            lambda record: _flatten(record),
            lambda leaves, spec: _unflatten(cls, leaves, spec),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def replace(self, **changes: Any) -> Self:
        """Copy with some fields changed.

        Raises
        ------
        TypeError
            When a name is not a field.
        """
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Copy on another device or in another precision; integers keep their type, complex stays complex."""

        def move(leaf: Any) -> Any:
            if isinstance(leaf, Record):
                return leaf.to(device, dtype)
            if not isinstance(leaf, torch.Tensor):
                return leaf
            target = dtype
            if dtype is not None and leaf.is_complex():
                target = _COMPLEX_OF.get(dtype, dtype)
            elif not leaf.is_floating_point():
                target = None
            return leaf.to(device=device, dtype=target)

        leaves, structure = _pytree.tree_flatten(self)
        return _pytree.tree_unflatten([move(leaf) for leaf in leaves], structure)

    def index(self, which: Any) -> Self:
        """Copy with the items `which` (an integer, slice, mask or index tensor) of every per-item field."""
        changes = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, ndim = getattr(self, field.name), field.metadata.get("item_ndim")
            if ndim is not None and isinstance(value, torch.Tensor) and value.ndim > ndim:
                changes[field.name] = value[which]
            elif isinstance(value, Record):
                changes[field.name] = value.index(which)
        return self.replace(**changes)

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            if isinstance(value, torch.Tensor) and value.numel() > 4:
                return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
            if isinstance(value, torch.Tensor):
                return str(value.tolist())
            return repr(value)

        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={show(getattr(self, f.name))}' for f in fields)})"


def _flatten(record: Any) -> tuple[list[Any], tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]]:
    fields = dataclasses.fields(record)
    names = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple((f.name, getattr(record, f.name)) for f in fields if f.metadata.get("static"))
    return [getattr(record, name) for name in names], (names, statics)


def _unflatten(cls: type, leaves: Any, spec: Any) -> Any:
    # Written without __init__: torch.func passes placeholders through, which no validation may see.
    record = object.__new__(cls)
    names, statics = spec
    for name, leaf in (*zip(names, leaves, strict=True), *statics):
        object.__setattr__(record, name, leaf)
    return record
