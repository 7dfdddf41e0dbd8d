"""The structures that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_FILES = {"ubiquitin": "1ubi.pdb", "apoferritin": "6z6u_subunit.pdb"}


def example_path(name: str) -> Path:
    """Path of a structure file of the package.

    Parameters
    ----------
    name : {"ubiquitin", "apoferritin"}
        The apoferritin file holds one subunit; `read_atoms(path, assembly=1)` gives the 24.

    Raises
    ------
    ValueError
        When there is no example of that name.
    """
    if name not in _FILES:
        raise ValueError(f"example_path: expected one of {', '.join(sorted(_FILES))}, got {name!r}.")
    return Path(str(files("cryosim") / "data" / _FILES[name]))
