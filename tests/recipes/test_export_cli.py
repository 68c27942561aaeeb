"""`hra-kernels export`: the folder it writes, and one line for whatever is wrong with what it is given."""

import json
import shutil

import pytest
import torch

pytest.importorskip("peft", reason="`export` needs hra-kernels[peft]")

import transformers
from peft import HRAConfig, get_peft_model
from safetensors.torch import load_file, save_file

import hra_kernels.peft
from hra_kernels import cli
from tests.recipes.tiny import save_base

TARGETS = ["query", "value"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny base model, `base`, and an adapter of it, `adapter`."""
    folder = tmp_path_factory.mktemp("export")
    save_base(folder / "base")
    base = transformers.BertModel.from_pretrained(folder / "base")
    with hra_kernels.peft.enabled():
        model = get_peft_model(base, HRAConfig(r=4, target_modules=TARGETS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hra_u" in name:
                parameter.normal_()
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    """A copy of the adapter, to be damaged."""
    return shutil.copytree(saved / "adapter", tmp_path / "adapter")


def edit(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(capsys, *arguments) -> str:
    """What the command says as it refuses, which is one line, with exit status 2."""
    capsys.readouterr()
    status = cli.main(["export", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.startswith("hra-kernels: ")
    return err


def truncate(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def drop_a_tensor(adapter):
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    state.pop(next(iter(state)))
    save_file(state, path)


DAMAGES = {
    "config missing": (lambda adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json"),
    "config is no JSON": (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "config is a list": (lambda adapter: (adapter / "adapter_config.json").write_text("[1]"), "adapter_config.json"),
    "config is not text": (
        lambda adapter: (adapter / "adapter_config.json").write_bytes(b"\xff"),
        "adapter_config.json",
    ),
    "unknown peft_type": (
        lambda adapter: edit(adapter, peft_type="HERA"),
        "must be an HRA adapter, it is 'HERA'",
    ),
    "peft_type null": (lambda adapter: edit(adapter, peft_type=None), "must be an HRA adapter, it is None"),
    "another peft_type": (lambda adapter: edit(adapter, peft_type="IA3"), "must be an HRA adapter, it is IA3"),
    "r is text": (lambda adapter: edit(adapter, r="four"), "r must be a positive integer, it is 'four'"),
    "r is zero": (lambda adapter: edit(adapter, r=0), "r must be a positive integer, it is 0"),
    "r is a list": (lambda adapter: edit(adapter, r=[4]), "r must be a positive integer, it is [4]"),
    "r does not match": (lambda adapter: edit(adapter, r=6), "size mismatch"),
    "no matching target": (lambda adapter: edit(adapter, target_modules=["q_proj"]), "q_proj"),
    "targets are a number": (lambda adapter: edit(adapter, target_modules=5), "does not fit"),
    "more targets than weights": (lambda adapter: edit(adapter, target_modules=[*TARGETS, "key"]), "key.hra_u"),
    "fewer targets than weights": (lambda adapter: edit(adapter, target_modules=["query"]), "value.hra_u"),
    "weights missing": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "weights truncated": (truncate, "adapter_model.safetensors"),
    "weights cut in the header": (cut_header, "adapter_model.safetensors"),
    "weights of one layer missing": (drop_a_tensor, "hra_u"),
    "base model missing": (lambda adapter: edit(adapter, base_model_name_or_path="./nowhere"), "nowhere"),
    "base model not named": (lambda adapter: edit(adapter, base_model_name_or_path=None), "give it with --model"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_one_line(adapter, tmp_path, damage, capsys):
    spoil, named = DAMAGES[damage]
    spoil(adapter)
    assert named in refused(capsys, adapter, "--out", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_folder_that_is_none(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name in ("absent", "file"):
        assert name in refused(capsys, tmp_path / name, "--out", tmp_path / "lora")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[1]"),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no_such_model"}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x00" * 100),
    ],
    ids=["list", "no JSON", "unknown type", "empty", "zeros"],
)
def test_a_damaged_base_model_is_one_line(saved, adapter, tmp_path, name, content, capsys):
    base = shutil.copytree(saved / "base", tmp_path / "base")
    (base / name).write_bytes(content)
    assert str(base) in refused(capsys, adapter, "--model", base, "--out", tmp_path / "lora")


def test_a_base_model_of_another_width(adapter, tmp_path, capsys):
    save_base(tmp_path / "wide", hidden=32)
    assert "size mismatch" in refused(capsys, adapter, "--model", tmp_path / "wide", "--out", tmp_path / "lora")


def test_an_adapter_that_is_not_finite(adapter, tmp_path, capsys):
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    assert "must be finite" in refused(capsys, adapter, "--out", tmp_path / "lora")


@pytest.mark.parametrize("below", [False, True])
def test_out_that_is_a_file(adapter, tmp_path, below, capsys):
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "lora" if below else tmp_path / "file"
    assert f"--out {out}" in refused(capsys, adapter, "--out", out)
    assert (tmp_path / "file").read_text() == "kept"


def test_the_format_of_diffusers(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4,
    ).save_pretrained(tmp_path / "base")  # fmt: skip

    def base():
        return diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base").eval()

    with hra_kernels.peft.enabled():
        model = get_peft_model(base(), HRAConfig(r=4, target_modules=["to_q", "conv1"], init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    arguments = [tmp_path / "adapter", "--model", tmp_path / "base", "--format", "diffusers"]

    def loaded(unet, folder, component):
        unet.load_lora_adapter(folder, prefix=component, use_safetensors=True)
        return unet

    image = torch.randn(1, 3, 8, 8), 1, torch.randn(1, 4, 8)
    for component in ("unet", "unet_2"):
        out = tmp_path / component
        named = [] if component == "unet" else ["--component", component]
        assert cli.main(["export", *map(str, arguments), *named, "--out", str(out)]) == 0
        assert f"{out}: LoRA of rank 4 over " in capsys.readouterr().out
        assert [path.name for path in out.iterdir()] == ["pytorch_lora_weights.safetensors"]
        state = load_file(out / "pytorch_lora_weights.safetensors")
        assert all(key.startswith(f"{component}.") and key.endswith("weight") for key in state)
        lora = loaded(base(), out, component)
        with torch.no_grad():
            y = model(*image).sample
            assert (lora(*image).sample - y).abs().max() < 1e-5 * y.abs().max()


def test_what_diffusers_has_no_name_for(adapter, tmp_path, capsys):
    said = refused(capsys, adapter, "--component", "unet", "--out", tmp_path / "lora")
    assert "--component" in said and "--format diffusers" in said
