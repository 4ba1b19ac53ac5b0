"""The least that a model must beat: predicting each token by its frequency alone."""


def uninformed(name: str, loss: float | None, baseline: float | None, unit: str) -> str | None:
    """Warn of a model that predicts text no better than token frequencies; None if it is better,
    or if either figure is unknown.

    Every stage that learns from a teacher or reports one calls this, so that all say the same.
    """
    if loss is None or baseline is None or loss < baseline:
        return None
    return (
        f"{name} predicts this text no better than token frequencies alone: {loss:.3f} {unit} "
        f"against {baseline:.3f}. Check its tokenizer and the language of the data, or take "
        "another model"
    )
