"""Images per second from webdataset tars to normalised pixels: manifest reads against webdataset's stream.

Both decode with PIL and apply the same transform, in one process without worker processes, over the same files.
Isthmus decodes on threads beside the reader, which is part of what is measured. For comparison: the decoding alone, on
one thread, of bytes that are in memory already.

    python benchmarks/reading.py --data data/demo/heldout --rounds 5 --json reading.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from isthmus.data.manifest import Manifest, index
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.stream import iter_samples
from isthmus.data.transforms import ImageTransform, decode_image
from isthmus.testing.shards import make_dataset

SIZE = 192
IMAGES = 600


def main() -> None:
    """Measure, print, and write the figures where ``--json`` says."""
    options = _options()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.data or str(_drawn(Path(scratch)))
        manifest = Manifest.load(folder)
        rows = range(min(len(manifest), IMAGES))
        transform = ImageTransform(SIZE)
        raw = [sample.image for sample in read_rows(manifest, list(rows)) if isinstance(sample, RawSample)]
        contenders = {
            "isthmus": lambda: _ours(manifest, rows, transform),
            "webdataset": lambda: _webdataset(manifest, len(rows), transform),
            "decode_alone": lambda: sum(transform(decode_image(data, at_least=SIZE)).shape[0] > 0 for data in raw),
        }
        rates = _alternate(contenders, options.rounds)
    figures = {f"{name}_images_per_s": round(statistics.median(found), 1) for name, found in rates.items()}
    figures |= {
        "images": len(rows),
        "rounds": options.rounds,
        "ratio_to_webdataset": round(figures["isthmus_images_per_s"] / figures["webdataset_images_per_s"], 3),
        "ratio_to_decode_alone": round(figures["isthmus_images_per_s"] / figures["decode_alone_images_per_s"], 3),
    }
    for name, value in figures.items():
        print(f"{name:28} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _ours(manifest: Manifest, rows: range, transform: ImageTransform) -> int:
    return sum(len(group) for group in iter_samples(manifest, transform=transform, rows=rows, batch=32))


def _webdataset(manifest: Manifest, images: int, transform: ImageTransform) -> int:
    import webdataset
    from torch.utils.data import DataLoader

    urls = [manifest.url(number) for number in range(len(manifest.shards))]
    keep = ("png", "jpg", "jpeg", "webp")

    def pixels(sample: dict[str, bytes]) -> object:
        data = next(sample[kind] for kind in keep if kind in sample)
        return transform(decode_image(data, at_least=SIZE))

    stream = webdataset.WebDataset(urls, shardshuffle=False).map(pixels).slice(images)
    loader = DataLoader(stream, batch_size=32, num_workers=0, collate_fn=list)
    return sum(len(batch) for batch in loader)


def _alternate(contenders: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first round warms files and imports, and is not counted
        for name, work in contenders.items():
            started = time.perf_counter()
            done = work()
            if number:
                rates[name].append(done / (time.perf_counter() - started))
    return rates


def _drawn(folder: Path) -> Path:
    data = make_dataset(folder / "data", IMAGES, per_shard=200)
    index(str(data))
    return data


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", help="an indexed folder; without it a drawn one is used")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args(sys.argv[1:])


if __name__ == "__main__":
    main()
