"""Diffusers: adapters at a scale, fused and in inference, as powers of their chain; exports that its loaders read."""

import copy
import pickle
from collections import OrderedDict

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

import hra_kernels.peft
from hra_kernels.peft.export import export_lora
from hra_kernels.peft.powers import chain_power
from hra_kernels.testing.tolerance import rounding
from tests.peft.models import Experts, Net, adapt, config, dense_q, layer_of, layers_of, linear, relative, seeded

pytestmark = pytest.mark.usefixtures("enabled")
FLOAT32 = rounding(96, 4, layers=6)


def at_scale(model, scale, name="default"):
    for layer in layers_of(model):
        layer.set_scale(name, scale)
    return model


def powered(model, scale, name="default"):
    """The same model at scale 1, its vectors replaced by those of the power."""
    model = at_scale(copy.deepcopy(model), 1, name)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.hra_u[name].copy_(chain_power(layer.hra_u[name], False, scale))
    return model


@pytest.fixture
def net():
    return adapt(seeded(Net)).eval().requires_grad_(False)


@pytest.fixture
def x():
    return seeded(lambda: torch.randn(4, 3, 8, 8), 9)


# --- the scale of a layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.7, -1.0, -0.4, 1.5])
def test_a_scale_is_a_power(net, x, scale):
    at_scale(net, scale)
    assert relative(net(x), powered(net, scale)(x)) < FLOAT32
    for layer in layers_of(net):
        expected = layer.get_base_layer().weight.flatten(1).double() @ dense_q(
            chain_power(layer.hra_u["default"].double(), False, scale)
        )
        layer.merge()
        assert relative(layer.get_base_layer().weight.flatten(1), expected) < FLOAT32
        layer.unmerge()


@pytest.mark.parametrize("settings", [{}, {"r": 3}, {"apply_GS": True}], ids=str)
def test_zero_is_the_base_and_one_the_adapter_bit_for_bit(x, settings):
    net = adapt(seeded(Net), **settings).eval()
    adapted = net(x)
    with net.disable_adapter():
        base = net(x)
    assert torch.equal(at_scale(net, 0)(x), base)
    before = [layer.get_base_layer().weight.clone() for layer in layers_of(net)]
    net.merge_adapter()
    assert all(
        torch.equal(layer.get_base_layer().weight, was) for layer, was in zip(layers_of(net), before, strict=True)
    )
    net.unmerge_adapter()
    assert torch.equal(at_scale(net, 1)(x), adapted)


@pytest.mark.parametrize("settings", [{"r": 3}, {"apply_GS": True}], ids=str)
def test_no_power_no_scale(x, settings):
    net = adapt(seeded(Net), **settings).eval()
    adapted = net(x)
    with pytest.raises(ValueError, match=r"layer 'conv'.*adapter 'default' at scale 0.7.*1, -1 and 0 are"):
        at_scale(net, 0.7)
    assert torch.equal(net(x), adapted)
    for layer in layers_of(at_scale(net, -1)):
        q = dense_q(layer.hra_u["default"], layer.hra_apply_GS["default"])
        expected = layer.get_base_layer().weight.flatten(1).double() @ q.mT
        layer.merge()
        assert relative(layer.get_base_layer().weight.flatten(1), expected) < FLOAT32


def test_scales_multiply_and_undo_each_other():
    layer = layer_of(linear())
    layer.set_scale("default", 0.7)
    layer.set_scale("another", 0.1)
    x = torch.randn(3, 48)
    y = layer(x)
    layer.scale_layer(0.3)
    assert relative(layer(x), powered(layer, 0.21)(x)) < FLOAT32
    layer.unscale_layer(0.3)
    assert torch.equal(layer(x), y)
    layer.scale_layer(0)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.unscale_layer(0)
    assert torch.equal(layer(x), y)
    layer.scale_layer(0.5)
    layer.unscale_layer()
    assert torch.equal(layer(x), layer_of(linear())(x))


def test_a_mixed_batch_is_scaled(net, x):
    net.add_adapter("b", config())
    at_scale(at_scale(net, 0.7), 0, "b")
    y = net(x, adapter_names=["default", "b", "__base__", "default"])
    with net.disable_adapter():
        base = net(x)
    assert torch.equal(y[1:3], base[1:3])
    assert relative(y[::3], net(x)[::3]) < FLOAT32


def test_the_power_follows_the_vectors(net, x):
    at_scale(net, 0.7)
    net(x)
    cached = [layer.chain(["default"])[0][0] for layer in layers_of(net)]
    assert all(layer.chain(["default"])[0][0] is u for layer, u in zip(layers_of(net), cached, strict=True))
    for layer in layers_of(net):
        layer.hra_u["default"].data.add_(torch.randn_like(layer.hra_u["default"]))
    assert relative(net(x), powered(net, 0.7)(x)) < FLOAT32
    with torch.inference_mode():
        first = at_scale(net, 0.6)(x)
    assert relative(net(x), first) < FLOAT32
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def test_training_at_a_scale_is_refused(x):
    net = at_scale(adapt(seeded(Net)), 0.7)
    y = net(x)
    with torch.no_grad():
        assert torch.equal(net(x), y)
    with pytest.raises(NotImplementedError, match=r"no gradient through an adapter at scale 0.7"):
        y.sum().backward()
    x.requires_grad_()
    net.requires_grad_(False)
    net(x).sum().backward()
    assert x.grad.isfinite().all()
    net.requires_grad_(True)
    at_scale(net, 1)(x).sum().backward()
    assert all(layer.hra_u["default"].grad.abs().max() > 0 for layer in layers_of(net))


def test_experts_are_scaled():
    settings = hra_kernels.peft.HRAConfig(r=4, init_weights=False, target_parameters=["experts.weight"])
    model = get_peft_model(nn.Sequential(OrderedDict(experts=seeded(Experts))), settings).eval().requires_grad_(False)
    (wrapper,) = layers_of(model)
    u = wrapper.hra_u["default"].double()
    at_scale(model, 0.7)
    y = model(torch.eye(6))
    for expert, (chain, out) in enumerate(zip(u, y, strict=True)):
        base = model.base_model.model.experts.base_layer.weight[expert].double()
        assert relative(out, (base @ dense_q(chain_power(chain, False, 0.7))).mT) < FLOAT32


@pytest.mark.slow
def test_compiled(net, x):
    at_scale(net, 0.7)
    y = net(x)
    compiled = torch.compile(net, backend="aot_eager")
    assert relative(compiled(x), y) < FLOAT32
    at_scale(net, 0.2)
    assert relative(compiled(x), powered(net, 0.2)(x)) < FLOAT32


def test_neither_exported_nor_differentiated_by_torch_func(net, x):
    at_scale(net, 0.7)
    said = r"at scale 0.7 can be neither exported nor differentiated by torch.func"
    with pytest.raises(NotImplementedError, match=said):
        torch.export.export(net, (x,), strict=False)
    with pytest.raises(NotImplementedError, match=said):
        torch.jit.trace(net, x)
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    with pytest.raises(NotImplementedError, match=said):
        torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).sum())(parameters)
    for trains in (False, True):
        net.requires_grad_(trains)
        assert relative(torch.func.vmap(lambda one: net(one[None]))(x)[:, 0], net(x)) < FLOAT32


# --- Diffusers' own calls ---------------------------------------------------------------------------------------------


def unet():
    diffusers = pytest.importorskip("diffusers")
    return seeded(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
            norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        )
    ).eval()  # fmt: skip


UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"]


@pytest.fixture
def adapted_unet():
    model = unet()
    seeded(lambda: model.add_adapter(config(targets=UNET_TARGETS), "a"), 1)
    return model.requires_grad_(False)


@pytest.fixture
def image():
    return seeded(lambda: (torch.randn(1, 3, 8, 8), 1, torch.randn(1, 4, 8)), 2)


def test_set_adapters(adapted_unet, image):
    expected = powered(adapted_unet, 0.7, "a")(*image).sample
    adapted_unet.set_adapters("a", 0.7)
    assert relative(adapted_unet(*image).sample, expected) < FLOAT32
    adapted_unet.set_adapters("a", 0.0)
    assert torch.equal(adapted_unet(*image).sample, unet()(*image).sample)


def test_scaled_inference(adapted_unet, image):
    plain = adapted_unet(*image).sample
    scaled = adapted_unet(*image, cross_attention_kwargs={"scale": 0.3}).sample
    assert relative(scaled, powered(adapted_unet, 0.3, "a")(*image).sample) < FLOAT32
    assert torch.equal(adapted_unet(*image, cross_attention_kwargs={"scale": 0}).sample, unet()(*image).sample)
    assert torch.equal(adapted_unet(*image).sample, plain)


def test_fuse_lora(adapted_unet, image):
    before = {name: tensor.clone() for name, tensor in adapted_unet.state_dict().items()}
    expected = powered(adapted_unet, 0.5, "a")(*image).sample
    adapted_unet.fuse_lora(lora_scale=0.5)
    assert relative(adapted_unet(*image).sample, expected) < FLOAT32
    adapted_unet.unfuse_lora()
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted_unet.state_dict().items())


def test_a_name_for_one_adapter_more(adapted_unet):
    from diffusers.utils import get_adapter_name

    assert get_adapter_name(adapted_unet) == "default_1"


# --- exports for Diffusers' loaders -----------------------------------------------------------------------------------


def text_encoder():
    if peft.__version__.startswith("0.19.") and int(transformers.__version__.split(".")[0]) >= 5:
        pytest.skip("transformers 5 takes adapters from PEFT 0.20 on")
    settings = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return seeded(lambda: transformers.CLIPTextModel(settings)).eval()


def pipeline(unet_, text_encoder_):
    diffusers = pytest.importorskip("diffusers")
    vae = seeded(lambda: diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)).eval()
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder_, tokenizer=None, unet=unet_, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def images(pipe):
    prompt = pipe.text_encoder(torch.tensor([[0, 5, 6, 7, 1]]))[0]
    return pipe(
        prompt_embeds=prompt, negative_prompt_embeds=torch.zeros_like(prompt), num_inference_steps=3, height=8, width=8,
        latents=seeded(lambda: torch.randn(1, 3, 8, 8)), output_type="pt",
    ).images  # fmt: skip


TEXT_TARGETS = ["q_proj", "v_proj", "fc1"]
IMAGES = 1e-5


def adapted_models():
    model, text = unet(), text_encoder()
    seeded(lambda: model.add_adapter(config(targets=UNET_TARGETS), "a"), 1)
    seeded(lambda: text.add_adapter(config(targets=TEXT_TARGETS, r=3), "a"), 3)
    return model.eval(), text.eval()


def test_a_pipeline_loads_the_export(tmp_path):
    model, text = adapted_models()
    expected = images(pipeline(model, text))
    export_lora({"unet": model, "text_encoder": text}, tmp_path, format="diffusers")
    fresh = pipeline(unet(), text_encoder())
    assert (images(fresh) - expected).abs().max() > 1e3 * IMAGES
    fresh.load_lora_weights(tmp_path)
    assert (images(fresh) - expected).abs().max() < IMAGES


def test_a_pipeline_loads_one_component_after_the_other(tmp_path):
    model, text = adapted_models()
    expected = images(pipeline(model, text))
    fresh = pipeline(unet(), text_encoder())
    for name, one in (("u", model), ("t", text)):
        export_lora(one, tmp_path / name, format="diffusers")
        fresh.load_lora_weights(tmp_path / name, adapter_name=name)
    fresh.set_adapters(["u", "t"])
    assert (images(fresh) - expected).abs().max() < IMAGES


def test_ranks_differ(tmp_path, image):
    model = unet()
    seeded(lambda: model.add_adapter(config(targets=UNET_TARGETS), "a"), 1)
    seeded(lambda: model.add_adapter(config(targets=["conv_in", "down_blocks.0.resnets.0.conv1"], r=6), "b"), 2)
    model.set_adapter(["a", "b"])
    written = export_lora(model, tmp_path, format="diffusers")
    assert written.r == 10 and written.rank_pattern["conv_in"] == 6
    fresh = unet()
    fresh.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    assert relative(fresh(*image).sample, model(*image).sample) < FLOAT32


def test_a_wrapped_unet_and_a_scale(tmp_path, image):
    model = seeded(lambda: get_peft_model(unet(), config(targets=UNET_TARGETS)), 1).eval()
    at_scale(model, 0.5)
    export_lora(model, tmp_path, format="diffusers")
    fresh = unet()
    fresh.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    assert relative(fresh(*image).sample, model(*image).sample) < FLOAT32


def test_transformer(tmp_path):
    diffusers = pytest.importorskip("diffusers")

    def transformer():
        return seeded(
            lambda: diffusers.SD3Transformer2DModel(
                sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2,
                joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4,
            )
        ).eval()  # fmt: skip

    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([3]),
    }
    model = transformer()
    seeded(lambda: model.add_adapter(config(targets=["to_q", "to_k", "proj", "proj_out"])), 1)
    export_lora(model, tmp_path, format="diffusers")
    fresh = transformer()
    fresh.load_lora_adapter(tmp_path, prefix="transformer", use_safetensors=True)
    assert relative(fresh(**inputs).sample, model(**inputs).sample) < FLOAT32


def test_the_format_of_peft_from_models_with_adapters(tmp_path, image):
    model = unet()
    seeded(lambda: model.add_adapter(config(targets=UNET_TARGETS, modules_to_save=["conv_out"]), "a"), 1)
    with torch.no_grad():
        model.conv_out.modules_to_save["a"].weight.add_(1)
    export_lora(model, tmp_path / "peft")
    fresh = PeftModel.from_pretrained(unet(), tmp_path / "peft").eval()
    assert relative(fresh(*image).sample, model(*image).sample) < FLOAT32
    with pytest.raises(ValueError, match=r"no room for conv_out.*modules_to_save.*format='peft'"):
        export_lora(model, tmp_path / "diffusers", format="diffusers")
    text = text_encoder()
    seeded(lambda: text.add_adapter(config(targets=["q_proj", "token_embedding"]), "a"))
    with pytest.raises(ValueError, match=r"no room for .*token_embedding.lora_embedding_A"):
        export_lora(text, tmp_path / "diffusers", format="diffusers")
    assert not (tmp_path / "diffusers").exists()


def test_what_cannot_be_exported(tmp_path):
    net = adapt(seeded(Net))
    with pytest.raises(ValueError, match="what Diffusers calls a Net is not known"):
        export_lora(net, tmp_path, format="diffusers")
    with pytest.raises(ValueError, match="format must be 'peft' or 'diffusers', got 'kohya'"):
        export_lora(net, tmp_path, format="kohya")
    with pytest.raises(TypeError, match=r"or a model with adapters \(add_adapter\), got Net"):
        export_lora(seeded(Net), tmp_path)
    assert not list(tmp_path.iterdir())
