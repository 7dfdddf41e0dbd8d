"""Distributions in descriptions: what they give, and what is refused before anything is simulated."""

import hashlib
import json
import math
import warnings

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from scipy import stats

from cryosim.config import ConfigError, RunConfig, read_config
from cryosim.core.permutation import permuted
from cryosim.description import (
    NEW_DATASET,
    configuration_hash,
    describe,
    description_text,
    item_config,
    item_name,
    item_seed,
    possible_configs,
    read_description,
)
from cryosim.distributions import declared, drawn
from cryosim.io.examples import example_path

BASE = """
specimen: {molecules: [{structure: ubiquitin, copies: {integers: [1, 3]}}], size: [90, 90, 70], ice: {thickness: 120}}
tilts: {extent: 20, step: 20, total_dose: {log_uniform: [50, 200]}}
optics: {defocus: {uniform: [10000, 20000]}}
detector: {shape: [32, 32], pixel_size: 4}
"""


def draws(declaration: dict, generator: torch.Generator, n: int = 2000) -> list:
    distribution = declared(declaration)
    return [distribution.draw(generator) for _ in range(n)]


def changed(**keys) -> dict:
    return yaml.safe_load(BASE) | keys


def complaint(given: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        describe(given)
    return str(caught.value)


# ---- what they give ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declaration", "expected"),
    [
        ({"uniform": [-3, 5]}, stats.uniform(-3, 8)),
        ({"log_uniform": [0.01, 100]}, stats.loguniform(0.01, 100)),
        ({"normal": [300, 20]}, stats.truncnorm(-6, 6, 300, 20)),
        ({"normal": [300, 20], "between": [310, 500]}, stats.truncnorm(0.5, 10, 300, 20)),
        ({"normal": [0, 1], "between": [-9, -3]}, stats.truncnorm(-9, -3)),
    ],
)
def test_draws_follow_the_distribution(declaration, expected, generator):
    found = draws(declaration, generator)
    assert stats.kstest(found, expected.cdf).pvalue > 0.01
    low, _, high = declared(declaration).corners()
    assert low <= min(found) and max(found) <= high


def test_integers_are_equally_frequent_with_both_ends(generator):
    found = draws({"integers": [-2, 3]}, generator)
    assert sorted(set(found)) == [-2, -1, 0, 1, 2, 3] and all(type(value) is int for value in found)
    assert stats.chisquare([found.count(value) for value in range(-2, 4)]).pvalue > 0.01


def test_choices_come_by_their_weights(generator):
    found = draws({"choice": ["a", None, {"b": 1}], "weights": [5, 2, 3]}, generator)
    counts = [found.count(value) for value in ("a", None, {"b": 1})]
    assert stats.chisquare(counts, [1000, 400, 600]).pvalue > 0.01


def test_a_narrow_distribution_stays_within_its_ends(generator):
    low, high = 0.1, math.nextafter(0.1, 1)
    for kind in ("uniform", "log_uniform"):
        assert set(draws({kind: [low, high]}, generator, 50)) <= {low, high}


def test_draws_do_not_depend_on_the_order_of_keys():
    given = {("a",): declared({"uniform": [0, 1]}), ("b", 2): declared({"uniform": [0, 1]})}
    one = drawn(given, torch.Generator().manual_seed(3))
    assert one == drawn(dict(reversed(given.items())), torch.Generator().manual_seed(3))
    assert one[("a",)] != one[("b", 2)]


# ---- declarations that are none ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declaration", "said"),
    [
        ({"uniform": [2, 1]}, "a smaller and a larger value, got [2.0, 1.0]"),
        ({"uniform": [1, 1]}, "a smaller and a larger value"),
        ({"uniform": [1]}, "optics.defocus: uniform.1: Field required"),
        ({"uniform": [1, 2, 3]}, "uniform: Tuple should have at most 2 items"),
        ({"uniform": [0, float("inf")]}, "finite number"),
        ({"uniform": [True, 2]}, "expected a number, not true or false"),
        ({"log_uniform": [0, 2]}, "two positive values, got [0.0, 2.0]"),
        ({"normal": [1, 0]}, "a positive standard deviation, got [1.0, 0.0]"),
        ({"normal": [0, 1], "between": [3, 2]}, "between: expected a smaller and a larger value"),
        ({"normal": [0, 1], "between": [6, 7]}, "leave at least 1e-06"),
        ({"integers": [1.5, 3]}, "valid integer"),
        ({"integers": [1, 2**60]}, "less than or equal to 9007199254740992"),
        ({"choice": []}, "at least 1 item"),
        ({"choice": [1, 2], "weights": [1]}, "a positive number for each of 2 values, got [1.0]"),
        ({"choice": [1, 2], "weights": [1, 0]}, "a positive number for each of 2 values"),
        ({"choice": [1, {"uniform": [0, 1]}]}, "expected plain values"),
        ({"uniform": [0, 1], "normal": [0, 1]}, "expected one distribution"),
        ({"normal": [0, 1], "betwen": [0, 1]}, "unknown key betwen; did you mean between?"),
        ({"unifrom": [0, 1]}, "optics.defocus: unknown distribution unifrom; did you mean uniform?"),
    ],
)
def test_a_wrong_declaration_is_refused_by_its_key(declaration, said):
    message = complaint(changed(optics={"defocus": declaration}))
    assert message.startswith("optics.defocus: ") and said in message and "\n" not in message


def test_a_misspelt_distribution_of_a_section_is_told():
    given = changed(specimen={"ice": {"choise": [None, {"thickness": 300}]}})
    assert complaint(given) == "specimen.ice: unknown distribution choise; did you mean choice?"


@pytest.mark.parametrize("key", ["seed", "name"])
def test_seed_and_name_are_plain(key):
    assert complaint(changed(**{key: {"choice": [1, 2]}})).startswith(f"{key}: expected a plain value")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optics": {"defocuss": 1}}, "unknown key optics.defocuss; did you mean defocus?"),
        ({"optic": {"defocus": 1}}, "unknown key optic; did you mean optics?"),
        ({"specimen": {"molecules": [{"structur": "x"}]}}, "specimen.molecules.0.structur; did you mean structure?"),
        ({"specimen": {"ice": {"thicknes": 1}}}, "specimen.ice.thicknes; did you mean thickness?"),
        ({"optics": {"zzz": 1}}, "unknown key optics.zzz. `cryosim config new`"),
        ({"dataset": {"nam": "x"}}, "unknown key dataset.nam; did you mean name?"),
        ({"dataset": {"name": ".hidden"}}, "dataset.name"),
        ({"name": ".hidden"}, "name: expected a letter or digit first"),
        ({"name": "x" * 90}, "Give dataset.name"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_name(keys, said):
    assert said in complaint(changed(**keys))


def test_the_nearest_name_is_told_of_single_runs_too(tmp_path):
    (tmp_path / "run.yaml").write_text("optics: {defocuss: 1}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: unknown key optics.defocuss; did you mean defocus\?"):
        read_config(tmp_path / "run.yaml")


# ---- bounds of the keys --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"specimen": {"ice": {"thickness": {"normal": [300, 60]}}}}, "specimen.ice.thickness: .*got -60.0"),
        ({"tilts": {"frames": {"integers": [0, 9]}}}, "tilts.frames: .*got 0"),
        ({"specimen": {"molecules": [{"copies": {"uniform": [1, 5]}}]}}, "specimen.molecules.0.copies: .*integer"),
        (
            {"optics": {"amplitude_contrast": {"uniform": [0.5, 1.0000001]}}},
            "optics.amplitude_contrast: .*got 1.0000001",
        ),
        (
            {"tilts": {"scheme": {"choice": ["dose-symmetric", "spiral"], "weights": [1e9, 1]}}},
            "tilts.scheme: .*'spiral'",
        ),
        ({"specimen": {"size": [90, {"uniform": [-1e-9, 90]}, 70]}}, "specimen.size.1: .*got -1e-09"),
    ],
)
def test_a_distribution_that_can_leave_the_bounds_of_its_key_is_refused(keys, said):
    with pytest.raises(ConfigError, match=said) as caught:
        describe(changed(**keys))
    assert "can give that" in str(caught.value)


def test_draws_that_break_a_rule_between_keys_are_announced():
    """Critical exposures are known between 100 and 300 kV: a fifth of these voltages has none."""
    with pytest.warns(UserWarning, match="about (1[0-9]|2[0-9]|30) % of the draws.*expected optics.voltage between"):
        description = describe(changed(optics={"voltage": {"uniform": [50, 300]}}))
    low = next(i for i in range(50) if _voltage(description, i) is None)
    with pytest.raises(ConfigError, match="Drawn were .*optics.voltage [5-9]"):
        item_config(description, low)


def _voltage(description, index):
    try:
        return item_config(description, index).optics.voltage
    except ConfigError:
        return None


def test_a_description_of_which_no_draw_is_valid_is_refused():
    said = complaint(changed(optics={"voltage": {"uniform": [50, 60]}}))
    assert "expected optics.voltage between 100 and 300 kV" in said and "None of 64 draws is valid" in said


# ---- items ---------------------------------------------------------------------------------------------------------


def test_the_new_description_is_valid_and_small(tmp_path):
    (tmp_path / "run.yaml").write_text(NEW_DATASET, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        description = read_description(tmp_path / "run.yaml")
    assert len(description.distributions) == 8
    for i in range(20):
        config = item_config(description, i)
        assert config.name == f"series_{i:06d}"
        assert config.specimen.ice and 300 <= config.specimen.ice.thickness <= 400


def test_the_seed_of_an_item_is_the_hash_of_configuration_and_index():
    given = changed(seed=5)
    description = describe(given)
    given["specimen"] |= {"size": [90.0, 90.0, 70.0], "ice": {"thickness": 120.0}}
    given["tilts"] = {"extent": 20.0, "step": 20.0, "total_dose": {"log_uniform": [50.0, 200.0]}}
    given["optics"] = {"defocus": {"uniform": [10000.0, 20000.0]}}
    given["detector"]["pixel_size"] = 4.0
    content = json.dumps(given, sort_keys=True, separators=(",", ":")).encode() + b"\n17"
    expected = int.from_bytes(hashlib.blake2b(content, digest_size=4).digest(), "big") % 2**31
    assert item_seed(description, 17) >> 32 == item_config(description, 17).seed >> 32 == expected


def test_no_two_items_share_what_a_generator_takes_of_their_seeds():
    """Of 1e6 random numbers of 32 bits 128 pairs would be equal."""
    torch.testing.assert_close(_random(5), _random(5 + 2**40), rtol=0, atol=0)  # torch takes 32 bits
    assert len(np.unique(permuted(np.arange(2**20, dtype=np.uint64)))) == 2**20  # type: ignore[arg-type]
    description = describe(changed())
    lowest = {item_seed(description, i) % 2**32 for i in range(1000)}
    other = describe(changed(seed=2))
    assert len(lowest) == 1000 and not lowest & {item_seed(other, i) % 2**32 for i in range(100)}
    assert 0.4 < np.mean([seed / 2**32 for seed in lowest]) < 0.6


def _random(seed):
    return torch.rand(9, generator=torch.Generator().manual_seed(seed))


def test_possible_runs_have_every_choice_and_both_ends():
    molecule = {"structure": {"choice": ["ubiquitin", "apoferritin"]}, "name": {"choice": [None, "mine"]}}
    description = describe(changed(specimen={"molecules": [molecule]}, output={"movies": {"choice": ["none", "mrc"]}}))
    possible = list(possible_configs(description))
    assert {(c.specimen.molecules[0].structure, c.specimen.molecules[0].name) for c in possible} == {
        (structure, name) for structure in ("ubiquitin", "apoferritin") for name in (None, "mine")
    }
    assert {c.output.movies for c in possible} == {"none", "mrc"}
    assert {10000, 20000} < {c.optics.defocus for c in possible}
    plain = describe({"seed": 3})
    assert list(possible_configs(plain)) == [RunConfig(seed=3)]


def test_what_is_written_otherwise_and_means_the_same_gives_the_same_items(tmp_path):
    one = describe(yaml.safe_load(BASE))
    text = "dataset: {}\n# a comment\n" + BASE.replace("[90, 90, 70]", "[90.0, 9.0e+1, 70]").replace("10000,", "1e4,")
    (tmp_path / "a.yaml").write_text("\n".join(reversed(text.splitlines())), encoding="utf-8")
    other = read_description(tmp_path / "a.yaml")
    assert configuration_hash(one) == configuration_hash(other)
    assert item_config(one, 3) == item_config(other, 3)


@pytest.mark.parametrize(
    "keys", [{"seed": 2}, {"optics": {"defocus": {"uniform": [10000, 20001]}}}, {"detector": {"shape": [32, 33]}}]
)
def test_another_description_gives_other_seeds(keys):
    one, other = describe(changed()), describe(changed(**keys))
    assert configuration_hash(one) != configuration_hash(other)
    assert item_seed(one, 0) != item_seed(other, 0) != item_seed(other, 1)


def test_items_differ_in_what_is_drawn_and_in_nothing_else():
    description = describe(changed())
    dumps = [item_config(description, i).model_dump(mode="json") for i in range(30)]
    assert len({d["optics"]["defocus"] for d in dumps}) == len({d["seed"] for d in dumps}) == 30
    assert {d["specimen"]["molecules"][0]["copies"] for d in dumps} == {1, 2, 3}
    for d in dumps:
        d |= {"seed": 0, "name": ""}
        d["optics"]["defocus"] = d["tilts"]["total_dose"] = d["specimen"]["molecules"][0]["copies"] = 0
    assert all(d == dumps[0] for d in dumps)


def test_a_choice_may_be_between_sections():
    description = describe(changed(specimen={"ice": {"choice": [None, {"thickness": 300}]}}))
    found = {
        config.specimen.ice.thickness if (config := item_config(description, i)).specimen.ice else None
        for i in range(20)
    }
    assert found == {None, 300}


def test_the_written_description_is_read_back(tmp_path):
    description = describe(changed(dataset={"name": "cells"}, optics={"aperture": {"choice": [None, 10.0]}}))
    assert item_name(description, 7) == "cells_000007"
    (tmp_path / "dataset.yaml").write_text(description_text(description), encoding="utf-8")
    again = read_description(tmp_path / "dataset.yaml")
    assert configuration_hash(again) == configuration_hash(description)
    assert item_config(again, 7) == item_config(description, 7)


def test_a_plain_run_is_a_dataset_whose_items_differ_by_chance(tmp_path):
    (tmp_path / "run.yaml").write_text("name: mine\nseed: 4\n", encoding="utf-8")
    description = read_description(tmp_path / "run.yaml")
    one, other = item_config(description, 0), item_config(description, 1)
    assert one.seed != other.seed
    assert one.model_copy(update={"seed": 4, "name": "mine"}) == RunConfig(name="mine", seed=4)


def test_a_single_run_points_from_a_dataset_to_its_command(tmp_path):
    (tmp_path / "run.yaml").write_text("dataset: {}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown key dataset. It describes many runs: `cryosim dataset`"):
        read_config(tmp_path / "run.yaml")


def test_the_content_of_structures_belongs_to_the_configuration(tmp_path):
    """And not to the seeds: the same molecule in a better model stands where it stood."""
    text = example_path("ubiquitin").read_text()
    given = changed(specimen={"molecules": [{"structure": "mine.pdb"}]})
    hashes, seeds = set(), set()
    for content in (text, text + "REMARK\n"):
        (tmp_path / "mine.pdb").write_text(content)
        description = describe(given, tmp_path)
        hashes.add(configuration_hash(description))
        seeds.add(item_seed(description, 0))
    assert (len(hashes), len(seeds)) == (2, 1)


def test_every_mistake_of_a_file_is_told_with_its_name(tmp_path):
    (tmp_path / "run.yaml").write_text("optics: {defocuss: {uniform: [1, 2]}, voltage: -3}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_description(tmp_path / "run.yaml")
    lines = str(caught.value).splitlines()
    assert "did you mean defocus?" in str(caught.value) and "can give" not in str(caught.value)
    assert len(lines) == 2 and all(line.startswith(f"{tmp_path / 'run.yaml'}: ") for line in lines)


def test_a_distribution_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        declared({"uniform": [0, 1]}).__setattr__("uniform", (1, 2))
