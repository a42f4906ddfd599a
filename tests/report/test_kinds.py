from __future__ import annotations

from lqer.report.kinds import kind_colours, places, short_kinds


def test_a_linear_is_found_by_its_block_and_named_by_its_kind():
    found = places(["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj"])
    assert list(zip(found["block"], found["kind"])) == [(0, "q"), (11, "down")]


def test_linears_of_one_last_name_keep_their_paths():
    assert short_kinds(["mlp.experts.0.w1", "mlp.experts.1.w1", "self_attn.o_proj"]) == {
        "mlp.experts.0.w1": "mlp.experts.0.w1",
        "mlp.experts.1.w1": "mlp.experts.1.w1",
        "self_attn.o_proj": "o",
    }


def test_the_seven_kinds_of_a_block_have_colours_of_their_own():
    assert len(set(kind_colours(["q", "k", "v", "o", "gate", "up", "down"] * 2).values())) == 7
