"""Motion of a specimen on disk: NumPy's .npz, without pickles, so that anything can read it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cryosim.io.files import FormatError, atomic_write, existing_file
from cryosim.specimen.motion import Motion

LARGEST = 2**31  # [byte] of arrays that a file may unfold to

_NAMES = ("drift", "field", "spacing")


def write_motion(path: str | Path, motion: Motion) -> None:
    """Write drift (tilt, frame, 3) [Å], field (tilt, frame, 3, y, x) [Å] and spacing [Å] of a motion.

    The field is left out where there is none. The same motion gives the same bytes.
    """
    arrays: dict[str, Any] = {"drift": motion.drift.detach().cpu().numpy()}
    if motion.field is not None:
        arrays |= {"field": motion.field.detach().cpu().numpy(), "spacing": np.array(motion.spacing)}
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def read_motion(path: str | Path) -> Motion:
    """Read what `write_motion` wrote.

    Raises
    ------
    FormatError
        When the file is missing, damaged, of another kind, or larger than allowed.
    """
    path = existing_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > LARGEST:
            raise FormatError(path, "size", f"at most {LARGEST} bytes", f"{size}", "Is it a motion?")
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: np.array(content[name], dtype=np.float64) for name in _NAMES if name in content}
        if "drift" not in arrays:
            raise FormatError(path, "arrays", "drift, and with it field and spacing", ", ".join(arrays) or "none")
        values = {name: torch.from_numpy(array) for name, array in arrays.items()}
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise FormatError(path, name, "finite numbers", "NaN or infinity", "Write the file again.")
        return Motion(values["drift"], values.get("field"), float(values.get("spacing", torch.zeros(())).sum()))
    except FormatError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise FormatError(
            path, "content", "a motion in .npz", f"{error}", "Write it again with write_motion."
        ) from error
