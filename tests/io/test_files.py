"""Writing happens whole or not at all; reading never takes more than it was promised."""

import bz2
import gzip
import os
import pickle

import pytest

from cryosim.io.examples import example_path
from cryosim.io.files import FormatError, atomic_write, existing_file, read_text, write_text


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_temporary_stands_beside_the_target_and_has_its_suffix(tmp_path):
    with atomic_write(tmp_path / "a.mrc") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".mrc"
        assert not (tmp_path / "a.mrc").exists()
    assert os.listdir(tmp_path) == ["a.mrc"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("target.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "target.txt").read_text() == "new"


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["missing", "folder", "empty"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    with pytest.raises(FormatError, match="a: file: expected") as caught:
        existing_file(path)
    assert (caught.value.path, caught.value.field) == (path, "file")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_text_is_read_up_to_a_limit(tmp_path, compress):
    path = tmp_path / "a.txt"
    path.write_bytes(compress(b"x" * 1000))
    assert read_text(path, 1000) == "x" * 1000
    with pytest.raises(FormatError, match="expected at most 999 bytes"):
        read_text(path, 999)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_a_cut_compressed_file_is_refused(tmp_path, compress):
    path = tmp_path / "a.txt"
    path.write_bytes(compress(os.urandom(5000))[:-100])
    with pytest.raises(FormatError, match="a whole stream"):
        read_text(path)


def test_the_error_survives_another_process():
    error = FormatError("a.mrc", "mode", "2", "99", "Convert it.")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "a.mrc: mode: expected 2, got 99. Convert it."
    assert copy.field == "mode"


def test_examples_exist_and_others_are_named():
    assert all(example_path(name).is_file() for name in ("ubiquitin", "apoferritin"))
    with pytest.raises(ValueError, match="apoferritin, ubiquitin"):
        example_path("lysozyme")
