"""What a teacher must beat to be of use: token frequencies, and the student itself."""

MORE_TEXT = "--loss.alpha 0.7 --loss.beta 0.3"
"""Weights for text that knows more than the teacher; the defaults are halves."""


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


ROUNDING = 0.01
"""Nats by which two scores of one model may differ in other number types."""


def mix_advice(student: float | None, teacher: float | None, unit: str) -> str | None:
    """Advice on the weights of the loss if a student predicts held-out text better than its
    teacher; None if it does not, or if either figure is unknown.

    The text then holds what the teacher does not know, for example answers of a better model, and
    the teacher's distributions pull away from it. On text of other kinds they still help
    (docs/results.md).
    """
    if student is None or teacher is None or student > teacher - ROUNDING:
        return None
    return (
        f"the student predicts this text better than its teacher: {student:.3f} {unit} against "
        f"{teacher:.3f}. If such text is what it is for, give the text more weight "
        f"({MORE_TEXT}); if the teacher's ability is, let the teacher write the text "
        "(xinslm synthesize)"
    )
