"""Graphs that leave PyTorch, or this process: ONNX from both exporters, and `torch.export`."""

import io

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from hra_kernels.nn import HRAConv2d, HRALinear
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import Net, adapt, config, images, seeded, set_u

LAYERS = rounding(96, 6, layers=3)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embedding(x))


def peft_net(**settings):
    return adapt(seeded(Net), **settings)


def with_zero_columns(**settings):
    model = peft_net(**settings)
    for name in ("conv", "lin0"):
        layer = model.base_model.model.get_submodule(name)
        u = layer.hra_u["default"].detach().clone()
        u[:, 1], u[:, 2] = 0, 1e-30 * u[:, 2]
        set_u(layer, u)
    return model


def two_adapters():
    model = peft_net()
    model.add_adapter("b", config(r=2, apply_GS=True))
    model.base_model.set_adapter(["default", "b"])
    return model


MODELS = {
    "peft": (peft_net, images),
    "peft-initial": (lambda: peft_net(init_weights=True), images),
    "peft-gram-schmidt": (lambda: peft_net(apply_GS=True), images),
    "peft-odd": (lambda: peft_net(r=5), images),
    "peft-zero-columns": (with_zero_columns, images),
    "peft-zero-columns-gram-schmidt": (lambda: with_zero_columns(apply_GS=True), images),
    "peft-two-adapters": (two_adapters, images),
    "peft-embedding": (
        lambda: adapt(seeded(Words), targets=["embedding", "linear"]),
        lambda: seeded(lambda: torch.randint(0, 11, (5, 3))),
    ),
    "nn-linear": (
        lambda: seeded(lambda: HRALinear(nn.Linear(48, 7), init_weights=False)),
        lambda: torch.linspace(-2, 1, 5 * 48).reshape(5, 48),
    ),
    "nn-conv": (
        lambda: seeded(lambda: HRAConv2d(nn.Conv2d(3, 7, 3, padding=1, padding_mode="reflect"), r=3, apply_gs=True)),
        images,
    ),
}


def onnx_output(exported: bytes, x: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def to_onnx(model: nn.Module, x: Tensor, dynamo: bool, dynamic: bool) -> bytes:
    """The file that a plain `torch.onnx.export` writes, with the batch open where `dynamic`."""
    pytest.importorskip("onnxscript" if dynamo else "onnx", reason="onnx and onnxscript are not installed")
    options = {}
    if dynamic and dynamo:
        batch = ({0: torch.export.Dim("batch", min=2)},)
        options["dynamic_shapes"] = (batch,) if isinstance(model, PeftModel) else batch  # PeftModel takes *args
    elif dynamic:
        options["dynamic_axes"] = {"x": {0: "batch"}}
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (x,), dynamo=True, verbose=False, **options).save(file)
    else:
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], **options)
    return file.getvalue()


EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
QUICK = ("peft-zero-columns",)


@pytest.mark.filterwarnings("ignore")  # deprecations of the exporters' own
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param(name, dynamic, marks=[] if name in QUICK and dynamic else pytest.mark.slow)
        for name in MODELS
        for dynamic in (False, True)
    ],
)
@EXPORTERS
def test_onnx(name, dynamo, dynamic):
    make, inputs = MODELS[name]
    model, x = make().eval(), inputs()
    exported = to_onnx(model, x, dynamo, dynamic)
    if dynamic:
        x = torch.cat([x, x])[:7]
    with torch.no_grad():
        expected = model(x)
    assert relative(onnx_output(exported, x), expected) < LAYERS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@EXPORTERS
def test_onnx_of_half_precision(dynamo):
    """float16 layers reflect in float32 and round once, in the graph too."""
    model = HRALinear(seeded(lambda: nn.Linear(48, 7)).half(), r=4, init_weights=False).eval()
    x = seeded(lambda: torch.randn(5, 48)).half()
    with torch.no_grad():
        expected = model(x)
    got = onnx_output(to_onnx(model, x, dynamo, dynamic=False), x)
    assert got.dtype == torch.float16 and relative(got, expected) < rounding(48, 4, torch.float16)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_an_exported_program():
    """What `torch.export` gives holds our operators; the exporter to ONNX takes that, too."""
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
    model, x, file = peft_net().eval(), images(), io.BytesIO()
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,), strict=False)
    torch.onnx.export(program, dynamo=True, verbose=False).save(file)
    assert relative(onnx_output(file.getvalue(), x), expected) < LAYERS


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export(strict):
    """The graph has our operators, whichever way it is traced, and does what the model does."""
    model, x = peft_net().eval(), images()
    # strict, PyTorch 2.6 has no dynamic shapes in an autograd.Function
    batch = None if strict else ({0: torch.export.Dim("batch", min=2)},)
    with torch.no_grad():
        program = torch.export.export(model.get_base_model(), (x,), strict=strict, dynamic_shapes=batch)
        x = x if strict else images(7)
        expected = model(x)
    operators = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("hra.")}
    assert operators == {"hra.wy_factor_fwd.default", "hra.reflect_dx.default"}
    assert torch.equal(program.module()(x), expected)
