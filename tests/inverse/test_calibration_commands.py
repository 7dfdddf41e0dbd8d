"""`inverse fit-ctf` and `inverse align`, from files to files."""

from __future__ import annotations

import torch
from typer.testing import CliRunner

import cryosim as cs
from cryosim import io
from inverse.cli import app
from tests.inverse.test_alignment import ANGLES, Taken, rms
from tests.inverse.test_ctf_fit import MICROGRAPH


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_fit_ctf_tells_the_lens_and_draws_it(tmp_path):
    told = run("fit-ctf", MICROGRAPH, "--plot", tmp_path / "fit.png")
    defocus = float(told.split("defocus")[1].split()[0].replace(",", ""))
    assert abs(defocus - 27_210) < 100
    assert "not determined" in told.split("astigmatism_angle")[1].splitlines()[0]
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_align_writes_what_other_programs_and_reconstruct_read(tmp_path):
    taken = Taken(96, 20, 0.5, 4)
    counts = (1000 * (1 + 0.02 * taken.images / taken.images.std())).float()
    tilts = cs.TiltScheme(angles=ANGLES, doses=torch.full_like(ANGLES, 3.0))
    io.write_series(tmp_path / "s.mrc", cs.TiltSeries(images=counts, pixel_size=5.0, tilts=tilts))
    for name in ("s.xf", "s.aln"):
        told = run("align", tmp_path / "s.mrc", "--no-fit-axis", "-o", tmp_path / name)
        assert "thickness" in told
        series = io.import_series(tmp_path / "s.mrc", alignment=tmp_path / name, voltage=300.0)
        assert rms(taken.off(series.tilts.shifts.double() / 5.0)) < 0.2
    run("reconstruct", tmp_path / "s.mrc", "--alignment", tmp_path / "s.xf", "--thickness", 200, "--voltage", 300)
    assert io.read_volume(tmp_path / "s_wbp.mrc").values.shape == (40, 96, 96)


def test_align_refuses_an_unknown_kind_of_file(tmp_path):
    done = CliRunner().invoke(app, ["align", str(tmp_path / "s.mrc"), "-o", str(tmp_path / "s.txt")])
    assert done.exit_code != 0 and ".xf or .aln" in done.output
