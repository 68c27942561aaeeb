"""What each process of `test_distributed.py` runs: every check below, one JSON line per check.

    python -m tests.peft.distributed_worker RANK WORLD STORE

A check compares the ranks' results with the same computation in one piece. The processes leave by `os._exit`: tearing a
gloo group down can wait for ever on its own threads.
"""

import copy
import datetime
import json
import os
import sys
import traceback

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hra_kernels.peft
from hra_kernels.peft.model import _LAYERS_TAKE_CONFIG
from hra_kernels.regularizer import model_orthogonality_penalty
from hra_kernels.testing.tolerance import relative, rounding
from tests.peft.models import Net, adapt, config, seeded

FLOAT32 = rounding(32, 7, layers=3)


def normal(*shape, seed=3):
    return seeded(lambda: torch.randn(shape), seed)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def adapted(model, targets=("0",)):
    """Two active adapters; the same on every rank and in one piece."""
    model = adapt(model, targets=targets)
    seeded(lambda: model.add_adapter("b", config(targets=targets, r=3, apply_GS=True)), 7)
    model.base_model.set_adapter(["default", "b"])
    return model


def results(model, x, dy):
    """y, dx and the gradient of every vector."""
    x = x.detach().requires_grad_()
    y = whole(model(x))
    return [y.detach(), *map(whole, torch.autograd.grad(y, [x, *vectors(model)], dy))]


def vectors(model):
    return [p for p in model.parameters() if p.requires_grad]


def check_trained(model, x, dy, exact):
    """The `results` of a model whose gradients land, maybe in shards, in its vectors."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    got = [y, x.grad, *(whole(u.grad) for u in vectors(model))]
    errors = [relative(one, other) for one, other in zip(got, exact, strict=True)]
    assert max(errors) < FLOAT32, errors


def check_layer(mesh: DeviceMesh, plan, place, part=lambda x: x, shape=(4, 6, 24)):
    """One layer, parallelized before it is adapted.

    place: makes of the whole x what this rank hands over; part: the same of dx, unless it is a DTensor.
    """
    base = nn.Sequential(seeded(lambda: nn.Linear(24, 12)))
    x, dy = normal(*shape), normal(*shape[:-1], 12, seed=5)
    exact = results(adapted(base), x, dy)
    sharded = copy.deepcopy(base)
    distribute_module(sharded[0], mesh) if plan is None else parallelize_module(sharded, mesh, {"0": plan})
    model = adapted(sharded)
    assert isinstance(model.base_model.model[0].base_layer.weight, DTensor)
    got = results(model, place(x), dy)
    exact[1] = part(exact[1])
    errors = [relative(one, other) for one, other in zip(got, exact, strict=True)]
    assert max(errors) < FLOAT32, errors


def column_wise(mesh):
    check_layer(mesh, ColwiseParallel(output_layouts=Replicate()), lambda x: x)


def column_wise_after_sequence_parallel(mesh):
    """Each rank holds part of the sequence; the gradient of hra_u is that of all of it."""
    part = lambda x: x.chunk(mesh.size(), 1)[mesh.get_local_rank()]  # noqa: E731
    check_layer(mesh, ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()), part, part)


def row_wise(mesh):
    """Each rank holds part of the features, as after a column-wise layer."""
    part = lambda x: x.chunk(mesh.size(), -1)[mesh.get_local_rank()]  # noqa: E731
    check_layer(mesh, RowwiseParallel(), part, part)


def row_wise_one_sample(mesh):
    part = lambda x: x.chunk(mesh.size(), -1)[mesh.get_local_rank()]  # noqa: E731
    check_layer(mesh, RowwiseParallel(), part, part, shape=(24,))


def row_wise_from_dtensor(mesh):
    check_layer(mesh, RowwiseParallel(), lambda x: distribute_tensor(x, mesh, [Shard(-1)]))


def row_wise_from_replicated(mesh):
    check_layer(mesh, RowwiseParallel(input_layouts=Replicate()), lambda x: x)


def replicated_layer_from_sharded_batch(mesh):
    check_layer(mesh, None, lambda x: distribute_tensor(x, mesh, [Shard(0)]))


def training(mesh):
    """A column-wise and a row-wise layer, three steps; the vectors stay equal on all ranks."""
    base = seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Linear(16, 4)))
    sharded = parallelize_module(
        copy.deepcopy(base),
        mesh,
        {"0": ColwiseParallel(), "2": RowwiseParallel(), "3": ColwiseParallel(output_layouts=Replicate())},
    )
    models = [adapted(base, ("0", "2", "3")), adapted(sharded, ("0", "2", "3"))]
    optimizers = [torch.optim.AdamW(vectors(m), lr=0.05) for m in models]
    x, target = normal(8, 16), normal(8, 4, seed=5)
    for _ in range(3):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = (model(x) - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert relative(losses[1], losses[0]) < FLOAT32, losses
    one, own = (torch.cat([u.detach().flatten() for u in vectors(m)]) for m in models)
    # Adam divides each entry of a gradient by its own size, a tenth of the largest or less
    assert relative(own, one) < 10 * FLOAT32
    others = [torch.empty_like(own) for _ in range(mesh.size())]
    dist.all_gather(others, own)
    assert all(torch.equal(other, own) for other in others)


def in_16_bits(mesh):
    base = nn.Sequential(seeded(lambda: nn.Linear(24, 12))).bfloat16()
    x = normal(4, 6, 24).bfloat16()
    exact = adapted(base)(x)
    for plan in (RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())):
        y = adapted(parallelize_module(copy.deepcopy(base), mesh, {"0": plan}))(x)
        assert y.dtype == torch.bfloat16 and relative(y, exact) < rounding(24, 7, torch.bfloat16)


def refused(mesh):
    base = nn.Sequential(seeded(lambda: nn.Linear(24, 12)))
    model = adapted(parallelize_module(base, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})).eval()
    with pytest.raises(NotImplementedError, match=r"adapter_names.*sharded"):
        model(normal(4, 24), adapter_names=["b", "default", "b", "__base__"])


def merging(model, x, exact):
    """Merge and unmerge of a sharded model, while it is gathered for a forward too; the shards' bits come back."""
    before = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    for safe_merge in (False, True):
        with torch.no_grad():
            model.merge_adapter(safe_merge=safe_merge)
            assert relative(whole(model(x)), exact) < FLOAT32
            for layer in ("0", "lin0"):
                base = getattr(model.base_model.model, layer, None)
                if base is not None and isinstance(base.base_layer.weight, DTensor):
                    assert relative(whole(base.base_layer.weight), whole(before_name(before, layer))) > 1e-2
            model.unmerge_adapter()
            after = {name: whole(p) for name, p in model.named_parameters()}
            assert all(torch.equal(after[name], before[name]) for name in before)
            assert relative(whole(model(x)), exact) < FLOAT32


def before_name(before, layer):
    return next(p for name, p in before.items() if name.endswith(f"{layer}.base_layer.weight"))


def fsdp2(mesh):
    """Forward, backward, merge and unmerge, with the layers in groups of their own and without."""
    base = seeded(Net)
    x, dy = normal(4, 3, 8, 8), normal(4, 5)
    exact = results(adapt(base), x, dy)
    for wrapped in ((), ("lin0", "conv")):
        model = adapt(base)
        for name in wrapped:
            fully_shard(getattr(model.base_model.model, name), mesh=mesh)
        fully_shard(model, mesh=mesh)
        check_trained(model, x, dy, exact)
        with torch.no_grad():
            model(x)  # leaves the root's weights gathered
        merging(model, x, exact[0])
        assert relative(model(x), exact[0]) < FLOAT32


def fsdp2_disable_while_merged(mesh):
    """Disabling unmerges inside a forward, where FSDP2's shards cannot be reached."""
    model = adapt(seeded(Net))
    fully_shard(model, mesh=mesh)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"call unmerge_adapter\(\) on the model"), model.disable_adapter():
        model(normal(4, 3, 8, 8))


def fsdp2_non_finite_vectors(mesh):
    """All ranks refuse alike, though one shard alone holds the NaN, and nothing has changed."""
    model = adapt(seeded(Net))
    with torch.no_grad():
        model.base_model.model.lin1.hra_u["default"][-1, 0] = float("nan")
    fully_shard(model, mesh=mesh)
    before = [whole(p).detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="'lin1'"):
        model.merge_adapter()
    after = [whole(p) for p in model.parameters()]
    assert all(torch.equal(one.nan_to_num(7), other.nan_to_num(7)) for one, other in zip(after, before, strict=True))


def fsdp2_penalty(mesh):
    """The regularizer reads vectors that are sharded (lin0) and, after a forward, gathered (the root's)."""
    exact = adapt(seeded(Net))
    model = adapt(seeded(Net))
    fully_shard(model.base_model.model.lin0, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = normal(4, 3, 8, 8)
    for one in (model, exact):
        penalty = model_orthogonality_penalty(one)
        assert relative(penalty, model_orthogonality_penalty(exact)) < FLOAT32
        (one(x).square().sum() + model_orthogonality_penalty(one)).backward()
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert other.grad is None or relative(whole(one.grad), other.grad) < FLOAT32


def output_side(mesh):
    """FSDP2 gathers what is reflected on the output side too; a sharded weight's output is refused."""
    if not _LAYERS_TAKE_CONFIG:
        return
    settings = {"side": "output", "eps": 1e-4}
    base, targets = seeded(Net), ["lin0", "lin1"]

    def build():
        with hra_kernels.peft.enabled():
            soft = hra_kernels.peft.HRAConfig(r=4, init_weights=False, target_modules=targets, **settings)
            return seeded(lambda: get_peft_model(copy.deepcopy(base), soft), 1)

    x, dy = normal(4, 3, 8, 8), normal(4, 5)
    exact, model = results(build(), x, dy), build()
    fully_shard(model, mesh=mesh)
    check_trained(model, x, dy, exact)
    merging(model, x, exact[0])
    assert relative(model_orthogonality_penalty(model), model_orthogonality_penalty(build())) < FLOAT32
    parallelize_module(base, mesh, {"lin1": ColwiseParallel(output_layouts=Replicate())})
    with pytest.raises(NotImplementedError, match=r"sharded.*side='output'"):
        build()(x)


def fsdp1(mesh):
    """Training, saving whole and loading, with a layer in a unit of its own; what needs whole vectors says so."""
    x, names = normal(4, 3, 8, 8), []
    exact, inner = adapt(seeded(Net)), adapt(seeded(Net))
    inner.base_model.model.lin0 = FSDP(inner.base_model.model.lin0, use_orig_params=True, device_id=torch.device("cpu"))
    model = FSDP(inner, use_orig_params=True, device_id=torch.device("cpu"))
    optimizers = [torch.optim.SGD(vectors(m), 0.1) for m in (model, exact)]
    for _ in range(2):
        for one, optimizer in zip((model, exact), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()
    wanted = get_peft_model_state_dict(exact)
    with hra_kernels.peft.enabled(), FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        saved = get_peft_model_state_dict(inner, state_dict=model.state_dict())
        assert saved.keys() == wanted.keys()
        assert all(relative(saved[name], wanted[name]) < FLOAT32 for name in wanted)
        other = {name: normal(*u.shape, seed=9) for name, u in wanted.items()}
    with hra_kernels.peft.enabled(), FSDP.summon_full_params(model):
        for one in (inner, exact):
            names.append(set_peft_model_state_dict(one, {name: u.clone() for name, u in other.items()}).unexpected_keys)
    with torch.no_grad():
        assert names == [[], []] and relative(model(x), exact(x)) < FLOAT32, names
    with pytest.raises(NotImplementedError, match=r"its base weight is partitioned.*FSDP1"):
        inner.merge_adapter()
    with pytest.raises(RuntimeError, match=r"must be whole.*FSDP1"):
        model_orthogonality_penalty(inner)
    with FSDP.summon_full_params(model):
        assert relative(model_orthogonality_penalty(inner), model_orthogonality_penalty(exact)) < FLOAT32


def ddp(mesh):
    """Each rank has a part of the batch; the gradient is the ranks' mean."""
    exact, model = adapt(seeded(Net)), adapt(seeded(Net))
    x, dy = normal(4, 3, 8, 8), normal(4, 5)
    part = lambda batch: batch.chunk(mesh.size())[mesh.get_local_rank()]  # noqa: E731
    parallel = DistributedDataParallel(model)
    parallel(part(x)).backward(part(dy))
    wanted = torch.autograd.grad(exact(x), vectors(exact), dy)
    assert all(relative(mesh.size() * u.grad, w) < FLOAT32 for u, w in zip(vectors(model), wanted, strict=True))


def tensor_parallel_merge(mesh):
    base = nn.Sequential(seeded(lambda: nn.Linear(24, 13)))
    x = normal(4, 24)
    exact = adapted(base)(x).detach()
    for plan in (RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())):
        merging(adapted(parallelize_module(copy.deepcopy(base), mesh, {"0": plan})), x, exact)


CHECKS = [
    column_wise, column_wise_after_sequence_parallel, row_wise, row_wise_one_sample, row_wise_from_dtensor,
    row_wise_from_replicated, replicated_layer_from_sharded_batch, training, in_16_bits, refused,
    tensor_parallel_merge, ddp, fsdp2, fsdp2_disable_while_merged, fsdp2_non_finite_vectors, fsdp2_penalty, fsdp1,
    output_side,
]  # fmt: skip


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=patience)
    mesh = init_device_mesh("cpu", (world,))
    for check in CHECKS:
        try:
            check(mesh)
            why = ""
        except BaseException:  # pytest's failures are no Exception
            why = traceback.format_exc()
        print(json.dumps([check.__name__, why]), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
