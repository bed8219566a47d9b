"""The `calibration` section: what judges must show against gold labels, and where it is kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.config_base import Section, Share

AGREEMENT_METRICS = (
    "accuracy", "f1", "pearson", "spearman", "kendall", "kappa", "kappa_quadratic",
    "kappa_vs_rest",
)  # fmt: skip


class Thresholds(Section):
    """What agreement earns a certificate. A bound is compared with the unfavourable end of a 95%
    interval, so that too few labels refuse what more of them might grant."""

    within_prompt_accuracy: Share = 0.60
    """To build pairs: least share of pairs of answers to one prompt that the judge orders as gold
    does. A coin gives 0.5; people agree with each other on 0.63 to 0.77 of such pairs (Stiennon et
    al. 2020, Ouyang et al. 2022, Bai et al. 2022). Surely above 0.6 is nearer to them."""
    precision: Share = 0.80
    """To be a floor: least share of the answers above it that gold puts there too. What passes a
    floor may be chosen; at 0.8 one chosen answer in five may be wrong. It must also beat the share
    of all answers that pass by gold, which a floor that keeps nothing out has."""
    recall: Share = 0.50
    """To be a floor: least share of the answers that pass by gold which pass by the judge. Below
    half, most of the good answers are thrown away, and those kept are of one kind."""
    order_consistency: Share = 0.60
    """Least share of pairs judged alike in both orders. What differs counts as a tie and is lost;
    GPT-4 kept its verdict on 0.65 of MT-Bench's pairs, weaker judges on 0.24 to 0.46 (Zheng et al.
    2023, table 2)."""
    first_position_shift: Annotated[float, Field(ge=0, le=0.5)] = 0.15
    """Largest distance of `first_position_rate` from 0.5, both ends of its interval. Asking in both
    orders cancels a small lean; beyond this a judge reads the order more than the answers."""
    retest_share: Annotated[float, Field(ge=0)] = 0.5
    """Largest `retest_sd`, as a share of the standard deviation of all the judge's scores: at 0.5 a
    quarter of their variance is noise, a reliability of 0.75, where 'good' begins (Koo and Li
    2016)."""
    length_bias: Share = 0.30
    """Largest `length_bias` either way: a medium effect (Cohen 1988). Policies trained on judges
    that like length learn length (Singhal et al. 2023)."""
    agreement: dict[str, float] = Field(default_factory=dict)
    """Further least values by metric: accuracy, f1, pearson, spearman, kendall, kappa,
    kappa_quadratic, kappa_vs_rest. None by default: they mix prompts, or move with how often each
    label occurs, and selection asks neither."""

    @model_validator(mode="after")
    def _metrics_known(self) -> Thresholds:
        unknown = sorted(set(self.agreement) - set(AGREEMENT_METRICS))
        if unknown:
            raise ValueError(
                f"agreement may name {', '.join(AGREEMENT_METRICS)}, found {', '.join(unknown)}"
            )
        return self


class Calibration(Section):
    """How judges prove themselves against gold labels (`pairloop judge calibrate`)."""

    verdicts: str | None = None
    """JSONL file of verdicts: item_id, judge, dimension, and score or winner."""
    gold: str | None = None
    """JSONL file of gold labels by people or a stronger judge: item_id, dimension, and score or
    winner."""
    registry: str = "certificates"
    """Folder of certificates; relative to the working directory."""
    repeats: Literal["mean", "first"] = "mean"
    """An item's score where a file holds several runs: their `mean`, as for a judge that votes (the
    certificate then asks for as many votes in training), or the `first`, as for one that is asked
    once. `retest_sd` takes every run."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the prompts (or items) for the 95% intervals."""
    remote_days: Annotated[int, Field(ge=1)] = 30
    """Days until the certificate of a remote judge expires: what a provider serves under one name
    changes (in three months GPT-4 went from 0.84 to 0.51 on one task, Chen et al. 2023). A pinned
    local model does not, so its certificate lasts."""
    thresholds: Thresholds = Thresholds()
