"""The main job as a newcomer runs it, with its own settings."""

import mrcfile
import pytest
import torch
import yaml

from cryosim.io.mrc import read_volume
from cryosim.io.series import read_series
from inverse.demo import demo
from inverse.metrics.fsc import fsc, measured_region


@pytest.mark.slow
def test_the_default_demo(tmp_path):
    """A dozen molecules, 41 tilts: both tomograms agree with the truth to the first zero of the CTF, near 24 Å."""
    files = demo(tmp_path)
    series, truth = read_series(files.series), read_volume(files.truth)
    assert series.images.shape == (41, 192, 192) and series.tilts.angles[:4].tolist() == [0, 3, -3, -6]
    assert float(series.tilts.doses.sum()) == pytest.approx(120.0, rel=1e-4)
    region = measured_region(tuple(truth.values.shape), series.tilts.angles)
    for path in files.tomograms:
        assert mrcfile.validate(path)
        curve = fsc(read_volume(path).values, truth.values, 4.0, region=region, thickness=400.0)
        assert curve.resolution(0.143) < 30.0
        band = (curve.frequency > 1 / 100) & (curve.frequency < 1 / 30)
        assert float(torch.nanmean(curve.correlation[band])) > 0.55
    described = yaml.safe_load(files.parameters.read_text(encoding="utf-8"))
    assert described["seed"] == 1 and described["versions"]["torch"].startswith("2.")
    page = files.report.read_text(encoding="utf-8")
    evidence = page[page.index('<section id="evidence">') :].split("</section>")[0]
    assert evidence.count("weighted back-projection</h3>") == evidence.count("least squares</h3>") == 1
    assert page.count("data:image/") > 100 and "http://" not in page.replace("http://www.w3.org", "")
