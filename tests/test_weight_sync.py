"""A generator that does not serve what was published to it is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import RunConfig
from rlhf.errors import ParityError
from rlhf.learner import Learner
from rlhf.model_files import prompt_encoder
from rlhf.policy import Policy
from rlhf.protocols import Loaded, Published
from rollout.transformers_generator import TransformersGenerator
from rollout.weight_sync import Serving, check_loaded, parity, weights_sha256, word_of_all

TOLERANCE = 0.08


class Tokens:
    """Log-probs of `count` tokens before and after a policy moved, and how noisy an engine is."""

    def __init__(self, seed: int, count: int, moved: float, noise: float) -> None:
        draw = np.random.default_rng(seed).standard_normal
        self.old = -10 + draw(count)
        self.new = self.old + moved * draw(count)
        self.engine_old = self.old + noise * draw(count)
        self.fresh = self.new + noise * draw(count)
        # A stale engine scores with the weights of before, and rounds in its own way each time.
        self.stale = self.old + noise * draw(count)

    def verdict(self, engine: np.ndarray) -> str:
        return parity(engine, self.new, self.old, self.engine_old, TOLERANCE).verdict


seeds = st.integers(0, 2**32 - 1)
counts = st.integers(80, 600)
steady = settings(deadline=None, derandomize=True)


@given(seed=seeds, count=counts, moved=st.floats(0.001, 0.04))
@steady
def test_fresh_passes_and_stale_fails_however_small_the_change(
    seed: int, count: int, moved: float
) -> None:
    tokens = Tokens(seed, count, moved, noise=moved / 4)
    assert tokens.verdict(tokens.fresh) == "pass"
    # The mean gap alone would let it pass.
    stale = parity(tokens.stale, tokens.new, tokens.old, tokens.engine_old, TOLERANCE)
    assert stale.gap < TOLERANCE
    assert stale.verdict == "fail"
    assert tokens.verdict(tokens.engine_old) == "fail"


@given(seed=seeds, count=counts, noise=st.floats(0.01, 0.05))
@steady
def test_a_change_under_the_noise_is_said_to_be_indistinguishable(
    seed: int, count: int, noise: float
) -> None:
    tokens = Tokens(seed, count, moved=noise / 30, noise=noise)
    assert tokens.verdict(tokens.fresh) == "indistinguishable"
    assert tokens.verdict(tokens.stale) == "indistinguishable"


@given(seed=seeds, count=counts, moved=st.floats(0.001, 0.04), ratio=st.floats(0.1, 20))
@steady
def test_stale_never_passes(seed: int, count: int, moved: float, ratio: float) -> None:
    tokens = Tokens(seed, count, moved, noise=moved * ratio)
    assert tokens.verdict(tokens.stale) != "pass"


@given(seed=seeds, count=counts)
@steady
def test_an_engine_that_follows_in_part_neither_passes_nor_fails(seed: int, count: int) -> None:
    tokens = Tokens(seed, count, moved=0.03, noise=0.001)
    for share in (0.35, 0.42, 1.6, 2.0):
        blurred = tokens.engine_old + share * (tokens.new - tokens.old)
        assert tokens.verdict(blurred) == "indistinguishable"
    assert tokens.verdict(tokens.engine_old + 0.1 * (tokens.new - tokens.old)) == "fail"
    assert tokens.verdict(tokens.engine_old + 0.7 * (tokens.new - tokens.old)) == "pass"


@given(seed=seeds, count=counts, ratio=st.floats(1.01, 100))
@steady
def test_a_gap_above_the_tolerance_fails_whatever_the_slope(
    seed: int, count: int, ratio: float
) -> None:
    tokens = Tokens(seed, count, moved=0.5, noise=0.001)
    shifted = tokens.new + ratio * TOLERANCE
    assert tokens.verdict(shifted) == "fail"
    assert parity(shifted, tokens.new, None, None, TOLERANCE).verdict == "fail"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["engine", "learner"])
def test_a_score_that_is_not_finite_fails(value: float, side: str) -> None:
    tokens = Tokens(0, 100, 0.02, 0.001)
    broken = tokens.fresh if side == "engine" else tokens.new
    broken[7] = value
    assert tokens.verdict(tokens.fresh) == "fail"
    assert parity(tokens.fresh, tokens.new, None, None, TOLERANCE).verdict == "fail"


def test_the_gap_is_taken_where_the_version_itself_samples() -> None:
    """A version that drifted far differs more on tokens that only the old one would have drawn."""
    rng = np.random.default_rng(3)
    old = rng.normal(-3, 1, 200)
    new = old - rng.exponential(2.0, 200)
    engine = new + rng.normal(0, 0.2, 200)
    own = rng.normal(-1, 0.5, 200)
    close = (own + rng.normal(0, 0.03, 200), own)
    assert parity(engine, new, old, old, 0.08).verdict == "fail"
    assert parity(engine, new, old, old, 0.08, close).verdict == "pass"
    far = (own + 0.1, own)
    assert parity(engine, new, old, old, 0.08, far).verdict == "fail"


def test_the_first_version_is_judged_by_its_gap_alone() -> None:
    tokens = Tokens(0, 100, 0.02, 0.001)
    first = parity(tokens.fresh, tokens.new, None, None, TOLERANCE)
    assert (first.verdict, first.slope, first.change) == ("pass", None, None)


def test_a_policy_that_did_not_move_tells_nothing() -> None:
    tokens = Tokens(0, 100, moved=0.0, noise=0.001)
    found = parity(tokens.fresh, tokens.new, tokens.old, tokens.engine_old, TOLERANCE)
    assert (found.verdict, found.slope, found.change) == ("indistinguishable", None, 0.0)


def test_the_arithmetic_by_hand() -> None:
    """Changes 3, -1, 0, 0 (times 0.01), quarter of 4 tokens = 1: the first. Followed by 0.024 of
    0.03, the slope is 0.8; the gap is the mean of |-0.006|, 0, 0, 0."""
    old = np.zeros(4)
    new = np.array([0.03, -0.01, 0.0, 0.0])
    engine = np.array([0.024, -0.01, 0.0, 0.0])
    found = parity(engine, new, old, old, TOLERANCE)
    assert found.slope == pytest.approx(0.8)
    assert found.gap == pytest.approx(0.0015)
    assert found.change == pytest.approx(0.03)
    assert (found.slope_error, found.verdict) == (0.0, "pass")


PUBLISHED = Published(3, Path("x"), "merged", "a" * 64)


def test_what_a_generator_says_must_be_what_was_published() -> None:
    check_loaded(PUBLISHED, Loaded(3, "a" * 64))
    for said, shown in (
        (Loaded(2, "a" * 64), "serves version 2"),
        (Loaded(3, "b" * 64), "bbbbbb"),
        (None, "serves nothing"),
    ):
        with pytest.raises(ParityError, match=shown):
            check_loaded(PUBLISHED, said)


def test_the_hash_covers_names_and_contents_of_weights_alone(tmp_path: Path) -> None:
    def folder(name: str, **files: bytes) -> Path:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file.replace("_", ".")).write_bytes(content)
        return tmp_path / name

    same = weights_sha256(folder("a", a_safetensors=b"1", b_safetensors=b"2"))
    assert same == weights_sha256(
        folder("b", b_safetensors=b"2", a_safetensors=b"1", README_md=b"x")
    )
    others = [
        weights_sha256(folder("c", a_safetensors=b"2", b_safetensors=b"1")),
        weights_sha256(folder("d", a_safetensors=b"1", c_safetensors=b"2")),
        weights_sha256(folder("e", a_safetensors=b"12")),
    ]
    assert len({same, *others}) == 4


Build = Callable[..., Serving]
LARGE, SMALL = 0.1, 0.0001


@pytest.fixture(scope="module")
def learner(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Learner:
    folder = tmp_path_factory.mktemp("learner")
    config = RunConfig.model_validate(fakes.run_values(folder, tiny_model))
    return Learner(Policy(config.model, str(tiny_model), "cpu", seed=0), config)


@pytest.fixture(scope="module")
def stored(learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path | None]:
    """Policies by version; "small" moved by less than the tolerance of fp32."""
    folder = tmp_path_factory.mktemp("policies")
    found: dict[Any, Path | None] = {0: None}
    for name, seed, scale in ((1, 1, LARGE), (2, 2, LARGE), ("small", 3, SMALL)):
        fakes.perturb(learner.policy, seed, scale)
        found[name] = folder / str(name)
        (folder / str(name)).mkdir()
        learner.policy.save(folder / str(name), "card")
    learner.policy.restore(None)
    return found


@pytest.fixture
def serve(learner: Learner, tmp_path: Path) -> Iterator[Build]:
    made: list[Serving] = []

    def build(
        kind: type[TransformersGenerator] = TransformersGenerator,
        sync: str = "merged",
        log: Callable[[dict[str, Any]], None] = lambda _: None,
        **attributes: Any,
    ) -> Serving:
        policy = learner.policy

        def start() -> TransformersGenerator:
            generator = kind(
                policy.path, policy.tokenizer, policy.stop_ids, torch.float32, "cpu", 16
            )
            for name, value in attributes.items():
                setattr(generator, name, value)
            return generator

        texts = ["Where is my parcel?", "Hi", "How do I return shoes?", "Refund"]
        prompts = fakes.prompts_of(prompt_encoder(policy.tokenizer), texts)
        made.append(Serving(start, learner, sync, tmp_path / "published", prompts, log))
        return made[-1]

    yield build
    for serving in made:
        serving.close()


@pytest.mark.parametrize("wrong", range(3))
def test_a_generator_that_loaded_something_else_is_found_wherever_it_stands(wrong: int) -> None:
    published = Published(1, Path("somewhere"), "merged", "abc")
    said = [Loaded(1, "abc")] * 3
    check_loaded(published, word_of_all(said, published))
    said[wrong] = Loaded(1, "other")
    with pytest.raises(ParityError, match=r"SHA-256 abc.* serves version 1 \(other\)"):
        check_loaded(published, word_of_all(said, published))
    held = [Loaded(1, "abc", "on the card")] * 3
    assert word_of_all(held, published) == Loaded(1, "abc")
    held[wrong] = Loaded(1, "abc", "something else")
    with pytest.raises(ParityError, match="hold different weights"):
        word_of_all(held, published)
    nothing: list[Loaded | None] = [None] * 3
    assert word_of_all(nothing, None) is None
    nothing[wrong] = Loaded(0, "abc")
    assert word_of_all(nothing, None) == Loaded(0, "abc")


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_versions_are_served_in_any_order(
    serve: Build, learner: Learner, stored: dict[Any, Path | None], sync: str
) -> None:
    logged: list[dict[str, Any]] = []
    serving = serve(sync=sync, log=logged.append)
    for version in (0, 1, 2, 2, 0, 1):
        generator = serving.at(version, stored[version])
        learner.policy.restore(stored[version])
        drawn = serving._probes
        theirs, ours = generator.logps(drawn), learner.logps(drawn)
        assert np.allclose(np.concatenate(theirs), np.concatenate(ours), atol=1e-4)
    # Asked for again, a version is not published again.
    assert [entry["version"] for entry in logged] == [0, 1, 2, 0, 1]
    assert {entry["verdict"] for entry in logged} == {"pass"}
    assert all(abs(entry["slope"] - 1) < 0.01 for entry in logged[1:])


def test_a_small_step_is_followed_too(serve: Build, stored: dict[Any, Path | None]) -> None:
    logged: list[dict[str, Any]] = []
    serving = serve(log=logged.append)
    serving.at(0, None)
    serving.at(1, stored["small"])
    assert logged[-1]["verdict"] == "pass"
    assert logged[-1]["change"] < logged[-1]["tolerance"]


@pytest.mark.parametrize("step", [1, "small"])
def test_a_generator_that_keeps_the_old_weights_is_fatal(
    serve: Build, stored: dict[Any, Path | None], step: int | str
) -> None:
    """It reports the right version and hash; where the step is small its gap is allowed, too."""
    logged: list[dict[str, Any]] = []
    serving = serve(fakes.StaleGenerator, log=logged.append)
    serving.at(0, None)
    with pytest.raises(ParityError) as caught:
        serving.at(1, stored[step])
    found = logged[-1]
    assert found["verdict"] == "fail"
    assert f"{found['gap']:.4f} nats a token, 0.002 allowed" in str(caught.value)
    if step == "small":
        assert found["gap"] < 0.002
        assert found["slope"] < 0.01
        assert f"slope {found['slope']:.2f}" in str(caught.value)
    else:
        assert found["gap"] > 0.002
    # It is not served by asking once more.
    with pytest.raises(ParityError):
        serving.at(1, stored[step])


@pytest.mark.parametrize(
    ("attributes", "shown"),
    [
        ({"version_offset": -1}, "published version 1 .* serves version 0 "),
        ({"sha256": "0" * 64}, "published version 1 .* serves version 1 \\(000000000000\\)"),
    ],
)
def test_a_generator_that_names_another_version_or_hash_is_fatal(
    serve: Build, stored: dict[Any, Path | None], attributes: dict[str, Any], shown: str
) -> None:
    with pytest.raises(ParityError, match=shown):
        serve(fakes.MisreportingGenerator, **attributes).at(1, stored[1])


@pytest.mark.parametrize(
    ("woken", "shown"),
    [
        (Loaded(0, "0" * 64), "serves version 0"),
        (Loaded(1, "0" * 64), "serves version 1 \\(000000000000\\)"),
        (None, "serves nothing"),
    ],
)
def test_a_generator_that_wakes_with_something_else_is_fatal(
    serve: Build, stored: dict[Any, Path | None], woken: Loaded | None, shown: str
) -> None:
    serving = serve(fakes.SleepwalkingGenerator, woken=woken)
    serving.at(1, stored[1])
    serving.sleep()
    with pytest.raises(ParityError, match=shown):
        serving.wake()


def test_sleep_and_wake_before_anything_is_served_start_nothing(serve: Build) -> None:
    serving = serve(fakes.SleepwalkingGenerator)
    serving.sleep()
    serving.wake()
    assert serving._generator is None


def test_only_the_version_served_is_on_disk_and_nothing_after_the_end(
    serve: Build, stored: dict[Any, Path | None], tmp_path: Path
) -> None:
    serving = serve()
    generator = serving.at(0, None)
    serving.at(1, stored[1])
    assert [p.name for p in (tmp_path / "published").iterdir()] == ["version-0001"]
    serving.close()
    assert not (tmp_path / "published").exists()
    with pytest.raises(AssertionError):
        generator.logps([])  # its model is gone
        generator.model  # type: ignore[attr-defined] # noqa: B018
