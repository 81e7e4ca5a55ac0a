"""A Hugging Face BLIP-2 as it is published, imported: it says the same words, ends where it ended, or is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_cases import AutoProcessor, Blip2ForConditionalGeneration, images, write_stage1, write_stage2
from isthmus.errors import ConfigError
from isthmus.methods.artefact import load_artefact
from isthmus.methods.interchange import import_hf
from isthmus.methods.interchange.epsilon import noise

FAMILIES = ["opt", "llama", "gpt2", "t5"]
LONGEST = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME (of transformers, the image encoder's epsilon 1e-6) and NAME-in (imported)."""
    root = tmp_path_factory.mktemp("published")
    for family in FAMILIES:
        write_stage2(root / family, family)
        import_hf(root / family, root / f"{family}-in")
    return root


class Both:
    """The stock model and the imported one, and the ids that each generates for the same images and prompts."""

    def __init__(self, folder: Path, family: str) -> None:
        self.theirs: Any = Blip2ForConditionalGeneration.from_pretrained(folder / family)
        self.processor = AutoProcessor.from_pretrained(folder / family)
        self.processor.tokenizer.padding_side = "right" if family == "t5" else "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self.ours: Any = load_artefact(folder / f"{family}-in").stage.module
        self.seq2seq = family == "t5"

    def ids(self, prompts: list[str], beams: int) -> tuple[list[list[int]], list[list[int]]]:
        inputs = self.processor(images=images(len(prompts)), text=prompts, padding=True, return_tensors="pt")
        found = self.theirs.generate(**inputs, max_new_tokens=LONGEST, num_beams=beams)
        start = 1 if self.seq2seq else inputs["input_ids"].shape[1]
        mine: list[list[int]] = []
        language = self.ours.language
        decode = language._decode
        language._decode = lambda row: (mine.append(list(row)), decode(row))[1]
        try:
            soft = self.ours.soft_prompt(self.ours.encode_images(inputs["pixel_values"]))
            language.generate(soft, prompt=prompts, max_new_tokens=LONGEST, num_beams=beams)
        finally:
            language._decode = decode
        return found[:, start:].tolist(), mine

    def swap(self, a: int, b: int) -> None:
        """Lets both models say ``a`` where they said ``b``."""
        for model in (self.theirs.language_model, self.ours.language.model):
            table = model.get_input_embeddings().weight.data
            assert table.data_ptr() == model.get_output_embeddings().weight.data_ptr()
            table[[a, b]] = table[[b, a]].clone()


@pytest.mark.parametrize("beams", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_and_beam_ids_are_the_stock_model_s(folder: Path, family: str, beams: int) -> None:
    both = Both(folder, family)
    said = set()
    for prompts in (["", "", ""], ["a", "a", "a"], ["a photo of", "a", "the small dog"]):
        theirs, ours = both.ids(prompts, beams)
        assert ours == theirs
        said |= set(map(tuple, ours))
    assert len(said) >= 4, "images and prompts tell the captions apart"


@pytest.mark.parametrize("beams", [1, 5])
@torch.no_grad()
def test_opt_stops_at_the_newline_and_not_at_its_own_end_of_sequence(folder: Path, beams: int) -> None:
    both = Both(folder, "opt")
    language = both.ours.language
    eos = language.tokenizer.eos_token_id
    assert both.theirs.language_model.generation_config.eos_token_id == language.end_id != eos
    assert language.model.generation_config.eos_token_id == language.end_id
    seen = set()
    for token in sorted({token for row in both.ids([""] * 4, beams)[0] for token in row}):
        for special in (eos, language.end_id):
            both.swap(special, token)
            theirs, ours = both.ids([""] * 4, beams)
            assert ours == theirs
            for row in ours:
                if special == eos and eos in row[:-1] and row[row.index(eos) + 1] not in (eos, language.pad_id):
                    seen.add("goes on")
                    words = [t for t in row[: [*row, language.end_id].index(language.end_id)] if t != eos]
                    assert language._decode(row) == language.tokenizer.decode(words, skip_special_tokens=True).strip()
                if special == language.end_id and special in row[:-1]:
                    seen.add("stops")
                    assert set(row[row.index(special) + 1 :]) == {language.pad_id}
            both.swap(special, token)
    assert seen == {"goes on", "stops"}


# --- an end that is not ours -----------------------------------------------------------------------------------------


def changed(folder: Path, out: Path, family: str, file: str, eos: Any) -> Path:
    shutil.copytree(folder / family, out)
    value = json.loads((out / file).read_text())
    (value["text_config"] if file == "config.json" else value)["eos_token_id"] = eos
    (out / file).write_text(json.dumps(value))
    return out


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
def test_another_end_of_a_caption_is_refused(folder: Path, tmp_path: Path, family: str, file: str) -> None:
    tokenizer = AutoProcessor.from_pretrained(folder / family).tokenizer
    end = json.loads((folder / family / "config.json").read_text())["text_config"].get("eos_token_id", 1)
    for i, other in enumerate(([end, end + 1], tokenizer.pad_token_id, [])):
        where = changed(folder, tmp_path / f"hf{i}", family, file, other)
        if other == []:  # says nothing
            import_hf(where, tmp_path / "in")
            continue
        with pytest.raises(ConfigError, match=rf"captions end at \[.*eos_token_id in .*{file}.*end at {end}:") as error:
            import_hf(where, tmp_path / "no")
        assert f"set eos_token_id to it in {file}" in error.value.mend or "config.json" in error.value.mend
        assert not (tmp_path / "no").exists()


# --- the epsilon of the norm on the image features -------------------------------------------------------------------


@torch.no_grad()
def qformer_outputs(theirs: Any, pixels: Tensor) -> Tensor:
    image = theirs.vision_model(pixel_values=pixels).last_hidden_state
    queries = theirs.query_tokens.expand(len(pixels), -1, -1)
    found: Tensor = theirs.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    return found


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_import_measures_what_ln_vision_s_epsilon_does(tmp_path: Path, stage: int, eps: float) -> None:
    theirs = (write_stage1 if stage == 1 else write_stage2)(tmp_path / "hf", eps=eps)
    for name, parameter in theirs.vision_model.named_parameters():
        if "norm" not in name:
            parameter.data *= 0.2  # tokens of small variance: the epsilon shows above the rounding
    theirs.save_pretrained(tmp_path / "hf")
    done = import_hf(tmp_path / "hf", tmp_path / "in")
    said = [note for note in done.notes if "epsilon" in note]
    if eps == 1e-5:
        assert said == []
        return
    assert len(said) == 1 and "1e-05 here" in said[0] and "1e-06 in the checkpoint" in said[0]
    before = qformer_outputs(theirs, noise(32))
    theirs.vision_model.post_layernorm.eps = 1e-5
    wanted = float((before - qformer_outputs(theirs, noise(32))).pow(2).mean().sqrt())
    noted = float(re.search(r"differ by (\S+)", said[0])[1])  # type: ignore[index]
    assert wanted > 3e-6 and noted == pytest.approx(wanted, rel=0.06)  # two digits are noted
