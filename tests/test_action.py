"""Actions: their spelling is torch's, and parse is the exact inverse of str."""

import pytest
from hypothesis import given, strategies as st
from torch.distributed.pipelining.schedules import _Action, _ComputationType

from fxpipe.errors import ScheduleError
from fxpipe.ir.action import Action, ComputationType as Type

INDICES = st.integers(0, 10**9 - 1)
ACTIONS = st.builds(
    lambda stage, kind, microbatch: Action(stage, kind, microbatch if kind.has_microbatch else None),
    INDICES,
    st.sampled_from(Type),
    INDICES,
)


def test_the_types_are_torchs():
    ours = {kind.value for kind in Type}
    assert ours == {kind.value for kind in _ComputationType} - {"OVERLAP_F_B"}
    assert all(str(kind) == kind.value == kind.name for kind in Type)


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (Action(2, Type.F, 0), "2F0"),
        (Action(0, Type.I, 12), "0I12"),
        (Action(10, Type.W, 3), "10W3"),
        (Action(1, Type.B, 0), "1B0"),
        (Action(3, Type.SEND_F, 1), "3SEND_F1"),
        (Action(3, Type.RECV_B, 1), "3RECV_B1"),
        (Action(1, Type.UNSHARD), "1UNSHARD"),
        (Action(0, Type.REDUCE_GRAD), "0REDUCE_GRAD"),
    ],
)
def test_spelling(action, text):
    assert str(action) == text
    assert Action.parse(text) == action


@given(ACTIONS)
def test_parse_inverts_str_and_torch_reads_the_same(action):
    assert Action.parse(str(action)) == action
    theirs = _Action.from_str(str(action))
    assert str(theirs) == str(action)
    assert theirs[:3] == (action.stage_index, _ComputationType(action.computation_type.value), action.microbatch_index)


@given(st.text(alphabet="0123456789FIWB_SENDRCVU -\n٣", max_size=12))
def test_what_parse_accepts_is_what_str_writes(text):
    try:
        action = Action.parse(text)
    except ScheduleError:
        return
    assert str(action) == text


@pytest.mark.parametrize(
    "junk", ["", "F0", "2F0x", " 2F0", "2F0\n", "02F0", "2F00", "-1F0", "2f0", "2X0", "٢F0", "2SEND0", "1" * 5000]
)
def test_parse_says_what_it_found_and_the_grammar(junk):
    with pytest.raises(ScheduleError) as e:
        Action.parse(junk)
    assert f"not an action: {junk!r}; expected [stage][type][microbatch], e.g. 2F0 or 1UNSHARD" in str(e.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, Type.F, 0), "action F has stage_index -1; expected an integer from 0 to 999999999"),
        ((10**9, Type.F, 0), "action F has stage_index 1000000000;"),
        ((True, Type.F, 0), "action F has stage_index True;"),
        ((0, Type.F, 1.0), "action F has microbatch_index 1.0;"),
        ((0, Type.SEND_B), "action SEND_B has microbatch_index None; expected an integer"),
        ((0, Type.UNSHARD, 1), "action UNSHARD has microbatch_index 1; it serves the whole stage and takes none"),
        ((0, "F", 0), "action has type 'F'; expected a ComputationType"),
    ],
)
def test_an_action_checks_itself(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        Action(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2UNSHARD0", "UNSHARD has microbatch_index 0; it serves the whole stage and takes none"),
        ("2F", "F has microbatch_index None; expected an integer"),
    ],
)
def test_parse_refuses_a_microbatch_too_many_or_too_few(text, message):
    with pytest.raises(ScheduleError, match=message):
        Action.parse(text)


@pytest.mark.parametrize(("send", "receive"), [("1SEND_F7", "2RECV_F7"), ("1SEND_B7", "0RECV_B7")])
def test_partners(send, receive):
    assert Action.parse(send).partner == Action.parse(receive)
    assert Action.parse(receive).partner == Action.parse(send)


def test_a_compute_has_no_partner():
    with pytest.raises(ScheduleError, match="1F0 is neither a send nor a receive"):
        _ = Action(1, Type.F, 0).partner


def test_actions_are_ordered_and_hashable():
    texts = ["1F0", "0UNSHARD", "0F2", "0F10", "0B3"]
    assert [str(a) for a in sorted(map(Action.parse, texts))] == ["0B3", "0F2", "0F10", "0UNSHARD", "1F0"]
    assert len({Action(0, Type.F, 0), Action(0, Type.F, 0), Action(0, Type.B, 0)}) == 2
