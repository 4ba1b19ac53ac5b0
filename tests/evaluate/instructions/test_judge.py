"""The judge behind an endpoint: what it is sent, which replies are grades."""

import time

import pytest

from fake_endpoint import FakeVllm
from small_models import save_random_model
from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.instructions.judge import EndpointJudge, Question, parse_grade
from xinslm.teachers.endpoint_config import EndpointConfig

QUICK = EndpointConfig(concurrency=3, timeout_seconds=10, retries=0)
MESSAGES = ({"role": "user", "content": "Name {a} river."},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    save_random_model(folder)
    return folder


def reply(text, reason="stop", **message):
    content = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": content, "finish_reason": reason}
    return 200, {}, {"object": "chat.completion", "choices": [choice]}


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Good.\nGrade: 8", 8),
        ("Grade: 10\n", 10),
        ("Grade:1", 1),
        ("Grade: 3\nOn reflection,\nGrade: 9", 9),
        ("Grade: 11", None),
        ("Grade: 0", None),
        ("Grade: 8/10", None),
        ("Grade: 7.5", None),
        ("grade: 8", None),
        ("Grade: 8\nThat is all.", None),
        ("I give it an 8", None),
        ("8", None),
        ("", None),
    ],
)
def test_only_the_last_line_in_this_form_is_a_grade(text, grade):
    assert parse_grade(text) == grade


def test_requests_and_the_order_of_grades(folder):
    def answer(number, path, body):
        # the answer to grade decides, so that a wrong order is seen
        text = body["messages"][0]["content"]
        grade = next(n for n in range(1, 10) if f"answer {n}." in text)
        # the first comes last
        time.sleep(0.5 if grade == 4 else 0)
        return reply(f"Hm.\nGrade: {grade}")

    with FakeVllm(folder, answer) as server:
        judge = EndpointJudge(server.url, QUICK, rubric="10: {wet}")
        numbers = [4, 2, 9, 1, 7, 3]
        questions = [Question(MESSAGES, f"answer {n}.", ["the Nile"]) for n in numbers]
        assert [grade.value for grade in judge(questions)] == numbers
        assert judge([]) == []
        path, body = server.bodies[0]
        assert path == "/v1/chat/completions"
        assert (body["model"], body["temperature"]) == ("tiny", 0.0)
        for part in ("10: {wet}", "user: Name {a} river.", "the Nile", "Grade: N"):
            assert part in body["messages"][0]["content"]


@pytest.mark.parametrize(
    "answer",
    [reply("I will not."), reply("Grade: 8", "length"), reply(None, refusal="no")],
    ids=["no grade", "cut at the limit", "refused"],
)
def test_other_replies_are_no_grade(folder, answer):
    with FakeVllm(folder, lambda *_: answer) as server:
        (grade,) = EndpointJudge(server.url, QUICK)([Question(MESSAGES, "The Nile.", [])])
    assert grade.value is None


def test_failures_are_errors(folder):
    with FakeVllm(folder, lambda *_: (500, {}, {"error": "out of memory"})) as server:
        judge = EndpointJudge(server.url, QUICK)
        with pytest.raises(XinslmError, match="out of memory"):
            judge([Question(MESSAGES, "The Nile.", [])])
        with pytest.raises(UsageError, match="has no model 'huge'"):
            EndpointJudge(server.url, EndpointConfig(model="huge", retries=0))
        with pytest.raises(UsageError, match="rubric is empty"):
            EndpointJudge(server.url, QUICK, rubric=" ")
