"""Weights & Biases: online, offline or disabled, resumed under the run's own id.

wandb finds out much by itself: argv, the git remote, the environment's packages, the console. A
remote's URL or somebody's argv may hold a token, so only what is told here is sent, and how busy
the machine is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.config import Tracking
from rlhf.errors import InputError
from rlhf.protocols import TrackedRun
from rlhf.tracking import need

if TYPE_CHECKING:
    import wandb

AXIS = "optimizer_step"
SECONDS_TO_FILE = 0.1
"""Until wandb has a line on disk; its own 15 s would be lost with every kill."""
SECONDS_TO_FINISH = 300.0
"""A run that is over must not wait for ever for a network; `wandb sync` sends the rest."""


class Wandb:
    """`rlhf.protocols.Tracker` over a wandb run.

    wandb's own step counts the lines told, over all starts; charts are drawn over `AXIS`.
    """

    def __init__(self, settings: Tracking) -> None:
        need("wandb")
        self._settings = settings.wandb
        self._lines = 0
        self._run: wandb.Run

    def start(self, run: TrackedRun) -> str:
        """See `Tracker.start`. Raises InputError where wandb wants to be online without a key."""
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            finish_timeout=SECONDS_TO_FINISH,
            finish_timeout_raises=True,
            symlink=False,
            x_disable_meta=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=SECONDS_TO_FILE,
        )
        given = self._settings
        if given.mode is not None:
            settings.mode = given.mode
        chosen = given.mode or wandb.setup().settings.mode
        # Else wandb.init would ask for a key, and go offline where nobody answers.
        if chosen in ("online", "shared", "run") and not wandb.login(prompt=False, verify=False):
            raise InputError(
                "tracking.wandb.mode online needs a key: set WANDB_API_KEY or run `wandb login`, "
                "or set tracking.wandb.mode to offline"
            )
        self._run = wandb.init(
            project=given.project or wandb.setup().settings.project or "pairloop",
            entity=given.entity,
            id=run.identity,
            name=run.name,
            resume="allow",
            dir=run.folder,
            config=dict(run.config),
            allow_val_change=True,
            settings=settings,
        )
        self._lines = run.told
        self._run.define_metric(AXIS, hidden=True)
        self._run.define_metric("*", step_metric=AXIS)
        if self._run.disabled:
            return "disabled"
        if self._run.offline:
            return f"offline; send it with: wandb sync {run.folder / 'wandb'}"
        return str(self._run.url)

    def log(self, round: int | None, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        named: dict[str, Any] = {f"{stage}/{name}": value for name, value in values.items()}
        self._send(
            {**named, AXIS: step} if round is None else {**named, AXIS: step, "round": round}
        )

    def table(self, round: int, name: str, rows: Sequence[Mapping[str, str | float]]) -> None:
        """See `Tracker.table`. A key a round: wandb shows only the last table of a key."""
        import wandb

        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._send({f"{name}/round_{round:04d}": table})

    def finish(self, state: str) -> None:
        """See `Tracker.finish`."""
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in ("done", "stopped_early") else 1)

    def _send(self, values: dict[str, Any]) -> None:
        self._run.log(values, step=self._lines, commit=True)
        self._lines += 1
