"""
The statistics of a comparison: numbers in, numbers out, and one of four words for each config.

A family is a dense control and the configs of its recipe, trained from the same seeds. A difference is a
config's validation loss minus the control's, in nats per token, averaged over the seeds both have.

    better      the difference is below 0, and its two-sided Dunnett p is below 0.05
    as good     the one-sided 95% upper bound lies below the margin
    worse       the one-sided 95% lower bound lies above the margin
    undecided   none of these

The first that holds is the verdict. 'As good' is therefore shown, never inferred from 'undecided'. A config
that computes the same function as the control is 'identical' to it, and is not tested.

References  many configs against one control: Dunnett (1955), JASA 50(272)
            many tests of any kind: Holm (1979), Scandinavian Journal of Statistics 6(2)
            as good within a margin, by a one-sided bound: Schuirmann (1987), J. Pharmacokinetics and
            Biopharmaceutics 15(6)
            paired t: Student (1908), Biometrika 6(1)
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import chi2, nct, norm, t, ttest_1samp

ALPHA = 0.05
MARGIN = 0.02  # nats per token
PASSES = ('identical', 'better', 'as good')

# the spread of a family


@dataclass(frozen=True)
class Spread:
    """How far one run's loss scatters after config and seed are taken out, in nats per token."""
    s: float  # or an array, one for each of many families
    df: int

    @property
    def pooled_sd(self):
        """The standard deviation of a single paired difference."""
        return self.s * math.sqrt(2)

    def error(self, n):
        """The standard error of a paired difference over n seeds."""
        return self.s * math.sqrt(2 / n)


def additive_spread(losses):
    """
    The Spread from the residuals of the additive model loss = config + seed, a two-way layout without
    replication: Fisher (1925), Statistical Methods for Research Workers.

    losses: (..., k, n), the control among the k configs, each with all n seeds. None if k or n is 1, which
    leaves no residual. With k = 2, s sqrt(2 / n) is the standard error of the ordinary paired t-test, and
    df its n - 1.
    """
    losses = np.asarray(losses, dtype=float)
    k, n = losses.shape[-2:]
    df = (k - 1) * (n - 1)
    if df == 0:
        return None
    residuals = (losses - losses.mean(-1, keepdims=True) - losses.mean(-2, keepdims=True)
                 + losses.mean((-2, -1), keepdims=True))
    return Spread(np.sqrt((residuals ** 2).sum((-2, -1)) / df), df)


def paired_differences(losses, control):
    """losses minus the control's, both {seed: loss}, for the seeds that both have, in the control's order."""
    return [losses[seed] - loss for seed, loss in control.items() if seed in losses]


def identical_configs(losses, control, identical=()):
    """
    The configs that are not tested: those named, and those whose every loss is the control's to the last bit.

    losses: {config: {seed: loss}}. control: its key there.
    """
    twins = set(identical)
    for config in losses.keys() - {control}:
        differences = paired_differences(losses[config], losses[control])
        if differences and not any(differences):
            twins.add(config)
    return twins


def family_spread(losses, control, identical=()):
    """
    The Spread of a family, {config: {seed: loss}}, without its identical configs, whose residuals would make
    it too small. It rests on the configs that have every seed of the control. None if there is no such
    config, or one seed only.
    """
    seeds = losses[control].keys()
    if not seeds:
        return None
    left_out = identical_configs(losses, control, identical) | {control}
    complete = [own for config, own in losses.items() if config not in left_out and seeds <= own.keys()]
    return additive_spread([[own[seed] for seed in seeds] for own in [losses[control], *complete]])


# Dunnett's test of paired differences


def scale_nodes(df):
    """
    Nodes u and weights for the mean of a function of u = sqrt(chi2 / df): the trapezoid rule in log(u), where
    the density falls off on both sides fast enough to converge exponentially.
    """
    low, high = (math.log(chi / df) / 2 for chi in (chi2.ppf(1e-16, df), chi2.isf(1e-16, df)))
    u = np.exp(np.linspace(low, high, 32 + 256 // df))  # the fewer df, the longer the tail below
    weights = chi2.pdf(df * u ** 2, df) * u ** 2
    return u, weights / weights.sum()


def dunnett_p(statistic, comparisons, df):
    """
    The two-sided p of a paired difference, adjusted for that many comparisons with one control: the
    probability that the largest |T| of them reaches |statistic|. Dunnett (1955), for the multivariate t with
    all correlations 1/2, which is what differences to one control have.

    With seed effects taken out, df is (k - 1)(n - 1); scipy.stats.dunnett is for unpaired groups. Given the
    control's normal z and the scale u, the T_i = (Z_i - z) / (sqrt(2) u) are independent. The quadrature is
    exact to 1e-8 for up to 20 comparisons. statistic: a number or an array of any shape.
    """
    z = np.linspace(0, 8, 25)
    density = norm.pdf(z) * np.where(z == 0, 1, 2)  # z and -z give the same
    density /= density.sum()
    reach = math.sqrt(2) * np.abs(np.asarray(statistic, dtype=float))[..., None]
    p = 0
    for u, weight in zip(*scale_nodes(df), strict=True):  # a loop, so that many statistics fit into memory
        inside = ndtr(z + u * reach) - ndtr(z - u * reach)
        p = p + weight * ((1 - inside ** comparisons) @ density)
    return np.clip(p, 0, 1)


@cache
def dunnett_critical(comparisons, df, alpha=ALPHA):
    """
    The |T| at which dunnett_p is alpha: Dunnett (1955). A simultaneous interval is the difference plus or
    minus the critical value times its standard error.
    """
    # one test needs no more; Bonferroni's for all of them is always enough
    low, high = t.isf(alpha / 2, df), t.isf(alpha / (2 * comparisons), df)
    return brentq(lambda c: float(dunnett_p(c, comparisons, df)) - alpha, low * 0.99, high * 1.01, xtol=1e-10)


# verdicts


def bounds(differences, errors, df):
    """The one-sided 95% bounds (lower, upper), each by itself, not adjusted: Schuirmann (1987)."""
    half = t.isf(ALPHA, df) * np.asarray(errors)
    return differences - half, differences + half


def dunnett_of(differences, errors, comparisons, df):
    """dunnett_p of differences; with no spread at all it is 0, and 1 for a difference of 0."""
    differences, errors = np.broadcast_arrays(np.asarray(differences, dtype=float), errors)
    with np.errstate(divide='ignore', invalid='ignore'):
        statistic = np.where(differences == 0, 0, differences / errors)
    return dunnett_p(statistic, comparisons, df)


def words(differences, errors, comparisons, df, margin=MARGIN):
    """
    The verdicts of differences with their standard errors, arrays that broadcast, as an array of words.

    comparisons: how many configs of the family are tested. df: of the errors.
    """
    lower, upper = bounds(differences, errors, df)
    p = dunnett_of(differences, errors, comparisons, df)
    return np.select([(np.asarray(differences) < 0) & (p < ALPHA), upper < margin, lower > margin],
                     ['better', 'as good', 'worse'], 'undecided')


@dataclass(frozen=True)
class Verdict:
    """A config against its control. What cannot be said is None; if they share no seed, that is all but n."""
    word: str | None
    n: int  # seeds that both have
    difference: float | None = None  # nats per token
    error: float | None = None  # its standard error
    lower: float | None = None  # one-sided 95% bounds
    upper: float | None = None
    p: float | None = None  # two-sided, Dunnett's


def judge_family(losses, control, spread, margin=MARGIN, identical=()):
    """
    The Verdict of each config of {config: {seed: loss}} but the control, in the same order.

    spread: of the family, from family_spread of these losses or of more configs of the same recipe; without
    one (None), as with one seed, no word is given. Every config that shares a seed with the control and is
    not identical to it counts as one of Dunnett's comparisons. One with fewer seeds than the others is judged
    by the same spread; its correlation with them is a little below 1/2, and its p a little too small.

    identical: configs that compute the control's function, such as all layers tp; bit-equal twins are found
    without being named. Losses must be finite.
    """
    twins = identical_configs(losses, control, identical)
    paired = {config: paired_differences(own, losses[control])
              for config, own in losses.items() if config != control}
    comparisons = sum(bool(differences) for config, differences in paired.items() if config not in twins)
    verdicts = {}
    for config, differences in paired.items():
        n = len(differences)
        difference = math.fsum(differences) / n if n else None
        if config in twins or n == 0 or spread is None:
            verdicts[config] = Verdict('identical' if config in twins else None, n, difference)
            continue
        error = float(spread.error(n))
        lower, upper = map(float, bounds(difference, error, spread.df))
        verdicts[config] = Verdict(
            str(words(difference, error, comparisons, spread.df, margin)), n, difference, error, lower, upper,
            float(dunnett_of(difference, error, comparisons, spread.df)))
    return verdicts


def fewest(configs, verdicts):
    """
    The last config before the first that is neither better nor as good; None if the first already fails.

    configs: in an order fixed beforehand, from most observed all-reduces to fewest. verdicts: their words;
    'identical' passes, None does not. Testing in a fixed order and stopping at the first failure keeps the
    chance of naming a config at the margin at that of one test: Maurer, Hothorn & Lehmacher (1995),
    Biometrie in der chemisch-pharmazeutischen Industrie 6.
    """
    passed = list(takewhile(lambda pair: pair[1] in PASSES, zip(configs, verdicts, strict=True)))
    return passed[-1][0] if passed else None


# other tests


def holm(p_values):
    """
    The p-values, in the same order, adjusted for being several tests of any kind and dependence: each, from
    the smallest on, times how many are not yet counted, and never below the one before. Holm (1979).
    """
    adjusted, highest = list(p_values), 0
    for rank, i in enumerate(sorted(range(len(adjusted)), key=adjusted.__getitem__)):
        highest = max(highest, min(1, adjusted[i] * (len(adjusted) - rank)))
        adjusted[i] = highest
    return adjusted


def paired_t(differences, confidence=1 - ALPHA):
    """
    (low, high, p) of the mean of paired differences, from their own spread alone: Student (1908).

    None with fewer than two. If all are equal the interval is a point, and p is 0, or 1 if they are 0.
    """
    if len(differences) < 2:
        return None
    if min(differences) == max(differences):
        return differences[0], differences[0], float(differences[0] == 0)
    test = ttest_1samp(differences, 0)
    low, high = test.confidence_interval(confidence)
    return float(low), float(high), float(test.pvalue)


# how many seeds it takes


def power_to_detect(difference, sd, seeds, configs):
    """
    The probability that Dunnett's test at 5% finds the true difference of one config, on its own side: the
    noncentral t with configs x (seeds - 1) df beyond Dunnett's critical value. Dunnett (1955).

    sd: of a single paired difference (Spread.pooled_sd), in the unit of the difference. seeds: of each
    config. configs: in the family, without the control.
    """
    df = configs * (seeds - 1)
    return float(nct.sf(dunnett_critical(configs, df), df, abs(difference) * math.sqrt(seeds) / sd))


def power_to_show(margin, sd, seeds, configs, difference=0):
    """
    The probability that a config with this true difference is shown to be as good, its one-sided 95% bound
    below the margin: Schuirmann (1987). The other arguments are those of power_to_detect.
    """
    df = configs * (seeds - 1)
    return float(nct.sf(t.isf(ALPHA, df), df, (margin - difference) * math.sqrt(seeds) / sd))


def fewest_seeds(power, wanted):
    """The fewest seeds, from 2 on, with power(seeds) of at least `wanted`. It must rise with them to 1."""
    enough = 2
    while power(enough) < wanted:
        enough *= 2
    return bisect_left(range(enough), True, lo=2, key=lambda seeds: power(seeds) >= wanted)


def seeds_to_detect(difference, sd, configs, power=0.8):
    """
    The fewest seeds with which power_to_detect reaches `power`. Raises ValueError if the difference is 0.
    """
    if difference == 0:
        raise ValueError('difference is 0, it must be another number: no number of seeds detects it')
    return fewest_seeds(lambda seeds: power_to_detect(difference, sd, seeds, configs), power)


def seeds_to_show(margin, sd, configs, power=0.9, difference=0):
    """
    The fewest seeds with which power_to_show reaches `power`. Raises ValueError if the difference is not
    below the margin.
    """
    if difference >= margin:
        raise ValueError(f'difference is {difference}, it must be below the margin, {margin}')
    return fewest_seeds(lambda seeds: power_to_show(margin, sd, seeds, configs, difference), power)


# families with a known truth


def simulate_families(offsets, seeds, sd, draws, rng, seed_sd=0.05):
    """
    Losses (draws, k, seeds) of the additive model, config + seed + a normal error, the control first.

    offsets: the true differences of the k - 1 configs. sd: of a single paired difference. rng: a numpy
    Generator. seed_sd: what a seed does to all configs alike.
    """
    k = len(offsets) + 1
    losses = rng.normal(0, sd / math.sqrt(2), (draws, k, seeds)) + rng.normal(0, seed_sd, (draws, 1, seeds))
    return losses + np.array([0, *offsets])[:, None]
