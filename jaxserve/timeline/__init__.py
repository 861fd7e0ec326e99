"""What each slot did in each step, recorded while an engine serves and drawn as a page (.html) or a picture (.png)."""

from jaxserve.timeline.record import Bar, Gap, Occupant, Phase, Steps, Timeline, check_path, recording

__all__ = ["Bar", "Gap", "Occupant", "Phase", "Steps", "Timeline", "check_path", "recording"]
