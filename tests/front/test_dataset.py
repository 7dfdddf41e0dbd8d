"""Datasets: what is in them, that the same description gives the same bytes, and what resuming keeps and makes."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import cryosim.dataset
from cryosim.cli import app
from cryosim.config import ConfigError, RunConfig
from cryosim.dataset import complete_items, is_complete, make_dataset, read_done, shard_of
from cryosim.description import describe, item_config
from cryosim.io.files import FormatError
from cryosim.run import run
from tests.front.tiny_dataset import DESCRIPTION, TINY, N, content

runner = CliRunner()


def command(*arguments):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def _made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dataset") / "made"
    summary = make_dataset(DESCRIPTION, folder, N, workers=1)
    assert summary[:4] == (N, 0, 0, ())
    return folder


@pytest.fixture
def made(_made, tmp_path) -> Path:
    """A finished dataset of a test's own."""
    return Path(shutil.copytree(_made, tmp_path / "made"))


@pytest.fixture
def copied(_made, monkeypatch) -> None:
    """Items are copied, not simulated: what is tested is how they are kept."""

    def copy(config, folder, **_):
        for path in (_made / "ExperimentRuns" / config.name).iterdir():
            if path.name != "DONE.json":
                shutil.copy(path, folder)

    monkeypatch.setattr(cryosim.dataset, "run", copy)


@pytest.fixture
def description(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


# ---- what is in it -------------------------------------------------------------------------------------------------


def test_an_item_is_what_simulate_makes_of_its_parameters(made, tmp_path):
    for i, item in enumerate(complete_items(made)):
        assert item.name == f"tiny_{i:06d}"
        parameters = yaml.safe_load((item / f"{item.name}_parameters.yaml").read_text(encoding="utf-8"))
        assert {"cryosim", "torch", "python"} <= set(parameters["versions"])
        config = RunConfig.model_validate({key: parameters[key] for key in RunConfig.model_fields})
        assert config == item_config(DESCRIPTION, i)
        if i == 2:
            run(config, tmp_path / "again")
            again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
            assert again == {path.name: path.read_bytes() for path in item.iterdir() if path.name != "DONE.json"}
    assert len({(item / f"{item.name}.mrc").read_bytes() for item in complete_items(made)}) == N


def test_done_tells_sizes_checksums_versions_seed_and_configuration(made):
    hashes = set()
    for i, item in enumerate(complete_items(made)):
        done = read_done(item)
        assert (done.item, done.index, done.seed) == (item.name, i, item_config(DESCRIPTION, i).seed)
        assert set(done.files) == {path.name for path in item.iterdir()} - {"DONE.json"}
        for name, file in done.files.items():
            raw = (item / name).read_bytes()
            assert file == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        hashes.add(done.configuration)
    assert len(hashes) == 1


def test_no_file_tells_place_or_time(made, _made):
    year = 2000  # of every date since
    for name, raw in content(made).items():
        assert str(_made).encode() not in raw and str(Path.home()).encode() + b"/" not in raw, name
        assert b"/tmp" not in raw, name
        if not name.endswith(".mrc"):
            assert not any(b"%d-" % y in raw for y in range(year, year + 100)), name
    assert {path.name for path in made.iterdir()} == {"ExperimentRuns", "README.md", "dataset.yaml", ".lock"}


def test_shards_and_single_machine_give_the_same_bytes(made, tmp_path):
    for shard in ((1, 3), (0, 3), (2, 3)):
        make_dataset(DESCRIPTION, tmp_path / "shards", N, shard=shard, workers=1)
    assert content(tmp_path / "shards") == content(made)


def test_the_written_description_makes_the_same_dataset(made, tmp_path):
    assert command("dataset", made / "dataset.yaml", "-n", N, "--out", tmp_path / "again", "-w", 0).exit_code == 0
    assert content(tmp_path / "again") == content(made)


def test_a_dataset_can_be_made_longer(made, tmp_path):
    make_dataset(DESCRIPTION, tmp_path / "long", 2, workers=1)
    summary = make_dataset(DESCRIPTION, tmp_path / "long", N, resume=True, workers=1)
    assert summary[:4] == (N - 2, 2, 0, ())
    assert content(tmp_path / "long") == content(made)


# ---- resume --------------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def _edit_done(item: Path, /, **fields) -> None:
    done = json.loads((item / "DONE.json").read_text())
    (item / "DONE.json").write_text(json.dumps(done | fields))


DAMAGE = {
    "the folder is missing": shutil.rmtree,
    "DONE is missing": lambda item: (item / "DONE.json").unlink(),
    "DONE is empty": lambda item: (item / "DONE.json").write_bytes(b""),
    "DONE is cut off": lambda item: (item / "DONE.json").write_bytes((item / "DONE.json").read_bytes()[:-20]),
    "DONE is not JSON": lambda item: (item / "DONE.json").write_bytes(b"\x00\xff[[["),
    "DONE is of other JSON": lambda item: (item / "DONE.json").write_text("[1, 2]"),
    "DONE lists nothing": lambda item: _edit_done(item, files={}),
    "DONE lists another folder's files": lambda item: _edit_done(
        item, files={"../tiny_000000/DONE.json": {"size": 1, "sha256": ""}}
    ),
    "DONE is of another configuration": lambda item: _edit_done(item, configuration="0" * 64),
    "DONE is of another item": lambda item: _edit_done(item, item="tiny_000000"),
    "a file is missing": lambda item: (item / f"{item.name}.tlt").unlink(),
    "a file is cut off": lambda item: (item / f"{item.name}.mrc").write_bytes(b"x"),
    "a byte is another": lambda item: _flip(item / f"{item.name}_truth.mrc"),
    "a file stands in its place": lambda item: (shutil.rmtree(item), item.write_text("mine")),
}


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_resume_mends_what_is_damaged_and_nothing_else(damage, made):
    whole = content(made)
    damage(made / "ExperimentRuns" / "tiny_000001")
    untouched = {p: p.stat().st_mtime_ns for p in made.rglob("tiny_00000[023]*.*")}
    summary = make_dataset(DESCRIPTION, made, N, resume=True, workers=1)
    assert summary[:4] == (1, N - 1, 0, ())
    assert content(made) == whole
    assert untouched == {p: p.stat().st_mtime_ns for p in untouched}


@pytest.mark.usefixtures("copied")
def test_sizes_are_a_quicker_look_at_less(made):
    _flip(made / "ExperimentRuns" / "tiny_000001" / "tiny_000001_truth.mrc")
    assert make_dataset(DESCRIPTION, made, N, resume=True, verify="sizes", workers=1).skipped == N
    assert make_dataset(DESCRIPTION, made, N, resume=True, workers=1).made == 1


def test_another_description_is_refused_or_made_anew(made, tmp_path):
    other = describe(yaml.safe_load(TINY) | {"seed": 9})
    before = content(made)
    for shard in ((0, 1), (5, 6)):
        with pytest.raises(FileExistsError, match=r"--resume"):
            make_dataset(other, made, 6, shard=shard, workers=1)
    assert content(made) == before
    with pytest.warns(UserWarning, match="was of another description"):
        assert make_dataset(other, made, N, resume=True, workers=1).made == N
    make_dataset(other, tmp_path / "fresh", N, workers=1)
    assert content(made) == content(tmp_path / "fresh")


def test_items_made_with_other_versions_are_kept_and_told(made):
    for item in complete_items(made)[:2]:
        _edit_done(item, versions=read_done(item).versions | {"torch": "1.0"})
    summary = make_dataset(DESCRIPTION, made, N, resume=True, workers=1)
    assert summary.skipped == N
    assert [(text[:40], times) for text, times in summary.warnings.items()] == [
        ("complete, but made with torch 1.0: what ", 2)
    ]


def test_what_others_put_beside_the_files_of_an_item_stays(made):
    picks = made / "ExperimentRuns" / "tiny_000001" / "Picks" / "me.json"
    picks.parent.mkdir()
    picks.write_text("{}")
    assert make_dataset(DESCRIPTION, made, N, resume=True, workers=1).skipped == N
    assert picks.read_text() == "{}"


# ---- items that fail -----------------------------------------------------------------------------------------------

UNKNOWN = TINY.replace("optics: {", "optics: {voltage: {choice: [300, 400]}, ")  # its damage was measured for one only


def test_a_failed_item_is_listed_and_the_others_are_made(tmp_path):
    (tmp_path / "run.yaml").write_text(UNKNOWN, encoding="utf-8")
    with pytest.warns(UserWarning, match="break a rule between keys"):
        description = describe(yaml.safe_load(UNKNOWN))
    lost = [i for i in range(6) if not _goes_together(description, i)]
    assert 0 < len(lost) < 6
    out = tmp_path / "out"
    result = command("dataset", tmp_path / "run.yaml", "-n", 6, "-o", out, "-w", 1)
    assert result.exit_code == 1 and result.stdout == "" and "Traceback" not in result.stderr
    assert f"{6 - len(lost)} made, 0 complete before, {len(lost)} failed" in result.stderr
    listed = json.loads((out / "failed.json").read_text(encoding="utf-8"))
    assert [entry["index"] for entry in listed] == lost
    assert all("Drawn were optics.defocus" in entry["error"] for entry in listed)
    assert all("expected optics.voltage between 100 and 300 kV" in entry["error"] for entry in listed)
    assert all(str(out) not in entry["error"] for entry in listed)
    assert all(f"failed: tiny_{i:06d}: " in result.stderr for i in lost)
    assert {item.name for item in complete_items(out)} == {f"tiny_{i:06d}" for i in range(6) if i not in lost}
    assert not list(out.glob(".tiny*"))
    again = command("dataset", tmp_path / "run.yaml", "-n", 6, "-o", out, "-w", 1, "--resume", "--shard", "0/1")
    assert again.exit_code == 1 and f"0 made, {6 - len(lost)} complete before" in again.stderr


def _goes_together(description, index):
    try:
        return bool(item_config(description, index))
    except ConfigError:
        return False


def test_the_list_of_failures_goes_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr(cryosim.dataset, "make_item", lambda *_: 1 / 0)
    summary = make_dataset(DESCRIPTION, tmp_path, 3, shard=(1, 2), workers=1)
    assert [outcome.error for outcome in summary.failed] == ["ZeroDivisionError: division by zero"]
    assert [entry["item"] for entry in json.loads((tmp_path / "failed_1_of_2.json").read_text())] == ["tiny_000001"]
    monkeypatch.undo()
    assert make_dataset(DESCRIPTION, tmp_path, 3, shard=(1, 2), resume=True, workers=1).made == 1
    assert not list(tmp_path.glob("failed*"))


# ---- commands ------------------------------------------------------------------------------------------------------


def test_a_new_dataset_is_printed_and_nothing_else(tmp_path):
    """`cryosim config new --dataset > run.yaml`, as a shell would have it."""
    with (tmp_path / "run.yaml").open("w") as stream:
        code = "import sys; sys.argv = ['cryosim', 'config', 'new', '--dataset']; from cryosim.cli import app; app()"
        subprocess.run([sys.executable, "-c", code], stdout=stream, check=True, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    given = yaml.safe_load((tmp_path / "run.yaml").read_text(encoding="utf-8"))
    assert given["detector"]["shape"] == [60, 70] and "uniform" in given["optics"]["defocus"]
    assert command("config", "new", tmp_path / "other.yaml", "--dataset").stdout == f"{tmp_path / 'other.yaml'}\n"
    assert (tmp_path / "other.yaml").read_bytes() == (tmp_path / "run.yaml").read_bytes()
    assert yaml.safe_load(command("config", "new", "-").stdout)["seed"] == 1


def test_the_command_makes_the_dataset_and_tells_how_it_went(description, made, tmp_path):
    out = tmp_path / "deep" / "out"
    result = command("dataset", description, "-n", N, "--out", out, "--shard", "1/2", "-w", 1)
    assert result.exit_code == 0 and result.stdout == f"{out}\n"
    assert "2 made, 0 complete before, 0 failed" in result.stderr and "MB an item" in result.stderr
    assert "2/2" in result.stderr
    result = command("dataset", description, "-n", N, "--out", out, "--resume", "-w", 1)
    assert "2 made, 2 complete before, 0 failed" in result.stderr
    assert content(out) == content(made)


def test_items_are_not_overwritten_unasked(description, made):
    before = content(made)
    result = command("dataset", description, "-n", N, "--out", made, "-w", 1)
    assert result.exit_code == 2 and "4 of the 4 items are there already, tiny_000000 for one" in result.stderr
    assert "--resume" in result.stderr and content(made) == before


@pytest.mark.parametrize("text", ["2/2", "0/0", "-1/2", "1", "a/b", "1/2/3", "0.5/2", " 1/2", "1/2\n"])
def test_a_shard_that_is_none_is_refused(text, description, tmp_path):
    with pytest.raises(ValueError, match="expected i/N with i from 0 to N - 1"):
        shard_of(text)
    result = command("dataset", description, "-n", 2, "--out", tmp_path / "out", f"--shard={text}")
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-n", 0], "-n"),
        (["-n", 1, "-w", -1], "-w"),
        (["-n", 1, "-w", 2, "--scheduler", "tcp://127.0.0.1:1"], "expected 0 or more, and none where a scheduler"),
    ],
)
def test_wrong_numbers_are_refused(options, said, description, tmp_path):
    result = command("dataset", description, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2 and said in result.stderr and "Traceback" not in result.stderr


def test_a_description_out_of_bounds_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "run.yaml").write_text(TINY.replace("[100, 140]", "[-1, 140]"), encoding="utf-8")
    result = command("dataset", tmp_path / "run.yaml", "-n", 2, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "run.yaml: specimen.ice.thickness: " in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_an_item_without_done_is_none(tmp_path):
    with pytest.raises(FormatError, match=r"DONE.json: file: expected an existing file"):
        read_done(tmp_path)
    assert not is_complete(tmp_path) and complete_items(tmp_path / "none") == []
