"""The metrics of GLUE: of predictions and labels, both (n,)."""

from torch import Tensor


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


def f1(predicted: Tensor, labels: Tensor) -> float:
    """Of class 1; 0 where there is no such class and none is predicted."""
    hits = ((predicted == 1) & (labels == 1)).sum().item()
    named = (predicted == 1).sum().item() + (labels == 1).sum().item()
    return 2 * hits / named if named else 0.0


def pearson(one: Tensor, other: Tensor) -> float:
    """Of any numbers; 0 where one side is constant. Of two binary ones it is Matthews' coefficient."""
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    norm = one.norm() * other.norm()
    return (one @ other / norm).item() if norm > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Equal values share the mean of their ranks."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]


def spearman(one: Tensor, other: Tensor) -> float:
    return pearson(_ranks(one), _ranks(other))
