"""Image-text pairs: windows of whole images, walked exactly, and calibrated on by a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import resident
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import lqer
from lqer.data.datasets import DatasetSpec
from lqer.data.pairs import holds_pairs, pair_windows
from lqer.errors import DataError
from lqer.models.structure import prepare_model
from lqer.models.walker import walk_blocks

FORMATS = str(Path(__file__).parents[2] / "configs" / "formats" / "mxint.toml")
PIXELS, PATCH = 16, 8
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
IMAGE_ID = 257
TEXTS = [
    "A red square, and nothing else in the picture.",
    "Green.",
    "Blue, as deep as the sea at night.",
    "A grey one.",
]
COLOURS = ["red", "green", "blue", "grey"]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory) -> Path:
    """A tiny Llava with its processor."""
    folder = tmp_path_factory.mktemp("llava")
    vocabulary = {token: index for index, token in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    of_bytes = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    of_bytes.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=of_bytes, bos_token="<s>", eos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_ID
    images = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=PIXELS, patch_size=PATCH, **SMALL),
        text_config=LlamaConfig(vocab_size=260, max_position_embeddings=128, initializer_range=0.2, **SMALL),
        image_token_index=IMAGE_ID,
    )
    torch.manual_seed(0)
    AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A .jsonl of as many pairs as COLOURS, twice, and its images."""
    folder = tmp_path_factory.mktemp("pairs")
    for colour in COLOURS:
        Image.new("RGB", (20, 16), colour).save(folder / f"{colour}.png")
    rows = [{"image": f"{colour}.png", "text": text} for colour, text in zip(COLOURS, TEXTS, strict=True)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def processor(wrapper) -> Any:
    return AutoProcessor.from_pretrained(wrapper)


def test_windows_hold_whole_images_with_their_text(processor, pairs):
    found = pair_windows(processor, DatasetSpec(path=str(pairs)), num_samples=4, seq_len=24)
    assert found.windows_WT.shape == (4, 24)
    for ids_T, beside in zip(found.windows_WT, found.beside, strict=True):
        images = len(beside.get("pixel_values", ()))
        assert int((ids_T == IMAGE_ID).sum()) == IMAGE_TOKENS * images
    assert processor.decode(found.windows_WT[0]).replace("<image>", "") == f"\n{TEXTS[0]}"[: 24 - IMAGE_TOKENS]
    # The third image does not fit behind the second pair, which is short: its text stands there alone.
    assert [len(beside.get("pixel_values", ())) for beside in found.beside][:2] == [1, 2]


def test_an_image_that_no_window_holds_is_refused(processor, pairs):
    with pytest.raises(DataError, match=rf"row 0: its image takes {IMAGE_TOKENS} tokens, and calibration.seq_len is 3"):
        pair_windows(processor, DatasetSpec(path=str(pairs)), num_samples=1, seq_len=3)


def test_too_few_pairs_are_refused(processor, pairs):
    with pytest.raises(DataError, match=r"yields 4 windows of 24 tokens; calibration\.num_samples is 100"):
        pair_windows(processor, DatasetSpec(path=str(pairs)), num_samples=100, seq_len=24)


def test_a_part_of_the_rows_is_refused(processor, pairs):
    with pytest.raises(DataError, match=r"pairs are read from the first on; rows is '1:'"):
        pair_windows(processor, DatasetSpec(path=str(pairs), rows="1:"), num_samples=1, seq_len=24)


def test_a_missing_image_is_named_by_its_row(processor, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"image": "absent.png", "text": "x"}')
    with pytest.raises(DataError, match=r"row 0: FileNotFoundError: .*absent\.png"):
        pair_windows(processor, DatasetSpec(path=str(tmp_path / "pairs.jsonl")), num_samples=1, seq_len=24)


@pytest.mark.parametrize("line", ['{"text": "no image"}', '{"image": 3, "text": "x"}', "no json"])
def test_other_lines_are_no_pairs(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text(line)
    assert not holds_pairs(DatasetSpec(path=str(tmp_path / "rows.jsonl")))


@torch.no_grad()
def test_blocks_are_walked_as_the_model_runs_them_on_images(wrapper, processor, pairs):
    model = AutoModelForMultimodalLM.from_pretrained(wrapper, dtype=torch.float32).eval()
    prepare_model(model)
    found = pair_windows(processor, DatasetSpec(path=str(pairs)), num_samples=4, seq_len=24)
    expected: list[torch.Tensor] = []
    last = model.get_decoder().layers[-1]
    hook = last.register_forward_hook(lambda *arguments: expected.append(arguments[-1]))
    for ids_T, beside in zip(found.windows_WT, found.beside, strict=True):
        model(input_ids=ids_T[None], **beside, use_cache=False)
    hook.remove()
    for run in walk_blocks(resident(model), found.windows_WT, 2, beside=found.beside):
        run.forward()
    torch.testing.assert_close(run.hidden.states_WTD, torch.cat(expected))


def test_a_run_is_calibrated_on_what_the_images_say(wrapper, pairs, tmp_path):
    def results(dataset: Path, tag: str) -> Any:
        return lqer.quantize(
            wrapper, FORMATS, tag=tag,
            quantize={"method": "lqer-act", "weight": "w4", "low_rank": {"rank": 4, "format": "x8"}},
            calibration={"dataset": str(dataset), "num_samples": 4, "seq_len": 24, "error_tokens": 24},
            output_dir=str(tmp_path), device="cpu",
        )  # fmt: skip

    with_images = results(pairs, "pairs")
    assert with_images["calibration"]["source"] == "pairs.jsonl, with its images"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row["image"] = str(pairs.parent / "red.png")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    all_red = results(tmp_path / "pairs.jsonl", "red")
    # The same tokens, other pixels.
    assert all_red["calibration"]["fingerprint"] != with_images["calibration"]["fingerprint"]
    tables = [(tmp_path / tag / "layers.csv").read_text() for tag in ("pairs", "red")]
    assert tables[0] != tables[1]


def test_what_is_learned_on_text_alone_is_refused_before_any_work(wrapper, pairs, tmp_path):
    with pytest.raises(DataError, match=r"^calibration\.dataset: pairs\.jsonl holds images; quantize: .* are"):
        lqer.quantize(
            wrapper, FORMATS, tag="blocks",
            formats={"w4i": {"kind": "int", "bits": 4, "block_size": 16}},
            quantize={"method": "none", "weight": "w4i", "transforms": [{"kind": "lwc", "epochs": 1}]},
            calibration={"dataset": str(pairs), "num_samples": 4, "seq_len": 24},
            output_dir=str(tmp_path), device="cpu",
        )  # fmt: skip
    with pytest.raises(
        DataError, match=r"pairs\.jsonl holds images; calibration\.token_weights: .* weights of tokens by"
    ):
        lqer.quantize(
            wrapper, FORMATS, tag="weights", quantize={"method": "lqer-act", "weight": "w4"},
            calibration={"dataset": str(pairs), "num_samples": 4, "seq_len": 24, "token_weights": "gradient"},
            output_dir=str(tmp_path), device="cpu",
        )  # fmt: skip
