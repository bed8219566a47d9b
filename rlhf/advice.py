"""What the numbers of a training on a file say, in plain words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Facts:
    """What advice is given on: shares and log-ratios of the last epoch's end."""

    full: bool
    learning_rate: float
    accuracy: float
    """Share of training examples on the right side, at the end."""
    first_loss: float
    last_loss: float
    chosen_logratio: float | None
    """Mean log-prob of chosen (good) held-out answers less what it was at the start, nats a
    sequence."""
    validation_losses: tuple[float, ...]


def advice(facts: Facts) -> list[str]:
    """What the numbers say, in plain words; nothing where they are as they should be."""
    found = []
    if facts.full and facts.learning_rate > 1e-5:
        found.append(
            f"learning rate {facts.learning_rate:g} is high for full fine-tuning: preferences are "
            "usually learned at 1e-6 to 1e-5; lower learner.learning_rate"
        )
    if facts.accuracy > 0.99:
        found.append(
            f"overfit: the policy gets {facts.accuracy:.1%} of the training examples right, so it "
            "knows them by heart; fewer learner.epochs, a lower learning rate, or a larger "
            "objective.beta"
        )
    losses = facts.validation_losses
    if len(losses) > 1 and losses[-1] > 1.02 * min(losses):
        best = losses.index(min(losses)) + 1
        found.append(
            f"overfit: the held-out loss was lowest after epoch {best} ({min(losses):.4f}) and "
            f"ended at {losses[-1]:.4f}; the weights of epoch {best} were kept"
        )
    if abs(facts.last_loss - facts.first_loss) < 0.01 * abs(facts.first_loss):
        found.append(
            f"stuck: the loss went from {facts.first_loss:.4f} to {facts.last_loss:.4f}; raise "
            "learner.learning_rate, or look at the pairs: pairloop pairs analyze"
        )
    if facts.chosen_logratio is not None and facts.chosen_logratio < -5:
        found.append(
            "collapsing: chosen answers became "
            f"{-facts.chosen_logratio:.1f} nats less likely than at the start, so the margin comes "
            "from pushing both answers down; set objective.sft_weight to 0.1 or more, raise "
            "objective.beta or lower the learning rate"
        )
    return found
