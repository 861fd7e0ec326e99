"""The timeline of an engine: what each slot did in each step, recorded while it serves and drawn as .html or .png."""

from jaxserve.timeline.record import Bar, Gap, Occupant, Phase, Steps, Timeline
from jaxserve.timeline.save import check_path, recording, save_timeline

__all__ = ["Bar", "Gap", "Occupant", "Phase", "Steps", "Timeline", "check_path", "recording", "save_timeline"]
