"""The floors: who may import whom, as import-linter checks it, and that the check can fail."""

import tomllib
from pathlib import Path

import pytest

import cryosim

cli = pytest.importorskip("importlinter.cli")
ROOT = Path(str(cryosim.__file__)).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="installed without its contracts")


def status(monkeypatch, config: Path) -> int:
    monkeypatch.chdir(ROOT)
    return cli.lint_imports(config_filename=str(config), no_cache=True)


def written(path: Path, *contracts: dict) -> Path:
    """A configuration of import-linter with other contracts."""
    lines = ["[importlinter]", "root_packages =", "    cryosim", "    inverse", "include_external_packages = True"]
    for i, contract in enumerate(contracts):
        lines.append(f"[importlinter:contract:{i}]")
        for key, value in contract.items():
            lines.append(f"{key} ={value}" if isinstance(value, str) else "\n    ".join([f"{key} =", *value]))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def contracts() -> list[dict]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def test_the_contracts_hold(monkeypatch, capsys):
    assert status(monkeypatch, ROOT / "pyproject.toml") == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_the_contracts_of_this_test_are_read_alike(monkeypatch, tmp_path, capsys):
    assert status(monkeypatch, written(tmp_path / "same.ini", *contracts())) == cli.EXIT_STATUS_SUCCESS


@pytest.mark.parametrize("which", [i for i, c in enumerate(contracts()) if c["type"] == "layers"])
def test_upside_down_floors_are_noticed(which, monkeypatch, tmp_path, capsys):
    contract = contracts()[which]
    config = written(tmp_path / "reversed.ini", contract | {"layers": contract["layers"][::-1]})
    assert status(monkeypatch, config) == cli.EXIT_STATUS_ERROR
    assert "BROKEN" in capsys.readouterr().out


def test_a_forbidden_import_is_noticed(monkeypatch, tmp_path, capsys):
    forbidden = {"name": "x", "type": "forbidden", "source_modules": ["inverse"], "forbidden_modules": ["cryosim"]}
    assert status(monkeypatch, written(tmp_path / "forbidden.ini", forbidden)) == cli.EXIT_STATUS_ERROR


@pytest.mark.parametrize("package", ["cryosim", "inverse"])
def test_every_module_stands_on_a_floor(package):
    """A module that no contract names could import anything."""
    floors = next(c["layers"] for c in contracts() if c["name"] == f"the floors of {package}")
    named = {module.strip() for floor in floors for module in floor.split("|")}
    folder = ROOT / package
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert {f"{package}.{module}" for module in modules - {"__init__"}} == named
