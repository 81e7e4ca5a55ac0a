"""The registered model's code: MLflow runs this file and gets an object with ``predict`` (models from code).

``predict`` takes a table with a column ``image`` (encoded image bytes) and returns one caption per row; a model that
only embeds returns one vector per row instead. With a column ``text`` and no ``image`` it embeds the texts.
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

        from isthmus.contracts import Captions

        module: Any = self.artefact.stage.module.eval()
        with torch.inference_mode():
            if "image" not in model_input:
                return list(module.embed_texts(model_input["text"].tolist()).float().cpu().numpy())
            features = module.encode_images(self._pixels(model_input["image"].tolist()))
            if isinstance(module, Captions):
                return module.generate(features, **(params or {}))
            return list(module.embed_images(features).float().cpu().numpy())

    def _pixels(self, images: list[bytes]) -> Any:
        import torch

        from isthmus.data.transforms import decode_image

        stacked = np.stack([self.artefact.stage.transform(decode_image(data)) for data in images])
        return torch.from_numpy(stacked).to(self.device)


mlflow.models.set_model(IsthmusModel())
