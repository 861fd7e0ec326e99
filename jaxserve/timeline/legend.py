"""The colours of a timeline and what they mean, the same in every format."""

from jaxserve.timeline.record import Phase

COLOURS = {  # two shades per phase, so that sequences that follow each other in a slot look different
    Phase.PREFILL: ("#e8a33d", "#d18a1f"),
    Phase.RECOMPUTE: ("#c45ab3", "#a63f96"),
    Phase.DECODE: ("#7fb2dc", "#4f8bc0"),
    Phase.STALLED: ("#d9d9d9", "#c4c4c4"),
    Phase.PREEMPTED: ("#f4c7c3", "#ecaaa4"),
}
MEANINGS = {
    Phase.PREFILL: "prefill",
    Phase.RECOMPUTE: "prefill again after a preemption",
    Phase.DECODE: "decode",
    Phase.STALLED: "in a slot, waiting for its part of a chunk",
    Phase.PREEMPTED: "preempted: no slot (shown in its old slot until another sequence gets that)",
}
PAGES_COLOUR, WAITING_COLOUR = "#5b9a68", "#9a8fb5"


def short_meaning(phase: Phase) -> str:
    """Returns what a phase means, without the remark in the legend."""
    return MEANINGS[phase].partition(":")[0]
