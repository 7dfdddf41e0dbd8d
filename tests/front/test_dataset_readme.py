"""The README of a dataset explains every file, and none that is not there; masks have the same numbers in all items."""

import fnmatch
import json
import re
from pathlib import Path

import pytest
import yaml

import cryosim.dataset
from cryosim.config import ConfigError
from cryosim.dataset import complete_items, make_dataset
from cryosim.dataset_readme import ENTRIES, inventory
from cryosim.description import describe
from cryosim.io.files import FormatError
from cryosim.scene import MATTER

BASE = {
    "name": "tiny",
    "specimen": {"molecules": [{"structure": "ubiquitin"}], "size": [150, 150, 100], "ice": {"thickness": 120}},
    "tilts": {"extent": 20, "step": 20, "total_dose": 60, "angle_error": 0.5},
    "detector": {"shape": [16, 17], "pixel_size": 10},
    "sampling": {"thickness": 60, "width": 6},
}
ALL = ["alignments", "halves", "clean", "labels", "tomogram", "zarr", "copick", "specimen"]


def described(**sections):
    return describe(BASE | sections)


WHOLE = described(
    output={"files": ALL, "movies": "eer"},
    specimen=BASE["specimen"]
    | {
        "molecules": [{"structure": {"choice": ["ubiquitin", "apoferritin"]}}],
        "motion": {"drift": 1.0},
    },
)
UNEVEN = described(output={"movies": "tiff"}, detector=BASE["detector"] | {"dead_pixels": {"uniform": [0, 0.1]}})
PLAIN = described()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert make_dataset(WHOLE, folder, 2, workers=1).made == 2
    return folder


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uneven") / "out"
    assert make_dataset(UNEVEN, folder, 1, workers=1).made == 1
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert make_dataset(PLAIN, folder, 1, workers=1).made == 1
    return folder


def told(folder: Path) -> list[str]:
    """Patterns of the files of an item, as the README lists them."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    listed = text.partition("## Files of an item")[2].partition("\n## ")[0]
    return re.findall(r"^- `([^`]+)`:", listed, flags=re.MULTILINE)


def meant(pattern: str, item: str, name: str) -> bool:
    pattern = pattern.replace("ITEM", item)
    return fnmatch.fnmatchcase(name, f"{pattern}*" if pattern.endswith("/") else pattern)


@pytest.mark.parametrize("kind", ["whole", "uneven", "plain"])
def test_every_file_of_an_item_is_explained_once_and_every_explained_file_is_there(kind, request):
    folder = request.getfixturevalue(kind)
    patterns = told(folder)
    for item in complete_items(folder):
        files = [path.relative_to(item).as_posix() for path in item.rglob("*") if path.is_file()]
        for file in files:
            assert len([p for p in patterns if meant(p, item.name, file)]) == 1, file
        for pattern in patterns:
            assert any(meant(pattern, item.name, file) for file in files), pattern


def test_together_they_explain_everything_there_is(whole, uneven):
    assert {*told(whole), *told(uneven)} == {entry.pattern for entry in ENTRIES}


@pytest.mark.parametrize("kind", ["whole", "uneven", "plain"])
def test_every_file_of_the_dataset_is_explained(kind, request):
    folder = request.getfixturevalue(kind)
    listed = (folder / "README.md").read_text(encoding="utf-8").partition("## Files of an item")[0]
    assert ("copick.json" in listed) == (folder / "copick.json").exists() == (kind == "whole")
    for path in folder.iterdir():
        assert f"`{path.name}" in listed


def test_only_what_is_asked_for_is_told(plain):
    text = (plain / "README.md").read_text(encoding="utf-8")
    assert not re.search("copick|IMOD|AreTomo|Warp|masks|even|gain_|zarr", text)
    drawn = described(output={"files": {"choice": [["halves"], ["zarr", "labels"], ["tomogram"]]}})
    patterns = {entry.pattern for entry in inventory(drawn).entries}
    assert {"ITEM_even.mrc", "ITEM_truth.zarr/", "ITEM_semantic.zarr/", "ITEM_tomogram.mrc"} < patterns
    assert "ITEM_tomogram.zarr/" not in patterns  # no item has both


def test_its_python_runs_in_the_folder(whole, monkeypatch):
    text = (whole / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code) == 1
    monkeypatch.chdir(whole)
    names: dict = {}
    exec(code[0], names)
    assert names["volume"].shape == (1, 12, 16, 17) and names["images"].shape == (1, 3, 16, 17)
    angles = names["series"].tilts.angles.tolist()
    aln = (whole / "ExperimentRuns" / "tiny_000000" / "tiny_000000.tlt").read_text().split()
    assert sorted(angles) == pytest.approx([float(angle) for angle in aln]) and angles != [0, 20, -20]


def test_the_same_description_gives_the_same_text_without_place_and_time(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(cryosim.dataset, "make_item", lambda *_: 1 / 0)  # what goes with the items is all that matters
    reordered = yaml.safe_load((whole / "dataset.yaml").read_text(encoding="utf-8"))
    make_dataset(describe(dict(reversed(reordered.items()))), tmp_path, 1, workers=1)
    for name in ("README.md", "copick.json"):
        raw = (whole / name).read_bytes()
        assert (tmp_path / name).read_bytes() == raw
        assert str(whole).encode() not in raw and not re.search(rb"\b20\d\d\b|\d:\d\d", raw)
    assert max(map(len, (whole / "README.md").read_text(encoding="utf-8").splitlines())) <= 120


# ---- numbers of masks ----------------------------------------------------------------------------------------------


def test_numbers_are_the_same_in_all_items_whichever_structure_they_have(whole):
    expected = {name: number for number, name in enumerate([*MATTER, "ubiquitin", "apoferritin"], 1)}
    assert inventory(WHOLE).numbers == expected
    held = set()
    for item in complete_items(whole):
        rows = json.loads((item / f"{item.name}_semantic.json").read_text(encoding="utf-8"))
        assert {row["name"]: row["number"] for row in rows} == expected
        held |= {row["name"] for row in rows if row["kind"] == "protein"}
    assert held == {"ubiquitin", "apoferritin"}
    objects = json.loads((whole / "copick.json").read_text(encoding="utf-8"))["pickable_objects"]
    assert {o["name"]: o["label"] for o in objects} == {name.replace(" ", "-"): n for name, n in expected.items()}
    assert {o["name"] for o in objects if o["is_particle"]} == {"gold-bead", "ubiquitin", "apoferritin"}
    text = (whole / "README.md").read_text(encoding="utf-8")
    for name, number in expected.items():
        assert f"| {number} | {name} | {name.replace(' ', '-')} |" in text


def test_choices_of_whole_sections_are_in_the_numbers(tmp_path):
    guest = {"shape": "sphere", "radius": 60, "embedded": [{"structure": {"choice": ["a.pdb", "b.cif.gz"]}}]}
    fibres = {"choice": [[], [{"structure": "c.pdb", "offset": 20, "name": "fibre"}]]}
    description = describe({"specimen": {"membranes": [guest], "filaments": fibres}}, tmp_path)
    for name in ("a.pdb", "c.pdb", "b.cif.gz"):
        with pytest.raises(FormatError, match=f"{name}: file: expected an existing file"):
            make_dataset(description, tmp_path / "out", 1, workers=1)
        (tmp_path / name).write_text("not looked at yet")
    assert list(inventory(description).numbers)[len(MATTER) :] == ["apoferritin", "ubiquitin", "a", "fibre", "b"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["membrane"], "expected molecules of other names than membrane"),
        (["one two", "one_two"], "expected names that differ in copick too"),
    ],
)
def test_names_that_cannot_be_are_refused_before_anything_is_made(names, said, tmp_path):
    molecules = [{"structure": "ubiquitin", "name": {"choice": names}}]
    description = described(specimen={"molecules": molecules}, output={"files": ["copick"]})
    with pytest.raises(ValueError, match=said) as caught:
        make_dataset(description, tmp_path / "out", 1, workers=1)
    assert not isinstance(caught.value, ConfigError) and not (tmp_path / "out").exists()


def test_a_copick_project_that_was_edited_stays_until_the_description_is_another(tmp_path):
    description = described(output={"files": ["copick"]}, tilts={"extent": 0, "total_dose": 20})
    make_dataset(description, tmp_path, 1, workers=1)
    path = tmp_path / "copick.json"
    edited = path.read_text(encoding="utf-8").replace('"user_id": "user"', '"user_id": "me"')
    assert '"user_id": "me"' in edited
    path.write_text(edited, encoding="utf-8")
    (tmp_path / "README.md").unlink()
    assert make_dataset(description, tmp_path, 1, resume=True, workers=1).skipped == 1
    assert path.read_text(encoding="utf-8") == edited and told(tmp_path)
    other = described(output={"files": ["copick"]}, tilts={"extent": 0, "total_dose": 21})
    with pytest.warns(UserWarning, match="was of another description"):
        make_dataset(other, tmp_path, 1, resume=True, workers=1)
    assert '"user_id": "user"' in path.read_text(encoding="utf-8")
