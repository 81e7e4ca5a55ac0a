"""The registered model's code: MLflow runs this file and gets an object with ``predict`` (models from code).

``predict`` takes a table and returns one entry per row, by what the model can do:

- a column ``image`` (encoded bytes) alone: a caption, or the vector of a model that only embeds;
- ``image`` and ``text``, of a model that answers questions: the answer to the row's question;
- ``text`` alone: the text's vector; ``sound`` or ``clip`` (encoded bytes) alone: the vector of those.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import pandas as pd


class IsthmusModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc,name-defined]
    """One artefact, loaded on the CPU, or on the GPU where there is one."""

    def load_context(self, context: Any) -> None:
        import torch

        from isthmus.methods.artefact import load_artefact

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.artefact = load_artefact(context.artifacts["artefact"], with_vision=True, device=self.device)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[Any]:  # noqa: ARG002
        import torch

        from isthmus.contracts import Answers, Captions, Embeds, Hears

        module: Any = self.artefact.stage.module.eval()
        able = {kind: isinstance(module, kind) for kind in (Answers, Captions, Embeds, Hears)}
        given = {name: model_input[name].tolist() for name in ("image", "text", "sound", "clip") if name in model_input}
        with torch.inference_mode():
            if "image" in given and able[Answers]:
                if "text" not in given:
                    raise ValueError("This model answers questions: give them in a column 'text'.")
                return module.answer(self._images(given["image"]), given["text"])
            if "image" in given and able[Captions]:
                return module.generate(self._images(given["image"]), **(params or {}))
            if "image" in given and (able[Embeds] or able[Hears]):
                return self._rows(module.embed_images(self._images(given["image"])))
            if "clip" in given and able[Hears]:
                return self._rows(module.embed_images(self._clips(given["clip"])))
            if "sound" in given and able[Hears]:
                return self._rows(module.embed_sounds(*self._sounds(given["sound"])))
            if "text" in given and able[Embeds]:
                return self._rows(module.embed_texts(given["text"]))
        name = self.artefact.recipe.method.name
        raise ValueError(f"A '{name}' model makes nothing of the columns {sorted(map(str, model_input.columns))}.")

    def _rows(self, vectors: Any) -> list[Any]:
        return list(vectors.float().cpu().numpy())

    def _images(self, images: list[bytes]) -> Any:
        from isthmus.data.clips import image_transform
        from isthmus.data.transforms import decode_image

        transform = image_transform(self.artefact.stage.transform)
        return self._features([transform(decode_image(data)) for data in images])

    def _clips(self, clips: list[bytes]) -> Any:
        transform: Any = self.artefact.stage.transform
        return self._features([transform.seen(data, "mp4") for data in clips])

    def _sounds(self, sounds: list[bytes]) -> tuple[Any, Any]:
        transform: Any = self.artefact.stage.transform
        heard = [transform.listen(data) for data in sounds]
        values, mask = (self._stack([one[name] for one in heard]) for name in ("audio_NF", "audio_mask_N"))
        return values, mask.long()

    def _features(self, pixels: list[Any]) -> Any:
        """The frozen encoder's tokens."""
        module: Any = self.artefact.stage.module
        return module.encode_images(self._stack(pixels))

    def _stack(self, arrays: list[Any]) -> Any:
        import torch

        return torch.from_numpy(np.stack(arrays)).to(self.device)


mlflow.models.set_model(IsthmusModel())
