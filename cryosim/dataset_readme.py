"""What goes with a dataset: a README that tells what every file is, numbers for masks, and a copick project."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cryosim.config import RunConfig
from cryosim.description import Description, item_name, name, possible_configs
from cryosim.io.copick import copick_name, write_copick_config
from cryosim.io.files import existing_file
from cryosim.products import check_products, copick_objects
from cryosim.scene import MATTER, catalogue, structure_files


class Entry(NamedTuple):
    """Files of an item: a pattern of their names, in which ITEM stands for the item's, and what they are.

    A pattern that ends in / is a folder, and stands for all that is in it. `needs` is what a description has to ask
    for: some of `output.files`, "movies", "eer", "gain" or "motion".
    """

    pattern: str
    text: str
    needs: frozenset[str] = frozenset()


def _entries(needs: str, *entries: tuple[str, str]) -> tuple[Entry, ...]:
    return tuple(Entry(pattern, text, frozenset(needs.split())) for pattern, text in entries)


ENTRIES = (
    *_entries(
        "",
        ("ITEM.mrc", "tilt series (section, y, x) [e-/px]: counted electrons. MRC."),
        (
            "ITEM.mrc.mdoc",
            "what was done for each section, as SerialEM tells it: pixel size, tilt axis, nominal angle, dose [e-/Å^2] "
            "of the exposure and before it, which tells the order of exposure, TargetDefocus [µm, negative is "
            "underfocus].",
        ),
        ("ITEM.rawtlt", "nominal angles [deg], one for each section: what the stage told."),
        (
            "ITEM.tlt",
            "angles [deg], one for each section: the true ones where there is an ITEM.xf, else those of the .rawtlt.",
        ),
        ("ITEM_truth.mrc", "truth (z, y, x) [V]: electrostatic potential of all matter, above that of the ice."),
        (
            "ITEM_poses.star",
            "truth: place and rotation of every particle (proteins, subunits of filaments, gold beads), as a particle "
            "file of RELION 5. rlnCenteredCoordinate{X,Y,Z}Angst [Å] count from the origin, rlnCoordinate{X,Y,Z} "
            "[voxel of ITEM_truth.mrc] from the first voxel, which is 0. rlnAngle{Rot,Tilt,Psi} [deg] are RELION's for "
            "the rotation that takes the structure, centred, into the tomogram. rlnClassNumber is the molecule, whose "
            "name data_molecules tells. Missing where an item has no particles.",
        ),
        ("ITEM_parameters.yaml", "every parameter of this item with what was drawn for it, and versions."),
        (
            "DONE.json",
            "written last: size [byte] and SHA-256 of each file, seed, versions, hash of the description. An item "
            "without a valid one is not complete.",
        ),
    ),
    *_entries(
        "movies",
        (
            "ITEM_frames/",
            "a movie (frame, y, x) [e-/px] of each exposure, ITEM_<exposure, from 000>_<nominal angle>; the .mdoc "
            "names the one of each section. Counts as the camera gives them, not corrected for gain.",
        ),
    ),
    *_entries(
        "gain",
        (
            "ITEM_gain.mrc",
            "gain reference (y, x) of the camera, as RELION and Warp take it, 0 where a pixel is defect: for EER files "
            "the relative sensitivity, by which to divide, for others its inverse, by which to multiply.",
        ),
    ),
    *_entries(
        "motion",
        (
            "ITEM_motion.npz",
            "truth: how the specimen moved. drift (exposure, frame, (x, y, z)) [Å]; where the motion is local, field "
            "(exposure, frame, (x, y, z), y, x) [Å] on a grid of the spacing [Å].",
        ),
    ),
    *_entries(
        "alignments",
        (
            "ITEM.xf",
            "true alignment for IMOD, with ITEM.tlt: from raw to aligned images, tilt axis along y. `tilt`, and then "
            "`trimvol -rx`, gives the tomogram on the grid of ITEM_truth.mrc.",
        ),
        ("ITEM.aln", "true alignment for AreTomo."),
        ("tomograms.star", "true alignment and optics for RELION 5, with rlnTomoHand = 1. Start it in this folder."),
        ("tilt_series/ITEM.star", "of tomograms.star: one row for each section."),
        (
            "ITEM.xml",
            "true alignment, doses and defocus [µm] for Warp, whose angles are ours negated. It looks for the stack at "
            "tiltstack/ITEM/ITEM.st: link ITEM.mrc there.",
        ),
    ),
    *_entries(
        "halves",
        ("ITEM_even.mrc", "half of the electrons of ITEM.mrc, dealt out at random [e-/px]."),
        ("ITEM_odd.mrc", "the other half; the noise of the two is independent, and they sum to ITEM.mrc."),
    ),
    *_entries(
        "clean",
        (
            "ITEM_noiseless.mrc",
            "what ITEM.mrc is in the mean of many exposures (section, y, x) [e-/px]: with lens and camera, without "
            "noise.",
        ),
        (
            "ITEM_projections.mrc",
            "potential above that of the ice, projected along the beam (section, y, x) [V·Å]: without lens, camera, "
            "damage and noise.",
        ),
    ),
    *_entries(
        "labels",
        ("ITEM_instances.mrc", "mask (z, y, x) [1]: which single thing a voxel belongs to, counted from 1; 0 is none."),
        ("ITEM_instances.json", "number, name and kind of each; missing where there is none."),
        ("ITEM_semantic.mrc", "mask (z, y, x) [1]: what a voxel is; 0 is nothing, numbers below."),
        ("ITEM_semantic.json", "number, name and kind of each; the numbers are the same in all items."),
    ),
    *_entries(
        "tomogram",
        (
            "ITEM_tomogram.mrc",
            "weighted back-projection (z, y, x) [V] of ITEM.mrc with the true alignment and the signs of the contrast "
            "transfer put right, on the grid of ITEM_truth.mrc.",
        ),
    ),
    *_entries("zarr", ("ITEM_truth.zarr/", "ITEM_truth.mrc as OME-Zarr 0.4, at several scales.")),
    *_entries("zarr tomogram", ("ITEM_tomogram.zarr/", "ITEM_tomogram.mrc likewise.")),
    *_entries(
        "zarr labels",
        ("ITEM_instances.zarr/", "ITEM_instances.mrc likewise; coarser scales hold the most frequent number."),
        ("ITEM_semantic.zarr/", "ITEM_semantic.mrc likewise."),
    ),
    *_entries(
        "copick",
        ("VoxelSpacing*/truth.zarr/", "for copick: ITEM_truth.mrc, tomogram type truth."),
        (
            "Picks/cryosim_0_*.json",
            "for copick: the poses of ITEM_poses.star, one file for each name. Locations [Å] count from the first "
            "voxel.",
        ),
        ("Segmentations/*_cryosim_0_all-multilabel.zarr/", "for copick: what a voxel is, with the numbers below."),
    ),
    *_entries("copick tomogram", ("VoxelSpacing*/wbp.zarr/", "for copick: ITEM_tomogram.mrc, tomogram type wbp.")),
    *_entries(
        "specimen",
        (
            "ITEM_specimen.npz",
            "the specimen, to be simulated again in any other way: `cryosim.io.read_specimen`. NumPy arrays and a tree "
            "in JSON, no pickles.",
        ),
    ),
)

_CONVENTIONS = (
    "Arrays are (z, y, x), images (y, x), x fastest; vectors are (x, y, z) [Å], right-handed.",
    "Images and volumes have their origin, the middle of the specimen, at sample n // 2 of each axis, counted from 0. "
    "The headers' own origins are 0 and tell nothing.",
    "The sections of every stack stand by ascending nominal angle, not in the order of exposure.",
    "Electrons travel along +z. The specimen is rotated about y by the tilt angle, right-handed, so that a point lands "
    "at u = x cos(t) + z sin(t), then about z by the angle of the tilt axis (tilts.axis_angle, in the image from y), "
    "then displaced by the shift of the image.",
    "Defocus is positive for underfocus and that of the origin; a point at height z along the beam is seen at "
    "defocus + z.",
    "Matter is dark in the images and positive in truth, projections and tomogram.",
    "Units: Å, V, e-/Å^2, e-/px, degrees, unless something else is said.",
)


class Inventory(NamedTuple):
    """What the items of a dataset may hold.

    Attributes
    ----------
    entries : list of Entry
        Files.
    numbers : dict of str to int
        Of everything in masks, by name.
    """

    entries: list[Entry]
    numbers: dict[str, int]

    @property
    def kinds(self) -> set[str]:
        """All that the entries need."""
        return {kind for entry in self.entries for kind in entry.needs}


def inventory(description: Description) -> Inventory:
    """What the items may hold, if every run that the description may give can be made.

    Raises
    ------
    cryosim.io.FormatError
        When a structure file is missing or empty.
    ValueError
        As `catalogue` and `check_products`.
    """
    possible = list(possible_configs(description))
    for path in dict.fromkeys(file for config in possible for file in structure_files(config, description.base)):
        existing_file(path)
    numbers = _numbers(possible)
    for config in possible:
        check_products(config, numbers)
    asked = [_asked(config) for config in possible]
    return Inventory([entry for entry in ENTRIES if any(entry.needs <= kinds for kinds in asked)], numbers)


def _numbers(possible: list[RunConfig]) -> dict[str, int]:
    """Number of every name, the same for all items."""
    names = dict.fromkeys(name for config in possible for name in catalogue(config))
    numbers = {name: number for number, name in enumerate(names, 1)}
    if len(numbers) > 255:
        raise ValueError(
            f"specimen: expected at most {255 - len(MATTER)} names of molecules in all items together, got "
            f"{len(numbers) - len(MATTER)}. Give some of them one name."
        )
    return numbers


def write_copick_project(path: Path, description: Description, numbers: dict[str, int]) -> None:
    """Write the copick.json of a dataset, with all that any of its items may hold."""
    particles = set(numbers) - set(MATTER) | {"gold bead"}
    write_copick_config(
        path,
        copick_objects(numbers, particles),
        name=name(description),
        description="Simulated by cryosim; user cryosim, session 0 is the truth.",
        user="user",  # whoever picks, not the truth
        session="1",
    )


def readme_text(description: Description, inventory: Inventory, versions: dict[str, str]) -> str:
    """README of a dataset, in Markdown; it tells no times, and the same description gives the same text."""
    (entries, numbers), kinds, item = inventory, inventory.kinds, item_name(description, 0)
    parts = [
        f"# {name(description)}: simulated cryo-electron tilt series",
        f"Simulated by cryosim {versions['cryosim']} from dataset.yaml. Every tilt series is an item: a folder in "
        f"ExperimentRuns, such as {item}, that is whole or is not there.",
        "## Files of the dataset",
        _list(_of_dataset(kinds)),
        "## Files of an item",
        f"ITEM stands for its name, such as {item}.",
        _list((f"`{entry.pattern}`", entry.text) for entry in entries),
        "## Conventions",
        _list(("", line) for line in _CONVENTIONS),
        *(_of_masks(numbers, "copick" in kinds) if kinds & {"labels", "copick"} else ()),
        "## Reading it",
        *_reading(kinds),
        "## Going on",
        *_going_on(description, versions),
    ]
    return "\n\n".join(_wrapped(part) for part in parts) + "\n"


def _of_dataset(kinds: set[str]) -> list[tuple[str, str]]:
    copick = "objects and place of a copick project, for all items; written once, so it may be edited."
    return [
        ("`dataset.yaml`", "the description: parameters, and distributions that values are drawn from."),
        ("`README.md`", "this."),
        *([("`copick.json`", copick)] if "copick" in kinds else []),
        ("`ExperimentRuns/ITEM/`", "the items."),
        ("`failed.json`", "items that could not be made, and why; failed_I_of_N.json of a shard. Missing if none."),
        ("`.lock`, `.ITEM.*/`", "of a run at work, or of one that was killed; the next run removes what is left."),
    ]


def _of_masks(numbers: dict[str, int], copick: bool) -> list[str]:
    rows = [
        f"| {number} | {name} | {copick_name(name)} |" if copick else f"| {number} | {name} |"
        for name, number in numbers.items()
    ]
    head = ["| number | name | in copick |", "|---|---|---|"] if copick else ["| number | name |", "|---|---|"]
    told = "The same in all items; an item need not hold all of them. 0 is nothing of these: ice, or vacuum."
    return ["## Numbers in the masks of what a voxel is", told, "\n".join([*head, *rows])]


def _reading(kinds: set[str]) -> list[str]:
    python = """\
```python
import cryosim

data = cryosim.TiltSeriesDataset(".")  # this folder; reads an item when it is asked for
volume, images = data[0]  # tensors (1, z, y, x) [V] and (1, tilt, y, x) [e-/px], in the order of exposure
series = data.series(0)  # with the true angles and shifts, doses, optics
```"""
    other = [x for x, kind in (('volume="tomogram"', "tomogram"), ('images="even"', "halves")) if kind in kinds]
    parts = ["Python (torch), for deepinv's Trainer with `as_dict=True`:", python]
    if other:
        parts.append(f"Other files of the same pattern go by their names: {', '.join(f'`{x}`' for x in other)}.")
    if "alignments" in kinds:
        parts.append(
            "IMOD, AreTomo, RELION 5 and Warp read an item's own files (above), each started in the item's folder. "
            "(The files follow their sources and documentation and are read back by cryoet-alignment and starfile; "
            "the four programs themselves were not run.)"
        )
    if "copick" in kinds:
        parts += [
            'copick: start it in this folder, beside copick.json (`copick.from_file("copick.json")`): it takes the '
            "folder it is started in for the project's. Runs are the items. Truth is of user cryosim, session 0; what "
            "you pick goes to user user, session 1, unless you say otherwise, into the folders of the items."
        ]
    return parts


def _going_on(description: Description, versions: dict[str, str]) -> list[str]:
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        "`cryosim dataset dataset.yaml -n N --out . --resume`, in this folder, makes what is missing, damaged, or has "
        "no valid DONE.json among the first N items, and leaves the others as they are."
        + (" Structure files that dataset.yaml names have to be found from here." if description.sources else ""),
        "The same description and number of an item give the same bytes, with the same versions on the same kind of "
        f"processor. Begun with {told}; DONE.json tells those of each item.",
    ]


def _asked(config: RunConfig) -> set[str]:
    """What of `Entry.needs` a run asks for."""
    camera, moves = config.detector, config.specimen.motion
    uneven = camera.gain_variation or camera.dead_pixels or camera.hot_pixels
    others = {
        "movies": config.output.movies != "none",
        "gain": bool(uneven),
        "motion": bool(moves.drift or moves.velocity or moves.doming),
    }
    return {*config.output.files, *(kind for kind, asked in others.items() if asked)}


def _list(entries: Iterable[tuple[str, str]]) -> str:
    return "\n".join(_filled(f"- {head}: {text}" if head else f"- {text}", "  ") for head, text in entries)


def _wrapped(part: str) -> str:
    """A paragraph in lines; code, tables, lists and headings as they are."""
    return part if part.startswith(("```", "|", "- ", "#")) else _filled(part)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
