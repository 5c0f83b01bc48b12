"""A cost profile as a table (pure)."""

from __future__ import annotations

from statistics import fmean

from rich.table import Table

from flexpert.bench.report_table import figures_table
from flexpert.simulator.cost_profile import CostProfile


def profile_text(profile: CostProfile) -> Table:
    """What each thing costs, and how well that explains the runs."""
    table = figures_table(f"{profile.shape.model} on {profile.shape.device}", "", ("ms",))
    table.caption = (
        f"{profile.machine.line()}, load average {profile.load_average:.1f}; up to {profile.ranks} "
        "ranks"
    )
    step, head, change = profile.step, profile.head, profile.change
    table.add_row("a step of a rank", _ms(step.base_s))
    total, before = 0.0, 0
    for knot, seconds in zip(step.knots, step.decode_s, strict=True):
        total += seconds
        table.add_row(f"  {before or 'none'} to {knot} sequences decode: up to", _ms(total))
        before = knot
    table.add_row("  1,000 tokens of prompts", _ms(1e3 * step.prompt_token_s))
    table.add_row("  1,000,000 pairs of tokens within prompts", _ms(1e6 * step.pair_s))
    table.add_row("  1,000 tokens of context of those that decode", _ms(1e3 * step.context_s))
    table.add_row("  each further rank", _ms(step.rank_s))
    table.add_row("  share of the other ranks' work that it waits for", f"{step.shared:.0%}")
    table.add_section()
    table.add_row("a request: latency beside the head's work", _ms(head.latency_s))
    table.add_row("  in the head", _ms(head.request_s))
    table.add_row("  1,000 tokens of its prompt in the head", _ms(1e3 * head.prompt_token_s))
    table.add_row("1,000 tokens in the head", _ms(1e3 * head.token_s))
    table.add_section()
    for name, seconds in (
        ("a rank joins", change.join_s),
        ("  the switch", change.join_pause_s),
        ("a rank leaves", change.leave_s),
        ("  the switch", change.leave_pause_s),
        ("a rank is killed: until the head knows", change.detect_s),
        ("  until the others go on", change.recover_s),
        ("  until it is back", change.restart_s),
    ):
        table.add_row(name, _ms(seconds))
    table.add_row("steps while a rank joins", f"× {change.slowdown:.2f}")
    if profile.runs:
        table.add_section()
        off = [abs(run.fitted_s / run.measured_s - 1) for run in profile.runs]
        table.add_row(f"mean error of the durations of {len(off)} runs", f"{fmean(off):.0%}")
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"
