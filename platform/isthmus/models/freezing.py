"""Which parameters are trained, which are saved, and how exactly those are restored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from isthmus.contracts import Base
from isthmus.errors import ConfigError, WeightsError, nearest

Verdict = Literal["frozen", "trained"]


def freeze(module: nn.Module, globs: Iterable[str]) -> None:
    """Switches gradients off for every parameter whose name matches one of ``globs``; the others stay as they are.

    Globs are those of a shell, over dotted names (``*`` also crosses dots): ``qformer.words.*``, ``*.text_ffn.*``.

    Raises:
        ConfigError: a glob that matches no parameter outside the backbones, so that a misspelt one cannot silently
            leave a part trainable; or nothing would be left to train.
    """
    owned = owned_parameters(module)
    for pattern in globs:
        names = [name for name in owned if fnmatchcase(name, pattern)]
        if not names:
            raise ConfigError(
                f"The frozen pattern '{pattern}' matches no parameter.{nearest(pattern, owned)}",
                "Patterns are matched against whole names such as 'qformer.words.weight'; backbones are frozen anyway.",
            )
        for name in names:
            owned[name].requires_grad_(False)
    if owned and not any(parameter.requires_grad for parameter in owned.values()):
        raise ConfigError("The frozen patterns leave nothing to train.", "Take one out of train.frozen.")


def owned_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint or artefact holds: all outside the backbones, whether trained or frozen.

    A backbone is a sub-module with a ``base``: its tensors are referenced by digest and never copied.
    """
    backbones = tuple(
        f"{name}." for name, part in module.named_modules() if isinstance(getattr(part, "base", None), Base)
    )
    return {name: p for name, p in module.named_parameters() if not name.startswith(backbones)}


def freeze_all(module: nn.Module) -> None:
    """A backbone: no gradients, eval mode."""
    module.requires_grad_(False)
    module.eval()


def verdict_of(module: nn.Module) -> dict[str, Verdict]:
    """Whether each parameter is trained, in the module's order."""
    return {name: "trained" if p.requires_grad else "frozen" for name, p in module.named_parameters()}


def verdict_table(module: nn.Module, depth: int = 2) -> str:
    """Parameters and verdict by name prefix of ``depth`` parts, one line each, with the two sums at the end."""
    groups: dict[tuple[str, str], int] = {}
    for name, parameter in module.named_parameters():
        prefix = ".".join(name.split(".")[:depth])
        verdict = "trained" if parameter.requires_grad else "frozen"
        groups[prefix, verdict] = groups.get((prefix, verdict), 0) + parameter.numel()
    wide = max((len(prefix) for prefix, _ in groups), default=0)
    lines = [f"{prefix:<{wide}}  {verdict:<7}  {count:>14,}" for (prefix, verdict), count in groups.items()]
    for verdict in ("trained", "frozen"):
        total = sum(count for (_, which), count in groups.items() if which == verdict)
        lines.append(f"{'all':<{wide}}  {verdict:<7}  {total:>14,}")
    return "\n".join(lines)


def state_digest(state: nn.Module | Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in name order.

    Tensors that share memory (tied weights) are read once. Memory layout and device do not change the digest.
    """
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    seen: dict[tuple[object, ...], bytes] = {}
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in seen:
            seen[key] = _bytes_digest(tensor)
        whole.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        whole.update(seen[key])
    return whole.hexdigest()


def _bytes_digest(tensor: Tensor) -> bytes:
    flat = tensor.cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()


def owned_state(module: nn.Module) -> dict[str, Tensor]:
    """Copies, on the CPU, of :func:`owned_parameters`; all that a checkpoint or artefact needs to hold."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in owned_parameters(module).items()
    }


def load_owned(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Writes ``state`` into the module's :func:`owned_parameters`, in place.

    Raises:
        WeightsError: ``state`` does not hold exactly those names, or a shape differs. Nothing is written then.
    """
    wanted = owned_parameters(module)
    missing, surplus = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or surplus:
        raise WeightsError(
            f"The stored parameters do not fit this model: {len(missing)} missing{_sample(missing)}, "
            f"{len(surplus)} not known here{_sample(surplus)}.",
            "Build the model from the recipe that was stored with them.",
        )
    for name, parameter in wanted.items():
        if parameter.shape != state[name].shape:
            raise WeightsError(
                f"The stored parameter '{name}' has shape {tuple(state[name].shape)}, this model wants "
                f"{tuple(parameter.shape)}.",
                "Build the model from the recipe that was stored with it.",
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


def _sample(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
