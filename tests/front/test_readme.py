"""The README's Python runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tutorials").symlink_to(README.parent / "tutorials")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["series"].images.shape == (13, 48, 48)
    assert abs(names["fit"].optics.defocus - 27_210) < 100
    assert names["aligned"].shifts.shape == (13, 2)
    assert names["nearer"].shape == (1, 1, 36, 48, 48)
    assert names["image"].shape == (48, 48)
    assert len(names["one"]) + len(names["other"]) == int(names["frames"].sum())


def test_pictures_exist():
    for target in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text(encoding="utf-8"), re.DOTALL):
        assert (README.parent / target).is_file()
