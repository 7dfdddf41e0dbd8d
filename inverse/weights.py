"""Weights of networks in files: safetensors, with all that it takes to build the network and to know what it is for.

A file holds the tensors of a network, in float16 or float32, and as text the class, the arguments of its constructor
(JSON) and facts for people: what it was trained on, for how long. It is read without running anything that it holds;
pickles are refused, and sizes are compared before anything is allocated.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cryosim.io.files import FormatError, atomic_write, existing_file

NETWORKS = {
    "NoiseConditionalUNet": "inverse.priors.denoiser",
    "LocalNetwork": "inverse.priors.local",
    "AmortisedGaussian": "inverse.priors.amortised",
}
"""Classes that files may name, and where they are."""

PACKAGED = Path(__file__).parent / "priors" / "weights"
"""Folder of the weights that come with the project."""

_LARGEST = 2**31  # [byte] of a file
_LARGEST_FIELD = 1024  # of a list or number among the arguments
_PICKLES = (b"\x80", b"PK\x03\x04")  # torch.save, old and new
_ADVICE = "Copy the file again, or train one with `inverse train`."


def load_denoiser(path: str | Path = "crowded", *, voxel_size: float | None = None) -> Any:
    """A denoiser, ready to use.

    Parameters
    ----------
    path : str or path
        A weights file, or the name of one that comes with the project: "crowded", for crowded scenes at 8 to 10 Å.
    voxel_size : float, optional
        Of the volumes it is to be used on [Å].

    Returns
    -------
    NoiseConditionalUNet
        For volumes (batch, 1, z, y, x) [V]; without gradients to its weights.

    Raises
    ------
    cryosim.io.FormatError
        When the file is missing, cut, a pickle, or does not hold the weights that its network has.

    Warns
    -----
    UserWarning
        When the network was trained at other voxel sizes.
    """
    network = load_network(path)
    if voxel_size is not None:
        warn_of_voxel_size(network, voxel_size)
    return network


def load_network(path: str | Path) -> Any:
    """Any network, of a file or by the name of one that comes with the project, as `load_denoiser`."""
    return read_network(_found(path))


def warn_of_voxel_size(network: Any, voxel_size: float) -> None:
    """Warn when `network` was trained at voxel sizes [Å] that are more than a tenth from this one."""
    smallest, largest = network.voxel_sizes
    if not 0.9 * smallest <= voxel_size <= 1.1 * largest:
        trained = f"{smallest:g}" if smallest == largest else f"{smallest:g} to {largest:g}"
        warnings.warn(
            f"a network trained at voxels of {trained} Å is used at {voxel_size:g} Å: to it all things are "
            f"{(smallest * largest) ** 0.5 / voxel_size:.2g} times as large as they are. Bin the series to those "
            "voxels, or train one at these with `inverse train`.",
            UserWarning,
            stacklevel=3,
        )


def read_network(path: str | Path) -> nn.Module:
    """The network of a weights file, in float32 on the CPU, for use and not for training.

    Raises
    ------
    cryosim.io.FormatError
        As `load_denoiser`.
    """
    tensors, facts = read_tensors(path)
    network = _built(Path(path), facts)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    wrong = [n for n in expected if n not in tensors] + [n for n in tensors if n not in expected]
    if wrong:
        raise FormatError(
            path, "tensors", f"the {len(expected)} of the network", f"others: {', '.join(wrong)}", _ADVICE
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise FormatError(path, f"tensor {name}", f"the shape {shape}", f"{tuple(tensors[name].shape)}", _ADVICE)
        if not (tensors[name].is_floating_point() and bool(torch.isfinite(tensors[name]).all())):
            raise FormatError(path, f"tensor {name}", "finite numbers", "others", _ADVICE)
    network = network.to_empty(device="cpu")
    network.load_state_dict({name: value.float() for name, value in tensors.items()})
    return network.eval().requires_grad_(False)


def write_network(path: str | Path, network: Any, facts: Mapping[str, str], dtype: torch.dtype = torch.float16) -> None:
    """Write the weights of a network that tells its own `arguments`, and facts for people, in one step."""
    text = {"network": type(network).__name__, "arguments": json.dumps(network.arguments), **facts}
    write_tensors(path, {name: value.to(dtype) for name, value in network.state_dict().items()}, text)


def read_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its text.

    Raises
    ------
    cryosim.io.FormatError
        When it is missing, cut, a pickle, or larger than 2 GiB.
    """
    path = existing_file(path)
    with path.open("rb") as stream:
        start = stream.read(9)
    if any(start.startswith(magic) for magic in _PICKLES) and start[8:] != b"{":
        raise FormatError(
            path, "file", "safetensors", "a pickle, which can run any program when it is read", "Have it converted."
        )
    if path.stat().st_size > _LARGEST:
        raise FormatError(path, "size", f"at most {_LARGEST} bytes", f"{path.stat().st_size}", _ADVICE)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, ValueError, TypeError, UnicodeDecodeError) as error:
        raise FormatError(path, "file", "whole safetensors", str(error), _ADVICE) from error


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], text: Mapping[str, str]) -> None:
    """Write a safetensors file in one step."""
    with atomic_write(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, dict(text))


def _found(path: str | Path) -> Path:
    known = sorted(file.stem for file in PACKAGED.glob("*.safetensors"))
    return PACKAGED / f"{path}.safetensors" if str(path) in known else Path(path)


def _built(path: Path, facts: Mapping[str, str]) -> Any:
    """The network that a file names, on the meta device: it takes no memory."""
    if facts.get("network") not in NETWORKS:
        named = facts.get("network", "none")
        raise FormatError(path, "network", f"one of {', '.join(NETWORKS)}", repr(named[:80]), _ADVICE)
    try:
        arguments = json.loads(facts.get("arguments", ""))
        assert isinstance(arguments, dict)
        for value in arguments.values():
            parts = value if isinstance(value, list) else [value]
            if len(parts) > 16 or not all(isinstance(x, int | float | str) for x in parts):
                raise ValueError(f"{value!r:.80}")
            if any(isinstance(x, int | float) and not abs(x) <= _LARGEST_FIELD for x in parts):
                raise ValueError(f"{value!r:.80}")
        kind = getattr(import_module(NETWORKS[facts["network"]]), facts["network"])
        with torch.device("meta"):
            return kind(**arguments)
    except (ValueError, TypeError, AssertionError, RecursionError, IndexError) as error:
        expected = f"arguments of {facts['network']} in JSON"
        raise FormatError(path, "arguments", expected, f"{error}"[:200], _ADVICE) from error
