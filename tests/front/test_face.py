"""The faces of the two packages: which names they have, where these come from, and what they load."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("cryosim", "inverse")
# the names of the design's contract that exist so far
PROMISED = {
    "cryosim": """Atoms Slices Volume Optics Detector TiltScheme TiltSeries Specimen Ice wavelength interaction_constant
        potential_slices multislice projection image ctf expected_counts simulate io""",
    "inverse": "TiltProjection wbp least_squares fsc reconstruct",
}


def typed_imports(package: str) -> dict[str, str]:
    """{name: module it comes from} of the imports below `if TYPE_CHECKING` in the package's face."""
    file = importlib.import_module(package).__file__
    assert file is not None
    found = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                for alias in line.names:
                    assert alias.asname == alias.name, "a type checker passes on `import name as name` only"
                    found[alias.name] = line.module
    return found


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded(code: str, *modules: str) -> set[str]:
    """Which of `modules` a new interpreter has loaded after `code`."""
    return set(fresh(f"import sys\n{code}\nprint(*[m for m in {modules!r} if m in sys.modules])").split())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_what_the_type_checker_sees(package):
    face, typed = importlib.import_module(package), typed_imports(package)
    assert sorted(typed) == sorted(face.__all__) == sorted(dir(face))
    for name, module in typed.items():
        home = importlib.import_module(module)
        if name == "io":
            assert face.io is importlib.import_module("cryosim.io")
        else:
            assert getattr(face, name) is getattr(home, name)
            assert getattr(face, name).__module__ == module, f"{name} is only passed on by {module}"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_promised_names_are_there(package):
    assert set(PROMISED[package].split()) <= set(importlib.import_module(package).__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_an_unknown_name_is_an_attribute_error(package):
    face = importlib.import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'no_such_name'"):
        face.no_such_name  # noqa: B018
    with pytest.raises(ImportError):
        exec(f"from {package} import no_such_name")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_star_import_gives_every_name(package):
    names: dict = {}
    exec(f"from {package} import *", names)
    assert set(importlib.import_module(package).__all__) <= set(names)


def test_importing_cryosim_loads_nothing_heavy():
    assert loaded("import cryosim", "torch", "deepinv", "matplotlib", "dask", "zarr", "gemmi", "pydantic") == set()


def test_the_simulator_needs_torch_and_nothing_of_the_outside_world():
    heavy = ("deepinv", "matplotlib", "dask", "zarr", "gemmi", "mrcfile", "pandas", "inverse")
    assert loaded("import cryosim\ncryosim.simulate", "torch", *heavy) == {"torch"}
    assert "deepinv" not in loaded("import cryosim\ncryosim.io.read_series", *heavy)


def test_importing_inverse_does_not_load_deepinv():
    assert loaded("import inverse", "torch", "deepinv", "matplotlib") == set()
    assert loaded("import inverse\ninverse.reconstruct", "torch", "deepinv", "matplotlib") == {"torch"}


@pytest.mark.parametrize("command", PACKAGES)
def test_help_loads_neither_torch_nor_deepinv(command):
    assert loaded(f"import {command}.cli", "torch", "deepinv", "matplotlib", "pandas") == set()


def test_reconstruct_stays_the_function():
    """A module of the same name would take its place as soon as it is imported; likewise `simulate` and `image`."""
    code = "import inverse, inverse.demo, inverse.cli, cryosim, cryosim.run\n"
    names = "inverse.reconstruct, inverse.wbp, inverse.fsc, cryosim.simulate, cryosim.image, cryosim.ctf"
    assert fresh(code + f"print(*[type(f).__name__ for f in ({names})])").split() == ["function"] * 6


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_a_module_of_the_package(package):
    face = importlib.import_module(package)
    folder = Path(str(face.__file__)).parent
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    assert modules & set(face.__all__) <= {"io"}
