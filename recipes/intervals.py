"""95 % intervals: Wilson's for a share, the paired bootstrap for a mean over prompts.

See "Probable Inference, the Law of Succession, and Statistical Inference", Wilson (1927) and "An
Introduction to the Bootstrap", Efron and Tibshirani (1993).
"""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of 95 %, two-sided
QUANTILES = {  # Student's, by degrees of freedom; above 29 the normal one is within 5 %
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    11: 2.201,
    12: 2.179,
    13: 2.160,
    14: 2.145,
    15: 2.131,
    16: 2.120,
    17: 2.110,
    18: 2.101,
    19: 2.093,
    20: 2.086,
    21: 2.080,
    22: 2.074,
    23: 2.069,
    24: 2.064,
    25: 2.060,
    26: 2.056,
    27: 2.052,
    28: 2.048,
    29: 2.045,
}


def wilson(hits: float, n: int) -> tuple[float, float]:
    """Interval of a share of `hits` among n; ties may count half.

    >>> [round(x, 3) for x in wilson(60, 100)]
    [0.502, 0.691]
    """
    if n == 0:
        return 0.0, 1.0
    p = hits / n
    middle = p + Z * Z / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return (middle - half) / (1 + Z * Z / n), (middle + half) / (1 + Z * Z / n)


def student(values: Sequence[float]) -> tuple[float, float]:
    """Mean of a few independent values, one a seed, and half the width of its interval; see Student (1908).

    >>> [round(x, 3) for x in student([1.0, 2.0, 3.0])]
    [2.0, 2.484]
    """
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, QUANTILES.get(n - 1, Z) * deviation / math.sqrt(n)


def bootstrap(values: Sequence[float], draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean of independent values, one a prompt: give differences, and the comparison is paired.

    >>> bootstrap([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    array = np.asarray(values, dtype=np.float64)
    means = np.concatenate(
        [
            array[
                np.random.default_rng([seed, i]).integers(len(array), size=(1000, len(array)))
            ].mean(1)
            for i in range(draws // 1000)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
