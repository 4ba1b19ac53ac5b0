"""Gains and losses in sentences: the right models, the right direction, each text by itself."""

from pathlib import Path

from xinslm.report.read import RunData
from xinslm.report.verdict import gains_and_losses


def row(name, bits, data="held-out", size=100, parameters=10, **more):
    return {
        "name": name,
        "data": data,
        "bits_per_byte": bits,
        "file_bytes": size,
        "parameters": parameters,
        **more,
    }


def judged(*rows):
    return gains_and_losses(RunData(Path("run"), "run", evaluation=list(rows)), [])


TEACHER = row("teacher", 0.40, size=400, parameters=20)
STUDENT = row("student", 0.55, trained_by="distill")
PLAIN = row("undistilled", 0.60, trained_by="pretrain")
SMALL = row("student, 4-bit", 0.57, size=20)


def test_sizes_gains_and_losses():
    gained, lost = judged(TEACHER, STUDENT, PLAIN, SMALL)
    assert gained == [
        "student: 4.0x smaller on disk than the teacher, with 50% of its parameters.",
        "student, 4-bit: 20x smaller on disk than the teacher, with 50% of its parameters.",
        "student: 0.05 bits per byte better than undistilled on held-out (0.550 against 0.600).",
    ]
    assert lost == [
        "student: 0.15 bits per byte worse than the teacher on held-out (0.550 against 0.400).",
        "student, 4-bit: 0.02 bits per byte worse than the same student before quantization on "
        "held-out (0.570 against 0.550).",
    ]


def test_a_student_that_is_worse_than_without_a_teacher_is_not_praised():
    gained, lost = judged(TEACHER, row("student", 0.70, trained_by="distill"), PLAIN)
    assert not any("undistilled" in sentence for sentence in gained)
    assert any("0.10 bits per byte worse than undistilled" in sentence for sentence in lost)


def test_text_that_knows_more_than_the_teacher_is_named():
    _, lost = judged(
        TEACHER, row("student", 0.35, trained_by="distill"), {**PLAIN, "bits_per_byte": 0.3}
    )
    assert sum("--loss.alpha" in sentence for sentence in lost) == 1
    _, lost = judged(TEACHER, row("student", 0.70, trained_by="distill"), PLAIN)
    assert not any("--loss.alpha" in sentence for sentence in lost)


def test_differences_too_small_to_matter_are_none():
    gained, lost = judged(TEACHER, row("student", 0.402, trained_by="distill"))
    assert "student: as good as the teacher on held-out." in gained and not lost


def test_each_text_is_judged_by_itself():
    other = [{**one, "data": "other"} for one in (TEACHER, {**STUDENT, "bits_per_byte": 0.9})]
    _, lost = judged(TEACHER, STUDENT, *other)
    assert [sentence.split(" on ")[1].split(" (")[0] for sentence in lost] == ["held-out", "other"]


def test_nothing_is_said_without_a_teacher():
    assert judged(STUDENT, PLAIN) == ([], [])
