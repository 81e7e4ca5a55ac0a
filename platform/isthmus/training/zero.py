"""The DeepSpeed engine of a run: its settings written out, nothing left to implicit defaults."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from isthmus.config import RunConfig
from isthmus.contracts import Batch, LossTerms
from isthmus.models.freezing import owned_parameters
from isthmus.training.held import hold_bounds
from isthmus.training.optimizer import adamw

LARGEST_BUCKET = 500_000_000
"""Elements of DeepSpeed's buckets by default. On an accelerator they are allocated whole, and twice where reduction
overlaps the backward pass, however small the model is."""


def bucket_size(trained: int) -> int:
    """Elements of a bucket for a model with so many trained parameters: all of them, up to DeepSpeed's default, and a
    multiple of 256, since DeepSpeed refuses one that does not keep NCCL's alignment."""
    return min(-(-max(trained, 1) // 256) * 256, LARGEST_BUCKET)


def engine_config(run: RunConfig, *, world: int, cuda: bool, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration for ``run`` on ``world`` workers, for a model of so many trained parameters.

    ``gradient_clipping`` is always written, because an omitted one means 1.0. The learning rate and its schedule are
    the training loop's. Parameters, gradients and optimizer state are fp32; bf16 is autocast around the forward pass.
    What is offloaded lies in page-locked memory where there is an accelerator to copy to.

    Args:
        trained: number of trained parameters, in elements.
    """
    zero: dict[str, Any] = {
        "stage": run.zero.stage,
        "overlap_comm": cuda,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket_size(trained),
        "allgather_bucket_size": bucket_size(trained),
    }
    if run.zero.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if run.zero.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if run.zero.offload_parameters == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_micro_batch_size_per_gpu": -(-run.train.global_batch // world),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.train.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untrusted_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own is compiled at the first use; torch's fused AdamW serves
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def resolve_precision(asked: str, *, cuda: bool) -> str:
    """``fp32`` or ``bf16``. ``auto`` takes bf16 where this machine's GPU or CPU computes in it, and not where it would
    be emulated, which is slower than fp32."""
    if asked != "auto":
        return asked
    native = torch.cuda.is_bf16_supported() if cuda else _cpu_computes_bf16()
    return "bf16" if native else "fp32"


def _cpu_computes_bf16() -> bool:
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def build_engine(module: nn.Module, run: RunConfig, device: torch.device, precision: str) -> Any:
    """``module`` wrapped in a DeepSpeed engine over the default process group; ``precision`` is ``fp32`` or ``bf16``.

    The optimizer is torch's own AdamW on CPU and its fused form on GPU: DeepSpeed's operators would be compiled at
    the first use, half a minute or more each. An offloaded optimizer is the fused form too, which steps on the
    processor in one multi-threaded pass over each flat partition.
    """
    deepspeed = load_deepspeed()
    from deepspeed.ops import __compatible_ops__

    cuda = device.type == "cuda"
    if not cuda:
        __compatible_ops__["deepspeed_shm_comm"] = False  # else compiled on the first start; gloo serves as well
    _rebind_forward(module, device.type if precision == "bf16" else None)
    optimizer = adamw(module, run.train, fused=cuda or run.zero.offload_optimizer == "cpu")
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    config = engine_config(run, world=torch.distributed.get_world_size(), cuda=cuda, trained=trained)
    engine, *_ = deepspeed.initialize(
        model=module.to(device), optimizer=optimizer, config=config, dist_init_required=False
    )
    hold_bounds(engine, optimizer, stage=run.zero.stage)
    return engine


def load_deepspeed() -> Any:
    """The deepspeed module, without two things that it brings along and that cost more to import than all the rest.

    Its autotuner imports MLflow if it can and does without if it cannot. Its ZeRO stages import the Muon optimizer, to
    ask whether they were given one, and that compiles three functions when it is imported, for which torch loads its
    compiler. Nothing here tunes or uses Muon.
    """
    if "deepspeed" in sys.modules:
        return sys.modules["deepspeed"]
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # named, so that it is not looked for and warned about
    with _no_mlflow():
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    from deepspeed.runtime import compiler

    compile_, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        with contextlib.suppress(ImportError):  # a DeepSpeed that has no Muon needs none of this
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_
    return deepspeed


@contextlib.contextmanager
def _no_mlflow() -> Iterator[None]:
    """``import mlflow`` raises ImportError inside the block, unless it was imported before."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


def run_forward(engine: Any, batch: Batch) -> LossTerms:
    """The engine's answer to a batch, as the method gave it."""
    total, parts, metrics = engine(batch)
    return LossTerms(total, parts, metrics)


def _rebind_forward(module: nn.Module, autocast: str | None) -> None:
    """Bind a forward to ``module`` itself that DeepSpeed can work with.

    It answers with plain containers: ZeRO 3 hangs its backward hooks on the tensors that it finds in the output, and
    it does not look into a dataclass. Autocast is opened inside, since DeepSpeed switches off what was opened around
    its engine.
    """
    forward = module.forward
    if autocast is not None:
        forward = torch.autocast(autocast, dtype=torch.bfloat16)(forward)

    def plain(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        terms: LossTerms = forward(batch)
        return terms.total, terms.parts, terms.metrics

    module.forward = plain  # type: ignore[method-assign]


def set_learning_rate(engine: Any, rate: float) -> None:
    """The rate of every parameter group, times the group's ``scale``, in force from the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def gather_owned(module: nn.Module, *, stage: int, keep: bool) -> dict[str, torch.Tensor]:
    """The parameters outside the backbones by name as fp32 CPU copies. Collective under ZeRO 3, which partitions them.

    Args:
        module: the bare module, not the engine.
        stage: ZeRO stage.
        keep: False on the ranks that need no copy; they take part and get an empty dict.
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in owned_parameters(module).items():
        with _gathered(parameter, stage):
            if keep:
                state[name] = parameter.detach().to("cpu", torch.float32, copy=True)
    return state


def trained_norm(module: nn.Module, *, stage: int) -> float:
    """Euclidean norm of all trained parameters. Collective under ZeRO 3, which partitions them."""
    squares = 0.0
    for parameter in module.parameters():
        if parameter.requires_grad:
            with _gathered(parameter, stage):
                squares += float(parameter.detach().double().square().sum())
    return squares**0.5


def _gathered(parameter: nn.Parameter, stage: int) -> Any:
    return load_deepspeed().zero.GatheredParameters([parameter], enabled=stage == 3)
