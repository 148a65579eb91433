"""
verdicts.py: the statistics of a comparison, against published tables, other computations and simulated truth.

    python -m pytest tests/test_verdicts.py
"""

import math
from functools import cache
from itertools import product

import numpy as np
import pytest
from scipy.integrate import dblquad
from scipy.special import ndtr
from scipy.stats import multivariate_t, t, ttest_rel

from analysis.verdicts import (
    MARGIN,
    Spread,
    additive_spread,
    dunnett_critical,
    dunnett_of,
    dunnett_p,
    family_spread,
    fewest,
    fewest_seeds,
    holm,
    identical_configs,
    judge_family,
    paired_t,
    power_to_detect,
    power_to_show,
    seeds_to_detect,
    seeds_to_show,
    simulate_families,
    words,
)


def table(losses, names=None):
    """An array (k, n) as {config: {seed: loss}}."""
    names = names or ['dense', *(f'config {i}' for i in range(1, len(losses)))]
    return {name: {seed: float(loss) for seed, loss in enumerate(own, 1)}
            for name, own in zip(names, losses, strict=True)}


def one_family(offsets, seeds, sd=0.013, rng_seed=0):
    return table(simulate_families(offsets, seeds, sd, 1, np.random.default_rng(rng_seed))[0])


def judge(losses, **options):
    """judge_family by the spread of the same losses."""
    spread = family_spread(losses, 'dense', options.get('identical', ()))
    return judge_family(losses, 'dense', spread, **options)


# spread


@pytest.mark.parametrize('k, n', [(2, 3), (3, 2), (7, 5)])
def test_spread_is_that_of_a_least_squares_fit_of_config_and_seed(k, n):
    losses = np.random.default_rng(k).normal(2, 0.1, (k, n))
    design = np.array([[float(config == i) for i in range(k)] + [float(seed == j) for j in range(n)]
                       for config, seed in product(range(k), range(n))])
    fit = design @ np.linalg.lstsq(design, losses.ravel(), rcond=None)[0]
    df = k * n - np.linalg.matrix_rank(design)
    spread = additive_spread(losses)
    assert spread.df == df == (k - 1) * (n - 1)
    assert spread.s == pytest.approx(math.sqrt(((losses.ravel() - fit) ** 2).sum() / df), rel=1e-9)
    assert spread.pooled_sd == pytest.approx(spread.s * 2 ** 0.5)
    assert spread.error(4) == pytest.approx(spread.pooled_sd / 2)


def test_many_families_at_once_have_the_spread_of_each():
    losses = simulate_families([0, 0.02], 4, 0.013, 5, np.random.default_rng(0))
    assert np.allclose(additive_spread(losses).s, [additive_spread(own).s for own in losses], rtol=1e-12)


def test_two_configs_give_the_ordinary_paired_t_test():
    losses = one_family([0.01], 6)
    verdict = judge(losses)['config 1']
    expected = ttest_rel(list(losses['config 1'].values()), list(losses['dense'].values()))
    assert verdict.p == pytest.approx(expected.pvalue, rel=1e-6)
    low, high = expected.confidence_interval(0.90)  # its ends are the one-sided 95% bounds
    assert (verdict.lower, verdict.upper) == pytest.approx((low, high))


def test_no_spread_from_one_seed_or_one_config():
    assert additive_spread(np.zeros((3, 1))) is None
    assert additive_spread(np.zeros((1, 3))) is None
    assert family_spread({'dense': {}, 'a': {1: 2.0}}, 'dense') is None
    verdict = judge(table([[2.0], [1.9], [2.1]]))['config 1']
    assert verdict.word is None and verdict.p is None and verdict.upper is None
    assert verdict.n == 1 and verdict.difference == pytest.approx(-0.1)


def test_identical_configs_and_those_that_lack_a_seed_are_not_in_the_spread():
    losses = one_family([0.01, -0.01, 0.02], 4)
    spread = family_spread(losses, 'dense')
    losses['twin'] = dict(losses['dense'])
    losses['short twin'] = {2: losses['dense'][2]}
    losses['sharded tp'] = {seed: loss + 1e-4 * seed for seed, loss in losses['dense'].items()}
    losses['short'] = {1: 9.0, 3: 2.0}
    losses['config 1'][99] = 5.0  # a seed that the control lacks
    assert identical_configs(losses, 'dense') == {'twin', 'short twin'}
    assert family_spread(losses, 'dense', {'sharded tp'}) == spread
    assert family_spread(losses, 'dense').df == spread.df + 3


# Dunnett


@pytest.mark.parametrize('df, published', [  # two-sided, 5%, 2 to 9 treatments: Dunnett (1964), Biometrics 20
    (5, [3.03, 3.29, 3.48, 3.62, 3.73, 3.82, 3.90, 3.97]),
    (10, [2.57, 2.76, 2.89, 2.99, 3.07, 3.14, 3.19, 3.24]),
    (20, [2.38, 2.54, 2.65, 2.73, 2.80, 2.86, 2.90, 2.95]),
    (10**6, [2.21, 2.35, 2.44, 2.51, 2.57, 2.61, 2.65, 2.69])])
def test_dunnett_critical_values_are_the_published_ones(df, published):
    assert [round(dunnett_critical(m, df), 2) for m in range(2, 10)] == published


@pytest.mark.parametrize('df', [1, 2, 7, 24, 500])
def test_dunnett_of_one_comparison_is_student(df):
    statistics = np.array([[0, 0.3, -1], [2.5, -4, 10]])
    assert dunnett_p(statistics, 1, df) == pytest.approx(2 * t.sf(abs(statistics), df), abs=1e-9)
    assert dunnett_critical(1, df) == pytest.approx(t.isf(0.025, df), rel=1e-7)


@pytest.mark.parametrize('statistic, m, df', [(2.0, 3, 4), (2.6, 6, 24), (1.0, 6, 12)])
def test_dunnett_is_the_multivariate_t_of_scipy(statistic, m, df):
    law = multivariate_t(shape=np.full((m, m), 0.5) + np.eye(m) / 2, df=df, seed=0)
    inside = law.cdf(np.full(m, statistic), lower_limit=np.full(m, -statistic), maxpts=200_000)
    assert dunnett_p(statistic, m, df) == pytest.approx(1 - inside, abs=2e-4)


def test_dunnett_is_what_adaptive_quadrature_gives():
    statistic, m, df = 2.2, 6, 3

    def inside(z, u):
        reach = 2 ** 0.5 * statistic * u
        density = math.exp(-z * z / 2 - df * u * u / 2) * u ** (df - 1)
        return (ndtr(z + reach) - ndtr(z - reach)) ** m * density

    whole = math.sqrt(2 * math.pi) * math.gamma(df / 2) * 2 ** (df / 2 - 1) / df ** (df / 2)
    expected = 1 - dblquad(inside, 0, 6, -8, 8, epsabs=1e-6)[0] / whole
    assert dunnett_p(statistic, m, df) == pytest.approx(expected, abs=1e-6)


def test_dunnett_p_at_its_ends():
    assert dunnett_p([0, math.inf, 1e9], 6, 24) == pytest.approx([1, 0, 0], abs=1e-12)
    falling = dunnett_p(np.linspace(0, 8, 200), 6, 24)
    assert (np.diff(falling) < 0).all()
    assert np.isnan(dunnett_p(math.nan, 6, 24))


# verdicts


def test_the_four_words_in_their_order():
    error, df, m = 0.005, 24, 6
    half, reach = t.isf(0.05, df) * error, dunnett_critical(m, df) * error

    def word(difference, margin=MARGIN):
        return str(words(difference, error, m, df, margin))

    assert word(-reach - 1e-6) == 'better'
    assert word(-reach + 1e-6) == 'as good'
    assert word(reach + 1e-6, margin=0.1) == 'as good'  # clearly above 0, and clearly below the margin
    assert word(MARGIN - half - 1e-6) == 'as good'
    assert word(MARGIN - half + 1e-6) == 'undecided'
    assert word(MARGIN) == 'undecided'
    assert word(MARGIN + half - 1e-6) == 'undecided'
    assert word(MARGIN + half + 1e-6) == 'worse'
    assert word(0.0, margin=0.001) == 'undecided'
    assert word(-reach - 1e-6, margin=0.0) == 'better'


def test_without_any_spread_the_differences_speak():
    found = words([-1e-6, 0, 0.019, MARGIN, 0.021], 0.0, 5, 24)
    assert list(found) == ['better', 'as good', 'as good', 'undecided', 'worse']
    assert dunnett_of([-1e-6, 0, 1], 0.0, 5, 24) == pytest.approx([0, 1, 0], abs=1e-12)


def test_words_of_many_families_are_those_of_each():
    losses = simulate_families([-0.03, 0, 0.01, 0.05], 3, 0.013, 10, np.random.default_rng(1))
    found = judge_many(losses)
    assert [[verdict.word for verdict in judge(table(own)).values()] for own in losses] == found.tolist()
    assert len(set(found.ravel())) > 2


def test_a_config_with_fewer_seeds_is_judged_by_the_spread_of_the_family():
    losses = one_family([0.0, 0.0], 5)
    losses['short'] = {2: losses['dense'][2] - 0.01, 4: losses['dense'][4] - 0.03}
    losses['twin'] = dict(losses['dense'])
    losses['other seeds'] = {7: 2.0}
    spread = family_spread(losses, 'dense')
    verdict = judge(losses)['short']
    assert (verdict.n, verdict.difference) == (2, pytest.approx(-0.02))
    assert verdict.error == pytest.approx(spread.s)
    assert verdict.upper == pytest.approx(-0.02 + t.isf(0.05, 8) * spread.s)
    assert verdict.p == pytest.approx(float(dunnett_p(-0.02 / spread.s, 3, 8)))  # neither twin nor unpaired
    assert judge(losses)['twin'].word == 'identical' and judge(losses)['twin'].p is None
    assert judge(losses)['other seeds'].word is None and judge(losses)['other seeds'].n == 0
    assert list(judge(losses)) == list(losses)[1:]


def test_a_spread_may_come_from_more_of_the_recipe_than_is_judged():
    losses = one_family([0.0, 0.0, 0.01], 5)
    short = {'dense': losses['dense'], 'short': {1: losses['dense'][1] + 0.1}}
    assert judge(short)['short'].word is None
    assert judge_family(short, 'dense', family_spread(losses, 'dense'))['short'].word == 'worse'
    assert judge_family(short, 'dense', Spread(0.2, 12))['short'].word == 'undecided'


def test_a_named_identical_config_is_not_tested():
    losses = one_family([0.1, 0.0], 3)
    verdict = judge(losses, identical={'config 1'})['config 1']
    assert (verdict.word, verdict.n, verdict.p) == ('identical', 3, None)
    assert judge(losses)['config 1'].word == 'worse'


@pytest.mark.parametrize('verdicts, expected', [
    (['identical', 'better', 'as good', 'undecided', 'better'], 12),
    (['identical', 'worse', 'as good', 'as good', 'as good'], 24),
    (['as good'] * 5, 2),
    (['undecided', *['better'] * 4], None),
    (['identical', 'as good', None, 'as good', 'as good'], 18)])
def test_the_answer_stops_before_the_first_that_fails(verdicts, expected):
    assert fewest([24, 18, 12, 6, 2], verdicts) == expected


def test_no_configs_no_answer():
    assert fewest([], []) is None
    with pytest.raises(ValueError):
        fewest([24, 12], ['identical'])


# other tests


def test_holm_on_an_example_by_hand():
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.01]) == pytest.approx([1, 1, 0.03])
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_paired_t_by_its_formula_and_at_its_ends():
    differences = [0.01, 0.03, -0.01, 0.02]
    mean, error = np.mean(differences), np.std(differences, ddof=1) / 2
    half = t.isf(0.025, 3) * error
    assert paired_t(differences) == pytest.approx((mean - half, mean + half, 2 * t.sf(mean / error, 3)))
    assert paired_t(differences, 0.90)[1] == pytest.approx(mean + t.isf(0.05, 3) * error)
    assert paired_t([0.01]) is None and paired_t([]) is None
    assert paired_t([0, 0, 0]) == (0, 0, 1) and paired_t([0.5, 0.5]) == (0.5, 0.5, 0)


# how many seeds it takes


def test_seeds_that_it_takes_at_the_spread_seen():
    sd, configs = 0.016, 6
    assert seeds_to_detect(0.02, sd, configs) == seeds_to_detect(-0.02, sd, configs) == 8
    assert seeds_to_detect(0.01, sd, configs) == 31
    assert seeds_to_show(0.02, sd, configs) == 6
    assert power_to_show(0.02, sd, 3, configs) == pytest.approx(0.654, abs=5e-4)
    assert seeds_to_show(0.01, sd, configs) == seeds_to_show(0.02, sd, configs, difference=0.01)


def test_fewest_seeds_is_the_first_that_is_enough():
    for enough in (2, 3, 4, 5, 8, 9, 1000):
        assert fewest_seeds(lambda seeds, enough=enough: float(seeds >= enough), 0.8) == enough


def test_what_no_number_of_seeds_can_show_is_refused():
    with pytest.raises(ValueError, match='difference is 0, it must be another'):
        seeds_to_detect(0, 0.016, 6)
    with pytest.raises(ValueError, match='difference is 0.02, it must be below the margin, 0.02'):
        seeds_to_show(0.02, 0.016, 6, difference=0.02)


# families with a known truth: 2,000 of a control and six configs, five seeds, a paired difference's sd 0.013

SIX, SEEDS, SD, DRAWS = 6, 5, 0.013, 2000


def judge_many(losses):
    """Losses (draws, k, n) -> the words of the configs, (draws, k - 1)."""
    spread = additive_spread(losses)
    differences = (losses[:, 1:] - losses[:, :1]).mean(-1)
    return words(differences, spread.error(losses.shape[-1])[:, None], losses.shape[1] - 1, spread.df)


@cache
def simulated_words(*offsets):
    return judge_many(simulate_families(offsets, SEEDS, SD, DRAWS, np.random.default_rng(0)))


def wrong_answers(offsets):
    """The share of families whose answer is a config that lies at the margin or above it."""
    answers = [fewest(offsets, own) for own in simulated_words(*offsets)]
    return np.mean([answer is not None and answer >= MARGIN for answer in answers])


def test_simulated_losses_have_the_spread_and_differences_asked_for():
    losses = simulate_families([-0.01, 0.03], SEEDS, SD, 20_000, np.random.default_rng(0))
    differences = losses[:, 1:] - losses[:, :1]
    assert losses.shape == (20_000, 3, SEEDS)
    assert differences.mean((0, 2)) == pytest.approx([-0.01, 0.03], abs=2e-4)
    assert differences.std((0, 2)) == pytest.approx(SD, rel=0.02)
    assert np.corrcoef(differences[:, :, 0].T)[0, 1] == pytest.approx(0.5, abs=0.02)
    assert np.mean(additive_spread(losses).s ** 2) == pytest.approx(SD ** 2 / 2, rel=0.02)


def test_a_config_at_the_margin_is_called_as_good_in_one_family_of_twenty():
    found = simulated_words(*[MARGIN] * SIX)
    for config in range(SIX):
        assert 0.03 <= np.mean(found[:, config] == 'as good') <= 0.07
    assert np.mean(found == 'worse') == pytest.approx(0.05, abs=0.01)


def test_one_of_six_equal_configs_is_called_better_in_one_family_of_forty():
    found = simulated_words(*[0] * SIX)
    assert 0.01 <= np.mean((found == 'better').any(1)) <= 0.04
    assert np.mean(found == 'as good') > 0.9


@pytest.mark.parametrize('offsets', [
    [MARGIN] * SIX, [0, 0, MARGIN, MARGIN, 0.03, 0.05], [-0.02, 0, 0.01, MARGIN, MARGIN, MARGIN]])
def test_the_answer_rarely_names_a_config_at_the_margin_or_above(offsets):
    assert wrong_answers(offsets) <= 0.065


def test_reading_the_fewest_of_six_as_good_would_name_one_far_too_often():
    assert np.mean((simulated_words(*[MARGIN] * SIX) == 'as good').any(1)) > 0.15


def test_the_power_is_what_simulation_finds():
    found = simulated_words(-0.015, *[0] * (SIX - 1))
    power = power_to_detect(0.015, SD, SEEDS, SIX)
    assert 0.3 < power < 0.7
    assert np.mean(found[:, 0] == 'better') == pytest.approx(power, abs=0.035)
    passes = np.isin(found[:, 1:], ['better', 'as good']).mean()
    assert passes == pytest.approx(power_to_show(MARGIN, SD, SEEDS, SIX), abs=0.015)
