"""How the library's path of CMSA cuts a batch: within its workspace, into whole tiles, and where waves are full."""

import pytest
import torch

from sda_fast.ops import cmsa
from sda_fast.ops.cmsa_blocks import (
    ALIGNMENT,
    Batch,
    block_of,
    bytes_of_one_block,
    cost,
    count_of_tiles,
    cut_within,
    waves,
    workspace_of,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MEBIBYTE = 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dimensions", [256, 3584, 8192])
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("items", [2, 700, 4096, 8192, 12000, 65536, 262144])
def test_blocks_and_what_is_kept_fit_the_workspace(items, soft, dimensions, dtype):
    bound, batch = 512 * MEBIBYTE, Batch(items, dimensions, dtype, soft, 132)
    cut = cut_within(bound, batch)
    assert cut.block == items or cut.block % ALIGNMENT == 0
    if cut.strip:
        assert cut.block == items and bytes_of_one_block(batch, cut.strip) <= bound
    else:
        assert workspace_of(batch, cut.block) + 4 * cut.kept[0] * cut.kept[1] <= bound
        assert cut.kept[0] <= count_of_tiles(items, cut.block)
    without = cut_within(bound, batch, keeps=False)
    assert without.kept[0] == 0 and workspace_of(batch, without.block) <= bound


@pytest.mark.parametrize(("items", "blocks"), [(1024, 1), (8192, 1), (9000, 1), (10500, 2)])
def test_up_to_some_9000_items_of_3584_dimensions_are_one_block(items, blocks):
    x = torch.empty(items, 3584, dtype=torch.bfloat16, device="meta")
    workspace = cmsa.gpu_workspace(x, "library")
    cut = cut_within(workspace, Batch(items, 3584, torch.bfloat16, True, 132))
    assert -(-items // cut.block) == blocks and (cut.strip > 0) == (blocks == 1)
    # the third bytes of the sums are beside it where there are several blocks
    assert workspace + 2 * x.numel() == cmsa.GPU_EXTRA_BYTES


def test_a_wave_is_one_tile_for_each_multiprocessor():
    assert waves(128, 256 * 132, 132) == 1 and waves(129, 256 * 132, 132) == 2
    assert waves(1, 1, 132) == 1 and waves(5120, 5120, 132) == 7 and waves(5120, 5120, 800) == 1


@pytest.mark.parametrize("multiprocessors", [84, 108, 132])
@pytest.mark.parametrize("items", [20000, 32768, 65536])
def test_the_block_taken_is_the_cheapest_that_fits_and_leaves_no_small_one(items, multiprocessors):
    batch = Batch(items, 3584, torch.bfloat16, True, multiprocessors)
    bound = 512 * MEBIBYTE
    block = cut_within(bound, batch).block
    sizes = [size for size in range(ALIGNMENT, items, ALIGNMENT) if workspace_of(batch, size) <= bound]
    whole = [size for size in sizes[len(sizes) // 2 :] if items % size == 0 or items % size >= size // 8]
    assert block in whole and cost(batch, block) == min(cost(batch, size) for size in whole)


def test_waves_of_an_h200_are_nearly_full_at_65536_items():
    batch = Batch(65536, 3584, torch.bfloat16, True, 132)
    block = cut_within(512 * MEBIBYTE, batch).block
    for height, width in ((block, block), (block, 3584)):
        tiles = -(-height // 128) * -(-width // 256)
        assert tiles / (132 * waves(height, width, 132)) > 0.95


def test_a_block_size_that_is_asked_for_is_taken_and_keeps_what_fits():
    batch = Batch(1000, 64, torch.float32, True, 132)
    assert block_of(batch, 128, 1) == (128, (0, 3 * 128**2), 0)
    assert block_of(batch, 128, 2**30) == (128, (36, 3 * 128**2), 0)
    assert block_of(batch, 1000, 1) == (1000, (0, 2 * 1000**2), 0)
    assert block_of(batch, 1000, 2**30).kept == (1, 2 * 1000**2)
