"""What is written beside a series: read by libraries that are not ours, and held against the specimen."""

import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import mdocfile
import mrcfile
import numpy as np
import pytest
import starfile
import torch
import zarr

import cryosim.products
import cryosim.run
from cryosim import config as configuration
from cryosim.acquisition.simulate import simulate
from cryosim.config import RunConfig
from cryosim.core.rotation import rotation_y, rotation_z
from cryosim.io.specimen import read_specimen
from cryosim.products import particles
from cryosim.run import RunFiles, run
from cryosim.scene import MATTER, build_specimen, catalogue
from cryosim.specimen.atoms import Atoms, Poses
from cryosim.specimen.specimen import Specimen

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cryoet_alignment.io.aretomo3 import AreTomo3ALN
    from cryoet_alignment.io.imod import ImodTLT, ImodXF
    from cryoet_alignment.io.relion import RelionAlignment
    from cryoet_alignment.io.warp import WarpAlignment

ALL = ["alignments", "halves", "clean", "labels", "tomogram", "zarr", "copick", "specimen"]
SCENE = {
    "size": [420, 410, 200],
    "ice": {"thickness": 240},
    "molecules": [{"structure": "apoferritin", "copies": 6}, {"structure": "ubiquitin", "copies": 4}],
    "membranes": [{"shape": "sphere", "radius": 70, "spacing": 12, "embedded": [{"copies": 2}]}],
    "filaments": [{"offset": 20, "length": 200, "name": "a fibre", "copies": 2}],
    "gold": {"copies": 1, "diameter": 60},
}
PLAIN = {
    "name": "upright",
    "seed": 5,
    "specimen": SCENE,
    "tilts": {"extent": 40, "step": 40, "total_dose": 240, "angle_error": 0.7, "shift_error": 9},
    "detector": {"shape": [48, 49], "pixel_size": 10},
    "optics": {"defocus": 25000},
    "output": {"files": ALL},
}
TURNED = {
    "name": "turned",
    "seed": 6,
    "specimen": SCENE | {"size": [400, 420, 200]},
    "tilts": {"extent": 40, "step": 40, "total_dose": 240, "axis_angle": -85, "angle_error": 0.5, "shift_error": 6},
    "detector": {"shape": [97, 95], "pixel_size": 5},
    "optics": {"defocus": 25000},
    "output": {"files": ALL, "binning": 2},
}


def tables(path: Path) -> dict[str, Any]:
    """Blocks of a STAR file, by name."""
    return starfile.read(path, always_dict=True)  # type: ignore[return-value]


class Whole(NamedTuple):
    """A run, what it was of, and what it wrote."""

    config: RunConfig
    folder: Path
    files: RunFiles
    specimen: Specimen
    state: torch.Tensor

    def mrc(self, ending: str) -> np.ndarray:
        return mrcfile.read(self.folder / f"{self.config.name}{ending}")

    @property
    def nominal(self) -> np.ndarray:
        """Of the sections [deg]."""
        return np.arange(-40, 41, 40.0)

    @property
    def order(self) -> list[int]:
        """Exposure of each section."""
        return torch.argsort(configuration.tilt_scheme(self.config.tilts).angles).tolist()


def made(description: dict, folder: Path) -> Whole:
    """A run; the state of its generator is kept as it was when the specimen had been drawn."""
    config, states = RunConfig.model_validate(description), []

    def build(config, base, generator, *rest):
        specimen = build_specimen(config, base, generator, *rest)
        states.append(generator.get_state())
        return specimen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cryosim.run, "build_specimen", build)
        files = run(config, folder)
    return Whole(config, folder, files, read_specimen(folder / f"{config.name}_specimen.npz"), *states)


@pytest.fixture(scope="module")
def upright(tmp_path_factory) -> Whole:
    return made(PLAIN, tmp_path_factory.mktemp("runs") / "item")


@pytest.fixture(scope="module", params=["upright", "turned"])
def whole(request, upright, tmp_path_factory) -> Whole:
    """Two runs; the axis of the other lies along x, its sizes are odd, and its voxels are two pixels wide."""
    return upright if request.param == "upright" else made(TURNED, tmp_path_factory.mktemp("runs") / "item")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- all files -------------------------------------------------------------------------------------------------------


def test_every_file_is_named_and_every_named_file_is_there(whole):
    written = whole.files.written()
    assert len(set(written)) == len(written) and all(path.exists() for path in written)
    told = {path for path in written if path.is_file()}
    told |= {file for path in written if path.is_dir() for file in path.rglob("*") if file.is_file()}
    name = whole.config.name
    told |= {whole.folder / f"{name}{ending}" for ending in (".mrc.mdoc", ".rawtlt", ".tlt")}
    assert {path for path in whole.folder.rglob("*") if path.is_file()} == told
    endings = {path.name.removeprefix(name) for path in written if path.name.startswith(name)}
    assert set(cryosim.products.ENDINGS) < endings


def test_mrcfile_finds_nothing_wrong(whole, capsys):
    found = sorted(whole.folder.glob("*.mrc"))
    assert len(found) == 9
    for path in found:
        assert mrcfile.validate(path), capsys.readouterr().out


def test_the_same_seed_gives_the_same_bytes(upright, tmp_path):
    again = made(PLAIN, tmp_path / "item")
    one, other = content(upright.folder), content(again.folder)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


# ---- geometry --------------------------------------------------------------------------------------------------------


def bead(whole: Whole) -> np.ndarray:
    """Where the gold bead stands (x, y, z) [Å]."""
    return whole.specimen.poses[whole.specimen.names.index("gold bead")].positions[0].numpy()


def seen(whole: Whole, section: int) -> np.ndarray:
    """Where the gold bead is seen (x, y) [px]: the centre of what is darkest."""
    image = whole.mrc("_projections.mrc")[section].astype(float)
    y, x = np.unravel_index(image.argmax(), image.shape)
    reach = round(50 / whole.config.detector.pixel_size)
    spot = image[y - reach : y + reach + 1, x - reach : x + reach + 1]
    spot = (spot - 0.4 * spot.max()).clip(0)
    rows, columns = np.indices(spot.shape)
    return np.array([(columns * spot).sum(), (rows * spot).sum()]) / spot.sum() + [x - reach, y - reach]


def test_relion_finds_the_bead(whole):
    """By its projection: n // 2 + shift / pixel + [R_z R_y R_x (q - N // 2)]_xy, counted from 0."""
    tomogram = tables(whole.folder / "tomograms.star")["global"].iloc[0]
    path = whole.folder / tomogram.rlnTomoTiltSeriesStarFile
    table = tables(path)[whole.config.name]
    pixel, detector = whole.config.detector.pixel_size, whole.config.detector.shape
    assert tomogram.rlnTomoTiltSeriesPixelSize == pixel and tomogram.rlnTomoName == whole.config.name
    nz, ny, nx = configuration.volume_grid(whole.config)[0]
    sizes = [tomogram[f"rlnTomoSize{axis}"] for axis in "XYZ"]
    assert sizes == pytest.approx([n * whole.config.output.binning for n in (nx, ny, nz)], abs=1)
    assert table.rlnTomoNominalStageTiltAngle.tolist() == whole.nominal.tolist()
    assert table.rlnMicrographPreExposure.tolist() == [160, 0, 80]
    assert (table.rlnTomoXTilt == 0).all() and (table.rlnDefocusU == 25000).all()
    for section, row in table.iterrows():
        assert row.rlnMicrographName.startswith(f"{section + 1:06d}@{whole.config.name}.mrc")
        turned = rotation_z(float(row.rlnTomoZRot)) @ rotation_y(float(row.rlnTomoYTilt)) @ torch.tensor(bead(whole))
        shift = np.array([row.rlnTomoXShiftAngst, row.rlnTomoYShiftAngst])
        expected = np.array(detector[::-1]) // 2 + (turned[:2].numpy() + shift) / pixel
        assert seen(whole, section) == pytest.approx(expected, abs=2 / pixel)


def test_imod_finds_the_bead(whole):
    """newstack and tilt, with their own centres, see it in the voxel in which the truth has it."""
    name, pixel, voxel = whole.config.name, whole.config.detector.pixel_size, configuration.volume_grid(whole.config)[1]
    rows = ImodXF.from_file(str(whole.folder / f"{name}.xf")).numpy()
    angles = ImodTLT.from_file(str(whole.folder / f"{name}.tlt")).numpy().ravel()
    assert np.loadtxt(whole.folder / f"{name}.rawtlt").tolist() == whole.nominal.tolist()
    assert 0.01 < np.abs(angles - whole.nominal).max() < 3
    nz, ny, nx = configuration.volume_grid(whole.config)[0]
    q = bead(whole) / voxel + np.array([nx, ny, nz]) // 2
    centre = np.array([nx // 2 - 0.5, (ny - 1) / 2, nz - nz // 2 - 0.5])
    middle = (np.array(whole.config.detector.shape[::-1]) - 1) / 2
    for section, (row, angle) in enumerate(zip(rows, angles, strict=True)):
        u = rotation_y(float(angle)).numpy() @ (q - centre) * voxel / pixel
        r = np.linalg.inv(row[:4].reshape(2, 2)) @ (u[:2] - row[4:]) + middle
        assert seen(whole, section) == pytest.approx(r, abs=2 / pixel)


def test_all_alignments_say_the_same(whole):
    """The true angles, axis and shifts, as cryoet-alignment reads them; of Warp the angles have the other sign."""
    name, pixel = whole.config.name, whole.config.detector.pixel_size
    true, order = configuration.true_tilts(whole.config), whole.order
    angles, shifts = true.angles[order].tolist(), true.shifts[order] / pixel
    aretomo = AreTomo3ALN.from_file(str(whole.folder / f"{name}.aln")).GlobalAlignments
    relion = RelionAlignment.from_file(str(whole.folder / "tomograms.star")).entries
    warp = WarpAlignment.from_file(str(whole.folder / f"{name}.xml"), pixel_size_a=pixel).entries
    imod = ImodTLT.from_file(str(whole.folder / f"{name}.tlt")).numpy().ravel().tolist()
    axis = whole.config.tilts.axis_angle
    for found in ([e.tilt for e in aretomo], [e.y_tilt for e in relion], [-e.tilt_angle for e in warp], imod):
        assert found == pytest.approx(angles, abs=1e-6)
    for found in ([e.rot for e in aretomo], [e.z_rot for e in relion], [e.tilt_axis_angle for e in warp]):
        assert found == pytest.approx([axis] * 3)
    assert [[e.tx, e.ty] for e in aretomo] == pytest.approx(shifts.numpy(), abs=1e-5)
    assert [[e.x_shift_angst, e.y_shift_angst] for e in relion] == pytest.approx(pixel * shifts.numpy(), abs=1e-5)
    offsets = [[e.tilt_axis_offset_x, e.tilt_axis_offset_y] for e in warp]
    assert offsets == pytest.approx(pixel * shifts.numpy(), abs=1.5 * pixel * whole.config.output.binning)


def test_the_mdoc_tells_what_the_stage_was_asked_for(whole):
    """Nominal angles and doses, no true ones: those are for an alignment to find."""
    table = mdocfile.read(whole.folder / f"{whole.config.name}.mrc.mdoc").sort_values("ZValue")
    assert table.TiltAngle.tolist() == whole.nominal.tolist()
    assert table.ExposureDose.tolist() == pytest.approx([80] * 3)
    assert table.PixelSpacing.tolist() == [whole.config.detector.pixel_size] * 3
    assert len(table) == len(whole.mrc(".mrc"))


# ---- images ----------------------------------------------------------------------------------------------------------


def test_halves_are_independent_and_sum_to_the_series(whole):
    """Each with half the variance, which is its mean."""
    even, odd, series, clean = (whole.mrc(x).astype(float) for x in ("_even.mrc", "_odd.mrc", ".mrc", "_noiseless.mrc"))
    assert np.array_equal(even + odd, series)
    first, second = (half - clean / 2 for half in (even, odd))
    n = first.size
    scale = clean / 2
    assert (first * second / scale).mean() == pytest.approx(0, abs=4 / math.sqrt(n))
    for rest in (first, second):
        assert (rest**2 / scale).mean() == pytest.approx(1, abs=4 * math.sqrt(2 / n))


def test_the_series_is_the_noiseless_one_with_counting_noise(whole):
    """Chi^2 of Poisson counts: mean 1, with the variance (2 + 1 / mean) / n."""
    counts, clean = whole.mrc(".mrc").astype(float), whole.mrc("_noiseless.mrc").astype(float)
    chi2 = ((counts - clean) ** 2 / clean).mean((1, 2))
    n = counts[0].size
    assert chi2 == pytest.approx([1] * 3, abs=4 * math.sqrt((2 + 1 / clean.min()) / n))
    assert (counts - clean).mean() == pytest.approx(0, abs=4 * math.sqrt(clean.mean() / counts.size))
    projected = whole.mrc("_projections.mrc").astype(float)
    dark = [np.corrcoef(p.ravel(), c.ravel())[0, 1] for p, c in zip(projected, clean, strict=True)]
    assert max(dark) < -0.4  # matter is dark in underfocus


def test_the_projection_at_no_tilt_is_that_of_the_truth(upright):
    """Sum over z times the voxel, moved by the shift of the image."""
    projected = upright.mrc("_projections.mrc")[1].astype(float)
    summed = upright.mrc("_truth.mrc").astype(float).sum(0) * 10
    shift = configuration.true_tilts(upright.config).shifts[upright.order[1]].numpy() / 10  # (x, y) [px]
    ky, kx = np.fft.fftfreq(48)[:, None], np.fft.fftfreq(49)
    moved = np.fft.ifft2(np.fft.fft2(summed) * np.exp(-2j * np.pi * (kx * shift[0] + ky * shift[1]))).real
    assert np.corrcoef(projected.ravel(), moved.ravel())[0, 1] > 0.99
    assert (projected * moved).sum() / (moved**2).sum() == pytest.approx(1, abs=0.04)
    assert projected.sum() == pytest.approx(summed.sum(), rel=0.02)


SMALL = {
    "name": "small",
    "specimen": {
        "molecules": [{"structure": "ubiquitin", "copies": 3}],
        "size": [100, 100, 80],
        "ice": {"thickness": 90},
    },
    "tilts": {"extent": 20, "step": 20, "total_dose": 60, "dose_rate": 3},
    "detector": {"shape": [41, 40], "pixel_size": 4},
    "optics": {"defocus": 8000},
    "output": {"files": ["clean"]},
}


@pytest.mark.parametrize(
    "detector",
    [{"camera": "falcon4i"}, {"camera": "falcon3"}, {"gain_variation": 0.1, "dead_pixels": 0.02, "hot_pixels": 0.01}],
    ids=["falcon4i", "falcon3", "gain"],
)
@pytest.mark.filterwarnings("ignore:simulate. at 3 e-")
def test_without_noise_is_what_the_camera_records_in_the_mean(detector, tmp_path):
    """Coincidence takes its share, and the gain is taken out: of all pixels, and of those with more or less gain."""
    config = RunConfig.model_validate(SMALL | {"detector": SMALL["detector"] | detector})
    run(config, tmp_path)
    series, clean = (mrcfile.read(tmp_path / f"small{x}").astype(float) for x in (".mrc", "_noiseless.mrc"))
    spread = math.sqrt(clean.mean() / clean.size)
    assert (series - clean).mean() == pytest.approx(0, abs=5 * spread)
    gain = configuration.detector(config).gain
    if gain is not None:
        large = (gain > gain.median()).numpy()
        for some in (large, ~large):
            assert (series - clean)[:, some].mean() == pytest.approx(0, abs=8 * spread)


# ---- volumes ---------------------------------------------------------------------------------------------------------


def test_volumes_are_on_one_grid(whole):
    shape, voxel = configuration.volume_grid(whole.config)
    assert voxel == whole.config.detector.pixel_size * whole.config.output.binning
    for ending in ("_truth.mrc", "_tomogram.mrc", "_instances.mrc", "_semantic.mrc"):
        with mrcfile.open(whole.folder / f"{whole.config.name}{ending}") as volume:
            assert volume.data is not None and volume.data.shape == shape and volume.is_volume()
            assert volume.voxel_size.tolist() == pytest.approx((voxel,) * 3)


def test_the_tomogram_is_of_the_truth_and_in_its_place(whole):
    """More alike than any neighbour by a voxel across the beam, or any mirror image."""
    tomogram, truth = (whole.mrc(x).astype(float) for x in ("_tomogram.mrc", "_truth.mrc"))

    def alike(other):
        return np.corrcoef(tomogram.ravel(), other.ravel())[0, 1]

    found = alike(truth)
    assert found > 0.2
    for axis in (1, 2):
        assert all(alike(np.roll(truth, step, axis)) < found for step in (-1, 1))
    assert all(alike(np.roll(np.flip(truth, i), 1 - truth.shape[i] % 2, i)) < 0.9 * found for i in range(3))


def test_labels_agree_with_the_truth(whole):
    """Numbers of the tables, in both masks, on what the potential shows."""
    truth, instances, semantic = (whole.mrc(x) for x in ("_truth.mrc", "_instances.mrc", "_semantic.mrc"))
    rows = json.loads((whole.folder / f"{whole.config.name}_instances.json").read_text())
    kinds = {row["name"]: row for row in json.loads((whole.folder / f"{whole.config.name}_semantic.json").read_text())}
    assert {name: row["number"] for name, row in kinds.items()} == catalogue(whole.config)
    assert kinds["a fibre"]["kind"] == "filament" and kinds["carbon film"]["kind"] == "none here"
    assert [row["number"] for row in rows] == list(range(1, len(rows) + 1))
    counted = {name: sum(row["name"] == name for row in rows) for name in kinds}
    inside = len(whole.specimen.poses[whole.specimen.names.index("ubiquitin")].positions)
    assert counted["apoferritin"] == 6 and counted["gold bead"] == 1 and counted["membrane"] == 1
    assert counted["ubiquitin"] == 4 + inside and 1 <= counted["a fibre"] <= 2
    assert set(np.unique(instances)) - {0} <= {row["number"] for row in rows}
    assert np.array_equal(instances > 0, semantic > 0)
    for row in rows:
        mine = instances == row["number"]
        assert (semantic[mine] == kinds[row["name"]]["number"]).all()
    voxel, half = configuration.volume_grid(whole.config)[1], np.array(truth.shape) // 2
    for name in ("apoferritin", "a fibre", "gold bead"):
        number = kinds[name]["number"]
        places = particles(whole.specimen)[name].positions.numpy()[:, ::-1]
        at = np.rint(places / voxel + half).astype(int)
        hits = semantic[tuple(at.T)] == number
        assert hits.mean() > 0.6, name  # clefts and small ones belong to nobody at this voxel size
    mean = {name: truth[semantic == row["number"]].mean() for name, row in kinds.items() if counted[name]}
    assert mean["gold bead"] > 10 and 0.5 < mean["apoferritin"] < 5 and mean["membrane"] > 0.3
    assert abs(truth[semantic == 0].mean()) < 0.15 * mean["apoferritin"]


def test_zarr_and_ome_zarr_have_the_same_volumes(whole):
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    voxel = configuration.volume_grid(whole.config)[1]
    spacing = f"VoxelSpacing{voxel:.3f}"
    name = whole.config.name
    pairs = {f"{name}_{x}.zarr": f"_{x}.mrc" for x in ("truth", "tomogram", "instances", "semantic")}
    pairs |= {f"{spacing}/truth.zarr": "_truth.mrc", f"{spacing}/wbp.zarr": "_tomogram.mrc"}
    pairs |= {f"Segmentations/{voxel:.3f}_cryosim_0_all-multilabel.zarr": "_semantic.mrc"}
    for folder, ending in pairs.items():
        group: Any = zarr.open_group(whole.folder / folder, mode="r")
        assert np.array_equal(group["0"][:], whole.mrc(ending)), folder
        (node,) = Reader(parse_url(whole.folder / folder))()  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(node.data[0]), whole.mrc(ending))
        assert [axis["name"] for axis in node.metadata["axes"]] == ["z", "y", "x"]
        scale = node.metadata["coordinateTransformations"][0][0]
        assert scale["scale"] == pytest.approx([voxel] * 3)


# ---- poses -----------------------------------------------------------------------------------------------------------


def test_picks_of_relion_and_copick_are_the_poses(whole):
    blocks = tables(whole.folder / f"{whole.config.name}_poses.star")
    names = dict(zip(blocks["molecules"].rlnClassNumber, blocks["molecules"].cryosimMoleculeName, strict=True))
    table = blocks["particles"]
    (nz, ny, nx), voxel = configuration.volume_grid(whole.config)
    assert set(names.values()) == {"apoferritin", "ubiquitin", "a fibre", "gold bead"}
    for number, name in names.items():
        poses = particles(whole.specimen)[name]
        mine = table[table.rlnClassNumber == number]
        positions = mine[[f"rlnCenteredCoordinate{x}Angst" for x in "XYZ"]].to_numpy()
        assert positions == pytest.approx(poses.positions.numpy(), abs=1e-4)
        pixels = mine[[f"rlnCoordinate{x}" for x in "XYZ"]].to_numpy()
        assert pixels == pytest.approx(positions / voxel + np.array([nx, ny, nz]) // 2, abs=1e-4)
        for (rot, tilt, psi), rotation in zip(
            mine[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(), poses.rotations, strict=True
        ):
            matrix = rotation_z(-float(psi)) @ rotation_y(-float(tilt)) @ rotation_z(-float(rot))  # Heymann et al. 2005
            torch.testing.assert_close(matrix, rotation, atol=1e-5, rtol=0)
        picks = json.loads((whole.folder / "Picks" / f"cryosim_0_{name.replace(' ', '-')}.json").read_text())
        assert picks["run_name"] == "item" and picks["pickable_object_name"] == name.replace(" ", "-")
        found = np.array([[point["location"][x] for x in "xyz"] for point in picks["points"]])
        assert found == pytest.approx(positions + voxel * (np.array([nx, ny, nz]) // 2), abs=1e-3)
        turns = np.array([point["transformation_"] for point in picks["points"]])
        assert turns[:, :3, :3] == pytest.approx(poses.rotations.numpy(), abs=1e-6)
    fibres = json.loads((whole.folder / "Picks" / "cryosim_0_a-fibre.json").read_text())["points"]
    filament = whole.specimen.poses[whole.specimen.names.index("a fibre")]
    assert [point["instance_id"] for point in fibres] == (filament.instances + 1).tolist()


def test_particles_of_one_name_are_counted_on():
    """A filament, the like of it on its own, and another filament: subunits of each keep together."""
    atoms = Atoms(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([6]))

    def standing(n, instances=None):
        turns = torch.eye(3, dtype=torch.float64).expand(n, 3, 3)
        return Poses(
            turns, torch.rand(n, 3, dtype=torch.float64), None if instances is None else torch.tensor(instances)
        )

    poses = (standing(3, [0, 0, 2]), standing(2), standing(2, [0, 0]), standing(4), standing(1))
    kinds = ("filament", "protein", "filament", "membrane", "protein")
    specimen = Specimen((atoms,) * 5, poses, (9.0, 9.0, 9.0), names=("a", "a", "a", "a", "b"), kinds=kinds)
    found = particles(specimen)
    assert (
        found["a"].instances is not None
        and found["a"].instances.tolist() == [0, 0, 2, 3, 4, 5, 5]
        and found["b"].instances is None
    )
    assert torch.equal(found["a"].positions, torch.cat([p.positions for p in poses[:3]]))


def test_the_specimen_in_its_file_gives_the_same_images(upright):
    """Counted again with the random numbers that came when it had been drawn."""
    config, generator = upright.config, torch.Generator().set_state(upright.state)
    series = simulate(
        upright.specimen,
        configuration.true_tilts(config),
        configuration.optics(config.optics),
        configuration.detector(config),
        generator=generator,
        sampling=configuration.sampling(config),
    )
    assert np.array_equal(series.images[upright.order].numpy(), upright.mrc(".mrc"))


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_said_before_anything_is_simulated(tmp_path, monkeypatch):
    monkeypatch.setattr("cryosim.run.build_specimen", None)
    twice = [{"structure": "ubiquitin", "name": "a b"}, {"structure": "ubiquitin", "name": "a-b"}]
    config = {"specimen": {"molecules": twice}, "output": {"files": ["copick"]}}
    with pytest.raises(ValueError, match="'a b' and 'a-b'"):
        run(RunConfig.model_validate(config), tmp_path / "out")
    monkeypatch.setattr("cryosim.products.entry_points", lambda group: [])
    with pytest.raises(ValueError, match="expected an installed package that makes tomograms"):
        run(RunConfig.model_validate({"output": {"files": ["tomogram"]}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:simulate. at 1 e-")
def test_halves_of_a_camera_with_coincidence_are_told_of(tmp_path):
    """By as much as electrons keep others from being counted, their noise is anticorrelated."""
    dim = SMALL | {"tilts": {"extent": 0, "step": 1, "total_dose": 4, "dose_rate": 1}, "output": {"files": ["halves"]}}
    config = RunConfig.model_validate(dim | {"detector": SMALL["detector"] | {"camera": "falcon4i"}})
    with pytest.warns(UserWarning, match="halves of a camera with coincidence"):
        run(config, tmp_path)
    even, odd, whole = (mrcfile.read(tmp_path / f"small{x}.mrc") for x in ("_even", "_odd", ""))
    assert np.array_equal(even + odd, whole)


def test_ice_alone_and_what_stands_on_it(tmp_path):
    """All files of a specimen without molecules; platinum and crystals have their places in the masks."""
    settled = {"lamella": {"platinum": 30, "wedge": 2}, "contamination": {"crystals": 2, "radii": [25, 30]}}
    ice = {"molecules": [{"structure": "ubiquitin", "copies": 0}], "size": [150, 150, 60], "ice": {"thickness": 90}}
    few = SMALL | {"output": {"files": ALL}, "tilts": {"extent": 20, "step": 20}}
    for name, specimen in (("bare", ice), ("settled", ice | settled)):
        files = run(RunConfig.model_validate(few | {"specimen": specimen}), tmp_path / name)
        assert files.poses is None and not (tmp_path / name / "Picks").exists()
    assert not mrcfile.read(tmp_path / "bare" / "small_semantic.mrc").any()
    assert not mrcfile.read(tmp_path / "bare" / "small_truth.mrc").any()
    assert not (tmp_path / "bare" / "small_instances.json").exists()  # there is nothing to number
    masks, truth = (mrcfile.read(tmp_path / "settled" / f"small_{x}.mrc") for x in ("semantic", "truth"))
    numbers = {name: masks == MATTER.index(name) + 1 for name in MATTER}
    x = 4.0 * (np.arange(40) - 20)
    height = 4.0 * (np.arange(len(masks)) - len(masks) // 2)
    platinum, crystals = numbers["platinum"], numbers["ice crystals"]
    assert platinum.any() and crystals.any() and (masks != 0).sum() == platinum.sum() + crystals.sum()
    for mask in (platinum, crystals):
        assert not mask[np.abs(height) < 35].any()
    assert height[platinum.any((1, 2))].max() < 45 + 30 + 10
    assert not platinum[height < 0].any() and not platinum[..., np.abs(x) > 80].any()
    assert platinum[0].sum() == crystals[0].sum() == platinum[-1].sum() == 0  # nothing is cut off
    assert truth[platinum].mean() > 15 and 2 < truth[crystals].mean() < 7


def test_the_stack_comes_after_what_stands_beside_it(tmp_path, monkeypatch):
    """Whoever sees it finds the others; an earlier one stays as it was."""
    config = RunConfig.model_validate(SMALL | {"output": {"files": ["clean", "zarr"]}})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cryosim.products, "write_zarr", full)
    with pytest.raises(OSError, match="No space left"):
        run(config, tmp_path)
    assert (tmp_path / "small_noiseless.mrc").exists() and not (tmp_path / "small.mrc").exists()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(config, tmp_path)
    with pytest.warns(UserWarning, match=r"small_noiseless.mrc.*small_truth.zarr: of an earlier run"):
        run(RunConfig.model_validate(SMALL | {"output": {"files": []}}), tmp_path)
