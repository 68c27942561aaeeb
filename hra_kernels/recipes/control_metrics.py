"""How well generated pictures keep to their control: edges, segments, landmarks."""

import torch
from torch import Tensor

IGNORED = 255
"""The label that counts for nothing in a map of segments."""


def edge_scores(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """{IoU, F1} of two pictures of edges, 0 and 1; 1 where both are empty."""
    found, wanted = found > 0.5, wanted > 0.5
    both, either = (found & wanted).sum().item(), (found | wanted).sum().item()
    return {"IoU": both / either if either else 1.0, "F1": 2 * both / (both + either) if either else 1.0}


def mean_edge_scores(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    scores = [edge_scores(found, wanted) for found, wanted in pairs]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def confusion(found: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """(classes wanted, classes found), of two maps of labels below `classes`; what is wanted as IGNORED is left out."""
    counted = wanted != IGNORED
    pairs = classes * wanted[counted].long() + found[counted].long()
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def segment_scores(counts: Tensor) -> dict[str, float]:
    """{mIoU, mAcc, aAcc} from the sum of `confusion` over all pictures; the means are over classes that occur."""
    counts = counts.double()
    right, wanted = counts.diag(), counts.sum(1)
    either = wanted + counts.sum(0) - right
    return {
        "mIoU": (right / either)[either > 0].mean().item(),
        "mAcc": (right / wanted)[wanted > 0].mean().item(),
        "aAcc": (right.sum() / counts.sum()).item(),
    }


def landmark_distance(found: Tensor, wanted: Tensor) -> float:
    """Mean distance of points, both (points, 2)."""
    return (found - wanted).norm(dim=1).mean().item()
