import pytest
import torch

from sda_fast.jobs.pca import fit_pca


def table(n, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, width, dtype=torch.float64)
    return (torch.randn(n, width, generator=generator, dtype=torch.float64) * scales + 3).float()


@pytest.mark.parametrize(("n", "width"), [(200, 17), (17, 200), (40, 40)])
def test_reduced_vectors_are_centred_uncorrelated_and_ordered(n, width):
    vectors = table(n, width)
    pca = fit_pca(vectors, 8)
    reduced = pca.transform(vectors).double()
    covariance = reduced.T @ reduced / (n - 1)
    assert reduced.mean(dim=0).abs().max() < 1e-6
    torch.testing.assert_close(covariance, torch.diag(pca.explained_variance), atol=1e-5, rtol=1e-5)
    assert (pca.explained_variance.diff() <= 0).all()
    torch.testing.assert_close(pca.components @ pca.components.T, torch.eye(8, dtype=torch.float64))


def test_both_ways_of_fitting_agree():
    vectors = table(41, 40)
    wide, tall = fit_pca(vectors[:40], 5), fit_pca(torch.cat([vectors[:40], vectors[:40]]), 5)
    torch.testing.assert_close(wide.components, tall.components, atol=1e-9, rtol=1e-9)


def test_signs_are_fixed_so_that_the_order_of_rows_does_not_matter():
    vectors = table(60, 12)
    a, b = fit_pca(vectors, 6), fit_pca(vectors.flip(0), 6)
    torch.testing.assert_close(a.components, b.components, atol=1e-9, rtol=1e-9)
    largest = a.components.gather(1, a.components.abs().argmax(dim=1, keepdim=True))
    assert (largest > 0).all()


def test_full_rank_keeps_all_distances_and_variance():
    vectors = table(50, 9)
    pca = fit_pca(vectors, 100)
    assert pca.components.shape == (9, 9)
    assert pca.explained_share == pytest.approx(1)
    reduced, exact = pca.transform(vectors).double(), vectors.double()
    torch.testing.assert_close(torch.cdist(reduced, reduced), torch.cdist(exact, exact), atol=1e-5, rtol=1e-5)


def test_few_rows_keep_fewer_components():
    assert fit_pca(table(5, 30), 768).components.shape == (4, 30)
    assert fit_pca(table(1, 30), 768).transform(table(1, 30)).abs().max() == 0


def test_equal_rows_give_zeros_not_nan():
    pca = fit_pca(torch.full((6, 4), 2.5), 3)
    assert (pca.transform(torch.full((6, 4), 2.5)) == 0).all() and pca.explained_share == 1


def test_a_value_that_is_not_finite_is_named_by_row():
    vectors = table(6, 4)
    vectors[3, 1] = float("nan")
    with pytest.raises(ValueError, match="row 3"):
        fit_pca(vectors, 2)
