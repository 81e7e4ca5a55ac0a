"""The tasks in which the model writes: captions, and answers to questions."""

from __future__ import annotations

from collections import Counter
from typing import Any

from isthmus.errors import DataError
from isthmus.evaluation.captioning import permuted, score_captions
from isthmus.evaluation.held import Held, TaskResult
from isthmus.evaluation.samples import BulkCaptions
from isthmus.evaluation.vqa import score_answers

# ----------------------------------------------------------------------------------------------------- captioning


def captioning(held: Held, written: BulkCaptions | None = None) -> TaskResult:
    """Generated captions (or ``written`` ones) against all captions of their images, and the permuted control.

    Raises:
        DataError: captions and images do not belong together, or an image has no reference.
    """
    config = held.config
    read = held.gather("read" if written else "caption", "captioning")
    references = dict(zip(read.ids, read.captions, strict=True))
    keys = dict(zip(read.ids, read.keys, strict=True))
    made = dict(zip(read.ids, read.made, strict=False))
    if written is not None:
        references = {i: texts for i, texts in references.items() if i not in written.quarantined}
        made = {i: text for i, text in written.captions.items() if i in references or not config.limit}
    scores = score_captions(made, references, meteor=config.meteor, spice_jars=config.spice_jars)
    elsewhere = permuted(made, config.seed)
    control = score_captions(elsewhere, references)
    metrics = {**scores.metrics, **{f"{name}_permuted": value for name, value in control.metrics.items()}}
    rows = {
        i: {
            "key": keys[i],
            "references": list(references[i]),
            "caption": made[i],
            "cider": scores.cider[n],
            "bleu_4": scores.bleu_4[n],
            "rouge_l": scores.rouge_l[n],
            "permuted_caption": elsewhere[i],
            "permuted_cider": control.cider[n],
        }
        for n, i in enumerate(scores.ids)
    }
    facts = _generation_facts(held, references, made, written)
    return TaskResult(metrics, facts, rows, scores.not_computed)


def _generation_facts(
    held: Held, references: dict[int, tuple[str, ...]], made: dict[int, str], written: BulkCaptions | None
) -> dict[str, Any]:
    config = held.config
    names = ("prompt", "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty")
    settings = {name: getattr(config, name) for name in names}
    if config.prompt is None:
        settings["prompt"] = held.runner.about().prompt
    if written is not None:
        settings = {name: written.facts.get(name) for name in names}
    return {
        "images": len(references),
        "captioned": len(made),
        "references": sum(map(len, references.values())),
        "captions_empty": sum(not text.strip() for text in made.values()),
        "captions_distinct": len(set(made.values())),
        **settings,
        "captions_from": config.captions or "generated for this evaluation",
        "captions_model": written.model if written else "",
        "tokenizer": "isthmus.evaluation.ptb (after PTBTokenizer 3.4.1, lower-cased, punctuation dropped)",
        "cider_documents": "the references of the evaluated images: a subset gives another value",
    }


# ------------------------------------------------------------------------------------------------------------ vqa


def vqa(held: Held) -> TaskResult:
    """Answers to questions, by the official accuracy where there are ten references each, beside the blind prior.

    Raises:
        DataError: no questions, or an id of a question twice.
    """
    config = held.config
    read = held.gather("answer", "answering", extras=True)
    questions = [question for more in read.extras for question in more.questions]
    answers = [answer for some in read.answers for answer in some]
    if not questions:
        raise DataError(
            f"{held.source.root} holds no questions.", "Give layout.kind=vqav2, or 'questions' in the samples' JSON."
        )
    if doubled := [i for i, count in Counter(q.id for q in questions).items() if count > 1]:
        raise DataError(f"{held.source.root} holds the question {doubled[0]} more than once.", "Give each its own id.")
    result = TaskResult(
        {},
        {
            "images": len(read.ids),
            "questions": len(questions),
            "answers_distinct": len(set(answers)),
            "answers_empty": sum(not answer for answer in answers),
            **config.vqa.model_dump(),
            "tokenizer": "official VQA answer normalisation, applied to answers and references",
        },
        files={"answers.json": [{"question_id": q.id, "answer": a} for q, a in zip(questions, answers, strict=True)]},
    )
    each: list[float | None] = [None] * len(questions)
    if not any(q.answers for q in questions):
        result.not_computed["vqa_accuracy"] = "the split's answers are not published: send answers.json to its server"
    else:
        scores = score_answers(questions, answers, held.source.training)
        result.metrics, each = scores.metrics, list(scores.each)
        result.facts["prior"] = scores.prior
        if scores.not_computed:
            result.not_computed["vqa_accuracy"] = scores.not_computed
    score = iter(each)
    for n, image_id in enumerate(read.ids):
        result.rows[image_id] = {
            "key": read.keys[n],
            "questions": [q.text for q in read.extras[n].questions],
            "answers": read.answers[n],
            "answer_scores": [next(score) for _ in read.extras[n].questions],
        }
    return result
