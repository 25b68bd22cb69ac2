"""Rotary positions: three axes for Qwen, and the same whether or not a sequence is padded."""

import pytest
import torch

from sda_fast.lvlm.collate import collate_images, collate_texts

QWEN = pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])


@QWEN
def test_image_positions_equal_the_models_own_of_the_padded_batch(loaded, items, model_type):
    lvlm = loaded(model_type)
    batch = collate_images(lvlm, items)
    assert (batch["attention_mask"] == 0).any()
    expected = lvlm.model.compute_3d_position_ids(
        input_ids=batch["input_ids"],
        image_grid_thw=batch["image_grid_thw"],
        video_grid_thw=None,
        inputs_embeds=None,
        attention_mask=batch["attention_mask"],
        past_key_values=None,
        mm_token_type_ids=batch["mm_token_type_ids"],
    )
    lvlm.model.rope_deltas = None
    assert torch.equal(batch["position_ids"], expected)


@QWEN
def test_image_tokens_lie_on_the_grid_of_merged_patches(loaded, items, model_type):
    lvlm = loaded(model_type)
    batch = collate_images(lvlm, items[1:2])
    is_image = batch["input_ids"][0] == lvlm.model.config.image_token_id
    time, height, width = batch["position_ids"][:, 0, is_image]
    _, rows, columns = (batch["image_grid_thw"][0] // 2).tolist()
    assert rows * columns == int(is_image.sum()) and columns != rows
    assert torch.equal(time, torch.full_like(time, int(time[0])))
    assert torch.equal(height - height[0], torch.arange(rows).repeat_interleave(columns))
    assert torch.equal(width - width[0], torch.arange(columns).repeat(rows))
    after = batch["position_ids"][:, 0, is_image.nonzero()[-1, 0] + 1 :]
    assert int(after[0, 0]) == int(max(height.max(), width.max())) + 1


@QWEN
def test_text_positions_count_from_the_first_token_on_all_three_axes(loaded, items, model_type):
    batch = collate_texts(loaded(model_type), items)
    for row, mask in enumerate(batch["attention_mask"]):
        count = int(mask.sum())
        assert mask[-count:].all(), "padding is on the left"
        assert torch.equal(batch["position_ids"][:, row, -count:], torch.arange(count).expand(3, -1))
