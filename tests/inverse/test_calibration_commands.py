"""`inverse fit-ctf` and `inverse align`, from files to files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cryoet_alignment.io.aretomo3.ctf import AreTomo3CTF
from cryoet_alignment.io.relion import RelionAlignment
from typer.testing import CliRunner

import cryosim as cs
import inverse as inv
from cryosim import io
from cryosim.core.fourier import shifted
from cryosim.io import mrc
from cryosim.microscope.optics import Optics
from inverse.calibration import series_ctf
from inverse.cli import app
from tests.inverse.test_alignment import ANGLES, Taken, rms
from tests.inverse.test_ctf_fit import MICROGRAPH, Case, imaged

THIN = Optics(300.0, defocus=100.0, spherical_aberration=0.0, amplitude_contrast=1.0)
"""A lens that shows the projection itself, dark."""


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_fit_ctf_tells_the_lens_draws_it_and_writes_it(tmp_path):
    told = run("fit-ctf", MICROGRAPH, "--plot", tmp_path / "fit.png", "--out", tmp_path / "fit.txt")
    defocus = float(told.split("defocus")[1].split()[0].replace(",", ""))
    assert abs(defocus - 27_210) < 100
    assert "not determined" in told.split("astigmatism_angle")[1].splitlines()[0]
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    (row,) = AreTomo3CTF.from_file(tmp_path / "fit.txt").rows
    assert abs((row.df_max_a + row.df_min_a) / 2 - defocus) < 1
    done = CliRunner().invoke(app, ["fit-ctf", str(MICROGRAPH), "-o", str(tmp_path / "fit.star")])
    assert done.exit_code == 2 and "expected NAME.txt for one image" in done.output


SYMMETRIC = torch.tensor([0.0, 20.0, -20.0, -40.0, 40.0], dtype=torch.float64)  # in the order of exposure
DEFOCI = 30_000 + torch.tensor([0.0, 500.0, -400.0, 300.0, -600.0])


@pytest.fixture(scope="module")
def astigmatic(tmp_path_factory) -> Path:
    """A series through an astigmatic lens with a phase plate, as it stands on the disk, with the aligned geometry."""
    folder, generator = tmp_path_factory.mktemp("astigmatic"), torch.Generator().manual_seed(3)
    lens = Optics(200.0, astigmatism=1500.0, astigmatism_angle=35.0, spherical_aberration=2.7, amplitude_contrast=0.07)
    images = []
    for angle, defocus in zip(SYMMETRIC.tolist(), DEFOCI.tolist(), strict=True):
        optics = lens.replace(defocus=defocus, phase_shift=30.0)
        images.append(imaged(Case(optics, 4.0, 2.5, 0.0, (512, 640), 0.25), generator, angle, 10.0))
    tilts = cs.TiltScheme(angles=SYMMETRIC, doses=torch.full((5,), 4.0).double(), axis_angle=10.0)
    series = cs.TiltSeries(
        images=torch.stack(images), pixel_size=2.5, tilts=tilts, optics=lens.replace(phase_shift=30.0)
    )
    io.write_series(folder / "s.mrc", series)
    shifts = torch.linspace(-30.0, 40.0, 10, dtype=torch.float64).reshape(5, 2)
    io.write_calibration(folder / "a.xf", series.replace(tilts=tilts.replace(shifts=shifts)))
    return folder


def test_fit_ctf_of_a_series_writes_every_kind_of_file(astigmatic, monkeypatch):
    """Fitted once: the other files are of the same fit, as told. The images are read once."""
    read, fitted = [], []
    original = mrc._read
    monkeypatch.setattr(mrc, "_read", lambda path: read.append(path) or original(path))
    fit = series_ctf.fit_series_ctf
    found = []

    def once(*arguments, **named):
        fitted.append(arguments[0])
        found.extend([] if found else [fit(*arguments, **named)])
        return found[0]

    monkeypatch.setattr(series_ctf, "fit_series_ctf", once)
    told = run("fit-ctf", astigmatic / "s.mrc", "--out", astigmatic / "f.defocus")
    assert len(read) == 1 and "hand: as the angles have it" in told and told.endswith("f.defocus\n")
    assert float(fitted[0].optics.voltage) == 200.0  # that of the .mdoc
    (ctf,) = found
    assert ctf.hand == 1 and float(ctf.optics.phase_shift) == 30.0
    errors = (torch.as_tensor(ctf.optics.defocus) - DEFOCI) / ctf.standard_errors["defocus"]
    assert rms(errors) < 2.5
    assert abs(float(ctf.optics.astigmatism) - 1500) < 4 * float(ctf.standard_errors["astigmatism"]) < 800
    assert abs(float(ctf.optics.astigmatism_angle) - 35) < 4 * float(ctf.standard_errors["astigmatism_angle"]) < 60
    for name in ("f.txt", "f.star", "f.xml"):
        run("fit-ctf", astigmatic / "s.mrc", "-o", astigmatic / name, "--alignment", astigmatic / "a.xf")
    wanted = io.read_series(astigmatic / "s.mrc").replace(optics=ctf.optics)
    for name in ("f.defocus", "f.txt", "f.star", "f.xml"):
        got = io.import_series(astigmatic / "s.mrc", ctf_file=astigmatic / name, alignment=astigmatic / "a.xf")
        assert got.optics is not None and wanted.optics is not None
        transfer = [cs.ctf(one, (61, 65), 2.5) for one in (got.optics, wanted.optics)]
        assert float((transfer[0] - transfer[1]).abs().max()) < 1e-4
    for name in ("f.star", "f.xml"):  # which hold the geometry, too
        got = io.import_series(astigmatic / "s.mrc", alignment=astigmatic / name)
        assert got.tilts.shifts[1].tolist() == pytest.approx([-130 / 9, -60 / 9], abs=1e-4)
        assert got.tilts.axis_angle == pytest.approx(10.0)
    found[0] = ctf._replace(hand=-1)
    run("fit-ctf", astigmatic / "s.mrc", "-o", astigmatic / "f.star")
    assert RelionAlignment.from_file(astigmatic / "f.star").hand == -1


def test_fit_ctf_refuses_an_unknown_kind_of_file_at_once(astigmatic):
    done = CliRunner().invoke(app, ["fit-ctf", str(astigmatic / "s.mrc"), "-o", str(astigmatic / "f.xf")])
    assert done.exit_code == 2
    assert "f.xf: suffix: expected one of .star (RELION 5)" in done.output and "hold CTF fits" in done.output


NARROW = slice(0, 80)
"""Rows of the images that are kept: as high as 80, as wide as 96."""


def taken_series(folder: Path, seed: int = 4, axis: float = 0.0) -> tuple[Taken, cs.TiltSeries]:
    """Images that are not square, in the order of a dose-symmetric scheme, on the disk and as they are read."""
    taken = Taken(96, 20, 0.5, seed, axis)
    counts = (1000 * (1 + 0.02 * taken.images / taken.images.std())).float()[:, NARROW]
    order = torch.argsort(ANGLES.abs(), stable=True)
    tilts = cs.TiltScheme(angles=ANGLES[order].double(), doses=torch.full((41,), 3.0).double(), axis_angle=axis)
    io.write_series(folder / "s.mrc", cs.TiltSeries(images=counts[order], pixel_size=5.0, tilts=tilts))
    return taken, io.read_series(folder / "s.mrc")


def residual(taken: Taken, series: cs.TiltSeries, axis: float = 0.0) -> float:
    """Of the shifts of a series in the order of exposure [px]."""
    by_angle = torch.argsort(torch.argsort(ANGLES.abs(), stable=True))
    return rms(taken.off(series.tilts.shifts.double()[by_angle] / 5.0, axis))


def test_align_writes_what_other_programs_and_reconstruct_read(tmp_path):
    taken, _ = taken_series(tmp_path)
    io.write_calibration(tmp_path / "lens.txt", io.read_series(tmp_path / "s.mrc").replace(optics=THIN))
    for name, more in (("s.xf", ()), ("s.aln", ()), ("s.xml", ()), ("s.star", ("--ctf-file", tmp_path / "lens.txt"))):
        told = run("align", tmp_path / "s.mrc", "--no-fit-axis", "-o", tmp_path / name, *more)
        assert "thickness" in told and str(tmp_path / name) in told
        series = io.import_series(tmp_path / "s.mrc", alignment=tmp_path / name, voltage=300.0)
        assert residual(taken, series) < 0.25
        (tmp_path / name).rename(tmp_path / f"kept{Path(name).suffix}")
        assert (series.optics is not None) == (name == "s.star")
    (tmp_path / "s.tlt").rename(tmp_path / "kept.tlt")
    run("reconstruct", tmp_path / "s.mrc", "--alignment", tmp_path / "kept.xf", "--thickness", 200, "--voltage", 300)
    assert io.read_volume(tmp_path / "s_wbp.mrc").values.shape == (40, 80, 96)


@pytest.mark.filterwarnings("ignore:.*more likely as they came")  # by nothing
def test_what_was_aligned_is_aligned_when_it_is_read_again(tmp_path):
    """About an axis beside y, with shifts and with angles that are found: nothing is left to find."""
    taken, series = taken_series(tmp_path, seed=2, axis=8.0)
    names = ("shifts", "thickness")
    found = inv.align(series, thickness=100.0, fit=names)
    assert residual(taken, inv.applied(series, found), 8.0) < 0.25 < 2 < residual(taken, series, 8.0)
    for suffix in (".xf", ".aln", ".xml"):
        io.write_calibration(tmp_path / f"found{suffix}", inv.applied(series, alignment=found))
        again = io.import_series(tmp_path / "s.mrc", alignment=tmp_path / f"found{suffix}")
        torch.testing.assert_close(again.tilts.shifts, found.shifts.double(), atol=1e-4, rtol=0)
    straight = again.replace(images=shifted(again.images, -again.tilts.shifts / 5.0))
    left = inv.align(straight, shifts=torch.zeros(41, 2), thickness=found.thickness, fit=names)
    assert rms(left.shifts) / 5.0 < 0.05  # [px]; the files are of the sign that displaces back
    on = inv.align(again, thickness=found.thickness, fit=names)
    assert rms(on.shifts - found.shifts) / 5.0 < 0.02


def test_a_fit_is_put_onto_a_series(tmp_path):
    _, series = taken_series(tmp_path)
    lens = Optics(300.0, defocus=torch.linspace(2e4, 3e4, 41), spherical_aberration=2.7)
    errors = {"defocus": torch.ones(41)}
    ctf = inv.SeriesCtf(lens, errors, 1, 9.0, 1.0, 8.0, 1.0)
    assert inv.applied(series, ctf=ctf).optics is lens
    kept = inv.applied(series.replace(optics=Optics(200.0, defocus=1.0, convergence=0.1)), ctf=ctf).optics
    assert kept is not None and kept.convergence == 0.1 and kept.voltage == 300.0 and kept.defocus is lens.defocus
    with pytest.raises(ValueError, match="ctf: expected 40 tilts, as the series has, got 41"):
        inv.applied(series.index(slice(0, 40)), ctf=ctf)


def test_align_refuses_what_it_could_not_write_at_once(tmp_path):
    def said(name: str, *more: object) -> str:
        words = ["align", tmp_path / "s.mrc", "-o", tmp_path / name, *more]
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 2
        return " ".join(done.output.split())

    assert ".xf (IMOD), .aln (AreTomo)" in said("s.txt")  # before the series is looked for
    taken_series(tmp_path)
    assert "Fit the CTF first" in said("s.star")
    assert "--hand: expected 1 or -1, got 2" in said("s.xml", "--hand", 2)
    lines = "".join(f"{a:.6f} {b:.6f} {-b:.6f} {a:.6f} 0 0\n" for a, b in 20 * [(0.99995, 0.01)] + 21 * [(1.0, 0.0)])
    (tmp_path / "s.xf").write_text(lines)  # an axis that changes, which `import_series` takes out of the images
    assert "they were resampled" in said("t.xf", "--voltage", 300)


def test_check_conventions_tells_a_flipped_series_and_writes_its_page(astigmatic, tmp_path):
    given = io.read_series(astigmatic / "s.mrc")
    turned = given.replace(tilts=given.tilts.replace(angles=-given.tilts.angles), stack=None)
    io.write_series(tmp_path / "turned.mrc", turned)
    told = run("check-conventions", tmp_path / "turned.mrc", "--report", tmp_path / "page.html")
    assert "verdict: negate the angles, or turn the axis by 180 degrees" in told
    assert "negate the angles" in (tmp_path / "page.html").read_text(encoding="utf-8")
