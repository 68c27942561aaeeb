"""PEFT's layers on these kernels under everything that PyTorch does to modules."""

import copy
import functools
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import CheckpointError, checkpoint

from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import Net, adapt, config, images, layer_of, layers_of, seeded

FLOAT32 = rounding(96, 6, layers=3)


COMPILES_PEFT = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"),
    reason="PyTorch 2.6 compiles no context manager made of a generator, and PeftModel.forward is in one",
)


@pytest.fixture
def model():
    return adapt(seeded(Net))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model, how):
    x = images()
    expected = model(x)  # fills the factor cache
    other = how(model)
    assert torch.equal(other(x), expected)
    with torch.no_grad():
        for p in trainable(other).values():
            p.add_(0.1 * torch.randn_like(p))
    assert torch.equal(model(x), expected) and not torch.equal(other(x), expected)


def test_state_dict_has_only_the_vectors(model):
    model(images())
    keys = [key for key in model.state_dict() if "base_layer" not in key]
    assert keys == [f"base_model.model.{name}.hra_u.default" for name in ("conv", "lin0", "lin1")]


@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (2, 3, 4, 48)])
def test_inputs_of_one_to_four_dimensions(shape):
    layer = layer_of(nn.Linear(48, 7))
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 7)
    y.backward(torch.ones_like(y))
    flat = x.detach().reshape(-1, 48).requires_grad_()
    flat_y = layer(flat)
    flat_y.backward(torch.ones_like(flat_y))
    assert relative(y, flat_y.reshape(y.shape)) < FLOAT32 and relative(x.grad, flat.grad.reshape(shape)) < FLOAT32


@pytest.mark.parametrize("shape", [(0, 48), (3, 0, 48)])
def test_empty_batches(shape):
    layer = layer_of(nn.Linear(48, 7))
    x = torch.randn(shape, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == shape and not layer.hra_u["default"].grad.any()
    conv = layer_of(nn.Conv2d(3, 4, 3))
    assert conv(torch.randn(0, 3, 8, 8)).shape == (0, 4, 6, 6)


def test_jit_trace(model):
    model.eval()
    x = images()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; PEFT users still trace
        traced = torch.jit.trace(model, (x,))
    more = images(7)
    assert relative(traced(more), model(more)) < FLOAT32


def compile_parity(model, make_input, batches, dynamic):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    parameters = list(trainable(model).values())
    for batch in batches:
        x = make_input(batch)
        got, expected = compiled(x), model(x)
        dy = torch.randn_like(expected)
        assert relative(got, expected) < FLOAT32
        grads = torch.autograd.grad(got, parameters, dy), torch.autograd.grad(expected, parameters, dy)
        assert all(relative(one, other) < FLOAT32 for one, other in zip(*grads, strict=True))
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@COMPILES_PEFT
def test_compile_fullgraph_with_dynamic_batch():
    """One graph for all batch sizes (a convolution's own CPU kernels make PyTorch compile for sizes, so none here)."""
    model = adapt(nn.Sequential(nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 5)), targets=["0", "2"])
    assert compile_parity(model, lambda batch: torch.randn(batch, 48), (4, 7, 16), dynamic=True) == 1


@COMPILES_PEFT
def test_compile_convolution(model):
    compile_parity(model, images, (4,), dynamic=False)


@COMPILES_PEFT
@pytest.mark.slow
def test_compile_several_adapters(model):
    model.add_adapter("b", config(r=2))
    model.base_model.set_adapter(["default", "b"])
    compile_parity(model, images, (4,), dynamic=False)


@COMPILES_PEFT
@pytest.mark.slow
def test_compiled_graph_without_factors_follows_the_adapters(model):
    """Its linear layers keep their factors outside (tests/operators/test_kept_chain.py)."""
    torch._dynamo.reset()
    model.add_adapter("b", config())
    compiled = torch.compile(model, backend="aot_eager")
    layers = layers_of(model)
    new = {name: torch.randn_like(u) for name, u in model.state_dict().items() if ".hra_u." in name}
    seen = []
    for change in (
        lambda: None,
        lambda: model.set_adapter("b"),
        lambda: model.load_state_dict(new, strict=False),
        lambda: model.base_model.set_adapter(["default", "b"]),
        lambda: model.set_adapter("default"),
        lambda: [layer.set_scale("default", 0.5) for layer in layers],
        lambda: [layer.set_scale("default", 1) for layer in layers],
        lambda: model.merge_adapter(["default"]),
        lambda: model.unmerge_adapter(),
        lambda: model.set_adapter("b"),
    ):
        change()
        with torch.no_grad():
            seen.append(compiled(images()))
            assert relative(seen[-1], model(images())) < FLOAT32
    assert relative(seen[-1], seen[1]) > 1000 * FLOAT32, "b has been loaded anew"


@COMPILES_PEFT
@pytest.mark.slow
def test_compile_inductor(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert relative(compiled(images()), model(images())) < FLOAT32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(model, use_reentrant):
    x = images().requires_grad_()
    dy = torch.randn(4, 5)
    inputs = [x, *trainable(model).values()]
    expected = torch.autograd.grad(model(x), inputs, dy)
    checkpoint(model, x, use_reentrant=use_reentrant).backward(dy)
    assert all(torch.equal(one.grad, other) for one, other in zip(inputs, expected, strict=True))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("first, second", [("default", "b"), (["default", "b"], ["b", "default"])])
def test_other_adapters_between_a_forward_and_its_recomputation(trainable, first, second):
    """Their vectors have the same shapes; PyTorch's own comparison must tell them apart."""
    model = adapt(seeded(Net))
    model.add_adapter("b", config())
    x = torch.randn(2, 3, 8, 8, requires_grad=True)

    def forward(names):
        model.base_model.set_adapter(names, inference_mode=not trainable)
        return checkpoint(model, x, use_reentrant=False)

    y = forward(first)
    forward(second).sum().backward()
    with pytest.raises(CheckpointError, match="different metadata"):
        y.sum().backward()
    forward(first).sum().backward()


def test_autograd_hooks_offload_saved_tensors(model):
    """Saved tensors pass through saved_tensors_hooks: CPU offloading of activations sees all of them."""
    x, dy = images(), torch.randn(4, 5)
    expected = torch.autograd.grad(model(x), list(trainable(model).values()), dy)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    assert all(
        torch.equal(one, other)
        for one, other in zip(torch.autograd.grad(y, list(trainable(model).values()), dy), expected, strict=True)
    )


def test_double_use_in_one_graph():
    """The same layer twice in a graph, and two backward passes through one graph."""
    layer = layer_of(nn.Linear(12, 12))
    x = torch.randn(5, 12)
    y = layer(layer(x)).square().sum()
    first = torch.autograd.grad(y, layer.hra_u["default"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y, layer.hra_u["default"])[0])


def test_torch_func_grad_and_vmap(model):
    """Per-sample gradients, against one backward per sample."""
    model = model.double()
    x, target = images(5, torch.float64), torch.randn(5, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in trainable(model).items()}

    def loss(parameters, x, target):
        return (functional_call(model, parameters, (x[None],)) - target).square().sum()

    got = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)
    for sample in range(5):
        single = (model(x[sample : sample + 1]) - target[sample]).square().sum()
        exact = torch.autograd.grad(single, list(trainable(model).values()))
        for (name, one), other in zip(got.items(), exact, strict=True):
            assert relative(one[sample], other) < rounding(96, 4, torch.float64, layers=3), name


def test_torch_func_vmap_over_inputs(model):
    x = images(6).reshape(2, 3, 3, 8, 8)
    with torch.no_grad():
        assert relative(vmap(model)(x), model(x.flatten(0, 1)).reshape(2, 3, 5)) < FLOAT32


def test_torch_func_jvp(model):
    model = model.double()
    x = images(2, torch.float64)
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def run(parameters):
        return functional_call(model, parameters, (x,))

    value, tangent = jvp(run, (parameters,), (tangents,))
    step = 1e-6
    ahead, behind = (run({k: p + sign * step * tangents[k] for k, p in parameters.items()}) for sign in (1, -1))
    assert relative(value, model(x)) < rounding(96, 4, torch.float64, layers=3)
    assert relative(tangent, (ahead - behind) / (2 * step)) < 1e-6  # a central difference errs by eps / step + step²


def test_inference_mode_then_training(model):
    """A factor computed under inference_mode must not poison a later backward."""
    x = images()
    with torch.inference_mode():
        expected = model(x)
    y = model(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())


def test_threads_share_a_model(model):
    """Inference servers call one model from several threads."""
    xs = [torch.randn(3, 3, 8, 8) for _ in range(24)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
        run = torch.no_grad()(functools.partial(model))
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(run, xs))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
