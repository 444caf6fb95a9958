#!/usr/bin/env python3
"""Set up an environment and run the project's jobs. Needs Python 3.10 or later and git, and nothing else.

    python3 dev.py finetune [OPTIONS OF examples/finetune.py]   the main job
    python3 dev.py test [--quick] [--only STEP]                 every check, as CI runs them
    python3 dev.py docs                                         the documentation's site, in runs/docs
    python3 dev.py setup                                        the environment alone

The environment is .venv (or --venv DIR), with the versions of constraints.txt. It is made at the first call, used again
as it is afterwards, and made again when constraints.txt or pyproject.toml changed or when making it was interrupted.
"""
# No annotations and no new syntax here: an old Python must get as far as the message that it is too old.

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.abspath(__file__))
MINIMUM = (3, 10)
OLDEST_TRITON, NEWEST_TRITON = "3.6.0", "3.9.0"  # next to the one that constraints.txt pins
# What the other two Tritons are asked in the interpreter: every kernel in every dtype, every op's values, every mask.
HEADLINES = "dtypes or every_gradient or three_steps or mask or bf16_repair or compiled or wide"
# What TRL's and torchao's tests need. Apart from the environment: where torchao is, peft and transformers import it in
# every process, which takes seconds.
EXTRAS = ("trl", "datasets", "dill", "multiprocess", "pandas", "pyarrow", "torchao", "xxhash")
EXTRAS_STEP = "TRL and torchao"  # where a skipped test is a failure
# Steps with a process per core, one after another. Next to them runs one more process, for all other steps: it fills
# the cores while tests are collected, a pool starts or the last test of a step is alone.
WIDE = ("tests", "interpreter, Triton pinned", "aot, Triton pinned", "slow tests")
NEEDED_BYTES = 4 << 30  # with a CPU build of torch 2.3 GB, and 1.6 GB for the overlays; more with CUDA
MARKER = "fastlora-environment"  # inside an environment of ours: what was installed, written last
ON_LINUX = sys.platform.startswith("linux")


class Problem(Exception):
    """Something the user can do something about; shown without a traceback."""


def say(message):
    print(f"\n\033[1m== {message}\033[0m" if sys.stdout.isatty() else f"\n== {message}", flush=True)


class Environment:
    def __init__(self, folder):
        self.folder = os.path.abspath(folder)
        self.python = os.path.join(self.folder, *(["Scripts", "python.exe"] if os.name == "nt" else ["bin", "python"]))
        self.marker = os.path.join(self.folder, MARKER)

    def ensure(self, extra):
        """Make the environment hold this project with one of its extras, doing only what is not done yet."""
        recipe = self._recipe()
        installed = self._installed(recipe)
        if installed is not None and (extra in installed or "dev" in installed):
            print(f"using the environment in {self.folder}", flush=True)
            return
        if installed is None:
            self._make_empty()
            say("Installing torch (the largest download; a CUDA build is several GB)")
            self._pip("torch")
        say(f"Installing fastlora with its {extra!r} extra")
        self._pip("--editable", f"{ROOT}[{extra}]")
        with open(self.marker, "w") as file:
            file.write("\n".join([recipe, *sorted({extra, *(installed or [])})]))

    def overlay(self, packages):
        """A folder that, first on PYTHONPATH, has these packages alone: of a version that is named (another Triton), or
        of the pinned one, and then together with the environment all that they require."""
        pinned = "==" not in packages[0]
        folder = os.path.join(self.folder, packages[0].replace("==", "-"))
        if not os.path.isdir(folder):
            say(f"Installing {', '.join(packages)} next to the environment's packages")
            partial = folder + ".partial"
            shutil.rmtree(partial, ignore_errors=True)
            self._pip("--no-deps", "--target", partial, *packages, constrained=pinned)
            check = [self.python, "-m", "pip", "check"]
            if pinned and subprocess.run(check, env={**os.environ, "PYTHONPATH": partial}, check=False).returncode:
                raise Problem("dev.py's EXTRAS and constraints.txt do not fit together; pip's own message is above")
            os.rename(partial, folder)
        return folder

    def _recipe(self):
        digest = hashlib.sha256(repr((sys.version_info[:2], ROOT)).encode())
        for name in ("constraints.txt", "pyproject.toml"):
            with open(os.path.join(ROOT, name), "rb") as file:
                digest.update(file.read().split(b"[tool.")[0])  # a linter's setting changes no environment
        return digest.hexdigest()

    def _installed(self, recipe):
        """The extras installed, or None where the environment is missing, half-made or out of date."""
        if not os.path.exists(self.marker):
            return None
        with open(self.marker) as file:
            lines = file.read().split("\n")
        works = subprocess.run([self.python, "-c", "import torch"], capture_output=True, check=False).returncode == 0
        return lines[1:] if lines[0] == recipe and works else None

    def _make_empty(self):
        if os.path.exists(self.folder) and os.listdir(self.folder):
            # `making` is written first and `marker` last: with either, the folder is ours to remove.
            if not any(os.path.exists(os.path.join(self.folder, name)) for name in (MARKER, MARKER + ".making")):
                raise Problem(
                    f"{self.folder} exists and was not made by dev.py: remove it, or name another place with --venv DIR"
                )
            say(f"Removing the environment in {self.folder}: unfinished, or made for other versions")
            self._clear()
        os.makedirs(self.folder, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < NEEDED_BYTES:
            raise Problem(
                f"{free / 2**30:.1f} GB free for {self.folder}; wanted at least {NEEDED_BYTES / 2**30:.0f} GB"
            )
        say(f"Making an environment in {self.folder}")
        self._mark_as_being_made()
        made = subprocess.run([sys.executable, "-m", "venv", self.folder], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            said = (made.stdout + made.stderr).strip()
            raise Problem(
                f"{sys.executable} could not make a virtual environment; on Debian and Ubuntu install python3-venv. "
                f"It said:\n{said}"
            )

    def _mark_as_being_made(self):
        with open(self.marker + ".making", "w"):
            pass

    def _clear(self):
        """Remove what is in the folder, but not the mark that it is ours: this too may be interrupted."""
        self._mark_as_being_made()
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != MARKER + ".making":
                os.unlink(entry.path)

    def _pip(self, *what, constrained=True):
        # Not compiled: most of what is installed is never imported, and what is, Python compiles then.
        command = [self.python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
        if constrained:
            command += ["--constraint", os.path.join(ROOT, "constraints.txt")]
        if subprocess.run([*command, *what], check=False).returncode != 0:
            free = shutil.disk_usage(self.folder).free
            why = "the disk is full" if free < 200 << 20 else "pip's own message is above"
            raise Problem(f"pip install {' '.join(what)} failed: {why}. Running the same command again resumes.")


def documentation(environment):
    """The command that builds the site of zensical.toml. Broken links, anchors and names are errors."""
    return [environment.python, "-m", "zensical", "build", "--strict", "--clean"]


def steps(environment, quick):
    """(name, command, packages of an overlay or None, extra variables), in the order in which they start."""
    python = environment.python
    plain = [python, "-m", "pytest", "-q", "-p", "no:benchmark"]
    # Where a step is WIDE: the tests and the interpreter are one Python thread each. tests/aot has a pool of its own.
    workers = str(max(1, min(8, os.cpu_count() or 1)))
    pytest = [*plain, "-n", workers, "--dist", "worksteal"]
    yield "ruff check", [python, "-m", "ruff", "check", "."], None, {}
    yield "ruff format", [python, "-m", "ruff", "format", "--check", "."], None, {}
    yield "pyright", [python, "-m", "pyright", "--pythonpath", python], None, {}
    yield "docs", documentation(environment), None, {}
    yield "tests", [*pytest, "-m", "not slow"], None, {}
    if quick:
        return
    yield "wheel", [*plain, "tests/packaging"], None, {}
    quantised = ["tests/ops/test_quant.py", "tests/peft_layers/test_peft_quantised.py", "tests/adapters/test_merge.py"]
    quantised.append("tests/distributed/test_quantised_shards.py")
    trl = ["tests/training/test_trl.py", "tests/docs/test_docs.py"]
    chosen = [*trl, *quantised, "-k", "test_trl or torchao or trainer.md or chat.md"]
    yield EXTRAS_STEP, [*plain, *chosen], EXTRAS, {}
    if ON_LINUX:  # Triton's wheels are for Linux
        for triton in (None, OLDEST_TRITON, NEWEST_TRITON):
            name = f"interpreter, Triton {triton or 'pinned'}"
            headlines = ["-k", HEADLINES] if triton else []
            packages = triton and (f"triton=={triton}",)
            yield (
                name,
                [*(plain if triton else pytest), "tests/interpreter", *headlines],
                packages,
                {"TRITON_INTERPRET": "1"},
            )
        for triton in (None, OLDEST_TRITON, NEWEST_TRITON):
            # Every configuration with the pinned one alone, whose "all" holds what "usual" has; with the others
            # tests/aot compiles the headlines.
            which = ["-m", "not slow"] if triton else ["-k", "not usual"]
            packages = triton and (f"triton=={triton}",)
            yield f"aot, Triton {triton or 'pinned'}", [*plain, "tests/aot", *which], packages, {}
    yield "slow tests", [*pytest, "-m", "slow"], None, {}


def run_step(environment, command, packages, variables, show, running):
    """Run a command, handing its output to `show` as it comes; (exit status, the output's last 4,000 characters)."""
    # The hash seed, because pytest-xdist's processes must collect the same names, and sets are printed in hash order.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **variables}
    env.pop("PYTHONPATH", None)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # kept bytecode: collecting the tests takes a third less, in every process
    if "TRITON_INTERPRET" not in variables:
        env.pop("TRITON_INTERPRET", None)
    if packages is not None:
        env["PYTHONPATH"] = environment.overlay(packages)
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    running.append(process)
    tail = b""
    try:
        while True:
            piece = os.read(process.stdout.fileno(), 65536)  # not by lines: pytest's dots should appear one by one
            if not piece:
                break
            show(piece)
            tail = (tail + piece)[-4000:]
        return process.wait(), tail.decode(errors="replace")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def closing_counts(output):
    """What pytest's last line counts: {"passed": 12, "skipped": 1}; empty where the output is not pytest's."""
    lines = [
        line for line in output.splitlines() if re.search(r"\b(passed|failed|skipped|errors?)\b.* in [\d.]+s", line)
    ]
    found = re.findall(r"(\d+) (passed|failed|skipped|xfailed|xpassed|errors?)", lines[-1]) if lines else []
    return {word.rstrip("s") if word.startswith("error") else word: int(number) for number, word in found}


def test(environment, quick, only):
    chosen = [step for step in steps(environment, quick) if not only or any(step[0].startswith(name) for name in only)]
    if not chosen:
        names = ", ".join(repr(step[0]) for step in steps(environment, quick))
        raise Problem(f"--only {' '.join(only)}: no such step; there are {names}")
    environment.ensure("dev")
    began = time.monotonic()
    rows, totals = run_steps(environment, chosen)
    say("Summary")
    for name, *_ in chosen:
        seconds, result = rows[name]
        print(f"{name:<28}{seconds:8.1f} s   {result}")
    print(closing_line(totals, time.monotonic() - began), flush=True)
    return 0 if all(result == "ok" for _, result in rows.values()) else 1


def run_steps(environment, chosen):
    """({name: (seconds, verdict)}, the sum of what pytest counted). The WIDE steps run in order and show their output
    as it comes; the others run next to them, one at a time, and each shows its own when it is done."""
    rows, totals, running, screen = {}, {}, [], threading.Lock()

    def run(step, show):
        start = time.monotonic()
        try:
            _, command, packages, variables = step
            status, output = run_step(environment, command, packages, variables, show, running)
        except Problem as problem:  # of installing what the step needs
            status, output = 1, ""
            show(f"dev.py: {problem}\n".encode())
        counts = closing_counts(output)
        if step[0] == EXTRAS_STEP and counts.get("skipped"):
            status = status or 1
        if status != 0 and not (counts.get("failed") or counts.get("error")):
            counts["error"] = 1
        for word, count in counts.items():
            totals[word] = totals.get(word, 0) + count
        rows[step[0]] = time.monotonic() - start, "ok" if status == 0 else f"FAILED (exit status {status})"

    def write(piece):
        with screen:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()

    def run_aside():
        for number, step in aside:
            pieces = []
            run(step, pieces.append)
            write(f"\n== [{number}/{len(chosen)}] {step[0]}\n".encode() + b"".join(pieces))

    numbered = list(enumerate(chosen, 1))
    shown = [(number, step) for number, step in numbered if step[0] in WIDE] or numbered
    aside = [one for one in numbered if one not in shown]
    thread = threading.Thread(target=run_aside, daemon=True)
    thread.start()
    try:
        for number, step in shown:
            say(f"[{number}/{len(chosen)}] {step[0]}")
            run(step, write)
        thread.join()
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
    return rows, totals


def closing_line(totals, seconds):
    """The sum over all steps, in the form of pytest's own closing line."""
    order = ("failed", "passed", "skipped", "xfailed", "xpassed", "error")
    parts = [
        f"{totals[word]} {word}{'s' * (word == 'error' and totals[word] > 1)}" for word in order if totals.get(word)
    ]
    minutes, rest = divmod(int(seconds), 60)
    text = f" {', '.join(parts) or 'no tests ran'} in {seconds:.2f}s ({minutes // 60}:{minutes % 60:02}:{rest:02}) "
    return text.center(100, "=")


def build_docs(environment):
    status = subprocess.run(documentation(environment), cwd=ROOT, check=False).returncode
    if status != 0:
        raise Problem("the documentation has problems; they are listed above")
    print(f"open {os.path.join(ROOT, 'runs', 'docs', 'index.html')}, or: {environment.python} -m zensical serve")
    return 0


def parse(arguments):
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="job", metavar="finetune | test | docs | setup")
    commands.required = True
    jobs = {
        # Its options, --help among them, are examples/finetune.py's.
        "finetune": commands.add_parser(
            "finetune", add_help=False, allow_abbrev=False, help="set up and run the example"
        ),
        "test": commands.add_parser("test", help="set up and run every check"),
        "docs": commands.add_parser("docs", help="set up and build the documentation's site"),
        "setup": commands.add_parser("setup", help="set up the environment for all of these"),
    }
    for job in jobs.values():
        job.add_argument("--venv", metavar="DIR", default=os.path.join(ROOT, ".venv"), help="default: .venv")
    jobs["test"].add_argument("--quick", action="store_true", help="ruff, pyright, the docs and the plain tests only")
    jobs["test"].add_argument("--only", metavar="STEP", action="append", default=[], help="steps whose name begins so")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.job != "finetune":
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    return options, rest


def main(arguments):
    options, rest = parse(arguments)
    environment = Environment(options.venv)
    if options.job == "test":
        return test(environment, options.quick, options.only)
    environment.ensure({"setup": "dev", "docs": "docs"}.get(options.job, "examples"))
    if options.job == "setup":
        print(f"ready: {environment.python}")
        return 0
    if options.job == "docs":
        return build_docs(environment)
    say("examples/finetune.py")
    script = os.path.join(ROOT, "examples", "finetune.py")
    return subprocess.run([environment.python, script, *rest], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    if sys.version_info < MINIMUM:
        found = ".".join(str(number) for number in sys.version_info[:3])
        sys.exit(f"dev.py: this is Python {found} ({sys.executable}); wanted {MINIMUM[0]}.{MINIMUM[1]} or later")
    try:
        sys.exit(main(sys.argv[1:]))
    except Problem as problem:
        sys.exit(f"\ndev.py: {problem}")
    except KeyboardInterrupt:
        print("\ndev.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
