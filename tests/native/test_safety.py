"""Hostile arguments, forks, threads and floating-point modes, each in a process of its own: a crash
is a test that fails.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from small_models import save_quantized

BEGIN = """
import ctypes, os, sys, threading
from ctypes import POINTER, byref, c_double, c_float, c_int32, c_uint8, c_void_p
import numpy as np
from xinslm.errors import XinslmError
from xinslm.inference.native_engine import build
from xinslm.inference.raw_weights import open_raw
from xinslm.native.bindings import SamplingSettings, Shape, functions
from xinslm.native.model import NativeContext, NativeModel, Weight
lib = functions()
MODEL = open_raw(FOLDER)
IDS = np.random.default_rng(0).integers(0, 320, 100).tolist()

def whole(context, ids):
    sequence = context.add()
    logits = context.extend(ids, [sequence] * len(ids), range(len(ids)))
    context.remove(sequence)
    return logits

def again(call):
    while True:
        try:
            return call()
        except XinslmError as error:
            told.append(str(error))

def keep_busy(context, sequences):
    # calls of another thread, one after the other until the process ends
    owners = [sequence for sequence in sequences for _ in IDS]
    def work():
        while True:
            again(lambda: context.extend(IDS * len(sequences), owners, []))
            for sequence in sequences:
                again(lambda: context.rewind(sequence, 0))
    threading.Thread(target=work, daemon=True).start()

def wait_for_a_call(context):
    while True:
        try:
            context.length(0)
        except XinslmError:
            return

told = []
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("safety")
    save_quantized(made, "tied")
    return made / "q"


def run(code: str, folder: Path) -> str:
    """What the code prints; fails unless it ends well."""
    begin = BEGIN.replace("FOLDER", repr(str(folder)))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", begin + code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


HOSTILE = """
model = build(MODEL)
other = build(MODEL)
context, packed = NativeContext(model, 2), other.packed("q_proj", 0)
sequence, first = context.add(), whole(context, IDS)
shape = Shape.from_buffer_copy(model.shape)
floats, data, scales = (c_float * (1 << 16))(), (c_uint8 * 4096)(), (c_uint8 * 256)()
ids, owners, marks = (c_int32 * 8)(), (c_int32 * 8)(*[sequence] * 8), (c_uint8 * 8)(*[1] * 8)
draw, log_probability, place_of = SamplingSettings(1, 1, 0, 1, 0), c_double(), c_void_p()
M, C, DATA, SCALES = model.handle, context.handle, ctypes.addressof(data), ctypes.addressof(scales)
NONE = ()
# a call that works, and for some of its numbers which others are right or cannot be checked: they
# are the caller's word on the memory behind a pointer
CALLS = {
    "xl_model_new": ((shape, floats), {}),
    "xl_model_set": ((M, 0, 3, 0, 1, 64, DATA, 256, None, 0), {1: range(2), 2: range(3, 9)}),
    "xl_model_use": ((M, 0, 4, 128, 64, packed.ctypes.data, packed.nbytes), {1: range(2)}),
    "xl_model_packed": ((M, 0, 4, place_of), {1: range(2), 2: range(18)}),
    "xl_model_bytes": ((M,), {}),
    "xl_context_new": ((M, 1, b"", 0, 64), {1: range(1, 1025), 3: ANY, 4: range(1, 2**63)}),
    "xl_context_kernels": ((C,), {}),
    "xl_sequence_new": ((C, -1, 0), {1: (-1, sequence), 2: ANY}),
    "xl_sequence_length": ((C, sequence), {}),
    "xl_sequence_rewind": ((C, sequence, 0), {}),
    "xl_extend": ((C, 2, ids, owners, marks, floats), {1: range(1, 9)}),
    "xl_extend_states": ((C, 2, ids, owners, marks, floats), {1: range(1, 9)}),
    "xl_logits": ((C, 2, floats, floats), {1: range(2**31)}),
    "xl_cache_bytes": ((C, 0), {1: ANY}),
    "xl_sample": (
        (floats, 9, draw, ids, 2, 0.5, log_probability), {1: range(1, 2**31), 4: range(2**31)}),
    "xl_product": ((b"", 2, 16, 32, DATA, 288, None, 0, floats, 2, floats), {9: range(2**16)}),
    "xl_decode_row": ((100, 16, 32, DATA, 256, SCALES, 16, 3, floats), {7: range(16)}),
    "xl_sequence_free": ((C, sequence), {}),
}
lib.xl_model_free(None), lib.xl_context_free(None)
WIDTHS = {c_int32: 31, ctypes.c_int64: 63}

def hostile(kind, good):
    if kind in WIDTHS:
        most = WIDTHS[kind]
        numbers = {-1, -(2**most), 2**most - 1, 0, 4, 5, 17, 102, 12345, 2**20}
        return numbers | {2**bit + extra for bit in range(30, most) for extra in (0, 1)} - {good}
    if kind is c_double:
        return (float("nan"), -0.5, 1.0, float("inf"))
    return () if good is None else (None,)

def failed(result):
    return result is None or (isinstance(result, int) and result < 0)

tried = 0
for name, (arguments, right) in CALLS.items():
    function = getattr(lib, name)
    for place, (kind, good) in enumerate(zip(function.argtypes, arguments, strict=True)):
        for value in hostile(kind, good):
            if value is None or value not in right.get(place, NONE):
                changed = (*arguments[:place], value, *arguments[place + 1 :])
                print(name, place, value, file=sys.stderr, flush=True)
                assert value == good or failed(function(*changed))
                tried += 1
    assert not failed(function(*arguments)), (name, lib.xl_last_error())
fields = [(name, n) for name, _ in Shape._fields_[:7] for n in (-1, 0, -(2**31), 2**31 - 1)]
fields += [("positions", 0), ("window", -1), ("eps", -1.0), ("eps", float("nan"))]
for name, value in fields:
    bad = Shape.from_buffer_copy(shape)
    setattr(bad, name, value)
    assert lib.xl_model_new(bad, floats) is None, (name, value)
for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
    for value in (-1.0, float("nan")):
        bad = SamplingSettings.from_buffer_copy(draw)
        setattr(bad, name, value)
        assert lib.xl_sample(floats, 9, bad, ids, 2, 0.5, log_probability) < 0, (name, value)
own = model.packed("q_proj", 1)
assert lib.xl_model_use(M, 1, 4, 128, 64, own.ctypes.data, own.nbytes) < 0
for kernels in (b"nothing", b"avx2 scalar", b"x" * 100000):
    assert lib.xl_context_new(M, 1, kernels, 0, 64) is None
assert np.array_equal(whole(NativeContext(build(MODEL), 2), IDS), first)
print(sorted(CALLS), tried)
"""


def test_hostile_arguments_are_refused(folder: Path) -> None:
    code = "class Any:\n    def __contains__(self, value):\n        return True\nANY = Any()\n"
    names, tried = run(code + HOSTILE, folder).split("]")
    header = Path(__file__).parents[2] / "native" / "include" / "xinslm.h"
    declared = set(re.findall(r"^XL_API .*?(xl_\w+)\(", header.read_text(), re.MULTILINE))
    free = {"xl_model_free", "xl_context_free", "xl_abi", "xl_last_error", "xl_kernels"}
    assert set(re.findall(r"\w+", names)) == declared - free
    assert int(tried) > 700


def test_a_fork_after_use_gives_the_same_text_in_both(folder: Path) -> None:
    code = """
context = NativeContext(build(MODEL), 3)
wanted = whole(context, IDS)
sequence = context.add()
context.extend(IDS[:50], [sequence] * 50, [])
reader, writer = os.pipe()
child = os.fork()
rest = context.extend(IDS[50:], [sequence] * 50, range(50))
same = np.array_equal(rest, wanted[50:]) and np.array_equal(whole(context, IDS), wanted)
if not child:
    os.write(writer, b"same" if same else b"other")
    del context  # the parent's threads are not here to be joined
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert same and os.read(reader, 10) == b"same"
"""
    run(code, folder)


def test_a_fork_during_a_call_of_another_thread_leaves_a_context_that_works(folder: Path) -> None:
    code = """
context = NativeContext(build(MODEL), 2)
wanted = whole(context, IDS)
kept, others = context.add(), [context.add() for _ in range(20)]
context.extend(IDS[:50], [kept] * 50, [])

def child():
    rest = context.extend(IDS[50:], [kept] * 50, range(50))
    assert np.array_equal(rest, wanted[50:])
    assert {context.length(sequence) for sequence in others} <= {0, 100}  # not a part of a call
    assert np.array_equal(whole(context, IDS), wanted)

def status_of_child():
    wait_for_a_call(context)
    number = os.fork()
    if number:
        return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    try:
        child()
        os._exit(0)
    except XinslmError as error:  # the fork came between two steps of the call
        os._exit(3 if "make a new one" in str(error) else 1)
    finally:
        os._exit(2)

keep_busy(context, others)
found = [status_of_child() for _ in range(6)]
assert found.count(0) >= 3 and set(found) <= {0, 3}, found
"""
    run(code, folder)


def test_a_thread_may_be_inside_a_call_when_python_ends(folder: Path) -> None:
    code = """
context = NativeContext(build(MODEL), 2)
keep_busy(context, [context.add() for _ in range(20)])
wait_for_a_call(context)
"""
    for _ in range(3):
        run(code, folder)


def test_many_more_threads_than_processors_finish(folder: Path) -> None:
    code = """
threads = 4 * (os.cpu_count() or 1)
model = build(MODEL)
context = NativeContext(model, threads)
assert np.array_equal(whole(context, IDS), whole(NativeContext(model, 1), IDS))
sequence = context.add()
for token in IDS:
    context.extend([token], [sequence], [0])
"""
    run(code, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_without_work_sleep(folder: Path) -> None:
    """A thread that spun on would take a processor from whoever has work."""
    code = """
import time
def awake():
    places = [f"/proc/self/task/{task}/stat" for task in os.listdir("/proc/self/task")]
    states = [open(place).read().rpartition(")")[2].split()[0] for place in places]
    return states.count("R") - 1, len(states)  # this thread runs

context = NativeContext(build(MODEL), 5)
for ids in (IDS, IDS[:1]):
    whole(context, ids)
    end = time.monotonic() + 20  # on a busy machine it takes a while to get to sleep
    while awake()[0] and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.05)
    assert awake()[0] == 0 and awake()[1] >= 5
"""
    run(code, folder)


def test_the_second_of_two_threads_on_a_context_is_refused(folder: Path) -> None:
    code = """
context = NativeContext(build(MODEL), 2)
wanted, wrong = whole(context, IDS), []
sequences = [context.add(), context.add()]
done = threading.Event()

def work(sequence):
    for _ in range(3000):
        got = again(lambda: context.extend(IDS, [sequence] * 100, range(100)))
        again(lambda: context.rewind(sequence, 0))
        if not np.array_equal(got, wanted):
            wrong.append(sequence)
        if told or wrong:
            break

threads = [threading.Thread(target=work, args=(sequence,)) for sequence in sequences]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong and told
assert set(told) == {"busy: another thread is using this context"}, set(told)
assert np.array_equal(whole(context, IDS), wanted)
"""
    run(code, folder)


def test_subnormal_numbers_are_kept_and_the_mode_of_the_caller_is_unchanged(folder: Path) -> None:
    code = """
def keeps_subnormals():
    return bool(np.float32(1e-40) * np.float32(1) != 0)

assert keeps_subnormals()
# the embedding of token 5 and a norm are subnormal
rows = np.tile(np.linspace(-1, 1, 64, dtype=np.float32), (320, 1))
rows[5] = np.linspace(-1e-39, 1e-39, 64)
small = np.full(64, 1e-41, np.float32)

def logits():
    model.set("embedding", 0, Weight(0, rows.shape, rows))
    model.set("ffn_norm", 1, Weight(0, (1, 64), small))
    contexts = [NativeContext(model, threads) for threads in (1, 2)]
    return [whole(context, [5, 5, 9, 5]) for context in contexts]

model = build(MODEL)
wanted = logits()
assert keeps_subnormals() and np.isfinite(wanted).all()
assert np.array_equal(*wanted)
import torch
assert torch.set_flush_denormal(True) and not keeps_subnormals()
again = logits()  # the caller's mode is not the library's
assert not keeps_subnormals()
assert all(a.tobytes() == b.tobytes() for a, b in zip(again, wanted))
torch.set_flush_denormal(False)
assert keeps_subnormals()
"""
    run(code, folder)
