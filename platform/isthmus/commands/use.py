"""``isthmus caption``, ``embed``, ``evaluate`` and ``serve``: what is done with a registered model."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus.commands import recipes
from isthmus.commands.shell import show

Words = Annotated[list[str], typer.Argument(metavar="[RECIPE] [KEY=VALUE]", show_default=False)]


def caption(words: Words) -> None:
    """Caption every image of a data set, exactly once. Run it again to resume.

    Examples:
      $ isthmus caption model=models:/demo-stage2@candidate data=data/demo/heldout out=runs/captions
      $ isthmus caption my-captions.yaml actors=4 num_beams=3
    """
    from isthmus.config import CaptionConfig

    config = recipes.load(CaptionConfig, words)
    from isthmus.inference.caption import caption as work

    show(work(config))


def embed(words: Words) -> None:
    """Embed images and texts in bulk, exactly once. Run it again to resume.

    Examples:
      $ isthmus embed model=models:/demo-stage1@candidate data=data/demo/heldout out=runs/vectors
      $ isthmus embed model=models:/demo-stage1@candidate data=data/demo/heldout out=runs/vectors texts=false
    """
    from isthmus.config import EmbedConfig

    config = recipes.load(EmbedConfig, words)
    from isthmus.inference.embed import embed as work

    show(work(config))


def evaluate(words: Words) -> None:
    """Held-out figures of a model, beside chance and a shuffled control.

    Tasks: retrieval, captioning, vqa, classification, matching. The data is an indexed set, or a published layout.

    Examples:
      $ isthmus evaluate model=models:/demo-stage1@candidate data=data/demo/heldout
      $ isthmus evaluate model=models:/demo-stage2@candidate data=data/demo/heldout tasks='["captioning"]'
      $ isthmus evaluate model=models:/vqa@champion tasks='["vqa"]' workers=4 layout.kind=vqav2 \\
          layout.images=s3://b/val2014 layout.questions=questions.json layout.annotations=annotations.json
    """
    from isthmus.config import EvaluateConfig

    config = recipes.load(EvaluateConfig, words)
    from isthmus.evaluation.driver import evaluate as work

    show(work(config))


def serve(words: Words) -> None:
    """Serve models over OpenAI-compatible HTTP, until Ctrl-C.

    Examples:
      $ ISTHMUS_API_KEY=... isthmus serve models.demo=models:/demo-stage2@candidate
      $ isthmus serve models.demo=models:/demo-stage2@candidate auth=none port=8080
    """
    from isthmus.config import ServeConfig

    config = recipes.load(ServeConfig, words)
    from isthmus.serving.app import serve as work

    show({"url": work(config, block=True)})
