"""The command line: what it starts, what it says, and with which exit code. The work itself is replaced."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isthmus import __version__, cli, ray_session
from isthmus.commands import recipes, shell
from isthmus.contracts import ModelVersion
from isthmus.data.manifest import CheckReport, IndexReport, Problem
from isthmus.errors import ConfigError, DataError, IsthmusError, RegistryError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "transformers", "mlflow", "deepspeed", "pyarrow", "pydantic", "numpy")


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*words: str) -> Ran:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main(words)
        finally:
            signal.signal(signal.SIGTERM, before)
        shown = capfd.readouterr()
        return Ran(int(ended.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Replaces ``module.function`` by one that notes its arguments and answers (or raises) ``answer``; no Ray."""

    @contextmanager
    def no_ray(cpus: float = 0) -> Any:
        yield

    for name in ("run", "data"):
        monkeypatch.setattr(f"isthmus.commands.{name}.ray_session", no_ray)

    def replace(module: str, function: str, answer: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def work(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if isinstance(answer, BaseException):
                raise answer
            return answer() if callable(answer) else answer

        stand_in = ModuleType(module)
        setattr(stand_in, function, work)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return replace


def test_starting_imports_nothing_heavy() -> None:
    code = f"import sys, isthmus.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [
        *(("demo",), ("plan",), ("train",), ("run",), ("evaluate",), ("caption",), ("embed",), ("serve",), ("doctor",)),
        *(("data", "fetch"), ("data", "index"), ("data", "check"), ("data", "stats"), ("data", "cache")),
        *(("data", "prototypes"), ("data", "curate"), ("align", "select")),
        *(("model", "list"), ("model", "show"), ("model", "promote")),
    ],
)
def test_every_command_shows_examples(words: tuple[str, ...], run: Callable[..., Ran]) -> None:
    shown = run(*words, "--help")
    assert shown.code == 0
    assert f"isthmus {' '.join(words)}" in shown.out.split("Examples:")[1]


def test_version(run: Callable[..., Ran]) -> None:
    assert run("--version").out == f"isthmus {__version__}\n"


def test_train_reads_recipe_and_overrides(run: Callable[..., Ran], fake: Any) -> None:
    calls = fake("isthmus.training.driver", "fit", ModelVersion("m", "3", "candidate", "models:/m/3", lineage={"a": 1}))
    ran = run("train", str(ROOT / "pipelines/demo/stage1.yaml"), "train.steps=7", "train.lr=1e-4", "--json")
    assert ran.code == 0, ran.err
    config = calls[0][0][0]
    assert (config.name, config.train.steps, config.train.lr) == ("stage1", 7, 1e-4)
    assert ran.json["uri"] == "models:/m/3"
    assert ran.json["lineage"] == {"a": 1}


@pytest.mark.parametrize(
    ("command", "module", "words", "field"),
    [
        ("caption", "isthmus.inference.caption", ["model=m", "data=d", "out=o", "actors=3"], ("actors", 3)),
        ("embed", "isthmus.inference.embed", ["model=m", "data=d", "out=o", "texts=false"], ("texts", False)),
        ("evaluate", "isthmus.evaluation.driver", ["model=m", "data=d", 'tasks=["captioning"]'], ("model", "m")),
        ("serve", "isthmus.serving.app", ["models.demo=models:/m@a", "port=8001"], ("models", {"demo": "models:/m@a"})),
    ],
)
def test_words_alone_make_a_config(
    command: str, module: str, words: list[str], field: tuple[str, Any], run: Callable[..., Ran], fake: Any
) -> None:
    calls = fake(module, command, {"seen": 1} if command != "serve" else "http://127.0.0.1:8001")
    ran = run(command, *words)
    assert ran.code == 0, ran.err
    assert getattr(calls[0][0][0], field[0]) == field[1]


def test_a_recipe_file_and_words_over_it(run: Callable[..., Ran], fake: Any, away: Path) -> None:
    (away / "c.yaml").write_text("model: m\ndata: d\nout: o\nbatch: 4\n")
    calls = fake("isthmus.inference.caption", "caption", {"captioned": 5})
    assert run("caption", "c.yaml", "batch=8").code == 0
    assert (calls[0][0][0].batch, calls[0][0][0].data) == (8, "d")


@pytest.fixture
def lake(away: Path) -> None:
    """A folder that has a shard and is indexed, as far as a look from outside tells."""
    (away / "lake").mkdir()
    for name in ("a.tar", "manifest.json"):
        (away / "lake" / name).touch()


@pytest.mark.usefixtures("lake")
@pytest.mark.parametrize(("faults", "code"), [(0, 0), (2, 2)])
def test_data_check_fails_where_something_is_wrong(run: Callable[..., Ran], fake: Any, faults: int, code: int) -> None:
    problems = tuple(Problem("a.tar", 512 * n, f"k{n}", "the image is damaged") for n in range(faults))
    fake("isthmus.data.manifest", "check", CheckReport(8, 1, problems))
    ran = run("data", "check", "lake")
    assert ran.code == code
    assert ("2 problems found" in ran.out) == bool(faults)


@pytest.mark.usefixtures("lake")
@pytest.mark.parametrize(("faults", "more", "code"), [(0, (), 0), (1, (), 2), (1, ("--skip-faulty",), 0)])
def test_data_index_says_with_its_status_that_something_is_left_out(
    run: Callable[..., Ran], fake: Any, faults: int, more: tuple[str, ...], code: int
) -> None:
    fake("isthmus.data.manifest", "index", IndexReport(8, 1, (Problem("a.tar", 512, "k", "is cut short"),) * faults))
    ran = run("data", "index", "lake", *more)
    assert ran.code == code
    assert ("1 problem left out; the rest is indexed" in ran.out) == bool(faults)


@pytest.mark.usefixtures("lake")
def test_data_index_hands_on_what_was_asked(run: Callable[..., Ran], fake: Any) -> None:
    calls = fake("isthmus.data.manifest", "index", IndexReport(8, 1, (), reused=1))
    assert "reused" in run("data", "index", "lake").out
    run("data", "index", "lake", "lake/a.tar", "--out", "o", "--images-only", "--images-from", "s3://d", "--fresh")
    plain = {"captions": "required", "images_from": (), "fresh": False}
    asked = {"captions": "optional", "images_from": ["s3://d"], "fresh": True}
    assert calls == [(("lake", None), plain), ((["lake", "lake/a.tar"], "o"), asked)]


@pytest.mark.usefixtures("lake")
@pytest.mark.parametrize(
    ("words", "said"), [(("index", "lake"), "nothing at lake"), (("check", "."), "is not indexed")]
)
def test_what_is_not_there_is_told_before_ray_starts(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, away: Path, words: tuple[str, str], said: str
) -> None:
    (away / "lake").rename(away / "moved")
    monkeypatch.setattr("isthmus.commands.data.ray_session", lambda: pytest.fail("Ray was started"))
    ran = run("data", *words)
    assert ran.code == 2 and said in ran.err


@pytest.mark.usefixtures("lake")
def test_faults_stand_in_a_table_of_their_own_that_is_cut(run: Callable[..., Ran], fake: Any) -> None:
    problems = tuple(Problem("a.tar", 512 * n, f"k{n}", "is [cut] short") for n in range(shell._ROWS + 5))
    fake("isthmus.data.manifest", "index", IndexReport(8, 1, problems))
    shown = run("data", "index", "lake").out
    assert shown.count("is [cut] short") == shell._ROWS and "and 5 more" in shown and "offset" in shown
    assert len(run("data", "index", "lake", "--json").json["problems"]) == shell._ROWS + 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), (["pipelines/demo.yaml"], [], False)),
        (("--seed", "3", "--fresh"), (["pipelines/demo.yaml"], ["seed=3", "out=runs/demo-seed3"], True)),
    ],
)
def test_demo(words: tuple[str, ...], expected: Any, run: Callable[..., Ran], fake: Any) -> None:
    calls = fake("isthmus.pipeline", "run_pipeline", {"fetch": {"train": 10}})
    ran = run("demo", *words)
    assert ran.code == 0, ran.err
    (pipeline, overrides), options = calls[0]
    assert pipeline.endswith(expected[0][0])
    assert (overrides, options["fresh"]) == expected[1:]
    assert ran.out.split()[-2:] == ["train", "10"], "the last step's result; all of them with --json"


def test_data_cache_takes_the_encoder_of_a_recipe(run: Callable[..., Ran], fake: Any) -> None:
    calls = fake("isthmus.data.features", "build_cache", {"samples": 9})
    recipe = str(ROOT / "pipelines/demo/stage1.yaml")
    assert run("data", "cache", "d", "o", "image_size=96", "--recipe", recipe, "--actors", "1").code == 0
    (data, out, vision), options = calls[0]
    assert (data, out, vision.name, vision.image_size, options["actors"]) == ("d", "o", "tf_efficientnet_lite0", 96, 1)


def test_model_commands(run: Callable[..., Ran], fake: Any) -> None:
    calls = fake("isthmus.registry.store", "list_models", [{"name": "demo-stage1", "version": 2}])
    ran = run("model", "list", "--tracking", "sqlite:///x.db", "--json")
    assert ran.json == {"models": [{"name": "demo-stage1", "version": 2}]}
    assert calls[0][0][0].uri == "sqlite:///x.db"
    table = run("model", "list").out
    assert "demo-stage1" in table
    assert "name" in table
    promoted = fake("isthmus.registry.store", "promote", ModelVersion("m", "2", "production", "models:/m/2"))
    assert run("model", "promote", "models:/m@candidate", "production").code == 0
    assert promoted[0][0][:2] == ("models:/m@candidate", "production")


def test_json_keeps_standard_output_for_the_result(run: Callable[..., Ran], fake: Any) -> None:
    def noisy() -> dict[str, float]:
        print("chatter of a library")
        subprocess.run([sys.executable, "-c", "print('chatter of a child')"], check=True)
        return {"r1": 0.5}

    fake("isthmus.evaluation.driver", "evaluate", noisy)
    ran = run("evaluate", "--json", "model=m", "data=d")
    assert ran.json == {"r1": 0.5}
    assert "chatter of a library" in ran.err
    assert "chatter of a child" in ran.err
    assert "chatter" in run("evaluate", "model=m", "data=d").out


def test_a_user_error_is_two_sentences_and_exit_2(run: Callable[..., Ran], fake: Any) -> None:
    fake(
        "isthmus.evaluation.driver", "evaluate", DataError("There is no manifest at d.", "Run `isthmus data index d`.")
    )
    ran = run("evaluate", "model=m", "data=d")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: There is no manifest at d. Run `isthmus data index d`.\n"
    machine = run("evaluate", "model=m", "data=d", "--json")
    assert machine.json == {"error": "There is no manifest at d.", "mend": "Run `isthmus data index d`."}
    assert machine.code == 2


def test_debug_shows_the_traceback(run: Callable[..., Ran], fake: Any) -> None:
    fake("isthmus.evaluation.driver", "evaluate", ZeroDivisionError("division by zero"))
    short = run("evaluate", "model=m", "data=d")
    assert short.code == 1
    assert "ZeroDivisionError: division by zero" in short.err
    assert "--debug" in short.err
    assert "Traceback" not in short.err
    assert "Traceback" in run("evaluate", "model=m", "data=d", "--debug").err


def test_interruption_is_exit_130_with_a_sentence(run: Callable[..., Ran], fake: Any) -> None:
    fake("isthmus.evaluation.driver", "evaluate", KeyboardInterrupt())
    ran = run("evaluate", "model=m", "data=d")
    assert ran.code == 130
    assert "goes on where it was" in ran.err


def test_a_terminated_process_ends_as_an_interrupted_one(run: Callable[..., Ran], fake: Any) -> None:
    fake("isthmus.evaluation.driver", "evaluate", lambda: signal.raise_signal(signal.SIGTERM))
    assert run("evaluate", "model=m", "data=d").code == 130


def test_wrong_usage_is_exit_2(run: Callable[..., Ran]) -> None:
    assert run("frobnicate").code == 2
    assert run("data", "fetch", "--limit", "0").code == 2


def test_a_misspelt_key_names_the_right_one(run: Callable[..., Ran]) -> None:
    ran = run("caption", "model=m", "data=d", "out=o", "num_beam=3")
    assert ran.code == 2
    assert "Did you mean 'num_beams'?" in ran.err


def test_every_fault_of_a_recipe_is_listed(run: Callable[..., Ran]) -> None:
    ran = run("caption", "model=m")
    assert "'data' is missing" in ran.err
    assert "'out' is missing" in ran.err


def test_the_error_inside_a_worker_is_found() -> None:
    inner = RegistryError("No model is called 'x'.")
    wrapped = RuntimeError("task failed")
    wrapped.cause = inner  # type: ignore[attr-defined]
    group = RuntimeError("training failed")
    group.worker_failures = {0: wrapped}  # type: ignore[attr-defined]
    assert shell.user_error(group) is inner
    chained = ValueError("outer")
    chained.__cause__ = inner
    assert shell.user_error(chained) is inner
    assert shell.user_error(ValueError("plain")) is None


def test_the_error_inside_a_ray_task_is_found() -> None:
    from ray.exceptions import RayTaskError

    remote = RayTaskError("f", "Traceback: long", ConfigError("The key is wrong.", "Mend it.")).as_instanceof_cause()
    found = shell.user_error(remote)
    assert found is not None
    assert (found.problem, found.mend) == ("The key is wrong.", "Mend it.")


def test_first_word_is_a_recipe_or_an_override(away: Path) -> None:
    assert recipes.split(["a.yaml", "x=1"]) == ("a.yaml", ["x=1"])
    assert recipes.split(["x=1"]) == (None, ["x=1"])
    (away / "odd=name.yaml").touch()
    assert recipes.split(["odd=name.yaml", "x=1"]) == ("odd=name.yaml", ["x=1"])


def test_a_cluster_that_does_not_answer_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound and not listening: nobody answers
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
        for written in (address, f"ray://{address}"):
            monkeypatch.setenv("RAY_ADDRESS", written)
            with pytest.raises(IsthmusError, match=f"{address} does not answer"), ray_session.ray_session():
                pass


def test_a_start_that_fails_is_tried_again_and_then_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    tries: list[int] = []

    def fail(**_: Any) -> None:
        tries.append(1)
        if len(tries) != 5:
            raise RuntimeError("Failed to start GCS.\n Last 0 lines")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(IsthmusError, match=r"Ray does not start on this machine: Failed to start GCS\. "):
        ray_session.begin()
    assert len(tries) == ray_session.ATTEMPTS == 3
    assert ray_session.begin(), "the second attempt of this one succeeds"


def test_a_local_cluster_stays_on_loopback_with_room_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked: dict[str, Any] = {}
    ended: list[bool] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", asked.update)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(KeyError), ray_session.ray_session(cpus=40):
        raise KeyError
    assert asked["address"] == "local"
    assert asked["_node_ip_address"] == "127.0.0.1"
    assert asked["include_dashboard"] is False
    assert asked["num_cpus"] >= 44
    assert ended == [True]


def test_a_running_session_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    ended: list[bool] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with ray_session.ray_session():
        pass
    assert ended == [], "it ended a cluster that was not its own"
