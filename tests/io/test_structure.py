"""Structure files: what they say, exactly, or an error."""

import gzip

import pytest
import torch

from cryosim.io.examples import example_path
from cryosim.io.files import FormatError
from cryosim.io.structure import read_atoms

CIF = """data_test
loop_
_pdbx_struct_assembly.id
_pdbx_struct_assembly.details
_pdbx_struct_assembly.method_details
_pdbx_struct_assembly.oligomeric_details
_pdbx_struct_assembly.oligomeric_count
half author_defined_assembly ? monomeric 1
pair author_defined_assembly ? dimeric 2
loop_
_pdbx_struct_assembly_gen.assembly_id
_pdbx_struct_assembly_gen.oper_expression
_pdbx_struct_assembly_gen.asym_id_list
half 1 A
pair 1,2 A
loop_
_pdbx_struct_oper_list.id
_pdbx_struct_oper_list.type
_pdbx_struct_oper_list.matrix[1][1]
_pdbx_struct_oper_list.matrix[1][2]
_pdbx_struct_oper_list.matrix[1][3]
_pdbx_struct_oper_list.vector[1]
_pdbx_struct_oper_list.matrix[2][1]
_pdbx_struct_oper_list.matrix[2][2]
_pdbx_struct_oper_list.matrix[2][3]
_pdbx_struct_oper_list.vector[2]
_pdbx_struct_oper_list.matrix[3][1]
_pdbx_struct_oper_list.matrix[3][2]
_pdbx_struct_oper_list.matrix[3][3]
_pdbx_struct_oper_list.vector[3]
1 'identity operation' 1 0 0 0 0 1 0 0 0 0 1 0
2 'point symmetry operation' -1 0 0 10 0 -1 0 0 0 0 1 0
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_seq_id
_atom_site.auth_seq_id
_atom_site.auth_asym_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
ATOM 1 N N . GLY A 1 1 A 1.25 2.5(3) 3.75 1.0 12.5
ATOM 2 C CA . GLY A 1 1 A {x} 2.5 3.75 {occupancy} {b}
"""


def pdb(
    number=1, name=" CA ", alt=" ", residue="ALA", x="   1.000", occupancy="  1.00", b=" 20.00", element=" C", seq=1
):
    atom = f"ATOM  {number:5d} {name}{alt}{residue} A{seq:4d}    "
    return f"{atom}{x:>8}   2.000   3.000{occupancy}{b}          {element}\n"


def written(folder, text, name="test.pdb"):
    path = folder / name
    path.write_text(text)
    return path


def test_ubiquitin_is_read_as_deposited():
    atoms = read_atoms(example_path("ubiquitin"))
    everything = read_atoms(example_path("ubiquitin"), waters=True)
    assert (len(atoms), len(everything)) == (602, 683)
    assert atoms.positions.dtype == torch.float64
    first = next(line for line in example_path("ubiquitin").read_text().splitlines() if line.startswith("ATOM"))
    assert atoms.positions[0].tolist() == [float(first[30:38]), float(first[38:46]), float(first[46:54])]
    assert sorted(set(everything.numbers.tolist())) == [6, 7, 8, 16]


def test_apoferritin_has_24_subunits_and_octahedral_symmetry():
    path = example_path("apoferritin")
    one, all_ = read_atoms(path), read_atoms(path, assembly=1)
    assert (len(one), len(all_)) == (1359, 24 * 1359)
    centred = all_.positions - all_.positions.mean(0)
    assert centred.norm(dim=1).max() < 70  # a shell 12 nm across
    assert centred.norm(dim=1).min() > 25
    for turn in ([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], [[0.0, 0, 1], [1, 0, 0], [0, 1, 0]]):  # 4-fold and 3-fold
        moved = centred[:1359] @ torch.tensor(turn, dtype=torch.float64).T
        assert torch.cdist(moved, centred).min(1).values.max() < 2e-3  # coordinates have three decimals


def test_plain_and_gz_agree(tmp_path):
    path = tmp_path / "a.pdb.gz"
    path.write_bytes(gzip.compress(example_path("ubiquitin").read_bytes()))
    torch.testing.assert_close(read_atoms(path).positions, read_atoms(example_path("ubiquitin")).positions)


def test_mmcif_and_its_assemblies(tmp_path):
    path = written(tmp_path, CIF.format(x=-1.5, occupancy=0.5, b=30), "a.cif")
    atoms = read_atoms(path)
    assert atoms.positions.tolist() == [[1.25, 2.5, 3.75], [-1.5, 2.5, 3.75]]
    assert (atoms.occupancies.tolist(), atoms.b_factors.tolist()) == ([1.0, 0.5], [12.5, 30.0])
    assert len(read_atoms(path, assembly="half")) == 2
    pair = read_atoms(path, assembly="pair")
    assert pair.positions[2:].tolist() == [[8.75, -2.5, 3.75], [11.5, -2.5, 3.75]]
    with pytest.raises(FormatError, match="assembly: expected one of half, pair, got '3'"):
        read_atoms(path, assembly=3)
    path.write_text(path.read_text().replace("_pdbx_struct_oper_list.type", "_pdbx_struct_oper_list.kind"))
    with pytest.raises(FormatError, match="assembly pair: expected operators"):
        read_atoms(path, assembly="pair")


def test_the_better_conformation_is_kept_whole(tmp_path):
    text = "".join(
        pdb(i, name, alt, x=f"{i}.000", occupancy=occupancy, seq=seq)
        for i, (name, alt, occupancy, seq) in enumerate(
            [
                (" CA ", " ", "  1.00", 1),
                (" CB ", "A", "  0.40", 1),
                (" CB ", "B", "  0.60", 1),
                (" CG ", "A", "  0.40", 1),
                (" CG ", "B", "  0.60", 1),
                (" CB ", "A", "  0.50", 2),  # equal: the first letter
                (" CB ", "B", "  0.50", 2),
            ]
        )
    )
    atoms = read_atoms(written(tmp_path, text))
    assert atoms.positions[:, 0].tolist() == [0, 2, 4, 5]
    assert atoms.occupancies.tolist() == pytest.approx([1.0, 0.6, 0.6, 0.5])  # the file's own


def test_two_residues_in_one_place_are_alternatives(tmp_path):
    text = pdb(1, alt="A", residue="SER", occupancy="  0.30", x="1.000") + pdb(
        2, alt="B", residue="THR", occupancy="  0.70", x="2.000"
    )
    assert read_atoms(written(tmp_path, text)).positions[:, 0].tolist() == [2.0]


def test_choices_of_what_to_keep(tmp_path):
    text = pdb(1) + pdb(2, " HA ", element=" H")
    text += pdb(3, " O  ", residue="HOH", element=" O", seq=2).replace("ATOM  ", "HETATM")
    text += pdb(4, "NA  ", residue=" NA", element="NA", seq=3).replace("ATOM  ", "HETATM")
    path = written(tmp_path, text)
    assert read_atoms(path).numbers.tolist() == [6, 1, 11]
    assert read_atoms(path, waters=True, hydrogens=False, ligands=False).numbers.tolist() == [6, 8]


def test_only_the_first_model_is_read(tmp_path):
    text = f"MODEL        1\n{pdb()}ENDMDL\nMODEL        2\n{pdb()}{pdb(2)}ENDMDL\nEND\n"
    assert len(read_atoms(written(tmp_path, text))) == 1


def test_what_is_left_out_has_a_stated_value(tmp_path):
    short = read_atoms(written(tmp_path, pdb()[:54] + "\n"))
    blank = read_atoms(written(tmp_path, pdb(occupancy="      ", b="      ")))
    for atoms in (short, blank):
        assert (atoms.occupancies.tolist(), atoms.b_factors.tolist()) == ([1.0], [0.0])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"x": "  xx.xxx"}, "line 2, x"),
        ({"x": "     nan"}, "line 2, x"),
        ({"x": "     inf"}, "line 2, x"),
        ({"x": "  1.0e06"}, "line 2, x"),
        ({"x": "        "}, "line 2, x"),
        ({"occupancy": "  1.50"}, "line 2, occupancy"),
        ({"occupancy": " -0.10"}, "line 2, occupancy"),
        ({"occupancy": "   nan"}, "line 2, occupancy"),
        ({"b": " -1.00"}, "line 2, B-factor"),
        ({"b": "   abc"}, "line 2, B-factor"),
        ({"b": "   nan"}, "line 2, B-factor"),
        ({"element": "QQ"}, "line 2, element"),
        ({"element": " X"}, "line 2, element"),
        ({"element": "ES"}, "element of atom"),
    ],
)
def test_bad_pdb_columns_are_named(tmp_path, change, field):
    path = written(tmp_path, pdb() + pdb(2, **change))
    with pytest.raises(FormatError, match="test.pdb") as caught:
        read_atoms(path)
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"x": "xx"}, "_atom_site.Cartn_x, row 2"),
        ({"x": "?"}, "_atom_site.Cartn_x, row 2"),
        ({"x": "1e6"}, "_atom_site.Cartn_x, row 2"),
        ({"occupancy": "2"}, "_atom_site.occupancy, row 2"),
        ({"b": "-3"}, "_atom_site.B_iso_or_equiv, row 2"),
        ({"b": "nan"}, "_atom_site.B_iso_or_equiv, row 2"),
    ],
)
def test_bad_mmcif_values_are_named(tmp_path, change, field):
    path = written(tmp_path, CIF.format(**({"x": 1, "occupancy": 1, "b": 1} | change)), "test.cif")
    with pytest.raises(FormatError, match="test.cif") as caught:
        read_atoms(path)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.pdb", ""),
        ("a.pdb", "nothing of the kind\n"),
        ("a.pdb", "ATOM      1  CA  ALA A   1       1.0\n"),
        ("a.cif", "nothing of the kind\n"),
        ("a.cif", "data_x\n_cell.length_a 1\n"),
        ("a.cif", "data_x\nloop_\n_atom_site.Cartn_x\n_atom_site.Cartn_y\n1 2 3\n"),
        ("a.cif", "data_x\nloop_\n_atom_site.Cartn_x\n1\n2\n"),
        ("a.xyz", "C 1 2 3\n"),
        ("a.pdb", "\x00\x01\x02" * 100),
    ],
)
def test_files_without_atoms_are_refused(tmp_path, name, text):
    with pytest.raises(FormatError, match=name):
        read_atoms(written(tmp_path, text, name))


def test_chains_are_kept_by_name_and_before_an_assembly_is_built(tmp_path):
    """In the order of the file: one chain is a part of the whole, and 24 copies of it are 24 times as many atoms."""
    path = example_path("apoferritin")
    whole = read_atoms(path)
    one = read_atoms(path, chains=["A"])
    assert torch.equal(one.positions, whole.positions[: len(one)])
    assert len(read_atoms(path, assembly=1, chains=["A"])) == 24 * len(one)


@pytest.mark.parametrize("chains", [["Z"], [], ["A", "nothing"]])
def test_a_chain_that_is_not_there_is_named(chains):
    with pytest.raises(FormatError, match="chains: expected some of A"):
        read_atoms(example_path("apoferritin"), chains=chains)
