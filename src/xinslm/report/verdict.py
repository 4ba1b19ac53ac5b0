"""What distillation gained and what it lost, as sentences, for each text that was measured."""

from collections.abc import Sequence

from xinslm.baseline import MORE_TEXT
from xinslm.report.compare import Row, difference, find_teacher, find_undistilled, smaller
from xinslm.report.read import RunData

_NOTHING = 0.005
"""Differences below this many bits per byte are reported as none."""


def gains_and_losses(run: RunData, others: Sequence[RunData]) -> tuple[list[str], list[str]]:
    """Sentences about gains and about losses; none if there is no teacher or no student."""
    rows = [row for r in [run, *others] for row in r.evaluation]
    gained: list[str] = []
    lost: list[str] = []
    for data in dict.fromkeys(row.get("data") for row in rows):
        measured = [row for row in rows if row.get("data") == data]
        teacher = find_teacher(run, measured)
        plain = find_undistilled(measured, teacher)
        student = _student(measured, teacher, plain)
        if teacher is None or student is None:
            continue
        small = _quantized(measured, student)
        if not gained:
            gained += _sizes(teacher, [student] if small is None else [student, small])
        _compare(gained, lost, student, teacher, "the teacher", data)
        if plain is not None:
            _compare(gained, lost, student, plain, str(plain["name"]), data)
            _advise(lost, student, teacher, plain, data)
        if small is not None:
            _compare(gained, lost, small, student, "the same student before quantization", data)
    return gained, lost


def _student(rows: Sequence[Row], teacher: Row | None, plain: Row | None) -> Row | None:
    """The first model that a training run made, without the undistilled one."""
    made = (row for row in rows if row is not teacher and row is not plain)
    return next((row for row in made if row.get("trained_by")), None)


def _quantized(rows: Sequence[Row], student: Row) -> Row | None:
    """The first model with the student's parameters in less than half of the space."""
    size, parameters = student.get("file_bytes"), student.get("parameters")
    if not size or not parameters:
        return None
    alike = (row for row in rows if row.get("parameters") == parameters)
    return next((row for row in alike if row.get("file_bytes", size) < size / 2), None)


def _sizes(teacher: Row, students: Sequence[Row]) -> list[str]:
    sentences = []
    for row in students:
        size = smaller(row, teacher)
        if size.endswith("smaller"):
            share = ""
            if row.get("parameters") and teacher.get("parameters"):
                share = f", with {row['parameters'] / teacher['parameters']:.0%} of its parameters"
            sentences.append(f"{row['name']}: {size} on disk than the teacher{share}.")
    return sentences


def _advise(lost: list[str], student: Row, teacher: Row, plain: Row, data: object) -> None:
    """Say so if the text alone taught more than the teacher, because the text is better."""
    if min(student["bits_per_byte"], teacher["bits_per_byte"]) > plain["bits_per_byte"] + _NOTHING:
        lost.append(
            f"On {data or 'unnamed data'} the text taught more than the teacher, which predicts it "
            f"worse than the undistilled student: try {MORE_TEXT}."
        )


def _compare(
    gained: list[str], lost: list[str], row: Row, other: Row, name: str, data: object
) -> None:
    """Add a sentence to one of the lists."""
    change = row["bits_per_byte"] - other["bits_per_byte"]
    where = f"on {data or 'unnamed data'}"
    if abs(change) < _NOTHING:
        gained.append(f"{row['name']}: as good as {name} {where}.")
        return
    amount = difference(row, other).lstrip("+-")
    values = f"{row['bits_per_byte']:.3f} against {other['bits_per_byte']:.3f}"
    better = change < 0
    (gained if better else lost).append(
        f"{row['name']}: {amount} bits per byte {'better' if better else 'worse'} than {name} "
        f"{where} ({values})."
    )
