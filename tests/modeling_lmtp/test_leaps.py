"""Which head and which earlier state draft which position."""

from __future__ import annotations

import re

import pytest

from modeling_lmtp.leaps_lmtp import (
    Draft,
    check_offsets,
    draftable,
    drafts,
    evenly_spaced_offsets,
    num_draft_states,
)

# Worked out by hand: distance: (head counted from 1, look-back)
TABLES = {
    "k=1 m=3": ((2, 3, 4), {1: (1, 0), 2: (2, 0), 3: (3, 0)}),
    "k=2 m=3": (
        (3, 5, 7),
        {1: (1, 1), 2: (1, 0), 3: (2, 1), 4: (2, 0), 5: (3, 1), 6: (3, 0)},
    ),
    "k=3 m=2": (
        (4, 7),
        {1: (1, 2), 2: (1, 1), 3: (1, 0), 4: (2, 2), 5: (2, 1), 6: (2, 0)},
    ),
    "2, 3, 5": ((2, 3, 5), {1: (1, 0), 2: (2, 0), 3: (3, 1), 4: (3, 0)}),
    "2, 4, 6": ((2, 4, 6), {1: (1, 0), 2: (2, 1), 3: (2, 0), 4: (3, 1), 5: (3, 0)}),
    "one head": ((4,), {1: (1, 2), 2: (1, 1), 3: (1, 0)}),
    "no head": ((), {}),
}
SCHEDULES = [
    (),
    (2,),
    (9,),
    (2, 3, 4, 5, 6, 7),
    (3, 5, 7),
    (2, 3, 5),
    (2, 9),
    (5, 6, 12),
    (4, 7, 10, 13),
    (2, 4, 8, 16),
]


@pytest.mark.parametrize(("offsets", "table"), TABLES.values(), ids=TABLES.keys())
def test_drafts_follow_the_table_worked_out_by_hand(offsets, table):
    expected = tuple(Draft(a, head - 1, look_back) for a, (head, look_back) in table.items())
    assert drafts(offsets) == expected


@pytest.mark.parametrize("leap_stride", [1, 2, 3, 4])
@pytest.mark.parametrize("num_leap_heads", [0, 1, 2, 3, 5])
def test_evenly_spaced_offsets_give_the_formulas_of_the_paper_corrected(
    num_leap_heads, leap_stride
):
    k, m = leap_stride, num_leap_heads
    offsets = evenly_spaced_offsets(m, k)
    assert offsets == tuple(1 + k * i for i in range(1, m + 1))
    schedule = drafts(offsets)
    assert [draft.distance for draft in schedule] == list(range(1, k * m + 1))
    for a, head, look_back in schedule:
        i = -(-a // k)  # ceil
        assert (head, look_back) == (i - 1, k * i - a)


@pytest.mark.parametrize("offsets", SCHEDULES, ids=str)
def test_every_draft_predicts_the_position_that_it_is_for(offsets):
    t = 100
    for a, head, look_back in drafts(offsets):
        assert look_back >= 0
        assert (t - look_back) + offsets[head] == t + 1 + a


@pytest.mark.parametrize("offsets", SCHEDULES, ids=str)
def test_every_distance_up_to_the_horizon_is_drafted_by_the_nearest_head(offsets):
    schedule = drafts(offsets)
    horizon = offsets[-1] - 1 if offsets else 0
    assert [draft.distance for draft in schedule] == list(range(1, horizon + 1))
    for a, head, _ in schedule:
        assert offsets[head] == min(offset for offset in offsets if offset >= 1 + a)


@pytest.mark.parametrize(
    ("offsets", "num_states"),
    [((), 0), ((2, 3, 4), 1), ((3, 5, 7), 2), ((4, 7), 3), ((2, 3, 5), 2), ((2, 9), 7)],
    ids=str,
)
def test_the_schedule_says_how_many_states_it_reads(offsets, num_states):
    assert num_draft_states(drafts(offsets)) == num_states


@pytest.mark.parametrize(
    ("offsets", "num_states", "num_drafts"),
    [
        ((2, 3, 4), 1, 3),
        ((2, 3, 4), 0, 0),
        ((3, 5, 7), 1, 0),
        ((3, 5, 7), 2, 6),
        ((4, 7), 2, 0),
        ((4, 7), 3, 6),
        ((2, 3, 5), 1, 2),
        ((2, 3, 5), 2, 4),
        ((2, 4, 6), 1, 1),
        ((2, 4, 6), 5, 5),
    ],
)
def test_a_short_prompt_drafts_up_to_the_first_missing_state(offsets, num_states, num_drafts):
    schedule = drafts(offsets)
    assert draftable(schedule, num_states) == schedule[:num_drafts]


BAD_OFFSETS = {
    "one": (
        (1, 3),
        "leap_offsets must be 2 or more, got (1, 3): offset 1 is the language-modeling",
    ),
    "negative": ((-2, 3), "leap_offsets must be 2 or more, got (-2, 3)"),
    "decreasing": ((5, 3), "leap_offsets must be increasing, got (5, 3). Sort them"),
    "repeated": ((3, 3), "leap_offsets must be increasing, got (3, 3)"),
    "float": ((2.0, 3), "leap_offsets must be integers, got (2.0, 3)"),
    "bool": ((True, 3), "leap_offsets must be integers, got (True, 3)"),
    "text": (("2", "3"), "leap_offsets must be integers, got ('2', '3')"),
}


@pytest.mark.parametrize(("offsets", "message"), BAD_OFFSETS.values(), ids=BAD_OFFSETS.keys())
@pytest.mark.parametrize("function", [check_offsets, drafts])
def test_bad_offsets_are_refused(function, offsets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(offsets)


@pytest.mark.parametrize(
    ("num_leap_heads", "leap_stride", "message"),
    [
        (-1, 2, "num_leap_heads must be 0 (plain next-token prediction) or more, got -1."),
        (3, 0, "leap_stride must be 1 (multi-token prediction) or more, got 0."),
    ],
)
def test_bad_numbers_of_heads_and_strides_are_refused(num_leap_heads, leap_stride, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evenly_spaced_offsets(num_leap_heads, leap_stride)
