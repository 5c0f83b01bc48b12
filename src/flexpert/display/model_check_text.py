"""What `flexpert check` has found, as people read it (pure)."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flexpert.cluster.formatting import ids, memory_parts, mib
from flexpert.cluster.model_check import CheckedFiles, ModelCheck, dealt_alike


def check_text(found: ModelCheck) -> RenderableType:
    """One line of verdict, then what it stands on."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    if family := found.family:
        moe = f"{family.moe_layers} of its {family.layers} layers are MoE"
        if family.drafts:
            moe += ", the last one of them proposes tokens"
        table.add_row("family", f"{family.model_type} ({family.architecture}), {moe}")
        table.add_row(
            "sizes",
            f"{family.experts} experts, {family.topk} a token; hidden {family.hidden}, vocabulary "
            f"{family.vocab}, context {family.context}",
        )
        if family.stateful_layers:
            table.add_row(
                "states",
                f"{family.stateful_layers} layers keep one of each sequence: "
                f"{mib(family.state_nbytes)}",
            )
    if found.files:
        _add_files(table, found.files)
    for skipped in found.skipped:
        table.add_row(
            "skipped",
            f"{skipped.kind}: {_tensors(skipped.tensors)}, {mib(skipped.nbytes)}, such as "
            f"{skipped.example}: {skipped.reason}",
        )
    if found.in_memory:
        table.add_row(
            "in memory",
            ", ".join(f"{part} weights {dtype}" for part, dtype in found.in_memory.items()),
        )
    for group in dealt_alike(found.ranks):
        name = f"rank{'s' if len(group) > 1 else ''} {ids([one.rank for one in group])}"
        host, device = group[0].host, group[0].device
        table.add_row(name, f"{memory_parts(host)} of the host, {group[0].experts} experts")
        if device:
            table.add_row("", f"{memory_parts(device, gpu=True)} of a GPU")
    for remark in found.remarks:
        table.add_row("note", remark)
    return Group(_verdict(found), table)


def _verdict(found: ModelCheck) -> Text:
    looked = f"checked in {found.seconds:.1f} s"
    if found.read_s is not None:
        looked += f", all weights read in {found.read_s:.1f} s: all are finite"
    if found.served:
        return Text.assemble((f"{found.model} would be served", "green"), f" ({looked})")
    return Text.assemble((f"{found.model} is refused: ", "bold red"), found.reason or "")


def _add_files(table: Table, files: CheckedFiles) -> None:
    names = ", ".join(files.names[:2]) + (" …" if len(files.names) > 2 else "")
    table.add_row("files", f"{len(files.names)} of {mib(files.nbytes)}: {names}")
    if files.passed_over:
        table.add_row(
            "not read",
            f"{', '.join(files.passed_over[:2])}{' …' if len(files.passed_over) > 2 else ''}: "
            "transformers would not read them either",
        )
    dtypes = ", ".join(f"{dtype} {mib(nbytes)}" for dtype, nbytes in files.dtypes.items())
    table.add_row("format", f"{files.format} ({dtypes})")
    table.add_row("used", f"{_tensors(files.used)}, {mib(files.used_nbytes)}")


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' if count != 1 else ''}"
