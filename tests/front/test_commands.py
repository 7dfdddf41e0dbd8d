"""The commands, as someone who meets them first would use and misuse them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
import yaml
from typer.testing import CliRunner

import cryosim.acquisition.simulate
import cryosim.cli
import cryosim.io.mrc
import cryosim.run
import inverse.cli
import inverse.reconstruction
import inverse.slabs
from cryosim import io
from cryosim.config import RunConfig, read_config
from cryosim.io.examples import example_path
from cryosim.io.mrc import read_stack, write_stack
from cryosim.io.series import read_series
from inverse.demo import from_events

TINY = """
name: tiny
seed: 3
specimen:
  molecules: [{structure: ubiquitin}]
  size: [70, 70, 70]
  ice: {thickness: 120}
tilts: {extent: 40, step: 20, total_dose: 100}
optics: {defocus: 10000}
detector: {shape: [32, 32], pixel_size: 4}
"""
SIMULATED = [
    "tiny.mrc",
    "tiny.mrc.mdoc",
    "tiny.rawtlt",
    "tiny.tlt",
    "tiny_parameters.yaml",
    "tiny_poses.star",
    "tiny_truth.mrc",
]
runner = CliRunner()


def cryo(*arguments):
    return runner.invoke(cryosim.cli.app, [str(a) for a in arguments])


def inv(*arguments):
    return runner.invoke(inverse.cli.app, [str(a) for a in arguments])


def listing(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, the hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def message(result, status=2) -> str:
    """What a command that ended badly said: one error, without a traceback."""
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def description(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def _simulated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    (folder / "tiny.yaml").write_text(TINY, encoding="utf-8")
    assert cryo("simulate", folder / "tiny.yaml", "-o", folder / "out").exit_code == 0
    return folder / "out"


@pytest.fixture
def simulated(_simulated, tmp_path) -> Path:
    """A folder of a test's own with a simulated series."""
    return Path(shutil.copytree(_simulated, tmp_path / "series"))


# ---- config new ----------------------------------------------------------------------------------------------------


def test_a_new_description_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cryo("config", "new").stdout == "run.yaml\n"
    assert read_config("run.yaml") == RunConfig()


def test_a_description_is_not_overwritten_unasked(description):
    assert f"{description}: is there already" in message(cryo("config", "new", description))
    assert description.read_text() == TINY
    assert cryo("config", "new", description, "--force").exit_code == 0
    assert read_config(description) == RunConfig()
    assert list(listing(description.parent)) == ["tiny.yaml"]


def test_a_description_needs_a_folder(tmp_path):
    assert str(tmp_path / "none") in message(cryo("config", "new", tmp_path / "none" / "run.yaml"))


# ---- simulate ------------------------------------------------------------------------------------------------------


def test_simulate_writes_what_it_says(simulated):
    assert list(listing(simulated)) == SIMULATED
    for name in ("tiny.mrc", "tiny_truth.mrc"):
        assert mrcfile.validate(simulated / name)
    with mrcfile.open(simulated / "tiny.mrc") as stack, mrcfile.open(simulated / "tiny_truth.mrc") as truth:
        assert stack.data.shape == (5, 32, 32)
        assert stack.is_image_stack()
        # 20 e-/Å^2 on 16 Å^2, less what the ice takes: exp(-2 sigma A V t / cos 40)
        assert stack.data.mean((1, 2)).tolist() == pytest.approx([20 * 16] * 5, rel=0.15)
        assert stack.data.mean((1, 2)).max() < 20 * 16
        assert truth.data.shape == (30, 32, 32)
        assert float(truth.data.max()) > 1
    poses = starfile.read(simulated / "tiny_poses.star")
    assert len(poses["particles"]) == 1
    assert poses["molecules"].cryosimMoleculeName.item() == "ubiquitin"
    parameters = yaml.safe_load((simulated / "tiny_parameters.yaml").read_text(encoding="utf-8"))
    assert parameters["seed"] == 3
    assert RunConfig.model_validate({k: parameters[k] for k in RunConfig.model_fields}) == RunConfig.model_validate(
        yaml.safe_load(TINY)
    )
    angles = [float(line) for line in (simulated / "tiny.rawtlt").read_text().split()]
    assert angles == [-40, -20, 0, 20, 40]


def test_simulate_names_its_files(description, tmp_path):
    shown = cryo("simulate", description, "-o", tmp_path / "out").stdout.split()
    assert [Path(path).name for path in shown] == [
        "tiny.mrc",
        "tiny_truth.mrc",
        "tiny_poses.star",
        "tiny_parameters.yaml",
    ]
    assert all(Path(path).is_file() for path in shown)


MOVIE = """
name: tiny
seed: 3
specimen:
  molecules: [{structure: ubiquitin}]
  size: [70, 70, 70]
  ice: {thickness: 120}
  motion: {drift: 4, velocity: 0.2, doming: 20}
tilts: {extent: 40, step: 20, total_dose: 100, frames: 3, dose_rate: 20}
optics: {defocus: 10000}
detector: {shape: [33, 32], pixel_size: 4, %s}
"""
FALCON = "camera: falcon4i, gain_variation: 0.05, dead_pixels: 0.01"


def _sensitivity(path: Path) -> torch.Tensor:
    with mrcfile.open(path) as gain:
        return torch.from_numpy(gain.data.copy()).reshape(33, 32)


def _with_movies(folder: Path, kind: str, camera: str = FALCON) -> Path:
    folder.mkdir(parents=True)
    (folder / "movie.yaml").write_text(MOVIE % camera + f"output: {{movies: {kind}}}\n", encoding="utf-8")
    made = cryo("simulate", folder / "movie.yaml", "-o", folder / "out")
    assert made.exit_code == 0, made.output
    shown = [Path(line).name for line in made.stdout.split()]
    assert shown[4:] == ["tiny_frames", "tiny_gain.mrc", "tiny_motion.npz"]
    return folder / "out"


def test_electrons_gain_and_motion_are_written(tmp_path):
    """From the electrons in the files, and the gain, come the images of the stack; the .mdoc names every file."""
    out = _with_movies(tmp_path / "1", "eer")
    series = read_series(out / "tiny.mrc")
    sensitivity = _sensitivity(out / "tiny_gain.mrc")
    assert series.movies is not None
    for i, movie in enumerate(series.movies):
        info = io.eer_info(out / movie.path)
        assert info.n_frames == movie.frames == 240  # 20 e-/Å^2 in a second
        assert info.shape == (33, 32) and info.pixel_size == 4
        assert info.dose == pytest.approx(20) and info.exposure_time == pytest.approx(1)
        counts = io.render_eer(out / movie.path)[0].float()
        good = sensitivity > 0
        corrected = counts / sensitivity.clamp_min(1e-6)
        torch.testing.assert_close(corrected[good], series.images[i][good], rtol=1e-5, atol=1e-5)
    moved = io.read_motion(out / "tiny_motion.npz")
    assert moved.drift.shape == (5, 3, 3) and float(moved.field.abs().max()) > 1
    again = _with_movies(tmp_path / "2", "eer")
    assert listing(again) == listing(out)


@pytest.mark.parametrize(("kind", "suffix"), [("mrc", "mrc"), ("tiff", "tif")])
def test_movies_of_counts(kind, suffix, tmp_path):
    out = _with_movies(tmp_path / "1", kind, "gain_variation: 0.05")
    series = read_series(out / "tiny.mrc")
    factors = _sensitivity(out / "tiny_gain.mrc")  # which RELION multiplies such movies with
    for image, movie in zip(series.images, series.movies, strict=True):
        assert movie.path.endswith(f".{suffix}") and movie.frames == 3
        frames, pixel_size = io.read_movie(out / movie.path)
        assert frames.shape == (3, 33, 32) and pixel_size == pytest.approx(4)
        torch.testing.assert_close(frames.sum(0) * factors, image, rtol=1e-5, atol=1e-5)


def test_an_interrupted_run_leaves_the_movies_of_the_one_before(tmp_path, monkeypatch):
    """And nothing of its own."""
    out = _with_movies(tmp_path / "1", "mrc", "gain_variation: 0.05")
    before = listing(out)
    text = (tmp_path / "1" / "movie.yaml").read_text().replace("seed: 3", "seed: 4")
    (tmp_path / "other.yaml").write_text(text)
    monkeypatch.setattr(cryosim.run, "write_movie", _raising(cryosim.run.write_movie, 3, KeyboardInterrupt()))
    assert cryo("simulate", tmp_path / "other.yaml", "-o", out).exit_code == 130
    assert listing(out) == before
    monkeypatch.undo()
    assert cryo("simulate", tmp_path / "other.yaml", "-o", out).exit_code == 0
    after = listing(out)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before if "_frames/" in name)


def test_files_of_an_earlier_run_are_told(tmp_path):
    out = _with_movies(tmp_path / "1", "mrc", "gain_variation: 0.05")
    (tmp_path / "plain.yaml").write_text(TINY, encoding="utf-8")
    made = cryo("simulate", tmp_path / "plain.yaml", "-o", out)
    assert made.exit_code == 0
    said = " ".join(made.stderr.split())
    assert all(name in said for name in ("tiny_frames", "tiny_gain.mrc", "tiny_motion.npz", "of an earlier run"))
    assert (out / "tiny_gain.mrc").exists()


def test_a_file_in_the_way_of_the_movies(tmp_path):
    (tmp_path / "tiny_frames").write_text("mine")
    (tmp_path / "movie.yaml").write_text(MOVIE % FALCON + "output: {movies: mrc}\n", encoding="utf-8")
    assert "expected a folder" in message(cryo("simulate", tmp_path / "movie.yaml", "-o", tmp_path))
    assert (tmp_path / "tiny_frames").read_text() == "mine"


def test_hot_pixels_are_marked_in_the_gain(tmp_path):
    """So that what is made from the electrons is as clean as the stack."""
    text = (MOVIE % "camera: falcon4i, hot_pixels: 0.02") + "output: {movies: eer}\n"
    (tmp_path / "movie.yaml").write_text(text, encoding="utf-8")
    assert cryo("simulate", tmp_path / "movie.yaml", "-o", tmp_path).exit_code == 0
    sensitivity = _sensitivity(tmp_path / "tiny_gain.mrc")
    assert 5 <= int((sensitivity == 0).sum()) <= 60
    series = read_series(tmp_path / "tiny.mrc")
    made = from_events(series, tmp_path, frames=1, gain=sensitivity)
    torch.testing.assert_close(made.images, series.images, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("setting", ["camera: falcon3", "camera: falcon4i, counting: poisson"])
def test_a_demo_that_cannot_be_from_electrons(setting, tmp_path):
    (tmp_path / "movie.yaml").write_text(MOVIE % setting, encoding="utf-8")
    said = message(inv("demo", "--events", "--config", tmp_path / "movie.yaml", "-o", tmp_path / "out"))
    assert "eer" in said and "pydantic" not in said


def test_a_demo_from_electrons_at_another_voltage(tmp_path):
    text = (MOVIE % "frame_rate: 300").replace("{defocus: 10000}", "{defocus: 10000, voltage: 400}")
    text = text.replace("motion: {", "damage: {critical_exposure: null, b_growth: 1}\n  motion: {")
    (tmp_path / "movie.yaml").write_text(text, encoding="utf-8")
    made = inv("demo", "--events", "--config", tmp_path / "movie.yaml", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output


def test_the_demo_from_electrons(tmp_path):
    (tmp_path / "movie.yaml").write_text(MOVIE % "camera: falcon4i" + "output: {movies: none}\n", encoding="utf-8")
    made = inv("demo", "--events", "--config", tmp_path / "movie.yaml", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert sorted(path.suffix for path in (tmp_path / "out" / "tiny_frames").iterdir()) == [".eer"] * 5
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_seed_decides_every_byte(simulated, tmp_path):
    for seed in (3, 4):
        (tmp_path / "again.yaml").write_text(TINY.replace("seed: 3", f"seed: {seed}"), encoding="utf-8")
        assert cryo("simulate", tmp_path / "again.yaml", "-o", tmp_path / str(seed)).exit_code == 0
    assert listing(tmp_path / "3") == listing(simulated)
    other = listing(tmp_path / "4")
    assert {name for name, content in listing(simulated).items() if content != other[name]} == {
        "tiny.mrc",
        "tiny_truth.mrc",
        "tiny_poses.star",
        "tiny_parameters.yaml",
    }


def test_structures_are_found_beside_the_description(simulated, tmp_path, monkeypatch):
    (tmp_path / "deep" / "structures").mkdir(parents=True)
    shutil.copy(example_path("ubiquitin"), tmp_path / "deep" / "structures" / "mine.pdb")
    text = TINY.replace("structure: ubiquitin", "structure: structures/mine.pdb")
    (tmp_path / "deep" / "run.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cryo("simulate", "deep/run.yaml", "-o", "out").exit_code == 0
    assert (tmp_path / "out" / "tiny.mrc").read_bytes() == (simulated / "tiny.mrc").read_bytes()
    assert inv("demo", "--config", "deep/run.yaml", "-o", "demo").exit_code == 0
    assert (tmp_path / "demo" / "tiny.mrc").read_bytes() == (simulated / "tiny.mrc").read_bytes()


@pytest.mark.parametrize("name", ["with two  blanks", "Ünïcode µ 蛋白", "[bold]", "a:car:", r"back\[slash"])
def test_folders_may_have_any_name(name, simulated, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "tiny.yaml").write_text(TINY, encoding="utf-8")
    made = cryo("simulate", tmp_path / name / "tiny.yaml", "-o", tmp_path / name / "out")
    assert made.exit_code == 0
    assert made.stdout.splitlines()[0] == str(tmp_path / name / "out" / "tiny.mrc")
    assert listing(tmp_path / name / "out") == listing(simulated)
    made = inv("reconstruct", tmp_path / name / "out" / "tiny.mrc", "--thickness", "100")
    assert made.stdout.splitlines() == [str(tmp_path / name / "out" / "tiny_wbp.mrc")]
    assert str(tmp_path / name / "none.yaml") in message(cryo("simulate", tmp_path / name / "none.yaml"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("size: [70, 70, 70]", "size: [20, 70, 70]"),
            "copy 1 of 1 of ubiquitin found no free place in .*20.0, 70.0, 70.0",
        ),
        (("{structure: ubiquitin}", "{structure: ubiquitin, copies: 50}"), "of 50 of ubiquitin found no free place"),
        (("structure: ubiquitin", "structure: none.pdb"), "none.pdb: file: expected an existing file"),
        (("structure: ubiquitin", "structure: run.yaml"), "run.yaml: suffix: expected one of .pdb"),
        (("{structure: ubiquitin}", "{structure: ubiquitin, assembly: 9}"), "assembly: expected .* got '9'"),
        (("defocus: 10000", "defokus: 10000"), "run.yaml: unknown key optics.defokus"),
        (("seed: 3", "seed: 3\nseed: 4"), "run.yaml: .*the key seed stands there twice"),
        (("extent: 40, step: 20", "extent: 40, step: 15"), "run.yaml: tilts: .*Try extent 45"),
        (("pixel_size: 4", "pixel_size: 0.01"), "run.yaml: .*at most 16384 px"),
    ],
)
def test_what_cannot_be_simulated_is_said_and_leaves_nothing(change, said, tmp_path):
    (tmp_path / "run.yaml").write_text(TINY.replace(*change), encoding="utf-8")
    before = listing(tmp_path)
    result = cryo("simulate", tmp_path / "run.yaml", "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert re.search(said, result.stderr, re.DOTALL)
    assert listing(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_folder_that_cannot_be_made_is_found_out_first(below, description, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("simulated for nothing")

    monkeypatch.setattr("cryosim.run.simulate", never)
    (tmp_path / "file").write_text("in the way")
    before = listing(tmp_path)
    assert str(tmp_path / "file") in message(cryo("simulate", description, "-o", tmp_path / "file" / below))
    assert str(tmp_path / "file") in message(inv("demo", "--config", description, "-o", tmp_path / "file" / below))
    assert listing(tmp_path) == before


def test_a_read_only_folder_is_found_out_first(description, tmp_path, monkeypatch):
    real = os.access  # root may write anywhere: so it is only said to be read-only
    monkeypatch.setattr(os, "access", lambda path, mode, **more: Path(path).name != "out" and real(path, mode, **more))
    assert f"{tmp_path / 'out'}: cannot be written to" in message(cryo("simulate", description, "-o", tmp_path / "out"))
    assert list(listing(tmp_path)) == ["tiny.yaml"]


# ---- reconstruct ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["wbp", "least-squares"])
@pytest.mark.parametrize("bin", [1, 2])
def test_reconstruct_writes_a_tomogram(method, bin, simulated):
    done = inv("reconstruct", simulated / "tiny.mrc", "--thickness", 100, "--method", method, "--bin", bin)
    path = simulated / f"tiny_{method}.mrc"
    assert done.stdout == f"{path}\n"
    assert mrcfile.validate(path)
    with mrcfile.open(path) as tomogram:
        assert tomogram.data.shape == (round(100 / (4 * bin)), 32 // bin, 32 // bin)
        assert tomogram.voxel_size.tolist() == pytest.approx((4 * bin,) * 3)
        assert not tomogram.is_image_stack()
    assert set(listing(simulated)) == {*SIMULATED, path.name}


def test_a_tomogram_is_half_as_deep_as_wide_unless_told(simulated):
    done = inv("reconstruct", simulated / "tiny.mrc")
    with mrcfile.open(Path(done.stdout.strip())) as tomogram:
        assert tomogram.data.shape == (16, 32, 32)


@pytest.mark.parametrize("method", ["wbp", "least-squares"])
@pytest.mark.parametrize(("axis_angle", "ny", "nx"), [(0, 32, 32), (90, 24, 33), (-85.3, 25, 32), (30, 30, 30)])
def test_the_tomogram_is_of_the_truth_and_not_of_its_mirror_images(method, axis_angle, ny, nx, tmp_path):
    """Also where a turn exchanges height and width, for both."""
    text = TINY.replace("total_dose: 100", f"total_dose: 1.0e+5, axis_angle: {axis_angle}")
    text = text.replace("ice: {thickness: 120}", "ice: {thickness: 120}\n  damage: {critical_exposure: null}")
    (tmp_path / "run.yaml").write_text(text.replace("[32, 32]", f"[{ny}, {nx}]"), encoding="utf-8")
    assert cryo("simulate", tmp_path / "run.yaml", "-o", tmp_path).exit_code == 0
    arguments = ("--thickness", 120, "--method", method, "--low-pass", 12)
    assert inv("reconstruct", tmp_path / "tiny.mrc", *arguments).exit_code == 0
    made, truth = (mrcfile.read(tmp_path / name).astype(float) for name in (f"tiny_{method}.mrc", "tiny_truth.mrc"))
    assert made.shape == truth.shape
    mirrored = (np.roll(np.flip(truth, i), 1 - truth.shape[i] % 2, i) for i in range(3))
    alike = [np.corrcoef(made.ravel(), t.ravel())[0, 1] for t in (truth, *mirrored)]
    assert alike[0] > 0.3
    assert alike[0] > 1.1 * max(alike[1:])


def test_a_reconstruction_is_the_same_every_time(simulated, tmp_path):
    for name in ("one.mrc", "other.rec"):
        arguments = ("--thickness", 100, "--method", "least-squares", "--ctf", "wiener", "--low-pass", 12)
        assert inv("reconstruct", simulated / "tiny.mrc", *arguments, "-o", tmp_path / name).exit_code == 0
    assert (tmp_path / "one.mrc").read_bytes() == (tmp_path / "other.rec").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--thickness", "thick"),
        ("--thickness", "100", "--bin", "0"),
        ("--thickness", "100", "--bin", "1.5"),
        ("--thickness", "100", "--method", "sart"),
        ("--thickness", "100", "--ctf", "phase"),
        ("--thickness", "100", "--low-pass", "nan"),
        ("--thickness", "100", "--pixel-size", "-1"),
        ("--thickness", "100", "--no-such-option"),
    ],
)
def test_wrong_usage_is_a_usage_error(arguments, simulated):
    before = listing(simulated)
    result = inv("reconstruct", simulated / "tiny.mrc", *arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    assert "Traceback" not in result.output
    assert listing(simulated) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--thickness", "0"), "thickness"),
        (("--thickness", "-5"), "thickness"),
        (("--thickness", "nan"), "thickness"),
        (("--thickness", "inf"), "thickness"),
        (("--thickness", "1e9"), "thickness"),
        (("--thickness", "100", "--bin", "33"), "bin"),
        (("--thickness", "100", "--low-pass", "0"), "low_pass"),
        (("--thickness", "100", "--low-pass", "inf"), "low_pass"),
        (("--thickness", "100", "--pixel-size", "0"), "pixel_size"),
        (("--thickness", "100", "--pixel-size", "inf"), "pixel_size"),
        (("--thickness", "100", "-o", "none/tomogram.mrc"), "--output"),
        (("--thickness", "100", "-o", "tiny.mrc"), "--output"),
        (("--thickness", "100", "-o", "tiny.rawtlt"), "--output"),
        (("--thickness", "100", "-o", "."), "--output"),
    ],
)
def test_numbers_out_of_bounds_are_refused(arguments, said, simulated, monkeypatch):
    monkeypatch.chdir(simulated)
    before = listing(simulated)
    assert said in message(inv("reconstruct", "tiny.mrc", *arguments))
    assert listing(simulated) == before


def _missing(folder):
    (folder / "tiny.mrc").unlink()


def _alone(folder):
    for name in ("tiny.mrc.mdoc", "tiny.rawtlt", "tiny.tlt"):
        (folder / name).unlink()


def _truncated(folder):
    path = folder / "tiny.mrc"
    path.write_bytes(path.read_bytes()[:-100])


def _only_a_header(folder):
    path = folder / "tiny.mrc"
    path.write_bytes(path.read_bytes()[:1000])


def _empty(folder):
    (folder / "tiny.mrc").write_bytes(b"")


def _not_mrc(folder):
    (folder / "tiny.mrc").write_bytes(bytes(range(256)) * 50)


def _fewer_images(folder):
    images, pixel = read_stack(folder / "tiny.mrc")
    write_stack(folder / "tiny.mrc", images[:4], pixel)


def _word_for_an_angle(folder):
    path = folder / "tiny.mrc.mdoc"
    path.write_text(path.read_text().replace("TiltAngle = 40", "TiltAngle = forty"))


def _steep(folder):
    path = folder / "tiny.mrc.mdoc"
    path.write_text(path.read_text().replace("TiltAngle = 40", "TiltAngle = 89.5"))


def _fewer_angles_in_the_list(folder):
    (folder / "tiny.mrc.mdoc").unlink()
    (folder / "tiny.tlt").write_text("-40\n-20\n0\n")


def _no_number_in_the_list(folder):
    (folder / "tiny.mrc.mdoc").unlink()
    (folder / "tiny.tlt").write_text("-40\n-20\nzero\n20\n40\n")


def _other_pixel_size(folder):
    path = folder / "tiny.mrc.mdoc"
    path.write_text(path.read_text().replace("PixelSpacing = 4", "PixelSpacing = 5"))


def _dark_image(folder):
    images, pixel = read_stack(folder / "tiny.mrc")
    images[4] = 0
    write_stack(folder / "tiny.mrc", images, pixel)


def _infinity(folder):
    with mrcfile.open(folder / "tiny.mrc", "r+") as stack:
        data = stack.data.astype(np.float32)
        data[2, 3, 4] = np.inf
        stack.set_data(data)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_missing, "tiny.mrc: "),
        (_alone, "tiny.mrc: tilt angles: expected a file beside it"),
        (_truncated, "tiny.mrc: size: expected 11264 bytes .* got 11164"),
        (_only_a_header, "tiny.mrc: header: expected 1024 bytes, got 1000"),
        (_empty, "tiny.mrc: file: expected content, got 0 bytes"),
        (_not_mrc, "tiny.mrc: map "),
        (_fewer_images, "tiny.mrc: sections: expected 5, .*tiny.mrc.mdoc, got 4"),
        (_word_for_an_angle, "tiny.mrc.mdoc: entries: .*forty"),
        (_steep, "angles: expected tilts below 89 degrees"),
        (_fewer_angles_in_the_list, "tiny.mrc: sections: expected 3, .*tiny.tlt, got 5"),
        (_no_number_in_the_list, "tiny.tlt: line 3: expected one tilt angle"),
        (_other_pixel_size, "tiny.mrc: pixel size: expected 5 Å as in its .mdoc, got 4 Å"),
        (_dark_image, r"\[40.0\] degrees hold no electrons"),
        (_infinity, "tiny.mrc: section 2: expected finite values"),
    ],
)
@pytest.mark.parametrize("method", ["wbp", "least-squares"])
@pytest.mark.filterwarnings("ignore:Data array contains:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_damaged_series_is_refused_in_one_line(damage, said, method, simulated):
    damage(simulated)
    before = listing(simulated)
    result = inv("reconstruct", simulated / "tiny.mrc", "--thickness", 100, "--method", method)
    assert re.search(said, message(result))
    assert listing(simulated) == before


def test_a_list_of_angles_will_do_and_what_it_lacks_is_said(simulated):
    (simulated / "tiny.mrc.mdoc").unlink()
    result = inv("reconstruct", simulated / "tiny.mrc", "--thickness", 100)
    assert result.exit_code == 0
    warned = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 2
    assert "tells neither dose nor order" in warned[0]
    assert "no optics" in warned[1]


# ---- demo ----------------------------------------------------------------------------------------------------------


def test_the_demo_goes_end_to_end(description, simulated, tmp_path):
    done = inv("demo", "--config", description, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    made = ["report.html", "tiny_wbp.mrc", "tiny_least-squares.mrc", "tiny_slices.png"]
    assert sorted(listing(tmp_path / "out")) == sorted([*SIMULATED, *made])
    assert {str(p) for p in (tmp_path / "out" / name for name in made)} <= set(done.stdout.splitlines())
    assert {k: v for k, v in listing(tmp_path / "out").items() if k in SIMULATED} == listing(simulated)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    text = re.sub(r'"data:[^"]*"', "", page)  # without the pictures
    assert "1 × ubiquitin" in text
    assert not re.search(r"Traceback|\bNaN\b|\bnan\b|\binf\b|\bNone\b|\{\{|Error\b", text)
    for name in [*made[1:3], *SIMULATED[:1]]:
        assert name in text


def test_the_demo_reconstructs_as_the_command_does(description, tmp_path):
    assert inv("demo", "--config", description, "-o", tmp_path / "out").exit_code == 0
    for method in ("wbp", "least-squares"):
        again = tmp_path / f"{method}.mrc"
        arguments = ("--thickness", 120, "--method", method, "-o", again)
        assert inv("reconstruct", tmp_path / "out" / "tiny.mrc", *arguments).exit_code == 0
        made = tmp_path / "out" / f"tiny_{method}.mrc"  # its header has mean and spread summed in another order
        assert again.read_bytes()[1024:] == made.read_bytes()[1024:]
        with mrcfile.open(again) as one, mrcfile.open(made) as other:
            assert one.voxel_size == other.voxel_size
            for key in ("dmin", "dmax", "dmean", "rms"):
                assert float(one.header[key]) == pytest.approx(float(other.header[key]), rel=1e-5)


# ---- interruptions -------------------------------------------------------------------------------------------------


def _raising(original, nth, error):
    """`original`, but the `nth` call raises."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise error
        return original(*args, **kwargs)

    return wrapped


PLACES = {
    "simulating": ("cryosim.acquisition.simulate.expected_frames", 3),
    "writing the truth": ("cryosim.io.mrc.mrcfile.new", 1),
    "writing the series": ("cryosim.io.series.write_mdoc", 1),
    "putting files in place": ("cryosim.io.files.os.replace", 5),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_an_interruption_leaves_whole_files_only(place, error, status, description, simulated, tmp_path, monkeypatch):
    target, nth = PLACES[place]
    module, _, name = target.rpartition(".")
    owner = {"cryosim.io.mrc.mrcfile": mrcfile, "cryosim.io.files.os": os}.get(module) or sys.modules[module]
    monkeypatch.setattr(owner, name, _raising(getattr(owner, name), nth, error))
    result = cryo("simulate", description, "-o", tmp_path / "out")
    monkeypatch.undo()
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    assert "stopped" in result.stderr if status == 130 else "No space left" in result.stderr
    whole = listing(simulated)
    left = listing(tmp_path / "out")
    assert left == {name: whole[name] for name in left}
    assert "tiny.mrc" not in left
    assert cryo("simulate", description, "-o", tmp_path / "out").exit_code == 0
    assert listing(tmp_path / "out") == whole


@pytest.mark.parametrize("target", ["inverse.slabs.backproject_rows", "cryosim.io.files.os.replace"])
def test_an_interrupted_reconstruction_leaves_what_was_there(target, simulated, monkeypatch):
    (simulated / "tiny_wbp.mrc").write_text("of yesterday")
    before = listing(simulated)
    owner = os if "os" in target.split(".") else inverse.slabs
    name = target.rpartition(".")[2]
    monkeypatch.setattr(owner, name, _raising(getattr(owner, name), 1, KeyboardInterrupt()))
    result = inv("reconstruct", simulated / "tiny.mrc", "--thickness", 100)
    monkeypatch.undo()
    assert result.exit_code == 130
    assert listing(simulated) == before


def test_lack_of_memory_is_said(simulated, monkeypatch):
    lack = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    monkeypatch.setattr(inverse.slabs, "backproject_rows", _raising(None, 1, lack))
    assert "not enough memory" in message(inv("reconstruct", simulated / "tiny.mrc", "--thickness", 100))


def test_a_defect_of_the_program_is_not_hidden(simulated, monkeypatch):
    monkeypatch.setattr(inverse.slabs, "backproject_rows", _raising(None, 1, RuntimeError("a defect")))
    result = inv("reconstruct", simulated / "tiny.mrc", "--thickness", 100)
    assert isinstance(result.exception, RuntimeError)


# ---- the commands themselves ---------------------------------------------------------------------------------------


def command(name: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    script = Path(sys.executable).parent / name
    assert script.exists(), "the package has to be installed"
    return subprocess.run(
        [script, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
    )


def test_the_installed_commands_do_the_same(simulated, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY, encoding="utf-8")
    done = command("cryosim", "simulate", "tiny.yaml", "-o", "out", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "out/tiny.mrc")
    assert listing(tmp_path / "out") == listing(simulated)
    done = command("inverse", "reconstruct", "out/tiny.mrc", "--thickness", 100, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "out/tiny_wbp.mrc\n")


def test_the_installed_commands_fail_the_same(tmp_path):
    done = command("inverse", "reconstruct", "none.mrc", "--thickness", 100, cwd=tmp_path)
    assert done.returncode == 2
    assert "error: none.mrc: " in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == {}


def test_a_name_that_is_not_utf8_is_spelled_out(tmp_path):
    done = command("cryosim", "simulate", os.fsdecode(b"caf\xe9.yaml"), cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: caf" in done.stderr
