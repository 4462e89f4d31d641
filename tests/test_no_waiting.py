"""A training step on a GPU that is not there: nothing in it makes the host wait for the device.

PyTorch's fake tensors have shapes and devices but no numbers. On them whatever needs a number (`item`, `nonzero`, a
mask as an index) is an error, and a copy between host and device can be seen. Not tried is what waits by its nature:
the teacher's NMS and the choice of its detections that overlap a box (teacher.overlapping).
"""
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import teacher as teacher_module
import train
from data import Batch
from tools.log import Log
from model import Detections, build_model, constant
from recipe import make_plan
from teacher import make_teacher

GPU = torch.device("cuda", 0)
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")  # so autocast is off


class Copies(TorchDispatchMode):
    """Notes each operation that has both a tensor of the host and one of the device.

    A single number of the host goes along as an argument of the kernel, except where it is copied."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        if len({x.device.type for x in tensors if x.dim() or "copy" in str(operation)}) > 1:
            self.seen.append(str(operation))
        return result


def to_gpu(network: nn.Module) -> None:
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    fake = torch.empty(x.shape, dtype=x.dtype, device=GPU)
                    tensors[name] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake


def a_batch(masks: bool) -> Batch:
    def photos():
        return torch.empty(2, 3, 64, 96, dtype=torch.uint8, device=GPU)

    sizes = [(64, 96), (60, 90)]
    return Batch(images=photos(), sizes=sizes, original_sizes=sizes, image_ids=[1, 2],
                 boxes=[torch.empty(n, 4, device=GPU) for n in (3, 0)],
                 labels=[torch.empty(n, dtype=torch.int64, device=GPU) for n in (3, 0)], augmented=photos(),
                 teacher_images=photos(), teacher_sizes=sizes, skipped=[],
                 masks=[torch.empty(n, 16, 24, dtype=torch.bool, device=GPU) for n in (3, 0)] if masks else None)


def some_found(found, boxes, *_):
    def numbers(*shape, **how):
        return torch.empty(*shape, device=GPU, **how)

    found = Detections(numbers(5, 4), numbers(5), numbers(5, dtype=torch.int64), numbers(5, dtype=torch.int64))
    return found, numbers(5, len(boxes))


@pytest.fixture(params=["boxteacher", "boxinst", "condinst"])
def a_run(request, monkeypatch, tmp_path):
    """-> a function that does a step of a run on the GPU that is not there, and says what was copied."""
    def backward(loss):
        for p in run.parameters:
            p.grad = torch.empty_like(p)

    monkeypatch.setattr(teacher_module, "detect", lambda *_: None)
    monkeypatch.setattr(teacher_module, "overlapping", some_found)
    monkeypatch.setattr(torch.Tensor, "backward", backward)  # autograd's threads want a device
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: None)  # one kernel, of which there is no fake
    student = build_model("r18", 3, channels=32).train()
    teacher = make_teacher(student)
    args = SimpleNamespace(method=request.param, score="mask-aware", pixel_loss="dice", lambda_pixel=0.5,
                           lambda_affinity=0.1, clip_grad=10.0, ema=0.999)
    run = SimpleNamespace(args=args, plan=make_plan(2, iters=100), student=student, model=student, teacher=teacher,
                          world_size=1, device=GPU, scaler=torch.amp.GradScaler("cuda", enabled=False),
                          autocast=lambda: torch.autocast("cuda", torch.bfloat16))
    constant.cache_clear()
    log = Log(tmp_path, 100, iteration=0)
    with FakeTensorMode(allow_non_fake_inputs=False):
        to_gpu(student)
        to_gpu(teacher)
        run.parameters = [p for p in student.parameters() if p.requires_grad]
        run.statistics = [x for module in student.modules() if isinstance(module, nn.BatchNorm2d)
                          for x in module.buffers()]
        run.optimizer = torch.optim.SGD(run.parameters, 0.1, momentum=0.9, fused=True)

        def step() -> list[str]:
            batches = [a_batch(masks=True) for _ in range(2)]  # of the annotations: measured, or learnt by condinst
            with Copies() as copies:
                result = train.train_step(run, batches, 5, False)
                log.step(result.losses, result.counts, result.skipped, 0.0)
            assert result.skipped.device == GPU and result.losses["loss"].device == GPU
            return copies.seen

        yield step
    constant.cache_clear()


def test_a_step_makes_the_host_wait_for_nothing(a_run):
    first = a_run()  # tables of numbers go to the device once
    assert 0 < len(first) < 10 and set(first) == {"aten._to_copy.default"}
    assert a_run() == []


@pytest.mark.parametrize("wait", [lambda x: x.item(), lambda x: x.nonzero(), lambda x: torch.ones_like(x)[x > 0],
                                  lambda x: bool(x.sum() > 0)])
def test_what_would_make_it_wait_is_seen(a_run, monkeypatch, wait):
    losses = train.compute_losses

    def waiting(*args):
        wait(torch.empty(1, device=GPU))
        return losses(*args)

    monkeypatch.setattr(train, "compute_losses", waiting)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        a_run()


def test_a_copy_is_seen(a_run, monkeypatch):
    losses = train.compute_losses
    a_run()
    monkeypatch.setattr(train, "compute_losses", lambda *args: (torch.empty(1).to(GPU), losses(*args))[1])
    assert a_run() == ["aten._to_copy.default"] * 2
