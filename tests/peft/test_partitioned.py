"""Parameters that are elsewhere, or in parts, between forwards; in one process (`test_distributed.py` has several)."""

import json
import struct

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict

import hra_kernels.peft
from hra_kernels.regularizer import model_orthogonality_penalty
from tests.peft.models import Net, adapt, config, images, seeded


def partition(model):
    """Leave every parameter with shape (0,) but in the forwards of the model's layers."""

    def gather(module, args):
        for p in module.parameters():
            p.data = p.whole

    def release(module, args, output):
        for p in module.parameters():
            p.data = torch.empty(0)

    for p in model.parameters():
        p.whole = p.data
    for module in model.base_model.model.children():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module, None, None)


@pytest.fixture
def partitioned():
    model = adapt(seeded(Net))
    partition(model)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_forward_after_an_optimizer_step(partitioned):
    """After a step the factors of all layers are computed together, where the first layer's are not there yet."""
    exact = adapt(seeded(Net))
    for model in (exact, partitioned):
        torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert torch.equal(partitioned(images()), exact(images()))


def test_parts_are_not_saved(partitioned, tmp_path):
    found = pytest.raises(ValueError, match=r"adapter 'default': .*conv.hra_u.default must be whole, got .*\(0,\)")
    with hra_kernels.peft.enabled(), found:
        partitioned.save_pretrained(tmp_path)


def test_parts_are_not_merged(partitioned):
    with pytest.raises(NotImplementedError, match=r"'conv'.* its base weight is partitioned"):
        partitioned.merge_adapter()


def test_parts_are_not_exported(partitioned, tmp_path):
    with pytest.raises(RuntimeError, match=r"layer 'conv'.*: hra_u must be whole, got .*\(0,\)"):
        hra_kernels.peft.export_lora(partitioned, tmp_path)


def test_penalty_of_parts(partitioned):
    with pytest.raises(RuntimeError, match=r"conv.hra_u.default must be whole, got .*\(0,\)"):
        model_orthogonality_penalty(partitioned)


def test_penalty_of_freed_memory():
    """As FSDP1 without use_orig_params leaves it: the shape is there, the values are not."""
    model = adapt(seeded(Net))
    layer = model.base_model.model.lin0
    freed = layer.hra_u["default"].detach().clone()
    del layer.hra_u._parameters["default"]
    object.__setattr__(layer.hra_u, "default", freed)
    assert model_orthogonality_penalty(model).isfinite()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"lin0.hra_u.default must be whole"):
        model_orthogonality_penalty(model)


def unaligned_file(path, tensors):
    """A safetensors file whose data start at an odd address, as the format allows."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        end = len(data) + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), end]}
        data += tensor.numpy().tobytes()
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)  # odd
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_files_with_unaligned_tensors(tmp_path, low_cpu_mem_usage):
    model = adapt(seeded(Net))
    model.save_pretrained(tmp_path)
    unaligned_file(tmp_path / "adapter_model.safetensors", get_peft_model_state_dict(model))
    with hra_kernels.peft.enabled():
        settings = {"low_cpu_mem_usage": low_cpu_mem_usage, "is_trainable": True}
        loaded = PeftModel.from_pretrained(seeded(Net), tmp_path, **settings)
    outputs = [one(images()) for one in (loaded, model)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.square().sum().backward()
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(trained(loaded), trained(model), strict=True))


def offloaded(how, folder):
    model = seeded(Net)
    if how == "cpu":
        cpu_offload(model, torch.device("cpu"))
    elif how == "disk":
        disk_offload(model, folder, execution_device=torch.device("cpu"))
    else:
        places = {"conv": "cpu", "lin0": "disk", "lin1": "disk"}
        dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    return model


@pytest.mark.parametrize("how", ["cpu", "disk", "map"])
def test_adapting_an_offloaded_model(how, tmp_path):
    """Its weights are on no device, and the new vectors on the one where the layer runs."""
    exact = adapt(seeded(Net))
    with hra_kernels.peft.enabled():
        model = seeded(lambda: get_peft_model(offloaded(how, tmp_path), config()), 1)
    assert torch.equal(model(images()), exact(images()))
    for one in (model, exact):
        one(images()).square().sum().backward()
        seeded(lambda one=one: one.add_adapter("b", config(r=2)), 3)
        one.set_adapter("b")
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None) and (one.grad is None or torch.equal(one.grad, other.grad))
    assert torch.equal(model(images()), exact(images()))
    model.save_pretrained(tmp_path / "adapter")
    with hra_kernels.peft.enabled():
        loaded = PeftModel.from_pretrained(seeded(Net), tmp_path / "adapter" / "b")
    assert torch.equal(loaded(images()), exact(images()))


def test_parameters_of_an_offloaded_model(tmp_path):
    """`target_parameters`, whose wrappers place their vectors themselves."""
    settings = {"target_modules": set(), "target_parameters": ["lin0.weight"]}
    with hra_kernels.peft.enabled():
        wanted = hra_kernels.peft.HRAConfig(r=4, init_weights=False, **settings)
        model = seeded(lambda: get_peft_model(offloaded("disk", tmp_path), wanted), 1)
    assert all(p.device.type == "cpu" for p in model.parameters() if p.requires_grad)
