from __future__ import annotations

import numpy as np
import pytest

from chordal.errors import InputError
from chordal.planning.laws import fit_acceptance, fit_batch, is_worth_growing, least_squares

TOKENS = np.geomspace(1e8, 1e11, 6)
PARAMETERS = np.geomspace(1e7, 1e9, 4)


def grid(noise=0.0, interaction=0.0, seed=0):
    """Give points of tau = -3 + .15 ln D + .1 ln N (+ product), for drafts of 8 tokens."""
    tokens, parameters = (axis.ravel() for axis in np.meshgrid(TOKENS, PARAMETERS))
    tau = -3 + 0.15 * np.log(tokens) + 0.1 * np.log(parameters)
    tau += interaction * np.log(tokens) * np.log(parameters)
    tau += noise * np.random.default_rng(seed).standard_normal(len(tau))
    return {"tokens": tokens, "parameters": parameters}, tau


def test_a_known_law_is_recovered_within_its_errors():
    variables, tau = grid(noise=0.02)
    law = fit_acceptance(variables, tau, num_draft=8)
    assert law.terms == ((), ("tokens",), ("parameters",))
    missed = np.abs(law.fit.coefficients - [-3, 0.15, 0.1])
    assert (missed < 2 * law.fit.errors).all()
    assert law.fit.errors[1] < 0.01
    assert law.fit.loo_error == pytest.approx(0.02, rel=0.5)


def test_the_fit_is_that_of_a_reference():
    rng = np.random.default_rng(1)
    x = np.stack([np.ones(9), rng.standard_normal(9), rng.standard_normal(9)], 1)
    y = rng.standard_normal(9)
    fit = least_squares(x, y)
    expected, [rss], *_ = np.linalg.lstsq(x, y)
    assert fit.coefficients == pytest.approx(expected)
    assert fit.r2 == pytest.approx(1 - rss / np.square(y - y.mean()).sum())
    assert fit.aic == pytest.approx(9 * np.log(rss / 9) + 6)
    left_out = [y[i] - x[i] @ np.linalg.lstsq(np.delete(x, i, 0), np.delete(y, i))[0] for i in range(9)]
    assert fit.loo_error == pytest.approx(np.sqrt(np.square(left_out).mean()))


def test_standard_errors_are_the_spread_of_the_estimates():
    fits = [fit_acceptance(*grid(noise=0.02, seed=seed), num_draft=8).fit for seed in range(200)]
    fits = [fit for fit in fits if len(fit.coefficients) == 3]
    spread = np.std([fit.coefficients[1] for fit in fits])
    assert np.mean([fit.errors[1] for fit in fits]) == pytest.approx(spread, rel=0.2)


def test_a_product_is_fitted_where_there_is_one_and_only_there():
    assert len(fit_acceptance(*grid(noise=0.02, interaction=0.01), num_draft=8).terms) == 4
    plain = [len(fit_acceptance(*grid(noise=0.02, seed=seed), num_draft=8).terms) for seed in range(50)]
    # Noise lowers the AIC by more than 2 in about one of six cases.
    assert np.mean(np.array(plain) == 4) < 0.35


def test_a_prediction_is_the_formula_within_the_range():
    law = fit_acceptance(*grid(), num_draft=8)
    assert law.predict(tokens=2e9, parameters=5e7) == pytest.approx(
        -3 + 0.15 * np.log(2e9) + 0.1 * np.log(5e7)
    )


def test_outside_of_its_range_a_law_warns_and_stays_possible():
    law = fit_acceptance(*grid(), num_draft=4)
    with pytest.warns(UserWarning, match="tokens = 1e\\+30 lies outside of 1e\\+08 to 1e\\+11"):
        assert law.predict(tokens=1e30, parameters=1e8) == 5
    with pytest.warns(UserWarning):
        assert law.predict(tokens=1.0, parameters=1e8) == 1


def test_a_law_says_what_it_is_worth():
    text = str(fit_acceptance(*grid(), num_draft=8))
    assert text.startswith("tau = -3 (+- ")
    assert "* ln tokens" in text
    assert "R^2 1.0000" in text


@pytest.mark.parametrize("values", [{"tokens": 1e9}, {"tokens": 1e9, "parameters": 0.0}, {"other": 1.0}])
def test_a_prediction_needs_all_variables(values):
    law = fit_acceptance(*grid(), num_draft=8)
    with pytest.raises(InputError, match="the law needs tokens and parameters"):
        law.predict(**values)


@pytest.mark.parametrize(
    ("variables", "tau", "words"),
    [
        ({"d": [1, 2, 3]}, [1.5, 2, 2.5], "at least 4 points"),
        ({"d": [2, 2, 2, 2]}, [1.5, 2, 2.5, 3], "differ in every variable"),
        ({"d": [1, 2, 3, 0]}, [1.5, 2, 2.5, 3], "above 0"),
        ({"d": [1, 2, 3]}, [1.5, 2, 2.5, 3], "needs 4 values"),
        ({}, [1.5, 2, 2.5, 3], "needs 4 values"),
        ({"d": [1, 2, 3, 4]}, [1.5, 2, 2.5, 0.8], "tau must be from 1"),
        ({"d": [1, 2, 3, 4]}, [1.5, 2, 2.5, 9.5], "tau must be from 1 to num_draft"),
    ],
)
def test_points_that_make_no_law_are_refused(variables, tau, words):
    with pytest.raises(InputError, match=words):
        fit_acceptance(variables, tau, num_draft=8)


def test_a_draft_grows_until_its_share_of_the_time_outweighs_it():
    # Throughput of tau = 2 + .5 ln N against a cycle of 1 + .01 N is largest where both sides are equal.
    def throughput(size):
        return (2 + 0.5 * np.log(size)) / (1 + 0.01 * size)

    def grows(size):
        return is_worth_growing(0.5, 2 + 0.5 * np.log(size), 0.01 * size / (1 + 0.01 * size))

    sizes = np.arange(1, 200)
    best = sizes[np.argmax(throughput(sizes))]
    assert grows(best - 1)
    assert not grows(best + 1)


def test_the_batch_where_speed_leaves_its_line_is_found():
    batches = np.array([1, 2, 4, 8, 16, 32, 64])
    line = 100 + 80 * np.log(batches)
    speed = np.minimum(line, line[4] * 1.01)  # saturated behind 16
    ratios = [2.0, 1.9, 1.7, 1.4, 1.1, 0.9, 0.7]
    law = fit_batch(batches, speed, ratios)
    assert law.saturates_at == 32
    assert law.fit.coefficients == pytest.approx([100, 80])
    assert law.loses_at == pytest.approx(16 * 2**0.5)


def test_speed_that_stays_on_its_line_is_not_saturated():
    batches = np.array([1, 2, 4, 8, 16])
    law = fit_batch(batches, 100 + 80 * np.log(batches), [2.0] * 5)
    assert (law.saturates_at, law.loses_at) == (None, None)
    assert fit_batch(batches, 100 + 80 * np.log(batches), [0.9] * 5).loses_at == 1
