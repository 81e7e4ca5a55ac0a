"""Tar to tensor: what it takes to bring photographs from webdataset tars to normalised batches, here and elsewhere.

    python benchmarks/ingest.py --json ingest.json            # drawn photographs, local files and an S3 server
    python benchmarks/ingest.py --data photos/ --no-s3        # tars of one's own

Contenders, on the same bytes, with as many workers as there are cores: the training path on threads and on Ray Data;
webdataset with torch's DataLoader in three ways; Ray's `read_webdataset`; and the floor, our decoder and transform in
a loop over bytes in memory, on as many processes (`bare_loop_alone` is one such loop while the other cores idle).
They take turns; every figure is a median. CPU seconds count all processes of a contender and not the S3 server.
Ratios are of CPU seconds for an image, which other work on the machine disturbs least: above 1 ours takes less.
`ratio_vs_webdataset` is against whichever of webdataset's own two ways took least; both sides then use different
decoders. `..._same_decoder` gives webdataset ours.

`data_wait_share` is from the real training loop: stage 1 with its frozen encoder in the trainer.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _passive  # noqa: F401 - before torch
from _contenders import GROUPS, Setting
from _cpu import Meter
from _photos import write_photos
from rich.console import Console
from rich.table import Table

from isthmus import storage
from isthmus.data.manifest import Manifest, index
from isthmus.data.readers import RawSample, read_rows
from isthmus.data.transforms import decode_image
from isthmus.testing.s3 import environment, s3_server

PEERS = ("webdataset_pil", "webdataset_tensor")
"""webdataset as its users have it."""

MISSING = "webdataset is not installed: pip install 'isthmus[bench]', or pip install webdataset==1.0.2"


def main() -> None:
    """Measure, print, and write the figures where ``--json`` says."""
    options = _options()
    there = importlib.util.find_spec("webdataset") is not None
    skipped = [] if there else [MISSING]
    wanted = {
        group: [name for name in members if not (options.only and name not in options.only)]
        for group, members in GROUPS.items()
        if there or group != "webdataset"
    }
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-ingest-")))
        settings = {"local": _setting(scratch, options)}
        if not options.no_s3:
            try:
                server = stack.enter_context(s3_server())
            except RuntimeError as error:  # its program is missing, or it does not come up
                skipped.append(f"S3: {error}")
            else:
                stack.enter_context(environment(server.environment))
                settings["s3"] = _uploaded(settings["local"], server.url("photos"))
        figures: dict[str, Any] = {
            "images": settings["local"].images, "rounds": options.rounds, "workers": settings["local"].workers,
            "batch": options.batch, "size": options.size, **_of_bytes(settings["local"]),
        }  # fmt: skip
        rows = _rounds({g: names for g, names in wanted.items() if names}, settings, options.rounds)
        figures |= _medians(rows) | _ratios(_medians(rows))
        if not options.no_wait:
            from _data_wait import data_wait

            figures |= data_wait(settings["local"], scratch)
    _print(figures, skipped)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the bytes


def _setting(scratch: Path, options: argparse.Namespace) -> Setting:
    if options.data is None:
        folder = str(write_photos(scratch / "photos", options.images, max(1, options.images // 16)))
        index(folder)
    else:
        folder = str(scratch / "index")
        index(_some_tars(options.data, options.images), folder, captions="optional")
    manifest = Manifest.load(folder)
    shards = tuple(manifest.url(number) for number in range(len(manifest.shards)))
    images = len(manifest) // options.batch * options.batch
    if not images:
        sys.exit(f"{options.data or 'The set'} has {len(manifest)} images, less than a batch of {options.batch}.")
    return Setting(folder, shards, images, options.batch, options.size, options.workers)


def _some_tars(folder: str, images: int) -> list[str]:
    """The first tars that hold so many images. Whole ones: nobody is to read what does not count."""
    tars = [url for url, _ in storage.list_files(folder, (".tar",))] if storage.is_local(folder) else []
    taken, found = [], 0
    for tar in tars:
        if found >= images:
            break
        with tempfile.TemporaryDirectory() as place:
            index([tar], place, captions="optional")
            found += len(Manifest.load(place))
        taken.append(tar)
    return taken or sys.exit(f"{folder} is no local folder with tars.")


def _uploaded(local: Setting, url: str) -> Setting:
    """The same tars in a bucket, indexed there, and for curl by addresses that carry their permission."""
    import botocore.session

    for shard in local.shards:
        storage.write_bytes(storage.join(url, Path(shard).name), storage.read_bytes(shard))
    index(url)
    client = botocore.session.get_session().create_client(
        "s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name=os.environ["AWS_REGION"]
    )
    bucket, _, folder = url.removeprefix("s3://").partition("/")
    addresses = [
        client.generate_presigned_url(
            "get_object", {"Bucket": bucket, "Key": f"{folder}/{Path(shard).name}"}, ExpiresIn=86400
        )
        for shard in local.shards
    ]
    return replace(local, url=url, shards=tuple(addresses))


def _of_bytes(setting: Setting) -> dict[str, float]:
    """What an image weighs, and CPU milliseconds of decoding it: the least of three tries over a batch."""
    manifest = Manifest.load(setting.url)
    lengths = manifest.image_bytes[: setting.images]
    rows = [row.image for row in read_rows(manifest, range(setting.batch)) if isinstance(row, RawSample)]
    tries = []
    for _ in range(3):
        started = time.process_time()
        for data in rows:
            decode_image(data, at_least=setting.size)
        tries.append(1000 * (time.process_time() - started) / len(rows))
    size = round(float(lengths.mean()))
    return {"bytes_per_image": size, "decode_ms": round(min(tries), 3), "shards": len(setting.shards)}


# ------------------------------------------------------------------------------------------------------- the rounds


@dataclass(frozen=True)
class Pass:
    """One contender's way through all images."""

    name: str
    images_per_s: float
    cpu_s_per_image: float


def _rounds(groups: Mapping[str, Sequence[str]], settings: Mapping[str, Setting], rounds: int) -> list[Pass]:
    """Passes of every contender over every place, in turns. The first round starts workers, fills caches and compares
    what the contenders give; it does not count."""
    found: list[Pass] = []
    with ExitStack() as stack:
        hosts = [stack.enter_context(_host(group, names, settings)) for group, names in groups.items()]
        for number in range(rounds + 1):
            for place in settings:
                means = {}
                for names, ask in hosts:
                    for name in names:
                        if not _takes_part(name, place):
                            continue
                        images, seconds, cpu_s, means[name] = ask((place, name))
                        if number:
                            found.append(Pass(f"{place}_{name}", images / seconds, cpu_s / images))
                if not number:
                    _compare(means)
    return found


def _takes_part(name: str, place: str) -> bool:
    """Bytes in memory have no place, and webdataset reads S3 through curl."""
    return place == "local" or not (
        name.startswith("bare_loop") or (name in GROUPS["webdataset"] and not shutil.which("curl"))
    )


def _compare(means: Mapping[str, float]) -> None:
    """Contenders that normalise the same pictures give nearly the same mean; they draw different crops."""
    if max(means.values()) - min(means.values()) > 0.15:
        raise RuntimeError(f"The contenders do not give the same pixels; their means: {means}")


Ask = Callable[[tuple[str, str]], tuple[int, float, float, float]]


@contextmanager
def _host(group: str, names: Sequence[str], settings: Mapping[str, Setting]) -> Iterator[tuple[Sequence[str], Ask]]:
    """A process of its own for contenders that belong together, so that its CPU time is theirs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, group, settings), name=group)
    process.start()
    theirs.close()

    def ask(question: tuple[str, str]) -> tuple[int, float, float, float]:
        ours.send(question)
        try:
            answer = ours.recv()
        except EOFError:
            raise RuntimeError(f"The process of {group} ended at {question}.") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        result: tuple[int, float, float, float] = answer
        return result

    try:
        yield names, ask
    finally:
        ours.close()
        process.join(timeout=60)
        if process.is_alive():
            process.kill()


def _serve(pipe: Connection, group: str, settings: Mapping[str, Setting]) -> None:
    """The other end: answers (place, contender) with images, seconds, CPU seconds and the pixels' mean."""
    import torch

    from isthmus.ray_session import ray_session

    torch.set_num_threads(1)
    contender = functools.cache(lambda place, name: GROUPS[group][name](settings[place]))
    with ray_session() if group == "ray" else nullcontext():
        while True:
            try:
                question = pipe.recv()
            except EOFError:
                return
            try:
                images, total, batches = 0, 0.0, contender(*question)
                with Meter() as meter:
                    for pixels_BCHW in batches():
                        images += len(pixels_BCHW)
                        total += float(pixels_BCHW[:, :, ::16, ::16].mean()) * len(pixels_BCHW)
                pipe.send((images, meter.cost.seconds, meter.cost.cpu_s, total / images))
            except Exception as error:
                pipe.send(f"{question[1]} ({question[0]}): {type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------------- the figures


def _medians(found: Sequence[Pass]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name in dict.fromkeys(one.name for one in found):
        ones = [one for one in found if one.name == name]
        out[f"{name}_images_per_s"] = round(statistics.median(one.images_per_s for one in ones), 1)
        out[f"{name}_cpu_s_per_image"] = round(statistics.median(one.cpu_s_per_image for one in ones), 6)
    return out


def _ratios(medians: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds of the other by ours, of those that took part; the plain names are those of local files."""
    out: dict[str, float] = {}

    def ratio(name: str, others: Sequence[float | None], own: float | None) -> None:
        there = [other for other in others if other is not None]
        if there and own:
            out[name] = round(min(there) / own, 3)

    for place in ("local", "s3"):
        cost = {name: medians.get(f"{place}_{name}_cpu_s_per_image") for group in GROUPS.values() for name in group}
        floor = medians.get("local_bare_loop_cpu_s_per_image")
        theirs = [cost[peer] for peer in PEERS]
        for own, prefix in (("ours", ""), ("ours_on_ray", "ray_")):
            ratio(f"{place}_{prefix}ratio_vs_webdataset", theirs, cost[own])
            ratio(f"{place}_{prefix}ratio_vs_webdataset_same_decoder", [cost["webdataset_our_decoder"]], cost[own])
            ratio(f"{place}_{prefix}ratio_vs_bare_loop", [floor], cost[own])
        ratio(f"{place}_ratio_vs_ray_read_webdataset", [cost["ray_read_webdataset"]], cost["ours_on_ray"])
    plain = {name.removeprefix("local_"): value for name, value in out.items() if name.startswith("local_")}
    return out | plain


def _print(figures: Mapping[str, Any], skipped: Sequence[str]) -> None:
    table = Table("contender", "files", "CPU ms an image", "images/s")
    for name, value in figures.items():
        if name.endswith("_cpu_s_per_image"):
            place, _, who = name.removesuffix("_cpu_s_per_image").partition("_")
            rate = figures[name.replace("_cpu_s_per_image", "_images_per_s")]
            table.add_row(who.replace("_", " "), place, f"{1000 * value:.2f}", f"{rate:.0f}")
    console = Console(width=120)
    console.print(table)
    for name, value in figures.items():
        if not name.endswith(("_cpu_s_per_image", "_images_per_s")):
            console.print(f"{name:44} {value}")
    own, floor = (figures.get(f"local_{who}_cpu_s_per_image") for who in ("ours", "bare_loop"))
    if own and floor:
        console.print(
            f"The floor for an image is {figures['bytes_per_image']} bytes and {1000 * floor:.2f} ms of decoding and "
            f"transforming, {figures['decode_ms']:.2f} of them for the JPEG alone. What is left, "
            f"{1000 * (own - floor):.2f} ms, goes to reading, ordering, threads and batches."
        )
    for reason in skipped:
        console.print(f"Left out: {reason}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FOLDER", help="a local folder of tars; without it photographs are drawn")
    parser.add_argument("--images", type=int, default=2048, help="at most so many (2048)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side (224)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of each contender (cores)")
    parser.add_argument("--only", nargs="+", choices=[name for group in GROUPS.values() for name in group])
    parser.add_argument("--no-s3", action="store_true", help="local files alone")
    parser.add_argument("--no-wait", action="store_true", help="leave out data_wait_share")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    started = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started:.0f} s in all")
