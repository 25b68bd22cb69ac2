"""The emulator notices where a kernel breaks one of CUDA's rules, and accepts the same kernel where it keeps them."""

import ctypes

import pytest
import torch

# In the order of broken_kernels.cpp.
RULES = {
    "barrier_of_a_warp_is_missing": "reads shared memory that .* wrote, with no barrier between|never written",
    "barrier_of_the_block_is_missing": "reads shared memory that .* wrote, with no barrier between|never written",
    "buffer_is_overwritten_too_early": "(writes|reads) shared memory that thread .*, with no barrier between",
    "shared_memory_is_never_written": "thread 5: it reads shared memory that was never written",
    "copy_is_not_waited_for": "touches shared memory to which a copy is under way",
    "copy_is_read_by_others_without_a_barrier": "with no barrier between|a copy is under way|never written",
    "copy_overwrites_what_others_read": "with no barrier between|a copy is under way",
    "copy_outlives_its_thread": "it ends before its copies do",
    "load_runs_past_the_end": "thread 63: it reads 4 bytes outside every tensor that it may read",
    "load_is_of_another_column": "it reads 4 bytes outside every tensor that it may read",
    "store_goes_to_an_input": "it writes 4 bytes outside every tensor that it may write",
    "two_threads_write_one_element": "it writes what another thread writes",
    "what_is_written_is_loaded_as_read_only": "what is written is loaded by the read-only path",
    "load_is_misaligned": "misaligned access of 16 bytes",
    "store_is_misaligned": "misaligned access of 16 bytes",
    "lanes_have_left_before_a_shuffle": "deadlock: .* waits at an operation of its warp",
    "lanes_meet_in_different_operations": "it is at a (shuffle|matrix product), other lanes of its warp at a",
    "lanes_shuffle_in_different_branches": "it is at a shuffle, other lanes of its warp at another",
    "barrier_is_not_reached_by_all": "deadlock: .* waits at a barrier of the block",
    "index_is_outside_its_array": "an index is outside its array in .*broken_kernels.cpp:",
    "product_overflows": "a product overflows in .*broken_kernels.cpp:",
    "grid_is_too_high": "it cannot be launched with 1 x 65536 blocks",
}


@pytest.fixture(scope="module")
def run(broken_kernels):
    """Runs one of the kernels, on 64 numbers each, of which x may be a view."""

    def run(name: str, is_broken: bool, x: torch.Tensor) -> torch.Tensor:
        y = torch.full((64,), float("nan"))
        pointers = broken_kernels.pointer(x), broken_kernels.pointer(y, written=True)
        broken_kernels.call("kernel", list(RULES).index(name), *map(ctypes.c_void_p, pointers), int(is_broken))
        return y

    return run


def numbers(name: str) -> torch.Tensor:
    return torch.arange(64.0).view(8, 8)[:, :4] if name == "load_is_of_another_column" else torch.arange(64.0)


@pytest.mark.parametrize("name", RULES)
def test_a_kernel_that_breaks_a_rule_is_stopped_in_whatever_order_its_threads_run(run, name):
    run(name, False, numbers(name))
    for _ in range(5):
        with pytest.raises(AssertionError, match=RULES[name]):
            run(name, True, numbers(name))
    run(name, False, numbers(name))


def test_results_are_those_of_the_kernels(run):
    x = numbers("")
    swapped = x.view(32, 2).flip(1).reshape(64)
    assert torch.equal(run("barrier_of_a_warp_is_missing", False, x), swapped)
    assert torch.equal(run("buffer_is_overwritten_too_early", False, x), 3 * x.flip(0) + 3)
    assert torch.equal(run("copy_is_not_waited_for", False, x)[:16], x[::4])
