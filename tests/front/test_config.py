"""The description of a run: it comes back from its own text, and says what is wrong with any other."""

import itertools
import math
import re
import types
from typing import Annotated, Any, get_args, get_origin

import pytest
import torch
import yaml
from pydantic import BaseModel, ValidationError

from cryosim.acquisition.simulate import LARGEST_FIELD, sampling_for
from cryosim.config import (
    ConfigError,
    Molecule,
    RunConfig,
    absorption,
    config_text,
    damage,
    detector,
    ice,
    motion,
    optics,
    read_config,
    sampling,
    tilt_scheme,
)
from cryosim.microscope.detector import Detector
from cryosim.microscope.optics import Optics
from cryosim.specimen.damage import CriticalExposure, critical_exposure

OTHER = RunConfig.model_validate(
    {
        "name": "lamella-3.b",
        "seed": 2**63 - 1,
        "specimen": {
            "molecules": [
                {"structure": "a very long folder name with blanks/" * 5 + "1abc.cif.gz", "assembly": 2, "copies": 3},
                {"structure": "Müller: #1 [α]/“x”.pdb"},
                {"structure": "odd\tname\nof 'two' \"lines\".pdb"},
                {"structure": "yes"},
                {"structure": "1.50"},
            ],
            "size": [1e-3, 2.5e7, 100],
            "gap": 2,
            "ice": None,
            "membranes": [
                {
                    "shape": "torus",
                    "spacing": 9,
                    "embedded": [{"axis": [1, -2, 3]}, {"structure": "2xyz.pdb", "copies": 0}],
                },
                {"amplitude": 0.1, "degree": 8},
            ],
            "filaments": [{"symmetry": "actin", "offset": 31.5, "persistence": None, "name": "F-actin 1.2"}],
            "gold": {"copies": 3},
        },
        "tilts": {"scheme": "bidirectional", "extent": 0.3, "step": 0.1, "total_dose": 1e-7, "axis_angle": -83.25},
        "optics": {"defocus": -1.5e-5, "phase_shift": 90, "amplitude_contrast": 1, "voltage": 200},
        "detector": {"shape": [7, 9], "pixel_size": 0.1 + 0.2},
        "sampling": {"pixel_size": 1 / 3, "thickness": 2, "parametrization": "peng", "width": 6},
        "output": {"files": ["zarr", "labels", "halves"], "binning": 2},
    }
)


def written(tmp_path, text: str | bytes):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(tmp_path, text: str | bytes) -> str:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


# ---- round trip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RunConfig(), OTHER], ids=["default", "other"])
def test_the_text_comes_back(config, tmp_path):
    assert read_config(written(tmp_path, config_text(config))) == config
    assert read_config(written(tmp_path, yaml.safe_dump(config.model_dump(mode="json")))) == config
    assert config_text(read_config(written(tmp_path, config_text(config)))) == config_text(config)


@pytest.mark.parametrize("section", ["membranes", "filaments"])
def test_the_examples_in_the_text_are_descriptions(section):
    """Where a list is empty, the comment below it shows an entry: without its marks it is the default of one."""
    lines = config_text(RunConfig()).splitlines()
    begin = lines.index(f"  {section}: []")
    assert lines[begin + 1] == "  # for example:"
    example = [
        line.removeprefix("  # ") for line in itertools.takewhile(lambda x: x.startswith("  #"), lines[begin + 2 :])
    ]
    example = example[: next((i for i, line in enumerate(example) if not line.startswith(" ")), None)]
    specimen = RunConfig.model_validate({"specimen": {section: yaml.safe_load("\n".join(example))}}).specimen
    assert getattr(specimen, section) == [type(getattr(specimen, section)[0])()]


def test_what_is_left_out_has_its_default(tmp_path):
    assert read_config(written(tmp_path, "{}")) == RunConfig()
    assert read_config(written(tmp_path, "seed: 7\noptics:\n  defocus: 1e4\n")) == RunConfig(
        seed=7, optics=RunConfig().optics.model_copy(update={"defocus": 10000.0})
    )


def test_the_parts_are_what_the_text_says():
    assert tilt_scheme(OTHER.tilts).angles.tolist() == pytest.approx([0, 0.1, 0.2, 0.3, -0.1, -0.2, -0.3])
    assert float(tilt_scheme(OTHER.tilts).doses.sum()) == pytest.approx(1e-7)
    assert float(tilt_scheme(OTHER.tilts).axis_angle) == -83.25
    lens = optics(OTHER.optics)
    assert (lens.defocus, lens.phase_shift, lens.amplitude_contrast, lens.voltage) == (-1.5e-5, 90, 1, 200)
    assert (detector(OTHER).shape, detector(OTHER).pixel_size) == ((7, 9), 0.1 + 0.2)
    assert ice(OTHER) is None
    chosen = sampling(OTHER)
    assert (chosen.pixel_size, chosen.thickness, chosen.parametrization, chosen.width) == (1 / 3, 2, "peng", 6)
    assert chosen.dtype == torch.float32


def described(**sections) -> RunConfig:
    return RunConfig.model_validate(sections)


def test_damage_of_the_paper_is_the_default():
    made = damage(RunConfig())
    assert made is not None and made.critical is not None
    wanted = CriticalExposure()
    assert (made.critical.scale, made.critical.exponent, made.critical.offset) == (
        wanted.scale,
        wanted.exponent,
        wanted.offset,
    )
    none = {"critical_exposure": None, "water_diffusion": 0}
    assert damage(described(specimen={"damage": none})) is None


def test_damage_by_class():
    rates = {"critical_exposure": None, "b_growth": 3, "loss": 0.001, "carboxyl_loss": 0.02, "metal_loss": 0.03}
    made = damage(described(specimen={"damage": rates}))
    assert made is not None and made.critical is None and made.b_growth == 3
    assert made.loss.tolist() == [0.001, 0.02, 0.001, 0.03, 0.001, 0.001]
    twice = damage(described(specimen={"damage": {"critical_exposure": 2}}))
    ratio = critical_exposure(0.1, critical=twice.critical) / critical_exposure(0.1)
    assert float(ratio) == pytest.approx(2)


def test_voltages_without_critical_exposures():
    with pytest.raises(ValidationError, match="critical_exposure to null"):
        described(optics={"voltage": 80})
    other = described(optics={"voltage": 80}, specimen={"damage": {"critical_exposure": None, "b_growth": 1}})
    assert damage(other).voltage_factor == 1


def test_motion_adds_up():
    assert motion(RunConfig()) is None
    section = {"drift": 3, "velocity": 0.2, "correlation": 100, "doming": 50}
    made = motion(described(specimen={"motion": section, "size": [900, 700, 200]}, tilts={"frames": 3}))
    assert made.drift.shape == (41, 3, 3)
    assert made.field.shape[:3] == (41, 3, 3) and made.spacing <= 100
    again = motion(described(specimen={"motion": section, "size": [900, 700, 200]}, tilts={"frames": 3}))
    assert torch.equal(made.field, again.field)


def test_cameras():
    ideal = detector(RunConfig())
    assert (ideal.counting, ideal.gain, ideal.dark) == ("poisson", None, None)
    section = {"camera": "falcon4i", "shape": [40, 50], "gain_variation": 0.05, "dead_pixels": 0.01, "hot_pixels": 0.02}
    made = detector(described(detector=section))
    assert made.counting == "binary" and made.coincidence_radius == pytest.approx(2.394)
    assert float(made.gain[made.gain > 0].std()) == pytest.approx(0.05, rel=0.1)
    assert 5 <= int((made.gain == 0).sum()) <= 40 and 15 <= int((made.dark > 0).sum()) <= 70
    assert torch.equal(made.gain, detector(described(detector=section)).gain)
    assert not torch.equal(made.gain, detector(described(detector=section, seed=2)).gain)
    mine = detector(described(detector=section | {"frame_rate": 100, "counting": "poisson", "coincidence_radius": 0}))
    assert (mine.frame_rate, mine.counting, mine.coincidence_radius) == (100, "poisson", 0)


def test_electrons_in_files_are_hits():
    assert detector(described(output={"movies": "eer"})).counting == "binary"
    with pytest.raises(ValidationError, match="null or binary"):
        described(output={"movies": "eer"}, detector={"counting": "poisson"})
    with pytest.raises(ValidationError, match="falcon3"):
        described(output={"movies": "eer"}, detector={"camera": "falcon3"})
    with pytest.raises(ValidationError, match="200 or 300 kV"):
        described(optics={"voltage": 120}, detector={"camera": "falcon4i"})


def test_frames_and_doses_of_the_scheme():
    made = tilt_scheme(described(tilts={"frames": 4, "dose_rate": 2.5, "cosine_power": 1}).tilts)
    assert (made.frames, made.dose_rate) == (4, 2.5)
    assert float(made.doses.sum()) == pytest.approx(120)
    assert float(made.doses[-1] / made.doses[0]) == pytest.approx(2)


def test_ice_with_structure_relief_and_absorption():
    text = {
        "specimen": {"mean_free_path": 1970, "ice": {"structure": "water", "roughness": 5, "mean_free_path": 3150}},
        "optics": {"amplitude_contrast": 0, "slit": None, "aperture": 10},
    }
    config = RunConfig.model_validate(text)
    made, again = ice(config), ice(config)
    assert made.structure == "water"
    assert float(made.relief.heights.std()) == pytest.approx(5, rel=0.2)
    assert torch.equal(made.relief.heights, again.relief.heights)
    assert (absorption(config.specimen).medium, absorption(config.specimen).molecules) == (3150, 1970)
    assert (optics(config.optics).slit, optics(config.optics).aperture) == (math.inf, 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("specimen: {mean_free_path: 1970}", "both or none of specimen.mean_free_path and specimen.ice.mean_free_path"),
        ("specimen: {mean_free_path: 1970, ice: null}", "optics.amplitude_contrast 0 where mean free paths are given"),
    ],
)
def test_electrons_are_absorbed_once(text, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        read_config(written(tmp_path, text))


# ---- every field says what it is -----------------------------------------------------------------------------------


def sections(model: type[BaseModel], at: str = ""):
    """(path, field) of every field at every depth."""
    for name, field in model.model_fields.items():
        yield f"{at}{name}", field
        for inner in _models(field.annotation):
            yield from sections(inner, f"{at}{name}.")


def _models(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _holds_float(annotation: Any) -> bool:
    if get_origin(annotation) in (Annotated, tuple, types.UnionType):
        return any(_holds_float(part) for part in get_args(annotation))
    return annotation is float


FIELDS = list(sections(RunConfig))


@pytest.mark.parametrize(("path", "field"), FIELDS, ids=[path for path, _ in FIELDS])
def test_every_field_is_described_with_its_unit(path, field):
    """A section is its own heading; every measured number (a float) has its unit in brackets, counts have none."""
    if _models(field.annotation) and not field.description:
        assert isinstance(field.annotation, type), "only a plain section may go without a description"
        return
    assert field.description
    assert field.description.endswith(".")
    if _holds_float(field.annotation):
        assert re.search(
            r"\[(Å|V|kV|eV|mm|mrad|deg|1|px|1/s|e-/Å\^2|e-/Å\^2/s|(1|Å|Å\^2) per e-/Å\^2)\]", field.description
        )


def test_every_field_and_every_unit_stands_in_the_text():
    """In an example, where a list is empty."""
    text = config_text(RunConfig())
    for path, field in FIELDS:
        name = path.split(".")[-1]
        assert re.search(rf"^[\s#]*(- )?{name}:", text, re.MULTILINE)
        assert field.description is None or f"# {field.description}" in text


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ("colour",),
        ("specimen", "colour"),
        ("specimen", "molecules", 0, "colour"),
        ("specimen", "ice", "colour"),
        ("tilts", "colour"),
        ("optics", "colour"),
        ("detector", "colour"),
        ("sampling", "colour"),
    ],
)
def test_an_unknown_key_is_named_with_its_path(path, tmp_path):
    given: Any = 1
    for part in reversed(path):
        given = [given] if part == 0 else {part: given}
    said = complaint(tmp_path, yaml.safe_dump(given))
    assert said == f"FILE: unknown key {'.'.join(map(str, path))}. `cryosim config new` shows every key there is."


NUMBERS = {path: field for path, field in FIELDS if _holds_float(field.annotation)}
LISTS = {path for path, field in FIELDS if get_origin(field.annotation) is list}


def _length(annotation: Any) -> int:
    """Of a tuple; 0 for what is none."""
    if get_origin(annotation) is Annotated:
        return _length(get_args(annotation)[0])
    return len(get_args(annotation)) if get_origin(annotation) is tuple else 0


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", "1e999"])
@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_are_finite(path, value, tmp_path):
    """Wherever they stand: in a section, in the first section of a list, or among several."""
    n = _length(NUMBERS[path].annotation)
    text, key = f"[{', '.join(['100'] * (n - 1) + [value])}]" if n else value, ""
    *outer, name = path.split(".")
    for depth in range(len(outer), -1, -1):
        text = f"{{{[*outer, name][depth]}: {text}}}"
        if depth and ".".join(outer[:depth]) in LISTS:
            text = f"[{text}]"
    for depth, part in enumerate([*outer, name], 1):
        key += f".{part}.0" if ".".join([*outer, name][:depth]) in LISTS else f".{part}"
    said = complaint(tmp_path, text)
    assert said.startswith(f"FILE: {key[1:]}")
    assert "\n" not in said
    assert re.search("nan|inf|1e999", said)


@pytest.mark.parametrize(
    ("text", "key", "got"),
    [
        ("seed: -1", "seed", "-1"),
        ("seed: 1.5", "seed", "1.5"),
        ("seed: yes", "seed", "True"),
        ("seed: 9223372036854775808", "seed", "9223372036854775808"),
        ("name: a/b", "name", "'a/b'"),
        ("name: ''", "name", "''"),
        ("name: 12", "name", "12"),
        (f"name: {'x' * 101}", "name", "'xxx"),
        ('name: "two\\nlines"', "name", r"'two\nlines'"),
        ("specimen: 5", "specimen", "5"),
        ("specimen: null", "specimen", "None"),
        ("specimen: {molecules: []}", "specimen.molecules", "[]"),
        ("specimen: {molecules: ubiquitin}", "specimen.molecules", "'ubiquitin'"),
        ("specimen: {molecules: [ubiquitin]}", "specimen.molecules.0", "'ubiquitin'"),
        ("specimen: {molecules: [{structure: ''}]}", "specimen.molecules.0.structure", "''"),
        ("specimen: {molecules: [{copies: -1}]}", "specimen.molecules.0.copies", "-1"),
        ("specimen: {molecules: [{name: a/b}]}", "specimen.molecules.0.name", "'a/b'"),
        ("specimen: {membranes: [{shape: cube}]}", "specimen.membranes.0.shape", "'cube'"),
        ("specimen: {membranes: [{embedded: [{axis: [0, 0, 0]}]}]}", "specimen.membranes.0.embedded.0.axis", "(0.0, 0"),
        ("specimen: {filaments: [{}, {cyclic: 0}]}", "specimen.filaments.1.cyclic", "0"),
        ("specimen: {gap: 1.9}", "specimen.gap", "1.9"),
        ("specimen: {occupancy: 0.7}", "specimen.occupancy", "0.7"),
        ("output: {files: [tiff]}", "output.files.0", "'tiff'"),
        ("output: {files: [zarr, zarr]}", "output", "'zarr', 'zarr'"),
        ("specimen: {molecules: [{copies: 1}, {assembly: 0}]}", "specimen.molecules.1.assembly", "0"),
        ("specimen: {size: [100, 100]}", "specimen.size.2", "[100, 100]"),
        ("specimen: {size: [100, 100, 0]}", "specimen.size.2", "0"),
        ("specimen: {size: [100, -3, 9]}", "specimen.size.1", "-3"),
        ("specimen: {size: 100}", "specimen.size", "100"),
        ("specimen: {gap: -1}", "specimen.gap", "-1"),
        ("specimen: {ice: {thickness: 0}}", "specimen.ice.thickness", "0"),
        ("specimen: {ice: thick}", "specimen.ice", "'thick'"),
        ("tilts: {scheme: spiral}", "tilts.scheme", "'spiral'"),
        ("tilts: {extent: 89}", "tilts.extent", "89"),
        ("tilts: {extent: -1}", "tilts.extent", "-1"),
        ("tilts: {step: 0}", "tilts.step", "0"),
        ("tilts: {step: 7}", "tilts", "step 7.0"),
        ("tilts: {step: 1e-6}", "tilts", "step 1e-06"),
        ("tilts: {total_dose: 0}", "tilts.total_dose", "0"),
        ("tilts: {total_dose: 1.0e+30}", "tilts.total_dose", "1e+30"),
        ("tilts: {axis_angle: 1e30}", "tilts.axis_angle", "'1e30'"),
        ("optics: {voltage: 0}", "optics.voltage", "0"),
        ("optics: {amplitude_contrast: 7}", "optics.amplitude_contrast", "7"),
        ("optics: {defocus: on}", "optics.defocus", "True"),
        ("optics: {defocus: three}", "optics.defocus", "'three'"),
        ("optics: {defocus: 2024-01-01}", "optics.defocus", "datetime.date"),
        ("optics: [1, 2]", "optics", "[1, 2]"),
        ("detector: {shape: [0, 10]}", "detector.shape.0", "0"),
        ("detector: {shape: [10, -10]}", "detector.shape.1", "-10"),
        ("detector: {shape: [10.5, 10]}", "detector.shape.0", "10.5"),
        ("detector: {shape: [true, 10]}", "detector.shape", "[True, 10]"),
        ("detector: {shape: [1000000, 10]}", "detector.shape.0", "1000000"),
        ("detector: {pixel_size: -1}", "detector.pixel_size", "-1"),
        ("sampling: {thickness: 1e-9}", "sampling.thickness", "'1e-9'"),
        ("sampling: {width: 3}", "sampling.width", "3"),
        ("1: 2", "1", "1"),
    ],
)
def test_the_key_and_the_value_are_named(text, key, got, tmp_path):
    said = complaint(tmp_path, text)
    assert said.startswith(f"FILE: {key}") or said.startswith(f"FILE: unknown key {key}")
    assert got in said
    assert "\n" not in said
    assert "Value error" not in said


def test_every_mistake_has_its_own_line(tmp_path):
    said = complaint(tmp_path, "seed: -1\noptics: {voltage: -300, color: 1}\n").splitlines()
    assert len(said) == 3
    assert all(line.startswith("FILE: ") for line in said)


@pytest.mark.parametrize(
    "keys",
    [
        "detector: {pixel_size: 0.3}\noptics: {defocus: 50000}",  # the disc of confusion is wider than the detector
        "detector: {shape: [16384, 16]}",
        "optics: {defocus: 1e300}",
        "sampling: {pixel_size: 1e-4}",
        "optics: {voltage: 1e-6}",
    ],
)
def test_a_field_that_no_memory_holds_is_refused(keys, tmp_path):
    said = complaint(tmp_path, keys)
    assert f"at most {LARGEST_FIELD} px" in said
    assert re.search(r"detector of .* Å and a margin of .* defocus of", said)


def test_a_large_field_may_be_asked_for_by_its_shape():
    camera, lens = Detector((7, 9), 0.3), Optics(defocus=50000.0)
    with pytest.raises(ValueError, match="got 23362 px of 0.14"):
        sampling_for(camera, lens)
    assert sampling_for(camera, lens, shape=(64, 80)).shape == (64, 80)


@pytest.mark.parametrize("keys", ["ice: {thickness: 1e9}", "size: [100, 100, 1e9]"])
def test_a_depth_that_no_memory_holds_is_refused(keys, tmp_path):
    said = complaint(tmp_path, f"specimen: {{{keys}}}")
    assert said.startswith("FILE: expected specimen.size and specimen.ice.thickness to be at most 16384 times")
    assert "got 1e+09 Å" in said


@pytest.mark.parametrize("text", ["- seed\n- 1\n", "", "# only a comment\n", "seed", "12", "null"])
def test_a_file_without_keys_is_refused(text, tmp_path):
    assert "expected keys such as seed and specimen, got " in complaint(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "seed: [1, 2",
        "seed: 1\n\tname: x\n",
        "a: b: c",
        "seed: 2024-13-45",
        "seed: !!python/name:os.system x",
        "%%",
        "\x00",
        "[" * 10000,
    ],
)
def test_what_is_not_yaml_is_refused(text, tmp_path):
    assert "is not valid YAML" in complaint(tmp_path, text)


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "optics:\n  defocus: 1\n  voltage: 300\n  defocus: 2\n"])
def test_a_key_that_stands_twice_is_refused(text, tmp_path):
    said = complaint(tmp_path, text)
    assert re.search("the key (seed|defocus) stands there twice", said)


def test_merged_sections_are_plain_yaml(tmp_path):
    text = "optics: &lens {defocus: 20000}\n"
    assert read_config(written(tmp_path, text)).optics.defocus == 20000
    text = "specimen:\n  molecules:\n  - &a {structure: ubiquitin, copies: 2}\n  - {<<: *a, copies: 3}\n"
    molecules = read_config(written(tmp_path, text)).specimen.molecules
    assert molecules == [Molecule(structure="ubiquitin", copies=2), Molecule(structure="ubiquitin", copies=3)]


def test_a_long_wrong_value_is_not_repeated_whole(tmp_path):
    assert len(complaint(tmp_path, f"name: {'x/' * 100000}")) < 400


@pytest.mark.parametrize(
    "content", [bytes(range(256)) * 10, b"\xff\xfe\x00\x01", b"seed: 1 # caf\xe9\n", b"\x1f\x8b\x08abc"]
)
def test_a_binary_file_is_refused(content, tmp_path):
    assert re.search("cannot be read|is not valid YAML", complaint(tmp_path, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read"):
            read_config(path)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    assert read_config(written(tmp_path, "\ufeffseed: 5\r\n")).seed == 5


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 2
    assert math.isfinite(RunConfig().optics.defocus)
