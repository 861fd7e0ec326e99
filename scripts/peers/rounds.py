"""Runs a workload on several engines in turns: one untimed round each, then timed ones in rotated order.

While one engine runs, the others should be idle; the processor time that they take is recorded with the round.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lib.workloads import Workload
from peers.process import Peer, PeerError


@dataclasses.dataclass(frozen=True)
class Measured:
    """One timed round of one engine.

    Attributes:
      name: the engine's name.
      index: number of the round, from 0.
      seconds: duration of the round.
      seconds_per_token: time per token of each request, if the engine reports it.
      token_ids: generated tokens of each request.
      others_cpu_seconds: processor time of the other engines during the round; None if the system does not report it.
      more: figures that only this engine has.
    """

    name: str
    index: int
    seconds: float
    seconds_per_token: list[float] | None
    token_ids: list[list[int]]
    others_cpu_seconds: float | None
    more: dict[str, Any]


def run_once(peer: Peer, workload: Workload, timeout_s: float) -> dict[str, Any]:
    """Runs one round and returns the answer.

    Raises:
      PeerError: if the engine failed, or generated another number of tokens than the workload asks for.
    """
    message = {"do": "run", "prompts": workload.prompts, "output_lengths": workload.output_lengths}
    answer = peer.ask(message, timeout_s)
    lengths = [len(ids) for ids in answer["token_ids"]]
    if lengths != workload.output_lengths:
        raise PeerError(f"it generated {sum(lengths)} tokens, not the {workload.num_output_tokens} of the workload")
    return answer


def measure(
    peers: Mapping[str, Peer],
    workload: Workload,
    *,
    repeats: int,
    timeout_s: float,
    failed: Callable[[str, PeerError], None],
) -> Iterator[Measured]:
    """Yields all timed rounds; an engine that fails is reported to `failed` and takes no further part."""
    remaining = dict(peers)

    def attempt(name: str) -> dict[str, Any] | None:
        try:
            return run_once(remaining[name], workload, timeout_s)
        except PeerError as error:
            failed(name, error)
            del remaining[name]
            return None

    for name in peers:
        attempt(name)
    for index in range(repeats):
        names = list(remaining)
        start = index % len(names) if names else 0
        for name in [*names[start:], *names[:start]]:
            before = _cpu_seconds(remaining, name)
            answer = attempt(name)
            if answer is not None:
                after = _cpu_seconds(remaining, name)
                yield Measured(
                    name=name,
                    index=index,
                    seconds=answer["seconds"],
                    seconds_per_token=answer["seconds_per_token"],
                    token_ids=answer["token_ids"],
                    others_cpu_seconds=None if before is None or after is None else after - before,
                    more=answer["more"],
                )


def _cpu_seconds(peers: Mapping[str, Peer], busy: str) -> float | None:
    """Returns the processor time of all peers but the busy one; None if the system does not report it."""
    usages = [peer.usage().cpu_seconds for name, peer in peers.items() if name != busy]
    return sum(usage for usage in usages if usage is not None) if None not in usages else None


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Returns the share of tokens that come before the first difference within their request."""
    same = total = 0
    for one, other in zip(ours, theirs, strict=True):
        differing = [index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        same += differing[0] if differing else len(one)
        total += len(one)
    return same / total
