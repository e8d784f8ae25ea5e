"""What to send to one variant, and when: for one client, or cut into shares for several."""

from dataclasses import dataclass, replace

from loadtest.send.workload import Conversation


@dataclass(frozen=True)
class Batch:
    """The conversations of a warm-up or of a block; most have one turn.

    Attributes:
        variant: who gets them.
        conversations: in the order in which they begin.
        concurrency: closed loop: conversations at a time; the next begins when one is over.
        due_s: open loop: when each conversation begins, in seconds from the start, ascending,
            however many are going on; None = closed loop.
        until_eos: whether answers end by themselves; else all have the tokens that are asked for.
    """

    variant: str
    conversations: tuple[Conversation, ...]
    concurrency: int
    due_s: tuple[float, ...] | None = None
    until_eos: bool = False

    def shares(self, num: int) -> list["Batch"]:
        """Cuts it into `num` batches that together do the same; a closed loop needs a place each.

        In a closed loop every share gets conversations in proportion to its places.
        """
        period = self.concurrency if self.due_s is None else num
        return [
            replace(
                self,
                conversations=tuple(
                    conversation
                    for place, conversation in enumerate(self.conversations)
                    if place % period % num == share
                ),
                concurrency=len(range(share, self.concurrency, num)),
                due_s=None if self.due_s is None else self.due_s[share::num],
            )
            for share in range(num)
        ]
