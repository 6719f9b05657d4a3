"""How sure an accuracy is that was measured on few images."""

from scipy.stats import binomtest


def interval(accuracy: float, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, a fraction, that was measured on ``images`` images (Wilson, 1927)."""
    found = binomtest(round(accuracy * images), images).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def by_chance(lost: int, won: int) -> float:
    """The probability that two equally good networks differ on so many images as unevenly as these, or more so.

    McNemar's exact test (1947; Edwards, 1948): of the images that one of them alone has right, each is on either side
    with probability 1/2.

    Args:
        lost: images that the first network alone has right.
        won: images that the second one alone has right.
    """
    return float(binomtest(won, lost + won).pvalue) if lost + won else 1.0
