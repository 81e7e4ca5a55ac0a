"""What a plan takes for granted, and on whose word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from isthmus.planning import memory
from isthmus.planning.hardware import CPU
from isthmus.planning.offload import HOST_BANDWIDTH, HOST_LINK

if TYPE_CHECKING:
    from isthmus.planning.plan import Wishes
    from isthmus.planning.subject import Subject

UTILISATION = 0.3
CPU_UTILISATION = 1.0
"""Of the rate that is measured on a plan's own products."""
KEPT_PASSES, GRADIENT_PASSES = 5.0, 8.0
"""How often a processor's work on elements reads or writes the bytes that are kept for the backward pass, and those of
the gradients: fitted to the steps of benchmarks/plan_check.py."""
IMAGE_BYTES = 50_000
CAPTION_BYTES = 100


@dataclass(frozen=True)
class Assumption:
    """One of them.

    Attributes:
        what, value: in words. source: where the value comes from, and which option changes it.
    """

    what: str
    value: str
    source: str


def assumptions(subject: Subject, wishes: Wishes, precision: str) -> tuple[Assumption, ...]:
    """All that the figures of this plan rest on beside the recipe."""
    gpu, run = wishes.gpu, subject.run
    cpu = gpu.name == CPU
    found = [
        Assumption("peak of matrix products", f"{gpu.rate(precision) / 1e12:,.3g} TFLOP/s in {precision}", gpu.source),
        Assumption(
            "share of it that a step reaches",
            f"{wishes.utilisation:.0%}",
            "measured on the plan's own products; work on elements is counted beside them, and a language model's "
            "blocks are timed whole; --mfu covers all"
            if cpu
            else "assumed, not measured: runs of this kind publish 20 to 50 %; measure a few steps and give --mfu",
        ),
        Assumption("memory", f"{gpu.memory / 1e9:,.0f} GB at {gpu.bandwidth / 1e9:,.0f} GB/s", gpu.source),
        Assumption(
            "captions",
            f"{subject.texts.mean:g} tokens on average, {subject.texts.longest} the longest of a batch",
            "COCO's captions, special tokens included; --caption-tokens, --longest-caption",
        ),
        Assumption(
            "read for a sample",
            f"{wishes.bytes_per_sample or sample_bytes(subject):,.0f} bytes",
            "--bytes-per-sample"
            if wishes.bytes_per_sample
            else "cached features in float16"
            if run.data.placement == "cached"
            else "an image of web size, assumed; --bytes-per-sample",
        ),
        Assumption("reading", "never slower than the step", "it runs ahead; compare bytes per second with the storage"),
        Assumption(
            "parameters, gradients, AdamW's moments",
            "float32",
            "training/zero.py; bf16 is autocast, which keeps one more copy of weights in bf16",
        ),
        Assumption(
            "image encoder",
            "in the trainer, float32 weights" if subject.inline else "not in the trainer",
            f"data.placement {run.data.placement}",
        ),
        Assumption(
            "framework",
            f"{(memory.CPU_CONTEXT if cpu else memory.CONTEXT) / 2**30:.1f} GiB"
            + ("" if cpu else f" and {memory.FRAGMENTATION:.0%} of activations"),
            "assumed: context, collectives' and matrix libraries' buffers, what the allocator cannot use",
        ),
        Assumption(
            "activations",
            f"those of {run.train.micro_batch} images of a worker at a time, made twice"
            if run.train.micro_batch is not None
            else "kept whole"
            if not run.train.gradient_checkpointing
            else "the Q-Former's are recomputed"
            if subject.language is None
            else "the Q-Former's and the language model's are recomputed",
            "train.micro_batch, train.gradient_checkpointing; the formulas are tested on processors alone",
        ),
    ]
    if subject.language is not None:
        found.append(
            Assumption("language model", f"{subject.language.parameters:,} parameters", subject.language.source)
        )
    if not cpu and "cpu" in (run.zero.offload_optimizer, run.zero.offload_parameters):
        found.append(
            Assumption(
                "offloading",
                f"{HOST_LINK / 1e9:g} GB/s between host and accelerator; {HOST_BANDWIDTH / 1e9:g} GB/s of a node's "
                "memory, which its workers share",
                "assumed; AdamW's step on the host and copies are counted as not hidden",
            )
        )
    if wishes.workers > 1:
        found += _network(wishes, cpu)
    return tuple(found)


def _network(wishes: Wishes, cpu: bool) -> list[Assumption]:
    gpu = wishes.gpu
    reach = gpu.link if wishes.nodes == 1 else min(gpu.link, gpu.network)
    found = [
        Assumption(
            "network",
            f"{reach / 1e9:,.4g} GB/s each way for a worker, {wishes.network_efficiency:.0%} of it used",
            ("within the node; " if wishes.nodes == 1 else "between nodes; ") + gpu.source + "; --network-gbps",
        ),
        Assumption(
            "overlap",
            "none" if cpu else "gradients are reduced, ZeRO 3's parameters fetched, during the backward pass",
            "overlap_comm in training/zero.py",
        ),
    ]
    if not cpu:
        found.append(
            Assumption(
                "gradient buckets",
                f"as many elements as are trained, {memory.BUCKET:,} at most; two under ZeRO 1 and 2",
                "reduce_bucket_size in training/zero.py; allocated whole",
            )
        )
    return found


def sample_bytes(subject: Subject) -> float:
    """Bytes that are read for a sample where the user does not say: an image as web data sets keep them, or cached
    features in float16; and a caption."""
    features = 2.0 * subject.vision.tokens * subject.vision.width
    return CAPTION_BYTES + (features if subject.run.data.placement == "cached" else IMAGE_BYTES)
