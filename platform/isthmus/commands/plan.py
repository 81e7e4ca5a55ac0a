"""``isthmus plan``: memory, time and cost of a training run before it is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.commands import recipes
from isthmus.commands.shell import show, state
from isthmus.errors import ConfigError

if TYPE_CHECKING:
    from isthmus.planning.hardware import Gpu
    from isthmus.planning.subject import Subject

Words = Annotated[list[str], typer.Argument(metavar="RECIPE [KEY=VALUE]", show_default=False)]


def plan(
    words: Words,
    gpu: Annotated[str, typer.Option(help="h100, h200, b200, a100-80, a100-40, l40s, a10g, l4, ...; cpu: measured.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Accelerators of each; the recipe's workers by default.")
    ] = None,
    samples: Annotated[float | None, typer.Option(min=1, help="Images of the data set, e.g. 129e6.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over them: gives the steps.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, help="In any currency.")] = None,
    bytes_per_sample: Annotated[float | None, typer.Option(min=1, help="Read from storage for a sample.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the peak rate that a step reaches, 0 to 1.")] = None,
    network_gbps: Annotated[
        float | None, typer.Option(help="Gigabits per second out of the node, for each accelerator.")
    ] = None,
    caption_tokens: Annotated[float, typer.Option(min=3, help="Of a caption on average, special ones included.")] = 12,
    longest_caption: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a batch's longest; twice the average by default.")
    ] = None,
    parent: Annotated[str | None, typer.Option(help="Stage-1 recipe that a stage 2 starts from.")] = None,
    language_params: Annotated[float, typer.Option(min=0, help="Of a language model that is not known here.")] = 0,
    language_width: Annotated[int, typer.Option(min=0, help="Its hidden width.")] = 0,
    language_layers: Annotated[int, typer.Option(min=0, help="Its layers.")] = 0,
) -> None:
    """Memory, step time, wall clock and cost of a recipe on a cluster, with every assumption. Loads no weights or data.

    Examples:
      $ isthmus plan pipelines/blip2/stage1.yaml --gpu a100-40 --nodes 2 --gpus-per-node 8
      $ isthmus plan pipelines/blip2/stage1.yaml train.global_batch=16384 --gpu h100 --nodes 128 --gpus-per-node 8 \\
          --samples 129e6 --epochs 3 --price-per-gpu-hour 3
      $ isthmus plan pipelines/demo/stage2.yaml --parent pipelines/demo/stage1.yaml --gpu cpu --json
    """
    if epochs is not None and (samples is None or epochs <= 0):
        raise ConfigError("--epochs is a number above 0 and needs --samples, the images of the data set.")
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g} is no share.", "Give a number above 0 and up to 1.")
    if network_gbps is not None and network_gbps <= 0:
        raise ConfigError(f"--network-gbps {network_gbps:g} carries nothing.", "Give a number above 0.")
    from isthmus.planning.hardware import CPU, find_gpu

    found = None if gpu.strip().lower() == CPU else find_gpu(gpu)
    run = recipes.load_training([*words, "cluster.workers=1"])
    if gpus_per_node is None:
        recipe_workers = recipes.load_training(words).cluster.most_workers
        if recipe_workers % nodes:
            raise ConfigError(
                f"cluster.workers {recipe_workers} does not divide among {nodes} nodes.", "Give --gpus-per-node."
            )
        gpus_per_node = recipe_workers // nodes
    from dataclasses import replace

    from isthmus.planning.assumptions import CPU_UTILISATION, UTILISATION
    from isthmus.planning.plan import Wishes, check_batch, reckon
    from isthmus.planning.report import show_plan
    from isthmus.planning.shapes import Texts
    from isthmus.planning.subject import Unknown, examine

    images = check_batch(run.train.global_batch, nodes, gpus_per_node)
    longest = longest_caption or round(2 * caption_tokens)
    if longest < caption_tokens:
        raise ConfigError(f"--longest-caption {longest} is less than the average, {caption_tokens:g}.")
    subject = examine(
        run, Texts(caption_tokens, longest),
        parent=recipes.load_training([parent]) if parent else None,
        unknown=Unknown(language_params, language_width, language_layers),
    )  # fmt: skip
    device = found or _probed(subject, images, nodes * gpus_per_node)
    if mfu is not None:
        device = replace(device, elementwise=0.0, timed={}, start=0.0)  # the share that is given covers it
    if network_gbps is not None:
        device = replace(device, network=network_gbps / 8 * 1e9)
    wishes = Wishes(
        device, nodes, gpus_per_node, mfu or (UTILISATION if found else CPU_UTILISATION), samples=samples,
        epochs=epochs, steps=steps, price=price_per_gpu_hour, bytes_per_sample=bytes_per_sample,
    )  # fmt: skip
    made = reckon(subject, wishes)
    if state.json:
        show(made.as_json())
    else:
        show_plan(made)


def _probed(subject: Subject, images: int, workers: int) -> Gpu:
    from dataclasses import replace

    from isthmus.planning.compute import Flops
    from isthmus.planning.hardware import CPU, Gpu, probe_cpu
    from isthmus.planning.plan import resolve_precision

    precision = resolve_precision(subject.run.train.precision, Gpu(CPU, 0, 0, 0, 0, 0, 0, ""))
    flops = subject.flops(images, workers)
    timed: dict[str, float] = {}
    if subject.language is not None:
        from isthmus.planning.trial import NAME, trial_of

        timed[NAME] = trial_of(subject, images, bf16=precision == "bf16").seconds() * subject.parts(images)
    products = sum((part for name, part in flops.items() if name not in timed), Flops()).products
    return replace(probe_cpu(products, precision), timed=timed)
