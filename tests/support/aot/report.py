"""The table of what was compiled: printed by the tests, kept in docs/kernels/compiled.txt."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton
from aot.pretend import Census
from aot.sweep import Kind

PAGE = Path(__file__).resolve().parents[3] / "docs" / "kernels" / "compiled.txt"
MARKER = "<!-- written by `pytest tests/aot --write`; do not edit -->"

COLUMNS = (
    "kernel",
    "configuration",
    "regs",
    "shared KiB",
    "spills",
    "MMA",
    "TMA",
    "copies",
    "loads",
    "stores",
    "barriers",
    "instr.",
    "waits",
)


@dataclass(frozen=True)
class Row:
    """A kind of launch and what became of it."""

    kind: Kind
    census: Census | str  # the compiler's error where there is no code

    @property
    def name(self) -> str:
        return f"sm_{self.kind.launch.arch} {self.kind.kernel}: {self.kind.describe()}"

    def cells(self) -> tuple[str, ...]:
        if isinstance(self.census, str):
            return (self.kind.kernel, self.kind.describe(), self.census, *[""] * (len(COLUMNS) - 3))
        census = self.census
        values = (
            census.registers,
            f"{census.shared / 1024:.1f}",
            census.spills,
            census.matrix_instructions,
            census.count("UTMALDG", "UTMASTG"),
            census.count("LDGSTS"),
            census.count("LDG"),
            census.count("STG"),
            census.count("BAR"),
            census.instructions,
            ",".join(map(str, census.wgmma_waits)) or "-",
        )
        return (self.kind.kernel, self.kind.describe(), *map(str, values))


def table(rows: Iterable[Row]) -> str:
    """A Markdown table, one line a row."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines)


def page(compiled: dict[int, list[Row]]) -> str:
    """The whole of docs/kernels/compiled.txt."""
    parts = [
        "# What was compiled",
        MARKER,
        f"""\
Every launch configuration that `kernels/configs.py` can choose, compiled ahead of time by Triton {triton.__version__}
for an A100 (sm_80), an H100 or H200 (sm_90) and a B200 (sm_100); no GPU was involved. Per configuration: the variant
that holds most in registers (dropout mask, bias, adapters of another dtype), and at the benchmarks' shapes the
plainest one as well. split: programs add their parts of a block, and a counter says which of them finishes last.
`pytest tests/aot` asserts over these rows that there is no spill and no atomic but the counters', that shared memory
fits, and that the GEMMs on sm_90 run wgmma in a pipelined loop.

regs: registers per thread. spills: STL and LDL instructions. MMA: HMMA, HGMMA (wgmma) or UTCHMMA (tcgen05)
instructions; an fp32 product in IEEE arithmetic has none. TMA: bulk tensor copies. copies: LDGSTS (`cp.async`).
waits: the N of each `wgmma.wait_group N` in the PTX; one above 0 means that the loop has products in flight.""",
    ]
    for arch, rows in compiled.items():
        parts += [f"## sm_{arch}", table(rows)]
    return "\n\n".join(parts) + "\n"


def named_in(text: str) -> dict[int, list[tuple[str, str]]]:
    """(kernel, configuration) of every row of a page, by architecture."""
    named: dict[int, list[tuple[str, str]]] = {}
    arch = 0
    for line in text.splitlines():
        if line.startswith("## sm_"):
            arch = int(line.removeprefix("## sm_"))
            named[arch] = []
        elif arch and line.startswith("| ") and not line.startswith("| kernel |"):
            kernel, configuration = (cell.strip() for cell in line.split("|")[1:3])
            named[arch].append((kernel, configuration))
    return named
