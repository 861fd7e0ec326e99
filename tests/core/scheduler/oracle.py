"""The scheduler a second time, in plain Python: lists, sets and deques, no arrays, nothing clever.

Written from the design's rules, not from the implementation: a sequence is an object that moves between a waiting list
and a list of slots, pages are the elements of sets, free if no sequence in a slot has them, and every rule is spelled out where
it applies. The model is a stub: the token at a position is a fixed function of the sequence's number and the position.

`Oracle.events` counts what happened, so that a test can show that its traces were worth running.
"""

import collections
import dataclasses

VOCAB_SIZE = 13

UNFINISHED = ("waiting", "running")


def stub_token(number: int, position: int) -> int:
    """Returns the token of the stub model at `position` of the `number`-th sequence to arrive."""
    return ((number % 1009 * 40503 + position * 9973 + number % 7 * (position % 5) * 31) % 65521) % VOCAB_SIZE


@dataclasses.dataclass(frozen=True)
class Limits:
    """The capacities that the rules mention."""

    max_slots: int
    num_pages: int
    page_size: int
    chunk_size: int
    max_model_len: int
    queue_size: int


@dataclasses.dataclass(frozen=True)
class Request:
    """A submitted request. `prompt_length` is separate from the prompt, so that it can be wrong."""

    prompt: tuple[int, ...]
    max_tokens: int
    prompt_length: int
    priority: int = 0
    stop_token_ids: tuple[int, ...] = ()
    follows: bool = False  # one more sample of the request before it in the submission
    prompt_logprobs: bool = False


@dataclasses.dataclass(eq=False)
class Sequence:
    """One submitted sequence, from submission to collection."""

    number: int
    group: int  # number of the first sample of the request
    row: int
    generation: int
    request: Request
    tokens: list[int]
    status: str = "waiting"
    abort_requested: bool = False
    num_computed: int = 0
    num_preemptions: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    was_copied: bool = False  # in this step part of a page was copied for it

    @property
    def urgency(self) -> tuple[int, int]:
        return self.request.priority, self.number

    @property
    def is_decoding(self) -> bool:
        """Whether the latest token is the only one left to compute."""
        return self.num_computed == len(self.tokens) - 1

    @property
    def has_prompt(self) -> bool:
        """Whether all of the prompt is computed, with or without its last token."""
        return self.num_computed >= len(self.request.prompt) - 1


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """The effects of a step."""

    decode_rows: list[tuple[int, int]]  # (slot, position)
    prefill_rows: list[tuple[int, int]]  # (slot, position), in the order of the batch
    num_new: list[int]  # per slot
    slot_rows: list[int | None]  # queue row in each slot while the model ran
    admitted: list[int]  # numbers, in order
    preempted: list[int]  # numbers, in order


class Oracle:
    """Predicts everything that can be seen of the scheduler after each operation."""

    def __init__(self, limits: Limits, *, keeps_pages: bool = True):
        self.limits = limits
        self.keeps_pages = keeps_pages  # whether an admission leaves a page to each sequence that decodes
        self.rows: list[Sequence | None] = [None] * limits.queue_size
        self.generations = [0] * limits.queue_size
        self.slots: list[Sequence | None] = [None] * limits.max_slots
        self.waiting: list[Sequence] = []
        self.free_pages = set(range(limits.num_pages))
        self.num_arrived = 0
        self.endings: list[tuple[int, str]] = []  # (number, reason), in order of ending
        self.events: collections.Counter[str] = collections.Counter()

    # What an owner of sequences does between steps.

    def submit(self, requests: list[Request | None]) -> list[tuple[int, int] | None]:
        """Returns handles (row, generation); None for padding, and for samples of a request that finds too few rows."""
        groups: list[list[int]] = []
        for place, request in enumerate(requests):
            if request is None:
                continue
            if request.follows and place > 0 and requests[place - 1] is not None:
                groups[-1].append(place)
            else:
                groups.append([place])
                self.events["follows no request"] += request.follows
        handles: list[tuple[int, int] | None] = [None] * len(requests)
        for number, places in enumerate(groups):
            free_rows = [row for row, sequence in enumerate(self.rows) if sequence is None]
            if len(places) > len(free_rows):
                self.events["submission refused, no free row"] += not free_rows
                self.events["group refused, too few free rows"] += bool(free_rows)
                self.events["nothing taken behind a refused group"] += bool(free_rows) and number < len(groups) - 1
                break
            first, group = requests[places[0]], self.num_arrived
            for place, row in zip(places, free_rows, strict=False):
                request = requests[place]
                assert first is not None and request is not None
                handles[place] = self._take(request, row, group, is_valid=self._is_valid(request, first))
                stands_first = place == places[0] > 0 and request.follows
                self.events["follows padding"] += stands_first and self._is_valid(request, first)
                is_other = request.prompt != first.prompt and self._is_valid(request, request)
                self.events["another prompt of the same length"] += (
                    is_other and request.prompt_length == first.prompt_length
                )
        return handles

    def _take(self, request: Request, row: int, group: int, *, is_valid: bool) -> tuple[int, int]:
        self.generations[row] += 1
        sequence = Sequence(
            number=self.num_arrived,
            group=group,
            row=row,
            generation=self.generations[row],
            request=request,
            tokens=list(request.prompt),
        )
        self.num_arrived += 1
        self.rows[row] = sequence
        if is_valid:
            self.waiting.append(sequence)
            self.events["one-token prompt"] += len(request.prompt) == 1
            self.events["prompt at the maximum"] += len(request.prompt) == self.limits.max_model_len - 1
            self.events["one token asked for"] += request.max_tokens == 1
            self.events["max_tokens clipped"] += self._max_length(sequence) < len(request.prompt) + request.max_tokens
        else:
            self._end(sequence, "error")
        return row, sequence.generation

    def abort(self, row: int, generation: int) -> None:
        """Asks the next step to end a sequence at its start."""
        sequence = self.rows[row]
        if sequence is None or sequence.generation != generation:
            self.events["abort ignored, stale handle"] += 1
        elif sequence.status not in UNFINISHED:
            self.events["abort ignored, finished before"] += 1
        else:
            sequence.abort_requested = True

    def collect(self, row: int, generation: int) -> None:
        """Frees the row of a finished sequence."""
        sequence = self.rows[row]
        if sequence is None or sequence.generation != generation:
            self.events["collection ignored, stale handle"] += 1
        elif sequence.status in UNFINISHED:
            self.events["collection ignored, unfinished"] += 1
        else:
            self.rows[row] = None
            self.events["collected"] += 1

    # A step.

    def step(self) -> StepRecord:
        self._apply_aborts()
        admitted = self._admit()
        preempted = self._secure_pages()
        decode_rows, prefill_rows = self._plan()
        for sequence in self.slots:
            if sequence is not None:
                sequence.was_copied = False
        rows = decode_rows + prefill_rows
        record = StepRecord(
            decode_rows=decode_rows,
            prefill_rows=prefill_rows,
            num_new=[len([1 for slot, _ in rows if slot == wanted]) for wanted in range(self.limits.max_slots)],
            slot_rows=[None if sequence is None else sequence.row for sequence in self.slots],
            admitted=admitted,
            preempted=preempted,
        )
        self._settle(rows)
        return record

    def has_work(self) -> bool:
        return any(sequence is not None and sequence.status in UNFINISHED for sequence in self.rows)

    def _apply_aborts(self) -> None:
        for sequence in list(self.rows):
            if sequence is None or not sequence.abort_requested:
                continue
            sequence.abort_requested = False
            if sequence.status == "running":
                self.events["abort while decoding" if sequence.is_decoding else "abort in mid-prefill"] += 1
                self._leave_slot(sequence)
            else:
                self.waiting.remove(sequence)
                self.events["abort while preempted" if sequence.num_preemptions else "abort while waiting"] += 1
            self._end(sequence, "abort")

    def _admit(self) -> list[int]:
        admitted = []
        queue = collections.deque(sorted(self.waiting, key=lambda sequence: sequence.urgency))
        while queue:
            if None not in self.slots:
                self.events["head waits for a slot"] += 1
                break
            if self._waits_for_prompt(queue[0]):
                self.events["head waits for the prompt of its group"] += 1
                break
            if not self._may_start(queue[0]):
                self.events["head waits for pages"] += 1
                others = [sequence for sequence in list(queue)[1:] if self._may_start(sequence)]
                self.events["nothing overtakes the head"] += bool(others)
                self.events["nothing overtakes across priorities"] += any(
                    sequence.request.priority > queue[0].request.priority for sequence in others
                )
                break
            sequence = queue.popleft()
            self.waiting.remove(sequence)
            self.events["computes its prompt to report on it"] += sequence.request.prompt_logprobs and any(
                other is not None and other.group == sequence.group and other.num_computed > 1 for other in self.slots
            )
            shared = self._shared_pages(sequence)
            self._start_from(sequence, self._lender(sequence))
            own = len(self._pages_of(sequence)) - len(shared)
            sequence.pages = shared + [self.free_pages.pop() for _ in range(own)]
            sequence.status = "running"
            self.slots[self.slots.index(None)] = sequence
            admitted.append(sequence.number)
            self.events["admitted"] += 1
            self.events["resumed"] += sequence.num_preemptions > 0
        return admitted

    def _may_start(self, sequence: Sequence) -> bool:
        running = [other for other in self.slots if other is not None]
        if not running:
            return True
        kept = len([other for other in running if other.is_decoding]) if self.keeps_pages else 0
        needed = len(self._pages_of(sequence)) - len(self._shared_pages(sequence))
        return needed + kept <= len(self.free_pages)

    def _group_in_slots(self, sequence: Sequence) -> list[Sequence]:
        """Returns the sequences of its group in slots; none if the sequence reports log probabilities of its prompt."""
        if sequence.request.prompt_logprobs:
            return []
        return [other for other in self.slots if other is not None and other.group == sequence.group]

    def _lender(self, sequence: Sequence) -> Sequence | None:
        """Returns the first sequence of the group, by slot, that has the prompt, and no page that is not copied yet."""
        lenders = [other for other in self._group_in_slots(sequence) if other.has_prompt and not other.was_copied]
        return lenders[0] if lenders else None

    def _waits_for_prompt(self, sequence: Sequence) -> bool:
        """Returns whether a sequence of its group computes the prompt, and will still have its slot afterwards."""
        if any(other.has_prompt for other in self._group_in_slots(sequence)):
            return False
        return any(self._max_length(other) > len(other.request.prompt) + 1 for other in self._group_in_slots(sequence))

    def _shared_pages(self, sequence: Sequence) -> list[int]:
        """Returns the pages that the sequence would share: those with nothing but tokens before the prompt's last."""
        lender, last = self._lender(sequence), len(sequence.request.prompt) - 1
        if lender is None:
            return []
        return [page for place, page in enumerate(lender.pages) if max(self._positions_of(place)) < last]

    def _secure_pages(self) -> list[int]:
        preempted = []
        while True:
            asking = [sequence for sequence in self.slots if sequence is not None and self._lacks_a_page(sequence)]
            if len(asking) <= len(self.free_pages):
                break
            victim = max(
                (sequence for sequence in self.slots if sequence is not None), key=lambda sequence: sequence.urgency
            )
            self.events["preempted"] += 1
            self.events["preempted in mid-prefill"] += not victim.is_decoding
            self.events["preempted itself"] += victim in asking
            self.events["preempted twice or more"] += victim.num_preemptions > 0
            self.events["preempted a lender"] += any(self._shares(victim, other) for other in self.slots)
            self.events["fork preempted before its copy"] += victim.was_copied
            self._leave_slot(victim)
            victim.status = "waiting"
            victim.num_preemptions += 1
            self.waiting.append(victim)
            preempted.append(victim.number)
        for sequence in asking:
            sequence.pages.append(self.free_pages.pop())
        return preempted

    def _plan(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        decode_rows, prefill_rows = [], []
        for slot, sequence in enumerate(self.slots):
            if sequence is not None and sequence.is_decoding:
                decode_rows.append((slot, sequence.num_computed))
        prefilling = [sequence for sequence in self.slots if sequence is not None and not sequence.is_decoding]
        for sequence in sorted(prefilling, key=lambda sequence: sequence.urgency):
            for position in range(sequence.num_computed, len(sequence.tokens)):
                if len(prefill_rows) < self.limits.chunk_size:
                    prefill_rows.append((self.slots.index(sequence), position))
        self.events["prefill rows of several sequences"] += len({slot for slot, _ in prefill_rows}) > 1
        self.events["prefill and decode in one step"] += bool(decode_rows and prefill_rows)
        return decode_rows, prefill_rows

    def _settle(self, rows: list[tuple[int, int]]) -> None:
        for slot, position in rows:
            sequence = self.slots[slot]
            assert sequence is not None and position == sequence.num_computed
            sequence.num_computed += 1
        for slot in sorted({slot for slot, _ in rows}):
            sequence = self.slots[slot]
            assert sequence is not None
            if sequence.num_computed < len(sequence.tokens):
                self.events["prompt cut into chunks"] += 1
                continue
            token = stub_token(sequence.number, len(sequence.tokens))
            sequence.tokens.append(token)
            is_full = len(sequence.tokens) >= self._max_length(sequence)
            if token in sequence.request.stop_token_ids:
                self.events["stop token at the last position"] += is_full
                self._leave_slot(sequence)
                self._end(sequence, "stop")
            elif is_full:
                self._leave_slot(sequence)
                self._end(sequence, "length")

    # Small words.

    def _start_from(self, sequence: Sequence, lender: Sequence | None) -> None:
        """Starts a sequence with the lender's part of the prompt, if there is a lender; it computes the last token itself."""
        sequence.num_computed = 0 if lender is None else len(sequence.request.prompt) - 1
        sequence.was_copied = sequence.num_computed % self.limits.page_size > 0
        if lender is not None:
            self.events["forked"] += 1
            self.events["forked with shared pages"] += sequence.num_computed >= self.limits.page_size
            self.events["forked with a copied page"] += sequence.was_copied
            self.events["resumed as a fork, with generated tokens"] += len(sequence.tokens) > len(
                sequence.request.prompt
            )
            others = self._group_in_slots(sequence)
            self.events["a fork of this step is not yet a lender"] += others.index(lender) > 0 and others[0].was_copied

    def _shares(self, sequence: Sequence, other: Sequence | None) -> bool:
        return other is not None and other is not sequence and bool(set(sequence.pages) & set(other.pages))

    def _is_valid(self, request: Request, first: Request) -> bool:
        return (
            (request.prompt, request.prompt_length) == (first.prompt, first.prompt_length)
            and 1 <= request.prompt_length <= self.limits.max_model_len - 1
            and request.max_tokens >= 1
            and all(0 <= token < VOCAB_SIZE for token in request.prompt)
        )

    def _max_length(self, sequence: Sequence) -> int:
        return min(len(sequence.request.prompt) + sequence.request.max_tokens, self.limits.max_model_len)

    def _pages_of(self, sequence: Sequence) -> set[int]:
        """Which pages of a sequence its known tokens lie on."""
        return {position // self.limits.page_size for position in range(len(sequence.tokens))}

    def _positions_of(self, place: int) -> range:
        """Returns the positions on the page at `place` of a sequence."""
        return range(place * self.limits.page_size, (place + 1) * self.limits.page_size)

    def _lacks_a_page(self, sequence: Sequence) -> bool:
        return sequence.is_decoding and len(sequence.tokens) > len(sequence.pages) * self.limits.page_size

    def _leave_slot(self, sequence: Sequence) -> None:
        self.slots[self.slots.index(sequence)] = None
        assert not self.free_pages & set(sequence.pages)
        kept = {page for other in self.slots if other is not None for page in other.pages}
        self.events["shared pages outlive an owner"] += bool(kept & set(sequence.pages))
        self.free_pages.update(set(sequence.pages) - kept)
        sequence.pages = []
        sequence.num_computed = 0

    def _end(self, sequence: Sequence, reason: str) -> None:
        sequence.status = reason
        self.endings.append((sequence.number, reason))
        self.events[f"ended: {reason}"] += 1
