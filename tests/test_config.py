"""Configs load as written, and every mistake is named where it was made."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf import config_help, config_io
from rlhf.config import RunConfig
from rlhf.config_base import Section
from rlhf.config_judges import LlmSpec, VerifierSpec
from rlhf.config_objective import OBJECTIVES
from rlhf.config_offline import Data, OfflineConfig
from rlhf.config_rollout import Prompts
from rlhf.config_selection import STANDARD_FLOORS
from rlhf.config_yaml import Reader
from rlhf.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

MINIMAL = """\
model:
  path: org/model
prompts:
  train: {path: train.jsonl}
  gate: {path: gate.jsonl}
  final: {path: final.jsonl}
judges:
  panel:
    - name: house
      function: verifiers:score
      dimensions: [correctness, style]
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(dedent(text), encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL, "base.yaml")


def errors(paths: Sequence[Path], *overrides: tuple[str, str]) -> list[str]:
    with pytest.raises(InputError) as caught:
        config_io.load(paths, overrides)
    return str(caught.value).splitlines()


def error(base: Path, text: str) -> str:
    """The only error of `text` laid over a valid config."""
    lines = errors([base, write(base.parent, text)])
    assert len(lines) == 1, lines
    return lines[0].replace(f"{base.parent}/", "")


def test_the_defaults_are_the_practice_users_start_from(base: Path) -> None:
    config = config_io.load([base])
    assert (config.rollout.samples_per_prompt, config.rollout.temperature) == (8, 0.7)
    assert (config.rollout.top_p, config.objective.beta, config.learner.epochs) == (0.9, 0.2, 1)
    assert config.learning_rate == 1e-4
    assert config_io.load([base], [("model.tuning", "full")]).learning_rate == 5e-6
    assert config.floors == {"correctness": 0.60}
    floors = {"correctness": 0.60, "groundedness": 0.55, "problem_solution": 0.60}
    assert floors == STANDARD_FLOORS
    assert config.selection.min_margin == 0.05


@pytest.mark.parametrize(
    "placement", ["{kind: local}", "{kind: ray}", "{kind: ray, colocate: true}"]
)
def test_generators_that_share_places_with_the_learner_draw_nothing_ahead(
    base: Path, placement: str
) -> None:
    found = error(base, f"rounds: {{max_staleness: 1}}\nplacement: {placement}")
    assert "need places of their own: placement.kind ray and colocate false" in found


def test_files_merge_left_to_right_and_overrides_last(base: Path, tmp_path: Path) -> None:
    second = write(
        tmp_path,
        """\
        rollout: {temperature: 0.9, top_p: 0.8}
        selection: {floors: {correctness: 0.5}}
        judges: {panel: [{name: other, function: "a:b", dimensions: [correctness]}]}
        """,
        "second.yaml",
    )
    third = write(tmp_path, "rollout: {top_p: 1}", "third.yaml")
    config = config_io.load([base, second, third], [("rollout.temperature", "0.3")])
    assert (config.rollout.temperature, config.rollout.top_p) == (0.3, 1.0)
    assert [judge.name for judge in config.judges.panel] == ["other"], "lists replace"
    assert config.model.path == "org/model", "what later files don't name stays"


def test_an_empty_file_changes_nothing(base: Path, tmp_path: Path) -> None:
    for text in ("", "# only a comment\n", "---\n"):
        assert config_io.load([base, write(tmp_path, text)]) == config_io.load([base])


@pytest.mark.parametrize("text", ["5e-6", "5E-06", "0.000005", "5.0e-6"])
def test_floats_without_a_dot_are_numbers(base: Path, text: str) -> None:
    assert config_io.load([base], [("learner.learning_rate", text)]).learning_rate == 5e-6
    path = write(base.parent, f"learner: {{learning_rate: {text}}}")
    assert config_io.load([base, path]).learning_rate == 5e-6


@given(value=st.floats(min_value=1e-300, max_value=1e300))
@settings(max_examples=50, deadline=None)
def test_every_float_that_python_prints_is_read_back(value: float) -> None:
    overrides = [
        ("model.path", "m"),
        *((f"prompts.{split}.path", "p") for split in ("train", "gate", "final")),
        ("judges.panel", "[{name: j, function: 'a:b', dimensions: [correctness]}]"),
        ("learner.max_grad_norm", repr(value)),
    ]
    assert config_io.load([], overrides).learner.max_grad_norm == value


@pytest.mark.slow
@given(
    text=st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), min_size=1)
)
@settings(max_examples=100, deadline=None)
def test_text_given_as_an_override_is_taken_as_it_stands(text: str) -> None:
    reader = Reader(lambda line: "here")
    node = config_io._override("model.path", text, reader, RunConfig)
    assert node is not None and node.value == text and not reader.problems


def test_overrides_reach_text_null_lists_mappings_and_list_items(base: Path) -> None:
    config = config_io.load(
        [base],
        [
            ("run.name", "7"),
            ("model.revision", "1e5"),
            ("prompts.template", "{prompt} # {context}"),
            ("prompts.system", "null"),
            ("model.lora.target_modules", "[q_proj, v_proj]"),
            ("selection.weights", "{correctness: 1}"),
            ("selection.floors.correctness", "0.7"),
            ("judges.panel.0.name", "renamed"),
            ("prompts.train.columns.prompt", "question"),
        ],
    )
    assert (config.run.name, config.model.revision) == ("7", "1e5")
    assert (config.prompts.template, config.prompts.system) == ("{prompt} # {context}", None)
    assert config.model.lora.target_modules == ["q_proj", "v_proj"]
    assert (config.weights, config.floors) == ({"correctness": 1.0}, {"correctness": 0.7})
    assert config.judges.panel[0].name == "renamed"
    (judge,) = config.judges.panel
    assert isinstance(judge, VerifierSpec) and judge.function == "verifiers:score"
    assert config.prompts.train.columns == {"prompt": "question"}


def test_an_unknown_key_names_file_line_and_the_likely_one(base: Path) -> None:
    assert error(base, "run: {seed: 1}\nrollout:\n  top_p: 1\n  temprature: 0.7\n") == (
        "unknown key rollout.temprature (run.yaml:4); did you mean temperature?"
    )
    assert error(base, "rolout: {temperature: 1}") == (
        "unknown key rolout (run.yaml:1); did you mean rollout?"
    )
    assert error(base, "objective:\n  epochs: 2") == (
        "unknown key objective.epochs (run.yaml:2); did you mean learner.epochs?"
    )


def test_an_unknown_key_is_found_at_any_depth(base: Path) -> None:
    text = """\
    judges:
      panel:
        - name: house
          function: "a:b"
          dimensions: [correctness]
          functon: "a:c"
    """
    found = error(base, text)
    assert found == "unknown key judges.panel.0.functon (run.yaml:6); did you mean function?"
    nested = error(base, "model:\n  lora:\n    rnk: 8\n")
    assert nested == "unknown key model.lora.rnk (run.yaml:3); did you mean rank?"


def test_an_unknown_override_names_the_flag(base: Path) -> None:
    (found,) = errors([base], ("rollout.temprature", "0.7"))
    assert found.startswith("unknown key rollout.temprature (command line: --rollout.temprature); ")
    assert found.endswith("did you mean temperature?")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rollout: {temperature: 3}", ["rollout.temperature", "> 0 and <= 2", "found 3", "0.7"]),
        ("selection: {floors: {correctness: 1.1}}", ["floors.correctness", "<= 1", "found 1.1"]),
        ("learner: {epochs: true}", ["learner.epochs", "a whole number >= 1", "found true"]),
        ("learner: {epochs: 1.0}", ["learner.epochs", "a whole number", "found 1.0"]),
        ("learner: {epochs: 1e1}", ["learner.epochs", "a whole number", "found 10.0"]),
        ("rollout: {top_p: true}", ["rollout.top_p", "a number", "found true"]),
        ('rollout: {top_p: "0.5"}', ["a number", 'found "0.5"', "without quotes"]),
        ("learner: {epochs: 010}", ["learner.epochs", 'found "010"', "default, 1"]),
        ("learner: {epochs: 1:30}", ["learner.epochs", 'found "1:30"']),
        ("run: {name: 7}", ["run.name", "text", "found 7", "quotes"]),
        ("run: {name: no}", ["run.name", "text", "found false", "quotes"]),
        ("run: {name: a/b}", ["run.name", "matching", 'found "a/b"']),
        ("tracking: {plain: 1}", ["tracking.plain", "true or false", "found 1"]),
        ("rollout: {engine: vlm}", ["rollout.engine", "one of auto, vllm", "did you mean vllm?"]),
        ("rollout:\n", ["rollout", "a mapping of settings", "found null", "defaults"]),
        ("judges: {panel: []}", ["judges.panel", "a list", "found []"]),
        ("selection: {max_pairs: 0}", ["selection.max_pairs", ">= 1 or null", "found 0"]),
        ("model: {lora: {target_modules: 3}}", ["lora.target_modules", "all-linear or a list"]),
        (
            "learner: {max_grad_norm: .inf}",
            ["learner.max_grad_norm", "a number > 0", 'found ".inf"'],
        ),
        (
            "learner: {max_grad_norm: .nan}",
            ["learner.max_grad_norm", "a number > 0", 'found ".nan"'],
        ),
        ("learner: {max_grad_norm: 1e999}", ["learner.max_grad_norm", 'found "1e999"', "finite"]),
    ],
)
def test_a_wrong_value_names_field_rule_value_place_and_remedy(
    base: Path, text: str, parts: list[str]
) -> None:
    found = error(base, text)
    assert [part for part in [*parts, "(run.yaml:1); "] if part not in found] == [], found


LLM = """\
judges:
  panel:
    - kind: llm
      name: reader
      model: org/judge
      dimensions: [correctness, style]
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "      kind: lm",
            "judges.panel.0.kind must be one of verifier, llm, reward_model, recorded, ensemble, "
            'found "lm" (run.yaml:4)',
        ),
        ("      kind: [llm]", ', found ["llm"] (run.yaml:4)'),
        ("      functon: a:b", "unknown key judges.panel.0.functon (run.yaml:6); did you mean fun"),
        (
            "      one_call: all",
            "unknown key judges.panel.0.one_call (run.yaml:6); known here: name",
        ),
    ],
)
def test_a_judge_is_read_as_the_kind_that_it_names(base: Path, text: str, said: str) -> None:
    entry = "judges:\n  panel:\n    - name: house\n{}      dimensions: [style]\n{}"
    first = f"{text}\n" if "kind" in text else "      function: a:b\n"
    last = "" if "kind" in text else f"{text}\n"
    assert said in error(base, entry.format(first, last))


def test_a_judge_without_a_kind_is_a_verifier(base: Path) -> None:
    (judge,) = config_io.load([base]).judges.panel
    (again,) = config_io.load([base], [("judges.panel.0.kind", "verifier")]).judges.panel
    assert judge == again and isinstance(judge, VerifierSpec)


def test_a_nested_mistake_in_one_kind_is_placed_and_overrides_reach_it(base: Path) -> None:
    wrong = f"{LLM}      traffic:\n        timeout_second: 3\n"
    assert error(base, wrong) == (
        "unknown key judges.panel.0.traffic.timeout_second (run.yaml:8); "
        "did you mean timeout_seconds?"
    )
    flags = [("judges.panel.0.traffic.concurrency", "3"), ("judges.panel.0.model", "7")]
    (judge,) = config_io.load([base, write(base.parent, LLM)], flags).judges.panel
    assert isinstance(judge, LlmSpec)
    assert (judge.model, judge.traffic.concurrency, judge.mode) == ("7", 3, "pointwise")


def test_a_key_in_place_of_its_variable_s_name_is_refused_unseen(base: Path) -> None:
    pasted = "sk-proj-4f4f4f4f4f4f4f4f4f4f4f4f"
    found = error(base, f"{LLM}      traffic: {{api_key_env: {pasted}}}\n")
    assert "judges.panel.0.traffic.api_key_env must be text matching" in found
    assert pasted not in found


def test_a_pairwise_score_holds_no_floor_and_no_gate(base: Path) -> None:
    pairwise = write(base.parent, f"{LLM}      mode: pairwise\n", "pairwise.yaml")
    (found,) = errors([base, pairwise])
    assert "every judge of judges.panel is pairwise" in found
    config = config_io.load([base, pairwise], [("gates.max_kl", "8")])
    assert (config.floors, config.gated) == ({}, ())
    assert config.protected == {"correctness": 0.0}, "comparing two answers is what it can do"
    for key, value in (("selection.floors", "{style: 0.5}"), ("gates.dimensions", "[style]")):
        (found,) = errors([base, pairwise], ("gates.max_kl", "8"), (key, value))
        assert found.startswith(f"{key} names ['style'], scored by a pairwise judge"), found


def test_rules_between_settings_point_to_the_setting_or_the_section(base: Path) -> None:
    assert error(base, "rollout:\n  top_p: 1\n  samples_per_prompt: 1\n") == (
        "rollout.samples_per_prompt must be at least 2 to form a pair, got 1 (run.yaml:3)"
    )
    assert (
        "(command line: --rollout.samples_per_prompt)"
        in errors([base], ("rollout.samples_per_prompt", "1"), ("rollout.top_p", "1"))[0]
    )
    both = error(base, "run: {seed: 1}\nprompts:\n  gate:\n    dataset: x\n")
    assert both.startswith("prompts.gate: give exactly one of path, dataset, function")
    assert both.endswith("(run.yaml:3)")
    unknown = error(base, "selection:\n  min_margin: 0\n  weights: {tone: 1}\n")
    assert unknown.startswith("selection.weights names ['tone'], which no judge")
    assert unknown.endswith("(run.yaml:3)")


def test_a_leash_that_moves_needs_a_bound_on_the_drift(base: Path) -> None:
    assert error(base, "rounds:\n  reference: round_start\n") == (
        "rounds.reference round_start needs gates.max_kl: its leash moves with the policy, so "
        "drift from the start must be bounded by a gate (run.yaml:2)"
    )
    bounded = write(base.parent, "rounds: {reference: round_start}\ngates: {max_kl: 9}\n")
    assert config_io.load([base, bounded]).gates.max_kl == 9


def test_a_bound_on_the_length_that_no_answer_reaches_is_refused(base: Path) -> None:
    text = "rollout:\n  max_new_tokens: 64\ngates:\n  max_length: 64\n"
    found = error(base, text)
    assert found.startswith(
        "gates.max_length must be below rollout.max_new_tokens 64, got 64: no answer is longer"
    )
    bounded = write(base.parent, text.replace("max_length: 64", "max_length: 63"))
    assert config_io.load([base, bounded]).gates.max_length == 63


def test_a_missing_setting_names_what_it_must_be(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  revision: abc\n")
    lines = errors([path])
    assert f"model.path is missing ({path}:1); it must be text" in lines
    assert f"judges is missing ({path}); it must be a mapping of settings" in lines


def test_all_errors_are_reported_together_one_a_line(base: Path) -> None:
    text = "rollout: {temprature: 1, top_p: 3}\nlearner: {epochs: x}\nrun: {seed: 1, seed: 2}\n"
    lines = errors([base, write(base.parent, text)], ("gates.max_drop", "2"))
    for field in ("rollout.temprature", "rollout.top_p", "learner.epochs", "run.seed", "max_drop"):
        assert sum(field in line for line in lines) == 1, (field, lines)
    assert len(lines) == 5


def test_a_key_given_twice_names_both_lines(base: Path) -> None:
    assert error(base, "rollout:\n  top_p: 1\n  engine: auto\n  top_p: 0.5\n") == (
        "rollout.top_p is given twice (run.yaml:2 and run.yaml:4); keep one"
    )
    assert "run is given twice (run.yaml:1 and run.yaml:2)" in error(base, "run: {}\nrun: {}\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rollout:\n  engine: [auto\n", 3),
        ("a: b: c\n", 1),
        ("rollout:\n\ttop_p: 1\n", 2),
        ("run: {}\n---\nrun: {}\n", 2),
        ("run:\n  name: *nowhere\n", 2),
        ("run: {name: !!python/name:os.system x}", 1),
        ("run: {name: \x01}", 1),
    ],
)
def test_invalid_yaml_names_file_and_line(base: Path, text: str, line: int) -> None:
    found = error(base, text)
    assert found.startswith(f"invalid YAML (run.yaml:{line}): "), found


def test_an_alias_to_itself_is_an_error(base: Path) -> None:
    assert error(base, "model: {lora: {target_modules: &a [*a]}}") == (
        "invalid YAML (run.yaml:1): model.lora.target_modules.0 is an alias to itself; correct it"
    )


def test_a_file_that_is_no_mapping_or_not_there_is_an_error(base: Path, tmp_path: Path) -> None:
    assert "must hold a mapping of sections, found [1, 2] (run.yaml:1)" in error(base, "[1, 2]")
    missing = tmp_path / "nope.yaml"
    assert errors([base, missing]) == [f"config file {missing} does not exist; check the path"]
    assert "can't be read" in errors([tmp_path])[0]
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in errors([binary])[0]


def test_a_missing_file_is_not_reported_as_missing_settings(tmp_path: Path) -> None:
    assert len(errors([tmp_path / "nope.yaml"])) == 1


def test_a_dump_loads_to_the_same_behaviour(base: Path, tmp_path: Path) -> None:
    config = config_io.load([base], [("learner.warmup_share", "1e-7"), ("prompts.system", "yes")])
    again = config_io.load([write(tmp_path, config_io.dump(config))])
    assert config_io.dump(again) == config_io.dump(config)
    assert config_io.config_hash(again) == config_io.config_hash(config)
    assert again.prompts.system == "yes"
    for name in ("weights", "floors", "protected", "gated", "needed", "learning_rate"):
        assert getattr(again, name) == getattr(config, name), name


def test_a_dump_keeps_field_order_and_resolves_defaults(base: Path) -> None:
    shown = yaml.safe_load(config_io.dump(config_io.load([base])))
    assert list(shown) == list(RunConfig.model_fields)
    assert shown["selection"]["weights"] == {"correctness": 0.4, "style": 0.1}
    assert shown["gates"]["dimensions"] == ["correctness"]
    assert float(shown["learner"]["learning_rate"]) == 1e-4


NEUTRAL_CHANGES = [
    ("run.name", "other"),
    ("run.directory", "elsewhere"),
    ("rounds.count", "9"),
    ("tracking.plain", "true"),
    ("tracking.log_steps", "7"),
    ("learner.checkpoint_steps", "3"),
    ("rollout.gpu_memory_share", "0.8"),
    ("rollout.memory_gib", "2"),
    ("rollout.transfer", "disk"),
    ("judges.panel.0.traffic.max_calls", "1000"),
]


def test_the_hash_ignores_what_cannot_change_results(base: Path) -> None:
    paths = [base, write(base.parent, LLM)]
    one, other = config_io.load(paths), config_io.load(paths, NEUTRAL_CHANGES)
    assert config_io.config_hash(one) == config_io.config_hash(other)
    assert config_io.difference(config_io.resolved(one), config_io.resolved(other)) == []


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("run.seed", "1", "run.seed: 0 -> 1"),
        ("rollout.max_concurrency", "4", "rollout.max_concurrency: 128 -> 4"),
        ("rounds.reference", "round_start", 'rounds.reference: "initial" -> "round_start"'),
        ("gates.max_kl", "8", "gates.max_kl: 9.0 -> 8.0"),
        ("judges.panel.0.name", "x", 'judges.panel.0.name: "house" -> "x"'),
        ("model.tuning", "qlora", 'model.tuning: "lora" -> "qlora"'),
        ("prompts.gate.columns.prompt", "q", 'prompts.gate.columns.prompt: (absent) -> "q"'),
    ],
)
def test_the_hash_and_the_difference_show_what_may(
    base: Path, key: str, value: str, line: str
) -> None:
    bounded = [("gates.max_kl", "9")]
    one = config_io.load([base], bounded)
    other = config_io.load([base], [*bounded, (key, value)])
    assert config_io.config_hash(one) != config_io.config_hash(other)
    assert line in config_io.difference(config_io.resolved(one), config_io.resolved(other))


def test_writing_a_default_out_changes_no_hash(base: Path) -> None:
    plain = config_io.load([base])
    spelled = config_io.load(
        [base], [("learner.learning_rate", "1e-4"), ("selection.floors", "{correctness: 0.6}")]
    )
    assert config_io.config_hash(plain) == config_io.config_hash(spelled)


def test_every_neutral_name_is_a_setting_or_a_section() -> None:
    leaves = list(config_help.leaves())
    for name in config_io.NEUTRAL:
        assert any(f"{leaf}.".startswith(f"{name}.") for leaf in leaves), name


def test_the_reference_describes_every_setting() -> None:
    text = config_help.describe()
    for root in (RunConfig, OfflineConfig):
        for name in config_help.leaves(root):
            assert f"- `{name}`: " in text, name
    run, offline = text.split("# Settings of `pairloop dpo`")
    assert "`learner.validation_share`: a number >= 0 and < 1; default 0.0." in run
    assert "`learner.validation_share`: a number > 0 and < 1; default 0.1." in offline
    assert offline.count("- `") == len(Data.model_fields) + 1
    assert "`rollout.temperature`: a number > 0 and <= 2; default 0.7." in text
    assert "Varied enough to differ" in text
    assert "`model.path`: text; required." in text


LOOP_ALONE = ("online_dpo", "stages", "stage_base", "watch_stages", "local", "judging", "summary")
"""Modules that no training on a file runs, and that read what it must read by itself."""


@pytest.mark.parametrize(("root", "without"), [(RunConfig, ()), (OfflineConfig, LOOP_ALONE)])
def test_every_key_has_a_reader(root: type[Section], without: tuple[str, ...]) -> None:
    """A setting that no code reads is a promise that nobody keeps."""
    read = {
        node.attr
        for room in ("rlhf", "rollout", "launch")
        for path in (ROOT / room).rglob("*.py")
        if not path.name.startswith("config") and path.stem not in without
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # An objective's function takes its settings by name; the weight is read with its default in.
    read |= {setting for needs in OBJECTIVES.values() for setting in needs.settings}
    read |= {"sft_weight"} if "sft" in read else set()
    unread = [name for name in config_help.leaves(root) if name.rsplit(".", 1)[-1] not in read]
    assert unread == []


@pytest.mark.parametrize("template", ["{prompt[text]}", "{prompt.text}", "{question}", "{0}", "{"])
def test_a_template_of_other_fields_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template may use {prompt} and {context} only"):
        Prompts.model_validate(
            {split: {"path": "p"} for split in ("train", "gate", "final")} | {"template": template}
        )
