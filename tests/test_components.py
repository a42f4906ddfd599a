"""Components: how a class becomes something that a configuration can name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lqer.components import Component, component_class, component_from_dict


class Fruit(Component, family="fruit"):
    pass


@dataclass(frozen=True)
class Apple(Fruit):
    kind = "apple"

    weight: float
    sort: str | None = None


class Citrus(Fruit):
    """Without a kind of its own, not a component but what some have in common."""


@dataclass(frozen=True)
class Lemon(Citrus):
    kind = "lemon"


def test_a_component_is_registered_in_its_family_by_being_defined():
    assert Fruit.registry == {"apple": Apple, "lemon": Lemon}
    assert component_class(Fruit, "lemon") is Lemon


def test_families_do_not_mix():
    class Vegetable(Component, family="vegetable"):
        pass

    assert Vegetable.registry == {}


def test_a_component_survives_being_written_down():
    apple = Apple(weight=0.2)
    assert apple.to_dict() == {"kind": "apple", "weight": 0.2}
    assert component_from_dict(Fruit, apple.to_dict()) == apple


def test_a_kind_defined_by_two_classes_is_refused_with_both():
    with pytest.raises(ValueError, match=r"fruit 'lemon' is defined twice: .*\.Lemon, .*\.Lime"):

        class Lime(Citrus):
            kind = "lemon"

    assert Fruit.registry["lemon"] is Lemon


def test_defining_a_class_again_replaces_it():
    def define() -> type[Fruit]:
        class Plum(Fruit):
            kind = "plum"

        return Plum

    try:
        assert define() is not define()
        assert Fruit.registry["plum"].__name__ == "Plum"
    finally:
        Fruit.registry.pop("plum", None)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({}, "a fruit needs a kind; allowed: apple, lemon"),
        ({"kind": "lemno"}, "unknown fruit 'lemno'; allowed: apple, lemon; did you mean 'lemon'?"),
        ({"kind": ["apple"]}, r"unknown fruit \['apple'\]"),
        ({"kind": "apple", "wieght": 1}, "unknown key 'wieght' of fruit \"apple\"; .*did you mean 'weight'?"),
        ({"kind": "apple"}, r"missing 1 required positional argument: 'weight' \(apple\)"),
    ],
)
def test_a_wrong_description_is_refused_with_the_nearest_spelling(described, message):
    with pytest.raises(ValueError, match=message):
        component_from_dict(Fruit, described)
