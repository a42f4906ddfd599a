"""The benchmark of decoders: its models run as one operator a site, and blocks are compiled once for all."""

from __future__ import annotations

import benchmark_decoder as benchmark
import pytest
import torch
from decoder_benchmark import step
from decoder_benchmark.models import BF16, CONFIG, LABELS, SCHEMES, build
from decoder_benchmark.step import Step

SMALL = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """What is compiled: run as it is, for no compiler is needed to count it."""
    kept: list[torch.fx.GraphModule] = []
    compile_with = torch.compile

    def keep(graph, example_inputs):
        kept.append(graph)
        return graph

    def compiled(function, fullgraph, dynamic, options):
        return compile_with(function, fullgraph=fullgraph, dynamic=dynamic, backend=keep)

    monkeypatch.setattr(step.torch, "compile", compiled)
    return kept


@torch.no_grad()
@pytest.mark.parametrize("compile_what", ["blocks", "model"])
@pytest.mark.parametrize("scheme", [BF16, "int4-g128", "w4a8-rank32"])
def test_a_compiled_step_is_one_graph_and_gives_the_logits_of_the_model(scheme, compile_what, graphs):
    model = build(scheme, {**CONFIG, **SMALL}, torch.device("cpu"))
    # A cache of one token, which is the one that the step writes.
    compiled = Step(model, 2, 1, compile_what, {})
    compiled.rewind()
    logits_BTV = compiled.run()
    compiled.rewind()
    assert torch.equal(compiled.run(), logits_BTV)
    compiled.close()
    expected = model(input_ids=torch.full((2, 1), step.TOKEN), use_cache=False).logits
    assert (logits_BTV - expected).norm() < 0.02 * expected.norm()
    assert len(graphs) == 1
    blocks = 1 if compile_what == "blocks" else SMALL["num_hidden_layers"]
    calls = sum("packed_linear" in str(node.target) for node in graphs[0].graph.nodes)
    assert calls == (0 if scheme == BF16 else 4 * blocks), "q, k and v as one; o; gate and up as one; down"


def test_every_scheme_has_a_label_and_bars_for_its_batches():
    assert LABELS.keys() == SCHEMES.keys()
    for scheme, packing in SCHEMES.items():
        assert packing is None or {(scheme, 1), (scheme, 16), (scheme, 64)} <= benchmark.BARS.keys()


def test_the_table_compares_with_bf16_and_keeps_rows_with_a_problem():
    results = {
        (BF16, 1): {"milliseconds": 4.0, "gigabytes": 13.5},
        ("int4-g128", 1): {"milliseconds": 2.0, "gigabytes": 3.9},
        ("trellis2", 1): {"problem": "ended with status 1"},
        ("int4-g128", 16): {"milliseconds": 3.0, "gigabytes": 3.9},
    }
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in benchmark._table(results, 1)[2:]]
    assert rows[1] == [LABELS["int4-g128"], "1", "2.000", "500", "2.00", "2.1", "2.8", "3.90"]
    assert [row[0] for row in rows] == [LABELS[BF16], LABELS["int4-g128"], LABELS["trellis2"]]
    assert rows[2][2] == "ended with status 1"
