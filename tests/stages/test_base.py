"""A stage's key is made of the fields that its `build` reads."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch

from lqer.components import ADDED
from lqer.formats import MXInt
from lqer.run import experiment  # noqa: F401 (imports the module of every stage)
from lqer.stages.base import NO_EFFECT, Stage, identity, no_effect
from lqer.store.store import Store, Workspace


@dataclasses.dataclass(frozen=True)
class Doubled(Stage):
    """The double of a number."""

    name: ClassVar[str] = "double"
    version: ClassVar[int] = 1

    number: int
    memory: int = dataclasses.field(default=0, metadata=no_effect("it decides how fast it is doubled"))

    def build(self, workspace: Workspace, store: Store) -> None:
        workspace.write_json("double.json", 2 * self.number)


def concrete_stages(base: type[Stage] = Stage) -> list[type[Stage]]:
    """Every stage of the package that can be built."""
    found = [stage for subclass in base.__subclasses__() for stage in concrete_stages(subclass)]
    if base.__module__.startswith("lqer.") and hasattr(base, "version"):
        found.append(base)
    return found


STAGES = sorted(set(concrete_stages()), key=lambda stage: stage.__qualname__)


def with_zeros(stage: type[Stage], **fields: Any) -> Stage:
    """A stage whose fields are all 0 but for `fields`: a key needs no more."""
    return stage(**{field.name: 0 for field in dataclasses.fields(stage)} | fields)


def test_the_stages_of_a_run_are_all_here():
    assert {stage.name for stage in STAGES} == {
        "rotate", "calibrate", "spectra", "widths", "quantize", "finetune", "perplexity", "downstream", "distribution",
        "divergence", "decode", "token_weights",
    }  # fmt: skip


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_every_field_is_part_of_the_key_unless_it_says_why_not(stage):
    key = with_zeros(stage).key
    for field in dataclasses.fields(stage):
        changed = with_zeros(stage, **{field.name: 1}).key
        if NO_EFFECT in field.metadata:
            assert changed == key
            assert len(field.metadata[NO_EFFECT]) > 10
        else:
            assert changed != key


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_field_added_to_a_stage_changes_its_key(stage):
    added = dataclasses.make_dataclass("Added", [("added", int)], bases=(stage,), kw_only=True, frozen=True)
    assert with_zeros(added).key != with_zeros(stage).key
    assert with_zeros(added, added=1).key != with_zeros(added).key


def test_a_field_declared_as_added_counts_only_where_its_value_is_not_the_default():
    @dataclasses.dataclass(frozen=True)
    class Before:
        kind = "part"
        size: int = 1

    @dataclasses.dataclass(frozen=True)
    class Now(Before):
        search: str = dataclasses.field(default="none", metadata=ADDED)

    assert identity(Now()) == identity(Before())
    assert identity(Now(search="all")) == {**identity(Before()), "search": "all"}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_a_raised_version_changes_the_key(stage):
    newer = type("Newer", (stage,), {"version": stage.version + 1})
    assert with_zeros(newer).key != with_zeros(stage).key


def test_an_artifact_is_built_once_and_found_by_an_equal_stage(tmp_path, caplog):
    store = Store(tmp_path)
    assert Doubled(3).find(store) is None
    first = Doubled(3).obtain(store)
    assert first.json("double.json") == 6
    with caplog.at_level("INFO"):
        assert Doubled(3, memory=7).obtain(store).path == first.path
    assert f"double: reused {Doubled(3).identity}" in caplog.text
    assert Doubled(4).obtain(store).path != first.path


def test_a_stage_that_reads_another_is_named_by_its_key_before_anything_is_built():
    @dataclasses.dataclass(frozen=True)
    class Reader(Stage):
        name: ClassVar[str] = "reader"
        version: ClassVar[int] = 1
        source: Doubled

        def build(self, workspace: Workspace, store: Store) -> None:
            workspace.write_json("value.json", self.source.artifact(store).json("double.json"))

    assert Reader(Doubled(1)).identity != Reader(Doubled(2)).identity
    assert Reader(Doubled(1)).identity == Reader(Doubled(1, memory=5)).identity


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (torch.arange(6), torch.arange(6).reshape(2, 3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.float32, torch.float16),
        (torch.device("cpu"), torch.device("cuda")),
        (MXInt(bits=4), MXInt(bits=5)),
        ({"a": MXInt(bits=4)}, {"b": MXInt(bits=4)}),
        ((1, 2), (2, 1)),
        (None, 0),
    ],
)
def test_values_that_differ_have_different_identities(value, other):
    assert identity(value) != identity(other)


def test_the_order_of_a_set_and_of_a_mapping_does_not_matter():
    assert identity({"b", "a", "c"}) == identity({"c", "a", "b"})
    assert identity({"x": 1, "y": 2}) == identity({"y": 2, "x": 1})


def test_the_index_of_a_gpu_does_not_matter():
    assert identity(torch.device("cuda:0")) == identity(torch.device("cuda:1"))


def test_an_object_without_an_identity_cannot_be_part_of_a_key():
    with pytest.raises(TypeError, match="a object cannot be part of a stage's key"):
        identity(object())
