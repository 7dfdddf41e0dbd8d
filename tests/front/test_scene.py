"""Scenes from a description: everything is there, in its place, and nothing overlaps."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree

from cryosim import config as configuration
from cryosim.config import RunConfig
from cryosim.core.rotation import rotation_z
from cryosim.io.examples import example_path
from cryosim.io.files import FormatError
from cryosim.io.structure import read_atoms
from cryosim.scene import MATTER, Structures, build_specimen, catalogue
from cryosim.specimen.atoms import CLASSES
from cryosim.specimen.filaments import ACTIN
from cryosim.specimen.molecular_shape import molecular_shape
from cryosim.specimen.solids import surface_height

GAP = 5.0
PLAIN = {
    "size": [400, 380, 240],
    "ice": {"thickness": 300},
    "gap": GAP,
    "molecules": [{"structure": "ubiquitin", "copies": 12}],
}
SPHERE = {"shape": "sphere", "radius": 80, "spacing": 11, "embedded": [{"copies": 6}]}


def described(seed: int = 1, **specimen: Any) -> RunConfig:
    return RunConfig.model_validate({"seed": seed, "specimen": PLAIN | specimen})


def built(seed: int = 1, base: Any = ".", **specimen: Any):
    return build_specimen(described(seed, **specimen), base, torch.Generator().manual_seed(seed))


def things(specimen):
    """(name, kind, positions (atom, 3) [Å], standard deviation of the sites [Å]) of every copy."""
    for atoms, poses, name, kind in zip(
        specimen.molecules, specimen.poses, specimen.names, specimen.kinds, strict=True
    ):
        sigma = math.sqrt(float(atoms.b_factors.max()) / (8 * math.pi**2)) if len(atoms) else 0.0
        for rotation, position in zip(poses.rotations, poses.positions, strict=True):
            yield name, kind, (atoms.positions.double() @ rotation.T + position).numpy(), sigma


def only(specimen, name):
    """Atoms and poses of the one molecule of a name."""
    (which,) = (i for i, other in enumerate(specimen.names) if other == name)
    return specimen.molecules[which], specimen.poses[which]


def check_room(specimen, size=None):
    """All lies in the box; no two things come nearer than the gap, but for subunits of filaments and lipids."""
    half = np.array(specimen.size if size is None else size) / 2
    seen = list(things(specimen))
    trees = [KDTree(places) for *_, places, _ in seen]
    for (name, kind, places, _), tree in zip(seen, trees, strict=True):
        assert len(places) and (np.abs(places) <= half + 1e-6).all(), (name, kind)
        assert tree.n == len(places)
    for i, j in itertools.combinations(range(len(seen)), 2):
        (one, first, _, spread), (other, second, places, wide) = seen[i], seen[j]
        if first == second == "filament":
            continue
        least = max(GAP, 2 * spread, 2 * wide)
        if {first, second} == {"membrane", "protein"}:
            least = 3.0  # a protein stands among lipids
        near, _ = trees[i].query(places, distance_upper_bound=least)
        assert near.min() >= least - 1e-6, (one, other)


# ---- membranes -------------------------------------------------------------------------------------------------------

SHAPES = {  # a section, and the height of places (x, y, z) above the surface that it describes [Å]
    "sphere": ({"radius": 85}, lambda x: x.norm(dim=1) - 85),
    "ellipsoid": (
        {"radius": 70, "aspect": [1, 1.2, 1.5]},
        lambda x: 82 * ((x / (70 * x.new_tensor([1, 1.2, 1.5]))).norm(dim=1) - 1),
    ),
    "torus": (
        {"radius": 100, "tube": 55},
        lambda x: torch.hypot(x[:, :2].norm(dim=1) - 100, x[:, 2]) - 55,
    ),
    "vesicle": ({"radius": 90, "amplitude": 0.1, "degree": 4}, lambda x: x.norm(dim=1) - 90),
    "patch": ({"radius": 90, "bending": 50}, lambda x: x[:, 2]),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_membrane_of_every_shape(shape):
    """With proteins in it and about it, cut off at the sides of the box."""
    section = {"shape": shape, "spacing": 12, "embedded": [{"copies": 5, "height": 4}]} | SHAPES[shape][0]
    specimen = built(membranes=[section])
    check_room(specimen)
    assert [*zip(specimen.names, specimen.kinds, strict=True)] == [
        ("membrane", "membrane"),
        ("ubiquitin", "protein"),
        ("ubiquitin", "protein"),
    ]
    assert 1 <= len(specimen.poses[1].positions) <= 5 and len(specimen.poses[2].positions) == 12
    heights = SHAPES[shape][1](specimen.molecules[0].positions.double())
    smooth = shape in ("sphere", "ellipsoid", "torus")
    assert float(heights.mean()) == pytest.approx(0, abs=2 if smooth else 15)
    assert float(heights.abs().max()) < (32 if smooth else 70)
    assert float(heights.std()) == pytest.approx(15.6, abs=1) if smooth else 10 < float(heights.std()) < 25
    if shape == "patch":
        sides = specimen.molecules[0].positions.abs().amax(0)[:2]
        assert 70 < float(sides.min()) and float(sides.max()) < 90 + 15


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 0, -2), (3, -4, 12)])
def test_proteins_in_a_membrane_stand_along_its_normal(axis):
    """Their axes point outwards from the centre of a sphere, their centres lie at the height above its radius."""
    guests = [{"copies": 7, "axis": axis, "height": 15}, {"structure": "apoferritin", "axis": (0, 1, 0)}]
    specimen = built(membranes=[SPHERE | {"embedded": guests}], size=[460, 460, 300], ice={"thickness": 320})
    centre = specimen.poses[0].positions[0]
    for which, along, height in ((1, axis, 15), (2, (0, 1, 0), 0)):
        poses = specimen.poses[which]
        outwards = poses.positions - centre
        assert outwards.norm(dim=1).tolist() == pytest.approx([80 + height] * len(outwards))
        up = torch.nn.functional.normalize(torch.tensor(along, dtype=torch.float64), dim=0)
        turned = poses.rotations @ up
        torch.testing.assert_close(turned, torch.nn.functional.normalize(outwards, dim=1), atol=1e-9, rtol=0)
        assert torch.linalg.det(poses.rotations).tolist() == pytest.approx([1] * len(outwards))
    check_room(specimen)


def test_lipids_give_way_to_proteins_that_are_there_and_to_no_others():
    """Where the side of the box leaves a protein out, the membrane is whole."""
    guests = {"embedded": [{"copies": 14}]}
    left_out = 0
    for seed in (1, 2):
        with_them, without = (
            built(seed, membranes=[SPHERE | {"radius": 100} | kind], size=[260, 260, 200], ice={"thickness": 220})
            for kind in (guests, {"embedded": []})
        )
        all_lipids, lipids = without.molecules[0].positions, with_them.molecules[0].positions
        torch.testing.assert_close(with_them.poses[0].positions, without.poses[0].positions)
        proteins = np.concatenate(
            [places for _, kind, places, _ in things(with_them) if kind == "protein"][:-12] or [[]]
        )
        there = all_lipids @ without.poses[0].rotations[0].T + without.poses[0].positions[0]
        near = np.full(len(there), np.inf) if not proteins.size else KDTree(proteins).query(there.numpy())[0]
        assert len(lipids) == int((near >= 3.0).sum())
        left_out += 14 - len(with_them.poses[1].positions)
    assert left_out > 2


def test_two_files_of_one_name_stay_apart(tmp_path):
    """The same name in other folders, or another assembly, is another molecule."""
    for name, structure in (("a", "ubiquitin"), ("b", "apoferritin")):
        (tmp_path / name).mkdir()
        source = example_path(structure)
        (tmp_path / name / f"mine{''.join(source.suffixes)}").write_bytes(source.read_bytes())
    files = [next((tmp_path / name).iterdir()).relative_to(tmp_path) for name in "ab"]
    membranes = [SPHERE | {"radius": 70, "embedded": [{"structure": str(f), "copies": 2}]} for f in files]
    specimen = built(base=tmp_path, membranes=membranes, size=[600, 600, 300], ice={"thickness": 330})
    sizes = {len(m) for m, name in zip(specimen.molecules, specimen.names, strict=True) if name == "mine"}
    assert sizes == {len(read_atoms(tmp_path / f)) for f in files}


# ---- filaments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "rise", "twist", "cyclic"),
    [
        ({"rise": 14.0, "twist": 40.0, "cyclic": 2, "persistence": None}, 14.0, 40.0, 2),
        ({"rise": 27.6, "twist": -166.6, "persistence": None}, 27.6, -166.6, 1),
        ({"symmetry": "actin"}, ACTIN.rise, ACTIN.twist, 1),
    ],
)
def test_a_filament_has_its_symmetry(section, rise, twist, cyclic):
    """From one subunit to the next, seen from the first: the screw, taken about an axis that lies an offset away."""
    filament = {"offset": 30, "length": 300, "copies": 1} | section
    specimen = built(filaments=[filament], size=[700, 700, 240])
    poses = specimen.poses[0]
    assert (specimen.names[0], specimen.kinds[0]) == ("ubiquitin", "filament")
    n = len(poses.positions)
    assert 4 <= n <= cyclic * math.floor(300 / rise + 1e-6) and (poses.instances == 0).all()
    c = torch.tensor([30.0, 0, 0], dtype=torch.float64)
    wanted = rotation_z(twist) @ c - c + torch.tensor([0, 0, rise], dtype=torch.float64)
    bend = 0.01 if section.get("symmetry") == "actin" else 1e-9  # sqrt(rise / persistence) is 0.017
    along = poses.rotations[0, :, 2]
    height = (poses.positions - poses.positions[0]) @ along
    pairs = [
        (i, j)
        for i, j in itertools.permutations(range(n), 2)
        if abs(float(height[j] - height[i]) - rise) < rise / 4
        and float((poses.rotations[i].T @ poses.rotations[j] - rotation_z(twist)).abs().max()) < 10 * bend
    ]
    assert len(pairs) >= n // cyclic - 1
    for i, j in pairs:
        step = poses.rotations[i].T @ (poses.positions[j] - poses.positions[i])
        torch.testing.assert_close(step, wanted, atol=1 if bend > 1e-3 else 1e-6, rtol=0)


def test_a_microtubule_has_thirteen_protofilaments_about_its_axis():
    filament = {"symmetry": "microtubule", "offset": 110, "length": 250}
    specimen = built(filaments=[filament], size=[900, 900, 330], ice={"thickness": 340})
    poses = specimen.poses[0]
    check_room(specimen)
    axis = poses.rotations[:, :, 2].mean(0)
    on_axis = poses.positions - 110 * poses.rotations[:, :, 0]
    aside = on_axis - on_axis.mean(0)
    assert float((aside - (aside @ axis)[:, None] * axis).norm(dim=1).max()) < 1  # its persistence length is 1 mm
    assert len(poses.positions) == 39
    spokes = poses.rotations[:, :, 0] @ poses.rotations[0]
    azimuth = torch.atan2(spokes[:, 1], spokes[:, 0]) / (2 * math.pi) * 13
    assert sorted(torch.remainder(azimuth.round(), 13).tolist()) == sorted([float(i) for i in range(13)] * 3)
    assert float((azimuth - azimuth.round()).abs().max()) < 0.05


def test_the_axis_of_a_file_is_its_z_wherever_along_it_the_subunit_stands(tmp_path):
    lines = []
    for line in example_path("ubiquitin").read_text().splitlines():
        if line.startswith(("ATOM", "HETATM")):
            x, y, z = (float(line[i : i + 8]) for i in (30, 38, 46))
            line = f"{line[:30]}{x:8.3f}{y:8.3f}{z + 500:8.3f}{line[54:]}"
        lines.append(line)
    (tmp_path / "far.pdb").write_text("\n".join(lines) + "\n")
    mine = read_atoms(tmp_path / "far.pdb")
    centre = mine.positions[0] - mine.centred().positions[0]
    filament = {"structure": "far.pdb", "persistence": None, "length": 150}
    specimen = built(base=tmp_path, filaments=[filament], size=[500, 500, 240])
    poses = specimen.poses[0]
    centre[2] = 0
    on_axis = poses.positions - poses.rotations @ centre
    along = poses.rotations[0, :, 2]
    aside = on_axis - on_axis[0]
    assert float((aside - (aside @ along)[:, None] * along).norm(dim=1).max()) < 1e-9
    check_room(specimen)


def test_filaments_cross_neither_each_other_nor_what_stands_there():
    """Each is an instance; those of two sections count for themselves."""
    specimen = built(
        size=[500, 480, 260],
        ice={"thickness": 280},
        membranes=[SPHERE],
        carbon={"thickness": 50, "hole_radius": 500, "hole_centre": [380, 0]},
        filaments=[
            {"offset": 20, "length": 250, "copies": 3, "name": "fibre"},
            {"symmetry": "actin", "offset": 25, "length": 200, "copies": 2},
        ],
    )
    check_room(specimen)
    assert specimen.names == ("carbon film", "membrane", "ubiquitin", "fibre", "ubiquitin", "ubiquitin")
    assert specimen.kinds == ("carbon", "membrane", "protein", "filament", "filament", "protein")
    trees = []
    for which in (3, 4):
        atoms, poses = specimen.molecules[which], specimen.poses[which]
        assert poses.instances is not None and poses.instances.unique().tolist() == [[0, 1, 2], [0, 1]][which - 3]
        places = torch.einsum("cij,aj->cai", poses.rotations, atoms.positions.double()) + poses.positions[:, None]
        trees += [KDTree(places[poses.instances == i].reshape(-1, 3)) for i in poses.instances.unique()]
    for one, other in itertools.combinations(trees, 2):
        assert one.query(other.data, distance_upper_bound=GAP)[0].min() >= GAP


# ---- solids ----------------------------------------------------------------------------------------------------------


def test_gold_and_film_and_membrane_and_filament_and_proteins():
    """All at once, on a film with a hole that the field's edge lies in."""
    specimen = built(
        size=[560, 540, 260],
        ice={"thickness": 300},
        carbon={"thickness": 60, "hole_radius": 700, "hole_centre": [500, 100], "height": -20},
        membranes=[SPHERE],
        filaments=[{"offset": 20, "length": 200, "name": "fibre"}],
        gold={"copies": 3, "diameter": 50},
    )
    check_room(specimen)
    assert set(zip(specimen.names, specimen.kinds, strict=True)) == {
        ("carbon film", "carbon"),
        ("membrane", "membrane"),
        ("ubiquitin", "protein"),
        ("fibre", "filament"),
        ("gold bead", "gold"),
    }
    film, _ = only(specimen, "carbon film")
    assert float(film.positions[:, 2].mean()) == pytest.approx(-20, abs=1)
    away = (film.positions[:, :2] - torch.tensor([500.0, 100.0])).norm(dim=1)
    assert float(away.min()) > 700 - 30
    beads, where = only(specimen, "gold bead")
    assert len(where.positions) == 3 and (beads.numbers == 79).all()
    assert (beads.classes == CLASSES.index("solid")).all() and (film.classes == CLASSES.index("solid")).all()


def test_platinum_follows_the_wedge_and_what_settles_stands_outside_the_ice():
    config = described(
        lamella={"wedge": 5, "direction": 30, "curtains": 2, "platinum": 40},
        contamination={"crystals": 6, "radii": [40, 60]},
        ice={"thickness": 420},
    )
    specimen = build_specimen(config, ".", torch.Generator().manual_seed(2))
    ice = configuration.ice(config)
    assert specimen.names == ("ubiquitin", "platinum", "ice crystals")
    assert specimen.kinds == ("protein", "platinum", "ice")
    layer, crystals = only(specimen, "platinum")[0].positions, only(specimen, "ice crystals")[0].positions
    assert ice is not None
    above = layer[:, 2] - surface_height(ice, layer, 1.0)
    assert float(above.min()) > 0 and float(above.max()) < 40
    assert float(above.mean()) == pytest.approx(20, abs=1)
    along = layer[:, :2] @ torch.tensor([math.cos(math.radians(30)), math.sin(math.radians(30))]).double()
    slope = float(
        ((along - along.mean()) * (layer[:, 2] - layer[:, 2].mean())).sum() / (along - along.mean()).square().sum()
    )
    assert slope == pytest.approx(math.tan(math.radians(2.5)), rel=0.1)  # half of the wedge on either side
    top = crystals[:, 2] > 0
    assert top.any() and (~top).any()
    assert bool((crystals[top][:, 2] > surface_height(ice, crystals[top], 1.0) + 40).all())  # on the platinum
    assert bool((-crystals[~top][:, 2] > surface_height(ice, crystals[~top], -1.0)).all())
    for name in ("platinum", "ice crystals"):
        assert (only(specimen, name)[0].classes == CLASSES.index("deposit")).all()
    protein, poses = only(specimen, "ubiquitin")
    places = torch.einsum("cij,aj->cai", poses.rotations, protein.positions.double()) + poses.positions[:, None]
    for side in (1.0, -1.0):
        assert bool((side * places[..., 2].flatten() < surface_height(ice, places.reshape(-1, 3), side)).all())


def test_without_ice_nothing_settles_on_it():
    with pytest.raises(ValueError, match="which stand on it"):
        described(ice=None, lamella={"platinum": 10})
    assert build_specimen(described(ice=None), ".", torch.Generator()).ice is None


# ---- crowds ----------------------------------------------------------------------------------------------------------


def test_an_occupancy_is_filled_in_proportion():
    """By volume, of the box; beads are not molecules."""
    molecules = [
        {"structure": "ubiquitin", "abundance": 3},
        {"structure": "ubiquitin", "abundance": 1, "name": "other"},
        {"structure": "apoferritin", "copies": 1, "name": "monomer"},
    ]
    specimen = built(molecules=molecules, occupancy=0.1, gold={"copies": 2, "diameter": 60}, size=[180, 170, 160])
    check_room(specimen)
    copies = {name: len(p.positions) for name, p in zip(specimen.names, specimen.poses, strict=True)}
    assert copies["monomer"] == 1 and copies["ubiquitin"] == pytest.approx(3 * copies["other"], abs=2)
    filled = sum(
        molecular_shape(atoms).volume * len(poses.positions)
        for atoms, poses, kind in zip(specimen.molecules, specimen.poses, specimen.kinds, strict=True)
        if kind == "protein"
    )
    assert filled / (180 * 170 * 160) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize(("side", "sides"), [("top", [1]), ("bottom", [-1]), ("both", [-1, 1])])
def test_molecules_stick_to_the_interface(side, sides):
    interface = {"fraction": 1, "side": side, "depth": 12, "axis": [0, 1, 0], "spread": 5}
    specimen = built(
        molecules=[{"structure": "ubiquitin", "copies": 8, "interface": interface}], ice={"thickness": 240}
    )
    found = set()
    for _, _, places, _ in things(specimen):
        up = 1 if places[:, 2].mean() > 0 else -1
        found.add(up)
        assert 0 <= 120 - (up * places[:, 2]).max() <= 12 + 1e-9
    assert sorted(found) == sides
    poses = specimen.poses[0]
    cosines = poses.rotations[:, 2, 1] * poses.positions[:, 2].sign()  # the molecule's y against the normal
    assert float(cosines.min()) > math.cos(math.radians(5 * 5))


def test_nothing_but_ice():
    specimen = built(molecules=[{"structure": "ubiquitin", "copies": 0}])
    assert [len(p.positions) for p in specimen.poses] == [0] and specimen.ice is not None


# ---- seeds, numbers, errors ------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "size": [420, 400, 240],
    "ice": {"thickness": 280},
    "membranes": [SPHERE | {"shape": "patch", "radius": 60}],
    "filaments": [{"offset": 20, "length": 150}],
    "gold": {"copies": 1, "diameter": 40},
    "carbon": {"thickness": 40, "hole_radius": 400, "hole_centre": [330, 0]},
    "lamella": {"wedge": 1, "platinum": 20},
    "contamination": {"crystals": 1, "radii": [30, 40]},
}


def flat(value):
    """All tensors in a record."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in flat(part)]
    return [t for part in vars(value).values() for t in flat(part)] if hasattr(value, "__dict__") else []


def test_structures_that_were_read_serve_many_scenes(monkeypatch):
    read, names = Structures("."), []
    monkeypatch.setattr("cryosim.scene.read_atoms", lambda *a, **k: names.append(a[0].name) or read_atoms(*a, **k))
    both = [build_specimen(described(seed), read, torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert len(names) == 1
    assert torch.equal(both[0].molecules[0].positions, both[1].molecules[0].positions)
    assert torch.equal(both[0].poses[0].positions, built(1).poses[0].positions)


def test_molecules_of_one_file_are_told_apart_by_their_chains():
    molecules = [{"structure": "apoferritin", "name": "one", "chains": ["A"], "copies": 1}]
    specimen = built(molecules=molecules)
    assert len(specimen.molecules[0]) == len(read_atoms(example_path("apoferritin"), chains=["A"]))
    with pytest.raises(FormatError, match="chains: expected some of A"):
        built(molecules=[molecules[0] | {"chains": ["Q"]}])


def test_fewer_tries_leave_a_scene_emptier():
    crowded = {"molecules": [{"structure": "ubiquitin", "abundance": 1}], "occupancy": 0.5, "size": [100, 100, 100]}
    with pytest.warns(UserWarning, match="no room left"):
        few, many = (len(built(**crowded, tries=tries).poses[0].positions) for tries in (100, 20000))
    assert few < many


def test_the_seed_decides_everything():
    one, again, other = built(1, **EVERYTHING), built(1, **EVERYTHING), built(2, **EVERYTHING)
    assert one.names == again.names and len(flat(one)) > 50
    assert all(torch.equal(a, b) for a, b in zip(flat(one), flat(again), strict=True))
    for a, b in zip(one.molecules, other.molecules, strict=False):
        if len(a) == len(b) and (a.classes >= CLASSES.index("solid")).any():
            assert not torch.equal(a.positions, b.positions)
    assert all(
        not torch.equal(a.positions, b.positions)
        for a, b, kind in zip(one.poses, other.poses, one.kinds, strict=True)
        if kind in ("membrane", "filament", "gold", "protein")
    )


def test_numbers_of_the_catalogue_do_not_depend_on_what_there_is():
    sparse: Any = {
        "membranes": [SPHERE | {"copies": 0, "embedded": [{"structure": "folder/3xyz.cif.gz", "copies": 0}]}]
    }
    numbers = catalogue(described(**sparse, filaments=[{"name": "fibre", "copies": 0}]))
    assert list(numbers) == [*MATTER, "ubiquitin", "3xyz", "fibre"]
    assert list(numbers.values()) == list(range(1, 9))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"molecules": [{"name": "membrane"}]}, "other names than .*'membrane'"),
        ({"molecules": [{"name": f"m{i}"} for i in range(260)]}, "at most 250 names"),
        (
            {"membranes": [{"shape": "sphere", "radius": 90, "copies": 6}]},
            r"specimen.membranes: number \d, .*no free place",
        ),
        ({"membranes": [{"shape": "sphere", "radius": 20}]}, "radii of curvature above"),
        ({"membranes": [{"shape": "torus", "radius": 50, "tube": 60}]}, "[Tt]orus"),
        ({"filaments": [{"symmetry": "microtubule", "offset": 112, "length": 300}]}, "Å wide does not lie in a box"),
        ({"filaments": [{"offset": 20, "length": 20}]}, "helix: .*length"),
        ({"size": [99, 99, 99], "gold": {"copies": 4, "diameter": 60}}, "of 4 of gold bead found no free place"),
        ({"carbon": {"thickness": 40, "hole_centre": [0, 0]}}, "leaves nothing"),
        ({"ice": {"thickness": 230}}, "does not lie inside ice"),
        (
            {"ice": {"thickness": 250}, "carbon": {"thickness": 200, "height": 20}, "lamella": {"wedge": 5}},
            "film of 200 Å about 20 Å does not lie in ice that is 233",
        ),
        ({"ice": {"thickness": 320}, "lamella": {"wedge": 20}}, "specimen.lamella.wedge"),
        ({"ice": {"thickness": 250}, "lamella": {"wedge": 5}}, "ice 233.* Å thick"),  # 190 Å from the middle
        ({"molecules": [{"interface": {"fraction": 1}, "structure": "ubiquitin"}]}, "below the surface of the ice"),
    ],
)
def test_what_cannot_be_is_said(changes, said):
    with pytest.raises(ValueError, match=said):
        built(**changes)


def test_a_missing_structure_is_found_before_anything_is_placed():
    with pytest.raises(FormatError, match="none.pdb"):
        built(membranes=[{"radius": 20}], molecules=[{"structure": "none.pdb"}])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"molecules": [{"interface": {"axis": [0, 0, 0]}}]}, "expected a direction"),
        ({"membranes": [{"embedded": [{"axis": [0, 0, 0]}]}]}, "expected a direction"),
        ({"membranes": [{"aspect": [1, 0, 1]}]}, "greater than 0"),
        ({"carbon": {"thickness": 40, "height": 140}}, "film.*in the ice"),
        ({"contamination": {"crystals": 1, "radii": [50, 20]}}, "in order"),
        ({"molecules": [{"abundance": 1}]}, "both or none of specimen.occupancy"),
        ({"occupancy": 0.1}, "both or none of specimen.occupancy"),
    ],
)
def test_what_is_described_wrongly_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        described(**changes)
