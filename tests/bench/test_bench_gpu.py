"""What bench/gpu.sh is made of, without a GPU: the smoke stage's verdicts; steps that fail, hang or stop the rest."""

import math
import signal
import sys
import tarfile
import time

import pytest
import torch

from bench.gpu import session
from bench.gpu.session import AGAIN, NOTHING_WORKS, Session, Step

pytest.importorskip("triton")


def item(write):
    from bench.gpu.smoke import Item

    exact, out = torch.arange(1.0, 65.0).view(16, 4).double(), torch.full((16, 4), math.nan)
    return Item(lambda: write(out, exact.float()), [out], [("out", lambda: out, lambda: exact)], 1 << 30)


def one_row_wrong(out, exact):
    out.copy_(exact)
    out[3] *= 1.5


@pytest.mark.parametrize(
    "write, complaint",
    [
        (lambda out, exact: out.copy_(exact), None),
        (lambda out, exact: out.copy_(1.5 * exact), "out is off by 5.0e-01"),
        (one_row_wrong, "out is off by"),
        (lambda out, exact: out[:15].copy_(exact[:15]), "not all is written"),
        (lambda out, exact: out.copy_(exact + 1e-4 * torch.rand(16, 4)), "other bits"),
    ],
)
def test_a_line_of_the_smoke_stage(write, complaint, capsys):
    from bench.gpu.smoke import report

    found = report("an item", item(write), wide=False, gpu=False)
    assert bool(found["failures"]) == (complaint is not None)
    line = capsys.readouterr().out
    assert (complaint or "passed") in line and "an item" in line


def command(code):
    """A step in a process of its own."""
    return f"{sys.executable} -c {code}"


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*steps, seconds=60.0, answers=True):
        monkeypatch.setattr(session, "REHEARSAL", steps)
        monkeypatch.setattr(Session, "answers", staticmethod(lambda: answers))
        out, work = tmp_path / "out", tmp_path / "work"
        arguments = [str(out), "--work", str(work), "--deadline", str(time.time() + seconds), "--rehearse"]
        return session.main(arguments), out, work

    return run


GOOD, BAD = Step("good", 5, "", command("print(7)")), Step("bad", 5, "", command("raise(SystemExit(4))"))


def test_a_step_that_fails_does_not_stop_the_rest(run):
    inside = Step("inside", 5, "bench no_such_benchmark", "x")
    status, out, _ = run(BAD, inside, Step("absent", 5, "", "no_such_command x"), GOOD)
    assert status == 1
    assert {path.name for path in out.iterdir()} == {"results.tar.gz", "steps.txt", "summary.txt"}
    lines = (out / "steps.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "bad: FAILED with 4",
        "inside: FAILED with 2",
        "absent: left out: no_such_command is not on the PATH",
        "good: passed",
    ]
    assert "== good\n7" in (out / "summary.txt").read_text()
    with tarfile.open(out / "results.tar.gz") as archive:
        assert {"results/steps.txt", "results/logs/good.log"} <= set(archive.getnames())


def test_it_goes_on_in_a_new_process(run):
    """After a step that has broken the GPU, and after one that did not come back."""
    status, out, work = run(BAD, GOOD, answers=False)
    assert status == AGAIN and "good" not in (out / "steps.txt").read_text()
    (work / "steps.txt").write_text("bad: DIED\n")
    assert run(BAD, GOOD)[0] == 1
    assert (out / "steps.txt").read_text().startswith("bad: DIED\ngood: passed")


def test_nothing_follows_where_no_kernel_is_right(run):
    status, out, _ = run(Step("smoke", 5, "", command(f"raise(SystemExit({NOTHING_WORKS}))")), GOOD)
    assert status == 1
    assert (
        "stopped: no kernel is right" in (out / "steps.txt").read_text()
        and "good" not in (out / "steps.txt").read_text()
    )


def test_time(run):
    """A step ends at its limit, whatever it guards its cases with; what there is no time for is left out."""
    before = signal.getsignal(signal.SIGALRM)

    def guarded():
        with session.interrupted(1):
            try:
                time.sleep(5)
            except Exception:  # as a benchmark guards its cases
                return

    with pytest.raises(session.OutOfTime):
        guarded()
    assert signal.getsignal(signal.SIGALRM) is before
    status, out, _ = run(Step("slow", 2, "", command("__import__('time').sleep(60)")), GOOD, seconds=17.8)
    lines = (out / "steps.txt").read_text().splitlines()
    assert status == 1 and "slow: STOPPED" in lines[0] and "good: passed" in lines[1]
