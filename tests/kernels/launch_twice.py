"""Run by test_launching.py in a process without Triton's interpreter: what repeated launches hand to the driver."""

from __future__ import annotations

import contextlib
import random
import sys

import torch
import triton
import triton.language as tl
from triton import knobs

from sda_fast.kernels.launching import LARGEST_NUMBER_OF_LAUNCHES, Kernel, kernel, prepare
from without_device import without_device


def scale(out_ptr, x_ptr, offset_ptr, count, stride, factor, HAS_OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns * stride, mask=columns < count, other=0.0) * factor
    if HAS_OFFSET:
        x += tl.load(offset_ptr)
    tl.store(out_ptr + columns, x, mask=columns < count)


scale_kernel, plain_kernel = kernel(scale), triton.jit(scale)


def random_launch(draw: random.Random):
    """Arguments that differ in all that Triton compiles for."""
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
    x = torch.zeros(64, dtype=dtype)[draw.choice([0, 0, 1, 8]) :]
    has_offset = draw.random() < 0.5
    offset = torch.zeros(1) if has_offset else None
    count, stride = draw.choice([1, 15, 16, 32, 2**31 + 16, 0]), draw.choice([1, 2, 16])
    arguments = (torch.zeros(64, dtype=dtype), x, offset, count, stride, draw.choice([0.5, 1.0]))
    return arguments, {"HAS_OFFSET": has_offset, "BLOCK": draw.choice([16, 32]), "num_warps": draw.choice([1, 2])}


def same(left, right):
    pairs = zip(left, right, strict=True)
    return all(a is b if isinstance(a, torch.Tensor) else (type(a), a) == (type(b), b) for a, b in pairs)


def repeated_launches_hand_over_what_triton_does(driver):
    draw = random.Random(0)
    launches = [random_launch(draw) for _ in range(60)]
    binaries: dict[int, int] = {}
    driver.keeps = True
    for _ in range(3):
        for arguments, constants in launches:
            driver.launches.clear()
            scale_kernel[(3, 2)](*arguments, **constants)
            plain_kernel[(3, 2)](*arguments, **constants)
            (grid, ours, metadata, handed), (grid_of_triton, theirs, metadata_of_triton, handed_by_triton) = (
                driver.launches
            )
            assert grid == grid_of_triton == (3, 2, 1)
            assert metadata == metadata_of_triton
            assert same(handed, handed_by_triton)
            assert binaries.setdefault(theirs, ours) == ours, "another binary than Triton's choice"
    assert len(set(binaries.values())) == len(binaries) > 20
    assert len(scale_kernel.launches) > 20


def hooks_see_every_launch(driver):
    arguments, constants = random_launch(random.Random(1))
    seen = []
    scale_kernel[(1,)](*arguments, **constants)

    def hook(metadata):
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    scale_kernel[(1,)](*arguments, **constants)
    knobs.runtime.launch_enter_hook.remove(hook)
    scale_kernel[(1,)](*arguments, **constants)
    assert seen == ["scale"]


def an_integer_and_a_float_of_one_value_differ(driver):
    arguments, constants = random_launch(random.Random(2))
    driver.keeps = True
    for factor in (2, 2.0, 2, 2.0):
        scale_kernel[(1,)](*arguments[:-1], factor, **constants)
    binaries = [function for _, function, _, _ in driver.launches]
    assert binaries[0] == binaries[2] != binaries[1] == binaries[3]
    assert [type(handed[5]) for _, _, _, handed in driver.launches] == [int, float, int, float]


def what_is_remembered_stays_bounded(driver):
    arguments, constants = random_launch(random.Random(3))
    for count in range(2, 2 * LARGEST_NUMBER_OF_LAUNCHES):
        scale_kernel[(1,)](*arguments[:3], count, *arguments[4:], **constants)
    assert len(scale_kernel.launches) <= LARGEST_NUMBER_OF_LAUNCHES


def a_launch_goes_to_the_device_of_its_tensors(driver):
    class OnDevice1(torch.Tensor):
        def get_device(self):
            return 1

    @contextlib.contextmanager
    def device(index):
        before, driver.device = driver.device, index
        yield
        driver.device = before

    torch.cuda.device, driver.keeps = device, True
    arguments, constants = random_launch(random.Random(4))
    elsewhere = [one.as_subclass(OnDevice1) if torch.is_tensor(one) else one for one in arguments]
    launch = prepare(scale_kernel, (1,), arguments[3:], constants)
    for _ in range(2):
        launch(*arguments[:3])
        launch(*elsewhere[:3])
        scale_kernel[(1,)](*elsewhere, **constants)
    assert [key[0] for key in launch.binaries] == [0, 1] and driver.device == 0
    functions = [function for _, function, _, _ in driver.launches]
    assert functions[:3] == functions[3:] and functions[0] != functions[1] == functions[2]


def constants_must_come_last(driver):
    def wrong(out_ptr, BLOCK: tl.constexpr, count):
        pass

    def wrong_too(count, out_ptr):
        pass

    for function in (wrong, wrong_too):
        try:
            Kernel(function)
        except ValueError as error:
            assert "must take pointers, then numbers, then constants" in str(error)
        else:
            raise AssertionError("not refused")


if __name__ == "__main__":
    globals()[sys.argv[1]](without_device())
