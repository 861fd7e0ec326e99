"""The least work of steps, against sums over every row, layer and position."""

import numpy as np
from lib import roofline

from jaxserve import ModelConfig
from jaxserve.timeline.record import Steps

E, F, V, H, KV, D = 16, 24, 40, 4, 2, 8
MODEL = ModelConfig("mistral", V, E, F, 2, num_heads=H, num_kv_heads=KV, head_dim=D, windows=(None, 3))
MATRICES = 2 * (E * (H + 2 * KV) * D + H * D * E + 3 * E * F)
BLOCKS = MATRICES + 2 * 2 * E  # two norms each


def steps_of(occupant, num_new, sampled) -> Steps:
    none = np.zeros(len(occupant), np.int32)
    arrays = np.array(occupant, np.int32), np.array(num_new, np.int32), np.array(sampled, bool)
    return Steps(*arrays, num_free_pages=none, num_waiting=none, num_preempted=none)


STEPS = (
    steps_of(  # slot 0: a sequence prefills 4 and decodes 1, then another one takes its place; slot 1: one is preempted
        occupant=[[0, -1], [0, 1], [2, 1], [2, -1], [2, 1]],
        num_new=[[4, 0], [1, 2], [0, 1], [5, 0], [1, 3]],
        sampled=[[True, False], [True, True], [False, True], [True, False], [True, True]],
    )
)


def test_a_sequence_starts_anew_in_a_slot_that_it_did_not_have_the_step_before():
    np.testing.assert_array_equal(roofline.computed_before(STEPS), [[0, 0], [4, 0], [0, 2], [0, 0], [5, 0]])


def test_work_is_the_sum_over_rows_layers_and_positions():
    before = [[0, 0], [4, 0], [0, 2], [0, 0], [5, 0]]
    work, in_int8 = (roofline.work_of_steps(STEPS, MODEL, "bfloat16", matrices) for matrices in (None, "int8"))
    for step in range(5):
        flops = num_bytes = 0
        rows = drawn = 0
        for slot in range(2):
            new = int(STEPS.num_new[step, slot])
            rows, drawn = rows + new, drawn + int(STEPS.sampled[step, slot])
            for window in (10**6, 3):
                seen = set()
                for row in range(before[step][slot], before[step][slot] + new):
                    visible = range(max(row - window + 1, 0), row + 1)
                    flops += 4 * H * D * len(visible)
                    seen |= set(visible)
                num_bytes += 2 * 2 * KV * D * (len(seen) + new)
        flops += 2 * rows * MATRICES + 2 * drawn * V * E
        num_bytes += 2 * (BLOCKS if rows else 0) + 2 * (V * E if drawn else 0)
        assert (work.flops[step], work.num_bytes[step]) == (flops, num_bytes)
        saved = (MATRICES if rows else 0) + (V * E if drawn else 0)
        assert (in_int8.flops[step], in_int8.num_bytes[step]) == (flops, num_bytes - saved)


def test_the_floor_takes_the_slower_of_both_in_every_step():
    work = roofline.Work(np.array([100, 10]), np.array([5, 50]))
    assert work.floor_seconds(flops_per_s=10, bytes_per_s=5) == 100 / 10 + 50 / 5


def test_the_work_of_a_decode_is_that_of_a_step_in_which_every_slot_decodes():
    occupant = [[0, 1], [0, 1]]
    steps = steps_of(occupant, num_new=[[5, 5], [1, 1]], sampled=[[False, False], [True, True]])
    recorded = roofline.work_of_steps(steps, MODEL, "bfloat16")
    decode = roofline.work_of_decode(MODEL, "bfloat16", "bfloat16", slots=2, num_tokens=6)
    assert (decode.flops[0], decode.num_bytes[0]) == (recorded.flops[1], recorded.num_bytes[1])


def test_the_flops_of_a_prefill_are_those_of_a_step_that_takes_the_whole_prompt():
    steps = steps_of([[0]], num_new=[[7]], sampled=[[True]])
    assert roofline.prefill_flops(MODEL, "float32", 7) == roofline.work_of_steps(steps, MODEL, "float32").flops[0]
