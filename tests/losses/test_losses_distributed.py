"""Two and three processes give the loss and the gradients of one process with the whole batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sda_fast import CMSALoss, cmsa_loss
from sda_fast.losses.cached import OutOfMemoryOnAnotherRank
from sda_fast.losses.chunking import CachedContrastiveStep
from sda_fast.losses.distributed import gather_embeddings, sharded_cmsa_loss, sum_gradients
from sda_fast.ops.cmsa_naive import naive_cmsa_loss

FORMS = [
    {},
    {"detach_teacher": True},
    {"row_normalized_targets": True, "normalize": True},
    {"targets": "hard"},
]
# items of every rank
SIZES = [(5, 5), (7, 2), (4, 0, 6)]


def whole_batch(items):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(items, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


def check_rank(rank, folder):
    """All cases in one process, since starting it costs more than they do; those of fewer ranks leave out the last."""
    torch.set_num_threads(1)
    for case, sizes in enumerate(SIZES):
        if rank >= len(sizes):
            continue
        meeting_point = f"file://{folder}/{case}"
        dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=len(sizes))
        try:
            check_losses(rank, sizes)
            check_huge_rows(rank, [9 * size for size in sizes])
            check_encoder(rank, sizes)
            check_gathering(rank, sizes)
            for fails_with_graph in (False, True):
                check_running_out_of_memory(rank, sizes, fails_with_graph)
                for chunk_size in (1, "auto"):
                    check_no_rank_waits_for_one_that_cannot_go_on(rank, sizes, fails_with_graph, chunk_size)
        except AssertionError as error:
            error.add_note(f"with {sizes} items on the ranks")
            raise
        finally:
            dist.destroy_process_group()


def own_rows(rank, sizes):
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def check_losses(rank, sizes):
    x_all, y_all = whole_batch(sum(sizes))
    for form in FORMS:
        x, y = x_all.clone().requires_grad_(), y_all.clone().requires_grad_()
        t = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
        truth = cmsa_loss(x, y, t, **form)
        expected = torch.autograd.grad(truth, (x, y, t))
        rows = own_rows(rank, sizes)
        mine = x_all[rows].clone().requires_grad_(), y_all[rows].clone().requires_grad_()
        t = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
        loss = sharded_cmsa_loss(*mine, t, block_size=4, **form)
        torch.testing.assert_close(loss, truth.detach(), rtol=1e-12, atol=1e-12)
        dx, dy, dt = torch.autograd.grad(loss, (*mine, t))
        torch.testing.assert_close(dx, expected[0][rows], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dy, expected[1][rows], rtol=1e-10, atol=1e-12)
        dist.all_reduce(dt)
        torch.testing.assert_close(dt, expected[2], rtol=1e-10, atol=1e-12)


def check_huge_rows(rank, sizes):
    """Statistics of one rank meet products of another, none of which may be rounded otherwise: scores are 1e10 bits."""
    generator = torch.Generator().manual_seed(6)
    pairs = 1e4 * torch.randn(2 * sum(sizes), 300, generator=generator)
    rows = own_rows(rank, sizes)
    mine = [side[rows].clone().requires_grad_() for side in (pairs[0::2], pairs[1::2])]
    exact = [side.double().requires_grad_() for side in (pairs[0::2], pairs[1::2])]
    ours = torch.autograd.grad(sharded_cmsa_loss(*mine, 3.0, block_size=16), mine)
    truth = torch.autograd.grad(naive_cmsa_loss(*exact, 3.0), exact)
    for own, whole in zip(ours, truth, strict=True):
        assert (own.double() - whole[rows]).norm() <= 1e-6 * whole.norm()


def check_encoder(rank, sizes):
    x_all, y_all = whole_batch(sum(sizes))
    results = []
    for sharded in (True, False):
        torch.manual_seed(0)
        encoder = torch.nn.Linear(6, 5).double()
        loss = CMSALoss(across_ranks=sharded)
        rows = own_rows(rank, sizes) if sharded else slice(None)
        loss(encoder(x_all[rows]), encoder(y_all[rows])).backward()
        parameters = [*encoder.parameters(), *loss.parameters()]
        if sharded:
            sum_gradients(parameters)
        results.append([parameter.grad for parameter in parameters])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def check_running_out_of_memory(rank, sizes, fails_with_graph):
    """Rank 1 cannot take more than one item at a time; dropout is on, and what is there already is kept."""
    x_all, y_all = whole_batch(sum(sizes))
    rows = own_rows(rank, sizes)
    results = []
    for scarce in (True, False):
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.5)).double()
        loss = CMSALoss(across_ranks=True)
        parameters = [*encoder.parameters(), *loss.parameters()]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)

        def encode(chunk, modality, encoder=encoder, scarce=scarce):
            if scarce and rank == 1 and len(chunk) > 1 and torch.is_grad_enabled() == fails_with_graph:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")
            return encoder(chunk)

        ample = 2 if rank == 0 else 3
        size = ample if scarce or rank != 1 else 1
        step = CachedContrastiveStep(encode, loss, parameters, chunk_size=size, across_ranks=True)
        torch.manual_seed(7 + rank)
        value = step(x_all[rows], y_all[rows])
        # a rank whose items fit, or that has none, keeps its chunks
        short = rank == 1 and (sizes[rank] > 1 or not scarce)
        assert step.chunk_size == (1 if short else ample)
        results.append([value, *(parameter.grad for parameter in parameters), torch.rand(3)])
    for survived, expected in zip(*results, strict=True):
        torch.testing.assert_close(survived, expected)


def check_no_rank_waits_for_one_that_cannot_go_on(rank, sizes, fails_with_graph, chunk_size):
    """Not a single item fits on rank 1; a rank that waited would raise something else when its group times out."""
    rows = own_rows(rank, sizes)
    images, texts = (side[rows] for side in whole_batch(sum(sizes)))
    encoder = torch.nn.Linear(6, 5).double()
    encoder.weight.grad = torch.ones_like(encoder.weight)

    def encode(chunk, modality):
        if rank == 1 and torch.is_grad_enabled() == fails_with_graph:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 TiB")
        return encoder(chunk)

    step = CachedContrastiveStep(
        encode, CMSALoss(across_ranks=True), encoder.parameters(), chunk_size=chunk_size, across_ranks=True
    )
    try:
        step(images, texts)
    except (torch.OutOfMemoryError, OutOfMemoryOnAnotherRank) as error:
        # a rank without items encodes its empty chunk all the same
        assert isinstance(error, torch.OutOfMemoryError) == (rank == 1)
    else:
        raise AssertionError(f"rank {rank} went on")
    assert (encoder.weight.grad == 1).all()
    dist.barrier()


def check_gathering(rank, sizes):
    x_all, y_all = whole_batch(sum(sizes))
    rows = own_rows(rank, sizes)
    mine = [side[rows].clone().requires_grad_() for side in (x_all, y_all)]
    gathered = [gather_embeddings(side) for side in mine]
    torch.testing.assert_close(gathered[0], x_all)
    # every rank computes the same loss of all vectors: their gradients add up to world size times one
    naive_cmsa_loss(*gathered, 1.4).backward()
    x, y = x_all.clone().requires_grad_(), y_all.clone().requires_grad_()
    naive_cmsa_loss(x, y, 1.4).backward()
    torch.testing.assert_close(mine[0].grad, len(sizes) * x.grad[rows])
    halves = gather_embeddings(x_all[rows].to(torch.bfloat16))
    assert torch.equal(halves, x_all.to(torch.bfloat16))


def test_ranks_together_equal_one_process(tmp_path):
    mp.spawn(check_rank, args=(tmp_path,), nprocs=max(map(len, SIZES)))


def test_without_a_process_group_it_is_the_plain_loss():
    x, y = whole_batch(6)
    assert sharded_cmsa_loss(x, y, 1.4) == cmsa_loss(x, y, 1.4)
    assert gather_embeddings(x) is x
