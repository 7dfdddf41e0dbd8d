"""The dataset that is made again and again, as small as it can be, and what is in its folder."""

from pathlib import Path

import yaml

from cryosim.description import describe

TINY = """
name: tiny
specimen: {molecules: [{structure: ubiquitin}], size: [70, 70, 70], ice: {thickness: {uniform: [100, 140]}}}
tilts: {extent: 20, step: 20, total_dose: 60}
optics: {defocus: {uniform: [10000, 20000]}}
detector: {shape: [32, 32], pixel_size: 4}
sampling: {thickness: 30, width: 6}
"""
DESCRIPTION = describe(yaml.safe_load(TINY))
N = 4


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but its empty lock."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    assert files.pop(".lock") == b""
    return files
