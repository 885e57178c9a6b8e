"""Student's t distribution, from the regularised incomplete beta function (Numerical Recipes, section 6.4)."""

from __future__ import annotations

import math

TINY = 1e-300
TERMS = 300
PRECISION = 1e-15


def two_sided_p(statistic: float, freedom: float) -> float:
    """Probability that |t| is at least as large as this."""
    if math.isnan(statistic):
        return math.nan
    square = statistic * statistic
    if square < 1:  # the other tail, because 1 - x would lose the digits of a small statistic
        return 1 - incomplete_beta(0.5, freedom / 2, square / (freedom + square))
    return incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square))


def quantile(probability: float, freedom: float) -> float:
    """The value below which t falls with a probability of 0.5 or more, by bisection."""
    low, high = 0.0, 1.0
    while 1 - two_sided_p(high, freedom) / 2 < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - two_sided_p(middle, freedom) / 2 < probability else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):
        return math.exp(logarithm) * _fraction(a, b, x) / a
    return 1 - math.exp(logarithm) * _fraction(b, a, 1 - x) / b


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            result *= c * d
        if abs(c * d - 1) < PRECISION:
            break
    return result


def _away_from_zero(value: float) -> float:
    return value if abs(value) > TINY else TINY
