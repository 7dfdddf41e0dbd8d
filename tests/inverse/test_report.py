"""The report: one file, the same bytes for the same data, nothing loaded or run but its own."""

import base64
import hashlib
import html
import io
import json
import os
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from cryosim.acquisition.series import TiltSeries
from cryosim.acquisition.tilts import TiltScheme
from cryosim.core.volume import Volume
from cryosim.microscope.optics import Optics
from inverse import report
from inverse.metrics.fsc import fsc, measured_region
from inverse.report import write_report

ATTACK = "</script></style><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def arguments(shape=(13, 31, 33), tilts=7, **changes):
    angles = torch.linspace(-60, 60, tilts, dtype=torch.float64).roll(2)
    scheme = TiltScheme(angles, torch.full_like(angles, 3.0))
    images = torch.poisson(torch.full((tilts, 33, 31), 20.0), generator=torch.Generator().manual_seed(1))
    truth = Volume(noise(*shape), 5.0)
    made = {"WBP": Volume(truth.values + noise(*shape, seed=2), 5.0), "SIRT": Volume(truth.values * 2, 5.0)}
    region = measured_region(shape, angles)
    return {
        "title": "A test",
        "series": TiltSeries(images, 5.0, scheme, Optics(300.0, torch.full((tilts,), 3e4))),
        "truth": truth,
        "reconstructions": made,
        "curves": {k: fsc(v.values, truth.values, 5.0, region=region, thickness=60.0) for k, v in made.items()},
        "whole": {k: fsc(v.values, truth.values, 5.0, thickness=60.0) for k, v in made.items()},
        "summary": {"Ice": "30 nm"},
        "parameters": {"optics": {"voltage": "300 kV", "more": {"Cs": "2.7 mm"}}, "seed": 1, "none": None},
        "files": [("out/wbp.mrc", "a volume")],
    } | changes


def written(tmp_path, **changes):
    path = write_report(tmp_path / "report.html", **arguments(**changes))
    return path.read_text("utf-8")


class Page(HTMLParser):
    """Tags with their attributes, and the text of each script, as a browser would take the page apart."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        self.texts.append((self.open, data))

    def sources(self):
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]

    def films(self):
        return [json.loads(data) for tag, data in self.texts if tag == "script" and data.lstrip().startswith("{")]


def decoded(uri):
    kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,([A-Za-z0-9+/=]+)", uri).groups()
    content = base64.b64decode(content, validate=True)
    assert content.startswith(b"\x89PNG\r\n\x1a\n" if kind == "png" else b"\xff\xd8\xff")
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def test_the_same_data_give_the_same_bytes_and_one_file(tmp_path):
    assert written(tmp_path) == written(tmp_path)
    assert os.listdir(tmp_path) == ["report.html"]


def test_nothing_is_loaded_from_outside(tmp_path):
    text = written(tmp_path)
    assert "http://" not in text
    assert "https://" not in text
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "video", "audio", "form"}
    assert all(source.startswith("data:image/") for source in page.sources())
    assert not [attrs for tag, attrs in page.tags if tag == "script" and "src" in attrs]
    assert "url(" not in text
    assert "@import" not in text


def test_the_policy_allows_the_page_s_own_style_and_script_only(tmp_path):
    text = written(tmp_path)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1))
    assert "default-src 'none'" in policy
    for tag in ("style", "script"):
        own = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.S).group(1)
        name = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{name}'" in policy
    assert " style=" not in text
    assert not re.search(r"<[^>]+ on[a-z]+=", text)


def test_every_picture_decodes_and_has_its_size_and_an_alternative_text(tmp_path):
    page = Page(written(tmp_path))
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 1 + 1 + 1 + 3 + 2 + 1 + 1  # gallery, tilt, slices, three heights, two wedges, rings, FSC
    for attrs in images:
        assert decoded(attrs["src"]).size == (int(attrs["width"]), int(attrs["height"]))
        assert len(attrs["alt"]) > 10


@pytest.mark.parametrize("tilts", [1, 2, 7])
def test_the_sliders_have_a_frame_for_every_tilt_and_height(tmp_path, tilts):
    page = Page(written(tmp_path, tilts=tilts, series=arguments(tilts=max(tilts, 2))["series"].index(slice(0, tilts))))
    by_tilt, by_height = page.films()
    assert len(by_tilt["labels"]) == len(by_tilt["tracks"][0]) == tilts
    angles = [float(label.split("°")[0].replace("−", "-")) for label in by_tilt["labels"]]
    assert angles == sorted(angles)
    assert len(by_height["labels"]) == 13
    assert [len(track) for track in by_height["tracks"]] == [13, 13, 13]
    ranges = [attrs for tag, attrs in page.tags if tag == "input"]
    assert [int(r["max"]) + 1 for r in ranges] == [tilts, 13]
    for film in (by_tilt, by_height):
        for track in film["tracks"]:
            assert {decoded(uri).mode for uri in track} == {"L"}
    shown = page.sources()
    assert by_tilt["tracks"][0][int(ranges[0]["value"])] in shown
    assert by_height["labels"][int(ranges[1]["value"])] == "z = 0.0 nm"


def test_what_looks_like_markup_is_shown_as_text(tmp_path):
    base = arguments()
    text = written(
        tmp_path,
        title=ATTACK,
        summary={ATTACK: ATTACK},
        parameters={ATTACK: {ATTACK: [ATTACK]}},
        warnings=[ATTACK],
        files=[(ATTACK, ATTACK), ("javascript:alert(1)", "x"), ("//evil.example/x", "x")],
        reconstructions={ATTACK: base["reconstructions"]["WBP"]},
        curves={ATTACK: base["curves"]["WBP"]},
        whole={ATTACK: base["whole"]["WBP"]},
    )
    page = Page(text)
    assert text.count("<script") == text.count("</script>") == 3  # two films, one script
    assert "<script>alert" not in text
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert all(link.startswith("#") or ":" not in link for link in links)
    assert not any(link.startswith("/") for link in links)
    assert html.escape(ATTACK, quote=False).split('"')[0] in text
    assert "{{ 7 * 7 }}" in text


@pytest.mark.parametrize("where", ["truth", "WBP", "images"])
def test_nan_is_refused_and_nothing_is_written(tmp_path, where):
    changes = arguments()
    holed = {"truth": changes["truth"].values, "WBP": changes["reconstructions"]["WBP"].values}
    holed.get(where, changes["series"].images).view(-1)[5] = float("nan")
    with pytest.raises(ValueError, match=rf"{where}.*finite values, got 1 of"):
        write_report(tmp_path / "report.html", **changes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("shape", [(1, 5, 7), (12, 30, 32), (13, 33, 31)])
def test_odd_even_and_flat_volumes(tmp_path, shape):
    assert len(Page(written(tmp_path, shape=shape)).films()[1]["labels"]) == shape[0]


def test_volumes_of_different_sizes_are_shown_at_the_same_height(tmp_path):
    values = torch.zeros(12, 16, 16)
    values[6 + 2] = torch.eye(16)  # 2 voxels of 10 Å above the centre
    fine = torch.zeros(25, 32, 32)
    fine[12 + 4] = torch.eye(32)  # 4 voxels of 5 Å
    coarse, other = Volume(values, 10.0), Volume(fine, 5.0)
    film = report._slice_film({"coarse": coarse, "fine": other})
    at = film.labels.index("z = 2.0 nm")
    for track in film.tracks:
        brightest = max(range(len(film.labels)), key=lambda i: decoded(track.frames[i]).getextrema()[1])
        assert brightest == at


def test_without_truth_reconstructions_or_optics(tmp_path):
    series = arguments()["series"].replace(optics=None)
    text = written(
        tmp_path, series=series, truth=None, reconstructions={}, curves={}, whole=None, files=[], parameters={}
    )
    assert 'id="tomograms"' not in text
    assert 'id="resolution"' not in text
    assert "unknown" in text


def test_resolutions_are_those_of_the_curves(tmp_path):
    base = arguments()
    text = written(tmp_path)
    for curves in (base["curves"], base["whole"]):
        for threshold in (0.143, 0.5):
            assert f"{curves['WBP'].resolution(threshold):.1f} Å" in text
    assert "or finer" in text  # a perfect reconstruction never falls


def test_reversed_contrast_is_a_warning(tmp_path):
    base = arguments()
    truth = base["truth"].values
    curves = {"upside down": fsc(-truth, truth, 5.0, thickness=60.0)}
    assert "upside down correlates negatively" in written(tmp_path, curves=curves, whole=None)
    assert "correlates negatively" not in written(tmp_path)


def test_a_large_series_stays_small(tmp_path):
    film = report._tilt_film(arguments(tilts=61)["series"].replace(images=noise(61, 400, 420)), list(range(61)), 30)
    assert sum(len(frame) for frame in film.tracks[0].frames) < 4 / 3 * report.FILM_BUDGET + 100 * 61
    assert film.tracks[0].width <= 256
