"""The head's real code without processes: changes come to their end, and a plan is encoded once."""

from flexpert.engine import rank_protocol as msg
from flexpert.moe.placement import Placement
from flexpert.simulator.head_scaling import ScalingPlan, run_scaling
from flexpert.simulator.immediate_ranks import ImmediateRanks


def test_ranks_join_and_leave() -> None:
    cluster = ImmediateRanks(300, 302, 8, 2)
    assert cluster.change(add=2).target == list(range(302))
    assert cluster.change(remove=[0, 7]).state == "done"
    assert cluster.coordinator.members == set(range(302)) - {0, 7}


def test_a_plan_is_encoded_once_for_all_ranks() -> None:
    plan = msg.Prepare(1, {0: b"a", 1: b"b"}, Placement(2, [{0: [0], 1: [1]}]))
    encoded = msg.encode(plan)
    assert msg.encode(plan) is encoded
    other = msg.Prepare(2, {0: b"a"}, plan.placement)
    assert msg.decode_command(msg.encode(other)) == other
    assert msg.decode_command(msg.encode(plan)) == plan


def test_what_the_head_does_is_measured_for_each_number_of_ranks() -> None:
    report = run_scaling(
        ScalingPlan(ranks=(2, 12), experts=8, layers=2, votes=(2, 6)), lambda line: None
    )
    few, many = report.heads
    assert (few.ranks, many.ranks, many.redundant) == (2, 12, 5)
    assert few.change_messages < many.change_messages
    assert few.prepare_bytes < many.prepare_bytes
    assert few.vote_us < many.vote_us
