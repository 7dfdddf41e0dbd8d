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
from inverse import report_pictures
from inverse.design import estimated_damping
from inverse.metrics.fsc import fsc, measured_region
from inverse.physics.tilt import TiltProjection
from inverse.physics.wedge import measured
from inverse.reconstruction import Reconstruction, reconstruct
from inverse.report import write_report
from inverse.report_evidence import evidence

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
    film = report_pictures.slice_film({"coarse": coarse, "fine": other})
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
    film = report_pictures.tilt_film(
        arguments(tilts=61)["series"].replace(images=noise(61, 400, 420)), list(range(61)), 30
    )
    assert sum(len(frame) for frame in film.tracks[0].frames) < 4 / 3 * report_pictures.FILM_BUDGET + 100 * 61
    assert film.tracks[0].width <= 256


# ---- measured or invented ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    """Of methods with a deviation of noise, with that of a posterior, and with iterations and a warning but none."""
    series = arguments()["series"]
    plain = reconstruct(series, "least-squares", thickness=60.0)
    told = {"residuals": (1.0, 0.1), "misfits": (3.0, 1.0), "warnings": ("beware of it",), "std": None, "method": "pnp"}
    made = {"damped": plain, "Gaussian": reconstruct(series, "wiener", thickness=60.0), "steps": plain.replace(**told)}
    return made


def section(text):
    return text[text.index('<section id="evidence">') :].split("</section>")[0]


def test_only_results_have_a_section_on_what_is_measured(tmp_path, results):
    assert 'id="evidence"' not in written(tmp_path) and "#evidence" not in written(tmp_path)
    text = written(tmp_path, reconstructions={"a volume": results["damped"].volume, "a result": results["damped"]})
    assert 'href="#evidence"' in text
    assert section(text).count("<tr><th") == 2 and ">a result</th>" in section(text)  # its own row, and the head's
    assert "a volume" not in section(text)


def test_the_page_of_results_is_one_file_of_the_same_bytes_with_texts_for_its_pictures(tmp_path, results):
    text = written(tmp_path, reconstructions=results)
    assert text == written(tmp_path, reconstructions=results)
    assert os.listdir(tmp_path) == ["report.html"]
    assert "http" not in re.sub(r'"data:[^"]*"', "", text).replace("http-equiv", "")
    images = [attrs for tag, attrs in Page(section(text)).tags if tag == "img"]
    assert len(images) == 1 + 3 + 1  # misfit by tilt, planes of each, convergence
    for attrs in images:
        assert decoded(attrs["src"]).size == (int(attrs["width"]), int(attrs["height"]))
    alternatives = [attrs["alt"] for attrs in images]
    assert all(name in alternatives[0] for name in results)
    assert ["deviation" in alt for alt in alternatives[1:4]] == [True, True, False]
    assert alternatives[4].endswith("of steps.")


def test_warnings_of_results_come_first_with_the_name_of_the_method(tmp_path, results):
    text = written(tmp_path, reconstructions=results, warnings=["a first one"])
    assert "<li>a first one</li><li>steps: beware of it</li>" in text
    assert text.index("steps: beware of it") < text.index("<main>")


def test_the_numbers_are_those_of_the_results(results):
    rows = {row.name: row for row in evidence(results).rows}
    for name, result in results.items():
        values = result.volume.values.double()
        kept, _ = measured(values, result.angles, result._geometry, _cutoff_of(result))
        assert rows[name].consistency == f"{result.consistency:.2f}"
        assert rows[name].determined == f"{100 * float((kept.norm() / values.norm()) ** 2):.0f} %"
        assert rows[name].rest == f"{100 * float(((values - kept).norm() / values.norm()) ** 2):.0f} %"
    assert rows["damped"].std == f"{float(results['damped'].std.quantile(0.5)):.3g} V"
    assert rows["damped"].weight.endswith(" voxel²")
    assert [rows[name].kind.split(":")[0] for name in results] == ["noise alone", "posterior", ""]
    assert (rows["steps"].std, rows["Gaussian"].weight) == ("not asked for", "none")


def _cutoff_of(result):
    return estimated_damping(result.images, result.noise, result.angles, result._geometry)


def test_what_is_measured_is_all_measured_and_the_rest_is_not():
    """Of a blob, far from the sides, seen by every tilt but for the wedge."""
    z, y, x = torch.meshgrid(*(torch.arange(n) - n // 2 for n in (16, 31, 96)), indexing="ij")
    blob = 5 * torch.exp(-(z**2 + y**2 + x**2) / 8.0)
    angles = torch.arange(-60.0, 61.0, 3.0, dtype=torch.float64)
    images = TiltProjection(angles, (16, 31, 96)).A(blob[None, None])[0, 0].float()
    number = {"images": images, "angles": angles, "noise": torch.full((41,), 5.0), "kept": torch.tensor(1.0)}
    whole = Reconstruction(Volume(blob, 5.0), None, **number, weight=torch.tensor(float("nan")))
    kept = whole.replace(volume=whole.measured)
    left = whole.replace(volume=Volume(blob - kept.volume.values, 5.0))
    nothing = whole.replace(volume=Volume(torch.zeros_like(blob), 5.0))
    rows = evidence({"whole": whole, "kept": kept, "left": left, "nothing": nothing}).rows
    share = [(float(row.determined.split()[0]), float(row.rest.split()[0])) for row in rows[:3]]
    assert all(one + other <= 101 for one, other in share)  # the cut at the sides only takes away; two are rounded
    assert share[1][0] > 97 and share[1][1] < 3
    assert share[2][0] < 3 and share[2][1] > 95
    assert 5 < share[0][1] < 30
    assert float(rows[0].consistency) < 1e-3
    assert rows[3].determined == rows[3].rest == "none"
    assert float(rows[3].consistency) == pytest.approx(float(images.square().mean() / 5), rel=0.01)


def test_the_measured_part_is_computed_once(results, monkeypatch):
    calls, original = [], Reconstruction.measured
    monkeypatch.setattr(Reconstruction, "measured", property(lambda self: calls.append(1) or original.fget(self)))
    evidence(results)
    assert len(calls) == len(results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std": torch.zeros(3, 3, 3)}, r"damped.*standard deviation of the volume's shape"),
        ({"std": torch.full((12, 33, 31), float("inf"))}, r"damped.*std: expected finite values"),
        ({"noise": torch.zeros(7)}, r"damped.*finite misfit of every tilt"),
    ],
)
def test_results_that_do_not_hold_together_are_refused_and_nothing_is_written(tmp_path, results, change, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, reconstructions={"damped": results["damped"].replace(**change)})
    assert os.listdir(tmp_path) == []


def test_names_of_results_that_look_like_markup_are_shown_as_text(tmp_path, results):
    text = written(tmp_path, reconstructions={ATTACK: results["steps"].replace(warnings=(ATTACK,))})
    assert "<script>alert" not in text and "<img src=x" not in text
    assert not [attrs for _, attrs in Page(text).tags if any(name.startswith("on") for name in attrs)]
