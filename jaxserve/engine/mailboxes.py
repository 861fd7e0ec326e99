"""Updates on their way to their callers: each caller of `Engine.serve` has a mailbox, and all other updates share one."""

from collections.abc import Iterable

from jaxserve.engine.live_requests import Update


class Mailboxes:
    """Sorts updates by the caller that waits for them, so that updates left by one caller cost the others nothing."""

    def __init__(self) -> None:
        self._shared: list[Update] = []
        self._open: list[list[Update]] = []
        self._by_request: dict[str, list[Update]] = {}  # by request id, until the request's last update has come

    @property
    def has_updates(self) -> bool:
        """Whether there is an update that has not been taken."""
        return bool(self._shared) or any(self._open)

    def open(self, request_ids: Iterable[str]) -> list[Update]:
        """Returns a new mailbox, to which updates of these requests are appended; its owner empties it."""
        mailbox: list[Update] = []
        self._open.append(mailbox)
        self._by_request |= dict.fromkeys(request_ids, mailbox)
        return mailbox

    def close(self, mailbox: list[Update], request_ids: Iterable[str]) -> None:
        """Ends a mailbox: updates that are in it, or come later for the requests, go to the shared one."""
        self._open = [other for other in self._open if other is not mailbox]
        self._shared += mailbox
        for request_id in request_ids:
            if self._by_request.get(request_id) is mailbox:
                del self._by_request[request_id]

    def put(self, updates: Iterable[Update]) -> None:
        """Puts each update into the mailbox of its request, or into the shared one."""
        for update in updates:
            find = self._by_request.get if update.output is None else self._by_request.pop
            find(update.request_id, self._shared).append(update)

    def take_all(self) -> list[Update]:
        """Empties all mailboxes."""
        updates = [*self._shared, *(update for mailbox in self._open for update in mailbox)]
        for mailbox in (self._shared, *self._open):
            mailbox.clear()
        return updates

    def clear(self) -> None:
        """Forgets all updates, and which request belongs to which mailbox."""
        self.take_all()
        self._by_request.clear()
