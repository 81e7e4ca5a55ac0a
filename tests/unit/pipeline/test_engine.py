"""The pipeline runner: substitution, records, resumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from isthmus.errors import ConfigError
from isthmus.pipeline import console, engine, steps
from isthmus.pipeline.engine import load_pipeline, run_pipeline, substitute


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Two step kinds that record what they were asked and leave a file."""
    seen: list[dict] = []
    monkeypatch.chdir(tmp_path)

    def work(_, options):
        seen.append(dict(options))
        Path(f"made-{options.get('n')}").touch()
        return {"value": len(seen), "url": f"made-{options.get('n')}"}

    for kind in ("fetch", "index"):
        monkeypatch.setitem(engine.STEPS, kind, work)
        monkeypatch.delitem(steps.OPTIONS, kind)
    return seen


def pipeline_file(tmp_path: Path, **changes) -> Path:
    steps = [
        {"id": "first", "run": "fetch", "options": {"n": "${seed}"}},
        {"id": "second", "run": "index", "options": {"from": "${first.url}", "n": 2}},
    ]
    spec = {"name": "p", "out": str(tmp_path / "out"), "params": {"seed": 7}, "steps": steps} | changes
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def test_results_of_earlier_steps_flow_into_later_ones(tmp_path, calls):
    results = run_pipeline(pipeline_file(tmp_path))
    assert calls == [{"n": 7}, {"from": "made-7", "n": 2}]
    assert results["second"]["url"] == "made-2"


def test_a_finished_step_is_not_run_again(tmp_path, calls):
    path = pipeline_file(tmp_path)
    first = run_pipeline(path)
    again = run_pipeline(path)
    assert len(calls) == 2
    assert again["first"]["value"] == first["first"]["value"]


def test_a_step_whose_output_was_taken_away_is_run_again(tmp_path, calls):
    path = pipeline_file(tmp_path)
    run_pipeline(path)
    Path("made-7").unlink()
    results = run_pipeline(path)
    # What it found is another thing (its value counts the calls), so the second one, asked the same, follows.
    assert [c["n"] for c in calls] == [7, 2, 7, 2] and results["second"]["value"] == 4


def test_a_mistyped_parameter_is_named_with_its_neighbour(tmp_path, calls):
    with pytest.raises(ConfigError, match=r"no parameter 'sede'\. Did you mean 'seed'"):
        run_pipeline(pipeline_file(tmp_path), ["sede=1"])
    assert calls == []
    assert load_pipeline(pipeline_file(tmp_path), ["out=elsewhere"]).out == "elsewhere"


def test_a_changed_parameter_reruns_the_steps_that_follow_from_it(tmp_path, calls):
    path = pipeline_file(tmp_path)
    run_pipeline(path)
    run_pipeline(path, ["seed=8"])
    assert calls[2:] == [{"n": 8}, {"from": "made-8", "n": 2}]


def test_an_interrupted_pipeline_goes_on_at_the_step_that_was_cut(tmp_path, calls, monkeypatch):
    path = pipeline_file(tmp_path)
    monkeypatch.setitem(engine.STEPS, "index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(path)
    monkeypatch.setitem(engine.STEPS, "index", lambda _, o: calls.append(dict(o)) or {"value": 0})
    run_pipeline(path)
    assert calls == [{"n": 7}, {"from": "made-7", "n": 2}]


def test_a_torn_record_is_no_record(tmp_path, calls):
    path = pipeline_file(tmp_path)
    run_pipeline(path)
    record = tmp_path / "out" / "steps" / "first.json"
    record.write_text(record.read_text()[:20])
    run_pipeline(path)
    assert [c["n"] for c in calls][2] == 7


def test_fresh_forgets_the_records(tmp_path, calls):
    path = pipeline_file(tmp_path)
    run_pipeline(path)
    run_pipeline(path, fresh=True)
    assert len(calls) == 4


def test_records_are_json_with_the_seconds_taken(tmp_path, calls):
    run_pipeline(pipeline_file(tmp_path))
    record = json.loads((tmp_path / "out" / "steps" / "second.json").read_text())
    assert record["seconds"] >= 0 and record["run"] == "index"


def test_an_unknown_reference_names_what_is_known():
    with pytest.raises(ConfigError, match=r"stage1\.uri"):
        substitute("${stage1.url}", {"stage1.uri": "x"})


def test_a_whole_reference_keeps_its_type():
    assert substitute({"a": "${n}", "b": "x${n}"}, {"n": 3}) == {"a": 3, "b": "x3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [{"id": "a", "run": "fetsch"}]}, "Did you mean 'fetch'"),
        ({"steps": [{"id": "a", "run": "fetch"}, {"id": "a", "run": "index"}]}, "more than once"),
        ({"stepz": []}, "Did you mean 'steps'"),
    ],
)
def test_a_wrong_pipeline_file_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_pipeline(pipeline_file(tmp_path, **change))


def test_a_pipeline_that_extends_another_changes_what_it_names(tmp_path, calls):
    pipeline_file(tmp_path)
    longer = tmp_path / "longer.yaml"
    longer.write_text("extends: p.yaml\nname: longer\nparams: {extra: 1}\n")
    pipeline = load_pipeline(longer, ["seed=9"])
    assert (pipeline.name, pipeline.params, len(pipeline.steps)) == ("longer", {"seed": 9, "extra": 1}, 2)


def test_records_are_files_of_a_folder_that_stays(tmp_path, calls, monkeypatch):
    with pytest.raises(ConfigError, match=r"'out' of a pipeline is s3://bucket/x"):
        run_pipeline(pipeline_file(tmp_path), ["out=s3://bucket/x"])
    scratch = tmp_path / "runtime_resources" / "working_dir_files" / "job"
    scratch.mkdir(parents=True)
    monkeypatch.chdir(scratch)
    with pytest.raises(ConfigError, match="a folder that Ray deletes"):
        run_pipeline(pipeline_file(tmp_path), ["out=runs/x"])
    assert not calls and not list(scratch.iterdir())


def test_times_alone_are_nothing_else(tmp_path, calls, monkeypatch):
    monkeypatch.setitem(engine.STEPS, "fetch", lambda _, o: {"url": str(tmp_path), "seconds": len(calls), "images": 3})
    monkeypatch.setitem(engine.STEPS, "index", lambda _, o: calls.append(o) or {"url": str(tmp_path)})
    path = pipeline_file(tmp_path)
    run_pipeline(path)
    (tmp_path / "out" / "steps" / "first.json").unlink()
    run_pipeline(path)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"id": "c", "run": "train", "recipe": "gone.yaml"}, "gone.yaml, which does not exist"),
        ({"id": "c", "run": "index", "options": {"url": "${frist.url}"}}, "Did you mean 'first.url'"),
        ({"id": "c", "run": "index", "says": "${sead}"}, "Did you mean 'seed'"),
        ({"id": "c", "run": "cache", "options": {"data": "x", "out": "y", "actor": 1}}, "Did you mean 'actors'"),
        (
            {"id": "c", "run": "report", "options": {"retrieval": "secund"}},
            "'retrieval' names 'secund', which is no earlier step. Did you mean 'second'",
        ),
    ],
)
def test_what_a_late_step_names_is_checked_before_the_first_one_runs(tmp_path, calls, step, said):
    first = {"id": "first", "run": "fetch", "options": {"n": 1}}
    path = pipeline_file(tmp_path, steps=[first, {"id": "second", "run": "index"}, step])
    (tmp_path / "out" / "steps").mkdir(parents=True)
    (tmp_path / "out" / "steps" / "first.json").write_text("{}")
    with pytest.raises(ConfigError, match=said):
        run_pipeline(path, fresh=True)
    assert not calls and (tmp_path / "out" / "steps" / "first.json").exists(), "nothing is forgotten either"


def test_a_pipeline_that_extends_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nparams:\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_pipeline(tmp_path / "a.yaml")


def test_no_parameters_are_none(tmp_path, calls):
    pipeline_file(tmp_path)
    (tmp_path / "longer.yaml").write_text("extends: p.yaml\nparams:\n")
    assert load_pipeline(tmp_path / "longer.yaml").params == {"seed": 7}


def test_texts_over_a_recipe_stay_as_they_are(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: m\ndata: d\nout: o\nprompt: a\n")
    given = {"prompt": "Question: what? Answer: ", "data": "007", "out": "image #1", "tracking.experiment": "no"}
    found = steps._laid_over(recipe, given)
    assert found == {
        "model": "m", "data": "007", "out": "image #1", "prompt": "Question: what? Answer: ",
        "tracking": {"experiment": "no"},
    }  # fmt: skip


def test_what_looks_like_markup_is_shown(capsys):
    console.announce(1, 2, "step", "[/INST] a cat")
    console.finished(1.0, {"answer": "[/x] a dog"})
    console.reused({"answer": "[bold] a bird"})
    said = capsys.readouterr().err
    assert "[/INST] a cat" in said and "[/x] a dog" in said and "[bold] a bird" in said
