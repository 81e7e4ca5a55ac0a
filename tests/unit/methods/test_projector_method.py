"""The projector method: its text memory, its two ways to pool, its temperature."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from isthmus.config import RunConfig, load_run
from isthmus.contracts import BuildContext, LocalComm
from isthmus.errors import ConfigError
from isthmus.losses.contrastive import contrast
from isthmus.methods import METHODS, method_configs
from isthmus.methods import projector as projector_method
from isthmus.methods.guided_config import GuidedConfig
from isthmus.methods.projector import ProjectorConfig, TextMemory
from isthmus.models import projector as projector_model
from isthmus.models.projector import HeadProjector, ImageProjector, TextProjector, TokenProjector
from isthmus.models.vision import describe_vision
from isthmus.testing.backbones import tiny_cnn_config, tiny_vision_config
from method_cases import CAPTIONS, batch, build, recipe, samples

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_freeze_aligns() -> None:
    with torch.device("meta"):
        assert parameters(TokenProjector(1024, 1024)) == 3_150_848
        assert parameters(HeadProjector(1024, 1024)) == 2_101_248
        image = ImageProjector(1024, 1024, 0.1, pool_first=False, class_token=True)
        text = TextProjector(1024, 1024, 0.1, per_token=True)
    assert parameters(image) + parameters(text) + 1 == 11_553_793


def test_the_papers_recipe_is_the_papers_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2 ViT-L/14 at 256 pixels and RoBERTa-large: shapes, preprocessing and the number of trained parameters."""
    config = load_run(ROOT / "pipelines/projector/paper.yaml", methods=method_configs())
    method = config.method
    assert isinstance(method, ProjectorConfig)
    spec = describe_vision(method.vision)
    assert (spec.tokens, spec.width) == (325, 1024)  # 18 x 18 and the class token
    assert spec.transform.mean == (0.485, 0.456, 0.406) and spec.transform.std == (0.229, 0.224, 0.225)  # not CLIP's

    class RobertaLarge(torch.nn.Module):
        width, tokenizer, base = 1024, None, None

    monkeypatch.setattr(projector_method, "build_sentence_encoder", lambda _config: RobertaLarge())
    monkeypatch.setattr(projector_method, "own_tokenizer", lambda tokenizer: tokenizer)
    module = METHODS["projector"].build(method, BuildContext(with_vision=False)).module
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 11_553_793
    assert config.train.global_batch // config.cluster.most_workers == 1800
    assert method.contrast_over == "local" and ProjectorConfig().contrast_over == "global"


class _FirstOfTwo:
    """The first of two ranks, which may sum and must not gather."""

    rank, world_size = 0, 2

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.detach()

    def max(self, value: int) -> int:
        return value


def test_local_contrast_is_cross_entropy_over_the_own_rows(folder: Path) -> None:
    stage = build(recipe("projector", folder, contrast_over="local"), _FirstOfTwo())  # type: ignore[arg-type]
    module, rows = stage.module.eval(), samples(stage, 6)
    given = batch(stage, rows)
    image, text = module.embed_images(given.features_BND)[:, 0], module.embed_texts(given.texts)
    sims, target = image @ text.T / 0.07, torch.arange(6)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(sims, target) + cross_entropy(sims.T, target)) / 2
    terms = module(given)
    torch.testing.assert_close(terms.total.detach(), expected, rtol=1e-5, atol=1e-5)
    terms.total.backward()
    assert module.temperature.grad is not None
    assert stage.references(12)["itc"].chance == pytest.approx(torch.tensor(6.0).log().item())
    with pytest.raises(AttributeError):  # the global contrast asks the other rank
        contrast(image.unsqueeze(1), text, torch.ones(1), given.valid_B, _FirstOfTwo())  # type: ignore[arg-type]


def test_local_contrast_and_a_detached_gather_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="itc_gather cannot be 'detached'"):
        ProjectorConfig(contrast_over="local", itc_gather="detached")


@pytest.mark.parametrize("kind", ["pooled", "tokens"])
def test_each_distinct_caption_is_encoded_once_until_it_is_pushed_out(kind: str, folder: Path) -> None:
    stage = build(recipe("projector", folder, text_features=kind, remembered_texts=3))
    memory, calls = stage.module.memory, []
    stage.module.text.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    first = memory.read(["a cat", "two dogs", "a cat"])[0]
    assert calls == [2] and torch.equal(first[0], first[2])
    assert torch.equal(memory.read(["a cat"])[0][0][:4], first[0][:4]) and calls == [2]
    memory.read(["moon", "a large tree"])
    assert len(memory) == 3 and calls == [2, 2]
    memory.read(["two dogs"])  # the least recently read
    assert calls == [2, 2, 1]


def test_remembered_captions_have_a_size(folder: Path) -> None:
    stage = build(recipe("projector", folder, text_features="tokens"))
    memory = TextMemory(stage.module.text, 100, True, LocalComm(), most_bytes=2000)
    for text in CAPTIONS:
        memory.read([text])
        assert memory.bytes == sum(kept.nbytes for kept in memory._kept.values()) <= 2000
    assert 0 < len(memory) < len(CAPTIONS)


def test_a_contrast_of_a_workers_own_rows_needs_two_of_them(folder: Path) -> None:
    local = recipe("projector", folder, contrast_over="local")
    values = {"name": "r", "data": {"train": "d"}, "train": {"steps": 1, "global_batch": 4}, "cluster": {"workers": 4}}
    with pytest.raises(ValidationError, match="at least 2 of them"):
        RunConfig.model_validate({**values, "method": local})
    RunConfig.model_validate({**values, "method": recipe("projector", folder)})
    RunConfig.model_validate({**values, "method": local, "cluster": {"workers": 2}})


@pytest.mark.parametrize("kind", ["pooled", "tokens"])
def test_a_texts_vector_does_not_depend_on_its_company(kind: str, folder: Path) -> None:
    module = build(recipe("projector", folder, text_features=kind)).module.eval()
    alone = module.embed_texts(["two dogs"])
    module.memory._kept.clear()
    together = module.embed_texts(["two dogs", "a large tree and a small bird left of the house"])[:1]
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_pooling_first_is_another_function_except_on_equal_tokens() -> None:
    torch.manual_seed(0)
    projector = ImageProjector(8, 6, 0.0, pool_first=False, class_token=False).eval()
    x = torch.randn(2, 5, 8)
    late = projector(x)
    projector.pool_first = True
    assert not torch.allclose(projector(x), late, atol=1e-3)
    same = x[:, :1].expand(-1, 5, -1)
    early = projector(same)
    projector.pool_first = False
    torch.testing.assert_close(projector(same), early)


@pytest.mark.parametrize("shape", [(7, 5, 8), (3, 1, 4), (50, 36, 257)])
def test_stored_halves_are_averaged_in_float32(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    for values in (1, 1 << 18):  # one image at a time, and many
        monkeypatch.setattr(projector_model, "_CACHED_VALUES", values)
        found = projector_model.mean_token(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, x.double().mean(1).float(), rtol=0, atol=1e-6)


def test_the_class_token_has_its_own_projector_and_no_part_in_the_mean() -> None:
    torch.manual_seed(0)
    projector = ImageProjector(8, 6, 0.0, pool_first=False, class_token=True).eval()
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(projector(x), projector.tokens(x[:, 1:]).mean(1) + projector.class_token(x[:, 0]))


def test_a_class_token_is_one_that_the_encoder_has(folder: Path) -> None:
    assert build(recipe("projector", folder, class_token=True)).module.image_projector.class_token is not None
    averaged = tiny_vision_config().model_copy(update={"pool": "mean"})
    for vision in (averaged, tiny_cnn_config()):
        with pytest.raises(ConfigError, match=r"method\.class_token is true, and the first"):
            build(recipe("projector", folder, class_token=True, vision=vision))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature_range": (0.5, 0.001)}, "the smaller first"),
        ({"temperature_range": (0.0, 0.5)}, "above 0"),
        ({"temperature": 0.9}, "temperature 0.9 lies outside"),
    ],
)
def test_a_temperature_that_cannot_be_held_is_refused(options: dict[str, object], said: str) -> None:
    for config in (ProjectorConfig, GuidedConfig):
        with pytest.raises(ValidationError, match=said):
            config(**options)


def test_the_temperature_is_held_but_can_return(folder: Path) -> None:
    stage = build(recipe("projector", folder))
    module = stage.module
    with torch.no_grad():
        module.temperature.fill_(0.9)
    terms = module(batch(stage, samples(stage, 6)))
    terms.total.backward()
    assert float(terms.metrics["temperature"]) == pytest.approx(0.5)
    assert float(module.temperature.grad) != 0.0


def test_it_learns_to_tell_pairs_apart(folder: Path) -> None:
    stage = build(recipe("projector", folder, pool="pool-then-project"))
    module, rows = stage.module.train(), samples(stage, 8)
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    for step in range(80):
        optimizer.zero_grad()
        terms = module(batch(stage, rows, step))
        terms.total.backward()
        optimizer.step()
    assert float(terms.metrics["r1_i2t"]) == float(terms.metrics["r1_t2i"]) == 1.0
