"""Atoms from PDB and mmCIF files.

gemmi parses; what it lets pass is checked here, on the raw columns: in a PDB file it reads a coordinate such as
"xx.xxx" as 0, a blank occupancy as 0, an unknown element as X.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import gemmi
import torch

from cryosim.io.files import FormatError, existing_file, read_text
from cryosim.specimen.atoms import CLASSES, Atoms

_FARTHEST = 1e5  # [Å] from the file's origin
_HEAVIEST = 98  # californium, the last element with tabulated electron scattering
_CARBOXYL = {("ASP", name) for name in ("CG", "OD1", "OD2")} | {("GLU", name) for name in ("CD", "OE1", "OE2")}
_PDB, _MMCIF = (".pdb", ".ent"), (".cif", ".mmcif")
# name, columns (from 0), value of a blank field
_PDB_FIELDS = (
    ("x", 30, 38, None),
    ("y", 38, 46, None),
    ("z", 46, 54, None),
    ("occupancy", 54, 60, "  1.00"),
    ("B-factor", 60, 66, "  0.00"),
)
_MMCIF_FIELDS = (
    ("x", "Cartn_x", True),
    ("y", "Cartn_y", True),
    ("z", "Cartn_z", True),
    ("occupancy", "occupancy", False),
    ("B-factor", "B_iso_or_equiv", False),
)


def read_atoms(
    path: str | Path,
    assembly: str | int | None = None,
    *,
    chains: Sequence[str] | None = None,
    hydrogens: bool = True,
    waters: bool = False,
    ligands: bool = True,
) -> Atoms:
    """Atoms of the first model of a structure file.

    Of alternate conformations one is kept, residue by residue: the one with the highest mean occupancy, the first
    letter among equals, and with it only conformations that share no atom name with it. The atoms kept have the
    file's own occupancy. An occupancy the file leaves out is 1, a B-factor 0.

    Parameters
    ----------
    path : str or path
        .pdb, .ent, .cif or .mmcif, plain or with .gz.
    assembly : str or int, optional
        Name of a biological assembly, which is expanded; None gives the asymmetric unit as deposited.
    chains : sequence of str, optional
        Names (the authors') of those to keep, before an assembly is expanded; all when left out.
    hydrogens, waters, ligands : bool
        Whether to keep hydrogen (and deuterium), water, and what else is not part of a polymer.

    Returns
    -------
    Atoms
        positions (atom, 3) [Å] float64 as in the file, NOT centred: see `Atoms.centred`; classes as in
        `cryosim.specimen.atoms.CLASSES`.

    Raises
    ------
    FormatError
        When the file is missing, empty, without atoms, or holds a coordinate, occupancy, B-factor or element that
        cannot be meant; or when it has no assembly or chain of that name.
    """
    path = existing_file(path)
    structure = _parse(path)
    structure.setup_entities()
    if chains is not None:
        _keep_chains(path, structure, chains)
    model = structure[0] if len(structure) else gemmi.Model(1)
    if assembly is not None:
        model = _expanded(path, structure, str(assembly))
    kept = [
        (residue, atom)
        for chain in model
        for residue, atom in _one_conformation(chain)
        if (hydrogens or not atom.is_hydrogen())
        and (waters or not residue.is_water())
        and (ligands or residue.entity_type == gemmi.EntityType.Polymer or residue.is_water())
    ]
    if not kept:
        raise FormatError(
            path, "atoms", "at least one", "none", "Check the file, and the choice of hydrogens, waters and ligands."
        )
    return Atoms(
        positions=torch.tensor([atom.pos.tolist() for _, atom in kept], dtype=torch.float64),
        numbers=torch.tensor([atom.element.atomic_number for _, atom in kept]),
        b_factors=torch.tensor([atom.b_iso for _, atom in kept], dtype=torch.float64),
        occupancies=torch.tensor([atom.occ for _, atom in kept], dtype=torch.float64),
        classes=torch.tensor([CLASSES.index(_class_of(residue, atom)) for residue, atom in kept]),
    )


def _class_of(residue: gemmi.Residue, atom: gemmi.Atom) -> str:
    if residue.is_water():
        return "water"
    if atom.element.is_metal:
        return "metal"
    if (residue.name, atom.name) in _CARBOXYL or atom.name == "OXT":
        return "carboxyl"
    if residue.name == "CYS" and atom.name == "SG":
        return "sulfur"
    return "nucleic acid" if gemmi.find_tabulated_residue(residue.name).is_nucleic_acid() else "other"


def _parse(path: Path) -> gemmi.Structure:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in _PDB + _MMCIF:
        known = ", ".join(_PDB + _MMCIF)
        raise FormatError(path, "suffix", f"one of {known}, plain or .gz", repr(suffix), "Rename the file.")
    text = read_text(path)
    try:
        structure = _parse_pdb(path, text) if suffix in _PDB else _parse_mmcif(path, text)
    except FormatError:
        raise
    except (ValueError, RuntimeError, IndexError) as error:
        raise FormatError(path, "content", "a structure", f"{error}".strip(), "Download the file again.") from error
    for model in structure:
        for site in model.all():
            number = site.atom.element.atomic_number
            if not 1 <= number <= _HEAVIEST:
                raise FormatError(
                    path,
                    f"element of atom {site}",
                    "a symbol from H to Cf",
                    f"{site.atom.element.name} (atomic number {number})",
                    "Correct or remove the atom.",
                )
        break
    return structure


def _parse_pdb(path: Path, text: str) -> gemmi.Structure:
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if line[:6].strip().upper() == "END":
            break
        if line[:6].upper() in ("ATOM  ", "HETATM"):
            lines[i] = _checked_pdb_line(path, f"line {i + 1}", line.rstrip("\r"))
    return gemmi.read_pdb_string("\n".join(lines))


def _checked_pdb_line(path: Path, where: str, line: str) -> str:
    line = line.ljust(66)
    for name, start, stop, blank in _PDB_FIELDS:
        field = line[start:stop]
        if blank is not None and not field.strip():
            line = line[:start] + blank + line[stop:]
        else:
            _check_number(path, f"{where}, {name} (columns {start + 1}-{stop})", name, field)
    symbol = line[76:78].strip()
    if symbol and not symbol.isdigit() and gemmi.Element(symbol).atomic_number == 0:
        raise FormatError(
            path, f"{where}, element (columns 77-78)", "a chemical symbol", repr(symbol), "Correct or remove the atom."
        )
    return line


def _parse_mmcif(path: Path, text: str) -> gemmi.Structure:
    document = gemmi.cif.read_string(text)
    for block in document:
        if block.find_values("_atom_site.Cartn_x"):
            break
    else:
        raise FormatError(path, "_atom_site", "a loop of atoms", "none", "Download the coordinates, not another file.")
    for name, tag, needed in _MMCIF_FIELDS:
        column = block.find_values(f"_atom_site.{tag}")
        if needed and not column:
            raise FormatError(path, f"_atom_site.{tag}", "a column", "none", "Download the file again.")
        for row, value in enumerate(column, 1):
            _check_number(path, f"_atom_site.{tag}, row {row}", name, value)
    structure = gemmi.make_structure_from_block(block)
    if not block.find_values("_atom_site.B_iso_or_equiv"):
        for site in structure[0].all():
            site.atom.b_iso = 0.0  # gemmi fills in 20
    return structure


def _check_number(path: Path, where: str, name: str, field: str) -> None:
    try:
        value = float(field)
    except ValueError:  # mmCIF may append the uncertainty, 12.34(5)
        value = gemmi.cif.as_number(field.strip())
    expected, good = {
        "occupancy": ("a number from 0 to 1", 0 <= value <= 1),
        "B-factor": ("a finite number, not negative", 0 <= value < math.inf),
    }.get(name, (f"a finite number within {_FARTHEST:g} Å of the origin", abs(value) <= _FARTHEST))
    if not good:  # NaN compares false
        raise FormatError(path, where, expected, repr(field.strip()), "Correct the record or download the file again.")


def _keep_chains(path: Path, structure: gemmi.Structure, names: Sequence[str]) -> None:
    present = [chain.name for model in structure for chain in model]
    missing = [name for name in names if name not in present]
    if missing or not names:
        expected = f"some of {', '.join(dict.fromkeys(present))}"
        raise FormatError(path, "chains", expected, ", ".join(missing) or "none", "Leave chains out to read all.")
    for model in structure:
        for name in {chain.name for chain in model} - set(names):
            model.remove_chain(name)


def _expanded(path: Path, structure: gemmi.Structure, name: str) -> gemmi.Model:
    for assembly in structure.assemblies:
        if assembly.name == name:
            if not all(generator.operators for generator in assembly.generators):
                raise FormatError(path, f"assembly {name}", "operators", "none", "Download the file again.")
            return gemmi.make_assembly(assembly, structure[0], gemmi.HowToNameCopiedChain.Dup)
    names = ", ".join(assembly.name for assembly in structure.assemblies)
    raise FormatError(
        path,
        "assembly",
        f"one of {names}" if names else "none, as the file describes no assembly",
        repr(name),
        "Leave assembly out to read the asymmetric unit.",
    )


def _one_conformation(chain: gemmi.Chain) -> Iterator[tuple[gemmi.Residue, gemmi.Atom]]:
    """Atoms with their residues, one conformation each; residues of one number are alternatives to each other."""
    for _, group in itertools.groupby(chain, key=lambda residue: str(residue.seqid)):
        pairs = [(residue, atom) for residue in group for atom in residue]
        letters = _letters_kept(atom for _, atom in pairs if atom.has_altloc())
        yield from (pair for pair in pairs if not pair[1].has_altloc() or pair[1].altloc in letters)


def _letters_kept(atoms: Iterable[gemmi.Atom]) -> list[str]:
    conformations: dict[str, dict[str, float]] = {}
    for atom in atoms:
        conformations.setdefault(atom.altloc, {})[atom.name] = atom.occ
    best_first = sorted(conformations, key=lambda c: (-sum(conformations[c].values()) / len(conformations[c]), c))
    kept: list[str] = []
    names: set[str] = set()
    for letter in best_first:
        if names.isdisjoint(conformations[letter]):
            kept.append(letter)
            names.update(conformations[letter])
    return kept
