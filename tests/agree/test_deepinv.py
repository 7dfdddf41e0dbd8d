"""deepinv's own tests of an operator, which ship in its wheel, run on `TiltProjection`."""

import importlib.util
import sys
from pathlib import Path

import deepinv
import pytest
import torch

from inverse.physics.tilt import TiltProjection

TESTS = Path(deepinv.__file__).parent / "tests"
ANGLES = torch.linspace(-60, 60, 11, dtype=torch.float64)
SHAPES = {
    "tilt_camera": (8, 6, 17),
    "tilt_camera_normalized": (9, 5, 16),
    "tilt_stretched": (8, 6, 17),
    "tilt_stretched_normalized": (11, 4, 16),
    "tilt_as_many_tilts_as_layers": (11, 5, 12),
}


def find_operator(name, device, imsize=None, get_physics_param=False):
    """deepinv's hook: (physics, image size, squared norm, dtype[, names of its parameters])."""
    shape = SHAPES[name]
    grid = "stretched" if "stretched" in name else "camera"
    physics = TiltProjection(ANGLES, shape, grid=grid, normalize="normalized" in name).to(device)
    x = torch.ones(1, 1, *shape, dtype=torch.float64)
    for _ in range(200):  # |A|^2 by powers of A^T A, with nothing but A and A^T
        x = physics.A_adjoint(physics.A(x / x.norm()))
    norm = torch.tensor(1.0) if "normalized" in name else x.norm().float()
    out = (physics, (1, *shape), norm, torch.float32)
    return (*out, ["angles"]) if get_physics_param else out


def _load(file: str):
    sys.path.insert(0, str(TESTS))
    try:
        spec = importlib.util.spec_from_file_location(f"deepinv_own_{file}", TESTS / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TESTS))
    module.find_operator = find_operator
    module.OPERATORS = list(SHAPES)
    return module


@pytest.fixture(scope="module")
def physics_tests():
    return _load("test_physics")


@pytest.fixture(scope="module")
def optim_tests():
    return _load("test_optim")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of deepinv's tests writes into the working folder
    torch.manual_seed(0)


def call(function, name, **more):
    """Run a test function of deepinv with the arguments it asks for."""
    given = {"name": name, "device": torch.device("cpu"), "rng": torch.Generator().manual_seed(0), **more}
    wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
    function(**{key: value for key, value in given.items() if key in wanted})


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "test",
    [
        "test_operators_adjointness",
        "test_operator_cropper",
        "test_concatenation",
        "test_operators_differentiability",
        "test_device_consistency",
        "test_physics_state_dict",
        "test_adjoint_autograd",
        "test_clone",
    ],
)
def test_physics(physics_tests, test, name):
    call(getattr(physics_tests, test), name)


@pytest.mark.parametrize("name", SHAPES)
def test_norm(physics_tests, name):
    call(physics_tests.test_operators_norm, name, verbose=False)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implicit", [True, False])
def test_pseudo_inverse(physics_tests, name, implicit):
    call(physics_tests.test_pseudo_inverse, name, implicit_backward_solver=implicit)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("solver", ["lsqr", "minres", "CG"])
def test_least_squares_implicit_backward(optim_tests, name, solver):
    optim_tests.test_least_squares_implicit_backward(torch.device("cpu"), solver, name)
