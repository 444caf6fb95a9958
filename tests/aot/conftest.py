"""Options of the compile tests, and the compilation itself, once for all of them."""

import fcntl
import os
import pickle

import pytest
from aot import report, sweep
from aot.pretend import take_censuses

_COMPILED = pytest.StashKey[dict[int, list[report.Row]]]()


def pytest_addoption(parser):
    group = parser.getgroup("ahead-of-time compilation")
    group.addoption(
        "--full",
        action="store_true",
        help="compile every kind of launch and every problem, not one or two of each configuration",
    )
    group.addoption("--write", action="store_true", help="write docs/kernels/compiled.txt from what was compiled")


def pytest_configure(config):
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        pytest.exit("tests/aot compiles kernels: run it in a process without TRITON_INTERPRET", returncode=4)
    if config.getoption("--write") and getattr(config.option, "numprocesses", None):
        pytest.exit(
            "tests/aot --write needs one process: leave out -n (it compiles on every core by itself)", returncode=4
        )


@pytest.fixture(scope="session")
def compiled(request, tmp_path_factory) -> dict[int, list[report.Row]]:
    """What was compiled for each architecture, with its census or the compiler's error."""
    full, write = request.config.getoption("--full"), request.config.getoption("--write")
    if sweep.is_pinned():
        kinds = {arch: (sweep.shipped if full else sweep.chosen)(arch) for arch in sweep.ARCHS}
        if not (full or write):  # odd sizes, fp16 and tf32: where they are most
            kinds = {arch: [kind for kind in kinds[arch] if arch == 90 or not kind.special] for arch in kinds}
    else:
        kinds = {arch: sweep.headlines(arch) if arch == 90 else () for arch in sweep.ARCHS}
    launches = [kind.launch for several in kinds.values() for kind in several]
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # one folder for all of xdist's processes
    with open(base / "compiled.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first process compiles, on every core; the others wait and read
        kept = base / "compiled.pickle"
        if not kept.exists():
            kept.write_bytes(pickle.dumps(take_censuses(launches, base / "triton")))
        results = pickle.loads(kept.read_bytes())
    rows = {arch: [report.Row(kind, results[kind.launch.key]) for kind in several] for arch, several in kinds.items()}
    request.config.stash[_COMPILED] = rows
    return rows


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(_COMPILED, None)
    if rows is None:
        return
    for arch, several in rows.items():
        terminalreporter.section(f"compiled for sm_{arch}")
        terminalreporter.write_line(report.table(several))
    if config.getoption("--write"):
        report.PAGE.write_text(report.page(rows))
        terminalreporter.write_line(f"written: {report.PAGE}")
