"""Values that differ from item to item of a dataset: distributions as a YAML file declares them.

A distribution stands in place of a value: `defocus: {uniform: [20000, 40000]}`. What it can give is bounded, so it can
be known beforehand whether a key will take all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LARGEST_INTEGER = 2**53
"""Of `integers`: the largest that float64 holds with all before it."""

REACH = 6.0
"""Standard deviations at which a normal distribution ends where `between` does not say otherwise (2e-9 lie beyond)."""

LEAST_SHARE = 1e-6
"""Of a normal distribution that `between` has to leave."""

Place = tuple[str | int, ...]
"""Keys and places in lists that lead to a value: ("specimen", "molecules", 0, "copies")."""


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false (nor yes, no, on, off)")
    return value


_Number = Annotated[float, BeforeValidator(_no_truth_value)]
_Integer = Annotated[int, BeforeValidator(_no_truth_value), Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]


class Distribution(BaseModel):
    """What all of them have: ends and middle of what they can give, and a draw."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def corners(self) -> list[Any]:
        """Values at which a key's bounds are tried: the ends, and one within; of a choice all."""
        raise NotImplementedError

    def draw(self, generator: torch.Generator) -> Any:
        """One value, in the unit of the key."""
        raise NotImplementedError

    def __str__(self) -> str:
        fields = self.model_dump(exclude_unset=True)
        shown = (f"{key}: {list(value) if isinstance(value, tuple) else value}" for key, value in fields.items())
        return f"{{{', '.join(shown)}}}"


class Uniform(Distribution):
    """Every value between two ends is as likely as any other."""

    uniform: tuple[_Number, _Number]
    """Smallest and largest value, in the unit of the key."""

    @model_validator(mode="after")
    def _has_ends(self) -> Self:
        _ascending("uniform", self.uniform)
        return self

    def corners(self) -> list[float]:
        low, high = self.uniform
        return [low, low / 2 + high / 2, high]

    def draw(self, generator: torch.Generator) -> float:
        return _between(*self.uniform, _unit(generator))


class LogUniform(Distribution):
    """The logarithm is uniform: each factor of ten is as likely as the next."""

    log_uniform: tuple[_Number, _Number]
    """Smallest and largest value, both positive, in the unit of the key."""

    @model_validator(mode="after")
    def _has_ends(self) -> Self:
        _ascending("log_uniform", self.log_uniform)
        if self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform: expected two positive values, got {list(self.log_uniform)}")
        return self

    def corners(self) -> list[float]:
        low, high = self.log_uniform
        return [low, math.sqrt(low) * math.sqrt(high), high]

    def draw(self, generator: torch.Generator) -> float:
        low, high = self.log_uniform
        return min(max(math.exp(_between(math.log(low), math.log(high), _unit(generator))), low), high)


class Normal(Distribution):
    """A Gaussian about a mean, cut off at both ends."""

    normal: tuple[_Number, _Number]
    """Mean and standard deviation, before it is cut, in the unit of the key."""
    between: tuple[_Number, _Number] | None = None
    """Smallest and largest value, in the unit of the key; null cuts at six standard deviations."""

    @model_validator(mode="after")
    def _has_width(self) -> Self:
        mean, deviation = self.normal
        if deviation <= 0:
            raise ValueError(f"normal: expected a mean and a positive standard deviation, got {list(self.normal)}")
        if self.between is not None:
            _ascending("between", self.between)
        low, high = self._probabilities()
        if not high - low >= LEAST_SHARE:
            raise ValueError(
                f"between: expected ends that leave at least {LEAST_SHARE:g} of a Gaussian of mean {mean:g} and "
                f"standard deviation {deviation:g}, got {list(self.limits())}"
            )
        return self

    def limits(self) -> tuple[float, float]:
        """Smallest and largest value."""
        mean, deviation = self.normal
        return self.between or (mean - REACH * deviation, mean + REACH * deviation)

    def corners(self) -> list[float]:
        low, high = self.limits()
        return [low, min(max(self.normal[0], low), high), high]

    def draw(self, generator: torch.Generator) -> float:
        (mean, deviation), (smallest, largest) = self.normal, self.limits()
        probability = _between(*self._probabilities(), _unit(generator))  # the inverse of the cumulative distribution
        score = float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
        return min(max(mean + deviation * score, smallest), largest)

    def _probabilities(self) -> tuple[float, float]:
        """Of a value below either limit."""
        mean, deviation = self.normal
        scores = [(limit - mean) / deviation for limit in self.limits()]
        low, high = torch.special.ndtr(torch.tensor(scores, dtype=torch.float64)).tolist()
        return low, high


class Integers(Distribution):
    """Every integer between two ends, these included, is as likely as any other."""

    integers: tuple[_Integer, _Integer]
    """Smallest and largest."""

    @model_validator(mode="after")
    def _has_ends(self) -> Self:
        _ascending("integers", self.integers)
        return self

    def corners(self) -> list[int]:
        low, high = self.integers
        return [low, (low + high) // 2, high]

    def draw(self, generator: torch.Generator) -> int:
        low, high = self.integers
        return int(torch.randint(low, high + 1, (), generator=generator))


class Choice(Distribution):
    """One of some values."""

    choice: list[Any] = Field(min_length=1)
    """The values: numbers, names, null, or whole sections."""
    weights: list[_Number] | None = None
    """How often each is taken, relative to the others; null takes all as often."""

    @model_validator(mode="after")
    def _has_weights(self) -> Self:
        if any(True for _ in find(self.choice)):
            raise ValueError("choice: expected plain values, got another distribution among them")
        if self.weights is not None and (len(self.weights) != len(self.choice) or min(self.weights) <= 0):
            raise ValueError(
                f"weights: expected a positive number for each of {len(self.choice)} values, got {self.weights}"
            )
        return self

    def corners(self) -> list[Any]:
        return list(self.choice)

    def draw(self, generator: torch.Generator) -> Any:
        weights = torch.tensor(self.weights or [1.0] * len(self.choice), dtype=torch.float64)
        reached = weights.cumsum(0) / weights.sum() > _unit(generator)
        return self.choice[int(reached.long().argmax())]


KINDS: dict[str, type[Distribution]] = {
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "normal": Normal,
    "integers": Integers,
    "choice": Choice,
}
"""Each by the key that declares it."""


def is_distribution(value: Any) -> bool:
    """Whether a value of a YAML file declares a distribution."""
    return isinstance(value, dict) and any(kind in value for kind in KINDS)


def find(value: Any, place: Place = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Place and declaration of each distribution in nested mappings and lists."""
    if is_distribution(value):
        yield place, value
    elif isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from find(entry, (*place, key))


def declared(declaration: dict[str, Any]) -> Distribution:
    """The distribution that a mapping declares.

    Raises
    ------
    ValueError
        When it declares two at once.
    pydantic.ValidationError
        For an unknown key, or ends that are none.
    """
    kinds = [kind for kind in KINDS if kind in declaration]
    if len(kinds) != 1:
        raise ValueError(f"expected one distribution of {', '.join(KINDS)}, got {' and '.join(kinds) or 'none'}")
    return KINDS[kinds[0]].model_validate(declaration)


def replaced(value: Any, changes: dict[Place, Any]) -> Any:
    """A copy of nested mappings and lists with other values at some places."""
    if () in changes:
        return changes[()]
    inner: dict[str | int, dict[Place, Any]] = {}
    for (head, *rest), new in changes.items():
        inner.setdefault(head, {})[tuple(rest)] = new
    if isinstance(value, dict):
        return {key: replaced(entry, inner.get(key, {})) for key, entry in value.items()}
    if isinstance(value, list):
        return [replaced(entry, inner.get(i, {})) for i, entry in enumerate(value)]
    return value


def drawn(distributions: dict[Place, Distribution], generator: torch.Generator) -> dict[Place, Any]:
    """A value of each, drawn in the order of their places, so that the order of keys in a file does not matter."""
    return {place: distributions[place].draw(generator) for place in sorted(distributions, key=order)}


def order(place: Place) -> list[tuple[bool, str, int]]:
    """To sort places by: keys by the alphabet, places in lists by their numbers."""
    return [(False, "", part) if isinstance(part, int) else (True, str(part), 0) for part in place]


def _ascending(name: str, ends: tuple[float, float]) -> None:
    if not ends[0] < ends[1]:
        raise ValueError(f"{name}: expected a smaller and a larger value, got {list(ends)}")


def _between(low: float, high: float, share: float) -> float:
    return min(max(low * (1 - share) + high * share, low), high)


def _unit(generator: torch.Generator) -> float:
    """Uniform in [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))
